//! `dump`: all records of a namespace, one a line, in the order of their keys' bytes, so that the
//! dumps of regions that hold the same data are the same bytes. Memory: one page of the scan.

use crate::connection::Connection;
use crate::data::parse_consistency;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::lines::{LineFormat, Record};
use crate::progress::Progress;
use bytes::Bytes;
use futures::TryStreamExt;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Bound;
use std::path::PathBuf;
use std::time::Duration;
use tombolo_client::{Consistency, Entry};

/// Rides out a change of leaders.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How much of a file's end is read at a time to find its last line.
const TAIL_BYTES: u64 = 64 << 10;

/// Writes all records, one a line, sorted by key
///
/// A key with concurrent values is written with the newest of them; how many there were is said
/// at the end.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo dump users.jsonl
  tombolo dump users.jsonl --resume
  tombolo dump --prefix user: --format tsv | gzip > users.tsv.gz")]
pub struct Dump {
    /// Where to write; - is standard output
    #[arg(default_value = "-")]
    pub file: PathBuf,
    #[arg(long, value_enum, default_value = "jsonl")]
    pub format: LineFormat,
    /// Only keys that begin with this
    #[arg(long, value_name = "PREFIX")]
    pub prefix: Option<String>,
    /// linearizable, local, or stale:DURATION
    #[arg(long, value_name = "LEVEL", value_parser = parse_consistency, default_value = "linearizable")]
    pub consistency: Consistency,
    /// Go on behind the last whole line that FILE holds already
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    pub connection: Connection,
}

pub(crate) async fn dump(args: &Dump, io: &mut Io) -> Result<Exit, Failure> {
    let prefix = args.connection.key_encoding.parse(args.prefix.as_deref().unwrap_or_default())?;
    let (_client, keys) = args.connection.connect(io, Some(TIMEOUT)).await?;
    let (mut file, after) = args.open(&prefix)?;
    let mut progress = Progress::new(io, None);
    let mut conflicts = 0u64;
    let mut line = Vec::new();
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    let scan = keys.scan().prefix(prefix).range((from, Bound::Unbounded));
    let mut entries = scan.consistency(args.consistency).stream();
    while let Some(entry) = entries.try_next().await? {
        if entry.versions.iter().any(|version| version.typed.is_some()) {
            let text =
                "the namespace holds typed values, and the line formats have bytes only; use scan";
            return Err(Failure::Usage(text.into()));
        }
        conflicts += u64::from(entry.versions.len() > 1);
        let Some(record) = newest(entry) else { continue };
        line.clear();
        args.format.write(&record, &mut line);
        match &mut file {
            Some(file) => file.write_all(&line).map_err(|error| args.failed(&error))?,
            None => io.out.write_all(&line)?,
        }
        let bytes = u64::try_from(line.len()).unwrap_or(u64::MAX);
        progress.add(bytes, 0, io)?;
    }
    match &mut file {
        Some(file) => {
            file.flush()?;
            file.get_ref().sync_all()?;
        }
        None => io.out.flush()?,
    }
    writeln!(io.err, "{}", progress.finish().line())?;
    if conflicts > 0 {
        writeln!(
            io.err,
            "{conflicts} keys have concurrent values; the newest of each was written"
        )?;
    }
    Ok(Exit::Ok)
}

impl Dump {
    fn failed(&self, error: &dyn std::fmt::Display) -> Failure {
        Failure::Other(format!("{}: {error}", self.file.display()))
    }

    /// The file to write, none for standard output, and the key behind which to go on.
    fn open(&self, prefix: &[u8]) -> Result<(Option<BufWriter<File>>, Option<Bytes>), Failure> {
        if self.file.as_os_str() == "-" {
            return match self.resume {
                true => Err(Failure::Usage("--resume needs a FILE".into())),
                false => Ok((None, None)),
            };
        }
        let failed = |error: String| self.failed(&error);
        if !self.resume {
            let file = File::create(&self.file).map_err(|error| failed(error.to_string()))?;
            return Ok((Some(BufWriter::new(file)), None));
        }
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&self.file).map_err(|error| failed(error.to_string()))?;
        let last = cut_to_whole_lines(&mut file).map_err(|error| failed(error.to_string()))?;
        let Some(last) = last else { return Ok((Some(BufWriter::new(file)), None)) };
        let last = self.format.read(&last).map_err(|error| {
            failed(format!("cannot go on behind its last line: {error}; is --format the same?"))
        })?;
        if !last.key.starts_with(prefix) {
            return Err(failed("its last key does not begin with --prefix".into()));
        }
        Ok((Some(BufWriter::new(file)), Some(last.key)))
    }
}

/// Cuts off what follows the last line end, moves to the end, and answers the last line. Reads
/// backwards, so the time does not depend on the file's size.
fn cut_to_whole_lines(file: &mut File) -> std::io::Result<Option<Vec<u8>>> {
    let mut start = file.seek(SeekFrom::End(0))?;
    let mut tail: Vec<u8> = Vec::new();
    let line_end = |byte: &u8| *byte == b'\n';
    loop {
        let end = tail.iter().rposition(line_end);
        let begin = end.and_then(|end| tail[..end].iter().rposition(line_end));
        if begin.is_none() && start > 0 {
            let step = start.min(TAIL_BYTES);
            start -= step;
            file.seek(SeekFrom::Start(start))?;
            let mut block = Vec::new();
            Read::by_ref(file).take(step).read_to_end(&mut block)?;
            block.append(&mut tail);
            tail = block;
            continue;
        }
        let whole = end.map_or(0, |end| end + 1);
        file.set_len(start + whole as u64)?;
        file.seek(SeekFrom::End(0))?;
        return Ok(end.map(|end| tail[begin.map_or(0, |begin| begin + 1)..end].to_vec()));
    }
}

/// The same choice in every region: by time, then by dot.
fn newest(entry: Entry) -> Option<Record> {
    let newest = entry.versions.into_iter().max_by_key(|it| (it.time, it.dot))?;
    Some(Record { key: entry.key, value: newest.value })
}
