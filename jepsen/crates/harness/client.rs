//! One attempt at one operation, through one node.
//!
//! The client library repeats what is safe to repeat and looks for leaders; here that would hide
//! what is to be seen. So operations go straight to the protocol: one call, one node, one deadline.
//! Writes carry a request id, which nothing repeats.
//!
//! An answer says `refused` only if the server, or a connection that was never made, makes certain
//! that nothing was written. Everything else that is no success is `unknown`.

use bytes::Bytes;
use std::error::Error as _;
use std::time::Duration;
use tombolo_demo::layout::NodePlan;
use tombolo_proto::v1;
use tombolo_proto::v1::cluster_service_client::ClusterServiceClient;
use tombolo_proto::v1::kv_service_client::KvServiceClient;
use tombolo_proto::v1::namespace_service_client::NamespaceServiceClient;
use tombolo_proto::v1::region_service_client::RegionServiceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, ConnectError, Request, Response, Status};
use tonic_types::StatusExt;

/// How long a server may take for a write; above the longest election of the configuration.
const DEADLINE: Duration = Duration::from_secs(2);
/// And for anything else: shorter, so that a node that is cut off is asked often.
const READ_DEADLINE: Duration = Duration::from_secs(1);
/// For what the transport adds.
const DEADLINE_SLACK: Duration = Duration::from_millis(250);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Reasons that are given before anything is proposed (`docs/errors.md`).
const REFUSALS: [&str; 5] =
    ["CLOCK_OUT_OF_BOUNDS", "CONTEXT_AHEAD", "DRAINING", "NOT_LEADER", "NO_LEADER"];

/// Why an operation did not succeed.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// It certainly had no effect.
    Refused(String),
    /// Nobody knows.
    Unknown(String),
}

impl Failure {
    pub(crate) fn words(&self) -> &str {
        match self {
            Self::Refused(words) | Self::Unknown(words) => words,
        }
    }
}

/// What a read must have seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// Everything that its region has acknowledged.
    Linearizable,
    /// Nothing: it shows what the node has.
    Local,
}

impl From<Freshness> for v1::ReadConsistency {
    fn from(freshness: Freshness) -> Self {
        use v1::read_consistency::Level;
        let level = match freshness {
            Freshness::Linearizable => Level::Linearizable(v1::Linearizable {}),
            Freshness::Local => Level::Local(v1::Local {}),
        };
        Self { level: Some(level) }
    }
}

/// A connection to one node. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) node: String,
    pub(crate) region: String,
    channel: Channel,
}

/// What a write made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Made {
    pub(crate) dot: Option<v1::Dot>,
    pub(crate) revision: Option<v1::Revision>,
}

/// How a compare-and-set ended.
#[derive(Clone, Debug)]
pub(crate) enum Compared {
    Set(Made),
    /// With the versions that are there instead.
    Refused(Vec<v1::Version>),
}

impl Client {
    /// Connects when first used. Call it where the sockets are to be.
    pub(crate) fn new(node: &NodePlan) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{}", node.client))?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(2))
            .keep_alive_while_idle(true)
            .connect_lazy();
        Ok(Self { node: node.name.clone(), region: node.region.clone(), channel })
    }

    fn kv(&self) -> KvServiceClient<Channel> {
        KvServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Reads one key.
    pub(crate) async fn get(
        &self,
        namespace: &str,
        key: &str,
        freshness: Freshness,
    ) -> Result<v1::GetResponse, Failure> {
        let request = v1::GetRequest {
            namespace: namespace.into(),
            key: Bytes::copy_from_slice(key.as_bytes()),
            consistency: Some(freshness.into()),
            ..Default::default()
        };
        let mut kv = self.kv();
        once(READ_DEADLINE, request, async |request| kv.get(request).await).await
    }

    /// Stores a value.
    pub(crate) async fn put(
        &self,
        namespace: &str,
        key: &str,
        value: Bytes,
        id: v1::RequestId,
    ) -> Result<Made, Failure> {
        let request = v1::PutRequest {
            namespace: namespace.into(),
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Some(data(value)),
            request_id: Some(id),
            ..Default::default()
        };
        let mut kv = self.kv();
        let reply = once(DEADLINE, request, async |request| kv.put(request).await).await?;
        Ok(Made { dot: reply.dot, revision: reply.revision })
    }

    /// Deletes a key; with a context only what that has seen.
    pub(crate) async fn delete(
        &self,
        namespace: &str,
        key: &str,
        context: Bytes,
        id: v1::RequestId,
    ) -> Result<Made, Failure> {
        let request = v1::DeleteRequest {
            namespace: namespace.into(),
            key: Bytes::copy_from_slice(key.as_bytes()),
            context,
            request_id: Some(id),
            ..Default::default()
        };
        let mut kv = self.kv();
        let reply = once(DEADLINE, request, async |request| kv.delete(request).await).await?;
        Ok(Made { dot: reply.dot, revision: reply.revision })
    }

    /// Stores a value if the key has `expected`, or is absent.
    pub(crate) async fn compare_and_set(
        &self,
        namespace: &str,
        key: &str,
        expected: Option<Bytes>,
        value: Bytes,
        id: v1::RequestId,
    ) -> Result<Compared, Failure> {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let condition = match expected {
            Some(expected) => v1::check::Condition::DataEquals(expected),
            None => v1::check::Condition::Absent(v1::Absent {}),
        };
        let write = v1::Write {
            key: key.clone(),
            action: Some(v1::write::Action::Put(data(value))),
            ..Default::default()
        };
        let request = v1::CommitRequest {
            namespace: namespace.into(),
            checks: vec![v1::Check { key, condition: Some(condition) }],
            writes: vec![write],
            request_id: Some(id),
            ..Default::default()
        };
        let mut kv = self.kv();
        let reply = once(DEADLINE, request, async |request| kv.commit(request).await).await?;
        if reply.committed {
            let dot = reply.results.into_iter().next().and_then(|result| result.dot);
            return Ok(Compared::Set(Made { dot, revision: reply.revision }));
        }
        match reply.failed_checks.into_iter().next() {
            Some(failed) => Ok(Compared::Refused(failed.versions)),
            None => Err(Failure::Unknown("not committed, and no check failed".into())),
        }
    }

    /// Reads all keys with a prefix.
    pub(crate) async fn scan(
        &self,
        namespace: &str,
        prefix: &str,
        freshness: Freshness,
        keys_only: bool,
        patience: Duration,
    ) -> Result<Vec<v1::KeyResult>, Failure> {
        let request = v1::ScanRequest {
            namespace: namespace.into(),
            prefix: Bytes::copy_from_slice(prefix.as_bytes()),
            consistency: Some(freshness.into()),
            keys_only,
            ..Default::default()
        };
        let mut kv = self.kv();
        let collect = async {
            let mut stream = kv.scan(request).await.map_err(|status| judge(&status))?.into_inner();
            let mut results = Vec::new();
            let mut complete = true;
            while let Some(page) = stream.message().await.map_err(|status| judge(&status))? {
                complete = page.page_token.is_empty();
                results.extend(page.results);
            }
            if complete {
                Ok(results)
            } else {
                Err(Failure::Unknown("the scan ended early".into()))
            }
        };
        let late = |_| Err(Failure::Unknown("no answer in time".into()));
        tokio::time::timeout(patience, collect).await.unwrap_or_else(late)
    }

    /// The node's view of its region's leaders.
    pub(crate) async fn cluster(&self) -> Result<v1::GetClusterResponse, Failure> {
        let mut cluster = ClusterServiceClient::new(self.channel.clone());
        once(READ_DEADLINE, v1::GetClusterRequest {}, async |request| {
            cluster.get_cluster(request).await
        })
        .await
    }

    /// The region's links, as this node sees them.
    pub(crate) async fn links(&self) -> Result<Vec<v1::Link>, Failure> {
        let mut regions = RegionServiceClient::new(self.channel.clone());
        let request = v1::ListLinksRequest::default();
        Ok(once(READ_DEADLINE, request, async |request| regions.list_links(request).await)
            .await?
            .links)
    }

    /// Makes a namespace; to be asked of the catalog's home.
    pub(crate) async fn create_namespace(&self, name: &str, rule: v1::Rule) -> Result<(), Failure> {
        let namespace =
            v1::Namespace { name: name.into(), rule: rule.into(), ..Default::default() };
        let request =
            v1::CreateNamespaceRequest { namespace: Some(namespace), ..Default::default() };
        let mut namespaces = NamespaceServiceClient::new(self.channel.clone());
        once(DEADLINE, request, async |request| namespaces.create_namespace(request).await)
            .await
            .map(drop)
    }
}

fn data(value: Bytes) -> v1::Value {
    v1::Value { kind: Some(v1::value::Kind::Data(value)), ..Default::default() }
}

/// One call, with a deadline on both sides.
async fn once<Q, R>(
    deadline: Duration,
    body: Q,
    send: impl AsyncFnOnce(Request<Q>) -> Result<Response<R>, Status>,
) -> Result<R, Failure> {
    let mut request = Request::new(body);
    request.set_timeout(deadline);
    match tokio::time::timeout(deadline + DEADLINE_SLACK, send(request)).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(judge(&status)),
        Err(_) => Err(Failure::Unknown("no answer in time".into())),
    }
}

fn judge(status: &Status) -> Failure {
    let reason = status.get_details_error_info().map(|info| info.reason);
    let words = match &reason {
        Some(reason) => reason.clone(),
        None => format!("{:?}: {}", status.code(), status.message()),
    };
    let is_refusal = match status.code() {
        // Only the transport gives a status a source.
        _ if status.source().is_some() => never_connected(status),
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Unimplemented
        | Code::Unauthenticated => reason.is_some(),
        Code::Unavailable => reason.is_some_and(|reason| REFUSALS.contains(&&*reason)),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Internal
        | Code::DataLoss => false,
    };
    if is_refusal { Failure::Refused(words) } else { Failure::Unknown(words) }
}

fn never_connected(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tonic_types::ErrorDetails;

    fn unavailable(reason: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, "tombolo", HashMap::new());
        Status::with_error_details(Code::Unavailable, "", details)
    }

    #[test]
    fn only_what_is_refused_before_it_is_proposed_has_certainly_failed() {
        for reason in REFUSALS {
            assert!(matches!(judge(&unavailable(reason)), Failure::Refused(_)), "{reason}");
        }
        for reason in ["NO_QUORUM", "OUTCOME_UNKNOWN", "REPLICA_FAILED"] {
            assert!(matches!(judge(&unavailable(reason)), Failure::Unknown(_)), "{reason}");
        }
        let bare = [Status::unavailable(""), Status::internal(""), Status::resource_exhausted("")];
        for status in bare {
            assert!(matches!(judge(&status), Failure::Unknown(_)), "{status}");
        }
    }
}
