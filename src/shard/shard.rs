//! A shard: its Raft group, its data on this node, and what its callers wait for.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tombolo_cluster::Topology;
use tombolo_consensus::Group;
use tombolo_core::{NamespaceId, NodeId, RegionId, ShardId, VersionVector, stability};
use tombolo_storage::ShardStore;

use crate::{clock::Clock, error::ShardError, headroom::Headroom, peers::PeerFrontiers};

/// A position in a shard's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revision {
    /// The shard.
    pub shard: ShardId,
    /// The Raft term.
    pub term: u64,
    /// The Raft log index.
    pub index: u64,
}

/// One shard on this node. Cheap to clone.
#[derive(Clone)]
pub struct Shard {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) id: ShardId,
    pub(crate) group: Group,
    pub(crate) store: ShardStore,
    pub(crate) clock: Arc<Clock>,
    pub(crate) headroom: Arc<Headroom>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) peers: PeerFrontiers,
    /// When the last confirmed read barrier was asked for.
    pub(crate) last_barrier: Mutex<Option<Instant>>,
}

impl Shard {
    /// The shard that `group` replicates and `store` holds.
    pub fn new(
        id: ShardId,
        group: Group,
        store: ShardStore,
        clock: Arc<Clock>,
        headroom: Arc<Headroom>,
        topology: Arc<Topology>,
    ) -> Self {
        let peers = PeerFrontiers::default();
        let last_barrier = Mutex::new(None);
        let inner = Inner { id, group, store, clock, headroom, topology, peers, last_barrier };
        Self { inner: Arc::new(inner) }
    }

    /// Its number.
    pub fn id(&self) -> ShardId {
        self.inner.id
    }

    /// Its Raft group.
    pub fn group(&self) -> &Group {
        &self.inner.group
    }

    /// Its data on this node.
    pub fn store(&self) -> &ShardStore {
        &self.inner.store
    }

    /// Whether this node believes to lead the shard.
    pub fn is_leader(&self) -> bool {
        self.inner.group.leadership().borrow().is_leader
    }

    /// Who leads, if known.
    pub fn leader(&self) -> Option<NodeId> {
        self.inner.group.leadership().borrow().leader
    }

    /// What other regions have acknowledged; only meaningful on the leader.
    pub fn peers(&self) -> &PeerFrontiers {
        &self.inner.peers
    }

    /// The node's clock.
    pub fn clock(&self) -> &Clock {
        &self.inner.clock
    }

    /// The topology.
    pub fn topology(&self) -> &Topology {
        &self.inner.topology
    }

    /// What is applied of a namespace on this node.
    pub fn frontier(&self, namespace: NamespaceId) -> VersionVector {
        self.inner.store.frontier(namespace)
    }

    /// What every region has applied, such that nothing that has not seen it can still come from
    /// any of them: tombstones that it covers may go. Only meaningful on the leader.
    pub fn stable_for_tombstones(&self, namespace: NamespaceId) -> VersionVector {
        let local = self.frontier(namespace);
        let peers = self.inner.topology.peers();
        let settled = peers.map(|peer| self.inner.peers.settled(namespace, peer.id, &local));
        stability::collectable(&local, settled)
    }

    /// The regions that keep tombstones of a namespace from going: those that have not told, or
    /// whose own events are not all here. Looks at the first thousand. Only meaningful on the
    /// leader.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn tombstones_wait_for(
        &self,
        namespace: NamespaceId,
    ) -> Result<BTreeSet<RegionId>, ShardError> {
        let local = self.frontier(namespace);
        let found = self.inner.store.tombstones(namespace, &[], TOMBSTONES_LOOKED_AT)?;
        let settled = |peer| self.inner.peers.settled(namespace, peer, &local);
        let blocks = |peer: &RegionId| {
            let settled = settled(*peer);
            found.iter().any(|(_, record)| !settled.covers_all(record.context()))
        };
        Ok(self.inner.topology.peers().map(|peer| peer.id).filter(blocks).collect())
    }

    /// Waits until this replica has applied all of `needed`.
    ///
    /// Cancellation safe: it only looks.
    ///
    /// # Errors
    /// [`ShardError::NotCaughtUp`] with the distance when the deadline passes first.
    pub async fn wait_applied(
        &self,
        namespace: NamespaceId,
        needed: &VersionVector,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        let mut applied = self.inner.store.watch_applied();
        loop {
            let frontier = self.frontier(namespace);
            if frontier.covers_all(needed) {
                return Ok(());
            }
            let changed = tokio::time::timeout_at(deadline, applied.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                let needed = needed.clone();
                return Err(ShardError::NotCaughtUp { shard: self.inner.id, needed, frontier });
            }
        }
    }

    /// Waits until this node leads the shard, or knows who does.
    ///
    /// # Errors
    /// [`ShardError::NotLeader`] without a leader when the deadline passes first.
    pub async fn wait_for_leader(&self, deadline: Instant) -> Result<(), ShardError> {
        let mut leadership = self.inner.group.leadership();
        let known = leadership.wait_for(|seen| seen.leader.is_some());
        match tokio::time::timeout_at(deadline, known).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => {
                Err(ShardError::NotLeader { shard: self.inner.id, leader: None })
            }
        }
    }
}

const TOMBSTONES_LOOKED_AT: usize = 1000;
/// How long a write that must wait for another region's changes waits between looks.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(20);
