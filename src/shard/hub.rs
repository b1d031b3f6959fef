//! What wakes a node's watchers.
//!
//! A watcher follows all shards of one namespace. Were it to listen to each shard itself, every write
//! to any namespace would wake all of a node's watchers; so one task a shard looks what moved, and
//! wakes those whom it concerns. A watcher costs one receiver while nothing happens.
//!
//! Not here: what a watcher does when it is awake (`tombolo-service`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use tombolo_core::{NamespaceId, ShardId, VersionVector};

use crate::{shard::Shard, shards::Shards};

/// How long a shard may be without a leader before its watchers are sent to other nodes: longer than
/// an election, so that they do not wander for nothing.
const LEADERLESS_MAX: Duration = Duration::from_secs(10);
/// How often that is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A leader that has heard of no majority for this long may be alone.
const QUORUM_AGE_MAX: Duration = Duration::from_secs(3);

/// Wakes watchers. One a node; share it in an [`Arc`].
#[derive(Debug, Default)]
pub struct WatchHub {
    /// By namespace, a count that rises when its watchers should look.
    topics: Mutex<BTreeMap<NamespaceId, watch::Sender<u64>>>,
    /// Shards that have had no leader, as far as this node knows, for long.
    leaderless: Mutex<BTreeSet<ShardId>>,
}

impl WatchHub {
    /// A hub without watchers.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A count that rises whenever something of a namespace moved, or what this node knows of regions
    /// and namespaces changed. After the data is visible.
    pub fn subscribe(&self, namespace: NamespaceId) -> watch::Receiver<u64> {
        let mut topics = self.topics.lock();
        topics.entry(namespace).or_insert_with(|| watch::Sender::new(0)).subscribe()
    }

    /// A shard of which this node has known no leader for long: what is new of it does not come here.
    pub fn leaderless(&self) -> Option<ShardId> {
        self.leaderless.lock().first().copied()
    }

    /// Wakes watchers until `shutdown` fires.
    pub async fn run(self: Arc<Self>, shards: Shards, shutdown: CancellationToken) {
        let mut tasks = JoinSet::new();
        for shard in shards.iter() {
            let follower = Follower { hub: Arc::clone(&self), shard: shard.clone() };
            tasks.spawn(follower.run(shutdown.clone()));
        }
        let mut catalog = shards.catalog().subscribe();
        while let Some(Ok(())) = shutdown.run_until_cancelled(catalog.changed()).await {
            self.wake_all();
        }
        // They hear the same signal.
        tasks.join_all().await;
    }

    fn wake_all(&self) {
        self.topics.lock().values().for_each(wake);
    }

    /// Wakes the watchers of what moved in a shard since `told`.
    fn wake_moved(&self, shard: &Shard, told: &mut BTreeMap<NamespaceId, VersionVector>) {
        let mut topics = self.topics.lock();
        topics.retain(|_, topic| topic.receiver_count() > 0);
        told.retain(|namespace, _| topics.contains_key(namespace));
        for (&namespace, topic) in topics.iter() {
            let is_told = told.get(&namespace);
            if is_told.is_none_or(|told| !shard.store().is_at(namespace, told)) {
                told.insert(namespace, shard.frontier(namespace));
                wake(topic);
            }
        }
    }
}

fn wake(topic: &watch::Sender<u64>) {
    topic.send_modify(|count| *count = count.wrapping_add(1));
}

/// Looks after one shard.
struct Follower {
    hub: Arc<WatchHub>,
    shard: Shard,
}

impl Follower {
    async fn run(self, shutdown: CancellationToken) {
        let mut moved = self.shard.store().watch_frontiers();
        let mut members = self.shard.store().watch_members();
        let mut told = BTreeMap::new();
        let mut alone_since: Option<Instant> = None;
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            moved.borrow_and_update();
            self.hub.wake_moved(&self.shard, &mut told);
            // Safe to drop: all of these only wait.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = looks.tick() => {
                    alone_since = self.is_alone().then(|| alone_since.unwrap_or_else(Instant::now));
                    let is_long = alone_since.is_some_and(|it| it.elapsed() >= LEADERLESS_MAX);
                    self.set_leaderless(is_long);
                }
                changed = moved.changed() => if changed.is_err() { return },
                changed = members.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.hub.wake_all();
                }
            }
        }
    }

    /// Whether this node knows no leader, or leads without a majority.
    fn is_alone(&self) -> bool {
        match self.shard.leader() {
            None => true,
            Some(_) => self.shard.is_leader() && !self.shard.group().has_quorum(QUORUM_AGE_MAX),
        }
    }

    fn set_leaderless(&self, is_leaderless: bool) {
        let id = self.shard.id();
        let changed = {
            let mut leaderless = self.hub.leaderless.lock();
            if is_leaderless { leaderless.insert(id) } else { leaderless.remove(&id) }
        };
        if changed {
            self.hub.wake_all();
        }
    }
}
