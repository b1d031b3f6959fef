//! What a configuration must satisfy: each value on its own, then the relations between values.
//!
//! A problem always says three things: where, what is wrong, what to do.
//!
//! Not here: reading values ([`super::load`]), bounds ([`super::keys`]), anything that needs the
//! network or the disk (a port in use, a data directory of another node): the server finds those
//! when it starts.

use super::load::Origin;
use super::{Config, Kind};
use crate::telemetry;
use std::collections::BTreeMap;
use std::fmt;
use tombolo_core::token::SECRET_BYTES_MIN;
use toml::Value;

/// What a log entry holds beside the request that it carries, at most.
const ENTRY_OVERHEAD_BYTES: u64 = 64 << 10;

/// One thing that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Dotted path of the key, with the position in a list: `nodes[1].raft`.
    pub key: String,
    /// Where the value came from; `None` when no layer sets the key.
    pub origin: Option<Origin>,
    pub problem: String,
    /// What the operator can do about it.
    pub action: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        write!(f, "{}: {}; {}", self.key, self.problem, self.action)
    }
}

/// Checks one value by itself. `Err` is (problem, action).
pub(super) fn value(kind: &Kind, value: &Value) -> Result<(), (String, String)> {
    let accepted = match (kind, value) {
        (Kind::Text, Value::String(text)) => !text.is_empty(),
        (Kind::Secret, Value::String(text)) => text.len() >= SECRET_BYTES_MIN,
        (Kind::Name { max }, Value::String(text)) => is_name(text, *max),
        (Kind::Choice(words), Value::String(text)) => words.contains(&text.as_str()),
        (Kind::Bool, Value::Boolean(_)) => true,
        (Kind::Integer { min, max }, Value::Integer(number)) => (*min..=*max).contains(number),
        (Kind::Duration { min, max }, Value::String(text)) => {
            humantime::parse_duration(text).is_ok_and(|time| (*min..=*max).contains(&time))
        }
        (Kind::Address, Value::String(text)) => is_address(text, 1),
        (Kind::Listen, Value::String(text)) => is_address(text, 0),
        (Kind::Addresses, Value::Array(list)) => {
            !list.is_empty()
                && list.iter().all(|item| item.as_str().is_some_and(|text| is_address(text, 1)))
        }
        // Elements of lists are checked key by key; this is only the list itself.
        (Kind::Tables, Value::Array(_)) => true,
        (
            Kind::Text
            | Kind::Secret
            | Kind::Name { .. }
            | Kind::Choice(_)
            | Kind::Bool
            | Kind::Integer { .. }
            | Kind::Duration { .. }
            | Kind::Address
            | Kind::Listen
            | Kind::Addresses
            | Kind::Tables,
            _,
        ) => false,
    };
    if accepted {
        return Ok(());
    }
    if let Kind::Secret = kind {
        let action = format!("give {}, kept secret", kind.describe());
        return Err(("the value, which is not shown, is not accepted".to_owned(), action));
    }
    let text = value.to_string().replace('\n', " ");
    let shown: String = text.chars().take(80).collect();
    let dots = if shown.len() < text.len() { "…" } else { "" };
    let action = match kind {
        Kind::Duration { .. } => format!("give {}, such as \"200ms\" or \"5s\"", kind.describe()),
        Kind::Address | Kind::Listen | Kind::Addresses => {
            format!("give {}, such as \"10.0.0.5:7101\" or \"[::1]:7101\"", kind.describe())
        }
        Kind::Text
        | Kind::Secret
        | Kind::Name { .. }
        | Kind::Choice(_)
        | Kind::Bool
        | Kind::Integer { .. }
        | Kind::Tables => format!("give {}", kind.describe()),
    };
    Err((format!("{shown}{dots} is not accepted"), action))
}

fn is_name(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

/// `host:port`, host being a name, an IPv4 address or an IPv6 address in brackets.
fn is_address(text: &str, min_port: u16) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let host_is_valid = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            (1..=253).contains(&host.len())
                && host
                    .bytes()
                    .all(|byte| matches!(byte, b'.' | b'-' | b'_') || byte.is_ascii_alphanumeric())
        }
    };
    let port_is_valid = port.bytes().all(|byte| byte.is_ascii_digit())
        && port.parse::<u16>().is_ok_and(|port| min_port <= port);
    host_is_valid && port_is_valid
}

/// Room a gRPC message needs besides the value: key, context and framing.
const MESSAGE_OVERHEAD_BYTES: usize = 64 << 10;

/// Checks the relations between keys. `origin` answers where a path's value came from.
pub(super) fn relations(config: &Config, origin: &dyn Fn(&str) -> Option<Origin>) -> Vec<Problem> {
    let mut report = Report { origin, problems: Vec::new() };
    members(config, &mut report);
    catalog(config, &mut report);
    keys_of_cluster(config, &mut report);
    bounds(config, &mut report);
    if let Err(error) = telemetry::parse_filter(&config.log.filter) {
        report.add(
            "log.filter",
            error.to_string(),
            "write it as \"info,tombolo_replication=debug\"",
        );
    }
    report.problems
}

struct Report<'a> {
    origin: &'a dyn Fn(&str) -> Option<Origin>,
    problems: Vec<Problem>,
}

impl Report<'_> {
    fn add(&mut self, key: &str, problem: impl Into<String>, action: impl Into<String>) {
        self.problems.push(Problem {
            key: key.to_owned(),
            origin: (self.origin)(key),
            problem: problem.into(),
            action: action.into(),
        });
    }

    /// Reports every key of `entries` whose value an earlier entry already has.
    fn unique(&mut self, entries: impl IntoIterator<Item = (String, String)>, action: &str) {
        let mut first: BTreeMap<String, String> = BTreeMap::new();
        for (key, value) in entries {
            match first.get(&value) {
                Some(earlier) => {
                    let problem = format!("{value} is already used by {earlier}");
                    self.add(&key, problem, action);
                }
                None => drop(first.insert(value, key)),
            }
        }
    }
}

/// Nodes and regions: this node is among them, and nothing is there twice.
fn members(config: &Config, report: &mut Report<'_>) {
    let nodes = || config.nodes.iter().enumerate();
    let regions = || config.regions.iter().enumerate();

    if config.own_node().is_none() {
        report.add(
            "node_id",
            format!("no [[nodes]] entry has id = {}", config.node_id),
            "add this node to [[nodes]] or correct node_id",
        );
    }
    if config.own_region().is_none() {
        report.add(
            "region",
            format!("no [[regions]] entry has name = \"{}\"", config.region),
            "add this region to [[regions]] or correct region",
        );
    }
    report.unique(
        nodes().map(|(i, node)| (format!("nodes[{i}].id"), node.id.to_string())),
        "give each node of the region its own id",
    );
    report.unique(
        nodes().flat_map(|(i, node)| {
            [
                (format!("nodes[{i}].client"), node.client.clone()),
                (format!("nodes[{i}].raft"), node.raft.clone()),
                (format!("nodes[{i}].link"), node.link.clone()),
                (format!("nodes[{i}].http"), node.http.clone()),
            ]
        }),
        "give each node and each port its own address",
    );
    report.unique(
        regions().map(|(i, region)| (format!("regions[{i}].name"), region.name.clone())),
        "give each region its own name",
    );
    report.unique(
        regions().map(|(i, region)| (format!("regions[{i}].number"), region.number.to_string())),
        "give each region its own number",
    );
    report.unique(
        regions().flat_map(|(i, region)| {
            region.link.iter().map(move |address| (format!("regions[{i}].link"), address.clone()))
        }),
        "list each link address once, in the region of its node",
    );
    let listen = &config.listen;
    report.unique(
        [
            ("listen.client", &listen.client),
            ("listen.raft", &listen.raft),
            ("listen.link", &listen.link),
            ("listen.http", &listen.http),
        ]
        .into_iter()
        .filter(|(_, address)| !address.ends_with(":0"))
        .map(|(key, address)| (key.to_owned(), address.clone())),
        "bind each service to its own port",
    );
}

fn catalog(config: &Config, report: &mut Report<'_>) {
    let home = &config.catalog.home;
    if config.regions.iter().all(|region| region.name != *home) {
        report.add(
            "catalog.home",
            format!("no [[regions]] entry has name = \"{home}\""),
            "name one of the regions, the same in every node's file",
        );
    }
}

/// Where the cluster's key comes from.
fn keys_of_cluster(config: &Config, report: &mut Report<'_>) {
    if config.cluster_key_file.is_some() && config.cluster_key.is_some() {
        report.add(
            "cluster_key_file",
            "cluster_key is set as well",
            "keep one of the two, preferably the file",
        );
    }
    if config.accepted_cluster_key.is_some() && config.cluster_key.is_none() {
        report.add(
            "accepted_cluster_key",
            "there is no cluster_key beside it",
            "set cluster_key, or put both into the file, one a line",
        );
    }
}

/// Times and sizes that only make sense together.
fn bounds(config: &Config, report: &mut Report<'_>) {
    let raft = &config.raft;
    if raft.election_timeout_min < raft.heartbeat_interval * 3 {
        report.add(
            "raft.election_timeout_min",
            format!(
                "{} is less than three heartbeat intervals of {}",
                humantime::format_duration(raft.election_timeout_min),
                humantime::format_duration(raft.heartbeat_interval)
            ),
            "raise it or lower raft.heartbeat_interval: one late heartbeat must not start an \
             election",
        );
    }
    if raft.election_timeout_max <= raft.election_timeout_min {
        report.add(
            "raft.election_timeout_max",
            format!(
                "{} is not above election_timeout_min of {}",
                humantime::format_duration(raft.election_timeout_max),
                humantime::format_duration(raft.election_timeout_min)
            ),
            "raise it: the spread keeps nodes from standing for election at the same moment",
        );
    }
    if config.raft_log.retain_bytes < config.raft_log.segment_bytes {
        report.add(
            "raft_log.retain_bytes",
            format!(
                "{} is less than raft_log.segment_bytes of {}",
                config.raft_log.retain_bytes, config.raft_log.segment_bytes
            ),
            "keep one segment at least",
        );
    }
    // A log entry takes at most a quarter of a segment, and a request becomes one entry.
    let entry_bytes = config.limits.max_message_bytes as u64 + ENTRY_OVERHEAD_BYTES;
    if config.raft_log.segment_bytes / 4 < entry_bytes {
        report.add(
            "raft_log.segment_bytes",
            format!(
                "{} is less than four times limits.max_message_bytes of {} and {ENTRY_OVERHEAD_BYTES}",
                config.raft_log.segment_bytes, config.limits.max_message_bytes
            ),
            "raise it, or lower limits.max_message_bytes",
        );
    }
    let replication = &config.replication;
    if config.raft_log.segment_bytes / 4 < replication.max_batch_bytes as u64 + ENTRY_OVERHEAD_BYTES
    {
        report.add(
            "replication.max_batch_bytes",
            format!(
                "{} and {ENTRY_OVERHEAD_BYTES} are more than a quarter of raft_log.segment_bytes of {}",
                replication.max_batch_bytes, config.raft_log.segment_bytes
            ),
            "a batch becomes one log entry: lower it, or raise raft_log.segment_bytes",
        );
    }
    if replication.in_flight_bytes < replication.max_batch_bytes {
        report.add(
            "replication.in_flight_bytes",
            format!(
                "{} is less than replication.max_batch_bytes of {}",
                replication.in_flight_bytes, replication.max_batch_bytes
            ),
            "allow one batch at least, or nothing is ever sent",
        );
    }
    if replication.retry_max < replication.retry_min {
        report.add(
            "replication.retry_max",
            format!(
                "{} is below replication.retry_min of {}",
                humantime::format_duration(replication.retry_max),
                humantime::format_duration(replication.retry_min)
            ),
            "raise it or lower retry_min",
        );
    }
    let limits = &config.limits;
    if limits.max_message_bytes < limits.max_value_bytes.saturating_add(MESSAGE_OVERHEAD_BYTES) {
        report.add(
            "limits.max_message_bytes",
            format!(
                "{} leaves no room for a value of limits.max_value_bytes = {}",
                limits.max_message_bytes, limits.max_value_bytes
            ),
            format!("make it {MESSAGE_OVERHEAD_BYTES} bytes larger than max_value_bytes at least"),
        );
    }
}
