//! All Raft groups of a node: one log, one data store, one set of connections.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::RwLock;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tombolo_core::{NodeId, ShardId};
use tombolo_proto::internal::v1::raft_service_server::RaftServiceServer;
use tombolo_raftlog::RaftLog;
use tombolo_storage::Store;

use crate::bootstrap;
use crate::config::ConsensusConfig;
use crate::group::{Failures, Group};
use crate::metrics::GroupMetrics;
use crate::network::client::{MESSAGE_BYTES_MAX, Patience, Transport};
use crate::network::faults::Faults;
use crate::network::identity::{Identities, Local};
use crate::network::server::Server;
use crate::network::snapshot::{Receiver, TRANSFERS_MAX};
use crate::purge::PurgeDriver;

/// Largest clock-independent wait for a peer to take one snapshot chunk.
const CHUNK_PATIENCE: Duration = Duration::from_secs(30);
/// Largest wait for a peer to install a snapshot that it has got in full.
const INSTALL_PATIENCE: Duration = Duration::from_secs(120);

/// Why consensus cannot start. All need an operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings contradict each other.
    #[error("{0}")]
    Config(String),
    /// What the node remembers of its peers cannot be read or written.
    #[error("the memory of peers: {0}")]
    Identity(#[source] io::Error),
    /// A replica cannot be loaded from its log and data.
    #[error("shard {shard}: {problem}")]
    Group {
        /// Which.
        shard: ShardId,
        /// What is wrong.
        #[source]
        problem: io::Error,
    },
}

/// The consensus layer of a node; clones share it.
#[derive(Clone)]
pub struct Consensus {
    inner: Arc<Inner>,
}

struct Inner {
    groups: Vec<Group>,
    server: Arc<Server>,
    store: Store,
    faults: Arc<Faults>,
    failures: Failures,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl std::fmt::Debug for Consensus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consensus")
            .field("groups", &self.inner.groups.len())
            .finish_non_exhaustive()
    }
}

impl Consensus {
    /// Loads and starts all groups. Groups that do not exist yet are created in the background
    /// once enough peers answer.
    ///
    /// Serve [`raft_service`](Self::raft_service) right after, or elections fail meanwhile.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        config: ConsensusConfig,
        log: RaftLog,
        store: Store,
    ) -> Result<Self, StartError> {
        check(&config)?;
        let failures = Failures::new();
        let report = failures.clone();
        log.on_failure(Box::new(move |problem| report.report(format!("the Raft log: {problem}"))));

        let me = config.node_id.0;
        let peers: Vec<u64> = config.members().into_iter().filter(|peer| *peer != me).collect();
        let local = Local {
            cluster_id: config.cluster_id.clone(),
            region: config.region.clone(),
            node_id: me,
            directory_id: config.directory_id.clone(),
            shard_count: u32::from(config.shard_count),
        };
        let identities = Identities::open(local, &config.state_dir, &peers);
        let identities = Arc::new(identities.map_err(StartError::Identity)?);
        let faults = Arc::new(Faults::default());
        let patience = Patience {
            connect: config.election_timeout_min,
            append: (config.election_timeout_max * 2).max(Duration::from_secs(2)),
            chunk: CHUNK_PATIENCE,
            install: INSTALL_PATIENCE,
        };
        let addresses = config
            .peers
            .iter()
            .filter(|peer| peer.node_id != config.node_id)
            .map(|peer| (peer.node_id.0, peer.raft.clone()));
        let transport = Transport::new(
            identities.clone(),
            faults.clone(),
            patience,
            Arc::new(Semaphore::new(TRANSFERS_MAX)),
            addresses,
        );
        let transport = transport.map_err(|error| StartError::Config(error.to_string()))?;
        let transport = Arc::new(transport);

        let mut groups: Vec<Group> = Vec::with_capacity(usize::from(config.shard_count));
        for number in 0..config.shard_count {
            let shard = ShardId(number);
            let group_log = log.group(u64::from(number));
            let started = Group::start(
                &config,
                shard,
                group_log,
                &store,
                transport.clone(),
                failures.clone(),
            );
            match started.await {
                Ok(group) => groups.push(group),
                Err(problem) => {
                    join_all(groups.iter().map(Group::shutdown)).await;
                    return Err(StartError::Group { shard, problem });
                }
            }
        }

        let members: BTreeMap<_, _> =
            groups.iter().map(|group| (u64::from(group.shard().0), group.member())).collect();
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let server = Arc::new(Server {
            stop: stop.clone(),
            identities,
            faults: faults.clone(),
            groups: Arc::new(RwLock::new(members)),
            receiver: Arc::new(Receiver::new(store.clone(), CHUNK_PATIENCE)),
        });
        let purge = PurgeDriver::new(&config, store.clone(), groups.clone());
        tasks.spawn(purge.run(stop.clone(), failures.clone()));
        let bootstrap = bootstrap::run(config, groups.clone(), transport, failures.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(bootstrap));
        tasks.close();
        Ok(Self { inner: Arc::new(Inner { groups, server, store, faults, failures, stop, tasks }) })
    }

    /// The group of a shard; `None` if there is no such shard.
    pub fn group(&self, shard: ShardId) -> Option<&Group> {
        self.inner.groups.get(usize::from(shard.0))
    }

    /// All groups, by shard.
    pub fn groups(&self) -> &[Group] {
        &self.inner.groups
    }

    /// The service of the Raft port. Give its server `tcp_nodelay` and a TCP or HTTP/2 keep-alive.
    pub fn raft_service(&self) -> RaftServiceServer<Server> {
        RaftServiceServer::from_arc(self.inner.server.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// A group's numbers.
    pub fn status(&self, shard: ShardId) -> Option<GroupMetrics> {
        self.group(shard).map(Group::metrics)
    }

    /// The first failure that this process cannot recover from: a dead Raft core, a log that
    /// cannot sync, a refused identity. The process must report it and exit.
    pub fn failures(&self) -> watch::Receiver<Option<String>> {
        self.inner.failures.subscribe()
    }

    /// Gives away the leadership of every group that this node leads, before it stops. Answers
    /// how many groups it still leads when `limit` is over.
    pub async fn hand_over_leadership(&self, limit: Duration) -> usize {
        let done = join_all(self.inner.groups.iter().map(|group| group.hand_over(limit))).await;
        done.into_iter().filter(|gone| !gone).count()
    }

    /// Stops all groups and flushes the data store, so that the next start replays nothing.
    /// Waiting proposals and reads are answered. Idempotent.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.wait().await;
        join_all(self.inner.groups.iter().map(Group::shutdown)).await;
        let store = self.inner.store.clone();
        match tokio::task::spawn_blocking(move || store.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last flush failed; the log has it all"),
            Err(error) => tracing::warn!(%error, "the last flush failed; the log has it all"),
        }
    }

    /// Snapshot chunks that this node has sent since its start.
    pub fn snapshot_chunks_sent(&self) -> u64 {
        self.inner.faults.chunks_sent()
    }

    /// Breaks the next snapshot transfer from this node after some chunks, once. For tests.
    #[doc(hidden)]
    pub fn break_snapshot_after(&self, chunks: u64) {
        self.inner.faults.break_transfer_after(chunks);
    }

    /// Cuts this node off from exactly these peers, in both directions. For tests.
    #[doc(hidden)]
    pub fn cut_off_from(&self, peers: &[NodeId]) {
        self.inner.faults.set(peers.iter().map(|peer| peer.0).collect::<BTreeSet<u64>>());
    }
}

fn check(config: &ConsensusConfig) -> Result<(), StartError> {
    if config.shard_count == 0 {
        return Err(StartError::Config("there must be at least one shard".to_owned()));
    }
    let mut seen = BTreeSet::new();
    for peer in &config.peers {
        if !seen.insert(peer.node_id.0) {
            return Err(StartError::Config(format!("node {} is listed twice", peer.node_id)));
        }
    }
    config.raft(0).map_err(|error| StartError::Config(error.to_string()))?;
    Ok(())
}
