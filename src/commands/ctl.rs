//! `ctl`: the cluster's state, and namespaces.
//!
//! Everything is as the contacted region sees it. Not here: what a node decides by itself.

use crate::conflict::{ConflictCommand, conflict};
use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{Format, json, json_list, show_seconds, table};
use crate::region::{RegionCommand, region};
use crate::repair::{AtRisk, Repair, at_risk, repair, show_progress};
use crate::status::Status;
use crate::verify::{Verify, verify};
use clap::Subcommand;
use serde::Serialize;
use std::io::Write;
use tombolo_client::proto as v1;

/// Looks after a cluster
#[derive(Clone, Debug, clap::Args)]
pub struct Ctl {
    #[command(subcommand)]
    pub command: CtlCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum CtlCommand {
    Verify(Verify),
    Repair(Repair),
    AtRisk(AtRisk),
    /// Deletions that are kept until every region has them, and which region they wait for
    #[command(after_long_help = "\
Example:
  tombolo ctl tombstones carts")]
    Tombstones {
        /// Only of this namespace
        #[arg(value_name = "NAMESPACE")]
        only: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Nodes, shards, regions and links at a glance
    #[command(after_long_help = "\
Examples:
  tombolo ctl status -e 10.0.0.1:7101
  tombolo ctl status --fail -o json")]
    Status {
        /// End with code 8 if anything is not healthy
        #[arg(long)]
        fail: bool,
        /// List every shard, not only those with a problem
        #[arg(long)]
        shards: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Regions of the cluster
    #[command(subcommand)]
    Region(RegionCommand),
    /// Links over which the region pulls changes from others
    #[command(subcommand)]
    Link(LinkCommand),
    /// Values that were dropped, keys that hold several, and settling both
    #[command(subcommand)]
    Conflict(ConflictCommand),
    /// Namespaces
    #[command(subcommand)]
    Namespace(NamespaceCommand),
}

#[derive(Clone, Debug, Subcommand)]
pub enum LinkCommand {
    /// Lists the links, one row a peer, namespace and shard
    #[command(after_long_help = "\
Example:
  tombolo ctl link list --peer eu")]
    List {
        /// Only links with this region
        #[arg(long, value_name = "REGION")]
        peer: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Stops pulling from a region until it is resumed, also over restarts; with a third region, what
    /// it writes may still come through that one
    #[command(after_long_help = "\
Example:
  tombolo ctl link pause eu")]
    Pause {
        #[arg(value_name = "REGION")]
        peer: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Pulls from a region again
    #[command(after_long_help = "\
Example:
  tombolo ctl link resume eu")]
    Resume {
        #[arg(value_name = "REGION")]
        peer: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Bounds what each node takes from a region
    #[command(after_long_help = "\
Example:
  tombolo ctl link limit eu 10485760")]
    Limit {
        #[arg(value_name = "REGION")]
        peer: String,
        /// 0 for no limit
        #[arg(value_name = "BYTES_PER_SECOND")]
        bytes_per_second: u64,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub enum NamespaceCommand {
    /// Creates a namespace in every region
    #[command(after_long_help = "\
Examples:
  tombolo ctl namespace create likes --rule counter
  tombolo ctl namespace create orders --rule siblings --hold 7d")]
    Create {
        name: String,
        /// How concurrent values of a key become one; fixed for ever
        #[arg(long, value_enum, default_value = "lww")]
        rule: Rule,
        /// With siblings: let values wait so long for somebody to settle them, then take the latest
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
        hold: Option<std::time::Duration>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Lists the namespaces
    #[command(after_long_help = "\
Example:
  tombolo ctl namespace list")]
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Shows a namespace
    #[command(after_long_help = "\
Example:
  tombolo ctl namespace get carts")]
    Get {
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Deletes a namespace with all its keys, in every region
    #[command(after_long_help = "\
Example:
  tombolo ctl namespace delete carts")]
    Delete {
        name: String,
        /// Only if this is still its etag
        #[arg(long)]
        etag: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
}

/// A convergence rule that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Rule {
    /// The newest value wins; the others go to the ledger
    Lww,
    /// All concurrent values are kept and returned
    Siblings,
    /// Every addition counts, once
    Counter,
    /// A set: an addition survives a removal that has not seen it
    Set,
    /// Registers, counters, sets and more, by path
    Map,
    /// On or off: on survives off that has not seen it
    Flag,
    /// The largest value, byte by byte
    Max,
    /// The smallest value, byte by byte
    Min,
}

impl Ctl {
    pub(crate) fn connection(&self) -> &Connection {
        match &self.command {
            CtlCommand::Region(command) => command.connection(),
            CtlCommand::Conflict(command) => command.connection(),
            CtlCommand::Status { connection, .. }
            | CtlCommand::Link(
                LinkCommand::List { connection, .. }
                | LinkCommand::Pause { connection, .. }
                | LinkCommand::Resume { connection, .. }
                | LinkCommand::Limit { connection, .. },
            )
            | CtlCommand::Tombstones { connection, .. }
            | CtlCommand::Verify(Verify { connection, .. })
            | CtlCommand::Repair(Repair { connection, .. })
            | CtlCommand::AtRisk(AtRisk { connection, .. })
            | CtlCommand::Namespace(
                NamespaceCommand::Create { connection, .. }
                | NamespaceCommand::List { connection }
                | NamespaceCommand::Get { connection, .. }
                | NamespaceCommand::Delete { connection, .. },
            ) => connection,
        }
    }
}

pub(crate) async fn ctl(args: &Ctl, io: &mut Io) -> Result<Exit, Failure> {
    match &args.command {
        CtlCommand::Status { fail, shards, connection } => {
            let (client, _) = connection.connect(io, None).await?;
            let status = Status::read(&client).await?;
            status.print(connection.format(io), *shards, &mut io.out)?;
            if *fail && !status.is_healthy() { Err(Failure::Unhealthy) } else { Ok(Exit::Ok) }
        }
        CtlCommand::Region(command) => region(command, io).await,
        CtlCommand::Conflict(command) => conflict(command, io).await,
        CtlCommand::Verify(args) => verify(args, io).await,
        CtlCommand::Repair(args) => repair(args, io).await,
        CtlCommand::AtRisk(args) => at_risk(args, io).await,
        CtlCommand::Tombstones { only, connection } => {
            let (client, _) = connection.connect(io, None).await?;
            let reply = client.admin().list_tombstones(only.as_deref()).await?;
            print_tombstones(&reply.tombstones, connection.format(io), &mut io.out)?;
            warn_unreachable(&reply.unreachable, io)
        }
        CtlCommand::Link(LinkCommand::List { peer, connection }) => {
            let (client, _) = connection.connect(io, None).await?;
            let reply = client.admin().list_links(peer.as_deref()).await?;
            print_links(&reply.links, connection.format(io), &mut io.out)?;
            warn_unreachable(&reply.unreachable, io)
        }
        CtlCommand::Link(LinkCommand::Pause { peer, connection }) => {
            let (client, _) = connection.connect(io, None).await?;
            client.admin().pause_link(peer).await?;
            Ok(Exit::Ok)
        }
        CtlCommand::Link(LinkCommand::Resume { peer, connection }) => {
            let (client, _) = connection.connect(io, None).await?;
            client.admin().resume_link(peer).await?;
            Ok(Exit::Ok)
        }
        CtlCommand::Link(LinkCommand::Limit { peer, bytes_per_second, connection }) => {
            let (client, _) = connection.connect(io, None).await?;
            client.admin().limit_link(peer, *bytes_per_second).await?;
            Ok(Exit::Ok)
        }
        CtlCommand::Namespace(command) => namespace(command, io).await,
    }
}

async fn namespace(command: &NamespaceCommand, io: &mut Io) -> Result<Exit, Failure> {
    match command {
        NamespaceCommand::Create { name, rule, hold, connection } => {
            let (client, _) = connection.connect(io, None).await?;
            let rule = match rule {
                Rule::Lww => v1::Rule::Lww,
                Rule::Siblings => v1::Rule::Siblings,
                Rule::Counter => v1::Rule::Counter,
                Rule::Set => v1::Rule::Set,
                Rule::Map => v1::Rule::Map,
                Rule::Flag => v1::Rule::Flag,
                Rule::Max => v1::Rule::Max,
                Rule::Min => v1::Rule::Min,
            };
            let created = match hold {
                None => client.admin().create_namespace(name, rule).await?,
                Some(hold) if rule == v1::Rule::Siblings => {
                    client.admin().create_held_namespace(name, *hold).await?
                }
                Some(_) => return Err(Failure::Usage("--hold needs --rule siblings".to_owned())),
            };
            print_namespace(created, connection.format(io), io)?;
        }
        NamespaceCommand::List { connection } => {
            let (client, _) = connection.connect(io, None).await?;
            let namespaces = client.admin().list_namespaces().await?;
            let format = connection.format(io);
            let rows: Vec<_> = namespaces.iter().map(NamespaceJson::from).collect();
            print_namespaces(&rows, format, &mut io.out)?;
        }
        NamespaceCommand::Get { name, connection } => {
            let (client, _) = connection.connect(io, None).await?;
            let found = client.admin().get_namespace(name).await?;
            print_namespace(found, connection.format(io), io)?;
        }
        NamespaceCommand::Delete { name, etag, connection } => {
            let (client, _) = connection.connect(io, None).await?;
            client.admin().delete_namespace(name, etag.clone()).await?;
        }
    }
    Ok(Exit::Ok)
}

/// What did not answer is not in the list: say so, on standard error.
pub(crate) fn warn_unreachable(unreachable: &[String], io: &mut Io) -> Result<Exit, Failure> {
    if !unreachable.is_empty() {
        writeln!(io.err, "incomplete: no answer from {}", unreachable.join(", "))?;
    }
    Ok(Exit::Ok)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NamespaceJson {
    name: String,
    id: u32,
    rule: &'static str,
    create_time: String,
    etag: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hold: Option<String>,
}

impl From<&v1::Namespace> for NamespaceJson {
    fn from(it: &v1::Namespace) -> Self {
        let since = it.create_time.and_then(|at| {
            let at =
                std::time::Duration::new(at.seconds.try_into().ok()?, at.nanos.try_into().ok()?);
            // RFC 3339 ends with the year 9999.
            (at.as_secs() < 253_402_300_800).then_some(std::time::SystemTime::UNIX_EPOCH + at)
        });
        let create_time = since.map(|at| humantime::format_rfc3339_seconds(at).to_string());
        Self {
            name: it.name.clone(),
            id: it.id,
            rule: it.rule().as_str_name(),
            create_time: create_time.unwrap_or_default(),
            etag: it.etag.clone(),
            hold: it
                .hold
                .and_then(|hold| std::time::Duration::try_from(hold).ok())
                .map(|hold| format!("{}s", hold.as_secs_f64())),
        }
    }
}

fn print_namespace(namespace: v1::Namespace, format: Format, io: &mut Io) -> Result<(), Failure> {
    let row = NamespaceJson::from(&namespace);
    match format {
        Format::Json | Format::Jsonl => json(&mut io.out, format, &row)?,
        Format::Table | Format::Raw => print_namespaces(&[row], format, &mut io.out)?,
    }
    Ok(())
}

fn print_namespaces(
    namespaces: &[NamespaceJson],
    format: Format,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => json_list(out, format, "namespaces", namespaces),
        Format::Raw => namespaces.iter().try_for_each(|it| writeln!(out, "{}", it.name)),
        Format::Table => {
            let row = |it: &NamespaceJson| {
                let rule = it.rule.trim_start_matches("RULE_").to_lowercase();
                [it.name.clone(), it.id.to_string(), rule, it.create_time.clone(), it.etag.clone()]
            };
            let header = ["NAME", "ID", "RULE", "CREATED", "ETAG"];
            table(out, header, namespaces.iter().map(row))
        }
    }
}

/// `REGION_STATE_UP` to `up`.
pub(crate) fn word(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_lowercase().replace('_', " ")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LinkJson {
    peer_region: String,
    namespace: String,
    shard: u32,
    node_id: String,
    phase: &'static str,
    lag_events: String,
    lag_seconds: f64,
    unacknowledged_events: String,
    last_error: String,
    received_events: String,
    received_bytes: String,
    unacknowledged_bytes: String,
    /// While repairing: from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_share: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_seconds_left: Option<f64>,
}

impl From<&v1::Link> for LinkJson {
    fn from(it: &v1::Link) -> Self {
        Self {
            peer_region: it.peer_region.clone(),
            namespace: it.namespace.clone(),
            shard: it.shard,
            node_id: it.node_id.to_string(),
            phase: it.phase().as_str_name(),
            lag_events: it.lag_events.to_string(),
            lag_seconds: it.lag_seconds,
            unacknowledged_events: it.unacknowledged_events.to_string(),
            last_error: it.last_error.clone(),
            received_events: it.received_events.to_string(),
            received_bytes: it.received_bytes.to_string(),
            unacknowledged_bytes: it.unacknowledged_bytes.to_string(),
            repair_share: it.repair.as_ref().map(|repair| repair.share),
            repair_seconds_left: it.repair.as_ref().map(|repair| repair.seconds_left),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TombstonesJson<'a> {
    namespace: &'a str,
    shard: u32,
    node_id: String,
    count: String,
    waits_for_regions: &'a [String],
}

impl<'a> From<&'a v1::Tombstones> for TombstonesJson<'a> {
    fn from(it: &'a v1::Tombstones) -> Self {
        Self {
            namespace: &it.namespace,
            shard: it.shard,
            node_id: it.node_id.to_string(),
            count: it.count.to_string(),
            waits_for_regions: &it.waits_for_regions,
        }
    }
}

fn print_tombstones(
    tombstones: &[v1::Tombstones],
    format: Format,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => {
            let rows: Vec<_> = tombstones.iter().map(TombstonesJson::from).collect();
            json_list(out, format, "tombstones", &rows)
        }
        Format::Table | Format::Raw => {
            let row = |it: &v1::Tombstones| {
                let numbers = [it.shard.to_string(), it.node_id.to_string(), it.count.to_string()];
                let [shard, node, count] = numbers;
                [it.namespace.clone(), shard, node, count, it.waits_for_regions.join(",")]
            };
            let header = ["NAMESPACE", "SHARD", "NODE", "TOMBSTONES", "WAITS FOR"];
            table(out, header, tombstones.iter().map(row))
        }
    }
}

fn print_links(links: &[v1::Link], format: Format, out: &mut dyn Write) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => {
            let rows: Vec<_> = links.iter().map(LinkJson::from).collect();
            json_list(out, format, "links", &rows)
        }
        Format::Table | Format::Raw => {
            let row = |it: &v1::Link| {
                [
                    it.peer_region.clone(),
                    it.namespace.clone(),
                    it.shard.to_string(),
                    it.node_id.to_string(),
                    word(it.phase().as_str_name(), "LINK_PHASE_"),
                    it.lag_events.to_string(),
                    show_seconds(it.lag_seconds),
                    it.unacknowledged_events.to_string(),
                    show_progress(it),
                    it.last_error.clone(),
                ]
            };
            let header = [
                "PEER",
                "NAMESPACE",
                "SHARD",
                "NODE",
                "PHASE",
                "BEHIND",
                "LAG",
                "UNACKED",
                "REPAIR",
                "ERROR",
            ];
            table(out, header, links.iter().map(row))
        }
    }
}
