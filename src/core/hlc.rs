//! Hybrid logical clock: time that only orders what the vectors call concurrent.
//!
//! Source: Kulkarni et al., "Logical Physical Clocks" (2014). The physical part is read by the
//! caller and passed in, so this module is pure.
//!
//! Invariants:
//! * [`HybridClock::tick`] answers later than everything ticked or observed before that is not beyond
//!   the bound.
//! * A time further ahead than the bound never moves the clock, and a clock that is itself further
//!   ahead of the wall clock comes back to it: one bad clock can neither win for ever nor poison the
//!   others, and correcting it heals everything that it touched but the values that it stamped.
//!
//! Coming back is safe because nothing relies on stamps that rise for ever: a write is stamped later
//! than what it replaces by the transition function (`execute`), whatever the clock says.

use std::fmt;

/// A hybrid logical clock reading: milliseconds since the Unix epoch in the high 48 bits, a
/// logical counter in the low 16, so comparing two readings compares two integers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HybridTime(u64);

const LOGICAL_BITS: u32 = 16;
const _: () = assert!(size_of::<HybridTime>() == 8, "HybridTime is part of stored formats");

impl HybridTime {
    /// Earlier than every stamped time.
    pub const ZERO: Self = Self(0);
    /// The last representable time.
    pub const MAX: Self = Self(u64::MAX);

    /// Returns `None` past the year 10889, where the milliseconds no longer fit 48 bits.
    pub const fn new(physical_ms: u64, logical: u16) -> Option<Self> {
        if physical_ms >> (u64::BITS - LOGICAL_BITS) != 0 {
            return None;
        }
        Some(Self(physical_ms << LOGICAL_BITS | logical as u64))
    }

    /// The reading with exactly these bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// As stored and sent.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// Milliseconds since the Unix epoch.
    pub const fn physical_ms(self) -> u64 {
        self.0 >> LOGICAL_BITS
    }

    /// The logical counter.
    pub const fn logical(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// The next later reading; stays at the last one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// This reading plus `ms` milliseconds; stays at the last one.
    pub const fn plus_ms(self, ms: u64) -> Self {
        let physical = self.physical_ms().saturating_add(ms);
        match Self::new(physical, self.logical()) {
            Some(time) => time,
            None => Self::MAX,
        }
    }
}

impl fmt::Display for HybridTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.physical_ms(), self.logical())
    }
}

/// A remote time lies further ahead of the local clock than the bound allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("remote time is {ahead_ms} ms ahead; at most {bound_ms} ms are believed")]
pub struct ClockAhead {
    /// How far ahead, in milliseconds.
    pub ahead_ms: u64,
    /// The bound, in milliseconds.
    pub bound_ms: u64,
}

/// The state of one clock: the latest reading given out or believed.
#[derive(Clone, Copy, Debug, Default)]
pub struct HybridClock {
    latest: HybridTime,
}

impl HybridClock {
    /// Stamps an event. `physical_ms` is the wall clock now; it may stand still or go back. Where it
    /// went back by more than `bound_ms`, it was wrong and was corrected: the clock follows it.
    pub fn tick(&mut self, physical_ms: u64, bound_ms: u64) -> HybridTime {
        let physical = HybridTime::new(physical_ms, 0).unwrap_or(HybridTime::MAX);
        self.latest = match self.is_ahead(physical_ms, bound_ms) {
            Some(_) => physical,
            None => physical.max(self.latest.next()),
        };
        self.latest
    }

    /// By how many milliseconds the clock is ahead of the wall clock, if that is more than `bound_ms`.
    pub fn is_ahead(&self, physical_ms: u64, bound_ms: u64) -> Option<u64> {
        let ahead_ms = self.latest.physical_ms().saturating_sub(physical_ms);
        (ahead_ms > bound_ms).then_some(ahead_ms)
    }

    /// Learns of a remote event, so that later ticks come after it.
    ///
    /// # Errors
    /// [`ClockAhead`] if the remote time is more than `bound_ms` past `physical_ms`; the clock
    /// does not move then.
    pub fn observe(
        &mut self,
        remote: HybridTime,
        physical_ms: u64,
        bound_ms: u64,
    ) -> Result<(), ClockAhead> {
        let ahead_ms = remote.physical_ms().saturating_sub(physical_ms);
        if ahead_ms > bound_ms {
            return Err(ClockAhead { ahead_ms, bound_ms });
        }
        self.latest = self.latest.max(remote);
        Ok(())
    }

    /// The latest reading given out or believed.
    pub fn latest(&self) -> HybridTime {
        self.latest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ticks_rise_while_the_wall_clock_goes_back_by_no_more_than_the_bound(steps in prop::collection::vec(-500i64..2000, 1..64)) {
            let mut clock = HybridClock::default();
            let (mut wall, mut last) = (1u64 << 40, HybridTime::ZERO);
            // The highest reading so far is what going back is measured from.
            let mut highest = wall;
            for step in steps {
                wall = wall.saturating_add_signed(step).max(highest - 500);
                highest = highest.max(wall);
                let now = clock.tick(wall, 500);
                prop_assert!(last < now);
                prop_assert!(wall <= now.physical_ms());
                last = now;
            }
        }

        #[test]
        fn a_tick_is_never_further_from_the_wall_clock_than_the_bound(walls in prop::collection::vec(0u64..1 << 47, 1..64)) {
            let mut clock = HybridClock::default();
            for wall in walls {
                let now = clock.tick(wall, 500);
                prop_assert!((wall..=wall + 501).contains(&now.physical_ms()));
            }
        }

        #[test]
        fn tick_after_observe_is_later_than_the_remote(wall in 0u64..1 << 47, remote in 0u64..1 << 47) {
            let mut clock = HybridClock::default();
            let remote = HybridTime::new(remote, 7).unwrap();
            if clock.observe(remote, wall, 500).is_ok() {
                prop_assert!(remote < clock.tick(wall, 500));
            } else {
                prop_assert_eq!(clock.tick(wall, 500).physical_ms(), wall);
            }
        }
    }

    #[test]
    fn time_beyond_the_bound_never_moves_the_clock() {
        let mut clock = HybridClock::default();
        let hours_ahead = HybridTime::new(8 * 3_600_000, 0).unwrap();
        let refused = clock.observe(hours_ahead, 1_000, 500);
        assert_eq!(refused, Err(ClockAhead { ahead_ms: 8 * 3_600_000 - 1_000, bound_ms: 500 }));
        assert_eq!(clock.tick(1_000, 500).physical_ms(), 1_000);
    }

    #[test]
    fn logical_counter_carries_into_the_milliseconds() {
        let mut clock = HybridClock { latest: HybridTime::new(5, u16::MAX).unwrap() };
        assert_eq!(clock.tick(5, 500), HybridTime::new(6, 0).unwrap());
    }

    #[test]
    fn a_clock_that_was_hours_ahead_is_right_again_once_it_is_corrected() {
        let (hours, mut clock) = (8 * 3_600_000, HybridClock::default());
        assert_eq!(clock.tick(hours + 1_000, 500).physical_ms(), hours + 1_000);
        assert_eq!(clock.is_ahead(1_010, 500), Some(hours - 10));
        assert_eq!(clock.tick(1_010, 500).physical_ms(), 1_010);
        assert_eq!(clock.is_ahead(1_010, 500), None);
    }
}
