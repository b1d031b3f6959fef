//! The region's hybrid clock on this node: the pure clock of `core` fed with the wall clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tombolo_core::{HybridClock, HybridTime, hlc::ClockAhead};

/// Stamps writes and learns of other regions' times. One a node, shared by its shards.
#[derive(Debug)]
pub struct Clock {
    state: Mutex<HybridClock>,
    offset_max: Duration,
}

impl Clock {
    /// A clock that believes remote times up to `offset_max` ahead.
    pub fn new(offset_max: Duration) -> Self {
        Self { state: Mutex::new(HybridClock::default()), offset_max }
    }

    /// A time for a new event: later than all before.
    pub fn stamp(&self) -> HybridTime {
        self.state.lock().tick(wall_ms())
    }

    /// The time now, for deciding what has expired. Stamps nothing.
    pub fn now(&self) -> HybridTime {
        let wall = HybridTime::new(wall_ms(), 0).unwrap_or(HybridTime::MAX);
        wall.max(self.state.lock().latest())
    }

    /// Learns of another region's time.
    ///
    /// # Errors
    /// If it is too far ahead; the clock does not move then.
    pub fn observe(&self, remote: HybridTime) -> Result<(), ClockAhead> {
        let bound_ms = u64::try_from(self.offset_max.as_millis()).unwrap_or(u64::MAX);
        self.state.lock().observe(remote, wall_ms(), bound_ms)
    }

    /// Continues after a time that this region stamped itself.
    pub fn resume_after(&self, own: HybridTime) {
        self.state.lock().resume_after(own);
    }
}

/// Milliseconds since the Unix epoch; 0 before it.
fn wall_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}
