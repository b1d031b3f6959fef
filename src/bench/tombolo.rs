//! Tombolo as a target.
//!
//! Routes as the client library does: a key's shard is computed here, the call goes to the node
//! that leads it and says so, so that a wrong guess is refused and not forwarded. A put carries a
//! request id. After a refusal the leaders are looked up again, in the background.
//!
//! The connections are shared out among the leading nodes by how many shards each leads; a node
//! that leads none gets connections only if it begins to lead.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tombolo_core::placement::{SHARDS_MAX, shard_of_key};
use tombolo_proto::v1;
use tombolo_proto::v1::cluster_service_client::ClusterServiceClient;
use tombolo_proto::v1::kv_service_client::KvServiceClient;
use tombolo_proto::v1::read_consistency::Level;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use crate::args::BenchArgs;
use crate::target::{Failure, Lane, Target, endpoint, open, plain_address};

/// How long a cluster may take to elect leaders before the run.
const LEADERS_TIMEOUT: Duration = Duration::from_secs(15);
/// Least time between two questions for leaders.
const REFRESH_INTERVAL: Duration = Duration::from_millis(100);

/// Names this program to the servers.
const CLIENT: &str = concat!("tombolo-bench/", env!("CARGO_PKG_VERSION"));

/// For each shard, the index of the leading node.
type Leaders = Vec<Option<usize>>;

/// A region's view that may be older than another.
#[derive(Debug, Default)]
struct Topology {
    /// Client addresses by node number.
    nodes: BTreeMap<u64, String>,
    /// Term and node number of each shard's leader.
    leaders: Vec<(u64, Option<u64>)>,
}

pub(crate) struct Tombolo {
    namespace: String,
    /// Channels of each node.
    nodes: Vec<Vec<Channel>>,
    connections: usize,
    /// Distinguishes the request ids of this process from those of others.
    client_base: u64,
    leaders: watch::Receiver<Arc<Leaders>>,
    stale: Arc<Notify>,
    refresher: JoinHandle<()>,
}

pub(crate) struct TomboloLane {
    namespace: String,
    /// One stub a node.
    nodes: Vec<KvServiceClient<Channel>>,
    feed: watch::Receiver<Arc<Leaders>>,
    leaders: Arc<Leaders>,
    stale: Arc<Notify>,
    request: v1::RequestId,
}

/// Waits until every shard has a leader and connects to them.
pub(crate) async fn connect(args: &BenchArgs) -> anyhow::Result<Tombolo> {
    let topology = wait_for_leaders(&args.endpoints).await?;
    let numbers: Vec<u64> = topology.nodes.keys().copied().collect();
    let leaders = topology.leaders_among(&numbers);

    let mut led = vec![0; numbers.len()];
    for &node in leaders.iter().flatten() {
        led[node] += 1;
    }
    let shares = share_out(args.connections_max(), &led);
    let mut nodes = Vec::with_capacity(numbers.len());
    for (address, &share) in topology.nodes.values().zip(&shares) {
        nodes.push(match share {
            0 => vec![endpoint(address)?.connect_lazy()],
            share => open(address, share).await?,
        });
    }

    let (sender, receiver) = watch::channel(Arc::new(leaders));
    let stale = Arc::new(Notify::new());
    let refresh = refresh(topology, numbers, sender, Arc::clone(&stale));
    Ok(Tombolo {
        namespace: args.namespace.clone(),
        nodes,
        connections: shares.iter().sum(),
        client_base: rand::random::<u64>() & !u64::from(u32::MAX) | 1 << 63,
        leaders: receiver,
        stale,
        refresher: tokio::spawn(refresh),
    })
}

/// Shares `connections` out by `led`, the shards that each node leads. At least one for each node
/// that leads, none for others.
fn share_out(connections: usize, led: &[usize]) -> Vec<usize> {
    let leading = led.iter().filter(|&&led| led > 0).count();
    let mut shares: Vec<usize> = led.iter().map(|&led| usize::from(led > 0)).collect();
    for _ in leading..connections {
        // The next goes where it has most to do.
        let next = (0..led.len()).filter(|&node| led[node] > 0).max_by(|&one, &other| {
            (led[one] * shares[other], other).cmp(&(led[other] * shares[one], one))
        });
        if let Some(node) = next {
            shares[node] += 1;
        }
    }
    shares
}

/// Fails at once if nobody answers; waits if those who do know of an election.
async fn wait_for_leaders(endpoints: &[String]) -> anyhow::Result<Topology> {
    let mut topology = Topology::default();
    let deadline = Instant::now() + LEADERS_TIMEOUT;
    loop {
        topology.ask(endpoints).await?;
        if topology.is_complete() {
            return Ok(topology);
        }
        let leaderless = topology.leaders.iter().filter(|(_, leader)| leader.is_none()).count();
        ensure!(Instant::now() < deadline, "{leaderless} shards have no leader");
        tokio::time::sleep(REFRESH_INTERVAL).await;
    }
}

/// Looks the leaders up whenever a call was refused. Ends with the target.
async fn refresh(
    mut topology: Topology,
    numbers: Vec<u64>,
    leaders: watch::Sender<Arc<Leaders>>,
    stale: Arc<Notify>,
) {
    loop {
        stale.notified().await;
        let addresses: Vec<String> = topology.nodes.values().cloned().collect();
        // Nobody answers: calls fail and are counted, until somebody does.
        topology.ask(&addresses).await.ok();
        leaders.send_replace(Arc::new(topology.leaders_among(&numbers)));
        tokio::time::sleep(REFRESH_INTERVAL).await;
    }
}

impl Topology {
    /// Asks all nodes; fails if none answers.
    async fn ask(&mut self, addresses: &[String]) -> anyhow::Result<()> {
        let mut outcome = Err(anyhow::anyhow!("no endpoint given"));
        for address in addresses {
            let mut cluster = ClusterServiceClient::new(endpoint(address)?.connect_lazy());
            match cluster.get_cluster(v1::GetClusterRequest {}).await {
                Ok(reply) => outcome = self.learn(&reply.into_inner()),
                Err(status) if outcome.is_err() => {
                    outcome = Err(status).with_context(|| format!("cannot ask {address}"));
                }
                Err(_) => {}
            }
        }
        outcome
    }

    /// Takes in one node's view.
    fn learn(&mut self, reply: &v1::GetClusterResponse) -> anyhow::Result<()> {
        let shards = reply.shard_count;
        ensure!((1..=u32::from(SHARDS_MAX)).contains(&shards), "a cluster of {shards} shards");
        self.leaders.resize(shards as usize, (0, None));
        for node in reply.nodes.iter().filter(|node| !node.client_address.is_empty()) {
            let address = plain_address(&node.client_address).to_owned();
            self.nodes.insert(node.node_id, address);
        }
        for leader in &reply.leaders {
            let Some(known) = self.leaders.get_mut(leader.shard as usize) else { continue };
            let number = (leader.leader_node_id != 0).then_some(leader.leader_node_id);
            // Of two views of one term, the one that knows the leader is right.
            if known.0 < leader.term || (known.0 == leader.term && number.is_some()) {
                *known = (leader.term, number);
            }
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        let known = |leader: &(u64, Option<u64>)| {
            leader.1.is_some_and(|number| self.nodes.contains_key(&number))
        };
        !self.leaders.is_empty() && self.leaders.iter().all(known)
    }

    /// The leaders as indexes into `numbers`, which is sorted.
    fn leaders_among(&self, numbers: &[u64]) -> Leaders {
        let index = |leader: Option<u64>| numbers.binary_search(&leader?).ok();
        self.leaders.iter().map(|&(_, leader)| index(leader)).collect()
    }
}

impl Target for Tombolo {
    type Lane = TomboloLane;

    fn lane(&self, number: usize) -> TomboloLane {
        let stub = |channels: &Vec<Channel>| {
            KvServiceClient::new(channels[number % channels.len()].clone())
        };
        TomboloLane {
            namespace: self.namespace.clone(),
            nodes: self.nodes.iter().map(stub).collect(),
            leaders: Arc::clone(&self.leaders.borrow()),
            feed: self.leaders.clone(),
            stale: Arc::clone(&self.stale),
            request: v1::RequestId { client: self.client_base | number as u64, number: 0 },
        }
    }

    fn connections(&self) -> usize {
        self.connections
    }
}

impl Drop for Tombolo {
    fn drop(&mut self) {
        self.refresher.abort();
    }
}

impl TomboloLane {
    /// The stub of the node that leads the key's shard, and the request as that node wants it.
    fn route<T>(&mut self, key: &[u8], message: T) -> (&mut KvServiceClient<Channel>, Request<T>) {
        if self.feed.has_changed().unwrap_or(false) {
            self.leaders = Arc::clone(&self.feed.borrow_and_update());
        }
        let mut request = Request::new(message);
        request.metadata_mut().insert("x-tombolo-client", MetadataValue::from_static(CLIENT));
        let shard_count = u16::try_from(self.leaders.len()).unwrap_or(SHARDS_MAX);
        let shard = usize::from(shard_of_key(key, shard_count).0);
        let node = match self.leaders[shard] {
            Some(node) => {
                let metadata = request.metadata_mut();
                metadata.insert("x-tombolo-no-forward", MetadataValue::from_static("1"));
                node
            }
            None => 0,
        };
        (&mut self.nodes[node], request)
    }

    fn refused(&self, status: tonic::Status) -> Failure {
        self.stale.notify_one();
        status.into()
    }
}

impl Lane for TomboloLane {
    async fn put(&mut self, key: Bytes, value: Bytes) -> Result<(), Failure> {
        self.request.number += 1;
        let request = v1::PutRequest {
            namespace: self.namespace.clone(),
            key: key.clone(),
            value: Some(v1::Value {
                kind: Some(v1::value::Kind::Data(value)),
                ..Default::default()
            }),
            request_id: Some(self.request),
            ..v1::PutRequest::default()
        };
        let (node, request) = self.route(&key, request);
        let outcome = node.put(request).await;
        outcome.map(drop).map_err(|status| self.refused(status))
    }

    async fn get(&mut self, key: Bytes) -> Result<(), Failure> {
        let level = Some(Level::Linearizable(v1::Linearizable {}));
        let request = v1::GetRequest {
            namespace: self.namespace.clone(),
            key: key.clone(),
            consistency: Some(v1::ReadConsistency { level }),
            ..v1::GetRequest::default()
        };
        let (node, request) = self.route(&key, request);
        match node.get(request).await {
            Ok(reply) if reply.get_ref().versions.is_empty() => Err(Failure::absent()),
            Ok(_) => Ok(()),
            Err(status) => Err(self.refused(status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_the_shards_and_every_leader_has_one() {
        assert_eq!(share_out(16, &[1, 0, 0]), [16, 0, 0]);
        assert_eq!(share_out(16, &[6, 5, 5]), [6, 5, 5]);
        assert_eq!(share_out(16, &[14, 1, 1]), [14, 1, 1]);
        assert_eq!(share_out(1, &[6, 5, 5]), [1, 1, 1]);
        assert_eq!(share_out(16, &[0, 0, 0]), [0, 0, 0]);
    }

    #[test]
    fn an_older_view_never_replaces_a_newer_leader() {
        let reply = |term, leader_node_id| v1::GetClusterResponse {
            shard_count: 1,
            nodes: (1..=2)
                .map(|node_id| v1::Node {
                    node_id,
                    client_address: format!("node-{node_id}:1"),
                    ..v1::Node::default()
                })
                .collect(),
            leaders: vec![v1::ShardLeader { shard: 0, leader_node_id, term }],
            ..v1::GetClusterResponse::default()
        };
        let mut topology = Topology::default();
        assert!(!topology.is_complete());
        for (term, leader, expected) in
            [(5, 2, Some(1)), (4, 1, Some(1)), (5, 0, Some(1)), (6, 0, None)]
        {
            topology.learn(&reply(term, leader)).unwrap();
            assert_eq!(topology.leaders_among(&[1, 2]), [expected], "{term} {leader}");
        }
        assert!(!topology.is_complete());
        let nonsense = v1::GetClusterResponse { shard_count: 5000, ..Default::default() };
        assert!(topology.learn(&nonsense).is_err());
    }
}
