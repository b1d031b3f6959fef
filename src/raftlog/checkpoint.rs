//! What the writer knows about each group as of the last record it encoded.
//!
//! Groups' memory runs ahead of the disk; this does not. It feeds the checkpoint at the beginning of each
//! segment, the watermark, and the decision when a segment holds nothing live any more.

use std::{collections::BTreeMap, ops::RangeInclusive};

use crate::{
    frame::StateRecord,
    types::{LogId, Mark, Vote},
};

/// One group as of the last record encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    /// Index of the oldest entry, or of the next one if there is none.
    pub(crate) first: u64,
    pub(crate) purged: Option<LogId>,
    /// The newest entry, if there is any.
    pub(crate) last: Option<LogId>,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
}

impl View {
    pub(crate) fn append(&mut self, id: LogId) {
        if self.last.is_none() {
            self.first = id.index;
        }
        self.last = Some(id);
    }

    pub(crate) fn truncate(&mut self, last: Option<LogId>) {
        self.last = last.filter(|last| last.index >= self.first);
    }

    pub(crate) fn purge(&mut self, upto: LogId) {
        self.purged = Some(upto);
        self.first = upto.index.saturating_add(1);
        self.last = self.last.filter(|last| last.index > upto.index);
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark { last: self.last.or(self.purged), vote: self.vote }
    }

    pub(crate) fn record(&self) -> StateRecord {
        let Self { first, purged, last, vote, committed } = *self;
        StateRecord { first, purged, last, vote, committed }
    }
}

/// Which indexes of which group were written to which segment.
///
/// Only the lowest and highest index per segment and group are kept, and truncation does not shrink them:
/// a segment may look used when it is not (evacuation then frees it), never the other way round.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    segments: BTreeMap<u32, BTreeMap<u64, (u64, u64)>>,
    /// What is durably purged, per group.
    purged: BTreeMap<u64, u64>,
}

impl Pins {
    pub(crate) fn add(&mut self, segment: u32, group: u64, index: u64) {
        let span = self.segments.entry(segment).or_default().entry(group).or_insert((index, index));
        *span = (span.0.min(index), span.1.max(index));
    }

    /// Called when the purge is durable.
    pub(crate) fn purge(&mut self, group: u64, upto: u64) {
        let purged = self.purged.entry(group).or_insert(upto);
        *purged = upto.max(*purged);
    }

    /// Called when all live entries of the segment were durably copied elsewhere.
    pub(crate) fn release(&mut self, segment: u32) {
        self.segments.remove(&segment);
    }

    pub(crate) fn is_free(&self, segment: u32) -> bool {
        self.live(segment).next().is_none()
    }

    /// The groups that may have live entries in the segment, with the span of their indexes.
    pub(crate) fn live(&self, segment: u32) -> impl Iterator<Item = (u64, RangeInclusive<u64>)> {
        self.segments.get(&segment).into_iter().flatten().filter_map(|(group, (low, high))| {
            let low = match self.purged.get(group) {
                Some(purged) => (*low).max(purged.saturating_add(1)),
                None => *low,
            };
            (low <= *high).then_some((*group, low..=*high))
        })
    }
}
