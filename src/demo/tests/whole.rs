//! A demo as a whole, with stand-ins for the server: what starts, what verbs do, what is left.
//!
//! A stand-in is this test executable again, started through a shell script. It reads the node's
//! configuration and serves `/readyz`, which is all that a demo asks of a server.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as loudly as tests")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use tombolo_demo::control::{Reply, Request, call};
use tombolo_demo::place::{Place, Running};
use tombolo_demo::{DemoArgs, Environment, run_in};

const PATIENCE: Duration = Duration::from_secs(60);
/// The configuration file of a stand-in.
const STAND_IN: &str = "DEMO_TEST_STAND_IN";
/// First port and directory of a demo that runs in a process of its own.
const OWN_PROCESS: &str = "DEMO_TEST_OWN_PROCESS";

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    demo: DemoArgs,
}

/// A directory with everything that a demo needs.
struct Ground {
    root: PathBuf,
    /// Each test has its own: a free port may be taken before a node binds it.
    base_port: u16,
}

impl Ground {
    fn new(root: &Path, base_port: u16) -> Self {
        let this = std::env::current_exe().unwrap();
        // The demo runs `PROGRAM server --config FILE`.
        let script = format!(
            "#!/bin/sh\n{STAND_IN}=\"$3\" exec '{}' stand_in_server --exact --nocapture\n",
            this.display()
        );
        let ground = Self { root: root.to_owned(), base_port };
        std::fs::write(ground.program(), script).unwrap();
        std::fs::set_permissions(ground.program(), std::fs::Permissions::from_mode(0o755)).unwrap();
        ground
    }

    fn program(&self) -> PathBuf {
        self.root.join("server.sh")
    }

    fn data_dir(&self) -> PathBuf {
        self.root.join("data")
    }

    fn ready_file(&self) -> PathBuf {
        self.root.join("ready.json")
    }

    fn environment(&self) -> Environment {
        let place = Place::at(self.root.join("runtime")).unwrap();
        Environment { program: self.program(), place }
    }

    fn args(&self, more: &str) -> DemoArgs {
        let own = format!("demo --data-dir {}", self.data_dir().display());
        Cli::try_parse_from(own.split(' ').chain(more.split_whitespace())).unwrap().demo
    }

    fn start_args(&self) -> DemoArgs {
        self.args(&format!(
            "--regions us,eu --nodes 2 --latency 2ms --base-port {} --ready-file {}",
            self.base_port,
            self.ready_file().display()
        ))
    }

    /// Runs a demo while `user` uses it and stops it; returns what it printed and what the user
    /// says.
    async fn run_while<T>(&self, user: impl Future<Output = T>) -> (String, T) {
        let mut out = Vec::new();
        let run = async {
            match run_in(self.environment(), self.start_args(), &mut out).await {
                Ok(code) => assert!(code == ExitCode::SUCCESS, "{code:?}"),
                Err(error) => panic!("{error:#}"),
            }
        };
        let both = async { tokio::join!(run, user) };
        let ((), said) = tokio::time::timeout(PATIENCE, both).await.unwrap();
        (String::from_utf8(out).unwrap(), said)
    }

    async fn ready(&self) -> Running {
        let begun = Instant::now();
        loop {
            if let Ok(bytes) = std::fs::read(self.ready_file()) {
                return serde_json::from_slice(&bytes).unwrap();
            }
            assert!(begun.elapsed() < PATIENCE, "not ready");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Whether a process exists and is no zombie.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn all_gone(running: &Running) -> bool {
    running.nodes.iter().all(|node| !is_alive(node.pid.unwrap()))
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn ask(running: &Running, request: Request) -> Reply {
    tokio::time::timeout(PATIENCE, call(&running.control_socket, &request)).await.unwrap().unwrap()
}

/// What a stand-in's child process does; nothing when run as a test.
#[test]
fn stand_in_server() {
    let Some(path) = std::env::var_os(STAND_IN) else { return };
    let config: toml::Table = toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let address: SocketAddr = config["listen"]["http"].as_str().unwrap().parse().unwrap();
    let link: SocketAddr = config["listen"]["link"].as_str().unwrap().parse().unwrap();
    let echo = TcpListener::bind(link).unwrap();
    std::thread::spawn(move || {
        for stream in echo.incoming().flatten() {
            std::thread::spawn(move || {
                std::io::copy(&mut &stream, &mut &stream).ok();
            });
        }
    });
    for stream in TcpListener::bind(address).unwrap().incoming() {
        let mut stream = stream.unwrap();
        if !stream.read(&mut [0; 1024]).is_ok_and(|read| read > 0) {
            continue;
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok\n").ok();
    }
}

/// What a demo in a process of its own does; nothing when run as a test.
#[test]
fn demo_in_its_own_process() {
    let Ok(own) = std::env::var(OWN_PROCESS) else { return };
    let (base_port, root) = own.split_once(':').unwrap();
    let ground = Ground::new(Path::new(root), base_port.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut out = std::io::sink();
    let run = run_in(ground.environment(), ground.start_args(), &mut out);
    match runtime.block_on(run) {
        Ok(code) => assert!(code == ExitCode::from(130), "{code:?}"),
        Err(error) => panic!("{error:#}"),
    }
}

fn spawn_own_process(ground: &Ground) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["demo_in_its_own_process", "--exact", "--nocapture"])
        .env(OWN_PROCESS, format!("{}:{}", ground.base_port, ground.root.display()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_starts_obeys_verbs_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20100);

    let user = async {
        let running = ground.ready().await;
        assert_eq!(running.nodes.len(), 4);
        assert_eq!(running.regions[1].endpoints.len(), 2);
        assert!(running.nodes.iter().all(|node| is_alive(node.pid.unwrap())));

        let verb = ["demo", "status", "--json"];
        let mut said = Vec::new();
        let verb = Cli::try_parse_from(verb).unwrap().demo;
        run_in(ground.environment(), verb, &mut said).await.unwrap();
        assert!(String::from_utf8(said).unwrap().contains(&running.cluster_id));

        let partition =
            Request::Partition { a: "us".into(), b: "mars".into(), cut: Default::default() };
        let Reply::Error { message } = ask(&running, partition).await else { panic!("no error") };
        assert!(message.contains("the regions are us, eu"), "{message}");

        let kill = ask(&running, Request::Kill { node: "us-2".into() }).await;
        assert_eq!(kill, Reply::Done { message: "us-2 is killed".into() });
        let restart = ask(&running, Request::Restart { node: "us-2".into() }).await;
        assert_eq!(restart, Reply::Done { message: "us-2 is ready".into() });
        let pause = ask(&running, Request::Pause { node: "eu-1".into() }).await;
        assert!(matches!(pause, Reply::Done { .. }), "{pause:?}");

        let Reply::Status(status) = ask(&running, Request::Status).await else { panic!("status") };
        let states: Vec<_> = status.nodes.iter().map(|node| &*node.state).collect();
        assert_eq!(states, ["up", "up", "paused", "up"]);
        let pids: Vec<u32> = status.nodes.iter().map(|node| node.pid.unwrap()).collect();

        ask(&running, Request::Stop).await;
        pids
    };
    let (text, pids) = ground.run_while(user).await;

    assert!(pids.into_iter().all(|pid| !is_alive(pid)));
    assert!(!ground.ready_file().exists());
    assert!(ground.environment().place.find(Some(&ground.data_dir())).is_err());
    assert!(ground.data_dir().join("us-1/tombolo.toml").exists(), "a named directory is kept");
    assert!(text.contains("tombolo demo partition us eu"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_go_through_the_proxy_and_obey_partitions() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20200);

    let user = async {
        let running = ground.ready().await;
        let config = std::fs::read_to_string(ground.data_dir().join("us-1/tombolo.toml")).unwrap();
        let config: toml::Table = toml::from_str(&config).unwrap();
        let proxy: SocketAddr = config["regions"][1]["link"][0].as_str().unwrap().parse().unwrap();
        assert!(running.nodes.iter().all(|node| node.link != proxy.to_string()));
        let ping = move || {
            let mut stream = TcpStream::connect(proxy)?;
            stream.set_read_timeout(Some(Duration::from_millis(300)))?;
            stream.write_all(b"ping")?;
            stream.read_exact(&mut [0; 4])
        };

        wait_until("a ping passes", || ping().is_ok()).await;
        let cut = Request::Partition { a: "eu".into(), b: "us".into(), cut: Default::default() };
        ask(&running, cut).await;
        assert!(ping().is_err(), "a ping passed the cut");
        ask(&running, Request::Heal).await;
        wait_until("a ping passes again", || ping().is_ok()).await;
        ask(&running, Request::Stop).await;
    };
    ground.run_while(user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_on_the_same_directory_continues_the_same_cluster_but_not_twice_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20300);
    let mut clusters = Vec::new();

    for _ in 0..2 {
        let user = async {
            let running = ground.ready().await;
            let mut second_out = Vec::new();
            let args = ground.args("");
            let second = run_in(ground.environment(), args, &mut second_out).await;
            let refused = format!("{:#}", second.unwrap_err());
            assert!(refused.contains("running here already"), "{refused}");
            ask(&running, Request::Stop).await;
            running.cluster_id
        };
        clusters.push(ground.run_while(user).await.1);
    }

    assert_eq!(clusters[0], clusters[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_nine_of_the_demo_leaves_no_process_behind_not_even_a_paused_one() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20400);
    let mut demo = spawn_own_process(&ground);
    let running = ground.ready().await;
    assert_eq!(running.pid, demo.id());
    ask(&running, Request::Pause { node: "us-1".into() }).await;

    demo.kill().unwrap();
    demo.wait().unwrap();

    wait_until("all nodes are gone", || all_gone(&running)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_stops_everything_with_the_code_of_an_interrupt() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20500);
    let mut demo = spawn_own_process(&ground);
    let running = ground.ready().await;

    signal(demo.id(), rustix::process::Signal::INT);
    let status = demo.wait().unwrap();

    assert!(status.success(), "{status}");
    assert!(all_gone(&running));
    assert!(!running.control_socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_do_not_start_are_reported_with_their_log_and_nothing_stays() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20600);
    std::fs::write(ground.program(), "#!/bin/sh\necho cannot open the data; exit 7\n").unwrap();
    let mut out = Vec::new();

    let ended = run_in(ground.environment(), ground.start_args(), &mut out);
    let error = tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap_err().to_string();

    assert!(error.starts_with("not ready: "), "{error}");
    assert!(error.contains("| cannot open the data"), "{error}");
    assert!(!ground.ready_file().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verb_without_a_running_demo_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20700);
    let heal = Cli::try_parse_from(["demo", "heal"]).unwrap().demo;

    let error = run_in(ground.environment(), heal, &mut Vec::new()).await.unwrap_err();

    assert!(error.to_string().contains("start one with `tombolo demo`"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tour_of_a_demo_that_is_too_small_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let ground = Ground::new(directory.path(), 20800);
    let args = ground.args("--regions us --nodes 1 --tour");
    let mut out = Vec::new();

    let error = run_in(ground.environment(), args, &mut out).await.unwrap_err();

    assert!(error.to_string().contains("two regions"), "{error}");
}
