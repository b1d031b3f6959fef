//! The loop that carries packets between namespaces.

use crate::link::{Fate, HostId, Links};
use crate::packet::addresses;
use crate::queue::Queue;
use crate::tun::{Namespace, wait_readable};
use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Packets read from one device before the others get their turn.
const BATCH: usize = 64;
const PACKET_BYTES_MAX: usize = 1 << 16;
/// How long the loop may sleep: bounds how long [`Switch`] takes to stop.
const PATIENCE: Duration = Duration::from_millis(100);

/// Carries packets between namespaces on a thread of its own. Dropping it stops the thread.
#[derive(Debug)]
pub struct Switch {
    links: Links,
    namespaces: Arc<Vec<Namespace>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    /// Connects namespaces: each is the host of its position.
    ///
    /// # Errors
    /// The system refused a thread.
    pub fn start(namespaces: Vec<Namespace>) -> io::Result<Self> {
        let links = Links::new(namespaces.len());
        let namespaces = Arc::new(namespaces);
        let stop = Arc::new(AtomicBool::new(false));
        let carrier = Carrier::new(Arc::clone(&namespaces), links.clone());
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("switch".into());
        let thread = Some(thread.spawn(move || carrier.run(&stopping))?);
        Ok(Self { links, namespaces, stop, thread })
    }

    /// The table of its directions.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// The namespace of a host.
    #[must_use]
    pub fn namespace(&self, host: HostId) -> &Namespace {
        &self.namespaces[host.0]
    }

    /// Whether the thread still carries packets. It ends early only when a device fails.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has said why it ended, if it panicked.
            thread.join().ok();
        }
    }
}

/// What the thread owns.
struct Carrier {
    namespaces: Arc<Vec<Namespace>>,
    descriptors: Vec<RawFd>,
    hosts: BTreeMap<Ipv4Addr, HostId>,
    links: Links,
    queue: Queue,
    buffer: Vec<u8>,
}

impl Carrier {
    fn new(namespaces: Arc<Vec<Namespace>>, links: Links) -> Self {
        Self {
            descriptors: namespaces.iter().map(Namespace::descriptor).collect(),
            hosts: namespaces.iter().map(Namespace::address).zip((0..).map(HostId)).collect(),
            queue: Queue::new(links.hosts()),
            buffer: vec![0; PACKET_BYTES_MAX],
            namespaces,
            links,
        }
    }

    fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let patience = self.queue.next_due(Instant::now()).unwrap_or(PATIENCE).min(PATIENCE);
            let Ok(readable) = wait_readable(&self.descriptors, patience) else { return };
            for (is_readable, host) in readable.into_iter().zip((0..).map(HostId)) {
                if is_readable && self.take_in(host).is_err() {
                    return;
                }
            }
            let now = Instant::now();
            while let Some(due) = self.queue.pop(now) {
                self.deliver(due.from, due.to, &due.packet);
            }
        }
    }

    fn take_in(&mut self, from: HostId) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..BATCH {
            let Some(length) = self.namespaces[from.0].receive(&mut buffer)? else { break };
            let packet = &buffer[..length];
            // What a kernel sends on its own, such as multicast, has no host here.
            let to = addresses(packet).and_then(|(_, to)| self.hosts.get(&to).copied());
            let Some(to) = to else { continue };
            let Fate::Pass(delay) = self.links.judge(from, to, length) else { continue };
            let now = Instant::now();
            if delay.is_zero() && !self.queue.holds(from, to) {
                self.deliver(from, to, packet);
            } else if !self.queue.push(from, to, now, delay, packet) {
                self.links.count_overflow(from, to);
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn deliver(&self, from: HostId, to: HostId, packet: &[u8]) {
        if !self.namespaces[to.0].send(packet) {
            self.links.count_overflow(from, to);
        }
    }
}
