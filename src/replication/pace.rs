//! A limit on what is taken from a peer region: who took too much waits.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What was taken beyond the limit. Shared by everything on a node that pulls from one region.
#[derive(Debug)]
pub(crate) struct Pace {
    debt: Mutex<Debt>,
}

#[derive(Debug)]
struct Debt {
    bytes: f64,
    /// When that was so.
    at: Instant,
}

impl Default for Pace {
    fn default() -> Self {
        Self { debt: Mutex::new(Debt { bytes: 0.0, at: Instant::now() }) }
    }
}

impl Pace {
    /// How long to wait under a limit of so many bytes a second; `None` if not at all. 0 is no
    /// limit, and forgives what was taken before.
    pub(crate) fn wait(&self, bytes_per_second: u64) -> Option<Duration> {
        let mut debt = self.debt.lock();
        debt.settle(bytes_per_second);
        let rate = rate(bytes_per_second)?;
        (debt.bytes > 0.0).then(|| Duration::from_secs_f64((debt.bytes / rate).min(86_400.0)))
    }

    /// `bytes` were taken under a limit of so many a second.
    pub(crate) fn spend(&self, bytes: u64, bytes_per_second: u64) {
        let mut debt = self.debt.lock();
        debt.settle(bytes_per_second);
        if bytes_per_second > 0 {
            #[expect(clippy::cast_precision_loss, reason = "a pause needs no exact figure")]
            let bytes = bytes as f64;
            debt.bytes += bytes;
        }
    }
}

fn rate(bytes_per_second: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a pause needs no exact figure")]
    let rate = bytes_per_second as f64;
    (bytes_per_second > 0).then_some(rate)
}

impl Debt {
    fn settle(&mut self, bytes_per_second: u64) {
        let now = Instant::now();
        let paid = rate(bytes_per_second).map(|rate| rate * (now - self.at).as_secs_f64());
        self.bytes = paid.map_or(0.0, |paid| (self.bytes - paid).max(0.0));
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_took_waits_as_long_as_the_limit_says_and_nobody_saves_up() {
        let pace = Pace::default();
        pace.spend(1 << 30, 0);
        assert_eq!(pace.wait(0), None);
        tokio::time::advance(Duration::from_secs(9)).await;
        pace.spend(500, 1000);
        pace.spend(500, 1000);
        assert_eq!(pace.wait(1000), Some(Duration::from_secs(1)));
        tokio::time::advance(Duration::from_millis(600)).await;
        assert_eq!(pace.wait(1000), Some(Duration::from_millis(400)));
    }

    #[tokio::test(start_paused = true)]
    async fn another_limit_counts_at_once() {
        let pace = Pace::default();
        pace.spend(100_000, 10);
        assert_eq!(pace.wait(10), Some(Duration::from_secs(10_000)));
        assert_eq!(pace.wait(100_000), Some(Duration::from_secs(1)));
        assert_eq!(pace.wait(0), None);
        assert_eq!(pace.wait(10), None, "what was taken before is forgiven");
    }
}
