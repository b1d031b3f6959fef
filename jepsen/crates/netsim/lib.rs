//! A network for real processes: namespaces, one TUN device in each, and a switch between them.
//!
//! Every process runs in a network namespace whose only way out is a TUN device. This process reads
//! and writes the IP packets of all devices, so every fault of the network is an entry of a table:
//! per direction, effective at the next packet, and counted.
//!
//! Invariants:
//! * Packets go between the namespaces of one [`Switch`] and nowhere else.
//! * Namespaces have no names. They and their devices are gone when this process and those in them
//!   are, however they end.
//! * Two packets that take the same direction never overtake each other.
//! * What is queued for later is bounded; what does not fit is dropped and counted.
//!
//! Map: `link` the table · `packet` what is read of a packet · `queue` packets under way · `tun`
//! namespaces and devices, all system calls · `switch` the loop.
//!
//! Not here: which directions to cut and when (the harness).

mod link;
mod packet;
mod queue;
mod switch;
mod tun;

pub use link::{Counters, HostId, Links};
pub use switch::Switch;
pub use tun::{Namespace, enter_path, obstacle};
