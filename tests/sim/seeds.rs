//! The seeds of every test run, and the proof that the checks bite.

use tombolo_core::{Rule, invariant::Invariant};
use tombolo_sim::{
    Counts, History, Mutant, Step, check, mutant::Caught, run, run_history, step::Event,
};

/// Seeds of one number of regions.
const SEEDS: u64 = 1_000;
/// Seeds in which every bug must be caught, of all numbers of regions together.
const MUTANT_SEEDS: u64 = 2_000;
const REGIONS: [u16; 3] = [2, 3, 5];

/// Runs the seeds and answers what happened; panics with the small history that fails.
fn all_hold(regions: u16) -> Counts {
    let mut counts = Counts::default();
    for seed in 0..SEEDS {
        match check(seed, regions, None) {
            Ok(of_one) => counts.add(&of_one),
            Err(failure) => panic!("{failure}"),
        }
    }
    // A history in which nothing goes wrong proves nothing.
    for (what, happened) in [
        ("repairs", counts.repairs),
        ("repairs that broke off", counts.broken_repairs),
        ("steps with a repair half done", counts.half_repaired),
        ("writes meanwhile", counts.half_repaired_writes),
        ("changes trimmed early", counts.trimmed),
        ("tombstones collected", counts.collected),
        ("leaders lost", counts.crashes),
        ("restores", counts.restores),
        ("joins", counts.joins),
        ("requests repeated where they are known", counts.repeats),
        ("requests executed in two regions", counts.twins),
        ("additions taken back", counts.taken_back),
        ("words that did not count yet", counts.untold),
    ] {
        assert!(happened > 20, "only {happened} {what} in {SEEDS} histories");
    }
    counts
}

#[test]
fn two_regions_keep_all_promises() {
    all_hold(2);
}

#[test]
fn three_regions_keep_all_promises() {
    let Counts { fences, start_overs, reviewed, .. } = all_hold(3);
    assert!(fences > 20 && start_overs > 20 && reviewed > 20);
}

#[test]
fn five_regions_keep_all_promises() {
    let Counts { fences, start_overs, reviewed, .. } = all_hold(5);
    assert!(fences > 20 && start_overs > 20 && reviewed > 20);
}

#[test]
fn one_seed_is_one_history_with_one_outcome() {
    for regions in REGIONS {
        assert_eq!(History::generate(7, regions), History::generate(7, regions));
        assert_eq!(run(7, regions, None), run(7, regions, None));
    }
}

/// How a bug is caught first.
fn caught(mutant: Mutant) -> Option<Caught> {
    let mut seeds = (0..MUTANT_SEEDS).zip(REGIONS.into_iter().cycle());
    seeds.find_map(|(seed, regions)| {
        let violation = run(seed, regions, Some(mutant)).err()?;
        assert_eq!(run(seed, regions, None).err(), None, "seed {seed} fails without a bug");
        Some(Caught { mutant, invariant: violation.invariant, seed, regions })
    })
}

#[test]
fn every_bug_is_caught() {
    let mut missed = Vec::new();
    println!("{:<24} {:<18} {:>5}  regions", "bug", "caught by", "seed");
    for mutant in Mutant::COMMON {
        match caught(mutant) {
            Some(Caught { invariant, seed, regions, .. }) => {
                let (mutant, invariant) = (mutant.name(), format!("{invariant:?}"));
                println!("{mutant:<24} {invariant:<18} {seed:>5}  {regions}");
            }
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "not caught within {MUTANT_SEEDS} seeds: {missed:?}");
}

#[test]
fn a_failing_history_is_made_small_and_still_fails() {
    let seed = caught(Mutant::CollectAtOnce).map(|caught| (caught.seed, caught.regions));
    let (seed, regions) = seed.unwrap();
    let failure = check(seed, regions, Some(Mutant::CollectAtOnce)).unwrap_err();
    let long = History::generate(seed, regions);
    assert!(failure.history.steps.len() < long.steps.len() / 4, "{failure}");
    assert!(!failure.trace.is_empty());
}

fn write(at: u8, delete: bool) -> Event {
    Event::Write { at, keys: (0, 0), pair: false, delete: (delete, false), expires: false }
}

fn commit(at: u8) -> Event {
    Event::Commit { at, count: 4 }
}

fn history(events: &[Event]) -> History {
    history_of(2, events)
}

fn history_of(regions: u16, events: &[Event]) -> History {
    let steps = events.iter().map(|&event| Step { wait_ms: 600, event }).collect();
    History { regions, rule: Rule::Siblings, batch: 1, page: 1, gate: true, steps }
}

/// The smallest history in which a merge of a repair that broke off is committed after the next
/// repair has compared. Random ones need some 30,000 seeds for it.
fn a_merge_comes_late() -> History {
    let messages = |requests, replies| Event::RepairMessages { at: 0, requests, replies };
    history(&[
        write(0, false),
        commit(0),
        write(1, false),
        commit(1),
        // The first repair brings the other region's value, and breaks off before that is committed.
        Event::Ask { puller: 0, source: 1, compare: false },
        Event::Tick { at: 0 },
        commit(0),
        messages(1, 1),
        messages(2, 1),
        Event::BreakRepair { at: 0 },
        // There it is deleted, and what is left is what is here.
        write(1, true),
        commit(1),
        Event::Flow { puller: 1, source: 0 },
        Event::Flow { puller: 1, source: 0 },
        Event::Tick { at: 0 },
        messages(1, 1),
        messages(1, 4),
        commit(0),
    ])
}

#[test]
fn a_merge_that_comes_late_brings_nothing_back() {
    let history = a_merge_comes_late();
    let violation = run_history(&history, Some(Mutant::CompareAtOnce)).unwrap_err();
    assert_eq!(violation.invariant, Invariant::NoResurrection);
    run_history(&history, None).unwrap();
}

#[test]
fn a_value_from_an_old_copy_stays_deleted_after_its_tombstone_is_gone() {
    let to_copy = Event::Flow { puller: 0, source: 1 };
    let back = Event::Flow { puller: 1, source: 0 };
    let history = history(&[
        write(1, false),
        commit(1),
        to_copy,
        to_copy,
        Event::Backup { at: 0 },
        write(1, true),
        commit(1),
        to_copy,
        back,
        to_copy,
        back,
        Event::Collect { at: 1 },
        commit(1),
        Event::TrimStable { at: 1 },
        commit(1),
        Event::Restore { at: 0 },
    ]);
    assert_eq!(run_history(&history, None).unwrap().restores, 1);
    let violation = run_history(&history, Some(Mutant::ForgetCoverage)).unwrap_err();
    assert_eq!(violation.invariant, Invariant::NoResurrection);
}

fn flow(puller: u8, source: u8) -> Event {
    Event::Flow { puller, source }
}

/// Regions hear of the next act, and their logs apply it.
fn hear(regions: &[u8]) -> Vec<Event> {
    regions.iter().flat_map(|&at| [Event::Hear { at, skip: 0 }, commit(at)]).collect()
}

fn fails(history: &History, mutant: Mutant, invariants: &[Invariant]) {
    assert_eq!(run_history(history, None).err(), None);
    let broken = run_history(history, Some(mutant)).err().map(|violation| violation.invariant);
    assert!(broken.is_some_and(|broken| invariants.contains(&broken)), "{broken:?}");
}

/// The third region joins from the first, and the second has not heard of it.
#[test]
fn a_word_that_knows_of_more_regions_does_not_count() {
    let history = history_of(
        2,
        &[
            vec![Event::Join { at: 2 }],
            hear(&[0]),
            vec![
                Event::Repair { at: 2, rounds: 9 },
                commit(2),
                write(0, true),
                commit(0),
                flow(1, 0),
                Event::Collect { at: 1 },
                commit(1),
            ],
        ]
        .concat(),
    );
    fails(&history, Mutant::TellWithoutMembers, &[Invariant::StableSound]);
}

/// The fourth region is fenced; the third, which has not heard of it, takes a write of it, and is fenced
/// in its turn, of which the second has not heard. By then the first must still expect that write.
#[test]
fn one_fenced_region_counts_while_another_may_pass_on_its_writes() {
    let history = history_of(
        4,
        &[
            vec![Event::Fence { at: 3 }],
            hear(&[0, 1]),
            vec![
                flow(0, 1),
                write(3, false),
                commit(3),
                flow(2, 3),
                write(0, true),
                commit(0),
                flow(2, 0),
                flow(0, 2),
                flow(1, 0),
                flow(0, 1),
                Event::Fence { at: 2 },
            ],
            hear(&[0]),
            vec![Event::Collect { at: 0 }, commit(0)],
        ]
        .concat(),
    );
    run_history(&history, None).unwrap();
}

/// The third region is fenced, comes back and is fenced again. What the second told after the first time
/// says nothing of the second time.
#[test]
fn a_region_that_is_fenced_twice_counts_twice() {
    let history = history_of(
        3,
        &[
            vec![Event::Fence { at: 2 }],
            hear(&[0, 1]),
            vec![flow(0, 1), Event::Join { at: 2 }],
            hear(&[0, 1]),
            vec![Event::Tick { at: 2 }, commit(2)],
            vec![Event::Repair { at: 2, rounds: 9 }; 3],
            vec![commit(2)],
            hear(&[0, 1]),
            vec![
                Event::Tick { at: 0 },
                Event::Tick { at: 1 },
                write(0, true),
                commit(0),
                flow(1, 0),
                flow(0, 1),
                write(2, false),
                commit(2),
                flow(1, 2),
                Event::Fence { at: 2 },
            ],
            hear(&[0]),
            vec![Event::Collect { at: 0 }, commit(0)],
        ]
        .concat(),
    );
    let counts = run_history(&history, None).unwrap();
    assert_eq!((counts.fences, counts.start_overs), (2, 1), "{counts:?}");
}

/// The third region comes back. A write of its former life is only in the fourth, which passes it on to
/// the second after that one was repaired from, and is fenced then.
#[test]
fn one_that_comes_back_repairs_again_after_a_fence() {
    let history = history_of(
        4,
        &[
            vec![Event::Fence { at: 2 }, write(2, false), commit(2), flow(3, 2)],
            hear(&[0, 1, 3]),
            vec![Event::Join { at: 2 }],
            hear(&[0, 1]),
            vec![Event::Tick { at: 2 }, commit(2)],
            vec![Event::Repair { at: 2, rounds: 9 }; 3],
            vec![flow(1, 3), Event::Tick { at: 1 }, flow(1, 3), Event::Tick { at: 1 }, flow(1, 3)],
            vec![Event::Fence { at: 3 }],
            hear(&[0, 1, 2]),
            vec![Event::Tick { at: 2 }, commit(2)],
        ]
        .concat(),
    );
    assert_eq!(run_history(&history, None).unwrap().start_overs, 1);
    fails(&history, Mutant::RepairBeforeFence, &[Invariant::Convergence, Invariant::StableSound]);
}

/// The third region compares with the first, and comes back before the answer is merged.
#[test]
fn what_was_compared_in_a_former_life_is_not_merged() {
    let messages = |requests, replies| Event::RepairMessages { at: 2, requests, replies };
    let history = history_of(
        3,
        &[
            vec![
                write(0, false),
                commit(0),
                write(1, false),
                commit(1),
                flow(2, 0),
                flow(0, 1),
                Event::Fence { at: 2 },
                Event::Join { at: 2 },
                Event::Ask { puller: 2, source: 0, compare: false },
                Event::Tick { at: 2 },
                commit(2),
                messages(1, 1),
                messages(2, 0),
            ],
            hear(&[1, 1]),
            vec![Event::Tick { at: 2 }, messages(0, 4), commit(2)],
        ]
        .concat(),
    );
    assert_eq!(run_history(&history, None).unwrap().start_overs, 1);
    let lost = [Invariant::NoLostWrite, Invariant::Convergence];
    fails(&history, Mutant::RepairOnWhileStartingOver, &lost);
}
