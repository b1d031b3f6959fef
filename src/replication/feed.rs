//! The sending side of one pull: every change that the peer lacks, in causal order, as it
//! commits.
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
use tombolo_core::{Actor, Change, NamespaceId, RegionId, VersionVector};
use tombolo_proto::internal::v1 as pb;
use tombolo_shard::{Shard, ShardError};
use tombolo_storage::StoredChange;
use tonic::{Status, Streaming};

use crate::{
    config::{FRONTIER_INTERVAL, QUORUM_AGE_MAX, ReplicationConfig},
    server::not_leader,
    status::LinkStatuses,
    wire,
};

pub(crate) type Replies = mpsc::Sender<Result<pb::PullResponse, Status>>;

/// One peer region's pull of one shard.
pub(crate) struct Feed {
    pub(crate) shard: Shard,
    pub(crate) peer: RegionId,
    pub(crate) config: ReplicationConfig,
    pub(crate) statuses: Arc<LinkStatuses>,
    pub(crate) subscriptions: BTreeMap<NamespaceId, Subscription>,
}

/// Where one namespace's stream stands.
#[derive(Debug, Default)]
pub(crate) struct Subscription {
    /// Regions whose changes the peer wants from here.
    origins: BTreeSet<RegionId>,
    /// Sent up to here.
    sent: VersionVector,
    /// Sent batches that are not acknowledged: what covers them, and their bytes.
    in_flight: VecDeque<(VersionVector, usize)>,
    in_flight_bytes: usize,
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
                let subscription = Subscription { origins, sent, ..Subscription::default() };
                self.subscriptions.insert(namespace, subscription);
                Ok(())
            }
            Some(pb::pull_request::Body::Acknowledge(acknowledge)) => {
                let namespace = NamespaceId(acknowledge.namespace);
                let frontier = wire::decode_frontier(acknowledge.frontier)?;
                self.shard.peers().acknowledge(namespace, self.peer, &frontier);
                if let Some(subscription) = self.subscriptions.get_mut(&namespace) {
                    subscription.acknowledged(&frontier);
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
                && subscription.in_flight_bytes < self.config.in_flight_bytes_max
            {
                let body = match subscription.next_batch(
                    &self.shard,
                    namespace,
                    self.config.batch_bytes_max,
                ) {
                    Ok(Some(changes)) => {
                        let namespace = namespace.0;
                        let bytes: usize = changes.iter().map(Bytes::len).sum();
                        self.statuses.count_sent(self.peer, bytes as u64);
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
            let frontier = self.shard.frontier(namespace);
            let due = subscription.told.as_ref().is_none_or(|(told, at)| {
                *told != frontier || now.duration_since(*at) >= self.config.heartbeat
            });
            if due {
                let heartbeat = pb::Heartbeat {
                    namespace: namespace.0,
                    frontier: wire::encode_frontier(&frontier),
                    time: self.shard.clock().now().to_bits(),
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
    fn acknowledged(&mut self, frontier: &VersionVector) {
        while let Some((sent, bytes)) = self.in_flight.front() {
            if !frontier.covers_all(sent) {
                break;
            }
            self.in_flight_bytes -= bytes;
            self.in_flight.pop_front();
        }
    }

    /// The next changes in causal order, encoded; `None` if all is sent.
    fn next_batch(
        &mut self,
        shard: &Shard,
        namespace: NamespaceId,
        bytes_max: usize,
    ) -> Result<Option<Vec<Bytes>>, NextError> {
        let frontier = shard.frontier(namespace);
        let behind: Vec<Actor> = frontier
            .iter()
            .filter(|&(actor, seq)| {
                self.origins.contains(&actor.region) && self.sent.get(actor) < seq
            })
            .map(|(actor, _)| actor)
            .collect();
        if behind.is_empty() {
            return Ok(None);
        }
        let trimmed = shard.store().trimmed(namespace);
        let mut waiting: Vec<VecDeque<StoredChange>> = Vec::with_capacity(behind.len());
        for actor in behind {
            if self.sent.get(actor) < trimmed.get(actor) {
                return Err(NextError::Trimmed(trimmed));
            }
            let from = self.sent.get(actor) + 1;
            let changes = shard
                .store()
                .changes(namespace, actor, from, bytes_max)
                .map_err(|error| NextError::Shard(error.into()))?;
            waiting.push(changes.into());
        }
        let batch = self.merge(waiting, bytes_max);
        if batch.is_empty() {
            return Ok(None);
        }
        let bytes = batch.iter().map(Bytes::len).sum();
        let covers = self.sent.iter().filter(|(actor, _)| self.origins.contains(&actor.region));
        self.in_flight.push_back((covers.collect(), bytes));
        self.in_flight_bytes += bytes;
        Ok(Some(batch))
    }

    /// Merges several actors' changes so that causes come before effects.
    fn merge(&mut self, mut waiting: Vec<VecDeque<StoredChange>>, bytes_max: usize) -> Vec<Bytes> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(next) = waiting.iter_mut().find_map(|changes| {
            let ready = changes.front().is_some_and(|stored| self.is_ready(&stored.decoded));
            if ready { changes.pop_front() } else { None }
        }) {
            bytes += next.bytes.len();
            self.sent.add(next.decoded.last());
            batch.push(next.bytes);
            if bytes >= bytes_max {
                break;
            }
        }
        batch
    }

    /// Whether all causes that this stream carries are sent. Others the peer waits for itself.
    fn is_ready(&self, change: &Change) -> bool {
        change
            .depends_on
            .iter()
            .filter(|(actor, _)| self.origins.contains(&actor.region))
            .all(|(actor, seq)| seq <= self.sent.get(actor))
    }
}
