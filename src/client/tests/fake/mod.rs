//! A region made of in-process servers over one shared map, which does as it is told: it leads
//! from where a test says, refuses, hangs, forgets to answer, and logs each call it sees.
//!
//! Shared by the tests of `tombolo-client` and `tombolo-commands`.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::cast_possible_truncation, reason = "a fake holds little")]

pub(crate) mod watch;

use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::Stream;
use tombolo_core::id::{Actor, NamespaceId, RegionId};
use tombolo_core::placement::shard_of_key;
use tombolo_core::token::{SessionToken, TokenKey};
use tombolo_core::vector::VersionVector;
use tombolo_proto::v1;
use tombolo_proto::v1::cluster_service_server::{ClusterService, ClusterServiceServer};
use tombolo_proto::v1::conflict_service_server::{ConflictService, ConflictServiceServer};
use tombolo_proto::v1::kv_service_server::{KvService, KvServiceServer};
use tombolo_proto::v1::namespace_service_server::{NamespaceService, NamespaceServiceServer};
use tombolo_proto::v1::region_service_server::{RegionService, RegionServiceServer};
use tombolo_proto::v1::watch_service_server::WatchServiceServer;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

pub(crate) const SHARDS: u16 = 4;
/// Where the fake's partial values go on.
pub(crate) const NEXT_ELEMENTS: Bytes = Bytes::from_static(b"next");
const CLUSTER: &str = "fake";

/// What goes wrong, once, with the next call that matches.
#[derive(Debug)]
pub(crate) enum Fault {
    /// Refuses with this and does nothing.
    Refuse(Status),
    /// Does it, then answers with this all the same.
    ApplyThen(Status),
    /// Never answers.
    Hang,
    /// Sends this many pages of a scan, then breaks the stream.
    BreakScan(usize),
}

/// One call as a node saw it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Call {
    pub(crate) node: u64,
    pub(crate) method: &'static str,
    pub(crate) key: Bytes,
    pub(crate) no_forward: bool,
    pub(crate) has_deadline: bool,
    pub(crate) request_id: Option<v1::RequestId>,
    pub(crate) token: Bytes,
    pub(crate) consistency: Option<v1::ReadConsistency>,
}

#[derive(Default)]
pub(crate) struct State {
    /// The node that leads all shards.
    pub(crate) leader: u64,
    pub(crate) term: u64,
    /// What `GetCluster` says instead.
    pub(crate) advertised: Option<u64>,
    /// Refusals name the leader.
    pub(crate) hints: bool,
    pub(crate) page_keys: usize,
    pub(crate) faults: VecDeque<(Option<u64>, &'static str, Fault)>,
    pub(crate) calls: Vec<Call>,
    pub(crate) refreshes: usize,
    pub(crate) data: BTreeMap<(String, Bytes), Vec<v1::Version>>,
    /// Keys whose values have more elements than one reply shows.
    pub(crate) partial: BTreeSet<Bytes>,
    pub(crate) namespaces: BTreeMap<String, v1::Namespace>,
    pub(crate) links: Vec<v1::Link>,
    /// What watches answer.
    pub(crate) watches: VecDeque<watch::Played>,
    /// Watches that came, by node.
    pub(crate) watched: Vec<(u64, v1::WatchRequest)>,
    /// Commits and mutations that came.
    pub(crate) commits: Vec<v1::CommitRequest>,
    pub(crate) mutations: Vec<v1::MutateRequest>,
    /// What the next writes answer as their session tokens instead.
    pub(crate) tokens: VecDeque<Bytes>,
    /// Writes applied, repeats not counted.
    pub(crate) applied: u64,
    remembered: BTreeMap<(u64, u64), v1::Dot>,
    addresses: Vec<String>,
}

/// The region; servers end with the test's runtime.
#[derive(Clone)]
pub(crate) struct Region {
    pub(crate) state: Arc<Mutex<State>>,
    pub(crate) addresses: Vec<String>,
}

impl Region {
    /// Starts nodes 1..=count; node 1 leads.
    pub(crate) async fn start(count: usize) -> Self {
        Self::start_at(&vec!["127.0.0.1:0"; count]).await
    }

    /// As [`Region::start`], with a node at each of these addresses.
    pub(crate) async fn start_at(listen: &[&str]) -> Self {
        let state = Arc::new(Mutex::new(State {
            leader: 1,
            term: 1,
            hints: true,
            page_keys: 3,
            ..State::default()
        }));
        let mut addresses = Vec::new();
        for (node, listen) in (1..).zip(listen) {
            let listener = tokio::net::TcpListener::bind(listen).await.expect("bound");
            addresses.push(listener.local_addr().expect("bound").to_string());
            let server = Node { node, state: state.clone() };
            tokio::spawn(
                tonic::transport::Server::builder()
                    .add_service(KvServiceServer::new(server.clone()))
                    .add_service(ClusterServiceServer::new(server.clone()))
                    .add_service(NamespaceServiceServer::new(server.clone()))
                    .add_service(WatchServiceServer::new(server.clone()))
                    .add_service(RegionServiceServer::new(server.clone()))
                    .add_service(ConflictServiceServer::new(server))
                    .serve_with_incoming(TcpIncoming::from(listener)),
            );
        }
        state.lock().addresses.clone_from(&addresses);
        Self { state, addresses }
    }

    /// Lists one more node, at which nobody answers.
    pub(crate) async fn add_dead_node(&self) -> u64 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let mut state = self.state.lock();
        state.addresses.push(listener.local_addr().expect("bound").to_string());
        state.addresses.len() as u64
    }

    /// The next call of `method` goes wrong, at `node` or at any.
    pub(crate) fn fail(&self, node: Option<u64>, method: &'static str, fault: Fault) {
        self.state.lock().faults.push_back((node, method, fault));
    }

    pub(crate) fn calls(&self, method: &str) -> Vec<Call> {
        let state = self.state.lock();
        state.calls.iter().filter(|call| call.method == method).cloned().collect()
    }

    pub(crate) fn put(&self, namespace: &str, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.state.lock().write(namespace, key.into(), Some(value.into()), None, true);
    }

    /// Adds a concurrent value.
    pub(crate) fn put_concurrent(
        &self,
        namespace: &str,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) {
        self.state.lock().write(namespace, key.into(), Some(value.into()), None, false);
    }

    pub(crate) fn values(&self, namespace: &str) -> Vec<(Bytes, Bytes)> {
        let state = self.state.lock();
        let mine = state.data.iter().filter(|((name, _), _)| name == namespace);
        mine.map(|((_, key), versions)| (key.clone(), data_of(&versions[0]))).collect()
    }
}

pub(crate) fn refusal(code: Code, reason: &str, metadata: &[(&str, &str)]) -> Status {
    let pairs = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let details = ErrorDetails::with_error_info(
        reason,
        "tombolo",
        pairs.collect::<std::collections::HashMap<_, _>>(),
    );
    Status::with_error_details(code, reason.to_lowercase().replace('_', " "), details)
}

pub(crate) fn data_of(version: &v1::Version) -> Bytes {
    match version.value.as_ref().and_then(|value| value.kind.as_ref()) {
        Some(v1::value::Kind::Data(data)) => data.clone(),
        _ => Bytes::new(),
    }
}

/// The token that covers write `seq` of a key.
pub(crate) fn token(key: &[u8], seq: u64) -> Bytes {
    let mut seen = VersionVector::default();
    seen.advance(Actor { region: RegionId(1), incarnation: 1 }, seq);
    let mut token = SessionToken::default();
    token.observe(NamespaceId(1), shard_of_key(key, SHARDS), &seen);
    token.encode(&TokenKey::without_secret(CLUSTER))
}

pub(crate) fn joined(tokens: &[&[u8]]) -> Bytes {
    tombolo_core::token::merge(tokens).expect("tokens of this fake")
}

impl State {
    fn write(
        &mut self,
        namespace: &str,
        key: Bytes,
        value: Option<Bytes>,
        id: Option<v1::RequestId>,
        replace: bool,
    ) -> v1::Dot {
        let id = id.map(|id| (id.client, id.number));
        if let Some(dot) = id.and_then(|id| self.remembered.get(&id)) {
            return *dot;
        }
        self.applied += 1;
        let seq = self.applied;
        let dot = v1::Dot { region: 1, incarnation: 1, seq };
        let slot = (namespace.to_owned(), key);
        match value {
            Some(data) => {
                let version = v1::Version {
                    dot: Some(dot),
                    value: Some(v1::Value {
                        kind: Some(v1::value::Kind::Data(data)),
                        ..Default::default()
                    }),
                    origin_region: "us".into(),
                    write_time: Some(prost_types::Timestamp {
                        seconds: 1_700_000_000 + seq as i64,
                        nanos: 0,
                    }),
                    hybrid_time: ((1_700_000_000 + seq) * 1000) << 16,
                    expire_time: None,
                };
                let versions = self.data.entry(slot).or_default();
                if replace {
                    versions.clear();
                }
                versions.push(version);
            }
            None => {
                self.data.remove(&slot);
            }
        }
        if let Some(id) = id {
            self.remembered.insert(id, dot);
        }
        dot
    }

    /// The token of a write's answer.
    fn token(&mut self, sent: &Bytes, key: &Bytes, dot: v1::Dot) -> Bytes {
        let instead = self.tokens.pop_front();
        instead.unwrap_or_else(|| joined(&[sent, &token(key, dot.seq)]))
    }

    fn versions(&self, namespace: &str, key: &Bytes, keys_only: bool) -> Vec<v1::Version> {
        let mut versions =
            self.data.get(&(namespace.to_owned(), key.clone())).cloned().unwrap_or_default();
        if keys_only {
            versions.iter_mut().for_each(|version| version.value = None);
        }
        versions
    }

    fn pages(
        &self,
        request: &v1::ScanRequest,
        keys: &[Bytes],
        page_keys: usize,
    ) -> Vec<Result<v1::ScanResponse, Status>> {
        let result = |key: &Bytes| v1::KeyResult {
            key: key.clone(),
            versions: self.versions(&request.namespace, key, request.keys_only),
            context: Bytes::new(),
            partial: false,
            settle_time: None,
        };
        let page = |chunk: &[Bytes], last: bool| v1::ScanResponse {
            results: chunk.iter().map(result).collect(),
            page_token: if last { Bytes::new() } else { chunk[chunk.len() - 1].clone() },
            session_token: request.session_token.clone(),
        };
        let pages = keys.len().div_ceil(page_keys);
        let chunks = keys.chunks(page_keys).enumerate();
        let mut pages: Vec<_> =
            chunks.map(|(at, chunk)| Ok(page(chunk, at + 1 == pages))).collect();
        if pages.is_empty() {
            pages.push(Ok(v1::ScanResponse::default()));
        }
        pages
    }

    fn holds(&self, namespace: &str, check: &v1::Check) -> bool {
        use v1::check::Condition;
        let versions = self.versions(namespace, &check.key, false);
        match check.condition.as_ref().expect("a condition") {
            Condition::Absent(_) => versions.is_empty(),
            Condition::Present(_) => !versions.is_empty(),
            Condition::DotEquals(dot) => versions.len() == 1 && versions[0].dot == Some(*dot),
            Condition::DataEquals(data) => versions.len() == 1 && data_of(&versions[0]) == data,
            Condition::ContextCurrent(context) => {
                let current = versions.iter().filter_map(|it| it.dot).map(|dot| dot.seq).max();
                let current = current.map_or_else(String::new, |seq| format!("context-of-{seq}"));
                *context == current.as_bytes()
            }
        }
    }

    fn node_list(&self) -> Vec<v1::Node> {
        let node = |(at, address): (usize, &String)| v1::Node {
            node_id: at as u64 + 1,
            client_address: address.clone(),
            http_address: String::new(),
            state: v1::NodeState::Up.into(),
            last_seen_seconds: 0.0,
            version: "0.1.0".into(),
            clock: v1::ClockState::Inside.into(),
            ..v1::Node::default()
        };
        self.addresses.iter().enumerate().map(node).collect()
    }
}

#[derive(Clone)]
struct Node {
    node: u64,
    state: Arc<Mutex<State>>,
}

impl Node {
    /// Logs the call, refuses what this node does not lead, and takes the fault meant for it.
    fn enter<T>(&self, request: &Request<T>, call: Call) -> Result<Option<Fault>, Status> {
        let metadata = request.metadata();
        let no_forward = metadata.get("x-tombolo-no-forward").is_some();
        let has_deadline = metadata.get("grpc-timeout").is_some();
        assert!(metadata.get("x-tombolo-client").is_some(), "the client names itself");
        let method = call.method;
        let mut state = self.state.lock();
        state.calls.push(Call { node: self.node, no_forward, has_deadline, ..call });
        let matching = state.faults.iter().position(|(node, name, _)| {
            node.is_none_or(|node| node == self.node) && *name == method
        });
        let fault = matching.and_then(|at| state.faults.remove(at)).map(|(_, _, fault)| fault);
        if let Some(Fault::Refuse(status)) = fault {
            return Err(status);
        }
        if fault.is_none() && no_forward && state.leader != self.node {
            let leader = state.addresses[state.leader as usize - 1].clone();
            let hint: &[(&str, &str)] = if state.hints { &[("leader", &leader)] } else { &[] };
            return Err(refusal(Code::Unavailable, "NOT_LEADER", hint));
        }
        Ok(fault)
    }
}

/// The sums of counters that were 0, for each operation.
fn sums(operations: &[v1::Operation]) -> Vec<Option<i64>> {
    let sum = |it: &v1::Operation| match it.action {
        Some(v1::operation::Action::CounterAdd(by)) => Some(by),
        _ => None,
    };
    operations.iter().map(sum).collect()
}

fn call(method: &'static str, key: &Bytes, token: &Bytes) -> Call {
    Call {
        node: 0,
        method,
        key: key.clone(),
        no_forward: false,
        has_deadline: false,
        request_id: None,
        token: token.clone(),
        consistency: None,
    }
}

async fn finish<T>(fault: Option<Fault>, reply: T) -> Result<Response<T>, Status> {
    match fault {
        None | Some(Fault::BreakScan(_)) => Ok(Response::new(reply)),
        Some(Fault::Refuse(status) | Fault::ApplyThen(status)) => Err(status),
        Some(Fault::Hang) => std::future::pending().await,
    }
}

#[tonic::async_trait]
impl KvService for Node {
    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        let body = request.get_ref().clone();
        let seen =
            Call { consistency: body.consistency, ..call("get", &body.key, &body.session_token) };
        let fault = self.enter(&request, seen)?;
        let (versions, is_partial) = {
            let state = self.state.lock();
            let versions = state.versions(&body.namespace, &body.key, body.keys_only);
            (versions, state.partial.contains(&body.key))
        };
        let next_element_token = if is_partial { NEXT_ELEMENTS } else { Bytes::new() };
        let seq = versions.iter().filter_map(|version| version.dot).map(|dot| dot.seq).max();
        let seen = seq.map(|seq| token(&body.key, seq)).unwrap_or_default();
        let reply = v1::GetResponse {
            context: Bytes::from(format!("context-of-{}", seq.unwrap_or(0))),
            session_token: joined(&[&body.session_token, &seen]),
            revision: Some(v1::Revision { shard: 0, term: 1, index: seq.unwrap_or(0) }),
            versions,
            next_element_token,
            settle_time: None,
        };
        finish(fault, reply).await
    }

    async fn batch_get(
        &self,
        request: Request<v1::BatchGetRequest>,
    ) -> Result<Response<v1::BatchGetResponse>, Status> {
        let body = request.get_ref().clone();
        let seen = Call {
            consistency: body.consistency,
            ..call("batch_get", &body.keys[0], &body.session_token)
        };
        let fault = self.enter(&request, seen)?;
        assert!(body.keys.len() <= 128, "at most 128 keys a batch");
        let results = {
            let state = self.state.lock();
            let result = |key: &Bytes| v1::KeyResult {
                key: key.clone(),
                versions: state.versions(&body.namespace, key, body.keys_only),
                context: Bytes::new(),
                partial: state.partial.contains(key),
                settle_time: None,
            };
            body.keys.iter().map(result).collect()
        };
        finish(fault, v1::BatchGetResponse { results, session_token: body.session_token }).await
    }

    type ScanStream = Pin<Box<dyn Stream<Item = Result<v1::ScanResponse, Status>> + Send>>;

    async fn scan(
        &self,
        request: Request<v1::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let body = request.get_ref().clone();
        let fault = self.enter(&request, call("scan", &body.start_key, &body.session_token))?;
        let (mut keys, page_keys) = {
            let state = self.state.lock();
            let wanted = |key: &Bytes| {
                key.starts_with(&body.prefix)
                    && *key >= body.start_key
                    && (body.end_key.is_empty() || *key < body.end_key)
            };
            let mine =
                state.data.keys().filter(|(name, key)| *name == body.namespace && wanted(key));
            (mine.map(|(_, key)| key.clone()).collect::<Vec<_>>(), state.page_keys)
        };
        if body.reverse {
            keys.reverse();
        }
        if !body.page_token.is_empty() {
            let at = keys.iter().position(|key| *key == body.page_token).expect("a key as token");
            keys.drain(..=at);
        }
        if body.limit > 0 {
            keys.truncate(body.limit as usize);
        }
        if let Some(Fault::Hang) = fault {
            std::future::pending::<()>().await;
        }
        let mut pages = self.state.lock().pages(&body, &keys, page_keys);
        if let Some(Fault::BreakScan(whole)) = &fault {
            pages.truncate(*whole);
            pages.push(Err(Status::unavailable("the node stops")));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(pages))))
    }

    async fn put(
        &self,
        request: Request<v1::PutRequest>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        let body = request.get_ref().clone();
        let seen =
            Call { request_id: body.request_id, ..call("put", &body.key, &body.session_token) };
        let fault = self.enter(&request, seen)?;
        if let Some(Fault::Hang) = fault {
            std::future::pending::<()>().await;
        }
        let Some(v1::value::Kind::Data(data)) = body.value.and_then(|value| value.kind) else {
            return Err(Status::unimplemented("only data"));
        };
        if data.len() > 1 << 20 {
            return Err(refusal(Code::InvalidArgument, "VALUE_TOO_LARGE", &[]));
        }
        let dot = self.state.lock().write(
            &body.namespace,
            body.key.clone(),
            Some(data),
            body.request_id,
            true,
        );
        let reply = v1::PutResponse {
            context: Bytes::from(format!("context-of-{}", dot.seq)),
            session_token: self.state.lock().token(&body.session_token, &body.key, dot),
            conflict: false,
            dot: Some(dot),
            write_time: None,
            hybrid_time: ((1_700_000_000 + dot.seq) * 1000) << 16,
            revision: Some(v1::Revision { shard: 0, term: 1, index: dot.seq }),
        };
        finish(fault, reply).await
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let body = request.get_ref().clone();
        let seen =
            Call { request_id: body.request_id, ..call("delete", &body.key, &body.session_token) };
        let fault = self.enter(&request, seen)?;
        let dot =
            self.state.lock().write(&body.namespace, body.key.clone(), None, body.request_id, true);
        let reply = v1::DeleteResponse {
            context: Bytes::from(format!("context-of-{}", dot.seq)),
            session_token: self.state.lock().token(&body.session_token, &body.key, dot),
            conflict: false,
            dot: Some(dot),
            write_time: None,
            hybrid_time: ((1_700_000_000 + dot.seq) * 1000) << 16,
            revision: Some(v1::Revision { shard: 0, term: 1, index: dot.seq }),
        };
        finish(fault, reply).await
    }

    /// Counts only: what else is asked for is logged and answered.
    async fn mutate(
        &self,
        request: Request<v1::MutateRequest>,
    ) -> Result<Response<v1::MutateResponse>, Status> {
        let body = request.get_ref().clone();
        let seen =
            Call { request_id: body.request_id, ..call("mutate", &body.key, &body.session_token) };
        let fault = self.enter(&request, seen)?;
        let reply = {
            let mut state = self.state.lock();
            state.mutations.push(body.clone());
            let v1::MutateRequest { namespace, key, operations, request_id, .. } = body;
            let value = Some(Bytes::from_static(b"typed"));
            let dot = state.write(&namespace, key.clone(), value, request_id, true);
            let sums = sums(&operations).into_iter();
            v1::MutateResponse {
                context: Bytes::from(format!("context-of-{}", dot.seq)),
                session_token: state.token(&body.session_token, &key, dot),
                dot: Some(dot),
                results: sums
                    .map(|sum| v1::OperationResult { dot: Some(dot), sum, conflict: false })
                    .collect(),
                hybrid_time: ((1_700_000_000 + dot.seq) * 1000) << 16,
                ..Default::default()
            }
        };
        finish(fault, reply).await
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        let body = request.get_ref().clone();
        let seen = Call {
            request_id: body.request_id,
            ..call(
                "commit",
                &body.writes.first().map(|w| w.key.clone()).unwrap_or_default(),
                &body.session_token,
            )
        };
        let fault = self.enter(&request, seen)?;
        let reply = {
            let mut state = self.state.lock();
            state.commits.push(body.clone());
            let failed: Vec<v1::FailedCheck> = body
                .checks
                .iter()
                .enumerate()
                .filter(|(_, check)| !state.holds(&body.namespace, check))
                .map(|(at, check)| v1::FailedCheck {
                    check: at as u32,
                    versions: state.versions(&body.namespace, &check.key, false),
                    context: Bytes::new(),
                })
                .collect();
            let mut results = Vec::new();
            if failed.is_empty() {
                for write in body.writes {
                    let (value, sum) = match write.action.expect("an action") {
                        v1::write::Action::Put(value) => match value.kind {
                            Some(v1::value::Kind::Data(data)) => (Some(data), None),
                            _ => (None, None),
                        },
                        v1::write::Action::Delete(_) => (None, None),
                        v1::write::Action::Mutate(it) => (
                            Some("typed".into()),
                            sums(&it.operations).into_iter().flatten().last(),
                        ),
                    };
                    let dot = state.write(&body.namespace, write.key, value, None, true);
                    results.push(v1::WriteResult {
                        context: Bytes::from(format!("context-of-{}", dot.seq)),
                        conflict: false,
                        dot: Some(dot),
                        hybrid_time: ((1_700_000_000 + dot.seq) * 1000) << 16,
                        sum,
                    });
                }
            }
            v1::CommitResponse {
                committed: failed.is_empty(),
                failed_checks: failed,
                session_token: body.session_token,
                results,
                revision: None,
            }
        };
        finish(fault, reply).await
    }

    async fn await_replication(
        &self,
        request: Request<v1::AwaitReplicationRequest>,
    ) -> Result<Response<v1::AwaitReplicationResponse>, Status> {
        let body = request.get_ref().clone();
        let seen = call("await_replication", &Bytes::new(), &body.session_token);
        let fault = self.enter(&request, seen)?;
        let lacking = v1::LackingRegion { region: "ap".into(), events: Some(3) };
        let reply =
            v1::AwaitReplicationResponse { regions: vec!["eu".into()], lacking: vec![lacking] };
        finish(fault, reply).await
    }
}

#[tonic::async_trait]
impl ClusterService for Node {
    async fn get_cluster(
        &self,
        _: Request<v1::GetClusterRequest>,
    ) -> Result<Response<v1::GetClusterResponse>, Status> {
        let mut state = self.state.lock();
        state.refreshes += 1;
        let leader_node_id = state.advertised.unwrap_or(state.leader);
        let term = state.term;
        let leader = |shard: u16| v1::ShardLeader { shard: u32::from(shard), leader_node_id, term };
        Ok(Response::new(v1::GetClusterResponse {
            cluster_id: CLUSTER.into(),
            region: "us".into(),
            node_id: self.node,
            version: "0.1.0".into(),
            shard_count: u32::from(SHARDS),
            nodes: state.node_list(),
            leaders: (0..SHARDS).map(leader).collect(),
            time: None,
        }))
    }

    async fn list_nodes(
        &self,
        _: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        Ok(Response::new(v1::ListNodesResponse { nodes: self.state.lock().node_list() }))
    }

    async fn list_shards(
        &self,
        _: Request<v1::ListShardsRequest>,
    ) -> Result<Response<v1::ListShardsResponse>, Status> {
        let state = self.state.lock();
        let shard = |shard: u16| v1::Shard {
            shard: u32::from(shard),
            leader_node_id: state.leader,
            term: state.term,
            commit_index: 7,
            applied_index: 7,
            ..Default::default()
        };
        Ok(Response::new(v1::ListShardsResponse { shards: (0..SHARDS).map(shard).collect() }))
    }
}

/// One value of a region that nobody else has, as in all of the fake's conflicts.
fn version(region: u32, seq: u64, value: Option<&'static str>) -> v1::Version {
    let data = |text: &'static str| v1::Value {
        kind: Some(v1::value::Kind::Data(text.into())),
        ..Default::default()
    };
    let origin_region = if region == 1 { "us" } else { "eu" }.to_owned();
    let ms = 1_700_000_000_000 + seq * 1000;
    v1::Version {
        dot: Some(v1::Dot { region, incarnation: 1, seq }),
        value: value.map(data),
        origin_region,
        hybrid_time: ms << 16,
        ..Default::default()
    }
}

/// The conflict number `number`: a value of eu, or, if it is even, a deletion, that lost to one of us.
fn conflict(number: u64, with_values: bool) -> v1::Conflict {
    let loser_is_delete = number.is_multiple_of(2);
    let at = 1_700_000_000 + i64::try_from(number).expect("small");
    v1::Conflict {
        id: format!("{number:032x}"),
        namespace: "default".into(),
        key: format!("cart-{number}").into(),
        winner: Some(version(1, number, with_values.then_some("2 lemons"))),
        loser: Some(version(2, number, (with_values && !loser_is_delete).then_some("3 lemons"))),
        resolve_time: Some(prost_types::Timestamp { seconds: at, nanos: 0 }),
        cause: v1::ConflictCause::Rule.into(),
        loser_is_delete,
        bytes: 64,
        field_path: Vec::new(),
    }
}

/// The only conflict of namespace `profiles`, whose rule is `map`: a field of `ada`.
fn conflict_of_field(with_values: bool) -> v1::Conflict {
    v1::Conflict {
        namespace: "profiles".into(),
        key: "ada".into(),
        field_path: vec!["address".into(), "home town".into()],
        ..conflict(1, with_values)
    }
}

/// The context that the fake shows with each conflict.
const SHOWN: &[u8] = b"shown";
/// How many conflicts it has.
const CONFLICTS: u64 = 3;

/// Settles if the context is the one that was shown.
fn settle(context: &Bytes) -> Result<v1::Dot, Status> {
    if context != SHOWN {
        return Err(refusal(Code::Aborted, "CONFLICT_MOVED", &[]));
    }
    Ok(v1::Dot { region: 1, incarnation: 1, seq: 9 })
}

#[tonic::async_trait]
impl ConflictService for Node {
    async fn list_conflicts(
        &self,
        request: Request<v1::ListConflictsRequest>,
    ) -> Result<Response<v1::ListConflictsResponse>, Status> {
        let request = request.into_inner();
        if request.namespace == "profiles" {
            let conflicts = vec![conflict_of_field(false)];
            return Ok(Response::new(v1::ListConflictsResponse {
                conflicts,
                ..Default::default()
            }));
        }
        let first = CONFLICTS.min(request.page_token.parse().unwrap_or(CONFLICTS));
        let size = u64::try_from(request.page_size).expect("positive").min(2);
        let is_asked =
            |number: &u64| format!("cart-{number}").as_bytes().starts_with(&request.key_prefix);
        let page = (1..=first).rev().take(size as usize);
        let conflicts: Vec<_> =
            page.filter(is_asked).map(|number| conflict(number, false)).collect();
        let left = first.saturating_sub(size);
        let next_page_token = if left == 0 { String::new() } else { left.to_string() };
        let unreachable =
            if request.origin_region == "ap" { vec!["shard 3".into()] } else { Vec::new() };
        Ok(Response::new(v1::ListConflictsResponse { conflicts, next_page_token, unreachable }))
    }

    async fn get_conflict(
        &self,
        request: Request<v1::GetConflictRequest>,
    ) -> Result<Response<v1::GetConflictResponse>, Status> {
        let v1::GetConflictRequest { namespace, id } = request.into_inner();
        if namespace == "profiles" {
            return Ok(Response::new(v1::GetConflictResponse {
                conflict: Some(conflict_of_field(true)),
                rule: v1::Rule::Map.into(),
                ..Default::default()
            }));
        }
        let number = u64::from_str_radix(&id, 16).unwrap_or(0);
        if !(1..=CONFLICTS).contains(&number) {
            return Err(refusal(Code::NotFound, "CONFLICT_NOT_FOUND", &[]));
        }
        Ok(Response::new(v1::GetConflictResponse {
            conflict: Some(conflict(number, true)),
            current: vec![version(1, number, Some("2 lemons"))],
            context: Bytes::from_static(SHOWN),
            rule: v1::Rule::Lww.into(),
            unreachable: Vec::new(),
        }))
    }

    async fn restore_conflict(
        &self,
        request: Request<v1::RestoreConflictRequest>,
    ) -> Result<Response<v1::RestoreConflictResponse>, Status> {
        let body = request.get_ref().clone();
        let request_id = body.request_id;
        let seen = Call { request_id, ..call("restore", &Bytes::new(), &Bytes::new()) };
        let fault = self.enter(&request, seen)?;
        let (dot, hybrid_time) = (Some(settle(&body.context)?), 1_700_000_009_000 << 16);
        let session_token = token(b"cart-1", 9);
        let reply =
            v1::RestoreConflictResponse { dot, hybrid_time, session_token, ..Default::default() };
        finish(fault, reply).await
    }

    async fn list_open_conflicts(
        &self,
        _: Request<v1::ListOpenConflictsRequest>,
    ) -> Result<Response<v1::ListOpenConflictsResponse>, Status> {
        let conflicts = vec![v1::OpenConflict {
            key: "cart-7".into(),
            versions: vec![version(1, 4, None), version(2, 5, None)],
            context: Bytes::from_static(SHOWN),
            since_time: Some(prost_types::Timestamp { seconds: 1_700_000_005, nanos: 0 }),
            settle_time: Some(prost_types::Timestamp { seconds: 1_700_604_805, nanos: 0 }),
        }];
        Ok(Response::new(v1::ListOpenConflictsResponse { conflicts, ..Default::default() }))
    }

    async fn resolve_conflict(
        &self,
        request: Request<v1::ResolveConflictRequest>,
    ) -> Result<Response<v1::ResolveConflictResponse>, Status> {
        let body = request.get_ref().clone();
        let request_id = body.request_id;
        let seen = Call { request_id, ..call("resolve", &body.key, &Bytes::new()) };
        let fault = self.enter(&request, seen)?;
        let (dot, hybrid_time) = (Some(settle(&body.context)?), 1_700_000_009_000 << 16);
        let session_token = token(&body.key, 9);
        let reply =
            v1::ResolveConflictResponse { dot, hybrid_time, session_token, ..Default::default() };
        finish(fault, reply).await
    }

    async fn get_conflict_stats(
        &self,
        request: Request<v1::GetConflictStatsRequest>,
    ) -> Result<Response<v1::GetConflictStatsResponse>, Status> {
        let row = |namespace: &str, count| v1::ConflictStats {
            namespace: namespace.into(),
            winner_region: "us".into(),
            loser_region: "eu".into(),
            cause: v1::ConflictCause::Rule.into(),
            count,
            bytes: 64 * count,
            oldest_time: Some(prost_types::Timestamp { seconds: 1_700_000_001, nanos: 0 }),
            newest_time: Some(prost_types::Timestamp { seconds: 1_700_000_003, nanos: 0 }),
        };
        let mut stats = vec![row("default", CONFLICTS)];
        if request.into_inner().namespace.is_empty() {
            stats.push(row("#17", 1));
        }
        Ok(Response::new(v1::GetConflictStatsResponse { stats, unreachable: Vec::new() }))
    }
}

fn joining(name: String) -> v1::Region {
    let membership = v1::Membership::Joining.into();
    v1::Region { name, membership, incarnation: 1, number: 2, ..Default::default() }
}

#[tonic::async_trait]
impl RegionService for Node {
    async fn list_regions(
        &self,
        _: Request<v1::ListRegionsRequest>,
    ) -> Result<Response<v1::ListRegionsResponse>, Status> {
        let us = v1::Region {
            name: "us".into(),
            number: 1,
            local: true,
            link_addresses: vec!["127.0.0.1:7103".into()],
            state: v1::RegionState::Up.into(),
            lag_seconds: 0.0,
            shards_with_leader: u32::from(SHARDS),
            nodes_up: 1,
            nodes: 1,
            membership: v1::Membership::Active.into(),
            incarnation: 1,
            shards_active: u32::from(SHARDS),
            ..Default::default()
        };
        let eu = v1::Region {
            name: "eu".into(),
            number: 2,
            local: false,
            link_addresses: vec!["127.0.0.1:7203".into()],
            state: v1::RegionState::Degraded.into(),
            lag_seconds: 12.5,
            membership: v1::Membership::Active.into(),
            incarnation: 1,
            ..Default::default()
        };
        Ok(Response::new(v1::ListRegionsResponse { regions: vec![us, eu], unreachable: vec![] }))
    }

    async fn get_region(
        &self,
        _: Request<v1::GetRegionRequest>,
    ) -> Result<Response<v1::GetRegionResponse>, Status> {
        Err(refusal(Code::NotFound, "REGION_NOT_FOUND", &[]))
    }

    async fn list_links(
        &self,
        _: Request<v1::ListLinksRequest>,
    ) -> Result<Response<v1::ListLinksResponse>, Status> {
        let links = self.state.lock().links.clone();
        Ok(Response::new(v1::ListLinksResponse { links, ..Default::default() }))
    }

    async fn summarize_namespace(
        &self,
        _: Request<v1::SummarizeNamespaceRequest>,
    ) -> Result<Response<v1::SummarizeNamespaceResponse>, Status> {
        let row = |shard| v1::ShardSummary {
            shard,
            node_id: 1,
            frontier: "f".into(),
            root: 0xabc + u64::from(shard),
            repairing: false,
        };
        let shards = (0..4).map(row).collect();
        Ok(Response::new(v1::SummarizeNamespaceResponse { shards, unreachable: vec![] }))
    }

    async fn list_tombstones(
        &self,
        _: Request<v1::ListTombstonesRequest>,
    ) -> Result<Response<v1::ListTombstonesResponse>, Status> {
        let row = |shard, count, waits_for: &[&str]| v1::Tombstones {
            namespace: "default".into(),
            shard,
            node_id: 1,
            count,
            waits_for_regions: waits_for.iter().map(ToString::to_string).collect(),
        };
        let tombstones = vec![row(0, 7, &["ap", "eu"]), row(1, 3, &["eu"])];
        Ok(Response::new(v1::ListTombstonesResponse { tombstones, unreachable: vec![] }))
    }

    async fn pause_link(
        &self,
        _: Request<v1::PauseLinkRequest>,
    ) -> Result<Response<v1::PauseLinkResponse>, Status> {
        Ok(Response::new(v1::PauseLinkResponse {}))
    }

    async fn resume_link(
        &self,
        _: Request<v1::ResumeLinkRequest>,
    ) -> Result<Response<v1::ResumeLinkResponse>, Status> {
        Ok(Response::new(v1::ResumeLinkResponse {}))
    }

    async fn limit_link(
        &self,
        _: Request<v1::LimitLinkRequest>,
    ) -> Result<Response<v1::LimitLinkResponse>, Status> {
        Ok(Response::new(v1::LimitLinkResponse {}))
    }

    async fn start_repair(
        &self,
        request: Request<v1::StartRepairRequest>,
    ) -> Result<Response<v1::StartRepairResponse>, Status> {
        let links = if request.into_inner().namespace.is_empty() { 8 } else { 4 };
        Ok(Response::new(v1::StartRepairResponse { links, unreachable: vec![] }))
    }

    async fn list_differences(
        &self,
        _: Request<v1::ListDifferencesRequest>,
    ) -> Result<Response<v1::ListDifferencesResponse>, Status> {
        let dot = v1::Dot { region: 1, incarnation: 1, seq: 7 };
        let key = v1::KeyDifference { key: "cart".into(), here: vec![dot], there: vec![] };
        let row = v1::ShardDifferences { shard: 1, same_point: true, keys: vec![key], more: false };
        Ok(Response::new(v1::ListDifferencesResponse { shards: vec![row], unreachable: vec![] }))
    }

    async fn add_region(
        &self,
        request: Request<v1::AddRegionRequest>,
    ) -> Result<Response<v1::AddRegionResponse>, Status> {
        let v1::AddRegionRequest { name, number, link_addresses } = request.into_inner();
        if name == "eu" {
            return Err(refusal(Code::InvalidArgument, "REGION_INVALID", &[]));
        }
        let region = Some(v1::Region { number, link_addresses, ..joining(name) });
        Ok(Response::new(v1::AddRegionResponse { region }))
    }

    async fn fence_region(
        &self,
        request: Request<v1::FenceRegionRequest>,
    ) -> Result<Response<v1::FenceRegionResponse>, Status> {
        let membership = v1::Membership::Fenced.into();
        let region = Some(v1::Region { membership, ..joining(request.into_inner().name) });
        Ok(Response::new(v1::FenceRegionResponse { region }))
    }

    async fn remove_region(
        &self,
        request: Request<v1::RemoveRegionRequest>,
    ) -> Result<Response<v1::RemoveRegionResponse>, Status> {
        let membership = v1::Membership::Removed.into();
        let region = Some(v1::Region { membership, ..joining(request.into_inner().name) });
        Ok(Response::new(v1::RemoveRegionResponse { region }))
    }

    async fn recover_region(
        &self,
        request: Request<v1::RecoverRegionRequest>,
    ) -> Result<Response<v1::RecoverRegionResponse>, Status> {
        let membership = v1::Membership::Recovering.into();
        let region =
            v1::Region { membership, incarnation: 2, ..joining(request.into_inner().name) };
        Ok(Response::new(v1::RecoverRegionResponse { region: Some(region) }))
    }

    async fn list_reviews(
        &self,
        _: Request<v1::ListReviewsRequest>,
    ) -> Result<Response<v1::ListReviewsResponse>, Status> {
        let dot = v1::Dot { region: 2, incarnation: 1, seq: 7 };
        let row = |key: &'static str, is_delete| v1::Review {
            namespace: "default".into(),
            key: key.into(),
            dot: Some(dot),
            hybrid_time: 0,
            is_delete,
            data: if is_delete { Bytes::new() } else { "v".into() },
        };
        let reviews = vec![row("cart", false), row("list", true)];
        Ok(Response::new(v1::ListReviewsResponse { reviews, unreachable: vec![] }))
    }

    async fn dismiss_reviews(
        &self,
        _: Request<v1::DismissReviewsRequest>,
    ) -> Result<Response<v1::DismissReviewsResponse>, Status> {
        Ok(Response::new(v1::DismissReviewsResponse { unreachable: vec![] }))
    }

    async fn list_at_risk(
        &self,
        _: Request<v1::ListAtRiskRequest>,
    ) -> Result<Response<v1::ListAtRiskResponse>, Status> {
        let dot = v1::Dot { region: 1, incarnation: 1, seq: 7 };
        let write = v1::AtRiskWrite {
            key: "cart".into(),
            dot: Some(dot),
            hybrid_time: 0,
            is_delete: false,
        };
        let row = v1::AtRisk {
            namespace: "default".into(),
            shard: 1,
            node_id: 1,
            count: 3,
            writes: vec![write],
            unheard_regions: vec!["ap".into()],
        };
        Ok(Response::new(v1::ListAtRiskResponse { shards: vec![row], unreachable: vec![] }))
    }
}

#[tonic::async_trait]
impl NamespaceService for Node {
    async fn create_namespace(
        &self,
        request: Request<v1::CreateNamespaceRequest>,
    ) -> Result<Response<v1::CreateNamespaceResponse>, Status> {
        let mut namespace = request.get_ref().namespace.clone().expect("a namespace");
        let name = Bytes::from(namespace.name.clone());
        let fault = self.enter(&request, call("create_namespace", &name, &Bytes::new()))?;
        {
            let mut state = self.state.lock();
            if state.namespaces.contains_key(&namespace.name) {
                return Err(refusal(Code::AlreadyExists, "NAMESPACE_EXISTS", &[]));
            }
            namespace.id = state.namespaces.len() as u32 + 2;
            namespace.etag = "e1".into();
            namespace.create_time =
                Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
            state.namespaces.insert(namespace.name.clone(), namespace.clone());
        }
        finish(fault, v1::CreateNamespaceResponse { namespace: Some(namespace) }).await
    }

    async fn get_namespace(
        &self,
        request: Request<v1::GetNamespaceRequest>,
    ) -> Result<Response<v1::GetNamespaceResponse>, Status> {
        let name = request.into_inner().name;
        match self.state.lock().namespaces.get(&name).cloned() {
            Some(namespace) => {
                Ok(Response::new(v1::GetNamespaceResponse { namespace: Some(namespace) }))
            }
            None => Err(refusal(Code::NotFound, "NAMESPACE_NOT_FOUND", &[("namespace", &name)])),
        }
    }

    async fn list_namespaces(
        &self,
        request: Request<v1::ListNamespacesRequest>,
    ) -> Result<Response<v1::ListNamespacesResponse>, Status> {
        // Two a page, whatever was asked for: pages must be followed.
        let after = request.into_inner().page_token;
        let state = self.state.lock();
        let mut rest = state.namespaces.values().filter(|it| it.name > after).cloned();
        let namespaces: Vec<_> = rest.by_ref().take(2).collect();
        let more = rest.next().is_some();
        let next_page_token = match namespaces.last() {
            Some(last) if more => last.name.clone(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListNamespacesResponse { namespaces, next_page_token }))
    }

    async fn delete_namespace(
        &self,
        request: Request<v1::DeleteNamespaceRequest>,
    ) -> Result<Response<v1::DeleteNamespaceResponse>, Status> {
        let name = request.into_inner().name;
        match self.state.lock().namespaces.remove(&name) {
            Some(_) => Ok(Response::new(v1::DeleteNamespaceResponse {})),
            None => Err(refusal(Code::NotFound, "NAMESPACE_NOT_FOUND", &[("namespace", &name)])),
        }
    }

    async fn update_namespace(
        &self,
        _: Request<v1::UpdateNamespaceRequest>,
    ) -> Result<Response<v1::UpdateNamespaceResponse>, Status> {
        Err(Status::unimplemented("not served yet"))
    }
}
