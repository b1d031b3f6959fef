//! The link port's gRPC service.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt, future::BoxFuture};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tombolo_core::{Actor, MemberState, Members, Rule, ShardId, VersionVector};
use tombolo_proto::internal::v1::{
    self as pb,
    link_service_server::{LinkService, LinkServiceServer},
};
use tombolo_shard::{Shard, Shards};
use tonic::{Request, Response, Status, Streaming, codec::CompressionEncoding};

use crate::{
    config::{CONNECT_TIMEOUT, QUORUM_AGE_MAX, ReplicationConfig, STREAM_MESSAGES_MAX},
    feed::Feed,
    repair::source,
    status::LinkStatuses,
    wire::{self, check_identity, link_identity},
};

/// A change of the catalog, asked for by another region.
#[derive(Clone, Debug)]
pub enum CatalogChange {
    /// Create a namespace.
    Create {
        /// Its name.
        name: String,
        /// Its rule.
        rule: Rule,
        /// How long values wait to be settled, in milliseconds.
        hold_ms: Option<u64>,
    },
    /// Delete a namespace.
    Delete {
        /// Its name.
        name: String,
        /// If not empty, its etag must be this.
        etag: String,
    },
}

/// Carries out catalog changes in the home region. Implemented by the layer above, which knows
/// how to reach the leader of the catalog's shard.
pub trait CatalogChanges: Send + Sync + 'static {
    /// Carries out a change and answers the encoded namespace.
    fn change(&self, change: CatalogChange) -> BoxFuture<'_, Result<bytes::Bytes, Status>>;
}

/// Serves other regions' pulls.
pub struct LinkServer {
    shards: Shards,
    config: ReplicationConfig,
    statuses: Arc<LinkStatuses>,
    catalog: Arc<dyn CatalogChanges>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

/// Largest message on a link: a batch, and one change that exceeds it.
const MESSAGE_BYTES_MAX: usize = 192 << 20;

impl LinkServer {
    /// A server over `shards`. Its streams end when `shutdown` fires; `tasks` tracks them.
    pub fn new(
        shards: Shards,
        config: ReplicationConfig,
        statuses: Arc<LinkStatuses>,
        catalog: Arc<dyn CatalogChanges>,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self { shards, config, statuses, catalog, shutdown, tasks }
    }

    /// The tonic service.
    pub fn into_service(self) -> LinkServiceServer<Self> {
        LinkServiceServer::new(self)
            .send_compressed(CompressionEncoding::Zstd)
            .accept_compressed(CompressionEncoding::Zstd)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    fn led_shard(&self, number: u32) -> Result<&Shard, Status> {
        let shard = u16::try_from(number)
            .ok()
            .and_then(|number| self.shards.get(ShardId(number)))
            .ok_or_else(|| Status::invalid_argument(format!("there is no shard {number}")))?;
        let leads = shard.group().has_quorum(QUORUM_AGE_MAX);
        if leads { Ok(shard) } else { Err(not_leader(shard)) }
    }
}

/// Largest message that a puller accepts.
pub(crate) const fn message_bytes_max() -> usize {
    MESSAGE_BYTES_MAX
}

/// The refusal of a node that does not lead a shard.
pub(crate) fn not_leader(shard: &Shard) -> Status {
    let mut status = Status::unavailable(format!("this node does not lead shard {}", shard.id()));
    let leader = shard.leader();
    let link = leader.and_then(|leader| shard.topology().node(leader)).map(|node| &node.link);
    if let Some(Ok(link)) = link.map(|link| link.parse()) {
        status.metadata_mut().insert("leader_link_address", link);
    }
    status
}

/// Whether a region may pull from a shard here, and compare itself with it.
pub(crate) fn admit(shard: &Shard, caller: Actor, joins: bool) -> Result<(), Status> {
    let topology = shard.topology();
    let (local, name) = (topology.local_name(), topology.region_name(caller.region));
    let own = shard.own_member();
    if own.state != MemberState::Active {
        // What it has is not whole, and what it says of itself would count.
        return Err(Status::unavailable(format!(
            "region `{local}` is {:?} and serves nobody",
            own.state
        )));
    }
    let members = shard.store().members();
    let known = members.get(caller.region);
    if known.state.is_out() {
        return Err(Status::failed_precondition(format!(
            "region `{name}` is {:?} in region `{local}`; `tombolo ctl region add {name}` takes a \
             fenced region back",
            known.state
        )));
    }
    if known.incarnation != caller.incarnation || (joins && members.said(caller.region).is_none()) {
        return Err(Status::unavailable(format!(
            "shard {} of region `{local}` knows region `{name}` in incarnation {} and not in {}: it \
             will hear of it from the catalog",
            shard.id(),
            known.incarnation,
            caller.incarnation
        )));
    }
    Ok(())
}

/// What a shard here was told of the caller, and has of its events.
fn opened(shard: &Shard, caller: Actor, refused: Option<&Status>) -> pb::Opened {
    let topology = shard.topology();
    let own = |vector: VersionVector| -> VersionVector {
        vector.iter().filter(|(actor, _)| actor.region == caller.region).collect()
    };
    let known = shard.store().frontiers().into_iter().map(|(namespace, frontier)| pb::Known {
        namespace: namespace.0,
        events: wire::encode_frontier(&own(frontier)),
    });
    let region = topology.region(caller.region);
    let identity = region.map(|region| link_identity(topology, shard.own_member(), &region));
    // What one that does not take part itself was told, or decided, nobody else may go by.
    let members = match shard.own_member().state {
        MemberState::Active => shard.store().members(),
        _ => Members::new(),
    };
    let said = members.said(caller.region);
    pb::Opened {
        identity,
        node_id: topology.node.0,
        you: said.map(|member| wire::encode_member(caller.region, member)),
        known: known.collect(),
        members: wire::encode_members(&members),
        refused: refused.map_or_else(String::new, |status| status.message().to_owned()),
    }
}

async fn first_of<T>(requests: &mut Streaming<T>) -> Result<T, Status> {
    tokio::time::timeout(CONNECT_TIMEOUT, requests.next())
        .await
        .map_err(|_| Status::deadline_exceeded("no first message"))?
        .ok_or_else(|| Status::invalid_argument("the stream is empty"))?
}

type RepairStream = Pin<Box<dyn Stream<Item = Result<pb::RepairResponse, Status>> + Send>>;
type PullStream = Pin<Box<dyn Stream<Item = Result<pb::PullResponse, Status>> + Send>>;

#[tonic::async_trait]
impl LinkService for LinkServer {
    type PullStream = PullStream;
    type RepairStream = RepairStream;

    async fn pull(
        &self,
        request: Request<Streaming<pb::PullRequest>>,
    ) -> Result<Response<PullStream>, Status> {
        let mut requests = request.into_inner();
        let first = first_of(&mut requests).await?;
        let Some(pb::pull_request::Body::Open(open)) = first.body else {
            return Err(Status::invalid_argument("the first message must be `open`"));
        };
        let joins = open.identity.as_ref().is_some_and(|identity| identity.from_joining);
        let peer = check_identity(self.shards.topology(), open.identity)?;
        let shard = self.led_shard(open.shard)?.clone();

        let (replies, receiver) = mpsc::channel(STREAM_MESSAGES_MAX);
        let refused = admit(&shard, peer, joins).err();
        let opened = pb::pull_response::Body::Opened(opened(&shard, peer, refused.as_ref()));
        // The channel is new and has room.
        let _ = replies.try_send(Ok(pb::PullResponse { body: Some(opened) }));
        if refused.is_some() {
            return Ok(Response::new(Box::pin(ReceiverStream::new(receiver))));
        }
        let feed = Feed {
            shard,
            peer,
            joins,
            config: self.config.clone(),
            statuses: Arc::clone(&self.statuses),
            subscriptions: Default::default(),
        };
        self.tasks.spawn(feed.run(requests, replies, self.shutdown.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn repair(
        &self,
        request: Request<Streaming<pb::RepairRequest>>,
    ) -> Result<Response<RepairStream>, Status> {
        let mut requests = request.into_inner();
        let first = first_of(&mut requests).await?;
        let Some(pb::repair_request::Body::Open(open)) = first.body else {
            return Err(Status::invalid_argument("the first message must be `open`"));
        };
        let joins = open.identity.as_ref().is_some_and(|identity| identity.from_joining);
        let peer = check_identity(self.shards.topology(), open.identity.clone())?;
        let shard = self.led_shard(open.shard)?.clone();
        admit(&shard, peer, joins)?;
        let (replies, receiver) = mpsc::channel(STREAM_MESSAGES_MAX);
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(source::serve(shard, open, requests, replies, shutdown));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn change_catalog(
        &self,
        request: Request<pb::ChangeCatalogRequest>,
    ) -> Result<Response<pb::ChangeCatalogResponse>, Status> {
        let request = request.into_inner();
        let peer = check_identity(self.shards.topology(), request.identity)?;
        admit(self.shards.catalog_shard(), peer, false)?;
        let change = match request.change {
            Some(pb::change_catalog_request::Change::Create(create)) => {
                let rule = u8::try_from(create.rule).ok().and_then(Rule::from_byte);
                let rule = rule.ok_or_else(|| {
                    Status::unimplemented(format!("rule number {} is not served", create.rule))
                })?;
                CatalogChange::Create { name: create.name, rule, hold_ms: create.hold_ms }
            }
            Some(pb::change_catalog_request::Change::Delete(delete)) => {
                CatalogChange::Delete { name: delete.name, etag: delete.etag }
            }
            None => return Err(Status::invalid_argument("the request names no change")),
        };
        let namespace = self.catalog.change(change).await?;
        Ok(Response::new(pb::ChangeCatalogResponse { namespace }))
    }
}
