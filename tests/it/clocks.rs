//! Clocks that are wrong: of one node, of all nodes against each other, and of a whole region.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tombolo_client::{
    Client, Consistency, Error, Keyspace, Written,
    proto::{
        self, cluster_service_client::ClusterServiceClient, kv_service_client::KvServiceClient,
    },
};
use tombolo_core::clock_guard::Standing;

use crate::support::{Cluster, Member, channel, metric, wait_until};

const HOURS_MS: i64 = 8 * 3_600_000;
/// As configured where nothing else is said.
const BOUND_MS: u64 = 500;

/// What this machine's clock shows.
fn machine_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("a date")
}

/// Writes, and checks that the time it was stamped with is that of the machine.
async fn put_now(keys: &Keyspace, key: &str, value: &str) -> Written {
    let begun = machine_ms();
    let written = keys.put(key, value).await.expect("written");
    let time = written.time.physical_ms();
    let allowed = begun - BOUND_MS..=machine_ms() + BOUND_MS + 1;
    assert!(allowed.contains(&time), "stamped {time}, not in {allowed:?}");
    written
}

async fn leaders(client: &Client) -> Vec<u64> {
    let leaders = client.cluster().await.expect("a node answers").leaders;
    leaders.iter().map(|shard| shard.leader_node_id).collect()
}

fn jump(member: &Member, offset_ms: i64) {
    member.node.as_ref().expect("it runs").clock().set_offset_ms(offset_ms);
}

fn standing(member: &Member) -> Standing {
    member.node.as_ref().expect("it runs").clock().look_around()
}

/// What a node says of the clock of another one, or of its own.
async fn clock_of(asked: &Member, node: u64) -> proto::Node {
    let mut cluster = ClusterServiceClient::new(channel(asked).await);
    let nodes = cluster.list_nodes(proto::ListNodesRequest {}).await.expect("it answers");
    let mut nodes = nodes.into_inner().nodes.into_iter();
    nodes.find(|it| it.node_id == node).expect("a node of the region")
}

async fn a_node_jumps(offset_ms: i64) {
    let cluster = Cluster::start(&[("us", 3)], 4).await;
    let client = cluster.client("us").await;
    let keys = client.namespace("default");
    keys.put("lives for an hour", "v").ttl(Duration::from_secs(3600)).await.expect("written");
    let led = leaders(&client).await;
    let bad = led[0];
    let (bad_member, others): (Vec<&Member>, Vec<&Member>) =
        cluster.members.iter().partition(|member| member.config.node_id == bad);
    let bad_member = bad_member[0];

    jump(bad_member, offset_ms);
    for number in 0..100 {
        put_now(&keys, &format!("k{number}"), "v").await;
    }
    wait_until("others lead", async || {
        leaders(&client).await.iter().all(|&leader| leader != 0 && leader != bad)
    })
    .await;
    for number in 0..100 {
        put_now(&keys, &format!("k{number}"), "w").await;
    }

    // Everybody says the same of everybody, once each has asked the others again.
    wait_until("all nodes tell whose clock is wrong", async || {
        let mut agreed = true;
        for member in &cluster.members {
            for node in 1..=3 {
                let said = clock_of(member, node).await;
                let is_bad = node == bad;
                let expected =
                    if is_bad { proto::ClockState::Outside } else { proto::ClockState::Inside };
                let off_seconds = if is_bad { offset_ms as f64 / 1000.0 } else { 0.0 };
                agreed &= said.clock() == expected
                    && (said.clock_offset_seconds - off_seconds).abs() < 0.5;
            }
        }
        agreed
    })
    .await;
    let series = format!("tombolo_clock_outside{{node=\"{bad}\"}}");
    assert_eq!(metric(others[0], &series).await, 1.0);

    // What it answers goes by the time of the others.
    let mut from_bad = KvServiceClient::new(channel(bad_member).await);
    for consistency in [Consistency::Local, Consistency::Linearizable] {
        let get = proto::GetRequest {
            namespace: "default".to_owned(),
            key: "lives for an hour".into(),
            consistency: Some(consistency.into()),
            ..Default::default()
        };
        let got = from_bad.get(get).await.expect("answered").into_inner();
        assert_eq!(got.versions.len(), 1, "hidden before it has expired: {consistency:?}");
    }
    let ttl = prost_types::Duration { seconds: 60, nanos: 0 };
    let put = proto::PutRequest {
        namespace: "default".to_owned(),
        key: "through the bad one".into(),
        value: Some(proto::Value {
            kind: Some(proto::value::Kind::Data("v".into())),
            ..Default::default()
        }),
        expiration: Some(proto::put_request::Expiration::Ttl(ttl)),
        ..Default::default()
    };
    from_bad.put(put).await.expect("written where the leader is");

    // Corrected, it counts again: with one of the others away, the region goes on.
    jump(bad_member, 0);
    wait_until("its clock is believed again", async || {
        clock_of(others[0], bad).await.clock() == proto::ClockState::Inside
    })
    .await;
    let mut cluster = cluster;
    let gone = cluster.members.iter_mut().find(|it| it.config.node_id != bad).expect("another");
    gone.stop().await;
    put_now(&cluster.client("us").await.namespace("default"), "after", "v").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_clock_jumps_ahead_loses_leadership_and_no_write_is_from_the_future() {
    a_node_jumps(HOURS_MS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_clock_jumps_back_loses_leadership_and_no_write_is_from_the_past() {
    a_node_jumps(-HOURS_MS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_all_clocks_differ_writes_are_refused_by_name_and_reads_go_on() {
    let cluster = Cluster::start(&[("us", 3)], 1).await;
    let client = cluster.client("us").await;
    let keys = client.namespace("default");
    keys.put("k", "v").await.unwrap();

    for (member, offset_ms) in cluster.members.iter().zip([0, HOURS_MS, -HOURS_MS]) {
        jump(member, offset_ms);
    }
    wait_until("all are outside", async || {
        cluster.members.iter().all(|member| standing(member) == Standing::Outside)
    })
    .await;
    let refused = keys.put("k", "w").deadline(Duration::from_secs(1)).await.unwrap_err();
    let detail = match refused {
        Error::Unavailable { detail, outcome_unknown: false, .. }
        | Error::Deadline { detail, outcome_unknown: false, .. } => detail,
        other => panic!("{other:?}"),
    };
    assert_eq!(detail.reason.as_deref(), Some("CLOCK_OUT_OF_BOUNDS"), "{detail:?}");
    assert_eq!(keys.get("k").await.unwrap().value().unwrap().as_ref(), b"v");
    let mut refusals = 0.0;
    for member in &cluster.members {
        refusals += metric(member, "tombolo_clock_refused_total").await;
    }
    assert!(refusals >= 1.0);

    for member in &cluster.members {
        jump(member, 0);
    }
    put_now(&keys, "k", "w").await;
    cluster.stop().await;
}

/// Two regions of which the clocks of one are all off, by the same.
async fn a_region_jumps(offset_ms: i64) -> (Cluster, Client, Client) {
    let cluster = Cluster::start(&[("us", 1), ("eu", 3)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.namespace("default").put("before", "v").ack_regions(1).await.expect("replicated");
    for member in cluster.members.iter().filter(|it| it.config.region == "eu") {
        jump(member, offset_ms);
    }
    // Each finds itself alone at first; then they see that they agree.
    wait_until("eu's nodes agree", async || {
        let members = cluster.members.iter().filter(|it| it.config.region == "eu");
        members.map(standing).all(|it| it == Standing::Inside)
    })
    .await;
    (cluster, us, eu)
}

async fn wait_for_value(client: &Client, key: &str, value: &[u8]) {
    let keys = client.namespace("default");
    wait_until("the value is there", async || {
        let got = keys.get(key).await.expect("read");
        got.value().is_some_and(|found| found == value)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_from_the_future_moves_no_other_clock_and_loses_to_later_writes() {
    let (cluster, us, eu) = a_region_jumps(HOURS_MS).await;
    let (in_us, in_eu) = (us.namespace("default"), eu.namespace("default"));
    let hours = HOURS_MS.unsigned_abs();

    let future = in_eu.put("k", "from the future").await.unwrap();
    assert!(future.time.physical_ms() > machine_ms() + hours - 60_000);
    wait_for_value(&us, "k", b"from the future").await;
    put_now(&in_us, "another", "v").await;

    // Who has seen it replaces it, whatever the clocks say, and only there the time goes along.
    let later = in_us.put("k", "later").await.unwrap();
    assert!(later.time > future.time);
    wait_for_value(&eu, "k", b"later").await;
    wait_for_value(&us, "k", b"later").await;
    put_now(&in_us, "another", "w").await;

    let us_node = cluster.members.iter().find(|it| it.config.region == "us").expect("a node");
    let rejected = "tombolo_hlc_rejected_total{peer_region=\"eu\"}";
    assert!(metric(us_node, rejected).await >= 1.0);
    assert!(metric(us_node, "tombolo_hlc_ahead_seconds").await > hours as f64 / 1000.0 - 60.0);
    let regions = us.admin().list_regions().await.unwrap().regions;
    let seen = regions.iter().find(|region| region.name == "eu").expect("eu is listed");
    assert!(
        seen.clock_rejected_changes >= 1 && seen.clock_ahead_seconds > 7.0 * 3600.0,
        "{seen:?}"
    );

    // Its clocks corrected, it stamps the right time at once.
    for member in cluster.members.iter().filter(|it| it.config.region == "eu") {
        jump(member, 0);
    }
    put_now(&in_eu, "corrected", "v").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_from_the_past_replaces_what_it_has_seen() {
    let (cluster, us, eu) = a_region_jumps(-HOURS_MS).await;
    let (in_us, in_eu) = (us.namespace("default"), eu.namespace("default"));

    let first = put_now(&in_us, "k", "first").await;
    wait_for_value(&eu, "k", b"first").await;
    let second = in_eu.put("k", "second").await.unwrap();
    assert!(second.time > first.time);
    wait_for_value(&us, "k", b"second").await;
    wait_for_value(&eu, "k", b"second").await;
    put_now(&in_us, "another", "v").await;
    cluster.stop().await;
}
