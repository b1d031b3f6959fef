//! The receiving side of a snapshot: blocks become table files, and one call ingests them.
//!
//! Files lie in `<dir>/snapshot-in/<shard>/<snapshot id>/`. The shard's whole key range is
//! parted among them; each file starts with a tombstone for its part, and a tombstone does not
//! touch the pairs of its own file. Ingesting all files in a single call is atomic: the shard
//! goes from all of the old content to all of the new, also across a crash.
//!
//! Invariants:
//! * Nothing of the shard changes before [`ShardStore::install`].
//! * A block is checked before any of it is written.
//! * Memory: one block, and the engine's buffers for one file.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use rocksdb::{IngestExternalFileOptions, SstFileWriter};
use tombolo_core::{ShardId, placement::SHARDS_MAX};

use crate::{
    Position, ShardStore, SnapshotTotals, StorageError, Store,
    engine::{Engine, table_options},
    layout::{self, Keys, Meta},
    shard::decode_membership,
    snapshot_block::read_block,
    snapshot_progress::Progress,
};

/// Size at which a table file ends, in bytes.
const FILE_BYTES: u64 = 32 << 20;
/// Half-received snapshots that nobody went on with are dropped when the store opens.
const LEFTOVER_AGE: Duration = Duration::from_hours(1);

/// A snapshot that is being received. Dropping it keeps what came so far, for
/// [`Store::begin_install`] with the same id.
pub struct SnapshotInstall {
    claim: Arc<Claim>,
    id: String,
    dir: PathBuf,
    /// What complete files hold.
    done: Progress,
    /// The same, with the open file.
    ahead: Progress,
    open: Option<SstFileWriter<'static>>,
    keys: Keys,
}

/// A snapshot that came in whole and is ready to be installed.
pub struct ReceivedSnapshot {
    claim: Arc<Claim>,
    dir: PathBuf,
    files: Vec<PathBuf>,
    position: Option<Position>,
    membership: Option<(Position, Bytes)>,
    totals: SnapshotTotals,
}

/// The right to receive for a shard; one at a time.
struct Claim {
    engine: Arc<Engine>,
    shard: ShardId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.engine.receiving.lock().remove(&self.shard);
    }
}

impl Store {
    /// Starts to receive a snapshot, or goes on with one that was interrupted; what came of other
    /// snapshots of the shard is dropped.
    ///
    /// # Errors
    /// [`StorageError::ReceiveBusy`] while another one is open for the shard,
    /// [`StorageError::SnapshotId`] if the id cannot name a directory, or if the disk refuses.
    pub fn begin_install(
        &self,
        shard: ShardId,
        snapshot_id: &str,
    ) -> Result<SnapshotInstall, StorageError> {
        if SHARDS_MAX <= shard.0 {
            return Err(StorageError::UnknownShard { shard });
        }
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if !(1..=128).contains(&snapshot_id.len()) || !snapshot_id.bytes().all(legal) {
            return Err(StorageError::SnapshotId { id: snapshot_id.to_owned() });
        }
        if !self.engine.receiving.lock().insert(shard) {
            return Err(StorageError::ReceiveBusy { shard });
        }
        let claim = Arc::new(Claim { engine: Arc::clone(&self.engine), shard });

        let shard_dir = shard_dir(&self.engine.dir, shard);
        let dir = shard_dir.join(snapshot_id);
        fs::create_dir_all(&dir).map_err(|source| StorageError::io(&dir, source))?;
        remove_all_but(&shard_dir, |path| path == dir)?;
        let done = Progress::load(&dir).unwrap_or_default();
        remove_strays(&dir, done.files.len())?;
        Ok(SnapshotInstall {
            claim,
            id: snapshot_id.to_owned(),
            dir,
            ahead: done.clone(),
            done,
            open: None,
            keys: Keys::new(shard),
        })
    }
}

impl SnapshotInstall {
    /// Number of the block that is needed next.
    pub fn next_chunk(&self) -> u64 {
        self.ahead.totals.chunks
    }

    /// Takes a block. One that came before is skipped.
    ///
    /// # Errors
    /// [`StorageError::ChunkOrder`] if blocks are missing before it,
    /// [`StorageError::DamagedChunk`] if it is not what was sent: nothing of it is taken then.
    /// After an error of the disk [`next_chunk`](Self::next_chunk) has gone back.
    pub fn write(&mut self, number: u64, block: &[u8], crc: u32) -> Result<(), StorageError> {
        let expected = self.next_chunk();
        if number < expected {
            return Ok(());
        }
        if expected < number {
            return Err(StorageError::ChunkOrder { expected, actual: number });
        }
        let damaged = |problem| StorageError::DamagedChunk { number, problem };
        if crc32fast::hash(block) != crc {
            return Err(damaged("checksum mismatch"));
        }
        let pairs = read_block(Bytes::copy_from_slice(block))
            .map_err(|_| damaged("not a block of pairs"))?;
        let mut last: &[u8] = &self.ahead.last_key;
        for (key, _) in &pairs {
            if key <= last {
                return Err(damaged("keys are out of order"));
            }
            last = key;
        }
        if let Err(error) = self.write_pairs(&pairs) {
            // The open file may hold part of the block: go back to the last complete one.
            self.open = None;
            self.ahead = self.done.clone();
            return Err(error);
        }
        self.ahead.totals.add(pairs.len() as u64, block.len() as u64, crc);
        let is_full = self.open.as_ref().is_some_and(|file| FILE_BYTES <= file.file_size());
        if is_full { self.seal(None) } else { Ok(()) }
    }

    /// Checks that everything came, and closes the last file.
    ///
    /// # Errors
    /// [`StorageError::SnapshotMismatch`] if it is not what the source counted; what came is
    /// dropped then.
    pub fn finish(mut self, end: SnapshotTotals) -> Result<ReceivedSnapshot, StorageError> {
        if self.ahead.totals != end {
            self.open = None;
            let problem = if self.ahead.totals.chunks < end.chunks {
                "chunks are missing"
            } else {
                "the counts or checksums differ"
            };
            self.discard()?;
            return Err(StorageError::SnapshotMismatch { id: self.id.clone(), problem });
        }
        let shard = self.claim.shard;
        let range_end = layout::shard_end(shard);
        if self.done.part_start != range_end {
            // Also with nothing left to write: the rest of the range has to be cleared.
            self.open_file()?;
            self.seal(Some(range_end))?;
        }

        let position = self.done.applied.as_deref();
        let position = position.map(|bytes| Position::from_bytes(shard, bytes)).transpose()?;
        let membership = self.done.membership.clone();
        let membership = membership.map(|bytes| decode_membership(shard, bytes)).transpose()?;
        let count = self.done.files.len();
        let files = (0..count).map(|number| Progress::file_path(&self.dir, number)).collect();
        Ok(ReceivedSnapshot {
            claim: Arc::clone(&self.claim),
            dir: self.dir.clone(),
            files,
            position,
            membership,
            totals: self.done.totals,
        })
    }

    fn write_pairs(&mut self, pairs: &[(Bytes, Bytes)]) -> Result<(), StorageError> {
        self.open_file()?;
        let Some(file) = &mut self.open else { return Ok(()) };
        let shard = self.claim.shard;
        let failed = |error| StorageError::engine(Some(shard), &error);
        let applied = self.keys.meta(Meta::Applied)[2..].to_vec();
        let membership = self.keys.meta(Meta::Membership)[2..].to_vec();
        let mut full = layout::shard_start(shard);
        for (key, value) in pairs {
            full.truncate(2);
            full.extend_from_slice(key);
            file.put(&full, value).map_err(failed)?;
            if key == applied.as_slice() {
                self.ahead.applied = Some(Bytes::copy_from_slice(value));
            } else if key == membership.as_slice() {
                self.ahead.membership = Some(Bytes::copy_from_slice(value));
            }
        }
        if let Some((last, _)) = pairs.last() {
            self.ahead.last_key = Bytes::copy_from_slice(last);
        }
        Ok(())
    }

    fn open_file(&mut self) -> Result<(), StorageError> {
        if self.open.is_none() {
            let path = Progress::file_path(&self.dir, self.done.files.len());
            let file = SstFileWriter::create(table_options());
            let opened = file.open(&path);
            opened.map_err(|error| StorageError::engine(Some(self.claim.shard), &error))?;
            self.open = Some(file);
        }
        Ok(())
    }

    /// Closes the open file, whose part ends at `end`, or right after its last key.
    fn seal(&mut self, end: Option<Vec<u8>>) -> Result<(), StorageError> {
        let Some(mut file) = self.open.take() else { return Ok(()) };
        let shard = self.claim.shard;
        let start = match &self.done.part_start[..] {
            [] => layout::shard_start(shard),
            start => start.to_vec(),
        };
        let end = end.unwrap_or_else(|| {
            let mut after = layout::shard_start(shard);
            after.extend_from_slice(&self.ahead.last_key);
            after.push(0);
            after
        });
        let failed = |error| StorageError::engine(Some(shard), &error);
        file.delete_range(&start, &end).map_err(failed)?;
        file.finish().map_err(failed)?;
        let path = Progress::file_path(&self.dir, self.done.files.len());
        let size = fs::metadata(&path).map_err(|source| StorageError::io(&path, source))?.len();
        self.ahead.files.push(size);
        self.ahead.part_start = Bytes::from(end);
        self.ahead.store(&self.dir)?;
        self.done = self.ahead.clone();
        Ok(())
    }

    fn discard(&mut self) -> Result<(), StorageError> {
        self.done = Progress::default();
        self.ahead = Progress::default();
        fs::remove_dir_all(&self.dir).map_err(|source| StorageError::io(&self.dir, source))
    }
}

/// Keeps what came so far.
impl Drop for SnapshotInstall {
    fn drop(&mut self) {
        let has_new = self.done.totals.chunks < self.ahead.totals.chunks;
        if has_new && let Err(error) = self.seal(None) {
            tracing::warn!(shard = %self.claim.shard, %error, "part of a received snapshot is lost");
        }
    }
}

impl Drop for ReceivedSnapshot {
    /// Installed, its files have moved into the store; declined, nobody needs them.
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            let shard = self.claim.shard;
            tracing::warn!(%shard, %error, "a snapshot's directory stays behind");
        }
    }
}

impl ReceivedSnapshot {
    /// Up to where the log is applied in it.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// The membership in it.
    pub fn membership(&self) -> Option<(Position, Bytes)> {
        self.membership.clone()
    }

    /// What it amounts to.
    pub fn totals(&self) -> SnapshotTotals {
        self.totals
    }
}

impl ShardStore {
    /// Replaces everything in the shard by the snapshot, atomically and durably.
    ///
    /// # Errors
    /// If the snapshot is of another shard, or the engine refuses: the shard is unchanged then.
    pub fn install(&self, received: ReceivedSnapshot) -> Result<(), StorageError> {
        let shard = &*self.inner;
        if received.claim.shard != shard.id {
            return Err(StorageError::UnknownShard { shard: received.claim.shard });
        }
        let mut applying = shard.applying.lock();
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        options.set_snapshot_consistency(true);
        options.set_allow_global_seqno(true);
        options.set_allow_blocking_flush(true);
        let files = received.files.clone();
        let ingested = shard.engine.db.ingest_external_file_opts(&options, files);
        ingested.map_err(|error| shard.engine_error(&error))?;

        let (view, loaded) = shard.load_state()?;
        *applying = loaded;
        let index = view.applied.map_or(0, |applied| applied.index);
        *shard.view.write() = view;
        shard.applied.send_replace(index);
        shard.frontiers_moved.send_modify(|count| *count += 1);
        shard.members.send_replace(shard.view.read().members.clone());
        Ok(())
    }
}

fn shard_dir(dir: &Path, shard: ShardId) -> PathBuf {
    dir.join("snapshot-in").join(shard.to_string())
}

/// Drops what cannot be gone on with: directories without progress, or that are too old.
pub(crate) fn clean_leftovers(dir: &Path) -> Result<(), StorageError> {
    let all = dir.join("snapshot-in");
    if !all.exists() {
        return Ok(());
    }
    let is_usable = |path: &Path| {
        let changed = fs::metadata(path).and_then(|dir| dir.modified());
        let age = changed.map(|changed| SystemTime::now().duration_since(changed));
        let is_old = age.is_ok_and(|age| age.is_ok_and(|age| LEFTOVER_AGE < age));
        !is_old && Progress::load(path).is_some()
    };
    for shard in list(&all)? {
        if shard.is_dir() {
            remove_all_but(&shard, is_usable)?;
        }
    }
    Ok(())
}

fn remove_all_but(dir: &Path, keep: impl Fn(&Path) -> bool) -> Result<(), StorageError> {
    for path in list(dir)? {
        if !keep(&path) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes files of a half-done write: table files past the complete ones.
fn remove_strays(dir: &Path, complete: usize) -> Result<(), StorageError> {
    let known: Vec<PathBuf> =
        (0..complete).map(|number| Progress::file_path(dir, number)).collect();
    let is_progress = |path: &Path| complete > 0 && path.ends_with("progress");
    remove_all_but(dir, |path| is_progress(path) || known.iter().any(|known| known == path))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
    };
    read().map_err(|source| StorageError::io(dir, source))
}

fn remove(path: &Path) -> Result<(), StorageError> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(|source| StorageError::io(path, source))
}

#[cfg(test)]
mod tests;
