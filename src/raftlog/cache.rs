//! The newest entries of each group in memory, bounded in bytes over all groups.
//!
//! Each group has a [`Tail`]: a suffix of its log without holes. What the writer has not placed yet
//! is always in the tail, because nowhere else could it be read from. The writer evicts in the order
//! of appending over all groups, a chunk of entries at a time, so that the bookkeeping stays small.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{group::GroupCell, types::Entry};

/// What an entry costs besides its payload: the `Entry`, its slot in the deque, a share of the buffer.
const OVERHEAD_BYTES: u64 = 96;
/// A group's new entries are listed for eviction in chunks of about this size.
const CHUNK_BYTES: u64 = 64 * 1024;

/// A suffix of one group's log.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    entries: VecDeque<Entry>,
    /// Bytes that came since the group was last listed for eviction.
    unlisted_bytes: u64,
}

/// The byte count of all tails.
#[derive(Debug)]
pub(crate) struct Cache {
    limit_bytes: u64,
    bytes: AtomicU64,
}

/// Which entries came first, in chunks; owned by the writer.
#[derive(Debug, Default)]
pub(crate) struct EvictionOrder {
    chunks: VecDeque<(Arc<GroupCell>, u64)>,
}

fn cost(entry: &Entry) -> u64 {
    entry.payload.len() as u64 + OVERHEAD_BYTES
}

impl Cache {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, bytes: AtomicU64::new(0) }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.bytes() > self.limit_bytes
    }
}

impl Tail {
    /// Index of the oldest entry here.
    pub(crate) fn first(&self) -> Option<u64> {
        self.entries.front().map(|entry| entry.id.index)
    }

    pub(crate) fn get(&self, index: u64) -> Option<&Entry> {
        let position = index.checked_sub(self.first()?)?;
        self.entries.get(usize::try_from(position).ok()?)
    }

    pub(crate) fn push(&mut self, cache: &Cache, entry: Entry) {
        let bytes = cost(&entry);
        self.unlisted_bytes += bytes;
        cache.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.entries.push_back(entry);
    }

    /// Drops the entries from `next` on.
    pub(crate) fn truncate(&mut self, cache: &Cache, next: u64) {
        while let Some(entry) = self.entries.pop_back_if(|entry| entry.id.index >= next) {
            cache.bytes.fetch_sub(cost(&entry), Ordering::Relaxed);
        }
    }

    /// Drops the entries below `first`.
    pub(crate) fn purge(&mut self, cache: &Cache, first: u64) {
        while let Some(entry) = self.entries.pop_front_if(|entry| entry.id.index < first) {
            cache.bytes.fetch_sub(cost(&entry), Ordering::Relaxed);
        }
        if self.entries.capacity() > 1024 && self.entries.capacity() / 4 > self.entries.len() {
            self.entries.shrink_to(self.entries.len() * 2);
        }
    }
}

impl EvictionOrder {
    /// Called for each group after its entries up to `last` were placed.
    pub(crate) fn note(&mut self, cell: &Arc<GroupCell>, tail: &mut Tail, last: u64) {
        if tail.unlisted_bytes >= CHUNK_BYTES {
            tail.unlisted_bytes = 0;
            self.chunks.push_back((Arc::clone(cell), last));
        }
    }

    /// Evicts the oldest placed entries until the limit holds. `all` lists every group, for the rare
    /// case that the limit is smaller than the chunks that are not listed yet.
    pub(crate) fn evict(&mut self, cache: &Cache, all: impl FnOnce() -> Vec<Arc<GroupCell>>) {
        while cache.is_over() {
            let Some((cell, last)) = self.chunks.pop_front() else { break };
            evict_placed(&cell, cache, last);
        }
        if cache.is_over() {
            for cell in all() {
                evict_placed(&cell, cache, u64::MAX);
            }
        }
    }
}

fn evict_placed(cell: &GroupCell, cache: &Cache, last: u64) {
    let mut data = cell.data.lock();
    let placed = match data.tail.first() {
        Some(first) => data.first_pending(first),
        None => return,
    };
    data.tail.purge(cache, placed.min(last.saturating_add(1)));
}
