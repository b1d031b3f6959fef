//! `ctl status`: one look at nodes, shards, regions and links.
//!
//! Healthy means: every node up and its clock right, every shard led and without a problem, every
//! region up and its clocks right.

use crate::ctl::{LinkJson, word};
use crate::exit::Failure;
use crate::output::{Format, json, show_seconds, table};
use crate::region::{RegionJson, print_regions, show_state};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;
use tombolo_client::{Client, proto as v1};

pub(crate) struct Status {
    cluster: v1::GetClusterResponse,
    nodes: Vec<v1::Node>,
    shards: Vec<v1::Shard>,
    regions: Vec<v1::Region>,
    links: Vec<v1::Link>,
    unreachable: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatusJson {
    healthy: bool,
    cluster_id: String,
    region: String,
    version: String,
    shard_count: u32,
    nodes: Vec<NodeJson>,
    shards: Vec<ShardJson>,
    regions: Vec<RegionJson>,
    links: Vec<LinkJson>,
    unreachable: Vec<String>,
    problems: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeJson {
    node_id: String,
    client_address: String,
    http_address: String,
    state: &'static str,
    last_seen_seconds: f64,
    version: String,
    clock: &'static str,
    clock_offset_seconds: f64,
    clock_uncertainty_seconds: f64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ShardJson {
    shard: u32,
    leader_node_id: String,
    term: String,
    commit_index: String,
    applied_index: String,
    problem: String,
}

impl Status {
    pub(crate) async fn read(client: &Client) -> Result<Self, Failure> {
        let admin = client.admin();
        let (cluster, nodes, shards, regions, links) = tokio::try_join!(
            admin.cluster(),
            admin.list_nodes(),
            admin.list_shards(),
            admin.list_regions(),
            admin.list_links(None),
        )?;
        let mut unreachable = regions.unreachable;
        unreachable.extend(links.unreachable);
        unreachable.sort();
        unreachable.dedup();
        let (regions, links) = (regions.regions, links.links);
        Ok(Self { cluster, nodes, shards, regions, links, unreachable })
    }

    /// Everything that is not as it should be, one sentence each.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for node in self.nodes.iter().filter(|it| it.state() != v1::NodeState::Up) {
            let state = word(node.state().as_str_name(), "NODE_STATE_");
            problems.push(format!("node {} is {state}", node.node_id));
        }
        for node in &self.nodes {
            let offset = show_offset(node.clock_offset_seconds);
            match node.clock() {
                v1::ClockState::Outside => problems.push(format!(
                    "the clock of node {} is off by {offset}: it must not lead; correct its time",
                    node.node_id
                )),
                v1::ClockState::Undecided => problems.push(format!(
                    "the clock of node {} is {offset} from others, and nobody can tell whose is \
                     wrong; correct the nodes' time",
                    node.node_id
                )),
                v1::ClockState::Unspecified | v1::ClockState::Alone | v1::ClockState::Inside => {}
            }
        }
        for shard in &self.shards {
            if shard.leader_node_id == 0 {
                problems.push(format!("shard {} has no leader", shard.shard));
            }
            if !shard.problem.is_empty() {
                problems.push(format!("shard {}: {}", shard.shard, shard.problem));
            }
        }
        for region in self.regions.iter().filter(|it| is_noteworthy(it)) {
            let state = show_state(region);
            problems.push(format!("region {} is {state}", region.name));
        }
        for region in self.regions.iter().filter(|it| it.clock_ahead_seconds > 0.0) {
            let ahead = show_offset(region.clock_ahead_seconds);
            problems.push(format!(
                "region {} stamps times that are off by {ahead}; correct the time of its nodes",
                region.name
            ));
        }
        problems
    }

    pub(crate) fn is_healthy(&self) -> bool {
        self.problems().is_empty()
    }

    pub(crate) fn print(
        &self,
        format: Format,
        all_shards: bool,
        out: &mut dyn Write,
    ) -> std::io::Result<()> {
        match format {
            Format::Json | Format::Jsonl => json(out, format, &self.json()),
            Format::Table | Format::Raw => self.text(all_shards, out),
        }
    }

    fn text(&self, all_shards: bool, out: &mut dyn Write) -> std::io::Result<()> {
        let problems = self.problems();
        let summary = match problems.len() {
            0 => "healthy".to_owned(),
            1 => "1 problem".to_owned(),
            count => format!("{count} problems"),
        };
        let v1::GetClusterResponse { cluster_id, region, version, shard_count, .. } = &self.cluster;
        writeln!(
            out,
            "cluster {cluster_id}, region {region}, {shard_count} shards, version {version}: {summary}\n"
        )?;

        let mut led: BTreeMap<u64, u32> = BTreeMap::new();
        for shard in &self.shards {
            *led.entry(shard.leader_node_id).or_default() += 1;
        }
        let row = |node: &v1::Node| {
            [
                node.node_id.to_string(),
                node.client_address.clone(),
                word(node.state().as_str_name(), "NODE_STATE_"),
                led.get(&node.node_id).copied().unwrap_or(0).to_string(),
                show_seconds(node.last_seen_seconds),
                show_clock(node),
                node.version.clone(),
            ]
        };
        let header = ["NODE", "ADDRESS", "STATE", "LEADS", "SEEN", "CLOCK", "VERSION"];
        table(out, header, self.nodes.iter().map(row))?;

        writeln!(out)?;
        print_regions(&self.regions, Format::Table, out)?;

        if !self.links.is_empty() {
            writeln!(out)?;
            self.links_text(out)?;
        }

        let shown =
            |it: &&v1::Shard| all_shards || it.leader_node_id == 0 || !it.problem.is_empty();
        let mut shards = self.shards.iter().filter(shown).peekable();
        if shards.peek().is_some() {
            writeln!(out)?;
            let row = |shard: &v1::Shard| {
                let leader = match shard.leader_node_id {
                    0 => "none".to_owned(),
                    node => node.to_string(),
                };
                [
                    shard.shard.to_string(),
                    leader,
                    shard.term.to_string(),
                    shard.commit_index.to_string(),
                    shard.applied_index.to_string(),
                    shard.problem.clone(),
                ]
            };
            let header = ["SHARD", "LEADER", "TERM", "COMMITTED", "APPLIED", "PROBLEM"];
            table(out, header, shards.map(row))?;
        }

        if !self.unreachable.is_empty() {
            writeln!(out, "\nincomplete: no answer from {}", self.unreachable.join(", "))?;
        }
        if !problems.is_empty() {
            writeln!(out)?;
            problems.iter().try_for_each(|problem| writeln!(out, "! {problem}"))?;
        }
        Ok(())
    }

    /// One row a peer: how many links are in which phase, and the worst lag.
    fn links_text(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let mut peers: BTreeMap<&str, Vec<&v1::Link>> = BTreeMap::new();
        for link in &self.links {
            peers.entry(&link.peer_region).or_default().push(link);
        }
        let row = |(peer, links): (&&str, &Vec<&v1::Link>)| {
            let mut phases: BTreeMap<String, u32> = BTreeMap::new();
            for link in links {
                *phases.entry(word(link.phase().as_str_name(), "LINK_PHASE_")).or_default() += 1;
            }
            let phases: Vec<_> =
                phases.iter().map(|(phase, count)| format!("{count} {phase}")).collect();
            let lag = links.iter().map(|it| it.lag_seconds).fold(0.0, f64::max);
            let behind: u64 = links.iter().map(|it| it.lag_events).sum();
            let unacked: u64 = links.iter().map(|it| it.unacknowledged_events).sum();
            let error = links.iter().map(|it| it.last_error.as_str()).find(|it| !it.is_empty());
            [
                (*peer).to_owned(),
                phases.join(", "),
                show_seconds(lag),
                behind.to_string(),
                unacked.to_string(),
                error.unwrap_or_default().to_owned(),
            ]
        };
        let header = ["LINKS WITH", "PHASES", "LAG", "BEHIND", "UNACKED", "LAST ERROR"];
        table(out, header, peers.iter().map(row))
    }

    fn json(&self) -> StatusJson {
        let node = |it: &v1::Node| NodeJson {
            node_id: it.node_id.to_string(),
            client_address: it.client_address.clone(),
            http_address: it.http_address.clone(),
            state: it.state().as_str_name(),
            last_seen_seconds: it.last_seen_seconds,
            version: it.version.clone(),
            clock: it.clock().as_str_name(),
            clock_offset_seconds: it.clock_offset_seconds,
            clock_uncertainty_seconds: it.clock_uncertainty_seconds,
        };
        let shard = |it: &v1::Shard| ShardJson {
            shard: it.shard,
            leader_node_id: it.leader_node_id.to_string(),
            term: it.term.to_string(),
            commit_index: it.commit_index.to_string(),
            applied_index: it.applied_index.to_string(),
            problem: it.problem.clone(),
        };
        let problems = self.problems();
        StatusJson {
            healthy: problems.is_empty(),
            cluster_id: self.cluster.cluster_id.clone(),
            region: self.cluster.region.clone(),
            version: self.cluster.version.clone(),
            shard_count: self.cluster.shard_count,
            nodes: self.nodes.iter().map(node).collect(),
            shards: self.shards.iter().map(shard).collect(),
            regions: self.regions.iter().map(RegionJson::from).collect(),
            links: self.links.iter().map(LinkJson::from).collect(),
            unreachable: self.unreachable.clone(),
            problems,
        }
    }
}

/// A node's clock in a few words.
fn show_clock(node: &v1::Node) -> String {
    let offset = show_offset(node.clock_offset_seconds);
    match node.clock() {
        v1::ClockState::Unspecified => "unknown".to_owned(),
        v1::ClockState::Alone => "alone".to_owned(),
        v1::ClockState::Inside => offset,
        v1::ClockState::Undecided => format!("undecided, {offset}"),
        v1::ClockState::Outside => format!("outside, {offset}"),
    }
}

/// How far ahead a clock is, or behind.
fn show_offset(seconds: f64) -> String {
    let sign = if seconds < 0.0 { '-' } else { '+' };
    let size = Duration::try_from_secs_f64(seconds.abs()).unwrap_or(Duration::MAX);
    let size = if size < Duration::from_secs(10) {
        format!("{:.1}ms", size.as_secs_f64() * 1000.0)
    } else {
        let whole = Duration::from_secs(size.as_secs());
        humantime::format_duration(whole).to_string()
    };
    format!("{sign}{size}")
}

/// Whether a region is anything but up, and not gone for good.
fn is_noteworthy(region: &v1::Region) -> bool {
    match region.membership() {
        v1::Membership::Removed => false,
        v1::Membership::Active | v1::Membership::Unspecified => {
            region.state() != v1::RegionState::Up
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_shown_by_its_offset_and_whether_it_may_lead() {
        let show = |clock: v1::ClockState, clock_offset_seconds| {
            let clock = clock.into();
            show_clock(&v1::Node { clock, clock_offset_seconds, ..v1::Node::default() })
        };
        assert_eq!(show(v1::ClockState::Inside, 0.000_42), "+0.4ms");
        assert_eq!(show(v1::ClockState::Inside, -0.0123), "-12.3ms");
        assert_eq!(show(v1::ClockState::Outside, 28_800.2), "outside, +8h");
        assert_eq!(show(v1::ClockState::Outside, -28_800.2), "outside, -8h");
        assert_eq!(show(v1::ClockState::Undecided, 2.5), "undecided, +2500.0ms");
        assert_eq!(show(v1::ClockState::Alone, 0.0), "alone");
        assert_eq!(show(v1::ClockState::Unspecified, 0.0), "unknown");
    }
}
