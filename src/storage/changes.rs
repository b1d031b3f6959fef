//! The change log: what links and watchers read, by actor and sequence number.
//!
//! Each stored change says how many bytes its actor's log had received up to and including it,
//! so that the size of any part of a log is the difference of two headers.

use bytes::Bytes;
use rocksdb::DBRawIterator;
use tombolo_core::{Actor, Change, Dot, HybridTime, NamespaceId, VersionVector, record::Delta};

use crate::{
    ShardStore, StorageError,
    layout::{self, Keys},
    shard::Shard,
};

const CHANGE_VERSION: u8 = 1;
/// Version and end of the log, before the change itself.
pub(crate) const HEADER_BYTES: usize = 9;

/// A change as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChange {
    /// The encoding, as `Change::to_bytes` writes it.
    pub bytes: Bytes,
    /// The same, decoded.
    pub decoded: Change,
}

pub(crate) fn encode_header(log_end_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut header = [CHANGE_VERSION; HEADER_BYTES];
    header[1..].copy_from_slice(&log_end_bytes.to_le_bytes());
    header
}

impl Shard {
    /// Reads a header: the bytes of the log up to and including this change.
    fn log_end_of(&self, value: &[u8]) -> Result<u64, StorageError> {
        match value.split_first_chunk::<HEADER_BYTES>() {
            Some(([CHANGE_VERSION, end @ ..], _)) => Ok(u64::from_le_bytes(*end)),
            Some(_) | None => Err(StorageError::Corrupt {
                shard: Some(self.id),
                place: "change".to_owned(),
                detail: "the header has the wrong length or an unknown version".to_owned(),
            }),
        }
    }

    fn decode_change(&self, value: &[u8]) -> Result<StoredChange, StorageError> {
        self.log_end_of(value)?;
        let bytes = Bytes::copy_from_slice(&value[HEADER_BYTES..]);
        let decoded = Change::from_bytes(bytes.clone())
            .map_err(|error| StorageError::value(self.id, "change", &error))?;
        Ok(StoredChange { bytes, decoded })
    }

    /// An actor's changes from `from_seq` on.
    fn log(&self, namespace: NamespaceId, actor: Actor, from_seq: u64) -> DBRawIterator<'_> {
        let mut keys = Keys::new(self.id);
        let start = keys.change(namespace, actor, from_seq).to_vec();
        let end = keys.change(namespace, actor, u64::MAX).to_vec();
        self.iterate(start, end, true)
    }

    /// The bytes that were ever appended to a log, as far as it still knows.
    pub(crate) fn log_end(
        &self,
        namespace: NamespaceId,
        actor: Actor,
    ) -> Result<u64, StorageError> {
        let mut pairs = self.log(namespace, actor, 0);
        pairs.seek_to_last();
        match pairs.value() {
            Some(value) => self.log_end_of(value),
            None => self.check(&pairs).map(|()| 0),
        }
    }

    /// The encoded change that begins with this sequence number, if the log still has it.
    pub(crate) fn logged(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        first_seq: u64,
    ) -> Result<Option<Bytes>, StorageError> {
        let value = self.get(Keys::new(self.id).change(namespace, actor, first_seq))?;
        value.map(|value| Ok(self.decode_change(&value)?.bytes)).transpose()
    }

    /// First and last sequence number of the change that starts at `seq` or last before it.
    pub(crate) fn change_at_or_before(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        seq: u64,
    ) -> Result<Option<(u64, u64)>, StorageError> {
        let mut pairs = self.log(namespace, actor, 0);
        pairs.seek_for_prev(Keys::new(self.id).change(namespace, actor, seq));
        match pairs.value() {
            Some(value) => {
                let change = self.decode_change(value)?.decoded;
                Ok(Some((change.first_seq, change.last().seq)))
            }
            None => self.check(&pairs).map(|()| None),
        }
    }

    fn first_seq(&self, key: &[u8]) -> Result<u64, StorageError> {
        layout::change_seq(key).ok_or_else(|| StorageError::key(self.id, "change"))
    }
}

impl ShardStore {
    /// Changes of an actor, in order and without a gap, starting with the one whose first
    /// sequence number is `from_seq`: at least one if there is any, and no more after `max_bytes`.
    /// Empty if `from_seq` is past the end.
    ///
    /// # Errors
    /// [`StorageError::Trimmed`] if the log no longer holds that change: the caller must repair.
    pub fn changes(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        from_seq: u64,
        max_bytes: usize,
    ) -> Result<Vec<StoredChange>, StorageError> {
        let shard = &*self.inner;
        // Read before the log, so that a change that comes in between is not missed.
        let known = self.known(namespace, actor);
        let mut pairs = shard.log(namespace, actor, from_seq);
        pairs.seek_to_first();
        let (mut changes, mut bytes, mut expected) = (Vec::new(), 0, from_seq);
        while let Some((key, value)) = pairs.item() {
            let is_next = shard.first_seq(key)? == expected;
            if !is_next || (max_bytes <= bytes && !changes.is_empty()) {
                break;
            }
            let change = shard.decode_change(value)?;
            bytes += value.len();
            expected = change.decoded.last().seq + 1;
            changes.push(change);
            pairs.next();
        }
        shard.check(&pairs)?;
        let is_hole = pairs.valid() || from_seq <= known;
        if changes.is_empty() && is_hole {
            return Err(StorageError::Trimmed { namespace, actor, from_seq });
        }
        Ok(changes)
    }

    /// What one write did, if the log still has it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn logged_write(
        &self,
        namespace: NamespaceId,
        dot: Dot,
    ) -> Result<Option<Delta>, StorageError> {
        let shard = &*self.inner;
        let mut pairs = shard.log(namespace, dot.actor, 0);
        pairs.seek_for_prev(Keys::new(shard.id).change(namespace, dot.actor, dot.seq));
        let Some(value) = pairs.value() else { return shard.check(&pairs).map(|()| None) };
        let deltas = shard.decode_change(value)?.decoded.deltas;
        Ok(deltas.into_iter().find(|delta| delta.sibling.dot == dot))
    }

    /// When the first change at or after `from_seq` was written; `None` if there is none. Tells
    /// how far a peer that has all before it lags.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn oldest_change_time(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        from_seq: u64,
    ) -> Result<Option<HybridTime>, StorageError> {
        let shard = &*self.inner;
        let mut pairs = shard.log(namespace, actor, from_seq);
        pairs.seek_to_first();
        match pairs.value() {
            Some(value) => Ok(Some(shard.decode_change(value)?.decoded.time())),
            None => shard.check(&pairs).map(|()| None),
        }
    }

    /// Bytes of an actor's log from the change that holds `from_seq` on, before compression, as
    /// far as the log still has it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn log_bytes_from(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        from_seq: u64,
    ) -> Result<u64, StorageError> {
        let shard = &*self.inner;
        let Some((_, end)) = self.log_bytes(namespace, actor)? else { return Ok(0) };
        let mut pairs = shard.log(namespace, actor, from_seq);
        pairs.seek_to_first();
        let Some(first) = pairs.value() else { return shard.check(&pairs).map(|()| 0) };
        // A trim between the two looks makes the answer 0, not nonsense.
        Ok(end.saturating_sub(shard.log_end_of(first)?.saturating_sub(first.len() as u64)))
    }

    /// Size of a namespace's change log, in bytes before compression: a few seeks.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn change_log_bytes(&self, namespace: NamespaceId) -> Result<u64, StorageError> {
        Ok(self.log_sizes(namespace)?.into_iter().map(|(_, size)| size).sum())
    }

    fn log_sizes(&self, namespace: NamespaceId) -> Result<Vec<(Actor, u64)>, StorageError> {
        let size = |(actor, _)| {
            let size = self.log_bytes(namespace, actor)?.map_or(0, |(start, end)| end - start);
            Ok((actor, size))
        };
        self.frontier(namespace).iter().map(size).collect()
    }

    /// What must go so that at most `keep_bytes` of a namespace's change log stay; empty if it is
    /// not larger. Each actor's log gives up the same share.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn over_budget(
        &self,
        namespace: NamespaceId,
        keep_bytes: u64,
    ) -> Result<VersionVector, StorageError> {
        let sizes = self.log_sizes(namespace)?;
        let total: u64 = sizes.iter().map(|(_, size)| size).sum();
        if total <= keep_bytes {
            return Ok(VersionVector::new());
        }
        let mut upto = VersionVector::new();
        for (actor, size) in sizes {
            let keep = u128::from(size) * u128::from(keep_bytes) / u128::from(total);
            let keep = u64::try_from(keep).unwrap_or(u64::MAX);
            upto.advance(actor, self.trim_point(namespace, actor, keep)?);
        }
        Ok(upto)
    }

    /// Up to which sequence number an actor's log must be trimmed so that at most `keep_bytes`
    /// of it stay; 0 if it is not larger.
    ///
    /// # Errors
    /// If it cannot be read.
    fn trim_point(
        &self,
        namespace: NamespaceId,
        actor: Actor,
        keep_bytes: u64,
    ) -> Result<u64, StorageError> {
        let shard = &*self.inner;
        let Some((_, end)) = self.log_bytes(namespace, actor)? else { return Ok(0) };
        let (mut low, mut high) =
            (self.trimmed(namespace).get(actor), self.known(namespace, actor));
        // The changes that end at or before `low` go, the one that holds `high` stays or is last.
        let mut point = 0;
        let mut pairs = shard.log(namespace, actor, 0);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            pairs.seek_for_prev(Keys::new(shard.id).change(namespace, actor, middle));
            let Some(value) = pairs.value() else {
                shard.check(&pairs)?;
                low = middle;
                continue;
            };
            let upto = shard.log_end_of(value)?;
            let before = upto.saturating_sub(value.len() as u64);
            let change = shard.decode_change(value)?.decoded;
            if end.saturating_sub(before) > keep_bytes {
                point = change.last().seq;
                low = middle.max(point).min(high);
            } else {
                high = middle.min(change.first_seq).saturating_sub(1).max(low);
            }
        }
        Ok(point)
    }

    /// Where an actor's log starts and ends, in bytes ever written to it.
    fn log_bytes(
        &self,
        namespace: NamespaceId,
        actor: Actor,
    ) -> Result<Option<(u64, u64)>, StorageError> {
        let shard = &*self.inner;
        let mut pairs = shard.log(namespace, actor, 0);
        pairs.seek_to_last();
        let Some(last) = pairs.value() else { return shard.check(&pairs).map(|()| None) };
        let end = shard.log_end_of(last)?;
        // Past what was trimmed, so that the seek meets no deleted keys.
        pairs.seek(Keys::new(shard.id).change(
            namespace,
            actor,
            self.trimmed(namespace).get(actor),
        ));
        let Some(first) = pairs.value() else { return shard.check(&pairs).map(|()| None) };
        let start = shard.log_end_of(first)?.saturating_sub(first.len() as u64);
        Ok(Some((start, end)))
    }

    fn known(&self, namespace: NamespaceId, actor: Actor) -> u64 {
        self.inner.view.read().frontiers.get(&namespace).map_or(0, |frontier| frontier.get(actor))
    }
}

#[cfg(test)]
mod tests;
