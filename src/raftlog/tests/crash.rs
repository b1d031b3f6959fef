//! What survives a crash, and what is refused: the directory is copied while the log runs, damaged, opened.
#![allow(clippy::unwrap_used, reason = "a failed step of a test should stop it")]

mod common;

use std::{fs, path::Path};

use common::*;
use tempfile::TempDir;
use tombolo_raftlog::{LogError, RaftLog, Vote};

const VOTE: Vote = Vote { term: 3, node: 7, committed: true };

/// Five synced batches in one segment; the watermark knows of none of them.
fn five_batches() -> (TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let mark = watermark(dir.path());
    let (one, two) = (log.group(1), log.group(2));
    append(&one, entries(1, 0..3, 20));
    append(&two, entries(1, 1..3, 5));
    append(&one, entries(2, 3..4, 33));
    append(&one, entries(2, 4..6, 10));
    append(&two, entries(2, 3..6, 21));
    let copy = image(dir.path(), Some(&mark));
    let bytes = fs::read(segment(copy.path(), 1)).unwrap();
    assert_eq!(batches(&bytes).len(), 5);
    (copy, bytes)
}

/// Opens a copy with these bytes as its only segment.
fn with_segment(dir: &Path, bytes: &[u8]) -> (TempDir, Result<RaftLog, LogError>) {
    let copy = image(dir, None);
    fs::write(segment(copy.path(), 1), bytes).unwrap();
    let opened = RaftLog::open(copy.path(), config()).map(|(log, _)| log);
    (copy, opened)
}

fn last_indexes(log: &RaftLog) -> (Option<u64>, Option<u64>) {
    let last = |group| log.group(group).state().last.map(|id| id.index);
    (last(1), last(2))
}

#[test]
fn a_tail_torn_at_any_byte_leaves_exactly_the_synced_batches() {
    let (dir, bytes) = five_batches();
    let batches = batches(&bytes);
    let expected =
        [(None, None), (Some(2), None), (Some(2), Some(2)), (Some(3), Some(2)), (Some(5), Some(2))];
    for (whole, (offset, len)) in batches.iter().enumerate().skip(3) {
        for cut in *offset..offset + len {
            // A batch is whole as soon as nothing but zero padding is missing.
            let padding_only = bytes[cut..offset + len].iter().all(|byte| *byte == 0);
            let expected = if padding_only { None } else { Some(expected[whole]) };
            let zeroed: Vec<u8> =
                bytes[..cut].iter().copied().chain(vec![0; bytes.len() - cut]).collect();
            for torn in [&zeroed[..], &bytes[..cut]] {
                let (copy, opened) = with_segment(dir.path(), torn);
                let log = opened.unwrap();
                if let Some(expected) = expected {
                    assert_eq!(last_indexes(&log), expected, "cut at {cut}");
                }
                if cut % 8 != 0 {
                    continue;
                }
                // The log goes on where it was cut, and the result survives a restart.
                let next = log.group(1).state().last.unwrap().index + 1;
                append(&log.group(1), entries(9, next..next + 2, 30));
                log.close();
                let log = open(copy.path());
                let read = log.group(1).read(0..u64::MAX, usize::MAX).unwrap();
                assert_eq!(read[read.len() - 2..], entries(9, next..next + 2, 30));
                assert_eq!(
                    fs::metadata(segment(copy.path(), 1)).unwrap().len(),
                    config().segment_bytes
                );
            }
        }
    }
}

#[test]
fn a_batch_whose_pages_reached_the_disk_in_the_wrong_order_is_cut_as_a_whole() {
    let (dir, bytes) = five_batches();
    let (offset, len) = batches(&bytes)[4];
    for hole in offset..offset + len - 8 {
        let mut torn = bytes.clone();
        if torn[hole..hole + 8].iter().all(|byte| *byte == 0) {
            continue;
        }
        torn[hole..hole + 8].fill(0);
        let (_copy, opened) = with_segment(dir.path(), &torn);
        assert_eq!(last_indexes(&opened.unwrap()), (Some(5), Some(2)), "hole at {hole}");
    }
}

#[test]
fn a_flipped_bit_in_any_earlier_byte_is_refused_with_file_and_offset() {
    let (dir, bytes) = five_batches();
    let last = batches(&bytes)[4].0;
    for at in DATA_START..last {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let (copy, opened) = with_segment(dir.path(), &bad);
        match opened {
            Err(LogError::Corrupt { file, offset, .. }) => {
                assert_eq!(file, segment(copy.path(), 1));
                let offset = usize::try_from(offset).unwrap();
                assert!(offset <= at && at < offset + 256, "byte {at}, reported {offset}");
            }
            Err(error) => panic!("byte {at}: {error}"),
            Ok(_) => panic!("byte {at}: opened"),
        }
    }
}

#[test]
fn a_flipped_bit_in_the_header_is_refused() {
    let (dir, bytes) = five_batches();
    for at in 0..52 {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let (_copy, opened) = with_segment(dir.path(), &bad);
        match opened {
            Err(LogError::NotASegment { .. }) if at < 8 => {}
            Err(LogError::Corrupt { offset: 0, .. }) if at >= 8 => {}
            other => panic!("byte {at}: {:?}", other.err()),
        }
    }
}

#[test]
fn damage_in_a_sealed_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    append(&log.group(1), entries(1, 0..150, 1000));
    let copy = image(dir.path(), None);
    assert!(segments(copy.path()).len() >= 3);
    for seq in [1, 2] {
        let path = segment(copy.path(), seq);
        let good = fs::read(&path).unwrap();
        let end = batches(&good).last().map(|(offset, len)| offset + len).unwrap();
        for at in (DATA_START..end - 8).step_by(997) {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).unwrap();
            let error = open_error(copy.path());
            assert!(matches!(&error, LogError::Corrupt { file, .. } if *file == path), "{error}");
        }
        fs::write(&path, &good[..end - 100]).unwrap();
        assert!(matches!(open_error(copy.path()), LogError::Corrupt { .. }));
        fs::write(&path, &good).unwrap();
    }
    drop(open(copy.path()));
}

#[test]
fn every_crash_point_of_a_rotating_log_keeps_what_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let group = log.group(1);
    for index in 0..120 {
        append(&group, entries(1, index..index + 1, 3000));
        if index % 10 == 9 {
            group.purge(id(1, index - 5)).unwrap();
        }
        let copy = image(dir.path(), None);
        let reopened = open(copy.path());
        assert_eq!(reopened.group(1).state().last, Some(id(1, index)));
        assert!(all(&reopened.group(1)).len() >= 5.min(usize::try_from(index).unwrap()));
    }
    assert!(log.metrics().recycled_segments > 2);
}

#[test]
fn frames_of_an_earlier_use_of_a_segment_are_never_read() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let group = log.group(1);
    let mut next = 0;
    // Every entry has the same size, so that old frames sit exactly where new ones will come.
    while log.metrics().recycled_segments < 6 {
        append(&group, entries(1, next..next + 1, 1000));
        group.purge(id(1, next)).unwrap();
        next += 1;
    }
    append(&group, entries(1, next..next + 1, 1000));
    let copy = image(dir.path(), None);
    let newest = segments(copy.path()).pop().unwrap();
    let bytes = fs::read(&newest).unwrap();
    assert!(bytes[bytes.len() / 2..].iter().any(|byte| *byte != 0), "the file was used before");
    let (reopened, recovery) = RaftLog::open(copy.path(), config()).unwrap();
    assert_eq!(all(&reopened.group(1)), entries(1, next..next + 1, 1000));
    assert_eq!(recovery.entries, 1);
}

#[test]
fn a_missing_segment_is_noticed_wherever_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    append(&log.group(1), entries(1, 0..10, 100));
    append(&log.group(2), entries(1, 0..200, 1000));
    log.close();
    let count = segments(dir.path()).len();
    assert!(count >= 4);
    for missing in 0..count {
        let copy = image(dir.path(), None);
        let path = segments(copy.path())[missing].clone();
        fs::remove_file(&path).unwrap();
        let error = open_error(copy.path());
        match &error {
            LogError::MissingSegment { file, .. } if missing > 0 => {
                assert_eq!(*file, path, "{error}")
            }
            // Of the oldest only its live entries are missed.
            LogError::MissingEntry { group: 1, index: 0, .. } if missing == 0 => {}
            LogError::Corrupt { .. } if missing == 0 => {}
            _ => panic!("segment {missing}: {error}"),
        }
    }
    let copy = image(dir.path(), None);
    for path in segments(copy.path()) {
        fs::remove_file(path).unwrap();
    }
    assert!(matches!(open_error(copy.path()), LogError::MissingSegment { .. }));
}

#[test]
fn a_log_shorter_than_its_watermark_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    append(&log.group(3), entries(1, 0..2, 10));
    append(&log.group(3), entries(1, 2..4, 10));
    log.close();
    let bytes = fs::read(segment(dir.path(), 1)).unwrap();
    let (offset, len) = *batches(&bytes).last().unwrap();
    for at in offset..offset + len - 8 {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let (_copy, opened) = with_segment(dir.path(), &bad);
        match opened {
            Err(LogError::BehindWatermark { group, watermark, found }) => {
                assert_eq!(group, 3);
                assert_eq!(watermark.last, Some(id(1, 3)));
                assert_eq!(found.last, Some(id(1, 1)));
            }
            other => panic!("byte {at}: {:?}", other.err()),
        }
    }
}

#[test]
fn a_lost_vote_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let (done, wait) = done();
    log.group(3).save_vote(VOTE, done).unwrap();
    assert!(wait.recv().unwrap());
    log.close();
    let bytes = fs::read(segment(dir.path(), 1)).unwrap();
    let (_copy, opened) = with_segment(dir.path(), &bytes[..DATA_START + 60]);
    let error = opened.err().unwrap();
    assert!(
        matches!(&error, LogError::BehindWatermark { group: 3, watermark, .. } if watermark.vote == Some(VOTE))
    );
    assert!(error.to_string().contains("new node id"), "{error}");
    let log = open(dir.path());
    assert_eq!(log.group(3).state().vote, Some(VOTE));
}

#[test]
fn a_truncated_log_is_never_taken_for_a_short_one() {
    for crash in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let log = open(dir.path());
        let group = log.group(1);
        append(&group, entries(1, 0..10, 10));
        log.close();
        let log = open(dir.path());
        let group = log.group(1);
        group.truncate_after(Some(id(1, 4))).unwrap();
        sync(&log);
        let copy = crash.then(|| image(dir.path(), None));
        log.close();
        let reopened = open(copy.as_ref().map_or(dir.path(), TempDir::path));
        assert_eq!(reopened.group(1).state().last, Some(id(1, 4)));
        // Longer again, with other entries at the same indexes, and still above the first mark.
        append(&reopened.group(1), entries(2, 5..20, 10));
        let again = image(copy.as_ref().map_or(dir.path(), TempDir::path), None);
        assert_eq!(all(&open(again.path()).group(1))[5..], entries(2, 5..20, 10));
    }
}

#[test]
fn damaged_or_missing_watermarks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    append(&log.group(1), entries(1, 0..2, 10));
    log.close();
    let copy = image(dir.path(), Some(&[0; 600_000]));
    assert!(matches!(open_error(copy.path()), LogError::WatermarkUnreadable { .. }));
    fs::remove_file(copy.path().join("watermark")).unwrap();
    assert!(matches!(open_error(copy.path()), LogError::WatermarkMissing { .. }));
}
