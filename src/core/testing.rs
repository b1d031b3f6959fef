//! A shard's state in memory, for tests and simulation.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
};

use bytes::Bytes;

use crate::{
    change::Change,
    command::Remembered,
    execute::ShardState,
    id::{Actor, NamespaceId, RequestId},
    ledger::{LedgerEntry, LedgerId},
    record::Record,
    vector::VersionVector,
};

/// Everything that one shard holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryState {
    /// Records by key.
    pub records: BTreeMap<(NamespaceId, Bytes), Record>,
    /// Frontiers.
    pub frontiers: BTreeMap<NamespaceId, VersionVector>,
    /// Change logs, by actor and first sequence number.
    pub changes: BTreeMap<(NamespaceId, Actor, u64), Change>,
    /// The ledger.
    pub ledger: BTreeMap<(NamespaceId, LedgerId), LedgerEntry>,
    /// Remembered requests.
    pub requests: BTreeMap<RequestId, Remembered>,
}

impl MemoryState {
    /// The changes that `frontier` does not cover, in an order that respects causality.
    pub fn changes_above(&self, namespace: NamespaceId, frontier: &VersionVector) -> Vec<Change> {
        let mut waiting: Vec<&Change> = self
            .changes
            .range((namespace, MIN_ACTOR, 0)..)
            .take_while(|((held, _, _), _)| *held == namespace)
            .map(|(_, change)| change)
            .filter(|change| !frontier.covers(change.last()))
            .collect();
        let mut sent = frontier.clone();
        let mut ordered = Vec::new();
        let mut progress = true;
        while progress {
            progress = false;
            let mut done = BTreeSet::new();
            for (place, change) in waiting.iter().enumerate() {
                let next = change.first_seq == sent.get(change.actor) + 1;
                if next && sent.covers_all(&change.depends_on) {
                    sent.add(change.last());
                    ordered.push((*change).clone());
                    done.insert(place);
                    progress = true;
                }
            }
            let mut place = 0;
            waiting.retain(|_| {
                place += 1;
                !done.contains(&(place - 1))
            });
        }
        ordered
    }
}

const MIN_ACTOR: Actor = Actor { region: crate::id::RegionId(0), incarnation: 0 };

impl ShardState for MemoryState {
    type Error = Infallible;

    fn record(&self, namespace: NamespaceId, key: &[u8]) -> Result<Option<Record>, Infallible> {
        Ok(self.records.get(&(namespace, Bytes::copy_from_slice(key))).cloned())
    }

    fn put_record(&mut self, namespace: NamespaceId, key: &Bytes, record: Record) {
        self.records.insert((namespace, key.clone()), record);
    }

    fn remove_record(&mut self, namespace: NamespaceId, key: &Bytes) {
        self.records.remove(&(namespace, key.clone()));
    }

    fn frontier(&self, namespace: NamespaceId) -> VersionVector {
        self.frontiers.get(&namespace).cloned().unwrap_or_default()
    }

    fn set_frontier(&mut self, namespace: NamespaceId, frontier: VersionVector) {
        self.frontiers.insert(namespace, frontier);
    }

    fn append_change(&mut self, namespace: NamespaceId, change: &Change) {
        self.changes.insert((namespace, change.actor, change.first_seq), change.clone());
    }

    fn trim_changes(&mut self, namespace: NamespaceId, upto: &VersionVector) {
        self.changes.retain(|(held, ..), change| *held != namespace || !upto.covers(change.last()));
    }

    fn add_to_ledger(&mut self, namespace: NamespaceId, entry: LedgerEntry) {
        self.ledger.insert((namespace, entry.id(namespace)), entry);
    }

    fn remembered(&self, request: RequestId) -> Result<Option<Remembered>, Infallible> {
        Ok(self.requests.get(&request).cloned())
    }

    fn remember(&mut self, request: RequestId, remembered: &Remembered) {
        self.requests.insert(request, remembered.clone());
    }

    fn forget(&mut self, request: RequestId) {
        self.requests.remove(&request);
    }
}
