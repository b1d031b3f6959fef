//! Why a shard did not do what was asked. Each variant asks the caller for one action.

use tombolo_consensus::{ProposeError, ReadError};
use tombolo_core::clock_guard::Standing;
use tombolo_core::{DecodeError, Member, MemberState, NodeId, ShardId, VersionVector};
use tombolo_storage::StorageError;

use crate::clock::ClockRefused;

/// Why a shard did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// Ask the leader. Nothing was done.
    #[error("this node does not lead shard {shard}")]
    NotLeader {
        /// The shard.
        shard: ShardId,
        /// Who leads, if known; an election may be running.
        leader: Option<NodeId>,
    },
    /// The leader cannot reach a majority now. Nothing was done; try again.
    #[error("the leader of shard {shard} cannot reach a majority of the region's nodes")]
    NoQuorum {
        /// The shard.
        shard: ShardId,
    },
    /// Repeat with the same request id to learn the outcome.
    #[error("the outcome of the write to shard {shard} is unknown: {reason}")]
    OutcomeUnknown {
        /// The shard.
        shard: ShardId,
        /// What happened.
        reason: String,
    },
    /// Too many writes are waiting. Nothing was done; try again later.
    #[error("too many writes wait for shard {shard}")]
    Overloaded {
        /// The shard.
        shard: ShardId,
    },
    /// The leader's disk is nearly full. Nothing was done.
    #[error(
        "the disk of the node that leads shard {shard} is nearly full: {free_bytes} bytes free, \
         and storage.reserve_bytes is {reserve_bytes}"
    )]
    DiskFull {
        /// The shard.
        shard: ShardId,
        /// What is free.
        free_bytes: u64,
        /// What must stay free.
        reserve_bytes: u64,
    },
    /// The leader's clock differs too much from most of its region's, or was not compared yet. Nothing
    /// was done; another node will lead in a moment.
    #[error("the clock of the node that leads shard {shard} {}", describe_clock(refused))]
    ClockOutOfBounds {
        /// The shard.
        shard: ShardId,
        /// How the clock stands.
        refused: ClockRefused,
    },
    /// This region has not applied what the caller has seen elsewhere.
    #[error("shard {shard} has applied {frontier} and the caller has seen {needed}")]
    NotCaughtUp {
        /// The shard.
        shard: ShardId,
        /// What the caller has seen.
        needed: VersionVector,
        /// What is applied here.
        frontier: VersionVector,
    },
    /// The deadline passed before anything was proposed.
    #[error("the deadline passed while waiting for shard {shard}")]
    DeadlineExceeded {
        /// The shard.
        shard: ShardId,
    },
    /// The command does not fit one log entry. Nothing was done; split it.
    #[error("the write to shard {shard} is too large: {reason}")]
    TooLarge {
        /// The shard.
        shard: ShardId,
        /// How large, and the limit.
        reason: String,
    },
    /// The request's id was used for another write. Nothing was done.
    #[error("the request id was used for another write to shard {shard}")]
    RequestReused {
        /// The shard.
        shard: ShardId,
    },
    /// The command has a value that replicas refuse. Nothing was done.
    #[error("the request to shard {shard} has a value that cannot be stored: {error}")]
    Unreadable {
        /// The shard.
        shard: ShardId,
        /// What the replicas would have said.
        error: DecodeError,
    },
    /// This region takes no writes, or does not have all data yet. Nothing was done.
    #[error(
        "shard {shard} of this region is {}, in incarnation {}",
        describe(member.state),
        member.incarnation
    )]
    NotActive {
        /// The shard.
        shard: ShardId,
        /// What this shard knows of its region.
        member: Member,
    },
    /// The region that something came from is shut out, or in another incarnation. Nothing was done.
    #[error(
        "what came to shard {shard} is from a region that is shut out, or a former life of one"
    )]
    SourceOut {
        /// The shard.
        shard: ShardId,
    },
    /// This replica has stopped.
    #[error("the replica of shard {shard} on this node has stopped")]
    Stopped {
        /// The shard.
        shard: ShardId,
    },
    /// The replica's data cannot be read.
    #[error("the replica's data cannot be read")]
    Storage(#[from] StorageError),
}

/// Why a clock stamps nothing, as part of a sentence.
fn describe_clock(refused: &ClockRefused) -> String {
    match (refused.standing, refused.offset_ms) {
        (Standing::Unheard, _) => {
            "is not known to agree with those of a majority of the region's nodes yet".to_owned()
        }
        (_, ..0) => format!("is {} ms behind those of most of its region", -refused.offset_ms),
        (_, ahead_ms) => format!("is {ahead_ms} ms ahead of those of most of its region"),
    }
}

/// A region's state, as part of a sentence.
const fn describe(state: MemberState) -> &'static str {
    match state {
        MemberState::Joining => "being seeded",
        MemberState::Recovering => "being recovered",
        MemberState::Active => "active",
        MemberState::Regressed => "behind what it has told other regions",
        MemberState::Fenced => "fenced: the other regions go on without it",
        MemberState::Removed => "removed",
    }
}

impl ShardError {
    pub(crate) fn from_propose(shard: ShardId, error: ProposeError) -> Self {
        match error {
            ProposeError::NotLeader { leader } => Self::NotLeader { shard, leader },
            ProposeError::Unknown { reason } => Self::OutcomeUnknown { shard, reason },
            ProposeError::Overloaded => Self::Overloaded { shard },
            ProposeError::Stopped => Self::Stopped { shard },
            ProposeError::TooLarge { .. } => Self::TooLarge { shard, reason: error.to_string() },
        }
    }

    pub(crate) fn from_read(shard: ShardId, error: ReadError) -> Self {
        match error {
            ReadError::NotLeader { leader } => Self::NotLeader { shard, leader },
            ReadError::NoQuorum => Self::NoQuorum { shard },
            ReadError::Stopped => Self::Stopped { shard },
        }
    }
}
