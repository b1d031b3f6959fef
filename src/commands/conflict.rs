//! `ctl conflict`: what was dropped, which keys hold several values, and settling both.
//!
//! Two steps, so that nobody overwrites what they have not seen: `show` prints what a key holds and a
//! context; `restore` and `resolve` send it back and are refused if the key was written in between.

use crate::connection::Connection;
use crate::ctl::{warn_unreachable, word};
use crate::data::{print_written, read_value};
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::lines::escape;
use crate::output::{
    Format, KeyEncoding, KeyJson, VersionJson, base64, json, json_list, show_time, show_value,
    table, version_json,
};
use crate::session_file::SessionOptions;
use crate::write::parse_context;
use bytes::Bytes;
use clap::Subcommand;
use serde::Serialize;
use std::io::Write;
use std::time::SystemTime;
use tombolo_client::{ConflictFilter, ConflictList, Dot, HybridTime, Resolution, proto as v1};

#[derive(Clone, Debug, Subcommand)]
pub enum ConflictCommand {
    /// Lists values that were dropped, the newest first; with --open, keys that hold several values
    #[command(after_long_help = "\
Examples:
  tombolo ctl conflict list --since 1h --key-prefix cart
  tombolo ctl conflict list --open -n carts")]
    List {
        /// Only keys that begin with this
        #[arg(long, value_name = "PREFIX")]
        key_prefix: Option<String>,
        /// Only values that this region wrote
        #[arg(long, value_name = "REGION", conflicts_with = "open")]
        origin: Option<String>,
        /// Only what was noted since: a time (RFC 3339), or so long ago, as in 2h
        #[arg(long, value_name = "TIME", value_parser = parse_since, conflicts_with = "open")]
        since: Option<SystemTime>,
        /// At most so many; 0 means all
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        /// Keys that hold several values, those that wait longest first
        #[arg(long)]
        open: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Shows a dropped value, what it lost to, and what the key holds now
    #[command(after_long_help = "\
Examples:
  tombolo ctl conflict show 792a11d4fd76ae70f5b28eeb0b13d4a1
  tombolo ctl conflict show 792a11d4fd76ae70f5b28eeb0b13d4a1 -o raw")]
    Show {
        #[arg(value_name = "ID")]
        id: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Writes a dropped value back over what `show` showed; refused if the key was written since
    #[command(after_long_help = "\
Example:
  tombolo ctl conflict restore 792a11d4fd76ae70f5b28eeb0b13d4a1 --context-token \"$context\"")]
    Restore {
        #[arg(value_name = "ID")]
        id: String,
        /// The context that `show` printed (base64)
        #[arg(long, value_name = "CONTEXT", required_unless_present = "latest")]
        context_token: Option<String>,
        /// Overwrite whatever the key holds now, seen or not
        #[arg(long, conflicts_with = "context_token")]
        latest: bool,
        #[command(flatten)]
        session: SessionOptions,
        #[command(flatten)]
        connection: Connection,
    },
    /// Settles a key that holds several values; refused if the key was written since they were shown
    #[command(after_long_help = "\
Examples:
  tombolo ctl conflict resolve basket -n carts --context-token \"$context\" --choose 1.1:1
  tombolo ctl conflict resolve basket -n carts --context-token \"$context\" --value 'plums, pears'")]
    Resolve {
        #[arg(value_name = "KEY")]
        key: String,
        /// The context that `list --open -o json` or `get -o json` printed (base64)
        #[arg(long, value_name = "CONTEXT")]
        context_token: String,
        #[command(flatten)]
        choice: Choice,
        #[command(flatten)]
        session: SessionOptions,
        #[command(flatten)]
        connection: Connection,
    },
    /// Counts what was dropped, by the regions that won and lost
    #[command(after_long_help = "\
Example:
  tombolo ctl conflict stats --all")]
    Stats {
        /// Of all namespaces
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        connection: Connection,
    },
}

/// What to settle a key with.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Choice {
    /// The value that this write left, as in 2.1:7
    #[arg(long, value_name = "DOT")]
    pub choose: Option<Dot>,
    /// Another value; - reads standard input, @FILE a file
    #[arg(long, value_name = "VALUE")]
    pub value: Option<String>,
    /// None of them
    #[arg(long)]
    pub delete: bool,
}

impl ConflictCommand {
    pub(crate) fn connection(&self) -> &Connection {
        match self {
            Self::List { connection, .. }
            | Self::Show { connection, .. }
            | Self::Restore { connection, .. }
            | Self::Resolve { connection, .. }
            | Self::Stats { connection, .. } => connection,
        }
    }
}

/// Reads `--since`: a point in time, or how long ago.
fn parse_since(text: &str) -> Result<SystemTime, String> {
    if let Ok(time) = humantime::parse_rfc3339_weak(text) {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text)
        .map_err(|_| "a time such as 2026-08-01T12:00:00Z, or a duration such as 2h".to_owned())?;
    SystemTime::now().checked_sub(ago).ok_or_else(|| "before the beginning of time".to_owned())
}

pub(crate) async fn conflict(command: &ConflictCommand, io: &mut Io) -> Result<Exit, Failure> {
    let connection = command.connection();
    let keys = connection.key_encoding;
    let parse_prefix = |prefix: &Option<String>| match prefix {
        Some(prefix) => keys.parse(prefix),
        None => Ok(Bytes::new()),
    };
    let (client, space) = connection.connect(io, None).await?;
    let (conflicts, format) = (client.conflicts(space.name()), connection.format(io));
    match command {
        ConflictCommand::List { key_prefix, limit, open: true, .. } => {
            let list = conflicts.list_open(parse_prefix(key_prefix)?, bound(*limit)).await?;
            print_open(&list.rows, format, keys, &mut io.out)?;
            finish(&list, *limit, io)
        }
        ConflictCommand::List { key_prefix, origin, since, limit, .. } => {
            let filter = ConflictFilter {
                key_prefix: parse_prefix(key_prefix)?,
                origin_region: origin.clone(),
                since: *since,
            };
            let list = conflicts.list(&filter, bound(*limit)).await?;
            print_conflicts(&list.rows, format, keys, &mut io.out)?;
            finish(&list, *limit, io)
        }
        ConflictCommand::Show { id, .. } => {
            let shown = conflicts.get(id).await?;
            print_shown(&shown, format, keys, io)?;
            warn_unreachable(&shown.unreachable, io)
        }
        ConflictCommand::Restore { id, context_token, session, .. } => {
            let session = session.open()?;
            let context = match context_token {
                Some(context) => parse_context(context)?,
                None => conflicts.get(id).await?.context,
            };
            let written = session.enter_conflicts(conflicts).restore(id, context).await?;
            session.end(print_written(&written, format, io), io)
        }
        ConflictCommand::Resolve { key, context_token, choice, session, .. } => {
            let session = session.open()?;
            let context = parse_context(context_token)?;
            let resolution = match choice {
                Choice { choose: Some(dot), .. } => Resolution::Choose(*dot),
                Choice { value: Some(value), .. } => Resolution::Value(read_value(value, io)?),
                Choice { .. } => Resolution::Delete,
            };
            let conflicts = session.enter_conflicts(conflicts);
            let written = conflicts.resolve(keys.parse(key)?, context, resolution).await?;
            session.end(print_written(&written, format, io), io)
        }
        ConflictCommand::Stats { all, .. } => {
            let stats =
                if *all { conflicts.stats_of_all().await? } else { conflicts.stats().await? };
            print_stats(&stats.stats, format, &mut io.out)?;
            warn_unreachable(&stats.unreachable, io)
        }
    }
}

/// `--limit` as the client takes it.
fn bound(limit: usize) -> usize {
    if limit == 0 { usize::MAX } else { limit }
}

/// Says what a list does not show, on standard error.
fn finish<T>(list: &ConflictList<T>, limit: usize, io: &mut Io) -> Result<Exit, Failure> {
    if list.more {
        writeln!(io.err, "there are more than {limit}; see --limit")?;
    }
    warn_unreachable(&list.unreachable, io)
}

fn time_of(version: &v1::Version) -> String {
    show_time(HybridTime(version.hybrid_time))
}

fn show_timestamp(time: Option<prost_types::Timestamp>) -> String {
    time.and_then(|time| SystemTime::try_from(time).ok())
        .map(|time| humantime::format_rfc3339_millis(time).to_string())
        .unwrap_or_default()
}

/// The names of fields in a table.
fn show_path(path: &[String]) -> String {
    escape(path.join("/").as_bytes())
}

/// What was dropped, or kept, in a table.
fn value_of(version: &v1::Version, is_delete: bool) -> String {
    match version.value.as_ref().and_then(|value| value.kind.as_ref()) {
        Some(v1::value::Kind::Data(data)) => show_value(data),
        Some(_) => "(typed)".to_owned(),
        None if is_delete => "(deletion)".to_owned(),
        None => "(gone)".to_owned(),
    }
}

fn cause(it: &v1::Conflict) -> String {
    word(it.cause().as_str_name(), "CONFLICT_CAUSE_")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConflictJson {
    id: String,
    namespace: String,
    #[serde(flatten)]
    key: KeyJson,
    /// In a map, the register that it is about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    field_path: Vec<String>,
    winner: VersionJson,
    loser: VersionJson,
    loser_is_delete: bool,
    cause: &'static str,
    resolve_time: String,
    bytes: String,
}

impl ConflictJson {
    fn new(it: &v1::Conflict, keys: KeyEncoding) -> Self {
        let (winner, loser) =
            (it.winner.clone().unwrap_or_default(), it.loser.clone().unwrap_or_default());
        Self {
            id: it.id.clone(),
            namespace: it.namespace.clone(),
            key: keys.json(&it.key),
            field_path: it.field_path.clone(),
            winner: version_json(&winner),
            loser: version_json(&loser),
            loser_is_delete: it.loser_is_delete,
            cause: it.cause().as_str_name(),
            resolve_time: show_timestamp(it.resolve_time),
            bytes: it.bytes.to_string(),
        }
    }
}

fn print_conflicts(
    conflicts: &[v1::Conflict],
    format: Format,
    keys: KeyEncoding,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => {
            let rows: Vec<_> = conflicts.iter().map(|it| ConflictJson::new(it, keys)).collect();
            json_list(out, format, "conflicts", &rows)
        }
        Format::Raw => conflicts.iter().try_for_each(|it| writeln!(out, "{}", it.id)),
        Format::Table => {
            let row = |it: &v1::Conflict| {
                let (winner, loser) =
                    (it.winner.clone().unwrap_or_default(), it.loser.clone().unwrap_or_default());
                let lost = if it.loser_is_delete { "deletion" } else { "value" };
                [
                    it.id.clone(),
                    keys.show(&it.key),
                    show_path(&it.field_path),
                    format!("{lost} of {}", loser.origin_region),
                    time_of(&loser),
                    winner.origin_region.clone(),
                    time_of(&winner),
                    cause(it),
                ]
            };
            let header = ["ID", "KEY", "FIELD", "LOST", "WRITTEN", "WON", "WRITTEN", "CAUSE"];
            let rows = conflicts.iter().map(row);
            if conflicts.iter().any(|it| !it.field_path.is_empty()) {
                return table(out, header, rows);
            }
            table(out, without_field(header), rows.map(without_field))
        }
    }
}

/// The columns of a list in which nothing is about a field.
fn without_field<T>([id, key, _, lost, lost_at, won, won_at, cause]: [T; 8]) -> [T; 7] {
    [id, key, lost, lost_at, won, won_at, cause]
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ShownJson {
    conflict: ConflictJson,
    current: Vec<VersionJson>,
    context: String,
    rule: &'static str,
}

fn print_shown(
    shown: &v1::GetConflictResponse,
    format: Format,
    keys: KeyEncoding,
    io: &mut Io,
) -> Result<(), Failure> {
    let conflict = shown.conflict.clone().unwrap_or_default();
    match format {
        Format::Json | Format::Jsonl => {
            let row = ShownJson {
                conflict: ConflictJson::new(&conflict, keys),
                current: shown.current.iter().map(version_json).collect(),
                context: base64(&shown.context),
                rule: shown.rule().as_str_name(),
            };
            json(&mut io.out, format, &row)?;
        }
        Format::Raw => {
            let value = conflict.loser.and_then(|loser| loser.value);
            if let Some(v1::value::Kind::Data(data)) = value.and_then(|value| value.kind) {
                io.out.write_all(&data)?;
            }
        }
        Format::Table => {
            let out = &mut io.out;
            writeln!(out, "key      {}", keys.show(&conflict.key))?;
            if !conflict.field_path.is_empty() {
                writeln!(out, "field    {}", show_path(&conflict.field_path))?;
            }
            writeln!(out, "rule     {}", word(shown.rule().as_str_name(), "RULE_"))?;
            writeln!(out, "cause    {}", cause(&conflict))?;
            writeln!(out, "noted    {}", show_timestamp(conflict.resolve_time))?;
            writeln!(out)?;
            let row = |what: &str, it: &v1::Version, is_delete: bool| {
                let dot = Dot::from(it.dot.unwrap_or_default()).to_string();
                let region = it.origin_region.clone();
                [what.to_owned(), value_of(it, is_delete), region, time_of(it), dot]
            };
            let loser = conflict.loser.clone().unwrap_or_default();
            let winner = conflict.winner.clone().unwrap_or_default();
            let mut rows =
                vec![row("lost", &loser, conflict.loser_is_delete), row("won", &winner, false)];
            rows.extend(shown.current.iter().map(|it| row("now", it, false)));
            table(out, ["", "VALUE", "REGION", "TIME", "DOT"], rows)?;
            if shown.current.is_empty() {
                let part = if conflict.field_path.is_empty() { "key" } else { "field" };
                writeln!(out, "now: nothing, the {part} is absent")?;
            }
            writeln!(out)?;
            print_way_back(shown, &conflict, keys, out)?;
        }
    }
    Ok(())
}

/// Prints the command that puts the lost value back.
fn print_way_back(
    shown: &v1::GetConflictResponse,
    conflict: &v1::Conflict,
    keys: KeyEncoding,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    let v1::Conflict { id, namespace, .. } = conflict;
    match shown.rule() {
        v1::Rule::Unspecified | v1::Rule::Lww | v1::Rule::Siblings => {
            let context = base64(&shown.context);
            writeln!(out, "to put the lost value back, as long as the key stays as it is now:")?;
            writeln!(
                out,
                "  tombolo ctl conflict restore {id} -n {namespace} --context-token '{context}'"
            )
        }
        v1::Rule::Counter
        | v1::Rule::Set
        | v1::Rule::Map
        | v1::Rule::Flag
        | v1::Rule::Max
        | v1::Rule::Min => match mutation(conflict, keys) {
            Some(mutation) => {
                writeln!(out, "to put the lost value back, over whatever the field holds then:")?;
                writeln!(out, "  {mutation}")
            }
            None => writeln!(
                out,
                "the field's name cannot be written on a command line: to put the lost value back, \
                 assign it with the client library"
            ),
        },
    }
}

/// The command that writes the lost value of a field again; `None` if no operation can name the field.
fn mutation(conflict: &v1::Conflict, keys: KeyEncoding) -> Option<String> {
    let v1::Conflict { id, namespace, field_path, .. } = conflict;
    let is_plain = |name: &String| {
        !name.is_empty() && !name.contains(['/', '=']) && !name.contains(char::is_control)
    };
    if !field_path.iter().all(is_plain) || field_path.first()?.starts_with('-') {
        return None;
    }
    let field = field_path.join("/");
    let key = key_words(&conflict.key, keys);
    if conflict.loser_is_delete {
        let operation = shell_word(&format!("{field}:delete"));
        return Some(format!("tombolo mutate {key} {operation} -n {namespace}"));
    }
    // Through a pipe, because it may be any bytes.
    let operation = shell_word(&format!("{field}:assign=-"));
    Some(format!(
        "tombolo ctl conflict show {id} -n {namespace} -o raw | tombolo mutate {key} {operation} -n {namespace}"
    ))
}

/// A key as words of a command line, in hex if it is not plain text.
fn key_words(key: &[u8], keys: KeyEncoding) -> String {
    let is_plain = |text: &&str| !text.starts_with('-') && !text.contains(char::is_control);
    match std::str::from_utf8(key).ok().filter(is_plain) {
        Some(text) if keys == KeyEncoding::Utf8 => shell_word(text),
        Some(_) | None => format!("{} --key-encoding hex", KeyEncoding::Hex.show(key)),
    }
}

/// One word for a shell, in quotes where it needs them.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OpenJson {
    #[serde(flatten)]
    key: KeyJson,
    versions: Vec<VersionJson>,
    context: String,
    since_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    settle_time: Option<String>,
}

fn print_open(
    conflicts: &[v1::OpenConflict],
    format: Format,
    keys: KeyEncoding,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => {
            let row = |it: &v1::OpenConflict| OpenJson {
                key: keys.json(&it.key),
                versions: it.versions.iter().map(version_json).collect(),
                context: base64(&it.context),
                since_time: show_timestamp(it.since_time),
                settle_time: it.settle_time.map(|at| show_timestamp(Some(at))),
            };
            json_list(out, format, "conflicts", &conflicts.iter().map(row).collect::<Vec<_>>())
        }
        Format::Raw => conflicts.iter().try_for_each(|it| writeln!(out, "{}", keys.show(&it.key))),
        Format::Table => {
            let row = |it: &v1::OpenConflict| {
                let mut regions: Vec<&str> =
                    it.versions.iter().map(|version| version.origin_region.as_str()).collect();
                regions.sort_unstable();
                regions.dedup();
                [
                    keys.show(&it.key),
                    it.versions.len().to_string(),
                    regions.join(","),
                    show_timestamp(it.since_time),
                    show_timestamp(it.settle_time),
                ]
            };
            table(out, ["KEY", "VALUES", "OF", "LATEST", "SETTLES"], conflicts.iter().map(row))
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatsJson {
    namespace: String,
    winner_region: String,
    loser_region: String,
    cause: &'static str,
    count: String,
    bytes: String,
    oldest_time: String,
    newest_time: String,
}

fn print_stats(
    stats: &[v1::ConflictStats],
    format: Format,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => {
            let row = |it: &v1::ConflictStats| StatsJson {
                namespace: it.namespace.clone(),
                winner_region: it.winner_region.clone(),
                loser_region: it.loser_region.clone(),
                cause: it.cause().as_str_name(),
                count: it.count.to_string(),
                bytes: it.bytes.to_string(),
                oldest_time: show_timestamp(it.oldest_time),
                newest_time: show_timestamp(it.newest_time),
            };
            json_list(out, format, "stats", &stats.iter().map(row).collect::<Vec<_>>())
        }
        Format::Table | Format::Raw => {
            let row = |it: &v1::ConflictStats| {
                [
                    it.namespace.clone(),
                    it.winner_region.clone(),
                    it.loser_region.clone(),
                    word(it.cause().as_str_name(), "CONFLICT_CAUSE_"),
                    it.count.to_string(),
                    it.bytes.to_string(),
                    show_timestamp(it.oldest_time),
                    show_timestamp(it.newest_time),
                ]
            };
            let header =
                ["NAMESPACE", "WON", "LOST", "CAUSE", "COUNT", "BYTES", "OLDEST", "NEWEST"];
            table(out, header, stats.iter().map(row))
        }
    }
}
