//! The change feed: what comes, in which order, where it goes on, and how it ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::StreamExt;
use tombolo_client::proto::watch_service_client::WatchServiceClient;
use tombolo_client::{
    Change, Client, Dot, Error, HybridTime, Previous, Version, Watch, WatchEvent, WatchStream,
    Watched, proto,
};
use tonic::{Code, Status, Streaming, transport::Endpoint};
use tonic_types::StatusExt;

use crate::support::{Cluster, PATIENCE, metric, values, wait_until};

/// Soon enough that tests do not wait for checkpoints.
const SOON: Duration = Duration::from_millis(200);

/// A namespace as a watcher knows it, from nothing but what it was told.
#[derive(Default)]
struct Copy {
    keeps_siblings: bool,
    held: BTreeMap<Bytes, BTreeMap<Dot, (HybridTime, Option<Bytes>)>>,
    /// The same, by applying only what is current when it comes. For `lww`.
    plain: BTreeMap<Bytes, Option<Bytes>>,
    /// Of each key, where it lives.
    shards: BTreeMap<Bytes, u32>,
    /// Events that came, to tell repeats.
    seen: BTreeSet<(u32, Dot)>,
    resets: usize,
    shards_left: Option<u32>,
}

impl Copy {
    fn siblings() -> Self {
        Self { keeps_siblings: true, ..Self::default() }
    }

    fn take(&mut self, event: &WatchEvent) {
        match event {
            WatchEvent::Change(change) => self.apply(change),
            WatchEvent::Entry { shard, entry, deletion, .. } => {
                let held = |it: &Version| (it.dot, (it.time, Some(it.value.clone())));
                let gone = deletion.as_ref().map(|it| (it.dot, (it.time, None)));
                let held: BTreeMap<_, _> = entry.versions.iter().map(held).chain(gone).collect();
                self.plain.insert(entry.key.clone(), entry.value().cloned());
                self.seen.extend(held.keys().map(|&dot| (*shard, dot)));
                self.held.insert(entry.key.clone(), held);
                self.shards.insert(entry.key.clone(), *shard);
            }
            WatchEvent::SnapshotDone { shards_left, .. } => self.shards_left = Some(*shards_left),
            WatchEvent::Reset { shard, .. } => {
                self.resets += 1;
                let shards = &self.shards;
                self.held.retain(|key, _| shards.get(key) != Some(shard));
                self.plain.retain(|key, _| shards.get(key) != Some(shard));
            }
            WatchEvent::Checkpoint { .. } => {}
        }
    }

    fn apply(&mut self, change: &Change) {
        if change.current {
            self.plain.insert(change.key.clone(), change.value().cloned());
        }
        if !self.seen.insert(change.id()) {
            return;
        }
        self.shards.insert(change.key.clone(), change.shard);
        let held = self.held.entry(change.key.clone()).or_default();
        held.retain(|dot, _| !change.supersedes.contains(dot));
        held.insert(change.dot, (change.time, change.value().cloned()));
        if self.keeps_siblings {
            held.retain(|_, (_, value)| value.is_some());
        } else {
            let winner = held.iter().map(|(dot, (time, _))| (*time, *dot)).max();
            held.retain(|dot, (time, _)| Some((*time, *dot)) == winner);
        }
    }

    fn plain_values(&self) -> Vec<(Vec<u8>, Vec<Vec<u8>>)> {
        let live = self.plain.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        live.map(|(key, value)| (key.to_vec(), vec![value.to_vec()])).collect()
    }

    /// As [`values`] shows a region.
    fn values(&self) -> Vec<(Vec<u8>, Vec<Vec<u8>>)> {
        let mut values = Vec::new();
        for (key, held) in &self.held {
            let live = held.values().filter_map(|(_, value)| value.as_ref());
            let live: Vec<Vec<u8>> = live.map(|value| value.to_vec()).collect();
            if !live.is_empty() {
                values.push((key.to_vec(), live));
            }
        }
        values
    }
}

async fn next(stream: &mut WatchStream) -> Watched {
    let item = tokio::time::timeout(PATIENCE, stream.next()).await;
    item.expect("something comes").expect("the watch goes on").expect("it is served")
}

async fn next_change(stream: &mut WatchStream) -> Change {
    loop {
        match next(stream).await.event {
            WatchEvent::Change(change) => return change,
            WatchEvent::Checkpoint { .. } => {}
            other => panic!("not a change: {other:?}"),
        }
    }
}

/// Takes what comes until nothing is left to give.
async fn catch_up(stream: &mut WatchStream, copy: &mut Copy) {
    loop {
        let item = next(stream).await;
        copy.take(&item.event);
        if item.event == (WatchEvent::Checkpoint { shards_waiting: 0 }) {
            return;
        }
    }
}

/// Takes what comes until the copy is what the region holds.
async fn follow_until_equal(
    stream: &mut WatchStream,
    copy: &mut Copy,
    client: &Client,
    namespace: &str,
) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        catch_up(stream, copy).await;
        let held = values(client, namespace).await;
        if copy.values() == held {
            assert!(copy.keeps_siblings || copy.plain_values() == held);
            return;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "the copy has {} keys, the region {}",
            copy.values().len(),
            held.len()
        );
    }
}

fn watch(client: &Client, namespace: &str) -> Watch {
    client.namespace(namespace).watch().checkpoint_interval(SOON)
}

/// A stream that is there: its first word has come.
async fn opened(watch: Watch) -> WatchStream {
    let mut stream = watch.stream();
    let first = next(&mut stream).await;
    assert!(matches!(first.event, WatchEvent::Checkpoint { .. }), "{first:?}");
    assert!(first.token.is_some());
    stream
}

async fn refusal(watch: Watch) -> Error {
    let mut stream = watch.stream();
    match tokio::time::timeout(PATIENCE, stream.next()).await.expect("an answer") {
        Some(Err(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_of_every_region_come_once_with_what_they_replaced() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 3).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.namespace("default").put("early", "not shown").ack_regions(1).await.unwrap();
    let mut here = opened(watch(&us, "default").previous()).await;
    let mut there = opened(watch(&eu, "default").previous()).await;
    let mut local = opened(watch(&us, "default").local_only()).await;
    let mut from_eu = opened(watch(&us, "default").origins(["eu"])).await;
    let mut some = opened(watch(&us, "default").prefix("b").range("ba".."bz")).await;

    let put = us.namespace("default").put("k", "one").ack_regions(1).await.unwrap();
    let again = eu.namespace("default").put("k", "two").ttl(Duration::from_secs(600));
    let again = again.ack_regions(1).await.unwrap();
    let gone = us.namespace("default").delete("k").ack_regions(1).await.unwrap();
    let anew = us.namespace("default").put("k", "three").ack_regions(1).await.unwrap();
    for stream in [&mut here, &mut there] {
        let first = next_change(stream).await;
        assert_eq!((first.dot, first.key.as_ref()), (put.dot, &b"k"[..]));
        assert_eq!(first.value().unwrap(), "one");
        assert_eq!((first.origin_region.as_str(), first.time), ("us", put.time));
        assert!(first.previous.is_empty() && first.supersedes.is_empty());
        assert_eq!(first.group.size, 1);

        let second = next_change(stream).await;
        assert_eq!((second.dot, second.origin_region.as_str()), (again.dot, "eu"));
        assert!(second.version.as_ref().unwrap().expire_time.is_some());
        let [(of, Previous::Value(replaced))] = &second.previous[..] else {
            panic!("what it replaced is known: {second:?}");
        };
        assert_eq!((*of, replaced.value.as_ref()), (put.dot, &b"one"[..]));

        let third = next_change(stream).await;
        assert_eq!((third.dot, third.version.is_none()), (gone.dot, true));
        assert_eq!(third.supersedes, [again.dot]);
        let fourth = next_change(stream).await;
        assert_eq!(fourth.dot, anew.dot);
        assert_eq!(fourth.previous, [(gone.dot, Previous::Deleted)]);
        assert!(!fourth.has_lost());
    }
    let dots = [next_change(&mut local).await.dot, next_change(&mut local).await.dot];
    assert_eq!(dots, [put.dot, gone.dot]);
    assert_eq!(next_change(&mut from_eu).await.dot, again.dot);

    us.namespace("default").put("a", "outside").await.unwrap();
    us.namespace("default").put("bz", "outside").await.unwrap();
    us.namespace("default").put("bb", "inside").await.unwrap();
    assert_eq!(next_change(&mut some).await.key, "bb");

    // What was written together comes together.
    let commit = us.namespace("default").commit();
    let commit = commit.put("{t}1", "v").put("{t}2", "v").put("{t}3", "v").await.unwrap();
    assert!(commit.committed);
    let mut batch = Vec::new();
    while batch.len() < 3 {
        let change = next_change(&mut there).await;
        if change.key.starts_with(b"{t}") {
            batch.push(change);
        }
    }
    assert!(batch.iter().all(|it| it.group == batch[0].group && it.group.size == 3));
    assert_eq!(batch[0].dot.seq, batch[0].group.first_seq);
    assert_eq!(batch[2].dot.seq, batch[0].group.first_seq + 2);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_and_what_follows_it_is_what_the_region_holds() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    wait_until("eu knows it", async || eu.namespace("carts").get("k").await.is_ok()).await;
    // More than a page in each shard.
    let writes = (0..1600).map(|number| {
        let client = if number % 2 == 0 { &us } else { &eu };
        let namespace = client.namespace(if number % 4 < 2 { "default" } else { "carts" });
        async move { namespace.put(format!("k{number:04}"), "before").await.unwrap() }
    });
    futures::stream::iter(writes).buffer_unordered(32).collect::<Vec<_>>().await;

    let writer = async |client: Client, salt: usize| {
        for number in 0..400 {
            let keys = client.namespace(if number % 2 == 0 { "default" } else { "carts" });
            let key = format!("k{:04}", (number * 37 + salt) % 1700);
            match number % 5 {
                0 => keys.delete(key).await.unwrap(),
                _ => keys.put(key, format!("{salt}-{number}")).await.unwrap(),
            };
        }
    };
    let writers = [tokio::spawn(writer(us.clone(), 1)), tokio::spawn(writer(eu.clone(), 2))];
    let mut copies = [
        (watch(&us, "default").snapshot().stream(), Copy::default(), &us, "default"),
        (watch(&eu, "carts").snapshot().stream(), Copy::siblings(), &eu, "carts"),
    ];
    for (stream, copy, _, _) in &mut copies {
        while copy.shards_left != Some(0) {
            let item = next(stream).await;
            copy.take(&item.event);
        }
    }
    for writer in writers {
        writer.await.unwrap();
    }
    for (stream, copy, client, namespace) in &mut copies {
        follow_until_equal(stream, copy, client, namespace).await;
        assert_eq!(copy.resets, 0);
        assert!(copy.values().len() > 700);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_whose_region_is_lost_goes_on_in_another() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1), ("ap", 1)], 3).await;
    let us = cluster.client("us").await;
    let (eu, ap) = (cluster.client("eu").await, cluster.client("ap").await);
    let mut copy = Copy::default();
    let mut stream = watch(&us, "default").snapshot().stream();
    catch_up(&mut stream, &mut copy).await;
    for number in 0..60 {
        us.namespace("default").put(format!("u{number}"), "us").ack_regions(2).await.unwrap();
    }
    while copy.seen.len() < 30 {
        let item = next(&mut stream).await;
        copy.take(&item.event);
    }
    let token = stream.token().clone();
    drop(stream);
    let seen = copy.seen.clone();
    cluster.member("us").stop().await;
    for number in 0..60 {
        ap.namespace("default").put(format!("u{number}"), "ap").await.unwrap();
    }

    let mut stream = opened(watch(&eu, "default").resume(token.clone())).await;
    follow_until_equal(&mut stream, &mut copy, &eu, "default").await;
    wait_until("eu has what ap wrote", async || {
        values(&eu, "default").await.iter().all(|(_, held)| *held == [b"ap".to_vec()])
    })
    .await;
    follow_until_equal(&mut stream, &mut copy, &eu, "default").await;
    assert_eq!(copy.resets, 0, "the logs of both regions reach back");
    assert_eq!(copy.seen.len(), 120, "every write came");

    // From the same token, the same comes again, and nothing from before it.
    let mut repeated = Copy { seen: seen.clone(), ..Copy::default() };
    let mut stream = opened(watch(&ap, "default").resume(token)).await;
    while repeated.seen.len() < 120 {
        let change = next_change(&mut stream).await;
        repeated.take(&WatchEvent::Change(change));
    }
    assert_eq!(repeated.seen, copy.seen);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_was_away_too_long_is_told_and_gets_the_present_state() {
    let mut cluster = Cluster::start_configured(&[("us", 1), ("eu", 1)], 2, &[], |config| {
        config.watch.history_bytes = 0;
        config.replication.change_log_bytes = 1 << 10;
    })
    .await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let keys = us.namespace("default");
    let mut copy = Copy::default();
    let mut stream = watch(&us, "default").snapshot().stream();
    for number in 0..40 {
        keys.put(format!("k{number}"), "before").await.unwrap();
    }
    follow_until_equal(&mut stream, &mut copy, &us, "default").await;
    let token = stream.token().clone();
    drop(stream);
    for number in 0..40 {
        match number % 3 {
            0 => keys.delete(format!("k{number}")).await.unwrap(),
            1 => keys.put(format!("k{number}"), "after").await.unwrap(),
            _ => keys.put(format!("new{number}"), "after").await.unwrap(),
        };
    }
    for client in [&us, &eu] {
        wait_until("both shards' logs are trimmed", async || {
            let mut stream = watch(client, "default").resume(token.clone()).stream();
            let mut reset = BTreeSet::new();
            loop {
                match next(&mut stream).await.event {
                    WatchEvent::Reset { shard, .. } => _ = reset.insert(shard),
                    WatchEvent::Checkpoint { shards_waiting: 0 } if !reset.is_empty() => break,
                    WatchEvent::Change(_) => return false,
                    _ => {}
                }
            }
            reset.len() == 2
        })
        .await;
    }
    let mut stream = opened(watch(&eu, "default").resume(token)).await;
    follow_until_equal(&mut stream, &mut copy, &eu, "default").await;
    assert_eq!(copy.resets, 2);
    assert!(metric(cluster.member("eu"), "tombolo_watch_resets_total").await >= 2.0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn through_restarts_of_every_node_a_watcher_holds_what_the_region_holds() {
    let mut cluster = Cluster::start(&[("us", 3), ("eu", 1)], 4).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let mut copy = Copy::default();
    let mut stream = opened(watch(&us, "default").snapshot()).await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writer = |client: Client, salt: usize| {
        let stopped = stopped.clone();
        tokio::spawn(async move {
            let mut number = salt;
            while !*stopped.borrow() {
                let keys = client.namespace("default");
                let key = format!("k{}", number % 97);
                match number % 7 {
                    0 => keys.delete(key).await.expect("deleted"),
                    _ => keys.put(key, format!("{salt}-{number}")).await.expect("written"),
                };
                number += 2;
            }
        })
    };
    let writers = [writer(us.clone(), 0), writer(eu.clone(), 1)];
    for place in 0..3 {
        cluster.members[place].stop().await;
        // It goes on without that node.
        let before = copy.seen.len();
        while copy.seen.len() < before + 20 {
            let item = next(&mut stream).await;
            copy.take(&item.event);
        }
        cluster.members[place].start().await;
        cluster.wait_ready().await;
    }
    stop.send(true).unwrap();
    for writer in writers {
        writer.await.unwrap();
    }
    wait_until("both regions hold the same", async || {
        values(&us, "default").await == values(&eu, "default").await
    })
    .await;
    follow_until_equal(&mut stream, &mut copy, &us, "default").await;
    assert_eq!(copy.resets, 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_are_told_in_every_region_under_the_same_id() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let us = cluster.client("us").await;
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    let eu = cluster.client("eu").await;
    wait_until("eu knows it", async || eu.namespace("carts").get("k").await.is_ok()).await;
    us.admin().pause_link("eu").await.unwrap();
    eu.admin().pause_link("us").await.unwrap();
    wait_until("nothing flows", async || {
        let mut paused = true;
        for client in [&us, &eu] {
            let links = client.admin().list_links(None).await.unwrap().links;
            paused &= links.iter().all(|it| it.phase() == proto::LinkPhase::Paused);
        }
        paused
    })
    .await;
    let mut streams = Vec::new();
    for client in [&us, &eu] {
        for namespace in ["default", "carts"] {
            streams.push(opened(watch(client, namespace)).await);
        }
    }
    let mut dots = BTreeMap::new();
    for (name, client) in [("us", &us), ("eu", &eu)] {
        for namespace in ["default", "carts"] {
            let written = client.namespace(namespace).put("k", name).await.unwrap();
            dots.insert((namespace, name), (written.time, written.dot));
        }
    }
    us.admin().resume_link("eu").await.unwrap();
    eu.admin().resume_link("us").await.unwrap();

    let lww = [dots[&("default", "us")], dots[&("default", "eu")]];
    let (winner, loser) = (lww.iter().max().unwrap().1, lww.iter().min().unwrap().1);
    let mut ids = BTreeSet::new();
    for (place, stream) in streams.iter_mut().enumerate() {
        let (first, second) = (next_change(stream).await, next_change(stream).await);
        assert!(first.concurrent == Default::default(), "nothing was known of it yet: {first:?}");
        if place % 2 == 1 {
            assert_eq!(second.concurrent.beside, [first.dot]);
            continue;
        }
        // Whichever came second tells.
        if second.dot == winner {
            let [(beaten, id)] = &second.concurrent.beat[..] else { panic!("{second:?}") };
            assert_eq!(*beaten, loser);
            ids.insert(id.clone());
        } else {
            assert!(second.has_lost());
            let (to, id) = second.concurrent.lost_to.clone().unwrap();
            assert_eq!((second.dot, to), (loser, winner));
            ids.insert(id);
        }
    }
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(ids.first().unwrap().len(), 32);

    // What settles a conflict replaces more than one.
    let seen = eu.namespace("carts").get("k").await.unwrap();
    assert_eq!(seen.versions.len(), 2);
    eu.namespace("carts").put("k", "both").context(seen.context).await.unwrap();
    for place in [1, 3] {
        let settled = next_change(&mut streams[place]).await;
        let replaced: BTreeSet<Dot> = settled.supersedes.iter().copied().collect();
        let both = [dots[&("carts", "us")].1, dots[&("carts", "eu")].1];
        assert_eq!(replaced, both.into_iter().collect());
        assert!(settled.concurrent.beside.is_empty());
    }
    cluster.member("eu").stop().await;
    cluster.stop().await;
}

type Raw = Streaming<proto::WatchResponse>;

/// A watch without the client library, which would hide how a stream ends.
async fn raw_watch(address: &str, request: proto::WatchRequest) -> Result<Raw, Status> {
    let channel =
        Endpoint::from_shared(format!("http://{address}")).expect("an address").connect_lazy();
    let mut client = WatchServiceClient::new(channel);
    Ok(client.watch(request).await?.into_inner())
}

fn raw_request(start: Option<proto::watch_request::Start>) -> proto::WatchRequest {
    proto::WatchRequest { namespace: "default".into(), start, ..Default::default() }
}

/// Reads to the end; answers why that came, the token that it carries, and what came before it.
async fn to_end(mut stream: Raw) -> (Status, Bytes, Vec<proto::WatchResponse>) {
    let mut responses = Vec::new();
    loop {
        match tokio::time::timeout(PATIENCE, stream.next()).await.expect("it ends") {
            Some(Ok(response)) => responses.push(response),
            Some(Err(status)) => {
                let info = status.get_details_error_info();
                let token = info.and_then(|info| info.metadata.get("resume_token").cloned());
                let token = token.map(|token| STANDARD.decode(token).expect("base64"));
                return (status, token.unwrap_or_default().into(), responses);
            }
            None => panic!("it ended without a reason"),
        }
    }
}

fn reason_of(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

fn keys_of(responses: &[proto::WatchResponse]) -> BTreeSet<Vec<u8>> {
    use proto::watch_event::Body;
    let events = responses.iter().flat_map(|response| &response.events);
    let keys = events.filter_map(|event| match event.body.as_ref()? {
        Body::Change(change) => Some(change.key.to_vec()),
        Body::SnapshotEntry(entry) => Some(entry.key.to_vec()),
        Body::SnapshotDone(_) | Body::Reset(_) | Body::Checkpoint(_) => None,
    });
    keys.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_takes_nothing_is_cut_with_a_token_that_works() {
    let mut cluster = Cluster::start_configured(&[("us", 1)], 2, &[], |config| {
        config.watch.stall_timeout = Duration::from_millis(300);
    })
    .await;
    let us = cluster.client("us").await;
    let mut all = BTreeSet::new();
    // More than what connection and stream take in by themselves.
    for number in 0..160 {
        let key = format!("k{number}");
        us.namespace("default").put(key.clone(), vec![7; 64 << 10]).await.unwrap();
        all.insert(key.into_bytes());
    }
    let address = cluster.member("us").config.listen.client.clone();
    let snapshot = Some(proto::watch_request::Start::Snapshot(proto::Snapshot {}));
    let stream = raw_watch(&address, raw_request(snapshot)).await.unwrap();
    let cut = "tombolo_watch_ends_total{reason=\"WATCH_TOO_SLOW\"}";
    wait_until("it is cut", async || metric(cluster.member("us"), cut).await >= 1.0).await;
    let (status, token, responses) = to_end(stream).await;
    assert_eq!(
        (status.code(), reason_of(&status).as_str()),
        (Code::ResourceExhausted, "WATCH_TOO_SLOW")
    );
    let last = responses.iter().rev().find(|it| !it.resume_token.is_empty()).unwrap();
    assert_eq!(last.resume_token, token, "the status says the same as the last response");
    let mut keys = keys_of(&responses);
    assert!(keys.len() < all.len(), "it was cut before its end");

    let start = Some(proto::watch_request::Start::ResumeToken(token));
    let mut stream = raw_watch(&address, raw_request(start)).await.unwrap();
    while keys != all {
        let response = tokio::time::timeout(PATIENCE, stream.next()).await.expect("the rest");
        keys.extend(keys_of(&[response.unwrap().unwrap()]));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_ends_its_watches_with_a_token() {
    let mut cluster = Cluster::start(&[("us", 1)], 2).await;
    let us = cluster.client("us").await;
    let address = cluster.member("us").config.listen.client.clone();
    let mut stream = raw_watch(&address, raw_request(None)).await.unwrap();
    stream.next().await.unwrap().unwrap();
    us.namespace("default").put("seen", "v").await.unwrap();
    let response = stream.next().await.unwrap().unwrap();
    assert_eq!(keys_of(&[response]).len(), 1);
    assert_eq!(metric(cluster.member("us"), "tombolo_watchers").await, 1.0);

    let (ended, ()) = tokio::join!(to_end(stream), cluster.member("us").stop());
    let (status, token, _) = ended;
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::Unavailable, "DRAINING"));
    cluster.member("us").start().await;
    cluster.wait_ready().await;
    let us = cluster.client("us").await;
    us.namespace("default").put("after", "v").await.unwrap();
    let mut stream = opened(watch(&us, "default").resume(token)).await;
    assert_eq!(next_change(&mut stream).await.key, "after");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_from_its_region_sends_its_watchers_away() {
    let mut cluster = Cluster::start(&[("us", 3)], 2).await;
    let address = cluster.members[2].config.listen.client.clone();
    let mut stream = raw_watch(&address, raw_request(None)).await.unwrap();
    stream.next().await.unwrap().unwrap();
    for place in [0, 1] {
        cluster.members[place].stop().await;
    }
    let (status, token, _) = to_end(stream).await;
    assert_eq!((status.code(), reason_of(&status).as_str()), (Code::Unavailable, "NO_LEADER"));
    let refused = match raw_watch(&address, raw_request(None)).await {
        Err(status) => reason_of(&status),
        Ok(_) => "it is served".to_owned(),
    };
    assert_eq!(refused, "NO_LEADER");

    for place in [0, 1] {
        cluster.members[place].start().await;
    }
    cluster.wait_ready().await;
    let us = cluster.client("us").await;
    let mut stream = opened(watch(&us, "default").resume(token)).await;
    us.namespace("default").put("k", "v").await.unwrap();
    assert_eq!(next_change(&mut stream).await.key, "k");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_lacks_what_a_token_covers_says_so_and_waits_for_it() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    eu.admin().pause_link("us").await.unwrap();
    wait_until("eu hears nothing", async || {
        let links = eu.admin().list_links(None).await.unwrap().links;
        links.iter().all(|it| it.phase() == proto::LinkPhase::Paused)
    })
    .await;
    let mut stream = opened(watch(&us, "default")).await;
    us.namespace("default").put("k", "1").await.unwrap();
    next_change(&mut stream).await;
    let token = stream.token().clone();
    us.namespace("default").put("k", "2").await.unwrap();

    let mut stream = opened(watch(&eu, "default").resume(token)).await;
    eu.namespace("default").put("other", "v").await.unwrap();
    let waits = WatchEvent::Checkpoint { shards_waiting: 1 };
    while next(&mut stream).await.event != waits {}
    eu.admin().resume_link("us").await.unwrap();
    let mut keys = BTreeMap::new();
    while keys.len() < 2 {
        let change = next_change(&mut stream).await;
        keys.insert(change.key.clone(), change.value().cloned());
    }
    assert_eq!(keys[&b"k"[..]].as_deref(), Some(&b"2"[..]), "the first one is covered");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_watched_is_refused_and_what_no_longer_can_ends() {
    let mut cluster = Cluster::start_configured(&[("us", 1)], 2, &[], |config| {
        config.watch.max_watchers = 3;
    })
    .await;
    let us = cluster.client("us").await;
    us.admin().create_namespace("orders", proto::Rule::Lww).await.unwrap();
    let token = opened(watch(&us, "orders")).await.token().clone();
    let patience = Duration::from_millis(100);
    let reasons = [
        (watch(&us, "nowhere"), "NAMESPACE_NOT_FOUND"),
        (watch(&us, "default").resume(token.clone()), "RESUME_TOKEN_MISMATCH"),
        (watch(&us, "orders").prefix("a").resume(token.clone()), "RESUME_TOKEN_MISMATCH"),
        (watch(&us, "orders").local_only().resume(token.clone()), "RESUME_TOKEN_MISMATCH"),
        (watch(&us, "orders").resume("nonsense"), "RESUME_TOKEN_INVALID"),
        (watch(&us, "orders").range("b".."a"), "REQUEST_INVALID"),
        (watch(&us, "orders").local_only().origins(["us"]), "REQUEST_INVALID"),
        (watch(&us, "orders").origins(["mars"]), "REGION_NOT_FOUND"),
        (watch(&us, "orders").checkpoint_interval(Duration::ZERO), "REQUEST_INVALID"),
        (watch(&us, "orders").prefix("x".repeat(5000)), "KEY_TOO_LONG"),
    ];
    for (watch, reason) in reasons {
        let error = refusal(watch.give_up_after(patience)).await;
        assert_eq!(error.reason(), Some(reason), "{error}");
    }

    let mut streams = Vec::new();
    wait_until("those that were dropped have made room", async || {
        let mut stream = watch(&us, "orders").give_up_after(patience).stream();
        match tokio::time::timeout(PATIENCE, stream.next()).await.expect("an answer") {
            Some(Ok(_)) => streams.push(stream),
            other => panic!("{other:?}"),
        }
        streams.len() == 3
    })
    .await;
    let full = refusal(watch(&us, "orders").give_up_after(patience)).await;
    assert_eq!(full.reason(), Some("OVERLOADED"), "{full}");

    us.admin().delete_namespace("orders", None).await.unwrap();
    for stream in &mut streams {
        let ended = loop {
            match tokio::time::timeout(PATIENCE, stream.next()).await.expect("it ends") {
                Some(Ok(Watched { event: WatchEvent::Checkpoint { .. }, .. })) => {}
                Some(Err(error)) => break error,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ended.reason(), Some("NAMESPACE_NOT_FOUND"));
    }
    us.admin().create_namespace("orders", proto::Rule::Lww).await.unwrap();
    wait_until("they have made room", async || {
        metric(cluster.member("us"), "tombolo_watchers").await == 0.0
    })
    .await;
    let another = refusal(watch(&us, "orders").resume(token)).await;
    assert_eq!(another.reason(), Some("RESUME_TOKEN_MISMATCH"), "it is another one now");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_is_shut_out_says_so_and_what_it_wrote_alone_is_taken_back() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1), ("ap", 1)], 2).await;
    let (us, ap) = (cluster.client("us").await, cluster.client("ap").await);
    us.namespace("default").put("kept", "v").ack_regions(2).await.unwrap();
    cluster.member("us").stop().await;
    cluster.member("eu").stop().await;
    let mut copy = Copy::default();
    let mut stream = watch(&ap, "default").snapshot().stream();
    for number in 0..10 {
        ap.namespace("default").put(format!("alone{number}"), "v").await.unwrap();
    }
    follow_until_equal(&mut stream, &mut copy, &ap, "default").await;
    assert_eq!(copy.values().len(), 11);
    let token = stream.token().clone();
    drop(stream);
    cluster.member("ap").stop().await;
    for name in ["us", "eu"] {
        cluster.member(name).start().await;
    }
    cluster.wait_ready().await;
    let us = cluster.client("us").await;
    us.admin().fence_region("ap").await.unwrap();
    cluster.member("ap").start().await;
    cluster.wait_ready().await;
    let ap = cluster.client("ap").await;
    wait_until("ap refuses, and says why", async || {
        let mut stream = watch(&ap, "default").resume(token.clone()).stream();
        loop {
            match tokio::time::timeout(PATIENCE, stream.next()).await.expect("an answer") {
                Some(Ok(Watched { event: WatchEvent::Checkpoint { .. }, .. })) => {}
                Some(Err(error)) => return error.reason() == Some("REGION_FENCED"),
                other => panic!("{other:?}"),
            }
        }
    })
    .await;

    // Elsewhere what it wrote alone can never come: the watcher is told.
    let mut stream = opened(watch(&us, "default").resume(token.clone())).await;
    let mut moved =
        Copy { held: copy.held.clone(), shards: copy.shards.clone(), ..Copy::default() };
    follow_until_equal(&mut stream, &mut moved, &us, "default").await;
    assert!(moved.resets > 0);
    assert_eq!(moved.values().len(), 1);

    // And in its next life, too: the same watch goes on through all of it.
    let mut stream = watch(&ap, "default").resume(token).give_up_after(PATIENCE);
    us.admin().add_region("ap", 0, vec![]).await.unwrap();
    wait_until("ap serves again", async || {
        let probe = stream.clone();
        matches!(tokio::time::timeout(PATIENCE, probe.stream().next()).await, Ok(Some(Ok(_))))
    })
    .await;
    stream = stream.give_up_after(PATIENCE);
    let mut stream = stream.stream();
    follow_until_equal(&mut stream, &mut copy, &ap, "default").await;
    assert!(copy.resets > 0);
    assert_eq!(copy.values(), values(&us, "default").await);
    cluster.stop().await;
}
