//! The one place where a shard's refusal becomes a gRPC status.

use tombolo_cluster::Topology;
use tombolo_core::{
    DecodeError, MemberState, ShardId,
    key::{KEY_BYTES_MAX, KeyError},
};
use tombolo_shard::ShardError;
use tonic::Status;

use crate::reason::Reason;

/// The status of a shard's refusal.
pub(crate) fn of_shard_error(topology: &Topology, error: ShardError) -> Status {
    let text = error.to_string();
    match error {
        ShardError::NotLeader { shard, leader: None } => {
            Reason::NoLeader.status(text, &[("shard", shard.to_string())])
        }
        ShardError::NotLeader { shard, leader: Some(leader) } => {
            let mut metadata = vec![("shard", shard.to_string())];
            if let Some(node) = topology.node(leader) {
                metadata.push(("leader", node.client.clone()));
                metadata.push(("leader_node_id", leader.to_string()));
            }
            Reason::NotLeader.status(text, &metadata)
        }
        ShardError::NoQuorum { shard } => Reason::NoQuorum.status(text, &of_shard(shard)),
        ShardError::OutcomeUnknown { shard, .. } => {
            Reason::OutcomeUnknown.status(text, &of_shard(shard))
        }
        ShardError::Overloaded { shard } => Reason::Overloaded.status(text, &of_shard(shard)),
        ShardError::RequestReused { shard } => {
            Reason::RequestIdInvalid.status(text, &of_shard(shard))
        }
        ShardError::Unreadable { shard, .. } => {
            Reason::RequestInvalid.status(text, &of_shard(shard))
        }
        ShardError::DiskFull { shard, .. } => Reason::DiskFull.status(text, &of_shard(shard)),
        ShardError::ClockOutOfBounds { shard, refused } => {
            let offset = ("offset_ms", refused.offset_ms.to_string());
            let node = ("node_id", topology.node.to_string());
            let metadata = [("shard", shard.to_string()), node, offset];
            Reason::ClockOutOfBounds.status(text, &metadata)
        }
        ShardError::NotCaughtUp { shard, needed, frontier } => {
            let behind = needed.events_beyond(&frontier);
            Reason::SessionNotCaughtUp.status(
                format!("region `{}` is {behind} events behind: {text}", topology.local_name()),
                &[("shard", shard.to_string()), ("events_behind", behind.to_string())],
            )
        }
        ShardError::NotActive { shard, member } => {
            let reason = match member.state {
                MemberState::Joining | MemberState::Recovering => Reason::RegionSeeding,
                MemberState::Fenced | MemberState::Removed => Reason::RegionFenced,
                MemberState::Regressed => Reason::CountersWentBack,
                MemberState::Active => Reason::Internal,
            };
            reason.status(text, &of_shard(shard))
        }
        ShardError::SourceOut { shard } => Reason::Internal.status(text, &of_shard(shard)),
        ShardError::DeadlineExceeded { shard } => Reason::Deadline.status(text, &of_shard(shard)),
        ShardError::Stopped { shard } => Reason::ReplicaFailed.status(text, &of_shard(shard)),
        ShardError::TooLarge { .. } => Reason::BatchTooLarge.status(text, &[]),
        ShardError::Storage(error) => {
            tracing::error!(%error, "a replica's data cannot be read");
            Reason::StorageFailed.status(text, &[])
        }
    }
}

fn of_shard(shard: ShardId) -> [(&'static str, String); 1] {
    [("shard", shard.to_string())]
}

/// The status of an unusable key.
pub(crate) fn of_key_error(error: KeyError) -> Status {
    match error {
        KeyError::Empty => Reason::KeyEmpty.status(error.to_string(), &[]),
        KeyError::TooLong { .. } => {
            let limit = [("max_bytes", KEY_BYTES_MAX.to_string())];
            Reason::KeyTooLong.status(error.to_string(), &limit)
        }
    }
}

/// The status of a token that cannot be used.
pub(crate) fn of_token_error(reason: Reason, error: &DecodeError) -> Status {
    reason.status(error.to_string(), &[])
}

/// The status of something that this version does not serve.
pub(crate) fn not_implemented(what: &str) -> Status {
    Reason::NotImplemented.status(format!("{what} is not served by this version"), &[])
}
