//! `mutate`: typed operations on one key.

use crate::connection::Connection;
use crate::data::{parse_path, read_value};
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{DotJson, Format, RevisionJson, base64, json, show_time, table};
use crate::write::{WriteOptions, parse_context, some_context};
use bytes::Bytes;
use serde::Serialize;
use std::io::Write;
use tombolo_client::{Mutated, Operations};

/// Applies typed operations to a key, all or none
///
/// An operation is `[PATH:]NAME[=VALUE]`, with / between the names of a path in a map:
/// add=5, insert=apple, remove=pear, assign=Ada, enable, disable, max=9, min=1, delete, as in
/// `mutate profile address/city:assign=Oslo visits:add=1`. A VALUE may be - or @FILE.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo mutate post-7 add=1 -n likes
  tombolo mutate cart insert=lemons remove=limes -n carts
  tombolo mutate ada address/city:assign=Oslo visits:add=1 -n profiles")]
pub struct Mutate {
    pub key: String,
    /// `[PATH:]NAME[=VALUE]`
    #[arg(required = true, value_name = "OPERATION", allow_negative_numbers = true)]
    pub operations: Vec<String>,
    /// Remove and replace exactly what the read with this context showed (base64, from get -o json)
    #[arg(long, value_name = "CONTEXT")]
    pub context_token: Option<String>,
    #[command(flatten)]
    pub write: WriteOptions,
    #[command(flatten)]
    pub connection: Connection,
}

pub(crate) async fn mutate(args: &Mutate, io: &mut Io) -> Result<Exit, Failure> {
    let key = args.connection.key_encoding.parse(&args.key)?;
    let mut operations = Operations::new();
    for text in &args.operations {
        operations = add(operations, text, |value| read_value(value, io))?;
    }
    let writing = args.write.begin(&args.connection, io).await?;
    let mutate = writing.keys.mutate(key, operations).request_id(writing.id);
    let mut mutate = mutate.ack_regions(args.write.ack_regions);
    if let Some(context) = &args.context_token {
        mutate = mutate.context(some_context(parse_context(context)?)?);
    }
    let format = args.connection.format(io);
    writing.finish(mutate, io, |mutated, io| print(mutated, format, io)).await
}

/// Adds one operation of the command line; `read` gives the bytes of its value.
pub(crate) fn add(
    operations: Operations,
    text: &str,
    mut read: impl FnMut(&str) -> Result<Bytes, Failure>,
) -> Result<Operations, Failure> {
    let (call, value) = match text.split_once('=') {
        Some((call, value)) => (call, Some(value)),
        None => (text, None),
    };
    let (path, name) = match call.rsplit_once(':') {
        Some((path, name)) => {
            let path = parse_path(path)
                .map_err(|error| Failure::Usage(format!("operation `{text}`: {error}")))?;
            (path.0, name)
        }
        None => (Vec::new(), call),
    };
    let operations = operations.field(path);
    Ok(match (name, value) {
        ("add", Some(by)) => {
            let by = by.parse().map_err(|_| {
                Failure::Usage(format!(
                    "operation `{text}`: `{by}` is not a whole number of 64 bits"
                ))
            })?;
            operations.add(by)
        }
        ("insert", Some(element)) => operations.insert(read(element)?),
        ("remove", Some(element)) => operations.remove(read(element)?),
        ("assign", Some(value)) => operations.assign(read(value)?),
        ("max", Some(value)) => operations.maximum(read(value)?),
        ("min", Some(value)) => operations.minimum(read(value)?),
        ("enable", None) => operations.enable(),
        ("disable", None) => operations.disable(),
        ("delete", None) => operations.delete(),
        ("add" | "insert" | "remove" | "assign" | "max" | "min", None) => {
            return Err(Failure::Usage(format!("operation `{text}` needs a value: `{text}=...`")));
        }
        ("enable" | "disable" | "delete", Some(_)) => {
            return Err(Failure::Usage(format!("operation `{text}` takes no value")));
        }
        _ => {
            return Err(Failure::Usage(format!(
                "there is no operation `{name}`: add, insert, remove, assign, enable, disable, max, min, \
                 delete"
            )));
        }
    })
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MutatedJson {
    context: String,
    session_token: String,
    dot: DotJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<RevisionJson>,
    results: Vec<ResultJson>,
    write_time: String,
    hybrid_time: String,
}

#[derive(Serialize)]
struct ResultJson {
    dot: DotJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    sum: Option<String>,
    conflict: bool,
}

fn print(mutated: &Mutated, format: Format, io: &mut Io) -> Result<Exit, Failure> {
    match format {
        Format::Json | Format::Jsonl => {
            let results = mutated.results.iter().map(|it| ResultJson {
                dot: it.dot.into(),
                sum: it.sum.map(|sum| sum.to_string()),
                conflict: it.conflict,
            });
            let reply = MutatedJson {
                context: base64(&mutated.context),
                session_token: base64(&mutated.token),
                dot: mutated.dot.into(),
                revision: mutated.revision.map(RevisionJson::from),
                results: results.collect(),
                write_time: show_time(mutated.time),
                hybrid_time: mutated.time.0.to_string(),
            };
            json(&mut io.out, format, &reply)?;
        }
        Format::Table => {
            let row = |it: &tombolo_client::OperationResult| {
                let sum = it.sum.map_or_else(String::new, |sum| sum.to_string());
                let conflict = if it.conflict { "yes" } else { "no" };
                [it.dot.to_string(), sum, conflict.to_owned()]
            };
            table(&mut io.out, ["DOT", "SUM", "CONFLICT"], mutated.results.iter().map(row))?;
        }
        Format::Raw => match mutated.sum {
            Some(sum) => writeln!(io.out, "{sum}")?,
            None => writeln!(io.out, "{}", mutated.dot)?,
        },
    }
    Ok(Exit::Ok)
}
