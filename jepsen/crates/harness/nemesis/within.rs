//! Faults inside a region: its leader dies, freezes, or loses its nodes.

use super::{Attack, POLL, Proof};
use crate::cluster::Leader;
use crate::net::{Direction, others};
use anyhow::Context;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long to look for a new leader.
const ELECTION_PATIENCE: Duration = Duration::from_secs(10);

impl Attack {
    /// The node that leads most of a region's shards, and who leads what.
    async fn leader(&self, region: &str) -> anyhow::Result<(String, BTreeMap<u32, Leader>)> {
        let (node, _) = self.cluster.main_leader(region).await.context("no leader to attack")?;
        Ok((node, self.cluster.leaders(region).await))
    }

    /// Kills the leader of most shards; it stays down until it is restored.
    pub(super) async fn kill_leader(
        &self,
        region: &str,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let (node, before) = self.leader(region).await?;
        let pid = self.cluster.fleet.state(&node)?.pid().context("the leader has no process")?;
        self.recorder.fault("kill", json!(node));
        let killed = Instant::now();
        self.cluster.fleet.kill(&node).await?;
        // `kill` returns when the process was reaped.
        proof.words.push(format!("process {pid} ended by SIGKILL"));
        self.prove_new_leader(region, &node, &before, proof).await;
        sleep((killed + hold).saturating_duration_since(Instant::now())).await;
        Ok(format!("kill {node}"))
    }

    /// Freezes the leader of most shards.
    pub(super) async fn pause_leader(
        &self,
        region: &str,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let (node, before) = self.leader(region).await?;
        let pid = self.cluster.fleet.state(&node)?.pid().context("the leader has no process")?;
        self.recorder.fault("pause", json!(node));
        let paused = Instant::now();
        self.cluster.fleet.pause(&node).await?;
        self.prove_new_leader(region, &node, &before, proof).await;
        sleep((paused + hold).saturating_duration_since(Instant::now())).await;
        // Only now: a signal acts a moment after it is sent.
        let state = process_state(pid)?;
        proof.effective &= state.starts_with('T');
        proof.words.push(format!("process {pid} is in state {state}"));
        Ok(format!("pause {node}"))
    }

    /// Cuts the leader of most shards from all nodes, or one direction; clients still reach it.
    pub(super) async fn cut_leader(
        &self,
        region: &str,
        direction: Direction,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let (node, before) = self.leader(region).await?;
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
            self.prove_new_leader(region, &node, &before, &mut elected).await;
            sleep((begun + hold).saturating_duration_since(Instant::now())).await;
        }
        self.prove_cut(cut_before, proof);
        if direction != Direction::ToFirst {
            proof.effective &= elected.effective;
        }
        proof.words.append(&mut elected.words);
        Ok(what)
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
}

/// The state letter of a process, as the kernel tells it; `T` is stopped.
fn process_state(pid: u32) -> anyhow::Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    Ok(state.context("a process without a state")?.trim().to_owned())
}
