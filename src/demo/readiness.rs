//! Waiting until nodes serve: polls `/readyz` of each over HTTP.
//!
//! The HTTP spoken here is one GET on a connection of its own; a client library would be the
//! heavier half of this crate.
//!
//! Not here: what makes a node ready; that is the node's own answer.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::layout::NodePlan;
use crate::processes::{Fleet, State, log_tail};

const POLL_INTERVAL: Duration = Duration::from_millis(100);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
const ANSWER_BYTES: u64 = 64 << 10;

/// Nodes that did not become ready, each with the reason and the end of its log.
#[derive(Debug)]
pub struct NotReady {
    nodes: Vec<(String, String, String)>,
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.nodes.iter().map(|(name, ..)| &**name).collect();
        write!(f, "not ready: {}", names.join(", "))?;
        for (name, reason, tail) in &self.nodes {
            write!(f, "\n{name}: {reason}")?;
            for line in tail.lines() {
                write!(f, "\n  | {line}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for NotReady {}

/// Returns when every node answers `/readyz` with 200. Safe to drop.
///
/// # Errors
/// [`NotReady`], at once when a node's process ends and otherwise after `patience`.
pub async fn wait_ready(
    fleet: &Fleet,
    nodes: &[&NodePlan],
    patience: Duration,
) -> Result<(), NotReady> {
    let deadline = Instant::now() + patience;
    loop {
        let reasons = join_all(nodes.iter().map(|node| why_not_ready(fleet, node))).await;
        let mut hopeless = false;
        let mut waiting = Vec::new();
        for (node, reason) in nodes.iter().zip(reasons) {
            if let Some((reason, fatal)) = reason {
                hopeless |= fatal;
                waiting.push((*node, reason));
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        if hopeless || Instant::now() >= deadline {
            let nodes = waiting
                .into_iter()
                .map(|(node, reason)| (node.name.clone(), reason, log_tail(&node.log_path())));
            return Err(NotReady { nodes: nodes.collect() });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Why a node is not ready, and whether waiting is useless; none when it is ready.
async fn why_not_ready(fleet: &Fleet, node: &NodePlan) -> Option<(String, bool)> {
    match fleet.state(&node.name) {
        Ok(State::Up { .. }) => {}
        Ok(State::Crashed { how }) => return Some((format!("its process ended: {how}"), true)),
        Ok(state @ (State::Down | State::Paused { .. })) => {
            return Some((format!("its process is {}", state.word()), true));
        }
        Err(error) => return Some((error.to_string(), true)),
    }
    match get(node.http, "/readyz?verbose").await {
        Ok((200, _)) => None,
        Ok((status, body)) => {
            let body = body.trim();
            let body = if body.is_empty() { "no reason given" } else { body };
            Some((format!("/readyz answers {status}: {body}"), false))
        }
        Err(error) => Some((format!("http://{}/readyz: {error}", node.http), false)),
    }
}

/// Gets a path over HTTP/1.1; returns status code and body, of which 64 KiB at most are read.
///
/// # Errors
/// Those of the connection; an answer that is not HTTP is [`io::ErrorKind::InvalidData`], and one
/// that takes longer than 2 s is [`io::ErrorKind::TimedOut`].
pub async fn get(address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: text/plain\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
        parse_answer(&answer)
    };
    timeout(PROBE_TIMEOUT, exchange)
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")))
}

fn parse_answer(answer: &[u8]) -> io::Result<(u16, String)> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut words = head.split_whitespace();
    let version = words.next().unwrap_or_default();
    let status = words.next().and_then(|word| word.parse().ok());
    match status {
        Some(status) if version.starts_with("HTTP/1.") => Ok((status, body.to_owned())),
        Some(_) | None => Err(io::Error::new(io::ErrorKind::InvalidData, "answer is not HTTP")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Layout, Shape};
    use crate::processes::Launch;
    use std::path::Path;
    use tokio::net::TcpListener;

    fn fleet_and_layout(directory: &Path, script: &str, http: SocketAddr) -> (Fleet, Layout) {
        let shape = Shape {
            cluster_id: "demo".into(),
            regions: vec!["us".into()],
            nodes: 1,
            shards: 1,
            base_port: 7101,
        };
        let mut layout = Layout::plan(directory, shape);
        layout.nodes[0].http = http;
        let launch = Launch {
            name: "us-1".into(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            log: layout.nodes[0].log_path(),
        };
        (Fleet::new(vec![launch]).unwrap(), layout)
    }

    /// Answers each request with the next of `answers`, the last one for ever.
    async fn answering(answers: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut served = 0;
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 1024];
                if !stream.read(&mut request).await.is_ok_and(|read| read > 0) {
                    continue;
                }
                let answer = answers[served.min(answers.len() - 1)];
                stream.write_all(answer.as_bytes()).await.ok();
                served += 1;
            }
        });
        address
    }

    #[tokio::test]
    async fn waiting_ends_when_the_node_answers_200() {
        let directory = tempfile::tempdir().unwrap();
        let http = answering(&[
            "HTTP/1.1 503 Service Unavailable\r\n\r\n[-]raft no leader",
            "HTTP/1.1 200 OK\r\n\r\nok",
        ])
        .await;
        let (fleet, layout) = fleet_and_layout(directory.path(), "exec sleep 1000", http);
        fleet.start_all().await.unwrap();

        let nodes: Vec<_> = layout.nodes.iter().collect();
        wait_ready(&fleet, &nodes, Duration::from_secs(20)).await.unwrap();

        fleet.kill_all().await.unwrap();
    }

    #[tokio::test]
    async fn whoever_is_not_ready_in_time_is_named_with_its_answer_and_log() {
        let directory = tempfile::tempdir().unwrap();
        let http = answering(&["HTTP/1.1 503 Service Unavailable\r\n\r\n[-]raft no leader"]).await;
        let script = "echo waiting for a vote; exec sleep 1000";
        let (fleet, layout) = fleet_and_layout(directory.path(), script, http);
        fleet.start_all().await.unwrap();

        let nodes: Vec<_> = layout.nodes.iter().collect();
        let error = wait_ready(&fleet, &nodes, Duration::from_millis(300)).await.unwrap_err();

        let text = error.to_string();
        assert!(text.starts_with("not ready: us-1\n"), "{text}");
        assert!(text.contains("503: [-]raft no leader"), "{text}");
        assert!(text.contains("| waiting for a vote"), "{text}");
        fleet.kill_all().await.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_ends_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let http = answering(&["HTTP/1.1 503 Service Unavailable\r\n\r\n"]).await;
        let script = "echo bad config; exit 1";
        let (fleet, layout) = fleet_and_layout(directory.path(), script, http);
        fleet.start_all().await.unwrap();

        let nodes: Vec<_> = layout.nodes.iter().collect();
        let begun = Instant::now();
        let error = wait_ready(&fleet, &nodes, Duration::from_secs(60)).await.unwrap_err();

        assert!(begun.elapsed() < Duration::from_secs(20));
        assert!(error.to_string().contains("| bad config"), "{error}");
    }

    #[test]
    fn answers_that_are_not_http_are_refused() {
        assert!(parse_answer(b"").is_err());
        assert!(parse_answer(b"SSH-2.0 200\r\n\r\n").is_err());
        assert!(parse_answer(b"HTTP/1.1 abc\r\n\r\n").is_err());
        assert_eq!(parse_answer(b"HTTP/1.0 204 x\r\n\r\n").unwrap(), (204, String::new()));
    }
}
