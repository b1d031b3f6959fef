//! Services whose interface is settled and whose work is not done yet: every call answers
//! UNIMPLEMENTED and says so. The README lists them.

use std::pin::Pin;

use futures::Stream;
use tombolo_proto::v1::{
    self as pb,
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
