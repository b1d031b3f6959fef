//! The load generator by itself, without a server in the same program:
//! `cargo run -p tombolo-bench --example load -- --target etcd --endpoints 127.0.0.1:2379`

use clap::Parser;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: tombolo_bench::BenchArgs,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tombolo_bench::run(Cli::parse().args, &mut std::io::stdout()).await
}
