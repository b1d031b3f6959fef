//! Bugs to put in, so that the simulation proves that it would find them.
//!
//! Each is a decision that the simulation makes around the core, made wrong; the core has no switch.

use tombolo_core::invariant::Invariant;

/// A deliberate bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutant {
    /// A repair concludes nothing from what the source lacks.
    ForgetCoverage,
    /// A repair leaves out one branch of the tree that differs.
    ForgetBranch,
    /// A repair does not offer tombstones.
    ForgetTombstones,
    /// A repair does not offer what is ahead of the source's own frontier.
    ForgetAhead,
    /// A repair drops the last page of records.
    ForgetLastPage,
    /// A source sends no value that it has applied itself, whatever the receiver has.
    KnownByTheSource,
    /// The frontier moves to the cut before the records are merged.
    AdvanceFirst,
    /// Streams go on during a repair, and the frontier moves to the cut although other changes came
    /// since the comparison.
    AdvanceBlindly,
    /// The end of a repair does not say that the log lacks what it jumped over.
    AdvanceKeepsLog,
    /// What has arrived is acknowledged, applied or not.
    AcknowledgeArrived,
    /// Tombstones go as soon as they are applied here.
    CollectAtOnce,
    /// Tombstones go when every region has acknowledged them, whatever may still come.
    CollectByAcknowledged,
    /// What a region told counts at once, before its own events are here.
    SettleAtOnce,
    /// A region that has not spoken counts as having everything.
    SilenceCounts,
    /// Changes go out without what they depend on.
    ForgetDependencies,
    /// A batch goes out as single writes.
    SplitBatches,
    /// The tree does not see deletions.
    TreeForgetsDeletions,
    /// Every region passes on all others' changes at all times.
    RelayAlways,
    /// A region restored from a copy goes on under its old incarnation.
    ReuseIncarnation,
    /// A region that joins writes before it has repaired.
    WriteBeforeRepair,
    /// A region that joins tells its frontier before it has repaired.
    TellBeforeRepair,
    /// A region that joins drops tombstones before it has repaired.
    CollectBeforeRepair,
    /// A region that comes back writes after it has repaired from one other.
    WriteAfterOneRepair,
    /// A fenced region comes back with what it wrote alone.
    KeepFencedWrites,
    /// A fenced region is no longer counted at once, whatever of it is still under way.
    UncountAtOnce,
    /// What a region tells counts, although it knows of regions of which the receiver has not heard.
    TellWithoutMembers,
    /// Commands are taken from whomever they come.
    TakeFromFenced,
    /// Tombstones go although the region has heard of others since it counted.
    CollectUncounted,
    /// A source serves a region, or a new life of one, of which it has not heard.
    ServeUnheard,
    /// Records reach a region in any order.
    HearOutOfOrder,
    /// For one that comes back, a repair counts although its source had not heard of a fence then.
    RepairBeforeFence,
    /// A region that starts over goes on taking from others until that is committed.
    RepairOnWhileStartingOver,
    /// What a repair brings for the ledger is dropped.
    ForgetLedger,
    /// That the log is gone is forgotten if it is told while a repair is under way.
    ForgetTrimmed,
    /// A repair brings the ledger last.
    LedgerLast,
    /// A repair brings what trees do not show after what they show.
    RestLast,
    /// A region does not remember the requests of changes that come from others.
    ForgetHeardRequests,
    /// A repair compares before all that an earlier one proposed is merged.
    CompareAtOnce,
}

impl Mutant {
    /// Those that every test run catches.
    pub const COMMON: [Self; 26] = [
        Self::ForgetBranch,
        Self::ForgetTombstones,
        Self::ForgetLastPage,
        Self::KnownByTheSource,
        Self::AdvanceFirst,
        Self::AdvanceKeepsLog,
        Self::AcknowledgeArrived,
        Self::CollectAtOnce,
        Self::CollectByAcknowledged,
        Self::SettleAtOnce,
        Self::SilenceCounts,
        Self::ForgetDependencies,
        Self::SplitBatches,
        Self::TreeForgetsDeletions,
        Self::RelayAlways,
        Self::ReuseIncarnation,
        Self::KeepFencedWrites,
        Self::WriteBeforeRepair,
        Self::WriteAfterOneRepair,
        Self::UncountAtOnce,
        Self::TakeFromFenced,
        Self::ForgetLedger,
        Self::ForgetTrimmed,
        Self::LedgerLast,
        Self::RestLast,
        Self::ForgetHeardRequests,
    ];

    /// Those that need a rare chain of events: for the long mode, or a history of their own.
    pub const RARE: [Self; 12] = [
        Self::ForgetCoverage,
        Self::CollectBeforeRepair,
        Self::ForgetAhead,
        Self::AdvanceBlindly,
        Self::CompareAtOnce,
        Self::TellBeforeRepair,
        Self::TellWithoutMembers,
        Self::CollectUncounted,
        Self::ServeUnheard,
        Self::HearOutOfOrder,
        Self::RepairBeforeFence,
        Self::RepairOnWhileStartingOver,
    ];

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::COMMON.into_iter().chain(Self::RARE)
    }

    /// Its name on the command line.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// The bug of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|mutant| mutant.name() == name)
    }
}

/// How a bug was caught.
#[derive(Clone, Debug)]
pub struct Caught {
    /// The bug.
    pub mutant: Mutant,
    /// By which promise.
    pub invariant: Invariant,
    /// In the history of which seed.
    pub seed: u64,
    /// Of how many regions.
    pub regions: u16,
}
