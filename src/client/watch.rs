//! The change feed as a stream that survives broken connections.
//!
//! Any node serves a watch. When the stream breaks, when its node stops or cuts it, it goes on with the
//! last token through another node. What came after that token comes again, and nothing is hidden: a
//! [`WatchEvent::Reset`] is an event like the others.
//!
//! A watch has no deadline as a whole; [`Watch::give_up_after`] bounds how long it may be without a
//! connection that serves. One serves if it brought more than the checkpoint with which each begins, or
//! lasted; so a node that fails after its first word is left for longer and longer, and given up in the
//! end. Memory: one response.

mod event;

use crate::client::describe;
use crate::error::{Error, Result};
use crate::keyspace::CallOptions;
use crate::retry::{Backoff, Safety, Verdict, judge};
use crate::router::Target;
use crate::types::{IntoBytes, key_bounds, proto_duration};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use std::collections::VecDeque;
use std::ops::RangeBounds;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};
use tombolo_proto::v1;
use tombolo_proto::v1::watch_event::Body;
use tombolo_proto::v1::watch_request::Start;
use tombolo_proto::v1::watch_service_client::WatchServiceClient;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

pub use event::{
    Change, ChangeGroup, Concurrent, Deletion, Previous, ResetReason, WatchEvent, Watched,
};

/// As on the server.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
/// After this many intervals without a word the node is taken for dead.
const SILENT_INTERVALS: u32 = 3;
/// What a response may be late by on a busy machine.
const SILENCE_MARGIN: Duration = Duration::from_secs(5);
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// A connection that lasted this long after its first word has served, whatever it brought.
const SERVED_AFTER: Duration = Duration::from_secs(1);

/// A watch, to be read by [`Watch::stream`].
///
/// ```no_run
/// # async fn example(keys: tombolo_client::Keyspace, kept: Option<bytes::Bytes>) -> tombolo_client::Result<()> {
/// use futures::TryStreamExt;
/// use tombolo_client::WatchEvent;
///
/// let watch = keys.watch().prefix("cart:");
/// let mut stream = match kept {
///     Some(token) => watch.resume(token).stream(),
///     None => watch.snapshot().stream(),
/// };
/// while let Some(item) = stream.try_next().await? {
///     if let WatchEvent::Change(change) = &item.event {
///         println!("{:?} = {:?}, {}", change.key, change.value(), change.dot);
///     }
///     // Keep `stream.token()` together with what was made of the items, to go on from it later.
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "does nothing unless streamed"]
pub struct Watch {
    call: CallOptions,
    request: v1::WatchRequest,
    interval: Duration,
    give_up_after: Duration,
}

impl Watch {
    pub(crate) fn new(call: CallOptions, namespace: String) -> Self {
        let request = v1::WatchRequest { namespace, ..Default::default() };
        Self { call, request, interval: CHECKPOINT_INTERVAL, give_up_after: GIVE_UP_AFTER }
    }

    /// Only keys that begin with this. Combines with [`Watch::range`].
    pub fn prefix(mut self, prefix: impl IntoBytes) -> Self {
        self.request.prefix = prefix.into_bytes();
        self
    }

    /// Only keys in this range, by byte order.
    pub fn range<K: IntoBytes + Clone>(mut self, range: impl RangeBounds<K>) -> Self {
        (self.request.start_key, self.request.end_key) = key_bounds(range);
        self
    }

    /// Begins with the present state, instead of with what is written from now on.
    pub fn snapshot(mut self) -> Self {
        self.request.start = Some(Start::Snapshot(v1::Snapshot {}));
        self
    }

    /// Goes on after a token, of this region or of another one. Range and origins must be those of the
    /// watch that it came from.
    pub fn resume(mut self, token: impl Into<Bytes>) -> Self {
        self.request.start = Some(Start::ResumeToken(token.into()));
        self
    }

    /// Only writes that the region which serves the watch took.
    pub fn local_only(mut self) -> Self {
        self.request.origin_filter = v1::OriginFilter::Local.into();
        self
    }

    /// Only writes that other regions took.
    pub fn remote_only(mut self) -> Self {
        self.request.origin_filter = v1::OriginFilter::Remote.into();
        self
    }

    /// Only writes that these regions took.
    pub fn origins<I>(mut self, regions: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.request.origin_regions = regions.into_iter().map(Into::into).collect();
        self
    }

    /// Adds to each change what it replaced.
    pub fn previous(mut self) -> Self {
        self.request.previous = true;
        self
    }

    /// How long the server may be silent: 100 ms to 1 h. Default 10 s. Also decides how soon a dead
    /// node is noticed.
    pub fn checkpoint_interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self.request.checkpoint_interval = Some(proto_duration(interval));
        self
    }

    /// How long the watch may be without a connection that serves before it ends with an error. Default
    /// 60 s.
    pub fn give_up_after(mut self, patience: Duration) -> Self {
        self.give_up_after = patience;
        self
    }

    /// Opens a stream at any node. The error names it.
    async fn connect(&self) -> Result<Connection, (Status, Arc<str>)> {
        let client = &self.call.client;
        let route = client
            .inner
            .router
            .route(&Target::AnyNode, None)
            .map_err(|error| (Status::invalid_argument(error.to_string()), "".into()))?;
        let request = describe(self.request.clone(), &route);
        let address = route.address;
        let mut service = WatchServiceClient::new(route.channel)
            .max_decoding_message_size(client.inner.config.max_reply_bytes);
        let opened = timeout(client.inner.config.deadline, service.watch(request)).await;
        let opened = opened.unwrap_or_else(|_| Err(silent(&address)));
        let stream = opened.map_err(|status| (status, address.clone()))?.into_inner();
        Ok(Connection { stream, address, greeted: None })
    }

    /// What happens, in order. After an error the stream ends.
    pub fn stream(self) -> WatchStream {
        let token = match &self.request.start {
            Some(Start::ResumeToken(token)) => token.clone(),
            Some(Start::Snapshot(_)) | None => Bytes::new(),
        };
        let reader = Reader {
            silence: self.interval.saturating_mul(SILENT_INTERVALS) + SILENCE_MARGIN,
            watch: self,
            connection: None,
            trouble: Trouble::default(),
            waiting: VecDeque::new(),
        };
        let items = futures::stream::try_unfold(reader, |mut reader| async move {
            Ok(Some((reader.next().await?, reader)))
        });
        WatchStream { items: Box::pin(items), token }
    }
}

/// A running watch. Dropping it ends the watch.
pub struct WatchStream {
    items: Pin<Box<dyn Stream<Item = Result<Watched>> + Send>>,
    token: Bytes,
}

impl WatchStream {
    /// The token to go on from: everything that it covers was taken from this stream. Empty until
    /// there is one.
    pub fn token(&self) -> &Bytes {
        &self.token
    }
}

impl Stream for WatchStream {
    type Item = Result<Watched>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = std::task::ready!(self.items.as_mut().poll_next(context));
        if let Some(Ok(Watched { token: Some(token), .. })) = &item {
            self.token = token.clone();
        }
        Poll::Ready(item)
    }
}

impl std::fmt::Debug for WatchStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchStream").field("token_bytes", &self.token.len()).finish()
    }
}

/// Where a watch stands.
struct Reader {
    watch: Watch,
    /// How long the server may say nothing.
    silence: Duration,
    connection: Option<Connection>,
    trouble: Trouble,
    waiting: VecDeque<Watched>,
}

/// An open stream of a node.
struct Connection {
    stream: Streaming<v1::WatchResponse>,
    address: Arc<str>,
    /// When the first response came.
    greeted: Option<Instant>,
}

/// Failures since a connection last served.
#[derive(Default)]
struct Trouble {
    backoff: Backoff,
    /// When patience ends.
    until: Option<Instant>,
}

impl Connection {
    /// Whether this response shows that the connection serves: any but a checkpoint that comes first.
    fn serves(&mut self, response: &v1::WatchResponse) -> bool {
        let is_checkpoint =
            |event: &v1::WatchEvent| matches!(event.body, Some(Body::Checkpoint(_)));
        let is_first = self.greeted.is_none();
        self.greeted.get_or_insert_with(Instant::now);
        !is_first || !response.events.iter().all(is_checkpoint)
    }

    fn has_lasted(&self) -> bool {
        self.greeted.is_some_and(|at| at.elapsed() >= SERVED_AFTER)
    }
}

impl Reader {
    async fn next(&mut self) -> Result<Watched> {
        loop {
            if let Some(item) = self.waiting.pop_front() {
                return Ok(item);
            }
            let response = self.next_response().await?;
            self.take(response)?;
        }
    }

    /// Waits for the next response, opening the stream anew as long as patience lasts.
    async fn next_response(&mut self) -> Result<v1::WatchResponse> {
        loop {
            let (status, address) = match self.receive().await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            if self.connection.take().is_some_and(|it| it.has_lasted()) {
                self.trouble = Trouble::default();
            }
            let Trouble { backoff, until } = &mut self.trouble;
            let until = *until.get_or_insert_with(|| Instant::now() + self.watch.give_up_after);
            let router = &self.watch.call.client.inner.router;
            let pause = match judge(&status, Safety::Read).verdict {
                Verdict::GiveUp => return Err(Error::from_status(&status, false)),
                Verdict::Redirect(_) => backoff.next(None),
                Verdict::Retry { node_failed, after } => {
                    if node_failed || is_leaving(&status) {
                        router.mark_failed(&address);
                        let generation = router.generation();
                        timeout_at(until, router.refresh(generation)).await.ok();
                    }
                    backoff.next(after)
                }
            };
            tracing::debug!(%address, %status, ?pause, "watch interrupted");
            if Instant::now() + pause >= until {
                return Err(Error::from_status(&status, false));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Takes in one message. The error names the node.
    async fn receive(&mut self) -> Result<v1::WatchResponse, (Status, Arc<str>)> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            closed @ None => closed.insert(self.watch.connect().await?),
        };
        let address = connection.address.clone();
        match timeout(self.silence, connection.stream.next()).await {
            Ok(Some(Ok(response))) => {
                if connection.serves(&response) {
                    self.trouble = Trouble::default();
                }
                Ok(response)
            }
            Ok(Some(Err(status))) => Err((status, address)),
            Ok(None) => Err((Status::unavailable("the server closed the watch"), address)),
            Err(_) => {
                let status = silent(&address);
                self.watch.call.client.inner.router.mark_failed(&address);
                Err((status, address))
            }
        }
    }

    fn take(&mut self, response: v1::WatchResponse) -> Result<()> {
        let v1::WatchResponse { resume_token, events } = response;
        let first = self.waiting.len();
        for event in events {
            self.waiting.push_back(Watched { event: event.try_into()?, token: None });
        }
        if !resume_token.is_empty() && first < self.waiting.len() {
            if let Some(last) = self.waiting.back_mut() {
                last.token = Some(resume_token.clone());
            }
            self.watch.request.start = Some(Start::ResumeToken(resume_token));
        }
        Ok(())
    }
}

fn silent(address: &str) -> Status {
    Status::unavailable(format!("{address} did not answer in time"))
}

/// The node says that others may serve what it does not.
fn is_leaving(status: &Status) -> bool {
    let reason = status.get_details_error_info().map(|info| info.reason);
    status.code() == Code::Unavailable
        && matches!(reason.as_deref(), Some("DRAINING" | "NO_LEADER" | "REPLICA_FAILED"))
}
