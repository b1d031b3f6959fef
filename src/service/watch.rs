//! The change feed: one task a watcher, which reads this node's replicas and is woken when they move.
//!
//! A response leaves the task only when the one before it was taken, and nothing is read before that.
//! So a watcher costs its cursors while nothing happens, one batch while much does, and is held back by
//! whoever reads it. One that takes nothing for long is cut: the task does not outlive its reader.
//!
//! Invariants:
//! * A response with a token comes after everything that the token covers.
//! * A stream ends by a status that says why, with the token to go on from where it is short enough.
//! * One shard's snapshot after the other: a token holds few keys.
//!
//! Not here: what comes next (`tombolo_core::feed`), reading it (`tombolo-shard`).

mod encode;
mod request;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, Stream};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tombolo_core::{
    feed::{Cursor, Feed},
    namespace::Namespace,
    token::encode_resume,
};
use tombolo_proto::v1::{
    self as pb,
    watch_service_server::{WatchService, WatchServiceServer},
};
use tombolo_shard::{FeedBatch, FeedRequest, Shard, ShardError, WatchHub, blocking};
use tonic::{Request, Response, Status};

use crate::{gateway::Gateway, metrics::Metrics, reason::Reason, status::with_token};

/// Responses that wait for a slow caller.
const RESPONSES_MAX: usize = 1;

/// Bounds on watchers.
#[derive(Clone, Debug)]
pub struct WatchConfig {
    /// How long a watcher may take nothing.
    pub stall_timeout: Duration,
    /// Watchers of this node.
    pub watchers_max: usize,
    /// Largest response.
    pub message_bytes_max: usize,
}

/// Serves watchers.
pub struct WatchApi {
    shared: Arc<Shared>,
}

/// What all watchers of a node share.
struct Shared {
    gateway: Arc<Gateway>,
    hub: Arc<WatchHub>,
    config: WatchConfig,
    room: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl WatchApi {
    /// Watchers of this node's replicas, woken by `hub`. They end when `shutdown` fires; `tasks` tracks
    /// them.
    pub fn new(
        gateway: Arc<Gateway>,
        hub: Arc<WatchHub>,
        config: WatchConfig,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        let room = Arc::new(Semaphore::new(config.watchers_max));
        let shared = Shared { gateway, hub, config, room, metrics, shutdown, tasks };
        Self { shared: Arc::new(shared) }
    }

    /// The tonic service.
    pub fn into_service(self) -> WatchServiceServer<Self> {
        WatchServiceServer::new(self)
    }
}

#[tonic::async_trait]
impl WatchService for WatchApi {
    type WatchStream = Responses;

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Responses>, Status> {
        let shared = &self.shared;
        if shared.shutdown.is_cancelled() {
            return Err(End::Draining.status(&shared.gateway));
        }
        let call = shared.gateway.call(request.metadata());
        let message = request.into_inner();
        let namespace = shared.gateway.namespace(&message.namespace, call.deadline).await?;
        let asked = request::read(&shared.gateway, &namespace, message, &shared.config)?;
        let Ok(permit) = Arc::clone(&shared.room).try_acquire_owned() else {
            let text = format!("{} watchers are open, the limit", shared.config.watchers_max);
            return Err(Reason::Overloaded.status(text, &[]));
        };
        // Before the first look, so that nothing is missed in between.
        let moved = shared.hub.subscribe(namespace.id);
        let (responses, receiver) = mpsc::channel(RESPONSES_MAX);
        let (end, ended) = oneshot::channel();
        let watcher = Watcher {
            feeds: asked.cursors.into_iter().map(Feed::new).collect(),
            filter: asked.request.filter.fingerprint(),
            request: Arc::new(asked.request),
            interval: asked.checkpoint_interval,
            shared: Arc::clone(shared),
            namespace,
            moved,
            responses,
            sent: Instant::now(),
            reached: Bytes::new(),
            waiting: 0,
            _permit: permit,
        };
        watcher.check()?;
        shared.tasks.spawn(watcher.run(end));
        Ok(Response::new(Responses { receiver, ended: Some(ended) }))
    }
}

/// What a watcher is sent, and why that ended.
pub struct Responses {
    receiver: mpsc::Receiver<pb::WatchResponse>,
    ended: Option<oneshot::Receiver<Status>>,
}

impl Stream for Responses {
    type Item = Result<pb::WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(response) = std::task::ready!(self.receiver.poll_recv(context)) {
            return Poll::Ready(Some(Ok(response)));
        }
        let Some(ended) = &mut self.ended else { return Poll::Ready(None) };
        let status = std::task::ready!(ended.poll_unpin(context));
        self.ended = None;
        Poll::Ready(status.ok().map(Err))
    }
}

/// Why a stream ends.
enum End {
    /// Nobody listens any more.
    Gone,
    /// The node stops.
    Draining,
    /// Nothing was taken for so long.
    TooSlow(Duration),
    /// The namespace was deleted.
    Deleted(String),
    /// What this node has of a shard is no answer, or cannot be read.
    Shard(ShardError),
}

impl End {
    fn status(self, gateway: &Gateway) -> Status {
        match self {
            Self::Gone => Status::cancelled("the watcher went away"),
            Self::Draining => Reason::Draining.status("this node is stopping; use another", &[]),
            Self::TooSlow(after) => Reason::WatchTooSlow.status(
                format!("nothing was taken for {} ms", after.as_millis()),
                &[("stall_timeout_ms", after.as_millis().to_string())],
            ),
            Self::Deleted(name) => Reason::NamespaceNotFound
                .status(format!("namespace `{name}` was deleted"), &[("namespace", name)]),
            Self::Shard(error) => gateway.status(error),
        }
    }
}

impl From<ShardError> for End {
    fn from(error: ShardError) -> Self {
        Self::Shard(error)
    }
}

/// One watcher's task.
struct Watcher {
    shared: Arc<Shared>,
    namespace: Arc<Namespace>,
    request: Arc<FeedRequest>,
    /// The name of the request's filter.
    filter: u64,
    /// By shard.
    feeds: Vec<Feed>,
    moved: watch::Receiver<u64>,
    responses: mpsc::Sender<pb::WatchResponse>,
    interval: Duration,
    /// When the last response left.
    sent: Instant,
    /// The token of the last response that had one: what the watcher certainly gets.
    reached: Bytes,
    /// Shards of which there is more than may be sent yet.
    waiting: u32,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    async fn run(mut self, ended: oneshot::Sender<Status>) {
        let shared = Arc::clone(&self.shared);
        shared.metrics.watch_began();
        let end = match self.serve().await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        let status = end.status(&shared.gateway);
        let reason = Reason::of(&status);
        shared.metrics.watch_ended(reason);
        if reason.is_some() {
            let namespace = &self.namespace.name;
            tracing::debug!(%namespace, reason = reason.map(Reason::as_str), "a watcher was cut");
        }
        // Nobody listens if it went away.
        let _ = ended.send(with_token(&status, "resume_token", &self.reached));
    }

    /// Sends until something ends it.
    async fn serve(&mut self) -> Result<std::convert::Infallible, End> {
        self.send_checkpoint().await?;
        loop {
            self.moved.borrow_and_update();
            self.check_end()?;
            // Boxed, so that a watcher to whom nothing happens stays small.
            Box::pin(self.drain()).await?;
            let due = self.sent + self.interval;
            // Safe to drop: all of these only wait.
            tokio::select! {
                biased;
                () = self.shared.shutdown.cancelled() => return Err(End::Draining),
                () = self.responses.closed() => return Err(End::Gone),
                changed = self.moved.changed() => if changed.is_err() {
                    return Err(End::Draining);
                },
                () = tokio::time::sleep_until(due) => self.send_checkpoint().await?,
            }
        }
    }

    /// Whether this node can serve the watcher at all.
    fn check(&self) -> Result<(), Status> {
        self.check_end().map_err(|end| end.status(&self.shared.gateway))
    }

    fn check_end(&self) -> Result<(), End> {
        let shards = self.shared.gateway.shards();
        if shards.catalog().current().with_id(self.namespace.id).is_none() {
            return Err(End::Deleted(self.namespace.name.clone()));
        }
        if let Some(shard) = self.shared.hub.leaderless() {
            return Err(ShardError::NotLeader { shard, leader: None }.into());
        }
        shards.iter().try_for_each(Shard::check_takes_part)?;
        Ok(())
    }

    /// Sends all that there is.
    async fn drain(&mut self) -> Result<(), End> {
        loop {
            let mut moved = false;
            let mut snapshot_moved = false;
            self.waiting = 0;
            for place in 0..self.feeds.len() {
                let is_snapshot = !self.feeds[place].cursor().is_live();
                if self.is_at_rest(place) || (is_snapshot && snapshot_moved) {
                    continue;
                }
                self.wait_for_room().await?;
                let batch = self.step(place).await?;
                moved |= batch.moved;
                snapshot_moved |= is_snapshot && batch.moved;
                self.waiting += u32::from(batch.waits);
                self.send(place, batch).await?;
            }
            if !moved {
                return Ok(());
            }
            // Much may happen of which nothing is wanted.
            if self.sent.elapsed() >= self.interval {
                self.send_checkpoint().await?;
            }
            self.check_end()?;
        }
    }

    /// Whether a shard certainly has nothing to send.
    fn is_at_rest(&self, place: usize) -> bool {
        let cursor = self.feeds[place].cursor();
        let shard = self.shared.gateway.shards().iter().nth(place);
        cursor.is_live()
            && shard.is_some_and(|it| it.store().is_at(self.namespace.id, &cursor.given))
    }

    async fn step(&mut self, place: usize) -> Result<FeedBatch, End> {
        let Some(shard) = self.shared.gateway.shards().iter().nth(place).cloned() else {
            return Ok(FeedBatch::default());
        };
        let request = Arc::clone(&self.request);
        let taken = Feed::new(Cursor::snapshot());
        let mut feed = std::mem::replace(&mut self.feeds[place], taken);
        let (feed, batch) = blocking(move || {
            let batch = shard.follow(&mut feed, &request);
            Ok::<_, End>((feed, batch))
        })
        .await?;
        self.feeds[place] = feed;
        Ok(batch?)
    }

    /// Sends what one step gave. All of it is on its way before anything else is read.
    async fn send(&mut self, place: usize, batch: FeedBatch) -> Result<(), End> {
        let shards_left = self.feeds.iter().filter(|feed| !feed.cursor().is_live()).count();
        let scope = self.shared.gateway.scope(self.namespace.id);
        let shard = u32::try_from(place).unwrap_or(u32::MAX);
        if batch.lost.is_some() {
            self.shared.metrics.watch_reset();
        }
        let encoder = encode::Encoder {
            scope,
            rule: self.namespace.rule,
            filter: &self.request.filter,
            shard,
            bytes_max: self.shared.config.message_bytes_max / 4,
        };
        let mut responses = encoder.responses(batch, shards_left);
        if let Some(last) = responses.last_mut() {
            last.resume_token = self.token();
        }
        for response in responses {
            self.send_response(response).await?;
        }
        Ok(())
    }

    async fn send_checkpoint(&mut self) -> Result<(), End> {
        let checkpoint = pb::Checkpoint { shards_waiting: self.waiting };
        let body = Some(pb::watch_event::Body::Checkpoint(checkpoint));
        let events = vec![pb::WatchEvent { shard: 0, body }];
        self.send_response(pb::WatchResponse { resume_token: self.token(), events }).await
    }

    async fn send_response(&mut self, response: pb::WatchResponse) -> Result<(), End> {
        self.wait_for_room().await?;
        self.shared.metrics.watch_sent(response.events.len());
        let token = response.resume_token.clone();
        // There is room, and nobody else sends.
        self.responses.try_send(response).map_err(|_| End::Gone)?;
        self.sent = Instant::now();
        if !token.is_empty() {
            self.reached = token;
        }
        Ok(())
    }

    /// Waits until the last response was taken, but not for ever.
    async fn wait_for_room(&self) -> Result<(), End> {
        let patience = self.shared.config.stall_timeout;
        // Safe to drop: all of these only wait.
        tokio::select! {
            biased;
            () = self.shared.shutdown.cancelled() => Err(End::Draining),
            room = tokio::time::timeout(patience, self.responses.reserve()) => match room {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(_)) => Err(End::Gone),
                Err(_) => Err(End::TooSlow(patience)),
            },
        }
    }

    fn token(&self) -> Bytes {
        let cursors = self.feeds.iter().map(Feed::cursor);
        encode_resume(self.shared.gateway.cluster(), self.namespace.id, self.filter, cursors)
    }
}
