//! The second opinion on how long the log is, and who owns it.
//!
//! A torn batch at the end of the last segment is cut at open, because it was never acknowledged. Bytes
//! alone cannot tell it from acknowledged data that the disk lost; the watermark can. It is a lower bound
//! per group of what was durable (last entry, vote), raised at coarse steps *after* a sync, and lowered
//! *before* a record that legitimately shortens a log is written. So at any crash: watermark <= log.
//!
//! The file has two slots that are written in turn, each with a generation and a checksum; the valid one
//! with the highest generation counts, so a torn write leaves the one before. Lowering writes both slots:
//! no higher bound may come back.
//!
//! ```text
//! slot: magic 8 | version u32 | len u32 | generation u64 | crc u32 | payload (len bytes)
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

use crate::{
    LogError,
    frame::{checksum, u32_at, u64_at},
    segment::{read_up_to, sync_dir},
    types::{Identity, LogId, Mark, Vote},
};

/// The most groups whose marks fit in a slot.
pub(crate) const MAX_GROUPS: usize = 4096;

const SLOT_BYTES: u64 = 256 * 1024;
const HEADER_BYTES: usize = 28;
const MAGIC: [u8; 8] = *b"TOMBOWTR";
const VERSION: u32 = 1;

/// What a slot says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) identity: Option<Identity>,
    pub(crate) marks: Marks,
}

/// The bounds themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// The newest segment that was started.
    pub(crate) head: u32,
    pub(crate) groups: BTreeMap<u64, Mark>,
}

#[derive(Debug)]
struct Stored {
    generation: u64,
    content: Content,
}

#[derive(Debug)]
pub(crate) struct Watermark {
    path: PathBuf,
    file: File,
    stored: Mutex<Stored>,
    /// What is durable in the log right now; the file follows at coarse steps. Lock order: after `stored`.
    durable: Mutex<Marks>,
}

/// One group's log is about to get shorter or its vote older: the most that may be claimed meanwhile.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lower {
    Last(Option<LogId>),
    Vote(Vote),
}

impl Watermark {
    pub(crate) fn path_in(dir: &Path) -> PathBuf {
        dir.join("watermark")
    }

    /// Creates the file with an empty content. It appears whole or not at all.
    pub(crate) fn create(dir: &Path) -> Result<Self, LogError> {
        let path = Self::path_in(dir);
        let temporary = path.with_extension("tmp");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(LogError::io("create", &temporary))?;
        let content = Content::default();
        write_slot(&file, 1, &content)
            .and_then(|()| write_slot(&file, 2, &content))
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, &path))
            .and_then(|()| sync_dir(dir))
            .map_err(LogError::io("create", &path))?;
        Ok(Self::with(path, file, Stored { generation: 2, content }))
    }

    /// Reads an existing file.
    pub(crate) fn open(dir: &Path) -> Result<Self, LogError> {
        let path = Self::path_in(dir);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(LogError::io("open", &path))?;
        let mut best: Option<Stored> = None;
        for slot in 0..2 {
            let found = read_slot(&file, slot, &path)?;
            if let Some(found) = found
                && best.as_ref().is_none_or(|best| best.generation < found.generation)
            {
                best = Some(found);
            }
        }
        match best {
            Some(stored) => Ok(Self::with(path, file, stored)),
            None => Err(LogError::WatermarkUnreadable { file: path }),
        }
    }

    fn with(path: PathBuf, file: File, stored: Stored) -> Self {
        Self { path, file, stored: Mutex::new(stored), durable: Mutex::default() }
    }

    pub(crate) fn content(&self) -> Content {
        self.stored.lock().content.clone()
    }

    pub(crate) fn set_identity(&self, identity: Identity) -> Result<(), LogError> {
        let mut stored = self.stored.lock();
        stored.content.identity = Some(identity);
        self.write(&mut stored)
            .and_then(|()| self.write(&mut stored))
            .map_err(LogError::io("write", &self.path))
    }

    /// The log's state at open, before the first write.
    pub(crate) fn start(&self, marks: Marks) {
        *self.durable.lock() = marks;
    }

    /// Notes what became durable. Memory only.
    pub(crate) fn note_group(&self, group: u64, mark: Mark) {
        self.durable.lock().groups.insert(group, mark);
    }

    /// Notes that a segment was started. Memory only.
    pub(crate) fn note_head(&self, head: u32) {
        self.durable.lock().head = head;
    }

    /// Brings the file up to what is durable now. Returns whether there was anything to write.
    pub(crate) fn raise(&self) -> io::Result<bool> {
        // Both locks: a lowering that comes meanwhile waits and then overwrites this.
        let mut stored = self.stored.lock();
        let marks = self.durable.lock().clone();
        if marks == stored.content.marks {
            return Ok(false);
        }
        stored.content.marks = marks;
        self.write(&mut stored).map(|()| true)
    }

    /// Takes back claims before records are written that make them untrue. Durable on return.
    pub(crate) fn lower(&self, changes: &[(u64, Lower)]) -> io::Result<()> {
        {
            let mut durable = self.durable.lock();
            for (group, change) in changes {
                if let Some(mark) = durable.groups.get_mut(group) {
                    change.apply(mark);
                }
            }
        }
        let mut stored = self.stored.lock();
        let mut changed = false;
        for (group, change) in changes {
            if let Some(mark) = stored.content.marks.groups.get_mut(group) {
                changed |= change.apply(mark);
            }
        }
        if changed {
            self.write(&mut stored)?;
            self.write(&mut stored)?;
        }
        Ok(())
    }

    fn write(&self, stored: &mut Stored) -> io::Result<()> {
        stored.generation += 1;
        write_slot(&self.file, stored.generation, &stored.content)?;
        self.file.sync_data()
    }
}

impl Lower {
    /// Returns whether the mark changed.
    fn apply(self, mark: &mut Mark) -> bool {
        let before = *mark;
        match self {
            Self::Last(last) => {
                if mark.last.map(|id| id.index) > last.map(|id| id.index) {
                    mark.last = last;
                }
            }
            Self::Vote(vote) => {
                if mark.vote > Some(vote) {
                    mark.vote = Some(vote);
                }
            }
        }
        *mark != before
    }
}

fn write_slot(file: &File, generation: u64, content: &Content) -> io::Result<()> {
    let payload = encode(content)?;
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&generation.to_le_bytes());
    let crc = checksum(checksum(0, &out), &payload);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&payload);
    if out.len() as u64 > SLOT_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the watermark does not fit its slot",
        ));
    }
    file.write_all_at(&out, (generation % 2) * SLOT_BYTES)
}

/// `None` if the slot is torn or damaged.
fn read_slot(file: &File, slot: u64, path: &Path) -> Result<Option<Stored>, LogError> {
    let read =
        |buf: &mut [u8], offset| read_up_to(file, buf, offset).map_err(LogError::io("read", path));
    let mut header = [0; HEADER_BYTES];
    let offset = slot * SLOT_BYTES;
    if read(&mut header, offset)? < HEADER_BYTES || header[0..8] != MAGIC {
        return Ok(None);
    }
    let len = u64::from(u32_at(&header, 12));
    if len > SLOT_BYTES - HEADER_BYTES as u64 {
        return Ok(None);
    }
    let mut payload = vec![0; usize::try_from(len).unwrap_or(0)];
    let complete = read(&mut payload, offset + HEADER_BYTES as u64)? == payload.len();
    if !complete || checksum(checksum(0, &header[..24]), &payload) != u32_at(&header, 24) {
        return Ok(None);
    }
    let version = u32_at(&header, 8);
    match decode(&payload) {
        Some(content) if version == VERSION => {
            Ok(Some(Stored { generation: u64_at(&header, 16), content }))
        }
        Some(_) | None => Err(LogError::Unsupported {
            file: path.to_owned(),
            what: format!("watermark format {version}"),
        }),
    }
}

fn encode(content: &Content) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend_from_slice(&content.marks.head.to_le_bytes());
    out.push(u8::from(content.identity.is_some()));
    if let Some(identity) = &content.identity {
        for text in [&identity.cluster_id, &identity.region, &identity.directory_id] {
            let len = u16::try_from(text.len()).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidInput, "a name in the identity is too long")
            })?;
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        out.extend_from_slice(&identity.node_id.to_le_bytes());
        out.extend_from_slice(&identity.incarnation.to_le_bytes());
        out.extend_from_slice(&identity.shard_count.to_le_bytes());
    }
    out.extend_from_slice(
        &u32::try_from(content.marks.groups.len()).unwrap_or(u32::MAX).to_le_bytes(),
    );
    for (group, mark) in &content.marks.groups {
        let committed = mark.vote.is_some_and(|vote| vote.committed);
        let flags = u8::from(mark.last.is_some())
            | u8::from(mark.vote.is_some()) << 1
            | u8::from(committed) << 2;
        let last = mark.last.unwrap_or(LogId { term: 0, node: 0, index: 0 });
        let vote = mark.vote.unwrap_or(Vote { term: 0, node: 0, committed: false });
        out.extend_from_slice(&group.to_le_bytes());
        out.push(flags);
        for number in [last.term, last.node, last.index, vote.term, vote.node] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
    Ok(out)
}

fn decode(bytes: &[u8]) -> Option<Content> {
    let mut rest = bytes;
    let head = take_u32(&mut rest)?;
    let identity = if take(&mut rest, 1)? == [1] {
        let cluster_id = take_text(&mut rest)?;
        let region = take_text(&mut rest)?;
        let directory_id = take_text(&mut rest)?;
        let node_id = take_u64(&mut rest)?;
        let (incarnation, shard_count) = (take_u32(&mut rest)?, take_u32(&mut rest)?);
        Some(Identity { cluster_id, region, node_id, directory_id, incarnation, shard_count })
    } else {
        None
    };
    let mut groups = BTreeMap::new();
    for _ in 0..take_u32(&mut rest)? {
        let group = take_u64(&mut rest)?;
        let flags = take(&mut rest, 1)?[0];
        let last = LogId {
            term: take_u64(&mut rest)?,
            node: take_u64(&mut rest)?,
            index: take_u64(&mut rest)?,
        };
        let vote = Vote {
            term: take_u64(&mut rest)?,
            node: take_u64(&mut rest)?,
            committed: flags & 4 != 0,
        };
        let mark =
            Mark { last: (flags & 1 != 0).then_some(last), vote: (flags & 2 != 0).then_some(vote) };
        groups.insert(group, mark);
    }
    Some(Content { identity, marks: Marks { head, groups } })
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(len)?;
    *rest = left;
    Some(taken)
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    take(rest, 4).map(|bytes| u32_at(bytes, 0))
}

fn take_u64(rest: &mut &[u8]) -> Option<u64> {
    take(rest, 8).map(|bytes| u64_at(bytes, 0))
}

fn take_text(rest: &mut &[u8]) -> Option<String> {
    let len = take(rest, 2)?;
    let len = usize::from(u16::from_le_bytes([len[0], len[1]]));
    String::from_utf8(take(rest, len)?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(index: u64) -> LogId {
        LogId { term: 1, node: 1, index }
    }

    fn mark(index: u64) -> Mark {
        Mark { last: Some(id(index)), vote: Some(Vote { term: 1, node: 2, committed: true }) }
    }

    fn identity() -> Identity {
        Identity {
            cluster_id: "demo".into(),
            region: "us".into(),
            node_id: 3,
            directory_id: "d".into(),
            incarnation: 4,
            shard_count: 5,
        }
    }

    #[test]
    fn a_damaged_slot_leaves_the_one_before_and_two_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mark_file = Watermark::create(dir.path()).unwrap();
        mark_file.set_identity(identity()).unwrap();
        for index in 1..4 {
            mark_file.note_group(7, mark(index));
            assert!(mark_file.raise().unwrap());
            assert!(!mark_file.raise().unwrap());
        }
        drop(mark_file);
        let path = Watermark::path_in(dir.path());
        let good = fs::read(&path).unwrap();
        let reopened = Watermark::open(dir.path()).unwrap().content();
        assert_eq!(reopened.marks.groups[&7], mark(3));
        assert_eq!(reopened.identity, Some(identity()));

        let second = usize::try_from(SLOT_BYTES).unwrap();
        for offset in [0, 10, 26, 40, second, second + 10, second + 26, second + 40] {
            let mut bad = good.clone();
            bad[offset] ^= 1;
            fs::write(&path, &bad).unwrap();
            let found = Watermark::open(dir.path()).unwrap().content().marks.groups[&7];
            assert!(found == mark(2) || found == mark(3), "{found}");
        }
        let mut bad = good;
        bad[30] ^= 1;
        bad[usize::try_from(SLOT_BYTES).unwrap() + 30] ^= 1;
        fs::write(&path, &bad).unwrap();
        assert!(matches!(Watermark::open(dir.path()), Err(LogError::WatermarkUnreadable { .. })));
    }

    #[test]
    fn a_lowered_mark_does_not_come_back_from_either_slot() {
        let dir = tempfile::tempdir().unwrap();
        let mark_file = Watermark::create(dir.path()).unwrap();
        mark_file.note_group(7, mark(9));
        mark_file.raise().unwrap();
        mark_file.lower(&[(7, Lower::Last(Some(id(4))))]).unwrap();
        assert!(!mark_file.raise().unwrap(), "what is durable was lowered as well");
        drop(mark_file);
        let path = Watermark::path_in(dir.path());
        let good = fs::read(&path).unwrap();
        for slot in [0, usize::try_from(SLOT_BYTES).unwrap()] {
            let mut bad = good.clone();
            bad[slot + 30] ^= 1;
            fs::write(&path, &bad).unwrap();
            let content = Watermark::open(dir.path()).unwrap().content();
            assert_eq!(content.marks.groups[&7].last, Some(id(4)));
        }
    }

    #[test]
    fn the_largest_content_fits_its_slot() {
        let dir = tempfile::tempdir().unwrap();
        let mark_file = Watermark::create(dir.path()).unwrap();
        for group in 0..MAX_GROUPS as u64 {
            mark_file.note_group(group, mark(group));
        }
        mark_file.raise().unwrap();
        assert_eq!(Watermark::open(dir.path()).unwrap().content().marks.groups.len(), MAX_GROUPS);
    }
}
