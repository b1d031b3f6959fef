//! Makes a failing history small: leaves out what it fails without.
//!
//! Source: Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002), ddmin.

use tombolo_core::invariant::Invariant;

use crate::{Failure, History, Mutant, Violation, World, run_history};

/// Histories tried at most.
const TRIES_MAX: usize = 4_000;

/// The smallest history found that breaks the same promise.
pub fn minimize(
    seed: u64,
    mut history: History,
    mutant: Option<Mutant>,
    mut violation: Violation,
) -> Failure {
    let regions = history.regions;
    history.steps.truncate(violation.step + 1);
    let mut tries = 0;
    let mut chunk = history.steps.len().div_ceil(2).max(1);
    loop {
        let (mut at, mut shorter) = (0, false);
        while at < history.steps.len() && tries < TRIES_MAX {
            let mut candidate = history.clone();
            candidate.steps.drain(at..(at + chunk).min(candidate.steps.len()));
            tries += 1;
            match breaks(&candidate, mutant, violation.invariant) {
                Some(again) => {
                    candidate.steps.truncate(again.step + 1);
                    (history, violation, shorter) = (candidate, again, true);
                }
                None => at += chunk,
            }
        }
        if tries >= TRIES_MAX || (chunk == 1 && !shorter) {
            break;
        }
        chunk = if shorter { chunk } else { chunk.div_ceil(2).max(1) };
        chunk = chunk.min(history.steps.len().max(1));
    }
    let mut world = World::new(&history, mutant);
    world.keep_trace();
    let _ = world.run(&history);
    Failure { seed, regions, mutant, violation, history, trace: world.take_trace() }
}

fn breaks(history: &History, mutant: Option<Mutant>, invariant: Invariant) -> Option<Violation> {
    run_history(history, mutant).err().filter(|violation| violation.invariant == invariant)
}
