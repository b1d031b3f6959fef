//! Heartbeats of all groups to one peer, on one stream.
//!
//! A heartbeat keeps followers from electing, and a quorum of them proves a leader to its readers.
//! With many groups on a node, a call for each would cost more than what they carry. So those that
//! are ready together travel together: no timer, what gathers while the stream is being written
//! goes next. Answers come back as the groups give them, in any order, so that a busy group
//! delays no other.
//!
//! Both ends are here: [`Pulse`] asks, [`answers`] answers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{BoxStream, FuturesUnordered};
use futures::{FutureExt, StreamExt, stream};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_proto::internal::v1 as pb;
use tonic::{Status, Streaming};

use crate::network::client::Peer;
use crate::network::identity::Identities;

/// Heartbeats in one message.
const BATCH_MAX: usize = 256;
/// Messages that may wait for the stream. One that does not fit fails: the peer is not reading.
const OUTGOING_MAX: usize = 16;
/// Unanswered heartbeats above which those whose callers have gone are forgotten.
const UNANSWERED_MAX: usize = 1024;

type Answer = Result<pb::AppendResponse, Status>;

struct Question {
    append: pb::AppendRequest,
    answer: oneshot::Sender<Answer>,
}

/// The way to send heartbeats to one peer.
#[derive(Clone)]
pub(crate) struct Pulse {
    questions: mpsc::UnboundedSender<Question>,
}

impl Pulse {
    /// Starts the task that keeps the stream to `node`; it ends with the last clone.
    pub(crate) fn start(
        node: u64,
        identities: Arc<Identities>,
        peer: Peer,
        patience: Duration,
    ) -> Self {
        let (questions, asked) = mpsc::unbounded_channel();
        tokio::spawn(keep_stream(node, identities, peer, patience, asked));
        Self { questions }
    }

    /// Sends one group's heartbeat and waits for its answer. Cancel safe; set a deadline around
    /// it.
    pub(crate) async fn send(&self, append: pb::AppendRequest) -> Answer {
        let (answer, answered) = oneshot::channel();
        let gone = || Status::unavailable("the heartbeat stream ended");
        self.questions.send(Question { append, answer }).map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

async fn keep_stream(
    node: u64,
    identities: Arc<Identities>,
    peer: Peer,
    patience: Duration,
    mut asked: mpsc::UnboundedReceiver<Question>,
) {
    let mut batch = Vec::new();
    while asked.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let (requests, outgoing) = mpsc::channel(OUTGOING_MAX);
        let mut stream = Sender { requests, unanswered: HashMap::new(), next: 0 };
        stream.send(&mut batch, Some(identities.to(node)));
        let mut control = peer.control.clone();
        let opened = control.heartbeats(ReceiverStream::new(outgoing));
        let status = match tokio::time::timeout(patience, opened).await {
            Ok(Ok(answers)) => stream.run(answers.into_inner(), &mut asked).await,
            Ok(Err(status)) => Some(status),
            Err(_) => Some(Status::unavailable("no answer to the first heartbeat in time")),
        };
        let Some(status) = status else { return };
        for (_, waiting) in stream.unanswered {
            let _ = waiting.send(Err(status.clone()));
        }
    }
}

/// The sending half of an open stream.
struct Sender {
    requests: mpsc::Sender<pb::HeartbeatsRequest>,
    unanswered: HashMap<u64, oneshot::Sender<Answer>>,
    next: u64,
}

impl Sender {
    /// Sends until the stream breaks, and says why; `None` when nobody will ask any more.
    async fn run(
        &mut self,
        mut answers: Streaming<pb::HeartbeatsResponse>,
        asked: &mut mpsc::UnboundedReceiver<Question>,
    ) -> Option<Status> {
        let mut batch = Vec::new();
        loop {
            // Both are safe to drop: a message is taken whole or not at all.
            tokio::select! {
                count = asked.recv_many(&mut batch, BATCH_MAX) => {
                    if count == 0 {
                        return None;
                    }
                    self.send(&mut batch, None);
                }
                answer = answers.message() => match answer {
                    Ok(Some(answers)) => self.take(answers),
                    Ok(None) => return Some(Status::unavailable("the peer ended the stream")),
                    Err(status) => return Some(status),
                }
            }
        }
    }

    fn send(&mut self, batch: &mut Vec<Question>, identity: Option<pb::Identity>) {
        if UNANSWERED_MAX < self.unanswered.len() {
            self.unanswered.retain(|_, waiting| !waiting.is_closed());
        }
        let first = self.next;
        let mut heartbeats = Vec::with_capacity(batch.len());
        for Question { append, answer } in batch.drain(..) {
            // Callers that have given up while the stream was being opened.
            if answer.is_closed() {
                continue;
            }
            self.unanswered.insert(self.next, answer);
            heartbeats.push(pb::GroupHeartbeat { number: self.next, append: Some(append) });
            self.next += 1;
        }
        if self.requests.try_send(pb::HeartbeatsRequest { identity, heartbeats }).is_err() {
            for number in first..self.next {
                if let Some(waiting) = self.unanswered.remove(&number) {
                    let _ = waiting.send(Err(Status::unavailable("the peer reads no heartbeats")));
                }
            }
        }
    }

    fn take(&mut self, response: pb::HeartbeatsResponse) {
        for pb::HeartbeatAnswer { number, answer, problem } in response.answers {
            let Some(waiting) = self.unanswered.remove(&number) else { continue };
            let answer = answer.ok_or_else(|| Status::unavailable(problem));
            // The caller may have given up.
            let _ = waiting.send(answer);
        }
    }
}

/// Answers a stream of heartbeats with what `handle` makes of each.
pub(crate) fn answers<H>(
    first: pb::HeartbeatsRequest,
    requests: Streaming<pb::HeartbeatsRequest>,
    handle: H,
) -> BoxStream<'static, Result<pb::HeartbeatsResponse, Status>>
where
    H: Fn(pb::AppendRequest) -> BoxFuture<'static, Answer> + Send + 'static,
{
    let mut state = Receiver { requests, handle, working: FuturesUnordered::new() };
    state.begin(first);
    stream::unfold(Some(state), |state| async move {
        let mut state = state?;
        match state.next().await {
            Ok(Some(response)) => Some((Ok(response), Some(state))),
            Ok(None) => None,
            Err(status) => Some((Err(status), None)),
        }
    })
    .boxed()
}

struct Receiver<H> {
    requests: Streaming<pb::HeartbeatsRequest>,
    handle: H,
    working: FuturesUnordered<BoxFuture<'static, pb::HeartbeatAnswer>>,
}

impl<H> Receiver<H>
where
    H: Fn(pb::AppendRequest) -> BoxFuture<'static, Answer>,
{
    fn begin(&mut self, request: pb::HeartbeatsRequest) {
        for pb::GroupHeartbeat { number, append } in request.heartbeats {
            let answer = (self.handle)(append.unwrap_or_default());
            self.working.push(Box::pin(answer.map(move |answer| match answer {
                Ok(answer) => {
                    let answer = Some(answer);
                    pb::HeartbeatAnswer { number, answer, problem: String::new() }
                }
                Err(status) => {
                    let problem = status.message().to_owned();
                    pb::HeartbeatAnswer { number, answer: None, problem }
                }
            })));
        }
    }

    /// The answers that are ready together, at least one; `None` when the peer has gone.
    async fn next(&mut self) -> Result<Option<pb::HeartbeatsResponse>, Status> {
        loop {
            tokio::select! {
                biased;
                Some(answer) = self.working.next() => {
                    let mut answers = vec![answer];
                    while let Some(Some(answer)) = self.working.next().now_or_never() {
                        answers.push(answer);
                    }
                    return Ok(Some(pb::HeartbeatsResponse { answers }));
                }
                request = self.requests.message() => match request? {
                    Some(request) => self.begin(request),
                    None => return Ok(None),
                }
            }
        }
    }
}
