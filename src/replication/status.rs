//! What every link is doing, for operators: `ctl link list`, metrics and logs read it here.

use std::{collections::BTreeMap, time::SystemTime};

use parking_lot::{Mutex, RwLock};
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

    /// Forgets the links of a shard that this node leads no more.
    pub(crate) fn forget_shard(&self, shard: ShardId) {
        self.links.write().retain(|key, _| key.shard != shard);
    }

    /// Forgets the links of a namespace that was deleted.
    pub(crate) fn forget(&self, key: LinkKey) {
        self.links.write().remove(&key);
    }
}
