//! Packs commands into Raft entries and hands their outcomes back.
//!
//! One entry costs a log frame, a message per follower, a sync and an apply, whatever it carries.
//! So commands that come in while [`IN_FLIGHT_MAX`] entries are on their way wait, and go
//! together in the next entry. Nothing waits for a timer: a lone command leaves at once.
//!
//! There is no batching task. Whoever finds a free slot sends the batch: a caller of
//! [`Batcher::propose`], or the apply that just freed a slot. That saves two hand-overs per
//! write, which a single client feels.
//!
//! Invariants:
//! * Commands enter the log in the order in which they were queued, as long as leadership lasts.
//! * A caller that goes away takes back a command that still waits, and no other.
//! * Every caller gets an answer, also when the Raft core dies with the command inside.
//! * The queue is bounded in commands and in bytes.
//!
//! Not here: what a command is (`tombolo-core`), retries and deadlines (the caller).

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::FutureExt;
use openraft::errors::ClientWriteError;
use openraft::raft::ClientWriteResult;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tombolo_core::{NodeId, Outcome, encode_batch};
use tombolo_raftlog::LogId;

use crate::types::{Callback, Command, TypeConfig, WriteResponder, log_id_to_log};

/// Entries that may be on their way. Two keep the log busy while one is being applied; more would
/// only make the entries smaller.
const IN_FLIGHT_MAX: usize = 2;
/// An entry is closed when it holds this many bytes of commands.
const ENTRY_BYTES_MAX: usize = 256 << 10;
/// An entry is closed when it holds this many commands.
const ENTRY_COMMANDS_MAX: usize = 512;
/// What an entry holds beside its command: the log's frame, the batch's header.
const ENTRY_OVERHEAD_BYTES: u64 = 256;
/// Commands that may wait.
const QUEUE_COMMANDS_MAX: usize = 8192;
/// Bytes of commands that may wait. A single larger command is taken when the queue is empty.
const QUEUE_BYTES_MAX: usize = 16 << 20;

/// A command that was committed and applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposed {
    /// The entry it was part of.
    pub log_id: LogId,
    /// What executing it answered.
    pub outcome: Outcome,
}

/// Why a command has no outcome, grouped by what the caller may do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Not proposed: this node does not lead the group, or cannot prove that it still does.
    /// Safe to repeat, there or here. `None` is normal for some milliseconds around an election
    /// (also on the new leader itself) and never final.
    #[error("not the leader of this shard")]
    NotLeader {
        /// Who leads, if known.
        leader: Option<NodeId>,
    },
    /// Proposed, but the answer is lost: it may or may not be, or become, applied. Only a repeat
    /// with the same request id finds out.
    #[error("the outcome is unknown: {reason}")]
    Unknown {
        /// What happened.
        reason: String,
    },
    /// Not proposed: too many commands wait already. Safe to repeat later.
    #[error("too many commands are waiting on this shard")]
    Overloaded,
    /// Not proposed, and never will be: the command is too large.
    #[error("a command of {bytes} bytes is too large: at most {max}")]
    TooLarge {
        /// What it has.
        bytes: usize,
        /// What it may have.
        max: usize,
    },
    /// Not proposed: the group is stopped and this process will not serve it again.
    #[error("this shard's replica is stopped")]
    Stopped,
}

/// Where a batch goes: the Raft core, or a test's stand-in.
pub(crate) trait Proposer: Send + Sync + 'static {
    /// Hands an entry over. The responder is called with the result, or dropped when the core is
    /// dead; `Err` if the core refused to take the entry at all.
    fn write(&self, command: Command, responder: WriteResponder) -> Handover;
}

/// Completes when the core has taken the entry; `Err(())` when it is dead.
pub(crate) type Handover = Pin<Box<dyn Future<Output = Result<(), ()>> + Send>>;

type Answer = Result<Proposed, ProposeError>;

struct Waiting {
    command: Bytes,
    answer: oneshot::Sender<Answer>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Waiting>,
    queued_bytes: usize,
    in_flight: usize,
    /// Someone is handing a batch over; keeps entries in queue order.
    sending: bool,
    stopped: bool,
}

/// Counts since the start; see [`crate::GroupMetrics`].
#[derive(Debug, Default)]
pub(crate) struct ProposeCounters {
    pub(crate) commands: AtomicU64,
    pub(crate) entries: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) overloaded: AtomicU64,
}

/// The queue of one group.
#[derive(Clone)]
pub(crate) struct Batcher {
    shared: Arc<Shared>,
}

struct Shared {
    proposer: Box<dyn Proposer>,
    /// The largest command: an entry that the log refuses would end the group.
    command_bytes_max: usize,
    state: Mutex<State>,
    counters: ProposeCounters,
}

impl fmt::Debug for Batcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        f.debug_struct("Batcher")
            .field("queued", &state.queue.len())
            .field("in_flight", &state.in_flight)
            .finish_non_exhaustive()
    }
}

impl Batcher {
    /// A queue to `proposer`, for a log that takes entries of `entry_bytes_max`.
    pub(crate) fn new(proposer: Box<dyn Proposer>, entry_bytes_max: u64) -> Self {
        let command_bytes_max = entry_bytes_max.saturating_sub(ENTRY_OVERHEAD_BYTES);
        Self {
            shared: Arc::new(Shared {
                proposer,
                command_bytes_max: usize::try_from(command_bytes_max).unwrap_or(usize::MAX),
                state: Mutex::default(),
                counters: ProposeCounters::default(),
            }),
        }
    }

    pub(crate) fn counters(&self) -> &ProposeCounters {
        &self.shared.counters
    }

    /// The largest command that is taken, in bytes.
    pub(crate) fn command_bytes_max(&self) -> usize {
        self.shared.command_bytes_max
    }

    /// Commands that wait for a slot.
    pub(crate) fn queued(&self) -> usize {
        self.shared.state.lock().queue.len()
    }

    /// Proposes one encoded command and waits for its outcome.
    ///
    /// Dropping the future takes the command back only while it waits in the queue.
    pub(crate) async fn propose(&self, command: Bytes) -> Answer {
        let (bytes, max) = (command.len(), self.shared.command_bytes_max);
        if max < bytes {
            return Err(ProposeError::TooLarge { bytes, max });
        }
        let (answer, outcome) = oneshot::channel();
        self.enqueue(Waiting { command, answer })?;
        self.shared.clone().send_ready();
        outcome.await.unwrap_or_else(|_| Err(unknown("the replica stopped")))
    }

    fn enqueue(&self, waiting: Waiting) -> Result<(), ProposeError> {
        let mut state = self.shared.state.lock();
        if state.stopped {
            return Err(ProposeError::Stopped);
        }
        let bytes = state.queued_bytes + waiting.command.len();
        let too_many = QUEUE_COMMANDS_MAX <= state.queue.len();
        if too_many || (QUEUE_BYTES_MAX < bytes && !state.queue.is_empty()) {
            self.shared.counters.overloaded.fetch_add(1, Ordering::Relaxed);
            return Err(ProposeError::Overloaded);
        }
        state.queued_bytes = bytes;
        state.queue.push_back(waiting);
        Ok(())
    }

    /// Answers everything that waits, and everything that comes, with [`ProposeError::Stopped`].
    pub(crate) fn stop(&self) {
        let waiting = {
            let mut state = self.shared.state.lock();
            state.stopped = true;
            state.queued_bytes = 0;
            std::mem::take(&mut state.queue)
        };
        for waiting in waiting {
            let _ = waiting.answer.send(Err(ProposeError::Stopped));
        }
    }
}

impl Shared {
    /// Sends batches until the queue is empty or the slots are taken.
    ///
    /// Never blocks: a hand-over that cannot complete at once goes on in a task of its own.
    fn send_ready(self: Arc<Self>) {
        while let Some(batch) = self.take_batch() {
            let mut handover = self.clone().hand_over(batch);
            // Tokio's cooperative budget may be used up here, which is no reason to spawn.
            let polled = tokio::task::unconstrained(&mut handover).now_or_never();
            if polled.is_none() {
                tokio::spawn(async move {
                    handover.await;
                    self.finish_sending();
                });
                return;
            }
            self.state.lock().sending = false;
        }
    }

    fn finish_sending(self: Arc<Self>) {
        self.state.lock().sending = false;
        self.send_ready();
    }

    /// Takes the next batch if there is one, a slot is free and nobody else is sending.
    fn take_batch(&self) -> Option<Vec<Waiting>> {
        let mut state = self.state.lock();
        if state.sending || IN_FLIGHT_MAX <= state.in_flight || state.queue.is_empty() {
            return None;
        }
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < ENTRY_COMMANDS_MAX
            && let Some(next) = state.queue.front()
            && (batch.is_empty() || bytes + next.command.len() <= ENTRY_BYTES_MAX)
        {
            let command_bytes = next.command.len();
            state.queued_bytes = state.queued_bytes.saturating_sub(command_bytes);
            let Some(next) = state.queue.pop_front() else { break };
            // Given up before it was proposed: nobody would learn what became of it.
            if next.answer.is_closed() {
                continue;
            }
            bytes += command_bytes;
            batch.push(next);
        }
        if batch.is_empty() {
            return None;
        }
        state.in_flight += 1;
        state.sending = true;
        self.counters.commands.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.counters.entries.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Some(batch)
    }

    fn hand_over(self: Arc<Self>, batch: Vec<Waiting>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let commands: Vec<Bytes> = batch.iter().map(|waiting| waiting.command.clone()).collect();
        let slot = Slot { shared: self.clone(), waiting: batch };
        let responder = Callback::new(move |result| slot.complete(result));
        let handover = self.proposer.write(Command(encode_batch(&commands)), responder);
        Box::pin(async move {
            // A dead core drops the responder, which answers the callers.
            let _ = handover.await;
        })
    }
}

/// One entry on its way. Frees its place and answers its callers, whatever happens to it.
struct Slot {
    shared: Arc<Shared>,
    waiting: Vec<Waiting>,
}

impl Slot {
    fn complete(mut self, result: ClientWriteResult<TypeConfig>) {
        let waiting = std::mem::take(&mut self.waiting);
        // Free the slot first: the next entry need not wait for these callers to be woken.
        drop(self);
        match result {
            Ok(response) => {
                let log_id = log_id_to_log(&response.log_id);
                let outcomes = response.data.0;
                if outcomes.len() != waiting.len() {
                    refuse(waiting, &unknown("the state machine answered another batch"));
                    return;
                }
                for (waiting, outcome) in waiting.into_iter().zip(outcomes) {
                    // The caller may be gone; its command is applied all the same.
                    let _ = waiting.answer.send(Ok(Proposed { log_id, outcome }));
                }
            }
            Err(error) => refuse(waiting, &propose_error(error)),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        refuse(std::mem::take(&mut self.waiting), &unknown("the replica stopped"));
        self.shared.state.lock().in_flight -= 1;
        if tokio::runtime::Handle::try_current().is_ok() {
            self.shared.clone().send_ready();
        }
    }
}

fn refuse(waiting: Vec<Waiting>, error: &ProposeError) {
    for waiting in waiting {
        let _ = waiting.answer.send(Err(error.clone()));
    }
}

fn unknown(reason: &str) -> ProposeError {
    ProposeError::Unknown { reason: reason.to_owned() }
}

fn propose_error(error: ClientWriteError<TypeConfig>) -> ProposeError {
    match error {
        ClientWriteError::ForwardToLeader(to) => {
            ProposeError::NotLeader { leader: to.leader_id.map(NodeId) }
        }
        ClientWriteError::LogEntryDiscarded(_) => unknown("leadership was lost meanwhile"),
        error @ (ClientWriteError::ChangeMembershipError(_)
        | ClientWriteError::PreconditionFailed(_)) => unknown(&error.to_string()),
    }
}

#[cfg(test)]
mod tests;
