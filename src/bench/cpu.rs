//! CPU time of processes, from `/proc`; Linux only.
//!
//! On a machine that others use, or that runs servers and load generator together, CPU time per
//! operation says more than operations per second.

use std::fs;

use anyhow::Context;

/// Length of a tick in `/proc/PID/stat`; the kernel's interface fixes it, whatever its own clock.
const MICROS_PER_TICK: u64 = 10_000;

/// CPU time of all of `pids` so far, in microseconds.
///
/// # Errors
/// If one of them does not run.
pub(crate) fn of_processes(pids: &[u32]) -> anyhow::Result<u64> {
    let mut micros = 0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        let stat = stat.with_context(|| format!("no CPU time of process {pid}"))?;
        micros += parse(&stat).with_context(|| format!("odd CPU time of process {pid}"))?;
    }
    Ok(micros)
}

/// CPU time of this process so far, in microseconds; `None` where it cannot be told.
pub(crate) fn of_self() -> Option<u64> {
    parse(&fs::read_to_string("/proc/self/stat").ok()?)
}

/// User and system time: fields 14 and 15, of which the second may hold spaces and parentheses.
fn parse(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) * MICROS_PER_TICK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_past_names_with_spaces_and_parentheses() {
        let stat = "42 (a (b) c) S 1 42 42 0 -1 4194560 900 0 0 0 250 50 0 0 20 0 9 0 77";
        assert_eq!(parse(stat), Some(3_000_000));
        assert_eq!(parse("42 (a"), None);
        assert_eq!(parse("42 (a) S 1 2 x"), None);
    }

    #[test]
    fn a_process_that_does_not_run_is_an_error() {
        assert!(of_processes(&[u32::MAX]).is_err());
        assert_eq!(of_processes(&[]).unwrap(), 0);
    }
}
