//! The way from the groups to the writer thread.
//!
//! One queue for all groups, so that the order of submission is the order on disk and of callbacks.
//! Jobs that need no sync of their own (truncate, purge, committed) do not wake the writer: they ride
//! along with the next job that does, or are written after [`LAZY_DELAY`].

use std::{
    collections::VecDeque,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use crate::{
    LogError,
    group::{Done, GroupCell},
    types::{Entry, LogId, Vote},
};

/// The longest that a record without a sync of its own waits for one.
const LAZY_DELAY: Duration = Duration::from_secs(1);

pub(crate) enum Job {
    Append {
        cell: Arc<GroupCell>,
        ticket: u32,
        entries: Vec<Entry>,
        done: Done,
    },
    Vote {
        group: u64,
        vote: Vote,
        done: Done,
    },
    Committed {
        group: u64,
        committed: Option<LogId>,
    },
    Truncate {
        group: u64,
        last: Option<LogId>,
    },
    Purge {
        group: u64,
        upto: LogId,
    },
    /// All live entries of this segment have been copied, as far as the groups' memory knew them.
    Evacuated {
        segment: u32,
    },
}

impl Job {
    fn is_urgent(&self) -> bool {
        match self {
            Self::Append { .. } | Self::Vote { .. } | Self::Evacuated { .. } => true,
            Self::Committed { .. } | Self::Truncate { .. } | Self::Purge { .. } => false,
        }
    }

    pub(crate) fn into_done(self) -> Option<Done> {
        match self {
            Self::Append { done, .. } | Self::Vote { done, .. } => Some(done),
            Self::Committed { .. }
            | Self::Truncate { .. }
            | Self::Purge { .. }
            | Self::Evacuated { .. } => None,
        }
    }
}

/// Why the writer was woken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    Work,
    /// No more jobs will come, and none are left.
    Closed,
    /// The log failed; the reason is in the queue.
    Failed(String),
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    urgent: bool,
    closing: bool,
    failed: Option<String>,
    /// The writer waits without a deadline, so even a lazy job must wake it.
    parked: bool,
}

#[derive(Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    ready: Condvar,
}

impl Queue {
    /// Adds a job. Called with the group's lock held, so that memory and disk agree on the order.
    pub(crate) fn push(&self, job: Job) -> Result<(), LogError> {
        let urgent = job.is_urgent();
        let mut state = self.state.lock();
        if let Some(reason) = &state.failed {
            return Err(LogError::Failed { reason: reason.clone() });
        }
        if state.closing {
            return Err(LogError::Closed);
        }
        let wake = (urgent && !state.urgent) || state.parked;
        state.urgent |= urgent;
        state.jobs.push_back(job);
        drop(state);
        if wake {
            self.ready.notify_one();
        }
        Ok(())
    }

    /// Why nothing can be pushed any more, if so.
    pub(crate) fn refusal(&self) -> Option<LogError> {
        let state = self.state.lock();
        match &state.failed {
            Some(reason) => Some(LogError::Failed { reason: reason.clone() }),
            None => state.closing.then_some(LogError::Closed),
        }
    }

    pub(crate) fn failed(&self) -> Option<String> {
        self.state.lock().failed.clone()
    }

    /// Moves all jobs to `into`, which must be empty. Waits for work unless `busy`.
    pub(crate) fn take(&self, into: &mut VecDeque<Job>, busy: bool) -> Wake {
        let mut state = self.state.lock();
        // A writer that was just active stays awake for one delay: lazy jobs then need no wake-up.
        let mut deadline = None;
        let mut park = false;
        loop {
            if let Some(reason) = &state.failed {
                return Wake::Failed(reason.clone());
            }
            if state.closing && state.jobs.is_empty() {
                return Wake::Closed;
            }
            if state.urgent || state.closing || busy {
                break;
            }
            if park && state.jobs.is_empty() {
                state.parked = true;
                self.ready.wait(&mut state);
                state.parked = false;
                (park, deadline) = (false, None);
                continue;
            }
            let until = *deadline.get_or_insert_with(|| Instant::now() + LAZY_DELAY);
            if self.ready.wait_until(&mut state, until).timed_out() {
                if !state.jobs.is_empty() {
                    break;
                }
                park = true;
            }
        }
        mem::swap(&mut state.jobs, into);
        state.urgent = false;
        Wake::Work
    }

    /// No more jobs are accepted; the writer finishes those that are queued.
    pub(crate) fn close(&self) {
        self.state.lock().closing = true;
        self.ready.notify_all();
    }

    /// The log is failed for good: wakes the writer, which reports to everyone. The first reason stays.
    pub(crate) fn fail(&self, reason: String) {
        self.state.lock().failed.get_or_insert(reason);
        self.ready.notify_all();
    }

    /// Takes what is left after a failure.
    pub(crate) fn drain(&self) -> VecDeque<Job> {
        mem::take(&mut self.state.lock().jobs)
    }
}
