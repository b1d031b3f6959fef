//! The data store in numbers, for metrics and status.

use rocksdb::properties;

use crate::{StorageError, Store};

/// A reading of the store's counters and gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreMetrics {
    /// Memory in memtables, flushed ones that readers still use included, in bytes.
    pub memtable_bytes: u64,
    /// Memtables that wait for a flush.
    pub memtables_waiting: u64,
    /// Memory in the block cache, in bytes.
    pub block_cache_bytes: u64,
    /// Part of the block cache that cannot be given up now, in bytes.
    pub block_cache_pinned_bytes: u64,
    /// Memory of open table files outside the block cache, in bytes.
    pub table_reader_bytes: u64,
    /// Bytes that compaction has yet to rewrite.
    pub pending_compaction_bytes: u64,
    /// Compactions that run now.
    pub running_compactions: u64,
    /// Flushes that run now.
    pub running_flushes: u64,
    /// Table files in use, in bytes.
    pub sst_bytes: u64,
    /// Keys, about.
    pub keys_estimate: u64,
    /// Whether the engine holds back all writes.
    pub write_stopped: bool,
    /// To how many bytes a second the engine slows writes; 0 if it does not.
    pub write_limit_bytes_per_second: u64,
    /// Errors of flushes and compactions since the start.
    pub background_errors: u64,
    /// Flushes that were asked for since the start.
    pub flushes: u64,
    /// Applied runs since the start.
    pub runs: u64,
    /// Applied log entries since the start.
    pub entries: u64,
    /// Bytes written by applied runs since the start.
    pub written_bytes: u64,
}

impl Store {
    /// Reads the numbers. Cheap: no disk access.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub fn metrics(&self) -> Result<StoreMetrics, StorageError> {
        let engine = &self.engine;
        let read = |name: &properties::PropName| -> Result<u64, StorageError> {
            let value = engine.db.property_int_value(name);
            Ok(value.map_err(|error| StorageError::engine(None, &error))?.unwrap_or(0))
        };
        let counters = &engine.counters;
        Ok(StoreMetrics {
            memtable_bytes: read(properties::SIZE_ALL_MEM_TABLES)?,
            memtables_waiting: read(properties::NUM_IMMUTABLE_MEM_TABLE)?,
            block_cache_bytes: engine.cache.get_usage() as u64,
            block_cache_pinned_bytes: engine.cache.get_pinned_usage() as u64,
            table_reader_bytes: read(properties::ESTIMATE_TABLE_READERS_MEM)?,
            pending_compaction_bytes: read(properties::ESTIMATE_PENDING_COMPACTION_BYTES)?,
            running_compactions: read(properties::NUM_RUNNING_COMPACTIONS)?,
            running_flushes: read(properties::NUM_RUNNING_FLUSHES)?,
            sst_bytes: read(properties::LIVE_SST_FILES_SIZE)?,
            keys_estimate: read(properties::ESTIMATE_NUM_KEYS)?,
            write_stopped: read(properties::IS_WRITE_STOPPED)? != 0,
            write_limit_bytes_per_second: read(properties::ACTUAL_DELAYED_WRITE_RATE)?,
            background_errors: read(properties::BACKGROUND_ERRORS)?,
            flushes: counters.flushes(),
            runs: counters.runs(),
            entries: counters.entries(),
            written_bytes: counters.written_bytes(),
        })
    }
}
