//! The metrics of one node and the text that `GET /metrics` answers.
//!
//! One registry per node, not per process, so that several nodes in one process do not mix. Parts
//! of the node hand over plain numbers: counters and gauges of storage, Raft and links are read
//! when somebody scrapes ([`Metrics::on_scrape`]), requests are counted as they pass
//! ([`Metrics::rpc`]).
//!
//! Invariants:
//! * Names are API: every metric is described once, in [`ALL`], and `docs/operate/metrics.md` is
//!   made from it.
//! * Labels come from fixed sets (methods, codes, reasons, shard numbers, region names), never from
//!   keys, values or request ids. The node's own region and id are the scraper's labels.
//! * Base units: seconds and bytes.

use crate::metrics_process::ProcessMetrics;
use crate::reason::{Reason, code_name};
use parking_lot::{Mutex, RwLock};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tombolo_replication::RepairCounts;
use tonic::Code;

/// `Content-Type` of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the request duration buckets, in seconds.
const DURATION_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram,
    Info,
}

/// The public description of a metric.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// As it is scraped, `_total` and `_info` included.
    pub name: &'static str,
    pub kind: MetricKind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

impl Description {
    /// Without the suffix, which the encoder appends.
    fn registered_name(&self) -> &'static str {
        match self.kind {
            MetricKind::Counter => self.name.trim_end_matches("_total"),
            MetricKind::Info => self.name.trim_end_matches("_info"),
            MetricKind::Gauge | MetricKind::Histogram => self.name,
        }
    }
}

macro_rules! descriptions {
    ($($id:ident $kind:ident $name:literal [$($label:literal),*] $help:literal)*) => {
        $(const $id: Description = Description {
            name: $name,
            kind: MetricKind::$kind,
            labels: &[$($label),*],
            help: $help,
        };)*

        /// Every metric, in the order of the reference page.
        pub const ALL: &[Description] = &[$($id),*];
    };
}

descriptions! {
    RPC_REQUESTS Counter "tombolo_rpc_requests_total" ["method", "code", "reason"]
        "Requests answered, by gRPC code and reason (empty when OK)"
    RPC_DURATION Histogram "tombolo_rpc_duration_seconds" ["method"]
        "Time from a request's arrival to its answer; streams: to their end"
    RPC_IN_FLIGHT Gauge "tombolo_rpc_in_flight" ["method"]
        "Requests being worked on"
    RAFT_IS_LEADER Gauge "tombolo_raft_is_leader" ["shard"]
        "1 when this node leads the shard"
    RAFT_TERM Gauge "tombolo_raft_term" ["shard"]
        "Raft term this node is in"
    RAFT_COMMIT_LAG Gauge "tombolo_raft_commit_lag_entries" ["shard"]
        "Log entries known to be committed and not yet applied here"
    RAFT_LEADER_CHANGES Counter "tombolo_raft_leader_changes_total" ["shard"]
        "Leader changes seen by this node since it started"
    LINK_UP Gauge "tombolo_link_up" ["peer_region"]
        "1 when changes flow to and from the region"
    REPLICATION_LAG Gauge "tombolo_replication_lag_seconds" ["peer_region"]
        "Age of the oldest local write that the region has not confirmed; 0 when there is none"
    REPLICATION_BACKLOG Gauge "tombolo_replication_backlog_ops" ["peer_region"]
        "Local writes that the region has not confirmed"
    REPLICATION_SENT Counter "tombolo_replication_sent_bytes_total" ["peer_region"]
        "Bytes of changes sent to the region"
    REPLICATION_RECEIVED Counter "tombolo_replication_received_bytes_total" ["peer_region"]
        "Bytes of changes received from the region"
    REPLICATION_BACKLOG_BYTES Gauge "tombolo_replication_backlog_bytes" ["peer_region"]
        "Bytes of the change log that the region has not confirmed"
    REPAIRS Counter "tombolo_repairs_total" ["peer_region", "result"]
        "Repairs from the region: caught_up, equal, damage or failed"
    REPAIR_RECORDS Counter "tombolo_repair_records_total" ["peer_region"]
        "Records that repairs from the region changed"
    REPAIR_EXCHANGED Counter "tombolo_repair_exchanged_bytes_total" ["peer_region"]
        "Bytes sent and received by repairs from the region and comparisons with it"
    TOMBSTONES Gauge "tombolo_tombstones" []
        "Deletions kept until every region has them, in shards that this node leads"
    LEDGER_ENTRIES Gauge "tombolo_ledger_entries" []
        "Conflicts in the ledger, in shards that this node leads"
    LEDGER_BYTES Gauge "tombolo_ledger_bytes" []
        "Size of the ledger, in shards that this node leads"
    LEDGER_OLDEST Gauge "tombolo_ledger_oldest_seconds" []
        "Time since the oldest conflict in the ledger was noted, in shards that this node leads"
    LEDGER_FORGOTTEN Counter "tombolo_ledger_forgotten_total" ["reason"]
        "Conflicts that this node, as a leader, let the ledger forget: for their age, or for its size"
    RAFT_LOG_SYNCS Counter "tombolo_raft_log_syncs_total" []
        "Times the Raft log was synced to disk"
    RAFT_LOG_WRITTEN Counter "tombolo_raft_log_written_bytes_total" []
        "Bytes appended to the Raft log"
    RAFT_LOG_DISK Gauge "tombolo_raft_log_disk_bytes" []
        "Size of the Raft log's files"
    ROCKSDB_SST Gauge "tombolo_rocksdb_sst_bytes" []
        "Size of the table files in use"
    ROCKSDB_MEMTABLES Gauge "tombolo_rocksdb_memtable_bytes" []
        "Size of the write buffers"
    ROCKSDB_CACHE Gauge "tombolo_rocksdb_block_cache_bytes" []
        "Memory used by the block cache"
    ROCKSDB_CACHE_HITS Counter "tombolo_rocksdb_block_cache_hits_total" []
        "Blocks found in the block cache"
    ROCKSDB_CACHE_MISSES Counter "tombolo_rocksdb_block_cache_misses_total" []
        "Blocks read from files"
    ROCKSDB_PENDING Gauge "tombolo_rocksdb_compaction_pending_bytes" []
        "Estimate of the bytes that compaction still has to rewrite"
    ROCKSDB_COMPACTIONS Gauge "tombolo_rocksdb_running_compactions" []
        "Compactions at work"
    ROCKSDB_FLUSHES Gauge "tombolo_rocksdb_running_flushes" []
        "Flushes at work"
    ROCKSDB_STOPPED Gauge "tombolo_rocksdb_write_stopped" []
        "1 while RocksDB refuses writes because compaction is behind"
    SCRUB_RECORDS Counter "tombolo_scrub_records_total" []
        "Records read by scrubbing"
    SCRUB_DAMAGED Counter "tombolo_scrub_damaged_total" []
        "Times scrubbing found a namespace of a shard damaged"
    WATCHERS Gauge "tombolo_watchers" []
        "Watchers that this node serves"
    WATCH_EVENTS Counter "tombolo_watch_events_total" []
        "Events sent to watchers, checkpoints included"
    WATCH_RESETS Counter "tombolo_watch_resets_total" []
        "Times a watcher was told that what it had of a shard no longer counts"
    WATCH_ENDS Counter "tombolo_watch_ends_total" ["reason"]
        "Watches that ended, by reason (empty when the watcher went away)"
    DISK_FREE Gauge "tombolo_disk_free_bytes" []
        "Space that the node may still use on its data directory's file system"
    DISK_SHORT Gauge "tombolo_disk_short" []
        "1 while writes are refused because the disk is nearly full"
    CLOCK_OFFSET Gauge "tombolo_clock_offset_seconds" ["node"]
        "How far a node's clock is ahead of those of most of the region's, as this node sees it"
    CLOCK_OUTSIDE Gauge "tombolo_clock_outside" ["node"]
        "1 while a node's clock is beyond clock.max_offset of most, so that it must not lead"
    CLOCK_REFUSED Counter "tombolo_clock_refused_total" []
        "Writes refused because this node led and its clock was not known to be right"
    HLC_REJECTED Counter "tombolo_hlc_rejected_total" ["peer_region"]
        "Changes of the region whose time was too far ahead to be believed"
    HLC_AHEAD Gauge "tombolo_hlc_ahead_seconds" ["peer_region"]
        "How far ahead the region stamps, if that is beyond clock.max_offset; else 0"
    PROCESS_CPU Counter "process_cpu_seconds_total" []
        "User and system CPU time of the process"
    PROCESS_RSS Gauge "process_resident_memory_bytes" []
        "Resident memory of the process"
    PROCESS_VIRTUAL Gauge "process_virtual_memory_bytes" []
        "Virtual memory of the process"
    PROCESS_FDS Gauge "process_open_fds" []
        "Open file descriptors of the process"
    PROCESS_MAX_FDS Gauge "process_max_fds" []
        "Limit on open file descriptors"
    PROCESS_START Gauge "process_start_time_seconds" []
        "Start of the process, in seconds since the Unix epoch"
    BUILD Info "tombolo_build_info" ["version"]
        "Always 1; its labels describe the binary"
}

/// What one shard's Raft group reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RaftNumbers {
    pub is_leader: bool,
    pub term: u64,
    pub commit_lag_entries: u64,
    /// Since the process started.
    pub leader_changes: u64,
}

/// What the link to one region reports.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkNumbers {
    pub up: bool,
    pub lag_seconds: f64,
    pub backlog_ops: u64,
    /// Since the process started.
    pub sent_bytes: u64,
    /// Since the process started.
    pub received_bytes: u64,
    pub backlog_bytes: u64,
    pub repairs: RepairCounts,
}

/// What the node's Raft log reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RaftLogNumbers {
    /// Since the process started.
    pub syncs: u64,
    /// Since the process started.
    pub written_bytes: u64,
    pub disk_bytes: u64,
}

/// What the ledgers report, over all namespaces of the shards that this node leads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LedgerNumbers {
    pub entries: u64,
    pub bytes: u64,
    pub oldest_seconds: f64,
    /// Since the process started.
    pub forgotten_for_age: u64,
    /// Since the process started.
    pub forgotten_for_size: u64,
}

/// What the node's RocksDB reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RocksNumbers {
    pub sst_bytes: u64,
    pub memtable_bytes: u64,
    pub block_cache_bytes: u64,
    /// Since the process started.
    pub block_cache_hits: u64,
    /// Since the process started.
    pub block_cache_misses: u64,
    pub compaction_pending_bytes: u64,
    pub running_compactions: u64,
    pub running_flushes: u64,
    pub write_stopped: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByAnswer {
    method: &'static str,
    code: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByMethod {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByShard {
    shard: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByNode {
    node: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPeer {
    peer_region: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    peer_region: String,
    result: &'static str,
}

/// A gauge that takes any `u64`; the library's default gauge is signed.
pub(crate) type GaugeU64 = Gauge<u64, AtomicU64>;
pub(crate) type GaugeF64 = Gauge<f64, AtomicU64>;
type Hook = Arc<dyn Fn(&Metrics) + Send + Sync>;
type Histograms = Family<ByMethod, Histogram, fn() -> Histogram>;

/// The metrics of one node. Share it in an `Arc`.
pub struct Metrics {
    registry: Mutex<Registry>,
    hooks: RwLock<Vec<Hook>>,
    rpc_requests: Family<ByAnswer, Counter>,
    rpc_duration: Histograms,
    rpc_in_flight: Family<ByMethod, Gauge>,
    raft_is_leader: Family<ByShard, GaugeU64>,
    raft_term: Family<ByShard, GaugeU64>,
    raft_commit_lag: Family<ByShard, GaugeU64>,
    raft_leader_changes: Family<ByShard, Counter>,
    link_up: Family<ByPeer, GaugeU64>,
    replication_lag: Family<ByPeer, GaugeF64>,
    replication_backlog: Family<ByPeer, GaugeU64>,
    replication_sent: Family<ByPeer, Counter>,
    replication_received: Family<ByPeer, Counter>,
    replication_backlog_bytes: Family<ByPeer, GaugeU64>,
    repairs: Family<ByResult, Counter>,
    repair_records: Family<ByPeer, Counter>,
    repair_exchanged: Family<ByPeer, Counter>,
    raft_log_syncs: Counter,
    raft_log_written: Counter,
    raft_log_disk: GaugeU64,
    rocksdb_sst: GaugeU64,
    rocksdb_memtables: GaugeU64,
    rocksdb_cache: GaugeU64,
    rocksdb_cache_hits: Counter,
    rocksdb_cache_misses: Counter,
    rocksdb_pending: GaugeU64,
    rocksdb_compactions: GaugeU64,
    rocksdb_flushes: GaugeU64,
    rocksdb_stopped: GaugeU64,
    tombstones: GaugeU64,
    ledger_entries: GaugeU64,
    ledger_bytes: GaugeU64,
    ledger_oldest: GaugeF64,
    ledger_forgotten: Family<ByReason, Counter>,
    scrub_records: Counter,
    scrub_damaged: Counter,
    watchers: GaugeU64,
    watch_events: Counter,
    watch_resets: Counter,
    watch_ends: Family<ByReason, Counter>,
    disk_free: GaugeU64,
    disk_short: GaugeU64,
    clock_offset: Family<ByNode, GaugeF64>,
    clock_outside: Family<ByNode, GaugeU64>,
    clock_refused: Counter,
    hlc_rejected: Family<ByPeer, Counter>,
    hlc_ahead: Family<ByPeer, GaugeF64>,
    process: ProcessMetrics,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let r = &mut registry;
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        r.register(BUILD.registered_name(), BUILD.help, build);
        let duration: fn() -> Histogram = || Histogram::new(DURATION_BUCKETS);
        Self {
            hooks: RwLock::default(),
            rpc_requests: register(r, &RPC_REQUESTS),
            rpc_duration: register_as(r, &RPC_DURATION, Family::new_with_constructor(duration)),
            rpc_in_flight: register(r, &RPC_IN_FLIGHT),
            raft_is_leader: register(r, &RAFT_IS_LEADER),
            raft_term: register(r, &RAFT_TERM),
            raft_commit_lag: register(r, &RAFT_COMMIT_LAG),
            raft_leader_changes: register(r, &RAFT_LEADER_CHANGES),
            link_up: register(r, &LINK_UP),
            replication_lag: register(r, &REPLICATION_LAG),
            replication_backlog: register(r, &REPLICATION_BACKLOG),
            replication_sent: register(r, &REPLICATION_SENT),
            replication_received: register(r, &REPLICATION_RECEIVED),
            replication_backlog_bytes: register(r, &REPLICATION_BACKLOG_BYTES),
            repairs: register(r, &REPAIRS),
            repair_records: register(r, &REPAIR_RECORDS),
            repair_exchanged: register(r, &REPAIR_EXCHANGED),
            raft_log_syncs: register(r, &RAFT_LOG_SYNCS),
            raft_log_written: register(r, &RAFT_LOG_WRITTEN),
            raft_log_disk: register(r, &RAFT_LOG_DISK),
            rocksdb_sst: register(r, &ROCKSDB_SST),
            rocksdb_memtables: register(r, &ROCKSDB_MEMTABLES),
            rocksdb_cache: register(r, &ROCKSDB_CACHE),
            rocksdb_cache_hits: register(r, &ROCKSDB_CACHE_HITS),
            rocksdb_cache_misses: register(r, &ROCKSDB_CACHE_MISSES),
            rocksdb_pending: register(r, &ROCKSDB_PENDING),
            rocksdb_compactions: register(r, &ROCKSDB_COMPACTIONS),
            rocksdb_flushes: register(r, &ROCKSDB_FLUSHES),
            rocksdb_stopped: register(r, &ROCKSDB_STOPPED),
            tombstones: register(r, &TOMBSTONES),
            ledger_entries: register(r, &LEDGER_ENTRIES),
            ledger_bytes: register(r, &LEDGER_BYTES),
            ledger_oldest: register(r, &LEDGER_OLDEST),
            ledger_forgotten: register(r, &LEDGER_FORGOTTEN),
            scrub_records: register(r, &SCRUB_RECORDS),
            scrub_damaged: register(r, &SCRUB_DAMAGED),
            watchers: register(r, &WATCHERS),
            watch_events: register(r, &WATCH_EVENTS),
            watch_resets: register(r, &WATCH_RESETS),
            watch_ends: register(r, &WATCH_ENDS),
            disk_free: register(r, &DISK_FREE),
            disk_short: register(r, &DISK_SHORT),
            clock_offset: register(r, &CLOCK_OFFSET),
            clock_outside: register(r, &CLOCK_OUTSIDE),
            clock_refused: register(r, &CLOCK_REFUSED),
            hlc_rejected: register(r, &HLC_REJECTED),
            hlc_ahead: register(r, &HLC_AHEAD),
            process: ProcessMetrics {
                cpu: register(r, &PROCESS_CPU),
                resident: register(r, &PROCESS_RSS),
                virtual_memory: register(r, &PROCESS_VIRTUAL),
                fds: register(r, &PROCESS_FDS),
                max_fds: register(r, &PROCESS_MAX_FDS),
                start: register(r, &PROCESS_START),
            },
            registry: Mutex::new(registry),
        }
    }

    /// Adds a function that refreshes numbers before each scrape. It runs on the scraping task, so
    /// it must not block; it may not keep the `Metrics` alive.
    pub fn on_scrape(&self, hook: Box<dyn Fn(&Self) + Send + Sync>) {
        self.hooks.write().push(hook.into());
    }

    /// The whole registry in the OpenMetrics text format, refreshed.
    pub fn render(&self) -> String {
        // Copied, so that a hook may add a hook.
        let hooks = self.hooks.read().clone();
        for hook in hooks {
            hook(self);
        }
        self.process.refresh();
        let mut out = String::new();
        // Writing to a string cannot fail, and no metric here has a failing encoder.
        match text::encode(&mut out, &self.registry.lock()) {
            Ok(()) => out,
            Err(std::fmt::Error) => String::from("# EOF\n"),
        }
    }

    /// Counts a request from now until the guard is finished or dropped.
    ///
    /// `method` is static because it becomes a label: pass `other` for methods not known.
    pub fn rpc(self: &Arc<Self>, method: &'static str) -> RpcGuard {
        self.rpc_in_flight.get_or_create(&ByMethod { method }).inc();
        RpcGuard { metrics: Arc::clone(self), method, started: Instant::now(), answer: None }
    }

    pub(crate) fn watch_began(&self) {
        self.watchers.inc();
    }

    /// `reason` is none when the watcher went away.
    pub(crate) fn watch_ended(&self, reason: Option<Reason>) {
        self.watchers.dec();
        let reason = reason.map_or("", Reason::as_str);
        self.watch_ends.get_or_create(&ByReason { reason }).inc();
    }

    pub(crate) fn watch_sent(&self, events: usize) {
        self.watch_events.inc_by(events as u64);
    }

    pub(crate) fn watch_reset(&self) {
        self.watch_resets.inc();
    }

    pub fn set_raft(&self, shard: u32, numbers: &RaftNumbers) {
        let labels = ByShard { shard };
        self.raft_is_leader.get_or_create(&labels).set(numbers.is_leader.into());
        self.raft_term.get_or_create(&labels).set(numbers.term);
        self.raft_commit_lag.get_or_create(&labels).set(numbers.commit_lag_entries);
        raise(&self.raft_leader_changes.get_or_create(&labels), numbers.leader_changes);
    }

    pub fn set_link(&self, peer_region: &str, numbers: &LinkNumbers) {
        let labels = ByPeer { peer_region: peer_region.to_owned() };
        self.link_up.get_or_create(&labels).set(numbers.up.into());
        self.replication_lag.get_or_create(&labels).set(numbers.lag_seconds);
        self.replication_backlog.get_or_create(&labels).set(numbers.backlog_ops);
        raise(&self.replication_sent.get_or_create(&labels), numbers.sent_bytes);
        raise(&self.replication_received.get_or_create(&labels), numbers.received_bytes);
        self.replication_backlog_bytes.get_or_create(&labels).set(numbers.backlog_bytes);
        let repairs = &numbers.repairs;
        raise(&self.repair_records.get_or_create(&labels), repairs.records);
        raise(&self.repair_exchanged.get_or_create(&labels), repairs.exchanged_bytes);
        for (result, count) in [
            ("caught_up", repairs.caught_up),
            ("equal", repairs.equal),
            ("damage", repairs.damage),
            ("failed", repairs.failed),
        ] {
            let labels = ByResult { peer_region: peer_region.to_owned(), result };
            raise(&self.repairs.get_or_create(&labels), count);
        }
    }

    pub fn set_disk(&self, free_bytes: u64, is_short: bool) {
        self.disk_free.set(free_bytes);
        self.disk_short.set(is_short.into());
    }

    /// `refused`: since the process started.
    pub fn set_clock_refused(&self, refused: u64) {
        raise(&self.clock_refused, refused);
    }

    pub fn set_node_clock(&self, node: u64, offset_seconds: f64, is_outside: bool) {
        let labels = ByNode { node };
        self.clock_offset.get_or_create(&labels).set(offset_seconds);
        self.clock_outside.get_or_create(&labels).set(is_outside.into());
    }

    /// `rejected`: since the process started.
    pub fn set_region_clock(&self, peer_region: &str, rejected: u64, ahead_seconds: f64) {
        let labels = ByPeer { peer_region: peer_region.to_owned() };
        raise(&self.hlc_rejected.get_or_create(&labels), rejected);
        self.hlc_ahead.get_or_create(&labels).set(ahead_seconds);
    }

    pub fn set_scrubbed(&self, records: u64, damaged: u64) {
        raise(&self.scrub_records, records);
        raise(&self.scrub_damaged, damaged);
    }

    pub fn set_tombstones(&self, count: u64) {
        self.tombstones.set(count);
    }

    pub fn set_ledger(&self, numbers: &LedgerNumbers) {
        self.ledger_entries.set(numbers.entries);
        self.ledger_bytes.set(numbers.bytes);
        self.ledger_oldest.set(numbers.oldest_seconds);
        let forgotten = [("age", numbers.forgotten_for_age), ("size", numbers.forgotten_for_size)];
        for (reason, count) in forgotten {
            raise(&self.ledger_forgotten.get_or_create(&ByReason { reason }), count);
        }
    }

    pub fn set_raft_log(&self, numbers: &RaftLogNumbers) {
        raise(&self.raft_log_syncs, numbers.syncs);
        raise(&self.raft_log_written, numbers.written_bytes);
        self.raft_log_disk.set(numbers.disk_bytes);
    }

    pub fn set_rocksdb(&self, numbers: &RocksNumbers) {
        self.rocksdb_sst.set(numbers.sst_bytes);
        self.rocksdb_memtables.set(numbers.memtable_bytes);
        self.rocksdb_cache.set(numbers.block_cache_bytes);
        raise(&self.rocksdb_cache_hits, numbers.block_cache_hits);
        raise(&self.rocksdb_cache_misses, numbers.block_cache_misses);
        self.rocksdb_pending.set(numbers.compaction_pending_bytes);
        self.rocksdb_compactions.set(numbers.running_compactions);
        self.rocksdb_flushes.set(numbers.running_flushes);
        self.rocksdb_stopped.set(numbers.write_stopped.into());
    }
}

/// Lifts a counter to a total that is counted elsewhere. A smaller total changes nothing, since
/// counters never fall.
fn raise(counter: &Counter, total: u64) {
    counter.inner().fetch_max(total, Ordering::Relaxed);
}

fn register<M: Metric + Default + Clone>(registry: &mut Registry, about: &Description) -> M {
    register_as(registry, about, M::default())
}

fn register_as<M: Metric + Clone>(registry: &mut Registry, about: &Description, metric: M) -> M {
    registry.register(about.registered_name(), about.help, metric.clone());
    metric
}

/// A request being counted. Dropped without an answer, it counts as `CANCELLED`: that is what
/// becomes of a request whose client went away.
pub struct RpcGuard {
    metrics: Arc<Metrics>,
    method: &'static str,
    started: Instant,
    answer: Option<(Code, Option<Reason>)>,
}

impl RpcGuard {
    /// Counts the answer.
    pub fn finish(mut self, code: Code, reason: Option<Reason>) {
        self.answer = Some((code, reason));
    }

    /// Counts the answer that `result` is.
    pub fn finish_with<T>(self, result: &Result<T, tonic::Status>) {
        match result {
            Ok(_) => self.finish(Code::Ok, None),
            Err(status) => self.finish(status.code(), Reason::of(status)),
        }
    }

    /// Time since the request came.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for RpcGuard {
    fn drop(&mut self) {
        let (code, reason) = self.answer.unwrap_or((Code::Cancelled, None));
        let (method, code) = (self.method, code_name(code));
        let reason = reason.map_or("", Reason::as_str);
        let metrics = &self.metrics;
        metrics.rpc_in_flight.get_or_create(&ByMethod { method }).dec();
        metrics.rpc_requests.get_or_create(&ByAnswer { method, code, reason }).inc();
        let seconds = self.started.elapsed().as_secs_f64();
        metrics.rpc_duration.get_or_create(&ByMethod { method }).observe(seconds);
    }
}

/// The reference page `docs/operate/metrics.md`.
pub fn render_markdown() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         <!-- Made from src/service/metrics.rs; update with: UPDATE=1 cargo test --test errors -->\n\n\
         `GET /metrics` on the HTTP port answers in the OpenMetrics text format. Names are part of\n\
         the API: some may be added, none is renamed without an announcement. The series carry no\n\
         label for the node itself; add region and node in the scrape configuration.\n\n\
         | Metric | Type | Labels | Meaning |\n\
         |---|---|---|---|\n",
    );
    for metric in ALL {
        let kind = match metric.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
            MetricKind::Info => "info",
        };
        let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, labels, help) = (metric.name, labels.join(", "), metric.help);
        out += &format!("| `{name}` | {kind} | {labels} | {help}. |\n");
    }
    out
}
