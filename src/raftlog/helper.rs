//! The thread for chores that must not delay the writer: filling spare segments with zeros, recycling or
//! deleting old segments, and raising the watermark file.
//!
//! Old segments are given up strictly oldest first, so that a crash between two of them leaves a sequence
//! without holes. A file that a reader still has open is deleted instead of reused: the reader keeps it.

use std::{
    collections::VecDeque,
    fs,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use crate::{
    LogError,
    log::Shared,
    metrics::add,
    segment::{self, SegmentFile, sync_dir},
};

/// How long the watermark file may lag behind what is durable.
const MARK_DELAY: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    retired: VecDeque<Arc<SegmentFile>>,
    spares: Vec<PathBuf>,
    /// Spares are wanted: the log has grown enough to need a second segment.
    fill: bool,
    mark_now: bool,
    mark_due: Option<Instant>,
    stop: bool,
}

#[derive(Default)]
pub(crate) struct Helper {
    state: Mutex<State>,
    wake: Condvar,
    next_spare: AtomicU64,
}

enum Chore {
    Retire(Arc<SegmentFile>),
    Fill,
    Mark,
    Stop,
}

impl Helper {
    /// Starts with the spare files that an earlier run left.
    pub(crate) fn new(spares: Vec<PathBuf>, next_spare: u64) -> Self {
        let state = State { spares, ..State::default() };
        Self {
            state: Mutex::new(state),
            wake: Condvar::new(),
            next_spare: AtomicU64::new(next_spare),
        }
    }

    pub(crate) fn take_spare(&self) -> Option<PathBuf> {
        let spare = self.state.lock().spares.pop();
        self.wake.notify_one();
        spare
    }

    /// A file name for a new spare.
    pub(crate) fn spare_path(&self, shared: &Shared) -> PathBuf {
        let number = self.next_spare.fetch_add(1, Ordering::Relaxed);
        shared.dir.join(format!("spare-{number:08}"))
    }

    pub(crate) fn want_spares(&self) {
        let mut state = self.state.lock();
        if !state.fill {
            state.fill = true;
            self.wake.notify_one();
        }
    }

    /// Nothing live is in this segment any more. Called oldest first.
    pub(crate) fn retire(&self, file: Arc<SegmentFile>) {
        self.state.lock().retired.push_back(file);
        self.wake.notify_one();
    }

    /// Something became durable that the watermark file does not say; `now` if it should at once.
    pub(crate) fn mark(&self, now: bool) {
        let mut state = self.state.lock();
        let wake = now || state.mark_due.is_none();
        state.mark_now |= now;
        state.mark_due.get_or_insert_with(|| Instant::now() + MARK_DELAY);
        if wake {
            self.wake.notify_one();
        }
    }

    /// Finishes the chores at hand, raises the watermark a last time and ends the thread.
    pub(crate) fn stop(&self) {
        self.state.lock().stop = true;
        self.wake.notify_one();
    }

    fn next(&self, spare_segments: usize) -> Chore {
        let mut state = self.state.lock();
        loop {
            if let Some(file) = state.retired.pop_front() {
                return Chore::Retire(file);
            }
            if state.mark_now || state.mark_due.is_some_and(|due| due <= Instant::now()) {
                state.mark_now = false;
                state.mark_due = None;
                return Chore::Mark;
            }
            if state.stop {
                return Chore::Stop;
            }
            // One is made ahead; the others come from recycling, which costs nothing.
            if state.fill && state.spares.is_empty() && spare_segments > 0 {
                return Chore::Fill;
            }
            match state.mark_due {
                Some(due) => {
                    self.wake.wait_until(&mut state, due);
                }
                None => self.wake.wait(&mut state),
            }
        }
    }
}

/// Body of the helper thread.
pub(crate) fn run(shared: &Shared) {
    let helper = &shared.helper;
    loop {
        match helper.next(shared.config.spare_segments) {
            Chore::Retire(file) => {
                if let Err(error) = retire(shared, file) {
                    tracing::warn!(%error, "an old segment was not given back; the next start will do it");
                }
            }
            Chore::Fill => {
                let path = helper.spare_path(shared);
                match segment::create_spare(&path, shared.config.segment_bytes) {
                    Ok(()) => helper.state.lock().spares.push(path),
                    Err(error) => {
                        tracing::warn!(%error, "no spare segment; the writer will have to create the next one");
                        helper.state.lock().fill = false;
                    }
                }
            }
            Chore::Mark => {
                if let Err(error) = shared.watermark.raise() {
                    shared.queue.fail(format!("cannot write the watermark file: {error}"));
                }
            }
            Chore::Stop => {
                // After a failure the file stays as it is: what is durable is no longer known.
                if shared.queue.failed().is_none()
                    && let Err(error) = shared.watermark.raise()
                {
                    tracing::error!(%error, "the watermark file was not written at close");
                }
                return;
            }
        }
    }
}

fn retire(shared: &Shared, file: Arc<SegmentFile>) -> Result<(), LogError> {
    add(&shared.metrics.recycled_segments, 1);
    let path = file.path.clone();
    let same_size = file.capacity == shared.config.segment_bytes;
    let unused = Arc::into_inner(file).is_some();
    let wanted = shared.helper.state.lock().spares.len() < shared.config.spare_segments;
    if unused && same_size && wanted {
        let spare = shared.helper.spare_path(shared);
        fs::rename(&path, &spare).map_err(LogError::io("recycle", &path))?;
        sync_dir(&shared.dir).map_err(LogError::io("recycle", &path))?;
        shared.helper.state.lock().spares.push(spare);
    } else {
        fs::remove_file(&path).map_err(LogError::io("delete", &path))?;
        sync_dir(&shared.dir).map_err(LogError::io("delete", &path))?;
    }
    Ok(())
}
