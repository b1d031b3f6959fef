//! Key to shard: a stable hash, the same in every region, version and language.
//!
//! Invariants:
//! * [`shard_of_key`] never changes its answer for a (key, shard count); the test vectors below
//!   are part of the contract with clients.
//! * Keys with the same non-empty hash tag share a shard, so that a batch can hold both.
//!
//! Not here: which nodes hold a shard (`tombolo-cluster`).

use xxhash_rust::xxh3::xxh3_64;

use crate::id::ShardId;

/// Most shards that a cluster may be created with.
pub const SHARDS_MAX: u16 = 1024;

/// The part of a key that decides its shard: the bytes between the first `{` and the next `}`
/// if there are any (as in Redis Cluster), else the whole key.
pub fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&byte| byte == b'{') else { return key };
    let rest = &key[open + 1..];
    match rest.iter().position(|&byte| byte == b'}') {
        Some(length) if length > 0 => &rest[..length],
        Some(_) | None => key,
    }
}

/// The shard that holds `key` in a cluster of `shard_count` shards (at least 1).
///
/// Maps the hash to the range by multiplication, which is even for every count.
pub fn shard_of_key(key: &[u8], shard_count: u16) -> ShardId {
    let hash = u128::from(xxh3_64(hash_tag(key)));
    let shard = (hash * u128::from(shard_count)) >> 64;
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the product's high word is below the count"
    )]
    ShardId(shard as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_tag_is_the_first_non_empty_braced_part() {
        for (key, tag) in [
            ("user", "user"),
            ("{user}:1", "user"),
            ("a{user}:1{x}", "user"),
            ("{}x", "{}x"),
            ("{open", "{open"),
            ("}{a}", "a"),
        ] {
            assert_eq!(hash_tag(key.as_bytes()), tag.as_bytes(), "{key}");
        }
    }

    #[test]
    fn placement_of_known_keys_never_changes() {
        let shards = |key: &str| [1, 4, 16, 1024].map(|n| shard_of_key(key.as_bytes(), n).0);
        assert_eq!(shards("hello"), VECTORS[0]);
        assert_eq!(shards("{hello}:2"), VECTORS[0]);
        assert_eq!(shards(""), VECTORS[1]);
        assert_eq!(shards("tombolo"), VECTORS[2]);
    }

    const VECTORS: [[u16; 4]; 3] = [[0, 2, 9, 597], [0, 0, 2, 180], [0, 3, 15, 998]];

    #[test]
    fn keys_spread_evenly_over_an_odd_number_of_shards() {
        let mut counts = [0u32; 7];
        for number in 0..7000 {
            counts[usize::from(shard_of_key(format!("key-{number}").as_bytes(), 7).0)] += 1;
        }
        assert!(counts.iter().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }
}
