//! Durable bytes: a node's shards in one RocksDB. The only crate that names RocksDB.
//!
//! A [`Store`] is one database with one column family, written without a write-ahead log: the
//! Raft log is the log. Everything of a shard lies in one contiguous key range, so that one
//! ingest call replaces it. A [`ShardStore`] executes commands ([`ShardStore::apply`]), answers
//! reads, and moves as a snapshot ([`SnapshotExport`], [`SnapshotInstall`]).
//!
//! Invariants:
//! * An applied run is one write batch with the applied position in it: after a crash a shard is
//!   exactly at some position, and replaying the Raft log from there gives the same state.
//! * What the Raft log may drop is bounded by [`Store::durable_position`], never by
//!   [`ShardStore::applied`].
//! * A reader that sees a frontier sees all data that it covers.
//! * Damaged bytes are an error that names the file and the shard, never a panic or a skip.
//!
//! All calls block on the disk; asynchronous callers run them on blocking threads, except
//! [`ShardStore::apply`] and point reads, which usually touch memory only.
//!
//! Reading order: `layout` (keys), `engine`, `shard`, `apply`, `read`, `changes`, then the
//! snapshot modules. Formats: `docs/format.md`.
//!
//! Not here: when to flush, trim or collect (`tombolo-shard`, `tombolo-consensus`), and what a
//! command means (`tombolo-core`).

mod apply;
mod changes;
mod cut;
mod engine;
mod error;
mod layout;
mod ledger;
mod metrics;
mod read;
mod shard;
mod snapshot_block;
mod snapshot_export;
mod snapshot_install;
mod snapshot_progress;
#[cfg(test)]
mod testing;
mod tree;

pub use apply::{ApplyEntry, ApplyPayload};
pub use changes::StoredChange;
pub use cut::Cut;
pub use engine::{FORMAT_VERSION, Store, StoreConfig};
pub use error::StorageError;
pub use ledger::LedgerSize;
pub use metrics::StoreMetrics;
pub use read::{Pinned, ScanPage, ScanRange};
pub use shard::{Position, ShardStore};
pub use snapshot_block::{SnapshotBlock, SnapshotTotals};
pub use snapshot_export::SnapshotExport;
pub use snapshot_install::{ReceivedSnapshot, SnapshotInstall};
pub use tree::{Scrubbed, Summary};
