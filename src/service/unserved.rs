//! Services whose interface is settled and whose work is not done yet: every call answers
//! UNIMPLEMENTED and says so. The README lists them.

use std::pin::Pin;

use futures::Stream;
use tombolo_proto::v1::{
    self as pb,
    conflict_service_server::{ConflictService, ConflictServiceServer},
    watch_service_server::{WatchService, WatchServiceServer},
};
use tonic::{Request, Response, Status};

use crate::status::not_implemented;

/// The change feed.
pub struct WatchApi;

impl WatchApi {
    /// The tonic service.
    pub fn into_service(self) -> WatchServiceServer<Self> {
        WatchServiceServer::new(self)
    }
}

#[tonic::async_trait]
impl WatchService for WatchApi {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        _: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(not_implemented("Watch"))
    }
}

/// Looking at and settling conflicts.
pub struct ConflictApi;

impl ConflictApi {
    /// The tonic service.
    pub fn into_service(self) -> ConflictServiceServer<Self> {
        ConflictServiceServer::new(self)
    }
}

#[tonic::async_trait]
impl ConflictService for ConflictApi {
    async fn list_conflicts(
        &self,
        _: Request<pb::ListConflictsRequest>,
    ) -> Result<Response<pb::ListConflictsResponse>, Status> {
        Err(not_implemented("ListConflicts"))
    }

    async fn get_conflict(
        &self,
        _: Request<pb::GetConflictRequest>,
    ) -> Result<Response<pb::GetConflictResponse>, Status> {
        Err(not_implemented("GetConflict"))
    }

    async fn restore_conflict(
        &self,
        _: Request<pb::RestoreConflictRequest>,
    ) -> Result<Response<pb::RestoreConflictResponse>, Status> {
        Err(not_implemented("RestoreConflict"))
    }
}
