//! Decides what may be tried again, and when. Pure.
//!
//! Only what is safe is repeated:
//! * Reads, whenever no node answered.
//! * Writes that carry a request id, whenever the outcome is open: the state machine applies an
//!   id once and answers a repeat with the first outcome, so the repeat must carry the *same* id.
//! * Anything else only when the node certainly did nothing.
//!
//! Waiting grows exponentially with jitter; a server's `RetryInfo` wins. The deadline of the call
//! is the only bound on the number of attempts.
//!
//! Not here: where the next attempt goes (`router`).

use std::error::Error as _;
use std::time::Duration;
use tonic::{Code, ConnectError, Status};
use tonic_types::StatusExt;

const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Hints followed without a pause. More in a row mean that nodes disagree about the leader.
const FREE_REDIRECTS: u32 = 2;

/// Reasons of `UNAVAILABLE` that are given before anything is proposed. A proposal whose fate is
/// open is answered with another one (`NO_QUORUM`, `REPLICA_FAILED`, `OUTCOME_UNKNOWN`).
const REFUSALS: [&str; 7] = [
    "CLOCK_OUT_OF_BOUNDS",
    "CONTEXT_AHEAD",
    "DRAINING",
    "NOT_LEADER",
    "NO_LEADER",
    "REGION_SEEDING",
    "REGION_UNREACHABLE",
];

/// What a repeat of a call could do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Safety {
    /// Changes nothing.
    Read,
    /// Carries a request id.
    Identified,
    /// A repeat might act twice.
    Once,
}

/// What to do after a failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Ask the leader instead: this node does not lead the shard. `None`: it does not know who.
    Redirect(Option<String>),
    /// Try again, through another node if `node_failed`, not before `after`.
    Retry { node_failed: bool, after: Option<Duration> },
    /// Tell the caller.
    GiveUp,
}

/// A judged failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) verdict: Verdict,
    /// The attempt certainly had no effect.
    pub(crate) harmless: bool,
}

/// Judges the status of one attempt.
pub(crate) fn judge(status: &Status, safety: Safety) -> Judgement {
    let harmless = safety == Safety::Read || is_refusal(status);
    let may_repeat = harmless || safety == Safety::Identified;
    let verdict = if is_transport(status) {
        repeat_if(may_repeat, true, None)
    } else {
        match status.code() {
            Code::Unavailable => match status.get_details_error_info() {
                Some(info) if info.reason == "NOT_LEADER" => {
                    let leader = info.metadata.get("leader").filter(|it| !it.is_empty());
                    Verdict::Redirect(leader.cloned())
                }
                Some(_) | None => repeat_if(may_repeat, false, retry_delay(status)),
            },
            Code::ResourceExhausted => match retry_delay(status) {
                Some(after) => repeat_if(may_repeat, false, Some(after)),
                None => Verdict::GiveUp,
            },
            // This node's disk fails; another may do better.
            Code::Internal => match status.get_details_error_info() {
                Some(info) if info.reason == "STORAGE_FAILED" => repeat_if(may_repeat, true, None),
                Some(_) | None => Verdict::GiveUp,
            },
            // A node that stops cancels what it has not finished.
            Code::Cancelled => repeat_if(may_repeat, false, None),
            Code::Ok
            | Code::Unknown
            | Code::InvalidArgument
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss
            | Code::Unauthenticated => Verdict::GiveUp,
        }
    };
    Judgement { verdict, harmless }
}

fn repeat_if(allowed: bool, node_failed: bool, after: Option<Duration>) -> Verdict {
    if allowed { Verdict::Retry { node_failed, after } } else { Verdict::GiveUp }
}

fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info().and_then(|info| info.retry_delay)
}

/// The connection failed, rather than the server having answered: only then has a status a source.
fn is_transport(status: &Status) -> bool {
    status.source().is_some()
}

/// The server said no before doing anything, or was never reached.
fn is_refusal(status: &Status) -> bool {
    if is_transport(status) {
        let mut source = status.source();
        while let Some(error) = source {
            if error.is::<ConnectError>() {
                return true;
            }
            source = error.source();
        }
        return false;
    }
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated => true,
        Code::Unavailable => {
            let info = status.get_details_error_info();
            info.is_some_and(|info| REFUSALS.contains(&info.reason.as_str()))
        }
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal
        | Code::DataLoss => false,
    }
}

/// Pauses between the attempts of one call.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
    redirects: u32,
}

impl Backoff {
    /// The pause before the next attempt; `asked` is the server's `RetryInfo`.
    pub(crate) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let cap = BACKOFF_MIN.saturating_mul(1 << self.attempts.min(6)).min(BACKOFF_MAX);
        self.attempts += 1;
        // Between half the cap and the cap: never zero, never in step with other clients.
        let jittered = cap.mul_f64(0.5 + rand::random::<f64>() / 2.0);
        asked.map_or(jittered, |asked| asked + jittered / 2)
    }

    /// The pause before following a hint: none, unless nodes keep pointing at each other.
    pub(crate) fn next_redirect(&mut self) -> Duration {
        self.redirects += 1;
        if self.redirects <= FREE_REDIRECTS { Duration::ZERO } else { self.next(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    fn with_reason(code: Code, reason: &str, metadata: &[(&str, &str)]) -> Status {
        let pairs = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let details = ErrorDetails::with_error_info(
            reason,
            "tombolo",
            pairs.collect::<std::collections::HashMap<_, _>>(),
        );
        Status::with_error_details(code, "no", details)
    }

    #[test]
    fn a_hint_names_the_leader_and_is_harmless_for_every_call() {
        let status = with_reason(Code::Unavailable, "NOT_LEADER", &[("leader", "h:1")]);
        for safety in [Safety::Read, Safety::Identified, Safety::Once] {
            let judged = judge(&status, safety);
            assert_eq!(judged.verdict, Verdict::Redirect(Some("h:1".into())));
            assert!(judged.harmless);
        }
    }

    #[test]
    fn an_open_outcome_is_repeated_only_with_a_request_id() {
        let status = with_reason(Code::Unavailable, "OUTCOME_UNKNOWN", &[]);
        let retry = Verdict::Retry { node_failed: false, after: None };
        assert_eq!(judge(&status, Safety::Read).verdict, retry);
        assert_eq!(judge(&status, Safety::Identified).verdict, retry);
        assert_eq!(judge(&status, Safety::Once).verdict, Verdict::GiveUp);
        assert!(!judge(&status, Safety::Identified).harmless);
    }

    #[test]
    fn exhaustion_is_repeated_only_when_the_server_says_when() {
        let plain = Status::resource_exhausted("full");
        assert_eq!(judge(&plain, Safety::Read).verdict, Verdict::GiveUp);
        let delay = Duration::from_millis(70);
        let details = ErrorDetails::with_retry_info(Some(delay));
        let asked = Status::with_error_details(Code::ResourceExhausted, "slow down", details);
        let retry = Verdict::Retry { node_failed: false, after: Some(delay) };
        assert_eq!(judge(&asked, Safety::Once).verdict, retry);
    }

    #[test]
    fn pauses_grow_to_a_bound_and_respect_the_server() {
        let mut backoff = Backoff::default();
        for attempt in 0..40 {
            let cap = BACKOFF_MIN.saturating_mul(1 << attempt.min(6)).min(BACKOFF_MAX);
            let pause = backoff.next(None);
            assert!(pause >= cap / 2 && pause <= cap, "attempt {attempt}: {pause:?}");
        }
        assert!(backoff.next(Some(Duration::from_secs(9))) >= Duration::from_secs(9));
    }
}
