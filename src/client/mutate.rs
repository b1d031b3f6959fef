//! Typed operations: counters, sets, maps, flags and extremes.
//!
//! A mutation of one key is applied whole or not at all, and exactly once, also when it is tried again.

use crate::error::{Error, Result};
use crate::keyspace::{CallOptions, Kv, call_options, write_options};
use crate::types::{Dot, HybridTime, IntoBytes, Revision};
use bytes::Bytes;
use futures::future::BoxFuture;
use tombolo_proto::v1;
use tombolo_proto::v1::operation::Action;

/// Operations on one key, in order. In a map, [`field`](Self::field) says where the next ones go.
///
/// ```
/// use tombolo_client::Operations;
///
/// let visit = Operations::new()
///     .field(["visits"]).add(1)
///     .field(["pages"]).insert("/index.html")
///     .field(["last", "agent"]).assign("curl");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Operations {
    path: Vec<String>,
    operations: Vec<v1::Operation>,
}

impl Operations {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The next operations are on this field of a map; an empty path is the value itself.
    pub fn field<I>(mut self, path: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.path = path.into_iter().map(Into::into).collect();
        self
    }

    /// Adds to a counter.
    #[expect(clippy::should_implement_trait, reason = "it takes a number and no other mutation")]
    pub fn add(self, by: i64) -> Self {
        self.push(Action::CounterAdd(by))
    }

    /// Puts an element into a set.
    pub fn insert(self, element: impl IntoBytes) -> Self {
        self.insert_all([element])
    }

    /// Puts elements into a set.
    pub fn insert_all<I>(self, elements: I) -> Self
    where
        I: IntoIterator,
        I::Item: IntoBytes,
    {
        self.push(Action::SetAdd(set(elements)))
    }

    /// Takes an element out of a set.
    pub fn remove(self, element: impl IntoBytes) -> Self {
        self.remove_all([element])
    }

    /// Takes elements out of a set.
    pub fn remove_all<I>(self, elements: I) -> Self
    where
        I: IntoIterator,
        I::Item: IntoBytes,
    {
        self.push(Action::SetRemove(set(elements)))
    }

    /// Assigns a register.
    pub fn assign(self, value: impl IntoBytes) -> Self {
        self.push(Action::Assign(value.into_bytes()))
    }

    /// Switches a flag on.
    pub fn enable(self) -> Self {
        self.push(Action::Enable(true))
    }

    /// Switches a flag off.
    pub fn disable(self) -> Self {
        self.push(Action::Enable(false))
    }

    /// Raises a maximum. Bytes are compared one by one: numbers need a fixed width.
    pub fn maximum(self, value: impl IntoBytes) -> Self {
        self.push(Action::Maximum(value.into_bytes()))
    }

    /// Lowers a minimum.
    pub fn minimum(self, value: impl IntoBytes) -> Self {
        self.push(Action::Minimum(value.into_bytes()))
    }

    /// Deletes the field and all under it, or the whole value.
    pub fn delete(self) -> Self {
        self.push(Action::Delete(v1::Remove {}))
    }

    pub(crate) fn into_proto(self) -> Vec<v1::Operation> {
        self.operations
    }

    fn push(mut self, action: Action) -> Self {
        let field_path = self.path.clone();
        self.operations.push(v1::Operation { field_path, action: Some(action) });
        self
    }
}

fn set<I>(elements: I) -> v1::SetValue
where
    I: IntoIterator,
    I::Item: IntoBytes,
{
    v1::SetValue { elements: elements.into_iter().map(IntoBytes::into_bytes).collect() }
}

/// A mutation that runs when awaited.
///
/// ```no_run
/// # async fn example(carts: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
/// use tombolo_client::Operations;
///
/// let cart = carts.get("ada").await?;
/// // Empties it of what was read: an element that comes in between stays.
/// carts.mutate("ada", Operations::new().delete()).context(&cart.context).await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "does nothing unless awaited"]
pub struct Mutate {
    call: CallOptions,
    request: v1::MutateRequest,
}

call_options!(Mutate);
write_options!(Mutate);

impl Mutate {
    pub(crate) fn new(
        call: CallOptions,
        namespace: String,
        key: Bytes,
        operations: Operations,
    ) -> Self {
        let request = v1::MutateRequest {
            namespace,
            key,
            operations: operations.into_proto(),
            request_id: Some(call.client.next_request_id()),
            ..Default::default()
        };
        Self { call, request }
    }

    /// Removes and replaces exactly what the reply with this context showed. Counters are added to
    /// whatever it says.
    pub fn context(mut self, context: impl IntoBytes) -> Self {
        self.request.context = context.into_bytes();
        self
    }
}

impl IntoFuture for Mutate {
    type Output = Result<Mutated>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { call, request } = self;
        Box::pin(async move {
            let plan = call.write_plan(&request.key, request.ack_regions);
            let send = |mut kv: Kv, request| async move { kv.mutate(request).await };
            Mutated::try_from(call.write(plan, request, send).await?)
        })
    }
}

/// What a mutation answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutated {
    /// The last write of the operations.
    pub dot: Dot,
    /// The sum of the last counter that was added to, after it.
    pub sum: Option<i64>,
    /// In the order of the operations.
    pub results: Vec<OperationResult>,
    /// What the region has applied of the namespace, this write included.
    pub context: Bytes,
    /// Covers this write and everything the request's session had seen.
    pub token: Bytes,
    pub time: HybridTime,
    pub revision: Option<Revision>,
}

/// What one operation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationResult {
    /// The write; of a maximum or minimum that did not change, the one that holds it.
    pub dot: Dot,
    /// Of a counter, the sum after the operation.
    pub sum: Option<i64>,
    /// Of a register: concurrent assignments remain, and the latest is shown.
    pub conflict: bool,
}

impl TryFrom<v1::MutateResponse> for Mutated {
    type Error = Error;

    fn try_from(reply: v1::MutateResponse) -> Result<Self> {
        let dot = |dot: Option<v1::Dot>| {
            dot.map(Dot::from).ok_or_else(|| Error::protocol("mutation without a dot"))
        };
        let result = |it: v1::OperationResult| {
            Ok(OperationResult { dot: dot(it.dot)?, sum: it.sum, conflict: it.conflict })
        };
        let results: Vec<_> = reply.results.into_iter().map(result).collect::<Result<_>>()?;
        Ok(Self {
            dot: dot(reply.dot)?,
            sum: results.iter().rev().find_map(|result| result.sum),
            results,
            context: reply.context,
            token: reply.session_token,
            time: HybridTime(reply.hybrid_time),
            revision: reply.revision.map(Revision::from),
        })
    }
}
