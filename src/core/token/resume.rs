//! Resume tokens: where a watcher stands in every shard of a namespace.
//!
//! Vectors mean the same in every region, so a watcher may go on anywhere.

use bytes::Bytes;

use super::{TokenKey, open, seal};
use crate::{
    codec::{DecodeError, Reader, Writer},
    element::RECORD_KEY_BYTES_MAX,
    feed::{Cursor, Progress},
    id::NamespaceId,
    placement::SHARDS_MAX,
    vector::VersionVector,
};

/// Longest resume token, in bytes.
pub const RESUME_TOKEN_BYTES_MAX: usize = 1 << 20;

const RESUME: u8 = 0x41;
const START: u8 = 0;
const BEFORE: u8 = 1;
const LIVE: u8 = 2;

/// Where a watcher stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumeToken {
    /// What it watches.
    pub namespace: NamespaceId,
    /// The name of its filter ([`crate::feed::Filter::fingerprint`]).
    pub filter: u64,
    /// By shard.
    pub cursors: Vec<Cursor>,
}

impl ResumeToken {
    /// The token's bytes.
    pub fn encode(&self, key: &TokenKey) -> Bytes {
        encode_resume(key, self.namespace, self.filter, self.cursors.iter())
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// If it is damaged, too long, or of another cluster.
    pub fn decode(key: &TokenKey, token: &Bytes) -> Result<Self, DecodeError> {
        let mut reader = open(key, "resume token", token, RESUME, RESUME_TOKEN_BYTES_MAX, &[])?;
        let namespace = NamespaceId(reader.u32()?);
        let filter = reader.fixed64()?;
        let count = reader.count(2)?;
        if count > usize::from(SHARDS_MAX) {
            return Err(reader.invalid(count as u64));
        }
        let cursors = (0..count).map(|_| decode_cursor(&mut reader)).collect::<Result<_, _>>()?;
        reader.finish()?;
        Ok(Self { namespace, filter, cursors })
    }
}

/// The bytes of a token, without taking the cursors.
pub fn encode_resume<'a>(
    key: &TokenKey,
    namespace: NamespaceId,
    filter: u64,
    cursors: impl ExactSizeIterator<Item = &'a Cursor>,
) -> Bytes {
    let mut writer = Writer::with_capacity(32 + cursors.len() * 32);
    writer.u8(RESUME);
    writer.varint(u64::from(namespace.0));
    writer.fixed64(filter);
    writer.count(cursors.len());
    for cursor in cursors {
        match &cursor.progress {
            Progress::Start => writer.u8(START),
            Progress::Before(next) => {
                writer.u8(BEFORE);
                writer.bytes(next);
            }
            Progress::Live => writer.u8(LIVE),
        }
        cursor.given.encode(&mut writer);
    }
    seal(key, writer, &[])
}

fn decode_cursor(reader: &mut Reader) -> Result<Cursor, DecodeError> {
    let progress = match reader.u8()? {
        START => Progress::Start,
        BEFORE => {
            let next = reader.bytes()?;
            // A key's successor may be one byte longer than a key.
            if next.len() > RECORD_KEY_BYTES_MAX + 1 {
                return Err(reader.invalid(next.len() as u64));
            }
            Progress::Before(next)
        }
        LIVE => Progress::Live,
        tag => return Err(reader.invalid(u64::from(tag))),
    };
    Ok(Cursor { given: VersionVector::decode(reader)?, progress })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vector::tests::any_vector;

    fn prod() -> TokenKey {
        TokenKey::without_secret("prod")
    }

    fn any_cursor() -> impl Strategy<Value = Cursor> {
        let progress = prop_oneof![
            Just(Progress::Start),
            Just(Progress::Live),
            prop::collection::vec(any::<u8>(), 0..20)
                .prop_map(|key| Progress::Before(Bytes::from(key))),
        ];
        (any_vector(), progress).prop_map(|(given, progress)| Cursor { given, progress })
    }

    fn any_token() -> impl Strategy<Value = ResumeToken> {
        let cursors = prop::collection::vec(any_cursor(), 0..6);
        (any::<u32>(), any::<u64>(), cursors).prop_map(|(namespace, filter, cursors)| ResumeToken {
            namespace: NamespaceId(namespace),
            filter,
            cursors,
        })
    }

    proptest! {
        #[test]
        fn resume_token_reads_back_in_its_own_cluster_only(token in any_token()) {
            let bytes = token.encode(&prod());
            prop_assert!(ResumeToken::decode(&TokenKey::without_secret("test"), &bytes).is_err());
            prop_assert_eq!(ResumeToken::decode(&prod(), &bytes), Ok(token));
        }

        #[test]
        fn a_changed_bit_is_noticed(
            token in any_token(), at in any::<prop::sample::Index>(), bit in 0u8..8
        ) {
            let mut bytes = token.encode(&prod()).to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(ResumeToken::decode(&prod(), &bytes.into()).is_err());
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = ResumeToken::decode(&prod(), &Bytes::from(noise.clone()));
            let mut sealed = Writer::default();
            sealed.u8(RESUME);
            sealed.raw(&noise);
            let _ = ResumeToken::decode(&prod(), &seal(&prod(), sealed, &[]));
        }
    }
}
