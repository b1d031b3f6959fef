//! Executes log entries: one write batch per run, with the applied position in it.
//!
//! Commands of a run see each other's effects through an overlay; the batch gets the final
//! record of each key once. The caches that readers use move only after the batch is written.
//!
//! Invariants:
//! * An entry at or below the applied position is skipped: replaying is harmless.
//! * A run is applied whole or not at all. After an error the replica must stop.

use std::{cell::RefCell, collections::BTreeMap, ops::Bound};

use bytes::Bytes;
use rocksdb::{WriteBatch, WriteOptions};
use tombolo_core::{
    Actor, Change, Content, Dot, HybridTime, NamespaceId, Outcome, Record, RegionId, RequestId,
    ShardState, VersionVector,
    codec::Writer,
    command::{LinkSetting, Remembered},
    decode_batch, execute,
    execute::to_review,
    ledger::{LedgerEntry, Noted},
    members::Members,
    merkle,
    record::Sibling,
};

use crate::{
    Position, ShardStore, StorageError,
    changes::{HEADER_BYTES, encode_header},
    layout::{Expiring, Keys, Kind, Meta, TreeKey},
    ledger::LedgerChanges,
    shard::{
        Applying, Shard, View, encode_links, encode_members, encode_membership, encode_vector,
    },
    tree::{Gathered, LeafChanges, encode_block, encode_changes},
};

/// A committed log entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplyEntry {
    /// Where it stands in the log.
    pub position: Position,
    /// What it says.
    pub payload: ApplyPayload,
}

/// What a log entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApplyPayload {
    /// Nothing; a new leader writes one.
    Blank,
    /// A membership, in the consensus layer's own encoding.
    Membership(Bytes),
    /// Commands, as `core::encode_batch` packs them.
    Commands(Bytes),
}

/// Off only to measure what the tree and its index cost: `scripts/tree-cost`.
const KEEPS_TREE: bool = cfg!(not(feature = "without-tree"));
/// Format of a value that is kept for review: version, then the sibling.
pub(crate) const REVIEW_VERSION: u8 = 1;

impl ShardStore {
    /// Executes a run of entries. Answers, for each entry, the outcome of each command; skipped
    /// entries and entries without commands have none.
    ///
    /// # Errors
    /// [`StorageError::OutOfOrder`] if an entry is missing, and [`StorageError::Apply`], which
    /// names shard and index, if an entry cannot be decoded or executed. Nothing of the run is
    /// applied then, and the replica must stop.
    pub fn apply(&self, run: &[ApplyEntry]) -> Result<Vec<Vec<Outcome>>, StorageError> {
        let mut applying = self.inner.applying.lock();
        self.apply_with(run, &mut applying, &self.inner.engine.write_options)
    }

    /// As [`apply`](Self::apply), but answers `None`, with nothing applied, where that would have
    /// to wait: while flushes or compactions are behind, or a snapshot is being installed.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn try_apply(&self, run: &[ApplyEntry]) -> Result<Option<Vec<Vec<Outcome>>>, StorageError> {
        let Some(mut applying) = self.inner.applying.try_lock() else { return Ok(None) };
        match self.apply_with(run, &mut applying, &self.inner.engine.no_wait_options) {
            Ok(outcomes) => Ok(Some(outcomes)),
            Err(StorageError::WouldWait) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn apply_with(
        &self,
        run: &[ApplyEntry],
        applying: &mut Applying,
        options: &WriteOptions,
    ) -> Result<Vec<Vec<Outcome>>, StorageError> {
        let shard = &*self.inner;
        if applying.marks_max < applying.marks.len() {
            (applying.marks, applying.marks_max) = shard.load_marks()?;
        }
        let applied = shard.view.read().applied;
        let done = Run::new(shard, applying, applied, run).and_then(|run| run.execute(options));
        if done.is_err() {
            // May count what was not written; read again if anyone goes on.
            applying.log_ends.clear();
        }
        done
    }
}

/// Where the store holds a record, and what it indexes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stored {
    Nowhere,
    /// Among the records, with this digest, these values that expire, and, if it has several siblings,
    /// the time of the latest.
    Live(u64, Vec<Expiring>, Option<HybridTime>),
    /// Among the tombstones.
    Dead,
}

impl Stored {
    fn of(key: &[u8], record: Option<&Record>) -> Self {
        match record {
            None => Self::Nowhere,
            Some(record) if record.is_dead() => Self::Dead,
            Some(record) => {
                let digest = if KEEPS_TREE { merkle::digest(key, record) } else { 0 };
                Self::Live(digest, expiring(record), open_since(record))
            }
        }
    }

    const fn digest(&self) -> u64 {
        match self {
            Self::Live(digest, ..) => *digest,
            Self::Nowhere | Self::Dead => 0,
        }
    }

    fn expiring(&self) -> &[Expiring] {
        match self {
            Self::Live(_, expiring, _) => expiring,
            Self::Nowhere | Self::Dead => &[],
        }
    }

    const fn open_since(&self) -> Option<HybridTime> {
        match self {
            Self::Live(_, _, since) => *since,
            Self::Nowhere | Self::Dead => None,
        }
    }

    const fn is_live(&self) -> bool {
        matches!(self, Self::Live(..))
    }
}

/// The values of a record that expire.
fn expiring(record: &Record) -> Vec<Expiring> {
    let value = |held: &Sibling| match held.content {
        Content::Value { expire: Some(at), .. } => Some(Expiring { at, dot: held.dot }),
        Content::Value { expire: None, .. }
        | Content::Tombstone
        | Content::Count { .. }
        | Content::Reset { .. } => None,
    };
    record.siblings().iter().filter_map(value).collect()
}

/// Since when a record waits for somebody to settle it: the time of the latest of several siblings, unless
/// they say the same, as elements of sets do. Every region says the same of the same record.
fn open_since(record: &Record) -> Option<HybridTime> {
    let siblings = record.siblings();
    let differ = siblings.windows(2).any(|pair| pair[0].content != pair[1].content);
    (differ && !record.is_dead()).then(|| record.latest_time())
}

/// A record that the run changes.
struct Touched {
    /// Where the store has it.
    was: Stored,
    /// What it is now; `None` if it was removed.
    now: Option<Record>,
}

/// A change that a run appended to a change log.
struct Appended {
    first_seq: u64,
    last_seq: u64,
    encoded: Bytes,
}

/// What writing the records of a run amounts to.
#[derive(Default)]
struct Written {
    /// Tombstones that came and went.
    tombstones: BTreeMap<NamespaceId, (u64, u64)>,
    /// Leaves of the trees that changed.
    leaves: BTreeMap<NamespaceId, LeafChanges>,
}

/// A run while it is executed.
struct Run<'a> {
    shard: &'a Shard,
    applying: &'a mut Applying,
    entries: &'a [ApplyEntry],
    applied: Option<Position>,
    batch: WriteBatch,
    keys: Keys,
    read_keys: RefCell<Keys>,
    value: Vec<u8>,
    records: BTreeMap<NamespaceId, BTreeMap<Bytes, Touched>>,
    /// What the last record read from the store was: the one that is written next, mostly.
    last_read: RefCell<Option<(NamespaceId, Bytes, Stored)>>,
    frontiers: BTreeMap<NamespaceId, VersionVector>,
    trimmed: BTreeMap<NamespaceId, VersionVector>,
    ahead: BTreeMap<NamespaceId, VersionVector>,
    links: Option<BTreeMap<RegionId, LinkSetting>>,
    members: Option<Members>,
    /// The run dropped all data: what the store still has does not count.
    started_over: bool,
    /// Results that were remembered (`None`: forgotten) in this run.
    requests: BTreeMap<RequestId, Option<Bytes>>,
    /// Entries of the ledger that came or went in this run.
    ledger: LedgerChanges,
    /// The changes that were appended in this run.
    appended: BTreeMap<(NamespaceId, Actor), Vec<Appended>>,
    membership: Option<(Position, Bytes)>,
    /// The first error of a call that cannot answer one.
    failure: Option<StorageError>,
}

impl<'a> Run<'a> {
    fn new(
        shard: &'a Shard,
        applying: &'a mut Applying,
        applied: Option<Position>,
        run: &'a [ApplyEntry],
    ) -> Result<Self, StorageError> {
        let is_new = |entry: &ApplyEntry| applied.is_none_or(|at| at.index < entry.position.index);
        let skipped = run.iter().take_while(|entry| !is_new(entry)).count();
        let entries = &run[skipped..];
        let mut last = applied.map(|applied| applied.index);
        let mut bytes = 128;
        for entry in entries {
            let actual = entry.position.index;
            if let Some(last) = last
                && actual != last + 1
            {
                return Err(StorageError::OutOfOrder {
                    shard: shard.id,
                    expected: last + 1,
                    actual,
                });
            }
            last = Some(actual);
            if let ApplyPayload::Commands(commands) = &entry.payload {
                // The value goes into the record and into the change.
                bytes += commands.len() * 2 + 256;
            }
        }
        Ok(Self {
            shard,
            applying,
            entries: run,
            applied,
            batch: WriteBatch::with_capacity_bytes(bytes),
            keys: Keys::new(shard.id),
            read_keys: RefCell::new(Keys::new(shard.id)),
            value: Vec::new(),
            records: BTreeMap::new(),
            last_read: RefCell::new(None),
            frontiers: BTreeMap::new(),
            trimmed: BTreeMap::new(),
            ahead: BTreeMap::new(),
            links: None,
            members: None,
            started_over: false,
            requests: BTreeMap::new(),
            ledger: LedgerChanges::default(),
            appended: BTreeMap::new(),
            membership: None,
            failure: None,
        })
    }

    fn execute(mut self, options: &WriteOptions) -> Result<Vec<Vec<Outcome>>, StorageError> {
        let mut outcomes = Vec::with_capacity(self.entries.len());
        let mut last = None;
        let mut count = 0;
        for entry in self.entries {
            if self.applied.is_some_and(|applied| entry.position.index <= applied.index) {
                outcomes.push(Vec::new());
                continue;
            }
            let (shard, index) = (self.shard.id, entry.position.index);
            let done = self.execute_entry(entry);
            outcomes.push(done.map_err(|source| StorageError::Apply {
                shard,
                index,
                source: Box::new(source),
            })?);
            last = Some(entry.position);
            count += 1;
        }
        if let Some(last) = last {
            self.write(last, count, options)?;
        }
        Ok(outcomes)
    }

    fn execute_entry(&mut self, entry: &ApplyEntry) -> Result<Vec<Outcome>, StorageError> {
        match &entry.payload {
            ApplyPayload::Blank => Ok(Vec::new()),
            ApplyPayload::Membership(membership) => {
                self.membership = Some((entry.position, membership.clone()));
                Ok(Vec::new())
            }
            ApplyPayload::Commands(commands) => {
                let commands = decode_batch(commands.clone())?;
                let mut outcomes = Vec::with_capacity(commands.len());
                for command in &commands {
                    outcomes.push(execute(self, command)?);
                    if let Some(failure) = self.failure.take() {
                        return Err(failure);
                    }
                }
                Ok(outcomes)
            }
        }
    }

    /// Writes the batch, then lets readers know.
    fn write(
        mut self,
        last: Position,
        entries: u64,
        options: &WriteOptions,
    ) -> Result<(), StorageError> {
        let Written { tombstones, leaves } = self.write_records();
        self.write_trees(&leaves, last.index);
        // In key order, each kind for itself: neighbours in the memtable are found fast.
        for (&request, stored) in &self.requests {
            match stored {
                Some(stored) => self.batch.put(self.keys.dedup(request), stored),
                None => self.batch.delete(self.keys.dedup(request)),
            }
        }
        self.ledger.write(&mut self.keys, &mut self.batch);
        for (&namespace, frontier) in &self.frontiers {
            let key = self.keys.meta(Meta::Frontier(namespace));
            self.batch.put(key, encode_vector(frontier));
        }
        for (&namespace, trimmed) in &self.trimmed {
            let key = self.keys.meta(Meta::Trimmed(namespace));
            self.batch.put(key, encode_vector(trimmed));
        }
        for (&namespace, ahead) in &self.ahead {
            let key = self.keys.meta(Meta::Ahead(namespace));
            self.batch.put(key, encode_vector(ahead));
        }
        if let Some(links) = &self.links {
            self.batch.put(self.keys.meta(Meta::Links), encode_links(links));
        }
        if let Some(members) = &self.members {
            self.batch.put(self.keys.meta(Meta::Members), encode_members(members));
        }
        if let Some((position, membership)) = &self.membership {
            let value = encode_membership(*position, membership);
            self.batch.put(self.keys.meta(Meta::Membership), value);
        }
        self.batch.put(self.keys.meta(Meta::Applied), last.to_bytes());

        let (shard, bytes) = (self.shard, self.batch.size_in_bytes() as u64);
        let written = shard.engine.db.write_opt(self.batch, options);
        written.map_err(|error| shard.engine_error(&error))?;
        shard.engine.counters.add_run(entries, bytes);

        let moved = !self.frontiers.is_empty() || self.started_over;
        let learnt = self.members.clone();
        {
            let mut view = shard.view.write();
            if self.started_over {
                view.forget_data();
                self.applying.gathered.clear();
                self.applying.log_ends.clear();
            }
            view.applied = Some(last);
            if self.membership.is_some() {
                view.membership = self.membership;
            }
            for (namespace, (added, removed)) in tombstones {
                let count = view.tombstones.remove(&namespace).unwrap_or_default();
                let count = (count + added).saturating_sub(removed);
                if count > 0 {
                    view.tombstones.insert(namespace, count);
                }
            }
            self.ledger.count(&mut view.ledgers);
            for (&namespace, changes) in &leaves {
                let tree = view.trees.entry(namespace).or_default();
                changes.iter().for_each(|&(leaf, change)| tree.toggle(leaf, change));
                let gathered = self.applying.gathered.entry(namespace).or_default();
                if gathered.is_much_with(changes) {
                    *gathered = Gathered::default();
                } else {
                    gathered.add(changes);
                }
            }
            view.frontiers.extend(self.frontiers);
            view.trimmed.extend(self.trimmed);
            view.ahead.extend(self.ahead);
            if let Some(links) = self.links {
                view.links = links;
            }
            if let Some(members) = self.members {
                view.members = members;
            }
        }
        if self.started_over {
            (self.applying.marks, self.applying.marks_max) = shard.load_marks()?;
        }
        if let Some(members) = learnt {
            shard.members.send_replace(members);
        }
        shard.applied.send_replace(last.index);
        if moved {
            shard.frontiers_moved.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// Puts each record where it belongs.
    fn write_records(&mut self) -> Written {
        let mut written = Written::default();
        for (&namespace, records) in &self.records {
            let (mut added, mut removed) = (0, 0);
            let mut leaves = LeafChanges::new();
            for (key, Touched { was, now }) in records {
                let is = Stored::of(key, now.as_ref());
                match now {
                    Some(record) if is.is_live() => {
                        self.batch.put(self.keys.record(namespace, key), record.to_bytes());
                    }
                    _ if was.is_live() => {
                        self.batch.delete(self.keys.record(namespace, key));
                    }
                    _ => {}
                }
                let change = was.digest() ^ is.digest();
                if change != 0 {
                    leaves.push((merkle::leaf_of(key), change));
                }
                match (was.is_live(), is.is_live()) {
                    (false, true) if KEEPS_TREE => {
                        self.batch.put(self.keys.hash(namespace, key), b"");
                    }
                    (true, false) => self.batch.delete(self.keys.hash(namespace, key)),
                    (true | false, _) => {}
                }
                for value in was.expiring().iter().filter(|it| !is.expiring().contains(it)) {
                    self.batch.delete(self.keys.expiry(namespace, key, *value));
                }
                for value in is.expiring().iter().filter(|it| !was.expiring().contains(it)) {
                    self.batch.put(self.keys.expiry(namespace, key, *value), b"");
                }
            }
            if !leaves.is_empty() {
                written.leaves.insert(namespace, leaves);
            }
            for (key, Touched { was, now }) in records {
                let (was, is) = (was.open_since(), now.as_ref().and_then(open_since));
                if was == is {
                    continue;
                }
                if let Some(since) = was {
                    self.batch.delete(self.keys.open(namespace, since, key));
                }
                if let Some(since) = is {
                    self.batch.put(self.keys.open(namespace, since, key), b"");
                }
            }
            // Another part of the key space: for itself, in order.
            for (key, Touched { was, now }) in records {
                let dead = now.as_ref().filter(|record| record.is_dead());
                if let Some(record) = dead {
                    self.batch.put(self.keys.tombstone(namespace, key), record.to_bytes());
                }
                match (*was == Stored::Dead, dead.is_some()) {
                    (true, false) => {
                        self.batch.delete(self.keys.tombstone(namespace, key));
                        removed += 1;
                    }
                    (false, true) => added += 1,
                    (true, true) | (false, false) => {}
                }
            }
            if added + removed > 0 {
                written.tombstones.insert(namespace, (added, removed));
            }
        }
        written
    }

    /// Writes the leaves that changed, or, when much has gathered, the blocks that they are in.
    fn write_trees(&mut self, leaves: &BTreeMap<NamespaceId, LeafChanges>, index: u64) {
        for (&namespace, changes) in leaves {
            let gathered = match self.applying.gathered.get(&namespace) {
                Some(gathered) if !self.started_over => gathered.clone(),
                Some(_) | None => Gathered::default(),
            };
            if !gathered.is_much_with(changes) {
                let key = self.keys.tree(TreeKey::Changes(namespace, index));
                self.batch.put(key, encode_changes(changes));
                continue;
            }
            let mut gathered = gathered;
            gathered.add(changes);
            let mut tree = self.held(|view| view.trees.get(&namespace).cloned());
            changes.iter().for_each(|&(leaf, change)| tree.toggle(leaf, change));
            for &high in &gathered.blocks {
                let key = self.keys.tree(TreeKey::Block(namespace, high));
                match tree.block(high) {
                    Some(block) => self.batch.put(key, encode_block(block)),
                    None => self.batch.delete(key),
                }
            }
            let from = self.keys.tree(TreeKey::Changes(namespace, 0)).to_vec();
            self.batch.delete_range(&from[..], self.keys.tree(TreeKey::Changes(namespace, index)));
        }
    }

    /// Where the store has a record that this run has not touched yet.
    fn stored(&self, namespace: NamespaceId, key: &[u8]) -> Result<Stored, StorageError> {
        if let Some((read_namespace, read_key, stored)) = &*self.last_read.borrow()
            && *read_namespace == namespace
            && read_key == key
        {
            return Ok(stored.clone());
        }
        Ok(Stored::of(key, self.record(namespace, key)?.as_ref()))
    }

    fn touch(&mut self, namespace: NamespaceId, key: &Bytes, now: Option<Record>) {
        if let Some(touched) =
            self.records.get_mut(&namespace).and_then(|records| records.get_mut(key))
        {
            touched.now = now;
            return;
        }
        match self.stored(namespace, key) {
            Ok(was) => {
                let records = self.records.entry(namespace).or_default();
                records.insert(key.clone(), Touched { was, now });
            }
            Err(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }

    fn try_append(&mut self, namespace: NamespaceId, change: &Change) -> Result<(), StorageError> {
        let log = (namespace, change.actor);
        let end = match self.applying.log_ends.get(&log) {
            Some(&end) => end,
            None if self.started_over => 0,
            None => self.shard.log_end(namespace, change.actor)?,
        };
        let encoded = change.to_bytes();
        let end = end + (HEADER_BYTES + encoded.len()) as u64;
        self.applying.log_ends.insert(log, end);
        self.value.clear();
        self.value.extend_from_slice(&encode_header(end));
        self.value.extend_from_slice(&encoded);
        self.batch.put(self.keys.change(namespace, change.actor, change.first_seq), &self.value);
        let (first_seq, last_seq) = (change.first_seq, change.last().seq);
        self.appended.entry(log).or_default().push(Appended { first_seq, last_seq, encoded });
        Ok(())
    }

    fn try_trim(
        &mut self,
        namespace: NamespaceId,
        upto: &VersionVector,
    ) -> Result<(), StorageError> {
        let mut trimmed = match self.trimmed.get(&namespace) {
            Some(trimmed) => trimmed.clone(),
            None => self.held(|view| view.trimmed.get(&namespace).cloned()),
        };
        let mut moved = false;
        for (actor, seq) in upto.iter() {
            let from = trimmed.get(actor);
            let upto = self.last_whole(namespace, actor, seq)?;
            if from < upto {
                let start = self.keys.change(namespace, actor, from + 1).to_vec();
                self.batch.delete_range(&start[..], self.keys.change(namespace, actor, upto + 1));
                trimmed.advance(actor, upto);
                moved = true;
            }
        }
        if moved {
            self.trimmed.insert(namespace, trimmed);
        }
        Ok(())
    }

    /// What the store's view says, unless this run dropped it.
    fn held<T: Default>(&self, look: impl FnOnce(&View) -> Option<T>) -> T {
        if self.started_over {
            return T::default();
        }
        look(&self.shard.view.read()).unwrap_or_default()
    }

    /// Keeps for review what must be, then drops all data: ranges, so that it costs the same however
    /// much there is.
    fn try_start_over(
        &mut self,
        region: RegionId,
        known: &BTreeMap<NamespaceId, VersionVector>,
    ) -> Result<(), StorageError> {
        let mut review: Vec<(NamespaceId, Bytes, Sibling)> = Vec::new();
        let mut keep = |namespace: NamespaceId, key: &[u8], record: &Record| {
            let known = known.get(&namespace);
            for held in record.siblings().iter().filter(|held| to_review(held, region, known)) {
                review.push((namespace, Bytes::copy_from_slice(key), held.clone()));
            }
        };
        if !self.started_over {
            let is_touched = |namespace: NamespaceId, key: &[u8]| {
                self.records.get(&namespace).is_some_and(|records| records.contains_key(key))
            };
            self.shard.each_record(|namespace, key, record| {
                if !is_touched(namespace, key) {
                    keep(namespace, key, record);
                }
            })?;
        }
        for (&namespace, records) in &self.records {
            for (key, touched) in records {
                touched.now.iter().for_each(|record| keep(namespace, key, record));
            }
        }
        let data = self.keys.kind_start(Kind::Record).to_vec();
        self.batch.delete_range(&data[..], self.keys.kind_end(Kind::Expiry));
        let noted = self.keys.kind_start(Kind::Noted).to_vec();
        self.batch.delete_range(&noted[..], self.keys.kind_end(Kind::Open));
        let vectors = self.keys.vectors_start().to_vec();
        self.batch.delete_range(&vectors[..], self.keys.vectors_end());
        for (namespace, key, held) in review {
            let mut writer = Writer::with_capacity(64);
            writer.u8(REVIEW_VERSION);
            held.encode(&mut writer);
            let key = self.keys.review(namespace, &key, held.dot);
            self.batch.put(key, writer.finish());
        }
        self.started_over = true;
        self.applying.log_ends.clear();
        self.records.clear();
        self.frontiers.clear();
        self.trimmed.clear();
        self.ahead.clear();
        self.requests.clear();
        self.ledger = LedgerChanges::default();
        self.appended.clear();
        self.last_read.replace(None);
        Ok(())
    }

    /// The last sequence number up to `seq` at which a change ends: changes go whole.
    fn last_whole(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        seq: u64,
    ) -> Result<u64, StorageError> {
        let appended = self.appended.get(&(namespace, actor));
        let holding = appended
            .and_then(|all| all.iter().find(|it| (it.first_seq..=it.last_seq).contains(&seq)));
        if let Some(&Appended { first_seq, last_seq, .. }) = holding {
            return Ok(if last_seq == seq { seq } else { first_seq - 1 });
        }
        if self.started_over {
            return Ok(seq);
        }
        match self.shard.change_at_or_before(namespace, actor, seq)? {
            Some((first, last)) if seq < last => Ok(first - 1),
            Some(_) | None => Ok(seq),
        }
    }
}

impl ShardState for Run<'_> {
    type Error = StorageError;

    fn record(&self, namespace: NamespaceId, key: &[u8]) -> Result<Option<Record>, StorageError> {
        if let Some(held) = self.records.get(&namespace).and_then(|records| records.get(key)) {
            return Ok(held.now.clone());
        }
        if self.started_over {
            return Ok(None);
        }
        let record = self.shard.read_record(&mut self.read_keys.borrow_mut(), namespace, key)?;
        let stored = Stored::of(key, record.as_ref());
        self.last_read.replace(Some((namespace, Bytes::copy_from_slice(key), stored)));
        Ok(record)
    }

    fn elements(
        &self,
        namespace: NamespaceId,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Bytes, Record)>, StorageError> {
        let is_within = |key: &Bytes| to.is_none_or(|to| key[..] < *to);
        let touched = self.records.get(&namespace).into_iter().flat_map(|records| {
            let from_here = records.range::<[u8], _>((Bound::Included(from), Bound::Unbounded));
            from_here.take_while(|(key, _)| is_within(key))
        });
        let touched: BTreeMap<&Bytes, &Touched> = touched.collect();
        let mut found = Vec::new();
        if !self.started_over {
            // As many of them may be gone as this run has touched.
            let limit = limit.saturating_add(touched.len());
            self.shard.each_in(namespace, from, to, limit, |key, record| {
                let key = Bytes::copy_from_slice(key);
                if !touched.contains_key(&key) {
                    found.push((key, record));
                }
            })?;
        }
        for (key, touched) in touched {
            if let Some(record) = touched.now.as_ref().filter(|record| !record.is_dead()) {
                found.push((key.clone(), record.clone()));
            }
        }
        found.sort_by(|left, right| left.0.cmp(&right.0));
        found.truncate(limit);
        Ok(found)
    }

    fn put_record(&mut self, namespace: NamespaceId, key: &Bytes, record: Record) {
        self.touch(namespace, key, Some(record));
    }

    fn remove_record(&mut self, namespace: NamespaceId, key: &Bytes) {
        self.touch(namespace, key, None);
    }

    fn frontier(&self, namespace: NamespaceId) -> VersionVector {
        match self.frontiers.get(&namespace) {
            Some(frontier) => frontier.clone(),
            None => self.held(|view| view.frontiers.get(&namespace).cloned()),
        }
    }

    fn set_frontier(&mut self, namespace: NamespaceId, frontier: VersionVector) {
        self.frontiers.insert(namespace, frontier);
    }

    fn ahead(&self, namespace: NamespaceId) -> VersionVector {
        match self.ahead.get(&namespace) {
            Some(ahead) => ahead.clone(),
            None => self.held(|view| view.ahead.get(&namespace).cloned()),
        }
    }

    fn set_ahead(&mut self, namespace: NamespaceId, ahead: VersionVector) {
        self.ahead.insert(namespace, ahead);
    }

    fn set_link(&mut self, peer: RegionId, setting: LinkSetting) {
        let links = self.links.get_or_insert_with(|| self.shard.view.read().links.clone());
        links.insert(peer, setting);
    }

    fn members(&self) -> Members {
        self.members.clone().unwrap_or_else(|| self.shard.view.read().members.clone())
    }

    fn set_members(&mut self, members: Members) {
        self.members = Some(members);
    }

    fn start_over(&mut self, region: RegionId, known: &BTreeMap<NamespaceId, VersionVector>) {
        if let Err(error) = self.try_start_over(region, known) {
            self.failure.get_or_insert(error);
        }
    }

    fn forget_reviewed(&mut self, namespace: NamespaceId, key: &Bytes, dot: Dot) {
        self.batch.delete(self.keys.review(namespace, key, dot));
    }

    fn logged(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        first_seq: u64,
    ) -> Result<Option<Bytes>, StorageError> {
        // Trimmed in this run or an earlier one: how entries are grouped must make no difference.
        let is_gone = |trimmed: &VersionVector| first_seq <= trimmed.get(actor);
        let gone_here = self.trimmed.get(&namespace).is_some_and(is_gone);
        let gone_before =
            || self.held(|view| Some(view.trimmed.get(&namespace).is_some_and(is_gone)));
        if gone_here || gone_before() {
            return Ok(None);
        }
        let appended = self.appended.get(&(namespace, actor));
        let here = appended.and_then(|all| all.iter().find(|it| it.first_seq == first_seq));
        match here {
            Some(appended) => Ok(Some(appended.encoded.clone())),
            None if self.started_over => Ok(None),
            None => self.shard.logged(namespace, actor, first_seq),
        }
    }

    fn append_change(&mut self, namespace: NamespaceId, change: &Change) {
        if let Err(error) = self.try_append(namespace, change) {
            self.failure.get_or_insert(error);
        }
    }

    fn trim_changes(&mut self, namespace: NamespaceId, upto: &VersionVector) {
        if let Err(error) = self.try_trim(namespace, upto) {
            self.failure.get_or_insert(error);
        }
    }

    fn add_to_ledger(&mut self, namespace: NamespaceId, entry: LedgerEntry) {
        let (shard, is_empty) = (self.shard, self.started_over);
        if let Err(error) = self.ledger.add(shard, is_empty, namespace, &entry) {
            self.failure.get_or_insert(error);
        }
    }

    fn forget_conflict(&mut self, namespace: NamespaceId, noted: Noted) {
        let (shard, is_empty) = (self.shard, self.started_over);
        if let Err(error) = self.ledger.forget(shard, is_empty, namespace, noted) {
            self.failure.get_or_insert(error);
        }
    }

    fn remembered(&self, request: RequestId) -> Result<Option<Remembered>, StorageError> {
        let stored = match self.requests.get(&request) {
            Some(None) => return Ok(None),
            Some(Some(stored)) => stored.clone(),
            None if self.started_over => return Ok(None),
            None => {
                let mark = self.applying.marks.get(&request.client);
                if mark.is_none_or(|&mark| mark < request.number) {
                    return Ok(None);
                }
                match self.shard.get(self.read_keys.borrow_mut().dedup(request))? {
                    Some(stored) => Bytes::copy_from_slice(&stored),
                    None => return Ok(None),
                }
            }
        };
        let remembered = Remembered::from_bytes(stored);
        remembered.map(Some).map_err(|error| StorageError::value(self.shard.id, "dedup", &error))
    }

    fn remember(&mut self, request: RequestId, remembered: &Remembered) {
        let stored = remembered.to_bytes();
        self.requests.insert(request, Some(stored));
        let mark = self.applying.marks.entry(request.client).or_insert(request.number);
        *mark = request.number.max(*mark);
    }

    fn forget(&mut self, request: RequestId) {
        if self.applying.marks.get(&request.client).is_none_or(|&mark| mark < request.number) {
            return;
        }
        self.requests.insert(request, None);
    }
}

#[cfg(test)]
mod tests;
