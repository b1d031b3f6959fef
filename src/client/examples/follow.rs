//! A copy of a namespace that follows a region, and goes on in another one when that is lost.
//!
//! Every change comes once or more often, never backwards; the token says where to go on, in any
//! region. Start three regions with `tombolo demo`, then:
//!
//! ```text
//! cargo run -p tombolo-client --example follow -- --region 127.0.0.1:7101 --region 127.0.0.1:7113
//! ```
//!
//! and write, cut links and kill nodes meanwhile. Ctrl-C ends it.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use futures::StreamExt;
use tombolo_client::{Client, ClientConfig, Error, WatchEvent};

/// One node of each region, in the order of preference.
#[derive(Parser)]
struct Args {
    #[arg(long, required = true)]
    region: Vec<String>,
    #[arg(long, default_value = "default")]
    namespace: String,
}

/// What is kept of a key: its value, and the shard it lives in.
type Copy = BTreeMap<Bytes, (Bytes, u32)>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args = Args::parse();
    // What a real consumer keeps together, in one transaction: the copy, and the token that says how
    // far it is.
    let (mut copy, mut token) = (Copy::new(), Bytes::new());
    for endpoint in args.region.iter().cycle() {
        let ended = follow(endpoint, &args.namespace, &mut copy, &mut token).await;
        println!("{endpoint}: {ended}; going on in the next region");
        if !ended.is_retryable() && ended.reason() == Some("NAMESPACE_NOT_FOUND") {
            return Err(ended);
        }
    }
    Ok(())
}

/// Follows one region for as long as it serves; answers why it stopped.
async fn follow(endpoint: &str, namespace: &str, copy: &mut Copy, token: &mut Bytes) -> Error {
    let config = ClientConfig { endpoints: vec![endpoint.to_owned()], ..Default::default() };
    let client = match Client::connect(config).await {
        Ok(client) => client,
        Err(error) => return error,
    };
    let watch = client.namespace(namespace).watch().give_up_after(Duration::from_secs(10));
    // The first time with the present state; later from where it was, here or elsewhere.
    let watch = if token.is_empty() { watch.snapshot() } else { watch.resume(token.clone()) };
    let mut stream = watch.stream();
    loop {
        let item = match stream.next().await {
            Some(Ok(item)) => item,
            Some(Err(error)) => return error,
            // A watch ends by an error only.
            None => continue,
        };
        apply(copy, item.event);
        // Everything that it covers is in the copy now.
        if let Some(reached) = item.token {
            *token = reached;
        }
    }
}

fn apply(copy: &mut Copy, event: WatchEvent) {
    match event {
        // Under `lww`, a change that is not current lost to another one: the key holds that.
        WatchEvent::Change(change) if !change.current => {}
        WatchEvent::Change(change) => {
            let from = &change.origin_region;
            match change.value() {
                Some(value) => {
                    println!("{from}: {:?} = {value:?}, {}", change.key, change.dot);
                    copy.insert(change.key.clone(), (value.clone(), change.shard));
                }
                None => {
                    println!("{from}: {:?} is deleted, {}", change.key, change.dot);
                    copy.remove(&change.key);
                }
            }
        }
        WatchEvent::Entry { shard, entry, .. } => match entry.value() {
            Some(value) => _ = copy.insert(entry.key.clone(), (value.clone(), shard)),
            None => _ = copy.remove(&entry.key),
        },
        // The region no longer keeps what was missed: it sends the whole shard again.
        WatchEvent::Reset { shard, reason } => {
            println!("shard {shard} begins anew: {reason:?}");
            copy.retain(|_, (_, of)| *of != shard);
        }
        WatchEvent::SnapshotDone { shards_left: 0, .. } => {
            println!("{} keys; now following", copy.len());
        }
        WatchEvent::SnapshotDone { .. } | WatchEvent::Checkpoint { .. } => {}
    }
}
