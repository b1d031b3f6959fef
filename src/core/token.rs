//! The opaque bytes that clients carry: key contexts, session tokens, page tokens and resume tokens.
//!
//! Each begins with a format byte and ends with a seal: a keyed MAC (BLAKE3, cut to eight bytes) over
//! the rest and over what the token belongs to. So a damaged, foreign, misplaced or made-up token is
//! refused and never believed. All nodes of all regions seal with the same [`TokenKey`]; one more key
//! may be accepted, so that the key can be changed node by node while clients hold tokens.
//!
//! Clients have no key. What they must do, joining the tokens of replies that came side by side, they
//! do without one: [`merge`] puts sealed tokens into a bag, leaving out those that another one covers,
//! and the next server joins them into one again.
//!
//! Invariants:
//! * Nothing that a token says is acted upon before its seal was checked, except by its holder, in
//!   [`merge`].
//! * Tokens are bounded: by the number of regions, for session tokens also of shards, and a bag in
//!   the number of its tokens. Whatever is longer is refused.
//!
//! A seal keeps others from making tokens up, not from reading them: there is nothing secret inside.

mod resume;

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    id::{NamespaceId, ShardId},
    vector::VersionVector,
};

pub use resume::{RESUME_TOKEN_BYTES_MAX, ResumeToken, encode_resume};

/// Longest session token, in bytes; also of a bag of them.
pub const SESSION_TOKEN_BYTES_MAX: usize = 1 << 20;
/// Most tokens in a bag: the calls of one session that are answered side by side.
pub const BAG_TOKENS_MAX: usize = 1024;
/// Longest context of a key, in bytes.
pub const CONTEXT_BYTES_MAX: usize = 16 << 10;
/// Shortest secret that a [`TokenKey`] should be made from, in bytes.
pub const SECRET_BYTES_MIN: usize = 16;

const CONTEXT: u8 = 0x12;
const SESSION: u8 = 0x22;
const SESSION_BAG: u8 = 0x23;
const PAGE: u8 = 0x33;
const SEAL_BYTES: usize = 8;

/// What tokens of a cluster are sealed with: the same in all its regions.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenKey {
    /// Tells tokens of another cluster from forged ones; no secret.
    tag: u32,
    current: [u8; 32],
    accepted: Option<[u8; 32]>,
}

impl TokenKey {
    /// The key of a cluster that shares `secret`.
    pub fn new(cluster_id: &str, secret: &[u8]) -> Self {
        let tag = crc32fast::hash(cluster_id.as_bytes());
        Self { tag, current: derive(cluster_id, secret), accepted: None }
    }

    /// The key of a cluster without a secret. Whoever knows the cluster's id can seal with it, so it
    /// keeps out mistakes and nobody's will.
    pub fn without_secret(cluster_id: &str) -> Self {
        Self::new(cluster_id, &[])
    }

    /// Also opens what is sealed with this other secret, while the key is being changed: the next one,
    /// until all nodes accept it, then the one before, until clients have none of its tokens left.
    #[must_use]
    pub fn accepting(self, cluster_id: &str, other_secret: &[u8]) -> Self {
        Self { accepted: Some(derive(cluster_id, other_secret)), ..self }
    }
}

impl fmt::Debug for TokenKey {
    /// Without the keys: this may be logged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("tag", &self.tag).finish_non_exhaustive()
    }
}

fn derive(cluster_id: &str, secret: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("tombolo 2026-11 token seal v1");
    hasher.update(&(cluster_id.len() as u64).to_le_bytes());
    hasher.update(cluster_id.as_bytes());
    hasher.update(secret);
    *hasher.finalize().as_bytes()
}

/// Encodes the causal context of one key.
pub fn encode_context(
    key: &TokenKey,
    namespace: NamespaceId,
    of: &[u8],
    context: &VersionVector,
) -> Bytes {
    let mut writer = Writer::default();
    writer.u8(CONTEXT);
    context.encode(&mut writer);
    seal(key, writer, &[&namespace.0.to_le_bytes(), of])
}

/// Reads what [`encode_context`] wrote for the same key of the namespace, `of`.
///
/// # Errors
/// If it is damaged, too long, or belongs to another key, namespace or cluster.
pub fn decode_context(
    key: &TokenKey,
    namespace: NamespaceId,
    of: &[u8],
    token: &Bytes,
) -> Result<VersionVector, DecodeError> {
    let place: [&[u8]; 2] = [&namespace.0.to_le_bytes(), of];
    let mut reader = open(key, "context", token, CONTEXT, CONTEXT_BYTES_MAX, &place)?;
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

    /// Forgets what was seen of some namespaces.
    pub fn forget(&mut self, is_gone: impl Fn(NamespaceId) -> bool) {
        self.entries.retain(|&(namespace, _), _| !is_gone(namespace));
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether it has seen all that `other` has.
    fn covers(&self, other: &Self) -> bool {
        other.iter().all(|(namespace, shard, theirs)| {
            self.seen(namespace, shard).is_some_and(|seen| seen.covers_all(theirs))
        })
    }

    /// The token's bytes. Empty if nothing was seen. More than [`SESSION_TOKEN_BYTES_MAX`] are refused when
    /// they come back: what was seen is not left out in silence.
    pub fn encode(&self, key: &TokenKey) -> Bytes {
        if self.entries.is_empty() {
            return Bytes::new();
        }
        let mut writer = Writer::default();
        writer.u8(SESSION);
        writer.fixed32(key.tag);
        writer.count(self.entries.len());
        for (&(namespace, shard), seen) in &self.entries {
            writer.varint(u64::from(namespace.0));
            writer.varint(u64::from(shard.0));
            seen.encode(&mut writer);
        }
        seal(key, writer, &[])
    }

    /// Reads what [`encode`](Self::encode) wrote, or joins a bag of such that [`merge`] made.
    ///
    /// # Errors
    /// If anything of it is damaged, too long, or of another cluster.
    pub fn decode(key: &TokenKey, token: &Bytes) -> Result<Self, DecodeError> {
        let mut joined = Self::default();
        for token in unpack(token)? {
            let tag = unsealed(&token)?.fixed32()?;
            if tag != key.tag {
                return Err(another_cluster(tag));
            }
            let opened = open(key, TOKEN, &token, SESSION, SESSION_TOKEN_BYTES_MAX, &[])?;
            let (_, seen) = read_session(opened)?;
            joined.join(&seen);
        }
        Ok(joined)
    }
}

const TOKEN: &str = "session token";

const fn another_cluster(tag: u32) -> DecodeError {
    DecodeError::Invalid { what: "session token of another cluster", value: tag as u64 }
}

/// The sealed tokens of a bag, or the one that it is; none if it is empty.
fn unpack(token: &Bytes) -> Result<Vec<Bytes>, DecodeError> {
    if token.len() > SESSION_TOKEN_BYTES_MAX {
        let (actual, limit) = (token.len() as u64, SESSION_TOKEN_BYTES_MAX as u64);
        return Err(DecodeError::TooLarge { what: TOKEN, actual, limit });
    }
    match token.first() {
        None => Ok(Vec::new()),
        Some(&SESSION_BAG) => {
            let mut reader = Reader::new(TOKEN, token.slice(1..));
            let count = reader.count(1)?;
            if count > BAG_TOKENS_MAX {
                return Err(too_many(count));
            }
            let tokens = (0..count).map(|_| reader.bytes()).collect::<Result<_, _>>()?;
            reader.finish()?;
            Ok(tokens)
        }
        Some(_) => Ok(vec![token.clone()]),
    }
}

const fn too_many(count: usize) -> DecodeError {
    let (actual, limit) = (count as u64, BAG_TOKENS_MAX as u64);
    DecodeError::TooLarge { what: "tokens in a session token", actual, limit }
}

/// A reader of what is in a session token, its seal left aside.
fn unsealed(token: &Bytes) -> Result<Reader, DecodeError> {
    let body = body_of(TOKEN, token, SESSION, SESSION_TOKEN_BYTES_MAX)?;
    Ok(Reader::new(TOKEN, body.slice(1..)))
}

/// Of which cluster a session token is, and what it says.
fn read_session(mut reader: Reader) -> Result<(u32, SessionToken), DecodeError> {
    let tag = reader.fixed32()?;
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
    Ok((tag, SessionToken { entries }))
}

/// Joins the tokens of replies that came concurrently in one session, without a key: into the one that
/// covers all others, or into a bag of those that none covers. The order does not matter.
///
/// A reply to a request that carried a bag covers all of it, so a bag holds at most one token for each
/// call that was under way at the same time.
///
/// # Errors
/// If one cannot be read, they belong to different clusters, or the bag would exceed
/// [`BAG_TOKENS_MAX`] or [`SESSION_TOKEN_BYTES_MAX`].
pub fn merge(tokens: &[&[u8]]) -> Result<Bytes, DecodeError> {
    let mut kept: Vec<(Bytes, SessionToken)> = Vec::new();
    let mut cluster = None;
    for token in tokens {
        for token in unpack(&Bytes::copy_from_slice(token))? {
            let (tag, seen) = read_session(unsealed(&token)?)?;
            if *cluster.get_or_insert(tag) != tag {
                return Err(another_cluster(tag));
            }
            // Of two that say the same, any will do; the greater, so that the order does not matter.
            let beats = |left: &(Bytes, SessionToken), right: &(Bytes, SessionToken)| {
                left.1.covers(&right.1) && (left.0 >= right.0 || !right.1.covers(&left.1))
            };
            let candidate = (token, seen);
            if kept.iter().any(|held| beats(held, &candidate)) {
                continue;
            }
            kept.retain(|held| !beats(&candidate, held));
            kept.push(candidate);
        }
    }
    if kept.len() > BAG_TOKENS_MAX {
        return Err(too_many(kept.len()));
    }
    kept.sort_by(|left, right| left.0.cmp(&right.0));
    if kept.len() <= 1 {
        return Ok(kept.pop().map(|(token, _)| token).unwrap_or_default());
    }
    let mut writer = Writer::default();
    writer.u8(SESSION_BAG);
    writer.count(kept.len());
    kept.iter().for_each(|(token, _)| writer.bytes(token));
    let bag = writer.finish();
    if bag.len() > SESSION_TOKEN_BYTES_MAX {
        let (actual, limit) = (bag.len() as u64, SESSION_TOKEN_BYTES_MAX as u64);
        return Err(DecodeError::TooLarge { what: TOKEN, actual, limit });
    }
    Ok(bag)
}

/// Encodes where a scan goes on. `request` is a hash of what was asked for.
pub fn encode_page(key: &TokenKey, request: u32, next: &[u8]) -> Bytes {
    let mut writer = Writer::default();
    writer.u8(PAGE);
    writer.fixed32(request);
    writer.bytes(next);
    seal(key, writer, &[])
}

/// Reads what [`encode_page`] wrote: the hash of the request that it belongs to, and where that goes on.
///
/// # Errors
/// If it is damaged or of another cluster.
pub fn decode_page(key: &TokenKey, token: &Bytes) -> Result<(u32, Bytes), DecodeError> {
    let mut reader = open(key, "page token", token, PAGE, CONTEXT_BYTES_MAX, &[])?;
    let page = (reader.fixed32()?, reader.bytes()?);
    reader.finish()?;
    Ok(page)
}

/// Ends a token, whose first byte is its kind, with a seal. `place` is what it belongs to.
fn seal(key: &TokenKey, mut writer: Writer, place: &[&[u8]]) -> Bytes {
    let mac = mac(&key.current, place, writer.as_slice());
    writer.raw(&mac);
    writer.finish()
}

/// A reader of what is in a token of this kind behind the kind, if its seal holds for this `place`.
fn open(
    key: &TokenKey,
    what: &'static str,
    token: &Bytes,
    kind: u8,
    limit: usize,
    place: &[&[u8]],
) -> Result<Reader, DecodeError> {
    let body = body_of(what, token, kind, limit)?;
    let found = &token[body.len()..];
    let keys = std::iter::once(&key.current).chain(&key.accepted);
    // Every key is tried and every byte compared, so that timing tells nothing.
    let fits = keys.fold(false, |fits, key| {
        let differing =
            mac(key, place, &body).iter().zip(found).fold(0, |seen, (a, b)| seen | (a ^ b));
        fits | (differing == 0)
    });
    if !fits {
        return Err(DecodeError::Seal { what });
    }
    Ok(Reader::new(what, body.slice(1..)))
}

/// A token without its seal.
fn body_of(
    what: &'static str,
    token: &Bytes,
    kind: u8,
    limit: usize,
) -> Result<Bytes, DecodeError> {
    if token.len() > limit {
        let (actual, limit) = (token.len() as u64, limit as u64);
        return Err(DecodeError::TooLarge { what, actual, limit });
    }
    if token.len() < 1 + SEAL_BYTES {
        return Err(DecodeError::Truncated { what });
    }
    if token[0] != kind {
        return Err(DecodeError::Version { what, version: token[0] });
    }
    Ok(token.slice(..token.len() - SEAL_BYTES))
}

fn mac(key: &[u8; 32], place: &[&[u8]], body: &[u8]) -> [u8; SEAL_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in std::iter::once(&body).chain(place) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut mac = [0; SEAL_BYTES];
    hasher.finalize_xof().fill(&mut mac);
    mac
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        id::{Actor, RegionId},
        vector::tests::any_vector,
    };

    const NS: NamespaceId = NamespaceId(9);

    fn key() -> TokenKey {
        TokenKey::new("prod", b"a secret of the cluster")
    }

    fn seen_by(region: u16, seq: u64) -> VersionVector {
        [(Actor { region: RegionId(region), incarnation: 1 }, seq)].into_iter().collect()
    }

    fn session(shard: u16, seen: &VersionVector) -> SessionToken {
        let mut token = SessionToken::default();
        token.observe(NS, ShardId(shard), seen);
        token
    }

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
            let bytes = token.encode(&key());
            prop_assert_eq!(SessionToken::decode(&key(), &bytes), Ok(token));
        }

        #[test]
        fn merged_token_has_seen_what_each_has_seen_in_any_order(tokens in prop::collection::vec(any_session(), 0..5)) {
            let sealed: Vec<Bytes> = tokens.iter().map(|token| token.encode(&key())).collect();
            let mut parts: Vec<&[u8]> = sealed.iter().map(|token| &token[..]).collect();
            let merged = merge(&parts).unwrap();
            let mut joined = SessionToken::default();
            tokens.iter().for_each(|token| joined.join(token));
            prop_assert_eq!(SessionToken::decode(&key(), &merged), Ok(joined));
            parts.reverse();
            prop_assert_eq!(&merge(&parts).unwrap(), &merged);
            parts.push(&merged);
            prop_assert_eq!(&merge(&parts).unwrap(), &merged);
        }

        #[test]
        fn what_covers_a_bag_replaces_it(tokens in prop::collection::vec(any_session(), 1..5)) {
            let sealed: Vec<Bytes> = tokens.iter().map(|token| token.encode(&key())).collect();
            let bag = merge(&sealed.iter().map(|token| &token[..]).collect::<Vec<_>>()).unwrap();
            let reply = SessionToken::decode(&key(), &bag).unwrap().encode(&key());
            prop_assert_eq!(SessionToken::decode(&key(), &merge(&[&bag, &reply]).unwrap()), SessionToken::decode(&key(), &reply));
            prop_assert!(merge(&[&bag, &reply]).unwrap().len() <= reply.len());
        }

        #[test]
        fn context_reads_back_for_its_own_key_only(context in any_vector()) {
            let token = encode_context(&key(), NS, b"key", &context);
            prop_assert_eq!(decode_context(&key(), NS, b"key", &token), Ok(context));
            let misplaced = decode_context(&key(), NS, b"other", &token);
            prop_assert_eq!(misplaced, Err(DecodeError::Seal { what: "context" }));
            let misplaced = decode_context(&key(), NamespaceId(8), b"key", &token);
            prop_assert_eq!(misplaced, Err(DecodeError::Seal { what: "context" }));
        }

        #[test]
        fn a_changed_bit_is_noticed(context in any_vector(), token in any_session(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let flip = |bytes: Bytes| {
                let mut bytes = bytes.to_vec();
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
                Bytes::from(bytes)
            };
            let context = flip(encode_context(&key(), NS, b"key", &context));
            prop_assert!(decode_context(&key(), NS, b"key", &context).is_err());
            if !token.is_empty() {
                prop_assert!(SessionToken::decode(&key(), &flip(token.encode(&key()))).is_err());
            }
        }

        #[test]
        fn a_bag_with_one_forged_token_is_refused(mut real in any_session(), mut forged in any_session()) {
            // None covers the other, so that both are in the bag.
            real.observe(NS, ShardId(5), &seen_by(1, 1));
            forged.observe(NS, ShardId(6), &seen_by(1, 1));
            let forged = forged.encode(&TokenKey::without_secret("prod"));
            let bag = merge(&[&real.encode(&key()), &forged]).unwrap();
            let opened = SessionToken::decode(&key(), &bag);
            prop_assert_eq!(opened, Err(DecodeError::Seal { what: TOKEN }));
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64), kind in prop::sample::select(vec![CONTEXT, SESSION, SESSION_BAG, PAGE])) {
            for noise in [Bytes::from(noise.clone()), [&[kind], &noise[..]].concat().into()] {
                let _ = SessionToken::decode(&key(), &noise);
                let _ = decode_context(&key(), NS, b"key", &noise);
                let _ = decode_page(&key(), &noise);
                let _ = merge(&[&noise, &noise]);
            }
        }

        #[test]
        fn page_token_reads_back_and_says_of_which_request_it_is(request in any::<u32>(), next in prop::collection::vec(any::<u8>(), 0..64)) {
            let token = encode_page(&key(), request, &next);
            prop_assert!(decode_page(&TokenKey::without_secret("prod"), &token).is_err());
            prop_assert_eq!(decode_page(&key(), &token), Ok((request, Bytes::from(next))));
        }
    }

    #[test]
    fn token_of_another_cluster_is_refused_by_name() {
        let bytes = session(0, &seen_by(1, 3)).encode(&TokenKey::without_secret("prod"));
        let test = TokenKey::without_secret("test");
        let error = SessionToken::decode(&test, &bytes).unwrap_err();
        assert!(error.to_string().starts_with("session token of another cluster"));
        let other = session(1, &seen_by(1, 3)).encode(&test);
        assert!(merge(&[&bytes, &other]).is_err());
    }

    #[test]
    fn a_token_made_without_the_secret_is_refused() {
        let forged = session(0, &seen_by(1, 3)).encode(&TokenKey::without_secret("prod"));
        let opened = SessionToken::decode(&key(), &forged);
        assert_eq!(opened, Err(DecodeError::Seal { what: TOKEN }));
        let guessed = session(0, &seen_by(1, 3)).encode(&TokenKey::new("prod", b"another secret"));
        let opened = SessionToken::decode(&key(), &guessed);
        assert_eq!(opened, Err(DecodeError::Seal { what: TOKEN }));
    }

    #[test]
    fn a_session_token_is_not_read_before_its_seal_was_checked() {
        let mut writer = Writer::default();
        writer.u8(SESSION);
        writer.fixed32(key().tag);
        writer.raw(&[u8::MAX; 100]);
        let forged = seal(&TokenKey::without_secret("prod"), writer, &[]);
        assert_eq!(SessionToken::decode(&key(), &forged), Err(DecodeError::Seal { what: TOKEN }));
    }

    #[test]
    fn what_was_seen_of_a_namespace_can_be_forgotten() {
        let mut token = session(0, &seen_by(1, 3));
        token.observe(NamespaceId(10), ShardId(0), &seen_by(1, 4));
        token.forget(|namespace| namespace == NamespaceId(10));
        assert_eq!(token, session(0, &seen_by(1, 3)));
    }

    #[test]
    fn another_key_is_accepted_and_not_used() {
        let old = TokenKey::new("prod", b"old");
        let new = TokenKey::new("prod", b"new").accepting("prod", b"old");
        let token = session(0, &seen_by(1, 3));
        assert_eq!(SessionToken::decode(&new, &token.encode(&old)), Ok(token.clone()));
        let sealed = token.encode(&new);
        assert_eq!(SessionToken::decode(&TokenKey::new("prod", b"new"), &sealed), Ok(token));
        assert!(SessionToken::decode(&old, &sealed).is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", TokenKey::new("prod", b"a"));
        assert_eq!(shown, format!("TokenKey {{ tag: {}, .. }}", crc32fast::hash(b"prod")));
    }

    #[test]
    fn a_token_of_three_regions_is_small_and_one_of_every_shard_is_bounded() {
        let mut seen = VersionVector::new();
        (1..=3).for_each(|region| seen.join(&seen_by(region, 1_000_000_000)));
        assert!(session(1023, &seen).encode(&key()).len() < 64);

        (4..=16).for_each(|region| seen.join(&seen_by(region, 1 << 62)));
        let mut widest = SessionToken::default();
        (0..1024).for_each(|shard| widest.observe(NS, ShardId(shard), &seen));
        let bytes = widest.encode(&key());
        assert!(bytes.len() < SESSION_TOKEN_BYTES_MAX / 4, "{} bytes", bytes.len());
        assert!(SessionToken::decode(&key(), &bytes) == Ok(widest), "it reads back");
    }

    #[test]
    fn what_exceeds_the_bounds_is_refused_by_both_sides() {
        let tokens: Vec<Bytes> = (0..=BAG_TOKENS_MAX)
            .map(|shard| session(u16::try_from(shard).unwrap(), &seen_by(1, 1)).encode(&key()))
            .collect();
        let parts: Vec<&[u8]> = tokens.iter().map(|token| &token[..]).collect();
        assert!(matches!(merge(&parts), Err(DecodeError::TooLarge { .. })));
        let bag = merge(&parts[1..]).unwrap();
        assert_eq!(SessionToken::decode(&key(), &bag).unwrap().iter().count(), BAG_TOKENS_MAX);

        let mut writer = Writer::default();
        writer.u8(SESSION_BAG);
        writer.count(parts.len());
        parts.iter().for_each(|token| writer.bytes(token));
        let opened = SessionToken::decode(&key(), &writer.finish());
        assert!(matches!(opened, Err(DecodeError::TooLarge { .. })), "{opened:?}");
        let long = Bytes::from(vec![SESSION; SESSION_TOKEN_BYTES_MAX + 1]);
        let opened = SessionToken::decode(&key(), &long);
        assert!(matches!(opened, Err(DecodeError::TooLarge { .. })), "{opened:?}");
    }
}
