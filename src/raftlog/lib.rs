//! The node's shared, segmented, checksummed Raft log.
//!
//! All Raft groups of a node write into one log, so that one `fdatasync` makes the waiting entries
//! of all groups durable. Callers get a [`Group`] handle per Raft group; appending puts the entries
//! in memory, hands a job to the one writer thread and returns without touching the disk.
//!
//! Map of the crate:
//!
//! - `frame`, `segment`: the bytes on disk; `watermark`: the second opinion on how long the log is.
//! - `queue`, `writer`, `checkpoint`, `evacuate`: the one thread that writes, and what it keeps track of.
//! - `helper`: the thread for slow chores (zero-filling, recycling, watermark).
//! - `index`, `cache`, `group`: what is in memory per group; reads.
//! - `recovery`, `replay`, `window`: from files back to memory, and the rule that tells a torn tail from corruption.
//!
//! Invariants:
//!
//! - **Order.** Callbacks run in submission order over all groups; a callback with `Ok` means that
//!   everything submitted before it is durable too.
//! - **No silent loss.** Only a write batch that was never acknowledged may be cut at open. Anything
//!   else that does not check out is a [`LogError`] that names the file, the offset and what to do.
//! - **Fail once.** After one failed write or sync nothing is written any more and nothing is retried.
//!
//! Not here: Raft itself, what the payloads mean, and the decision when to purge.

mod cache;
mod checkpoint;
mod error;
mod evacuate;
mod frame;
mod group;
mod helper;
mod index;
mod log;
mod metrics;
mod queue;
mod recovery;
mod replay;
mod segment;
mod types;
mod watermark;
mod window;
mod writer;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed step of a test should stop it")]
mod failure_tests;

pub use error::LogError;
pub use group::{Done, Group};
pub use log::{Config, MAX_ENTRY_BYTES, RaftLog};
pub use metrics::LogMetrics;
pub use recovery::Recovery;
pub use types::{Entry, EntryKind, GroupState, Identity, LogId, Mark, Vote};
