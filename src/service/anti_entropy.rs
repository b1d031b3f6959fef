//! What `RegionService` answers about repair: differences, tombstones, writes at risk.
//!
//! Each function answers for the shards that this node leads; `region.rs` asks the other nodes.

use std::sync::Arc;

use futures::future::join_all;
use tokio::time::Instant;
use tombolo_core::{NamespaceId, RegionId, namespace::Namespace};
use tombolo_proto::v1 as pb;
use tombolo_replication::{KeyDifference, LinkKey};
use tombolo_shard::{AtRisk, Consistency, Shard, ShardError, blocking};
use tombolo_storage::Summary;
use tonic::Status;

use crate::{convert::encode_dot, reason::Reason, region::RegionApi};

/// Rows of a list if the caller names no number.
const ROWS_DEFAULT: usize = 100;
/// Most rows of a list.
const ROWS_MAX: usize = 10_000;

/// How many rows a caller gets.
pub(crate) fn rows(limit: u32) -> usize {
    match usize::try_from(limit) {
        Ok(0) | Err(_) => ROWS_DEFAULT,
        Ok(limit) => limit.min(ROWS_MAX),
    }
}

impl RegionApi {
    pub(crate) fn led(&self) -> impl Iterator<Item = &Shard> {
        self.gateway.shards().iter().filter(|shard| shard.is_leader())
    }

    /// The region with this name, which must be another one.
    pub(crate) fn peer(&self, name: &str) -> Result<RegionId, Status> {
        let others = self.gateway.topology().others();
        let region = others.into_iter().find(|region| region.name == name);
        region.map(|region| region.id).ok_or_else(|| {
            Reason::RegionNotFound
                .status(format!("there is no other region `{name}`"), &[("region", name.into())])
        })
    }

    pub(crate) async fn own_tombstones(&self) -> Result<Vec<pb::Tombstones>, Status> {
        let topology = self.gateway.topology();
        let mut found = Vec::new();
        for shard in self.led() {
            for (namespace, count) in shard.store().tombstone_counts() {
                let asked = shard.clone();
                let waits_for = blocking(move || asked.tombstones_wait_for(namespace)).await;
                let waits_for = waits_for.map_err(|error| self.gateway.status(error))?;
                found.push(pb::Tombstones {
                    namespace: self.namespace_name(namespace),
                    shard: u32::from(shard.id().0),
                    node_id: topology.node.0,
                    count,
                    waits_for_regions: waits_for
                        .into_iter()
                        .map(|region| topology.region_name(region))
                        .collect(),
                });
            }
        }
        Ok(found)
    }

    pub(crate) async fn own_summaries(
        &self,
        namespace: &str,
        deadline: Instant,
    ) -> Result<Vec<pb::ShardSummary>, Status> {
        let namespace = self.gateway.namespace(namespace, deadline).await?;
        let summaries = join_all(self.led().map(|shard| async {
            // As of now: a leader that was replaced would answer for the past.
            let fresh = Consistency::Linearizable;
            self.gateway.prepare_read(shard, namespace.id, &fresh, deadline).await?;
            let Summary { frontier, root, is_exact } = shard.store().summary(namespace.id);
            Ok(pb::ShardSummary {
                shard: u32::from(shard.id().0),
                node_id: self.gateway.topology().node.0,
                frontier: frontier.to_bytes(),
                root,
                repairing: !is_exact,
            })
        }));
        summaries.await.into_iter().collect()
    }

    /// Asks the links from `peer` to repair; answers how many.
    pub(crate) fn ask_repairs(&self, peer: RegionId, namespace: Option<&Namespace>) -> u32 {
        let mut asked = 0;
        for (key, _) in self.statuses.all() {
            let wanted = namespace.is_none_or(|namespace| namespace.id == key.namespace);
            if key.peer == peer && wanted {
                self.statuses.ask_repair(LinkKey { peer, ..key });
                asked += 1;
            }
        }
        asked
    }

    /// The differences of this node's shards, and what could not be compared.
    pub(crate) async fn own_differences(
        &self,
        peer: RegionId,
        namespace: &Arc<Namespace>,
        limit: usize,
    ) -> (Vec<pb::ShardDifferences>, Vec<String>) {
        let (mut found, mut failed) = (Vec::new(), Vec::new());
        for shard in self.led() {
            match self.comparer.differences(shard, peer, namespace, limit).await {
                Ok(differences) => found.push(pb::ShardDifferences {
                    shard: u32::from(shard.id().0),
                    same_point: differences.same_point,
                    keys: differences.keys.into_iter().map(key_difference).collect(),
                    more: differences.more,
                }),
                Err(error) => failed.push(format!("shard {}: {error}", shard.id())),
            }
        }
        (found, failed)
    }

    pub(crate) async fn own_at_risk(&self, limit: usize) -> Result<Vec<pb::AtRisk>, Status> {
        let mut found = Vec::new();
        for shard in self.led() {
            for namespace in shard.store().frontiers().into_keys() {
                let asked = shard.clone();
                let risk = blocking(move || asked.at_risk(namespace)).await;
                let risk = risk.map_err(|error: ShardError| self.gateway.status(error))?;
                if risk.count > 0 {
                    found.push(self.at_risk(shard, namespace, risk, limit));
                }
            }
        }
        Ok(found)
    }

    fn at_risk(
        &self,
        shard: &Shard,
        namespace: NamespaceId,
        risk: AtRisk,
        limit: usize,
    ) -> pb::AtRisk {
        let topology = self.gateway.topology();
        let deltas = risk.changes.into_iter().flat_map(|change| change.deltas);
        let unsafe_ones = deltas.filter(|delta| delta.sibling.dot.seq > risk.safe_seq);
        let write = |delta: tombolo_core::record::Delta| pb::AtRiskWrite {
            key: delta.key,
            dot: Some(encode_dot(delta.sibling.dot)),
            hybrid_time: delta.sibling.time.to_bits(),
            is_delete: !delta.sibling.content.is_present(),
        };
        pb::AtRisk {
            namespace: self.namespace_name(namespace),
            shard: u32::from(shard.id().0),
            node_id: topology.node.0,
            count: risk.count,
            writes: unsafe_ones.take(limit).map(write).collect(),
            unheard_regions: risk.unheard.into_iter().map(|it| topology.region_name(it)).collect(),
        }
    }
}

fn key_difference(difference: KeyDifference) -> pb::KeyDifference {
    pb::KeyDifference {
        key: difference.key,
        here: difference.here.into_iter().map(encode_dot).collect(),
        there: difference.there.into_iter().map(encode_dot).collect(),
    }
}
