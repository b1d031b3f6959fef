//! After the faults: everything heals within a deadline, and every node is asked what it holds.
//!
//! Not here: whether that is right (`tombolo-jepsen-check`).

use crate::client::{Client, Freshness};
use crate::cluster::{Cluster, command};
use crate::plan::{Plan, Workload};
use crate::recorder::{Recorder, What};
use crate::workload::register::{only, read};
use crate::workload::set::parse;
use crate::workload::{NAMESPACE, Session};
use anyhow::Context;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};
use tombolo_jepsen_history::{Facts, Kind};
use tombolo_proto::v1;

/// How long regions may take from the end of the faults until all nodes hold the same.
const HEAL_PATIENCE: Duration = Duration::from_secs(60);
const SCAN_PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(200);
/// How often a key may be read in vain.
const READ_ATTEMPTS: u32 = 50;
const VERIFY_PATIENCE: Duration = Duration::from_secs(60);

/// What a node holds: for each key, the dots of its versions and a value.
type Holding = BTreeMap<String, (Vec<String>, Option<u64>)>;

/// How it ended.
#[derive(Clone, Debug)]
pub(crate) struct Settled {
    /// Milliseconds until all nodes held the same; none if they did not in time.
    pub(crate) converged_ms: Option<u64>,
    /// What stands against it, in words.
    pub(crate) problems: Vec<String>,
    /// The last lines of `ctl verify`, by pair of regions, and whether it proved equality.
    pub(crate) verified: Vec<(String, bool, String)>,
}

/// Waits until all nodes hold the same, and records what each holds.
pub(crate) async fn settle(
    plan: &Plan,
    cluster: &Cluster,
    recorder: &Arc<Recorder>,
) -> anyhow::Result<Settled> {
    let begun = Instant::now();
    let keys: BTreeSet<(String, String)> = recorder
        .history()?
        .events
        .iter()
        .filter_map(|event| Some((event.key.clone()?, event.x.region.clone()?)))
        .collect();
    let mut problems = Vec::new();
    if plan.workload == Workload::Register {
        for (key, region) in &keys {
            if !read_once(cluster, recorder, key, region).await? {
                problems.push(format!("{key} cannot be read in {region}"));
            }
        }
    }
    let values = plan.workload == Workload::Register;
    let (holdings, converged) = loop {
        let since = Instant::now();
        let holdings = ask_all(cluster, values, recorder).await?;
        let first = holdings.values().next().and_then(|held| held.as_ref().ok());
        let equal = first.is_some()
            && holdings
                .values()
                .all(|held| held.as_ref().ok().map(|it| &it.0) == first.map(|it| &it.0));
        if equal || since.duration_since(begun) > HEAL_PATIENCE {
            break (holdings, equal);
        }
        sleep(POLL).await;
    };
    let converged_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    for (node, held) in &holdings {
        if let Err(why) = held {
            problems.push(format!("{node} does not tell what it holds: {why}"));
        }
    }
    let names: BTreeSet<String> = keys.into_iter().map(|(key, _)| key).collect();
    record(plan.workload, cluster, recorder, &names, &holdings)?;
    let verified = verify_all(plan, cluster).await?;
    Ok(Settled { converged_ms: converged.then_some(converged_ms), problems, verified })
}

/// One linearizable read of a key, after as many attempts as it takes.
async fn read_once(
    cluster: &Cluster,
    recorder: &Arc<Recorder>,
    key: &str,
    region: &str,
) -> anyhow::Result<bool> {
    let nodes: Vec<&str> = cluster.layout.nodes_of(region).map(|node| &*node.name).collect();
    for (attempt, node) in (0..READ_ATTEMPTS).zip(nodes.iter().cycle()) {
        let mut session = Session::new(cluster.client(node).await?, recorder, u64::from(attempt));
        let key = key.to_owned();
        let reading =
            async move { read(&mut session, &key, Freshness::Linearizable).await.is_some() };
        if cluster.place(region)?.run(reading).await? {
            return Ok(true);
        }
        sleep(POLL).await;
    }
    Ok(false)
}

/// What each node says that it holds, and the process that has asked.
type Holdings = BTreeMap<String, Result<(Holding, u64), String>>;

async fn ask_all(
    cluster: &Cluster,
    values: bool,
    recorder: &Arc<Recorder>,
) -> anyhow::Result<Holdings> {
    let mut asked = Vec::new();
    for node in &cluster.layout.nodes {
        let client = cluster.client(&node.name).await?;
        let task = cluster.place(&node.region)?.spawn(async move { ask(&client, values).await });
        asked.push((node.name.clone(), task));
    }
    let mut holdings = Holdings::new();
    for (node, task) in asked {
        let held = task.await.context("asking a node")?;
        holdings.insert(node, held.map(|held| (held, recorder.new_process())));
    }
    Ok(holdings)
}

async fn ask(client: &Client, values: bool) -> Result<Holding, String> {
    let results = client.scan(NAMESPACE, "", Freshness::Local, !values, SCAN_PATIENCE).await;
    let results = results.map_err(|failure| failure.words().to_owned())?;
    let mut holding = Holding::new();
    for result in results {
        let value = if values {
            only(&result.versions).map_err(|failure| failure.words().to_owned())?
        } else {
            None
        };
        let mut dots: Vec<String> = result.versions.iter().map(dot).collect();
        dots.sort_unstable();
        holding.insert(String::from_utf8_lossy(&result.key).into_owned(), (dots, value));
    }
    Ok(holding)
}

fn dot(version: &v1::Version) -> String {
    let dot = version.dot.unwrap_or_default();
    format!("{}.{}:{}", dot.region, dot.incarnation, dot.seq)
}

/// Writes what each node holds into the history, as reads of the kind `final`.
fn record(
    workload: Workload,
    cluster: &Cluster,
    recorder: &Recorder,
    names: &BTreeSet<String>,
    holdings: &Holdings,
) -> anyhow::Result<()> {
    for (node, held) in holdings {
        let Ok((holding, process)) = held else { continue };
        let region = cluster.node(node)?.region.clone();
        let x = Facts { region: Some(region), node: Some(node.clone()), ..Facts::default() };
        let mut told: BTreeMap<String, Value> = names
            .iter()
            .map(|name| match workload {
                Workload::Register => (name.clone(), Value::Null),
                Workload::GSet | Workload::Delete => (name.clone(), json!([])),
            })
            .collect();
        for (key, (_, value)) in holding {
            match workload {
                Workload::Register => {
                    told.insert(key.clone(), json!(value));
                }
                Workload::GSet | Workload::Delete => {
                    let (set, element) = parse(key.as_bytes());
                    let elements = told.entry(set).or_insert_with(|| json!([]));
                    if let Some(elements) = elements.as_array_mut() {
                        elements.push(json!(element));
                    }
                }
            }
        }
        for (key, value) in told {
            // The answer came before, and nothing has changed since.
            let mut what = What { f: "final", key, value: Value::Null };
            recorder.client(*process, Kind::Invoke, &what, x.clone());
            what.value = value;
            recorder.client(*process, Kind::Ok, &what, x.clone());
        }
    }
    Ok(())
}

/// Asks `ctl verify` whether the first region and each other one hold the same.
async fn verify_all(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Vec<(String, bool, String)>> {
    let regions = &cluster.layout.shape.regions;
    let mut verified = Vec::new();
    for other in regions.iter().skip(1) {
        let addresses = |region: &str| {
            let nodes = cluster.layout.nodes_of(region).map(|node| node.client.to_string());
            nodes.collect::<Vec<_>>().join(",")
        };
        let arguments =
            ["ctl", "verify", &addresses(&regions[0]), &addresses(other), "--namespace", NAMESPACE];
        let arguments = arguments.map(str::to_owned).to_vec();
        let place = cluster.net.clients_of(&regions[0]);
        let (program, arguments) = command(place, &plan.program, arguments)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let pair = format!("{} {other}", regions[0]);
        let (equal, words) = match timeout(VERIFY_PATIENCE, command.output()).await {
            Ok(output) => {
                let output = output.context("ctl verify")?;
                let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                (output.status.success(), format!("{}; {words}", output.status))
            }
            Err(_) => (false, "no answer in time".into()),
        };
        verified.push((pair, equal, words));
    }
    Ok(verified)
}
