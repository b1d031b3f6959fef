//! Regions that are added, fenced, come back and are restored: what an operator decides, how each
//! region hears of it, and what it does then.
//!
//! An operator's act is a record. Every region hears of each, at its own moment, in the order in which
//! they were made, and proposes it to its own log; what its log has applied is what it knows. A region
//! that was fenced hears nothing more until one that knows of its return talks to it.
//!
//! What is true beside that, the simulation knows: who *takes part* (the present life of a region that
//! no record shuts out), and whose writes can still come to those (see [`World::seal`]).

use std::collections::BTreeSet;

use tombolo_core::{
    Actor, Command, Member, MemberState, Members, RegionId, VersionVector, command::StartOver,
    execute, invariant::Invariant,
};

use crate::{
    link::{Due, Stream},
    mutant::Mutant,
    region::{Data, NAMESPACE, Region, Waiter},
    repair::Answer,
    truth::Broken,
};

use super::World;

/// Fewer regions are never left than this.
const LEFT_MIN: usize = 2;

/// A life of a region that is over, or that nobody should take from any more.
#[derive(Debug)]
pub(super) struct Ended {
    at: usize,
    actor: Actor,
    /// What it had applied at its end; `None` while it goes on, not knowing.
    left: Option<VersionVector>,
}

impl World {
    /// Whether a region takes part: the operator counts its present life in.
    pub(super) fn takes_part(&self, region: &Region) -> bool {
        region.exists && self.decided.admit(region.actor())
    }

    /// The regions that take part.
    pub(super) fn present(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().filter(|region| self.takes_part(region))
    }

    /// Whether the last region that was added, comes back or was restored does not take writes yet.
    pub(super) fn is_unfinished(&self) -> bool {
        self.decided.iter().any(|(_, member)| member.state.is_joining())
    }

    /// The record of what an operator decided.
    fn decide(&mut self, region: RegionId, member: Member) {
        self.decided.learn(region, member);
        self.acts.push((region, member));
    }

    /// A new region is added, or one that was fenced may come back.
    pub(super) fn join(&mut self, at: usize) -> Result<(), Broken> {
        let Some(region) = self.regions.get(at) else { return Ok(()) };
        let (id, is_new) = (region.id, !region.exists);
        if self.takes_part(region) || self.is_unfinished() {
            return Ok(());
        }
        self.counts.joins += 1;
        let incarnation = self.decided.get(id).incarnation + u32::from(!is_new);
        self.decide(id, Member { incarnation, state: MemberState::Joining });
        if is_new {
            self.regions[at].exists = true;
            self.lose_leader(at);
            self.begin_life(at)?;
        }
        Ok(())
    }

    /// A region that begins knows at once all that was decided until then.
    fn begin_life(&mut self, at: usize) -> Result<(), Broken> {
        self.regions[at].heard = (0..self.acts.len()).collect();
        let acts = self.acts.clone();
        let region = &mut self.regions[at];
        region.leader.proposed = acts.len();
        region.repaired_from.clear();
        for (id, member) in acts {
            let Ok(_) =
                execute(&mut region.data, &Command::Learn([(id, member)].into_iter().collect()));
        }
        self.checked[at] = self.regions[at].data.frontier();
        self.touched.insert(at);
        self.seal();
        Ok(())
    }

    /// A region lost its data and gets an old copy, under a new incarnation, of which it hears before
    /// it does anything.
    pub(super) fn restore(&mut self, at: usize) -> Result<(), Broken> {
        self.settle_logs()?;
        let Some(region) = self.regions.get(at) else { return Ok(()) };
        let Some(backup) = region.backup.clone() else { return Ok(()) };
        if !region.is_active() || !self.takes_part(region) || self.is_unfinished() {
            return Ok(());
        }
        let (id, before) = (region.id, region.data.frontier());
        let reached = self.reached();
        let mut kept = self.frontiers_of(&reached, Some(at));
        kept.push(backup.frontier());
        if self.is_half_merged(&reached, at, &before, &kept)
            || self.is_ahead_by(&backup, &before, &kept)
        {
            return Ok(());
        }
        self.counts.restores += 1;
        self.counts.lost += self.truth.unique(&before, &kept).len() as u64;
        self.lose_leader(at);
        self.regions[at].data = backup;
        if self.is(Mutant::ReuseIncarnation) {
            for other in &mut self.regions {
                other.leader.acknowledged.retain(|actor, _| actor.region != id);
            }
            self.links.values_mut().for_each(|link| link.late.clear());
            self.checked[at] = self.regions[at].data.frontier();
            return Ok(());
        }
        self.truth.lose(&before, &kept);
        let incarnation = self.decided.get(id).incarnation + 1;
        self.decide(id, Member { incarnation, state: MemberState::Recovering });
        self.begin_life(at)
    }

    /// The operator decides that the others go on without a region. It does not hear of it.
    pub(super) fn fence(&mut self, at: usize) {
        let Some(region) = self.regions.get(at) else { return };
        let active = self.present().filter(|region| region.is_active()).count();
        if !region.is_active() || !self.takes_part(region) || active <= LEFT_MIN {
            return;
        }
        self.counts.fences += 1;
        self.regions[at].backup = None;
        let actor = self.regions[at].actor();
        let member = Member { incarnation: actor.incarnation, state: MemberState::Fenced };
        self.decide(actor.region, member);
        self.ended.push(Ended { at, actor, left: None });
        self.seal();
    }

    /// A region hears of a record; answers whether there was one.
    pub(super) fn hear(&mut self, at: usize, skip: u8) -> bool {
        let Some(region) = self.regions.get(at).filter(|region| region.exists) else {
            return false;
        };
        let skip = if self.is(Mutant::HearOutOfOrder) { usize::from(skip) } else { 0 };
        let unheard = (0..self.acts.len()).filter(|act| !region.heard.contains(act));
        let unheard: Vec<usize> = unheard.collect();
        let Some(&act) = unheard.get(skip.min(unheard.len().saturating_sub(1))) else {
            return false;
        };
        let (id, member) = self.acts[act];
        if id == region.id && member > region.member() {
            // Nobody tells a region that it is fenced.
            return false;
        }
        if self.would_halve(at, region.members(), id, member) {
            // Left out: it ends the repair first. See `docs/simulation.md`.
            return false;
        }
        self.regions[at].heard.push(act);
        self.propose_heard(at);
        true
    }

    /// Whether a region is half repaired with writes that only a life has that it would forsake.
    fn would_halve(&self, at: usize, knows: &Members, id: RegionId, member: Member) -> bool {
        let mut after = knows.clone();
        after.learn(id, member);
        let Some(other) = self.regions.iter().position(|region| region.id == id) else {
            return false;
        };
        let actor = self.regions[other].actor();
        if after.admit(actor) || !knows.admit(actor) {
            return false;
        }
        let kept = self.frontiers_of(&self.reached(), Some(other));
        let before = self.regions[other].data.frontier();
        self.is_ahead_by(&self.regions[at].data, &before, &kept)
    }

    /// Proposes what the region has heard and this leader has not proposed.
    pub(super) fn propose_heard(&mut self, at: usize) {
        let region = &mut self.regions[at];
        let from = std::mem::replace(&mut region.leader.proposed, region.heard.len());
        let heard: Vec<usize> = region.heard.iter().skip(from).copied().collect();
        let own = region.id;
        for act in heard {
            let (id, member) = self.acts[act];
            let is_news = self.regions[at].members().said(id).is_none_or(|known| known < member);
            if id != own && is_news {
                self.propose(
                    at,
                    Command::Learn([(id, member)].into_iter().collect()),
                    Waiter::Nobody,
                );
            }
        }
    }

    /// A region that was fenced finds one that knows of its return, and starts over.
    pub(super) fn come_back(&mut self, at: usize) {
        let region = &self.regions[at];
        let own = region.member();
        if region.leader.starts_over {
            return;
        }
        let returns = |other: &usize| {
            let said = self.regions[*other].members().said(region.id);
            let is_return = said
                .is_some_and(|said| said.incarnation > own.incarnation && said.state.is_joining());
            let passes = self.passes(at, *other) && self.passes(*other, at);
            *other != at && self.regions[*other].exists && is_return && passes
        };
        let Some(other) = (0..self.regions.len()).find(returns) else { return };
        let local = self.regions[other].members().actor(region.id);
        let known = [(NAMESPACE, self.regions[other].data.frontier())].into();
        let members = self.regions[other].members().clone();
        // First what was decided before.
        let joining = Member { incarnation: local.incarnation, state: MemberState::Joining };
        let act = self.acts.iter().position(|act| *act == (local.region, joining));
        let unheard: Vec<usize> =
            (0..=act.unwrap_or(0)).filter(|act| !self.regions[at].heard.contains(act)).collect();
        self.regions[at].heard.extend(unheard);
        self.propose_heard(at);
        if !self.is(Mutant::RepairOnWhileStartingOver) {
            // Nothing that was compared in this life may come to the log after its end.
            self.break_all(at);
        }
        self.regions[at].leader.starts_over = !self.is(Mutant::RepairOnWhileStartingOver);
        let command = if self.is(Mutant::KeepFencedWrites) {
            Command::Learn([(local.region, joining)].into_iter().collect())
        } else {
            Command::StartOver(StartOver { local, known, members })
        };
        self.propose(at, command, Waiter::Nobody);
    }

    /// A region's log applied something new of the regions; it had applied `data` before.
    pub(super) fn learned(&mut self, at: usize, before: &Data) -> Result<(), Broken> {
        let known = &before.memory.members;
        let region = &self.regions[at];
        let news: Vec<(RegionId, Member)> = region
            .members()
            .iter()
            .filter(|(id, member)| known.said(*id) != Some(*member))
            .collect();
        for (id, member) in news {
            if id == self.regions[at].id {
                self.break_all(at);
                if known.get(id).incarnation < member.incarnation {
                    self.started_over(at, before)?;
                } else if member.state == MemberState::Active
                    && self.decided.admit(self.regions[at].actor())
                {
                    self.note(|| "           it may write from now on".to_owned());
                    self.decide(id, member);
                }
            } else if let Some(other) = self.regions.iter().position(|region| region.id == id) {
                self.break_stream(at, other);
                self.break_stream(other, at);
            }
        }
        self.seal();
        Ok(())
    }

    /// A region begins a new life; checks that what only it had is kept for review.
    fn started_over(&mut self, at: usize, before: &Data) -> Result<(), Broken> {
        self.counts.start_overs += 1;
        let id = self.regions[at].id;
        let former = before.memory.members.actor(id);
        let left = before.frontier();
        let ended = self.ended.iter_mut().find(|it| it.at == at && it.actor == former);
        if let Some(ended) = ended {
            ended.left = Some(left);
        }
        let others = self.regions.iter().filter(|other| other.exists && other.id != id);
        let others: Vec<VersionVector> = others.map(|other| other.data.frontier()).collect();
        let region = &mut self.regions[at];
        region.is_sealed = false;
        region.backup = None;
        region.repaired_from.clear();
        region.leader.starts_over = false;
        let memory = &region.data.memory;
        let held = before.memory.held(NAMESPACE);
        let held = held.flat_map(|(key, it)| it.siblings().iter().map(move |held| (key, held)));
        for (key, held) in held.filter(|(_, held)| held.dot.actor.region == id) {
            let dot = held.dot;
            let is_elsewhere = others.iter().any(|frontier| frontier.covers(dot));
            let is_kept = memory.review.get(&(NAMESPACE, key.clone(), dot)) == Some(held);
            self.counts.reviewed += u64::from(is_kept);
            if !is_elsewhere && !is_kept && !region.data.frontier().covers(dot) {
                return Err((Invariant::NoLostWrite, format!("{dot} is not kept for review")));
            }
        }
        self.checked[at] = self.regions[at].data.frontier();
        self.touched.insert(at);
        Ok(())
    }

    /// Whether a region that joins needs no more from another.
    pub(super) fn has_repaired_from(&self, region: &Region, source: Actor) -> bool {
        let members = region.members();
        let out = || members.iter().filter(|(_, member)| member.state.is_out());
        region.repaired_from.get(&source).is_some_and(|then| {
            self.is(Mutant::RepairBeforeFence)
                || out().all(|(id, member)| then.said(id).is_some_and(|said| said >= member))
        })
    }

    /// Whether a region that joins has all that it needs to take part.
    fn has_joined(&self, at: usize) -> bool {
        let region = &self.regions[at];
        if self.is(Mutant::WriteBeforeRepair) {
            return true;
        }
        let members = region.members();
        let is_first = region.member() == Member { incarnation: 1, state: MemberState::Joining };
        if is_first || self.is(Mutant::WriteAfterOneRepair) {
            return !region.repaired_from.is_empty();
        }
        let others = self.known(at).into_iter();
        let mut others = others.filter(|&id| !members.get(id).state.is_out());
        others.all(|id| self.has_repaired_from(region, members.actor(id)))
    }

    /// A region that joins begins the repairs that it needs, and takes part after them.
    pub(super) fn go_on_joining(&mut self, at: usize) {
        let region = &self.regions[at];
        if !region.is_joining() {
            return;
        }
        let id = region.id;
        let is_proposed = region
            .queue
            .iter()
            .any(|it| matches!(&it.command, Command::Learn(members) if members.said(id).is_some()));
        if self.has_joined(at) {
            if !is_proposed {
                let member = Member { state: MemberState::Active, ..region.member() };
                self.propose(
                    at,
                    Command::Learn([(id, member)].into_iter().collect()),
                    Waiter::Nobody,
                );
            }
            return;
        }
        let now = self.now;
        let is_idle = |stream: &Stream| stream.due.is_none() && stream.repair.is_none();
        let lacking: Vec<usize> = region
            .leader
            .streams
            .iter()
            .filter(|(_, stream)| is_idle(stream) && !self.has_repaired_from(region, stream.source))
            .map(|(&source, _)| source)
            .collect();
        for source in lacking {
            if let Some(stream) = self.stream(at, source) {
                stream.due = Some(Due { compare: false, at: now, tried: 0 });
            }
        }
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

    /// The regions whose writes can come to those that take part: themselves, and from whom they take
    /// anything, through any others.
    pub(super) fn reached(&self) -> BTreeSet<usize> {
        let returning = self.returning();
        let all = 0..self.regions.len();
        let mut reached: BTreeSet<usize> =
            all.clone().filter(|&at| self.takes_part(&self.regions[at])).collect();
        loop {
            let admits = |at: usize| {
                let actor = self.regions[at].actor();
                let mut known = reached.iter().map(|&it| self.regions[it].members());
                let returns = |(own, members): &(RegionId, Members)| {
                    *own != actor.region && may_admit(members, actor)
                };
                known.any(|members| may_admit(members, actor))
                    || returning.as_ref().is_some_and(returns)
            };
            let more =
                |at: &usize| !reached.contains(at) && self.regions[*at].exists && admits(*at);
            let Some(more) = all.clone().find(more) else { return reached };
            reached.insert(more);
        }
    }

    /// The region that may come back and has not heard of it, and what it will know when it begins.
    fn returning(&self) -> Option<(RegionId, Members)> {
        let is_return = |region: &&Region| {
            let decided = self.decided.get(region.id);
            region.exists
                && decided.state.is_joining()
                && decided.incarnation > region.actor().incarnation
        };
        let region = self.regions.iter().find(is_return)?;
        let decided = (region.id, self.decided.get(region.id));
        let act = self.acts.iter().position(|act| *act == decided)?;
        let mut members = region.members().clone();
        for &(id, member) in &self.acts[..=act] {
            members.learn(id, member);
        }
        Some((region.id, members))
    }

    /// What they have applied.
    pub(super) fn frontiers_of(
        &self,
        places: &BTreeSet<usize>,
        but: Option<usize>,
    ) -> Vec<VersionVector> {
        let places = places.iter().filter(|&&at| Some(at) != but);
        places.map(|&at| self.regions[at].data.frontier()).collect()
    }

    /// Lives of which nobody takes anything any more: what only they had is lost.
    pub(super) fn seal(&mut self) {
        let reached = self.reached();
        let is_over = |ended: &Ended| match ended.left {
            None => !reached.contains(&ended.at),
            Some(_) => {
                !reached.iter().any(|&at| may_admit(self.regions[at].members(), ended.actor))
            }
        };
        let (over, ended): (Vec<Ended>, _) =
            std::mem::take(&mut self.ended).into_iter().partition(is_over);
        self.ended = ended;
        for Ended { at, left, .. } in over {
            self.regions[at].is_sealed |= left.is_none();
            let before = left.unwrap_or_else(|| self.regions[at].data.frontier());
            let kept = self.frontiers_of(&reached, None);
            let id = self.regions[at].id;
            self.note(|| format!("           nobody takes anything of region {id} any more"));
            self.is_left_out |= self.is_half_merged(&reached, at, &before, &kept);
            self.counts.lost += self.truth.unique(&before, &kept).len() as u64;
            self.truth.lose(&before, &kept);
        }
    }

    /// Whether records are ahead by writes that are lost.
    fn is_ahead_by(&self, data: &Data, before: &VersionVector, kept: &[VersionVector]) -> bool {
        let ahead = data.ahead();
        self.truth.unique(before, kept).iter().any(|dot| ahead.covers(*dot))
    }

    /// Whether records somewhere are ahead by writes that are lost: a repair from the region that
    /// lost them was half done. Not simulated; see `docs/simulation.md`.
    fn is_half_merged(
        &self,
        reached: &BTreeSet<usize>,
        but: usize,
        before: &VersionVector,
        kept: &[VersionVector],
    ) -> bool {
        let lost = self.truth.unique(before, kept);
        let has = |vector: &VersionVector| lost.iter().any(|dot| vector.covers(*dot));
        let regions = || reached.iter().filter(|&&at| at != but).map(|&at| &self.regions[at]);
        let leaders = || regions().map(|region| &region.leader);
        let repairs =
            || leaders().flat_map(|it| it.streams.values()).filter_map(|it| it.repair.as_ref());
        let sources = || leaders().flat_map(|it| it.sources.values());
        let mut copies = regions()
            .flat_map(|region| std::iter::once(&region.data).chain(region.backup.as_ref()));
        let links = self.links.iter().filter(|((puller, source), _)| {
            *puller != but && reached.contains(puller) && *source != but && reached.contains(source)
        });
        copies.any(|data| has(&data.ahead()))
            || repairs().any(|it| has(&it.cut) || has(&it.ahead))
            || sources().any(|it| has(&it.cut.ahead) || has(&it.cut.frontier))
            || links.flat_map(|(_, link)| &link.answers).any(
                |answer| matches!(answer, Answer::Cut(cut, ahead, ..) if has(cut) || has(ahead)),
            )
    }
}

/// Whether one who knows `members` takes from an actor, or may still do so when it hears of it.
fn may_admit(members: &Members, actor: Actor) -> bool {
    members.admit(actor) || members.get(actor.region).incarnation < actor.incarnation
}
