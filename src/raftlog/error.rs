//! What can go wrong, grouped by what the caller should do next.
//!
//! Messages are for operators: they name the file and the offset, and say what to do.

use std::{io, path::PathBuf};

use crate::types::{Identity, LogId, Mark};

/// Why the log cannot be opened or an operation is refused.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    // --- Fix the environment, then start again. ---
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// Another process (or another handle in this one) has the directory open.
    #[error("{} is in use by another process; stop it before starting this one", dir.display())]
    Locked { dir: PathBuf },
    /// The configuration makes no sense.
    #[error("raft log configuration: {reason}")]
    InvalidConfig { reason: String },
    /// Written by a newer release.
    #[error("{} holds {what}, which this release does not know; start a newer release", file.display())]
    Unsupported { file: PathBuf, what: String },
    /// The directory belongs to another node.
    #[error(
        "this directory belongs to node {} of region {} in cluster {} (directory {}), not to node {} of region {} \
         in cluster {} (directory {}); correct data_dir or node_id", found.node_id, found.region, found.cluster_id,
        found.directory_id, wanted.node_id, wanted.region, wanted.cluster_id, wanted.directory_id
    )]
    IdentityMismatch { found: Box<Identity>, wanted: Box<Identity> },

    // --- Acknowledged data is damaged or gone: replace this replica. ---
    /// Bytes that were synced no longer check out.
    #[error(
        "{} is corrupt at offset {offset}: {reason}; this is synced data, so it is not repaired silently: keep the \
         file for analysis, and replace this node by one with an empty data directory and a new node id",
        file.display()
    )]
    Corrupt { file: PathBuf, offset: u64, reason: String },
    /// The file is not a segment of a Raft log.
    #[error("{} is not a raft log segment: {reason}; remove it if it does not belong here", file.display())]
    NotASegment { file: PathBuf, reason: String },
    /// A segment is missing from the sequence.
    #[error(
        "segment {} is missing ({reason}); restore that file, or replace this node by one with an empty data \
         directory and a new node id", file.display()
    )]
    MissingSegment { file: PathBuf, reason: String },
    /// A live entry is in none of the segments.
    #[error(
        "group {group}: entry {index} is in none of the segments, the oldest of which is {}; an older segment is \
         missing: restore it, or replace this node by one with an empty data directory and a new node id",
        oldest.display()
    )]
    MissingEntry { group: u64, index: u64, oldest: PathBuf },
    /// The log is shorter, or its vote older, than what was once durable.
    #[error(
        "group {group}: the log says {found}, but {watermark} was durable before; this replica lost acknowledged \
         data and must not vote again: replace it by a node with an empty data directory and a new node id"
    )]
    BehindWatermark { group: u64, watermark: Mark, found: Mark },
    /// Neither copy in the watermark file is readable.
    #[error(
        "both copies in {} are unreadable, so lost data could not be noticed; restore the file, or replace this \
         node by one with an empty data directory and a new node id", file.display()
    )]
    WatermarkUnreadable { file: PathBuf },
    /// There are segments, but no watermark file.
    #[error(
        "{} is missing beside existing segments, so lost data could not be noticed; restore the file, or replace \
         this node by one with an empty data directory and a new node id", file.display()
    )]
    WatermarkMissing { file: PathBuf },

    // --- The request is wrong; the log is fine. ---
    /// The entries do not continue the group's log.
    #[error("group {group}: entry {found} does not follow; expected index {expected}")]
    Gap { group: u64, expected: u64, found: u64 },
    /// The entry cannot be stored.
    #[error("group {group}: entry {index} has {bytes} bytes, the most is {max_bytes}")]
    TooLarge { group: u64, index: u64, bytes: u64, max_bytes: u64 },
    /// One group too many for this segment size.
    #[error(
        "group {group} is one more than the {max} groups that this segment size can hold; raise segment_bytes"
    )]
    TooManyGroups { group: u64, max: usize },
    /// The index was purged.
    #[error("group {group}: entry {index} was purged (everything up to {purged})")]
    Purged { group: u64, index: u64, purged: LogId },
    /// The index lies behind the end.
    #[error("group {group}: there is no entry {index}; the next one to be written is {next}")]
    Missing { group: u64, index: u64, next: u64 },
    /// The named entry is another one in this log.
    #[error("group {group}: the log has {found} where {wanted} was named")]
    IdMismatch { group: u64, wanted: LogId, found: LogId },

    // --- The process must stop. ---
    /// A write or sync failed earlier; what was in flight is unknown.
    #[error("the raft log failed and must not be used any more: {reason}")]
    Failed { reason: String },
    /// `close` was called.
    #[error("the raft log is closed")]
    Closed,
}

impl LogError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
