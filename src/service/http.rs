//! The HTTP port of a node: probes, metrics and the log filter.
//!
//! `/livez` says that the process runs and answers: when it does not, a restart helps. `/readyz`
//! says that clients may be sent here; it runs the checks that the node registered in [`Checks`].
//!
//! Invariants:
//! * Readiness never looks at other regions: a cut between regions must not take each of them out
//!   of its own load balancer.
//! * A draining node is not ready, before anything else about it changes.
//! * Handlers never block and never panic on bad input.
//!
//! Not here: what makes a node ready (the node knows), gRPC health (it follows [`Checks::run`]).

use crate::metrics::{self, Metrics};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use parking_lot::{Mutex, RwLock};
use serde_json::json;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long open requests may take after the server was told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a changed log filter holds when the request does not say.
const LOG_FILTER_DEFAULT: Duration = Duration::from_secs(10 * 60);
const LOG_FILTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const LOG_FILTER_BODY_BYTES_MAX: usize = 4096;

/// What `GET /` and the answer to unknown paths list.
const PATHS: &str = "\
GET    /livez                      the process runs
GET    /readyz?verbose&exclude=X   this node can serve clients (JSON with Accept: application/json)
GET    /metrics                    metrics for Prometheus
GET    /admin/log-filter           the log filter now
PUT    /admin/log-filter?for=10m   another log filter for a while; body: info,tombolo_shard=debug
DELETE /admin/log-filter           back to the configured log filter
";

/// Decides whether the node is ready. `Err` says why not, for an operator.
pub type Check = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The readiness checks of a node. Share it in an `Arc`.
#[derive(Default)]
pub struct Checks {
    checks: RwLock<Vec<(String, Check)>>,
    draining: AtomicBool,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    pub name: String,
    /// Why the check failed; `None` when it did not.
    pub problem: Option<String>,
}

impl Checks {
    /// Adds a check, or replaces the one of that name. It runs at each probe, in the order of
    /// adding, and must not block: look at numbers that are kept up to date elsewhere.
    pub fn add(&self, name: impl Into<String>, check: Check) {
        let name = name.into();
        let mut checks = self.checks.write();
        match checks.iter_mut().find(|(existing, _)| *existing == name) {
            Some((_, existing)) => *existing = check,
            None => checks.push((name, check)),
        }
    }

    /// From now on the node is not ready, whatever the checks say. There is no way back.
    pub fn start_drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Runs every check that is not in `exclude`. The drain always counts.
    pub fn run(&self, exclude: &[String]) -> Vec<CheckResult> {
        let draining = self.draining.load(Ordering::SeqCst);
        let drain = CheckResult {
            name: "drain".to_owned(),
            problem: draining.then(|| "the node is draining".to_owned()),
        };
        let checks = self.checks.read();
        let included = checks.iter().filter(|(name, _)| !exclude.contains(name));
        let results = included
            .map(|(name, check)| CheckResult { name: name.clone(), problem: check().err() });
        std::iter::once(drain).chain(results).collect()
    }

    /// Whether all checks pass.
    pub fn is_ready(&self) -> bool {
        self.run(&[]).iter().all(|result| result.problem.is_none())
    }
}

/// Puts log filter directives in force, or says why they cannot be.
type Apply = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// The log filter of the process, which may be replaced for a while. Share it in an `Arc`.
pub struct LogFilter {
    configured: String,
    apply: Apply,
    replaced: Mutex<Option<Replaced>>,
}

struct Replaced {
    directives: String,
    until: Instant,
    /// The task that puts the configured filter back.
    expiry: AbortHandle,
}

impl LogFilter {
    /// `configured` is in force already; `apply` replaces it in the whole process, and changes
    /// nothing when it fails.
    pub fn new(
        configured: impl Into<String>,
        apply: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        let apply = Box::new(apply);
        Self { configured: configured.into(), apply, replaced: Mutex::new(None) }
    }

    /// Replaces the filter for `period`. Call within a Tokio runtime.
    fn replace(self: &Arc<Self>, directives: &str, period: Duration) -> Result<(), String> {
        let mut replaced = self.replaced.lock();
        (self.apply)(directives)?;
        let until = Instant::now() + period;
        // Weak: a stopped server does not live on until its filter expires.
        let filter = Arc::downgrade(self);
        let expiry = tokio::spawn(async move {
            tokio::time::sleep_until(until).await;
            if let Some(filter) = filter.upgrade()
                && let Err(error) = filter.restore(Some(until))
            {
                tracing::error!(error, "could not put the configured log filter back");
            }
        });
        let expiry = expiry.abort_handle();
        let now = Replaced { directives: directives.to_owned(), until, expiry };
        if let Some(before) = replaced.replace(now) {
            before.expiry.abort();
        }
        Ok(())
    }

    /// Puts the configured filter back; with `only`, only if the replacement ends at that time
    /// (a task that was just aborted may still get here).
    fn restore(&self, only: Option<Instant>) -> Result<(), String> {
        let mut replaced = self.replaced.lock();
        match &*replaced {
            Some(now) if only.is_none_or(|until| until == now.until) => {}
            Some(_) | None => return Ok(()),
        }
        (self.apply)(&self.configured)?;
        if let Some(before) = replaced.take()
            && only.is_none()
        {
            before.expiry.abort();
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let configured = &self.configured;
        match &*self.replaced.lock() {
            Some(now) => {
                let seconds = now.until.saturating_duration_since(Instant::now()).as_secs();
                format!("{}\nfor {seconds} s more, then {configured}\n", now.directives)
            }
            None => format!("{configured}\nas configured\n"),
        }
    }
}

/// What the handlers work on.
#[derive(Clone)]
pub struct HttpState {
    pub metrics: Arc<Metrics>,
    pub checks: Arc<Checks>,
    pub log_filter: Arc<LogFilter>,
}

/// The routes of the HTTP port; others may be merged into it.
pub fn router(state: HttpState) -> Router {
    let log_filter = put(put_log_filter).get(get_log_filter).delete(delete_log_filter);
    Router::new()
        .route("/", get(async || PATHS))
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(get_readyz))
        .route("/metrics", get(get_metrics))
        .route(
            "/admin/log-filter",
            log_filter.layer(DefaultBodyLimit::max(LOG_FILTER_BODY_BYTES_MAX)),
        )
        .fallback(async || (StatusCode::NOT_FOUND, format!("no such path; there are:\n{PATHS}")))
        .method_not_allowed_fallback(async || {
            (StatusCode::METHOD_NOT_ALLOWED, format!("no such method here; there are:\n{PATHS}"))
        })
        .with_state(state)
}

/// Serves `router` until `shutdown` fires, then lets open requests end, for two seconds at most.
///
/// # Errors
/// When the listener fails in a way that does not pass.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let stop = shutdown.clone().cancelled_owned();
    let server = axum::serve(listener, router).with_graceful_shutdown(stop);
    tokio::select! {
        result = async { server.await } => result,
        () = async {
            shutdown.cancelled().await;
            tokio::time::sleep(STOP_TIMEOUT).await;
        } => {
            tracing::warn!("HTTP requests were still open when the server stopped");
            Ok(())
        }
    }
}

/// Query parameters as they came; a flag such as `?verbose` has an empty value.
type Parameters = Query<Vec<(String, String)>>;

async fn get_readyz(
    State(state): State<HttpState>,
    Query(parameters): Parameters,
    headers: HeaderMap,
) -> Response {
    let verbose = parameters.iter().any(|(name, value)| name == "verbose" && value != "false");
    let exclude: Vec<String> = parameters
        .iter()
        .filter(|(name, _)| name == "exclude")
        .flat_map(|(_, names)| names.split(','))
        .map(|name| name.trim().to_owned())
        .collect();
    let results = state.checks.run(&exclude);
    let ready = results.iter().all(|result| result.problem.is_none());
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };

    let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let (kind, body) = if accept.contains("application/json") {
        ("application/json", readiness_json(ready, &results))
    } else {
        ("text/plain; charset=utf-8", readiness_text(ready, verbose, &results))
    };
    (status, [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store")], body).into_response()
}

fn readiness_json(ready: bool, results: &[CheckResult]) -> String {
    let check = |result: &CheckResult| {
        let (name, problem) = (&result.name, &result.problem);
        json!({ "name": name, "ok": problem.is_none(), "problem": problem })
    };
    let checks: Vec<_> = results.iter().map(check).collect();
    format!("{}\n", json!({ "ready": ready, "checks": checks }))
}

/// One line for each check, failed ones even when not `verbose`.
fn readiness_text(ready: bool, verbose: bool, results: &[CheckResult]) -> String {
    let mut out = String::new();
    for result in results {
        match &result.problem {
            Some(problem) => out += &format!("[-]{} failed: {problem}\n", result.name),
            None if verbose => out += &format!("[+]{} ok\n", result.name),
            None => {}
        }
    }
    out += if ready { "ready\n" } else { "not ready\n" };
    out
}

async fn get_metrics(State(state): State<HttpState>) -> Response {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], state.metrics.render()).into_response()
}

async fn get_log_filter(State(state): State<HttpState>) -> String {
    state.log_filter.describe()
}

async fn put_log_filter(
    State(state): State<HttpState>,
    Query(parameters): Parameters,
    body: Bytes,
) -> Result<String, (StatusCode, String)> {
    let bad = |problem: String| (StatusCode::BAD_REQUEST, format!("{problem}\n"));
    let period = match parameters.iter().find(|(name, _)| name == "for") {
        Some((_, text)) => parse_period(text).map_err(bad)?,
        None => LOG_FILTER_DEFAULT,
    };
    let directives = std::str::from_utf8(&body)
        .map_err(|_| bad("the body is not UTF-8 text; send directives such as info".into()))?
        .trim();
    state.log_filter.replace(directives, period).map_err(bad)?;
    tracing::warn!(directives, period_seconds = period.as_secs(), "log filter was replaced");
    Ok(state.log_filter.describe())
}

async fn delete_log_filter(State(state): State<HttpState>) -> Result<String, (StatusCode, String)> {
    let failed = |problem| (StatusCode::INTERNAL_SERVER_ERROR, format!("{problem}\n"));
    state.log_filter.restore(None).map_err(failed)?;
    Ok(state.log_filter.describe())
}

/// Reads `90s`, `10m` or `2h`; more than zero, a day at most.
fn parse_period(text: &str) -> Result<Duration, String> {
    let problem = || format!("for={text} is not a time from 1s to 24h; write 90s, 10m or 2h");
    let unit_seconds = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some(_) | None => return Err(problem()),
    };
    let count: u64 = text[..text.len() - 1].parse().map_err(|_| problem())?;
    let period = Duration::from_secs(count.checked_mul(unit_seconds).ok_or_else(problem)?);
    if period.is_zero() || LOG_FILTER_MAX < period { Err(problem()) } else { Ok(period) }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
