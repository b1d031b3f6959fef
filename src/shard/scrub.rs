//! Scrubbing: reads everything now and then and compares it with its Merkle tree.
//!
//! Damage to data that nobody reads is found before it is needed. RocksDB checks its own blocks
//! while they are read; the tree finds what was lost or changed without a trace.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use crate::{collect::blocking, shard::Shard, shards::Shards};

/// What scrubbing found since the process started.
#[derive(Debug, Default)]
pub struct ScrubCounts {
    records: AtomicU64,
    damaged: AtomicU64,
}

impl ScrubCounts {
    /// Records that were read.
    pub fn records(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }

    /// Namespaces of shards in which something was wrong.
    pub fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }
}

/// Scrubs all replicas of a node, one at a time.
pub struct Scrubber {
    shards: Shards,
    interval: Duration,
    counts: Arc<ScrubCounts>,
}

impl Scrubber {
    /// A scrubber that begins a round every `interval`, the first after one of it.
    pub fn new(shards: Shards, interval: Duration) -> Self {
        Self { shards, interval, counts: Arc::default() }
    }

    /// What it has found so far.
    pub fn counts(&self) -> Arc<ScrubCounts> {
        Arc::clone(&self.counts)
    }

    /// Scrubs until `shutdown` fires; a namespace of a shard that is being read is finished.
    pub async fn run(self, shutdown: CancellationToken) {
        while shutdown.run_until_cancelled(tokio::time::sleep(self.interval)).await.is_some() {
            for shard in self.shards.iter() {
                if shutdown.is_cancelled() {
                    return;
                }
                self.scrub(shard).await;
            }
        }
    }

    async fn scrub(&self, shard: &Shard) {
        for namespace in shard.store().frontiers().into_keys() {
            let store = shard.store().clone();
            let shard = shard.id();
            let problem = match blocking(move || store.scrub(namespace)).await {
                Ok(found) => {
                    self.counts.records.fetch_add(found.records, Ordering::Relaxed);
                    if found.differing.is_empty() && found.not_indexed.is_empty() {
                        continue;
                    }
                    format!(
                        "{} leaves of the Merkle tree and {} of its index differ from the data",
                        found.differing.len(),
                        found.not_indexed.len()
                    )
                }
                Err(error) => error.to_string(),
            };
            self.counts.damaged.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                %shard,
                %namespace,
                %problem,
                "scrubbing found damage: replace this node's data directory by a new node"
            );
        }
    }
}
