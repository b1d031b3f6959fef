//! Snapshots as they pass between the state machine and the network.
//!
//! A leader that must send a snapshot pins one in the store and keeps it, so that a transfer that
//! breaks goes on where it stopped: the same id means the same chunks. A pin holds back RocksDB's
//! clean-up, so it goes after [`KEEP`], and earlier when nobody uses it.
//!
//! Not here: chunks on the wire ([`crate::network::snapshot`]), how a store exports and installs
//! (`tombolo-storage`).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tombolo_core::ShardId;
use tombolo_raftlog::Group;
use tombolo_storage::{
    ReceivedSnapshot, ShardStore, SnapshotBlock, SnapshotExport, SnapshotTotals,
};

use crate::types::{SnapshotMeta, log_id_from_position, stored_membership};

/// A pinned snapshot is not reused for new transfers after this.
const KEEP: Duration = Duration::from_secs(600);
/// A pinned snapshot that nobody sent anything of for this long is let go.
const KEEP_UNUSED: Duration = Duration::from_secs(120);

/// What a snapshot is made of, depending on where it comes from.
pub(crate) enum SnapshotData {
    /// Only a position: the local store is the snapshot.
    CompactionPoint,
    /// Pinned here, to be sent.
    Outgoing(Arc<Outgoing>),
    /// Received in full, to be installed.
    Incoming(Box<ReceivedSnapshot>),
}

/// A pinned snapshot; all transfers of it share it.
pub(crate) struct Outgoing {
    id: String,
    meta: SnapshotMeta,
    created: Instant,
    used: Mutex<Instant>,
    export: Mutex<SnapshotExport>,
}

impl Outgoing {
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// Reads one chunk; `None` past the last. Blocks on the disk.
    pub(crate) fn chunk(&self, number: u64) -> Result<Option<SnapshotBlock>, io::Error> {
        *self.used.lock() = Instant::now();
        self.export.lock().chunk(number).map_err(io::Error::other)
    }

    /// What a receiver must have got in the end. Blocks on the disk.
    pub(crate) fn totals(&self) -> Result<SnapshotTotals, io::Error> {
        self.export.lock().totals().map_err(io::Error::other)
    }
}

/// Keeps the snapshot that a group is sending.
pub(crate) struct SnapshotCache {
    shard: ShardId,
    node: u64,
    log: Group,
    current: Mutex<Option<Arc<Outgoing>>>,
}

impl SnapshotCache {
    pub(crate) fn new(shard: ShardId, node: u64, log: Group) -> Self {
        Self { shard, node, log, current: Mutex::new(None) }
    }

    /// The pinned snapshot, or a new one. A snapshot that the log can no longer continue from is
    /// of no use to a follower, however fresh it is.
    pub(crate) fn current(&self, data: &ShardStore) -> Result<Arc<Outgoing>, io::Error> {
        let mut current = self.current.lock();
        let purged = self.log.state().purged.map_or(0, |purged| purged.index);
        if let Some(kept) = current.as_ref()
            && kept.created.elapsed() < KEEP
            && kept.meta.last_log_id.is_some_and(|last| purged <= last.index)
        {
            *kept.used.lock() = Instant::now();
            return Ok(kept.clone());
        }
        let export = data.export().map_err(io::Error::other)?;
        let meta = SnapshotMeta {
            last_log_id: export.position().map(log_id_from_position),
            last_membership: stored_membership(export.membership())?,
        };
        let at = meta
            .last_log_id
            .as_ref()
            .map_or_else(|| "0".to_owned(), |at| format!("{}-{}", at.leader_id.term, at.index));
        let id = format!("{}-{}-{at}-{:08x}", self.shard, self.node, rand::random::<u32>());
        let now = Instant::now();
        let outgoing = Arc::new(Outgoing {
            id,
            meta,
            created: now,
            used: Mutex::new(now),
            export: Mutex::new(export),
        });
        *current = Some(outgoing.clone());
        Ok(outgoing)
    }

    /// Lets go of a snapshot that nobody is sending any more. Called from time to time.
    pub(crate) fn expire(&self) {
        let mut current = self.current.lock();
        if current.as_ref().is_some_and(|kept| KEEP_UNUSED <= kept.used.lock().elapsed()) {
            *current = None;
        }
    }

    /// Lets go at once.
    pub(crate) fn clear(&self) {
        *self.current.lock() = None;
    }
}
