//! A session between commands: the token in a file.

use crate::exit::Failure;
use crate::output::{base64, unbase64};
use std::path::{Path, PathBuf};
use tombolo_client::{Conflicts, Keyspace, Session};

/// Whose session a command belongs to.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SessionOptions {
    /// Continue the session kept in FILE, and keep it there; created if missing
    #[arg(long, value_name = "FILE")]
    pub session_file: Option<PathBuf>,
    /// Continue the session of this token, base64 as printed by -o json
    #[arg(long, value_name = "TOKEN", conflicts_with = "session_file")]
    pub token: Option<String>,
}

/// A session that knows where it is kept.
pub(crate) struct KeptSession {
    session: Option<Session>,
    file: Option<PathBuf>,
}

impl SessionOptions {
    pub(crate) fn open(&self) -> Result<KeptSession, Failure> {
        let token = match (&self.session_file, &self.token) {
            (Some(path), _) => match std::fs::read_to_string(path) {
                Ok(text) => Some(parse(&text, &path.display().to_string())?),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(Session::new()),
                Err(error) => return Err(Failure::Other(format!("{}: {error}", path.display()))),
            },
            (None, Some(text)) => Some(parse(text, "--token")?),
            (None, None) => None,
        };
        Ok(KeptSession { session: token, file: self.session_file.clone() })
    }
}

fn parse(text: &str, place: &str) -> Result<Session, Failure> {
    let token = unbase64(text)
        .map_err(|error| Failure::Usage(format!("{place}: not a session token: {error}")))?;
    Ok(Session::from_token(token))
}

impl KeptSession {
    pub(crate) fn enter(&self, keys: Keyspace) -> Keyspace {
        match &self.session {
            Some(session) => keys.with_session(session),
            None => keys,
        }
    }

    pub(crate) fn enter_conflicts(&self, conflicts: Conflicts) -> Conflicts {
        match &self.session {
            Some(session) => conflicts.with_session(session),
            None => conflicts,
        }
    }

    /// Writes the token back, whole or not at all.
    pub(crate) fn keep(&self) -> Result<(), Failure> {
        let (Some(session), Some(path)) = (&self.session, &self.file) else { return Ok(()) };
        replace_file(path, format!("{}\n", base64(&session.token())).as_bytes())
            .map_err(|error| Failure::Other(format!("{}: {error}", path.display())))
    }
}

/// Replaces a small file so that a reader, or a crash, sees the old or the new one.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path)
}
