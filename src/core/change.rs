//! Changes: what the change log holds and links carry.
//!
//! A change is one atomic group of writes by one actor: consecutive dots, applied together or
//! not at all. It carries the frontier that its origin had when it was committed, and a receiver
//! applies it only when its own frontier covers that; so every frontier is a causally closed cut.
//!
//! While a repair of the origin is half done, a record may be ahead of its frontier. A change that
//! replaces such a record depends on what the record has seen, but its other writes have not seen
//! that: what they have is [`Change::seen`].
//!
//! A change also carries the client's request that it carries out, so that a repeat of it is known
//! wherever the change is ([`crate::request`]).

use std::borrow::Cow;

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    hlc::HybridTime,
    id::{Actor, Dot},
    ledger::Cause,
    record::{Content, Delta, PushedOut, Sibling},
    request::{Requested, Tags},
    vector::{VersionVector, decode_actor, decode_dot, encode_actor, encode_dot},
};

/// Consecutive writes of one actor that are applied together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Who wrote.
    pub actor: Actor,
    /// The dot of the first delta; the others follow without a gap.
    pub first_seq: u64,
    /// What the origin had applied before this change, its own earlier events included.
    pub depends_on: VersionVector,
    /// By how much that is above what the origin had applied of all keys. Empty, unless a record was
    /// ahead.
    pub ahead_by: VersionVector,
    /// The request that it carries out, if that came with an id. Its siblings have its tags.
    pub request: Option<Requested>,
    /// At least one.
    pub deltas: Vec<Delta>,
}

const CHANGE_VERSION: u8 = 3;
/// The same with `ahead_by` after the dependencies; only written where it is not empty.
const CHANGE_AHEAD_VERSION: u8 = 4;
/// A byte of flags says what follows the dependencies; only written where there is a request.
const CHANGE_FLAGS_VERSION: u8 = 5;
const AHEAD: u8 = 1;
const REQUESTED: u8 = 2;

impl Change {
    /// The dot of the last delta.
    pub fn last(&self) -> Dot {
        let seq = self.first_seq + self.deltas.len().saturating_sub(1) as u64;
        Dot { actor: self.actor, seq }
    }

    /// What the origin had applied of all keys before this change.
    pub fn seen(&self) -> Cow<'_, VersionVector> {
        if self.ahead_by.is_empty() {
            Cow::Borrowed(&self.depends_on)
        } else {
            Cow::Owned(self.depends_on.minus(&self.ahead_by))
        }
    }

    /// The latest time among the deltas.
    pub fn time(&self) -> HybridTime {
        self.deltas.iter().map(|delta| delta.sibling.time).max().unwrap_or(HybridTime::ZERO)
    }

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let bytes = |delta: &Delta| delta.key.len() + delta.sibling.content.bytes();
        let capacity = 64 + self.deltas.iter().map(bytes).sum::<usize>();
        let mut writer = Writer::with_capacity(capacity);
        let is_ahead = !self.ahead_by.is_empty();
        match (self.request, is_ahead) {
            (None, false) => writer.u8(CHANGE_VERSION),
            (None, true) => writer.u8(CHANGE_AHEAD_VERSION),
            (Some(_), is_ahead) => {
                writer.u8(CHANGE_FLAGS_VERSION);
                writer.u8(REQUESTED | if is_ahead { AHEAD } else { 0 });
            }
        }
        encode_actor(self.actor, &mut writer);
        writer.varint(self.first_seq);
        self.depends_on.encode(&mut writer);
        if is_ahead {
            self.ahead_by.encode(&mut writer);
        }
        if let Some(request) = &self.request {
            request.encode(&mut writer);
        }
        writer.count(self.deltas.len());
        for delta in &self.deltas {
            writer.bytes(&delta.key);
            writer.fixed64(delta.sibling.time.to_bits());
            delta.sibling.content.encode(&mut writer);
            encode_dots(&delta.supersedes, &mut writer);
            encode_dots(&delta.pushed_out.dots, &mut writer);
            if !delta.pushed_out.dots.is_empty() {
                writer.u8(delta.pushed_out.cause.to_byte());
            }
        }
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged, there is no delta, or a sequence number is zero or too large.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("change", bytes);
        let (is_ahead, is_requested) = match reader.u8()? {
            CHANGE_VERSION => (false, false),
            CHANGE_AHEAD_VERSION => (true, false),
            CHANGE_FLAGS_VERSION => match reader.u8()? {
                REQUESTED => (false, true),
                flags if flags == REQUESTED | AHEAD => (true, true),
                // None that is written so, or of a newer version.
                flags => return Err(reader.invalid(u64::from(flags))),
            },
            version => return Err(DecodeError::Version { what: "change", version }),
        };
        let actor = decode_actor(&mut reader)?;
        let first_seq = reader.varint()?;
        let depends_on = VersionVector::decode(&mut reader)?;
        let ahead_by =
            if is_ahead { VersionVector::decode(&mut reader)? } else { VersionVector::new() };
        if is_ahead == ahead_by.is_empty() {
            return Err(reader.invalid(0));
        }
        let request = if is_requested { Some(Requested::decode(&mut reader)?) } else { None };
        let count = reader.count(12)?;
        if count == 0 || first_seq == 0 || first_seq.checked_add(count as u64).is_none() {
            return Err(reader.invalid(first_seq));
        }
        let mut tags = Tags::of(request);
        let mut deltas = Vec::with_capacity(count);
        for place in 0..count {
            let dot = Dot { actor, seq: first_seq + place as u64 };
            deltas.push(decode_delta(&mut reader, dot, &mut tags)?);
        }
        reader.finish()?;
        Ok(Self { actor, first_seq, depends_on, ahead_by, request, deltas })
    }
}

fn decode_delta(reader: &mut Reader, dot: Dot, tags: &mut Tags) -> Result<Delta, DecodeError> {
    let key = reader.bytes()?;
    let request = tags.next(&key);
    let time = HybridTime::from_bits(reader.fixed64()?);
    let content = Content::decode(reader)?;
    let supersedes = decode_dots(reader)?;
    let dots = decode_dots(reader)?;
    let pushed_out = if dots.is_empty() {
        PushedOut::default()
    } else {
        PushedOut { dots, cause: Cause::decode(reader)? }
    };
    Ok(Delta { key, sibling: Sibling { dot, time, request, content }, supersedes, pushed_out })
}

fn encode_dots(dots: &[Dot], writer: &mut Writer) {
    writer.count(dots.len());
    dots.iter().for_each(|&dot| encode_dot(dot, writer));
}

fn decode_dots(reader: &mut Reader) -> Result<Vec<Dot>, DecodeError> {
    let count = reader.count(3)?;
    (0..count).map(|_| decode_dot(reader)).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        record::{Count, TakenBack},
        request::tests::any_requested,
        vector::tests::{any_actor, any_vector},
    };

    pub(crate) fn any_content() -> impl Strategy<Value = Content> {
        let data = || prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from);
        prop_oneof![
            Just(Content::Tombstone),
            data().prop_map(Content::value),
            (data(), any::<u64>()).prop_map(|(data, expire)| Content::Value {
                data,
                expire: Some(HybridTime::from_bits(expire))
            }),
            (any_count(), prop::collection::vec(any_taken_back(), 0..3))
                .prop_map(|(count, taken_back)| Content::Count { count, taken_back }),
            (any_count(), any::<u64>()).prop_map(|(count, upto)| Content::Reset { count, upto }),
        ]
    }

    fn any_count() -> impl Strategy<Value = Count> {
        (any::<u64>(), any::<i64>()).prop_map(|(since, total)| Count { since, total })
    }

    fn any_taken_back() -> impl Strategy<Value = TakenBack> {
        (any::<u64>(), any::<u64>(), any::<i64>()).prop_map(|(added, at, by)| TakenBack {
            added,
            at,
            by,
        })
    }

    pub(crate) fn any_change() -> impl Strategy<Value = Change> {
        let dot = || (any_actor(), 1u64..99).prop_map(|(actor, seq)| Dot { actor, seq });
        let delta = (
            prop::collection::vec(any::<u8>(), 1..20),
            any::<u64>(),
            any_content(),
            prop::collection::vec(dot(), 0..3),
            prop::collection::vec(dot(), 0..2),
        );
        let deltas = prop::collection::vec(delta, 1..5);
        let ahead_by = prop_oneof![Just(VersionVector::new()), any_vector()];
        let request = prop::option::of(any_requested());
        (any_actor(), 1u64..1 << 40, any_vector(), ahead_by, request, deltas).prop_map(
            |(actor, first_seq, depends_on, ahead_by, request, deltas)| {
                let mut tags = Tags::of(request);
                let delta = |(place, (key, time, content, supersedes, pushed_out))| {
                    let (key, pushed_out): (Vec<u8>, Vec<Dot>) = (key, pushed_out);
                    let key = Bytes::from(key);
                    let dot = Dot { actor, seq: first_seq + place as u64 };
                    let time = HybridTime::from_bits(time);
                    let sibling = Sibling { dot, time, request: tags.next(&key), content };
                    let pushed_out = PushedOut::of(pushed_out, Cause::Deadline);
                    Delta { key, sibling, supersedes, pushed_out }
                };
                let deltas = deltas.into_iter().enumerate().map(delta).collect();
                Change { actor, first_seq, depends_on, ahead_by, request, deltas }
            },
        )
    }

    #[test]
    fn flags_that_nobody_writes_are_refused() {
        // Version 3 without a request, and with a flag of a later version.
        for flags in [0, AHEAD, 4 | REQUESTED] {
            let bytes = Bytes::from(vec![CHANGE_FLAGS_VERSION, flags, 1, 1, 1, 0]);
            let refused = DecodeError::Invalid { what: "change", value: u64::from(flags) };
            assert_eq!(Change::from_bytes(bytes), Err(refused));
        }
    }

    proptest! {
        #[test]
        fn change_reads_back(change in any_change()) {
            prop_assert_eq!(Change::from_bytes(change.to_bytes()), Ok(change));
        }

        #[test]
        fn a_cut_or_noisy_change_is_an_error_and_never_a_panic(change in any_change(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let bytes = change.to_bytes();
            let at = at.index(bytes.len());
            prop_assert!(Change::from_bytes(bytes.slice(..at)).is_err());
            let mut flipped = bytes.to_vec();
            flipped[at] ^= flip;
            let _ = Change::from_bytes(flipped.into());
        }
    }
}
