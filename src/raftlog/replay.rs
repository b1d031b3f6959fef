//! One group while the log is read: its records, applied in order.
//!
//! A record that cannot follow the ones before it is reported as a reason in words; `recovery` adds file
//! and offset.

use std::collections::VecDeque;

use crate::{
    checkpoint::View,
    frame::{Frame, HEADER_BYTES, StateRecord},
    index::Slot,
    types::{EntryKind, LogId},
};

/// One group while the log is read.
#[derive(Default)]
pub(crate) struct Replayed {
    pub(crate) view: View,
    /// Entries from `view.first` on; `None` if an older segment had it and no copy was seen yet.
    pub(crate) slots: VecDeque<Option<(LogId, Slot)>>,
}

impl Replayed {
    fn next(&self) -> u64 {
        self.view.first.saturating_add(self.slots.len() as u64)
    }

    pub(crate) fn start(&mut self, record: &StateRecord, max_entries: u64) -> Result<(), String> {
        let StateRecord { first, purged, last, vote, committed } = *record;
        self.view = View { first, purged, last, vote, committed };
        let Some(last) = last else { return Ok(()) };
        let count = last.index.checked_sub(first).and_then(|span| span.checked_add(1));
        match count
            .filter(|count| *count <= max_entries)
            .and_then(|count| usize::try_from(count).ok())
        {
            Some(count) => {
                self.slots.resize(count, None);
                Ok(())
            }
            None => Err(format!(
                "entries {first} to {} cannot all be in the segments that exist",
                last.index
            )),
        }
    }

    pub(crate) fn append(
        &mut self,
        frame: &Frame<'_>,
        segment: u32,
        place: u64,
    ) -> Result<(), String> {
        let id = frame.id();
        let fresh = self.slots.is_empty() && self.view.purged.is_none();
        if id.index != self.next() && !(fresh && id.index <= 1) {
            return Err(format!("entry {id} where entry {} should follow", self.next()));
        }
        let slot = slot_of(frame, segment, place)?;
        self.view.append(id);
        self.slots.push_back(Some((id, slot)));
        Ok(())
    }

    pub(crate) fn moved(
        &mut self,
        frame: &Frame<'_>,
        segment: u32,
        place: u64,
    ) -> Result<(), String> {
        let id = frame.id();
        let Some(position) = id.index.checked_sub(self.view.first) else { return Ok(()) };
        let entry = slot_of(frame, segment, place).map(|slot| (id, slot))?;
        match usize::try_from(position).ok().and_then(|position| self.slots.get_mut(position)) {
            Some(Some((found, _))) if *found != id => {
                Err(format!("a copy of {id}, but the entry is {found}"))
            }
            Some(slot) => {
                *slot = Some(entry);
                Ok(())
            }
            None => Err(format!("a copy of {id}, but the log ends before it")),
        }
    }

    pub(crate) fn truncate(&mut self, last: Option<LogId>) -> Result<(), String> {
        let next = last.map_or(self.view.first, |last| last.index.saturating_add(1));
        match next.checked_sub(self.view.first).and_then(|keep| usize::try_from(keep).ok()) {
            Some(keep) if keep <= self.slots.len() => {
                self.slots.truncate(keep);
                self.view.truncate(last);
                Ok(())
            }
            Some(_) | None => Err(format!("a truncation to index {next}, which is not in the log")),
        }
    }

    pub(crate) fn purge(&mut self, upto: LogId) {
        let drop = (upto.index.saturating_add(1))
            .saturating_sub(self.view.first)
            .min(self.slots.len() as u64);
        self.slots.drain(..usize::try_from(drop).unwrap_or(usize::MAX));
        self.view.purge(upto);
    }

    /// Whether the log reaches `id`, and has that very entry if it still has the index.
    pub(crate) fn covers(&self, id: LogId) -> bool {
        match id.index.checked_sub(self.view.first) {
            None => self.view.purged.is_some(),
            Some(position) => {
                let slot =
                    usize::try_from(position).ok().and_then(|position| self.slots.get(position));
                slot.copied().flatten().is_some_and(|(found, _)| found == id)
            }
        }
    }
}

fn slot_of(frame: &Frame<'_>, segment: u32, place: u64) -> Result<Slot, String> {
    if EntryKind::from_code(frame.flags).is_none() {
        return Err(format!("entry {} is of unknown kind {}", frame.id(), frame.flags));
    }
    let len = u32::try_from(HEADER_BYTES + frame.payload.len());
    match (u32::try_from(place), len) {
        (Ok(offset), Ok(len)) => Ok(Slot { segment, offset, len }),
        (Err(_), _) | (_, Err(_)) => Err("a segment exceeds 4 GiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Mark;

    #[test]
    fn a_mark_is_covered_by_the_entry_itself_or_by_a_purge() {
        let id = |term, index| LogId { term, node: 1, index };
        let mut group = Replayed::default();
        assert!(!group.covers(id(1, 0)));
        group.purge(id(1, 4));
        group.slots.push_back(Some((id(2, 5), Slot { segment: 1, offset: 0, len: 0 })));
        group.view.append(id(2, 5));
        assert!(group.covers(id(1, 4)) && group.covers(id(2, 5)));
        assert!(!group.covers(id(1, 5)) && !group.covers(id(2, 6)));
        assert_eq!(group.view.mark(), Mark { last: Some(id(2, 5)), vote: None });
    }
}
