//! `NodeService`: what nodes of one region ask each other beside Raft.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tombolo_core::{NamespaceId, ShardId};
use tombolo_proto::internal::v1::{
    self as pb,
    node_service_server::{NodeService, NodeServiceServer},
};
use tombolo_shard::Consistency;
use tonic::{Request, Response, Status};

use crate::{gateway::Gateway, reason::Reason};

/// Serves the other nodes of the region, on the raft port.
pub struct NodeApi {
    gateway: Arc<Gateway>,
}

const READ_INDEX_TIMEOUT: Duration = Duration::from_secs(2);

impl NodeApi {
    /// Serves through `gateway`.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        Self { gateway }
    }

    /// The tonic service.
    pub fn into_service(self) -> NodeServiceServer<Self> {
        NodeServiceServer::new(self)
    }

    fn check_identity(&self, identity: Option<pb::Identity>) -> Result<(), Status> {
        let topology = self.gateway.topology();
        let mismatch = |text: String| Err(Reason::ClusterMismatch.status(text, &[]));
        let Some(identity) = identity else {
            return mismatch("the caller does not say who it is".to_owned());
        };
        if identity.cluster_id != topology.cluster_id || identity.region != topology.local_name() {
            return mismatch(format!(
                "node {} of cluster `{}`, region `{}` called a node of cluster `{}`, region `{}`: \
                 check the addresses in [[nodes]]",
                identity.from_node,
                identity.cluster_id,
                identity.region,
                topology.cluster_id,
                topology.local_name()
            ));
        }
        if identity.to_node != topology.node.0 {
            return mismatch(format!(
                "node {} called node {} but this is node {}: check the addresses in [[nodes]]",
                identity.from_node, identity.to_node, topology.node
            ));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl NodeService for NodeApi {
    async fn read_index(
        &self,
        request: Request<pb::ReadIndexRequest>,
    ) -> Result<Response<pb::ReadIndexResponse>, Status> {
        let message = request.into_inner();
        self.check_identity(message.identity)?;
        let shard = u16::try_from(message.group)
            .ok()
            .and_then(|number| self.gateway.shards().get(ShardId(number)))
            .ok_or_else(|| {
                Reason::ShardNotFound.status(format!("there is no shard {}", message.group), &[])
            })?;
        let deadline = Instant::now() + READ_INDEX_TIMEOUT;
        let revision = shard
            .prepare_read(NamespaceId::CATALOG, &Consistency::Linearizable, deadline)
            .await
            .map_err(|error| self.gateway.status(error))?;
        Ok(Response::new(pb::ReadIndexResponse { term: revision.term, index: revision.index }))
    }

    async fn read_clock(
        &self,
        request: Request<pb::ReadClockRequest>,
    ) -> Result<Response<pb::ReadClockResponse>, Status> {
        self.check_identity(request.into_inner().identity)?;
        // Last, so that it lies as late as may be between question and answer.
        Ok(Response::new(pb::ReadClockResponse {
            wall_us: self.gateway.shards().clock().wall_us(),
        }))
    }
}
