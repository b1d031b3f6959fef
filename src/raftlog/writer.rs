//! The one thread that writes the log.
//!
//! Each round takes all queued jobs, encodes them into one reused buffer, writes that with one `pwrite`,
//! syncs once, and runs the callbacks in the order of submission, holding no lock. It never waits for more
//! jobs to come: while it syncs, the next ones gather.
//!
//! A buffer is one *batch* on disk. A batch never spans segments, and the next one is written only after
//! the sync of this one, so a valid batch proves that everything before it was synced. The first batch of
//! a segment starts with the state of every group, so that older segments are needed for entries only.
//!
//! After a failed write or sync nothing is written any more: every waiting callback gets the error.

use std::{
    collections::{BTreeMap, VecDeque},
    io, mem,
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use crate::{
    cache::EvictionOrder,
    checkpoint::{Pins, View},
    evacuate::{self, Evacuation, Live},
    frame::{self, BATCH_ALIGN, Frame, HEADER_BYTES, Kind, STATE_BYTES},
    group::{Done, GroupCell},
    index::Slot,
    log::Shared,
    metrics::add,
    queue::{Job, Wake},
    segment::{self, DATA_START, SegmentFile, SegmentHeader},
    types::{Entry, LogId},
    watermark::Lower,
};

/// A batch is written when it has grown to this, even if more jobs are waiting.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// A buffer that grew beyond this is given back after a small batch.
const KEEP_BUFFER_BYTES: usize = 256 * 1024;
/// The watermark file is raised after this much, besides its own delay.
const MARK_BYTES: u64 = 8 * 1024 * 1024;

/// Entries of one append in this batch: `slots[start..end]` are the places of the indexes from `first` on.
struct Placed {
    cell: Arc<GroupCell>,
    ticket: u32,
    first: u64,
    start: usize,
    end: usize,
}

/// What has to happen once the batch is durable.
#[derive(Default)]
struct Batch {
    frames: u64,
    entries: u64,
    checkpoint: bool,
    placed: Vec<Placed>,
    slots: Vec<Slot>,
    moved: Vec<(Arc<GroupCell>, u64, Slot, Slot)>,
    done: VecDeque<Done>,
    /// Groups with new entries, truncations, purges or votes.
    touched: Vec<u64>,
    lower: Vec<(u64, Lower)>,
    purges: Vec<(u64, u64)>,
    votes: bool,
    evacuated: Vec<u32>,
}

pub(crate) struct Writer {
    shared: Arc<Shared>,
    head: Arc<SegmentFile>,
    /// Where the next batch goes.
    offset: u64,
    buf: Vec<u8>,
    batch: Batch,
    jobs: VecDeque<Job>,
    views: BTreeMap<u64, View>,
    pins: Pins,
    eviction: EvictionOrder,
    evacuation: Option<Evacuation>,
    consider_evacuation: bool,
    unmarked_bytes: u64,
}

impl Writer {
    pub(crate) fn new(
        shared: Arc<Shared>,
        head: Arc<SegmentFile>,
        offset: u64,
        views: BTreeMap<u64, View>,
        pins: Pins,
    ) -> Self {
        Self {
            shared,
            head,
            offset,
            buf: Vec::new(),
            batch: Batch::default(),
            jobs: VecDeque::new(),
            views,
            pins,
            eviction: EvictionOrder::default(),
            evacuation: None,
            consider_evacuation: false,
            unmarked_bytes: 0,
        }
    }

    /// Body of the writer thread.
    pub(crate) fn run(mut self) {
        // A panicking callback must not leave the other groups waiting forever.
        let ended = catch_unwind(AssertUnwindSafe(|| self.write_until_closed()));
        let reason = match ended {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the writer thread panicked".to_owned(),
        };
        self.fail(reason);
    }

    fn write_until_closed(&mut self) -> io::Result<()> {
        // Segments that became free just before the last stop.
        self.retire();
        loop {
            let queue = &self.shared.queue;
            let copying = self.evacuation.as_ref().is_some_and(|evacuation| !evacuation.announced);
            match queue.take(&mut self.jobs, copying) {
                Wake::Work => {}
                Wake::Closed => return Ok(()),
                Wake::Failed(reason) => return Err(io::Error::other(reason)),
            }
            while let Some(job) = self.jobs.pop_front() {
                self.encode(job)?;
            }
            self.copy_live_entries()?;
            self.flush()?;
            if mem::take(&mut self.consider_evacuation) && self.evacuation.is_none() {
                self.evacuation = evacuate::candidate(&self.shared, self.head.seq, &self.pins);
            }
        }
    }

    fn encode(&mut self, job: Job) -> io::Result<()> {
        match job {
            Job::Append { cell, ticket, entries, done } => {
                let placed = entries.iter().try_for_each(|entry| self.append(&cell, ticket, entry));
                // Also after an error, so that the callback hears of it.
                self.batch.done.push_back(done);
                placed?;
            }
            Job::Vote { group, vote, done } => {
                let placed = self.put(&Frame::vote(group, vote));
                self.batch.done.push_back(done);
                placed?;
                let view = self.views.entry(group).or_default();
                if view.vote > Some(vote) {
                    self.batch.lower.push((group, Lower::Vote(vote)));
                }
                view.vote = Some(vote);
                self.touch(group);
                self.batch.votes = true;
            }
            Job::Committed { group, committed } => {
                self.put(&Frame::optional(Kind::Committed, group, committed))?;
                self.views.entry(group).or_default().committed = committed;
            }
            Job::Truncate { group, last } => {
                self.put(&Frame::optional(Kind::Truncate, group, last))?;
                let view = self.views.entry(group).or_default();
                view.truncate(last);
                self.batch.lower.push((group, Lower::Last(view.mark().last)));
                self.touch(group);
            }
            Job::Purge { group, upto } => {
                self.put(&Frame::plain(Kind::Purge, group, upto))?;
                self.views.entry(group).or_default().purge(upto);
                self.touch(group);
                self.batch.purges.push((group, upto.index));
            }
            Job::Evacuated { segment } => self.batch.evacuated.push(segment),
        }
        Ok(())
    }

    fn append(&mut self, cell: &Arc<GroupCell>, ticket: u32, entry: &Entry) -> io::Result<()> {
        let slot = self.put(&entry_frame(Kind::Entry, cell.id, entry))?;
        self.views.entry(cell.id).or_default().append(entry.id);
        self.pins.add(self.head.seq, cell.id, entry.id.index);
        let batch = &mut self.batch;
        batch.entries += 1;
        batch.slots.push(slot);
        let end = batch.slots.len();
        match batch.placed.last_mut() {
            Some(last) if last.ticket == ticket && Arc::ptr_eq(&last.cell, cell) => last.end = end,
            Some(_) | None => {
                let cell = Arc::clone(cell);
                batch.placed.push(Placed {
                    cell,
                    ticket,
                    first: entry.id.index,
                    start: end - 1,
                    end,
                });
            }
        }
        self.touch(cell.id);
        Ok(())
    }

    fn touch(&mut self, group: u64) {
        if self.batch.touched.last() != Some(&group) {
            self.batch.touched.push(group);
        }
    }

    /// Adds a frame to the batch, first making room by writing the batch or starting a segment.
    fn put(&mut self, frame: &Frame<'_>) -> io::Result<Slot> {
        let len = HEADER_BYTES + frame.payload.len();
        if self.buf.len() >= BATCH_BYTES {
            self.flush()?;
        }
        let checkpoint = if self.offset == DATA_START {
            self.views.len() * (HEADER_BYTES + STATE_BYTES)
        } else {
            0
        };
        let used = self.offset + self.buf.len().max(HEADER_BYTES + checkpoint) as u64;
        if used + (len + BATCH_ALIGN) as u64 > self.head.capacity {
            self.flush()?;
            self.start_segment()?;
        }
        if self.buf.is_empty() {
            self.start_batch();
        }
        let offset = self.offset + self.buf.len() as u64;
        frame::encode(&mut self.buf, self.head.salt, frame);
        self.batch.frames += 1;
        let narrow = |number: u64| {
            u32::try_from(number).map_err(|_| io::Error::other("a segment exceeds 4 GiB"))
        };
        Ok(Slot { segment: self.head.seq, offset: narrow(offset)?, len: narrow(len as u64)? })
    }

    fn start_batch(&mut self) {
        self.buf.resize(HEADER_BYTES, 0);
        if self.offset == DATA_START {
            self.batch.checkpoint = true;
            for (group, view) in &self.views {
                let payload = &view.record().encode();
                let frame = Frame {
                    kind: Kind::State,
                    flags: 0,
                    group: *group,
                    index: 0,
                    term: 0,
                    node: 0,
                    payload,
                };
                frame::encode(&mut self.buf, self.head.salt, &frame);
                self.batch.frames += 1;
            }
        }
    }

    /// Seals the head and goes on in a new segment. The batch has been written.
    fn start_segment(&mut self) -> io::Result<()> {
        let spare = match self.shared.helper.take_spare() {
            Some(spare) => spare,
            None => {
                add(&self.shared.metrics.spare_misses, 1);
                let path = self.shared.helper.spare_path(&self.shared);
                segment::create_spare(&path, self.shared.config.segment_bytes)
                    .map_err(io::Error::other)?;
                path
            }
        };
        let seq = self
            .head
            .seq
            .checked_add(1)
            .ok_or_else(|| io::Error::other("segment numbers are used up"))?;
        let capacity = self.shared.config.segment_bytes;
        let header =
            SegmentHeader { seq, log_id: self.shared.log_id, capacity, prev_end: self.offset };
        let file = segment::activate(&self.shared.dir, &spare, header).map_err(io::Error::other)?;
        self.head = Arc::new(file);
        self.offset = DATA_START;
        self.consider_evacuation = true;
        self.shared.segments.write().insert(seq, Arc::clone(&self.head));
        self.shared.watermark.note_head(seq);
        self.shared.helper.want_spares();
        Ok(())
    }

    /// Writes and syncs the batch, then does all that waited for it.
    fn flush(&mut self) -> io::Result<()> {
        if !self.buf.is_empty() {
            let padded = self.buf.len().next_multiple_of(BATCH_ALIGN);
            self.buf.resize(padded, 0);
            let header =
                frame::batch(self.offset, padded as u64, self.batch.frames, self.batch.checkpoint);
            let mut encoded = Vec::with_capacity(HEADER_BYTES);
            frame::encode(&mut encoded, self.head.salt, &header);
            self.buf[..HEADER_BYTES].copy_from_slice(&encoded);
            if !self.batch.lower.is_empty() {
                self.shared.watermark.lower(&self.batch.lower)?;
            }
            let start = Instant::now();
            #[cfg(test)]
            self.shared.faults.before_write()?;
            self.head.file.write_all_at(&self.buf, self.offset)?;
            #[cfg(test)]
            self.shared.faults.before_sync()?;
            self.head.file.sync_data()?;
            self.offset += padded as u64;
            self.shared.metrics.synced(padded as u64, self.batch.entries, start.elapsed());
        }
        while let Some(done) = self.batch.done.pop_front() {
            done(Ok(()));
        }
        if !self.buf.is_empty() {
            self.after_sync();
        }
        if !self.batch.evacuated.is_empty() {
            for segment in self.batch.evacuated.drain(..) {
                self.pins.release(segment);
                self.evacuation =
                    self.evacuation.take().filter(|evacuation| evacuation.file.seq != segment);
            }
            // The next oldest segment may be in the same situation.
            self.consider_evacuation = true;
            self.retire();
        }
        Ok(())
    }

    /// Publishes the places of the entries, and everything else that may only now be known.
    fn after_sync(&mut self) {
        let batch = &mut self.batch;
        for placed in batch.placed.drain(..) {
            let mut data = placed.cell.data.lock();
            let slots = &batch.slots[placed.start..placed.end];
            for (index, slot) in (placed.first..).zip(slots) {
                data.index.relocate(index, Slot::pending(placed.ticket, slot.len), *slot);
            }
            let last = placed.first + (slots.len() as u64).saturating_sub(1);
            self.eviction.note(&placed.cell, &mut data.tail, last);
        }
        for (cell, index, from, to) in batch.moved.drain(..) {
            cell.data.lock().index.relocate(index, from, to);
        }
        self.eviction.evict(&self.shared.cache, || self.shared.cells());
        for group in &batch.touched {
            if let Some(view) = self.views.get(group) {
                self.shared.watermark.note_group(*group, view.mark());
            }
        }
        self.unmarked_bytes += self.buf.len() as u64;
        let now = batch.votes || self.unmarked_bytes >= MARK_BYTES;
        if now {
            self.unmarked_bytes = 0;
        }
        if !batch.touched.is_empty() {
            self.shared.helper.mark(now);
        }
        let purged = !batch.purges.is_empty();
        for (group, upto) in batch.purges.drain(..) {
            self.pins.purge(group, upto);
        }
        batch.slots.clear();
        batch.touched.clear();
        batch.lower.clear();
        (batch.frames, batch.entries, batch.checkpoint, batch.votes) = (0, 0, false, false);
        if self.buf.len() <= KEEP_BUFFER_BYTES {
            self.buf.shrink_to(KEEP_BUFFER_BYTES);
        }
        self.buf.clear();
        if self.offset > self.head.capacity / 8 {
            self.shared.helper.want_spares();
        }
        if purged || self.consider_evacuation {
            self.retire();
        }
    }

    /// Gives up the oldest segments that hold nothing live. The checkpoint behind them is durable, because
    /// this runs after a sync and never takes the head.
    fn retire(&mut self) {
        // An empty head has no checkpoint yet.
        while self.offset > DATA_START {
            let oldest = self.shared.segments.read().keys().next().copied();
            let Some(oldest) =
                oldest.filter(|seq| *seq != self.head.seq && self.pins.is_free(*seq))
            else {
                return;
            };
            self.pins.release(oldest);
            if self.evacuation.as_ref().is_some_and(|evacuation| evacuation.file.seq == oldest) {
                self.evacuation = None;
            }
            let file = self.shared.segments.write().remove(&oldest);
            if let Some(file) = file {
                self.shared.helper.retire(file);
            }
        }
    }

    fn copy_live_entries(&mut self) -> io::Result<()> {
        let Some(evacuation) = self.evacuation.as_mut().filter(|evacuation| !evacuation.announced)
        else {
            return Ok(());
        };
        if evacuation.is_copied() {
            evacuation.announced = true;
            let segment = evacuation.file.seq;
            // Refused only if the log is closing; then the segment stays until the next start.
            if self.shared.queue.push(Job::Evacuated { segment }).is_err() {
                self.evacuation = None;
            }
            return Ok(());
        }
        let live = match evacuation.step(&self.shared) {
            Ok(live) => live,
            Err(error) => {
                tracing::error!(%error, "an old segment is damaged and stays; this node should be replaced");
                self.evacuation = None;
                return Ok(());
            }
        };
        add(&self.shared.metrics.moved_entries, live.len() as u64);
        for Live { cell, from, entry } in live {
            let to = self.put(&entry_frame(Kind::Moved, cell.id, &entry))?;
            self.pins.add(self.head.seq, cell.id, entry.id.index);
            self.batch.moved.push((cell, entry.id.index, from, to));
        }
        Ok(())
    }

    fn fail(mut self, reason: String) {
        tracing::error!(%reason, "the raft log failed; the process must stop");
        self.shared.queue.fail(reason.clone());
        let reason = self.shared.queue.failed().unwrap_or(reason);
        let jobs = mem::take(&mut self.jobs).into_iter().chain(self.shared.queue.drain());
        let waiting =
            mem::take(&mut self.batch.done).into_iter().chain(jobs.filter_map(Job::into_done));
        for done in waiting {
            let result = Err(io::Error::other(format!("the raft log failed: {reason}")));
            // The others must hear of it even if one callback panics.
            if catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
                tracing::error!("a callback panicked while the log reported its failure");
            }
        }
        self.shared.report_failure(&reason);
    }
}

fn entry_frame(kind: Kind, group: u64, entry: &Entry) -> Frame<'_> {
    let LogId { term, node, index } = entry.id;
    Frame { kind, flags: entry.kind.code(), group, index, term, node, payload: &entry.payload }
}
