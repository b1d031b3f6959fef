//! Repair between regions: what `tombolo_core::repair` decides, over the network.
//!
//! The receiver is the leader of a shard, the source the leader in another region. Two round trips,
//! then data: the middle level of the trees, the digests in the leaves that differ, the records.
//! Everything is paged by bytes, read from pinned cuts on both sides, and merged through Raft in
//! small entries with rests between them, so that local writes go first.
//!
//! A repair that breaks off is simply begun again: what was merged is equal by then, and is not
//! exchanged a second time.
//!
//! Not here: when to repair (`puller`).

pub(crate) mod comparer;
pub(crate) mod receiver;
pub(crate) mod source;

use std::{collections::BTreeSet, io, sync::Arc, thread};

use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
};
use tombolo_core::{NamespaceId, merkle::Block};

/// One repair of a namespace at a time, whoever it is from, and no stream applies changes to it
/// meanwhile: they would make the comparison void.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    repairing: Arc<watch::Sender<BTreeSet<NamespaceId>>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { repairing: Arc::new(watch::Sender::new(BTreeSet::new())) }
    }
}

impl Gate {
    /// Begins a repair, unless there is one.
    pub(crate) fn enter(&self, namespace: NamespaceId) -> Option<Pass> {
        let entered = self.repairing.send_if_modified(|repairing| repairing.insert(namespace));
        entered.then(|| Pass { gate: self.clone(), namespace })
    }

    /// Whether a namespace is being repaired.
    pub(crate) fn is_closed(&self, namespace: NamespaceId) -> bool {
        self.repairing.borrow().contains(&namespace)
    }

    /// Changes when a repair begins or ends.
    pub(crate) fn watch(&self) -> watch::Receiver<BTreeSet<NamespaceId>> {
        self.repairing.subscribe()
    }
}

/// The right to repair a namespace; dropping it ends the repair.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Gate,
    namespace: NamespaceId,
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.repairing.send_modify(|repairing| {
            repairing.remove(&self.namespace);
        });
    }
}

/// Least of what the system gives a thread: nothing while others want the processor.
const NICENESS: i32 = 19;

/// Runs `work` on a thread of its own, which takes only what others leave of the processor. Answers what
/// tells when it has ended, be it by a panic.
///
/// # Errors
/// If the system has no thread left.
fn in_background(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<oneshot::Receiver<()>> {
    let (ended, end) = oneshot::channel();
    let runtime = Handle::current();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _entered = runtime.enter();
        // On Linux this is of the thread. Where it is refused, the work is merely less polite.
        let _ = rustix::process::nice(NICENESS);
        work();
        let _ = ended.send(());
    })?;
    Ok(end)
}

/// Nodes or leaves as they travel.
fn encode_block(block: &Block) -> bytes::Bytes {
    block.iter().flat_map(|digest| digest.to_le_bytes()).collect::<Vec<u8>>().into()
}

fn decode_block(bytes: &[u8]) -> Option<Block> {
    decode_digests(bytes)?.try_into().ok()
}

fn decode_digests(bytes: &[u8]) -> Option<Vec<u64>> {
    let (digests, []) = bytes.as_chunks::<8>() else { return None };
    Some(digests.iter().map(|digest| u64::from_le_bytes(*digest)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_repair_of_a_namespace_at_a_time() {
        let gate = Gate::default();
        let (one, other) = (NamespaceId(1), NamespaceId(2));
        let pass = gate.enter(one).unwrap();
        assert!(gate.enter(one).is_none());
        assert!(gate.enter(other).is_some(), "and it was dropped at once");
        assert!(gate.is_closed(one) && !gate.is_closed(other));
        drop(pass);
        assert!(gate.enter(one).is_some());
    }

    #[test]
    fn blocks_read_back_and_other_lengths_are_refused() {
        let mut block = [0; 256];
        block[7] = u64::MAX - 3;
        let bytes = encode_block(&block);
        assert_eq!(decode_block(&bytes), Some(block));
        assert_eq!(decode_block(&bytes[1..]), None);
        assert_eq!(decode_block(&bytes[8..]), None);
        assert_eq!(decode_digests(&[]), Some(Vec::new()));
    }
}
