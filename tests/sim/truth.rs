//! The omniscient record of all writes, and what must hold of a region because of them.
//!
//! Knows what every origin did and nothing of how it travels. What the checks conclude is computed
//! from `tombolo_core::invariant` alone.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use tombolo_core::{
    Actor, Change, Dot, HybridTime, Record, RequestId, Rule, VersionVector,
    command::Written,
    invariant::{self, Event, Invariant},
    record::Sibling,
};

use crate::region::{Data, NAMESPACE};

/// A promise that does not hold, and what was seen.
pub type Broken = (Invariant, String);

/// All writes of a history.
#[derive(Debug)]
pub struct Truth {
    rule: Rule,
    changes: Vec<Change>,
    /// What each of them had seen.
    seen: Vec<VersionVector>,
    last: BTreeMap<Actor, u64>,
    /// Where a key's writes are: the change, and the place in it.
    of_key: BTreeMap<Bytes, Vec<(Dot, usize, usize)>>,
    by_dot: BTreeMap<Dot, (usize, usize)>,
    /// Writes that no region that takes part holds: their region lost its data, or was fenced.
    lost: BTreeSet<Dot>,
}

impl Truth {
    /// Nothing is written yet.
    pub fn new(rule: Rule) -> Self {
        Self {
            rule,
            changes: Vec::new(),
            seen: Vec::new(),
            last: BTreeMap::new(),
            of_key: BTreeMap::new(),
            by_dot: BTreeMap::new(),
            lost: BTreeSet::new(),
        }
    }

    /// How many writes there are.
    pub fn len(&self) -> usize {
        self.by_dot.len()
    }

    /// Whether nothing is written.
    pub fn is_empty(&self) -> bool {
        self.by_dot.is_empty()
    }

    /// A region wrote, when it had applied `applied` and its records had seen `contexts`.
    ///
    /// # Errors
    /// If a dot was used before, or the write does not win against what it has seen.
    pub fn write(
        &mut self,
        change: Change,
        applied: &VersionVector,
        contexts: &[VersionVector],
        has_context: bool,
        is_exact: bool,
    ) -> Result<(), Broken> {
        let number = self.changes.len();
        for (place, delta) in change.deltas.iter().enumerate() {
            let dot = delta.sibling.dot;
            if self.by_dot.insert(dot, (number, place)).is_some() {
                return Err((Invariant::NoDotReuse, format!("{dot} stands for two writes")));
            }
            self.of_key.entry(delta.key.clone()).or_default().push((dot, number, place));
        }
        let last = change.last();
        self.last.insert(last.actor, last.seq);
        self.seen.push(change.seen().into_owned());
        self.changes.push(change);
        let is_checked = !has_context && (is_exact || self.rule == Rule::Lww);
        if is_checked {
            let change = &self.changes[number];
            for (place, (delta, context)) in change.deltas.iter().zip(contexts).enumerate() {
                let is_later = change.deltas[place + 1..].iter().any(|it| it.key == delta.key);
                if is_later {
                    continue;
                }
                let own = |dot: Dot| dot.actor == last.actor && dot.seq >= change.first_seq;
                let sees = |dot: Dot| applied.covers(dot) || context.covers(dot) || own(dot);
                let kept = self.survivors(&delta.key, sees);
                let dot = delta.sibling.dot;
                if kept.iter().any(|held| *held != dot) {
                    return Err((
                        Invariant::WriteWins,
                        format!("{dot} does not replace {} that it has seen", list(&kept)),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether some region has executed a request.
    pub fn was_executed(&self, request: RequestId) -> bool {
        self.changes.iter().any(|change| change.request.is_some_and(|it| it.id == request))
    }

    /// Checks what the repeat of a request was answered: a write of that request.
    ///
    /// # Errors
    /// If it was another.
    pub fn check_answer(&self, request: RequestId, results: &[Written]) -> Result<(), Broken> {
        for result in results {
            let written = self.by_dot.get(&result.dot).is_some_and(|&(change, place)| {
                let change = &self.changes[change];
                let is_it = change.request.is_some_and(|requested| requested.id == request);
                is_it && change.deltas[place].sibling.time == result.time
            });
            if !written {
                let seen = format!("{request:?} was answered {}, which is another", result.dot);
                return Err((Invariant::RequestOnce, seen));
            }
        }
        Ok(())
    }

    /// Writes that `before` covers and none of `after` does are lost for good.
    pub fn lose(&mut self, before: &VersionVector, after: &[VersionVector]) {
        self.lost.extend(self.unique(before, after));
    }

    /// Writes that `before` covers and none of `after` does.
    pub fn unique(&self, before: &VersionVector, after: &[VersionVector]) -> Vec<Dot> {
        let dots = self.by_dot.keys().filter(|dot| before.covers(**dot));
        let dots = dots.filter(|dot| !self.lost.contains(dot));
        dots.filter(|dot| !after.iter().any(|vector| vector.covers(**dot))).copied().collect()
    }

    /// What must be held of a key by whoever has applied what `sees` says.
    fn survivors(&self, key: &Bytes, sees: impl Fn(Dot) -> bool) -> Vec<Dot> {
        invariant::survivors(self.events(key, sees), self.rule)
    }

    fn events(&self, key: &Bytes, sees: impl Fn(Dot) -> bool) -> impl Iterator<Item = Event<'_>> {
        let all = self.of_key.get(key).into_iter().flatten();
        let seen = all.filter(move |(dot, ..)| sees(*dot) && !self.lost.contains(dot));
        seen.map(|&(_, change, place)| Event {
            delta: &self.changes[change].deltas[place],
            seen: &self.seen[change],
        })
    }

    /// Checks what a region holds, which had applied `before` when it was looked at last.
    ///
    /// # Errors
    /// The first promise that does not hold.
    pub fn check(&self, data: &Data, before: &VersionVector) -> Result<(), Broken> {
        let frontier = data.frontier();
        self.check_frontier(data, &frontier, before)?;
        let is_exact = data.is_exact();
        for key in self.of_key.keys() {
            let record = data.memory.records.get(&(NAMESPACE, key.clone()));
            self.check_key(key, record, &frontier, is_exact)?;
        }
        if data.tree != data.memory.tree(NAMESPACE) {
            return Err((Invariant::MerkleExact, "the tree is not that of the records".to_owned()));
        }
        Ok(())
    }

    fn check_frontier(
        &self,
        data: &Data,
        frontier: &VersionVector,
        before: &VersionVector,
    ) -> Result<(), Broken> {
        let unsound = |seen: String| Err((Invariant::FrontierSound, seen));
        if !frontier.covers_all(before) {
            return unsound(format!("the frontier went back from {before} to {frontier}"));
        }
        for (actor, seq) in frontier.iter() {
            if self.last.get(&actor).is_none_or(|&last| last < seq) {
                return unsound(format!("{frontier} covers {actor}:{seq}, which does not exist"));
            }
        }
        // While a repair is half done, a write may depend on what it brought.
        let mut held = frontier.clone();
        held.join(&data.ahead());
        for change in &self.changes {
            if !invariant::is_closed_over(frontier, &held, change) {
                let (last, needs) = (change.last(), &change.depends_on);
                return unsound(format!(
                    "{frontier} is not closed: the change up to {last} needs {needs}"
                ));
            }
        }
        let log = data.memory.changes.values();
        if !invariant::is_whole(log, &data.trimmed(), frontier) {
            let trimmed = data.trimmed();
            return Err((
                Invariant::LogWhole,
                format!("the log has a gap between {trimmed} and {frontier}"),
            ));
        }
        Ok(())
    }

    fn check_key(
        &self,
        key: &Bytes,
        record: Option<&Record>,
        frontier: &VersionVector,
        is_exact: bool,
    ) -> Result<(), Broken> {
        let context = record.map(|record| record.context().clone()).unwrap_or_default();
        let sees = |dot: Dot| frontier.covers(dot) || context.covers(dot);
        let (expected, held) = (self.survivors(key, sees), invariant::live_dots(record));
        for sibling in record.into_iter().flat_map(Record::siblings) {
            self.check_content(key, sibling)?;
        }
        self.check_shown(key, record)?;
        if expected == held {
            return Ok(());
        }
        let told = || {
            let (held, expected) = (list(&held), list(&expected));
            format!("key {key:?} at {frontier}: holds {held}, should hold {expected}")
        };
        let is_replaced =
            |dot: Dot| self.events(key, sees).any(|event| event.delta.supersedes.contains(&dot));
        // While a repair is half done a record may lack what is gone at the source, and under `lww`
        // another value may stand for it.
        let wrong = |dot: &&Dot| {
            !expected.contains(dot)
                && (is_exact || self.rule == Rule::Siblings || is_replaced(**dot))
        };
        if held.iter().any(|dot| wrong(&dot)) {
            return Err((Invariant::NoResurrection, told()));
        }
        if is_exact {
            return Err((Invariant::NoLostWrite, told()));
        }
        Ok(())
    }

    /// A request that several regions executed is shown as one version.
    fn check_shown(&self, key: &Bytes, record: Option<&Record>) -> Result<(), Broken> {
        let shown = record.into_iter().flat_map(|record| record.live_at(HybridTime::ZERO));
        let mut requests = BTreeSet::new();
        for (held, _) in shown {
            let place = self.by_dot.get(&held.dot);
            let request = place.and_then(|&(change, place)| {
                let request = self.changes[change].request?;
                Some((request.id, place))
            });
            if request.is_some_and(|request| !requests.insert(request)) {
                let dot = held.dot;
                let seen = format!("key {key:?} shows {dot} and another write of its request");
                return Err((Invariant::RequestOnce, seen));
            }
        }
        Ok(())
    }

    fn check_content(&self, key: &Bytes, held: &Sibling) -> Result<(), Broken> {
        let dot = held.dot;
        let written =
            self.by_dot.get(&dot).map(|&(change, place)| &self.changes[change].deltas[place]);
        if written.is_some_and(|delta| delta.key == *key && delta.sibling == *held) {
            return Ok(());
        }
        Err((Invariant::NoDotReuse, format!("{dot} at key {key:?} is not what was written")))
    }

    /// Checks that a tombstone might go: it had seen `context`, at a region that has applied `local`.
    ///
    /// # Errors
    /// If a region has not applied it, or something can still come that has not seen it.
    pub fn check_collected(
        &self,
        key: &Bytes,
        context: &VersionVector,
        local: &VersionVector,
        others: &[(u16, VersionVector)],
    ) -> Result<(), Broken> {
        for (region, frontier) in others {
            if !frontier.covers_all(context) {
                return Err((
                    Invariant::StableSound,
                    format!("{key:?} at {context} went, and region {region} has {frontier}"),
                ));
            }
        }
        let unseen = |event: &Event<'_>| !event.seen.covers_all(context);
        let mut coming = self.events(key, |dot| !local.covers(dot)).filter(unseen);
        if let Some(event) = coming.next() {
            let dot = event.delta.sibling.dot;
            return Err((
                Invariant::StableSound,
                format!("{key:?} at {context} went, and {dot}, which has not seen it, can come"),
            ));
        }
        Ok(())
    }

    /// Checks that a region's ledger has every value that neither stands nor was replaced.
    ///
    /// # Errors
    /// If one is missing.
    pub fn check_ledger(&self, data: &Data) -> Result<(), Broken> {
        let noted: BTreeSet<Dot> =
            data.memory.ledger.values().map(|entry| entry.loser.dot).collect();
        for entry in data.memory.ledger.values() {
            let (dot, winner) = (entry.loser.dot, self.by_dot.get(&entry.winner));
            let won = winner.map(|&(change, place)| &self.changes[change].deltas[place].sibling);
            if won.is_some_and(|won| won.is_twin_of(&entry.loser)) {
                let seen = format!("{dot} lost to {}, which is the same request", entry.winner);
                return Err((Invariant::RequestOnce, seen));
            }
        }
        let frontier = data.frontier();
        for key in self.of_key.keys() {
            let sees = |dot: Dot| frontier.covers(dot);
            let kept = self.survivors(key, sees);
            let replaced: BTreeSet<Dot> =
                self.events(key, sees).flat_map(|it| it.delta.supersedes.clone()).collect();
            for event in self.events(key, sees) {
                let sibling = &event.delta.sibling;
                let is_value = sibling.content.is_present();
                let dot = sibling.dot;
                let is_accounted_for =
                    |dot: &Dot| kept.contains(dot) || replaced.contains(dot) || noted.contains(dot);
                // One that lost to its twin shares the fate of that.
                let twins = self.events(key, sees).map(|event| &event.delta.sibling);
                let mut twins = twins.filter(|other| other.is_twin_of(sibling));
                if is_value
                    && !is_accounted_for(&dot)
                    && !twins.any(|twin| is_accounted_for(&twin.dot))
                {
                    return Err((
                        Invariant::LedgerWhole,
                        format!("{dot} of key {key:?} was dropped and is not in the ledger"),
                    ));
                }
            }
        }
        Ok(())
    }
}

fn list(dots: &[Dot]) -> String {
    let dots: Vec<String> = dots.iter().map(ToString::to_string).collect();
    format!("[{}]", dots.join(" "))
}
