//! The closed loop, and storing the keys that reads need.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::bail;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::args::BenchArgs;
use crate::cpu;
use crate::tally::Tally;
use crate::target::{Lane, Target};
use crate::workload::{Operation, Sequence, Workload};

/// After a failure a client rests, so that a server that is down is not asked in a busy loop.
const REST_AFTER_FAILURE: Duration = Duration::from_millis(10);
/// Preloading: attempts for one key.
const PRELOAD_ATTEMPTS: u32 = 20;
/// Preloading: clients at most.
const PRELOAD_CLIENTS: usize = 64;

/// What a run measured.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) tally: Tally,
    /// From the beginning of the measurement to the end of the last call that began in it.
    pub(crate) elapsed: Duration,
    /// Microseconds of CPU in the measured time; `None` if unknown or not asked for.
    pub(crate) server_cpu_us: Option<u64>,
    pub(crate) own_cpu_us: Option<u64>,
}

/// When to record, and when to end.
#[derive(Clone, Copy, Debug)]
struct Window {
    from: Instant,
    until: Instant,
}

/// Stores every key once.
pub(crate) async fn preload(target: &impl Target, args: &BenchArgs) -> anyhow::Result<()> {
    let workload = Arc::new(Workload::new(args.keys, args.value_bytes, 0));
    let next = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for number in 0..PRELOAD_CLIENTS.min(args.clients.max(16) as usize) {
        let mut lane = target.lane(args.clients as usize + number);
        let (workload, next) = (Arc::clone(&workload), Arc::clone(&next));
        clients.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if workload.keys() <= number {
                    return Ok(());
                }
                let (key, value) = workload.preload(number);
                let mut attempt = 0;
                while let Err(failure) = lane.put(key.clone(), value.clone()).await {
                    attempt += 1;
                    if attempt == PRELOAD_ATTEMPTS {
                        bail!("{} (after {attempt} attempts)", failure.0);
                    }
                    sleep(REST_AFTER_FAILURE * attempt).await;
                }
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    Ok(())
}

/// Runs all clients, first unmeasured, then measured. Dropping the future ends them.
pub(crate) async fn drive(target: &impl Target, args: &BenchArgs) -> anyhow::Result<Run> {
    let workload = Workload::new(args.keys, args.value_bytes, args.reads_percent());
    let from = Instant::now() + Duration::from_secs(u64::from(args.warmup));
    let window = Window { from, until: from + Duration::from_secs(u64::from(args.seconds)) };
    let mut clients = JoinSet::new();
    for number in 0..args.clients as usize {
        let tally = Tally::new()?;
        clients.spawn(client(target.lane(number), workload.sequence(number), window, tally));
    }

    sleep_until(window.from).await;
    let before = (cpu::of_processes(&args.server_pids)?, cpu::of_self());
    sleep_until(window.until).await;
    let after = (cpu::of_processes(&args.server_pids)?, cpu::of_self());

    let mut tally = Tally::new()?;
    while let Some(seen) = clients.join_next().await {
        tally.merge(seen??)?;
    }
    let end = tally.last_end.unwrap_or(window.until).max(window.until);
    Ok(Run {
        tally,
        elapsed: end - window.from,
        server_cpu_us: (!args.server_pids.is_empty()).then(|| after.0.saturating_sub(before.0)),
        own_cpu_us: after.1.zip(before.1).map(|(after, before)| after.saturating_sub(before)),
    })
}

/// One client: a call, its answer, the next call.
async fn client(
    mut lane: impl Lane,
    mut sequence: Sequence,
    window: Window,
    mut tally: Tally,
) -> anyhow::Result<Tally> {
    let mut begun = Instant::now();
    while begun < window.until {
        let operation = sequence.next();
        let is_get = matches!(operation, Operation::Get(_));
        let outcome = match operation {
            Operation::Put(key, value) => lane.put(key, value).await,
            Operation::Get(key) => lane.get(key).await,
        };
        let ended = Instant::now();
        let failed = outcome.is_err();
        if window.from <= begun {
            tally.record(is_get, begun, ended, outcome)?;
        }
        begun = ended;
        if failed {
            sleep(REST_AFTER_FAILURE).await;
            begun = Instant::now();
        }
    }
    Ok(tally)
}
