//! Ledger entries: the durable record of every value that a rule dropped.
//!
//! The id is derived from namespace, key and the loser's dot, so all regions derive the same id
//! for the same loss, and replaying a change writes the same entry again.

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    hlc::HybridTime,
    id::{Dot, NamespaceId},
    record::{Dropped, Sibling},
    vector::{decode_dot, encode_dot},
};

/// Names a lost value; the same in every region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LedgerId(pub [u8; 16]);

/// One value that a rule dropped, kept so that it can be looked at and put back.
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
}

const LEDGER_VERSION: u8 = 1;

impl LedgerEntry {
    /// The entry for what a record dropped.
    pub fn new(key: Bytes, dropped: Dropped) -> Self {
        let Dropped { loser, winner, winner_time } = dropped;
        Self { key, loser, winner, winner_time }
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

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::default();
        writer.u8(LEDGER_VERSION);
        writer.bytes(&self.key);
        encode_dot(self.winner, &mut writer);
        writer.fixed64(self.winner_time.to_bits());
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
        let loser = Sibling::decode(&mut reader)?;
        reader.finish()?;
        Ok(Self { key, loser, winner, winner_time })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::change::tests::any_change;

    proptest! {
        #[test]
        fn entry_reads_back_and_its_id_follows_from_the_dots(change in any_change()) {
            let delta = change.deltas[0].clone();
            let entry = LedgerEntry {
                key: delta.key,
                loser: delta.sibling,
                winner: change.last(),
                winner_time: change.time(),
            };
            let back = LedgerEntry::from_bytes(entry.to_bytes()).unwrap();
            prop_assert_eq!(back.id(NamespaceId(7)), entry.id(NamespaceId(7)));
            prop_assert_ne!(back.id(NamespaceId(7)), entry.id(NamespaceId(8)));
            prop_assert_eq!(back, entry);
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = LedgerEntry::from_bytes(Bytes::from(noise));
        }
    }
}
