//! The log's contract in normal operation: order, bounds, purging, recycling, reading.
#![allow(clippy::unwrap_used, reason = "a failed step of a test should stop it")]

mod common;

use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use common::*;
use tombolo_raftlog::{Config, Identity, LogError, RaftLog, Vote};

fn identity(node_id: u64, incarnation: u32) -> Identity {
    Identity {
        cluster_id: "demo".into(),
        region: "us".into(),
        node_id,
        directory_id: "0ddba11".into(),
        incarnation,
        shard_count: 4,
    }
}

#[test]
fn an_empty_directory_becomes_an_empty_log() {
    let dir = tempfile::tempdir().unwrap();
    let (log, recovery) = RaftLog::open(&dir.path().join("a/b"), config()).unwrap();
    assert_eq!((recovery.entries, recovery.groups), (0, 0));
    assert_eq!(log.group(1).state(), Default::default());
    assert_eq!(log.identity(), None);
    assert!(log.group(1).read(0..0, 10).unwrap().is_empty());
    log.close();
    drop(open(&dir.path().join("a/b")));
}

#[test]
fn the_identity_is_kept_and_guarded() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    log.set_identity(identity(1, 1)).unwrap();
    log.close();
    let log = open(dir.path());
    assert_eq!(log.identity(), Some(identity(1, 1)));
    log.set_identity(identity(1, 2)).unwrap();
    assert!(matches!(log.set_identity(identity(1, 1)), Err(LogError::IdentityMismatch { .. })));
    assert!(matches!(log.set_identity(identity(2, 2)), Err(LogError::IdentityMismatch { .. })));
}

#[test]
fn a_directory_in_use_is_refused_and_free_after_close() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let group = log.group(1);
    assert!(matches!(open_error(dir.path()), LogError::Locked { .. }));
    log.close();
    drop(open(dir.path()));
    assert!(matches!(group.append(entries(1, 0..1, 1), ignore()), Err(LogError::Closed)));
}

#[test]
fn dropping_the_last_handle_closes_the_log_and_keeps_what_was_queued() {
    let dir = tempfile::tempdir().unwrap();
    let group = open(dir.path()).group(1);
    group.append(entries(1, 0..5, 10), ignore()).unwrap();
    group.save_committed(Some(id(1, 3)));
    drop(group);
    let log = open(dir.path());
    assert_eq!(log.group(1).state().last, Some(id(1, 4)));
    assert_eq!(log.group(1).state().committed, Some(id(1, 3)));
}

#[test]
fn foreign_files_with_a_segment_name_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).close();
    fs::write(segment(dir.path(), 2), vec![b'x'; 8192]).unwrap();
    assert!(matches!(open_error(dir.path()), LogError::NotASegment { .. }));
    let other = tempfile::tempdir().unwrap();
    append(&open(other.path()).group(1), entries(1, 0..100, 1000));
    fs::copy(segment(other.path(), 2), segment(dir.path(), 2)).unwrap();
    let error = open_error(dir.path());
    assert!(error.to_string().contains("another log"), "{error}");
}

#[test]
fn entries_that_do_not_follow_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let group = log.group(1);
    for bad in [2, 9] {
        assert!(matches!(
            group.append(entries(1, bad..bad + 1, 1), ignore()),
            Err(LogError::Gap { .. })
        ));
    }
    append(&group, entries(1, 1..4, 10));
    for bad in [0, 3, 5] {
        assert!(matches!(
            group.append(entries(1, bad..bad + 1, 1), ignore()),
            Err(LogError::Gap { .. })
        ));
    }
    let holey = vec![entry(1, 4, 1), entry(1, 6, 1)];
    assert!(matches!(
        group.append(holey, ignore()),
        Err(LogError::Gap { expected: 5, found: 6, .. })
    ));
    let large = vec![entry(1, 4, 1), entry(1, 5, 16 * 1024 + 1)];
    assert!(matches!(group.append(large, ignore()), Err(LogError::TooLarge { index: 5, .. })));
    assert_eq!(all(&group), entries(1, 1..4, 10));
    append(&group, entries(1, 4..5, 16 * 1024));
}

#[test]
fn a_group_beyond_the_limit_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let vote = Vote { term: 1, node: 1, committed: false };
    let refused = (0..4096).find_map(|group| log.group(group).save_vote(vote, ignore()).err());
    assert!(matches!(refused, Some(LogError::TooManyGroups { max: 232, .. })), "{refused:?}");
    append(&log.group(5), entries(1, 0..200, 1000));
    log.close();
    assert_eq!(open(dir.path()).groups().len(), 232);
}

#[test]
fn callbacks_come_in_the_order_of_submission_over_all_groups() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let mut next = [0; 5];
    for n in 0..2000_usize {
        let group = n * 7 % 5;
        let seen = Arc::clone(&seen);
        let done = Box::new(move |result: std::io::Result<()>| {
            result.unwrap();
            seen.lock().unwrap().push(n);
        });
        if n % 11 == 0 {
            let vote = Vote { term: n as u64, node: 1, committed: false };
            log.group(group as u64).save_vote(vote, done).unwrap();
        } else {
            log.group(group as u64)
                .append(entries(1, next[group]..next[group] + 2, 200), done)
                .unwrap();
            next[group] += 2;
        }
    }
    sync(&log);
    assert_eq!(*seen.lock().unwrap(), (0..2000).collect::<Vec<_>>());
    assert!(log.metrics().syncs < 2000, "one sync serves many");
}

#[test]
fn appended_entries_are_readable_at_once_and_after_leaving_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let log = RaftLog::open(dir.path(), uncached()).unwrap().0;
    let group = log.group(1);
    for start in (0..600).step_by(20) {
        group.append(entries(1, start..start + 20, 300), ignore()).unwrap();
        assert_eq!(
            group.read(start + 19..start + 20, 0).unwrap(),
            entries(1, start + 19..start + 20, 300)
        );
    }
    // Twice, because the places are published after the callbacks.
    sync(&log);
    sync(&log);
    assert_eq!(log.metrics().cache_bytes, 0);
    assert_eq!(all(&group), entries(1, 0..600, 300));
    let limited = group.read(10..600, 1000).unwrap();
    assert_eq!(limited, entries(1, 10..13, 300));
    let total: u64 = 600 * 344;
    assert_eq!(group.bytes_after(0), total - 344);
    assert_eq!(group.bytes_after(599), 0);
}

#[test]
fn reading_past_a_hole_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let group = log.group(1);
    assert!(matches!(group.read(5..9, 100), Err(LogError::Missing { .. })));
    append(&group, entries(1, 0..10, 10));
    group.purge(id(1, 4)).unwrap();
    assert!(matches!(group.read(4..9, 100), Err(LogError::Purged { index: 4, .. })));
    assert!(matches!(group.read(11..12, 100), Err(LogError::Missing { .. })));
    assert!(group.read(10..12, 100).unwrap().is_empty());
    assert_eq!(group.read(9..u64::MAX, 100).unwrap().len(), 1);
    assert_eq!(group.log_id(4), Some(id(1, 4)), "the purged id is still known");
    assert_eq!(group.log_id(3), None);
    assert!(matches!(group.truncate_after(Some(id(1, 3))), Err(LogError::Purged { .. })));
    assert!(matches!(group.truncate_after(None), Err(LogError::Purged { .. })));
    assert!(matches!(group.truncate_after(Some(id(9, 7))), Err(LogError::IdMismatch { .. })));
    assert!(matches!(group.truncate_after(Some(id(1, 10))), Err(LogError::Missing { .. })));
    group.truncate_after(Some(id(1, 4))).unwrap();
    assert_eq!(group.state().last, Some(id(1, 4)));
}

#[test]
fn a_purge_survives_a_restart_also_beyond_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    append(&log.group(1), entries(1, 0..10, 10));
    log.group(1).purge(id(1, 6)).unwrap();
    append(&log.group(2), entries(1, 0..10, 10));
    log.group(2).purge(id(3, 99)).unwrap();
    log.group(4).purge(id(2, 50)).unwrap();
    log.close();
    let log = open(dir.path());
    assert_eq!(all(&log.group(1)), entries(1, 7..10, 10));
    assert_eq!(log.group(1).state().purged, Some(id(1, 6)));
    let state = log.group(2).state();
    assert_eq!((state.purged, state.last), (Some(id(3, 99)), Some(id(3, 99))));
    append(&log.group(2), entries(3, 100..102, 10));
    append(&log.group(4), entries(3, 51..52, 10));
    log.close();
    assert_eq!(all(&open(dir.path()).group(2)), entries(3, 100..102, 10));
}

#[test]
fn the_same_indexes_can_be_written_again_after_a_truncation() {
    let dir = tempfile::tempdir().unwrap();
    let log = RaftLog::open(dir.path(), uncached()).unwrap().0;
    let group = log.group(1);
    for term in 1..60 {
        group.append(entries(term, 0..20, 150), ignore()).unwrap();
        if term % 3 == 0 {
            sync(&log);
        }
        assert_eq!(all(&group), entries(term, 0..20, 150));
        // The very same entries again.
        group.truncate_after(Some(id(term, 9))).unwrap();
        group.append(entries(term, 10..20, 150), ignore()).unwrap();
        if term < 59 {
            group.truncate_after(None).unwrap();
            assert_eq!(group.state().last, None);
        }
    }
    log.close();
    let log = RaftLog::open(dir.path(), uncached()).unwrap().0;
    assert_eq!(all(&log.group(1)), entries(59, 0..20, 150));
}

#[test]
fn votes_and_commits_of_idle_groups_survive_the_recycling_of_their_segment() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let vote = Vote { term: 8, node: 2, committed: true };
    log.group(1).save_vote(vote, ignore()).unwrap();
    log.group(2).purge(id(1, 30)).unwrap();
    log.group(2).save_committed(Some(id(1, 30)));
    let busy = log.group(3);
    let mut next = 0;
    while log.metrics().recycled_segments < 5 {
        append(&busy, entries(1, next..next + 10, 500));
        busy.purge(id(1, next + 9)).unwrap();
        next += 10;
    }
    log.close();
    assert!(!segment(dir.path(), 1).exists());
    let log = open(dir.path());
    assert_eq!(log.group(1).state().vote, Some(vote));
    assert_eq!(log.group(2).state().purged, Some(id(1, 30)));
    assert_eq!(log.group(2).state().committed, Some(id(1, 30)));
}

#[test]
fn a_slow_group_does_not_pin_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = RaftLog::open(dir.path(), uncached()).unwrap().0;
    let slow = log.group(1);
    let busy = log.group(2);
    append(&slow, entries(1, 0..10, 100));
    let (mut next, mut most) = (0, 0);
    while next < 5000 {
        append(&busy, entries(1, next..next + 10, 500));
        if next == 2000 {
            append(&slow, entries(1, 10..15, 100));
        }
        busy.purge(id(1, next + 5)).unwrap();
        next += 10;
        most = most.max(log.metrics().segments);
    }
    assert!(log.metrics().moved_entries >= 10, "{:?}", log.metrics());
    assert!(most <= 8, "{most} segments for a few live entries");
    assert_eq!(all(&slow), entries(1, 0..15, 100));
    let crashed = image(dir.path(), None);
    assert_eq!(all(&open(crashed.path()).group(1)), entries(1, 0..15, 100));
    log.close();
    let log = open(dir.path());
    assert_eq!(all(&log.group(1)), entries(1, 0..15, 100));
    assert_eq!(all(&log.group(2)).len(), 4);
}

#[test]
fn readers_never_see_a_recycled_segment() {
    let dir = tempfile::tempdir().unwrap();
    let log = RaftLog::open(dir.path(), uncached()).unwrap().0;
    let group = log.group(1);
    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Some(purged) = group.state().purged else { continue };
                    let from = purged.index + 1;
                    match group.read(from..from + 50, usize::MAX) {
                        Ok(read) => {
                            assert_eq!(read, entries(1, from..from + read.len() as u64, 400));
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(LogError::Purged { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        let mut next = 0;
        while reads.load(Ordering::Relaxed) < 500 || log.metrics().recycled_segments < 20 {
            append(&group, entries(1, next..next + 20, 400));
            next += 20;
            if next > 300 {
                group.purge(id(1, next - 300)).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn the_segment_size_may_change_between_starts() {
    let dir = tempfile::tempdir().unwrap();
    let mut next = 0;
    for segment_bytes in [64 * 1024, 256 * 1024, 64 * 1024, 100_000] {
        let log = RaftLog::open(dir.path(), Config { segment_bytes, ..config() }).unwrap().0;
        append(&log.group(1), entries(1, next..next + 300, 1000));
        next += 300;
        assert_eq!(all(&log.group(1)), entries(1, 0..next, 1000));
        log.close();
    }
    assert!(matches!(
        RaftLog::open(dir.path(), Config { segment_bytes: 1000, ..config() }),
        Err(LogError::InvalidConfig { .. })
    ));
}

#[test]
fn a_log_may_close_itself_from_a_callback() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let handle = log.clone();
    let (sender, closed) = std::sync::mpsc::channel();
    let done = Box::new(move |_| {
        handle.close();
        sender.send(()).unwrap();
    });
    log.group(1).append(entries(1, 0..1, 1), done).unwrap();
    closed.recv().unwrap();
    assert!(matches!(log.group(1).append(entries(1, 1..2, 1), ignore()), Err(LogError::Closed)));
}
