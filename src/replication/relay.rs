//! Which region passes on another's changes while the direct path to that region is cut.
//!
//! The pullers of one shard share [`Paths`] and say what they see; [`tombolo_core::relay`] decides.

use std::{collections::BTreeSet, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tombolo_core::{NamespaceId, RegionId, VersionVector, relay::Relays};

/// The paths of one shard to all other regions.
#[derive(Debug)]
pub(crate) struct Paths {
    /// What moments are counted from.
    since: Instant,
    state: Mutex<Relays>,
}

impl Paths {
    /// Paths to `peers`, all down since now. An origin is relayed after `relay_after` without one.
    pub(crate) fn new(peers: impl IntoIterator<Item = RegionId>, relay_after: Duration) -> Self {
        let state = Mutex::new(Relays::new(peers, relay_after, Duration::ZERO));
        Self { since: Instant::now(), state }
    }

    /// A stream from `peer` was opened.
    pub(crate) fn up(&self, peer: RegionId) {
        self.state.lock().up(peer);
    }

    /// The stream from `peer` ended.
    pub(crate) fn down(&self, peer: RegionId) {
        self.state.lock().down(peer, self.since.elapsed());
    }

    /// `peer` said what it has applied.
    pub(crate) fn tell(&self, peer: RegionId, namespace: NamespaceId, frontier: VersionVector) {
        self.state.lock().tell(peer, namespace, frontier);
    }

    /// The regions whose changes `peer` should send besides its own.
    pub(crate) fn relayed_by(&self, peer: RegionId) -> BTreeSet<RegionId> {
        self.state.lock().relayed_by(peer, self.since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use tombolo_core::Actor;

    use super::*;

    const A: RegionId = RegionId(1);
    const B: RegionId = RegionId(2);
    const D: RegionId = RegionId(4);
    const AFTER: Duration = Duration::from_secs(3);

    fn has(paths: &Paths, peer: RegionId, events_of_a: u64) {
        let actor = Actor { region: A, incarnation: 1 };
        paths.tell(peer, NamespaceId(1), [(actor, events_of_a)].into_iter().collect());
    }

    fn paths() -> Paths {
        let paths = Paths::new([A, B, D], AFTER);
        [A, B, D].into_iter().for_each(|peer| paths.up(peer));
        paths
    }

    fn relay_of_a(paths: &Paths) -> Vec<RegionId> {
        [B, D].into_iter().filter(|&peer| paths.relayed_by(peer).contains(&A)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_relays_while_the_path_is_up_or_only_just_down() {
        let paths = paths();
        tokio::time::advance(AFTER * 9).await;
        assert!(relay_of_a(&paths).is_empty());
        paths.down(A);
        tokio::time::advance(AFTER / 2).await;
        assert!(relay_of_a(&paths).is_empty());
        tokio::time::advance(AFTER).await;
        assert_eq!(relay_of_a(&paths), [B]);
        paths.up(A);
        assert!(relay_of_a(&paths).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_that_has_most_relays_and_stays_while_it_is_not_behind() {
        let paths = paths();
        paths.down(A);
        tokio::time::advance(AFTER).await;
        has(&paths, B, 5);
        has(&paths, D, 7);
        assert_eq!(relay_of_a(&paths), [D]);
        has(&paths, B, 7);
        assert_eq!(relay_of_a(&paths), [D], "an equal does not take over");
        has(&paths, B, 8);
        assert_eq!(relay_of_a(&paths), [D], "nor does one that told a moment earlier");
        tokio::time::advance(AFTER / 2).await;
        has(&paths, D, 8);
        assert_eq!(relay_of_a(&paths), [D]);
        has(&paths, B, 9);
        assert_eq!(relay_of_a(&paths), [D]);
        tokio::time::advance(AFTER).await;
        assert_eq!(relay_of_a(&paths), [B], "D has not moved for long");
        paths.down(B);
        assert_eq!(relay_of_a(&paths), [D]);
        paths.down(D);
        assert!(relay_of_a(&paths).is_empty());
    }
}
