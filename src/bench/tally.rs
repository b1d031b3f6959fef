//! What one client saw, and how several become one.

use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::time::Instant;

use crate::target::{Failure, Failures};

/// Latencies are kept to one in a thousand.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Successes by latency in microseconds, and failures by reason.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) put: Histogram<u64>,
    pub(crate) get: Histogram<u64>,
    pub(crate) failures: Failures,
    /// When the last recorded call ended.
    pub(crate) last_end: Option<Instant>,
}

impl Tally {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            put: Histogram::new(SIGNIFICANT_DIGITS)?,
            get: Histogram::new(SIGNIFICANT_DIGITS)?,
            failures: Failures::new(),
            last_end: None,
        })
    }

    pub(crate) fn record(
        &mut self,
        is_get: bool,
        begun: Instant,
        ended: Instant,
        outcome: Result<(), Failure>,
    ) -> anyhow::Result<()> {
        self.last_end = self.last_end.max(Some(ended));
        match outcome {
            Ok(()) => {
                let histogram = if is_get { &mut self.get } else { &mut self.put };
                histogram.record(micros(ended - begun))?;
            }
            Err(failure) => *self.failures.entry(failure).or_default() += 1,
        }
        Ok(())
    }

    /// Takes in what another client saw.
    pub(crate) fn merge(&mut self, other: Self) -> anyhow::Result<()> {
        self.put.add(&other.put)?;
        self.get.add(&other.get)?;
        for (failure, count) in other.failures {
            *self.failures.entry(failure).or_default() += count;
        }
        self.last_end = self.last_end.max(other.last_end);
        Ok(())
    }

    /// All successes.
    pub(crate) fn all(&self) -> anyhow::Result<Histogram<u64>> {
        let mut all = self.put.clone();
        all.add(&self.get)?;
        Ok(all)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_loses_no_call_and_no_slow_one() {
        let begun = Instant::now();
        let later = |millis| begun + Duration::from_millis(millis);
        let mut one = Tally::new().unwrap();
        one.record(false, begun, later(1), Ok(())).unwrap();
        one.record(true, begun, later(70_000), Ok(())).unwrap();
        let mut other = Tally::new().unwrap();
        other.record(false, begun, later(3), Ok(())).unwrap();
        other.record(true, begun, later(4), Err(Failure::absent())).unwrap();
        one.merge(other).unwrap();
        assert_eq!((one.put.len(), one.get.len()), (2, 1));
        let all = one.all().unwrap();
        assert_eq!((all.len(), all.value_at_quantile(0.5)), (3, 3_001));
        assert!(all.max() >= 70_000_000);
        assert_eq!(one.failures.get(&Failure::absent()), Some(&1));
        assert_eq!(one.last_end, Some(later(70_000)));
    }
}
