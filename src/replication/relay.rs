//! Which region passes on another's changes while the direct path to that region is cut.
//!
//! Any region can serve any region's changes: they are in its change log like its own. So when
//! the path A–C is cut while A–B and B–C work, C takes A's changes from B, and every connected
//! graph of regions converges.
//!
//! Invariants:
//! * Without a cut nobody relays: a change crosses each link once.
//! * One peer relays an origin at a time: the one that has most of it. It stays until it is down, or
//!   another has been ahead of it for a while, so that relays do not flap.
//!
//! Pure but for the lock: the pullers of one shard share it and say what they see.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tombolo_core::{NamespaceId, RegionId, VersionVector};

/// The paths of one shard to all other regions.
#[derive(Debug)]
pub(crate) struct Paths {
    relay_after: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    paths: BTreeMap<RegionId, Path>,
    /// Who relays an origin now.
    relays: BTreeMap<RegionId, Relay>,
}

#[derive(Debug)]
struct Relay {
    peer: RegionId,
    /// Since when another has had more of the origin.
    behind_since: Option<Instant>,
}

#[derive(Debug)]
struct Path {
    /// Since when no stream is open; `None` while one is.
    down_since: Option<Instant>,
    /// What the region said it has applied.
    told: BTreeMap<NamespaceId, VersionVector>,
}

impl Paths {
    /// Paths to `peers`, all down since now. An origin is relayed after `relay_after` without one.
    pub(crate) fn new(peers: impl IntoIterator<Item = RegionId>, relay_after: Duration) -> Self {
        let down = || Path { down_since: Some(Instant::now()), told: BTreeMap::new() };
        let paths = peers.into_iter().map(|peer| (peer, down())).collect();
        Self { relay_after, state: Mutex::new(State { paths, relays: BTreeMap::new() }) }
    }

    /// A stream from `peer` was opened.
    pub(crate) fn up(&self, peer: RegionId) {
        if let Some(path) = self.state.lock().paths.get_mut(&peer) {
            path.down_since = None;
        }
    }

    /// The stream from `peer` ended.
    pub(crate) fn down(&self, peer: RegionId) {
        if let Some(path) = self.state.lock().paths.get_mut(&peer) {
            path.down_since.get_or_insert_with(Instant::now);
        }
    }

    /// `peer` said what it has applied.
    pub(crate) fn tell(&self, peer: RegionId, namespace: NamespaceId, frontier: VersionVector) {
        if let Some(path) = self.state.lock().paths.get_mut(&peer) {
            path.told.insert(namespace, frontier);
        }
    }

    /// The regions whose changes `peer` should send besides its own.
    pub(crate) fn relayed_by(&self, peer: RegionId) -> BTreeSet<RegionId> {
        let mut state = self.state.lock();
        let State { paths, relays } = &mut *state;
        let is_cut =
            |path: &Path| path.down_since.is_some_and(|since| since.elapsed() >= self.relay_after);
        for (&origin, path) in &*paths {
            if !is_cut(path) {
                relays.remove(&origin);
                continue;
            }
            let up = || paths.iter().filter(|(_, other)| other.down_since.is_none());
            let best = up()
                .map(|(&other, path)| (path.has_of(origin), std::cmp::Reverse(other)))
                .max()
                .map(|(events, std::cmp::Reverse(other))| (events, other));
            let Some((events, best)) = best else {
                relays.remove(&origin);
                continue;
            };
            let present = relays.entry(origin).or_insert(Relay { peer: best, behind_since: None });
            let is_up = up().any(|(&other, _)| other == present.peer);
            let has = paths.get(&present.peer).map_or(0, |path| path.has_of(origin));
            // Regions tell at different moments, so a moment's lead says nothing.
            let since = if has < events {
                *present.behind_since.get_or_insert_with(Instant::now)
            } else {
                present.behind_since = None;
                Instant::now()
            };
            if !is_up || since.elapsed() >= self.relay_after {
                *present = Relay { peer: best, behind_since: None };
            }
        }
        relays.iter().filter(|(_, relay)| relay.peer == peer).map(|(&origin, _)| origin).collect()
    }
}

impl Path {
    /// How many events of `origin` the region has.
    fn has_of(&self, origin: RegionId) -> u64 {
        let entries = self.told.values().flat_map(VersionVector::iter);
        entries.filter(|(actor, _)| actor.region == origin).map(|(_, seq)| seq).sum()
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
