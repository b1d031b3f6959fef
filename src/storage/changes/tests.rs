//! Reading the change log for links: order, limits, trimmed parts, sizes.

use super::*;
use crate::testing::*;
use tombolo_core::{Command, VersionVector, command::Trim};

fn trim(shard: &ShardStore, seq: u64) {
    let upto: VersionVector = [(LOCAL, seq)].into_iter().collect();
    run(shard, &[Command::Trim(Trim { namespace: LWW, upto })]);
}

fn first_seqs(changes: &[StoredChange]) -> Vec<u64> {
    changes.iter().map(|change| change.decoded.first_seq).collect()
}

#[test]
fn changes_come_in_order_from_any_change_on_and_within_the_limit() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1"), put("b", "1")]));
    run_write(&shard, write(2, vec![put("a", "2")]));
    run_write(&shard, write(3, vec![put("c", "3")]));

    let all = shard.changes(LWW, LOCAL, 1, usize::MAX).unwrap();
    assert_eq!(first_seqs(&all), [1, 3, 4]);
    assert_eq!(all[1].bytes, all[1].decoded.to_bytes());
    assert_eq!(first_seqs(&shard.changes(LWW, LOCAL, 3, usize::MAX).unwrap()), [3, 4]);
    assert_eq!(first_seqs(&shard.changes(LWW, LOCAL, 1, 1).unwrap()), [1]);
    assert_eq!(shard.changes(LWW, LOCAL, 5, usize::MAX).unwrap(), []);
    assert_eq!(shard.changes(LWW, REMOTE, 1, usize::MAX).unwrap(), []);
    assert_eq!(shard.oldest_change_time(LWW, LOCAL, 3).unwrap(), Some(time(2)));
    assert_eq!(shard.oldest_change_time(LWW, LOCAL, 5).unwrap(), None);
}

#[test]
fn a_trimmed_part_is_told_and_survives_a_restart() {
    let (dir, store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    run_write(&shard, write(2, vec![put("a", "2"), put("b", "2")]));
    run_write(&shard, write(3, vec![put("c", "3")]));
    // In the middle of the second change, which stays whole.
    trim(&shard, 2);
    drop((store, shard));

    let (_store, shard) = open(dir.path());
    assert_eq!(shard.trimmed(LWW).get(LOCAL), 1);
    let error = shard.changes(LWW, LOCAL, 1, usize::MAX).unwrap_err();
    assert!(matches!(error, StorageError::Trimmed { from_seq: 1, .. }), "{error}");
    assert_eq!(first_seqs(&shard.changes(LWW, LOCAL, 2, usize::MAX).unwrap()), [2, 4]);

    trim(&shard, 99);
    assert_eq!(shard.trimmed(LWW).get(LOCAL), 4);
    assert!(matches!(shard.changes(LWW, LOCAL, 4, 1), Err(StorageError::Trimmed { .. })));
    assert_eq!(shard.changes(LWW, LOCAL, 5, 1).unwrap(), []);
    run_write(&shard, write(5, vec![put("d", "5")]));
    assert_eq!(first_seqs(&shard.changes(LWW, LOCAL, 5, 1).unwrap()), [5]);
}

#[test]
fn the_size_of_the_log_follows_appends_trims_and_restarts() {
    let (dir, store, shard) = fresh();
    assert_eq!(shard.change_log_bytes(LWW).unwrap(), 0);
    let size_of = |shard: &ShardStore, from: u64| -> u64 {
        let changes = shard.changes(LWW, LOCAL, from, usize::MAX).unwrap();
        changes.iter().map(|change| (change.bytes.len() + HEADER_BYTES) as u64).sum()
    };
    for wall in 1..=20 {
        run_write(&shard, write(wall, vec![put("a", vec![1; 50]), put("b", vec![2; 50])]));
    }
    assert_eq!(shard.change_log_bytes(LWW).unwrap(), size_of(&shard, 1));
    assert_eq!(shard.log_bytes_from(LWW, LOCAL, 1).unwrap(), size_of(&shard, 1));
    assert_eq!(shard.log_bytes_from(LWW, LOCAL, 99).unwrap(), 0);
    trim(&shard, 10);
    assert_eq!(shard.change_log_bytes(LWW).unwrap(), size_of(&shard, 11));
    drop((store, shard));

    let (_store, shard) = open(dir.path());
    run_write(&shard, write(21, vec![put("a", vec![1; 50])]));
    assert_eq!(shard.change_log_bytes(LWW).unwrap(), size_of(&shard, 11));

    for keep_bytes in [0, 1, 300, 1000, 2000] {
        let point = shard.trim_point(LWW, LOCAL, keep_bytes).unwrap();
        assert!(size_of(&shard, point + 1) <= keep_bytes, "{point} for {keep_bytes}");
        let earlier = if point == 41 { 41 } else { point - 1 };
        assert!(size_of(&shard, earlier) > keep_bytes, "{point} for {keep_bytes}");
    }
    assert_eq!(shard.trim_point(LWW, LOCAL, u64::MAX).unwrap(), 0);
    trim(&shard, 41);
    assert_eq!(shard.change_log_bytes(LWW).unwrap(), 0);
    assert_eq!(shard.trim_point(LWW, LOCAL, 0).unwrap(), 0);
}

#[test]
fn a_change_with_a_damaged_header_is_an_error() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    let mut keys = Keys::new(SHARD);
    shard.inner.engine.db.put(keys.change(LWW, LOCAL, 1), b"\x09junk").unwrap();
    assert!(shard.changes(LWW, LOCAL, 1, 1).unwrap_err().is_corruption());
    assert!(shard.change_log_bytes(LWW).unwrap_err().is_corruption());
}

#[test]
fn one_write_is_found_by_its_dot_as_long_as_the_log_has_it() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1"), put("b", "1")]));
    run_write(&shard, write(2, vec![delete("a")]));
    let dot = |seq| Dot { actor: LOCAL, seq };
    let key_of = |seq| {
        let delta = shard.logged_write(LWW, dot(seq)).unwrap();
        delta.map(|delta| (delta.key, delta.sibling.dot))
    };
    assert_eq!(key_of(1), Some(("a".into(), dot(1))));
    assert_eq!(key_of(2), Some(("b".into(), dot(2))));
    assert_eq!(key_of(3), Some(("a".into(), dot(3))));
    assert_eq!(key_of(4), None);
    trim(&shard, 2);
    assert_eq!(key_of(1), None);
    assert_eq!(key_of(3), Some(("a".into(), dot(3))));
    assert_eq!(shard.logged_write(SIBLINGS, dot(1)).unwrap(), None);
}
