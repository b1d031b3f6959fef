//! What every region has: how far a change log may be forgotten, and which tombstones may go.
//!
//! Two things are known of a region. What it *acknowledged*, when it pulled from here: that tells
//! what may leave the change log ([`stable`]). And what it *told*, when it was pulled from: that,
//! once all of its own events in it are applied here, is what everything that can still come from
//! there has seen ([`Told`]), which is when a tombstone may go ([`collectable`]).
//!
//! Invariants:
//! * A region of which nothing is known has nothing: forgetting what was heard is always safe.
//! * What counts of a region never goes back.
//!
//! Not here: who remembers it and for how long (`tombolo-shard`).

use crate::{id::RegionId, vector::VersionVector};

/// What a region told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// All of the region's own events in it are applied here.
    settled: VersionVector,
    /// Told since, and not settled yet. A later one replaces it only then: under a steady load the
    /// latest is never settled.
    waiting: Option<VersionVector>,
}

impl Told {
    /// `region` told what it has applied, while this one has applied `local`.
    pub fn tell(&mut self, region: RegionId, frontier: VersionVector, local: &VersionVector) {
        self.settle(region, local);
        self.waiting.get_or_insert(frontier);
        self.settle(region, local);
    }

    /// What every event that can still come from `region` has seen; empty if it told nothing yet.
    pub fn settled(&mut self, region: RegionId, local: &VersionVector) -> &VersionVector {
        self.settle(region, local);
        &self.settled
    }

    fn settle(&mut self, region: RegionId, local: &VersionVector) {
        let is_here = |told: &VersionVector| {
            let mut own = told.iter().filter(|(actor, _)| actor.region == region);
            own.all(|(actor, seq)| seq <= local.get(actor))
        };
        if let Some(told) = self.waiting.take_if(|told| is_here(told)) {
            self.settled.join(&told);
        }
    }
}

/// The stable frontier: what this region, which has applied `local`, and all others have
/// acknowledged. Empty if one of them (`None`) has not spoken.
pub fn stable<'a>(
    local: &VersionVector,
    acknowledged: impl IntoIterator<Item = Option<&'a VersionVector>>,
) -> VersionVector {
    let mut stable = local.clone();
    for frontier in acknowledged {
        match frontier {
            Some(frontier) => stable = stable.meet(frontier),
            None => return VersionVector::new(),
        }
    }
    stable
}

/// What a tombstone must be covered by to go, with everything that its record has seen: applied
/// here, and settled for every other region.
pub fn collectable(
    local: &VersionVector,
    settled: impl IntoIterator<Item = VersionVector>,
) -> VersionVector {
    settled.into_iter().fold(local.clone(), |stable, settled| stable.meet(&settled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Actor;

    const EU: RegionId = RegionId(2);

    fn vector(us: u64, eu: u64) -> VersionVector {
        let actor = |region| Actor { region: RegionId(region), incarnation: 1 };
        [(actor(1), us), (actor(2), eu)].into_iter().collect()
    }

    #[test]
    fn what_a_region_told_counts_once_its_own_events_in_it_are_here_and_never_goes_back() {
        let mut told = Told::default();
        told.tell(EU, vector(5, 3), &vector(9, 2));
        assert!(told.settled(EU, &vector(9, 2)).is_empty());
        told.tell(EU, vector(8, 7), &vector(9, 2));
        assert_eq!(*told.settled(EU, &vector(9, 3)), vector(5, 3), "a later one pushes out none");
        told.tell(EU, vector(4, 1), &vector(9, 3));
        assert_eq!(*told.settled(EU, &vector(9, 3)), vector(5, 3));
    }

    #[test]
    fn a_region_that_has_not_spoken_has_nothing() {
        let (local, other) = (vector(9, 4), vector(5, 7));
        assert_eq!(stable(&local, [Some(&other)]), vector(5, 4));
        assert!(stable(&local, [Some(&other), None]).is_empty());
        assert_eq!(collectable(&local, [other.clone()]), vector(5, 4));
        assert!(collectable(&local, [other, VersionVector::new()]).is_empty());
    }
}
