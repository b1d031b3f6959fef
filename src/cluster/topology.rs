//! The regions of the cluster, and the nodes of the local one.

use tombolo_core::{
    Actor, NodeId, RegionId, ShardId, namespace::NEXT_ID_KEY, placement::shard_of_key,
    token::ClusterTag,
};

/// A region as the topology lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its number, part of every dot.
    pub id: RegionId,
    /// Its name.
    pub name: String,
    /// Link addresses of its nodes, `host:port`.
    pub link_addresses: Vec<String>,
}

/// A node of the local region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Where clients reach it.
    pub client: String,
    /// Where its peers reach it.
    pub raft: String,
    /// Where other regions reach it.
    pub link: String,
    /// Where monitoring reaches it.
    pub http: String,
}

/// Everything about the cluster that does not change while a process runs.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Shared by all regions.
    pub cluster_id: String,
    /// Number of this region.
    pub region: RegionId,
    /// This region's present life.
    pub incarnation: u32,
    /// Number of this node.
    pub node: NodeId,
    /// S, the same in all regions.
    pub shard_count: u16,
    /// All regions, this one included, in order of their numbers.
    pub regions: Vec<Region>,
    /// All nodes of this region, this one included, in order of their numbers.
    pub nodes: Vec<Node>,
    /// The region that takes namespace changes.
    pub catalog_home: RegionId,
}

impl Topology {
    /// The actor that this region's writes carry.
    pub fn actor(&self) -> Actor {
        Actor { region: self.region, incarnation: self.incarnation }
    }

    /// What tokens of this cluster carry.
    pub fn cluster_tag(&self) -> ClusterTag {
        ClusterTag::of(&self.cluster_id)
    }

    /// The region with this number.
    pub fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.iter().find(|region| region.id == id)
    }

    /// The region with this name.
    pub fn region_named(&self, name: &str) -> Option<&Region> {
        self.regions.iter().find(|region| region.name == name)
    }

    /// The name of a region; its number if the topology does not list it.
    pub fn region_name(&self, id: RegionId) -> String {
        self.region(id).map_or_else(|| id.to_string(), |region| region.name.clone())
    }

    /// The name of this region.
    pub fn local_name(&self) -> String {
        self.region_name(self.region)
    }

    /// The other regions.
    pub fn peers(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().filter(|region| region.id != self.region)
    }

    /// A node of this region.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// The shard of a key.
    pub fn shard_of(&self, key: &[u8]) -> ShardId {
        shard_of_key(key, self.shard_count)
    }

    /// The shard that holds the catalog.
    pub fn catalog_shard(&self) -> ShardId {
        self.shard_of(NEXT_ID_KEY)
    }

    /// Whether this region takes namespace changes.
    pub fn is_catalog_home(&self) -> bool {
        self.catalog_home == self.region
    }
}
