//! What links say about themselves is true, whatever is done to them.

use std::time::Duration;

use tombolo_client::{Client, proto};
use tombolo_demo::{
    latency::Latencies,
    network::{Cut, Network},
};

use crate::support::{Cluster, Member, wait_until};

const REGIONS: [(&str, usize); 2] = [("us", 1), ("eu", 1)];

/// Two regions that reach each other only through a network that can be broken.
async fn start() -> (Cluster, Network) {
    let names: Vec<String> = REGIONS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let latencies: Latencies = "10ms".parse().expect("a latency");
    let network = Network::new(&names, &latencies);
    let through = async |members: &mut [Member]| {
        let targets: Vec<String> =
            members.iter().map(|member| member.config.listen.link.clone()).collect();
        for (here, there) in [(0, 1), (1, 0)] {
            let (from, to) = (REGIONS[here].0, REGIONS[there].0);
            let target = targets[there].parse().expect("an address");
            let proxy = network.open(from, to, target).await.expect("a free port");
            let config = &mut members[here].config;
            config.replication.watchdog = Duration::from_secs(2);
            let peer = config.regions.iter_mut().find(|region| region.name == to);
            peer.expect("both are configured").link = vec![proxy.to_string()];
        }
    };
    let cluster = Cluster::start_prepared(&REGIONS, 1, &[], through).await;
    (cluster, network)
}

/// The link of the default namespace.
async fn link(client: &Client) -> proto::Link {
    let links = client.admin().list_links(None).await.expect("links").links;
    links.into_iter().find(|link| link.namespace == "default").expect("one link")
}

async fn wait_for_phase(client: &Client, phase: proto::LinkPhase) -> proto::Link {
    let what = format!("the link is {}", phase.as_str_name());
    wait_until(&what, async || link(client).await.phase() == phase).await;
    link(client).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_says_what_it_does_while_it_is_cut_stalled_slow_and_flapping() {
    let (cluster, network) = start().await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let keys = us.namespace("default");
    keys.put("k", "0").ack_regions(1).await.unwrap();
    let well = wait_for_phase(&eu, proto::LinkPhase::Streaming).await;
    assert_eq!((well.last_error.as_str(), well.lag_events), ("", 0), "{well:?}");
    assert!(well.received_events > 0);

    // Stalled: bytes vanish without a word. The writer sees lag that grows, the reader gives up.
    network.partition("us", "eu", Cut::default()).unwrap();
    for number in 0..10 {
        keys.put(format!("stalled{number}"), "v").await.unwrap();
    }
    wait_until("the lag is a second", async || link(&us).await.lag_seconds >= 1.0).await;
    let before = link(&us).await;
    assert_eq!(before.unacknowledged_events, 10, "{before:?}");
    assert!(before.unacknowledged_bytes > 10);
    wait_until("the lag grows", async || link(&us).await.lag_seconds >= before.lag_seconds + 1.0)
        .await;
    let given_up = wait_for_phase(&eu, proto::LinkPhase::Blocked).await;
    assert!(!given_up.last_error.is_empty(), "{given_up:?}");
    assert!(given_up.next_retry_time.is_some(), "{given_up:?}");

    // Cut with resets: refused at once, and still said.
    network.partition("us", "eu", Cut { reset: true, one_way: false }).unwrap();
    keys.put("cut", "v").await.unwrap();
    assert_eq!(link(&us).await.unacknowledged_events, 11);
    wait_for_phase(&eu, proto::LinkPhase::Blocked).await;

    // Healed, but slow: it streams, and the lag goes.
    network.set_latency("us", "eu", Duration::from_millis(600)).unwrap();
    network.heal();
    let slow = wait_for_phase(&eu, proto::LinkPhase::Streaming).await;
    assert_eq!(slow.last_error, "", "{slow:?}");
    wait_until("nothing is behind", async || {
        let (there, here) = (link(&us).await, link(&eu).await);
        there.unacknowledged_events == 0 && there.lag_seconds == 0.0 && here.lag_events == 0
    })
    .await;

    // Flapping: whatever was said on the way, in the end it is well and says so.
    network.set_latency("us", "eu", Duration::from_millis(10)).unwrap();
    for round in 0..5 {
        network.partition("us", "eu", Cut { reset: round % 2 == 0, one_way: false }).unwrap();
        keys.put(format!("flapping{round}"), "v").await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        network.heal();
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    wait_until("all is there", async || {
        eu.namespace("default").get("flapping4").await.unwrap().value().is_some()
    })
    .await;
    let after = wait_for_phase(&eu, proto::LinkPhase::Streaming).await;
    assert_eq!(after.last_error, "", "{after:?}");
    wait_until("nothing is behind", async || {
        let link = link(&us).await;
        link.unacknowledged_events == 0 && link.unacknowledged_bytes == 0
    })
    .await;
    cluster.stop().await;
    network.close().await;
}
