//! This node's clock: the pure clocks of `core` fed with the wall clock, the only place that reads it
//! for stamps and deadlines.
//!
//! Three things are kept apart. The *wall clock* is what the machine says, plus an offset that tests
//! inject. The *hybrid clock* stamps writes and never runs further ahead of the wall clock than the
//! bound. The *comparison* knows how the wall clocks of the region's nodes stand to each other, and
//! whether this one may be believed.
//!
//! Invariants:
//! * A time is stamped only from the very reading of the wall clock that was found to be within the
//!   bound of most nodes. A clock that jumps stamps nothing in between.
//! * What hides and deletes expired values goes by the time of most nodes, not by a clock that is
//!   outside.
//! * Another region's time beyond the bound moves nothing. It is counted, and said once.
//!
//! Not here: asking the other nodes and giving leadership away (`tombolo-service`).

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::sync::watch;
use tombolo_core::{
    HybridClock, HybridTime, NodeId, RegionId,
    clock_guard::{ClockGuard, Memory, Reading, Sample, Standing, middle_us},
    hlc::ClockAhead,
};

/// The wall clock may move this much against the steady one before the comparison is made anew.
const JUMP_US: u64 = 1000;
/// A comparison is made anew after this, because what is known of other clocks loses worth.
const JUDGED_US_MAX: u64 = 1_000_000;
/// The steady clock is read before and after the wall clock; further apart, both are read again.
const LOOK_US_MAX: u64 = 200;
const LOOKS_MAX: u32 = 8;
/// A region's clock is right again when none of its times was refused for this long.
const REMOTE_CALM: Duration = Duration::from_secs(10);

/// Stamps writes and learns of other clocks. One a node, shared by its shards.
#[derive(Debug)]
pub struct Clock {
    own: NodeId,
    nodes: usize,
    bound_ms: u64,
    /// What the steady clock counts from.
    origin: Instant,
    injected_ms: AtomicI64,
    hybrid: Mutex<HybridClock>,
    compared: Mutex<Compared>,
    standing: watch::Sender<Standing>,
    refused: AtomicU64,
    regions: Mutex<BTreeMap<RegionId, RegionClock>>,
}

/// What is known of the clocks of this region's nodes.
#[derive(Debug)]
struct Compared {
    guard: ClockGuard,
    memories: BTreeMap<NodeId, Memory>,
    /// As of the last judgement.
    readings: BTreeMap<NodeId, Reading>,
    judged: BTreeMap<NodeId, Standing>,
    /// How far the middle of the clocks that are believed is ahead of this one.
    middle_us: i64,
    /// When that was, and what the wall clock showed.
    at: Option<Look>,
}

/// One look at both clocks.
#[derive(Clone, Copy, Debug)]
struct Look {
    steady_us: u64,
    wall_us: u64,
    /// Between which the wall clock was read.
    slack_us: u64,
}

impl Look {
    /// By how much the wall clock moved against the steady one since another look.
    fn moved_us(&self, since: &Self) -> u64 {
        let steady = self.steady_us.saturating_sub(since.steady_us);
        self.wall_us.abs_diff(since.wall_us.saturating_add(steady))
    }

    fn wall_ms(&self) -> u64 {
        self.wall_us / 1000
    }
}

/// A node's clock as this node sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodeClock {
    /// Whose.
    pub node: NodeId,
    /// Where it stands among those of its region.
    pub standing: Standing,
    /// How far it is ahead of the middle of those that are believed, in microseconds.
    pub offset_us: i64,
    /// By how much that may be wrong.
    pub uncertainty_us: u64,
}

/// What the times that came from another region say of its clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegionClock {
    /// Changes whose time was too far ahead to be believed, since this process began.
    pub rejected: u64,
    /// How far ahead the last of them was, in milliseconds; 0 when its times are believed again.
    pub ahead_ms: u64,
    rejected_at: Option<Instant>,
}

/// What became of another region's clock, as far as its times tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionNews {
    /// Its times are too far ahead from here on.
    Ahead(ClockAhead),
    /// They are believed again.
    Believed,
}

/// This node's clock may not stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockRefused {
    /// Outside, or not known yet.
    pub standing: Standing,
    /// How far the clock is ahead of most of its region's, in milliseconds.
    pub offset_ms: i64,
}

impl Clock {
    /// The clock of node `own`, one of `nodes` in its region. Clocks may be `offset_max` apart.
    pub fn new(own: NodeId, nodes: usize, offset_max: Duration) -> Self {
        let bound_us = u64::try_from(offset_max.as_micros()).unwrap_or(u64::MAX);
        let clock = Self {
            own,
            nodes,
            bound_ms: bound_us.div_ceil(1000),
            origin: Instant::now(),
            injected_ms: AtomicI64::new(0),
            hybrid: Mutex::new(HybridClock::default()),
            compared: Mutex::new(Compared {
                guard: ClockGuard::new(bound_us),
                memories: BTreeMap::new(),
                readings: BTreeMap::new(),
                judged: BTreeMap::new(),
                middle_us: 0,
                at: None,
            }),
            standing: watch::Sender::new(Standing::Unheard),
            refused: AtomicU64::new(0),
            regions: Mutex::default(),
        };
        clock.look_around();
        clock
    }

    /// A time for a new event: later than all before that are believed.
    ///
    /// # Errors
    /// [`ClockRefused`] while this clock is not known to agree with most of its region's.
    pub fn stamp(&self) -> Result<HybridTime, ClockRefused> {
        let look = self.look();
        let (standing, middle_us) = self.judge(&look);
        if !standing.may_stamp() {
            return Err(ClockRefused { standing, offset_ms: middle_us.saturating_neg() / 1000 });
        }
        let mut hybrid = self.hybrid.lock();
        if let Some(ahead_ms) = hybrid.is_ahead(look.wall_ms(), self.bound_ms) {
            tracing::warn!(ahead_ms, "the wall clock was set back; stamps follow it");
        }
        Ok(hybrid.tick(look.wall_ms(), self.bound_ms))
    }

    /// The time now, for deciding what has expired. Stamps nothing. A clock that is outside tells what
    /// those of most nodes show.
    pub fn now(&self) -> HybridTime {
        let wall_ms = self.believed_ms();
        let wall = HybridTime::new(wall_ms, 0).unwrap_or(HybridTime::MAX);
        let hybrid = self.hybrid.lock();
        if hybrid.is_ahead(wall_ms, self.bound_ms).is_some() {
            wall
        } else {
            wall.max(hybrid.latest())
        }
    }

    /// Learns of times that other regions stamped. One that is too far ahead moves no clock. Answers what
    /// is new about whose clock to believe.
    pub fn observe(
        &self,
        times: impl IntoIterator<Item = (RegionId, HybridTime)>,
    ) -> Vec<(RegionId, RegionNews)> {
        let believed_ms = self.believed_ms();
        let (mut hybrid, mut regions) = (self.hybrid.lock(), self.regions.lock());
        let mut news = Vec::new();
        for (region, time) in times {
            match hybrid.observe(time, believed_ms, self.bound_ms) {
                Ok(()) => {
                    // Nearly always there is nothing to note.
                    if let Some(clock) = regions.get_mut(&region)
                        && clock.ahead_ms > 0
                        && clock.rejected_at.is_none_or(|at| at.elapsed() > REMOTE_CALM)
                    {
                        clock.ahead_ms = 0;
                        news.push((region, RegionNews::Believed));
                    }
                }
                Err(ahead) => {
                    let clock = regions.entry(region).or_default();
                    if clock.ahead_ms == 0 {
                        news.push((region, RegionNews::Ahead(ahead)));
                    }
                    clock.rejected = clock.rejected.saturating_add(1);
                    clock.ahead_ms = ahead.ahead_ms;
                    clock.rejected_at = Some(Instant::now());
                }
            }
        }
        news
    }

    /// Goes on after a time that this region gave a write. Where that is beyond the bound, because it had
    /// to be later than what a clock that was ahead had stamped, it stays with that write.
    pub fn follow(&self, own: HybridTime) {
        let believed_ms = self.believed_ms();
        let _ = self.hybrid.lock().observe(own, believed_ms, self.bound_ms);
    }

    /// Moves the wall clock by this much against the machine's; for tests of what that does.
    pub fn set_offset_ms(&self, offset_ms: i64) {
        self.injected_ms.store(offset_ms, Ordering::Relaxed);
        self.look_around();
    }

    /// The wall clock, in microseconds since the Unix epoch; what other nodes compare theirs with.
    pub fn wall_us(&self) -> u64 {
        self.look().wall_us
    }

    /// The steady clock, in microseconds since this clock began.
    pub fn steady_us(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Another node, asked and answered at these times of the steady clock, showed `wall_us`.
    pub fn compare(&self, node: NodeId, asked_us: u64, answered_us: u64, wall_us: u64) {
        let sample = Sample::between(asked_us, answered_us, wall_us);
        {
            let mut compared = self.compared.lock();
            compared
                .memories
                .entry(node)
                .and_modify(|memory| memory.take(sample))
                .or_insert_with(|| Memory::new(sample));
            compared.at = None;
        }
        self.look_around();
    }

    /// Where this node's clock stands, as it changes.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Compares anew if there is reason to, and answers where this clock stands.
    pub fn look_around(&self) -> Standing {
        self.judge(&self.look()).0
    }

    /// All clocks of the region that are known.
    pub fn nodes(&self) -> Vec<NodeClock> {
        self.look_around();
        let compared = self.compared.lock();
        let clock = |(&node, reading): (&NodeId, &Reading)| NodeClock {
            node,
            standing: compared.judged.get(&node).copied().unwrap_or_default(),
            offset_us: reading.offset_us.saturating_sub(compared.middle_us),
            uncertainty_us: reading.uncertainty_us,
        };
        compared.readings.iter().map(clock).collect()
    }

    /// What is known of other regions' clocks; those of which no time was refused are not there.
    pub fn regions(&self) -> BTreeMap<RegionId, RegionClock> {
        self.regions.lock().clone()
    }

    /// Counts a request that was refused because of this clock.
    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests that were refused because of this clock, since this process began.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// What the wall clocks of most nodes show, as far as this node can tell.
    fn believed_ms(&self) -> u64 {
        let look = self.look();
        match self.judge(&look) {
            (Standing::Outside, middle_us) => look.wall_us.saturating_add_signed(middle_us) / 1000,
            _ => look.wall_ms(),
        }
    }

    /// Reads both clocks, so close together that a busy machine does not look like a wrong clock.
    fn look(&self) -> Look {
        let injected_us = self.injected_ms.load(Ordering::Relaxed).saturating_mul(1000);
        let mut looks = 0;
        loop {
            let before_us = self.steady_us();
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let slack_us = self.steady_us().saturating_sub(before_us);
            looks += 1;
            if slack_us <= LOOK_US_MAX || looks == LOOKS_MAX {
                let wall_us = u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX);
                let wall_us = wall_us.saturating_add_signed(injected_us);
                return Look { steady_us: before_us, wall_us, slack_us };
            }
        }
    }

    /// Where this clock stands, and how far the middle of those that are believed is ahead of it.
    fn judge(&self, look: &Look) -> (Standing, i64) {
        let mut compared = self.compared.lock();
        let holds = compared.at.is_some_and(|at| {
            look.moved_us(&at) <= JUMP_US.saturating_add(look.slack_us).saturating_add(at.slack_us)
                && look.steady_us.saturating_sub(at.steady_us) <= JUDGED_US_MAX
        });
        if !holds {
            self.compare_all(&mut compared, look);
        }
        let own = compared.judged.get(&self.own).copied().unwrap_or_default();
        (own, compared.middle_us)
    }

    fn compare_all(&self, compared: &mut Compared, look: &Look) {
        let heard = compared.memories.iter().filter_map(|(&node, memory)| {
            Some((node, memory.reading(look.steady_us, look.wall_us)?))
        });
        let own = Reading { offset_us: 0, uncertainty_us: look.slack_us };
        compared.readings = heard.chain([(self.own, own)]).collect();
        let judged = compared.guard.judge(self.nodes, &compared.readings);
        compared.middle_us = middle_us(&compared.readings, &judged).unwrap_or(0);
        let before = std::mem::replace(&mut compared.judged, judged);
        compared.at = Some(*look);
        self.tell_changes(compared, &before);
        let own = compared.judged.get(&self.own).copied().unwrap_or_default();
        self.standing.send_if_modified(|standing| std::mem::replace(standing, own) != own);
    }

    /// Says once what became of a clock.
    fn tell_changes(&self, compared: &Compared, before: &BTreeMap<NodeId, Standing>) {
        for (node, reading) in &compared.readings {
            let now = compared.judged.get(node).copied().unwrap_or_default();
            let was = before.get(node).copied().unwrap_or_default();
            if now == was {
                continue;
            }
            let offset_ms = reading.offset_us.saturating_sub(compared.middle_us) / 1000;
            let (is_own, standing, was) = (*node == self.own, now.as_str(), was.as_str());
            match now {
                Standing::Outside if is_own => tracing::error!(
                    offset_ms,
                    "this node's clock differs from most of its region's by more than \
                     clock.max_offset: it stamps nothing and gives leadership away; correct its time"
                ),
                Standing::Outside | Standing::Split => tracing::warn!(
                    %node,
                    offset_ms,
                    standing,
                    "clocks of the region differ by more than clock.max_offset"
                ),
                Standing::Alone | Standing::Unheard | Standing::Inside => {
                    tracing::info!(%node, offset_ms, standing, was, "a clock was compared");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_millis(500);
    const HOURS_MS: i64 = 8 * 3_600_000;
    const EU: RegionId = RegionId(2);

    fn machine_ms() -> u64 {
        u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
    }

    /// Node 1 of three, after both others have shown clocks that are ahead of the machine's by this.
    fn compared(others_ms: i64) -> Clock {
        let clock = Clock::new(NodeId(1), 3, BOUND);
        for node in [2, 3] {
            let asked_us = clock.steady_us();
            let wall_us = (machine_ms() * 1000).saturating_add_signed(others_ms * 1000);
            clock.compare(NodeId(node), asked_us, clock.steady_us(), wall_us);
        }
        clock
    }

    fn is_near(time: HybridTime, ms: u64) -> bool {
        time.physical_ms().abs_diff(ms) < 60_000
    }

    #[test]
    fn nothing_is_stamped_before_a_majority_was_compared() {
        let clock = Clock::new(NodeId(1), 3, BOUND);
        assert_eq!(clock.stamp().unwrap_err().standing, Standing::Unheard);
        clock.compare(NodeId(2), clock.steady_us(), clock.steady_us(), machine_ms() * 1000);
        assert!(is_near(clock.stamp().unwrap(), machine_ms()));
        assert!(Clock::new(NodeId(1), 1, BOUND).stamp().is_ok(), "there is no other");
    }

    #[test]
    fn a_jump_of_the_own_clock_is_noticed_before_anything_is_stamped_with_it() {
        for jump in [HOURS_MS, -HOURS_MS, 2000, -2000] {
            let clock = compared(0);
            let before = clock.stamp().unwrap();
            // Without a judgement in between, as when a machine's clock is set.
            clock.injected_ms.store(jump, Ordering::Relaxed);
            let refused = clock.stamp().unwrap_err();
            assert_eq!(refused.standing, Standing::Outside);
            assert!(refused.offset_ms.abs_diff(jump) < 100, "{refused:?}");
            assert!(is_near(clock.now(), machine_ms()), "it knows what the others show");
            assert_eq!(*clock.standing().borrow(), Standing::Outside);

            clock.injected_ms.store(0, Ordering::Relaxed);
            let after = clock.stamp().unwrap();
            assert!(before < after && is_near(after, machine_ms()));
        }
    }

    #[test]
    fn a_jump_while_only_one_other_clock_is_known_stops_stamping_too() {
        let clock = Clock::new(NodeId(1), 3, BOUND);
        clock.compare(NodeId(2), clock.steady_us(), clock.steady_us(), machine_ms() * 1000);
        assert!(clock.stamp().is_ok());
        clock.injected_ms.store(-HOURS_MS, Ordering::Relaxed);
        assert_eq!(clock.stamp().unwrap_err().standing, Standing::Unheard, "the third decides");
    }

    #[test]
    fn a_clock_that_was_wrong_from_the_start_stamps_nothing() {
        let clock = compared(-HOURS_MS);
        assert_eq!(clock.stamp().unwrap_err().standing, Standing::Outside);
        let of_own =
            |clock: &Clock| clock.nodes().into_iter().find(|it| it.node == NodeId(1)).unwrap();
        assert!((of_own(&clock).offset_us / 1000).abs_diff(HOURS_MS) < 100);
        clock.set_offset_ms(-HOURS_MS);
        assert!(is_near(clock.stamp().unwrap(), machine_ms() - HOURS_MS.unsigned_abs()));
        assert!(of_own(&clock).offset_us.abs() < 100_000);
    }

    #[test]
    fn times_of_another_region_beyond_the_bound_move_nothing_and_are_counted() {
        let clock = Clock::new(NodeId(1), 1, BOUND);
        let hours_ahead = HybridTime::new(machine_ms() + HOURS_MS.unsigned_abs(), 0).unwrap();
        let news = clock.observe([(EU, hours_ahead); 3]);
        assert!(matches!(news[..], [(EU, RegionNews::Ahead(_))]), "said once: {news:?}");
        clock.follow(hours_ahead);
        assert!(is_near(clock.stamp().unwrap(), machine_ms()));
        assert!(is_near(clock.now(), machine_ms()));
        assert_eq!(clock.regions()[&EU].rejected, 3);
        assert!(clock.regions()[&EU].ahead_ms.abs_diff(HOURS_MS.unsigned_abs()) < 60_000);

        let slightly_ahead = HybridTime::new(machine_ms() + 400, 0).unwrap();
        assert!(clock.observe([(RegionId(3), slightly_ahead)]).is_empty());
        assert!(slightly_ahead < clock.stamp().unwrap());
        assert!(!clock.regions().contains_key(&RegionId(3)));
    }

    #[test]
    fn a_single_node_whose_clock_is_corrected_stamps_the_right_time_again() {
        let clock = Clock::new(NodeId(1), 1, BOUND);
        clock.set_offset_ms(HOURS_MS);
        assert!(is_near(clock.stamp().unwrap(), machine_ms() + HOURS_MS.unsigned_abs()));
        clock.set_offset_ms(0);
        assert!(is_near(clock.now(), machine_ms()));
        assert!(is_near(clock.stamp().unwrap(), machine_ms()));
    }
}
