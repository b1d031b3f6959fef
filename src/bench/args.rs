//! What to measure: the command line.

use clap::ValueEnum;

/// Measures throughput and latency, closed loop.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Whose API to speak
    #[arg(long, value_enum, default_value_t = TargetKind::Tombolo)]
    pub target: TargetKind,
    /// Nodes of one region, or members of etcd, host:port; separate by commas
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', default_value = "127.0.0.1:7101")]
    pub endpoints: Vec<String>,
    /// Calls under way at a time
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub clients: u32,
    /// HTTP/2 connections in all, at most one a client
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub connections: u32,
    /// What the clients do
    #[arg(long, value_enum, default_value_t = OperationKind::Put)]
    pub op: OperationKind,
    /// With --op mixed: share of gets, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub reads: u32,
    /// Size of a value
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=1_048_576))]
    pub value_bytes: u32,
    /// Different keys, each as likely
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub keys: u64,
    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
    /// How long to run before measuring
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub warmup: u32,
    /// Namespace of the keys; Tombolo only
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub namespace: String,
    /// Which members of etcd to ask: its leader spares a hop, all of them share the work
    #[arg(long, value_enum, default_value_t = EtcdMembers::Leader)]
    pub etcd_members: EtcdMembers,
    /// Processes on this machine whose CPU time to count; separate by commas
    #[arg(long, value_name = "PID", value_delimiter = ',')]
    pub server_pids: Vec<u32>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
}

/// Whose API to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TargetKind {
    /// Tombolo; each call goes to the leader of the key's shard
    Tombolo,
    /// etcd, v3 API
    Etcd,
}

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OperationKind {
    /// Overwrite random keys
    Put,
    /// Read random keys, linearizable
    Get,
    /// Both, in the proportion of --reads
    Mixed,
}

/// Which members of etcd get connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EtcdMembers {
    /// The one that leads
    Leader,
    /// All, in turn
    All,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Lines for people
    Table,
    /// One JSON document
    Json,
}

impl TargetKind {
    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tombolo => "tombolo",
            Self::Etcd => "etcd",
        }
    }
}

impl OperationKind {
    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Mixed => "mixed",
        }
    }
}

impl BenchArgs {
    /// Share of gets, in percent.
    pub(crate) fn reads_percent(&self) -> u32 {
        match self.op {
            OperationKind::Put => 0,
            OperationKind::Get => 100,
            OperationKind::Mixed => self.reads,
        }
    }

    /// Connections that can be busy.
    pub(crate) fn connections_max(&self) -> usize {
        self.connections.min(self.clients) as usize
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchArgs,
    }

    pub(crate) fn parse(line: &str) -> Result<BenchArgs, clap::Error> {
        let words = std::iter::once("bench").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.args)
    }

    #[test]
    fn defaults_are_those_that_the_documentation_names() {
        let args = parse("").unwrap();
        assert_eq!((args.clients, args.connections, args.keys), (64, 16, 10_000));
        assert_eq!((args.value_bytes, args.seconds, args.warmup), (256, 10, 2));
        assert_eq!((args.target, args.op), (TargetKind::Tombolo, OperationKind::Put));
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        for line in ["--clients 0", "--keys 0", "--connections 0", "--reads 101", "--seconds 0"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn one_client_opens_one_connection() {
        assert_eq!(parse("--clients 1").unwrap().connections_max(), 1);
        assert_eq!(parse("--clients 256").unwrap().connections_max(), 16);
    }
}
