//! What other regions have applied of this shard.
//!
//! What it *acknowledged*, when it pulled from here, tells what may leave the change log, and whether
//! a write has arrived. What it *told*, when it was pulled from, tells which tombstones may go. What
//! follows from them is decided by [`tombolo_core::stability`].
//!
//! Kept by the shard's leader, in memory: a new leader learns it again when the peers' streams
//! reconnect, which they do at once. Until then a peer counts as having nothing, so nothing is
//! forgotten too early and nobody is told that a write has arrived where it may not have.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tombolo_core::{
    Actor, Members, NamespaceId, RegionId, VersionVector,
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

/// Which other regions have applied what was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// They have all of it.
    pub has: BTreeSet<RegionId>,
    /// They lack so many events of it; `None` if a region is shut out, or has not spoken to this leader.
    pub lacks: BTreeMap<RegionId, Option<u64>>,
}

impl Coverage {
    /// Of these regions, each as what it writes now (`None`: it is shut out).
    fn of(
        held: Option<&BTreeMap<Actor, VersionVector>>,
        needed: &VersionVector,
        regions: impl IntoIterator<Item = (RegionId, Option<Actor>)>,
    ) -> Self {
        let mut coverage = Self::default();
        for (region, actor) in regions {
            let frontier = actor.and_then(|actor| held?.get(&actor));
            match frontier.map(|frontier| needed.events_beyond(frontier)) {
                Some(0) => {
                    coverage.has.insert(region);
                }
                lacks => {
                    coverage.lacks.insert(region, lacks);
                }
            }
        }
        coverage
    }
}

impl Coverage {
    /// What holds of two things that were asked for together: a region has both, or lacks what it
    /// lacks of either.
    pub fn and(&self, other: &Self) -> Self {
        let mut both = Self { has: &self.has & &other.has, lacks: self.lacks.clone() };
        for (&region, &lacks) in &other.lacks {
            let here = both.lacks.get(&region).copied().unwrap_or(Some(0));
            both.lacks.insert(region, here.zip(lacks).map(|(here, there)| here + there));
        }
        both
    }
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

    /// Waits until `count` of `regions` have applied `needed`, and answers who has; at the deadline it
    /// may be fewer. `regions` is asked with every look, and names each as what it writes now (`None`: it
    /// is shut out).
    ///
    /// Cancellation safe: it only looks.
    pub async fn wait_covered<R>(
        &self,
        namespace: NamespaceId,
        needed: &VersionVector,
        count: usize,
        regions: impl Fn() -> R,
        deadline: Instant,
    ) -> Coverage
    where
        R: IntoIterator<Item = (RegionId, Option<Actor>)>,
    {
        let mut frontiers = self.frontiers.subscribe();
        loop {
            let coverage = {
                let frontiers = frontiers.borrow_and_update();
                Coverage::of(frontiers.get(&namespace), needed, regions())
            };
            if count <= coverage.has.len() {
                return coverage;
            }
            let changed = tokio::time::timeout_at(deadline, frontiers.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return coverage;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
    async fn waiting_ends_when_enough_regions_have_it_or_at_the_deadline() {
        let peers = PeerFrontiers::default();
        let soon = Instant::now() + Duration::from_secs(1);
        let all = || [2, 3, 4].map(|number| (RegionId(number), Some(region(number))));
        let needed = upto(5);
        let wait = |count| peers.wait_covered(NS, &needed, count, all, soon);
        let nobody = wait(0).await;
        assert_eq!((nobody.has.len(), nobody.lacks.len()), (0, 3));

        let (one, ()) = tokio::join!(wait(1), async {
            peers.acknowledge(NS, region(3), &upto(3));
            tokio::task::yield_now().await;
            peers.acknowledge(NS, region(2), &upto(5));
        });
        assert!(Instant::now() < soon, "woken, not timed out");
        assert_eq!(one.has, [RegionId(2)].into());
        assert_eq!(one.lacks, [(RegionId(3), Some(2)), (RegionId(4), None)].into());

        assert_eq!(wait(2).await, one);
        assert!(Instant::now() >= soon, "it waited for a second one");
    }

    #[test]
    fn a_region_has_two_things_if_it_has_each() {
        let coverage = |has: &[u16], lacks: &[(u16, Option<u64>)]| Coverage {
            has: has.iter().copied().map(RegionId).collect(),
            lacks: lacks.iter().map(|&(region, lacks)| (RegionId(region), lacks)).collect(),
        };
        let one = coverage(&[2, 3], &[(4, Some(5)), (5, None)]);
        let other = coverage(&[2, 5], &[(3, Some(1)), (4, Some(2))]);
        let both = coverage(&[2], &[(3, Some(1)), (4, Some(7)), (5, None)]);
        assert_eq!((one.and(&other), other.and(&one)), (both.clone(), both));
    }

    #[tokio::test]
    async fn a_region_that_is_shut_out_or_began_anew_has_nothing() {
        let peers = PeerFrontiers::default();
        peers.acknowledge(NS, region(2), &upto(5));
        let anew = Actor { incarnation: 2, ..region(2) };
        for actor in [None, Some(anew)] {
            let regions = || [(RegionId(2), actor)];
            let coverage = peers.wait_covered(NS, &upto(5), 0, regions, Instant::now()).await;
            assert_eq!(coverage.lacks, [(RegionId(2), None)].into());
        }
    }
}
