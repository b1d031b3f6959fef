//! Flushes the data store and drops the log behind it.
//!
//! Applying writes to memory only; the log brings it back after a crash. So the log may go only
//! where the data store has *flushed*, and to bound both the log and the replay after a crash,
//! the store is flushed when the log above the last flush has grown enough, or time has passed.
//!
//! How much log stays, per group:
//! * everything above the flushed position;
//! * a share of [`ConsensusConfig::retain_bytes`] behind the last entry, on every replica, since
//!   any of them may be the next leader; so a follower that was away for a moment catches up from
//!   the log;
//! * on a leader, what a follower that answers still lacks, up to [`CATCH_UP_FACTOR`] shares: a
//!   snapshot sent to a follower that is just catching up would be purged past again before it
//!   arrives.
//!
//! A follower behind all that gets a snapshot, which any leader can make at any time: the
//! snapshot is the store itself.
//!
//! One task for all groups, because one store holds them all. It wakes once per
//! [`CHECK_INTERVAL`] and does nothing on an idle node.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tombolo_storage::Store;

use crate::config::ConsensusConfig;
use crate::group::{Failures, Group};
use crate::metrics::GroupMetrics;

/// How often the driver looks.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// A follower that catches up may hold this many shares of the log.
const CATCH_UP_FACTOR: u64 = 4;
/// A follower that answered within this time counts as catching up.
const RECENT_MILLIS: u64 = 10_000;

/// Drives flushing and purging of all groups.
pub(crate) struct PurgeDriver {
    store: Store,
    groups: Vec<Group>,
    share_bytes: u64,
    flush_interval: Duration,
    flush_log_bytes: u64,
    flushed_at: Instant,
}

impl PurgeDriver {
    pub(crate) fn new(config: &ConsensusConfig, store: Store, groups: Vec<Group>) -> Self {
        Self {
            store,
            share_bytes: config.retain_bytes / u64::from(config.shard_count.max(1)),
            flush_interval: config.flush_interval,
            flush_log_bytes: config.flush_log_bytes,
            groups,
            flushed_at: Instant::now(),
        }
    }

    /// Runs until `stop`. A store that cannot be flushed is a failure of the node.
    pub(crate) async fn run(mut self, stop: CancellationToken, failures: Failures) {
        let mut result = self.learn_flushed().await;
        while result.is_ok() {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CHECK_INTERVAL) => {}
            }
            // Outside the `select!`: a flush that began is awaited.
            result = self.step().await;
        }
        if let Err(error) = result {
            failures.report(format!("flushing the data store: {error}"));
        }
    }

    async fn step(&mut self) -> Result<(), std::io::Error> {
        for group in &self.groups {
            group.snapshots().expire();
        }
        if self.flush_is_due() {
            self.flush().await?;
        }
        for group in &self.groups {
            self.purge(group).await;
        }
        Ok(())
    }

    fn flush_is_due(&self) -> bool {
        let above = |group: &Group| group.log().bytes_after(group.flushed().unwrap_or(0));
        let behind = |group: &Group| group.store().applied().map(|at| at.index) != group.flushed();
        let log_bytes: u64 = self.groups.iter().map(above).sum();
        let by_bytes = self.flush_log_bytes <= log_bytes;
        let by_time = self.flush_interval <= self.flushed_at.elapsed();
        (by_bytes || by_time) && self.groups.iter().any(behind)
    }

    async fn flush(&mut self) -> Result<(), std::io::Error> {
        let started = Instant::now();
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.flush())
            .await
            .map_err(std::io::Error::other)?
            .map_err(std::io::Error::other)?;
        self.flushed_at = Instant::now();
        tracing::debug!(millis = started.elapsed().as_millis(), "flushed the data store");
        self.learn_flushed().await
    }

    async fn learn_flushed(&self) -> Result<(), std::io::Error> {
        let (store, groups) = (self.store.clone(), self.groups.clone());
        let learn = move || {
            for group in &groups {
                let durable = store.durable_position(group.shard());
                group.set_flushed(durable.map_err(std::io::Error::other)?.map(|at| at.index));
            }
            Ok(())
        };
        tokio::task::spawn_blocking(learn).await.map_err(std::io::Error::other)?
    }

    /// Purges in two steps, one wake-up apart: first openraft learns the flushed position as its
    /// newest snapshot, then the log goes up to there.
    async fn purge(&self, group: &Group) {
        let state = group.log().state();
        let purged = state.purged.map_or(0, |purged| purged.index);
        let Some(flushed) = group.flushed().filter(|flushed| purged < *flushed) else { return };
        // A quarter more than the share: purging in steps, not with every entry.
        if group.log().bytes_after(purged) < self.share_bytes + self.share_bytes / 4 {
            return;
        }
        let upto = flushed.min(self.purge_limit(group, purged, flushed));
        if upto <= purged {
            return;
        }
        let raft = group.raft();
        let known = group.raft_metrics().snapshot.map_or(0, |snapshot| snapshot.index);
        let told = if known < upto {
            raft.trigger().snapshot().await
        } else {
            tracing::info!(shard = %group.shard(), upto, "purging the log");
            raft.trigger().purge_log(upto).await
        };
        if told.is_err() {
            // The supervisor reports a dead core.
            tracing::debug!(shard = %group.shard(), "the Raft core does not answer");
        }
    }

    /// The last index that retention lets go.
    fn purge_limit(&self, group: &Group, purged: u64, flushed: u64) -> u64 {
        let keeps = |bytes: u64| {
            last_index_with(purged, flushed, |index| bytes <= group.log().bytes_after(index))
        };
        let share = keeps(self.share_bytes);
        match slowest_recent_follower(&group.metrics()) {
            Some(matched) if matched < share => {
                matched.max(keeps(self.share_bytes.saturating_mul(CATCH_UP_FACTOR)))
            }
            Some(_) | None => share,
        }
    }
}

fn slowest_recent_follower(metrics: &GroupMetrics) -> Option<u64> {
    if !metrics.is_leader {
        return None;
    }
    let recent = |peer: &u64| {
        let age = metrics.acked_millis.get(peer).copied().flatten();
        age.is_some_and(|age| age < RECENT_MILLIS)
    };
    let followers = metrics.matched.iter().filter(|(peer, _)| recent(peer));
    followers.map(|(_, matched)| matched.unwrap_or(0)).min()
}

/// The last index in `low..=high` for which `holds`, which is true up to some index and false
/// after it; `low` if it holds nowhere.
fn last_index_with(low: u64, high: u64, holds: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (low, high);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if holds(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_last_index_is_found_at_every_place() {
        for edge in 3..=9 {
            assert_eq!(last_index_with(3, 9, |index| index <= edge), edge);
        }
        assert_eq!(last_index_with(3, 9, |_| false), 3);
    }

    #[test]
    fn only_followers_that_answer_hold_the_log_back() {
        let metrics = GroupMetrics {
            is_leader: true,
            matched: BTreeMap::from([(2, Some(70)), (3, Some(5)), (4, None)]),
            acked_millis: BTreeMap::from([(2, Some(100)), (3, Some(60_000)), (4, None)]),
            ..GroupMetrics::default()
        };
        assert_eq!(slowest_recent_follower(&metrics), Some(70));
        let follower = GroupMetrics { is_leader: false, ..metrics };
        assert_eq!(slowest_recent_follower(&follower), None);
    }
}
