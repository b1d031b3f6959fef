//! Which cluster a command talks to.
//!
//! Strongest first: `--endpoint`, `--context`, `TOMBOLO_ENDPOINTS`, `TOMBOLO_CONTEXT`, the file's
//! `current` context, `127.0.0.1:7101`.

use crate::exit::Failure;
use crate::io::Io;
use crate::output::{Format, KeyEncoding};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tombolo_client::{Client, ClientConfig, Keyspace};

const DEFAULT_ENDPOINT: &str = "127.0.0.1:7101";
const DEFAULT_NAMESPACE: &str = "default";
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where to connect and how to print.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Connection {
    /// Nodes of one region, host:port; repeat or separate by commas [env: TOMBOLO_ENDPOINTS]
    #[arg(short, long, value_name = "ADDRESS", value_delimiter = ',', help_heading = "Connection")]
    pub endpoint: Vec<String>,
    /// A named connection of the contexts file [env: TOMBOLO_CONTEXT]
    #[arg(long, value_name = "NAME", help_heading = "Connection")]
    pub context: Option<String>,
    /// Namespace of the keys [default: the context's, else "default"]
    #[arg(short, long, value_name = "NAME", help_heading = "Connection")]
    pub namespace: Option<String>,
    /// Bounds each call with its retries [default: 5s; load and dump: 30s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, help_heading = "Connection")]
    pub timeout: Option<Duration>,
    /// How to print [default: table on a terminal, else jsonl]
    #[arg(short, long, value_enum, value_name = "FORMAT", help_heading = "Output")]
    pub output: Option<Format>,
    /// How keys are written on the command line and in output
    #[arg(long, value_enum, value_name = "ENCODING", default_value_t, help_heading = "Output")]
    pub key_encoding: KeyEncoding,
}

/// The contexts file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Contexts {
    current: Option<String>,
    contexts: BTreeMap<String, Context>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    endpoints: Vec<String>,
    namespace: Option<String>,
}

/// The outcome of the precedence rules.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) endpoints: Vec<String>,
    pub(crate) namespace: String,
}

impl Connection {
    /// The format to print in when `--output` does not say.
    pub(crate) fn format(&self, io: &Io) -> Format {
        self.output.unwrap_or(if io.out_is_tty { Format::Table } else { Format::Jsonl })
    }

    pub(crate) fn resolve(&self, io: &Io) -> Result<Resolved, Failure> {
        let plain = |endpoints: Vec<String>, namespace: Option<String>| Resolved {
            endpoints,
            namespace: (self.namespace.clone().or(namespace))
                .unwrap_or_else(|| DEFAULT_NAMESPACE.into()),
        };
        if !self.endpoint.is_empty() {
            return Ok(plain(self.endpoint.clone(), None));
        }
        let from_context = |name: &str, file: Contexts, path: PathBuf| {
            let known = file.contexts.get(name).cloned().ok_or_else(|| {
                let known: Vec<&str> = file.contexts.keys().map(String::as_str).collect();
                Failure::Usage(format!(
                    "no context `{name}` in {} (it has: {})",
                    path.display(),
                    if known.is_empty() { "none".into() } else { known.join(", ") }
                ))
            })?;
            Ok(plain(known.endpoints, known.namespace))
        };
        if let Some(name) = &self.context {
            let (file, path) = read_contexts(io)?;
            return from_context(name, file, path);
        }
        if let Some(list) = io.env("TOMBOLO_ENDPOINTS") {
            let endpoints = list.split(',').map(|it| it.trim().to_owned()).collect();
            return Ok(plain(endpoints, None));
        }
        if let Some(name) = io.env("TOMBOLO_CONTEXT") {
            let (file, path) = read_contexts(io)?;
            return from_context(name, file, path);
        }
        let (file, path) = read_contexts(io)?;
        match file.current.clone() {
            Some(name) => from_context(&name, file, path),
            None => Ok(plain(vec![DEFAULT_ENDPOINT.into()], None)),
        }
    }

    /// Connects to the region. `timeout` applies when `--timeout` does not.
    pub(crate) async fn connect(
        &self,
        io: &Io,
        timeout: Option<Duration>,
    ) -> Result<(Client, Keyspace), Failure> {
        let resolved = self.resolve(io)?;
        let asked = resolved.endpoints.join(", ");
        let config = ClientConfig {
            endpoints: resolved.endpoints,
            deadline: self.timeout.or(timeout).unwrap_or(DEFAULT_TIMEOUT),
            ..ClientConfig::default()
        };
        let client = Client::connect(config)
            .await
            .map_err(|error| Failure::Client { place: format!("connecting to {asked}"), error })?;
        let keys = client.namespace(resolved.namespace);
        Ok((client, keys))
    }
}

fn read_contexts(io: &Io) -> Result<(Contexts, PathBuf), Failure> {
    let named = io.env("TOMBOLO_CONTEXTS_FILE").map(PathBuf::from);
    let standard = || io.config_dir().map(|dir| dir.join("tombolo").join("contexts.toml"));
    let Some(path) = named.clone().or_else(standard) else {
        return Ok((Contexts::default(), PathBuf::from("contexts.toml")));
    };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
            return Ok((Contexts::default(), path));
        }
        Err(error) => return Err(Failure::Usage(format!("{}: {error}", path.display()))),
    };
    let file = toml::from_str(&text).map_err(|error| {
        Failure::Usage(format!("{}: {}", path.display(), error.to_string().trim_end()))
    })?;
    Ok((file, path))
}
