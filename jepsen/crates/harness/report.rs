//! What a run says in the end, for people and for programs.

use crate::nemesis::Injection;
use crate::plan::{NetworkKind, Plan};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use tombolo_jepsen_check::{Op, Outcome, Report, Verdict};

/// How a region's clients fared.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    pub(crate) ok: u64,
    pub(crate) fail: u64,
    pub(crate) info: u64,
}

/// Everything about a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunReport {
    pub(crate) plan: Plan,
    pub(crate) verdict: Verdict,
    /// Why it is not valid, the gravest first.
    pub(crate) reasons: Vec<String>,
    pub(crate) check: Report,
    pub(crate) injections: Vec<Injection>,
    /// Until all nodes held the same after the faults; none if they did not in time.
    pub(crate) converged_ms: Option<u64>,
    /// By pair of regions, what `ctl verify` said.
    pub(crate) verified: Vec<(String, bool, String)>,
    /// By region.
    pub(crate) tallies: BTreeMap<String, Tally>,
    pub(crate) network: BTreeMap<String, f64>,
    /// The longest that this process did not get a turn for.
    pub(crate) starved_ms: u64,
}

impl RunReport {
    /// Makes the verdict worse for a reason.
    pub(crate) fn object(&mut self, verdict: Verdict, reason: impl Into<String>) {
        self.verdict = self.verdict.max(verdict);
        let reason = format!("{}: {}", verdict_word(verdict), reason.into());
        if verdict == Verdict::Invalid {
            self.reasons.insert(0, reason);
        } else {
            self.reasons.push(reason);
        }
    }

    /// What the run counts for: its verdict, and for a lie whether it was found out.
    pub(crate) fn accepted(&self) -> Verdict {
        match self.plan.sabotage {
            None => self.verdict,
            Some(lie) if self.check.counts.contains_key(&lie.finding()) => Verdict::Valid,
            // Whatever did not find the lie out cannot be relied on.
            Some(_) => Verdict::Unknown,
        }
    }

    /// One line.
    pub(crate) fn summary(&self) -> String {
        let sum = |part: fn(&Tally) -> u64| -> u64 { self.tallies.values().map(part).sum() };
        let effective = self.injections.iter().filter(|it| it.effective).count();
        let healed = self.converged_ms.map_or("not".into(), |ms| format!("in {ms} ms"));
        let found = match (self.plan.sabotage, self.accepted()) {
            (None, _) => "",
            (Some(_), Verdict::Valid) => " (the lie was found out, as it must be)",
            (Some(_), Verdict::Unknown | Verdict::Invalid) => " (THE LIE WAS NOT FOUND OUT)",
        };
        format!(
            "{:7}  {:34}{found}  {} ok, {} failed, {} open; {effective} of {} faults proven; converged {healed}",
            verdict_word(self.verdict),
            self.plan.name(),
            sum(|tally| tally.ok),
            sum(|tally| tally.fail),
            sum(|tally| tally.info),
            self.injections.len(),
        )
    }

    /// All of it, for people.
    pub(crate) fn text(&self) -> String {
        let mut text = self.summary();
        text.push('\n');
        // Writing to a string cannot fail.
        let mut line = |words: std::fmt::Arguments<'_>| {
            text.write_fmt(format_args!("  {words}\n")).ok();
        };
        if self.plan.network == NetworkKind::LoopbackProxy {
            line(format_args!("network: loopback proxy; no faults inside regions are possible"));
        }
        for reason in &self.reasons {
            line(format_args!("{reason}"));
        }
        for finding in &self.check.findings {
            line(format_args!("{:?}: {}", finding.kind, finding.text));
        }
        for injection in &self.injections {
            let Injection { what, begun_ms, ended_ms, proof, effective, apart: _ } = injection;
            let mark = if *effective { "proven" } else { "NOT PROVEN" };
            let proof = proof.join("; ");
            line(format_args!("{begun_ms} to {ended_ms} ms: {what}: {mark}: {proof}"));
        }
        for (region, tally) in &self.tallies {
            let Tally { ok, fail, info } = tally;
            line(format_args!("{region}: {ok} ok, {fail} failed, {info} open"));
        }
        for (name, value) in self.check.figures.iter().chain(&self.network) {
            line(format_args!("{name}: {value}"));
        }
        for (pair, equal, words) in &self.verified {
            let verdict = if *equal { "equal" } else { "NOT EQUAL" };
            line(format_args!("ctl verify {pair}: {verdict} ({words})"));
        }
        line(format_args!("longest pause of this process: {} ms", self.starved_ms));
        text
    }
}

pub(crate) fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Valid => "valid",
        Verdict::Unknown => "UNKNOWN",
        Verdict::Invalid => "INVALID",
    }
}

/// How many operations ended how, by region; what is read in the end does not count.
pub(crate) fn tally(ops: &[Op]) -> BTreeMap<String, Tally> {
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    for op in ops.iter().filter(|op| op.f != "final") {
        let region = op.facts.region.clone().unwrap_or_default();
        let tally = tallies.entry(region).or_default();
        match (op.outcome, &op.facts.actual) {
            // A refused compare-and-set was served.
            (Outcome::Ok, _) | (Outcome::Fail, Some(_)) => tally.ok += 1,
            (Outcome::Fail, None) => tally.fail += 1,
            (Outcome::Info, _) => tally.info += 1,
        }
    }
    tallies
}
