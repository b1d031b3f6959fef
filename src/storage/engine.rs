//! The one RocksDB of a node: opening, flushing, what is durable.
//!
//! One column family, no write-ahead log, bounded memory: block cache (with indexes and filters
//! in it), memtables, and few open files. Closing the last handle flushes, so that a clean
//! restart replays nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DB, DBCompressionType, FlushOptions,
    IteratorMode, LogLevel, Options, ReadOptions, ReadTier, WriteOptions,
};
use tombolo_core::{ShardId, placement::SHARDS_MAX};

use crate::{
    StorageError,
    layout::{Keys, Meta, STORE_FORMAT_KEY, STORE_OWNER_KEY},
    shard::{Position, Shard, ShardStore},
    snapshot_install,
};

/// The layout and value formats that this version writes.
pub const FORMAT_VERSION: u32 = 5;

const OPEN_FILES_MAX: i32 = 256;
const BLOCK_BYTES: usize = 8 << 10;
const BLOOM_BITS_PER_KEY: f64 = 10.0;
const MEMTABLE_BYTES_MIN: usize = 1 << 20;

/// Memory of the data store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Block cache, in bytes. Default 32 MiB.
    pub block_cache_bytes: usize,
    /// Memtables, in bytes; half as much again while a flush is slow. Default 32 MiB.
    pub memtable_bytes: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { block_cache_bytes: 32 << 20, memtable_bytes: 32 << 20 }
    }
}

/// A node's data store. Clones share it; the last one closes it.
#[derive(Clone)]
pub struct Store {
    pub(crate) engine: Arc<Engine>,
}

pub(crate) struct Engine {
    pub(crate) db: DB,
    pub(crate) dir: PathBuf,
    pub(crate) cache: Cache,
    pub(crate) write_options: WriteOptions,
    /// For a caller that must not be held up while flushes or compactions are behind.
    pub(crate) no_wait_options: WriteOptions,
    pub(crate) counters: Counters,
    /// Open shards, so that each has one set of caches.
    shards: Mutex<BTreeMap<ShardId, Weak<Shard>>>,
    /// Shards that receive a snapshot.
    pub(crate) receiving: Mutex<BTreeSet<ShardId>>,
}

impl Store {
    /// Opens the store in `dir`, and creates it if there is none.
    ///
    /// # Errors
    /// [`StorageError::Locked`] if it is open elsewhere, [`StorageError::NewerFormat`] if a newer
    /// version wrote it, [`StorageError::Corrupt`] if it is damaged.
    pub fn open(dir: &Path, config: StoreConfig) -> Result<Self, StorageError> {
        let db_dir = dir.join("db");
        fs::create_dir_all(&db_dir).map_err(|source| StorageError::io(&db_dir, source))?;
        let cache = Cache::new_lru_cache(config.block_cache_bytes);
        let options = db_options(config, &cache);
        let db = DB::open(&options, &db_dir).map_err(|error| open_error(dir, &error))?;
        check_format(&db, dir)?;
        snapshot_install::clean_leftovers(dir)?;

        let mut write_options = WriteOptions::new();
        write_options.disable_wal(true);
        let mut no_wait_options = WriteOptions::new();
        no_wait_options.disable_wal(true);
        no_wait_options.set_no_slowdown(true);
        let engine = Engine {
            db,
            dir: dir.to_owned(),
            cache,
            write_options,
            no_wait_options,
            counters: Counters::default(),
            shards: Mutex::default(),
            receiving: Mutex::default(),
        };
        Ok(Self { engine: Arc::new(engine) })
    }

    /// Marks the store as belonging to `owner`, if it belongs to nobody yet.
    ///
    /// # Errors
    /// [`StorageError::WrongOwner`] if it belongs to another.
    pub fn claim(&self, owner: &str) -> Result<(), StorageError> {
        let db = &self.engine.db;
        let failed = |error| StorageError::engine(None, &error);
        match db.get(STORE_OWNER_KEY).map_err(failed)? {
            Some(found) if found == owner.as_bytes() => Ok(()),
            Some(found) => Err(StorageError::WrongOwner {
                dir: self.engine.dir.clone(),
                found: String::from_utf8_lossy(&found).into_owned(),
                expected: owner.to_owned(),
            }),
            None => {
                let options = &self.engine.write_options;
                db.put_opt(STORE_OWNER_KEY, owner, options).map_err(failed)?;
                self.flush()
            }
        }
    }

    /// A shard's part of the store; empty if it holds nothing yet.
    ///
    /// # Errors
    /// If what is stored of it cannot be read.
    pub fn shard(&self, shard: ShardId) -> Result<ShardStore, StorageError> {
        if SHARDS_MAX <= shard.0 {
            return Err(StorageError::UnknownShard { shard });
        }
        let mut shards = self.engine.shards.lock();
        if let Some(inner) = shards.get(&shard).and_then(Weak::upgrade) {
            return Ok(ShardStore { inner });
        }
        let inner = Arc::new(Shard::load(Arc::clone(&self.engine), shard)?);
        shards.insert(shard, Arc::downgrade(&inner));
        Ok(ShardStore { inner })
    }

    /// Makes everything applied so far durable. Blocks until the disk has it.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn flush(&self) -> Result<(), StorageError> {
        let mut options = FlushOptions::new();
        options.set_wait(true);
        let flushed = self.engine.db.flush_opt(&options);
        flushed.map_err(|error| StorageError::engine(None, &error))?;
        self.engine.counters.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Up to where a shard survives a crash; the Raft log may forget what lies behind.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn durable_position(&self, shard: ShardId) -> Result<Option<Position>, StorageError> {
        let mut options = ReadOptions::default();
        options.set_read_tier(ReadTier::Persisted);
        let mut keys = Keys::new(shard);
        let value = self.engine.db.get_pinned_opt(keys.meta(Meta::Applied), &options);
        match value.map_err(|error| StorageError::engine(Some(shard), &error))? {
            Some(value) => Ok(Some(Position::from_bytes(shard, &value)?)),
            None => Ok(None),
        }
    }

    /// Bytes that this process may still write to the store's file system.
    ///
    /// # Errors
    /// If the file system does not tell.
    pub fn disk_free_bytes(&self) -> Result<u64, StorageError> {
        let dir = &self.engine.dir;
        let stat = rustix::fs::statvfs(dir)
            .map_err(|errno| StorageError::io(dir, std::io::Error::from(errno)))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.engine.dir
    }
}

/// Counts since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    flushes: AtomicU64,
    runs: AtomicU64,
    entries: AtomicU64,
    written_bytes: AtomicU64,
}

impl Counters {
    pub(crate) fn add_run(&self, entries: u64, bytes: u64) {
        self.runs.fetch_add(1, Ordering::Relaxed);
        self.entries.fetch_add(entries, Ordering::Relaxed);
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    pub(crate) fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    pub(crate) fn written_bytes(&self) -> u64 {
        self.written_bytes.load(Ordering::Relaxed)
    }
}

/// Options of table files that are written outside the engine, to be ingested.
pub(crate) fn table_options() -> &'static Options {
    static OPTIONS: OnceLock<Options> = OnceLock::new();
    OPTIONS.get_or_init(|| {
        let mut options = Options::default();
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_block_based_table_factory(&block_options(None));
        options
    })
}

fn block_options(cache: Option<&Cache>) -> BlockBasedOptions {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_size(BLOCK_BYTES);
    blocks.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    match cache {
        Some(cache) => {
            blocks.set_block_cache(cache);
            // Inside the cache, so that the number of files does not decide about memory.
            blocks.set_cache_index_and_filter_blocks(true);
            blocks.set_cache_index_and_filter_blocks_with_high_priority(true);
            blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
            blocks.set_pin_top_level_index_and_filter(true);
        }
        None => blocks.disable_cache(),
    }
    // In parts: the filter of a whole file is larger than the cache wants to hold, and each look at a key
    // that is not there would read and verify all of it.
    blocks.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    blocks.set_partition_filters(true);
    blocks.set_metadata_block_size(BLOCK_BYTES);
    blocks
}

fn db_options(config: StoreConfig, cache: &Cache) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&block_options(Some(cache)));
    options.set_compression_type(DBCompressionType::Lz4);

    options.set_write_buffer_size((config.memtable_bytes / 2).max(MEMTABLE_BYTES_MIN));
    options.set_max_write_buffer_number(3);
    options.set_target_file_size_base(32 << 20);
    options.set_max_bytes_for_level_base(128 << 20);

    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_max_file_opening_threads(1);
    options.set_skip_stats_update_on_db_open(true);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(1 << 20);
    options.set_avoid_unnecessary_blocking_io(true);

    options.set_manifest_preallocation_size(64 << 10);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(4 << 20);
    options.set_log_level(LogLevel::Warn);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options
}

fn open_error(dir: &Path, error: &rocksdb::Error) -> StorageError {
    let message = error.to_string();
    if message.contains("/LOCK") && message.to_ascii_lowercase().contains("lock") {
        return StorageError::Locked { dir: dir.to_owned() };
    }
    StorageError::engine(None, error)
}

/// Refuses what this version cannot read, and marks a new store.
fn check_format(db: &DB, dir: &Path) -> Result<(), StorageError> {
    let failed = |error| StorageError::engine(None, &error);
    let corrupt = |detail: &str| StorageError::Corrupt {
        shard: None,
        place: dir.display().to_string(),
        detail: detail.to_owned(),
    };
    if let Some(value) = db.get(STORE_FORMAT_KEY).map_err(failed)? {
        let bytes = value.as_slice().try_into();
        let found = bytes.map_err(|_| corrupt("the format version has the wrong length"))?;
        let found = u32::from_le_bytes(found);
        return match found {
            FORMAT_VERSION => Ok(()),
            0 => Err(corrupt("the format version is 0")),
            1..FORMAT_VERSION => {
                Err(StorageError::OlderFormat { dir: dir.to_owned(), found, known: FORMAT_VERSION })
            }
            _ => {
                Err(StorageError::NewerFormat { dir: dir.to_owned(), found, known: FORMAT_VERSION })
            }
        };
    }
    match db.iterator(IteratorMode::Start).next() {
        Some(Ok(_)) => Err(corrupt("there is data but no format version")),
        Some(Err(error)) => Err(failed(error)),
        None => {
            let mut options = WriteOptions::new();
            options.disable_wal(true);
            let version = FORMAT_VERSION.to_le_bytes();
            db.put_opt(STORE_FORMAT_KEY, version, &options).map_err(failed)?;
            db.flush().map_err(failed)
        }
    }
}

#[cfg(test)]
mod tests;
