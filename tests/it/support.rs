//! Starts and stops clusters for tests.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, TcpListener},
    sync::Mutex,
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};
use tombolo::{
    config::{Config, FlagValue},
    node::Node,
};
use tombolo_client::{Client, ClientConfig, proto};

/// How long anything may take. Far more than it does: a loaded machine must not fail a test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Addresses that were handed out by this process, so that tests do not collide.
static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A loopback address with a port that stays free until a node of this process binds it.
///
/// Its host is one of this process: connections go out from 127.0.0.1, so none of them, and no other
/// process, can take the port between two starts of a node.
pub(crate) fn free_address() -> String {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let host = Ipv4Addr::new(127, high + 1, middle, low);
    loop {
        let listener = TcpListener::bind((host, 0)).expect("a free port");
        let address = listener.local_addr().expect("an address");
        if TAKEN.lock().expect("no test panicked here").insert(address.port()) {
            return address.to_string();
        }
    }
}

/// One node of a test cluster.
pub(crate) struct Member {
    pub(crate) config: Config,
    pub(crate) node: Option<Node>,
    /// Not started with the others.
    pub(crate) is_late: bool,
}

impl Member {
    pub(crate) async fn start(&mut self) {
        let node = Node::start(&self.config, Box::new(|_| Ok(()))).await;
        self.node = Some(node.expect("the node starts"));
    }

    pub(crate) async fn stop(&mut self) {
        if let Some(node) = self.node.take() {
            node.stop(&self.config).await;
        }
    }
}

/// A cluster of several regions in this process.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    _data: TempDir,
}

/// Addresses of one node: client, raft, link, http.
type Addresses = [String; 4];

impl Cluster {
    /// Starts `regions` with so many nodes each, and waits until all are ready.
    pub(crate) async fn start(regions: &[(&str, usize)], shards: u16) -> Self {
        Self::start_with_cuts(regions, shards, &[]).await
    }

    /// As [`Cluster::start`], with no path between each pair of regions in `cuts`.
    pub(crate) async fn start_with_cuts(
        regions: &[(&str, usize)],
        shards: u16,
        cuts: &[(&str, &str)],
    ) -> Self {
        Self::start_configured(regions, shards, cuts, |_| {}).await
    }

    /// As [`Cluster::start_with_cuts`], with a configuration that `change` has changed.
    pub(crate) async fn start_configured(
        regions: &[(&str, usize)],
        shards: u16,
        cuts: &[(&str, &str)],
        change: impl Fn(&mut Config),
    ) -> Self {
        Self::start_prepared(regions, shards, cuts, async |members: &mut [Member]| {
            members.iter_mut().for_each(|member| change(&mut member.config));
        })
        .await
    }

    /// As [`Cluster::start_with_cuts`], with members that `prepare` has changed before they start.
    pub(crate) async fn start_prepared(
        regions: &[(&str, usize)],
        shards: u16,
        cuts: &[(&str, &str)],
        prepare: impl AsyncFnOnce(&mut [Member]),
    ) -> Self {
        let data = TempDir::new().expect("a directory");
        let addresses: Vec<Vec<Addresses>> = regions
            .iter()
            .map(|&(_, nodes)| (0..nodes).map(|_| [(); 4].map(|()| free_address())).collect())
            .collect();
        let mut members = Vec::new();
        for (place, (region, _)) in regions.iter().enumerate() {
            for number in 0..addresses[place].len() {
                let text = config_text(regions, &addresses, place, number, shards, cuts);
                let dir = data.path().join(format!("{region}-{}", number + 1));
                let file = data.path().join(format!("{region}-{}.toml", number + 1));
                std::fs::write(&file, text).expect("written");
                let value = dir.display().to_string();
                let flags = [FlagValue { flag: "--data-dir", key: "data_dir", value }];
                let loaded = Config::load(Some(&file), std::iter::empty(), &[], &flags);
                let config = loaded.expect("a valid configuration").config;
                members.push(Member { config, node: None, is_late: false });
            }
        }
        prepare(&mut members).await;
        let mut cluster = Self { members, _data: data };
        for member in cluster.members.iter_mut().filter(|member| !member.is_late) {
            member.start().await;
        }
        cluster.wait_ready().await;
        cluster
    }

    /// A node, by its region; of one with several, the first.
    pub(crate) fn member(&mut self, region: &str) -> &mut Member {
        let found = self.members.iter_mut().find(|member| member.config.region == region);
        found.expect("a region of the cluster")
    }

    pub(crate) async fn wait_ready(&self) {
        let ready =
            || self.members.iter().filter_map(|held| held.node.as_ref()).all(Node::is_ready);
        wait_until("all nodes are ready", async || ready()).await;
    }

    /// A client of one region, through all of its nodes.
    pub(crate) async fn client(&self, region: &str) -> Client {
        let endpoints = self.addresses(region);
        let config = ClientConfig { endpoints, deadline: PATIENCE, ..ClientConfig::default() };
        Client::connect(config).await.expect("the region answers")
    }

    /// The client addresses of a region's running nodes.
    pub(crate) fn addresses(&self, region: &str) -> Vec<String> {
        self.members
            .iter()
            .filter(|member| member.config.region == region && member.node.is_some())
            .map(|member| member.config.listen.client.clone())
            .collect()
    }

    pub(crate) async fn stop(mut self) {
        for member in &mut self.members {
            member.stop().await;
        }
    }
}

fn config_text(
    regions: &[(&str, usize)],
    addresses: &[Vec<Addresses>],
    place: usize,
    number: usize,
    shards: u16,
    cuts: &[(&str, &str)],
) -> String {
    let [client, raft, link, http] = &addresses[place][number];
    let mut text = format!(
        "cluster_id = \"test\"\nregion = \"{}\"\nnode_id = {}\ndata_dir = \"unused\"\nshards = {shards}\n\
         [listen]\nclient = \"{client}\"\nraft = \"{raft}\"\nlink = \"{link}\"\nhttp = \"{http}\"\n\
         [raft_log]\nsegment_bytes = 18874368\n[drain]\ntimeout = \"2s\"\n\
         [replication]\nretry_max = \"500ms\"\n",
        regions[place].0,
        number + 1,
    );
    for (id, [client, raft, link, http]) in addresses[place].iter().enumerate() {
        text += &format!(
            "[[nodes]]\nid = {}\nclient = \"{client}\"\nraft = \"{raft}\"\nlink = \"{link}\"\nhttp = \"{http}\"\n",
            id + 1
        );
    }
    let here = regions[place].0;
    for (number, &(name, _)) in regions.iter().enumerate() {
        let is_cut = cuts.contains(&(here, name)) || cuts.contains(&(name, here));
        let links: Vec<String> = addresses[number]
            .iter()
            // Nothing listens on port 1.
            .map(|[_, _, link, _]| if is_cut { "127.0.0.1:1" } else { link })
            .map(|link| format!("\"{link}\""))
            .collect();
        text += &format!(
            "[[regions]]\nname = \"{name}\"\nnumber = {}\nlink = [{}]\n",
            number + 1,
            links.join(", ")
        );
    }
    text
}

/// A connection to this very node; a `Client` would find the others.
pub(crate) async fn channel(member: &Member) -> tonic::transport::Channel {
    let endpoint = format!("http://{}", member.config.listen.client);
    let endpoint = tonic::transport::Endpoint::from_shared(endpoint).expect("an address");
    endpoint.connect().await.expect("the node listens")
}

/// The answer of a node's HTTP port, headers included.
pub(crate) async fn http_get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("the port answers");
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

/// The sum of a node's metric over the labels that follow `name`.
pub(crate) async fn metric(member: &Member, name: &str) -> f64 {
    let text = http_get(&member.config.listen.http, "/metrics").await;
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Two clients, and whose they are.
pub(crate) type Pair<'a> = [(&'a str, &'a Client); 2];

/// Does something while the regions do not hear of each other.
pub(crate) async fn apart(pair: Pair<'_>, work: impl AsyncFnOnce()) {
    let [(here, left), (there, right)] = pair;
    left.admin().pause_link(there).await.expect("paused");
    right.admin().pause_link(here).await.expect("paused");
    wait_until("both links are paused", async || {
        let mut paused = true;
        for (_, client) in pair {
            let links = client.admin().list_links(None).await.expect("listed").links;
            paused &= links.iter().all(|link| link.phase() == proto::LinkPhase::Paused);
        }
        paused
    })
    .await;
    work().await;
    left.admin().resume_link(there).await.expect("resumed");
    right.admin().resume_link(here).await.expect("resumed");
}

/// Everything that a region holds of a namespace, in order of the keys; nothing while it refuses.
pub(crate) async fn values(client: &Client, namespace: &str) -> Vec<(Vec<u8>, Vec<Vec<u8>>)> {
    let Ok(entries) = client.namespace(namespace).scan().collect().await else { return vec![] };
    let values = |entry: tombolo_client::Entry| {
        let held = entry.versions.iter().map(|version| version.value.to_vec()).collect();
        (entry.key.to_vec(), held)
    };
    entries.into_iter().map(values).collect()
}

/// Waits for a condition, and fails with its name if it does not come.
pub(crate) async fn wait_until(what: &str, holds: impl AsyncFnMut() -> bool) {
    wait_within(PATIENCE, what, holds).await;
}

/// The same for what takes its time.
pub(crate) async fn wait_within(
    patience: Duration,
    what: &str,
    mut holds: impl AsyncFnMut() -> bool,
) {
    let deadline = Instant::now() + patience;
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    while !holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        ticks.tick().await;
    }
}
