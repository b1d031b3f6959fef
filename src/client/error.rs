//! Errors of a call, grouped by what the caller should do next.
//!
//! A server's refusal is a gRPC status with a `google.rpc.ErrorInfo` of domain `tombolo`; its
//! `reason` is a key of the error catalogue and is kept verbatim in [`Detail`].
//!
//! Not here: what is tried again before an error reaches the caller (`retry`).

use crate::types::Dot;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::io::ErrorKind;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// What went wrong, in the server's words where it had any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detail {
    pub code: Code,
    /// Key of the error catalogue, such as `NOT_LEADER`. `None` if the server gave none, or if it
    /// was never reached.
    pub reason: Option<String>,
    pub message: String,
    /// Facts that belong to the reason, such as `leader` or `shard`.
    pub metadata: BTreeMap<String, String>,
}

impl Detail {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Box<Self> {
        let message = message.into();
        Box::new(Self { code, reason: None, message, metadata: BTreeMap::new() })
    }

    pub(crate) fn from_status(status: &Status) -> Box<Self> {
        let info = status.get_details_error_info();
        let said = match status.message() {
            "" => status.code().description(),
            said => said,
        };
        let message = match root_cause(status) {
            Some(cause) if cause != said => format!("{said}: {cause}"),
            Some(_) | None => said.to_owned(),
        };
        Box::new(Self {
            code: status.code(),
            reason: info.as_ref().map(|info| info.reason.clone()).filter(|it| !it.is_empty()),
            message,
            metadata: info.map(|info| info.metadata.into_iter().collect()).unwrap_or_default(),
        })
    }
}

/// What lies under a failed connection, which the status itself only names as such.
fn root_cause(status: &Status) -> Option<String> {
    let root = std::iter::successors(status.source(), |&error| error.source()).last()?;
    let io = root.downcast_ref::<std::io::Error>();
    Some(match io.map(std::io::Error::kind) {
        Some(ErrorKind::ConnectionRefused) => "connection refused".to_owned(),
        Some(_) | None => match root.to_string() {
            text if text.starts_with("failed to lookup address") => format!("unknown host, {text}"),
            text => text,
        },
    })
}

impl std::fmt::Display for Detail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.reason {
            Some(reason) => write!(f, "{} ({reason})", self.message),
            None => write!(f, "{}", self.message),
        }
    }
}

/// Why a call failed. Each variant asks the caller for one action.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Change the request: it can never succeed as it is.
    #[error("{detail}")]
    Invalid { detail: Box<Detail> },
    /// Name something that exists. Absent *keys* are not errors; namespaces and regions are.
    #[error("{detail}")]
    NotFound { detail: Box<Detail> },
    /// Read again, then decide: the state is not what the request assumed.
    #[error("{detail}")]
    Precondition { detail: Box<Detail> },
    /// Try later: no node took the call within the deadline, or the server sheds load.
    #[error("{detail}{}", unknown(.outcome_unknown))]
    Unavailable {
        detail: Box<Detail>,
        /// What the server asked to wait, if it did.
        retry_after: Option<Duration>,
        /// True if a write may have been applied all the same.
        outcome_unknown: bool,
    },
    /// Out of time. A write may have been applied: repeat it with the same request id to learn.
    #[error("{detail}{}", unknown(.outcome_unknown))]
    Deadline {
        detail: Box<Detail>,
        /// False only for reads and for writes that certainly never reached a leader.
        outcome_unknown: bool,
        /// The write stands under this dot and only its acknowledgements by other regions are
        /// missing.
        dot: Option<Dot>,
        /// Covers the write that stands: its session has taken it in. Empty without a dot.
        token: Bytes,
    },
    /// Show other credentials.
    #[error("{detail}")]
    Denied { detail: Box<Detail> },
    /// Report it: the server failed.
    #[error("{detail}{}", unknown(.outcome_unknown))]
    Internal { detail: Box<Detail>, outcome_unknown: bool },
    /// Report it: the server's reply makes no sense to this version of the client. A write that
    /// was answered like this was applied.
    #[error("unexpected reply: {message}")]
    Protocol { message: String },
}

fn unknown(outcome_unknown: &bool) -> &'static str {
    if *outcome_unknown { "; whether the write was applied is unknown" } else { "" }
}

impl Error {
    /// Groups a status. `may_have_applied`: some attempt of a write may have taken effect.
    pub(crate) fn from_status(status: &Status, may_have_applied: bool) -> Self {
        let detail = Detail::from_status(status);
        let outcome_unknown = may_have_applied;
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => {
                Self::Invalid { detail }
            }
            Code::NotFound => Self::NotFound { detail },
            Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => {
                Self::Precondition { detail }
            }
            Code::Unavailable | Code::ResourceExhausted | Code::Cancelled => Self::Unavailable {
                retry_after: status.get_details_retry_info().and_then(|info| info.retry_delay),
                detail,
                outcome_unknown,
            },
            Code::DeadlineExceeded => {
                let dot = detail.metadata.get("dot").and_then(|text| text.parse().ok());
                let token = detail.metadata.get("session_token");
                let token = token.and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default();
                // With a dot, the write stands and only acknowledgements are missing.
                let outcome_unknown = outcome_unknown && dot.is_none();
                Self::Deadline { detail, outcome_unknown, dot, token: token.into() }
            }
            Code::PermissionDenied | Code::Unauthenticated => Self::Denied { detail },
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => {
                Self::Internal { detail, outcome_unknown }
            }
        }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { detail: Detail::new(Code::InvalidArgument, message) }
    }

    /// No node will ever take a request of that size; it was not applied.
    pub(crate) fn message_too_large(found: &str) -> Self {
        let message = format!(
            "{found}: split the request, or raise `limits.max_message_bytes` on every node and \
             `ClientConfig::max_message_bytes`"
        );
        let mut detail = Detail::new(Code::InvalidArgument, message);
        detail.reason = Some("MESSAGE_TOO_LARGE".to_owned());
        Self::Invalid { detail }
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::Protocol { message: message.into() }
    }

    /// Everything the server said; `None` for [`Error::Protocol`].
    pub fn detail(&self) -> Option<&Detail> {
        match self {
            Self::Invalid { detail }
            | Self::NotFound { detail }
            | Self::Precondition { detail }
            | Self::Unavailable { detail, .. }
            | Self::Deadline { detail, .. }
            | Self::Denied { detail }
            | Self::Internal { detail, .. } => Some(detail),
            Self::Protocol { .. } => None,
        }
    }

    /// The key of the error catalogue, such as `KEY_TOO_LARGE`.
    pub fn reason(&self) -> Option<&str> {
        self.detail().and_then(|detail| detail.reason.as_deref())
    }

    /// The gRPC code; `Internal` for a reply that makes no sense.
    pub fn code(&self) -> Code {
        self.detail().map_or(Code::Internal, |detail| detail.code)
    }

    /// Whether the same call, with the same request id, can succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Deadline { .. } => true,
            Self::Invalid { .. }
            | Self::NotFound { .. }
            | Self::Precondition { .. }
            | Self::Denied { .. }
            | Self::Internal { .. }
            | Self::Protocol { .. } => false,
        }
    }

    /// Whether a write may have been applied although it failed. Never true for reads.
    pub fn outcome_unknown(&self) -> bool {
        match self {
            Self::Unavailable { outcome_unknown, .. }
            | Self::Deadline { outcome_unknown, .. }
            | Self::Internal { outcome_unknown, .. } => *outcome_unknown,
            Self::Invalid { .. }
            | Self::NotFound { .. }
            | Self::Precondition { .. }
            | Self::Denied { .. }
            | Self::Protocol { .. } => false,
        }
    }
}

/// The result of a call.
pub type Result<T, E = Error> = std::result::Result<T, E>;
