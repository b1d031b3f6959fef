//! Compiles the part of etcd's protocol that the load generator speaks, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let etcd = protox::compile(["etcd.proto"], ["proto"])?;
    // As for Tombolo's own protocol: payloads are shared, never copied.
    tonic_prost_build::configure().bytes(".").compile_fds(etcd)?;
    Ok(())
}
