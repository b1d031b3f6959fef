//! Scans: pages of all shards, merged into one ordered stream.
//!
//! When a scan opens it pins every shard, and shows each as of one applied position, however long it
//! takes; shards are pinned one after the other, so a scan over several is no snapshot of all. A thread
//! holds the pins and reads a page when one is asked for; what waits is bounded by bytes. A scan that
//! goes on with a page token pins anew. A caller that takes nothing for [`STALL_TIMEOUT`] loses the scan,
//! and with it the pins, which hold old versions of the whole store.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt, future, stream};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_core::{
    NamespaceId, Record, VersionVector,
    element::{self, Element},
    key::KEY_BYTES_MAX,
    namespace::Namespace,
    token::{SessionToken, TokenKey, encode_page},
};
use tombolo_proto::v1 as pb;
use tombolo_shard::{Shard, ShardError, end_of_prefix};
use tombolo_storage::{Pinned, ScanPage, ScanRange, StorageError};
use tonic::Status;

use crate::{
    convert::open_page,
    gateway::Gateway,
    reason::Reason,
    typed::{ELEMENTS_DEFAULT, Shown},
};

/// What one scan may hold in memory, over all shards.
const BUFFER_BYTES_MAX: usize = 8 << 20;
/// A reply is sent when it holds this much.
const REPLY_BYTES_MAX: usize = 256 << 10;
const REPLY_KEYS_MAX: usize = 512;
/// Replies that wait for a slow caller.
const REPLIES_MAX: usize = 2;
/// How long a caller may take nothing.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Scans of a node at once: each has a thread.
pub(crate) const SCANS_MAX: usize = 128;

/// A scan that is running. Dropping the stream stops it.
pub(crate) struct ScanStream {
    gateway: Arc<Gateway>,
    namespace: Arc<Namespace>,
    sources: Vec<Source>,
    left: u64,
    reverse: bool,
    keys_only: bool,
    request_hash: u32,
    session: SessionToken,
    /// Of a typed namespace: the key whose elements are coming.
    open: Option<OpenKey>,
    /// To the thread that holds the pins.
    asks: mpsc::Sender<Ask>,
}

/// A page that is wanted of a shard.
struct Ask {
    /// The shard's place among all.
    place: usize,
    range: ScanRange,
    keys_max: usize,
    bytes_max: usize,
    answer: oneshot::Sender<Result<ScanPage, StorageError>>,
}

/// One shard's part of a scan.
struct Source {
    shard: Shard,
    /// Where the next page begins; `None` at the end.
    next: Option<ScanRange>,
    page: VecDeque<(Bytes, Record)>,
    /// What was applied when it was pinned.
    seen: VersionVector,
}

/// A typed value that is being put together.
struct OpenKey {
    key: Bytes,
    shown: Shown,
    /// It has more elements than a scan shows.
    partial: bool,
    /// What its shard had applied when it was pinned.
    seen: VersionVector,
}

impl ScanStream {
    /// Checks the request and starts the scan. `permit` is given back when it ends.
    pub(crate) async fn open(
        gateway: Arc<Gateway>,
        namespace: Arc<Namespace>,
        message: pb::ScanRequest,
        session: SessionToken,
        permit: OwnedSemaphorePermit,
    ) -> Result<impl Stream<Item = Result<pb::ScanResponse, Status>> + Send, Status> {
        for bound in [&message.start_key, &message.end_key, &message.prefix] {
            if bound.len() > KEY_BYTES_MAX {
                return Err(Reason::KeyTooLong.status(
                    format!("a bound has {} bytes; keys have at most {KEY_BYTES_MAX}", bound.len()),
                    &[("max_bytes", KEY_BYTES_MAX.to_string())],
                ));
            }
        }
        let request_hash = hash_of(&message);
        let range = range_of(gateway.cluster(), &message, request_hash)?;
        let range = match range {
            Some(range) if namespace.rule.is_typed() => Some(of_elements(&range)),
            other => other,
        };
        let shards: Vec<Shard> = gateway.shards().iter().cloned().collect();
        let (asks, asked) = mpsc::channel(1);
        let (pinned, pins) = oneshot::channel();
        let (of, id) = (shards.clone(), namespace.id);
        tokio::task::spawn_blocking(move || {
            read_pinned(&of, id, pinned, asked);
            drop(permit);
        });
        let seen = pins.await.map_err(|_| Reason::Internal.status("no shard was pinned", &[]))?;
        let source = |(shard, seen): (Shard, VersionVector)| Source {
            shard,
            next: range.clone(),
            page: VecDeque::new(),
            seen,
        };
        let scan = Self {
            sources: shards.into_iter().zip(seen).map(source).collect(),
            asks,
            session,
            left: if message.limit == 0 { u64::MAX } else { message.limit },
            reverse: message.reverse,
            keys_only: message.keys_only,
            request_hash,
            open: None,
            gateway,
            namespace,
        };
        let (replies, receiver) = mpsc::channel(REPLIES_MAX);
        let (stalled, stall) = oneshot::channel();
        tokio::spawn(scan.run(replies, stalled));
        // What was ready is shown; then a scan that was cut says so, and is not taken for whole.
        let cut = stream::once(stall).filter_map(|stalled| {
            let text = format!(
                "the scan was not read for {STALL_TIMEOUT:?}; go on with the last page token"
            );
            future::ready(stalled.ok().map(|()| Err(Reason::Deadline.status(text, &[]))))
        });
        Ok(ReceiverStream::new(receiver).chain(cut))
    }

    async fn run(
        mut self,
        replies: mpsc::Sender<Result<pb::ScanResponse, Status>>,
        stalled: oneshot::Sender<()>,
    ) {
        loop {
            // Reading may take long where there is little to show; nobody may be waiting any more.
            let reply = tokio::select! {
                reply = self.next_reply() => reply,
                () = replies.closed() => return,
            };
            let last = reply.as_ref().map_or(true, |reply| reply.page_token.is_empty());
            match tokio::time::timeout(STALL_TIMEOUT, replies.send(reply)).await {
                Ok(Ok(())) if !last && self.left > 0 => {}
                Ok(Ok(()) | Err(_)) => return,
                Err(_) => {
                    // Nobody may be there to hear it.
                    let _ = stalled.send(());
                    return;
                }
            }
        }
    }

    async fn next_reply(&mut self) -> Result<pb::ScanResponse, Status> {
        let mut results = Vec::new();
        let mut bytes = 0;
        while bytes < REPLY_BYTES_MAX && results.len() < REPLY_KEYS_MAX && self.left > 0 {
            let Some(result) = self.next_key().await? else { break };
            // It may have expired since the page was read.
            if result.versions.is_empty() {
                continue;
            }
            bytes += result.encoded_len();
            self.left -= 1;
            results.push(result);
        }
        let page_token = match results.last() {
            Some(last) if !self.is_exhausted() => {
                let next = continuation(&last.key, self.reverse);
                encode_page(self.gateway.cluster(), self.request_hash, &next)
            }
            Some(_) | None => Bytes::new(),
        };
        for Source { shard, seen, .. } in &self.sources {
            self.session.observe(self.namespace.id, shard.id(), seen);
        }
        let session_token = self.gateway.session_token(self.session.clone());
        Ok(pb::ScanResponse { results, page_token, session_token })
    }

    /// The next key with its value.
    async fn next_key(&mut self) -> Result<Option<pb::KeyResult>, Status> {
        let rule = self.namespace.rule;
        if rule.is_typed() {
            let next = self.next_typed().await.map_err(|error| self.gateway.status(error))?;
            let Some(OpenKey { key, shown, partial, seen }) = next else { return Ok(None) };
            let scope = self.gateway.scope(self.namespace.id);
            let result = scope.typed_result(rule, key, shown.assembly, &seen, self.keys_only);
            return Ok(Some(pb::KeyResult { partial, ..result }));
        }
        self.fill().await.map_err(|error| self.gateway.status(error))?;
        let Some(source) = self.first() else { return Ok(None) };
        let Some((key, record)) = source.page.pop_front() else { return Ok(None) };
        let scope = self.gateway.scope(self.namespace.id);
        Ok(Some(scope.key_result(&self.namespace, key, Some(&record), self.keys_only)))
    }

    /// Puts the next key's elements together. Passes over those that are more than a scan shows.
    async fn next_typed(&mut self) -> Result<Option<OpenKey>, ShardError> {
        loop {
            self.fill().await?;
            let mut open = self.open.take();
            let Some(source) = self.first() else { return Ok(open) };
            let Some((record_key, record)) = source.page.pop_front() else { return Ok(open) };
            let Some(element) = Element::from_key(&record_key) else {
                self.open = open;
                continue;
            };
            match &mut open {
                Some(held) if held.key == element.key => {
                    if !held.shown.add(element, &record) {
                        held.partial = true;
                        source.skip(&held.key);
                    }
                    self.open = open;
                }
                _ => {
                    self.open = Some(OpenKey::new(element, &record, &source.seen));
                    if open.is_some() {
                        return Ok(open);
                    }
                }
            }
        }
    }

    fn is_exhausted(&self) -> bool {
        let is_done = |source: &Source| source.page.is_empty() && source.next.is_none();
        self.open.is_none() && self.sources.iter().all(is_done)
    }

    /// Reads a page for every shard that has none.
    async fn fill(&mut self) -> Result<(), ShardError> {
        let bytes_max = (BUFFER_BYTES_MAX / self.sources.len()).max(16 << 10);
        let keys_max = (4096 / self.sources.len()).max(16);
        for (place, source) in self.sources.iter_mut().enumerate() {
            while source.page.is_empty()
                && let Some(mut range) = source.next.take()
            {
                let (answer, page) = oneshot::channel();
                let ask = Ask { place, range: range.clone(), keys_max, bytes_max, answer };
                // The thread ends when this scan does, or by a panic, which the node reports.
                let _ = self.asks.send(ask).await;
                let shard = source.shard.id();
                let page = page.await.map_err(|_| ShardError::Stopped { shard })??;
                source.page = page.records.into();
                source.next = page.next.map(|next| {
                    if range.reverse {
                        range.end = Some(next);
                    } else {
                        range.start = next;
                    }
                    range
                });
            }
        }
        Ok(())
    }

    /// The shard that has the next key of all. Linear in the number of shards, which is small.
    fn first(&mut self) -> Option<&mut Source> {
        let reverse = self.reverse;
        self.sources.iter_mut().filter(|source| !source.page.is_empty()).min_by(|left, right| {
            let order = left.page[0].0.cmp(&right.page[0].0);
            if reverse { order.reverse() } else { order }
        })
    }
}

impl OpenKey {
    /// The value that an element begins.
    fn new(element: Element, record: &Record, seen: &VersionVector) -> Self {
        let (key, mut shown) = (element.key.clone(), Shown::new(0, ELEMENTS_DEFAULT));
        shown.add(element, record);
        Self { key, shown, partial: false, seen: seen.clone() }
    }
}

impl Source {
    /// Passes over the rest of a key's elements.
    fn skip(&mut self, key: &[u8]) {
        let under = element::prefix(key, &[]);
        self.page.retain(|(held, _)| !held.starts_with(&under));
        let Some(next) = &mut self.next else { return };
        if next.reverse {
            let end = Bytes::from(under);
            next.end = Some(next.end.take().map_or(end.clone(), |at| at.min(end)));
        } else if let Some(after) = element::end_of(&under) {
            next.start = next.start.clone().max(Bytes::from(after));
        }
    }
}

/// Pins all shards, tells what each has applied, and reads pages until nobody asks any more.
fn read_pinned(
    shards: &[Shard],
    namespace: NamespaceId,
    pinned: oneshot::Sender<Vec<VersionVector>>,
    mut asked: mpsc::Receiver<Ask>,
) {
    let pins: Vec<Pinned<'_>> = shards.iter().map(|shard| shard.store().pin(namespace)).collect();
    if pinned.send(pins.iter().map(|pin| pin.frontier().clone()).collect()).is_err() {
        return;
    }
    while let Some(Ask { place, range, keys_max, bytes_max, answer }) = asked.blocking_recv() {
        // Whoever asked may be gone.
        let _ = answer.send(pins[place].scan(&range, keys_max, bytes_max));
    }
}

/// The range of the elements of all keys in a range.
fn of_elements(range: &ScanRange) -> ScanRange {
    let bound = |key: &Bytes| Bytes::from(element::bound(key));
    ScanRange {
        start: bound(&range.start),
        end: range.end.as_ref().map(bound),
        reverse: range.reverse,
    }
}

/// Where a scan goes on after `key`: the first key of the rest, or, backwards, the key that the
/// rest ends before.
fn continuation(key: &Bytes, reverse: bool) -> Bytes {
    if reverse { key.clone() } else { after(key) }
}

/// The first key after this one.
pub(crate) fn after(key: &[u8]) -> Bytes {
    [key, &[0]].concat().into()
}

/// The range that a request asks for; `None` if it is empty.
fn range_of(
    key: &TokenKey,
    message: &pb::ScanRequest,
    request_hash: u32,
) -> Result<Option<ScanRange>, Status> {
    let mut start = message.start_key.clone().max(message.prefix.clone());
    let mut end = (!message.end_key.is_empty()).then(|| message.end_key.clone());
    if let Some(prefix_end) = end_of_prefix(&message.prefix) {
        end = Some(end.map_or(prefix_end.clone(), |end| end.min(prefix_end)));
    }
    if !message.page_token.is_empty() {
        let next = open_page(key, request_hash, &message.page_token)?;
        if message.reverse {
            end = Some(end.map_or(next.clone(), |end| end.min(next)));
        } else {
            start = start.max(next);
        }
    }
    let empty = end.as_ref().is_some_and(|end| *end <= start);
    Ok((!empty).then_some(ScanRange { start, end, reverse: message.reverse }))
}

/// Ties a page token to what was asked for.
fn hash_of(message: &pb::ScanRequest) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in
        [message.namespace.as_bytes(), &message.start_key, &message.end_key, &message.prefix]
    {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(&[u8::from(message.reverse)]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> TokenKey {
        TokenKey::without_secret("test")
    }

    fn range(message: &pb::ScanRequest) -> Option<(Bytes, Option<Bytes>)> {
        let range = range_of(&key(), message, hash_of(message)).unwrap();
        range.map(|range| (range.start, range.end))
    }

    #[test]
    fn prefix_and_range_combine_to_what_both_allow() {
        let message = pb::ScanRequest {
            start_key: "ab".into(),
            end_key: "b".into(),
            prefix: "a".into(),
            ..Default::default()
        };
        assert_eq!(range(&message), Some(("ab".into(), Some("b".into()))));
        let disjoint = pb::ScanRequest { start_key: "c".into(), prefix: "a".into(), ..message };
        assert_eq!(range(&disjoint), None);
        let last = pb::ScanRequest { prefix: Bytes::from_static(&[255]), ..Default::default() };
        assert_eq!(range(&last), Some((Bytes::from_static(&[255]), None)));
    }

    #[test]
    fn a_page_goes_on_after_the_last_key_in_both_directions() {
        let key = Bytes::from_static(b"k");
        for reverse in [false, true] {
            let mut message = pb::ScanRequest { reverse, ..Default::default() };
            message.page_token =
                encode_page(&self::key(), hash_of(&message), &continuation(&key, reverse));
            let expected = if reverse {
                (Bytes::new(), Some(key.clone()))
            } else {
                (Bytes::from_static(b"k\0"), None)
            };
            assert_eq!(range(&message), Some(expected));
        }
    }

    #[test]
    fn a_page_token_of_another_request_is_refused() {
        let message = pb::ScanRequest { prefix: "a".into(), ..Default::default() };
        let page_token = encode_page(&key(), hash_of(&message), b"ab");
        let other = pb::ScanRequest { prefix: "b".into(), page_token, ..Default::default() };
        let status = range_of(&key(), &other, hash_of(&other)).unwrap_err();
        assert_eq!(Reason::of(&status), Some(Reason::PageTokenMismatch));
        let foreign = TokenKey::without_secret("another cluster");
        let status = range_of(&foreign, &other, hash_of(&other)).unwrap_err();
        assert_eq!(Reason::of(&status), Some(Reason::PageTokenInvalid));
    }
}
