//! Writes the history of a run: the only clock and the only order of its events.

use anyhow::Context;
use serde_json::Value;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tombolo_jepsen_history::{Event, Facts, History, Kind, Process, Writer};

/// Records events as they happen, in a file and in memory.
#[derive(Debug)]
pub(crate) struct Recorder {
    begun: Instant,
    next_process: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    writer: Writer<BufWriter<File>>,
    history: History,
    failed: Option<std::io::Error>,
}

/// What an event is about.
#[derive(Clone, Debug)]
pub(crate) struct What {
    pub(crate) f: &'static str,
    pub(crate) key: String,
    pub(crate) value: Value,
}

impl Recorder {
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        let writer = Writer::new(BufWriter::new(file));
        let inner = Inner { writer, history: History::default(), failed: None };
        let next_process = AtomicU64::new(0);
        Ok(Self { begun: Instant::now(), next_process, inner: Mutex::new(inner) })
    }

    /// A process that has not acted yet.
    pub(crate) fn new_process(&self) -> u64 {
        self.next_process.fetch_add(1, Ordering::Relaxed)
    }

    /// Milliseconds since the run began.
    pub(crate) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Records an event of a client; call it before sending and after receiving.
    pub(crate) fn client(&self, process: u64, kind: Kind, what: &What, x: Facts) {
        let key = Some(what.key.clone());
        self.append(Process::Client(process), kind, what.f, key, what.value.clone(), x);
    }

    /// Records what was done to the cluster.
    pub(crate) fn fault(&self, f: &str, value: Value) {
        self.append(Process::Nemesis, Kind::Info, f, None, value, Facts::default());
    }

    /// Everything recorded so far; the file holds the same after this.
    pub(crate) fn history(&self) -> anyhow::Result<History> {
        let mut inner = self.lock();
        inner.writer.flush().context("writing the history")?;
        if let Some(error) = inner.failed.take() {
            return Err(error).context("writing the history");
        }
        Ok(inner.history.clone())
    }

    fn append(
        &self,
        process: Process,
        kind: Kind,
        f: &str,
        key: Option<String>,
        value: Value,
        x: Facts,
    ) {
        let mut inner = self.lock();
        // Read under the lock, so that times are in the order of the events.
        let time = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut event = Event { index: 0, time, process, kind, f: f.into(), key, value, x };
        if let Err(error) = inner.writer.append(&mut event) {
            inner.failed.get_or_insert(error);
        }
        inner.history.events.push(event);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
