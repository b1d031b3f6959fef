//! Exactly-once: a request that is sent again, here or in another region, changes nothing.

use std::time::Duration;

use tombolo_client::{
    Code, Committed, Consistency, Dot, Error, Got, Keyspace,
    proto::{self, kv_service_client::KvServiceClient},
};
use tombolo_service::reason::Reason;

use crate::support::{Cluster, PATIENCE, wait_until};

fn value(got: &Got) -> Option<String> {
    got.value().map(|data| String::from_utf8_lossy(data).into_owned())
}

/// What a commit did, without what differs between its answers for good reasons.
fn outcome(committed: &Committed) -> (bool, Vec<usize>, Vec<Dot>) {
    let failed = committed.failed.iter().map(|failed| failed.check).collect();
    (committed.committed, failed, committed.results.iter().map(|result| result.dot).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_sent_twice_changes_nothing_while_nodes_come_and_go() {
    let mut cluster = Cluster::start(&[("us", 3)], 2).await;
    let client = cluster.client("us").await;
    let keys = client.namespace("default");
    keys.put("count", "0").await.unwrap();
    let mut refused = Vec::new();
    for number in 0..60u32 {
        // Each node goes once, and with it the shards that it leads.
        let place = usize::try_from(number / 20).unwrap();
        if number % 20 == 5 {
            cluster.members[place].stop().await;
        }
        if number % 20 == 15 {
            cluster.members[place].start().await;
            cluster.wait_ready().await;
        }
        let id = client.next_request_id();
        let add = || {
            let next = (number + 1).to_string();
            let commit = keys.commit().check_value("count", number.to_string()).request_id(id);
            commit.put("count", next).put("{count}log", "x").into_future()
        };
        let (one, two) = tokio::join!(add(), add());
        let (one, two) = (one.unwrap(), two.unwrap());
        assert!(one.committed, "{one:?}");
        assert_eq!(outcome(&one), outcome(&two));
        assert_eq!(outcome(&one), outcome(&add().await.unwrap()));

        let id = client.next_request_id();
        let put = || keys.put(format!("k{number}"), "1").request_id(id).into_future();
        let first = put().await.unwrap();
        keys.put(format!("k{number}"), "2").await.unwrap();
        assert_eq!(put().await.unwrap().dot, first.dot);

        let id = client.next_request_id();
        let key = format!("never-{number}");
        let claim = keys.commit().request_id(id).check_present(&key).put(&key, "mine");
        assert!(!claim.clone().await.unwrap().committed);
        keys.put(&key, "another's").await.unwrap();
        refused.push((key, claim));
    }
    assert_eq!(value(&keys.get("count").await.unwrap()).as_deref(), Some("60"));
    for (key, claim) in refused {
        // Now the check would hold; but the answer was given.
        let again = claim.await.unwrap();
        assert_eq!(outcome(&again), (false, vec![0], vec![]));
        assert_eq!(again.failed[0].versions[0].value.as_ref(), b"another's", "as it is now");
        assert_eq!(value(&keys.get(&key).await.unwrap()).as_deref(), Some("another's"));
    }
    for number in 0..60 {
        assert_eq!(value(&keys.get(format!("k{number}")).await.unwrap()).as_deref(), Some("2"));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_repeated_in_another_region_that_has_it_is_not_executed_again() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let client = cluster.client("us").await;
    let us = client.namespace("default");
    let id = client.next_request_id();
    let first = us.put("k", "1").request_id(id).ack_regions(1).await.unwrap();
    let commit_id = client.next_request_id();
    let commit = |keys: &Keyspace| {
        let commit = keys.commit().request_id(commit_id).check_absent("{c}lock");
        commit.put("{c}lock", "me").put("{c}log", "taken").into_future()
    };
    let committed = commit(&us).await.unwrap();
    us.put("{c}lock", "free").ack_regions(1).await.unwrap();

    let eu = cluster.client("eu").await.namespace("default");
    let again = eu.put("k", "1").request_id(id).await.unwrap();
    assert_eq!((again.dot, again.time), (first.dot, first.time));
    // The check does not hold any more, but the answer was given.
    assert_eq!(outcome(&commit(&eu).await.unwrap()), outcome(&committed));
    assert_eq!(value(&eu.get("{c}lock").await.unwrap()).as_deref(), Some("free"));
    let other = eu.put("k", "2").request_id(id).await.unwrap_err();
    assert_eq!(other.reason(), Some("REQUEST_ID_INVALID"));
    // The context is as good as that of the first answer.
    let next = eu.put("k", "2").context(again.context).await.unwrap();
    assert!(!next.conflict);
    // It is remembered on the disk.
    cluster.member("eu").stop().await;
    cluster.member("eu").start().await;
    cluster.wait_ready().await;
    let eu = cluster.client("eu").await.namespace("default");
    let again = eu.put("k", "1").request_id(id).await.unwrap();
    assert_eq!(again.dot, first.dot);
    assert_eq!(outcome(&commit(&eu).await.unwrap()), outcome(&committed));
    cluster.stop().await;
}

/// Sends the same put to each region while the other is away, and waits until each has heard all of the
/// other. Answers the two regions, and the dots of the two writes.
async fn put_in_both(cluster: &mut Cluster, namespace: &str) -> ([Keyspace; 2], [Dot; 2]) {
    let clients = [cluster.client("us").await, cluster.client("eu").await];
    let [us, eu] = [0, 1].map(|at: usize| clients[at].namespace(namespace));
    let id = clients[0].next_request_id();
    wait_until("eu knows the namespace", async || eu.get("k").await.is_ok()).await;
    cluster.member("eu").stop().await;
    let in_us = us.put("k", "once").request_id(id).await.expect("written in us");
    us.put("us was here", "1").await.expect("written in us");
    cluster.member("us").stop().await;
    cluster.member("eu").start().await;
    wait_until("eu takes writes alone", async || {
        eu.put("eu was here", "1").deadline(Duration::from_secs(2)).await.is_ok()
    })
    .await;
    let in_eu = eu.put("k", "once").request_id(id).await.expect("written in eu");
    assert_eq!(in_eu.dot.region, 2, "it has not heard of the other");
    eu.put("eu was here", "2").await.expect("written in eu");
    cluster.member("us").start().await;
    wait_until("each region has heard all of the other", async || {
        let here = us.get("eu was here").await.is_ok_and(|got| value(&got).as_deref() == Some("2"));
        let there = eu.get("us was here").await.is_ok_and(|got| value(&got).is_some());
        here && there
    })
    .await;
    for (keys, first) in [(&us, in_us.dot), (&eu, in_eu.dot)] {
        let again = keys.put("k", "once").request_id(id).await.expect("answered again");
        assert_eq!((again.dot, again.conflict), (first, false), "each goes on answering its own");
    }
    ([us, eu], [in_us.dot, in_eu.dot])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_two_regions_took_at_once_is_one_version() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let client = cluster.client("us").await;
    client.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    let ([us, eu], dots) = put_in_both(&mut cluster, "carts").await;

    let seen = us.get("k").await.unwrap();
    assert_eq!(seen.versions, eu.get("k").await.unwrap().versions);
    assert_eq!((seen.versions.len(), seen.versions[0].dot), (1, dots[0]));
    let listed = eu.scan().prefix("k").collect().await.unwrap();
    assert_eq!(listed[0].versions, seen.versions);
    // Checks take them for one, by either name.
    for dot in dots {
        assert!(us.commit().check_dot("k", dot).await.unwrap().committed, "{dot}");
    }
    let replaced = us.commit().check_context("k", seen.context).put("k", "new").await.unwrap();
    assert!(replaced.committed && !replaced.results[0].conflict);
    wait_until("eu shows what replaced both", async || {
        value(&eu.get("k").await.unwrap()).as_deref() == Some("new")
    })
    .await;
    assert_eq!(eu.get("k").await.unwrap().versions.len(), 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_lww_a_request_that_two_regions_took_at_once_is_no_conflict() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let ([us, eu], _) = put_in_both(&mut cluster, "default").await;
    let seen = us.get("k").await.unwrap();
    assert_eq!(seen.versions, eu.get("k").await.unwrap().versions);
    assert_eq!(value(&seen).as_deref(), Some("once"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_checks_a_context_and_lets_values_expire() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let keys = cluster.client("us").await.namespace("default");
    let never = keys.commit().check_context("lock", "").put("lock", "me").await.unwrap();
    assert!(never.committed);
    let late = keys.commit().check_context("lock", "").put("lock", "me, too").await.unwrap();
    assert_eq!(outcome(&late), (false, vec![0], vec![]));
    let seen = keys.get("lock").await.unwrap();
    let held = Duration::from_secs(3);
    let renewed = keys.commit().check_context("lock", &seen.context).put_for("lock", "me", held);
    assert!(renewed.await.unwrap().committed);
    assert!(keys.get("lock").await.unwrap().versions[0].expire_time.is_some());
    wait_until("the lock is free", async || keys.get("lock").await.unwrap().value().is_none())
        .await;
    let stale = keys.commit().check_context("lock", &seen.context).delete("lock").await.unwrap();
    assert!(!stale.committed, "others have held it since");
    let foreign = keys.commit().check_context("other", &seen.context).delete("other").await;
    assert_eq!(foreign.unwrap_err().reason(), Some("CONTEXT_INVALID"));
    cluster.stop().await;
}

async fn await_at(
    address: &str,
    token: &[u8],
    regions: u32,
) -> Result<proto::AwaitReplicationResponse, tonic::Status> {
    let mut kv =
        KvServiceClient::connect(format!("http://{address}")).await.expect("the node answers");
    let mut request = tonic::Request::new(proto::AwaitReplicationRequest {
        namespace: "default".into(),
        session_token: token.to_vec().into(),
        regions,
    });
    request.set_timeout(PATIENCE);
    kv.await_replication(request).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_waits_at_any_node_until_other_regions_have_what_it_wrote() {
    let mut cluster = Cluster::start(&[("us", 3), ("eu", 1), ("ap", 1)], 4).await;
    let client = cluster.client("us").await;
    let session = client.session();
    let us = client.namespace("default").with_session(&session);
    let nothing = us.await_replication(2).await.unwrap();
    assert_eq!(nothing.regions, ["eu", "ap"], "of nothing everybody has all");
    for number in 0..20 {
        us.put(format!("k{number}"), "1").await.unwrap();
    }
    for address in cluster.addresses("us") {
        let answer = await_at(&address, &session.token(), 2).await.unwrap();
        assert_eq!((answer.regions, answer.lacking), (vec!["eu".into(), "ap".into()], vec![]));
    }
    for name in ["eu", "ap"] {
        let keys = cluster.client(name).await.namespace("default");
        for number in 0..20 {
            let got = keys.get(format!("k{number}")).consistency(Consistency::Local).await;
            assert_eq!(value(&got.unwrap()).as_deref(), Some("1"), "{name} has it");
        }
    }

    cluster.member("ap").stop().await;
    for number in 0..20 {
        us.put(format!("k{number}"), "2").await.unwrap();
    }
    let one = us.await_replication(1).await.unwrap();
    assert_eq!(one.regions, ["eu"]);
    assert_eq!(one.lacking[0].region, "ap");
    let late = us.await_replication(2).deadline(Duration::from_secs(2)).await.unwrap_err();
    assert!(matches!(late, Error::Deadline { dot: None, .. }), "{late:?}");
    let detail = late.detail().unwrap();
    assert_eq!(detail.reason.as_deref(), Some("REPLICATION_PENDING"));
    assert_eq!((detail.code, detail.metadata["missing"].as_str()), (Code::DeadlineExceeded, "ap"));
    assert_eq!(detail.metadata["regions"], "eu");
    let too_many = us.await_replication(3).await.unwrap_err();
    assert_eq!(too_many.reason(), Some("ACK_REGIONS_TOO_MANY"));

    // One that waits is woken; at a node that leads few of the shards, if any.
    let (addresses, token) = (cluster.addresses("us"), session.token());
    let waits = addresses.iter().map(|address| await_at(address, &token, 2));
    let (answers, ()) = tokio::join!(futures::future::join_all(waits), async {
        cluster.members.iter_mut().find(|it| it.config.region == "ap").unwrap().start().await;
    });
    for answer in answers {
        assert_eq!(answer.unwrap().regions, ["eu", "ap"]);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_for_regions_goes_on_waiting_at_the_next_leader() {
    let mut cluster = Cluster::start(&[("us", 3), ("eu", 1)], 1).await;
    let client = cluster.client("us").await;
    let session = client.session();
    let keys = client.namespace("default").with_session(&session);
    cluster.member("eu").stop().await;
    keys.put("k", "1").await.unwrap();
    let (waited, written) = (keys.await_replication(1), keys.put("k", "2").ack_regions(1));
    let (waited, written, ()) = tokio::join!(waited.into_future(), written.into_future(), async {
        wait_until("the write stands", async || {
            let got = keys.get("k").consistency(Consistency::Local).await;
            got.is_ok_and(|got| value(&got).as_deref() == Some("2"))
        })
        .await;
        // One of these leads: whoever waits there goes on at another.
        for place in [0, 1] {
            cluster.members[place].stop().await;
            cluster.members[place].start().await;
            cluster.wait_ready().await;
        }
        cluster.member("eu").start().await;
    });
    assert_eq!(waited.unwrap().regions, ["eu"]);
    written.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_and_commits_that_make_no_sense_are_refused_by_name() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let mut kv =
        KvServiceClient::connect(format!("http://{}", cluster.addresses("us")[0])).await.unwrap();
    let wait = proto::AwaitReplicationRequest {
        namespace: "default".into(),
        session_token: "".into(),
        regions: 1,
    };
    let waits = [
        (proto::AwaitReplicationRequest { regions: 2, ..wait.clone() }, Reason::AckRegionsTooMany),
        (
            proto::AwaitReplicationRequest { session_token: "noise".into(), ..wait.clone() },
            Reason::SessionTokenInvalid,
        ),
        (
            proto::AwaitReplicationRequest { namespace: "nowhere".into(), ..wait },
            Reason::NamespaceNotFound,
        ),
    ];
    for (request, expected) in waits {
        let refused = kv.await_replication(request).await.unwrap_err();
        assert_eq!(Reason::of(&refused), Some(expected), "{refused:?}");
    }
    let ttl = proto::write::Expiration::Ttl(prost_types::Duration { seconds: -1, nanos: 0 });
    let write = |action, expiration| proto::Write {
        key: "k".into(),
        action: Some(action),
        expiration: Some(expiration),
        ..Default::default()
    };
    let kind = Some(proto::value::Kind::Data("v".into()));
    let value = proto::Value { kind, ..Default::default() };
    let long = proto::write::Expiration::Ttl(prost_types::Duration { seconds: 9, nanos: 0 });
    for write in [
        write(proto::write::Action::Put(value), ttl),
        write(proto::write::Action::Delete(proto::Remove {}), long),
    ] {
        let namespace = "default".to_owned();
        let commit = proto::CommitRequest { namespace, writes: vec![write], ..Default::default() };
        let refused = kv.commit(commit).await.unwrap_err();
        assert_eq!(Reason::of(&refused), Some(Reason::TtlInvalid), "{refused:?}");
    }
    cluster.stop().await;
}
