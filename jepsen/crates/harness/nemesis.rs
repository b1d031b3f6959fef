//! What is done to a cluster while clients act, each time with proof that it did something.
//!
//! A fault is injected, held, ended, and looked at: packets that a cut took, the process that died,
//! the leader that changed, the backlog that grew. A fault without proof is none, and leaves the
//! verdict open.
//!
//! Invariant: when [`Attack::run`] returns, however it does, nothing is cut, frozen or down.
//!
//! Map: `within` faults inside a region · `between` faults between regions.
//!
//! Not here: healing in the end and what must hold then (`settle`).

mod between;
mod within;

use crate::cluster::Cluster;
use crate::net::Direction;
use crate::plan::{Nemesis, Plan};
use crate::recorder::Recorder;
use anyhow::bail;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep};

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
const POLL: Duration = Duration::from_millis(100);

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
            Nemesis::Isolation | Nemesis::Storm => HOLD_REGIONS,
            Nemesis::Bridge => HOLD_BRIDGE,
            Nemesis::LongIsolation | Nemesis::RepairKill => {
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
        let region = self.region(turn);
        match self.plan.nemesis {
            Nemesis::None => Ok("nothing".into()),
            Nemesis::LeaderKill => self.kill_leader(&region, hold, proof).await,
            Nemesis::Pause => self.pause_leader(&region, hold, proof).await,
            Nemesis::Partition => {
                let directions = [Direction::Both, Direction::FromFirst, Direction::ToFirst];
                // The plain cut first, then any.
                let any = self.dice.random_range(0..directions.len());
                let direction = directions[if turn == 0 { 0 } else { any }];
                self.cut_leader(&region, direction, hold, proof).await
            }
            Nemesis::Isolation => self.isolate(&region, hold, proof).await,
            Nemesis::Storm => self.storm(&region, &self.region(turn + 1), hold, proof).await,
            Nemesis::Bridge => self.bridge(&region, hold, proof).await,
            Nemesis::LongIsolation => self.isolate_long(&region, hold, false, proof).await,
            Nemesis::RepairKill => self.isolate_long(&region, hold, true, proof).await,
        }
    }

    /// Isolates one region while the leaders of another die.
    async fn storm(
        &self,
        alone: &str,
        beheaded: &str,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let mut killed = Proof::default();
        let isolating = self.isolate(alone, hold, proof);
        let killing = async {
            sleep(CALM_BEFORE).await;
            self.kill_leader(beheaded, Duration::ZERO, &mut killed).await
        };
        let (isolated, killing) = tokio::join!(isolating, killing);
        proof.effective &= killed.effective;
        proof.words.append(&mut killed.words);
        Ok(format!("{}; {}", isolated?, killing?))
    }

    /// Regions take turns.
    fn region(&self, turn: usize) -> String {
        let regions = &self.cluster.layout.shape.regions;
        regions[(turn + usize::try_from(self.plan.seed).unwrap_or(0)) % regions.len()].clone()
    }

    fn prove_cut(&self, before: Option<u64>, proof: &mut Proof) {
        let cut = self.cluster.net.packets_cut().unwrap_or(0) - before.unwrap_or(0);
        proof.add(cut > 0, format!("{cut} packets were cut"));
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
