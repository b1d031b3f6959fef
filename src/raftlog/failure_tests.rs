//! What happens when the disk refuses: everyone who waits hears of it, and nothing is written after it.

use std::{
    io,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use bytes::Bytes;

use crate::{Config, Entry, EntryKind, LogError, LogId, RaftLog, Vote};

/// Makes the writer's disk fail on demand.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    pub(crate) write: AtomicBool,
    pub(crate) sync: AtomicBool,
}

impl Faults {
    pub(crate) fn before_write(&self) -> io::Result<()> {
        if self.write.load(Ordering::SeqCst) {
            Err(io::Error::other("injected write error"))
        } else {
            Ok(())
        }
    }

    pub(crate) fn before_sync(&self) -> io::Result<()> {
        if self.sync.load(Ordering::SeqCst) {
            Err(io::Error::other("injected sync error"))
        } else {
            Ok(())
        }
    }
}

fn entry(index: u64) -> Entry {
    let id = LogId { term: 1, node: 1, index };
    Entry { id, kind: EntryKind::Normal, payload: Bytes::from_static(b"value") }
}

fn config() -> Config {
    Config { segment_bytes: 64 * 1024, cache_bytes: 1 << 20, spare_segments: 1 }
}

fn check_failure(break_disk: impl Fn(&Faults), expected: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = RaftLog::open(dir.path(), config()).unwrap();
    let group = log.group(1);
    let (results, received) = mpsc::channel();
    let done = |name: &'static str| {
        let results = results.clone();
        Box::new(move |result: io::Result<()>| results.send((name, result.is_ok())).unwrap())
    };
    group.append(vec![entry(0)], done("before")).unwrap();
    assert_eq!(received.recv().unwrap(), ("before", true));

    let (hook, hooked) = mpsc::channel();
    let hook_again = hook.clone();
    log.on_failure(Box::new(move |reason| hook.send(reason.to_owned()).unwrap()));
    break_disk(log.faults());
    // The first one may fail before the others are submitted; these are then refused.
    group.append(vec![entry(1)], done("first")).unwrap();
    let second = group.append(vec![entry(2)], done("second"));
    let third = log.group(2).save_vote(Vote { term: 1, node: 1, committed: false }, done("third"));
    assert_eq!(received.recv().unwrap(), ("first", false));
    for (name, submitted) in [("second", second), ("third", third)] {
        match submitted {
            Ok(()) => assert_eq!(received.recv().unwrap(), (name, false)),
            Err(error) => assert!(matches!(error, LogError::Failed { .. }), "{error}"),
        }
    }
    assert!(hooked.recv().unwrap().contains(expected));
    assert!(log.failed().unwrap().contains(expected));

    // A disk that works again changes nothing: what was in flight stays unknown.
    log.faults().write.store(false, Ordering::SeqCst);
    log.faults().sync.store(false, Ordering::SeqCst);
    assert!(matches!(group.append(vec![entry(3)], done("late")), Err(LogError::Failed { .. })));
    assert!(matches!(group.purge(entry(0).id), Err(LogError::Failed { .. })));
    log.on_failure(Box::new(move |reason| hook_again.send(reason.to_owned()).unwrap()));
    assert!(hooked.recv().unwrap().contains(expected), "a late hook is called at once");
    log.close();
    drop((log, group));
    let (log, _) = RaftLog::open(dir.path(), config()).unwrap();
    assert!(log.group(1).log_id(0).is_some(), "what was acknowledged is there");
}

#[test]
fn a_failed_sync_fails_the_log_for_good_and_reaches_every_waiter() {
    check_failure(|faults| faults.sync.store(true, Ordering::SeqCst), "injected sync error");
}

#[test]
fn a_failed_write_fails_the_log_for_good_and_reaches_every_waiter() {
    check_failure(|faults| faults.write.store(true, Ordering::SeqCst), "injected write error");
}

#[test]
fn a_panicking_callback_fails_the_log_instead_of_hanging_it() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = RaftLog::open(dir.path(), config()).unwrap();
    let (hook, hooked) = mpsc::channel();
    log.on_failure(Box::new(move |reason| hook.send(reason.to_owned()).unwrap()));
    log.group(1).append(vec![entry(0)], Box::new(|_| panic!("expected by the test"))).unwrap();
    assert!(hooked.recv().unwrap().contains("panicked"));
    assert!(matches!(log.group(1).append(vec![], Box::new(|_| {})), Err(LogError::Failed { .. })));
}
