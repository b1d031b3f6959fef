//! The ledger's two orders, what is found to be forgotten, and that nothing of it depends on how entries
//! are grouped or on restarts.

use tombolo_core::{
    Change, Command, Content, Dot, VersionVector,
    command::{ForgetConflicts, Merge},
    ledger::Cause,
    record::Sibling,
    repair::Trust,
};

use super::*;
use crate::testing::*;

fn lost(key: &str, seq: u64, noted: u64, value: &'static str) -> LedgerEntry {
    LedgerEntry {
        key: Bytes::copy_from_slice(key.as_bytes()),
        loser: Sibling {
            request: None,
            dot: Dot { actor: REMOTE, seq },
            time: time(seq),
            content: Content::value(value),
        },
        winner: Dot { actor: LOCAL, seq },
        winner_time: time(seq + 1),
        cause: Cause::Rule,
        noted: time(noted),
    }
}

/// A repair that brings these entries at that time.
fn bring(namespace: NamespaceId, at: u64, ledger: Vec<LedgerEntry>) -> Command {
    Command::Merge(Merge {
        namespace,
        rule: rule(namespace),
        local: LOCAL,
        source: REMOTE,
        time: time(at),
        cut: VersionVector::new(),
        ahead: VersionVector::new(),
        trust: Trust::Coverage,
        offers: Vec::new(),
        ledger,
    })
}

fn forget(entries: Vec<Noted>) -> Command {
    Command::ForgetConflicts(ForgetConflicts { namespace: LWW, entries })
}

/// The places of all entries that were noted at `since` or later, the newest first.
fn newest(shard: &ShardStore, since: u64, before: Option<Noted>, limit: usize) -> Vec<Noted> {
    let mut found = Vec::new();
    let take = |noted, _| {
        found.push(noted);
        found.len() < limit
    };
    shard.each_conflict(LWW, time(since), before, take).unwrap();
    found
}

#[test]
fn entries_are_found_by_id_and_by_time_in_pages() {
    let (_dir, _store, shard) = fresh();
    let entries: Vec<_> = (1..=9).map(|at| lost("k", at, 20 - at, "v")).collect();
    run(
        &shard,
        &[bring(LWW, 99, entries.clone()), bring(SIBLINGS, 99, vec![lost("o", 1, 5, "w")])],
    );

    let mut expected: Vec<Noted> = entries.iter().map(|entry| entry.place(LWW)).collect();
    expected.sort_unstable();
    expected.reverse();
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = newest(&shard, 0, before, 2);
        let Some(last) = page.last() else { break };
        before = Some(*last);
        found.extend(page);
    }
    assert_eq!(found, expected);
    assert_eq!(newest(&shard, 15, None, 99), expected[..5]);
    assert_eq!(newest(&shard, 30, None, 99), []);
    assert_eq!(shard.oldest_conflict(LWW).unwrap(), Some(time(11)));
    assert_eq!(shard.oldest_conflict(NamespaceId(99)).unwrap(), None);
    for entry in &entries {
        assert_eq!(shard.ledger_entry(LWW, entry.id(LWW)).unwrap().as_ref(), Some(entry));
        assert_eq!(shard.ledger_entry(SIBLINGS, entry.id(LWW)).unwrap(), None);
    }
}

#[test]
fn the_old_and_what_exceeds_the_budget_is_found_oldest_first() {
    let (_dir, _store, shard) = fresh();
    let entries: Vec<_> = (1..=6).map(|at| lost("k", at, 10 * at, "v")).collect();
    run(&shard, &[bring(LWW, 99, entries.clone())]);
    let places: Vec<Noted> = entries.iter().map(|entry| entry.place(LWW)).collect();
    let one = entries[0].to_bytes().len() as u64;
    let find =
        |before, bytes, limit| shard.conflicts_to_forget(LWW, time(before), bytes, limit).unwrap();

    assert_eq!(find(0, u64::MAX, 99), []);
    assert_eq!(find(30, u64::MAX, 99), places[..2], "noted before that, not then");
    assert_eq!(find(30, u64::MAX, 1), places[..1]);
    assert_eq!(find(0, 6 * one, 99), []);
    assert_eq!(find(0, 6 * one - 1, 99), places[..1]);
    assert_eq!(find(0, 0, 99), places);
    assert_eq!(find(50, 6 * one - 1, 99), places[..4], "whichever goes further");
    assert_eq!(shard.conflicts_to_forget(SIBLINGS, time(99), 0, 9).unwrap(), []);

    run(&shard, &[forget(find(30, 3 * one, 99))]);
    assert_eq!(newest(&shard, 0, None, 99), [places[5], places[4], places[3]]);
    assert_eq!(shard.ledger_sizes()[&LWW], LedgerSize { entries: 3, bytes: 3 * one });
    run(&shard, &[forget(places)]);
    assert_eq!(shard.ledger_sizes(), BTreeMap::new());
    dump(&shard);
}

#[test]
fn an_entry_that_is_there_stays_and_one_that_was_forgotten_may_come_anew() {
    let (first, again) = (lost("k", 1, 10, "v"), lost("k", 1, 70, "v"));
    let steps = [
        bring(LWW, 99, vec![first.clone()]),
        bring(LWW, 99, vec![again.clone()]),
        forget(vec![again.place(LWW)]),
        forget(vec![first.place(LWW)]),
        bring(LWW, 99, vec![again.clone()]),
        forget(vec![first.place(LWW)]),
        bring(LWW, 99, vec![first.clone()]),
    ];
    // As entries of their own, and all in one.
    let (_dir, _store, single) = fresh();
    for (step, is_gone) in steps.iter().zip([false, false, false, true, false, false, false]) {
        run(&single, std::slice::from_ref(step));
        assert_eq!(single.ledger_entry(LWW, first.id(LWW)).unwrap().is_none(), is_gone);
        dump(&single);
    }
    assert_eq!(single.ledger_entry(LWW, first.id(LWW)).unwrap().as_ref(), Some(&again));
    let (dir, store, together) = fresh();
    run(&together, &steps);
    assert_eq!(dump(&together).ledger, dump(&single).ledger);
    assert_eq!(together.ledger_sizes(), single.ledger_sizes());

    store.flush().unwrap();
    drop((together, store));
    let (_store, back) = open(dir.path());
    assert_eq!(back.ledger_sizes(), single.ledger_sizes());
}

#[test]
fn no_entry_is_noted_later_than_it_came() {
    let (_dir, _store, shard) = fresh();
    run(&shard, &[bring(LWW, 50, vec![lost("k", 1, u64::from(u32::MAX), "v")])]);
    assert_eq!(newest(&shard, 0, None, 9)[0].at, time(50));
}

#[test]
fn what_a_change_drops_is_noted_when_it_comes_not_when_it_was_written() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(10, vec![put("k", "mine")]));
    let sibling = Sibling {
        request: None,
        dot: Dot { actor: REMOTE, seq: 1 },
        time: time(5),
        content: Content::value("theirs"),
    };
    let delta = tombolo_core::record::Delta {
        key: "k".into(),
        sibling,
        supersedes: Vec::new(),
        pushed_out: tombolo_core::record::PushedOut::default(),
    };
    let change = Change {
        request: None,
        actor: REMOTE,
        first_seq: 1,
        depends_on: VersionVector::new(),
        ahead_by: VersionVector::new(),
        deltas: vec![delta],
    };
    let Command::Ingest(mut ingest) = ingest(LWW, LOCAL, vec![change]) else { panic!() };
    ingest.time = time(4000);
    run(&shard, &[Command::Ingest(ingest)]);
    assert_eq!(newest(&shard, 0, None, 9)[0].at, time(4000));
    assert_eq!(shard.conflicts_to_forget(LWW, time(4000), u64::MAX, 9).unwrap(), []);
}
