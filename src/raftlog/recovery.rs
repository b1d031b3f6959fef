//! From files back to memory.
//!
//! All segments are read in order and every record is checked. What may be wrong, and what follows:
//!
//! - **A sealed segment** (any but the last) ends exactly where the header of the next one says, and all
//!   of it was synced. Anything that does not check out up to there is corruption: refused.
//! - **The last segment** may end in a batch that was being written when the node stopped. It was never
//!   acknowledged, and is cut as a whole, even if parts of it are intact: pages may reach the disk in any
//!   order. The next batch is written only after the sync of the one before. So if a valid batch header
//!   (checksum with this segment's salt, its own offset in it) lies anywhere behind the bad bytes, those
//!   bytes had been synced: that is corruption, not a torn tail, and is refused.
//! - **The very last batch** is the one case that bytes cannot decide: damaged after its sync it looks like
//!   a torn one. There the watermark decides: a log that ends before it, or whose vote is older, is refused.
//! - **Missing segments** show as a gap in the numbers, as a head older than the watermark's, or as a live
//!   entry found nowhere: each segment starts with the state of every group.
//!
//! Nothing is changed on disk before all checks have passed.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Config, LogError,
    checkpoint::{Pins, View},
    frame::{
        self, BATCH_ALIGN, FLAG_CHECKPOINT, Frame, FrameError, HEADER_BYTES, Kind, StateRecord,
    },
    group::{GroupData, describe},
    replay::Replayed,
    segment::{self, DATA_START, SegmentFile, SegmentHeader},
    watermark::{Content, Marks, Watermark},
    window::Window,
};

/// What was found at open, for the operator's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Segments read.
    pub segments: u64,
    /// Groups with a log.
    pub groups: u64,
    /// Live entries.
    pub entries: u64,
    /// Bytes of a batch that was cut because it was only partly written.
    pub torn_tail_bytes: u64,
    /// Time it took.
    pub took: Duration,
}

pub(crate) struct Recovered {
    pub(crate) log_id: u64,
    pub(crate) head: Arc<SegmentFile>,
    /// Where the next batch goes.
    pub(crate) offset: u64,
    pub(crate) segments: BTreeMap<u32, Arc<SegmentFile>>,
    pub(crate) groups: BTreeMap<u64, GroupData>,
    pub(crate) views: BTreeMap<u64, View>,
    pub(crate) pins: Pins,
    pub(crate) watermark: Watermark,
    pub(crate) spares: Vec<PathBuf>,
    pub(crate) next_spare: u64,
    pub(crate) report: Recovery,
}

/// Creates the directory if need be and makes sure that nobody else has it open.
pub(crate) fn lock_dir(dir: &Path) -> Result<File, LogError> {
    fs::create_dir_all(dir).map_err(LogError::io("create directory", dir))?;
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(LogError::io("open lock file", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LogError::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(LogError::Io { action: "lock", path, source }),
    }
}

#[derive(Default)]
struct Listing {
    /// Ascending.
    segments: Vec<u32>,
    spares: Vec<PathBuf>,
    next_spare: u64,
    leftovers: Vec<PathBuf>,
}

pub(crate) fn recover(dir: &Path, config: &Config) -> Result<Recovered, LogError> {
    let start = Instant::now();
    let mut listing = list(dir, config.segment_bytes)?;
    let watermark = if Watermark::path_in(dir).exists() {
        Watermark::open(dir)?
    } else if let Some(first) = listing.segments.first() {
        tracing::error!(segment = first, "segments without a watermark file");
        return Err(LogError::WatermarkMissing { file: Watermark::path_in(dir) });
    } else {
        Watermark::create(dir)?
    };
    let Content { identity: _, marks } = watermark.content();
    let newest = listing.segments.last().copied().unwrap_or(0);
    if newest < marks.head {
        let reason = "it is the newest one that the watermark file knows of".to_owned();
        return Err(LogError::MissingSegment { file: segment::path_of(dir, marks.head), reason });
    }
    let mut spares =
        listing.spares.split_off(listing.spares.len().saturating_sub(config.spare_segments));
    let opened = open_segments(dir, &listing.segments)?;
    let mut replay = Replay::new(&opened);
    let (mut offset, mut torn) = (DATA_START, 0);
    for (position, (file, _)) in opened.iter().enumerate() {
        let sealed_end = opened.get(position + 1).map(|(_, next)| next.prev_end);
        (offset, torn) = replay.segment(file, sealed_end)?;
    }
    let views = replay.finish(dir, &marks)?;

    // Everything checks out. From here on, files may change.
    for path in listing.leftovers.iter().chain(&listing.spares) {
        fs::remove_file(path).map_err(LogError::io("delete", path))?;
    }
    let (log_id, segments) = if opened.is_empty() {
        let path = dir.join(format!("spare-{:08}", listing.next_spare));
        listing.next_spare += 1;
        let spare = match spares.pop() {
            Some(spare) => spare,
            None => segment::create_spare(&path, config.segment_bytes).map(|()| path)?,
        };
        let log_id = rand::random();
        let header = SegmentHeader { seq: 1, log_id, capacity: config.segment_bytes, prev_end: 0 };
        (log_id, vec![segment::activate(dir, &spare, header)?])
    } else {
        (opened[0].1.log_id, opened.into_iter().map(|(file, _)| file).collect())
    };
    let segments: BTreeMap<u32, Arc<SegmentFile>> =
        segments.into_iter().map(|file| (file.seq, Arc::new(file))).collect();
    let Some(head) = segments.values().next_back().cloned() else {
        // Not reached: the list was empty above only if one was created.
        return Err(LogError::MissingSegment {
            file: segment::path_of(dir, 1),
            reason: "none exists".to_owned(),
        });
    };
    make_durable(dir, &head)?;
    let (groups, pins) = replay.into_memory();
    watermark.start(Marks {
        head: head.seq,
        groups: views.iter().map(|(group, view)| (*group, view.mark())).collect(),
    });
    let report = Recovery {
        segments: segments.len() as u64,
        groups: groups.len() as u64,
        entries: groups.values().map(|data| data.index.next() - data.index.first()).sum(),
        torn_tail_bytes: torn,
        took: start.elapsed(),
    };
    let next_spare = listing.next_spare;
    Ok(Recovered {
        log_id,
        head,
        offset,
        segments,
        groups,
        views,
        pins,
        watermark,
        spares,
        next_spare,
        report,
    })
}

/// What was read may still be in the page cache only. Also gives a cut-off file its full size back.
fn make_durable(dir: &Path, head: &SegmentFile) -> Result<(), LogError> {
    let sync = || {
        let len = head.file.metadata()?.len();
        segment::fill_with_zeros(&head.file, len, head.capacity)?;
        head.file.sync_all()?;
        segment::sync_dir(dir)
    };
    sync().map_err(LogError::io("sync", &head.path))
}

fn list(dir: &Path, segment_bytes: u64) -> Result<Listing, LogError> {
    let mut listing = Listing::default();
    let failed = || LogError::io("list", dir);
    for entry in fs::read_dir(dir).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(seq) = segment::seq_of(name) {
            listing.segments.push(seq);
        } else if name.ends_with(".tmp") {
            listing.leftovers.push(entry.path());
        } else if let Some(number) =
            name.strip_prefix("spare-").and_then(|number| number.parse::<u64>().ok())
        {
            listing.next_spare = listing.next_spare.max(number.saturating_add(1));
            let usable = entry.metadata().map_err(failed())?.len() == segment_bytes;
            if usable { &mut listing.spares } else { &mut listing.leftovers }.push(entry.path());
        }
    }
    listing.segments.sort_unstable();
    listing.spares.sort_unstable();
    Ok(listing)
}

fn open_segments(dir: &Path, seqs: &[u32]) -> Result<Vec<(SegmentFile, SegmentHeader)>, LogError> {
    let mut opened: Vec<(SegmentFile, SegmentHeader)> = Vec::with_capacity(seqs.len());
    for seq in seqs {
        if let Some((last, last_header)) = opened.last() {
            let missing = last.seq + 1;
            if *seq != missing {
                let reason = format!("there are segments {} and {seq}", last.seq);
                return Err(LogError::MissingSegment {
                    file: segment::path_of(dir, missing),
                    reason,
                });
            }
            let (file, header) = segment::open(dir, *seq)?;
            if header.log_id != last_header.log_id {
                let reason = "it belongs to another log than the segment before it".to_owned();
                return Err(LogError::NotASegment { file: file.path, reason });
            }
            opened.push((file, header));
        } else {
            opened.push(segment::open(dir, *seq)?);
        }
    }
    Ok(opened)
}

struct Replay {
    groups: BTreeMap<u64, Replayed>,
    /// No checkpoint or record was read yet.
    at_start: bool,
    oldest: u32,
    oldest_path: PathBuf,
    /// More entries than this cannot be in the files.
    max_entries: u64,
}

/// Why a batch is not valid.
enum Bad {
    At(u64, String),
    Newer(u64, String),
}

impl Replay {
    fn new(opened: &[(SegmentFile, SegmentHeader)]) -> Self {
        let bytes: u64 = opened.iter().map(|(file, _)| file.capacity).sum();
        Self {
            groups: BTreeMap::new(),
            at_start: true,
            oldest: opened.first().map_or(1, |(file, _)| file.seq),
            oldest_path: opened.first().map(|(file, _)| file.path.clone()).unwrap_or_default(),
            max_entries: bytes / HEADER_BYTES as u64,
        }
    }

    /// Reads one segment. Returns where it ends, and the size of a torn batch there.
    fn segment(
        &mut self,
        file: &SegmentFile,
        sealed_end: Option<u64>,
    ) -> Result<(u64, u64), LogError> {
        let mut window = Window::new(file)?;
        let mut offset = DATA_START;
        let limit = sealed_end.unwrap_or(file.capacity);
        loop {
            if Some(offset) == sealed_end {
                return Ok((offset, 0));
            }
            match self.batch(&mut window, offset, limit)? {
                Ok(end) => offset = end,
                Err(Bad::Newer(at, what)) => {
                    return Err(LogError::Unsupported {
                        file: file.path.clone(),
                        what: format!("at offset {at}: {what}"),
                    });
                }
                Err(Bad::At(at, reason)) => {
                    let corrupt =
                        |reason| LogError::Corrupt { file: file.path.clone(), offset: at, reason };
                    if sealed_end.is_some() {
                        return Err(corrupt(format!("{reason}, and later segments exist")));
                    }
                    if let Some(later) = window.find_batch_after(offset)? {
                        return Err(corrupt(format!(
                            "{reason}, but a later batch at offset {later} is intact"
                        )));
                    }
                    let torn = window.batch_at(offset)?.map_or(0, |header| header.index);
                    if torn > 0 {
                        tracing::info!(file = %file.path.display(), offset, torn, "cut a partly written batch");
                    }
                    return Ok((offset, torn));
                }
            }
        }
    }

    /// Checks the batch at `offset` as a whole, then replays it. Returns where it ends.
    fn batch(
        &mut self,
        window: &mut Window<'_>,
        offset: u64,
        limit: u64,
    ) -> Result<Result<u64, Bad>, LogError> {
        let file = window.file;
        let bad = |at: u64, reason: &str| Ok(Err(Bad::At(at, reason.to_owned())));
        let (len, count, checkpoint) =
            match frame::decode(window.bytes(offset, HEADER_BYTES)?, file.salt) {
                Ok(header) if header.kind == Kind::Batch && header.group == offset => {
                    (header.index, header.term, header.flags & FLAG_CHECKPOINT != 0)
                }
                Ok(_) => return bad(offset, "a batch does not start with its header"),
                Err(error @ FrameError::Unknown { .. }) => {
                    return Ok(Err(Bad::Newer(offset, describe(error))));
                }
                Err(error) => return Ok(Err(Bad::At(offset, describe(error)))),
            };
        let end = offset.saturating_add(len);
        let Ok(size) = usize::try_from(len) else { return bad(offset, "a batch is too long") };
        if end > limit || size % BATCH_ALIGN != 0 {
            return bad(offset, "a batch runs past the end of its segment");
        }
        let bytes = window.bytes(offset, size)?;
        let mut frames = Vec::new();
        let mut at = HEADER_BYTES;
        while (frames.len() as u64) < count {
            let place = offset + at as u64;
            match frame::decode(bytes.get(at..).unwrap_or_default(), file.salt) {
                Ok(frame) => {
                    at += HEADER_BYTES + frame.payload.len();
                    frames.push((place, frame));
                }
                Err(error @ FrameError::Unknown { .. }) => {
                    return Ok(Err(Bad::Newer(place, describe(error))));
                }
                Err(error) => return Ok(Err(Bad::At(place, describe(error)))),
            }
        }
        let padding = bytes.get(at..).unwrap_or_default();
        if bytes.len() != size
            || padding.len() >= BATCH_ALIGN
            || padding.iter().any(|byte| *byte != 0)
        {
            return bad(offset + at as u64, "the end of a batch is damaged");
        }
        // From here on the bytes are what was written. What does not fit together is damage for certain.
        let corrupt =
            |offset, reason| LogError::Corrupt { file: file.path.clone(), offset, reason };
        if self.at_start && self.oldest > 1 && !checkpoint {
            return Err(corrupt(
                offset,
                "the oldest segment does not start with the state of the groups".to_owned(),
            ));
        }
        for (place, frame) in &frames {
            self.frame(frame, file.seq, *place).map_err(|reason| corrupt(*place, reason))?;
        }
        self.at_start = false;
        Ok(Ok(end))
    }

    fn frame(&mut self, frame: &Frame<'_>, segment: u32, place: u64) -> Result<(), String> {
        let is_first = self.at_start;
        let max_entries = self.max_entries;
        let known = self.groups.contains_key(&frame.group);
        let group = self.groups.entry(frame.group).or_default();
        let result = match frame.kind {
            Kind::Batch => Err("a batch header inside a batch".to_owned()),
            Kind::Entry => group.append(frame, segment, place),
            Kind::Moved => group.moved(frame, segment, place),
            Kind::Vote => {
                group.view.vote = Some(frame.as_vote());
                Ok(())
            }
            Kind::Committed => {
                group.view.committed = frame.optional_id();
                Ok(())
            }
            Kind::Truncate => group.truncate(frame.optional_id()),
            Kind::Purge => {
                group.purge(frame.id());
                Ok(())
            }
            Kind::State => match StateRecord::decode(frame.payload) {
                None => Err("the state of a group is malformed".to_owned()),
                Some(record) if is_first => group.start(&record, max_entries),
                Some(record) if known && group.view.record() == record => Ok(()),
                Some(_) => {
                    Err("the state of the group does not follow from the records before it"
                        .to_owned())
                }
            },
        };
        result.map_err(|reason| format!("group {}: {reason}", frame.group))
    }

    /// The checks that need the whole log.
    fn finish(&self, dir: &Path, marks: &Marks) -> Result<BTreeMap<u64, View>, LogError> {
        if self.at_start && self.oldest > 1 {
            let reason = "the oldest one that exists is empty".to_owned();
            return Err(LogError::MissingSegment {
                file: segment::path_of(dir, self.oldest - 1),
                reason,
            });
        }
        for (group, replayed) in &self.groups {
            if let Some(missing) = replayed.slots.iter().position(Option::is_none) {
                let index = replayed.view.first + missing as u64;
                return Err(LogError::MissingEntry {
                    group: *group,
                    index,
                    oldest: self.oldest_path.clone(),
                });
            }
        }
        for (group, mark) in &marks.groups {
            let found = self.groups.get(group);
            let now = found.map(|replayed| replayed.view.mark()).unwrap_or_default();
            let same = mark.last.is_none_or(|last| found.is_some_and(|found| found.covers(last)));
            if !same || mark.vote > now.vote {
                return Err(LogError::BehindWatermark {
                    group: *group,
                    watermark: *mark,
                    found: now,
                });
            }
        }
        Ok(self.groups.iter().map(|(group, replayed)| (*group, replayed.view)).collect())
    }

    fn into_memory(self) -> (BTreeMap<u64, GroupData>, Pins) {
        let mut pins = Pins::default();
        let mut groups = BTreeMap::new();
        for (group, Replayed { view, slots }) in self.groups {
            let mut data = GroupData {
                purged: view.purged,
                vote: view.vote,
                committed: view.committed,
                ..GroupData::default()
            };
            data.index.reset(view.first);
            for (id, slot) in slots.into_iter().flatten() {
                pins.add(slot.segment, group, id.index);
                data.index.push(id, slot);
            }
            if let Some(purged) = view.purged {
                pins.purge(group, purged.index);
            }
            groups.insert(group, data);
        }
        (groups, pins)
    }
}
