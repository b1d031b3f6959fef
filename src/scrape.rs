//! Refreshes the metrics' gauges when they are scraped, from the parts' plain numbers.

use std::{sync::Arc, time::Duration};

use tombolo_consensus::Consensus;
use tombolo_core::clock_guard::Standing;
use tombolo_raftlog::RaftLog;
use tombolo_replication::{LinkPhase, LinkStatuses, Traffic};
use tombolo_service::{
    lag_of,
    metrics::{LedgerNumbers, LinkNumbers, Metrics, RaftLogNumbers, RaftNumbers, RocksNumbers},
};
use tombolo_shard::{CollectCounts, Headroom, ScrubCounts, Shards};
use tombolo_storage::Store;

/// What the numbers are read from.
pub(crate) struct Sources {
    pub(crate) consensus: Consensus,
    pub(crate) shards: Shards,
    pub(crate) store: Store,
    pub(crate) log: RaftLog,
    pub(crate) links: Arc<LinkStatuses>,
    pub(crate) headroom: Arc<Headroom>,
    pub(crate) scrubbed: Arc<ScrubCounts>,
    pub(crate) collected: Arc<CollectCounts>,
    pub(crate) segment_bytes: u64,
}

impl Sources {
    /// Reads all numbers into `metrics`.
    pub(crate) fn refresh(&self, metrics: &Metrics) {
        for group in self.consensus.groups() {
            let numbers = group.metrics();
            let commit_lag_entries =
                numbers.last_log.unwrap_or(0).saturating_sub(numbers.committed.unwrap_or(0));
            metrics.set_raft(
                u32::from(numbers.shard),
                &RaftNumbers {
                    is_leader: numbers.is_leader,
                    term: numbers.term,
                    commit_lag_entries,
                    leader_changes: numbers.leader_changes,
                },
            );
        }
        self.refresh_links(metrics);
        self.refresh_clocks(metrics);
        metrics.set_scrubbed(self.scrubbed.records(), self.scrubbed.damaged());
        let led = self.shards.iter().filter(|shard| shard.is_leader());
        let tombstones = led.flat_map(|shard| shard.store().tombstone_counts().into_values()).sum();
        metrics.set_tombstones(tombstones);
        self.refresh_ledger(metrics);
        metrics.set_disk(self.headroom.free_bytes(), self.headroom.is_short());
        let log = self.log.metrics();
        metrics.set_raft_log(&RaftLogNumbers {
            syncs: log.syncs,
            written_bytes: log.bytes,
            disk_bytes: log.segments * self.segment_bytes,
        });
        match self.store.metrics() {
            Ok(store) => metrics.set_rocksdb(&RocksNumbers {
                sst_bytes: store.sst_bytes,
                memtable_bytes: store.memtable_bytes,
                block_cache_bytes: store.block_cache_bytes,
                compaction_pending_bytes: store.pending_compaction_bytes,
                running_compactions: store.running_compactions,
                running_flushes: store.running_flushes,
                write_stopped: store.write_stopped,
                ..RocksNumbers::default()
            }),
            Err(error) => tracing::warn!(%error, "the data store's numbers cannot be read"),
        }
    }

    fn refresh_ledger(&self, metrics: &Metrics) {
        let mut numbers = LedgerNumbers {
            forgotten_for_age: self.collected.conflicts_aged(),
            forgotten_for_size: self.collected.conflicts_over_budget(),
            ..LedgerNumbers::default()
        };
        let now_ms = self.shards.clock().now().physical_ms();
        for shard in self.shards.iter().filter(|shard| shard.is_leader()) {
            for (namespace, size) in shard.store().ledger_sizes() {
                numbers.entries += size.entries;
                numbers.bytes += size.bytes;
                match shard.store().oldest_conflict(namespace) {
                    Ok(oldest) => {
                        let noted_ms = oldest.map_or(now_ms, |noted| noted.physical_ms());
                        let age = Duration::from_millis(now_ms.saturating_sub(noted_ms));
                        numbers.oldest_seconds = numbers.oldest_seconds.max(age.as_secs_f64());
                    }
                    Err(error) => tracing::warn!(%error, "the ledger cannot be read"),
                }
            }
        }
        metrics.set_ledger(&numbers);
    }

    fn refresh_clocks(&self, metrics: &Metrics) {
        let clock = self.shards.clock();
        metrics.set_clock_refused(clock.refused());
        for node in clock.nodes() {
            let is_outside = node.standing == Standing::Outside;
            metrics.set_node_clock(node.node.0, node.offset_us as f64 / 1e6, is_outside);
        }
        let regions = clock.regions();
        for peer in self.shards.topology().peers() {
            let known = regions.get(&peer.id).copied().unwrap_or_default();
            let ahead = Duration::from_millis(known.ahead_ms).as_secs_f64();
            metrics.set_region_clock(&peer.name, known.rejected, ahead);
        }
    }

    fn refresh_links(&self, metrics: &Metrics) {
        let topology = self.shards.topology();
        let statuses = self.links.all();
        for peer in topology.peers() {
            let Traffic { sent_bytes, received_bytes } = self.links.traffic(peer.id);
            let mut numbers = LinkNumbers {
                up: true,
                sent_bytes,
                received_bytes,
                repairs: self.links.repairs(peer.id),
                ..LinkNumbers::default()
            };
            for (_, status) in statuses.iter().filter(|(key, _)| key.peer == peer.id) {
                numbers.up &= status.phase == LinkPhase::Streaming;
            }
            for shard in self.shards.iter().filter(|shard| shard.is_leader()) {
                for namespace in shard.store().frontiers().into_keys() {
                    match lag_of(shard, namespace, peer.id) {
                        Ok(lag) => {
                            numbers.backlog_ops += lag.events;
                            numbers.backlog_bytes += lag.bytes;
                            numbers.lag_seconds = numbers.lag_seconds.max(lag.seconds);
                        }
                        Err(error) => tracing::warn!(%error, "a link's lag cannot be read"),
                    }
                }
            }
            metrics.set_link(&peer.name, &numbers);
        }
    }
}
