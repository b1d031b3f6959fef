//! What a demo prints: the table of its nodes, ready-made commands, and its status.
//!
//! Not here: where it is printed to; every function returns text.

use std::fmt::Write;
use std::path::Path;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;

use crate::control::Status;
use crate::layout::Layout;
use crate::place::Running;
use crate::processes::Crash;
use crate::proxy::Mode;

/// The table of endpoints and the commands to try first. `named` is the data directory when the
/// caller chose it.
#[must_use]
pub fn welcome(layout: &Layout, running: &Running, named: Option<&Path>) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["node", "clients (gRPC)", "health and metrics", "links", "pid"]);
    for node in &running.nodes {
        table.add_row([
            node.name.clone(),
            node.client.clone(),
            format!("http://{}", node.http),
            node.link.clone(),
            node.pid.map_or_else(|| "-".into(), |pid| pid.to_string()),
        ]);
    }
    let mut text = format!("{table}\n\ntry:\n");
    for (command, meaning) in commands(layout, named) {
        // Writing to a string does not fail.
        writeln!(text, "  {command:<52} # {meaning}").ok();
    }
    writeln!(text, "\ndata and logs: {}", layout.data_dir.display()).ok();
    text.push_str("Ctrl-C stops everything\n");
    text
}

fn commands(layout: &Layout, named: Option<&Path>) -> Vec<(String, String)> {
    let regions = &layout.shape.regions;
    let first_of = |region: &str| layout.nodes_of(region).next();
    let mut commands = Vec::new();
    let mut say = |command: String, meaning: String| commands.push((command, meaning));
    let Some(home) = regions.first() else { return commands };
    let Some(node) = first_of(home) else { return commands };
    say(format!("tombolo put -e {} hello world", node.client), format!("write in {home}"));
    for region in &regions[1..] {
        if let Some(node) = first_of(region) {
            say(format!("tombolo get -e {} hello", node.client), format!("read in {region}"));
        }
    }
    say(format!("curl 'http://{}/readyz?verbose'", node.http), format!("ask {}", node.name));
    let option = named.map(|path| format!(" --data-dir {}", path.display())).unwrap_or_default();
    let mut verb = |verb: String, meaning: &str| {
        say(format!("tombolo demo {verb}{option}"), meaning.into());
    };
    verb("status".into(), "what runs and what is cut");
    if let Some(other) = regions.get(1) {
        verb(format!("partition {home} {other}"), "cut two regions from each other");
        verb("heal".into(), "and join them again");
    }
    if let Some(last) = layout.nodes_of(home).last() {
        verb(format!("kill {}", last.name), "kill -9 a node");
        verb(format!("restart {}", last.name), "and bring it back");
    }
    commands
}

/// The answer to `status`, for people.
#[must_use]
pub fn status(status: &Status) -> String {
    let mut nodes = Table::new();
    nodes.load_style(UTF8_FULL_CONDENSED).set_header(["node", "state", "pid", "clients (gRPC)"]);
    for node in &status.nodes {
        nodes.add_row([
            node.name.clone(),
            node.state.clone(),
            node.pid.map_or_else(|| "-".into(), |pid| pid.to_string()),
            node.client.clone(),
        ]);
    }
    let mut network = Table::new();
    network.load_style(UTF8_FULL_CONDENSED);
    network.set_header(["from", "to", "network", "one way", "connections", "delivered bytes"]);
    for direction in &status.network {
        let mode = match direction.mode {
            Mode::Pass => "passes",
            Mode::Blackhole => "CUT",
            Mode::Reset => "CUT (reset)",
        };
        network.add_row([
            direction.from.clone(),
            direction.to.clone(),
            mode.into(),
            format!("{} ms", direction.delay_ms),
            direction.connections.to_string(),
            direction.delivered_bytes.to_string(),
        ]);
    }
    format!(
        "{} has run for {} s in {}\n{nodes}\n{network}\n",
        status.cluster_id, status.up_seconds, status.data_dir
    )
}

/// A process that ended by itself, with the end of its log.
#[must_use]
pub fn crash(crash: &Crash) -> String {
    let mut text = format!("{} ended by itself: {}\n", crash.name, crash.how);
    for line in crash.log_tail.lines() {
        writeln!(text, "  | {line}").ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Shape;
    use crate::processes::Fleet;

    #[tokio::test]
    async fn the_welcome_has_every_endpoint_and_commands_with_real_names() {
        let shape = Shape {
            cluster_id: "demo-1".into(),
            regions: vec!["us".into(), "eu".into()],
            nodes: 2,
            shards: 1,
            base_port: 7101,
        };
        let layout = Layout::plan(Path::new("/demo"), shape);
        let fleet = Fleet::new(Vec::new()).unwrap();
        let running = Running::describe(&layout, &fleet, Path::new("/demo/control.sock"));

        let text = welcome(&layout, &running, Some(Path::new("/demo")));

        for node in &layout.nodes {
            assert!(text.contains(&node.name) && text.contains(&node.client.to_string()), "{text}");
        }
        for command in [
            "tombolo put -e 127.0.0.1:7101 hello world",
            "tombolo get -e 127.0.0.1:7109 hello",
            "tombolo demo partition us eu --data-dir /demo",
            "tombolo demo kill us-2 --data-dir /demo",
        ] {
            assert!(text.contains(command), "{command} is not in\n{text}");
        }
    }

    #[tokio::test]
    async fn one_region_alone_is_offered_no_partition() {
        let shape = Shape {
            cluster_id: "demo-1".into(),
            regions: vec!["us".into()],
            nodes: 1,
            shards: 1,
            base_port: 7101,
        };
        let layout = Layout::plan(Path::new("/demo"), shape);
        let fleet = Fleet::new(Vec::new()).unwrap();
        let running = Running::describe(&layout, &fleet, Path::new("/demo/control.sock"));

        let text = welcome(&layout, &running, None);

        assert!(!text.contains("partition"), "{text}");
        assert!(text.contains("tombolo demo status "), "{text}");
    }
}
