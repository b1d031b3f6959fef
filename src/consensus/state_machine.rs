//! openraft's state machine on one shard of the data store.
//!
//! Committed entries arrive as a stream. What is ready is drained into a run, a run is one write
//! batch of the store with the applied position in it, and only then are the proposers answered.
//!
//! **Where the batch is written.** A run goes into RocksDB's memtable, without WAL and without a
//! sync: some microseconds per key. A short run is written right on the worker task, because a
//! hand-over to a blocking thread costs more than the write. A run above [`INLINE_BYTES_MAX`], or
//! one that RocksDB would hold up because flushes are behind, goes to a blocking thread, so that a
//! bulk load does not hold one of the few threads that serve requests.
//!
//! Invariants:
//! * A proposer is answered after its entry is visible to reads, never before.
//! * A store that fails to apply stops the group: going on would make replicas differ.
//! * A snapshot's description is never ahead of its content.
//!
//! Not here: execution (`tombolo-core`), keys and batches (`tombolo-storage`), chunks on the wire
//! ([`crate::network`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{FutureExt, Stream, StreamExt};
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine, Snapshot};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tombolo_core::{Outcome, ShardId};
use tombolo_storage::{ApplyEntry, ApplyPayload, ShardStore, Store};

use crate::snapshot::{SnapshotCache, SnapshotData};
use crate::types::{
    Entry, LogId, Outcomes, SnapshotMeta, StoredMembership, TypeConfig, bad_data,
    encode_membership, log_id_from_position, position, stored_membership,
};

/// A run is closed when it holds this much; bounds one write batch.
const RUN_BYTES_MAX: usize = 1 << 20;
/// A run is closed at this many entries; bounds the time until the first of them is answered.
const RUN_ENTRIES_MAX: usize = 512;
/// Runs above this are applied on a blocking thread.
const INLINE_BYTES_MAX: usize = 64 << 10;

pub(crate) type ShardSnapshot = Snapshot<
    openraft::alias::CommittedLeaderIdOf<TypeConfig>,
    u64,
    crate::types::Member,
    SnapshotData,
>;

/// The state machine of one group.
pub(crate) struct StateMachine {
    shard: ShardId,
    store: Store,
    data: ShardStore,
    snapshots: Arc<SnapshotCache>,
    /// Set once the group has loaded its state. Before that, openraft asks for a snapshot to
    /// restore from, which a persistent state machine does not need.
    loaded: Arc<AtomicBool>,
}

impl StateMachine {
    pub(crate) fn new(
        shard: ShardId,
        store: Store,
        data: ShardStore,
        snapshots: Arc<SnapshotCache>,
        loaded: Arc<AtomicBool>,
    ) -> Self {
        Self { shard, store, data, snapshots, loaded }
    }

    async fn apply_run(&self, run: Run) -> Result<(), io::Error> {
        let Run { entries, responders, bytes } = run;
        let inline = if bytes <= INLINE_BYTES_MAX {
            self.data.try_apply(&entries).map_err(io::Error::other)?
        } else {
            None
        };
        let outcomes = match inline {
            Some(outcomes) => outcomes,
            None => {
                let data = self.data.clone();
                tokio::task::spawn_blocking(move || data.apply(&entries))
                    .await
                    .map_err(io::Error::other)?
                    .map_err(io::Error::other)?
            }
        };
        if outcomes.len() != responders.len() {
            return Err(bad_data("the store answered another number of entries than it was given"));
        }
        answer(responders, outcomes);
        Ok(())
    }
}

fn answer(responders: Vec<Option<ApplyResponder<TypeConfig>>>, outcomes: Vec<Vec<Outcome>>) {
    for (responder, outcomes) in responders.into_iter().zip(outcomes) {
        if let Some(responder) = responder {
            responder.send(Outcomes(outcomes));
        }
    }
}

/// Entries that will be applied in one write batch.
#[derive(Default)]
struct Run {
    entries: Vec<ApplyEntry>,
    responders: Vec<Option<ApplyResponder<TypeConfig>>>,
    bytes: usize,
}

impl Run {
    fn push(&mut self, (entry, responder): (Entry, Option<ApplyResponder<TypeConfig>>)) {
        let payload = match entry.payload {
            EntryPayload::Blank => ApplyPayload::Blank,
            EntryPayload::Normal(command) => {
                self.bytes += command.0.len();
                ApplyPayload::Commands(command.0)
            }
            EntryPayload::Membership(membership) => {
                ApplyPayload::Membership(encode_membership(&membership))
            }
        };
        self.entries.push(ApplyEntry { position: position(&entry.log_id), payload });
        self.responders.push(responder);
    }

    fn is_full(&self) -> bool {
        RUN_BYTES_MAX <= self.bytes || RUN_ENTRIES_MAX <= self.entries.len()
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = CompactionPoint;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.data.applied().map(log_id_from_position);
        Ok((applied, stored_membership(self.data.membership())?))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some(first) = entries.next().await {
            let mut run = Run::default();
            run.push(first?);
            while !run.is_full() {
                let Some(Some(next)) = entries.next().now_or_never() else { break };
                run.push(next?);
            }
            self.apply_run(run).await?;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> CompactionPoint {
        CompactionPoint { shard: self.shard, store: self.store.clone(), data: self.data.clone() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let SnapshotData::Incoming(received) = snapshot else {
            return Err(bad_data("asked to install a snapshot that was not received"));
        };
        let data = self.data.clone();
        tokio::task::spawn_blocking(move || data.install(*received))
            .await
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        self.snapshots.clear();

        let applied = self.data.applied().map(log_id_from_position);
        if applied != meta.last_log_id {
            return Err(bad_data(format_args!(
                "installed a snapshot at {applied:?} that was announced at {:?}",
                meta.last_log_id
            )));
        }
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<ShardSnapshot>, io::Error> {
        if !self.loaded.load(Ordering::Acquire) || self.data.applied().is_none() {
            return Ok(None);
        }
        let outgoing = self.snapshots.current(&self.data)?;
        Ok(Some(Snapshot {
            meta: outgoing.meta().clone(),
            snapshot: SnapshotData::Outgoing(outgoing),
        }))
    }
}

/// Builds a "snapshot" in openraft's sense: the point up to which the log may go.
///
/// The state machine is its own snapshot, so nothing is copied. The point is what the store has
/// *flushed*: what was only applied is in memory, and after a crash comes back from the log.
pub(crate) struct CompactionPoint {
    shard: ShardId,
    store: Store,
    data: ShardStore,
}

impl RaftSnapshotBuilder<TypeConfig> for CompactionPoint {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<ShardSnapshot, io::Error> {
        let (store, shard) = (self.store.clone(), self.shard);
        let durable = tokio::task::spawn_blocking(move || store.durable_position(shard))
            .await
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        let membership = self
            .data
            .membership()
            .filter(|(at, _)| durable.as_ref().is_some_and(|durable| at.index <= durable.index));
        Ok(Snapshot {
            meta: SnapshotMeta {
                last_log_id: durable.map(log_id_from_position),
                last_membership: stored_membership(membership)?,
            },
            snapshot: SnapshotData::CompactionPoint,
        })
    }
}
