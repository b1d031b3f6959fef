//! Writing: stamp, propose, wait.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use tombolo_core::{
    Actor, Change, Command, Dot, HybridTime, Member, MemberState, Members, NamespaceId, Outcome,
    RegionId, RequestId, VersionVector,
    clock_guard::Standing,
    command::{
        Advance, Check, Collect, Expire, FailedCheck, ForgetConflicts, ForgetReviewed, Ingest,
        Ingested, LinkSetting, Merge, Merged, Operation, Settle, StartOver, Trim, Write, Written,
    },
    hlc::ClockAhead,
    ledger::Noted,
    namespace::Namespace,
    repair::Offered,
    typed::{Mutation, Refused},
};

use crate::{
    clock::RegionNews,
    error::ShardError,
    shard::{RETRY_PAUSE, Revision, Shard},
};

/// How long a write waits for the first comparison of its leader's clock.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(2);

/// A client's write.
#[derive(Clone, Debug)]
pub struct WriteRequest {
    /// Where.
    pub namespace: Arc<Namespace>,
    /// Makes it safe to repeat.
    pub request: Option<RequestId>,
    /// Conditions that must all hold.
    pub checks: Vec<Check>,
    /// What to write; all keys in this shard.
    pub operations: Vec<Operation>,
    /// What to do to typed values; all keys in this shard.
    pub mutations: Vec<Mutation>,
}

/// What became of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// Applied, now or when the same request came before.
    Written(Vec<Written>),
    /// Nothing was written: these checks did not hold.
    ChecksFailed(Vec<FailedCheck>),
    /// Nothing was written: a typed value does not take a mutation.
    Refused(Refused),
}

/// A write's outcome and where it stands.
#[derive(Clone, Debug)]
pub struct WriteReply {
    /// What became of it.
    pub outcome: WriteOutcome,
    /// The log entry that carried it.
    pub revision: Revision,
}

/// What became of the end of a repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advanced {
    /// The frontier covers the cut.
    Done,
    /// Changes of other regions came since the comparison: compare again.
    Moved,
    /// The cut holds writes of this region that this region does not know.
    OwnChangeUnknown,
}

impl Shard {
    /// Writes, and waits until a majority has it durably and this node has applied it.
    ///
    /// Not cancelled by dropping the future: once proposed, the write may still be applied. If
    /// an operation's context has seen more than this region has applied, waits for that first.
    ///
    /// # Errors
    /// See [`ShardError`]; only [`ShardError::OutcomeUnknown`] leaves open whether it was applied.
    pub async fn write(
        &self,
        request: WriteRequest,
        deadline: Instant,
    ) -> Result<WriteReply, ShardError> {
        self.check_whole()?;
        self.wait_heard(deadline).await;
        self.check_headroom(&request)?;
        self.note_write();
        let mut write = Write {
            namespace: request.namespace.id,
            rule: request.namespace.rule,
            actor: self.actor(),
            time: self.stamp(deadline).await?,
            request: request.request,
            checks: request.checks,
            operations: request.operations,
            mutations: request.mutations,
        };
        loop {
            let command = Command::Write(write.clone());
            let (outcome, revision) = self.propose(&command, deadline).await?;
            let outcome = match outcome {
                Outcome::Written(results) => {
                    for result in &results {
                        self.inner.clock.follow(result.time);
                    }
                    WriteOutcome::Written(results)
                }
                Outcome::ChecksFailed(failed) => WriteOutcome::ChecksFailed(failed),
                Outcome::Refused(refused) => WriteOutcome::Refused(refused),
                Outcome::RequestReused => {
                    return Err(ShardError::RequestReused { shard: self.inner.id });
                }
                Outcome::ContextAhead { needed, .. } => {
                    self.wait_applied(write.namespace, &needed, deadline).await?;
                    write.time = self.stamp(deadline).await?;
                    continue;
                }
                Outcome::NotActive(member) => {
                    self.check_active(member)?;
                    // It came back in a new incarnation a moment ago.
                    write.actor.incarnation = member.incarnation;
                    continue;
                }
                Outcome::OwnChangeUnknown => {
                    let member = Member { state: MemberState::Regressed, ..self.own_member() };
                    return Err(ShardError::NotActive { shard: self.inner.id, member });
                }
                Outcome::Ingested(_)
                | Outcome::Collected(_)
                | Outcome::Expired(_)
                | Outcome::Merged(_)
                | Outcome::Advanced(_)
                | Outcome::SourceOut
                | Outcome::Moved
                | Outcome::Done => return Err(self.unexpected("a write", &outcome)),
            };
            return Ok(WriteReply { outcome, revision });
        }
    }

    /// Applies changes that `source` sent, in causal order.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is always safe: what is applied already is skipped.
    pub async fn ingest(
        &self,
        namespace: &Namespace,
        source: Actor,
        changes: Vec<Change>,
        deadline: Instant,
    ) -> Result<Ingested, ShardError> {
        self.inner.headroom.check(self.inner.id)?;
        // A time beyond the bound is applied but never moves the clock.
        self.learn_times(changes.iter().map(|change| (change.actor.region, change.time())));
        let ingest = Ingest {
            namespace: namespace.id,
            rule: namespace.rule,
            local: self.actor(),
            source,
            time: self.inner.clock.now(),
            changes,
        };
        match self.propose(&Command::Ingest(ingest), deadline).await? {
            (Outcome::Ingested(ingested), _) => {
                if let Some(RequestId { client, number }) = ingested.reused {
                    tracing::warn!(
                        shard = %self.inner.id,
                        region = %self.inner.topology.region_name(source.region),
                        client,
                        number,
                        "a client used one request id for different writes in two regions; both stand"
                    );
                }
                Ok(ingested)
            }
            (outcome, _) => Err(self.unexpected("an ingest", &outcome)),
        }
    }

    /// Takes over records of another region; `None` if what was compared has changed since.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is always safe: a merge is a join.
    pub async fn merge(
        &self,
        merge: Merge,
        deadline: Instant,
    ) -> Result<Option<Merged>, ShardError> {
        self.inner.headroom.check(self.inner.id)?;
        let offered = merge.offers.iter().flat_map(|offer| &offer.siblings);
        self.learn_times(offered.filter_map(|offered| match offered {
            Offered::Whole(sibling) => Some((sibling.dot.actor.region, sibling.time)),
            Offered::Known(_) => None,
        }));
        match self.propose(&Command::Merge(merge), deadline).await? {
            (Outcome::Merged(merged), _) => Ok(Some(merged)),
            (Outcome::Moved, _) => Ok(None),
            (Outcome::SourceOut, _) => Err(ShardError::SourceOut { shard: self.inner.id }),
            (outcome, _) => Err(self.unexpected("a merge", &outcome)),
        }
    }

    /// Ends a repair: moves the frontier to `cut`, of which all that was not here is merged since
    /// this region, in that life, had applied `since`.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is always safe.
    pub async fn advance(
        &self,
        namespace: NamespaceId,
        (local, source): (Actor, Actor),
        since: VersionVector,
        cut: VersionVector,
        ahead: VersionVector,
        deadline: Instant,
    ) -> Result<Advanced, ShardError> {
        let command = Command::Advance(Advance { namespace, local, source, since, cut, ahead });
        match self.propose(&command, deadline).await? {
            (Outcome::Advanced(_), _) => Ok(Advanced::Done),
            (Outcome::Moved, _) => Ok(Advanced::Moved),
            (Outcome::OwnChangeUnknown, _) => Ok(Advanced::OwnChangeUnknown),
            (Outcome::SourceOut, _) => Err(ShardError::SourceOut { shard: self.inner.id }),
            (outcome, _) => Err(self.unexpected("the end of a repair", &outcome)),
        }
    }

    /// Forgets the part of the change log that `upto` covers.
    pub(crate) async fn trim(
        &self,
        namespace: NamespaceId,
        upto: VersionVector,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        let command = Command::Trim(Trim { namespace, upto });
        self.propose(&command, deadline).await.map(|_| ())
    }

    /// Drops the tombstones of `keys` that `stable` covers, unless others than `members` must be counted
    /// by now.
    pub(crate) async fn collect(
        &self,
        namespace: NamespaceId,
        stable: VersionVector,
        members: Members,
        keys: Vec<Bytes>,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        let command = Command::Collect(Collect { namespace, stable, members, keys });
        self.propose(&command, deadline).await.map(|_| ())
    }

    /// Deletes values of this region's writes that have expired.
    pub(crate) async fn expire(
        &self,
        namespace: &Namespace,
        values: Vec<(Bytes, Dot)>,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        self.wait_heard(deadline).await;
        let expire = Expire {
            namespace: namespace.id,
            rule: namespace.rule,
            actor: self.actor(),
            time: self.stamp(deadline).await?,
            values,
        };
        self.propose(&Command::Expire(expire), deadline).await.map(|_| ())
    }

    /// Takes the latest value of keys that nobody has settled in time, each with the time of that value.
    pub(crate) async fn settle(
        &self,
        namespace: &Namespace,
        keys: Vec<(Bytes, HybridTime)>,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        self.wait_heard(deadline).await;
        let settle = Settle {
            namespace: namespace.id,
            rule: namespace.rule,
            actor: self.actor(),
            time: self.stamp(deadline).await?,
            keys,
        };
        self.propose(&Command::Settle(settle), deadline).await.map(|_| ())
    }

    /// Changes how this region pulls from `peer`. Kept by the catalog's shard, of which every node
    /// has a replica.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is harmless.
    pub async fn set_link(
        &self,
        peer: RegionId,
        setting: LinkSetting,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        self.propose(&Command::SetLink(peer, setting), deadline).await.map(|_| ())
    }

    /// Teaches this shard of a region.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is harmless.
    pub async fn set_member(
        &self,
        region: RegionId,
        member: Member,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        self.learn([(region, member)].into_iter().collect(), deadline).await
    }

    /// Teaches this shard of regions, all at once.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is harmless.
    pub async fn learn(&self, members: Members, deadline: Instant) -> Result<(), ShardError> {
        for (region, member) in members.iter() {
            tracing::info!(
                shard = %self.inner.id,
                region = %self.inner.topology.region_name(region),
                incarnation = member.incarnation,
                state = ?member.state,
                "learns of a region"
            );
        }
        self.propose(&Command::Learn(members), deadline).await.map(|_| ())
    }

    /// Drops all data of this shard and begins in a new incarnation. Values that this region wrote and
    /// `known` does not cover are kept for review. From then on it knows of the regions what `members` say.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is harmless: an incarnation begins once.
    pub async fn start_over(
        &self,
        incarnation: u32,
        known: BTreeMap<NamespaceId, VersionVector>,
        members: Members,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        let local = Actor { incarnation, ..self.actor() };
        tracing::warn!(shard = %self.inner.id, incarnation, "drops its data and begins anew");
        let command = Command::StartOver(StartOver { local, known, members });
        self.propose(&command, deadline).await.map(|_| ())
    }

    /// Forgets values that were kept for review.
    ///
    /// # Errors
    /// See [`ShardError`]. Repeating is harmless.
    pub async fn forget_reviewed(
        &self,
        namespace: NamespaceId,
        writes: Vec<(Bytes, Dot)>,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        let command = Command::ForgetReviewed(ForgetReviewed { namespace, writes });
        self.propose(&command, deadline).await.map(|_| ())
    }

    /// Forgets entries of the ledger.
    pub(crate) async fn forget_conflicts(
        &self,
        namespace: NamespaceId,
        entries: Vec<Noted>,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        let command = Command::ForgetConflicts(ForgetConflicts { namespace, entries });
        self.propose(&command, deadline).await.map(|_| ())
    }

    /// Forgets the outcomes of old requests.
    pub(crate) async fn forget(
        &self,
        requests: Vec<RequestId>,
        deadline: Instant,
    ) -> Result<(), ShardError> {
        self.propose(&Command::ForgetRequests(requests), deadline).await.map(|_| ())
    }

    /// A time for a write, from a clock that most of the region's agree with. Waits a moment for a clock
    /// that was not compared yet, as right after a start.
    ///
    /// Cancellation safe: it proposes nothing.
    async fn stamp(&self, deadline: Instant) -> Result<HybridTime, ShardError> {
        let (shard, clock) = (self.inner.id, &self.inner.clock);
        let until = deadline.min(Instant::now() + COMPARE_TIMEOUT);
        let mut standing = clock.standing();
        loop {
            standing.borrow_and_update();
            let refused = match clock.stamp() {
                Ok(time) => return Ok(time),
                Err(refused) => refused,
            };
            // Whoever leads has a clock of its own.
            if !self.is_leader() {
                return Err(ShardError::NotLeader { shard, leader: self.leader() });
            }
            let waited = refused.standing == Standing::Unheard
                && tokio::time::timeout_at(until, standing.changed()).await.is_ok();
            if !waited {
                clock.count_refused();
                return Err(ShardError::ClockOutOfBounds { shard, refused });
            }
        }
    }

    /// Learns what times of other regions say of their clocks, and tells it once.
    fn learn_times(&self, times: impl Iterator<Item = (RegionId, HybridTime)>) {
        for (region, news) in self.inner.clock.observe(times) {
            let region = self.inner.topology.region_name(region);
            match news {
                RegionNews::Ahead(ClockAhead { ahead_ms, bound_ms }) => tracing::error!(
                    %region,
                    ahead_ms,
                    bound_ms,
                    "a region's clock is too far ahead: correct the time of its nodes. Its changes are \
                     applied and move no clock here; concurrent writes lose to them"
                ),
                RegionNews::Believed => {
                    tracing::info!(%region, "a region's times are believed again");
                }
            }
        }
    }

    fn check_active(&self, member: Member) -> Result<(), ShardError> {
        if member.state == MemberState::Active {
            return Ok(());
        }
        Err(ShardError::NotActive { shard: self.inner.id, member })
    }

    /// Refuses what adds data while this leader's disk is nearly full. A repeat of a request that
    /// was executed before gets its answer all the same.
    fn check_headroom(&self, request: &WriteRequest) -> Result<(), ShardError> {
        let headroom = &self.inner.headroom;
        let adds = || {
            request.operations.iter().any(|it| it.content.is_present())
                || request.mutations.iter().any(|it| it.action.adds())
        };
        if !headroom.is_short() || !adds() || !self.is_leader() {
            return Ok(());
        }
        if let Some(id) = request.request
            && self.inner.store.remembers(id)?
        {
            return Ok(());
        }
        headroom.check(self.inner.id)
    }

    async fn propose(
        &self,
        command: &Command,
        deadline: Instant,
    ) -> Result<(Outcome, Revision), ShardError> {
        let shard = self.inner.id;
        let bytes = command.to_bytes();
        // What a replica cannot read stops it, and all of them, for good: never let it in.
        if let Err(error) = Command::from_bytes(bytes.clone()) {
            tracing::error!(%shard, %error, ?command, "refused to propose what cannot be read");
            return Err(ShardError::Unreadable { shard, error });
        }
        let proposed = self.inner.group.propose(bytes);
        match tokio::time::timeout_at(deadline, proposed).await {
            Ok(Ok(proposed)) => {
                let revision =
                    Revision { shard, term: proposed.log_id.term, index: proposed.log_id.index };
                Ok((proposed.outcome, revision))
            }
            Ok(Err(error)) => Err(ShardError::from_propose(shard, error)),
            Err(_) => Err(ShardError::OutcomeUnknown {
                shard,
                reason: "the deadline passed while the write was on its way".to_owned(),
            }),
        }
    }

    /// A reply of the wrong kind is our own bug; the caller hears that the outcome is unknown.
    fn unexpected(&self, asked: &str, outcome: &Outcome) -> ShardError {
        let shard = self.inner.id;
        tracing::error!(%shard, ?outcome, asked, "the state machine answered something else");
        ShardError::OutcomeUnknown { shard, reason: format!("unexpected answer to {asked}") }
    }

    /// Pauses before trying again, but not past the deadline.
    pub async fn pause(&self, deadline: Instant) {
        tokio::time::sleep_until(deadline.min(Instant::now() + RETRY_PAUSE)).await;
    }
}
