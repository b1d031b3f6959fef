//! `ctl region`: which regions there are, and letting them come, go and come back.

use std::{io::Write, time::Duration};

use clap::Subcommand;
use serde::Serialize;
use tokio::time::Instant;
use tombolo_client::{Client, proto as v1};

use crate::connection::Connection;
use crate::ctl::{warn_unreachable, word};
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{Format, KeyEncoding, json_list, show_seconds, table};

/// Between two looks at a region that joins.
const PAUSE: Duration = Duration::from_millis(500);
/// How long `--wait` waits unless `--timeout` says otherwise.
const PATIENCE: Duration = Duration::from_secs(3600);

#[derive(Clone, Debug, Subcommand)]
pub enum RegionCommand {
    /// Lists the regions
    #[command(after_long_help = "\
Example:
  tombolo ctl region list")]
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Admits a region: a new one, started with `join = true`, or one that was fenced
    ///
    /// It takes over the data of the others, then takes writes. What a fenced region had written
    /// alone it does not take along: `ctl region review`, asked there, lists it.
    #[command(after_long_help = "\
Examples:
  tombolo ctl region add ap --number 3 --link 10.2.0.1:7103,10.2.0.2:7103 --wait
  tombolo ctl region add eu --wait")]
    Add {
        #[arg(value_name = "REGION")]
        name: String,
        /// Of a new region: part of all that it writes, and never used before
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        number: u32,
        /// Of a new region: link addresses of its nodes, as host:port
        #[arg(long = "link", value_name = "ADDRESS", value_delimiter = ',')]
        links: Vec<String>,
        /// Wait until the other regions know that it has all, for an hour or --timeout
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Lets the others go on without a region, until it is added again
    ///
    /// For one that is away too long: tombstones wait for it no more. Writes that only it has are
    /// lost to the others until somebody reviews them.
    #[command(after_long_help = "\
Example:
  tombolo ctl region fence eu")]
    Fence {
        #[arg(value_name = "REGION")]
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Lets the others go on without a region for good; look at `ctl at-risk` there first
    #[command(after_long_help = "\
Example:
  tombolo ctl region remove eu")]
    Remove {
        #[arg(value_name = "REGION")]
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Gives a region a new incarnation, because its data is older than what it told others
    ///
    /// After a restore from an old disk image, or when its nodes were set up anew with `join = true`.
    #[command(after_long_help = "\
Example:
  tombolo ctl region recover eu")]
    Recover {
        #[arg(value_name = "REGION")]
        name: String,
        #[command(flatten)]
        connection: Connection,
    },
    /// Lists what this region had written alone when it was fenced, and did not take along
    #[command(after_long_help = "\
Examples:
  tombolo ctl region review carts
  tombolo ctl region review carts --dismiss")]
    Review {
        /// Only of this namespace
        #[arg(value_name = "NAMESPACE")]
        only: Option<String>,
        /// At most so many a shard
        #[arg(long, value_name = "NUMBER", default_value_t = 100)]
        limit: u32,
        /// Forget what was listed
        #[arg(long)]
        dismiss: bool,
        #[command(flatten)]
        connection: Connection,
    },
}

impl RegionCommand {
    pub(crate) fn connection(&self) -> &Connection {
        match self {
            Self::List { connection }
            | Self::Add { connection, .. }
            | Self::Fence { connection, .. }
            | Self::Remove { connection, .. }
            | Self::Recover { connection, .. }
            | Self::Review { connection, .. } => connection,
        }
    }
}

pub(crate) async fn region(command: &RegionCommand, io: &mut Io) -> Result<Exit, Failure> {
    let connection = command.connection();
    let (client, _) = connection.connect(io, None).await?;
    let admin = client.admin();
    let decided = match command {
        RegionCommand::List { .. } => {
            let reply = admin.list_regions().await?;
            print_regions(&reply.regions, connection.format(io), &mut io.out)?;
            return warn_unreachable(&reply.unreachable, io);
        }
        RegionCommand::Review { only, limit, dismiss, .. } => {
            return review(&client, only.as_deref(), *limit, *dismiss, connection, io).await;
        }
        RegionCommand::Add { name, number, links, .. } => {
            admin.add_region(name, *number, links.clone()).await?
        }
        RegionCommand::Fence { name, .. } => admin.fence_region(name).await?,
        RegionCommand::Remove { name, .. } => admin.remove_region(name).await?,
        RegionCommand::Recover { name, .. } => admin.recover_region(name).await?,
    };
    let region = match (command, decided) {
        (RegionCommand::Add { name, wait: true, .. }, _) => {
            wait_active(&client, name, connection.timeout.unwrap_or(PATIENCE), io).await?
        }
        (_, decided) => decided,
    };
    match region {
        Some(region) => {
            print_regions(&[region], connection.format(io), &mut io.out)?;
            Ok(Exit::Ok)
        }
        None => Ok(Exit::Unavailable),
    }
}

/// Waits until a region takes writes, as far as the contacted one knows.
async fn wait_active(
    client: &Client,
    name: &str,
    patience: Duration,
    io: &mut Io,
) -> Result<Option<v1::Region>, Failure> {
    let deadline = Instant::now() + patience;
    loop {
        let regions = client.admin().list_regions().await?.regions;
        let found = regions.into_iter().find(|region| region.name == *name);
        if let Some(region) = found.filter(|it| it.membership() == v1::Membership::Active) {
            return Ok(Some(region));
        }
        if Instant::now() >= deadline {
            writeln!(io.err, "`{name}` has not all data yet: ask `ctl region list` there")?;
            return Ok(None);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ReviewJson {
    namespace: String,
    key: String,
    dot: String,
    is_delete: bool,
    data: String,
}

async fn review(
    client: &Client,
    only: Option<&str>,
    limit: u32,
    dismiss: bool,
    connection: &Connection,
    io: &mut Io,
) -> Result<Exit, Failure> {
    let reply = client.admin().list_reviews(only, limit).await?;
    let (format, keys) = (connection.format(io), connection.key_encoding);
    let rows: Vec<ReviewJson> = reply.reviews.iter().map(|it| review_json(it, keys)).collect();
    match format {
        Format::Json | Format::Jsonl => json_list(&mut io.out, format, "reviews", &rows)?,
        Format::Table | Format::Raw => {
            let row = |it: &ReviewJson| {
                let value = if it.is_delete { "(deleted)".to_owned() } else { it.data.clone() };
                [it.namespace.clone(), it.key.clone(), it.dot.clone(), value]
            };
            table(&mut io.out, ["NAMESPACE", "KEY", "DOT", "VALUE"], rows.iter().map(row))?;
        }
    }
    warn_unreachable(&reply.unreachable, io)?;
    if dismiss {
        let mut rest = reply.reviews;
        while let Some(namespace) = rest.first().map(|it| it.namespace.clone()) {
            let (these, others): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|it| it.namespace == namespace);
            // Which ones is enough.
            let these = these.into_iter().map(|it| v1::Review { data: Default::default(), ..it });
            let these = these.collect();
            let done = client.admin().dismiss_reviews(namespace, these).await?;
            warn_unreachable(&done.unreachable, io)?;
            rest = others;
        }
    }
    Ok(if reply.unreachable.is_empty() { Exit::Ok } else { Exit::Unavailable })
}

fn review_json(it: &v1::Review, keys: KeyEncoding) -> ReviewJson {
    let dot = it.dot.unwrap_or_default();
    ReviewJson {
        namespace: it.namespace.clone(),
        key: keys.show(&it.key),
        dot: format!("{}.{}:{}", dot.region, dot.incarnation, dot.seq),
        is_delete: it.is_delete,
        data: keys.show(&it.data),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RegionJson {
    name: String,
    number: u32,
    local: bool,
    link_addresses: Vec<String>,
    membership: &'static str,
    incarnation: u32,
    state: &'static str,
    lag_seconds: f64,
    shards_active: u32,
    shards_with_leader: u32,
    nodes_up: u32,
    nodes: u32,
    clock_ahead_seconds: f64,
    clock_rejected_changes: String,
}

impl From<&v1::Region> for RegionJson {
    fn from(it: &v1::Region) -> Self {
        Self {
            name: it.name.clone(),
            number: it.number,
            local: it.local,
            link_addresses: it.link_addresses.clone(),
            membership: it.membership().as_str_name(),
            incarnation: it.incarnation,
            state: it.state().as_str_name(),
            lag_seconds: it.lag_seconds,
            shards_active: it.shards_active,
            shards_with_leader: it.shards_with_leader,
            nodes_up: it.nodes_up,
            nodes: it.nodes,
            clock_ahead_seconds: it.clock_ahead_seconds,
            clock_rejected_changes: it.clock_rejected_changes.to_string(),
        }
    }
}

/// What a region may do, or, if it may do all, how it is.
pub(crate) fn show_state(region: &v1::Region) -> String {
    let membership = region.membership();
    match membership {
        v1::Membership::Active | v1::Membership::Unspecified => {
            word(region.state().as_str_name(), "REGION_STATE_")
        }
        v1::Membership::Joining | v1::Membership::Recovering if region.local => {
            let state = word(membership.as_str_name(), "MEMBERSHIP_");
            format!("{state}, {} shards done", region.shards_active)
        }
        _ => word(membership.as_str_name(), "MEMBERSHIP_"),
    }
}

pub(crate) fn print_regions(
    regions: &[v1::Region],
    format: Format,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => {
            let rows: Vec<_> = regions.iter().map(RegionJson::from).collect();
            json_list(out, format, "regions", &rows)
        }
        Format::Raw => regions.iter().try_for_each(|it| writeln!(out, "{}", it.name)),
        Format::Table => {
            let row = |it: &v1::Region| {
                let place = if it.local { "here" } else { "" };
                let lag = if it.local { String::new() } else { show_seconds(it.lag_seconds) };
                let links = it.link_addresses.join(",");
                [it.name.clone(), it.number.to_string(), place.into(), show_state(it), lag, links]
            };
            let header = ["REGION", "NUMBER", "", "STATE", "LAG", "LINK ADDRESSES"];
            table(out, header, regions.iter().map(row))
        }
    }
}
