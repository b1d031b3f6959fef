//! Merkle trees: whether two regions hold the same, told by one number.
//!
//! A tree has three levels with a fan-out of 256: a leaf for each of the top 16 bits of a key's
//! hash, 256 nodes above them, a root. A node is the exclusive or of the digests under it, so a
//! write costs two XORs for each level and no read of other keys, and the order of writes does
//! not matter.
//!
//! Invariants:
//! * A digest depends on what readers can see: the key, the live siblings' dots and contents.
//!   Contexts, tombstones and local numbers are not in it: collecting garbage makes no difference.
//!   Nor are the tags of requests: they follow from the dots. Twins are in it both, as in the record.
//! * A tree depends on the set of records only, not on how it came about.
//!
//! Source: Merkle (1987); the XOR form as in Riak's and Dynamo's anti-entropy trees, which keep
//! hashes of hashes instead and must rebuild them.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{
    codec::Writer,
    record::{Content, Record},
};

/// Children of a node.
pub const FAN_OUT: usize = 256;

/// The digest of a record; 0 if it has no value, and only then.
pub fn digest(key: &[u8], record: &Record) -> u64 {
    if record.is_dead() {
        return 0;
    }
    let mut hash = Xxh3::new();
    hash.update(&(key.len() as u64).to_le_bytes());
    hash.update(key);
    for sibling in record.siblings() {
        // A tombstone makes no difference to what is there. A reset does, to the count beside it.
        if sibling.content == Content::Tombstone {
            continue;
        }
        let dot = sibling.dot;
        hash.update(&dot.actor.region.0.to_le_bytes());
        hash.update(&dot.actor.incarnation.to_le_bytes());
        hash.update(&dot.seq.to_le_bytes());
        let mut content = Writer::default();
        sibling.content.encode(&mut content);
        hash.update(&xxh3_64(&content.finish()).to_le_bytes());
    }
    hash.digest().max(1)
}

/// Where a key stands among all keys of its tree: its leaf in the top 16 bits.
pub fn place_of(key: &[u8]) -> u64 {
    xxh3_64(key)
}

/// The leaf of a key.
pub fn leaf_of(key: &[u8]) -> u16 {
    let [high, low, ..] = place_of(key).to_be_bytes();
    u16::from_be_bytes([high, low])
}

/// The leaves under one node of the middle level.
pub type Block = [u64; FAN_OUT];

/// A tree over the records of one namespace in one shard. At most 0.5 MiB; empty blocks take none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    root: u64,
    /// By the leaf's high byte. A block that has become all zeros is left out.
    blocks: BTreeMap<u8, Box<Block>>,
}

impl Tree {
    /// The root; 0 for a namespace without values (or, with probability 2^-64, with some).
    pub fn root(&self) -> u64 {
        self.root
    }

    /// The middle level.
    pub fn nodes(&self) -> Block {
        let mut nodes = [0; FAN_OUT];
        for (&high, block) in &self.blocks {
            nodes[usize::from(high)] = block.iter().fold(0, |node, leaf| node ^ leaf);
        }
        nodes
    }

    /// One leaf.
    pub fn leaf(&self, leaf: u16) -> u64 {
        let [high, low] = leaf.to_be_bytes();
        self.block(high).map_or(0, |block| block[usize::from(low)])
    }

    /// The leaves under a node; `None` if all are 0.
    pub fn block(&self, high: u8) -> Option<&Block> {
        self.blocks.get(&high).map(Box::as_ref)
    }

    /// Replaces the leaves under a node.
    pub fn set_block(&mut self, high: u8, block: Block) {
        let fold = |block: &Block| block.iter().fold(0, |node, leaf| node ^ leaf);
        let before = self.blocks.get(&high).map_or(0, |block| fold(block));
        self.root ^= before ^ fold(&block);
        if block.iter().all(|&leaf| leaf == 0) {
            self.blocks.remove(&high);
        } else {
            self.blocks.insert(high, Box::new(block));
        }
    }

    /// Changes a leaf: `change` is the old digest XOR the new one.
    pub fn toggle(&mut self, leaf: u16, change: u64) {
        let [high, low] = leaf.to_be_bytes();
        let block = self.blocks.entry(high).or_insert_with(|| Box::new([0; FAN_OUT]));
        block[usize::from(low)] ^= change;
        self.root ^= change;
        if block[usize::from(low)] == 0 && block.iter().all(|&leaf| leaf == 0) {
            self.blocks.remove(&high);
        }
    }

    /// The leaves in which two trees differ, in order.
    pub fn differing_leaves(&self, other: &Self) -> Vec<u16> {
        const NONE: Block = [0; FAN_OUT];
        let mut differing = Vec::new();
        for high in 0..=u8::MAX {
            let (mine, theirs) = (self.block(high), other.block(high));
            if mine == theirs {
                continue;
            }
            let (mine, theirs) = (mine.unwrap_or(&NONE), theirs.unwrap_or(&NONE));
            for low in
                (0..=u8::MAX).filter(|&low| mine[usize::from(low)] != theirs[usize::from(low)])
            {
                differing.push(u16::from_be_bytes([high, low]));
            }
        }
        differing
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        hlc::HybridTime,
        id::{Actor, Dot, RegionId},
        record::{Delta, Rule, Sibling},
        vector::VersionVector,
    };

    fn record(region: u16, seq: u64, content: Content) -> Record {
        let dot = Dot { actor: Actor { region: RegionId(region), incarnation: 1 }, seq };
        let sibling = Sibling { dot, time: HybridTime::ZERO, request: None, content };
        let delta = Delta {
            key: Bytes::new(),
            sibling,
            supersedes: Vec::new(),
            pushed_out: crate::record::PushedOut::default(),
        };
        let mut record = Record::default();
        record.apply(&delta, &VersionVector::new(), Rule::Siblings);
        record
    }

    /// Computed by another implementation of XXH3: other versions and languages must agree.
    #[test]
    fn fixed_vectors() {
        let value = |data: &'static str| record(1, 7, Content::value(data));
        let vectors: [(&str, Record, u64); 4] = [
            ("k", value("v"), 0x47a8_13f5_5fff_a064),
            ("", value("v"), 0x7ffc_6a2a_38a0_15f6),
            ("k", value(""), 0x90c4_2c49_6e37_cc9c),
            ("k", record(2, 7, Content::value("v")), 0x0cd6_ce13_3ce2_a7fa),
        ];
        let found: Vec<String> = vectors
            .iter()
            .map(|(key, record, _)| format!("{:#018x}", digest(key.as_bytes(), record)))
            .collect();
        let expected: Vec<String> =
            vectors.iter().map(|(_, _, digest)| format!("{digest:#018x}")).collect();
        assert_eq!(found, expected);
        assert_eq!((leaf_of(b"k"), leaf_of(b"key-1")), (43297, 11561));
    }

    #[test]
    fn a_digest_sees_key_dot_and_value_and_nothing_else() {
        let base = digest(b"k", &record(1, 7, Content::value("v")));
        assert_ne!(base, digest(b"l", &record(1, 7, Content::value("v"))));
        assert_ne!(base, digest(b"k", &record(2, 7, Content::value("v"))));
        assert_ne!(base, digest(b"k", &record(1, 8, Content::value("v"))));
        assert_ne!(base, digest(b"k", &record(1, 7, Content::value("w"))));
        let expire = HybridTime::new(5, 0);
        assert_ne!(base, digest(b"k", &record(1, 7, Content::Value { data: "v".into(), expire })));
        assert_eq!(digest(b"k", &record(1, 7, Content::Tombstone)), 0);
        assert_eq!(digest(b"k", &Record::default()), 0);
    }

    proptest! {
        #[test]
        fn a_tree_depends_on_what_is_in_it_and_not_on_the_order(
            changes in prop::collection::vec((0u16..600, 1u64..9), 0..60),
        ) {
            let (mut forward, mut backward) = (Tree::default(), Tree::default());
            for &(leaf, change) in &changes {
                forward.toggle(leaf * 109, change);
            }
            for &(leaf, change) in changes.iter().rev() {
                backward.toggle(leaf * 109, change);
            }
            prop_assert_eq!(&forward, &backward);
            prop_assert_eq!(forward.nodes().iter().fold(0, |root, node| root ^ node), forward.root());
            let mut copied = Tree::default();
            for high in 0..=u8::MAX {
                if let Some(block) = forward.block(high) {
                    copied.set_block(high, *block);
                }
            }
            prop_assert_eq!(&copied, &forward);
            for &(leaf, change) in &changes {
                backward.toggle(leaf * 109, change);
            }
            prop_assert_eq!(&backward, &Tree::default());
        }

        #[test]
        fn differing_leaves_are_found_exactly(
            same in prop::collection::btree_map(any::<u16>(), 1u64.., 0..30),
            other in prop::collection::btree_map(any::<u16>(), 1u64.., 0..10),
        ) {
            let (mut left, mut right) = (Tree::default(), Tree::default());
            for (&leaf, &digest) in &same {
                left.toggle(leaf, digest);
                right.toggle(leaf, digest);
            }
            for (&leaf, &digest) in &other {
                right.toggle(leaf, digest);
            }
            let expected: Vec<u16> = other.into_keys().collect();
            prop_assert_eq!(left.differing_leaves(&right), expected.clone());
            prop_assert_eq!(right.differing_leaves(&left), expected);
        }
    }
}
