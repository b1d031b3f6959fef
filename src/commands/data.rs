//! `put`, `get`, `delete`, `scan`: single keys, or a range of them.

use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{
    DotJson, Format, KeyEncoding, KeyJson, RevisionJson, VersionJson, base64, json, show_time,
    show_version, table, unbase64, value_text, versions_json,
};
use crate::session_file::SessionOptions;
use crate::write::{WriteOptions, parse_context, some_context};
use bytes::Bytes;
use futures::TryStreamExt;
use serde::Serialize;
use std::io::{Read, Write};
use std::time::{Duration, SystemTime};
use tombolo_client::{Consistency, Entry, Got, Version, Written};

/// Rows of a table whose widths are computed together.
const TABLE_ROWS: usize = 1000;

/// Stores a value
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo put greeting hello
  tombolo put photo @cat.jpg --ttl 30d
  date | tombolo put now - --ack-regions 1
  tombolo put cart '3 lemons' --context-token \"$context\"")]
pub struct Put {
    pub key: String,
    /// The value; - reads standard input, @FILE a file
    pub value: String,
    /// Replace exactly what the read with this context showed (base64, from get -o json)
    #[arg(long, value_name = "CONTEXT")]
    pub context_token: Option<String>,
    /// Let the value expire after this long
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub ttl: Option<Duration>,
    #[command(flatten)]
    pub write: WriteOptions,
    #[command(flatten)]
    pub connection: Connection,
}

/// Deletes a key
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo delete greeting
  tombolo delete cart --context-token \"$context\"")]
pub struct Delete {
    pub key: String,
    /// Delete exactly what the read with this context showed (base64, from get -o json)
    #[arg(long, value_name = "CONTEXT")]
    pub context_token: Option<String>,
    #[command(flatten)]
    pub write: WriteOptions,
    #[command(flatten)]
    pub connection: Connection,
}

/// Reads a key, or several
///
/// Several keys are rows of one table, or listed as scan lists them. Ends with code 3 if any of them is
/// absent; the others are shown all the same.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo get greeting
  tombolo get ada bob -o json
  tombolo get greeting --consistency stale:5s
  tombolo get ada --field address/city -n profiles")]
pub struct Get {
    /// One key, or several
    #[arg(required = true, value_name = "KEY")]
    pub keys: Vec<String>,
    /// linearizable, causal, local, or stale:DURATION [default: causal in a session, else
    /// linearizable]
    #[arg(long, value_name = "LEVEL", value_parser = parse_consistency)]
    pub consistency: Option<Consistency>,
    /// Fail with code 5 if concurrent writes left several values
    #[arg(long)]
    pub one: bool,
    /// Only this field of a map, or all under it: names with / between them
    #[arg(long, value_name = "PATH", value_parser = parse_path)]
    pub field: Option<FieldPath>,
    /// At most this many elements of a set or map
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub elements: u32,
    /// Go on where the elements of an earlier answer ended (base64, nextElementToken of -o json)
    #[arg(long, value_name = "TOKEN")]
    pub elements_from: Option<String>,
    /// Whether a set has this element: show only those it has
    #[arg(long, value_name = "ELEMENT")]
    pub element: Vec<String>,
    #[command(flatten)]
    pub session: SessionOptions,
    #[command(flatten)]
    pub connection: Connection,
}

/// Lists keys in byte order
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo scan cart: --limit 20
  tombolo scan --from 2026-01 --to 2026-02 --reverse
  tombolo scan -o raw | wc -l")]
pub struct Scan {
    /// Only keys that begin with this
    pub prefix: Option<String>,
    /// First key, inclusive
    #[arg(long, value_name = "KEY")]
    pub from: Option<String>,
    /// Last key, exclusive
    #[arg(long, value_name = "KEY")]
    pub to: Option<String>,
    /// At most this many keys; 0 means all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub limit: u64,
    /// From the last key to the first
    #[arg(long)]
    pub reverse: bool,
    /// Leave out the values
    #[arg(long)]
    pub keys_only: bool,
    /// linearizable, causal, local, or stale:DURATION [default: causal in a session, else
    /// linearizable]
    #[arg(long, value_name = "LEVEL", value_parser = parse_consistency)]
    pub consistency: Option<Consistency>,
    #[command(flatten)]
    pub session: SessionOptions,
    #[command(flatten)]
    pub connection: Connection,
}

/// Names of fields, from the outermost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldPath(pub Vec<String>);

/// Reads a path of fields: names with `/` between them.
pub(crate) fn parse_path(text: &str) -> Result<FieldPath, String> {
    let path: Vec<String> = text.split('/').map(str::to_owned).collect();
    if path.iter().any(String::is_empty) {
        return Err("a name in the path is empty".to_owned());
    }
    Ok(FieldPath(path))
}

/// Reads `--consistency`.
pub(crate) fn parse_consistency(text: &str) -> Result<Consistency, String> {
    match text {
        "linearizable" => Ok(Consistency::Linearizable),
        "causal" => Ok(Consistency::Causal),
        "local" => Ok(Consistency::Local),
        _ => text
            .strip_prefix("stale:")
            .and_then(|age| humantime::parse_duration(age).ok())
            .map(Consistency::MaxStaleness)
            .ok_or_else(|| "linearizable, causal, local, or stale:DURATION".into()),
    }
}

/// A value of the command line: itself, `-` for standard input, `@FILE` for a file.
pub(crate) fn read_value(text: &str, io: &mut Io) -> Result<Bytes, Failure> {
    if text == "-" {
        let mut value = Vec::new();
        io.input.read_to_end(&mut value)?;
        return Ok(value.into());
    }
    match text.strip_prefix('@') {
        Some(path) => std::fs::read(path)
            .map(Bytes::from)
            .map_err(|error| Failure::Other(format!("{path}: {error}"))),
        None => Ok(Bytes::copy_from_slice(text.as_bytes())),
    }
}

pub(crate) async fn put(args: &Put, io: &mut Io) -> Result<Exit, Failure> {
    let key = args.connection.key_encoding.parse(&args.key)?;
    let value = read_value(&args.value, io)?;
    let writing = args.write.begin(&args.connection, io).await?;
    let put = writing.keys.put(key, value).request_id(writing.id);
    let mut put = put.ack_regions(args.write.ack_regions);
    if let Some(context) = &args.context_token {
        put = put.context(some_context(parse_context(context)?)?);
    }
    if let Some(ttl) = args.ttl {
        put = put.ttl(ttl);
    }
    let format = args.connection.format(io);
    writing.finish(put, io, |written, io| print_written(written, format, io)).await
}

pub(crate) async fn delete(args: &Delete, io: &mut Io) -> Result<Exit, Failure> {
    let key = args.connection.key_encoding.parse(&args.key)?;
    let writing = args.write.begin(&args.connection, io).await?;
    let delete = writing.keys.delete(key).request_id(writing.id);
    let mut delete = delete.ack_regions(args.write.ack_regions);
    if let Some(context) = &args.context_token {
        delete = delete.context(some_context(parse_context(context)?)?);
    }
    let format = args.connection.format(io);
    writing.finish(delete, io, |written, io| print_written(written, format, io)).await
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WrittenJson {
    context: String,
    session_token: String,
    conflict: bool,
    dot: DotJson,
    write_time: String,
    hybrid_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<RevisionJson>,
}

pub(crate) fn print_written(
    written: &Written,
    format: Format,
    io: &mut Io,
) -> Result<Exit, Failure> {
    match format {
        Format::Json | Format::Jsonl => {
            let reply = WrittenJson {
                context: base64(&written.context),
                session_token: base64(&written.token),
                conflict: written.conflict,
                dot: written.dot.into(),
                write_time: show_time(written.time),
                hybrid_time: written.time.0.to_string(),
                revision: written.revision.map(RevisionJson::from),
            };
            json(&mut io.out, format, &reply)?;
        }
        Format::Table => {
            let conflict = if written.conflict { "yes" } else { "no" };
            let row = [written.dot.to_string(), show_time(written.time), conflict.into()];
            table(&mut io.out, ["DOT", "TIME", "CONFLICT"], [row])?;
        }
        Format::Raw => writeln!(io.out, "{}", written.dot)?,
    }
    Ok(Exit::Ok)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GotJson {
    #[serde(flatten)]
    key: KeyJson,
    versions: Vec<VersionJson>,
    context: String,
    session_token: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<RevisionJson>,
    #[serde(skip_serializing_if = "String::is_empty")]
    next_element_token: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    settle_time: Option<String>,
}

pub(crate) async fn get(args: &Get, io: &mut Io) -> Result<Exit, Failure> {
    let gots = match &args.keys[..] {
        [key] => vec![get_one(args, key, io).await?],
        keys => get_several(args, keys, io).await?,
    };
    let absent = gots.iter().filter(|got| got.versions.is_empty());
    let absent: Vec<_> = absent.map(|got| args.connection.key_encoding.show(&got.key)).collect();
    if absent.is_empty() { Ok(Exit::Ok) } else { Err(Failure::Absent(args.absent(&absent))) }
}

impl Get {
    /// Demands one value of each key with `--one`.
    fn check_conflicts(&self, gots: &[Got]) -> Result<(), Failure> {
        match gots.iter().find(|got| self.one && got.in_conflict()) {
            Some(got) => {
                let key = self.connection.key_encoding.show(&got.key);
                Err(Failure::Conflict { key, versions: got.versions.len() })
            }
            None => Ok(()),
        }
    }

    /// Says what is absent: where a part of the value was asked for, that part.
    fn absent(&self, keys: &[String]) -> String {
        match (keys, &self.field) {
            ([key], Some(FieldPath(path))) => {
                format!("field {} of key {key} is absent", path.join("/"))
            }
            ([key], None) if !self.element.is_empty() => {
                format!("key {key} has no element {}", self.element.join(", "))
            }
            ([key], None) => format!("key {key} is absent"),
            (keys, _) => format!("keys {} are absent", keys.join(", ")),
        }
    }

    /// Refuses what is about the value of one key.
    fn check_several(&self) -> Result<(), Failure> {
        let of_one = [
            ("--field", self.field.is_some()),
            ("--elements", self.elements > 0),
            ("--elements-from", self.elements_from.is_some()),
            ("--element", !self.element.is_empty()),
            ("-o raw", self.connection.output == Some(Format::Raw)),
        ];
        match of_one.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(Failure::Usage(format!(
                "{flag} is for one key: get the keys one by one, or leave it out"
            ))),
            None => Ok(()),
        }
    }
}

async fn get_one(args: &Get, key: &str, io: &mut Io) -> Result<Got, Failure> {
    let encoding = args.connection.key_encoding;
    let key = encoding.parse(key)?;
    let session = args.session.open()?;
    let (_client, keys) = args.connection.connect(io, None).await?;
    let mut get = session.enter(keys).get(key);
    if let Some(consistency) = args.consistency {
        get = get.consistency(consistency);
    }
    if let Some(FieldPath(path)) = &args.field {
        get = get.field(path);
    }
    if let Some(token) = &args.elements_from {
        let token =
            unbase64(token).map_err(|error| Failure::Usage(format!("--elements-from: {error}")))?;
        get = get.elements_from(token);
    }
    get = get.elements_max(args.elements).only_elements(&args.element);
    let got = get.await?;
    session.keep()?;

    // A value in a pipe is a value: `x=$(tombolo get key)`.
    let in_pipe = if io.out_is_tty { Format::Table } else { Format::Raw };
    let format = args.connection.output.unwrap_or(in_pipe);
    args.check_conflicts(std::slice::from_ref(&got))?;
    print_got(&got, format, encoding, io)?;
    Ok(got)
}

async fn get_several(args: &Get, keys: &[String], io: &mut Io) -> Result<Vec<Got>, Failure> {
    args.check_several()?;
    let encoding = args.connection.key_encoding;
    let keys: Vec<Bytes> = keys.iter().map(|key| encoding.parse(key)).collect::<Result<_, _>>()?;
    let session = args.session.open()?;
    let (_client, space) = args.connection.connect(io, None).await?;
    let mut get = session.enter(space).batch_get(keys);
    if let Some(consistency) = args.consistency {
        get = get.consistency(consistency);
    }
    let gots = get.await?;
    session.keep()?;

    args.check_conflicts(&gots)?;
    let format = args.connection.format(io);
    let mut printer = EntryPrinter::new(format, encoding, false);
    for got in &gots {
        if format == Format::Table {
            print_notes(got, &format!("{}: ", encoding.show(&got.key)), io)?;
        }
        printer.print(&entry_of(got), io)?;
    }
    printer.finish(io)?;
    Ok(gots)
}

/// A key of a batch as a scan lists it, and an absent one without versions.
fn entry_of(got: &Got) -> Entry {
    Entry {
        key: got.key.clone(),
        versions: got.versions.clone(),
        context: got.context.clone(),
        partial: got.partial,
        settle_time: got.settle_time,
    }
}

fn print_got(got: &Got, format: Format, encoding: KeyEncoding, io: &mut Io) -> Result<(), Failure> {
    match format {
        Format::Json | Format::Jsonl => {
            let reply = GotJson {
                key: encoding.json(&got.key),
                versions: versions_json(&got.versions, false),
                context: base64(&got.context),
                session_token: base64(&got.token),
                revision: got.revision.map(RevisionJson::from),
                next_element_token: base64(&got.next_elements),
                settle_time: got.settle_time.map(show_instant),
            };
            json(&mut io.out, format, &reply)?;
        }
        Format::Table => {
            print_notes(got, "", io)?;
            if !got.versions.is_empty() {
                table(&mut io.out, VERSION_COLUMNS, rows(&got.key, &got.versions, encoding))?;
            }
        }
        Format::Raw => {
            print_hidden(got, io)?;
            match got.versions.first() {
                Some(version) if version.typed.is_some() => {
                    writeln!(io.out, "{}", value_text(version))?;
                }
                Some(version) => io.out.write_all(&version.value)?,
                None => {}
            }
        }
    }
    Ok(())
}

/// What the one value of a raw answer hides.
fn print_hidden(got: &Got, io: &mut Io) -> std::io::Result<()> {
    if got.in_conflict() {
        let values = got.versions.len();
        let until = got.settle_time.map_or_else(String::new, |at| {
            format!(", until they are settled at {}", show_instant(at))
        });
        writeln!(
            io.err,
            "this is one of {values} concurrent values{until}; -o json has all, --one refuses them"
        )?;
    }
    Ok(())
}

/// What a table has no column for.
fn print_notes(got: &Got, place: &str, io: &mut Io) -> std::io::Result<()> {
    if got.partial {
        let rest = match got.next_elements.is_empty() {
            true => "a get of this key alone pages through them",
            false => "-o json has the token to go on with",
        };
        writeln!(io.err, "{place}there are more elements; {rest}")?;
    }
    print_settling(got.settle_time, place, io)
}

fn print_settling(at: Option<SystemTime>, place: &str, io: &mut Io) -> std::io::Result<()> {
    if let Some(at) = at {
        let at = show_instant(at);
        writeln!(io.err, "{place}these values wait to be settled; at {at} the first is taken")?;
    }
    Ok(())
}

fn show_instant(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

const VERSION_COLUMNS: [&str; 5] = ["KEY", "VALUE", "REGION", "TIME", "DOT"];

fn rows(key: &[u8], versions: &[Version], encoding: KeyEncoding) -> Vec<[String; 5]> {
    if versions.is_empty() {
        let [region, time, dot] = [const { String::new() }; 3];
        return vec![[encoding.show(key), "(absent)".to_owned(), region, time, dot]];
    }
    let row = |version: &Version| {
        [
            encoding.show(key),
            show_version(version),
            version.origin_region.clone(),
            show_time(version.time),
            version.dot.to_string(),
        ]
    };
    versions.iter().map(row).collect()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EntryJson {
    #[serde(flatten)]
    key: KeyJson,
    versions: Vec<VersionJson>,
    context: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    partial: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    settle_time: Option<String>,
}

pub(crate) async fn scan(args: &Scan, io: &mut Io) -> Result<Exit, Failure> {
    let encoding = args.connection.key_encoding;
    let format = args.connection.format(io);
    let bound = |text: &Option<String>| match text {
        Some(text) => encoding.parse(text).map(Some),
        None => Ok(None),
    };
    let session = args.session.open()?;
    let prefix = bound(&args.prefix)?.unwrap_or_default();
    let (from, to) = (bound(&args.from)?, bound(&args.to)?);
    let (_client, keys) = args.connection.connect(io, None).await?;
    let mut scan = session.enter(keys).scan().prefix(prefix).limit(args.limit);
    scan = match (from, to) {
        (Some(from), Some(to)) => scan.range(from..to),
        (Some(from), None) => scan.range(from..),
        (None, Some(to)) => scan.range(..to),
        (None, None) => scan,
    };
    if args.reverse {
        scan = scan.reverse();
    }
    // A raw listing shows keys only.
    if args.keys_only || format == Format::Raw {
        scan = scan.keys_only();
    }
    if let Some(consistency) = args.consistency {
        scan = scan.consistency(consistency);
    }

    let mut entries = scan.stream();
    let mut printer = EntryPrinter::new(format, encoding, args.keys_only);
    while let Some(entry) = entries.try_next().await? {
        if format == Format::Table && !args.keys_only {
            print_settling(entry.settle_time, &format!("{}: ", encoding.show(&entry.key)), io)?;
        }
        printer.print(&entry, io)?;
    }
    printer.finish(io)?;
    session.keep()?;
    Ok(Exit::Ok)
}

/// Prints entries as they come; a table in blocks, so that memory stays bounded.
struct EntryPrinter {
    format: Format,
    encoding: KeyEncoding,
    keys_only: bool,
    printed: u64,
    rows: Vec<[String; 5]>,
}

impl EntryPrinter {
    fn new(format: Format, encoding: KeyEncoding, keys_only: bool) -> Self {
        Self { format, encoding, keys_only, printed: 0, rows: Vec::new() }
    }

    fn print(&mut self, entry: &Entry, io: &mut Io) -> Result<(), Failure> {
        match self.format {
            Format::Json | Format::Jsonl => {
                let item = EntryJson {
                    key: self.encoding.json(&entry.key),
                    versions: versions_json(&entry.versions, self.keys_only),
                    context: base64(&entry.context),
                    partial: entry.partial,
                    settle_time: entry.settle_time.map(show_instant),
                };
                if self.format == Format::Json {
                    let lead = if self.printed == 0 { "{\"results\":[\n" } else { "," };
                    io.out.write_all(lead.as_bytes())?;
                }
                json(&mut io.out, Format::Jsonl, &item)?;
            }
            Format::Table => {
                self.rows.extend(rows(&entry.key, &entry.versions, self.encoding));
                if self.rows.len() >= TABLE_ROWS {
                    self.print_rows(io)?;
                }
            }
            Format::Raw => writeln!(io.out, "{}", self.encoding.show(&entry.key))?,
        }
        self.printed += 1;
        Ok(())
    }

    fn print_rows(&mut self, io: &mut Io) -> Result<(), Failure> {
        let rows = std::mem::take(&mut self.rows);
        if self.keys_only {
            let [key, _, region, time, dot] = VERSION_COLUMNS;
            let rows = rows.into_iter().map(|[key, _, region, time, dot]| [key, region, time, dot]);
            table(&mut io.out, [key, region, time, dot], rows)?;
        } else {
            table(&mut io.out, VERSION_COLUMNS, rows)?;
        }
        Ok(())
    }

    fn finish(&mut self, io: &mut Io) -> Result<(), Failure> {
        match self.format {
            Format::Json if self.printed == 0 => writeln!(io.out, "{{\"results\":[]}}")?,
            Format::Json => writeln!(io.out, "]}}")?,
            Format::Table if !self.rows.is_empty() => self.print_rows(io)?,
            Format::Table | Format::Jsonl | Format::Raw => {}
        }
        Ok(())
    }
}
