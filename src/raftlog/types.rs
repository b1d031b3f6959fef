//! The values that callers exchange with the log.
//!
//! They mirror Raft's notions without depending on a Raft library, so that the log can be tested
//! alone and the library replaced.

use std::fmt;

use bytes::Bytes;

/// Name of an entry: the term and the leader that wrote it, and its position in the group's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId {
    pub term: u64,
    pub node: u64,
    pub index: u64,
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "T{}-N{}.{}", self.term, self.node, self.index)
    }
}

/// The vote a replica gave; `committed` once a quorum gave the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vote {
    pub term: u64,
    pub node: u64,
    pub committed: bool,
}

impl fmt::Display for Vote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.committed { "committed" } else { "uncommitted" };
        write!(f, "T{}-N{} ({mark})", self.term, self.node)
    }
}

/// What an entry is to Raft. The numbers are on disk: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    Blank = 0,
    Normal = 1,
    Membership = 2,
}

impl EntryKind {
    pub(crate) fn from_code(code: u16) -> Option<Self> {
        match code {
            0 => Some(Self::Blank),
            1 => Some(Self::Normal),
            2 => Some(Self::Membership),
            _ => None,
        }
    }

    pub(crate) fn code(self) -> u16 {
        match self {
            Self::Blank => 0,
            Self::Normal => 1,
            Self::Membership => 2,
        }
    }
}

/// One entry of a group's log. Cloning is cheap: the payload is reference counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: LogId,
    pub kind: EntryKind,
    pub payload: Bytes,
}

/// What a group's log says at this moment, including what is not yet durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupState {
    /// The newest entry that was purged.
    pub purged: Option<LogId>,
    /// The newest entry; the purged one if nothing is left.
    pub last: Option<LogId>,
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
}

/// Who owns this log directory. Kept in the watermark file from the first start on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cluster_id: String,
    pub region: String,
    pub node_id: u64,
    /// Random text that names this very directory, so that a wiped one is not taken for it.
    pub directory_id: String,
    pub incarnation: u32,
    pub shard_count: u32,
}

/// What one group is known to have made durable: a lower bound, raised at coarse steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    pub last: Option<LogId>,
    pub vote: Option<Vote>,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.last {
            Some(last) => write!(f, "last {last}")?,
            None => write!(f, "no entries")?,
        }
        match self.vote {
            Some(vote) => write!(f, ", vote {vote}"),
            None => write!(f, ", no vote"),
        }
    }
}
