//! An append session: openraft's requests to one follower, and its answers, on one stream.
//!
//! Requests and answers are polled from one place, so that dropping the session also drops
//! openraft's request stream at once (which holds a lock that the next session needs) instead of
//! leaving it with the HTTP/2 connection. Requests are sent as long as [`APPEND_WINDOW`] allows;
//! answers come back in order. A follower that leaves a request unanswered for too long ends the
//! session.

use std::sync::Arc;

use futures::{Stream, StreamExt};
use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tombolo_proto::internal::v1 as pb;
use tonic::Status;

use crate::network::client::{
    Connection, RpcResult, Transport, network, required, rpc_error, unreachable,
};
use crate::types::{
    LogId, TypeConfig, entry_to_wire, log_id_from_wire, log_id_to_wire, vote_from_wire,
    vote_to_wire,
};

/// Requests of one session that may be unanswered. Between 2 and unlimited make no difference to
/// throughput; the bound keeps a slow follower's backlog small.
const APPEND_WINDOW: usize = 8;

impl Connection {
    /// Sends the first request and waits until the follower has accepted the stream, within the
    /// transport's patience.
    pub(super) async fn open_session<S>(
        &self,
        first: AppendEntriesRequest<TypeConfig>,
        input: S,
    ) -> RpcResult<Box<Session<S>>> {
        let limit = self.transport.patience.append;
        tokio::time::timeout(limit, self.try_open_session(first, input))
            .await
            .map_err(|_| unreachable("no answer to the first append in time".to_owned()))?
    }

    async fn try_open_session<S>(
        &self,
        first: AppendEntriesRequest<TypeConfig>,
        input: S,
    ) -> RpcResult<Box<Session<S>>> {
        let mut peer = self.transport.peer(self.target)?;
        let identity = self.transport.identity(self.target, &peer).await?;
        let (requests, outgoing) = mpsc::channel(APPEND_WINDOW);
        let first = append_to_wire(first, self.group, Some(identity));
        if requests.try_send(first).is_err() {
            return Err(network("the request channel is closed"));
        }
        let answers = peer
            .append
            .append(ReceiverStream::new(outgoing))
            .await
            .map_err(|status| rpc_error(&status))?
            .into_inner();
        Ok(Box::new(Session {
            group: self.group,
            target: self.target,
            transport: self.transport.clone(),
            input: Some((input, requests)),
            answers,
            unanswered: 1,
            progress: Instant::now(),
        }))
    }
}

/// Where an append stream stands.
pub(super) enum Stage<S> {
    /// Nothing was sent yet.
    Idle(S),
    /// The follower has accepted the stream.
    Open(Box<Session<S>>),
}

/// An open append stream.
pub(super) struct Session<S> {
    group: u64,
    target: u64,
    transport: Arc<Transport>,
    /// Gone when openraft has no more requests for this session.
    input: Option<(S, mpsc::Sender<pb::AppendRequest>)>,
    answers: tonic::Streaming<pb::AppendResponse>,
    unanswered: usize,
    progress: Instant,
}

enum Event {
    Answer(Result<Option<pb::AppendResponse>, Status>),
    Request(Option<AppendEntriesRequest<TypeConfig>>),
    Stalled,
}

impl<S> Session<S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    /// The next answer. `None` at the end, which comes only when openraft ended its requests.
    pub(super) async fn next(&mut self) -> Option<RpcResult<StreamAppendResult<TypeConfig>>> {
        loop {
            let event = self.event().await;
            if self.transport.faults.is_cut(self.target) {
                return Some(Err(unreachable("cut off".to_owned())));
            }
            match event {
                Event::Request(Some(request)) => {
                    if self.unanswered == 0 {
                        self.progress = Instant::now();
                    }
                    self.unanswered += 1;
                    let request = append_to_wire(request, self.group, None);
                    let sent = match &self.input {
                        Some((_, out)) => out.try_send(request).is_ok(),
                        None => false,
                    };
                    if !sent {
                        return Some(Err(network("the append stream is broken")));
                    }
                }
                // Ends our side of the stream; answers still come.
                Event::Request(None) => self.input = None,
                Event::Answer(Ok(Some(answer))) => {
                    self.unanswered = self.unanswered.saturating_sub(1);
                    self.progress = Instant::now();
                    return Some(append_result(answer));
                }
                Event::Answer(Ok(None)) if self.input.is_none() => return None,
                Event::Answer(Ok(None)) => {
                    return Some(Err(network("the follower ended the append stream")));
                }
                Event::Answer(Err(status)) => return Some(Err(rpc_error(&status))),
                Event::Stalled => {
                    return Some(Err(unreachable("no answer to an append in time".to_owned())));
                }
            }
        }
    }

    /// Waits for what happens first. Safe to drop at any point.
    async fn event(&mut self) -> Event {
        let room = self.unanswered < APPEND_WINDOW;
        let deadline = self.progress + self.transport.patience.append;
        let next_request = async {
            match &mut self.input {
                Some((input, _)) if room => Event::Request(input.next().await),
                Some(_) | None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = self.answers.message() => Event::Answer(answer),
            event = next_request => event,
            () = tokio::time::sleep_until(deadline), if 0 < self.unanswered => Event::Stalled,
        }
    }
}

pub(super) fn append_to_wire(
    request: AppendEntriesRequest<TypeConfig>,
    group: u64,
    identity: Option<pb::Identity>,
) -> pb::AppendRequest {
    pb::AppendRequest {
        identity,
        group,
        vote: Some(vote_to_wire(&request.vote)),
        prev: request.prev_log_id.as_ref().map(log_id_to_wire),
        entries: request.entries.into_iter().map(entry_to_wire).collect(),
        commit: request.leader_commit.as_ref().map(log_id_to_wire),
    }
}

pub(super) fn append_result(
    answer: pb::AppendResponse,
) -> RpcResult<StreamAppendResult<TypeConfig>> {
    Ok(match required(answer.result, "result")? {
        pb::append_response::Result::Matched(matched) => {
            let upto: Option<LogId> = matched.upto.map(log_id_from_wire);
            Ok(upto)
        }
        pb::append_response::Result::Conflict(at) => {
            Err(StreamAppendError::Conflict(log_id_from_wire(at)))
        }
        pb::append_response::Result::HigherVote(vote) => {
            Err(StreamAppendError::HigherVote(vote_from_wire(vote)))
        }
    })
}
