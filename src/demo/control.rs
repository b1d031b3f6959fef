//! How `tombolo demo partition us eu` reaches a running demo: JSON lines over a unix socket.
//!
//! One request is one line, one reply is one line, in order. The socket is in the demo's data
//! directory and only its owner can use it.
//!
//! Invariants:
//! * A line longer than [`MAX_LINE_BYTES`] or not a request gets an error reply, never a panic.
//! * A `stop` is answered before the demo stops, and its connection stays open until all is
//!   stopped, so that the caller can wait for that.
//!
//! Not here: what the verbs do (`demo`), where the socket is found (`place`).

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::network::{Cut, DirectionStatus};

/// Longest line of either side.
pub const MAX_LINE_BYTES: u64 = 1 << 20;

const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// What to do with a running demo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Tell what runs and what is cut.
    Status,
    /// Cut two regions from each other.
    Partition {
        /// One region.
        a: String,
        /// The other.
        b: String,
        /// How.
        #[serde(default)]
        cut: Cut,
    },
    /// Cut one region from all others.
    Isolate {
        /// The region.
        region: String,
        /// How.
        #[serde(default)]
        cut: Cut,
    },
    /// End all cuts.
    Heal,
    /// SIGKILL a node.
    Kill {
        /// The node.
        node: String,
    },
    /// Stop a node if it runs, start it, and wait until it is ready.
    Restart {
        /// The node.
        node: String,
    },
    /// SIGSTOP a node.
    Pause {
        /// The node.
        node: String,
    },
    /// SIGCONT a node.
    Resume {
        /// The node.
        node: String,
    },
    /// Set the round trip between two regions.
    Latency {
        /// One region.
        a: String,
        /// The other.
        b: String,
        /// In milliseconds.
        round_trip_ms: u64,
    },
    /// End the demo.
    Stop,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done {
        /// In words.
        message: String,
    },
    /// To [`Request::Status`].
    Status(Status),
    /// It is not done.
    Error {
        /// In words, with the valid names where a name was wrong.
        message: String,
    },
}

/// What runs and what is cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Cluster id.
    pub cluster_id: String,
    /// The demo's data directory.
    pub data_dir: String,
    /// Seconds since the start.
    pub up_seconds: u64,
    /// Region by region.
    pub nodes: Vec<NodeStatus>,
    /// In order of names.
    pub network: Vec<DirectionStatus>,
}

/// One node, for people and scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// For example `us-2`.
    pub name: String,
    /// `up`, `down`, `paused` or `crashed`.
    pub state: String,
    /// Absent when there is no process.
    pub pid: Option<u32>,
    /// Client address.
    pub client: String,
}

/// Carries out requests.
pub trait Handler: Send + Sync + 'static {
    /// Carries out one request; problems are [`Reply::Error`].
    fn handle(&self, request: Request) -> impl Future<Output = Reply> + Send;
}

/// Binds the control socket, replacing a socket file that nobody serves.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] when a demo answers there; the rest is the system's.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixStream::connect(path).await {
        Ok(_) => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "a demo is running here already"));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
        }
        // Nothing there, or a problem that `bind` will name.
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    let only_owner = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(path, only_owner)?;
    Ok(listener)
}

/// Accepts connections until `stop` fires, which the request of that name does.
///
/// Connections live until their peers close them or `stopped` fires, which the caller does when
/// all is stopped.
pub async fn serve(
    listener: UnixListener,
    handler: Arc<impl Handler>,
    stop: CancellationToken,
    stopped: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let conversation = converse(stream, Arc::clone(&handler), stop.clone());
                let stopped = stopped.clone();
                tokio::spawn(async move { stopped.run_until_cancelled(conversation).await });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a control connection failed, will retry");
                stop.run_until_cancelled(tokio::time::sleep(ACCEPT_RETRY)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, handler: Arc<impl Handler>, stop: CancellationToken) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let (reply, last) = match read_line(&mut read).await {
            Ok(None) => return,
            Ok(Some(line)) => match serde_json::from_str(&line) {
                Ok(Request::Stop) => (Reply::Done { message: "the demo is stopping".into() }, true),
                Ok(request) => (handler.handle(request).await, false),
                Err(error) => (Reply::Error { message: format!("not a request: {error}") }, false),
            },
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let reply = Reply::Error { message: error.to_string() };
                // The rest of the line cannot be told from a new request.
                write_line(&mut write, &reply).await.ok();
                return;
            }
            Err(_) => return,
        };
        if write_line(&mut write, &reply).await.is_err() && !last {
            return;
        }
        if last {
            stop.cancel();
            std::future::pending::<()>().await;
        }
    }
}

/// Sends one request to the demo at `path`; for `stop`, waits until the demo has ended.
///
/// # Errors
/// Those of the socket; a reply that is none is [`io::ErrorKind::InvalidData`].
pub async fn call(path: &Path, request: &Request) -> io::Result<Reply> {
    let (read, mut write) = UnixStream::connect(path).await?.into_split();
    let mut read = BufReader::new(read);
    write_line(&mut write, request).await?;
    let line = read_line(&mut read).await?;
    let line = line.ok_or_else(|| {
        io::Error::new(io::ErrorKind::UnexpectedEof, "the demo ended before it answered")
    })?;
    let reply = serde_json::from_str(&line).map_err(invalid)?;
    if *request == Request::Stop {
        // A reset is an end too.
        read.read_to_end(&mut Vec::new()).await.ok();
    }
    Ok(reply)
}

async fn write_line(
    write: &mut (impl AsyncWriteExt + Unpin),
    line: &impl Serialize,
) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    write.write_all(&bytes).await
}

/// The next line without its end; none at the end of the stream.
async fn read_line(read: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    read.take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes).await?;
    match bytes.pop() {
        None => Ok(None),
        Some(b'\n') => String::from_utf8(bytes).map(Some).map_err(invalid),
        Some(_) => Err(invalid("a line is cut short or longer than 1 MiB")),
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    const PATIENCE: Duration = Duration::from_secs(20);

    struct Echo;

    impl Handler for Echo {
        async fn handle(&self, request: Request) -> Reply {
            match request {
                Request::Kill { node } if node == "us-9" => {
                    Reply::Error { message: "no node `us-9`; the nodes are us-1".into() }
                }
                request => Reply::Done { message: format!("{request:?}") },
            }
        }
    }

    struct Served {
        directory: tempfile::TempDir,
        shutdown: CancellationToken,
        stopped: CancellationToken,
    }

    impl Served {
        fn path(&self) -> std::path::PathBuf {
            self.directory.path().join("control.sock")
        }
    }

    async fn served() -> Served {
        let served = Served {
            directory: tempfile::tempdir().unwrap(),
            shutdown: CancellationToken::new(),
            stopped: CancellationToken::new(),
        };
        let listener = bind(&served.path()).await.unwrap();
        tokio::spawn(serve(
            listener,
            Arc::new(Echo),
            served.shutdown.clone(),
            served.stopped.clone(),
        ));
        served
    }

    #[tokio::test]
    async fn a_request_reaches_the_handler_and_its_reply_comes_back() {
        let served = served().await;
        let request = Request::Partition {
            a: "us".into(),
            b: "eu".into(),
            cut: Cut { one_way: true, reset: false },
        };

        let reply = timeout(PATIENCE, call(&served.path(), &request)).await.unwrap().unwrap();

        assert_eq!(reply, Reply::Done { message: format!("{request:?}") });
    }

    #[tokio::test]
    async fn errors_of_the_handler_come_back_as_such() {
        let served = served().await;

        let request = Request::Kill { node: "us-9".into() };
        let reply = timeout(PATIENCE, call(&served.path(), &request)).await.unwrap().unwrap();

        let Reply::Error { message } = reply else { panic!("{reply:?}") };
        assert!(message.contains("the nodes are us-1"));
    }

    #[tokio::test]
    async fn nonsense_gets_an_error_and_the_connection_goes_on() {
        let served = served().await;
        let (read, mut write) = UnixStream::connect(served.path()).await.unwrap().into_split();
        let mut lines = BufReader::new(read).lines();

        for (line, expected) in [
            ("hello", "not a request"),
            (r#"{"verb":"explode"}"#, "unknown variant"),
            (r#"{"verb":"kill"}"#, "missing field `node`"),
            (r#"{"verb":"heal"}"#, "Heal"),
        ] {
            write.write_all(format!("{line}\n").as_bytes()).await.unwrap();
            let reply = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
            assert!(reply.contains(expected), "{line}: {reply}");
        }
    }

    #[tokio::test]
    async fn an_endless_line_is_refused_in_bounded_memory() {
        let served = served().await;
        let (read, mut write) = UnixStream::connect(served.path()).await.unwrap().into_split();
        let mut lines = BufReader::new(read).lines();

        let too_long = vec![b'x'; usize::try_from(MAX_LINE_BYTES).unwrap() + 1];
        // The other side may stop reading before the end.
        write.write_all(&too_long).await.ok();

        let reply = timeout(PATIENCE, lines.next_line()).await.unwrap();
        assert!(reply.is_err() || reply.unwrap().unwrap().contains("longer than"));
    }

    #[tokio::test]
    async fn a_stop_is_answered_and_its_connection_ends_when_all_is_stopped() {
        let served = served().await;
        let (read, mut write) = UnixStream::connect(served.path()).await.unwrap().into_split();
        let mut lines = BufReader::new(read).lines();

        write_line(&mut write, &Request::Stop).await.unwrap();

        let reply = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
        assert!(reply.contains("stopping"), "{reply}");
        timeout(PATIENCE, served.shutdown.cancelled()).await.unwrap();
        assert!(timeout(Duration::from_millis(50), lines.next_line()).await.is_err());

        served.stopped.cancel();
        assert_eq!(timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap(), None);
    }

    #[tokio::test]
    async fn a_socket_in_use_is_refused_and_a_stale_one_replaced() {
        let served = served().await;
        let in_use = bind(&served.path()).await.unwrap_err();
        assert_eq!(in_use.kind(), io::ErrorKind::AddrInUse);

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        drop(bind(&path).await.unwrap());
        bind(&path).await.unwrap();
    }

    #[test]
    fn requests_have_one_stable_form() {
        let json = |request: &Request| serde_json::to_string(request).unwrap();

        assert_eq!(json(&Request::Heal), r#"{"verb":"heal"}"#);
        assert_eq!(
            json(&Request::Latency { a: "us".into(), b: "eu".into(), round_trip_ms: 80 }),
            r#"{"verb":"latency","a":"us","b":"eu","round_trip_ms":80}"#
        );
        assert_eq!(
            serde_json::from_str::<Request>(r#"{"verb":"isolate","region":"eu"}"#).unwrap(),
            Request::Isolate { region: "eu".into(), cut: Cut::default() }
        );
    }
}
