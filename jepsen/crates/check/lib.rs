//! Checkers: does a history keep the promises? Pure functions of the history; no I/O, no clock.
//!
//! A verdict is `valid`, `invalid`, or `unknown` when a checker gave up or had too little to look
//! at; unknown is not a pass.
//!
//! Invariants:
//! * A completion of kind `info` is taken as "may have happened, may still happen": no checker
//!   calls a history invalid that some fate of such operations explains.
//! * `invalid` comes with a finding that names keys and times, so that it can be looked up.
//!
//! Every checker is tested in two ways: histories of a correct store must pass, and each of a list
//! of mutations of them must not (`testing`).
//!
//! Not here: how a history is written (`tombolo-jepsen-history`), whether a run injected the faults
//! that it promised (the harness).

mod op;
mod register;
mod report;
mod revision;
mod set;
#[cfg(test)]
mod testing;
mod wgl;

pub use op::{Malformed, Op, Outcome, pair};
pub use register::check_registers;
pub use report::{Finding, FindingKind, Report, Verdict};
pub use set::check_sets;
pub use wgl::{Action, Call, Judgement, STEPS, judge};
