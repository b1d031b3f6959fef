//! Regions as the catalog stores them.
//!
//! The regions of a cluster are those of its nodes' configuration; the catalog says what has become of
//! them since, and which have come. One key a region, in namespace 0, in the catalog's shard. Any
//! region may write them, so that a region can be shut out whose own people cannot be reached. A
//! record is never removed: a number is used once.

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    id::RegionId,
    members::Member,
};

/// Hash tag of every catalog key.
const PREFIX: &str = "{catalog}/region/";
const REGION_VERSION: u8 = 1;

/// What the catalog says of a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionEntry {
    /// Its number.
    pub id: RegionId,
    /// Its name.
    pub name: String,
    /// Link addresses of its nodes, `host:port`.
    pub link_addresses: Vec<String>,
    /// Its present life.
    pub member: Member,
}

impl RegionEntry {
    /// The catalog key of a name.
    pub fn catalog_key(name: &str) -> Bytes {
        Bytes::from([PREFIX, name].concat())
    }

    /// The first catalog key; all regions follow it.
    pub fn first_catalog_key() -> Bytes {
        Bytes::from_static(PREFIX.as_bytes())
    }

    /// The key after the last region's.
    pub fn end_catalog_key() -> Bytes {
        Bytes::from_static(b"{catalog}/region0")
    }

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::default();
        writer.u8(REGION_VERSION);
        writer.varint(u64::from(self.id.0));
        writer.bytes(self.name.as_bytes());
        writer.count(self.link_addresses.len());
        self.link_addresses.iter().for_each(|address| writer.bytes(address.as_bytes()));
        self.member.encode(&mut writer);
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged, or written by a newer version.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("region", bytes);
        reader.version(REGION_VERSION)?;
        let id = RegionId(reader.u16()?);
        let name = text(&mut reader)?;
        let count = reader.count(1)?;
        let link_addresses = (0..count).map(|_| text(&mut reader)).collect::<Result<_, _>>()?;
        let member = Member::decode(&mut reader)?;
        reader.finish()?;
        Ok(Self { id, name, link_addresses, member })
    }
}

fn text(reader: &mut Reader) -> Result<String, DecodeError> {
    let bytes = reader.bytes()?;
    String::from_utf8(bytes.to_vec()).map_err(|_| reader.invalid(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{members::tests::any_member, namespace::NEXT_ID_KEY, placement::shard_of_key};

    proptest! {
        #[test]
        fn region_reads_back(id in any::<u16>(), name in "[a-z][a-z0-9-]{0,20}", links in prop::collection::vec("[a-z0-9.]{1,9}:[0-9]{1,5}", 0..4), member in any_member()) {
            let region = RegionEntry { id: RegionId(id), name, link_addresses: links, member };
            prop_assert_eq!(RegionEntry::from_bytes(region.to_bytes()), Ok(region));
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = RegionEntry::from_bytes(Bytes::from(noise));
        }

        #[test]
        fn regions_lie_in_the_catalogs_shard_and_range(name in "[a-z][a-z0-9-]{0,20}", count in 1u16..1025) {
            let key = RegionEntry::catalog_key(&name);
            prop_assert_eq!(shard_of_key(&key, count), shard_of_key(NEXT_ID_KEY, count));
            prop_assert!(RegionEntry::first_catalog_key() < key && key < RegionEntry::end_catalog_key());
        }
    }
}
