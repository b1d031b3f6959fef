//! Changes that have arrived and are not applied yet: what may go next, and what must wait.
//!
//! The receiving half of a link; [`crate::outgoing`] is the sending one. The peer sends changes in
//! causal order as far as its own origins go; a change may still depend on a third region's change
//! that comes over another link. It waits here, and everything of its actor behind it.
//!
//! Invariants:
//! * What is taken can be applied in that order on top of the frontier, without a gap.
//! * Nothing that a stream brings in any order, or twice, makes what can be applied wait for ever.
//!
//! Not here: applying ([`mod@crate::execute`]), when to try (`tombolo-replication`).

use std::collections::BTreeMap;

use crate::{change::Change, id::Actor, vector::VersionVector};

/// The received changes of one namespace, each actor's in its own order.
///
/// By actor, because a stream that begins again with other origins still brings what was under
/// way: a change may arrive before one that it depends on, or twice.
#[derive(Debug, Default)]
pub struct Pending {
    changes: BTreeMap<Actor, BTreeMap<u64, (Change, usize)>>,
}

impl Pending {
    /// A change arrived that took `bytes` on the wire.
    pub fn push(&mut self, change: Change, bytes: usize) {
        let actor = self.changes.entry(change.actor).or_default();
        actor.insert(change.first_seq, (change, bytes));
    }

    /// Takes what can be applied on top of `frontier`, in causal order, up to `bytes_max` but at
    /// least one change. Empty if all of it must wait.
    pub fn take_ready(&mut self, frontier: &VersionVector, bytes_max: usize) -> Vec<Change> {
        let mut reached = frontier.clone();
        let mut ready = Vec::new();
        let mut bytes = 0;
        let mut progress = true;
        while progress {
            progress = false;
            for changes in self.changes.values_mut() {
                while let Some(first) = changes.first_entry() {
                    let (change, size) = first.get();
                    if reached.covers(change.last()) {
                        first.remove();
                        continue;
                    }
                    let is_next = change.first_seq == reached.get(change.actor) + 1;
                    if !is_next || !reached.covers_all(&change.depends_on) {
                        break;
                    }
                    if !ready.is_empty() && bytes + size > bytes_max {
                        return ready;
                    }
                    bytes += size;
                    reached.add(change.last());
                    ready.push(first.remove().0);
                    progress = true;
                }
            }
        }
        self.changes.retain(|_, changes| !changes.is_empty());
        ready
    }

    /// What a change that must wait waits for.
    pub fn waits_for(&self) -> Option<&VersionVector> {
        let mut first = self.changes.values().filter_map(BTreeMap::first_key_value);
        first.next().map(|(_, (change, _))| &change.depends_on)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.changes.values().all(BTreeMap::is_empty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hlc::HybridTime,
        id::{Dot, RegionId},
        record::{Content, Delta, Sibling},
    };

    fn actor(region: u16) -> Actor {
        Actor { region: RegionId(region), incarnation: 1 }
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
        let depends_on = depends_on.iter().map(|&(region, seq)| (actor(region), seq)).collect();
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
    fn what_was_under_way_when_a_stream_began_again_holds_back_nothing() {
        let mut pending = Pending::default();
        // Sent before the relay was asked for: it needs what the relay brings.
        pending.push(change(1, 2, &[(1, 1)]), 10);
        pending.push(change(3, 1, &[]), 10);
        pending.push(change(1, 1, &[(3, 1)]), 10);
        pending.push(change(1, 2, &[(1, 1)]), 10);
        let ready = pending.take_ready(&VersionVector::new(), 100);
        let order: Vec<_> = ready.iter().map(|it| (it.actor.region.0, it.first_seq)).collect();
        assert_eq!(order, [(3, 1), (1, 1), (1, 2)]);
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
