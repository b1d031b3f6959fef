//! Repairs: when they begin, go on, end and are tried again, as in `tombolo-replication`.

use std::time::Duration;

use tombolo_core::{
    Command, Outcome, VersionVector,
    command::{Advance, Merge},
    invariant::Invariant,
    repair::Trust,
};

use crate::{
    link::{Due, Stream},
    mutant::Mutant,
    region::{NAMESPACE, Waiter},
    repair::{ATTEMPTS_MAX, Answer, Ask, Receiver, Source},
    truth::Broken,
};

use super::{World, reused};

impl World {
    pub(super) fn repairs_from(&self, at: usize) -> Option<usize> {
        let mut streams = self.regions.get(at)?.leader.streams.iter();
        streams.find(|(_, stream)| stream.repair.is_some()).map(|(&source, _)| source)
    }

    pub(super) fn start_repair(&mut self, at: usize) {
        let now = self.now;
        self.sessions += 1;
        let id = self.sessions;
        let region = &mut self.regions[at];
        let time = region.wall_time(now);
        if region.leader.is_repairing() {
            return;
        }
        let is_due = |stream: &Stream| stream.due.is_some_and(|due| due.at <= now);
        let streams = &mut region.leader.streams;
        let Some((&source, stream)) = streams.iter_mut().find(|(_, stream)| is_due(stream)) else {
            return;
        };
        let compare = stream.due.is_some_and(|due| due.compare);
        let (local, from) = (region.data.memory.members.actor(region.id), stream.source);
        stream.repair = Some(Receiver::new(id, compare, local, &region.data));
        if compare || self.is(Mutant::CompareAtOnce) {
            self.compare(at, source);
            return;
        }
        // What an earlier repair proposed must not be merged after this side is pinned: the end of
        // this one would cover what it brings, unseen.
        let settle = Merge {
            namespace: NAMESPACE,
            rule: self.rule,
            local,
            source: from,
            time,
            cut: VersionVector::new(),
            ahead: VersionVector::new(),
            trust: Trust::Coverage,
            offers: Vec::new(),
            ledger: Vec::new(),
        };
        self.propose(at, Command::Merge(settle), Waiter::Repair(source, id));
    }

    /// Pins this side and asks, or gives up.
    pub(super) fn compare(&mut self, puller: usize, source: usize) {
        let region = &mut self.regions[puller];
        let Some(stream) = region.leader.streams.get_mut(&source) else { return };
        let Some(repair) = &mut stream.repair else { return };
        if repair.attempts >= ATTEMPTS_MAX {
            if repair.compare {
                self.repaired(puller, source, false);
            } else {
                self.repair_failed(puller, source);
            }
            return;
        }
        let ask = repair.compare(&region.data);
        if let Some(link) = self.links.get_mut(&(puller, source)) {
            link.break_repair();
            link.asks.push_back(ask);
        }
    }

    pub(super) fn ask_arrives(&mut self, puller: usize, source: usize) {
        if !self.passes(puller, source) {
            return;
        }
        let (page, mutant) = (self.page, self.mutant);
        let Some(link) = self.links.get_mut(&(puller, source)) else { return };
        let Some(ask) = link.asks.pop_front() else { return };
        let region = &mut self.regions[source];
        match ask {
            Ask::Open(known, nodes, distrust) => {
                let (opened, cut) = Source::open(&region.data, known, &nodes, distrust, mutant);
                region.leader.sources.insert(puller, opened);
                link.answers.push_back(cut);
            }
            Ask::Leaf(leaf, digests) => {
                if let Some(opened) = region.leader.sources.get_mut(&puller) {
                    if mutant != Some(Mutant::RestLast) {
                        link.answers.extend(opened.rest(page, mutant));
                    }
                    link.answers.push_back(opened.leaf(leaf, digests, mutant));
                }
            }
            Ask::Done => {
                if let Some(mut opened) = region.leader.sources.remove(&puller) {
                    link.answers.extend(opened.rest(page, mutant));
                    link.answers.push_back(Answer::End);
                }
            }
        }
    }

    pub(super) fn answer_arrives(&mut self, puller: usize, source: usize) -> Result<(), Broken> {
        if !self.passes(source, puller) {
            return Ok(());
        }
        let (page, mutant) = (self.page, self.mutant);
        let Some(link) = self.links.get_mut(&(puller, source)) else { return Ok(()) };
        let streams = &mut self.regions[puller].leader.streams;
        let Some(stream) = streams.get_mut(&source) else { return Ok(()) };
        let Some(repair) = &mut stream.repair else { return Ok(()) };
        // What has come is merged before more is read.
        if repair.waits {
            return Ok(());
        }
        let answer = link.answers.pop_front();
        if answer.is_some() {
            stream.heard = self.now;
        }
        match answer {
            None => return Ok(()),
            Some(Answer::Cut(cut, ahead, nodes, members)) => {
                (repair.cut, repair.ahead, repair.members) = (cut, ahead, members);
                let leaves = repair.differing(&nodes);
                match (repair.is_at_same_point(), repair.damage) {
                    (true, None) if leaves.is_empty() => {
                        self.repaired(puller, source, true);
                        return Ok(());
                    }
                    (true, None) => {
                        // Both hold all and only what the same frontier says.
                        let frontier = &repair.cut;
                        return Err((
                            Invariant::Convergence,
                            format!("two regions at {frontier} differ in leaves {leaves:?}"),
                        ));
                    }
                    (false, _) if repair.compare => {
                        self.repaired(puller, source, false);
                        return Ok(());
                    }
                    (_, _) => repair.trust = Trust::Coverage,
                }
                for leaf in leaves {
                    let listed = repair.mine.list(leaf);
                    let digests = listed.iter().map(|(_, digest)| *digest).collect();
                    link.asks.push_back(Ask::Leaf(leaf, digests));
                    repair.listed.push_back((leaf, listed));
                }
                link.asks.push_back(Ask::Done);
                if self.is(Mutant::AdvanceFirst) {
                    self.propose_advance(puller, source);
                }
                return Ok(());
            }
            Some(Answer::Leaf(leaf, answer)) => {
                if !repair.take_leaf(leaf, answer, mutant) {
                    self.repair_failed(puller, source);
                    return Ok(());
                }
            }
            Some(Answer::Rest(offers, ledger)) => {
                repair.offers.extend(offers);
                if mutant != Some(Mutant::ForgetLedger) {
                    repair.ledger.extend(ledger);
                }
            }
            Some(Answer::End) => {
                if !repair.listed.is_empty() {
                    self.repair_failed(puller, source);
                    return Ok(());
                }
                repair.ended = true;
                if mutant == Some(Mutant::ForgetLastPage) {
                    repair.offers.clear();
                }
            }
        }
        if repair.ended || repair.offers.len() + repair.ledger.len() >= page {
            self.flush(puller, source);
        }
        Ok(())
    }

    /// Merges what has come, and ends the repair if that was all.
    pub(super) fn flush(&mut self, puller: usize, source: usize) {
        let rule = self.rule;
        let time = self.regions[puller].wall_time(self.now);
        let Some(stream) = self.stream(puller, source) else { return };
        let from = stream.source;
        let Some(repair) = &mut stream.repair else { return };
        if repair.offers.is_empty() && repair.ledger.is_empty() {
            if repair.ended {
                self.propose_advance(puller, source);
            }
            return;
        }
        repair.waits = true;
        let merge = Merge {
            namespace: NAMESPACE,
            rule,
            local: repair.local,
            source: from,
            time,
            cut: repair.cut.clone(),
            ahead: repair.ahead.clone(),
            trust: repair.trust,
            offers: std::mem::take(&mut repair.offers),
            ledger: std::mem::take(&mut repair.ledger),
        };
        let waiter = Waiter::Repair(source, repair.id);
        self.propose(puller, Command::Merge(merge), waiter);
    }

    pub(super) fn propose_advance(&mut self, puller: usize, source: usize) {
        let blindly = self.is(Mutant::AdvanceBlindly);
        let region = &mut self.regions[puller];
        let (local, now_applied) = (region.actor(), region.data.frontier());
        let Some(stream) = region.leader.streams.get_mut(&source) else { return };
        let Some(repair) = &mut stream.repair else { return };
        repair.waits = repair.ended;
        let advance = Advance {
            namespace: NAMESPACE,
            local,
            source: stream.source,
            since: if blindly { now_applied } else { repair.mine.frontier.clone() },
            cut: repair.cut.clone(),
            ahead: repair.ahead.clone(),
        };
        let waiter = Waiter::Repair(source, repair.id);
        self.propose(puller, Command::Advance(advance), waiter);
    }

    pub(super) fn repair_of(
        &mut self,
        at: usize,
        waiter: Waiter,
    ) -> Option<(usize, &mut Receiver)> {
        let Waiter::Repair(source, id) = waiter else { return None };
        let repair = self.stream(at, source)?.repair.as_mut()?;
        (repair.id == id).then_some((source, repair))
    }

    pub(super) fn merged(
        &mut self,
        at: usize,
        waiter: Waiter,
        outcome: &Outcome,
    ) -> Result<(), Broken> {
        self.counts.merges += 1;
        if let Outcome::Merged(merged) = outcome
            && let Some(dot) = merged.reused
        {
            return Err(reused(&format!("{dot} is another")));
        }
        self.counts.refused += u64::from(*outcome == Outcome::SourceOut);
        let Some((source, repair)) = self.repair_of(at, waiter) else { return Ok(()) };
        if *outcome == Outcome::SourceOut {
            self.break_stream(at, source);
            return Ok(());
        }
        repair.waits = false;
        if repair.attempts == 0 {
            self.compare(at, source);
            return Ok(());
        }
        if *outcome == Outcome::Moved {
            repair.damage = None;
            self.compare(at, source);
        } else if repair.ended {
            self.propose_advance(at, source);
        }
        Ok(())
    }

    pub(super) fn advanced(
        &mut self,
        at: usize,
        waiter: Waiter,
        outcome: &Outcome,
    ) -> Result<(), Broken> {
        match outcome {
            Outcome::OwnChangeUnknown => return Err(reused("an own change is unknown")),
            Outcome::SourceOut => {
                self.counts.refused += 1;
                if let Some((source, _)) = self.repair_of(at, waiter) {
                    self.break_stream(at, source);
                }
            }
            Outcome::Moved => {
                self.counts.moved += 1;
                if let Some((source, _)) = self.repair_of(at, waiter) {
                    self.compare(at, source);
                }
            }
            _ => {
                self.counts.repairs += 1;
                if let Some((source, repair)) = self.repair_of(at, waiter)
                    && repair.ended
                {
                    self.repaired(at, source, true);
                }
            }
        }
        Ok(())
    }

    /// A repair ended; `is_done` unless it found that all is moving.
    pub(super) fn repaired(&mut self, puller: usize, source: usize, is_done: bool) {
        let (now, mutant) = (self.now, self.mutant);
        let Some(link) = self.links.get_mut(&(puller, source)) else { return };
        link.break_repair();
        let region = &mut self.regions[puller];
        let Some(stream) = region.leader.streams.get_mut(&source) else { return };
        let Some(repair) = stream.repair.take() else { return };
        stream.moved = now;
        let tried = stream.due.map_or(0, |due| due.tried) + 1;
        stream.due = (!is_done && tried < 10).then(|| Due {
            compare: repair.compare,
            at: now + Duration::from_secs(1) * tried,
            tried,
        });
        if mutant != Some(Mutant::ForgetTrimmed) {
            still_due(stream, &region.data.frontier(), now);
        }
        if is_done {
            region.repaired_from.insert(stream.source, repair.members);
        }
        self.acknowledge(puller, source);
        self.begin_untrimmed(puller, source);
    }

    pub(super) fn repair_failed(&mut self, puller: usize, source: usize) {
        let (now, mutant) = (self.now, self.mutant);
        let Some(link) = self.links.get_mut(&(puller, source)) else { return };
        let Some(region) = self.regions.get_mut(puller) else { return };
        let Some(stream) = region.leader.streams.get_mut(&source) else { return };
        let Some(repair) = stream.repair.take() else { return };
        link.break_repair();
        self.counts.broken_repairs += 1;
        let tried = stream.due.map_or(0, |due| due.tried) + 1;
        let at = now + Duration::from_secs(1) * tried.min(5);
        stream.due = (!repair.compare).then_some(Due { compare: false, at, tried });
        if mutant != Some(Mutant::ForgetTrimmed) {
            still_due(stream, &region.data.frontier(), at);
        }
    }
}

/// While a repair was under way the source may have said that its log is gone further than that
/// repair went: then the next one is due.
fn still_due(stream: &mut Stream, frontier: &VersionVector, at: Duration) {
    if stream.trimmed.as_ref().is_some_and(|trimmed| !frontier.covers_all(trimmed)) {
        let due = Due { compare: false, at, tried: 0 };
        stream.due = Some(stream.due.filter(|due| !due.compare).unwrap_or(due));
    }
}
