//! One Raft group on this node, and the watch over its core.
//!
//! A Raft core that panics or meets a storage error ends its task and leaves the process up: a
//! replica that answers nothing while the node looks healthy. The supervisor notices at once
//! (the core's metrics channel closes with it), answers everyone who waits, and reports the
//! failure; the node then exits, because only a restart rebuilds a replica from its disk.
//!
//! Not here: the list of groups ([`crate::node`]), batching ([`crate::propose`]), reads
//! ([`crate::reads`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{Fatal, InitializeError, RaftError};
use openraft::{Instant as _, Raft, RaftMetrics, ServerState};
use parking_lot::Mutex;
use tokio::sync::watch;
use tombolo_core::{NodeId, ShardId};
use tombolo_storage::{ShardStore, Store};

use crate::config::ConsensusConfig;
use crate::log_store::LogStore;
use crate::metrics::GroupMetrics;
use crate::network::client::{GroupNetwork, Transport};
use crate::propose::{Batcher, Handover, ProposeError, Proposed, Proposer};
use crate::quarantine::Quarantine;
use crate::reads::{ReadBarrier, ReadError, Reads};
use crate::snapshot::SnapshotCache;
use crate::state_machine::StateMachine;
use crate::types::{self, Command, TypeConfig, WriteResponder};

pub(crate) type RaftCore = Raft<TypeConfig, StateMachine>;

/// A follower that lags more is not asked to take over: until it has caught up, nobody leads.
const TRANSFER_LAG_MAX: u64 = 1000;

/// Who leads a group, as this node sees it. A hint: only a proposal or a read barrier proves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader, if known.
    pub leader: Option<NodeId>,
    /// The term it leads.
    pub term: u64,
    /// Whether it is this node.
    pub is_leader: bool,
}

/// What the network layer needs of a group.
#[derive(Clone)]
pub(crate) struct Member {
    pub(crate) raft: RaftCore,
    pub(crate) quarantine: Arc<Quarantine>,
    pub(crate) heard: Arc<Heard>,
    log: tombolo_raftlog::Group,
}

/// When a leader last spoke to this replica. openraft goes on naming a leader that has died until
/// somebody else wins.
#[derive(Debug)]
pub(crate) struct Heard(Mutex<tokio::time::Instant>);

impl Heard {
    pub(crate) fn note(&self) {
        *self.0.lock() = tokio::time::Instant::now();
    }
}

impl Member {
    /// Whether this replica was ever part of the group's history.
    pub(crate) fn has_state(&self) -> bool {
        let state = self.log.state();
        state.vote.is_some() || state.last.is_some() || state.purged.is_some()
    }
}

/// What a failed part of the node is reported to.
#[derive(Clone, Debug)]
pub(crate) struct Failures(Arc<watch::Sender<Option<String>>>);

impl Failures {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Keeps the first failure: the later ones are mostly its consequences.
    pub(crate) fn report(&self, failure: String) {
        tracing::error!(%failure, "consensus failed");
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                *first = Some(failure);
            }
            is_first
        });
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<String>> {
        self.0.subscribe()
    }
}

/// A replica of one shard; clones share it.
#[derive(Clone)]
pub struct Group {
    inner: Arc<Inner>,
}

struct Inner {
    shard: ShardId,
    node: NodeId,
    raft: RaftCore,
    batcher: Batcher,
    reads: Arc<Reads>,
    leadership: watch::Receiver<Leadership>,
    leader_changes: AtomicU64,
    log: tombolo_raftlog::Group,
    data: ShardStore,
    snapshots: Arc<SnapshotCache>,
    quarantine: Arc<Quarantine>,
    /// Index of the flushed applied position plus one; 0 when nothing is flushed.
    flushed_next: AtomicU64,
    stopping: AtomicBool,
    heard: Arc<Heard>,
    /// This replica does not stand for election; see [`Group::withhold`].
    withheld: AtomicBool,
    failure: Mutex<Option<String>>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("shard", &self.inner.shard).finish_non_exhaustive()
    }
}

struct CoreProposer(RaftCore);

impl Proposer for CoreProposer {
    fn write(&self, command: Command, responder: WriteResponder) -> Handover {
        let raft = self.0.clone();
        Box::pin(
            async move { raft.client_write_ff(command, Some(responder)).await.map_err(|_| ()) },
        )
    }
}

impl Group {
    /// Loads the replica from its log and data, and starts it.
    pub(crate) async fn start(
        config: &ConsensusConfig,
        shard: ShardId,
        log: tombolo_raftlog::Group,
        store: &Store,
        transport: Arc<Transport>,
        failures: Failures,
    ) -> Result<Self, io::Error> {
        let raft_config = Arc::new(config.raft(shard.0).map_err(io::Error::other)?);
        let data = store.shard(shard).map_err(io::Error::other)?;
        let node = config.node_id;
        let number = u64::from(shard.0);
        let snapshots = Arc::new(SnapshotCache::new(shard, node.0, log.clone()));
        let loaded = Arc::new(AtomicBool::new(false));
        let machine = StateMachine::new(
            shard,
            store.clone(),
            data.clone(),
            snapshots.clone(),
            loaded.clone(),
        );
        let network = GroupNetwork { group: number, transport };
        let log_store = LogStore::new(log.clone());

        let state = log.state();
        let may_have_promised = state.vote.is_some() || state.last.is_some();
        let raft = Raft::build(node.0, raft_config, network, log_store, machine)
            .await
            .map_err(io::Error::other)?;
        loaded.store(true, Ordering::Release);
        let quarantine = if config.lease_reads && may_have_promised {
            raft.runtime_config().elect(false);
            Arc::new(Quarantine::start(config.election_timeout_max))
        } else {
            Arc::default()
        };
        raft.run();
        let lease = config.lease_reads.then_some(config.election_timeout_max);
        let (leading, leadership) = watch::channel(Leadership::default());
        let group = Self {
            inner: Arc::new(Inner {
                shard,
                node,
                batcher: Batcher::new(Box::new(CoreProposer(raft.clone())), log.max_entry_bytes()),
                reads: Arc::new(Reads::new(raft.clone(), data.watch_applied(), lease)),
                raft,
                leadership,
                leader_changes: AtomicU64::new(0),
                log,
                data,
                snapshots,
                quarantine,
                flushed_next: AtomicU64::new(0),
                stopping: AtomicBool::new(false),
                heard: Arc::new(Heard(Mutex::new(tokio::time::Instant::now()))),
                withheld: AtomicBool::new(false),
                failure: Mutex::new(None),
            }),
        };
        if let Some(ends) = group.inner.quarantine.ends() {
            let group = group.clone();
            tokio::spawn(async move {
                tokio::time::sleep_until(ends).await;
                group.decide_elections();
            });
        }
        tokio::spawn(group.clone().supervise(leading, failures));
        Ok(group)
    }

    /// The shard.
    pub fn shard(&self) -> ShardId {
        self.inner.shard
    }

    /// The replica's data, for reads behind a barrier and for local reads.
    pub fn store(&self) -> &ShardStore {
        &self.inner.data
    }

    /// Proposes one encoded command and waits until it is applied here.
    ///
    /// Commands proposed together share an entry. There is no deadline: set one around the call.
    /// Dropping the future takes the command back while it waits for a place in an entry; after
    /// that it may be applied all the same.
    ///
    /// # Errors
    /// See [`ProposeError`]; each variant says whether repeating is safe.
    pub async fn propose(&self, command: Bytes) -> Result<Proposed, ProposeError> {
        self.inner.batcher.propose(command).await
    }

    /// Proves that this node leads and waits until it has applied everything acknowledged so far.
    /// Reading the store right after is linearizable. Cancel safe; set a deadline around it.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read_barrier(&self) -> Result<ReadBarrier, ReadError> {
        self.inner.reads.barrier().await
    }

    /// Who leads, as it changes.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// The applied index, as it advances.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.inner.data.watch_applied()
    }

    /// The group's numbers now.
    pub fn metrics(&self) -> GroupMetrics {
        let raft = self.raft_metrics();
        let counters = self.inner.batcher.counters();
        let (read_rounds, reads) = self.inner.reads.counts();
        let index = |id: &Option<types::LogId>| id.as_ref().map(|id| id.index);
        let matched = raft.replication.unwrap_or_default();
        let acked = raft.heartbeat.unwrap_or_default();
        GroupMetrics {
            shard: self.inner.shard.0,
            is_leader: raft.state == ServerState::Leader,
            leader: raft.current_leader,
            term: raft.current_term,
            leader_changes: self.inner.leader_changes.load(Ordering::Relaxed),
            last_log: raft.last_log_index,
            committed: index(&raft.local_committed),
            applied: self.inner.data.applied().map(|at| at.index),
            flushed: self.flushed(),
            purged: self.inner.log.state().purged.map(|id| id.index),
            matched: matched.iter().map(|(node, id)| (*node, index(id))).collect(),
            acked_millis: acked
                .into_iter()
                .map(|(node, at)| (node, at.map(|at| millis(at.elapsed()))))
                .collect(),
            voters: raft.membership_config.voter_ids().collect(),
            proposed_commands: counters.commands.load(Ordering::Relaxed),
            proposed_entries: counters.entries.load(Ordering::Relaxed),
            proposed_bytes: counters.bytes.load(Ordering::Relaxed),
            overloaded: counters.overloaded.load(Ordering::Relaxed),
            queued_commands: self.inner.batcher.queued() as u64,
            reads,
            read_rounds,
            quarantined: self.inner.quarantine.ends().is_some(),
            failure: self.failure(),
        }
    }

    /// Whether this node leads and a majority has answered it within `age`. A leader that is cut
    /// off goes on believing that it leads; this says that it may be alone. Costs no message.
    pub fn has_quorum(&self, age: Duration) -> bool {
        let metrics = self.metrics();
        let limit = millis(age);
        let fresh = |voter: &&u64| {
            **voter == self.inner.node.0
                || metrics.acked_millis.get(*voter).copied().flatten().is_some_and(|at| at <= limit)
        };
        let count = metrics.voters.iter().filter(fresh).count();
        metrics.is_leader && metrics.voters.len() / 2 < count
    }

    /// The largest command that may be proposed, in bytes.
    pub fn command_bytes_max(&self) -> usize {
        self.inner.batcher.command_bytes_max()
    }

    /// Why the replica is dead, if it is.
    pub fn failure(&self) -> Option<String> {
        self.inner.failure.lock().clone()
    }

    pub(crate) fn member(&self) -> Member {
        Member {
            raft: self.inner.raft.clone(),
            quarantine: self.inner.quarantine.clone(),
            heard: self.inner.heard.clone(),
            log: self.inner.log.clone(),
        }
    }

    pub(crate) fn raft(&self) -> &RaftCore {
        &self.inner.raft
    }

    pub(crate) fn log(&self) -> &tombolo_raftlog::Group {
        &self.inner.log
    }

    pub(crate) fn snapshots(&self) -> &SnapshotCache {
        &self.inner.snapshots
    }

    pub(crate) fn flushed(&self) -> Option<u64> {
        self.inner.flushed_next.load(Ordering::Relaxed).checked_sub(1)
    }

    pub(crate) fn set_flushed(&self, index: Option<u64>) {
        self.inner.flushed_next.store(index.map_or(0, |index| index + 1), Ordering::Relaxed);
    }

    /// A copy: holding the original would stop the core.
    pub(crate) fn raft_metrics(&self) -> RaftMetrics<TypeConfig> {
        self.inner.raft.metrics().borrow_watched().clone()
    }

    /// Makes this replica the group's first, with `members` as voters.
    ///
    /// Whether that is safe is the caller's to know ([`crate::bootstrap`]).
    pub(crate) async fn initialize(
        &self,
        members: BTreeMap<u64, types::Member>,
    ) -> Result<(), io::Error> {
        match self.inner.raft.initialize(members).await {
            // Somebody told us about the group meanwhile: then it exists.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Keeps this replica from standing for election, or lets it again. It goes on voting, and leading
    /// if it leads; a leader may still hand over to it.
    pub fn withhold(&self, withheld: bool) {
        if self.inner.withheld.swap(withheld, Ordering::AcqRel) != withheld {
            tracing::debug!(shard = %self.inner.shard, withheld, "standing for election was decided");
            self.decide_elections();
        }
    }

    /// Whether this replica leads, or a leader spoke to it within `span` or since it started.
    pub fn heard_leader_within(&self, span: Duration) -> bool {
        self.leadership().borrow().is_leader || self.inner.heard.0.lock().elapsed() <= span
    }

    /// Lets the core stand for election, unless something speaks against it.
    fn decide_elections(&self) {
        let may_stand = self.inner.quarantine.ends().is_none();
        let withheld = self.inner.withheld.load(Ordering::Acquire);
        self.inner.raft.runtime_config().elect(may_stand && !withheld);
    }

    /// Gives leadership away, if this node has it, to the one of `nodes` that is nearest to it.
    /// Answers whether this node no longer leads. Gives up after `limit`.
    pub async fn hand_over_to(&self, nodes: &BTreeSet<NodeId>, limit: Duration) -> bool {
        self.hand_over_if(&|node| nodes.contains(&NodeId(node)), limit).await
    }

    /// The same, to whichever follower is nearest.
    pub(crate) async fn hand_over(&self, limit: Duration) -> bool {
        self.hand_over_if(&|_| true, limit).await
    }

    async fn hand_over_if(&self, fits: &(dyn Fn(u64) -> bool + Sync), limit: Duration) -> bool {
        let give_up = tokio::time::Instant::now() + limit;
        let mut leadership = self.leadership();
        while leadership.borrow_and_update().is_leader {
            if let Some(target) = self.successor(fits) {
                tracing::info!(shard = %self.inner.shard, target, "handing leadership over");
                if self.inner.raft.trigger().transfer_leader(target).await.is_err() {
                    return true;
                }
            }
            // A transfer can fail silently; then another target may be better.
            let retry = tokio::time::Instant::now() + Duration::from_millis(500);
            let until = retry.min(give_up);
            let changed = leadership.wait_for(|now| !now.is_leader);
            match tokio::time::timeout_at(until, changed).await {
                Ok(_) => return true,
                Err(_) if give_up <= tokio::time::Instant::now() => return false,
                Err(_) => {}
            }
        }
        true
    }

    fn successor(&self, fits: &(dyn Fn(u64) -> bool + Sync)) -> Option<u64> {
        let metrics = self.metrics();
        let last = metrics.last_log?;
        let voters = metrics.voters.iter().filter(|voter| **voter != self.inner.node.0);
        let fresh = |voter: &u64| {
            metrics.acked_millis.get(voter).copied().flatten().is_some_and(|age| age < 2000)
        };
        voters
            .filter(|voter| fresh(voter) && fits(**voter))
            .filter_map(|voter| Some((metrics.matched.get(voter).copied().flatten()?, *voter)))
            .filter(|(matched, _)| last.saturating_sub(*matched) < TRANSFER_LAG_MAX)
            .max()
            .map(|(_, voter)| voter)
    }

    /// Stops the replica; idempotent.
    pub(crate) async fn shutdown(&self) {
        self.inner.stopping.store(true, Ordering::Release);
        self.inner.batcher.stop();
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(shard = %self.inner.shard, %error, "the Raft core did not end well");
        }
        self.inner.snapshots.clear();
    }

    async fn supervise(self, leading: watch::Sender<Leadership>, failures: Failures) {
        let mut server = self.inner.raft.server_metrics();
        loop {
            let now = {
                let server = server.borrow_and_update();
                Leadership {
                    leader: server.current_leader.map(NodeId),
                    term: server.vote.leader_id.term,
                    is_leader: server.state == ServerState::Leader,
                }
            };
            leading.send_if_modified(|before| {
                if before.leader != now.leader && now.leader.is_some() {
                    self.inner.leader_changes.fetch_add(1, Ordering::Relaxed);
                }
                std::mem::replace(before, now) != now
            });
            if server.changed().await.is_err() {
                break;
            }
        }
        leading.send_replace(Leadership::default());
        self.inner.batcher.stop();
        if self.inner.stopping.load(Ordering::Acquire) {
            return;
        }
        let reason = match self.raft_metrics().running_state {
            Err(fatal @ (Fatal::StorageError(_) | Fatal::Stopped)) => fatal.to_string(),
            // A panic leaves no state behind; its message went to the panic hook.
            Err(Fatal::Panicked) | Ok(()) => "it panicked".to_owned(),
        };
        let failure = format!("the Raft core of shard {} ended: {reason}", self.inner.shard);
        *self.inner.failure.lock() = Some(failure.clone());
        failures.report(failure);
    }

    /// Asks for an election now, if the peers agree that there is no leader. For tests.
    #[doc(hidden)]
    pub async fn campaign(&self) {
        let _ = self.inner.raft.trigger().elect(true).await;
    }

    /// Kills the Raft core as a bug in it would. For tests of what notices it.
    #[doc(hidden)]
    pub async fn crash_core(&self) {
        let crash = |_: &openraft::RaftState<TypeConfig>| {
            std::panic::resume_unwind(Box::new("crash asked for by a test"));
        };
        let _ = self.inner.raft.external_request(crash).await;
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
