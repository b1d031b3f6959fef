//! What a checker says.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most findings kept of one kind: the first few tell what is wrong, thousands hide it.
const FINDINGS_MAX: usize = 20;

/// Ordered from best to worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Everything that was promised was looked at and held.
    #[default]
    Valid,
    /// Nothing wrong was seen, but not everything could be looked at. Counts as a failure.
    Unknown,
    /// A promise was broken.
    Invalid,
}

/// What kind of thing was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// No order of a key's operations explains what clients were told.
    NotLinearizable,
    /// A read missed what was acknowledged or shown in its region before it began.
    StaleRead,
    /// An acknowledged add is missing after the faults.
    LostAdd,
    /// A read shows what nobody wrote, or what was refused.
    ThinAir,
    /// What was deleted is back.
    Resurrection,
    /// Nodes hold different data after the faults.
    Diverged,
    /// The checker gave up.
    GaveUp,
    /// The history does not hold what the checker needs.
    Incomplete,
}

impl FindingKind {
    /// What a finding of this kind makes of the verdict.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        match self {
            Self::NotLinearizable
            | Self::StaleRead
            | Self::LostAdd
            | Self::ThinAir
            | Self::Resurrection
            | Self::Diverged => Verdict::Invalid,
            Self::GaveUp | Self::Incomplete => Verdict::Unknown,
        }
    }
}

/// One thing that a person must look at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Its kind.
    pub kind: FindingKind,
    /// The rest, in words.
    pub text: String,
}

/// What a checker says of a history.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The worst of the findings'.
    pub verdict: Verdict,
    /// The first few of each kind.
    pub findings: Vec<Finding>,
    /// How many there were of each kind.
    pub counts: BTreeMap<FindingKind, u64>,
    /// Numbers for people, by name; names end in their unit.
    pub figures: BTreeMap<String, f64>,
}

impl Report {
    /// Adds a finding.
    pub fn find(&mut self, kind: FindingKind, text: impl Into<String>) {
        self.verdict = self.verdict.max(kind.verdict());
        *self.counts.entry(kind).or_default() += 1;
        if self.findings.iter().filter(|finding| finding.kind == kind).count() < FINDINGS_MAX {
            self.findings.push(Finding { kind, text: text.into() });
        }
    }

    /// Sets a figure.
    #[expect(clippy::cast_precision_loss, reason = "figures are read by people")]
    pub fn figure(&mut self, name: &str, value: u64) {
        self.figures.insert(name.into(), value as f64);
    }
}
