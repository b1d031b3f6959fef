//! Counters of the log, readable at any time.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// A reading of the log's counters. Counts are since open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogMetrics {
    /// Completed `fdatasync` calls for batches.
    pub syncs: u64,
    /// Bytes written in batches.
    pub bytes: u64,
    /// Entries made durable.
    pub entries: u64,
    /// Entries copied forward so that an old segment could be recycled.
    pub moved_entries: u64,
    /// Segments that hold live data now.
    pub segments: u64,
    /// Segments given back for reuse or deleted.
    pub recycled_segments: u64,
    /// Times the writer had to create a segment itself because no spare was ready.
    pub spare_misses: u64,
    /// Bytes of entries in memory now.
    pub cache_bytes: u64,
    /// Time from the start of a write to the end of its sync, summed over all syncs.
    pub sync_nanos_sum: u64,
    /// The longest of them.
    pub sync_nanos_max: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) syncs: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) entries: AtomicU64,
    pub(crate) moved_entries: AtomicU64,
    pub(crate) recycled_segments: AtomicU64,
    pub(crate) spare_misses: AtomicU64,
    sync_nanos_sum: AtomicU64,
    sync_nanos_max: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn synced(&self, bytes: u64, entries: u64, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        add(&self.syncs, 1);
        add(&self.bytes, bytes);
        add(&self.entries, entries);
        add(&self.sync_nanos_sum, nanos);
        self.sync_nanos_max.fetch_max(nanos, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, segments: u64, cache_bytes: u64) -> LogMetrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LogMetrics {
            syncs: get(&self.syncs),
            bytes: get(&self.bytes),
            entries: get(&self.entries),
            moved_entries: get(&self.moved_entries),
            segments,
            recycled_segments: get(&self.recycled_segments),
            spare_misses: get(&self.spare_misses),
            cache_bytes,
            sync_nanos_sum: get(&self.sync_nanos_sum),
            sync_nanos_max: get(&self.sync_nanos_max),
        }
    }
}
