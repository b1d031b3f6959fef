//! `await-replication`: wait until other regions have what a session has seen.

use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{Format, json, table};
use crate::session_file::SessionOptions;
use serde::Serialize;
use std::io::Write;

/// Waits until other regions have what a session has seen, its writes included
///
/// --timeout bounds the wait. Who is missing then is in the error.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Example:
  tombolo await-replication --session-file s --regions 2 --timeout 30s")]
pub struct AwaitReplication {
    /// How many other regions must have all of it; 0 only shows who has
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub regions: u32,
    #[command(flatten)]
    pub session: SessionOptions,
    #[command(flatten)]
    pub connection: Connection,
}

#[derive(Serialize)]
struct ReplicatedJson {
    regions: Vec<String>,
    lacking: Vec<LackingJson>,
}

#[derive(Serialize)]
struct LackingJson {
    region: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    events: Option<String>,
}

pub(crate) async fn await_replication(
    args: &AwaitReplication,
    io: &mut Io,
) -> Result<Exit, Failure> {
    let session = args.session.read()?;
    if session.has_seen_nothing() {
        let text = "name a session with --session-file or --token that has seen something: this one has \
                    seen nothing, so there is nothing to wait for";
        return Err(Failure::Usage(text.into()));
    }
    let (_client, keys) = args.connection.connect(io, None).await?;
    let replicated = session.enter(keys).await_replication(args.regions).await?;
    match args.connection.format(io) {
        format @ (Format::Json | Format::Jsonl) => {
            let lacking = replicated.lacking.into_iter().map(|it| LackingJson {
                region: it.region,
                events: it.events.map(|events| events.to_string()),
            });
            let reply = ReplicatedJson { regions: replicated.regions, lacking: lacking.collect() };
            json(&mut io.out, format, &reply)?;
        }
        Format::Table => {
            let has = replicated.regions.into_iter().map(|region| [region, "0".to_owned()]);
            let lacks = replicated.lacking.into_iter().map(|it| {
                let events = it.events.map_or_else(|| "unknown".into(), |it| it.to_string());
                [it.region, events]
            });
            table(&mut io.out, ["REGION", "EVENTS LACKING"], has.chain(lacks))?;
        }
        Format::Raw => {
            for region in &replicated.regions {
                writeln!(io.out, "{region}")?;
            }
        }
    }
    Ok(Exit::Ok)
}
