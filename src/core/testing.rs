//! A shard's state in memory, for tests and simulation.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
};

use bytes::Bytes;

use crate::{
    change::Change,
    command::{Advance, Command, LinkSetting, Merge, Remembered},
    execute::{ShardState, to_review},
    hlc::HybridTime,
    id::{Actor, Dot, NamespaceId, RegionId, RequestId},
    ledger::{LedgerEntry, LedgerId, Noted},
    members::Members,
    merkle::{FAN_OUT, Tree, digest, leaf_of},
    record::{Record, Rule, Sibling},
    repair::{self, Offer, Trust},
    vector::VersionVector,
};

/// Everything that one shard holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryState {
    /// Records by key.
    pub records: BTreeMap<(NamespaceId, Bytes), Record>,
    /// Frontiers.
    pub frontiers: BTreeMap<NamespaceId, VersionVector>,
    /// Up to where records may be ahead of the frontiers.
    pub ahead: BTreeMap<NamespaceId, VersionVector>,
    /// Change logs, by actor and first sequence number.
    pub changes: BTreeMap<(NamespaceId, Actor, u64), Change>,
    /// Up to where the change logs are gone.
    pub trimmed: BTreeMap<NamespaceId, VersionVector>,
    /// The ledger.
    pub ledger: BTreeMap<(NamespaceId, LedgerId), LedgerEntry>,
    /// How this region pulls from others.
    pub links: BTreeMap<RegionId, LinkSetting>,
    /// What is known of the regions.
    pub members: Members,
    /// What was kept when the shard started over.
    pub review: BTreeMap<(NamespaceId, Bytes, Dot), Sibling>,
    /// Remembered requests.
    pub requests: BTreeMap<RequestId, Remembered>,
}

impl MemoryState {
    /// The changes that `frontier` does not cover, in an order that respects causality, as far as
    /// the log has all that comes before them.
    pub fn changes_above(&self, namespace: NamespaceId, frontier: &VersionVector) -> Vec<Change> {
        let mut waiting: Vec<&Change> = self
            .changes
            .range((namespace, MIN_ACTOR, 0)..)
            .take_while(|((held, _, _), _)| *held == namespace)
            .map(|(_, change)| change)
            .filter(|change| !frontier.covers(change.last()))
            .collect();
        let mut sent = frontier.clone();
        let mut ordered = Vec::new();
        let mut progress = true;
        while progress {
            progress = false;
            let mut done = BTreeSet::new();
            for (place, change) in waiting.iter().enumerate() {
                let next = change.first_seq == sent.get(change.actor) + 1;
                if next && sent.covers_all(&change.depends_on) {
                    sent.add(change.last());
                    ordered.push((*change).clone());
                    done.insert(place);
                    progress = true;
                }
            }
            let mut place = 0;
            waiting.retain(|_| {
                place += 1;
                !done.contains(&(place - 1))
            });
        }
        ordered
    }
}

impl MemoryState {
    /// The keys and records of a namespace, in order of the keys.
    pub fn held(&self, namespace: NamespaceId) -> impl Iterator<Item = (&Bytes, &Record)> {
        let all = self.records.range((namespace, Bytes::new())..);
        all.take_while(move |((held, _), _)| *held == namespace)
            .map(|((_, key), record)| (key, record))
    }

    /// The Merkle tree, computed from all records.
    pub fn tree(&self, namespace: NamespaceId) -> Tree {
        let mut tree = Tree::default();
        for (key, record) in self.held(namespace) {
            tree.toggle(leaf_of(key), digest(key, record));
        }
        tree
    }

    /// The latest time of all that is held.
    pub fn latest_time(&self) -> HybridTime {
        let records = self.records.values().map(Record::latest_time);
        let noted = self.ledger.values().map(|entry| entry.noted);
        records.chain(noted).max().unwrap_or(HybridTime::ZERO)
    }

    fn leaf(&self, namespace: NamespaceId, leaf: u16) -> Vec<(Bytes, Record)> {
        let live = self.held(namespace).filter(|(_, record)| !record.is_dead());
        let inside = live.filter(|(key, _)| leaf_of(key) == leaf);
        inside.map(|(key, record)| (key.clone(), record.clone())).collect()
    }
}

/// A repair of one region from another, as of one moment of each.
#[derive(Clone, Debug)]
pub struct MemoryRepair {
    /// Where.
    pub namespace: NamespaceId,
    /// Its rule.
    pub rule: Rule,
    /// The region that is repaired.
    pub local: Actor,
    /// The region that it is repaired from.
    pub source: Actor,
}

impl MemoryRepair {
    /// The commands that repair `receiver`, in order: merges of at most `page` records, and at the
    /// end the advance. What a source would send is computed as a source does.
    pub fn commands(
        &self,
        receiver: &MemoryState,
        source: &MemoryState,
        page: usize,
    ) -> Vec<Command> {
        let Self { namespace, rule, local, source: from } = *self;
        let (known, cut) = (receiver.frontier(namespace), source.frontier(namespace));
        let ahead = source.ahead(namespace);
        let (mine, theirs) = (receiver.tree(namespace), source.tree(namespace));
        let nodes = repair::differing_nodes(&mine.nodes(), &theirs.nodes());
        let leaves = nodes.iter().flat_map(|&high| {
            let block = theirs.block(high).copied().unwrap_or([0; FAN_OUT]);
            repair::differing_leaves(&mine, high, &block)
        });
        let untold = source.held(namespace).filter(|(_, record)| {
            let is_dead = record.is_dead() && repair::lacks_tombstone(&known, record);
            is_dead || repair::is_ahead(&cut, record)
        });
        let mut offers: Vec<Offer> =
            untold.map(|(key, record)| Offer::new(key.clone(), record, &known)).collect();
        for leaf in leaves {
            let listed: Vec<(Bytes, u64)> = receiver
                .leaf(namespace, leaf)
                .iter()
                .map(|(key, record)| (key.clone(), digest(key, record)))
                .collect();
            let digests = listed.iter().map(|(_, digest)| *digest).collect();
            let answer = repair::answer_leaf(&source.leaf(namespace, leaf), digests, &known);
            let offered: Vec<Bytes> = answer.offers.iter().map(|it| it.key.clone()).collect();
            offers.extend(repair::absent_offers(&listed, &offered, &answer.unknown));
            offers.extend(answer.offers);
        }
        let ledger = source
            .ledger
            .iter()
            .filter(|((held, _), entry)| *held == namespace && repair::lacks_entry(&known, entry))
            .map(|(_, entry)| entry.clone());
        let time = receiver.latest_time().max(source.latest_time());
        let merge = |offers: Vec<Offer>, ledger: Vec<LedgerEntry>| {
            let (cut, ahead, trust) = (cut.clone(), ahead.clone(), Trust::Coverage);
            let source = from;
            Command::Merge(Merge {
                namespace,
                rule,
                local,
                source,
                time,
                cut,
                ahead,
                trust,
                offers,
                ledger,
            })
        };
        let mut commands = vec![merge(Vec::new(), ledger.collect())];
        commands.extend(offers.chunks(page.max(1)).map(|page| merge(page.to_vec(), Vec::new())));
        let (since, cut, ahead) = (known, cut.clone(), ahead.clone());
        let advance = Advance { namespace, local, source: from, since, cut, ahead };
        commands.push(Command::Advance(advance));
        commands
    }
}

const MIN_ACTOR: Actor = Actor { region: RegionId(0), incarnation: 0 };

impl ShardState for MemoryState {
    type Error = Infallible;

    fn record(&self, namespace: NamespaceId, key: &[u8]) -> Result<Option<Record>, Infallible> {
        Ok(self.records.get(&(namespace, Bytes::copy_from_slice(key))).cloned())
    }

    fn elements(
        &self,
        namespace: NamespaceId,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Bytes, Record)>, Infallible> {
        let all = self.records.range((namespace, Bytes::copy_from_slice(from))..);
        let within = all
            .take_while(|((held, key), _)| *held == namespace && to.is_none_or(|to| key[..] < *to));
        let live = within.filter(|(_, record)| !record.is_dead());
        Ok(live.take(limit).map(|((_, key), record)| (key.clone(), record.clone())).collect())
    }

    fn put_record(&mut self, namespace: NamespaceId, key: &Bytes, record: Record) {
        self.records.insert((namespace, key.clone()), record);
    }

    fn remove_record(&mut self, namespace: NamespaceId, key: &Bytes) {
        self.records.remove(&(namespace, key.clone()));
    }

    fn frontier(&self, namespace: NamespaceId) -> VersionVector {
        self.frontiers.get(&namespace).cloned().unwrap_or_default()
    }

    fn set_frontier(&mut self, namespace: NamespaceId, frontier: VersionVector) {
        self.frontiers.insert(namespace, frontier);
    }

    fn ahead(&self, namespace: NamespaceId) -> VersionVector {
        self.ahead.get(&namespace).cloned().unwrap_or_default()
    }

    fn set_ahead(&mut self, namespace: NamespaceId, ahead: VersionVector) {
        self.ahead.insert(namespace, ahead);
    }

    fn logged(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        first_seq: u64,
    ) -> Result<Option<Bytes>, Infallible> {
        Ok(self.changes.get(&(namespace, actor, first_seq)).map(Change::to_bytes))
    }

    fn set_link(&mut self, peer: RegionId, setting: LinkSetting) {
        self.links.insert(peer, setting);
    }

    fn members(&self) -> Members {
        self.members.clone()
    }

    fn set_members(&mut self, members: Members) {
        self.members = members;
    }

    fn start_over(&mut self, region: RegionId, known: &BTreeMap<NamespaceId, VersionVector>) {
        let mut fresh = Self {
            links: std::mem::take(&mut self.links),
            members: std::mem::take(&mut self.members),
            review: std::mem::take(&mut self.review),
            ..Self::default()
        };
        for ((namespace, key), record) in &self.records {
            let known = known.get(namespace);
            for kept in record.siblings().iter().filter(|held| to_review(held, region, known)) {
                fresh.review.insert((*namespace, key.clone(), kept.dot), kept.clone());
            }
        }
        *self = fresh;
    }

    fn forget_reviewed(&mut self, namespace: NamespaceId, key: &Bytes, dot: Dot) {
        self.review.remove(&(namespace, key.clone(), dot));
    }

    fn append_change(&mut self, namespace: NamespaceId, change: &Change) {
        self.changes.insert((namespace, change.actor, change.first_seq), change.clone());
    }

    fn trim_changes(&mut self, namespace: NamespaceId, upto: &VersionVector) {
        let mut trimmed = self.trimmed.get(&namespace).cloned().unwrap_or_default();
        for (actor, seq) in upto.iter() {
            let at =
                self.changes.range((namespace, actor, 0)..=(namespace, actor, seq)).next_back();
            // Changes go whole.
            let whole = match at {
                Some((_, change)) if seq < change.last().seq => change.first_seq - 1,
                Some(_) | None => seq,
            };
            trimmed.advance(actor, whole);
        }
        if trimmed.is_empty() {
            return;
        }
        let is_gone = |change: &Change| trimmed.covers(change.last());
        self.changes.retain(|(held, ..), change| *held != namespace || !is_gone(change));
        self.trimmed.insert(namespace, trimmed);
    }

    fn add_to_ledger(&mut self, namespace: NamespaceId, entry: LedgerEntry) {
        self.ledger.entry((namespace, entry.id(namespace))).or_insert(entry);
    }

    fn forget_conflict(&mut self, namespace: NamespaceId, noted: Noted) {
        let held = self.ledger.get(&(namespace, noted.id));
        if held.is_some_and(|entry| entry.noted == noted.at) {
            self.ledger.remove(&(namespace, noted.id));
        }
    }

    fn remembered(&self, request: RequestId) -> Result<Option<Remembered>, Infallible> {
        Ok(self.requests.get(&request).cloned())
    }

    fn remember(&mut self, request: RequestId, remembered: &Remembered) {
        self.requests.insert(request, remembered.clone());
    }

    fn forget(&mut self, request: RequestId) {
        self.requests.remove(&request);
    }
}
