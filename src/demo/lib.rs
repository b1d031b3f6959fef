//! `tombolo demo`: a whole multi-region cluster on one machine, with faults on demand.
//!
//! Regions are groups of real server processes on loopback. Between regions every byte goes
//! through a proxy in this process, which adds latency and cuts. Other invocations of
//! `tombolo demo` act on a running demo over a unix socket; `--tour` drives the demo through the
//! promises of the database and verifies each.
//!
//! Invariants:
//! * No process is left behind: not on Ctrl-C, not on an error, not when this process is killed.
//! * A data directory that the caller named is kept; one made here is removed, unless something
//!   failed and its logs are wanted.
//!
//! Map: `layout` names, ports, configuration · `proxy` `network` `latency` the faulty network ·
//! `spawn` `processes` `readiness` the nodes · `demo` all of it as one thing · `control` `place`
//! reaching a running demo · `report` what is printed · `guest` a region that comes
//! later · `tour` the tour.
//!
//! Not here: the server, which runs as `server --config FILE` of the same executable.

pub mod control;
pub mod demo;
pub mod guest;
pub mod latency;
pub mod layout;
pub mod network;
pub mod place;
pub mod processes;
pub mod proxy;
pub mod readiness;
pub mod report;
mod spawn;
pub mod tour;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::control::{Reply, Request};
use crate::demo::{Demo, DemoConfig, READY_PATIENCE, prepare_data_dir};
use crate::latency::Latencies;
use crate::layout::Wanted;
use crate::network::Cut;
use crate::place::{Place, Running, write_json};

/// What the shell's convention gives for an end by Ctrl-C.
const INTERRUPTED: u8 = 130;
/// The exit code of a command line that makes no sense.
const USAGE: u8 = 2;

/// Start a multi-region cluster on this machine, or act on a running one.
#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DemoArgs {
    #[command(subcommand)]
    verb: Option<DemoVerb>,

    /// Region names, the catalog's home first [default: us,eu,ap].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    regions: Option<Vec<String>>,

    /// Nodes in each region [default: 3].
    #[arg(long, value_name = "NUMBER")]
    nodes: Option<u16>,

    /// Shards of the cluster [default: 4].
    #[arg(long, value_name = "NUMBER")]
    shards: Option<u16>,

    /// Round trips between regions: one for all pairs, and exceptions (40ms,us-eu=80ms).
    #[arg(long, value_name = "LATENCY", default_value = "40ms")]
    latency: Latencies,

    /// Keep data, configuration and logs here; a later start on it continues. Without it, a
    /// temporary directory. With a verb: which demo to act on.
    #[arg(long, value_name = "DIRECTORY", global = true)]
    data_dir: Option<PathBuf>,

    /// First port of the nodes, which take four each [default: 7101, or the next free block].
    #[arg(long, value_name = "PORT")]
    base_port: Option<u16>,

    /// Write this file, with endpoints and process ids as JSON, when every node is ready.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,

    /// Walk through replication, conflicts, partitions and crashes, verify each step, and stop.
    /// Exits with 0 only if every step was verified.
    #[arg(long)]
    tour: bool,

    /// How long the tour writes before and after a crash.
    #[arg(long, value_name = "SECONDS", default_value_t = 3, requires = "tour",
        value_parser = clap::value_parser!(u64).range(1..=600))]
    tour_load_seconds: u64,
}

/// What can be done with a running demo.
#[derive(Clone, Debug, Subcommand)]
enum DemoVerb {
    /// Show what runs and what is cut.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Cut two regions from each other.
    Partition {
        a: String,
        b: String,
        #[command(flatten)]
        cut: CutArgs,
    },
    /// Cut one region from all others.
    Isolate {
        region: String,
        #[command(flatten)]
        cut: CutArgs,
    },
    /// End all cuts.
    Heal,
    /// Kill a node with SIGKILL.
    Kill { node: String },
    /// Stop a node if it runs, start it, and wait until it is ready.
    Restart { node: String },
    /// Freeze a node.
    Pause { node: String },
    /// Let a frozen node go on.
    Resume { node: String },
    /// Set the round trip between two regions.
    Latency {
        a: String,
        b: String,
        /// For example 80ms.
        #[arg(value_parser = latency::parse_round_trip)]
        round_trip: Duration,
    },
    /// Stop everything.
    Stop,
}

#[derive(Clone, Copy, Debug, Args)]
struct CutArgs {
    /// Cut only what the first region sends.
    #[arg(long)]
    one_way: bool,
    /// Reset connections instead of letting them hang.
    #[arg(long)]
    reset: bool,
}

impl From<CutArgs> for Cut {
    fn from(args: CutArgs) -> Self {
        Self { one_way: args.one_way, reset: args.reset }
    }
}

impl DemoVerb {
    fn request(&self) -> Request {
        match self.clone() {
            Self::Status { .. } => Request::Status,
            Self::Partition { a, b, cut } => Request::Partition { a, b, cut: cut.into() },
            Self::Isolate { region, cut } => Request::Isolate { region, cut: cut.into() },
            Self::Heal => Request::Heal,
            Self::Kill { node } => Request::Kill { node },
            Self::Restart { node } => Request::Restart { node },
            Self::Pause { node } => Request::Pause { node },
            Self::Resume { node } => Request::Resume { node },
            Self::Latency { a, b, round_trip } => Request::Latency {
                a,
                b,
                round_trip_ms: u64::try_from(round_trip.as_millis()).unwrap_or(u64::MAX),
            },
            Self::Stop => Request::Stop,
        }
    }
}

/// What a demo takes from its surroundings.
#[derive(Clone, Debug)]
pub struct Environment {
    /// The server's executable, run as `PROGRAM server --config FILE`.
    pub program: PathBuf,
    /// Where running demos are found.
    pub place: Place,
}

/// Runs `tombolo demo` with this executable as the server; what people read goes to `out`.
///
/// Returns when the verb is carried out, the tour is over, or the demo was stopped by Ctrl-C,
/// SIGTERM, SIGHUP or `tombolo demo stop`. No process is left then. Call it on a multi-threaded
/// runtime; it takes over the handling of those signals.
///
/// # Errors
/// In words, for people: bad arguments, nodes that did not start, a verb that was refused.
pub async fn run(args: DemoArgs, out: &mut (dyn Write + Send)) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("finding this executable")?;
    let place = Place::of_user().context("the directory that tells where demos run")?;
    run_in(Environment { program, place }, args, out).await
}

/// [`run`] in given surroundings.
///
/// # Errors
/// As [`run`].
pub async fn run_in(
    environment: Environment,
    args: DemoArgs,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<ExitCode> {
    match &args.verb {
        Some(verb) => act(&environment.place, verb, args.data_dir.as_deref(), out).await,
        None => start(environment, &args, out).await,
    }
}

/// Sends a verb to a running demo.
async fn act(
    place: &Place,
    verb: &DemoVerb,
    data_dir: Option<&Path>,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<ExitCode> {
    let running = place.find(data_dir)?;
    let reply = match control::call(&running.control_socket, &verb.request()).await {
        Ok(reply) => reply,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound
            ) =>
        {
            bail!("the demo in {} does not run any more", running.data_dir.display())
        }
        Err(error) => {
            return Err(error)
                .with_context(|| format!("talking to the demo in {}", running.data_dir.display()));
        }
    };
    match (reply, verb) {
        (Reply::Status(status), DemoVerb::Status { json: true }) => {
            writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?;
        }
        (Reply::Status(status), _) => write!(out, "{}", report::status(&status))?,
        (Reply::Done { .. }, DemoVerb::Stop) => writeln!(out, "the demo has stopped")?,
        (Reply::Done { message }, _) => writeln!(out, "{message}")?,
        (Reply::Error { message }, _) => bail!(message),
    }
    Ok(ExitCode::SUCCESS)
}

/// The data directory, and what becomes of it.
enum DataDir {
    Given(PathBuf),
    Temporary(tempfile::TempDir),
}

impl DataDir {
    fn choose(given: Option<&Path>) -> anyhow::Result<Self> {
        match given {
            Some(path) => {
                let prepared = prepare_data_dir(path);
                Ok(Self::Given(prepared.with_context(|| path.display().to_string())?))
            }
            None => {
                let temporary = tempfile::Builder::new().prefix("tombolo-demo-").tempdir();
                Ok(Self::Temporary(temporary.context("a temporary data directory")?))
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Temporary(directory) => directory.path(),
        }
    }
}

/// Signals that end a demo.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal. Safe to drop.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

/// Starts a demo, serves it until it is to end, and stops it.
async fn start(
    environment: Environment,
    args: &DemoArgs,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<ExitCode> {
    let wanted = Wanted {
        regions: args.regions.clone(),
        nodes: args.nodes,
        shards: args.shards,
        base_port: args.base_port,
    };
    // Before there is a directory that would be left behind.
    if let Err(error) = wanted.check() {
        writeln!(std::io::stderr(), "error: {error}")?;
        return Ok(ExitCode::from(USAGE));
    }
    // First of all, so that no signal finds half a demo.
    let mut signals = Signals::new()?;
    if let Some(path) = &args.ready_file {
        remove_stale(path)?;
    }
    let data_dir = DataDir::choose(args.data_dir.as_deref())?;
    // Canonical, because it is how other invocations will name it.
    let data_path = data_dir.path().canonicalize()?;
    let place = &environment.place;
    let control_socket = place.control_socket(&data_path);
    // Before anything starts: it also keeps two demos out of one directory.
    let listener = control::bind(&control_socket)
        .await
        .with_context(|| format!("control socket {}", control_socket.display()))?;
    let config = DemoConfig {
        data_dir: data_path.clone(),
        wanted,
        latencies: args.latency.clone(),
        program: environment.program,
    };
    // Ends the connections of those who wait for the end, whichever way this function does.
    let stopped = CancellationToken::new();
    let _stopped = stopped.clone().drop_guard();
    let ended = match Demo::launch(config).await {
        Ok(demo) => {
            let demo = Arc::new(demo);
            let stop = CancellationToken::new();
            let control =
                control::serve(listener, Arc::clone(&demo), stop.clone(), stopped.clone());
            let control = tokio::spawn(control);
            let ended = tokio::select! {
                () = signals.next() => Ok(ExitCode::from(INTERRUPTED)),
                () = stop.cancelled() => Ok(ExitCode::SUCCESS),
                ended = drive(&demo, place, &control_socket, args, out) => ended,
            };
            stop.cancel();
            tokio::select! {
                () = demo.stop() => {}
                // Impatient: the end of this process kills what is left.
                () = signals.next() => {}
            }
            control.await.ok();
            ended
        }
        Err(error) => Err(error.into()),
    };
    place.withdraw(&data_path, &control_socket);
    if let Some(path) = &args.ready_file {
        remove_stale(path)?;
    }
    finish(data_dir, ended, args.tour, out)
}

/// Everything between the start of the processes and the order to stop them.
///
/// Returns only when the demo is to end by itself: after the tour, or on an error. Safe to drop.
async fn drive(
    demo: &Arc<Demo>,
    place: &Place,
    control_socket: &Path,
    args: &DemoArgs,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<ExitCode> {
    if args.tour
        && let Some(obstacle) = tour::obstacle(demo)
    {
        bail!(obstacle);
    }
    let shape = &demo.layout().shape;
    writeln!(
        out,
        "starting {} nodes in {} regions",
        demo.layout().nodes.len(),
        shape.regions.len()
    )?;
    demo.wait_ready(READY_PATIENCE).await?;
    let running = Running::describe(demo.layout(), demo.fleet(), control_socket);
    place.announce(&running)?;
    write!(out, "{}", report::welcome(demo.layout(), &running, args.data_dir.as_deref()))?;
    out.flush()?;
    if let Some(path) = &args.ready_file {
        write_json(path, &running).with_context(|| path.display().to_string())?;
    }
    if args.tour {
        writeln!(out)?;
        let load = Duration::from_secs(args.tour_load_seconds);
        let outcome = tour::run(Arc::clone(demo), load, out).await?;
        return Ok(if outcome.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let mut crashes = demo.fleet().crashes();
    let mut reported = 0;
    loop {
        let fresh: Vec<_> = crashes.borrow_and_update()[reported..].to_vec();
        for crash in &fresh {
            write!(out, "{}", report::crash(crash))?;
            writeln!(out, "`tombolo demo restart {}` brings it back", crash.name)?;
            out.flush()?;
        }
        reported += fresh.len();
        crashes.changed().await.context("the processes are no longer supervised")?;
    }
}

/// Decides what becomes of the data, and of the exit code.
fn finish(
    data_dir: DataDir,
    ended: anyhow::Result<ExitCode>,
    tour: bool,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<ExitCode> {
    let failed = match &ended {
        Ok(code) => tour && *code == ExitCode::FAILURE,
        Err(_) => true,
    };
    match data_dir {
        DataDir::Temporary(directory) if failed => {
            let kept = directory.keep();
            writeln!(out, "kept for inspection: {}", kept.display())?;
        }
        DataDir::Temporary(directory) => {
            let path = directory.path().display().to_string();
            directory.close().with_context(|| format!("removing {path}"))?;
        }
        DataDir::Given(_) => {}
    }
    ended
}

/// Removes a file of an earlier run, so that nobody takes it for this one's.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        demo: DemoArgs,
    }

    fn parse(text: &str) -> Result<DemoArgs, clap::Error> {
        Cli::try_parse_from(format!("demo {text}").split_whitespace()).map(|cli| cli.demo)
    }

    #[test]
    fn options_of_a_start_are_understood() {
        let args =
            parse("--regions us,eu --nodes 1 --latency 10ms,us-eu=80ms --tour --data-dir /d")
                .unwrap();

        assert_eq!(args.regions.unwrap(), ["us", "eu"]);
        assert_eq!(args.latency.between("eu", "us"), Duration::from_millis(80));
        assert!(args.tour && args.verb.is_none());
    }

    #[test]
    fn verbs_become_requests_and_take_a_data_directory() {
        let args = parse("partition us eu --one-way --data-dir /d").unwrap();
        assert_eq!(args.data_dir.as_deref(), Some(Path::new("/d")));
        assert_eq!(
            args.verb.unwrap().request(),
            Request::Partition {
                a: "us".into(),
                b: "eu".into(),
                cut: Cut { one_way: true, reset: false }
            }
        );

        let latency = parse("latency us eu 80ms").unwrap().verb.unwrap().request();
        assert_eq!(latency, Request::Latency { a: "us".into(), b: "eu".into(), round_trip_ms: 80 });
    }

    #[test]
    fn a_demo_that_cannot_be_is_refused_before_there_is_a_directory() {
        let region = |name: &str| Some(vec![name.to_owned(), name.to_owned()]);
        for wanted in [
            Wanted { nodes: Some(0), ..Wanted::default() },
            Wanted { nodes: Some(10), ..Wanted::default() },
            Wanted { shards: Some(0), ..Wanted::default() },
            Wanted { regions: region("us"), ..Wanted::default() },
        ] {
            assert!(wanted.check().is_err(), "{wanted:?}");
        }
        assert!(Wanted::default().check().is_ok());
    }

    #[test]
    fn bad_arguments_are_refused() {
        for text in [
            "--latency fast",
            "--nodes many",
            "--tour-load-seconds 0 --tour",
            "explode us-1",
            "partition us",
            "latency us eu 2h",
            "--nodes 3 heal",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
