//! The calling side: openraft's network on gRPC.
//!
//! Entries go over one bidirectional stream per follower and group ([`super::append`]).
//! Heartbeats of all groups share one stream per peer ([`super::pulse`]). Votes, pre-votes and
//! transfers are single calls on the control connection.
//!
//! Errors: what a wait may heal is `Unreachable`, which makes openraft back off; only a stream
//! that worked and then broke is `NetworkError`, which it retries at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, stream};
use openraft::errors::{
    NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{RPCOption, RPCTypes};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    StreamAppendResult, TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use tombolo_proto::internal::v1 as pb;
use tombolo_proto::internal::v1::raft_service_client::RaftServiceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::network::append::{Stage, append_result, append_to_wire};
use crate::network::faults::Faults;
use crate::network::identity::Identities;
use crate::network::pulse::Pulse;
use crate::snapshot::SnapshotData;
use crate::state_machine::ShardSnapshot;
use crate::types::{
    Member, TypeConfig, Vote, log_id_from_wire, log_id_to_wire, vote_from_wire, vote_to_wire,
};

/// Largest message on a Raft connection: one command above the batch limit still fits.
pub(crate) const MESSAGE_BYTES_MAX: usize = 64 << 20;
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

pub(super) type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

/// How long the calling side waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For a connection.
    pub(crate) connect: Duration,
    /// For the next answer on an append stream while requests are unanswered.
    pub(crate) append: Duration,
    /// For a snapshot's receiver to take one chunk.
    pub(crate) chunk: Duration,
    /// For a snapshot's receiver to install what it has got.
    pub(crate) install: Duration,
}

/// One peer's connections.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) append: RaftServiceClient<Channel>,
    pub(crate) control: RaftServiceClient<Channel>,
    pub(crate) snapshot: RaftServiceClient<Channel>,
}

/// Everything that groups share to reach their peers.
pub(crate) struct Transport {
    pub(crate) identities: Arc<Identities>,
    pub(crate) faults: Arc<Faults>,
    pub(crate) patience: Patience,
    /// Snapshots that this node sends at the same time.
    pub(crate) snapshots: Arc<tokio::sync::Semaphore>,
    peers: BTreeMap<u64, Peer>,
    pulses: BTreeMap<u64, Pulse>,
}

impl Transport {
    /// Prepares connections; none is opened before it is used. Must run inside a runtime.
    pub(crate) fn new(
        identities: Arc<Identities>,
        faults: Arc<Faults>,
        patience: Patience,
        snapshots: Arc<tokio::sync::Semaphore>,
        addresses: impl IntoIterator<Item = (u64, String)>,
    ) -> Result<Self, tonic::transport::Error> {
        let (mut peers, mut pulses) = (BTreeMap::new(), BTreeMap::new());
        for (node, address) in addresses {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))?
                .connect_timeout(patience.connect)
                .tcp_nodelay(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
                .keep_alive_while_idle(true);
            let client = || {
                RaftServiceClient::new(endpoint.connect_lazy())
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX)
            };
            let peer = Peer { append: client(), control: client(), snapshot: client() };
            let pulse = Pulse::start(node, identities.clone(), peer.clone(), patience.append);
            peers.insert(node, peer);
            pulses.insert(node, pulse);
        }
        Ok(Self { identities, faults, patience, snapshots, peers, pulses })
    }

    /// The connections to a peer that this node may talk to now.
    pub(crate) fn peer(&self, node: u64) -> RpcResult<Peer> {
        if self.faults.is_cut(node) {
            return Err(unreachable(format!("cut off from node {node}")));
        }
        let peer = self.peers.get(&node);
        peer.cloned().ok_or_else(|| unreachable(format!("node {node} is not configured")))
    }

    /// Makes the first contact with `node` if there was none.
    async fn greet(&self, node: u64, peer: &Peer) -> RpcResult<()> {
        if !self.identities.knows(node) {
            self.hello(node, peer).await.map_err(|status| rpc_error(&status))?;
        }
        Ok(())
    }

    /// The identity for a message to `node`, after a first contact if there was none.
    pub(crate) async fn identity(&self, node: u64, peer: &Peer) -> RpcResult<pb::Identity> {
        self.greet(node, peer).await?;
        Ok(self.identities.to(node))
    }

    /// First contact: learns the peer's directory id and what groups it has.
    pub(crate) async fn hello(&self, node: u64, peer: &Peer) -> Result<Vec<u64>, Status> {
        let request = pb::HelloRequest { identity: Some(self.identities.to(node)) };
        let answer = peer.control.clone().hello(request).await?.into_inner();
        self.identities.remember(node, &answer.directory)?;
        Ok(answer.groups)
    }

    /// Asks a peer which groups it has state of, within `limit`.
    pub(crate) async fn ask_groups(&self, node: u64, limit: Duration) -> Result<Vec<u64>, Status> {
        let peer = self.peer(node).map_err(|error| Status::unavailable(error.to_string()))?;
        tokio::time::timeout(limit, self.hello(node, &peer))
            .await
            .map_err(|_| Status::deadline_exceeded("no answer in time"))?
    }
}

/// Makes one group's clients.
pub(crate) struct GroupNetwork {
    pub(crate) group: u64,
    pub(crate) transport: Arc<Transport>,
}

impl RaftNetworkFactory<TypeConfig> for GroupNetwork {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, _: &Member) -> Connection {
        Connection {
            group: self.group,
            target,
            heartbeats: false,
            transport: self.transport.clone(),
        }
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> Connection {
        Connection { heartbeats: true, ..self.new_client(target, node).await }
    }
}

/// One group's way to one peer.
pub(crate) struct Connection {
    pub(crate) group: u64,
    pub(crate) target: u64,
    heartbeats: bool,
    pub(crate) transport: Arc<Transport>,
}

impl Connection {
    /// Makes one call on the control connection, within the caller's time.
    async fn call<T>(
        &self,
        action: RPCTypes,
        option: &RPCOption,
        call: impl AsyncFnOnce(RaftServiceClient<Channel>, pb::Identity) -> Result<T, Status>,
    ) -> RpcResult<T> {
        let limit = option.soft_ttl();
        let answer = tokio::time::timeout(limit, async {
            let peer = self.transport.peer(self.target)?;
            let identity = self.transport.identity(self.target, &peer).await?;
            call(peer.control, identity).await.map_err(|status| rpc_error(&status))
        });
        let answer = answer.await.map_err(|_| self.timeout(action, limit))??;
        // An answer that arrives after a cut is lost, as it would be on a real one.
        self.transport.peer(self.target)?;
        Ok(answer)
    }

    pub(crate) fn timeout(&self, action: RPCTypes, timeout: Duration) -> RPCError<TypeConfig> {
        let id = self.transport.identities.local().node_id;
        RPCError::Timeout(Timeout { action, id, target: self.target, timeout })
    }

    async fn heartbeat(
        &self,
        request: AppendEntriesRequest<TypeConfig>,
        option: &RPCOption,
    ) -> RpcResult<StreamAppendResult<TypeConfig>> {
        let limit = option.soft_ttl();
        let answer = tokio::time::timeout(limit, async {
            let peer = self.transport.peer(self.target)?;
            self.transport.greet(self.target, &peer).await?;
            let request = append_to_wire(request, self.group, None);
            let pulse = self.transport.pulses.get(&self.target);
            let pulse = pulse.ok_or_else(|| unreachable("no such peer".to_owned()))?;
            pulse.send(request).await.map_err(|status| rpc_error(&status))
        });
        let timeout = |_| self.timeout(RPCTypes::AppendEntries, limit);
        let answer = answer.await.map_err(timeout)??;
        // An answer that arrives after a cut is lost, as it would be on a real one.
        self.transport.peer(self.target)?;
        append_result(answer)
    }

    async fn ask_vote(
        &self,
        request: VoteRequest<TypeConfig>,
        option: &RPCOption,
        pre_vote: bool,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let group = self.group;
        let answer = self
            .call(RPCTypes::Vote, option, async move |mut client, identity| {
                let request = pb::VoteRequest {
                    identity: Some(identity),
                    group,
                    vote: Some(vote_to_wire(&request.vote)),
                    last: request.last_log_id.as_ref().map(log_id_to_wire),
                    leadership_transfer: request.leadership_transfer,
                };
                let answer = if pre_vote {
                    client.pre_vote(request).await
                } else {
                    client.vote(request).await
                };
                answer.map(tonic::Response::into_inner)
            })
            .await?;
        let vote = required(answer.vote, "vote")?;
        let last = answer.last.map(log_id_from_wire);
        Ok(VoteResponse::new(vote_from_wire(vote), last, answer.granted))
    }
}

impl RaftNetworkV2<TypeConfig> for Connection {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        Ok(match self.heartbeat(request, &option).await? {
            Ok(upto) => AppendEntriesResponse::PartialSuccess(upto),
            Err(StreamAppendError::Conflict(_)) => AppendEntriesResponse::Conflict,
            Err(StreamAppendError::HigherVote(vote)) => AppendEntriesResponse::HigherVote(vote),
        })
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        if self.heartbeats {
            let connection: &'s Self = self;
            let answers = stream::unfold(Some(input), move |input| {
                let option = option.clone();
                async move {
                    let mut input = input?;
                    let request = input.next().await?;
                    let answer = connection.heartbeat(request, &option).await;
                    let go_on = matches!(answer, Ok(Ok(_)));
                    Some((answer, go_on.then_some(input)))
                }
            });
            return Box::pin(async move { Ok(answers.boxed()) });
        }
        let connection: &'s Self = self;
        let answers = stream::unfold(Some(Stage::Idle(input)), move |stage| async move {
            let mut session = match stage? {
                Stage::Open(session) => session,
                // An idle group has nothing to send for hours: only a request starts the clock.
                Stage::Idle(mut input) => {
                    let first = input.next().await?;
                    match connection.open_session(first, input).await {
                        Ok(session) => session,
                        Err(error) => return Some((Err(error), None)),
                    }
                }
            };
            let answer = session.next().await?;
            let go_on = matches!(answer, Ok(Ok(_)));
            Some((answer, go_on.then_some(Stage::Open(session))))
        });
        Box::pin(async move { Ok(answers.boxed()) })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(request, &option, false).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(request, &option, true).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: ShardSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let SnapshotData::Outgoing(outgoing) = snapshot.snapshot else {
            return Err(RPCError::from(NetworkError::from_string("not a snapshot to send")).into());
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(vote, outgoing) => sent.map_err(StreamingError::from),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<TransferLeaderResponse<TypeConfig>> {
        let message = pb::TransferLeaderRequest {
            identity: None,
            group: self.group,
            from_leader: Some(vote_to_wire(request.from_leader())),
            to_node: *request.to_node_id(),
            last: request.last_log_id().map(log_id_to_wire),
        };
        let answer = self
            .call(RPCTypes::TransferLeader, &option, async move |mut client, identity| {
                let message = pb::TransferLeaderRequest { identity: Some(identity), ..message };
                client.transfer_leader(message).await.map(tonic::Response::into_inner)
            })
            .await?;
        Ok(match answer.refusal {
            None => Ok(()),
            Some(pb::transfer_leader_response::Refusal::VoteChanged(actual)) => {
                Err(TransferLeaderError::VoteChanged {
                    expected: *request.from_leader(),
                    actual: vote_from_wire(actual),
                })
            }
            Some(pb::transfer_leader_response::Refusal::NotFlushed(actual)) => {
                Err(TransferLeaderError::LogNotFlushed {
                    expected: request.last_log_id().copied(),
                    actual: actual.last.map(log_id_from_wire),
                })
            }
        })
    }
}

pub(crate) fn required<T>(field: Option<T>, name: &str) -> RpcResult<T> {
    field.ok_or_else(|| network(&format!("the answer lacks its {name}")))
}

pub(crate) fn unreachable(problem: String) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(problem))
}

pub(crate) fn network(problem: &str) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(problem))
}

/// What a failed call means for openraft: back off, or try again at once.
pub(crate) fn rpc_error(status: &Status) -> RPCError<TypeConfig> {
    match status.code() {
        // The stream was reset by a peer that is alive.
        Code::Cancelled | Code::Aborted => network(&status.to_string()),
        _ => unreachable(format!("{}: {}", status.code(), status.message())),
    }
}
