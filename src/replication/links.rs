//! Starts and stops pullers as leadership of shards comes and goes.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tombolo_cluster::Region;
use tombolo_core::RegionId;
use tombolo_shard::{Shard, Shards};

use crate::{
    channels::LinkChannels,
    config::{REPAIRS_MAX, ReplicationConfig},
    pace::Pace,
    puller::Puller,
    relay::Paths,
    repair::{Gate, comparer::Comparer},
    seed::Seeded,
    status::LinkStatuses,
};

/// All links of a node.
pub struct Links {
    shards: Shards,
    config: ReplicationConfig,
    channels: LinkChannels,
    statuses: Arc<LinkStatuses>,
    /// Repairs that may still begin.
    repairs: Arc<Semaphore>,
    paces: Paces,
}

/// How fast to pull, by peer.
type Paces = Arc<Mutex<BTreeMap<RegionId, Arc<Pace>>>>;

impl Links {
    /// The links of `shards`.
    pub fn new(shards: Shards, config: ReplicationConfig) -> Self {
        let statuses = Arc::new(LinkStatuses::default());
        let repairs = Arc::new(Semaphore::new(REPAIRS_MAX));
        let (channels, paces) = (LinkChannels::default(), Paces::default());
        Self { shards, config, channels, statuses, repairs, paces }
    }

    /// What the links are doing.
    pub fn statuses(&self) -> Arc<LinkStatuses> {
        Arc::clone(&self.statuses)
    }

    /// Connections that other calls to the same regions may share.
    pub fn channels(&self) -> LinkChannels {
        self.channels.clone()
    }

    /// What lists differences between regions.
    pub fn comparer(&self) -> Comparer {
        Comparer {
            channels: self.channels(),
            statuses: self.statuses(),
            config: self.config.clone(),
        }
    }

    /// Pulls for every shard that this node leads, until `shutdown` fires.
    pub async fn run(self, shutdown: CancellationToken) {
        let tasks = TaskTracker::new();
        for shard in self.shards.iter() {
            tasks.spawn(self.follow(shard.clone(), shutdown.clone()));
        }
        tasks.close();
        tasks.wait().await;
    }

    /// Runs one shard's pullers whenever this node leads it.
    fn follow(
        &self,
        shard: Shard,
        shutdown: CancellationToken,
    ) -> impl Future<Output = ()> + Send + 'static {
        let shards = self.shards.clone();
        let (channels, statuses) = (self.channels.clone(), Arc::clone(&self.statuses));
        let (config, repairs) = (self.config.clone(), Arc::clone(&self.repairs));
        let paces = Arc::clone(&self.paces);
        async move {
            let mut leadership = shard.group().leadership();
            let mut regions = shard.topology().watch_regions();
            let mut members = shard.store().watch_members();
            loop {
                leadership.borrow_and_update();
                let listed = regions.borrow_and_update().clone();
                let known = members.borrow_and_update().clone();
                let stop = shutdown.child_token();
                let pullers = TaskTracker::new();
                // Looked at once: what is gained a moment later shows as a change below.
                let was_leader = shard.is_leader();
                if was_leader {
                    let others = shard.topology().others();
                    // What those that are out have written still comes, from others.
                    let origins = others.iter().map(|peer| peer.id);
                    let paths = Arc::new(Paths::new(origins, config.relay_after));
                    let (gate, seeded) = (Gate::default(), Seeded::default());
                    let is_pulled = |peer: &Region| {
                        !known.get(peer.id).state.is_out() && !peer.link_addresses.is_empty()
                    };
                    for peer in others.into_iter().filter(is_pulled) {
                        let pace = Arc::clone(paces.lock().entry(peer.id).or_default());
                        let puller = Puller {
                            shard: shard.clone(),
                            shards: shards.clone(),
                            peer,
                            seeded: seeded.clone(),
                            channels: channels.clone(),
                            statuses: Arc::clone(&statuses),
                            paths: Arc::clone(&paths),
                            pace,
                            gate: gate.clone(),
                            repairs: Arc::clone(&repairs),
                            config: config.clone(),
                        };
                        pullers.spawn(puller.run(stop.clone()));
                    }
                }
                pullers.close();
                let is_same =
                    || *shard.topology().regions() == *listed && shard.store().members() == known;
                while shard.is_leader() == was_leader && (!was_leader || is_same()) {
                    // Safe to drop: it only looks.
                    tokio::select! {
                        () = shutdown.cancelled() => break,
                        changed = leadership.changed() => if changed.is_err() { break },
                        changed = regions.changed() => if changed.is_err() { break },
                        changed = members.changed() => if changed.is_err() { break },
                    }
                }
                let lost = !shard.is_leader() || shutdown.is_cancelled();
                stop.cancel();
                pullers.wait().await;
                statuses.forget_shard(shard.id());
                if lost {
                    shard.peers().clear();
                }
                if shutdown.is_cancelled() || leadership.has_changed().is_err() {
                    return;
                }
            }
        }
    }
}
