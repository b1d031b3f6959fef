//! The client against a region that misbehaves on command.

mod fake;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use fake::{Fault, Region, joined, refusal, token};
use futures::TryStreamExt;
use std::time::Duration;
use tombolo_client::{
    Client, ClientConfig, Code, ConflictFilter, Consistency, Dot, Error, Operations, Resolution,
    Session, proto,
};
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

async fn connect(region: &Region) -> Client {
    connect_with(region, ClientConfig::default()).await
}

async fn connect_with(region: &Region, config: ClientConfig) -> Client {
    let endpoints = vec![region.addresses[0].clone()];
    Client::connect(ClientConfig { endpoints, ..config }).await.expect("connected")
}

fn unknown_outcome() -> Status {
    refusal(Code::Unavailable, "OUTCOME_UNKNOWN", &[])
}

#[tokio::test]
async fn calls_go_straight_to_the_leader_and_forbid_forwarding() {
    let region = Region::start(3).await;
    region.state.lock().leader = 2;
    let client = connect(&region).await;
    let keys = client.namespace("default");

    let written = keys.put("k", "v").await.expect("written");
    assert_eq!(written.dot, Dot { region: 1, incarnation: 1, seq: 1 });
    let got = keys.get("k").await.expect("got");
    assert_eq!(got.value().expect("a value"), "v");
    assert_eq!(got.versions[0].dot, written.dot);
    keys.delete("k").await.expect("deleted");
    assert_eq!(keys.get("k").await.expect("got").value(), None);

    for call in region.state.lock().calls.iter() {
        assert_eq!((call.node, call.no_forward, call.has_deadline), (2, true, true), "{call:?}");
    }
}

#[tokio::test]
async fn a_hint_is_followed_at_once_and_remembered() {
    let region = Region::start(3).await;
    let client = connect(&region).await;
    region.state.lock().leader = 3;
    let keys = client.namespace("default");
    for _ in 0..2 {
        keys.put("k", "v").await.expect("written");
    }
    let nodes: Vec<u64> = region.calls("put").iter().map(|call| call.node).collect();
    assert_eq!(nodes, [1, 3, 3]);
    assert_eq!(region.state.lock().refreshes, 1, "a hint needs no refresh");
}

#[tokio::test]
async fn a_refusal_without_a_hint_refreshes_the_topology() {
    let region = Region::start(3).await;
    let client = connect(&region).await;
    {
        let mut state = region.state.lock();
        (state.leader, state.term, state.hints) = (2, 2, false);
    }
    // Forwarded at first, then the new leader is found.
    let direct = |call: &fake::Call| call.node == 2 && call.no_forward;
    let found = async {
        while !region.calls("put").iter().any(direct) {
            client.namespace("default").put("k", "v").await.expect("written");
        }
    };
    tokio::time::timeout(Duration::from_secs(10), found).await.expect("found the new leader");
}

#[tokio::test]
async fn a_dead_leader_is_left_for_a_node_that_may_forward() {
    let region = Region::start(2).await;
    let dead = region.add_dead_node().await;
    region.state.lock().advertised = Some(dead);
    let client = connect(&region).await;
    client.namespace("default").put("k", "v").await.expect("written");
    let calls = region.calls("put");
    assert_eq!(calls.len(), 1);
    assert!(!calls[0].no_forward, "any node takes it and forwards");
}

#[tokio::test]
async fn calls_that_fail_together_refresh_the_topology_once() {
    let region = Region::start(1).await;
    let dead = region.add_dead_node().await;
    region.state.lock().advertised = Some(dead);
    let client = connect(&region).await;
    let before = region.state.lock().refreshes;
    let keys = client.namespace("default");
    let puts = (0..50).map(|n| keys.put(format!("k{n}"), "v").into_future());
    futures::future::try_join_all(puts).await.expect("written");
    let refreshes = region.state.lock().refreshes - before;
    assert!(refreshes <= 5, "{refreshes} refreshes for 50 failures");
}

#[tokio::test]
async fn a_repeat_carries_the_same_request_id_and_is_applied_once() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    region.fail(None, "put", Fault::ApplyThen(unknown_outcome()));
    region.fail(None, "put", Fault::ApplyThen(Status::cancelled("the node stops")));
    let written = client.namespace("default").put("k", "v").await.expect("written");
    assert_eq!(written.dot.seq, 1);
    let calls = region.calls("put");
    assert_eq!(calls.len(), 3);
    assert!(calls.iter().all(|call| call.request_id == calls[0].request_id));
    assert_ne!(calls[0].request_id.expect("an id").client, 0);
    assert_eq!(region.state.lock().applied, 1);
}

#[tokio::test]
async fn writes_never_share_a_request_id() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let keys = client.namespace("default");
    keys.put("a", "1").await.expect("written");
    keys.clone().put("a", "1").await.expect("written");
    keys.delete("a").await.expect("deleted");
    keys.commit().put("a", "2").await.expect("committed");
    let state = region.state.lock();
    let mut ids: Vec<_> = state.calls.iter().map(|call| call.request_id.expect("an id")).collect();
    ids.dedup_by_key(|id| id.number);
    assert_eq!(ids.len(), 4);
}

#[tokio::test]
async fn a_chosen_request_id_finds_out_what_became_of_a_write() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let keys = client.namespace("default");
    let id = client.next_request_id();
    region.fail(None, "put", Fault::ApplyThen(Status::internal("disk")));
    let error = keys.put("k", "v").request_id(id).await.expect_err("no answer");
    assert!(error.outcome_unknown(), "{error}");
    assert_eq!(keys.put("k", "v").request_id(id).await.expect("known").dot.seq, 1);
    assert_eq!(region.state.lock().applied, 1);
}

#[tokio::test]
async fn a_call_without_a_request_id_is_not_repeated_when_its_outcome_is_open() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    region.fail(None, "create_namespace", Fault::ApplyThen(unknown_outcome()));
    let created = client.admin().create_namespace("carts", proto::Rule::Siblings).await;
    let error = created.expect_err("not repeated");
    assert!(matches!(error, Error::Unavailable { outcome_unknown: true, .. }), "{error:?}");
    assert_eq!(error.reason(), Some("OUTCOME_UNKNOWN"));
    assert_eq!(region.calls("create_namespace").len(), 1);
}

#[tokio::test]
async fn refusals_for_good_are_not_repeated_and_keep_the_servers_words() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let keys = client.namespace("default");
    for (code, reason) in [
        (Code::InvalidArgument, "KEY_TOO_LONG"),
        (Code::FailedPrecondition, "CLUSTER_MISMATCH"),
        (Code::PermissionDenied, "NAMESPACE_DENIED"),
        (Code::ResourceExhausted, "DISK_FULL"),
        (Code::NotFound, "NAMESPACE_NOT_FOUND"),
    ] {
        let before = region.calls("put").len();
        region.fail(None, "put", Fault::Refuse(refusal(code, reason, &[("limit", "4096")])));
        let error = keys.put("k", "v").await.expect_err("refused");
        assert_eq!((error.code(), error.reason()), (code, Some(reason)));
        assert!(!error.outcome_unknown(), "{error}");
        assert_eq!(error.detail().expect("said").metadata["limit"], "4096");
        assert_eq!(region.calls("put").len(), before + 1);
    }
}

#[tokio::test]
async fn an_overloaded_server_is_asked_again_after_the_time_it_names() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let wait = Duration::from_millis(50);
    let details = ErrorDetails::with_retry_info(Some(wait));
    let status = Status::with_error_details(Code::ResourceExhausted, "slow down", details);
    region.fail(None, "put", Fault::Refuse(status));
    let begin = std::time::Instant::now();
    client.namespace("default").put("k", "v").await.expect("written");
    assert!(begin.elapsed() >= wait);
    assert_eq!(region.calls("put").len(), 2);
}

#[tokio::test]
async fn the_deadline_bounds_a_call_and_says_whether_the_outcome_is_known() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let keys = client.namespace("default");
    let deadline = Duration::from_millis(100);

    region.fail(None, "put", Fault::Hang);
    let error = keys.put("k", "v").deadline(deadline).await.expect_err("out of time");
    assert!(matches!(error, Error::Deadline { outcome_unknown: true, dot: None, .. }), "{error:?}");
    assert_eq!(error.code(), Code::DeadlineExceeded);

    region.fail(None, "get", Fault::Hang);
    let error = keys.get("k").deadline(deadline).await.expect_err("out of time");
    assert!(matches!(error, Error::Deadline { outcome_unknown: false, .. }), "{error:?}");
}

#[tokio::test]
async fn a_node_that_hangs_is_left_for_another_with_the_same_request_id() {
    let region = Region::start(2).await;
    let attempt_timeout = Duration::from_millis(100);
    let config = ClientConfig { attempt_timeout, ..Default::default() };
    let client = connect_with(&region, config).await;
    region.fail(Some(1), "put", Fault::Hang);
    client.namespace("default").put("k", "v").await.expect("written");
    let calls = region.calls("put");
    assert_eq!(calls.iter().map(|call| call.node).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(calls[0].request_id, calls[1].request_id);
}

#[tokio::test]
async fn missing_acknowledgements_come_with_the_dot_of_the_write_that_stands() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let status = refusal(Code::DeadlineExceeded, "ACK_REGIONS_PENDING", &[("dot", "1.1:9")]);
    region.fail(None, "put", Fault::ApplyThen(status));
    let put = client.namespace("default").put("k", "v").ack_regions(2);
    let error = put.await.expect_err("out of time");
    assert!(!error.outcome_unknown(), "it stands");
    let Error::Deadline { dot, .. } = error else { panic!("{error:?}") };
    assert_eq!(dot, Some(Dot { region: 1, incarnation: 1, seq: 9 }));
}

#[tokio::test]
async fn a_session_knows_its_write_whose_acknowledgements_are_missing() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let session = client.session();
    let keys = client.namespace("default").with_session(&session);
    keys.put("before", "v").await.expect("written");

    let (before, token) = (token(b"before", 1), token(b"k", 2));
    let metadata = [("dot", "1.1:2"), ("session_token", &*STANDARD.encode(&token))];
    let status = refusal(Code::DeadlineExceeded, "ACK_REGIONS_PENDING", &metadata);
    region.fail(None, "put", Fault::ApplyThen(status));
    let error = keys.put("k", "v").ack_regions(2).await.expect_err("out of time");
    let Error::Deadline { token: told, dot: Some(_), .. } = error else { panic!("{error:?}") };
    assert_eq!(told, token);
    assert_eq!(session.token(), joined(&[&before, &token]));
    keys.await_replication(2).await.expect("answered");
    assert_eq!(region.calls("await_replication")[0].token, session.token());
}

#[tokio::test]
async fn a_write_is_answered_whatever_its_token_is_and_reads_say_what_they_could_miss() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let session = client.session();
    let keys = client.namespace("default").with_session(&session);
    region.state.lock().tokens = ["of", "another", "cluster"].map(Bytes::from).into();
    let puts = ["a", "b"].map(|key| keys.put(key, "v").into_future());
    futures::future::try_join_all(puts).await.expect("both stand");
    keys.delete("a").await.expect("writes go on");

    let refused = [
        keys.get("a").await.err(),
        keys.batch_get(["a"]).await.err(),
        keys.scan().collect().await.err(),
        keys.await_replication(1).await.err(),
    ];
    for error in refused {
        let error = error.expect("refused");
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains("could miss"), "{error}");
    }
    let anew = keys.with_session(&client.session());
    assert_eq!(anew.get("b").await.expect("got").value().expect("a value"), "v");
}

#[tokio::test]
async fn a_session_sends_what_it_has_seen_and_then_reads_causally() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let session = client.session();
    let keys = client.namespace("default").with_session(&session);
    keys.get("k").await.expect("got");
    keys.put("k", "v").await.expect("written");
    keys.get("k").await.expect("got");
    keys.get("k").consistency(Consistency::Local).await.expect("got");

    let gets = region.calls("get");
    let level = |at: usize| gets[at].consistency.and_then(|it| it.level).expect("a level");
    use proto::read_consistency::Level;
    assert_eq!(level(0), Level::Linearizable(proto::Linearizable {}));
    assert!(gets[0].token.is_empty());
    assert_eq!(level(1), Level::Causal(proto::Causal {}));
    assert_eq!(gets[1].token, token(b"k", 1));
    assert_eq!(level(2), Level::Local(proto::Local {}));
}

#[tokio::test]
async fn a_session_may_say_how_fresh_its_reads_are_and_a_call_may_differ() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let age = Duration::from_millis(1500);
    let session = client.session().with_consistency(Consistency::MaxStaleness(age));
    let keys = client.namespace("default").with_session(&session);
    keys.put("k", "v").await.expect("written");
    keys.get("k").await.expect("got");
    keys.batch_get(["k"]).await.expect("got");
    keys.get("k").consistency(Consistency::Causal).await.expect("got");

    use proto::read_consistency::Level;
    let level = |call: &fake::Call| call.consistency.and_then(|it| it.level).expect("a level");
    let bounded = Level::MaxStaleness(prost_types::Duration { seconds: 1, nanos: 500_000_000 });
    let gets = region.calls("get");
    assert_eq!((level(&gets[0]), &gets[0].token), (bounded, &session.token()));
    assert_eq!(level(&gets[1]), Level::Causal(proto::Causal {}));
    assert_eq!(level(&region.calls("batch_get")[0]), bounded);
}

#[tokio::test]
async fn concurrent_calls_of_one_session_lose_nothing_seen() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let session = client.session();
    let keys = client.namespace("default").with_session(&session);
    let puts = (0..8).map(|n| keys.put(format!("k{n}"), "v").into_future());
    let written = futures::future::try_join_all(puts).await.expect("written");
    assert!(region.calls("put").iter().all(|call| call.token.is_empty()), "side by side");
    let tokens: Vec<&[u8]> = written.iter().map(|it| &it.token[..]).collect();
    assert_eq!(session.token(), joined(&tokens));

    let other = Session::from_token(token(b"elsewhere", 99));
    other.merge(&session.token()).expect("one cluster");
    assert_eq!(other.token(), joined(&[&token(b"elsewhere", 99), &session.token()]));
    assert!(matches!(other.merge(&Bytes::from_static(b"junk")), Err(Error::Invalid { .. })));
}

#[tokio::test]
async fn a_batch_of_any_size_answers_in_the_order_asked() {
    let region = Region::start(2).await;
    let client = connect(&region).await;
    let names: Vec<String> = (0..300).map(|n| format!("k{n}")).collect();
    for name in names.iter().step_by(2) {
        region.put("default", name.clone(), name.clone());
    }
    let gots = client.namespace("default").batch_get(&names).await.expect("got");
    assert_eq!(gots.len(), names.len());
    for (at, (name, got)) in names.iter().zip(&gots).enumerate() {
        assert_eq!(&got.key[..], name.as_bytes());
        assert_eq!(got.value().is_some(), at % 2 == 0, "{name}");
    }
    assert!(region.calls("batch_get").iter().all(|call| !call.no_forward));
}

#[tokio::test]
async fn a_value_with_more_elements_says_so_in_a_batch_and_where_they_go_on_in_a_get() {
    let region = Region::start(1).await;
    let keys = connect(&region).await.namespace("default");
    region.put("default", "large", "v");
    region.put("default", "small", "v");
    region.state.lock().partial.insert("large".into());
    let gots = keys.batch_get(["small", "large"]).await.expect("got");
    assert_eq!(gots.iter().map(|got| got.partial).collect::<Vec<_>>(), [false, true]);
    let got = keys.get("large").await.expect("got");
    assert_eq!((got.partial, got.next_elements), (true, fake::NEXT_ELEMENTS));
    let got = keys.get("small").await.expect("got");
    assert!(!got.partial && got.next_elements.is_empty());
}

#[tokio::test]
async fn a_scan_survives_broken_streams_without_losing_or_repeating_a_key() {
    let region = Region::start(3).await;
    let client = connect(&region).await;
    for n in 0..20 {
        region.put("default", format!("k{n:02}"), "v");
    }
    region.put("default", "other", "v");
    region.fail(None, "scan", Fault::BreakScan(2));
    region.fail(None, "scan", Fault::BreakScan(0));
    region.fail(None, "scan", Fault::BreakScan(1));
    let keys = client.namespace("default");
    let entries: Vec<_> =
        keys.scan().prefix("k").limit(17).stream().try_collect().await.expect("all");
    let found: Vec<_> = entries.iter().map(|entry| entry.key.clone()).collect();
    let wanted: Vec<_> = (0..17).map(|n| Bytes::from(format!("k{n:02}"))).collect();
    assert_eq!(found, wanted);
    assert_eq!(region.calls("scan").len(), 4);
}

#[tokio::test]
async fn a_scan_has_ranges_both_directions_and_keys_only() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    for key in ["a", "b", "c", "d"] {
        region.put("default", key, "v");
    }
    let keys = client.namespace("default");
    let listed = |entries: Vec<tombolo_client::Entry>| {
        entries.iter().map(|it| String::from_utf8_lossy(&it.key).into_owned()).collect::<String>()
    };
    assert_eq!(listed(keys.scan().range("b".."d").collect().await.expect("all")), "bc");
    assert_eq!(listed(keys.scan().range("b"..="d").collect().await.expect("all")), "bcd");
    assert_eq!(listed(keys.scan().range("c"..).reverse().collect().await.expect("all")), "dc");
    assert_eq!(listed(keys.scan().limit(1).collect().await.expect("all")), "a");
    let bare = keys.scan().keys_only().collect().await.expect("all");
    assert!(bare.iter().all(|entry| entry.versions[0].value.is_empty()));
    let empty = client.namespace("empty").scan().collect().await.expect("all");
    assert!(empty.is_empty());
}

#[tokio::test]
async fn a_commit_reports_the_checks_that_failed_with_what_is_there() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let keys = client.namespace("default");
    let done = keys.commit().check_absent("{t}a").put("{t}a", "1").put("{t}b", "2").await;
    let done = done.expect("answered");
    assert!(done.committed);
    assert_eq!(done.results.len(), 2);

    let refused = keys
        .commit()
        .check_dot("{t}a", done.results[0].dot)
        .check_absent("{t}b")
        .check_value("{t}a", "9")
        .delete("{t}a")
        .await
        .expect("answered");
    assert!(!refused.committed);
    let failed: Vec<_> = refused.failed.iter().map(|it| (it.check, it.key.clone())).collect();
    assert_eq!(failed, [(1, "{t}b".into()), (2, "{t}a".into())]);
    assert_eq!(refused.failed[0].versions[0].value, "2");
    assert!(matches!(keys.commit().await, Err(Error::Invalid { .. })), "an empty commit");
}

#[tokio::test]
async fn a_context_in_a_commit_belongs_to_the_write_before_it() {
    let region = Region::start(1).await;
    let keys = connect(&region).await.namespace("default");
    let commit = keys.commit().put("{t}a", "1").context("of a").put("{t}b", "2");
    let commit = commit.delete("{t}c").context("of c");
    let commit = commit.mutate("{t}d", Operations::new().add(5)).context("of d");
    let done = commit.await.expect("answered");
    assert_eq!(done.results[3].sum, Some(5));
    let writes = region.state.lock().commits[0].writes.clone();
    let contexts: Vec<_> = writes.iter().map(|write| &write.context[..]).collect();
    assert_eq!(contexts, [&b"of a"[..], b"", b"of c", b"of d"]);

    let stray = keys.commit().context("of a").put("{t}a", "1").await;
    assert!(matches!(stray, Err(Error::Invalid { .. })), "{stray:?}");
}

#[tokio::test]
async fn administration_follows_pages_and_names_what_is_missing() {
    let region = Region::start(1).await;
    let admin = connect(&region).await.admin();
    for name in ["a", "b", "c", "d", "e"] {
        admin.create_namespace(name, proto::Rule::Lww).await.expect("created");
    }
    let names: Vec<_> =
        admin.list_namespaces().await.expect("listed").into_iter().map(|it| it.name).collect();
    assert_eq!(names, ["a", "b", "c", "d", "e"]);
    let taken = admin.create_namespace("a", proto::Rule::Lww).await;
    assert!(matches!(taken, Err(Error::Precondition { .. })));
    admin.delete_namespace("a", None).await.expect("deleted");
    assert!(matches!(admin.get_namespace("a").await, Err(Error::NotFound { .. })));
    assert_eq!(admin.list_nodes().await.expect("listed").len(), 1);
    assert_eq!(admin.list_shards().await.expect("listed").len(), usize::from(fake::SHARDS));
}

#[tokio::test]
async fn connecting_to_nobody_is_tried_until_the_deadline_and_names_each_cause() {
    let endpoints = vec!["127.0.0.1:1".to_owned(), "nowhere.invalid:7101".to_owned()];
    let deadline = Duration::from_millis(300);
    let config = ClientConfig { endpoints, deadline, ..Default::default() };
    let begin = std::time::Instant::now();
    let error = Client::connect(config).await.expect_err("nobody there");
    assert!(matches!(error, Error::Unavailable { outcome_unknown: false, .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("127.0.0.1:1: "), "{text}");
    assert!(text.contains("connection refused"), "{text}");
    assert!(text.contains("nowhere.invalid:7101: "), "{text}");
    assert!(begin.elapsed() >= deadline / 4, "it was tried again");
    let none = Client::connect(ClientConfig::default()).await;
    assert!(matches!(none, Err(Error::Invalid { .. })));
}

#[tokio::test]
async fn a_node_that_comes_up_late_is_waited_for() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = free.local_addr().expect("bound").to_string();
    drop(free);
    let endpoints = vec![address.clone()];
    let connecting =
        tokio::spawn(Client::connect(ClientConfig { endpoints, ..Default::default() }));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!connecting.is_finished());
    let region = Region::start_at(&[&address]).await;
    let client = connecting.await.expect("no panic").expect("connected");
    client.namespace("default").put("k", "v").await.expect("written");
    assert_eq!(region.calls("put").len(), 1);
}

#[tokio::test]
async fn a_request_above_the_limit_is_not_sent_and_says_what_to_do() {
    let region = Region::start(1).await;
    let keys = connect(&region).await.namespace("default");
    let big = || Bytes::from(vec![0; 1 << 20]);
    let assign = |all: Operations, field| all.field([field]).assign(big());
    let registers = ["a", "b", "c", "d"].into_iter().fold(Operations::new(), assign);
    for error in [
        keys.put("k", vec![0; 5 << 20]).await.expect_err("too large"),
        keys.mutate("k", registers).await.expect_err("too large"),
    ] {
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert_eq!(error.reason(), Some("MESSAGE_TOO_LARGE"));
        assert!(!error.outcome_unknown());
        let text = error.to_string();
        assert!(text.contains("split the request") && text.contains("max_message_bytes"), "{text}");
    }
    assert!(region.state.lock().calls.is_empty());
}

#[tokio::test]
async fn a_transport_that_refuses_a_size_is_understood() {
    let region = Region::start(1).await;
    let config = ClientConfig { max_message_bytes: 64 << 20, ..Default::default() };
    let keys = connect_with(&region, config).await.namespace("default");
    for mib in [5, 32] {
        let error = keys.put("k", vec![0; mib << 20]).await.expect_err("too large");
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert_eq!(error.reason(), Some("MESSAGE_TOO_LARGE"));
        assert!(error.to_string().contains("on every node"), "{error}");
    }
}

#[tokio::test]
async fn a_settlement_of_unknown_outcome_is_repeated_with_its_request_id() {
    let region = Region::start(2).await;
    let conflicts = connect(&region).await.conflicts("default");
    let filter = ConflictFilter::default();
    let list = conflicts.list(&filter, 99).await.unwrap();
    let ids: Vec<_> = list.rows.iter().map(|row| row.id.clone()).collect();
    assert_eq!(ids, [format!("{:032x}", 3), format!("{:032x}", 2), format!("{:032x}", 1)]);
    assert!(!list.more && conflicts.list(&filter, 1).await.unwrap().more);

    let shown = conflicts.get(&ids[0]).await.unwrap();
    let lost = Fault::ApplyThen(refusal(Code::Unavailable, "OUTCOME_UNKNOWN", &[]));
    region.fail(None, "restore", lost);
    let written = conflicts.restore(&ids[0], &shown.context).await.unwrap();
    assert_eq!(written.dot, Dot { region: 1, incarnation: 1, seq: 9 });
    let calls = region.calls("restore");
    assert_eq!(calls.len(), 2);
    assert!(calls[0].request_id.is_some() && calls[0].request_id == calls[1].request_id);

    let moved = conflicts.resolve("k", "old", Resolution::Delete).await.unwrap_err();
    assert_eq!(moved.reason(), Some("CONFLICT_MOVED"));
    assert!(matches!(moved, Error::Precondition { .. }));
    let open = conflicts.list_open("", 9).await.unwrap();
    let choice = Resolution::Choose(open.rows[0].versions[0].dot.unwrap().into());
    conflicts.resolve("cart-7", &open.rows[0].context, choice).await.unwrap();
    assert_eq!(conflicts.stats().await.unwrap().stats.len(), 1);
    assert_eq!(conflicts.stats_of_all().await.unwrap().stats.len(), 2);
}

#[tokio::test]
async fn a_session_knows_what_was_settled_in_it() {
    let region = Region::start(1).await;
    let client = connect(&region).await;
    let session = Session::from_token(token(b"elsewhere", 99));
    let conflicts = client.conflicts("default").with_session(&session);
    let id = format!("{:032x}", 1);
    let restored = conflicts.restore(id, "shown").await.expect("settled");
    let seen = [token(b"elsewhere", 99), token(b"cart-1", 9)];
    assert_eq!(session.token(), joined(&[&seen[0], &seen[1]]));
    assert_eq!(restored.token, session.token());

    conflicts.resolve("cart-7", "shown", Resolution::Delete).await.expect("settled");
    client.namespace("default").get("cart-7").session(&session).await.expect("got");
    let carried = region.calls("get")[0].token.clone();
    assert_eq!(carried, joined(&[&seen[0], &seen[1], &token(b"cart-7", 9)]));
}
