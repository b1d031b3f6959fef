//! Progress of a long command: a bar on a terminal, else a line every few seconds.

use crate::io::Io;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, Instant};

const LINE_INTERVAL: Duration = Duration::from_secs(5);

pub(crate) struct Progress {
    begin: Instant,
    last_line: Instant,
    records: u64,
    bytes: u64,
    bar: Option<ProgressBar>,
}

/// What was done, as `-o json` prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Summary {
    pub(crate) records: u64,
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) records_per_second: f64,
}

impl Progress {
    /// `total_bytes` of input, if known: the bar then shows a share.
    pub(crate) fn new(io: &Io, total_bytes: Option<u64>) -> Self {
        let bar = io.err_is_tty.then(|| {
            let bar = match total_bytes {
                Some(bytes) => ProgressBar::new(bytes),
                None => ProgressBar::new_spinner(),
            };
            bar.set_draw_target(ProgressDrawTarget::stderr());
            let template = match total_bytes {
                Some(_) => "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta} {msg}",
                None => "{spinner} {bytes} {bytes_per_sec} {msg}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        });
        let begin = Instant::now();
        Self { begin, last_line: begin, records: 0, bytes: 0, bar }
    }

    /// Counts a finished record. `position`: how much of the total is done.
    pub(crate) fn add(&mut self, bytes: u64, position: u64, io: &mut Io) -> std::io::Result<()> {
        self.records += 1;
        self.bytes += bytes;
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            if self.records.is_multiple_of(64) {
                bar.set_message(format!("{} records", self.records));
            }
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            writeln!(io.err, "{}", self.summary().line())?;
        }
        Ok(())
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) -> Summary {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.summary()
    }

    fn summary(&self) -> Summary {
        let seconds = self.begin.elapsed().as_secs_f64();
        #[allow(clippy::cast_precision_loss, reason = "a rate to show")]
        let records_per_second = self.records as f64 / seconds.max(1e-6);
        Summary { records: self.records, bytes: self.bytes, seconds, records_per_second }
    }
}

impl Summary {
    pub(crate) fn line(&self) -> String {
        let Self { records, bytes, seconds, records_per_second } = self;
        format!("{records} records, {bytes} bytes, {seconds:.1} s, {records_per_second:.0} ops/s")
    }
}
