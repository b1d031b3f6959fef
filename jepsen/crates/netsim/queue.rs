//! Packets under way: they come out when they are due, and never before those that left earlier in
//! the same direction.

use crate::link::HostId;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// Most bytes under way, all directions together: 100 ms of 5 Gbit/s.
const BYTES_MAX: usize = 64 << 20;

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    number: u64,
    from: HostId,
    to: HostId,
    packet: Vec<u8>,
}

/// A packet that is due.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) from: HostId,
    pub(crate) to: HostId,
    pub(crate) packet: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Queue {
    hosts: usize,
    waiting: BinaryHeap<Reverse<Waiting>>,
    bytes: usize,
    next: u64,
    /// By direction: when the latest packet is due, and how many wait.
    latest: Vec<(Option<Instant>, u32)>,
}

impl Queue {
    pub(crate) fn new(hosts: usize) -> Self {
        let latest = vec![(None, 0); hosts * hosts];
        Self { hosts, waiting: BinaryHeap::new(), bytes: 0, next: 0, latest }
    }

    /// Takes a packet; false if it does not fit.
    pub(crate) fn push(
        &mut self,
        from: HostId,
        to: HostId,
        now: Instant,
        delay: Duration,
        packet: &[u8],
    ) -> bool {
        if self.bytes + packet.len() > BYTES_MAX {
            return false;
        }
        let (latest, count) = &mut self.latest[from.0 * self.hosts + to.0];
        let due = latest.map_or(now + delay, |latest| latest.max(now + delay));
        *latest = Some(due);
        *count += 1;
        self.bytes += packet.len();
        let waiting = Waiting { due, number: self.next, from, to, packet: packet.to_vec() };
        self.next += 1;
        self.waiting.push(Reverse(waiting));
        true
    }

    /// Whether a packet of this direction is under way.
    pub(crate) fn holds(&self, from: HostId, to: HostId) -> bool {
        self.latest[from.0 * self.hosts + to.0].1 > 0
    }

    /// The next packet that is due.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Due> {
        if self.waiting.peek().is_none_or(|Reverse(waiting)| waiting.due > now) {
            return None;
        }
        let Reverse(Waiting { from, to, packet, .. }) = self.waiting.pop()?;
        self.bytes -= packet.len();
        self.latest[from.0 * self.hosts + to.0].1 -= 1;
        Some(Due { from, to, packet })
    }

    /// How long until the next packet is due; none if none waits.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Duration> {
        self.waiting.peek().map(|Reverse(waiting)| waiting.due.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_of_a_direction_keep_their_order_when_the_delay_shrinks() {
        let mut queue = Queue::new(2);
        let (one, other, now) = (HostId(0), HostId(1), Instant::now());
        let ms = Duration::from_millis;
        assert!(queue.push(one, other, now, ms(50), b"first"));
        assert!(queue.push(one, other, now, ms(1), b"second"));
        assert!(queue.push(other, one, now, ms(1), b"back"));

        assert_eq!(queue.next_due(now), Some(ms(1)));
        assert_eq!(queue.pop(now + ms(2)).map(|due| due.packet), Some(b"back".to_vec()));
        assert_eq!(queue.pop(now + ms(2)), None);
        assert!(queue.holds(one, other));
        assert_eq!(queue.pop(now + ms(50)).map(|due| due.packet), Some(b"first".to_vec()));
        assert_eq!(queue.pop(now + ms(50)).map(|due| due.packet), Some(b"second".to_vec()));
        assert!(!queue.holds(one, other));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut queue = Queue::new(2);
        let packet = vec![0; 60_000];
        let now = Instant::now();
        let mut push = || queue.push(HostId(0), HostId(1), now, Duration::from_secs(1), &packet);
        let taken = (0..2000).filter(|_| push()).count();
        assert_eq!(taken, BYTES_MAX / packet.len());
    }
}
