//! Opening, sharing and closing the log.
//!
//! [`RaftLog`] and every [`Group`] share one `Inner`; the threads share `Shared`. The log closes when the
//! last handle is dropped or [`RaftLog::close`] is called, whichever comes first; the directory stays
//! locked until the threads have ended.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
};

use parking_lot::{Mutex, RwLock};

use crate::{
    LogError, LogMetrics,
    cache::Cache,
    frame::{HEADER_BYTES, STATE_BYTES},
    group::{Group, GroupCell, GroupData},
    helper::{self, Helper},
    metrics::Counters,
    queue::Queue,
    recovery::{self, Recovery},
    segment::SegmentFile,
    types::Identity,
    watermark::{MAX_GROUPS, Watermark},
    writer::Writer,
};

/// The largest payload of an entry, if segments are large enough: it may also not exceed a quarter of one.
pub const MAX_ENTRY_BYTES: u64 = 16 * 1024 * 1024;

const MIN_SEGMENT_BYTES: u64 = 64 * 1024;
const MAX_SEGMENT_BYTES: u64 = 1024 * 1024 * 1024;

/// Settings of a log. They may change between starts; existing segments keep their size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Size of a segment file, 64 KiB to 1 GiB.
    pub segment_bytes: u64,
    /// Bytes of entries kept in memory, over all groups. Entries that are not durable yet are always kept.
    pub cache_bytes: u64,
    /// The most unused segment files kept for reuse. One is made ahead once the log has grown to an eighth
    /// of its first segment, the others are old ones. With 0 every segment is made when it is needed.
    pub spare_segments: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { segment_bytes: 64 * 1024 * 1024, cache_bytes: 64 * 1024 * 1024, spare_segments: 2 }
    }
}

impl Config {
    fn validate(&self) -> Result<(), LogError> {
        if !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&self.segment_bytes) {
            let reason = format!(
                "segment_bytes is {}, but must be from {MIN_SEGMENT_BYTES} to {MAX_SEGMENT_BYTES}",
                self.segment_bytes
            );
            return Err(LogError::InvalidConfig { reason });
        }
        Ok(())
    }

    /// How many groups' states fit into half a segment.
    fn max_groups(&self) -> usize {
        let fit = self.segment_bytes / 2 / (HEADER_BYTES + STATE_BYTES) as u64;
        usize::try_from(fit).unwrap_or(MAX_GROUPS).min(MAX_GROUPS)
    }
}

/// What the threads and the handles share.
pub(crate) struct Shared {
    pub(crate) dir: PathBuf,
    pub(crate) config: Config,
    pub(crate) log_id: u64,
    pub(crate) max_entry_bytes: u64,
    pub(crate) queue: Queue,
    pub(crate) segments: RwLock<BTreeMap<u32, Arc<SegmentFile>>>,
    pub(crate) cache: Cache,
    pub(crate) watermark: Watermark,
    pub(crate) helper: Helper,
    pub(crate) metrics: Counters,
    groups: RwLock<BTreeMap<u64, Arc<GroupCell>>>,
    hooks: Mutex<Hooks>,
    #[cfg(test)]
    pub(crate) faults: crate::failure_tests::Faults,
}

type FailureHook = Box<dyn Fn(&str) + Send + Sync>;

#[derive(Default)]
struct Hooks {
    waiting: Vec<FailureHook>,
    reported: Option<String>,
}

impl Shared {
    pub(crate) fn cells(&self) -> Vec<Arc<GroupCell>> {
        self.groups.read().values().cloned().collect()
    }

    pub(crate) fn cell(&self, group: u64) -> Option<Arc<GroupCell>> {
        self.groups.read().get(&group).cloned()
    }

    /// Runs the failure hooks, once.
    pub(crate) fn report_failure(&self, reason: &str) {
        let waiting = {
            let mut hooks = self.hooks.lock();
            hooks.reported = Some(reason.to_owned());
            std::mem::take(&mut hooks.waiting)
        };
        for hook in waiting {
            hook(reason);
        }
    }
}

/// What the handles share; closes the log when the last one is gone.
pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) max_groups: usize,
    threads: Mutex<Option<Threads>>,
}

struct Threads {
    writer: JoinHandle<()>,
    helper: JoinHandle<()>,
}

/// The node's Raft log. Cheap to clone.
#[derive(Clone)]
pub struct RaftLog {
    inner: Arc<Inner>,
}

impl fmt::Debug for RaftLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RaftLog").field("dir", &self.inner.shared.dir).finish_non_exhaustive()
    }
}

impl RaftLog {
    /// Opens the log in `dir`, or creates it there, and starts its threads.
    ///
    /// Everything is read and checked. What [`Group::state`] says after this is durable. Refuses with an
    /// error that says what to do if acknowledged data is damaged or missing.
    pub fn open(dir: &Path, config: Config) -> Result<(Self, Recovery), LogError> {
        config.validate()?;
        let lock = recovery::lock_dir(dir)?;
        let recovered = recovery::recover(dir, &config)?;
        let max_groups = config.max_groups();
        if recovered.groups.len() > max_groups {
            let reason = format!(
                "segment_bytes {} has room for {max_groups} groups, but the log has {}",
                config.segment_bytes,
                recovered.groups.len()
            );
            return Err(LogError::InvalidConfig { reason });
        }
        let groups = recovered.groups.into_iter().map(|(id, data)| {
            (id, Arc::new(GroupCell { id, over_limit: false, data: Mutex::new(data) }))
        });
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            max_entry_bytes: MAX_ENTRY_BYTES.min(config.segment_bytes / 4),
            cache: Cache::new(config.cache_bytes),
            config,
            log_id: recovered.log_id,
            queue: Queue::default(),
            segments: RwLock::new(recovered.segments),
            watermark: recovered.watermark,
            helper: Helper::new(recovered.spares, recovered.next_spare),
            metrics: Counters::default(),
            groups: RwLock::new(groups.collect()),
            hooks: Mutex::default(),
            #[cfg(test)]
            faults: crate::failure_tests::Faults::default(),
        });
        let head = recovered.head;
        let writer = Writer::new(
            Arc::clone(&shared),
            head,
            recovered.offset,
            recovered.views,
            recovered.pins,
        );
        let threads = start_threads(&shared, writer, lock)?;
        let inner = Inner { shared, max_groups, threads: Mutex::new(Some(threads)) };
        Ok((Self { inner: Arc::new(inner) }, recovered.report))
    }

    /// The handle of a group, created on first use. Nothing is written before the group is.
    pub fn group(&self, group: u64) -> Group {
        let inner = Arc::clone(&self.inner);
        let known = self.inner.shared.cell(group);
        let cell = known.unwrap_or_else(|| {
            let mut groups = self.inner.shared.groups.write();
            let over_limit = !groups.contains_key(&group) && groups.len() >= self.inner.max_groups;
            let new = || {
                Arc::new(GroupCell {
                    id: group,
                    over_limit,
                    data: Mutex::new(GroupData::default()),
                })
            };
            if over_limit { new() } else { Arc::clone(groups.entry(group).or_insert_with(new)) }
        });
        Group { inner, cell }
    }

    /// Numbers of the groups that have a log or were asked for, ascending.
    pub fn groups(&self) -> Vec<u64> {
        self.inner.shared.groups.read().keys().copied().collect()
    }

    /// Who owns this directory; `None` before the first start has said so.
    pub fn identity(&self) -> Option<Identity> {
        self.inner.shared.watermark.content().identity
    }

    /// Says who owns this directory, durably. Afterwards only the incarnation may change, and only grow;
    /// anything else is another node's directory.
    pub fn set_identity(&self, identity: Identity) -> Result<(), LogError> {
        if let Some(found) = self.identity() {
            if found == identity {
                return Ok(());
            }
            let same = Identity { incarnation: identity.incarnation, ..found.clone() } == identity;
            if !same || identity.incarnation < found.incarnation {
                return Err(LogError::IdentityMismatch {
                    found: Box::new(found),
                    wanted: Box::new(identity),
                });
            }
        }
        self.inner.shared.watermark.set_identity(identity)
    }

    pub fn metrics(&self) -> LogMetrics {
        let shared = &self.inner.shared;
        shared.metrics.read(shared.segments.read().len() as u64, shared.cache.bytes())
    }

    /// The reason, once a write or sync failed. The process must then stop: what was in flight is unknown.
    pub fn failed(&self) -> Option<String> {
        self.inner.shared.queue.failed()
    }

    /// Calls `hook` once if the log fails, after all waiting callbacks got their error; at once if it has
    /// failed already.
    pub fn on_failure(&self, hook: Box<dyn Fn(&str) + Send + Sync>) {
        let mut hooks = self.inner.shared.hooks.lock();
        match hooks.reported.clone() {
            Some(reason) => {
                drop(hooks);
                hook(&reason);
            }
            None => hooks.waiting.push(hook),
        }
    }

    /// Writes what is queued, raises the watermark, ends the threads and unlocks the directory. Handles
    /// stay readable and refuse changes. Called from a callback it returns without waiting.
    pub fn close(&self) {
        self.inner.close();
    }

    #[cfg(test)]
    pub(crate) fn faults(&self) -> &crate::failure_tests::Faults {
        &self.inner.shared.faults
    }
}

impl Inner {
    fn close(&self) {
        self.shared.queue.close();
        let Some(threads) = self.threads.lock().take() else { return };
        if threads.writer.thread().id() == thread::current().id() {
            return;
        }
        // A panic in either has been reported by the thread itself.
        let _ = threads.writer.join();
        let _ = threads.helper.join();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

fn start_threads(shared: &Arc<Shared>, writer: Writer, lock: File) -> Result<Threads, LogError> {
    let failed = LogError::io("start a thread for", &shared.dir);
    let spawn = || {
        let helper = {
            let shared = Arc::clone(shared);
            thread::Builder::new().name("raftlog-helper".to_owned()).spawn(move || {
                helper::run(&shared);
                drop(lock);
            })?
        };
        let stop = StopHelper(Arc::clone(shared));
        let writer = thread::Builder::new().name("raftlog".to_owned()).spawn(move || {
            let _stop = stop;
            writer.run();
        })?;
        Ok(Threads { writer, helper })
    };
    spawn().map_err(failed)
}

/// Ends the helper when the writer has ended, however it did.
struct StopHelper(Arc<Shared>);

impl Drop for StopHelper {
    fn drop(&mut self) {
        self.0.helper.stop();
    }
}
