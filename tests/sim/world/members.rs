//! What may be forgotten, and who is counted: collection, joining, restoring and fencing.
//!
//! The server collects as here (`collect` of `tombolo-shard`); it does not have membership yet. The
//! rules that it must follow are at [`World::join`], [`World::restore`] and [`World::fence`].

use bytes::Bytes;
use tombolo_core::{
    Command, Content, Dot, RegionId, VersionVector,
    command::{Collect, Expire, Trim},
    record::Sibling,
    stability,
};

use crate::{
    mutant::Mutant,
    region::{Data, NAMESPACE, Status, Waiter},
    repair::Answer,
    truth::Broken,
};

use super::World;

impl World {
    /// The regions that count: all that take part, and fenced ones while something of them may
    /// still be under way among the others.
    pub(super) fn counted(&self, at: usize) -> Vec<usize> {
        let counts = |other: &usize| match self.regions[*other].status {
            Status::Member | Status::Joining => true,
            Status::Absent => false,
            Status::Fenced => !self.is_uncounted(at, *other),
        };
        (0..self.regions.len()).filter(|&other| other != at).filter(counts).collect()
    }

    /// Whether this region has all that any other has of a fenced one, and none takes more.
    pub(super) fn is_uncounted(&self, at: usize, fenced: usize) -> bool {
        if self.is(Mutant::UncountAtOnce) {
            return true;
        }
        let local = self.regions[at].data.frontier();
        let told = self.regions[at].leader.fences.get(&self.regions[fenced].id);
        let others = self.regions.iter().enumerate();
        let mut others = others.filter(|(place, region)| *place != at && region.is_present());
        others.all(|(_, other)| {
            let of = told.and_then(|told| told.get(&other.id));
            of.is_some_and(|of| local.covers_all(of))
        })
    }

    pub(super) fn stable(&self, at: usize) -> VersionVector {
        let region = &self.regions[at];
        let acknowledged = &region.leader.acknowledged;
        let counted = self.counted(at).into_iter().map(|other| self.regions[other].id);
        stability::stable(&region.data.frontier(), counted.map(|id| acknowledged.get(&id)))
    }

    pub(super) fn trim(&mut self, at: usize, keep: Option<u8>) {
        let Some(region) = self.regions.get(at) else { return };
        if !region.is_present() {
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

    pub(super) fn collect(&mut self, at: usize) {
        let collects_early = self.is(Mutant::CollectBeforeRepair);
        let counted = match self.regions.get(at).map(|region| region.status) {
            Some(Status::Member) => self.counted(at),
            Some(Status::Joining) if collects_early => self.counted(at),
            Some(_) | None => return,
        };
        let ids: Vec<RegionId> = counted.into_iter().map(|other| self.regions[other].id).collect();
        let by_acknowledged = self.stable(at);
        let (at_once, acknowledged, silence) = (
            self.is(Mutant::CollectAtOnce),
            self.is(Mutant::CollectByAcknowledged),
            self.is(Mutant::SilenceCounts),
        );
        let region = &mut self.regions[at];
        let local = region.data.frontier();
        let told = &mut region.leader.told;
        let settled = ids.into_iter().filter_map(|id| match told.get_mut(&id) {
            Some(told) => Some(told.settled(id, &local).clone()),
            None if silence => None,
            None => Some(VersionVector::new()),
        });
        let stable = if at_once {
            local.clone()
        } else if acknowledged {
            by_acknowledged
        } else {
            stability::collectable(&local, settled)
        };
        let dead = region.data.memory.held(NAMESPACE).filter(|(_, record)| record.is_dead());
        let keys: Vec<Bytes> = dead
            .filter(|(_, record)| stable.covers_all(record.context()))
            .map(|(key, _)| key.clone())
            .collect();
        if !keys.is_empty() {
            let collect = Collect { namespace: NAMESPACE, stable, keys };
            self.propose(at, Command::Collect(collect), Waiter::Nobody);
        }
    }

    /// Values that this region wrote and that have expired become deletions.
    pub(super) fn expire(&mut self, at: usize) {
        let (rule, now) = (self.rule, self.now);
        let Some(region) = self.regions.get_mut(at) else { return };
        if !matches!(region.status, Status::Member | Status::Fenced) {
            return;
        }
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

    /// A region that did not exist, or was fenced, is admitted.
    ///
    /// It begins empty and under a new incarnation: what a fenced region wrote alone goes to its
    /// review queue, because the others may have dropped tombstones that it never saw. All others
    /// count it, as having nothing, before it repairs. It writes, tells what it has applied, and drops
    /// tombstones after it has repaired from each of them: before, it may lack writes of its former
    /// life that are still to come to others, or to itself. One region joins at a time.
    pub(super) fn join(&mut self, at: usize) -> Result<(), Broken> {
        let Some(region) = self.regions.get(at) else { return Ok(()) };
        if region.is_present() || self.is_joining() {
            return Ok(());
        }
        self.counts.joins += 1;
        let was_fenced = region.status == Status::Fenced;
        let keep = was_fenced && self.is(Mutant::KeepFencedWrites);
        self.lose_leader(at);
        let region = &mut self.regions[at];
        if was_fenced {
            region.incarnation += 1;
        }
        if !keep {
            let forgets_deletions = region.data.forgets_deletions;
            region.data = Data { forgets_deletions, ..Data::default() };
        }
        region.backup = None;
        self.admit(at);
        Ok(())
    }

    pub(super) fn is_joining(&self) -> bool {
        self.regions.iter().any(|region| region.status == Status::Joining)
    }

    /// Everyone begins to count a region anew: nothing of a former life counts.
    pub(super) fn admit(&mut self, at: usize) {
        let id = self.regions[at].id;
        let region = &mut self.regions[at];
        region.status = Status::Joining;
        region.repaired_from.clear();
        self.checked[at] = region.data.frontier();
        self.touched.insert(at);
        for other in &mut self.regions {
            other.leader.told.remove(&id);
            other.leader.acknowledged.remove(&id);
            other.leader.fences.remove(&id);
        }
        for (puller, source) in self.pairs() {
            if puller == at || source == at {
                self.break_stream(puller, source);
                if let Some(link) = self.links.get_mut(&(puller, source)) {
                    link.late.clear();
                }
            }
        }
    }

    /// A region that joins has repaired from every member: it may write.
    pub(super) fn end_join(&mut self, at: usize) {
        let region = &self.regions[at];
        let member = |other: &usize| self.regions[*other].status == Status::Member;
        let mut members = (0..self.regions.len()).filter(|&other| other != at).filter(member);
        let is_enough = |other: usize| {
            region.repaired_from.contains(&other)
                || (self.is(Mutant::WriteAfterOneRepair) && !region.repaired_from.is_empty())
        };
        if region.status == Status::Joining && members.all(is_enough) {
            self.regions[at].status = Status::Member;
            self.note(|| "           it may write from now on".to_owned());
        }
    }

    /// A region lost its data and gets an old copy, under a new incarnation.
    ///
    /// As one that joins, it repairs from every other region before it writes: one of them may have
    /// more of its former life than another, and they pull that from nobody but it.
    pub(super) fn restore(&mut self, at: usize) -> Result<(), Broken> {
        let Some(region) = self.regions.get(at) else { return Ok(()) };
        let Some(backup) = region.backup.clone() else { return Ok(()) };
        if region.status != Status::Member || self.is_joining() {
            return Ok(());
        }
        self.settle_logs()?;
        let kept: Vec<VersionVector> = std::iter::once(backup.frontier())
            .chain(self.frontiers_of_others(at).into_iter().map(|(_, frontier)| frontier))
            .collect();
        let before = self.regions[at].data.frontier();
        if self.is_half_merged(&before, &kept, Some(&backup)) {
            return Ok(());
        }
        self.counts.restores += 1;
        self.counts.lost += self.truth.unique(&before, &kept).len() as u64;
        if self.is(Mutant::ReuseIncarnation) {
            self.lose_leader(at);
            let id = self.regions[at].id;
            for other in &mut self.regions {
                other.leader.acknowledged.remove(&id);
            }
            self.links.values_mut().for_each(|link| link.late.clear());
            self.regions[at].data = backup;
            self.checked[at] = self.regions[at].data.frontier();
            return Ok(());
        }
        self.truth.lose(&before, &kept);
        self.lose_leader(at);
        self.regions[at].incarnation += 1;
        self.regions[at].data = backup;
        self.admit(at);
        Ok(())
    }

    /// The others go on without a region. What they have of it they exchange; what they do not have
    /// is lost to them. They go on counting it until nothing of it is under way among them.
    pub(super) fn fence(&mut self, at: usize) -> Result<(), Broken> {
        let members = self.regions.iter().filter(|region| region.status == Status::Member).count();
        let is_member = self.regions.get(at).is_some_and(|it| it.status == Status::Member);
        if !is_member || members < 3 || self.is_joining() {
            return Ok(());
        }
        self.settle_logs()?;
        let before = self.regions[at].data.frontier();
        let others: Vec<VersionVector> =
            self.frontiers_of_others(at).into_iter().map(|(_, frontier)| frontier).collect();
        if self.is_half_merged(&before, &others, None) {
            return Ok(());
        }
        self.counts.fences += 1;
        self.counts.lost += self.truth.unique(&before, &others).len() as u64;
        self.truth.lose(&before, &others);
        for other in (0..self.regions.len()).filter(|&other| other != at) {
            self.break_stream(at, other);
            self.break_stream(other, at);
        }
        self.regions[at].status = Status::Fenced;
        self.regions[at].backup = None;
        Ok(())
    }

    /// Commits what is proposed everywhere.
    pub(super) fn settle_logs(&mut self) -> Result<(), Broken> {
        for at in 0..self.regions.len() {
            while !self.regions[at].queue.is_empty() {
                self.commit(at)?;
            }
        }
        Ok(())
    }

    /// Whether records somewhere are ahead by writes that are lost: a repair from the region that
    /// lost them was half done. Not simulated; see `docs/simulation.md`.
    pub(super) fn is_half_merged(
        &self,
        before: &VersionVector,
        kept: &[VersionVector],
        backup: Option<&Data>,
    ) -> bool {
        let lost = self.truth.unique(before, kept);
        let has = |vector: &VersionVector| lost.iter().any(|dot| vector.covers(*dot));
        let leaders = || self.regions.iter().map(|region| &region.leader);
        let repairs =
            || leaders().flat_map(|it| it.streams.values()).filter_map(|it| it.repair.as_ref());
        let sources = || leaders().flat_map(|it| it.sources.values());
        let copies = self
            .regions
            .iter()
            .flat_map(|region| std::iter::once(&region.data).chain(region.backup.as_ref()));
        copies.chain(backup).any(|data| has(&data.ahead()))
            || repairs().any(|it| has(&it.cut) || has(&it.ahead))
            || sources().any(|it| has(&it.cut.ahead) || has(&it.cut.frontier))
            || self.links.values().flat_map(|link| &link.answers).any(
                |answer| matches!(answer, Answer::Cut(cut, ahead, _) if has(cut) || has(ahead)),
            )
    }
}
