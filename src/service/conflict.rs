//! `ConflictService`: what was dropped, which keys hold several values, and settling both.
//!
//! Every node has a replica of every shard, so the contacted node lists and shows from its own data,
//! after it asked each shard's leader how far that is. A leader that does not answer within
//! `PATIENCE` holds nothing up: an incident is when people look here. The reply names its shard.
//!
//! Invariants:
//! * A settlement is an ordinary write with the context of what its caller was shown, under the check
//!   that nothing else was written to the key: nobody overwrites what they have not seen.
//! * Pages follow the order of the index, over all shards; what is noted while somebody pages appears
//!   before the first page, never in the middle.
//!
//! Not here: what enters the ledger (`tombolo_core::execute`), what leaves it (`tombolo_shard::Collector`).

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::join_all;
use prost_types::Timestamp;
use tokio::time::Instant;
use tombolo_core::{
    Content, Dot, HybridTime, NamespaceId, RegionId, RequestId, Rule, VersionVector,
    command::{Answer, Check, Condition, Operation, Written},
    element::{self, Element},
    ledger::{Cause, LedgerEntry, LedgerHead, LedgerId, Noted},
    namespace::Namespace,
    token::{SessionToken, TokenKey, decode_context, encode_page},
};
use tombolo_proto::v1::{
    self as pb,
    conflict_service_client::ConflictServiceClient,
    conflict_service_server::{ConflictService, ConflictServiceServer},
    resolve_conflict_request::Choice,
};
use tombolo_shard::{
    Consistency, Revision, Shard, ShardError, WriteOutcome, WriteRequest, blocking,
};
use tonic::{Request, Response, Status};

use crate::{
    convert::{decode_dot, decode_request_id, encode_dot, encode_revision, open_page, timestamp},
    gateway::{Call, Gateway, request as with_metadata},
    namespace::encode_rule,
    reason::Reason,
    status::of_token_error,
};

/// How long a reply waits for leaders to say how far they are.
const PATIENCE: Duration = Duration::from_secs(1);
const PAGE_SIZE_DEFAULT: usize = 100;
const PAGE_SIZE_MAX: usize = 1000;
/// Entries of one shard that one page looks at; a page that finds too little ends early.
const VISITED_MAX: usize = 20_000;
/// The name of the catalog's own namespace, of which conflicts can be looked at.
const CATALOG: &str = "catalog";

/// Serves conflicts.
#[derive(Clone)]
pub struct ConflictApi {
    gateway: Arc<Gateway>,
}

/// Which entries of the ledger a list shows.
#[derive(Clone, Debug)]
struct Filter {
    rule: Rule,
    key_prefix: Bytes,
    origin: Option<RegionId>,
    since: HybridTime,
}

impl Filter {
    fn takes(&self, head: &LedgerHead) -> bool {
        element::user_key(self.rule, &head.key).starts_with(&self.key_prefix)
            && self.origin.is_none_or(|origin| head.loser.actor.region == origin)
    }
}

/// A part of a list: rows in order, and how far the search came, if it did not come to the end.
#[derive(Debug)]
struct Part<R, P> {
    rows: Vec<R>,
    stopped_at: Option<P>,
}

impl<R, P: Clone + Ord> Part<R, P> {
    /// Joins the parts of all shards, whose order `place` gives, into a page of `limit` rows. What lies
    /// behind the place where one of them stopped may have others before it, and waits for the next page.
    fn join(parts: Vec<Self>, limit: usize, place: impl Fn(&R) -> P) -> Self {
        let stopped_at = parts.iter().filter_map(|part| part.stopped_at.clone()).min();
        let mut rows: Vec<R> = parts.into_iter().flat_map(|part| part.rows).collect();
        rows.retain(|row| stopped_at.as_ref().is_none_or(|stopped| place(row) <= *stopped));
        rows.sort_by_key(&place);
        if limit < rows.len() {
            rows.truncate(limit);
            let stopped_at = rows.last().map(&place);
            return Self { rows, stopped_at };
        }
        Self { rows, stopped_at }
    }
}

/// What a settlement is about.
struct Settlement {
    namespace: Arc<Namespace>,
    shard: Shard,
    key: Bytes,
    /// What its caller was shown.
    seen: VersionVector,
    request: Option<RequestId>,
}

/// What a settlement did.
struct Settled {
    dot: pb::Dot,
    context: Bytes,
    session_token: Bytes,
    time: HybridTime,
    revision: Revision,
}

/// Entries between two regions of one namespace.
#[derive(Clone, Copy)]
struct Tally {
    count: u64,
    bytes: u64,
    oldest: HybridTime,
    newest: HybridTime,
}

impl ConflictApi {
    /// Serves conflicts through `gateway`.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        Self { gateway }
    }

    /// The tonic service, refusing messages above `message_bytes_max`.
    pub fn into_service(self, message_bytes_max: usize) -> ConflictServiceServer<Self> {
        ConflictServiceServer::new(self).max_decoding_message_size(message_bytes_max)
    }

    /// The namespace of a request that only looks.
    async fn namespace(&self, name: &str, deadline: Instant) -> Result<Arc<Namespace>, Status> {
        if name == CATALOG {
            return Ok(Arc::new(Namespace::catalog()));
        }
        self.gateway.namespace(name, deadline).await
    }

    /// The namespace of a request that writes.
    async fn writable(&self, name: &str, deadline: Instant) -> Result<Arc<Namespace>, Status> {
        if name == CATALOG {
            return Err(Reason::NamespaceReserved
                .status("conflicts of the catalog can only be looked at", &[]));
        }
        self.gateway.namespace(name, deadline).await
    }

    fn region(&self, name: &str) -> Result<RegionId, Status> {
        let region = self.gateway.topology().region_named(name);
        region.map(|region| region.id).ok_or_else(|| {
            Reason::RegionNotFound
                .status(format!("there is no region `{name}`"), &[("region", name.to_owned())])
        })
    }

    fn namespace_name(&self, id: NamespaceId) -> String {
        match self.gateway.shards().catalog().current().with_id(id) {
            Some(namespace) => namespace.name.clone(),
            None if id == NamespaceId::CATALOG => CATALOG.to_owned(),
            None => format!("#{id}"),
        }
    }

    /// Brings this node's replicas up to date with their leaders, and names those shards whose leader
    /// does not answer.
    async fn refresh(&self, namespace: NamespaceId, deadline: Instant) -> Vec<String> {
        let asked =
            self.gateway.shards().iter().map(|shard| self.confirm(shard, namespace, deadline));
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// Brings this node's replica of a shard up to date; names the shard if its leader does not answer.
    async fn confirm(
        &self,
        shard: &Shard,
        namespace: NamespaceId,
        deadline: Instant,
    ) -> Option<String> {
        let now = Instant::now();
        let until = now + PATIENCE.min(deadline.saturating_duration_since(now) / 2);
        let consistency = Consistency::Linearizable;
        match self.gateway.prepare_read(shard, namespace, &consistency, until).await {
            Ok(_) => None,
            Err(status) => {
                tracing::debug!(shard = %shard.id(), %status, "shows what this replica has");
                Some(format!("shard {}", shard.id()))
            }
        }
    }

    /// The entry with this id, and the shard of its key.
    async fn find(
        &self,
        namespace: NamespaceId,
        id: &str,
        deadline: Instant,
    ) -> Result<(Shard, LedgerEntry), Status> {
        let id: LedgerId =
            id.parse().map_err(|error| Reason::RequestInvalid.status(format!("{error}"), &[]))?;
        if let Some(found) = self.find_here(namespace, id).await? {
            return Ok(found);
        }
        // It may have been noted a moment ago.
        let unreachable = self.refresh(namespace, deadline).await;
        if let Some(found) = self.find_here(namespace, id).await? {
            return Ok(found);
        }
        let text = if unreachable.is_empty() {
            format!("the ledger of this region has no conflict {id}")
        } else {
            let silent = unreachable.join(", ");
            format!("this node has no conflict {id}, and could not ask the leaders of {silent}")
        };
        Err(Reason::ConflictNotFound.status(text, &[("id", id.to_string())]))
    }

    async fn find_here(
        &self,
        namespace: NamespaceId,
        id: LedgerId,
    ) -> Result<Option<(Shard, LedgerEntry)>, Status> {
        let shards: Vec<Shard> = self.gateway.shards().iter().cloned().collect();
        // The id does not say which shard: a look at each, most of which end at a filter in memory.
        let search = move || {
            for shard in shards {
                if let Some(entry) = shard.store().ledger_entry(namespace, id)? {
                    return Ok(Some((shard, entry)));
                }
            }
            Ok::<_, ShardError>(None)
        };
        blocking(search).await.map_err(|error| self.gateway.status(error))
    }

    /// Reads a part of a list from every shard.
    async fn parts<T: Send + 'static>(
        &self,
        read: impl Fn(&Shard) -> Result<T, ShardError> + Send + 'static,
    ) -> Result<Vec<T>, Status> {
        let shards: Vec<Shard> = self.gateway.shards().iter().cloned().collect();
        let read = move || shards.iter().map(read).collect::<Result<Vec<T>, ShardError>>();
        blocking(read).await.map_err(|error| self.gateway.status(error))
    }

    fn conflict(&self, namespace: &Namespace, noted: Noted, head: LedgerHead) -> pb::Conflict {
        pb::Conflict {
            id: noted.id.to_string(),
            namespace: namespace.name.clone(),
            winner: Some(self.version(head.winner, head.winner_time, None)),
            loser: Some(self.version(head.loser, head.loser_time, None)),
            resolve_time: Some(timestamp(noted.at)),
            cause: encode_cause(head.cause).into(),
            loser_is_delete: head.is_delete,
            bytes: head.bytes,
            field_path: path_of(namespace.rule, &head.key),
            key: element::user_key(namespace.rule, &head.key),
        }
    }

    /// A version as it was written, whether or not a reader would see it.
    fn version(&self, dot: Dot, time: HybridTime, content: Option<&Content>) -> pb::Version {
        let (data, expire) = match content {
            Some(Content::Value { data, expire }) => (Some(data.clone()), *expire),
            Some(Content::Tombstone | Content::Count { .. } | Content::Reset { .. }) | None => {
                (None, None)
            }
        };
        pb::Version {
            dot: Some(encode_dot(dot)),
            value: data.map(|data| pb::Value {
                kind: Some(pb::value::Kind::Data(data)),
                ..Default::default()
            }),
            origin_region: self.gateway.topology().region_name(dot.actor.region),
            write_time: Some(timestamp(time)),
            hybrid_time: time.to_bits(),
            expire_time: expire.map(timestamp),
        }
    }

    /// What a caller was shown of a key; nothing if it sends nothing.
    fn seen(
        &self,
        namespace: NamespaceId,
        key: &Bytes,
        context: &Bytes,
    ) -> Result<VersionVector, Status> {
        if context.is_empty() {
            return Ok(VersionVector::new());
        }
        let decoded = decode_context(self.gateway.cluster(), namespace, key, context);
        decoded.map_err(|error| of_token_error(Reason::ContextInvalid, &error))
    }

    /// Writes `content` over exactly what was shown, if nothing else was written to the key.
    async fn settle(
        &self,
        settlement: &Settlement,
        content: Content,
        call: Call,
    ) -> Result<Settled, Status> {
        let Settlement { namespace, shard, key, seen, request } = settlement;
        let checks =
            vec![Check { key: key.clone(), condition: Condition::ContextCurrent(seen.clone()) }];
        let operations = vec![Operation { key: key.clone(), content, context: Some(seen.clone()) }];
        let namespace = Arc::clone(namespace);
        let write = WriteRequest {
            namespace: Arc::clone(&namespace),
            request: *request,
            checks,
            operations,
            mutations: Vec::new(),
        };
        let reply = shard.write(write, call.deadline).await;
        let reply = reply.map_err(|error| self.gateway.status(error))?;
        let WriteOutcome::Written(results) = reply.outcome else { return Err(moved()) };
        let Some(Written { dot, time, context, .. }) = results.into_iter().next() else {
            return Err(Reason::RequestIdInvalid
                .status("the request id was used for a commit without writes", &[]));
        };
        let mut session = SessionToken::default();
        session.observe(namespace.id, shard.id(), &context);
        Ok(Settled {
            dot: encode_dot(dot),
            context: self.gateway.scope(namespace.id).seal_context(key, &context),
            session_token: self.gateway.session_token(session),
            time,
            revision: reply.revision,
        })
    }

    /// A value that is written again as it was, as long as it may be shown.
    fn unexpired(&self, content: &Content, settlement: &Settlement) -> Result<Content, Status> {
        let now = self.gateway.shards().clock().now();
        if let Content::Value { expire: Some(at), .. } = content
            && *at <= now
        {
            // A repeat of a request that was in time gets its answer.
            let remembered = settlement.request.map(|id| settlement.shard.store().remembers(id));
            let remembered = remembered.transpose();
            if !remembered.map_err(|error| self.gateway.status(error.into()))?.unwrap_or(false) {
                return Err(Reason::ConflictExpired.status(
                    "the value's time to live has passed; a put with a new one writes it anew",
                    &[("expired_ms", at.physical_ms().to_string())],
                ));
            }
        }
        Ok(content.clone())
    }

    /// What a resolution writes. Answers on the leader only: what the key holds decides.
    async fn chosen(
        &self,
        settlement: &Settlement,
        choice: &Choice,
        call: Call,
    ) -> Result<Content, Status> {
        let Settlement { namespace, shard, key, seen, request } = settlement;
        let scope = self.gateway.scope(namespace.id);
        let dot = match choice {
            Choice::Delete(pb::Remove {}) => return Ok(Content::Tombstone),
            Choice::Value(value) => {
                let put = scope.put(
                    namespace.rule,
                    key.clone(),
                    Some(value.clone()),
                    None,
                    &Bytes::new(),
                )?;
                return Ok(put.content);
            }
            Choice::Dot(dot) => decode_dot(*dot)?,
        };
        let to_status = |error: ShardError| self.gateway.status(error);
        let consistency = Consistency::Linearizable;
        // Only the leader goes on: elsewhere the answer is a hint, and the caller forwards.
        shard.prepare_read(namespace.id, &consistency, call.deadline).await.map_err(to_status)?;
        let record = shard.record(namespace.id, key).map_err(to_status)?.unwrap_or_default();
        let held = |dot: Dot| record.siblings().iter().find(|held| held.dot == dot);
        if let Some(chosen) = held(dot) {
            return self.unexpired(&chosen.content, settlement);
        }
        // A repeat: what it wrote the first time.
        if let Some(id) = *request
            && let Some(before) =
                shard.store().remembered(id).map_err(|error| to_status(error.into()))?
            && let Answer::Written { results, .. } = before.answer
            && let Some(written) = results.first().and_then(|result| held(result.dot))
        {
            return Ok(written.content.clone());
        }
        if seen.covers_all(record.context()) {
            return Err(Reason::RequestInvalid.status(
                format!("the key holds no value that {dot} wrote"),
                &[("dot", dot.to_string())],
            ));
        }
        Err(moved())
    }
}

/// The names of the fields that lead to a record of a map.
fn path_of(rule: Rule, key: &[u8]) -> Vec<String> {
    let element = if rule.is_typed() { Element::from_key(key) } else { None };
    let names = element.map(|element| element.path).unwrap_or_default();
    names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
}

/// Settling writes a key whole.
fn check_whole_values(namespace: &Namespace) -> Result<(), Status> {
    if !namespace.rule.is_typed() {
        return Ok(());
    }
    let text = format!(
        "namespace `{}` has the rule `{}`: what was dropped is put back with the operation `assign`",
        namespace.name,
        namespace.rule.name()
    );
    Err(Reason::TypeMismatch.status(text, &[("rule", namespace.rule.name().to_owned())]))
}

/// The key was written since somebody looked.
fn moved() -> Status {
    Reason::ConflictMoved
        .status("the key was written after its context was read; look at it again", &[])
}

fn encode_cause(cause: Cause) -> pb::ConflictCause {
    match cause {
        Cause::Rule => pb::ConflictCause::Rule,
        Cause::Bound => pb::ConflictCause::Bound,
        Cause::Deadline => pb::ConflictCause::Deadline,
    }
}

/// The bytes of a page token, which is text.
fn decode_token(key: &TokenKey, hash: u32, token: &str) -> Result<Bytes, Status> {
    let invalid = || Reason::PageTokenInvalid.status("the page token is not of this list", &[]);
    let sealed = hex::decode(token).map_err(|_| invalid())?;
    open_page(key, hash, &sealed.into())
}

fn encode_token(key: &TokenKey, hash: u32, place: &[u8]) -> String {
    hex::encode(encode_page(key, hash, place))
}

/// Ties a page token to what was asked for.
fn hash_of(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()
}

fn page_size(asked: i32) -> Result<usize, Status> {
    match usize::try_from(asked) {
        Ok(0) => Ok(PAGE_SIZE_DEFAULT),
        Ok(size) => Ok(size.min(PAGE_SIZE_MAX)),
        Err(_) => Err(Reason::RequestInvalid.status("page_size is negative", &[])),
    }
}

fn decode_since(since: Option<Timestamp>) -> Result<HybridTime, Status> {
    let Some(since) = since else { return Ok(HybridTime::ZERO) };
    let invalid = || Reason::RequestInvalid.status("since_time is not a time after 1970", &[]);
    let seconds = u64::try_from(since.seconds).map_err(|_| invalid())?;
    let ms = u64::try_from(since.nanos).map_err(|_| invalid())? / 1_000_000;
    HybridTime::new(seconds.saturating_mul(1000).saturating_add(ms), 0).ok_or_else(invalid)
}

/// The entries of one shard that a page may show, the newest first.
fn newest(
    shard: &Shard,
    namespace: NamespaceId,
    filter: &Filter,
    before: Option<Noted>,
    limit: usize,
) -> Result<Part<(Noted, LedgerHead), Newest>, ShardError> {
    let (mut rows, mut visited) = (Vec::new(), 0);
    let (mut last, mut stopped_at) = (None, None);
    shard.store().each_conflict(namespace, filter.since, before, |noted, head| {
        if rows.len() == limit || visited == VISITED_MAX {
            stopped_at = last;
            return false;
        }
        visited += 1;
        last = Some(Reverse(noted));
        if filter.takes(&head) {
            rows.push((noted, head));
        }
        true
    })?;
    Ok(Part { rows, stopped_at })
}

/// The newest comes first.
type Newest = Reverse<Noted>;

/// A key with several values, by the time of the latest.
type Open = (HybridTime, Bytes);

/// Keys of one shard that hold several values, those that wait longest first.
fn longest_open(
    shard: &Shard,
    namespace: NamespaceId,
    key_prefix: &Bytes,
    after: Option<&Open>,
    limit: usize,
) -> Result<Part<Open, Open>, ShardError> {
    let after = after.map(|(since, key)| (*since, &key[..]));
    let mut rows = shard.store().open_keys(namespace, after, VISITED_MAX)?;
    let is_end = rows.len() < VISITED_MAX;
    let mut stopped_at = rows.last().filter(|_| !is_end).cloned();
    rows.retain(|(_, key)| key.starts_with(key_prefix));
    if limit < rows.len() {
        rows.truncate(limit);
        stopped_at = rows.last().cloned();
    }
    Ok(Part { rows, stopped_at })
}

fn encode_open((since, key): &Open) -> Vec<u8> {
    [&since.to_bits().to_be_bytes()[..], key].concat()
}

fn decode_open(place: &Bytes) -> Option<Open> {
    let (since, key) = place.split_first_chunk::<8>()?;
    let since = HybridTime::from_bits(u64::from_be_bytes(*since));
    Some((since, Bytes::copy_from_slice(key)))
}

/// By namespace, winning region, losing region and cause.
type Tallies = BTreeMap<(NamespaceId, RegionId, RegionId, i32), Tally>;

/// What the ledger of one shard has.
fn tally(shard: &Shard, only: Option<NamespaceId>) -> Result<Tallies, ShardError> {
    let mut tallies = Tallies::new();
    let all = shard.store().ledger_sizes().into_keys();
    for namespace in all.filter(|id| only.is_none_or(|only| only == *id)) {
        shard.store().each_conflict(namespace, HybridTime::ZERO, None, |noted, head| {
            let (winner, loser) = (head.winner.actor.region, head.loser.actor.region);
            let cause = encode_cause(head.cause).into();
            let one = Tally { count: 1, bytes: head.bytes, oldest: noted.at, newest: noted.at };
            let tally = tallies.entry((namespace, winner, loser, cause));
            tally.and_modify(|tally| tally.add(one)).or_insert(one);
            true
        })?;
    }
    Ok(tallies)
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.bytes += other.bytes;
        self.oldest = self.oldest.min(other.oldest);
        self.newest = self.newest.max(other.newest);
    }
}

#[tonic::async_trait]
impl ConflictService for ConflictApi {
    async fn list_conflicts(
        &self,
        request: Request<pb::ListConflictsRequest>,
    ) -> Result<Response<pb::ListConflictsResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let limit = page_size(message.page_size)?;
        let origin = match message.origin_region.as_str() {
            "" => None,
            name => Some(self.region(name)?),
        };
        let since = decode_since(message.since_time)?;
        let hash = hash_of(&[
            b"conflicts",
            message.namespace.as_bytes(),
            &message.key_prefix,
            message.origin_region.as_bytes(),
            &since.to_bits().to_be_bytes(),
        ]);
        let before = match message.page_token.as_str() {
            "" => None,
            token => Some(
                Noted::from_bytes(&decode_token(self.gateway.cluster(), hash, token)?).ok_or_else(
                    || Reason::PageTokenInvalid.status("the page token is not of this list", &[]),
                )?,
            ),
        };
        let namespace = self.namespace(&message.namespace, call.deadline).await?;
        let unreachable = self.refresh(namespace.id, call.deadline).await;
        let (id, rule) = (namespace.id, namespace.rule);
        let filter = Filter { rule, key_prefix: message.key_prefix, origin, since };
        let parts = self.parts(move |shard| newest(shard, id, &filter, before, limit)).await?;
        let page = Part::join(parts, limit, |(noted, _)| Reverse(*noted));
        let next = page
            .stopped_at
            .map(|Reverse(noted)| encode_token(self.gateway.cluster(), hash, &noted.to_bytes()));
        let conflict = |(noted, head)| self.conflict(&namespace, noted, head);
        Ok(Response::new(pb::ListConflictsResponse {
            conflicts: page.rows.into_iter().map(conflict).collect(),
            next_page_token: next.unwrap_or_default(),
            unreachable,
        }))
    }

    async fn get_conflict(
        &self,
        request: Request<pb::GetConflictRequest>,
    ) -> Result<Response<pb::GetConflictResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let namespace = self.namespace(&message.namespace, call.deadline).await?;
        let (shard, entry) = self.find(namespace.id, &message.id, call.deadline).await?;
        let unreachable = self.confirm(&shard, namespace.id, call.deadline).await;
        let record = shard.record(namespace.id, &entry.key);
        let record = record.map_err(|error| self.gateway.status(error))?;
        let scope = self.gateway.scope(namespace.id);
        let (current, context) = scope.versions(&entry.key, record.as_ref(), false);
        // Nothing settles a register but a typed operation.
        let context = if namespace.rule.is_typed() { Bytes::new() } else { context };

        let bytes = entry.to_bytes().len() as u64;
        let head = LedgerHead::new(&entry, bytes);
        let winner = current
            .iter()
            .find(|version| version.dot == Some(encode_dot(entry.winner)))
            .cloned()
            .unwrap_or_else(|| self.version(entry.winner, entry.winner_time, None));
        let loser = &entry.loser;
        let conflict = pb::Conflict {
            winner: Some(winner),
            loser: Some(self.version(loser.dot, loser.time, Some(&loser.content))),
            ..self.conflict(&namespace, entry.place(namespace.id), head)
        };
        Ok(Response::new(pb::GetConflictResponse {
            conflict: Some(conflict),
            current,
            context,
            rule: encode_rule(namespace.rule),
            unreachable: unreachable.into_iter().collect(),
        }))
    }

    async fn restore_conflict(
        &self,
        request: Request<pb::RestoreConflictRequest>,
    ) -> Result<Response<pb::RestoreConflictResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let namespace = self.writable(&message.namespace, call.deadline).await?;
        check_whole_values(&namespace)?;
        let (shard, entry) = self.find(namespace.id, &message.id, call.deadline).await?;
        let seen = self.seen(namespace.id, &entry.key, &message.context)?;
        let request = decode_request_id(message.request_id)?;
        let settlement = Settlement { namespace, shard, key: entry.key.clone(), seen, request };
        let response = self
            .gateway
            .on_leader(
                &settlement.shard,
                call,
                || async {
                    let content = self.unexpired(&entry.loser.content, &settlement)?;
                    Ok(self.settle(&settlement, content, call).await?.into())
                },
                |channel, metadata| {
                    let message = message.clone();
                    async move {
                        let mut node = ConflictServiceClient::new(channel);
                        let reply = node.restore_conflict(with_metadata(message, metadata)).await?;
                        Ok(reply.into_inner())
                    }
                },
            )
            .await?;
        Ok(Response::new(response))
    }

    async fn list_open_conflicts(
        &self,
        request: Request<pb::ListOpenConflictsRequest>,
    ) -> Result<Response<pb::ListOpenConflictsResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let limit = page_size(message.page_size)?;
        let hash = hash_of(&[b"open", message.namespace.as_bytes(), &message.key_prefix]);
        let after = match message.page_token.as_str() {
            "" => None,
            token => {
                Some(decode_open(&decode_token(self.gateway.cluster(), hash, token)?).ok_or_else(
                    || Reason::PageTokenInvalid.status("the page token is not of this list", &[]),
                )?)
            }
        };
        let namespace = self.namespace(&message.namespace, call.deadline).await?;
        let unreachable = self.refresh(namespace.id, call.deadline).await;
        let (id, prefix) = (namespace.id, message.key_prefix);
        if namespace.rule.is_typed() {
            // Registers are shown by their latest assignment, and the rest merges.
            return Ok(Response::new(pb::ListOpenConflictsResponse::default()));
        }
        let parts = self
            .parts(move |shard| longest_open(shard, id, &prefix, after.as_ref(), limit))
            .await?;
        let page = Part::join(parts, limit, Clone::clone);
        let scope = self.gateway.scope(namespace.id);
        let mut conflicts = Vec::with_capacity(page.rows.len());
        for (since, key) in page.rows {
            let shard = self.gateway.shards().of_key(&key);
            let record = shard.record(namespace.id, &key);
            let record = record.map_err(|error| self.gateway.status(error))?;
            let (versions, context) = scope.versions(&key, record.as_ref(), true);
            // Settled a moment ago, or all but one have expired.
            if versions.len() > 1 {
                let since_time = Some(timestamp(since));
                let settle_time = namespace.settles_at(since).map(timestamp);
                conflicts.push(pb::OpenConflict {
                    key,
                    versions,
                    context,
                    since_time,
                    settle_time,
                });
            }
        }
        let next = page
            .stopped_at
            .map(|place| encode_token(self.gateway.cluster(), hash, &encode_open(&place)));
        Ok(Response::new(pb::ListOpenConflictsResponse {
            conflicts,
            next_page_token: next.unwrap_or_default(),
            unreachable,
        }))
    }

    async fn resolve_conflict(
        &self,
        request: Request<pb::ResolveConflictRequest>,
    ) -> Result<Response<pb::ResolveConflictResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let namespace = self.writable(&message.namespace, call.deadline).await?;
        check_whole_values(&namespace)?;
        let key = self.gateway.scope(namespace.id).key(message.key.clone())?;
        let seen = self.seen(namespace.id, &key, &message.context)?;
        let request = decode_request_id(message.request_id)?;
        let choice = message.choice.clone().ok_or_else(|| {
            let text = "the choice is missing: a dot, a value, or delete";
            Reason::RequestInvalid.status(text, &[])
        })?;
        let shard = self.gateway.shards().of_key(&key).clone();
        let settlement = Settlement { namespace, shard, key, seen, request };
        let response = self
            .gateway
            .on_leader(
                &settlement.shard,
                call,
                || async {
                    let content = self.chosen(&settlement, &choice, call).await?;
                    Ok(self.settle(&settlement, content, call).await?.into())
                },
                |channel, metadata| {
                    let message = message.clone();
                    async move {
                        let mut node = ConflictServiceClient::new(channel);
                        let reply = node.resolve_conflict(with_metadata(message, metadata)).await?;
                        Ok(reply.into_inner())
                    }
                },
            )
            .await?;
        Ok(Response::new(response))
    }

    async fn get_conflict_stats(
        &self,
        request: Request<pb::GetConflictStatsRequest>,
    ) -> Result<Response<pb::GetConflictStatsResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only = match request.into_inner().namespace.as_str() {
            "" => None,
            name => Some(self.namespace(name, call.deadline).await?.id),
        };
        let asked = only.unwrap_or(NamespaceId::CATALOG);
        let unreachable = self.refresh(asked, call.deadline).await;
        let mut tallies = Tallies::new();
        for part in self.parts(move |shard| tally(shard, only)).await? {
            for (place, part) in part {
                let tally = tallies.entry(place);
                tally.and_modify(|tally| tally.add(part)).or_insert(part);
            }
        }
        let region = |region| self.gateway.topology().region_name(region);
        let row = |((namespace, winner, loser, cause), tally): (_, Tally)| pb::ConflictStats {
            namespace: self.namespace_name(namespace),
            winner_region: region(winner),
            loser_region: region(loser),
            cause,
            count: tally.count,
            bytes: tally.bytes,
            oldest_time: Some(timestamp(tally.oldest)),
            newest_time: Some(timestamp(tally.newest)),
        };
        let stats = tallies.into_iter().map(row).collect();
        Ok(Response::new(pb::GetConflictStatsResponse { stats, unreachable }))
    }
}

impl From<Settled> for pb::RestoreConflictResponse {
    fn from(settled: Settled) -> Self {
        Self {
            dot: Some(settled.dot),
            context: settled.context,
            session_token: settled.session_token,
            write_time: Some(timestamp(settled.time)),
            hybrid_time: settled.time.to_bits(),
            revision: Some(encode_revision(settled.revision)),
        }
    }
}

impl From<Settled> for pb::ResolveConflictResponse {
    fn from(settled: Settled) -> Self {
        Self {
            dot: Some(settled.dot),
            context: settled.context,
            session_token: settled.session_token,
            write_time: Some(timestamp(settled.time)),
            hybrid_time: settled.time.to_bits(),
            revision: Some(encode_revision(settled.revision)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of a shard after a place, as far as one look goes.
    fn part(rows: &[u32], after: Option<u32>, most: usize) -> Part<u32, u32> {
        let rest = rows.iter().copied().filter(|row| after.is_none_or(|at| at < *row));
        let mut rows: Vec<u32> = rest.collect();
        let stopped_at = (most < rows.len()).then(|| rows[most - 1]);
        rows.truncate(most);
        Part { rows, stopped_at }
    }

    #[test]
    fn pages_of_all_shards_show_every_row_once_and_in_order() {
        // Every way to spread six rows over three shards, none included.
        for spread in 0..4u32.pow(6) {
            let place = |row: u32| spread / 4u32.pow(row) % 4;
            let shard = |number: u32| (0..6).filter(|&row| place(row) == number).collect();
            let shards: Vec<Vec<u32>> = (0..3).map(shard).collect();
            let all: Vec<u32> = (0..6).filter(|&row| place(row) < 3).collect();
            for (limit, most) in [(1, 1), (2, 1), (2, 2), (3, 2), (4, 4), (9, 9)] {
                let (mut shown, mut after) = (Vec::new(), None);
                loop {
                    let parts = shards.iter().map(|rows| part(rows, after, most)).collect();
                    let page = Part::join(parts, limit, |row| *row);
                    assert!(page.rows.len() <= limit);
                    shown.extend(page.rows);
                    match page.stopped_at {
                        Some(place) => after = Some(place),
                        None => break,
                    }
                }
                assert_eq!(shown, all, "{shards:?}, {limit} a page, {most} a look");
            }
        }
    }

    #[test]
    fn a_page_token_reads_back_and_belongs_to_its_request() {
        let key = TokenKey::without_secret("test");
        let hash = hash_of(&[b"a", b"bc"]);
        let token = encode_token(&key, hash, b"place");
        assert_eq!(decode_token(&key, hash, &token).unwrap(), &b"place"[..]);
        let (other, invalid) = (hash_of(&[b"ab", b"c"]), Reason::PageTokenInvalid);
        for (hash, token, reason) in [
            (other, token.as_str(), Reason::PageTokenMismatch),
            (hash, "zz", invalid),
            (hash, "00", invalid),
        ] {
            let status = decode_token(&key, hash, token).unwrap_err();
            assert_eq!(Reason::of(&status), Some(reason));
        }
        let open = (HybridTime::from_bits(7), Bytes::from_static(b"k"));
        assert_eq!(decode_open(&encode_open(&open).into()), Some(open));
        assert_eq!(decode_open(&Bytes::from_static(b"short")), None);
    }

    #[test]
    fn a_since_time_before_1970_is_refused() {
        let at = |seconds, nanos| decode_since(Some(Timestamp { seconds, nanos }));
        assert_eq!(decode_since(None).unwrap(), HybridTime::ZERO);
        assert_eq!(at(2, 5_000_000).unwrap().physical_ms(), 2005);
        for status in [at(-1, 0), at(1, -1), at(i64::MAX, 0)] {
            assert_eq!(Reason::of(&status.unwrap_err()), Some(Reason::RequestInvalid));
        }
    }
}
