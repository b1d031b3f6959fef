//! `watch`: follows changes, one line an event.
//!
//! A line is printed before a token that covers it is kept: whoever goes on from the token may see
//! lines again, and misses none.

use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::lines::escape;
use crate::output::{
    DotJson, Format, KeyEncoding, KeyJson, VersionJson, base64, json, show_time, show_value,
    show_version, unbase64, versions_json,
};
use crate::session_file::{probe_file, replace_file};
use bytes::Bytes;
use futures::StreamExt;
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tombolo_client::{
    Change, Concurrent, Dot, Entry, Error, Keyspace, Previous, ResetReason, WatchEvent,
    WatchStream, Watched, proto,
};

/// How often the token file is written.
const KEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How long to look for a node that serves, unless --timeout says.
const PATIENCE: Duration = Duration::from_secs(60);

/// Follows changes, one line an event, until interrupted
///
/// Ends with the token to go on from, on standard error.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo watch cart: --snapshot
  tombolo watch --token-file position -o jsonl | ./consume")]
pub struct Watch {
    /// Only keys that begin with this
    pub prefix: Option<String>,
    /// First key, inclusive
    #[arg(long, value_name = "KEY")]
    pub from: Option<String>,
    /// Last key, exclusive
    #[arg(long, value_name = "KEY")]
    pub to: Option<String>,
    /// Begin with the present state
    #[arg(long)]
    pub snapshot: bool,
    /// Go on after this token, of any region (base64)
    #[arg(long, value_name = "TOKEN", conflicts_with = "snapshot")]
    pub from_token: Option<String>,
    /// Keep the token in FILE, and go on from what it holds
    #[arg(long, value_name = "FILE", conflicts_with = "from_token")]
    pub token_file: Option<PathBuf>,
    /// Show what each write replaced
    #[arg(long)]
    pub previous: bool,
    /// Only writes that this region took
    #[arg(long, conflicts_with_all = ["remote", "origin"])]
    pub local: bool,
    /// Only writes that other regions took
    #[arg(long, conflicts_with = "origin")]
    pub remote: bool,
    /// Only writes that this region took; repeat for several
    #[arg(long, value_name = "REGION")]
    pub origin: Vec<String>,
    /// Stop after this many lines; 0 means never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub limit: u64,
    /// Print checkpoints, too
    #[arg(long)]
    pub checkpoints: bool,
    /// Longest time without a checkpoint
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "10s")]
    pub checkpoint_interval: Duration,
    #[command(flatten)]
    pub connection: Connection,
}

pub(crate) async fn watch(args: &Watch, io: &mut Io) -> Result<Exit, Failure> {
    let token = args.token()?;
    let (_client, keys) = args.connection.connect(io, None).await?;
    let stream = args.open(&keys, token.clone())?;
    let mut interrupt = std::mem::replace(&mut io.interrupt, Box::pin(std::future::pending()));
    let mut follower = Follower {
        args,
        format: args.connection.format(io),
        stream,
        left: args.limit,
        kept: token.clone().unwrap_or_default(),
    };
    let ended = tokio::select! {
        ended = follower.run(io) => ended,
        () = &mut interrupt => Err(Failure::Interrupted(String::new())),
        () = terminated() => Err(Failure::Interrupted(String::new())),
    };
    // A token whose lines nobody read is not one to go on from.
    io.out.flush()?;
    let is_refused = matches!(ended, Err(Failure::Remote(Error::Invalid { .. })));
    let reached = follower.stream.token();
    if reached.is_empty() || (is_refused && token.as_ref() == Some(reached)) {
        return ended;
    }
    writeln!(io.err, "resume token: {}", base64(reached))?;
    follower.keep(reached)?;
    ended
}

/// Resolves when the system asks the process to end.
async fn terminated() {
    match signal(SignalKind::terminate()) {
        Ok(mut asked) => {
            asked.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

impl Watch {
    /// Where to go on from, if anywhere.
    fn token(&self) -> Result<Option<Bytes>, Failure> {
        let parse = |text: &str, place: &str| {
            unbase64(text)
                .map(Some)
                .map_err(|error| Failure::Usage(format!("{place}: not a resume token: {error}")))
        };
        if let Some(path) = &self.token_file {
            probe_file(path)?;
        }
        match (&self.from_token, &self.token_file) {
            (Some(text), _) => parse(text, "--from-token"),
            (None, Some(path)) => match std::fs::read_to_string(path) {
                Ok(text) => parse(&text, &path.display().to_string()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Failure::Other(format!("{}: {error}", path.display()))),
            },
            (None, None) => Ok(None),
        }
    }

    fn open(&self, keys: &Keyspace, token: Option<Bytes>) -> Result<WatchStream, Failure> {
        let encoding = self.connection.key_encoding;
        let bound = |text: &Option<String>| match text {
            Some(text) => encoding.parse(text).map(Some),
            None => Ok(None),
        };
        let mut watch = keys
            .watch()
            .prefix(bound(&self.prefix)?.unwrap_or_default())
            .checkpoint_interval(self.checkpoint_interval)
            .give_up_after(self.connection.timeout.unwrap_or(PATIENCE));
        watch = match (bound(&self.from)?, bound(&self.to)?) {
            (Some(from), Some(to)) => watch.range(from..to),
            (Some(from), None) => watch.range(from..),
            (None, Some(to)) => watch.range(..to),
            (None, None) => watch,
        };
        watch = match token {
            Some(token) => watch.resume(token),
            None if self.snapshot => watch.snapshot(),
            None => watch,
        };
        if self.previous {
            watch = watch.previous();
        }
        if self.local {
            watch = watch.local_only();
        }
        if self.remote {
            watch = watch.remote_only();
        }
        Ok(watch.origins(self.origin.iter()).stream())
    }
}

/// Prints what comes.
struct Follower<'a> {
    args: &'a Watch,
    format: Format,
    stream: WatchStream,
    /// Lines still to print; 0 without a limit.
    left: u64,
    /// The token that was kept last.
    kept: Bytes,
}

impl Follower<'_> {
    async fn run(&mut self, io: &mut Io) -> Result<Exit, Failure> {
        let mut ticks = tokio::time::interval(KEEP_INTERVAL);
        loop {
            let item = tokio::select! {
                item = self.stream.next() => item,
                _ = ticks.tick() => {
                    self.keep_new(io)?;
                    continue;
                }
            };
            let Some(item) = item else { return Ok(Exit::Ok) };
            let Watched { event, token } = item?;
            let is_shown = self.args.checkpoints || !matches!(event, WatchEvent::Checkpoint { .. });
            if is_shown {
                self.print(&event, token.as_ref(), io)?;
            }
            if token.is_some() {
                io.out.flush()?;
            }
            if is_shown && self.left > 0 {
                self.left -= 1;
                if self.left == 0 {
                    return Ok(Exit::Ok);
                }
            }
        }
    }

    /// Keeps the token if it is another than the one kept last.
    fn keep_new(&mut self, io: &mut Io) -> Result<(), Failure> {
        let token = self.stream.token().clone();
        if token.is_empty() || token == self.kept {
            return Ok(());
        }
        io.out.flush()?;
        self.keep(&token)?;
        self.kept = token;
        Ok(())
    }

    fn keep(&self, token: &Bytes) -> Result<(), Failure> {
        let Some(path) = &self.args.token_file else { return Ok(()) };
        write_token(path, token)
            .map_err(|error| Failure::Other(format!("{}: {error}", path.display())))
    }

    fn print(&self, event: &WatchEvent, token: Option<&Bytes>, io: &mut Io) -> Result<(), Failure> {
        let encoding = self.args.connection.key_encoding;
        match self.format {
            // A stream has no end at which a document could be closed.
            Format::Json | Format::Jsonl => {
                json(&mut io.out, Format::Jsonl, &event_json(event, token, encoding))?;
            }
            Format::Table => writeln!(io.out, "{}", show(event, encoding))?,
            Format::Raw => match event {
                WatchEvent::Change(Change { key, .. })
                | WatchEvent::Entry { entry: Entry { key, .. }, .. } => {
                    writeln!(io.out, "{}", encoding.show(key))?;
                }
                WatchEvent::SnapshotDone { .. }
                | WatchEvent::Reset { .. }
                | WatchEvent::Checkpoint { .. } => {}
            },
        }
        Ok(())
    }
}

fn write_token(path: &Path, token: &Bytes) -> std::io::Result<()> {
    replace_file(path, format!("{}\n", base64(token)).as_bytes())
}

/// A line for people.
fn show(event: &WatchEvent, encoding: KeyEncoding) -> String {
    match event {
        WatchEvent::Change(change) => {
            let (key, part) = (encoding.show(&change.key), part(change.element.as_ref()));
            let what = match &change.version {
                Some(version) => format!("put     {key}{part} = {}", show_version(version)),
                None => format!("delete  {key}{part}"),
            };
            let (region, time) = (&change.origin_region, show_time(change.time));
            format!("{what}  {region} {time} {}{}", change.dot, note(change))
        }
        WatchEvent::Entry { entry, deletion: Some(_), .. } => {
            format!("entry   {} is deleted", encoding.show(&entry.key))
        }
        WatchEvent::Entry { entry, element, .. } => {
            let values: Vec<String> = entry.versions.iter().map(show_version).collect();
            let (key, part) = (encoding.show(&entry.key), part(element.as_ref()));
            format!("entry   {key}{part} = {}", values.join(" | "))
        }
        WatchEvent::SnapshotDone { shard, shards_left } => {
            format!("done    shard {shard}, {shards_left} left")
        }
        WatchEvent::Reset { shard, reason } => {
            let reason = match reason {
                ResetReason::HistoryGone => "the history is gone",
                ResetReason::StartedOver => "a region started over",
                ResetReason::Other => "unknown",
            };
            format!("reset   shard {shard}: {reason}")
        }
        WatchEvent::Checkpoint { shards_waiting: 0 } => "checkpoint".into(),
        WatchEvent::Checkpoint { shards_waiting } => {
            format!("checkpoint, {shards_waiting} shards wait")
        }
    }
}

/// Which part of a typed value an event is about; empty where there are none.
fn part(element: Option<&proto::Element>) -> String {
    let Some(element) = element else { return String::new() };
    let mut part: String =
        element.field_path.iter().map(|name| format!("/{}", escape(name.as_bytes()))).collect();
    match element.kind() {
        proto::ElementKind::Set => part += &format!(" {{{}}}", show_value(&element.member)),
        proto::ElementKind::Counter => part += &format!(" (share of {})", element.share_region),
        proto::ElementKind::Register
        | proto::ElementKind::Flag
        | proto::ElementKind::Max
        | proto::ElementKind::Min
        | proto::ElementKind::Unspecified => {}
    }
    part
}

/// What there is to say of concurrent writes.
fn note(change: &Change) -> String {
    let mut note = String::new();
    if let Some((winner, id)) = &change.concurrent.lost_to {
        note += &format!("  lost to {winner} ({id})");
    }
    for (loser, id) in &change.concurrent.beat {
        note += &format!("  beat {loser} ({id})");
    }
    if !change.concurrent.beside.is_empty() {
        let others: Vec<String> = change.concurrent.beside.iter().map(Dot::to_string).collect();
        note += &format!("  beside {}", others.join(" "));
    }
    note
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EventJson {
    shard: u32,
    #[serde(flatten)]
    body: BodyJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    resume_token: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum BodyJson {
    Change(Box<ChangeJson>),
    SnapshotEntry(Box<EntryJson>),
    #[serde(rename_all = "camelCase")]
    SnapshotDone {
        shards_left: u32,
    },
    Reset {
        reason: &'static str,
    },
    #[serde(rename_all = "camelCase")]
    Checkpoint {
        shards_waiting: u32,
    },
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ChangeJson {
    #[serde(flatten)]
    key: KeyJson,
    kind: &'static str,
    dot: DotJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<VersionJson>,
    origin_region: String,
    write_time: String,
    hybrid_time: String,
    supersedes: Vec<DotJson>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    previous: Vec<PreviousJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    conflict: Option<ConflictJson>,
    group: GroupJson,
    current: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    element: Option<ElementJson>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ElementJson {
    field_path: Vec<String>,
    kind: &'static str,
    member: String,
    share_region: String,
    share_total: String,
}

fn element_json(element: &proto::Element) -> ElementJson {
    ElementJson {
        field_path: element.field_path.clone(),
        kind: element.kind().as_str_name(),
        member: base64(&element.member),
        share_region: element.share_region.clone(),
        share_total: element.share_total.to_string(),
    }
}

#[derive(Serialize)]
struct PreviousJson {
    dot: DotJson,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<VersionJson>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConflictJson {
    #[serde(skip_serializing_if = "Option::is_none")]
    lost_to: Option<DotJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ledger_id: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    beat: Vec<BeatenJson>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    beside: Vec<DotJson>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BeatenJson {
    dot: DotJson,
    ledger_id: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GroupJson {
    first_seq: String,
    size: u32,
}

#[derive(Serialize)]
struct EntryJson {
    #[serde(flatten)]
    key: KeyJson,
    versions: Vec<VersionJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deletion: Option<DeletionJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    element: Option<ElementJson>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DeletionJson {
    dot: DotJson,
    origin_region: String,
    write_time: String,
    hybrid_time: String,
}

fn event_json(event: &WatchEvent, token: Option<&Bytes>, encoding: KeyEncoding) -> EventJson {
    let (shard, body) = match event {
        WatchEvent::Change(change) => {
            (change.shard, BodyJson::Change(Box::new(change_json(change, encoding))))
        }
        WatchEvent::Entry { shard, entry, deletion, element } => {
            let key = encoding.json(&entry.key);
            let versions = versions_json(&entry.versions, false);
            let deletion = deletion.as_ref().map(|it| DeletionJson {
                dot: it.dot.into(),
                origin_region: it.origin_region.clone(),
                write_time: show_time(it.time),
                hybrid_time: it.time.0.to_string(),
            });
            let element = element.as_ref().map(element_json);
            let entry = EntryJson { key, versions, deletion, element };
            (*shard, BodyJson::SnapshotEntry(Box::new(entry)))
        }
        WatchEvent::SnapshotDone { shard, shards_left } => {
            (*shard, BodyJson::SnapshotDone { shards_left: *shards_left })
        }
        WatchEvent::Reset { shard, reason } => {
            let reason = match reason {
                ResetReason::HistoryGone => "RESET_REASON_HISTORY_GONE",
                ResetReason::StartedOver => "RESET_REASON_STARTED_OVER",
                ResetReason::Other => "RESET_REASON_UNSPECIFIED",
            };
            (*shard, BodyJson::Reset { reason })
        }
        WatchEvent::Checkpoint { shards_waiting } => {
            (0, BodyJson::Checkpoint { shards_waiting: *shards_waiting })
        }
    };
    EventJson { shard, body, resume_token: token.map(|token| base64(token)) }
}

fn change_json(change: &Change, encoding: KeyEncoding) -> ChangeJson {
    let kind = match change.version {
        Some(_) => "CHANGE_KIND_PUT",
        None => "CHANGE_KIND_DELETE",
    };
    let one = |version: &tombolo_client::Version| {
        versions_json(std::slice::from_ref(version), false).into_iter().next()
    };
    let previous = |(dot, replaced): &(Dot, Previous)| {
        let (state, version) = match replaced {
            Previous::Value(version) => ("PREVIOUS_STATE_VALUE", one(version)),
            Previous::Deleted => ("PREVIOUS_STATE_DELETED", None),
            Previous::Unknown => ("PREVIOUS_STATE_UNKNOWN", None),
            Previous::TooLarge => ("PREVIOUS_STATE_TOO_LARGE", None),
        };
        PreviousJson { dot: DotJson::from(*dot), state, version }
    };
    ChangeJson {
        key: encoding.json(&change.key),
        kind,
        dot: change.dot.into(),
        version: change.version.as_ref().and_then(one),
        origin_region: change.origin_region.clone(),
        write_time: show_time(change.time),
        hybrid_time: change.time.0.to_string(),
        supersedes: change.supersedes.iter().copied().map(DotJson::from).collect(),
        previous: change.previous.iter().map(previous).collect(),
        conflict: conflict_json(&change.concurrent),
        group: GroupJson { first_seq: change.group.first_seq.to_string(), size: change.group.size },
        current: change.current,
        element: change.element.as_ref().map(element_json),
    }
}

fn conflict_json(concurrent: &Concurrent) -> Option<ConflictJson> {
    if *concurrent == Concurrent::default() {
        return None;
    }
    let beaten =
        |(dot, id): &(Dot, String)| BeatenJson { dot: DotJson::from(*dot), ledger_id: id.clone() };
    Some(ConflictJson {
        lost_to: concurrent.lost_to.as_ref().map(|(winner, _)| DotJson::from(*winner)),
        ledger_id: concurrent.lost_to.as_ref().map(|(_, id)| id.clone()),
        beat: concurrent.beat.iter().map(beaten).collect(),
        beside: concurrent.beside.iter().copied().map(DotJson::from).collect(),
    })
}
