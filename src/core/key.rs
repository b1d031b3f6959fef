//! Limits on what users send, and their checks.

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 4 << 10;
/// Longest value, in bytes, unless a namespace allows less.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Most checks and writes in one commit, and keys in one batch read.
pub const BATCH_OPERATIONS_MAX: usize = 128;
/// Longest namespace name, in bytes.
pub const NAMESPACE_NAME_BYTES_MAX: usize = 64;

/// Why a key cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A key has at least one byte.
    #[error("the key is empty; a key has 1 to {KEY_BYTES_MAX} bytes")]
    Empty,
    /// Too long.
    #[error("the key has {bytes} bytes; a key has 1 to {KEY_BYTES_MAX} bytes")]
    TooLong { bytes: usize },
}

/// Checks a key's length.
///
/// # Errors
/// If it is empty or too long.
pub fn check_key(key: &[u8]) -> Result<(), KeyError> {
    match key.len() {
        0 => Err(KeyError::Empty),
        1..=KEY_BYTES_MAX => Ok(()),
        bytes => Err(KeyError::TooLong { bytes }),
    }
}

/// Whether `name` can name a namespace: 1 to 64 of `a-z`, `0-9`, `-`, `_`, a letter first.
pub fn is_namespace_name(name: &str) -> bool {
    let legal = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
    (1..=NAMESPACE_NAME_BYTES_MAX).contains(&name.len())
        && name.as_bytes()[0].is_ascii_lowercase()
        && name.bytes().all(legal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_one_to_4096_bytes() {
        assert_eq!(check_key(b""), Err(KeyError::Empty));
        assert_eq!(check_key(&[0; 4096]), Ok(()));
        assert_eq!(check_key(&[0; 4097]), Err(KeyError::TooLong { bytes: 4097 }));
    }

    #[test]
    fn namespace_names_are_short_and_plain() {
        for good in ["default", "carts-2", "a_b", "x"] {
            assert!(is_namespace_name(good), "{good}");
        }
        for bad in ["", "Carts", "2x", "_x", "a b", "ä", &"x".repeat(65)] {
            assert!(!is_namespace_name(bad), "{bad}");
        }
    }
}
