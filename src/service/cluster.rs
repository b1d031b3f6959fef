//! `ClusterService`: the nodes and shards of this region.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use tombolo_core::clock_guard::Standing;
use tombolo_proto::v1::{
    self as pb,
    cluster_service_client::ClusterServiceClient,
    cluster_service_server::{ClusterService, ClusterServiceServer},
};
use tonic::{Request, Response, Status};

use crate::{convert::timestamp, gateway::Gateway, http::Checks};

/// Serves the region's status.
pub struct ClusterApi {
    gateway: Arc<Gateway>,
    checks: Arc<Checks>,
}

const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
const VERSION: &str = env!("CARGO_PKG_VERSION");

impl ClusterApi {
    /// Serves status; `checks` tell whether this node is ready.
    pub fn new(gateway: Arc<Gateway>, checks: Arc<Checks>) -> Self {
        Self { gateway, checks }
    }

    /// The tonic service.
    pub fn into_service(self) -> ClusterServiceServer<Self> {
        ClusterServiceServer::new(self)
    }

    fn own_state(&self) -> pb::NodeState {
        if self.checks.is_ready() { pb::NodeState::Up } else { pb::NodeState::NotReady }
    }

    /// What is known of a node without asking it.
    fn describe(&self, node: &tombolo_cluster::Node) -> pb::Node {
        let is_self = node.id == self.gateway.topology().node;
        let clocks = self.gateway.shards().clock().nodes();
        let clock = clocks.into_iter().find(|clock| clock.node == node.id);
        let seconds = |us: f64| us / 1e6;
        let state = if is_self { self.own_state() } else { pb::NodeState::Unspecified };
        pb::Node {
            node_id: node.id.0,
            client_address: node.client.clone(),
            http_address: node.http.clone(),
            state: state.into(),
            last_seen_seconds: 0.0,
            version: if is_self { VERSION.to_owned() } else { String::new() },
            clock_offset_seconds: clock.map_or(0.0, |clock| seconds(clock.offset_us as f64)),
            clock_uncertainty_seconds: clock
                .map_or(0.0, |clock| seconds(clock.uncertainty_us as f64)),
            clock: clock.map_or(pb::ClockState::Unspecified, |it| clock_state(it.standing)).into(),
        }
    }

    /// Asks a node how it is.
    async fn probe(&self, node: &tombolo_cluster::Node) -> pb::Node {
        let mut described = self.describe(node);
        if node.id == self.gateway.topology().node {
            return described;
        }
        let answer = async {
            let channel = self.gateway.channels().get(&node.client)?;
            ClusterServiceClient::new(channel).get_cluster(pb::GetClusterRequest {}).await
        };
        let answered = tokio::time::timeout(PROBE_TIMEOUT, answer).await;
        described.last_seen_seconds = self.last_seen_seconds(node.id.0);
        let Ok(Ok(answer)) = answered else {
            described.state = pb::NodeState::Unreachable.into();
            return described;
        };
        let answer = answer.into_inner();
        let own = answer.nodes.into_iter().find(|other| other.node_id == node.id.0);
        described.state = own.map_or(pb::NodeState::Unspecified.into(), |own| own.state);
        described.version = answer.version;
        described
    }

    /// Since when none of the shards that this node leads has heard of a node.
    fn last_seen_seconds(&self, node: u64) -> f64 {
        let shards = self.gateway.shards().iter();
        let youngest = shards
            .filter_map(|shard| shard.group().metrics().acked_millis.get(&node).copied().flatten())
            .min()
            .unwrap_or(0);
        Duration::from_millis(youngest).as_secs_f64()
    }
}

const fn clock_state(standing: Standing) -> pb::ClockState {
    match standing {
        Standing::Alone => pb::ClockState::Alone,
        Standing::Unheard => pb::ClockState::Unspecified,
        Standing::Inside => pb::ClockState::Inside,
        Standing::Split => pb::ClockState::Undecided,
        Standing::Outside => pb::ClockState::Outside,
    }
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    async fn get_cluster(
        &self,
        _: Request<pb::GetClusterRequest>,
    ) -> Result<Response<pb::GetClusterResponse>, Status> {
        let topology = self.gateway.topology();
        let leader = |shard: &tombolo_shard::Shard| {
            let leadership = *shard.group().leadership().borrow();
            pb::ShardLeader {
                shard: u32::from(shard.id().0),
                leader_node_id: leadership.leader.map_or(0, |leader| leader.0),
                term: leadership.term,
            }
        };
        Ok(Response::new(pb::GetClusterResponse {
            cluster_id: topology.cluster_id.clone(),
            region: topology.local_name(),
            node_id: topology.node.0,
            version: VERSION.to_owned(),
            shard_count: u32::from(topology.shard_count),
            nodes: topology.nodes.iter().map(|node| self.describe(node)).collect(),
            leaders: self.gateway.shards().iter().map(leader).collect(),
            time: Some(timestamp(self.gateway.shards().clock().now())),
        }))
    }

    async fn list_nodes(
        &self,
        _: Request<pb::ListNodesRequest>,
    ) -> Result<Response<pb::ListNodesResponse>, Status> {
        let nodes = &self.gateway.topology().nodes;
        let nodes = join_all(nodes.iter().map(|node| self.probe(node))).await;
        Ok(Response::new(pb::ListNodesResponse { nodes }))
    }

    async fn list_shards(
        &self,
        _: Request<pb::ListShardsRequest>,
    ) -> Result<Response<pb::ListShardsResponse>, Status> {
        let describe = |shard: &tombolo_shard::Shard| {
            let numbers = shard.group().metrics();
            pb::Shard {
                shard: u32::from(shard.id().0),
                leader_node_id: numbers.leader.unwrap_or(0),
                term: numbers.term,
                last_log_index: numbers.last_log.unwrap_or(0),
                commit_index: numbers.committed.unwrap_or(0),
                applied_index: numbers.applied.unwrap_or(0),
                purged_index: numbers.purged.unwrap_or(0),
                flushed_index: numbers.flushed.unwrap_or(0),
                voters: numbers.voters,
                learners: Vec::new(),
                problem: numbers.failure.unwrap_or_default(),
            }
        };
        let shards = self.gateway.shards().iter().map(describe).collect();
        Ok(Response::new(pb::ListShardsResponse { shards }))
    }
}
