//! The table of directions between hosts: what happens to a packet, and what has happened.

use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A host: its position in the order in which hosts were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub usize);

/// What has happened on one direction, or on several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets delivered or under way.
    pub passed: u64,
    /// Their bytes.
    pub passed_bytes: u64,
    /// Packets that a cut took.
    pub cut: u64,
    /// Packets lost because a queue was full: the switch or a host was too slow.
    pub overflowed: u64,
}

impl std::ops::Add for Counters {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            passed_bytes: self.passed_bytes + other.passed_bytes,
            cut: self.cut + other.cut,
            overflowed: self.overflowed + other.overflowed,
        }
    }
}

#[derive(Debug, Default)]
struct Direction {
    is_cut: AtomicBool,
    delay_nanos: AtomicU64,
    passed: AtomicU64,
    passed_bytes: AtomicU64,
    cut: AtomicU64,
    overflowed: AtomicU64,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It arrives after this time.
    Pass(Duration),
    /// It goes nowhere, and nobody is told.
    Drop,
}

/// All directions between some hosts. A clone is a handle on the same table.
///
/// Every direction passes without delay at first. Changes act on the next packet; packets under way
/// arrive all the same.
#[derive(Clone, Debug)]
pub struct Links(Arc<Table>);

#[derive(Debug)]
struct Table {
    hosts: usize,
    directions: Vec<Direction>,
}

impl Links {
    /// The table for this many hosts.
    #[must_use]
    pub fn new(hosts: usize) -> Self {
        let directions = (0..hosts * hosts).map(|_| Direction::default()).collect();
        Self(Arc::new(Table { hosts, directions }))
    }

    /// Cuts one direction, or heals it.
    pub fn set_cut(&self, from: HostId, to: HostId, is_cut: bool) {
        self.direction(from, to).is_cut.store(is_cut, Relaxed);
    }

    /// Heals all directions.
    pub fn heal(&self) {
        for direction in &self.0.directions {
            direction.is_cut.store(false, Relaxed);
        }
    }

    /// Sets the time that packets take in one direction.
    pub fn set_delay(&self, from: HostId, to: HostId, delay: Duration) {
        let nanos = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.direction(from, to).delay_nanos.store(nanos, Relaxed);
    }

    /// What has happened in one direction.
    #[must_use]
    pub fn counters(&self, from: HostId, to: HostId) -> Counters {
        self.direction(from, to).counters()
    }

    /// What has happened in all directions together.
    #[must_use]
    pub fn total(&self) -> Counters {
        let all = self.0.directions.iter().map(Direction::counters);
        all.fold(Counters::default(), |sum, counters| sum + counters)
    }

    pub(crate) fn hosts(&self) -> usize {
        self.0.hosts
    }

    /// Decides about a packet and counts it.
    pub(crate) fn judge(&self, from: HostId, to: HostId, bytes: usize) -> Fate {
        let direction = self.direction(from, to);
        if direction.is_cut.load(Relaxed) {
            direction.cut.fetch_add(1, Relaxed);
            return Fate::Drop;
        }
        direction.passed.fetch_add(1, Relaxed);
        direction.passed_bytes.fetch_add(bytes as u64, Relaxed);
        Fate::Pass(Duration::from_nanos(direction.delay_nanos.load(Relaxed)))
    }

    /// Counts a packet that was to pass and did not fit.
    pub(crate) fn count_overflow(&self, from: HostId, to: HostId) {
        self.direction(from, to).overflowed.fetch_add(1, Relaxed);
    }

    fn direction(&self, from: HostId, to: HostId) -> &Direction {
        assert!(from.0 < self.0.hosts && to.0 < self.0.hosts, "no such hosts: {from:?}, {to:?}");
        &self.0.directions[from.0 * self.0.hosts + to.0]
    }
}

impl Direction {
    fn counters(&self) -> Counters {
        Counters {
            passed: self.passed.load(Relaxed),
            passed_bytes: self.passed_bytes.load(Relaxed),
            cut: self.cut.load(Relaxed),
            overflowed: self.overflowed.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_takes_one_direction_and_counts_what_it_took() {
        let links = Links::new(3);
        let (one, other) = (HostId(0), HostId(2));
        links.set_cut(one, other, true);

        assert_eq!(links.judge(one, other, 100), Fate::Drop);
        assert_eq!(links.judge(other, one, 100), Fate::Pass(Duration::ZERO));
        links.heal();
        assert_eq!(links.judge(one, other, 100), Fate::Pass(Duration::ZERO));

        let there = Counters { passed: 1, passed_bytes: 100, cut: 1, overflowed: 0 };
        assert_eq!(links.counters(one, other), there);
        assert_eq!((links.total().passed, links.total().cut), (2, 1));
    }

    #[test]
    fn directions_have_delays_of_their_own() {
        let links = Links::new(2);
        links.set_delay(HostId(0), HostId(1), Duration::from_millis(35));
        assert_eq!(links.judge(HostId(0), HostId(1), 1), Fate::Pass(Duration::from_millis(35)));
        assert_eq!(links.judge(HostId(1), HostId(0), 1), Fate::Pass(Duration::ZERO));
    }
}
