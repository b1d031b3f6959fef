//! Operations: an invocation and its completion as one.

use serde_json::Value;
use std::collections::BTreeMap;
use tombolo_jepsen_history::{Event, Facts, History, Kind, Process};

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It took effect once, in its interval.
    Ok,
    /// It had no effect.
    Fail,
    /// Nobody knows; the effect, if any, may come at any time after the invocation.
    Info,
}

/// One operation of a client.
#[derive(Clone, Debug)]
pub struct Op {
    /// The client.
    pub process: u64,
    /// What was asked.
    pub f: String,
    /// Of which key or set; empty if none.
    pub key: String,
    /// When it began.
    pub call: u64,
    /// When it completed; `None` when the outcome is open.
    pub ret: Option<u64>,
    /// How it ended.
    pub outcome: Outcome,
    /// Its argument.
    pub input: Value,
    /// The completion's value.
    pub output: Value,
    /// Facts of the completion, and what only the invocation says.
    pub facts: Facts,
}

/// A history that no correct harness writes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("event {index}: {problem}")]
pub struct Malformed {
    /// Of the event.
    pub index: u64,
    /// In words.
    pub problem: &'static str,
}

/// Pairs invocations with completions, in order of invocation. Faults are left out.
///
/// # Errors
/// [`Malformed`].
pub fn pair(history: &History) -> Result<Vec<Op>, Malformed> {
    let mut ops: Vec<Op> = Vec::new();
    let mut pending: BTreeMap<u64, usize> = BTreeMap::new();
    let mut latest = 0;
    for event in &history.events {
        let malformed = |problem| Err(Malformed { index: event.index, problem });
        if event.time < latest {
            return malformed("time went back");
        }
        latest = event.time;
        let Process::Client(process) = event.process else { continue };
        match (event.kind, pending.get(&process).copied()) {
            (Kind::Invoke, None) => {
                pending.insert(process, ops.len());
                ops.push(invoked(process, event));
            }
            (Kind::Invoke, Some(_)) => return malformed("a second invocation of a busy process"),
            (Kind::Ok | Kind::Fail | Kind::Info, None) => return malformed("nothing to complete"),
            (kind, Some(position)) => {
                let op = &mut ops[position];
                if op.f != event.f {
                    return malformed("a completion of another operation");
                }
                op.output = event.value.clone();
                op.facts = joined(event.x.clone(), &op.facts);
                match kind {
                    // The process stays busy: it may never act again.
                    Kind::Info | Kind::Invoke => {}
                    Kind::Ok | Kind::Fail => {
                        op.outcome = if kind == Kind::Ok { Outcome::Ok } else { Outcome::Fail };
                        op.ret = Some(event.time);
                        pending.remove(&process);
                    }
                }
            }
        }
    }
    Ok(ops)
}

fn invoked(process: u64, event: &Event) -> Op {
    Op {
        process,
        f: event.f.clone(),
        key: event.key.clone().unwrap_or_default(),
        call: event.time,
        ret: None,
        outcome: Outcome::Info,
        input: event.value.clone(),
        output: Value::Null,
        facts: event.x.clone(),
    }
}

fn joined(completion: Facts, invocation: &Facts) -> Facts {
    Facts {
        region: completion.region.or_else(|| invocation.region.clone()),
        node: completion.node.or_else(|| invocation.node.clone()),
        ..completion
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Script;
    use serde_json::json;

    #[test]
    fn an_open_outcome_has_no_end_and_keeps_its_process_busy() {
        let mut script = Script::default();
        script.at(1, 0, Kind::Invoke, "write", json!(4)).at(2, 0, Kind::Info, "write", json!(4));
        let ops = pair(&script.history).unwrap();
        assert_eq!((ops.len(), ops[0].ret, ops[0].outcome), (1, None, Outcome::Info));

        script.at(3, 0, Kind::Invoke, "read", json!(null));
        assert_eq!(
            pair(&script.history).unwrap_err().problem,
            "a second invocation of a busy process"
        );
    }

    #[test]
    fn time_may_not_go_back() {
        let mut script = Script::default();
        script.at(2, 0, Kind::Invoke, "read", json!(null)).at(1, 0, Kind::Ok, "read", json!(1));
        assert_eq!(pair(&script.history).unwrap_err().problem, "time went back");
    }
}
