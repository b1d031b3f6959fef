//! A running demo: its network and its processes, and the verbs on them.
//!
//! The order of a start is: layout, proxies (their addresses go into the configurations), config
//! files, processes. [`Demo::stop`] goes the other way.
//!
//! Not here: how verbs arrive (`control`), what is printed (`report`), when to stop (`lib`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::control::{Handler, NodeStatus, Reply, Request, Status};
use crate::latency::{Latencies, LatencyError, MAX_ROUND_TRIP};
use crate::layout::{Layout, LayoutError, NodePlan, Proxies, Wanted};
use crate::network::{Network, NetworkError};
use crate::processes::{Fleet, Launch, ProcessError};
use crate::readiness::{NotReady, wait_ready};

/// A node that has not stopped this long after SIGTERM is killed. Above the drain time in its
/// configuration.
pub const STOP_GRACE: Duration = Duration::from_secs(8);

/// How long nodes may take from start to ready.
pub const READY_PATIENCE: Duration = Duration::from_secs(60);

/// What to start.
#[derive(Clone, Debug)]
pub struct DemoConfig {
    /// Exists and is absolute.
    pub data_dir: PathBuf,
    /// Regions, nodes, shards, ports.
    pub wanted: Wanted,
    /// Round trips between the regions.
    pub latencies: Latencies,
    /// The executable; run as `PROGRAM server --config FILE`.
    pub program: PathBuf,
}

/// Why a demo did not start or a verb was not carried out; each kind names its remedy.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// See [`LayoutError`].
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// See [`LatencyError`].
    #[error(transparent)]
    Latency(#[from] LatencyError),
    /// See [`NetworkError`].
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// See [`ProcessError`].
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// See [`NotReady`].
    #[error(transparent)]
    NotReady(#[from] NotReady),
    /// The system refused a socket or a thread.
    #[error("cannot set up the network between the regions: {0}")]
    System(#[from] std::io::Error),
}

/// Regions as groups of child processes, with a faulty network between them.
///
/// Dropping it kills every process and connection; [`Demo::stop`] does it gently.
#[derive(Debug)]
pub struct Demo {
    layout: Layout,
    network: Network,
    fleet: Fleet,
    program: PathBuf,
    begun: Instant,
}

impl Demo {
    /// Starts everything without waiting for it. Call inside a tokio runtime.
    ///
    /// # Errors
    /// [`DemoError`]; nothing is left running then.
    pub async fn launch(config: DemoConfig) -> Result<Self, DemoError> {
        let layout = Layout::decide(&config.data_dir, &config.wanted)?;
        config.latencies.check(&layout.shape.regions)?;
        let network = Network::new(&layout.shape.regions, &config.latencies);
        let mut proxies = Proxies::new();
        for from in &layout.shape.regions {
            for node in layout.nodes.iter().filter(|node| node.region != *from) {
                let address = network.open(from, &node.region, node.link).await?;
                proxies.entry((from.clone(), node.region.clone())).or_default().push(address);
            }
        }
        layout.write_configs(&proxies)?;
        let fleet = Fleet::new(launches(&layout, &config.program))?;
        let program = config.program;
        let demo = Self { layout, network, fleet, program, begun: Instant::now() };
        demo.fleet.start_all().await?;
        Ok(demo)
    }

    /// Names, ports and paths.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The network between the regions.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The executable of the nodes.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// The node processes.
    #[must_use]
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// Returns when every node is ready.
    ///
    /// # Errors
    /// [`NotReady`], at once when a node's process ends and otherwise after `patience`.
    pub async fn wait_ready(&self, patience: Duration) -> Result<(), NotReady> {
        wait_ready(&self.fleet, &self.layout.nodes.iter().collect::<Vec<_>>(), patience).await
    }

    /// Stops a node if it runs, starts it, and waits until it is ready.
    ///
    /// # Errors
    /// [`DemoError::Process`] and [`DemoError::NotReady`].
    pub async fn restart(&self, name: &str) -> Result<(), DemoError> {
        if self.fleet.state(name)?.pid().is_some() {
            match self.fleet.stop_one(name, STOP_GRACE).await {
                // It ended in the meantime.
                Ok(()) | Err(ProcessError::WrongState { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.fleet.start(name).await?;
        let nodes: Vec<&NodePlan> =
            self.layout.nodes.iter().filter(|node| node.name == name).collect();
        Ok(wait_ready(&self.fleet, &nodes, READY_PATIENCE).await?)
    }

    /// What runs and what is cut.
    #[must_use]
    pub fn status(&self) -> Status {
        let nodes = self.layout.nodes.iter().map(|node| {
            let state = self.fleet.state(&node.name).ok();
            NodeStatus {
                name: node.name.clone(),
                state: state.as_ref().map_or("down", |state| state.word()).into(),
                pid: state.and_then(|state| state.pid()),
                client: node.client.to_string(),
            }
        });
        Status {
            cluster_id: self.layout.shape.cluster_id.clone(),
            data_dir: self.layout.data_dir.display().to_string(),
            up_seconds: self.begun.elapsed().as_secs(),
            nodes: nodes.collect(),
            network: self.network.status(),
        }
    }

    /// Stops all processes, then the network. No process is left after.
    pub async fn stop(&self) {
        self.fleet.stop(STOP_GRACE).await;
        self.network.close().await;
    }

    async fn carry_out(&self, request: Request) -> Result<Reply, DemoError> {
        let message = match request {
            Request::Status => return Ok(Reply::Status(self.status())),
            Request::Partition { a, b, cut } => {
                self.network.partition(&a, &b, cut)?;
                let direction = if cut.one_way { "cannot reach" } else { "is cut from" };
                format!("{a} {direction} {b}")
            }
            Request::Isolate { region, cut } => {
                self.network.isolate(&region, cut)?;
                format!("{region} is cut from all other regions")
            }
            Request::Heal => {
                self.network.heal();
                "all regions reach each other".into()
            }
            Request::Kill { node } => {
                self.fleet.kill(&node).await?;
                format!("{node} is killed")
            }
            Request::Restart { node } => {
                self.restart(&node).await?;
                format!("{node} is ready")
            }
            Request::Pause { node } => {
                self.fleet.pause(&node).await?;
                format!("{node} is paused")
            }
            Request::Resume { node } => {
                self.fleet.resume(&node).await?;
                format!("{node} goes on")
            }
            Request::Latency { a, b, round_trip_ms } => {
                let round_trip = Duration::from_millis(round_trip_ms).min(MAX_ROUND_TRIP);
                self.network.set_latency(&a, &b, round_trip)?;
                format!("a round trip between {a} and {b} takes {round_trip:?}")
            }
            // Answered by the control socket itself, before anything stops.
            Request::Stop => "the demo is stopping".into(),
        };
        Ok(Reply::Done { message })
    }
}

/// How the nodes of a layout are started.
pub(crate) fn launches(layout: &Layout, program: &Path) -> Vec<Launch> {
    let launch = |node: &NodePlan| Launch {
        name: node.name.clone(),
        program: program.to_owned(),
        arguments: vec![
            "server".into(),
            "--config".into(),
            node.config_path().to_string_lossy().into_owned(),
        ],
        log: node.log_path(),
    };
    layout.nodes.iter().map(launch).collect()
}

impl Handler for Demo {
    async fn handle(&self, request: Request) -> Reply {
        match self.carry_out(request).await {
            Ok(reply) => reply,
            Err(error) => Reply::Error { message: error.to_string() },
        }
    }
}

/// Makes a data directory absolute and sure to exist.
///
/// # Errors
/// The system's.
pub fn prepare_data_dir(path: &Path) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(path)?;
    path.canonicalize()
}
