//! The one openraft type configuration, and conversions to the log's, the store's and the wire's
//! own types.
//!
//! openraft's types stop at this crate: what reaches a disk or a socket is encoded by our own
//! messages, so that a new openraft version changes neither.
//!
//! Invariants:
//! * A command is carried as [`Bytes`] from the caller to the log and the wire; cloning an entry
//!   is a reference count, and nothing on the replication path decodes it.
//! * A membership is stored as one version byte and a protobuf message.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use openraft::alias::{
    EntryOf, LogIdOf, SnapshotMetaOf, StoredMembershipOf, VoteOf, WriteResponderOf,
};
use openraft::impls::leader_id_adv::LeaderId;
use openraft::raft::responder::Responder;
use openraft::{EntryPayload, OptionalSend};
use prost::Message;
use tombolo_core::Outcome;
use tombolo_proto::internal::v1 as pb;
use tombolo_raftlog as raftlog;
use tombolo_storage::Position;

/// Version byte in front of a stored membership.
const MEMBERSHIP_VERSION: u8 = 1;

/// Fixes every type that openraft leaves open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TypeConfig;

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Command;
    type R = Outcomes;
    type NodeId = u64;
    type Node = Member;
    type Term = u64;
    type LeaderId = LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = EntryPayload<Command, u64, Member>;
    type Entry = openraft::impls::Entry<LeaderId<u64, u64>, Self::Payload>;
    type AsyncRuntime = openraft::impls::TokioRuntime;
    type Responder<T>
        = Callback<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub(crate) type LogId = LogIdOf<TypeConfig>;
pub(crate) type Vote = VoteOf<TypeConfig>;
pub(crate) type Entry = EntryOf<TypeConfig>;
pub(crate) type StoredMembership = StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = SnapshotMetaOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, Member>;
pub(crate) type WriteResponder = WriteResponderOf<TypeConfig>;

/// The payload of one log entry: an encoded batch of commands.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Command(pub(crate) Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({} bytes)", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the commands of one entry answered, in their order.
#[derive(Debug, Default)]
pub(crate) struct Outcomes(pub(crate) Vec<Outcome>);

/// A member of a group as the membership records it: no address, see `raft.proto`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Member {
    /// The region the member belongs to.
    pub(crate) region: String,
}

/// Receives the result of a proposal on the task that applied it, which saves one hand-over.
///
/// Must be short and must not block. Dropped without a call when the Raft core dies.
pub(crate) struct Callback<T>(Box<dyn FnOnce(T) + Send>);

impl<T> Callback<T> {
    pub(crate) fn new(call: impl FnOnce(T) + Send + 'static) -> Self {
        Self(Box::new(call))
    }
}

impl<T: OptionalSend + 'static> Responder<TypeConfig, T> for Callback<T> {
    fn on_complete(self, result: T) {
        (self.0)(result);
    }
}

pub(crate) fn bad_data(what: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

pub(crate) fn log_id(term: u64, node: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: node }, index)
}

// --- the log ------------------------------------------------------------------------------------

pub(crate) fn log_id_from_log(id: raftlog::LogId) -> LogId {
    log_id(id.term, id.node, id.index)
}

pub(crate) fn log_id_to_log(id: &LogId) -> raftlog::LogId {
    raftlog::LogId { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

pub(crate) fn vote_from_log(vote: raftlog::Vote) -> Vote {
    Vote { leader_id: LeaderId { term: vote.term, node_id: vote.node }, committed: vote.committed }
}

pub(crate) fn vote_to_log(vote: &Vote) -> raftlog::Vote {
    raftlog::Vote {
        term: vote.leader_id.term,
        node: vote.leader_id.node_id,
        committed: vote.committed,
    }
}

pub(crate) fn entry_from_log(entry: raftlog::Entry) -> Result<Entry, io::Error> {
    let payload = match entry.kind {
        raftlog::EntryKind::Blank => EntryPayload::Blank,
        raftlog::EntryKind::Normal => EntryPayload::Normal(Command(entry.payload)),
        raftlog::EntryKind::Membership => {
            EntryPayload::Membership(decode_membership(&entry.payload)?)
        }
    };
    Ok(Entry { log_id: log_id_from_log(entry.id), payload })
}

pub(crate) fn entry_to_log(entry: Entry) -> raftlog::Entry {
    let id = log_id_to_log(&entry.log_id);
    let (kind, payload) = match entry.payload {
        EntryPayload::Blank => (raftlog::EntryKind::Blank, Bytes::new()),
        EntryPayload::Normal(command) => (raftlog::EntryKind::Normal, command.0),
        EntryPayload::Membership(membership) => {
            (raftlog::EntryKind::Membership, encode_membership(&membership))
        }
    };
    raftlog::Entry { id, kind, payload }
}

// --- the data store -----------------------------------------------------------------------------

pub(crate) fn log_id_from_position(position: Position) -> LogId {
    log_id(position.term, position.node, position.index)
}

pub(crate) fn position(id: &LogId) -> Position {
    Position { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

/// The membership that a store or a snapshot recorded; empty when it recorded none.
pub(crate) fn stored_membership(
    recorded: Option<(Position, Bytes)>,
) -> Result<StoredMembership, io::Error> {
    match recorded {
        None => Ok(StoredMembership::default()),
        Some((at, encoded)) => {
            Ok(StoredMembership::new(Some(log_id_from_position(at)), decode_membership(&encoded)?))
        }
    }
}

pub(crate) fn encode_membership(membership: &Membership) -> Bytes {
    let message = pb::Membership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|voters| pb::Voters { nodes: voters.iter().copied().collect() })
            .collect(),
        members: membership
            .nodes()
            .map(|(node, member)| pb::Member { node: *node, region: member.region.clone() })
            .collect(),
    };
    let mut out = BytesMut::with_capacity(1 + message.encoded_len());
    out.put_u8(MEMBERSHIP_VERSION);
    out.put_slice(&message.encode_to_vec());
    out.freeze()
}

pub(crate) fn decode_membership(encoded: &[u8]) -> Result<Membership, io::Error> {
    let Some((&version, body)) = encoded.split_first() else {
        return Err(bad_data("membership: empty"));
    };
    if version != MEMBERSHIP_VERSION {
        return Err(bad_data(format_args!("membership: unknown version {version}")));
    }
    let message = pb::Membership::decode(body).map_err(bad_data)?;
    let configs: Vec<BTreeSet<u64>> =
        message.configs.into_iter().map(|voters| voters.nodes.into_iter().collect()).collect();
    let members: BTreeMap<u64, Member> = message
        .members
        .into_iter()
        .map(|member| (member.node, Member { region: member.region }))
        .collect();
    Membership::new(configs, members).map_err(bad_data)
}

// --- the wire -----------------------------------------------------------------------------------

pub(crate) fn log_id_from_wire(id: pb::LogId) -> LogId {
    log_id(id.term, id.node, id.index)
}

pub(crate) fn log_id_to_wire(id: &LogId) -> pb::LogId {
    pb::LogId { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

pub(crate) fn vote_from_wire(vote: pb::Vote) -> Vote {
    Vote { leader_id: LeaderId { term: vote.term, node_id: vote.node }, committed: vote.committed }
}

pub(crate) fn vote_to_wire(vote: &Vote) -> pb::Vote {
    pb::Vote { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
}

pub(crate) fn entry_to_wire(entry: Entry) -> pb::Entry {
    let entry = entry_to_log(entry);
    pb::Entry {
        id: Some(pb::LogId { term: entry.id.term, node: entry.id.node, index: entry.id.index }),
        kind: match entry.kind {
            raftlog::EntryKind::Blank => 0,
            raftlog::EntryKind::Normal => 1,
            raftlog::EntryKind::Membership => 2,
        },
        payload: entry.payload,
    }
}

pub(crate) fn entry_from_wire(entry: pb::Entry) -> Result<Entry, io::Error> {
    let id = entry.id.ok_or_else(|| bad_data("entry: no id"))?;
    let kind = match entry.kind {
        0 => raftlog::EntryKind::Blank,
        1 => raftlog::EntryKind::Normal,
        2 => raftlog::EntryKind::Membership,
        other => return Err(bad_data(format_args!("entry: unknown kind {other}"))),
    };
    entry_from_log(raftlog::Entry {
        id: raftlog::LogId { term: id.term, node: id.node, index: id.index },
        kind,
        payload: entry.payload,
    })
}

pub(crate) fn meta_to_wire(snapshot_id: &str, meta: &SnapshotMeta) -> pb::SnapshotMeta {
    pb::SnapshotMeta {
        snapshot_id: snapshot_id.to_owned(),
        last: meta.last_log_id.as_ref().map(log_id_to_wire),
        membership: encode_membership(meta.last_membership.membership()),
        membership_at: meta.last_membership.log_id().as_ref().map(log_id_to_wire),
    }
}

pub(crate) fn meta_from_wire(meta: &pb::SnapshotMeta) -> Result<SnapshotMeta, io::Error> {
    Ok(SnapshotMeta {
        last_log_id: meta.last.map(log_id_from_wire),
        last_membership: StoredMembership::new(
            meta.membership_at.map(log_id_from_wire),
            decode_membership(&meta.membership)?,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_membership_survives_encoding_also_while_it_changes() {
        let members: BTreeMap<u64, Member> =
            (1..=4).map(|node| (node, Member { region: "us".to_owned() })).collect();
        let joint = Membership::new(
            vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3, 4])],
            members.clone(),
        )
        .unwrap();

        assert_eq!(decode_membership(&encode_membership(&joint)).unwrap(), joint);
    }

    #[test]
    fn damaged_memberships_are_errors() {
        assert!(decode_membership(&[]).is_err());
        assert!(decode_membership(&[9, 1, 2]).is_err());
        assert!(decode_membership(&[MEMBERSHIP_VERSION, 0xff, 0xff]).is_err());
    }

    #[test]
    fn an_entry_of_every_kind_survives_the_wire() {
        let membership = Membership::new(
            vec![BTreeSet::from([1])],
            BTreeMap::from([(1, Member { region: "us".to_owned() })]),
        )
        .unwrap();
        for payload in [
            EntryPayload::Blank,
            EntryPayload::Normal(Command(Bytes::from_static(b"x"))),
            EntryPayload::Membership(membership),
        ] {
            let entry = Entry { log_id: log_id(3, 1, 7), payload };

            let back = entry_from_wire(entry_to_wire(entry.clone())).unwrap();

            assert_eq!(back, entry);
        }
        assert!(entry_from_wire(pb::Entry { id: None, kind: 0, payload: Bytes::new() }).is_err());
    }
}
