//! What ten thousand watchers to whom nothing happens cost a node.
//!
//! A real server process, so that what is measured is the server's memory alone; few connections, as
//! clients have them. Bytes decide; times are printed only.

use std::{path::PathBuf, time::Duration};

use futures::{StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};
use tombolo_client::{
    Client, ClientConfig,
    proto::{self, watch_event::Body, watch_service_client::WatchServiceClient},
};
use tombolo_demo::{
    demo::{Demo, DemoConfig, READY_PATIENCE},
    latency::Latencies,
    layout::Wanted,
};
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

const WATCHERS: usize = 10_000;
const CONNECTIONS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(120);
/// Allowed for all of them, in bytes.
const BYTES_MAX: f64 = 200.0 * 1024.0 * 1024.0;

type Watching = Streaming<proto::WatchResponse>;

/// A gauge of the server.
async fn gauge(http: &str, name: &str) -> f64 {
    let mut stream = TcpStream::connect(http).await.expect("the port answers");
    let request = "GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    let line = answer.lines().find(|line| line.starts_with(name)).expect("the metric");
    line.rsplit(' ').next().expect("a value").parse().expect("a number")
}

async fn open(channel: Channel) -> Watching {
    let request = proto::WatchRequest {
        namespace: "default".into(),
        // Longer than the test: nothing is to happen.
        checkpoint_interval: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        ..Default::default()
    };
    let mut client = WatchServiceClient::new(channel);
    let mut watching = client.watch(request).await.expect("served").into_inner();
    watching.next().await.expect("a first word").expect("served");
    watching
}

async fn wait_for_change(watching: &mut Watching) {
    loop {
        let response = watching.next().await.expect("it goes on").expect("served");
        if response.events.iter().any(|event| matches!(event.body, Some(Body::Change(_)))) {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_idle_watchers_cost_less_than_200_mib_and_hear_of_the_next_write() {
    let data = tempfile::tempdir().expect("a directory");
    let demo = Demo::launch(DemoConfig {
        data_dir: data.path().canonicalize().expect("a path"),
        wanted: Wanted {
            regions: Some(vec!["us".into()]),
            nodes: Some(1),
            shards: Some(16),
            base_port: None,
        },
        latencies: Latencies::default(),
        program: PathBuf::from(env!("CARGO_BIN_EXE_tombolo")),
    })
    .await
    .expect("the node starts");
    demo.wait_ready(READY_PATIENCE).await.expect("it is ready");
    let node = demo.layout().nodes_of("us").next().expect("a node").clone();
    let (address, http) = (node.client.to_string(), node.http.to_string());
    let endpoints = vec![address.clone()];
    let client = Client::connect(ClientConfig { endpoints, ..Default::default() }).await.unwrap();
    for number in 0..1000 {
        client.namespace("default").put(format!("k{number}"), vec![1; 100]).await.unwrap();
    }

    let resident = "process_resident_memory_bytes";
    let before = gauge(&http, resident).await;
    let channels: Vec<Channel> = (0..CONNECTIONS)
        .map(|_| Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy())
        .collect();
    let began = Instant::now();
    let opening = (0..WATCHERS).map(|number| open(channels[number % CONNECTIONS].clone()));
    let mut watching: Vec<Watching> = stream::iter(opening).buffer_unordered(64).collect().await;
    let opened_in = began.elapsed();
    assert_eq!(gauge(&http, "tombolo_watchers").await, WATCHERS as f64);
    let idle = gauge(&http, resident).await - before;

    let began = Instant::now();
    client.namespace("default").put("now", "v").await.unwrap();
    let hearing = watching.iter_mut().map(wait_for_change);
    let heard = stream::iter(hearing).buffer_unordered(WATCHERS).collect::<Vec<_>>();
    tokio::time::timeout(PATIENCE, heard).await.expect("all of them hear of it");
    let heard_in = began.elapsed();
    let after = gauge(&http, resident).await - before;
    println!(
        "{WATCHERS} watchers: opened in {opened_in:?}, {:.1} MiB idle, all heard of a write in \
         {heard_in:?}, {:.1} MiB after it",
        idle / 1048576.0,
        after / 1048576.0
    );
    assert!(idle < BYTES_MAX, "{idle} bytes for {WATCHERS} idle watchers");
    assert!(after < BYTES_MAX, "{after} bytes after one write");
    demo.stop().await;
}
