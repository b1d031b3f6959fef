//! What single steps of the write path cost: merging, encoding, stamping, applying.
//!
//! `cargo bench --bench micro`; `cargo bench --bench micro -- apply` for a part. Whole servers:
//! `scripts/bench`.

#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first surprise")]

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tombolo_core::change::Change;
use tombolo_core::command::{Operation, Write, decode_batch, encode_batch};
use tombolo_core::merkle::{Tree, digest, leaf_of};
use tombolo_core::record::{Delta, Sibling};
use tombolo_core::repair::{Offer, Sides, Trust, merge};
use tombolo_core::typed::{Action, Mutation};
use tombolo_core::{
    Actor, Command, Content, Dot, HybridClock, HybridTime, NamespaceId, Record, RegionId,
    RequestId, Rule, ShardId, VersionVector,
};
use tombolo_storage::{ApplyEntry, ApplyPayload, Position, Store, StoreConfig};

/// Commands in a log entry, as many as a busy leader packs.
const BATCH: u64 = 64;
const VALUE_BYTES: usize = 256;
const KEYS: u64 = 10_000;

fn actor(region: u16) -> Actor {
    Actor { region: RegionId(region), incarnation: 1 }
}

fn time(millis: u64) -> HybridTime {
    HybridTime::new(millis, 0).unwrap()
}

fn key(number: u64) -> Bytes {
    Bytes::from(format!("bench-{number:010}"))
}

/// The write number `seq` of a region, which replaces what `supersedes` names.
fn delta(region: u16, seq: u64, supersedes: Vec<Dot>) -> Delta {
    let dot = Dot { actor: actor(region), seq };
    let content = Content::value(vec![7; VALUE_BYTES]);
    let sibling = Sibling { dot, time: time(seq * 10 + u64::from(region)), request: None, content };
    Delta {
        key: key(0),
        sibling,
        supersedes,
        pushed_out: tombolo_core::record::PushedOut::default(),
    }
}

/// A record that each of `regions` wrote last without knowing of the others.
fn concurrent(regions: std::ops::Range<u16>, rule: Rule) -> Record {
    let mut record = Record::default();
    for region in regions {
        record.apply(&delta(region, 1, Vec::new()), &VersionVector::new(), rule);
    }
    record
}

fn put(number: u64, keys: u64) -> Command {
    let operation = Operation {
        key: key(number.wrapping_mul(7919) % keys),
        content: Content::value(vec![7; VALUE_BYTES]),
        context: None,
    };
    Command::Write(Write {
        namespace: NamespaceId::DEFAULT,
        rule: Rule::Lww,
        actor: actor(1),
        time: time(number),
        request: Some(RequestId { client: 1 + number % 64, number }),
        checks: Vec::new(),
        operations: vec![operation],
        mutations: Vec::new(),
    })
}

fn puts(from: u64, keys: u64) -> Vec<Bytes> {
    (from..from + BATCH).map(|number| put(number, keys).to_bytes()).collect()
}

fn records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("record");
    for (name, rule) in [("lww", Rule::Lww), ("siblings", Rule::Siblings)] {
        for regions in [2, 6] {
            let (left, right) = (concurrent(1..regions, rule), concurrent(2..regions + 1, rule));
            let id = BenchmarkId::new(format!("merge/{name}"), regions);
            let nothing = VersionVector::new();
            let offer = Offer::new(Bytes::from_static(b"k"), &right, &nothing);
            let sides = Sides { applied: &nothing, cut: &nothing, trust: Trust::Coverage };
            group.bench_function(id, |bencher| {
                bencher.iter(|| merge(black_box(&left), black_box(&offer), sides, rule));
            });
        }
        let held = concurrent(1..3, rule);
        let overwrite = delta(1, 2, held.superseded_by(None));
        let seen = VersionVector::new();
        group.bench_function(format!("apply/{name}"), |bencher| {
            bencher.iter_batched(
                || held.clone(),
                |mut record| {
                    record.apply(black_box(&overwrite), &seen, rule);
                    record
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn codecs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    let depends_on: VersionVector = (1..4).map(|region| (actor(region), 1_000_000)).collect();
    let change = Change {
        actor: actor(1),
        first_seq: 1_000_001,
        depends_on,
        ahead_by: VersionVector::new(),
        request: None,
        deltas: vec![delta(1, 1_000_001, vec![Dot { actor: actor(2), seq: 5 }])],
    };
    let encoded = change.to_bytes();
    group.throughput(Throughput::Bytes(encoded.len() as u64));
    group.bench_function("change/encode", |bencher| bencher.iter(|| black_box(&change).to_bytes()));
    group.bench_function("change/decode", |bencher| {
        bencher.iter(|| Change::from_bytes(black_box(&encoded).clone()).unwrap());
    });

    let command = put(1, KEYS);
    group.throughput(Throughput::Bytes(command.to_bytes().len() as u64));
    group.bench_function("command/encode", |bencher| {
        bencher.iter(|| black_box(&command).to_bytes())
    });

    let commands = puts(0, KEYS);
    let batch = encode_batch(&commands);
    group.throughput(Throughput::Elements(BATCH));
    group.bench_function(BenchmarkId::new("batch/encode", BATCH), |bencher| {
        bencher.iter(|| encode_batch(black_box(&commands)));
    });
    group.bench_function(BenchmarkId::new("batch/decode", BATCH), |bencher| {
        bencher.iter(|| decode_batch(black_box(&batch).clone()).unwrap());
    });

    let record = concurrent(1..3, Rule::Siblings);
    let stored = record.to_bytes();
    group.throughput(Throughput::Bytes(stored.len() as u64));
    group.bench_function("record/encode", |bencher| bencher.iter(|| black_box(&record).to_bytes()));
    group.bench_function("record/decode", |bencher| {
        bencher.iter(|| Record::from_bytes(black_box(&stored).clone()).unwrap());
    });
    group.finish();
}

fn clock(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hlc");
    let mut clock = HybridClock::default();
    let mut wall = 1_700_000_000_000;
    group.bench_function("tick", |bencher| {
        bencher.iter(|| {
            wall += 1;
            clock.tick(black_box(wall), 500)
        });
    });
    group.bench_function("tick/wall clock stands still", |bencher| {
        bencher.iter(|| clock.tick(black_box(1_700_000_000_000), 500));
    });
    group.bench_function("observe", |bencher| {
        let remote = time(1_700_000_000_400);
        bencher.iter(|| clock.observe(black_box(remote), 1_700_000_000_000, 500));
    });
    group.finish();
}

/// What keeping the Merkle tree adds to a put: compare with `apply/puts`, of which it is a part.
fn merkle(criterion: &mut Criterion) {
    let held = |number: u64| {
        let mut record = Record::default();
        record.apply(&delta(1, number + 1, Vec::new()), &VersionVector::new(), Rule::Lww);
        (Bytes::from(format!("key-{number:08}")), record)
    };
    let records: Vec<(Bytes, Record)> = (0..BATCH).map(held).collect();
    let mut tree = Tree::default();
    let mut group = criterion.benchmark_group("merkle");
    group.throughput(Throughput::Elements(BATCH));
    group.bench_function(BenchmarkId::new("puts", BATCH), |bencher| {
        bencher.iter(|| {
            for (key, record) in &records {
                // The old value's digest and the new one's.
                let change =
                    digest(key, black_box(record)) ^ digest(key, black_box(record)).rotate_left(1);
                tree.toggle(leaf_of(key), change);
            }
        });
    });
    group.finish();
}

/// One log entry of puts on a real store: read what is there, decide, write one batch. To keys that
/// mostly exist, and to new ones. `scripts/tree-cost` runs it with and without the Merkle tree.
fn apply(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    group.throughput(Throughput::Elements(BATCH));
    for (name, keys) in [("puts", KEYS), ("new", u64::MAX)] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreConfig::default()).unwrap();
        let shard = store.shard(ShardId(0)).unwrap();
        let mut index = 0;
        let mut entry = || {
            index += 1;
            let payload = ApplyPayload::Commands(encode_batch(&puts(index * BATCH, keys)));
            [ApplyEntry { position: Position { term: 1, node: 1, index }, payload }]
        };
        group.bench_function(BenchmarkId::new(name, BATCH), |bencher| {
            let apply = |run: [ApplyEntry; 1]| shard.apply(&run).unwrap();
            bencher.iter_batched(&mut entry, apply, BatchSize::SmallInput);
        });
    }
    group.finish();
}

/// What one more element of a set costs, by how many it has: the same.
fn elements(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("set");
    for held in [10, 100_000] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreConfig::default()).unwrap();
        let shard = store.shard(ShardId(0)).unwrap();
        let (mut index, mut member) = (0, 0);
        let mut entry = |members: u64| {
            index += 1;
            let mutation = |number: u64| Mutation {
                key: Bytes::from_static(b"set"),
                path: Vec::new(),
                action: Action::Insert(Bytes::from(format!("member-{number:010}"))),
                context: None,
            };
            let mutations = (member..member + members).map(mutation).collect();
            member += members;
            let write = Write {
                namespace: NamespaceId(16),
                rule: Rule::Set,
                actor: actor(1),
                time: time(index),
                request: None,
                checks: Vec::new(),
                operations: Vec::new(),
                mutations,
            };
            let payload = ApplyPayload::Commands(encode_batch(&[Command::Write(write).to_bytes()]));
            [ApplyEntry { position: Position { term: 1, node: 1, index }, payload }]
        };
        for _ in 0..held / 10 {
            shard.apply(&entry(10)).unwrap();
        }
        group.bench_function(BenchmarkId::new("insert", held), |bencher| {
            let apply = |run: [ApplyEntry; 1]| shard.apply(&run).unwrap();
            bencher.iter_batched(|| entry(1), apply, BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(benches, records, codecs, clock, apply, merkle, elements);
criterion_main!(benches);
