//! Runs command lines in this process, against a fake region, with captured streams.

#![allow(dead_code, reason = "each test binary uses a part")]

use crate::fake::Region;
use clap::{CommandFactory, Parser};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use tombolo_commands::{DataCommand, Exit, Io};

#[derive(Parser)]
#[command(name = "tombolo")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: DataCommand,
}

/// How a command ended and what it said.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) exit: Exit,
    pub(crate) out: Vec<u8>,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn text(&self) -> String {
        assert_eq!(self.err, "", "nothing on standard error");
        String::from_utf8(self.out.clone()).expect("text")
    }
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Standard output whose reader is gone.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A command line about to run.
pub(crate) struct Line {
    words: Vec<String>,
    input: Vec<u8>,
    env: Vec<(String, String)>,
    tty: bool,
    closed: bool,
    interrupt: BoxFuture<'static, ()>,
}

/// `line` is split at blanks; a word may be replaced through [`Line::word`].
pub(crate) fn line(line: &str) -> Line {
    Line {
        words: std::iter::once("tombolo").chain(line.split(' ')).map(String::from).collect(),
        input: Vec::new(),
        env: Vec::new(),
        tty: false,
        closed: false,
        interrupt: Box::pin(std::future::pending()),
    }
}

impl Line {
    pub(crate) fn word(mut self, word: impl Into<PathBuf>) -> Self {
        self.words.push(word.into().into_os_string().into_string().expect("text"));
        self
    }

    pub(crate) fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// As if standard output were a terminal.
    pub(crate) fn on_tty(mut self) -> Self {
        self.tty = true;
        self
    }

    /// As if nobody read standard output any more.
    pub(crate) fn closed(mut self) -> Self {
        self.closed = true;
        self
    }

    pub(crate) fn interrupted_by(
        mut self,
        interrupt: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        self.interrupt = Box::pin(interrupt);
        self
    }

    /// Runs against the region's first node.
    pub(crate) async fn at(self, region: &Region) -> Ran {
        let address = region.addresses[0].clone();
        let mut ran = self.env("TOMBOLO_ENDPOINTS", address).run().await;
        for (at, address) in region.addresses.iter().enumerate() {
            // As long as any address with a port that the system chose.
            let name = format!("127.0.0.1:NODE{}", at + 1);
            ran.err = ran.err.replace(address, &name);
            if let Ok(text) = String::from_utf8(ran.out.clone()) {
                ran.out = text.replace(address, &name).into_bytes();
            }
        }
        ran
    }

    pub(crate) async fn run(self) -> Ran {
        let cli = Cli::try_parse_from(&self.words).expect("a valid command line");
        let (out, err) = (Sink::default(), Sink::default());
        let io = Io {
            out: if self.closed { Box::new(Closed) } else { Box::new(out.clone()) },
            err: Box::new(err.clone()),
            input: Box::new(std::io::Cursor::new(self.input)),
            out_is_tty: self.tty,
            err_is_tty: false,
            env: self.env.into_iter().collect(),
            interrupt: self.interrupt,
        };
        let exit = tombolo_commands::run(cli.command, Cli::command(), io).await;
        let (out, err) = (out.0.lock().clone(), err.0.lock().clone());
        Ran { exit, out, err: String::from_utf8(err).expect("text") }
    }
}
