//! The client and the one loop through which every unary call goes.
//!
//! An attempt ends in an answer, a redirect, a pause before the next attempt, or an error; the
//! deadline bounds the whole. The request, and with it the request id, is built once and sent
//! unchanged in each attempt.

use crate::admin::Admin;
use crate::config::ClientConfig;
use crate::conflicts::Conflicts;
use crate::error::{Detail, Error, Result};
use crate::keyspace::Keyspace;
use crate::retry::{Backoff, Judgement, Safety, Verdict, judge};
use crate::router::{Route, Router, Target};
use crate::session::Session;
use bytes::Bytes;
use prost::Message;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use tombolo_proto::v1;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

const CLIENT_NAME: &str = concat!("tombolo-client/", env!("CARGO_PKG_VERSION"));

/// A connection to one region. Cheap to clone; clones share everything.
///
/// Cancel safety: dropping a call's future abandons it. A write may still be applied then.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) router: Router,
    client_id: u64,
    next_number: AtomicU64,
}

/// What the loop must know about a call.
pub(crate) struct Plan {
    pub(crate) target: Target,
    pub(crate) safety: Safety,
    /// Bounds the whole call.
    pub(crate) deadline: Duration,
    /// The server may wait on purpose, so that a slow attempt says nothing about the node.
    pub(crate) waits: bool,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.inner.config.endpoints).finish()
    }
}

impl Client {
    /// Learns the topology of a region from any of its nodes.
    ///
    /// # Errors
    /// [`Error::Invalid`] at once for an address that is none; else, when the deadline has passed, what
    /// became of each endpoint. Until then they are asked again and again.
    pub async fn connect(config: ClientConfig) -> Result<Self> {
        let config = Arc::new(config);
        let router = Router::new(config.clone())?;
        router.discover(Instant::now() + config.deadline).await?;
        let client_id = rand::random::<u64>().max(1);
        let next_number = AtomicU64::new(1);
        Ok(Self { inner: Arc::new(Inner { config, router, client_id, next_number }) })
    }

    /// The keys of one namespace. Does not check that it exists.
    pub fn namespace(&self, name: impl Into<String>) -> Keyspace {
        Keyspace::new(self.clone(), name.into())
    }

    /// A new session that has seen nothing.
    pub fn session(&self) -> Session {
        Session::new()
    }

    /// The region's status and topology, from any node.
    ///
    /// # Errors
    /// As any read.
    pub async fn cluster(&self) -> Result<v1::GetClusterResponse> {
        self.admin().cluster().await
    }

    /// The conflicts of one namespace. Does not check that it exists. See [`Conflicts`].
    pub fn conflicts(&self, namespace: impl Into<String>) -> Conflicts {
        Conflicts::new(self.clone(), namespace.into())
    }

    /// Namespaces, nodes, shards, regions and links. See [`Admin`].
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// A fresh id for one write. Calls take one by themselves; take it here to be able to repeat
    /// a write of unknown outcome later, with [`crate::Put::request_id`] and the like.
    ///
    /// ```no_run
    /// # async fn example(us: tombolo_client::Client, eu: tombolo_client::Client) -> tombolo_client::Result<()> {
    /// let id = us.next_request_id();
    /// let sent = us.namespace("orders").put("42", "paid").request_id(id).await;
    /// if sent.is_err_and(|error| error.outcome_unknown()) {
    ///     // The region does not answer: ask another one. The order is paid once.
    ///     eu.namespace("orders").put("42", "paid").request_id(id).await?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn next_request_id(&self) -> v1::RequestId {
        let number = self.inner.next_number.fetch_add(1, Ordering::Relaxed);
        v1::RequestId { client: self.inner.client_id, number }
    }

    pub(crate) fn deadline(&self, asked: Option<Duration>) -> Duration {
        asked.unwrap_or(self.inner.config.deadline)
    }

    /// Looks for an unknown leader while the call is already on its way through another node.
    fn refresh_behind(&self, generation: u64) {
        if self.inner.router.refresh_is_due() {
            let inner = self.inner.clone();
            tokio::spawn(async move { inner.router.refresh(generation).await });
        }
    }

    /// Sends one call until it is answered, refused for good, or out of time.
    pub(crate) async fn call<Q, R, F, Fut>(&self, plan: Plan, body: Q, send: F) -> Result<R>
    where
        Q: Clone + Message,
        F: Fn(Channel, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        let (bytes, bytes_max) = (body.encoded_len(), self.inner.config.max_message_bytes);
        if bytes > bytes_max {
            let found = format!("the request has {bytes} bytes and the client sends {bytes_max}");
            return Err(Error::message_too_large(&found));
        }
        let router = &self.inner.router;
        let until = Instant::now() + plan.deadline;
        let mut backoff = Backoff::default();
        let mut hint: Option<String> = None;
        // Some attempt may have taken effect, and its answer never came.
        let mut may_have_applied = false;
        let mut last: Option<Status> = None;

        loop {
            if Instant::now() >= until {
                return Err(out_of_time(last, may_have_applied));
            }
            let generation = router.generation();
            let route = router.route(&plan.target, hint.take().as_deref())?;
            if !route.no_forward && matches!(plan.target, Target::LeaderOf(_)) {
                self.refresh_behind(generation);
            }
            let attempt_until = if plan.waits {
                until
            } else {
                until.min(Instant::now() + self.inner.config.attempt_timeout)
            };
            let request = prepare(body.clone(), &route, until);
            let sent = timeout_at(attempt_until, send(route.channel, request)).await;
            let status = match sent {
                Ok(Ok(reply)) => {
                    router.mark_answered(&route.address);
                    return Ok(reply.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => {
                    may_have_applied |= plan.safety != Safety::Read;
                    router.mark_failed(&route.address);
                    let slow = Status::deadline_exceeded(format!(
                        "{} did not answer in time",
                        route.address
                    ));
                    if attempt_until >= until || plan.safety == Safety::Once {
                        return Err(out_of_time(Some(slow), may_have_applied));
                    }
                    last = Some(slow);
                    timeout_at(until, router.refresh(generation)).await.ok();
                    continue;
                }
            };

            let Judgement { verdict, harmless } = judge(&status, plan.safety);
            may_have_applied |= !harmless;
            let pause = match verdict {
                Verdict::GiveUp => {
                    // A timer on our side fired, in whichever layer.
                    if status.code() == Code::Cancelled && Instant::now() >= until {
                        return Err(out_of_time(last, may_have_applied));
                    }
                    return Err(match refused_size(&status, bytes) {
                        true => Error::message_too_large(status.message()),
                        false => Error::from_status(&status, may_have_applied),
                    });
                }
                Verdict::Redirect(leader) => {
                    if let Target::LeaderOf(key) = &plan.target {
                        router.learn_leader(key, leader.as_deref());
                    }
                    match leader {
                        Some(leader) => {
                            hint = Some(leader);
                            backoff.next_redirect()
                        }
                        None => {
                            timeout_at(until, router.refresh(generation)).await.ok();
                            backoff.next(None)
                        }
                    }
                }
                Verdict::Retry { node_failed, after } => {
                    if node_failed {
                        router.mark_failed(&route.address);
                        timeout_at(until, router.refresh(generation)).await.ok();
                    }
                    backoff.next(after)
                }
            };
            tracing::debug!(address = %route.address, %status, ?pause, "attempt failed");
            // A pause that outlasts the deadline cannot help; the server's own words do.
            if Instant::now() + pause >= until {
                return Err(given_up(status, may_have_applied));
            }
            last = Some(status);
            tokio::time::sleep(pause).await;
        }
    }
}

/// Adds what every attempt carries.
pub(crate) fn prepare<Q>(body: Q, route: &Route, until: Instant) -> Request<Q> {
    let mut request = describe(body, route);
    request.set_timeout(until.saturating_duration_since(Instant::now()));
    request
}

/// As [`prepare`], for streams, which have no deadline as a whole.
pub(crate) fn describe<Q>(body: Q, route: &Route) -> Request<Q> {
    let mut request = Request::new(body);
    let metadata = request.metadata_mut();
    metadata.insert("x-tombolo-client", MetadataValue::<Ascii>::from_static(CLIENT_NAME));
    if route.no_forward {
        metadata.insert("x-tombolo-no-forward", MetadataValue::from_static("1"));
    }
    request
}

/// The transport at the other end refused a request of so many bytes, and gave no reason. Its words
/// are the same for a reply that is too large for this end, so that the size must tell.
fn refused_size(status: &Status, bytes: usize) -> bool {
    matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted)
        && status.details().is_empty()
        && status.message().contains("message length too large")
        && status.message().contains(&format!(" {bytes} bytes"))
}

/// The deadline passed between or during attempts.
pub(crate) fn out_of_time(last: Option<Status>, outcome_unknown: bool) -> Error {
    let mut detail = Detail::new(Code::DeadlineExceeded, "deadline exceeded");
    if let Some(status) = last {
        let cause = Detail::from_status(&status);
        detail.message = format!("deadline exceeded; last: {}", cause.message);
        detail.reason = cause.reason;
        detail.metadata = cause.metadata;
    }
    Error::Deadline { detail, outcome_unknown, dot: None, token: Bytes::new() }
}

/// The deadline leaves no time for another attempt.
fn given_up(status: Status, outcome_unknown: bool) -> Error {
    match status.code() {
        Code::Cancelled => out_of_time(Some(status), outcome_unknown),
        _ => Error::from_status(&status, outcome_unknown),
    }
}
