//! Whether the node's disk has room for what clients write.
//!
//! Below the reserve, writes that add data are refused with a named reason while reads, deletes
//! and the node's own housekeeping go on: a full disk would stop the Raft log, and with it the
//! node.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::ShardError;
use tombolo_core::ShardId;

/// The room on a node's disk, as it was last looked at.
#[derive(Debug)]
pub struct Headroom {
    reserve_bytes: u64,
    free_bytes: AtomicU64,
    short: AtomicBool,
}

impl Headroom {
    /// Plenty, until [`Headroom::observe`] says otherwise. Below `reserve_bytes` it is short.
    pub fn new(reserve_bytes: u64) -> Self {
        let free_bytes = AtomicU64::new(u64::MAX);
        Self { reserve_bytes, free_bytes, short: AtomicBool::new(false) }
    }

    /// Takes note of the free space, and says in the log when writes begin or cease to be refused.
    /// They are taken again only an eighth above the reserve, so that it does not flap.
    pub fn observe(&self, free_bytes: u64) {
        self.free_bytes.store(free_bytes, Ordering::Relaxed);
        let reserve_bytes = self.reserve_bytes;
        let was_short = self.short.load(Ordering::Relaxed);
        let enough =
            if was_short { reserve_bytes.saturating_add(reserve_bytes / 8) } else { reserve_bytes };
        let is_short = free_bytes < enough;
        self.short.store(is_short, Ordering::Relaxed);
        match (was_short, is_short) {
            (false, true) => tracing::error!(
                free_bytes,
                reserve_bytes,
                "the disk is nearly full: writes are refused, reads and deletes go on"
            ),
            (true, false) => {
                tracing::info!(free_bytes, "the disk has room: writes are taken again")
            }
            (true, true) | (false, false) => {}
        }
    }

    /// What was free when it was last looked at.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// Whether writes are refused.
    pub fn is_short(&self) -> bool {
        self.short.load(Ordering::Relaxed)
    }

    /// Refuses a write that adds data while the disk is nearly full.
    pub(crate) fn check(&self, shard: ShardId) -> Result<(), ShardError> {
        if !self.is_short() {
            return Ok(());
        }
        let (free_bytes, reserve_bytes) = (self.free_bytes(), self.reserve_bytes);
        Err(ShardError::DiskFull { shard, free_bytes, reserve_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_refused_below_the_reserve_and_taken_again_well_above_it() {
        let headroom = Headroom::new(800);
        assert!(!headroom.is_short(), "nobody has looked yet");
        for (free, short) in [(800, false), (799, true), (850, true), (900, false), (0, true)] {
            headroom.observe(free);
            assert_eq!(headroom.is_short(), short, "{free}");
        }
        let refused = headroom.check(ShardId(3)).unwrap_err().to_string();
        assert!(refused.contains("0 bytes free") && refused.contains("800"), "{refused}");
    }
}
