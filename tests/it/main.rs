//! Clusters inside the test process: real nodes, real disks, real sockets on loopback.
//!
//! What needs whole processes (kill -9, partitions, the tour) is in `tests/tour.rs`.

mod bad_input;
mod clocks;
mod conflicts;
mod data;
mod link_status;
mod members;
mod once;
mod regions;
mod repair;
mod repair_cost;
mod sessions;
mod support;
mod typed;
mod watch;
