//! Connections to the other nodes of this region, for requests that their shards' leaders must
//! answer.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tonic::{
    Status,
    metadata::MetadataMap,
    transport::{Channel, Endpoint},
};

use crate::reason::Reason;

/// Set on a request that must not be forwarded (again): the caller wants a leader hint instead.
pub(crate) const NO_FORWARD: &str = "x-tombolo-no-forward";
/// Set on a status request that is to cover the called node only.
pub(crate) const THIS_NODE_ONLY: &str = "x-tombolo-this-node-only";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections by address, made when first asked for. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct NodeChannels {
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
}

impl NodeChannels {
    /// The connection to `address` (`host:port`), which connects by itself when it is used.
    pub(crate) fn get(&self, address: &str) -> Result<Channel, Status> {
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| {
            Reason::Internal.status(format!("`{address}` is no address: {error}"), &[])
        })?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}

/// Whether a metadata flag is set.
pub(crate) fn is_set(metadata: &MetadataMap, flag: &str) -> bool {
    metadata.get(flag).is_some_and(|value| value != "0")
}
