//! `jepsen`: real clusters of real processes under real faults, and what their clients saw.
//!
//! One process is the network, the clients, the nemesis and the checker. It starts the server's
//! executable, one process a node, each in a network namespace of its own, and carries the packets
//! between them. Clients record what they ask and what they are told; checkers judge the record.
//!
//! Invariants:
//! * Clients attempt each operation once.
//! * A run is `valid` only if every fault proved its effect and every checker came to an end.
//! * Nothing is left behind: no process, namespace or device, whichever way this process ends.
//! * All traffic stays in the namespaces, or on loopback.
//!
//! Map: `plan` `suite` what to run · `net` `place` `cluster` the nodes and their network · `client`
//! `recorder` `workload` what clients do · `nemesis` the faults · `settle` the end of a run ·
//! `runner` `report` all of it as one thing · `doctor` what this machine can do.
//!
//! Not here: what is right and wrong (`tombolo-jepsen-check`).

mod client;
mod cluster;
mod doctor;
mod nemesis;
mod net;
mod place;
mod plan;
mod recorder;
mod report;
mod runner;
mod settle;
mod suite;
mod workload;

use crate::plan::{Nemesis, NetworkKind, Plan, Rule, Sabotage, Workload};
use crate::report::{RunReport, verdict_word};
use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use tokio::signal::unix::{SignalKind, signal};
use tombolo_jepsen_check::Verdict;

const INVALID: u8 = 1;
const UNKNOWN: u8 = 2;
/// What the shell's convention gives for an end by Ctrl-C.
const INTERRUPTED: u8 = 130;

/// Runs clusters under faults and checks what their clients saw.
///
/// Ends with 0 when every run is valid, with 1 when one is invalid, and with 2 when one is unknown.
#[derive(Debug, Parser)]
#[command(name = "jepsen")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Say what this machine can and cannot do.
    Doctor {
        #[command(flatten)]
        common: Common,
    },
    /// Do one run.
    Run {
        #[command(flatten)]
        common: Common,
        #[arg(long, value_enum)]
        workload: Workload,
        #[arg(long, value_enum, default_value = "none")]
        nemesis: Nemesis,
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=5))]
        regions: u8,
        /// Nodes in each region.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
        nodes: u16,
        /// How long clients act.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=86_400))]
        secs: u64,
        /// Rule of the namespace.
        #[arg(long, value_enum, default_value = "lww")]
        rule: Rule,
        /// Tell this lie, to see that it is found out: the run must be invalid.
        #[arg(long, value_enum)]
        sabotage: Option<Sabotage>,
    },
    /// Do a list of runs.
    Suite {
        #[arg(value_enum)]
        suite: Suite,
        #[command(flatten)]
        common: Common,
    },
    /// Check the history of an earlier run again.
    Check { dir: PathBuf },
    /// Become a program in a network namespace.
    #[command(hide = true)]
    Enter {
        namespace: PathBuf,
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Suite {
    /// At most ten minutes.
    Quick,
}

#[derive(Clone, Debug, Args)]
struct Common {
    /// The server's executable [default: `tombolo` beside this one].
    #[arg(long, value_name = "FILE")]
    server: Option<PathBuf>,
    /// Where runs leave their files, one directory each [default: a temporary directory].
    #[arg(long, value_name = "DIRECTORY", env = "TOMBOLO_JEPSEN_OUT")]
    out: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Round trip between regions, in milliseconds.
    #[arg(long, default_value_t = 60)]
    round_trip_ms: u64,
    /// Shards of the cluster.
    #[arg(long, default_value_t = 4)]
    shards: u16,
    /// What carries the packets [default: namespaces where they can be had].
    #[arg(long, value_enum)]
    network: Option<NetworkKind>,
}

impl Common {
    fn program(&self) -> anyhow::Result<PathBuf> {
        let program = match &self.server {
            Some(program) => program.clone(),
            None => std::env::current_exe().context("this executable")?.with_file_name("tombolo"),
        };
        program.canonicalize().with_context(|| format!("the server {}", program.display()))
    }

    /// A plan of which callers set the rest.
    fn plan(&self, out: &mut dyn Write) -> anyhow::Result<Plan> {
        let (best, obstacle) = doctor::network();
        let network = self.network.unwrap_or(best);
        if network == NetworkKind::LoopbackProxy {
            let why = obstacle.unwrap_or_else(|| "asked for".into());
            writeln!(out, "network: loopback proxy, no faults inside regions ({why})")?;
        }
        Ok(Plan {
            workload: Workload::Register,
            nemesis: Nemesis::None,
            rule: Rule::Lww,
            sabotage: None,
            network,
            regions: 2,
            nodes: 3,
            shards: self.shards,
            secs: 20,
            seed: self.seed,
            round_trip_ms: self.round_trip_ms,
            program: self.program()?,
        })
    }

    fn out(&self) -> anyhow::Result<PathBuf> {
        match &self.out {
            Some(out) => Ok(out.clone()),
            // Kept: it holds what a failure left.
            None => Ok(tempfile::Builder::new().prefix("jepsen-").tempdir()?.keep()),
        }
    }
}

fn main() -> ExitCode {
    match carry_out(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            // Nothing is left to do if even that fails.
            writeln!(std::io::stderr(), "jepsen: {error:#}").ok();
            ExitCode::from(UNKNOWN)
        }
    }
}

fn carry_out(verb: Verb) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match verb {
        Verb::Doctor { common } => {
            let program = common.program()?;
            let complete = doctor::examine(&program, &mut out)?;
            Ok(if complete { ExitCode::SUCCESS } else { ExitCode::from(UNKNOWN) })
        }
        Verb::Run { common, workload, nemesis, regions, nodes, secs, rule, sabotage } => {
            let base = common.plan(&mut out)?;
            let regions = usize::from(regions);
            let plan = Plan { workload, nemesis, regions, nodes, secs, rule, sabotage, ..base };
            run_all(&[plan], &common.out()?, true, &mut out)
        }
        Verb::Suite { suite: Suite::Quick, common } => {
            let plans = suite::quick(&common.plan(&mut out)?);
            run_all(&plans, &common.out()?, false, &mut out)
        }
        Verb::Check { dir } => {
            let (plan, report) = runner::check_again(&dir)?;
            writeln!(out, "{}  {}", verdict_word(report.verdict), plan.name())?;
            for finding in &report.findings {
                writeln!(out, "  {:?}: {}", finding.kind, finding.text)?;
            }
            Ok(exit_of(report.verdict))
        }
        Verb::Enter { namespace, program, arguments } => {
            tombolo_jepsen_netsim::enter_path(&namespace).context("entering the namespace")?;
            // Returns only if it failed.
            let error = std::process::Command::new(&program).args(arguments).exec();
            Err(error).with_context(|| program.display().to_string())
        }
    }
}

fn exit_of(verdict: Verdict) -> ExitCode {
    match verdict {
        Verdict::Valid => ExitCode::SUCCESS,
        Verdict::Invalid => ExitCode::from(INVALID),
        Verdict::Unknown => ExitCode::from(UNKNOWN),
    }
}

/// Does runs one after the other; all of them, also when one fails.
fn run_all(
    plans: &[Plan],
    dir: &Path,
    verbose: bool,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let begun = Instant::now();
    let mut worst = Verdict::Valid;
    writeln!(out, "files: {}", dir.display())?;
    for plan in plans {
        if let Some(obstacle) = plan.obstacle() {
            writeln!(out, "SKIPPED  {}: {obstacle}; that leaves the suite unknown", plan.name())?;
            worst = worst.max(Verdict::Unknown);
            continue;
        }
        let dir = dir.join(plan.name());
        if dir.exists() {
            std::fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
        let verdict = match runtime.block_on(interruptible(plan, &dir)) {
            Ok(None) => return Ok(ExitCode::from(INTERRUPTED)),
            Ok(Some(report)) => {
                let brief = report.accepted() == Verdict::Valid && !verbose;
                let text = if brief { report.summary() } else { report.text() };
                writeln!(out, "{}", text.trim_end())?;
                report.accepted()
            }
            Err(error) => {
                writeln!(out, "UNKNOWN  {}: the run broke off: {error:#}", plan.name())?;
                Verdict::Unknown
            }
        };
        worst = worst.max(verdict);
        out.flush()?;
    }
    let (count, word) = (plans.len(), verdict_word(worst));
    writeln!(out, "{word}: {count} runs in {} s", begun.elapsed().as_secs())?;
    Ok(exit_of(worst))
}

/// A run, or nothing when a signal ended it. Either way nothing of it is left.
async fn interruptible(plan: &Plan, dir: &Path) -> anyhow::Result<Option<RunReport>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // Dropping a run drops its cluster, which kills what it started.
    tokio::select! {
        report = runner::run(plan, dir) => Ok(Some(report?)),
        _ = interrupt.recv() => Ok(None),
        _ = terminate.recv() => Ok(None),
    }
}
