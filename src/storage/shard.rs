//! One shard's part of the store, and the facts about it that are kept in memory.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use rocksdb::{DBPinnableSlice, DBRawIterator, ReadOptions};
use tokio::sync::watch;
use tombolo_core::{
    Actor, DecodeError, NamespaceId, RegionId, RequestId, ShardId, VersionVector,
    codec::{Reader, Writer},
    command::LinkSetting,
    feed::Standing,
    members::Members,
    merkle::Tree,
};

use crate::{
    StorageError,
    engine::Engine,
    layout::{self, Keys, Kind, Meta, PREFIX_BYTES},
    ledger::LedgerSize,
    tree::Gathered,
};

/// Where a Raft log entry stands. Ordered by index first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Position {
    /// The term of the leader that wrote it.
    pub term: u64,
    /// The node that led.
    pub node: u64,
    /// Its place in the log.
    pub index: u64,
}

impl Ord for Position {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.index, self.term, self.node).cmp(&(other.index, other.term, other.node))
    }
}

impl PartialOrd for Position {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

const META_VERSION: u8 = 1;

impl Position {
    pub(crate) fn to_bytes(self) -> Bytes {
        let mut writer = Writer::with_capacity(25);
        writer.u8(META_VERSION);
        self.encode(&mut writer);
        writer.finish()
    }

    pub(crate) fn from_bytes(shard: ShardId, bytes: &[u8]) -> Result<Self, StorageError> {
        let bytes = Bytes::copy_from_slice(bytes);
        decode_whole(shard, "applied position", META_VERSION, bytes, Self::decode)
    }

    fn encode(self, writer: &mut Writer) {
        writer.fixed64(self.term);
        writer.fixed64(self.node);
        writer.fixed64(self.index);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { term: reader.fixed64()?, node: reader.fixed64()?, index: reader.fixed64()? })
    }
}

/// Reads a value that is nothing but its format version and what `decode` reads.
pub(crate) fn decode_whole<T>(
    shard: ShardId,
    what: &'static str,
    version: u8,
    bytes: Bytes,
    decode: impl FnOnce(&mut Reader) -> Result<T, DecodeError>,
) -> Result<T, StorageError> {
    let mut reader = Reader::new(what, bytes);
    let read = || {
        reader.version(version)?;
        let value = decode(&mut reader)?;
        reader.finish()?;
        Ok(value)
    };
    read().map_err(|error: DecodeError| StorageError::value(shard, what, &error))
}

/// Encodes a membership with its position.
pub(crate) fn encode_membership(position: Position, membership: &[u8]) -> Bytes {
    let mut writer = Writer::with_capacity(25 + membership.len());
    writer.u8(META_VERSION);
    position.encode(&mut writer);
    writer.raw(membership);
    writer.finish()
}

pub(crate) fn decode_membership(
    shard: ShardId,
    bytes: Bytes,
) -> Result<(Position, Bytes), StorageError> {
    let mut reader = Reader::new("membership", bytes);
    let mut read = || {
        reader.version(META_VERSION)?;
        let position = Position::decode(&mut reader)?;
        let length = reader.remaining();
        Ok((position, reader.raw(length)?))
    };
    read().map_err(|error: DecodeError| StorageError::value(shard, "membership", &error))
}

/// Encodes a vector as a meta value.
pub(crate) fn encode_vector(vector: &VersionVector) -> Bytes {
    let mut writer = Writer::with_capacity(32);
    writer.u8(META_VERSION);
    vector.encode(&mut writer);
    writer.finish()
}

pub(crate) fn encode_links(links: &BTreeMap<RegionId, LinkSetting>) -> Bytes {
    let mut writer = Writer::with_capacity(32);
    writer.u8(META_VERSION);
    writer.count(links.len());
    for (peer, setting) in links {
        writer.varint(u64::from(peer.0));
        setting.encode(&mut writer);
    }
    writer.finish()
}

pub(crate) fn decode_links(
    shard: ShardId,
    bytes: Bytes,
) -> Result<BTreeMap<RegionId, LinkSetting>, StorageError> {
    let mut reader = Reader::new("link settings", bytes);
    let mut read = || {
        reader.version(META_VERSION)?;
        let count = reader.count(3)?;
        (0..count)
            .map(|_| Ok((RegionId(reader.u16()?), LinkSetting::decode(&mut reader)?)))
            .collect::<Result<_, DecodeError>>()
    };
    read().map_err(|error| StorageError::value(shard, "link settings", &error))
}

pub(crate) fn encode_members(members: &Members) -> Bytes {
    let mut writer = Writer::with_capacity(32);
    writer.u8(META_VERSION);
    members.encode(&mut writer);
    writer.finish()
}

pub(crate) fn decode_members(shard: ShardId, bytes: Bytes) -> Result<Members, StorageError> {
    decode_whole(shard, "members", META_VERSION, bytes, Members::decode)
}

fn decode_vector(shard: ShardId, bytes: Bytes) -> Result<VersionVector, StorageError> {
    let mut reader = Reader::new("version vector", bytes);
    let read = |reader: &mut Reader| {
        reader.version(META_VERSION)?;
        VersionVector::decode(reader)
    };
    let vector = read(&mut reader).and_then(|vector| reader.finish().map(|()| vector));
    vector.map_err(|error| StorageError::value(shard, "frontier", &error))
}

/// One shard. Clones share it.
#[derive(Clone)]
pub struct ShardStore {
    pub(crate) inner: Arc<Shard>,
}

pub(crate) struct Shard {
    pub(crate) id: ShardId,
    pub(crate) engine: Arc<Engine>,
    pub(crate) view: RwLock<View>,
    /// Held while a run is applied or a snapshot installed.
    pub(crate) applying: Mutex<Applying>,
    /// Index of the last applied entry; 0 if none.
    pub(crate) applied: watch::Sender<u64>,
    /// Counts runs that moved a frontier.
    pub(crate) frontiers_moved: watch::Sender<u64>,
    /// As in the view, for those who wait for a change.
    pub(crate) members: watch::Sender<Members>,
    /// Where the search for expired requests goes on.
    pub(crate) collect_from: Mutex<RequestId>,
}

/// What readers may know: changed only after the data is visible.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub(crate) applied: Option<Position>,
    pub(crate) membership: Option<(Position, Bytes)>,
    pub(crate) frontiers: BTreeMap<NamespaceId, VersionVector>,
    pub(crate) trimmed: BTreeMap<NamespaceId, VersionVector>,
    /// Up to where records may be ahead of the frontiers.
    pub(crate) ahead: BTreeMap<NamespaceId, VersionVector>,
    /// How this region pulls from others.
    pub(crate) links: BTreeMap<RegionId, LinkSetting>,
    /// What this shard knows of the regions.
    pub(crate) members: Members,
    /// How many tombstones each namespace has, where it is not 0.
    pub(crate) tombstones: BTreeMap<NamespaceId, u64>,
    /// What the ledger of each namespace has, where it is not empty.
    pub(crate) ledgers: BTreeMap<NamespaceId, LedgerSize>,
    /// The Merkle tree over each namespace's records.
    pub(crate) trees: BTreeMap<NamespaceId, Tree>,
}

/// What only the apply path knows. Looked up by key, never iterated.
#[derive(Debug, Default)]
pub(crate) struct Applying {
    /// Per client, a number that no remembered request exceeds: a higher one is fresh, without
    /// a look at the disk.
    pub(crate) marks: HashMap<u64, u64>,
    /// When to drop marks of clients that are forgotten.
    pub(crate) marks_max: usize,
    /// Per change log, the bytes ever written to it.
    pub(crate) log_ends: HashMap<(NamespaceId, Actor), u64>,
    /// What of each tree is on disk as changes only.
    pub(crate) gathered: HashMap<NamespaceId, Gathered>,
}

const MARKS_MIN: usize = 1 << 16;

impl Shard {
    pub(crate) fn load(engine: Arc<Engine>, id: ShardId) -> Result<Self, StorageError> {
        let mut shard = Self {
            id,
            engine,
            view: RwLock::default(),
            applying: Mutex::default(),
            applied: watch::Sender::new(0),
            frontiers_moved: watch::Sender::new(0),
            members: watch::Sender::default(),
            collect_from: Mutex::new(RequestId { client: 0, number: 0 }),
        };
        let (view, applying) = shard.load_state()?;
        shard.applied.send_replace(view.applied.map_or(0, |applied| applied.index));
        shard.members.send_replace(view.members.clone());
        *shard.view.get_mut() = view;
        *shard.applying.get_mut() = applying;
        Ok(shard)
    }

    /// All that is kept in memory, as the disk has it.
    pub(crate) fn load_state(&self) -> Result<(View, Applying), StorageError> {
        let mut view = self.load_view()?;
        let (marks, marks_max) = self.load_marks()?;
        let mut applying = Applying { marks, marks_max, ..Applying::default() };
        for (namespace, (tree, gathered)) in self.load_trees()? {
            view.trees.insert(namespace, tree);
            applying.gathered.insert(namespace, gathered);
        }
        Ok((view, applying))
    }

    fn load_view(&self) -> Result<View, StorageError> {
        let mut view = View::default();
        let mut keys = Keys::new(self.id);
        let start = keys.kind_start(Kind::Meta).to_vec();
        let end = keys.kind_end(Kind::Meta).to_vec();
        let mut pairs = self.iterate(start, end, true);
        pairs.seek_to_first();
        while let Some((key, value)) = pairs.item() {
            let value = Bytes::copy_from_slice(value);
            match Meta::from_rest(&key[PREFIX_BYTES..]) {
                Some(Meta::Applied) => {
                    view.applied = Some(Position::from_bytes(self.id, &value)?);
                }
                Some(Meta::Membership) => {
                    view.membership = Some(decode_membership(self.id, value)?);
                }
                Some(Meta::Frontier(namespace)) => {
                    view.frontiers.insert(namespace, decode_vector(self.id, value)?);
                }
                Some(Meta::Trimmed(namespace)) => {
                    view.trimmed.insert(namespace, decode_vector(self.id, value)?);
                }
                Some(Meta::Ahead(namespace)) => {
                    view.ahead.insert(namespace, decode_vector(self.id, value)?);
                }
                Some(Meta::Members) => view.members = decode_members(self.id, value)?,
                Some(Meta::Links) => view.links = decode_links(self.id, value)?,
                None => return Err(StorageError::key(self.id, "meta")),
            }
            pairs.next();
        }
        self.check(&pairs)?;
        view.tombstones = self.count_tombstones()?;
        view.ledgers = self.measure_ledgers()?;
        Ok(view)
    }

    fn count_tombstones(&self) -> Result<BTreeMap<NamespaceId, u64>, StorageError> {
        let mut keys = Keys::new(self.id);
        let start = keys.kind_start(Kind::Tombstone).to_vec();
        let end = keys.kind_end(Kind::Tombstone).to_vec();
        let mut pairs = self.iterate(start, end, false);
        pairs.seek_to_first();
        let mut counts = BTreeMap::new();
        while let Some(key) = pairs.key() {
            let namespace = layout::key_namespace(key)
                .ok_or_else(|| StorageError::key(self.id, "tombstone"))?;
            *counts.entry(namespace).or_default() += 1;
            pairs.next();
        }
        self.check(&pairs)?;
        Ok(counts)
    }

    /// Reads the highest remembered number of each client: two seeks a client.
    pub(crate) fn load_marks(&self) -> Result<(HashMap<u64, u64>, usize), StorageError> {
        let mut marks = HashMap::new();
        let mut keys = Keys::new(self.id);
        let start = keys.kind_start(Kind::Dedup).to_vec();
        let end = keys.kind_end(Kind::Dedup).to_vec();
        let mut pairs = self.iterate(start, end, true);
        pairs.seek_to_first();
        while let Some(key) = pairs.key() {
            let first = self.request(key)?;
            let last = RequestId { client: first.client, number: u64::MAX };
            pairs.seek_for_prev(keys.dedup(last));
            let Some(key) = pairs.key() else { break };
            let highest = self.request(key)?;
            marks.insert(highest.client, highest.number);
            pairs.next();
        }
        self.check(&pairs)?;
        let marks_max = (marks.len() * 2).max(MARKS_MIN);
        Ok((marks, marks_max))
    }

    pub(crate) fn request(&self, key: &[u8]) -> Result<RequestId, StorageError> {
        layout::dedup_request(key).ok_or_else(|| StorageError::key(self.id, "dedup"))
    }

    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<DBPinnableSlice<'_>>, StorageError> {
        self.engine.db.get_pinned(key).map_err(|error| self.engine_error(&error))
    }

    /// Pairs from `start` to before `end`, as of now; not positioned yet.
    pub(crate) fn iterate(&self, start: Vec<u8>, end: Vec<u8>, cache: bool) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(start);
        options.set_iterate_upper_bound(end);
        options.fill_cache(cache);
        self.engine.db.raw_iterator_opt(options)
    }

    /// Whether an iterator that has no more pairs ended well.
    pub(crate) fn check(&self, pairs: &DBRawIterator<'_>) -> Result<(), StorageError> {
        pairs.status().map_err(|error| self.engine_error(&error))
    }

    pub(crate) fn engine_error(&self, error: &rocksdb::Error) -> StorageError {
        StorageError::engine(Some(self.id), error)
    }
}

impl ShardStore {
    /// Which shard this is.
    pub fn id(&self) -> ShardId {
        self.inner.id
    }

    /// Position of the last applied log entry.
    pub fn applied(&self) -> Option<Position> {
        self.inner.view.read().applied
    }

    /// The last applied membership and its position.
    pub fn membership(&self) -> Option<(Position, Bytes)> {
        self.inner.view.read().membership.clone()
    }

    /// Follows the index of the last applied entry (0 if none). Changes after the data is visible.
    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.inner.applied.subscribe()
    }

    /// Follows a count that rises whenever a frontier moved, after the data is visible.
    pub fn watch_frontiers(&self) -> watch::Receiver<u64> {
        self.inner.frontiers_moved.subscribe()
    }

    /// What is applied of a namespace.
    pub fn frontier(&self, namespace: NamespaceId) -> VersionVector {
        self.inner.view.read().frontiers.get(&namespace).cloned().unwrap_or_default()
    }

    /// What is applied of every namespace that was ever written here.
    pub fn frontiers(&self) -> BTreeMap<NamespaceId, VersionVector> {
        self.inner.view.read().frontiers.clone()
    }

    /// How this region pulls from `peer`. Only the catalog's shard knows.
    pub fn link(&self, peer: RegionId) -> LinkSetting {
        self.inner.view.read().links.get(&peer).copied().unwrap_or_default()
    }

    /// What this shard knows of the regions.
    pub fn members(&self) -> Members {
        self.inner.view.read().members.clone()
    }

    /// Follows what this shard knows of the regions. Changes after the data is visible.
    pub fn watch_members(&self) -> watch::Receiver<Members> {
        self.inner.members.subscribe()
    }

    /// What is applied of a namespace, and what this shard knows of the regions at the same moment.
    pub fn frontier_and_members(&self, namespace: NamespaceId) -> (VersionVector, Members) {
        let view = self.inner.view.read();
        (view.frontiers.get(&namespace).cloned().unwrap_or_default(), view.members.clone())
    }

    /// What is known of a namespace, all of one moment.
    pub fn standing(&self, namespace: NamespaceId) -> Standing {
        let view = self.inner.view.read();
        Standing {
            frontier: view.frontiers.get(&namespace).cloned().unwrap_or_default(),
            trimmed: view.trimmed.get(&namespace).cloned().unwrap_or_default(),
            members: view.members.clone(),
            is_exact: view.is_exact(namespace),
        }
    }

    /// Whether `seen` is what is applied of a namespace, no more and no less. Cheaper than asking for
    /// the frontier.
    pub fn is_at(&self, namespace: NamespaceId, seen: &VersionVector) -> bool {
        let view = self.inner.view.read();
        view.frontiers.get(&namespace).map_or(seen.is_empty(), |frontier| frontier == seen)
    }

    /// Up to where the change log of a namespace is gone.
    pub fn trimmed(&self, namespace: NamespaceId) -> VersionVector {
        self.inner.view.read().trimmed.get(&namespace).cloned().unwrap_or_default()
    }

    /// Whether a namespace is exactly what its frontier says. It is not while a repair is half done.
    pub fn is_exact(&self, namespace: NamespaceId) -> bool {
        self.inner.view.read().is_exact(namespace)
    }
}

impl View {
    /// The region starts over: only what is no data stays.
    pub(crate) fn forget_data(&mut self) {
        self.frontiers.clear();
        self.trimmed.clear();
        self.ahead.clear();
        self.tombstones.clear();
        self.ledgers.clear();
        self.trees.clear();
    }

    pub(crate) fn is_exact(&self, namespace: NamespaceId) -> bool {
        let Some(ahead) = self.ahead.get(&namespace) else { return true };
        self.frontiers.get(&namespace).is_some_and(|frontier| frontier.covers_all(ahead))
            || ahead.is_empty()
    }
}
