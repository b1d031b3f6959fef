//! What other regions have applied of this shard.
//!
//! What it *acknowledged*, when it pulled from here, tells what may leave the change log, and whether
//! a write has arrived. What it *told*, when it was pulled from, tells which tombstones may go. What
//! follows from them is decided by [`tombolo_core::stability`].
//!
//! Kept by the shard's leader, in memory: a new leader learns it again when the peers' streams
//! reconnect, which they do at once. Until then a peer counts as having nothing, so nothing is
//! forgotten too early and nobody is told that a write has arrived where it may not have.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tombolo_core::{
    Actor, Dot, Members, NamespaceId, RegionId, VersionVector,
    members::{self, FenceTold},
    stability::{self, Told},
};

/// By region and incarnation: one that comes back has said nothing.
type Frontiers = BTreeMap<NamespaceId, BTreeMap<Actor, VersionVector>>;

/// What regions told of one namespace.
#[derive(Debug, Default)]
struct Words {
    told: BTreeMap<Actor, Told>,
    /// Of regions that are shut out.
    fences: FenceTold,
}

/// The frontiers that other regions acknowledged.
#[derive(Debug)]
pub struct PeerFrontiers {
    frontiers: watch::Sender<Frontiers>,
    told: Mutex<BTreeMap<NamespaceId, Words>>,
}

impl Default for PeerFrontiers {
    fn default() -> Self {
        Self { frontiers: watch::Sender::new(Frontiers::new()), told: Mutex::default() }
    }
}

impl PeerFrontiers {
    /// A region acknowledged `frontier`. Acknowledgements never go back.
    pub fn acknowledge(&self, namespace: NamespaceId, region: Actor, frontier: &VersionVector) {
        self.frontiers.send_if_modified(|frontiers| {
            let held = frontiers.entry(namespace).or_default().entry(region).or_default();
            let news = !held.covers_all(frontier);
            held.join(frontier);
            news
        });
    }

    /// A region told what it has applied, and which `members` it knew at that moment, while this one
    /// has applied `local`. The caller must know all of them.
    pub fn tell(
        &self,
        namespace: NamespaceId,
        region: Actor,
        frontier: VersionVector,
        members: &Members,
        local: &VersionVector,
    ) {
        let mut words = self.told.lock();
        let words = words.entry(namespace).or_default();
        words.fences.tell(region, &frontier, members);
        words.told.entry(region).or_default().tell(region.region, frontier, local);
    }

    /// Whose word counts before anything is forgotten; see [`members::counted`].
    pub fn counted(
        &self,
        namespace: NamespaceId,
        regions: impl IntoIterator<Item = RegionId>,
        members: &Members,
        local: &VersionVector,
    ) -> Vec<Actor> {
        let mut words = self.told.lock();
        members::counted(regions, members, local, &words.entry(namespace).or_default().fences)
    }

    /// What every event that can still come from `region` has seen; empty if it told nothing yet.
    pub fn settled(
        &self,
        namespace: NamespaceId,
        region: Actor,
        local: &VersionVector,
    ) -> VersionVector {
        let mut words = self.told.lock();
        let told = words.get_mut(&namespace).and_then(|words| words.told.get_mut(&region));
        told.map(|told| told.settled(region.region, local).clone()).unwrap_or_default()
    }

    /// Forgets everything, when leadership is lost.
    pub fn clear(&self) {
        self.told.lock().clear();
        self.frontiers.send_if_modified(|frontiers| {
            let had_any = !frontiers.is_empty();
            frontiers.clear();
            had_any
        });
    }

    /// What a region acknowledged; `None` if it has not spoken to this leader yet.
    pub fn of(&self, namespace: NamespaceId, region: Actor) -> Option<VersionVector> {
        self.frontiers.borrow().get(&namespace)?.get(&region).cloned()
    }

    /// The stable frontier: what all of `regions` and `local` have. Empty while one of them has
    /// not spoken to this leader.
    pub fn stable(
        &self,
        namespace: NamespaceId,
        local: &VersionVector,
        regions: impl IntoIterator<Item = Actor>,
    ) -> VersionVector {
        let frontiers = self.frontiers.borrow();
        let held = frontiers.get(&namespace);
        let of = |region| held.and_then(|held| held.get(&region));
        stability::stable(local, regions.into_iter().map(of))
    }

    /// Waits until `count` regions in their present lives, as `members` knows them, cover `dot`; answers
    /// whether they did before the deadline.
    ///
    /// Cancellation safe: it only looks.
    pub async fn wait_covered(
        &self,
        namespace: NamespaceId,
        dot: Dot,
        count: usize,
        members: &Members,
        deadline: Instant,
    ) -> bool {
        let mut frontiers = self.frontiers.subscribe();
        let covered = frontiers.wait_for(|frontiers| {
            let Some(held) = frontiers.get(&namespace) else { return count == 0 };
            let has = |(region, frontier): &(&Actor, &VersionVector)| {
                members.admit(**region) && frontier.covers(dot)
            };
            held.iter().filter(has).count() >= count
        });
        matches!(tokio::time::timeout_at(deadline, covered).await, Ok(Ok(_)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tombolo_core::{Member, MemberState};

    use super::*;

    const NS: NamespaceId = NamespaceId(1);
    const US: Actor = Actor { region: RegionId(1), incarnation: 1 };

    fn region(number: u16) -> Actor {
        Actor { region: RegionId(number), incarnation: 1 }
    }

    fn upto(seq: u64) -> VersionVector {
        [(US, seq)].into_iter().collect()
    }

    #[test]
    fn nothing_is_stable_until_every_region_has_spoken() {
        let peers = PeerFrontiers::default();
        let others = [region(2), region(3)];
        peers.acknowledge(NS, region(2), &upto(5));
        assert!(peers.stable(NS, &upto(9), others).is_empty());
        peers.acknowledge(NS, region(3), &upto(7));
        assert_eq!(peers.stable(NS, &upto(9), others), upto(5));
        assert_eq!(peers.stable(NS, &upto(4), others), upto(4));
    }

    #[test]
    fn acknowledgements_never_go_back() {
        let peers = PeerFrontiers::default();
        peers.acknowledge(NS, region(2), &upto(5));
        peers.acknowledge(NS, region(2), &upto(3));
        assert_eq!(peers.of(NS, region(2)), Some(upto(5)));
    }

    #[test]
    fn what_a_region_told_counts_when_its_own_events_in_it_are_here() {
        let eu = Actor { region: RegionId(2), incarnation: 1 };
        let peers = PeerFrontiers::default();
        let vector =
            |us, eu_seq| -> VersionVector { [(US, us), (eu, eu_seq)].into_iter().collect() };
        let settled = |local: &VersionVector| peers.settled(NS, eu, local);

        let tell = |told, local: &VersionVector| peers.tell(NS, eu, told, &Members::new(), local);
        tell(vector(5, 3), &vector(9, 2));
        assert!(settled(&vector(9, 2)).is_empty(), "eu's third event may not have seen us's fifth");
        // A later one does not push out what still waits.
        tell(vector(8, 7), &vector(9, 2));
        assert_eq!(settled(&vector(9, 3)), vector(5, 3));
        tell(vector(9, 8), &vector(9, 8));
        assert_eq!(settled(&vector(9, 8)), vector(9, 8));
        peers.clear();
        assert!(settled(&vector(9, 8)).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_when_enough_regions_cover_the_dot_or_at_the_deadline() {
        let peers = PeerFrontiers::default();
        let dot = Dot { actor: US, seq: 5 };
        let soon = Instant::now() + Duration::from_secs(1);
        peers.acknowledge(NS, region(2), &upto(5));
        let all = Members::new();
        assert!(peers.wait_covered(NS, dot, 1, &all, soon).await);
        assert!(!peers.wait_covered(NS, dot, 2, &all, soon).await);
        assert!(peers.wait_covered(NS, dot, 0, &all, soon).await);
        let fenced = Member { incarnation: 1, state: MemberState::Fenced };
        let without = [(RegionId(2), fenced)].into_iter().collect();
        assert!(!peers.wait_covered(NS, dot, 1, &without, soon).await);
    }
}
