//! What a demo consists of: names, ports, directories, and each node's configuration file.
//!
//! The shape of a demo is written to `demo.json` in its data directory at the first start, so
//! that a later start on the same directory finds its data again: same cluster, regions, shards
//! and ports. Node names are `REGION-NUMBER`; nodes count from 1.
//!
//! Invariants:
//! * A data directory keeps the shape it began with; asking for another one is an error.
//! * A node takes four ports in a row: client, raft, link, http.
//! * A node reaches its own region directly and other regions only through proxies.
//! * All nodes seal tokens with the key in `cluster.key`, made at the first start for this user alone.
//!
//! Not here: starting anything (`processes`, `network`).

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// First port of a node block when none is asked for and it is free.
pub const FIRST_PORT: u16 = 7101;
/// Most regions and most nodes a region: enough to try anything, few enough for one machine.
pub const MAX_REGIONS: usize = 8;
/// Most nodes in each region.
pub const MAX_NODES: u16 = 9;

/// Changes kept for a region that is away, per namespace and shard: little, so that a demo shows
/// what happens behind that.
pub const CHANGE_LOG_BYTES: u64 = 256 << 10;
const PORTS_PER_NODE: u16 = 4;
/// Blocks are looked for below the ports that the system gives to outgoing connections.
const LAST_PORT: u16 = 32_000;
const SHAPE_FILE: &str = "demo.json";
const KEY_FILE: &str = "cluster.key";

/// What the caller asks for; whatever is absent is taken from the data directory or a default.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Region names; the first one is the catalog's home.
    pub regions: Option<Vec<String>>,
    /// Nodes in each region.
    pub nodes: Option<u16>,
    /// Shards of the cluster.
    pub shards: Option<u16>,
    /// First port of the block.
    pub base_port: Option<u16>,
}

/// What a data directory was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Shared by all nodes.
    pub cluster_id: String,
    /// Region names in order of their numbers, which count from 1.
    pub regions: Vec<String>,
    /// Nodes in each region.
    pub nodes: u16,
    /// Shards of the cluster.
    pub shards: u16,
    /// First port of the block.
    pub base_port: u16,
}

/// One node: where it listens and where its files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePlan {
    /// For example `us-2`.
    pub name: String,
    /// For example `us`.
    pub region: String,
    /// Counts from 1 in its region.
    pub node_id: u64,
    /// gRPC for users.
    pub client: SocketAddr,
    /// gRPC between nodes of a region.
    pub raft: SocketAddr,
    /// gRPC between regions.
    pub link: SocketAddr,
    /// Health and metrics.
    pub http: SocketAddr,
    /// Holds its configuration, log and data.
    pub directory: PathBuf,
}

impl NodePlan {
    /// Its configuration file.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.directory.join("tombolo.toml")
    }

    /// What it wrote to stdout and stderr, over all its lives.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("log")
    }
}

/// A demo with every name, port and path decided.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What it was made from.
    pub shape: Shape,
    /// Absolute.
    pub data_dir: PathBuf,
    /// Region by region, in order of numbers.
    pub nodes: Vec<NodePlan>,
    /// Holds what tokens are sealed with; none before a data directory was decided upon.
    pub cluster_key_file: Option<PathBuf>,
}

/// Why a layout cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The request makes no sense; the caller corrects it.
    #[error("{0}")]
    Invalid(String),
    /// The data directory holds a demo of another shape; the caller takes another directory or
    /// drops the option.
    #[error("{} holds a demo with {what} {kept}, not {wanted}", data_dir.display())]
    OtherShape {
        /// The directory.
        data_dir: PathBuf,
        /// Which property differs.
        what: &'static str,
        /// What the directory has.
        kept: String,
        /// What was asked for.
        wanted: String,
    },
    /// Another program has a port that is needed; the caller takes another base port.
    #[error("port {port} is taken (needed for {node}); choose another --base-port")]
    PortTaken {
        /// The port.
        port: u16,
        /// Who would have it.
        node: String,
    },
    /// No block of free ports was found.
    #[error("no {count} free ports in a row between {FIRST_PORT} and {LAST_PORT}")]
    NoPorts {
        /// Ports needed.
        count: usize,
    },
    /// A file of the data directory cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// `demo.json` is not what this program wrote.
    #[error("{} is damaged: {source}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
}

impl Layout {
    /// Decides the layout of a demo in `data_dir`, which must exist and be absolute.
    ///
    /// Checks that the ports are free; they are not reserved, so another program may still take
    /// one before the nodes do. Writes `demo.json` when the directory has none.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn decide(data_dir: &Path, wanted: &Wanted) -> Result<Self, LayoutError> {
        let path = data_dir.join(SHAPE_FILE);
        let kept = match std::fs::read(&path) {
            Ok(bytes) => Some(
                serde_json::from_slice::<Shape>(&bytes)
                    .map_err(|source| LayoutError::Damaged { path: path.clone(), source })?,
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(LayoutError::File { path, source }),
        };
        let shape = match kept {
            Some(kept) => again(data_dir, kept, wanted)?,
            None => first(wanted)?,
        };
        let mut layout = Self::plan(data_dir, shape);
        if let Some((node, port)) = layout.taken_port() {
            return Err(LayoutError::PortTaken { port, node });
        }
        let key_file = data_dir.join(KEY_FILE);
        keep_key(&key_file)
            .map_err(|source| LayoutError::File { path: key_file.clone(), source })?;
        layout.cluster_key_file = Some(key_file);
        let json = serde_json::to_vec_pretty(&layout.shape)
            .map_err(|source| LayoutError::Damaged { path: path.clone(), source })?;
        std::fs::write(&path, json).map_err(|source| LayoutError::File { path, source })?;
        Ok(layout)
    }

    /// Names, ports and paths of a shape. Pure.
    #[must_use]
    pub fn plan(data_dir: &Path, shape: Shape) -> Self {
        let mut nodes = Vec::new();
        let mut port = shape.base_port;
        let mut next_address = || {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            port = port.saturating_add(1);
            address
        };
        for region in &shape.regions {
            for number in 1..=shape.nodes {
                let name = format!("{region}-{number}");
                nodes.push(NodePlan {
                    region: region.clone(),
                    node_id: u64::from(number),
                    client: next_address(),
                    raft: next_address(),
                    link: next_address(),
                    http: next_address(),
                    directory: data_dir.join(&name),
                    name,
                });
            }
        }
        Self { shape, data_dir: data_dir.to_owned(), nodes, cluster_key_file: None }
    }

    /// The nodes of one region.
    pub fn nodes_of<'a>(&'a self, region: &str) -> impl Iterator<Item = &'a NodePlan> {
        self.nodes.iter().filter(move |node| node.region == region)
    }

    /// The configuration of one node as TOML.
    ///
    /// `proxies` gives, for each (from, to) pair of different regions, the addresses at which
    /// `from` reaches the nodes of `to`; an absent pair means no address.
    ///
    /// # Errors
    /// Those of the TOML writer, which a valid layout does not meet.
    pub fn config(&self, node: &NodePlan, proxies: &Proxies) -> Result<String, toml::ser::Error> {
        let home = self.shape.regions.first().map_or("", String::as_str);
        self.config_among(node, self.entries(&node.region, proxies), home, false)
    }

    /// The regions as the nodes of `from` reach them.
    pub(crate) fn entries(&self, from: &str, proxies: &Proxies) -> Vec<RegionEntry> {
        let entry = |(name, number): (&String, u16)| RegionEntry {
            name: name.clone(),
            number,
            link: if name == from {
                self.nodes_of(name).map(|peer| peer.link).collect()
            } else {
                proxies.get(&(from.to_owned(), name.clone())).cloned().unwrap_or_default()
            },
        };
        self.shape.regions.iter().zip(1u16..).map(entry).collect()
    }

    /// The configuration of one node among `regions`, as TOML.
    fn config_among(
        &self,
        node: &NodePlan,
        regions: Vec<RegionEntry>,
        home: &str,
        join: bool,
    ) -> Result<String, toml::ser::Error> {
        let config = NodeConfig {
            cluster_id: &self.shape.cluster_id,
            cluster_key_file: self.cluster_key_file.as_deref(),
            region: &node.region,
            node_id: node.node_id,
            data_dir: node.directory.join("data"),
            shards: self.shape.shards,
            join,
            listen: Listen {
                client: node.client,
                raft: node.raft,
                link: node.link,
                http: node.http,
            },
            nodes: self
                .nodes_of(&node.region)
                .map(|peer| NodeEntry {
                    id: peer.node_id,
                    client: peer.client,
                    raft: peer.raft,
                    link: peer.link,
                    http: peer.http,
                })
                .collect(),
            regions,
            catalog: Catalog { home },
            raft: Raft {
                heartbeat_interval: "300ms",
                election_timeout_min: "1s",
                election_timeout_max: "1500ms",
            },
            raft_log: RaftLog {
                segment_bytes: 18 << 20,
                cache_bytes: 16 << 20,
                retain_bytes: 64 << 20,
            },
            storage: Storage {
                block_cache_bytes: 8 << 20,
                memtable_bytes: 8 << 20,
                flush_log_bytes: 32 << 20,
            },
            replication: Replication {
                retry_max: "1s",
                watchdog: "10s",
                change_log_bytes: CHANGE_LOG_BYTES,
            },
            drain: Drain { initial_wait: "0s", timeout: "3s" },
            log: Log { format: "text" },
        };
        toml::to_string(&config)
    }

    /// Writes the configuration of every node into its directory, which is made if needed.
    ///
    /// # Errors
    /// [`LayoutError::File`].
    pub fn write_configs(&self, proxies: &Proxies) -> Result<(), LayoutError> {
        let home = self.shape.regions.first().map_or("", String::as_str);
        for node in &self.nodes {
            self.write_config(node, self.entries(&node.region, proxies), home, false)?;
        }
        Ok(())
    }

    /// Writes the configuration of one node, which joins the others or was there from the start.
    pub(crate) fn write_config(
        &self,
        node: &NodePlan,
        regions: Vec<RegionEntry>,
        home: &str,
        join: bool,
    ) -> Result<(), LayoutError> {
        let path = node.config_path();
        let config = self.config_among(node, regions, home, join).map_err(io::Error::other);
        let written = config.and_then(|config| {
            std::fs::create_dir_all(&node.directory)?;
            std::fs::write(&path, config)
        });
        written.map_err(|source| LayoutError::File { path, source })
    }

    /// The first port that cannot be bound now, with the node that needs it.
    pub(crate) fn taken_port(&self) -> Option<(String, u16)> {
        // All are held together, so that no port is counted twice.
        let mut held = Vec::new();
        for node in &self.nodes {
            for address in [node.client, node.raft, node.link, node.http] {
                match TcpListener::bind(address) {
                    Ok(listener) => held.push(listener),
                    Err(_) => return Some((node.name.clone(), address.port())),
                }
            }
        }
        None
    }
}

/// Addresses of proxies by (from, to).
pub type Proxies = BTreeMap<(String, String), Vec<SocketAddr>>;

/// Makes a key that only this user may read, unless there is one.
fn keep_key(path: &Path) -> io::Result<()> {
    let key: String = (0..4).map(|_| format!("{:016x}", rand::random::<u64>())).collect();
    let mut options = std::fs::OpenOptions::new();
    match options.write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => writeln!(file, "{key}"),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// The shape of a directory that already has one.
fn again(data_dir: &Path, mut kept: Shape, wanted: &Wanted) -> Result<Shape, LayoutError> {
    let differs = |what, kept: String, wanted: Option<String>| match wanted {
        Some(wanted) if wanted != kept => {
            Err(LayoutError::OtherShape { data_dir: data_dir.to_owned(), what, kept, wanted })
        }
        Some(_) | None => Ok(()),
    };
    differs("regions", kept.regions.join(","), wanted.regions.as_ref().map(|r| r.join(",")))?;
    differs("nodes", kept.nodes.to_string(), wanted.nodes.map(|n| n.to_string()))?;
    differs("shards", kept.shards.to_string(), wanted.shards.map(|n| n.to_string()))?;
    if let Some(base_port) = wanted.base_port {
        kept.base_port = base_port;
    }
    check(&kept)?;
    Ok(kept)
}

/// The shape of a fresh directory, its ports not yet looked for.
fn asked(wanted: &Wanted) -> Result<Shape, LayoutError> {
    let shape = Shape {
        cluster_id: format!("demo-{:06x}", rand::random::<u32>() >> 8),
        regions: wanted
            .regions
            .clone()
            .unwrap_or_else(|| ["us", "eu", "ap"].map(str::to_owned).to_vec()),
        nodes: wanted.nodes.unwrap_or(3),
        shards: wanted.shards.unwrap_or(4),
        base_port: wanted.base_port.unwrap_or(FIRST_PORT),
    };
    check(&shape)?;
    Ok(shape)
}

impl Wanted {
    /// Whether any demo could be so, before there is a directory for it.
    ///
    /// # Errors
    /// [`LayoutError::Invalid`].
    pub fn check(&self) -> Result<(), LayoutError> {
        asked(self).map(drop)
    }
}

/// The shape of a fresh directory.
fn first(wanted: &Wanted) -> Result<Shape, LayoutError> {
    let mut shape = asked(wanted)?;
    if wanted.base_port.is_some() {
        return Ok(shape);
    }
    // The directory does not matter for ports.
    for base_port in (FIRST_PORT..LAST_PORT).step_by(100) {
        shape.base_port = base_port;
        if Layout::plan(Path::new(""), shape.clone()).taken_port().is_none() {
            return Ok(shape);
        }
    }
    Err(LayoutError::NoPorts { count: port_count(&shape) })
}

fn port_count(shape: &Shape) -> usize {
    shape.regions.len() * usize::from(shape.nodes) * usize::from(PORTS_PER_NODE)
}

fn check(shape: &Shape) -> Result<(), LayoutError> {
    let invalid = |text: String| Err(LayoutError::Invalid(text));
    if shape.regions.is_empty() || shape.regions.len() > MAX_REGIONS {
        return invalid(format!("a demo has 1 to {MAX_REGIONS} regions"));
    }
    for (index, region) in shape.regions.iter().enumerate() {
        let good = region.len() <= 16
            && region.starts_with(|c: char| c.is_ascii_lowercase())
            && region.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !good {
            return invalid(format!(
                "`{region}` is not a region name here: 1 to 16 of a-z and 0-9, a letter first"
            ));
        }
        if shape.regions[..index].contains(region) {
            return invalid(format!("region `{region}` is named twice"));
        }
    }
    if shape.nodes == 0 || shape.nodes > MAX_NODES {
        return invalid(format!("a region of a demo has 1 to {MAX_NODES} nodes"));
    }
    if shape.shards == 0 || shape.shards > 1024 {
        return invalid("a cluster has 1 to 1024 shards".into());
    }
    let last = usize::from(shape.base_port) + port_count(shape) - 1;
    if shape.base_port == 0 || last > usize::from(u16::MAX) {
        return invalid(format!(
            "the ports {} to {last} are not all between 1 and {}",
            shape.base_port,
            u16::MAX
        ));
    }
    Ok(())
}

#[derive(Serialize)]
struct NodeConfig<'a> {
    cluster_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_key_file: Option<&'a Path>,
    region: &'a str,
    node_id: u64,
    data_dir: PathBuf,
    shards: u16,
    join: bool,
    listen: Listen,
    nodes: Vec<NodeEntry>,
    regions: Vec<RegionEntry>,
    catalog: Catalog<'a>,
    raft: Raft,
    raft_log: RaftLog,
    storage: Storage,
    replication: Replication,
    drain: Drain,
    log: Log,
}

#[derive(Serialize)]
struct Listen {
    client: SocketAddr,
    raft: SocketAddr,
    link: SocketAddr,
    http: SocketAddr,
}

#[derive(Serialize)]
struct NodeEntry {
    id: u64,
    client: SocketAddr,
    raft: SocketAddr,
    link: SocketAddr,
    http: SocketAddr,
}

/// A region as a node's configuration lists it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RegionEntry {
    pub(crate) name: String,
    pub(crate) number: u16,
    pub(crate) link: Vec<SocketAddr>,
}

#[derive(Serialize)]
struct Catalog<'a> {
    home: &'a str,
}

/// Slower than the default: nine nodes on two cores have neither time to spare nor a network.
#[derive(Serialize)]
struct Raft {
    heartbeat_interval: &'static str,
    election_timeout_min: &'static str,
    election_timeout_max: &'static str,
}

/// Small, because many nodes share one machine.
#[derive(Serialize)]
struct RaftLog {
    segment_bytes: u64,
    cache_bytes: u64,
    retain_bytes: u64,
}

/// Small, because many nodes share one machine.
#[derive(Serialize)]
struct Storage {
    block_cache_bytes: u64,
    memtable_bytes: u64,
    flush_log_bytes: u64,
}

/// Impatient, so that healing shows within a second or two.
#[derive(Serialize)]
struct Replication {
    retry_max: &'static str,
    watchdog: &'static str,
    change_log_bytes: u64,
}

#[derive(Serialize)]
struct Drain {
    initial_wait: &'static str,
    timeout: &'static str,
}

#[derive(Serialize)]
struct Log {
    format: &'static str,
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
