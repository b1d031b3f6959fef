//! Where a group's entries are, in 12 bytes per entry.
//!
//! Slots are kept by index; the (term, leader) pairs as runs, because they change only with the leader;
//! byte counts as sums over blocks of 256 indexes, so that "how many bytes lie above index i" need
//! not look at every slot.
//!
//! A slot of segment 0 is *pending*: the writer has not placed the entry yet, and `offset` holds the
//! ticket of the append that brought it, so that a late placement never hits a newer entry of that index.

use std::collections::VecDeque;

use crate::types::LogId;

const BLOCK: u64 = 256;

/// Place of one entry's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Sequence number of the segment; 0 while pending.
    pub(crate) segment: u32,
    /// Byte offset in the segment; the append's ticket while pending.
    pub(crate) offset: u32,
    /// Bytes of the frame.
    pub(crate) len: u32,
}

impl Slot {
    pub(crate) fn pending(ticket: u32, len: u32) -> Self {
        Self { segment: 0, offset: ticket, len }
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.segment == 0
    }
}

#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    term: u64,
    node: u64,
}

/// The slots of the consecutive indexes `first..next`.
#[derive(Debug, Default)]
pub(crate) struct Index {
    first: u64,
    slots: VecDeque<Slot>,
    /// Ordered by `first`; the front run covers the index's first entry.
    runs: VecDeque<Run>,
    /// Bytes per block of 256 indexes; the front is the block of `first`.
    blocks: VecDeque<u64>,
}

impl Index {
    /// Index of the oldest entry, or of the next one if there is none.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// Index that the next entry will have.
    pub(crate) fn next(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Forgets everything; the next entry will have index `first`.
    pub(crate) fn reset(&mut self, first: u64) {
        *self = Self { first, ..Self::default() };
    }

    /// Adds the entry after the newest. The caller has checked that `id.index` is [`Index::next`].
    pub(crate) fn push(&mut self, id: LogId, slot: Slot) {
        debug_assert_eq!(id.index, self.next(), "entries are consecutive");
        if self.runs.back().is_none_or(|run| (run.term, run.node) != (id.term, id.node)) {
            self.runs.push_back(Run { first: id.index, term: id.term, node: id.node });
        }
        let block = self.block_position(id.index);
        if block == self.blocks.len() {
            self.blocks.push_back(0);
        }
        self.blocks[block] += u64::from(slot.len);
        self.slots.push_back(slot);
    }

    pub(crate) fn get(&self, index: u64) -> Option<Slot> {
        self.slots.get(self.position(index)?).copied()
    }

    pub(crate) fn id(&self, index: u64) -> Option<LogId> {
        if self.position(index)? >= self.slots.len() {
            return None;
        }
        let after = self.runs.partition_point(|run| run.first <= index);
        let run = self.runs.get(after.checked_sub(1)?)?;
        Some(LogId { term: run.term, node: run.node, index })
    }

    /// Moves the entry from one place to another, if it is still at the first.
    pub(crate) fn relocate(&mut self, index: u64, from: Slot, to: Slot) {
        let Some(position) = self.position(index) else { return };
        if let Some(slot) = self.slots.get_mut(position)
            && (slot.segment, slot.offset) == (from.segment, from.offset)
        {
            *slot = to;
        }
    }

    /// Drops the entries from `next` on.
    pub(crate) fn truncate(&mut self, next: u64) {
        while self.next() > next {
            let block = self.block_position(self.next() - 1);
            let Some(slot) = self.slots.pop_back() else { break };
            self.blocks[block] -= u64::from(slot.len);
        }
        if self.is_empty() {
            self.reset(self.first.min(next));
            return;
        }
        while self.runs.back().is_some_and(|run| run.first >= next) {
            self.runs.pop_back();
        }
        let last_block = self.block_position(self.next() - 1);
        self.blocks.truncate(last_block + 1);
    }

    /// Drops the entries below `first`, which becomes the first index even if it lies beyond the end.
    pub(crate) fn purge(&mut self, first: u64) {
        if first >= self.next() {
            self.reset(first.max(self.first));
            return;
        }
        while self.first < first {
            let Some(slot) = self.slots.pop_front() else { break };
            self.blocks[0] -= u64::from(slot.len);
            self.first += 1;
            if self.first.is_multiple_of(BLOCK) {
                self.blocks.pop_front();
            }
        }
        while self.runs.get(1).is_some_and(|run| run.first <= self.first) {
            self.runs.pop_front();
        }
        if self.slots.capacity() > 1024 && self.slots.capacity() / 4 > self.slots.len() {
            self.slots.shrink_to(self.slots.len() * 2);
        }
    }

    /// Bytes of all entries from `index` on.
    pub(crate) fn bytes_from(&self, index: u64) -> u64 {
        let index = index.max(self.first);
        if index >= self.next() {
            return 0;
        }
        let block = self.block_position(index);
        let whole: u64 = self.blocks.iter().skip(block + 1).sum();
        let block_end = (index / BLOCK + 1) * BLOCK;
        let part: u64 = (index..block_end.min(self.next()))
            .filter_map(|i| self.get(i))
            .map(|slot| u64::from(slot.len))
            .sum();
        whole + part
    }

    fn position(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.first)?).ok()
    }

    /// The caller has checked that `index` is not below `first`.
    fn block_position(&self, index: u64) -> usize {
        usize::try_from(index / BLOCK - self.first / BLOCK).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_index_agrees_with_a_plain_list(ops in prop::collection::vec((0..10_u8, 0..700_u64), 1..60)) {
            let mut index = Index::default();
            let mut model: Vec<(LogId, u32)> = Vec::new();
            let mut first = 0;
            let mut term = 1;
            for (op, amount) in ops {
                match op {
                    0 => {
                        let keep = first + amount % (model.len() as u64 + 1);
                        index.truncate(keep);
                        model.retain(|(id, _)| id.index < keep);
                        if model.is_empty() { first = keep; }
                        term += 1;
                    }
                    1 => {
                        let to = first + amount;
                        index.purge(to);
                        model.retain(|(id, _)| id.index >= to);
                        first = to;
                    }
                    _ => for n in 0..amount / 4 {
                        let next = first + model.len() as u64;
                        let id = LogId { term: term + n / 50, node: 3, index: next };
                        let len = u32::try_from(n).unwrap() + 40;
                        index.push(id, Slot { segment: 1, offset: 2, len });
                        model.push((id, len));
                    },
                }
                term += 4;
                prop_assert_eq!(index.next(), first + model.len() as u64);
                prop_assert_eq!(index.first(), first);
                for (id, len) in model.iter().step_by(17) {
                    prop_assert_eq!(index.id(id.index), Some(*id));
                    prop_assert_eq!(index.get(id.index).unwrap().len, *len);
                }
                let from = first + amount / 2;
                let expected: u64 =
                    model.iter().filter(|(id, _)| id.index >= from).map(|(_, len)| u64::from(*len)).sum();
                prop_assert_eq!(index.bytes_from(from), expected);
                prop_assert_eq!(index.id(index.next()), None);
            }
        }
    }
}
