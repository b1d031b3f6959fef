//! How a region that joins, comes back or is recovered gets its data.
//!
//! Its shards take over what the others have, by repair: records in pages with a checksum, merged
//! through Raft, so that one that breaks off is begun again and what has come is not sent twice. Each
//! pass ends with a proof: at the source's cut both trees are equal. While a pass was long, another one
//! brings what was written meanwhile. Then the shard takes writes, and its links stream.
//!
//! Invariants:
//! * A region in its first life takes over from any one other: what the others may forget is counted
//!   from before it began, because they count whom their peers count.
//! * A region that lived before takes over from *every* other: each may have more of its former life
//!   than the next. What was taken over counts if the other had by then shut out whom this region knows
//!   as shut out: from such a one it might have got more.
//! * The catalog's shard comes first, since it names the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tombolo_core::{
    Actor, Member, MemberState, Members, NamespaceId, RegionId, namespace::Namespace,
};

use crate::{
    config::INGEST_TIMEOUT,
    puller::{PullError, Puller, broken},
    repair::receiver::{Found, Purpose},
    status::LinkPhase,
};

/// Between two looks at what is left to do.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A pass that took longer is followed by another one.
const LAST_PASS_MAX: Duration = Duration::from_secs(5);
/// Passes after which what is still missing is left to the stream.
const PASSES_MAX: u32 = 5;

/// From where a shard has taken over what: shared by its pullers while this node leads it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seeded(Arc<Mutex<BTreeMap<NamespaceId, BTreeMap<RegionId, Members>>>>);

impl Seeded {
    fn add(&self, namespace: NamespaceId, from: RegionId, members: Members) {
        self.0.lock().entry(namespace).or_default().insert(from, members);
    }

    /// Whether a namespace was taken over from all of `regions`, each after it had shut out whom this
    /// region has, or, if `any` will do, from one.
    fn is_done(
        &self,
        namespace: NamespaceId,
        regions: &BTreeSet<RegionId>,
        members: &Members,
        any: bool,
    ) -> bool {
        let seeded = self.0.lock();
        let from = seeded.get(&namespace);
        if any {
            return from.is_some_and(|from| !from.is_empty());
        }
        let out = members.out();
        let is_done = |region| {
            let knew = from.and_then(|from| from.get(region));
            knew.is_some_and(|knew| knew.know_all_of(&out))
        };
        regions.iter().all(is_done)
    }
}

impl Puller {
    /// Takes over what the peer has, until this shard needs nothing more from it.
    pub(crate) async fn seed(&self, address: &str, source: Actor) -> Result<(), PullError> {
        loop {
            let own = self.shard.own_member();
            if !own.state.is_joining() {
                return Err(broken("seeded: the link opens anew"));
            }
            if self.setting().paused {
                return Err(PullError::Paused);
            }
            let any = own.incarnation == 1;
            let this = BTreeSet::from([self.peer.id]);
            for namespace in self.namespaces().into_values() {
                let members = self.shard.store().members();
                if !self.seeded.is_done(namespace.id, &this, &members, any) {
                    self.seed_namespace(address, source, namespace, any).await?;
                }
            }
            self.end_seeding(own, any).await?;
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn seed_namespace(
        &self,
        address: &str,
        source: Actor,
        namespace: Arc<Namespace>,
        any: bool,
    ) -> Result<(), PullError> {
        let id = namespace.id;
        // Another peer's turn.
        let Some(_pass) = self.gate.enter(id) else { return Ok(()) };
        let turn = Arc::clone(&self.repairs).acquire_owned().await;
        let _turn = turn.map_err(|_| PullError::Stopped)?;
        self.statuses.update(self.key(id), |status| {
            status.phase = LinkPhase::Seeding;
            status.last_error = None;
            status.next_retry = None;
        });
        let mut knew = Members::new();
        for _ in 0..PASSES_MAX {
            let began = Instant::now();
            let repair = self.repair(address, source, Arc::clone(&namespace));
            let found = repair.run(Purpose::Seed).await;
            let progress = self.statuses.take_repair(self.key(id));
            let found = found.map_err(|error| self.after_repair(error))?;
            tracing::info!(
                shard = %self.shard.id(),
                peer = %self.peer.name,
                namespace = %namespace.name,
                ?found,
                records = progress.as_ref().map_or(0, |it| it.records),
                exchanged_bytes = progress.as_ref().map_or(0, |it| it.exchanged_bytes),
                seconds = began.elapsed().as_secs_f64(),
                "a pass of seeding is done"
            );
            let is_proved = matches!(found, Found::Equal(_) | Found::CaughtUp { proved: true, .. });
            if let Found::Equal(members) | Found::CaughtUp { members, .. } = found {
                knew = members;
            }
            let is_short = began.elapsed() < LAST_PASS_MAX;
            if (is_proved || !any) && is_short {
                break;
            }
        }
        self.statuses.update(self.key(id), |status| status.repairs_done += 1);
        self.seeded.add(id, self.peer.id, knew);
        Ok(())
    }

    /// Lets the shard take writes, if all that it needs has come.
    async fn end_seeding(&self, own: Member, any: bool) -> Result<(), PullError> {
        let topology = self.shard.topology();
        let members = self.shard.store().members();
        let this = BTreeSet::from([self.peer.id]);
        if self.shard.id() != topology.catalog_shard() {
            let of_catalog = self.shards.catalog_shard().own_member();
            let active = Member { state: MemberState::Active, ..own };
            if of_catalog != active {
                return Ok(());
            }
        }
        if !self.namespaces().keys().all(|id| self.seeded.is_done(*id, &this, &members, any)) {
            return Ok(());
        }
        // Who takes part is in the catalog, which has just come.
        self.shards.reload_catalog().map_err(|error| broken(&error.to_string()))?;
        let needed: BTreeSet<RegionId> = topology
            .peers()
            .into_iter()
            .map(|region| region.id)
            .filter(|&region| !members.get(region).state.is_out())
            .collect();
        let of_catalog = topology.regions();
        let said = of_catalog.iter().filter(|region| region.id != topology.region);
        let said: Members = said.filter_map(|region| Some((region.id, region.said?))).collect();
        if !members.know_all_of(&said) {
            // What was decided before it came.
            return Ok(());
        }
        let is_done = |id: &NamespaceId| self.seeded.is_done(*id, &needed, &members, any);
        if !self.namespaces().keys().all(is_done) {
            return Ok(());
        }
        let active = Member { state: MemberState::Active, ..own };
        let deadline = Instant::now() + INGEST_TIMEOUT;
        let set = self.shard.set_member(topology.region, active, deadline).await;
        set.map_err(|error| broken(&error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_is_enough_for_a_first_life_and_all_are_needed_for_a_later_one() {
        let seeded = Seeded::default();
        let (id, one, two) = (NamespaceId(1), RegionId(1), RegionId(2));
        let both = BTreeSet::from([one, two]);
        let all = Members::new();
        assert!(!seeded.is_done(id, &both, &all, true) && !seeded.is_done(id, &both, &all, false));
        seeded.add(id, two, Members::new());
        assert!(seeded.is_done(id, &both, &all, true) && !seeded.is_done(id, &both, &all, false));
        seeded.add(id, one, Members::new());
        assert!(seeded.is_done(id, &both, &all, false));
        assert!(!seeded.is_done(NamespaceId(2), &both, &all, true), "each namespace for itself");

        let fenced = Member { incarnation: 1, state: MemberState::Fenced };
        let without: Members = [(RegionId(3), fenced)].into_iter().collect();
        assert!(!seeded.is_done(id, &both, &without, false), "they still took from it then");
        both.iter().for_each(|&region| seeded.add(id, region, without.clone()));
        assert!(seeded.is_done(id, &both, &without, false));
    }
}
