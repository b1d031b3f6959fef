//! Identities: regions, nodes, shards, namespaces, actors and the dots they create.
//!
//! All are small numbers with an order that is the same on every machine. Names (`eu`, `carts`)
//! belong to configuration and catalog; stored bytes and vectors carry numbers only.

use std::fmt;

/// A region's number in the topology; never reused, because dots carry it for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u16);

/// A node's number inside its region; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// One of the `S` fixed slices of the key space, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u16);

/// A namespace's number, assigned by the catalog and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub u32);

impl NamespaceId {
    /// Holds the catalog itself.
    pub const CATALOG: Self = Self(0);
    /// Exists in every cluster from the start.
    pub const DEFAULT: Self = Self(1);
    /// The first number that the catalog assigns.
    pub const FIRST_ASSIGNED: Self = Self(16);
}

/// The unit that creates events: a region in one incarnation.
///
/// Raft serializes a region's writes to a shard, so a region is one actor and vectors stay as
/// small as the number of regions. A region takes a new incarnation whenever its counters may
/// have gone back, so that no dot is ever used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Actor {
    /// The region.
    pub region: RegionId,
    /// Counts the region's lives, from 1.
    pub incarnation: u32,
}

/// The identity of one write: the `seq`-th event of an actor in one shard of one namespace.
///
/// `seq` is contiguous and starts at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dot {
    /// Who created the event.
    pub actor: Actor,
    /// Its position among the actor's events.
    pub seq: u64,
}

/// Makes a client's write safe to repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId {
    /// Random, chosen once by a client instance; never zero.
    pub client: u64,
    /// Increases with every new write of that instance.
    pub number: u64,
}

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.region, self.incarnation)
    }
}

impl fmt::Display for Dot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.actor, self.seq)
    }
}
