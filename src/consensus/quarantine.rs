//! Keeps a freshly started replica out of elections for a while.
//!
//! A leader that serves lease reads relies on its followers' promise not to help another
//! candidate for one lease. openraft keeps that promise in memory only: a follower that restarts
//! has forgotten it and would vote at once, while the old leader still answers reads from its
//! lease (reproduced: stale reads for the rest of the lease). So a replica that has a vote or a
//! log, and may therefore have promised something, refuses `Vote` and `PreVote` and starts no
//! election for 1.25 leases after its start.
//!
//! Done only with lease reads on: reads that ask a quorum do not rely on leases, and without them
//! the quarantine would only add to the time a whole cluster needs after a restart. Hence the one
//! rule for operators: **turn lease reads off on all nodes before starting one without them**,
//! or wait one lease between stopping and starting a node while others still have them on.
//!
//! A leadership transfer passes: the old leader itself asked for it and has stopped its lease.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Whether one group's replica may take part in elections.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    until: Mutex<Option<Instant>>,
}

impl Quarantine {
    /// Starts now and lasts 1.25 leases.
    pub(crate) fn start(lease: Duration) -> Self {
        Self { until: Mutex::new(Some(Instant::now() + lease * 5 / 4)) }
    }

    /// When it ends; `None` if it is over or never was.
    pub(crate) fn ends(&self) -> Option<Instant> {
        self.ends_after(Instant::now())
    }

    fn ends_after(&self, now: Instant) -> Option<Instant> {
        let mut until = self.until.lock();
        if until.is_some_and(|until| until <= now) {
            *until = None;
        }
        *until
    }

    /// Whether a request for a vote must go unanswered.
    pub(crate) fn refuses(&self, leadership_transfer: bool) -> bool {
        !leadership_transfer && self.ends().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_are_refused_for_five_quarters_of_a_lease() {
        let before = Instant::now();
        let quarantine = Quarantine::start(Duration::from_secs(1000));
        let after = Instant::now();

        assert!(quarantine.refuses(false));
        assert!(quarantine.ends_after(before + Duration::from_secs(1249)).is_some());
        assert!(quarantine.ends_after(after + Duration::from_secs(1250)).is_none());
        assert!(!quarantine.refuses(false));
    }

    #[test]
    fn a_leadership_transfer_passes() {
        assert!(!Quarantine::start(Duration::from_secs(1000)).refuses(true));
        assert!(!Quarantine::default().refuses(false));
    }
}
