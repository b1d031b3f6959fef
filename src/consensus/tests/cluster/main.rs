//! Three nodes over real logs, stores and sockets, and what may happen to them.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by unwrapping")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::{Cluster, LIMIT};
use tokio::time::{Instant, timeout};
use tombolo_consensus::ConsensusConfig;
use tombolo_core::NodeId;

fn unchanged(_: &mut ConsensusConfig) {}

/// Keeps almost no log, so that a follower that misses a few writes needs a snapshot.
fn short_log(config: &mut ConsensusConfig) {
    config.retain_bytes = 64 << 10;
    config.flush_log_bytes = 64 << 10;
    config.flush_interval = Duration::from_secs(1);
}

#[tokio::test]
async fn a_write_reaches_all_replicas() {
    let cluster = Cluster::start(unchanged).await;

    let mut last = 0;
    for number in 0..20 {
        last = cluster.put(&format!("key{number}"), b"value").await.log_id.index;
    }
    cluster.converged(last).await;

    for node in &cluster.nodes {
        for number in 0..20 {
            assert_eq!(node.value(&format!("key{number}")).unwrap(), "value");
        }
    }
    let leader = cluster.leader().await;
    let metrics = cluster.node(leader).group().metrics();
    assert!(metrics.is_leader);
    assert_eq!(metrics.voters, [1, 2, 3]);
    assert!(20 <= metrics.proposed_commands);
}

#[tokio::test]
async fn killing_the_leader_loses_nothing_that_was_acknowledged() {
    let mut cluster = Cluster::start(unchanged).await;
    for number in 0..50 {
        cluster.put(&format!("before{number}"), b"1").await;
    }
    let old = cluster.leader().await;

    cluster.kill(old).await;
    let last = cluster.put("after", b"2").await.log_id.index;
    let new = cluster.leader().await;

    assert_ne!(new, old);
    for number in 0..50 {
        assert_eq!(cluster.node(new).value(&format!("before{number}")).unwrap(), "1");
    }
    cluster.restart(old).await;
    cluster.converged(last).await;
    assert_eq!(cluster.node(old).value("after").unwrap(), "2");
}

#[tokio::test]
async fn a_whole_cluster_comes_back_after_its_log_was_purged() {
    let mut cluster = Cluster::start(short_log).await;
    for number in 0..60 {
        cluster.put(&format!("key{number}"), &[7; 8 << 10]).await;
    }
    for node in &cluster.nodes {
        node.until("the log is not purged", |node| node.group().metrics().purged).await;
    }

    for id in 1..=3 {
        cluster.kill(id).await;
    }
    for id in 1..=3 {
        cluster.restart(id).await;
    }

    let last = cluster.put("last", b"x").await.log_id.index;
    cluster.converged(last).await;
    for node in &cluster.nodes {
        for number in 0..60 {
            assert_eq!(node.value(&format!("key{number}")).unwrap().len(), 8 << 10);
        }
    }
}

/// Writes until the log that node 3 misses is purged on the others.
async fn leave_node_three_behind(cluster: &mut Cluster, value: &[u8], count: usize) -> u64 {
    cluster.put("first", b"1").await;
    cluster.kill(3).await;
    let mut last = 0;
    for number in 0..count {
        last = cluster.put(&format!("key{number}"), value).await.log_id.index;
    }
    for id in [1, 2] {
        let purged = |node: &support::Node| node.group().metrics().purged.filter(|at| 20 < *at);
        cluster.node(id).until("the log is not purged", purged).await;
    }
    last
}

#[tokio::test]
async fn a_follower_behind_the_purged_log_gets_a_snapshot() {
    let mut cluster = Cluster::start(short_log).await;
    leave_node_three_behind(&mut cluster, &[7; 8 << 10], 60).await;

    cluster.restart(3).await;
    let last = cluster.put("after", b"2").await.log_id.index;
    cluster.converged(last).await;

    for number in 0..60 {
        assert_eq!(cluster.node(3).value(&format!("key{number}")).unwrap().len(), 8 << 10);
    }
    assert_eq!(cluster.node(3).value("after").unwrap(), "2");
    let sent: u64 =
        [1, 2].iter().map(|id| cluster.node(*id).consensus().snapshot_chunks_sent()).sum();
    assert!(0 < sent);
}

#[tokio::test]
async fn a_snapshot_transfer_that_breaks_goes_on_where_it_stopped() {
    let mut cluster = Cluster::start(short_log).await;
    let value: Vec<u8> = (0..256usize << 10).map(|at| u8::try_from(at % 251).unwrap()).collect();
    leave_node_three_behind(&mut cluster, &value, 48).await;
    for id in [1, 2] {
        cluster.node(id).consensus().break_snapshot_after(6);
    }

    cluster.restart(3).await;
    let last = cluster.put("after", b"2").await.log_id.index;
    cluster.converged(last).await;

    for number in 0..48 {
        assert_eq!(cluster.node(3).value(&format!("key{number}")).unwrap(), value);
    }
    // About 24 chunks: the values and the change log. Starting over would send six more.
    let sent: Vec<u64> =
        [1, 2].iter().map(|id| cluster.node(*id).consensus().snapshot_chunks_sent()).collect();
    let leader = cluster.leader().await;
    let export = cluster.node(leader).group().store().export().unwrap();
    let whole = tokio::task::spawn_blocking({
        let mut export = export;
        move || export.totals().unwrap().chunks
    });
    let whole = whole.await.unwrap();
    assert!(8 < whole, "the snapshot is too small to break: {whole}");
    let sent: u64 = sent.iter().sum();
    assert!(sent < whole + 6, "{sent} chunks were sent of {whole}");
}

#[tokio::test]
async fn a_leader_that_is_cut_from_its_quorum_proves_no_read() {
    let cluster = Cluster::start(unchanged).await;
    cluster.put("key", b"1").await;
    let old = cluster.leader().await;
    let others: Vec<NodeId> = (1..=3).filter(|id| *id != old).map(NodeId).collect();

    cluster.node(old).consensus().cut_off_from(&others);

    // Long enough for the others to elect a leader and to write.
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        let barrier = cluster.node(old).group().read_barrier();
        if let Ok(answer) = timeout(Duration::from_millis(500), barrier).await {
            assert!(answer.is_err(), "{answer:?}");
            tokio::task::yield_now().await;
        }
    }
    cluster.node(old).consensus().cut_off_from(&[]);
    let last = cluster.put("key", b"2").await.log_id.index;
    cluster.converged(last).await;
    assert_eq!(cluster.node(old).value("key").unwrap(), "2");
}

/// A follower that acknowledged the leader restarts inside the lease. Without the quarantine it
/// votes at once for the other follower, which then writes while the old leader still answers
/// reads from its lease.
#[tokio::test]
async fn a_lease_read_is_never_stale_when_a_follower_forgets_its_promise() {
    // Long enough that a restart fits into a lease.
    let lease = Duration::from_secs(4);
    let mut cluster = Cluster::start(move |config| {
        config.lease_reads = true;
        config.election_timeout_max = lease;
    })
    .await;
    cluster.put("key", b"old").await;
    let old = cluster.leader().await;
    let [cut, forgets] =
        <[u64; 2]>::try_from((1..=3).filter(|id| *id != old).collect::<Vec<_>>()).unwrap();
    cluster.converged(cluster.put("key", b"old").await.log_id.index).await;

    // The follower `cut` hears nothing from the leader until its own promise is over.
    cluster.node(old).consensus().cut_off_from(&[NodeId(cut)]);
    tokio::time::sleep(lease + Duration::from_millis(500)).await;
    cluster.kill(forgets).await;
    cluster.node(old).consensus().cut_off_from(&[NodeId(cut), NodeId(forgets)]);
    cluster.restart(forgets).await;
    let candidate = tokio::spawn({
        let group = cluster.node(cut).group().clone();
        async move {
            while !group.leadership().borrow().is_leader {
                group.campaign().await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });

    let acknowledged = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let groups = [cut, forgets].map(|id| cluster.node(id).group().clone());
        let (command, acknowledged) = (cluster.write("key", b"new"), acknowledged.clone());
        async move {
            for group in groups.iter().cycle() {
                if group.propose(command.clone()).await.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            acknowledged.store(true, Ordering::SeqCst);
        }
    });
    let (mut served, mut after) = (0, 0);
    let deadline = Instant::now() + LIMIT;
    while after < 40 {
        assert!(Instant::now() < deadline, "nobody was elected");
        let was_acknowledged = acknowledged.load(Ordering::SeqCst);
        let barrier = cluster.node(old).group().read_barrier();
        if let Ok(Ok(_)) = timeout(Duration::from_millis(50), barrier).await {
            served += 1;
            let value = cluster.node(old).value("key").unwrap();
            assert!(!was_acknowledged || value == "new", "a stale lease read");
        }
        after += usize::from(was_acknowledged);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    writer.await.unwrap();
    candidate.abort();
    assert!(0 < served, "the old leader's lease was never used");
}

#[tokio::test]
async fn a_node_of_another_cluster_is_refused() {
    let cluster = Cluster::start(|config| {
        if config.node_id == NodeId(3) {
            config.cluster_id = "other".to_owned();
        }
    })
    .await;

    cluster.put("key", b"1").await;

    let stranger = cluster.node(3).group();
    assert_eq!(stranger.metrics().last_log, None);
    assert_eq!(stranger.leadership().borrow().leader, None);
    let leader = cluster.leader().await;
    assert_ne!(leader, 3);
    assert_eq!(cluster.node(leader).group().metrics().matched[&3], None);
}

#[tokio::test]
async fn a_node_that_lost_its_directory_is_told_to_take_a_new_id() {
    let mut cluster = Cluster::start(unchanged).await;
    let last = cluster.put("key", b"1").await.log_id.index;
    cluster.converged(last).await;

    cluster.kill(3).await;
    cluster.node_mut(3).directory.set_extension("new");
    cluster.restart(3).await;

    let mut failures = cluster.node(3).consensus().failures();
    let failed = timeout(LIMIT, failures.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(failed.unwrap().contains("needs a new node id"));
    cluster.put("key", b"2").await;
    assert_eq!(cluster.node(3).group().metrics().last_log, None);
}

#[tokio::test]
async fn a_dead_raft_core_is_reported_and_its_callers_are_answered() {
    let cluster = Cluster::start(unchanged).await;
    let leader = cluster.leader().await;
    let node = cluster.node(leader);

    node.group().crash_core().await;

    let mut failures = node.consensus().failures();
    let failure =
        timeout(LIMIT, failures.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(failure.unwrap().contains("shard 0"));
    assert!(node.group().metrics().failure.is_some());
    let proposal = node.group().propose(cluster.write("key", b"1"));
    assert!(timeout(LIMIT, proposal).await.unwrap().is_err());
    assert!(timeout(LIMIT, node.group().read_barrier()).await.unwrap().is_err());
}

#[tokio::test]
async fn leadership_is_handed_over_without_an_election_timeout() {
    let cluster = Cluster::start(unchanged).await;
    let last = cluster.put("key", b"1").await.log_id.index;
    cluster.converged(last).await;
    let old = cluster.leader().await;

    let kept = cluster.node(old).consensus().hand_over_leadership(Duration::from_secs(10)).await;

    assert_eq!(kept, 0);
    assert!(cluster.node(old).consensus().groups().iter().all(|group| !group.metrics().is_leader));
    cluster.put("key", b"2").await;
}

#[tokio::test]
async fn leadership_is_handed_over_to_none_but_those_named() {
    let cluster = Cluster::start(unchanged).await;
    let last = cluster.put("key", b"1").await.log_id.index;
    cluster.converged(last).await;
    let old = cluster.leader().await;
    let group = cluster.node(old).group();

    let nobody = BTreeSet::new();
    assert!(!group.hand_over_to(&nobody, Duration::from_millis(600)).await);
    assert_eq!(cluster.leader().await, old);
    let named = if old == 3 { 1 } else { 3 };
    let gone = group.hand_over_to(&BTreeSet::from([NodeId(named)]), Duration::from_secs(10)).await;

    assert!(gone);
    assert_eq!(cluster.leader().await, named);
}

#[tokio::test]
async fn a_withheld_replica_stands_for_no_election_until_it_is_let_again() {
    let mut cluster = Cluster::start(unchanged).await;
    let last = cluster.put("key", b"1").await.log_id.index;
    cluster.converged(last).await;
    let first = cluster.leader().await;
    let [held, other] = match first {
        1 => [2, 3],
        2 => [1, 3],
        _ => [1, 2],
    };
    cluster.node(held).group().withhold(true);
    cluster.kill(first).await;
    assert_eq!(cluster.leader().await, other);

    // Only replicas that are withheld are left: nobody leads, and they know it.
    cluster.restart(first).await;
    cluster.node(first).group().withhold(true);
    let last = cluster.put("key", b"2").await.log_id.index;
    cluster.converged(last).await;
    cluster.kill(other).await;
    let silence = Duration::from_secs(3);
    let is_silent =
        |node: &support::Node| (!node.group().heard_leader_within(silence)).then_some(());
    for id in [first, held] {
        cluster.node(id).until("it still hears a leader", is_silent).await;
        assert!(!cluster.node(id).group().metrics().is_leader);
    }

    cluster.node(held).group().withhold(false);
    assert_eq!(cluster.leader().await, held);
    assert!(cluster.node(held).group().heard_leader_within(Duration::ZERO));
}

#[tokio::test]
async fn a_stopped_node_answers_and_starts_again() {
    let mut cluster = Cluster::start(unchanged).await;
    cluster.put("key", b"1").await;
    let leader = cluster.leader().await;

    let consensus = cluster.node(leader).consensus().clone();
    timeout(LIMIT, consensus.shutdown()).await.unwrap();
    let refused = consensus.groups()[0].propose(cluster.write("key", b"2")).await;
    assert!(refused.is_err());
    assert_eq!(*consensus.failures().borrow(), None);
    drop(consensus);

    cluster.kill(leader).await;
    cluster.restart(leader).await;
    let last = cluster.put("key", b"3").await.log_id.index;
    cluster.converged(last).await;
}
