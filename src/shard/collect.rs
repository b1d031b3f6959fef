//! Collection: what a shard's leader lets its replicas forget.
//!
//! Four things stay behind and are not data: the outcomes of requests, kept so that a repeat is
//! recognised, the change log, kept until every region has it or it exceeds its budget (a tail of it
//! stays longer, for watchers), tombstones, kept until nothing can come any more that has not seen the
//! deletion, and the ledger of conflicts, kept for a time and up to a size for people to look at. Values
//! that have expired are hidden from reads at once and deleted here, by the region that wrote them, with
//! a deletion like any other. The leader looks at them now and then and
//! proposes what may go; replicas forget exactly that, in log order.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tombolo_core::{HybridTime, MemberState, NamespaceId, RegionId, ShardId, namespace::Namespace};
use tombolo_storage::StorageError;

use crate::{error::ShardError, shard::Shard, shards::Shards};

/// When and how much to collect.
#[derive(Clone, Debug)]
pub struct CollectConfig {
    /// Time between looks.
    pub interval: Duration,
    /// How long the outcome of a request is remembered.
    pub request_retention: Duration,
    /// How many requests of one client are remembered in one shard: its latest, by number. A client
    /// may have that many on their way. Less than half of what one search of the store looks at.
    pub requests_per_client: usize,
    /// Most bytes of the change log of one namespace in one shard that are kept for a region that
    /// is behind; it repairs from there.
    pub change_log_bytes: u64,
    /// How long an entry of the ledger is kept, from when this region noted it.
    pub ledger_retention: Duration,
    /// Most bytes of the ledger of one namespace in one shard; above, the oldest entries go.
    pub ledger_bytes: u64,
    /// How many of them stay for watchers when every region has them.
    pub history_bytes: u64,
}

impl Default for CollectConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(5),
            request_retention: Duration::from_secs(600),
            requests_per_client: 16_384,
            change_log_bytes: 256 << 20,
            ledger_retention: Duration::from_secs(7 * 24 * 3600),
            ledger_bytes: 64 << 20,
            history_bytes: 8 << 20,
        }
    }
}

/// Requests forgotten by one command.
const REQUESTS_PER_COMMAND: usize = 4096;
/// Tombstones looked at for one command: with the longest keys, a quarter of the least log entry.
const TOMBSTONES_PER_COMMAND: usize = 256;
/// Values deleted by one command: they become one change, which other regions apply whole.
const VALUES_PER_COMMAND: usize = 128;
/// Entries of the ledger forgotten by one command: each is looked at by every replica.
const CONFLICTS_PER_COMMAND: usize = 1024;
/// Keys settled by one command: each is written anew with a value.
const KEYS_PER_SETTLEMENT: usize = 16;
/// Commands of one look at one shard, so that no shard starves the others.
const COMMANDS_PER_LOOK: usize = 32;
/// How long one proposal may take.
const PROPOSAL_TIMEOUT: Duration = Duration::from_secs(10);

/// What was let go since the process started, by this node as a leader.
#[derive(Debug, Default)]
pub struct CollectCounts {
    aged: AtomicU64,
    over_budget: AtomicU64,
}

impl CollectCounts {
    /// Entries of the ledger that were old enough.
    pub fn conflicts_aged(&self) -> u64 {
        self.aged.load(Ordering::Relaxed)
    }

    /// Entries of the ledger that went before their time, for its size.
    pub fn conflicts_over_budget(&self) -> u64 {
        self.over_budget.load(Ordering::Relaxed)
    }
}

/// A time before which something may be forgotten, and when that was found.
#[derive(Debug, Default)]
struct Horizon(Option<(HybridTime, Instant)>);

impl Horizon {
    /// Moves to `retention` before `clock`, but at most twice as fast as this machine's steady clock, so
    /// that a jump of the wall clock does not forget all at once.
    fn advance(&mut self, clock: HybridTime, retention: Duration) -> HybridTime {
        let now = Instant::now();
        let retention_ms = u64::try_from(retention.as_millis()).unwrap_or(u64::MAX);
        let wall_ms = clock.physical_ms().saturating_sub(retention_ms);
        let ms = match self.0 {
            None => wall_ms,
            Some((last, at)) => {
                let steps = u64::try_from(now.duration_since(at).as_millis()).unwrap_or(u64::MAX);
                wall_ms.min(last.physical_ms().saturating_add(steps.saturating_mul(2)))
            }
        };
        let horizon = HybridTime::new(ms, 0).unwrap_or(HybridTime::ZERO);
        self.0 = Some((horizon, now));
        horizon
    }
}

/// Collects for all shards that this node leads.
pub struct Collector {
    shards: Shards,
    config: CollectConfig,
    /// Requests executed before this may be forgotten.
    requests: Horizon,
    /// Entries of the ledger noted before this may be forgotten.
    conflicts: Horizon,
    counts: Arc<CollectCounts>,
    /// Where the next look at a namespace's tombstones begins.
    tombstones_from: BTreeMap<(ShardId, NamespaceId), Bytes>,
}

impl Collector {
    /// A collector for `shards`.
    pub fn new(shards: Shards, config: CollectConfig) -> Self {
        Self {
            shards,
            config,
            requests: Horizon::default(),
            conflicts: Horizon::default(),
            counts: Arc::default(),
            tombstones_from: BTreeMap::new(),
        }
    }

    /// What it has let go so far.
    pub fn counts(&self) -> Arc<CollectCounts> {
        Arc::clone(&self.counts)
    }

    /// Collects until `shutdown` fires.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(self.config.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // Safe to drop: both only wait.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let (clock, config) = (self.shards.clock().now(), &self.config);
            let requests = self.requests.advance(clock, config.request_retention);
            let conflicts = self.conflicts.advance(clock, config.ledger_retention);
            let shards = self.shards.clone();
            for shard in shards.iter().filter(|shard| shard.is_leader()) {
                if let Err(error) = self.collect(shard, requests, conflicts).await {
                    // A lost leader or a slow majority: the next look tries again.
                    tracing::debug!(shard = %shard.id(), %error, "collection postponed");
                }
            }
        }
    }

    /// Tries all six, whatever becomes of the others, and answers the first error.
    async fn collect(
        &mut self,
        shard: &Shard,
        requests: HybridTime,
        conflicts: HybridTime,
    ) -> Result<(), ShardError> {
        let trimmed = self.trim_change_log(shard).await;
        let forgotten = self.forget_requests(shard, requests).await;
        let forgotten = forgotten.and(self.forget_conflicts(shard, conflicts).await);
        if shard.own_member().state != MemberState::Active {
            // It may lack what its former life wrote, and must not conclude anything from that.
            return trimmed.and(forgotten);
        }
        let collected = self.collect_tombstones(shard).await;
        let expired = self.expire_values(shard).await;
        let settled = self.settle_overdue(shard).await;
        trimmed.and(collected).and(forgotten).and(expired).and(settled)
    }

    /// Settles keys that nobody has settled in time: one region does it for all.
    async fn settle_overdue(&self, shard: &Shard) -> Result<(), ShardError> {
        if !is_first(shard) {
            return Ok(());
        }
        for namespace in self.shards.catalog().current().iter().filter(|it| it.hold_ms.is_some()) {
            for _ in 0..COMMANDS_PER_LOOK {
                let (store, id, now) = (shard.store().clone(), namespace.id, shard.clock().now());
                let search = move || store.open_keys(id, None, KEYS_PER_SETTLEMENT);
                let open = blocking(search).await?;
                let is_over = |since| namespace.settles_at(since).is_some_and(|at| at <= now);
                // The longest open come first.
                let overdue: Vec<(Bytes, HybridTime)> = open
                    .into_iter()
                    .take_while(|(since, _)| is_over(*since))
                    .map(|(since, key)| (key, since))
                    .collect();
                if overdue.is_empty() {
                    break;
                }
                shard.settle(namespace, overdue, Instant::now() + PROPOSAL_TIMEOUT).await?;
            }
        }
        Ok(())
    }

    async fn expire_values(&self, shard: &Shard) -> Result<(), ShardError> {
        for namespace in self.shards.catalog().current().iter() {
            for region in expires_for(shard) {
                expire_values_of(shard, namespace, region).await?;
            }
        }
        Ok(())
    }

    /// Goes on where the last look ended, so that many that must stay do not hide those behind.
    async fn collect_tombstones(&mut self, shard: &Shard) -> Result<(), ShardError> {
        for namespace in shard.store().tombstone_counts().into_keys() {
            let (stable, members) = shard.stable_for_tombstones(namespace);
            let start = self.tombstones_from.entry((shard.id(), namespace)).or_default();
            for _ in 0..COMMANDS_PER_LOOK {
                let (store, from) = (shard.store().clone(), start.clone());
                let search = move || store.tombstones(namespace, &from, TOMBSTONES_PER_COMMAND);
                let found = blocking(search).await?;
                let Some((last, _)) = found.last() else {
                    *start = Bytes::new();
                    break;
                };
                // The key after the last one seen.
                *start = [&last[..], &[0]].concat().into();
                let keys: Vec<Bytes> = found
                    .into_iter()
                    .filter(|(_, record)| stable.covers_all(record.context()))
                    .map(|(key, _)| key)
                    .collect();
                if !keys.is_empty() {
                    let deadline = Instant::now() + PROPOSAL_TIMEOUT;
                    let (stable, members) = (stable.clone(), members.clone());
                    shard.collect(namespace, stable, members, keys, deadline).await?;
                }
            }
        }
        Ok(())
    }

    /// Trims what every region has, but for a tail, and beyond that what exceeds the budget.
    async fn trim_change_log(&self, shard: &Shard) -> Result<(), ShardError> {
        let budget = self.config.change_log_bytes;
        for namespace in shard.store().frontiers().into_keys() {
            let history = self.history_bytes(namespace);
            let stable = shard.acknowledged_by_all(namespace);
            let store = shard.store().clone();
            let (before_tail, over) = blocking(move || {
                let before_tail = store.over_budget(namespace, history)?;
                Ok::<_, StorageError>((before_tail, store.over_budget(namespace, budget)?))
            })
            .await?;
            let mut upto = stable.meet(&before_tail);
            upto.join(&over);
            if upto.events_beyond(&shard.store().trimmed(namespace)) == 0 {
                continue;
            }
            if !stable.covers_all(&over) {
                tracing::warn!(
                    shard = %shard.id(),
                    %namespace,
                    budget_bytes = self.config.change_log_bytes,
                    "the change log exceeds its budget; a region that is behind will repair"
                );
            }
            shard.trim(namespace, upto, Instant::now() + PROPOSAL_TIMEOUT).await?;
        }
        Ok(())
    }

    /// Lets the oldest entries of the ledger go: those noted before `before`, and what exceeds the
    /// budget. Those of namespaces that were deleted go like all others.
    async fn forget_conflicts(&self, shard: &Shard, before: HybridTime) -> Result<(), ShardError> {
        let budget = self.config.ledger_bytes;
        for namespace in shard.store().ledger_sizes().into_keys() {
            for _ in 0..COMMANDS_PER_LOOK {
                let store = shard.store().clone();
                let search = move || {
                    store.conflicts_to_forget(namespace, before, budget, CONFLICTS_PER_COMMAND)
                };
                let found = blocking(search).await?;
                if found.is_empty() {
                    break;
                }
                let aged = found.iter().filter(|noted| noted.at < before).count() as u64;
                let over_budget = found.len() as u64 - aged;
                if over_budget > 0 {
                    tracing::warn!(
                        shard = %shard.id(),
                        %namespace,
                        entries = over_budget,
                        budget_bytes = budget,
                        "the ledger exceeds its budget; its oldest conflicts go early"
                    );
                }
                shard.forget_conflicts(namespace, found, Instant::now() + PROPOSAL_TIMEOUT).await?;
                self.counts.aged.fetch_add(aged, Ordering::Relaxed);
                self.counts.over_budget.fetch_add(over_budget, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// How much of a namespace's change log stays for watchers.
    fn history_bytes(&self, namespace: NamespaceId) -> u64 {
        // Nobody follows the catalog, or what is deleted.
        match self.shards.catalog().current().with_id(namespace) {
            Some(_) => self.config.history_bytes.min(self.config.change_log_bytes),
            None => 0,
        }
    }

    async fn forget_requests(&self, shard: &Shard, before: HybridTime) -> Result<(), ShardError> {
        for _ in 0..COMMANDS_PER_LOOK {
            let store = shard.store().clone();
            let keep = self.config.requests_per_client;
            let search = move || store.requests_to_forget(before, keep, REQUESTS_PER_COMMAND);
            let found = blocking(search).await?;
            if found.is_empty() {
                break;
            }
            shard.forget(found, Instant::now() + PROPOSAL_TIMEOUT).await?;
        }
        Ok(())
    }
}

/// The regions whose values this region deletes when they have expired: its own, and those of regions
/// that are shut out, if it is the first of those that remain. More than one would do no harm.
fn expires_for(shard: &Shard) -> Vec<RegionId> {
    let (topology, members) = (shard.topology(), shard.store().members());
    let is_out = |region: RegionId| members.get(region).state.is_out();
    let regions = topology.regions();
    let is_first = is_first(shard);
    let others =
        regions.iter().map(|region| region.id).filter(|&region| is_first && is_out(region));
    std::iter::once(topology.region).chain(others).collect()
}

/// Whether this region is the first of those that are not shut out.
fn is_first(shard: &Shard) -> bool {
    let (topology, members) = (shard.topology(), shard.store().members());
    let regions = topology.regions();
    let mut all = regions.iter().map(|region| region.id);
    all.find(|&region| !members.get(region).state.is_out()) == Some(topology.region)
}

async fn expire_values_of(
    shard: &Shard,
    namespace: &Namespace,
    region: RegionId,
) -> Result<(), ShardError> {
    for _ in 0..COMMANDS_PER_LOOK {
        let (store, id, now) = (shard.store().clone(), namespace.id, shard.clock().now());
        let search = move || store.expired_values(id, region, now, VALUES_PER_COMMAND);
        let expired = blocking(search).await?;
        if expired.is_empty() {
            break;
        }
        shard.expire(namespace, expired, Instant::now() + PROPOSAL_TIMEOUT).await?;
    }
    Ok(())
}

/// Reads the store on a thread that may wait for the disk.
///
/// # Errors
/// What `read` answers.
pub async fn blocking<T: Send + 'static, E: Send + 'static>(
    read: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    match tokio::task::spawn_blocking(read).await {
        Ok(found) => found,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}
