//! The node processes of a demo: start, kill, pause, resume, stop, and noticing what dies.
//!
//! One task owns each child and is the only one that signals or reaps it, so a signal can never
//! reach a process that took over a dead child's number.
//!
//! Invariants:
//! * An exit that nobody ordered is a [`Crash`], reported at once with the end of the log.
//! * After [`Fleet::stop`] returns no child is left. When this process dies first, the kernel
//!   kills the children (`spawn`).
//!
//! Not here: what a ready node is (`readiness`), the command line of a node (`demo`).

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::spawn::Spawner;

const TAIL_LINES: usize = 12;
const TAIL_BYTES: u64 = 8 << 10;

/// How to run one process.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Its name in every message.
    pub name: String,
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Receives stdout and stderr, appended.
    pub log: PathBuf,
}

/// What a process is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not started yet, or stopped or killed on request.
    Down,
    /// Running.
    Up {
        /// Its process id.
        pid: u32,
    },
    /// Stopped by SIGSTOP.
    Paused {
        /// Its process id.
        pid: u32,
    },
    /// Ended by itself.
    Crashed {
        /// How, in words.
        how: String,
    },
}

impl State {
    /// The process id, if there is a process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Up { pid } | Self::Paused { pid } => Some(*pid),
            Self::Down | Self::Crashed { .. } => None,
        }
    }

    /// One word.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Up { .. } => "up",
            Self::Paused { .. } => "paused",
            Self::Crashed { .. } => "crashed",
        }
    }
}

/// An exit that nobody ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The process.
    pub name: String,
    /// How it ended, in words.
    pub how: String,
    /// The last lines of its log.
    pub log_tail: String,
}

/// Why an order to a process was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// No process has this name; the caller corrects it.
    #[error("no node `{name}`; the nodes are {known}")]
    Unknown {
        /// As given.
        name: String,
        /// Names that exist.
        known: String,
    },
    /// The process is in a state in which the order means nothing.
    #[error("{name} is {state}")]
    WrongState {
        /// The process.
        name: String,
        /// A word for its state.
        state: &'static str,
    },
    /// The system refused.
    #[error("{name}: {source}")]
    System {
        /// The process.
        name: String,
        /// What the system says.
        source: io::Error,
    },
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Start,
    Kill,
    Pause,
    Resume,
    /// SIGTERM, then SIGKILL after this long.
    Stop(Duration),
}

type Reply = oneshot::Sender<Result<(), ProcessError>>;

#[derive(Debug)]
struct Member {
    orders: mpsc::Sender<(Order, Reply)>,
    state: watch::Receiver<State>,
}

/// All processes of a demo, by name.
///
/// Dropping it kills them all.
#[derive(Debug)]
pub struct Fleet {
    members: BTreeMap<String, Member>,
    crashes: watch::Receiver<Vec<Crash>>,
}

impl Fleet {
    /// A fleet in which nothing runs yet. Call inside a tokio runtime.
    ///
    /// # Errors
    /// The system refused a thread.
    pub fn new(launches: Vec<Launch>) -> io::Result<Self> {
        let spawner = Arc::new(Spawner::new()?);
        let (report, crashes) = watch::channel(Vec::new());
        let report = Arc::new(report);
        let members = launches.into_iter().map(|launch| {
            let (orders, incoming) = mpsc::channel(8);
            let (publish, state) = watch::channel(State::Down);
            let name = launch.name.clone();
            let keeper = Keeper {
                launch,
                spawner: Arc::clone(&spawner),
                publish,
                report: Arc::clone(&report),
                child: None,
            };
            tokio::spawn(keeper.run(incoming));
            (name, Member { orders, state })
        });
        Ok(Self { members: members.collect(), crashes })
    }

    /// Starts a process that is not running.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn start(&self, name: &str) -> Result<(), ProcessError> {
        self.order(name, Order::Start).await
    }

    /// Kills a process with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn kill(&self, name: &str) -> Result<(), ProcessError> {
        self.order(name, Order::Kill).await
    }

    /// Freezes a process with SIGSTOP.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn pause(&self, name: &str) -> Result<(), ProcessError> {
        self.order(name, Order::Pause).await
    }

    /// Lets a paused process go on.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn resume(&self, name: &str) -> Result<(), ProcessError> {
        self.order(name, Order::Resume).await
    }

    /// Stops one process: SIGTERM, then SIGKILL when it takes longer than `grace`.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn stop_one(&self, name: &str, grace: Duration) -> Result<(), ProcessError> {
        self.order(name, Order::Stop(grace)).await
    }

    /// Starts all processes that are not running.
    ///
    /// # Errors
    /// The first [`ProcessError`]; the others were started all the same.
    pub async fn start_all(&self) -> Result<(), ProcessError> {
        let down = self.members.iter().filter(|(_, member)| member.state.borrow().pid().is_none());
        join_all(down.map(|(name, _)| self.start(name))).await.into_iter().collect()
    }

    /// Kills all processes at once and waits until they are gone.
    ///
    /// # Errors
    /// The first [`ProcessError`]; the others were killed all the same.
    pub async fn kill_all(&self) -> Result<(), ProcessError> {
        let up = self.members.iter().filter(|(_, member)| member.state.borrow().pid().is_some());
        join_all(up.map(|(name, _)| self.kill(name))).await.into_iter().collect()
    }

    /// Stops all processes side by side; takes at most `grace` and a moment. None is left after.
    pub async fn stop(&self, grace: Duration) {
        let up = self.members.iter().filter(|(_, member)| member.state.borrow().pid().is_some());
        for result in join_all(up.map(|(name, _)| self.stop_one(name, grace))).await {
            // It ended by itself in the meantime, which is what was wanted.
            if let Err(error) = result {
                tracing::debug!(%error, "stopping a node that is gone");
            }
        }
    }

    /// What a process is doing.
    ///
    /// # Errors
    /// [`ProcessError::Unknown`].
    pub fn state(&self, name: &str) -> Result<State, ProcessError> {
        Ok(self.member(name)?.state.borrow().clone())
    }

    /// Every crash so far, and a way to wait for the next.
    #[must_use]
    pub fn crashes(&self) -> watch::Receiver<Vec<Crash>> {
        self.crashes.clone()
    }

    fn member(&self, name: &str) -> Result<&Member, ProcessError> {
        self.members.get(name).ok_or_else(|| ProcessError::Unknown {
            name: name.into(),
            known: self.members.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    async fn order(&self, name: &str, order: Order) -> Result<(), ProcessError> {
        let member = self.member(name)?;
        let gone = || ProcessError::System {
            name: name.into(),
            source: io::Error::other("its keeper is gone"),
        };
        let (reply, answer) = oneshot::channel();
        member.orders.send((order, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Owns one process.
struct Keeper {
    launch: Launch,
    spawner: Arc<Spawner>,
    publish: watch::Sender<State>,
    report: Arc<watch::Sender<Vec<Crash>>>,
    child: Option<Child>,
}

impl Keeper {
    /// Carries out orders until the fleet is dropped; the child is killed by its own drop then.
    async fn run(mut self, mut orders: mpsc::Receiver<(Order, Reply)>) {
        loop {
            // Both branches may be dropped: `wait` keeps the status for the next call.
            let order = tokio::select! {
                biased;
                status = ended(&mut self.child) => {
                    self.crashed(status);
                    continue;
                }
                order = orders.recv() => order,
            };
            let Some((order, reply)) = order else { return };
            let result = self.obey(order).await;
            // Whoever gave the order may have lost interest.
            reply.send(result).ok();
        }
    }

    async fn obey(&mut self, order: Order) -> Result<(), ProcessError> {
        let state = self.publish.borrow().clone();
        match (order, state) {
            (Order::Start, State::Down | State::Crashed { .. }) => self.start().await,
            (Order::Kill, State::Up { .. } | State::Paused { .. }) => {
                self.signal(Signal::KILL)?;
                self.reap().await
            }
            (Order::Pause, State::Up { pid }) => {
                self.signal(Signal::STOP)?;
                self.publish.send_replace(State::Paused { pid });
                Ok(())
            }
            (Order::Resume, State::Paused { pid }) => {
                self.signal(Signal::CONT)?;
                self.publish.send_replace(State::Up { pid });
                Ok(())
            }
            (Order::Stop(grace), State::Up { .. } | State::Paused { .. }) => {
                self.signal(Signal::TERM)?;
                self.signal(Signal::CONT)?;
                if timeout(grace, ended(&mut self.child)).await.is_err() {
                    tracing::warn!(node = self.launch.name, "did not stop in time, killing it");
                    self.signal(Signal::KILL)?;
                }
                self.reap().await
            }
            (Order::Start | Order::Pause, state @ (State::Up { .. } | State::Paused { .. }))
            | (Order::Resume, state @ State::Up { .. })
            | (
                Order::Kill | Order::Pause | Order::Resume | Order::Stop(_),
                state @ (State::Down | State::Crashed { .. }),
            ) => Err(ProcessError::WrongState {
                name: self.launch.name.clone(),
                state: state.word(),
            }),
        }
    }

    async fn start(&mut self) -> Result<(), ProcessError> {
        let child = match open_log(&self.launch.log) {
            Ok((out, err)) => {
                let mut command = Command::new(&self.launch.program);
                // Many nodes share this machine: one worker thread each wakes up less.
                command.env("TOKIO_WORKER_THREADS", "1");
                command.args(&self.launch.arguments).stdin(Stdio::null()).stdout(out).stderr(err);
                self.spawner.spawn(command).await
            }
            Err(error) => Err(error),
        };
        let child = child.map_err(|source| self.system(source))?;
        if let Some(pid) = child.id() {
            self.publish.send_replace(State::Up { pid });
        }
        self.child = Some(child);
        Ok(())
    }

    /// Waits for an end that was ordered.
    async fn reap(&mut self) -> Result<(), ProcessError> {
        let waited = ended(&mut self.child).await;
        self.child = None;
        self.publish.send_replace(State::Down);
        waited.map(drop).map_err(|source| self.system(source))
    }

    fn crashed(&mut self, status: io::Result<ExitStatus>) {
        self.child = None;
        let how = match status {
            Ok(status) => status.to_string(),
            Err(error) => format!("unknown: {error}"),
        };
        self.publish.send_replace(State::Crashed { how: how.clone() });
        let name = self.launch.name.clone();
        let log_tail = log_tail(&self.launch.log);
        self.report.send_modify(|crashes| crashes.push(Crash { name, how, log_tail }));
    }

    /// Signals the child, which cannot have been reaped: only this keeper waits for it.
    fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        let pid = self.child.as_ref().and_then(Child::id);
        let pid = pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { return Ok(()) };
        kill_process(pid, signal).map_err(|error| self.system(error.into()))
    }

    fn system(&self, source: io::Error) -> ProcessError {
        ProcessError::System { name: self.launch.name.clone(), source }
    }
}

/// The child's end; never, when there is none. Safe to drop and call again.
async fn ended(child: &mut Option<Child>) -> io::Result<ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

fn open_log(path: &Path) -> io::Result<(Stdio, Stdio)> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    Ok((file.try_clone()?.into(), file.into()))
}

/// The last lines of a log, or why there are none. Never fails: it is part of other messages.
#[must_use]
pub fn log_tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) if bytes.is_empty() => "(its log is empty)".into(),
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
        }
        Err(error) => format!("(no log at {}: {error})", path.display()),
    }
}

#[cfg(test)]
#[path = "processes_tests.rs"]
mod tests;
