//! Numbers of the process itself, read from `/proc` at each scrape.
//!
//! A number that cannot be read keeps its last value: metrics never fail.

use crate::metrics::{GaugeF64, GaugeU64};
use prometheus_client::metrics::counter::Counter;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

/// Clock ticks per second in `/proc`: `USER_HZ`, which Linux fixes at 100 for user space.
const TICKS_PER_SECOND: f64 = 100.0;

pub(crate) struct ProcessMetrics {
    pub(crate) cpu: Counter<f64, AtomicU64>,
    pub(crate) resident: GaugeU64,
    pub(crate) virtual_memory: GaugeU64,
    pub(crate) fds: GaugeU64,
    pub(crate) max_fds: GaugeU64,
    pub(crate) start: GaugeF64,
}

impl ProcessMetrics {
    pub(crate) fn refresh(&self) {
        if let Some((cpu_seconds, since_boot_seconds)) = times() {
            // Counters of floats cannot be set; the bits of positive floats order like integers.
            self.cpu.inner().fetch_max(cpu_seconds.to_bits(), Ordering::Relaxed);
            if let Some(boot) = boot_time() {
                self.start.set(boot + since_boot_seconds);
            }
        }
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            set(&self.resident, kib_field(&status, "VmRSS:"));
            set(&self.virtual_memory, kib_field(&status, "VmSize:"));
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // Without the descriptor that reads the directory.
            set(&self.fds, u64::try_from(entries.count().saturating_sub(1)).ok());
        }
        set(&self.max_fds, max_fds());
    }
}

fn set(gauge: &GaugeU64, value: Option<u64>) {
    if let Some(value) = value {
        gauge.set(value);
    }
}

/// CPU time of the process, and its start after boot, in seconds.
fn times() -> Option<(f64, f64)> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the name in parentheses and may hold anything; count from behind it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let seconds = |index: usize| Some(fields.get(index)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
    Some((seconds(11)? + seconds(12)?, seconds(19)?))
}

/// Seconds since the Unix epoch.
fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// A field of `/proc/self/status` in bytes.
fn kib_field(status: &str, name: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn max_fds() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let rest = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}
