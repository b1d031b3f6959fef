//! What a node's consensus needs to know: plain data, checked once at start.

use std::path::PathBuf;
use std::time::Duration;

use openraft::SnapshotPolicy;
use tombolo_core::NodeId;

/// Where a peer's Raft port is, as this node reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// The peer.
    pub node_id: NodeId,
    /// `host:port`.
    pub raft: String,
}

/// Settings of a node's Raft groups.
#[derive(Clone, Debug)]
pub struct ConsensusConfig {
    /// Must be equal on all nodes; a mismatch is refused at the first message.
    pub cluster_id: String,
    /// This node's region; all peers are in it.
    pub region: String,
    /// This node. Never reused: a node that lost its data directory needs a new one.
    pub node_id: NodeId,
    /// Random id of this node's data directory, made when the directory was.
    pub directory_id: String,
    /// Groups, numbered from 0. Equal on all nodes and fixed for ever.
    pub shard_count: u16,
    /// All nodes of the region; this one may be among them. All are voters of all groups.
    pub peers: Vec<PeerAddress>,
    /// Holds what this node remembers of its peers. Created if missing.
    pub state_dir: PathBuf,
    /// How often a leader tells idle followers that it lives. Default 200 ms.
    pub heartbeat_interval: Duration,
    /// A follower that hears nothing starts an election after a random time between this...
    pub election_timeout_min: Duration,
    /// ...and this, which is also the leader's lease. Defaults 800 and 1200 ms: stalls of half a
    /// second are normal on small shared machines.
    pub election_timeout_max: Duration,
    /// Serve reads from the leader's lease instead of asking a quorum. Needs clocks that run at
    /// nearly the same speed, and a start-up quarantine; see `quarantine`. Default off.
    pub lease_reads: bool,
    /// Log kept for slow followers, over all groups. A follower further behind gets a snapshot.
    pub retain_bytes: u64,
    /// The data store is flushed at least this often while something changes.
    pub flush_interval: Duration,
    /// The data store is flushed when the log above the last flush has this size; bounds replay
    /// after a crash.
    pub flush_log_bytes: u64,
}

impl ConsensusConfig {
    /// Settings with defaults for everything that has one.
    pub fn new(cluster_id: &str, region: &str, node_id: NodeId, directory_id: &str) -> Self {
        Self {
            cluster_id: cluster_id.to_owned(),
            region: region.to_owned(),
            node_id,
            directory_id: directory_id.to_owned(),
            shard_count: 16,
            peers: Vec::new(),
            state_dir: PathBuf::new(),
            heartbeat_interval: Duration::from_millis(200),
            election_timeout_min: Duration::from_millis(800),
            election_timeout_max: Duration::from_millis(1200),
            lease_reads: false,
            retain_bytes: 256 << 20,
            flush_interval: Duration::from_secs(300),
            flush_log_bytes: 128 << 20,
        }
    }

    /// The ids of all nodes of the region, this one included, ascending.
    pub(crate) fn members(&self) -> Vec<u64> {
        let mut members: Vec<u64> = self.peers.iter().map(|peer| peer.node_id.0).collect();
        members.push(self.node_id.0);
        members.sort_unstable();
        members.dedup();
        members
    }

    /// openraft's view of it.
    ///
    /// Snapshots and purging are ours alone ([`crate::purge`]): openraft's own rules count
    /// entries, and would send a snapshot to a follower that is a moment behind. Channels are
    /// small because a node has many groups.
    pub(crate) fn raft(&self, shard: u16) -> Result<openraft::Config, openraft::ConfigError> {
        let heartbeat = millis(self.heartbeat_interval);
        let election_min = millis(self.election_timeout_min);
        let election_max = millis(self.election_timeout_max);
        // Suppresses heartbeats while appends prove the same; only if elections leave room.
        let room = 2 * heartbeat + heartbeat / 4 < election_min;
        openraft::Config {
            cluster_name: format!("{}/{}/{shard}", self.cluster_id, self.region),
            heartbeat_interval: heartbeat,
            heartbeat_min_interval: room.then_some(heartbeat),
            election_timeout_min: election_min,
            election_timeout_max: election_max,
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(false),
            quorum_loss_probe_interval: Some(2 * election_max),
            max_payload_entries: 1024,
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            replication_lag_threshold: 1000,
            install_snapshot_timeout: 3_600_000,
            api_channel_size: Some(1024),
            notification_channel_size: Some(1024),
            state_machine_channel_size: Some(256),
            backoff: "50ms 100ms ...1s".to_owned(),
            ..openraft::Config::default()
        }
        .validate()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_suppress_needless_heartbeats() {
        let config = ConsensusConfig::new("c", "us", NodeId(1), "d").raft(0).unwrap();
        assert_eq!(config.heartbeat_min_interval, Some(200));
    }

    #[test]
    fn an_election_timeout_below_the_heartbeat_is_refused() {
        let config = ConsensusConfig {
            heartbeat_interval: Duration::from_secs(2),
            ..ConsensusConfig::new("c", "us", NodeId(1), "d")
        };
        assert!(config.raft(0).is_err());
    }
}
