//! What can go wrong, grouped by what the caller does about it.

use std::{io, path::PathBuf};

use tombolo_core::{Actor, DecodeError, NamespaceId, ShardId};

/// Why the data store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Stop the other process, or choose another directory.
    #[error("{}: another process has this data store open", dir.display())]
    Locked { dir: PathBuf },
    /// Start a newer version of the program.
    #[error("{}: data format {found} is newer than {known}, the latest this version knows", dir.display())]
    NewerFormat { dir: PathBuf, found: u32, known: u32 },
    /// The store was made by a version of before the first release, whose format has no upgrade.
    #[error(
        "{}: format version {found} is of before the first release, this node knows {known}: dump \
         with the version that wrote it, load into a new data directory", dir.display()
    )]
    OlderFormat { dir: PathBuf, found: u32, known: u32 },
    /// The directory belongs to another node.
    #[error("{}: belongs to `{found}`, not to `{expected}`", dir.display())]
    WrongOwner { dir: PathBuf, found: String, expected: String },
    /// Stored bytes are damaged: stop what uses them and take them from a peer.
    #[error("{}{place} is damaged: {detail}", shard_prefix(*shard))]
    Corrupt {
        /// Whose data; `None` if not known.
        shard: Option<ShardId>,
        /// The file, or the kind of value.
        place: String,
        /// What does not fit.
        detail: String,
    },
    /// The replica must stop: it cannot execute what the others execute.
    #[error("shard {shard}: log entry {index} cannot be applied: {source}")]
    Apply {
        shard: ShardId,
        /// Index of the log entry.
        index: u64,
        #[source]
        source: Box<StorageError>,
    },
    /// A log entry's commands are damaged or of a newer version.
    #[error("commands of a log entry: {0}")]
    Commands(#[from] DecodeError),
    /// Log entries came out of order; the replica must stop.
    #[error("shard {shard}: expected log entry {expected}, got {actual}")]
    OutOfOrder { shard: ShardId, expected: u64, actual: u64 },
    /// The change log no longer holds this; repair instead.
    #[error(
        "namespace {namespace}: changes of {actor} from {from_seq} on are no longer in the log"
    )]
    Trimmed { namespace: NamespaceId, actor: Actor, from_seq: u64 },
    /// No such shard.
    #[error("shard {shard} is out of range")]
    UnknownShard { shard: ShardId },
    /// Send this chunk of a snapshot again.
    #[error("snapshot chunk {number}: {problem}")]
    DamagedChunk { number: u64, problem: &'static str },
    /// Send chunks from `expected` on.
    #[error("snapshot chunk {actual} came, {expected} is next")]
    ChunkOrder { expected: u64, actual: u64 },
    /// Start the transfer again from the first chunk.
    #[error("received snapshot `{id}` is not what was sent: {problem}")]
    SnapshotMismatch { id: String, problem: &'static str },
    /// Another transfer to this shard is still open; drop it first.
    #[error("shard {shard}: another snapshot is being received")]
    ReceiveBusy { shard: ShardId },
    /// Not a name that a directory can have.
    #[error("`{id}` cannot be a snapshot id: 1 to 128 of a-z, A-Z, 0-9, `-`, `_`")]
    SnapshotId { id: String },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The engine would have had to wait for flushes or compactions; nothing was written.
    #[error("the data store is behind with flushing and compacting")]
    WouldWait,
    /// The engine refused; see its words.
    #[error("{}data store: {detail}", shard_prefix(*shard))]
    Engine {
        /// Whose data; `None` if not known.
        shard: Option<ShardId>,
        /// The engine's message.
        detail: String,
    },
}

impl StorageError {
    /// Whether stored bytes are damaged, so that only another replica can help.
    pub fn is_corruption(&self) -> bool {
        match self {
            Self::Corrupt { .. } => true,
            Self::Apply { source, .. } => source.is_corruption(),
            Self::Locked { .. }
            | Self::NewerFormat { .. }
            | Self::OlderFormat { .. }
            | Self::WrongOwner { .. }
            | Self::Commands(_)
            | Self::OutOfOrder { .. }
            | Self::Trimmed { .. }
            | Self::UnknownShard { .. }
            | Self::DamagedChunk { .. }
            | Self::ChunkOrder { .. }
            | Self::SnapshotMismatch { .. }
            | Self::ReceiveBusy { .. }
            | Self::SnapshotId { .. }
            | Self::Io { .. }
            | Self::WouldWait
            | Self::Engine { .. } => false,
        }
    }

    /// An error of the engine; `shard` says whose data was touched.
    pub(crate) fn engine(shard: Option<ShardId>, error: &rocksdb::Error) -> Self {
        let detail = error.to_string();
        let table = table_file(&detail);
        let missing = detail.contains("No such file or directory") && table.is_some();
        if error.kind() == rocksdb::ErrorKind::Corruption || missing {
            let place = table.unwrap_or_else(|| "the data store".to_owned());
            return Self::Corrupt { shard, place, detail };
        }
        // Only writes that asked not to wait are answered so.
        if error.kind() == rocksdb::ErrorKind::Incomplete {
            return Self::WouldWait;
        }
        Self::Engine { shard, detail }
    }

    /// A value that does not decode.
    pub(crate) fn value(shard: ShardId, what: &str, error: &DecodeError) -> Self {
        Self::Corrupt { shard: Some(shard), place: what.to_owned(), detail: error.to_string() }
    }

    /// A key that does not decode.
    pub(crate) fn key(shard: ShardId, what: &str) -> Self {
        let detail = "a key has the wrong length".to_owned();
        Self::Corrupt { shard: Some(shard), place: what.to_owned(), detail }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}

fn shard_prefix(shard: Option<ShardId>) -> String {
    shard.map(|shard| format!("shard {shard}: ")).unwrap_or_default()
}

/// The name of the table file or manifest that an engine message speaks of.
fn table_file(message: &str) -> Option<String> {
    let is_separator = |c: char| c.is_whitespace() || matches!(c, '/' | ':' | ',' | '\'' | '"');
    let is_file = |word: &&str| word.ends_with(".sst") || word.starts_with("MANIFEST-");
    message.split(is_separator).find(is_file).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_message_is_searched_for_the_damaged_file() {
        let message = "Corruption: block checksum mismatch: stored = 1, computed = 2 in \
                       /data/db/000012.sst offset 0 size 10";
        assert_eq!(table_file(message), Some("000012.sst".to_owned()));
        assert_eq!(table_file("Corruption: bad"), None);
    }
}
