//! Merkle trees on disk: blocks of leaves, and the changes since they were written.
//!
//! Writing a leaf's block with every run would cost kilobytes for each write. So a run appends the
//! leaves that it changed, 10 bytes each, under one key; when enough have gathered, a run writes
//! the blocks that they touched and drops them. Both are in the run's batch, so what is on disk is
//! the tree of the data on disk, and a restart reads it instead of building it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use tombolo_core::{
    NamespaceId, VersionVector,
    codec::{Reader, Writer},
    merkle::{self, Block, FAN_OUT, Tree},
};

use crate::{
    ShardStore, StorageError,
    layout::{self, Keys, Kind, TreeKey},
    shard::Shard,
};

const TREE_VERSION: u8 = 1;
/// Changed leaves that may gather before blocks are written: bounds what a restart replays, and
/// spreads a block's 2 KiB over many changes.
const GATHERED_MAX: usize = 16 << 10;

/// Leaves that changed, each with the XOR of its old and new digests.
pub(crate) type LeafChanges = Vec<(u16, u64)>;

/// What has gathered since the blocks of a tree were written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gathered {
    pub(crate) changes: usize,
    pub(crate) blocks: BTreeSet<u8>,
}

impl Gathered {
    pub(crate) fn add(&mut self, changes: &LeafChanges) {
        self.changes += changes.len();
        self.blocks.extend(changes.iter().map(|(leaf, _)| leaf.to_be_bytes()[0]));
    }

    /// Whether it is time to write the blocks when `changes` come as well.
    pub(crate) fn is_much_with(&self, changes: &LeafChanges) -> bool {
        GATHERED_MAX <= self.changes + changes.len()
    }
}

pub(crate) fn encode_changes(changes: &LeafChanges) -> Bytes {
    let mut writer = Writer::with_capacity(8 + changes.len() * 10);
    writer.u8(TREE_VERSION);
    writer.count(changes.len());
    for &(leaf, change) in changes {
        writer.raw(&leaf.to_be_bytes());
        writer.fixed64(change);
    }
    writer.finish()
}

pub(crate) fn encode_block(block: &Block) -> Bytes {
    let mut writer = Writer::with_capacity(1 + FAN_OUT * 8);
    writer.u8(TREE_VERSION);
    block.iter().for_each(|&leaf| writer.fixed64(leaf));
    writer.finish()
}

/// What a namespace's records amount to at some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// What is applied.
    pub frontier: VersionVector,
    /// The root of the Merkle tree over it.
    pub root: u64,
    /// Whether the data is exactly what the frontier says. It is not while a repair is half done.
    pub is_exact: bool,
}

/// What [`ShardStore::scrub`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Records that were read.
    pub records: u64,
    /// Leaves in which the tree is not what the records amount to.
    pub differing: Vec<u16>,
    /// Leaves in which the hash index names other keys than the records have.
    pub not_indexed: Vec<u16>,
}

impl Shard {
    /// The trees as they are on disk, and what has gathered beside their blocks.
    pub(crate) fn load_trees(
        &self,
    ) -> Result<BTreeMap<NamespaceId, (Tree, Gathered)>, StorageError> {
        let mut keys = Keys::new(self.id);
        let start = keys.kind_start(Kind::Tree).to_vec();
        let end = keys.kind_end(Kind::Tree).to_vec();
        let mut pairs = self.iterate(start, end, false);
        pairs.seek_to_first();
        let mut trees: BTreeMap<NamespaceId, (Tree, Gathered)> = BTreeMap::new();
        while let Some((key, value)) = pairs.item() {
            let place = layout::tree_key(key).ok_or_else(|| StorageError::key(self.id, "tree"))?;
            let damaged = |error| StorageError::value(self.id, "tree", &error);
            let mut reader = Reader::new("tree", Bytes::copy_from_slice(value));
            reader.version(TREE_VERSION).map_err(damaged)?;
            match place {
                TreeKey::Block(namespace, high) => {
                    let mut block = [0; FAN_OUT];
                    for leaf in &mut block {
                        *leaf = reader.fixed64().map_err(damaged)?;
                    }
                    trees.entry(namespace).or_default().0.set_block(high, block);
                }
                TreeKey::Changes(namespace, _) => {
                    let (tree, gathered) = trees.entry(namespace).or_default();
                    let count = reader.count(10).map_err(damaged)?;
                    let mut changes = LeafChanges::with_capacity(count);
                    for _ in 0..count {
                        let leaf = reader.raw(2).map_err(damaged)?;
                        let leaf = u16::from_be_bytes([leaf[0], leaf[1]]);
                        changes.push((leaf, reader.fixed64().map_err(damaged)?));
                    }
                    changes.iter().for_each(|&(leaf, change)| tree.toggle(leaf, change));
                    gathered.add(&changes);
                }
            }
            reader.finish().map_err(damaged)?;
            pairs.next();
        }
        self.check(&pairs)?;
        Ok(trees)
    }
}

impl ShardStore {
    /// Frontier and root of a namespace, of the same moment.
    pub fn summary(&self, namespace: NamespaceId) -> Summary {
        let view = self.inner.view.read();
        Summary {
            frontier: view.frontiers.get(&namespace).cloned().unwrap_or_default(),
            root: view.trees.get(&namespace).map_or(0, Tree::root),
            is_exact: view.is_exact(namespace),
        }
    }

    /// Reads all records of a namespace and compares what they amount to with the tree and the hash
    /// index. Reads the whole namespace from disk: call it where waiting is allowed. Writes go on
    /// meanwhile.
    ///
    /// # Errors
    /// If a record cannot be read, which names the damaged file.
    pub fn scrub(&self, namespace: NamespaceId) -> Result<Scrubbed, StorageError> {
        let shard = &*self.inner;
        let mut keys = Keys::new(shard.id);
        let mut range = |kind| {
            let start = keys.in_namespace(kind, namespace, b"").to_vec();
            (start, keys.namespace_end(kind, namespace).to_vec())
        };
        let (records, index) = (range(Kind::Record), range(Kind::Hash));
        // No run is applied between looking at the data and at the tree.
        let (mut records, mut index, kept) = {
            let _applying = shard.applying.lock();
            let mut records = shard.iterate(records.0, records.1, false);
            let mut index = shard.iterate(index.0, index.1, false);
            records.seek_to_first();
            index.seek_to_first();
            (records, index, shard.view.read().trees.get(&namespace).cloned().unwrap_or_default())
        };
        let mut scrubbed = Scrubbed::default();
        // Of the keys alone, once as the records have them and once as the index has them.
        let (mut built, mut of_records, mut of_index) = <(Tree, Tree, Tree)>::default();
        while let Some((key, value)) = records.item() {
            let key = layout::user_key(key).ok_or_else(|| StorageError::key(shard.id, "record"))?;
            let record = shard.decode_record(value)?;
            built.toggle(merkle::leaf_of(key), merkle::digest(key, &record));
            of_records.toggle(merkle::leaf_of(key), merkle::place_of(key));
            scrubbed.records += 1;
            records.next();
        }
        shard.check(&records)?;
        while let Some(entry) = index.key() {
            let key =
                layout::hashed_key(entry).ok_or_else(|| StorageError::key(shard.id, "hash"))?;
            if entry != keys.hash(namespace, key) {
                return Err(StorageError::key(shard.id, "hash"));
            }
            of_index.toggle(merkle::leaf_of(key), merkle::place_of(key));
            index.next();
        }
        shard.check(&index)?;
        scrubbed.differing = built.differing_leaves(&kept);
        scrubbed.not_indexed = of_records.differing_leaves(&of_index);
        Ok(scrubbed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{LWW, SHARD, delete, dump, fresh, open, put, run_write, write};

    #[test]
    fn the_tree_survives_a_restart_with_and_without_blocks() {
        let (dir, store, shard) = fresh();
        let mut wall = 0;
        let mut write_all = |shard: &ShardStore, from: usize, count: usize| {
            for first in (from..from + count).step_by(100) {
                wall += 1;
                let keys = (first..first + 100).map(|number| put(&format!("k{number}"), "v"));
                run_write(shard, write(wall, keys.collect()));
            }
        };
        write_all(&shard, 0, 300);
        let before = shard.summary(LWW);
        assert_ne!(before.root, 0);
        drop((store, shard));
        let (store, shard) = open(dir.path());
        assert_eq!(shard.summary(LWW), before);

        // Blocks are written on the way, and the changes behind them go.
        write_all(&shard, 0, GATHERED_MAX + 200);
        assert!(shard.inner.load_trees().unwrap()[&LWW].1.changes < 1000);
        let before = shard.summary(LWW);
        dump(&shard);
        drop((store, shard));
        let (_store, shard) = open(dir.path());
        assert_eq!(shard.summary(LWW), before);
        assert_eq!(shard.scrub(LWW).unwrap().differing, Vec::<u16>::new());
    }

    #[test]
    fn a_deletion_takes_its_digest_away_and_scrub_finds_what_was_not_written_by_apply() {
        let (_dir, store, shard) = fresh();
        run_write(&shard, write(1, vec![put("a", "1")]));
        let one = shard.summary(LWW).root;
        run_write(&shard, write(2, vec![put("b", "1")]));
        run_write(&shard, write(3, vec![delete("b")]));
        assert_eq!(shard.summary(LWW).root, one);
        assert_eq!(shard.scrub(LWW).unwrap(), Scrubbed { records: 1, ..Scrubbed::default() });

        let mut keys = Keys::new(SHARD);
        let mut value = store.engine.db.get(keys.record(LWW, b"a")).unwrap().unwrap();
        *value.last_mut().unwrap() ^= 1;
        store
            .engine
            .db
            .put_opt(keys.record(LWW, b"a"), value, &store.engine.write_options)
            .unwrap();
        let found = shard.scrub(LWW).unwrap();
        assert_eq!(found.differing, vec![merkle::leaf_of(b"a")]);
        assert!(found.not_indexed.is_empty());

        store.engine.db.delete_opt(keys.hash(LWW, b"a"), &store.engine.write_options).unwrap();
        assert_eq!(shard.scrub(LWW).unwrap().not_indexed, vec![merkle::leaf_of(b"a")]);
    }
}
