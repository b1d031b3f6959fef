//! Where everything lies in the one key space of a node.
//!
//! A key is `shard u16 | kind u8 | rest`, all integers big-endian, so that byte order is numeric
//! order, a shard is one contiguous range, and its kinds are contiguous ranges inside:
//!
//! | kind | rest of the key | value |
//! |---|---|---|
//! | 1 meta | field u8, then for fields 3 to 5 namespace u32 | see [`Meta`] |
//! | 2 record | namespace u32, the user's key | `core::Record` |
//! | 3 change | namespace u32, region u16, incarnation u32, first seq u64 | header, `core::Change` |
//! | 4 ledger | namespace u32, id 16 bytes | `core::LedgerEntry` |
//! | 5 dedup | client u64, number u64 | results of the request |
//! | 6 hash | namespace u32, hash of the key u64, the user's key | nothing: the keys of a leaf are a range |
//! | 7 tree | namespace u32, then 0 and a leaf's high byte, or 1 and a log index u64 | see `tree.rs` |
//! | 9 expiry | namespace u32, region u16, time u64, incarnation u32, seq u64, the user's key | nothing: values of a region's writes, by the time at which they expire |
//! | 8 tombstone | namespace u32, the user's key | `core::Record` without a value |
//! | 11 noted | namespace u32, time u64, ledger id 16 bytes | `core::ledger::LedgerHead`: the ledger by the time when it was noted |
//! | 12 open | namespace u32, time u64, the user's key | nothing: keys with several siblings, by the time of the latest |
//! | 10 review | namespace u32, region u16, incarnation u32, seq u64, the user's key | `core::record::Sibling`: a value that was not taken along when the region started over |
//!
//! Keys of the whole store start with `0xffff`, which is no shard. `docs/format.md` describes
//! the values.
//!
//! Invariant: no two shards share a prefix, and nothing of a shard lies outside [`shard_start`]
//! to [`shard_end`].

use tombolo_core::{
    Actor, Dot, HybridTime, NamespaceId, RegionId, RequestId, ShardId,
    ledger::{LedgerId, Noted},
    merkle,
};

/// Bytes before a key's rest.
pub(crate) const PREFIX_BYTES: usize = 3;
/// Bytes before a record's user key.
const RECORD_PREFIX_BYTES: usize = PREFIX_BYTES + 4;
const CHANGE_KEY_BYTES: usize = PREFIX_BYTES + 4 + 2 + 4 + 8;
const DEDUP_KEY_BYTES: usize = PREFIX_BYTES + 16;

/// Holds the format version of the store.
pub(crate) const STORE_FORMAT_KEY: &[u8] = &[0xff, 0xff, 1];
/// Holds the name of the node that the store belongs to.
pub(crate) const STORE_OWNER_KEY: &[u8] = &[0xff, 0xff, 2];

/// What a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Meta = 1,
    Record = 2,
    Change = 3,
    Ledger = 4,
    Dedup = 5,
    /// Keys of records with a value, in the order of the Merkle tree's leaves.
    Hash = 6,
    Tree = 7,
    /// Records without a value, apart from those that scans read.
    Tombstone = 8,
    /// Values that expire, by time.
    Expiry = 9,
    /// Values that only this region had when it started over. No data: people look at them.
    Review = 10,
    /// Heads of the ledger's entries, by the time when they were noted.
    Noted = 11,
    /// Keys with several siblings, by the time of the latest.
    Open = 12,
}

/// Facts about a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meta {
    /// Position of the last applied log entry.
    Applied,
    /// Last applied membership, with its position.
    Membership,
    /// What is applied of a namespace.
    Frontier(NamespaceId),
    /// Up to where the change log of a namespace is gone.
    Trimmed(NamespaceId),
    /// Up to where records of a namespace may be ahead of its frontier.
    Ahead(NamespaceId),
    /// How this region pulls from others.
    Links,
    /// What is known of the regions.
    Members,
}

impl Meta {
    /// Reads the rest of a meta key; `None` for a field that this version does not know.
    pub(crate) fn from_rest(rest: &[u8]) -> Option<Self> {
        let namespace = |rest: &[u8]| Some(NamespaceId(u32::from_be_bytes(rest.try_into().ok()?)));
        match rest {
            [1] => Some(Self::Applied),
            [2] => Some(Self::Membership),
            [6] => Some(Self::Links),
            [7] => Some(Self::Members),
            [3, rest @ ..] => Some(Self::Frontier(namespace(rest)?)),
            [4, rest @ ..] => Some(Self::Trimmed(namespace(rest)?)),
            [5, rest @ ..] => Some(Self::Ahead(namespace(rest)?)),
            _ => None,
        }
    }
}

/// The first key of a shard.
pub(crate) fn shard_start(shard: ShardId) -> Vec<u8> {
    shard.0.to_be_bytes().to_vec()
}

/// The key after the last of a shard.
pub(crate) fn shard_end(shard: ShardId) -> Vec<u8> {
    // Shards are below `SHARDS_MAX`, far from the end of u16.
    shard.0.saturating_add(1).to_be_bytes().to_vec()
}

/// Builds keys of one shard in a buffer that is used again and again.
#[derive(Debug)]
pub(crate) struct Keys {
    shard: [u8; 2],
    buffer: Vec<u8>,
}

impl Keys {
    pub(crate) fn new(shard: ShardId) -> Self {
        Self { shard: shard.0.to_be_bytes(), buffer: Vec::with_capacity(64) }
    }

    pub(crate) fn meta(&mut self, meta: Meta) -> &[u8] {
        self.start(Kind::Meta);
        let (field, namespace) = match meta {
            Meta::Applied => (1, None),
            Meta::Membership => (2, None),
            Meta::Links => (6, None),
            Meta::Members => (7, None),
            Meta::Frontier(namespace) => (3, Some(namespace)),
            Meta::Trimmed(namespace) => (4, Some(namespace)),
            Meta::Ahead(namespace) => (5, Some(namespace)),
        };
        self.buffer.push(field);
        if let Some(namespace) = namespace {
            self.buffer.extend_from_slice(&namespace.0.to_be_bytes());
        }
        &self.buffer
    }

    pub(crate) fn record(&mut self, namespace: NamespaceId, key: &[u8]) -> &[u8] {
        self.in_namespace(Kind::Record, namespace, key)
    }

    pub(crate) fn tombstone(&mut self, namespace: NamespaceId, key: &[u8]) -> &[u8] {
        self.in_namespace(Kind::Tombstone, namespace, key)
    }

    pub(crate) fn ledger(&mut self, namespace: NamespaceId, id: &[u8]) -> &[u8] {
        self.in_namespace(Kind::Ledger, namespace, id)
    }

    /// Names an entry of the ledger by the time when it was noted.
    pub(crate) fn noted(&mut self, namespace: NamespaceId, noted: Noted) -> &[u8] {
        self.in_namespace(Kind::Noted, namespace, &noted.to_bytes())
    }

    /// Where the entries of a namespace's ledger begin that were noted at `at` or later.
    pub(crate) fn noted_start(&mut self, namespace: NamespaceId, at: HybridTime) -> &[u8] {
        self.in_namespace(Kind::Noted, namespace, &at.to_bits().to_be_bytes())
    }

    /// Names a key with several siblings, the latest of which was written at `since`.
    pub(crate) fn open(&mut self, namespace: NamespaceId, since: HybridTime, key: &[u8]) -> &[u8] {
        self.in_namespace(Kind::Open, namespace, &since.to_bits().to_be_bytes());
        self.buffer.extend_from_slice(key);
        &self.buffer
    }

    /// Names `key` in the hash index.
    pub(crate) fn hash(&mut self, namespace: NamespaceId, key: &[u8]) -> &[u8] {
        self.in_namespace(Kind::Hash, namespace, &merkle::place_of(key).to_be_bytes());
        self.buffer.extend_from_slice(key);
        &self.buffer
    }

    /// Where vectors of namespaces begin among the facts about a shard.
    pub(crate) fn vectors_start(&mut self) -> &[u8] {
        self.meta_start(3)
    }

    /// The key after the last of them.
    pub(crate) fn vectors_end(&mut self) -> &[u8] {
        self.meta_start(6)
    }

    fn meta_start(&mut self, field: u8) -> &[u8] {
        self.start(Kind::Meta);
        self.buffer.push(field);
        &self.buffer
    }

    /// Names a value that is kept for review.
    pub(crate) fn review(&mut self, namespace: NamespaceId, key: &[u8], dot: Dot) -> &[u8] {
        self.in_namespace(Kind::Review, namespace, &dot.actor.region.0.to_be_bytes());
        self.buffer.extend_from_slice(&dot.actor.incarnation.to_be_bytes());
        self.buffer.extend_from_slice(&dot.seq.to_be_bytes());
        self.buffer.extend_from_slice(key);
        &self.buffer
    }

    /// Names a value that expires.
    pub(crate) fn expiry(&mut self, namespace: NamespaceId, key: &[u8], value: Expiring) -> &[u8] {
        let Expiring { at, dot } = value;
        self.expiry_start(namespace, dot.actor.region, at);
        self.buffer.extend_from_slice(&dot.actor.incarnation.to_be_bytes());
        self.buffer.extend_from_slice(&dot.seq.to_be_bytes());
        self.buffer.extend_from_slice(key);
        &self.buffer
    }

    /// Where values of a region's writes begin that expire at `at` or later.
    pub(crate) fn expiry_start(
        &mut self,
        namespace: NamespaceId,
        region: RegionId,
        at: HybridTime,
    ) -> &[u8] {
        self.in_namespace(Kind::Expiry, namespace, &region.0.to_be_bytes());
        self.buffer.extend_from_slice(&at.to_bits().to_be_bytes());
        &self.buffer
    }

    /// Where the keys of a leaf begin in the hash index.
    pub(crate) fn leaf_start(&mut self, namespace: NamespaceId, leaf: u16) -> &[u8] {
        self.in_namespace(Kind::Hash, namespace, &leaf.to_be_bytes())
    }

    /// The key after the last of a leaf in the hash index.
    pub(crate) fn leaf_end(&mut self, namespace: NamespaceId, leaf: u16) -> &[u8] {
        match leaf.checked_add(1) {
            Some(next) => self.leaf_start(namespace, next),
            None => self.namespace_end(Kind::Hash, namespace),
        }
    }

    /// The key after the last of a namespace's keys of a kind.
    pub(crate) fn namespace_end(&mut self, kind: Kind, namespace: NamespaceId) -> &[u8] {
        match namespace.0.checked_add(1) {
            Some(next) => self.in_namespace(kind, NamespaceId(next), b""),
            None => self.kind_end(kind),
        }
    }

    pub(crate) fn tree(&mut self, key: TreeKey) -> &[u8] {
        self.start(Kind::Tree);
        match key {
            TreeKey::Block(namespace, high) => {
                self.buffer.extend_from_slice(&namespace.0.to_be_bytes());
                self.buffer.extend_from_slice(&[0, high]);
            }
            TreeKey::Changes(namespace, index) => {
                self.buffer.extend_from_slice(&namespace.0.to_be_bytes());
                self.buffer.push(1);
                self.buffer.extend_from_slice(&index.to_be_bytes());
            }
        }
        &self.buffer
    }

    pub(crate) fn change(&mut self, namespace: NamespaceId, actor: Actor, seq: u64) -> &[u8] {
        self.start(Kind::Change);
        self.buffer.extend_from_slice(&namespace.0.to_be_bytes());
        self.buffer.extend_from_slice(&actor.region.0.to_be_bytes());
        self.buffer.extend_from_slice(&actor.incarnation.to_be_bytes());
        self.buffer.extend_from_slice(&seq.to_be_bytes());
        &self.buffer
    }

    pub(crate) fn dedup(&mut self, request: RequestId) -> &[u8] {
        self.start(Kind::Dedup);
        self.buffer.extend_from_slice(&request.client.to_be_bytes());
        self.buffer.extend_from_slice(&request.number.to_be_bytes());
        &self.buffer
    }

    /// The first key of a kind.
    pub(crate) fn kind_start(&mut self, kind: Kind) -> &[u8] {
        self.start(kind);
        &self.buffer
    }

    /// The key after the last of a kind.
    pub(crate) fn kind_end(&mut self, kind: Kind) -> &[u8] {
        self.start(kind);
        if let Some(last) = self.buffer.last_mut() {
            *last += 1;
        }
        &self.buffer
    }

    pub(crate) fn in_namespace(
        &mut self,
        kind: Kind,
        namespace: NamespaceId,
        rest: &[u8],
    ) -> &[u8] {
        self.start(kind);
        self.buffer.extend_from_slice(&namespace.0.to_be_bytes());
        self.buffer.extend_from_slice(rest);
        &self.buffer
    }

    fn start(&mut self, kind: Kind) {
        self.buffer.clear();
        self.buffer.extend_from_slice(&self.shard);
        self.buffer.push(kind as u8);
    }
}

/// A value that expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expiring {
    pub(crate) at: HybridTime,
    /// The write that created it.
    pub(crate) dot: Dot,
}

/// Since when the key of an open key waits, and which it is.
pub(crate) fn open_key(key: &[u8]) -> Option<(HybridTime, &[u8])> {
    let (since, key) = key.get(RECORD_PREFIX_BYTES..)?.split_first_chunk::<8>()?;
    Some((HybridTime::from_bits(u64::from_be_bytes(*since)), key))
}

/// The namespace of a key in the ledger by time, and where the entry stands.
pub(crate) fn noted(key: &[u8]) -> Option<(NamespaceId, Noted)> {
    Some((key_namespace(key)?, Noted::from_bytes(key.get(RECORD_PREFIX_BYTES..)?)?))
}

/// The user's key of a review key.
pub(crate) fn reviewed_key(key: &[u8]) -> Option<&[u8]> {
    key.get(RECORD_PREFIX_BYTES + 2 + 4 + 8..)
}

const EXPIRY_PREFIX_BYTES: usize = RECORD_PREFIX_BYTES + 2 + 8 + 4 + 8;

/// Reads an expiry key: the value, and the user's key.
pub(crate) fn expiring(key: &[u8]) -> Option<(Expiring, &[u8])> {
    let rest = key.get(RECORD_PREFIX_BYTES..)?;
    let region = RegionId(u16::from_be_bytes(rest.get(..2)?.try_into().ok()?));
    let at = HybridTime::from_bits(u64::from_be_bytes(rest.get(2..10)?.try_into().ok()?));
    let incarnation = u32::from_be_bytes(rest.get(10..14)?.try_into().ok()?);
    let seq = u64::from_be_bytes(rest.get(14..22)?.try_into().ok()?);
    let dot = Dot { actor: Actor { region, incarnation }, seq };
    Some((Expiring { at, dot }, key.get(EXPIRY_PREFIX_BYTES..)?))
}

/// A part of a namespace's Merkle tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TreeKey {
    /// The leaves with this high byte.
    Block(NamespaceId, u8),
    /// The leaves that the run up to this log index changed.
    Changes(NamespaceId, u64),
}

/// Reads a tree key.
pub(crate) fn tree_key(key: &[u8]) -> Option<TreeKey> {
    let namespace = key_namespace(key)?;
    match key.get(RECORD_PREFIX_BYTES..)? {
        [0, high] => Some(TreeKey::Block(namespace, *high)),
        [1, index @ ..] => {
            Some(TreeKey::Changes(namespace, u64::from_be_bytes(index.try_into().ok()?)))
        }
        _ => None,
    }
}

/// The namespace of a record's, tombstone's or tree's key.
pub(crate) fn key_namespace(key: &[u8]) -> Option<NamespaceId> {
    let bytes = key.get(PREFIX_BYTES..RECORD_PREFIX_BYTES)?;
    Some(NamespaceId(u32::from_be_bytes(bytes.try_into().ok()?)))
}

/// The user's key of a record's or tombstone's key.
pub(crate) fn user_key(key: &[u8]) -> Option<&[u8]> {
    key.get(RECORD_PREFIX_BYTES..)
}

/// The user's key of a hash index key.
pub(crate) fn hashed_key(key: &[u8]) -> Option<&[u8]> {
    key.get(RECORD_PREFIX_BYTES + 8..)
}

/// The first sequence number of a change key.
pub(crate) fn change_seq(key: &[u8]) -> Option<u64> {
    if key.len() != CHANGE_KEY_BYTES {
        return None;
    }
    Some(u64::from_be_bytes(key[CHANGE_KEY_BYTES - 8..].try_into().ok()?))
}

/// The namespace and actor of a change key.
#[cfg(test)]
pub(crate) fn change_actor(key: &[u8]) -> Option<(NamespaceId, Actor)> {
    if key.len() != CHANGE_KEY_BYTES {
        return None;
    }
    let namespace = NamespaceId(u32::from_be_bytes(key[3..7].try_into().ok()?));
    let region = RegionId(u16::from_be_bytes(key[7..9].try_into().ok()?));
    let incarnation = u32::from_be_bytes(key[9..13].try_into().ok()?);
    Some((namespace, Actor { region, incarnation }))
}

/// The request of a dedup key.
pub(crate) fn dedup_request(key: &[u8]) -> Option<RequestId> {
    if key.len() != DEDUP_KEY_BYTES {
        return None;
    }
    let client = u64::from_be_bytes(key[3..11].try_into().ok()?);
    let number = u64::from_be_bytes(key[11..].try_into().ok()?);
    Some(RequestId { client, number })
}

/// The ledger id of stored bytes.
pub(crate) fn ledger_id(id: LedgerId) -> [u8; 16] {
    id.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(258);

    #[test]
    fn keys_read_back_and_stay_inside_their_shard() {
        let mut keys = Keys::new(SHARD);
        let actor = Actor { region: RegionId(7), incarnation: 9 };
        let request = RequestId { client: u64::MAX, number: 3 };
        let (start, end) = (shard_start(SHARD), shard_end(SHARD));

        let change = keys.change(NamespaceId(5), actor, 77).to_vec();
        assert_eq!(change_seq(&change), Some(77));
        assert_eq!(change_actor(&change), Some((NamespaceId(5), actor)));
        let dedup = keys.dedup(request).to_vec();
        assert_eq!(dedup_request(&dedup), Some(request));
        let record = keys.record(NamespaceId(u32::MAX), &[0xff; 9]).to_vec();
        assert_eq!(user_key(&record), Some(&[0xff; 9][..]));
        assert!(record < keys.namespace_end(Kind::Record, NamespaceId(u32::MAX)).to_vec());

        let hash = keys.hash(NamespaceId(5), b"k").to_vec();
        assert_eq!(hashed_key(&hash), Some(&b"k"[..]));
        let leaf = merkle::leaf_of(b"k");
        assert!(keys.leaf_start(NamespaceId(5), leaf).to_vec() < hash);
        assert!(hash < keys.leaf_end(NamespaceId(5), leaf).to_vec());
        let last = keys.leaf_end(NamespaceId(5), u16::MAX).to_vec();
        assert_eq!(last, keys.namespace_end(Kind::Hash, NamespaceId(5)));

        let value = Expiring { at: HybridTime::from_bits(77), dot: Dot { actor, seq: 5 } };
        let expiry = keys.expiry(NamespaceId(5), b"k", value).to_vec();
        assert_eq!(expiring(&expiry), Some((value, &b"k"[..])));
        assert!(expiry > keys.expiry_start(NamespaceId(5), actor.region, value.at).to_vec());

        let place = Noted { at: HybridTime::from_bits(7), id: LedgerId([3; 16]) };
        let noted_key = keys.noted(NamespaceId(5), place).to_vec();
        assert_eq!(noted(&noted_key), Some((NamespaceId(5), place)));
        assert!(noted_key > keys.noted_start(NamespaceId(5), place.at).to_vec());
        assert!(noted_key < keys.noted_start(NamespaceId(5), place.at.next()).to_vec());

        let open = keys.open(NamespaceId(5), value.at, b"k").to_vec();
        assert_eq!(open_key(&open), Some((value.at, &b"k"[..])));
        assert!(open < keys.open(NamespaceId(5), value.at.next(), b"").to_vec());

        for key in [change, dedup, record, hash, expiry, noted_key, open] {
            assert!(start < key && key < end);
        }
    }

    #[test]
    fn meta_keys_read_back() {
        let mut keys = Keys::new(SHARD);
        let namespace = NamespaceId(1 << 20);
        let all = [
            Meta::Applied,
            Meta::Membership,
            Meta::Frontier(namespace),
            Meta::Trimmed(namespace),
            Meta::Ahead(namespace),
            Meta::Links,
        ];
        for meta in all {
            assert_eq!(Meta::from_rest(&keys.meta(meta)[PREFIX_BYTES..]), Some(meta));
        }
        assert_eq!(Meta::from_rest(&[9]), None);
        assert_eq!(Meta::from_rest(&[3, 0]), None);
    }

    #[test]
    fn byte_order_is_numeric_order() {
        let mut keys = Keys::new(SHARD);
        let actor = Actor { region: RegionId(1), incarnation: 1 };
        let low = keys.change(NamespaceId(1), actor, 255).to_vec();
        let high = keys.change(NamespaceId(1), actor, 256).to_vec();
        assert!(low < high);
        assert!(shard_end(ShardId(255)) == shard_start(ShardId(256)));
    }
}
