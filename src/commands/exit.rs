//! How a command ends: exit codes, and errors as people and programs read them.
//!
//! The codes are interface: `docs/operate/cli.md` lists them and a test holds them fixed.

use crate::output::Format;
use crate::write::show_request_id;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use tombolo_client::{Code, Error, RequestId};

/// The exit code of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Ok,
    /// Anything that has no code of its own.
    Other,
    /// The command line makes no sense.
    Usage,
    /// The key is absent.
    Absent,
    /// A check failed, or the state is not what the request assumed.
    CheckFailed,
    /// Concurrent values where one was demanded.
    Conflict,
    /// No answer in time, or nobody there.
    Unavailable,
    /// Not allowed.
    Denied,
    /// The cluster is not healthy, and that was the question.
    Unhealthy,
    /// Ctrl-C.
    Interrupted,
}

impl Exit {
    /// The number that the shell sees.
    pub const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Other => 1,
            Self::Usage => 2,
            Self::Absent => 3,
            Self::CheckFailed => 4,
            Self::Conflict => 5,
            Self::Unavailable => 6,
            Self::Denied => 7,
            Self::Unhealthy => 8,
            Self::Interrupted => 130,
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Why a command did not end well. Each variant is one exit code, except for what the client says.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Absent(String),
    #[error("{0} of the commit's checks failed; nothing was written")]
    CheckFailed(usize),
    #[error("key {key} has {versions} concurrent values")]
    Conflict { key: String, versions: usize },
    #[error("the cluster is not healthy")]
    Unhealthy,
    #[error("interrupted{0}")]
    Interrupted(String),
    /// With the place in the input or output where it happened.
    #[error("{place}: {error}")]
    Client { place: String, error: Error },
    /// The answer was printed.
    #[error("the write stands, do not repeat it; only its session was not kept: {0}")]
    NotKept(String),
    /// Nobody reads standard output any more.
    #[error("broken pipe")]
    PipeClosed,
    #[error("{error}; repeat the command with --request-id {} to learn it", show_request_id(.id))]
    OutcomeUnknown { error: Error, id: RequestId },
    #[error("{0}")]
    Remote(#[from] Error),
    #[error("{0}")]
    Other(String),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::PipeClosed,
            _ => Self::Other(error.to_string()),
        }
    }
}

impl Failure {
    pub fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Absent(_) => Exit::Absent,
            Self::CheckFailed(_) => Exit::CheckFailed,
            Self::Conflict { .. } => Exit::Conflict,
            Self::Unhealthy => Exit::Unhealthy,
            Self::Interrupted(_) => Exit::Interrupted,
            Self::NotKept(_) | Self::PipeClosed | Self::Other(_) => Exit::Other,
            Self::OutcomeUnknown { error: Error::Invalid { .. }, .. }
            | Self::Remote(Error::Invalid { .. }) => Exit::Usage,
            // Its region did not have it in time.
            Self::Remote(error) if error.reason() == Some("SESSION_NOT_CAUGHT_UP") => {
                Exit::Unavailable
            }
            Self::Client { error, .. }
            | Self::OutcomeUnknown { error, .. }
            | Self::Remote(error) => match error {
                Error::Precondition { .. } => Exit::CheckFailed,
                Error::Unavailable { .. } | Error::Deadline { .. } => Exit::Unavailable,
                Error::Denied { .. } => Exit::Denied,
                Error::Invalid { .. }
                | Error::NotFound { .. }
                | Error::Internal { .. }
                | Error::Protocol { .. } => Exit::Other,
            },
        }
    }

    fn report(&self) -> Report {
        let (code, reason) = match self {
            Self::Usage(_) => ("INVALID_ARGUMENT", "USAGE"),
            Self::Absent(_) => ("NOT_FOUND", "KEY_ABSENT"),
            Self::CheckFailed(_) => ("FAILED_PRECONDITION", "CHECK_FAILED"),
            Self::Conflict { .. } => ("FAILED_PRECONDITION", "CONFLICT"),
            Self::Unhealthy => ("FAILED_PRECONDITION", "UNHEALTHY"),
            Self::Interrupted(_) => ("CANCELLED", "INTERRUPTED"),
            Self::NotKept(_) => ("UNKNOWN", "SESSION_NOT_KEPT"),
            Self::PipeClosed | Self::Other(_) => ("UNKNOWN", ""),
            Self::Client { error, .. }
            | Self::OutcomeUnknown { error, .. }
            | Self::Remote(error) => (code_name(error.code()), error.reason().unwrap_or_default()),
        };
        let message = match self {
            // The reason has a field of its own.
            Self::OutcomeUnknown { error, .. } | Self::Remote(error) => said(error),
            Self::Client { place, error } => format!("{place}: {}", said(error)),
            Self::Usage(_)
            | Self::Absent(_)
            | Self::CheckFailed(_)
            | Self::Conflict { .. }
            | Self::Unhealthy
            | Self::Interrupted(_)
            | Self::NotKept(_)
            | Self::PipeClosed
            | Self::Other(_) => self.to_string(),
        };
        Report { code, reason: reason.into(), message, details: self.details() }
    }

    /// What the server said beside its message, and what became of a write.
    fn details(&self) -> BTreeMap<String, String> {
        let mut details = BTreeMap::new();
        if let Self::Client { error, .. }
        | Self::OutcomeUnknown { error, .. }
        | Self::Remote(error) = self
        {
            if let Some(detail) = error.detail() {
                details.clone_from(&detail.metadata);
            }
            if error.outcome_unknown() {
                details.insert("outcome".into(), "unknown".into());
            }
            if let Error::Deadline { dot: Some(dot), .. } = error {
                details.insert("dot".into(), dot.to_string());
            }
        }
        if let Self::OutcomeUnknown { id, .. } = self {
            details.insert("request_id".into(), show_request_id(id));
        }
        details
    }

    /// Says it on standard error: a line of text, or, where output is JSON, an object.
    pub(crate) fn print(&self, format: Format, err: &mut dyn Write) -> std::io::Result<()> {
        match format {
            Format::Json | Format::Jsonl => {
                let report =
                    serde_json::to_string(&self.report()).map_err(std::io::Error::other)?;
                writeln!(err, "{report}")
            }
            Format::Table | Format::Raw => writeln!(err, "error: {self}"),
        }
    }
}

fn said(error: &Error) -> String {
    error.detail().map_or_else(|| error.to_string(), |detail| detail.message.clone())
}

#[derive(Serialize)]
struct Report {
    code: &'static str,
    reason: String,
    message: String,
    details: BTreeMap<String, String>,
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
