//! One line of a history.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Who acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "Value", try_from = "Value")]
pub enum Process {
    /// A client; does one thing at a time.
    Client(u64),
    /// What injects faults.
    Nemesis,
}

/// What an event tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An operation begins.
    Invoke,
    /// It took effect, once, between its two events.
    Ok,
    /// It certainly had no effect.
    Fail,
    /// It may have had an effect, or may have one later. Faults are of this kind too.
    Info,
}

/// Where a reply stands in its shard's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Revision {
    /// The shard.
    pub shard: u32,
    /// Raft term.
    pub term: u64,
    /// Log index.
    pub index: u64,
}

/// What else is known about an event. Checkers take `region`, `node`, `actual`; the rest is for
/// people.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The region that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// The node that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Position in the shard's history.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rev: Option<Revision>,
    /// Identity of the write, `REGION.INCARNATION:SEQ`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dot: Option<String>,
    /// What a failed compare-and-set found instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual: Option<Value>,
    /// Why an operation is not `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Facts {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One line of a history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Position in the history, from 0.
    pub index: u64,
    /// Nanoseconds since the run began.
    pub time: u64,
    /// Who acts.
    pub process: Process,
    /// What the event tells.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// What is done: `read`, `write`, `cas`, `delete`, `add`, `remove`, `final`, or a fault.
    pub f: String,
    /// The key or the set that it is done to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Argument, and in the completion of a read its result.
    pub value: Value,
    /// What else is known.
    #[serde(default, skip_serializing_if = "Facts::is_empty")]
    pub x: Facts,
}

impl From<Process> for Value {
    fn from(process: Process) -> Self {
        match process {
            Process::Client(number) => number.into(),
            Process::Nemesis => "nemesis".into(),
        }
    }
}

impl TryFrom<Value> for Process {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match (value.as_u64(), value.as_str()) {
            (Some(number), _) => Ok(Self::Client(number)),
            (None, Some("nemesis")) => Ok(Self::Nemesis),
            (None, _) => Err(format!("`{value}` is not a process")),
        }
    }
}
