//! Whose clock to believe: what the nodes of a region conclude from how their clocks stand to each
//! other.
//!
//! Nobody knows the true time. But of several clocks that are kept by different machines most are
//! right, so a clock is judged by the others. Each node asks every other one for the time, again and
//! again, and keeps the answer that tells most ([`Memory`]). Between answers it reckons with its
//! steady clock, which no correction moves: so a jump of its *own* wall clock shows at the next look,
//! before anything is stamped with it. [`ClockGuard::judge`] then says of every clock where it stands.
//!
//! Invariants:
//! * A slow link accuses nobody: an offset is known up to half the round trip, and a clock is outside
//!   only if it is beyond the bound wherever in between the truth lies.
//! * Only differences between clocks count, so that a node whose own clock is wrong judges the others
//!   as they judge each other.
//! * A clock is outside only if more than half of those that were heard, and these are a majority, say
//!   so. Where all were heard and two halves disagree, the question stays open and nobody is stopped;
//!   where some were not, those that disagree wait for their word.
//! * A clock that was outside is back when it is within four fifths of the bound, so that one at the
//!   very edge does not come and go.
//!
//! Not here: asking (`tombolo-service`), reading clocks and what follows (`tombolo-shard`).

use std::collections::{BTreeMap, BTreeSet};

use crate::id::NodeId;

/// What an answer loses in worth: two clocks that are not corrected part by less than a thousandth.
const DRIFT_SHARE: u64 = 1000;
/// A clock that was not heard for this long does not count any more.
pub const HEARD_US_MAX: u64 = 300_000_000;

/// One answer to "what time is it?", on the steady clock of the one who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When the other clock was read: the middle of the round trip.
    at_us: u64,
    /// What it showed, in microseconds since the Unix epoch.
    wall_us: u64,
    /// By how much that moment may be wrong: half the round trip.
    uncertainty_us: u64,
}

impl Sample {
    /// Asked and answered at these times of a steady clock, and in between the other clock showed
    /// `wall_us`.
    pub const fn between(asked_us: u64, answered_us: u64, wall_us: u64) -> Self {
        // Rounded up: what is not known must not be believed.
        let uncertainty_us = answered_us.saturating_sub(asked_us).div_ceil(2);
        Self { at_us: asked_us.saturating_add(uncertainty_us), wall_us, uncertainty_us }
    }

    const fn uncertainty_at(&self, now_us: u64) -> u64 {
        self.uncertainty_us.saturating_add(now_us.saturating_sub(self.at_us) / DRIFT_SHARE)
    }

    /// What the clock shows at `now_us`, if nobody moved it.
    fn wall_at(&self, now_us: u64) -> i128 {
        i128::from(self.wall_us) + i128::from(now_us) - i128::from(self.at_us)
    }
}

/// What is remembered of another node's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    best: Sample,
    heard_us: u64,
}

impl Memory {
    /// The first answer.
    pub const fn new(sample: Sample) -> Self {
        Self { best: sample, heard_us: sample.at_us }
    }

    /// Another answer. Kept if it is more exact by now than the one before, or if that cannot be true
    /// any more: the clock was moved.
    pub fn take(&mut self, sample: Sample) {
        let now_us = sample.at_us;
        let apart = self.best.wall_at(now_us).abs_diff(sample.wall_at(now_us));
        let before_us = self.best.uncertainty_at(now_us);
        let was_moved = apart > u128::from(before_us.saturating_add(sample.uncertainty_us));
        if was_moved || sample.uncertainty_us <= before_us {
            self.best = sample;
        }
        self.heard_us = self.heard_us.max(now_us);
    }

    /// How the clock stands to one that shows `wall_us` now; nothing if it was silent for too long.
    pub fn reading(&self, now_us: u64, wall_us: u64) -> Option<Reading> {
        if now_us.saturating_sub(self.heard_us) > HEARD_US_MAX {
            return None;
        }
        let offset = self.best.wall_at(now_us) - i128::from(wall_us);
        // Clocks that are further apart than that are no less wrong.
        let limit = i128::from(i64::MAX / 4);
        let offset_us = i64::try_from(offset.clamp(-limit, limit)).unwrap_or(0);
        Some(Reading { offset_us, uncertainty_us: self.best.uncertainty_at(now_us) })
    }
}

/// How a clock stands to that of the node which compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// By how many microseconds it is ahead.
    pub offset_us: i64,
    /// By how many the true offset may differ from that.
    pub uncertainty_us: u64,
}

impl Reading {
    /// Whether the two clocks are certainly further apart than `bound_us`.
    fn is_apart(&self, other: &Self, bound_us: u64) -> bool {
        let slack = self.uncertainty_us.saturating_add(other.uncertainty_us);
        self.offset_us.abs_diff(other.offset_us) > bound_us.saturating_add(slack)
    }
}

/// Where a clock stands among those of its region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// There is no other to compare it with.
    Alone,
    /// Too few were heard, lately or at all, to tell.
    #[default]
    Unheard,
    /// Within the bound of most that were heard.
    Inside,
    /// All were heard, and as many are within the bound as are not: nobody can tell whose is wrong.
    Split,
    /// Beyond the bound of most that were heard.
    Outside,
}

impl Standing {
    /// Whether times of this clock may order writes.
    pub const fn may_stamp(self) -> bool {
        match self {
            Self::Alone | Self::Inside | Self::Split => true,
            Self::Unheard | Self::Outside => false,
        }
    }

    /// For logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Unheard => "not known",
            Self::Inside => "inside",
            Self::Split => "undecided",
            Self::Outside => "outside",
        }
    }
}

/// Judges the clocks of a region, and remembers who was outside.
#[derive(Clone, Debug, Default)]
pub struct ClockGuard {
    bound_us: u64,
    outside: BTreeSet<NodeId>,
}

impl ClockGuard {
    /// Clocks may be `bound_us` apart.
    pub const fn new(bound_us: u64) -> Self {
        Self { bound_us, outside: BTreeSet::new() }
    }

    /// Where each of the clocks that were heard stands, of `nodes` in all. `readings` are relative to
    /// any one clock, and hold that one too.
    pub fn judge(
        &mut self,
        nodes: usize,
        readings: &BTreeMap<NodeId, Reading>,
    ) -> BTreeMap<NodeId, Standing> {
        let judged: BTreeMap<NodeId, Standing> =
            readings.keys().map(|&node| (node, self.judge_one(node, nodes, readings))).collect();
        self.outside = judged
            .iter()
            .filter(|(_, standing)| **standing == Standing::Outside)
            .map(|(&node, _)| node)
            .collect();
        judged
    }

    fn judge_one(
        &self,
        node: NodeId,
        nodes: usize,
        readings: &BTreeMap<NodeId, Reading>,
    ) -> Standing {
        let Some(own) = readings.get(&node) else { return Standing::Unheard };
        if nodes <= 1 {
            return Standing::Alone;
        }
        let heard = readings.len();
        if heard * 2 <= nodes {
            return Standing::Unheard;
        }
        let was_outside = self.outside.contains(&node);
        let bound_us = if was_outside { self.bound_us / 5 * 4 } else { self.bound_us };
        let apart = readings.values().filter(|other| own.is_apart(other, bound_us)).count();
        match (apart * 2).cmp(&heard) {
            std::cmp::Ordering::Less => Standing::Inside,
            std::cmp::Ordering::Equal if heard < nodes => Standing::Unheard,
            std::cmp::Ordering::Equal => Standing::Split,
            std::cmp::Ordering::Greater => Standing::Outside,
        }
    }
}

/// How far ahead the clocks that are inside are, in the middle; of all, if none is. The lower middle of
/// an even number, so that every node names the same clock.
pub fn middle_us(
    readings: &BTreeMap<NodeId, Reading>,
    judged: &BTreeMap<NodeId, Standing>,
) -> Option<i64> {
    let is_inside = |node: &NodeId| judged.get(node) == Some(&Standing::Inside);
    let offsets = |only_inside: bool| {
        let kept = readings.iter().filter(|(node, _)| !only_inside || is_inside(node));
        let mut offsets: Vec<i64> = kept.map(|(_, reading)| reading.offset_us).collect();
        offsets.sort_unstable();
        offsets
    };
    let inside = offsets(true);
    let offsets = if inside.is_empty() { offsets(false) } else { inside };
    offsets.get(offsets.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOURS_US: i64 = 8 * 3_600_000_000;
    const BOUND_US: u64 = 500_000;

    /// Clocks of nodes 1, 2, ... by how far ahead of the first they are.
    fn clocks(offsets_us: &[i64]) -> BTreeMap<NodeId, Reading> {
        let reading = |&offset_us: &i64| Reading { offset_us, uncertainty_us: 1000 };
        (1..).map(NodeId).zip(offsets_us.iter().map(reading)).collect()
    }

    fn judge(nodes: usize, offsets_us: &[i64]) -> Vec<Standing> {
        let judged = ClockGuard::new(BOUND_US).judge(nodes, &clocks(offsets_us));
        judged.into_values().collect()
    }

    #[test]
    fn one_clock_that_jumped_is_outside_and_the_others_are_not() {
        use Standing::{Inside, Outside};
        for jump in [HOURS_US, -HOURS_US, 600_000, -600_000] {
            assert_eq!(judge(3, &[0, jump, 20]), [Inside, Outside, Inside]);
            // Seen by the one that jumped, it is all others that did.
            assert_eq!(judge(3, &[0, -jump, -jump]), [Outside, Inside, Inside]);
            assert_eq!(
                judge(5, &[jump, jump, 0, 0, 0]),
                [Outside, Outside, Inside, Inside, Inside]
            );
        }
        assert_eq!(judge(3, &[0, 400_000, -400_000]), [Inside, Inside, Inside]);
    }

    #[test]
    fn where_no_majority_agrees_nobody_is_believed_and_halves_are_left_alone() {
        use Standing::{Alone, Outside, Split, Unheard};
        assert_eq!(judge(3, &[0, HOURS_US, -HOURS_US]), [Outside, Outside, Outside]);
        assert_eq!(judge(2, &[0, HOURS_US]), [Split, Split]);
        assert_eq!(judge(4, &[0, 0, HOURS_US, HOURS_US]), [Split; 4]);
        assert_eq!(judge(1, &[0]), [Alone]);
        assert_eq!(judge(3, &[0]), [Unheard]);
        assert_eq!(judge(4, &[0, 0]), [Unheard, Unheard]);
    }

    #[test]
    fn of_a_region_with_nodes_away_those_that_were_heard_decide() {
        use Standing::{Inside, Outside, Unheard};
        assert_eq!(judge(5, &[0, 0, HOURS_US]), [Inside, Inside, Outside]);
        assert_eq!(judge(3, &[0, 10]), [Inside, Inside]);
        // The third may say who is right, and may not have been asked yet.
        assert_eq!(judge(3, &[0, HOURS_US]), [Unheard, Unheard]);
        assert_eq!(judge(5, &[0, 0, HOURS_US, HOURS_US]), [Unheard; 4]);
    }

    #[test]
    fn a_slow_link_accuses_nobody() {
        let mut slow = clocks(&[0, 900_000, 0]);
        slow.insert(NodeId(2), Reading { offset_us: 900_000, uncertainty_us: 450_000 });
        let judged = ClockGuard::new(BOUND_US).judge(3, &slow);
        assert!(judged.values().all(|&standing| standing == Standing::Inside), "{judged:?}");
    }

    #[test]
    fn a_clock_at_the_edge_stays_outside_until_it_is_well_inside() {
        let mut guard = ClockGuard::new(BOUND_US);
        let mut of_first =
            |offset_us: i64| guard.judge(3, &clocks(&[0, offset_us, offset_us]))[&NodeId(1)];
        assert_eq!(of_first(450_000), Standing::Inside);
        assert_eq!(of_first(510_000), Standing::Outside);
        assert_eq!(of_first(450_000), Standing::Outside);
        assert_eq!(of_first(390_000), Standing::Inside);
        assert_eq!(of_first(450_000), Standing::Inside);
    }

    #[test]
    fn the_middle_is_that_of_the_clocks_inside() {
        let middle = |offsets: &[i64]| {
            let readings = clocks(offsets);
            let judged = ClockGuard::new(BOUND_US).judge(offsets.len(), &readings);
            middle_us(&readings, &judged)
        };
        assert_eq!(middle(&[0, HOURS_US, HOURS_US + 10]), Some(HOURS_US));
        assert_eq!(middle(&[0, 10, HOURS_US]), Some(0));
        assert_eq!(middle(&[0, 10, 20]), Some(10));
        assert_eq!(middle(&[0, HOURS_US, -HOURS_US]), Some(0));
        assert_eq!(middle_us(&BTreeMap::new(), &BTreeMap::new()), None);
    }

    #[test]
    fn an_exact_answer_outlasts_vague_ones_until_its_clock_is_moved() {
        let mut memory = Memory::new(Sample::between(1_000_000, 1_000_200, 5_000_000));
        let reading = |memory: &Memory, now_us: u64| memory.reading(now_us, 4_000_100 + now_us);
        // A second on, an answer that took 200 ms, and one that cannot be true beside the first.
        memory.take(Sample::between(2_000_000, 2_200_000, 6_050_000));
        let exact = Some(Reading { offset_us: -200, uncertainty_us: 100 + 1200 });
        assert_eq!(reading(&memory, 2_200_100), exact);
        memory.take(Sample::between(3_000_000, 3_200_000, 9_100_000));
        let moved = reading(&memory, 3_200_000).unwrap();
        assert_eq!((moved.offset_us, moved.uncertainty_us), (1_999_900, 100_000 + 100));
        assert_eq!(
            reading(&memory, 3_100_000 + HEARD_US_MAX).map(|it| it.offset_us),
            Some(1_999_900)
        );
        assert_eq!(reading(&memory, 3_100_001 + HEARD_US_MAX), None);
    }

    proptest! {
        #[test]
        fn clocks_that_agree_are_inside_however_slow_the_links(
            truth in prop::collection::vec((-250_000i64..=250_000, 0u64..3_000_000, 0u64..=100), 2..8),
        ) {
            // What is read of each clock is anywhere within its round trip.
            let readings = truth.iter().map(|&(offset_us, round_trip_us, place)| {
                let sample = Sample::between(1 << 30, (1 << 30) + round_trip_us, {
                    let read_at = (1u64 << 30) + round_trip_us * place / 100;
                    (1u64 << 40).saturating_add_signed(offset_us) + read_at
                });
                Memory::new(sample).reading(1 << 30, (1 << 40) + (1 << 30)).unwrap()
            });
            let readings: BTreeMap<_, _> = (1..).map(NodeId).zip(readings).collect();
            let judged = ClockGuard::new(BOUND_US).judge(readings.len(), &readings);
            prop_assert!(judged.values().all(|&it| it == Standing::Inside), "{readings:?}");
        }

        #[test]
        fn every_node_comes_to_the_same_verdicts(
            offsets in prop::collection::vec(-2_000_000i64..2_000_000, 1..8),
            shift in any::<i32>(),
        ) {
            let shifted: Vec<i64> = offsets.iter().map(|it| it + i64::from(shift)).collect();
            prop_assert_eq!(judge(offsets.len(), &offsets), judge(offsets.len(), &shifted));
        }

        #[test]
        fn a_minority_of_bad_clocks_stops_no_other(
            bad in prop::collection::vec(any::<i64>().prop_map(|it| it / 8), 0..3),
        ) {
            let offsets: Vec<i64> = bad.iter().copied().chain([0; 3]).collect();
            let judged = judge(offsets.len(), &offsets);
            prop_assert!(judged[bad.len()..].iter().all(|&it| it == Standing::Inside));
        }
    }
}
