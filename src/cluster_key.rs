//! The cluster's key: where it comes from, and what it is used for.
//!
//! It seals the tokens that clients carry from region to region, so all nodes of all regions need the
//! same one. Without one a key is made from the cluster's id, which is no secret: tokens are then
//! checked against mistakes, and anybody who wants to can make them up. Said once, at the start.
//!
//! Not here: sealing (`tombolo_core::token`), how the keys are written (`config`).

use std::{fs, io::Read, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, bail};
use tombolo_core::token::{SECRET_BYTES_MIN, TokenKey};

use crate::config::Config;

/// Nobody needs a longer file; a wrong path may lead to a large one.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The key that tokens are sealed with.
///
/// # Errors
/// If the key's file cannot be read, holds no key, or may be read by everybody.
pub(crate) fn token_key(config: &Config) -> anyhow::Result<TokenKey> {
    let id = &config.cluster_id;
    let (secret, accepted) = match (&config.cluster_key_file, &config.cluster_key) {
        (Some(path), _) => read(path)
            .with_context(|| format!("cluster_key_file {}: cannot be used", path.display()))?,
        (None, Some(secret)) => {
            let accepted = config.accepted_cluster_key.as_ref();
            (secret.expose().to_owned(), accepted.map(|secret| secret.expose().to_owned()))
        }
        (None, None) => {
            tracing::warn!(
                "there is no cluster_key: anybody who knows the cluster's id can make up session \
                 tokens, contexts and page tokens"
            );
            return Ok(TokenKey::without_secret(id));
        }
    };
    let key = TokenKey::new(id, secret.as_bytes());
    Ok(match accepted {
        Some(accepted) => key.accepting(id, accepted.as_bytes()),
        None => key,
    })
}

/// The key in the first line of a file, and the one that is accepted too in the second.
fn read(path: &Path) -> anyhow::Result<(String, Option<String>)> {
    let file = fs::File::open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o007 != 0 {
        bail!("everybody may use it (mode {:o}); take that away: chmod o= FILE", mode & 0o777);
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).context("it is not text")?;
    if text.len() as u64 > FILE_BYTES_MAX {
        bail!("it has more than {FILE_BYTES_MAX} bytes; is it the right file?");
    }
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let current = lines.next().context("it is empty; put a long random text into it")?.to_owned();
    let accepted = lines.next().map(str::to_owned);
    if lines.next().is_some() {
        bail!("it has more than two lines; keep the key and one that is accepted, too");
    }
    for key in std::iter::once(&current).chain(&accepted) {
        if key.len() < SECRET_BYTES_MIN {
            bail!("a key in it has less than {SECRET_BYTES_MIN} bytes; take a longer random one");
        }
    }
    Ok((current, accepted))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    fn file(text: &[u8], mode: u32) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(text).unwrap();
        file.as_file().set_permissions(fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_file_holds_the_key_and_perhaps_one_that_is_accepted() {
        let one = file(b"0123456789abcdef\n", 0o600);
        assert_eq!(read(one.path()).unwrap(), ("0123456789abcdef".to_owned(), None));
        let two = file(b"\n0123456789abcdef\n  fedcba9876543210", 0o640);
        let accepted = Some("fedcba9876543210".to_owned());
        assert_eq!(read(two.path()).unwrap(), ("0123456789abcdef".to_owned(), accepted));
    }

    #[test]
    fn a_file_that_is_no_key_says_why() {
        let key = b"0123456789abcdef\n";
        for (file, problem) in [
            (file(key, 0o604), "everybody may use it (mode 604)"),
            (file(b"", 0o600), "it is empty"),
            (file(b"short\n", 0o600), "less than 16 bytes"),
            (file(&key.repeat(3), 0o600), "more than two lines"),
            (file(&[0xff; 20], 0o600), "it is not text"),
            (file(&vec![b'a'; 70_000], 0o600), "is it the right file?"),
        ] {
            let error = format!("{:#}", read(file.path()).unwrap_err());
            assert!(error.contains(problem), "{error}");
        }
        assert!(read(Path::new("/no/such/file")).is_err());
    }
}
