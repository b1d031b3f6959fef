//! Namespaces as the catalog stores them.
//!
//! The catalog is ordinary replicated data in namespace 0: one key a namespace, all in one shard,
//! so that creating one is a commit with a check. Numbers are never reused, names may be.

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    hlc::HybridTime,
    id::NamespaceId,
    record::Rule,
};

/// Hash tag of every catalog key.
const PREFIX: &str = "{catalog}/namespace/";
/// Holds the next number to assign.
pub const NEXT_ID_KEY: &[u8] = b"{catalog}/next-namespace";
/// The name of the namespace that always exists.
pub const DEFAULT_NAME: &str = "default";

const NAMESPACE_VERSION: u8 = 1;
/// The same with the hold at the end; only written where there is one.
const NAMESPACE_HOLD_VERSION: u8 = 2;

/// One named data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its number.
    pub id: NamespaceId,
    /// Its name.
    pub name: String,
    /// How its concurrent values merge.
    pub rule: Rule,
    /// When it was created.
    pub created: HybridTime,
    /// Of the rule `siblings`: how long the values of a key wait for somebody to settle them, in
    /// milliseconds from when the latest of them was written; then that one is taken. `None`: for ever.
    pub hold_ms: Option<u64>,
}

impl Namespace {
    /// The namespace that every cluster has from the start.
    pub fn default_namespace() -> Self {
        Self {
            id: NamespaceId::DEFAULT,
            name: DEFAULT_NAME.to_owned(),
            rule: Rule::Lww,
            created: HybridTime::ZERO,
            hold_ms: None,
        }
    }

    /// The catalog's own namespace.
    pub fn catalog() -> Self {
        Self {
            id: NamespaceId::CATALOG,
            name: "catalog".to_owned(),
            rule: Rule::Lww,
            created: HybridTime::ZERO,
            hold_ms: None,
        }
    }

    /// Until when the values of a key wait, the latest of which was written then.
    pub fn settles_at(&self, latest: HybridTime) -> Option<HybridTime> {
        let ms = latest.physical_ms().saturating_add(self.hold_ms?);
        Some(HybridTime::new(ms, 0).unwrap_or(HybridTime::MAX))
    }

    /// The catalog key of a name.
    pub fn catalog_key(name: &str) -> Bytes {
        Bytes::from([PREFIX, name].concat())
    }

    /// The first catalog key; all namespaces follow it.
    pub fn first_catalog_key() -> Bytes {
        Bytes::from_static(PREFIX.as_bytes())
    }

    /// The key after the last namespace's.
    pub fn end_catalog_key() -> Bytes {
        Bytes::from_static(b"{catalog}/namespace0")
    }

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::default();
        writer.u8(if self.hold_ms.is_some() { NAMESPACE_HOLD_VERSION } else { NAMESPACE_VERSION });
        writer.varint(u64::from(self.id.0));
        writer.bytes(self.name.as_bytes());
        writer.u8(self.rule.to_byte());
        writer.fixed64(self.created.to_bits());
        self.hold_ms.iter().for_each(|&hold_ms| writer.varint(hold_ms));
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged, or written by a newer version.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("namespace", bytes);
        let is_held = match reader.u8()? {
            NAMESPACE_VERSION => false,
            NAMESPACE_HOLD_VERSION => true,
            version => return Err(DecodeError::Version { what: "namespace", version }),
        };
        let id = NamespaceId(reader.u32()?);
        let name = reader.bytes()?;
        let name = String::from_utf8(name.to_vec()).map_err(|_| reader.invalid(0))?;
        let rule = reader.u8()?;
        let rule = Rule::from_byte(rule).ok_or_else(|| reader.invalid(u64::from(rule)))?;
        let created = HybridTime::from_bits(reader.fixed64()?);
        let hold_ms = if is_held { Some(reader.varint()?) } else { None };
        reader.finish()?;
        Ok(Self { id, name, rule, created, hold_ms })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::placement::shard_of_key;

    proptest! {
        #[test]
        fn namespace_reads_back(id in any::<u32>(), name in "[a-z][a-z0-9_-]{0,20}", created in any::<u64>(), hold_ms in any::<Option<u64>>()) {
            let namespace = Namespace {
                id: NamespaceId(id),
                name,
                rule: Rule::Siblings,
                created: HybridTime::from_bits(created),
                hold_ms,
            };
            prop_assert_eq!(Namespace::from_bytes(namespace.to_bytes()), Ok(namespace));
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Namespace::from_bytes(Bytes::from(noise));
        }

        #[test]
        fn all_catalog_keys_share_a_shard(name in "[a-z][a-z0-9_-]{0,20}", count in 1u16..1025) {
            let key = Namespace::catalog_key(&name);
            prop_assert_eq!(shard_of_key(&key, count), shard_of_key(NEXT_ID_KEY, count));
            prop_assert!(Namespace::first_catalog_key() < key && key < Namespace::end_catalog_key());
        }
    }
}
