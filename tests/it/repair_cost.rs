//! What comparing and repairing cost, in bytes exchanged. `scripts/repair-cost` runs it at full size.
//!
//! Latencies are printed and decide nothing.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use tombolo_client::Client;

use crate::support::{Cluster, metric, wait_until, wait_within};

const REGIONS: [(&str, usize); 2] = [("us", 1), ("eu", 1)];
const KIB: f64 = 1024.0;
const MIB: f64 = 1024.0 * KIB;
const VALUE_BYTES: usize = 256;
/// Puts in one commit.
const BATCH: usize = 128;
/// Commits under way at a time.
const COMMITS: usize = 16;

/// Keys that both regions hold, unless the environment says otherwise.
fn keys_of_both() -> usize {
    let named = std::env::var("TOMBOLO_REPAIR_KEYS").ok();
    named.map_or(20_000, |number| number.parse().expect("TOMBOLO_REPAIR_KEYS is a number"))
}

async fn start() -> Cluster {
    Cluster::start_configured(&REGIONS, 1, &[], |config| {
        config.replication.change_log_bytes = 1 << 10;
        // Only what the test asks for is to be counted.
        config.replication.repair_interval = Duration::from_secs(3600);
        // Batches of writes are large beside the least log.
        config.limits.max_message_bytes = 16 << 20;
    })
    .await
}

/// Puts `numbers`, and answers the bytes of keys and values.
async fn put_all(client: &Client, numbers: impl Iterator<Item = usize>, text: &str) -> f64 {
    let numbers: Vec<usize> = numbers.collect();
    let value = text.repeat(VALUE_BYTES / text.len());
    let key = |number: &usize| format!("key-{number:07}");
    let commits = numbers.chunks(BATCH).map(|numbers| {
        let commit = client.namespace("default").commit();
        numbers.iter().fold(commit, |commit, number| commit.put(key(number), value.clone()))
    });
    let mut commits = stream::iter(commits.map(IntoFuture::into_future)).buffer_unordered(COMMITS);
    while let Some(committed) = commits.next().await {
        committed.expect("committed");
    }
    let bytes: usize = numbers.iter().map(|number| key(number).len() + value.len()).sum();
    bytes as f64
}

/// Bytes that repairs and comparisons exchanged, in both regions.
async fn exchanged(cluster: &Cluster) -> f64 {
    let mut bytes = 0.0;
    for member in &cluster.members {
        bytes += metric(member, "tombolo_repair_exchanged_bytes_total").await;
    }
    bytes
}

async fn roots(clients: [&Client; 2]) -> BTreeSet<(Vec<u8>, u64, bool)> {
    let mut roots = BTreeSet::new();
    for client in clients {
        for row in client.admin().summarize_namespace("default").await.expect("summaries").shards {
            roots.insert((row.frontier.to_vec(), row.root, row.repairing));
        }
    }
    roots
}

/// Waits however long the size takes.
async fn wait_until_equal(clients: [&Client; 2]) {
    for _ in 0..30 {
        let mut tries = 0;
        wait_until("looked often enough", async || {
            tries += 1;
            tries > 2500 || roots(clients).await.len() == 1
        })
        .await;
        if roots(clients).await.len() == 1 {
            return;
        }
    }
    panic!("the regions did not become equal");
}

async fn wait_until_trimmed(client: &Client) {
    wait_until("the change log was trimmed", async || {
        let links = client.admin().list_links(None).await.expect("links").links;
        links.iter().all(|link| link.unacknowledged_bytes <= 1 << 10)
    })
    .await;
}

/// Writes one key after the other until `end`; answers what 99 of 100 writes took at most.
async fn slowest_percent(client: &Client, end: impl Future<Output = ()>) -> Duration {
    let mut took = Vec::new();
    let writing = async {
        loop {
            let began = Instant::now();
            client.namespace("default").put("latency", "of a local write").await.expect("written");
            took.push(began.elapsed());
        }
    };
    // Both may be dropped: what was written is written.
    tokio::select! {
        () = writing => {}
        () = end => {}
    }
    took.sort_unstable();
    took[(took.len() * 99 / 100).min(took.len() - 1)]
}

/// Stops eu, lets `us` write, and starts eu again.
async fn write_while_away(
    cluster: &mut Cluster,
    us: &Client,
    numbers: impl Iterator<Item = usize>,
) -> f64 {
    cluster.members[1].stop().await;
    let bytes = put_all(us, numbers, "away").await;
    wait_until_trimmed(us).await;
    cluster.members[1].start().await;
    cluster.wait_ready().await;
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn comparing_and_healing_cost_what_differs() {
    let mut cluster = start().await;
    let us = cluster.client("us").await;
    put_all(&us, 0..keys_of_both(), "before").await;
    let eu = cluster.client("eu").await;
    wait_until_equal([&us, &eu]).await;

    let before = exchanged(&cluster).await;
    let same = us.admin().list_differences("eu", "default", 0).await.unwrap().shards;
    assert!(same[0].same_point && same[0].keys.is_empty(), "{same:?}");
    let cost = exchanged(&cluster).await - before;
    assert!(cost > 0.0 && cost <= 64.0 * KIB, "{cost} bytes told that both are equal");

    // Counters begin anew in a node that starts, so only what us exchanged before counts.
    let before = metric(&cluster.members[0], "tombolo_repair_exchanged_bytes_total").await;
    // More than the change log's budget, in one value.
    cluster.members[1].stop().await;
    us.namespace("default").put("key-0000007", "w".repeat(4 << 10)).await.unwrap();
    wait_until_trimmed(&us).await;
    cluster.members[1].start().await;
    cluster.wait_ready().await;
    let eu = cluster.client("eu").await;
    wait_until_equal([&us, &eu]).await;
    let cost = exchanged(&cluster).await - before;
    assert!(metric(&cluster.members[1], "tombolo_repair_records_total").await >= 1.0);
    assert!(cost <= 256.0 * KIB, "{cost} bytes healed one key");

    let before = metric(&cluster.members[0], "tombolo_repair_exchanged_bytes_total").await;
    let many = (keys_of_both() / 8).min(10_000);
    let step = keys_of_both() / many;
    let quiet = slowest_percent(&eu, tokio::time::sleep(Duration::from_secs(3))).await;
    wait_until_equal([&us, &eu]).await;
    let differing =
        write_while_away(&mut cluster, &us, (0..many).map(|number| number * step)).await;
    let eu = cluster.client("eu").await;
    // It makes way for the writes, for five minutes at most.
    let repaired = wait_within(Duration::from_secs(600), "all of it came by repair", async || {
        metric(&cluster.members[1], "tombolo_repair_records_total").await >= many as f64
    });
    let busy = slowest_percent(&eu, repaired).await;
    println!(
        "99 of 100 local writes within {quiet:?} before and {busy:?} during the repair: {:.2} times",
        busy.as_secs_f64() / quiet.as_secs_f64()
    );
    wait_until_equal([&us, &eu]).await;
    let cost = exchanged(&cluster).await - before;
    let bound = 2.0 * differing + 2.0 * MIB;
    assert!(metric(&cluster.members[1], "tombolo_repair_records_total").await >= many as f64);
    assert!(cost <= bound, "{cost} bytes healed {many} keys of {differing} bytes");
    println!("{many} keys of {differing} bytes healed with {cost} bytes");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_partition_costs_what_was_written_in_it() {
    let mut cluster = start().await;
    let us = cluster.client("us").await;
    let base = keys_of_both().min(100_000);
    put_all(&us, 0..base, "before").await;
    let eu = cluster.client("eu").await;
    wait_until_equal([&us, &eu]).await;

    // As many writes a side as there are keys, half of them to new keys, each region alone.
    cluster.members[1].stop().await;
    let mut differing = put_all(&us, base / 2..base + base / 2, "only in us").await;
    wait_until_trimmed(&us).await;
    cluster.members[0].stop().await;
    cluster.members[1].start().await;
    wait_until("eu is ready", async || {
        cluster.members[1].node.as_ref().is_some_and(tombolo::node::Node::is_ready)
    })
    .await;
    let eu = cluster.client("eu").await;
    let theirs = (0..base / 2).chain(2 * base..2 * base + base / 2);
    differing += put_all(&eu, theirs, "only in eu").await;
    wait_until_trimmed(&eu).await;
    cluster.members[0].start().await;
    cluster.wait_ready().await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    wait_until_equal([&us, &eu]).await;
    let cost = exchanged(&cluster).await;
    // Trees and digests are a fixed part, which a small history does not outweigh.
    let fixed = 2.0 * MIB;
    assert!(cost <= 1.5 * differing + fixed, "{cost} bytes exchanged for {differing}");
    println!("{base} writes a side, {differing} bytes, healed with {cost} bytes");
    cluster.stop().await;
}
