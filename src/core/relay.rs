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
//! A moment is a duration since any fixed one, and never goes back; the caller says what it is now.
//!
//! Not here: who opens streams and when (`tombolo-replication`).

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    id::{NamespaceId, RegionId},
    vector::VersionVector,
};

/// The paths of one shard to all other regions, and who relays what.
#[derive(Clone, Debug)]
pub struct Relays {
    relay_after: Duration,
    paths: BTreeMap<RegionId, Path>,
    /// Who relays an origin now.
    relays: BTreeMap<RegionId, Relay>,
}

#[derive(Clone, Debug)]
struct Relay {
    peer: RegionId,
    /// Since when another has had more of the origin.
    behind_since: Option<Duration>,
}

#[derive(Clone, Debug)]
struct Path {
    /// Since when no stream is open; `None` while one is.
    down_since: Option<Duration>,
    /// What the region said it has applied.
    told: BTreeMap<NamespaceId, VersionVector>,
}

impl Relays {
    /// Paths to `peers`, all down since `now`. An origin is relayed after `relay_after` without one.
    pub fn new(
        peers: impl IntoIterator<Item = RegionId>,
        relay_after: Duration,
        now: Duration,
    ) -> Self {
        let down = || Path { down_since: Some(now), told: BTreeMap::new() };
        let paths = peers.into_iter().map(|peer| (peer, down())).collect();
        Self { relay_after, paths, relays: BTreeMap::new() }
    }

    /// A stream from `peer` was opened.
    pub fn up(&mut self, peer: RegionId) {
        if let Some(path) = self.paths.get_mut(&peer) {
            path.down_since = None;
        }
    }

    /// The stream from `peer` ended.
    pub fn down(&mut self, peer: RegionId, now: Duration) {
        if let Some(path) = self.paths.get_mut(&peer) {
            path.down_since.get_or_insert(now);
        }
    }

    /// `peer` said what it has applied.
    pub fn tell(&mut self, peer: RegionId, namespace: NamespaceId, frontier: VersionVector) {
        if let Some(path) = self.paths.get_mut(&peer) {
            path.told.insert(namespace, frontier);
        }
    }

    /// The regions whose changes `peer` should send besides its own.
    pub fn relayed_by(&mut self, peer: RegionId, now: Duration) -> BTreeSet<RegionId> {
        let Self { relay_after, paths, relays } = self;
        let is_long = |since: Duration| now.saturating_sub(since) >= *relay_after;
        for (&origin, path) in &*paths {
            if !path.down_since.is_some_and(is_long) {
                relays.remove(&origin);
                continue;
            }
            let up = || paths.iter().filter(|(_, other)| other.down_since.is_none());
            let best = up()
                .map(|(&other, path)| (path.has_of(origin), Reverse(other)))
                .max()
                .map(|(events, Reverse(other))| (events, other));
            let Some((events, best)) = best else {
                relays.remove(&origin);
                continue;
            };
            let present = relays.entry(origin).or_insert(Relay { peer: best, behind_since: None });
            let is_up = up().any(|(&other, _)| other == present.peer);
            let has = paths.get(&present.peer).map_or(0, |path| path.has_of(origin));
            // Regions tell at different moments, so a moment's lead says nothing.
            let since = if has < events {
                *present.behind_since.get_or_insert(now)
            } else {
                present.behind_since = None;
                now
            };
            if !is_up || is_long(since) {
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
