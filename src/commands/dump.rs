//! `dump`: all records of a namespace, one a line, in the order of their keys' bytes, so that the
//! dumps of regions that hold the same data are the same bytes. Memory: one page of the scan.

use crate::connection::Connection;
use crate::data::parse_consistency;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::lines::{LineFormat, Record};
use crate::progress::Progress;
use futures::TryStreamExt;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;
use tombolo_client::{Consistency, Entry};

/// Rides out a change of leaders.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Writes all records, one a line, sorted by key
///
/// A key with concurrent values is written with the newest of them; how many there were is said
/// at the end.
#[derive(Clone, Debug, clap::Args)]
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
    #[command(flatten)]
    pub connection: Connection,
}

pub(crate) async fn dump(args: &Dump, io: &mut Io) -> Result<Exit, Failure> {
    let prefix = args.connection.key_encoding.parse(args.prefix.as_deref().unwrap_or_default())?;
    let (_client, keys) = args.connection.connect(io, Some(TIMEOUT)).await?;
    let mut file = if args.file.as_os_str() == "-" {
        None
    } else {
        let file = std::fs::File::create(&args.file)
            .map_err(|error| Failure::Other(format!("{}: {error}", args.file.display())))?;
        Some(std::io::BufWriter::new(file))
    };
    let mut progress = Progress::new(io, None);
    let mut conflicts = 0u64;
    let mut line = Vec::new();
    let mut entries = keys.scan().prefix(prefix).consistency(args.consistency).stream();
    while let Some(entry) = entries.try_next().await? {
        conflicts += u64::from(entry.versions.len() > 1);
        let Some(record) = newest(entry) else { continue };
        line.clear();
        args.format.write(&record, &mut line);
        match &mut file {
            Some(file) => file.write_all(&line)?,
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

/// The same choice in every region: by time, then by dot.
fn newest(entry: Entry) -> Option<Record> {
    let newest = entry.versions.into_iter().max_by_key(|it| (it.time, it.dot))?;
    Some(Record { key: entry.key, value: newest.value })
}
