//! Which writes exist only in this region.

use tombolo_core::{Change, NamespaceId, RegionId};

use crate::{error::ShardError, shard::Shard};

/// The writes of one namespace in one shard that no other region has acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AtRisk {
    /// How many writes.
    pub count: u64,
    /// The oldest changes that hold them, as far as the change log still has them; the first one
    /// may begin with writes that are safe.
    pub changes: Vec<Change>,
    /// Up to here this region's own writes are elsewhere, too.
    pub safe_seq: u64,
    /// Regions that this leader has not heard of since it began to lead.
    pub unheard: Vec<RegionId>,
}

/// Bytes of changes that one call reads at most.
const READ_BYTES_MAX: usize = 1 << 20;

impl Shard {
    /// The writes that would be lost if this region were lost now. Only meaningful on the leader.
    /// Reads up to a megabyte of the change log from disk: call it where waiting is allowed.
    ///
    /// # Errors
    /// If the change log cannot be read.
    pub fn at_risk(&self, namespace: NamespaceId) -> Result<AtRisk, ShardError> {
        let actor = self.actor();
        let (mut safe_seq, mut unheard) = (0, Vec::new());
        for peer in self.topology().peers() {
            match self.peers().of(namespace, self.actor_of(peer.id)) {
                Some(acknowledged) => safe_seq = safe_seq.max(acknowledged.get(actor)),
                None => unheard.push(peer.id),
            }
        }
        let count = self.frontier(namespace).get(actor).saturating_sub(safe_seq);
        let mut changes = Vec::new();
        if count > 0 {
            let store = self.store();
            let from = safe_seq.max(store.trimmed(namespace).get(actor)) + 1;
            let stored = store.changes(namespace, actor, from, READ_BYTES_MAX)?;
            changes.extend(stored.into_iter().map(|stored| stored.decoded));
        }
        Ok(AtRisk { count, changes, safe_seq, unheard })
    }
}
