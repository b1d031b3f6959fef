//! The client library: what applications depend on. No server code, no storage engine.
//!
//! A [`Client`] talks to one region. It learns the nodes and who leads which shard, sends each call
//! to the leader of its key, follows hints when leaders move, and tries again what is safe to try
//! again, within the call's deadline. A [`Session`] carries what one user has seen from call to
//! call and from region to region.
//!
//! ```no_run
//! # async fn example() -> tombolo_client::Result<()> {
//! use tombolo_client::{Client, ClientConfig};
//!
//! let endpoints = vec!["127.0.0.1:7101".to_owned()];
//! let client = Client::connect(ClientConfig { endpoints, ..Default::default() }).await?;
//! let keys = client.namespace("default");
//! keys.put("greeting", "hello").await?;
//! assert_eq!(keys.get("greeting").await?.value().map(|v| &v[..]), Some(&b"hello"[..]));
//! # Ok(()) }
//! ```
//!
//! Invariants:
//! * A write is sent again only with the request id of its first attempt.
//! * An error says whether a write may have been applied: [`Error::outcome_unknown`].
//! * Nothing a server answers makes the client panic.
//!
//! Map: `client` the loop of a call, `router` where it goes, `retry` what is tried again,
//! `keyspace` `mutate` `commit` `scan` `watch` `await_replication` `conflicts` `admin` the calls,
//! `session` tokens, `types` and `error` the answers.

mod admin;
mod await_replication;
mod client;
mod commit;
mod config;
mod conflicts;
mod error;
mod keyspace;
mod mutate;
mod retry;
mod router;
mod scan;
mod session;
mod types;
mod watch;

pub use admin::Admin;
pub use await_replication::{AwaitReplication, Lacking, Replicated};
pub use client::Client;
pub use commit::{Commit, Committed, FailedCheck, WriteResult};
pub use config::ClientConfig;
pub use conflicts::{ConflictFilter, ConflictList, Conflicts, Resolution};
pub use error::{Detail, Error, Result};
pub use keyspace::{BatchGet, Delete, Get, Keyspace, Put};
pub use mutate::{Mutate, Mutated, OperationResult, Operations};
pub use scan::Scan;
pub use session::Session;
pub use tombolo_proto::v1 as proto;
pub use tombolo_proto::v1::RequestId;
pub use tonic::Code;
pub use types::{
    Consistency, Dot, DotError, Entry, Got, HybridTime, IntoBytes, Revision, Value, Version,
    Written,
};
pub use watch::{
    Change, ChangeGroup, Concurrent, Deletion, Previous, ResetReason, Watch, WatchEvent,
    WatchStream, Watched,
};
