//! The conflict ledger of a shard: entries by id, and their heads in the order in which they were noted.
//!
//! Two keys an entry: the entry itself, of which a value may be large, under its id, and its head under
//! the time when it was noted. Listing, counting and forgetting read heads only.
//!
//! Invariants:
//! * Every entry has exactly one head, and every head an entry.
//! * [`LedgerSize`] is what adding up all heads gives: counted when the store opens, kept since.

use std::collections::BTreeMap;

use bytes::Bytes;
use rocksdb::WriteBatch;
use tombolo_core::{
    HybridTime, NamespaceId,
    ledger::{LedgerEntry, LedgerHead, LedgerId, Noted},
};

use crate::{
    ShardStore, StorageError,
    layout::{self, Keys, Kind, ledger_id},
    shard::Shard,
};

/// What the ledger of a namespace in a shard takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerSize {
    /// Entries.
    pub entries: u64,
    /// Bytes of their encodings.
    pub bytes: u64,
}

/// An entry as the store has it.
#[derive(Clone, Copy, Debug)]
struct Held {
    at: HybridTime,
    bytes: u64,
}

/// What becomes of an entry.
#[derive(Debug)]
enum Becomes {
    /// It stays as it is.
    Unchanged,
    Gone,
    New {
        at: HybridTime,
        entry: Bytes,
        head: Bytes,
    },
}

#[derive(Debug)]
struct Touched {
    was: Option<Held>,
    now: Becomes,
}

impl Touched {
    /// When the entry that is there now was noted.
    fn at(&self) -> Option<HybridTime> {
        match &self.now {
            Becomes::Unchanged => self.was.map(|was| was.at),
            Becomes::Gone => None,
            Becomes::New { at, .. } => Some(*at),
        }
    }
}

/// What a run does to the ledgers, until it is written.
#[derive(Debug, Default)]
pub(crate) struct LedgerChanges {
    touched: BTreeMap<(NamespaceId, LedgerId), Touched>,
}

impl LedgerChanges {
    /// Adds an entry, unless one with its id is there. `is_empty` says that what the store has does not
    /// count.
    pub(crate) fn add(
        &mut self,
        shard: &Shard,
        is_empty: bool,
        namespace: NamespaceId,
        entry: &LedgerEntry,
    ) -> Result<(), StorageError> {
        let id = entry.id(namespace);
        let was = match self.touched.get(&(namespace, id)) {
            Some(touched) if touched.at().is_some() => return Ok(()),
            Some(touched) => touched.was,
            None if is_empty => None,
            None => shard.held_conflict(namespace, id)?,
        };
        let is_touched = self.touched.contains_key(&(namespace, id));
        let now = if was.is_some() && !is_touched {
            Becomes::Unchanged
        } else {
            let encoded = entry.to_bytes();
            let head = LedgerHead::new(entry, encoded.len() as u64).to_bytes();
            Becomes::New { at: entry.noted, entry: encoded, head }
        };
        self.touched.insert((namespace, id), Touched { was, now });
        Ok(())
    }

    /// Drops an entry, if it was noted then.
    pub(crate) fn forget(
        &mut self,
        shard: &Shard,
        is_empty: bool,
        namespace: NamespaceId,
        noted: Noted,
    ) -> Result<(), StorageError> {
        if let Some(touched) = self.touched.get_mut(&(namespace, noted.id)) {
            if touched.at() == Some(noted.at) {
                touched.now = Becomes::Gone;
            }
            return Ok(());
        }
        if is_empty {
            return Ok(());
        }
        if let Some(head) = shard.noted_head(namespace, noted)? {
            let was = Some(Held { at: noted.at, bytes: head.bytes });
            self.touched.insert((namespace, noted.id), Touched { was, now: Becomes::Gone });
        }
        Ok(())
    }

    /// Puts all of it into the batch, each kind for itself, in key order.
    pub(crate) fn write(&self, keys: &mut Keys, batch: &mut WriteBatch) {
        for (&(namespace, id), Touched { was, now }) in &self.touched {
            match now {
                Becomes::Unchanged => {}
                Becomes::Gone if was.is_none() => {}
                Becomes::Gone => batch.delete(keys.ledger(namespace, &ledger_id(id))),
                Becomes::New { entry, .. } => {
                    batch.put(keys.ledger(namespace, &ledger_id(id)), entry);
                }
            }
        }
        for (&(namespace, id), Touched { was, now }) in &self.touched {
            let is_at = |at: HybridTime| Noted { at, id };
            match (was, now) {
                (_, Becomes::Unchanged) | (None, Becomes::Gone) => {}
                (Some(was), Becomes::Gone) => batch.delete(keys.noted(namespace, is_at(was.at))),
                (was, Becomes::New { at, head, .. }) => {
                    if let Some(was) = was.filter(|was| was.at != *at) {
                        batch.delete(keys.noted(namespace, is_at(was.at)));
                    }
                    batch.put(keys.noted(namespace, is_at(*at)), head);
                }
            }
        }
    }

    /// Counts all of it.
    pub(crate) fn count(&self, ledgers: &mut BTreeMap<NamespaceId, LedgerSize>) {
        for (&(namespace, _), Touched { was, now }) in &self.touched {
            let is = match now {
                Becomes::Unchanged => continue,
                Becomes::Gone => None,
                Becomes::New { entry, .. } => Some(entry.len() as u64),
            };
            let size = ledgers.entry(namespace).or_default();
            if let Some(was) = was {
                size.entries = size.entries.saturating_sub(1);
                size.bytes = size.bytes.saturating_sub(was.bytes);
            }
            if let Some(bytes) = is {
                size.entries += 1;
                size.bytes += bytes;
            }
        }
        ledgers.retain(|_, size| size.entries > 0);
    }
}

impl Shard {
    pub(crate) fn decode_ledger(&self, value: &[u8]) -> Result<LedgerEntry, StorageError> {
        let entry = LedgerEntry::from_bytes(Bytes::copy_from_slice(value));
        entry.map_err(|error| StorageError::value(self.id, "ledger entry", &error))
    }

    fn decode_head(&self, value: &[u8]) -> Result<LedgerHead, StorageError> {
        let head = LedgerHead::from_bytes(Bytes::copy_from_slice(value));
        head.map_err(|error| StorageError::value(self.id, "head of a ledger entry", &error))
    }

    fn held_conflict(
        &self,
        namespace: NamespaceId,
        id: LedgerId,
    ) -> Result<Option<Held>, StorageError> {
        let mut keys = Keys::new(self.id);
        let Some(value) = self.get(keys.ledger(namespace, &ledger_id(id)))? else {
            return Ok(None);
        };
        let at = self.decode_ledger(&value)?.noted;
        Ok(Some(Held { at, bytes: value.len() as u64 }))
    }

    fn noted_head(
        &self,
        namespace: NamespaceId,
        noted: Noted,
    ) -> Result<Option<LedgerHead>, StorageError> {
        let mut keys = Keys::new(self.id);
        let value = self.get(keys.noted(namespace, noted))?;
        value.map(|value| self.decode_head(&value)).transpose()
    }

    /// Adds up all heads.
    pub(crate) fn measure_ledgers(
        &self,
    ) -> Result<BTreeMap<NamespaceId, LedgerSize>, StorageError> {
        let mut keys = Keys::new(self.id);
        let start = keys.kind_start(Kind::Noted).to_vec();
        let end = keys.kind_end(Kind::Noted).to_vec();
        let mut pairs = self.iterate(start, end, false);
        pairs.seek_to_first();
        let mut sizes: BTreeMap<NamespaceId, LedgerSize> = BTreeMap::new();
        while let Some((key, value)) = pairs.item() {
            let (namespace, _) =
                layout::noted(key).ok_or_else(|| StorageError::key(self.id, "ledger"))?;
            let size = sizes.entry(namespace).or_default();
            size.entries += 1;
            size.bytes += self.decode_head(value)?.bytes;
            pairs.next();
        }
        self.check(&pairs)?;
        Ok(sizes)
    }
}

impl ShardStore {
    /// One entry of the ledger.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn ledger_entry(
        &self,
        namespace: NamespaceId,
        id: LedgerId,
    ) -> Result<Option<LedgerEntry>, StorageError> {
        let mut keys = Keys::new(self.inner.id);
        let value = self.inner.get(keys.ledger(namespace, &ledger_id(id)))?;
        value.map(|value| self.inner.decode_ledger(&value)).transpose()
    }

    /// What the ledger of each namespace takes; those without entries are left out.
    pub fn ledger_sizes(&self) -> BTreeMap<NamespaceId, LedgerSize> {
        self.inner.view.read().ledgers.clone()
    }

    /// Calls `take` with the entries of a namespace that were noted at `since` or later and stand before
    /// `before`, the newest first, until it answers `false`. All are of one moment.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn each_conflict(
        &self,
        namespace: NamespaceId,
        since: HybridTime,
        before: Option<Noted>,
        mut take: impl FnMut(Noted, LedgerHead) -> bool,
    ) -> Result<(), StorageError> {
        let shard = &*self.inner;
        let mut keys = Keys::new(shard.id);
        let start = keys.noted_start(namespace, since).to_vec();
        let end = match before {
            Some(before) => keys.noted(namespace, before).to_vec(),
            None => keys.namespace_end(Kind::Noted, namespace).to_vec(),
        };
        if end <= start {
            return Ok(());
        }
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek_to_last();
        while let Some((key, value)) = pairs.item() {
            let (_, noted) =
                layout::noted(key).ok_or_else(|| StorageError::key(shard.id, "ledger"))?;
            if !take(noted, shard.decode_head(value)?) {
                return Ok(());
            }
            pairs.prev();
        }
        shard.check(&pairs)
    }

    /// When the oldest entry of a namespace was noted; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn oldest_conflict(
        &self,
        namespace: NamespaceId,
    ) -> Result<Option<HybridTime>, StorageError> {
        let shard = &*self.inner;
        let mut keys = Keys::new(shard.id);
        let start = keys.noted_start(namespace, HybridTime::ZERO).to_vec();
        let end = keys.namespace_end(Kind::Noted, namespace).to_vec();
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek_to_first();
        match pairs.key() {
            Some(key) => {
                let noted =
                    layout::noted(key).ok_or_else(|| StorageError::key(shard.id, "ledger"))?;
                Ok(Some(noted.1.at))
            }
            None => shard.check(&pairs).map(|()| None),
        }
    }

    /// The entries of a namespace to forget, the oldest first, at most `limit`: those noted before
    /// `before`, and as many of the next ones as brings the rest down to `bytes_max`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn conflicts_to_forget(
        &self,
        namespace: NamespaceId,
        before: HybridTime,
        bytes_max: u64,
        limit: usize,
    ) -> Result<Vec<Noted>, StorageError> {
        let shard = &*self.inner;
        let mut left = self.ledger_sizes().get(&namespace).copied().unwrap_or_default().bytes;
        let mut keys = Keys::new(shard.id);
        let start = keys.noted_start(namespace, HybridTime::ZERO).to_vec();
        let end = keys.namespace_end(Kind::Noted, namespace).to_vec();
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek_to_first();
        let mut found = Vec::new();
        while found.len() < limit
            && let Some((key, value)) = pairs.item()
        {
            let (_, noted) =
                layout::noted(key).ok_or_else(|| StorageError::key(shard.id, "ledger"))?;
            if before <= noted.at && left <= bytes_max {
                break;
            }
            left = left.saturating_sub(shard.decode_head(value)?.bytes);
            found.push(noted);
            pairs.next();
        }
        shard.check(&pairs)?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
