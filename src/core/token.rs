//! The opaque bytes that clients carry: key contexts, session tokens and page tokens.
//!
//! Each begins with a format byte and ends with a checksum over the rest, seeded with what the
//! token belongs to, so that a damaged, foreign or misplaced token is refused and never believed.
//! They are bounded: by the number of regions, and for session tokens also of shards.
//!
//! A checksum is no signature: a client can make up a token. What it gains is a read that waits
//! until its own deadline.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    id::{NamespaceId, ShardId},
    vector::VersionVector,
};

/// Longest session token, in bytes.
pub const SESSION_TOKEN_BYTES_MAX: usize = 1 << 20;
/// Longest context of a key, in bytes.
pub const CONTEXT_BYTES_MAX: usize = 16 << 10;

const CONTEXT: u8 = 0x11;
const SESSION: u8 = 0x21;
const PAGE: u8 = 0x31;
const CHECKSUM_BYTES: usize = 4;

/// Identifies a cluster inside tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterTag(pub u32);

impl ClusterTag {
    /// The tag of a cluster id.
    pub fn of(cluster_id: &str) -> Self {
        Self(crc32fast::hash(cluster_id.as_bytes()))
    }
}

/// Encodes the causal context of one key.
pub fn encode_context(
    cluster: ClusterTag,
    namespace: NamespaceId,
    key: &[u8],
    context: &VersionVector,
) -> Bytes {
    let mut writer = Writer::default();
    writer.u8(CONTEXT);
    context.encode(&mut writer);
    seal(writer, context_seed(cluster, namespace, key))
}

/// Reads what [`encode_context`] wrote for the same key.
///
/// # Errors
/// If it is damaged, too long, or belongs to another key, namespace or cluster.
pub fn decode_context(
    cluster: ClusterTag,
    namespace: NamespaceId,
    key: &[u8],
    token: &Bytes,
) -> Result<VersionVector, DecodeError> {
    let seed = context_seed(cluster, namespace, key);
    let mut reader = open("context", token, CONTEXT, CONTEXT_BYTES_MAX, seed)?;
    let context = VersionVector::decode(&mut reader)?;
    reader.finish()?;
    Ok(context)
}

/// What a session has seen: for each shard of each namespace, a vector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionToken {
    entries: BTreeMap<(NamespaceId, ShardId), VersionVector>,
}

impl SessionToken {
    /// What was seen of one shard of one namespace.
    pub fn seen(&self, namespace: NamespaceId, shard: ShardId) -> Option<&VersionVector> {
        self.entries.get(&(namespace, shard))
    }

    /// Adds what was seen.
    pub fn observe(&mut self, namespace: NamespaceId, shard: ShardId, seen: &VersionVector) {
        if !seen.is_empty() {
            self.entries.entry((namespace, shard)).or_default().join(seen);
        }
    }

    /// Adds all that `other` has seen.
    pub fn join(&mut self, other: &Self) {
        for (&(namespace, shard), seen) in &other.entries {
            self.observe(namespace, shard, seen);
        }
    }

    /// What was seen, in order of namespaces and shards.
    pub fn iter(&self) -> impl Iterator<Item = (NamespaceId, ShardId, &VersionVector)> {
        self.entries.iter().map(|(&(namespace, shard), seen)| (namespace, shard, seen))
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The token's bytes. Empty if nothing was seen.
    pub fn encode(&self, cluster: ClusterTag) -> Bytes {
        if self.entries.is_empty() {
            return Bytes::new();
        }
        let mut writer = Writer::default();
        writer.u8(SESSION);
        writer.fixed32(cluster.0);
        writer.count(self.entries.len());
        for (&(namespace, shard), seen) in &self.entries {
            writer.varint(u64::from(namespace.0));
            writer.varint(u64::from(shard.0));
            seen.encode(&mut writer);
        }
        seal(writer, 0)
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// If it is damaged, too long, or of another cluster.
    pub fn decode(cluster: ClusterTag, token: &Bytes) -> Result<Self, DecodeError> {
        if token.is_empty() {
            return Ok(Self::default());
        }
        let (found, token) = Self::decode_any(token)?;
        if found != cluster {
            return Err(DecodeError::Invalid {
                what: "session token of another cluster",
                value: u64::from(found.0),
            });
        }
        Ok(token)
    }

    fn decode_any(token: &Bytes) -> Result<(ClusterTag, Self), DecodeError> {
        let mut reader = open("session token", token, SESSION, SESSION_TOKEN_BYTES_MAX, 0)?;
        let cluster = ClusterTag(reader.fixed32()?);
        let count = reader.count(3)?;
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let namespace = NamespaceId(reader.u32()?);
            let shard = ShardId(reader.u16()?);
            let seen = VersionVector::decode(&mut reader)?;
            if entries.insert((namespace, shard), seen).is_some() {
                return Err(reader.invalid(u64::from(shard.0)));
            }
        }
        reader.finish()?;
        Ok((cluster, Self { entries }))
    }
}

/// Joins the tokens of replies that came concurrently in one session.
///
/// # Errors
/// If one is damaged, or they belong to different clusters.
pub fn merge(tokens: &[&[u8]]) -> Result<Bytes, DecodeError> {
    let mut merged: Option<(ClusterTag, SessionToken)> = None;
    for token in tokens.iter().filter(|token| !token.is_empty()) {
        let (cluster, token) = SessionToken::decode_any(&Bytes::copy_from_slice(token))?;
        match &mut merged {
            None => merged = Some((cluster, token)),
            Some((held, joined)) if *held == cluster => joined.join(&token),
            Some(_) => {
                return Err(DecodeError::Invalid {
                    what: "session token of another cluster",
                    value: u64::from(cluster.0),
                });
            }
        }
    }
    Ok(merged.map(|(cluster, token)| token.encode(cluster)).unwrap_or_default())
}

/// Encodes where a scan goes on. `request` is a hash of what was asked for.
pub fn encode_page(request: u32, next: &[u8]) -> Bytes {
    let mut writer = Writer::default();
    writer.u8(PAGE);
    writer.bytes(next);
    seal(writer, request)
}

/// Reads what [`encode_page`] wrote for the same request.
///
/// # Errors
/// If it is damaged or of another request.
pub fn decode_page(request: u32, token: &Bytes) -> Result<Bytes, DecodeError> {
    let mut reader = open("page token", token, PAGE, CONTEXT_BYTES_MAX, request)?;
    let next = reader.bytes()?;
    reader.finish()?;
    Ok(next)
}

fn context_seed(cluster: ClusterTag, namespace: NamespaceId, key: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(cluster.0);
    hasher.update(&namespace.0.to_le_bytes());
    hasher.update(key);
    hasher.finalize()
}

fn seal(mut writer: Writer, seed: u32) -> Bytes {
    let checksum = checksum(seed, writer.as_slice());
    writer.fixed32(checksum);
    writer.finish()
}

fn open(
    what: &'static str,
    token: &Bytes,
    kind: u8,
    limit: usize,
    seed: u32,
) -> Result<Reader, DecodeError> {
    if token.len() > limit {
        return Err(DecodeError::TooLarge {
            what,
            actual: token.len() as u64,
            limit: limit as u64,
        });
    }
    if token.len() < 1 + CHECKSUM_BYTES {
        return Err(DecodeError::Truncated { what });
    }
    if token[0] != kind {
        return Err(DecodeError::Version { what, version: token[0] });
    }
    let body = token.slice(..token.len() - CHECKSUM_BYTES);
    let mut tail = Reader::new(what, token.slice(token.len() - CHECKSUM_BYTES..));
    if tail.fixed32()? != checksum(seed, &body) {
        return Err(DecodeError::Checksum { what });
    }
    Ok(Reader::new(what, body.slice(1..)))
}

fn checksum(seed: u32, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(seed);
    hasher.update(body);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vector::tests::any_vector;

    const CLUSTER: ClusterTag = ClusterTag(0x1234);
    const NS: NamespaceId = NamespaceId(9);

    fn any_session() -> impl Strategy<Value = SessionToken> {
        prop::collection::vec((0u32..3, 0u16..4, any_vector()), 0..6).prop_map(|entries| {
            let mut token = SessionToken::default();
            for (namespace, shard, seen) in entries {
                token.observe(NamespaceId(namespace), ShardId(shard), &seen);
            }
            token
        })
    }

    proptest! {
        #[test]
        fn session_token_reads_back(token in any_session()) {
            let bytes = token.encode(CLUSTER);
            prop_assert_eq!(SessionToken::decode(CLUSTER, &bytes), Ok(token));
        }

        #[test]
        fn merged_token_has_seen_what_each_has_seen(a in any_session(), b in any_session()) {
            let (left, right) = (a.encode(CLUSTER), b.encode(CLUSTER));
            let merged = SessionToken::decode(CLUSTER, &merge(&[&left, &right]).unwrap()).unwrap();
            let mut joined = a;
            joined.join(&b);
            prop_assert_eq!(merged, joined);
        }

        #[test]
        fn context_reads_back_for_its_own_key_only(context in any_vector()) {
            let token = encode_context(CLUSTER, NS, b"key", &context);
            prop_assert_eq!(decode_context(CLUSTER, NS, b"key", &token), Ok(context));
            let misplaced = decode_context(CLUSTER, NS, b"other", &token);
            prop_assert_eq!(misplaced, Err(DecodeError::Checksum { what: "context" }));
        }

        #[test]
        fn a_changed_bit_is_noticed(context in any_vector(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut token = encode_context(CLUSTER, NS, b"key", &context).to_vec();
            let at = at.index(token.len());
            token[at] ^= 1 << bit;
            prop_assert!(decode_context(CLUSTER, NS, b"key", &token.into()).is_err());
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let noise = Bytes::from(noise);
            let _ = SessionToken::decode(CLUSTER, &noise);
            let _ = decode_context(CLUSTER, NS, b"key", &noise);
            let _ = decode_page(1, &noise);
            let _ = merge(&[&noise]);
        }

        #[test]
        fn page_token_reads_back_for_its_own_request_only(next in prop::collection::vec(any::<u8>(), 0..64)) {
            let token = encode_page(7, &next);
            prop_assert_eq!(decode_page(7, &token), Ok(Bytes::from(next)));
            prop_assert!(decode_page(8, &token).is_err());
        }
    }

    #[test]
    fn token_of_another_cluster_is_refused() {
        let mut token = SessionToken::default();
        let seen = [(crate::id::Actor { region: crate::id::RegionId(1), incarnation: 1 }, 3)];
        token.observe(NS, ShardId(0), &seen.into_iter().collect());
        let bytes = token.encode(ClusterTag::of("prod"));
        let error = SessionToken::decode(ClusterTag::of("test"), &bytes).unwrap_err();
        assert!(error.to_string().starts_with("session token of another cluster"));
    }
}
