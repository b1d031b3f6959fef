//! Starting child processes that cannot outlive this process.
//!
//! Linux sends a child the signal of `PR_SET_PDEATHSIG` when the *thread* that created it ends,
//! not when the process does. So one thread creates all children and lives as long as the
//! [`Spawner`]: threads of the runtime come and go.
//!
//! Invariants:
//! * When this process ends in any way, `kill -9` included, the kernel kills every child, paused
//!   ones too. Dropping the [`Spawner`] does the same. (Linux; elsewhere children are killed by
//!   their owner's drop only.)
//! * A child leads its own process group, so that Ctrl-C in a terminal reaches this process only,
//!   which then stops the children in order.
//!
//! Not here: what is started and what its exit means (`processes`).

use std::io;

use tokio::process::{Child, Command};
use tokio::sync::oneshot;

type Request = (Command, oneshot::Sender<io::Result<Child>>);

/// Creates children; see the module.
#[derive(Debug)]
pub(crate) struct Spawner {
    requests: std::sync::mpsc::Sender<Request>,
}

impl Spawner {
    /// Starts the thread. Call inside a tokio runtime.
    pub(crate) fn new() -> io::Result<Self> {
        let (requests, incoming) = std::sync::mpsc::channel::<Request>();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new().name("spawner".into()).spawn(move || {
            let _context = runtime.enter();
            for (mut command, reply) in incoming {
                // An unwanted child is killed by its drop.
                reply.send(command.spawn()).ok();
            }
        })?;
        Ok(Self { requests })
    }

    /// Starts `command` as a child that dies with this process.
    ///
    /// If the future is dropped the child is killed as soon as it exists.
    pub(crate) async fn spawn(&self, mut command: Command) -> io::Result<Child> {
        command.kill_on_drop(true).process_group(0);
        die_with_parent(&mut command);
        let gone = || io::Error::other("the thread that starts processes is gone");
        let (reply, answer) = oneshot::channel();
        self.requests.send((command, reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "only the child itself can ask for a signal on its parent's death")]
fn die_with_parent(command: &mut Command) {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    let parent = rustix::process::getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() == Some(parent) {
            return Ok(());
        }
        // The parent died before the request: no signal will come.
        Err(io::Error::from(rustix::io::Errno::SRCH))
    };
    // SAFETY: `ask` runs between fork and exec, where only async-signal-safe work is allowed. It
    // makes two system calls and neither allocates nor takes a lock.
    unsafe { command.pre_exec(ask) };
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_: &mut Command) {}
