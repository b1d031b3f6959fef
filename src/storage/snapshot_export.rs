//! A shard as of one moment, cut into blocks: the sending side of a snapshot.
//!
//! A thread of its own owns the pinned engine snapshot (which borrows the engine) and answers
//! requests for blocks. Blocks are the same whenever they are asked for, so that a transfer
//! resumes at any number. Memory: one block, and the first key of each block.
//!
//! Pinning keeps old versions of the whole store from being dropped: exports must not live long
//! when nobody reads them.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
};

use bytes::Bytes;
use rocksdb::{ReadOptions, Snapshot};
use tombolo_core::ShardId;

use crate::{
    Position, ShardStore, SnapshotBlock, SnapshotTotals, StorageError,
    engine::Engine,
    layout::{self, Keys, Meta},
    shard::decode_membership,
    snapshot_block::BlockWriter,
};

const SHARD_BYTES: usize = 2;
const STACK_BYTES: usize = 512 << 10;

/// A pinned state of one shard. Dropping it releases the pin.
pub struct SnapshotExport {
    shard: ShardId,
    position: Option<Position>,
    membership: Option<(Position, Bytes)>,
    requests: Option<SyncSender<Request>>,
    thread: Option<JoinHandle<()>>,
}

enum Request {
    Block(u64, SyncSender<Result<Option<SnapshotBlock>, StorageError>>),
    Totals(SyncSender<Result<SnapshotTotals, StorageError>>),
}

type Start = Result<(Option<Position>, Option<(Position, Bytes)>), StorageError>;

impl ShardStore {
    /// Pins the shard as it is now. Position and membership are those of the pinned state.
    ///
    /// # Errors
    /// If the shard cannot be read, or no thread can be started.
    pub fn export(&self) -> Result<SnapshotExport, StorageError> {
        let shard = self.inner.id;
        let engine = Arc::clone(&self.inner.engine);
        let (started, start) = sync_channel(1);
        let (requests, received) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("export-{shard}"))
            .stack_size(STACK_BYTES)
            .spawn(move || serve(&engine, shard, &started, &received))
            .map_err(|source| StorageError::io(self.inner.engine.dir.clone(), source))?;
        let mut export = SnapshotExport {
            shard,
            position: None,
            membership: None,
            requests: Some(requests),
            thread: Some(thread),
        };
        (export.position, export.membership) = start.recv().map_err(|_| ended(shard))??;
        Ok(export)
    }
}

impl SnapshotExport {
    /// Up to where the log is applied in the pinned state.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// The membership in the pinned state.
    pub fn membership(&self) -> Option<(Position, Bytes)> {
        self.membership.clone()
    }

    /// The block with this number; `None` past the end. Blocks may be asked for in any order, but
    /// the first pass over the shard is cheapest in order.
    ///
    /// # Errors
    /// If the shard cannot be read.
    pub fn chunk(&mut self, number: u64) -> Result<Option<SnapshotBlock>, StorageError> {
        let (reply, answer) = sync_channel(1);
        self.ask(Request::Block(number, reply))?;
        answer.recv().map_err(|_| ended(self.shard))?
    }

    /// What all blocks amount to. Reads the rest of the shard if that was not done yet.
    ///
    /// # Errors
    /// If the shard cannot be read.
    pub fn totals(&mut self) -> Result<SnapshotTotals, StorageError> {
        let (reply, answer) = sync_channel(1);
        self.ask(Request::Totals(reply))?;
        answer.recv().map_err(|_| ended(self.shard))?
    }

    fn ask(&self, request: Request) -> Result<(), StorageError> {
        let sent = self.requests.as_ref().map(|requests| requests.send(request));
        if sent.is_some_and(|sent| sent.is_ok()) { Ok(()) } else { Err(ended(self.shard)) }
    }
}

impl Drop for SnapshotExport {
    fn drop(&mut self) {
        // The thread ends when the channel closes; after the join the pin is gone.
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(shard = %self.shard, "snapshot export panicked");
        }
    }
}

fn ended(shard: ShardId) -> StorageError {
    StorageError::Engine { shard: Some(shard), detail: "the export has ended".to_owned() }
}

/// The thread: pins, tells what it pinned, answers until nobody can ask.
fn serve(
    engine: &Engine,
    shard: ShardId,
    started: &SyncSender<Start>,
    requests: &Receiver<Request>,
) {
    let mut pinned = Pinned {
        snapshot: engine.db.snapshot(),
        shard,
        starts: Vec::new(),
        next: Some(layout::shard_start(shard)),
        totals: SnapshotTotals::default(),
    };
    // A reply that nobody waits for is no error: the asker gave up.
    let _ = started.send(pinned.facts());
    while let Ok(request) = requests.recv() {
        match request {
            Request::Block(number, reply) => drop(reply.send(pinned.block(number))),
            Request::Totals(reply) => drop(reply.send(pinned.totals())),
        }
    }
}

struct Pinned<'a> {
    snapshot: Snapshot<'a>,
    shard: ShardId,
    /// First key of each block that was cut so far.
    starts: Vec<Vec<u8>>,
    /// First key of the next block; `None` after the last.
    next: Option<Vec<u8>>,
    /// Of the blocks cut so far.
    totals: SnapshotTotals,
}

impl Pinned<'_> {
    fn facts(&self) -> Start {
        let failed = |error| StorageError::engine(Some(self.shard), &error);
        let mut keys = Keys::new(self.shard);
        let position = self.snapshot.get_pinned(keys.meta(Meta::Applied)).map_err(failed)?;
        let position =
            position.map(|value| Position::from_bytes(self.shard, &value)).transpose()?;
        let membership = self.snapshot.get_pinned(keys.meta(Meta::Membership)).map_err(failed)?;
        let membership = membership
            .map(|value| decode_membership(self.shard, Bytes::copy_from_slice(&value)))
            .transpose()?;
        Ok((position, membership))
    }

    fn block(&mut self, number: u64) -> Result<Option<SnapshotBlock>, StorageError> {
        let known = usize::try_from(number).ok().and_then(|at| self.starts.get(at));
        if let Some(start) = known {
            let (block, _, _) = self.cut(start)?;
            let crc = crc32fast::hash(&block);
            return Ok(Some(SnapshotBlock { number, block, crc }));
        }
        while let Some(block) = self.cut_next()? {
            if block.number == number {
                return Ok(Some(block));
            }
        }
        Ok(None)
    }

    fn totals(&mut self) -> Result<SnapshotTotals, StorageError> {
        while self.cut_next()?.is_some() {}
        Ok(self.totals)
    }

    /// Cuts the first block that was not cut yet.
    fn cut_next(&mut self) -> Result<Option<SnapshotBlock>, StorageError> {
        let Some(start) = self.next.take() else { return Ok(None) };
        let cut = self.cut(&start);
        let (block, pairs, next) = match cut {
            Ok(cut) => cut,
            Err(error) => {
                self.next = Some(start);
                return Err(error);
            }
        };
        if pairs == 0 {
            return Ok(None);
        }
        let crc = crc32fast::hash(&block);
        let number = self.totals.chunks;
        self.totals.add(pairs, block.len() as u64, crc);
        self.starts.push(start);
        self.next = next;
        Ok(Some(SnapshotBlock { number, block, crc }))
    }

    /// The block that starts at `start`, its number of pairs, and where the next one starts.
    fn cut(&self, start: &[u8]) -> Result<(Bytes, u64, Option<Vec<u8>>), StorageError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(start);
        options.set_iterate_upper_bound(layout::shard_end(self.shard));
        options.fill_cache(false);
        let mut pairs = self.snapshot.raw_iterator_opt(options);
        pairs.seek_to_first();
        let mut block = BlockWriter::new();
        let mut next = None;
        while let Some((key, value)) = pairs.item() {
            if block.is_full() {
                next = Some(key.to_vec());
                break;
            }
            block.add(&key[SHARD_BYTES..], value);
            pairs.next();
        }
        pairs.status().map_err(|error| StorageError::engine(Some(self.shard), &error))?;
        let count = block.pairs;
        Ok((block.finish(), count, next))
    }
}
