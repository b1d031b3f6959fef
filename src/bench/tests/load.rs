//! Whole runs against in-process servers: every call is counted, whatever becomes of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Parser;
use tombolo_bench::etcd_proto::kv_server::{Kv, KvServer};
use tombolo_bench::etcd_proto::maintenance_server::{Maintenance, MaintenanceServer};
use tombolo_bench::etcd_proto::{
    KeyValue, PutRequest, PutResponse, RangeRequest, RangeResponse, ResponseHeader, StatusRequest,
    StatusResponse,
};
use tombolo_bench::{BenchArgs, Report, measure, run};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

#[path = "../../client/tests/fake/mod.rs"]
mod fake;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: BenchArgs,
}

fn args(line: &str, endpoints: &[String]) -> BenchArgs {
    let endpoints = endpoints.join(",");
    let fixed = ["bench", "--endpoints", &endpoints, "--seconds", "1", "--warmup", "0"];
    let words = fixed.into_iter().chain(["--keys", "20"]).chain(line.split_whitespace());
    Cli::parse_from(words).args
}

async fn measured(line: &str, endpoints: &[String]) -> Report {
    measure(&args(line, endpoints)).await.expect("measured")
}

/// A member of etcd that holds every key, unless told otherwise.
#[derive(Clone, Default)]
struct Member {
    id: u64,
    leader: u64,
    holds_nothing: bool,
    puts: Arc<AtomicU64>,
    gets: Arc<AtomicU64>,
}

impl Member {
    async fn start(self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound").to_string();
        let server = tonic::transport::Server::builder()
            .add_service(KvServer::new(self.clone()))
            .add_service(MaintenanceServer::new(self));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        address
    }
}

#[tonic::async_trait]
impl Kv for Member {
    async fn range(&self, _: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        self.gets.fetch_add(1, Ordering::Relaxed);
        let kvs = if self.holds_nothing { Vec::new() } else { vec![KeyValue::default()] };
        Ok(Response::new(RangeResponse { kvs, ..RangeResponse::default() }))
    }

    /// Every fourth put fails.
    async fn put(&self, _: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        if self.puts.fetch_add(1, Ordering::Relaxed) % 4 == 3 {
            return Err(Status::unavailable("etcdserver: request timed out"));
        }
        Ok(Response::new(PutResponse::default()))
    }
}

#[tonic::async_trait]
impl Maintenance for Member {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let header = Some(ResponseHeader { member_id: self.id, ..ResponseHeader::default() });
        Ok(Response::new(StatusResponse { header, leader: self.leader, ..Default::default() }))
    }
}

#[tokio::test]
async fn each_put_is_counted_as_success_or_by_its_reason() {
    let leader = Member { id: 2, leader: 2, ..Member::default() };
    let endpoints = [
        Member { id: 1, leader: 2, ..Member::default() }.start().await,
        leader.clone().start().await,
    ];
    let report = measured("--target etcd --clients 8 --connections 4", &endpoints).await;
    assert_eq!(report.connections, 4);
    assert_eq!(report.operations + report.errors, leader.puts.load(Ordering::Relaxed));
    assert_eq!(report.errors_by_reason["Unavailable: request timed out"], report.errors);
    assert!(report.errors > 0 && report.operations > 0);
}

#[tokio::test]
async fn reads_that_find_nothing_are_errors() {
    let member = Member { id: 1, leader: 1, holds_nothing: true, ..Member::default() };
    let endpoints = [member.start().await];
    let error = measure(&args("--target etcd --op get", &endpoints)).await.unwrap_err();
    assert!(error.to_string().contains("key not found"), "{error:#}");
}

#[tokio::test]
async fn connections_to_all_members_share_the_work() {
    let members = [1, 2].map(|id| Member { id, leader: 1, ..Member::default() });
    let endpoints = [members[0].clone().start().await, members[1].clone().start().await];
    let line = "--target etcd --etcd-members all --op get --clients 4";
    let report = measured(line, &endpoints).await;
    let gets = members.map(|member| member.gets.load(Ordering::Relaxed));
    assert!(gets.iter().all(|&gets| gets > 0));
    assert_eq!(report.operations, gets.iter().sum::<u64>());
}

#[tokio::test]
async fn tombolo_is_asked_at_the_leader_with_request_ids() {
    let region = fake::Region::start(3).await;
    region.state.lock().leader = 2;
    let report = measured("--op mixed --clients 2", &region.addresses[..1]).await;
    assert_eq!(report.errors, 0, "{:?}", report.errors_by_reason);
    assert_eq!(report.by_operation.len(), 2);
    let puts = region.calls("put");
    let mut ids: Vec<_> =
        puts.iter().map(|call| call.request_id.map(|id| (id.client, id.number)).unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), puts.len(), "request ids repeat");
    assert!(puts.iter().all(|call| call.node == 2 && call.no_forward));
    assert!(region.calls("get").iter().all(|call| call.node == 2));
}

#[tokio::test]
async fn a_new_leader_is_found_and_the_refusals_are_counted() {
    let region = fake::Region::start(3).await;
    let moved = region.clone();
    let mover = tokio::spawn(async move {
        while moved.calls("put").is_empty() {
            tokio::task::yield_now().await;
        }
        let mut state = moved.state.lock();
        (state.leader, state.term) = (3, 2);
    });
    let report = measured("--clients 4", &region.addresses).await;
    mover.await.unwrap();
    assert!(report.errors_by_reason["Unavailable: NOT_LEADER"] > 0);
    assert!(region.calls("put").iter().any(|call| call.node == 3));
}

#[tokio::test]
async fn a_target_that_is_not_there_is_named() {
    for target in ["tombolo", "etcd"] {
        // Port 1 is reserved; nobody listens there.
        let line = format!("--target {target}");
        let error = run(args(&line, &["127.0.0.1:1".to_owned()]), &mut Vec::new()).await;
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("127.0.0.1:1"), "{error}");
    }
}
