//! All shards of a node, and the catalog that one of them feeds.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tombolo_cluster::{Catalog, Namespaces, Topology};
use tombolo_core::{
    DecodeError, HybridTime, NamespaceId, ShardId, namespace::Namespace, region::RegionEntry,
};
use tombolo_storage::ScanRange;

use crate::{clock::Clock, error::ShardError, shard::Shard};

/// Every shard that this node holds a replica of: all of them. Cheap to clone.
#[derive(Clone)]
pub struct Shards {
    shards: Arc<[Shard]>,
    topology: Arc<Topology>,
    catalog: Catalog,
    reading_catalog: Arc<Mutex<()>>,
}

/// Namespaces read from the catalog at a time.
const CATALOG_PAGE_KEYS: usize = 1000;
const CATALOG_PAGE_BYTES: usize = 1 << 20;

impl Shards {
    /// The shards, in order of their numbers.
    pub fn new(shards: Vec<Shard>, topology: Arc<Topology>) -> Self {
        let reading_catalog = Arc::default();
        Self { shards: shards.into(), topology, catalog: Catalog::default(), reading_catalog }
    }

    /// The topology.
    pub fn topology(&self) -> &Arc<Topology> {
        &self.topology
    }

    /// The catalog as this node sees it.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// All shards.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Shard> {
        self.shards.iter()
    }

    /// The shard with this number.
    pub fn get(&self, id: ShardId) -> Option<&Shard> {
        self.shards.get(usize::from(id.0))
    }

    /// The shard of a key.
    pub fn of_key(&self, key: &[u8]) -> &Shard {
        &self.shards[usize::from(self.topology.shard_of(key).0)]
    }

    /// The shard that holds the catalog.
    pub fn catalog_shard(&self) -> &Shard {
        &self.shards[usize::from(self.topology.catalog_shard().0)]
    }

    /// The clock that all shards share.
    pub fn clock(&self) -> &Clock {
        self.shards[0].clock()
    }

    /// Reads the catalog from this node's replica and publishes it.
    ///
    /// # Errors
    /// If the replica's data cannot be read.
    pub fn reload_catalog(&self) -> Result<(), ShardError> {
        // One at a time: a slower reader must not publish an older catalog over a newer one.
        let _reading = self.reading_catalog.lock();
        let shard = self.catalog_shard();
        let now = shard.clock().now();
        let namespaces = Namespace::first_catalog_key()..Namespace::end_catalog_key();
        let namespaces = read_catalog(shard, namespaces, now, Namespace::from_bytes)?;
        let regions = RegionEntry::first_catalog_key()..RegionEntry::end_catalog_key();
        let regions = read_catalog(shard, regions, now, RegionEntry::from_bytes)?;
        self.topology.regions.learn(regions);
        self.catalog.publish(Namespaces::new(namespaces));
        Ok(())
    }

    /// Keeps the catalog current until `shutdown` fires.
    pub async fn follow_catalog(&self, shutdown: CancellationToken) {
        let shard = self.catalog_shard();
        let mut applied = shard.store().watch_applied();
        let mut read_at = None;
        loop {
            let frontier = shard.frontier(NamespaceId::CATALOG);
            if read_at.as_ref() != Some(&frontier) {
                match self.reload_catalog() {
                    Ok(()) => read_at = Some(frontier),
                    Err(error) => tracing::error!(%error, "the catalog cannot be read"),
                }
            }
            // Safe to drop at `changed`: it only looks.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// What the catalog has in a range of keys.
fn read_catalog<T>(
    shard: &Shard,
    keys: Range<Bytes>,
    now: HybridTime,
    decode: impl Fn(Bytes) -> Result<T, DecodeError>,
) -> Result<Vec<T>, ShardError> {
    let mut found = Vec::new();
    let mut start = keys.start;
    loop {
        let range = ScanRange { start, end: Some(keys.end.clone()), reverse: false };
        let page =
            shard.scan(NamespaceId::CATALOG, &range, CATALOG_PAGE_KEYS, CATALOG_PAGE_BYTES)?;
        for (key, record) in page.records {
            for (_, data) in record.live_at(now) {
                match decode(data.clone()) {
                    Ok(entry) => found.push(entry),
                    Err(error) => tracing::error!(?key, %error, "catalog entry skipped"),
                }
            }
        }
        match page.next {
            Some(next) => start = next,
            None => return Ok(found),
        }
    }
}
