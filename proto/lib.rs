//! The wire contract: messages and stubs generated from `proto/`, and nothing else.
//!
//! [`v1`] is for users and follows semver; [`internal`] is spoken between our own nodes.

#![allow(clippy::all, missing_docs, reason = "generated code")]

/// The public interface.
pub mod v1 {
    tonic::include_proto!("tombolo.v1");

    /// Encoded file descriptors of this package, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/public.bin"));
}

/// Between nodes and regions.
pub mod internal {
    /// The only version so far.
    pub mod v1 {
        tonic::include_proto!("tombolo.internal.v1");
    }
}
