//! What several regions promise: both write, all converge, a token is honoured.

use std::time::Duration;

use tombolo_client::proto;
use tombolo_client::{Consistency, Error};

use crate::support::{Cluster, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_region_writes_and_all_converge() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1), ("ap", 1)], 3).await;
    let us = cluster.client("us").await.namespace("default");
    let eu = cluster.client("eu").await.namespace("default");
    let ap = cluster.client("ap").await.namespace("default");
    for number in 0..40 {
        us.put(format!("u{number}"), "us").await.unwrap();
        eu.put(format!("e{number}"), "eu").await.unwrap();
        ap.put(format!("shared{}", number % 5), "ap").await.unwrap();
        us.put(format!("shared{}", number % 5), "us").await.unwrap();
    }
    wait_until("three regions hold the same 85 keys", async || {
        let mut seen = Vec::new();
        for keys in [&us, &eu, &ap] {
            let entries = keys.scan().collect().await.unwrap();
            let versions: Vec<_> =
                entries.iter().map(|entry| (entry.key.clone(), entry.versions.clone())).collect();
            seen.push(versions);
        }
        seen[0].len() == 85 && seen[0] == seen[1] && seen[1] == seen[2]
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_makes_the_first_read_in_another_region_see_the_write() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let us = cluster.client("us").await;
    let session = us.session();
    let eu = cluster.client("eu").await.namespace("default").with_session(&session);
    let us = us.namespace("default").with_session(&session);
    for number in 0..30 {
        us.put("k", number.to_string()).await.unwrap();
        let got = eu.get("k").consistency(Consistency::Causal).await.unwrap();
        assert_eq!(got.value().unwrap().as_ref(), number.to_string().as_bytes());
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn siblings_of_two_regions_are_kept_and_a_context_resolves_them() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let client = cluster.client("us").await;
    client.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    let us = client.namespace("carts");
    let eu_client = cluster.client("eu").await;
    let eu = eu_client.namespace("carts");
    wait_until("eu knows the namespace", async || eu.get("k").await.is_ok()).await;

    // Each region writes while the other is away.
    cluster.members[1].stop().await;
    us.put("k", "from us").await.unwrap();
    cluster.members[0].stop().await;
    cluster.members[1].start().await;
    wait_until("eu takes writes alone", async || {
        eu.put("k", "from eu").deadline(Duration::from_secs(2)).await.is_ok()
    })
    .await;
    cluster.members[0].start().await;

    wait_until("both regions show both values", async || {
        let (there, here) = (eu.get("k").await, us.get("k").await);
        let count =
            |got: Result<tombolo_client::Got, Error>| got.map_or(0, |got| got.versions.len());
        count(there) == 2 && count(here) == 2
    })
    .await;
    let seen = eu.get("k").await.unwrap();
    eu.put("k", "both").context(seen.context).await.unwrap();
    wait_until("us shows one value", async || us.get("k").await.unwrap().versions.len() == 1).await;
    assert_eq!(us.get("k").await.unwrap().value().unwrap().as_ref(), b"both");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ack_regions_waits_for_the_other_region_or_answers_with_the_dot() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let us = cluster.client("us").await.namespace("default");
    us.put("k", "1").ack_regions(1).await.unwrap();
    let eu = cluster.client("eu").await.namespace("default");
    let there = eu.get("k").consistency(Consistency::Local).await.unwrap();
    assert_eq!(there.value().unwrap().as_ref(), b"1");

    cluster.members[1].stop().await;
    let pending =
        us.put("k", "2").ack_regions(1).deadline(Duration::from_secs(2)).await.unwrap_err();
    assert_eq!(pending.reason(), Some("ACK_REGIONS_PENDING"), "{pending:?}");
    let metadata = &pending.detail().unwrap().metadata;
    assert!(metadata.contains_key("dot"));
    assert_eq!((metadata["missing"].as_str(), metadata["behind"].as_str()), ("eu", "eu=1"));
    assert_eq!(us.get("k").await.unwrap().value().unwrap().as_ref(), b"2");
    let too_many = us.put("k", "3").ack_regions(2).await.unwrap_err();
    assert_eq!(too_many.reason(), Some("ACK_REGIONS_TOO_MANY"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn namespaces_are_created_from_any_region_and_deleted_everywhere() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 4).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let created = eu.admin().create_namespace("orders", proto::Rule::Lww).await.unwrap();
    eu.namespace("orders").put("k", "1").await.unwrap();
    let again = us.admin().create_namespace("orders", proto::Rule::Lww).await.unwrap_err();
    assert_eq!(again.reason(), Some("NAMESPACE_EXISTS"));
    let listed = us.admin().list_namespaces().await.unwrap();
    let names: Vec<_> = listed.iter().map(|held| held.name.as_str()).collect();
    assert_eq!(names, ["default", "orders"]);
    let keys = us.namespace("orders");
    wait_until("the write arrives in us", async || {
        keys.get("k").await.is_ok_and(|got| got.value().is_some())
    })
    .await;

    us.admin().delete_namespace("orders", None).await.unwrap();
    let gone = us.namespace("orders").get("k").await.unwrap_err();
    assert_eq!(gone.reason(), Some("NAMESPACE_NOT_FOUND"));
    let anew = us.admin().create_namespace("orders", proto::Rule::Lww).await.unwrap();
    assert!(created.id < anew.id, "numbers are never reused");
    assert!(us.namespace("orders").get("k").await.unwrap().value().is_none());
    cluster.stop().await;
}

/// The bridge partition of Jepsen: us - eu - ap, and no path between us and ap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_in_the_middle_relays_what_the_others_cannot_exchange() {
    let regions = [("us", 1), ("eu", 1), ("ap", 1)];
    let cluster = Cluster::start_with_cuts(&regions, 2, &[("us", "ap")]).await;
    let mut clients = Vec::new();
    for (name, _) in regions {
        clients.push((name, cluster.client(name).await));
    }
    for number in 0..20 {
        for (name, client) in &clients {
            let keys = client.namespace("default");
            keys.put(format!("{name}{number}"), *name).await.unwrap();
            keys.put(format!("shared{number}"), *name).await.unwrap();
        }
    }
    wait_until("three regions hold the same 80 keys", async || {
        let mut seen = Vec::new();
        for (_, client) in &clients {
            let entries = client.namespace("default").scan().collect().await.unwrap();
            let versions: Vec<_> =
                entries.iter().map(|entry| (entry.key.clone(), entry.versions.clone())).collect();
            seen.push(versions);
        }
        seen[0].len() == 80 && seen[0] == seen[1] && seen[1] == seen[2]
    })
    .await;
    wait_until("the trees tell the same as the data", async || {
        let mut summaries = Vec::new();
        for (_, client) in &clients {
            let shards = client.admin().summarize_namespace("default").await.unwrap().shards;
            let rows = shards.into_iter().map(|row| (row.frontier, row.root));
            summaries.push(rows.collect::<Vec<_>>());
        }
        assert!(summaries[0].iter().all(|(_, root)| *root != 0));
        summaries[0].len() == 2 && summaries[0] == summaries[1] && summaries[1] == summaries[2]
    })
    .await;

    // Written while the relay is settled: each change crosses each link once. The regions at the
    // ends get their own 40 + 40 from the middle, which gets 40 from each.
    let received = async |client: &tombolo_client::Client, peer: &str| {
        let links = client.admin().list_links(Some(peer)).await.unwrap().links;
        links
            .iter()
            .filter(|link| link.namespace == "default")
            .map(|link| link.received_events)
            .sum::<u64>()
    };
    let before = [received(&clients[0].1, "eu").await, received(&clients[2].1, "eu").await];
    for number in 0..20 {
        for (name, client) in &clients {
            client.namespace("default").put(format!("{name}{number}"), "again").await.unwrap();
        }
    }
    wait_until("the ends have what each other wrote", async || {
        received(&clients[0].1, "eu").await >= before[0] + 40
            && received(&clients[2].1, "eu").await >= before[1] + 40
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    for (at, place) in [(0, 0), (1, 2)] {
        assert_eq!(
            received(&clients[place].1, "eu").await,
            before[at] + 40,
            "no change came twice"
        );
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tombstones_go_when_every_region_has_them_and_say_whom_they_wait_for_until_then() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let us = cluster.client("us").await;
    let (keys, eu) = (us.namespace("default"), cluster.client("eu").await);
    for number in 0..20 {
        keys.put(format!("k{number}"), "v").await.unwrap();
    }
    wait_until("eu has the keys", async || {
        eu.namespace("default").scan().collect().await.is_ok_and(|found| found.len() == 20)
    })
    .await;
    cluster.members[1].stop().await;
    for number in 0..20 {
        keys.delete(format!("k{number}")).await.unwrap();
    }
    let kept = async |client: &tombolo_client::Client| {
        let rows = client.admin().list_tombstones(Some("default")).await.unwrap().tombstones;
        let waits: Vec<String> =
            rows.iter().flat_map(|row| row.waits_for_regions.clone()).collect();
        (rows.iter().map(|row| row.count).sum::<u64>(), waits)
    };
    // Longer than collection takes when nothing is in its way.
    tokio::time::sleep(Duration::from_secs(7)).await;
    let (count, waits) = kept(&us).await;
    assert_eq!(count, 20);
    assert!(waits.iter().all(|region| region == "eu") && !waits.is_empty(), "{waits:?}");

    cluster.members[1].start().await;
    cluster.wait_ready().await;
    let eu = cluster.client("eu").await;
    wait_until("no region keeps a tombstone", async || {
        kept(&us).await.0 == 0 && kept(&eu).await.0 == 0
    })
    .await;
    for client in [&us, &eu] {
        assert!(client.namespace("default").scan().collect().await.unwrap().is_empty());
        let shards = client.admin().summarize_namespace("default").await.unwrap().shards;
        assert_eq!(shards.iter().map(|row| row.root).collect::<Vec<_>>(), [0, 0]);
    }
    // A key that was collected can be written again, everywhere.
    eu.namespace("default").put("k1", "again").await.unwrap();
    wait_until("us sees it", async || {
        keys.get("k1").await.is_ok_and(|got| got.value().is_some_and(|value| value == "again"))
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_value_is_hidden_at_once_and_leaves_nothing_behind_anywhere() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let keys = us.namespace("default");
    for number in 0..20 {
        keys.put(format!("k{number}"), "v").ttl(Duration::from_secs(4)).await.unwrap();
    }
    keys.put("stays", "v").await.unwrap();
    keys.put("renewed", "v").ttl(Duration::from_secs(4)).await.unwrap();
    keys.put("renewed", "w").await.unwrap();
    let shown = async |client: &tombolo_client::Client| {
        client.namespace("default").scan().collect().await.map_or(0, |found| found.len())
    };
    wait_until("eu shows all of them", async || shown(&eu).await == 22).await;
    wait_until("both hide what has expired", async || {
        shown(&us).await == 2 && shown(&eu).await == 2
    })
    .await;
    wait_until("neither tombstones nor expired values are left", async || {
        let mut left = 0;
        for client in [&us, &eu] {
            left += client.admin().list_tombstones(None).await.unwrap().tombstones.len();
        }
        let roots = async |client: &tombolo_client::Client| {
            let shards = client.admin().summarize_namespace("default").await.unwrap().shards;
            shards.into_iter().map(|row| (row.frontier, row.root)).collect::<Vec<_>>()
        };
        let (here, there) = (roots(&us).await, roots(&eu).await);
        left == 0 && here == there && here.len() == 2
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_link_brings_nothing_until_it_is_resumed_even_over_a_restart() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let phase = async |client: &tombolo_client::Client| {
        let links = client.admin().list_links(None).await.unwrap().links;
        let mut phases: Vec<_> = links.iter().map(proto::Link::phase).collect();
        phases.dedup();
        phases
    };
    wait_until("links stream", async || phase(&us).await == [proto::LinkPhase::Streaming]).await;
    us.admin().pause_link("eu").await.unwrap();
    wait_until("us is paused", async || phase(&us).await == [proto::LinkPhase::Paused]).await;
    eu.namespace("default").put("k", "from eu").await.unwrap();
    us.namespace("default").put("l", "from us").await.unwrap();
    wait_until("the other direction goes on", async || {
        eu.namespace("default").get("l").await.unwrap().value().is_some()
    })
    .await;
    cluster.members[0].stop().await;
    cluster.members[0].start().await;
    cluster.wait_ready().await;
    let us = cluster.client("us").await;
    wait_until("us is paused again", async || phase(&us).await == [proto::LinkPhase::Paused]).await;
    assert!(us.namespace("default").get("k").await.unwrap().value().is_none());
    us.admin().limit_link("eu", 1 << 20).await.unwrap();
    us.admin().resume_link("eu").await.unwrap();
    wait_until("us has it", async || {
        us.namespace("default").get("k").await.unwrap().value().is_some()
    })
    .await;
    let unknown = us.admin().pause_link("mars").await.unwrap_err();
    assert_eq!(unknown.reason(), Some("REGION_NOT_FOUND"));
    cluster.stop().await;
}
