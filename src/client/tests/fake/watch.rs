//! Watches of the fake region: each call plays the next of the streams that a test prepared.

use super::{Node, Region};
use bytes::Bytes;
use std::pin::Pin;
use tokio_stream::{Stream, StreamExt};
use tombolo_proto::v1;
use tombolo_proto::v1::watch_event::Body;
use tombolo_proto::v1::watch_service_server::WatchService;
use tonic::{Request, Response, Status};

/// What one call answers. After the last item it is silent, unless that is an error.
pub(crate) type Played = Vec<Result<v1::WatchResponse, Status>>;

impl Region {
    /// What the next watches answer, in order; others never say a word.
    pub(crate) fn play(&self, streams: impl IntoIterator<Item = Played>) {
        self.state.lock().watches.extend(streams);
    }

    /// The watches that came.
    pub(crate) fn watched(&self) -> Vec<(u64, v1::WatchRequest)> {
        self.state.lock().watched.clone()
    }
}

/// A response of shard 1.
pub(crate) fn response(token: &'static str, bodies: Vec<Body>) -> v1::WatchResponse {
    let event = |body| v1::WatchEvent { shard: 1, body: Some(body) };
    let events = bodies.into_iter().map(event).collect();
    v1::WatchResponse { resume_token: Bytes::from_static(token.as_bytes()), events }
}

pub(crate) fn dot(seq: u64) -> v1::Dot {
    v1::Dot { region: 1, incarnation: 1, seq }
}

fn time(seq: u64) -> u64 {
    (1_700_000_000_000 + seq * 1000) << 16
}

pub(crate) fn version(value: &'static str, seq: u64) -> v1::Version {
    v1::Version {
        dot: Some(dot(seq)),
        value: Some(v1::Value {
            kind: Some(v1::value::Kind::Data(value.into())),
            ..Default::default()
        }),
        origin_region: "us".into(),
        write_time: None,
        hybrid_time: time(seq),
        expire_time: None,
    }
}

/// The `seq`-th write; `None` deletes.
pub(crate) fn change(key: &'static str, value: Option<&'static str>, seq: u64) -> v1::Change {
    let kind = match value {
        Some(_) => v1::ChangeKind::Put,
        None => v1::ChangeKind::Delete,
    };
    v1::Change {
        key: key.into(),
        kind: kind.into(),
        dot: Some(dot(seq)),
        version: value.map(|value| version(value, seq)),
        origin_region: "us".into(),
        hybrid_time: time(seq),
        group: Some(v1::ChangeGroup { first_seq: seq, size: 1 }),
        current: true,
        ..Default::default()
    }
}

pub(crate) fn checkpoint() -> Body {
    Body::Checkpoint(v1::Checkpoint::default())
}

#[tonic::async_trait]
impl WatchService for Node {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let played = {
            let mut state = self.state.lock();
            state.watched.push((self.node, request.into_inner()));
            state.watches.pop_front().unwrap_or_default()
        };
        Ok(Response::new(Box::pin(tokio_stream::iter(played).chain(tokio_stream::pending()))))
    }
}
