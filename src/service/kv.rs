//! `KvService`: decode, check, delegate, encode.

use std::{collections::BTreeMap, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, future::try_join_all};
use prost::Message;
use tokio::{sync::Semaphore, time::Instant};
use tombolo_core::{
    Content, Dot, RegionId, RequestId, Rule, ShardId, VersionVector,
    command::{Check, Operation, Written},
    key::{BATCH_OPERATIONS_MAX, check_key},
    namespace::Namespace,
    token::SessionToken,
    typed::Mutation,
};
use tombolo_proto::v1::{
    self as pb,
    kv_service_client::KvServiceClient,
    kv_service_server::{KvService, KvServiceServer},
};
use tombolo_shard::{Consistency, Shard, WriteOutcome, WriteReply, WriteRequest, blocking};
use tonic::{Request, Response, Status, transport::Channel};

use crate::{
    convert::{
        Scope, decode_expiration, decode_request_id, encode_dot, encode_revision, timestamp,
    },
    gateway::{Call, Gateway, request as with_metadata},
    reason::Reason,
    replicated::{Awaited, encode_coverage, pending},
    scan::{SCANS_MAX, ScanStream},
    status::{of_key_error, with_token},
    typed::{
        Asked, MUTATIONS_MAX, Page, ReadError, check_sums, mutated, of_refused, read, values_of,
    },
};

/// Most bytes of the results of a BatchGet.
const BATCH_REPLY_BYTES_MAX: usize = 128 << 20;
/// Largest answer of another node: a failed commit shows up to 128 values.
const FORWARDED_BYTES_MAX: usize = 192 << 20;

/// The client of another node that leads a shard.
fn forward_to(channel: Channel) -> KvServiceClient<Channel> {
    KvServiceClient::new(channel).max_decoding_message_size(FORWARDED_BYTES_MAX)
}

/// Serves keys.
#[derive(Clone)]
pub struct KvApi {
    gateway: Arc<Gateway>,
    /// Bounds the scans that run at once.
    scans: Arc<Semaphore>,
}

/// What a write does, decoded and checked.
#[derive(Default)]
struct Changes {
    operations: Vec<Operation>,
    mutations: Vec<Mutation>,
}

/// A write that is decoded and checked.
struct Prepared {
    namespace: Arc<Namespace>,
    shard: Shard,
    request: Option<RequestId>,
    checks: Vec<Check>,
    operations: Vec<Operation>,
    mutations: Vec<Mutation>,
    session: SessionToken,
    ack_regions: u32,
}

impl KvApi {
    /// Serves keys through `gateway`.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        Self { gateway, scans: Arc::new(Semaphore::new(SCANS_MAX)) }
    }

    /// The tonic service, refusing messages above `message_bytes_max`.
    pub fn into_service(self, message_bytes_max: usize) -> KvServiceServer<Self> {
        KvServiceServer::new(self).max_decoding_message_size(message_bytes_max)
    }

    fn consistency(
        &self,
        asked: Option<pb::ReadConsistency>,
        seen: Option<&VersionVector>,
    ) -> Result<Consistency, Status> {
        match asked.and_then(|asked| asked.level) {
            None | Some(pb::read_consistency::Level::Linearizable(_)) => {
                Ok(Consistency::Linearizable)
            }
            Some(pb::read_consistency::Level::Causal(_)) => {
                Ok(Consistency::Causal(seen.cloned().unwrap_or_default()))
            }
            Some(pb::read_consistency::Level::MaxStaleness(age)) => {
                let age = Duration::try_from(age)
                    .map_err(|_| Reason::RequestInvalid.status("max_staleness is negative", &[]))?;
                Ok(Consistency::MaxStaleness(age))
            }
            Some(pb::read_consistency::Level::Local(_)) => Ok(Consistency::Local),
        }
    }

    /// Makes the shard's replica ready for a read that must not be older than the session.
    async fn ready(
        &self,
        shard: &Shard,
        namespace: &Namespace,
        asked: Option<pb::ReadConsistency>,
        session: &SessionToken,
        deadline: Instant,
    ) -> Result<tombolo_shard::Revision, Status> {
        let seen = session.seen(namespace.id, shard.id());
        let consistency = self.consistency(asked, seen)?;
        if let (Some(seen), Consistency::Linearizable | Consistency::MaxStaleness(_)) =
            (seen, &consistency)
        {
            // Linearizable here says nothing of what the session saw in other regions.
            let caught_up = shard.wait_applied(namespace.id, seen, deadline).await;
            caught_up.map_err(|error| self.gateway.status(error))?;
        }
        self.gateway.prepare_read(shard, namespace.id, &consistency, deadline).await
    }

    async fn write(&self, prepared: &Prepared, call: Call) -> Result<WriteReply, Status> {
        let Prepared { namespace, shard, session, .. } = prepared;
        let to_status = |error| self.gateway.status(error);
        // A node that does not lead forwards: the leader may have it already.
        if let Some(seen) = session.seen(namespace.id, shard.id())
            && shard.is_leader()
        {
            shard.wait_applied(namespace.id, seen, call.deadline).await.map_err(to_status)?;
        }
        let request = WriteRequest {
            namespace: Arc::clone(namespace),
            request: prepared.request,
            checks: prepared.checks.clone(),
            operations: prepared.operations.clone(),
            mutations: prepared.mutations.clone(),
        };
        let mut reply = shard.write(request, call.deadline).await.map_err(to_status)?;
        match &mut reply.outcome {
            WriteOutcome::Written(results) => {
                self.wait_for_regions(prepared, results, call).await?;
                let count = prepared.operations.len() + prepared.mutations.len();
                *results = one_for_each(std::mem::take(results), count);
            }
            WriteOutcome::ChecksFailed(_) => {}
            WriteOutcome::Refused(refused) => {
                return Err(of_refused(namespace.rule, &prepared.mutations, *refused));
            }
        }
        Ok(reply)
    }

    /// Waits until other regions have what a write did. What it found done already counts as well: a maximum
    /// that did not change may not be anywhere else either.
    async fn wait_for_regions(
        &self,
        prepared: &Prepared,
        results: &[Written],
        call: Call,
    ) -> Result<(), Status> {
        let count = prepared.ack_regions as usize;
        let Some(dot) = named_dot(results, self.gateway.topology().region) else { return Ok(()) };
        if count == 0 {
            return Ok(());
        }
        let awaited = Awaited {
            namespace: Arc::clone(&prepared.namespace),
            shard: prepared.shard.clone(),
            needed: results.iter().map(|it| (it.dot.actor, it.dot.seq)).collect(),
        };
        // The write stands. Whoever forwarded it must not hear "not the leader", and send it again.
        let call = Call { no_forward: false, ..call };
        let metadata = [("dot", dot.to_string())];
        let status = match self.gateway.await_shard(&awaited, count, call).await {
            Ok(coverage) if count <= coverage.has.len() => return Ok(()),
            Ok(coverage) => {
                let (topology, reason) = (self.gateway.topology(), Reason::AckRegionsPending);
                pending(topology, reason, &coverage, count, &metadata)
            }
            // This node stops. A repeat of the request waits at another one.
            Err(status)
                if prepared.request.is_some()
                    && Reason::of(&status) == Some(Reason::ReplicaFailed) =>
            {
                return Err(status);
            }
            Err(status) => {
                let text = format!(
                    "the write stands in this region; who else has it is not known: {}",
                    status.message()
                );
                Reason::AckRegionsPending.status(text, &metadata)
            }
        };
        Err(with_token(&status, "session_token", &self.token_after(prepared, results)))
    }

    /// The session's token after a write.
    fn token_after(&self, prepared: &Prepared, results: &[Written]) -> Bytes {
        let Prepared { namespace, shard, session, .. } = prepared;
        let mut seen = VersionVector::new();
        results.iter().for_each(|written| seen.join(&written.context));
        self.token(session.clone(), namespace, shard.id(), &seen)
    }

    fn check_regions(&self, asked_as: &str, count: u32) -> Result<(), Status> {
        let others = self.gateway.topology().peers().len();
        if count as usize <= others {
            return Ok(());
        }
        Err(Reason::AckRegionsTooMany.status(
            format!("{asked_as} is {count}, but there are {others} other regions"),
            &[("max", others.to_string())],
        ))
    }

    fn token(
        &self,
        mut session: SessionToken,
        namespace: &Namespace,
        shard: ShardId,
        seen: &VersionVector,
    ) -> Bytes {
        session.observe(namespace.id, shard, seen);
        self.gateway.session_token(session)
    }

    /// A prepared write of one key.
    fn prepare_one(
        &self,
        namespace: Arc<Namespace>,
        key: &Bytes,
        changes: Changes,
        request_id: Option<pb::RequestId>,
        session_token: &Bytes,
        ack_regions: u32,
    ) -> Result<Prepared, Status> {
        self.check_regions("ack_regions", ack_regions)?;
        let Changes { operations, mutations } = changes;
        Ok(Prepared {
            shard: self.gateway.shards().of_key(key).clone(),
            request: decode_request_id(request_id)?,
            checks: Vec::new(),
            operations,
            mutations,
            session: self.gateway.session(session_token)?,
            ack_regions,
            namespace,
        })
    }

    /// Writes one key here, and answers what is common to put and delete.
    async fn write_one(&self, prepared: &Prepared, call: Call) -> Result<pb::PutResponse, Status> {
        let reply = self.write(prepared, call).await?;
        let WriteOutcome::Written(results) = reply.outcome else {
            return Err(Reason::Internal.status("a write without checks failed a check", &[]));
        };
        let session_token = self.token_after(prepared, &results);
        let Some(written) = results.into_iter().next() else {
            return Err(Reason::RequestIdInvalid
                .status("the request id was used for a commit without writes", &[]));
        };
        let Prepared { namespace, operations, mutations, .. } = prepared;
        let cleared = mutations.first().map(|mutation| &mutation.key);
        let key = operations.first().map(|operation| &operation.key).or(cleared);
        let key = key.map_or(&[][..], |key| key);
        let Written { dot, time, context, conflict, sum: _ } = written;
        Ok(pb::PutResponse {
            context: self.gateway.scope(namespace.id).seal_context(key, &context),
            session_token,
            conflict,
            dot: Some(encode_dot(dot)),
            write_time: Some(timestamp(time)),
            hybrid_time: time.to_bits(),
            revision: Some(encode_revision(reply.revision)),
        })
    }

    fn prepare_commit(
        &self,
        namespace: Arc<Namespace>,
        message: &pb::CommitRequest,
    ) -> Result<Prepared, Status> {
        let operations_count = message.checks.len() + message.writes.len();
        if operations_count == 0 {
            return Err(Reason::RequestInvalid.status("the commit is empty", &[]));
        }
        if operations_count > BATCH_OPERATIONS_MAX {
            return Err(batch_too_large("checks and writes", operations_count));
        }
        self.check_regions("ack_regions", message.ack_regions)?;
        let scope = self.gateway.scope(namespace.id);
        let checks: Vec<Check> = message
            .checks
            .iter()
            .cloned()
            .map(|check| scope.check(namespace.rule, check))
            .collect::<Result<_, _>>()?;
        let mut changes = Changes::default();
        for write in message.writes.iter().cloned() {
            changes.add(&scope, namespace.rule, write)?;
        }
        let keys = checks.iter().map(|check| &check.key);
        let keys = keys.chain(message.writes.iter().map(|write| &write.key));
        let shard = self.one_shard(keys)?;
        if let Some(key) = repeated_key(&message.writes) {
            return Err(Reason::RequestInvalid
                .status(format!("the commit writes key `{}` twice", key.escape_ascii()), &[]));
        }
        Ok(Prepared {
            shard,
            request: decode_request_id(message.request_id)?,
            checks,
            operations: changes.operations,
            mutations: changes.mutations,
            session: self.gateway.session(&message.session_token)?,
            ack_regions: message.ack_regions,
            namespace,
        })
    }

    /// The shard of all keys, or an error that names two that differ.
    fn one_shard<'a>(&self, mut keys: impl Iterator<Item = &'a Bytes>) -> Result<Shard, Status> {
        let topology = self.gateway.topology();
        let Some(first) = keys.next() else {
            return Err(Reason::RequestInvalid.status("the commit is empty", &[]));
        };
        let shard = topology.shard_of(first);
        match keys.find(|key| topology.shard_of(key) != shard) {
            None => Ok(self.gateway.shards().of_key(first).clone()),
            Some(other) => Err(Reason::CrossShardBatch.status(
                format!(
                    "keys `{}` and `{}` lie in shards {shard} and {}; give them one hash tag, as in \
                     `{{tag}}:name`",
                    first.escape_ascii(),
                    other.escape_ascii(),
                    topology.shard_of(other)
                ),
                &[],
            )),
        }
    }

    async fn commit_here(
        &self,
        prepared: &Prepared,
        writes: &[pb::Write],
        call: Call,
    ) -> Result<pb::CommitResponse, Status> {
        let reply = self.write(prepared, call).await?;
        let Prepared { namespace, shard, operations, mutations, checks, session, .. } = prepared;
        let scope = self.gateway.scope(namespace.id);
        let revision = Some(encode_revision(reply.revision));
        match reply.outcome {
            WriteOutcome::Written(results_of) => {
                let session_token = self.token_after(prepared, &results_of);
                let operated = operations.iter().map(|operation| &operation.key);
                let keys = operated.chain(mutations.iter().map(|mutation| &mutation.key));
                // One answer a write; of several mutations of a key, the last one's.
                let mut results: BTreeMap<Bytes, pb::WriteResult> = BTreeMap::new();
                for (written, key) in results_of.into_iter().zip(keys) {
                    let before = results.get(key);
                    let result = pb::WriteResult {
                        context: scope.seal_context(key, &written.context),
                        conflict: written.conflict || before.is_some_and(|it| it.conflict),
                        dot: Some(encode_dot(written.dot)),
                        hybrid_time: written.time.to_bits(),
                        sum: written.sum.or(before.and_then(|it| it.sum)),
                    };
                    results.insert(key.clone(), result);
                }
                let of_write = |write: &pb::Write| results.remove(&write.key).unwrap_or_default();
                let results = writes.iter().map(of_write).collect();
                Ok(pb::CommitResponse {
                    committed: true,
                    failed_checks: Vec::new(),
                    session_token,
                    results,
                    revision,
                })
            }
            WriteOutcome::ChecksFailed(failed) => {
                let mut seen = VersionVector::new();
                let mut failed_checks = Vec::with_capacity(failed.len());
                for failed in failed {
                    let Some(check) = checks.get(failed.check) else { continue };
                    if let Some(record) = &failed.actual {
                        seen.join(record.context());
                    }
                    let (versions, context) =
                        scope.versions(&check.key, failed.actual.as_ref(), false);
                    // Of a typed value a check shows nothing, which a deletion should not take for all.
                    let context = if namespace.rule.is_typed() { Bytes::new() } else { context };
                    let check = u32::try_from(failed.check).unwrap_or(u32::MAX);
                    failed_checks.push(pb::FailedCheck { check, versions, context });
                }
                let session_token = self.token(session.clone(), namespace, shard.id(), &seen);
                Ok(pb::CommitResponse {
                    committed: false,
                    failed_checks,
                    session_token,
                    results: Vec::new(),
                    revision,
                })
            }
            WriteOutcome::Refused(refused) => Err(of_refused(namespace.rule, mutations, refused)),
        }
    }

    /// Applies typed operations here.
    async fn mutate_here(
        &self,
        prepared: &Prepared,
        message: &pb::MutateRequest,
        call: Call,
    ) -> Result<pb::MutateResponse, Status> {
        let reply = self.write(prepared, call).await?;
        let WriteOutcome::Written(results) = reply.outcome else {
            return Err(Reason::Internal.status("a write without checks failed a check", &[]));
        };
        if results.is_empty() {
            let text = "the request id was used for another kind of request";
            return Err(Reason::RequestIdInvalid.status(text, &[]));
        }
        let scope = self.gateway.scope(prepared.namespace.id);
        Ok(pb::MutateResponse {
            session_token: self.token_after(prepared, &results),
            revision: Some(encode_revision(reply.revision)),
            ..mutated(&scope, &message.key, &message.operations, &results)
        })
    }

    /// Reads typed values of one shard on this replica, all as of one moment.
    async fn get_typed(
        &self,
        namespace: &Namespace,
        shard: &Shard,
        asked: Vec<Asked>,
    ) -> Result<TypedRead, Status> {
        let (gateway, shard, namespace) = (Arc::clone(&self.gateway), shard.clone(), namespace.id);
        let found = blocking(move || {
            let pinned = shard.store().pin(namespace);
            let page = |asked: &Asked| read(gateway.cluster(), &pinned, asked);
            let pages = asked.iter().map(page).collect::<Result<_, _>>()?;
            Ok(TypedRead { pages, seen: pinned.frontier().clone() })
        });
        found.await.map_err(|error| match error {
            ReadError::Storage(error) => self.gateway.status(error.into()),
            ReadError::Status(status) => status,
        })
    }
}

/// Parts of typed values, in the order in which they were asked for, and what was applied when they were read.
struct TypedRead {
    pages: Vec<Page>,
    seen: VersionVector,
}

/// The write that a request is known by: the last that this region made for it. If it made none, the latest
/// of those that were there.
fn named_dot(results: &[Written], region: RegionId) -> Option<Dot> {
    let dots = || results.iter().map(|written| written.dot);
    dots().filter(|dot| dot.actor.region == region).max().or_else(|| dots().max())
}

/// The results of `count` writes. Of a request that another region took this one knows what was written, and
/// not always by which operation: some write nothing, some more than once. Then the last stands for all.
fn one_for_each(results: Vec<Written>, count: usize) -> Vec<Written> {
    match results.last() {
        Some(last) if results.len() != count => vec![last.clone(); count],
        Some(_) | None => results,
    }
}

fn batch_too_large(what: &str, count: usize) -> Status {
    Reason::BatchTooLarge.status(
        format!("{count} {what}; at most {BATCH_OPERATIONS_MAX} are allowed"),
        &[("max", BATCH_OPERATIONS_MAX.to_string())],
    )
}

/// Counts a result, and refuses more than a reply may have.
fn within_reply(result: pb::KeyResult, bytes: &mut usize) -> Result<pb::KeyResult, Status> {
    *bytes += result.encoded_len();
    if *bytes <= BATCH_REPLY_BYTES_MAX {
        return Ok(result);
    }
    Err(Reason::BatchTooLarge.status(
        format!(
            "the values of these keys have more than {BATCH_REPLY_BYTES_MAX} bytes together; \
             ask for fewer keys at a time, or scan"
        ),
        &[("max_bytes", BATCH_REPLY_BYTES_MAX.to_string())],
    ))
}

fn repeated_key(writes: &[pb::Write]) -> Option<&Bytes> {
    let mut keys = std::collections::BTreeSet::new();
    writes.iter().map(|write| &write.key).find(|key| !keys.insert(*key))
}

impl Changes {
    /// Adds a write of a commit.
    fn add(&mut self, scope: &Scope<'_>, rule: Rule, write: pb::Write) -> Result<(), Status> {
        use pb::{put_request::Expiration as OfPut, write::Expiration as OfWrite};
        let expiration = write.expiration.map(|expiration| match expiration {
            OfWrite::ExpireTime(at) => OfPut::ExpireTime(at),
            OfWrite::Ttl(ttl) => OfPut::Ttl(ttl),
        });
        match write.action {
            Some(pb::write::Action::Put(value)) => {
                let expire = decode_expiration(expiration, scope.now)?;
                let put = scope.put(rule, write.key, Some(value), expire, &write.context)?;
                self.operations.push(put);
            }
            Some(pb::write::Action::Delete(_) | pb::write::Action::Mutate(_))
                if expiration.is_some() =>
            {
                return Err(Reason::TtlInvalid.status("only a put has a time to live", &[]));
            }
            Some(pb::write::Action::Delete(pb::Remove {})) => {
                let deletion = Self::deletion(scope, rule, &write.key, &write.context)?;
                self.operations.extend(deletion.operations);
                self.mutations.extend(deletion.mutations);
            }
            Some(pb::write::Action::Mutate(pb::Mutation { operations })) => {
                let more = scope.mutations(rule, &write.key, operations, &write.context)?;
                self.mutations.extend(more);
            }
            None => {
                let text = "a write has neither put, delete nor mutate";
                return Err(Reason::RequestInvalid.status(text, &[]));
            }
        }
        if self.mutations.len() > MUTATIONS_MAX {
            return Err(Reason::BatchTooLarge.status(
                format!("more than {MUTATIONS_MAX} typed operations, elements counted"),
                &[("max", MUTATIONS_MAX.to_string())],
            ));
        }
        Ok(())
    }

    /// The deletion of a key.
    fn deletion(
        scope: &Scope<'_>,
        rule: Rule,
        key: &Bytes,
        context: &Bytes,
    ) -> Result<Self, Status> {
        let mut changes = Self::default();
        if rule.is_typed() {
            changes.mutations.push(scope.clear(key, context)?);
        } else {
            let deletion = scope.operation(key.clone(), Content::Tombstone, context)?;
            changes.operations.push(deletion);
        }
        Ok(changes)
    }
}

#[tonic::async_trait]
impl KvService for KvApi {
    async fn get(
        &self,
        request: Request<pb::GetRequest>,
    ) -> Result<Response<pb::GetResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        check_key(&message.key).map_err(of_key_error)?;
        let session = self.gateway.session(&message.session_token)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        let shard = self.gateway.shards().of_key(&message.key);
        let revision =
            self.ready(shard, &namespace, message.consistency, &session, call.deadline).await?;

        let scope = self.gateway.scope(namespace.id);
        if namespace.rule.is_typed() {
            let asked = Asked::of_get(namespace.rule, &message)?;
            let TypedRead { mut pages, seen } =
                self.get_typed(&namespace, shard, vec![asked]).await?;
            let page = pages.pop().unwrap_or_default();
            let latest = page.assembly.latest();
            let values = values_of(namespace.rule, page.assembly);
            if !message.keys_only {
                check_sums(&message.key, &values)?;
            }
            return Ok(Response::new(pb::GetResponse {
                versions: scope.typed_versions(latest, values, message.keys_only),
                context: scope.seal_context(&message.key, &seen),
                session_token: self.token(session, &namespace, shard.id(), &seen),
                revision: Some(encode_revision(revision)),
                next_element_token: page.next,
                settle_time: None,
            }));
        }
        Asked::check_untyped(namespace.rule, &message)?;
        let record =
            shard.record(namespace.id, &message.key).map_err(|error| self.gateway.status(error))?;
        let shown = scope.key_result(&namespace, message.key, record.as_ref(), message.keys_only);
        let seen = record.map(|record| record.context().clone()).unwrap_or_default();
        Ok(Response::new(pb::GetResponse {
            versions: shown.versions,
            context: shown.context,
            session_token: self.token(session, &namespace, shard.id(), &seen),
            revision: Some(encode_revision(revision)),
            next_element_token: Bytes::new(),
            settle_time: shown.settle_time,
        }))
    }

    async fn batch_get(
        &self,
        request: Request<pb::BatchGetRequest>,
    ) -> Result<Response<pb::BatchGetResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        if message.keys.len() > BATCH_OPERATIONS_MAX {
            return Err(batch_too_large("keys", message.keys.len()));
        }
        for key in &message.keys {
            check_key(key).map_err(of_key_error)?;
        }
        let mut session = self.gateway.session(&message.session_token)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        // Where each key of a shard stands in the request.
        let mut shards: BTreeMap<ShardId, (&Shard, Vec<usize>)> = BTreeMap::new();
        for (place, key) in message.keys.iter().enumerate() {
            let shard = self.gateway.shards().of_key(key);
            shards.entry(shard.id()).or_insert((shard, Vec::new())).1.push(place);
        }
        try_join_all(shards.values().map(|(shard, _)| {
            self.ready(shard, &namespace, message.consistency, &session, call.deadline)
        }))
        .await?;

        let scope = self.gateway.scope(namespace.id);
        let mut results = vec![pb::KeyResult::default(); message.keys.len()];
        let mut bytes = 0;
        for (shard, places) in shards.into_values() {
            let keys: Vec<Bytes> = places.iter().map(|&at| message.keys[at].clone()).collect();
            if namespace.rule.is_typed() {
                let asked = keys.iter().cloned().map(Asked::all).collect();
                let TypedRead { pages, seen } = self.get_typed(&namespace, shard, asked).await?;
                session.observe(namespace.id, shard.id(), &seen);
                for ((key, Page { assembly, next }), place) in
                    keys.into_iter().zip(pages).zip(places)
                {
                    let (rule, keys_only) = (namespace.rule, message.keys_only);
                    let result = scope.typed_result(rule, key, assembly, &seen, keys_only);
                    let result = pb::KeyResult { partial: !next.is_empty(), ..result };
                    results[place] = within_reply(result, &mut bytes)?;
                }
                continue;
            }
            // One moment of the shard: an atomic commit is seen whole or not at all.
            let records = shard.records(namespace.id, &keys);
            let records = records.map_err(|error| self.gateway.status(error))?;
            for ((key, record), place) in keys.into_iter().zip(records).zip(places) {
                if let Some(record) = &record {
                    session.observe(namespace.id, shard.id(), record.context());
                }
                let result = scope.key_result(&namespace, key, record.as_ref(), message.keys_only);
                results[place] = within_reply(result, &mut bytes)?;
            }
        }
        let session_token = self.gateway.session_token(session);
        Ok(Response::new(pb::BatchGetResponse { results, session_token }))
    }

    type ScanStream = Pin<Box<dyn Stream<Item = Result<pb::ScanResponse, Status>> + Send>>;

    async fn scan(
        &self,
        request: Request<pb::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let session = self.gateway.session(&message.session_token)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        try_join_all(self.gateway.shards().iter().map(|shard| {
            self.ready(shard, &namespace, message.consistency, &session, call.deadline)
        }))
        .await?;
        let turn = Arc::clone(&self.scans).acquire_owned();
        let permit = match tokio::time::timeout_at(call.deadline, turn).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) | Err(_) => {
                let text = format!("{SCANS_MAX} scans are running on this node");
                return Err(Reason::Overloaded.status(text, &[]));
            }
        };
        let gateway = Arc::clone(&self.gateway);
        let stream = ScanStream::open(gateway, namespace, message, session, permit).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        check_key(&message.key).map_err(of_key_error)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        let scope = self.gateway.scope(namespace.id);
        let expire = decode_expiration(message.expiration, scope.now)?;
        let (key, value) = (message.key.clone(), message.value.clone());
        let put = scope.put(namespace.rule, key, value, expire, &message.context)?;
        let prepared = self.prepare_one(
            namespace,
            &message.key,
            Changes { operations: vec![put], ..Changes::default() },
            message.request_id,
            &message.session_token,
            message.ack_regions,
        )?;
        let response = self
            .gateway
            .on_leader(
                &prepared.shard,
                call,
                || self.write_one(&prepared, call),
                |channel, metadata| {
                    let message = message.clone();
                    async move {
                        let mut client = forward_to(channel);
                        Ok(client.put(with_metadata(message, metadata)).await?.into_inner())
                    }
                },
            )
            .await?;
        Ok(Response::new(response))
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        check_key(&message.key).map_err(of_key_error)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        let scope = self.gateway.scope(namespace.id);
        let deletion = Changes::deletion(&scope, namespace.rule, &message.key, &message.context)?;
        let prepared = self.prepare_one(
            namespace,
            &message.key,
            deletion,
            message.request_id,
            &message.session_token,
            message.ack_regions,
        )?;
        let response = self
            .gateway
            .on_leader(
                &prepared.shard,
                call,
                || async { Ok(delete_response(self.write_one(&prepared, call).await?)) },
                |channel, metadata| {
                    let message = message.clone();
                    async move {
                        let mut client = forward_to(channel);
                        Ok(client.delete(with_metadata(message, metadata)).await?.into_inner())
                    }
                },
            )
            .await?;
        Ok(Response::new(response))
    }

    async fn mutate(
        &self,
        request: Request<pb::MutateRequest>,
    ) -> Result<Response<pb::MutateResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        check_key(&message.key).map_err(of_key_error)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        let scope = self.gateway.scope(namespace.id);
        let (rule, operations) = (namespace.rule, message.operations.clone());
        let mutations = scope.mutations(rule, &message.key, operations, &message.context)?;
        let prepared = self.prepare_one(
            namespace,
            &message.key,
            Changes { mutations, ..Changes::default() },
            message.request_id,
            &message.session_token,
            message.ack_regions,
        )?;
        let response = self
            .gateway
            .on_leader(
                &prepared.shard,
                call,
                || self.mutate_here(&prepared, &message, call),
                |channel, metadata| {
                    let message = message.clone();
                    async move {
                        let mut client = forward_to(channel);
                        Ok(client.mutate(with_metadata(message, metadata)).await?.into_inner())
                    }
                },
            )
            .await?;
        Ok(Response::new(response))
    }

    async fn commit(
        &self,
        request: Request<pb::CommitRequest>,
    ) -> Result<Response<pb::CommitResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        let prepared = self.prepare_commit(namespace, &message)?;
        let response = self
            .gateway
            .on_leader(
                &prepared.shard,
                call,
                || self.commit_here(&prepared, &message.writes, call),
                |channel, metadata| {
                    let message = message.clone();
                    async move {
                        let mut client = forward_to(channel);
                        Ok(client.commit(with_metadata(message, metadata)).await?.into_inner())
                    }
                },
            )
            .await?;
        Ok(Response::new(response))
    }

    async fn await_replication(
        &self,
        request: Request<pb::AwaitReplicationRequest>,
    ) -> Result<Response<pb::AwaitReplicationResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        self.check_regions("regions", message.regions)?;
        let session = self.gateway.session(&message.session_token)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        let awaited = self.gateway.awaited(&namespace, &session);
        let count = message.regions as usize;
        let coverage = self.gateway.await_all(&awaited, count, call).await?;
        Ok(Response::new(encode_coverage(self.gateway.topology(), &coverage)))
    }
}

fn delete_response(put: pb::PutResponse) -> pb::DeleteResponse {
    pb::DeleteResponse {
        context: put.context,
        session_token: put.session_token,
        conflict: put.conflict,
        dot: put.dot,
        write_time: put.write_time,
        hybrid_time: put.hybrid_time,
        revision: put.revision,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_values_count_with_all_their_bytes() {
        let set = pb::SetValue { elements: vec![vec![0; 100].into(); 10] };
        let kind = Some(pb::value::Kind::Set(set));
        let value = Some(pb::Value { kind, ..Default::default() });
        let versions = vec![pb::Version { value, ..Default::default() }];
        let result = pb::KeyResult { versions, ..Default::default() };

        let mut bytes = BATCH_REPLY_BYTES_MAX - 1500;
        let result = within_reply(result, &mut bytes).unwrap();
        let refused = within_reply(result, &mut bytes).unwrap_err();
        assert_eq!(Reason::of(&refused), Some(Reason::BatchTooLarge));
    }
}
