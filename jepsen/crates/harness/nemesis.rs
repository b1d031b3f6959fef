//! What is done to a cluster while clients act, each time with proof that it did something.
//!
//! A fault is injected, held, ended, and looked at: packets that a cut took, the process that died,
//! the leader that changed, the backlog that grew. A fault without proof is none, and leaves the
//! verdict open.
//!
//! Invariant: when [`Attack::run`] returns, however it does, nothing is cut, frozen or down.
//!
//! Not here: healing in the end and what must hold then (`settle`).

use crate::cluster::{Cluster, Leader};
use crate::net::{Direction, others};
use crate::plan::{CHANGE_LOG_BYTES, Nemesis, Plan};
use crate::recorder::Recorder;
use anyhow::{Context, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tombolo_proto::v1::LinkPhase;

/// Before the first fault, so that clients have done something.
const CALM_BEFORE: Duration = Duration::from_secs(2);
/// Between faults.
const CALM_BETWEEN: Duration = Duration::from_secs(3);
/// How long a fault inside a region lasts: several elections.
const HOLD: Duration = Duration::from_secs(5);
/// How long a region is alone.
const HOLD_REGIONS: Duration = Duration::from_secs(7);
/// How long a bridge is needed: longer than `replication.watchdog` of the configuration (10 s),
/// after which a silent path counts as cut, and `replication.relay_after` (3 s) together.
const HOLD_BRIDGE: Duration = Duration::from_secs(18);
/// Share of a run for which a region is away; the rest sees it come back under load.
const LONG_SHARE: f64 = 0.6;
/// How long to look for a new leader.
const ELECTION_PATIENCE: Duration = Duration::from_secs(10);
/// How long to look for a repair after the regions meet again.
const REPAIR_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(100);
/// What the names of the server's counters of repairs hold.
const REPAIR: &str = "repair";

/// One fault and its proof.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Injection {
    pub(crate) what: String,
    pub(crate) begun_ms: u64,
    pub(crate) ended_ms: u64,
    /// Whether the proof is there.
    pub(crate) effective: bool,
    pub(crate) proof: Vec<String>,
    /// Pairs of regions that were cut from each other.
    pub(crate) apart: Vec<(String, String)>,
}

/// Everything that a nemesis needs.
pub(crate) struct Attack {
    plan: Plan,
    cluster: Arc<Cluster>,
    recorder: Arc<Recorder>,
    dice: StdRng,
}

/// What a fault has shown so far.
#[derive(Debug, Default)]
struct Proof {
    effective: bool,
    words: Vec<String>,
    apart: Vec<(String, String)>,
}

impl Proof {
    fn add(&mut self, holds: bool, words: String) {
        self.effective |= holds;
        self.words.push(words);
    }
}

impl Attack {
    pub(crate) fn new(plan: &Plan, cluster: &Arc<Cluster>, recorder: &Arc<Recorder>) -> Self {
        Self {
            plan: plan.clone(),
            cluster: Arc::clone(cluster),
            recorder: Arc::clone(recorder),
            dice: StdRng::seed_from_u64(plan.seed),
        }
    }

    /// Injects faults one after the other until `until`.
    pub(crate) async fn run(mut self, until: Instant) -> anyhow::Result<Vec<Injection>> {
        let mut injections = Vec::new();
        sleep(CALM_BEFORE).await;
        let hold = match self.plan.nemesis {
            Nemesis::None => {
                tokio::time::sleep_until(until).await;
                return Ok(injections);
            }
            Nemesis::Partition | Nemesis::LeaderKill | Nemesis::Pause => HOLD,
            Nemesis::Isolation => HOLD_REGIONS,
            Nemesis::Bridge => HOLD_BRIDGE,
            Nemesis::LongIsolation => {
                until.saturating_duration_since(Instant::now()).mul_f64(LONG_SHARE)
            }
        };
        while injections.is_empty() || Instant::now() + hold <= until {
            let begun_ms = self.recorder.elapsed_ms();
            let turn = injections.len();
            let mut proof = Proof::default();
            let done = self.inject(turn, hold, &mut proof).await;
            // Whatever happened, nothing stays broken.
            self.cluster.net.heal();
            let restored = self.restore().await;
            let what = done?;
            restored?;
            let injection = Injection {
                what,
                begun_ms,
                ended_ms: self.recorder.elapsed_ms(),
                effective: proof.effective,
                proof: proof.words,
                apart: proof.apart,
            };
            self.recorder.fault("healed", json!(injection));
            injections.push(injection);
            sleep(CALM_BETWEEN.min(until.saturating_duration_since(Instant::now()))).await;
        }
        tokio::time::sleep_until(until).await;
        Ok(injections)
    }

    async fn inject(
        &mut self,
        turn: usize,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        match self.plan.nemesis {
            Nemesis::None => Ok("nothing".into()),
            Nemesis::LeaderKill => self.kill_leader(turn, hold, proof).await,
            Nemesis::Pause => self.pause_leader(turn, hold, proof).await,
            Nemesis::Partition => self.cut_leader(turn, hold, proof).await,
            Nemesis::Isolation => {
                let region = self.region(turn);
                let pairs = self.pairs_of(&region);
                self.cut_regions(format!("isolate {region}"), &region, &pairs, hold, proof).await
            }
            Nemesis::Bridge => self.bridge(turn, hold, proof).await,
            Nemesis::LongIsolation => self.isolate_long(hold, proof).await,
        }
    }

    /// Regions take turns.
    fn region(&self, turn: usize) -> String {
        let regions = &self.cluster.layout.shape.regions;
        regions[(turn + usize::try_from(self.plan.seed).unwrap_or(0)) % regions.len()].clone()
    }

    fn pairs_of(&self, region: &str) -> Vec<(String, String)> {
        let regions = self.cluster.layout.shape.regions.iter();
        regions
            .filter(|other| *other != region)
            .map(|other| (region.into(), other.clone()))
            .collect()
    }

    /// The node that leads most of a region's shards, and who leads what.
    async fn leader(&self, region: &str) -> anyhow::Result<(String, BTreeMap<u32, Leader>)> {
        let (node, _) = self.cluster.main_leader(region).await.context("no leader to attack")?;
        Ok((node, self.cluster.leaders(region).await))
    }

    async fn kill_leader(
        &mut self,
        turn: usize,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let region = self.region(turn);
        let (node, before) = self.leader(&region).await?;
        let pid = self.cluster.fleet.state(&node)?.pid().context("the leader has no process")?;
        self.recorder.fault("kill", json!(node));
        let killed = Instant::now();
        self.cluster.fleet.kill(&node).await?;
        // `kill` returns when the process was reaped.
        proof.words.push(format!("process {pid} ended by SIGKILL"));
        self.prove_new_leader(&region, &node, &before, proof).await;
        sleep((killed + hold).saturating_duration_since(Instant::now())).await;
        Ok(format!("kill {node}"))
    }

    async fn pause_leader(
        &mut self,
        turn: usize,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let region = self.region(turn);
        let (node, before) = self.leader(&region).await?;
        let pid = self.cluster.fleet.state(&node)?.pid().context("the leader has no process")?;
        self.recorder.fault("pause", json!(node));
        let paused = Instant::now();
        self.cluster.fleet.pause(&node).await?;
        proof.words.push(format!("process {pid} is in state {}", process_state(pid)?));
        self.prove_new_leader(&region, &node, &before, proof).await;
        sleep((paused + hold).saturating_duration_since(Instant::now())).await;
        Ok(format!("pause {node}"))
    }

    async fn cut_leader(
        &mut self,
        turn: usize,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let region = self.region(turn);
        let (node, before) = self.leader(&region).await?;
        let directions = [Direction::Both, Direction::FromFirst, Direction::ToFirst];
        // The plain cut first, then any.
        let direction =
            directions[if turn == 0 { 0 } else { self.dice.random_range(0..directions.len()) }];
        let names: Vec<String> =
            others(&self.cluster.layout, &node).map(|node| node.name.clone()).collect();
        let cut_before = self.cluster.net.packets_cut();
        let what = match direction {
            Direction::Both => format!("cut {node} from all nodes"),
            Direction::FromFirst => format!("cut what {node} sends to nodes"),
            Direction::ToFirst => format!("cut what nodes send to {node}"),
        };
        self.recorder.fault("partition", json!(what));
        let begun = Instant::now();
        self.cluster.net.cut_nodes(&node, &names, direction)?;
        let mut elected = Proof::default();
        if direction == Direction::ToFirst {
            // It may go on leading: its heartbeats arrive.
            sleep(hold).await;
        } else {
            self.prove_new_leader(&region, &node, &before, &mut elected).await;
            sleep((begun + hold).saturating_duration_since(Instant::now())).await;
        }
        self.prove_cut(cut_before, proof);
        if direction != Direction::ToFirst {
            proof.effective &= elected.effective;
        }
        proof.words.append(&mut elected.words);
        Ok(what)
    }

    async fn bridge(
        &mut self,
        turn: usize,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let regions = self.cluster.layout.shape.regions.clone();
        if regions.len() < 3 {
            bail!("a bridge needs three regions");
        }
        // The one in the middle sees both halves, which do not see each other.
        let middle = self.region(turn);
        let apart: Vec<String> = regions.into_iter().filter(|region| *region != middle).collect();
        let (left, right) = apart.split_at(apart.len() / 2);
        let mut pairs = Vec::new();
        for one in left {
            pairs.extend(right.iter().map(|other| (one.clone(), other.clone())));
        }
        let what = format!("cut {} from {}; {middle} sees all", left.join("+"), right.join("+"));
        self.cut_regions(what, &left[0], &pairs, hold, proof).await
    }

    async fn isolate_long(&mut self, hold: Duration, proof: &mut Proof) -> anyhow::Result<String> {
        // Not the catalog's home, which is the first.
        let region = self.region(0);
        let shards = f64::from(self.plan.shards);
        #[expect(clippy::cast_precision_loss, reason = "a small constant")]
        let budget = CHANGE_LOG_BYTES as f64 * shards;
        let pairs = self.pairs_of(&region);
        let repairs_before = self.repairs().await;
        let mut cut = Proof::default();
        let what = format!("isolate {region} beyond the change log of {budget} bytes");
        let what = self.cut_regions(what, &region, &pairs, hold, &mut cut).await?;
        proof.words.append(&mut cut.words);
        proof.apart = cut.apart;
        // Only now can they repair.
        self.cluster.net.heal();
        let deadline = Instant::now() + REPAIR_PATIENCE;
        loop {
            let counted = self.repairs().await - repairs_before;
            let phase = self.is_repairing().await;
            if counted > 0.0 || phase || Instant::now() > deadline {
                let words = format!("repairs counted: {counted}; a link is repairing: {phase}");
                proof.add(cut.effective && (counted > 0.0 || phase), words);
                return Ok(what);
            }
            sleep(POLL).await;
        }
    }

    /// Counters of repairs in all regions.
    async fn repairs(&self) -> f64 {
        let mut sum = 0.0;
        for region in &self.cluster.layout.shape.regions {
            sum += self.cluster.counters_with(region, REPAIR).await;
        }
        sum
    }

    async fn is_repairing(&self) -> bool {
        for region in &self.cluster.layout.shape.regions {
            let Some(node) = self.cluster.layout.nodes_of(region).next() else { continue };
            let Ok(client) = self.cluster.client(&node.name).await else { continue };
            let Ok(place) = self.cluster.place(region) else { continue };
            let links = place.run(async move { client.links().await }).await;
            if let Ok(Ok(links)) = links
                && links.iter().any(|link| link.phase() == LinkPhase::Repairing)
            {
                return true;
            }
        }
        false
    }

    /// Cuts pairs of regions and proves that nothing passed and that the backlog of `witness` grew.
    async fn cut_regions(
        &mut self,
        what: String,
        witness: &str,
        pairs: &[(String, String)],
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let cluster = &self.cluster;
        proof.apart = pairs.to_vec();
        let cut_before = cluster.net.packets_cut();
        self.recorder.fault("isolate", json!(what));
        let begun = Instant::now();
        for (one, other) in pairs {
            cluster.net.cut_regions(&cluster.layout, one, other)?;
        }
        // What was under way arrives.
        sleep(self.plan.round_trip()).await;
        let passed = || -> u64 {
            let each = pairs.iter().map(|(a, b)| cluster.net.bytes_between(&cluster.layout, a, b));
            each.sum()
        };
        let passed_before = passed();
        let mut backlog: f64 = 0.0;
        while begun.elapsed() < hold {
            sleep(Duration::from_millis(500).min(hold)).await;
            let mut sum = 0.0;
            for node in cluster.layout.nodes_of(witness) {
                let metric = cluster.metric(&node.name, "tombolo_replication_backlog_ops");
                sum += timeout(HOLD, metric).await.ok().and_then(Result::ok).unwrap_or(0.0);
            }
            backlog = backlog.max(sum);
        }
        let leaked = passed() - passed_before;
        if cut_before.is_some() {
            self.prove_cut(cut_before, proof);
        } else {
            proof.add(true, "connections hang in the proxy".into());
        }
        proof.words.push(format!("{leaked} bytes passed the cut"));
        proof.words.push(format!("up to {backlog} writes of {witness} waited for other regions"));
        proof.effective &= leaked == 0 && backlog > 0.0;
        Ok(what)
    }

    fn prove_cut(&self, before: Option<u64>, proof: &mut Proof) {
        let cut = self.cluster.net.packets_cut().unwrap_or(0) - before.unwrap_or(0);
        proof.add(cut > 0, format!("{cut} packets were cut"));
    }

    /// Waits until the shards that a node led are led by others.
    async fn prove_new_leader(
        &self,
        region: &str,
        node: &str,
        before: &BTreeMap<u32, Leader>,
        proof: &mut Proof,
    ) {
        let begun = Instant::now();
        let number = self.cluster.node(node).map(|node| node.node_id).unwrap_or_default();
        let led: Vec<u32> =
            before.iter().filter(|(_, (_, of))| *of == number).map(|(shard, _)| *shard).collect();
        loop {
            let now = self.cluster.leaders(region).await;
            let changed: Vec<u32> = led
                .iter()
                .filter(|shard| {
                    now.get(*shard).is_some_and(|(term, of)| {
                        before.get(*shard).is_some_and(|(old, _)| term > old)
                            && *of != number
                            && *of > 0
                    })
                })
                .copied()
                .collect();
            if changed.len() == led.len() || begun.elapsed() > ELECTION_PATIENCE {
                let words = format!(
                    "{} of the {} shards that {node} led have a new leader after {} ms",
                    changed.len(),
                    led.len(),
                    begun.elapsed().as_millis()
                );
                proof.add(!changed.is_empty(), words);
                return;
            }
            sleep(POLL).await;
        }
    }

    /// Brings back every process.
    async fn restore(&self) -> anyhow::Result<()> {
        use tombolo_demo::processes::State;
        for node in &self.cluster.layout.nodes {
            match self.cluster.fleet.state(&node.name)? {
                State::Up { .. } => {}
                State::Paused { .. } => {
                    self.recorder.fault("resume", json!(node.name));
                    self.cluster.fleet.resume(&node.name).await?;
                }
                State::Down => {
                    self.recorder.fault("start", json!(node.name));
                    self.cluster.fleet.start(&node.name).await?;
                    self.cluster.wait_ready(&node.name).await?;
                }
                // It shall stay as it is: nobody ordered that.
                State::Crashed { how } => bail!("{} ended by itself: {how}", node.name),
            }
        }
        Ok(())
    }
}

/// The state letter of a process, as the kernel tells it; `T` is stopped.
fn process_state(pid: u32) -> anyhow::Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    Ok(state.context("a process without a state")?.trim().to_owned())
}
