//! Histories: what clients asked of a cluster, what they were told, and what was done to it.
//!
//! One event a line, in the vocabulary of Jepsen, so that other checkers can read a run too. Every
//! operation of a client is two events, its invocation and its completion; a fault is one event of
//! the process `nemesis`.
//!
//! Invariants:
//! * Times are nanoseconds of one monotonic clock, read by the one process that issues all
//!   operations, so real-time order between any two events is sound.
//! * A completion says `ok`, `fail` (certainly without effect) or `info` (nobody knows). A process
//!   whose operation ended with `info` never acts again.
//!
//! Not here: what a history must satisfy (`tombolo-jepsen-check`), who writes one (the harness).

mod event;
mod jsonl;

pub use event::{Event, Facts, Kind, Process, Revision};
pub use jsonl::{HistoryError, Writer, read};

/// All events of a run, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// By index.
    pub events: Vec<Event>,
}
