//! A shard's way from one store to another: whole, interrupted, damaged.

use super::*;
use crate::{SnapshotBlock, SnapshotExport, testing::*};
use proptest::prelude::*;
use tempfile::TempDir;
use tombolo_core::{Command, testing::MemoryState};

/// A store with a shard of several blocks.
fn source() -> (TempDir, Store, ShardStore) {
    let (dir, store, shard) = fresh();
    for at in 0..60u32 {
        let value = incompressible(at, 50_000);
        run_write(&shard, write(u64::from(at), vec![put(&format!("key-{at:03}"), value)]));
    }
    (dir, store, shard)
}

fn incompressible(seed: u32, length: usize) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bytes.extend_from_slice(&state.to_be_bytes());
    }
    bytes
}

fn blocks(export: &mut SnapshotExport) -> Vec<SnapshotBlock> {
    (0..).map_while(|number| export.chunk(number).unwrap()).collect()
}

fn take(install: &mut SnapshotInstall, block: &SnapshotBlock) {
    install.write(block.number, &block.block, block.crc).unwrap();
}

/// A store whose shard, and the shards beside it, hold something else.
fn target() -> (TempDir, Store, ShardStore, Vec<(ShardStore, MemoryState)>) {
    let (dir, store, shard) = fresh();
    for at in 0..50 {
        run_write(&shard, write(at, vec![put(&format!("old-{at}"), vec![1; 2000])]));
    }
    let beside: Vec<ShardStore> = [2, 4].map(|number| store.shard(ShardId(number)).unwrap()).into();
    let beside = beside.into_iter().map(|shard| {
        run_write(&shard, write(1, vec![put("kept", "here")]));
        let state = dump(&shard);
        (shard, state)
    });
    (dir, store, shard, beside.collect())
}

#[test]
fn an_installed_shard_equals_its_source_and_other_shards_are_untouched() {
    let (_source_dir, _source_store, source) = source();
    let membership = ApplyMembership::apply(&source);
    let mut export = source.export().unwrap();
    run_write(&source, write(99, vec![put("later", "not in it")]));
    let (dir, store, shard, beside) = target();
    let (mut applied, mut frontiers) = (shard.watch_applied(), shard.watch_frontiers());
    applied.mark_unchanged();
    frontiers.mark_unchanged();

    let mut install = store.begin_install(SHARD, "one").unwrap();
    let blocks = blocks(&mut export);
    assert!(blocks.len() > 2);
    blocks.iter().for_each(|block| take(&mut install, block));
    let received = install.finish(export.totals().unwrap()).unwrap();
    assert_eq!(received.position(), export.position());
    assert_eq!(received.membership(), export.membership());
    assert_eq!(received.totals().chunks, blocks.len() as u64);
    shard.install(received).unwrap();

    let mut expected = dump(&source);
    let later = (LWW, Bytes::from_static(b"later"));
    assert!(expected.records.remove(&later).is_some());
    let seq = expected.frontiers[&LWW].get(LOCAL);
    expected.changes.remove(&(LWW, LOCAL, seq));
    expected.frontiers.insert(LWW, [(LOCAL, seq - 1)].into_iter().collect());
    assert_eq!(dump(&shard), expected);
    assert_caches_match(&shard, &expected);
    assert_eq!(shard.applied(), export.position());
    assert_eq!(shard.membership(), Some(membership));
    assert_eq!(Some(*applied.borrow_and_update()), export.position().map(|at| at.index));
    assert!(frontiers.has_changed().unwrap());
    for (shard, state) in &beside {
        assert_eq!(&dump(shard), state);
    }

    // Durable at once, and the others lose only what was never flushed.
    assert_eq!(store.durable_position(SHARD).unwrap(), export.position());
    let copy = crashed(&store);
    let (_again, restarted) = open(copy.path());
    assert_eq!(dump(&restarted), expected);
    assert_eq!(fs::read_dir(dir.path().join("snapshot-in/3")).unwrap().count(), 0);

    // Life goes on.
    run_write(&shard, write(100, vec![put("key-001", "new")]));
    store.flush().unwrap();
    shard.inner.engine.db.compact_range::<&[u8], &[u8]>(None, None);
    assert_eq!(dump(&shard).records.len(), expected.records.len());
}

struct ApplyMembership;

impl ApplyMembership {
    fn apply(shard: &ShardStore) -> (Position, Bytes) {
        let at = position(shard.applied().unwrap().index + 1);
        let members = Bytes::from_static(b"members");
        let payload = crate::ApplyPayload::Membership(members.clone());
        shard.apply(&[crate::ApplyEntry { position: at, payload }]).unwrap();
        (at, members)
    }
}

#[test]
fn blocks_are_the_same_in_any_order_and_on_any_pass() {
    let (_dir, _store, source) = source();
    let mut export = source.export().unwrap();
    let third = export.chunk(2).unwrap().unwrap();
    let all = blocks(&mut export);
    assert_eq!(all[2], third);
    assert_eq!(export.chunk(0).unwrap().as_ref(), Some(&all[0]));
    assert_eq!(export.chunk(all.len() as u64).unwrap(), None);

    let mut again = source.export().unwrap();
    assert_eq!(again.totals().unwrap(), export.totals().unwrap());
    assert_eq!(blocks(&mut again), all);
    assert!(all.iter().all(|block| block.block.len() < (1 << 20) + 60_000));
}

#[test]
fn an_interrupted_transfer_goes_on_after_a_reconnect_and_after_a_restart() {
    let (_source_dir, _source_store, source) = source();
    let mut export = source.export().unwrap();
    let blocks = blocks(&mut export);
    let (dir, store, shard, _beside) = target();

    let mut install = store.begin_install(SHARD, "one").unwrap();
    take(&mut install, &blocks[0]);
    assert!(matches!(
        store.begin_install(SHARD, "one"),
        Err(StorageError::ReceiveBusy { shard: SHARD })
    ));
    drop(install);
    let mut install = store.begin_install(SHARD, "one").unwrap();
    assert_eq!(install.next_chunk(), 1);
    take(&mut install, &blocks[0]);
    take(&mut install, &blocks[1]);
    drop(install);
    drop((store, shard, _beside));

    let (store, shard) = open(dir.path());
    let mut install = store.begin_install(SHARD, "one").unwrap();
    assert_eq!(install.next_chunk(), 2);
    blocks[2..].iter().for_each(|block| take(&mut install, block));
    // Complete, but the node stops before it is installed.
    drop(install);
    let install = store.begin_install(SHARD, "one").unwrap();
    assert_eq!(install.next_chunk(), blocks.len() as u64);
    // Declined, because the log has come past it: nothing stays on the disk.
    drop(install.finish(export.totals().unwrap()).unwrap());
    let mut install = store.begin_install(SHARD, "one").unwrap();
    assert_eq!(install.next_chunk(), 0);
    blocks.iter().for_each(|block| take(&mut install, block));
    shard.install(install.finish(export.totals().unwrap()).unwrap()).unwrap();

    assert_eq!(dump(&shard), dump(&source));
}

#[test]
fn a_damaged_or_misplaced_block_is_refused_and_can_be_sent_again() {
    let (_source_dir, _source_store, source) = source();
    let mut export = source.export().unwrap();
    let blocks = blocks(&mut export);
    let (_dir, store, shard, _beside) = target();
    let mut install = store.begin_install(SHARD, "one").unwrap();

    let mut damaged = blocks[0].block.to_vec();
    damaged[500] ^= 1;
    let error = install.write(0, &damaged, blocks[0].crc).unwrap_err();
    assert!(matches!(error, StorageError::DamagedChunk { number: 0, .. }), "{error}");
    let noise = b"\x01\xff\xff\xff\xff";
    let error = install.write(0, noise, crc32fast::hash(noise)).unwrap_err();
    assert!(matches!(error, StorageError::DamagedChunk { number: 0, .. }), "{error}");
    let error = install.write(1, &blocks[1].block, blocks[1].crc).unwrap_err();
    assert!(matches!(error, StorageError::ChunkOrder { expected: 0, actual: 1 }), "{error}");
    take(&mut install, &blocks[0]);
    let error = install.write(1, &blocks[0].block, blocks[0].crc).unwrap_err();
    assert!(matches!(error, StorageError::DamagedChunk { number: 1, .. }), "{error}");
    blocks[1..].iter().for_each(|block| take(&mut install, block));

    shard.install(install.finish(export.totals().unwrap()).unwrap()).unwrap();
    assert_eq!(dump(&shard), dump(&source));
}

#[test]
fn a_snapshot_that_is_not_whole_is_refused_and_dropped() {
    let (_source_dir, _source_store, source) = source();
    let mut export = source.export().unwrap();
    let blocks = blocks(&mut export);
    let (_dir, store, shard, _beside) = target();
    let before = dump(&shard);
    let mut install = store.begin_install(SHARD, "one").unwrap();
    take(&mut install, &blocks[0]);

    let error = install.finish(export.totals().unwrap()).map(drop).unwrap_err();

    assert!(matches!(error, StorageError::SnapshotMismatch { .. }), "{error}");
    assert_eq!(store.begin_install(SHARD, "one").unwrap().next_chunk(), 0);
    assert_eq!(dump(&shard), before);
}

#[test]
fn an_empty_shard_installs_too_and_clears_the_range() {
    let (_source_dir, _source_store, source) = fresh();
    let mut export = source.export().unwrap();
    assert_eq!(export.position(), None);
    assert_eq!(export.chunk(0).unwrap(), None);
    let (_dir, store, shard, beside) = target();

    let install = store.begin_install(SHARD, "none").unwrap();
    shard.install(install.finish(export.totals().unwrap()).unwrap()).unwrap();

    assert_eq!((dump(&shard), shard.applied()), (MemoryState::default(), None));
    assert_eq!(dump(&beside[0].0), beside[0].1);
}

#[test]
fn another_snapshot_or_a_bad_id_does_not_inherit_what_came() {
    let (_source_dir, _source_store, source) = source();
    let mut export = source.export().unwrap();
    let first = export.chunk(0).unwrap().unwrap();
    let (dir, store, _shard, _beside) = target();
    let mut install = store.begin_install(SHARD, "one").unwrap();
    take(&mut install, &first);
    drop(install);

    assert_eq!(store.begin_install(SHARD, "two").unwrap().next_chunk(), 0);
    assert!(!dir.path().join("snapshot-in/3/one").exists());
    for id in ["", "..", "a/b", &"x".repeat(129)] {
        assert!(matches!(store.begin_install(SHARD, id), Err(StorageError::SnapshotId { .. })));
    }
}

#[test]
fn opening_drops_directories_without_progress() {
    let (dir, store, shard) = fresh();
    drop((store, shard));
    let junk = dir.path().join("snapshot-in/3/junk");
    fs::create_dir_all(&junk).unwrap();
    fs::write(junk.join("000000.sst"), "half").unwrap();

    let _open = open(dir.path());

    assert!(!junk.exists());
}

#[test]
fn a_large_shard_comes_in_several_files() {
    let (_source_dir, _source_store, source) = fresh();
    for at in 0..45u32 {
        let value = incompressible(at, 1 << 20);
        run_write(&source, write(u64::from(at), vec![put(&format!("key-{at:03}"), value)]));
    }
    let mut export = source.export().unwrap();
    let (_dir, store, shard, beside) = target();
    let mut install = store.begin_install(SHARD, "large").unwrap();
    let mut number = 0;
    while let Some(block) = export.chunk(number).unwrap() {
        take(&mut install, &block);
        number += 1;
    }
    let received = install.finish(export.totals().unwrap()).unwrap();
    assert!(received.files.len() > 2);
    shard.install(received).unwrap();

    assert!(dump(&shard) == dump(&source));
    assert_eq!(dump(&beside[1].0), beside[1].1);
    run(&shard, &[Command::ForgetRequests(vec![])]);
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn any_shard_travels_with_everything_it_holds(events in events(), later in events()) {
        let history = history(&events);
        let (_source_dir, _source_store, source) = fresh();
        source.apply(&history.entries).unwrap();
        let mut export = source.export().unwrap();
        let (_dir, store, shard) = fresh();
        shard.apply(&crate::testing::history(&later).entries).unwrap();

        let mut install = store.begin_install(SHARD, "any").unwrap();
        blocks(&mut export).iter().for_each(|block| take(&mut install, block));
        shard.install(install.finish(export.totals().unwrap()).unwrap()).unwrap();

        let state = history.states.last().unwrap();
        prop_assert_eq!(&dump(&shard), state);
        assert_caches_match(&shard, state);
        prop_assert_eq!(shard.applied(), source.applied());
        prop_assert_eq!(shard.membership(), source.membership());
    }
}
