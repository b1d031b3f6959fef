//! How far behind a peer region is, seen from the region that wrote.
//!
//! Derived from vectors and hybrid times, so a stuck link shows growing lag, whatever its task
//! believes about itself.

use tombolo_core::{NamespaceId, RegionId};
use tombolo_shard::{Shard, ShardError};

/// What a peer has not acknowledged of this region's writes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lag {
    /// How many events.
    pub events: u64,
    /// The age of the oldest, in seconds; 0 if there is none.
    pub seconds: f64,
    /// Bytes of the change log that hold them, as far as it still does.
    pub bytes: u64,
}

/// A peer's lag in one shard of one namespace. Meaningful on the shard's leader.
///
/// # Errors
/// If the change log cannot be read.
pub fn lag_of(shard: &Shard, namespace: NamespaceId, peer: RegionId) -> Result<Lag, ShardError> {
    let actor = shard.actor();
    let written = shard.frontier(namespace).get(actor);
    // A peer that has not spoken to this leader yet: what the log holds is all that can be told.
    let acknowledged = shard.peers().of(namespace, shard.actor_of(peer)).map_or_else(
        || shard.store().trimmed(namespace).get(actor),
        |frontier| frontier.get(actor),
    );
    let events = written.saturating_sub(acknowledged);
    if events == 0 {
        return Ok(Lag::default());
    }
    // A batch is one change under its first number: a peer has all of it or nothing.
    let oldest = shard.store().oldest_change_time(namespace, actor, acknowledged + 1)?;
    let age_ms = oldest
        .map_or(0, |time| shard.clock().now().physical_ms().saturating_sub(time.physical_ms()));
    #[allow(clippy::cast_precision_loss, reason = "milliseconds of an age stay far below 2^53")]
    let seconds = age_ms as f64 / 1000.0;
    let bytes = shard.store().log_bytes_from(namespace, actor, acknowledged + 1)?;
    Ok(Lag { events, seconds, bytes })
}
