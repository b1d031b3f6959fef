//! A measurement as people and programs read it.
//!
//! Invariant: the JSON has all members always, whatever was measured; some may be added.

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::bail;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::args::BenchArgs;
use crate::drive::Run;

/// What was measured, and with what.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `tombolo` or `etcd`.
    pub target: &'static str,
    /// `put`, `get` or `mixed`.
    pub op: &'static str,
    /// Share of gets, in percent.
    pub reads_percent: u32,
    /// Calls under way at a time.
    pub clients: u32,
    /// HTTP/2 connections opened.
    pub connections: usize,
    /// Size of a value, in bytes.
    pub value_bytes: u32,
    /// Different keys.
    pub keys: u64,
    /// Time measured, in seconds.
    pub seconds: f64,
    /// Calls that succeeded.
    pub operations: u64,
    /// Calls that succeeded, a second.
    pub operations_per_second: f64,
    /// Of the calls that succeeded.
    pub latency_us: Latency,
    /// Calls that failed.
    pub errors: u64,
    /// The same by reason.
    pub errors_by_reason: BTreeMap<String, u64>,
    /// CPU time by calls.
    pub cpu_us_per_operation: CpuPerOperation,
    /// With `mixed`: puts and gets apart. Empty otherwise.
    pub by_operation: Vec<OperationReport>,
}

/// One kind of operation in a mixed run.
#[derive(Clone, Debug, Serialize)]
pub struct OperationReport {
    /// `put` or `get`.
    pub op: &'static str,
    /// Calls that succeeded.
    pub operations: u64,
    /// Their latency.
    pub latency_us: Latency,
}

/// Percentiles, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p99_9: u64,
    /// The slowest call.
    pub max: u64,
}

/// Microseconds of CPU time by calls that succeeded.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CpuPerOperation {
    /// Of the processes given with `--server-pids`, together; null if none were given.
    pub servers: Option<f64>,
    /// Of the load generator; null where it cannot be told.
    pub load_generator: Option<f64>,
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            mean: tenths(histogram.mean()),
            p50: histogram.value_at_quantile(0.5),
            p90: histogram.value_at_quantile(0.9),
            p99: histogram.value_at_quantile(0.99),
            p99_9: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        }
    }
}

impl Report {
    /// # Errors
    /// If no call succeeded; says why.
    pub(crate) fn new(args: &BenchArgs, connections: usize, run: &Run) -> anyhow::Result<Self> {
        let all = run.tally.all()?;
        let errors_by_reason: BTreeMap<String, u64> =
            run.tally.failures.iter().map(|(failure, &count)| (failure.0.clone(), count)).collect();
        if all.is_empty() {
            bail!("no call succeeded: {}", list(&errors_by_reason));
        }
        let seconds = run.elapsed.as_secs_f64();
        let each = |cpu_us: Option<u64>| cpu_us.map(|it| tenths(it as f64 / all.len() as f64));
        let apart = match args.reads_percent() {
            0 | 100 => Vec::new(),
            _ => vec![("put", &run.tally.put), ("get", &run.tally.get)],
        };
        let by_operation = apart.into_iter().map(|(op, histogram)| OperationReport {
            op,
            operations: histogram.len(),
            latency_us: Latency::of(histogram),
        });
        Ok(Self {
            target: args.target.name(),
            op: args.op.name(),
            reads_percent: args.reads_percent(),
            clients: args.clients,
            connections,
            value_bytes: args.value_bytes,
            keys: args.keys,
            seconds: (seconds * 1000.0).round() / 1000.0,
            operations: all.len(),
            operations_per_second: tenths(all.len() as f64 / seconds),
            latency_us: Latency::of(&all),
            errors: errors_by_reason.values().sum(),
            errors_by_reason,
            cpu_us_per_operation: CpuPerOperation {
                servers: each(run.server_cpu_us),
                load_generator: each(run.own_cpu_us),
            },
            by_operation: by_operation.collect(),
        })
    }

    pub(crate) fn write_table(&self, out: &mut (dyn Write + Send)) -> io::Result<()> {
        let Self { target, op, clients, connections, keys, value_bytes, .. } = self;
        writeln!(
            out,
            "{target} {op}: {clients} clients, {connections} connections, {keys} keys, \
             values of {value_bytes} B, {:.1} s",
            self.seconds
        )?;
        writeln!(
            out,
            "{:>9.0} operations/s ({} operations)",
            self.operations_per_second, self.operations
        )?;
        writeln!(
            out,
            "{:<9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "latency", "mean", "p50", "p90", "p99", "p99.9", "max"
        )?;
        let apart = self.by_operation.iter().map(|it| (it.op, it.latency_us));
        for (name, latency) in std::iter::once(("ms", self.latency_us)).chain(apart) {
            let Latency { mean, p50, p90, p99, p99_9, max } = latency;
            write!(out, "{name:<9} {:>9.3}", mean / 1000.0)?;
            for micros in [p50, p90, p99, p99_9, max] {
                write!(out, " {:>9.3}", micros as f64 / 1000.0)?;
            }
            writeln!(out)?;
        }
        let cpu = self.cpu_us_per_operation;
        let shown = |each: Option<f64>| each.map_or("unknown".to_owned(), |it| format!("{it} us"));
        writeln!(
            out,
            "CPU per operation: servers {}, load generator {}",
            shown(cpu.servers),
            shown(cpu.load_generator)
        )?;
        let reasons = list(&self.errors_by_reason);
        writeln!(out, "errors: {}{}", self.errors, if self.errors == 0 { "" } else { ": " })?;
        if self.errors > 0 {
            writeln!(out, "  {reasons}")?;
        }
        Ok(())
    }
}

fn list(reasons: &BTreeMap<String, u64>) -> String {
    let each: Vec<String> = reasons.iter().map(|(why, count)| format!("{why} ({count})")).collect();
    if each.is_empty() { "none was even answered".to_owned() } else { each.join(", ") }
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::args::tests::parse;
    use crate::tally::Tally;
    use crate::target::Failure;

    fn run(puts_ms: &[u64], gets_ms: &[u64], failures: u64) -> Run {
        let mut tally = Tally::new().unwrap();
        let begun = Instant::now();
        for (is_get, all) in [(false, puts_ms), (true, gets_ms)] {
            for &millis in all {
                tally.record(is_get, begun, begun + Duration::from_millis(millis), Ok(())).unwrap();
            }
        }
        for _ in 0..failures {
            tally.record(true, begun, begun, Err(Failure::absent())).unwrap();
        }
        let elapsed = Duration::from_secs(2);
        Run { tally, elapsed, server_cpu_us: Some(300), own_cpu_us: None }
    }

    #[test]
    fn json_has_every_member_whatever_was_measured() {
        let args = parse("--op put --clients 2 --target etcd").unwrap();
        let report = Report::new(&args, 2, &run(&[1, 1, 1], &[], 0)).unwrap();
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"target":"etcd","op":"put","reads_percent":0,"clients":2,"connections":2,"#
                .to_owned()
                + r#""value_bytes":256,"keys":10000,"seconds":2.0,"operations":3,"#
                + r#""operations_per_second":1.5,"latency_us":{"mean":1000.0,"p50":1000,"p90":1000,"#
                + r#""p99":1000,"p99_9":1000,"max":1000},"errors":0,"errors_by_reason":{},"#
                + r#""cpu_us_per_operation":{"servers":100.0,"load_generator":null},"by_operation":[]}"#
        );
    }

    #[test]
    fn mixed_runs_show_both_operations_and_all_errors() {
        let args = parse("--op mixed").unwrap();
        let report = Report::new(&args, 16, &run(&[2, 2], &[1], 4)).unwrap();
        let apart: Vec<_> = report.by_operation.iter().map(|it| (it.op, it.operations)).collect();
        assert_eq!(apart, [("put", 2), ("get", 1)]);
        assert_eq!((report.operations, report.errors), (3, 4));
        let mut table = Vec::new();
        report.write_table(&mut table).unwrap();
        let table = String::from_utf8(table).unwrap();
        assert!(table.contains("key not found (4)") && table.contains("\nget "), "{table}");
    }

    #[test]
    fn a_run_without_success_is_an_error_that_says_why() {
        let args = parse("--op get").unwrap();
        let error = Report::new(&args, 1, &run(&[], &[], 4)).unwrap_err();
        assert_eq!(error.to_string(), "no call succeeded: key not found (4)");
    }
}
