//! Settings of a client: plain data, no handles.

use std::time::Duration;

/// How a [`Client`](crate::Client) reaches its region.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Nodes of *one* region to begin with, `host:port`, `http://` optional. The client learns the
    /// others from them.
    pub endpoints: Vec<String>,
    /// Bounds a whole call with all its retries, and [`connect`](crate::Client::connect) with all of
    /// its own; also how long a scan waits for its next page.
    /// Default 5 s.
    pub deadline: Duration,
    /// After this a call that is safe to repeat is tried through another node. Waits that the
    /// server makes on purpose (`ack_regions`, causal reads) are exempt. Default 2 s.
    pub attempt_timeout: Duration,
    /// Bounds one attempt to open a connection. Default 1 s.
    pub connect_timeout: Duration,
    /// Largest request, in bytes; a larger one is not sent. Raise it together with
    /// `limits.max_message_bytes` of every node. Default 4 MiB, as there.
    pub max_message_bytes: usize,
    /// Largest reply accepted, in bytes. A key under `siblings` shows up to 16 values at once, and a
    /// batch the values of up to 128 keys, so it is far more than a request may have. Default 192 MiB.
    pub max_reply_bytes: usize,
    /// HTTP/2 connections a node. More than one helps only load generators. Default 1.
    pub connections_per_node: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            deadline: Duration::from_secs(5),
            attempt_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(1),
            max_message_bytes: 4 << 20,
            max_reply_bytes: 192 << 20,
            connections_per_node: 1,
        }
    }
}
