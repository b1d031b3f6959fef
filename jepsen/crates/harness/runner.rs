//! One run: start, act under faults, heal, look, judge, and leave nothing behind.

use crate::client::Freshness;
use crate::cluster::Cluster;
use crate::nemesis::{Attack, Injection};
use crate::plan::{Nemesis, Plan, Rule, Sabotage, Workload};
use crate::recorder::Recorder;
use crate::report::{RunReport, Tally, tally};
use crate::settle::{Settled, settle};
use crate::workload::set::key_in;
use crate::workload::{self, NAMESPACE, encode};
use anyhow::{Context, anyhow, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tombolo_jepsen_check::{
    Op, Outcome, Report, STEPS, Verdict, check_registers, check_sets, pair,
};
use tombolo_jepsen_history::History;
use tombolo_proto::v1;

const HISTORY: &str = "history.jsonl";
const PLAN: &str = "test.json";
const NODES: &str = "nodes";
/// How long clients may take to end what they have begun.
const CLIENTS_PATIENCE: Duration = Duration::from_secs(10);
/// How long a namespace may take to reach every node.
const NAMESPACE_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(200);
/// A pause of this process after which its own slowness could explain timeouts.
const STARVED_MS_MAX: u64 = 1500;
/// Operations in a hundred that may fail in a region that nothing inside is wrong with.
const REFUSED_PERCENT_MAX: u64 = 2;
/// Successful operations a second below which a run says too little, and of each kind in all.
const OK_PER_SECOND_MIN: u64 = 10;
const OK_EACH_MIN: usize = 10;

/// Runs a plan; its files go to `dir`, which must not exist.
///
/// On an error, or when the future is dropped, every process and namespace is gone too.
pub(crate) async fn run(plan: &Plan, dir: &Path) -> anyhow::Result<RunReport> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let dir = dir.canonicalize()?;
    std::fs::write(dir.join(PLAN), serde_json::to_vec_pretty(plan)?)?;
    let recorder = Arc::new(Recorder::create(&dir.join(HISTORY))?);
    let nodes = dir.join(NODES);
    std::fs::create_dir(&nodes)?;
    let cluster = Arc::new(Cluster::start(plan, &nodes).await?);
    let outcome = drive(plan, &cluster, &recorder).await;
    match &outcome {
        Ok(_) => cluster.stop().await,
        Err(_) => cluster.kill().await,
    }
    let (injections, settled, starved_ms) = outcome?;
    let history = recorder.history()?;
    let names: Vec<String> = cluster.layout.nodes.iter().map(|node| node.name.clone()).collect();
    let check = check(plan.workload, &history, &names);
    let ops = pair(&history)?;
    let mut report = RunReport {
        plan: plan.clone(),
        verdict: check.verdict,
        reasons: Vec::new(),
        check,
        injections,
        converged_ms: settled.converged_ms,
        verified: settled.verified.clone(),
        tallies: tally(&ops),
        network: cluster.net.figures(),
        starved_ms,
    };
    judge(&mut report, &settled, &cluster, &ops);
    std::fs::write(dir.join("report.json"), serde_json::to_vec_pretty(&report)?)?;
    std::fs::write(dir.join("report.txt"), report.text())?;
    if report.verdict == Verdict::Valid {
        // Of no use any more; of other runs everything is kept.
        std::fs::remove_dir_all(&nodes).context("removing the nodes' data")?;
    }
    Ok(report)
}

/// Checks the history of an earlier run again.
pub(crate) fn check_again(dir: &Path) -> anyhow::Result<(Plan, Report)> {
    let plan: Plan = serde_json::from_reader(BufReader::new(open(&dir.join(PLAN))?))?;
    let history = tombolo_jepsen_history::read(BufReader::new(open(&dir.join(HISTORY))?))?;
    let mut names = Vec::new();
    for region in plan.region_names() {
        names.extend((1..=plan.nodes).map(|number| format!("{region}-{number}")));
    }
    let report = check(plan.workload, &history, &names);
    Ok((plan, report))
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| path.display().to_string())
}

fn check(workload: Workload, history: &History, nodes: &[String]) -> Report {
    match workload {
        Workload::Register => check_registers(history, nodes, STEPS),
        Workload::GSet | Workload::Delete => check_sets(history, nodes),
    }
}

type Driven = (Vec<Injection>, Settled, u64);

/// Everything between the start of the nodes and their stop.
async fn drive(
    plan: &Plan,
    cluster: &Arc<Cluster>,
    recorder: &Arc<Recorder>,
) -> anyhow::Result<Driven> {
    create_namespace(plan, cluster).await?;
    let starved = Arc::new(AtomicU64::new(0));
    let _ticks = AbortOnDropHandle::new(tokio::spawn(tick(Arc::clone(&starved))));
    let stop = CancellationToken::new();
    let clients = workload::start(plan, cluster, recorder, &stop).await?;
    let stop_clients = stop.drop_guard();
    let until = Instant::now() + Duration::from_secs(plan.secs);
    let injections = Attack::new(plan, cluster, recorder).run(until).await?;
    drop(stop_clients);
    for client in clients {
        tokio::time::timeout(CLIENTS_PATIENCE, client)
            .await
            .context("a client does not end")?
            .context("a client")?;
    }
    let starved_ms = starved.load(Ordering::Relaxed);
    lie(plan, cluster, recorder).await?;
    let settled = settle(plan, cluster, recorder).await?;
    Ok((injections, settled, starved_ms))
}

/// Changes something behind the history's back, if that is the plan.
async fn lie(plan: &Plan, cluster: &Cluster, recorder: &Recorder) -> anyhow::Result<()> {
    let (f, again) = match plan.sabotage {
        None | Some(Sabotage::LocalReads) => return Ok(()),
        Some(Sabotage::LostAdd) => ("add", false),
        Some(Sabotage::Resurrection) => ("remove", true),
    };
    let ops = pair(&recorder.history()?)?;
    let victim = ops.iter().find(|op| op.f == f && op.outcome == Outcome::Ok);
    let victim = victim.context("nothing to lie about")?;
    let element = victim.input.as_u64().context("an element is a number")?;
    let key = key_in(&victim.key, element);
    let node = cluster.layout.nodes.first().context("no nodes")?;
    let client = cluster.client(&node.name).await?;
    let id = v1::RequestId { client: rand::random::<u64>().max(1), number: 1 };
    let lying = async move {
        if again {
            client.put(NAMESPACE, &key, encode(element, 1), id).await
        } else {
            client.delete(NAMESPACE, &key, bytes::Bytes::new(), id).await
        }
    };
    let told = cluster.place(&node.region)?.run(lying).await?;
    told.map(drop).map_err(|failure| anyhow!("the lie failed: {}", failure.words()))
}

/// Notes the longest that this process did not get a turn for.
async fn tick(longest_ms: Arc<AtomicU64>) {
    let step = Duration::from_millis(10);
    loop {
        let begun = Instant::now();
        sleep(step).await;
        let late = begun.elapsed().saturating_sub(step).as_millis();
        longest_ms.fetch_max(u64::try_from(late).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Makes the namespace of the run and waits until every node knows it.
async fn create_namespace(plan: &Plan, cluster: &Cluster) -> anyhow::Result<()> {
    let rule = match plan.rule {
        Rule::Lww => v1::Rule::Lww,
        Rule::Siblings => v1::Rule::Siblings,
    };
    let deadline = Instant::now() + NAMESPACE_PATIENCE;
    let home = cluster.layout.nodes.first().context("no nodes")?;
    for node in &cluster.layout.nodes {
        let client = cluster.client(&node.name).await?;
        let is_home = node.name == home.name;
        loop {
            let client = client.clone();
            let asking = async move {
                if is_home {
                    client.create_namespace(NAMESPACE, rule).await.ok();
                }
                client.scan(NAMESPACE, "", Freshness::Local, true, CLIENTS_PATIENCE).await
            };
            match cluster.place(&node.region)?.run(asking).await? {
                Ok(_) => break,
                Err(failure) if Instant::now() > deadline => {
                    bail!("{} does not know the namespace: {}", node.name, failure.words())
                }
                Err(_) => sleep(POLL).await,
            }
        }
    }
    Ok(())
}

/// Adds to the checker's verdict what the run itself shows.
fn judge(report: &mut RunReport, settled: &Settled, cluster: &Cluster, ops: &[Op]) {
    for wreck in cluster.wreckage() {
        report.object(Verdict::Invalid, wreck);
    }
    if report.converged_ms.is_none() {
        report.object(Verdict::Invalid, "nodes did not come to hold the same in time");
    }
    for problem in &settled.problems {
        report.object(Verdict::Unknown, problem.clone());
    }
    for (pair, equal, words) in &settled.verified {
        if !equal {
            let reason = format!("ctl verify {pair} does not prove equality: {words}");
            // It ends with 1 only when data differs at the same point of history.
            let differs = words.contains("exit status: 1;");
            report.object(if differs { Verdict::Invalid } else { Verdict::Unknown }, reason);
        }
    }
    if report.plan.nemesis != Nemesis::None {
        let idle: Vec<String> = report
            .injections
            .iter()
            .filter(|injection| !injection.effective)
            .map(|injection| format!("no proof that `{}` had an effect", injection.what))
            .collect();
        for reason in idle {
            report.object(Verdict::Unknown, reason);
        }
        if report.injections.is_empty() {
            report.object(Verdict::Unknown, "no fault was injected");
        }
    }
    judge_regions(report, ops);
    if report.starved_ms > STARVED_MS_MAX {
        let reason = format!("this process did not get a turn for {} ms", report.starved_ms);
        report.object(Verdict::Unknown, reason);
    }
    if let Some(problem) = cluster.net.problem() {
        report.object(Verdict::Unknown, problem);
    }
    for reason in too_little(&report.plan, &cluster.layout.shape.regions, ops) {
        report.object(Verdict::Unknown, reason);
    }
}

/// What must hold while regions are apart: each goes on serving, and a bridge carries changes.
fn judge_regions(report: &mut RunReport, ops: &[Op]) {
    match report.plan.nemesis {
        Nemesis::None | Nemesis::Isolation | Nemesis::Bridge | Nemesis::LongIsolation => {}
        Nemesis::Partition
        | Nemesis::LeaderKill
        | Nemesis::Pause
        | Nemesis::RepairKill
        | Nemesis::Storm => return,
    }
    for (region, Tally { ok, fail, info }) in report.tallies.clone() {
        if (fail + info) * 100 > (ok + fail + info) * REFUSED_PERCENT_MAX {
            let reason =
                format!("{region} did not stay available: {ok} ok, {fail} failed, {info} open");
            report.object(Verdict::Invalid, reason);
        }
    }
    if report.plan.nemesis == Nemesis::Bridge && report.plan.workload != Workload::Register {
        for injection in report.injections.clone() {
            let carried = carried(&injection, ops);
            let (name, what) = ("changes_carried_over_bridges", &injection.what);
            *report.network.entry(name.into()).or_default() += f64::from(carried);
            if carried == 0 {
                let reason = format!("no change crossed the bridge during `{what}`");
                report.object(Verdict::Unknown, reason);
            }
        }
    }
}

/// How many elements that were added in one region were seen in another, which was cut from it all
/// the while.
fn carried(injection: &Injection, ops: &[Op]) -> u32 {
    let during = |op: &&Op| {
        let ms = |nanos: u64| nanos / 1_000_000;
        injection.begun_ms < ms(op.call)
            && op.ret.is_some_and(|ret| ms(ret) < injection.ended_ms)
            && op.outcome == Outcome::Ok
    };
    let region = |op: &Op| op.facts.region.clone().unwrap_or_default();
    let mut seen: BTreeSet<(String, u64)> = BTreeSet::new();
    for read in ops.iter().filter(during).filter(|op| op.f == "read") {
        let elements = read.output.as_array().into_iter().flatten();
        seen.extend(elements.filter_map(|it| Some((region(read), it.as_u64()?))));
    }
    let mut carried = 0;
    for add in ops.iter().filter(during).filter(|op| op.f == "add") {
        let home = region(add);
        let Some(element) = add.input.as_u64() else { continue };
        let far = injection.apart.iter().filter_map(|(one, other)| match () {
            () if *one == home => Some(other),
            () if *other == home => Some(one),
            () => None,
        });
        carried += u32::from(far.into_iter().any(|far| seen.contains(&(far.clone(), element))));
    }
    carried
}

/// What a history has too little of to say something.
fn too_little(plan: &Plan, regions: &[String], ops: &[Op]) -> Vec<String> {
    let kinds: &[&str] = match plan.workload {
        Workload::Register => &["read", "write", "cas", "delete"],
        Workload::GSet => &["add", "read"],
        Workload::Delete => &["add", "remove", "read"],
    };
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let succeeded = ops.iter().filter(|op| op.outcome == Outcome::Ok && op.f != "final");
    for op in succeeded {
        let region = op.facts.region.as_deref().unwrap_or_default();
        *counts.entry((region, &op.f)).or_default() += 1;
    }
    let mut reasons = BTreeSet::new();
    for region in regions {
        for kind in kinds {
            let count = counts.get(&(region.as_str(), *kind)).copied().unwrap_or(0);
            if count < OK_EACH_MIN {
                reasons.insert(format!("only {count} of {kind} succeeded in {region}"));
            }
        }
    }
    let total: usize = counts.values().sum();
    if (total as u64) < OK_PER_SECOND_MIN * plan.secs {
        reasons.insert(format!("only {total} operations succeeded in {} s", plan.secs));
    }
    reasons.into_iter().collect()
}
