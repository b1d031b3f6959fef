//! Reads of one shard: points, scans, old requests.
//!
//! Every call sees one moment of the store, and does a bounded amount of work: a scan over many
//! tombstones answers an empty page with a resume key instead of taking for ever.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use rocksdb::{DBRawIterator, ReadOptions, Snapshot};
use tombolo_core::{
    Dot, HybridTime, NamespaceId, Record, RegionId, RequestId, VersionVector, command::Remembered,
    feed::Page, record::Sibling,
};

use crate::{
    ShardStore, StorageError,
    apply::REVIEW_VERSION,
    layout::{self, Keys, Kind},
    shard::{Shard, decode_whole},
};

/// Records that one scan call passes over without returning them.
const SKIPPED_MAX: usize = 4096;
/// Remembered requests that one search for those to forget looks at.
const REQUESTS_VISITED_MAX: usize = 40_000;

/// Which keys to scan, and in which order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanRange {
    /// The first key.
    pub start: Bytes,
    /// The key after the last; `None` for the end of the namespace.
    pub end: Option<Bytes>,
    /// From the end to the start.
    pub reverse: bool,
}

/// A part of a scan's result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanPage {
    /// Keys and records with at least one value, expired or not, in scan order.
    pub records: Vec<(Bytes, Record)>,
    /// Where to go on: the next `start` of a forward scan, the next `end` of a reverse scan.
    /// `None` if the range is done.
    pub next: Option<Bytes>,
}

impl Shard {
    /// Reads a record, wherever it lies.
    pub(crate) fn read_record(
        &self,
        keys: &mut Keys,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Record>, StorageError> {
        if let Some(value) = self.get(keys.record(namespace, key))? {
            return Ok(Some(self.decode_record(&value)?));
        }
        // Most namespaces have none, and then a miss costs one look instead of two.
        if !self.view.read().tombstones.contains_key(&namespace) {
            return Ok(None);
        }
        let dead = self.get(keys.tombstone(namespace, key))?;
        dead.map(|value| self.decode_record(&value)).transpose()
    }

    pub(crate) fn decode_record(&self, value: &[u8]) -> Result<Record, StorageError> {
        let record = Record::from_bytes(Bytes::copy_from_slice(value));
        record.map_err(|error| StorageError::value(self.id, "record", &error))
    }

    /// Reads a value that was kept for review.
    pub(crate) fn decode_reviewed(&self, value: &[u8]) -> Result<Sibling, StorageError> {
        let value = Bytes::copy_from_slice(value);
        decode_whole(self.id, "value for review", REVIEW_VERSION, value, Sibling::decode)
    }

    /// Calls `take` with the records that have a value in a range of a namespace's keys, in order: at most
    /// `limit`.
    pub(crate) fn each_in(
        &self,
        namespace: NamespaceId,
        from: &[u8],
        to: Option<&[u8]>,
        limit: usize,
        mut take: impl FnMut(&[u8], Record),
    ) -> Result<(), StorageError> {
        let mut keys = Keys::new(self.id);
        let start = keys.record(namespace, from).to_vec();
        let end = match to {
            Some(to) => keys.record(namespace, to).to_vec(),
            None => keys.namespace_end(Kind::Record, namespace).to_vec(),
        };
        let mut pairs = self.iterate(start, end, false);
        pairs.seek_to_first();
        let mut taken = 0;
        while taken < limit
            && let Some((key, value)) = pairs.item()
        {
            let key = layout::user_key(key).ok_or_else(|| StorageError::key(self.id, "record"))?;
            take(key, self.decode_record(value)?);
            taken += 1;
            pairs.next();
        }
        self.check(&pairs)
    }

    /// Calls `take` with every record of every namespace, deleted ones included.
    pub(crate) fn each_record(
        &self,
        mut take: impl FnMut(NamespaceId, &[u8], &Record),
    ) -> Result<(), StorageError> {
        let mut keys = Keys::new(self.id);
        for kind in [Kind::Record, Kind::Tombstone] {
            let start = keys.kind_start(kind).to_vec();
            let end = keys.kind_end(kind).to_vec();
            let mut pairs = self.iterate(start, end, false);
            pairs.seek_to_first();
            while let Some((key, value)) = pairs.item() {
                let parts = layout::key_namespace(key).zip(layout::user_key(key));
                let (namespace, key) = parts.ok_or_else(|| StorageError::key(self.id, "record"))?;
                take(namespace, key, &self.decode_record(value)?);
                pairs.next();
            }
            self.check(&pairs)?;
        }
        Ok(())
    }
}

impl Shard {
    /// The user's key that an iterator over records stands at; `None` at its end.
    fn key_at<'a>(&self, pairs: &'a DBRawIterator<'_>) -> Result<Option<&'a [u8]>, StorageError> {
        let Some(key) = pairs.key() else { return self.check(pairs).map(|()| None) };
        let key = layout::user_key(key).ok_or_else(|| StorageError::key(self.id, "record"))?;
        Ok(Some(key))
    }

    /// The keys that bound a range; `None` if there is nothing in between.
    fn bounds(&self, namespace: NamespaceId, range: &ScanRange) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut keys = Keys::new(self.id);
        let start = keys.record(namespace, &range.start).to_vec();
        let end = match &range.end {
            Some(end) => keys.record(namespace, end).to_vec(),
            None => keys.namespace_end(Kind::Record, namespace).to_vec(),
        };
        (start < end).then_some((start, end))
    }

    /// Reads a page of what an iterator has.
    fn read_page(
        &self,
        mut pairs: DBRawIterator<'_>,
        reverse: bool,
        max_keys: usize,
        max_bytes: usize,
    ) -> Result<ScanPage, StorageError> {
        if reverse {
            pairs.seek_to_last()
        } else {
            pairs.seek_to_first()
        }
        let mut page = ScanPage::default();
        let (mut bytes, mut skipped) = (0, 0);
        let mut last_visited = Bytes::new();
        while let Some((key, value)) = pairs.item() {
            let key = layout::user_key(key).ok_or_else(|| StorageError::key(self.id, "record"))?;
            let full = max_keys.max(1) <= page.records.len()
                || (max_bytes <= bytes && !page.records.is_empty())
                || SKIPPED_MAX <= skipped;
            if full {
                let resume = if reverse { last_visited } else { Bytes::copy_from_slice(key) };
                page.next = Some(resume);
                return Ok(page);
            }
            let record = self.decode_record(value)?;
            let is_live = !record.is_dead();
            let key = Bytes::copy_from_slice(key);
            if reverse {
                last_visited = key.clone();
            }
            if is_live {
                bytes += key.len() + value.len();
                page.records.push((key, record));
            } else {
                skipped += 1;
            }
            if reverse { pairs.prev() } else { pairs.next() }
        }
        self.check(&pairs)?;
        Ok(page)
    }
}

/// The records of a namespace as of one applied position. Dropping it releases the pin: it holds old
/// versions of the whole store, so it must not be kept when nobody reads.
pub struct Pinned<'a> {
    shard: &'a Shard,
    snapshot: Snapshot<'a>,
    namespace: NamespaceId,
    frontier: VersionVector,
}

impl Pinned<'_> {
    /// What was applied.
    pub fn frontier(&self) -> &VersionVector {
        &self.frontier
    }

    /// As [`ShardStore::scan`], of that moment.
    ///
    /// # Errors
    /// If a record cannot be read.
    pub fn scan(
        &self,
        range: &ScanRange,
        max_keys: usize,
        max_bytes: usize,
    ) -> Result<ScanPage, StorageError> {
        let Some((start, end)) = self.shard.bounds(self.namespace, range) else {
            return Ok(ScanPage::default());
        };
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(start);
        options.set_iterate_upper_bound(end);
        let pairs = self.snapshot.raw_iterator_opt(options);
        self.shard.read_page(pairs, range.reverse, max_keys, max_bytes)
    }
}

impl ShardStore {
    /// The record of a key; `None` if it was never written here. May be a tombstone.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn record(
        &self,
        namespace: NamespaceId,
        key: &[u8],
    ) -> Result<Option<Record>, StorageError> {
        self.inner.read_record(&mut Keys::new(self.inner.id), namespace, key)
    }

    /// The records of several keys, all as of one moment, in the order of `keys`.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn records(
        &self,
        namespace: NamespaceId,
        keys: &[Bytes],
    ) -> Result<Vec<Option<Record>>, StorageError> {
        let shard = &*self.inner;
        let snapshot = shard.engine.db.snapshot();
        let mut buffer = Keys::new(shard.id);
        let mut records = Vec::with_capacity(keys.len());
        for key in keys {
            let failed = |error| shard.engine_error(&error);
            let mut value = snapshot.get_pinned(buffer.record(namespace, key)).map_err(failed)?;
            if value.is_none() {
                value = snapshot.get_pinned(buffer.tombstone(namespace, key)).map_err(failed)?;
            }
            records.push(value.map(|value| shard.decode_record(&value)).transpose()?);
        }
        Ok(records)
    }

    /// Whether the outcome of a request is remembered.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn remembers(&self, request: RequestId) -> Result<bool, StorageError> {
        let found = self.inner.get(Keys::new(self.inner.id).dedup(request))?;
        Ok(found.is_some())
    }

    /// What is remembered of a request.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn remembered(&self, request: RequestId) -> Result<Option<Remembered>, StorageError> {
        let found = self.inner.get(Keys::new(self.inner.id).dedup(request))?;
        let read = |value: &[u8]| Remembered::from_bytes(Bytes::copy_from_slice(value));
        found
            .map(|value| read(&value))
            .transpose()
            .map_err(|error| StorageError::value(self.inner.id, "dedup", &error))
    }

    /// Keys and records of a namespace's tombstones, in order of the keys: at most `limit` from
    /// `start` on.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn tombstones(
        &self,
        namespace: NamespaceId,
        start: &[u8],
        limit: usize,
    ) -> Result<Vec<(Bytes, Record)>, StorageError> {
        let shard = &*self.inner;
        let mut keys = Keys::new(shard.id);
        let start = keys.tombstone(namespace, start).to_vec();
        let end = keys.namespace_end(Kind::Tombstone, namespace).to_vec();
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek_to_first();
        let mut found = Vec::new();
        while found.len() < limit
            && let Some((key, value)) = pairs.item()
        {
            let key =
                layout::user_key(key).ok_or_else(|| StorageError::key(shard.id, "tombstone"))?;
            found.push((Bytes::copy_from_slice(key), shard.decode_record(value)?));
            pairs.next();
        }
        shard.check(&pairs)?;
        Ok(found)
    }

    /// Values of a region's writes that have expired at `now`: keys and dots, the oldest first, at
    /// most `limit`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn expired_values(
        &self,
        namespace: NamespaceId,
        region: RegionId,
        now: HybridTime,
        limit: usize,
    ) -> Result<Vec<(Bytes, Dot)>, StorageError> {
        let shard = &*self.inner;
        let mut keys = Keys::new(shard.id);
        let start = keys.expiry_start(namespace, region, HybridTime::ZERO).to_vec();
        let end = keys.expiry_start(namespace, region, now.next()).to_vec();
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek_to_first();
        let mut found = Vec::new();
        while found.len() < limit
            && let Some(entry) = pairs.key()
        {
            let (value, key) =
                layout::expiring(entry).ok_or_else(|| StorageError::key(shard.id, "expiry"))?;
            found.push((Bytes::copy_from_slice(key), value.dot));
            pairs.next();
        }
        shard.check(&pairs)?;
        Ok(found)
    }

    /// How many tombstones each namespace has; those that have none are left out.
    pub fn tombstone_counts(&self) -> BTreeMap<NamespaceId, u64> {
        self.inner.view.read().tombstones.clone()
    }

    /// A page of the records in a range, without tombstones: at most `max_keys` (at least one)
    /// of them, and no more after `max_bytes` of keys and stored values. Expired values are the
    /// caller's to hide, which knows the time. The page may be empty although there is more.
    ///
    /// # Errors
    /// If a record cannot be read.
    pub fn scan(
        &self,
        namespace: NamespaceId,
        range: &ScanRange,
        max_keys: usize,
        max_bytes: usize,
    ) -> Result<ScanPage, StorageError> {
        let shard = &*self.inner;
        let Some((start, end)) = shard.bounds(namespace, range) else {
            return Ok(ScanPage::default());
        };
        shard.read_page(shard.iterate(start, end, true), range.reverse, max_keys, max_bytes)
    }

    /// Pins the records of a namespace as they are now, for reading page by page.
    pub fn pin(&self, namespace: NamespaceId) -> Pinned<'_> {
        let shard = &*self.inner;
        // No run is applied between looking at the data and at the frontier.
        let _applying = shard.applying.lock();
        let snapshot = shard.engine.db.snapshot();
        let frontier = shard.view.read().frontiers.get(&namespace).cloned().unwrap_or_default();
        Pinned { shard, snapshot, namespace, frontier }
    }

    /// A page of the records in a range, tombstones included, with what was applied at their moment:
    /// at most `max_keys` (at least one), and no more after `max_bytes` of keys and stored values.
    ///
    /// # Errors
    /// If a record cannot be read.
    pub fn page(
        &self,
        namespace: NamespaceId,
        start: &[u8],
        end: Option<&[u8]>,
        max_keys: usize,
        max_bytes: usize,
    ) -> Result<Page, StorageError> {
        let shard = &*self.inner;
        let mut keys = Keys::new(shard.id);
        let mut pairs_of = |kind| {
            let first = keys.in_namespace(kind, namespace, start).to_vec();
            let last = match end {
                Some(end) => keys.in_namespace(kind, namespace, end).to_vec(),
                None => keys.namespace_end(kind, namespace).to_vec(),
            };
            // An empty range must not look like one from the end to the start.
            let last = last.max(first.clone());
            shard.iterate(first, last, true)
        };
        let (standing, mut live, mut dead) = {
            // No run is applied between looking at the data and at the frontier.
            let _applying = shard.applying.lock();
            (self.standing(namespace), pairs_of(Kind::Record), pairs_of(Kind::Tombstone))
        };
        live.seek_to_first();
        dead.seek_to_first();
        let mut page =
            Page { frontier: standing.frontier, is_exact: standing.is_exact, ..Page::default() };
        let mut bytes = 0;
        loop {
            let is_live = match (shard.key_at(&live)?, shard.key_at(&dead)?) {
                (Some(live), Some(dead)) => live < dead,
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (None, None) => return Ok(page),
            };
            let pairs = if is_live { &mut live } else { &mut dead };
            let (key, value) = (shard.key_at(pairs)?, pairs.value());
            let (key, value) = (key.unwrap_or_default(), value.unwrap_or_default());
            if max_keys.max(1) <= page.records.len()
                || (max_bytes <= bytes && !page.records.is_empty())
            {
                page.next = Some(Bytes::copy_from_slice(key));
                return Ok(page);
            }
            bytes += key.len() + value.len();
            page.records.push((Bytes::copy_from_slice(key), shard.decode_record(value)?));
            pairs.next();
        }
    }

    /// Keys of a namespace that hold several siblings, with the time of the latest, in that order, then
    /// in that of the keys: at most `limit` after `after`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn open_keys(
        &self,
        namespace: NamespaceId,
        after: Option<(HybridTime, &[u8])>,
        limit: usize,
    ) -> Result<Vec<(HybridTime, Bytes)>, StorageError> {
        let shard = &*self.inner;
        let mut keys = Keys::new(shard.id);
        let mut start = match after {
            Some((since, key)) => keys.open(namespace, since, key).to_vec(),
            None => keys.in_namespace(Kind::Open, namespace, b"").to_vec(),
        };
        if after.is_some() {
            start.push(0);
        }
        let end = keys.namespace_end(Kind::Open, namespace).to_vec();
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek_to_first();
        let mut found = Vec::new();
        while found.len() < limit
            && let Some(entry) = pairs.key()
        {
            let (since, key) =
                layout::open_key(entry).ok_or_else(|| StorageError::key(shard.id, "open"))?;
            found.push((since, Bytes::copy_from_slice(key)));
            pairs.next();
        }
        shard.check(&pairs)?;
        Ok(found)
    }

    /// Values that were kept for review when this region started over, and that no other region
    /// turned out to have: at most `limit`.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn reviewed(
        &self,
        namespace: NamespaceId,
        limit: usize,
    ) -> Result<Vec<(Bytes, Sibling)>, StorageError> {
        let shard = &*self.inner;
        let frontier = self.frontier(namespace);
        let mut keys = Keys::new(shard.id);
        let start = keys.in_namespace(Kind::Review, namespace, b"").to_vec();
        let end = keys.namespace_end(Kind::Review, namespace).to_vec();
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek_to_first();
        let mut found = Vec::new();
        while found.len() < limit
            && let Some((key, value)) = pairs.item()
        {
            let key =
                layout::reviewed_key(key).ok_or_else(|| StorageError::key(shard.id, "review"))?;
            let held = shard.decode_reviewed(value)?;
            if !frontier.covers(held.dot) {
                found.push((Bytes::copy_from_slice(key), held));
            }
            pairs.next();
        }
        shard.check(&pairs)?;
        Ok(found)
    }

    /// Remembered requests to forget: those that were executed before `before`, and of each client
    /// those that come before its latest `keep`. At most `limit`.
    ///
    /// Looks at a bounded number of requests and goes on with the next call, so that calling it now
    /// and then finds all. `keep` must be below half of that number.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn requests_to_forget(
        &self,
        before: HybridTime,
        keep: usize,
        limit: usize,
    ) -> Result<Vec<RequestId>, StorageError> {
        let shard = &*self.inner;
        let mut cursor = shard.collect_from.lock();
        // A client's are counted from its first one on, as of one moment.
        let first = RequestId { number: 0, ..*cursor };
        let mut keys = Keys::new(shard.id);
        let start = keys.kind_start(Kind::Dedup).to_vec();
        let end = keys.kind_end(Kind::Dedup).to_vec();
        let mut pairs = shard.iterate(start, end, false);
        pairs.seek(keys.dedup(first));
        let mut found = Vec::new();
        let mut wrapped = false;
        let mut client = first.client;
        let mut kept: VecDeque<RequestId> = VecDeque::new();
        for _ in 0..REQUESTS_VISITED_MAX {
            let Some((key, value)) = pairs.item() else {
                shard.check(&pairs)?;
                *cursor = RequestId { client: 0, number: 0 };
                if wrapped || first == *cursor {
                    break;
                }
                wrapped = true;
                pairs.seek_to_first();
                continue;
            };
            let request = shard.request(key)?;
            *cursor = request;
            if (wrapped && first <= request) || limit <= found.len() {
                break;
            }
            if client != request.client {
                client = request.client;
                kept.clear();
            }
            let remembered = Remembered::from_bytes(Bytes::copy_from_slice(value))
                .map_err(|error| StorageError::value(shard.id, "dedup", &error))?;
            if remembered.executed < before {
                found.push(request);
            } else {
                kept.push_back(request);
                if keep < kept.len() {
                    found.extend(kept.pop_front());
                }
            }
            pairs.next();
        }
        shard.check(&pairs)?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
