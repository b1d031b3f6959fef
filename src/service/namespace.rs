//! `NamespaceService`, and the catalog's writer in the home region.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tombolo_core::{
    Content, NamespaceId, Record, Rule,
    command::{Check, Condition, Operation},
    key::is_namespace_name,
    namespace::{DEFAULT_NAME, NEXT_ID_KEY, Namespace},
};
use tombolo_proto::{
    internal::v1::{self as internal, link_service_client::LinkServiceClient},
    v1::{
        self as pb,
        namespace_service_client::NamespaceServiceClient,
        namespace_service_server::{NamespaceService, NamespaceServiceServer},
    },
};
use tombolo_replication::{CatalogChange, CatalogChanges, LinkChannels, link_identity};
use tombolo_shard::{WriteOutcome, WriteRequest};
use tonic::{Request, Response, Status};

use crate::{
    convert::timestamp,
    gateway::{Call, Gateway, request as with_metadata},
    reason::Reason,
    status::{not_implemented, of_token_error},
};

/// Changes the catalog where it lives: in the home region, on the leader of its shard.
#[derive(Clone)]
pub struct CatalogWriter {
    gateway: Arc<Gateway>,
}

/// How long a change that another region asked for may take here.
const REMOTE_CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Names that output uses for the system's own data.
const RESERVED_NAMES: [&str; 2] = ["catalog", "system"];
/// Bounds on how long values may wait to be settled.
const HOLD_MIN: Duration = Duration::from_secs(1);
const HOLD_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Creations that may collide before one gives up.
const CREATE_ATTEMPTS: usize = 32;

impl CatalogWriter {
    /// A writer through `gateway`.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        Self { gateway }
    }

    /// Carries out a change in this region, which must be the home region.
    async fn change(&self, change: CatalogChange, call: Call) -> Result<Namespace, Status> {
        let topology = self.gateway.topology();
        if !topology.is_catalog_home() {
            let home = topology.region_name(topology.catalog_home);
            return Err(Reason::NotCatalogHome
                .status(format!("namespaces are changed in region `{home}`"), &[("home", home)]));
        }
        let shard = self.gateway.shards().catalog_shard();
        let local = || async {
            match &change {
                CatalogChange::Create { name, rule, hold_ms } => {
                    self.create(name, *rule, *hold_ms, call).await
                }
                CatalogChange::Delete { name, etag } => self.delete(name, etag, call).await,
            }
        };
        let remote = |channel, metadata| {
            let change = change.clone();
            async move {
                let mut client = NamespaceServiceClient::new(channel);
                match change {
                    CatalogChange::Create { name, rule, hold_ms } => {
                        let namespace = pb::Namespace {
                            name,
                            rule: encode_rule(rule),
                            hold: encode_hold(hold_ms),
                            ..Default::default()
                        };
                        let message = pb::CreateNamespaceRequest {
                            namespace: Some(namespace),
                            validate_only: false,
                        };
                        let reply =
                            client.create_namespace(with_metadata(message, metadata)).await?;
                        decode_namespace(reply.into_inner().namespace)
                    }
                    CatalogChange::Delete { name, etag } => {
                        let message = pb::DeleteNamespaceRequest { name: name.clone(), etag };
                        client.delete_namespace(with_metadata(message, metadata)).await?;
                        Ok(Namespace { name, ..Namespace::default_namespace() })
                    }
                }
            }
        };
        self.gateway.on_leader(shard, call, local, remote).await
    }

    /// Creates a namespace under the next free number, in one commit.
    async fn create(
        &self,
        name: &str,
        rule: Rule,
        hold_ms: Option<u64>,
        call: Call,
    ) -> Result<Namespace, Status> {
        let next_key = Bytes::from_static(NEXT_ID_KEY);
        for _ in 0..CREATE_ATTEMPTS {
            let counter = self.read(NEXT_ID_KEY, call).await?;
            let (id, unchanged) = match counter.as_ref().and_then(|held| held.siblings().first()) {
                None => (NamespaceId::FIRST_ASSIGNED, Condition::Absent),
                Some(sibling) => {
                    (decode_next_id(&sibling.content)?, Condition::DotEquals(sibling.dot))
                }
            };
            let created = self.gateway.shards().clock().now();
            let namespace = Namespace { id, name: name.to_owned(), rule, created, hold_ms };
            let key = Namespace::catalog_key(name);
            let checks = vec![
                Check { key: key.clone(), condition: Condition::Absent },
                Check { key: next_key.clone(), condition: unchanged },
            ];
            let next_id = id
                .0
                .checked_add(1)
                .ok_or_else(|| Reason::Internal.status("all namespace numbers are used", &[]))?;
            let operations = vec![
                put(key, namespace.to_bytes()),
                put(next_key.clone(), Bytes::from(next_id.to_string())),
            ];
            match self.commit(checks, operations, call).await? {
                WriteOutcome::Written(_) => return Ok(namespace),
                WriteOutcome::ChecksFailed(failed) if failed.iter().any(|one| one.check == 0) => {
                    return Err(
                        Reason::NamespaceExists.status(format!("namespace `{name}` exists"), &[])
                    );
                }
                // Another creation took the number.
                WriteOutcome::ChecksFailed(_) => {}
                WriteOutcome::Refused(_) => return Err(catalog_is_untyped()),
            }
        }
        Err(Reason::Overloaded.status("too many namespaces are created at once", &[]))
    }

    async fn delete(&self, name: &str, etag: &str, call: Call) -> Result<Namespace, Status> {
        let key = Namespace::catalog_key(name);
        let held = self.read(&key, call).await?;
        let (namespace, present) = live_entry(held.as_ref(), name)?;
        if !etag.is_empty() && etag != present.to_string() {
            return Err(Reason::EtagMismatch
                .status(format!("namespace `{name}` has etag {present}, not {etag}"), &[]));
        }
        let checks = vec![Check { key: key.clone(), condition: Condition::DotEquals(present) }];
        let removal = Operation { key, content: Content::Tombstone, context: None };
        match self.commit(checks, vec![removal], call).await? {
            WriteOutcome::Written(_) => Ok(namespace),
            WriteOutcome::ChecksFailed(_) => Err(Reason::EtagMismatch
                .status(format!("namespace `{name}` was changed meanwhile"), &[])),
            WriteOutcome::Refused(_) => Err(catalog_is_untyped()),
        }
    }

    /// What the catalog has under a key. Answers on the leader of its shard only.
    pub(crate) async fn read(&self, key: &[u8], call: Call) -> Result<Option<Record>, Status> {
        let shard = self.gateway.shards().catalog_shard();
        let linearizable = tombolo_shard::Consistency::Linearizable;
        let to_status = |error| self.gateway.status(error);
        // Only the leader goes on: elsewhere the answer is a hint, and the caller forwards.
        shard
            .prepare_read(NamespaceId::CATALOG, &linearizable, call.deadline)
            .await
            .map_err(to_status)?;
        shard.record(NamespaceId::CATALOG, key).map_err(to_status)
    }

    /// Writes into the catalog if all checks hold. Answers on the leader of its shard only.
    pub(crate) async fn commit(
        &self,
        checks: Vec<Check>,
        operations: Vec<Operation>,
        call: Call,
    ) -> Result<WriteOutcome, Status> {
        let shard = self.gateway.shards().catalog_shard();
        let namespace = Arc::new(Namespace::catalog());
        let mutations = Vec::new();
        let request = WriteRequest { namespace, request: None, checks, operations, mutations };
        let reply = shard.write(request, call.deadline).await;
        Ok(reply.map_err(|error| self.gateway.status(error))?.outcome)
    }
}

impl CatalogChanges for CatalogWriter {
    fn change(&self, change: CatalogChange) -> BoxFuture<'_, Result<Bytes, Status>> {
        Box::pin(async move {
            let call = Call { deadline: Instant::now() + REMOTE_CHANGE_TIMEOUT, no_forward: false };
            Ok(CatalogWriter::change(self, change, call).await?.to_bytes())
        })
    }
}

/// Serves namespaces.
#[derive(Clone)]
pub struct NamespaceApi {
    gateway: Arc<Gateway>,
    writer: CatalogWriter,
    links: LinkChannels,
}

const PAGE_SIZE_DEFAULT: usize = 100;
const PAGE_SIZE_MAX: usize = 1000;

impl NamespaceApi {
    /// Serves namespaces; reaches the home region over `links`.
    pub fn new(gateway: Arc<Gateway>, links: LinkChannels) -> Self {
        let writer = CatalogWriter::new(Arc::clone(&gateway));
        Self { gateway, writer, links }
    }

    /// The tonic service.
    pub fn into_service(self) -> NamespaceServiceServer<Self> {
        NamespaceServiceServer::new(self)
    }

    /// Carries out a change here or in the home region.
    async fn change(&self, change: CatalogChange, call: Call) -> Result<Namespace, Status> {
        if self.gateway.topology().is_catalog_home() {
            return self.writer.change(change, call).await;
        }
        self.change_at_home(change, call).await
    }

    async fn change_at_home(&self, change: CatalogChange, call: Call) -> Result<Namespace, Status> {
        let topology = self.gateway.topology();
        let home = topology.region(topology.catalog_home).ok_or_else(|| {
            Reason::Internal.status("the catalog's home region is not in the topology", &[])
        })?;
        let change = match change {
            CatalogChange::Create { name, rule, hold_ms } => {
                let rule = i32::from(rule.to_byte());
                internal::change_catalog_request::Change::Create(internal::CreateNamespace {
                    name,
                    rule,
                    hold_ms,
                })
            }
            CatalogChange::Delete { name, etag } => {
                let delete = internal::DeleteNamespace { name, etag };
                internal::change_catalog_request::Change::Delete(delete)
            }
        };
        let mut last = "it has no link addresses".to_owned();
        for address in &home.link_addresses {
            let channel = self.links.get(address).map_err(|error| {
                Reason::Internal.status(format!("`{address}` is no address: {error}"), &[])
            })?;
            let mut request = Request::new(internal::ChangeCatalogRequest {
                identity: Some(link_identity(
                    topology,
                    self.gateway.shards().catalog_shard().own_member(),
                    &home,
                )),
                change: Some(change.clone()),
            });
            let left = call.deadline.saturating_duration_since(Instant::now());
            request.set_timeout(left);
            let mut client = LinkServiceClient::new(channel);
            let answer = client.change_catalog(request);
            match tokio::time::timeout_at(call.deadline, answer).await {
                Ok(Ok(reply)) => {
                    let bytes = reply.into_inner().namespace;
                    return Namespace::from_bytes(bytes)
                        .map_err(|error| of_token_error(Reason::Internal, &error));
                }
                // A refusal with a reason is the home region's answer.
                Ok(Err(status)) if Reason::of(&status).is_some() => return Err(status),
                Ok(Err(status)) => last = format!("{address}: {}", status.message()),
                Err(_) => last = format!("{address}: no answer in time"),
            }
            if Instant::now() >= call.deadline {
                break;
            }
        }
        Err(Reason::RegionUnreachable.status(
            format!(
                "region `{}`, which takes namespace changes, cannot be reached: {last}",
                home.name
            ),
            &[("region", home.name.clone())],
        ))
    }

    /// Waits until this region's catalog shows the change, so that the caller can use it here.
    async fn wait_visible(
        &self,
        deadline: Instant,
        shown: impl Fn(&tombolo_cluster::Namespaces) -> bool,
    ) -> Result<(), Status> {
        let mut versions = self.gateway.shards().catalog().subscribe();
        let visible = versions.wait_for(|namespaces| shown(namespaces));
        match tokio::time::timeout_at(deadline, visible).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Reason::RegionUnreachable
                .status("the change was made, but has not reached this region yet", &[])),
        }
    }

    async fn encode(&self, namespace: &Namespace) -> Result<pb::Namespace, Status> {
        let key = Namespace::catalog_key(&namespace.name);
        let shard = self.gateway.shards().catalog_shard();
        let record = shard.record(NamespaceId::CATALOG, &key);
        let record = record.map_err(|error| self.gateway.status(error))?;
        let dot = record.as_ref().and_then(|held| held.siblings().first()).map(|held| held.dot);
        Ok(pb::Namespace {
            name: namespace.name.clone(),
            id: namespace.id.0,
            rule: encode_rule(namespace.rule),
            create_time: Some(timestamp(namespace.created)),
            etag: dot.map(|dot| dot.to_string()).unwrap_or_default(),
            hold: encode_hold(namespace.hold_ms),
        })
    }
}

#[tonic::async_trait]
impl NamespaceService for NamespaceApi {
    async fn create_namespace(
        &self,
        request: Request<pb::CreateNamespaceRequest>,
    ) -> Result<Response<pb::CreateNamespaceResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let asked = message.namespace.unwrap_or_default();
        check_name(&asked.name)?;
        let rule = decode_rule(asked.rule)?;
        let hold_ms = decode_hold(asked.hold, rule)?;
        if message.validate_only {
            self.gateway.refresh_catalog(call.deadline).await?;
            if self.gateway.shards().catalog().current().named(&asked.name).is_some() {
                return Err(Reason::NamespaceExists
                    .status(format!("namespace `{}` exists", asked.name), &[]));
            }
            let namespace = pb::Namespace { rule: encode_rule(rule), ..asked };
            return Ok(Response::new(pb::CreateNamespaceResponse { namespace: Some(namespace) }));
        }
        let change = CatalogChange::Create { name: asked.name, rule, hold_ms };
        let created = self.change(change, call).await?;
        self.wait_visible(call.deadline, |held| held.with_id(created.id).is_some()).await?;
        let namespace = Some(self.encode(&created).await?);
        Ok(Response::new(pb::CreateNamespaceResponse { namespace }))
    }

    async fn get_namespace(
        &self,
        request: Request<pb::GetNamespaceRequest>,
    ) -> Result<Response<pb::GetNamespaceResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let name = request.into_inner().name;
        self.gateway.refresh_catalog(call.deadline).await?;
        let namespace = self.gateway.namespace(&name, call.deadline).await?;
        let namespace = Some(self.encode(&namespace).await?);
        Ok(Response::new(pb::GetNamespaceResponse { namespace }))
    }

    async fn list_namespaces(
        &self,
        request: Request<pb::ListNamespacesRequest>,
    ) -> Result<Response<pb::ListNamespacesResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let page_size = match usize::try_from(message.page_size) {
            Ok(0) => PAGE_SIZE_DEFAULT,
            Ok(size) => size.min(PAGE_SIZE_MAX),
            Err(_) => {
                return Err(Reason::RequestInvalid.status("page_size is negative", &[]));
            }
        };
        // The token is the last name of the page before; names are what the list is ordered by.
        let after = message.page_token;
        if !after.is_empty() && !is_namespace_name(&after) {
            return Err(Reason::PageTokenInvalid.status("the page token is not of this list", &[]));
        }
        self.gateway.refresh_catalog(call.deadline).await?;
        let current = self.gateway.shards().catalog().current();
        let mut rest = current.iter().filter(|held| after.is_empty() || held.name > after);
        let mut namespaces = Vec::new();
        for namespace in rest.by_ref().take(page_size) {
            namespaces.push(self.encode(namespace).await?);
        }
        let more = rest.next().is_some();
        let last = namespaces.last().filter(|_| more).map(|held| held.name.clone());
        let next_page_token = last.unwrap_or_default();
        Ok(Response::new(pb::ListNamespacesResponse { namespaces, next_page_token }))
    }

    async fn delete_namespace(
        &self,
        request: Request<pb::DeleteNamespaceRequest>,
    ) -> Result<Response<pb::DeleteNamespaceResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        if message.name == DEFAULT_NAME {
            return Err(Reason::NamespaceReserved.status(
                "namespace `default` belongs to every cluster and cannot be deleted",
                &[],
            ));
        }
        check_name(&message.name)?;
        let name = message.name.clone();
        let id_of = |held: &tombolo_cluster::Namespaces| held.named(&name).map(|found| found.id);
        let before = id_of(&self.gateway.shards().catalog().current());
        let change = CatalogChange::Delete { name: message.name, etag: message.etag };
        self.change(change, call).await?;
        // The name may be in use again already, under another number.
        self.wait_visible(call.deadline, |held| {
            id_of(held).is_none_or(|present| Some(present) != before)
        })
        .await?;
        Ok(Response::new(pb::DeleteNamespaceResponse {}))
    }

    async fn update_namespace(
        &self,
        _: Request<pb::UpdateNamespaceRequest>,
    ) -> Result<Response<pb::UpdateNamespaceResponse>, Status> {
        Err(not_implemented("UpdateNamespace"))
    }
}

fn check_name(name: &str) -> Result<(), Status> {
    if !is_namespace_name(name) {
        return Err(Reason::NamespaceInvalid.status(
            format!(
                "`{name}` cannot name a namespace: 1 to 64 of a-z, 0-9, - and _, a letter first"
            ),
            &[],
        ));
    }
    if RESERVED_NAMES.contains(&name) {
        return Err(
            Reason::NamespaceReserved.status(format!("`{name}` is reserved for the system"), &[])
        );
    }
    Ok(())
}

fn catalog_is_untyped() -> Status {
    Reason::Internal
        .status("a typed operation on the catalog was refused, and none was asked for", &[])
}

pub(crate) fn put(key: Bytes, data: Bytes) -> Operation {
    Operation { key, content: Content::value(data), context: None }
}

fn live_entry(
    record: Option<&Record>,
    name: &str,
) -> Result<(Namespace, tombolo_core::Dot), Status> {
    let absent =
        || Reason::NamespaceNotFound.status(format!("there is no namespace `{name}`"), &[]);
    let sibling = record.and_then(|held| held.siblings().first()).ok_or_else(absent)?;
    match &sibling.content {
        Content::Value { data, .. } => {
            let namespace = Namespace::from_bytes(data.clone())
                .map_err(|error| of_token_error(Reason::StorageFailed, &error))?;
            Ok((namespace, sibling.dot))
        }
        Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => Err(absent()),
    }
}

fn decode_next_id(content: &Content) -> Result<NamespaceId, Status> {
    let number = match content {
        Content::Value { data, .. } => {
            std::str::from_utf8(data).ok().and_then(|text| text.parse().ok())
        }
        Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => None,
    };
    number
        .map(NamespaceId)
        .ok_or_else(|| Reason::StorageFailed.status("the catalog's counter is damaged", &[]))
}

pub(crate) fn encode_rule(rule: Rule) -> i32 {
    match rule {
        Rule::Lww => pb::Rule::Lww.into(),
        Rule::Siblings => pb::Rule::Siblings.into(),
        Rule::Counter => pb::Rule::Counter.into(),
        Rule::Set => pb::Rule::Set.into(),
        Rule::Map => pb::Rule::Map.into(),
        Rule::Flag => pb::Rule::Flag.into(),
        Rule::Max => pb::Rule::Max.into(),
        Rule::Min => pb::Rule::Min.into(),
    }
}

fn encode_hold(hold_ms: Option<u64>) -> Option<prost_types::Duration> {
    Duration::from_millis(hold_ms?).try_into().ok()
}

/// How long values wait to be settled, in milliseconds.
fn decode_hold(hold: Option<prost_types::Duration>, rule: Rule) -> Result<Option<u64>, Status> {
    let Some(hold) = hold else { return Ok(None) };
    let invalid = |text: String| Reason::NamespaceInvalid.status(text, &[]);
    if rule != Rule::Siblings {
        let text = format!("a hold needs the rule siblings; {} settles at once", rule.name());
        return Err(invalid(text));
    }
    let hold = Duration::try_from(hold).map_err(|_| invalid("the hold is negative".to_owned()))?;
    if !(HOLD_MIN..=HOLD_MAX).contains(&hold) {
        return Err(invalid(format!("the hold must be from {HOLD_MIN:?} to ten years")));
    }
    Ok(u64::try_from(hold.as_millis()).ok())
}

fn decode_rule(rule: i32) -> Result<Rule, Status> {
    match pb::Rule::try_from(rule) {
        Ok(pb::Rule::Unspecified | pb::Rule::Lww) => Ok(Rule::Lww),
        Ok(pb::Rule::Siblings) => Ok(Rule::Siblings),
        Ok(pb::Rule::Counter) => Ok(Rule::Counter),
        Ok(pb::Rule::Set) => Ok(Rule::Set),
        Ok(pb::Rule::Map) => Ok(Rule::Map),
        Ok(pb::Rule::Flag) => Ok(Rule::Flag),
        Ok(pb::Rule::Max) => Ok(Rule::Max),
        Ok(pb::Rule::Min) => Ok(Rule::Min),
        Err(_) => {
            Err(Reason::RequestInvalid.status(format!("there is no rule number {rule}"), &[]))
        }
    }
}

fn decode_namespace(namespace: Option<pb::Namespace>) -> Result<Namespace, Status> {
    let namespace =
        namespace.ok_or_else(|| Reason::Internal.status("the leader's answer is empty", &[]))?;
    let created_ms = namespace
        .create_time
        .map_or(0, |time| time.seconds * 1000 + i64::from(time.nanos) / 1_000_000);
    let created = u64::try_from(created_ms)
        .ok()
        .and_then(|ms| tombolo_core::HybridTime::new(ms, 0))
        .unwrap_or(tombolo_core::HybridTime::ZERO);
    let rule = decode_rule(namespace.rule)?;
    Ok(Namespace {
        id: NamespaceId(namespace.id),
        name: namespace.name,
        rule,
        created,
        hold_ms: decode_hold(namespace.hold, rule)?,
    })
}
