//! Waiting until other regions have applied what was written here.
//!
//! Only the shard's leader knows what they acknowledged. One that is replaced forgets it, and its
//! successor learns it anew; so whoever waits hears that the leader is another, and waits there.

use tokio::time::Instant;
use tombolo_core::{Actor, NamespaceId, RegionId, VersionVector};

use crate::{error::ShardError, peers::Coverage, shard::Shard};

impl Shard {
    /// Waits until `count` other regions have applied `needed` of this shard, and answers who has; at the
    /// deadline it may be fewer. With a `count` of 0 it only looks. Woken by acknowledgements.
    ///
    /// Cancellation safe: it only looks.
    ///
    /// # Errors
    /// [`ShardError::NotLeader`] if this node does not lead the shard, or loses it meanwhile.
    pub async fn wait_replicated(
        &self,
        namespace: NamespaceId,
        needed: &VersionVector,
        count: usize,
        deadline: Instant,
    ) -> Result<Coverage, ShardError> {
        let mut leadership = self.inner.group.leadership();
        let others = || self.others();
        let covered = self.inner.peers.wait_covered(namespace, needed, count, others, deadline);
        tokio::select! {
            biased;
            lost = leadership.wait_for(|seen| !seen.is_leader) => {
                let leader = lost.ok().and_then(|seen| seen.leader);
                Err(ShardError::NotLeader { shard: self.inner.id, leader })
            }
            coverage = covered => Ok(coverage),
        }
    }

    /// Waits until this node's replica stops, as it does when the node does: whoever waits for others here
    /// must not keep it.
    ///
    /// Cancellation safe: it only looks.
    pub async fn stopped(&self) {
        let mut leadership = self.inner.group.leadership();
        while leadership.changed().await.is_ok() {}
    }

    /// The other regions, each as what it writes now; `None` for one that is shut out.
    fn others(&self) -> Vec<(RegionId, Option<Actor>)> {
        let members = self.inner.store.members();
        let present =
            |region: RegionId| (!members.get(region).state.is_out()).then(|| members.actor(region));
        let others = self.inner.topology.others();
        others.into_iter().map(|region| (region.id, present(region.id))).collect()
    }
}
