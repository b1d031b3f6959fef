//! Between protobuf messages and the types of `core`: `TryFrom` in, `From` out.

use std::cmp::Reverse;

use bytes::Bytes;
use prost_types::Timestamp;
use tombolo_cluster::Topology;
use tombolo_core::{
    Actor, Content, Dot, HybridTime, NamespaceId, Record, RegionId, RequestId, Rule, VersionVector,
    command::{Check, Condition, Operation},
    key::check_key,
    namespace::Namespace,
    token::{TokenKey, decode_context, decode_page, encode_context},
};
use tombolo_proto::v1 as pb;
use tombolo_shard::Revision;
use tonic::Status;

use crate::{
    reason::Reason,
    status::{of_key_error, of_token_error},
    typed::not_of_rule,
};

/// What converting needs to know of the request's surroundings.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub(crate) topology: &'a Topology,
    pub(crate) cluster: &'a TokenKey,
    pub(crate) namespace: NamespaceId,
    pub(crate) now: HybridTime,
    pub(crate) value_bytes_max: usize,
}

impl Scope<'_> {
    pub(crate) fn key(&self, key: Bytes) -> Result<Bytes, Status> {
        check_key(&key).map_err(of_key_error)?;
        Ok(key)
    }

    pub(crate) fn put(
        &self,
        rule: Rule,
        key: Bytes,
        value: Option<pb::Value>,
        expire: Option<HybridTime>,
        context: &Bytes,
    ) -> Result<Operation, Status> {
        use pb::value::Kind;
        if rule.is_typed() {
            return Err(not_of_rule(rule, &[], "put"));
        }
        let data = match value.and_then(|value| value.kind) {
            Some(Kind::Data(data)) => data,
            Some(Kind::Counter(_) | Kind::Set(_) | Kind::Map(_) | Kind::Flag(_)) => {
                let text = "a typed value is not put; typed operations change it (Mutate)";
                let metadata = [("operation", "put".to_owned()), ("rule", rule.name().to_owned())];
                return Err(Reason::TypeMismatch.status(text, &metadata));
            }
            None => {
                return Err(Reason::RequestInvalid
                    .status("the value is missing; to remove a key, delete it", &[]));
            }
        };
        let data = self.data(data)?;
        self.operation(key, Content::Value { data, expire }, context)
    }

    /// Checks the length of a value.
    pub(crate) fn data(&self, data: Bytes) -> Result<Bytes, Status> {
        if data.len() <= self.value_bytes_max {
            return Ok(data);
        }
        Err(Reason::ValueTooLarge.status(
            format!(
                "the value has {} bytes; at most {} are allowed",
                data.len(),
                self.value_bytes_max
            ),
            &[("max_bytes", self.value_bytes_max.to_string())],
        ))
    }

    /// Reads the context of a key; `None` if there is none.
    pub(crate) fn context(
        &self,
        key: &[u8],
        context: &Bytes,
    ) -> Result<Option<VersionVector>, Status> {
        if context.is_empty() {
            return Ok(None);
        }
        let decoded = decode_context(self.cluster, self.namespace, key, context);
        decoded.map(Some).map_err(|error| of_token_error(Reason::ContextInvalid, &error))
    }

    pub(crate) fn operation(
        &self,
        key: Bytes,
        content: Content,
        context: &Bytes,
    ) -> Result<Operation, Status> {
        let key = self.key(key)?;
        let context = self.context(&key, context)?;
        Ok(Operation { key, content, context })
    }

    pub(crate) fn check(&self, rule: Rule, check: pb::Check) -> Result<Check, Status> {
        use pb::check::Condition as Asked;
        if rule.is_typed()
            && !matches!(check.condition, Some(Asked::Absent(_) | Asked::Present(_)) | None)
        {
            return Err(not_of_rule(rule, &[], "a check of more than presence"));
        }
        let condition = match check.condition {
            Some(pb::check::Condition::Absent(pb::Absent {})) => Condition::Absent,
            Some(pb::check::Condition::Present(pb::Present {})) => Condition::Present,
            Some(pb::check::Condition::DotEquals(dot)) => Condition::DotEquals(decode_dot(dot)?),
            Some(pb::check::Condition::DataEquals(data)) => Condition::DataEquals(data),
            Some(pb::check::Condition::ContextCurrent(context)) => {
                Condition::ContextCurrent(self.context(&check.key, &context)?.unwrap_or_default())
            }
            None => return Err(Reason::RequestInvalid.status("a check has no condition", &[])),
        };
        Ok(Check { key: self.key(check.key)?, condition })
    }

    /// Gives out what was seen of a key.
    pub(crate) fn seal_context(&self, key: &[u8], seen: &VersionVector) -> Bytes {
        encode_context(self.cluster, self.namespace, key, seen)
    }

    /// The live versions of a record and its context, as a reader sees them. Of a key without a record that
    /// is a context, too: who gives it back has seen nothing, and replaces nothing.
    pub(crate) fn versions(
        &self,
        key: &[u8],
        record: Option<&Record>,
        keys_only: bool,
    ) -> (Vec<pb::Version>, Bytes) {
        let version = |(sibling, data): (&tombolo_core::record::Sibling, &Bytes)| {
            let expire = match &sibling.content {
                Content::Value { expire, .. } => *expire,
                Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => None,
            };
            let kind = Some(pb::value::Kind::Data(data.clone()));
            pb::Version {
                dot: Some(encode_dot(sibling.dot)),
                value: (!keys_only).then_some(pb::Value { kind, ..Default::default() }),
                origin_region: self.topology.region_name(sibling.dot.actor.region),
                write_time: Some(timestamp(sibling.time)),
                hybrid_time: sibling.time.to_bits(),
                expire_time: expire.map(timestamp),
            }
        };
        let live = record.into_iter().flat_map(|record| record.live_at(self.now));
        let versions = live.map(version).collect();
        let nothing = VersionVector::new();
        (versions, self.seal_context(key, record.map_or(&nothing, Record::context)))
    }

    /// A key whose values are bytes, as a reader sees it. Values that wait to be settled are in the
    /// order in which they would be taken.
    pub(crate) fn key_result(
        &self,
        namespace: &Namespace,
        key: Bytes,
        record: Option<&Record>,
        keys_only: bool,
    ) -> pb::KeyResult {
        let (mut versions, context) = self.versions(&key, record, keys_only);
        let waiting = record.filter(|_| versions.len() > 1);
        let settles = waiting.and_then(|record| namespace.settles_at(record.latest_time()));
        if settles.is_some() {
            versions.sort_by_key(|version| {
                let dot = version.dot.unwrap_or_default();
                Reverse((version.hybrid_time, dot.region, dot.incarnation, dot.seq))
            });
        }
        let settle_time = settles.map(timestamp);
        pb::KeyResult { key, versions, context, partial: false, settle_time }
    }
}

/// Where a page token goes on, if it belongs to the request with this hash.
pub(crate) fn open_page(key: &TokenKey, request: u32, token: &Bytes) -> Result<Bytes, Status> {
    match decode_page(key, token) {
        Ok((of, next)) if of == request => Ok(next),
        Ok(_) => {
            let text = "the page token belongs to a request with other parameters";
            Err(Reason::PageTokenMismatch.status(text, &[]))
        }
        Err(error) => Err(of_token_error(Reason::PageTokenInvalid, &error)),
    }
}

pub(crate) fn encode_dot(dot: Dot) -> pb::Dot {
    pb::Dot {
        region: u32::from(dot.actor.region.0),
        incarnation: dot.actor.incarnation,
        seq: dot.seq,
    }
}

pub(crate) fn decode_dot(dot: pb::Dot) -> Result<Dot, Status> {
    let region = u16::try_from(dot.region)
        .map_err(|_| Reason::RequestInvalid.status("a dot's region exceeds 65535", &[]))?;
    if dot.seq == 0 {
        let text = "a dot's seq is 0, and sequence numbers begin at 1; was the field left out?";
        return Err(Reason::RequestInvalid.status(text, &[]));
    }
    let actor = Actor { region: RegionId(region), incarnation: dot.incarnation };
    Ok(Dot { actor, seq: dot.seq })
}

pub(crate) fn encode_revision(revision: Revision) -> pb::Revision {
    pb::Revision { shard: u32::from(revision.shard.0), term: revision.term, index: revision.index }
}

pub(crate) fn decode_request_id(id: Option<pb::RequestId>) -> Result<Option<RequestId>, Status> {
    match id {
        None => Ok(None),
        Some(pb::RequestId { client: 0, .. }) => Err(Reason::RequestIdInvalid
            .status("the request id's client is 0; choose a random number once", &[])),
        Some(pb::RequestId { client, number }) => Ok(Some(RequestId { client, number })),
    }
}

/// The deadline of a value: absolute, or from now on.
pub(crate) fn decode_expiration(
    expiration: Option<pb::put_request::Expiration>,
    now: HybridTime,
) -> Result<Option<HybridTime>, Status> {
    let invalid = |what: &str| Reason::TtlInvalid.status(what, &[]);
    let ms = match expiration {
        None => return Ok(None),
        Some(pb::put_request::Expiration::Ttl(ttl)) => {
            let ttl = std::time::Duration::try_from(ttl)
                .map_err(|_| invalid("the time to live is negative"))?;
            let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
            if ttl_ms == 0 {
                return Err(invalid("the time to live is less than a millisecond"));
            }
            now.physical_ms().saturating_add(ttl_ms)
        }
        Some(pb::put_request::Expiration::ExpireTime(at)) => {
            let seconds =
                u64::try_from(at.seconds).map_err(|_| invalid("the expiry lies before 1970"))?;
            let ms = u64::try_from(at.nanos).unwrap_or(0) / 1_000_000;
            seconds.saturating_mul(1000).saturating_add(ms)
        }
    };
    match HybridTime::new(ms, 0) {
        Some(expire) if now < expire => Ok(Some(expire)),
        Some(_) => Err(invalid("the expiry lies in the past")),
        None => Err(invalid("the expiry lies after the year 10889")),
    }
}

pub(crate) fn timestamp(time: HybridTime) -> Timestamp {
    let ms = time.physical_ms();
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    let nanos = i32::try_from(ms % 1000 * 1_000_000).unwrap_or(0);
    Timestamp { seconds, nanos }
}
