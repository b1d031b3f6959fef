//! The network of a run, whichever carries it: cuts between nodes and between regions, and proof
//! that they took something.

use crate::plan::{NetworkKind, Plan};
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use tombolo_demo::latency::Latencies;
use tombolo_demo::layout::{Layout, NodePlan, Proxies, Shape, Wanted};
use tombolo_demo::network::{Cut, Network};
use tombolo_jepsen_netsim::{HostId, Namespace, Switch};

/// Last part of the address of a region's clients.
const CLIENTS: u8 = 250;
const FIRST_PORT: u16 = 7101;

/// What carries the packets of a run.
#[derive(Debug)]
pub(crate) enum Net {
    /// Hosts are the nodes in order of the layout, then the clients of each region.
    Namespaces {
        switch: Switch,
        nodes: BTreeMap<String, HostId>,
        clients: BTreeMap<String, HostId>,
    },
    Proxies(Network),
}

/// Which packets between two nodes go nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Both,
    FromFirst,
    ToFirst,
}

impl Net {
    /// Makes the network and decides where every node listens.
    pub(crate) async fn build(plan: &Plan, dir: &Path) -> anyhow::Result<(Self, Layout, Proxies)> {
        match plan.network {
            NetworkKind::Namespaces => Self::namespaces(plan, dir),
            NetworkKind::LoopbackProxy => Self::proxies(plan, dir).await,
        }
    }

    fn namespaces(plan: &Plan, dir: &Path) -> anyhow::Result<(Self, Layout, Proxies)> {
        let shape = Shape {
            cluster_id: "jepsen".into(),
            regions: plan.region_names(),
            nodes: plan.nodes,
            shards: plan.shards,
            base_port: FIRST_PORT,
        };
        let mut layout = Layout::plan(dir, shape);
        let mut namespaces = Vec::new();
        let mut host = |address: Ipv4Addr| -> anyhow::Result<HostId> {
            namespaces.push(Namespace::new(address).context("a network namespace")?);
            Ok(HostId(namespaces.len() - 1))
        };
        let numbers: BTreeMap<String, u8> = layout.shape.regions.iter().cloned().zip(1..).collect();
        let mut nodes = BTreeMap::new();
        for node in &mut layout.nodes {
            let address = Ipv4Addr::new(10, 77, numbers[&node.region], u8::try_from(node.node_id)?);
            let at = |port| SocketAddr::from((address, port));
            node.client = at(FIRST_PORT);
            node.raft = at(FIRST_PORT + 1);
            node.link = at(FIRST_PORT + 2);
            node.http = at(FIRST_PORT + 3);
            nodes.insert(node.name.clone(), host(address)?);
        }
        let mut clients = BTreeMap::new();
        for (region, number) in &numbers {
            clients.insert(region.clone(), host(Ipv4Addr::new(10, 77, *number, CLIENTS))?);
        }
        let switch = Switch::start(namespaces)?;
        // By host: its region.
        let regions: Vec<(HostId, &str)> = layout
            .nodes
            .iter()
            .map(|node| (nodes[&node.name], &*node.region))
            .chain(clients.iter().map(|(region, host)| (*host, &**region)))
            .collect();
        for (from, here) in &regions {
            for (to, there) in regions.iter().filter(|(_, there)| there != here) {
                debug_assert_ne!(here, there, "a region is not far from itself");
                switch.links().set_delay(*from, *to, plan.round_trip() / 2);
            }
        }
        let mut direct = Proxies::new();
        for from in &layout.shape.regions {
            for node in layout.nodes.iter().filter(|node| node.region != *from) {
                let pair = (from.clone(), node.region.clone());
                direct.entry(pair).or_default().push(node.link);
            }
        }
        Ok((Self::Namespaces { switch, nodes, clients }, layout, direct))
    }

    async fn proxies(plan: &Plan, dir: &Path) -> anyhow::Result<(Self, Layout, Proxies)> {
        let wanted = Wanted {
            regions: Some(plan.region_names()),
            nodes: Some(plan.nodes),
            shards: Some(plan.shards),
            base_port: None,
        };
        let layout = Layout::decide(dir, &wanted)?;
        let latencies: Latencies = format!("{}ms", plan.round_trip_ms).parse()?;
        let network = Network::new(&layout.shape.regions, &latencies);
        let mut proxies = Proxies::new();
        for from in &layout.shape.regions {
            for node in layout.nodes.iter().filter(|node| node.region != *from) {
                let address = network.open(from, &node.region, node.link).await?;
                proxies.entry((from.clone(), node.region.clone())).or_default().push(address);
            }
        }
        Ok((Self::Proxies(network), layout, proxies))
    }

    /// The namespace of a node, if it has one.
    pub(crate) fn namespace_of(&self, node: &str) -> Option<PathBuf> {
        match self {
            Self::Namespaces { switch, nodes, .. } => {
                Some(switch.namespace(*nodes.get(node)?).path().into())
            }
            Self::Proxies(_) => None,
        }
    }

    /// The namespace of a region's clients, if they have one.
    pub(crate) fn clients_of(&self, region: &str) -> Option<PathBuf> {
        match self {
            Self::Namespaces { switch, clients, .. } => {
                Some(switch.namespace(*clients.get(region)?).path().into())
            }
            Self::Proxies(_) => None,
        }
    }

    /// Cuts nodes from each other.
    ///
    /// # Errors
    /// Where only links between regions can be cut.
    pub(crate) fn cut_nodes(
        &self,
        one: &str,
        others: &[String],
        direction: Direction,
    ) -> anyhow::Result<()> {
        let Self::Namespaces { switch, nodes, .. } = self else {
            bail!("the loopback proxy cannot cut nodes of one region from each other");
        };
        for other in others {
            let (Some(one), Some(other)) = (nodes.get(one), nodes.get(other)) else {
                bail!("no node {one} or {other}");
            };
            if direction != Direction::ToFirst {
                switch.links().set_cut(*one, *other, true);
            }
            if direction != Direction::FromFirst {
                switch.links().set_cut(*other, *one, true);
            }
        }
        Ok(())
    }

    /// Cuts two regions from each other, their clients apart.
    pub(crate) fn cut_regions(&self, layout: &Layout, a: &str, b: &str) -> anyhow::Result<()> {
        match self {
            Self::Namespaces { .. } => {
                let others: Vec<String> =
                    layout.nodes_of(b).map(|node| node.name.clone()).collect();
                for node in layout.nodes_of(a) {
                    self.cut_nodes(&node.name, &others, Direction::Both)?;
                }
            }
            Self::Proxies(network) => network.partition(a, b, Cut::default())?,
        }
        Ok(())
    }

    /// Ends all cuts.
    pub(crate) fn heal(&self) {
        match self {
            Self::Namespaces { switch, .. } => switch.links().heal(),
            Self::Proxies(network) => network.heal(),
        }
    }

    /// Packets that cuts have taken since the start; none where nobody counts them.
    pub(crate) fn packets_cut(&self) -> Option<u64> {
        match self {
            Self::Namespaces { switch, .. } => Some(switch.links().total().cut),
            Self::Proxies(_) => None,
        }
    }

    /// Bytes that passed between the nodes of two regions, both ways, since the start.
    pub(crate) fn bytes_between(&self, layout: &Layout, a: &str, b: &str) -> u64 {
        match self {
            Self::Namespaces { switch, nodes, .. } => {
                let hosts = |region: &str| -> Vec<HostId> {
                    layout.nodes_of(region).filter_map(|n| nodes.get(&n.name)).copied().collect()
                };
                let mut bytes = 0;
                for one in hosts(a) {
                    for other in hosts(b) {
                        bytes += switch.links().counters(one, other).passed_bytes;
                        bytes += switch.links().counters(other, one).passed_bytes;
                    }
                }
                bytes
            }
            Self::Proxies(network) => {
                let status = network.status().into_iter();
                let of = |from: &str, to: &str| (from == a && to == b) || (from == b && to == a);
                status.filter(|it| of(&it.from, &it.to)).map(|it| it.delivered_bytes).sum()
            }
        }
    }

    /// What the switch did in all, for the report.
    pub(crate) fn figures(&self) -> BTreeMap<String, f64> {
        match self {
            Self::Namespaces { switch, .. } => {
                let total = switch.links().total();
                #[expect(clippy::cast_precision_loss, reason = "figures are read by people")]
                let figure = |value: u64| value as f64;
                [
                    ("packets_passed", figure(total.passed)),
                    ("packets_cut", figure(total.cut)),
                    ("packets_overflowed", figure(total.overflowed)),
                ]
                .map(|(name, value)| (name.to_owned(), value))
                .into()
            }
            Self::Proxies(_) => BTreeMap::new(),
        }
    }

    /// Why the network is not what it should be, if it is not.
    pub(crate) fn problem(&self) -> Option<String> {
        match self {
            Self::Namespaces { switch, .. } if !switch.is_running() => {
                Some("the switch stopped carrying packets".into())
            }
            Self::Namespaces { .. } | Self::Proxies(_) => None,
        }
    }
}

/// All other nodes.
pub(crate) fn others<'a>(layout: &'a Layout, node: &str) -> impl Iterator<Item = &'a NodePlan> {
    layout.nodes.iter().filter(move |other| other.name != node)
}
