//! A node: starts every part in order, stops them in reverse.
//!
//! Order of start: ports (so that a port in use is found before any data is touched), Raft log
//! and data store, Raft groups, shards, services. Order of stop (SIGTERM): not ready → leadership
//! handed over → new requests refused → streams and links ended → ports closed → groups, store
//! and log closed. Each step is bounded; a second signal stops at once.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tombolo_cluster::{Node as NodeEntry, Region, Regions, Topology};
use tombolo_consensus::{Consensus, ConsensusConfig, PeerAddress};
use tombolo_core::{NodeId, RegionId, ShardId};
use tombolo_raftlog::{Identity, RaftLog};
use tombolo_replication::{LinkServer, Links, ReplicationConfig};
use tombolo_service::{
    Admission, AdmissionLayer, CatalogWriter, ClockWatch, ClusterApi, ConflictApi, Gateway, KvApi,
    Limits, NamespaceApi, NodeApi, NodeChannels, RegionApi, WatchApi, WatchConfig, http,
    metrics::Metrics,
};
use tombolo_shard::{
    Clock, CollectConfig, Collector, Headroom, Scrubber, Shard, Shards, WatchHub, follow_regions,
};
use tombolo_storage::{Store, StoreConfig};
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    clock_offset::{self, OffsetFile},
    cluster_key::token_key,
    config::Config,
    scrape::Sources,
    telemetry::Telemetry,
};

/// How often readiness is looked at for the gRPC health service.
const HEALTH_INTERVAL: Duration = Duration::from_millis(500);
/// How often the free disk space is looked at.
const DISK_INTERVAL: Duration = Duration::from_secs(2);
/// Bounds on the last steps of a stop, after the drain.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Calls of one client connection at a time. A watch is one for as long as it lasts, and the usual 200
/// would let a few hundred of them hold up all other calls of their connection.
const CLIENT_STREAMS_MAX: u32 = 1 << 16;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs a node until a signal or a fault stops it.
///
/// # Errors
/// In words for an operator: what is wrong, where, and what to do.
pub async fn run(config: Config, telemetry: Telemetry) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let set_filter =
        move |directives: &str| telemetry.set_filter(directives).map_err(|error| error.to_string());
    let node = tokio::select! {
        node = Node::start(&config, Box::new(set_filter)) => node?,
        () = signals.next() => return Ok(()),
    };
    tracing::info!(
        cluster = %config.cluster_id,
        region = %config.region,
        node = config.node_id,
        shards = config.shards,
        client = %config.listen.client,
        version = env!("CARGO_PKG_VERSION"),
        "node started"
    );
    let mut failures = node.consensus.failures();
    let failure = tokio::select! {
        () = signals.next() => None,
        failed = failures.wait_for(Option::is_some) => {
            Some(failed.ok().and_then(|failed| failed.clone()).unwrap_or_default())
        }
    };
    if let Some(failure) = failure {
        // Going on with a dead group would look healthy from outside: end, and be restarted.
        bail!("a part of the node failed and it must stop: {failure}");
    }
    tokio::select! {
        () = node.stop(&config) => tracing::info!("node stopped"),
        () = signals.next() => tracing::warn!("second signal: stopping at once"),
    }
    Ok(())
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        Ok(Self { terminate, interrupt })
    }

    /// Waits for the next signal. Cancellation safe.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// The bound ports.
struct Ports {
    client: TcpListener,
    raft: TcpListener,
    link: TcpListener,
    http: TcpListener,
}

impl Ports {
    async fn bind(config: &Config) -> anyhow::Result<Self> {
        let bind = async |key: &str, address: &str| {
            TcpListener::bind(address).await.with_context(|| {
                format!(
                    "cannot listen on {address} (listen.{key}): another process may have the port, \
                     or the address is not this machine's"
                )
            })
        };
        let listen = &config.listen;
        Ok(Self {
            client: bind("client", &listen.client).await?,
            raft: bind("raft", &listen.raft).await?,
            link: bind("link", &listen.link).await?,
            http: bind("http", &listen.http).await?,
        })
    }
}

/// The opened data directory.
struct Disk {
    log: RaftLog,
    store: Store,
    identity: Identity,
}

impl Disk {
    fn open(config: &Config) -> anyhow::Result<Self> {
        let dir = &config.data_dir;
        let is_new = !dir.exists();
        fs::create_dir_all(dir)
            .with_context(|| format!("cannot create the data directory {}", dir.display()))?;
        if let (true, Some(parent)) = (is_new, dir.parent()) {
            sync_directory(parent)?;
        }
        let log_config = tombolo_raftlog::Config {
            segment_bytes: config.raft_log.segment_bytes,
            cache_bytes: config.raft_log.cache_bytes as u64,
            ..tombolo_raftlog::Config::default()
        };
        let (log, recovery) = RaftLog::open(&dir.join("raft"), log_config).with_context(|| {
            format!("cannot open the Raft log in {}", dir.join("raft").display())
        })?;
        tracing::info!(
            entries = recovery.entries,
            segments = recovery.segments,
            torn_tail_bytes = recovery.torn_tail_bytes,
            seconds = recovery.took.as_secs_f64(),
            "Raft log opened"
        );
        let identity = own_identity(config, &log, dir)?;
        let store_config = StoreConfig {
            block_cache_bytes: config.storage.block_cache_bytes,
            memtable_bytes: config.storage.memtable_bytes,
        };
        let data = dir.join("data");
        let store = Store::open(&data, store_config)
            .with_context(|| format!("cannot open the data store in {}", data.display()))?;
        store
            .claim(&identity.directory_id)
            .context("the data store and the Raft log do not belong together")?;
        sync_directory(dir)?;
        Ok(Self { log, store, identity })
    }
}

/// Makes what was created in a directory survive a power loss.
fn sync_directory(dir: &Path) -> anyhow::Result<()> {
    // The parent of a relative path may be the empty path.
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let synced = fs::File::open(dir).and_then(|dir| dir.sync_all());
    synced.with_context(|| format!("cannot sync the directory {}", dir.display()))
}

/// The identity of the data directory: made at the first start, checked at every later one.
fn own_identity(config: &Config, log: &RaftLog, dir: &Path) -> anyhow::Result<Identity> {
    let Some(found) = log.identity() else {
        let identity = Identity {
            cluster_id: config.cluster_id.clone(),
            region: config.region.clone(),
            node_id: config.node_id,
            directory_id: uuid::Uuid::new_v4().to_string(),
            incarnation: 1,
            shard_count: u32::from(config.shards),
        };
        log.set_identity(identity.clone()).context("writing the node's identity")?;
        return Ok(identity);
    };
    let differs = |what: &str, here: &str, there: &str| {
        format!(
            "the data directory {} belongs to {what} `{there}`, and the configuration says \
             `{here}`: correct the configuration, or choose another data_dir",
            dir.display()
        )
    };
    if found.cluster_id != config.cluster_id {
        bail!(differs("cluster", &config.cluster_id, &found.cluster_id));
    }
    if found.region != config.region {
        bail!(differs("region", &config.region, &found.region));
    }
    if found.node_id != config.node_id {
        bail!(differs("node", &config.node_id.to_string(), &found.node_id.to_string()));
    }
    if found.shard_count != u32::from(config.shards) {
        bail!(
            "the data directory {} was created with {} shards and the configuration says {}: the \
             number is fixed when a cluster is created",
            dir.display(),
            found.shard_count,
            config.shards
        );
    }
    Ok(found)
}

fn topology(config: &Config) -> anyhow::Result<Topology> {
    let region_id = |name: &str| {
        let found = config.regions.iter().find(|region| region.name == name);
        let found = found.with_context(|| format!("region `{name}` is not in [[regions]]"))?;
        Ok::<_, anyhow::Error>(RegionId(found.number))
    };
    let regions = config
        .regions
        .iter()
        .map(|region| Region {
            id: RegionId(region.number),
            name: region.name.clone(),
            link_addresses: region.link.clone(),
            said: None,
        })
        .collect();
    let mut nodes: Vec<NodeEntry> = config
        .nodes
        .iter()
        .map(|node| NodeEntry {
            id: NodeId(node.id),
            client: node.client.clone(),
            raft: node.raft.clone(),
            link: node.link.clone(),
            http: node.http.clone(),
        })
        .collect();
    nodes.sort_by_key(|node| node.id);
    Ok(Topology {
        cluster_id: config.cluster_id.clone(),
        region: region_id(&config.region)?,
        region_name: config.region.clone(),
        joins: config.join,
        node: NodeId(config.node_id),
        shard_count: config.shards,
        regions: Regions::new(regions),
        nodes,
        catalog_home: region_id(&config.catalog.home)?,
    })
}

/// Whether a region has data that it did not get by joining: what `join` says is over then.
fn has_lived(store: &Store, topology: &Topology) -> anyhow::Result<bool> {
    for number in 0..topology.shard_count {
        let id = ShardId(number);
        let shard = store.shard(id).with_context(|| format!("cannot open shard {id}"))?;
        let has_joined = shard.members().said(topology.region).is_some();
        if !has_joined && !shard.frontiers().is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn consensus_config(config: &Config, identity: &Identity) -> ConsensusConfig {
    let node_id = NodeId(config.node_id);
    let defaults =
        ConsensusConfig::new(&config.cluster_id, &config.region, node_id, &identity.directory_id);
    let peer = |node: &crate::config::Node| PeerAddress {
        node_id: NodeId(node.id),
        raft: node.raft.clone(),
    };
    ConsensusConfig {
        shard_count: config.shards,
        peers: config.nodes.iter().map(peer).collect(),
        state_dir: config.data_dir.join("peers"),
        heartbeat_interval: config.raft.heartbeat_interval,
        election_timeout_min: config.raft.election_timeout_min,
        election_timeout_max: config.raft.election_timeout_max,
        lease_reads: config.raft.lease_reads,
        retain_bytes: config.raft_log.retain_bytes,
        flush_interval: config.storage.flush_interval,
        flush_log_bytes: config.storage.flush_log_bytes,
        ..defaults
    }
}

fn replication_config(config: &Config) -> ReplicationConfig {
    ReplicationConfig {
        batch_bytes_max: config.replication.max_batch_bytes,
        in_flight_bytes_max: config.replication.in_flight_bytes,
        relay_after: config.replication.relay_after,
        retry_min: config.replication.retry_min,
        retry_max: config.replication.retry_max,
        watchdog: config.replication.watchdog,
        repair_interval: config.replication.repair_interval,
        repair_bytes_per_second: config.replication.repair_bytes_per_second,
        ..ReplicationConfig::default()
    }
}

fn collect_config(config: &Config) -> CollectConfig {
    CollectConfig {
        change_log_bytes: config.replication.change_log_bytes,
        ledger_retention: config.ledger.retention,
        ledger_bytes: config.ledger.bytes,
        history_bytes: config.watch.history_bytes,
        ..CollectConfig::default()
    }
}

fn watch_config(config: &Config) -> WatchConfig {
    WatchConfig {
        stall_timeout: config.watch.stall_timeout,
        watchers_max: config.watch.max_watchers,
        message_bytes_max: config.limits.max_message_bytes,
    }
}

/// Replaces the process's log filter.
pub type SetLogFilter = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// A running node. Several may run in one process, each with a configuration of its own.
pub struct Node {
    consensus: Consensus,
    log: RaftLog,
    clock: Arc<Clock>,
    checks: Arc<http::Checks>,
    admission: Arc<Admission>,
    /// Ends streams, links and background tasks.
    stop_streams: CancellationToken,
    /// Closes the ports.
    stop_ports: CancellationToken,
    tasks: TaskTracker,
}

impl Node {
    /// Starts every part.
    ///
    /// # Errors
    /// In words for an operator: a port in use, a data directory of another node, damaged data.
    pub async fn start(config: &Config, set_log_filter: SetLogFilter) -> anyhow::Result<Self> {
        let tokens = token_key(config)?;
        let variable = std::env::var_os(clock_offset::VARIABLE).map(PathBuf::from);
        let clock_offset = OffsetFile::of(config, variable)?;
        let ports = Ports::bind(config).await?;
        let Disk { log, store, identity } = Disk::open(config)?;
        let mut topology = topology(config)?;
        topology.joins = config.join && !has_lived(&store, &topology)?;
        let topology = Arc::new(topology);
        let consensus =
            Consensus::start(consensus_config(config, &identity), log.clone(), store.clone())
                .await
                .context("cannot start the Raft groups")?;
        let (own, nodes) = (topology.node, topology.nodes.len());
        let clock = Arc::new(Clock::new(own, nodes, config.clock.max_offset));
        let headroom = Arc::new(Headroom::new(config.storage.reserve_bytes));
        look_at_disk(&store, &headroom);
        let shards = shards_of(&consensus, &store, &clock, &headroom, &topology)?;
        let (stop_streams, stop_ports) = (CancellationToken::new(), CancellationToken::new());
        let tasks = TaskTracker::new();
        if let Some((file, offset_ms)) = clock_offset {
            clock.set_offset_ms(offset_ms);
            tasks.spawn(file.follow(Arc::clone(&clock), offset_ms, stop_ports.clone()));
        }

        let collector = Collector::new(shards.clone(), collect_config(config));
        let scrubber = Scrubber::new(shards.clone(), config.storage.scrub_interval);
        let links = Links::new(shards.clone(), replication_config(config));
        let (statuses, link_channels) = (links.statuses(), links.channels());
        let comparer = links.comparer();
        let metrics = Arc::new(Metrics::new());
        let sources = Sources {
            consensus: consensus.clone(),
            shards: shards.clone(),
            store: store.clone(),
            log: log.clone(),
            links: Arc::clone(&statuses),
            headroom: Arc::clone(&headroom),
            scrubbed: scrubber.counts(),
            collected: collector.counts(),
            segment_bytes: config.raft_log.segment_bytes,
        };
        metrics.on_scrape(Box::new(move |metrics| sources.refresh(metrics)));
        let checks = Arc::new(http::Checks::default());
        add_checks(&checks, &consensus, &log);
        let admission = Admission::new(Arc::clone(&metrics), config.limits.max_in_flight);
        let limits = Limits {
            value_bytes_max: config.limits.max_value_bytes,
            default_deadline: config.limits.default_deadline,
        };
        let gateway = Gateway::new(
            shards.clone(),
            NodeChannels::default(),
            limits,
            tokens,
            identity.directory_id.clone(),
        );

        // Raft first: elections need it.
        let raft = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
            .add_service(consensus.raft_service())
            .add_service(NodeApi::new(Arc::clone(&gateway)).into_service());
        serve(&tasks, "raft", raft, ports.raft, &stop_ports);
        tasks.spawn(ClockWatch::new(Arc::clone(&gateway)).run(stop_streams.clone()));

        let link_server = LinkServer::new(
            shards.clone(),
            replication_config(config),
            Arc::clone(&statuses),
            Arc::new(CatalogWriter::new(Arc::clone(&gateway))),
            stop_streams.clone(),
            tasks.clone(),
        );
        let link = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
            .add_service(link_server.into_service());
        serve(&tasks, "link", link, ports.link, &stop_ports);

        let hub = WatchHub::new();
        let watch = WatchApi::new(
            Arc::clone(&gateway),
            Arc::clone(&hub),
            watch_config(config),
            Arc::clone(&metrics),
            stop_streams.clone(),
            tasks.clone(),
        );
        let (health, health_service) = tonic_health::server::health_reporter();
        let message_bytes_max = config.limits.max_message_bytes;
        let client = Server::builder()
            .layer(AdmissionLayer(Arc::clone(&admission)))
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(Some(CLIENT_STREAMS_MAX))
            .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
            .add_service(KvApi::new(Arc::clone(&gateway)).into_service(message_bytes_max))
            .add_service(watch.into_service())
            .add_service(ConflictApi::new(Arc::clone(&gateway)).into_service(message_bytes_max))
            .add_service(ClusterApi::new(Arc::clone(&gateway), Arc::clone(&checks)).into_service())
            .add_service(RegionApi::new(Arc::clone(&gateway), statuses, comparer).into_service())
            .add_service(NamespaceApi::new(Arc::clone(&gateway), link_channels).into_service())
            .add_service(health_service)
            .add_service(reflection_v1()?)
            .add_service(reflection_v1alpha()?);
        serve(&tasks, "client", client, ports.client, &stop_ports);

        let state = http::HttpState {
            metrics,
            checks: Arc::clone(&checks),
            log_filter: Arc::new(http::LogFilter::new(config.log.filter.clone(), set_log_filter)),
        };
        let stop = stop_ports.clone();
        tasks.spawn(async move {
            if let Err(error) = http::serve(ports.http, http::router(state), stop).await {
                tracing::error!(%error, "the http port failed");
            }
        });

        tasks.spawn(links.run(stop_streams.clone()));
        tasks.spawn(collector.run(stop_streams.clone()));
        tasks.spawn(follow_regions(shards.clone(), stop_streams.clone()));
        tasks.spawn(hub.run(shards.clone(), stop_streams.clone()));
        let stop = stop_streams.clone();
        tasks.spawn(async move { shards.follow_catalog(stop).await });
        tasks.spawn(scrubber.run(stop_streams.clone()));
        tasks.spawn(watch_disk(store, headroom, stop_streams.clone()));
        tasks.spawn(report_health(health, Arc::clone(&checks), stop_ports.clone()));
        Ok(Self { consensus, log, clock, checks, admission, stop_streams, stop_ports, tasks })
    }

    /// This node's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Gives away the leadership of every shard that this node leads. Answers how many it still leads
    /// when `limit` is over.
    pub async fn hand_over(&self, limit: Duration) -> usize {
        self.consensus.hand_over_leadership(limit).await
    }

    /// Whether this node can serve clients.
    pub fn is_ready(&self) -> bool {
        self.checks.is_ready()
    }

    /// Stops in order: hands leadership over, ends streams, closes. Bounded by the configuration.
    pub async fn stop(self, config: &Config) {
        tracing::info!(timeout = ?config.drain.timeout, "draining");
        self.checks.start_drain();
        tokio::time::sleep(config.drain.initial_wait).await;
        let left = self.consensus.hand_over_leadership(config.drain.timeout).await;
        if left > 0 {
            tracing::warn!(shards = left, "no other node took over in time");
        }
        self.admission.start_drain();
        self.stop_streams.cancel();
        self.stop_ports.cancel();
        self.tasks.close();
        // Ends the peers' append streams too, which would keep the raft port open.
        if tokio::time::timeout(CLOSE_TIMEOUT, self.consensus.shutdown()).await.is_err() {
            tracing::warn!("the Raft groups did not stop in time");
        }
        if tokio::time::timeout(config.drain.timeout, self.tasks.wait()).await.is_err() {
            tracing::warn!("some streams did not end in time");
        }
        let log = self.log;
        let closed = tokio::task::spawn_blocking(move || log.close());
        if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
            tracing::warn!("closing the log took too long; it recovers at the next start");
        }
    }
}

fn shards_of(
    consensus: &Consensus,
    store: &Store,
    clock: &Arc<Clock>,
    headroom: &Arc<Headroom>,
    topology: &Arc<Topology>,
) -> anyhow::Result<Shards> {
    let mut shards = Vec::with_capacity(usize::from(topology.shard_count));
    for number in 0..topology.shard_count {
        let id = ShardId(number);
        let group = consensus.group(id).with_context(|| format!("shard {id} has no Raft group"))?;
        let data = store.shard(id).with_context(|| format!("cannot open shard {id}"))?;
        shards.push(Shard::new(
            id,
            group.clone(),
            data,
            Arc::clone(clock),
            Arc::clone(headroom),
            Arc::clone(topology),
        ));
    }
    Ok(Shards::new(shards, Arc::clone(topology)))
}

/// What makes a node ready. Other regions never count: a cut link must not take a region out of
/// its own load balancer.
fn add_checks(checks: &http::Checks, consensus: &Consensus, log: &RaftLog) {
    let groups = consensus.clone();
    checks.add(
        "raft",
        Box::new(move || {
            let without: Vec<String> = groups
                .groups()
                .iter()
                .filter(|group| group.leadership().borrow().leader.is_none())
                .map(|group| group.shard().to_string())
                .collect();
            if without.is_empty() {
                return Ok(());
            }
            Err(format!("no leader known for shards {}", without.join(", ")))
        }),
    );
    let groups = consensus.clone();
    checks.add(
        "replicas",
        Box::new(move || {
            match groups.groups().iter().find_map(tombolo_consensus::Group::failure) {
                None => Ok(()),
                Some(failure) => Err(failure),
            }
        }),
    );
    let log = log.clone();
    checks.add("log", Box::new(move || log.failed().map_or(Ok(()), Err)));
}

/// Serves a gRPC port until `stop` fires. Streams are ended by their own tasks before that.
fn serve<L>(
    tasks: &TaskTracker,
    port: &'static str,
    router: tonic::transport::server::Router<L>,
    listener: TcpListener,
    stop: &CancellationToken,
) where
    L: tower::Layer<tonic::service::Routes> + Clone + Send + 'static,
    L::Service: tower::Service<
            tonic::codegen::http::Request<tonic::body::Body>,
            Response = tonic::codegen::http::Response<tonic::body::Body>,
        > + Clone
        + Send
        + 'static,
    <L::Service as tower::Service<tonic::codegen::http::Request<tonic::body::Body>>>::Future:
        Send + 'static,
    <L::Service as tower::Service<tonic::codegen::http::Request<tonic::body::Body>>>::Error:
        Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let stopped = stop.clone().cancelled_owned();
    tasks.spawn(async move {
        if let Err(error) = router.serve_with_incoming_shutdown(incoming, stopped).await {
            tracing::error!(%error, port, "a port failed");
        }
    });
}

type ReflectionError = tonic_reflection::server::Error;

fn reflection_v1() -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<
        impl tonic_reflection::server::v1::ServerReflection,
    >,
    ReflectionError,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tombolo_proto::v1::FILE_DESCRIPTOR_SET)
        .build_v1()
}

fn reflection_v1alpha() -> Result<
    tonic_reflection::server::v1alpha::ServerReflectionServer<
        impl tonic_reflection::server::v1alpha::ServerReflection,
    >,
    ReflectionError,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tombolo_proto::v1::FILE_DESCRIPTOR_SET)
        .build_v1alpha()
}

fn look_at_disk(store: &Store, headroom: &Headroom) {
    match store.disk_free_bytes() {
        Ok(free) => headroom.observe(free),
        Err(error) => tracing::warn!(%error, "the free disk space cannot be read"),
    }
}

/// Keeps an eye on the free space, so that writes are refused before the disk is full.
async fn watch_disk(store: Store, headroom: Arc<Headroom>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(DISK_INTERVAL);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        look_at_disk(&store, &headroom);
    }
}

/// Keeps the gRPC health service in step with readiness: `""` and `KvService` are this node.
async fn report_health(
    reporter: tonic_health::server::HealthReporter,
    checks: Arc<http::Checks>,
    stop: CancellationToken,
) {
    let (ready, _) = watch::channel(false);
    let mut ticks = tokio::time::interval(HEALTH_INTERVAL);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let is_ready = checks.is_ready();
        if ready.send_replace(is_ready) == is_ready && is_ready {
            continue;
        }
        let status = if is_ready {
            tonic_health::ServingStatus::Serving
        } else {
            tonic_health::ServingStatus::NotServing
        };
        for service in ["", "tombolo.v1.KvService"] {
            reporter.set_service_status(service, status).await;
        }
    }
}
