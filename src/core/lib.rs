//! What is true without disks and networks: identities, causality, merging, and the transition
//! function of a shard.
//!
//! Everything here is pure. The same input gives the same output on every machine and in every
//! version, because replicas and regions agree only if they compute the same. So: no I/O, no
//! clock, no randomness, no hash-map order, no floats; `.clippy.toml` of this folder bans them.
//!
//! Reading order: [`id`], [`vector`], [`record`] (the merge), [`change`] (what travels),
//! [`command`] and [`mod@execute`] (the state machine), [`element`] and [`typed`] (counters, sets and
//! maps), [`token`] (what clients carry), [`hlc`] and [`clock_guard`] (time, and whose to believe). What
//! links do is decided by [`outgoing`], [`pending`], [`relay`] and [`repair`], what watchers get by
//! [`feed`]; who takes part by [`members`]; what may be forgotten by [`stability`]; what must hold of all
//! of it is in [`invariant`].
//!
//! Not here: storage, consensus, networks, and every decision about *when* to do something.

pub mod change;
pub mod clock_guard;
pub mod codec;
pub mod command;
pub mod element;
pub mod execute;
pub mod feed;
pub mod hlc;
pub mod id;
pub mod invariant;
pub mod key;
pub mod ledger;
pub mod members;
pub mod merkle;
pub mod namespace;
pub mod outgoing;
pub mod pending;
pub mod placement;
pub mod record;
pub mod region;
pub mod relay;
pub mod repair;
pub mod request;
pub mod stability;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod token;
pub mod typed;
pub mod vector;

pub use change::Change;
pub use codec::DecodeError;
pub use command::{Command, Outcome, decode_batch, encode_batch};
pub use execute::{ShardState, execute};
pub use hlc::{HybridClock, HybridTime};
pub use id::{Actor, Dot, NamespaceId, NodeId, RegionId, RequestId, ShardId};
pub use members::{Member, MemberState, Members};
pub use record::{Content, Record, Rule};
pub use vector::VersionVector;
