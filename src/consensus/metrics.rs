//! The numbers of one group, as plain data.

use std::collections::BTreeMap;

/// A group's state at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupMetrics {
    /// The group.
    pub shard: u16,
    /// Whether this node leads it.
    pub is_leader: bool,
    /// Who leads, if known.
    pub leader: Option<u64>,
    /// The current term.
    pub term: u64,
    /// Changes of leadership seen since the start of the process.
    pub leader_changes: u64,
    /// Index of the last entry in the local log.
    pub last_log: Option<u64>,
    /// Index of the last entry known to be committed.
    pub committed: Option<u64>,
    /// Index of the last applied entry.
    pub applied: Option<u64>,
    /// Index of the last applied entry that survives a crash without the log.
    pub flushed: Option<u64>,
    /// Index up to which the log is gone.
    pub purged: Option<u64>,
    /// On the leader: index up to which each peer has the log.
    pub matched: BTreeMap<u64, Option<u64>>,
    /// On the leader: milliseconds since each peer last answered.
    pub acked_millis: BTreeMap<u64, Option<u64>>,
    /// The group's voters.
    pub voters: Vec<u64>,
    /// Commands proposed here.
    pub proposed_commands: u64,
    /// Entries that carried them.
    pub proposed_entries: u64,
    /// Their bytes.
    pub proposed_bytes: u64,
    /// Commands refused because too many were waiting.
    pub overloaded: u64,
    /// Commands waiting now.
    pub queued_commands: u64,
    /// Linearizable reads asked for here.
    pub reads: u64,
    /// Rounds that proved leadership for them.
    pub read_rounds: u64,
    /// Whether the replica keeps out of elections because it just started.
    pub quarantined: bool,
    /// Why the replica is dead, if it is.
    pub failure: Option<String>,
}
