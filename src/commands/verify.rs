//! `ctl verify`: whether two regions hold the same, by the roots of their Merkle trees.
//!
//! Roots say something only of the same moment of history, which is a frontier. So a shard's roots
//! are compared when both regions have applied the same; while writes are under way, the shard is
//! asked again.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tombolo_client::proto as v1;

use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{Format, json_list, table};
use crate::repair::list_differences;

/// Between two looks at shards that are not at the same point.
const PAUSE: Duration = Duration::from_millis(200);
/// How long to look for a moment at which both have applied the same.
const PATIENCE: Duration = Duration::from_secs(30);

/// Proves that two regions hold the same, or says where they differ
///
/// Ends with 0 when every shard is equal, with 1 when one differs, and with 6 when some shards were
/// never seen at the same point of their history.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  tombolo ctl verify us eu -n carts
  tombolo ctl verify 10.0.0.1:7101 10.1.0.1:7101")]
pub struct Verify {
    /// A context's name, or nodes of the region as host:port,host:port
    pub one: String,
    /// The other
    pub other: String,
    /// Keys that are listed where a shard differs, at most so many a shard
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    pub limit: u32,
    #[command(flatten)]
    pub connection: Connection,
}

/// What comparing one shard gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum Verdict {
    Equal,
    Different,
    /// Not at the same point yet.
    Moving,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    shard: u32,
    verdict: Verdict,
    one_root: String,
    other_root: String,
}

pub(crate) async fn verify(args: &Verify, io: &mut Io) -> Result<Exit, Failure> {
    let namespace = args.connection.resolve(io)?.namespace;
    let connect = |place: &str| {
        let mut connection = args.connection.clone();
        (connection.endpoint, connection.context) = if place.contains(':') {
            (place.split(',').map(str::to_owned).collect(), None)
        } else {
            (Vec::new(), Some(place.to_owned()))
        };
        connection
    };
    let (one, _) = connect(&args.one).connect(io, None).await?;
    let (other, _) = connect(&args.other).connect(io, None).await?;
    let deadline = Instant::now() + args.connection.timeout.unwrap_or(PATIENCE);
    let shards = one.cluster().await?.shard_count as usize;
    let mut rows: BTreeMap<u32, Row> = BTreeMap::new();
    loop {
        let (left, right) = (one.admin(), other.admin());
        let asked = (left.summarize_namespace(&namespace), right.summarize_namespace(&namespace));
        let (left, right) = tokio::join!(asked.0, asked.1);
        let right: BTreeMap<u32, v1::ShardSummary> =
            right?.shards.into_iter().map(|row| (row.shard, row)).collect();
        for mine in left?.shards {
            let Some(theirs) = right.get(&mine.shard) else { continue };
            let settled = rows.get(&mine.shard).is_some_and(|row| row.verdict != Verdict::Moving);
            if !settled {
                rows.insert(mine.shard, compare(&mine, theirs));
            }
        }
        let moving = rows.values().filter(|row| row.verdict == Verdict::Moving).count();
        if (moving == 0 && rows.len() >= shards) || Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    let rows: Vec<Row> = rows.into_values().collect();
    let format = args.connection.format(io);
    print(&rows, format, &mut io.out)?;
    let count = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    let (different, moving) = (count(Verdict::Different), count(Verdict::Moving));
    if different > 0 {
        list_differences(&one, &other, &namespace, args, io).await?;
        return Err(Failure::Other(format!(
            "{different} of {} shards hold different data at the same point of their history",
            rows.len()
        )));
    }
    let missing = shards.saturating_sub(rows.len());
    if missing > 0 {
        writeln!(io.err, "{missing} of {shards} shards have no leader in one of the regions")?;
    }
    if moving > 0 {
        writeln!(
            io.err,
            "{moving} of {shards} shards were never seen at the same point: writes are under way, \
             or a link is cut"
        )?;
    }
    if missing + moving > 0 {
        return Ok(Exit::Unavailable);
    }
    Ok(Exit::Ok)
}

fn compare(mine: &v1::ShardSummary, theirs: &v1::ShardSummary) -> Row {
    let same_point = mine.frontier == theirs.frontier && !mine.repairing && !theirs.repairing;
    let verdict = match (same_point, mine.root == theirs.root) {
        (false, _) => Verdict::Moving,
        (true, true) => Verdict::Equal,
        (true, false) => Verdict::Different,
    };
    let root = |root: u64| format!("{root:016x}");
    Row { shard: mine.shard, verdict, one_root: root(mine.root), other_root: root(theirs.root) }
}

fn print(rows: &[Row], format: Format, out: &mut dyn Write) -> std::io::Result<()> {
    match format {
        Format::Json | Format::Jsonl => json_list(out, format, "shards", rows),
        Format::Table | Format::Raw => {
            let row = |it: &Row| {
                let verdict = match it.verdict {
                    Verdict::Equal => "equal",
                    Verdict::Different => "DIFFERENT",
                    Verdict::Moving => "moving",
                };
                let (one, other) = (it.one_root.clone(), it.other_root.clone());
                [it.shard.to_string(), verdict.to_owned(), one, other]
            };
            table(out, ["SHARD", "VERDICT", "ONE", "OTHER"], rows.iter().map(row))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_count_only_at_the_same_frontier() {
        let summary = |frontier: &'static [u8], root| v1::ShardSummary {
            frontier: frontier.into(),
            root,
            ..Default::default()
        };
        let verdict = |mine, theirs| compare(&mine, &theirs).verdict;
        assert_eq!(verdict(summary(b"a", 1), summary(b"a", 1)), Verdict::Equal);
        assert_eq!(verdict(summary(b"a", 1), summary(b"a", 2)), Verdict::Different);
        assert_eq!(verdict(summary(b"a", 1), summary(b"b", 2)), Verdict::Moving);
        assert_eq!(verdict(summary(b"a", 1), summary(b"b", 1)), Verdict::Moving);
        let repairing = v1::ShardSummary { repairing: true, ..summary(b"a", 2) };
        assert_eq!(verdict(summary(b"a", 1), repairing), Verdict::Moving);
    }
}
