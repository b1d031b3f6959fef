//! Watchers that move between regions while these write, exchange, repair and forget.

use std::{collections::BTreeMap, convert::Infallible};

use proptest::prelude::*;

use super::*;
use crate::{
    command::{Command, Ingest, Operation, Outcome, Trim, Write},
    execute::{ShardState, execute},
    members::{Member, MemberState},
    record::Rule,
    testing::{MemoryRepair, MemoryState},
    token::{ResumeToken, TokenKey},
};

const NS: NamespaceId = NamespaceId(5);
const KEYS: usize = 6;
/// Records of one page.
const PAGE: usize = 2;

fn actor(region: usize) -> Actor {
    Actor { region: RegionId(u16::try_from(region).unwrap() + 1), incarnation: 1 }
}

fn key(number: usize) -> Bytes {
    Bytes::from(format!("k{number}"))
}

impl Source for MemoryState {
    type Error = Infallible;

    fn standing(&self) -> Standing {
        let (frontier, ahead) = (ShardState::frontier(self, NS), ShardState::ahead(self, NS));
        let is_exact = frontier.covers_all(&ahead);
        let trimmed = self.trimmed.get(&NS).cloned().unwrap_or_default();
        Standing { frontier, trimmed, members: self.members.clone(), is_exact }
    }

    fn changes(
        &self,
        actor: Actor,
        from_seq: u64,
        bytes_max: usize,
    ) -> Result<Option<Vec<(Change, usize)>>, Infallible> {
        let mut expected = from_seq;
        let mut found = Vec::new();
        for ((_, _, first), change) in
            self.changes.range((NS, actor, from_seq)..=(NS, actor, u64::MAX))
        {
            if *first != expected || found.len() * 10 >= bytes_max {
                break;
            }
            expected = change.last().seq + 1;
            found.push((change.clone(), 10));
        }
        let known = ShardState::frontier(self, NS).get(actor);
        Ok((!found.is_empty() || known < from_seq).then_some(found))
    }

    fn page(&self, start: &Bytes, end: Option<&Bytes>) -> Result<Page, Infallible> {
        let Standing { frontier, is_exact, .. } = self.standing();
        let inside = |key: &Bytes| start <= key && end.is_none_or(|end| key < end);
        let held = self.held(NS).filter(|(key, _)| inside(key));
        let mut records: Vec<_> =
            held.take(PAGE + 1).map(|(key, record)| (key.clone(), record.clone())).collect();
        let next = (records.len() > PAGE).then(|| records.pop()).flatten().map(|(key, _)| key);
        Ok(Page { frontier, is_exact, records, next })
    }
}

#[derive(Clone, Debug)]
enum Act {
    /// A region writes to some keys at once; `None` deletes.
    Write(usize, Vec<(usize, Option<u8>)>),
    /// Changes stream from one region to another.
    Sync(usize, usize),
    /// A region forgets its change log.
    Trim(usize),
    /// A region takes over another's state; `false` leaves off half-way.
    Repair(usize, usize, bool),
    /// The watcher takes something in a region.
    Watch(usize, usize),
    /// The watcher goes on from where it stood earlier, by this many takes.
    Back(usize),
}

fn region() -> impl Strategy<Value = usize> {
    0usize..3
}

fn write_act() -> impl Strategy<Value = Act> {
    let writes = prop::collection::btree_map(0..KEYS, any::<Option<u8>>(), 1..4);
    (region(), writes).prop_map(|(at, writes)| Act::Write(at, writes.into_iter().collect()))
}

/// Histories in which no change log is trimmed.
fn whole_acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => write_act(),
        3 => (region(), region()).prop_map(|(from, to)| Act::Sync(from, to)),
        4 => (region(), 1usize..60).prop_map(|(at, bytes)| Act::Watch(at, bytes)),
        1 => (1usize..4).prop_map(Act::Back),
    ];
    prop::collection::vec(act, 1..60)
}

fn any_acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => write_act(),
        3 => (region(), region()).prop_map(|(from, to)| Act::Sync(from, to)),
        1 => region().prop_map(Act::Trim),
        1 => (region(), region(), any::<bool>())
            .prop_map(|(from, to, whole)| Act::Repair(from, to, whole)),
        5 => (region(), 1usize..60).prop_map(|(at, bytes)| Act::Watch(at, bytes)),
    ];
    prop::collection::vec(act, 1..80)
}

struct World {
    rule: Rule,
    regions: Vec<MemoryState>,
    wall: u64,
    /// Every write that was ever made.
    written: BTreeSet<Dot>,
}

impl World {
    fn new(rule: Rule) -> Self {
        Self { rule, regions: vec![MemoryState::default(); 3], wall: 0, written: BTreeSet::new() }
    }

    fn write(&mut self, at: usize, writes: &[(usize, Option<u8>)]) {
        self.wall += 1;
        let operation = |&(number, value): &(usize, Option<u8>)| Operation {
            key: key(number),
            content: value.map_or(Content::Tombstone, |value| Content::value(vec![value])),
            context: None,
        };
        let command = Command::Write(Write {
            namespace: NS,
            rule: self.rule,
            actor: actor(at),
            // Clocks differ, so that what comes later may lose.
            time: HybridTime::new(1000 + self.wall * 7 % 13, 0).unwrap(),
            request: None,
            checks: Vec::new(),
            operations: writes.iter().map(operation).collect(),
            mutations: Vec::new(),
        });
        let Ok(outcome) = execute(&mut self.regions[at], &command);
        if let Outcome::Written(results) = outcome {
            self.written.extend(results.iter().map(|written| written.dot));
        }
    }

    fn sync(&mut self, from: usize, to: usize) {
        let frontier = ShardState::frontier(&self.regions[to], NS);
        let changes = self.regions[from].changes_above(NS, &frontier);
        let (local, source) = (actor(to), actor(from));
        let time = HybridTime::new(1000 + self.wall, 0).unwrap();
        let ingest = Ingest { namespace: NS, rule: self.rule, local, source, time, changes };
        let Ok(_) = execute(&mut self.regions[to], &Command::Ingest(ingest));
    }

    fn repair(&mut self, from: usize, to: usize, whole: bool) {
        if from == to {
            return;
        }
        let repair =
            MemoryRepair { namespace: NS, rule: self.rule, local: actor(to), source: actor(from) };
        let mut commands = repair.commands(&self.regions[to], &self.regions[from], 2);
        if !whole {
            commands.truncate(commands.len() / 2);
        }
        for command in &commands {
            let Ok(_) = execute(&mut self.regions[to], command);
        }
    }

    fn trim(&mut self, at: usize) {
        let upto = ShardState::frontier(&self.regions[at], NS);
        let trim = Command::Trim(Trim { namespace: NS, upto });
        let Ok(_) = execute(&mut self.regions[at], &trim);
    }

    /// Lets all regions have everything.
    fn settle(&mut self) {
        for _ in 0..3 {
            for from in 0..3 {
                for to in 0..3 {
                    self.sync(from, to);
                    self.repair(from, to, true);
                }
            }
        }
        let first = ShardState::frontier(&self.regions[0], NS);
        for region in &self.regions {
            assert_eq!(ShardState::frontier(region, NS), first);
            assert!(region.standing().is_exact);
        }
    }

    fn values(&self, at: usize) -> BTreeMap<Bytes, BTreeSet<Dot>> {
        let live = self.regions[at].held(NS).filter(|(_, record)| !record.is_dead());
        live.map(|(key, record)| {
            let dots = record.siblings().iter().map(|held| held.dot);
            (key.clone(), dots.collect())
        })
        .collect()
    }
}

/// Applies what it is given, and knows what may not come.
struct Watcher {
    rule: Rule,
    filter: Filter,
    feed: Feed,
    earlier: Vec<Cursor>,
    held: BTreeMap<Bytes, BTreeMap<Dot, (HybridTime, Content)>>,
    /// The same, by applying only what is current when it comes.
    plain: BTreeMap<Bytes, Dot>,
    /// Events that came, to tell repeats.
    seen: BTreeSet<Dot>,
    /// Of each key, what the events that came had seen.
    past: BTreeMap<Bytes, VersionVector>,
    resets: usize,
}

impl Watcher {
    fn new(rule: Rule, cursor: Cursor) -> Self {
        Self {
            rule,
            filter: Filter::default(),
            feed: Feed::new(cursor),
            earlier: Vec::new(),
            held: BTreeMap::new(),
            plain: BTreeMap::new(),
            seen: BTreeSet::new(),
            past: BTreeMap::new(),
            resets: 0,
        }
    }

    /// Takes one step: what it gives, and the changes.
    fn step(&mut self, region: &MemoryState, bytes: usize) -> (Step, Vec<Picked>) {
        let mut changes = Vec::new();
        let Ok(step) = self.feed.step(region, &self.filter, bytes, |picked| {
            changes.push(picked);
            Ok(0)
        });
        (step, changes)
    }

    /// Takes one step, and goes on from what a token carries. Answers whether there may be more.
    fn watch(&mut self, region: &MemoryState, bytes: usize) -> bool {
        let (step, changes) = self.step(region, bytes);
        if step.lost.is_some() {
            self.resets += 1;
            self.held.clear();
            self.plain.clear();
            self.seen.clear();
            self.past.clear();
            self.earlier.clear();
        }
        for change in changes {
            assert!(change.deltas.len() <= change.size);
            for delta in &change.deltas {
                let record = region.records.get(&(NS, delta.key.clone()));
                if is_current(&delta.sibling, record) {
                    self.hold(&delta.key, &delta.sibling);
                }
                self.apply(delta, &change.seen);
            }
        }
        for (key, record) in step.records {
            let past = self.past.entry(key.clone()).or_default();
            assert!(record.context().covers_all(past), "an older record of {key:?} came");
            past.join(record.context());
            self.seen.extend(record.siblings().iter().map(|held| held.dot));
            record.siblings().iter().for_each(|held| self.hold(&key, held));
            let held = record.siblings().iter();
            self.held.insert(key, held.map(|it| (it.dot, (it.time, it.content.clone()))).collect());
        }
        if self.feed.cursor().is_live() {
            self.earlier.push(self.feed.cursor().clone());
        }
        step.moved
    }

    fn hold(&mut self, key: &Bytes, written: &Sibling) {
        match written.content {
            Content::Value { .. } => self.plain.insert(key.clone(), written.dot),
            Content::Tombstone => self.plain.remove(key),
            Content::Count { .. } | Content::Reset { .. } => unreachable!("of a typed rule"),
        };
    }

    fn apply(&mut self, delta: &Delta, seen: &VersionVector) {
        let dot = delta.sibling.dot;
        if !self.seen.insert(dot) {
            return;
        }
        let past = self.past.entry(delta.key.clone()).or_default();
        assert!(!past.covers(dot), "{dot} of {:?} came after what had seen it", delta.key);
        past.join(seen);
        past.add(dot);
        let held = self.held.entry(delta.key.clone()).or_default();
        held.retain(|held, _| !delta.supersedes.contains(held));
        held.insert(dot, (delta.sibling.time, delta.sibling.content.clone()));
        match self.rule {
            Rule::Siblings => held.retain(|_, (_, content)| *content != Content::Tombstone),
            Rule::Lww => {
                let winner = held.iter().map(|(dot, (time, _))| (*time, *dot)).max();
                held.retain(|dot, (time, _)| Some((*time, *dot)) == winner);
            }
            _ => unreachable!("typed rules are watched by element"),
        }
    }

    /// Moves through a token.
    fn move_on(&mut self) {
        let cursor = self.feed.cursor().clone();
        let token =
            ResumeToken { namespace: NS, filter: self.filter.fingerprint(), cursors: vec![cursor] };
        let key = TokenKey::without_secret("prod");
        let mut token = ResumeToken::decode(&key, &token.encode(&key)).unwrap();
        self.feed = Feed::new(token.cursors.remove(0));
    }

    fn drain(&mut self, region: &MemoryState) {
        let mut takes = 0;
        while self.watch(region, 25) {
            takes += 1;
            assert!(takes < 10_000, "it never ends");
        }
    }

    fn plain_values(&self) -> BTreeMap<Bytes, BTreeSet<Dot>> {
        self.plain.iter().map(|(key, dot)| (key.clone(), BTreeSet::from([*dot]))).collect()
    }

    fn values(&self) -> BTreeMap<Bytes, BTreeSet<Dot>> {
        let mut values = BTreeMap::new();
        for (key, held) in &self.held {
            let live = held.iter().filter(|(_, (_, content))| *content != Content::Tombstone);
            let dots: BTreeSet<Dot> = live.map(|(dot, _)| *dot).collect();
            if !dots.is_empty() {
                values.insert(key.clone(), dots);
            }
        }
        values
    }
}

fn play(world: &mut World, watcher: &mut Watcher, acts: &[Act]) {
    for act in acts {
        match act {
            Act::Write(at, writes) => world.write(*at, writes),
            Act::Sync(from, to) => world.sync(*from, *to),
            Act::Trim(at) => world.trim(*at),
            Act::Repair(from, to, whole) => world.repair(*from, *to, *whole),
            Act::Watch(at, bytes) => {
                watcher.move_on();
                watcher.watch(&world.regions[*at], *bytes);
            }
            Act::Back(takes) => {
                let place = watcher.earlier.len().saturating_sub(*takes);
                if let Some(cursor) = watcher.earlier.get(place) {
                    watcher.feed = Feed::new(cursor.clone());
                    // Whoever goes back goes on from there, and not from what came after it.
                    watcher.earlier.truncate(place + 1);
                }
            }
        }
    }
}

fn any_rule() -> impl Strategy<Value = Rule> {
    prop_oneof![Just(Rule::Lww), Just(Rule::Siblings)]
}

proptest! {
    #[test]
    fn every_change_comes_in_causal_order_whichever_region_serves(
        rule in any_rule(), acts in whole_acts(), last in region()
    ) {
        let mut world = World::new(rule);
        let mut watcher = Watcher::new(rule, Cursor::live(VersionVector::new()));
        play(&mut world, &mut watcher, &acts);
        (0..18).for_each(|pair| world.sync(pair / 3 % 3, pair % 3));
        watcher.move_on();
        watcher.drain(&world.regions[last]);
        prop_assert_eq!(watcher.resets, 0);
        prop_assert_eq!(&watcher.seen, &world.written);
        prop_assert_eq!(watcher.values(), world.values(last));
        if rule == Rule::Lww {
            prop_assert_eq!(watcher.plain_values(), world.values(last));
        }
    }

    #[test]
    fn a_watcher_ends_with_the_regions_state_whatever_was_forgotten_and_repaired(
        rule in any_rule(), acts in any_acts(), begin in 0usize..40, last in region()
    ) {
        let mut world = World::new(rule);
        let begin = begin.min(acts.len());
        let mut nobody = Watcher::new(rule, Cursor::live(VersionVector::new()));
        play(&mut world, &mut nobody, &acts[..begin]);
        let mut watcher = Watcher::new(rule, Cursor::snapshot());
        play(&mut world, &mut watcher, &acts[begin..]);
        world.settle();
        watcher.move_on();
        watcher.drain(&world.regions[last]);
        prop_assert_eq!(watcher.values(), world.values(last));
        if rule == Rule::Lww {
            prop_assert_eq!(watcher.plain_values(), world.values(last));
        }
    }

    #[test]
    fn a_filter_shows_what_it_names_and_nothing_else(
        acts in whole_acts(), low in 0..KEYS, high in 0..KEYS, kind in 0..3, of in region()
    ) {
        let mut world = World::new(Rule::Lww);
        let chosen = BTreeSet::from([actor(of).region]);
        let origins = match kind {
            0 => Origins::All,
            1 => Origins::Only(chosen),
            _ => Origins::AllBut(chosen),
        };
        let filter = Filter { start: key(low), end: Some(key(high)), origins };
        let mut all = Watcher::new(Rule::Lww, Cursor::live(VersionVector::new()));
        let mut some = Watcher::new(Rule::Lww, Cursor::live(VersionVector::new()));
        some.filter = filter.clone();
        play(&mut world, &mut some, &acts);
        world.settle();
        all.drain(&world.regions[0]);
        // It follows the same region to the end.
        some.drain(&world.regions[0]);
        if all.resets + some.resets == 0 {
            let keys: BTreeSet<&Bytes> = some.past.keys().collect();
            prop_assert!(keys.iter().all(|key| filter.takes_key(key)));
            prop_assert!(some.seen.iter().all(|dot| filter.origins.takes(dot.actor.region)));
            let in_range = |change: &Change| {
                let dots = (change.first_seq..).map(|seq| Dot { actor: change.actor, seq });
                let inside = dots.zip(&change.deltas).filter(|(dot, delta)| {
                    filter.takes_key(&delta.key) && filter.origins.takes(dot.actor.region)
                });
                inside.map(|(dot, _)| dot).collect::<Vec<_>>()
            };
            let expected: BTreeSet<Dot> =
                world.regions[0].changes.values().flat_map(in_range).collect();
            prop_assert_eq!(&some.seen, &expected);
        }
    }
}

#[test]
fn a_trimmed_log_loses_whoever_lacks_it_and_nobody_else() {
    let mut world = World::new(Rule::Lww);
    world.write(0, &[(0, Some(1))]);
    let mut ahead = Watcher::new(Rule::Lww, Cursor::live(VersionVector::new()));
    ahead.drain(&world.regions[0]);
    let mut behind = Watcher::new(Rule::Lww, Cursor::live(VersionVector::new()));
    world.trim(0);
    world.write(0, &[(1, Some(2))]);
    ahead.drain(&world.regions[0]);
    behind.drain(&world.regions[0]);
    assert_eq!((ahead.resets, behind.resets), (0, 1));
    assert_eq!(ahead.values(), behind.values());

    // Whoever does not want that origin has lost nothing.
    let mut elsewhere = Watcher::new(Rule::Lww, Cursor::live(VersionVector::new()));
    elsewhere.filter.origins = Origins::Only(BTreeSet::from([actor(1).region]));
    elsewhere.drain(&world.regions[0]);
    assert_eq!(elsewhere.resets, 0);
}

#[test]
fn a_region_that_lacks_what_a_token_covers_waits_unless_it_may_never_come() {
    let mut world = World::new(Rule::Lww);
    world.write(0, &[(0, Some(1))]);
    world.write(1, &[(1, Some(2))]);
    let mut watcher = Watcher::new(Rule::Lww, Cursor::live(VersionVector::new()));
    watcher.drain(&world.regions[0]);
    let (step, changes) = watcher.step(&world.regions[1], 100);
    assert!(step.waits && step.lost.is_none() && changes.is_empty());
    // Whoever does not want what it lacks need not wait.
    let mut other = Watcher::new(Rule::Lww, watcher.feed.cursor().clone());
    other.filter.origins = Origins::AllBut(BTreeSet::from([actor(0).region]));
    other.drain(&world.regions[1]);
    assert_eq!(other.seen.len(), 1);

    let fenced = Member { incarnation: 1, state: MemberState::Fenced };
    world.regions[1].members.learn(actor(0).region, fenced);
    let (step, _) = watcher.step(&world.regions[1], 100);
    assert_eq!(step.lost, Some(Lost::StartedOver));
}

#[test]
fn a_step_ends_when_what_it_gives_is_enough_and_the_next_goes_on_there() {
    let mut world = World::new(Rule::Lww);
    for number in 0..5 {
        world.write(0, &[(number, Some(1))]);
    }
    let mut feed = Feed::new(Cursor::live(VersionVector::new()));
    // Each change has ten bytes of its own.
    for (more, expected) in [(0, 3), (25, 1), (15, 1)] {
        let mut given = 0;
        let Ok(_) = feed.step(&world.regions[0], &Filter::default(), 25, |_| {
            given += 1;
            Ok(more)
        });
        assert_eq!(given, expected, "{more} bytes more each");
    }
    assert_eq!(feed.cursor().given.get(actor(0)), 5);
}

#[test]
fn a_snapshot_waits_while_records_are_ahead_of_the_frontier() {
    let mut world = World::new(Rule::Lww);
    for number in 0..KEYS {
        world.write(0, &[(number, Some(1))]);
    }
    world.trim(0);
    world.repair(0, 1, false);
    let mut watcher = Watcher::new(Rule::Lww, Cursor::snapshot());
    let (step, _) = watcher.step(&world.regions[1], 100);
    assert!(step.waits && step.records.is_empty());
    world.repair(0, 1, true);
    watcher.drain(&world.regions[1]);
    assert_eq!(watcher.values().len(), KEYS);
}

#[test]
fn who_lost_and_who_won_is_told_by_the_ledger() {
    let mut world = World::new(Rule::Lww);
    world.write(0, &[(0, Some(1))]);
    world.write(1, &[(0, Some(2))]);
    world.sync(0, 1);
    world.sync(1, 0);
    let delta_of = |at: usize, of: usize| {
        let change = &world.regions[at].changes[&(NS, actor(of), 1)];
        (change.deltas[0].clone(), change.seen().into_owned())
    };
    let conflict = |at: usize, of: usize| {
        let (delta, seen) = delta_of(at, of);
        let region = &world.regions[at];
        let record = region.records.get(&(NS, key(0)));
        let ledger = |id| Ok::<_, Infallible>(region.ledger.get(&(NS, id)).cloned());
        let Ok(conflict) = conflict_of(NS, &delta, &seen, record, ledger);
        conflict
    };
    let entry = world.regions[0].ledger.values().next().expect("one lost").clone();
    let (winner, loser) = (entry.winner, entry.loser.dot);
    let place = |dot: Dot| usize::from(dot.actor.region.0) - 1;
    for at in 0..2 {
        let lost = conflict(at, place(loser));
        assert_eq!(lost.lost_to, Some((winner, entry.id(NS))), "region {at}");
        let won = conflict(at, place(winner));
        assert_eq!(won.beat, [(loser, entry.id(NS))], "region {at}");
        assert!(won.lost_to.is_none());
    }
}

#[test]
fn siblings_that_remain_are_named_and_one_that_settles_them_is_alone() {
    let mut world = World::new(Rule::Siblings);
    world.write(0, &[(0, Some(1))]);
    world.write(1, &[(0, Some(2))]);
    world.sync(1, 0);
    let look = |region: &MemoryState, of: usize, seq: u64| {
        let change = &region.changes[&(NS, actor(of), seq)];
        let record = region.records.get(&(NS, key(0)));
        let none = |_| Ok::<_, Infallible>(None);
        let Ok(found) = conflict_of(NS, &change.deltas[0], &change.seen(), record, none);
        found
    };
    let theirs = Dot { actor: actor(1), seq: 1 };
    assert_eq!(look(&world.regions[0], 0, 1).beside, [theirs]);
    world.write(0, &[(0, Some(3))]);
    assert!(look(&world.regions[0], 0, 2).is_none());
    assert!(look(&world.regions[0], 0, 1).is_none(), "it is no longer there");
}

#[test]
fn filters_that_differ_have_different_names() {
    let filters = [
        Filter::default(),
        Filter { start: "a".into(), ..Filter::default() },
        Filter { end: Some(Bytes::new()), ..Filter::default() },
        Filter { end: Some("a".into()), ..Filter::default() },
        Filter { origins: Origins::Only([RegionId(1)].into()), ..Filter::default() },
        Filter { origins: Origins::AllBut([RegionId(1)].into()), ..Filter::default() },
        Filter { origins: Origins::Only([RegionId(1), RegionId(2)].into()), ..Filter::default() },
    ];
    let names: BTreeSet<u64> = filters.iter().map(Filter::fingerprint).collect();
    assert_eq!(names.len(), filters.len());
    assert_eq!(filters[1].fingerprint(), filters[1].clone().fingerprint());
}
