//! The called side: checks who calls, finds the group, hands the message to its Raft core.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt, stream};
use openraft::errors::{Fatal, RaftError};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderError, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;
use tombolo_core::ShardId;
use tombolo_proto::internal::v1 as pb;
use tombolo_proto::internal::v1::raft_service_server::RaftService;
use tonic::{Request, Response, Status, Streaming};

use crate::group::Member as GroupMember;
use crate::network::faults::Faults;
use crate::network::identity::Identities;
use crate::network::pulse;
use crate::network::snapshot::Receiver;
use crate::types::{
    TypeConfig, entry_from_wire, log_id_from_wire, log_id_to_wire, vote_from_wire, vote_to_wire,
};

/// The groups that this node serves, by number.
pub(crate) type Groups = Arc<RwLock<BTreeMap<u64, GroupMember>>>;

/// Serves the Raft port of a node; see [`crate::Consensus::raft_service`].
pub struct Server {
    pub(crate) identities: Arc<Identities>,
    pub(crate) faults: Arc<Faults>,
    pub(crate) groups: Groups,
    pub(crate) receiver: Arc<Receiver>,
    /// Ends the append streams, which their senders keep open for as long as they lead.
    pub(crate) stop: CancellationToken,
}

fn member_of(groups: &Groups, group: u64) -> Result<GroupMember, Status> {
    let member = groups.read().get(&group).cloned();
    member.ok_or_else(|| Status::unavailable(format!("group {group} is not running here")))
}

impl Server {
    fn accept(&self, identity: Option<&pb::Identity>) -> Result<u64, Status> {
        let from = self.identities.accept(identity).inspect_err(|refusal| {
            tracing::warn!(%refusal, ?identity, "refused a message");
        })?;
        self.faults.check(from)?;
        Ok(from)
    }

    fn group(&self, group: u64) -> Result<GroupMember, Status> {
        member_of(&self.groups, group)
    }

    async fn vote_or_pre_vote(
        &self,
        request: pb::VoteRequest,
        pre_vote: bool,
    ) -> Result<Response<pb::VoteResponse>, Status> {
        let from = self.accept(request.identity.as_ref())?;
        let member = self.group(request.group)?;
        if member.quarantine.refuses(request.leadership_transfer) {
            return Err(Status::unavailable("just started: no votes before the old lease is over"));
        }
        let mut vote = VoteRequest::new(
            vote_from_wire(needed(request.vote, "vote")?),
            request.last.map(log_id_from_wire),
        );
        vote.leadership_transfer = request.leadership_transfer;
        let answer: Result<VoteResponse<TypeConfig>, RaftError<TypeConfig>> =
            if pre_vote { member.raft.pre_vote(vote).await } else { member.raft.vote(vote).await };
        let answer = answer.map_err(|error| stopped(&error))?;
        self.faults.check(from)?;
        Ok(Response::new(pb::VoteResponse {
            vote: Some(vote_to_wire(&answer.vote)),
            granted: answer.vote_granted,
            last: answer.last_log_id.as_ref().map(log_id_to_wire),
        }))
    }
}

/// A group whose core hangs must not gather heartbeats for ever.
const HEARTBEAT_PATIENCE: Duration = Duration::from_secs(10);

/// Hands a heartbeat to its group.
async fn heartbeat(
    member: Result<GroupMember, Status>,
    request: pb::AppendRequest,
) -> Result<pb::AppendResponse, Status> {
    let request = append_request(request)?;
    let previous = request.prev_log_id;
    let last = request.entries.last().map(|entry| entry.log_id).or(previous);
    let answer = member?.raft.append_entries(request).await.map_err(|error| stopped(&error))?;
    let result: StreamAppendResult<TypeConfig> = match answer {
        AppendEntriesResponse::Success => Ok(last),
        AppendEntriesResponse::PartialSuccess(upto) => Ok(upto),
        AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
        AppendEntriesResponse::Conflict => {
            let at = previous.ok_or_else(|| Status::internal("conflict before the log"))?;
            Err(StreamAppendError::Conflict(at))
        }
    };
    Ok(append_response(result))
}

type Answers = stream::BoxStream<'static, Result<pb::AppendResponse, Status>>;
type HeartbeatAnswers = stream::BoxStream<'static, Result<pb::HeartbeatsResponse, Status>>;

#[tonic::async_trait]
impl RaftService for Server {
    type AppendStream = Answers;
    type HeartbeatsStream = HeartbeatAnswers;

    async fn hello(
        &self,
        request: Request<pb::HelloRequest>,
    ) -> Result<Response<pb::HelloResponse>, Status> {
        self.accept(request.get_ref().identity.as_ref())?;
        let groups = self.groups.read();
        // An answer that leaves out groups still being loaded could let one be created twice.
        if groups.len() != self.identities.local().shard_count as usize {
            return Err(Status::unavailable("still loading groups"));
        }
        let known = groups.iter().filter(|(_, member)| member.has_state());
        Ok(Response::new(pb::HelloResponse {
            directory: self.identities.local().directory_id.clone(),
            groups: known.map(|(group, _)| *group).collect(),
        }))
    }

    async fn append(
        &self,
        request: Request<Streaming<pb::AppendRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("an empty append stream"))?;
        let from = self.accept(first.identity.as_ref())?;
        let member = self.group(first.group)?;

        let (faults, heard) = (self.faults.clone(), member.heard.clone());
        let input = append_requests(first, requests, move || {
            heard.note();
            faults.is_cut(from)
        });
        let faults = self.faults.clone();
        let answers = member.raft.stream_append(input).map(move |answer| {
            if faults.is_cut(from) {
                return Err(Status::unavailable("cut off"));
            }
            answer.map(append_response).map_err(|fatal| fatal_status(&fatal))
        });
        Ok(Response::new(answers.take_until(self.stop.clone().cancelled_owned()).boxed()))
    }

    async fn heartbeats(
        &self,
        request: Request<Streaming<pb::HeartbeatsRequest>>,
    ) -> Result<Response<HeartbeatAnswers>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("an empty heartbeat stream"))?;
        let from = self.accept(first.identity.as_ref())?;
        let (groups, faults) = (self.groups.clone(), self.faults.clone());
        let handle = move |request: pb::AppendRequest| {
            let member = member_of(&groups, request.group);
            let faults = faults.clone();
            let answer = async move {
                faults.check(from)?;
                if let Ok(member) = &member {
                    member.heard.note();
                }
                let answer = tokio::time::timeout(HEARTBEAT_PATIENCE, heartbeat(member, request));
                let answer =
                    answer.await.map_err(|_| Status::unavailable("no answer in time"))??;
                faults.check(from)?;
                Ok(answer)
            };
            answer.boxed()
        };
        let answers = pulse::answers(first, requests, handle);
        Ok(Response::new(answers.take_until(self.stop.clone().cancelled_owned()).boxed()))
    }

    async fn vote(
        &self,
        request: Request<pb::VoteRequest>,
    ) -> Result<Response<pb::VoteResponse>, Status> {
        self.vote_or_pre_vote(request.into_inner(), false).await
    }

    async fn pre_vote(
        &self,
        request: Request<pb::VoteRequest>,
    ) -> Result<Response<pb::VoteResponse>, Status> {
        self.vote_or_pre_vote(request.into_inner(), true).await
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::TransferLeaderRequest>,
    ) -> Result<Response<pb::TransferLeaderResponse>, Status> {
        let request = request.into_inner();
        self.accept(request.identity.as_ref())?;
        let member = self.group(request.group)?;
        let transfer = TransferLeaderRequest::new(
            vote_from_wire(needed(request.from_leader, "vote")?),
            request.to_node,
            request.last.map(log_id_from_wire),
        );
        let answer = member.raft.handle_transfer_leader(transfer).await;
        let answer = answer.map_err(|fatal| fatal_status(&fatal))?;
        let refusal = match answer {
            Ok(()) => None,
            Err(TransferLeaderError::VoteChanged { actual, .. }) => {
                Some(pb::transfer_leader_response::Refusal::VoteChanged(vote_to_wire(&actual)))
            }
            Err(TransferLeaderError::LogNotFlushed { actual, .. }) => {
                let last = actual.as_ref().map(log_id_to_wire);
                Some(pb::transfer_leader_response::Refusal::NotFlushed(pb::NotFlushed { last }))
            }
        };
        Ok(Response::new(pb::TransferLeaderResponse { refusal }))
    }

    async fn begin_snapshot(
        &self,
        request: Request<pb::BeginSnapshotRequest>,
    ) -> Result<Response<pb::BeginSnapshotResponse>, Status> {
        let request = request.into_inner();
        self.accept(request.identity.as_ref())?;
        self.group(request.group)?;
        let shard = shard_of(request.group)?;
        let meta = needed(request.meta, "meta")?;
        let next_chunk = self.receiver.begin(request.group, shard, &meta).await?;
        Ok(Response::new(pb::BeginSnapshotResponse { next_chunk }))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<pb::SnapshotChunk>>,
    ) -> Result<Response<pb::InstallSnapshotResponse>, Status> {
        let mut chunks = request.into_inner();
        let first = chunks.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("an empty snapshot stream"))?;
        let from = self.accept(first.identity.as_ref())?;
        let member = self.group(first.group)?;
        let shard = shard_of(first.group)?;
        let cut = || self.faults.is_cut(from);
        let (vote, snapshot) = self.receiver.receive(shard, first, chunks, cut).await?;
        let installed = member.raft.install_full_snapshot(vote, snapshot).await;
        let installed = installed.map_err(|fatal| fatal_status(&fatal))?;
        self.faults.check(from)?;
        Ok(Response::new(pb::InstallSnapshotResponse { vote: Some(vote_to_wire(&installed.vote)) }))
    }
}

/// The requests of an append stream. Ends at the first that is broken, cut or malformed.
fn append_requests(
    first: pb::AppendRequest,
    requests: Streaming<pb::AppendRequest>,
    cut: impl Fn() -> bool + Send + 'static,
) -> impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static {
    stream::unfold((Some(first), requests, cut), |(first, mut requests, cut)| async move {
        let request = match first {
            Some(first) => first,
            None => requests.message().await.ok()??,
        };
        if cut() {
            return None;
        }
        let request = append_request(request).inspect_err(|status| {
            tracing::warn!(%status, "malformed append");
        });
        Some((request.ok()?, (None, requests, cut)))
    })
}

fn append_request(request: pb::AppendRequest) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
    let entries: Result<Vec<_>, _> = request.entries.into_iter().map(entry_from_wire).collect();
    Ok(AppendEntriesRequest {
        vote: vote_from_wire(needed(request.vote, "vote")?),
        prev_log_id: request.prev.map(log_id_from_wire),
        entries: entries.map_err(|error| Status::invalid_argument(error.to_string()))?,
        leader_commit: request.commit.map(log_id_from_wire),
    })
}

fn append_response(result: StreamAppendResult<TypeConfig>) -> pb::AppendResponse {
    let result = match result {
        Ok(upto) => pb::append_response::Result::Matched(pb::Matched {
            upto: upto.as_ref().map(log_id_to_wire),
        }),
        Err(StreamAppendError::Conflict(at)) => {
            pb::append_response::Result::Conflict(log_id_to_wire(&at))
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            pb::append_response::Result::HigherVote(vote_to_wire(&vote))
        }
    };
    pb::AppendResponse { result: Some(result) }
}

fn shard_of(group: u64) -> Result<ShardId, Status> {
    let number = u16::try_from(group);
    number.map(ShardId).map_err(|_| Status::invalid_argument("no such group"))
}

fn needed<T>(field: Option<T>, name: &str) -> Result<T, Status> {
    field.ok_or_else(|| Status::invalid_argument(format!("the message lacks its {name}")))
}

fn stopped(error: &RaftError<TypeConfig>) -> Status {
    Status::unavailable(format!("the replica is stopped: {error}"))
}

fn fatal_status(fatal: &Fatal<TypeConfig>) -> Status {
    Status::unavailable(format!("the replica is stopped: {fatal}"))
}
