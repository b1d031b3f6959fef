//! Opening: locks, versions, owners, damage; shards, metrics.

use super::*;
use crate::testing::*;

fn refused(dir: &Path) -> StorageError {
    match Store::open(dir, StoreConfig::default()) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

#[test]
fn a_store_that_is_open_elsewhere_is_refused() {
    let (dir, _store, _shard) = fresh();
    let error = refused(dir.path());
    assert!(matches!(error, StorageError::Locked { .. }), "{error}");
}

#[test]
fn another_format_is_refused_with_both_versions() {
    let refused_of = |version: u32| {
        let (dir, store, shard) = fresh();
        store.engine.db.put(STORE_FORMAT_KEY, version.to_le_bytes()).unwrap();
        drop((store, shard));
        refused(dir.path())
    };
    let (newer, known) = (FORMAT_VERSION + 1, FORMAT_VERSION);
    match refused_of(newer) {
        StorageError::NewerFormat { found, known: told, .. } => {
            assert_eq!((found, told), (newer, known));
        }
        error => panic!("{error}"),
    }
    for older in 1..FORMAT_VERSION {
        let error = refused_of(older);
        assert!(matches!(error, StorageError::OlderFormat { known: told, .. } if told == known));
        assert!(error.to_string().contains("dump"), "{error}");
    }
}

#[test]
fn data_without_a_format_version_is_refused() {
    let (dir, store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    store.engine.db.delete(STORE_FORMAT_KEY).unwrap();
    drop((store, shard));
    assert!(refused(dir.path()).is_corruption());
}

#[test]
fn a_missing_or_damaged_file_is_named() {
    let (dir, store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    drop((store, shard));
    let tables = fs::read_dir(dir.path().join("db")).unwrap().map(|entry| entry.unwrap().path());
    let table = tables.filter(|path| path.extension().is_some_and(|it| it == "sst")).max().unwrap();
    fs::remove_file(&table).unwrap();
    let name = table.file_name().unwrap().to_str().unwrap();

    let error = refused(dir.path());

    assert!(error.is_corruption(), "{error}");
    assert!(error.to_string().contains(name), "{error}");
}

#[test]
fn a_store_belongs_to_whom_claimed_it_first() {
    let (dir, store, shard) = fresh();
    store.claim("demo/us/1").unwrap();
    drop((store, shard));
    let (store, _shard) = open(dir.path());
    store.claim("demo/us/1").unwrap();
    let error = store.claim("demo/us/2").unwrap_err();
    assert!(error.to_string().contains("belongs to `demo/us/1`, not to `demo/us/2`"), "{error}");
}

#[test]
fn handles_of_one_shard_share_its_state_and_unknown_shards_are_refused() {
    let (_dir, store, shard) = fresh();
    let other = store.shard(SHARD).unwrap();
    run_write(&shard, write(1, vec![put("a", "1")]));
    assert_eq!(other.applied(), shard.applied());
    assert_eq!(other.id(), SHARD);
    let unknown = store.shard(ShardId(SHARDS_MAX)).map(drop);
    assert!(matches!(unknown, Err(StorageError::UnknownShard { .. })));
}

#[test]
fn metrics_and_free_space_are_told() {
    let (_dir, store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", vec![1; 1000])]));
    let metrics = store.metrics().unwrap();
    assert_eq!((metrics.runs, metrics.entries, metrics.flushes), (1, 1, 0));
    assert!(metrics.memtable_bytes > 0 && metrics.written_bytes > 2000);
    assert!(!metrics.write_stopped);
    store.flush().unwrap();
    let metrics = store.metrics().unwrap();
    assert!(metrics.sst_bytes > 0 && metrics.flushes == 1);
    assert!(store.disk_free_bytes().unwrap() > 0);
}

#[test]
fn shards_flush_together_and_each_keeps_its_own_position() {
    let (_dir, store, shard) = fresh();
    let other = store.shard(ShardId(9)).unwrap();
    run_write(&shard, write(1, vec![put("a", "1")]));
    run_write(&shard, write(2, vec![put("a", "2")]));
    run_write(&other, write(1, vec![put("b", "1")]));
    assert_eq!(store.durable_position(SHARD).unwrap(), None);
    store.flush().unwrap();
    assert_eq!(store.durable_position(SHARD).unwrap(), Some(position(2)));
    assert_eq!(store.durable_position(ShardId(9)).unwrap(), Some(position(1)));
}
