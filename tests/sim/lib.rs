//! Seeded simulation: whole regions under every fault, one history for each seed.
//!
//! The regions run the production code of `tombolo-core`: the state machine, the order in which
//! changes go out ([`tombolo_core::outgoing`]) and are taken ([`tombolo_core::pending`]), who relays,
//! what is stable, what a repair compares and merges. What the simulation puts around it is what the
//! server puts around it, without tasks and sockets: a queue for each region's Raft log, streams
//! that are delivered when the history says so, and a leader's memory that a crash loses.
//!
//! A history is a list of [`Step`]s that carry every choice, so any part of it is a history, too: that
//! is how a failing one is made small ([`minimize`]). After every step, and again after all faults
//! are healed, the regions are compared with an omniscient record of all writes ([`truth`]) under the
//! names of [`tombolo_core::invariant::Invariant`].
//!
//! Invariants:
//! * One seed gives one history and one outcome: no clock, no hash-map order, no threads.
//! * What is checked is computed without the code that is checked.
//! * The checks bite: every [`Mutant`] is caught (`seeds.rs`).
//!
//! Reading order: [`step`], [`region`], [`link`], [`repair`], [`world`], [`truth`].
//!
//! Not here: Raft itself (a region's log is a queue), disks, and the tasks around the core; those are
//! tested with real nodes in `tests/it`. Documented in `docs/simulation.md`.

pub mod link;
pub mod minimize;
pub mod mutant;
pub mod region;
pub mod repair;
pub mod step;
pub mod truth;
pub mod world;

use tombolo_core::invariant::Invariant;

pub use mutant::Mutant;
pub use step::{History, Step};
pub use world::{Counts, World};

/// A promise that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// What was seen.
    pub seen: String,
    /// After how many steps; more than there are if it was after healing.
    pub step: usize,
}

/// A history that broke a promise, as small as it could be made.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// How many regions it has.
    pub regions: u16,
    /// The bug that was put in, if any.
    pub mutant: Option<Mutant>,
    /// What the small history breaks.
    pub violation: Violation,
    /// The small history.
    pub history: History,
    /// What happened in it, a line for each step.
    pub trace: Vec<String>,
}

/// Runs the history of a seed.
///
/// # Errors
/// The promise that did not hold.
pub fn run(seed: u64, regions: u16, mutant: Option<Mutant>) -> Result<Counts, Violation> {
    run_history(&History::generate(seed, regions), mutant)
}

/// Runs a history.
///
/// # Errors
/// The promise that did not hold.
pub fn run_history(history: &History, mutant: Option<Mutant>) -> Result<Counts, Violation> {
    World::new(history, mutant).run(history)
}

/// Runs the history of a seed, and makes it small if it fails.
///
/// # Errors
/// The small history and what it breaks.
pub fn check(seed: u64, regions: u16, mutant: Option<Mutant>) -> Result<Counts, Box<Failure>> {
    run(seed, regions, mutant).map_err(|violation| {
        let history = History::generate(seed, regions);
        Box::new(minimize::minimize(seed, history, mutant, violation))
    })
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seed, regions, violation, history, trace, .. } = self;
        writeln!(f, "{}", violation.invariant)?;
        writeln!(f, "  {}", violation.seen)?;
        writeln!(f, "seed {seed}, {regions} regions, rule {}", history.rule.name())?;
        writeln!(f, "the shortest history found, {} steps:", history.steps.len())?;
        for line in trace {
            writeln!(f, "  {line}")?;
        }
        write!(
            f,
            "replay: cargo run -p tombolo-sim -- --seed {seed} --regions {regions} --verbose"
        )?;
        match self.mutant {
            Some(mutant) => writeln!(f, " --mutant {}", mutant.name()),
            None => writeln!(f),
        }
    }
}
