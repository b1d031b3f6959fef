//! The promise of a region: every key is a linearizable register.
//!
//! Keys are checked one by one, which is sound because linearizability is local (Herlihy and Wing,
//! 1990). What nodes hold after the faults, in every region, takes part as reads: by then all of
//! them must have what the last linearizable read shows.
//!
//! Not here: the search (`wgl`).

use crate::op::{Op, Outcome, pair};
use crate::report::{FindingKind, Report};
use crate::revision::{WentBack, went_back};
use crate::wgl::{Action, Call, Judgement, judge};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use tombolo_jepsen_history::History;

/// Checks every key of a history; `nodes` are those that must have told what they hold in the end.
/// `budget` bounds the search for each key.
#[must_use]
pub fn check_registers(history: &History, nodes: &[String], budget: u64) -> Report {
    let mut report = Report::default();
    let ops = match pair(history) {
        Ok(ops) => ops,
        Err(malformed) => {
            report.find(FindingKind::Incomplete, malformed.to_string());
            return report;
        }
    };
    let mut keys: BTreeMap<&str, Vec<&Op>> = BTreeMap::new();
    for op in &ops {
        keys.entry(&op.key).or_default().push(op);
    }
    let mut open = 0;
    for (key, ops) in &keys {
        check_key(key, ops, nodes, budget, &mut report);
        open += ops.iter().filter(|op| op.outcome == Outcome::Info).count() as u64;
    }
    report.figure("keys", keys.len() as u64);
    report.figure("operations", ops.len() as u64);
    report.figure("operations_open", open);
    report
}

fn check_key(key: &str, ops: &[&Op], nodes: &[String], budget: u64, report: &mut Report) {
    let (finals, ops): (Vec<&Op>, Vec<&Op>) = ops.iter().partition(|op| op.f == "final");
    let settled = settled(key, &finals, nodes, report);
    let mut written: BTreeSet<u64> = BTreeSet::new();
    let mut calls = Vec::new();
    let mut origins = Vec::new();
    for op in ops.iter().chain(finals.iter().filter(|_| settled)) {
        let Some(taken) = action(op) else {
            let text = format!("{key}: cannot read an operation of process {}", op.process);
            report.find(FindingKind::Incomplete, text);
            return;
        };
        // Without effect and without an observation it says nothing.
        let Some(action) = taken else { continue };
        if let Action::Write(value) | Action::Cas(_, value) = action {
            written.insert(value);
        }
        calls.push(Call { action, call: op.call, ret: op.ret });
        origins.push(*op);
    }
    for (call, op) in calls.iter().zip(&origins) {
        if let Action::Read(Some(seen)) | Action::Refused(_, Some(seen)) = call.action
            && !written.contains(&seen)
        {
            let text = format!("{key}: {} shows {seen}, which nobody wrote", describe(op));
            report.find(FindingKind::ThinAir, text);
        }
    }
    if let Some(WentBack { earlier, later }) = went_back(&ops) {
        let (earlier, later) = (describe(earlier), describe(later));
        let text = format!("{key}: {later} is told of an older state than {earlier}");
        report.find(FindingKind::NotLinearizable, text);
    }
    match judge(&calls, budget) {
        Judgement::Linearizable => {}
        Judgement::Impossible { stuck, placed } => {
            let total = calls.len();
            let what = describe(origins[stuck]);
            let text = format!("{key}: {what} fits nowhere; {placed} of {total} calls do");
            report.find(FindingKind::NotLinearizable, text);
        }
        Judgement::GaveUp => {
            let text = format!("{key}: no verdict on {} calls in {budget} steps", calls.len());
            report.find(FindingKind::GaveUp, text);
        }
    }
}

/// Whether all nodes told that they hold the same in the end.
fn settled(key: &str, finals: &[&Op], nodes: &[String], report: &mut Report) -> bool {
    let told: BTreeMap<&str, &Value> = finals
        .iter()
        .filter(|op| op.outcome == Outcome::Ok)
        .filter_map(|op| Some((op.facts.node.as_deref()?, &op.output)))
        .collect();
    let silent: Vec<&str> =
        nodes.iter().map(|node| &**node).filter(|node| !told.contains_key(node)).collect();
    if !silent.is_empty() {
        let text = format!("{key}: not read in the end on {}", silent.join(", "));
        report.find(FindingKind::Incomplete, text);
    }
    let values: BTreeSet<String> = told.values().map(|value| value.to_string()).collect();
    if values.len() > 1 {
        let each: Vec<String> =
            told.iter().map(|(node, value)| format!("{node}: {value}")).collect();
        report.find(FindingKind::Diverged, format!("{key}: {}", each.join(", ")));
    }
    silent.is_empty() && values.len() == 1
}

/// What an operation did: nothing certain, or one action; none if it cannot be read.
#[expect(clippy::option_option, reason = "malformed, without meaning, and an action")]
fn action(op: &Op) -> Option<Option<Action>> {
    let action = match (&*op.f, op.outcome) {
        ("read" | "final", Outcome::Ok) => Action::Read(value(&op.output)?),
        ("read" | "final", Outcome::Fail | Outcome::Info) => return Some(None),
        ("write", Outcome::Ok | Outcome::Info) => Action::Write(value(&op.input)??),
        ("delete", Outcome::Ok | Outcome::Info) => Action::Delete,
        ("write" | "delete", Outcome::Fail) => return Some(None),
        ("cas", outcome) => {
            let [expected, stored] = &op.input.as_array()?[..] else { return None };
            let expected = value(expected)?;
            match (outcome, &op.facts.actual) {
                (Outcome::Ok | Outcome::Info, _) => Action::Cas(expected, value(stored)??),
                (Outcome::Fail, Some(actual)) => Action::Refused(expected, value(actual)?),
                (Outcome::Fail, None) => return Some(None),
            }
        }
        _ => return None,
    };
    Some(Some(action))
}

/// A value of the register; `null` is absent.
#[expect(clippy::option_option, reason = "malformed, absent, and present are three things")]
fn value(value: &Value) -> Option<Option<u64>> {
    if value.is_null() { Some(None) } else { value.as_u64().map(Some) }
}

fn describe(op: &Op) -> String {
    let ms = |time: u64| time / 1_000_000;
    let result = if matches!(&*op.f, "read" | "final") { &op.output } else { &op.input };
    let end = op.ret.map_or("?".into(), |ret| ms(ret).to_string());
    let node = op.facts.node.as_deref().unwrap_or("an unknown node");
    format!("{} {result} on {node} at {} to {end} ms", op.f, ms(op.call))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Verdict;
    use crate::testing::{Mutation, register_history};
    use crate::wgl::STEPS;
    use serde_json::json;
    use tombolo_jepsen_history::Kind;

    fn nodes() -> Vec<String> {
        ["eu-1", "eu-2", "us-1"].map(str::to_owned).to_vec()
    }

    fn check(history: &History) -> Report {
        check_registers(history, &nodes(), STEPS)
    }

    /// Applies a mutation to many valid histories: all that it can be applied to must turn.
    fn turns_invalid(name: &str, kind: FindingKind, mutate: Mutation) {
        let mut applied = 0;
        for seed in 0..200 {
            let mut history = register_history(seed, 4, 60, &nodes());
            if mutate(&mut history).is_none() {
                continue;
            }
            applied += 1;
            let report = check(&history);
            assert_eq!(report.verdict, Verdict::Invalid, "{name}, seed {seed}");
            assert!(report.counts.contains_key(&kind), "{name}, seed {seed}: {report:?}");
        }
        assert!(applied > 50, "{name} could be applied to {applied} histories only");
    }

    #[test]
    fn histories_of_a_correct_register_are_valid() {
        for seed in 0..500 {
            let report = check(&register_history(seed, 5, 80, &nodes()));
            assert_eq!(report.verdict, Verdict::Valid, "seed {seed}: {report:?}");
        }
    }

    /// The first position of an event that `wanted` accepts.
    fn position(
        history: &History,
        wanted: impl Fn(&tombolo_jepsen_history::Event) -> bool,
    ) -> Option<usize> {
        history.events.iter().position(wanted)
    }

    #[test]
    fn a_stale_read_is_found() {
        turns_invalid("stale read", FindingKind::NotLinearizable, |history| {
            let ops = pair(history).unwrap();
            let writes: Vec<&Op> =
                ops.iter().filter(|op| op.f == "write" && op.outcome == Outcome::Ok).collect();
            // Overwritten before the read began, and unique, so it cannot be there any more.
            let (read, old) =
                ops.iter().filter(|op| op.f == "read" && op.ret.is_some()).find_map(|read| {
                    let newer = writes.iter().rev().find(|w| w.ret.unwrap() < read.call)?;
                    let old = writes.iter().find(|w| w.ret.unwrap() < newer.call)?;
                    Some((read, old.input.clone()))
                })?;
            let at = position(history, |event| {
                event.kind == Kind::Ok && Some(event.time) == read.ret && event.f == "read"
            })?;
            history.events[at].value = old;
            Some(())
        });
    }

    #[test]
    fn a_value_out_of_thin_air_is_found() {
        turns_invalid("thin air", FindingKind::ThinAir, |history| {
            let at = position(history, |event| event.kind == Kind::Ok && event.f == "read")?;
            history.events[at].value = json!(999_999);
            Some(())
        });
    }

    #[test]
    fn a_lost_write_is_found() {
        turns_invalid("lost write", FindingKind::NotLinearizable, |history| {
            // The last thing told of the key is that it is absent, and nobody deleted it.
            history.events.retain(|event| event.f != "delete");
            position(history, |event| event.kind == Kind::Ok && event.f == "write")?;
            for event in &mut history.events {
                if event.f == "final" {
                    event.value = json!(null);
                }
            }
            Some(())
        });
    }

    #[test]
    fn a_compare_and_set_that_should_have_failed_is_found() {
        turns_invalid("cas", FindingKind::NotLinearizable, |history| {
            let at = position(history, |event| {
                event.kind == Kind::Fail && event.f == "cas" && event.x.actual.is_some()
            })?;
            // It expected what was never there.
            let event = &mut history.events[at];
            (event.kind, event.x.actual) = (Kind::Ok, None);
            Some(())
        });
    }

    #[test]
    fn a_compare_and_set_that_should_have_succeeded_is_found() {
        turns_invalid("refused cas", FindingKind::NotLinearizable, |history| {
            let at = position(history, |event| event.kind == Kind::Ok && event.f == "cas")?;
            let event = &mut history.events[at];
            event.x.actual = Some(event.value[0].clone());
            event.kind = Kind::Fail;
            Some(())
        });
    }

    #[test]
    fn a_diverged_node_is_found() {
        turns_invalid("diverged", FindingKind::Diverged, |history| {
            let at = position(history, |event| event.kind == Kind::Ok && event.f == "final")?;
            history.events[at].value = json!(888_888);
            Some(())
        });
    }

    #[test]
    fn a_node_that_is_not_read_in_the_end_leaves_the_verdict_open() {
        let mut history = register_history(3, 4, 60, &nodes());
        for event in &mut history.events {
            if event.f == "final"
                && event.x.node.as_deref() == Some("us-1")
                && event.kind == Kind::Ok
            {
                event.kind = Kind::Info;
            }
        }
        assert_eq!(check(&history).verdict, Verdict::Unknown);
    }

    #[test]
    fn a_used_up_budget_leaves_the_verdict_open() {
        let report = check_registers(&register_history(1, 5, 80, &nodes()), &nodes(), 3);
        assert_eq!(report.verdict, Verdict::Unknown);
    }
}
