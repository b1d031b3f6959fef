//! Nodes with a real log, a real data store and real sockets, each in a runtime of its own, so
//! that killing one ends its tasks and connections at once, as killing a process does.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use tombolo_consensus::{Consensus, ConsensusConfig, Group, PeerAddress, Proposed};
use tombolo_core::command::{Operation, Write};
use tombolo_core::{
    Actor, Command, Content, HybridTime, NamespaceId, NodeId, RegionId, Rule, ShardId,
};
use tombolo_raftlog::RaftLog;
use tombolo_storage::{Store, StoreConfig};
use tonic::transport::server::TcpIncoming;

/// No wait in these tests is longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const SHARD: ShardId = ShardId(0);

/// One node, running or not.
pub(crate) struct Node {
    pub(crate) id: u64,
    pub(crate) directory: PathBuf,
    running: Option<Running>,
}

struct Running {
    runtime: Runtime,
    consensus: Consensus,
    log: RaftLog,
}

/// Three nodes of one region.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
    addresses: Vec<SocketAddr>,
    change: Box<dyn Fn(&mut ConsensusConfig)>,
    clock: AtomicU64,
    _root: TempDir,
}

impl Cluster {
    /// Starts three nodes; `change` adjusts each node's settings.
    pub(crate) async fn start(change: impl Fn(&mut ConsensusConfig) + 'static) -> Self {
        let root = tempfile::tempdir().unwrap();
        let addresses = (0..3).map(|_| free_address()).collect();
        let nodes = (1..=3).map(|id| Node {
            id,
            directory: root.path().join(id.to_string()),
            running: None,
        });
        let mut cluster = Self {
            nodes: nodes.collect(),
            addresses,
            change: Box::new(change),
            clock: AtomicU64::new(1),
            _root: root,
        };
        for id in 1..=3 {
            cluster.restart(id).await;
        }
        cluster
    }

    /// A node's settings.
    pub(crate) fn config(&self, id: u64) -> ConsensusConfig {
        let node = self.node(id);
        let directory_id = format!("directory-{}", node.directory.display()).replace('/', "-");
        let mut config = ConsensusConfig::new("test", "us", NodeId(id), &directory_id);
        config.shard_count = 2;
        config.state_dir = node.directory.join("state");
        config.peers = (1..)
            .zip(&self.addresses)
            .map(|(id, address)| PeerAddress { node_id: NodeId(id), raft: address.to_string() })
            .collect();
        (self.change)(&mut config);
        config
    }

    /// Starts a node that is not running.
    pub(crate) async fn restart(&mut self, id: u64) {
        let config = self.config(id);
        let address = self.addresses[usize::try_from(id).unwrap() - 1];
        let directory = self.node(id).directory.clone();
        let running =
            tokio::task::spawn_blocking(move || Running::start(&directory, address, config));
        self.node_mut(id).running = Some(running.await.unwrap());
    }

    /// Ends a node without any farewell.
    pub(crate) async fn kill(&mut self, id: u64) {
        let running = self.node_mut(id).running.take().unwrap();
        tokio::task::spawn_blocking(move || running.kill()).await.unwrap();
    }

    pub(crate) fn node(&self, id: u64) -> &Node {
        self.nodes.iter().find(|node| node.id == id).unwrap()
    }

    pub(crate) fn node_mut(&mut self, id: u64) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.id == id).unwrap()
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.running.is_some())
    }

    /// Waits until some running node proves that it leads shard 0.
    pub(crate) async fn leader(&self) -> u64 {
        let deadline = Instant::now() + LIMIT;
        loop {
            for node in self.running() {
                let barrier = node.group().read_barrier();
                let barrier = tokio::time::timeout(Duration::from_millis(500), barrier).await;
                if matches!(barrier, Ok(Ok(_))) {
                    return node.id;
                }
            }
            assert!(Instant::now() < deadline, "no leader");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Writes through whoever leads, and repeats until acknowledged.
    pub(crate) async fn put(&self, key: &str, value: &[u8]) -> Proposed {
        let command = self.write(key, value);
        let deadline = Instant::now() + LIMIT;
        loop {
            for node in self.running() {
                let proposal = node.group().propose(command.clone());
                let answer = tokio::time::timeout(Duration::from_secs(3), proposal).await;
                if let Ok(Ok(proposed)) = answer {
                    return proposed;
                }
            }
            assert!(Instant::now() < deadline, "no write in time");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// An encoded write that supersedes all earlier ones of its key.
    pub(crate) fn write(&self, key: &str, value: &[u8]) -> Bytes {
        let time = HybridTime::new(self.clock.fetch_add(1, Ordering::Relaxed), 0).unwrap();
        Command::Write(Write {
            namespace: NamespaceId::DEFAULT,
            rule: Rule::Lww,
            actor: Actor { region: RegionId(1), incarnation: 1 },
            time,
            request: None,
            checks: Vec::new(),
            operations: vec![Operation {
                key: Bytes::copy_from_slice(key.as_bytes()),
                content: Content::value(Bytes::copy_from_slice(value)),
                context: None,
            }],
            mutations: Vec::new(),
        })
        .to_bytes()
    }

    /// Waits until all running nodes have applied the same, and at least `index`.
    pub(crate) async fn converged(&self, index: u64) {
        for node in self.running() {
            let mut applied = node.group().applied();
            let reached = applied.wait_for(|applied| index <= *applied);
            let reached = tokio::time::timeout(LIMIT, reached).await;
            assert!(matches!(reached, Ok(Ok(_))), "node {} did not apply {index}", node.id);
        }
    }
}

impl Node {
    pub(crate) fn consensus(&self) -> &Consensus {
        &self.running.as_ref().unwrap().consensus
    }

    /// Shard 0.
    pub(crate) fn group(&self) -> &Group {
        self.consensus().group(SHARD).unwrap()
    }

    /// The value that this node holds.
    pub(crate) fn value(&self, key: &str) -> Option<Bytes> {
        let record = self.group().store().record(NamespaceId::DEFAULT, key.as_bytes()).unwrap()?;
        record.live_at(HybridTime::ZERO).next().map(|(_, value)| value.clone())
    }

    /// Waits for something that this node's numbers must come to show.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        mut check: impl FnMut(&Self) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(found) = check(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "node {}: {what}", self.id);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Running {
    fn start(directory: &Path, address: SocketAddr, config: ConsensusConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let log_config = tombolo_raftlog::Config {
            segment_bytes: 4 << 20,
            cache_bytes: 4 << 20,
            spare_segments: 1,
        };
        let store_config = StoreConfig { block_cache_bytes: 4 << 20, memtable_bytes: 8 << 20 };
        std::fs::create_dir_all(directory).unwrap();
        let (log, _) = RaftLog::open(&directory.join("log"), log_config).unwrap();
        let store = Store::open(&directory.join("data"), store_config).unwrap();
        let consensus = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind(address).await.unwrap();
            let consensus = Consensus::start(config, log.clone(), store).await.unwrap();
            let server = tonic::transport::Server::builder().add_service(consensus.raft_service());
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            tokio::spawn(server.serve_with_incoming(incoming));
            consensus
        });
        Self { runtime, consensus, log }
    }

    fn kill(self) {
        drop(self.consensus);
        self.runtime.shutdown_timeout(Duration::from_secs(10));
        self.log.close();
    }
}

impl Drop for Cluster {
    /// Runtimes may not be dropped inside one.
    fn drop(&mut self) {
        let running: Vec<_> =
            self.nodes.iter_mut().filter_map(|node| node.running.take()).collect();
        let ended = std::thread::spawn(move || running.into_iter().for_each(Running::kill));
        assert!(ended.join().is_ok() || std::thread::panicking());
    }
}

/// On a host of this process: connections go out from 127.0.0.1 and so take none of its ports.
fn free_address() -> SocketAddr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let host = std::net::Ipv4Addr::new(127, high + 1, middle, low);
    let listener = std::net::TcpListener::bind((host, 0)).unwrap();
    listener.local_addr().unwrap()
}
