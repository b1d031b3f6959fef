//! What every link is doing, for operators: `ctl link list`, metrics and logs read it here.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;
use tombolo_core::{NamespaceId, RegionId, ShardId};

/// One link: what one shard pulls of one namespace from one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkKey {
    /// The region that is pulled from.
    pub peer: RegionId,
    /// The namespace.
    pub namespace: NamespaceId,
    /// The shard.
    pub shard: ShardId,
}

/// What a link is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkPhase {
    /// Looking for the peer's leader.
    #[default]
    Connecting,
    /// Receiving changes as they commit.
    Streaming,
    /// This region joins, comes back or is recovered, and takes over what the peer has.
    Seeding,
    /// The peer's change log no longer reaches back to what this region has: taking over what
    /// differs, or waiting for the turn to.
    Repairing,
    /// An operator has paused the link.
    Paused,
    /// Waiting before the next attempt, or refused.
    Blocked,
}

/// A link's state and counts since this node began to lead the shard.
#[derive(Clone, Debug, Default)]
pub struct LinkStatus {
    /// What it is doing.
    pub phase: LinkPhase,
    /// Events that the peer has and this region has not applied.
    pub lag_events: u64,
    /// Why it does not stream.
    pub last_error: Option<String>,
    /// When it is tried again.
    pub next_retry: Option<SystemTime>,
    /// Events received.
    pub received_events: u64,
    /// Bytes received, before compression.
    pub received_bytes: u64,
    /// How far a repair is.
    pub repair: Option<RepairProgress>,
    /// Repairs that ended well.
    pub repairs_done: u64,
}

/// How far a repair is.
#[derive(Clone, Debug)]
pub struct RepairProgress {
    /// Leaves of the Merkle tree that differed.
    pub leaves_total: usize,
    /// Of them, those that are exchanged.
    pub leaves_done: usize,
    /// Records that were changed.
    pub records: u64,
    /// Bytes sent and received for it, before compression.
    pub exchanged_bytes: u64,
    /// When the exchange began.
    pub began: Instant,
}

impl RepairProgress {
    pub(crate) fn new(leaves_total: usize) -> Self {
        let began = Instant::now();
        Self { leaves_total, leaves_done: 0, records: 0, exchanged_bytes: 0, began }
    }

    /// The part of the leaves that is exchanged, from 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "a share needs no exact figure")]
    pub fn share(&self) -> f64 {
        if self.leaves_total == 0 {
            return 1.0;
        }
        self.leaves_done as f64 / self.leaves_total as f64
    }

    /// How long the rest takes if it goes on as until now; `None` while nothing is exchanged.
    pub fn time_left(&self) -> Option<Duration> {
        let share = self.share();
        (share > 0.0).then(|| self.began.elapsed().mul_f64((1.0 - share) / share))
    }
}

/// Repairs of all links with a region since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairCounts {
    /// Repairs that brought what was lacking.
    pub caught_up: u64,
    /// Comparisons that found both regions equal.
    pub equal: u64,
    /// Comparisons that found different data at the same point of history.
    pub damage: u64,
    /// Repairs that broke off.
    pub failed: u64,
    /// Records that were changed.
    pub records: u64,
    /// Bytes sent and received, comparisons included, before compression.
    pub exchanged_bytes: u64,
}

/// Bytes of changes exchanged with a region since the process started, before compression.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From here to there.
    pub sent_bytes: u64,
    /// From there to here.
    pub received_bytes: u64,
}

/// The links of all shards that this node leads.
#[derive(Debug, Default)]
pub struct LinkStatuses {
    links: RwLock<BTreeMap<LinkKey, LinkStatus>>,
    traffic: Mutex<BTreeMap<RegionId, Traffic>>,
    repairs: Mutex<BTreeMap<RegionId, RepairCounts>>,
    /// Links for which somebody asked for a repair.
    asked: Mutex<BTreeSet<LinkKey>>,
}

impl LinkStatuses {
    /// All links, in order.
    pub fn all(&self) -> Vec<(LinkKey, LinkStatus)> {
        self.links.read().iter().map(|(&key, status)| (key, status.clone())).collect()
    }

    /// What was exchanged with a region, by all shards that this node leads or led.
    pub fn traffic(&self, peer: RegionId) -> Traffic {
        self.traffic.lock().get(&peer).copied().unwrap_or_default()
    }

    /// The repairs of this region from a peer, of all shards that this node leads or led.
    pub fn repairs(&self, peer: RegionId) -> RepairCounts {
        self.repairs.lock().get(&peer).copied().unwrap_or_default()
    }

    /// Asks for a repair, which begins soon if this node leads the shard.
    pub fn ask_repair(&self, key: LinkKey) {
        self.asked.lock().insert(key);
    }

    /// Whether a repair was asked for since this was asked last.
    pub(crate) fn take_asked(&self, key: LinkKey) -> bool {
        self.asked.lock().remove(&key)
    }

    /// Counts bytes that a repair exchanged.
    pub(crate) fn count_exchanged(&self, key: LinkKey, bytes: usize) {
        self.count_repair(key.peer, |counts| counts.exchanged_bytes += bytes as u64);
        if let Some(progress) =
            self.links.write().get_mut(&key).and_then(|status| status.repair.as_mut())
        {
            progress.exchanged_bytes += bytes as u64;
        }
    }

    pub(crate) fn count_repair(&self, peer: RegionId, count: impl FnOnce(&mut RepairCounts)) {
        count(self.repairs.lock().entry(peer).or_default());
    }

    pub(crate) fn count_sent(&self, peer: RegionId, bytes: u64) {
        self.traffic.lock().entry(peer).or_default().sent_bytes += bytes;
    }

    pub(crate) fn count_received(&self, peer: RegionId, bytes: u64) {
        self.traffic.lock().entry(peer).or_default().received_bytes += bytes;
    }

    /// Changes one link's status.
    pub(crate) fn update(&self, key: LinkKey, change: impl FnOnce(&mut LinkStatus)) {
        change(self.links.write().entry(key).or_default());
    }

    /// How far the repair of a link came, which ended.
    pub(crate) fn take_repair(&self, key: LinkKey) -> Option<RepairProgress> {
        self.links.write().get_mut(&key)?.repair.take()
    }

    /// Forgets the links of a shard that this node leads no more.
    pub(crate) fn forget_shard(&self, shard: ShardId) {
        self.links.write().retain(|key, _| key.shard != shard);
        self.asked.lock().retain(|key| key.shard != shard);
    }

    /// Forgets the links of a namespace that was deleted.
    pub(crate) fn forget(&self, key: LinkKey) {
        self.links.write().remove(&key);
    }
}
