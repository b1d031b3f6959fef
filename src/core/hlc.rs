//! Hybrid logical clock: time that only orders what the vectors call concurrent.
//!
//! Source: Kulkarni et al., "Logical Physical Clocks" (2014). The physical part is read by the
//! caller and passed in, so this module is pure.
//!
//! Invariants:
//! * [`HybridClock::tick`] answers later than everything ticked or observed before.
//! * A remote time further ahead than the bound never moves the clock: one bad clock can neither
//!   win for ever nor poison the others.

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
    /// Stamps an event. `physical_ms` is the wall clock now; it may stand still or go back.
    pub fn tick(&mut self, physical_ms: u64) -> HybridTime {
        let physical = HybridTime::new(physical_ms, 0).unwrap_or(HybridTime::MAX);
        self.latest = physical.max(self.latest.next());
        self.latest
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

    /// Takes over a time that this region itself stamped (its log), without a bound: going back
    /// behind it would be worse than running ahead.
    pub fn resume_after(&mut self, own: HybridTime) {
        self.latest = self.latest.max(own);
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
        fn ticks_always_rise_whatever_the_wall_clock_does(walls in prop::collection::vec(0u64..1 << 47, 1..64)) {
            let mut clock = HybridClock::default();
            let mut last = HybridTime::ZERO;
            for wall in walls {
                let now = clock.tick(wall);
                prop_assert!(last < now);
                prop_assert!(wall <= now.physical_ms());
                last = now;
            }
        }

        #[test]
        fn tick_after_observe_is_later_than_the_remote(wall in 0u64..1 << 47, remote in 0u64..1 << 47) {
            let mut clock = HybridClock::default();
            let remote = HybridTime::new(remote, 7).unwrap();
            if clock.observe(remote, wall, 500).is_ok() {
                prop_assert!(remote < clock.tick(wall));
            } else {
                prop_assert_eq!(clock.tick(wall).physical_ms(), wall);
            }
        }
    }

    #[test]
    fn time_beyond_the_bound_never_moves_the_clock() {
        let mut clock = HybridClock::default();
        let hours_ahead = HybridTime::new(8 * 3_600_000, 0).unwrap();
        let refused = clock.observe(hours_ahead, 1_000, 500);
        assert_eq!(refused, Err(ClockAhead { ahead_ms: 8 * 3_600_000 - 1_000, bound_ms: 500 }));
        assert_eq!(clock.tick(1_000).physical_ms(), 1_000);
    }

    #[test]
    fn logical_counter_carries_into_the_milliseconds() {
        let mut clock = HybridClock::default();
        clock.resume_after(HybridTime::new(5, u16::MAX).unwrap());
        assert_eq!(clock.tick(5), HybridTime::new(6, 0).unwrap());
    }
}
