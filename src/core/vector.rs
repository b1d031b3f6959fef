//! Version vectors: for each actor, "all its events up to here".
//!
//! Used as frontier (what a region has applied of one shard of one namespace), as causal context
//! (what a reader of one key has seen), and as token. Join is the point-wise maximum, meet the
//! point-wise minimum over the actors that both know.
//!
//! Source: Parker et al., "Detection of Mutual Inconsistency in Distributed Systems" (1983).

use std::{cmp::Ordering, fmt};

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    id::{Actor, Dot, RegionId},
};

/// Most actors in one vector. Regions times the incarnations that are not retired yet.
pub const ACTORS_MAX: usize = 1024;

/// Largest sequence number. No actor reaches it; what claims to is damage, and must not overflow.
pub const SEQ_MAX: u64 = u64::MAX >> 1;

/// For each actor, how many of its events are covered. Actors without events are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct VersionVector {
    /// Sorted by actor; no zero counts.
    entries: Vec<(Actor, u64)>,
}

impl VersionVector {
    /// Covers nothing.
    pub const fn new() -> Self {
        Self { entries: Vec::new() }
    }

    /// How many events of `actor` are covered.
    pub fn get(&self, actor: Actor) -> u64 {
        match self.position(actor) {
            Ok(at) => self.entries[at].1,
            Err(_) => 0,
        }
    }

    /// Whether `dot` is covered.
    pub fn covers(&self, dot: Dot) -> bool {
        dot.seq <= self.get(dot.actor)
    }

    /// Whether everything in `other` is covered.
    pub fn covers_all(&self, other: &Self) -> bool {
        other.entries.iter().all(|&(actor, seq)| seq <= self.get(actor))
    }

    /// Covers `actor` up to `seq`; never goes back.
    pub fn advance(&mut self, actor: Actor, seq: u64) {
        if seq == 0 {
            return;
        }
        match self.position(actor) {
            Ok(at) => self.entries[at].1 = self.entries[at].1.max(seq),
            Err(at) => self.entries.insert(at, (actor, seq)),
        }
    }

    /// Covers `dot` and all before it.
    pub fn add(&mut self, dot: Dot) {
        self.advance(dot.actor, dot.seq);
    }

    /// Point-wise maximum.
    pub fn join(&mut self, other: &Self) {
        for &(actor, seq) in &other.entries {
            self.advance(actor, seq);
        }
    }

    /// Point-wise minimum; an actor that one side does not know is not covered.
    pub fn meet(&self, other: &Self) -> Self {
        let entries = self
            .entries
            .iter()
            .map(|&(actor, seq)| (actor, seq.min(other.get(actor))))
            .filter(|&(_, seq)| seq > 0)
            .collect();
        Self { entries }
    }

    /// Point-wise difference: of each actor, by how much this is above `other`.
    pub fn minus(&self, other: &Self) -> Self {
        let above = self.entries.iter().map(|&(actor, seq)| {
            let above = seq.saturating_sub(other.get(actor));
            (actor, above)
        });
        Self { entries: above.filter(|&(_, above)| above > 0).collect() }
    }

    /// How many events this covers that `other` does not.
    pub fn events_beyond(&self, other: &Self) -> u64 {
        let beyond = |&(actor, seq): &(Actor, u64)| seq.saturating_sub(other.get(actor));
        self.entries.iter().map(beyond).fold(0, u64::saturating_add)
    }

    /// The entries, in order of actors.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Actor, u64)> + '_ {
        self.entries.iter().copied()
    }

    /// Whether nothing is covered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Appends the encoding.
    pub fn encode(&self, writer: &mut Writer) {
        writer.count(self.entries.len());
        for &(actor, seq) in &self.entries {
            writer.varint(u64::from(actor.region.0));
            writer.varint(u64::from(actor.incarnation));
            writer.varint(seq);
        }
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// If actors are out of order, repeated or too many, or a count is zero.
    pub fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let count = reader.count(3)?;
        if count > ACTORS_MAX {
            return Err(DecodeError::TooLarge {
                what: "version vector",
                actual: count as u64,
                limit: ACTORS_MAX as u64,
            });
        }
        let mut entries: Vec<(Actor, u64)> = Vec::with_capacity(count);
        for _ in 0..count {
            let actor = decode_actor(reader)?;
            let seq = reader.varint()?;
            let in_order = entries.last().is_none_or(|&(last, _)| last < actor);
            if seq == 0 || seq > SEQ_MAX || !in_order {
                return Err(reader.invalid(seq));
            }
            entries.push((actor, seq));
        }
        Ok(Self { entries })
    }

    /// The encoding alone.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::with_capacity(1 + self.entries.len() * 8);
        self.encode(&mut writer);
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// As [`decode`](Self::decode), and if bytes are left over.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("version vector", bytes);
        let vector = Self::decode(&mut reader)?;
        reader.finish()?;
        Ok(vector)
    }

    fn position(&self, actor: Actor) -> Result<usize, usize> {
        self.entries.binary_search_by(|&(held, _)| held.cmp(&actor))
    }
}

impl FromIterator<(Actor, u64)> for VersionVector {
    fn from_iter<I: IntoIterator<Item = (Actor, u64)>>(entries: I) -> Self {
        let mut vector = Self::new();
        for (actor, seq) in entries {
            vector.advance(actor, seq);
        }
        vector
    }
}

/// The causal order; `None` for concurrent vectors.
impl PartialOrd for VersionVector {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        match (self.covers_all(other), other.covers_all(self)) {
            (true, true) => Some(Ordering::Equal),
            (true, false) => Some(Ordering::Greater),
            (false, true) => Some(Ordering::Less),
            (false, false) => None,
        }
    }
}

impl fmt::Display for VersionVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (place, (actor, seq)) in self.entries.iter().enumerate() {
            let separator = if place == 0 { "" } else { " " };
            write!(f, "{separator}{actor}:{seq}")?;
        }
        f.write_str("}")
    }
}

/// Writes an actor.
pub(crate) fn encode_actor(actor: Actor, writer: &mut Writer) {
    writer.varint(u64::from(actor.region.0));
    writer.varint(u64::from(actor.incarnation));
}

/// Reads an actor.
pub(crate) fn decode_actor(reader: &mut Reader) -> Result<Actor, DecodeError> {
    let region = RegionId(reader.u16()?);
    Ok(Actor { region, incarnation: reader.u32()? })
}

/// Writes a dot.
pub(crate) fn encode_dot(dot: Dot, writer: &mut Writer) {
    encode_actor(dot.actor, writer);
    writer.varint(dot.seq);
}

/// Reads a dot; `seq` 0 does not exist.
pub(crate) fn decode_dot(reader: &mut Reader) -> Result<Dot, DecodeError> {
    let actor = decode_actor(reader)?;
    let seq = reader.varint()?;
    if seq == 0 || seq > SEQ_MAX {
        return Err(reader.invalid(seq));
    }
    Ok(Dot { actor, seq })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn any_actor() -> impl Strategy<Value = Actor> {
        (1u16..5, 1u32..3)
            .prop_map(|(region, incarnation)| Actor { region: RegionId(region), incarnation })
    }

    pub(crate) fn any_vector() -> impl Strategy<Value = VersionVector> {
        prop::collection::vec((any_actor(), 1u64..1000), 0..6)
            .prop_map(|entries| entries.into_iter().collect())
    }

    fn joined(left: &VersionVector, right: &VersionVector) -> VersionVector {
        let mut both = left.clone();
        both.join(right);
        both
    }

    proptest! {
        #[test]
        fn join_ignores_order_grouping_and_repetition(a in any_vector(), b in any_vector(), c in any_vector()) {
            prop_assert_eq!(joined(&a, &b), joined(&b, &a));
            prop_assert_eq!(joined(&a, &joined(&b, &c)), joined(&joined(&a, &b), &c));
            prop_assert_eq!(joined(&a, &a), a);
        }

        #[test]
        fn join_covers_both_and_meet_is_covered_by_both(a in any_vector(), b in any_vector()) {
            prop_assert!(joined(&a, &b).covers_all(&a) && joined(&a, &b).covers_all(&b));
            prop_assert!(a.covers_all(&a.meet(&b)) && b.covers_all(&a.meet(&b)));
            prop_assert_eq!(a.events_beyond(&b) == 0, b.covers_all(&a));
        }

        #[test]
        fn vector_reads_back(vector in any_vector()) {
            prop_assert_eq!(VersionVector::from_bytes(vector.to_bytes()), Ok(vector));
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = VersionVector::from_bytes(Bytes::from(noise));
        }
    }

    #[test]
    fn vectors_of_two_regions_that_did_not_talk_are_concurrent() {
        let actor = |region| Actor { region: RegionId(region), incarnation: 1 };
        let left: VersionVector = [(actor(1), 2)].into_iter().collect();
        let right: VersionVector = [(actor(2), 1)].into_iter().collect();
        assert_eq!(left.partial_cmp(&right), None);
        assert_eq!(left.partial_cmp(&joined(&left, &right)), Some(Ordering::Less));
        assert_eq!(joined(&left, &right).to_string(), "{1.1:2 2.1:1}");
    }

    #[test]
    fn repeated_or_unordered_actors_are_refused() {
        for bytes in [&[2u8, 1, 1, 5, 1, 1, 6][..], &[2, 2, 1, 5, 1, 1, 6], &[1, 1, 1, 0]] {
            let vector = VersionVector::from_bytes(Bytes::copy_from_slice(bytes));
            assert!(matches!(vector, Err(DecodeError::Invalid { .. })), "{bytes:?}: {vector:?}");
        }
    }
}
