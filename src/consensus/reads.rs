//! Linearizable reads: proves that this node still leads, once for many readers.
//!
//! A reader asks for a barrier: a log index such that a state that has applied it holds every
//! write that was acknowledged before the question. The proof costs a round of heartbeats to a
//! quorum. Readers that ask while a round runs take the *next* one together, since the running one
//! may have begun before the write that they must see.
//!
//! With lease reads the leader's lease is the proof as long as a quorum answered within 0.8 of
//! it; the rest is the margin for clocks that run at different speed. A lease older than that
//! falls back to a round. Leases are safe only together with [`crate::quarantine`].
//!
//! Invariants:
//! * A round begins after each of its readers has asked.
//! * A barrier is handed out only when it is applied here, so that reading the store right after
//!   is enough.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use openraft::errors::{LinearizableReadError, RaftError};
use openraft::{LinearizerOption, Raft, ReadPolicy};
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tombolo_core::NodeId;

use crate::state_machine::StateMachine;
use crate::types::TypeConfig;

/// Proof of leadership at some moment after the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadBarrier {
    /// Everything up to here is applied on this node.
    pub index: u64,
    /// The leader's term.
    pub term: u64,
}

/// Why there is no barrier. All are safe to repeat.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// This node does not lead the group. `None` is normal around an election, never final.
    #[error("not the leader of this shard")]
    NotLeader {
        /// Who leads, if known.
        leader: Option<NodeId>,
    },
    /// This node may lead, but a majority did not confirm it in time.
    #[error("a majority of this shard's replicas did not answer")]
    NoQuorum,
    /// The group is stopped and this process will not serve it again.
    #[error("this shard's replica is stopped")]
    Stopped,
}

type Answer = Result<ReadBarrier, ReadError>;

#[derive(Default)]
struct State {
    waiting: Vec<oneshot::Sender<Answer>>,
    running: bool,
}

/// The readers of one group.
pub(crate) struct Reads {
    raft: Raft<TypeConfig, StateMachine>,
    applied: watch::Receiver<u64>,
    option: LinearizerOption,
    state: Mutex<State>,
    rounds: AtomicU64,
    reads: AtomicU64,
}

impl Reads {
    /// `lease` is the leader's lease when lease reads are on.
    pub(crate) fn new(
        raft: Raft<TypeConfig, StateMachine>,
        applied: watch::Receiver<u64>,
        lease: Option<Duration>,
    ) -> Self {
        let option = match lease {
            Some(lease) => LinearizerOption::new(Some(lease * 4 / 5), true),
            None => ReadPolicy::ReadIndex.into(),
        };
        Self {
            raft,
            applied,
            option,
            state: Mutex::default(),
            rounds: AtomicU64::new(0),
            reads: AtomicU64::new(0),
        }
    }

    /// Rounds, and reads that they served, since the start.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.rounds.load(Ordering::Relaxed), self.reads.load(Ordering::Relaxed))
    }

    /// Waits for a barrier and until it is applied. Cancel safe.
    pub(crate) async fn barrier(self: &Arc<Self>) -> Answer {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let (answer, confirmed) = oneshot::channel();
        let start = {
            let mut state = self.state.lock();
            state.waiting.push(answer);
            !std::mem::replace(&mut state.running, true)
        };
        if start {
            // A task of its own: the reader that happens to start a round may go away.
            tokio::spawn(self.clone().run_rounds());
        }
        let barrier = confirmed.await.unwrap_or(Err(ReadError::Stopped))?;
        let mut applied = self.applied.clone();
        applied
            .wait_for(|applied| barrier.index <= *applied)
            .await
            .map_err(|_| ReadError::Stopped)?;
        Ok(barrier)
    }

    async fn run_rounds(self: Arc<Self>) {
        loop {
            let readers = {
                let mut state = self.state.lock();
                if state.waiting.is_empty() {
                    state.running = false;
                    return;
                }
                std::mem::take(&mut state.waiting)
            };
            let answer = self.round().await;
            for reader in readers {
                let _ = reader.send(answer.clone());
            }
        }
    }

    async fn round(&self) -> Answer {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        match self.raft.get_read_linearizer(self.option.clone()).await {
            Ok(linearizer) => {
                let at = linearizer.read_log_id().log_id();
                Ok(ReadBarrier { index: at.index, term: at.leader_id.term })
            }
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to))) => {
                Err(ReadError::NotLeader { leader: to.leader_id.map(NodeId) })
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                Err(ReadError::NoQuorum)
            }
            Err(RaftError::Fatal(_)) => Err(ReadError::Stopped),
        }
    }
}
