//! Faults between regions: one is alone, or only a bridge is left, or one is away for too long.

use super::{Attack, Proof};
use crate::plan::CHANGE_LOG_BYTES;
use anyhow::bail;
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tombolo_proto::v1::LinkPhase;

/// How long to look for a repair after the regions meet again.
const REPAIR_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at links: a repair takes half a second.
const REPAIR_POLL: Duration = Duration::from_millis(20);
/// How long a node may take to tell its backlog.
const METRIC_PATIENCE: Duration = Duration::from_secs(3);
/// What the names of the server's counters of repairs hold.
const REPAIR: &str = "repairs";

impl Attack {
    pub(super) fn pairs_of(&self, region: &str) -> Vec<(String, String)> {
        let regions = self.cluster.layout.shape.regions.iter();
        regions
            .filter(|other| *other != region)
            .map(|other| (region.into(), other.clone()))
            .collect()
    }

    /// Cuts a region from all others.
    pub(super) async fn isolate(
        &self,
        region: &str,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let pairs = self.pairs_of(region);
        self.cut_regions(format!("isolate {region}"), region, &pairs, hold, proof).await
    }

    /// Leaves one region in the middle as the only way.
    pub(super) async fn bridge(
        &self,
        middle: &str,
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let regions = self.cluster.layout.shape.regions.clone();
        if regions.len() < 3 {
            bail!("a bridge needs three regions");
        }
        // The one in the middle sees both halves, which do not see each other.
        let apart: Vec<String> = regions.into_iter().filter(|region| region != middle).collect();
        let (left, right) = apart.split_at(apart.len() / 2);
        let mut pairs = Vec::new();
        for one in left {
            pairs.extend(right.iter().map(|other| (one.clone(), other.clone())));
        }
        let what = format!("cut {} from {}; {middle} sees all", left.join("+"), right.join("+"));
        self.cut_regions(what, &left[0], &pairs, hold, proof).await
    }

    /// Isolates a region until others no longer keep its changes, and sees it repair. With `kill`
    /// its leader dies while it does.
    pub(super) async fn isolate_long(
        &self,
        region: &str,
        hold: Duration,
        kill: bool,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let budget = CHANGE_LOG_BYTES * u64::from(self.plan.shards);
        let pairs = self.pairs_of(region);
        let repairs_before = self.repairs().await;
        let mut cut = Proof::default();
        let what = format!("isolate {region} beyond the change log of {budget} bytes");
        let what = self.cut_regions(what, region, &pairs, hold, &mut cut).await?;
        proof.words.append(&mut cut.words);
        proof.apart = cut.apart;
        // Only now can they repair.
        self.cluster.net.heal();
        let deadline = Instant::now() + REPAIR_PATIENCE;
        let mut is_repairing = false;
        // A counter rises only when a repair is over: too late to disturb it.
        let mut counted = 0.0;
        while !is_repairing && (kill || counted <= 0.0) && Instant::now() < deadline {
            sleep(REPAIR_POLL).await;
            is_repairing = self.is_repairing(region).await;
            counted = self.repairs().await - repairs_before;
        }
        let words = format!("repairs counted: {counted}; a link is repairing: {is_repairing}");
        proof.add(cut.effective && (counted > 0.0 || is_repairing), words);
        if !kill {
            return Ok(what);
        }
        let mut killed = Proof::default();
        let how = self.kill_leader(region, Duration::ZERO, &mut killed).await?;
        proof.effective &= is_repairing && killed.effective;
        proof.words.append(&mut killed.words);
        Ok(format!("{what}; {how} while it repairs"))
    }

    /// Counters of repairs in all regions.
    async fn repairs(&self) -> f64 {
        let mut sum = 0.0;
        for region in &self.cluster.layout.shape.regions {
            sum += self.cluster.counters_with(region, REPAIR).await;
        }
        sum
    }

    /// Whether a region says that one of its links repairs.
    async fn is_repairing(&self, region: &str) -> bool {
        let Some(node) = self.cluster.layout.nodes_of(region).next() else { return false };
        let Ok(client) = self.cluster.client(&node.name).await else { return false };
        let Ok(place) = self.cluster.place(region) else { return false };
        let links = place.run(async move { client.links().await }).await;
        let Ok(Ok(links)) = links else { return false };
        links.iter().any(|link| link.phase() == LinkPhase::Repairing)
    }

    /// Cuts pairs of regions and proves that nothing passed and that the backlog of `witness` grew.
    pub(super) async fn cut_regions(
        &self,
        what: String,
        witness: &str,
        pairs: &[(String, String)],
        hold: Duration,
        proof: &mut Proof,
    ) -> anyhow::Result<String> {
        let cluster = &self.cluster;
        proof.apart = pairs.to_vec();
        let cut_before = cluster.net.packets_cut();
        self.recorder.fault("isolate", json!(what));
        let begun = Instant::now();
        for (one, other) in pairs {
            cluster.net.cut_regions(&cluster.layout, one, other)?;
        }
        // What was under way arrives.
        sleep(self.plan.round_trip()).await;
        let passed = || -> u64 {
            let each = pairs.iter().map(|(a, b)| cluster.net.bytes_between(&cluster.layout, a, b));
            each.sum()
        };
        let passed_before = passed();
        let mut backlog: f64 = 0.0;
        while begun.elapsed() < hold {
            sleep(Duration::from_millis(500).min(hold)).await;
            let mut sum = 0.0;
            for node in cluster.layout.nodes_of(witness) {
                let metric = cluster.metric(&node.name, "tombolo_replication_backlog_ops");
                sum +=
                    timeout(METRIC_PATIENCE, metric).await.ok().and_then(Result::ok).unwrap_or(0.0);
            }
            backlog = backlog.max(sum);
        }
        let leaked = passed() - passed_before;
        if cut_before.is_some() {
            self.prove_cut(cut_before, proof);
        } else {
            proof.add(true, "connections hang in the proxy".into());
        }
        proof.words.push(format!("{leaked} bytes passed the cut"));
        proof.words.push(format!("up to {backlog} writes of {witness} waited for other regions"));
        proof.effective &= leaked == 0 && backlog > 0.0;
        Ok(what)
    }
}
