//! The regions of the cluster, and the nodes of the local one.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use tokio::sync::watch;
use tombolo_core::{
    Member, NodeId, RegionId, ShardId, namespace::NEXT_ID_KEY, placement::shard_of_key,
    region::RegionEntry,
};

/// A region as this node knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its number, part of every dot.
    pub id: RegionId,
    /// Its name.
    pub name: String,
    /// Link addresses of its nodes, `host:port`.
    pub link_addresses: Vec<String>,
    /// What the catalog says of it; nothing of one that was always simply there.
    pub said: Option<Member>,
}

impl Region {
    /// The catalog's record of it as `member`.
    pub fn into_entry(self, member: Member) -> RegionEntry {
        let Self { id, name, link_addresses, said: _ } = self;
        RegionEntry { id, name, link_addresses, member }
    }
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

/// The regions, in order of their numbers: those of the configuration, and what the catalog says.
#[derive(Clone, Debug)]
pub struct Regions {
    configured: Vec<Region>,
    current: watch::Sender<Arc<[Region]>>,
}

impl Regions {
    /// The regions of the configuration, of which the catalog has said nothing yet.
    pub fn new(mut configured: Vec<Region>) -> Self {
        configured.sort_by_key(|region| region.id);
        let (current, _) = watch::channel(configured.clone().into());
        Self { configured, current }
    }

    /// Takes over what the catalog says. The configuration has the last word on where a region is
    /// reached, if it lists it: its own people know best, and may have to mend it.
    pub fn learn(&self, catalog: impl IntoIterator<Item = RegionEntry>) {
        // One that was known once stays: a region that starts over must still find the others.
        let known = self.current();
        let known = known.iter().map(|region| Region { said: None, ..region.clone() });
        let mut regions: BTreeMap<RegionId, Region> =
            known.map(|region| (region.id, region)).collect();
        for entry in catalog {
            let RegionEntry { id, name, link_addresses, member } = entry;
            let is_configured = self.configured.iter().any(|region| region.id == id);
            let region = Region { id, name, link_addresses, said: None };
            let region = match regions.entry(id) {
                Entry::Occupied(held) if is_configured => held.into_mut(),
                held => held.insert_entry(region).into_mut(),
            };
            region.said = region.said.max(Some(member));
        }
        let regions: Arc<[Region]> = regions.into_values().collect();
        self.current.send_if_modified(|current| {
            let differs = **current != *regions;
            if differs {
                *current = regions;
            }
            differs
        });
    }

    fn current(&self) -> Arc<[Region]> {
        Arc::clone(&self.current.borrow())
    }
}

/// Who is in the cluster. The regions change while a process runs, nothing else does.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Shared by all regions.
    pub cluster_id: String,
    /// Number of this region.
    pub region: RegionId,
    /// Its name.
    pub region_name: String,
    /// This region comes to a cluster that has data already: it takes no writes before it has it.
    pub joins: bool,
    /// Number of this node.
    pub node: NodeId,
    /// S, the same in all regions.
    pub shard_count: u16,
    /// All regions, this one included.
    pub regions: Regions,
    /// All nodes of this region, this one included, in order of their numbers.
    pub nodes: Vec<Node>,
    /// The region that takes namespace changes.
    pub catalog_home: RegionId,
}

impl Topology {
    /// All regions, in order of their numbers.
    pub fn regions(&self) -> Arc<[Region]> {
        self.regions.current()
    }

    /// Tells of every change of the regions.
    pub fn watch_regions(&self) -> watch::Receiver<Arc<[Region]>> {
        self.regions.current.subscribe()
    }

    /// The region with this number.
    pub fn region(&self, id: RegionId) -> Option<Region> {
        self.regions().iter().find(|region| region.id == id).cloned()
    }

    /// The region with this name.
    pub fn region_named(&self, name: &str) -> Option<Region> {
        self.regions().iter().find(|region| region.name == name).cloned()
    }

    /// The name of a region; its number if the topology does not list it.
    pub fn region_name(&self, id: RegionId) -> String {
        self.region(id).map_or_else(|| id.to_string(), |region| region.name)
    }

    /// The name of this region.
    pub fn local_name(&self) -> String {
        self.region_name.clone()
    }

    /// The other regions, those that are out included.
    pub fn others(&self) -> Vec<Region> {
        self.regions().iter().filter(|region| region.id != self.region).cloned().collect()
    }

    /// The other regions that take part.
    pub fn peers(&self) -> Vec<Region> {
        let mut others = self.others();
        others.retain(|region| !region.said.unwrap_or_default().state.is_out());
        others
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

#[cfg(test)]
mod tests {
    use tombolo_core::MemberState;

    use super::*;

    fn region(id: u16, name: &str) -> Region {
        let link_addresses = vec![format!("{name}:7103")];
        Region { id: RegionId(id), name: name.to_owned(), link_addresses, said: None }
    }

    fn entry(id: u16, name: &str, address: &str, state: MemberState) -> RegionEntry {
        let member = Member { incarnation: 1, state };
        let link_addresses = vec![address.to_owned()];
        RegionEntry { id: RegionId(id), name: name.to_owned(), link_addresses, member }
    }

    #[test]
    fn the_catalog_adds_regions_and_says_what_became_of_others_but_not_where_they_are() {
        let regions = Regions::new(vec![region(2, "eu"), region(1, "us")]);
        let mut changes = regions.current.subscribe();
        regions.learn([]);
        assert!(!changes.has_changed().unwrap(), "nothing was said");
        regions.learn([
            entry(3, "ap", "ap:1", MemberState::Joining),
            entry(2, "eu", "elsewhere:1", MemberState::Fenced),
        ]);
        assert!(changes.has_changed().unwrap());
        let seen: Vec<_> = changes
            .borrow_and_update()
            .iter()
            .map(|it| (it.name.clone(), it.link_addresses[0].clone(), it.said.map(|it| it.state)))
            .collect();
        let of = |name: &str, address: &str, said| (name.to_owned(), address.to_owned(), said);
        assert_eq!(
            seen,
            [
                of("us", "us:7103", None),
                of("eu", "eu:7103", Some(MemberState::Fenced)),
                of("ap", "ap:1", Some(MemberState::Joining)),
            ]
        );
    }
}
