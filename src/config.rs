//! The configuration of one server: what `tombolo server --config FILE` needs to know.
//!
//! The tree below is plain data: no handles, safe to log and to clone. It is only made by
//! [`Config::load`], so whoever holds a `Config` holds a checked one. Five layers, each overriding
//! the one before: defaults, TOML file, environment (`TOMBOLO__SECTION__KEY`), `--set
//! section.key=value`, named flags. Every value remembers the layer it came from ([`Origin`]).
//!
//! Invariants:
//! * Each key, its default, its bounds and its help text are written once, in [`KEYS`]; the
//!   example file and `docs/operate/config.md` are made from it.
//! * An unknown key is an error in every layer, never ignored.
//! * All problems are reported at once, each with its place and what to do about it.
//!
//! Not here: settings that may change while the cluster runs (namespaces; they are replicated),
//! and starting anything.

// Sibling files and not a folder, because a folder of `src/` is a crate of its own.
#[path = "config_check.rs"]
mod check;
#[path = "config_keys.rs"]
mod keys;
#[path = "config_load.rs"]
mod load;

use serde::Deserialize;
use std::path::PathBuf;
use std::time::Duration;

pub use check::Problem;
pub use keys::{KEYS, Key, Kind, Preset, render_markdown};
pub use load::{ConfigError, FlagValue, Loaded, Origin, process_env};

/// Everything one server is told at its start.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster this node belongs to; nodes of different clusters refuse to talk.
    pub cluster_id: String,
    /// Seals the tokens that clients carry; the same on every node of every region.
    #[serde(default)]
    pub cluster_key: Option<Secret>,
    /// Holds that key instead in its first line, and the accepted one in its second.
    #[serde(default)]
    pub cluster_key_file: Option<PathBuf>,
    /// Tokens sealed with this one are accepted too, while the key is being changed.
    #[serde(default)]
    pub accepted_cluster_key: Option<Secret>,
    /// The region of this node; one of [`Config::regions`].
    pub region: String,
    /// Unique in its region and never reused, not even after the node was removed.
    pub node_id: u64,
    /// Where the node keeps its data. Created at the first start.
    pub data_dir: PathBuf,
    /// Number of Raft groups in the region, 1..=1024. Fixed at the first start.
    pub shards: u16,
    /// The region comes to a cluster that has data already, and takes no writes before it has it.
    pub join: bool,
    /// The addresses this process binds.
    pub listen: Listen,
    /// All nodes of this region, this one included.
    pub nodes: Vec<Node>,
    /// All regions of the cluster, this one included; the same (name, number) pairs everywhere.
    pub regions: Vec<Region>,
    pub catalog: Catalog,
    pub raft: Raft,
    pub raft_log: RaftLog,
    pub storage: Storage,
    pub replication: Replication,
    pub ledger: Ledger,
    pub watch: Watch,
    pub limits: Limits,
    pub drain: Drain,
    pub log: Log,
    pub clock: Clock,
}

impl Config {
    /// This node's entry in [`Config::nodes`].
    ///
    /// `None` only for a `Config` that was changed after it was loaded.
    pub fn own_node(&self) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == self.node_id)
    }

    /// This node's region in [`Config::regions`].
    ///
    /// `None` only for a `Config` that was changed after it was loaded.
    pub fn own_region(&self) -> Option<&Region> {
        self.regions.iter().find(|region| region.name == self.region)
    }

    /// A commented TOML file with every key; required keys are set, the others show their default.
    pub fn example() -> String {
        keys::render_example()
    }
}

/// A text that is not shown: not in logs, and not by `config show`.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

/// Addresses to bind, `host:port` each; port 0 lets the system choose.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// gRPC for clients.
    pub client: String,
    /// Raft between the nodes of the region.
    pub raft: String,
    /// Replication from and to other regions.
    pub link: String,
    /// `/livez`, `/readyz`, `/metrics`, `/admin`.
    pub http: String,
}

/// One node of this region, by the addresses others reach it at (`host:port` each).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    pub id: u64,
    pub client: String,
    pub raft: String,
    pub link: String,
    pub http: String,
}

/// One region of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    pub name: String,
    /// Part of every dot the region writes, so it is never changed and never reused.
    pub number: u16,
    /// Link addresses (`host:port`) of the region's nodes; at least one.
    pub link: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    /// The region that takes namespace changes. When not set: the one with the lowest number.
    pub home: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raft {
    #[serde(with = "humantime_serde")]
    pub heartbeat_interval: Duration,
    /// At least three heartbeat intervals.
    #[serde(with = "humantime_serde")]
    pub election_timeout_min: Duration,
    #[serde(with = "humantime_serde")]
    pub election_timeout_max: Duration,
    /// Reads trust the leader's lease instead of asking a quorum; needs bounded clock drift.
    pub lease_reads: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RaftLog {
    pub segment_bytes: u64,
    /// Entries kept in memory, per node.
    pub cache_bytes: usize,
    /// Log kept on disk for slow followers, per node.
    pub retain_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    pub block_cache_bytes: usize,
    pub memtable_bytes: usize,
    /// Longest time applied entries stay in memtables only; bounds replay after a crash.
    #[serde(with = "humantime_serde")]
    pub flush_interval: Duration,
    /// Raft log bytes after which memtables are flushed; bounds replay after a crash.
    pub flush_log_bytes: u64,
    /// Time between two readings of all data.
    #[serde(with = "humantime_serde")]
    pub scrub_interval: Duration,
    /// Free disk space below which writes that add data are refused.
    pub reserve_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replication {
    pub max_batch_bytes: usize,
    /// Sent and not yet acknowledged, per link and shard.
    pub in_flight_bytes: usize,
    /// Time without a path to a region after which its changes are taken from another.
    #[serde(with = "humantime_serde")]
    pub relay_after: Duration,
    #[serde(with = "humantime_serde")]
    pub retry_min: Duration,
    #[serde(with = "humantime_serde")]
    pub retry_max: Duration,
    /// A link without progress for this long is opened anew.
    #[serde(with = "humantime_serde")]
    pub watchdog: Duration,
    /// Changes kept for regions that are behind, per namespace and shard.
    pub change_log_bytes: u64,
    /// About how often each shard is compared with each region.
    #[serde(with = "humantime_serde")]
    pub repair_interval: Duration,
    /// What a repair takes from another region at most, per shard.
    pub repair_bytes_per_second: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// How long a conflict is kept for people to look at, from when this region noted it.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
    /// Conflicts kept, per namespace and shard; above, the oldest go early.
    pub bytes: u64,
}

/// Followers of changes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// Changes kept for watchers when every region has them, per namespace and shard.
    pub history_bytes: u64,
    /// How long a watcher may take nothing.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Duration,
    /// Watchers of one node; more are refused with `OVERLOADED`.
    pub max_watchers: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub max_value_bytes: usize,
    pub max_message_bytes: usize,
    /// Deadline of a request that names none.
    #[serde(with = "humantime_serde")]
    pub default_deadline: Duration,
    /// Client requests served at once; more are refused with `OVERLOADED`.
    pub max_in_flight: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Time between "not ready" and refusing requests, for load balancers to notice.
    #[serde(with = "humantime_serde")]
    pub initial_wait: Duration,
    /// Bound on the whole drain, `initial_wait` not counted.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
    /// Directives such as `info,tombolo_replication=debug`.
    pub filter: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text when standard error is a terminal, JSON otherwise.
    Auto,
    Text,
    Json,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clock {
    /// A leader whose clock is further than this from those of most nodes of its region stamps
    /// nothing, and a time further ahead than this moves no clock.
    #[serde(with = "humantime_serde")]
    pub max_offset: Duration,
}
