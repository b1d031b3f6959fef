//! Conflicts as people meet them: the same in every region, shown with all that was lost, put back or
//! settled without overwriting what nobody has seen, and forgotten in time.

use std::time::{Duration, SystemTime};

use futures::StreamExt;
use tombolo_client::{Client, ConflictFilter, Dot, Resolution, WatchEvent, proto};

use crate::support::{Cluster, PATIENCE, Pair, apart, metric, wait_until};

const REGIONS: [(&str, usize); 2] = [("us", 1), ("eu", 1)];

/// Both regions write these keys of a namespace, us first, without having heard of each other.
async fn write_apart(pair: Pair<'_>, namespace: &str, keys: &[&str]) {
    apart(pair, async || {
        for (name, client) in pair {
            for key in keys {
                let value = format!("{key} of {name}");
                client.namespace(namespace).put(*key, value).await.expect("written");
            }
        }
    })
    .await;
}

async fn list(client: &Client, namespace: &str) -> Vec<proto::Conflict> {
    let filter = ConflictFilter::default();
    client.conflicts(namespace).list(&filter, 1000).await.expect("listed").rows
}

async fn ids(client: &Client, namespace: &str) -> Vec<String> {
    let mut ids: Vec<_> = list(client, namespace).await.into_iter().map(|row| row.id).collect();
    ids.sort_unstable();
    ids
}

async fn wait_noted(pair: Pair<'_>, namespace: &str, count: usize) {
    wait_until("both regions have noted the conflicts", async || {
        let mut noted = true;
        for (_, client) in pair {
            noted &= list(client, namespace).await.len() == count;
        }
        noted
    })
    .await;
}

async fn value(client: &Client, namespace: &str, key: &str) -> String {
    let got = client.namespace(namespace).get(key).await.expect("read");
    String::from_utf8(got.value().cloned().unwrap_or_default().to_vec()).expect("text")
}

fn data(version: Option<&proto::Version>) -> String {
    match version.and_then(|version| version.value.as_ref()?.kind.as_ref()) {
        Some(proto::value::Kind::Data(data)) => String::from_utf8(data.to_vec()).expect("text"),
        Some(_) | None => "-".to_owned(),
    }
}

fn origin(version: Option<&proto::Version>) -> &str {
    version.map_or("", |version| version.origin_region.as_str())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_is_the_same_in_both_regions_and_its_loser_can_be_put_back_everywhere() {
    let cluster = Cluster::start(&REGIONS, 3).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let pair = [("us", &us), ("eu", &eu)];
    write_apart(pair, "default", &["a", "b", "cart"]).await;
    wait_noted(pair, "default", 3).await;
    assert_eq!(ids(&us, "default").await, ids(&eu, "default").await);
    for row in list(&us, "default").await {
        assert_eq!((origin(row.winner.as_ref()), origin(row.loser.as_ref())), ("eu", "us"));
        assert_eq!(row.cause(), proto::ConflictCause::Rule);
        assert_eq!(data(row.loser.as_ref()), "-", "lists carry no values");
    }

    // Filters, and pages over all shards.
    let of = async |filter: ConflictFilter| {
        eu.conflicts("default").list(&filter, 1000).await.unwrap().rows.len()
    };
    let filter = ConflictFilter::default();
    assert_eq!(of(ConflictFilter { key_prefix: "ca".into(), ..filter.clone() }).await, 1);
    assert_eq!(of(ConflictFilter { origin_region: Some("us".into()), ..filter.clone() }).await, 3);
    assert_eq!(of(ConflictFilter { origin_region: Some("eu".into()), ..filter.clone() }).await, 0);
    let hour = Duration::from_secs(3600);
    let ago = SystemTime::now().checked_sub(hour);
    assert_eq!(of(ConflictFilter { since: ago, ..filter.clone() }).await, 3);
    let ahead = SystemTime::now().checked_add(hour);
    assert_eq!(of(ConflictFilter { since: ahead, ..filter.clone() }).await, 0);
    let first = eu.conflicts("default").list(&filter, 2).await.unwrap();
    assert_eq!((first.rows.len(), first.more), (2, true));
    let times: Vec<_> = list(&eu, "default").await.iter().map(|row| row.resolve_time).collect();
    assert!(times.windows(2).all(|two| {
        let at = |time: Option<prost_types::Timestamp>| time.map(|at| (at.seconds, at.nanos));
        at(two[0]) >= at(two[1])
    }));

    // Shown in either region, put back in one, seen in both.
    let cart = list(&us, "default").await.into_iter().find(|row| row.key == "cart").unwrap().id;
    let shown = us.conflicts("default").get(&cart).await.unwrap();
    let conflict = shown.conflict.clone().unwrap();
    assert_eq!(data(conflict.loser.as_ref()), "cart of us");
    assert_eq!(data(conflict.winner.as_ref()), "cart of eu");
    assert_eq!(data(shown.current.first()), "cart of eu");
    assert_eq!((shown.rule(), shown.unreachable.len()), (proto::Rule::Lww, 0));
    us.conflicts("default").restore(&cart, shown.context.clone()).await.unwrap();
    assert_eq!(value(&us, "default", "cart").await, "cart of us");
    wait_until("eu has what was restored", async || {
        value(&eu, "default", "cart").await == "cart of us"
    })
    .await;
    let settled = eu.conflicts("default").get(&cart).await.unwrap();
    let winner = settled.conflict.unwrap().winner;
    assert_eq!(data(winner.as_ref()), "-", "the key does not hold it any more");
    assert_eq!(list(&eu, "default").await.len(), 3, "what was replaced knowingly is no loss");

    // Not over what came since.
    eu.namespace("default").put("cart", "newer").await.unwrap();
    let refused = eu.conflicts("default").restore(&cart, settled.context).await.unwrap_err();
    assert_eq!(refused.reason(), Some("CONFLICT_MOVED"));
    assert_eq!(value(&eu, "default", "cart").await, "newer");
    let blind = eu.conflicts("default").restore(&cart, "").await.unwrap_err();
    assert_eq!(blind.reason(), Some("CONFLICT_MOVED"), "who has seen nothing overwrites nothing");

    let stats = eu.conflicts("default").stats().await.unwrap().stats;
    assert_eq!(stats.len(), 1);
    let row = &stats[0];
    assert_eq!((row.winner_region.as_str(), row.loser_region.as_str()), ("eu", "us"));
    assert_eq!(row.count, 3);
    let bytes: u64 = list(&eu, "default").await.iter().map(|row| row.bytes).sum();
    assert_eq!(row.bytes, bytes);
    assert_eq!(metric(&cluster.members[1], "tombolo_ledger_entries").await, 3.0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_deletion_is_restored_as_a_deletion_and_a_repeat_is_answered_as_before() {
    let cluster = Cluster::start(&REGIONS, 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let pair = [("us", &us), ("eu", &eu)];
    us.namespace("default").put("k", "old").await.unwrap();
    wait_until("eu has it", async || value(&eu, "default", "k").await == "old").await;
    apart(pair, async || {
        us.namespace("default").delete("k").await.unwrap();
        eu.namespace("default").put("k", "kept").await.unwrap();
    })
    .await;
    wait_noted(pair, "default", 1).await;
    let shown = eu.conflicts("default").get(&ids(&us, "default").await[0]).await.unwrap();
    let conflict = shown.conflict.unwrap();
    assert!(conflict.loser_is_delete);

    let address = format!("http://{}", cluster.addresses("eu")[0]);
    let mut node =
        proto::conflict_service_client::ConflictServiceClient::connect(address).await.unwrap();
    let request = proto::RestoreConflictRequest {
        namespace: "default".into(),
        id: conflict.id,
        request_id: Some(eu.next_request_id()),
        context: shown.context,
    };
    let first = node.restore_conflict(request.clone()).await.unwrap().into_inner();
    eu.namespace("default").put("k", "anew").await.unwrap();
    let again = node.restore_conflict(request).await.unwrap().into_inner();
    assert_eq!(first.dot, again.dot, "applied once");
    wait_until("us has what was written last", async || value(&us, "default", "k").await == "anew")
        .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn siblings_wait_in_a_queue_until_somebody_settles_what_they_have_seen() {
    let cluster = Cluster::start(&REGIONS, 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let pair = [("us", &us), ("eu", &eu)];
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    wait_until("eu knows it", async || eu.namespace("carts").get("k").await.is_ok()).await;
    write_apart(pair, "carts", &["a", "b", "c"]).await;
    let open = async |client: &Client| client.conflicts("carts").list_open("", 99).await.unwrap();
    wait_until("both regions list three open keys", async || {
        open(&us).await.rows.len() == 3 && open(&eu).await.rows.len() == 3
    })
    .await;
    let (here, there) = (open(&us).await.rows, open(&eu).await.rows);
    let keys = |rows: &[proto::OpenConflict]| rows.iter().map(|row| row.key.clone()).collect();
    let (here_keys, there_keys): (Vec<_>, Vec<_>) = (keys(&here), keys(&there));
    assert_eq!(here_keys, ["a", "b", "c"], "in the order in which they were written");
    assert_eq!(here_keys, there_keys);
    let paged = eu.conflicts("carts").list_open("", 2).await.unwrap();
    assert_eq!((paged.rows.len(), paged.more), (2, true));
    assert_eq!(eu.conflicts("carts").list_open("b", 9).await.unwrap().rows.len(), 1);

    let conflicts = eu.conflicts("carts");
    let (row, shown) = (&there[0], &there[0].context);
    let of_us = row.versions.iter().find(|version| version.origin_region == "us").unwrap();
    let chosen = Dot::from(of_us.dot.unwrap());
    let stranger = Dot { region: 1, incarnation: 1, seq: 9999 };
    let wrong = conflicts.resolve("a", shown, Resolution::Choose(stranger)).await.unwrap_err();
    assert_eq!(wrong.reason(), Some("REQUEST_INVALID"));
    conflicts.resolve("a", shown, Resolution::Choose(chosen)).await.unwrap();
    for late in [Resolution::Choose(chosen), Resolution::Value("x".into()), Resolution::Delete] {
        let moved = conflicts.resolve("a", shown, late).await.unwrap_err();
        assert_eq!(moved.reason(), Some("CONFLICT_MOVED"));
    }
    conflicts.resolve("b", &there[1].context, Resolution::Value("both".into())).await.unwrap();
    conflicts.resolve("c", &there[2].context, Resolution::Delete).await.unwrap();
    wait_until("us has the decisions", async || {
        open(&us).await.rows.is_empty() && open(&eu).await.rows.is_empty()
    })
    .await;
    for client in [&us, &eu] {
        assert_eq!(value(client, "carts", "a").await, "a of us");
        assert_eq!(value(client, "carts", "b").await, "both");
        assert_eq!(value(client, "carts", "c").await, "");
        assert!(list(client, "carts").await.is_empty(), "what people decide is no loss");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_whose_time_is_over_is_not_chosen() {
    let cluster = Cluster::start(&REGIONS, 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    wait_until("eu knows it", async || eu.namespace("carts").get("k").await.is_ok()).await;
    let (here, there) = (us.namespace("carts"), eu.namespace("carts"));
    let nothing = there.get("k").await.unwrap().context;
    let time = Duration::from_secs(6);
    let brief = here.put("k", "brief").ttl(time).ack_regions(1).await.unwrap();
    // The region that wrote it deletes it, and eu does not hear of that.
    apart([("us", &us), ("eu", &eu)], async || {
        there.put("k", "kept").context(nothing).await.unwrap();
        let shown = there.get("k").await.unwrap();
        assert_eq!(shown.versions.len(), 2);
        wait_until("its time is over", async || there.get("k").await.unwrap().versions.len() == 1)
            .await;

        let conflicts = eu.conflicts("carts");
        let choice = Resolution::Choose(brief.dot);
        let refused = conflicts.resolve("k", &shown.context, choice).await.unwrap_err();
        assert_eq!(refused.reason(), Some("CONFLICT_EXPIRED"));
        assert_eq!(value(&eu, "carts", "k").await, "kept", "nothing is lost");
        let kept = there.get("k").await.unwrap().versions[0].dot;
        conflicts.resolve("k", &shown.context, Resolution::Choose(kept)).await.unwrap();
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_settles_in_time_is_settled_once_for_all_regions() {
    let hold = Duration::from_secs(15);
    let cluster = Cluster::start(&REGIONS, 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let pair = [("us", &us), ("eu", &eu)];
    // Asked for in the region that does not keep the catalog.
    let created = eu.admin().create_held_namespace("carts", hold).await.unwrap();
    assert_eq!(created.hold.map(|hold| hold.seconds), Some(15));
    wait_until("us knows it", async || us.namespace("carts").get("k").await.is_ok()).await;
    let namespace = us.admin().get_namespace("carts").await.unwrap();
    assert_eq!(namespace.hold, created.hold);
    write_apart(pair, "carts", &["a", "b"]).await;

    // Until then reads show all, the one first that will be taken, and say when.
    wait_until("both show that it waits", async || {
        let mut waiting = true;
        for (_, client) in pair {
            let carts = client.namespace("carts");
            let got = carts.get("a").await.unwrap();
            waiting &= got.in_conflict() && got.settle_time.is_some();
            waiting &= got.value().is_some_and(|value| value == "a of eu");
            let batch = carts.batch_get(["a", "absent"]).await.unwrap();
            let entries = carts.scan().collect().await.unwrap();
            waiting &= batch[0].settle_time == got.settle_time && batch[1].settle_time.is_none();
            waiting &= entries.iter().all(|entry| entry.settle_time.is_some());
            waiting &= batch[0].versions == got.versions && entries[0].versions == got.versions;
        }
        waiting
    })
    .await;
    let open = us.conflicts("carts").list_open("b", 9).await.unwrap().rows;
    assert!(open[0].settle_time.is_some());
    us.conflicts("carts")
        .resolve("b", &open[0].context, Resolution::Value("decided".into()))
        .await
        .unwrap();

    wait_noted(pair, "carts", 1).await;
    assert_eq!(ids(&us, "carts").await, ids(&eu, "carts").await);
    let row = &list(&eu, "carts").await[0];
    assert_eq!(row.cause(), proto::ConflictCause::Deadline);
    assert_eq!((&row.key[..], origin(row.loser.as_ref())), (&b"a"[..], "us"));
    assert_eq!(origin(row.winner.as_ref()), "us", "the first region settles for all");
    for (_, client) in pair {
        assert_eq!(value(client, "carts", "a").await, "a of eu");
        assert_eq!(client.namespace("carts").get("a").await.unwrap().settle_time, None);
        assert_eq!(value(client, "carts", "b").await, "decided");
        assert!(client.conflicts("carts").list_open("", 9).await.unwrap().rows.is_empty());
    }

    let short = us.admin().create_held_namespace("short", Duration::from_millis(1)).await;
    assert_eq!(short.unwrap_err().reason(), Some("NAMESPACE_INVALID"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_exceeds_the_bound_on_siblings_is_in_the_ledger_of_every_region() {
    const WRITES: usize = 21;
    let cluster = Cluster::start(&[("us", 1), ("eu", 1), ("ap", 1)], 1).await;
    let us = cluster.client("us").await;
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    let carts = us.namespace("carts");
    let old = carts.put("k", "v0").await.unwrap().context;
    for number in 1..=WRITES {
        // As clients do that have all read the first value.
        carts.put("k", format!("v{number}")).context(&old).await.unwrap();
    }
    let clients = [us, cluster.client("eu").await, cluster.client("ap").await];
    wait_until("every region holds sixteen and has noted five", async || {
        let mut all = true;
        for client in &clients {
            let got = client.namespace("carts").get("k").await;
            all &= got.is_ok_and(|got| got.versions.len() == 16);
            all &= client
                .conflicts("carts")
                .list(&ConflictFilter::default(), 99)
                .await
                .is_ok_and(|list| list.rows.len() == 5);
        }
        all
    })
    .await;
    let expected = ids(&clients[0], "carts").await;
    for client in &clients {
        assert_eq!(ids(client, "carts").await, expected);
        let mut lost = Vec::new();
        for row in list(client, "carts").await {
            assert_eq!(row.cause(), proto::ConflictCause::Bound);
            let shown = client.conflicts("carts").get(row.id).await.unwrap();
            lost.push(data(shown.conflict.unwrap().loser.as_ref()));
        }
        lost.sort_unstable();
        assert_eq!(lost, ["v1", "v2", "v3", "v4", "v5"]);
    }
    cluster.stop().await;
}

/// Sixteen values of the largest size are more than a request may have, and still one reply.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_siblings_as_there_may_be_of_the_largest_size_are_read_in_every_way() {
    const SIBLINGS: usize = 16;
    let cluster = Cluster::start(&REGIONS, 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    let carts = us.namespace("carts");
    let old = carts.put("k", "old").await.unwrap().context;
    for number in 0..SIBLINGS {
        let value = vec![u8::try_from(number).unwrap(); 1 << 20];
        carts.put("k", value).context(&old).deadline(PATIENCE).await.unwrap();
    }
    let are_whole = |versions: &[tombolo_client::Version]| {
        versions.len() == SIBLINGS && versions.iter().all(|version| version.value.len() == 1 << 20)
    };
    wait_until("eu has all of them", async || {
        let got = eu.namespace("carts").get("k").deadline(PATIENCE).await;
        got.is_ok_and(|got| are_whole(&got.versions))
    })
    .await;
    for client in [&us, &eu] {
        let carts = client.namespace("carts");
        let batch = carts.batch_get(["k"]).deadline(PATIENCE).await.unwrap();
        assert!(are_whole(&batch[0].versions));
        assert!(are_whole(&carts.scan().collect().await.unwrap()[0].versions));
        let mut snapshot = carts.watch().snapshot().stream();
        let shown = loop {
            let item = snapshot.next().await.expect("it does not end").unwrap();
            if let WatchEvent::Entry { entry, .. } = item.event {
                break entry;
            }
        };
        assert!(are_whole(&shown.versions));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_regions_forget_in_time_and_for_size() {
    let cluster = Cluster::start_configured(&REGIONS, 2, &[], |config| {
        if config.region == "us" {
            config.ledger.retention = Duration::from_secs(1);
        } else {
            config.ledger.bytes = 0;
        }
    })
    .await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    write_apart([("us", &us), ("eu", &eu)], "default", &["a", "b"]).await;
    wait_until("both have forgotten both", async || {
        let mut forgotten = 0.0;
        for (member, reason) in cluster.members.iter().zip(["age", "size"]) {
            let name = format!("tombolo_ledger_forgotten_total{{reason=\"{reason}\"}}");
            forgotten += metric(member, &name).await;
        }
        forgotten == 4.0
    })
    .await;
    for client in [&us, &eu] {
        assert!(list(client, "default").await.is_empty());
        assert_eq!(value(client, "default", "a").await, "a of eu");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_region_has_forgotten_does_not_come_back_through_a_repair() {
    let cluster = Cluster::start_configured(&REGIONS, 1, &[], |config| {
        if config.region == "eu" {
            config.ledger.retention = Duration::from_secs(1);
        }
    })
    .await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    write_apart([("us", &us), ("eu", &eu)], "default", &["a"]).await;
    wait_until("eu has forgotten it", async || {
        metric(&cluster.members[1], "tombolo_ledger_forgotten_total").await == 1.0
    })
    .await;
    let repairs = async || metric(&cluster.members[1], "tombolo_repairs_total").await;
    let before = repairs().await;
    eu.admin().start_repair("us", Some("default")).await.unwrap();
    wait_until("eu has been repaired", async || repairs().await > before).await;
    assert!(list(&eu, "default").await.is_empty());
    assert_eq!(list(&us, "default").await.len(), 1, "us keeps it for its own time");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_shows_and_settles_and_says_whose_leader_is_silent() {
    let mut cluster = Cluster::start(&[("us", 3), ("eu", 1)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    write_apart([("us", &us), ("eu", &eu)], "default", &["a", "b", "c"]).await;
    wait_noted([("us", &us), ("eu", &eu)], "default", 3).await;
    let rows = list(&us, "default").await;
    let connect = async |address: &String| {
        let address = format!("http://{address}");
        proto::conflict_service_client::ConflictServiceClient::connect(address).await.unwrap()
    };
    let namespace = || "default".to_owned();
    // Each node settles a key of its own; two of the three do not lead its shard.
    for (address, row) in cluster.addresses("us").iter().zip(&rows) {
        let mut node = connect(address).await;
        let request = proto::ListConflictsRequest { namespace: namespace(), ..Default::default() };
        let listed = node.list_conflicts(request).await.unwrap().into_inner();
        assert_eq!((listed.conflicts.len(), listed.unreachable.len()), (3, 0));
        let request = proto::GetConflictRequest { namespace: namespace(), id: row.id.clone() };
        let shown = node.get_conflict(request).await.unwrap().into_inner();
        let request = proto::RestoreConflictRequest {
            namespace: namespace(),
            id: row.id.clone(),
            request_id: Some(us.next_request_id()),
            context: shown.context,
        };
        node.restore_conflict(request).await.unwrap();
        let key = std::str::from_utf8(&row.key).unwrap();
        assert_eq!(value(&us, "default", key).await, format!("{key} of us"));
    }

    // Without a majority there is no leader, and an incident to look into.
    cluster.members[0].stop().await;
    cluster.members[1].stop().await;
    let mut node = connect(&cluster.addresses("us")[0]).await;
    wait_until("the last node shows what it has, and what it could not ask", async || {
        let request = proto::ListConflictsRequest { namespace: namespace(), ..Default::default() };
        let mut request = tonic::Request::new(request);
        request.set_timeout(PATIENCE);
        let listed = node.list_conflicts(request).await.unwrap().into_inner();
        assert_eq!(listed.conflicts.len(), 3);
        listed.unreachable == ["shard 0", "shard 1"]
    })
    .await;
    let request = proto::GetConflictRequest { namespace: namespace(), id: rows[0].id.clone() };
    let shown = node.get_conflict(request).await.unwrap().into_inner();
    assert_eq!(shown.unreachable.len(), 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_shown_or_settled_is_refused_with_its_reason() {
    let cluster = Cluster::start(&REGIONS, 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.admin().create_namespace("orders", proto::Rule::Lww).await.unwrap();
    wait_until("eu knows it", async || eu.namespace("orders").get("k").await.is_ok()).await;
    let pair = [("us", &us), ("eu", &eu)];
    write_apart(pair, "orders", &["k", "l"]).await;
    apart(pair, async || {
        let short = Duration::from_secs(1);
        us.namespace("orders").put("brief", "us").ttl(short).await.unwrap();
        eu.namespace("orders").put("brief", "eu").await.unwrap();
    })
    .await;
    wait_noted(pair, "orders", 3).await;
    let orders = us.conflicts("orders");
    let reason = |error: tombolo_client::Error| error.reason().unwrap_or("none").to_owned();

    let nowhere = us.conflicts("nowhere").list(&ConflictFilter::default(), 9).await.unwrap_err();
    assert_eq!(reason(nowhere), "NAMESPACE_NOT_FOUND");
    for (id, expected) in [("k", "REQUEST_INVALID"), (&"0".repeat(32), "CONFLICT_NOT_FOUND")] {
        assert_eq!(reason(orders.get(id).await.unwrap_err()), expected);
        assert_eq!(reason(orders.restore(id, "").await.unwrap_err()), expected);
    }
    let mars = ConflictFilter { origin_region: Some("mars".into()), ..Default::default() };
    assert_eq!(reason(orders.list(&mars, 9).await.unwrap_err()), "REGION_NOT_FOUND");
    let id = ids(&us, "orders").await.remove(0);
    assert_eq!(reason(orders.restore(&id, "forged").await.unwrap_err()), "CONTEXT_INVALID");
    let catalog = us.conflicts("catalog").restore(&id, "").await.unwrap_err();
    assert_eq!(reason(catalog), "NAMESPACE_RESERVED");
    assert!(us.conflicts("catalog").list(&ConflictFilter::default(), 9).await.is_ok());
    let empty = orders.resolve("", "", Resolution::Delete).await.unwrap_err();
    assert_eq!(reason(empty), "KEY_EMPTY");
    let large = Resolution::Value(vec![0; (1 << 20) + 1].into());
    assert_eq!(reason(orders.resolve("k", "", large).await.unwrap_err()), "VALUE_TOO_LARGE");

    let brief = list(&us, "orders").await.into_iter().find(|row| row.key == "brief").unwrap();
    wait_until("its time is over", async || {
        let shown = orders.get(&brief.id).await.unwrap();
        let restored = orders.restore(&brief.id, shown.context).await;
        restored.is_err_and(|error| error.reason() == Some("CONFLICT_EXPIRED"))
    })
    .await;

    let address = format!("http://{}", cluster.addresses("us")[0]);
    let mut node =
        proto::conflict_service_client::ConflictServiceClient::connect(address).await.unwrap();
    let page = proto::ListConflictsRequest {
        namespace: "orders".into(),
        page_size: 1,
        ..Default::default()
    };
    let token = node.list_conflicts(page.clone()).await.unwrap().into_inner().next_page_token;
    assert!(!token.is_empty());
    for (bad, expected) in [
        (
            proto::ListConflictsRequest { page_token: "zz".into(), ..page.clone() },
            "PAGE_TOKEN_INVALID",
        ),
        (
            proto::ListConflictsRequest {
                key_prefix: "k".into(),
                page_token: token,
                ..page.clone()
            },
            "PAGE_TOKEN_MISMATCH",
        ),
        (proto::ListConflictsRequest { page_size: -1, ..page.clone() }, "REQUEST_INVALID"),
    ] {
        let status = node.list_conflicts(bad).await.unwrap_err();
        let found = tombolo_service::reason::Reason::of(&status).unwrap();
        assert_eq!(found.as_str(), expected);
    }

    let number = us.admin().get_namespace("orders").await.unwrap().id;
    us.admin().delete_namespace("orders", None).await.unwrap();
    let gone = orders.list(&ConflictFilter::default(), 9).await.unwrap_err();
    assert_eq!(reason(gone), "NAMESPACE_NOT_FOUND");
    let stats = orders.stats_of_all().await.unwrap().stats;
    assert!(stats.iter().any(|row| row.namespace == format!("#{number}") && row.count >= 2));
    cluster.stop().await;
}
