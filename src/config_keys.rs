//! The list of configuration keys: the one place for defaults, bounds and help texts.
//!
//! Layering ([`super::load`]) reads it, and the example file and the reference page are
//! made from it, so that none of them can disagree.
//!
//! Not here: relations between keys ([`super::check`]), typed fields ([`super::Config`]).

use std::time::Duration;
use tombolo_core::token::SECRET_BYTES_MIN;

/// One configuration key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Dotted path; `nodes[].id` is the key `id` in each table of the list `nodes`.
    pub path: &'static str,
    pub kind: Kind,
    pub preset: Preset,
    pub help: &'static str,
}

/// What a key accepts. Bounds are inclusive.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Any string that is not empty.
    Text,
    /// A string that is long enough not to be guessed, and never shown.
    Secret,
    /// 1..=`max` characters of `a-z`, `0-9` and `-`.
    Name {
        max: usize,
    },
    Choice(&'static [&'static str]),
    Bool,
    Integer {
        min: i64,
        max: i64,
    },
    Duration {
        min: Duration,
        max: Duration,
    },
    /// `host:port` to connect to.
    Address,
    /// `host:port` to bind; port 0 is allowed.
    Listen,
    /// A list of at least one [`Kind::Address`].
    Addresses,
    /// A list of tables; its own keys follow it in [`KEYS`].
    Tables,
}

/// The value of a key that no layer sets.
#[derive(Clone, Copy, Debug)]
pub enum Preset {
    /// There is none; the TOML value here is for the example file.
    Required(&'static str),
    /// A TOML value.
    Default(&'static str),
    /// Found from other keys, as this text says.
    Derived(&'static str),
    /// May be absent, which means what the text says; the TOML value is for the example file.
    Optional(&'static str, &'static str),
}

const KIB: i64 = 1 << 10;
const MIB: i64 = 1 << 20;
const GIB: i64 = 1 << 30;
const TIB: i64 = 1 << 40;

const fn bytes(min: i64, max: i64) -> Kind {
    Kind::Integer { min, max }
}

const fn millis(min_ms: u64, max_ms: u64) -> Kind {
    Kind::Duration { min: Duration::from_millis(min_ms), max: Duration::from_millis(max_ms) }
}

const fn required(
    path: &'static str,
    kind: Kind,
    example: &'static str,
    help: &'static str,
) -> Key {
    Key { path, kind, preset: Preset::Required(example), help }
}

const fn key(path: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Key {
    Key { path, kind, preset: Preset::Default(default), help }
}

const HOUR_MS: u64 = 3_600_000;
const REGION: Kind = Kind::Name { max: 32 };
const NODE_ID: Kind = Kind::Integer { min: 1, max: u32::MAX as i64 };

/// Every key, in the order of the example file: keys without a section first.
pub const KEYS: &[Key] = &[
    required(
        "cluster_id",
        Kind::Name { max: 64 },
        "\"demo-7f3a\"",
        "Cluster this node belongs to; nodes of different clusters refuse to talk.",
    ),
    Key {
        path: "cluster_key",
        kind: Kind::Secret,
        preset: Preset::Optional(
            "none: tokens can be forged",
            "\"a long random text, kept secret\"",
        ),
        help: "Seals the tokens that clients carry; the same on every node of every region.",
    },
    Key {
        path: "cluster_key_file",
        kind: Kind::Text,
        preset: Preset::Optional("none", "\"/etc/tombolo/cluster.key\""),
        help: "File with that key in its first line, and accepted_cluster_key in the second, if any.",
    },
    Key {
        path: "accepted_cluster_key",
        kind: Kind::Secret,
        preset: Preset::Optional("none", "\"another long random text, too\""),
        help: "Another key whose tokens are accepted: first the next one, then the one before.",
    },
    required("region", REGION, "\"us\"", "Region of this node; one of [[regions]]."),
    required(
        "node_id",
        NODE_ID,
        "1",
        "Number of this node; unique in its region, never reused; one of [[nodes]].",
    ),
    required(
        "data_dir",
        Kind::Text,
        "\"/var/lib/tombolo\"",
        "Directory of this node's data; created at the first start.",
    ),
    key(
        "shards",
        Kind::Integer { min: 1, max: 1024 },
        "16",
        "Raft groups in the region; fixed at the first start.",
    ),
    key(
        "join",
        Kind::Bool,
        "false",
        "This region comes to a running cluster: it is empty, and takes over the others' data first.",
    ),
    key(
        "listen.client",
        Kind::Listen,
        "\"127.0.0.1:7101\"",
        "Bind address of the client gRPC API.",
    ),
    key("listen.raft", Kind::Listen, "\"127.0.0.1:7102\"", "Bind address of Raft in the region."),
    key("listen.link", Kind::Listen, "\"127.0.0.1:7103\"", "Bind address of region replication."),
    key(
        "listen.http",
        Kind::Listen,
        "\"127.0.0.1:7104\"",
        "Bind address of /livez, /readyz, /metrics and /admin; keep it off public networks.",
    ),
    required(
        "nodes",
        Kind::Tables,
        "",
        "All nodes of this region, this one included, by the addresses others reach them at.",
    ),
    required("nodes[].id", NODE_ID, "1", "Number of the node."),
    required("nodes[].client", Kind::Address, "\"127.0.0.1:7101\"", "Its client gRPC API."),
    required("nodes[].raft", Kind::Address, "\"127.0.0.1:7102\"", "Its Raft port."),
    required("nodes[].link", Kind::Address, "\"127.0.0.1:7103\"", "Its region replication port."),
    required("nodes[].http", Kind::Address, "\"127.0.0.1:7104\"", "Its HTTP port."),
    required(
        "regions",
        Kind::Tables,
        "",
        "All regions of the cluster, this one included; the same names and numbers everywhere.",
    ),
    required("regions[].name", REGION, "\"us\"", "Name of the region."),
    required(
        "regions[].number",
        Kind::Integer { min: 1, max: u16::MAX as i64 },
        "1",
        "Part of every version the region writes; never changed, never reused.",
    ),
    required(
        "regions[].link",
        Kind::Addresses,
        "[\"127.0.0.1:7103\"]",
        "Replication addresses of the region's nodes.",
    ),
    Key {
        path: "catalog.home",
        kind: REGION,
        preset: Preset::Derived("the region with the lowest number"),
        help: "Region that takes namespace changes; the same everywhere.",
    },
    key("raft.heartbeat_interval", millis(10, 60_000), "\"200ms\"", "Time between heartbeats."),
    key(
        "raft.election_timeout_min",
        millis(30, 300_000),
        "\"800ms\"",
        "Shortest silence before an election; at least three heartbeat intervals.",
    ),
    key(
        "raft.election_timeout_max",
        millis(30, 600_000),
        "\"1200ms\"",
        "Longest silence before an election; above election_timeout_min.",
    ),
    key(
        "raft.lease_reads",
        Kind::Bool,
        "false",
        "Trust the leader's lease for reads instead of asking a quorum; needs steady clocks.",
    ),
    key("raft_log.segment_bytes", bytes(MIB, 4 * GIB), "67108864", "Size of one log file."),
    key(
        "raft_log.cache_bytes",
        bytes(MIB, 64 * GIB),
        "67108864",
        "Log entries kept in memory, per node.",
    ),
    key(
        "raft_log.retain_bytes",
        bytes(MIB, TIB),
        "268435456",
        "Log kept on disk for slow followers, per node; at least one segment.",
    ),
    key(
        "storage.block_cache_bytes",
        bytes(MIB, TIB),
        "33554432",
        "Cache of data blocks, per node.",
    ),
    key("storage.memtable_bytes", bytes(MIB, 64 * GIB), "33554432", "Write buffer, per node."),
    key(
        "storage.flush_interval",
        millis(1000, 24 * HOUR_MS),
        "\"5m\"",
        "Longest time changes stay in the write buffer; bounds replay after a crash.",
    ),
    key(
        "storage.flush_log_bytes",
        bytes(MIB, TIB),
        "134217728",
        "Raft log after which the write buffer is flushed; bounds replay after a crash.",
    ),
    key(
        "storage.scrub_interval",
        millis(1000, 24 * 365 * HOUR_MS),
        "\"7days\"",
        "Time between two readings of all data, to find damage before it is needed.",
    ),
    key(
        "storage.reserve_bytes",
        bytes(0, 1024 * TIB),
        "268435456",
        "Free disk space below which writes are refused; reads and deletes go on.",
    ),
    key(
        "replication.max_batch_bytes",
        bytes(KIB, 64 * MIB),
        "1048576",
        "Largest batch of changes sent to another region.",
    ),
    key(
        "replication.in_flight_bytes",
        bytes(KIB, 4 * GIB),
        "4194304",
        "Sent and not yet acknowledged, per link and shard; at least one batch.",
    ),
    key(
        "replication.relay_after",
        millis(100, HOUR_MS),
        "\"3s\"",
        "Time without a path to a region after which its changes are taken from another.",
    ),
    key(
        "replication.retry_min",
        millis(1, HOUR_MS),
        "\"100ms\"",
        "First wait before a lost link is tried again.",
    ),
    key(
        "replication.retry_max",
        millis(1, HOUR_MS),
        "\"5s\"",
        "Longest wait before a lost link is tried again; not below retry_min.",
    ),
    key(
        "replication.watchdog",
        millis(1000, HOUR_MS),
        "\"30s\"",
        "A link without progress for this long is opened anew.",
    ),
    key(
        "replication.change_log_bytes",
        bytes(KIB, 1024 * TIB),
        "268435456",
        "Changes kept for regions that are behind, per namespace and shard; behind that they repair.",
    ),
    key(
        "replication.repair_interval",
        millis(1000, 365 * 24 * HOUR_MS),
        "\"10m\"",
        "About how often each shard is compared with each region.",
    ),
    key(
        "replication.repair_bytes_per_second",
        bytes(KIB, TIB),
        "33554432",
        "What a repair takes from another region at most, per shard.",
    ),
    key(
        "ledger.retention",
        millis(1000, 10 * 365 * 24 * HOUR_MS),
        "\"7days\"",
        "How long a conflict is kept to be looked at, from when this region noted it.",
    ),
    key(
        "ledger.bytes",
        bytes(KIB, 1024 * TIB),
        "67108864",
        "Conflicts kept, per namespace and shard; above, the oldest go early.",
    ),
    key(
        "watch.history_bytes",
        bytes(0, 1024 * TIB),
        "8388608",
        "Changes kept for watchers when every region has them, per namespace and shard; no more than replication.change_log_bytes.",
    ),
    key(
        "watch.stall_timeout",
        millis(100, HOUR_MS),
        "\"30s\"",
        "A watcher that takes nothing for this long is cut, with the token to go on from.",
    ),
    key(
        "watch.max_watchers",
        Kind::Integer { min: 1, max: 1 << 20 },
        "20000",
        "Watchers of one node; more are refused with OVERLOADED.",
    ),
    key("limits.max_value_bytes", bytes(1, 64 * MIB), "1048576", "Largest value of a key."),
    key(
        "limits.max_message_bytes",
        bytes(64 * KIB, 256 * MIB),
        "4194304",
        "Largest gRPC message; 64 KiB above max_value_bytes at least.",
    ),
    key(
        "limits.default_deadline",
        millis(10, HOUR_MS),
        "\"5s\"",
        "Deadline of a request that names none.",
    ),
    key(
        "limits.max_in_flight",
        Kind::Integer { min: 1, max: 1 << 20 },
        "4096",
        "Client requests served at once; more are refused with OVERLOADED.",
    ),
    key(
        "drain.initial_wait",
        millis(0, HOUR_MS),
        "\"0s\"",
        "Time between \"not ready\" and refusing requests, for load balancers to notice.",
    ),
    key("drain.timeout", millis(100, HOUR_MS), "\"10s\"", "Bound on the drain after that wait."),
    key(
        "log.format",
        Kind::Choice(&["auto", "text", "json"]),
        "\"auto\"",
        "auto: text when standard error is a terminal, JSON otherwise.",
    ),
    key(
        "log.filter",
        Kind::Text,
        "\"info\"",
        "Levels, as in \"info,tombolo_replication=debug\"; PUT /admin/log-filter changes it live.",
    ),
    key(
        "clock.max_offset",
        millis(1, HOUR_MS),
        "\"500ms\"",
        "How far clocks may be apart: a leader further from most of its region's stamps nothing, and \
         no time further ahead moves a clock.",
    ),
];

/// The key with this exact path.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Whether some key lives in the section `name`.
pub(super) fn is_section(name: &str) -> bool {
    KEYS.iter().any(|key| key.path.split_once('.').is_some_and(|(section, _)| section == name))
}

/// The keys in each table of `list`, without its prefix.
pub(super) fn fields(list: &str) -> impl Iterator<Item = (&'static str, Kind)> {
    KEYS.iter()
        .filter_map(move |key| Some((key.path.strip_prefix(list)?.strip_prefix("[].")?, key.kind)))
}

/// The known key (or section) that `unknown` was most likely meant to be.
///
/// The same last part in another section counts as near, since a forgotten section header is the
/// most common slip; otherwise at most a third of the characters may differ.
pub(super) fn nearest(unknown: &str) -> Option<&'static str> {
    let leaf = |path: &str| path.rsplit(['.', ']']).next().unwrap_or_default().to_owned();
    let by_leaf = KEYS.iter().find(|key| leaf(key.path) == leaf(unknown)).map(|key| key.path);
    let sections = KEYS.iter().filter_map(|key| key.path.split_once('.')).map(|(name, _)| name);
    let by_edits = KEYS
        .iter()
        .map(|key| key.path)
        .chain(sections.filter(|name| !name.ends_with("[]")))
        .map(|path| (edits(path, unknown), path))
        .min()
        .filter(|(distance, path)| *distance <= (path.len() / 3).clamp(1, 4))
        .map(|(_, path)| path);
    match by_edits {
        Some(path) => Some(path),
        None => by_leaf,
    }
}

/// Levenshtein distance over bytes. O(`a` × `b`); `b` is cut at 128 bytes.
fn edits(a: &str, b: &str) -> usize {
    let b = &b.as_bytes()[..b.len().min(128)];
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

impl Kind {
    /// The accepted values, in words: completes "wants …".
    pub fn describe(&self) -> String {
        match self {
            Self::Text => "a string that is not empty".into(),
            Self::Secret => format!("a string of at least {SECRET_BYTES_MIN} bytes"),
            Self::Name { max } => format!("1 to {max} characters of a-z, 0-9 and -"),
            Self::Choice(words) => format!("one of {}", words.join(", ")),
            Self::Bool => "true or false".into(),
            Self::Integer { min, max } => format!("a whole number from {min} to {max}"),
            Self::Duration { min, max } => format!(
                "a duration from {} to {}",
                humantime::format_duration(*min),
                humantime::format_duration(*max)
            ),
            Self::Address => "an address host:port".into(),
            Self::Listen => "an address host:port (port 0: any free port)".into(),
            Self::Addresses => "a list of at least one address host:port".into(),
            Self::Tables => "a list of tables".into(),
        }
    }
}

/// The example file. See [`super::Config::example`].
pub(super) fn render_example() -> String {
    let mut out = String::from(
        "# Configuration of one Tombolo node: tombolo server --config FILE\n\
         # A line that starts with \"#key =\" shows the default of a key, one with \"# key =\" an example.\n\
         # Later layers win: this file, TOMBOLO__SECTION__KEY, --set section.key=value, flags.\n",
    );
    let mut section = String::new();
    for key in KEYS {
        let (parent, leaf) = key.path.rsplit_once('.').unwrap_or(("", key.path));
        if matches!(key.kind, Kind::Tables) {
            out += &format!("\n# {}\n[[{}]]\n", key.help, key.path);
            section = format!("{}[]", key.path);
            continue;
        }
        if parent != section {
            out += &format!("\n[{parent}]\n");
            section = parent.to_owned();
        }
        out += &match key.preset {
            Preset::Required(example) => format!("# {}\n{leaf} = {example}\n", key.help),
            Preset::Default(default) => format!("# {}\n#{leaf} = {default}\n", key.help),
            Preset::Derived(rule) => {
                format!("# {} Default: {rule}.\n#{leaf} = \"us\"\n", key.help)
            }
            Preset::Optional(rule, example) => {
                format!("# {} Default: {rule}.\n# {leaf} = {example}\n", key.help)
            }
        };
    }
    out
}

/// The reference page `docs/operate/config.md`.
pub fn render_markdown() -> String {
    let mut out = String::from(
        "# Configuration keys\n\n\
         <!-- Made from src/config_keys.rs; update with: UPDATE=1 cargo test --test config -->\n\n\
         `tombolo server --config FILE` reads TOML. Five layers, each overriding the one before:\n\n\
         1. defaults (the table below)\n\
         2. the file\n\
         3. the environment: `TOMBOLO__RAFT__LEASE_READS=true` sets `raft.lease_reads`\n\
         4. `--set raft.lease_reads=true`\n\
         5. named flags\n\n\
         An unknown key is an error in each of them. The lists `nodes` and `regions` can only be\n\
         set in the file.\n\n\
         `tombolo config check` reports every problem at once, `tombolo config show --origin`\n\
         prints each value with the place it came from, `tombolo config example` prints a\n\
         commented file.\n\n\
         Durations are strings such as `\"200ms\"`, `\"5s\"`, `\"1m 30s\"`; sizes are bytes.\n\n\
         | Key | Wants | Default | Meaning |\n\
         |---|---|---|---|\n",
    );
    for key in KEYS {
        let default = match key.preset {
            Preset::Required(_) => "required".into(),
            Preset::Default(default) => format!("`{default}`"),
            Preset::Derived(rule) | Preset::Optional(rule, _) => rule.into(),
        };
        let (path, wants, help) = (key.path, key.kind.describe(), key.help);
        out += &format!("| `{path}` | {wants} | {default} | {help} |\n");
    }
    out
}
