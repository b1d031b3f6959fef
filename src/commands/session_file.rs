//! A session between commands: the token in a file.

use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{base64, unbase64};
use std::io::Write;
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
    /// The session, if its file can be written: what comes after may not be repeatable.
    pub(crate) fn open(&self) -> Result<KeptSession, Failure> {
        let session = self.read()?;
        if let Some(path) = &self.session_file {
            probe_file(path)?;
        }
        Ok(session)
    }

    /// The session, for a command that does not keep it.
    pub(crate) fn read(&self) -> Result<KeptSession, Failure> {
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
    /// Whether there is nothing that the session could ask for.
    pub(crate) fn has_seen_nothing(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.token().is_empty())
    }

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

    /// Ends a write that stands: what was said of it comes first, also where the session cannot be kept.
    pub(crate) fn end(&self, said: Result<Exit, Failure>, io: &mut Io) -> Result<Exit, Failure> {
        match (said, self.keep()) {
            (said, Ok(())) => said,
            (Ok(_), Err(error)) => Err(Failure::NotKept(error.to_string())),
            (Err(failure), Err(error)) => {
                writeln!(io.err, "the session was not kept: {error}")?;
                Err(failure)
            }
        }
    }
}

/// Whether [`replace_file`] could replace the file.
pub(crate) fn probe_file(path: &Path) -> Result<(), Failure> {
    let temporary = temporary_of(path);
    std::fs::write(&temporary, b"")
        .and_then(|()| std::fs::remove_file(&temporary))
        .map_err(|error| Failure::Other(format!("{} cannot be written: {error}", path.display())))
}

/// Replaces a small file so that a reader, or a crash, sees the old or the new one.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = temporary_of(path);
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path)
}

fn temporary_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}
