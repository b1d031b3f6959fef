//! Meanings of each command, and convergence of whole regions under random histories.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    HybridTime,
    command::{Check, Collect, Condition, Expire, ForgetReviewed, Operation, StartOver, Trim},
    id::{Actor, RegionId},
    record::Content,
    testing::{MemoryRepair, MemoryState},
};

mod once;

const NS: NamespaceId = NamespaceId(5);

fn actor(region: u16) -> Actor {
    Actor { region: RegionId(region), incarnation: 1 }
}

fn put(key: &'static str, value: impl Into<Bytes>) -> Operation {
    Operation {
        key: Bytes::from_static(key.as_bytes()),
        content: Content::value(value),
        context: None,
    }
}

fn write(region: u16, wall: u64, operations: Vec<Operation>) -> Write {
    Write {
        namespace: NS,
        rule: Rule::Siblings,
        actor: actor(region),
        time: HybridTime::new(wall, 0).unwrap(),
        request: None,
        checks: Vec::new(),
        operations,
        mutations: Vec::new(),
    }
}

fn run(state: &mut MemoryState, command: Write) -> Outcome {
    let Ok(outcome) = execute(state, &Command::Write(command));
    outcome
}

fn written(outcome: Outcome) -> Vec<Written> {
    match outcome {
        Outcome::Written(results) => results,
        other => panic!("not written: {other:?}"),
    }
}

/// When changes may have come: not before they were written.
fn time_of(changes: &[Change]) -> HybridTime {
    changes.iter().map(Change::time).max().unwrap_or(HybridTime::ZERO)
}

fn ingest(state: &mut MemoryState, local: u16, rule: Rule, changes: Vec<Change>) -> Ingested {
    let (local, source) = (actor(local), actor(9));
    let time = time_of(&changes);
    let command = Command::Ingest(Ingest { namespace: NS, rule, local, source, time, changes });
    match execute(state, &command) {
        Ok(Outcome::Ingested(ingested)) => ingested,
        other => panic!("not ingested: {other:?}"),
    }
}

fn values(state: &MemoryState, key: &str) -> Vec<Bytes> {
    let record = state.record(NS, key.as_bytes()).unwrap().unwrap_or_default();
    record.live_at(HybridTime::ZERO).map(|(_, data)| data.clone()).collect()
}

#[test]
fn a_request_id_that_was_used_for_another_write_is_refused() {
    let mut state = MemoryState::default();
    let request = Some(RequestId { client: 7, number: 1 });
    written(run(&mut state, Write { request, ..write(1, 1, vec![put("a", "1")]) }));
    let check = |condition| vec![Check { key: "a".into(), condition }];
    for other in [
        write(1, 2, vec![put("b", "1")]),
        write(1, 2, vec![put("a", "2")]),
        write(1, 2, vec![put("a", "1"), put("a", "1")]),
        Write { namespace: NamespaceId(6), ..write(1, 2, vec![put("a", "1")]) },
        Write { checks: check(Condition::Present), ..write(1, 2, vec![put("a", "1")]) },
    ] {
        let outcome = run(&mut state, Write { request, ..other });
        assert_eq!(outcome, Outcome::RequestReused);
    }
    assert_eq!(values(&state, "a"), ["1"]);
    assert!(values(&state, "b").is_empty());
}

#[test]
fn a_repeated_request_is_applied_once_and_answers_as_before() {
    let mut state = MemoryState::default();
    let request = Some(RequestId { client: 7, number: 1 });
    let first = run(&mut state, Write { request, ..write(1, 1, vec![put("a", "1")]) });
    run(&mut state, write(1, 2, vec![put("a", "2")]));

    let again = run(&mut state, Write { request, ..write(1, 3, vec![put("a", "1")]) });

    assert_eq!(again, first);
    assert_eq!(values(&state, "a"), ["2"]);
    assert_eq!(state.frontier(NS).get(actor(1)), 2);
}

#[test]
fn a_failed_check_writes_nothing_and_answers_the_actual_record() {
    let mut state = MemoryState::default();
    let first = written(run(&mut state, write(1, 1, vec![put("a", "1")])));
    let before = state.clone();
    let check = |condition| Check { key: Bytes::from_static(b"a"), condition };
    let checks = vec![check(Condition::Present), check(Condition::Absent)];

    let outcome = run(&mut state, Write { checks, ..write(1, 2, vec![put("b", "2")]) });

    let Outcome::ChecksFailed(failed) = outcome else { panic!("{outcome:?}") };
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].check, 1);
    let actual = failed[0].actual.as_ref().unwrap();
    assert_eq!(actual.siblings()[0].dot, first[0].dot);
    assert_eq!(state, before);
}

#[test]
fn checks_on_dot_and_data_hold_for_exactly_one_live_value() {
    let mut state = MemoryState::default();
    let dot = written(run(&mut state, write(1, 1, vec![put("a", "1")])))[0].dot;
    let record = state.record(NS, b"a").unwrap();
    let holds = |condition: Condition| condition.holds(record.as_ref(), HybridTime::ZERO);

    assert!(holds(Condition::DotEquals(dot)) && holds(Condition::DataEquals("1".into())));
    assert!(!holds(Condition::DotEquals(Dot { seq: 9, ..dot })));
    assert!(!holds(Condition::DataEquals("2".into())) && !holds(Condition::Absent));
    assert!(Condition::Absent.holds(None, HybridTime::ZERO));
}

#[test]
fn an_atomic_batch_is_one_change_and_arrives_whole() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    written(run(&mut us, write(1, 1, vec![put("a", "1"), put("b", "2"), put("a", "3")])));

    let changes = us.changes_above(NS, &VersionVector::new());
    let done = ingest(&mut eu, 2, Rule::Siblings, changes.clone());

    assert_eq!((changes.len(), done.applied), (1, 1));
    assert_eq!((values(&eu, "a"), values(&eu, "b")), (values(&us, "a"), values(&us, "b")));
    assert_eq!(values(&eu, "a"), ["3"]);
    assert_eq!(eu.frontier(NS).get(actor(1)), 3);
}

#[test]
fn ingest_takes_a_change_once_and_stops_at_a_gap() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    for wall in 1..4 {
        run(&mut us, write(1, wall, vec![put("a", wall.to_string())]));
    }
    let changes = us.changes_above(NS, &VersionVector::new());

    let gap = ingest(&mut eu, 2, Rule::Siblings, vec![changes[0].clone(), changes[2].clone()]);
    assert_eq!((gap.applied, gap.stopped), (1, Some(Stopped::Gap)));
    let rest = ingest(&mut eu, 2, Rule::Siblings, changes);
    assert_eq!((rest.applied, rest.repeated, rest.stopped), (2, 1, None));
    assert_eq!(eu.records, us.records);
}

#[test]
fn ingest_holds_back_a_change_whose_cause_is_missing() {
    let (mut us, mut eu, mut ap) = <(MemoryState, MemoryState, MemoryState)>::default();
    run(&mut us, write(1, 1, vec![put("a", "1")]));
    let cause = us.changes_above(NS, &VersionVector::new());
    ingest(&mut eu, 2, Rule::Siblings, cause.clone());
    run(&mut eu, write(2, 2, vec![put("b", "2")]));
    let effect = eu.changes_above(NS, &us.frontier(NS));

    let early = ingest(&mut ap, 3, Rule::Siblings, effect.clone());
    assert_eq!(early.stopped, Some(Stopped::Dependency));
    ingest(&mut ap, 3, Rule::Siblings, cause);
    assert_eq!(ingest(&mut ap, 3, Rule::Siblings, effect).applied, 1);
}

#[test]
fn an_unknown_change_of_the_own_region_is_refused() {
    let mut us = MemoryState::default();
    run(&mut us, write(1, 1, vec![put("a", "1")]));
    let changes = us.changes_above(NS, &VersionVector::new());

    let mut forgetful = MemoryState::default();
    let done = ingest(&mut forgetful, 1, Rule::Siblings, changes);

    assert_eq!(done.stopped, Some(Stopped::OwnChangeUnknown));
    assert_eq!(forgetful, MemoryState::default());
}

#[test]
fn a_context_from_the_future_is_told_what_it_waits_for() {
    let mut state = MemoryState::default();
    let needed: VersionVector = [(actor(2), 4)].into_iter().collect();
    let ahead = Operation { context: Some(needed.clone()), ..put("a", "1") };

    let outcome = run(&mut state, write(1, 1, vec![ahead]));

    assert_eq!(outcome, Outcome::ContextAhead { needed, frontier: VersionVector::new() });
    assert_eq!(state, MemoryState::default());
}

#[test]
fn a_write_is_later_than_what_it_replaces_even_if_the_clock_is_behind() {
    let mut state = MemoryState::default();
    let rule = Rule::Lww;
    run(&mut state, Write { rule, ..write(1, 1_000, vec![put("a", "fast")]) });
    let slow = written(run(&mut state, Write { rule, ..write(1, 1, vec![put("a", "slow")]) }));

    assert_eq!(slow[0].time, HybridTime::new(1_000, 1).unwrap());
    assert_eq!(values(&state, "a"), ["slow"]);
    assert!(state.ledger.is_empty());
}

#[test]
fn lww_conflict_is_in_the_ledger_of_every_region_under_the_same_id() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    let rule = Rule::Lww;
    run(&mut us, Write { rule, ..write(1, 5, vec![put("a", "us")]) });
    run(&mut eu, Write { rule, ..write(2, 6, vec![put("a", "eu")]) });
    let (from_us, from_eu) =
        (us.changes_above(NS, &VersionVector::new()), eu.changes_above(NS, &VersionVector::new()));

    ingest(&mut us, 1, rule, from_eu);
    ingest(&mut eu, 2, rule, from_us);

    assert_eq!(values(&us, "a"), ["eu"]);
    assert_eq!(us.records, eu.records);
    // But for when each of them noted it.
    let alike = |state: &MemoryState| {
        let mut ledger = state.ledger.clone();
        ledger.values_mut().for_each(|entry| entry.noted = HybridTime::ZERO);
        ledger
    };
    assert_eq!(alike(&us), alike(&eu));
    let entry = us.ledger.values().next().unwrap();
    assert_eq!(entry.loser.content, Content::value("us"));
}

#[test]
fn siblings_stay_bounded_and_the_oldest_go_by_name() {
    let mut state = MemoryState::default();
    for wall in 0..40u64 {
        let concurrent = Some(VersionVector::new());
        run(
            &mut state,
            write(1, wall, vec![Operation { context: concurrent, ..put("a", wall.to_string()) }]),
        );
    }
    let held = values(&state, "a");
    assert_eq!(held.len(), SIBLINGS_MAX);
    assert_eq!((held[0].as_ref(), held[15].as_ref()), (b"24".as_slice(), b"39".as_slice()));
}

#[test]
fn trim_never_forgets_what_is_not_applied_here() {
    let mut state = MemoryState::default();
    run(&mut state, write(1, 1, vec![put("a", "1")]));
    let upto: VersionVector = [(actor(1), 99), (actor(2), 5)].into_iter().collect();

    let Ok(outcome) = execute(&mut state, &Command::Trim(Trim { namespace: NS, upto }));

    assert_eq!(outcome, Outcome::Done);
    assert!(state.changes.is_empty());
    assert_eq!(values(&state, "a"), ["1"]);
}

#[test]
fn a_tombstone_goes_only_when_it_is_stable() {
    let mut state = MemoryState::default();
    let rule = Rule::Lww;
    run(&mut state, Write { rule, ..write(1, 1, vec![put("a", "1"), put("b", "1")]) });
    let deleted = Operation { content: Content::Tombstone, ..put("a", "") };
    run(&mut state, Write { rule, ..write(1, 2, vec![deleted]) });
    let keys: Vec<Bytes> = vec!["a".into(), "b".into(), "c".into()];
    let collect = |seq| {
        let stable = [(actor(1), seq), (actor(2), 9)].into_iter().collect();
        let (keys, members) = (keys.clone(), Members::new());
        Command::Collect(Collect { namespace: NS, stable, members, keys })
    };
    assert_eq!(execute(&mut state, &collect(2)), Ok(Outcome::Collected(0)));
    assert!(state.record(NS, b"a").unwrap().is_some());
    assert_eq!(execute(&mut state, &collect(3)), Ok(Outcome::Collected(1)));
    assert_eq!(state.record(NS, b"a"), Ok(None));
    assert_eq!(values(&state, "b"), ["1"]);
}

#[test]
fn a_write_after_collection_wins_where_the_tombstone_is_still_held() {
    let rule = Rule::Lww;
    let [mut us, mut eu] = [MemoryState::default(), MemoryState::default()];
    let deleted = Operation { content: Content::Tombstone, ..put("a", "") };
    // Stamped by a clock that is far ahead.
    run(&mut us, Write { rule, ..write(1, 9_000, vec![deleted]) });
    let log = us.changes_above(NS, &VersionVector::new());
    ingest(&mut eu, 2, rule, log);
    let stable = eu.frontier(NS);
    let keys = vec!["a".into()];
    let members = Members::new();
    let collect = Command::Collect(Collect { namespace: NS, stable, members, keys });
    let collected = execute(&mut eu, &collect);
    assert_eq!(collected, Ok(Outcome::Collected(1)));
    run(&mut eu, Write { rule, ..write(2, 5, vec![put("a", "new")]) });
    let log = eu.changes_above(NS, &us.frontier(NS));
    ingest(&mut us, 1, rule, log);
    assert_eq!(values(&us, "a"), ["new"]);
}

#[test]
fn a_batch_has_not_seen_of_one_key_what_a_repair_brought_of_another() {
    let rule = Rule::Lww;
    let [mut us, mut eu] = [MemoryState::default(), MemoryState::default()];
    let deleted = |key| Operation { content: Content::Tombstone, ..put(key, "") };
    run(&mut us, Write { rule, ..write(1, 50, vec![deleted("b")]) });
    run(&mut us, Write { rule, ..write(1, 60, vec![put("c", "1")]) });
    let log = us.changes_above(NS, &VersionVector::new());
    // eu's repair is half done: it has brought `c` and not yet the deletion of `b`.
    let repair = MemoryRepair { namespace: NS, rule, local: actor(2), source: actor(1) };
    let commands = repair.commands(&eu, &us, 1);
    let brings = |command: &&Command| matches!(command, Command::Merge(it) if it.offers.iter().any(|offer| offer.key == "c"));
    let Ok(_) = execute(&mut eu, commands.iter().find(brings).unwrap());
    // Its clock is behind.
    run(&mut eu, Write { rule, ..write(2, 5, vec![deleted("c"), deleted("b")]) });
    run(&mut eu, Write { rule, ..write(2, 6, vec![put("b", "late")]) });
    let theirs = eu.changes_above(NS, &us.frontier(NS));
    for command in &commands {
        let Ok(_) = execute(&mut eu, command);
    }
    let done = ingest(&mut us, 1, rule, theirs);
    assert_eq!((done.stopped, log.len()), (None, 2));
    assert_eq!(us.frontier(NS), eu.frontier(NS));
    assert_eq!((values(&us, "b"), values(&us, "c")), (values(&eu, "b"), values(&eu, "c")));
}

#[test]
fn an_expired_value_becomes_a_deletion_and_what_is_concurrent_with_it_stays() {
    let [mut us, mut eu] = [MemoryState::default(), MemoryState::default()];
    let until = |wall| Content::Value { data: "v".into(), expire: HybridTime::new(wall, 0) };
    let operation = |key, wall| Operation { content: until(wall), ..put(key, "") };
    let dots: Vec<Dot> =
        written(run(&mut us, write(1, 1, vec![operation("a", 10), operation("b", 90)])))
            .into_iter()
            .map(|written| written.dot)
            .collect();
    run(&mut eu, write(2, 1, vec![put("a", "concurrent")]));
    let changes = eu.changes_above(NS, &us.frontier(NS));
    ingest(&mut us, 1, Rule::Siblings, changes);
    let expire = |wall, actor, values| {
        let time = HybridTime::new(wall, 0).unwrap();
        let rule = Rule::Siblings;
        Command::Expire(Expire { namespace: NS, rule, actor, time, values })
    };
    let values = vec![(Bytes::from("a"), dots[0]), (Bytes::from("b"), dots[1])];
    assert_eq!(execute(&mut us, &expire(9, actor(1), values.clone())), Ok(Outcome::Expired(0)));
    assert_eq!(us.frontier(NS).get(actor(1)), 2, "nothing was written");
    assert_eq!(execute(&mut us, &expire(10, actor(1), values.clone())), Ok(Outcome::Expired(1)));
    assert_eq!(execute(&mut us, &expire(10, actor(1), values)), Ok(Outcome::Expired(0)));
    assert_eq!(self::values(&us, "a"), ["concurrent"]);
    assert_eq!(self::values(&us, "b"), ["v"]);

    let changes = us.changes_above(NS, &eu.frontier(NS));
    ingest(&mut eu, 2, Rule::Siblings, changes);
    assert_eq!(eu.records, us.records);
}

/// What happens in one random history of three regions.
#[derive(Clone, Debug)]
enum Step {
    Write {
        region: u16,
        key: u8,
        wall: u64,
        delete: bool,
        context_of: Option<u16>,
    },
    Pull {
        into: u16,
        from: u16,
    },
    Collect {
        at: u16,
    },
    Trim {
        at: u16,
    },
    /// Only so many of the repair's commands come through.
    Repair {
        into: u16,
        from: u16,
        commands: usize,
    },
}

fn any_step() -> impl Strategy<Value = Step> {
    let region = || 1u16..4;
    prop_oneof![
        (region(), 0u8..3, 0u64..30, any::<bool>(), prop::option::of(region())).prop_map(
            |(region, key, wall, delete, context_of)| Step::Write {
                region,
                key,
                wall,
                delete,
                context_of
            }
        ),
        (region(), region()).prop_map(|(into, from)| Step::Pull { into, from }),
        region().prop_map(|at| Step::Collect { at }),
        region().prop_map(|at| Step::Trim { at }),
        (region(), region(), 0usize..6).prop_map(|(into, from, commands)| Step::Repair {
            into,
            from,
            commands
        }),
    ]
}

/// What each region has heard of the others, and holds all own events of.
type Told = BTreeMap<(u16, u16), VersionVector>;

/// Drops all dead records at a region that are stable by what it has heard.
fn collect(regions: &mut [MemoryState; 3], told: &Told, at: u16) {
    let state = &mut regions[usize::from(at) - 1];
    let mut stable = state.frontier(NS);
    for other in (1..4).filter(|&other| other != at) {
        stable = stable.meet(told.get(&(at, other)).unwrap_or(&VersionVector::new()));
    }
    let keys: Vec<Bytes> = state.records.keys().map(|(_, key)| key.clone()).collect();
    let members = Members::new();
    let command = Command::Collect(Collect { namespace: NS, stable, members, keys });
    let Ok(_) = execute(state, &command);
}

fn pull(regions: &mut [MemoryState; 3], told: &mut Told, into: u16, from: u16, rule: Rule) {
    let frontier = regions[usize::from(into) - 1].frontier(NS);
    let changes = regions[usize::from(from) - 1].changes_above(NS, &frontier);
    ingest(&mut regions[usize::from(into) - 1], into, rule, changes);
    tell(regions, told, into, from);
}

/// What `from` has applied counts at `into` once all of its own events are there.
fn tell(regions: &[MemoryState; 3], told: &mut Told, into: u16, from: u16) {
    let frontier = regions[usize::from(from) - 1].frontier(NS);
    let here = regions[usize::from(into) - 1].frontier(NS);
    if frontier.get(actor(from)) <= here.get(actor(from)) {
        told.insert((into, from), frontier);
    }
}

fn repair(
    regions: &mut [MemoryState; 3],
    told: &mut Told,
    into: u16,
    from: u16,
    rule: Rule,
    commands: usize,
) {
    if into == from {
        return;
    }
    let whole = MemoryRepair { namespace: NS, rule, local: actor(into), source: actor(from) };
    let source = regions[usize::from(from) - 1].clone();
    let receiver = &mut regions[usize::from(into) - 1];
    for command in whole.commands(receiver, &source, 1).iter().take(commands) {
        let Ok(outcome) = execute(receiver, command);
        let expected = matches!(outcome, Outcome::Merged(_) | Outcome::Advanced(_));
        assert!(expected, "{command:?}: {outcome:?}");
    }
    tell(regions, told, into, from);
}

proptest! {
    #[test]
    fn regions_converge_after_any_history(steps in prop::collection::vec(any_step(), 0..60), lww: bool) {
        let rule = if lww { Rule::Lww } else { Rule::Siblings };
        let mut regions: [MemoryState; 3] = Default::default();
        let mut told = Told::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Write { region, key, wall, delete, context_of } => {
                    let key = Bytes::from(vec![key]);
                    let context = context_of.and_then(|from| {
                        let held = regions[usize::from(from) - 1].record(NS, &key).unwrap();
                        held.map(|record| record.context().clone())
                    });
                    let content = if delete { Content::Tombstone } else { Content::value(number.to_string()) };
                    let operation = Operation { key, content, context };
                    let command = Write { rule, ..write(region, wall, vec![operation]) };
                    run(&mut regions[usize::from(region) - 1], command);
                }
                Step::Pull { into, from } => pull(&mut regions, &mut told, into, from, rule),
                Step::Collect { at } => collect(&mut regions, &told, at),
                Step::Trim { at } => {
                    let state = &mut regions[usize::from(at) - 1];
                    let upto = state.frontier(NS);
                    let Ok(_) = execute(state, &Command::Trim(Trim { namespace: NS, upto }));
                }
                Step::Repair { into, from, commands } => {
                    repair(&mut regions, &mut told, into, from, rule, commands);
                }
            }
        }
        for into in 1..4 {
            for from in (1..4).filter(|&from| from != into) {
                repair(&mut regions, &mut told, into, from, rule, usize::MAX);
            }
        }
        for _ in 0..2 {
            for into in 1..4 {
                for from in (1..4).filter(|&from| from != into) {
                    pull(&mut regions, &mut told, into, from, rule);
                }
            }
        }
        for at in 1..4 {
            collect(&mut regions, &told, at);
            let dead = regions[usize::from(at) - 1].records.values().filter(|held| held.is_dead());
            prop_assert_eq!(dead.count(), 0, "everyone has every deletion");
        }
        // What was collected is in nobody's context, so only what is held can be compared.
        let held = |state: &MemoryState| -> Vec<_> {
            state.records.iter().map(|(key, held)| (key.clone(), held.siblings().to_vec())).collect()
        };
        for other in &regions[1..] {
            prop_assert_eq!(held(&regions[0]), held(other));
            prop_assert_eq!(&regions[0].frontiers, &other.frontiers);
        }
    }
}

#[test]
fn a_region_that_is_not_active_in_this_very_incarnation_writes_nothing() {
    let mut eu = MemoryState::default();
    let set = |state: &mut MemoryState, incarnation, is: MemberState| {
        let member = Member { incarnation, state: is };
        execute(state, &Command::Learn([(RegionId(2), member)].into_iter().collect())).unwrap();
        member
    };
    let one = Command::Write(write(2, 1, vec![put("k", "v")]));
    assert!(matches!(execute(&mut eu, &one), Ok(Outcome::Written(_))));
    for state in [MemberState::Regressed, MemberState::Fenced] {
        let member = set(&mut eu, 1, state);
        assert_eq!(execute(&mut eu, &one), Ok(Outcome::NotActive(member)));
    }
    let member = set(&mut eu, 2, MemberState::Active);
    assert_eq!(
        execute(&mut eu, &one),
        Ok(Outcome::NotActive(member)),
        "stamped in its former life"
    );
    let mut next = write(2, 1, vec![put("k", "w")]);
    next.actor.incarnation = 2;
    assert!(matches!(execute(&mut eu, &Command::Write(next)), Ok(Outcome::Written(_))));
}

#[test]
fn nothing_comes_from_a_region_that_is_shut_out_but_others_pass_on_what_it_wrote() {
    let (mut us, mut eu) = (MemoryState::default(), MemoryState::default());
    execute(&mut us, &Command::Write(write(1, 1, vec![put("k", "v")]))).unwrap();
    let fenced = Member { incarnation: 1, state: MemberState::Fenced };
    execute(&mut eu, &Command::Learn([(RegionId(1), fenced)].into_iter().collect())).unwrap();
    let changes = us.changes_above(NS, &VersionVector::new());
    let from = |source| {
        let (rule, local, changes) = (Rule::Lww, actor(2), changes.clone());
        let time = time_of(&changes);
        Command::Ingest(Ingest { namespace: NS, rule, local, source, time, changes })
    };
    let Ok(Outcome::Ingested(ingested)) = execute(&mut eu, &from(actor(1))) else { panic!() };
    assert_eq!((ingested.applied, ingested.stopped), (0, Some(Stopped::SourceOut)));
    let repair = MemoryRepair { namespace: NS, rule: Rule::Lww, local: actor(2), source: actor(1) };
    for command in repair.commands(&eu, &us, 9) {
        assert_eq!(execute(&mut eu, &command), Ok(Outcome::SourceOut));
    }
    let Ok(Outcome::Ingested(ingested)) = execute(&mut eu, &from(actor(3))) else { panic!() };
    assert_eq!((ingested.applied, ingested.stopped), (1, None));
}

#[test]
fn starting_over_drops_all_and_keeps_for_review_what_nobody_else_has() {
    let mut eu = MemoryState::default();
    let ingested = Change {
        actor: actor(1),
        first_seq: 1,
        depends_on: VersionVector::new(),
        ahead_by: VersionVector::new(),
        request: None,
        deltas: vec![Delta {
            key: Bytes::from_static(b"theirs"),
            sibling: Sibling {
                dot: Dot { actor: actor(1), seq: 1 },
                time: HybridTime::ZERO,
                request: None,
                content: Content::value("t"),
            },
            supersedes: Vec::new(),
            pushed_out: PushedOut::default(),
        }],
    };
    let (rule, local, source) = (Rule::Lww, actor(2), actor(1));
    let (time, changes) = (HybridTime::ZERO, vec![ingested]);
    let ingest = Ingest { namespace: NS, rule, local, source, time, changes };
    execute(&mut eu, &Command::Ingest(ingest)).unwrap();
    for (key, value) in [("known", "1"), ("alone", "2"), ("alone", "3")] {
        execute(&mut eu, &Command::Write(write(2, 1, vec![put(key, value)]))).unwrap();
    }
    let known = [(NS, [(actor(2), 1)].into_iter().collect())].into();
    let reborn = Actor { incarnation: 2, ..actor(2) };
    let fenced = Member { incarnation: 1, state: MemberState::Fenced };
    execute(&mut eu, &Command::Learn([(RegionId(3), fenced)].into_iter().collect())).unwrap();
    let members: Members = [(RegionId(4), fenced)].into_iter().collect();
    let start = Command::StartOver(StartOver { local: reborn, known, members });
    execute(&mut eu, &start).unwrap();
    assert!(eu.records.is_empty() && eu.changes.is_empty() && eu.frontiers.is_empty());
    let kept: Vec<_> = eu.review.values().map(|held| (held.dot.seq, &held.content)).collect();
    assert_eq!(kept, [(3, &Content::value("3"))]);
    let joining = Member { incarnation: 2, state: MemberState::Joining };
    let known: Vec<_> = eu.members.iter().collect();
    assert_eq!(known, [(RegionId(2), joining), (RegionId(4), fenced)], "as the others know it");

    execute(&mut eu, &Command::Write(write(2, 1, vec![put("k", "v")]))).unwrap();
    let before = eu.clone();
    execute(&mut eu, &start).unwrap();
    assert_eq!(eu, before, "once for each incarnation");

    let writes = vec![(Bytes::from_static(b"alone"), Dot { actor: actor(2), seq: 3 })];
    execute(&mut eu, &Command::ForgetReviewed(ForgetReviewed { namespace: NS, writes })).unwrap();
    assert!(eu.review.is_empty());
}

#[test]
fn nothing_is_dropped_once_a_region_has_come_that_was_not_counted() {
    let mut eu = MemoryState::default();
    let mut removal = put("k", "v");
    removal.content = Content::Tombstone;
    execute(&mut eu, &Command::Write(write(2, 1, vec![removal]))).unwrap();
    let joining = Member { incarnation: 1, state: MemberState::Joining };
    execute(&mut eu, &Command::Learn([(RegionId(4), joining)].into_iter().collect())).unwrap();
    let collect = |members| {
        let (stable, keys) =
            ([(actor(2), 1)].into_iter().collect(), vec![Bytes::from_static(b"k")]);
        Command::Collect(Collect { namespace: NS, stable, members, keys })
    };
    assert_eq!(execute(&mut eu, &collect(Members::new())), Ok(Outcome::Collected(0)));
    let members = eu.members.clone();
    assert_eq!(execute(&mut eu, &collect(members)), Ok(Outcome::Collected(1)));
}
