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
//! * A tag depends on the request and on the key, and of several writes of a key on their order. So twins
//!   have the same one in all regions, whatever else of the request was so already in one of them.
//! * Two requests that ask for different things have different tags, even if a client gave both one
//!   id by mistake: neither is hidden behind the other.
//!
//! Not here: how long requests are remembered (`tombolo-shard`, `collect`).

use std::collections::BTreeMap;

use bytes::Bytes;
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
    /// The tag of the request's write of `key`; of several the one at `place`, counted from 0.
    fn tag(&self, key: &[u8], place: u64) -> RequestTag {
        let mut bytes = Vec::with_capacity(32 + key.len());
        for part in [self.id.client, self.id.number, self.fingerprint, place] {
            bytes.extend(part.to_le_bytes());
        }
        bytes.extend(key);
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

/// Gives the writes of a change their tags, in order.
#[derive(Debug, Default)]
pub(crate) struct Tags {
    request: Option<Requested>,
    /// How often each key was written.
    written: BTreeMap<Bytes, u64>,
}

impl Tags {
    /// The tags of this request; none if there is none.
    pub(crate) fn of(request: Option<Requested>) -> Self {
        Self { request, written: BTreeMap::new() }
    }

    /// The request.
    pub(crate) fn request(&self) -> Option<Requested> {
        self.request
    }

    /// The tag of the next write, which is of `key`.
    pub(crate) fn next(&mut self, key: &Bytes) -> Option<RequestTag> {
        let request = self.request?;
        let written = self.written.entry(key.clone()).or_default();
        *written += 1;
        Some(request.tag(key, *written - 1))
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
        let tags = [
            requested(7, 1, 2).tag(b"a", 0),
            requested(7, 1, 2).tag(b"a", 1),
            requested(7, 1, 2).tag(b"b", 0),
        ];
        let found: Vec<String> = tags.iter().map(|tag| format!("{:#018x}", tag.0)).collect();
        assert_eq!(found, ["0x627b23cde2b8a04a", "0xb1b17c1320d16eab", "0x2ad81cb426b16458"]);
    }

    proptest! {
        #[test]
        fn every_part_of_a_request_is_in_its_tag(requested in any_requested(), place in 0u64..9) {
            let Requested { id: RequestId { client, number }, fingerprint } = requested;
            let others = [
                Requested { id: RequestId { client: !client, number }, fingerprint },
                Requested { id: RequestId { client, number: !number }, fingerprint },
                Requested { id: RequestId { client, number }, fingerprint: !fingerprint },
            ];
            let of = |it: &Requested| it.tag(b"k", place);
            let mut tags: BTreeSet<RequestTag> = others.iter().map(of).collect();
            let more = [requested.tag(b"k", place), requested.tag(b"k", place + 1)];
            tags.extend(more.into_iter().chain([requested.tag(b"j", place)]));
            prop_assert_eq!(tags.len(), 6);
        }
    }
}
