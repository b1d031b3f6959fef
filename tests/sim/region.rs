//! A region: what it holds durably, what its leader remembers, and its clock.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    time::Duration,
};

use bytes::Bytes;
use tombolo_core::{
    Actor, Change, Command, Dot, HybridClock, HybridTime, NamespaceId, Record, RegionId, RequestId,
    ShardState, VersionVector,
    command::{LinkSetting, Remembered},
    ledger::{LedgerEntry, Noted},
    members::{FenceTold, Member, MemberState, Members},
    merkle::{Tree, digest, leaf_of},
    relay::Relays,
    stability::Told,
    testing::MemoryState,
};

use crate::{
    link::{Feed, Stream},
    repair::Source,
};

/// The only namespace.
pub const NAMESPACE: NamespaceId = NamespaceId(1);
/// How far ahead of its wall clock a region believes a time.
pub const CLOCK_OFFSET_MAX_MS: u64 = 500;
/// Time without a path after which another region relays.
pub const RELAY_AFTER: Duration = Duration::from_secs(3);

/// What Raft has committed, with the Merkle tree as the storage keeps it: changed by every write of a
/// record, and never computed again.
#[derive(Clone, Debug, Default)]
pub struct Data {
    /// Everything but the tree.
    pub memory: MemoryState,
    /// The tree.
    pub tree: Tree,
    /// A bug: deletions do not change the tree.
    pub forgets_deletions: bool,
}

impl Data {
    /// What is applied.
    pub fn frontier(&self) -> VersionVector {
        self.memory.frontier(NAMESPACE)
    }

    /// Up to where records may be ahead of that.
    pub fn ahead(&self) -> VersionVector {
        self.memory.ahead(NAMESPACE)
    }

    /// Whether the records are exactly what the frontier says.
    pub fn is_exact(&self) -> bool {
        self.frontier().covers_all(&self.ahead())
    }

    /// Up to where the change log is gone.
    pub fn trimmed(&self) -> VersionVector {
        self.memory.trimmed.get(&NAMESPACE).cloned().unwrap_or_default()
    }

    /// Changes of an actor from `from_seq` on, without a gap.
    pub fn log(&self, actor: Actor, from_seq: u64) -> VecDeque<Change> {
        let all = (NAMESPACE, actor, from_seq)..=(NAMESPACE, actor, u64::MAX);
        let mut next = from_seq;
        let mut found = VecDeque::new();
        for change in self.memory.changes.range(all).map(|(_, change)| change) {
            if change.first_seq != next {
                break;
            }
            next = change.last().seq + 1;
            found.push_back(change.clone());
        }
        found
    }

    fn toggle(&mut self, key: &[u8], after: u64) {
        let before = self.memory.records.get(&(NAMESPACE, Bytes::copy_from_slice(key)));
        let before = before.map_or(0, |record| digest(key, record));
        if !(self.forgets_deletions && after == 0) {
            self.tree.toggle(leaf_of(key), before ^ after);
        }
    }
}

impl ShardState for Data {
    type Error = Infallible;

    fn record(&self, namespace: NamespaceId, key: &[u8]) -> Result<Option<Record>, Infallible> {
        self.memory.record(namespace, key)
    }

    fn elements(
        &self,
        namespace: NamespaceId,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Bytes, Record)>, Infallible> {
        self.memory.elements(namespace, from, to, limit)
    }

    fn put_record(&mut self, namespace: NamespaceId, key: &Bytes, record: Record) {
        self.toggle(key, digest(key, &record));
        self.memory.put_record(namespace, key, record);
    }

    fn remove_record(&mut self, namespace: NamespaceId, key: &Bytes) {
        self.toggle(key, 0);
        self.memory.remove_record(namespace, key);
    }

    fn frontier(&self, namespace: NamespaceId) -> VersionVector {
        self.memory.frontier(namespace)
    }

    fn set_frontier(&mut self, namespace: NamespaceId, frontier: VersionVector) {
        self.memory.set_frontier(namespace, frontier);
    }

    fn ahead(&self, namespace: NamespaceId) -> VersionVector {
        self.memory.ahead(namespace)
    }

    fn set_ahead(&mut self, namespace: NamespaceId, ahead: VersionVector) {
        self.memory.set_ahead(namespace, ahead);
    }

    fn logged(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        first_seq: u64,
    ) -> Result<Option<Bytes>, Infallible> {
        self.memory.logged(namespace, actor, first_seq)
    }

    fn append_change(&mut self, namespace: NamespaceId, change: &Change) {
        self.memory.append_change(namespace, change);
    }

    fn trim_changes(&mut self, namespace: NamespaceId, upto: &VersionVector) {
        self.memory.trim_changes(namespace, upto);
    }

    fn add_to_ledger(&mut self, namespace: NamespaceId, entry: LedgerEntry) {
        self.memory.add_to_ledger(namespace, entry);
    }

    fn forget_conflict(&mut self, namespace: NamespaceId, noted: Noted) {
        self.memory.forget_conflict(namespace, noted);
    }

    fn remembered(&self, request: RequestId) -> Result<Option<Remembered>, Infallible> {
        self.memory.remembered(request)
    }

    fn remember(&mut self, request: RequestId, remembered: &Remembered) {
        self.memory.remember(request, remembered);
    }

    fn forget(&mut self, request: RequestId) {
        self.memory.forget(request);
    }

    fn set_link(&mut self, peer: RegionId, setting: LinkSetting) {
        self.memory.set_link(peer, setting);
    }

    fn members(&self) -> Members {
        self.memory.members.clone()
    }

    fn set_members(&mut self, members: Members) {
        self.memory.set_members(members);
    }

    fn start_over(&mut self, region: RegionId, known: &BTreeMap<NamespaceId, VersionVector>) {
        self.tree = Tree::default();
        self.memory.start_over(region, known);
    }

    fn forget_reviewed(&mut self, namespace: NamespaceId, key: &Bytes, dot: Dot) {
        self.memory.forget_reviewed(namespace, key, dot);
    }
}

/// A command on its way through a region's Raft log, and who waits for it.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// What is proposed.
    pub command: Command,
    /// Who waits.
    pub waiter: Waiter,
}

/// Who waits for a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiter {
    /// A client.
    Client,
    /// The stream from this place, if it is still this one.
    Stream(usize, u64),
    /// The repair from this place, if it is still this one.
    Repair(usize, u64),
    /// Nobody.
    Nobody,
}

/// What a leader remembers and a crash loses.
#[derive(Debug)]
pub struct Leader {
    /// What regions acknowledged.
    pub acknowledged: BTreeMap<Actor, VersionVector>,
    /// What regions told.
    pub told: BTreeMap<Actor, Told>,
    /// What they told after they shut a region out.
    pub fences: FenceTold,
    /// So many of the records that the region has heard of are proposed.
    pub proposed: usize,
    /// It proposed to start over: until that is done it talks to nobody.
    pub starts_over: bool,
    /// Who relays what.
    pub relays: Relays,
    /// Streams from others.
    pub streams: BTreeMap<usize, Stream>,
    /// When a stream that broke is tried again.
    pub retry_at: BTreeMap<usize, Duration>,
    /// Streams to others.
    pub feeds: BTreeMap<usize, Feed>,
    /// Repairs of others from here.
    pub sources: BTreeMap<usize, Source>,
}

impl Leader {
    /// A leader that knows nothing yet.
    pub fn new(me: RegionId, all: impl Iterator<Item = RegionId>, now: Duration) -> Self {
        let peers = all.filter(|&region| region != me);
        Self {
            acknowledged: BTreeMap::new(),
            told: BTreeMap::new(),
            fences: FenceTold::default(),
            proposed: 0,
            starts_over: false,
            relays: Relays::new(peers, RELAY_AFTER, now),
            streams: BTreeMap::new(),
            retry_at: BTreeMap::new(),
            feeds: BTreeMap::new(),
            sources: BTreeMap::new(),
        }
    }

    /// Whether a repair holds the gate.
    pub fn is_repairing(&self) -> bool {
        self.streams.values().any(|stream| stream.repair.is_some())
    }
}

/// A region.
#[derive(Debug)]
pub struct Region {
    /// Its number.
    pub id: RegionId,
    /// Whether it was there from the start: all know of it without having heard.
    pub is_static: bool,
    /// Whether it exists.
    pub exists: bool,
    /// Nothing that it writes can come to a region that takes part: it was fenced, and all know.
    pub is_sealed: bool,
    /// Which of the operator's records it has heard of, in that order.
    pub heard: Vec<usize>,
    /// What it holds.
    pub data: Data,
    /// The last copy of that.
    pub backup: Option<Data>,
    /// Its Raft log, as far as it is not committed.
    pub queue: VecDeque<Proposal>,
    /// What its leader remembers.
    pub leader: Leader,
    /// Its hybrid clock.
    pub clock: HybridClock,
    /// How far its wall clock is from true time.
    pub offset_ms: i64,
    /// While it joins: where it has repaired from, and what those knew of the regions then.
    pub repaired_from: BTreeMap<Actor, Members>,
}

impl Region {
    /// A region before anything was written.
    pub fn new(id: RegionId, is_static: bool, all: impl Iterator<Item = RegionId>) -> Self {
        Self {
            id,
            is_static,
            exists: is_static,
            is_sealed: false,
            heard: Vec::new(),
            data: Data::default(),
            backup: None,
            queue: VecDeque::new(),
            leader: Leader::new(id, all, Duration::ZERO),
            clock: HybridClock::default(),
            offset_ms: 0,
            repaired_from: BTreeMap::new(),
        }
    }

    /// What it knows of the regions: what its log has applied.
    pub fn members(&self) -> &Members {
        &self.data.memory.members
    }

    /// What it knows of itself.
    pub fn member(&self) -> Member {
        self.members().get(self.id)
    }

    /// Who its events are by.
    pub fn actor(&self) -> Actor {
        self.members().actor(self.id)
    }

    /// Whether it takes writes.
    pub fn is_active(&self) -> bool {
        self.exists && self.member().state == MemberState::Active
    }

    /// Whether it still takes over what the others have.
    pub fn is_joining(&self) -> bool {
        self.exists && self.member().state.is_joining()
    }

    /// Whether it knows that another exists.
    pub fn knows(&self, other: &Self) -> bool {
        other.is_static || self.members().said(other.id).is_some()
    }

    /// Whether it takes what comes from another, and talks to it.
    pub fn admits(&self, other: &Self) -> bool {
        self.knows(other) && self.members().admit(other.actor())
    }

    /// What its wall clock shows.
    pub fn wall_time(&self, now: Duration) -> HybridTime {
        HybridTime::new(self.wall_ms(now), 0).unwrap_or(HybridTime::MAX)
    }

    /// The same in milliseconds.
    pub fn wall_ms(&self, now: Duration) -> u64 {
        // Some days after the epoch, so that a jump back stays after it.
        let true_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX) + 5 * 24 * 3_600_000;
        u64::try_from(true_ms + self.offset_ms).unwrap_or(0)
    }

    /// A time for a new event.
    pub fn stamp(&mut self, now: Duration) -> HybridTime {
        let wall_ms = self.wall_ms(now);
        self.clock.tick(wall_ms, CLOCK_OFFSET_MAX_MS)
    }
}
