//! Which node to ask: connections, the cached topology, and what was learnt since.
//!
//! Sources, strongest first: a hint in a refusal, a newer term in `GetCluster`, the cache. A node
//! whose connection failed is avoided for a moment and stops counting as a leader.
//!
//! Invariants:
//! * One refresh at a time, and not more than one each [`REFRESH_INTERVAL`]: a thousand calls that
//!   fail at once ask the cluster once.
//! * A call that the client routes by knowledge says so (`no_forward`), so that a wrong guess comes
//!   back as a hint; a call to any node leaves forwarding to that node.
//!
//! Not here: whether a call may be repeated (`retry`).

use crate::config::ClientConfig;
use crate::error::{Error, Result};
use crate::retry::Backoff;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tombolo_core::placement::shard_of_key;
use tombolo_proto::v1;
use tombolo_proto::v1::cluster_service_client::ClusterServiceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

/// Least time between two refreshes of the topology.
const REFRESH_INTERVAL: Duration = Duration::from_millis(100);
/// How long a node whose connection failed is avoided while there are others.
const AVOID: Duration = Duration::from_secs(1);
/// After the first answer to a refresh, others have this long to show a newer term.
const REFRESH_LINGER: Duration = Duration::from_millis(20);
/// What a stream may hold that its caller has not read yet; bounds its memory.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// The most that the protocol allows: streams that nobody reads must never fill the window of their
/// connection, because then no other call on it would get an answer.
const CONNECTION_WINDOW_BYTES: u32 = i32::MAX as u32;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a call may go.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// The leader of this key's shard.
    LeaderOf(Bytes),
    /// The node that leads this key's shard, for a call that concerns other shards, too.
    NodeOf(Bytes),
    /// Whichever node is there.
    AnyNode,
}

/// Where one attempt goes.
pub(crate) struct Route {
    pub(crate) address: Arc<str>,
    pub(crate) channel: Channel,
    /// The client believes that this node leads the shard.
    pub(crate) no_forward: bool,
}

#[derive(Clone, Debug, Default)]
struct Leader {
    term: u64,
    address: Option<Arc<str>>,
}

#[derive(Debug, Default)]
struct State {
    /// Counts successful refreshes.
    generation: u64,
    shard_count: u16,
    /// Nodes of the region as the cluster lists them, without the seeds.
    nodes: Vec<Arc<str>>,
    leaders: Vec<Leader>,
    avoid_until: BTreeMap<Arc<str>, Instant>,
}

struct Connections {
    channels: Vec<Channel>,
    next: AtomicUsize,
}

pub(crate) struct Router {
    config: Arc<ClientConfig>,
    seeds: Vec<Arc<str>>,
    connections: Mutex<BTreeMap<Arc<str>, Arc<Connections>>>,
    state: Mutex<State>,
    /// Held during a refresh; when the last one began.
    refreshing: tokio::sync::Mutex<Option<Instant>>,
    next_node: AtomicUsize,
}

impl Router {
    /// Checks the addresses; connects to nothing yet.
    pub(crate) fn new(config: Arc<ClientConfig>) -> Result<Self> {
        let seeds = config.endpoints.iter().map(|it| checked_address(it));
        let seeds: Vec<Arc<str>> = seeds.collect::<Result<_>>()?;
        if seeds.is_empty() {
            return Err(Error::invalid("no endpoint given"));
        }
        let router = Self {
            config,
            seeds,
            connections: Mutex::default(),
            state: Mutex::default(),
            refreshing: tokio::sync::Mutex::new(None),
            next_node: AtomicUsize::new(0),
        };
        for seed in &router.seeds {
            router.channel(seed)?;
        }
        Ok(router)
    }

    /// Learns the topology for the first time, and asks again until `until` while no node answers.
    ///
    /// # Errors
    /// What became of each endpoint, if none of them answered.
    pub(crate) async fn discover(&self, until: Instant) -> Result<()> {
        let mut last = self.refreshing.lock().await;
        let mut backoff = Backoff::default();
        loop {
            *last = Some(Instant::now());
            let left = until.saturating_duration_since(Instant::now());
            let error = match self.fetch(self.patience().min(left)).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let pause = backoff.next(None);
            if !error.is_retryable() || Instant::now() + pause >= until {
                return Err(error);
            }
            tracing::debug!(%error, ?pause, "not connected yet");
            tokio::time::sleep(pause).await;
        }
    }

    /// How long a node may take to be connected and to say what it knows.
    fn patience(&self) -> Duration {
        self.config.connect_timeout * 2
    }

    /// The route of the next attempt. `hint` is a leader's address from a refusal.
    pub(crate) fn route(&self, target: &Target, hint: Option<&str>) -> Result<Route> {
        if let Some(hint) = hint {
            let address = address_of(hint);
            if let Ok(channel) = self.channel(&address) {
                return Ok(Route { address, channel, no_forward: true });
            }
        }
        let (leader, no_forward) = match target {
            Target::LeaderOf(key) => {
                let leader = self.leader_of(key);
                let known = leader.is_some();
                (leader, known)
            }
            Target::NodeOf(key) => (self.leader_of(key), false),
            Target::AnyNode => (None, false),
        };
        let address = leader.unwrap_or_else(|| self.any_node());
        let channel = self.channel(&address)?;
        Ok(Route { address, channel, no_forward })
    }

    /// The known leader of the key's shard, unless its connection failed just now.
    pub(crate) fn leader_of(&self, key: &[u8]) -> Option<Arc<str>> {
        let state = self.state.lock();
        let leader = state.leaders.get(state.shard_of(key)?)?.address.clone()?;
        (!state.avoids(&leader, Instant::now())).then_some(leader)
    }

    /// Takes in what a refusal said about the leader of the key's shard.
    pub(crate) fn learn_leader(&self, key: &[u8], leader: Option<&str>) {
        let mut state = self.state.lock();
        if let Some(shard) = state.shard_of(key)
            && let Some(known) = state.leaders.get_mut(shard)
        {
            known.address = leader.map(address_of);
        }
    }

    /// Avoids a node for a moment.
    pub(crate) fn mark_failed(&self, address: &Arc<str>) {
        let until = Instant::now() + AVOID;
        self.state.lock().avoid_until.insert(address.clone(), until);
    }

    /// Ends the avoidance of a node that answered.
    pub(crate) fn mark_answered(&self, address: &Arc<str>) {
        let mut state = self.state.lock();
        if !state.avoid_until.is_empty() {
            state.avoid_until.remove(address);
        }
    }

    /// Learns the topology anew, unless another call did so since `seen` or very lately. Failure
    /// is not an error: the cache stays.
    pub(crate) async fn refresh(&self, seen: u64) {
        let mut last = self.refreshing.lock().await;
        if self.generation() != seen || last.is_some_and(|at| at.elapsed() < REFRESH_INTERVAL) {
            return;
        }
        *last = Some(Instant::now());
        if let Err(error) = self.fetch(self.patience()).await {
            tracing::debug!(%error, "topology not refreshed");
        }
    }

    /// Whether a refresh may begin now.
    pub(crate) fn refresh_is_due(&self) -> bool {
        let last = self.refreshing.try_lock();
        last.is_ok_and(|last| last.is_none_or(|at| at.elapsed() >= REFRESH_INTERVAL))
    }

    pub(crate) fn generation(&self) -> u64 {
        self.state.lock().generation
    }

    /// Asks all known nodes side by side. The first answer suffices; others that come right after
    /// it may add a newer leader.
    async fn fetch(&self, timeout: Duration) -> Result<()> {
        let mut asked = FuturesUnordered::new();
        for address in self.known_nodes() {
            let channel = self.channel(&address)?;
            asked.push(async move {
                let mut request = Request::new(v1::GetClusterRequest {});
                request.set_timeout(timeout);
                let mut client = ClusterServiceClient::new(channel);
                let answer = tokio::time::timeout(timeout, client.get_cluster(request)).await;
                let answer = answer.unwrap_or_else(|_| Err(Status::unavailable("no answer")));
                let answer = answer.map_err(|status| Error::from_status(&status, false));
                (address, answer.map(Response::into_inner))
            });
        }
        let mut failed = Vec::new();
        loop {
            let Some((address, answer)) = asked.next().await else {
                return Err(none_answered(&failed));
            };
            match answer.and_then(|reply| self.learn(&reply)) {
                Ok(()) => break,
                Err(error) => failed.push((address, error)),
            }
        }
        let linger = async {
            while let Some((_, answer)) = asked.next().await {
                if let Ok(reply) = answer {
                    self.learn(&reply).ok();
                }
            }
        };
        tokio::time::timeout(REFRESH_LINGER, linger).await.ok();
        self.state.lock().generation += 1;
        Ok(())
    }

    /// Takes in one node's view.
    fn learn(&self, reply: &v1::GetClusterResponse) -> Result<()> {
        let shard_count = u16::try_from(reply.shard_count)
            .ok()
            .filter(|count| (1..=tombolo_core::placement::SHARDS_MAX).contains(count))
            .ok_or_else(|| Error::protocol(format!("{} shards", reply.shard_count)))?;
        let mut state = self.state.lock();
        if state.shard_count != shard_count {
            state.shard_count = shard_count;
            state.leaders = vec![Leader::default(); usize::from(shard_count)];
        }
        let addresses: BTreeMap<u64, Arc<str>> = reply
            .nodes
            .iter()
            .filter(|node| !node.client_address.is_empty())
            .map(|node| (node.node_id, address_of(&node.client_address)))
            .collect();
        for leader in &reply.leaders {
            let shard = usize::try_from(leader.shard).unwrap_or(usize::MAX);
            if let Some(known) = state.leaders.get_mut(shard)
                && known.term <= leader.term
            {
                let address = addresses.get(&leader.leader_node_id).cloned();
                // Of two views of one term, the one that knows the leader is right.
                if known.term < leader.term || address.is_some() {
                    *known = Leader { term: leader.term, address };
                }
            }
        }
        if !addresses.is_empty() {
            state.nodes = addresses.into_values().collect();
        }
        Ok(())
    }

    fn known_nodes(&self) -> Vec<Arc<str>> {
        let mut nodes = self.state.lock().nodes.clone();
        for seed in &self.seeds {
            if !nodes.contains(seed) {
                nodes.push(seed.clone());
            }
        }
        nodes
    }

    /// The next node in turn; one that is avoided only if all are.
    fn any_node(&self) -> Arc<str> {
        let nodes = self.known_nodes();
        let start = self.next_node.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let state = self.state.lock();
        let in_turn = |step: usize| &nodes[start.wrapping_add(step) % nodes.len()];
        (0..nodes.len())
            .map(in_turn)
            .find(|address| !state.avoids(address, now))
            .unwrap_or_else(|| in_turn(0))
            .clone()
    }

    fn channel(&self, address: &Arc<str>) -> Result<Channel> {
        let mut connections = self.connections.lock();
        let pool = match connections.get(address) {
            Some(pool) => pool.clone(),
            None => {
                let endpoint = self.endpoint(address)?;
                let count = self.config.connections_per_node.max(1);
                let channels = (0..count).map(|_| endpoint.connect_lazy()).collect();
                let pool = Arc::new(Connections { channels, next: AtomicUsize::new(0) });
                connections.insert(address.clone(), pool.clone());
                pool
            }
        };
        let turn = pool.next.fetch_add(1, Ordering::Relaxed) % pool.channels.len();
        Ok(pool.channels[turn].clone())
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|_| Error::invalid(format!("`{address}` is not host:port")))?;
        Ok(endpoint
            .connect_timeout(self.config.connect_timeout)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true))
    }
}

impl State {
    fn shard_of(&self, key: &[u8]) -> Option<usize> {
        (self.shard_count > 0).then(|| usize::from(shard_of_key(key, self.shard_count).0))
    }

    fn avoids(&self, address: &Arc<str>, now: Instant) -> bool {
        self.avoid_until.get(address).is_some_and(|until| now < *until)
    }
}

/// One error for all nodes: worth another try if it is for one of them.
fn none_answered(failed: &[(Arc<str>, Error)]) -> Error {
    let causes: Vec<String> =
        failed.iter().map(|(address, error)| format!("{address}: {error}")).collect();
    let code = match failed.last() {
        Some((_, last)) if !failed.iter().any(|(_, error)| error.is_retryable()) => last.code(),
        Some(_) | None => Code::Unavailable,
    };
    Error::from_status(&Status::new(code, causes.join("; ")), false)
}

/// The address of an endpoint that a person wrote.
fn checked_address(endpoint: &str) -> Result<Arc<str>> {
    let address = address_of(endpoint);
    let wrong = |what: &str| {
        Err(Error::invalid(format!("{what} in `{endpoint}`: write host:port, like 127.0.0.1:7101")))
    };
    match address.rsplit_once(':') {
        None => wrong("no port"),
        Some((host, _)) if host.starts_with('[') && !host.ends_with(']') => wrong("no port"),
        Some(("", _)) => wrong("no host"),
        Some((host, _)) if host.contains('/') => wrong("more than an address"),
        Some((_, port)) if port.parse().is_ok_and(|port: u16| port > 0) => Ok(address),
        Some(_) => wrong("no valid port"),
    }
}

fn address_of(endpoint: &str) -> Arc<str> {
    endpoint.trim().trim_start_matches("http://").trim_end_matches('/').into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(term: u64, leader: u64) -> v1::GetClusterResponse {
        let node = |node_id: u64| v1::Node {
            node_id,
            client_address: format!("node-{node_id}:1"),
            ..Default::default()
        };
        v1::GetClusterResponse {
            shard_count: 1,
            nodes: vec![node(1), node(2)],
            leaders: vec![v1::ShardLeader { shard: 0, leader_node_id: leader, term }],
            ..Default::default()
        }
    }

    fn router() -> Router {
        let endpoints = vec!["http://node-1:1/".to_owned()];
        Router::new(Arc::new(ClientConfig { endpoints, ..Default::default() })).expect("valid")
    }

    #[tokio::test]
    async fn an_older_term_never_replaces_a_newer_leader() {
        let router = router();
        router.learn(&reply(5, 2)).expect("valid");
        router.learn(&reply(4, 1)).expect("valid");
        assert_eq!(router.leader_of(b"k").as_deref(), Some("node-2:1"));
        router.learn(&reply(5, 0)).expect("valid");
        assert_eq!(router.leader_of(b"k").as_deref(), Some("node-2:1"));
        router.learn(&reply(6, 0)).expect("valid");
        assert_eq!(router.leader_of(b"k"), None);
    }

    #[tokio::test]
    async fn a_failed_node_is_avoided_until_it_answers() {
        let router = router();
        router.learn(&reply(1, 1)).expect("valid");
        let failed: Arc<str> = "node-1:1".into();
        router.mark_failed(&failed);
        assert_eq!(router.leader_of(b"k"), None);
        for _ in 0..4 {
            let route = router.route(&Target::LeaderOf("k".into()), None).expect("a node");
            assert_eq!((&*route.address, route.no_forward), ("node-2:1", false));
        }
        router.mark_answered(&failed);
        let route = router.route(&Target::LeaderOf("k".into()), None).expect("a node");
        assert_eq!((&*route.address, route.no_forward), ("node-1:1", true));
    }

    #[tokio::test]
    async fn nonsense_from_a_server_is_an_error_not_a_panic() {
        let router = router();
        for shard_count in [0, 1025, u32::MAX] {
            let reply = v1::GetClusterResponse { shard_count, ..Default::default() };
            assert!(router.learn(&reply).is_err());
        }
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_refused_with_what_is_wrong() {
        let new = |endpoint: &str| {
            let endpoints = vec![endpoint.to_owned()];
            Router::new(Arc::new(ClientConfig { endpoints, ..Default::default() }))
        };
        for (endpoint, wrong) in [
            ("127.0.0.1", "no port in `127.0.0.1`: write host:port"),
            ("http://node-1/", "no port in `http://node-1/`"),
            ("[::1]", "no port in `[::1]`"),
            (":7101", "no host in `:7101`"),
            ("node-1:", "no valid port"),
            ("node-1:0", "no valid port"),
            ("node-1:70000", "no valid port"),
            ("node-1:http", "no valid port"),
            ("not an address:1", "is not host:port"),
            ("https://node-1:1", "more than an address"),
        ] {
            let Err(error) = new(endpoint) else { panic!("{endpoint}") };
            assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
            assert!(error.to_string().contains(wrong), "{error}");
        }
        for endpoint in ["node-1:1", "http://127.0.0.1:65535/", "[::1]:7101"] {
            assert!(new(endpoint).is_ok(), "{endpoint}");
        }
    }
}
