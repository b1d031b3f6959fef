//! The sending side of one pull: every change that the peer lacks, in causal order, as it
//! commits.
//!
//! What may be sent next is decided by [`tombolo_core::outgoing`].
//!
//! Reads the change log only, so a slow or absent peer costs nothing but its own stream. What is
//! sent and not yet acknowledged is bounded by bytes.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use futures::StreamExt;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tombolo_core::{Actor, NamespaceId, RegionId, VersionVector, outgoing::Outgoing};
use tombolo_proto::internal::v1 as pb;
use tombolo_shard::{Shard, ShardError};
use tombolo_storage::StoredChange;
use tonic::{Status, Streaming};

use crate::{
    config::{FRONTIER_INTERVAL, QUORUM_AGE_MAX, ReplicationConfig},
    server::{admit, not_leader},
    status::LinkStatuses,
    wire,
};

pub(crate) type Replies = mpsc::Sender<Result<pb::PullResponse, Status>>;

/// One peer region's pull of one shard.
pub(crate) struct Feed {
    pub(crate) shard: Shard,
    pub(crate) peer: Actor,
    /// The peer is still taking over what others have.
    pub(crate) joins: bool,
    pub(crate) config: ReplicationConfig,
    pub(crate) statuses: Arc<LinkStatuses>,
    pub(crate) subscriptions: BTreeMap<NamespaceId, Subscription>,
}

/// Where one namespace's stream stands.
#[derive(Debug)]
pub(crate) struct Subscription {
    /// What is sent, and what may be sent next.
    outgoing: Outgoing,
    /// The frontier that the peer was told last, and when.
    told: Option<(VersionVector, Instant)>,
    /// The peer was told that its cursor lies in the trimmed part.
    trimmed: bool,
}

impl Feed {
    /// Sends until the peer goes away, this node stops leading, or `shutdown` fires.
    pub(crate) async fn run(
        mut self,
        mut requests: Streaming<pb::PullRequest>,
        replies: Replies,
        shutdown: CancellationToken,
    ) {
        if let Err(status) = self.serve(&mut requests, &replies, &shutdown).await {
            // The peer may be gone already, or may not read; then it hears of it by the end.
            let _ = replies.try_send(Err(status));
        }
    }

    async fn serve(
        &mut self,
        requests: &mut Streaming<pb::PullRequest>,
        replies: &Replies,
        shutdown: &CancellationToken,
    ) -> Result<(), Status> {
        let mut moved = self.shard.store().watch_frontiers();
        let mut leadership = self.shard.group().leadership();
        let mut ticks = tokio::time::interval(FRONTIER_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            moved.borrow_and_update();
            self.send_changes(replies, shutdown).await?;
            // Safe to drop: all of these only wait, and a request is taken whole.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {
                    return Err(Status::unavailable("the node is stopping"));
                }
                changed = leadership.changed() => {
                    if changed.is_err() || !self.shard.is_leader() {
                        return Err(not_leader(&self.shard));
                    }
                }
                request = requests.next() => match request {
                    Some(request) => self.handle(request?)?,
                    None => return Ok(()),
                },
                changed = moved.changed() => if changed.is_err() {
                    return Err(Status::unavailable("the replica has stopped"));
                },
                _ = ticks.tick() => {
                    // A leader that is cut off from its region would feed what it had for ever,
                    // while another leader takes the writes.
                    if !self.shard.group().has_quorum(QUORUM_AGE_MAX) {
                        return Err(not_leader(&self.shard));
                    }
                    admit(&self.shard, self.peer, self.joins)?;
                    self.tell_frontiers(replies, shutdown).await?;
                }
            }
        }
    }

    fn handle(&mut self, request: pb::PullRequest) -> Result<(), Status> {
        match request.body {
            Some(pb::pull_request::Body::Subscribe(subscribe)) => {
                let namespace = NamespaceId(subscribe.namespace);
                let sent = wire::decode_frontier(subscribe.frontier)?;
                self.shard.peers().acknowledge(namespace, self.peer, &sent);
                let mut origins = BTreeSet::from([self.shard.topology().region]);
                for origin in subscribe.origins {
                    origins.insert(wire::decode_region(origin)?);
                }
                self.subscriptions.insert(namespace, Subscription::new(origins, sent));
                Ok(())
            }
            Some(pb::pull_request::Body::Acknowledge(acknowledge)) => {
                let namespace = NamespaceId(acknowledge.namespace);
                let frontier = wire::decode_frontier(acknowledge.frontier)?;
                self.shard.peers().acknowledge(namespace, self.peer, &frontier);
                if let Some(subscription) = self.subscriptions.get_mut(&namespace) {
                    subscription.outgoing.acknowledged(&frontier);
                }
                Ok(())
            }
            Some(pb::pull_request::Body::Open(_)) | None => {
                Err(Status::invalid_argument("expected a subscription or an acknowledgement"))
            }
        }
    }

    /// Sends what is committed and not sent, as far as the byte budget goes.
    async fn send_changes(
        &mut self,
        replies: &Replies,
        shutdown: &CancellationToken,
    ) -> Result<(), Status> {
        for (&namespace, subscription) in &mut self.subscriptions {
            while !subscription.trimmed
                && subscription.outgoing.in_flight_bytes() < self.config.in_flight_bytes_max
            {
                let body = match subscription.next_batch(
                    &self.shard,
                    namespace,
                    self.config.batch_bytes_max,
                ) {
                    Ok(Some(changes)) => {
                        let namespace = namespace.0;
                        let bytes: usize = changes.iter().map(Bytes::len).sum();
                        self.statuses.count_sent(self.peer.region, bytes as u64);
                        pb::pull_response::Body::Changes(pb::Changes { namespace, changes })
                    }
                    Ok(None) => break,
                    Err(NextError::Trimmed(trimmed)) => {
                        subscription.trimmed = true;
                        pb::pull_response::Body::Trimmed(pb::Trimmed {
                            namespace: namespace.0,
                            trimmed: wire::encode_frontier(&trimmed),
                        })
                    }
                    Err(NextError::Shard(error)) => {
                        return Err(Status::internal(format!("the change log: {error}")));
                    }
                };
                reply(replies, body, shutdown).await?;
            }
        }
        Ok(())
    }

    /// Tells frontiers that moved, and now and then those that did not.
    async fn tell_frontiers(
        &mut self,
        replies: &Replies,
        shutdown: &CancellationToken,
    ) -> Result<(), Status> {
        let now = Instant::now();
        for (&namespace, subscription) in &mut self.subscriptions {
            let (frontier, members) = self.shard.store().frontier_and_members(namespace);
            let due = subscription.told.as_ref().is_none_or(|(told, at)| {
                *told != frontier || now.duration_since(*at) >= self.config.heartbeat
            });
            if due {
                let heartbeat = pb::Heartbeat {
                    namespace: namespace.0,
                    frontier: wire::encode_frontier(&frontier),
                    time: self.shard.clock().now().to_bits(),
                    members: wire::encode_members(&members),
                };
                let body = pb::pull_response::Body::Heartbeat(heartbeat);
                reply(replies, body, shutdown).await?;
                subscription.told = Some((frontier, now));
            }
        }
        Ok(())
    }
}

/// Sends a message, and waits as long as the peer does not read, but not through a shutdown.
async fn reply(
    replies: &Replies,
    body: pb::pull_response::Body,
    shutdown: &CancellationToken,
) -> Result<(), Status> {
    let sent = replies.send(Ok(pb::PullResponse { body: Some(body) }));
    match shutdown.run_until_cancelled(sent).await {
        Some(Ok(())) => Ok(()),
        Some(Err(_)) => Err(Status::cancelled("the peer went away")),
        None => Err(Status::unavailable("the node is stopping")),
    }
}

/// Why there is no next batch.
enum NextError {
    /// The change log no longer reaches back to the cursor.
    Trimmed(VersionVector),
    /// The change log cannot be read.
    Shard(ShardError),
}

impl Subscription {
    fn new(origins: BTreeSet<RegionId>, sent: VersionVector) -> Self {
        Self { outgoing: Outgoing::new(origins, sent), told: None, trimmed: false }
    }

    /// The next changes in causal order, encoded; `None` if all is sent.
    fn next_batch(
        &mut self,
        shard: &Shard,
        namespace: NamespaceId,
        bytes_max: usize,
    ) -> Result<Option<Vec<Bytes>>, NextError> {
        let behind = self.outgoing.behind(&shard.frontier(namespace));
        if behind.is_empty() {
            return Ok(None);
        }
        let trimmed = shard.store().trimmed(namespace);
        if self.outgoing.is_trimmed(&behind, &trimmed) {
            return Err(NextError::Trimmed(trimmed));
        }
        let mut waiting: Vec<VecDeque<StoredChange>> = Vec::with_capacity(behind.len());
        for (actor, from) in behind {
            let changes = shard
                .store()
                .changes(namespace, actor, from, bytes_max)
                .map_err(|error| NextError::Shard(error.into()))?;
            waiting.push(changes.into());
        }
        let batch = self.outgoing.take(waiting, bytes_max, |stored: &StoredChange| {
            (&stored.decoded, stored.bytes.len())
        });
        Ok((!batch.is_empty()).then(|| batch.into_iter().map(|stored| stored.bytes).collect()))
    }
}
