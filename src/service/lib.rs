//! The edge: gRPC in, domain calls out; health and metrics over HTTP.
//!
//! Handlers decode, check, delegate and encode. What a request means is decided in `core` and
//! `shard`; which node answers is decided by [`Gateway`]; how a refusal looks on the wire is
//! decided in [`reason`] and in `status`, and nowhere else.
//!
//! Invariants:
//! * Protobuf types stop here.
//! * Every error carries a [`reason::Reason`] from one catalogue.
//! * No handler panics on input.

mod anti_entropy;
mod clocks;
mod cluster;
mod conflict;
mod convert;
mod forward;
mod gateway;
pub mod http;
mod kv;
mod lag;
mod layer;
mod membership;
pub mod metrics;
mod metrics_process;
mod namespace;
mod node;
pub mod reason;
mod region;
mod replicated;
mod scan;
mod status;
mod typed;
mod watch;

pub use clocks::ClockWatch;
pub use cluster::ClusterApi;
pub use conflict::ConflictApi;
pub use forward::NodeChannels;
pub use gateway::{Gateway, Limits};
pub use kv::KvApi;
pub use lag::{Lag, lag_of};
pub use layer::{Admission, AdmissionLayer};
pub use namespace::{CatalogWriter, NamespaceApi};
pub use node::NodeApi;
pub use region::RegionApi;
pub use watch::{WatchApi, WatchConfig};
