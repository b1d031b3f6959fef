//! The sending half of a link: which changes a peer lacks, and in which order they may go.
//!
//! A peer says what it has applied and which origins it wants from here: this region's own changes,
//! and those of regions to which its path is cut. They are read from the change log of each actor
//! and merged so that causes come before effects.
//!
//! Invariants:
//! * What is sent of the chosen origins is causally ordered and without a gap. Causes of other origins
//!   the peer waits for itself ([`crate::pending`]).
//! * Nothing is skipped: a cursor that lies in the trimmed part of the log is an answer of its own.
//!
//! Not here: reading the log, how much may be in flight (`tombolo-replication`).

use std::collections::{BTreeSet, VecDeque};

use crate::{
    change::Change,
    id::{Actor, RegionId},
    vector::VersionVector,
};

/// Where the stream of one namespace to one peer stands.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Regions whose changes the peer wants from here.
    origins: BTreeSet<RegionId>,
    /// Sent up to here.
    sent: VersionVector,
    /// Sent batches that are not acknowledged: what covers them, and their bytes.
    in_flight: VecDeque<(VersionVector, usize)>,
    in_flight_bytes: usize,
}

impl Outgoing {
    /// A stream of the changes of `origins` to a peer that has applied `sent`.
    pub fn new(origins: BTreeSet<RegionId>, sent: VersionVector) -> Self {
        Self { origins, sent, in_flight: VecDeque::new(), in_flight_bytes: 0 }
    }

    /// Bytes that are sent and not acknowledged.
    pub fn in_flight_bytes(&self) -> usize {
        self.in_flight_bytes
    }

    /// The peer has applied `frontier`.
    ///
    /// What of it was not sent came another way, and is skipped: the peer would drop it without a
    /// word, and it would count as in flight for ever.
    pub fn acknowledged(&mut self, frontier: &VersionVector) {
        self.sent.join(frontier);
        while let Some((sent, bytes)) = self.in_flight.front() {
            if !frontier.covers_all(sent) {
                break;
            }
            self.in_flight_bytes -= bytes;
            self.in_flight.pop_front();
        }
    }

    /// The actors of which there is more in `frontier` than was sent, each with the first sequence
    /// number that was not.
    pub fn behind(&self, frontier: &VersionVector) -> Vec<(Actor, u64)> {
        let wanted = frontier.iter().filter(|(actor, _)| self.origins.contains(&actor.region));
        let next = wanted.map(|(actor, seq)| (actor, self.sent.get(actor) + 1, seq));
        next.filter(|(_, from, seq)| from <= seq).map(|(actor, from, _)| (actor, from)).collect()
    }

    /// Whether the log, gone up to `trimmed`, no longer reaches back to what is to be sent next.
    pub fn is_trimmed(&self, behind: &[(Actor, u64)], trimmed: &VersionVector) -> bool {
        behind.iter().any(|&(actor, from)| from <= trimmed.get(actor))
    }

    /// Takes the next batch from what the log has of each actor: causes before effects, at least
    /// one change if any may go, and no more after `bytes_max`.
    pub fn take<T>(
        &mut self,
        mut waiting: Vec<VecDeque<T>>,
        bytes_max: usize,
        parts: impl Fn(&T) -> (&Change, usize),
    ) -> Vec<T> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(next) = waiting.iter_mut().find_map(|changes| {
            let ready = changes.front().is_some_and(|stored| self.is_ready(parts(stored).0));
            if ready { changes.pop_front() } else { None }
        }) {
            let (change, size) = parts(&next);
            bytes += size;
            self.sent.add(change.last());
            batch.push(next);
            if bytes >= bytes_max {
                break;
            }
        }
        if !batch.is_empty() {
            let covers = self.sent.iter().filter(|(actor, _)| self.origins.contains(&actor.region));
            self.in_flight.push_back((covers.collect(), bytes));
            self.in_flight_bytes += bytes;
        }
        batch
    }

    /// Whether all causes that this stream carries are sent.
    fn is_ready(&self, change: &Change) -> bool {
        change
            .depends_on
            .iter()
            .filter(|(actor, _)| self.origins.contains(&actor.region))
            .all(|(actor, seq)| seq <= self.sent.get(actor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hlc::HybridTime,
        id::Dot,
        record::{Content, Delta, Sibling},
    };

    fn actor(region: u16) -> Actor {
        Actor { region: RegionId(region), incarnation: 1 }
    }

    fn vector(entries: &[(u16, u64)]) -> VersionVector {
        entries.iter().map(|&(region, seq)| (actor(region), seq)).collect()
    }

    fn change(region: u16, seq: u64, depends_on: &[(u16, u64)]) -> Change {
        let dot = Dot { actor: actor(region), seq };
        let sibling =
            Sibling { dot, time: HybridTime::ZERO, request: None, content: Content::Tombstone };
        let delta = Delta {
            key: "k".into(),
            sibling,
            supersedes: Vec::new(),
            pushed_out: crate::record::PushedOut::default(),
        };
        let depends_on = vector(depends_on);
        let ahead_by = VersionVector::new();
        Change {
            actor: actor(region),
            first_seq: seq,
            depends_on,
            ahead_by,
            request: None,
            deltas: vec![delta],
        }
    }

    fn take(outgoing: &mut Outgoing, changes: &[&[Change]], bytes_max: usize) -> Vec<(u16, u64)> {
        let waiting = changes.iter().map(|changes| changes.iter().cloned().collect()).collect();
        let batch = outgoing.take(waiting, bytes_max, |change: &Change| (change, 10));
        batch.iter().map(|change| (change.actor.region.0, change.first_seq)).collect()
    }

    #[test]
    fn causes_go_before_effects_and_those_of_other_origins_do_not_hold_back() {
        let origins = || [RegionId(1), RegionId(2)].into_iter().collect();
        let mut outgoing = Outgoing::new(origins(), VersionVector::new());
        let ours = [change(1, 1, &[(2, 1)]), change(1, 2, &[(1, 1), (3, 9)])];
        let theirs = [change(2, 1, &[])];
        assert_eq!(take(&mut outgoing, &[&ours, &theirs], 100), [(2, 1), (1, 1), (1, 2)]);

        let mut outgoing = Outgoing::new(origins(), VersionVector::new());
        assert_eq!(take(&mut outgoing, &[&ours], 100), [], "the cause is not there");
    }

    #[test]
    fn what_is_sent_is_in_flight_until_all_of_it_is_acknowledged() {
        let mut outgoing = Outgoing::new([RegionId(1)].into(), VersionVector::new());
        let changes = [change(1, 1, &[]), change(1, 2, &[(1, 1)]), change(1, 3, &[(1, 2)])];
        assert_eq!(take(&mut outgoing, &[&changes], 20), [(1, 1), (1, 2)]);
        assert_eq!(outgoing.in_flight_bytes(), 20);
        outgoing.acknowledged(&vector(&[(1, 1)]));
        assert_eq!(outgoing.in_flight_bytes(), 20);
        outgoing.acknowledged(&vector(&[(1, 2), (2, 7)]));
        assert_eq!(outgoing.in_flight_bytes(), 0);
    }

    #[test]
    fn what_came_to_the_peer_another_way_is_not_sent() {
        let mut outgoing = Outgoing::new([RegionId(1)].into(), VersionVector::new());
        // The peer was repaired before the first batch went out.
        outgoing.acknowledged(&vector(&[(1, 2), (3, 1)]));
        assert_eq!(outgoing.behind(&vector(&[(1, 3)])), [(actor(1), 3)]);
        let changes = [change(1, 3, &[(1, 2)])];
        assert_eq!(take(&mut outgoing, &[&changes], 100), [(1, 3)]);
    }

    #[test]
    fn only_what_is_wanted_and_not_sent_is_behind_and_a_trimmed_log_does_not_reach_it() {
        let outgoing = Outgoing::new([RegionId(1)].into(), vector(&[(1, 4)]));
        assert!(outgoing.behind(&vector(&[(1, 4), (2, 9)])).is_empty());
        let behind = outgoing.behind(&vector(&[(1, 6), (2, 9)]));
        assert_eq!(behind, [(actor(1), 5)]);
        assert!(!outgoing.is_trimmed(&behind, &vector(&[(1, 4), (2, 9)])));
        assert!(outgoing.is_trimmed(&behind, &vector(&[(1, 5)])));
    }
}
