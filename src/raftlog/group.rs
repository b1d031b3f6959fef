//! One Raft group's view of the shared log.
//!
//! Every operation changes the group's memory under its lock, queues a record while still holding it, and
//! returns without touching the disk; only `read` of entries that left the cache does I/O, outside the
//! lock. Lock order: group, then queue; group, then segment list. The writer takes them one at a time.

use std::{fmt, io, ops::Range, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::{
    LogError,
    cache::{Cache, Tail},
    frame::{self, FrameError, HEADER_BYTES, Kind},
    index::{Index, Slot},
    log::Inner,
    queue::Job,
    segment::{SegmentFile, read_up_to},
    types::{Entry, EntryKind, GroupState, LogId, Vote},
};

/// Called once on the writer thread: `Ok` after the sync that covers the job, `Err` if the log failed.
/// It should hand over and return; it holds up all groups. Dropped uncalled if the submission was refused.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Frames that are this close in a segment are read together.
const READ_GAP_BYTES: u32 = 4096;
/// The most that one read from a segment covers, unless one entry is larger.
const READ_SPAN_BYTES: u32 = 1024 * 1024;

/// What is in memory for one group.
#[derive(Debug, Default)]
pub(crate) struct GroupData {
    pub(crate) purged: Option<LogId>,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
    pub(crate) index: Index,
    pub(crate) tail: Tail,
    pub(crate) ticket: u32,
}

#[derive(Debug)]
pub(crate) struct GroupCell {
    pub(crate) id: u64,
    /// There are too many groups: this one is refused everything.
    pub(crate) over_limit: bool,
    pub(crate) data: Mutex<GroupData>,
}

/// Handle of one group's log. Cheap to clone.
#[derive(Clone)]
pub struct Group {
    pub(crate) inner: Arc<Inner>,
    pub(crate) cell: Arc<GroupCell>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("id", &self.cell.id).finish_non_exhaustive()
    }
}

impl GroupData {
    pub(crate) fn last(&self) -> Option<LogId> {
        self.index.next().checked_sub(1).and_then(|last| self.index.id(last)).or(self.purged)
    }

    fn id(&self, index: u64) -> Option<LogId> {
        self.index.id(index).or(self.purged.filter(|purged| purged.index == index))
    }

    /// The oldest index from `from` on whose entry is not placed yet, or the next index.
    pub(crate) fn first_pending(&self, from: u64) -> u64 {
        // Pending entries are a suffix, because the writer places them in order.
        let (mut low, mut high) = (from.max(self.index.first()), self.index.next());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.index.get(middle) {
                Some(slot) if !slot.is_pending() => low = middle + 1,
                Some(_) | None => high = middle,
            }
        }
        high
    }

    /// Whether an entry with this index may come next. A group that never had entries starts at 0 or 1.
    fn accepts(&self, index: u64) -> bool {
        let fresh = self.purged.is_none() && self.index.is_empty();
        index == self.index.next() || (fresh && index <= 1)
    }

    fn purge(&mut self, cache: &Cache, upto: LogId) {
        self.purged = Some(upto);
        self.index.purge(upto.index.saturating_add(1));
        self.tail.purge(cache, upto.index.saturating_add(1));
    }
}

impl Group {
    /// The group's number.
    pub fn id(&self) -> u64 {
        self.cell.id
    }

    /// The group's bounds and votes, including what is not durable yet.
    pub fn state(&self) -> GroupState {
        let data = self.cell.data.lock();
        GroupState {
            purged: data.purged,
            last: data.last(),
            vote: data.vote,
            committed: data.committed,
        }
    }

    /// The largest entry that this log takes, in bytes, frame included: a quarter of a segment,
    /// and never more than [`crate::MAX_ENTRY_BYTES`].
    pub fn max_entry_bytes(&self) -> u64 {
        self.inner.shared.max_entry_bytes
    }

    /// Adds entries after the newest one. They are readable when this returns; `done` is called once they
    /// are durable, in the order of submission over all groups.
    ///
    /// A group's first entry has index 0 or 1. Refused with nothing changed: a gap, an entry larger than
    /// [`crate::MAX_ENTRY_BYTES`] or a quarter of a segment, a failed or closed log.
    pub fn append(&self, entries: Vec<Entry>, done: Done) -> Result<(), LogError> {
        self.check_open()?;
        let shared = &self.inner.shared;
        let mut data = self.cell.data.lock();
        if let Some(first) = entries.first()
            && !data.accepts(first.id.index)
        {
            let expected = data.index.next();
            return Err(LogError::Gap { group: self.cell.id, expected, found: first.id.index });
        }
        for (position, entry) in entries.iter().enumerate() {
            let expected = entries[0].id.index.saturating_add(position as u64);
            if entry.id.index != expected || expected == u64::MAX {
                return Err(LogError::Gap { group: self.cell.id, expected, found: entry.id.index });
            }
            let bytes = entry.payload.len() as u64;
            if bytes > shared.max_entry_bytes {
                let max_bytes = shared.max_entry_bytes;
                return Err(LogError::TooLarge {
                    group: self.cell.id,
                    index: expected,
                    bytes,
                    max_bytes,
                });
            }
        }
        if let Some(first) = entries.first()
            && data.index.is_empty()
        {
            data.index.reset(first.id.index);
        }
        data.ticket = data.ticket.wrapping_add(1);
        let ticket = data.ticket;
        for entry in &entries {
            let len = u32::try_from(entry.payload.len() + HEADER_BYTES).unwrap_or(u32::MAX);
            data.index.push(entry.id, Slot::pending(ticket, len));
            data.tail.push(&shared.cache, entry.clone());
        }
        // With the lock held, so that the order in memory is the order on disk.
        shared.queue.push(Job::Append { cell: Arc::clone(&self.cell), ticket, entries, done })
    }

    /// Saves a vote; `done` is called once it and everything submitted before is durable.
    pub fn save_vote(&self, vote: Vote, done: Done) -> Result<(), LogError> {
        self.check_open()?;
        let mut data = self.cell.data.lock();
        self.inner.shared.queue.push(Job::Vote { group: self.cell.id, vote, done })?;
        data.vote = Some(vote);
        Ok(())
    }

    /// Notes how far the group committed. Durable with the next sync; has none of its own. Ignored if the
    /// log failed or is closed: it is a hint for a faster start, nothing rests on it.
    pub fn save_committed(&self, committed: Option<LogId>) {
        if self.cell.over_limit {
            return;
        }
        let mut data = self.cell.data.lock();
        if data.committed != committed
            && self
                .inner
                .shared
                .queue
                .push(Job::Committed { group: self.cell.id, committed })
                .is_ok()
        {
            data.committed = committed;
        }
    }

    /// Drops every entry after `last`, which is kept; `None` drops all. Durable with the next sync, and in
    /// any case before entries that are appended later.
    pub fn truncate_after(&self, last: Option<LogId>) -> Result<(), LogError> {
        self.check_open()?;
        let shared = &self.inner.shared;
        let mut data = self.cell.data.lock();
        let group = self.cell.id;
        let next = match (last, data.purged) {
            (None, Some(purged)) => {
                return Err(LogError::Purged { group, index: data.index.first(), purged });
            }
            (None, None) => data.index.first(),
            (Some(last), purged) => match data.id(last.index) {
                Some(found) if found == last => last.index + 1,
                Some(found) => return Err(LogError::IdMismatch { group, wanted: last, found }),
                None => match purged {
                    Some(purged) if last.index < purged.index => {
                        return Err(LogError::Purged { group, index: last.index, purged });
                    }
                    Some(_) | None => {
                        return Err(LogError::Missing {
                            group,
                            index: last.index,
                            next: data.index.next(),
                        });
                    }
                },
            },
        };
        if next >= data.index.next() {
            return Ok(());
        }
        shared.queue.push(Job::Truncate { group, last })?;
        data.index.truncate(next);
        data.tail.truncate(&shared.cache, next);
        Ok(())
    }

    /// Drops every entry up to and including `upto`. If that lies beyond the newest entry, the log becomes
    /// empty and continues after `upto`. Durable with the next sync.
    pub fn purge(&self, upto: LogId) -> Result<(), LogError> {
        self.check_open()?;
        let shared = &self.inner.shared;
        let mut data = self.cell.data.lock();
        if data.purged.is_some_and(|purged| purged.index >= upto.index) {
            return Ok(());
        }
        shared.queue.push(Job::Purge { group: self.cell.id, upto })?;
        data.purge(&shared.cache, upto);
        Ok(())
    }

    /// Reads entries from `range.start` on: up to the end of the range, the end of the log or about
    /// `max_bytes` of payload, but at least one if there is one. Nothing if the range is empty or starts
    /// right behind the newest entry. A start that was purged or lies further behind the end is an error:
    /// never a silent hole.
    ///
    /// Blocks on I/O for entries that left the cache. Such entries share the buffer they were read into.
    pub fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        let group = self.cell.id;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let mut on_disk = Vec::new();
        let mut in_memory = Vec::new();
        {
            let data = self.cell.data.lock();
            if range.start < data.index.first() {
                return Err(match data.purged {
                    Some(purged) => LogError::Purged { group, index: range.start, purged },
                    None => {
                        LogError::Missing { group, index: range.start, next: data.index.first() }
                    }
                });
            }
            if range.start > data.index.next() {
                return Err(LogError::Missing {
                    group,
                    index: range.start,
                    next: data.index.next(),
                });
            }
            let mut bytes = 0_usize;
            let mut file: Option<Arc<SegmentFile>> = None;
            for index in range.start..range.end.min(data.index.next()) {
                let (Some(slot), Some(id)) = (data.index.get(index), data.index.id(index)) else {
                    break;
                };
                let len =
                    usize::try_from(slot.len).unwrap_or(usize::MAX).saturating_sub(HEADER_BYTES);
                bytes = bytes.saturating_add(len);
                if bytes > max_bytes && index > range.start {
                    break;
                }
                if let Some(entry) = data.tail.get(index) {
                    in_memory.push(entry.clone());
                    continue;
                }
                // With the lock held: as long as a slot names a segment, the segment is not recycled, and
                // holding the file keeps it from being reused after that.
                if file.as_ref().is_none_or(|file| file.seq != slot.segment) {
                    file = self.inner.shared.segments.read().get(&slot.segment).cloned();
                }
                let Some(file) = &file else {
                    return Err(LogError::Missing { group, index, next: data.index.next() });
                };
                on_disk.push(Located { id, slot, file: Arc::clone(file) });
            }
        }
        if on_disk.is_empty() {
            return Ok(in_memory);
        }
        let mut entries = Vec::with_capacity(on_disk.len() + in_memory.len());
        let mut rest = on_disk.as_slice();
        while let Some((run, others)) =
            rest.split_at_checked(run_len(rest)).filter(|(run, _)| !run.is_empty())
        {
            read_run(group, run, &mut entries)?;
            rest = others;
        }
        entries.append(&mut in_memory);
        Ok(entries)
    }

    /// The full id of an entry; also answers for the purged one. No I/O.
    pub fn log_id(&self, index: u64) -> Option<LogId> {
        self.cell.data.lock().id(index)
    }

    /// Bytes that the entries above `index` take in the log.
    pub fn bytes_after(&self, index: u64) -> u64 {
        self.cell.data.lock().index.bytes_from(index.saturating_add(1))
    }

    fn check_open(&self) -> Result<(), LogError> {
        if self.cell.over_limit {
            let max = self.inner.max_groups;
            return Err(LogError::TooManyGroups { group: self.cell.id, max });
        }
        match self.inner.shared.queue.refusal() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// An entry that has to be read from a segment.
pub(crate) struct Located {
    pub(crate) id: LogId,
    pub(crate) slot: Slot,
    pub(crate) file: Arc<SegmentFile>,
}

/// How many of the first entries lie close enough together to be read at once.
fn run_len(entries: &[Located]) -> usize {
    let Some(first) = entries.first() else { return 0 };
    let mut end = first.slot.offset + first.slot.len;
    let mut len = 1;
    for next in &entries[1..] {
        let gap = next.slot.offset.checked_sub(end);
        let close =
            next.slot.segment == first.slot.segment && gap.is_some_and(|gap| gap <= READ_GAP_BYTES);
        let next_end = next.slot.offset.saturating_add(next.slot.len);
        if !close || next_end - first.slot.offset > READ_SPAN_BYTES {
            break;
        }
        end = next_end;
        len += 1;
    }
    len
}

/// Reads neighbouring entries of one segment and checks each.
pub(crate) fn read_run(group: u64, run: &[Located], out: &mut Vec<Entry>) -> Result<(), LogError> {
    let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(()) };
    let file = &first.file;
    let start = first.slot.offset;
    let span = (last.slot.offset + last.slot.len).saturating_sub(start);
    let mut buf = vec![0; usize::try_from(span).unwrap_or(0)];
    read_up_to(&file.file, &mut buf, u64::from(start))
        .map_err(LogError::io("read segment", &file.path))?;
    let buf = Bytes::from(buf);
    for Located { id, slot, .. } in run {
        let at = usize::try_from(slot.offset - start).unwrap_or(usize::MAX);
        let end = at.saturating_add(usize::try_from(slot.len).unwrap_or(usize::MAX));
        let corrupt = |reason: String| LogError::Corrupt {
            file: file.path.clone(),
            offset: u64::from(slot.offset),
            reason,
        };
        let bytes = buf.get(at..end).unwrap_or_default();
        let frame = frame::decode(bytes, file.salt).map_err(|error| corrupt(describe(error)))?;
        let kind = EntryKind::from_code(frame.flags)
            .filter(|_| matches!(frame.kind, Kind::Entry | Kind::Moved))
            .filter(|_| {
                frame.group == group
                    && frame.id() == *id
                    && frame.payload.len() + HEADER_BYTES == bytes.len()
            });
        let Some(kind) = kind else {
            return Err(corrupt(format!(
                "another record is where entry {id} of group {group} should be"
            )));
        };
        out.push(Entry { id: *id, kind, payload: buf.slice(at + HEADER_BYTES..end) });
    }
    Ok(())
}

pub(crate) fn describe(error: FrameError) -> String {
    match error {
        FrameError::Short => "a record is cut off".to_owned(),
        FrameError::Checksum => "the checksum of a record does not match".to_owned(),
        FrameError::Unknown { kind, version } => {
            format!("record kind {kind} version {version} is unknown")
        }
    }
}
