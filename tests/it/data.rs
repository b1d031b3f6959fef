//! What one region promises: linearizable writes and reads, checks, repeats, scans.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use futures::TryStreamExt;
use tombolo_client::{
    Client, ClientConfig, ConflictFilter, Consistency, Error,
    proto::{self, kv_service_client::KvServiceClient},
};

use crate::support::{Cluster, Member, PATIENCE, channel, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_reads_what_any_other_has_acknowledged() {
    let cluster = Cluster::start(&[("us", 3)], 4).await;
    let writer = cluster.client("us").await.namespace("default");
    for address in cluster.addresses("us") {
        let config = ClientConfig { endpoints: vec![address], ..ClientConfig::default() };
        let reader = Client::connect(config).await.unwrap().namespace("default");
        for number in 0..20 {
            let (key, value) = (format!("key-{number}"), format!("{number}"));
            writer.put(key.clone(), value.clone()).await.unwrap();
            let got = reader.get(key).consistency(Consistency::Linearizable).await.unwrap();
            assert_eq!(got.value().map(|data| data.to_vec()), Some(value.into_bytes()));
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_is_applied_once() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let client = cluster.client("us").await;
    let keys = client.namespace("default");
    let id = client.next_request_id();

    let first = keys.put("k", "1").request_id(id).await.unwrap();
    keys.put("k", "2").await.unwrap();
    let again = keys.put("k", "1").request_id(id).await.unwrap();

    assert_eq!(again.dot, first.dot);
    assert_eq!(keys.get("k").await.unwrap().value().unwrap().as_ref(), b"2");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commit_is_all_or_nothing_and_answers_what_is_there() {
    let cluster = Cluster::start(&[("us", 1)], 8).await;
    let keys = cluster.client("us").await.namespace("default");
    let held = keys.put("{cart}a", "1").await.unwrap();

    let refused = keys
        .commit()
        .check_absent("{cart}a")
        .put("{cart}a", "2")
        .put("{cart}b", "2")
        .await
        .unwrap();
    assert!(!refused.committed);
    assert_eq!(refused.failed[0].versions[0].dot, held.dot);
    assert!(keys.get("{cart}b").await.unwrap().value().is_none());

    let done = keys
        .commit()
        .check_dot("{cart}a", held.dot)
        .check_absent("{cart}b")
        .delete("{cart}a")
        .put("{cart}b", "2")
        .await
        .unwrap();
    assert!(done.committed);
    assert!(keys.get("{cart}a").await.unwrap().value().is_none());
    assert_eq!(keys.get("{cart}b").await.unwrap().value().unwrap().as_ref(), b"2");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_read_an_absent_key_overwrites_nothing_that_came_since() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let client = cluster.client("us").await;
    client.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    for (namespace, values, lost) in
        [("carts", vec!["of a", "of b"], 0), ("default", vec!["of a"], 1)]
    {
        let keys = client.namespace(namespace);
        let (of_a, of_b) = tokio::join!(keys.get("k").into_future(), keys.get("k").into_future());
        let (of_a, of_b) = (of_a.unwrap().context, of_b.unwrap().context);
        let batch = keys.batch_get(["k"]).await.unwrap();
        assert_eq!((&of_a, &batch[0].context), (&of_b, &of_b));

        keys.put("k", "of b").context(of_b).await.unwrap();
        let written = keys.put("k", "of a").context(&of_a).await.unwrap();
        assert!(written.conflict, "it has not seen what b put");
        let got = keys.get("k").await.unwrap();
        let mut held: Vec<_> = got.versions.iter().map(|held| held.value.to_vec()).collect();
        held.sort_unstable();
        assert_eq!(held, values.iter().map(|value| value.as_bytes()).collect::<Vec<_>>());
        let filter = ConflictFilter::default();
        let noted = client.conflicts(namespace).list(&filter, 9).await.unwrap().rows;
        assert_eq!(noted.len(), lost, "{namespace}");

        // A check sees it, too.
        let late = keys.commit().check_context("k", of_a).put("k", "late").await.unwrap();
        assert!(!late.committed);
        let again = keys.put("k", "all").context(got.context).await.unwrap();
        assert!(!again.conflict);
        assert_eq!(keys.get("k").await.unwrap().versions.len(), 1);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scan_lists_live_keys_of_all_shards_in_order_both_ways() {
    let cluster = Cluster::start(&[("us", 1)], 5).await;
    let keys = cluster.client("us").await.namespace("default");
    let mut expected = BTreeMap::new();
    for number in 0..600 {
        let key = format!("k{number:04}");
        keys.put(key.clone(), number.to_string()).await.unwrap();
        expected.insert(key.into_bytes(), number.to_string().into_bytes());
    }
    for number in (0..600).step_by(3) {
        let key = format!("k{number:04}");
        keys.delete(key.clone()).await.unwrap();
        expected.remove(key.as_bytes());
    }
    let listed = |entries: Vec<tombolo_client::Entry>| -> Vec<(Vec<u8>, Vec<u8>)> {
        entries
            .into_iter()
            .map(|entry| (entry.key.to_vec(), entry.value().unwrap().to_vec()))
            .collect()
    };
    let forward = listed(keys.scan().collect().await.unwrap());
    assert_eq!(forward, expected.clone().into_iter().collect::<Vec<_>>());
    let backward = listed(keys.scan().reverse().collect().await.unwrap());
    assert_eq!(backward, expected.clone().into_iter().rev().collect::<Vec<_>>());
    let part = listed(keys.scan().prefix("k01").limit(7).collect().await.unwrap());
    let in_part = expected.into_iter().filter(|(key, _)| key.starts_with(b"k01")).take(7);
    assert_eq!(part, in_part.collect::<Vec<_>>());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_value_is_hidden_and_counts_as_absent() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let keys = cluster.client("us").await.namespace("default");
    keys.put("k", "v").ttl(Duration::from_millis(300)).await.unwrap();
    wait_until("the value expires", async || keys.get("k").await.unwrap().value().is_none()).await;
    assert!(keys.scan().collect().await.unwrap().is_empty());
    assert!(keys.commit().check_absent("k").put("k", "w").await.unwrap().committed);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_leader_hands_over_and_everything_is_there_after_a_restart() {
    let mut cluster = Cluster::start(&[("us", 3)], 2).await;
    let client = cluster.client("us").await;
    let keys = client.namespace("default");
    for number in 0..50 {
        keys.put(format!("k{number}"), number.to_string()).await.unwrap();
    }
    for place in 0..3 {
        cluster.members[place].stop().await;
        keys.put(format!("while-{place}-is-away"), "1").await.unwrap();
        cluster.members[place].start().await;
        cluster.wait_ready().await;
    }
    let all = keys.scan().collect().await.unwrap();
    assert_eq!(all.len(), 53);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_answers_bounded_reads_while_it_knows_that_it_is_fresh_enough() {
    let mut cluster = Cluster::start(&[("us", 3)], 1).await;
    let client = cluster.client("us").await;
    client.namespace("default").put("k", "1").await.unwrap();
    let leader = client.cluster().await.unwrap().leaders[0].leader_node_id;
    let follower = cluster.members.iter().position(|it| it.config.node_id != leader).unwrap();
    let kv = KvServiceClient::new(channel(&cluster.members[follower]).await);
    let read = async |consistency: Consistency| {
        let mut request = tonic::Request::new(proto::GetRequest {
            namespace: "default".to_owned(),
            key: "k".into(),
            consistency: Some(consistency.into()),
            ..Default::default()
        });
        request.set_timeout(Duration::from_secs(2));
        let got = kv.clone().get(request).await?.into_inner();
        Ok::<_, tonic::Status>(got.versions.len())
    };
    let minutes = Consistency::MaxStaleness(Duration::from_secs(600));
    assert_eq!(read(minutes).await.unwrap(), 1, "it asked the leader");

    for (place, member) in cluster.members.iter_mut().enumerate() {
        if place != follower {
            member.stop().await;
        }
    }
    assert!(read(Consistency::Linearizable).await.is_err(), "there is nobody to ask");
    assert_eq!(read(minutes).await.unwrap(), 1, "what it knew a moment ago is enough");
    let moment = Consistency::MaxStaleness(Duration::from_millis(1));
    assert!(read(moment).await.is_err(), "it cannot know that it is that fresh");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_writes_fail_and_say_so() {
    let mut cluster = Cluster::start(&[("us", 3)], 1).await;
    let client = cluster.client("us").await;
    let keys = client.namespace("default");
    keys.put("k", "1").await.unwrap();
    cluster.members[0].stop().await;
    cluster.members[1].stop().await;

    let refused = keys.put("k", "2").deadline(Duration::from_secs(2)).await.unwrap_err();
    assert!(matches!(refused, Error::Unavailable { .. } | Error::Deadline { .. }), "{refused:?}");

    cluster.members[0].start().await;
    wait_until("writes go on", async || {
        keys.put("k", "3").deadline(Duration::from_secs(5)).await.is_ok()
    })
    .await;
    assert_eq!(keys.get("k").deadline(PATIENCE).await.unwrap().value().unwrap().as_ref(), b"3");
    cluster.stop().await;
}

/// Every shard is shown as of one moment, however much is written while the scan goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_shows_each_shard_as_it_was_when_it_began() {
    let cluster = Cluster::start(&[("us", 1)], 2).await;
    let us = cluster.client("us").await;
    let keys = us.namespace("default");
    // Far more than a server reads ahead.
    let names: Vec<String> = (0..12_000).map(|number| format!("key-{number:06}")).collect();
    let put_all = async |value: &'static str| {
        for part in names.chunks(500) {
            let puts = part.iter().map(|name| keys.put(name, value).into_future());
            futures::future::try_join_all(puts).await.expect("written");
        }
    };
    put_all("before").await;

    let mut entries = keys.scan().stream();
    let first = entries.try_next().await.expect("scanned").expect("an entry");
    put_all("after").await;
    let deletions = names.iter().step_by(10).map(|name| keys.delete(name).into_future());
    futures::future::try_join_all(deletions).await.expect("deleted");
    let mut shown = vec![first];
    while let Some(entry) = entries.try_next().await.expect("scanned") {
        shown.push(entry);
    }

    assert_eq!(shown.len(), names.len());
    assert!(shown.iter().all(|entry| entry.value().is_some_and(|value| &value[..] == b"before")));
    let now = keys.scan().collect().await.expect("scanned");
    assert_eq!(now.len(), names.len() - names.len() / 10);
    cluster.stop().await;
}

/// One reply of a scan that goes on with a page token: its keys, and where it goes on.
async fn page(member: &Member, page_token: Bytes) -> (Vec<Bytes>, Bytes) {
    let mut kv = KvServiceClient::new(channel(member).await);
    let namespace = "default".to_owned();
    let scan = proto::ScanRequest { namespace, page_token, ..Default::default() };
    let mut request = tonic::Request::new(scan);
    request.set_timeout(PATIENCE);
    let mut replies = kv.scan(request).await.expect("scanned").into_inner();
    let reply = replies.message().await.expect("a reply").expect("one at least");
    (reply.results.into_iter().map(|result| result.key).collect(), reply.page_token)
}

/// A page token says where to go on, and needs nothing that a node remembers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_token_outlives_leaders_and_restarts() {
    let mut cluster = Cluster::start(&[("us", 3)], 2).await;
    let client = cluster.client("us").await;
    let keys = client.namespace("default");
    // More than three replies hold.
    let names: Vec<String> = (0..2000).map(|number| format!("key-{number:04}")).collect();
    for part in names.chunks(500) {
        let puts = part.iter().map(|name| keys.put(name, "1").into_future());
        futures::future::try_join_all(puts).await.expect("written");
    }
    let (mut shown, token) = page(&cluster.members[0], Bytes::new()).await;

    let leader = client.cluster().await.expect("known").leaders[0].leader_node_id;
    let led = cluster.members.iter().position(|it| it.config.node_id == leader).expect("a node");
    cluster.members[led].stop().await;
    keys.delete("key-1999").await.expect("deleted");
    keys.put("key-0000-is-passed", "1").await.expect("written");
    keys.put("key-1998-is-not", "1").await.expect("written");
    let (more, token) = page(&cluster.members[(led + 1) % 3], token).await;
    shown.extend(more);

    for member in &mut cluster.members {
        member.stop().await;
    }
    for member in &mut cluster.members {
        member.start().await;
    }
    cluster.wait_ready().await;
    let mut token = token;
    while !token.is_empty() {
        let (more, next) = page(&cluster.members[led], token).await;
        shown.extend(more);
        token = next;
    }
    let mut expected = names;
    expected[1999] = "key-1998-is-not".to_owned();
    assert_eq!(shown, expected, "each key once, in order, as it was when its page was read");
    cluster.stop().await;
}
