//! The world as commands see it: standard streams, environment, Ctrl-C. Passed in, so that tests
//! own it.

use futures::future::{BoxFuture, FutureExt};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;

/// Streams, environment and interrupt of one command.
pub struct Io {
    pub out: Box<dyn Write + Send>,
    pub err: Box<dyn Write + Send>,
    pub input: Box<dyn Read + Send>,
    pub out_is_tty: bool,
    pub err_is_tty: bool,
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Resolves when the user wants to stop.
    pub interrupt: BoxFuture<'static, ()>,
}

impl Io {
    /// Those of this process.
    pub fn standard() -> Self {
        let interrupt = async {
            if tokio::signal::ctrl_c().await.is_err() {
                // Without a handler the system's own way to stop applies.
                std::future::pending::<()>().await;
            }
        };
        Self {
            out: Box::new(std::io::BufWriter::new(std::io::stdout())),
            err: Box::new(std::io::stderr()),
            input: Box::new(std::io::stdin()),
            out_is_tty: std::io::stdout().is_terminal(),
            err_is_tty: std::io::stderr().is_terminal(),
            env: std::env::vars_os()
                .filter_map(|(name, value)| {
                    Some((name.into_string().ok()?, value.into_string().ok()?))
                })
                .collect(),
            interrupt: interrupt.boxed(),
        }
    }

    pub(crate) fn env(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// `~/.config`, or where the user has it.
    pub(crate) fn config_dir(&self) -> Option<PathBuf> {
        let home = || self.env("HOME").map(|home| PathBuf::from(home).join(".config"));
        self.env("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home)
    }
}
