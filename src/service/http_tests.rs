//! The HTTP port through a real socket.

use super::*;
use crate::metrics::{
    ALL, LedgerNumbers, LinkNumbers, MetricKind, RaftLogNumbers, RaftNumbers, RocksNumbers,
};
use crate::reason::Reason;
use std::collections::BTreeSet;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tonic::Code;

struct Server {
    address: std::net::SocketAddr,
    state: HttpState,
    applied: Arc<Mutex<Vec<String>>>,
    shutdown: CancellationToken,
    task: JoinHandle<io::Result<()>>,
}

impl Server {
    async fn start() -> Self {
        let applied = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&applied);
        let log_filter = LogFilter::new("info", move |directives| {
            if directives.contains('!') {
                return Err(format!("`{directives}` is not valid"));
            }
            log.lock().push(directives.to_owned());
            Ok(())
        });
        let state = HttpState {
            metrics: Arc::new(Metrics::new()),
            checks: Arc::new(Checks::default()),
            log_filter: Arc::new(log_filter),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(serve(listener, router(state.clone()), shutdown.clone()));
        Self { address, state, applied, shutdown, task }
    }

    /// Status, headers in lower case, body.
    async fn ask(
        &self,
        method: &str,
        path: &str,
        header: &str,
        body: &str,
    ) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.ask("GET", path, "", "").await;
        (status, body)
    }
}

fn passes() -> Check {
    Box::new(|| Ok(()))
}

fn fails(why: &'static str) -> Check {
    Box::new(move || Err(why.to_owned()))
}

#[tokio::test]
async fn liveness_does_not_depend_on_readiness() {
    let server = Server::start().await;
    server.state.checks.add("raft", fails("no leader for shard 3"));
    server.state.checks.start_drain();

    assert_eq!(server.get("/livez").await, (200, "ok\n".into()));
}

#[tokio::test]
async fn readiness_lists_each_check_when_verbose_and_failures_always() {
    let server = Server::start().await;
    server.state.checks.add("raft", passes());
    server.state.checks.add("disk", passes());
    assert_eq!(server.get("/readyz").await, (200, "ready\n".into()));

    server.state.checks.add("raft", fails("no leader for shard 3"));

    let failed = "[-]raft failed: no leader for shard 3\n";
    assert_eq!(server.get("/readyz").await, (503, format!("{failed}not ready\n")));
    let verbose = format!("[+]drain ok\n{failed}[+]disk ok\nnot ready\n");
    assert_eq!(server.get("/readyz?verbose").await, (503, verbose));
}

#[tokio::test]
async fn excluded_checks_do_not_count_but_the_drain_always_does() {
    let server = Server::start().await;
    server.state.checks.add("raft", fails("no leader"));
    server.state.checks.add("disk", fails("full"));

    assert_eq!(server.get("/readyz?exclude=raft&exclude=disk").await.0, 200);
    assert_eq!(server.get("/readyz?exclude=raft,disk").await.0, 200);
    assert_eq!(server.get("/readyz?exclude=raft").await.0, 503);

    server.state.checks.start_drain();

    let (status, body) = server.get("/readyz?exclude=raft,disk,drain").await;
    assert_eq!(
        (status, body.as_str()),
        (503, "[-]drain failed: the node is draining\nnot ready\n")
    );
    assert!(!server.state.checks.is_ready());
}

#[tokio::test]
async fn readiness_answers_json_on_demand() {
    let server = Server::start().await;
    server.state.checks.add("raft", fails("no leader"));

    let accept = "Accept: application/json\r\n";
    let (status, head, body) = server.ask("GET", "/readyz", accept, "").await;

    assert_eq!(status, 503);
    assert!(head.contains("content-type: application/json"), "{head}");
    let expected = json!({ "ready": false, "checks": [
        { "name": "drain", "ok": true, "problem": null },
        { "name": "raft", "ok": false, "problem": "no leader" },
    ]});
    assert_eq!(serde_json::from_str::<serde_json::Value>(&body).unwrap(), expected);
}

#[tokio::test]
async fn metrics_hold_every_documented_name_and_no_other() {
    let server = Server::start().await;
    server.state.metrics.on_scrape(Box::new(|metrics| {
        metrics.set_raft(3, &RaftNumbers { is_leader: true, term: 7, ..RaftNumbers::default() });
        let link = LinkNumbers { up: true, lag_seconds: 1.5, sent_bytes: 10, ..Default::default() };
        metrics.set_link("eu", &link);
        metrics.set_raft_log(&RaftLogNumbers { syncs: 5, ..Default::default() });
        metrics.set_rocksdb(&RocksNumbers { sst_bytes: 99, ..Default::default() });
        metrics.set_disk(77, true);
        metrics.set_scrubbed(9, 1);
        metrics.set_ledger(&LedgerNumbers { entries: 4, ..Default::default() });
        metrics.set_clock_refused(2);
        metrics.set_node_clock(1, -0.25, true);
        metrics.set_region_clock("eu", 3, 28_800.0);
    }));
    server.state.metrics.watch_began();
    server.state.metrics.watch_ended(None);
    server.state.metrics.rpc("/tombolo.v1.KvService/Get").finish(Code::Ok, None);

    let (status, head, body) = server.ask("GET", "/metrics", "", "").await;

    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    let served: BTreeSet<_> = body
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split(['{', ' ']).next().unwrap())
        .collect();
    let documented: BTreeSet<String> = ALL
        .iter()
        .flat_map(|metric| match metric.kind {
            MetricKind::Histogram => {
                ["_bucket", "_count", "_sum"].map(|end| format!("{}{end}", metric.name)).to_vec()
            }
            MetricKind::Counter | MetricKind::Gauge | MetricKind::Info => vec![metric.name.into()],
        })
        .collect();
    assert_eq!(served.into_iter().map(str::to_owned).collect::<BTreeSet<_>>(), documented);
    for line in [
        "tombolo_raft_is_leader{shard=\"3\"} 1",
        "tombolo_raft_term{shard=\"3\"} 7",
        "tombolo_link_up{peer_region=\"eu\"} 1",
        "tombolo_replication_lag_seconds{peer_region=\"eu\"} 1.5",
        "tombolo_replication_sent_bytes_total{peer_region=\"eu\"} 10",
        "tombolo_raft_log_syncs_total 5",
        "tombolo_rocksdb_sst_bytes 99",
        "tombolo_disk_free_bytes 77",
        "tombolo_disk_short 1",
        "tombolo_scrub_damaged_total 1",
        "tombolo_clock_offset_seconds{node=\"1\"} -0.25",
        "tombolo_clock_outside{node=\"1\"} 1",
        "tombolo_clock_refused_total 2",
        "tombolo_hlc_rejected_total{peer_region=\"eu\"} 3",
        "tombolo_hlc_ahead_seconds{peer_region=\"eu\"} 28800.0",
    ] {
        assert!(body.contains(line), "{line} is not in:\n{body}");
    }
    assert!(body.ends_with("# EOF\n"));
}

#[tokio::test]
async fn requests_are_counted_by_method_code_and_reason() {
    let server = Server::start().await;
    let metrics = &server.state.metrics;
    let refused: Result<(), _> = Err(Reason::KeyEmpty.status("no key", &[]));

    metrics.rpc("Put").finish_with(&refused);
    drop(metrics.rpc("Put"));
    let open = metrics.rpc("Put");

    let text = metrics.render();
    drop(open);
    for line in [
        "tombolo_rpc_requests_total{method=\"Put\",code=\"INVALID_ARGUMENT\",reason=\"KEY_EMPTY\"} 1",
        "tombolo_rpc_requests_total{method=\"Put\",code=\"CANCELLED\",reason=\"\"} 1",
        "tombolo_rpc_in_flight{method=\"Put\"} 1",
        "tombolo_rpc_duration_seconds_count{method=\"Put\"} 2",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
}

#[tokio::test]
async fn counters_fed_by_totals_never_fall() {
    let metrics = Metrics::new();

    metrics.set_raft_log(&RaftLogNumbers { syncs: 5, ..Default::default() });
    metrics.set_raft_log(&RaftLogNumbers { syncs: 3, ..Default::default() });

    assert!(metrics.render().contains("tombolo_raft_log_syncs_total 5\n"));
}

#[tokio::test]
async fn process_metrics_are_plausible() {
    let text = Metrics::new().render();
    let value = |name: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    };

    assert!(1e6 < value("process_resident_memory_bytes"));
    assert!(value("process_resident_memory_bytes") <= value("process_virtual_memory_bytes"));
    assert!(2.0 < value("process_open_fds"));
    assert!(value("process_open_fds") < value("process_max_fds"));
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - 3600.0..now + 5.0).contains(&value("process_start_time_seconds")));
}

#[tokio::test]
async fn the_log_filter_is_replaced_and_put_back_on_demand() {
    let server = Server::start().await;
    assert_eq!(server.get("/admin/log-filter").await, (200, "info\nas configured\n".into()));

    let (status, _, body) = server.ask("PUT", "/admin/log-filter?for=1h", "", "debug\n").await;
    assert_eq!(status, 200);
    assert!(body.starts_with("debug\nfor 3"), "{body}");
    let (status, _, body) = server.ask("DELETE", "/admin/log-filter", "", "").await;

    assert_eq!((status, body.as_str()), (200, "info\nas configured\n"));
    assert_eq!(*server.applied.lock(), ["debug", "info"]);
}

#[tokio::test]
async fn a_bad_log_filter_request_says_why_and_changes_nothing() {
    let server = Server::start().await;
    let too_long = "x".repeat(5000);
    for (path, body, status, problem) in [
        ("/admin/log-filter", "!", 400, "`!` is not valid"),
        ("/admin/log-filter?for=10", "debug", 400, "for=10 is not a time from 1s to 24h"),
        ("/admin/log-filter?for=25h", "debug", 400, "for=25h is not a time"),
        ("/admin/log-filter?for=0s", "debug", 400, "for=0s is not a time"),
        ("/admin/log-filter?for=%C3%A9", "debug", 400, "is not a time"),
        ("/admin/log-filter?for=99999999999999999999h", "debug", 400, "is not a time"),
        ("/admin/log-filter", too_long.as_str(), 413, ""),
    ] {
        let (got, _, answer) = server.ask("PUT", path, "", body).await;
        assert_eq!(got, status, "{path}: {answer}");
        assert!(answer.contains(problem), "{path}: {answer}");
    }
    assert!(server.applied.lock().is_empty());
}

#[tokio::test]
async fn a_replaced_log_filter_expires_and_a_later_one_restarts_the_clock() {
    let (applied, mut log) = tokio::sync::mpsc::unbounded_channel();
    let apply =
        move |directives: &str| applied.send(directives.to_owned()).map_err(|e| e.to_string());
    let filter = Arc::new(LogFilter::new("info", apply));
    let (short, long) = (Duration::from_millis(1), Duration::from_millis(150));

    filter.replace("debug", short).unwrap();
    let started = Instant::now();
    filter.replace("trace", long).unwrap();

    assert_eq!(log.recv().await.as_deref(), Some("debug"));
    assert_eq!(log.recv().await.as_deref(), Some("trace"));
    assert_eq!(log.recv().await.as_deref(), Some("info"));
    assert!(long <= started.elapsed(), "the first expiry must not end the second filter");
    // `restore` holds the lock until it is done, and `describe` takes it.
    assert_eq!(filter.describe(), "info\nas configured\n");
}

#[tokio::test]
async fn unknown_paths_and_methods_list_what_there_is() {
    let server = Server::start().await;

    let (status, body) = server.get("/metricz").await;
    assert_eq!(status, 404);
    assert!(body.contains("/metrics") && body.contains("/readyz"), "{body}");

    let (status, _, body) = server.ask("POST", "/metrics", "", "").await;
    assert_eq!(status, 405);
    assert!(body.contains("GET    /metrics"), "{body}");
}

#[tokio::test]
async fn stop_ends_the_server_even_with_an_unfinished_request() {
    let server = Server::start().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"PUT /admin/log-filter HTTP/1.1\r\nHost: x\r\nContent-").await.unwrap();
    assert_eq!(server.get("/livez").await.0, 200);

    server.shutdown.cancel();

    let bound = STOP_TIMEOUT * 5;
    tokio::time::timeout(bound, server.task).await.unwrap().unwrap().unwrap();
}
