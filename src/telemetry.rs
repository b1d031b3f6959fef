//! Logging of the process: one `tracing` subscriber that writes to standard error.
//!
//! Text for people on a terminal, JSON lines for collectors otherwise; times are RFC 3339 in UTC.
//! The filter can be changed while the process runs ([`Telemetry::set_filter`]). A panic is logged
//! like any other error, so that it reaches the collector too; what happens after it (unwinding or
//! abort) stays as it was.
//!
//! Not here: metrics (`tombolo_service::metrics`), what is logged where.

use crate::config::LogFormat;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal as _;
use std::panic::PanicHookInfo;
use tracing::level_filters::{LevelFilter, STATIC_MAX_LEVEL};
use tracing::{Subscriber, error};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt, reload};

/// Why logging could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// Correct the directive.
    #[error("log filter directive `{directive}` is not valid: {problem}")]
    Filter { directive: String, problem: String },
    /// Never retry: the process has another subscriber, or none any more.
    #[error("the process already has a log subscriber")]
    Init(#[from] TryInitError),
    #[error("the log subscriber is gone")]
    Gone(#[from] reload::Error),
}

/// The running subscriber's handle. Cheap to clone.
#[derive(Clone)]
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl Telemetry {
    /// Replaces the filter, at once and for all threads. On error the old one stays.
    pub fn set_filter(&self, directives: &str) -> Result<(), TelemetryError> {
        Ok(self.filter.reload(parse_filter(directives)?)?)
    }
}

/// Starts logging for the whole process and installs the panic hook. Call once, first.
pub fn init(format: LogFormat, filter: &str) -> Result<Telemetry, TelemetryError> {
    let terminal = std::io::stderr().is_terminal();
    let look = match format {
        LogFormat::Text => Look::Text { color: terminal && color_is_welcome() },
        LogFormat::Json => Look::Json,
        LogFormat::Auto if terminal => Look::Text { color: color_is_welcome() },
        LogFormat::Auto => Look::Json,
    };
    let (subscriber, telemetry) = subscriber(look, parse_filter(filter)?, std::io::stderr);
    subscriber.try_init()?;
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if tracing::enabled!(target: "tombolo::panic", tracing::Level::ERROR) {
            log_panic(panic);
        } else {
            default_hook(panic);
        }
    }));
    Ok(telemetry)
}

/// <https://no-color.org>
fn color_is_welcome() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[derive(Clone, Copy)]
enum Look {
    Text { color: bool },
    Json,
}

fn subscriber<W>(
    look: Look,
    filter: EnvFilter,
    writer: W,
) -> (impl Subscriber + Send + Sync + 'static, Telemetry)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(filter);
    let lines = fmt::layer().with_writer(writer);
    let lines = match look {
        Look::Text { color } => lines.with_ansi(color).boxed(),
        Look::Json => lines.json().flatten_event(true).boxed(),
    };
    (tracing_subscriber::registry().with(filter).with(lines), Telemetry { filter: handle })
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("(no message)");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    // Captured only when RUST_BACKTRACE asks for it, as the default hook does.
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        error!(target: "tombolo::panic", location, thread, %backtrace, "panic: {message}");
    } else {
        error!(target: "tombolo::panic", location, thread, "panic: {message}");
    }
}

/// Reads filter directives: `info`, `warn,tombolo_service=debug`, `off`.
///
/// Stricter than [`EnvFilter`]: a bare word must be a level. There `inof` would be a target with
/// all its messages on and everything else off, which nobody who mistypes a level wants.
pub fn parse_filter(directives: &str) -> Result<EnvFilter, TelemetryError> {
    let bad = |directive: &str, problem: String| TelemetryError::Filter {
        directive: directive.to_owned(),
        problem,
    };
    if directives.trim().is_empty() {
        return Err(bad(directives, "it is empty; \"off\" turns logging off".into()));
    }
    for directive in directives.split(',').map(str::trim) {
        // A span filter such as target[span{field=value,…}]=level may hold commas: leave those to
        // the parser below.
        if directives.contains(['[', '{']) {
            break;
        }
        let level = match directive.split_once('=') {
            Some((_, level)) => level,
            None => directive,
        };
        if level.trim().parse::<LevelFilter>().is_err() {
            let problem = "write a level (off, error, warn, info, debug, trace) or target=level";
            return Err(bad(directive, problem.into()));
        }
    }
    EnvFilter::builder().parse(directives).map_err(|error| bad(directives, error.to_string()))
}

/// What an operator should know about a filter that was accepted: levels this build left out.
pub fn filter_note(directives: &str) -> Option<String> {
    let wanted = parse_filter(directives).ok()?.max_level_hint()?;
    (STATIC_MAX_LEVEL < wanted)
        .then(|| format!("this build has no messages below {STATIC_MAX_LEVEL}: {wanted} adds none"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};
    use tracing::{info, warn};

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Captured {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Captured {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn json_lines_carry_utc_time_level_target_and_fields() {
        let out = Captured::default();
        let (subscriber, _) = subscriber(Look::Json, parse_filter("info").unwrap(), out.clone());

        tracing::subscriber::with_default(subscriber, || info!(shard = 3, "leader elected"));

        let line: serde_json::Value = serde_json::from_str(&out.text()).unwrap();
        assert_eq!(line["message"], "leader elected");
        assert_eq!(line["shard"], 3);
        assert_eq!(line["level"], "INFO");
        let time = line["timestamp"].as_str().unwrap();
        assert!(humantime::parse_rfc3339(time).is_ok() && time.ends_with('Z'), "{time}");
    }

    #[test]
    fn text_without_color_has_no_escape_sequences() {
        let out = Captured::default();
        let look = Look::Text { color: false };
        let (subscriber, _) = subscriber(look, parse_filter("info").unwrap(), out.clone());

        tracing::subscriber::with_default(subscriber, || info!("ready"));

        assert!(out.text().contains("INFO") && out.text().contains("ready"), "{}", out.text());
        assert!(!out.text().contains('\u{1b}'));
    }

    #[test]
    fn a_new_filter_takes_effect_at_once_and_a_bad_one_changes_nothing() {
        let out = Captured::default();
        let filter = parse_filter("warn").unwrap();
        let (subscriber, telemetry) = subscriber(Look::Json, filter, out.clone());

        tracing::subscriber::with_default(subscriber, || {
            info!("hidden");
            telemetry.set_filter("info").unwrap();
            info!("shown");
            telemetry.set_filter("inof").unwrap_err();
            info!("still shown");
            telemetry.set_filter("off").unwrap();
            warn!("silenced");
        });

        let text = out.text();
        assert!(!text.contains("hidden") && !text.contains("silenced"), "{text}");
        assert!(text.contains("shown") && text.contains("still shown"), "{text}");
    }

    #[test]
    fn a_mistyped_level_is_refused_by_name() {
        let message = |text: &str| parse_filter(text).unwrap_err().to_string();

        assert_eq!(
            message("info,tombolo=inof"),
            "log filter directive `tombolo=inof` is not valid: write a level (off, error, warn, \
             info, debug, trace) or target=level"
        );
        assert!(message("inof").contains("`inof`"));
        assert!(message(" ").contains("it is empty"));
        assert!(message("a[b").contains("`a[b`"));
    }

    #[test]
    fn usual_directives_are_accepted() {
        for text in ["info", "off", "WARN", "info,tombolo_shard=debug", "tombolo[span{a=1}]=info"] {
            assert!(parse_filter(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_panic_is_logged_with_its_message_and_place() {
        let out = Captured::default();
        let filter = parse_filter("error").unwrap();
        let (subscriber, _) = subscriber(Look::Json, filter, out.clone());
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(log_panic));

        tracing::subscriber::with_default(subscriber, || {
            std::panic::catch_unwind(|| panic!("disk on fire")).unwrap_err();
        });
        std::panic::set_hook(previous);

        let text = out.text();
        assert!(text.contains("panic: disk on fire") && text.contains("telemetry.rs"), "{text}");
    }
}
