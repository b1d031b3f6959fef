//! Counters, sets, maps, flags and extremes on real nodes.

use std::{collections::BTreeSet, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use tombolo_client::{
    Client, Code, Commit, Entry, Got, Operations, Session, Value,
    proto::{self, kv_service_client::KvServiceClient},
};
use tombolo_service::reason::Reason;

use crate::support::{Cluster, apart, channel, wait_until};

async fn create(client: &Client, name: &str, rule: proto::Rule) {
    client.admin().create_namespace(name, rule).await.expect("created");
}

/// Waits until a namespace that was created elsewhere is known.
async fn wait_known(client: &Client, name: &str) {
    wait_until("the namespace is known", async || client.namespace(name).get("none").await.is_ok())
        .await;
}

async fn count(client: &Client, key: &str) -> i64 {
    client.namespace("hits").get(key).await.map_or(i64::MIN, |got| got.counter())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_counter_added_to_in_three_regions_while_they_are_apart_is_exact() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1), ("ap", 1)], 2).await;
    let names = ["us", "eu", "ap"];
    let us = cluster.client("us").await;
    create(&us, "hits", proto::Rule::Counter).await;
    for name in names {
        wait_known(&cluster.client(name).await, "hits").await;
    }
    for name in names {
        let client = cluster.client(name).await;
        for other in names.into_iter().filter(|other| *other != name) {
            client.admin().pause_link(other).await.expect("paused");
        }
        wait_until("nothing is pulled any more", async || {
            let links = client.admin().list_links(None).await.map(|it| it.links);
            links.is_ok_and(|links| {
                !links.is_empty() && links.iter().all(|it| it.phase() == proto::LinkPhase::Paused)
            })
        })
        .await;
    }
    for name in names {
        let client = cluster.client(name).await;
        for number in 1..=100 {
            let counted = client.namespace("hits").add("page", 1).await.expect("counted");
            assert_eq!(counted.sum, Some(number), "nothing comes from elsewhere");
        }
    }
    for name in names {
        let client = cluster.client(name).await;
        for other in names.into_iter().filter(|other| *other != name) {
            client.admin().resume_link(other).await.expect("resumed");
        }
    }
    for name in names {
        let client = cluster.client(name).await;
        wait_until("all additions are here", async || count(&client, "page").await == 300).await;
    }
    let us = cluster.client("us").await;
    assert_eq!(us.namespace("hits").add("page", -50).await.unwrap().sum, Some(250));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_is_read_page_by_page_and_shown_in_part_by_a_scan() {
    let cluster = Cluster::start(&[("us", 1)], 2).await;
    let us = cluster.client("us").await;
    create(&us, "tags", proto::Rule::Set).await;
    let tags = us.namespace("tags");
    let all: BTreeSet<String> = (0..4500).map(|number| format!("tag-{number:05}")).collect();
    for part in all.iter().cloned().collect::<Vec<_>>().chunks(1000) {
        tags.mutate("big", Operations::new().insert_all(part)).await.expect("inserted");
    }
    for key in ["a", "z"] {
        tags.mutate(key, Operations::new().insert("only")).await.expect("inserted");
    }

    let mut read = Vec::new();
    let mut next = bytes::Bytes::new();
    loop {
        let page = tags.get("big").elements_max(700).elements_from(next).await.expect("read");
        assert!(page.elements().len() <= 700);
        read.extend(page.elements().iter().map(|it| String::from_utf8(it.to_vec()).unwrap()));
        next = page.next_elements;
        if next.is_empty() {
            break;
        }
    }
    assert_eq!(read, all.into_iter().collect::<Vec<_>>());

    let some = tags.get("big").only_elements(["tag-00007", "none"]).await.expect("read");
    assert_eq!(some.elements(), ["tag-00007"]);

    for reverse in [false, true] {
        let scan = tags.scan();
        let scan = if reverse { scan.reverse() } else { scan };
        let mut entries = scan.collect().await.expect("scanned");
        if reverse {
            entries.reverse();
        }
        let keys: Vec<&[u8]> = entries.iter().map(|entry| &entry.key[..]).collect();
        assert_eq!(keys, [b"a".as_slice(), b"big", b"z"]);
        let partial: Vec<bool> = entries.iter().map(|entry| entry.partial).collect();
        assert_eq!(partial, [false, true, false]);
    }
    let after = tags.scan().range("aa".."zz").limit(1).collect().await.expect("scanned");
    assert_eq!(after[0].key, "big");

    let refused = tags.delete("big").await.expect_err("so many do not go at once");
    assert_eq!(refused.reason(), Some("TOO_MANY_ELEMENTS"));
    let some = (0..1000).map(|number| format!("tag-{number:05}"));
    tags.mutate("big", Operations::new().remove_all(some)).await.expect("removed");
    tags.delete("big").await.expect("deleted");
    assert!(tags.get("big").await.expect("read").versions.is_empty());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scans_and_batches_show_as_many_bytes_of_a_value_as_a_get() {
    let cluster = Cluster::start(&[("us", 1)], 2).await;
    let us = cluster.client("us").await;
    create(&us, "profiles", proto::Rule::Map).await;
    let profiles = us.namespace("profiles");
    for name in ["a", "b", "c", "d", "e", "f"] {
        let large = Operations::new().field([name]).assign(vec![0; 300 << 10]);
        profiles.mutate("big", large).await.expect("assigned");
    }
    profiles.mutate("z", Operations::new().field(["a"]).assign("small")).await.expect("assigned");

    let fields = |value: Option<&Value>| match value {
        Some(Value::Map(fields)) => fields.iter().map(|(name, _)| name.clone()).collect(),
        other => panic!("{other:?}"),
    };
    let shown = |entry: &Entry| -> (Vec<String>, bool) {
        (fields(entry.versions[0].typed.as_ref()), entry.partial)
    };
    let part = |names: [&str; 4]| (names.map(str::to_owned).to_vec(), true);
    let (first, last) = (part(["a", "b", "c", "d"]), part(["c", "d", "e", "f"]));
    let small = (vec!["a".to_owned()], false);
    let forward = profiles.scan().collect().await.expect("scanned");
    assert_eq!(forward.iter().map(shown).collect::<Vec<_>>(), [first.clone(), small.clone()]);
    let backward = profiles.scan().reverse().collect().await.expect("scanned");
    assert_eq!(backward.iter().map(shown).collect::<Vec<_>>(), [small, last]);
    let batch = profiles.batch_get(["big"]).await.expect("read");
    assert_eq!(fields(batch[0].typed()), first.0);
    let got = profiles.get("big").await.expect("read");
    assert_eq!(fields(got.typed()), first.0);
    assert!(!got.next_elements.is_empty());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_cuts_no_counter_in_two() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    create(&us, "profiles", proto::Rule::Map).await;
    wait_known(&eu, "profiles").await;
    // Two regions' shares of "a", 997 registers, and two shares of "z": the limit lies between the last two,
    // or the first two when it goes backwards.
    let registers = (0..997).map(|number| format!("f{number:03}"));
    let all = registers.fold(Operations::new(), |all, name| all.field([name]).assign("x"));
    us.namespace("profiles").mutate("k", all).await.expect("assigned");
    for client in [&us, &eu] {
        let both = Operations::new().field(["a"]).add(5).field(["z"]).add(7);
        client.namespace("profiles").mutate("k", both).ack_regions(1).await.expect("counted");
    }
    let profiles = eu.namespace("profiles");
    for scan in [profiles.scan(), profiles.scan().reverse()] {
        let entries = scan.collect().await.expect("scanned");
        let value = entries[0].versions[0].typed.as_ref().expect("a value");
        let sum = |name| value.field(&[name]).and_then(Value::as_counter);
        assert_eq!((sum("a"), sum("z"), entries[0].partial), (Some(10), Some(14), false));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_counter_beyond_64_bits_does_not_hide_the_keys_beside_it() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    create(&us, "hits", proto::Rule::Counter).await;
    create(&us, "profiles", proto::Rule::Map).await;
    wait_known(&eu, "profiles").await;
    us.namespace("hits").add("a", 1).await.expect("counted");
    apart([("us", &us), ("eu", &eu)], async || {
        for client in [&us, &eu] {
            client.namespace("hits").add("page", i64::MAX).await.expect("counted");
            let visits = Operations::new().field(["visits"]).add(i64::MAX);
            client.namespace("profiles").mutate("ada", visits).await.expect("counted");
        }
    })
    .await;
    wait_until("us has the sum of both", async || {
        let got = us.namespace("hits").get("page").await;
        got.is_err_and(|error| {
            let detail = error.detail().expect("from the server");
            let beyond = (i128::from(i64::MAX) * 2).to_string();
            error.reason() == Some("COUNTER_OVERFLOW")
                && detail.metadata["key"] == "page"
                && detail.metadata["sum"] == beyond
        })
    })
    .await;
    let mut kv = KvServiceClient::new(channel(&cluster.members[0]).await);
    let counter = |result: &proto::KeyResult| {
        let value = result.versions[0].value.as_ref().expect("a value");
        (value.kind.clone(), value.saturated)
    };
    let sum = |sum| Some(proto::value::Kind::Counter(sum));
    let expected = [(sum(1), false), (sum(i64::MAX), true)];
    let keys = vec!["a".into(), "page".into()];
    let batch = proto::BatchGetRequest { namespace: "hits".into(), keys, ..Default::default() };
    let batch = kv.batch_get(batch).await.expect("read").into_inner().results;
    assert_eq!(batch.iter().map(counter).collect::<Vec<_>>(), expected);
    let scan = proto::ScanRequest { namespace: "hits".into(), ..Default::default() };
    let mut pages = kv.scan(scan).await.expect("scanned").into_inner();
    let page = pages.message().await.expect("a page").expect("the first");
    assert_eq!(page.results.iter().map(counter).collect::<Vec<_>>(), expected);

    let get = |path: &[&str]| proto::GetRequest {
        namespace: "profiles".into(),
        key: "ada".into(),
        field_path: path.iter().map(|&name| name.to_owned()).collect(),
        ..Default::default()
    };
    wait_until("us refuses the field alone, too", async || {
        let got = kv.clone().get(get(&["visits"])).await;
        got.is_err_and(|status| Reason::of(&status) == Some(Reason::CounterOverflow))
    })
    .await;
    let whole = kv.get(get(&[])).await.expect("read").into_inner();
    let Some(proto::value::Kind::Map(map)) = whole.versions[0].value.clone().and_then(|it| it.kind)
    else {
        panic!("{whole:?}");
    };
    assert!(map.fields[0].value.as_ref().is_some_and(|visits| visits.saturated));
    us.namespace("hits").add("page", -i64::MAX).await.expect("brought back");
    assert_eq!(count(&us, "page").await, i64::MAX);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_sees_a_commit_of_typed_values_whole() {
    let cluster = Cluster::start(&[("us", 1)], 2).await;
    let us = cluster.client("us").await;
    create(&us, "hits", proto::Rule::Counter).await;
    let hits = us.namespace("hits");
    let keys = ["{page}a", "{page}b", "{page}c", "{page}d"];
    let writes = async {
        for _ in 0..300 {
            let commit = hits.commit();
            let add = |commit: Commit, key| commit.mutate(key, Operations::new().add(1));
            keys.into_iter().fold(commit, add).await.expect("committed");
        }
    };
    let reads = async {
        let mut last = 0;
        while last < 300 {
            let batch = hits.batch_get(keys).await.expect("read");
            let sum = |got: &Got| got.typed().and_then(Value::as_counter).unwrap_or_default();
            let sums: Vec<i64> = batch.iter().map(sum).collect();
            assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
            last = sums[0];
        }
    };
    tokio::join!(writes, reads);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_merges_field_by_field_and_refuses_what_does_not_fit() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    create(&us, "profiles", proto::Rule::Map).await;
    wait_known(&eu, "profiles").await;
    let (us, eu) = (us.namespace("profiles"), eu.namespace("profiles"));
    let address = Operations::new().field(["address", "city"]).assign("Oslo");
    us.mutate("ada", address.field(["visits"]).add(2)).await.expect("mutated");
    eu.mutate("ada", Operations::new().field(["visits"]).add(3).field(["vip"]).enable())
        .await
        .expect("mutated");

    let visits = |value: &Value| value.field(&["visits"]).and_then(Value::as_counter);
    for keys in [&us, &eu] {
        wait_until("both regions' visits are here", async || {
            keys.get("ada").await.is_ok_and(|got| got.typed().and_then(visits) == Some(5))
        })
        .await;
    }
    let got = eu.get("ada").await.expect("read");
    let city = got.typed().and_then(|it| it.field(&["address", "city"])).and_then(Value::as_data);
    assert_eq!(city.map(|data| &data[..]), Some(&b"Oslo"[..]));
    let only = eu.get("ada").field(["visits"]).await.expect("read");
    assert_eq!(only.counter(), 5);

    let wrong = us.mutate("ada", Operations::new().field(["visits"]).assign("many")).await;
    let wrong = wrong.expect_err("a counter is not assigned");
    assert_eq!((wrong.code(), wrong.reason()), (Code::FailedPrecondition, Some("TYPE_MISMATCH")));
    assert!(wrong.to_string().contains("counter"), "{wrong}");
    let wrong = us.put("ada", "bytes").await.expect_err("a map is not put");
    assert_eq!(wrong.reason(), Some("TYPE_MISMATCH"));
    let wrong = us.mutate("ada", Operations::new().add(1)).await.expect_err("no field");
    assert_eq!(wrong.reason(), Some("TYPE_MISMATCH"));

    // A commit of mutations is whole, and its checks see the value.
    let commit = us.commit().check_absent("ada").mutate("ada", Operations::new().delete());
    assert!(!commit.await.expect("checked").committed);
    let commit = us.commit().check_present("ada");
    let commit = commit.mutate("ada", Operations::new().field(["visits"]).add(1));
    let committed = commit.await.expect("committed");
    assert_eq!(committed.results[0].sum, Some(6));
    us.delete("ada").await.expect("deleted");
    assert!(us.get("ada").await.expect("read").versions.is_empty());
    wait_until("it is deleted everywhere", async || {
        eu.get("ada").await.is_ok_and(|got| got.versions.is_empty())
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retried_addition_counts_once_and_answers_the_first_sum() {
    let cluster = Cluster::start(&[("us", 3)], 1).await;
    let us = cluster.client("us").await;
    create(&us, "hits", proto::Rule::Counter).await;
    let hits = us.namespace("hits");
    let id = proto::RequestId { client: 77, number: 1 };
    let first = hits.add("page", 5).request_id(id).await.expect("counted");
    hits.add("page", 1).await.expect("counted");
    let again = hits.add("page", 5).request_id(id).await.expect("answered");
    assert_eq!((again.dot, again.sum), (first.dot, Some(5)));
    assert_eq!(count(&us, "page").await, 6);

    hits.add("page", i64::MAX - 6).await.expect("counted");
    let over = hits.add("page", 1).await.expect_err("beyond 64 bits");
    assert_eq!((over.code(), over.reason()), (Code::OutOfRange, Some("COUNTER_OVERFLOW")));
    assert_eq!(count(&us, "page").await, i64::MAX);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flags_and_extremes_are_what_their_rules_say() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let us = cluster.client("us").await;
    create(&us, "flags", proto::Rule::Flag).await;
    create(&us, "highs", proto::Rule::Max).await;
    create(&us, "lows", proto::Rule::Min).await;
    let flags = us.namespace("flags");
    flags.mutate("f", Operations::new().enable()).await.expect("enabled");
    assert_eq!(flags.get("f").await.unwrap().typed(), Some(&Value::Flag(true)));
    flags.mutate("f", Operations::new().disable()).await.expect("disabled");
    assert!(flags.get("f").await.unwrap().versions.is_empty());
    for (name, expected) in [("highs", "c"), ("lows", "a")] {
        let keys = us.namespace(name);
        for value in ["b", "a", "c"] {
            let up = Operations::new();
            let up = if name == "highs" { up.maximum(value) } else { up.minimum(value) };
            keys.mutate("k", up).await.expect("mutated");
        }
        let got = keys.get("k").await.expect("read");
        assert_eq!(got.value().map(|value| &value[..]), Some(expected.as_bytes()));
    }
    let batch = us.namespace("highs").batch_get(["k", "none"]).await.expect("read");
    assert_eq!((batch[0].versions.len(), batch[1].versions.len()), (1, 0));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_request_did_is_waited_for_whichever_of_its_operations_came_last() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    create(&us, "highs", proto::Rule::Max).await;
    wait_known(&eu, "highs").await;
    let (highs, there) = (us.namespace("highs"), eu.namespace("highs"));
    let raise = |value: &'static str| Operations::new().maximum(value);
    highs.mutate("old", raise("m")).ack_regions(1).await.expect("written");
    apart([("us", &us), ("eu", &eu)], async || {
        // The second changes nothing, and eu has the value that stands.
        let commit = highs.commit().mutate("new", raise("m")).mutate("old", raise("a"));
        let late = commit.ack_regions(1).deadline(Duration::from_secs(2)).await;
        let late = late.expect_err("eu does not have the first");
        assert_eq!(late.reason(), Some("ACK_REGIONS_PENDING"), "{late:?}");
        let written = highs.get("new").await.expect("read").versions[0].dot;
        let metadata = &late.detail().expect("from the server").metadata;
        assert_eq!(metadata["dot"], written.to_string());

        let token = STANDARD.decode(&metadata["session_token"]).expect("base64");
        let got = there.get("new").session(&Session::from_token(token));
        let got = got.deadline(Duration::from_secs(1)).await.expect_err("it is not there");
        assert_eq!(got.reason(), Some("SESSION_NOT_CAUGHT_UP"));
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeat_in_another_region_names_writes_of_the_request_and_no_sum() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    create(&us, "highs", proto::Rule::Max).await;
    create(&us, "hits", proto::Rule::Counter).await;
    wait_known(&eu, "hits").await;
    us.namespace("highs").mutate("old", Operations::new().maximum("m")).await.expect("written");
    let id = us.next_request_id();
    let commit = |client: &Client| {
        let raise = |value: &'static str| Operations::new().maximum(value);
        let commit = client.namespace("highs").commit().request_id(id).ack_regions(1);
        commit.mutate("old", raise("a")).mutate("new", raise("m")).into_future()
    };
    let first = commit(&us).await.expect("committed");
    let again = commit(&eu).await.expect("answered");
    assert!(again.committed);
    let written = first.results[1].dot;
    assert_ne!(first.results[0].dot, written, "the first changed nothing");
    let dots: Vec<_> = again.results.iter().map(|result| result.dot).collect();
    assert_eq!(dots, [written; 2], "there was one write");

    let id = us.next_request_id();
    let add = |client: &Client| {
        let hits = client.namespace("hits");
        hits.add("page", 5).request_id(id).ack_regions(1).into_future()
    };
    let first = add(&us).await.expect("counted");
    let again = add(&eu).await.expect("answered");
    assert_eq!((first.sum, again.sum), (Some(5), None));
    assert_eq!((first.dot, count(&eu, "page").await), (again.dot, 5));
    cluster.stop().await;
}
