//! Waiting for other regions: `ack_regions` of writes, and `AwaitReplication`.
//!
//! The leader of a shard knows what other regions have acknowledged of it, so each shard is asked
//! where its leader is, and again where its next one is. A region counts if it has what is waited for
//! in every shard: two that have one half each are none.
//!
//! Not here: who acknowledges what and when (`tombolo-replication`).

use std::{collections::BTreeMap, sync::Arc};

use futures::{StreamExt, stream::FuturesUnordered};
use tombolo_cluster::Topology;
use tombolo_core::{RegionId, VersionVector, namespace::Namespace, token::SessionToken};
use tombolo_proto::v1::{self as pb, kv_service_client::KvServiceClient};
use tombolo_shard::{Coverage, Shard, ShardError};
use tonic::Status;
use tonic_types::StatusExt;

use crate::{
    gateway::{Call, Gateway, request as with_metadata},
    reason::Reason,
};

/// Metadata: the regions that have all of it.
const REGIONS: &str = "regions";
/// Metadata: the regions that do not.
const MISSING: &str = "missing";
/// Metadata: how many events each of those lacks.
const BEHIND: &str = "behind";
/// Stands for a number of events that this region does not know.
const UNKNOWN: &str = "?";

/// What other regions are to have of one shard.
pub(crate) struct Awaited {
    pub(crate) namespace: Arc<Namespace>,
    pub(crate) shard: Shard,
    pub(crate) needed: VersionVector,
}

impl Gateway {
    /// What a session has seen of a namespace.
    pub(crate) fn awaited(
        &self,
        namespace: &Arc<Namespace>,
        session: &SessionToken,
    ) -> Vec<Awaited> {
        let of_shard = |shard: &Shard| {
            let needed = session.seen(namespace.id, shard.id())?.clone();
            let (namespace, shard) = (Arc::clone(namespace), shard.clone());
            Some(Awaited { namespace, shard, needed })
        };
        self.shards().iter().filter_map(of_shard).collect()
    }

    /// Waits until `count` other regions have what is awaited of one shard, on the shard's leader. Who
    /// has; fewer if the deadline came first.
    ///
    /// Cancellation safe: it only looks.
    pub(crate) async fn await_shard(
        &self,
        awaited: &Awaited,
        count: usize,
        call: Call,
    ) -> Result<Coverage, Status> {
        let Awaited { namespace, shard, needed } = awaited;
        let mut session = SessionToken::default();
        session.observe(namespace.id, shard.id(), needed);
        let message = pb::AwaitReplicationRequest {
            namespace: namespace.name.clone(),
            session_token: session.encode(self.cluster()),
            regions: u32::try_from(count).unwrap_or(u32::MAX),
        };
        let local = || async {
            let waited = shard.wait_replicated(namespace.id, needed, count, call.deadline).await;
            waited.map_err(|error| self.status(error))
        };
        let waits = self.on_leader(shard, call, local, |channel, metadata| {
            let message = message.clone();
            async move {
                let mut client = KvServiceClient::new(channel);
                match client.await_replication(with_metadata(message, metadata)).await {
                    Ok(answer) => Ok(decode_coverage(self.topology(), answer.into_inner())),
                    Err(status) => coverage_of(self.topology(), status),
                }
            }
        });
        tokio::select! {
            biased;
            // Nobody waits at a node that goes; others go on.
            () = shard.stopped() => Err(self.status(ShardError::Stopped { shard: shard.id() })),
            coverage = waits => coverage,
        }
    }

    /// Waits until `count` other regions have all that is awaited.
    ///
    /// Cancellation safe: it only looks.
    ///
    /// # Errors
    /// [`Reason::ReplicationPending`] with the regions that are missing, if the deadline came first.
    pub(crate) async fn await_all(
        &self,
        awaited: &[Awaited],
        count: usize,
        call: Call,
    ) -> Result<Coverage, Status> {
        let peers = self.topology().peers();
        let wait = |at: usize, count: usize| async move {
            (at, count, self.await_shard(&awaited[at], count, call).await)
        };
        let mut waits: FuturesUnordered<_> = (0..awaited.len()).map(|at| wait(at, count)).collect();
        let mut found: BTreeMap<usize, Coverage> = BTreeMap::new();
        // Nothing is awaited: everybody has it.
        let mut all = Coverage {
            has: peers.iter().map(|region| region.id).collect(),
            lacks: BTreeMap::new(),
        };
        while let Some((at, asked, coverage)) = waits.next().await {
            let coverage = coverage?;
            let reached = coverage.has.len();
            found.insert(at, coverage);
            let mut each = found.values();
            if let Some(first) = each.next() {
                all = each.fold(first.clone(), |all, one| all.and(one));
            }
            if found.len() == awaited.len() && count <= all.has.len() {
                return Ok(all);
            }
            // As many as asked for, but not yet the same in every shard: wait for one more.
            if asked <= reached && reached < peers.len() {
                waits.push(wait(at, reached + 1));
            }
        }
        if awaited.is_empty() {
            return Ok(all);
        }
        Err(pending(self.topology(), Reason::ReplicationPending, &all, count, &[]))
    }
}

/// The answer about who has what was awaited.
pub(crate) fn encode_coverage(
    topology: &Topology,
    coverage: &Coverage,
) -> pb::AwaitReplicationResponse {
    let lacking = coverage.lacks.iter().map(|(&region, &events)| pb::LackingRegion {
        region: topology.region_name(region),
        events,
    });
    pb::AwaitReplicationResponse {
        regions: coverage.has.iter().map(|&region| topology.region_name(region)).collect(),
        lacking: lacking.collect(),
    }
}

fn decode_coverage(topology: &Topology, answer: pb::AwaitReplicationResponse) -> Coverage {
    let id = |name: &str| topology.region_named(name).map(|region| region.id);
    let lacks = |it: pb::LackingRegion| Some((id(&it.region)?, it.events));
    Coverage {
        has: answer.regions.iter().filter_map(|name| id(name)).collect(),
        lacks: answer.lacking.into_iter().filter_map(lacks).collect(),
    }
}

/// The error for what `count` other regions do not have yet: says who has it, who does not, and how
/// much those lack.
pub(crate) fn pending(
    topology: &Topology,
    reason: Reason,
    coverage: &Coverage,
    count: usize,
    more: &[(&str, String)],
) -> Status {
    let name = |region: &RegionId| topology.region_name(*region);
    let list = |names: Vec<String>| names.join(",");
    let has = list(coverage.has.iter().map(name).collect());
    let missing = list(coverage.lacks.keys().map(name).collect());
    let behind = coverage.lacks.iter().map(|(region, events)| {
        let events = events.map_or_else(|| UNKNOWN.to_owned(), |events| events.to_string());
        format!("{}={events}", name(region))
    });
    let behind = list(behind.collect());
    let has_it = if has.is_empty() { "none has it".to_owned() } else { format!("{has} has it") };
    let text = if reason == Reason::AckRegionsPending {
        "the write stands in this region"
    } else {
        "what the session has seen is not everywhere yet"
    };
    let message = format!(
        "{text}; of {count} other regions that were to have it, {has_it}; missing: {behind}"
    );
    let mut metadata = vec![(REGIONS, has), (MISSING, missing), (BEHIND, behind)];
    metadata.extend_from_slice(more);
    reason.status(message, &metadata)
}

/// What another node's error says of who has it. Its other errors stay errors; one of a node that is
/// gone, or was never reached, means that the leader is to be looked for again.
fn coverage_of(topology: &Topology, status: Status) -> Result<Coverage, Status> {
    match Reason::of(&status) {
        Some(Reason::ReplicationPending) => {}
        None | Some(Reason::ReplicaFailed) => {
            let text = format!("the leader's node did not answer: {}", status.message());
            return Err(Reason::NoLeader.status(text, &[]));
        }
        Some(_) => return Err(status),
    }
    let metadata = status.get_details_error_info().map(|info| info.metadata).unwrap_or_default();
    let id = |name: &str| topology.region_named(name).map(|region| region.id);
    let told = |name: &str| metadata.get(name).map(String::as_str).unwrap_or_default();
    let lacks = |entry: &str| {
        let (name, events) = entry.split_once('=')?;
        Some((id(name)?, events.parse().ok()))
    };
    Ok(Coverage {
        has: told(REGIONS).split(',').filter_map(id).collect(),
        lacks: told(BEHIND).split(',').filter_map(lacks).collect(),
    })
}

#[cfg(test)]
mod tests {
    use tombolo_cluster::{Region, Regions};
    use tombolo_core::NodeId;

    use super::*;

    fn topology() -> Topology {
        let region = |(number, name): (u16, &str)| Region {
            id: RegionId(number),
            name: name.to_owned(),
            link_addresses: Vec::new(),
            said: None,
        };
        let regions = (1..).zip(["us", "eu", "ap"]).map(region).collect();
        Topology {
            cluster_id: "test".to_owned(),
            region: RegionId(1),
            region_name: "us".to_owned(),
            joins: false,
            node: NodeId(1),
            shard_count: 1,
            regions: Regions::new(regions),
            nodes: Vec::new(),
            catalog_home: RegionId(1),
        }
    }

    #[test]
    fn what_a_deadline_found_is_read_from_the_error_of_another_node() {
        let topology = topology();
        let coverage =
            Coverage { has: [RegionId(2)].into(), lacks: [(RegionId(3), Some(17))].into() };
        let unknown = Coverage { has: [].into(), lacks: [(RegionId(2), None)].into() };
        for coverage in [coverage, unknown] {
            let status = pending(&topology, Reason::ReplicationPending, &coverage, 2, &[]);
            assert_eq!(coverage_of(&topology, status).unwrap(), coverage);
            let answer = encode_coverage(&topology, &coverage);
            assert_eq!(decode_coverage(&topology, answer), coverage);
        }
        let refused = coverage_of(&topology, Reason::Draining.status("bye", &[])).unwrap_err();
        assert_eq!(Reason::of(&refused), Some(Reason::Draining));
        let gone = Reason::ReplicaFailed.status("it stops", &[]);
        for lost in [gone, Status::unavailable("broken pipe")] {
            let lost = coverage_of(&topology, lost).unwrap_err();
            assert_eq!(Reason::of(&lost), Some(Reason::NoLeader));
        }
    }

    #[test]
    fn the_error_names_who_is_missing_and_by_how_much() {
        let coverage =
            Coverage { has: [RegionId(2)].into(), lacks: [(RegionId(3), Some(17))].into() };
        let dot = [("dot", "1.1:9".to_owned())];
        let status = pending(&topology(), Reason::AckRegionsPending, &coverage, 2, &dot);
        assert_eq!(
            status.message(),
            "the write stands in this region; of 2 other regions that were to have it, eu has it; \
             missing: ap=17"
        );
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.metadata["missing"], "ap");
        assert_eq!(info.metadata["dot"], "1.1:9");
    }
}
