//! What a write costs from client to answer: a real node with its log, store and ports, written to by
//! clients that do not wait for each other.
//!
//! `cargo bench --bench write`. `scripts/tree-cost` runs it with and without the Merkle tree;
//! comparisons with other servers are made by `scripts/bench`.

#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first surprise")]

use std::net::TcpListener;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::future::try_join_all;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tombolo::{
    config::{Config, FlagValue},
    node::Node,
};
use tombolo_client::{Client, ClientConfig};

/// Puts that are on their way at once.
const CLIENTS: u64 = 64;
const VALUE_BYTES: usize = 256;
const KEYS: u64 = 10_000;

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// A region of one node, and a client of it.
async fn start(dir: &TempDir) -> Client {
    let [client, raft, link, http] = [(); 4].map(|()| free_address());
    let text = format!(
        "cluster_id = \"bench\"\nregion = \"here\"\nnode_id = 1\ndata_dir = \"unused\"\nshards = 1\n\
         [listen]\nclient = \"{client}\"\nraft = \"{raft}\"\nlink = \"{link}\"\nhttp = \"{http}\"\n\
         [[nodes]]\nid = 1\nclient = \"{client}\"\nraft = \"{raft}\"\nlink = \"{link}\"\nhttp = \"{http}\"\n\
         [[regions]]\nname = \"here\"\nnumber = 1\nlink = [\"{link}\"]\n"
    );
    let file = dir.path().join("node.toml");
    std::fs::write(&file, text).unwrap();
    let value = dir.path().join("data").display().to_string();
    let flags = [FlagValue { flag: "--data-dir", key: "data_dir", value }];
    let loaded = Config::load(Some(&file), std::iter::empty(), &[], &flags).unwrap();
    let node = Node::start(&loaded.config, Box::new(|_| Ok(()))).await.unwrap();
    while !node.is_ready() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // It runs until the process ends.
    std::mem::forget(node);
    let config = ClientConfig { endpoints: vec![client], ..ClientConfig::default() };
    Client::connect(config).await.unwrap()
}

fn writes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write");
    group.throughput(Throughput::Elements(CLIENTS));
    group.sample_size(50);
    for (name, keys) in [("puts", KEYS), ("new", u64::MAX)] {
        let runtime = Runtime::new().unwrap();
        let dir = TempDir::new().unwrap();
        let client = runtime.block_on(start(&dir));
        let data = client.namespace("default");
        let mut number: u64 = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let puts = (0..CLIENTS).map(|_| {
                    number += 1;
                    let key = format!("bench-{:010}", number.wrapping_mul(7919) % keys);
                    data.put(key, vec![7; VALUE_BYTES]).into_future()
                });
                runtime.block_on(try_join_all(puts)).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, writes);
criterion_main!(benches);
