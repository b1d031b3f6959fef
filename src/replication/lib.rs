//! Between regions, where there is no leader: every region pulls what the others wrote.
//!
//! The leader of each shard opens one stream per peer region ([`Links`], `puller`), tells its
//! frontier for every namespace, and the peer's leader streams all changes above it in causal
//! order as they commit (`feed`, [`LinkServer`]). The receiver's frontier *is* the cursor: the
//! Raft entry that applies changes also moves it. So replay, reorder, crash and failover repeat
//! at most a batch and never lose or double one, and there is no queue that could overflow. Where
//! the change log no longer reaches back, Merkle trees tell what differs (`repair`).
//!
//! Invariants:
//! * A change is applied only when everything that it depends on is applied.
//! * An atomic batch is one change, and is applied whole.
//! * A region acknowledges only what its majority has durably and has applied.
//! * Links never slow down a local write: they only read what is committed.
//!
//! Not here: what applying does (`tombolo_core::execute`), trimming (`tombolo_shard::Collector`).

mod backoff;
mod channels;
mod config;
mod feed;
mod links;
mod pace;
mod puller;
mod relay;
mod repair;
mod seed;
mod server;
mod status;
mod wire;

pub use channels::LinkChannels;
pub use config::ReplicationConfig;
pub use links::Links;
pub use repair::comparer::{CompareError, Comparer, Differences, KeyDifference};
pub use server::{CatalogChange, CatalogChanges, LinkServer};
pub use status::{
    LinkKey, LinkPhase, LinkStatus, LinkStatuses, RepairCounts, RepairProgress, Traffic,
};
pub use wire::link_identity;

/// The version of the link protocol that this build speaks.
pub const LINK_PROTOCOL: u32 = 4;
