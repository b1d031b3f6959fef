//! A namespace of a shard as of one moment: what a repair compares and reads.
//!
//! Data, frontier and Merkle tree are of the same applied run, and stay so however long the cut
//! lives. It pins old versions of the whole store, so it must not be kept when nobody reads it.

use bytes::Bytes;
use rocksdb::{DBRawIterator, ReadOptions, Snapshot};
use tombolo_core::{
    NamespaceId, Record, VersionVector,
    ledger::LedgerEntry,
    members::Members,
    merkle::{self, Tree},
};

use crate::{
    ShardStore, StorageError,
    layout::{self, Keys, Kind},
    shard::Shard,
};

/// A pinned state of one namespace. Dropping it releases the pin.
pub struct Cut<'a> {
    shard: &'a Shard,
    snapshot: Snapshot<'a>,
    namespace: NamespaceId,
    frontier: VersionVector,
    ahead: VersionVector,
    members: Members,
    tree: Tree,
}

impl ShardStore {
    /// Pins a namespace as it is now.
    pub fn cut(&self, namespace: NamespaceId) -> Cut<'_> {
        let shard = &*self.inner;
        // No run is applied between looking at the data and at the tree.
        let _applying = shard.applying.lock();
        let snapshot = shard.engine.db.snapshot();
        let view = shard.view.read();
        Cut {
            shard,
            snapshot,
            namespace,
            frontier: view.frontiers.get(&namespace).cloned().unwrap_or_default(),
            ahead: view.ahead.get(&namespace).cloned().unwrap_or_default(),
            members: view.members.clone(),
            tree: view.trees.get(&namespace).cloned().unwrap_or_default(),
        }
    }
}

impl Cut<'_> {
    /// What was applied.
    pub fn frontier(&self) -> &VersionVector {
        &self.frontier
    }

    /// Up to where records may be ahead of the frontier.
    pub fn ahead(&self) -> &VersionVector {
        &self.ahead
    }

    /// What the shard knew of the regions.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// The Merkle tree over the records.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Keys and records with a value in a leaf of the tree.
    ///
    /// # Errors
    /// If they cannot be read, or are not what the tree says: concluding from an incomplete list
    /// that the rest was deleted would spread damage.
    pub fn leaf(&self, leaf: u16) -> Result<Vec<(Bytes, Record)>, StorageError> {
        let shard = self.shard;
        let (mut keys, mut index_keys) = (Keys::new(shard.id), Keys::new(shard.id));
        let start = index_keys.leaf_start(self.namespace, leaf).to_vec();
        let end = index_keys.leaf_end(self.namespace, leaf).to_vec();
        let mut pairs = self.iterate(start, end);
        pairs.seek_to_first();
        let mut found = Vec::new();
        while let Some(entry) = pairs.key() {
            let key =
                layout::hashed_key(entry).ok_or_else(|| StorageError::key(shard.id, "hash"))?;
            let value = self.snapshot.get_pinned(keys.record(self.namespace, key));
            let value = value.map_err(|error| shard.engine_error(&error))?;
            if let Some(value) = value {
                found.push((Bytes::copy_from_slice(key), shard.decode_record(&value)?));
            }
            pairs.next();
        }
        shard.check(&pairs)?;
        let digests = found.iter().map(|(key, record)| merkle::digest(key, record));
        if digests.fold(0, |sum, digest| sum ^ digest) != self.tree.leaf(leaf) {
            return Err(StorageError::Corrupt {
                shard: Some(shard.id),
                place: format!("leaf {leaf} of the Merkle tree of namespace {}", self.namespace),
                detail: "the records that the hash index names are not those of the tree"
                    .to_owned(),
            });
        }
        Ok(found)
    }

    /// Calls `take` with every record, in order of the keys, until it answers `false`.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn records(&self, take: impl FnMut(Bytes, Record) -> bool) -> Result<(), StorageError> {
        self.each(Kind::Record, take)
    }

    /// Calls `take` with every tombstone, in order of the keys, until it answers `false`.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn tombstones(&self, take: impl FnMut(Bytes, Record) -> bool) -> Result<(), StorageError> {
        self.each(Kind::Tombstone, take)
    }

    /// Calls `take` with every entry of the ledger, until it answers `false`.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn ledger(&self, mut take: impl FnMut(LedgerEntry) -> bool) -> Result<(), StorageError> {
        let shard = self.shard;
        let mut pairs = self.iterate_kind(Kind::Ledger);
        while let Some(value) = pairs.value() {
            if !take(shard.decode_ledger(value)?) {
                return Ok(());
            }
            pairs.next();
        }
        shard.check(&pairs)
    }

    fn each(
        &self,
        kind: Kind,
        mut take: impl FnMut(Bytes, Record) -> bool,
    ) -> Result<(), StorageError> {
        let shard = self.shard;
        let mut pairs = self.iterate_kind(kind);
        while let Some((key, value)) = pairs.item() {
            let key = layout::user_key(key).ok_or_else(|| StorageError::key(shard.id, "record"))?;
            if !take(Bytes::copy_from_slice(key), shard.decode_record(value)?) {
                return Ok(());
            }
            pairs.next();
        }
        shard.check(&pairs)
    }

    fn iterate_kind(&self, kind: Kind) -> DBRawIterator<'_> {
        let mut keys = Keys::new(self.shard.id);
        let start = keys.in_namespace(kind, self.namespace, b"").to_vec();
        let end = keys.namespace_end(kind, self.namespace).to_vec();
        let mut pairs = self.iterate(start, end);
        pairs.seek_to_first();
        pairs
    }

    fn iterate(&self, start: Vec<u8>, end: Vec<u8>) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(start);
        options.set_iterate_upper_bound(end);
        options.fill_cache(false);
        self.snapshot.raw_iterator_opt(options)
    }
}

#[cfg(test)]
mod tests;
