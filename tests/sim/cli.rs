//! The long mode of the simulation, and the replay of one seed.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use tombolo_sim::{Counts, History, Mutant, World, check};

/// Runs seeded histories of regions and checks every invariant after every step.
#[derive(Parser)]
#[command(name = "tombolo-sim")]
struct Arguments {
    /// The seed, or the first one
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds to run
    #[arg(long)]
    seeds: Option<u64>,
    /// Run seeds for so many minutes
    #[arg(long, conflicts_with = "seeds")]
    minutes: Option<u64>,
    /// How many regions; 2, 3 and 5 in turn if left out
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16))]
    regions: Option<u16>,
    /// Put in this bug
    #[arg(long, value_parser = parse_mutant)]
    mutant: Option<Mutant>,
    /// Print what happens in the first history
    #[arg(long)]
    verbose: bool,
}

fn parse_mutant(name: &str) -> Result<Mutant, String> {
    let names = || Mutant::all().map(Mutant::name).collect::<Vec<_>>().join(", ");
    Mutant::named(name).ok_or_else(|| format!("known: {}", names()))
}

fn main() -> io::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut out = io::stdout().lock();
    if arguments.verbose {
        let regions = arguments.regions.unwrap_or(3);
        let history = History::generate(arguments.seed, regions);
        let mut world = World::new(&history, arguments.mutant);
        world.keep_trace();
        let ended = world.run(&history);
        for line in world.take_trace() {
            writeln!(out, "{line}")?;
        }
        writeln!(out, "{ended:#?}")?;
    }
    let began = Instant::now();
    let limit = arguments.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let mut counts = Counts::default();
    let mut run = 0;
    loop {
        let is_over = match limit {
            Some(limit) => limit <= began.elapsed(),
            None => arguments.seeds.unwrap_or(1) <= run,
        };
        if is_over {
            break;
        }
        let seed = arguments.seed + run;
        let regions =
            arguments.regions.unwrap_or([2, 3, 5][usize::try_from(seed % 3).unwrap_or(0)]);
        match check(seed, regions, arguments.mutant) {
            Ok(of_one) => counts.add(&of_one),
            Err(failure) => {
                writeln!(out, "{failure}")?;
                return Ok(ExitCode::FAILURE);
            }
        }
        run += 1;
    }
    writeln!(out, "{run} histories in {:.1} s: {counts:#?}", began.elapsed().as_secs_f64())?;
    Ok(ExitCode::SUCCESS)
}
