//! Who is in the cluster, and which namespaces it has.
//!
//! [`Topology`] comes from the configuration file, which is the same in all files of a cluster where they
//! speak of the same thing; what has become of the regions since then, the catalog says. [`Catalog`] is the
//! cached view of that replicated data, fed by the shard that holds it.
//!
//! Not here: reading the catalog's data (`tombolo-shard`), Raft membership (`tombolo-consensus`).

mod catalog;
mod topology;

pub use catalog::{Catalog, Namespaces};
pub use topology::{Node, Region, Regions, Topology};
