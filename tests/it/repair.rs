//! What happens when a region has been away for longer than the change log reaches back.

use std::time::Duration;

use tombolo::config::Config;
use tombolo_client::{Client, proto};

use crate::support::{Cluster, metric, values, wait_until};

const REGIONS: [(&str, usize); 2] = [("us", 1), ("eu", 1)];
/// Far less than the tests write while a region is away.
const LOG_BYTES: u64 = 1 << 10;

fn small_log(config: &mut Config) {
    config.replication.change_log_bytes = LOG_BYTES;
    config.replication.repair_interval = Duration::from_secs(2);
}

/// Both regions write alone, longer than their change logs reach; after that both hold the same,
/// deletions and conflicts included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn regions_that_fell_off_each_others_change_logs_repair_by_themselves() {
    let mut cluster = Cluster::start_configured(&REGIONS, 2, &[], small_log).await;
    let us = cluster.client("us").await;
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    for number in 0..100 {
        for namespace in ["default", "carts"] {
            us.namespace(namespace).put(format!("k{number}"), "before").await.unwrap();
        }
    }
    let eu = cluster.client("eu").await;
    wait_until("eu has all", async || {
        values(&eu, "default").await.len() == 100 && values(&eu, "carts").await.len() == 100
    })
    .await;

    // Alone in turn: each overwrites, deletes and adds.
    for (here, there, name) in [(0, 1, "us"), (1, 0, "eu")] {
        cluster.members[there].stop().await;
        let client = cluster.client(name).await;
        for namespace in ["default", "carts"] {
            let keys = client.namespace(namespace);
            for number in 0..100 {
                let key = format!("k{number}");
                match number % 5 {
                    0 => keys.put(key, format!("{name} overwrote this value")).await.unwrap(),
                    1 if here == 0 => keys.delete(key).await.unwrap(),
                    2 if here == 1 => keys.delete(key).await.unwrap(),
                    _ => keys.put(format!("{name}{number}"), "added while alone").await.unwrap(),
                };
            }
        }
        wait_until("the change log was trimmed", async || {
            let links = client.admin().list_links(None).await.unwrap().links;
            let bytes = links.iter().map(|link| link.unacknowledged_bytes);
            let most = bytes.max().unwrap_or(0);
            most <= LOG_BYTES
        })
        .await;
        if here == 0 {
            cluster.members[here].stop().await;
        }
        cluster.members[there].start().await;
    }
    cluster.wait_ready().await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    wait_until("both regions hold the same", async || {
        let mut same = true;
        for namespace in ["default", "carts"] {
            let (here, there) = (values(&us, namespace).await, values(&eu, namespace).await);
            same &= here == there && here.len() == 180;
        }
        same
    })
    .await;
    for namespace in ["default", "carts"] {
        wait_until("the trees say so", async || {
            let here = us.admin().summarize_namespace(namespace).await.unwrap().shards;
            let there = eu.admin().summarize_namespace(namespace).await.unwrap().shards;
            let facts = |rows: Vec<proto::ShardSummary>| -> Vec<_> {
                rows.into_iter().map(|row| (row.frontier, row.root, row.repairing)).collect()
            };
            let (here, there) = (facts(here), facts(there));
            here == there && here.iter().all(|(_, root, repairing)| *root != 0 && !repairing)
        })
        .await;
        let held = values(&us, namespace).await;
        let find = |key: &str| held.iter().find(|(held, _)| held == key.as_bytes());
        assert_eq!(find("k1"), None, "what one region deleted stays deleted");
        assert_eq!(find("k2"), None);
        let both = find("k5").expect("both overwrote it").1.len();
        assert_eq!(both, if namespace == "carts" { 2 } else { 1 });
    }
    let repaired = metric(&cluster.members[0], "tombolo_repair_records_total").await
        + metric(&cluster.members[1], "tombolo_repair_records_total").await;
    assert!(repaired > 100.0, "{repaired} records came by repair");

    // Streams go on after it.
    us.namespace("default").put("after", "repair").await.unwrap();
    eu.namespace("default").put("after2", "repair").await.unwrap();
    wait_until("changes stream again", async || {
        let streams = async |client: &Client| {
            let links = client.admin().list_links(None).await.unwrap().links;
            links.iter().all(|link| link.phase() == proto::LinkPhase::Streaming)
        };
        eu.namespace("default").get("after").await.unwrap().value().is_some()
            && us.namespace("default").get("after2").await.unwrap().value().is_some()
            && streams(&us).await
            && streams(&eu).await
    })
    .await;
    wait_until("no tombstone stays", async || {
        let kept = async |client: &Client| {
            client.admin().list_tombstones(None).await.unwrap().tombstones.len()
        };
        kept(&us).await + kept(&eu).await == 0
    })
    .await;
    cluster.stop().await;
}

/// What exists here only is told while the other region is away, and nothing after it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_at_risk_are_named_until_another_region_has_them() {
    let mut cluster = Cluster::start(&REGIONS, 2).await;
    let us = cluster.client("us").await;
    us.namespace("default").put("safe", "1").ack_regions(1).await.unwrap();
    cluster.members[1].stop().await;
    for number in 0..10 {
        us.namespace("default").put(format!("alone{number}"), "1").await.unwrap();
    }
    us.namespace("default").delete("safe").await.unwrap();
    let at_risk = us.admin().list_at_risk(Some("default"), 100).await.unwrap().shards;
    assert_eq!(at_risk.iter().map(|row| row.count).sum::<u64>(), 11, "{at_risk:?}");
    let keys: Vec<_> = at_risk.iter().flat_map(|row| &row.writes).collect();
    assert_eq!(keys.iter().filter(|write| write.is_delete).count(), 1);
    assert!(keys.iter().any(|write| write.key == "alone7"));

    cluster.members[1].start().await;
    wait_until("nothing is at risk", async || {
        us.admin().list_at_risk(Some("default"), 1).await.unwrap().shards.is_empty()
    })
    .await;
    // Asking for a repair of regions that are equal finds them so.
    let asked = us.admin().start_repair("eu", Some("default")).await.unwrap();
    assert_eq!(asked.links, 2);
    wait_until("the comparison found nothing", async || {
        metric(&cluster.members[0], "tombolo_repairs_total{peer_region=\"eu\",result=\"equal\"}")
            .await
            >= 2.0
    })
    .await;
    let differences = us.admin().list_differences("eu", "default", 0).await.unwrap();
    assert_eq!(differences.shards.len(), 2, "{differences:?}");
    assert!(differences.shards.iter().all(|shard| shard.same_point && shard.keys.is_empty()));
    cluster.stop().await;
}
