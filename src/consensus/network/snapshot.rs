//! A snapshot on the wire: what the receiver lacks, in numbered chunks.
//!
//! The sender asks first ([`begin`](pb::BeginSnapshotRequest)) which chunk the receiver needs
//! next, then streams from there. Chunks are about one megabyte, carry a checksum, and are
//! produced only as fast as they are taken: a few of them are in memory on either side, whatever
//! the size of the snapshot. A transfer that breaks goes on at the first missing chunk, because
//! both sides keep what they have under the snapshot's id.
//!
//! Invariants:
//! * At most one stream writes into a group's half-received snapshot: a newer one ends an older.
//! * A chunk is on disk, in order and verified, before the next one is taken.
//! * Every wait for a single chunk has a limit; the whole transfer has none.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use openraft::errors::RPCError;
use openraft::network::RPCTypes;
use openraft::raft::SnapshotResponse;
use openraft::storage::Snapshot;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_core::ShardId;
use tombolo_proto::internal::v1 as pb;
use tombolo_storage::{SnapshotInstall, SnapshotTotals, Store};
use tonic::{Status, Streaming};

use crate::network::client::{Connection, network, required, rpc_error, unreachable};
use crate::snapshot::{Outgoing, SnapshotData};
use crate::state_machine::ShardSnapshot;
use crate::types::{TypeConfig, Vote, meta_from_wire, meta_to_wire, vote_from_wire, vote_to_wire};

/// Chunks between the disk and the connection.
const CHUNKS_BUFFERED: usize = 4;
/// Transfers that a node sends, and receives, at the same time.
pub(crate) const TRANSFERS_MAX: usize = 2;
/// How long a new transfer waits for an older one of the same group to let go.
const PREEMPT_LIMIT: Duration = Duration::from_secs(5);

// --- sending ------------------------------------------------------------------------------------

impl Connection {
    /// Sends what the receiver lacks and waits until it has installed the snapshot.
    pub(crate) async fn send_snapshot(
        &self,
        vote: Vote,
        outgoing: Arc<Outgoing>,
    ) -> Result<SnapshotResponse<TypeConfig>, RPCError<TypeConfig>> {
        let permit = self.transport.snapshots.clone().acquire_owned().await;
        let _permit = permit.map_err(|_| network("the node is stopping"))?;
        let mut peer = self.transport.peer(self.target)?;
        let identity = self.transport.identity(self.target, &peer).await?;
        let patience = self.transport.patience;
        let hello = pb::SnapshotChunk {
            identity: Some(identity),
            group: self.group,
            vote: Some(vote_to_wire(&vote)),
            meta: Some(meta_to_wire(outgoing.id(), outgoing.meta())),
            ..pb::SnapshotChunk::default()
        };
        let begin = pb::BeginSnapshotRequest {
            identity: hello.identity.clone(),
            group: hello.group,
            vote: hello.vote,
            meta: hello.meta.clone(),
        };
        let first = tokio::time::timeout(patience.chunk, peer.snapshot.begin_snapshot(begin))
            .await
            .map_err(|_| self.timeout(RPCTypes::InstallSnapshot, patience.chunk))?
            .map_err(|status| rpc_error(&status))?
            .into_inner()
            .next_chunk;

        let (chunks, stream) = mpsc::channel(CHUNKS_BUFFERED);
        let install = peer.snapshot.install_snapshot(ReceiverStream::new(stream));
        let mut install = std::pin::pin!(install);
        let feed = self.feed(outgoing, hello, first, chunks);
        // The receiver may refuse while it is still being fed.
        let answer = tokio::select! {
            biased;
            answer = &mut install => answer,
            fed = feed => {
                fed?;
                tokio::time::timeout(patience.install, install)
                    .await
                    .map_err(|_| self.timeout(RPCTypes::InstallSnapshot, patience.install))?
            }
        };
        let answer = answer.map_err(|status| rpc_error(&status))?.into_inner();
        self.transport.peer(self.target)?;
        Ok(SnapshotResponse::new(vote_from_wire(required(answer.vote, "vote")?)))
    }

    async fn feed(
        &self,
        outgoing: Arc<Outgoing>,
        hello: pb::SnapshotChunk,
        first: u64,
        chunks: mpsc::Sender<pb::SnapshotChunk>,
    ) -> Result<(), RPCError<TypeConfig>> {
        let broken = |error: io::Error| unreachable(format!("reading the snapshot: {error}"));
        let mut number = first;
        let mut head = Some(hello);
        loop {
            let source = outgoing.clone();
            let read = tokio::task::spawn_blocking(move || match source.chunk(number)? {
                Some(block) => Ok::<_, io::Error>((Some(block), None)),
                None => Ok((None, Some(source.totals()?))),
            });
            let read = read.await.map_err(io::Error::other).and_then(|read| read);
            let (block, totals) = read.map_err(broken)?;
            let head = head.take().unwrap_or_default();
            let last = block.is_none();
            let (bytes, crc) =
                block.map_or_else(Default::default, |block| (block.block, block.crc));
            let end = totals.map(|end| pb::SnapshotEnd {
                chunks: end.chunks,
                pairs: end.pairs,
                bytes: end.bytes,
                crc: end.crc,
            });
            let chunk = pb::SnapshotChunk { number, block: bytes, crc, end, ..head };
            if self.transport.faults.is_cut(self.target) {
                return Err(unreachable("cut off".to_owned()));
            }
            let limit = self.transport.patience.chunk;
            tokio::time::timeout(limit, chunks.send(chunk))
                .await
                .map_err(|_| self.timeout(RPCTypes::InstallSnapshot, limit))?
                .map_err(|_| network("the receiver ended the transfer"))?;
            if last {
                return Ok(());
            }
            if !self.transport.faults.pass_chunk() {
                return Err(network("the transfer broke"));
            }
            number += 1;
        }
    }
}

// --- receiving ----------------------------------------------------------------------------------

/// A group's half-received snapshot.
struct Half {
    id: String,
    install: SnapshotInstall,
}

/// What a group keeps of a transfer between its streams.
struct Slot {
    /// Counts transfers; a running stream ends when it is no longer the latest.
    latest: watch::Sender<u64>,
    half: Arc<tokio::sync::Mutex<Option<Half>>>,
}

/// The receiving side of all groups of a node.
pub(crate) struct Receiver {
    store: Store,
    chunk_patience: Duration,
    transfers: Arc<Semaphore>,
    groups: Mutex<BTreeMap<u64, Arc<Slot>>>,
}

impl Receiver {
    pub(crate) fn new(store: Store, chunk_patience: Duration) -> Self {
        Self {
            store,
            chunk_patience,
            transfers: Arc::new(Semaphore::new(TRANSFERS_MAX)),
            groups: Mutex::default(),
        }
    }

    fn slot(&self, group: u64) -> Arc<Slot> {
        let new = || Arc::new(Slot { latest: watch::Sender::new(0), half: Arc::default() });
        self.groups.lock().entry(group).or_insert_with(new).clone()
    }

    /// Takes the group's slot from whoever holds it, and opens the snapshot's half, if any.
    async fn take(
        &self,
        slot: &Slot,
        shard: ShardId,
        meta: &pb::SnapshotMeta,
    ) -> Result<(tokio::sync::OwnedMutexGuard<Option<Half>>, watch::Receiver<u64>, u64), Status>
    {
        let mut mine = 0;
        slot.latest.send_modify(|latest| {
            *latest += 1;
            mine = *latest;
        });
        let half = tokio::time::timeout(PREEMPT_LIMIT, slot.half.clone().lock_owned());
        let mut half =
            half.await.map_err(|_| Status::unavailable("another transfer does not let go"))?;
        if half.as_ref().is_none_or(|half| half.id != meta.snapshot_id) {
            // Dropped before the new one is opened: one half-received snapshot per shard.
            *half = None;
            let (store, id) = (self.store.clone(), meta.snapshot_id.clone());
            let install = blocking(move || store.begin_install(shard, &id)).await?;
            *half = Some(Half { id: meta.snapshot_id.clone(), install });
        }
        Ok((half, slot.latest.subscribe(), mine))
    }

    /// Answers the first chunk that is missing.
    pub(crate) async fn begin(
        &self,
        group: u64,
        shard: ShardId,
        meta: &pb::SnapshotMeta,
    ) -> Result<u64, Status> {
        let slot = self.slot(group);
        let (half, _, _) = self.take(&slot, shard, meta).await?;
        let half = half.as_ref().ok_or_else(|| Status::internal("no transfer"))?;
        Ok(half.install.next_chunk())
    }

    /// Writes a stream of chunks and answers the complete snapshot, ready to install.
    pub(crate) async fn receive(
        &self,
        shard: ShardId,
        first: pb::SnapshotChunk,
        mut chunks: Streaming<pb::SnapshotChunk>,
        cut: impl Fn() -> bool,
    ) -> Result<(Vote, ShardSnapshot), Status> {
        let permit = self.transfers.clone().try_acquire_owned();
        let _permit = permit.map_err(|_| {
            Status::resource_exhausted("this node receives enough snapshots already")
        })?;
        let vote = first.vote.ok_or_else(|| Status::invalid_argument("no vote"))?;
        let meta = first.meta.clone().ok_or_else(|| Status::invalid_argument("no meta"))?;
        let decoded =
            meta_from_wire(&meta).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let slot = self.slot(first.group);
        let (mut half, mut latest, mine) = self.take(&slot, shard, &meta).await?;

        let mut chunk = first;
        let end = loop {
            if cut() {
                return Err(Status::unavailable("cut off"));
            }
            if let Some(end) = chunk.end {
                break end;
            }
            let Half { id, mut install } =
                half.take().ok_or_else(|| Status::internal("no transfer"))?;
            // The install moves to a blocking thread and back. If a write fails it stays there
            // and is dropped; the next transfer opens what is on disk.
            let install = blocking(move || {
                install.write(chunk.number, &chunk.block, chunk.crc)?;
                Ok::<_, tombolo_storage::StorageError>(install)
            })
            .await?;
            *half = Some(Half { id, install });
            chunk = self.next_chunk(&mut chunks, &mut latest, mine).await?;
        };

        let Half { install, .. } = half.take().ok_or_else(|| Status::internal("no transfer"))?;
        let end =
            SnapshotTotals { chunks: end.chunks, pairs: end.pairs, bytes: end.bytes, crc: end.crc };
        let received = blocking(move || install.finish(end)).await?;
        let snapshot =
            Snapshot { meta: decoded, snapshot: SnapshotData::Incoming(Box::new(received)) };
        Ok((vote_from_wire(vote), snapshot))
    }

    async fn next_chunk(
        &self,
        chunks: &mut Streaming<pb::SnapshotChunk>,
        latest: &mut watch::Receiver<u64>,
        mine: u64,
    ) -> Result<pb::SnapshotChunk, Status> {
        tokio::select! {
            biased;
            _ = latest.wait_for(|latest| *latest != mine) => {
                Err(Status::aborted("a newer transfer took over"))
            }
            chunk = tokio::time::timeout(self.chunk_patience, chunks.message()) => {
                chunk
                    .map_err(|_| Status::deadline_exceeded("the next chunk did not come"))??
                    .ok_or_else(|| Status::aborted("the transfer ended before its last chunk"))
            }
        }
    }
}

async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: std::error::Error + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Status::internal(error.to_string()))?
        .map_err(|error| Status::internal(error.to_string()))
}
