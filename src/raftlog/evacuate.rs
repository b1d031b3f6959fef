//! Freeing an old segment that a few live entries keep from being recycled.
//!
//! A slow group can hold on to a segment whose other entries are long purged, and with it to every
//! younger one, because segments are given up oldest first. So when the segments hold mostly dead data,
//! the writer copies the live entries of the oldest one to the head of the log, a bounded amount per
//! batch, between the regular jobs.
//!
//! A group's memory runs ahead of the disk: an entry may be gone from it although the record that says
//! so is still queued, and is then not copied. So the segment is released only when a job queued *after*
//! the last copy is durable: at that point all such records are, too.

use std::{ops::RangeInclusive, sync::Arc};

use crate::{
    LogError,
    checkpoint::Pins,
    group::{GroupCell, Located, read_run},
    index::Slot,
    log::Shared,
    segment::SegmentFile,
    types::Entry,
};

/// About how many bytes are copied per batch.
const STEP_BYTES: u64 = 256 * 1024;
/// How many indexes are looked at per step with the group's lock held.
const STEP_INDEXES: u64 = 8192;

/// The state of copying one segment's live entries.
pub(crate) struct Evacuation {
    pub(crate) file: Arc<SegmentFile>,
    /// What is left to be looked at.
    todo: Vec<(u64, RangeInclusive<u64>)>,
    /// The job that ends this is queued.
    pub(crate) announced: bool,
}

/// A live entry to be copied, and where it is.
pub(crate) struct Live {
    pub(crate) cell: Arc<GroupCell>,
    pub(crate) from: Slot,
    pub(crate) entry: Entry,
}

/// The segment to evacuate, if the log takes much more room than its live entries need.
pub(crate) fn candidate(shared: &Shared, head: u32, pins: &Pins) -> Option<Evacuation> {
    let (oldest, sealed) = {
        let segments = shared.segments.read();
        let oldest = segments.values().next().filter(|oldest| oldest.seq != head).cloned()?;
        (oldest, segments.len() as u64 - 1)
    };
    let live: u64 = shared.cells().iter().map(|cell| cell.data.lock().index.bytes_from(0)).sum();
    let segment_bytes = shared.config.segment_bytes;
    if sealed * segment_bytes <= live.saturating_mul(2).saturating_add(4 * segment_bytes) {
        return None;
    }
    let todo = pins.live(oldest.seq).collect();
    Some(Evacuation { file: oldest, todo, announced: false })
}

impl Evacuation {
    pub(crate) fn is_copied(&self) -> bool {
        self.todo.is_empty()
    }

    /// Reads the next few live entries. `Err` if the segment turns out to be damaged.
    pub(crate) fn step(&mut self, shared: &Shared) -> Result<Vec<Live>, LogError> {
        let mut live = Vec::new();
        let mut bytes = 0;
        while bytes < STEP_BYTES {
            let Some((group, span)) = self.todo.pop() else { break };
            let Some(cell) = shared.cell(group) else { continue };
            let mut located = Vec::new();
            let end = {
                let data = cell.data.lock();
                let mut index = (*span.start()).max(data.index.first());
                let stop = span
                    .end()
                    .saturating_add(1)
                    .min(data.index.next())
                    .min(index.saturating_add(STEP_INDEXES));
                while index < stop && bytes < STEP_BYTES {
                    if let (Some(slot), Some(id)) = (data.index.get(index), data.index.id(index))
                        && slot.segment == self.file.seq
                    {
                        bytes += u64::from(slot.len);
                        located.push(Located { id, slot, file: Arc::clone(&self.file) });
                    }
                    index += 1;
                }
                (index < data.index.next()).then_some(index)
            };
            if let Some(index) = end
                && index <= *span.end()
            {
                self.todo.push((group, index..=*span.end()));
            }
            for one in &located {
                let mut entries = Vec::with_capacity(1);
                read_run(group, std::slice::from_ref(one), &mut entries)?;
                let cell = &cell;
                live.extend(entries.into_iter().map(|entry| Live {
                    cell: Arc::clone(cell),
                    from: one.slot,
                    entry,
                }));
            }
            if located.is_empty() && end.is_some() {
                // A long stretch without live entries: let the regular jobs go first.
                break;
            }
        }
        Ok(live)
    }
}
