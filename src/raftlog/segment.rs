//! Segment files: the header, creation, recycling.
//!
//! A segment is a file of fixed size that was filled with zeros before its first use, so that a sync
//! of it has no file size and no extents to write. The first 4 KiB are the header page; batches follow.
//!
//! ```text
//! magic 8 | version u32 | seq u32 | log_id u64 | salt u32 | reserved u32 | capacity u64 | prev_end u64 | crc u32
//! ```
//!
//! `log_id` is drawn once per log directory, so that a segment of another node is recognized. The salt
//! is `log_id` mixed with a bijection of `seq`: no two segments of one log share it. `prev_end` seals the
//! segment before this one: it ends exactly there, and every byte up to there was synced.
//!
//! The header is synced before the file gets its `.log` name; a `.log` file with a bad header is damage.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    LogError,
    frame::{checksum, u32_at, u64_at},
};

/// Offset of the first batch.
pub(crate) const DATA_START: u64 = 4096;

const MAGIC: [u8; 8] = *b"TOMBOLOG";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 52;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// What the header page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) seq: u32,
    pub(crate) log_id: u64,
    /// Bytes of the file.
    pub(crate) capacity: u64,
    /// Where the segment before this one ends; 0 for the first of all.
    pub(crate) prev_end: u64,
}

/// An open segment.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    pub(crate) seq: u32,
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) salt: u32,
    /// Bytes of the file.
    pub(crate) capacity: u64,
}

impl SegmentHeader {
    fn salt(&self) -> u32 {
        // The finalizer of MurmurHash3: a bijection, so different segments get different salts.
        let mut mixed = self.seq;
        mixed ^= mixed >> 16;
        mixed = mixed.wrapping_mul(0x85eb_ca6b);
        mixed ^= mixed >> 13;
        mixed = mixed.wrapping_mul(0xc2b2_ae35);
        mixed ^= mixed >> 16;
        mixed ^ u32_at(&self.log_id.to_le_bytes(), 0)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4096);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.log_id.to_le_bytes());
        out.extend_from_slice(&self.salt().to_le_bytes());
        out.extend_from_slice(&0_u32.to_le_bytes());
        out.extend_from_slice(&self.capacity.to_le_bytes());
        out.extend_from_slice(&self.prev_end.to_le_bytes());
        let crc = checksum(0, &out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.resize(4096, 0);
        out
    }

    fn decode(bytes: &[u8; HEADER_BYTES], path: &Path) -> Result<Self, LogError> {
        if bytes[0..8] != MAGIC {
            let reason = "it does not start with the magic number".to_owned();
            return Err(LogError::NotASegment { file: path.to_owned(), reason });
        }
        if checksum(0, &bytes[..48]) != u32_at(bytes, 48) {
            let reason = "the checksum of the segment header does not match".to_owned();
            return Err(LogError::Corrupt { file: path.to_owned(), offset: 0, reason });
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            let what = format!("segment format {version}");
            return Err(LogError::Unsupported { file: path.to_owned(), what });
        }
        Ok(Self {
            seq: u32_at(bytes, 12),
            log_id: u64_at(bytes, 16),
            capacity: u64_at(bytes, 32),
            prev_end: u64_at(bytes, 40),
        })
    }
}

/// `00000042.log`.
pub(crate) fn path_of(dir: &Path, seq: u32) -> PathBuf {
    dir.join(format!("{seq:08}.log"))
}

/// The inverse of [`path_of`] for a file name.
pub(crate) fn seq_of(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".log")?;
    (digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok())?
}

/// Opens an existing segment. The file may be shorter than its capacity; recovery deals with that.
pub(crate) fn open(dir: &Path, seq: u32) -> Result<(SegmentFile, SegmentHeader), LogError> {
    let path = path_of(dir, seq);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(LogError::io("open segment", &path))?;
    let mut bytes = [0; HEADER_BYTES];
    let read = read_up_to(&file, &mut bytes, 0).map_err(LogError::io("read segment", &path))?;
    if read < HEADER_BYTES {
        let reason = format!("the file has only {read} bytes");
        return Err(LogError::Corrupt { file: path, offset: 0, reason });
    }
    let header = SegmentHeader::decode(&bytes, &path)?;
    if header.seq != seq {
        let reason = format!("its header says that it is segment {}", header.seq);
        return Err(LogError::NotASegment { file: path, reason });
    }
    if !(DATA_START..=u64::from(u32::MAX)).contains(&header.capacity) {
        let reason = format!("its header names a capacity of {} bytes", header.capacity);
        return Err(LogError::NotASegment { file: path, reason });
    }
    let salt = header.salt();
    Ok((SegmentFile { seq, path, file, salt, capacity: header.capacity }, header))
}

/// Writes a file of zeros that can become a segment. Synced under a temporary name, then renamed.
pub(crate) fn create_spare(path: &Path, capacity: u64) -> Result<(), LogError> {
    let temporary = path.with_extension("tmp");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&temporary)
        .map_err(LogError::io("create segment", &temporary))?;
    fill_with_zeros(&file, 0, capacity)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(LogError::io("prepare segment", &temporary))
}

/// Turns a spare file into the segment that `header` describes: durable when this returns.
pub(crate) fn activate(
    dir: &Path,
    spare: &Path,
    header: SegmentHeader,
) -> Result<SegmentFile, LogError> {
    let path = path_of(dir, header.seq);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(spare)
        .map_err(LogError::io("open spare segment", spare))?;
    file.write_all_at(&header.encode(), 0)
        .and_then(|()| file.sync_data())
        .and_then(|()| fs::rename(spare, &path))
        .and_then(|()| sync_dir(dir))
        .map_err(LogError::io("start segment", &path))?;
    Ok(SegmentFile { seq: header.seq, path, file, salt: header.salt(), capacity: header.capacity })
}

/// Overwrites `from..to` with zeros, extending the file if need be. Not synced.
pub(crate) fn fill_with_zeros(file: &File, from: u64, to: u64) -> io::Result<()> {
    let mut offset = from;
    while offset < to {
        let len = usize::try_from(to - offset).unwrap_or(usize::MAX).min(ZEROS.len());
        file.write_all_at(&ZEROS[..len], offset)?;
        offset += len as u64;
    }
    Ok(())
}

/// Makes renames and new files in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads until `buf` is full or the file ends; returns the bytes read.
pub(crate) fn read_up_to(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buf.len() {
        match file.read_at(&mut buf[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn segments_of_one_log_have_different_salts() {
        let salts: BTreeSet<u32> = (0..50_000)
            .map(|seq| SegmentHeader { seq, log_id: 77, capacity: 0, prev_end: 0 }.salt())
            .collect();
        assert_eq!(salts.len(), 50_000);
    }

    #[test]
    fn file_names_and_numbers_correspond() {
        let dir = Path::new("x");
        for seq in [1, 42, 99_999_999, u32::MAX] {
            let path = path_of(dir, seq);
            assert_eq!(seq_of(path.file_name().unwrap().to_str().unwrap()), Some(seq));
        }
        for name in ["watermark", "1.log", "0000000x.log", "00000001.log.tmp", "99999999999.log"] {
            assert_eq!(seq_of(name), None, "{name}");
        }
    }
}
