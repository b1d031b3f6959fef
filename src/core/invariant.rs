//! What must hold of all regions together, whatever networks, clocks and crashes do.
//!
//! Each promise has a name and a sentence. The seeded simulation (`tests/sim`) checks every one of
//! them after every step of every history; a failure is reported by its name. `docs/simulation.md`
//! lists them.
//!
//! [`survivors`] says what a region must hold of a key from nothing but the writes it has applied: it
//! knows no merge, no order of arrival and no repair, so it can contradict all of them.
//!
//! Not here: the histories, and who looks at all regions at once (`tests/sim`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use bytes::Bytes;

use crate::{
    change::Change,
    id::{Dot, NamespaceId},
    record::{Delta, Record, Rule},
    vector::VersionVector,
};

/// A promise about all regions of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// Regions that have applied the same hold the same, and after healing all have.
    Convergence,
    /// A write that was acknowledged is held where it is applied, unless another replaced it.
    NoLostWrite,
    /// A write that was replaced is held nowhere where what replaced it is applied.
    NoResurrection,
    /// A write without a context replaces everything that it has seen of its key.
    WriteWins,
    /// No two writes carry one dot.
    NoDotReuse,
    /// A frontier covers only writes that exist, whole changes, and all that they depend on, and
    /// never goes back.
    FrontierSound,
    /// What a region is believed to have applied, it has applied.
    AcknowledgedSound,
    /// A tombstone is dropped only when every region has applied it, and nothing that has not seen
    /// it can still come.
    StableSound,
    /// The change log has every change between what was trimmed and the frontier.
    LogWhole,
    /// The Merkle tree is the one that a computation from all records gives.
    MerkleExact,
    /// What a rule dropped is in the ledger of every region.
    LedgerWhole,
    /// After healing no tombstone stays.
    NoTombstones,
    /// While all paths are up, a change crosses each link once.
    OncePerLink,
    /// A region that has a request's change does not execute the request again, and where two regions
    /// have executed one, it is shown once and has not lost to itself.
    RequestOnce,
}

impl Invariant {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Convergence,
        Self::NoLostWrite,
        Self::NoResurrection,
        Self::WriteWins,
        Self::NoDotReuse,
        Self::FrontierSound,
        Self::AcknowledgedSound,
        Self::StableSound,
        Self::LogWhole,
        Self::MerkleExact,
        Self::LedgerWhole,
        Self::NoTombstones,
        Self::OncePerLink,
        Self::RequestOnce,
    ];

    /// The promise in one sentence.
    pub const fn statement(self) -> &'static str {
        match self {
            Self::Convergence => {
                "regions that have applied the same hold the same, and after healing all have"
            }
            Self::NoLostWrite => {
                "an acknowledged write is held where it is applied, unless another replaced it"
            }
            Self::NoResurrection => {
                "a write that was replaced is held nowhere where what replaced it is applied"
            }
            Self::WriteWins => "a write without a context replaces all that it has seen of its key",
            Self::NoDotReuse => "no two writes carry one dot",
            Self::FrontierSound => {
                "a frontier covers only whole changes that exist, with all that they depend on, and \
                 never goes back"
            }
            Self::AcknowledgedSound => "what a region is believed to have applied, it has applied",
            Self::StableSound => {
                "a tombstone is dropped only when every region has applied it and nothing that has \
                 not seen it can still come"
            }
            Self::LogWhole => {
                "the change log has every change between what was trimmed and the frontier"
            }
            Self::MerkleExact => "the Merkle tree is the one computed from all records",
            Self::LedgerWhole => "what a rule dropped is in the ledger of every region",
            Self::NoTombstones => "after healing no tombstone stays",
            Self::OncePerLink => "while all paths are up, a change crosses each link once",
            Self::RequestOnce => {
                "a request is executed once where its change is known, and shown once everywhere"
            }
        }
    }
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}: {}", self.statement())
    }
}

/// One write of one key, as its origin made it.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// What it does.
    pub delta: &'a Delta,
    /// What its origin had applied before.
    pub seen: &'a VersionVector,
}

/// The values that must be held of a key by whoever has applied exactly `events` of it, in order of
/// their dots.
pub fn survivors<'a>(events: impl IntoIterator<Item = Event<'a>>, rule: Rule) -> Vec<Dot> {
    let events: Vec<Event<'_>> = events.into_iter().collect();
    let named = |event: &Event<'a>| {
        let Delta { supersedes, pushed_out, .. } = event.delta;
        supersedes.iter().chain(&pushed_out.dots).copied()
    };
    let replaced: BTreeSet<Dot> = events.iter().flat_map(named).collect();
    let is_present = |event: &Event<'_>| event.delta.sibling.content.is_present();
    let dot = |event: &Event<'_>| event.delta.sibling.dot;
    let kept = events.iter().filter(|event| !replaced.contains(&dot(event)));
    let mut kept: Vec<Dot> = match rule {
        Rule::Siblings
        | Rule::Counter
        | Rule::Set
        | Rule::Map
        | Rule::Flag
        | Rule::Max
        | Rule::Min => kept.filter(|event| is_present(event)).map(dot).collect(),
        Rule::Lww => {
            // Whoever wrote it had this one before, and what its write replaced stood against it.
            let is_outlived =
                |event: &&Event<'_>| events.iter().any(|other| other.seen.covers(dot(event)));
            kept.filter(|event| !is_outlived(event))
                .max_by_key(|event| (event.delta.sibling.time, dot(event)))
                .filter(|winner| is_present(winner))
                .map(dot)
                .into_iter()
                .collect()
        }
    };
    kept.sort_unstable();
    kept
}

/// The values that a record holds.
pub fn live_dots(record: Option<&Record>) -> Vec<Dot> {
    let siblings = record.into_iter().flat_map(Record::siblings);
    let live = siblings.filter(|held| held.content.is_present());
    live.map(|held| held.dot).collect()
}

/// Whether `frontier` covers a change wholly or not at all, and `held` all that it depends on then:
/// the frontier, and up to where records are ahead of it.
pub fn is_closed_over(frontier: &VersionVector, held: &VersionVector, change: &Change) -> bool {
    let first = Dot { actor: change.actor, seq: change.first_seq };
    if frontier.covers(change.last()) {
        held.covers_all(&change.depends_on)
    } else {
        !frontier.covers(first)
    }
}

/// Whether a log has every change between `trimmed` and `frontier`. The changes are in order of
/// actor and sequence number.
pub fn is_whole<'a>(
    changes: impl IntoIterator<Item = &'a Change>,
    trimmed: &VersionVector,
    frontier: &VersionVector,
) -> bool {
    let mut reached = trimmed.clone();
    for change in changes {
        if change.first_seq != reached.get(change.actor) + 1 {
            return false;
        }
        reached.add(change.last());
    }
    frontier.iter().all(|(actor, seq)| reached.get(actor) == seq)
}

/// Whether two regions that have applied the same hold the same values.
pub fn hold_the_same(
    left: &BTreeMap<(NamespaceId, Bytes), Record>,
    right: &BTreeMap<(NamespaceId, Bytes), Record>,
) -> bool {
    let live = |(key, record): (&(NamespaceId, Bytes), &Record)| {
        let live = live_dots(Some(record));
        (!live.is_empty()).then(|| (key.clone(), live))
    };
    left.iter().filter_map(live).eq(right.iter().filter_map(live))
}

#[cfg(test)]
mod tests {
    use crate::record::{Content, PushedOut};

    use super::*;
    use crate::{
        hlc::HybridTime,
        id::{Actor, RegionId},
        record::Sibling,
    };

    fn dot(region: u16, seq: u64) -> Dot {
        Dot { actor: Actor { region: RegionId(region), incarnation: 1 }, seq }
    }

    fn delta(dot: Dot, wall: u64, value: &'static str, supersedes: &[Dot]) -> Delta {
        let time = HybridTime::new(wall, 0).unwrap();
        let content = if value.is_empty() { Content::Tombstone } else { Content::value(value) };
        let sibling = Sibling { dot, time, request: None, content };
        Delta {
            key: "k".into(),
            sibling,
            supersedes: supersedes.to_vec(),
            pushed_out: PushedOut::default(),
        }
    }

    fn kept(writes: &[(Delta, VersionVector)], rule: Rule) -> Vec<Dot> {
        survivors(writes.iter().map(|(delta, seen)| Event { delta, seen }), rule)
    }

    #[test]
    fn what_is_replaced_is_gone_and_what_is_concurrent_stays_or_loses_by_time() {
        let nothing = VersionVector::new();
        let writes = [
            (delta(dot(1, 1), 5, "old", &[]), nothing.clone()),
            (
                delta(dot(1, 2), 6, "new", &[dot(1, 1)]),
                [(dot(1, 1).actor, 1)].into_iter().collect(),
            ),
            (delta(dot(2, 1), 3, "other", &[]), nothing),
        ];
        assert_eq!(kept(&writes, Rule::Siblings), [dot(1, 2), dot(2, 1)]);
        assert_eq!(kept(&writes, Rule::Lww), [dot(1, 2)]);
    }

    #[test]
    fn a_tombstone_that_a_write_has_seen_loses_whatever_its_time() {
        let seen: VersionVector = [(dot(1, 1).actor, 1)].into_iter().collect();
        let deletion = (delta(dot(1, 1), 9, "", &[]), VersionVector::new());
        let concurrent = (delta(dot(2, 1), 3, "w", &[]), VersionVector::new());
        let later = (delta(dot(2, 1), 3, "w", &[]), seen);
        assert_eq!(kept(&[deletion.clone(), concurrent], Rule::Lww), []);
        assert_eq!(kept(&[deletion, later], Rule::Lww), [dot(2, 1)]);
    }

    #[test]
    fn a_log_with_a_gap_or_without_an_end_is_not_whole() {
        let change = |seq| Change {
            actor: dot(1, 1).actor,
            first_seq: seq,
            depends_on: VersionVector::new(),
            ahead_by: VersionVector::new(),
            request: None,
            deltas: vec![delta(dot(1, seq), 1, "v", &[])],
        };
        let upto = |seq| -> VersionVector { [(dot(1, 1).actor, seq)].into_iter().collect() };
        let log = [change(3), change(4)];
        assert!(is_whole(&log, &upto(2), &upto(4)));
        assert!(!is_whole(&log, &upto(1), &upto(4)) && !is_whole(&log, &upto(2), &upto(5)));
    }
}
