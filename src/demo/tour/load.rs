//! Writers that keep writing while something is being broken, and remember what was acknowledged.
//!
//! Every write has a key of its own, so what must be found later does not depend on the order in
//! which writes took effect. A write that was not acknowledged may or may not be there.
//!
//! Invariant: a write is never abandoned half-way by stopping; every acknowledgement is recorded.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tombolo_client::Keyspace;

/// Keeps a tour's load light: the point is the fault, not the rate.
const PACE: Duration = Duration::from_millis(4);
/// Bounds one write with its retries.
const WRITE_DEADLINE: Duration = Duration::from_secs(3);

/// Writers at work.
pub(super) struct Load {
    stop: CancellationToken,
    writers: JoinSet<Report>,
    /// Acknowledged writes of each writer.
    progress: Arc<[AtomicU64]>,
}

/// What writers did.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Key and value of every acknowledged write.
    pub(super) acknowledged: BTreeMap<String, String>,
    /// Writes that were answered with an error or not at all.
    pub(super) not_acknowledged: u64,
    /// The longest time that a writer waited from one acknowledgement to the next.
    pub(super) longest_gap: Duration,
}

impl Load {
    /// Starts `writers` that write to keys beginning with `prefix`.
    pub(super) fn start(keys: &Keyspace, prefix: &str, writers: usize) -> Self {
        let stop = CancellationToken::new();
        let progress: Arc<[AtomicU64]> = (0..writers).map(|_| AtomicU64::new(0)).collect();
        let mut tasks = JoinSet::new();
        for writer in 0..writers {
            let prefix = format!("{prefix}/{writer}");
            let (keys, stop, progress) = (keys.clone(), stop.clone(), Arc::clone(&progress));
            tasks.spawn(async move { write(&keys, &prefix, &stop, &progress[writer]).await });
        }
        Self { stop, writers: tasks, progress }
    }

    /// Acknowledged writes of each writer so far.
    pub(super) fn progress(&self) -> Vec<u64> {
        self.progress.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// Lets every writer finish the write it is in, and collects what all did.
    ///
    /// # Errors
    /// A writer panicked.
    pub(super) async fn finish(mut self) -> anyhow::Result<Report> {
        self.stop.cancel();
        let mut sum = Report::default();
        while let Some(report) = self.writers.join_next().await {
            let report = report?;
            sum.acknowledged.extend(report.acknowledged);
            sum.not_acknowledged += report.not_acknowledged;
            sum.longest_gap = sum.longest_gap.max(report.longest_gap);
        }
        Ok(sum)
    }
}

async fn write(
    keys: &Keyspace,
    prefix: &str,
    stop: &CancellationToken,
    progress: &AtomicU64,
) -> Report {
    let mut report = Report::default();
    let mut last = Instant::now();
    for number in 0u64.. {
        if stop.is_cancelled() {
            break;
        }
        let (key, value) = (format!("{prefix}/{number:06}"), format!("value {number}"));
        match keys.put(&key, &value).deadline(WRITE_DEADLINE).await {
            Ok(_) => {
                report.longest_gap = report.longest_gap.max(last.elapsed());
                last = Instant::now();
                report.acknowledged.insert(key, value);
                progress.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::debug!(%error, key, "a write under load was not acknowledged");
                report.not_acknowledged += 1;
            }
        }
        stop.run_until_cancelled(tokio::time::sleep(PACE)).await;
    }
    report
}
