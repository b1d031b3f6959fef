//! What each type means, and random programs over several regions against a model of that meaning.
//!
//! The model knows nothing of records, elements or merging. It keeps every operation with what its region
//! had applied before, and says what a reader sees from that alone.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{
    Change,
    command::{Collect, Command, Ingest, Outcome, Write, Written},
    execute,
    id::{Actor, NamespaceId, RegionId, RequestId},
    ledger::LedgerEntry,
    members::Members,
    testing::{MemoryRepair, MemoryState},
    vector::tests::any_vector,
};

const NS: NamespaceId = NamespaceId(5);

fn actor(region: u16) -> Actor {
    Actor { region: RegionId(region), incarnation: 1 }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn on(key: &str, path: &[&str], action: Action) -> Mutation {
    let path = path.iter().map(|name| bytes(name)).collect();
    Mutation { key: bytes(key), path, action, context: None }
}

pub(crate) fn any_mutation() -> impl Strategy<Value = Mutation> {
    let part = || prop::collection::vec(any::<u8>(), 0..8).prop_map(Bytes::from);
    let action = prop_oneof![
        any::<i64>().prop_map(Action::Add),
        part().prop_map(Action::Insert),
        part().prop_map(Action::Remove),
        part().prop_map(Action::Assign),
        Just(Action::Enable),
        Just(Action::Disable),
        part().prop_map(Action::Maximum),
        part().prop_map(Action::Minimum),
        Just(Action::Clear),
    ];
    let path = prop::collection::vec(part(), 0..3);
    (part(), path, action, prop::option::of(any_vector()))
        .prop_map(|(key, path, action, context)| Mutation { key, path, action, context })
}

pub(crate) fn any_refusal() -> impl Strategy<Value = Refusal> {
    let kind = prop::option::of(prop::sample::select(Kind::ALL.to_vec()));
    prop_oneof![
        Just(Refusal::NotOfRule),
        Just(Refusal::Overflow),
        kind.prop_map(Refusal::OtherKind),
        Just(Refusal::TooManyElements),
    ]
}

/// A region: its state, and the region's number.
struct Region {
    number: u16,
    rule: Rule,
    state: MemoryState,
    wall: u64,
}

impl Region {
    fn new(number: u16, rule: Rule) -> Self {
        Self { number, rule, state: MemoryState::default(), wall: 0 }
    }

    fn run(&mut self, mutations: Vec<Mutation>) -> Outcome {
        self.request(None, mutations)
    }

    fn request(&mut self, request: Option<RequestId>, mutations: Vec<Mutation>) -> Outcome {
        self.wall += 1;
        let write = Write {
            namespace: NS,
            rule: self.rule,
            actor: actor(self.number),
            time: HybridTime::new(self.wall, 0).unwrap(),
            request,
            checks: Vec::new(),
            operations: Vec::new(),
            mutations,
        };
        let Ok(outcome) = execute(&mut self.state, &Command::Write(write));
        outcome
    }

    fn mutate(&mut self, mutation: Mutation) -> Written {
        match self.run(vec![mutation]) {
            Outcome::Written(mut results) => results.remove(0),
            other => panic!("not written: {other:?}"),
        }
    }

    fn refuse(&mut self, mutation: Mutation) -> Refusal {
        let before = self.state.clone();
        let Outcome::Refused(refused) = self.run(vec![mutation]) else { panic!("not refused") };
        assert_eq!(self.state, before, "what is refused changes nothing");
        refused.refusal
    }

    fn pull(&mut self, from: &Self) {
        let changes = from.state.changes_above(NS, &self.state.frontier(NS));
        self.take(changes);
    }

    fn take(&mut self, changes: Vec<Change>) {
        let (local, source) = (actor(self.number), actor(99));
        let time = HybridTime::ZERO;
        let ingest = Ingest { namespace: NS, rule: self.rule, local, source, time, changes };
        let Ok(Outcome::Ingested(done)) = execute(&mut self.state, &Command::Ingest(ingest)) else {
            panic!("not ingested")
        };
        assert_eq!(done.stopped, None);
    }

    fn repair(&mut self, from: &Self) {
        let repair = MemoryRepair {
            namespace: NS,
            rule: self.rule,
            local: actor(self.number),
            source: actor(from.number),
        };
        for command in repair.commands(&self.state, &from.state, 3) {
            let Ok(outcome) = execute(&mut self.state, &command);
            assert!(matches!(outcome, Outcome::Merged(_) | Outcome::Advanced(_)), "{outcome:?}");
        }
    }

    /// Drops what all of `stable` have applied.
    fn collect(&mut self, stable: VersionVector) {
        let keys = self.state.held(NS).map(|(key, _)| key.clone()).collect();
        let members = Members::new();
        let collect = Collect { namespace: NS, stable, members, keys };
        let Ok(_) = execute(&mut self.state, &Command::Collect(collect));
    }

    fn seen(&self) -> VersionVector {
        self.state.frontier(NS)
    }

    /// What readers and trees see: contexts may differ, once tombstones are collected here and not there.
    fn live(&self) -> BTreeMap<&Bytes, &[Sibling]> {
        let live = self.state.held(NS).filter(|(_, record)| !record.is_dead());
        live.map(|(key, record)| (key, record.siblings())).collect()
    }

    fn read(&self, key: &str, path: &[&str]) -> Vec<Value> {
        let path: Vec<Bytes> = path.iter().map(|name| bytes(name)).collect();
        let under = element::prefix(key.as_bytes(), &path);
        let to = element::end_of(&under);
        let Ok(held) = self.state.elements(NS, &under, to.as_deref(), usize::MAX);
        let mut assembly = Assembly::at_depth(path.len());
        for (key, record) in held {
            assembly.add(&Element::from_key(&key).unwrap(), &record);
        }
        assembly.finish()
    }
}

fn pair(rule: Rule) -> (Region, Region) {
    (Region::new(1, rule), Region::new(2, rule))
}

fn meet(one: &mut Region, other: &mut Region) {
    one.pull(other);
    other.pull(one);
    assert_eq!(one.live(), other.live());
}

fn set(members: &[&str]) -> Vec<Value> {
    vec![Value::Set(members.iter().map(|member| bytes(member)).collect())]
}

#[test]
fn additions_of_all_regions_count_once_each() {
    let (mut us, mut eu) = pair(Rule::Counter);
    assert_eq!(us.mutate(on("k", &[], Action::Add(5))).sum, Some(5));
    eu.mutate(on("k", &[], Action::Add(7)));
    meet(&mut us, &mut eu);
    assert_eq!(us.mutate(on("k", &[], Action::Add(-2))).sum, Some(10));
    meet(&mut us, &mut eu);
    meet(&mut us, &mut eu);
    assert_eq!(eu.read("k", &[]), [Value::Counter(10)]);
}

#[test]
fn a_deletion_takes_from_a_counter_exactly_what_it_had_seen() {
    let (mut us, mut eu) = pair(Rule::Counter);
    us.mutate(on("k", &[], Action::Add(10)));
    eu.mutate(on("k", &[], Action::Add(1)));
    meet(&mut us, &mut eu);
    us.mutate(on("k", &[], Action::Add(3)));
    eu.mutate(on("k", &[], Action::Clear));
    assert!(eu.read("k", &[]).is_empty());
    meet(&mut us, &mut eu);
    assert_eq!(us.read("k", &[]), [Value::Counter(3)]);
    // Deleted here and there at the same time is deleted once.
    us.mutate(on("k", &[], Action::Clear));
    eu.mutate(on("k", &[], Action::Clear));
    us.mutate(on("k", &[], Action::Add(4)));
    meet(&mut us, &mut eu);
    assert_eq!(eu.read("k", &[]), [Value::Counter(4)]);
}

#[test]
fn a_counter_that_is_back_at_zero_still_knows_what_a_deletion_had_seen() {
    let (mut us, mut eu) = pair(Rule::Counter);
    us.mutate(on("k", &[], Action::Add(1)));
    meet(&mut us, &mut eu);
    eu.mutate(on("k", &[], Action::Clear));
    us.mutate(on("k", &[], Action::Add(-1)));
    us.mutate(on("k", &[], Action::Add(5)));
    meet(&mut us, &mut eu);
    assert_eq!(eu.read("k", &[]), [Value::Counter(4)]);
}

#[test]
fn a_request_that_several_regions_took_counts_once() {
    let mut regions: Vec<Region> =
        (1..4).map(|number| Region::new(number, Rule::Counter)).collect();
    let request = Some(RequestId { client: 7, number: 1 });
    for region in &mut regions {
        region.mutate(on("k", &[], Action::Add(100)));
        region.request(request, vec![on("k", &[], Action::Add(5)), on("j", &[], Action::Add(-2))]);
    }
    // Twice: what a region takes back must be heard of, too.
    for _ in 0..2 {
        for (at, from) in [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1)] {
            let changes = regions[from].state.changes_above(NS, &regions[at].seen());
            regions[at].take(changes);
        }
    }
    for region in &regions {
        assert_eq!(region.read("k", &[]), [Value::Counter(305)]);
        assert_eq!(region.read("j", &[]), [Value::Counter(-2)]);
        assert_eq!(region.live(), regions[0].live());
    }
}

const REQUEST: Option<RequestId> = Some(RequestId { client: 7, number: 1 });

#[test]
fn a_deletion_that_had_seen_a_request_twice_leaves_nothing_of_it() {
    let [mut us, mut eu, mut ap] = [1, 2, 3].map(|number| Region::new(number, Rule::Counter));
    us.request(REQUEST, vec![on("k", &[], Action::Add(5))]);
    eu.request(REQUEST, vec![on("k", &[], Action::Add(5))]);
    ap.pull(&us);
    ap.pull(&eu);
    ap.mutate(on("k", &[], Action::Clear));
    eu.pull(&us);
    for _ in 0..2 {
        meet(&mut eu, &mut ap);
        meet(&mut us, &mut eu);
    }
    assert_eq!(us.read("k", &[]), [Value::Counter(0)]);
    assert_eq!(ap.mutate(on("k", &[], Action::Add(1))).sum, Some(1));
}

#[test]
fn what_a_request_found_to_be_so_does_not_hide_that_it_was_taken_twice() {
    let (mut us, mut eu) = pair(Rule::Map);
    us.mutate(on("k", &["best"], Action::Maximum(bytes("9"))));
    meet(&mut us, &mut eu);
    let asked = || {
        let best = on("k", &["best"], Action::Maximum(bytes("5")));
        vec![best, on("k", &["visits"], Action::Add(1))]
    };
    us.request(REQUEST, asked());
    let first = eu.request(REQUEST, asked());
    // Twice: what a region takes back must be heard of, too.
    us.pull(&eu);
    eu.pull(&us);
    meet(&mut us, &mut eu);
    assert_eq!(us.read("k", &["visits"]), [Value::Counter(1)]);
    assert_eq!(eu.request(REQUEST, asked()), first, "each region answers what it answered first");
}

#[test]
fn a_deletion_before_a_request_comes_is_not_taken_back_with_it() {
    let (mut us, mut eu) = pair(Rule::Counter);
    us.mutate(on("k", &[], Action::Add(100)));
    meet(&mut us, &mut eu);
    eu.request(REQUEST, vec![on("k", &[], Action::Add(5))]);
    eu.mutate(on("k", &[], Action::Clear));
    us.request(REQUEST, vec![on("k", &[], Action::Add(5))]);
    meet(&mut us, &mut eu);
    // The deletion had not seen the one that stands.
    assert_eq!(us.read("k", &[]), [Value::Counter(5)]);
}

#[test]
fn what_was_refused_stays_refused_when_it_is_repeated() {
    let mut us = Region::new(1, Rule::Counter);
    us.mutate(on("k", &[], Action::Add(i64::MAX)));
    let again = || vec![on("k", &[], Action::Add(1))];
    let refused = us.request(REQUEST, again());
    assert!(matches!(refused, Outcome::Refused(_)));
    us.mutate(on("k", &[], Action::Add(-10)));
    assert_eq!(us.request(REQUEST, again()), refused);
}

#[test]
fn an_element_has_one_value_of_each_region_whatever_contexts_it_is_written_with() {
    let (mut us, mut eu) = pair(Rule::Map);
    let stale = Some(VersionVector::new());
    let write = |region: &mut Region, field: &str, action: Action| {
        let mutation = on("k", &[field], action);
        region.mutate(Mutation { context: stale.clone(), ..mutation });
    };
    for number in 0..20 {
        for region in [&mut us, &mut eu] {
            write(region, "tags", Action::Insert(bytes("x")));
            write(region, "vip", Action::Enable);
            write(region, "name", Action::Assign(bytes(&format!("{number}"))));
            write(region, "best", Action::Maximum(bytes(&format!("{number:02}"))));
        }
    }
    meet(&mut us, &mut eu);
    for record in us.state.records.values() {
        assert_eq!(record.siblings().len(), 2);
    }
    // Of the assignments of each region the last is held. One of these is shown, all others are lost.
    assert_eq!((us.state.ledger.len(), eu.state.ledger.len()), (39, 39));
    assert_eq!(us.read("k", &["best"]), [Value::Data(bytes("19"))]);
}

#[test]
fn what_is_left_of_a_deleted_counter_is_collected() {
    let (mut us, mut eu) = pair(Rule::Counter);
    us.mutate(on("k", &[], Action::Add(1)));
    meet(&mut us, &mut eu);
    eu.mutate(on("k", &[], Action::Clear));
    meet(&mut us, &mut eu);
    assert!(us.state.records.values().all(Record::is_dead));
    us.collect(us.seen());
    assert!(us.state.records.is_empty());
    // The other one, which still has the reset, drops it with the next count.
    us.mutate(on("k", &[], Action::Add(2)));
    meet(&mut us, &mut eu);
    assert_eq!(eu.read("k", &[]), [Value::Counter(2)]);
}

#[test]
fn a_sum_beyond_64_bits_is_refused_and_changes_nothing() {
    let (mut us, mut eu) = pair(Rule::Counter);
    us.mutate(on("k", &[], Action::Add(i64::MAX)));
    assert_eq!(us.refuse(on("k", &[], Action::Add(1))), Refusal::Overflow);
    let both = vec![on("other", &[], Action::Add(1)), on("k", &[], Action::Add(1))];
    let Outcome::Refused(refused) = us.run(both) else { panic!("not refused") };
    assert_eq!(refused, Refused { mutation: 1, refusal: Refusal::Overflow });
    assert!(us.read("other", &[]).is_empty());
    eu.mutate(on("k", &[], Action::Add(i64::MAX)));
    meet(&mut us, &mut eu);
    assert_eq!(us.read("k", &[]), [Value::Counter(2 * i128::from(i64::MAX))]);
    assert_eq!(us.refuse(on("k", &[], Action::Add(1))), Refusal::Overflow);
    let back = us.mutate(on("k", &[], Action::Add(-1)));
    assert_eq!(back.sum, Some(i64::MAX), "the end of the range that it is beyond");
    assert_eq!(us.mutate(on("k", &[], Action::Add(1 - i64::MAX))).sum, Some(i64::MAX));
}

#[test]
fn an_addition_to_a_set_that_a_removal_had_not_seen_survives_it() {
    let (mut us, mut eu) = pair(Rule::Set);
    us.mutate(on("k", &[], Action::Insert(bytes("a"))));
    us.mutate(on("k", &[], Action::Insert(bytes("b"))));
    meet(&mut us, &mut eu);
    us.mutate(on("k", &[], Action::Remove(bytes("a"))));
    us.mutate(on("k", &[], Action::Remove(bytes("b"))));
    eu.mutate(on("k", &[], Action::Insert(bytes("a"))));
    meet(&mut us, &mut eu);
    assert_eq!(us.read("k", &[]), set(&["a"]));
}

#[test]
fn a_set_is_deleted_as_far_as_it_was_seen_and_its_tombstones_go() {
    let (mut us, mut eu) = pair(Rule::Set);
    for member in ["a", "b", "c"] {
        us.mutate(on("k", &[], Action::Insert(bytes(member))));
    }
    meet(&mut us, &mut eu);
    eu.mutate(on("k", &[], Action::Insert(bytes("d"))));
    us.mutate(on("k", &[], Action::Clear));
    assert!(us.read("k", &[]).is_empty());
    meet(&mut us, &mut eu);
    assert_eq!(eu.read("k", &[]), set(&["d"]));
    us.collect(us.seen());
    assert_eq!(us.state.records.len(), 1);
}

#[test]
fn a_context_says_what_a_removal_has_seen() {
    let mut us = Region::new(1, Rule::Set);
    us.mutate(on("k", &[], Action::Insert(bytes("a"))));
    let context = Some(us.seen());
    us.mutate(on("k", &[], Action::Insert(bytes("a"))));
    us.mutate(on("k", &[], Action::Insert(bytes("b"))));
    us.mutate(Mutation { context: context.clone(), ..on("k", &[], Action::Remove(bytes("a"))) });
    us.mutate(Mutation { context, ..on("k", &[], Action::Clear) });
    assert_eq!(us.read("k", &[]), set(&["a", "b"]));
}

#[test]
fn too_much_to_delete_at_once_is_refused() {
    let mut us = Region::new(1, Rule::Set);
    let insert = |n: usize| on("k", &[], Action::Insert(bytes(&n.to_string())));
    let one_more = (0..=ELEMENTS_MAX).map(insert).collect();
    let Outcome::Refused(refused) = us.run(one_more) else { panic!("not refused") };
    assert_eq!(refused, Refused { mutation: ELEMENTS_MAX, refusal: Refusal::TooManyElements });
    us.run((0..ELEMENTS_MAX).map(insert).collect());
    us.mutate(insert(ELEMENTS_MAX));
    assert_eq!(us.refuse(on("k", &[], Action::Clear)), Refusal::TooManyElements);
    us.mutate(on("k", &[], Action::Remove(bytes("7"))));
    us.mutate(on("k", &[], Action::Clear));
    assert!(us.read("k", &[]).is_empty());
}

#[test]
fn switching_on_survives_switching_off_that_had_not_seen_it() {
    let (mut us, mut eu) = pair(Rule::Flag);
    us.mutate(on("k", &[], Action::Enable));
    meet(&mut us, &mut eu);
    us.mutate(on("k", &[], Action::Disable));
    eu.mutate(on("k", &[], Action::Enable));
    meet(&mut us, &mut eu);
    assert_eq!(us.read("k", &[]), [Value::Flag(true)]);
    us.mutate(on("k", &[], Action::Disable));
    meet(&mut us, &mut eu);
    assert!(eu.read("k", &[]).is_empty());
}

#[test]
fn extremes_of_all_regions_are_compared_byte_by_byte() {
    for (rule, of, expected) in [
        (Rule::Max, Action::Maximum as fn(Bytes) -> Action, "9"),
        (Rule::Min, Action::Minimum as fn(Bytes) -> Action, "10"),
    ] {
        let (mut us, mut eu) = pair(rule);
        us.mutate(on("k", &[], of(bytes("5"))));
        eu.mutate(on("k", &[], of(bytes("9"))));
        eu.mutate(on("k", &[], of(bytes("10"))));
        meet(&mut us, &mut eu);
        assert_eq!(us.read("k", &[]), [Value::Data(bytes(expected))]);
    }
}

#[test]
fn the_latest_assignment_of_a_register_is_shown_and_a_deletion_takes_what_it_saw() {
    let (mut us, mut eu) = pair(Rule::Map);
    us.wall = 10;
    us.mutate(on("k", &["name"], Action::Assign(bytes("late"))));
    assert!(!eu.mutate(on("k", &["name"], Action::Assign(bytes("early")))).conflict);
    meet(&mut us, &mut eu);
    assert_eq!(us.read("k", &["name"]), [Value::Data(bytes("late"))]);
    eu.mutate(on("k", &["name"], Action::Clear));
    us.mutate(on("k", &["name"], Action::Assign(bytes("again"))));
    meet(&mut us, &mut eu);
    assert_eq!(eu.read("k", &["name"]), [Value::Data(bytes("again"))]);
}

#[test]
fn an_assignment_that_was_replaced_and_never_shown_is_in_the_ledger_everywhere() {
    let (mut us, mut eu) = pair(Rule::Map);
    us.wall = 10;
    us.mutate(on("k", &["name"], Action::Assign(bytes("late"))));
    eu.mutate(on("k", &["name"], Action::Assign(bytes("early"))));
    meet(&mut us, &mut eu);
    for region in [&us, &eu] {
        let held: Vec<Content> =
            region.state.ledger.values().map(|entry| entry.loser.content.clone()).collect();
        assert_eq!(held, [Content::value("early")], "it is not shown, although it is held");
    }
    us.mutate(on("k", &["name"], Action::Assign(bytes("again"))));
    meet(&mut us, &mut eu);
    let losers = |region: &Region| -> Vec<Content> {
        region.state.ledger.values().map(|entry| entry.loser.content.clone()).collect()
    };
    assert_eq!(losers(&us), [Content::value("early")]);
    assert_eq!(losers(&eu), losers(&us));
}

#[test]
fn a_map_shows_its_fields_nested_and_each_by_its_own_kind() {
    let mut us = Region::new(1, Rule::Map);
    us.mutate(on("k", &["address", "city"], Action::Assign(bytes("Oslo"))));
    us.mutate(on("k", &["visits"], Action::Add(3)));
    us.mutate(on("k", &["tags"], Action::Insert(bytes("x"))));
    us.mutate(on("k", &["vip"], Action::Enable));
    let city = || Value::Map(vec![(bytes("city"), Value::Data(bytes("Oslo")))]);
    let expected = Value::Map(vec![
        (bytes("address"), city()),
        (bytes("tags"), set(&["x"]).remove(0)),
        (bytes("vip"), Value::Flag(true)),
        (bytes("visits"), Value::Counter(3)),
    ]);
    assert_eq!(us.read("k", &[]), [expected]);
    assert_eq!(us.read("k", &["address"]), [city()]);
    us.mutate(on("k", &["address"], Action::Clear));
    assert!(us.read("k", &["address"]).is_empty());
    assert_eq!(us.read("k", &["visits"]), [Value::Counter(3)]);
    us.mutate(on("k", &[], Action::Clear));
    assert!(us.read("k", &[]).is_empty());
}

#[test]
fn a_field_takes_no_operation_of_another_kind_here_and_keeps_both_of_elsewhere() {
    let (mut us, mut eu) = pair(Rule::Map);
    us.mutate(on("k", &["a"], Action::Add(1)));
    let assign = on("k", &["a"], Action::Assign(bytes("x")));
    assert_eq!(us.refuse(assign.clone()), Refusal::OtherKind(Some(Kind::Counter)));
    let under = on("k", &["a", "b"], Action::Enable);
    assert_eq!(us.refuse(under.clone()), Refusal::OtherKind(Some(Kind::Counter)));
    eu.mutate(under);
    assert_eq!(eu.refuse(on("k", &["a"], Action::Add(1))), Refusal::OtherKind(None));
    meet(&mut us, &mut eu);
    let nested = Value::Map(vec![(bytes("b"), Value::Flag(true))]);
    assert_eq!(us.read("k", &["a"]), [Value::Counter(1), nested]);
    us.mutate(on("k", &["a"], Action::Clear));
    us.mutate(assign);
}

#[test]
fn operations_of_another_rule_are_refused() {
    for rule in Rule::ALL.into_iter().filter(|rule| rule.is_typed()) {
        for action in [
            Action::Add(1),
            Action::Insert(bytes("a")),
            Action::Remove(bytes("a")),
            Action::Assign(bytes("a")),
            Action::Enable,
            Action::Disable,
            Action::Maximum(bytes("a")),
            Action::Minimum(bytes("a")),
        ] {
            let fits = Kind::of_rule(rule) == action.kind();
            let mut us = Region::new(1, rule);
            if !fits {
                assert_eq!(us.refuse(on("k", &[], action.clone())), Refusal::NotOfRule);
            }
            if rule == Rule::Map {
                us.mutate(on("k", &["f"], action));
            } else {
                assert_eq!(us.refuse(on("k", &["f"], action)), Refusal::NotOfRule);
            }
        }
    }
    let mut us = Region::new(1, Rule::Lww);
    assert_eq!(us.refuse(on("k", &[], Action::Clear)), Refusal::NotOfRule);
}

/// An operation as the model keeps it.
#[derive(Clone, Debug)]
struct Did {
    dot: Dot,
    time: HybridTime,
    seen: VersionVector,
    path: Vec<Bytes>,
    action: Action,
    request: Option<u64>,
    /// Additions of the region's own that another's stand for.
    takes_back: Vec<Dot>,
}

impl Did {
    fn saw(&self, other: &Self) -> bool {
        self.seen.covers(other.dot)
    }
}

/// What a reader sees at a path, from the operations that are applied: one answer a kind.
fn meaning(done: &[&Did], path: &[Bytes]) -> BTreeMap<Kind, Value> {
    let here = |kind: Kind| {
        done.iter().filter(move |did| did.path == path && did.action.kind() == Some(kind))
    };
    // Deletions of this place or of one above it.
    let clears: Vec<&&Did> = done
        .iter()
        .filter(|did| did.action == Action::Clear && path.starts_with(&did.path))
        .collect();
    let is_cleared = |it: &Did| clears.iter().any(|clear| clear.saw(it));
    let mut shown = BTreeMap::new();

    let added: Vec<&&Did> = here(Kind::Counter).filter(|it| !is_cleared(it)).collect();
    let is_taken_back = |it: &Did| done.iter().any(|other| other.takes_back.contains(&it.dot));
    let sum = added.iter().map(|it| match it.action {
        Action::Add(by) if !is_taken_back(it) => i128::from(by),
        _ => 0,
    });
    if !added.is_empty() {
        shown.insert(Kind::Counter, Value::Counter(sum.sum()));
    }

    let removes = |member: &Bytes, it: &Did| {
        let of = |other: &&&Did| matches!(&other.action, Action::Remove(gone) if gone == member);
        here(Kind::Set).filter(of).any(|other| other.saw(it))
    };
    let members: BTreeSet<Bytes> = here(Kind::Set)
        .filter_map(|it| match &it.action {
            Action::Insert(member) if !is_cleared(it) && !removes(member, it) => {
                Some(member.clone())
            }
            _ => None,
        })
        .collect();
    if !members.is_empty() {
        shown.insert(Kind::Set, Value::Set(members.into_iter().collect()));
    }

    let is_off =
        |it: &Did| here(Kind::Flag).any(|other| other.action == Action::Disable && other.saw(it));
    if here(Kind::Flag).any(|it| it.action == Action::Enable && !is_cleared(it) && !is_off(it)) {
        shown.insert(Kind::Flag, Value::Flag(true));
    }

    for kind in [Kind::Register, Kind::Max, Kind::Min] {
        let data = |it: &Did| match &it.action {
            Action::Assign(data) | Action::Maximum(data) | Action::Minimum(data) => data.clone(),
            _ => Bytes::new(),
        };
        let is_replaced = |it: &Did| here(kind).any(|other| other.saw(it));
        let kept = here(kind).filter(|it| !is_cleared(it) && !is_replaced(it));
        let best = kept.map(|it| ((it.time, it.dot), data(it))).reduce(|best, it| match kind {
            Kind::Max => {
                if it.1 > best.1 {
                    it
                } else {
                    best
                }
            }
            Kind::Min => {
                if it.1 < best.1 {
                    it
                } else {
                    best
                }
            }
            _ => best.max(it),
        });
        if let Some((_, data)) = best {
            shown.insert(kind, Value::Data(data));
        }
    }
    shown
}

/// A step of a program.
#[derive(Clone, Debug)]
enum Step {
    Do(usize, Vec<(usize, usize, usize)>),
    /// A client tries one of a few requests.
    Try(usize, usize),
    Pull(usize, usize),
    Repair(usize, usize),
    Collect(usize),
}

fn any_program() -> impl Strategy<Value = (Rule, Vec<Step>)> {
    let typed = Rule::ALL.into_iter().filter(|rule| rule.is_typed()).collect::<Vec<_>>();
    let ops = prop::collection::vec((0usize..9, 0usize..4, 0usize..3), 1..4);
    let step = prop_oneof![
        6 => (0usize..3, ops).prop_map(|(at, ops)| Step::Do(at, ops)),
        2 => (0usize..3, 0..REQUESTS.len()).prop_map(|(at, number)| Step::Try(at, number)),
        4 => (0usize..3, 0usize..3).prop_map(|(at, from)| Step::Pull(at, from)),
        1 => (0usize..3, 0usize..3).prop_map(|(at, from)| Step::Repair(at, from)),
        1 => (0usize..3).prop_map(Step::Collect),
    ];
    (prop::sample::select(typed), prop::collection::vec(step, 1..40))
}

/// What clients ask for under an id. Where a maximum is held already, the first operation of the second
/// writes nothing.
const REQUESTS: [&[(usize, usize, usize)]; 4] = [
    &[(0, 0, 2)],
    &[(6, 1, 1), (0, 0, 0)],
    &[(0, 0, 1), (8, 0, 0), (0, 0, 2)],
    &[(0, 1, 0), (1, 3, 0)],
];

const PATHS: [&[&str]; 4] = [&["a"], &["b"], &["a", "x"], &["c", "y"]];

fn action(kind: usize, data: usize) -> Action {
    let data_of = |names: [&str; 3]| bytes(names[data]);
    match kind {
        0 => Action::Add([1, -2, 7][data]),
        1 => Action::Insert(data_of(["p", "q", "r"])),
        2 => Action::Remove(data_of(["p", "q", "r"])),
        3 => Action::Assign(data_of(["u", "v", "w"])),
        4 => Action::Enable,
        5 => Action::Disable,
        6 => Action::Maximum(data_of(["1", "2", "3"])),
        7 => Action::Minimum(data_of(["1", "2", "3"])),
        _ => Action::Clear,
    }
}

/// The three regions of a program, and everything that was done.
struct World {
    rule: Rule,
    regions: Vec<Region>,
    done: Vec<Did>,
    /// Requests that a region has left to another.
    left: BTreeSet<(usize, u64)>,
}

impl World {
    fn new(rule: Rule) -> Self {
        let regions = (1..4).map(|number| Region::new(number, rule)).collect();
        Self { rule, regions, done: Vec::new(), left: BTreeSet::new() }
    }

    /// What must be seen of a region at a path.
    fn expected(&self, at: usize, path: &[Bytes]) -> BTreeMap<Kind, Value> {
        let seen = self.regions[at].seen();
        let applied: Vec<&Did> = self.done.iter().filter(|did| seen.covers(did.dot)).collect();
        meaning(&applied, path)
    }

    fn shown(&self, at: usize, path: &[&str]) -> BTreeMap<Kind, Value> {
        let region = &self.regions[at];
        let path: Vec<Bytes> = path.iter().map(|name| bytes(name)).collect();
        let mut shown = BTreeMap::new();
        for kind in Kind::ALL {
            let under = element::prefix_of(b"k", &path, kind);
            let to = element::end_of(&under);
            let Ok(held) = region.state.elements(NS, &under, to.as_deref(), usize::MAX);
            let mut assembly = Assembly::at_depth(path.len());
            for (key, record) in held {
                assembly.add(&Element::from_key(&key).unwrap(), &record);
            }
            shown.extend(assembly.finish().into_iter().map(|value| (kind, value)));
        }
        shown
    }

    fn paths(&self) -> Vec<&'static [&'static str]> {
        if self.rule == Rule::Map { PATHS.to_vec() } else { vec![&[]] }
    }

    fn check(&self, at: usize) {
        for path in self.paths() {
            let names: Vec<Bytes> = path.iter().map(|name| bytes(name)).collect();
            assert_eq!(self.shown(at, path), self.expected(at, &names), "region {at} at {path:?}");
        }
    }

    /// Plans operations that the model allows, and does them as one write.
    fn act(&mut self, at: usize, request: Option<u64>, ops: &[(usize, usize, usize)]) {
        let seen = self.regions[at].seen();
        let mut mutations: Vec<Mutation> = Vec::new();
        for &(kind, path, data) in ops {
            let planned = match Kind::of_rule(self.rule) {
                // Only what the rule has, or a deletion.
                Some(own) => {
                    let own: Vec<usize> = (0..9)
                        .filter(|&it| action(it, data).kind().is_none_or(|k| k == own))
                        .collect();
                    action(own[kind % own.len()], data)
                }
                None => action(kind, data),
            };
            let path = if self.rule == Rule::Map { PATHS[path] } else { &[] };
            mutations.push(on("k", path, planned));
        }
        // One at a time in the model; several in one write must see each other.
        let id = request.map(|number| RequestId { client: 1, number });
        match self.regions[at].request(id, mutations.clone()) {
            Outcome::Written(results) => {
                let mut seen = seen;
                for (mutation, result) in mutations.into_iter().zip(results) {
                    let is_new = !seen.covers(result.dot);
                    let (path, action) = (mutation.path, mutation.action);
                    if is_new {
                        self.done.push(Did {
                            dot: result.dot,
                            time: result.time,
                            seen: seen.clone(),
                            path,
                            action,
                            request,
                            takes_back: Vec::new(),
                        });
                        seen.advance(result.dot.actor, result.dot.seq);
                    }
                }
                assert_eq!(seen, self.regions[at].seen(), "every event is of a mutation");
            }
            Outcome::Refused(Refused { refusal: Refusal::OtherKind(_), .. }) => {
                assert_eq!(self.rule, Rule::Map);
            }
            other => panic!("{other:?}"),
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Do(at, ops) => self.act(*at, None, ops),
            &Step::Try(at, number) => self.act(at, Some(number as u64), REQUESTS[number]),
            &Step::Pull(at, from) if at != from => {
                let seen = self.regions[at].seen();
                let changes = self.regions[from].state.changes_above(NS, &seen);
                for change in changes {
                    self.take(at, change);
                }
            }
            &Step::Repair(at, from) if at != from => {
                let source = std::mem::replace(&mut self.regions[from], Region::new(0, self.rule));
                self.regions[at].repair(&source);
                self.regions[from] = source;
            }
            Step::Pull(..) | Step::Repair(..) => {}
            &Step::Collect(at) => {
                let stable = self.stable(at);
                self.regions[at].collect(stable);
            }
        }
    }

    /// A region hears of a change. Of a request that it took as well, and whose lower region it was not, it
    /// takes back what it had added and what no deletion has taken away yet.
    fn take(&mut self, at: usize, change: Change) {
        let own = actor(self.regions[at].number);
        let request = change.request.map(|request| request.id.number);
        let before = self.regions[at].seen();
        let applied: Vec<&Did> = self.done.iter().filter(|did| before.covers(did.dot)).collect();
        let mut after = before.clone();
        after.add(change.last());
        let is_cleared = |it: &Did| {
            let clears = self.done.iter().filter(|did| did.action == Action::Clear);
            let clears = clears.filter(|clear| after.covers(clear.dot));
            clears.filter(|clear| it.path.starts_with(&clear.path)).any(|clear| clear.saw(it))
        };
        let is_own = |it: &&&Did| it.dot.actor == own && request.is_some() && it.request == request;
        let adds = |it: &&&Did| matches!(it.action, Action::Add(_)) && !is_cleared(it);
        let takes_back: Vec<Dot> =
            applied.iter().filter(is_own).filter(adds).map(|it| it.dot).collect();
        let gives_way = change.actor < own
            && !before.covers(change.last())
            && request.is_some_and(|request| !self.left.contains(&(at, request)));
        let path = applied.iter().find(|it| takes_back.contains(&it.dot)).map(|it| it.path.clone());

        self.regions[at].take(vec![change]);

        let region = &self.regions[at];
        let written = region.state.changes_above(NS, &before);
        let written: Vec<&Change> = written.iter().filter(|it| it.actor == own).collect();
        let Some(path) = path.filter(|_| gives_way) else {
            assert!(written.is_empty(), "nothing is taken back: {written:?}");
            return;
        };
        assert_eq!(written.len(), 1, "what was added twice is taken back");
        self.left.extend(request.map(|request| (at, request)));
        self.done.push(Did {
            dot: written[0].last(),
            time: written[0].time(),
            seen: written[0].seen().into_owned(),
            path,
            action: Action::Add(0),
            request: None,
            takes_back,
        });
    }

    /// What every region has applied, as a region may conclude: of one whose events it does not all have
    /// it knows nothing.
    fn stable(&self, at: usize) -> VersionVector {
        let here = self.regions[at].seen();
        let told = self.regions.iter().map(|region| {
            let (seen, own) = (region.seen(), actor(region.number));
            if seen.get(own) <= here.get(own) { seen } else { VersionVector::new() }
        });
        told.fold(here.clone(), |stable, told| stable.meet(&told))
    }

    /// Assignments that were not shown somewhere because of a later one that had not seen them; and those of
    /// which that holds everywhere: they are held so in the end, or were taken away by whoever saw the other,
    /// and nobody replaced them who saw nothing else.
    fn lost(&self) -> (BTreeSet<Dot>, BTreeSet<Dot>) {
        let all: Vec<&Did> = self.done.iter().collect();
        let is_of = |it: &Did, path: &[Bytes]| match it.action {
            Action::Assign(_) => it.path == path,
            Action::Clear => path.starts_with(&it.path),
            _ => false,
        };
        let held = |among: &[&Did]| -> Vec<Did> {
            let is_gone = |it: &Did| among.iter().any(|did| is_of(did, &it.path) && did.saw(it));
            let is_held = |it: &&&Did| matches!(it.action, Action::Assign(_)) && !is_gone(it);
            among.iter().filter(is_held).map(|it| (*it).clone()).collect()
        };
        let is_beaten = |one: &Did, among: &[Did]| {
            let is_rival = |it: &Did| it.path == one.path && !it.saw(one);
            among.iter().any(|it| is_rival(it) && (it.time, it.dot) > (one.time, one.dot))
        };
        let in_the_end = held(&all);
        let (mut lost, mut replaced) = (BTreeSet::new(), BTreeSet::new());
        lost.extend(in_the_end.iter().filter(|it| is_beaten(it, &in_the_end)).map(|it| it.dot));
        for by in &self.done {
            let seen: Vec<&Did> = all.iter().copied().filter(|did| by.saw(did)).collect();
            let held = held(&seen);
            for one in held.iter().filter(|it| is_of(by, &it.path)) {
                if is_beaten(one, &held) { &mut lost } else { &mut replaced }.insert(one.dot);
            }
        }
        lost.retain(|dot| !replaced.contains(dot));
        let assigned: Vec<Did> = all
            .iter()
            .filter(|it| matches!(it.action, Action::Assign(_)))
            .map(|it| (*it).clone())
            .collect();
        let beaten =
            assigned.iter().filter(|it| is_beaten(it, &assigned)).map(|it| it.dot).collect();
        (beaten, lost)
    }

    /// Everyone hears of everything, and says so.
    fn heal(&mut self) {
        for _ in 0..2 {
            for (at, from) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
                self.step(&Step::Repair(at, from));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_show_what_the_model_of_each_type_says((rule, program) in any_program()) {
        let mut world = World::new(rule);
        for step in &program {
            world.step(step);
            let (Step::Do(at, _)
            | Step::Try(at, _)
            | Step::Pull(at, _)
            | Step::Repair(at, _)
            | Step::Collect(at)) = step;
            world.check(*at);
        }
        world.heal();
        let (beaten, lost) = world.lost();
        for at in 0..3 {
            world.check(at);
            let ledger = &world.regions[at].state.ledger;
            let noted: BTreeSet<Dot> = ledger.values().map(|entry| entry.loser.dot).collect();
            prop_assert!(noted.is_superset(&lost), "the ledger has every loser: {:?}", lost);
            prop_assert!(noted.is_subset(&beaten), "and nothing else: {:?}", noted);
            let elsewhere = &world.regions[0].state.ledger;
            let is_lost = |entry: &LedgerEntry| lost.contains(&entry.loser.dot);
            let mut losers = ledger.iter().filter(|(_, entry)| is_lost(entry));
            prop_assert!(losers.all(|(id, _)| elsewhere.contains_key(id)), "under the same id");
            prop_assert_eq!(world.regions[at].seen(), world.regions[0].seen());
            let collected = world.regions[at].seen();
            world.regions[at].collect(collected);
            prop_assert!(world.regions[at].state.records.values().all(|it| !it.is_dead()));
            prop_assert_eq!(world.regions[at].live(), world.regions[0].live());
        }
    }
}
