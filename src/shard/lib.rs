//! One shard as a caller sees it: write, read at a chosen consistency, wait, collect.
//!
//! A [`Shard`] joins a Raft group, the replica's data and the region's clock. It stamps time,
//! proposes commands, waits for frontiers, and knows what other regions have acknowledged.
//! [`Shards`] holds all of a node's shards and the view of the catalog that they feed.
//!
//! Invariants:
//! * Nothing here decides what a write does: that is `tombolo_core::execute`, on every replica.
//! * Dropping a caller's future never cancels a write that was proposed.
//! * Only a leader stamps time, and only with a clock that most of its region's agree with.
//!
//! Not here: gRPC (`tombolo-service`), links (`tombolo-replication`), Raft (`tombolo-consensus`).

mod clock;
mod collect;
mod error;
mod feed;
mod headroom;
mod hub;
mod membership;
mod peers;
mod read;
mod replicated;
mod risk;
mod scrub;
mod shard;
mod shards;
mod write;

pub use clock::{Clock, ClockRefused, NodeClock, RegionClock, RegionNews};
pub use collect::{CollectConfig, CollectCounts, Collector, blocking};
pub use error::ShardError;
pub use feed::{Event, FeedBatch, FeedRequest, Previous};
pub use headroom::Headroom;
pub use hub::WatchHub;
pub use membership::follow_regions;
pub use peers::{Coverage, PeerFrontiers};
pub use read::{Consistency, end_of_prefix};
pub use risk::AtRisk;
pub use scrub::{ScrubCounts, Scrubber};
pub use shard::{Revision, Shard};
pub use shards::Shards;
pub use write::{Advanced, WriteOutcome, WriteReply, WriteRequest};
