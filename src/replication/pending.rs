//! Changes that have arrived and are not applied yet: what may go next, and what must wait.
//!
//! Pure. The peer sends changes in causal order as far as its own origins go; a change may still
//! depend on a third region's change that comes over another link. It waits here, and everything
//! of its stream behind it.

use std::collections::VecDeque;

use tombolo_core::{Change, VersionVector};

/// The received changes of one namespace, in stream order.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    changes: VecDeque<(Change, usize)>,
}

impl Pending {
    /// A change arrived that took `bytes` on the wire.
    pub(crate) fn push(&mut self, change: Change, bytes: usize) {
        self.changes.push_back((change, bytes));
    }

    /// Takes the longest beginning that can be applied on top of `frontier`, up to `bytes_max`
    /// but at least one change. Empty if the first change must wait.
    pub(crate) fn take_ready(&mut self, frontier: &VersionVector, bytes_max: usize) -> Vec<Change> {
        let mut reached = frontier.clone();
        let mut ready = Vec::new();
        let mut bytes = 0;
        while let Some((change, size)) = self.changes.front() {
            let repeated = reached.covers(change.last());
            if !repeated && !reached.covers_all(&change.depends_on) {
                break;
            }
            if !ready.is_empty() && bytes + size > bytes_max {
                break;
            }
            bytes += size;
            reached.add(change.last());
            if let Some((change, _)) = self.changes.pop_front()
                && !repeated
            {
                ready.push(change);
            }
        }
        ready
    }

    /// What the first change waits for.
    pub(crate) fn waits_for(&self) -> Option<&VersionVector> {
        self.changes.front().map(|(change, _)| &change.depends_on)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use tombolo_core::{
        Actor, Content, Dot, HybridTime, RegionId,
        record::{Delta, Sibling},
    };

    use super::*;

    fn actor(region: u16) -> Actor {
        Actor { region: RegionId(region), incarnation: 1 }
    }

    fn change(region: u16, seq: u64, depends_on: &[(u16, u64)]) -> Change {
        let dot = Dot { actor: actor(region), seq };
        let sibling = Sibling { dot, time: HybridTime::ZERO, content: Content::Tombstone };
        let delta = Delta { key: "k".into(), sibling, supersedes: Vec::new() };
        let depends_on = depends_on.iter().map(|&(region, seq)| (actor(region), seq)).collect();
        Change { actor: actor(region), first_seq: seq, depends_on, deltas: vec![delta] }
    }

    fn seqs(changes: &[Change]) -> Vec<u64> {
        changes.iter().map(|change| change.first_seq).collect()
    }

    #[test]
    fn a_change_waits_for_its_cause_and_holds_back_what_follows() {
        let mut pending = Pending::default();
        pending.push(change(1, 1, &[]), 10);
        pending.push(change(1, 2, &[(1, 1), (3, 4)]), 10);
        pending.push(change(1, 3, &[(1, 2)]), 10);

        let frontier = VersionVector::new();
        assert_eq!(seqs(&pending.take_ready(&frontier, 100)), [1]);
        assert!(pending.take_ready(&frontier, 100).is_empty());

        let caught_up: VersionVector = [(actor(1), 1), (actor(3), 4)].into_iter().collect();
        assert_eq!(seqs(&pending.take_ready(&caught_up, 100)), [2, 3]);
        assert!(pending.is_empty());
    }

    #[test]
    fn a_batch_is_bounded_by_bytes_but_one_change_always_goes() {
        let mut pending = Pending::default();
        for seq in 1..4 {
            pending.push(change(1, seq, &[]), 60);
        }
        let mut frontier = VersionVector::new();
        assert_eq!(seqs(&pending.take_ready(&frontier, 100)), [1]);
        frontier.advance(actor(1), 1);
        assert_eq!(seqs(&pending.take_ready(&frontier, 120)), [2, 3]);
    }

    #[test]
    fn what_is_applied_already_is_dropped() {
        let mut pending = Pending::default();
        pending.push(change(1, 1, &[]), 10);
        pending.push(change(1, 2, &[]), 10);
        let frontier = [(actor(1), 2)].into_iter().collect();
        assert!(pending.take_ready(&frontier, 100).is_empty());
        assert!(pending.is_empty());
    }
}
