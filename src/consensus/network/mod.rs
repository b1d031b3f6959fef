//! Raft between the nodes of one region, over gRPC.
//!
//! Per peer there are three HTTP/2 connections: appends, control (heartbeats, votes, transfers)
//! and snapshots, so that a heartbeat never queues behind a megabyte of entries or a snapshot.
//! They are opened on first use and reopened on demand.
//!
//! Invariants:
//! * No message is acted on before its identity is checked ([`identity`]).
//! * A failed pre-vote is an error, never a grant.
//! * Every wait has a limit: openraft enforces none for streams.
//!
//! Not here: encryption and authentication of peers, discovery of addresses (configuration).

mod append;
pub(crate) mod client;
pub(crate) mod faults;
pub(crate) mod identity;
mod pulse;
pub(crate) mod server;
pub(crate) mod snapshot;
