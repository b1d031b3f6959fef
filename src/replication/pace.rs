//! A limit on what is taken from a peer region: who took too much waits.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// When the next bytes may be taken. Shared by everything on a node that pulls from one region.
#[derive(Debug)]
pub(crate) struct Pace {
    free_at: Mutex<Instant>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { free_at: Mutex::new(Instant::now()) }
    }
}

impl Pace {
    /// When the next bytes may be taken.
    pub(crate) fn free_at(&self) -> Instant {
        *self.free_at.lock()
    }

    /// `bytes` were taken under a limit of so many a second; 0 is no limit.
    pub(crate) fn spend(&self, bytes: u64, bytes_per_second: u64) {
        if bytes_per_second == 0 {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "a pause needs no exact figure")]
        let pause = Duration::from_secs(1).mul_f64(bytes as f64 / bytes_per_second as f64);
        let mut free_at = self.free_at.lock();
        *free_at = (*free_at).max(Instant::now()) + pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_took_waits_as_long_as_the_limit_says_and_nobody_saves_up() {
        let pace = Pace::default();
        pace.spend(1 << 30, 0);
        assert!(pace.free_at() <= Instant::now());
        tokio::time::advance(Duration::from_secs(9)).await;
        pace.spend(500, 1000);
        pace.spend(500, 1000);
        assert_eq!(pace.free_at() - Instant::now(), Duration::from_secs(1));
    }
}
