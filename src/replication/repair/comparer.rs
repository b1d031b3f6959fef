//! Listing what two regions hold differently, without changing anything.

use std::sync::Arc;

use bytes::Bytes;
use tombolo_cluster::Region;
use tombolo_core::{Dot, RegionId, namespace::Namespace};
use tombolo_shard::Shard;

use super::receiver::{Ask, Repair, RepairError};
use crate::{channels::LinkChannels, config::ReplicationConfig, status::LinkStatuses};

/// Compares shards that this node leads with other regions.
#[derive(Clone)]
pub struct Comparer {
    pub(crate) channels: LinkChannels,
    pub(crate) statuses: Arc<LinkStatuses>,
    pub(crate) config: ReplicationConfig,
}

/// What a shard of a namespace holds differently in another region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Both regions had applied the same.
    pub same_point: bool,
    /// Keys, in no order.
    pub keys: Vec<KeyDifference>,
    /// There are more.
    pub more: bool,
}

/// A key that two regions hold differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyDifference {
    /// The key.
    pub key: Bytes,
    /// The writes whose values are here; read after the comparison.
    pub here: Vec<Dot>,
    /// The writes whose values are there.
    pub there: Vec<Dot>,
}

/// Why a comparison gave nothing.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CompareError(String);

impl Comparer {
    /// Compares one namespace of one shard with `peer`, and lists at most `limit` keys.
    ///
    /// Cancellation safe: it changes nothing.
    ///
    /// # Errors
    /// If no node of the peer region answers as the shard's leader, or data cannot be read.
    pub async fn differences(
        &self,
        shard: &Shard,
        peer: RegionId,
        namespace: &Arc<Namespace>,
        limit: usize,
    ) -> Result<Differences, CompareError> {
        let failed = |error: String| CompareError(error);
        let region: Region = shard
            .topology()
            .region(peer)
            .ok_or_else(|| failed(format!("there is no region {peer}")))?;
        let mut last = failed(format!("region `{}` has no link addresses", region.name));
        for address in &region.link_addresses {
            let repair = Repair {
                shard: shard.clone(),
                peer: region.clone(),
                source: shard.actor_of(peer),
                address: address.clone(),
                namespace: Arc::clone(namespace),
                channels: self.channels.clone(),
                statuses: Arc::clone(&self.statuses),
                setting: shard.store().clone(),
                pace: Arc::default(),
                config: self.config.clone(),
            };
            let comparison = match repair.compare(Ask::Keys).await {
                Ok(comparison) => comparison,
                // Another node of the region may lead.
                Err(error) => {
                    last = failed(format!("{address}: {error}"));
                    continue;
                }
            };
            let same_point = comparison.is_at_same_point();
            let listed = comparison.keys(limit).await;
            let (offers, more) = listed.map_err(|error: RepairError| failed(error.to_string()))?;
            let mut keys = Vec::with_capacity(offers.len());
            for offer in offers {
                let record = shard.record(namespace.id, &offer.key);
                let record = record.map_err(|error| failed(error.to_string()))?;
                let live = record.iter().filter(|record| !record.is_dead());
                keys.push(KeyDifference {
                    here: live.flat_map(|it| it.siblings()).map(|held| held.dot).collect(),
                    there: offer.siblings.iter().map(|offered| offered.dot()).collect(),
                    key: offer.key,
                });
            }
            return Ok(Differences { same_point, keys, more });
        }
        Err(last)
    }
}
