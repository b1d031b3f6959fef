//! A region is seeded while the others write, and its seeding is torn apart: a leader of the source is
//! killed, its own node is killed, the path between them is cut. What was taken over stays, and little
//! comes twice.
//!
//! `scripts/seed-cost` runs it at full size. Bytes decide; times are printed only.

use std::{path::PathBuf, time::Duration};

use futures::{StreamExt, stream};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use tombolo_client::{Client, ClientConfig, proto};
use tombolo_demo::{
    demo::{Demo, DemoConfig, READY_PATIENCE},
    guest::Guest,
    latency::Latencies,
    layout::Wanted,
    network::Cut,
};

/// Puts in one commit.
const BATCH: usize = 128;
/// Commits under way at a time.
const COMMITS: usize = 16;
const VALUE_BYTES: usize = 256;
/// Enough to reach all shards.
const TAGS: usize = 16;
/// Trees and what a stream has under way: what an interruption costs whatever the size is.
const FIXED_BYTES: f64 = 6.0 * 1024.0 * 1024.0;
/// Parts of the seeding at which it is torn apart.
const INTERRUPT_AT: [f64; 3] = [0.2, 0.45, 0.7];
/// How long the path is cut.
const CUT: Duration = Duration::from_secs(3);

fn keys() -> usize {
    let named = std::env::var("TOMBOLO_SEED_KEYS").ok();
    named.map_or(40_000, |number| number.parse().expect("TOMBOLO_SEED_KEYS is a number"))
}

async fn connect(endpoints: Vec<String>) -> Client {
    let deadline = Duration::from_secs(60);
    let config = ClientConfig { endpoints, deadline, ..ClientConfig::default() };
    Client::connect(config).await.expect("the region answers")
}

async fn wait_until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    // However long the size takes.
    let deadline = Instant::now() + Duration::from_millis(120_000 + 3 * keys() as u64);
    while !holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Bytes that do not compress.
fn value(number: usize) -> Vec<u8> {
    let mut state = number as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    };
    (0..VALUE_BYTES).map(|_| next()).collect()
}

async fn fill(client: &Client) {
    let numbers: Vec<usize> = (0..keys()).collect();
    let commits = numbers.chunks(BATCH).enumerate().map(|(batch, numbers)| {
        let commit = client.namespace("default").commit();
        // A commit is of one shard.
        let key = |number| format!("{{{}}}-{number:07}", batch % TAGS);
        numbers.iter().fold(commit, |commit, &number| commit.put(key(number), value(number)))
    });
    let mut commits = stream::iter(commits.map(IntoFuture::into_future)).buffer_unordered(COMMITS);
    while let Some(committed) = commits.next().await {
        committed.expect("committed");
    }
}

/// Writes new keys, one after the other, until it is told to stop; answers how many.
fn keep_writing(
    client: Client,
    prefix: &'static str,
    stop: CancellationToken,
) -> JoinHandle<usize> {
    tokio::spawn(async move {
        let mut written = 0;
        while !stop.is_cancelled() {
            let key = format!("{prefix}-{written:07}");
            client.namespace("default").put(key, value(written)).await.expect("written");
            written += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        written
    })
}

/// Bytes that came from the source to the region that is seeded, over all connections.
fn arrived(guest: &Guest, name: &str) -> f64 {
    let directions = guest.network().status();
    let bytes = directions.iter().filter(|it| it.from == "us" && it.to == name);
    bytes.map(|it| it.delivered_bytes as f64).sum()
}

async fn is_active(us: &Client, name: &str) -> bool {
    let Ok(regions) = us.admin().list_regions().await else { return false };
    let active =
        |it: &proto::Region| it.name == name && it.membership() == proto::Membership::Active;
    regions.regions.iter().any(active)
}

/// Kills the node of us that leads most shards; answers its name.
async fn kill_leader(demo: &Demo, us: &Client) -> String {
    let cluster = us.cluster().await.expect("the region answers");
    let led = |id: u64| cluster.leaders.iter().filter(|it| it.leader_node_id == id).count();
    let nodes = demo.layout().nodes_of("us");
    let node = nodes.max_by_key(|node| led(node.node_id)).expect("a node");
    demo.fleet().kill(&node.name).await.expect("killed");
    node.name.clone()
}

/// Lets a region join, and tears its seeding apart where `expected` bytes say, if any; answers the bytes
/// that arrived, without those that were written meanwhile.
async fn seed(
    demo: &Demo,
    us: &Client,
    name: &'static str,
    number: u16,
    expected: Option<f64>,
) -> f64 {
    let guest = Guest::start(demo, name, number, 1).await.expect("it starts");
    let client = connect(guest.endpoints()).await;
    // Slow enough to be torn apart.
    client.admin().limit_link("us", 4 << 20).await.expect("limited");
    let stop = CancellationToken::new();
    let writing = keep_writing(us.clone(), name, stop.clone());
    us.admin().add_region(name, u32::from(number), guest.links()).await.expect("admitted");
    for (place, part) in INTERRUPT_AT.into_iter().enumerate() {
        let Some(expected) = expected else { break };
        wait_until("a part has come", async || arrived(&guest, name) > part * expected).await;
        assert!(!is_active(us, name).await, "it had all before it was interrupted");
        match place {
            0 => {
                let killed = kill_leader(demo, us).await;
                demo.restart(&killed).await.expect("it starts again");
            }
            1 => {
                let node = guest.nodes()[0].name.clone();
                guest.fleet().kill(&node).await.expect("killed");
                guest.fleet().start(&node).await.expect("it starts again");
                guest.wait_ready().await.expect("it is ready");
            }
            _ => {
                guest.network().partition("us", name, Cut::default()).expect("cut");
                tokio::time::sleep(CUT).await;
                guest.network().heal();
            }
        }
    }
    wait_until("it is active", async || is_active(us, name).await).await;
    let bytes = arrived(&guest, name);
    stop.cancel();
    let written = writing.await.expect("the writer ended");
    wait_until("both hold the same", async || {
        let (Ok(here), Ok(there)) = (
            us.admin().summarize_namespace("default").await,
            client.admin().summarize_namespace("default").await,
        ) else {
            return false;
        };
        let roots = |summary: &proto::SummarizeNamespaceResponse| {
            let row = |row: &proto::ShardSummary| (row.shard, row.root, row.frontier.clone());
            summary.shards.iter().map(row).collect::<Vec<_>>()
        };
        !here.shards.is_empty() && roots(&here) == roots(&there)
    })
    .await;
    us.admin().remove_region(name).await.expect("removed");
    guest.stop().await;
    bytes - (written * (VALUE_BYTES + 64)) as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeding_that_is_torn_apart_goes_on_where_it_was() {
    let data = tempfile::tempdir().expect("a directory");
    let demo = Demo::launch(DemoConfig {
        data_dir: data.path().canonicalize().expect("a path"),
        wanted: Wanted {
            regions: Some(vec!["us".into()]),
            nodes: Some(3),
            shards: Some(2),
            base_port: None,
        },
        latencies: Latencies::default(),
        program: PathBuf::from(env!("CARGO_BIN_EXE_tombolo")),
    })
    .await
    .expect("the cluster starts");
    demo.wait_ready(READY_PATIENCE).await.expect("it is ready");
    let nodes = demo.layout().nodes_of("us").map(|node| node.client.to_string()).collect();
    let us = connect(nodes).await;
    fill(&us).await;

    let whole = seed(&demo, &us, "ap", 2, None).await;
    let torn = seed(&demo, &us, "eu", 3, Some(whole)).await;
    println!("{whole} bytes in one go, {torn} torn apart: {:.3} times", torn / whole);
    assert!(torn <= 1.05 * whole + FIXED_BYTES, "{torn} bytes arrived, and {whole} in one go");
    demo.stop().await;
}
