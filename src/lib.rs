//! The Tombolo server.
