//! The promises between regions: what is acknowledged arrives everywhere, nothing else does, and
//! what is deleted stays deleted.
//!
//! Elements are unique: each is added once, and removed at most by somebody who has seen it. Reads
//! are linearizable in their region, so inside one region the visibility of an element is a step
//! up and, with a remove, a step down. In the end every node is read by itself.
//!
//! Not here: reads of one region being stale about another are no fault; how long they are is a
//! figure.

use crate::op::{Op, Outcome, pair};
use crate::report::{FindingKind, Report};
use std::collections::{BTreeMap, BTreeSet};
use tombolo_jepsen_history::History;

/// Checks every set of a history; `nodes` are those that must have told what they hold in the end.
#[must_use]
pub fn check_sets(history: &History, nodes: &[String]) -> Report {
    let mut report = Report::default();
    let ops = match pair(history) {
        Ok(ops) => ops,
        Err(malformed) => {
            report.find(FindingKind::Incomplete, malformed.to_string());
            return report;
        }
    };
    let mut sets: BTreeMap<&str, Set<'_>> = BTreeMap::new();
    for op in &ops {
        let known = sets.entry(&op.key).or_default().take_in(op);
        if known.is_none() {
            let text = format!("{}: cannot read an operation of process {}", op.key, op.process);
            report.find(FindingKind::Incomplete, text);
        }
    }
    let mut delays = Vec::new();
    let mut totals = BTreeMap::<&str, u64>::new();
    for (key, set) in &sets {
        set.check_reads(key, &mut delays, &mut report);
        set.check_finals(key, nodes, &mut report);
        let acknowledged =
            |ops: &BTreeMap<u64, &Op>| ops.values().filter(|op| op.outcome == Outcome::Ok).count();
        *totals.entry("adds_acknowledged").or_default() += acknowledged(&set.adds) as u64;
        *totals.entry("removes_acknowledged").or_default() += acknowledged(&set.removes) as u64;
        *totals.entry("reads").or_default() += set.reads.len() as u64;
    }
    report.figure("sets", sets.len() as u64);
    report.figure("operations", ops.len() as u64);
    for (name, total) in totals {
        report.figure(name, total);
    }
    delays.sort_unstable();
    for (name, share) in [("p50", 50), ("p95", 95), ("max", 100)] {
        if let Some(nanos) = delays.get((delays.len() * share / 100).min(delays.len().max(1) - 1)) {
            report.figure(&format!("seen_in_other_regions_{name}_ms"), nanos / 1_000_000);
        }
    }
    report
}

/// A successful read.
struct Read<'a> {
    op: &'a Op,
    ret: u64,
    elements: BTreeSet<u64>,
}

/// Everything about one set.
#[derive(Default)]
struct Set<'a> {
    adds: BTreeMap<u64, &'a Op>,
    removes: BTreeMap<u64, &'a Op>,
    reads: Vec<Read<'a>>,
    finals: Vec<Read<'a>>,
}

impl<'a> Set<'a> {
    /// Sorts an operation in; none if it makes no sense.
    fn take_in(&mut self, op: &'a Op) -> Option<()> {
        match (&*op.f, op.outcome) {
            ("add", _) => {
                let twice = self.adds.insert(op.input.as_u64()?, op);
                twice.is_none().then_some(())
            }
            // A second remover of an element changes nothing that is checked; the first counts
            // unless only the second is known to have worked.
            ("remove", _) => {
                let first = self.removes.entry(op.input.as_u64()?).or_insert(op);
                if first.outcome != Outcome::Ok {
                    *first = op;
                }
                Some(())
            }
            ("read" | "final", Outcome::Ok) => {
                let elements = op.output.as_array()?.iter().map(serde_json::Value::as_u64);
                let read = Read { op, ret: op.ret?, elements: elements.collect::<Option<_>>()? };
                if op.f == "final" { &mut self.finals } else { &mut self.reads }.push(read);
                Some(())
            }
            ("read" | "final", Outcome::Fail | Outcome::Info) => Some(()),
            _ => None,
        }
    }

    fn check_reads(&self, key: &str, delays: &mut Vec<u64>, report: &mut Report) {
        for read in self.reads.iter().chain(&self.finals) {
            for element in &read.elements {
                let why = match self.adds.get(element) {
                    None => "nobody added",
                    Some(add) if add.outcome == Outcome::Fail => "was refused",
                    Some(add) if read.ret < add.call => "was added only later",
                    Some(_) => continue,
                };
                let text = format!("{key}: {} shows {element}, which {why}", describe(read));
                report.find(FindingKind::ThinAir, text);
            }
        }
        let mut regions: BTreeMap<&str, Vec<&Read<'_>>> = BTreeMap::new();
        for read in &self.reads {
            regions.entry(region(read.op)).or_default().push(read);
        }
        for (at, reads) in &regions {
            for (element, add) in &self.adds {
                let seen = self.check_element(key, *element, add, (at, reads), report);
                // Nobody looked in time: it came before the end, at the latest.
                let seen = seen.or_else(|| self.finally_seen(*element, at));
                if let (true, Some(seen), Some(acknowledged)) = (region(add) != *at, seen, add.ret)
                {
                    delays.push(seen.saturating_sub(acknowledged));
                }
            }
        }
    }

    /// When a node of the region showed an element in the end.
    fn finally_seen(&self, element: u64, at: &str) -> Option<u64> {
        let here = self.finals.iter().filter(|read| region(read.op) == at);
        here.filter(|read| read.elements.contains(&element)).map(|read| read.ret).min()
    }

    /// Follows one element through the reads of one region, which are in order of their begin, and
    /// says when it was first shown.
    fn check_element(
        &self,
        key: &str,
        element: u64,
        add: &Op,
        (at, reads): (&str, &[&Read<'_>]),
        report: &mut Report,
    ) -> Option<u64> {
        let here = |op: &Op| region(op) == at;
        let remove = self.removes.get(&element).filter(|op| op.outcome != Outcome::Fail);
        // From these times on, a read that begins later must show it, or must not.
        let mut shown_since = add.ret.filter(|_| add.outcome == Outcome::Ok && here(add));
        let mut gone_since =
            remove.and_then(|op| op.ret.filter(|_| op.outcome == Outcome::Ok && here(op)));
        let mut first_seen = None;
        // Ends of reads, to be taken in when a read begins after them.
        let mut shown: Vec<u64> = Vec::new();
        let mut missing: Vec<u64> = Vec::new();
        for read in reads {
            let begin = read.op.call;
            shown_since =
                shown.iter().filter(|end| **end < begin).copied().chain(shown_since).min();
            let vanished = shown_since
                .is_some_and(|since| missing.iter().any(|end| *end < begin && *end > since));
            if read.elements.contains(&element) {
                first_seen = first_seen.or(Some(read.ret));
                if gone_since.is_some_and(|since| since < begin) {
                    let text =
                        format!("{key}: {} shows {element}, which was deleted", describe(read));
                    report.find(FindingKind::Resurrection, text);
                    // One finding an element and region.
                    gone_since = None;
                } else if vanished && remove.is_some() {
                    let text = format!("{key}: {} shows {element} again", describe(read));
                    report.find(FindingKind::Resurrection, text);
                    missing.clear();
                }
                shown.push(read.ret);
            } else {
                let may_be_gone = remove.is_some_and(|op| op.call <= read.ret);
                if !may_be_gone && shown_since.is_some_and(|since| since < begin) {
                    let text = format!("{key}: {} misses {element}", describe(read));
                    report.find(FindingKind::StaleRead, text);
                }
                // Only what begins after the element was shown says that it went away.
                if shown_since.is_some_and(|since| since < begin) {
                    missing.push(read.ret);
                }
            }
        }
        first_seen
    }

    fn check_finals(&self, key: &str, nodes: &[String], report: &mut Report) {
        let told: BTreeMap<&str, &Read<'_>> = self
            .finals
            .iter()
            .filter_map(|read| Some((read.op.facts.node.as_deref()?, read)))
            .collect();
        let silent: Vec<&str> =
            nodes.iter().map(|node| &**node).filter(|node| !told.contains_key(node)).collect();
        if !silent.is_empty() {
            let text = format!("{key}: not read in the end on {}", silent.join(", "));
            report.find(FindingKind::Incomplete, text);
        }
        let elements: BTreeSet<u64> = told
            .values()
            .flat_map(|read| &read.elements)
            .chain(self.adds.keys())
            .copied()
            .collect();
        for element in elements {
            let (with, without): (Vec<&str>, Vec<&str>) =
                told.keys().partition(|node| told[*node].elements.contains(&element));
            if !with.is_empty() && !without.is_empty() {
                let (with, without) = (with.join(", "), without.join(", "));
                let text = format!("{key}: {element} is on {with} and not on {without}");
                report.find(FindingKind::Diverged, text);
            }
            let added = self.adds.get(&element).is_some_and(|add| add.outcome == Outcome::Ok);
            let removed = self.removes.get(&element).map(|op| op.outcome);
            match removed {
                Some(Outcome::Ok) if !with.is_empty() => {
                    let text =
                        format!("{key}: {element} was deleted and is on {}", with.join(", "));
                    report.find(FindingKind::Resurrection, text);
                }
                None | Some(Outcome::Fail) if added && !without.is_empty() => {
                    let text = format!("{key}: {element} is missing on {}", without.join(", "));
                    report.find(FindingKind::LostAdd, text);
                }
                None | Some(Outcome::Ok | Outcome::Fail | Outcome::Info) => {}
            }
        }
    }
}

fn region(op: &Op) -> &str {
    op.facts.region.as_deref().unwrap_or_default()
}

fn describe(read: &Read<'_>) -> String {
    let node = read.op.facts.node.as_deref().unwrap_or("an unknown node");
    format!("the {} on {node} at {} ms", read.op.f, read.op.call / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Verdict;
    use crate::testing::{Mutation, set_history};
    use serde_json::{Value, json};
    use tombolo_jepsen_history::{Event, Kind};

    fn nodes() -> Vec<String> {
        ["ap-1", "eu-1", "eu-2", "us-1", "us-2"].map(str::to_owned).to_vec()
    }

    /// Applies a mutation to many valid histories: all that it can be applied to must turn.
    fn turns_invalid(name: &str, kind: FindingKind, removes: bool, mutate: Mutation) {
        let mut applied = 0;
        for seed in 0..100 {
            let mut history = set_history(seed, 30, removes, &nodes());
            if mutate(&mut history).is_none() {
                continue;
            }
            applied += 1;
            let report = check_sets(&history, &nodes());
            assert_eq!(report.verdict, Verdict::Invalid, "{name}, seed {seed}");
            assert!(report.counts.contains_key(&kind), "{name}, seed {seed}: {report:?}");
        }
        assert!(applied > 50, "{name} could be applied to {applied} histories only");
    }

    #[test]
    fn histories_of_correct_sets_are_valid() {
        for seed in 0..200 {
            for removes in [false, true] {
                let report = check_sets(&set_history(seed, 40, removes, &nodes()), &nodes());
                assert_eq!(report.verdict, Verdict::Valid, "seed {seed}: {report:?}");
                assert!(report.figures["seen_in_other_regions_max_ms"] >= 0.0);
            }
        }
    }

    fn without(event: &mut Event, element: &Value) {
        event.value.as_array_mut().unwrap().retain(|kept| kept != element);
    }

    fn finals(history: &mut History) -> impl Iterator<Item = &mut Event> {
        history.events.iter_mut().filter(|event| event.f == "final" && event.kind == Kind::Ok)
    }

    /// Of the first add or remove that was acknowledged.
    fn acknowledged(history: &History, f: &str) -> Option<Value> {
        let found = history.events.iter().find(|event| event.kind == Kind::Ok && event.f == f);
        found.map(|event| event.value.clone())
    }

    #[test]
    fn an_add_that_is_lost_everywhere_is_found() {
        turns_invalid("lost add", FindingKind::LostAdd, false, |history| {
            let element = acknowledged(history, "add")?;
            finals(history).for_each(|event| without(event, &element));
            Some(())
        });
    }

    #[test]
    fn an_add_that_is_lost_on_one_node_is_found() {
        turns_invalid("lost on one node", FindingKind::LostAdd, false, |history| {
            let element = acknowledged(history, "add")?;
            without(finals(history).last()?, &element);
            Some(())
        });
    }

    #[test]
    fn one_diverged_node_is_found() {
        turns_invalid("diverged", FindingKind::Diverged, true, |history| {
            // Allowed to be there, as nobody knows whether it is, but not on one node only.
            let open = history.events.iter().find(|it| it.kind == Kind::Info && it.f == "add")?;
            let element = open.value.clone();
            let present = finals(history).next()?.value.as_array()?.contains(&element);
            let event = finals(history).last()?;
            if present {
                without(event, &element);
            } else {
                event.value.as_array_mut()?.push(element);
            }
            Some(())
        });
    }

    #[test]
    fn an_element_out_of_thin_air_is_found() {
        turns_invalid("thin air", FindingKind::ThinAir, false, |history| {
            for event in finals(history) {
                event.value.as_array_mut()?.push(json!(777_777));
            }
            Some(())
        });
    }

    #[test]
    fn a_refused_add_that_is_there_is_found() {
        turns_invalid("refused add", FindingKind::ThinAir, false, |history| {
            let refused =
                history.events.iter().find(|it| it.kind == Kind::Fail && it.f == "add")?;
            let element = refused.value.clone();
            for event in finals(history) {
                event.value.as_array_mut()?.push(element.clone());
            }
            Some(())
        });
    }

    #[test]
    fn an_element_that_is_back_in_the_end_is_found() {
        turns_invalid("resurrected", FindingKind::Resurrection, true, |history| {
            let element = acknowledged(history, "remove")?;
            for event in finals(history) {
                event.value.as_array_mut()?.push(element.clone());
            }
            Some(())
        });
    }

    #[test]
    fn an_element_that_flickers_in_another_region_is_found() {
        turns_invalid("flicker", FindingKind::Resurrection, true, |history| {
            let element = acknowledged(history, "remove")?;
            // The last read of some region: it was gone there long before.
            let last =
                history.events.iter_mut().rfind(|it| it.kind == Kind::Ok && it.f == "read")?;
            last.value.as_array_mut()?.push(element);
            Some(())
        });
    }

    #[test]
    fn a_read_that_misses_what_its_region_has_acknowledged_is_found() {
        turns_invalid("stale read", FindingKind::StaleRead, false, |history| {
            let add =
                history.events.iter().find(|it| it.kind == Kind::Ok && it.f == "add")?.clone();
            let read = history
                .events
                .iter_mut()
                .rfind(|it| it.kind == Kind::Ok && it.f == "read" && it.x.region == add.x.region)?;
            without(read, &add.value);
            Some(())
        });
    }

    #[test]
    fn a_node_that_is_not_read_in_the_end_leaves_the_verdict_open() {
        let mut history = set_history(5, 30, true, &nodes());
        finals(&mut history).last().unwrap().kind = Kind::Info;
        let report = check_sets(&history, &nodes());
        assert_eq!(report.verdict, Verdict::Unknown, "{report:?}");
    }
}
