//! Settings of the links: plain data, no handles, safe to log.

use std::time::Duration;

/// Settings of the links.
#[derive(Clone, Debug)]
pub struct ReplicationConfig {
    /// Largest batch that is sent and ingested at once, in bytes. A larger change goes alone.
    pub batch_bytes_max: usize,
    /// Sent and not yet acknowledged, per stream, in bytes; bounds the receiver's memory.
    pub in_flight_bytes_max: usize,
    /// Shortest pause before a link is tried again.
    pub retry_min: Duration,
    /// Longest pause before a link is tried again.
    pub retry_max: Duration,
    /// A stream that says nothing for so long, or does not move although it lags, is reset.
    pub watchdog: Duration,
    /// Time without a path to a region after which its changes are taken from another.
    pub relay_after: Duration,
    /// How often an unchanged frontier is told again.
    pub heartbeat: Duration,
    /// About how often each shard is compared with each region.
    pub repair_interval: Duration,
    /// What a repair takes from another region at most, per shard.
    pub repair_bytes_per_second: u64,
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self {
            batch_bytes_max: 1 << 20,
            in_flight_bytes_max: 4 << 20,
            retry_min: Duration::from_millis(100),
            retry_max: Duration::from_secs(5),
            watchdog: Duration::from_secs(30),
            relay_after: Duration::from_secs(3),
            heartbeat: Duration::from_secs(5),
            repair_interval: Duration::from_secs(600),
            repair_bytes_per_second: 32 << 20,
        }
    }
}

/// How long connecting, and the first answer of a peer, may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often frontiers that moved are told.
pub(crate) const FRONTIER_INTERVAL: Duration = Duration::from_secs(1);
/// A leader that no majority has answered for so long may have been replaced: it feeds nobody.
pub(crate) const QUORUM_AGE_MAX: Duration = Duration::from_secs(3);
/// How long one ingest may take before its outcome counts as unknown.
pub(crate) const INGEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request may wait for a peer that does not read.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Messages waiting between a task and its stream, each way.
pub(crate) const STREAM_MESSAGES_MAX: usize = 16;
/// Repairs of a node that run at once; others wait for their turn.
pub(crate) const REPAIRS_MAX: usize = 2;
/// Largest merge that is proposed at once: a small part of a log entry, so that local writes go on
/// in between. A larger record goes alone.
pub(crate) const MERGE_BYTES_MAX: usize = 256 << 10;
/// The same for records that are merged while clients may write here: one of their writes waits behind
/// at most one merge.
pub(crate) const LIVE_MERGE_BYTES_MAX: usize = 16 << 10;
/// Records of such a merge. Each costs a look at the store, however small it is.
pub(crate) const LIVE_MERGE_RECORDS_MAX: usize = 16;
/// Clients that wrote here so recently count as writing now.
pub(crate) const LIVE_WRITES_WITHIN: Duration = Duration::from_secs(1);
/// How long a merge rests while clients write, in times of what it took: merges are on their way for so
/// small a part of the time that nearly all writes meet none.
pub(crate) const LIVE_REST: f64 = 32.0;
/// A repair that would take longer at that pace rests less: the change log that it must catch up with
/// afterwards does not wait for ever.
pub(crate) const LIVE_REPAIR: Duration = Duration::from_secs(300);
/// Digests of leaves in one message.
pub(crate) const LEAF_PAGE_BYTES: usize = 64 << 10;
/// How long a merge may take before its outcome counts as unknown.
pub(crate) const MERGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a repair's source waits for a receiver that takes nothing, which may be paced.
pub(crate) const REPAIR_STALL_TIMEOUT: Duration = Duration::from_secs(300);
