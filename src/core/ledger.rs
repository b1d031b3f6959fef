//! The ledger: the durable record of every value that was dropped, by a rule, by the bound on siblings,
//! or because nobody settled a key in time.
//!
//! The id is derived from namespace, key and the loser's dot, so all regions derive the same id
//! for the same loss, and replaying a change writes the same entry again.
//!
//! An entry is kept for a time that counts from when a region *noted* the loss, by the clock of that
//! region's leader, and not from when the values were written: of a conflict that comes to light after
//! weeks without a link somebody must still hear. Regions note a conflict as soon as they hear of it, so
//! they forget it about as far apart as they are behind each other. A repair carries the time along:
//! passing an entry on does not renew it.
//!
//! Invariants:
//! * An entry that is there stays as it is, whoever brings it again: the first loss is the one that
//!   people were told of.
//! * What is noted later comes later in the order of [`Noted`]; pages and forgetting go by it.
//!
//! Not here: when to forget (`tombolo-shard`), where entries lie (`tombolo-storage`).

use std::{fmt, str::FromStr};

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    hlc::HybridTime,
    id::{Dot, NamespaceId},
    record::{Content, Dropped, Sibling},
    vector::{decode_dot, encode_dot},
};

/// Names a lost value; the same in every region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LedgerId(pub [u8; 16]);

impl fmt::Display for LedgerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The text is not 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a conflict's id is 32 hexadecimal digits")]
pub struct LedgerIdError;

impl FromStr for LedgerId {
    type Err = LedgerIdError;

    /// Reads what `Display` wrote.
    fn from_str(text: &str) -> Result<Self, LedgerIdError> {
        let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if text.len() != 32 || !is_hex {
            return Err(LedgerIdError);
        }
        let bits = u128::from_str_radix(text, 16).map_err(|_| LedgerIdError)?;
        Ok(Self(bits.to_be_bytes()))
    }
}

/// Where an entry stands in the ledger: by the time when it was noted, then by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Noted {
    /// When.
    pub at: HybridTime,
    /// Which.
    pub id: LedgerId,
}

impl Noted {
    /// Bytes of the encoding.
    pub const BYTES: usize = 24;

    /// The encoding; byte order is the order of places.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.at.to_bits().to_be_bytes());
        bytes[8..].copy_from_slice(&self.id.0);
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (at, id) = bytes.split_first_chunk::<8>()?;
        let at = HybridTime::from_bits(u64::from_be_bytes(*at));
        Some(Self { at, id: LedgerId(id.try_into().ok()?) })
    }
}

/// Why a value was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The namespace's rule keeps one of several concurrent values.
    Rule,
    /// The key had more siblings than a record may have; the oldest went.
    Bound,
    /// Nobody settled the key in time, and the latest sibling that could be read was taken.
    Deadline,
}

impl Cause {
    pub(crate) const fn to_byte(self) -> u8 {
        match self {
            Self::Rule => 0,
            Self::Bound => 1,
            Self::Deadline => 2,
        }
    }

    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        match reader.u8()? {
            0 => Ok(Self::Rule),
            1 => Ok(Self::Bound),
            2 => Ok(Self::Deadline),
            byte => Err(reader.invalid(u64::from(byte))),
        }
    }
}

/// One value that was dropped, kept so that it can be looked at and put back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerEntry {
    /// The key.
    pub key: Bytes,
    /// What was dropped, with its value.
    pub loser: Sibling,
    /// The write that it lost to.
    pub winner: Dot,
    /// When the winner was written.
    pub winner_time: HybridTime,
    /// Why.
    pub cause: Cause,
    /// When the region noted it, by its leader's clock; retention counts from here.
    pub noted: HybridTime,
}

const LEDGER_VERSION: u8 = 2;

impl LedgerEntry {
    /// The entry for what a record dropped, noted at that time.
    pub fn new(key: Bytes, dropped: Dropped, noted: HybridTime) -> Self {
        let Dropped { loser, winner, winner_time, cause } = dropped;
        Self { key, loser, winner, winner_time, cause, noted }
    }

    /// The entry's id in its namespace.
    pub fn id(&self, namespace: NamespaceId) -> LedgerId {
        let mut writer = Writer::with_capacity(32 + self.key.len());
        writer.fixed32(namespace.0);
        writer.bytes(&self.key);
        encode_dot(self.loser.dot, &mut writer);
        let hash = blake3::hash(writer.as_slice());
        let mut id = [0; 16];
        id.copy_from_slice(&hash.as_bytes()[..16]);
        LedgerId(id)
    }

    /// Where the entry stands in its namespace.
    pub fn place(&self, namespace: NamespaceId) -> Noted {
        Noted { at: self.noted, id: self.id(namespace) }
    }

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::default();
        writer.u8(LEDGER_VERSION);
        writer.bytes(&self.key);
        encode_dot(self.winner, &mut writer);
        writer.fixed64(self.winner_time.to_bits());
        writer.u8(self.cause.to_byte());
        writer.fixed64(self.noted.to_bits());
        self.loser.encode(&mut writer);
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("ledger entry", bytes);
        reader.version(LEDGER_VERSION)?;
        let key = reader.bytes()?;
        let winner = decode_dot(&mut reader)?;
        let winner_time = HybridTime::from_bits(reader.fixed64()?);
        let cause = Cause::decode(&mut reader)?;
        let noted = HybridTime::from_bits(reader.fixed64()?);
        let loser = Sibling::decode(&mut reader)?;
        reader.finish()?;
        Ok(Self { key, loser, winner, winner_time, cause, noted })
    }
}

/// An entry without its value: what listing, counting and bounding need. Lies beside the entry, in the
/// order of [`Noted`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerHead {
    /// The key.
    pub key: Bytes,
    /// The write that was dropped.
    pub loser: Dot,
    /// When it was written.
    pub loser_time: HybridTime,
    /// Whether it was a deletion.
    pub is_delete: bool,
    /// The write that it lost to.
    pub winner: Dot,
    /// When the winner was written.
    pub winner_time: HybridTime,
    /// Why.
    pub cause: Cause,
    /// What the entry takes: the length of its encoding.
    pub bytes: u64,
}

const HEAD_VERSION: u8 = 1;

impl LedgerHead {
    /// The head of an entry whose encoding has so many bytes.
    pub fn new(entry: &LedgerEntry, bytes: u64) -> Self {
        Self {
            key: entry.key.clone(),
            loser: entry.loser.dot,
            loser_time: entry.loser.time,
            is_delete: entry.loser.content == Content::Tombstone,
            winner: entry.winner,
            winner_time: entry.winner_time,
            cause: entry.cause,
            bytes,
        }
    }

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::with_capacity(64 + self.key.len());
        writer.u8(HEAD_VERSION);
        writer.bytes(&self.key);
        encode_dot(self.loser, &mut writer);
        writer.fixed64(self.loser_time.to_bits());
        writer.u8(u8::from(self.is_delete));
        encode_dot(self.winner, &mut writer);
        writer.fixed64(self.winner_time.to_bits());
        writer.u8(self.cause.to_byte());
        writer.varint(self.bytes);
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("head of a ledger entry", bytes);
        reader.version(HEAD_VERSION)?;
        let key = reader.bytes()?;
        let loser = decode_dot(&mut reader)?;
        let loser_time = HybridTime::from_bits(reader.fixed64()?);
        let is_delete = match reader.u8()? {
            0 => false,
            1 => true,
            byte => return Err(reader.invalid(u64::from(byte))),
        };
        let winner = decode_dot(&mut reader)?;
        let winner_time = HybridTime::from_bits(reader.fixed64()?);
        let cause = Cause::decode(&mut reader)?;
        let bytes = reader.varint()?;
        reader.finish()?;
        Ok(Self { key, loser, loser_time, is_delete, winner, winner_time, cause, bytes })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::change::tests::any_change;

    pub(crate) fn any_entry() -> impl Strategy<Value = LedgerEntry> {
        let cause = prop_oneof![Just(Cause::Rule), Just(Cause::Bound), Just(Cause::Deadline)];
        (any_change(), cause, any::<u64>()).prop_map(|(change, cause, noted)| LedgerEntry {
            winner: change.last(),
            winner_time: change.time(),
            key: change.deltas[0].key.clone(),
            loser: change.deltas[0].sibling.clone(),
            cause,
            noted: HybridTime::from_bits(noted),
        })
    }

    proptest! {
        #[test]
        fn entry_reads_back_and_its_id_follows_from_the_dots(entry in any_entry(), noted: u64) {
            let back = LedgerEntry::from_bytes(entry.to_bytes()).unwrap();
            prop_assert_eq!(back.id(NamespaceId(7)), entry.id(NamespaceId(7)));
            prop_assert_ne!(back.id(NamespaceId(7)), entry.id(NamespaceId(8)));
            let elsewhere = LedgerEntry { noted: HybridTime::from_bits(noted), ..entry.clone() };
            prop_assert_eq!(back.id(NamespaceId(7)), elsewhere.id(NamespaceId(7)));
            prop_assert_eq!(back, entry);
        }

        #[test]
        fn head_reads_back(entry in any_entry(), bytes: u64) {
            let head = LedgerHead::new(&entry, bytes);
            prop_assert_eq!(LedgerHead::from_bytes(head.to_bytes()), Ok(head));
        }

        #[test]
        fn a_cut_entry_or_head_is_an_error(entry in any_entry(), at in any::<prop::sample::Index>()) {
            let bytes = entry.to_bytes();
            prop_assert!(LedgerEntry::from_bytes(bytes.slice(..at.index(bytes.len()))).is_err());
            let bytes = LedgerHead::new(&entry, 7).to_bytes();
            prop_assert!(LedgerHead::from_bytes(bytes.slice(..at.index(bytes.len()))).is_err());
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = LedgerHead::from_bytes(Bytes::from(noise.clone()));
            let _ = Noted::from_bytes(&noise);
            let _ = LedgerEntry::from_bytes(Bytes::from(noise));
        }

        #[test]
        fn an_id_reads_back_from_its_text_and_nothing_else_does(id: [u8; 16], noise in ".{0,40}") {
            let id = LedgerId(id);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            let is_id = noise.len() == 32 && noise.bytes().all(|byte| byte.is_ascii_hexdigit());
            prop_assert_eq!(noise.parse::<LedgerId>().is_ok(), is_id);
        }

        #[test]
        fn places_read_back_and_byte_order_is_their_order(places in any::<[(u64, [u8; 16]); 2]>()) {
            let [left, right] =
                places.map(|(at, id)| Noted { at: HybridTime::from_bits(at), id: LedgerId(id) });
            prop_assert_eq!(Noted::from_bytes(&left.to_bytes()), Some(left));
            prop_assert_eq!(left.to_bytes().cmp(&right.to_bytes()), left.cmp(&right));
        }
    }
}
