//! Load generator that speaks Tombolo's and etcd's API.
//!
//! Closed loop: each of N clients has one call under way and begins the next when it is answered.
//! Both targets are driven by the same loop, over generated stubs and not through a client
//! library, with the same number of HTTP/2 connections and the same keys and values; what differs
//! is the request message and which node is asked. So a ratio between two runs compares servers.
//!
//! Invariants:
//! * Every call is counted, as a success with its latency or as an error with its reason.
//! * A read that finds nothing is an error: it would be cheaper than what is measured.
//! * Calls are recorded by when they begin; those under way at the end are waited for, so that
//!   slow ones count.
//!
//! Reading order: [`args`](BenchArgs), `workload` (what to call), `tombolo` and `etcd` (how),
//! `drive` (the loop), `tally` and [`report`](Report).
//!
//! Not here: starting servers and comparing runs (`scripts/bench`).

mod args;
mod cpu;
mod drive;
mod etcd;
mod report;
mod tally;
mod target;
mod tombolo;
mod workload;

use std::io::Write;

use anyhow::Context;

pub use args::{BenchArgs, EtcdMembers, OperationKind, OutputFormat, TargetKind};
pub use report::{CpuPerOperation, Latency, OperationReport, Report};

use crate::target::Target;

/// etcd's messages and stubs, generated.
#[doc(hidden)]
#[allow(unused_qualifications, clippy::allow_attributes_without_reason, reason = "generated")]
pub mod etcd_proto {
    tonic::include_proto!("etcdserverpb");
}

/// Runs one measurement and prints it to `out`.
///
/// # Errors
/// If the target cannot be reached, keys cannot be stored before reads, or no call at all
/// succeeded. Calls that failed are otherwise part of the report.
pub async fn run(args: BenchArgs, out: &mut (dyn Write + Send)) -> anyhow::Result<()> {
    let report = measure(&args).await?;
    match args.output {
        OutputFormat::Json => {
            serde_json::to_writer(&mut *out, &report)?;
            writeln!(out)?;
        }
        OutputFormat::Table => report.write_table(out)?,
    }
    out.flush()?;
    Ok(())
}

/// Runs one measurement.
///
/// # Errors
/// As [`run`].
pub async fn measure(args: &BenchArgs) -> anyhow::Result<Report> {
    match args.target {
        TargetKind::Tombolo => measure_target(tombolo::connect(args).await?, args).await,
        TargetKind::Etcd => measure_target(etcd::connect(args).await?, args).await,
    }
}

async fn measure_target(target: impl Target, args: &BenchArgs) -> anyhow::Result<Report> {
    if args.op != OperationKind::Put {
        drive::preload(&target, args).await.context("cannot store the keys to read")?;
    }
    let run = drive::drive(&target, args).await?;
    Report::new(args, target.connections(), &run)
}
