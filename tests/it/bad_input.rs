//! Whatever is sent, put on disk or configured: a specific error, and nothing else happens.

use bytes::Bytes;
use tombolo::node::Node;
use tombolo_client::{Client, ClientConfig, Error, Operations};
use tombolo_core::{
    Actor, NamespaceId, RegionId, ShardId, VersionVector,
    token::{SessionToken, TokenKey, encode_context, encode_page},
};
use tombolo_proto::{
    internal::v1::{
        self as internal, link_service_client::LinkServiceClient,
        node_service_client::NodeServiceClient,
    },
    v1::{self as pb, kv_service_client::KvServiceClient},
};
use tombolo_service::reason::Reason;
use tonic::{Code, Status, transport::Channel};

use crate::support::{Cluster, free_address};

async fn stub(cluster: &Cluster) -> KvServiceClient<Channel> {
    let address = cluster.addresses("us").remove(0);
    let client = KvServiceClient::connect(format!("http://{address}")).await;
    let client = client.expect("the node listens");
    client.max_encoding_message_size(64 << 20)
}

fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> pb::PutRequest {
    let kind = Some(pb::value::Kind::Data(value.into()));
    pb::PutRequest {
        namespace: "default".to_owned(),
        key: key.into(),
        value: Some(pb::Value { kind, ..Default::default() }),
        ..Default::default()
    }
}

fn reason(status: &Status) -> Reason {
    Reason::of(status).unwrap_or_else(|| panic!("no reason: {status:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_bad_request_has_its_own_reason_and_changes_nothing() {
    let cluster = Cluster::start(&[("us", 1)], 4).await;
    let mut kv = stub(&cluster).await;
    let vector: VersionVector =
        [(Actor { region: RegionId(1), incarnation: 1 }, 3)].into_iter().collect();
    let key = TokenKey::without_secret("test");
    let other_key = encode_context(&key, NamespaceId::DEFAULT, b"other", &vector);
    let mut foreign = SessionToken::default();
    foreign.observe(NamespaceId::DEFAULT, ShardId(0), &vector);
    let foreign = foreign.encode(&TokenKey::without_secret("another cluster"));
    let ttl = prost_types::Duration { seconds: -1, nanos: 0 };
    let cases: Vec<(pb::PutRequest, Reason)> = vec![
        (put("", "v"), Reason::KeyEmpty),
        (put(vec![b'k'; 4097], "v"), Reason::KeyTooLong),
        (put("k", vec![0; (1 << 20) + 1]), Reason::ValueTooLarge),
        (pb::PutRequest { value: None, ..put("k", "v") }, Reason::RequestInvalid),
        (
            pb::PutRequest { namespace: "nowhere".into(), ..put("k", "v") },
            Reason::NamespaceNotFound,
        ),
        (pb::PutRequest { namespace: "No Name".into(), ..put("k", "v") }, Reason::NamespaceInvalid),
        (pb::PutRequest { context: "noise".into(), ..put("k", "v") }, Reason::ContextInvalid),
        (pb::PutRequest { context: other_key, ..put("k", "v") }, Reason::ContextInvalid),
        (
            pb::PutRequest { session_token: "noise".into(), ..put("k", "v") },
            Reason::SessionTokenInvalid,
        ),
        (pb::PutRequest { session_token: foreign, ..put("k", "v") }, Reason::SessionTokenInvalid),
        (
            pb::PutRequest { session_token: vec![0x22; (1 << 20) + 1].into(), ..put("k", "v") },
            Reason::SessionTokenTooLarge,
        ),
        (
            pb::PutRequest {
                request_id: Some(pb::RequestId { client: 0, number: 1 }),
                ..put("k", "v")
            },
            Reason::RequestIdInvalid,
        ),
        (
            pb::PutRequest {
                expiration: Some(pb::put_request::Expiration::Ttl(ttl)),
                ..put("k", "v")
            },
            Reason::TtlInvalid,
        ),
        (pb::PutRequest { ack_regions: 1, ..put("k", "v") }, Reason::AckRegionsTooMany),
        (
            pb::PutRequest {
                value: Some(pb::Value {
                    kind: Some(pb::value::Kind::Counter(1)),
                    ..Default::default()
                }),
                ..put("k", "v")
            },
            Reason::TypeMismatch,
        ),
    ];
    for (request, expected) in cases {
        let refused = kv.put(request).await.unwrap_err();
        assert_eq!(reason(&refused), expected, "{refused:?}");
        assert!(!refused.message().is_empty());
    }
    let scan = pb::ScanRequest {
        namespace: "default".into(),
        page_token: "noise".into(),
        ..Default::default()
    };
    let refused = kv.scan(scan.clone()).await.unwrap_err();
    assert_eq!(reason(&refused), Reason::PageTokenInvalid);
    let page_token = encode_page(&key, 7, b"k");
    let refused = kv.scan(pb::ScanRequest { page_token, ..scan }).await.unwrap_err();
    assert_eq!(reason(&refused), Reason::PageTokenMismatch);
    let everything = pb::ScanRequest { namespace: "default".into(), ..Default::default() };
    let mut pages = kv.scan(everything).await.unwrap().into_inner();
    let page = pages.message().await.unwrap().unwrap();
    assert!(page.results.is_empty(), "nothing was written");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_across_shards_names_the_two_keys() {
    let cluster = Cluster::start(&[("us", 1)], 64).await;
    let mut kv = stub(&cluster).await;
    let remove = |key: &'static str| pb::Write {
        key: key.into(),
        action: Some(pb::write::Action::Delete(pb::Remove {})),
        ..Default::default()
    };
    let writes = vec![remove("{a}1"), remove("{a}2"), remove("{b}1")];
    let namespace = "default".to_owned();
    let request = pb::CommitRequest { namespace: namespace.clone(), writes, ..Default::default() };
    let refused = kv.commit(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(reason(&refused), Reason::CrossShardBatch);
    assert!(refused.message().contains("{a}1") && refused.message().contains("{b}1"), "{refused}");

    let many = vec![remove("k"); 129];
    let request = pb::CommitRequest { namespace, writes: many, ..Default::default() };
    assert_eq!(reason(&kv.commit(request).await.unwrap_err()), Reason::BatchTooLarge);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_over_the_limit_is_refused_and_the_connection_lives_on() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let mut kv = stub(&cluster).await;
    let refused = kv.put(put("k", vec![0; 5 << 20])).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert_eq!(reason(&refused), Reason::MessageTooLarge);
    assert!(refused.message().contains("limits.max_message_bytes"), "{refused}");
    kv.put(put("k", "v")).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_says_what_to_do_about_a_request_over_the_limit() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let modest = cluster.client("us").await;
    let endpoints = cluster.addresses("us");
    let config = ClientConfig { endpoints, max_message_bytes: 64 << 20, ..Default::default() };
    let bold = Client::connect(config).await.unwrap();
    modest.admin().create_namespace("profiles", pb::Rule::Map).await.unwrap();
    let assign = |all: Operations, field| all.field([field]).assign(vec![0; 1 << 20]);
    let registers = || ["a", "b", "c", "d"].into_iter().fold(Operations::new(), assign);
    for client in [modest, bold] {
        let (values, profiles) = (client.namespace("default"), client.namespace("profiles"));
        for error in [
            values.put("k", vec![0; 5 << 20]).await.unwrap_err(),
            profiles.mutate("k", registers()).await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
            assert_eq!(error.reason(), Some("MESSAGE_TOO_LARGE"));
            assert!(error.to_string().contains("limits.max_message_bytes"), "{error}");
        }
        values.put("k", "v").await.unwrap();
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_of_a_namespace_that_does_not_exist_are_refused() {
    let cluster = Cluster::start(&[("us", 2)], 2).await;
    let admin = cluster.client("us").await.admin();
    let asked = async |name: &str| {
        [
            admin.list_at_risk(Some(name), 10).await.map(|reply| reply.shards.len()),
            admin.list_tombstones(Some(name)).await.map(|reply| reply.tombstones.len()),
            admin.list_reviews(Some(name), 10).await.map(|reply| reply.reviews.len()),
        ]
    };
    for (name, expected) in [("nope", "NAMESPACE_NOT_FOUND"), ("No Name", "NAMESPACE_INVALID")] {
        for answer in asked(name).await {
            assert_eq!(answer.unwrap_err().reason(), Some(expected));
        }
    }
    for name in ["default", "catalog", "#77"] {
        assert!(
            asked(name).await.into_iter().all(|answer| answer.is_ok_and(|rows| rows == 0)),
            "{name}"
        );
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_on_the_link_and_raft_ports_are_told_what_differs() {
    let cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let listen = cluster.members[0].config.listen.clone();
    let identity = internal::LinkIdentity {
        cluster_id: "another".into(),
        from_region: "eu".into(),
        to_region: "us".into(),
        from_region_number: 2,
        shard_count: 2,
        protocol: 4,
        from_incarnation: 1,
        from_joining: false,
    };
    let mut link = LinkServiceClient::connect(format!("http://{}", listen.link)).await.unwrap();
    let wrong = [
        (identity.clone(), "cluster_id"),
        (
            internal::LinkIdentity {
                cluster_id: "test".into(),
                to_region: "ap".into(),
                ..identity.clone()
            },
            "region",
        ),
        (
            internal::LinkIdentity {
                cluster_id: "test".into(),
                shard_count: 5,
                ..identity.clone()
            },
            "shards",
        ),
        (
            internal::LinkIdentity {
                cluster_id: "test".into(),
                from_region: "xx".into(),
                ..identity.clone()
            },
            "region add",
        ),
        (
            internal::LinkIdentity { cluster_id: "test".into(), protocol: 99, ..identity },
            "protocol",
        ),
    ];
    for (identity, named) in wrong {
        let open = internal::Open { identity: Some(identity), shard: 0 };
        let open = internal::PullRequest { body: Some(internal::pull_request::Body::Open(open)) };
        let refused = link.pull(tokio_stream::iter([open])).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains(named), "{refused:?}");
    }
    let mut node = NodeServiceClient::connect(format!("http://{}", listen.raft)).await.unwrap();
    let stranger = internal::Identity { cluster_id: "another".into(), ..Default::default() };
    let request = internal::ReadIndexRequest { identity: Some(stranger), group: 0 };
    let refused = node.read_index(request).await.unwrap_err();
    assert_eq!(reason(&refused), Reason::ClusterMismatch);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_refuses_to_start_where_it_must_not() {
    let mut cluster = Cluster::start(&[("us", 1)], 2).await;
    let config = cluster.members[0].config.clone();
    let start =
        async |config: &tombolo::config::Config| match Node::start(config, Box::new(|_| Ok(())))
            .await
        {
            Ok(_) => panic!("it started"),
            Err(error) => format!("{error:#}"),
        };

    let in_use = start(&config).await;
    assert!(in_use.contains(&config.listen.client) && in_use.contains("listen.client"), "{in_use}");

    let mut elsewhere = config.clone();
    elsewhere.listen.client = free_address();
    elsewhere.listen.raft = free_address();
    elsewhere.listen.link = free_address();
    elsewhere.listen.http = free_address();
    let locked = start(&elsewhere).await;
    assert!(locked.contains("raft"), "{locked}");

    cluster.members[0].stop().await;
    let mut other = elsewhere.clone();
    other.cluster_id = "another".to_owned();
    let foreign = start(&other).await;
    assert!(foreign.contains("`test`") && foreign.contains("`another`"), "{foreign}");
    let mut other = elsewhere.clone();
    other.node_id = 7;
    assert!(start(&other).await.contains("belongs to node `1`"));
    let mut other = elsewhere.clone();
    other.shards = 3;
    assert!(start(&other).await.contains("created with 2 shards"));
    let mut other = elsewhere;
    other.region = "eu".to_owned();
    assert!(start(&other).await.contains("belongs to region `us`"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nearly_full_disk_refuses_new_data_and_nothing_else() {
    let mut cluster = Cluster::start(&[("us", 1)], 2).await;
    let mut kv = stub(&cluster).await;
    kv.put(put("old", "v")).await.unwrap();
    cluster.members[0].stop().await;
    // More than any disk has free.
    cluster.members[0].config.storage.reserve_bytes = u64::MAX;
    cluster.members[0].start().await;
    cluster.wait_ready().await;

    let mut kv = stub(&cluster).await;
    let refused = kv.put(put("new", "v")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(reason(&refused), Reason::DiskFull);
    assert!(refused.message().contains("storage.reserve_bytes"), "{refused}");
    let get = |key: &'static str| pb::GetRequest {
        namespace: "default".into(),
        key: key.into(),
        ..Default::default()
    };
    assert_eq!(kv.get(get("old")).await.unwrap().into_inner().versions.len(), 1);
    let remove =
        pb::DeleteRequest { namespace: "default".into(), key: "old".into(), ..Default::default() };
    kv.delete(remove).await.unwrap();
    assert!(kv.get(get("old")).await.unwrap().into_inner().versions.is_empty());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dot_that_cannot_exist_is_refused_before_it_reaches_the_log() {
    let mut cluster = Cluster::start(&[("us", 1)], 1).await;
    let mut kv = stub(&cluster).await;
    let check = pb::Check {
        key: "k".into(),
        condition: Some(pb::check::Condition::DotEquals(pb::Dot::default())),
    };
    let request = pb::CommitRequest {
        namespace: "default".into(),
        checks: vec![check],
        ..Default::default()
    };
    let refused = kv.commit(request).await.unwrap_err();
    assert_eq!(reason(&refused), Reason::RequestInvalid, "{refused:?}");
    kv.put(put("k", "v")).await.unwrap();
    // A replica that had logged it could not start again.
    cluster.members[0].stop().await;
    cluster.members[0].start().await;
    cluster.wait_ready().await;
    stub(&cluster).await.put(put("k", "w")).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_id_belongs_to_one_write() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let mut kv = stub(&cluster).await;
    let id = Some(pb::RequestId { client: 9, number: 1 });
    let first = pb::PutRequest { request_id: id, ..put("k", "v") };
    let dot = kv.put(first.clone()).await.unwrap().into_inner().dot;
    assert_eq!(kv.put(first.clone()).await.unwrap().into_inner().dot, dot);
    let other = pb::PutRequest { key: "other".into(), ..first };
    let refused = kv.put(other).await.unwrap_err();
    assert_eq!(reason(&refused), Reason::RequestIdInvalid, "{refused:?}");
    cluster.stop().await;
}
