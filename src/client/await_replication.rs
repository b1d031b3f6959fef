//! Waiting until other regions have what a session has seen.

use crate::client::Plan;
use crate::error::Result;
use crate::keyspace::{CallOptions, call_options};
use crate::retry::Safety;
use crate::router::Target;
use futures::future::BoxFuture;
use tombolo_proto::v1;

/// A wait that begins when awaited.
#[derive(Clone, Debug)]
#[must_use = "does nothing unless awaited"]
pub struct AwaitReplication {
    call: CallOptions,
    request: v1::AwaitReplicationRequest,
}

call_options!(AwaitReplication);

/// Which other regions have what the session has seen of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replicated {
    /// They have all of it.
    pub regions: Vec<String>,
    /// They lack some of it.
    pub lacking: Vec<Lacking>,
}

/// A region that lacks some of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking {
    pub region: String,
    /// How many events; `None` if the region is shut out or was not heard yet.
    pub events: Option<u64>,
}

impl AwaitReplication {
    pub(crate) fn new(call: CallOptions, namespace: String, regions: u32) -> Self {
        let request = v1::AwaitReplicationRequest { namespace, regions, ..Default::default() };
        Self { call, request }
    }
}

impl IntoFuture for AwaitReplication {
    type Output = Result<Replicated>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { call, mut request } = self;
        Box::pin(async move {
            request.session_token = call.token_to_read()?;
            let plan = Plan {
                target: Target::AnyNode,
                safety: Safety::Read,
                deadline: call.client.deadline(call.deadline),
                waits: true,
            };
            let kv = call.kv();
            let reply = call
                .client
                .call(plan, request, |channel, request| {
                    let mut kv = kv(channel);
                    async move { kv.await_replication(request).await }
                })
                .await?;
            let lacking = reply
                .lacking
                .into_iter()
                .map(|it| Lacking { region: it.region, events: it.events });
            Ok(Replicated { regions: reply.regions, lacking: lacking.collect() })
        })
    }
}
