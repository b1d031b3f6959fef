//! Compiles the protocol files without `protoc` and keeps the descriptors for reflection.

use std::path::PathBuf;

const PUBLIC: [&str; 7] = [
    "tombolo/v1/types.proto",
    "tombolo/v1/kv.proto",
    "tombolo/v1/watch.proto",
    "tombolo/v1/cluster.proto",
    "tombolo/v1/region.proto",
    "tombolo/v1/namespace.proto",
    "tombolo/v1/conflict.proto",
];
const INTERNAL: [&str; 3] = [
    "tombolo/internal/v1/raft.proto",
    "tombolo/internal/v1/node.proto",
    "tombolo/internal/v1/link.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=tombolo");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);

    let public = protox::compile(PUBLIC, ["."])?;
    std::fs::write(out.join("public.bin"), prost::Message::encode_to_vec(&public))?;
    tonic_prost_build::configure().bytes(".").compile_fds(public)?;

    let internal = protox::compile(INTERNAL, ["."])?;
    tonic_prost_build::configure().bytes(".").compile_fds(internal)?;
    Ok(())
}
