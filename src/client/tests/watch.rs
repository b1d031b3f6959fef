//! Watches against a region that breaks them on command.

mod fake;

use fake::watch::{change, checkpoint, dot, response, version};
use fake::{Region, refusal};
use futures::StreamExt;
use std::time::Duration;
use tombolo_client::proto::watch_event::Body;
use tombolo_client::proto::watch_request::Start;
use tombolo_client::{
    Client, ClientConfig, Code, Dot, Error, Previous, ResetReason, Watch, WatchEvent, Watched,
    proto,
};
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

async fn watch(region: &Region) -> Watch {
    let endpoints = vec![region.addresses[0].clone()];
    let config = ClientConfig { endpoints, ..ClientConfig::default() };
    Client::connect(config).await.expect("connected").namespace("default").watch()
}

fn key_of(item: &Watched) -> String {
    match &item.event {
        WatchEvent::Change(change) => String::from_utf8(change.key.to_vec()).expect("text"),
        other => format!("{other:?}"),
    }
}

#[tokio::test]
async fn a_broken_watch_goes_on_after_its_last_token_through_another_node() {
    let region = Region::start(2).await;
    region.play([
        vec![
            Ok(response("t1", vec![checkpoint()])),
            Ok(response("t2", vec![Body::Change(change("a", Some("1"), 1))])),
            // In the midst of a batch: no token.
            Ok(response("", vec![Body::Change(change("b", Some("1"), 2))])),
            Err(refusal(Code::Unavailable, "DRAINING", &[("resume_token", "dDI=")])),
        ],
        vec![
            Ok(response("t3", vec![Body::Change(change("b", Some("1"), 2))])),
            Err(refusal(Code::ResourceExhausted, "WATCH_TOO_SLOW", &[])),
        ],
    ]);
    let mut stream = watch(&region).await.snapshot().stream();
    let mut keys = Vec::new();
    while keys.len() < 3 {
        let item = stream.next().await.expect("it goes on");
        match item {
            Ok(item) if matches!(item.event, WatchEvent::Change(_)) => keys.push(key_of(&item)),
            Ok(item) => assert_eq!(item.token.as_deref(), Some(&b"t1"[..])),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(keys, ["a", "b", "b"], "what came after the token comes again");
    assert_eq!(stream.token().as_ref(), b"t3");
    let watched = region.watched();
    assert_eq!(watched[0].1.start, Some(Start::Snapshot(proto::Snapshot {})));
    assert_eq!(watched[1].1.start, Some(Start::ResumeToken("t2".into())));
    assert_ne!(watched[0].0, watched[1].0, "a node that stops is left");
    // Cut as too slow without word of when to come back: it is told.
    let ended = stream.next().await.expect("an end").expect_err("cut");
    assert_eq!(ended.reason(), Some("WATCH_TOO_SLOW"));
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn a_watch_that_was_too_slow_goes_on_when_it_is_told_when() {
    let region = Region::start(1).await;
    let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(1)));
    let slow = Status::with_error_details(Code::ResourceExhausted, "slow", details);
    region.play([
        vec![Ok(response("t1", vec![checkpoint()])), Err(slow)],
        vec![Ok(response("t2", vec![checkpoint()]))],
    ]);
    let mut stream = watch(&region).await.stream();
    for token in ["t1", "t2"] {
        let item = stream.next().await.expect("it goes on").expect("served");
        assert_eq!(item.token.as_deref(), Some(token.as_bytes()));
    }
    assert_eq!(region.watched()[0].1.start, None);
}

#[tokio::test]
async fn everything_that_an_event_says_arrives() {
    let region = Region::start(1).await;
    let told = proto::Change {
        supersedes: vec![dot(1), dot(2), dot(3)],
        previous: vec![
            proto::Previous {
                dot: Some(dot(1)),
                state: proto::PreviousState::Value.into(),
                version: Some(version("old", 1)),
            },
            proto::Previous {
                dot: Some(dot(2)),
                state: proto::PreviousState::Deleted.into(),
                version: None,
            },
            proto::Previous {
                dot: Some(dot(3)),
                state: proto::PreviousState::Unknown.into(),
                version: None,
            },
        ],
        conflict: Some(proto::ChangeConflict {
            lost_to: Some(dot(9)),
            ledger_id: "ab".into(),
            beat: vec![proto::BeatenWrite { dot: Some(dot(7)), ledger_id: "cd".into() }],
            beside: vec![dot(8)],
        }),
        current: false,
        ..change("k", Some("new"), 4)
    };
    let entry = proto::SnapshotEntry {
        key: "e".into(),
        versions: vec![version("x", 5)],
        ..Default::default()
    };
    let gone = proto::SnapshotEntry {
        key: "g".into(),
        versions: vec![],
        deletion: Some(proto::Deletion {
            dot: Some(dot(6)),
            origin_region: "us".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let reset = proto::Reset { reason: proto::ResetReason::HistoryGone.into() };
    region.play([vec![Ok(response(
        "t",
        vec![
            Body::Reset(reset),
            Body::SnapshotEntry(entry),
            Body::SnapshotEntry(gone),
            Body::SnapshotDone(proto::SnapshotDone { shards_left: 2 }),
            Body::Change(told),
            Body::Change(change("k", None, 5)),
        ],
    ))]]);
    let mut stream = watch(&region).await.stream();
    let mut items = Vec::new();
    while items.len() < 6 {
        items.push(stream.next().await.expect("an item").expect("served"));
    }
    assert!(items[..5].iter().all(|item| item.token.is_none()));
    assert_eq!(items[5].token.as_deref(), Some(&b"t"[..]));
    let reset = WatchEvent::Reset { shard: 1, reason: ResetReason::HistoryGone };
    assert_eq!(items[0].event, reset);
    let WatchEvent::Entry { shard: 1, entry, deletion: None, .. } = &items[1].event else {
        panic!("{:?}", items[1]);
    };
    assert_eq!(entry.value().expect("a value"), "x");
    let WatchEvent::Entry { entry, deletion: Some(deletion), .. } = &items[2].event else {
        panic!("{:?}", items[2]);
    };
    assert!(entry.versions.is_empty());
    assert_eq!(deletion.dot.seq, 6);
    assert_eq!(items[3].event, WatchEvent::SnapshotDone { shard: 1, shards_left: 2 });
    let WatchEvent::Change(told) = &items[4].event else { panic!("{:?}", items[4]) };
    let seq = |seq| Dot { region: 1, incarnation: 1, seq };
    assert_eq!((told.id(), told.value().expect("a value").as_ref()), ((1, seq(4)), &b"new"[..]));
    assert_eq!(told.supersedes, [seq(1), seq(2), seq(3)]);
    let [(_, Previous::Value(old)), (_, Previous::Deleted), (_, Previous::Unknown)] =
        &told.previous[..]
    else {
        panic!("{:?}", told.previous);
    };
    assert_eq!(old.value, "old");
    assert!(told.has_lost() && !told.current);
    assert_eq!(told.concurrent.lost_to, Some((seq(9), "ab".into())));
    assert_eq!(told.concurrent.beat, [(seq(7), "cd".into())]);
    assert_eq!(told.concurrent.beside, [seq(8)]);
    let WatchEvent::Change(deleted) = &items[5].event else { panic!("{:?}", items[5]) };
    assert!(deleted.version.is_none() && deleted.current);
}

#[tokio::test]
async fn what_is_asked_for_is_sent() {
    let region = Region::start(1).await;
    region.play([vec![Ok(response("t", vec![checkpoint()]))]]);
    let watch = watch(&region).await.prefix("p").range("pa"..).origins(["eu", "ap"]).previous();
    let watch = watch.resume("where").checkpoint_interval(Duration::from_millis(1500));
    watch.stream().next().await.expect("an item").expect("served");
    let (_, sent) = region.watched().remove(0);
    let interval = prost_types::Duration { seconds: 1, nanos: 500_000_000 };
    let expected = proto::WatchRequest {
        namespace: "default".into(),
        prefix: "p".into(),
        start_key: "pa".into(),
        origin_regions: vec!["eu".into(), "ap".into()],
        previous: true,
        checkpoint_interval: Some(interval),
        start: Some(Start::ResumeToken("where".into())),
        ..Default::default()
    };
    assert_eq!(sent, expected);
}

#[tokio::test]
async fn a_refusal_ends_the_watch_and_nonsense_is_an_error() {
    let region = Region::start(1).await;
    let refused = refusal(Code::NotFound, "NAMESPACE_NOT_FOUND", &[]);
    region.play([vec![Err(refused)]]);
    let mut stream = watch(&region).await.stream();
    let error = stream.next().await.expect("an end").expect_err("refused");
    assert_eq!(error.reason(), Some("NAMESPACE_NOT_FOUND"));
    assert!(stream.next().await.is_none() && stream.token().is_empty());

    let unknown = proto::WatchResponse {
        resume_token: "t".into(),
        events: vec![proto::WatchEvent { shard: 0, body: None }],
    };
    region.play([vec![Ok(unknown)]]);
    let error = watch(&region).await.stream().next().await.expect("an end").expect_err("nonsense");
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
}

#[tokio::test]
async fn a_server_that_falls_silent_is_left_and_patience_ends() {
    let region = Region::start(1).await;
    let silent = vec![Ok(response("t", vec![checkpoint()]))];
    let broken = (0..100).map(|_| vec![Err(Status::unavailable("no"))]);
    region.play(std::iter::once(silent).chain(broken));
    let watch = watch(&region).await.checkpoint_interval(Duration::from_millis(100));
    let mut stream = watch.give_up_after(Duration::from_millis(500)).stream();
    stream.next().await.expect("an item").expect("served");
    let error = stream.next().await.expect("an end").expect_err("nobody answers");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    let watched = region.watched();
    assert!(watched.len() > 2, "it was tried again");
    assert_eq!(watched[1].1.start, Some(Start::ResumeToken("t".into())));
}

/// A watch that reads on until it is given up; how many connections it took.
async fn connections_until_given_up(region: &Region, patience: Duration) -> usize {
    let mut stream = watch(region).await.give_up_after(patience).stream();
    while stream.next().await.expect("an item or an end").is_ok() {}
    region.watched().len()
}

#[tokio::test]
async fn a_node_that_fails_after_its_first_word_is_asked_less_and_less_and_given_up() {
    let region = Region::start(1).await;
    let fails = |_| vec![Ok(response("t", vec![checkpoint()])), Err(Status::unavailable("no"))];
    region.play((0..1000).map(fails));
    let connections = connections_until_given_up(&region, Duration::from_secs(1)).await;
    assert!((3..=12).contains(&connections), "{connections} connections in a second");
}

#[tokio::test]
async fn a_connection_that_brings_changes_counts_and_patience_begins_anew() {
    let region = Region::start(1).await;
    let serves = |seq| {
        let served = response("t", vec![Body::Change(change("k", Some("v"), seq))]);
        vec![Ok(response("t", vec![checkpoint()])), Ok(served), Err(Status::unavailable("no"))]
    };
    let gone = refusal(Code::NotFound, "NAMESPACE_NOT_FOUND", &[]);
    region.play((1..=40).map(serves).chain([vec![Err(gone)]]));
    let connections = connections_until_given_up(&region, Duration::from_millis(300)).await;
    assert_eq!(connections, 41, "each pause is a short one");
}
