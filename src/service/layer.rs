//! What happens to every client request before and after its handler: admission and counting.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use tokio::sync::Semaphore;
use tonic::{Code, Status, codegen::http};
use tower::{Layer, Service};

use crate::{metrics::Metrics, reason::Reason};

/// Which requests are let in. Share it in an `Arc`.
pub struct Admission {
    metrics: Arc<Metrics>,
    in_flight: Arc<Semaphore>,
    in_flight_max: usize,
    draining: AtomicBool,
}

impl Admission {
    /// Lets in at most `in_flight_max` requests at a time.
    pub fn new(metrics: Arc<Metrics>, in_flight_max: usize) -> Arc<Self> {
        let in_flight = Arc::new(Semaphore::new(in_flight_max));
        Arc::new(Self { metrics, in_flight, in_flight_max, draining: AtomicBool::new(false) })
    }

    /// From now on refuses new requests, so that clients turn to other nodes.
    pub fn start_drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    fn refusal(&self) -> Option<Status> {
        self.draining
            .load(Ordering::SeqCst)
            .then(|| Reason::Draining.status("this node is stopping; use another", &[]))
    }
}

/// Adds [`Admission`] to a gRPC server.
#[derive(Clone)]
pub struct AdmissionLayer(pub Arc<Admission>);

impl<S> Layer<S> for AdmissionLayer {
    type Service = Admitted<S>;

    fn layer(&self, inner: S) -> Admitted<S> {
        Admitted { admission: Arc::clone(&self.0), inner }
    }
}

/// A gRPC service behind [`Admission`].
#[derive(Clone)]
pub struct Admitted<S> {
    admission: Arc<Admission>,
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for Admitted<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let (admission, path) = (&self.admission, request.uri().path());
        // Health, reflection and status answer while draining and under overload.
        if !path.starts_with("/tombolo.v1.KvService/") {
            let answer = self.inner.call(request);
            return Box::pin(async move { answer.await.map(name_size) });
        }
        let guard = admission.metrics.rpc(method_label(path));
        if let Some(status) = admission.refusal() {
            guard.finish(status.code(), Reason::of(&status));
            return Box::pin(async move { Ok(status.into_http()) });
        }
        let Ok(permit) = Arc::clone(&admission.in_flight).try_acquire_owned() else {
            let status = Reason::Overloaded.status(
                format!("{} requests are in work, which is the limit", admission.in_flight_max),
                &[],
            );
            guard.finish(status.code(), Reason::of(&status));
            return Box::pin(async move { Ok(status.into_http()) });
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let response = answer.await.map(name_size);
            drop(permit);
            match &response {
                Ok(response) => match Status::from_header_map(response.headers()) {
                    Some(status) => guard.finish(status.code(), Reason::of(&status)),
                    None => guard.finish(Code::Ok, None),
                },
                Err(_) => guard.finish(Code::Internal, None),
            }
            response
        })
    }
}

/// Gives the refusal of a request that is larger than the limit its reason: the transport refuses it
/// before any handler sees it.
fn name_size<R: Default>(response: http::Response<R>) -> http::Response<R> {
    match Status::from_header_map(response.headers()) {
        Some(status)
            if status.code() == Code::OutOfRange
                && status.details().is_empty()
                && status.message().contains("decoded message length too large") =>
        {
            let message = format!("{}; `limits.max_message_bytes` sets it", status.message());
            Reason::MessageTooLarge.status(message, &[]).into_http()
        }
        Some(_) | None => response,
    }
}

/// The label of a method, from a fixed set.
fn method_label(path: &str) -> &'static str {
    match path.rsplit('/').next() {
        Some("Get") => "Get",
        Some("BatchGet") => "BatchGet",
        Some("Scan") => "Scan",
        Some("Put") => "Put",
        Some("Delete") => "Delete",
        Some("Mutate") => "Mutate",
        Some("Commit") => "Commit",
        Some("AwaitReplication") => "AwaitReplication",
        Some(_) | None => "other",
    }
}
