//! One request, tried in several regions, is one write.

use std::collections::BTreeSet;

use super::*;

const ID: RequestId = RequestId { client: 7, number: 1 };

fn request(region: u16, wall: u64, rule: Rule, operations: Vec<Operation>) -> Write {
    Write { rule, request: Some(ID), ..write(region, wall, operations) }
}

/// What `from` has and `into` lacks.
fn pull_all(into: &mut MemoryState, region: u16, from: &MemoryState, rule: Rule) -> Ingested {
    let changes = from.changes_above(NS, &into.frontier(NS));
    ingest(into, region, rule, changes)
}

/// Two regions that took `ID`, a put of `value` at `a`, before either had heard of the other, and have
/// heard since.
fn two_that_took_it(rule: Rule) -> ([MemoryState; 2], [Written; 2]) {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    let first = |state: &mut MemoryState, region, wall| {
        written(run(state, request(region, wall, rule, vec![put("a", "value")]))).remove(0)
    };
    let results = [first(&mut us, 1, 5), first(&mut eu, 2, 6)];
    let (from_us, from_eu) = (us.clone(), eu.clone());
    pull_all(&mut us, 1, &from_eu, rule);
    pull_all(&mut eu, 2, &from_us, rule);
    ([us, eu], results)
}

fn held(state: &MemoryState) -> Record {
    state.record(NS, b"a").unwrap().unwrap_or_default()
}

/// What `ID` was answered, of its first write.
fn remembered(state: &MemoryState) -> Written {
    match &state.requests[&ID].answer {
        Answer::Written { results, .. } => results[0].clone(),
        other => panic!("not written: {other:?}"),
    }
}

fn holds(state: &MemoryState, condition: &Condition) -> bool {
    condition.holds(Some(&held(state)), HybridTime::ZERO)
}

#[test]
fn a_request_repeated_where_its_change_has_arrived_answers_the_first_write() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    let operations = || vec![put("a", "1"), put("b", "2")];
    let first = written(run(&mut us, request(1, 5, Rule::Lww, operations())));
    pull_all(&mut eu, 2, &us, Rule::Lww);
    run(&mut eu, Write { rule: Rule::Lww, ..write(2, 7, vec![put("a", "later")]) });

    let again = written(run(&mut eu, request(2, 9, Rule::Lww, operations())));

    let shown = |results: &[Written]| -> Vec<_> {
        results.iter().map(|it| (it.dot, it.time, it.conflict)).collect()
    };
    assert_eq!(shown(&again), shown(&first));
    assert_eq!(again[1].context.get(actor(1)), 2, "of the key, what the first answer had seen");
    assert_eq!(values(&eu, "a"), ["later"]);
    assert_eq!(eu.frontier(NS).get(actor(2)), 1, "nothing more was written");
    // Another write under that id is refused here, too.
    let other = run(&mut eu, request(2, 9, Rule::Lww, vec![put("a", "other")]));
    assert_eq!(other, Outcome::RequestReused);
}

#[test]
fn siblings_of_one_request_are_shown_as_one_version_and_are_no_conflict() {
    let ([us, eu], [in_us, in_eu]) = two_that_took_it(Rule::Siblings);
    assert_eq!(us.records, eu.records);
    let record = held(&us);
    let dots: Vec<Dot> = record.siblings().iter().map(|held| held.dot).collect();
    assert_eq!(dots, [in_us.dot, in_eu.dot], "both are kept");
    assert_eq!((values(&us, "a").len(), record.versions()), (1, 1));
    assert_eq!(record.live_at(HybridTime::ZERO).next().unwrap().0.dot, in_us.dot, "the lowest");

    // Each region goes on answering what it answered first, and neither saw a conflict.
    assert_eq!((remembered(&us), remembered(&eu)), (in_us, in_eu));
    assert!(!remembered(&us).conflict && !remembered(&eu).conflict);
}

#[test]
fn under_lww_a_request_does_not_lose_to_itself() {
    let ([us, eu], [_, in_eu]) = two_that_took_it(Rule::Lww);
    assert_eq!(us.records, eu.records);
    assert_eq!(held(&us).siblings()[0].dot, in_eu.dot, "the later one stands");
    assert!(us.ledger.is_empty() && eu.ledger.is_empty());
    // A third region hears of both, and of no conflict.
    let mut ap = MemoryState::default();
    pull_all(&mut ap, 3, &us, Rule::Lww);
    assert_eq!(ap.records, us.records);
    assert!(ap.ledger.is_empty() && !remembered(&ap).conflict);
}

#[test]
fn whoever_has_seen_one_of_the_pair_replaces_both() {
    let ([mut us, mut eu], [in_us, _]) = two_that_took_it(Rule::Siblings);
    let context = Some(in_us.context);
    let replaced = run(&mut eu, write(2, 9, vec![Operation { context, ..put("a", "new") }]));
    assert!(!written(replaced)[0].conflict);
    pull_all(&mut us, 1, &eu, Rule::Siblings);
    assert_eq!((values(&us, "a"), values(&eu, "a")), (vec!["new".into()], vec!["new".into()]));
}

#[test]
fn checks_take_the_pair_for_one() {
    let ([us, _], [in_us, in_eu]) = two_that_took_it(Rule::Siblings);
    for dot in [in_us.dot, in_eu.dot] {
        assert!(holds(&us, &Condition::DotEquals(dot)));
    }
    assert!(!holds(&us, &Condition::DotEquals(Dot { seq: 9, ..in_us.dot })));
    assert!(holds(&us, &Condition::DataEquals("value".into())));
    for context in [in_us.context, in_eu.context] {
        assert!(holds(&us, &Condition::ContextCurrent(context)));
    }
    assert!(!holds(&us, &Condition::ContextCurrent(VersionVector::new())));
}

#[test]
fn what_replaced_one_before_it_heard_of_the_other_leaves_that_as_any_concurrent_write() {
    let rule = Rule::Siblings;
    let [mut us, mut eu, mut ap] = <[MemoryState; 3]>::default();
    run(&mut us, request(1, 5, rule, vec![put("a", "value")]));
    pull_all(&mut ap, 3, &us, rule);
    let deleted = Operation { content: Content::Tombstone, ..put("a", "") };
    run(&mut ap, write(3, 6, vec![deleted]));
    run(&mut eu, request(2, 7, rule, vec![put("a", "value")]));

    for _ in 0..2 {
        pull_all(&mut ap, 3, &eu.clone(), rule);
        pull_all(&mut us, 1, &ap.clone(), rule);
        pull_all(&mut eu, 2, &us.clone(), rule);
    }

    assert_eq!(values(&ap, "a"), ["value"]);
    assert_eq!((&us.records, &eu.records), (&ap.records, &ap.records));
}

#[test]
fn two_writes_under_one_id_by_mistake_both_stand_and_the_mistake_is_told_once() {
    let rule = Rule::Siblings;
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    run(&mut us, request(1, 5, rule, vec![put("a", "one")]));
    run(&mut eu, request(2, 6, rule, vec![put("a", "two")]));

    let first = pull_all(&mut us, 1, &eu, rule);
    assert_eq!((first.applied, first.reused, first.stopped), (1, Some(ID), None));
    assert_eq!(values(&us, "a"), ["one", "two"]);
    let changes = eu.changes_above(NS, &VersionVector::new());
    let again = ingest(&mut us, 1, rule, changes);
    assert_eq!((again.repeated, again.reused), (1, None));
    // The first is the one that is remembered.
    let repeat = run(&mut us, request(1, 9, rule, vec![put("a", "two")]));
    assert_eq!(repeat, Outcome::RequestReused);
}

#[test]
fn a_commit_that_was_refused_stays_refused_when_it_is_repeated() {
    let mut us = MemoryState::default();
    let checks = vec![
        Check { key: "b".into(), condition: Condition::Absent },
        Check { key: "a".into(), condition: Condition::Present },
    ];
    let commit =
        |wall| Write { checks: checks.clone(), ..request(1, wall, Rule::Lww, vec![put("c", "1")]) };
    let failed = |outcome: Outcome| match outcome {
        Outcome::ChecksFailed(failed) => {
            failed.into_iter().map(|it| (it.check, it.actual.is_some())).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(failed(run(&mut us, commit(1))), [(1, false)]);
    // Now it would hold.
    run(&mut us, write(1, 2, vec![put("a", "1")]));
    assert_eq!(failed(run(&mut us, commit(3))), [(1, true)], "with what the key has by now");
    assert!(values(&us, "c").is_empty());
    assert_eq!(run(&mut us, request(1, 4, Rule::Lww, vec![put("c", "1")])), Outcome::RequestReused);
}

#[test]
fn a_commit_that_was_refused_here_and_made_there_is_made() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    run(&mut us, write(1, 1, vec![put("a", "1")]));
    let checks = vec![Check { key: "a".into(), condition: Condition::Present }];
    let commit = |region, wall| Write {
        checks: checks.clone(),
        ..request(region, wall, Rule::Siblings, vec![put("b", "1")])
    };
    assert!(matches!(run(&mut eu, commit(2, 2)), Outcome::ChecksFailed(_)));
    let made = written(run(&mut us, commit(1, 2)));
    pull_all(&mut eu, 2, &us, Rule::Siblings);
    assert_eq!(written(run(&mut eu, commit(2, 3)))[0].dot, made[0].dot);
}

#[test]
fn a_context_is_current_until_something_is_written_that_it_has_not_seen() {
    let mut us = MemoryState::default();
    let current = |state: &MemoryState, context: &VersionVector| {
        let condition = Condition::ContextCurrent(context.clone());
        condition.holds(state.record(NS, b"a").unwrap().as_ref(), HybridTime::ZERO)
    };
    let nothing = VersionVector::new();
    assert!(current(&us, &nothing), "never written");
    let first = written(run(&mut us, write(1, 1, vec![put("a", "1")]))).remove(0).context;
    assert!(current(&us, &first) && !current(&us, &nothing));
    run(&mut us, write(1, 2, vec![put("other", "1")]));
    assert!(current(&us, &first));
    // Concurrent with what was seen.
    let beside = Operation { context: Some(nothing.clone()), ..put("a", "2") };
    let second = written(run(&mut us, write(1, 3, vec![beside]))).remove(0).context;
    assert!(!current(&us, &first) && current(&us, &second));
    // Deleted, so that nothing is left to see.
    let deleted = Operation { content: Content::Tombstone, ..put("a", "") };
    let third = written(run(&mut us, write(1, 4, vec![deleted]))).remove(0).context;
    assert!(!current(&us, &second) && current(&us, &third));
    // Collected: what was seen is gone, and who saw it must look again.
    us.remove_record(NS, &"a".into());
    assert!(!current(&us, &second) && !current(&us, &third) && current(&us, &nothing));
}

#[test]
fn a_check_whose_context_has_seen_more_than_the_region_waits_for_that() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    let seen = written(run(&mut us, write(1, 1, vec![put("a", "1")]))).remove(0).context;
    let checks =
        vec![Check { key: "a".into(), condition: Condition::ContextCurrent(seen.clone()) }];
    let commit = Write { checks, ..write(2, 2, vec![put("a", "2")]) };
    let early = run(&mut eu, commit.clone());
    assert_eq!(early, Outcome::ContextAhead { needed: seen, frontier: VersionVector::new() });
    pull_all(&mut eu, 2, &us, Rule::Siblings);
    written(run(&mut eu, commit));
}

#[test]
fn starting_over_forgets_requests_with_the_data() {
    let mut us = MemoryState::default();
    run(&mut us, request(1, 1, Rule::Lww, vec![put("a", "1")]));
    let local = Actor { incarnation: 2, ..actor(1) };
    let (known, members) = (BTreeMap::new(), Members::new());
    execute(&mut us, &Command::StartOver(StartOver { local, known, members })).unwrap();
    assert!(us.requests.is_empty());
}

#[test]
fn a_repair_brings_both_of_the_pair_and_they_stay_one() {
    for rule in [Rule::Siblings, Rule::Lww] {
        let ([us, eu], _) = two_that_took_it(rule);
        let mut ap = MemoryState::default();
        for (from, source) in [(1, &us), (2, &eu)] {
            let repair = MemoryRepair { namespace: NS, rule, local: actor(3), source: actor(from) };
            for command in repair.commands(&ap, source, 1) {
                let Ok(_) = execute(&mut ap, &command);
            }
        }
        assert_eq!(values(&ap, "a"), ["value"]);
        assert_eq!(ap.records, us.records);
        assert!(ap.ledger.is_empty());
        assert_eq!(ap.tree(NS), us.tree(NS));
    }
}

#[test]
fn a_deletion_that_a_repair_brought_does_not_lose_to_its_own_repeat() {
    let rule = Rule::Lww;
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    let nothing = Some(VersionVector::new());
    let deletion = || {
        let content = Content::Tombstone;
        vec![Operation { content, context: nothing.clone(), ..put("a", "") }]
    };
    run(&mut us, request(1, 9, rule, deletion()));
    let repair = MemoryRepair { namespace: NS, rule, local: actor(2), source: actor(1) };
    for command in repair.commands(&eu, &us, 1) {
        let Ok(_) = execute(&mut eu, &command);
    }
    // A repair brings no memory of requests.
    let again = written(run(&mut eu, request(2, 5, rule, deletion()))).remove(0);
    assert_eq!((again.dot.actor, again.conflict), (actor(2), false));
    pull_all(&mut us, 1, &eu, rule);
    assert_eq!(us.records, eu.records);
    assert!(us.ledger.is_empty() && eu.ledger.is_empty());
}

#[derive(Clone, Debug)]
enum Try {
    /// A client tries this request here.
    Send {
        request: u8,
        region: u16,
    },
    Pull {
        into: u16,
        from: u16,
    },
}

fn any_try() -> impl Strategy<Value = Try> {
    prop_oneof![
        (0u8..5, 1u16..4).prop_map(|(request, region)| Try::Send { request, region }),
        (1u16..4, 1u16..4).prop_map(|(into, from)| Try::Pull { into, from }),
    ]
}

/// Request `number`: one key of its own, or two, or the deletion of one.
fn tried(number: u8, region: u16, wall: u64, rule: Rule) -> Write {
    let key = |part: &str| Bytes::from(format!("{number}{part}"));
    let value = Content::value(number.to_string());
    let mut operations = vec![Operation { key: key("a"), content: value.clone(), context: None }];
    match number {
        1 => operations.push(Operation { key: key("b"), content: value, context: None }),
        2 => operations[0].content = Content::Tombstone,
        _ => {}
    }
    let id = RequestId { client: 7, number: u64::from(number) };
    Write { rule, request: Some(id), ..write(region, wall, operations) }
}

proptest! {
    /// Requests of different keys, tried anywhere, any number of times, while changes travel: each is
    /// executed once by every region that had not heard of it, and is one version in the end.
    #[test]
    fn a_request_tried_anywhere_is_one_version_and_no_conflict(
        steps in prop::collection::vec(any_try(), 0..40),
        lww: bool,
    ) {
        let rule = if lww { Rule::Lww } else { Rule::Siblings };
        let mut regions: [MemoryState; 3] = Default::default();
        let mut heard: [BTreeSet<u8>; 3] = Default::default();
        let mut answers: BTreeMap<(u16, u8), Vec<Written>> = BTreeMap::new();
        let (mut expected_events, mut sent) = (0, BTreeSet::new());
        for (wall, step) in (1u64..).zip(steps) {
            match step {
                Try::Send { request, region } => {
                    let at = usize::from(region) - 1;
                    let write = tried(request, region, wall % 7, rule);
                    let events = write.operations.len() as u64;
                    let answer = written(run(&mut regions[at], write));
                    let first = answers.entry((region, request)).or_insert_with(|| answer.clone());
                    prop_assert_eq!(&*first, &answer, "the first answer, always");
                    prop_assert!(answer.iter().all(|written| !written.conflict));
                    expected_events += if heard[at].insert(request) { events } else { 0 };
                    sent.insert(request);
                }
                Try::Pull { into, from } if into != from => {
                    let (into_at, from_at) = (usize::from(into) - 1, usize::from(from) - 1);
                    let from = regions[from_at].clone();
                    pull_all(&mut regions[into_at], into, &from, rule);
                    let news = heard[from_at].clone();
                    heard[into_at].extend(news);
                }
                Try::Pull { .. } => {}
            }
        }
        for _ in 0..2 {
            for (into, from) in [(1, 2), (2, 3), (3, 1), (1, 3)] {
                let source = regions[from - 1].clone();
                pull_all(&mut regions[into - 1], u16::try_from(into).unwrap(), &source, rule);
            }
        }
        let events: u64 = regions[0].frontier(NS).iter().map(|(_, seq)| seq).sum();
        prop_assert_eq!(events, expected_events);
        for state in &regions {
            prop_assert_eq!(&state.records, &regions[0].records);
            prop_assert!(state.ledger.is_empty());
            for &request in &sent {
                let shown = values(state, &format!("{request}a")).len();
                prop_assert_eq!(shown, usize::from(request != 2));
            }
            prop_assert_eq!(values(state, "1b").len(), usize::from(sent.contains(&1)));
        }
    }
}
