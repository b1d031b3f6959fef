//! `load`: puts the records of a file, many at a time.
//!
//! Loading a record twice changes nothing, so a load that stopped is simply continued. What the
//! resume file holds is the number of *leading* records that are acknowledged: records behind a
//! gap are put again.
//!
//! Invariants:
//! * Two records with the same key are never in flight together: the later one wins, as in the
//!   file.
//! * Memory: `concurrency` records in flight and as many waiting.
//! * After an error or Ctrl-C, everything in flight is waited for before the count is kept.

use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::lines::{LineFormat, Record};
use crate::output::{Format, json};
use crate::progress::Progress;
use crate::session_file::replace_file;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tombolo_client::{Error, Keyspace};

/// Rides out a change of leaders.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often the resume file is written.
const KEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Longest line: a value of 1 MiB in which every byte is escaped, and its key.
const LINE_BYTES_MAX: u64 = 8 << 20;
const RESUME_SUFFIX: &str = ".tombolo-load";

/// Puts the records of a file, one a line
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo load users.jsonl --concurrency 128
  tombolo load users.jsonl --resume
  zcat users.tsv.gz | tombolo load - --format tsv")]
pub struct Load {
    /// What to load; - is standard input
    pub file: PathBuf,
    /// Line format; auto goes by the file's name, then by its first line
    #[arg(long, value_enum, default_value = "auto")]
    pub format: LoadFormat,
    /// Records in flight at a time
    #[arg(long, value_name = "N", default_value = "64")]
    pub concurrency: NonZeroUsize,
    /// Skip the leading records that an earlier run has loaded, and keep count for the next
    #[arg(long)]
    pub resume: bool,
    /// Where the count is kept [default: FILE.tombolo-load]; implies --resume
    #[arg(long, value_name = "FILE")]
    pub resume_file: Option<PathBuf>,
    /// At most this many records a second
    #[arg(long, value_name = "N")]
    pub rate: Option<f64>,
    #[command(flatten)]
    pub connection: Connection,
}

/// `--format` of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadFormat {
    Auto,
    Jsonl,
    Tsv,
}

/// The resume file.
#[derive(Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// Leading records that are acknowledged.
    records: u64,
    namespace: String,
}

/// A record on its way, with where it came from.
struct Numbered {
    /// From 0, counting records only.
    index: u64,
    /// From 1, as editors count.
    line: u64,
    /// Bytes of input up to and including it.
    position: u64,
    record: Record,
}

pub(crate) async fn load(args: &Load, io: &mut Io) -> Result<Exit, Failure> {
    let from_stdin = args.file.as_os_str() == "-";
    let resume_path = args.resume_path(from_stdin)?;
    let name = if from_stdin { "standard input".into() } else { args.file.display().to_string() };
    let (_client, keys) = args.connection.connect(io, Some(TIMEOUT)).await?;
    let resuming = args.resume || args.resume_file.is_some();
    let skip = match &resume_path {
        Some(path) if resuming => read_kept(path, keys.name())?,
        Some(_) | None => 0,
    };

    let (input, total): (Box<dyn Read + Send>, Option<u64>) = if from_stdin {
        (std::mem::replace(&mut io.input, Box::new(std::io::empty())), None)
    } else {
        let file = std::fs::File::open(&args.file)
            .map_err(|error| Failure::Other(format!("{name}: {error}")))?;
        let total = file.metadata().ok().map(|it| it.len());
        (Box::new(file), total)
    };
    let reader = Reader { format: args.format, name: name.clone(), skip };
    let (sender, records) = mpsc::channel(args.concurrency.get());
    let file = args.file.clone();
    // A thread of its own: files block. It ends when the channel closes.
    let _reader = tokio::task::spawn_blocking(move || reader.run(&file, input, &sender));

    let mut loader = Loader {
        keys,
        name,
        acknowledged: Acknowledged { leading: skip, ahead: BTreeSet::new() },
        progress: Progress::new(io, total),
        keep_in: if resuming { resume_path.clone() } else { None },
        kept_at: Instant::now(),
    };
    let ended = loader.run(args, records, io).await;
    let summary = loader.progress.finish();
    let done = loader.acknowledged.leading;
    match ended {
        Ok(()) => {
            if let Some(path) = &loader.keep_in {
                std::fs::remove_file(path).ok();
            }
            match args.connection.output {
                Some(format @ (Format::Json | Format::Jsonl)) => {
                    json(&mut io.out, format, &summary)?;
                }
                Some(Format::Table | Format::Raw) | None => writeln!(io.err, "{}", summary.line())?,
            }
            Ok(Exit::Ok)
        }
        Err(failure) => {
            writeln!(io.err, "{}", summary.line())?;
            let how = match &resume_path {
                Some(path) => {
                    keep(path, done, loader.keys.name())
                        .map_err(|error| Failure::Other(format!("{}: {error}", path.display())))?;
                    let flag = match &args.resume_file {
                        Some(path) => format!("--resume-file {}", path.display()),
                        None => "--resume".into(),
                    };
                    format!("the first {done} records are loaded; continue with {flag}")
                }
                None => format!("the first {done} records are loaded; loading again is harmless"),
            };
            match failure {
                Failure::Interrupted(_) => Err(Failure::Interrupted(format!("; {how}"))),
                other => {
                    writeln!(io.err, "{how}")?;
                    Err(other)
                }
            }
        }
    }
}

impl Load {
    /// Where the count goes; `None` for standard input without `--resume-file`.
    fn resume_path(&self, from_stdin: bool) -> Result<Option<PathBuf>, Failure> {
        if let Some(path) = &self.resume_file {
            return Ok(Some(path.clone()));
        }
        if from_stdin {
            return match self.resume {
                true => Err(Failure::Usage("--resume of - needs --resume-file".into())),
                false => Ok(None),
            };
        }
        let mut path = self.file.as_os_str().to_owned();
        path.push(RESUME_SUFFIX);
        Ok(Some(path.into()))
    }
}

fn read_kept(path: &Path, namespace: &str) -> Result<u64, Failure> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Failure::Other(format!("{}: {error}", path.display()))),
    };
    let kept: Kept = serde_json::from_str(&text)
        .map_err(|error| Failure::Other(format!("{}: {error}", path.display())))?;
    if kept.namespace == namespace {
        Ok(kept.records)
    } else {
        let other = kept.namespace;
        Err(Failure::Usage(format!("{} is of a load into `{other}`", path.display())))
    }
}

fn keep(path: &Path, records: u64, namespace: &str) -> std::io::Result<()> {
    let kept = Kept { records, namespace: namespace.to_owned() };
    replace_file(path, &serde_json::to_vec(&kept).map_err(std::io::Error::other)?)
}

/// Which records are acknowledged.
#[derive(Debug, Default)]
struct Acknowledged {
    /// All before this one.
    leading: u64,
    /// And these, behind a gap. Bounded by the concurrency.
    ahead: BTreeSet<u64>,
}

impl Acknowledged {
    fn add(&mut self, index: u64) {
        self.ahead.insert(index);
        while self.ahead.remove(&self.leading) {
            self.leading += 1;
        }
    }
}

struct Loader {
    keys: Keyspace,
    name: String,
    acknowledged: Acknowledged,
    progress: Progress,
    keep_in: Option<PathBuf>,
    kept_at: Instant,
}

impl Loader {
    /// Loads until the input ends, a record fails, or the user interrupts. Returns when nothing
    /// is in flight.
    async fn run(
        &mut self,
        args: &Load,
        mut records: mpsc::Receiver<Result<Numbered, Failure>>,
        io: &mut Io,
    ) -> Result<(), Failure> {
        let interval = match args.rate {
            Some(rate) if rate.is_finite() && rate > 0.0 => Duration::from_secs_f64(1.0 / rate),
            Some(_) => return Err(Failure::Usage("--rate must be above 0".into())),
            None => Duration::ZERO,
        };
        let mut interrupt = std::mem::replace(&mut io.interrupt, Box::pin(std::future::pending()));
        let concurrency = args.concurrency.get();
        let mut next_at = Instant::now();
        let mut in_flight = FuturesUnordered::new();
        // Keys in flight; a record whose key is among them waits in `waiting`.
        let mut busy: BTreeMap<Bytes, ()> = BTreeMap::new();
        let mut waiting: Option<Numbered> = None;
        // `None` while all is well.
        let mut ended: Option<Result<(), Failure>> = None;

        loop {
            if ended.is_none()
                && in_flight.len() < concurrency
                && let Some(next) = waiting.take_if(|it| !busy.contains_key(&it.record.key))
            {
                busy.insert(next.record.key.clone(), ());
                in_flight.push(put(self.keys.clone(), next));
                next_at = (next_at + interval).max(Instant::now() - interval);
                continue;
            }
            if ended.is_some() {
                waiting = None;
                if in_flight.is_empty() {
                    return ended.unwrap_or(Ok(()));
                }
            }
            let may_read = ended.is_none() && waiting.is_none() && in_flight.len() < concurrency;
            tokio::select! {
                // Safe to drop: the channel keeps what is not received.
                read = async {
                    // Even a sleep until the past takes a tick of the timer, 1 ms.
                    if next_at > Instant::now() {
                        sleep_until(next_at).await;
                    }
                    records.recv().await
                }, if may_read => match read {
                    Some(Ok(next)) => waiting = Some(next),
                    Some(Err(failure)) => ended = Some(Err(failure)),
                    None => ended = Some(Ok(())),
                },
                Some((record, outcome)) = in_flight.next(), if !in_flight.is_empty() => {
                    busy.remove(&record.record.key);
                    match outcome {
                        Ok(()) => self.finished(&record, io)?,
                        Err(error) => {
                            let place = format!("{}:{}", self.name, record.line);
                            // The first failure is told; later ones are its company.
                            if !matches!(ended, Some(Err(_))) {
                                ended = Some(Err(Failure::Client { place, error }));
                            }
                        }
                    }
                }
                () = &mut interrupt, if ended.is_none() => {
                    ended = Some(Err(Failure::Interrupted(String::new())));
                }
            }
        }
    }

    fn finished(&mut self, done: &Numbered, io: &mut Io) -> Result<(), Failure> {
        self.acknowledged.add(done.index);
        let bytes = done.record.key.len() + done.record.value.len();
        self.progress.add(u64::try_from(bytes).unwrap_or(u64::MAX), done.position, io)?;
        if let Some(path) = &self.keep_in
            && self.kept_at.elapsed() >= KEEP_INTERVAL
        {
            self.kept_at = Instant::now();
            keep(path, self.acknowledged.leading, self.keys.name())
                .map_err(|error| Failure::Other(format!("{}: {error}", path.display())))?;
        }
        Ok(())
    }
}

async fn put(keys: Keyspace, record: Numbered) -> (Numbered, Result<(), Error>) {
    let Record { key, value } = &record.record;
    let outcome = keys.put(key, value).await.map(|_| ());
    (record, outcome)
}

/// Turns input into records, on a thread of its own.
struct Reader {
    format: LoadFormat,
    name: String,
    skip: u64,
}

impl Reader {
    fn run(
        &self,
        file: &Path,
        input: Box<dyn Read + Send>,
        sender: &mpsc::Sender<Result<Numbered, Failure>>,
    ) {
        if let Err(failure) = self.read(file, input, sender) {
            sender.blocking_send(Err(failure)).ok();
        }
    }

    fn read(
        &self,
        file: &Path,
        input: Box<dyn Read + Send>,
        sender: &mpsc::Sender<Result<Numbered, Failure>>,
    ) -> Result<(), Failure> {
        let mut input = BufReader::with_capacity(1 << 16, input);
        let mut format = match self.format {
            LoadFormat::Auto => by_name(file),
            LoadFormat::Jsonl => Some(LineFormat::Jsonl),
            LoadFormat::Tsv => Some(LineFormat::Tsv),
        };
        let (mut index, mut number, mut position) = (0u64, 0u64, 0u64);
        let mut line = Vec::new();
        loop {
            line.clear();
            number += 1;
            let fault =
                |problem: String| Failure::Other(format!("{}:{number}: {problem}", self.name));
            let mut bounded = (&mut input).take(LINE_BYTES_MAX);
            let length = bounded.read_until(b'\n', &mut line).map_err(|e| fault(e.to_string()))?;
            let length = u64::try_from(length).unwrap_or(u64::MAX);
            if length == 0 {
                return Ok(());
            }
            position += length;
            if line.last() == Some(&b'\n') {
                line.pop();
            } else if length == LINE_BYTES_MAX {
                return Err(fault(format!("a line longer than {LINE_BYTES_MAX} bytes")));
            }
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if line.is_empty() {
                continue;
            }
            let format = *format.get_or_insert_with(|| by_line(&line));
            index += 1;
            if index <= self.skip {
                continue;
            }
            let record = format.read(&line).map_err(fault)?;
            let next = Numbered { index: index - 1, line: number, position, record };
            if sender.blocking_send(Ok(next)).is_err() {
                return Ok(());
            }
        }
    }
}

fn by_name(file: &Path) -> Option<LineFormat> {
    match file.extension()?.to_str()? {
        "jsonl" | "ndjson" | "json" => Some(LineFormat::Jsonl),
        "tsv" | "tab" => Some(LineFormat::Tsv),
        _ => None,
    }
}

fn by_line(line: &[u8]) -> LineFormat {
    match line.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') if !line.contains(&b'\t') => LineFormat::Jsonl,
        _ => LineFormat::Tsv,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_leading_acknowledgements_count(order in Just((0..40u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut acknowledged = Acknowledged::default();
            let mut seen = BTreeSet::new();
            for index in order {
                acknowledged.add(index);
                seen.insert(index);
                let leading = (0..).take_while(|it| seen.contains(it)).count();
                prop_assert_eq!(acknowledged.leading, u64::try_from(leading).expect("small"));
            }
            prop_assert!(acknowledged.ahead.is_empty());
        }
    }

    #[test]
    fn the_format_is_found_by_name_or_by_the_first_line() {
        assert_eq!(by_name(Path::new("a.jsonl")), Some(LineFormat::Jsonl));
        assert_eq!(by_name(Path::new("a.tsv")), Some(LineFormat::Tsv));
        assert_eq!(by_name(Path::new("-")), None);
        assert_eq!(by_line(b"{\"key\":\"a\",\"value\":\"b\"}"), LineFormat::Jsonl);
        assert_eq!(by_line(b"{tag}key\tvalue"), LineFormat::Tsv);
    }
}
