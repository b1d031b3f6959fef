//! Between the link's messages and the types of `core`. Nothing else knows the wire format.

use std::collections::BTreeSet;

use tombolo_cluster::{Region, Topology};
use tombolo_core::{
    Actor, Member, MemberState, Members, NamespaceId, RegionId, VersionVector,
    vector::{ACTORS_MAX, SEQ_MAX},
};
use tombolo_proto::internal::v1 as pb;
use tonic::Status;

use crate::LINK_PROTOCOL;

pub(crate) fn encode_frontier(frontier: &VersionVector) -> Vec<pb::VectorEntry> {
    frontier
        .iter()
        .map(|(actor, seq)| pb::VectorEntry {
            region: u32::from(actor.region.0),
            incarnation: actor.incarnation,
            seq,
        })
        .collect()
}

pub(crate) fn decode_frontier(entries: Vec<pb::VectorEntry>) -> Result<VersionVector, Status> {
    if entries.len() > ACTORS_MAX {
        return Err(Status::invalid_argument(format!("a vector of {} actors", entries.len())));
    }
    entries
        .into_iter()
        .map(|entry| {
            if entry.seq > SEQ_MAX {
                let what = format!("sequence number {} is too large", entry.seq);
                return Err(Status::invalid_argument(what));
            }
            let region = decode_region(entry.region)?;
            Ok((Actor { region, incarnation: entry.incarnation }, entry.seq))
        })
        .collect()
}

pub(crate) fn decode_region(number: u32) -> Result<RegionId, Status> {
    u16::try_from(number)
        .map(RegionId)
        .map_err(|_| Status::invalid_argument(format!("region number {number} exceeds 65535")))
}

pub(crate) fn encode_member(region: RegionId, member: Member) -> pb::RegionMember {
    pb::RegionMember {
        region: u32::from(region.0),
        incarnation: member.incarnation,
        state: u32::from(member.state.to_byte()),
    }
}

pub(crate) fn decode_member(member: pb::RegionMember) -> Result<(RegionId, Member), Status> {
    let state = u8::try_from(member.state).ok().and_then(MemberState::from_byte);
    let state = state.ok_or_else(|| {
        let what = format!("region state {} is not known to this version", member.state);
        Status::invalid_argument(what)
    })?;
    let region = decode_region(member.region)?;
    Ok((region, Member { incarnation: member.incarnation, state }))
}

pub(crate) fn encode_members(members: &Members) -> Vec<pb::RegionMember> {
    members.iter().map(|(region, member)| encode_member(region, member)).collect()
}

pub(crate) fn decode_members(members: Vec<pb::RegionMember>) -> Result<Members, Status> {
    members.into_iter().map(decode_member).collect()
}

/// A checksum over what is sent in one message.
pub(crate) fn checksum<'a>(parts: impl IntoIterator<Item = &'a bytes::Bytes>) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    for part in parts {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.digest()
}

/// Who calls `to`: the first thing on every stream. `own` is the caller's present life.
pub fn link_identity(topology: &Topology, own: Member, to: &Region) -> pb::LinkIdentity {
    pb::LinkIdentity {
        cluster_id: topology.cluster_id.clone(),
        from_region: topology.local_name(),
        to_region: to.name.clone(),
        from_region_number: u32::from(topology.region.0),
        shard_count: u32::from(topology.shard_count),
        protocol: LINK_PROTOCOL,
        from_incarnation: own.incarnation,
        from_joining: own.state.is_joining(),
    }
}

/// Checks who is at the other end, and answers its region, in its present life.
///
/// # Errors
/// FAILED_PRECONDITION, naming what differs and what to do.
pub(crate) fn check_identity(
    topology: &Topology,
    identity: Option<pb::LinkIdentity>,
) -> Result<Actor, Status> {
    let identity =
        identity.ok_or_else(|| Status::invalid_argument("the first message has no identity"))?;
    let refuse = |what: String| Err(Status::failed_precondition(what));
    if identity.cluster_id != topology.cluster_id {
        return refuse(format!(
            "cluster `{}` called cluster `{}`: check cluster_id and the link addresses in the \
             caller's configuration",
            identity.cluster_id, topology.cluster_id
        ));
    }
    if identity.to_region != topology.local_name() {
        return refuse(format!(
            "region `{}` called region `{}` but this is region `{}`: check [[regions]].link in \
             the caller's configuration",
            identity.from_region,
            identity.to_region,
            topology.local_name()
        ));
    }
    if identity.shard_count != u32::from(topology.shard_count) {
        return refuse(format!(
            "region `{}` has {} shards and region `{}` has {}: all regions of a cluster have the \
             same number, fixed when it is created",
            identity.from_region,
            identity.shard_count,
            topology.local_name(),
            topology.shard_count
        ));
    }
    if identity.protocol != LINK_PROTOCOL {
        return refuse(format!(
            "region `{}` speaks link protocol {} and this node {LINK_PROTOCOL}: upgrade the older",
            identity.from_region, identity.protocol
        ));
    }
    match topology.region_named(&identity.from_region) {
        Some(region) if u32::from(region.id.0) == identity.from_region_number => {
            Ok(Actor { region: region.id, incarnation: identity.from_incarnation })
        }
        Some(region) => refuse(format!(
            "region `{}` calls itself number {} but is number {} here: [[regions]] must be the \
             same everywhere",
            identity.from_region, identity.from_region_number, region.id
        )),
        None => refuse(format!(
            "region `{}` is no member of this cluster: `tombolo ctl region add {} --number {}` admits it",
            identity.from_region, identity.from_region, identity.from_region_number
        )),
    }
}

pub(crate) fn open(identity: pb::LinkIdentity, shard: u32) -> pb::PullRequest {
    let open = pb::Open { identity: Some(identity), shard };
    pb::PullRequest { body: Some(pb::pull_request::Body::Open(open)) }
}

pub(crate) fn subscribe(
    namespace: NamespaceId,
    frontier: &VersionVector,
    relayed: &BTreeSet<RegionId>,
) -> pb::PullRequest {
    let subscribe = pb::Subscribe {
        namespace: namespace.0,
        frontier: encode_frontier(frontier),
        origins: relayed.iter().map(|origin| u32::from(origin.0)).collect(),
    };
    pb::PullRequest { body: Some(pb::pull_request::Body::Subscribe(subscribe)) }
}

pub(crate) fn acknowledge(namespace: NamespaceId, frontier: &VersionVector) -> pb::PullRequest {
    let frontier = encode_frontier(frontier);
    let acknowledge = pb::Acknowledge { namespace: namespace.0, frontier };
    pb::PullRequest { body: Some(pb::pull_request::Body::Acknowledge(acknowledge)) }
}
