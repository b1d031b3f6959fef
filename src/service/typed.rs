//! Typed values at the edge: operations in, pages of elements out.
//!
//! What operations do and what a reader sees is decided in [`tombolo_core::typed`]. Here a key's elements
//! are read page by page, so that a large set or map is never in memory as a whole.
//!
//! Not here: scans over keys (`scan`), which assemble what they pass with the same functions.

use bytes::Bytes;
use tombolo_core::{
    Content, Record, Rule,
    command::Written,
    element::{self, Element, Kind, Part},
    namespace::Namespace,
    token::{TokenKey, decode_page, encode_page},
    typed::{Action, Assembly, Mutation, Refusal, Refused, Value, permits},
};
use tombolo_proto::v1 as pb;
use tombolo_shard::{Shard, ShardError};
use tombolo_storage::ScanRange;
use tonic::Status;

use crate::{
    convert::{Scope, encode_dot, timestamp},
    reason::Reason,
    status::of_token_error,
};

/// Most operations of one mutation, each element of a set counted.
pub(crate) const MUTATIONS_MAX: usize = 1024;
/// Elements that a read shows unless it asks for another number.
pub(crate) const ELEMENTS_DEFAULT: usize = 1000;
/// Most elements of one reply.
const ELEMENTS_MAX: usize = 10_000;
/// About the most bytes of one reply.
const ELEMENTS_BYTES_MAX: usize = 1 << 20;
/// Most elements of a set that one read asks for by name.
const ONLY_ELEMENTS_MAX: usize = 128;

impl Scope<'_> {
    /// The mutations that typed operations on a key are.
    pub(crate) fn mutations(
        &self,
        rule: Rule,
        key: &Bytes,
        operations: Vec<pb::Operation>,
        context: &Bytes,
    ) -> Result<Vec<Mutation>, Status> {
        let key = self.key(key.clone())?;
        let context = self.context(&key, context)?;
        let mut mutations = Vec::new();
        for operation in operations {
            let path = decode_path(operation.field_path)?;
            for action in self.actions(operation.action)? {
                if !permits(rule, &path, &action) {
                    return Err(not_of_rule(rule, &path, action.name()));
                }
                let (key, path, context) = (key.clone(), path.clone(), context.clone());
                mutations.push(Mutation { key, path, action, context });
            }
        }
        match mutations.len() {
            0 => Err(Reason::RequestInvalid.status("there is no operation", &[])),
            1..=MUTATIONS_MAX => Ok(mutations),
            count => Err(Reason::BatchTooLarge.status(
                format!(
                    "{count} operations, elements counted; at most {MUTATIONS_MAX} are allowed"
                ),
                &[("max", MUTATIONS_MAX.to_string())],
            )),
        }
    }

    fn actions(&self, action: Option<pb::operation::Action>) -> Result<Vec<Action>, Status> {
        use pb::operation::Action as Asked;
        let each = |set: pb::SetValue, action: fn(Bytes) -> Action| {
            let checked = |member: Bytes| {
                element::check_member(&member).map_err(invalid)?;
                Ok(action(member))
            };
            set.elements.into_iter().map(checked).collect::<Result<Vec<_>, Status>>()
        };
        Ok(match action {
            Some(Asked::CounterAdd(by)) => vec![Action::Add(by)],
            Some(Asked::SetAdd(set)) => each(set, Action::Insert)?,
            Some(Asked::SetRemove(set)) => each(set, Action::Remove)?,
            Some(Asked::Assign(data)) => vec![Action::Assign(self.data(data)?)],
            Some(Asked::Enable(true)) => vec![Action::Enable],
            Some(Asked::Enable(false)) => vec![Action::Disable],
            Some(Asked::Maximum(data)) => vec![Action::Maximum(self.data(data)?)],
            Some(Asked::Minimum(data)) => vec![Action::Minimum(self.data(data)?)],
            Some(Asked::Delete(pb::Remove {})) => vec![Action::Clear],
            None => return Err(Reason::RequestInvalid.status("an operation has no action", &[])),
        })
    }

    /// The deletion of a typed key.
    pub(crate) fn clear(&self, key: &Bytes, context: &Bytes) -> Result<Mutation, Status> {
        let key = self.key(key.clone())?;
        let context = self.context(&key, context)?;
        Ok(Mutation { key, path: Vec::new(), action: Action::Clear, context })
    }

    /// What an assembled value looks like on the wire: a version for each of its values.
    pub(crate) fn typed_versions(
        &self,
        rule: Rule,
        assembly: Assembly,
        keys_only: bool,
    ) -> Result<Vec<pb::Version>, Status> {
        let Some((time, dot)) = assembly.latest() else { return Ok(Vec::new()) };
        let mut values = assembly.finish();
        if values.is_empty() && rule == Rule::Map {
            values.push(Value::Map(Vec::new()));
        }
        let version = |value| {
            Ok(pb::Version {
                dot: Some(encode_dot(dot)),
                value: if keys_only { None } else { Some(encode_value(value)?) },
                origin_region: self.topology.region_name(dot.actor.region),
                write_time: Some(timestamp(time)),
                hybrid_time: time.to_bits(),
                expire_time: None,
            })
        };
        values.into_iter().map(version).collect()
    }
}

pub(crate) fn decode_path(path: Vec<String>) -> Result<Vec<Bytes>, Status> {
    let path: Vec<Bytes> = path.into_iter().map(Bytes::from).collect();
    element::check_path(&path).map_err(invalid)?;
    Ok(path)
}

fn invalid(error: element::ElementError) -> Status {
    Reason::RequestInvalid.status(error.to_string(), &[])
}

fn encode_value(value: Value) -> Result<pb::Value, Status> {
    use pb::value::Kind as Shown;
    let kind = match value {
        Value::Counter(sum) => Shown::Counter(i64::try_from(sum).map_err(|_| {
            Reason::CounterOverflow.status(
                format!("regions added to the counter at the same time, and its sum is {sum}"),
                &[("sum", sum.to_string())],
            )
        })?),
        Value::Set(elements) => Shown::Set(pb::SetValue { elements }),
        Value::Flag(on) => Shown::Flag(on),
        Value::Data(data) => Shown::Data(data),
        Value::Map(fields) => {
            let field = |(name, value): (Bytes, Value)| {
                let name = String::from_utf8_lossy(&name).into_owned();
                Ok::<_, Status>(pb::MapField { name, value: Some(encode_value(value)?) })
            };
            let fields = fields.into_iter().map(field).collect::<Result<_, _>>()?;
            Shown::Map(pb::MapValue { fields })
        }
    };
    Ok(pb::Value { kind: Some(kind) })
}

/// Which elements of a key a read asks for.
pub(crate) struct Asked {
    path: Vec<Bytes>,
    limit: usize,
    token: Bytes,
    only: Vec<Bytes>,
    request: u32,
}

impl Asked {
    /// Everything, as far as one reply goes.
    pub(crate) fn all() -> Self {
        let (path, only, token) = (Vec::new(), Vec::new(), Bytes::new());
        Self { path, limit: ELEMENTS_DEFAULT, token, only, request: 0 }
    }

    /// Refuses to look into values that have no elements.
    pub(crate) fn check_untyped(rule: Rule, message: &pb::GetRequest) -> Result<(), Status> {
        let asks = !message.field_path.is_empty()
            || !message.only_elements.is_empty()
            || !message.element_token.is_empty();
        if asks { Err(not_of_rule(rule, &[], "reading elements")) } else { Ok(()) }
    }

    /// What a Get asks for.
    pub(crate) fn of_get(rule: Rule, message: &pb::GetRequest) -> Result<Self, Status> {
        let path = decode_path(message.field_path.clone())?;
        let only = message.only_elements.clone();
        if !path.is_empty() && rule != Rule::Map {
            return Err(not_of_rule(rule, &path, "field_path"));
        }
        if !only.is_empty() && !matches!(rule, Rule::Set | Rule::Map) {
            return Err(not_of_rule(rule, &path, "only_elements"));
        }
        if only.len() > ONLY_ELEMENTS_MAX {
            return Err(Reason::BatchTooLarge.status(
                format!("{} elements; at most {ONLY_ELEMENTS_MAX} may be named", only.len()),
                &[("max", ONLY_ELEMENTS_MAX.to_string())],
            ));
        }
        let limit = match usize::try_from(message.element_limit) {
            Ok(0) => ELEMENTS_DEFAULT,
            Ok(limit) => limit.min(ELEMENTS_MAX),
            Err(_) => ELEMENTS_MAX,
        };
        let token = message.element_token.clone();
        Ok(Self { path, limit, token, only, request: hash_of(message) })
    }
}

/// Ties a token to what was asked for.
fn hash_of(message: &pb::GetRequest) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let path = message.field_path.iter().map(String::as_bytes);
    for part in [message.namespace.as_bytes(), &message.key[..]].into_iter().chain(path) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize()
}

/// A part of a typed value.
pub(crate) struct Page {
    pub(crate) assembly: Assembly,
    /// Where it goes on; empty if it does not.
    pub(crate) next: Bytes,
}

/// Reads what is asked for of a key. Reads the disk: not for a thread that must not wait.
///
/// # Errors
/// If the token is of another request, or the data cannot be read.
pub(crate) fn read(
    seal: &TokenKey,
    shard: &Shard,
    namespace: &Namespace,
    key: &Bytes,
    asked: &Asked,
) -> Result<Page, ReadError> {
    let mut assembly = Assembly::at_depth(asked.path.len());
    if !asked.only.is_empty() {
        let element = |member: &Bytes| Element {
            key: key.clone(),
            path: asked.path.clone(),
            part: Part::Member(member.clone()),
        };
        let mut members = asked.only.clone();
        members.sort_unstable();
        members.dedup();
        let elements: Vec<Element> = members.iter().map(element).collect();
        let keys: Vec<Bytes> = elements.iter().map(Element::to_key).collect();
        for (element, record) in elements.iter().zip(shard.records(namespace.id, &keys)?) {
            record.iter().for_each(|record| assembly.add(element, record));
        }
        return Ok(Page { assembly, next: Bytes::new() });
    }
    let under = element::prefix(key, &asked.path);
    let start = if asked.token.is_empty() {
        Bytes::copy_from_slice(&under)
    } else {
        let next = decode_page(seal, asked.request, &asked.token)
            .map_err(|error| of_token_error(Reason::PageTokenInvalid, &error))?;
        next.max(Bytes::copy_from_slice(&under))
    };
    let end = element::end_of(&under).map(Bytes::from);
    let mut range = ScanRange { start, end, reverse: false };
    let (mut shown, mut bytes) = (0, 0);
    let mut last: Option<Element> = None;
    loop {
        let page = shard.scan(namespace.id, &range, asked.limit + 1, ELEMENTS_BYTES_MAX)?;
        for (record_key, record) in &page.records {
            let Some(element) = Element::from_key(record_key) else { continue };
            let is_full = asked.limit <= shown || ELEMENTS_BYTES_MAX <= bytes;
            // The shares of one counter are shown as one sum, or not at all.
            let goes_on = last.as_ref().is_some_and(|last| {
                element.part.kind() == Kind::Counter
                    && last.part.kind() == Kind::Counter
                    && last.path == element.path
            });
            if is_full && !goes_on {
                let next = encode_page(seal, asked.request, record_key);
                return Ok(Page { assembly, next });
            }
            assembly.add(&element, record);
            bytes += record_key.len() + data_bytes(record);
            shown += 1;
            last = Some(element);
        }
        match page.next {
            Some(next) => range.start = next,
            None => return Ok(Page { assembly, next: Bytes::new() }),
        }
    }
}

/// Why a typed value could not be read.
pub(crate) enum ReadError {
    Shard(ShardError),
    Status(Status),
}

impl From<ShardError> for ReadError {
    fn from(error: ShardError) -> Self {
        Self::Shard(error)
    }
}

impl From<Status> for ReadError {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

pub(crate) fn data_bytes(record: &Record) -> usize {
    let bytes = |content: &Content| match content {
        Content::Value { data, .. } => data.len() + 16,
        Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => 32,
    };
    record.siblings().iter().map(|held| bytes(&held.content)).sum()
}

/// The answer to a mutation.
pub(crate) fn mutated(
    scope: &Scope<'_>,
    key: &[u8],
    operations: &[pb::Operation],
    results: &[Written],
) -> pb::MutateResponse {
    let mut shown = Vec::with_capacity(operations.len());
    let mut rest = results;
    for operation in operations {
        let count = mutations_of(operation).min(rest.len());
        let (of_this, after) = rest.split_at(count);
        rest = after;
        let last = of_this.last();
        shown.push(pb::OperationResult {
            dot: last.map(|it| encode_dot(it.dot)),
            sum: last.and_then(|it| it.sum),
            conflict: of_this.iter().any(|it| it.conflict),
        });
    }
    let last = results.last();
    let sum = results.iter().rev().find_map(|result| result.sum);
    pb::MutateResponse {
        value: sum.map(|sum| pb::Value { kind: Some(pb::value::Kind::Counter(sum)) }),
        context: last
            .map(|it| scope.seal_context(key, &it.context))
            .unwrap_or_default(),
        session_token: Bytes::new(),
        dot: last.map(|it| encode_dot(it.dot)),
        revision: None,
        results: shown,
        write_time: last.map(|it| timestamp(it.time)),
        hybrid_time: last.map_or(0, |it| it.time.to_bits()),
    }
}

/// How many mutations an operation is.
fn mutations_of(operation: &pb::Operation) -> usize {
    match &operation.action {
        Some(pb::operation::Action::SetAdd(set) | pb::operation::Action::SetRemove(set)) => {
            set.elements.len()
        }
        Some(_) => 1,
        None => 0,
    }
}

/// The status of an operation that the namespace's rule does not have.
pub(crate) fn not_of_rule(rule: Rule, path: &[Bytes], operation: &str) -> Status {
    let text = match (rule, path) {
        (Rule::Map, []) => format!("`{operation}` needs a field_path in a namespace of rule `map`"),
        (_, [_, ..]) if rule != Rule::Map => {
            format!("a namespace of rule `{}` has no fields; `{operation}` names one", rule.name())
        }
        _ => format!("`{operation}` does not fit a namespace of rule `{}`", rule.name()),
    };
    let metadata = [("rule", rule.name().to_owned()), ("operation", operation.to_owned())];
    Reason::TypeMismatch.status(text, &metadata)
}

/// The status of a mutation that the state machine refused.
pub(crate) fn of_refused(rule: Rule, mutations: &[Mutation], refused: Refused) -> Status {
    let Some(mutation) = mutations.get(refused.mutation) else {
        return Reason::Internal.status("a mutation was refused that was not asked for", &[]);
    };
    let operation = mutation.action.name();
    let at = |text: String| {
        let path: Vec<_> =
            mutation.path.iter().map(|name| name.escape_ascii().to_string()).collect();
        if path.is_empty() { text } else { format!("{text} at `{}`", path.join("/")) }
    };
    let mut metadata = vec![
        ("operation", operation.to_owned()),
        ("operation_index", refused.mutation.to_string()),
    ];
    match refused.refusal {
        Refusal::NotOfRule => not_of_rule(rule, &mutation.path, operation),
        Refusal::Overflow => Reason::CounterOverflow
            .status(at("the sum would leave the range of 64 bits".to_owned()), &metadata),
        Refusal::OtherKind(kind) => {
            let held = kind.map_or("map", Kind::name);
            metadata.push(("held", held.to_owned()));
            let text = at(format!("`{operation}` does not fit the {held}"));
            Reason::TypeMismatch.status(format!("{text}; delete that first"), &metadata)
        }
        Refusal::TooManyElements => Reason::TooManyElements.status(
            at(format!(
                "more than {} elements, or too many bytes of them, are changed at once",
                tombolo_core::typed::ELEMENTS_MAX
            )),
            &metadata,
        ),
    }
}
