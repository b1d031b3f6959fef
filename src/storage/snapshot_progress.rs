//! What a half-received snapshot already has on disk, so that a transfer survives a restart.
//!
//! Written beside the table files after each of them is complete, and replaced atomically. A
//! progress file that does not decode, or does not match the files, counts as no progress.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use tombolo_core::{
    DecodeError,
    codec::{Reader, Writer},
};

use crate::{SnapshotTotals, StorageError};

const PROGRESS_VERSION: u8 = 1;
const NAME: &str = "progress";
const NEW_NAME: &str = "progress.new";

/// What is received and safe on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Of the blocks in complete files; `chunks` is the number of the next block.
    pub(crate) totals: SnapshotTotals,
    /// Size of each complete file, in bytes, in order.
    pub(crate) files: Vec<u64>,
    /// Where the next file's part of the key range starts; empty before the first.
    pub(crate) part_start: Bytes,
    /// The last key; empty before the first.
    pub(crate) last_key: Bytes,
    /// The stored applied position, if it came by.
    pub(crate) applied: Option<Bytes>,
    /// The stored membership, if it came by.
    pub(crate) membership: Option<Bytes>,
}

impl Progress {
    pub(crate) fn file_path(dir: &Path, number: usize) -> PathBuf {
        dir.join(format!("{number:06}.sst"))
    }

    /// What `dir` holds, if it can be gone on with.
    pub(crate) fn load(dir: &Path) -> Option<Self> {
        let bytes = fs::read(dir.join(NAME)).ok()?;
        let progress = Self::from_bytes(Bytes::from(bytes)).ok()?;
        let is_whole = progress.files.iter().enumerate().all(|(number, &size)| {
            fs::metadata(Self::file_path(dir, number)).is_ok_and(|file| file.len() == size)
        });
        is_whole.then_some(progress)
    }

    /// Replaces the progress file.
    pub(crate) fn store(&self, dir: &Path) -> Result<(), StorageError> {
        let new = dir.join(NEW_NAME);
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&self.to_bytes())?;
            file.sync_all()?;
            fs::rename(&new, dir.join(NAME))?;
            File::open(dir)?.sync_all()
        };
        write().map_err(|source| StorageError::io(&new, source))
    }

    fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::with_capacity(256);
        writer.u8(PROGRESS_VERSION);
        self.totals.encode(&mut writer);
        writer.count(self.files.len());
        for &size in &self.files {
            writer.varint(size);
        }
        writer.bytes(&self.part_start);
        writer.bytes(&self.last_key);
        for value in [&self.applied, &self.membership] {
            writer.u8(u8::from(value.is_some()));
            writer.bytes(value.as_deref().unwrap_or_default());
        }
        let crc = crc32fast::hash(writer.as_slice());
        writer.fixed32(crc);
        writer.finish()
    }

    fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let what = "snapshot progress";
        let end = bytes.len().checked_sub(4).ok_or(DecodeError::Truncated { what })?;
        let crc = Reader::new(what, bytes.slice(end..)).fixed32()?;
        let body = bytes.slice(..end);
        if crc32fast::hash(&body) != crc {
            return Err(DecodeError::Checksum { what });
        }
        let mut reader = Reader::new(what, body);
        reader.version(PROGRESS_VERSION)?;
        let totals = SnapshotTotals::decode(&mut reader)?;
        let count = reader.count(1)?;
        let files = (0..count).map(|_| reader.varint()).collect::<Result<_, _>>()?;
        let part_start = reader.bytes()?;
        let last_key = reader.bytes()?;
        let mut values = [None, None];
        for value in &mut values {
            let is_there = reader.u8()? == 1;
            let bytes = reader.bytes()?;
            *value = is_there.then_some(bytes);
        }
        reader.finish()?;
        let [applied, membership] = values;
        Ok(Self { totals, files, part_start, last_key, applied, membership })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_reads_back_and_damage_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let progress = Progress {
            totals: SnapshotTotals { chunks: 3, pairs: 9, bytes: 400, crc: 7 },
            files: vec![],
            part_start: Bytes::from_static(b"abc"),
            last_key: Bytes::from_static(b"abb"),
            applied: Some(Bytes::from_static(b"x")),
            membership: None,
        };
        progress.store(dir.path()).unwrap();
        assert_eq!(Progress::load(dir.path()), Some(progress.clone()));

        let mut bytes = progress.to_bytes().to_vec();
        bytes[3] ^= 1;
        fs::write(dir.path().join(NAME), bytes).unwrap();
        assert_eq!(Progress::load(dir.path()), None);

        let missing = Progress { files: vec![10], ..progress };
        missing.store(dir.path()).unwrap();
        assert_eq!(Progress::load(dir.path()), None);
    }
}
