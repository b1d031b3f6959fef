//! The sending side of a repair: reads a pinned cut on a thread of its own, answers what the
//! receiver lacks.
//!
//! Takes as long as the receiver wants it to: nothing is read ahead of what it takes. A receiver
//! that takes nothing for [`REPAIR_STALL_TIMEOUT`] loses the cut.

use bytes::Bytes;
use futures::StreamExt;
use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;
use tombolo_core::{
    NamespaceId, Record, VersionVector,
    merkle::{Block, FAN_OUT},
    repair::{self, Offer},
};
use tombolo_proto::internal::v1 as pb;
use tombolo_shard::Shard;
use tombolo_storage::{Cut, StorageError};
use tonic::{Status, Streaming};

use super::{decode_block, decode_digests, encode_block, in_background};
use crate::{
    config::{MERGE_BYTES_MAX, REPAIR_STALL_TIMEOUT},
    wire,
};

pub(crate) type Replies = mpsc::Sender<Result<pb::RepairResponse, Status>>;

/// Serves one repair until it is done, the receiver goes away, or `shutdown` fires.
pub(crate) async fn serve(
    shard: Shard,
    open: pb::RepairOpen,
    mut requests: Streaming<pb::RepairRequest>,
    replies: Replies,
    shutdown: CancellationToken,
) {
    let (leaves, asked) = mpsc::channel(4);
    let failed = replies.clone();
    let refused = failed.clone();
    let serving = in_background("repair source", move || {
        let served = Session::new(&shard, open, replies).and_then(|session| session.run(asked));
        if let Err(status) = served {
            let _ = failed.try_send(Err(status));
        }
    });
    let serving = match serving {
        Ok(serving) => serving,
        Err(error) => {
            let text = format!("no thread to read data: {error}");
            let _ = refused.try_send(Err(Status::resource_exhausted(text)));
            return;
        }
    };
    // Ends with the receiver's stream; what is missing then, the thread sees by the kind of end.
    while let Some(Some(request)) = shutdown.run_until_cancelled(requests.next()).await {
        if leaves.send(request.map_err(|status| status.message().to_owned())).await.is_err() {
            break;
        }
    }
    if shutdown.is_cancelled() {
        let _ = leaves.try_send(Err("the node is stopping".to_owned()));
    }
    drop((leaves, refused));
    let _ = serving.await;
}

/// One repair.
struct Session<'a> {
    cut: Cut<'a>,
    /// What the receiver has applied; values that it covers are not sent.
    known: VersionVector,
    nodes: Box<Block>,
    /// Of which writes to send no values.
    withheld: VersionVector,
    keys_only: bool,
    replies: Replies,
}

type Asked = mpsc::Receiver<Result<pb::RepairRequest, String>>;

impl<'a> Session<'a> {
    fn new(shard: &'a Shard, open: pb::RepairOpen, replies: Replies) -> Result<Self, Status> {
        let nodes = decode_block(&open.nodes).ok_or_else(|| malformed("256 nodes"))?;
        let known = wire::decode_frontier(open.frontier)?;
        let cut = shard.store().cut(NamespaceId(open.namespace));
        let mut withheld = if open.distrust { VersionVector::new() } else { known.clone() };
        if open.keys_only {
            withheld.join(cut.frontier());
            withheld.join(cut.ahead());
        }
        let (nodes, keys_only) = (Box::new(nodes), open.keys_only);
        Ok(Self { cut, known, nodes, withheld, keys_only, replies })
    }

    fn run(self, mut asked: Asked) -> Result<(), Status> {
        self.send_cut()?;
        // Whoever wants keys only wants nothing else.
        let mut has_sent_rest = self.keys_only;
        while let Some(request) = asked.blocking_recv() {
            let request = request.map_err(Status::unavailable)?;
            // Deletions, and why values are gone, come before the absence of values. Not before the
            // first request: a receiver that only compares wants nothing more.
            if !std::mem::replace(&mut has_sent_rest, true) {
                self.send_rest()?;
            }
            let Some(pb::repair_request::Body::Leaves(page)) = request.body else {
                return Err(malformed("leaves"));
            };
            for leaf in page.leaves {
                self.answer(leaf)?;
            }
        }
        if !has_sent_rest {
            self.send_rest()?;
        }
        self.send(pb::repair_response::Body::End(pb::RepairEnd {}))
    }

    fn send_cut(&self) -> Result<(), Status> {
        let tree = self.cut.tree();
        let differing = repair::differing_nodes(&self.nodes, &tree.nodes());
        let node = |high: u8| pb::RepairNode {
            node: u32::from(high),
            leaves: encode_block(tree.block(high).unwrap_or(&[0; FAN_OUT])),
        };
        self.send(pb::repair_response::Body::Cut(pb::RepairCut {
            frontier: wire::encode_frontier(self.cut.frontier()),
            ahead: wire::encode_frontier(self.cut.ahead()),
            nodes: differing.into_iter().map(node).collect(),
            members: wire::encode_members(self.cut.members()),
        }))
    }

    fn answer(&self, asked: pb::RepairLeaf) -> Result<(), Status> {
        let leaf = u16::try_from(asked.leaf).map_err(|_| malformed("a leaf below 65536"))?;
        let digests = decode_digests(&asked.digests).ok_or_else(|| malformed("digests"))?;
        let held = self.cut.leaf(leaf).map_err(|error| unreadable(&error))?;
        let answer = repair::answer_leaf(&held, digests, &self.withheld);
        let mut page = Page::default();
        for offer in &answer.offers {
            if let Some(offers) = page.add(offer.to_bytes()) {
                self.send(leaf_answer(asked.leaf, offers, Vec::new(), true))?;
            }
        }
        self.send(leaf_answer(asked.leaf, page.encoded, answer.unknown, false))
    }

    /// Sends what trees do not show: first the ledger, then records.
    fn send_rest(&self) -> Result<(), Status> {
        let (cut, known) = (&self.cut, &self.known);
        self.send_pages(ledger_page, |take| {
            cut.ledger(|entry| !repair::lacks_entry(known, &entry) || take(entry.to_bytes()))
        })?;
        let offer = |key, record: &Record| Offer::new(key, record, known).to_bytes();
        self.send_pages(offers_page, |take| {
            cut.tombstones(|key, record| {
                !repair::lacks_tombstone(known, &record) || take(offer(key, &record))
            })
        })?;
        if !cut.frontier().covers_all(cut.ahead()) {
            self.send_pages(offers_page, |take| {
                cut.records(|key, record| {
                    !repair::is_ahead(cut.frontier(), &record) || take(offer(key, &record))
                })
            })?;
        }
        Ok(())
    }

    /// Sends, page by page, what `read` hands to its argument, which answers whether to go on.
    fn send_pages(
        &self,
        message: fn(Vec<Bytes>) -> pb::RepairRest,
        read: impl FnOnce(&mut dyn FnMut(Bytes) -> bool) -> Result<(), StorageError>,
    ) -> Result<(), Status> {
        let send = |page| self.send(pb::repair_response::Body::Rest(message(page)));
        let (mut page, mut sent) = (Page::default(), Ok(()));
        let mut take = |encoded: Bytes| {
            if let Some(full) = page.add(encoded) {
                sent = send(full);
            }
            sent.is_ok()
        };
        read(&mut take).map_err(|error| unreadable(&error))?;
        sent?;
        if page.encoded.is_empty() { Ok(()) } else { send(page.encoded) }
    }

    fn send(&self, body: pb::repair_response::Body) -> Result<(), Status> {
        let reply = Ok(pb::RepairResponse { body: Some(body) });
        let sent =
            async { tokio::time::timeout(REPAIR_STALL_TIMEOUT, self.replies.send(reply)).await };
        match Handle::current().block_on(sent) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the caller went away")),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "the caller took nothing for {REPAIR_STALL_TIMEOUT:?}"
            ))),
        }
    }
}

/// Encoded things that go in one message.
#[derive(Default)]
struct Page {
    encoded: Vec<Bytes>,
    bytes: usize,
}

impl Page {
    /// Adds one, and answers the page if it is full with it.
    fn add(&mut self, encoded: Bytes) -> Option<Vec<Bytes>> {
        self.bytes += encoded.len();
        self.encoded.push(encoded);
        (self.bytes >= MERGE_BYTES_MAX).then(|| std::mem::take(self).encoded)
    }
}

fn leaf_answer(
    leaf: u32,
    offers: Vec<Bytes>,
    unknown: Vec<u64>,
    more: bool,
) -> pb::repair_response::Body {
    let checksum = wire::checksum(&offers);
    pb::repair_response::Body::Answer(pb::RepairAnswer { leaf, offers, unknown, more, checksum })
}

fn ledger_page(ledger: Vec<Bytes>) -> pb::RepairRest {
    pb::RepairRest { checksum: wire::checksum(&ledger), offers: Vec::new(), ledger }
}

fn offers_page(offers: Vec<Bytes>) -> pb::RepairRest {
    pb::RepairRest { checksum: wire::checksum(&offers), offers, ledger: Vec::new() }
}

fn malformed(expected: &str) -> Status {
    Status::invalid_argument(format!("a repair request is malformed: expected {expected}"))
}

fn unreadable(error: &StorageError) -> Status {
    Status::internal(format!("the data to repair from: {error}"))
}
