//! What may be forgotten, and who is counted for it: trimming, collection and expiry, as `collect` of
//! `tombolo-shard` does them.

use bytes::Bytes;
use tombolo_core::{
    Actor, Command, Content, Dot, RegionId, VersionVector,
    command::{Collect, Expire, Trim},
    members,
    record::Sibling,
    stability,
};

use crate::{
    mutant::Mutant,
    region::{NAMESPACE, Waiter},
};

use super::World;

impl World {
    /// The other regions of which this one knows.
    pub(super) fn known(&self, at: usize) -> Vec<RegionId> {
        let Some(region) = self.regions.get(at) else { return Vec::new() };
        let others = self.regions.iter().filter(|other| other.id != region.id);
        others.filter(|other| region.knows(other)).map(|other| other.id).collect()
    }

    /// Whose word counts.
    pub(super) fn counted(&self, at: usize) -> Vec<Actor> {
        let Some(region) = self.regions.get(at) else { return Vec::new() };
        let (members, local) = (region.members(), region.data.frontier());
        let mut counted = members::counted(self.known(at), members, &local, &region.leader.fences);
        if self.is(Mutant::UncountAtOnce) {
            counted.retain(|actor| !members.get(actor.region).state.is_out());
        }
        counted
    }

    pub(super) fn stable(&self, at: usize) -> VersionVector {
        let region = &self.regions[at];
        let acknowledged = &region.leader.acknowledged;
        let counted = self.counted(at).into_iter();
        let counted: Vec<_> = counted.map(|actor| acknowledged.get(&actor)).collect();
        stability::stable(&region.data.frontier(), counted)
    }

    pub(super) fn trim(&mut self, at: usize, keep: Option<u8>) {
        let Some(region) = self.regions.get(at) else { return };
        if !region.exists {
            return;
        }
        let mut upto = self.stable(at);
        if let Some(keep) = keep {
            let frontier = region.data.frontier();
            for (actor, _) in frontier.iter() {
                let log = region.data.log(actor, region.data.trimmed().get(actor) + 1);
                let kept = log.iter().rev().take(usize::from(keep)).next_back();
                let seq = kept.map_or(frontier.get(actor), |change| change.first_seq - 1);
                self.counts.trimmed += seq.saturating_sub(upto.get(actor));
                upto.advance(actor, seq);
            }
        }
        self.propose(at, Command::Trim(Trim { namespace: NAMESPACE, upto }), Waiter::Nobody);
    }

    /// What a tombstone must be covered by to go.
    fn collectable(&mut self, at: usize) -> VersionVector {
        let silence = self.is(Mutant::SilenceCounts);
        let counted = self.counted(at);
        let by_acknowledged = self.stable(at);
        let mutant = self.mutant;
        let region = &mut self.regions[at];
        let local = region.data.frontier();
        let told = &mut region.leader.told;
        let settled = counted.into_iter().filter_map(|actor| match told.get_mut(&actor) {
            Some(told) => Some(told.settled(actor.region, &local).clone()),
            None if silence => None,
            None => Some(VersionVector::new()),
        });
        match mutant {
            Some(Mutant::CollectAtOnce) => local,
            Some(Mutant::CollectByAcknowledged) => by_acknowledged,
            _ => stability::collectable(&local, settled),
        }
    }

    pub(super) fn collect(&mut self, at: usize) {
        let early = self.is(Mutant::CollectBeforeRepair);
        let may = self.regions.get(at).is_some_and(|it| it.is_active() || (early && it.exists));
        if !may {
            return;
        }
        let stable = self.collectable(at);
        let region = &self.regions[at];
        let dead = region.data.memory.held(NAMESPACE).filter(|(_, record)| record.is_dead());
        let keys: Vec<Bytes> = dead
            .filter(|(_, record)| stable.covers_all(record.context()))
            .map(|(key, _)| key.clone())
            .collect();
        if !keys.is_empty() {
            let members = region.members().clone();
            let collect = Collect { namespace: NAMESPACE, stable, members, keys };
            self.propose(at, Command::Collect(collect), Waiter::Nobody);
        }
    }

    /// Values that this region wrote and that have expired become deletions.
    pub(super) fn expire(&mut self, at: usize) {
        let (rule, now) = (self.rule, self.now);
        let Some(region) = self.regions.get_mut(at).filter(|it| it.is_active()) else { return };
        let time = region.stamp(now);
        let is_over = |held: &Sibling| {
            let is_own = held.dot.actor.region == region.id;
            is_own && held.content != Content::Tombstone && held.content.live_at(time).is_none()
        };
        let values: Vec<(Bytes, Dot)> = region
            .data
            .memory
            .held(NAMESPACE)
            .flat_map(|(key, record)| record.siblings().iter().map(move |held| (key, held)))
            .filter(|(_, held)| is_over(held))
            .map(|(key, held)| (key.clone(), held.dot))
            .collect();
        if !values.is_empty() {
            let actor = region.actor();
            let expire = Expire { namespace: NAMESPACE, rule, actor, time, values };
            self.propose(at, Command::Expire(expire), Waiter::Client);
        }
    }
}
