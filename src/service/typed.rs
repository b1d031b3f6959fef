//! Typed values at the edge: operations in, pages of elements out.
//!
//! What operations do and what a reader sees is decided in [`tombolo_core::typed`]. Here a key's elements
//! are read page by page, so that a large set or map is never in memory as a whole.
//!
//! Not here: scans over keys (`scan`), which assemble what they pass with the same functions.

use std::collections::BTreeSet;

use bytes::Bytes;
use tombolo_core::{
    Content, Dot, HybridTime, Record, Rule, VersionVector,
    command::Written,
    element::{self, Element, Kind, Part},
    token::{TokenKey, encode_page},
    typed::{Action, Assembly, Mutation, Refusal, Refused, Value, permits},
};
use tombolo_proto::v1 as pb;
use tombolo_storage::{Pinned, ScanRange, StorageError};
use tonic::Status;

use crate::{
    convert::{Scope, encode_dot, open_page, timestamp},
    reason::Reason,
    scan::after,
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

    /// What a typed value looks like on the wire: a version for each of its values, all of its latest write.
    pub(crate) fn typed_versions(
        &self,
        latest: Option<(HybridTime, Dot)>,
        values: Vec<Value>,
        keys_only: bool,
    ) -> Vec<pb::Version> {
        let Some((time, dot)) = latest else { return Vec::new() };
        let version = |value| pb::Version {
            dot: Some(encode_dot(dot)),
            value: (!keys_only).then(|| encode_value(value)),
            origin_region: self.topology.region_name(dot.actor.region),
            write_time: Some(timestamp(time)),
            hybrid_time: time.to_bits(),
            expire_time: None,
        };
        values.into_iter().map(version).collect()
    }

    /// A key of a typed namespace, as a reader of many sees it.
    pub(crate) fn typed_result(
        &self,
        rule: Rule,
        key: Bytes,
        assembly: Assembly,
        seen: &VersionVector,
        keys_only: bool,
    ) -> pb::KeyResult {
        let latest = assembly.latest();
        let versions = self.typed_versions(latest, values_of(rule, assembly), keys_only);
        let context = self.seal_context(&key, seen);
        pb::KeyResult { key, versions, context, ..Default::default() }
    }
}

/// What elements are together. A map is there even if it has no fields.
pub(crate) fn values_of(rule: Rule, assembly: Assembly) -> Vec<Value> {
    if assembly.is_empty() {
        return Vec::new();
    }
    let mut values = assembly.finish();
    if values.is_empty() && rule == Rule::Map {
        values.push(Value::Map(Vec::new()));
    }
    values
}

/// Refuses a counter that has no number of 64 bits: who asked for it alone should not take another number
/// for it.
pub(crate) fn check_sums(key: &[u8], values: &[Value]) -> Result<(), Status> {
    let beyond = values.iter().find_map(|value| match value {
        Value::Counter(sum) => i64::try_from(*sum).is_err().then_some(sum),
        Value::Set(_) | Value::Flag(_) | Value::Data(_) | Value::Map(_) => None,
    });
    match beyond {
        None => Ok(()),
        Some(sum) => Err(Reason::CounterOverflow.status(
            format!("regions added to the counter at the same time, and its sum is {sum}"),
            &[("sum", sum.to_string()), ("key", key.escape_ascii().to_string())],
        )),
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

fn encode_value(value: Value) -> pb::Value {
    use pb::value::Kind as Shown;
    let mut saturated = false;
    let kind = match value {
        Value::Counter(sum) => {
            let shown = within_range(sum);
            saturated = i128::from(shown) != sum;
            Shown::Counter(shown)
        }
        Value::Set(elements) => Shown::Set(pb::SetValue { elements }),
        Value::Flag(on) => Shown::Flag(on),
        Value::Data(data) => Shown::Data(data),
        Value::Map(fields) => {
            let field = |(name, value): (Bytes, Value)| {
                let name = String::from_utf8_lossy(&name).into_owned();
                pb::MapField { name, value: Some(encode_value(value)) }
            };
            Shown::Map(pb::MapValue { fields: fields.into_iter().map(field).collect() })
        }
    };
    pb::Value { kind: Some(kind), saturated }
}

/// The number of 64 bits that is closest to a sum.
fn within_range(sum: i128) -> i64 {
    let end = if sum < 0 { i64::MIN } else { i64::MAX };
    i64::try_from(sum).unwrap_or(end)
}

/// Which elements of a key a read asks for.
pub(crate) struct Asked {
    key: Bytes,
    path: Vec<Bytes>,
    limit: usize,
    token: Bytes,
    only: Vec<Bytes>,
    request: u32,
}

impl Asked {
    /// Everything, as far as one reply goes.
    pub(crate) fn all(key: Bytes) -> Self {
        let (path, only, token) = (Vec::new(), Vec::new(), Bytes::new());
        Self { key, path, limit: ELEMENTS_DEFAULT, token, only, request: 0 }
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
        let (key, token) = (message.key.clone(), message.element_token.clone());
        Ok(Self { key, path, limit, token, only, request: hash_of(message) })
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
#[derive(Default)]
pub(crate) struct Page {
    pub(crate) assembly: Assembly,
    /// Where it goes on; empty if it does not.
    pub(crate) next: Bytes,
}

/// Elements that are shown together, up to a limit and [`ELEMENTS_BYTES_MAX`].
#[derive(Default)]
pub(crate) struct Shown {
    pub(crate) assembly: Assembly,
    limit: usize,
    elements: usize,
    bytes: usize,
    /// Where the counter is of which the last one was a share.
    counter: Option<Vec<Bytes>>,
}

impl Shown {
    /// None yet, of what lies `depth` names deep in a value.
    pub(crate) fn new(depth: usize, limit: usize) -> Self {
        Self { assembly: Assembly::at_depth(depth), limit, ..Self::default() }
    }

    /// Adds an element, in order, unless there are enough. The shares of one counter are shown as one sum, or
    /// not at all.
    pub(crate) fn add(&mut self, element: Element, record: &Record) -> bool {
        let is_share = element.part.kind() == Kind::Counter;
        let goes_on = is_share && self.counter.as_ref() == Some(&element.path);
        let is_full = self.limit <= self.elements || ELEMENTS_BYTES_MAX <= self.bytes;
        if is_full && !goes_on {
            return false;
        }
        self.assembly.add(&element, record);
        self.elements += 1;
        self.bytes += bytes_of(&element, record);
        self.counter = is_share.then_some(element.path);
        true
    }
}

/// About how many bytes an element takes in a reply.
fn bytes_of(element: &Element, record: &Record) -> usize {
    let member = match &element.part {
        Part::Member(member) => member.len(),
        Part::Share(_) | Part::Whole(_) => 0,
    };
    let path = element.path.iter().map(|name| name.len() + 16);
    let content = |content: &Content| match content {
        Content::Value { data, .. } => data.len() + 16,
        Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => 32,
    };
    let held = record.siblings().iter().map(|held| content(&held.content));
    member + path.sum::<usize>() + held.sum::<usize>()
}

/// Reads what is asked for of a key, as of the moment of the pin. Reads the disk: not for a thread that must
/// not wait.
///
/// # Errors
/// If the token is of another request, or the data cannot be read.
pub(crate) fn read(seal: &TokenKey, pinned: &Pinned<'_>, asked: &Asked) -> Result<Page, ReadError> {
    if asked.only.is_empty() { read_page(seal, pinned, asked) } else { read_members(pinned, asked) }
}

/// Reads elements of a set by their names.
fn read_members(pinned: &Pinned<'_>, asked: &Asked) -> Result<Page, ReadError> {
    let mut assembly = Assembly::at_depth(asked.path.len());
    let members: BTreeSet<&Bytes> = asked.only.iter().collect();
    for member in members {
        let part = Part::Member(member.clone());
        let element = Element { key: asked.key.clone(), path: asked.path.clone(), part };
        let start = element.to_key();
        let range = ScanRange { end: Some(after(&start)), start, reverse: false };
        for (_, record) in pinned.scan(&range, 1, ELEMENTS_BYTES_MAX)?.records {
            assembly.add(&element, &record);
        }
    }
    Ok(Page { assembly, next: Bytes::new() })
}

/// Reads elements from where the request begins, as many as are shown.
fn read_page(seal: &TokenKey, pinned: &Pinned<'_>, asked: &Asked) -> Result<Page, ReadError> {
    let under = element::prefix(&asked.key, &asked.path);
    let mut start = Bytes::copy_from_slice(&under);
    if !asked.token.is_empty() {
        start = start.max(open_page(seal, asked.request, &asked.token)?);
    }
    let end = element::end_of(&under).map(Bytes::from);
    let mut range = ScanRange { start, end, reverse: false };
    let mut shown = Shown::new(asked.path.len(), asked.limit);
    loop {
        let page = pinned.scan(&range, asked.limit + 1, ELEMENTS_BYTES_MAX)?;
        for (record_key, record) in &page.records {
            let Some(element) = Element::from_key(record_key) else { continue };
            if !shown.add(element, record) {
                let next = encode_page(seal, asked.request, record_key);
                return Ok(Page { assembly: shown.assembly, next });
            }
        }
        match page.next {
            Some(next) => range.start = next,
            None => return Ok(Page { assembly: shown.assembly, next: Bytes::new() }),
        }
    }
}

/// Why a typed value could not be read.
pub(crate) enum ReadError {
    Storage(StorageError),
    Status(Status),
}

impl From<StorageError> for ReadError {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

impl From<Status> for ReadError {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
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
        value: sum.map(|sum| encode_value(Value::Counter(sum.into()))),
        context: last.map(|it| scope.seal_context(key, &it.context)).unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use tombolo_core::{
        Actor, RegionId,
        record::{Count, Delta, PushedOut, Sibling},
    };

    use super::*;

    fn record(content: Content) -> Record {
        let dot = Dot { actor: Actor { region: RegionId(1), incarnation: 1 }, seq: 1 };
        let sibling = Sibling { dot, time: HybridTime::ZERO, request: None, content };
        let (key, supersedes, pushed_out) = (Bytes::new(), Vec::new(), PushedOut::default());
        let delta = Delta { key, sibling, supersedes, pushed_out };
        let mut record = Record::default();
        record.apply(&delta, &VersionVector::new(), Rule::Map);
        record
    }

    fn element(name: &'static str, part: Part) -> Element {
        Element { key: "k".into(), path: vec![name.into()], part }
    }

    fn share(name: &'static str, region: u16) -> Element {
        element(name, Part::Share(Actor { region: RegionId(region), incarnation: 1 }))
    }

    #[test]
    fn elements_are_shown_up_to_a_limit_but_a_counter_as_a_whole() {
        let counted =
            record(Content::Count { count: Count { since: 1, total: 5 }, taken_back: Vec::new() });
        let mut shown = Shown::new(0, 2);
        for element in [share("a", 1), share("a", 2), share("a", 3)] {
            assert!(shown.add(element, &counted));
        }
        assert!(!shown.add(share("b", 1), &counted), "another counter");
        let sums = vec![("a".into(), Value::Counter(15))];
        assert_eq!(values_of(Rule::Map, shown.assembly), [Value::Map(sums)]);
    }

    #[test]
    fn elements_are_shown_up_to_so_many_bytes() {
        let large = record(Content::value(vec![0; ELEMENTS_BYTES_MAX]));
        let mut shown = Shown::new(0, 100);
        assert!(
            shown.add(element("a", Part::Whole(Kind::Register)), &large),
            "one there always is"
        );
        assert!(!shown.add(element("b", Part::Whole(Kind::Register)), &large));
    }

    #[test]
    fn a_sum_beyond_64_bits_is_shown_as_the_end_of_the_range_and_refused_by_itself() {
        let beyond = i128::from(i64::MAX) + 1;
        for (sum, shown, saturated) in [
            (7, 7, false),
            (i128::from(i64::MIN), i64::MIN, false),
            (beyond, i64::MAX, true),
            (-beyond - 1, i64::MIN, true),
        ] {
            let fields = Value::Map(vec![("f".into(), Value::Counter(sum))]);
            assert!(check_sums(b"k", &[fields]).is_ok());
            assert_eq!(check_sums(b"k", &[Value::Counter(sum)]).is_err(), saturated);
            let kind = Some(pb::value::Kind::Counter(shown));
            assert_eq!(encode_value(Value::Counter(sum)), pb::Value { kind, saturated });
        }
    }
}
