//! All regions and what is between them: makes the steps of a history happen, heals, and checks.
//!
//! Each method stands for a part of the server: `puller`, `feed` and `repair` of `tombolo-replication`,
//! `write` and `collect` of `tombolo-shard`. Where a step is refused in the server (a cut network, a
//! region that does not write), it does nothing here.
//!
//! This file: the steps, a region's log and the checks after each step. Beside it: streams, repairs,
//! members, forgetting and healing.

mod forgetting;
mod healing;
mod members;
mod repairs;
mod streams;
mod typed;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use tombolo_core::{
    Command, Content, HybridClock, HybridTime, Member, Members, Outcome, RegionId, RequestId, Rule,
    VersionVector,
    command::{Operation, Stopped, Write, Written},
    execute,
    invariant::{self, Invariant},
    typed::{Action, Mutation},
};

use crate::{
    Violation,
    link::{Due, Link, Request},
    mutant::Mutant,
    region::{CLOCK_OFFSET_MAX_MS, Data, Leader, NAMESPACE, Proposal, Region, Waiter},
    step::{Event, History, Place, Step, keys},
    truth::{Broken, Truth},
};

use members::Ended;

/// What a history did: how often the parts that matter happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Repeated requests that a region knew, of which it executed none.
    pub repeats: u64,
    /// Requests that a region executed after another had, of which it had not heard.
    pub twins: u64,
    /// Changes that take back what a region had added to counters for such a request.
    pub taken_back: u64,
    /// Changes applied.
    pub applied: u64,
    /// Changes that came again.
    pub repeated: u64,
    /// Repairs that moved a frontier.
    pub repairs: u64,
    /// Merges of a repair.
    pub merges: u64,
    /// Comparisons that other changes made void.
    pub moved: u64,
    /// Repairs that broke off.
    pub broken_repairs: u64,
    /// Changes dropped from logs before every region had them.
    pub trimmed: u64,
    /// Tombstones dropped.
    pub collected: u64,
    /// Values that expired.
    pub expired: u64,
    /// Leaders lost.
    pub crashes: u64,
    /// Regions that lost data.
    pub restores: u64,
    /// Regions that joined or came back.
    pub joins: u64,
    /// Regions fenced.
    pub fences: u64,
    /// Regions that started over.
    pub start_overs: u64,
    /// Histories that end early, because what is lost was half merged.
    pub left_out: u64,
    /// Values that were kept for review.
    pub reviewed: u64,
    /// Tells that were ignored because they came with members that the receiver did not know.
    pub untold: u64,
    /// Commands that the core refused because their source was out.
    pub refused: u64,
    /// Writes lost with regions that lost data, or were fenced.
    pub lost: u64,
    /// Steps with a region ahead of its frontier.
    pub half_repaired: u64,
    /// Writes made in such a region.
    pub half_repaired_writes: u64,
}

impl Counts {
    /// Adds another history's.
    pub fn add(&mut self, other: &Self) {
        let Self {
            writes,
            repeats,
            twins,
            taken_back,
            applied,
            repeated,
            repairs,
            merges,
            moved,
            broken_repairs,
            trimmed,
            collected,
            expired,
            crashes,
            restores,
            joins,
            fences,
            start_overs,
            left_out,
            reviewed,
            untold,
            refused,
            lost,
            half_repaired,
            half_repaired_writes,
        } = other;
        self.writes += writes;
        self.repeats += repeats;
        self.twins += twins;
        self.taken_back += taken_back;
        self.applied += applied;
        self.repeated += repeated;
        self.repairs += repairs;
        self.merges += merges;
        self.moved += moved;
        self.broken_repairs += broken_repairs;
        self.trimmed += trimmed;
        self.collected += collected;
        self.expired += expired;
        self.crashes += crashes;
        self.restores += restores;
        self.joins += joins;
        self.fences += fences;
        self.start_overs += start_overs;
        self.left_out += left_out;
        self.reviewed += reviewed;
        self.untold += untold;
        self.refused += refused;
        self.lost += lost;
        self.half_repaired += half_repaired;
        self.half_repaired_writes += half_repaired_writes;
    }
}

/// All regions.
#[derive(Debug)]
pub struct World {
    rule: Rule,
    batch: usize,
    page: usize,
    gate: bool,
    mutant: Option<Mutant>,
    now: Duration,
    regions: Vec<Region>,
    links: BTreeMap<(usize, usize), Link>,
    cuts: BTreeSet<(usize, usize)>,
    /// What an operator decided, in that order.
    acts: Vec<(RegionId, Member)>,
    /// All of that.
    decided: Members,
    /// Lives that are over, while something of them can still come.
    ended: Vec<Ended>,
    /// Whether the history ends here: it came to what is not simulated.
    is_left_out: bool,
    truth: Truth,
    /// What each region had applied when it was checked last.
    checked: Vec<VersionVector>,
    /// Regions to check.
    touched: BTreeSet<usize>,
    /// Changes that came in, by region.
    received: Vec<u64>,
    counts: Counts,
    sessions: u64,
    values: u64,
    /// What clients asked for, in that order.
    requests: Vec<Write>,
    trace: Option<Vec<String>>,
}

impl World {
    /// The regions of a history before its first step: all know and reach each other.
    pub fn new(history: &History, mutant: Option<Mutant>) -> Self {
        let present = usize::from(history.regions);
        // One more may join.
        let ids = || (1..=history.regions + 1).map(RegionId);
        let region = |(place, id): (usize, RegionId)| {
            let mut region = Region::new(id, place < present, ids());
            region.data.forgets_deletions = mutant == Some(Mutant::TreeForgetsDeletions);
            region
        };
        let regions: Vec<Region> = ids().enumerate().map(region).collect();
        let pairs =
            || (0..regions.len()).flat_map(|one| (0..regions.len()).map(move |two| (one, two)));
        let links =
            pairs().filter(|(one, two)| one != two).map(|pair| (pair, Link::default())).collect();
        let mut world = Self {
            rule: history.rule,
            batch: history.batch.max(1),
            page: history.page.max(1),
            gate: history.gate && mutant != Some(Mutant::AdvanceBlindly),
            mutant,
            now: Duration::ZERO,
            checked: vec![VersionVector::new(); regions.len()],
            received: vec![0; regions.len()],
            touched: BTreeSet::new(),
            truth: Truth::new(history.rule),
            links,
            cuts: BTreeSet::new(),
            acts: Vec::new(),
            decided: Members::new(),
            ended: Vec::new(),
            is_left_out: false,
            counts: Counts::default(),
            sessions: 0,
            values: 0,
            requests: Vec::new(),
            trace: None,
            regions,
        };
        for (puller, source) in world.pairs() {
            world.open(puller, source);
        }
        world
    }

    /// Writes down what happens from now on.
    pub fn keep_trace(&mut self) {
        self.trace = Some(Vec::new());
    }

    /// What happened.
    pub fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }

    /// Makes a history happen, heals everything, and checks all the while.
    ///
    /// # Errors
    /// The first promise that does not hold.
    pub fn run(&mut self, history: &History) -> Result<Counts, Violation> {
        let violation =
            |step: usize| move |(invariant, seen): Broken| Violation { invariant, seen, step };
        for (number, step) in history.steps.iter().enumerate() {
            self.step(*step).map_err(violation(number))?;
            if self.is_left_out {
                break;
            }
        }
        let after = history.steps.len();
        self.note(|| "all is healed".to_owned());
        if !self.is_left_out {
            self.heal().map_err(violation(after))?;
        }
        self.counts.left_out += u64::from(self.is_left_out);
        Ok(self.counts)
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        self.links.keys().copied().collect()
    }

    fn step(&mut self, step: Step) -> Result<(), Broken> {
        self.now += Duration::from_millis(u64::from(step.wait_ms));
        let ms = self.now.as_millis();
        self.note(|| format!("{ms:>6} ms  {:?}", step.event));
        self.happen(step.event)?;
        let is_ahead = self.regions.iter().any(|region| !region.data.is_exact());
        self.counts.half_repaired += u64::from(is_ahead);
        self.check()
    }

    fn happen(&mut self, event: Event) -> Result<(), Broken> {
        let place = |place: Place| usize::from(place);
        let link = |puller: Place, source: Place| (usize::from(puller), usize::from(source));
        match event {
            Event::Write { at, keys, pair, delete, expires } => {
                let mut operations = vec![(keys.0, delete.0)];
                if pair {
                    operations.push((keys.1, delete.1));
                }
                self.write(place(at), &operations, expires, None);
            }
            Event::WriteSeen { at, key, delete, read_at } => {
                self.write(place(at), &[(key, delete)], false, Some(place(read_at)));
            }
            Event::Repeat { at, back } => self.repeat(place(at), usize::from(back)),
            Event::Commit { at, count } => {
                for _ in 0..count {
                    self.commit(place(at))?;
                }
            }
            Event::Open { puller, source } => {
                let (puller, source) = link(puller, source);
                self.open(puller, source);
            }
            Event::Requests { puller, source, count } => {
                let (puller, source) = link(puller, source);
                (0..count).for_each(|_| self.request_arrives(puller, source));
            }
            Event::Replies { puller, source, count } => {
                let (puller, source) = link(puller, source);
                (0..count).for_each(|_| self.reply_arrives(puller, source));
            }
            Event::Send { puller, source, count } => {
                let (puller, source) = link(puller, source);
                (0..count).for_each(|_| self.send(puller, source));
            }
            Event::Tell { puller, source } => {
                let (puller, source) = link(puller, source);
                self.tell(puller, source);
            }
            Event::Apply { puller, source } => {
                let (puller, source) = link(puller, source);
                self.apply(puller, source);
            }
            Event::Flow { puller, source } => {
                let (puller, source) = link(puller, source);
                for _ in 0..2 {
                    self.request_arrives(puller, source);
                    self.send(puller, source);
                    self.tell(puller, source);
                    (0..4).for_each(|_| self.reply_arrives(puller, source));
                    self.apply(puller, source);
                    self.commit(puller)?;
                }
            }
            Event::Tick { at } => self.tick(place(at)),
            Event::Ask { puller, source, compare } => {
                let (puller, source) = link(puller, source);
                let due = Due { compare, at: self.now, tried: 0 };
                if let Some(stream) = self.stream(puller, source)
                    && (!compare || stream.due.is_none())
                {
                    stream.due = Some(due);
                }
            }
            Event::RepairMessages { at, requests, replies } => {
                let puller = place(at);
                let Some(source) = self.repairs_from(puller) else { return Ok(()) };
                (0..requests).for_each(|_| self.ask_arrives(puller, source));
                for _ in 0..replies {
                    self.answer_arrives(puller, source)?;
                }
            }
            Event::Repair { at, rounds } => {
                let at = place(at);
                self.tick(at);
                for _ in 0..rounds {
                    self.commit(at)?;
                    let Some(source) = self.repairs_from(at) else { break };
                    (0..2).for_each(|_| self.ask_arrives(at, source));
                    for _ in 0..3 {
                        self.answer_arrives(at, source)?;
                    }
                }
                self.tick(at);
            }
            Event::Duplicate { puller, source, reply } => {
                if let Some(link) = self.links.get_mut(&link(puller, source)) {
                    if reply {
                        let again = link.replies.front().cloned();
                        link.replies.extend(again);
                    } else {
                        let again = link.requests.front().cloned();
                        let is_harmless = |it: &Request| matches!(it, Request::Acknowledge(_));
                        link.requests.extend(again.filter(is_harmless));
                    }
                }
            }
            Event::Late { puller, source } => {
                let (puller, source) = link(puller, source);
                self.late_arrives(puller, source);
            }
            Event::Break { puller, source } => {
                let (puller, source) = link(puller, source);
                self.break_stream(puller, source);
            }
            Event::BreakRepair { at } => {
                if let Some(source) = self.repairs_from(place(at)) {
                    self.repair_failed(place(at), source);
                }
            }
            Event::Cut { from, to } => {
                self.cuts.insert((place(from), place(to)));
            }
            Event::Mend { from, to } => {
                self.cuts.remove(&(place(from), place(to)));
            }
            Event::Crash { at, commit } => {
                for _ in 0..commit {
                    self.commit(place(at))?;
                }
                self.crash(place(at));
            }
            Event::Clock { at, offset_ms } => {
                if let Some(region) = self.regions.get_mut(place(at)) {
                    region.offset_ms = i64::from(offset_ms);
                }
            }
            Event::Trim { at, keep } => self.trim(place(at), Some(keep)),
            Event::TrimStable { at } => self.trim(place(at), None),
            Event::Collect { at } => self.collect(place(at)),
            Event::Expire { at } => self.expire(place(at)),
            Event::Backup { at } => {
                if let Some(region) = self.regions.get(place(at))
                    && region.is_active()
                    && self.takes_part(region)
                {
                    self.regions[place(at)].backup = Some(region.data.clone());
                }
            }
            Event::Restore { at } => self.restore(place(at))?,
            Event::Join { at } => self.join(place(at))?,
            Event::Fence { at } => self.fence(place(at)),
            Event::Hear { at, skip } => {
                self.hear(place(at), skip);
            }
        }
        Ok(())
    }

    fn write(
        &mut self,
        at: usize,
        operations: &[(u8, bool)],
        expires: bool,
        read_at: Option<usize>,
    ) {
        // Whether it takes writes, its log decides.
        if !self.regions.get(at).is_some_and(|region| region.exists) {
            return;
        }
        if self.rule.is_typed() {
            let seen = read_at.and_then(|at| self.regions.get(at)).map(|it| it.data.frontier());
            let mutations = operations.iter().map(|&(key, delete)| {
                self.values += 1;
                Mutation { context: seen.clone(), ..typed::mutation(key, delete, self.values) }
            });
            let mutations = mutations.collect();
            return self.request(at, Vec::new(), mutations);
        }
        let contexts: Vec<Option<VersionVector>> = operations
            .iter()
            .map(|&(key, _)| {
                let read = self.regions.get(read_at?)?;
                let record = read.data.memory.records.get(&(NAMESPACE, key_of(key)))?;
                Some(record.context().clone())
            })
            .collect();
        let mut values = self.values;
        let time = self.regions[at].stamp(self.now);
        let operations = operations.iter().zip(contexts).map(|(&(key, delete), context)| {
            values += 1;
            let content = if delete {
                Content::Tombstone
            } else {
                let expire = HybridTime::new(time.physical_ms() + 2_000, 0).filter(|_| expires);
                Content::Value { data: Bytes::from(values.to_string()), expire }
            };
            Operation { key: key_of(key), content, context }
        });
        let operations = operations.collect();
        self.values = values;
        self.request(at, operations, Vec::new());
    }

    /// A client asks for something new.
    fn request(&mut self, at: usize, operations: Vec<Operation>, mutations: Vec<Mutation>) {
        let now = self.now;
        let region = &mut self.regions[at];
        let write = Write {
            namespace: NAMESPACE,
            rule: self.rule,
            actor: region.actor(),
            time: region.stamp(now),
            request: Some(RequestId { client: 1, number: self.requests.len() as u64 + 1 }),
            checks: Vec::new(),
            operations,
            mutations,
        };
        self.requests.push(write.clone());
        self.propose(at, Command::Write(write), Waiter::Client);
    }

    /// A client that may not have heard of an answer asks again.
    fn repeat(&mut self, at: usize, back: usize) {
        let Some(write) = self.requests.iter().rev().nth(back).cloned() else { return };
        let now = self.now;
        let Some(region) = self.regions.get_mut(at).filter(|region| region.exists) else { return };
        let (actor, time) = (region.actor(), region.stamp(now));
        self.propose(at, Command::Write(Write { actor, time, ..write }), Waiter::Client);
    }

    /// What came of a request: whether it was executed, and not answered from memory.
    fn executed(
        &mut self,
        at: usize,
        write: &Write,
        results: &[Written],
        before: &VersionVector,
    ) -> Result<bool, Broken> {
        let Some(request) = write.request else { return Ok(true) };
        let data = &self.regions[at].data;
        if data.frontier() == *before {
            self.counts.repeats += 1;
            // A maximum that is held already is not written, and answered with the write that made it so.
            let is_held = |it: &Mutation| matches!(it.action, Action::Maximum(_));
            if !write.mutations.iter().any(is_held) {
                self.truth.check_answer(request, results)?;
            }
            return Ok(false);
        }
        let is_it = |seq: u64| before.get(write.actor) < seq;
        let has_it = data.memory.changes.values().any(|change| {
            let is_new = change.actor == write.actor && is_it(change.first_seq);
            !is_new && change.request.is_some_and(|requested| requested.id == request)
        });
        if has_it {
            let id = self.regions[at].id;
            let seen = format!("region {id} executed {request:?} again, whose change it has");
            return Err((Invariant::RequestOnce, seen));
        }
        self.counts.twins += u64::from(self.truth.was_executed(request));
        Ok(true)
    }

    fn propose(&mut self, at: usize, command: Command, waiter: Waiter) {
        self.regions[at].queue.push_back(Proposal { command, waiter });
    }

    /// Commits and applies one proposal.
    fn commit(&mut self, at: usize) -> Result<(), Broken> {
        let Some(region) = self.regions.get_mut(at) else { return Ok(()) };
        let Some(Proposal { command, waiter }) = region.queue.pop_front() else { return Ok(()) };
        // As through a log.
        let Ok(mut command) = Command::from_bytes(command.to_bytes()) else {
            return Err((Invariant::Convergence, format!("cannot be read back: {command:?}")));
        };
        match (&mut command, self.mutant) {
            (Command::Collect(collect), Some(Mutant::CollectUncounted)) => {
                collect.members = region.members().clone();
            }
            (Command::Ingest(ingest), Some(Mutant::TakeFromFenced)) => {
                ingest.source = region.actor();
            }
            (Command::Merge(merge), Some(Mutant::TakeFromFenced)) => merge.source = region.actor(),
            (Command::Merge(merge), Some(Mutant::RepairOnWhileStartingOver)) => {
                merge.local = region.actor();
            }
            (Command::Advance(advance), Some(Mutant::TakeFromFenced)) => {
                advance.source = region.actor();
            }
            _ => {}
        }
        let data_before = match &command {
            Command::Learn(_) | Command::StartOver(_) => Some(region.data.clone()),
            _ => None,
        };
        let before = region.data.frontier();
        let was_exact = region.data.is_exact();
        let contexts: Vec<VersionVector> = match &command {
            Command::Write(write) => {
                write.operations.iter().map(|it| context(&region.data, &it.key)).collect()
            }
            _ => Vec::new(),
        };
        let tombstones: Vec<(Bytes, VersionVector)> = match &command {
            Command::Collect(collect) => {
                collect.keys.iter().map(|key| (key.clone(), context(&region.data, key))).collect()
            }
            _ => Vec::new(),
        };
        let jumped = match &command {
            Command::Advance(_) => Some(region.data.memory.trimmed.clone()),
            _ => None,
        };
        let remembered = match (&command, self.mutant) {
            (Command::Ingest(_), Some(Mutant::ForgetHeardRequests)) => {
                Some(region.data.memory.requests.clone())
            }
            _ => None,
        };
        let Ok(outcome) = execute(&mut region.data, &command);
        if let Some(remembered) = remembered {
            region.data.memory.requests = remembered;
        }
        if let (Some(trimmed), Some(Mutant::AdvanceKeepsLog)) = (jumped, self.mutant) {
            self.regions[at].data.memory.trimmed = trimmed;
        }
        self.touched.insert(at);
        let short = |command: &Command| match command {
            Command::Write(write) => {
                let mutations = write.mutations.iter().map(|it| it.action.name());
                let mutations: Vec<_> = mutations.collect();
                format!("write {} {}", write.operations.len(), mutations.join(" "))
            }
            Command::Ingest(ingest) => {
                let dots: Vec<_> = ingest.changes.iter().map(|it| it.last().to_string()).collect();
                format!("ingest {}", dots.join(" "))
            }
            Command::Trim(trim) => format!("trim {}", trim.upto),
            Command::Collect(collect) => {
                format!("collect {:?} at {}", collect.keys, collect.stable)
            }
            Command::Merge(merge) => {
                let keys: Vec<_> = merge.offers.iter().map(|it| &it.key).collect();
                format!("merge {keys:?} of {} ahead {}", merge.cut, merge.ahead)
            }
            Command::Advance(advance) => format!("advance to {}", advance.cut),
            Command::Expire(expire) => format!("expire {:?}", expire.values),
            Command::Learn(members) => {
                let one = |(id, it): (RegionId, Member)| {
                    format!("region {id} is {:?} in incarnation {}", it.state, it.incarnation)
                };
                members.iter().map(one).collect::<Vec<_>>().join(", ")
            }
            Command::StartOver(start) => format!("start over as {}", start.local),
            Command::ForgetRequests(_)
            | Command::SetLink(..)
            | Command::ForgetReviewed(_)
            | Command::ForgetConflicts(_)
            | Command::Settle(_) => "another".to_owned(),
        };
        if self.trace.is_some() {
            let id = self.regions[at].id;
            let did = match &outcome {
                Outcome::Written(results) => {
                    let dots: Vec<_> =
                        results.iter().map(|it| format!("{} at {}", it.dot, it.time)).collect();
                    dots.join(", ")
                }
                Outcome::Ingested(ingested) => {
                    let frontier = &ingested.frontier;
                    match ingested.stopped {
                        Some(reason) => format!("{frontier}, stopped: {reason:?}"),
                        None => frontier.to_string(),
                    }
                }
                Outcome::Advanced(frontier) => frontier.to_string(),
                Outcome::ContextAhead { needed, .. } => format!("waits for {needed}"),
                Outcome::Merged(merged) => format!("{} changed", merged.changed),
                other => format!("{other:?}"),
            };
            self.note(|| format!("           region {id}: {} -> {did}", short(&command)));
        }
        if let Some(data_before) = data_before
            && data_before.memory.members != *self.regions[at].members()
        {
            self.learned(at, &data_before)?;
        }
        match (command, outcome) {
            (Command::Write(write), Outcome::Written(results)) => {
                let region = &mut self.regions[at];
                let wall_ms = region.wall_ms(self.now);
                for result in &results {
                    let _ = region.clock.observe(result.time, wall_ms, CLOCK_OFFSET_MAX_MS);
                }
                if !self.executed(at, &write, &results, &before)? {
                    return Ok(());
                }
                let region = &mut self.regions[at];
                let first = before.get(write.actor) + 1;
                let log = region.data.log(write.actor, first);
                let Some(change) = log.front().cloned() else {
                    let seen = format!("{}:{first} is not in the log", write.actor);
                    return Err((Invariant::LogWhole, seen));
                };
                // Of what a fenced region writes nothing is known to the others.
                let has_context = region.is_sealed
                    || write.operations.iter().any(|it| it.context.is_some())
                    || write.mutations.iter().any(|it| it.context.is_some());
                self.counts.writes += 1;
                self.counts.half_repaired_writes += u64::from(!was_exact);
                self.truth.write(change, &before, &contexts, has_context, was_exact)?;
                if region.is_sealed {
                    // Nobody takes it; it goes to the review queue.
                    self.truth.lose(&region.data.frontier(), &[before]);
                }
            }
            (Command::Write(_), _) => {}
            (Command::Expire(expire), Outcome::Expired(count)) if count > 0 => {
                self.counts.expired += count as u64;
                let region = &self.regions[at];
                let log = region.data.log(expire.actor, before.get(expire.actor) + 1);
                let Some(change) = log.front().cloned() else {
                    return Err((Invariant::LogWhole, "an expiry is not in the log".to_owned()));
                };
                // It replaces its own value only.
                self.truth.write(change, &before, &[], true, was_exact)?;
                if region.is_sealed {
                    self.truth.lose(&region.data.frontier(), &[before]);
                }
            }
            (Command::Ingest(_), Outcome::Ingested(ingested)) => {
                self.counts.applied += ingested.applied;
                self.counts.repeated += ingested.repeated;
                // What it takes back of a request that another region took as well.
                let region = &self.regions[at];
                let own = region.actor();
                for change in region.data.log(own, before.get(own) + 1) {
                    self.counts.taken_back += 1;
                    self.truth.write(change, &before, &[], true, was_exact)?;
                }
                match ingested.stopped {
                    Some(Stopped::OwnChangeUnknown) => {
                        return Err(reused("an own change is unknown"));
                    }
                    Some(Stopped::DotReused(dot)) => {
                        return Err(reused(&format!("{dot} is another")));
                    }
                    Some(Stopped::SourceOut) => self.counts.refused += 1,
                    Some(Stopped::Gap | Stopped::Dependency) | None => {}
                }
                if let Waiter::Stream(source, session) = waiter {
                    let now = self.now;
                    let Some(stream) = self.stream_of(at, source, session) else { return Ok(()) };
                    stream.ingesting = false;
                    stream.moved = now;
                    if matches!(ingested.stopped, Some(Stopped::Gap | Stopped::SourceOut)) {
                        self.break_stream(at, source);
                    } else {
                        self.acknowledge(at, source);
                    }
                }
            }
            (Command::Collect(_), Outcome::Collected(count)) => {
                self.counts.collected += count as u64;
                if !self.takes_part(&self.regions[at]) {
                    return Ok(());
                }
                // One that joins catches up with what went before it took part.
                let id = self.regions[at].id;
                let others: Vec<_> = self
                    .present()
                    .filter(|region| region.id != id && region.is_active())
                    .map(|region| (region.id.0, region.data.frontier()))
                    .collect();
                let data = &self.regions[at].data;
                let is_gone =
                    |key: &Bytes| !data.memory.records.contains_key(&(NAMESPACE, key.clone()));
                let local = data.frontier();
                for (key, context) in
                    tombstones.iter().filter(|(key, it)| !it.is_empty() && is_gone(key))
                {
                    self.truth.check_collected(key, context, &local, &others)?;
                }
            }
            (Command::Merge(_), outcome) => self.merged(at, waiter, &outcome)?,
            (Command::Advance(_), outcome) => self.advanced(at, waiter, &outcome)?,
            (_, _) => {}
        }
        Ok(())
    }

    fn crash(&mut self, at: usize) {
        let Some(region) = self.regions.get(at) else { return };
        if !region.exists {
            return;
        }
        self.counts.crashes += 1;
        self.lose_leader(at);
    }

    fn lose_leader(&mut self, at: usize) {
        self.break_all(at);
        let (ids, now) = (self.ids(), self.now);
        let region = &mut self.regions[at];
        region.queue.clear();
        region.leader = Leader::new(region.id, ids.into_iter(), now);
        region.clock = HybridClock::default();
    }

    fn ids(&self) -> Vec<RegionId> {
        self.regions.iter().map(|region| region.id).collect()
    }

    fn check(&mut self) -> Result<(), Broken> {
        if self.is_left_out {
            return Ok(());
        }
        for at in std::mem::take(&mut self.touched) {
            let region = &self.regions[at];
            if !self.takes_part(region) {
                continue;
            }
            self.truth
                .check(&region.data, &self.checked[at])
                .map_err(|(broken, seen)| (broken, format!("region {}: {seen}", region.id)))?;
            self.checked[at] = region.data.frontier();
            self.check_believed(at)?;
            self.check_equals(at)?;
        }
        Ok(())
    }

    fn check_believed(&self, at: usize) -> Result<(), Broken> {
        let region = &self.regions[at];
        for other in self.present() {
            let Some(believed) = region.leader.acknowledged.get(&other.actor()) else { continue };
            let actual = other.data.frontier();
            if !actual.covers_all(believed) {
                let (one, two) = (region.id, other.id);
                return Err((
                    Invariant::AcknowledgedSound,
                    format!("region {one} believes that {two} has {believed}; it has {actual}"),
                ));
            }
        }
        Ok(())
    }

    fn check_equals(&self, at: usize) -> Result<(), Broken> {
        let region = &self.regions[at];
        if !region.data.is_exact() {
            return Ok(());
        }
        let frontier = region.data.frontier();
        for other in self.present() {
            let is_comparable = other.data.is_exact() && other.data.frontier() == frontier;
            let (mine, theirs) = (&region.data.memory.records, &other.data.memory.records);
            if is_comparable && !invariant::hold_the_same(mine, theirs) {
                let (one, two) = (region.id, other.id);
                return Err((
                    Invariant::Convergence,
                    format!("regions {one} and {two} differ at {frontier}"),
                ));
            }
        }
        Ok(())
    }
}

fn key_of(number: u8) -> Bytes {
    let keys = keys();
    keys[usize::from(number) % keys.len()].clone()
}

fn context(data: &Data, key: &Bytes) -> VersionVector {
    let record = data.memory.records.get(&(NAMESPACE, key.clone()));
    record.map(|record| record.context().clone()).unwrap_or_default()
}

fn reused(seen: &str) -> Broken {
    (Invariant::NoDotReuse, seen.to_owned())
}
