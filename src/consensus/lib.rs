//! Raft groups: every shard of a region is replicated to all its nodes. The only crate that names
//! openraft.
//!
//! A node has one [`Consensus`], which has one [`Group`] per shard. All groups share the node's
//! log, data store and connections, so that a sync, a flush and a TCP connection serve them all.
//! A caller proposes encoded commands ([`Group::propose`]) and proves leadership before it reads
//! the store ([`Group::read_barrier`]).
//!
//! Reading order: `types` (what is replicated), `log_store` and `state_machine` (where it is
//! kept), `network` (how it travels), `propose` and `reads` (how callers use it), `purge` and
//! `snapshot` (how the log stays short), `bootstrap`, `quarantine` and `network::identity` (how
//! it stays safe), `group` and `node` (how it is put together).
//!
//! Invariants:
//! * Nothing of openraft's is on disk or on the wire: both have formats of our own.
//! * What is acknowledged is in the synced logs of a majority and applied on this node.
//! * A group without a working core is a failure of the node, never a silent replica.
//!
//! Not here: what commands mean (`tombolo-core`), retries, deadlines, sessions (`tombolo-shard`),
//! changes of membership, regions.

mod bootstrap;
mod config;
mod group;
mod log_store;
mod metrics;
mod network;
mod node;
mod propose;
mod purge;
mod quarantine;
mod reads;
mod snapshot;
mod state_machine;
mod types;

pub use config::{ConsensusConfig, PeerAddress};
pub use group::{Group, Leadership};
pub use metrics::GroupMetrics;
pub use network::server::Server as RaftEndpoint;
pub use node::{Consensus, StartError};
pub use propose::{ProposeError, Proposed};
pub use reads::{ReadBarrier, ReadError};
pub use tombolo_raftlog::LogId;
