//! A clock that tests can jump: `TOMBOLO_CLOCK_OFFSET_FILE` names a file with a signed number of
//! milliseconds by which this node's wall clock is off.
//!
//! The file is read again whenever it changes, so that a fault test moves a running node's clock by
//! writing it, and the clock jumps as a machine's would. If the variable names a directory, the node's
//! file is `REGION-NODE` in it (`us-1`), as many nodes are often started from one environment; a node
//! whose file is not there is not off.
//!
//! Invariants:
//! * Without the variable nothing is ever off. With it, the log says so at the start.
//! * What cannot be read is an error at the start, and later changes nothing.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use tokio_util::sync::CancellationToken;
use tombolo_shard::Clock;

use crate::config::Config;

/// The variable.
pub(crate) const VARIABLE: &str = "TOMBOLO_CLOCK_OFFSET_FILE";
const INTERVAL: Duration = Duration::from_millis(50);
/// Ten years: whatever is longer is no clock error but a slip.
const OFFSET_MS_MAX: u64 = 10 * 365 * 24 * 3_600_000;

/// The file of one node.
pub(crate) struct OffsetFile {
    path: PathBuf,
    /// A missing file means that the clock is right.
    is_optional: bool,
}

impl OffsetFile {
    /// The file that the environment names for this node, and what is in it; `None` if it names none.
    ///
    /// # Errors
    /// If the file is not there or holds something else.
    pub(crate) fn of(
        config: &Config,
        variable: Option<PathBuf>,
    ) -> anyhow::Result<Option<(Self, i64)>> {
        let Some(named) = variable else { return Ok(None) };
        let is_optional = named.is_dir();
        let path = if is_optional {
            named.join(format!("{}-{}", config.region, config.node_id))
        } else {
            named
        };
        let file = Self { path, is_optional };
        let offset_ms =
            file.read().with_context(|| format!("{VARIABLE}: {}", file.path.display()))?;
        tracing::warn!(
            file = %file.path.display(),
            offset_ms,
            "the wall clock can be moved by {VARIABLE}: for tests only"
        );
        Ok(Some((file, offset_ms)))
    }

    fn read(&self) -> anyhow::Result<i64> {
        match fs::read_to_string(&self.path) {
            Ok(text) => parse(&text),
            Err(error) if self.is_optional && error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Moves `clock` whenever the file changes, until `shutdown` fires.
    pub(crate) async fn follow(
        self,
        clock: Arc<Clock>,
        mut current_ms: i64,
        shutdown: CancellationToken,
    ) {
        let mut ticks = tokio::time::interval(INTERVAL);
        let mut is_readable = true;
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            // A few bytes on a local disk.
            match self.read() {
                Ok(offset_ms) => {
                    is_readable = true;
                    if offset_ms != current_ms {
                        tracing::warn!(offset_ms, "the wall clock was moved by {VARIABLE}");
                        current_ms = offset_ms;
                        clock.set_offset_ms(offset_ms);
                    }
                }
                Err(error) if is_readable => {
                    is_readable = false;
                    let file = Path::display(&self.path);
                    tracing::error!(%file, %error, current_ms, "no clock offset; kept the last");
                }
                Err(_) => {}
            }
        }
    }
}

fn parse(text: &str) -> anyhow::Result<i64> {
    let text = text.trim();
    let offset_ms: i64 = text
        .parse()
        .ok()
        .with_context(|| format!("`{:.40}` is no signed number of milliseconds", text))?;
    if offset_ms.unsigned_abs() > OFFSET_MS_MAX {
        bail!("{offset_ms} ms is more than ten years");
    }
    Ok(offset_ms)
}

#[cfg(test)]
mod tests {
    use tombolo_core::NodeId;

    use super::*;

    #[test]
    fn a_file_holds_a_signed_number_of_milliseconds() {
        for (text, offset_ms) in [("0", 0), ("-28800000\n", -28_800_000), (" +250 ", 250)] {
            assert_eq!(parse(text).unwrap(), offset_ms);
        }
        for bad in ["", "8h", "1.5", "--1", "99999999999999999999", "400000000000"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_running_clock_follows_the_file_and_keeps_the_last_offset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("offset");
        fs::write(&path, "3600000").unwrap();
        let file = OffsetFile { path: path.clone(), is_optional: false };
        let clock = Arc::new(Clock::new(NodeId(1), 1, Duration::from_millis(500)));
        let machine_us = clock.wall_us();
        let stop = CancellationToken::new();
        let following = tokio::spawn(file.follow(Arc::clone(&clock), 0, stop.clone()));
        let hours = async |hours: u64| {
            while clock.wall_us().abs_diff(machine_us) / 3_600_000_000 != hours {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        hours(1).await;
        fs::write(&path, "no number").unwrap();
        fs::write(&path, "-28800000").unwrap();
        let back = async {
            while clock.wall_us() > machine_us {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        back.await;
        fs::remove_file(&path).unwrap();
        fs::write(&path, "7200000").unwrap();
        hours(2).await;
        stop.cancel();
        following.await.unwrap();
    }

    #[test]
    fn a_directory_holds_a_file_for_each_node_that_is_off() {
        let dir = tempfile::tempdir().unwrap();
        let missing = OffsetFile { path: dir.path().join("us-1"), is_optional: true };
        assert_eq!(missing.read().unwrap(), 0);
        assert!(OffsetFile { is_optional: false, ..missing }.read().is_err());
    }
}
