//! Laws and meanings of the merge. Laws hold over *reachable* records only, so the histories are
//! made by replicas that write, ship deltas in causal order, and merge.

use proptest::prelude::*;

use super::*;
use crate::{
    id::{Actor, RegionId},
    repair::{Offer, Sides, Trust, merge},
};

/// Merges whole records, knowing nothing but them.
fn join(mine: &Record, theirs: &Record, rule: Rule) -> Record {
    let nothing = VersionVector::new();
    let offer = Offer::new(Bytes::from_static(b"k"), theirs, &nothing);
    let sides = Sides { applied: &nothing, cut: &nothing, trust: Trust::Coverage };
    merge(mine, &offer, sides, rule).unwrap().0
}

const REGIONS: [Actor; 3] = [actor(1), actor(2), actor(3)];
const EUROPE: usize = 0;
const ASIA: usize = 1;

const fn actor(region: u16) -> Actor {
    Actor { region: RegionId(region), incarnation: 1 }
}

/// One region's copy of one key, with the deltas of all regions in the order it applied them.
#[derive(Clone, Debug, Default)]
struct Replica {
    record: Record,
    frontier: VersionVector,
    log: Vec<(Delta, VersionVector)>,
    dropped: Vec<Dropped>,
}

impl Replica {
    fn write(
        &mut self,
        at: usize,
        wall: u64,
        content: Content,
        context: Option<&VersionVector>,
        rule: Rule,
    ) {
        let dot = Dot { actor: REGIONS[at], seq: self.frontier.get(REGIONS[at]) + 1 };
        let stamped = HybridTime::new(wall, 0).unwrap();
        let time = stamped.max(self.record.latest_time().next());
        // Some came with an id, each with its own.
        let tag = dot.seq << 2 | u64::from(dot.actor.region.0);
        let request = dot.seq.is_multiple_of(2).then_some(RequestTag(tag));
        let delta = Delta {
            key: Bytes::from_static(b"k"),
            sibling: Sibling { dot, time, request, content },
            supersedes: self.record.superseded_by(context),
            pushed_out: PushedOut::default(),
        };
        let deps = self.frontier.clone();
        self.take(delta, deps, rule);
    }

    fn put(&mut self, at: usize, value: &'static str) {
        self.write(at, 1, Content::value(value), None, Rule::Siblings);
    }

    fn take(&mut self, delta: Delta, deps: VersionVector, rule: Rule) {
        assert!(self.frontier.covers_all(&deps));
        self.frontier.add(delta.sibling.dot);
        self.dropped.extend(self.record.apply(&delta, &deps, rule));
        self.log.push((delta, deps));
    }

    /// Pulls everything that `from` has, in its order.
    fn pull(&mut self, from: &Replica, rule: Rule) {
        for (delta, deps) in &from.log {
            if !self.frontier.covers(delta.sibling.dot) {
                self.take(delta.clone(), deps.clone(), rule);
            }
        }
    }

    fn values(&self) -> Vec<&[u8]> {
        self.record.live_at(HybridTime::ZERO).map(|(_, data)| data.as_ref()).collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put { at: usize, wall: u64, with_context_of: Option<usize> },
    Delete { at: usize, wall: u64 },
    Pull { at: usize, from: usize },
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0usize..3, 0u64..20, prop::option::of(0usize..3))
            .prop_map(|(at, wall, with_context_of)| { Step::Put { at, wall, with_context_of } }),
        (0usize..3, 0u64..20).prop_map(|(at, wall)| Step::Delete { at, wall }),
        (0usize..3, 0usize..3).prop_map(|(at, from)| Step::Pull { at, from }),
    ]
}

fn run(steps: &[Step], rule: Rule) -> [Replica; 3] {
    let mut replicas: [Replica; 3] = Default::default();
    for (number, step) in steps.iter().enumerate() {
        match *step {
            Step::Put { at, wall, with_context_of } => {
                // A context that this region has not caught up with waits; here it is skipped.
                let context = with_context_of.map(|from| replicas[from].record.context().clone());
                if context.as_ref().is_some_and(|seen| !replicas[at].frontier.covers_all(seen)) {
                    continue;
                }
                let content = Content::value(format!("v{number}"));
                replicas[at].write(at, wall, content, context.as_ref(), rule);
            }
            Step::Delete { at, wall } => {
                replicas[at].write(at, wall, Content::Tombstone, None, rule);
            }
            Step::Pull { at, from } => {
                let source = replicas[from].clone();
                replicas[at].pull(&source, rule);
            }
        }
    }
    replicas
}

fn any_history() -> impl Strategy<Value = (Vec<Step>, Rule)> {
    let rule = prop_oneof![Just(Rule::Lww), Just(Rule::Siblings)];
    (prop::collection::vec(any_step(), 0..40), rule)
}

proptest! {
    #[test]
    fn join_ignores_order_grouping_and_repetition((steps, rule) in any_history()) {
        let [a, b, c] = run(&steps, rule).map(|replica| replica.record);
        prop_assert_eq!(join(&a, &b, rule), join(&b, &a, rule));
        prop_assert_eq!(join(&a, &join(&b, &c, rule), rule), join(&join(&a, &b, rule), &c, rule));
        prop_assert_eq!(join(&a, &a, rule), a);
    }

    #[test]
    fn replicas_that_pulled_from_each_other_are_equal((steps, rule) in any_history()) {
        let mut replicas = run(&steps, rule);
        for _ in 0..2 {
            for at in 0..3 {
                for from in 0..3 {
                    let source = replicas[from].clone();
                    replicas[at].pull(&source, rule);
                }
            }
        }
        prop_assert_eq!(&replicas[0].record, &replicas[1].record);
        prop_assert_eq!(&replicas[1].record, &replicas[2].record);
    }

    #[test]
    fn stream_and_whole_record_merge_agree((steps, rule) in any_history()) {
        let replicas = run(&steps, rule);
        let mut streamed = replicas[0].clone();
        streamed.pull(&replicas[1], rule);
        let joined = join(&replicas[0].record, &replicas[1].record, rule);
        prop_assert_eq!(streamed.record, joined);
    }

    #[test]
    fn lww_keeps_the_highest_time_of_all_writes_it_has_seen((steps, _) in any_history()) {
        for replica in run(&steps, Rule::Lww) {
            let highest = replica.log.iter().map(|(delta, _)| delta.sibling.precedence()).max();
            let kept: Vec<_> = replica.record.siblings().iter().map(Sibling::precedence).collect();
            prop_assert_eq!(kept, highest.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_value_that_lww_drops_without_a_successor_is_reported((steps, _) in any_history()) {
        for replica in run(&steps, Rule::Lww) {
            let replaced: Vec<Dot> =
                replica.log.iter().flat_map(|(delta, _)| delta.supersedes.clone()).collect();
            let held: Vec<Dot> = replica.record.siblings().iter().map(|held| held.dot).collect();
            for (delta, _) in &replica.log {
                let dot = delta.sibling.dot;
                let reported = replica.dropped.iter().any(|dropped| dropped.loser.dot == dot);
                prop_assert!(held.contains(&dot) || replaced.contains(&dot) || reported, "{dot}");
            }
        }
    }

    #[test]
    fn record_reads_back((steps, rule) in any_history()) {
        for replica in run(&steps, rule) {
            prop_assert_eq!(Record::from_bytes(replica.record.to_bytes()), Ok(replica.record));
        }
    }

    #[test]
    fn a_cut_or_noisy_record_is_an_error_and_never_a_panic((steps, rule) in any_history(), cut in any::<prop::sample::Index>(), noise in prop::collection::vec(any::<u8>(), 0..48)) {
        let [a, ..] = run(&steps, rule);
        let bytes = a.record.to_bytes();
        let cut = cut.index(bytes.len());
        prop_assert!(Record::from_bytes(bytes.slice(..cut)).is_err());
        let _ = Record::from_bytes(Bytes::from(noise));
    }
}

#[test]
fn concurrent_puts_in_two_regions_keep_both_values() {
    let (mut europe, mut asia) = (Replica::default(), Replica::default());

    europe.put(EUROPE, "e");
    asia.put(ASIA, "a");
    europe.pull(&asia, Rule::Siblings);

    assert_eq!(europe.values(), [b"e", b"a"]);
}

#[test]
fn put_that_saw_both_siblings_replaces_both() {
    let (mut europe, mut asia) = (Replica::default(), Replica::default());
    europe.put(EUROPE, "e");
    asia.put(ASIA, "a");
    europe.pull(&asia, Rule::Siblings);

    europe.put(EUROPE, "x");
    asia.pull(&europe, Rule::Siblings);

    assert_eq!(asia.values(), [b"x"]);
}

#[test]
fn put_with_an_old_context_leaves_what_it_had_not_seen() {
    let mut europe = Replica::default();
    europe.put(EUROPE, "first");
    let seen = europe.record.context().clone();
    europe.put(EUROPE, "second");

    europe.write(EUROPE, 1, Content::value("third"), Some(&seen), Rule::Siblings);

    assert_eq!(europe.values(), [b"second".as_slice(), b"third"]);
}

#[test]
fn delete_does_not_remove_a_concurrent_put_under_siblings() {
    let (mut europe, mut asia) = (Replica::default(), Replica::default());
    europe.put(EUROPE, "old");
    asia.pull(&europe, Rule::Siblings);

    europe.write(EUROPE, 2, Content::Tombstone, None, Rule::Siblings);
    asia.put(ASIA, "new");
    europe.pull(&asia, Rule::Siblings);
    asia.pull(&europe, Rule::Siblings);

    assert_eq!(europe.values(), [b"new"]);
    assert_eq!(europe.record, asia.record);
}

#[test]
fn later_delete_wins_over_an_earlier_concurrent_put_under_lww() {
    let (mut europe, mut asia) = (Replica::default(), Replica::default());

    asia.write(ASIA, 5, Content::value("put"), None, Rule::Lww);
    europe.write(EUROPE, 6, Content::Tombstone, None, Rule::Lww);
    asia.pull(&europe, Rule::Lww);
    europe.pull(&asia, Rule::Lww);

    assert!(asia.values().is_empty());
    assert_eq!(asia.record, europe.record);
    assert_eq!(asia.dropped[0].loser.content, Content::value("put"));
    assert_eq!(asia.dropped[0].winner, europe.dropped[0].winner);
}

#[test]
fn an_expired_value_is_not_shown() {
    let expire = HybridTime::new(10, 0);
    let content = Content::Value { data: Bytes::from_static(b"v"), expire };
    assert!(content.live_at(HybridTime::new(9, 0).unwrap()).is_some());
    assert!(content.live_at(HybridTime::new(10, 0).unwrap()).is_none());
}
