//! The command line: one binary for the server, the demo, the load generator and the user's
//! commands.

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use tombolo_commands::{DataCommand, Io};

use crate::{
    config::{self, Config, FlagValue, Loaded},
    node, telemetry,
};

/// A multi-master replicated key-value database.
#[derive(Debug, Parser)]
#[command(
    name = "tombolo",
    version,
    about,
    propagate_version = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one node.
    Server(ServerArgs),
    /// Start a multi-region cluster on this machine, or act on a running one.
    Demo(tombolo_demo::DemoArgs),
    /// Measure a cluster's throughput and latency.
    Bench(tombolo_bench::BenchArgs),
    /// Check, show or explain a server's configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    #[command(flatten)]
    Data(Box<DataCommand>),
}

/// Where a server's configuration comes from: defaults, then the file, then the environment
/// (`TOMBOLO__SECTION__KEY`), then `--set`, then the named flags.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// The configuration file (TOML).
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Set one key, as in `--set raft.lease_reads=true`. Repeatable.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Number of shards; fixed at the first start, the same in every region.
    #[arg(long, value_name = "NUMBER")]
    shards: Option<u16>,

    /// Where the node keeps its data.
    #[arg(long, value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check the configuration and say what is wrong with it.
    Check(ServerArgs),
    /// Show the configuration in effect.
    Show {
        #[command(flatten)]
        server: ServerArgs,
        /// Say where each value comes from.
        #[arg(long)]
        origin: bool,
    },
    /// Print a commented example with every key.
    Example,
}

impl ServerArgs {
    fn load(&self) -> Result<Loaded, config::ConfigError> {
        let mut flags = Vec::new();
        if let Some(shards) = self.shards {
            flags.push(FlagValue { flag: "--shards", key: "shards", value: shards.to_string() });
        }
        if let Some(dir) = &self.data_dir {
            let value = dir.display().to_string();
            flags.push(FlagValue { flag: "--data-dir", key: "data_dir", value });
        }
        Config::load(self.config.as_deref(), config::process_env(), &self.set, &flags)
    }
}

/// A wrong command line or configuration; clap uses the same.
const USAGE: u8 = 2;

/// Runs the process's command line.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Server(args) => server(&args),
        Command::Config(command) => configuration(command),
        Command::Demo(args) => run(async { tombolo_demo::run(args, &mut std::io::stdout()).await }),
        Command::Bench(args) => run(async {
            tombolo_bench::run(args, &mut std::io::stdout()).await?;
            Ok(ExitCode::SUCCESS)
        }),
        Command::Data(command) => run(async {
            Ok(tombolo_commands::run(*command, Cli::command(), Io::standard()).await.into())
        }),
    }
}

/// Runs a command that is a client of servers.
fn run(command: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done =
        runtime.context("starting the runtime").and_then(|runtime| runtime.block_on(command));
    done.unwrap_or_else(|error| fail(&format!("{error:#}"), ExitCode::FAILURE))
}

fn fail(message: &str, code: ExitCode) -> ExitCode {
    // Where standard error is gone there is nobody left to tell.
    let _ = writeln!(std::io::stderr(), "error: {message}");
    code
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn configuration(command: ConfigCommand) -> ExitCode {
    let (args, origin) = match &command {
        ConfigCommand::Example => return print(&Config::example()),
        ConfigCommand::Check(args) => (args, None),
        ConfigCommand::Show { server, origin } => (server, Some(*origin)),
    };
    match args.load() {
        Ok(loaded) => match origin {
            Some(origin) => print(&loaded.show(origin)),
            None => print("the configuration is valid\n"),
        },
        Err(error) => fail(&error.to_string(), ExitCode::from(USAGE)),
    }
}

fn server(args: &ServerArgs) -> ExitCode {
    let config = match args.load() {
        Ok(loaded) => loaded.config,
        Err(error) => return fail(&error.to_string(), ExitCode::from(USAGE)),
    };
    let telemetry = match telemetry::init(config.log.format, &config.log.filter) {
        Ok(telemetry) => telemetry,
        Err(error) => return fail(&error.to_string(), ExitCode::from(USAGE)),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("starting the runtime: {error}"), ExitCode::FAILURE),
    };
    let ended = runtime.block_on(node::run(config, telemetry));
    // Tasks that did not end within the drain's bound must not keep the process alive.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the node stopped");
            fail(&format!("{error:#}"), ExitCode::FAILURE)
        }
    }
}
