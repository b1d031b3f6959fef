//! Pauses between attempts: exponential, with full jitter, so that peers do not come in step.

use std::time::Duration;

/// The pauses of one link.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    attempts: u32,
}

impl Backoff {
    pub(crate) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, attempts: 0 }
    }

    /// The next pause: between half of and all of the exponentially growing bound.
    pub(crate) fn next_pause(&mut self) -> Duration {
        let bound = self.min.saturating_mul(1 << self.attempts.min(16)).min(self.max);
        self.attempts += 1;
        bound.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// The link works: begin with the shortest pause again.
    pub(crate) fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_bound_and_begin_again_after_success() {
        let (min, max) = (Duration::from_millis(100), Duration::from_secs(5));
        let mut backoff = Backoff::new(min, max);
        assert!(backoff.next_pause() <= min);
        for _ in 0..40 {
            assert!(backoff.next_pause() <= max);
        }
        assert!(backoff.next_pause() >= max / 2);
        backoff.reset();
        assert!(backoff.next_pause() <= min);
    }
}
