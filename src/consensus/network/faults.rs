//! Cuts this node off from chosen peers, in both directions: a partition for tests.
//!
//! Sits at the edge of the network layer, so that everything above behaves as on a real cut:
//! requests fail, streams break, answers that are under way are lost. Costs one atomic load per
//! message while nothing is cut. Can also break snapshot transfers after some chunks.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;
use tonic::Status;

/// The peers that this node is cut from, and when its next snapshot transfers break.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    any: AtomicBool,
    cut: RwLock<BTreeSet<u64>>,
    /// Chunks until a transfer breaks; 0 when none will.
    chunks_left: AtomicU64,
    chunks_sent: AtomicU64,
}

impl Faults {
    /// Replaces the set of peers that this node is cut from.
    pub(crate) fn set(&self, peers: BTreeSet<u64>) {
        let any = !peers.is_empty();
        *self.cut.write() = peers;
        self.any.store(any, Ordering::Release);
    }

    pub(crate) fn is_cut(&self, peer: u64) -> bool {
        self.any.load(Ordering::Acquire) && self.cut.read().contains(&peer)
    }

    /// Refuses a message from or to a peer that this node is cut from.
    pub(crate) fn check(&self, peer: u64) -> Result<(), Status> {
        if self.is_cut(peer) {
            return Err(Status::unavailable("cut off"));
        }
        Ok(())
    }

    /// Breaks a snapshot transfer, once, after this many chunks.
    pub(crate) fn break_transfer_after(&self, chunks: u64) {
        self.chunks_left.store(chunks, Ordering::Release);
    }

    /// Counts a chunk; false if the transfer breaks here.
    pub(crate) fn pass_chunk(&self) -> bool {
        self.chunks_sent.fetch_add(1, Ordering::Relaxed);
        let left = self.chunks_left.load(Ordering::Acquire);
        if 0 < left {
            self.chunks_left.store(left - 1, Ordering::Release);
        }
        left != 1
    }

    pub(crate) fn chunks_sent(&self) -> u64 {
        self.chunks_sent.load(Ordering::Relaxed)
    }
}
