//! openraft's log storage on one group of the node's shared log.
//!
//! Every method here runs inside the Raft core's loop (except reads by replication), so none of
//! them waits for a disk but `save_vote`: an append is readable at once and reports durability
//! through its callback, which the log's writer thread calls in submission order. A vote is only
//! answered when it is synced, and elections are rare.
//!
//! Invariants:
//! * `IOFlushed` is called once per append, after the sync that covers the append and everything
//!   submitted before it (the log has a single queue for votes and entries).
//! * Reading past a hole is an error, never a short result.
//!
//! Not here: files, syncs, caches (`tombolo-raftlog`).

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};

use futures::{Stream, StreamExt, TryStreamExt, stream};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use tokio::sync::oneshot;
use tombolo_raftlog::Group;

use crate::types::{
    Entry, LogId, TypeConfig, Vote, entry_from_log, entry_to_log, log_id_from_log, log_id_to_log,
    vote_from_log, vote_to_log,
};

/// Most bytes that one replication request or one step of a replay reads.
pub(crate) const READ_BYTES_MAX: usize = 1 << 20;

/// One group's log; clones share it.
#[derive(Clone)]
pub(crate) struct LogStore {
    group: Group,
}

impl LogStore {
    pub(crate) fn new(group: Group) -> Self {
        Self { group }
    }

    fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, io::Error> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let entries = self.group.read(range, bytes_max).map_err(io::Error::other)?;
        entries.into_iter().map(entry_from_log).collect()
    }

    fn bounds(&self, range: &impl RangeBounds<u64>) -> Range<u64> {
        let start = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => *index,
            Bound::Unbounded => self.group.state().last.map_or(0, |last| last.index + 1),
        };
        start..end
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        // Callers ask for short ranges (at most 64 entries) and need all of them.
        let mut range = self.bounds(&range);
        let mut entries = Vec::new();
        while !range.is_empty() {
            let read = self.read(range.clone(), usize::MAX)?;
            let Some(last) = read.last() else { break };
            range.start = last.log_id.index + 1;
            entries.extend(read);
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.group.state().vote.map(vote_from_log))
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(start..end, READ_BYTES_MAX)
    }

    /// Reads piece by piece, so that applying a long committed range holds one piece in memory.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let range = self.bounds(&range);
        stream::try_unfold((self.clone(), range), |(log, mut range)| async move {
            let piece = log.read(range.clone(), READ_BYTES_MAX)?;
            let Some(last) = piece.last() else { return Ok::<_, io::Error>(None) };
            range.start = last.log_id.index + 1;
            Ok(Some((stream::iter(piece).map(Ok), (log, range))))
        })
        .try_flatten()
        .boxed()
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.group.state();
        let last_purged_log_id = state.purged.map(log_id_from_log);
        let last_log_id = state.last.map(log_id_from_log).max(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (done, synced) = oneshot::channel();
        self.group
            .save_vote(
                vote_to_log(vote),
                Box::new(move |result| {
                    // The receiver is gone only when the core is: nobody is left to tell.
                    let _ = done.send(result);
                }),
            )
            .map_err(io::Error::other)?;
        synced.await.map_err(|_| io::Error::other("the log's writer stopped"))?
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.group.save_committed(committed.as_ref().map(log_id_to_log));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let state = self.group.state();
        // The record may outlive the entries it names when a crash took an unsynced tail.
        let last = state.last.max(state.purged);
        Ok(state.committed.filter(|at| Some(*at) <= last).map(log_id_from_log))
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().map(entry_to_log).collect();
        self.group
            .append(entries, Box::new(move |result| flushed.io_completed(result)))
            .map_err(io::Error::other)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.group.truncate_after(last.as_ref().map(log_id_to_log)).map_err(io::Error::other)
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.group.purge(log_id_to_log(&upto)).map_err(io::Error::other)
    }
}
