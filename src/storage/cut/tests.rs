//! A cut stays as it was, and a repair over two stores makes them equal.

use tombolo_core::{
    Command, Outcome, Rule,
    command::{Advance, Merge, Merged},
    merkle::{self, FAN_OUT},
    repair::{self, Offer, Trust},
};

use super::*;
use crate::testing::{LOCAL, LWW, REMOTE, delete, fresh, put, run, run_write, write};

#[test]
fn a_cut_stays_as_it_was() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1"), put("b", "1")]));
    run_write(&shard, write(2, vec![delete("b")]));
    let cut = shard.cut(LWW);
    run_write(&shard, write(3, vec![put("a", "2"), put("c", "1"), put("b", "2")]));

    assert_eq!(cut.frontier().get(LOCAL), 3);
    let mut records = Vec::new();
    cut.records(|key, record| {
        records.push((key, record.siblings()[0].dot.seq));
        true
    })
    .unwrap();
    assert_eq!(records, [(Bytes::from("a"), 1)]);
    assert_eq!(cut.leaf(merkle::leaf_of(b"a")).unwrap().len(), 1);
    assert_eq!(cut.leaf(merkle::leaf_of(b"c")).unwrap().len(), 0);
    let mut dead = 0;
    cut.tombstones(|_, _| {
        dead += 1;
        true
    })
    .unwrap();
    assert_eq!(dead, 1);
    assert_ne!(cut.tree().root(), shard.summary(LWW).root);
}

#[test]
fn a_leaf_that_is_not_what_the_tree_says_is_refused_and_not_taken_for_deleted() {
    let (_dir, store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    let key = Keys::new(shard.id()).hash(LWW, b"a").to_vec();
    store.engine.db.delete_opt(key, &store.engine.write_options).unwrap();
    let listed = shard.cut(LWW).leaf(merkle::leaf_of(b"a"));
    assert!(listed.is_err_and(|error| error.is_corruption()));
}

#[test]
fn a_repair_makes_two_stores_equal_and_jumps_over_what_the_log_never_had() {
    let (_dir, _store, source) = fresh();
    let (_dir2, _store2, receiver) = fresh();
    for number in 0..200 {
        run_write(&source, write(number, vec![put(&format!("k{number}"), "v")]));
    }
    run_write(&source, write(500, vec![delete("k7"), put("k8", "w")]));

    // The receiver is another region, so that the source's events are not its own.
    let (theirs, mine) = (source.cut(LWW), receiver.cut(LWW));
    let (known, cut) = (mine.frontier().clone(), theirs.frontier().clone());
    let mut offers = Vec::new();
    for high in repair::differing_nodes(&mine.tree().nodes(), &theirs.tree().nodes()) {
        let block = theirs.tree().block(high).copied().unwrap_or([0; FAN_OUT]);
        for leaf in repair::differing_leaves(mine.tree(), high, &block) {
            let answer = repair::answer_leaf(&theirs.leaf(leaf).unwrap(), Vec::new(), &known);
            offers.extend(answer.offers);
        }
    }
    theirs
        .tombstones(|key, record| {
            offers.push(Offer::new(key, &record, &known));
            true
        })
        .unwrap();
    let ahead = VersionVector::new();
    let merge = Merge {
        namespace: LWW,
        rule: Rule::Lww,
        local: REMOTE,
        source: LOCAL,
        time: tombolo_core::HybridTime::ZERO,
        cut: cut.clone(),
        ahead: ahead.clone(),
        trust: Trust::Coverage,
        offers,
        ledger: Vec::new(),
    };
    let outcomes = run(&receiver, &[Command::Merge(merge)]);
    assert_eq!(outcomes, [Outcome::Merged(Merged { changed: 200, reused: None })]);
    assert!(!receiver.is_exact(LWW), "the frontier does not say yet what is here");
    assert_eq!(receiver.summary(LWW).root, source.summary(LWW).root);

    let advance = Advance {
        namespace: LWW,
        local: REMOTE,
        source: LOCAL,
        since: known,
        cut: cut.clone(),
        ahead,
    };
    let outcomes = run(&receiver, &[Command::Advance(advance)]);
    assert_eq!(outcomes, [Outcome::Advanced(cut)]);
    assert_eq!(receiver.summary(LWW), source.summary(LWW));
    assert_eq!(receiver.tombstone_counts(), source.tombstone_counts());
    assert_eq!(receiver.scrub(LWW).unwrap().not_indexed, Vec::<u16>::new());
    // What never came as changes cannot be passed on as changes.
    let log = receiver.changes(LWW, LOCAL, 1, 1 << 20);
    assert!(matches!(log, Err(StorageError::Trimmed { .. })), "{log:?}");
    assert_eq!(receiver.trimmed(LWW), source.frontier(LWW));
}
