//! `tombolo demo --tour`: a walk through what the database promises, each stop verified.
//!
//! Steps run in order and the first that is not verified ends the tour: what comes after would
//! only repeat its failure. A step verifies by reading through the client library from the
//! regions, like any user; it looks into no server.
//!
//! Invariants:
//! * A tour succeeds only if every step did and no node ended by itself on the way.
//! * Every wait has a deadline, and a failed wait says what was seen last.
//!
//! Here: running steps and reporting them. The steps are in `steps`, writers under load in
//! `load`, polling and comparing in `observe`.

mod load;
mod observe;
mod steps;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::future::LocalBoxFuture;
use tombolo_client::{Client, ClientConfig, Keyspace};

use crate::demo::Demo;

/// A step that hangs in spite of its own deadlines is given up after this.
const STEP_LIMIT: Duration = Duration::from_secs(180);

/// One stop of the tour: what it shows, and how it does and verifies it.
///
/// The text that `run` returns says what was verified, for people.
struct Step<C> {
    title: &'static str,
    run: for<'c> fn(&'c mut C) -> LocalBoxFuture<'c, anyhow::Result<String>>,
}

/// How a list of steps ended.
#[derive(Debug)]
pub struct Outcome {
    /// Steps verified.
    pub verified: usize,
    /// All steps.
    pub steps: usize,
    /// Number, from 1, and error of the step that was not.
    pub failed: Option<(usize, anyhow::Error)>,
    /// From the first step to the last.
    pub took: Duration,
}

impl Outcome {
    /// Whether every step was verified.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.failed.is_none() && self.verified == self.steps
    }
}

/// Runs steps until one fails; prints a line for each.
async fn run_steps<C>(
    steps: &[Step<C>],
    context: &mut C,
    out: &mut (dyn Write + Send),
) -> io::Result<Outcome> {
    let begun = Instant::now();
    let mut outcome =
        Outcome { verified: 0, steps: steps.len(), failed: None, took: Duration::ZERO };
    for (number, step) in (1..).zip(steps) {
        write!(out, "step {number}: {} … ", step.title)?;
        out.flush()?;
        let step_begun = Instant::now();
        let result = tokio::time::timeout(STEP_LIMIT, (step.run)(context))
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("no end after {STEP_LIMIT:?}")));
        let took = step_begun.elapsed().as_secs_f64();
        match result {
            Ok(verified) => {
                writeln!(out, "ok ({took:.1} s)\n        {verified}")?;
                outcome.verified += 1;
            }
            Err(error) => {
                writeln!(out, "FAILED ({took:.1} s)\n        {error:#}")?;
                outcome.failed = Some((number, error));
                break;
            }
        }
    }
    outcome.took = begun.elapsed();
    Ok(outcome)
}

/// Where users of one region are.
#[derive(Clone, Debug)]
struct Site {
    region: String,
    client: Client,
}

/// What the tour has at hand and what it remembers from step to step.
struct Tour {
    demo: Arc<Demo>,
    /// In order of region numbers; the first is the catalog's home.
    sites: Vec<Site>,
    /// Begins every key of this tour.
    prefix: String,
    /// Keeps concurrent versions; created by the step that needs it first.
    siblings_namespace: String,
    /// How long writers write before and after a fault.
    load: Duration,
    /// Key and value of every acknowledged write under load, in the default namespace.
    acknowledged: BTreeMap<String, String>,
    /// Keys of the default namespace that must stay deleted.
    deleted: Vec<String>,
    processes_killed: usize,
    partitions: usize,
    keys_compared: usize,
}

impl Tour {
    fn default_keys(site: &Site) -> Keyspace {
        site.client.namespace("default")
    }

    fn sibling_keys(&self, site: &Site) -> Keyspace {
        site.client.namespace(self.siblings_namespace.clone())
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// Cuts every region from every other.
    fn cut(&mut self) {
        self.demo.network().partition_all();
        self.partitions += 1;
    }

    fn heal(&self) {
        self.demo.network().heal();
    }

    /// Fails if a node ended that the tour did not end.
    fn check_no_crash(&self) -> anyhow::Result<()> {
        let crashes = self.demo.fleet().crashes();
        if let Some(crash) = crashes.borrow().first() {
            anyhow::bail!("{}", crate::report::crash(crash).trim_end());
        }
        Ok(())
    }
}

/// Why this demo cannot be toured; none when it can.
#[must_use]
pub fn obstacle(demo: &Demo) -> Option<String> {
    let shape = &demo.layout().shape;
    if shape.regions.len() < 2 {
        return Some("the tour needs two regions at least".into());
    }
    (shape.nodes < 3)
        .then(|| "the tour kills a leader, so it needs three nodes in each region at least".into())
}

/// Runs the tour on a demo that is ready.
///
/// `load` is how long writers write before and after a fault.
///
/// # Errors
/// No region can be connected to, or `out` cannot be written. A step that is not verified is no
/// error: see [`Outcome`].
pub async fn run(
    demo: Arc<Demo>,
    load: Duration,
    out: &mut (dyn Write + Send),
) -> anyhow::Result<Outcome> {
    let mut sites = Vec::new();
    for region in &demo.layout().shape.regions {
        let endpoints = demo.layout().nodes_of(region).map(|n| n.client.to_string()).collect();
        let config = ClientConfig { endpoints, ..ClientConfig::default() };
        let client = Client::connect(config)
            .await
            .with_context(|| format!("connecting to the nodes of {region}"))?;
        sites.push(Site { region: region.clone(), client });
    }
    let id = format!("tour-{:06x}", rand::random::<u32>() >> 8);
    let mut tour = Tour {
        demo,
        sites,
        siblings_namespace: format!("{id}-siblings"),
        prefix: id,
        load,
        acknowledged: BTreeMap::new(),
        deleted: Vec::new(),
        processes_killed: 0,
        partitions: 0,
        keys_compared: 0,
    };
    let outcome = run_steps(&steps::all(), &mut tour, out).await?;
    if outcome.is_success() {
        writeln!(
            out,
            "\nall {} steps verified in {:.0} s: {} writes under load acknowledged and found in \
             each of {} regions, {} keys equal everywhere, {} partitions, {} processes killed",
            outcome.steps,
            outcome.took.as_secs_f64(),
            tour.acknowledged.len(),
            tour.sites.len(),
            tour.keys_compared,
            tour.partitions,
            tour.processes_killed,
        )?;
    } else {
        writeln!(
            out,
            "\n{} of {} steps verified in {:.0} s; the logs are in {}",
            outcome.verified,
            outcome.steps,
            outcome.took.as_secs_f64(),
            tour.demo.layout().data_dir.join("*/log").display(),
        )?;
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(
        title: &'static str,
        run: for<'c> fn(&'c mut Vec<u8>) -> LocalBoxFuture<'c, anyhow::Result<String>>,
    ) -> Step<Vec<u8>> {
        Step { title, run }
    }

    #[tokio::test]
    async fn verified_steps_run_in_order_and_each_is_reported() {
        let steps = [
            step("write", |ran| {
                Box::pin(async {
                    ran.push(1);
                    Ok("1 key".into())
                })
            }),
            step("read", |ran| {
                Box::pin(async {
                    ran.push(2);
                    Ok("same key".into())
                })
            }),
        ];
        let (mut ran, mut out) = (Vec::new(), Vec::new());

        let outcome = run_steps(&steps, &mut ran, &mut out).await.unwrap();

        assert!(outcome.is_success());
        assert_eq!(ran, [1, 2]);
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("step 1: write … ok (0.0 s)\n        1 key\n"), "{text}");
        assert!(text.contains("step 2: read … ok"), "{text}");
    }

    #[tokio::test]
    async fn the_first_step_that_is_not_verified_ends_the_tour() {
        let steps = [
            step("write", |ran| {
                Box::pin(async {
                    ran.push(1);
                    Ok(String::new())
                })
            }),
            step("read", |_| {
                Box::pin(async { Err(anyhow::anyhow!("no such key").context("reading in eu")) })
            }),
            step("scan", |ran| {
                Box::pin(async {
                    ran.push(3);
                    Ok(String::new())
                })
            }),
        ];
        let (mut ran, mut out) = (Vec::new(), Vec::new());

        let outcome = run_steps(&steps, &mut ran, &mut out).await.unwrap();

        assert!(!outcome.is_success());
        assert_eq!(ran, [1]);
        assert_eq!((outcome.verified, outcome.steps), (1, 3));
        assert_eq!(outcome.failed.unwrap().0, 2);
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("reading in eu: no such key"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_that_hangs_is_a_failed_step() {
        let steps = [step("hang", |_| Box::pin(std::future::pending()))];

        let outcome = run_steps(&steps, &mut Vec::new(), &mut Vec::new()).await.unwrap();

        assert!(outcome.failed.unwrap().1.to_string().contains("no end"));
    }
}
