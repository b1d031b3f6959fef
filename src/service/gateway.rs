//! Which node answers, and until when: what all handlers share.
//!
//! Every node holds every shard. A write goes to the shard's leader: here, or forwarded once. A
//! linearizable read asks the leader for an index and is served from the local replica when that
//! is applied, so any node answers reads.

use std::{error::Error, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use tombolo_cluster::Topology;
use tombolo_core::{
    DecodeError, NamespaceId, NodeId,
    namespace::Namespace,
    token::{SessionToken, TokenKey},
};
use tombolo_proto::internal::v1::{self as internal, node_service_client::NodeServiceClient};
use tombolo_shard::{Consistency, Revision, Shard, ShardError, Shards};
use tonic::{Request, Status, metadata::MetadataMap};

use crate::{
    convert::Scope,
    forward::{NO_FORWARD, NodeChannels, is_set},
    reason::Reason,
    status::{of_shard_error, of_token_error},
};

/// Bounds on requests.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest value.
    pub value_bytes_max: usize,
    /// How long a request without a deadline may take.
    pub default_deadline: Duration,
}

/// Shared by all handlers of a node.
pub struct Gateway {
    shards: Shards,
    channels: NodeChannels,
    limits: Limits,
    /// Seals what clients carry.
    tokens: TokenKey,
    /// Names this node to its peers.
    directory_id: String,
}

/// One request's bounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    /// When the answer must be on its way.
    pub(crate) deadline: Instant,
    /// The caller wants a hint rather than a hop.
    pub(crate) no_forward: bool,
}

/// Kept for the answer's way back.
const DEADLINE_MARGIN_MAX: Duration = Duration::from_millis(50);
/// No request may wait longer, whatever it asks for.
const DEADLINE_MAX: Duration = Duration::from_secs(600);

impl Gateway {
    /// A gateway to `shards`.
    pub fn new(
        shards: Shards,
        channels: NodeChannels,
        limits: Limits,
        tokens: TokenKey,
        directory_id: String,
    ) -> Arc<Self> {
        Arc::new(Self { shards, channels, limits, tokens, directory_id })
    }

    pub(crate) fn shards(&self) -> &Shards {
        &self.shards
    }

    pub(crate) fn topology(&self) -> &Topology {
        self.shards.topology()
    }

    pub(crate) fn channels(&self) -> &NodeChannels {
        &self.channels
    }

    /// What the cluster's tokens are sealed with.
    pub(crate) fn cluster(&self) -> &TokenKey {
        &self.tokens
    }

    /// The bounds that a request's metadata asks for.
    pub(crate) fn call(&self, metadata: &MetadataMap) -> Call {
        let asked = metadata
            .get("grpc-timeout")
            .and_then(|value| value.to_str().ok())
            .and_then(parse_timeout)
            .unwrap_or(self.limits.default_deadline)
            .min(DEADLINE_MAX);
        let margin = DEADLINE_MARGIN_MAX.min(asked / 10);
        Call { deadline: Instant::now() + asked - margin, no_forward: is_set(metadata, NO_FORWARD) }
    }

    /// What converting messages of a namespace needs to know.
    pub(crate) fn scope(&self, namespace: NamespaceId) -> Scope<'_> {
        Scope {
            topology: self.topology(),
            cluster: self.cluster(),
            namespace,
            now: self.shards.clock().now(),
            value_bytes_max: self.limits.value_bytes_max,
        }
    }

    /// Reads a session token.
    pub(crate) fn session(&self, token: &Bytes) -> Result<SessionToken, Status> {
        SessionToken::decode(self.cluster(), token).map_err(|error| match error {
            DecodeError::TooLarge { actual, limit, .. } => Reason::SessionTokenTooLarge.status(
                format!("the session token has {actual} bytes or parts; at most {limit} are taken"),
                &[("max", limit.to_string())],
            ),
            error => of_token_error(Reason::SessionTokenInvalid, &error),
        })
    }

    /// The token of a session, without what it has seen of namespaces that are deleted: nobody can ask for
    /// that any more.
    ///
    /// Numbers of namespaces count up, and the catalog's changes come in causal order. So a number below one
    /// that is known here, and not known itself, is of a namespace that came and went. Two things are kept,
    /// because they may be news: higher numbers, and all of them while the catalog is being repaired, which
    /// brings its records in no order.
    pub(crate) fn session_token(&self, mut session: SessionToken) -> Bytes {
        let catalog = self.shards.catalog().current();
        let is_unknown = |id| NamespaceId::FIRST_ASSIGNED <= id && catalog.with_id(id).is_none();
        if session.iter().any(|(id, ..)| is_unknown(id)) {
            let store = self.shards.catalog_shard().store();
            let known = catalog.iter().map(|namespace| namespace.id);
            let newest = known.max().filter(|_| store.standing(NamespaceId::CATALOG).is_exact);
            session.forget(|id| is_unknown(id) && newest.is_some_and(|newest| id < newest));
        }
        session.encode(self.cluster())
    }

    /// The namespace with this name. Asks the catalog's shard before saying that there is none.
    pub(crate) async fn namespace(
        &self,
        name: &str,
        deadline: Instant,
    ) -> Result<Arc<Namespace>, Status> {
        if let Some(namespace) = self.shards.catalog().current().named(name) {
            return Ok(Arc::clone(namespace));
        }
        if !tombolo_core::key::is_namespace_name(name) {
            return Err(Reason::NamespaceInvalid.status(
                format!(
                    "`{name}` cannot name a namespace: 1 to 64 of a-z, 0-9, - and _, a letter first"
                ),
                &[],
            ));
        }
        self.refresh_catalog(deadline).await?;
        match self.shards.catalog().current().named(name) {
            Some(namespace) => Ok(Arc::clone(namespace)),
            None => Err(Reason::NamespaceNotFound.status(
                format!("there is no namespace `{name}`"),
                &[("namespace", name.to_owned())],
            )),
        }
    }

    /// Makes this node's view of the catalog at least as new as this call.
    pub(crate) async fn refresh_catalog(&self, deadline: Instant) -> Result<(), Status> {
        let shard = self.shards.catalog_shard();
        let consistency = Consistency::Linearizable;
        self.prepare_read(shard, NamespaceId::CATALOG, &consistency, deadline).await?;
        self.shards.reload_catalog().map_err(|error| self.status(error))
    }

    pub(crate) fn status(&self, error: ShardError) -> Status {
        of_shard_error(self.topology(), error)
    }

    /// Makes sure that this node's replica may answer a read; asks the leader where it must.
    pub(crate) async fn prepare_read(
        &self,
        shard: &Shard,
        namespace: NamespaceId,
        consistency: &Consistency,
        deadline: Instant,
    ) -> Result<Revision, Status> {
        loop {
            let refused = match shard.prepare_read(namespace, consistency, deadline).await {
                Err(ShardError::NotLeader { leader, .. }) => leader,
                other => {
                    let revision = other.map_err(|error| self.status(error))?;
                    return self.whole(shard, namespace, revision);
                }
            };
            if Instant::now() >= deadline {
                let error = ShardError::NotLeader { shard: shard.id(), leader: refused };
                return Err(self.status(error));
            }
            let Some(leader) = refused else {
                shard.wait_for_leader(deadline).await.map_err(|error| self.status(error))?;
                shard.pause(deadline).await;
                continue;
            };
            let asked = Instant::now();
            match self.read_index_from(leader, shard, deadline).await {
                Ok(revision) => {
                    let revision = self.wait_index(shard, revision, deadline).await?;
                    shard.note_fresh(asked);
                    return self.whole(shard, namespace, revision);
                }
                // A leader that just changed, or does not answer: look again.
                Err(status) => {
                    tracing::debug!(shard = %shard.id(), %leader, %status, "no read index yet");
                    shard.pause(deadline).await;
                }
            }
        }
    }

    /// A region may have begun anew while a read waited: what it has then is no answer.
    fn whole(
        &self,
        shard: &Shard,
        namespace: NamespaceId,
        revision: Revision,
    ) -> Result<Revision, Status> {
        if namespace != NamespaceId::CATALOG {
            shard.check_whole().map_err(|error| self.status(error))?;
        }
        Ok(revision)
    }

    /// Who this node is, for a call to another one of the region.
    pub(crate) fn identity_to(&self, node: NodeId) -> internal::Identity {
        let topology = self.topology();
        internal::Identity {
            cluster_id: topology.cluster_id.clone(),
            region: topology.local_name(),
            from_node: topology.node.0,
            to_node: node.0,
            from_directory: self.directory_id.clone(),
            to_directory: String::new(),
            shard_count: u32::from(topology.shard_count),
        }
    }

    async fn read_index_from(
        &self,
        leader: NodeId,
        shard: &Shard,
        deadline: Instant,
    ) -> Result<Revision, Status> {
        let topology = self.topology();
        let node = topology
            .node(leader)
            .ok_or_else(|| Reason::NodeNotFound.status(format!("node {leader} is unknown"), &[]))?;
        let mut client = NodeServiceClient::new(self.channels.get(&node.raft)?);
        let identity = Some(self.identity_to(leader));
        let request = internal::ReadIndexRequest { identity, group: u64::from(shard.id().0) };
        // One try must not use up all the time: the leader may just have died.
        let patience = deadline.min(Instant::now() + Duration::from_secs(1));
        let answer = tokio::time::timeout_at(patience, client.read_index(request)).await;
        let answer = answer
            .map_err(|_| Reason::Deadline.status("the leader did not answer in time", &[]))??
            .into_inner();
        Ok(Revision { shard: shard.id(), term: answer.term, index: answer.index })
    }

    async fn wait_index(
        &self,
        shard: &Shard,
        revision: Revision,
        deadline: Instant,
    ) -> Result<Revision, Status> {
        let mut applied = shard.store().watch_applied();
        let reached = applied.wait_for(|&index| index >= revision.index);
        match tokio::time::timeout_at(deadline, reached).await {
            Ok(Ok(_)) => Ok(revision),
            Ok(Err(_)) | Err(_) => {
                Err(self.status(ShardError::DeadlineExceeded { shard: shard.id() }))
            }
        }
    }

    /// Runs `local` where the shard's leader is: here, or through `remote` on the node that
    /// leads. Waits while an election is running.
    pub(crate) async fn on_leader<T, L, R>(
        &self,
        shard: &Shard,
        call: Call,
        mut local: impl FnMut() -> L,
        mut remote: impl FnMut(tonic::transport::Channel, MetadataMap) -> R,
    ) -> Result<T, Status>
    where
        L: Future<Output = Result<T, Status>>,
        R: Future<Output = Result<T, Status>>,
    {
        loop {
            let status = match local().await {
                Err(status) => status,
                done => return done,
            };
            let reason = Reason::of(&status);
            let elsewhere = matches!(reason, Some(Reason::NotLeader | Reason::NoLeader));
            if !elsewhere || Instant::now() >= call.deadline {
                return Err(status);
            }
            if call.no_forward && reason == Some(Reason::NotLeader) {
                return Err(status);
            }
            let leader = shard.leader().filter(|&leader| leader != self.topology().node);
            let node = leader.and_then(|leader| self.topology().node(leader));
            if let (Some(node), false) = (node, call.no_forward) {
                let channel = self.channels.get(&node.client)?;
                match remote(channel, forwarded_metadata(call.deadline)).await {
                    Err(status) if is_not_done(&status) => {}
                    done => return done.map_err(outcome_unknown),
                }
            }
            shard.pause(call.deadline).await;
        }
    }
}

/// Whether a forwarded request was certainly not carried out: its node did not lead, or could not
/// even be connected to.
fn is_not_done(status: &Status) -> bool {
    let refused =
        matches!(Reason::of(status), Some(Reason::NotLeader | Reason::NoLeader | Reason::Draining));
    refused || is_connect_error(status)
}

fn is_connect_error(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A broken connection between nodes leaves a forwarded request's outcome open.
fn outcome_unknown(status: Status) -> Status {
    if Reason::of(&status).is_some() {
        return status;
    }
    let text = format!("the leader's node did not answer: {}", status.message());
    Reason::OutcomeUnknown.status(text, &[])
}

/// The metadata of a forwarded request.
pub(crate) fn forwarded_metadata(deadline: Instant) -> MetadataMap {
    let mut request = Request::new(());
    request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    let mut metadata = std::mem::take(request.metadata_mut());
    metadata.insert(NO_FORWARD, tonic::metadata::MetadataValue::from_static("1"));
    metadata
}

/// A request with this message and metadata.
pub(crate) fn request<T>(message: T, metadata: MetadataMap) -> Request<T> {
    Request::from_parts(metadata, tonic::Extensions::default(), message)
}

/// Parses gRPC's timeout header: up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_that_cannot_be_connected_to_has_done_nothing() {
        // Nothing listens on port 1.
        let channel = NodeChannels::default().get("127.0.0.1:1").unwrap();
        let mut client = NodeServiceClient::new(channel);
        let refused = client.read_index(internal::ReadIndexRequest::default()).await.unwrap_err();
        assert!(is_not_done(&refused), "{refused:?}");
        assert!(!is_not_done(&Status::unavailable("the connection broke on the way")));
    }

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(parse_timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(parse_timeout("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for bad in ["", "S", "123456789S", "-1S", "5x", "é", "5 S"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }
}
