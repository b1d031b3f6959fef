//! What the loop needs of a database: lanes that put and get, and how connections are opened.
//!
//! Not here: which request a call is (`tombolo`, `etcd`).

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt;

/// After this a call has failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// HTTP/2 flow control of a stream and of a connection, in bytes: never the limit here.
const WINDOW_BYTES: u32 = 4 << 20;

/// A database under test, connected.
pub(crate) trait Target: Send + Sync {
    type Lane: Lane;

    /// What client `number` calls through.
    fn lane(&self, number: usize) -> Self::Lane;

    /// HTTP/2 connections in use.
    fn connections(&self) -> usize;
}

/// One client's way to the database; one call at a time.
pub(crate) trait Lane: Send + 'static {
    /// Stores a value durably on a majority.
    fn put(&mut self, key: Bytes, value: Bytes)
    -> impl Future<Output = Result<(), Failure>> + Send;

    /// Reads a key, linearizable. Absence is a failure.
    fn get(&mut self, key: Bytes) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Why a call failed, in few words: failures with equal reasons are counted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Failure(pub(crate) String);

impl Failure {
    /// A read found no value.
    pub(crate) fn absent() -> Self {
        Self("key not found".to_owned())
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let code = format!("{:?}", status.code());
        if let Some(info) = status.get_details_error_info() {
            return Self(format!("{code}: {}", info.reason));
        }
        // etcd has a fixed list of messages; others may name addresses and are not shown.
        match status.message().strip_prefix("etcdserver: ") {
            Some(message) => Self(format!("{code}: {message}")),
            None => Self(code),
        }
    }
}

/// Counts by reason.
pub(crate) type Failures = BTreeMap<Failure, u64>;

/// How every connection is made, whatever the target.
pub(crate) fn endpoint(address: &str) -> anyhow::Result<Endpoint> {
    let address = plain_address(address);
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .with_context(|| format!("`{address}` is not host:port"))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES))
}

/// Opens `count` connections.
pub(crate) async fn open(address: &str, count: usize) -> anyhow::Result<Vec<Channel>> {
    let endpoint = endpoint(address)?;
    let mut channels = Vec::with_capacity(count);
    for _ in 0..count {
        let opened = endpoint.connect().await;
        channels.push(opened.with_context(|| format!("cannot connect to {address}"))?);
    }
    Ok(channels)
}

/// `host:port`, whatever stands around it.
pub(crate) fn plain_address(address: &str) -> &str {
    address.trim().trim_start_matches("http://").trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn failures_are_named_by_code_and_reason_and_never_by_address() {
        let details = ErrorDetails::with_error_info("NOT_LEADER", "tombolo", []);
        let refusal = Status::with_error_details(Code::Unavailable, "ask 10.0.0.1:7101", details);
        assert_eq!(Failure::from(refusal).0, "Unavailable: NOT_LEADER");
        let etcd = Status::new(Code::Unavailable, "etcdserver: leader changed");
        assert_eq!(Failure::from(etcd).0, "Unavailable: leader changed");
        let refused = Status::new(Code::Unavailable, "connection to 10.0.0.1:7101 refused");
        assert_eq!(Failure::from(refused).0, "Unavailable");
    }

    #[test]
    fn addresses_are_taken_with_and_without_a_scheme() {
        assert_eq!(plain_address(" http://a:1/ "), "a:1");
        assert!(endpoint("a:1").is_ok());
        assert!(endpoint("not an address").is_err());
    }
}
