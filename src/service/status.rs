//! The one place where a shard's refusal becomes a gRPC status.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use tombolo_cluster::Topology;
use tombolo_core::{
    DecodeError, MemberState, ShardId,
    key::{KEY_BYTES_MAX, KeyError},
};
use tombolo_shard::ShardError;
use tonic::Status;
use tonic_types::StatusExt;

use crate::reason::Reason;

/// Longest token that a status carries, in bytes: headers are bounded.
const TOKEN_BYTES_MAX: usize = 4 << 10;

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

/// A status with a token in its metadata, if there is one and it is short enough.
pub(crate) fn with_token(status: &Status, name: &str, token: &Bytes) -> Status {
    let mut details = status.get_error_details();
    let fits = (1..=TOKEN_BYTES_MAX).contains(&token.len());
    let Some(info) = details.error_info().filter(|_| fits) else { return status.clone() };
    let (reason, domain) = (info.reason.clone(), info.domain.clone());
    let mut metadata = info.metadata.clone();
    metadata.insert(name.to_owned(), STANDARD.encode(token));
    details.set_error_info(reason, domain, metadata);
    Status::with_error_details(status.code(), status.message(), details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_the_token_beside_what_it_had_unless_it_is_too_long() {
        let status = Reason::NoLeader.status("shard 3", &[("shard", "3".into())]);
        let info = |status: &Status| status.get_details_error_info().unwrap();

        let short = with_token(&status, "resume_token", &Bytes::from_static(b"token"));
        assert_eq!(Reason::of(&short), Some(Reason::NoLeader));
        assert_eq!(info(&short).metadata["shard"], "3");
        assert_eq!(info(&short).metadata["resume_token"], "dG9rZW4=");
        assert!(short.get_details_retry_info().is_some());

        for token in [Bytes::new(), vec![0; TOKEN_BYTES_MAX + 1].into()] {
            let without = with_token(&status, "resume_token", &token);
            assert!(!info(&without).metadata.contains_key("resume_token"));
        }
        let cancelled = Status::cancelled("gone");
        let foreign = with_token(&cancelled, "resume_token", &Bytes::from_static(b"token"));
        assert!(foreign.get_details_error_info().is_none());
    }
}
