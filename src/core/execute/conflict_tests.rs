//! What enters the ledger, what leaves it, and that regions agree on it.

use proptest::prelude::*;

use super::*;
use crate::{
    command::{Check, Condition, Operation, Settle},
    ledger::{Cause, LedgerId},
    testing::{MemoryRepair, MemoryState},
};

const NS: NamespaceId = NamespaceId(5);
const KEY: &[u8] = b"k";

fn actor(region: u16) -> Actor {
    Actor { region: RegionId(region), incarnation: 1 }
}

fn time(wall: u64) -> HybridTime {
    HybridTime::new(wall, 0).unwrap()
}

/// A write of the key that replaces what `context` has seen; `None` for all that is there.
fn write(
    region: u16,
    wall: u64,
    rule: Rule,
    content: Content,
    context: Option<VersionVector>,
) -> Command {
    Command::Write(Write {
        namespace: NS,
        rule,
        actor: actor(region),
        time: time(wall),
        request: None,
        checks: Vec::new(),
        operations: vec![Operation { key: Bytes::from_static(KEY), content, context }],
        mutations: Vec::new(),
    })
}

fn run(state: &mut MemoryState, command: &Command) -> Outcome {
    let Ok(outcome) = execute(state, command);
    outcome
}

/// A put that has seen nothing, so that it stays beside all others.
fn put_blind(state: &mut MemoryState, region: u16, wall: u64, value: String) {
    let nothing = Some(VersionVector::new());
    run(state, &write(region, wall, Rule::Siblings, Content::value(value), nothing));
}

/// Takes all that `from` has, at that time.
fn pull(to: &mut MemoryState, from: &MemoryState, local: u16, wall: u64, rule: Rule) {
    let changes = from.changes_above(NS, &to.frontier(NS));
    let (local, source, time) = (actor(local), actor(9), time(wall));
    run(to, &Command::Ingest(Ingest { namespace: NS, rule, local, source, time, changes }));
}

fn siblings(state: &MemoryState) -> Vec<Sibling> {
    state.record(NS, KEY).unwrap().unwrap_or_default().siblings().to_vec()
}

fn noted(state: &MemoryState) -> Vec<(LedgerId, Dot, Cause)> {
    let entry = |((_, id), entry): (&(NamespaceId, LedgerId), &LedgerEntry)| {
        (*id, entry.loser.dot, entry.cause)
    };
    state.ledger.iter().map(entry).collect()
}

#[test]
fn what_the_bound_pushes_out_is_noted_in_every_region_under_the_same_ids() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    for number in 1..=20 {
        put_blind(&mut us, 1, number, format!("v{number}"));
        if number == 10 {
            pull(&mut eu, &us, 2, 10, Rule::Siblings);
        }
    }
    pull(&mut eu, &us, 2, 30, Rule::Siblings);

    for state in [&us, &eu] {
        assert_eq!(siblings(state).len(), SIBLINGS_MAX);
        let mut lost: Vec<_> =
            state.ledger.values().map(|entry| (entry.loser.dot.seq, entry.cause)).collect();
        lost.sort_by_key(|(seq, _)| *seq);
        let oldest: Vec<_> = (1..=4).map(|seq| (seq, Cause::Bound)).collect();
        assert_eq!(lost, oldest);
        for entry in state.ledger.values() {
            let seq = entry.loser.dot.seq;
            assert_eq!(entry.loser.content, Content::value(format!("v{seq}")));
            assert_eq!(entry.winner.seq, seq + 16, "the write that pushed it out");
        }
    }
    assert_eq!(noted(&us), noted(&eu));
    assert_eq!(siblings(&us), siblings(&eu));
}

#[test]
fn what_a_write_has_seen_and_replaced_is_not_lost() {
    let mut us = MemoryState::default();
    for number in 1..=16 {
        put_blind(&mut us, 1, number, format!("v{number}"));
    }
    run(&mut us, &write(1, 20, Rule::Siblings, Content::value("all"), None));
    assert_eq!(siblings(&us).len(), 1);
    assert_eq!(noted(&us), []);
}

#[test]
fn a_deletion_needs_no_room_and_pushes_nothing_out() {
    let mut us = MemoryState::default();
    for number in 1..=16 {
        put_blind(&mut us, 1, number, format!("v{number}"));
    }
    let seen = Some([(actor(1), 1)].into_iter().collect());
    run(&mut us, &write(1, 20, Rule::Siblings, Content::Tombstone, seen));
    assert_eq!(siblings(&us).len(), 15);
    assert_eq!(noted(&us), []);
}

#[test]
fn a_conflict_that_comes_to_light_late_is_noted_then() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    run(&mut us, &write(1, 10, Rule::Lww, Content::value("us"), None));
    run(&mut eu, &write(2, 20, Rule::Lww, Content::value("eu"), None));
    pull(&mut eu, &us, 2, 9000, Rule::Lww);
    let entry = eu.ledger.values().next().unwrap();
    assert_eq!((entry.loser.dot.actor, entry.noted), (actor(1), time(9000)));
    assert_eq!((entry.winner_time, entry.cause), (time(20), Cause::Rule));
}

#[test]
fn where_nobody_settled_in_time_the_latest_stays_and_the_others_are_noted_everywhere() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    put_blind(&mut us, 1, 10, "first".into());
    put_blind(&mut eu, 2, 30, "latest".into());
    put_blind(&mut us, 1, 20, "second".into());
    pull(&mut us, &eu, 1, 40, Rule::Siblings);
    let settle = |since| {
        let (actor, time) = (actor(1), time(100));
        let keys = vec![(Bytes::from_static(KEY), since), (Bytes::from_static(b"absent"), since)];
        Command::Settle(Settle { namespace: NS, rule: Rule::Siblings, actor, time, keys })
    };

    // Of a deadline that was another value's.
    let before = us.clone();
    assert_eq!(run(&mut us, &settle(time(20))), Outcome::Done);
    assert_eq!(us, before);

    assert_eq!(run(&mut us, &settle(time(30))), Outcome::Done);
    pull(&mut eu, &us, 2, 110, Rule::Siblings);
    for state in [&us, &eu] {
        let held = siblings(state);
        assert_eq!(held.len(), 1);
        assert_eq!((held[0].dot.actor, &held[0].content), (actor(1), &Content::value("latest")));
    }
    assert_eq!(noted(&us), noted(&eu));
    let causes: Vec<_> = us.ledger.values().map(|entry| entry.cause).collect();
    assert_eq!(causes, [Cause::Deadline, Cause::Deadline]);

    let settled = us.clone();
    run(&mut us, &settle(time(100)));
    assert_eq!(us, settled, "one value waits for nothing");
}

#[test]
fn each_key_that_is_settled_is_a_change_of_its_own() {
    let mut us = MemoryState::default();
    let keys = ["a", "b"].map(Bytes::from);
    for (wall, key) in [(1, 0), (2, 0), (3, 1), (4, 1)] {
        let nothing = Some(VersionVector::new());
        let Command::Write(mut put) =
            write(1, wall, Rule::Siblings, Content::value(wall.to_string()), nothing)
        else {
            panic!()
        };
        put.operations[0].key = keys[key].clone();
        run(&mut us, &Command::Write(put));
    }
    let keys = keys.into_iter().zip([time(2), time(4)]).collect();
    let (rule, time) = (Rule::Siblings, time(100));
    run(&mut us, &Command::Settle(Settle { namespace: NS, rule, actor: actor(1), time, keys }));
    let sizes: Vec<_> = us.changes.values().map(|change| change.deltas.len()).collect();
    assert_eq!(sizes, [1; 6]);
    assert_eq!(us.ledger.len(), 2);
}

#[test]
fn a_value_whose_time_is_over_does_not_win_against_one_that_can_be_read() {
    let mut us = MemoryState::default();
    let nothing = || Some(VersionVector::new());
    run(&mut us, &write(1, 10, Rule::Siblings, Content::value("stays"), nothing()));
    let brief = Content::Value { data: Bytes::from_static(b"brief"), expire: Some(time(50)) };
    run(&mut us, &write(1, 20, Rule::Siblings, brief, nothing()));
    let keys = vec![(Bytes::from_static(KEY), time(20))];
    let (rule, time) = (Rule::Siblings, time(100));
    run(&mut us, &Command::Settle(Settle { namespace: NS, rule, actor: actor(1), time, keys }));
    let held: Vec<_> = siblings(&us).into_iter().map(|held| held.content).collect();
    assert_eq!(held, [Content::value("stays")]);
}

#[test]
fn what_two_regions_took_of_one_request_is_no_loss_when_a_key_is_settled() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    put_blind(&mut us, 1, 5, "other".into());
    let nothing = Some(VersionVector::new());
    for (state, region, wall) in [(&mut us, 1, 10), (&mut eu, 2, 20)] {
        let twice = Content::value("twice");
        let put = write(region, wall, Rule::Siblings, twice, nothing.clone());
        let Command::Write(put) = put else { panic!() };
        let request = Some(RequestId { client: 7, number: 1 });
        run(state, &Command::Write(Write { request, ..put }));
    }
    pull(&mut us, &eu, 1, 30, Rule::Siblings);
    assert_eq!(siblings(&us).len(), 3);

    let keys = vec![(Bytes::from_static(KEY), time(20))];
    let (rule, time) = (Rule::Siblings, time(100));
    run(&mut us, &Command::Settle(Settle { namespace: NS, rule, actor: actor(1), time, keys }));
    let held: Vec<_> = siblings(&us).into_iter().map(|held| held.content).collect();
    assert_eq!(held, [Content::value("twice")]);
    let lost: Vec<_> = us.ledger.values().map(|entry| entry.loser.content.clone()).collect();
    assert_eq!(lost, [Content::value("other")]);
}

#[test]
fn a_value_that_comes_while_a_key_is_settled_stays_beside_the_outcome() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    put_blind(&mut us, 1, 10, "a".into());
    put_blind(&mut us, 1, 20, "b".into());
    pull(&mut eu, &us, 2, 30, Rule::Siblings);
    put_blind(&mut eu, 2, 90, "late".into());
    let keys = vec![(Bytes::from_static(KEY), time(20))];
    let (rule, time) = (Rule::Siblings, time(100));
    run(&mut us, &Command::Settle(Settle { namespace: NS, rule, actor: actor(1), time, keys }));
    let (from_us, from_eu) = (us.clone(), eu.clone());
    pull(&mut us, &from_eu, 1, 110, Rule::Siblings);
    pull(&mut eu, &from_us, 2, 110, Rule::Siblings);
    assert_eq!(siblings(&us), siblings(&eu));
    let mut values: Vec<_> = siblings(&us).into_iter().map(|held| held.content).collect();
    values.sort_by_key(|content| format!("{content:?}"));
    assert_eq!(values, [Content::value("b"), Content::value("late")]);
    assert_eq!(noted(&us), noted(&eu));
}

/// Two regions that noted the same conflict.
fn both_noted() -> (MemoryState, MemoryState) {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    run(&mut us, &write(1, 10, Rule::Lww, Content::value("us"), None));
    run(&mut eu, &write(2, 20, Rule::Lww, Content::value("eu"), None));
    let alone = us.clone();
    pull(&mut us, &eu, 1, 30, Rule::Lww);
    pull(&mut eu, &alone, 2, 40, Rule::Lww);
    assert_eq!(noted(&us), noted(&eu));
    (us, eu)
}

fn forget(state: &mut MemoryState, entries: Vec<Noted>) {
    run(state, &Command::ForgetConflicts(ForgetConflicts { namespace: NS, entries }));
}

fn repair(to: &mut MemoryState, from: &MemoryState, local: u16, source: u16) {
    let (local, source) = (actor(local), actor(source));
    let repair = MemoryRepair { namespace: NS, rule: Rule::Lww, local, source };
    for command in repair.commands(to, from, 9) {
        run(to, &command);
    }
}

#[test]
fn exactly_what_is_named_is_forgotten() {
    let (mut us, _) = both_noted();
    let place = us.ledger.values().next().unwrap().place(NS);
    for other in [Noted { at: place.at.next(), ..place }, Noted { id: LedgerId([7; 16]), ..place }]
    {
        forget(&mut us, vec![other]);
        assert_eq!(us.ledger.len(), 1);
    }
    forget(&mut us, vec![place, place]);
    assert_eq!(us.ledger.len(), 0);
}

#[test]
fn what_was_forgotten_does_not_come_back_through_a_repair() {
    let (us, mut eu) = both_noted();
    let place = eu.ledger.values().next().unwrap().place(NS);
    forget(&mut eu, vec![place]);
    let before = eu.clone();
    repair(&mut eu, &us, 2, 1);
    assert_eq!(eu, before);
}

#[test]
fn a_repair_that_passes_an_entry_on_does_not_renew_it() {
    let (us, _) = both_noted();
    let mut ap = MemoryState::default();
    run(&mut ap, &write(3, 500, Rule::Lww, Content::value("other"), None));
    repair(&mut ap, &us, 3, 1);
    let passed_on = ap.ledger.values().find(|entry| entry.loser.dot.actor == actor(1)).unwrap();
    assert_eq!(passed_on.noted, time(30), "as it was noted there");
}

#[test]
fn a_context_is_current_until_something_it_has_not_seen_is_written() {
    let mut us = MemoryState::default();
    let holds = |state: &MemoryState, context: &VersionVector| {
        let record = state.record(NS, KEY).unwrap();
        Condition::ContextCurrent(context.clone()).holds(record.as_ref(), HybridTime::ZERO)
    };
    let nothing = VersionVector::new();
    assert!(holds(&us, &nothing), "nobody wrote");
    put_blind(&mut us, 1, 1, "a".into());
    put_blind(&mut us, 1, 2, "b".into());
    let seen = us.record(NS, KEY).unwrap().unwrap().context().clone();
    assert!(holds(&us, &seen) && !holds(&us, &nothing));

    // A deletion that leaves nothing behind is something that was written, too.
    run(&mut us, &write(1, 3, Rule::Siblings, Content::Tombstone, Some(seen.clone())));
    assert!(siblings(&us).is_empty() && !holds(&us, &seen));

    let check = Check { key: KEY.into(), condition: Condition::ContextCurrent(seen.clone()) };
    let Command::Write(refused) = write(1, 4, Rule::Siblings, Content::value("c"), Some(seen))
    else {
        panic!()
    };
    let refused = Command::Write(Write { checks: vec![check], ..refused });
    assert!(matches!(run(&mut us, &refused), Outcome::ChecksFailed(_)));
    assert!(siblings(&us).is_empty());
}

proptest! {
    /// Whoever writes where, and whoever hears of it when: no value is lost without a note.
    #[test]
    fn every_value_is_held_or_noted_in_every_region(
        steps in prop::collection::vec((0usize..3, prop::option::weighted(0.3, 0usize..3)), 20..90),
    ) {
        let mut regions: [MemoryState; 3] = Default::default();
        let mut written = 0;
        for (wall, (at, from)) in (1u64..).zip(steps) {
            let region = u16::try_from(at + 1).unwrap();
            match from {
                None => {
                    put_blind(&mut regions[at], region, wall, format!("v{wall}"));
                    written += 1;
                }
                Some(from) => {
                    let source = regions[from].clone();
                    pull(&mut regions[at], &source, region, wall, Rule::Siblings);
                }
            }
        }
        for _ in 0..2 {
            for (at, from) in [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1)] {
                let source = regions[from].clone();
                let region = u16::try_from(at + 1).unwrap();
                pull(&mut regions[at], &source, region, 1000, Rule::Siblings);
            }
        }
        for region in &regions {
            prop_assert_eq!(siblings(region), siblings(&regions[0]));
            prop_assert_eq!(noted(region), noted(&regions[0]));
            prop_assert_eq!(siblings(region).len() + region.ledger.len(), written);
        }
    }
}
