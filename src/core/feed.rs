//! A watcher's side of a shard: which changes it lacks, in which order it may have them, and when it
//! must begin anew.
//!
//! A [`Feed`] gives the changes of the change log above what was given, causes before effects, those
//! of all actors merged. Where it stands is a [`Cursor`]: a version vector, so that it means the same
//! in every region.
//!
//! A snapshot is taken page by page, each page as of another moment: before a page comes, the changes
//! up to its moment come for the keys that were given already. So all keys that were given are as of
//! one moment whenever a page ends, nothing is pinned in between, and the place to go on from is a
//! vector and a key. Pages hold tombstones: a write that lost to one may come later.
//!
//! Invariants:
//! * Of each key, no change comes after one that has seen it, but for what comes twice after going on
//!   from an older cursor.
//! * A region that lacks something of what was given gives nothing until it has it: what it says of a
//!   key could be older than what the watcher knows.
//! * Nothing is skipped: where the log no longer reaches back, or what was given may be nowhere any
//!   more, the answer is [`Lost`], and the present state comes next.
//! * A page is taken only of a state that is exactly what its frontier says: otherwise older changes of
//!   its keys would come after it.
//!
//! Not here: reading the log and the records (a [`Source`] does), and how events look to users
//! (`tombolo-service`).

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;

use crate::{
    change::Change,
    codec::Writer,
    hlc::HybridTime,
    id::{Actor, Dot, NamespaceId, RegionId},
    ledger::{Cause, LedgerEntry, LedgerId},
    members::Members,
    record::{Content, Delta, Record, Sibling},
    vector::VersionVector,
};

/// Whose writes a watcher wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origins {
    /// Every region's.
    #[default]
    All,
    /// Those of these regions.
    Only(BTreeSet<RegionId>),
    /// Those of all but these regions.
    AllBut(BTreeSet<RegionId>),
}

impl Origins {
    /// Whether writes of this region are wanted.
    pub fn takes(&self, region: RegionId) -> bool {
        match self {
            Self::All => true,
            Self::Only(regions) => regions.contains(&region),
            Self::AllBut(regions) => !regions.contains(&region),
        }
    }
}

/// What a watcher wants to see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// The first key.
    pub start: Bytes,
    /// The key after the last; `None` for the end of the namespace.
    pub end: Option<Bytes>,
    /// Whose writes.
    pub origins: Origins,
}

impl Filter {
    /// Whether a key lies in the range.
    pub fn takes_key(&self, key: &[u8]) -> bool {
        self.start <= *key && self.end.as_ref().is_none_or(|end| *key < **end)
    }

    /// Names the filter in tokens: one that goes on with another filter would miss what the first
    /// one did not show.
    pub fn fingerprint(&self) -> u64 {
        let mut writer = Writer::default();
        writer.bytes(&self.start);
        writer.u8(u8::from(self.end.is_some()));
        writer.bytes(self.end.as_deref().unwrap_or_default());
        let (kind, regions) = match &self.origins {
            Origins::All => (0, None),
            Origins::Only(regions) => (1, Some(regions)),
            Origins::AllBut(regions) => (2, Some(regions)),
        };
        writer.u8(kind);
        for region in regions.into_iter().flatten() {
            writer.varint(u64::from(region.0));
        }
        let hash = blake3::hash(writer.as_slice());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.as_bytes()[..8]);
        u64::from_le_bytes(first)
    }
}

/// How much of the snapshot of a shard was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing yet.
    Start,
    /// The keys before this one.
    Before(Bytes),
    /// All of it, or none was asked for.
    Live,
}

/// Where a watcher stands in one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// What was given, of the keys that were given.
    pub given: VersionVector,
    /// Which keys were.
    pub progress: Progress,
}

impl Cursor {
    /// Goes on after what `given` covers.
    pub const fn live(given: VersionVector) -> Self {
        Self { given, progress: Progress::Live }
    }

    /// Begins with the present state.
    pub const fn snapshot() -> Self {
        Self { given: VersionVector::new(), progress: Progress::Start }
    }

    /// Whether changes are all that is still to come.
    pub fn is_live(&self) -> bool {
        self.progress == Progress::Live
    }

    /// Whether changes of this key come already.
    fn follows(&self, key: &[u8]) -> bool {
        match &self.progress {
            Progress::Start => false,
            Progress::Before(next) => *key < **next,
            Progress::Live => true,
        }
    }

    /// Whether what comes next, or what was given, may be gone for good.
    fn lost(&self, at: &Standing, filter: &Filter) -> Option<Lost> {
        if self.progress == Progress::Start {
            return None;
        }
        let is_wanted = |&(actor, _): &(Actor, u64)| filter.origins.takes(actor.region);
        let is_trimmed = |(actor, seq): (Actor, u64)| {
            let given = self.given.get(actor);
            given < seq && given < at.trimmed.get(actor)
        };
        if at.frontier.iter().filter(is_wanted).any(is_trimmed) {
            return Some(Lost::Trimmed);
        }
        let is_over = |actor: Actor| {
            let member = at.members.get(actor.region);
            actor.incarnation < member.incarnation || member.state.is_out()
        };
        let may_never_come =
            |(actor, seq): (Actor, u64)| at.frontier.get(actor) < seq && is_over(actor);
        let is_lost = self.given.iter().filter(is_wanted).any(may_never_come);
        is_lost.then_some(Lost::StartedOver)
    }

    /// Whether `frontier` covers what was given of what is wanted.
    fn is_within(&self, frontier: &VersionVector, filter: &Filter) -> bool {
        let wanted = self.given.iter().filter(|(actor, _)| filter.origins.takes(actor.region));
        wanted.into_iter().all(|(actor, seq)| seq <= frontier.get(actor))
    }

    /// The actors of which there is more in `upto` than was given, each with the first sequence
    /// number that was not.
    fn behind(&self, upto: &VersionVector) -> Vec<(Actor, u64)> {
        let next = upto.iter().map(|(actor, seq)| (actor, self.given.get(actor) + 1, seq));
        next.filter(|(_, from, seq)| from <= seq).map(|(actor, from, _)| (actor, from)).collect()
    }

    /// Whether all that is wanted of what `upto` covers was given, of the keys that were.
    fn has_all_of(&self, upto: &VersionVector, filter: &Filter) -> bool {
        let is_given = |(actor, seq): (Actor, u64)| {
            seq <= self.given.get(actor) || !filter.origins.takes(actor.region)
        };
        self.progress == Progress::Start || upto.iter().all(is_given)
    }

    /// Whether all causes of a change that this feed gives were given.
    fn is_ready(&self, change: &Change, filter: &Filter) -> bool {
        let wanted =
            change.depends_on.iter().filter(|(actor, _)| filter.origins.takes(actor.region));
        let is_given = |(actor, seq): (Actor, u64)| seq <= self.given.get(actor);
        wanted.into_iter().all(is_given)
    }

    /// What of a change is to be given; `None` if nothing.
    fn pick(&self, change: Change, filter: &Filter) -> Option<Picked> {
        let seen = change.seen().into_owned();
        let first = Dot { actor: change.actor, seq: change.first_seq };
        let size = change.deltas.len();
        let wanted = |delta: &Delta| filter.takes_key(&delta.key) && self.follows(&delta.key);
        let deltas: Vec<Delta> = change.deltas.into_iter().filter(wanted).collect();
        (!deltas.is_empty()).then_some(Picked { first, size, seen, deltas })
    }
}

/// Why a watcher must begin anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The change log no longer reaches back.
    Trimmed,
    /// What was given has writes that this region lacks, of a region's life that is over: they may
    /// never come.
    StartedOver,
}

/// What a shard knows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// What is applied.
    pub frontier: VersionVector,
    /// Up to where the change log is gone.
    pub trimmed: VersionVector,
    /// What is known of the regions.
    pub members: Members,
    /// Whether the records are exactly what the frontier says.
    pub is_exact: bool,
}

/// Some records, with what was applied when they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// What was applied.
    pub frontier: VersionVector,
    /// Whether the records are exactly what the frontier says.
    pub is_exact: bool,
    /// Keys and records, tombstones included, in order of the keys.
    pub records: Vec<(Bytes, Record)>,
    /// Where to go on; `None` at the end of the range.
    pub next: Option<Bytes>,
}

/// One namespace of one shard, as a feed reads it.
pub trait Source {
    /// Why it could not be read.
    type Error;

    /// What is known now.
    fn standing(&self) -> Standing;

    /// An actor's changes from this sequence number on, each with its size: at least one if there is
    /// any, and no more after `bytes_max`. `None` if the log no longer holds the first one.
    ///
    /// # Errors
    /// If the log cannot be read.
    fn changes(
        &self,
        actor: Actor,
        from_seq: u64,
        bytes_max: usize,
    ) -> Result<Option<Vec<(Change, usize)>>, Self::Error>;

    /// The records from `start` on, before `end`.
    ///
    /// # Errors
    /// If they cannot be read.
    fn page(&self, start: &Bytes, end: Option<&Bytes>) -> Result<Page, Self::Error>;
}

/// A change as far as it is to be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picked {
    /// The dot of its first write.
    pub first: Dot,
    /// How many writes it has.
    pub size: usize,
    /// What its origin had applied before it.
    pub seen: VersionVector,
    /// The writes to give; at least one.
    pub deltas: Vec<Delta>,
}

/// What a feed gives at a time, in this order, beside changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// What was given before no longer counts. Then this is all.
    pub lost: Option<Lost>,
    /// Records of the snapshot.
    pub records: Vec<(Bytes, Record)>,
    /// The snapshot is complete.
    pub is_done: bool,
    /// The cursor moved: there may be more.
    pub moved: bool,
    /// There is more that may not be given yet.
    pub waits: bool,
}

/// A watcher's feed of one shard.
#[derive(Clone, Debug)]
pub struct Feed {
    cursor: Cursor,
    /// Read, and to be given after the changes up to its moment.
    page: Option<Box<Page>>,
}

impl Feed {
    /// A feed that goes on from `cursor`.
    pub const fn new(cursor: Cursor) -> Self {
        Self { cursor, page: None }
    }

    /// Where it stands: what a token says.
    pub const fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// Gives what comes next: no more after `bytes_max`, or a page. `give` takes the changes, causes before
    /// effects, and answers how many bytes it adds to the size of each.
    ///
    /// # Errors
    /// If the source cannot be read, or `give` fails; then the feed is of no use any more.
    pub fn step<S: Source>(
        &mut self,
        source: &S,
        filter: &Filter,
        bytes_max: usize,
        give: impl FnMut(Picked) -> Result<usize, S::Error>,
    ) -> Result<Step, S::Error> {
        let standing = source.standing();
        if let Some(lost) = self.cursor.lost(&standing, filter) {
            return Ok(self.begin_anew(lost));
        }
        if !self.cursor.is_within(&standing.frontier, filter) {
            return Ok(Step { waits: true, ..Step::default() });
        }
        self.fetch_page(source, filter, &standing)?;
        let upto = match &self.page {
            Some(page) => page.frontier.clone(),
            None => standing.frontier,
        };
        let before = self.cursor.given.clone();
        if !self.take(source, filter, &upto, bytes_max, give)? {
            return Ok(self.begin_anew(Lost::Trimmed));
        }
        let mut step = Step::default();
        let is_behind = !self.cursor.has_all_of(&upto, filter);
        match self.page.take_if(|_| !is_behind) {
            Some(page) => self.give_page(*page, filter, &mut step),
            None => {
                step.moved = before != self.cursor.given;
                step.waits = !step.moved && (is_behind || !self.cursor.is_live());
            }
        }
        Ok(step)
    }

    fn begin_anew(&mut self, lost: Lost) -> Step {
        *self = Self::new(Cursor::snapshot());
        Step { lost: Some(lost), moved: true, ..Step::default() }
    }

    /// Reads the next page of a snapshot, if there is one and it may be given.
    fn fetch_page<S: Source>(
        &mut self,
        source: &S,
        filter: &Filter,
        standing: &Standing,
    ) -> Result<(), S::Error> {
        let start = match &self.cursor.progress {
            Progress::Live => return Ok(()),
            Progress::Start => &filter.start,
            Progress::Before(next) => next,
        };
        if self.page.is_none() && standing.is_exact {
            let page = source.page(start, filter.end.as_ref())?;
            if page.is_exact && self.cursor.is_within(&page.frontier, filter) {
                self.page = Some(Box::new(page));
            }
        }
        Ok(())
    }

    fn give_page(&mut self, page: Page, filter: &Filter, step: &mut Step) {
        let Page { frontier, records, next, .. } = page;
        self.cursor.given = frontier;
        step.is_done = next.is_none();
        self.cursor.progress = next.map_or(Progress::Live, Progress::Before);
        let is_wanted = |(_, record): &(Bytes, Record)| {
            let wanted = |held: &Sibling| filter.origins.takes(held.dot.actor.region);
            record.siblings().iter().any(wanted)
        };
        step.records = records.into_iter().filter(is_wanted).collect();
        step.moved = true;
    }

    /// Gives changes that `upto` covers, as many as may come next, and whether the log still has them.
    fn take<S: Source>(
        &mut self,
        source: &S,
        filter: &Filter,
        upto: &VersionVector,
        bytes_max: usize,
        mut give: impl FnMut(Picked) -> Result<usize, S::Error>,
    ) -> Result<bool, S::Error> {
        let cursor = &mut self.cursor;
        if cursor.progress == Progress::Start {
            return Ok(true);
        }
        let unwanted = upto.iter().filter(|(actor, _)| !filter.origins.takes(actor.region));
        unwanted.for_each(|(actor, seq)| cursor.given.advance(actor, seq));
        let mut waiting = Vec::new();
        for (actor, from) in cursor.behind(upto) {
            let Some(changes) = source.changes(actor, from, bytes_max)? else { return Ok(false) };
            let is_before = |(change, _): &(Change, usize)| upto.covers(change.last());
            waiting.push(changes.into_iter().take_while(is_before).collect::<VecDeque<_>>());
        }
        let mut bytes = 0;
        while bytes < bytes_max {
            let ready = |changes: &mut VecDeque<(Change, usize)>| {
                changes.pop_front_if(|(change, _)| cursor.is_ready(change, filter))
            };
            let Some((change, size)) = waiting.iter_mut().find_map(ready) else { break };
            bytes += size;
            cursor.given.add(change.last());
            if let Some(picked) = cursor.pick(change, filter) {
                bytes += give(picked)?;
            }
        }
        Ok(true)
    }
}

/// Whether a key whose record is `record` holds what a write left. Whoever applies only writes of which
/// that holds has, in the end, what the region has, without comparing anything.
pub fn is_current(written: &Sibling, record: Option<&Record>) -> bool {
    match written.content {
        Content::Value { .. } | Content::Count { .. } => record
            .is_some_and(|record| record.siblings().iter().any(|held| held.dot == written.dot)),
        Content::Tombstone | Content::Reset { .. } => record.is_none_or(Record::is_dead),
    }
}

/// What a region knows of the writes that one write of a key was concurrent with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conflict {
    /// The write that it lost to.
    pub lost_to: Option<(Dot, LedgerId)>,
    /// Writes that lost to it.
    pub beat: Vec<(Dot, LedgerId)>,
    /// Writes whose values the key holds beside its own.
    pub beside: Vec<Dot>,
}

impl Conflict {
    /// Whether nothing concurrent is known.
    pub fn is_none(&self) -> bool {
        self.lost_to.is_none() && self.beat.is_empty() && self.beside.is_empty()
    }
}

/// What became of a write, from the record of its key as it is now and the ledger.
///
/// A write that others have replaced since may have beaten more than this finds: the record says of
/// each actor only which of its writes came last.
///
/// # Errors
/// What `ledger` answers.
pub fn conflict_of<E>(
    namespace: NamespaceId,
    delta: &Delta,
    seen: &VersionVector,
    record: Option<&Record>,
    mut ledger: impl FnMut(LedgerId) -> Result<Option<LedgerEntry>, E>,
) -> Result<Conflict, E> {
    let dot = delta.sibling.dot;
    let id = ledger_id(namespace, &delta.key, dot);
    let lost_to = ledger(id)?.map(|entry| (entry.winner, id));
    let mut conflict = Conflict { lost_to, ..Conflict::default() };
    let Some(record) = record else { return Ok(conflict) };
    for (actor, seq) in record.context().iter() {
        let other = Dot { actor, seq };
        if actor != dot.actor && !seen.covers(other) {
            let id = ledger_id(namespace, &delta.key, other);
            if ledger(id)?.is_some_and(|entry| entry.winner == dot) {
                conflict.beat.push((other, id));
            }
        }
    }
    let held: Vec<Dot> = record.siblings().iter().map(|held| held.dot).collect();
    if held.contains(&dot) {
        conflict.beside = held.into_iter().filter(|&other| other != dot).collect();
    }
    Ok(conflict)
}

/// The id of the ledger's entry of a write, if there is one.
fn ledger_id(namespace: NamespaceId, key: &Bytes, loser: Dot) -> LedgerId {
    let (time, content) = (HybridTime::ZERO, Content::Tombstone);
    let loser = Sibling { dot: loser, time, request: None, content };
    let (winner, cause) = (loser.dot, Cause::Rule);
    let key = key.clone();
    LedgerEntry { key, loser, winner, winner_time: time, cause, noted: time }.id(namespace)
}

#[cfg(test)]
mod tests;
