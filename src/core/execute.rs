//! The state machine's transition function: command in, outcome out, the same on every replica.
//!
//! Invariants:
//! * Reads nothing but the command and the shard's state: no clock, no randomness, no map order.
//! * A command has all of its effects or, when its outcome says so, none.
//! * A write's time is later than everything it replaces, whatever the leader's clock said, so
//!   that under `lww` time extends the causal order.
//! * An actor's events are contiguous: the frontier moves by exactly what was applied.
//!
//! Not here: where state is kept (`tombolo-storage`), who stamps time (`tombolo-shard`).

use bytes::Bytes;

use crate::{
    change::Change,
    command::{
        Collect, Command, FailedCheck, Ingest, Ingested, Outcome, Remembered, Stopped, Write,
        Written,
    },
    id::{Dot, NamespaceId, RequestId},
    ledger::LedgerEntry,
    record::{Delta, Record, Rule, Sibling},
    vector::VersionVector,
};

/// Siblings that a local write leaves beside its own; the oldest above this are superseded by
/// name, so that every region drops the same ones.
pub const SIBLINGS_MAX: usize = 16;

/// A shard's state as the transition function sees it. Reads see earlier writes.
pub trait ShardState {
    /// Why state could not be read.
    type Error;

    /// The record of a key.
    fn record(&self, namespace: NamespaceId, key: &[u8]) -> Result<Option<Record>, Self::Error>;
    /// Replaces the record of a key.
    fn put_record(&mut self, namespace: NamespaceId, key: &Bytes, record: Record);
    /// Removes the record of a key.
    fn remove_record(&mut self, namespace: NamespaceId, key: &Bytes);
    /// What is applied of a namespace.
    fn frontier(&self, namespace: NamespaceId) -> VersionVector;
    /// Moves the frontier.
    fn set_frontier(&mut self, namespace: NamespaceId, frontier: VersionVector);
    /// Appends to the change log.
    fn append_change(&mut self, namespace: NamespaceId, change: &Change);
    /// Drops changes that `upto` covers.
    fn trim_changes(&mut self, namespace: NamespaceId, upto: &VersionVector);
    /// Adds to the conflict ledger.
    fn add_to_ledger(&mut self, namespace: NamespaceId, entry: LedgerEntry);
    /// What is remembered of a request.
    fn remembered(&self, request: RequestId) -> Result<Option<Remembered>, Self::Error>;
    /// Remembers a request.
    fn remember(&mut self, request: RequestId, remembered: &Remembered);
    /// Forgets a request.
    fn forget(&mut self, request: RequestId);
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
    }
}

fn execute_write<S: ShardState>(state: &mut S, write: &Write) -> Result<Outcome, S::Error> {
    let fingerprint = if write.request.is_some() { write.fingerprint() } else { 0 };
    if let Some(request) = write.request
        && let Some(before) = state.remembered(request)?
    {
        return Ok(if before.fingerprint == fingerprint {
            Outcome::Written(before.results)
        } else {
            Outcome::RequestReused
        });
    }
    let frontier = state.frontier(write.namespace);
    if let Some(needed) = context_ahead(write, &frontier) {
        return Ok(Outcome::ContextAhead { needed, frontier });
    }
    let failed = failed_checks(state, write)?;
    if !failed.is_empty() {
        return Ok(Outcome::ChecksFailed(failed));
    }

    let first_seq = frontier.get(write.actor) + 1;
    let mut deltas = Vec::with_capacity(write.operations.len());
    let mut results = Vec::with_capacity(write.operations.len());
    for (seq, operation) in (first_seq..).zip(&write.operations) {
        let dot = Dot { actor: write.actor, seq };
        let mut record = state.record(write.namespace, &operation.key)?.unwrap_or_default();
        let mut supersedes = record.superseded_by(operation.context.as_ref());
        supersede_oldest(&record, &mut supersedes);
        let time = write.time.max(record.latest_time().next());
        let sibling = Sibling { dot, time, content: operation.content.clone() };
        let delta = Delta { key: operation.key.clone(), sibling, supersedes };

        let place = Place { namespace: write.namespace, rule: write.rule };
        let conflict = apply_delta(state, place, &mut record, &delta, &frontier);
        results.push(Written { dot, time, context: record.context().clone(), conflict });
        state.put_record(write.namespace, &delta.key, record);
        deltas.push(delta);
    }
    if !deltas.is_empty() {
        let change = Change { actor: write.actor, first_seq, depends_on: frontier, deltas };
        append(state, write.namespace, &change);
    }
    if let Some(request) = write.request {
        let remembered = Remembered { executed: write.time, fingerprint, results };
        state.remember(request, &remembered);
        return Ok(Outcome::Written(remembered.results));
    }
    Ok(Outcome::Written(results))
}

fn execute_ingest<S: ShardState>(state: &mut S, ingest: &Ingest) -> Result<Outcome, S::Error> {
    let mut ingested = Ingested {
        applied: 0,
        repeated: 0,
        frontier: state.frontier(ingest.namespace),
        stopped: None,
    };
    for change in &ingest.changes {
        if ingested.frontier.covers(change.last()) {
            ingested.repeated += 1;
            continue;
        }
        if let Some(reason) = cannot_take(ingest, change, &ingested.frontier) {
            ingested.stopped = Some(reason);
            break;
        }
        for delta in &change.deltas {
            let mut record = state.record(ingest.namespace, &delta.key)?.unwrap_or_default();
            let place = Place { namespace: ingest.namespace, rule: ingest.rule };
            apply_delta(state, place, &mut record, delta, &change.depends_on);
            state.put_record(ingest.namespace, &delta.key, record);
        }
        append(state, ingest.namespace, change);
        ingested.frontier.add(change.last());
        ingested.applied += 1;
    }
    Ok(Outcome::Ingested(ingested))
}

fn cannot_take(ingest: &Ingest, change: &Change, frontier: &VersionVector) -> Option<Stopped> {
    if change.actor == ingest.local {
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
    for key in &collect.keys {
        let record = state.record(collect.namespace, key)?;
        if record.is_some_and(|it| it.is_dead() && stable.covers_all(it.context())) {
            state.remove_record(collect.namespace, key);
            collected += 1;
        }
    }
    Ok(Outcome::Collected(collected))
}

/// Where a delta is applied.
#[derive(Clone, Copy)]
struct Place {
    namespace: NamespaceId,
    rule: Rule,
}

/// Applies a delta to a record, writes the ledger, and answers whether there is a conflict.
fn apply_delta<S: ShardState>(
    state: &mut S,
    Place { namespace, rule }: Place,
    record: &mut Record,
    delta: &Delta,
    seen: &VersionVector,
) -> bool {
    let dropped = record.apply(delta, seen, rule);
    let conflict = !dropped.is_empty() || record.siblings().len() > 1;
    for dropped in dropped {
        state.add_to_ledger(namespace, LedgerEntry::new(delta.key.clone(), dropped));
    }
    conflict
}

fn append<S: ShardState>(state: &mut S, namespace: NamespaceId, change: &Change) {
    state.append_change(namespace, change);
    let mut frontier = state.frontier(namespace);
    frontier.add(change.last());
    state.set_frontier(namespace, frontier);
}

/// What the write's contexts have seen, if this region has not applied all of it.
fn context_ahead(write: &Write, frontier: &VersionVector) -> Option<VersionVector> {
    let mut needed = VersionVector::new();
    for context in write.operations.iter().filter_map(|operation| operation.context.as_ref()) {
        needed.join(context);
    }
    (!frontier.covers_all(&needed)).then_some(needed)
}

fn failed_checks<S: ShardState>(state: &S, write: &Write) -> Result<Vec<FailedCheck>, S::Error> {
    let mut failed = Vec::new();
    for (check, demanded) in write.checks.iter().enumerate() {
        let actual = state.record(write.namespace, &demanded.key)?;
        if !demanded.condition.holds(actual.as_ref(), write.time) {
            failed.push(FailedCheck { check, actual });
        }
    }
    Ok(failed)
}

/// Adds the oldest siblings to `supersedes` until the bound holds.
fn supersede_oldest(record: &Record, supersedes: &mut Vec<Dot>) {
    let mut kept: Vec<&Sibling> =
        record.siblings().iter().filter(|held| !supersedes.contains(&held.dot)).collect();
    let above = (kept.len() + 1).saturating_sub(SIBLINGS_MAX);
    kept.sort_by_key(|held| (held.time, held.dot));
    supersedes.extend(kept.iter().take(above).map(|held| held.dot));
}

#[cfg(test)]
mod tests;
