//! Scans: pages of all shards, merged into one ordered stream.
//!
//! Each shard is read page by page in blocking tasks; what waits is bounded by bytes. Pages are
//! consistent, the whole scan is not a snapshot: a key that changes while it runs may be seen
//! before or after.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_core::{
    Record,
    key::KEY_BYTES_MAX,
    namespace::Namespace,
    token::{SessionToken, decode_page, encode_page},
};
use tombolo_proto::v1 as pb;
use tombolo_shard::{Shard, ShardError, end_of_prefix};
use tombolo_storage::ScanRange;
use tonic::Status;

use crate::{gateway::Gateway, reason::Reason, status::of_token_error};

/// What one scan may hold in memory, over all shards.
const BUFFER_BYTES_MAX: usize = 8 << 20;
/// A reply is sent when it holds this much.
const REPLY_BYTES_MAX: usize = 256 << 10;
const REPLY_KEYS_MAX: usize = 512;
/// Replies that wait for a slow caller.
const REPLIES_MAX: usize = 2;

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
}

/// One shard's part of a scan.
struct Source {
    shard: Shard,
    /// Where the next page begins; `None` at the end.
    next: Option<ScanRange>,
    page: VecDeque<(Bytes, Record)>,
}

impl ScanStream {
    /// Checks the request and starts the scan.
    pub(crate) fn open(
        gateway: Arc<Gateway>,
        namespace: Arc<Namespace>,
        message: pb::ScanRequest,
        session: SessionToken,
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
        let range = range_of(&message, request_hash)?;
        let source = |shard: &Shard| Source {
            shard: shard.clone(),
            next: range.clone(),
            page: VecDeque::new(),
        };
        let scan = Self {
            sources: gateway.shards().iter().map(source).collect(),
            session,
            left: if message.limit == 0 { u64::MAX } else { message.limit },
            reverse: message.reverse,
            keys_only: message.keys_only,
            request_hash,
            gateway,
            namespace,
        };
        let (replies, receiver) = mpsc::channel(REPLIES_MAX);
        tokio::spawn(scan.run(replies));
        Ok(ReceiverStream::new(receiver))
    }

    async fn run(mut self, replies: mpsc::Sender<Result<pb::ScanResponse, Status>>) {
        loop {
            // Reading may take long where there is little to show; nobody may be waiting any more.
            let reply = tokio::select! {
                reply = self.next_reply() => reply.map_err(|error| self.gateway.status(error)),
                () = replies.closed() => return,
            };
            let last = reply.as_ref().map_or(true, |reply| reply.page_token.is_empty());
            let stopped = replies.send(reply).await.is_err();
            if last || stopped || self.left == 0 {
                return;
            }
        }
    }

    async fn next_reply(&mut self) -> Result<pb::ScanResponse, ShardError> {
        let mut results = Vec::new();
        let mut bytes = 0;
        while bytes < REPLY_BYTES_MAX && results.len() < REPLY_KEYS_MAX && self.left > 0 {
            self.fill().await?;
            let Some((key, record)) = self.pop() else { break };
            let scope = self.gateway.scope(self.namespace.id);
            let (versions, context) = scope.versions(&key, Some(&record), self.keys_only);
            // It may have expired since the page was read.
            if versions.is_empty() {
                continue;
            }
            bytes += key.len() + context.len() + versions.iter().map(version_bytes).sum::<usize>();
            self.left -= 1;
            results.push(pb::KeyResult { key, versions, context });
        }
        let page_token = match results.last() {
            Some(last) if !self.is_exhausted() => {
                encode_page(self.request_hash, &continuation(&last.key, self.reverse))
            }
            Some(_) | None => Bytes::new(),
        };
        // As of now, which is not before any page was read: it covers all that was shown.
        for shard in self.gateway.shards().iter() {
            let frontier = shard.frontier(self.namespace.id);
            self.session.observe(self.namespace.id, shard.id(), &frontier);
        }
        let session_token = self.session.encode(self.gateway.cluster());
        Ok(pb::ScanResponse { results, page_token, session_token })
    }

    fn is_exhausted(&self) -> bool {
        self.sources.iter().all(|source| source.page.is_empty() && source.next.is_none())
    }

    /// Reads a page for every shard that has none.
    async fn fill(&mut self) -> Result<(), ShardError> {
        let bytes_max = (BUFFER_BYTES_MAX / self.sources.len()).max(16 << 10);
        let keys_max = (4096 / self.sources.len()).max(16);
        for source in &mut self.sources {
            while source.page.is_empty()
                && let Some(range) = source.next.take()
            {
                let (shard, namespace) = (source.shard.clone(), self.namespace.id);
                let read = tokio::task::spawn_blocking(move || {
                    let page = shard.scan(namespace, &range, keys_max, bytes_max)?;
                    Ok::<_, ShardError>((page, range))
                });
                let (page, mut range) = match read.await {
                    Ok(page) => page?,
                    Err(panic) => std::panic::resume_unwind(panic.into_panic()),
                };
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

    /// Takes the next key of all shards. Linear in the number of shards, which is small.
    fn pop(&mut self) -> Option<(Bytes, Record)> {
        let reverse = self.reverse;
        let next = self.sources.iter_mut().filter(|source| !source.page.is_empty()).min_by(
            |left, right| {
                let order = left.page[0].0.cmp(&right.page[0].0);
                if reverse { order.reverse() } else { order }
            },
        )?;
        next.page.pop_front()
    }
}

fn version_bytes(version: &pb::Version) -> usize {
    match version.value.as_ref().and_then(|value| value.kind.as_ref()) {
        Some(pb::value::Kind::Data(data)) => data.len() + 64,
        Some(_) | None => 64,
    }
}

/// Where a scan goes on after `key`: the first key of the rest, or, backwards, the key that the
/// rest ends before.
fn continuation(key: &Bytes, reverse: bool) -> Bytes {
    if reverse {
        return key.clone();
    }
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next.into()
}

/// The range that a request asks for; `None` if it is empty.
fn range_of(message: &pb::ScanRequest, request_hash: u32) -> Result<Option<ScanRange>, Status> {
    let mut start = message.start_key.clone().max(message.prefix.clone());
    let mut end = (!message.end_key.is_empty()).then(|| message.end_key.clone());
    if let Some(prefix_end) = end_of_prefix(&message.prefix) {
        end = Some(end.map_or(prefix_end.clone(), |end| end.min(prefix_end)));
    }
    if !message.page_token.is_empty() {
        let next = decode_page(request_hash, &message.page_token)
            .map_err(|error| of_token_error(Reason::PageTokenInvalid, &error))?;
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

    fn range(message: &pb::ScanRequest) -> Option<(Bytes, Option<Bytes>)> {
        range_of(message, hash_of(message)).unwrap().map(|range| (range.start, range.end))
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
            message.page_token = encode_page(hash_of(&message), &continuation(&key, reverse));
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
        let page_token = encode_page(hash_of(&message), b"ab");
        let other = pb::ScanRequest { prefix: "b".into(), page_token, ..Default::default() };
        let status = range_of(&other, hash_of(&other)).unwrap_err();
        assert_eq!(Reason::of(&status), Some(Reason::PageTokenInvalid));
    }
}
