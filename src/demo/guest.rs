//! A region that comes to a running demo: processes of its own, and a faulty network of its own to
//! the regions that are there.
//!
//! Not here: admitting it, which is done like any user does it (`ctl region add`).

use std::path::PathBuf;

use crate::demo::{Demo, DemoError, READY_PATIENCE, STOP_GRACE, launches};
use crate::latency::Latencies;
use crate::layout::{Layout, LayoutError, NodePlan, Proxies, RegionEntry, Shape};
use crate::network::Network;
use crate::processes::Fleet;
use crate::readiness::wait_ready;

/// A region beside those of a demo. Dropping it kills its processes.
#[derive(Debug)]
pub struct Guest {
    layout: Layout,
    number: u16,
    links: Vec<String>,
    network: Network,
    fleet: Fleet,
}

impl Guest {
    /// Starts `nodes` nodes of `region`, which is to get `number`, and waits until they are ready.
    /// Call inside a tokio runtime.
    ///
    /// # Errors
    /// [`DemoError`]; nothing is left running then.
    pub async fn start(
        demo: &Demo,
        region: &str,
        number: u16,
        nodes: u16,
    ) -> Result<Self, DemoError> {
        let host = demo.layout();
        let last = host.nodes.last().map_or(host.shape.base_port, |node| node.http.port());
        let shape = Shape {
            regions: vec![region.to_owned()],
            nodes,
            base_port: last.saturating_add(1),
            ..host.shape.clone()
        };
        let mut layout = Layout::plan(&host.data_dir, shape);
        layout.cluster_key_file.clone_from(&host.cluster_key_file);
        if let Some((node, port)) = layout.taken_port() {
            return Err(LayoutError::PortTaken { port, node }.into());
        }
        let mut all = host.shape.regions.clone();
        all.push(region.to_owned());
        let network = Network::new(&all, &Latencies::default());
        let mut proxies = Proxies::new();
        for node in &host.nodes {
            let address = network.open(region, &node.region, node.link).await?;
            let pair = (region.to_owned(), node.region.clone());
            proxies.entry(pair).or_default().push(address);
        }
        let mut links = Vec::new();
        for node in &layout.nodes {
            let from = host.shape.regions.first().map_or(region, String::as_str);
            links.push(network.open(from, region, node.link).await?.to_string());
        }
        let mut entries = host.entries(region, &proxies);
        let link = layout.nodes.iter().map(|node| node.link).collect();
        entries.push(RegionEntry { name: region.to_owned(), number, link });
        let home = host.shape.regions.first().map_or("", String::as_str);
        for node in &layout.nodes {
            layout.write_config(node, entries.clone(), home, true)?;
        }
        let fleet = Fleet::new(launches(&layout, demo.program()))?;
        let guest = Self { layout, number, links, network, fleet };
        guest.fleet.start_all().await?;
        guest.wait_ready().await?;
        Ok(guest)
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Where the regions of the demo reach it.
    #[must_use]
    pub fn links(&self) -> Vec<String> {
        self.links.clone()
    }

    /// Its nodes.
    #[must_use]
    pub fn nodes(&self) -> &[NodePlan] {
        &self.layout.nodes
    }

    /// Client addresses of its nodes.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.layout.nodes.iter().map(|node| node.client.to_string()).collect()
    }

    /// Between it and the regions of the demo.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Its processes.
    #[must_use]
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// Its data, which whoever stops it for good may remove.
    pub fn directories(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.layout.nodes.iter().map(|node| node.directory.clone())
    }

    /// Returns when every node is ready.
    ///
    /// # Errors
    /// [`DemoError::NotReady`].
    pub async fn wait_ready(&self) -> Result<(), DemoError> {
        let nodes: Vec<&NodePlan> = self.layout.nodes.iter().collect();
        Ok(wait_ready(&self.fleet, &nodes, READY_PATIENCE).await?)
    }

    /// Stops its processes and its network.
    pub async fn stop(&self) {
        self.fleet.stop(STOP_GRACE).await;
        self.network.close().await;
    }
}
