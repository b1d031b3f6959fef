//! `commit`: several writes to keys of one shard, all or none.

use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::mutate;
use crate::output::{
    DotJson, Format, KeyEncoding, KeyJson, VersionJson, base64, json, show_version, table,
    versions_json,
};
use crate::write::{WriteOptions, some_context};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::time::Duration;
use tombolo_client::{Committed, Dot, Operations, WriteResult};

/// Applies several writes to keys of one shard, all or none, if all checks hold
///
/// Keys share a shard when they share a hash tag, as in {cart-7}:items and {cart-7}:total. Pairs are
/// split at the first =, and values are taken as they are.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo commit --check-absent '{cart-7}:lock' --put '{cart-7}:lock=me' --ttl 30s
  tombolo commit --put '{cart-7}:items=3 lemons' --context-token \"{cart-7}:items=$context\"
  tombolo commit --mutate '{bank}:ada=add=-5' --mutate '{bank}:bob=add=5' -n accounts
  tombolo commit - < commit.json")]
pub struct Commit {
    /// - reads checks and writes as JSON from standard input
    #[arg(value_name = "-", value_parser = ["-"])]
    pub input: Option<String>,
    /// The key must have no value
    #[arg(long, value_name = "KEY")]
    pub check_absent: Vec<String>,
    /// The key must have a value
    #[arg(long, value_name = "KEY")]
    pub check_present: Vec<String>,
    /// The key must have exactly this value
    #[arg(long, value_name = "KEY=VALUE")]
    pub check_value: Vec<String>,
    /// The key must have exactly the value that this write created
    #[arg(long, value_name = "KEY=DOT")]
    pub check_dot: Vec<String>,
    /// Nothing must have been written to the key, nor deleted, since the read with this context
    /// (base64, from get -o json; empty: ever)
    #[arg(long, value_name = "KEY=CONTEXT")]
    pub check_context: Vec<String>,
    /// Store a value
    #[arg(long, value_name = "KEY=VALUE")]
    pub put: Vec<String>,
    /// Let the values of --put expire after this long
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, requires = "put")]
    pub ttl: Option<Duration>,
    /// Delete a key
    #[arg(long, value_name = "KEY")]
    pub delete: Vec<String>,
    /// Apply a typed operation, as mutate takes it; those on one key in order
    #[arg(long, value_name = "KEY=OPERATION")]
    pub mutate: Vec<String>,
    /// Let the write of KEY replace exactly what the read with this context showed (base64, from get -o
    /// json)
    #[arg(long, value_name = "KEY=CONTEXT")]
    pub context_token: Vec<String>,
    #[command(flatten)]
    pub write: WriteOptions,
    #[command(flatten)]
    pub connection: Connection,
}

/// The JSON form. Keys follow `--key-encoding`; values are text, or base64 as `valueBase64`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Document {
    checks: Vec<CheckJson>,
    writes: Vec<WriteJson>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct CheckJson {
    key: String,
    #[serde(default)]
    absent: bool,
    #[serde(default)]
    present: bool,
    value: Option<String>,
    value_base64: Option<String>,
    dot: Option<String>,
    context: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WriteJson {
    key: String,
    #[serde(default)]
    delete: bool,
    value: Option<String>,
    value_base64: Option<String>,
    ttl: Option<String>,
    #[serde(default)]
    mutate: Vec<String>,
    context: Option<String>,
}

enum Check {
    Absent,
    Present,
    Value(Bytes),
    Dot(Dot),
    Context(Bytes),
}

enum Action {
    Put(Bytes, Option<Duration>),
    Delete,
    Mutate(Operations),
}

struct PlannedWrite {
    key: Bytes,
    action: Action,
    context: Option<Bytes>,
}

/// What is asked for, from either form.
#[derive(Default)]
struct Plan {
    checks: Vec<(Bytes, Check)>,
    writes: Vec<PlannedWrite>,
}

impl Commit {
    fn plan(&self, io: &mut Io) -> Result<Plan, Failure> {
        let encoding = self.connection.key_encoding;
        let mut plan = match &self.input {
            Some(_) => {
                let mut text = String::new();
                io.input.read_to_string(&mut text)?;
                let document: Document = serde_json::from_str(&text)
                    .map_err(|error| Failure::Usage(format!("standard input: {error}")))?;
                document.plan(encoding)?
            }
            None => Plan::default(),
        };
        self.add_checks(&mut plan)?;
        self.add_writes(&mut plan)?;
        if plan.checks.is_empty() && plan.writes.is_empty() {
            return Err(Failure::Usage("nothing to check and nothing to write".into()));
        }
        Ok(plan)
    }

    fn add_checks(&self, plan: &mut Plan) -> Result<(), Failure> {
        let encoding = self.connection.key_encoding;
        for key in &self.check_absent {
            plan.checks.push((encoding.parse(key)?, Check::Absent));
        }
        for key in &self.check_present {
            plan.checks.push((encoding.parse(key)?, Check::Present));
        }
        for pair in &self.check_value {
            let (key, value) = split(pair, "--check-value")?;
            plan.checks.push((encoding.parse(key)?, Check::Value(literal(value)?)));
        }
        for pair in &self.check_dot {
            let (key, dot) = split(pair, "--check-dot")?;
            plan.checks.push((encoding.parse(key)?, Check::Dot(parse_dot(dot)?)));
        }
        for pair in &self.check_context {
            let (key, context) = split(pair, "--check-context")?;
            plan.checks.push((encoding.parse(key)?, Check::Context(parse_context(context)?)));
        }
        Ok(())
    }

    fn add_writes(&self, plan: &mut Plan) -> Result<(), Failure> {
        let encoding = self.connection.key_encoding;
        for pair in &self.put {
            let (key, value) = split(pair, "--put")?;
            plan.write(encoding.parse(key)?, Action::Put(literal(value)?, self.ttl));
        }
        for key in &self.delete {
            plan.write(encoding.parse(key)?, Action::Delete);
        }
        for pair in &self.mutate {
            let (key, operation) = split(pair, "--mutate")?;
            plan.mutate(encoding.parse(key)?, operation)?;
        }
        for pair in &self.context_token {
            let (key, context) = split(pair, "--context-token")?;
            let written = encoding.parse(key)?;
            let write = plan.writes.iter_mut().find(|write| write.key == written);
            let write = write.ok_or_else(|| {
                Failure::Usage(format!("--context-token: the commit does not write `{key}`"))
            })?;
            write.context = Some(some_context(parse_context(context)?)?);
        }
        Ok(())
    }
}

impl Plan {
    fn write(&mut self, key: Bytes, action: Action) {
        self.writes.push(PlannedWrite { key, action, context: None });
    }

    /// Adds an operation to those on the key.
    fn mutate(&mut self, key: Bytes, operation: &str) -> Result<(), Failure> {
        let planned = self.writes.iter_mut().find_map(|write| match &mut write.action {
            Action::Mutate(operations) if write.key == key => Some(operations),
            Action::Mutate(_) | Action::Put(..) | Action::Delete => None,
        });
        match planned {
            Some(operations) => {
                *operations = operation_of(std::mem::take(operations), operation)?;
            }
            None => {
                let operations = operation_of(Operations::new(), operation)?;
                self.write(key, Action::Mutate(operations));
            }
        }
        Ok(())
    }

    fn build(&self, mut commit: tombolo_client::Commit) -> tombolo_client::Commit {
        for (key, check) in &self.checks {
            commit = match check {
                Check::Absent => commit.check_absent(key),
                Check::Present => commit.check_present(key),
                Check::Value(value) => commit.check_value(key, value),
                Check::Dot(dot) => commit.check_dot(key, *dot),
                Check::Context(context) => commit.check_context(key, context),
            };
        }
        for PlannedWrite { key, action, context } in &self.writes {
            commit = match action {
                Action::Put(value, None) => commit.put(key, value),
                Action::Put(value, Some(ttl)) => commit.put_for(key, value, *ttl),
                Action::Delete => commit.delete(key),
                Action::Mutate(operations) => commit.mutate(key, operations.clone()),
            };
            if let Some(context) = context {
                commit = commit.context(context);
            }
        }
        commit
    }
}

impl WriteJson {
    fn action(self) -> Result<Action, Failure> {
        let value = value(&self.key, self.value, self.value_base64)?;
        let ttl = self.ttl.as_deref().map(humantime::parse_duration).transpose();
        let ttl = ttl.map_err(|error| Failure::Usage(format!("ttl of `{}`: {error}", self.key)))?;
        match (self.delete, value, &self.mutate[..], ttl) {
            (false, Some(value), [], ttl) => Ok(Action::Put(value, ttl)),
            (true, None, [], None) => Ok(Action::Delete),
            (false, None, [_, ..], None) => {
                let mut operations = self.mutate.iter().map(String::as_str);
                operations.try_fold(Operations::new(), operation_of).map(Action::Mutate)
            }
            _ => Err(Failure::Usage(format!(
                "the write of `{}` needs a value, delete or mutate, and a ttl only with a value",
                self.key
            ))),
        }
    }
}

impl Document {
    fn plan(self, encoding: KeyEncoding) -> Result<Plan, Failure> {
        let mut plan = Plan::default();
        for it in self.checks {
            let value = value(&it.key, it.value, it.value_base64)?;
            let dot = it.dot.as_deref().map(parse_dot).transpose()?;
            let context = it.context.as_deref().map(parse_context).transpose()?;
            let check = match (it.absent, it.present, value, dot, context) {
                (true, false, None, None, None) => Check::Absent,
                (false, true, None, None, None) => Check::Present,
                (false, false, Some(value), None, None) => Check::Value(value),
                (false, false, None, Some(dot), None) => Check::Dot(dot),
                (false, false, None, None, Some(context)) => Check::Context(context),
                _ => {
                    let key = it.key;
                    return Err(Failure::Usage(format!(
                        "the check of `{key}` needs one condition"
                    )));
                }
            };
            plan.checks.push((encoding.parse(&it.key)?, check));
        }
        for it in self.writes {
            let key = encoding.parse(&it.key)?;
            let context = it.context.as_deref().map(parse_context).transpose()?;
            let context = context.map(some_context).transpose()?;
            plan.writes.push(PlannedWrite { key, action: it.action()?, context });
        }
        Ok(plan)
    }
}

fn value(
    key: &str,
    text: Option<String>,
    encoded: Option<String>,
) -> Result<Option<Bytes>, Failure> {
    match (text, encoded) {
        (None, None) => Ok(None),
        (Some(text), None) => Ok(Some(Bytes::from(text))),
        (None, Some(encoded)) => crate::output::unbase64(&encoded)
            .map(Some)
            .map_err(|error| Failure::Usage(format!("valueBase64 of `{key}`: {error}"))),
        (Some(_), Some(_)) => {
            Err(Failure::Usage(format!("`{key}` has both value and valueBase64")))
        }
    }
}

fn literal(text: &str) -> Result<Bytes, Failure> {
    Ok(Bytes::copy_from_slice(text.as_bytes()))
}

fn operation_of(operations: Operations, text: &str) -> Result<Operations, Failure> {
    mutate::add(operations, text, literal)
}

/// At the first `=`: keys with a `=` are given as hex.
fn split<'a>(pair: &'a str, flag: &str) -> Result<(&'a str, &'a str), Failure> {
    pair.split_once('=')
        .ok_or_else(|| Failure::Usage(format!("{flag} takes KEY=..., not `{pair}`")))
}

fn parse_context(text: &str) -> Result<Bytes, Failure> {
    crate::output::unbase64(text)
        .map_err(|error| Failure::Usage(format!("`{text}` is no context: {error}")))
}

fn parse_dot(text: &str) -> Result<Dot, Failure> {
    text.parse().map_err(|error| Failure::Usage(format!("`{text}`: {error}")))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CommittedJson {
    committed: bool,
    failed_checks: Vec<FailedJson>,
    results: Vec<ResultJson>,
    session_token: String,
}

#[derive(Serialize)]
struct FailedJson {
    check: usize,
    #[serde(flatten)]
    key: KeyJson,
    versions: Vec<VersionJson>,
    context: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResultJson {
    context: String,
    conflict: bool,
    dot: DotJson,
    hybrid_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    sum: Option<String>,
}

pub(crate) async fn commit(args: &Commit, io: &mut Io) -> Result<Exit, Failure> {
    let encoding = args.connection.key_encoding;
    let plan = args.plan(io)?;
    let writing = args.write.begin(&args.connection, io).await?;
    let commit = writing.keys.commit().request_id(writing.id);
    let commit = plan.build(commit.ack_regions(args.write.ack_regions));
    let format = args.connection.format(io);
    let say = |committed: &Committed, io: &mut Io| {
        print(committed, &plan, format, encoding, io)?;
        match committed.committed {
            true => Ok(Exit::Ok),
            false => Err(Failure::CheckFailed(committed.failed.len())),
        }
    };
    writing.finish(commit, io, say).await
}

fn print(
    committed: &Committed,
    plan: &Plan,
    format: Format,
    encoding: KeyEncoding,
    io: &mut Io,
) -> Result<(), Failure> {
    match format {
        Format::Json | Format::Jsonl => {
            let failed = committed.failed.iter().map(|it| FailedJson {
                check: it.check,
                key: encoding.json(&it.key),
                versions: versions_json(&it.versions, false),
                context: base64(&it.context),
            });
            let results = committed.results.iter().map(|it| ResultJson {
                context: base64(&it.context),
                conflict: it.conflict,
                dot: it.dot.into(),
                hybrid_time: it.time.0.to_string(),
                sum: it.sum.map(|sum| sum.to_string()),
            });
            let reply = CommittedJson {
                committed: committed.committed,
                failed_checks: failed.collect(),
                results: results.collect(),
                session_token: base64(&committed.token),
            };
            json(&mut io.out, format, &reply)?;
        }
        Format::Table if committed.committed => {
            let written = plan.writes.iter().zip(&committed.results);
            let row = |(write, result): (&PlannedWrite, &WriteResult)| {
                let action = match write.action {
                    Action::Put(..) => "put",
                    Action::Delete => "delete",
                    Action::Mutate(_) => "mutate",
                };
                let sum = result.sum.map_or_else(String::new, |sum| sum.to_string());
                [encoding.show(&write.key), action.into(), result.dot.to_string(), sum]
            };
            table(&mut io.out, ["KEY", "WRITE", "DOT", "SUM"], written.map(row))?;
        }
        Format::Table => {
            let rows = committed.failed.iter().map(|failed| {
                let found = match failed.versions.first() {
                    Some(version) => (show_version(version), version.dot.to_string()),
                    None => ("(absent)".into(), String::new()),
                };
                [failed.check.to_string(), encoding.show(&failed.key), found.0, found.1]
            });
            table(&mut io.out, ["FAILED CHECK", "KEY", "FOUND", "DOT"], rows)?;
        }
        Format::Raw => {
            for result in &committed.results {
                writeln!(io.out, "{}", result.dot)?;
            }
        }
    }
    Ok(())
}
