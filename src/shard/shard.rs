//! A shard: its Raft group, its data on this node, and what its callers wait for.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tombolo_cluster::Topology;
use tombolo_consensus::Group;
use tombolo_core::{
    Actor, Member, MemberState, Members, NamespaceId, NodeId, RegionId, ShardId, VersionVector,
    stability,
};
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
    /// Regions that said since this process began what they have of this region's writes.
    heard: watch::Sender<BTreeSet<RegionId>>,
    began: Instant,
    /// This replica has applied all that was acknowledged before; see [`Shard::note_fresh`].
    pub(crate) fresh_as_of: Mutex<Option<Instant>>,
    /// When a client last wrote here, in milliseconds since `began`, plus one; 0 if none did.
    last_write_ms: AtomicU64,
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
        let fresh_as_of = Mutex::new(None);
        let (heard, began) = (watch::Sender::default(), Instant::now());
        let last_write_ms = AtomicU64::new(0);
        let inner = Inner {
            id,
            group,
            store,
            clock,
            headroom,
            topology,
            peers,
            heard,
            began,
            fresh_as_of,
            last_write_ms,
        };
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

    /// A region in its present life, as this shard knows it.
    pub fn actor_of(&self, region: RegionId) -> Actor {
        self.inner.store.members().actor(region)
    }

    /// What this region's writes carry.
    pub fn actor(&self) -> Actor {
        self.actor_of(self.inner.topology.region)
    }

    /// What this shard knows of its own region.
    pub fn own_member(&self) -> Member {
        let Topology { region, joins, .. } = *self.inner.topology;
        match self.inner.store.members().said(region) {
            Some(said) => said,
            None if joins => Member { state: MemberState::Joining, ..Member::default() },
            None => Member::default(),
        }
    }

    /// Refuses while this region is still taking over what the others have: what is here is no
    /// answer to anybody's question.
    ///
    /// # Errors
    /// [`ShardError::NotActive`].
    pub fn check_whole(&self) -> Result<(), ShardError> {
        let member = self.own_member();
        if member.state.is_joining() {
            return Err(ShardError::NotActive { shard: self.inner.id, member });
        }
        Ok(())
    }

    /// A region said what it has of this region's writes, and this shard has drawn its conclusions.
    pub fn hear_from(&self, region: RegionId) {
        self.inner.heard.send_if_modified(|heard| heard.insert(region));
    }

    /// Waits until every other region has been heard since this process began, but only in its first
    /// moments: whoever was started with an old copy of its data must not use an identity twice.
    ///
    /// Cancellation safe: it only looks.
    pub(crate) async fn wait_heard(&self, deadline: Instant) {
        let until = deadline.min(self.inner.began + HEAR_TIMEOUT);
        if Instant::now() >= until {
            return;
        }
        let members = self.inner.store.members();
        let peers = self.inner.topology.peers();
        let asked: Vec<RegionId> = peers
            .into_iter()
            .map(|peer| peer.id)
            .filter(|&peer| !members.get(peer).state.is_out())
            .collect();
        let mut heard = self.inner.heard.subscribe();
        let all = heard.wait_for(|heard| asked.iter().all(|region| heard.contains(region)));
        // One that does not answer holds nothing up.
        let _ = tokio::time::timeout_at(until, all).await;
    }

    /// A client writes here.
    pub(crate) fn note_write(&self) {
        self.inner.last_write_ms.store(self.age_ms() + 1, Ordering::Relaxed);
    }

    /// Whether a client wrote here within the last `span`, so that work that can wait should.
    pub fn wrote_within(&self, span: Duration) -> bool {
        let last = self.inner.last_write_ms.load(Ordering::Relaxed);
        last > 0 && u128::from(self.age_ms() + 1 - last) <= span.as_millis()
    }

    fn age_ms(&self) -> u64 {
        u64::try_from(self.inner.began.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
    }

    /// Whose word counts before anything of a namespace is forgotten.
    fn counted(
        &self,
        namespace: NamespaceId,
        members: &Members,
        local: &VersionVector,
    ) -> Vec<Actor> {
        let topology = &self.inner.topology;
        let listed = topology.regions();
        let all: BTreeSet<RegionId> = listed
            .iter()
            .map(|region| region.id)
            .chain(members.iter().map(|(region, _)| region))
            .filter(|&region| region != topology.region)
            .collect();
        self.inner.peers.counted(namespace, all, members, local)
    }

    /// What every region has acknowledged of a namespace. Empty while one of them has not spoken to
    /// this leader.
    pub(crate) fn acknowledged_by_all(&self, namespace: NamespaceId) -> VersionVector {
        let (local, members) = self.inner.store.frontier_and_members(namespace);
        let counted = self.counted(namespace, &members, &local);
        self.inner.peers.stable(namespace, &local, counted)
    }

    /// What every region has applied, such that nothing that has not seen it can still come from
    /// any of them: tombstones that it covers may go. And who was counted for that. Only meaningful
    /// on the leader.
    pub fn stable_for_tombstones(&self, namespace: NamespaceId) -> (VersionVector, Members) {
        let (local, members) = self.inner.store.frontier_and_members(namespace);
        let counted = self.counted(namespace, &members, &local);
        let settled =
            counted.into_iter().map(|region| self.inner.peers.settled(namespace, region, &local));
        (stability::collectable(&local, settled), members)
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
        let (local, members) = self.inner.store.frontier_and_members(namespace);
        let found = self.inner.store.tombstones(namespace, &[], TOMBSTONES_LOOKED_AT)?;
        let blocks = |region: &Actor| {
            let settled = self.inner.peers.settled(namespace, *region, &local);
            found.iter().any(|(_, record)| !settled.covers_all(record.context()))
        };
        let counted = self.counted(namespace, &members, &local);
        Ok(counted.into_iter().filter(blocks).map(|region| region.region).collect())
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
/// How long after its start a node waits for other regions before it takes writes.
const HEAR_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a write that must wait for another region's changes waits between looks.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(20);
