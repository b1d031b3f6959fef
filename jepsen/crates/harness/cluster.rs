//! The nodes of a run as processes, and what can be asked of them.

use crate::client::Client;
use crate::net::Net;
use crate::place::Place;
use crate::plan::Plan;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, timeout};
use tombolo_demo::layout::{Layout, NodePlan};
use tombolo_demo::processes::{Fleet, Launch, log_tail};
use tombolo_demo::readiness;

/// How long nodes may take from start to ready.
const READY_PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);
/// How long a node may take to tell who leads.
const VIEW_PATIENCE: Duration = Duration::from_millis(400);
/// A node that has not stopped this long after SIGTERM is killed.
const STOP_GRACE: Duration = Duration::from_secs(8);
/// What a log of a process that broke an invariant of its own holds.
const PANIC: &str = "panicked";

/// Who leads a shard: term and node number.
pub(crate) type Leader = (u64, u64);

/// Nodes, network and clients' threads of one run. Dropping it kills everything.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) layout: Layout,
    // Before the network, so that nodes end first.
    pub(crate) fleet: Fleet,
    pub(crate) places: BTreeMap<String, Place>,
    pub(crate) net: Net,
}

impl Cluster {
    /// Starts all nodes and waits until they are ready.
    pub(crate) async fn start(plan: &Plan, dir: &Path) -> anyhow::Result<Self> {
        let (net, layout, proxies) = Net::build(plan, dir).await?;
        layout.write_configs(&proxies)?;
        let mut places = BTreeMap::new();
        for region in &layout.shape.regions {
            places.insert(region.clone(), Place::start(net.clients_of(region)).await?);
        }
        let launches = layout.nodes.iter().map(|node| launch(plan, &net, node));
        let fleet = Fleet::new(launches.collect::<anyhow::Result<_>>()?)?;
        let cluster = Self { layout, fleet, places, net };
        cluster.fleet.start_all().await?;
        for node in &cluster.layout.nodes {
            cluster.wait_ready(&node.name).await?;
        }
        Ok(cluster)
    }

    pub(crate) fn place(&self, region: &str) -> anyhow::Result<&Place> {
        self.places.get(region).with_context(|| format!("no region {region}"))
    }

    pub(crate) fn node(&self, name: &str) -> anyhow::Result<&NodePlan> {
        let mut nodes = self.layout.nodes.iter();
        nodes.find(|node| node.name == name).with_context(|| format!("no node {name}"))
    }

    /// A connection to a node, from the clients of its region.
    pub(crate) async fn client(&self, name: &str) -> anyhow::Result<Client> {
        let node = self.node(name)?.clone();
        self.place(&node.region)?.run(async move { Client::new(&node) }).await?
    }

    /// Waits until a node says that it serves.
    pub(crate) async fn wait_ready(&self, name: &str) -> anyhow::Result<()> {
        let node = self.node(name)?;
        let deadline = Instant::now() + READY_PATIENCE;
        loop {
            let why = match self.get(node, "/readyz?verbose").await {
                Ok((200, _)) => return Ok(()),
                Ok((status, body)) => format!("{status}: {}", body.trim()),
                Err(error) => format!("{error:#}"),
            };
            if Instant::now() > deadline || self.fleet.state(name)?.pid().is_none() {
                bail!("{name} is not ready: {why}\n{}", log_tail(&node.log_path()));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Gets a path over HTTP from a node.
    async fn get(&self, node: &NodePlan, path: &str) -> anyhow::Result<(u16, String)> {
        let (http, path) = (node.http, path.to_owned());
        let place = self.place(&node.region)?;
        Ok(place.run(async move { readiness::get(http, &path).await }).await??)
    }

    /// The sum of the series of a metric on one node; 0 if it has none.
    pub(crate) async fn metric(&self, name: &str, metric: &str) -> anyhow::Result<f64> {
        let (_, body) = self.get(self.node(name)?, "/metrics").await?;
        Ok(sum_of(&body, |series| series == metric))
    }

    /// The sum of all counters of a region whose names hold this.
    pub(crate) async fn counters_with(&self, region: &str, part: &str) -> f64 {
        let mut sum = 0.0;
        for node in self.layout.nodes_of(region) {
            if let Ok((_, body)) = self.get(node, "/metrics").await {
                sum += sum_of(&body, |name| name.contains(part) && name.ends_with("_total"));
            }
        }
        sum
    }

    /// The newest leader of each shard that any node of the region knows.
    pub(crate) async fn leaders(&self, region: &str) -> BTreeMap<u32, Leader> {
        let mut leaders: BTreeMap<u32, Leader> = BTreeMap::new();
        let names: Vec<&str> = self.layout.nodes_of(region).map(|node| &*node.name).collect();
        let views = names.into_iter().map(|name| async move {
            let client = self.client(name).await?;
            let place = self.place(&client.region)?;
            let asking = place.run(async move { client.cluster().await });
            // A frozen node must not hide what the others know.
            anyhow::Ok(timeout(VIEW_PATIENCE, asking).await??)
        });
        for view in futures::future::join_all(views).await.into_iter().flatten().flatten() {
            for leader in view.leaders {
                let known = leaders.entry(leader.shard).or_default();
                *known = (*known).max((leader.term, leader.leader_node_id));
            }
        }
        leaders
    }

    /// The node that leads most shards of a region, and how many.
    pub(crate) async fn main_leader(&self, region: &str) -> Option<(String, usize)> {
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        for (_, node) in self.leaders(region).await.values() {
            *counts.entry(*node).or_default() += usize::from(*node > 0);
        }
        let (number, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
        let node = self.layout.nodes_of(region).find(|node| node.node_id == number)?;
        (count > 0).then(|| (node.name.clone(), count))
    }

    /// Nodes that ended by themselves, and lines of logs that tell of a panic.
    pub(crate) fn wreckage(&self) -> Vec<String> {
        let crashes = self.fleet.crashes();
        let mut found: Vec<String> = crashes
            .borrow()
            .iter()
            .map(|crash| format!("{} ended by itself: {}", crash.name, crash.how))
            .collect();
        for node in &self.layout.nodes {
            match std::fs::read(node.log_path()) {
                Ok(log) => {
                    let log = String::from_utf8_lossy(&log).into_owned();
                    let lines = log.lines().filter(|line| line.contains(PANIC));
                    found.extend(lines.take(3).map(|line| format!("{}: {line}", node.name)));
                }
                Err(error) => found.push(format!("the log of {}: {error}", node.name)),
            }
        }
        found
    }

    /// Stops all nodes; none is left after.
    pub(crate) async fn stop(&self) {
        self.fleet.stop(STOP_GRACE).await;
    }

    /// Kills all nodes at once.
    pub(crate) async fn kill(&self) {
        self.fleet.stop(Duration::ZERO).await;
    }
}

/// How to run a node, in its namespace if it has one.
fn launch(plan: &Plan, net: &Net, node: &NodePlan) -> anyhow::Result<Launch> {
    let mut server: Vec<String> =
        vec!["server".into(), "--config".into(), node.config_path().display().to_string()];
    server.extend(plan.server_arguments());
    let (program, arguments) = command(net.namespace_of(&node.name), &plan.program, server)?;
    Ok(Launch { name: node.name.clone(), program, arguments, log: node.log_path() })
}

/// A command in a namespace, which this executable enters before it becomes the program.
pub(crate) fn command(
    namespace: Option<PathBuf>,
    program: &Path,
    arguments: Vec<String>,
) -> anyhow::Result<(PathBuf, Vec<String>)> {
    let Some(namespace) = namespace else { return Ok((program.to_owned(), arguments)) };
    let mut all = vec!["enter".into(), namespace.display().to_string()];
    all.push(program.display().to_string());
    all.extend(arguments);
    Ok((std::env::current_exe().context("finding this executable")?, all))
}

/// Sums the series of a metrics page whose names are wanted.
fn sum_of(page: &str, wanted: impl Fn(&str) -> bool) -> f64 {
    let series = page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let name = line.split(['{', ' ']).next()?;
        let value = line.rsplit(' ').next()?.parse::<f64>().ok()?;
        wanted(name).then_some(value)
    });
    series.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_of_a_metric_are_summed() {
        let page = "# HELP a Help.\na{peer=\"us\"} 3\na{peer=\"e u\"} 4.5\nab 9\n# EOF\n";
        assert!((sum_of(page, |name| name == "a") - 7.5).abs() < 1e-9);
        assert!(sum_of(page, |name| name == "c").abs() < 1e-9);
    }
}
