//! Every request is sent twice, and every fourth to another region at the same time, while the nodes that lead
//! are killed: each counts once.
//!
//! Real processes and SIGKILL: what survives is what was on disk.

use std::{path::PathBuf, time::Duration};

use futures::future::{join, join_all};
use tokio::time::Instant;
use tombolo_client::{Client, ClientConfig, Error, Keyspace, Mutated, proto};
use tombolo_demo::{
    demo::{Demo, DemoConfig, READY_PATIENCE},
    latency::Latencies,
    layout::Wanted,
};

const REGIONS: [&str; 2] = ["us", "eu"];
const CLIENTS: usize = 8;
/// Of each client.
const REQUESTS: usize = 120;
const COUNTERS: usize = 5;
/// Leaders that are killed, one after the other, in turns of the regions.
const KILLS: usize = 6;
const PATIENCE: Duration = Duration::from_secs(120);

async fn connect(demo: &Demo, region: &str) -> Client {
    let endpoints = demo.layout().nodes_of(region).map(|node| node.client.to_string()).collect();
    let config = ClientConfig { endpoints, deadline: PATIENCE, ..ClientConfig::default() };
    Client::connect(config).await.expect("the region answers")
}

async fn wait_until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Adds one until it is known that it was added.
async fn add(counters: &Keyspace, key: &str, id: proto::RequestId) -> Mutated {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match counters.add(key, 1).request_id(id).await {
            Ok(done) => return done,
            Err(Error::Precondition { detail }) => panic!("refused: {detail:?}"),
            Err(error) => assert!(Instant::now() < deadline, "not answered: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// One client's requests: to its region and again to that, or to both at once and again to both.
async fn send_all(client: &Client, [here, there]: [&Keyspace; 2]) {
    for number in 0..REQUESTS {
        let key = format!("k{}", number % COUNTERS);
        let id = client.next_request_id();
        if number % 4 == 0 {
            let firsts = join(add(here, &key, id), add(there, &key, id)).await;
            let agains = join(add(here, &key, id), add(there, &key, id)).await;
            assert_eq!((firsts.0.dot, firsts.1.dot), (agains.0.dot, agains.1.dot));
        } else {
            let first = add(here, &key, id).await;
            let again = add(here, &key, id).await;
            assert_eq!((first.dot, first.sum), (again.dot, again.sum), "the first answer");
        }
    }
}

/// Kills the node of a region that leads most shards, and starts it again.
async fn kill_leader(demo: &Demo, region: &str, client: &Client) {
    let cluster = client.cluster().await.expect("the region answers");
    let led = |id: u64| cluster.leaders.iter().filter(|it| it.leader_node_id == id).count();
    let nodes = demo.layout().nodes_of(region);
    let node = nodes.max_by_key(|node| led(node.node_id)).expect("a node");
    demo.fleet().kill(&node.name).await.expect("killed");
    tokio::time::sleep(Duration::from_secs(2)).await;
    demo.restart(&node.name).await.expect("it starts again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_are_sent_twice_across_leader_kills_count_once() {
    let data = tempfile::tempdir().expect("a directory");
    let demo = Demo::launch(DemoConfig {
        data_dir: data.path().canonicalize().expect("a path"),
        wanted: Wanted {
            regions: Some(REGIONS.map(String::from).to_vec()),
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
    let [us, eu] = [connect(&demo, "us").await, connect(&demo, "eu").await];
    us.admin().create_namespace("counters", proto::Rule::Counter).await.expect("created");
    let [in_us, in_eu] = [us.namespace("counters"), eu.namespace("counters")];
    wait_until("eu knows the namespace", async || in_eu.get("k0").await.is_ok()).await;

    let clients = (0..CLIENTS).map(|number| match number % 2 {
        0 => send_all(&us, [&in_us, &in_eu]),
        _ => send_all(&eu, [&in_eu, &in_us]),
    });
    let kills = async {
        for kill in 0..KILLS {
            let client = [&us, &eu][kill % 2];
            kill_leader(&demo, REGIONS[kill % 2], client).await;
        }
    };
    join(join_all(clients), kills).await;

    let expected = i64::try_from(CLIENTS * REQUESTS / COUNTERS).expect("it fits");
    for counters in [&in_us, &in_eu] {
        for number in 0..COUNTERS {
            let key = format!("k{number}");
            let mut sum = 0;
            wait_until(&format!("{key} has {expected}"), async || {
                sum = counters.get(key.clone()).await.map_or(sum, |got| got.counter());
                assert!(sum <= expected + i64::try_from(CLIENTS * REQUESTS).unwrap(), "{sum}");
                sum == expected
            })
            .await;
        }
    }
    demo.stop().await;
}
