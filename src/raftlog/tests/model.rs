//! Random operations on interleaved groups against a plain in-memory model, with restarts and crashes.
#![allow(clippy::unwrap_used, reason = "a failed step of a test should stop it")]

mod common;

use std::collections::BTreeMap;

use common::*;
use proptest::prelude::*;
use tempfile::TempDir;
use tombolo_raftlog::{Config, Entry, GroupState, LogId, RaftLog, Vote};

#[derive(Clone, Debug)]
enum Op {
    Append { group: u64, count: u64, len: usize },
    Truncate { group: u64, keep: u64 },
    Purge { group: u64, share: u64 },
    Vote { group: u64, term: u64 },
    Commit { group: u64, share: u64 },
    Sync,
    Restart,
    Crash,
}

/// What a group should say.
#[derive(Clone, Debug, Default)]
struct Model {
    purged: Option<LogId>,
    first: u64,
    entries: Vec<Entry>,
    vote: Option<Vote>,
    committed: Option<LogId>,
}

impl Model {
    fn state(&self) -> GroupState {
        GroupState {
            purged: self.purged,
            last: self.entries.last().map(|entry| entry.id).or(self.purged),
            vote: self.vote,
            committed: self.committed,
        }
    }

    fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }
}

fn op() -> impl Strategy<Value = Op> {
    let group = 0..5_u64;
    prop_oneof![
        10 => (group.clone(), 1..12_u64, 0..900_usize).prop_map(|(group, count, len)| Op::Append { group, count, len }),
        2 => (group.clone(), 0..100_u64).prop_map(|(group, keep)| Op::Truncate { group, keep }),
        3 => (group.clone(), 0..120_u64).prop_map(|(group, share)| Op::Purge { group, share }),
        1 => (group.clone(), 0..50_u64).prop_map(|(group, term)| Op::Vote { group, term }),
        2 => (group, 0..100_u64).prop_map(|(group, share)| Op::Commit { group, share }),
        2 => Just(Op::Sync),
        1 => Just(Op::Restart),
        1 => Just(Op::Crash),
    ]
}

fn check(log: &RaftLog, models: &BTreeMap<u64, Model>) {
    for (number, model) in models {
        let group = log.group(*number);
        assert_eq!(group.state(), model.state(), "group {number}");
        assert_eq!(all(&group), model.entries, "group {number}");
        let bytes: usize =
            model.entries.iter().skip(1).map(|entry| entry.payload.len() + FRAME_HEADER).sum();
        assert_eq!(group.bytes_after(model.first), bytes as u64);
    }
}

fn run(ops: Vec<Op>, config: &Config) {
    let mut dir: TempDir = tempfile::tempdir().unwrap();
    let mut log = RaftLog::open(dir.path(), config.clone()).unwrap().0;
    let mut models: BTreeMap<u64, Model> = BTreeMap::new();
    let mut term = 1;
    for op in ops {
        match op {
            Op::Append { group, count, len } => {
                let model = models.entry(group).or_default();
                let new = entries(term, model.next()..model.next() + count, len);
                log.group(group).append(new.clone(), ignore()).unwrap();
                model.entries.extend(new);
            }
            Op::Truncate { group, keep } => {
                term += 1;
                let model = models.entry(group).or_default();
                let keep = usize::try_from(keep).unwrap() * model.entries.len() / 100;
                model.entries.truncate(keep);
                log.group(group).truncate_after(model.state().last).unwrap();
            }
            Op::Purge { group, share } => {
                let model = models.entry(group).or_default();
                let upto = model.first + share * (model.entries.len() as u64) / 100;
                let id = model.entries.iter().map(|entry| entry.id).find(|id| id.index == upto);
                let id = id.unwrap_or(LogId { term, node: 7, index: upto });
                log.group(group).purge(id).unwrap();
                model.purged = Some(id);
                model.entries.retain(|entry| entry.id.index > upto);
                model.first = upto + 1;
            }
            Op::Vote { group, term } => {
                let vote = Vote { term, node: 1, committed: term % 2 == 0 };
                log.group(group).save_vote(vote, ignore()).unwrap();
                models.entry(group).or_default().vote = Some(vote);
            }
            Op::Commit { group, share } => {
                let model = models.entry(group).or_default();
                let index = usize::try_from(share).unwrap() * model.entries.len() / 100;
                model.committed = model.entries.get(index).map(|entry| entry.id);
                log.group(group).save_committed(model.committed);
            }
            Op::Sync => sync(&log),
            Op::Restart => {
                log.close();
                log = RaftLog::open(dir.path(), config.clone()).unwrap().0;
                check(&log, &models);
            }
            Op::Crash => {
                sync(&log);
                let copy = image(dir.path(), None);
                drop(log);
                dir = copy;
                log = RaftLog::open(dir.path(), config.clone()).unwrap().0;
                check(&log, &models);
            }
        }
    }
    check(&log, &models);
    log.close();
    log = RaftLog::open(dir.path(), config.clone()).unwrap().0;
    check(&log, &models);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_log_agrees_with_the_model(ops in prop::collection::vec(op(), 1..250)) {
        run(ops, &config());
    }

    #[test]
    fn the_log_agrees_with_the_model_when_every_read_is_from_disk(ops in prop::collection::vec(op(), 1..250)) {
        run(ops, &Config { spare_segments: 0, ..uncached() });
    }
}
