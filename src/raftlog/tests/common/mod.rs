//! Helpers of the log's tests: small segments, waiting for durability, and images of a directory as a
//! crash would leave it.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc,
};

use bytes::Bytes;
use tempfile::TempDir;
use tombolo_raftlog::{Config, Done, Entry, EntryKind, Group, LogError, LogId, RaftLog};

/// Where the first batch of a segment starts.
pub(crate) const DATA_START: usize = 4096;
pub(crate) const FRAME_HEADER: usize = 44;

pub(crate) fn config() -> Config {
    Config { segment_bytes: 64 * 1024, cache_bytes: 1 << 20, spare_segments: 2 }
}

/// Nothing stays in memory once it is durable.
pub(crate) fn uncached() -> Config {
    Config { cache_bytes: 0, ..config() }
}

pub(crate) fn open(dir: &Path) -> RaftLog {
    RaftLog::open(dir, config()).unwrap().0
}

pub(crate) fn open_error(dir: &Path) -> LogError {
    match RaftLog::open(dir, config()) {
        Ok((_, recovery)) => panic!("opened: {recovery:?}"),
        Err(error) => error,
    }
}

pub(crate) fn id(term: u64, index: u64) -> LogId {
    LogId { term, node: 7, index }
}

pub(crate) fn entry(term: u64, index: u64, len: usize) -> Entry {
    let seed = term.wrapping_mul(31).wrapping_add(index);
    let payload: Vec<u8> = (0..len as u64).map(|i| (seed.wrapping_add(i) % 251) as u8).collect();
    let kind = if index.is_multiple_of(7) { EntryKind::Membership } else { EntryKind::Normal };
    Entry { id: id(term, index), kind, payload: Bytes::from(payload) }
}

pub(crate) fn entries(term: u64, range: std::ops::Range<u64>, len: usize) -> Vec<Entry> {
    range.map(|index| entry(term, index, len)).collect()
}

/// A callback, and the receiver that waits for it.
pub(crate) fn done() -> (Done, mpsc::Receiver<bool>) {
    let (sender, receiver) = mpsc::channel();
    (Box::new(move |result| sender.send(result.is_ok()).unwrap_or(())), receiver)
}

pub(crate) fn ignore() -> Done {
    Box::new(|_| {})
}

pub(crate) fn append(group: &Group, entries: Vec<Entry>) {
    let (done, wait) = done();
    group.append(entries, done).unwrap();
    assert!(wait.recv().unwrap());
}

/// Waits until everything submitted before is durable.
pub(crate) fn sync(log: &RaftLog) {
    let (done, wait) = done();
    let group = log.group(u64::MAX);
    let vote = tombolo_raftlog::Vote { term: 1, node: 1, committed: false };
    group.save_vote(vote, done).unwrap();
    assert!(wait.recv().unwrap());
}

pub(crate) fn all(group: &Group) -> Vec<Entry> {
    let state = group.state();
    let Some(last) = state.last else { return Vec::new() };
    let mut next = match state.purged {
        Some(purged) => purged.index + 1,
        None => (0..2).find(|index| group.log_id(*index).is_some()).unwrap_or(0),
    };
    let mut out = Vec::new();
    while next <= last.index {
        let read = group.read(next..last.index + 1, 10_000).unwrap();
        assert!(!read.is_empty());
        next += read.len() as u64;
        out.extend(read);
    }
    out
}

pub(crate) fn segment(dir: &Path, seq: u32) -> PathBuf {
    dir.join(format!("{seq:08}.log"))
}

pub(crate) fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    found.sort();
    found
}

/// The watermark as it is now, for an image taken later: as if it had not been raised since.
pub(crate) fn watermark(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("watermark")).unwrap()
}

/// A copy of the directory, as a crash right now would leave it. Files come and go in the
/// background, so a copy during which that happened is no moment's image and is made again.
pub(crate) fn image(dir: &Path, watermark: Option<&[u8]>) -> TempDir {
    loop {
        let before = (segments(dir), self::watermark(dir));
        let copy = tempfile::tempdir().unwrap();
        let copied = before
            .0
            .iter()
            .all(|path| fs::copy(path, copy.path().join(path.file_name().unwrap())).is_ok());
        let mark = watermark.unwrap_or(&before.1);
        fs::write(copy.path().join("watermark"), mark).unwrap();
        if copied && before == (segments(dir), self::watermark(dir)) {
            return copy;
        }
    }
}

/// Offsets and lengths of the batches of a segment, by following their headers.
pub(crate) fn batches(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut out = Vec::new();
    let mut offset = DATA_START;
    while bytes.len() >= offset + FRAME_HEADER && bytes[offset + 8] == 1 {
        let number =
            |at: usize| u64::from_le_bytes(bytes[offset + at..offset + at + 8].try_into().unwrap());
        if number(12) != offset as u64 {
            break;
        }
        let len = usize::try_from(number(20)).unwrap();
        out.push((offset, len));
        offset += len;
    }
    out
}
