//! A thread inside a network namespace: sockets that are made on it belong there.

use anyhow::Context;
use std::path::PathBuf;
use std::thread::JoinHandle;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Where a region's clients are. Dropping it ends the thread and what runs on it.
#[derive(Debug)]
pub(crate) struct Place {
    runtime: Handle,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Place {
    /// Starts the thread, in the namespace at this path or in the present one.
    pub(crate) async fn start(namespace: Option<PathBuf>) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (ready, started) = oneshot::channel();
        let thread = std::thread::Builder::new().name("clients".into()).spawn(move || {
            let entered = namespace.map_or(Ok(()), |path| tombolo_jepsen_netsim::enter_path(&path));
            let runtime = entered.and_then(|()| Builder::new_current_thread().enable_all().build());
            match runtime {
                Ok(runtime) => {
                    ready.send(Ok(runtime.handle().clone())).ok();
                    runtime.block_on(stopped.cancelled());
                }
                Err(error) => {
                    ready.send(Err(error)).ok();
                }
            }
        })?;
        let runtime = started.await.context("the clients' thread ended")?;
        Ok(Self { runtime: runtime.context("the clients' namespace")?, stop, thread: Some(thread) })
    }

    /// Runs a future on the thread.
    pub(crate) fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.runtime.spawn(future)
    }

    /// Runs a future on the thread and waits for it.
    pub(crate) async fn run<F>(&self, future: F) -> anyhow::Result<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.spawn(future).await.context("a task of the clients ended early")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
