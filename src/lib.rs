//! The Tombolo server: configuration, telemetry, and the node that starts every part.
//!
//! A file in `src/` is wiring; a folder in `src/` is a crate. This crate is the only place that
//! knows all of them.

pub mod cli;
mod clock_offset;
mod cluster_key;
pub mod config;
pub mod node;
mod scrape;
pub mod telemetry;
