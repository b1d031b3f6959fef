//! `ctl repair`, `ctl at-risk`, and the keys that `ctl verify` lists: what regions lack of each other.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tombolo_client::{Client, proto as v1};

use crate::connection::Connection;
use crate::ctl::warn_unreachable;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{Format, KeyEncoding, json_list, show_seconds, table};
use crate::verify::Verify;

/// Between two looks at a repair.
const PAUSE: Duration = Duration::from_millis(500);
/// How long `--wait` waits unless `--timeout` says otherwise.
const PATIENCE: Duration = Duration::from_secs(600);

/// Makes the region take over, now, whatever another region has and it lacks
///
/// Regions do this by themselves, when a change log no longer reaches back and now and then. Ends
/// with 0 when the repair has begun, with --wait when it has ended.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo ctl repair eu
  tombolo ctl repair eu carts --wait")]
pub struct Repair {
    /// The region to repair from
    #[arg(value_name = "REGION")]
    pub peer: String,
    /// Only this namespace
    #[arg(value_name = "NAMESPACE")]
    pub only: Option<String>,
    /// Wait for the end, for 10 minutes or --timeout
    #[arg(long)]
    pub wait: bool,
    #[command(flatten)]
    pub connection: Connection,
}

/// Writes that exist only in this region: what would be lost if it were lost now
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo ctl at-risk
  tombolo ctl at-risk carts --list 20")]
pub struct AtRisk {
    /// Only of this namespace
    #[arg(value_name = "NAMESPACE")]
    pub only: Option<String>,
    /// List the writes, at most so many a shard
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub list: u32,
    #[command(flatten)]
    pub connection: Connection,
}

pub(crate) async fn repair(args: &Repair, io: &mut Io) -> Result<Exit, Failure> {
    let (client, _) = args.connection.connect(io, None).await?;
    let links = async || {
        let links = client.admin().list_links(Some(&args.peer)).await?.links;
        let wanted = |link: &v1::Link| args.only.as_ref().is_none_or(|it| *it == link.namespace);
        Ok::<_, Failure>(links.into_iter().filter(wanted).collect::<Vec<_>>())
    };
    let before: BTreeMap<_, _> =
        links().await?.iter().map(|link| (place(link), link.repairs_done)).collect();
    let reply = client.admin().start_repair(&args.peer, args.only.as_deref()).await?;
    warn_unreachable(&reply.unreachable, io)?;
    if reply.links == 0 {
        writeln!(io.err, "no shard pulls from `{}` now: look at `ctl link list`", args.peer)?;
        return Ok(Exit::Unavailable);
    }
    if !args.wait {
        writeln!(io.err, "{} links repair; `ctl link list` shows how far they are", reply.links)?;
        return Ok(Exit::Ok);
    }
    let deadline = Instant::now() + args.connection.timeout.unwrap_or(PATIENCE);
    loop {
        let now = links().await?;
        let is_done = |link: &&v1::Link| {
            let done = before.get(&place(link)).copied().unwrap_or_default();
            link.repairs_done > done && link.phase() != v1::LinkPhase::Repairing
        };
        let done = now.iter().filter(is_done).count();
        if done > 0 && done == now.len() {
            return Ok(Exit::Ok);
        }
        let paused = now.iter().any(|link| link.phase() == v1::LinkPhase::Paused);
        if paused || Instant::now() >= deadline {
            let errors: BTreeSet<&str> = now
                .iter()
                .map(|link| link.last_error.as_str())
                .filter(|error| !error.is_empty())
                .collect();
            let errors: Vec<&str> = errors.into_iter().collect();
            writeln!(
                io.err,
                "{} of {} links have not repaired: {}",
                now.len() - done,
                now.len(),
                errors.join("; ")
            )?;
            return Ok(Exit::Unavailable);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Which link it is; another leader counts anew.
fn place(link: &v1::Link) -> (String, u32, u64) {
    (link.namespace.clone(), link.shard, link.node_id)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AtRiskJson<'a> {
    namespace: &'a str,
    shard: u32,
    node_id: String,
    count: String,
    unheard_regions: &'a [String],
    writes: Vec<WriteJson>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WriteJson {
    key: String,
    dot: String,
    is_delete: bool,
}

fn at_risk_json(it: &v1::AtRisk, list: u32, keys: KeyEncoding) -> AtRiskJson<'_> {
    let writes = it.writes.iter().take(list as usize).map(|write| WriteJson {
        key: keys.show(&write.key),
        dot: show_dots(write.dot.as_slice()),
        is_delete: write.is_delete,
    });
    AtRiskJson {
        namespace: &it.namespace,
        shard: it.shard,
        node_id: it.node_id.to_string(),
        count: it.count.to_string(),
        unheard_regions: &it.unheard_regions,
        writes: writes.collect(),
    }
}

pub(crate) async fn at_risk(args: &AtRisk, io: &mut Io) -> Result<Exit, Failure> {
    let (client, _) = args.connection.connect(io, None).await?;
    let reply = client.admin().list_at_risk(args.only.as_deref(), args.list.max(1)).await?;
    let (format, keys) = (args.connection.format(io), args.connection.key_encoding);
    match format {
        Format::Json | Format::Jsonl => {
            let rows: Vec<_> =
                reply.shards.iter().map(|it| at_risk_json(it, args.list, keys)).collect();
            json_list(&mut io.out, format, "shards", &rows)?;
        }
        Format::Table | Format::Raw => {
            let row = |it: &v1::AtRisk| {
                let writes = it.writes.iter().take(args.list as usize);
                [
                    it.namespace.clone(),
                    it.shard.to_string(),
                    it.node_id.to_string(),
                    it.count.to_string(),
                    it.unheard_regions.join(","),
                    writes.map(|write| keys.show(&write.key)).collect::<Vec<_>>().join(" "),
                ]
            };
            let header = ["NAMESPACE", "SHARD", "NODE", "WRITES", "NOT HEARD OF", "KEYS"];
            table(&mut io.out, header, reply.shards.iter().map(row))?;
        }
    }
    warn_unreachable(&reply.unreachable, io)?;
    // What nobody knows is not nothing.
    Ok(if reply.unreachable.is_empty() { Exit::Ok } else { Exit::Unavailable })
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DifferenceJson {
    shard: u32,
    key: String,
    here: String,
    there: String,
}

/// Lists the keys in which two regions differ.
pub(crate) async fn list_differences(
    one: &Client,
    other: &Client,
    namespace: &str,
    args: &Verify,
    io: &mut Io,
) -> Result<(), Failure> {
    let (format, keys) = (args.connection.format(io), args.connection.key_encoding);
    let regions = other.admin().list_regions().await?.regions;
    let Some(peer) = regions.into_iter().find(|region| region.local) else {
        return Ok(());
    };
    let reply = one.admin().list_differences(&peer.name, namespace, args.limit).await?;
    let mut rows = Vec::new();
    for shard in &reply.shards {
        rows.extend(shard.keys.iter().map(|it| DifferenceJson {
            shard: shard.shard,
            key: keys.show(&it.key),
            here: show_dots(&it.here),
            there: show_dots(&it.there),
        }));
    }
    match format {
        Format::Json | Format::Jsonl => json_list(&mut io.out, format, "keys", &rows)?,
        Format::Table | Format::Raw if rows.is_empty() => {}
        Format::Table | Format::Raw => {
            writeln!(io.out)?;
            let row = |it: &DifferenceJson| {
                [it.shard.to_string(), it.key.clone(), it.here.clone(), it.there.clone()]
            };
            let header = ["SHARD", "KEY", "WRITES IN ONE", "WRITES IN OTHER"];
            table(&mut io.out, header, rows.iter().map(row))?;
        }
    }
    if reply.shards.iter().any(|shard| shard.more) {
        writeln!(io.err, "there are more keys; --limit shows more of them")?;
    }
    warn_unreachable(&reply.unreachable, io)?;
    Ok(())
}

/// How far a link's repair is, for a table.
pub(crate) fn show_progress(link: &v1::Link) -> String {
    let Some(repair) = &link.repair else { return String::new() };
    let left = match repair.seconds_left {
        left if left > 0.0 => format!(", {} left", show_seconds(left)),
        _ => String::new(),
    };
    format!("{:.0}%{left}", (repair.share * 100.0).floor())
}

fn show_dots(dots: &[v1::Dot]) -> String {
    let show = |dot: &v1::Dot| format!("{}.{}:{}", dot.region, dot.incarnation, dot.seq);
    dots.iter().map(show).collect::<Vec<_>>().join(" ")
}
