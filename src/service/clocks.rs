//! Keeps a region's clocks honest: asks the other nodes for the time, and gives leadership away while
//! this node's clock is outside.
//!
//! Every node asks every other one, on the port of Raft, about once a second: those that follow must
//! know where they stand before they lead, and heartbeats flow only from leaders, and not while
//! appends prove the same. What follows from the answers is decided by
//! [`tombolo_core::clock_guard`]; that nothing is stamped meanwhile, by [`tombolo_shard::Clock`].
//!
//! Invariants:
//! * Leadership is given away only when answers that came after the suspicion confirm it, and only to
//!   a node whose clock is inside.
//! * A node that is outside stands for no election as long as somebody leads. When nobody does for a
//!   while it does stand, because it may be the only one with the whole log; then it brings the others
//!   up to date and hands over, without having stamped anything.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio_util::sync::CancellationToken;
use tombolo_cluster::Node;
use tombolo_core::{NodeId, clock_guard::Standing};
use tombolo_proto::internal::v1::{self as internal, node_service_client::NodeServiceClient};
use tombolo_shard::Clock;
use tonic::Status;

use crate::gateway::Gateway;

/// Time between two questions to a node.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same while this node must not lead, or does not know yet whether it may.
const INTERVAL_URGENT: Duration = Duration::from_millis(200);
/// A slower answer would tell little.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);
/// A shard without a leader for this long gets one whose clock is outside, rather than none.
const LEADERLESS_MAX: Duration = Duration::from_secs(5);

/// Compares this node's clock with the others', for as long as the node runs.
pub struct ClockWatch {
    gateway: Arc<Gateway>,
}

impl ClockWatch {
    /// A watch over the clock that the gateway's shards share.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        Self { gateway }
    }

    /// Asks and acts until `shutdown` fires.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut standing = self.clock().standing();
        loop {
            standing.borrow_and_update();
            let answers = self.ask_all().await;
            let now = self.clock().look_around();
            let heard_majority = (answers + 1) * 2 > self.gateway.topology().nodes.len();
            if now == Standing::Outside && heard_majority {
                self.step_down().await;
            } else if now != Standing::Outside {
                self.stand_again();
            }
            let pause = if now.may_stamp() { INTERVAL } else { INTERVAL_URGENT };
            // Safe to drop: all only wait.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = standing.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn clock(&self) -> &Clock {
        self.gateway.shards().clock()
    }

    /// Asks all other nodes at once; answers how many of them answered.
    async fn ask_all(&self) -> usize {
        let topology = self.gateway.topology();
        let others = topology.nodes.iter().filter(|node| node.id != topology.node);
        let answers = join_all(others.map(|node| async move {
            match tokio::time::timeout(ANSWER_TIMEOUT, self.ask(node)).await {
                Ok(Ok(())) => true,
                Ok(Err(status)) => {
                    tracing::debug!(node = %node.id, %status, "a clock was not told");
                    false
                }
                Err(_) => false,
            }
        }));
        answers.await.into_iter().filter(|&answered| answered).count()
    }

    async fn ask(&self, node: &Node) -> Result<(), Status> {
        let mut client = NodeServiceClient::new(self.gateway.channels().get(&node.raft)?);
        let identity = Some(self.gateway.identity_to(node.id));
        let request = internal::ReadClockRequest { identity };
        let asked_us = self.clock().steady_us();
        let answer = client.read_clock(request).await?.into_inner();
        let answered_us = self.clock().steady_us();
        self.clock().compare(node.id, asked_us, answered_us, answer.wall_us);
        Ok(())
    }

    /// Gives away what this node leads, and stays out of elections.
    async fn step_down(&self) {
        let nodes = self.clock().nodes().into_iter();
        let inside: BTreeSet<NodeId> =
            nodes.filter(|it| it.standing == Standing::Inside).map(|it| it.node).collect();
        let shards = self.gateway.shards();
        for shard in shards.iter() {
            shard.group().withhold(shard.group().heard_leader_within(LEADERLESS_MAX));
        }
        if inside.is_empty() {
            // All of them disagree: none would be a better leader.
            return;
        }
        let led = shards.iter().filter(|shard| shard.is_leader());
        let handed = led.map(|shard| shard.group().hand_over_to(&inside, HAND_OVER_TIMEOUT));
        let kept = join_all(handed).await.into_iter().filter(|gone| !gone).count();
        if kept > 0 {
            tracing::warn!(shards = kept, "no node with a better clock took over in time");
        }
    }

    fn stand_again(&self) {
        for shard in self.gateway.shards().iter() {
            shard.group().withhold(false);
        }
    }
}
