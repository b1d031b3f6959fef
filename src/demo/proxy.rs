//! The fault proxy: carries TCP connections from one region to another, late or not at all.
//!
//! A connection crosses two [`Direction`]s: what its client sends takes the one *there*, what
//! comes back takes the one *back*. Each has a delay and a [`Mode`], and both may change while
//! the connection lives, so half-open links and lopsided latencies need nothing special.
//!
//! A chunk of bytes that was read is put in a queue with the instant at which it is due. So delay
//! does not cost bandwidth: many chunks are under way at once, as on a real line.
//!
//! Invariants:
//! * Bytes of a connection arrive in order, also when the delay shrinks while some are queued.
//! * A connection queues at most [`QUEUE_BYTES`] in each direction, counting overhead. Beyond
//!   that the proxy stops reading and the sender feels it, as with a full window.
//! * After a cut ends no connection that it touched survives: all are reset, so that both ends
//!   learn it at once and connect again. A cut never tears or reorders a byte stream.
//!
//! Not here: which directions exist and which verbs change them (`network`). Establishing a
//! connection takes no simulated time: the first bytes pay the delay, the handshake does not.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Most bytes that a connection holds in one direction, overhead included. At a one-way delay of
/// 40 ms that is 100 MB/s.
pub const QUEUE_BYTES: u32 = 4 << 20;

const CHUNK_BYTES: u32 = 64 << 10;
/// Charged for a chunk's place in the queue, so that a flood of tiny chunks is bounded too.
const CHUNK_OVERHEAD: u32 = 256;
/// What a connection that waits behind a cut may send before the proxy stops reading it.
const HELD_BYTES: usize = 64 << 10;
/// Pause after a failed accept: the usual cause is a lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// What happens to the bytes of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// They arrive after the delay.
    Pass,
    /// They go nowhere and nobody is told, as when a cable is cut.
    Blackhole,
    /// Connections are reset at once, old and new, as when a firewall rejects them.
    Reset,
}

#[derive(Clone, Copy, Debug)]
struct Settings {
    delay: Duration,
    mode: Mode,
    /// Goes up when all present connections must end.
    epoch: u64,
}

/// One direction between two regions. A clone is a handle on the same direction.
#[derive(Clone, Debug)]
pub struct Direction(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    settings: watch::Sender<Settings>,
    delivered: AtomicU64,
    queued: AtomicU64,
    connections: AtomicU64,
}

impl Direction {
    /// A direction that passes everything with this one-way delay.
    #[must_use]
    pub fn new(delay: Duration) -> Self {
        Self(Arc::new(Shared {
            settings: watch::Sender::new(Settings { delay, mode: Mode::Pass, epoch: 0 }),
            delivered: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        }))
    }

    /// Changes the one-way delay of what is sent from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.0.settings.send_modify(|settings| settings.delay = delay);
    }

    /// Changes the mode; [`Mode::Blackhole`] stalls present connections, the others end them.
    pub fn set_mode(&self, mode: Mode) {
        self.0.settings.send_if_modified(|settings| {
            if settings.mode == mode {
                return false;
            }
            settings.mode = mode;
            if mode != Mode::Blackhole {
                settings.epoch += 1;
            }
            true
        });
    }

    /// The present one-way delay.
    #[must_use]
    pub fn delay(&self) -> Duration {
        self.0.settings.borrow().delay
    }

    /// The present mode.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.0.settings.borrow().mode
    }

    /// Bytes delivered since the start.
    #[must_use]
    pub fn delivered_bytes(&self) -> u64 {
        self.0.delivered.load(Ordering::Relaxed)
    }

    /// Bytes under way now.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        self.0.queued.load(Ordering::Relaxed)
    }

    /// Open connections whose clients are at the start of this direction.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.0.connections.load(Ordering::Relaxed)
    }

    fn watch(&self) -> Watch {
        let mut changes = self.0.settings.subscribe();
        let epoch = changes.borrow_and_update().epoch;
        Watch { changes, epoch }
    }
}

/// A direction as one connection sees it.
#[derive(Clone)]
struct Watch {
    changes: watch::Receiver<Settings>,
    /// When the connection began.
    epoch: u64,
}

impl Watch {
    fn mode(&self) -> Mode {
        self.changes.borrow().mode
    }

    fn delay(&self) -> Duration {
        self.changes.borrow().delay
    }

    /// Returns when bytes may pass.
    async fn passable(&mut self) {
        if self.changes.wait_for(|settings| settings.mode == Mode::Pass).await.is_err() {
            // The direction is gone; whoever dropped it ends the connection too.
            std::future::pending::<()>().await;
        }
    }

    /// Returns when this connection must end.
    async fn ended(&mut self) {
        let begun = self.epoch;
        if self.changes.wait_for(|settings| settings.epoch != begun).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Carries every connection that `listener` accepts to `target`, until `shutdown` fires.
///
/// On shutdown the listener closes and all connections are reset. Memory is bounded per
/// connection; the number of connections is that of the callers.
pub async fn serve(
    listener: TcpListener,
    target: SocketAddr,
    there: Direction,
    back: Direction,
    shutdown: CancellationToken,
) {
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((near, _)) => {
                let (there, back, shutdown) = (there.clone(), back.clone(), shutdown.clone());
                connections.spawn(async move {
                    there.0.connections.fetch_add(1, Ordering::Relaxed);
                    tokio::select! {
                        () = shutdown.cancelled() => {}
                        () = carry(near, target, &there, &back) => {}
                    }
                    there.0.connections.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Err(error) => {
                tracing::warn!(%error, %target, "accepting a connection failed, will retry");
                shutdown.run_until_cancelled(tokio::time::sleep(ACCEPT_RETRY)).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

/// Carries one connection until it ends or a cut ends it.
async fn carry(mut near: TcpStream, target: SocketAddr, there: &Direction, back: &Direction) {
    // Before the first look at a mode, so that no change falls in between.
    let (mut there_end, mut back_end) = (there.watch(), back.watch());
    let modes = [there_end.mode(), back_end.mode()];
    let mut far = None;
    let ended_cleanly = tokio::select! {
        () = there_end.ended() => false,
        () = back_end.ended() => false,
        clean = async {
            if modes.contains(&Mode::Reset) {
                return false;
            }
            if modes.contains(&Mode::Blackhole) {
                return hold(&mut near).await;
            }
            let Ok(connected) = TcpStream::connect(target).await else { return false };
            exchange(&mut near, far.insert(connected), there, back).await.is_ok()
        } => clean,
    };
    if !ended_cleanly {
        // Failing here means that the socket is closed already.
        near.set_zero_linger().ok();
        if let Some(far) = far {
            far.set_zero_linger().ok();
        }
    }
}

/// Keeps a connection that nothing answers; returns when its client closes it.
async fn hold(near: &mut TcpStream) -> bool {
    let mut scratch = vec![0; 4096];
    let mut held = 0;
    while held < HELD_BYTES {
        match near.read(&mut scratch).await {
            Ok(0) => return true,
            Ok(read) => held += read,
            Err(_) => return false,
        }
    }
    std::future::pending().await
}

async fn exchange(
    near: &mut TcpStream,
    far: &mut TcpStream,
    there: &Direction,
    back: &Direction,
) -> io::Result<()> {
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (near_read, near_write) = near.split();
    let (far_read, far_write) = far.split();
    tokio::try_join!(pump(near_read, far_write, there), pump(far_read, near_write, back))?;
    Ok(())
}

/// Bytes under way; no bytes means that the sender has closed its side.
struct Chunk {
    due: Instant,
    bytes: Bytes,
    place: Place,
}

/// A chunk's share of the queue, given back on drop.
struct Place {
    _permit: OwnedSemaphorePermit,
    direction: Direction,
    bytes: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.direction.0.queued.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Moves bytes of one connection in one direction until the sender closes its side.
async fn pump(from: ReadHalf<'_>, to: WriteHalf<'_>, direction: &Direction) -> io::Result<()> {
    // Bounded by bytes through the permits that the chunks carry.
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::try_join!(take_in(from, sender, direction), give_out(to, receiver, direction))?;
    Ok(())
}

async fn take_in(
    mut from: ReadHalf<'_>,
    queue: mpsc::UnboundedSender<Chunk>,
    direction: &Direction,
) -> io::Result<()> {
    let watch = direction.watch();
    let budget = Arc::new(Semaphore::new(QUEUE_BYTES as usize));
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    loop {
        // Taken for a full chunk before reading, so that nothing is read that has no place.
        let Ok(mut permit) =
            Arc::clone(&budget).acquire_many_owned(CHUNK_BYTES + CHUNK_OVERHEAD).await
        else {
            return Ok(());
        };
        let read = from.read(&mut buffer).await?;
        drop(permit.split(buffer.len() - read));
        let bytes = read as u64;
        direction.0.queued.fetch_add(bytes, Ordering::Relaxed);
        let place = Place { _permit: permit, direction: direction.clone(), bytes };
        let chunk = Chunk {
            due: Instant::now() + watch.delay(),
            bytes: Bytes::copy_from_slice(&buffer[..read]),
            place,
        };
        if queue.send(chunk).is_err() || read == 0 {
            return Ok(());
        }
    }
}

async fn give_out(
    mut to: WriteHalf<'_>,
    mut queue: mpsc::UnboundedReceiver<Chunk>,
    direction: &Direction,
) -> io::Result<()> {
    let mut watch = direction.watch();
    while let Some(Chunk { due, bytes, place }) = queue.recv().await {
        tokio::time::sleep_until(due).await;
        watch.passable().await;
        if bytes.is_empty() {
            return to.shutdown().await;
        }
        to.write_all(&bytes).await?;
        direction.0.delivered.fetch_add(place.bytes, Ordering::Relaxed);
    }
    Ok(())
}

#[cfg(test)]
#[path = "proxy_tests.rs"]
mod tests;
