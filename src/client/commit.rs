//! Atomic writes to keys of one shard, with conditions.
//!
//! A failed check is an expected outcome, not an error: it comes back in [`Committed`], and no
//! retry layer touches it.

use crate::error::{Error, Result};
use crate::keyspace::{CallOptions, Kv, call_options, data, write_options};
use crate::mutate::Operations;
use crate::types::{Dot, HybridTime, IntoBytes, Revision, Version, proto_duration, versions};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::time::Duration;
use tombolo_proto::v1;
use tombolo_proto::v1::check::Condition;
use tombolo_proto::v1::write::{Action, Expiration};

/// A commit that runs when awaited. All keys must lie in one shard: give them a common hash tag,
/// as in `{cart-7}:items` and `{cart-7}:total`.
///
/// ```no_run
/// # async fn example(carts: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
/// let items = carts.get("{cart-7}:items").await?;
/// let done = carts
///     .commit()
///     .check_absent("{cart-7}:lock")
///     .put("{cart-7}:items", "3 lemons").context(&items.context)
///     .delete("{cart-7}:draft")
///     .await?;
/// if !done.committed {
///     println!("the cart is locked by {:?}", done.failed[0].versions[0].value);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "does nothing unless awaited"]
pub struct Commit {
    call: CallOptions,
    request: v1::CommitRequest,
    /// A context was given before the first write.
    has_stray_context: bool,
}

call_options!(Commit);
write_options!(Commit);

impl Commit {
    pub(crate) fn new(call: CallOptions, namespace: String) -> Self {
        let request_id = Some(call.client.next_request_id());
        let request = v1::CommitRequest { namespace, request_id, ..Default::default() };
        Self { call, request, has_stray_context: false }
    }

    /// The key must have no value.
    pub fn check_absent(self, key: impl IntoBytes) -> Self {
        self.check(key, Condition::Absent(v1::Absent {}))
    }

    /// The key must have a value.
    pub fn check_present(self, key: impl IntoBytes) -> Self {
        self.check(key, Condition::Present(v1::Present {}))
    }

    /// The key must have exactly the value that this write created.
    pub fn check_dot(self, key: impl IntoBytes, dot: Dot) -> Self {
        self.check(key, Condition::DotEquals(dot.into()))
    }

    /// The key must have exactly this value.
    pub fn check_value(self, key: impl IntoBytes, value: impl IntoBytes) -> Self {
        self.check(key, Condition::DataEquals(value.into_bytes()))
    }

    /// Nothing must have been written to the key, nor deleted, beyond what the reply with this context
    /// showed. An empty one demands that the key was never written.
    pub fn check_context(self, key: impl IntoBytes, context: impl IntoBytes) -> Self {
        self.check(key, Condition::ContextCurrent(context.into_bytes()))
    }

    /// Stores a value.
    pub fn put(self, key: impl IntoBytes, value: impl IntoBytes) -> Self {
        self.write(key, Action::Put(data(value.into_bytes())), None)
    }

    /// Stores a value that expires this long after a node took the commit.
    pub fn put_for(self, key: impl IntoBytes, value: impl IntoBytes, ttl: Duration) -> Self {
        let expiration = Some(Expiration::Ttl(proto_duration(ttl)));
        self.write(key, Action::Put(data(value.into_bytes())), expiration)
    }

    /// Deletes a key.
    pub fn delete(self, key: impl IntoBytes) -> Self {
        self.write(key, Action::Delete(v1::Remove {}), None)
    }

    /// Applies typed operations to a key.
    pub fn mutate(self, key: impl IntoBytes, operations: Operations) -> Self {
        let operations = operations.into_proto();
        self.write(key, Action::Mutate(v1::Mutation { operations }), None)
    }

    /// The write before this replaces, removes or deletes exactly what the reply with this context
    /// showed, and leaves concurrent versions to the namespace's rule. Without one it replaces whatever the
    /// region holds. Unlike [`check_context`](Self::check_context) it refuses nothing.
    pub fn context(mut self, context: impl IntoBytes) -> Self {
        match self.request.writes.last_mut() {
            Some(write) => write.context = context.into_bytes(),
            None => self.has_stray_context = true,
        }
        self
    }

    fn check(mut self, key: impl IntoBytes, condition: Condition) -> Self {
        self.request.checks.push(v1::Check { key: key.into_bytes(), condition: Some(condition) });
        self
    }

    fn write(
        mut self,
        key: impl IntoBytes,
        action: Action,
        expiration: Option<Expiration>,
    ) -> Self {
        let context = Bytes::new();
        self.request.writes.push(v1::Write {
            key: key.into_bytes(),
            context,
            action: Some(action),
            expiration,
        });
        self
    }
}

impl IntoFuture for Commit {
    type Output = Result<Committed>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { call, request, has_stray_context } = self;
        Box::pin(async move {
            if has_stray_context {
                return Err(Error::invalid("a context without a write before it"));
            }
            let mut keys = request.writes.iter().map(|write| &write.key);
            let first = keys.next().or_else(|| request.checks.first().map(|check| &check.key));
            let key = first.ok_or_else(|| Error::invalid("an empty commit"))?.clone();
            let plan = call.write_plan(&key, request.ack_regions);
            let checked: Vec<Bytes> = request.checks.iter().map(|it| it.key.clone()).collect();
            let send = |mut kv: Kv, request| async move { kv.commit(request).await };
            Committed::from_reply(call.write(plan, request, send).await?, &checked)
        })
    }
}

/// What a commit answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// False if a check failed; nothing was written then.
    pub committed: bool,
    /// The checks that did not hold, with what the keys have instead.
    pub failed: Vec<FailedCheck>,
    /// In the order of the writes; empty when not committed.
    pub results: Vec<WriteResult>,
    pub token: Bytes,
    pub revision: Option<Revision>,
}

/// A check that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedCheck {
    /// Position among the commit's checks.
    pub check: usize,
    pub key: Bytes,
    /// What the key has; empty if it is absent.
    pub versions: Vec<Version>,
    pub context: Bytes,
}

/// One write of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteResult {
    pub dot: Dot,
    pub context: Bytes,
    pub conflict: bool,
    pub time: HybridTime,
    /// Of operations on counters, the last one's sum.
    pub sum: Option<i64>,
}

impl Committed {
    fn from_reply(reply: v1::CommitResponse, checked: &[Bytes]) -> Result<Self> {
        let failed = reply.failed_checks.into_iter().map(|failed| {
            let check = usize::try_from(failed.check).unwrap_or(usize::MAX);
            let key = checked.get(check);
            Ok(FailedCheck {
                check,
                key: key.ok_or_else(|| Error::protocol("failed check out of range"))?.clone(),
                versions: versions(failed.versions)?,
                context: failed.context,
            })
        });
        let results = reply.results.into_iter().map(|result| {
            let dot = result.dot.ok_or_else(|| Error::protocol("write without a dot"))?;
            Ok(WriteResult {
                dot: dot.into(),
                context: result.context,
                conflict: result.conflict,
                time: HybridTime(result.hybrid_time),
                sum: result.sum,
            })
        });
        Ok(Self {
            committed: reply.committed,
            failed: failed.collect::<Result<_>>()?,
            results: results.collect::<Result<_>>()?,
            token: reply.session_token,
            revision: reply.revision.map(Revision::from),
        })
    }
}
