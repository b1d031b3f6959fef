//! Ordered listings that survive a broken stream.
//!
//! Any node merges all shards and streams pages; each page carries a token that says where it
//! ended. When the stream breaks, the scan continues behind the last page that arrived, through
//! another node, so that no key is missed and none comes twice. Memory: one page.
//!
//! A scan has no deadline as a whole: the deadline bounds the wait for each page.

use crate::client::{describe, out_of_time};
use crate::error::{Error, Result};
use crate::keyspace::{CallOptions, call_options};
use crate::retry::{Backoff, Safety, Verdict, judge};
use crate::router::Target;
use crate::types::{Consistency, Entry, IntoBytes, key_bounds};
use futures::{Stream, StreamExt, TryStreamExt};
use std::collections::VecDeque;
use std::ops::RangeBounds;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use tombolo_proto::v1;
use tonic::{Status, Streaming};

/// A scan, to be read by [`Scan::stream`] or [`Scan::collect`].
///
/// ```no_run
/// # async fn example(keys: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
/// use futures::TryStreamExt;
/// use std::ops::Bound;
///
/// let mut entries = keys.scan().range("2026-01".."2026-02").stream();
/// while let Some(entry) = entries.try_next().await? {
///     println!("{:?}: {:?}", entry.key, entry.value());
/// }
///
/// // A page at a time: the next one begins behind the last key.
/// let page = keys.scan().limit(50).collect().await?;
/// if let Some(last) = page.last() {
///     let behind = (Bound::Excluded(last.key.clone()), Bound::Unbounded);
///     let next_page = keys.scan().range(behind).limit(50).collect().await?;
///     println!("{} keys more", next_page.len());
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "does nothing unless streamed or collected"]
pub struct Scan {
    call: CallOptions,
    consistency: Option<Consistency>,
    request: v1::ScanRequest,
}

call_options!(Scan);

impl Scan {
    pub(crate) fn new(call: CallOptions, namespace: String) -> Self {
        let request = v1::ScanRequest { namespace, ..Default::default() };
        Self { call, consistency: None, request }
    }

    /// Only keys that begin with this. Combines with [`Scan::range`].
    pub fn prefix(mut self, prefix: impl IntoBytes) -> Self {
        self.request.prefix = prefix.into_bytes();
        self
    }

    /// Only keys in this range, by byte order, such as `"a".."b"` or `b"a".to_vec()..`.
    pub fn range<K: IntoBytes + Clone>(mut self, range: impl RangeBounds<K>) -> Self {
        (self.request.start_key, self.request.end_key) = key_bounds(range);
        self
    }

    /// At most this many keys; 0 means all.
    pub fn limit(mut self, keys: u64) -> Self {
        self.request.limit = keys;
        self
    }

    /// From the last key to the first.
    pub fn reverse(mut self) -> Self {
        self.request.reverse = true;
        self
    }

    /// Leaves the values empty.
    pub fn keys_only(mut self) -> Self {
        self.request.keys_only = true;
        self
    }

    /// How fresh the listing must be. Default: see [`crate::Keyspace::get`].
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = Some(consistency);
        self
    }

    /// The entries, in order. After an error the stream ends.
    pub fn stream(self) -> impl Stream<Item = Result<Entry>> + Send + Unpin + 'static {
        let cursor = Cursor::new(self);
        Box::pin(futures::stream::try_unfold(cursor, |cursor| async move {
            let mut cursor = cursor?;
            Ok(cursor.next().await?.map(|entry| (entry, Ok(cursor))))
        }))
    }

    /// All entries at once.
    ///
    /// # Errors
    /// The first error; what was read before is lost.
    pub async fn collect(self) -> Result<Vec<Entry>> {
        self.stream().try_collect().await
    }
}

/// Where a scan stands.
struct Cursor {
    call: CallOptions,
    /// Holds the token of the last page that arrived.
    request: v1::ScanRequest,
    /// Keys still wanted; `None` without a limit.
    remaining: Option<u64>,
    wait: Duration,
    stream: Option<(Streaming<v1::ScanResponse>, Arc<str>)>,
    page: VecDeque<v1::KeyResult>,
    done: bool,
}

impl Cursor {
    fn new(scan: Scan) -> Result<Self> {
        let Scan { call, consistency, mut request } = scan;
        let token = call.token_to_read()?;
        request.consistency = Some(call.consistency(consistency, &token).into());
        request.session_token = token;
        let remaining = (request.limit > 0).then_some(request.limit);
        let wait = call.client.deadline(call.deadline);
        let page = VecDeque::new();
        Ok(Self { call, request, remaining, wait, stream: None, page, done: false })
    }

    async fn next(&mut self) -> Result<Option<Entry>> {
        loop {
            if self.remaining == Some(0) {
                self.stream = None;
                return Ok(None);
            }
            if let Some(result) = self.page.pop_front() {
                self.remaining = self.remaining.map(|keys| keys - 1);
                return Entry::try_from(result).map(Some);
            }
            if self.done {
                return Ok(None);
            }
            self.turn_page().await?;
        }
    }

    /// Waits for the next page, reopening the stream as often as the deadline allows.
    async fn turn_page(&mut self) -> Result<()> {
        let until = Instant::now() + self.wait;
        let mut backoff = Backoff::default();
        loop {
            let (status, address) = match timeout_at(until, self.receive()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(failure)) => failure,
                Err(_) => {
                    self.stream = None;
                    return Err(out_of_time(None, false));
                }
            };
            self.stream = None;
            let router = &self.call.client.inner.router;
            let pause = match judge(&status, Safety::Read).verdict {
                Verdict::GiveUp => return Err(Error::from_status(&status, false)),
                Verdict::Redirect(_) => backoff.next(None),
                Verdict::Retry { node_failed, after } => {
                    if node_failed {
                        router.mark_failed(&address);
                        let generation = router.generation();
                        timeout_at(until, router.refresh(generation)).await.ok();
                    }
                    backoff.next(after)
                }
            };
            tracing::debug!(%address, %status, ?pause, "scan interrupted");
            if Instant::now() + pause >= until {
                return Err(Error::from_status(&status, false));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Takes in one message. The error names the node.
    async fn receive(&mut self) -> Result<(), (Status, Arc<str>)> {
        let (stream, address) = match &mut self.stream {
            Some((stream, address)) => (stream, address.clone()),
            closed @ None => {
                let router = &self.call.client.inner.router;
                let route = router
                    .route(&Target::AnyNode, None)
                    .map_err(|error| (Status::invalid_argument(error.to_string()), "".into()))?;
                self.request.limit = self
                    .remaining
                    .map(|keys| keys - u64::try_from(self.page.len()).unwrap_or(0))
                    .unwrap_or(0);
                let request = describe(self.request.clone(), &route);
                let mut kv = self.call.kv()(route.channel);
                let opened = kv.scan(request).await;
                let stream = opened.map_err(|status| (status, route.address.clone()))?.into_inner();
                let (stream, address) = closed.insert((stream, route.address));
                (stream, address.clone())
            }
        };
        match stream.next().await {
            Some(Ok(reply)) => {
                self.call.observe(&self.request.session_token, &reply.session_token);
                self.done = reply.page_token.is_empty();
                self.request.page_token = reply.page_token;
                self.page.extend(reply.results);
                Ok(())
            }
            Some(Err(status)) => Err((status, address)),
            // A range without keys may be answered without a page.
            None if self.request.page_token.is_empty() => {
                self.done = true;
                Ok(())
            }
            // The server closed in good order before the end, as it may.
            None => Err((Status::unavailable("scan closed before its end"), address)),
        }
    }
}
