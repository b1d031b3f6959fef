//! The state machine's transition function: command in, outcome out, the same on every replica.
//!
//! Invariants:
//! * Reads nothing but the command and the shard's state: no clock, no randomness, no map order.
//! * A command has all of its effects or, when its outcome says so, none.
//! * A write's time is later than everything it replaces, whatever the leader's clock said, so
//!   that under `lww` time extends the causal order.
//! * An actor's events are contiguous: the frontier moves by exactly what was applied.
//! * A request that is remembered is not executed, and one whose change was applied is remembered.
//!
//! Not here: where state is kept (`tombolo-storage`), who stamps time (`tombolo-shard`).

use std::{
    collections::BTreeMap,
    ops::Bound::{Included, Unbounded},
};

use bytes::Bytes;

use crate::{
    change::Change,
    command::{
        Advance, Answer, Collect, Command, Condition, Expire, FailedCheck, ForgetConflicts, Ingest,
        Ingested, LinkSetting, Merge, Merged, Outcome, Remembered, Settle, Stopped, Write, Written,
    },
    element,
    hlc::HybridTime,
    id::{Actor, Dot, NamespaceId, RegionId, RequestId},
    ledger::{Cause, LedgerEntry, Noted},
    members::{Member, MemberState, Members},
    record::{Content, Delta, Dropped, PushedOut, Record, Rule, Sibling},
    repair::{self, DotReused, Sides, Trust},
    request::{Requested, Tags},
    typed::{self, Addition, ELEMENT_BYTES_MAX, ELEMENTS_MAX, Mutated, Mutation, Refusal, Refused},
    vector::VersionVector,
};

/// Siblings that a local write leaves, its own included; the oldest above this are pushed out by
/// name, so that every region drops the same ones, and notes them.
pub const SIBLINGS_MAX: usize = 16;

/// A shard's state as the transition function sees it. Reads see earlier writes.
pub trait ShardState {
    /// Why state could not be read.
    type Error;

    /// The record of a key.
    fn record(&self, namespace: NamespaceId, key: &[u8]) -> Result<Option<Record>, Self::Error>;
    /// Records with a value whose keys lie in a range, in order: at most `limit`, from `from` on, before
    /// `to`.
    fn elements(
        &self,
        namespace: NamespaceId,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Bytes, Record)>, Self::Error>;
    /// Replaces the record of a key.
    fn put_record(&mut self, namespace: NamespaceId, key: &Bytes, record: Record);
    /// Removes the record of a key.
    fn remove_record(&mut self, namespace: NamespaceId, key: &Bytes);
    /// What is applied of a namespace.
    fn frontier(&self, namespace: NamespaceId) -> VersionVector;
    /// Moves the frontier.
    fn set_frontier(&mut self, namespace: NamespaceId, frontier: VersionVector);
    /// Up to where records may be ahead of the frontier, because a repair brought them.
    fn ahead(&self, namespace: NamespaceId) -> VersionVector;
    /// Notes up to where records may be ahead.
    fn set_ahead(&mut self, namespace: NamespaceId, ahead: VersionVector);
    /// The encoded change of an actor that begins with this sequence number, if the log still has
    /// it.
    fn logged(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        first_seq: u64,
    ) -> Result<Option<Bytes>, Self::Error>;
    /// Changes how this region pulls from another.
    fn set_link(&mut self, peer: RegionId, setting: LinkSetting);
    /// What this shard knows of the regions.
    fn members(&self) -> Members;
    /// Learns of regions.
    fn set_members(&mut self, members: Members);
    /// Drops all data, of every namespace, but keeps the present values that `region` wrote and `known`
    /// does not cover: for people to look at, not as data.
    fn start_over(&mut self, region: RegionId, known: &BTreeMap<NamespaceId, VersionVector>);
    /// Forgets a write that was kept when the shard started over.
    fn forget_reviewed(&mut self, namespace: NamespaceId, key: &Bytes, dot: Dot);
    /// Appends to the change log.
    fn append_change(&mut self, namespace: NamespaceId, change: &Change);
    /// Drops changes that `upto` covers. What it covers and the log does not have counts as
    /// dropped: the next change appended comes after it.
    fn trim_changes(&mut self, namespace: NamespaceId, upto: &VersionVector);
    /// Adds to the conflict ledger. An entry that is there already, under the same id, stays as it is.
    fn add_to_ledger(&mut self, namespace: NamespaceId, entry: LedgerEntry);
    /// Drops an entry of the ledger, if there is one that was noted then.
    fn forget_conflict(&mut self, namespace: NamespaceId, noted: Noted);
    /// What is remembered of a request.
    fn remembered(&self, request: RequestId) -> Result<Option<Remembered>, Self::Error>;
    /// Remembers a request.
    fn remember(&mut self, request: RequestId, remembered: &Remembered);
    /// Forgets a request.
    fn forget(&mut self, request: RequestId);
}

/// Whether a value is kept for review when `region` starts over: it wrote it, and the others, which
/// have `known`, do not have it.
pub fn to_review(held: &Sibling, region: RegionId, known: Option<&VersionVector>) -> bool {
    held.dot.actor.region == region && known.is_none_or(|known| !known.covers(held.dot))
}

/// Executes one command.
///
/// # Errors
/// Only if the state cannot be read; the replica must stop then.
pub fn execute<S: ShardState>(state: &mut S, command: &Command) -> Result<Outcome, S::Error> {
    match command {
        Command::Write(write) => execute_write(state, write),
        Command::Ingest(ingest) => execute_ingest(state, ingest),
        Command::Trim(trim) => {
            // Nothing that is not applied here may be forgotten, whoever asked for it.
            let upto = trim.upto.meet(&state.frontier(trim.namespace));
            state.trim_changes(trim.namespace, &upto);
            Ok(Outcome::Done)
        }
        Command::Collect(collect) => execute_collect(state, collect),
        Command::ForgetRequests(requests) => {
            for &request in requests {
                state.forget(request);
            }
            Ok(Outcome::Done)
        }
        Command::Merge(merge) => execute_merge(state, merge),
        Command::Advance(advance) => Ok(execute_advance(state, advance)),
        Command::Expire(expire) => execute_expire(state, expire),
        Command::Settle(settle) => execute_settle(state, settle),
        &Command::SetLink(peer, setting) => {
            state.set_link(peer, setting);
            Ok(Outcome::Done)
        }
        Command::Learn(members) => {
            learn(state, members.iter());
            Ok(Outcome::Done)
        }
        Command::StartOver(start) => {
            let Actor { region, incarnation } = start.local;
            let joining = Member { incarnation, state: MemberState::Joining };
            if state.members().said(region).is_none_or(|said| said < joining) {
                state.start_over(region, &start.known);
                let others = start.members.iter().filter(|(id, _)| *id != region);
                state.set_members(others.chain([(region, joining)]).collect());
            }
            Ok(Outcome::Done)
        }
        Command::ForgetReviewed(reviewed) => {
            for (key, dot) in &reviewed.writes {
                state.forget_reviewed(reviewed.namespace, key, *dot);
            }
            Ok(Outcome::Done)
        }
        Command::ForgetConflicts(ForgetConflicts { namespace, entries }) => {
            for &noted in entries {
                state.forget_conflict(*namespace, noted);
            }
            Ok(Outcome::Done)
        }
    }
}

/// Learns of regions.
fn learn<S: ShardState>(state: &mut S, said: impl IntoIterator<Item = (RegionId, Member)>) {
    let mut members = state.members();
    let mut is_news = false;
    for (region, member) in said {
        is_news |= members.learn(region, member);
    }
    if is_news {
        state.set_members(members);
    }
}

/// Whether something that came from `source` to `local` may be taken: the one is not shut out, and
/// both live as they did.
fn is_between<S: ShardState>(state: &S, local: Actor, source: Actor) -> bool {
    let members = state.members();
    members.admit(source) && members.actor(local.region) == local
}

/// What forbids `actor` to write; `None` if nothing does.
fn inactive<S: ShardState>(state: &S, actor: Actor) -> Option<Member> {
    let member = state.members().get(actor.region);
    let active = Member { incarnation: actor.incarnation, state: MemberState::Active };
    (member != active).then_some(member)
}

/// Whether a region that has applied `frontier` knows all that it wrote. If not, records have seen writes of
/// its own that it does not know, and would swallow its next one.
fn knows_itself<S: ShardState>(
    state: &S,
    namespace: NamespaceId,
    local: Actor,
    frontier: &VersionVector,
) -> bool {
    frontier.get(local) >= state.ahead(namespace).get(local)
}

fn execute_write<S: ShardState>(state: &mut S, write: &Write) -> Result<Outcome, S::Error> {
    if let Some(member) = inactive(state, write.actor) {
        return Ok(Outcome::NotActive(member));
    }
    let request = write.requested();
    if let Some(answer) = answered_before(state, write, request)? {
        return Ok(answer);
    }
    let frontier = state.frontier(write.namespace);
    if !knows_itself(state, write.namespace, write.actor, &frontier) {
        return Ok(Outcome::OwnChangeUnknown);
    }
    if let Some(needed) = context_ahead(state, write, &frontier)? {
        return Ok(Outcome::ContextAhead { needed, frontier });
    }
    let failed = failed_checks(state, write)?;
    if !failed.is_empty() {
        let failed_checks = failed.iter().map(|failed| failed.check).collect();
        remember(state, request, write.time, Answer::ChecksFailed(failed_checks));
        return Ok(Outcome::ChecksFailed(failed));
    }

    let place = Place { namespace: write.namespace, rule: write.rule, noted: write.time };
    let mut writing = Writing::new(&*state, place, write.actor, frontier);
    writing.tags = Tags::of(request);
    let mut results = Vec::with_capacity(write.operations.len() + write.mutations.len());
    for operation in &write.operations {
        let record = writing.record(&operation.key)?;
        let supersedes = record.superseded_by(operation.context.as_ref());
        let dots = pushed_out(&record, &supersedes, &operation.content);
        let pushed_out = PushedOut::of(dots, Cause::Bound);
        let replaced = Replaced { supersedes, pushed_out };
        let (key, content) = (operation.key.clone(), operation.content.clone());
        results.push(writing.add(record, key, content, replaced, write.time));
    }
    let asked = writing.bytes + write.mutations.iter().map(Mutation::bytes).sum::<usize>();
    for (place, mutation) in write.mutations.iter().enumerate() {
        match typed::mutate(&mut writing, mutation, write.time)? {
            Ok(Mutated { dot, time, conflict, sum }) => {
                // Elements have seen what this region has applied.
                let context = VersionVector::new();
                results.push(Written { dot, time, context, conflict, sum });
            }
            Err(refusal) => return Ok(refused(state, write, place, refusal)),
        }
        let elements = writing.deltas.len() - write.operations.len();
        if elements > ELEMENTS_MAX || writing.bytes > asked + ELEMENT_BYTES_MAX {
            return Ok(refused(state, write, place, Refusal::TooManyElements));
        }
    }
    let first = writing.first_dot();
    writing.finish().execute(state);
    let applied = state.frontier(write.namespace);
    for result in results.iter_mut().skip(write.operations.len()) {
        result.context.clone_from(&applied);
    }
    if request.is_some() {
        let answer = Answer::Written { first, results: results.clone() };
        remember(state, request, write.time, answer);
    }
    Ok(Outcome::Written(results))
}

/// Refuses a write for its mutation at `place`. A duplicate that is still on its way is refused, too.
fn refused<S: ShardState>(state: &mut S, write: &Write, place: usize, refusal: Refusal) -> Outcome {
    let refused = Refused { mutation: place, refusal };
    remember(state, write.requested(), write.time, Answer::Refused(refused));
    Outcome::Refused(refused)
}

/// What a request was answered when it came before; `None` if that is not remembered.
fn answered_before<S: ShardState>(
    state: &S,
    write: &Write,
    request: Option<Requested>,
) -> Result<Option<Outcome>, S::Error> {
    let Some(Requested { id, fingerprint }) = request else { return Ok(None) };
    let Some(before) = state.remembered(id)? else { return Ok(None) };
    if before.fingerprint != fingerprint {
        return Ok(Some(Outcome::RequestReused));
    }
    Ok(Some(match before.answer {
        Answer::Written { results, .. } => Outcome::Written(results),
        Answer::Refused(refused) => Outcome::Refused(refused),
        Answer::ChecksFailed(checks) => {
            let mut failed = Vec::with_capacity(checks.len());
            for check in checks {
                // The same fingerprint means the same checks.
                let Some(demanded) = write.checks.get(check) else { continue };
                let actual = state.record(write.namespace, &demanded.key)?;
                failed.push(FailedCheck { check, actual });
            }
            Outcome::ChecksFailed(failed)
        }
    }))
}

fn remember<S: ShardState>(
    state: &mut S,
    request: Option<Requested>,
    executed: HybridTime,
    answer: Answer,
) {
    if let Some(Requested { id, fingerprint }) = request {
        state.remember(id, &Remembered { executed, fingerprint, answer });
    }
}

fn execute_expire<S: ShardState>(state: &mut S, expire: &Expire) -> Result<Outcome, S::Error> {
    if let Some(member) = inactive(state, expire.actor) {
        return Ok(Outcome::NotActive(member));
    }
    let frontier = state.frontier(expire.namespace);
    if !knows_itself(state, expire.namespace, expire.actor, &frontier) {
        return Ok(Outcome::OwnChangeUnknown);
    }
    let place = Place { namespace: expire.namespace, rule: expire.rule, noted: expire.time };
    let mut writing = Writing::new(&*state, place, expire.actor, frontier);
    let mut expired = 0;
    for (key, dot) in &expire.values {
        let record = writing.record(key)?;
        let is_over = |held: &&Sibling| {
            held.dot == *dot
                && matches!(held.content, Content::Value { expire: Some(at), .. } if at <= expire.time)
        };
        if record.siblings().iter().find(is_over).is_some() {
            // Exactly this value: what is concurrent with it stays.
            let (key, content) = (key.clone(), Content::Tombstone);
            let replaced = Replaced { supersedes: vec![*dot], pushed_out: PushedOut::default() };
            writing.add(record, key, content, replaced, expire.time);
            expired += 1;
        }
    }
    writing.finish().execute(state);
    Ok(Outcome::Expired(expired))
}

/// Takes the latest of several siblings, where nobody has settled the key since it was written.
fn execute_settle<S: ShardState>(state: &mut S, settle: &Settle) -> Result<Outcome, S::Error> {
    if let Some(member) = inactive(state, settle.actor) {
        return Ok(Outcome::NotActive(member));
    }
    let frontier = state.frontier(settle.namespace);
    if !knows_itself(state, settle.namespace, settle.actor, &frontier) {
        return Ok(Outcome::OwnChangeUnknown);
    }
    let place = Place { namespace: settle.namespace, rule: settle.rule, noted: settle.time };
    for (key, since) in &settle.keys {
        let record = state.record(settle.namespace, key)?.unwrap_or_default();
        if record.siblings().len() < 2 || record.latest_time() != *since {
            // Settled, or another value came since: that one has a deadline of its own.
            continue;
        }
        let latest = |held: &&Sibling| (held.time, held.dot);
        // A value whose time is over does not win against one that can be read.
        let live = record.live_at(settle.time).map(|(held, _)| held).max_by_key(latest);
        let Some(kept) = live.or_else(|| record.siblings().iter().max_by_key(latest)) else {
            continue;
        };
        let content = kept.content.clone();
        // What several regions took of one request is one value, of which nothing is lost.
        let is_kept = |held: &&Sibling| held.dot == kept.dot || held.is_twin_of(kept);
        let (same, others): (Vec<&Sibling>, Vec<&Sibling>) =
            record.siblings().iter().partition(is_kept);
        let dots = |of: Vec<&Sibling>| of.into_iter().map(|held| held.dot).collect();
        let pushed_out = PushedOut::of(dots(others), Cause::Deadline);
        let replaced = Replaced { supersedes: dots(same), pushed_out };
        // A change of its own: it carries a value, and other regions apply changes whole.
        let frontier = state.frontier(settle.namespace);
        let mut writing = Writing::new(&*state, place, settle.actor, frontier);
        writing.add(record, key.clone(), content, replaced, settle.time);
        writing.finish().execute(state);
    }
    Ok(Outcome::Done)
}

/// The writes of one command, planned: they see each other, and nothing is changed before all are known.
pub(crate) struct Writing<'a, S: ShardState> {
    state: &'a S,
    place: Place,
    actor: Actor,
    /// Those of the client's request, if it is one with an id.
    tags: Tags,
    first_seq: u64,
    /// What was applied before.
    frontier: VersionVector,
    /// That, and what the records that are replaced have seen: they may be ahead of it.
    depends_on: VersionVector,
    deltas: Vec<Delta>,
    /// About how many bytes these have.
    bytes: usize,
    records: BTreeMap<Bytes, Record>,
    ledger: Vec<LedgerEntry>,
}

/// What a write takes the place of.
#[derive(Default)]
pub(crate) struct Replaced {
    /// Siblings that the writer has seen.
    pub(crate) supersedes: Vec<Dot>,
    /// Siblings that go all the same.
    pub(crate) pushed_out: PushedOut,
}

impl<'a, S: ShardState> Writing<'a, S> {
    fn new(state: &'a S, place: Place, actor: Actor, frontier: VersionVector) -> Self {
        let first_seq = frontier.get(actor) + 1;
        let depends_on = frontier.clone();
        Self {
            state,
            place,
            actor,
            first_seq,
            frontier,
            depends_on,
            tags: Tags::default(),
            deltas: Vec::new(),
            bytes: 0,
            records: BTreeMap::new(),
            ledger: Vec::new(),
        }
    }

    pub(crate) fn rule(&self) -> Rule {
        self.place.rule
    }

    pub(crate) fn actor(&self) -> Actor {
        self.actor
    }

    /// The identity of the next write.
    pub(crate) fn next_dot(&self) -> Dot {
        Dot { actor: self.actor, seq: self.first_seq + self.deltas.len() as u64 }
    }

    /// The identity of the first write that is planned.
    fn first_dot(&self) -> Option<Dot> {
        let first = Dot { actor: self.actor, seq: self.first_seq };
        (!self.deltas.is_empty()).then_some(first)
    }

    /// The record of a key, after the writes that are planned.
    pub(crate) fn record(&self, key: &[u8]) -> Result<Record, S::Error> {
        match self.records.get(key) {
            Some(record) => Ok(record.clone()),
            None => Ok(self.state.record(self.place.namespace, key)?.unwrap_or_default()),
        }
    }

    /// Records with a value in a range of keys, after the writes that are planned: at least `limit` of
    /// them, if there are so many.
    pub(crate) fn elements(
        &self,
        from: &[u8],
        to: Option<Vec<u8>>,
        limit: usize,
    ) -> Result<Vec<(Bytes, Record)>, S::Error> {
        // So many may have been deleted by what is planned.
        let limit = limit + self.records.len();
        let to = to.as_deref();
        let held = self.state.elements(self.place.namespace, from, to, limit)?;
        if self.records.is_empty() {
            return Ok(held);
        }
        let mut merged: BTreeMap<Bytes, Record> = held.into_iter().collect();
        for (key, record) in self.records.range::<[u8], _>((Included(from), Unbounded)) {
            if to.is_some_and(|to| to <= &key[..]) {
                break;
            }
            merged.insert(key.clone(), record.clone());
        }
        Ok(merged.into_iter().filter(|(_, record)| !record.is_dead()).collect())
    }

    /// The first record with a value in a range of keys.
    pub(crate) fn first_element(
        &self,
        from: &[u8],
        to: Option<Vec<u8>>,
    ) -> Result<Option<(Bytes, Record)>, S::Error> {
        Ok(self.elements(from, to, 1)?.into_iter().next())
    }

    /// Writes an element.
    pub(crate) fn write(
        &mut self,
        record: Record,
        key: Bytes,
        content: Content,
        replaced: Replaced,
        time: HybridTime,
    ) -> Mutated {
        let Written { dot, time, conflict, .. } = self.add(record, key, content, replaced, time);
        Mutated { dot, time, conflict, sum: None }
    }

    /// Writes `content` over `record`, which is that of `key`.
    fn add(
        &mut self,
        mut record: Record,
        key: Bytes,
        content: Content,
        Replaced { supersedes, pushed_out }: Replaced,
        time: HybridTime,
    ) -> Written {
        let dot = self.next_dot();
        let others = record.context().iter().filter(|(actor, _)| *actor != self.actor);
        others.for_each(|(actor, seq)| self.depends_on.advance(actor, seq));
        let time = time.max(record.latest_time().next());
        let request = self.tags.next(&key);
        let sibling = Sibling { dot, time, request, content };
        let delta = Delta { key, sibling, supersedes, pushed_out };
        let Place { rule, noted, .. } = self.place;
        let dropped = apply(&mut record, &delta, &self.frontier, rule);
        let conflict = !dropped.is_empty() || record.versions() > 1;
        let entry = |dropped| LedgerEntry::new(delta.key.clone(), dropped, noted);
        self.ledger.extend(dropped.into_iter().map(entry));
        let context = record.context().clone();
        self.records.insert(delta.key.clone(), record);
        self.bytes += delta.key.len() + delta.sibling.content.bytes();
        self.deltas.push(delta);
        Written { dot, time, context, conflict, sum: None }
    }

    fn finish(self) -> Planned {
        let Self {
            place,
            actor,
            tags,
            first_seq,
            frontier,
            depends_on,
            deltas,
            records,
            ledger,
            ..
        } = self;
        let ahead_by = depends_on.minus(&frontier);
        let request = tags.request();
        let change = Change { actor, first_seq, depends_on, ahead_by, request, deltas };
        Planned { namespace: place.namespace, change, records, ledger }
    }
}

/// What the writes of one command come to.
struct Planned {
    namespace: NamespaceId,
    change: Change,
    records: BTreeMap<Bytes, Record>,
    ledger: Vec<LedgerEntry>,
}

impl Planned {
    fn execute<S: ShardState>(self, state: &mut S) {
        let Self { namespace, change, records, ledger } = self;
        for (key, record) in records {
            state.put_record(namespace, &key, record);
        }
        for entry in ledger {
            state.add_to_ledger(namespace, entry);
        }
        if !change.deltas.is_empty() {
            append(state, namespace, &change);
        }
    }
}

fn execute_ingest<S: ShardState>(state: &mut S, ingest: &Ingest) -> Result<Outcome, S::Error> {
    let mut ingested = Ingested {
        applied: 0,
        repeated: 0,
        frontier: state.frontier(ingest.namespace),
        stopped: None,
        reused: None,
    };
    if !is_between(state, ingest.local, ingest.source) {
        ingested.stopped = Some(Stopped::SourceOut);
        return Ok(Outcome::Ingested(ingested));
    }
    for change in &ingest.changes {
        if ingested.frontier.covers(change.last()) {
            if is_another(state, ingest.namespace, change)? {
                let dot = Dot { actor: change.actor, seq: change.first_seq };
                ingested.stopped = Some(Stopped::DotReused(dot));
                break;
            }
            ingested.repeated += 1;
            continue;
        }
        if let Some(reason) = cannot_take(ingest, change, &ingested.frontier) {
            ingested.stopped = Some(reason);
            break;
        }
        let seen = change.seen();
        let mut conflicts = Vec::with_capacity(change.deltas.len());
        let mut added = Vec::new();
        for delta in &change.deltas {
            let mut record = state.record(ingest.namespace, &delta.key)?.unwrap_or_default();
            typed::note_addition(&mut added, &record, delta);
            let dropped = apply(&mut record, delta, &seen, ingest.rule);
            conflicts.push(!dropped.is_empty() || record.versions() > 1);
            for dropped in dropped {
                let entry = LedgerEntry::new(delta.key.clone(), dropped, ingest.time);
                state.add_to_ledger(ingest.namespace, entry);
            }
            state.put_record(ingest.namespace, &delta.key, record);
        }
        append(state, ingest.namespace, change);
        ingested.frontier.add(change.last());
        ingested.applied += 1;
        if !added.is_empty() && gives_way(state, ingest, change, added)? {
            ingested.frontier = state.frontier(ingest.namespace);
        } else if let Some(reused) = remember_change(state, change, &conflicts, ingest.time)? {
            ingested.reused.get_or_insert(reused);
        }
    }
    Ok(Outcome::Ingested(ingested))
}

/// Takes back what this region had added to counters for the request of a change, if it took that before it
/// heard that the other did, and is the one of the two that gives way: values can be shown as one, sums cannot.
fn gives_way<S: ShardState>(
    state: &mut S,
    ingest: &Ingest,
    change: &Change,
    added: Vec<Addition>,
) -> Result<bool, S::Error> {
    let Ingest { namespace, rule, local, time, .. } = *ingest;
    let Some(Requested { id, fingerprint }) = change.request else { return Ok(false) };
    let frontier = state.frontier(namespace);
    let may_write =
        inactive(state, local).is_none() && knows_itself(state, namespace, local, &frontier);
    if local.region < change.actor.region || !may_write {
        return Ok(false);
    }
    let Some(Remembered { executed, fingerprint: taken, answer }) = state.remembered(id)? else {
        return Ok(false);
    };
    let Answer::Written { first: Some(first), results } = answer else { return Ok(false) };
    if first.actor != local || taken != fingerprint {
        return Ok(false);
    }
    let own = results.iter().filter(|it| it.dot.actor == local).map(|it| it.dot.seq);
    let own = (first.seq, own.max().unwrap_or(first.seq));
    let mut writing =
        Writing::new(&*state, Place { namespace, rule, noted: time }, local, frontier);
    for addition in added {
        typed::take_back(&mut writing, addition, own, time)?;
    }
    writing.finish().execute(state);
    // From now on the request is that region's, so that nothing is taken back twice. Who asks again is
    // answered as before.
    let first = Some(Dot { actor: change.actor, seq: change.first_seq });
    let answer = Answer::Written { first, results };
    state.remember(id, &Remembered { executed, fingerprint, answer });
    Ok(true)
}

/// Remembers the request that a change of another region carries out, so that a repeat of it here is
/// answered with that change. Answers the request's id if it stands for another write here.
fn remember_change<S: ShardState>(
    state: &mut S,
    change: &Change,
    conflicts: &[bool],
    now: HybridTime,
) -> Result<Option<RequestId>, S::Error> {
    let Some(request) = change.request else { return Ok(None) };
    if let Some(before) = state.remembered(request.id)? {
        if before.fingerprint != request.fingerprint {
            return Ok(Some(request.id));
        }
        match before.answer {
            // This region took it, too, or heard of another that did: the first answer stays.
            Answer::Written { .. } => return Ok(None),
            // It could not be made here, but where it could the write stands.
            Answer::ChecksFailed(_) | Answer::Refused(_) => {}
        }
    }
    remember_heard(state, change, conflicts, now);
    Ok(None)
}

/// Remembers as the answer of a change's request what its origin answered, whatever was remembered. Its age
/// counts from when this region heard of it: a change may come late, or from a clock that is behind.
fn remember_heard<S: ShardState>(
    state: &mut S,
    change: &Change,
    conflicts: &[bool],
    now: HybridTime,
) {
    // What the origin had seen: of each key, what its record had, but for what a repair brought ahead.
    let mut context = change.seen().into_owned();
    let results = change.deltas.iter().zip(conflicts).map(|(delta, &conflict)| {
        let Sibling { dot, time, .. } = delta.sibling;
        context.add(dot);
        Written { dot, time, context: context.clone(), conflict, sum: None }
    });
    let results: Vec<Written> = results.collect();
    let first = Some(Dot { actor: change.actor, seq: change.first_seq });
    let answer = Answer::Written { first, results };
    remember(state, change.request, change.time().max(now), answer);
}

/// Whether the log holds a different change under the same dots.
fn is_another<S: ShardState>(
    state: &S,
    namespace: NamespaceId,
    change: &Change,
) -> Result<bool, S::Error> {
    let held = state.logged(namespace, change.actor, change.first_seq)?;
    Ok(held.is_some_and(|held| held != change.to_bytes()))
}

fn cannot_take(ingest: &Ingest, change: &Change, frontier: &VersionVector) -> Option<Stopped> {
    let is_own = change.actor.region == ingest.local.region;
    if is_own && ingest.local <= change.actor {
        return Some(Stopped::OwnChangeUnknown);
    }
    if change.first_seq != frontier.get(change.actor) + 1 {
        return Some(Stopped::Gap);
    }
    if !frontier.covers_all(&change.depends_on) {
        return Some(Stopped::Dependency);
    }
    None
}

/// Drops the tombstones that every region has applied, and of which nothing older can come.
fn execute_collect<S: ShardState>(state: &mut S, collect: &Collect) -> Result<Outcome, S::Error> {
    // Nothing may be called stable that is not even applied here.
    let stable = collect.stable.meet(&state.frontier(collect.namespace));
    let mut collected = 0;
    if state.members() != collect.members {
        // One that came since may need them.
        return Ok(Outcome::Collected(collected));
    }
    for key in &collect.keys {
        let record = state.record(collect.namespace, key)?;
        if record.is_some_and(|it| it.is_dead() && stable.covers_all(it.context())) {
            state.remove_record(collect.namespace, key);
            collected += 1;
        }
    }
    Ok(Outcome::Collected(collected))
}

fn execute_merge<S: ShardState>(state: &mut S, merge: &Merge) -> Result<Outcome, S::Error> {
    if !is_between(state, merge.local, merge.source) {
        return Ok(Outcome::SourceOut);
    }
    let namespace = merge.namespace;
    let applied = state.frontier(namespace);
    if merge.trust == Trust::Neither && applied != merge.cut {
        // Something was written since: a difference may be its work.
        return Ok(Outcome::Moved);
    }
    let sides = Sides { applied: &applied, cut: &merge.cut, trust: merge.trust };
    let mut merged = Merged::default();
    for offer in &merge.offers {
        let mine = state.record(namespace, &offer.key)?.unwrap_or_default();
        match repair::merge(&mine, offer, sides, merge.rule) {
            Ok((joined, _)) if joined == mine => {}
            Ok((joined, dropped)) => {
                let known = typed::unseen(merge.rule, &offer.key, &mine);
                let unseen = typed::unseen(merge.rule, &offer.key, &joined);
                for dropped in dropped.into_iter().chain(newly_lost(&known, unseen)) {
                    let entry = LedgerEntry::new(offer.key.clone(), dropped, merge.time);
                    state.add_to_ledger(namespace, entry);
                }
                state.put_record(namespace, &offer.key, joined);
                merged.changed += 1;
            }
            Err(DotReused(dot)) => {
                merged.reused.get_or_insert(dot);
            }
        }
    }
    for entry in &merge.ledger {
        // Passing an entry on does not renew it, and another region's clock does not keep it for ever.
        let noted = entry.noted.min(merge.time);
        state.add_to_ledger(namespace, LedgerEntry { noted, ..entry.clone() });
    }
    note_ahead(state, namespace, &[&merge.cut, &merge.ahead]);
    Ok(Outcome::Merged(merged))
}

fn execute_advance<S: ShardState>(state: &mut S, advance: &Advance) -> Outcome {
    if !is_between(state, advance.local, advance.source) {
        return Outcome::SourceOut;
    }
    let namespace = advance.namespace;
    let mut frontier = state.frontier(namespace);
    if frontier.get(advance.local) < advance.cut.get(advance.local) {
        return Outcome::OwnChangeUnknown;
    }
    let others = |vector: &VersionVector| -> VersionVector {
        vector.iter().filter(|(actor, _)| *actor != advance.local).collect()
    };
    if others(&frontier) != others(&advance.since) {
        return Outcome::Moved;
    }
    let is_new = |&(actor, seq): &(Actor, u64)| frontier.get(actor) < seq;
    let jumped: VersionVector = advance.cut.iter().filter(is_new).collect();
    frontier.join(&advance.cut);
    // Their changes never came here: whoever wants them from here must repair, too.
    state.trim_changes(namespace, &jumped);
    state.set_frontier(namespace, frontier.clone());
    note_ahead(state, namespace, &[&advance.ahead]);
    Outcome::Advanced(frontier)
}

fn note_ahead<S: ShardState>(state: &mut S, namespace: NamespaceId, vectors: &[&VersionVector]) {
    let mut ahead = state.ahead(namespace);
    let frontier = state.frontier(namespace);
    let before = ahead.clone();
    vectors.iter().for_each(|vector| ahead.join(vector));
    if frontier.covers_all(&ahead) {
        ahead = VersionVector::new();
    }
    if ahead != before {
        state.set_ahead(namespace, ahead);
    }
}

/// Where a delta is applied.
#[derive(Clone, Copy)]
struct Place {
    namespace: NamespaceId,
    rule: Rule,
    /// When what is dropped there is noted.
    noted: HybridTime,
}

/// Applies a write, and answers what was lost with it.
fn apply(record: &mut Record, delta: &Delta, seen: &VersionVector, rule: Rule) -> Vec<Dropped> {
    let known = typed::unseen(rule, &delta.key, record);
    let mut dropped = record.apply(delta, seen, rule);
    dropped.extend(newly_lost(&known, typed::unseen(rule, &delta.key, record)));
    dropped
}

/// Of what is `unseen` in a record, what was not `known` to be.
fn newly_lost(known: &[Dropped], mut unseen: Vec<Dropped>) -> Vec<Dropped> {
    unseen.retain(|lost| known.iter().all(|before| before.loser.dot != lost.loser.dot));
    unseen
}

fn append<S: ShardState>(state: &mut S, namespace: NamespaceId, change: &Change) {
    state.append_change(namespace, change);
    let mut frontier = state.frontier(namespace);
    frontier.add(change.last());
    state.set_frontier(namespace, frontier);
}

/// What the write's contexts have seen, and those of its checks, if this region has not applied all of
/// it. What a repair brought ahead of the frontier counts for its own key, unless that has many records.
fn context_ahead<S: ShardState>(
    state: &S,
    write: &Write,
    frontier: &VersionVector,
) -> Result<Option<VersionVector>, S::Error> {
    let mut needed = VersionVector::new();
    let of_operations =
        write.operations.iter().filter_map(|it| Some((&it.key, it.context.as_ref()?)));
    let of_checks = write.checks.iter().filter_map(|it| match &it.condition {
        Condition::ContextCurrent(context) => Some((&it.key, context)),
        Condition::Absent
        | Condition::Present
        | Condition::DotEquals(_)
        | Condition::DataEquals(_) => None,
    });
    for (key, context) in of_operations.chain(of_checks) {
        if frontier.covers_all(context) {
            continue;
        }
        let record = state.record(write.namespace, key)?;
        let mut here = frontier.clone();
        record.iter().for_each(|record| here.join(record.context()));
        if !here.covers_all(context) {
            needed.join(context);
        }
    }
    for context in write.mutations.iter().filter_map(|mutation| mutation.context.as_ref()) {
        if !frontier.covers_all(context) {
            needed.join(context);
        }
    }
    Ok((!needed.is_empty()).then_some(needed))
}

fn failed_checks<S: ShardState>(state: &S, write: &Write) -> Result<Vec<FailedCheck>, S::Error> {
    let mut failed = Vec::new();
    for (check, demanded) in write.checks.iter().enumerate() {
        if write.rule.is_typed() {
            let under = element::prefix(&demanded.key, &[]);
            let to = element::end_of(&under);
            let first = state.elements(write.namespace, &under, to.as_deref(), 1)?;
            if !demanded.condition.holds_for_typed(!first.is_empty()) {
                failed.push(FailedCheck { check, actual: None });
            }
            continue;
        }
        let actual = state.record(write.namespace, &demanded.key)?;
        if !demanded.condition.holds(actual.as_ref(), write.time) {
            failed.push(FailedCheck { check, actual });
        }
    }
    Ok(failed)
}

/// The oldest of the siblings that a write of `content` leaves, as many as are above the bound.
fn pushed_out(record: &Record, supersedes: &[Dot], content: &Content) -> Vec<Dot> {
    let mut kept: Vec<&Sibling> =
        record.siblings().iter().filter(|held| !supersedes.contains(&held.dot)).collect();
    let added = usize::from(*content != Content::Tombstone);
    let above = (kept.len() + added).saturating_sub(SIBLINGS_MAX);
    kept.sort_by_key(|held| (held.time, held.dot));
    kept.iter().take(above).map(|held| held.dot).collect()
}

#[cfg(test)]
mod conflict_tests;
#[cfg(test)]
mod tests;
