//! Starts and stops pullers as leadership of shards comes and goes.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tombolo_core::RegionId;
use tombolo_shard::{Shard, Shards};

use crate::{
    channels::LinkChannels,
    config::{REPAIRS_MAX, ReplicationConfig},
    pace::Pace,
    puller::Puller,
    relay::Paths,
    repair::{Gate, comparer::Comparer},
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
    paces: BTreeMap<RegionId, Arc<Pace>>,
}

impl Links {
    /// The links of `shards`.
    pub fn new(shards: Shards, config: ReplicationConfig) -> Self {
        let statuses = Arc::new(LinkStatuses::default());
        let repairs = Arc::new(Semaphore::new(REPAIRS_MAX));
        let paces = shards.topology().peers().map(|peer| (peer.id, Arc::default())).collect();
        Self { shards, config, channels: LinkChannels::default(), statuses, repairs, paces }
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
        let catalog = self.shards.catalog().clone();
        let (channels, statuses) = (self.channels.clone(), Arc::clone(&self.statuses));
        let (config, repairs) = (self.config.clone(), Arc::clone(&self.repairs));
        let (paces, settings) = (self.paces.clone(), self.shards.catalog_shard().store().clone());
        async move {
            let mut leadership = shard.group().leadership();
            loop {
                leadership.borrow_and_update();
                let stop = shutdown.child_token();
                let pullers = TaskTracker::new();
                // Looked at once: what is gained a moment later shows as a change below.
                let was_leader = shard.is_leader();
                if was_leader {
                    let topology = Arc::new(shard.topology().clone());
                    let peers = topology.peers().map(|peer| peer.id);
                    let paths = Arc::new(Paths::new(peers, config.relay_after));
                    let gate = Gate::default();
                    for peer in topology.peers().filter(|peer| !peer.link_addresses.is_empty()) {
                        let puller = Puller {
                            shard: shard.clone(),
                            peer: peer.clone(),
                            catalog: catalog.clone(),
                            channels: channels.clone(),
                            statuses: Arc::clone(&statuses),
                            paths: Arc::clone(&paths),
                            settings: settings.clone(),
                            pace: paces.get(&peer.id).cloned().unwrap_or_default(),
                            gate: gate.clone(),
                            repairs: Arc::clone(&repairs),
                            config: config.clone(),
                        };
                        pullers.spawn(puller.run(stop.clone()));
                    }
                }
                pullers.close();
                while shard.is_leader() == was_leader {
                    // Safe to drop: it only looks.
                    tokio::select! {
                        () = shutdown.cancelled() => break,
                        changed = leadership.changed() => if changed.is_err() { break },
                    }
                }
                stop.cancel();
                pullers.wait().await;
                statuses.forget_shard(shard.id());
                shard.peers().clear();
                if shutdown.is_cancelled() || leadership.has_changed().is_err() {
                    return;
                }
            }
        }
    }
}
