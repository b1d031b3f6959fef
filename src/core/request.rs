//! Requests: what makes two writes the same write, wherever a client tried them.
//!
//! A client that hears nothing repeats its request, perhaps in another region. The request's id
//! travels with the change that it became, so that every region that has applied the change answers
//! a repeat from memory and writes nothing ([`crate::command::Remembered`]).
//!
//! Two regions that took one request before either had heard of the other have made two changes, with
//! two dots. Their siblings are *twins*: equal in content, and told apart by their dots only. Dropping
//! one of them from records would not converge, because a third region may have replaced either one
//! without having seen the other. So a record keeps both, and whoever shows it, counts its versions or
//! compares it takes them for one ([`crate::Record::live_at`]).
//!
//! Invariants:
//! * A tag depends on the request and on the place in it, so twins have the same one in all regions.
//! * Two requests that ask for different things have different tags, even if a client gave both one
//!   id by mistake: neither is hidden behind the other.
//!
//! Not here: how long requests are remembered (`tombolo-shard`, `collect`).

use xxhash_rust::xxh3::xxh3_64;

use crate::{
    codec::{DecodeError, Reader, Writer},
    id::RequestId,
};

/// The client's request that a change carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requested {
    /// What the client calls it.
    pub id: RequestId,
    /// A hash of what it asks for ([`crate::command::Write::fingerprint`]).
    pub fingerprint: u64,
}

/// Names one write of one request. Siblings with the same tag are twins.
///
/// Eight bytes instead of the request itself: records carry one with each sibling, as long as that
/// lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestTag(pub u64);

impl Requested {
    /// The tag of the write at `place`, counted from 0, among those of the request.
    pub fn tag(&self, place: usize) -> RequestTag {
        let mut bytes = [0; 32];
        let parts = [self.id.client, self.id.number, self.fingerprint, place as u64];
        for (held, part) in bytes.chunks_exact_mut(8).zip(parts) {
            held.copy_from_slice(&part.to_le_bytes());
        }
        RequestTag(xxh3_64(&bytes))
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.fixed64(self.id.client);
        writer.varint(self.id.number);
        writer.fixed64(self.fingerprint);
    }

    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let id = RequestId { client: reader.fixed64()?, number: reader.varint()? };
        Ok(Self { id, fingerprint: reader.fixed64()? })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    pub(crate) fn any_requested() -> impl Strategy<Value = Requested> {
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(client, number, fingerprint)| {
            Requested { id: RequestId { client, number }, fingerprint }
        })
    }

    /// Tags are stored and compared between regions: no version may compute others.
    #[test]
    fn fixed_vectors() {
        let requested = |client, number, fingerprint| Requested {
            id: RequestId { client, number },
            fingerprint,
        };
        let tags =
            [requested(7, 1, 2).tag(0), requested(7, 1, 2).tag(1), requested(7, 2, 2).tag(0)];
        let found: Vec<String> = tags.iter().map(|tag| format!("{:#018x}", tag.0)).collect();
        assert_eq!(found, ["0x33420feb774d5969", "0xf1f14d9af1eab8bf", "0xec363e7ae8ed0a0d"]);
    }

    proptest! {
        #[test]
        fn every_part_of_a_request_is_in_its_tag(requested in any_requested(), place in 0usize..9) {
            let Requested { id: RequestId { client, number }, fingerprint } = requested;
            let others = [
                Requested { id: RequestId { client: !client, number }, fingerprint },
                Requested { id: RequestId { client, number: !number }, fingerprint },
                Requested { id: RequestId { client, number }, fingerprint: !fingerprint },
            ];
            let mut tags: BTreeSet<RequestTag> = others.iter().map(|it| it.tag(place)).collect();
            tags.extend([requested.tag(place), requested.tag(place + 1)]);
            prop_assert_eq!(tags.len(), 5);
        }
    }
}
