//! What a run is to do: plain data, written to `test.json` beside the history.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use tombolo_jepsen_check::FindingKind;

/// Bytes of change log that a region keeps for an absent peer in runs of
/// [`Nemesis::LongIsolation`] and [`Nemesis::RepairKill`], a namespace and shard.
pub(crate) const CHANGE_LOG_BYTES: u64 = 256 << 10;
/// The key of the server's configuration that sets it.
pub(crate) const CHANGE_LOG_KEY: &str = "replication.change_log_bytes";

/// Names of regions, in order of their numbers.
const REGIONS: [&str; 5] = ["us", "eu", "ap", "sa", "af"];

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Reads, writes, compare-and-sets and deletes of keys that one region has to itself.
    Register,
    /// Adds of unique keys in all regions, and scans.
    GSet,
    /// Adds of unique keys in all regions, and deletes by those who have seen them.
    Delete,
}

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Nemesis {
    /// Nothing.
    None,
    /// A leader loses its region, or one direction to it.
    Partition,
    /// A leader is killed with SIGKILL, and starts again.
    LeaderKill,
    /// A leader is frozen for longer than an election takes.
    Pause,
    /// A region loses all others.
    Isolation,
    /// Regions can reach each other only through one in the middle.
    Bridge,
    /// A region is away for longer than the others keep their change log for it.
    LongIsolation,
    /// The same, and the region's leader is killed while it repairs.
    RepairKill,
    /// A region loses all others while the leader of another is killed.
    Storm,
}

/// A lie that the harness tells itself, to see that it is found out. Such a run must be invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Sabotage {
    /// Registers are read from whichever replica is asked, and taken for linearizable.
    LocalReads,
    /// Something that was added is deleted behind the history's back.
    LostAdd,
    /// Something that was deleted is written again behind the history's back.
    Resurrection,
}

impl Sabotage {
    /// How it must be found out.
    pub(crate) fn finding(self) -> FindingKind {
        match self {
            Self::LocalReads => FindingKind::NotLinearizable,
            Self::LostAdd => FindingKind::LostAdd,
            Self::Resurrection => FindingKind::Resurrection,
        }
    }
}

/// How rows of one key resolve between regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Rule {
    Lww,
    Siblings,
}

/// What carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NetworkKind {
    /// A namespace for every node, and a switch between them.
    Namespaces,
    /// Loopback, with a proxy on every link between regions. Knows no faults inside a region.
    LoopbackProxy,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) workload: Workload,
    pub(crate) nemesis: Nemesis,
    pub(crate) rule: Rule,
    pub(crate) sabotage: Option<Sabotage>,
    pub(crate) network: NetworkKind,
    pub(crate) regions: usize,
    pub(crate) nodes: u16,
    pub(crate) shards: u16,
    /// How long clients act.
    pub(crate) secs: u64,
    pub(crate) seed: u64,
    /// Round trip between any two regions.
    pub(crate) round_trip_ms: u64,
    /// The server's executable.
    pub(crate) program: PathBuf,
}

impl Plan {
    pub(crate) fn region_names(&self) -> Vec<String> {
        REGIONS.iter().take(self.regions).map(|name| (*name).to_owned()).collect()
    }

    pub(crate) fn round_trip(&self) -> Duration {
        Duration::from_millis(self.round_trip_ms)
    }

    /// Such as `register-leader-kill-2x3-seed7`.
    pub(crate) fn name(&self) -> String {
        let Self { workload, nemesis, sabotage, regions, nodes, seed, .. } = self;
        let lie = sabotage.map(|lie| format!("-with-{}", word(lie))).unwrap_or_default();
        format!("{}-{}{lie}-{regions}x{nodes}-seed{seed}", word(*workload), word(*nemesis))
    }

    /// Why it cannot be done here, if it cannot.
    pub(crate) fn obstacle(&self) -> Option<&'static str> {
        match (self.network, self.nemesis) {
            (NetworkKind::LoopbackProxy, Nemesis::Partition) => {
                Some("the loopback proxy cannot cut nodes of one region from each other")
            }
            (_, Nemesis::Bridge) if self.regions < 3 => Some("a bridge needs three regions"),
            (NetworkKind::LoopbackProxy | NetworkKind::Namespaces, _) => None,
        }
    }

    /// Bytes of each value.
    pub(crate) fn value_bytes(&self) -> usize {
        // Enough to pass the change log's budget in seconds.
        if self.has_small_change_log() { 8 << 10 } else { 16 }
    }

    /// Arguments of the server beside its configuration file.
    pub(crate) fn server_arguments(&self) -> Vec<String> {
        if !self.has_small_change_log() {
            return Vec::new();
        }
        vec!["--set".into(), format!("{CHANGE_LOG_KEY}={CHANGE_LOG_BYTES}")]
    }

    fn has_small_change_log(&self) -> bool {
        match self.nemesis {
            Nemesis::LongIsolation | Nemesis::RepairKill => true,
            Nemesis::None
            | Nemesis::Partition
            | Nemesis::LeaderKill
            | Nemesis::Pause
            | Nemesis::Isolation
            | Nemesis::Bridge
            | Nemesis::Storm => false,
        }
    }
}

/// The name that the command line takes.
pub(crate) fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}
