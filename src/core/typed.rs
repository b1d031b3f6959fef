//! Typed values: what operations on counters, sets, maps, flags and extremes do, and what a reader sees.
//!
//! A value is a set of elements ([`crate::element`]), one record each. An operation becomes writes of
//! single elements, with exact dots of what each replaces; those travel, merge and go like any other
//! write, so a type needs no merge function of its own. What concurrent operations amount to:
//!
//! | kind | meaning |
//! |---|---|
//! | counter | the sum of all additions, but those that a deletion had seen |
//! | set | an entry is in if an addition of it was not seen by a removal |
//! | flag | on if a switching on was not seen by a switching off |
//! | max, min | the extreme of all values, but those that a deletion had seen |
//! | register | the latest assignment, by hybrid time and dot, that no later write had seen |
//! | map | each field by itself; the same name with two kinds is two fields |
//!
//! Invariants:
//! * A mutation is planned as a whole: what is refused has changed nothing.
//! * A counter is exact: no addition is lost or counted twice, whatever is deleted concurrently. Each
//!   region's share is cumulative and only that region writes it; a deletion leaves a
//!   [`Content::Reset`] that says how much of it it had seen. Of two regions that took one request the
//!   one with the higher number takes its addition back when it hears of the other's: the other's stands
//!   unless a deletion had seen that, and its own is gone whatever a deletion had seen.
//! * A value that is no larger than the maximum that is held changes nothing, not even if that maximum
//!   is being deleted elsewhere.
//!
//! Source: sets, flags and maps as in Almeida, Shoker and Baquero, "Delta State Replicated Data Types"
//! (2018), with the causal context of the whole shard. Why counters need resets: Baquero, Almeida and
//! Lerche, "The Problem with Embedded CRDT Counters and a Solution" (2016).
//!
//! Not here: where elements lie (`tombolo-storage`), pages of them (`tombolo-service`).

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    element::{self, Element, Kind, Part},
    execute::{Replaced, ShardState, Writing},
    hlc::HybridTime,
    id::{Actor, Dot},
    ledger::Cause,
    record::{Content, Count, Delta, Dropped, PushedOut, Record, Rule, Sibling, TakenBack},
    vector::VersionVector,
};

/// Most elements that one write changes, a deletion's included: it is one entry of the log, here and in every
/// region that applies it.
pub const ELEMENTS_MAX: usize = 4096;
/// Bytes that these may have beside what the request itself has.
pub(crate) const ELEMENT_BYTES_MAX: usize = 4 << 20;
/// Most additions that a share remembers to have taken back. Of an earlier one a deletion that had seen it,
/// and not that it was taken back, takes away too much.
const TAKEN_BACK_MAX: usize = 32;
/// Regions, in all their lives, that add to one counter. No more exist.
const SHARES_MAX: usize = 1024;

/// One operation on a typed value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// The user's key.
    pub key: Bytes,
    /// Where in a map; empty outside of maps.
    pub path: Vec<Bytes>,
    /// What to do.
    pub action: Action,
    /// Replace exactly what this has seen; `None` replaces all that is there.
    pub context: Option<VersionVector>,
}

/// What an operation does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Adds to a counter.
    Add(i64),
    /// Puts an entry into a set.
    Insert(Bytes),
    /// Takes an entry out of a set.
    Remove(Bytes),
    /// Assigns a register.
    Assign(Bytes),
    /// Switches a flag on.
    Enable,
    /// Switches a flag off.
    Disable,
    /// Raises a maximum.
    Maximum(Bytes),
    /// Lowers a minimum.
    Minimum(Bytes),
    /// Deletes all that is there: a value, a field, or all fields under it.
    Clear,
}

impl Action {
    /// The kind of value that it is for; `None` for any.
    pub const fn kind(&self) -> Option<Kind> {
        match self {
            Self::Add(_) => Some(Kind::Counter),
            Self::Insert(_) | Self::Remove(_) => Some(Kind::Set),
            Self::Assign(_) => Some(Kind::Register),
            Self::Enable | Self::Disable => Some(Kind::Flag),
            Self::Maximum(_) => Some(Kind::Max),
            Self::Minimum(_) => Some(Kind::Min),
            Self::Clear => None,
        }
    }

    /// The name in errors and output.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Add(_) => "counter_add",
            Self::Insert(_) => "set_add",
            Self::Remove(_) => "set_remove",
            Self::Assign(_) => "assign",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Maximum(_) => "maximum",
            Self::Minimum(_) => "minimum",
            Self::Clear => "delete",
        }
    }

    /// Whether it adds data, and so must be refused when there is no room for any.
    pub const fn adds(&self) -> bool {
        match self {
            Self::Add(_)
            | Self::Insert(_)
            | Self::Assign(_)
            | Self::Enable
            | Self::Maximum(_)
            | Self::Minimum(_) => true,
            Self::Remove(_) | Self::Disable | Self::Clear => false,
        }
    }
}

/// Whether a namespace with this rule takes the operation at such a path.
pub fn permits(rule: Rule, path: &[Bytes], action: &Action) -> bool {
    match (rule, Kind::of_rule(rule)) {
        (Rule::Map, _) => !path.is_empty() || *action == Action::Clear,
        (_, Some(kind)) => path.is_empty() && action.kind().is_none_or(|it| it == kind),
        (_, None) => false,
    }
}

/// Why a mutation was not made. Nothing of its command was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Index into the write's mutations.
    pub mutation: usize,
    /// Why.
    pub refusal: Refusal,
}

impl Refused {
    pub(crate) fn encode(self, writer: &mut Writer) {
        writer.count(self.mutation);
        match self.refusal {
            Refusal::NotOfRule => writer.u8(0),
            Refusal::Overflow => writer.u8(1),
            Refusal::OtherKind(None) => writer.u8(2),
            Refusal::OtherKind(Some(kind)) => {
                writer.u8(3);
                writer.u8(kind.tag());
            }
            Refusal::TooManyElements => writer.u8(4),
        }
    }

    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let mutation = reader.u32()? as usize;
        let refusal = match reader.u8()? {
            0 => Refusal::NotOfRule,
            1 => Refusal::Overflow,
            2 => Refusal::OtherKind(None),
            3 => {
                let tag = reader.u8()?;
                let kind = Kind::from_tag(tag).ok_or_else(|| reader.invalid(u64::from(tag)))?;
                Refusal::OtherKind(Some(kind))
            }
            4 => Refusal::TooManyElements,
            tag => return Err(reader.invalid(u64::from(tag))),
        };
        Ok(Self { mutation, refusal })
    }
}

/// Why a mutation cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The namespace's rule does not have it.
    NotOfRule,
    /// The sum would leave the range of a signed 64-bit number.
    Overflow,
    /// The field is something else; `None` for a map.
    OtherKind(Option<Kind>),
    /// There is more to delete than one log entry should.
    TooManyElements,
}

/// What a mutation did.
pub(crate) struct Mutated {
    pub(crate) dot: Dot,
    pub(crate) time: HybridTime,
    pub(crate) conflict: bool,
    /// The counter's sum after it.
    pub(crate) sum: Option<i64>,
}

/// Plans one mutation.
pub(crate) fn mutate<S: ShardState>(
    writing: &mut Writing<'_, S>,
    mutation: &Mutation,
    time: HybridTime,
) -> Result<Result<Mutated, Refusal>, S::Error> {
    let rule = writing.rule();
    if !permits(rule, &mutation.path, &mutation.action) {
        return Ok(Err(Refusal::NotOfRule));
    }
    if let (Rule::Map, Some(kind)) = (rule, mutation.action.kind())
        && let Some(refusal) = other_kind(writing, mutation, kind)?
    {
        return Ok(Err(refusal));
    }
    let whole = |kind| Part::Whole(kind);
    let value = |data: &Bytes| Content::value(data.clone());
    let (part, content) = match &mutation.action {
        Action::Add(by) => return add(writing, mutation, *by, time),
        Action::Clear => return clear(writing, mutation, time),
        Action::Maximum(data) => {
            return extreme(writing, mutation, Kind::Max, data, time).map(Ok);
        }
        Action::Minimum(data) => {
            return extreme(writing, mutation, Kind::Min, data, time).map(Ok);
        }
        Action::Insert(member) => (Part::Member(member.clone()), Content::value(Bytes::new())),
        Action::Remove(member) => (Part::Member(member.clone()), Content::Tombstone),
        Action::Assign(data) => (whole(Kind::Register), value(data)),
        Action::Enable => (whole(Kind::Flag), Content::value(Bytes::new())),
        Action::Disable => (whole(Kind::Flag), Content::Tombstone),
    };
    let kind = part.kind();
    let key = mutation.element(part).to_key();
    let record = writing.record(&key)?;
    let replaced = replaced(&record, kind, &content, writing.actor(), mutation.context.as_ref());
    let mut done = writing.write(record, key, content, replaced, time);
    done.conflict &= kind == Kind::Register;
    Ok(Ok(done))
}

/// What a write of an element takes the place of: what `context` has seen, and of a value what the region
/// itself wrote before. So an element has no more than one value of each region, whatever contexts it is
/// written with. Of a register a reader sees one assignment, and what goes without having been seen is lost:
/// it enters the ledger.
fn replaced(
    record: &Record,
    kind: Kind,
    content: &Content,
    local: Actor,
    context: Option<&VersionVector>,
) -> Replaced {
    let seen = record.superseded_by(context);
    let is_own = |held: &Sibling| content.is_present() && held.dot.actor == local;
    let shown = latest_of(record).map(|(held, _)| held).filter(|_| kind == Kind::Register);
    let is_unseen = |held: &Sibling| {
        shown.is_some_and(|shown| {
            let is_shown = held.dot == shown.dot || held.is_twin_of(shown);
            !is_shown || !seen.contains(&held.dot)
        })
    };
    let goes = record.siblings().iter().filter(|it| seen.contains(&it.dot) || is_own(it));
    let (unseen, replaced): (Vec<&Sibling>, Vec<&Sibling>) = goes.partition(|it| is_unseen(it));
    let dots = |of: Vec<&Sibling>| of.into_iter().map(|held| held.dot).collect();
    Replaced { supersedes: dots(replaced), pushed_out: PushedOut::of(dots(unseen), Cause::Rule) }
}

/// Assignments of a register that are held and not shown. They are no longer what the field has, and so in the
/// ledger, while they stay in the record: what is shown may be deleted by somebody who has not seen them.
pub(crate) fn unseen(rule: Rule, key: &[u8], record: &Record) -> Vec<Dropped> {
    if rule != Rule::Map || record.siblings().len() < 2 || kind_of(key) != Some(Kind::Register) {
        return Vec::new();
    }
    let Some((shown, _)) = latest_of(record) else { return Vec::new() };
    let (winner, winner_time) = (shown.dot, shown.time);
    let others = record.siblings().iter().filter(|held| {
        held.content.is_present() && held.dot != shown.dot && !held.is_twin_of(shown)
    });
    let lost =
        |held: &Sibling| Dropped { loser: held.clone(), winner, winner_time, cause: Cause::Rule };
    others.map(lost).collect()
}

impl Mutation {
    fn element(&self, part: Part) -> Element {
        Element { key: self.key.clone(), path: self.path.clone(), part }
    }

    /// Appends the encoding.
    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.bytes(&self.key);
        writer.count(self.path.len());
        self.path.iter().for_each(|name| writer.bytes(name));
        match &self.action {
            Action::Add(by) => {
                writer.u8(1);
                writer.fixed64(by.cast_unsigned());
            }
            Action::Insert(data) => encode_data(2, data, writer),
            Action::Remove(data) => encode_data(3, data, writer),
            Action::Assign(data) => encode_data(4, data, writer),
            Action::Enable => writer.u8(5),
            Action::Disable => writer.u8(6),
            Action::Maximum(data) => encode_data(7, data, writer),
            Action::Minimum(data) => encode_data(8, data, writer),
            Action::Clear => writer.u8(9),
        }
        writer.u8(u8::from(self.context.is_some()));
        if let Some(context) = &self.context {
            context.encode(writer);
        }
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let key = reader.bytes()?;
        let count = reader.count(1)?;
        let path = (0..count).map(|_| reader.bytes()).collect::<Result<_, _>>()?;
        let action = match reader.u8()? {
            1 => Action::Add(reader.fixed64()?.cast_signed()),
            2 => Action::Insert(reader.bytes()?),
            3 => Action::Remove(reader.bytes()?),
            4 => Action::Assign(reader.bytes()?),
            5 => Action::Enable,
            6 => Action::Disable,
            7 => Action::Maximum(reader.bytes()?),
            8 => Action::Minimum(reader.bytes()?),
            9 => Action::Clear,
            tag => return Err(reader.invalid(u64::from(tag))),
        };
        let context = match reader.u8()? {
            0 => None,
            1 => Some(VersionVector::decode(reader)?),
            byte => return Err(reader.invalid(u64::from(byte))),
        };
        Ok(Self { key, path, action, context })
    }

    /// About how many bytes the encoding has.
    pub(crate) fn bytes(&self) -> usize {
        let data = match &self.action {
            Action::Insert(data)
            | Action::Remove(data)
            | Action::Assign(data)
            | Action::Maximum(data)
            | Action::Minimum(data) => data.len(),
            Action::Add(_) | Action::Enable | Action::Disable | Action::Clear => 8,
        };
        self.key.len() + data + self.path.iter().map(|name| name.len() + 2).sum::<usize>() + 64
    }
}

fn encode_data(tag: u8, data: &Bytes, writer: &mut Writer) {
    writer.u8(tag);
    writer.bytes(data);
}

/// What stands in a map where a value of `kind` is to go, or above it.
fn other_kind<S: ShardState>(
    writing: &Writing<'_, S>,
    mutation: &Mutation,
    kind: Kind,
) -> Result<Option<Refusal>, S::Error> {
    let Mutation { key, path, .. } = mutation;
    for depth in 1..path.len() {
        // A value where there should be fields.
        let above = element::prefix(key, &path[..depth]);
        let values = [&above[..], &[element::FIRST_KIND]].concat();
        if let Some((found, _)) = writing.first_element(&values, element::end_of(&above))? {
            return Ok(Some(Refusal::OtherKind(kind_of(&found))));
        }
    }
    let here = element::prefix(key, path);
    let of_kind = element::prefix_of(key, path, kind);
    let first = match writing.first_element(&here, Some(of_kind.clone()))? {
        Some(found) => Some(found),
        None => match element::end_of(&of_kind) {
            Some(after) => writing.first_element(&after, element::end_of(&here))?,
            None => None,
        },
    };
    Ok(first.map(|(found, _)| {
        let is_here = Element::from_key(&found).is_some_and(|it| it.path.len() == path.len());
        Refusal::OtherKind(if is_here { kind_of(&found) } else { None })
    }))
}

fn kind_of(key: &[u8]) -> Option<Kind> {
    Element::from_key(key).map(|element| element.part.kind())
}

fn add<S: ShardState>(
    writing: &mut Writing<'_, S>,
    mutation: &Mutation,
    by: i64,
    time: HybridTime,
) -> Result<Result<Mutated, Refusal>, S::Error> {
    let shares = element::prefix_of(&mutation.key, &mutation.path, Kind::Counter);
    let held = writing.elements(&shares, element::end_of(&shares), SHARES_MAX)?;
    let before: i128 = held.iter().map(|(_, record)| share(record)).sum();
    let after = before + i128::from(by);
    let sum = match i64::try_from(after) {
        Ok(sum) => sum,
        // Regions that added at the same time have left the range: back towards it is allowed.
        Err(_) if after.abs() < before.abs() => {
            if after < 0 {
                i64::MIN
            } else {
                i64::MAX
            }
        }
        Err(_) => return Ok(Err(Refusal::Overflow)),
    };
    let key = mutation.element(Part::Share(writing.actor())).to_key();
    let record = writing.record(&key)?;
    let share = match count_of(&record) {
        Some(held) => {
            let Some(total) = held.count.total.checked_add(by) else {
                return Ok(Err(Refusal::Overflow));
            };
            Share { count: Count { total, ..held.count }, ..held }
        }
        None => {
            let dot = writing.next_dot();
            let count = Count { since: dot.seq, total: by };
            Share { dot, count, taken_back: Vec::new() }
        }
    };
    let mut done = write_share(writing, record, key, share, time);
    (done.sum, done.conflict) = (Some(sum), false);
    Ok(Ok(done))
}

/// Writes a region's own share, in place of what `record` holds of it.
fn write_share<S: ShardState>(
    writing: &mut Writing<'_, S>,
    record: Record,
    key: Bytes,
    share: Share,
    time: HybridTime,
) -> Mutated {
    let Share { count, mut taken_back, .. } = share;
    // What was deleted of it stays noted, as far as it counts.
    let counts = reset_of(&record, count.since);
    taken_back.retain(|it| counts.as_ref().is_none_or(|reset| reset.upto < it.at));
    let above = taken_back.len().saturating_sub(TAKEN_BACK_MAX);
    taken_back.drain(..above);
    let dots = record.siblings().iter().map(|held| held.dot);
    let supersedes = dots.filter(|dot| counts.as_ref().is_none_or(|it| it.dot != *dot)).collect();
    let replaced = Replaced { supersedes, ..Replaced::default() };
    writing.write(record, key, Content::Count { count, taken_back }, replaced, time)
}

/// What a change of another region added to a counter.
pub(crate) struct Addition {
    /// The user's key.
    key: Bytes,
    path: Vec<Bytes>,
    by: i64,
}

/// Notes in `added` what a delta adds to a counter; `record` is what was held before it.
pub(crate) fn note_addition(added: &mut Vec<Addition>, record: &Record, delta: &Delta) {
    let Some(Element { key, path, part: Part::Share(actor) }) = Element::from_key(&delta.key)
    else {
        return;
    };
    match &delta.sibling.content {
        // A repair brought it before, with what came after it.
        Content::Count { .. } if record.context().covers(delta.sibling.dot) => {}
        Content::Count { count, .. } => {
            let held = count_of(record).filter(|held| held.count.since == count.since);
            // What a deletion had seen last is what there was, if that is not held any more.
            let before = held.map(|held| held.count.total);
            let before = before.or_else(|| reset_of(record, count.since).map(|it| it.total));
            if let Some(by) = count.total.checked_sub(before.unwrap_or(0)) {
                added.push(Addition { key, path, by });
            }
        }
        // What it had added before, it has deleted.
        Content::Reset { .. } if actor == delta.sibling.dot.actor => {
            added.retain(|it| (&it.key, &it.path) != (&key, &path));
        }
        Content::Reset { .. } | Content::Value { .. } | Content::Tombstone => {}
    }
}

/// Takes back an addition of this region, which it made with a change whose writes are `first` to `last`.
/// What a deletion has taken away is not taken back as well.
pub(crate) fn take_back<S: ShardState>(
    writing: &mut Writing<'_, S>,
    addition: Addition,
    (first, last): (u64, u64),
    time: HybridTime,
) -> Result<(), S::Error> {
    let Addition { key, path, by } = addition;
    let element = Element { key, path, part: Part::Share(writing.actor()) };
    let key = element.to_key();
    let record = writing.record(&key)?;
    let Some(mut share) = count_of(&record) else { return Ok(()) };
    // What leaves the range of a sum stays; there is no number to take it back to.
    let Some(total) = share.count.total.checked_sub(by) else { return Ok(()) };
    let upto = reset_of(&record, share.count.since).map_or(0, |reset| reset.upto);
    if share.count.since > last || upto >= first {
        return Ok(());
    }
    share.count.total = total;
    share.taken_back.push(TakenBack { added: first, at: writing.next_dot().seq, by });
    write_share(writing, record, key, share, time);
    Ok(())
}

/// Raises a maximum or lowers a minimum. What is not beyond the extreme that is held writes nothing.
fn extreme<S: ShardState>(
    writing: &mut Writing<'_, S>,
    mutation: &Mutation,
    kind: Kind,
    data: &Bytes,
    time: HybridTime,
) -> Result<Mutated, S::Error> {
    let key = mutation.element(Part::Whole(kind)).to_key();
    let record = writing.record(&key)?;
    if let Some((held, present)) = extreme_of(&record, kind)
        && !is_beyond(kind, data, present)
    {
        return Ok(Mutated { dot: held.dot, time: held.time, conflict: false, sum: None });
    }
    let content = Content::value(data.clone());
    let replaced = replaced(&record, kind, &content, writing.actor(), mutation.context.as_ref());
    let done = writing.write(record, key, content, replaced, time);
    Ok(Mutated { conflict: false, ..done })
}

fn clear<S: ShardState>(
    writing: &mut Writing<'_, S>,
    mutation: &Mutation,
    time: HybridTime,
) -> Result<Result<Mutated, Refusal>, S::Error> {
    let Mutation { key, path, context, .. } = mutation;
    let under = element::prefix(key, path);
    let held = writing.elements(&under, element::end_of(&under), ELEMENTS_MAX + 1)?;
    if held.len() > ELEMENTS_MAX {
        return Ok(Err(Refusal::TooManyElements));
    }
    let mut done = None;
    for (key, record) in held {
        let content = match count_of(&record) {
            // A part of a sum that has grown since cannot be told from the rest: all of it stays.
            Some(Share { dot, .. }) if context.as_ref().is_some_and(|seen| !seen.covers(dot)) => {
                continue;
            }
            Some(Share { dot, count, .. }) => Content::Reset { count, upto: dot.seq },
            None => Content::Tombstone,
        };
        let replaced = match (&content, kind_of(&key)) {
            (Content::Reset { .. }, _) | (_, None) => {
                Replaced { supersedes: record.superseded_by(None), ..Replaced::default() }
            }
            (_, Some(kind)) => replaced(&record, kind, &content, writing.actor(), context.as_ref()),
        };
        if !(replaced.supersedes.is_empty() && replaced.pushed_out.dots.is_empty()) {
            done = Some(writing.write(record, key, content, replaced, time));
        }
    }
    if let Some(done) = done {
        return Ok(Ok(Mutated { conflict: false, ..done }));
    }
    // Deleting what is not there is an event like any other.
    let kind = Kind::of_rule(writing.rule()).unwrap_or(Kind::Register);
    let kind = if kind == Kind::Counter { Kind::Flag } else { kind };
    let part = if kind == Kind::Set { Part::Member(Bytes::new()) } else { Part::Whole(kind) };
    let key = mutation.element(part).to_key();
    let record = writing.record(&key)?;
    Ok(Ok(writing.write(record, key, Content::Tombstone, Replaced::default(), time)))
}

/// What a region's share of a counter holds.
struct Share {
    /// The addition that made it so.
    dot: Dot,
    count: Count,
    taken_back: Vec<TakenBack>,
}

/// A deletion of a share, as far as it had seen it.
struct Seen {
    dot: Dot,
    total: i64,
    upto: u64,
}

fn count_of(record: &Record) -> Option<Share> {
    record.siblings().iter().rev().find_map(|held| match &held.content {
        Content::Count { count, taken_back } => {
            Some(Share { dot: held.dot, count: *count, taken_back: taken_back.clone() })
        }
        Content::Value { .. } | Content::Tombstone | Content::Reset { .. } => None,
    })
}

/// The reset that has seen most of the count that begins at `since`.
fn reset_of(record: &Record, since: u64) -> Option<Seen> {
    let resets = record.siblings().iter().filter_map(|held| match held.content {
        Content::Reset { count, upto } if count.since == since => {
            Some(Seen { dot: held.dot, total: count.total, upto })
        }
        _ => None,
    });
    resets.max_by_key(|reset| (reset.upto, reset.dot))
}

/// What a share adds to its counter: the additions that no deletion had seen.
fn share(record: &Record) -> i128 {
    let Some(Share { count, taken_back, .. }) = count_of(record) else { return 0 };
    let Some(Seen { total, upto, .. }) = reset_of(record, count.since) else {
        return i128::from(count.total);
    };
    // The deletion had seen additions that are not part of the total any more.
    let gone = taken_back.iter().filter(|it| it.added <= upto && upto < it.at);
    let gone: i128 = gone.map(|it| i128::from(it.by)).sum();
    i128::from(count.total) - (i128::from(total) - gone)
}

fn is_beyond(kind: Kind, data: &Bytes, present: &Bytes) -> bool {
    match kind {
        Kind::Min => data < present,
        Kind::Max | Kind::Register | Kind::Counter | Kind::Set | Kind::Flag => data > present,
    }
}

fn values(record: &Record) -> impl Iterator<Item = (&Sibling, &Bytes)> {
    record.live_at(HybridTime::ZERO)
}

/// The assignment of a register that a reader sees.
fn latest_of(record: &Record) -> Option<(&Sibling, &Bytes)> {
    values(record).max_by_key(|(held, _)| (held.time, held.dot))
}

fn extreme_of(record: &Record, kind: Kind) -> Option<(&Sibling, &Bytes)> {
    values(record).reduce(|best, it| if is_beyond(kind, it.1, best.1) { it } else { best })
}

/// A typed value, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A counter's sum. It may leave the range of `i64` if regions add at the same time.
    Counter(i128),
    /// Entries of a set, in order.
    Set(Vec<Bytes>),
    /// On or off.
    Flag(bool),
    /// The bytes of a register, maximum or minimum.
    Data(Bytes),
    /// Fields by name, in order. A name that different regions made different things of at the same
    /// time is there more than once.
    Map(Vec<(Bytes, Value)>),
}

/// Puts elements together to what a reader sees.
#[derive(Clone, Debug, Default)]
pub struct Assembly {
    root: Node,
    /// The latest write of what is shown.
    latest: Option<(HybridTime, Dot)>,
    /// Path of the value that is asked for: fields are shown under it.
    depth: usize,
}

#[derive(Clone, Debug, Default)]
struct Node {
    fields: BTreeMap<Bytes, Node>,
    values: BTreeMap<Kind, Value>,
}

impl Assembly {
    /// An assembly of what lies `depth` names deep in a value.
    pub fn at_depth(depth: usize) -> Self {
        Self { depth, ..Self::default() }
    }

    /// Adds an element, unless it is not visible.
    pub fn add(&mut self, element: &Element, record: &Record) {
        let shown = record.siblings().iter().filter(|held| held.content.is_present());
        let Some(latest) = shown.map(|held| (held.time, held.dot)).max() else { return };
        self.latest = self.latest.max(Some(latest));
        let mut node = &mut self.root;
        for name in element.path.iter().skip(self.depth) {
            node = node.fields.entry(name.clone()).or_default();
        }
        let kind = element.part.kind();
        match (&element.part, node.values.entry(kind)) {
            (Part::Share(_), entry) => {
                let more = share(record);
                if let Value::Counter(sum) = entry.or_insert(Value::Counter(0)) {
                    *sum += more;
                }
            }
            (Part::Member(member), entry) => {
                if let Value::Set(members) = entry.or_insert_with(|| Value::Set(Vec::new())) {
                    members.push(member.clone());
                }
            }
            (Part::Whole(Kind::Flag), entry) => {
                entry.or_insert(Value::Flag(true));
            }
            (Part::Whole(kind), entry) => {
                let data = match kind {
                    Kind::Max | Kind::Min => extreme_of(record, *kind),
                    _ => latest_of(record),
                };
                if let Some((_, data)) = data {
                    entry.or_insert_with(|| Value::Data(data.clone()));
                }
            }
        }
    }

    /// Whether nothing was added that a reader sees.
    pub fn is_empty(&self) -> bool {
        self.latest.is_none()
    }

    /// The time and dot of the latest write that is shown.
    pub fn latest(&self) -> Option<(HybridTime, Dot)> {
        self.latest
    }

    /// What a reader sees, if anything: of a namespace whose values are of one kind that value, of maps
    /// the fields, and at the path of a field what is there. More than one where regions made different
    /// things of a field at the same time.
    pub fn finish(self) -> Vec<Value> {
        self.root.values()
    }
}

impl Node {
    fn values(self) -> Vec<Value> {
        let mut fields = Vec::new();
        for (name, node) in self.fields {
            fields.extend(node.values().into_iter().map(|value| (name.clone(), value)));
        }
        let mut values: Vec<Value> = self.values.into_values().collect();
        for value in &mut values {
            // They may have been added from the last to the first.
            if let Value::Set(members) = value {
                members.sort_unstable();
            }
        }
        if !fields.is_empty() {
            values.push(Value::Map(fields));
        }
        values
    }
}

#[cfg(test)]
pub(crate) mod tests;
