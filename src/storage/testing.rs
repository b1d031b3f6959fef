//! What the tests of this crate share: random histories with their outcome in memory, and ways
//! to look at a store and to crash it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use proptest::prelude::*;
use tempfile::TempDir;
use tombolo_core::{
    Actor, Change, Command, Content, HybridTime, NamespaceId, Outcome, Record, RegionId, RequestId,
    Rule, ShardId, ShardState, VersionVector,
    command::{
        Check, Collect, Condition, Expire, ForgetConflicts, ForgetReviewed, Ingest, LinkSetting,
        Operation, Remembered, Settle, StartOver, Trim, Write,
    },
    encode_batch, execute,
    ledger::{LedgerEntry, LedgerHead},
    members::{Member, MemberState},
    merkle::{self, Tree},
    testing::{MemoryRepair, MemoryState},
};

use crate::{
    ApplyEntry, ApplyPayload, LedgerSize, Position, ShardStore, Store, StoreConfig,
    changes::HEADER_BYTES,
    layout::{self, Kind, Meta},
    shard::{decode_links, decode_members},
};

pub(crate) const LOCAL: Actor = Actor { region: RegionId(1), incarnation: 1 };
pub(crate) const REMOTE: Actor = Actor { region: RegionId(2), incarnation: 1 };
pub(crate) const LWW: NamespaceId = NamespaceId(1);
pub(crate) const SIBLINGS: NamespaceId = NamespaceId(17);
pub(crate) const SHARD: ShardId = ShardId(3);

const SMALL: StoreConfig = StoreConfig { block_cache_bytes: 1 << 20, memtable_bytes: 2 << 20 };

pub(crate) fn open(dir: &Path) -> (Store, ShardStore) {
    let store = Store::open(dir, SMALL).unwrap();
    let shard = store.shard(SHARD).unwrap();
    (store, shard)
}

pub(crate) fn fresh() -> (TempDir, Store, ShardStore) {
    let dir = tempfile::tempdir().unwrap();
    let (store, shard) = open(dir.path());
    (dir, store, shard)
}

/// So many cases, each of which opens stores.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// The directory as a crash now would leave it: without what is in memory. Files come and go in
/// the background, so a copy during which that happened is no moment's image and is made again.
pub(crate) fn crashed(store: &Store) -> TempDir {
    loop {
        let before = listing(store.dir());
        let copy = tempfile::tempdir().unwrap();
        let copied = copy_dir(store.dir(), copy.path());
        if copied && before == listing(store.dir()) {
            return copy;
        }
    }
}

/// All files of a directory with their sizes, but for the log that RocksDB writes for people.
fn listing(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(listing(&path));
        } else if !path.ends_with("LOG") {
            files.insert(path.clone(), fs::metadata(&path).map_or(0, |file| file.len()));
        }
    }
    files
}

/// Copies a directory; answers whether every file was still there when its turn came.
fn copy_dir(from: &Path, to: &Path) -> bool {
    fs::create_dir_all(to).unwrap();
    let mut complete = true;
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            complete &= copy_dir(&path, &target);
        } else if !path.ends_with("LOCK") {
            match fs::copy(&path, &target) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => complete = false,
                Err(error) => panic!("{error}"),
            }
        }
    }
    complete
}

pub(crate) fn rule(namespace: NamespaceId) -> Rule {
    if namespace == LWW { Rule::Lww } else { Rule::Siblings }
}

pub(crate) fn time(wall: u64) -> HybridTime {
    HybridTime::new(wall, 0).unwrap()
}

pub(crate) fn put(key: &str, value: impl Into<Bytes>) -> Operation {
    let key = Bytes::copy_from_slice(key.as_bytes());
    Operation { key, content: Content::value(value), context: None }
}

pub(crate) fn delete(key: &str) -> Operation {
    Operation { content: Content::Tombstone, ..put(key, "") }
}

pub(crate) fn write(wall: u64, operations: Vec<Operation>) -> Write {
    Write {
        namespace: LWW,
        rule: Rule::Lww,
        actor: LOCAL,
        time: time(wall),
        request: None,
        checks: Vec::new(),
        operations,
        mutations: Vec::new(),
    }
}

pub(crate) fn position(index: u64) -> Position {
    Position { term: 1, node: 1, index }
}

pub(crate) fn entry(index: u64, commands: &[Command]) -> ApplyEntry {
    let encoded: Vec<Bytes> = commands.iter().map(Command::to_bytes).collect();
    let payload = ApplyPayload::Commands(encode_batch(&encoded));
    ApplyEntry { position: position(index), payload }
}

/// Applies commands as the next entry.
pub(crate) fn run(shard: &ShardStore, commands: &[Command]) -> Vec<Outcome> {
    let index = shard.applied().map_or(0, |applied| applied.index) + 1;
    shard.apply(&[entry(index, commands)]).unwrap().remove(0)
}

pub(crate) fn run_write(shard: &ShardStore, write: Write) -> Outcome {
    run(shard, &[Command::Write(write)]).remove(0)
}

/// All of a shard, read from the engine and not through the shard's caches.
pub(crate) fn dump(shard: &ShardStore) -> MemoryState {
    let inner = &*shard.inner;
    let mut state = MemoryState::default();
    let (mut indexed, mut open) = (BTreeSet::new(), BTreeSet::new());
    let mut heads = BTreeMap::new();
    let mut pairs =
        inner.iterate(layout::shard_start(inner.id), layout::shard_end(inner.id), false);
    pairs.seek_to_first();
    while let Some((key, value)) = pairs.item() {
        let value = Bytes::copy_from_slice(value);
        let rest = &key[layout::PREFIX_BYTES..];
        let namespace = || NamespaceId(u32::from_be_bytes(rest[..4].try_into().unwrap()));
        match key[2] {
            kind if kind == Kind::Meta as u8 => {
                let vector = || VersionVector::from_bytes(value.slice(1..)).unwrap();
                match Meta::from_rest(rest) {
                    Some(Meta::Frontier(namespace)) => {
                        state.frontiers.insert(namespace, vector());
                    }
                    Some(Meta::Trimmed(namespace)) => {
                        state.trimmed.insert(namespace, vector());
                    }
                    Some(Meta::Ahead(namespace)) => {
                        state.ahead.insert(namespace, vector());
                    }
                    Some(Meta::Links) => {
                        state.links = decode_links(inner.id, value).unwrap();
                    }
                    Some(Meta::Members) => state.members = decode_members(inner.id, value).unwrap(),
                    Some(Meta::Applied | Meta::Membership) | None => {}
                }
            }
            kind if kind == Kind::Record as u8 || kind == Kind::Tombstone as u8 => {
                let user_key = Bytes::copy_from_slice(layout::user_key(key).unwrap());
                let record = Record::from_bytes(value).unwrap();
                assert_eq!(record.is_dead(), kind == Kind::Tombstone as u8, "it lies elsewhere");
                let before = state.records.insert((namespace(), user_key), record);
                assert_eq!(before, None, "a key lies in two places");
            }
            kind if kind == Kind::Change as u8 => {
                let (namespace, actor) = layout::change_actor(key).unwrap();
                let change = Change::from_bytes(value.slice(HEADER_BYTES..)).unwrap();
                let seq = layout::change_seq(key).unwrap();
                state.changes.insert((namespace, actor, seq), change);
            }
            kind if kind == Kind::Ledger as u8 => {
                let entry = LedgerEntry::from_bytes(value).unwrap();
                state.ledger.insert((namespace(), entry.id(namespace())), entry);
            }
            kind if kind == Kind::Dedup as u8 => {
                let request = layout::dedup_request(key).unwrap();
                state.requests.insert(request, Remembered::from_bytes(value).unwrap());
            }
            kind if kind == Kind::Expiry as u8 => {
                let (value, key) = layout::expiring(key).unwrap();
                indexed.insert((namespace(), Bytes::copy_from_slice(key), value.dot, value.at));
            }
            kind if kind == Kind::Review as u8 => {
                let held = inner.decode_reviewed(&value).unwrap();
                let user_key = Bytes::copy_from_slice(layout::reviewed_key(key).unwrap());
                state.review.insert((namespace(), user_key, held.dot), held);
            }
            kind if kind == Kind::Noted as u8 => {
                let (namespace, noted) = layout::noted(key).unwrap();
                let before = heads.insert((namespace, noted.id), (noted, value));
                assert_eq!(before, None, "an entry was noted twice");
            }
            kind if kind == Kind::Open as u8 => {
                let (since, key) = layout::open_key(key).unwrap();
                open.insert((namespace(), Bytes::copy_from_slice(key), since));
            }
            kind if kind == Kind::Tree as u8 || kind == Kind::Hash as u8 => {}
            kind => panic!("unknown kind {kind}"),
        }
        pairs.next();
    }
    pairs.status().unwrap();
    let mut expiring = BTreeSet::new();
    for ((namespace, key), record) in &state.records {
        for held in record.siblings() {
            if let Content::Value { expire: Some(at), .. } = held.content {
                expiring.insert((*namespace, key.clone(), held.dot, at));
            }
        }
    }
    assert_eq!(indexed, expiring, "the index of what expires is not that of the records");
    let is_open = |record: &Record| record.live_at(HybridTime::ZERO).count() > 1;
    let several = state.records.iter().filter(|(_, record)| is_open(record));
    let several: BTreeSet<_> = several
        .map(|((namespace, key), record)| (*namespace, key.clone(), record.latest_time()))
        .collect();
    assert_eq!(open, several, "the index of open keys is not that of the records");
    let (mut sizes, mut expected) = (BTreeMap::<_, LedgerSize>::new(), BTreeMap::new());
    for (&(namespace, id), entry) in &state.ledger {
        let bytes = entry.to_bytes().len() as u64;
        let size = sizes.entry(namespace).or_default();
        (size.entries, size.bytes) = (size.entries + 1, size.bytes + bytes);
        let head = LedgerHead::new(entry, bytes).to_bytes();
        expected.insert((namespace, id), (entry.place(namespace), head));
    }
    assert_eq!(heads, expected, "the ledger by time is not that of the entries");
    assert_eq!(shard.ledger_sizes(), sizes);
    let mut dead = BTreeMap::new();
    for ((namespace, _), _) in state.records.iter().filter(|(_, record)| record.is_dead()) {
        *dead.entry(*namespace).or_default() += 1;
    }
    assert_eq!(shard.tombstone_counts(), dead);
    for namespace in [LWW, SIBLINGS] {
        let mut tree = Tree::default();
        for ((_, key), record) in state.records.iter().filter(|((held, _), _)| *held == namespace) {
            tree.toggle(merkle::leaf_of(key), merkle::digest(key, record));
        }
        assert_eq!(shard.scrub(namespace).unwrap().not_indexed, Vec::<u16>::new());
        let kept = inner.view.read().trees.get(&namespace).cloned().unwrap_or_default();
        assert_eq!(kept, tree, "the tree is not that of the records");
        let on_disk = inner.load_trees().unwrap().remove(&namespace).unwrap_or_default();
        assert_eq!(on_disk.0, tree, "the tree on disk is not that of the records");
    }
    state
}

/// One thing that happens in a random history.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// Writes of this region: keys with values, or deletions.
    Write {
        sibling: bool,
        keys: Vec<(u8, Option<u8>)>,
        request: Option<(u8, u8)>,
        check: Option<u8>,
        blind: bool,
    },
    /// A write of the other region, which this one learns of with the next pull.
    RemoteWrite { sibling: bool, keys: Vec<(u8, Option<u8>)>, pull_first: bool },
    /// This region pulls.
    Pull { sibling: bool },
    /// The part of the log below this part (in quarters) of each actor's events goes.
    Trim { sibling: bool, quarters: u8 },
    /// Tombstones below this part (in quarters) of each actor's events go.
    Collect { sibling: bool, quarters: u8 },
    /// Requests are forgotten.
    Forget(Vec<(u8, u8)>),
    /// An entry of the ledger is forgotten, or one that was noted at another time.
    ForgetConflict { place: prop::sample::Index, is_another: bool },
    /// Keys with several siblings are settled, as of their latest one or of one that is not it.
    Settle { is_late: bool },
    /// Values of this region that have expired go.
    Expire { sibling: bool },
    /// A link is paused, or not.
    SetLink { paused: bool },
    /// This region starts over, and has gone on since or not.
    StartOver { known: bool },
    /// It takes writes again.
    Activate,
    /// Something is forgotten that was kept for review.
    ForgetReviewed,
    /// One command of a repair of this region from the other; the last one ends it.
    Repair { sibling: bool, place: prop::sample::Index },
}

/// Log entries, and what they must do.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) entries: Vec<ApplyEntry>,
    pub(crate) outcomes: Vec<Vec<Outcome>>,
    /// The state after each number of entries.
    pub(crate) states: Vec<MemoryState>,
}

pub(crate) fn events() -> impl Strategy<Value = Vec<Vec<Event>>> {
    let keys = || prop::collection::vec((0u8..6, prop::option::weighted(0.8, any::<u8>())), 1..4);
    let request = (0u8..3, 0u8..6);
    let event = prop_oneof![
        6 => (any::<bool>(), keys(), prop::option::of(request.clone()),
              prop::option::weighted(0.2, 0u8..6), any::<bool>())
            .prop_map(|(sibling, keys, request, check, blind)| {
                Event::Write { sibling, keys, request, check, blind }
            }),
        3 => (any::<bool>(), keys(), any::<bool>())
            .prop_map(|(sibling, keys, pull_first)| Event::RemoteWrite { sibling, keys, pull_first }),
        2 => any::<bool>().prop_map(|sibling| Event::Pull { sibling }),
        1 => (any::<bool>(), 0u8..5).prop_map(|(sibling, quarters)| Event::Trim { sibling, quarters }),
        1 => (any::<bool>(), 0u8..5)
            .prop_map(|(sibling, quarters)| Event::Collect { sibling, quarters }),
        1 => prop::collection::vec(request, 1..4).prop_map(Event::Forget),
        1 => (any::<prop::sample::Index>(), prop::bool::weighted(0.2))
            .prop_map(|(place, is_another)| Event::ForgetConflict { place, is_another }),
        1 => prop::bool::weighted(0.2).prop_map(|is_late| Event::Settle { is_late }),
        1 => any::<bool>().prop_map(|sibling| Event::Expire { sibling }),
        1 => any::<bool>().prop_map(|paused| Event::SetLink { paused }),
        1 => prop::bool::weighted(0.5).prop_map(|known| Event::StartOver { known }),
        3 => Just(Event::Activate),
        1 => Just(Event::ForgetReviewed),
        2 => (any::<bool>(), any::<prop::sample::Index>())
            .prop_map(|(sibling, place)| Event::Repair { sibling, place }),
    ];
    prop::collection::vec(prop::collection::vec(event, 0..4), 1..24)
}

/// Runs events in memory.
pub(crate) fn history(events: &[Vec<Event>]) -> History {
    let mut world = World::default();
    let mut history = History { states: vec![MemoryState::default()], ..History::default() };
    for (index, group) in (1u64..).zip(events) {
        let commands: Vec<Command> = group.iter().filter_map(|event| world.step(event)).collect();
        let mut outcomes = Vec::new();
        let entry = if commands.is_empty() {
            let payload = if index % 2 == 0 {
                ApplyPayload::Blank
            } else {
                ApplyPayload::Membership(Bytes::from(format!("members of {index}")))
            };
            ApplyEntry { position: position(index), payload }
        } else {
            outcomes = world.outcomes.split_off(world.outcomes.len() - commands.len());
            entry(index, &commands)
        };
        history.entries.push(entry);
        history.outcomes.push(outcomes);
        history.states.push(world.local.clone());
    }
    history
}

#[derive(Default)]
struct World {
    local: MemoryState,
    remote: MemoryState,
    wall: u64,
    outcomes: Vec<Outcome>,
}

impl World {
    /// The command that an event is for this region, executed in memory.
    fn step(&mut self, event: &Event) -> Option<Command> {
        self.wall += 1;
        let namespace = |sibling: bool| if sibling { SIBLINGS } else { LWW };
        let command = match event {
            Event::Write { sibling, keys, request, check, blind } => {
                let namespace = namespace(*sibling);
                let mut write = self.write(namespace, self.actor(), keys);
                let request_id = |&(client, number): &(u8, u8)| request_id(client, number);
                write.request = request.as_ref().map(request_id);
                write.checks = check.iter().map(|&at| absent(at)).collect();
                if !blind {
                    write.operations[0].context = Some(self.local.frontier(namespace));
                }
                Command::Write(write)
            }
            Event::RemoteWrite { sibling, keys, pull_first } => {
                let namespace = namespace(*sibling);
                if *pull_first {
                    let changes =
                        self.local.changes_above(namespace, &self.remote.frontier(namespace));
                    let pull = ingest(namespace, REMOTE, changes);
                    let Ok(_) = execute(&mut self.remote, &pull);
                }
                let mut write = self.write(namespace, REMOTE, keys);
                // Sometimes a request that this region took, too, or another under its id.
                let number = u8::try_from(keys.len()).unwrap_or(0);
                write.request = pull_first.then(|| request_id(keys[0].0 % 3, number));
                let Ok(_) = execute(&mut self.remote, &Command::Write(write));
                return None;
            }
            Event::Pull { sibling } => {
                let namespace = namespace(*sibling);
                let frontier = self.local.frontier(namespace);
                let changes = self.remote.changes_above(namespace, &frontier);
                ingest(namespace, self.actor(), changes)
            }
            Event::Trim { sibling, quarters } => {
                let namespace = namespace(*sibling);
                let part = |(actor, seq): (Actor, u64)| (actor, seq * u64::from(*quarters) / 4);
                let upto = self.local.frontier(namespace).iter().map(part).collect();
                Command::Trim(Trim { namespace, upto })
            }
            Event::Collect { sibling, quarters } => {
                let namespace = namespace(*sibling);
                let part = |(actor, seq): (Actor, u64)| (actor, seq * u64::from(*quarters) / 4);
                let stable = self.local.frontier(namespace).iter().map(part).collect();
                let keys = (0u8..6).map(|key| Bytes::from(format!("key-{key}"))).collect();
                let members = self.local.members.clone();
                Command::Collect(Collect { namespace, stable, members, keys })
            }
            Event::Expire { sibling } => {
                let namespace = namespace(*sibling);
                let mut values = Vec::new();
                for (key, record) in self.local.held(namespace) {
                    values.extend(record.siblings().iter().map(|held| (key.clone(), held.dot)));
                }
                let (rule, time) = (rule(namespace), time(self.wall));
                Command::Expire(Expire { namespace, rule, actor: self.actor(), time, values })
            }
            Event::SetLink { paused } => {
                let setting = LinkSetting { paused: *paused, bytes_per_second: self.wall };
                Command::SetLink(REMOTE.region, setting)
            }
            Event::Repair { sibling, place } => {
                let namespace = namespace(*sibling);
                let (rule, local, source) = (rule(namespace), self.actor(), REMOTE);
                let repair = MemoryRepair { namespace, rule, local, source };
                let mut commands = repair.commands(&self.local, &self.remote, 2);
                commands.swap_remove(place.index(commands.len()))
            }
            Event::StartOver { known } => {
                let local = Actor { incarnation: self.actor().incarnation + 1, ..LOCAL };
                let known = if *known { self.remote.frontiers.clone() } else { BTreeMap::new() };
                let members = self.remote.members.clone();
                Command::StartOver(StartOver { local, known, members })
            }
            Event::Activate => {
                let incarnation = self.actor().incarnation;
                let member = Member { incarnation, state: MemberState::Active };
                Command::Learn([(LOCAL.region, member)].into_iter().collect())
            }
            Event::Settle { is_late } => {
                let since = |record: &Record| {
                    let latest = record.latest_time();
                    if *is_late { latest.next() } else { latest }
                };
                let keys = self.local.held(SIBLINGS).map(|(key, it)| (key.clone(), since(it)));
                let (namespace, time, actor) = (SIBLINGS, time(self.wall), self.actor());
                let (rule, keys) = (rule(namespace), keys.collect());
                Command::Settle(Settle { namespace, rule, actor, time, keys })
            }
            Event::ForgetConflict { place, is_another } => {
                let entries: Vec<_> = self.local.ledger.iter().collect();
                if entries.is_empty() {
                    return None;
                }
                let (&(namespace, _), entry) = entries[place.index(entries.len())];
                let mut noted = entry.place(namespace);
                if *is_another {
                    noted.at = noted.at.next();
                }
                Command::ForgetConflicts(ForgetConflicts { namespace, entries: vec![noted] })
            }
            Event::ForgetReviewed => {
                let (namespace, key, dot) = self.local.review.keys().next()?.clone();
                let writes = vec![(key, dot)];
                Command::ForgetReviewed(ForgetReviewed { namespace, writes })
            }
            Event::Forget(requests) => Command::ForgetRequests(
                requests.iter().map(|&(client, number)| request_id(client, number)).collect(),
            ),
        };
        let Ok(outcome) = execute(&mut self.local, &command);
        self.outcomes.push(outcome);
        Some(command)
    }

    /// As what this region writes now.
    fn actor(&self) -> Actor {
        self.local.members.actor(LOCAL.region)
    }

    fn write(&self, namespace: NamespaceId, actor: Actor, keys: &[(u8, Option<u8>)]) -> Write {
        let operation = |&(key, value): &(u8, Option<u8>)| match value {
            // Some of them expire.
            Some(value) if value % 4 == 0 => Operation {
                content: Content::Value {
                    data: vec![value; 3].into(),
                    expire: Some(time(self.wall + u64::from(value % 16))),
                },
                ..put(&format!("key-{key}"), "")
            },
            Some(value) => put(&format!("key-{key}"), vec![value; 1 + usize::from(value)]),
            None => delete(&format!("key-{key}")),
        };
        let operations = keys.iter().map(operation).collect();
        Write { namespace, rule: rule(namespace), actor, ..write(self.wall, operations) }
    }
}

pub(crate) fn ingest(namespace: NamespaceId, local: Actor, changes: Vec<Change>) -> Command {
    let source = if local == REMOTE { LOCAL } else { REMOTE };
    let (rule, time) = (rule(namespace), time_of(&changes));
    Command::Ingest(Ingest { namespace, rule, local, source, time, changes })
}

/// When changes may have come: not before they were written.
fn time_of(changes: &[Change]) -> HybridTime {
    changes.iter().map(Change::time).max().unwrap_or(HybridTime::ZERO)
}

pub(crate) fn request_id(client: u8, number: u8) -> RequestId {
    RequestId { client: u64::from(client), number: u64::from(number) }
}

fn absent(key: u8) -> Check {
    Check { key: Bytes::from(format!("key-{key}")), condition: Condition::Absent }
}

/// What the caches of a shard must say about `state`.
pub(crate) fn assert_caches_match(shard: &ShardStore, state: &MemoryState) {
    let frontiers: BTreeMap<_, _> = state.frontiers.clone();
    assert_eq!(shard.frontiers(), frontiers);
    for (&(namespace, ref key), record) in &state.records {
        assert_eq!(shard.record(namespace, key).unwrap().as_ref(), Some(record));
    }
    for (&(namespace, actor, seq), change) in &state.changes {
        let stored = shard.changes(namespace, actor, seq, 1).unwrap();
        assert_eq!(&stored[0].decoded, change);
        assert!(!shard.trimmed(namespace).covers(change.last()));
    }
}
