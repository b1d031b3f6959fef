//! Conflicts of one namespace: looking at what was dropped, and settling.
//!
//! What a settlement may overwrite is said by a *context*, which the reply that showed the key carries.
//! Show the key to whoever decides, and send the context along with the decision: the server refuses if
//! the key was written in between, with reason `CONFLICT_MOVED`.

use crate::client::{Client, Plan};
use crate::error::{Error, Result};
use crate::keyspace::data;
use crate::retry::Safety;
use crate::router::Target;
use crate::session::Session;
use crate::types::{Dot, HybridTime, IntoBytes, Revision, Written};
use bytes::Bytes;
use std::sync::Arc;
use std::time::SystemTime;
use tombolo_proto::v1;
use tombolo_proto::v1::conflict_service_client::ConflictServiceClient;
use tombolo_proto::v1::resolve_conflict_request::Choice;
use tonic::transport::Channel;

/// Most entries that a server puts in one page.
const PAGE_SIZE_MAX: usize = 1000;

/// The conflicts of one namespace, through any node. Cheap to clone.
///
/// Lists show what the contacted region has. The ids of dropped values are the same in every region.
///
/// ```no_run
/// # async fn example(client: tombolo_client::Client) -> tombolo_client::Result<()> {
/// use tombolo_client::{ConflictFilter, Error};
///
/// let conflicts = client.conflicts("default");
/// for row in conflicts.list(&ConflictFilter::default(), 100).await?.rows {
///     let shown = conflicts.get(&row.id).await?;
///     println!("{:?} holds {:?} and lost {:?}", row.key, shown.current, shown.conflict);
///     match conflicts.restore(&row.id, &shown.context).await {
///         Ok(written) => println!("it is back as {}", written.dot),
///         Err(Error::Precondition { .. }) => println!("the key was written meanwhile: look again"),
///         Err(error) => return Err(error),
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Conflicts {
    client: Client,
    namespace: Arc<str>,
    session: Option<Session>,
}

/// Which dropped values to list. The default is all.
#[derive(Clone, Debug, Default)]
pub struct ConflictFilter {
    /// Only of keys that begin with this.
    pub key_prefix: Bytes,
    /// Only values that this region wrote.
    pub origin_region: Option<String>,
    /// Only what was noted at this time or later.
    pub since: Option<SystemTime>,
}

/// A list, as far as it was asked for.
#[derive(Clone, Debug)]
pub struct ConflictList<T> {
    /// In the list's order.
    pub rows: Vec<T>,
    /// There are more.
    pub more: bool,
    /// Shards of which the latest rows may be missing, because their leader did not answer in time.
    pub unreachable: Vec<String>,
}

/// How to settle a key that holds several values.
#[derive(Clone, Debug)]
pub enum Resolution {
    /// With the value that this write left, one of those that were shown.
    Choose(Dot),
    /// With another value.
    Value(Bytes),
    /// With none.
    Delete,
}

macro_rules! ask {
    ($conflicts:expr, $safety:expr, $method:ident, $request:expr) => {{
        let service = $conflicts.service();
        $conflicts
            .client
            .call($conflicts.plan($safety), $request, |channel, request| {
                let mut service = service(channel);
                async move { service.$method(request).await }
            })
            .await
    }};
}

impl Conflicts {
    pub(crate) fn new(client: Client, namespace: String) -> Self {
        Self { client, namespace: namespace.into(), session: None }
    }

    /// The session knows what the result settles, so that its reads show it in every region.
    pub fn with_session(&self, session: &Session) -> Self {
        Self { session: Some(session.clone()), ..self.clone() }
    }

    /// Lists dropped values without their bytes, the newest first; at most `limit` of them.
    ///
    /// # Errors
    /// As any read.
    pub async fn list(
        &self,
        filter: &ConflictFilter,
        limit: usize,
    ) -> Result<ConflictList<v1::Conflict>> {
        let mut list = ConflictList { rows: Vec::new(), more: false, unreachable: Vec::new() };
        let mut page_token = String::new();
        loop {
            let request = v1::ListConflictsRequest {
                namespace: self.namespace.to_string(),
                key_prefix: filter.key_prefix.clone(),
                page_size: page_size(limit - list.rows.len()),
                page_token,
                origin_region: filter.origin_region.clone().unwrap_or_default(),
                since_time: filter.since.map(Into::into),
            };
            let reply = ask!(self, Safety::Read, list_conflicts, request)?;
            list.rows.extend(reply.conflicts);
            list.unreachable = reply.unreachable;
            page_token = reply.next_page_token;
            list.more = !page_token.is_empty();
            if !list.more || limit <= list.rows.len() {
                return Ok(list);
            }
        }
    }

    /// One dropped value with its bytes, and what its key holds now.
    ///
    /// # Errors
    /// [`Error::NotFound`] if this region's ledger has no such entry, or as any read.
    pub async fn get(&self, id: impl Into<String>) -> Result<v1::GetConflictResponse> {
        let namespace = self.namespace.to_string();
        let request = v1::GetConflictRequest { namespace, id: id.into() };
        ask!(self, Safety::Read, get_conflict, request)
    }

    /// Writes a dropped value back, causally later than what [`get`](Self::get) showed with `context`.
    /// Restoring a deletion deletes.
    ///
    /// # Errors
    /// [`Error::Precondition`] with reason `CONFLICT_MOVED` if the key was written since, or
    /// `CONFLICT_EXPIRED`; [`Error::NotFound`] as for [`get`](Self::get); otherwise as any write.
    pub async fn restore(&self, id: impl Into<String>, context: impl IntoBytes) -> Result<Written> {
        let request = v1::RestoreConflictRequest {
            namespace: self.namespace.to_string(),
            id: id.into(),
            request_id: Some(self.client.next_request_id()),
            context: context.into_bytes(),
        };
        let reply = ask!(self, Safety::Identified, restore_conflict, request)?;
        let token = self.observe(reply.session_token);
        written(reply.dot, reply.context, token, reply.hybrid_time, reply.revision)
    }

    /// Lists keys that hold several values, without their bytes, those that wait longest first; at most
    /// `limit` of them, of keys that begin with `key_prefix`.
    ///
    /// ```no_run
    /// # async fn example(client: tombolo_client::Client) -> tombolo_client::Result<()> {
    /// for open in client.conflicts("carts").list_open("", 100).await?.rows {
    ///     println!("{:?} holds {} values", open.key, open.versions.len());
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As any read.
    pub async fn list_open(
        &self,
        key_prefix: impl IntoBytes,
        limit: usize,
    ) -> Result<ConflictList<v1::OpenConflict>> {
        let key_prefix = key_prefix.into_bytes();
        let mut list = ConflictList { rows: Vec::new(), more: false, unreachable: Vec::new() };
        let mut page_token = String::new();
        loop {
            let request = v1::ListOpenConflictsRequest {
                namespace: self.namespace.to_string(),
                key_prefix: key_prefix.clone(),
                page_size: page_size(limit - list.rows.len()),
                page_token,
            };
            let reply = ask!(self, Safety::Read, list_open_conflicts, request)?;
            list.rows.extend(reply.conflicts);
            list.unreachable = reply.unreachable;
            page_token = reply.next_page_token;
            list.more = !page_token.is_empty();
            if !list.more || limit <= list.rows.len() {
                return Ok(list);
            }
        }
    }

    /// Settles a key that holds several values, replacing exactly what the reply with this `context`
    /// showed.
    ///
    /// ```no_run
    /// # async fn example(client: tombolo_client::Client) -> tombolo_client::Result<()> {
    /// use tombolo_client::Resolution;
    ///
    /// let got = client.namespace("carts").get("ada").await?;
    /// if got.in_conflict() {
    ///     let first = Resolution::Choose(got.versions[0].dot);
    ///     client.conflicts("carts").resolve("ada", &got.context, first).await?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::Precondition`] with reason `CONFLICT_MOVED` if the key was written since; otherwise as
    /// any write.
    pub async fn resolve(
        &self,
        key: impl IntoBytes,
        context: impl IntoBytes,
        resolution: Resolution,
    ) -> Result<Written> {
        let choice = match resolution {
            Resolution::Choose(dot) => Choice::Dot(dot.into()),
            Resolution::Value(value) => Choice::Value(data(value)),
            Resolution::Delete => Choice::Delete(v1::Remove {}),
        };
        let request = v1::ResolveConflictRequest {
            namespace: self.namespace.to_string(),
            key: key.into_bytes(),
            context: context.into_bytes(),
            choice: Some(choice),
            request_id: Some(self.client.next_request_id()),
        };
        let reply = ask!(self, Safety::Identified, resolve_conflict, request)?;
        let token = self.observe(reply.session_token);
        written(reply.dot, reply.context, token, reply.hybrid_time, reply.revision)
    }

    /// Counts this namespace's dropped values by the regions that won and lost.
    ///
    /// ```no_run
    /// # async fn example(client: tombolo_client::Client) -> tombolo_client::Result<()> {
    /// for row in client.conflicts("carts").stats().await?.stats {
    ///     println!("{} won over {}: {} values", row.winner_region, row.loser_region, row.count);
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As any read.
    pub async fn stats(&self) -> Result<v1::GetConflictStatsResponse> {
        let request = v1::GetConflictStatsRequest { namespace: self.namespace.to_string() };
        ask!(self, Safety::Read, get_conflict_stats, request)
    }

    /// As [`stats`](Self::stats), of all namespaces, deleted ones included.
    ///
    /// # Errors
    /// As any read.
    pub async fn stats_of_all(&self) -> Result<v1::GetConflictStatsResponse> {
        let request = v1::GetConflictStatsRequest { namespace: String::new() };
        ask!(self, Safety::Read, get_conflict_stats, request)
    }

    /// Takes a settlement's token into the session. Answers what the session has seen with it, since the
    /// request carried nothing of that.
    fn observe(&self, token: Bytes) -> Bytes {
        let Some(session) = &self.session else { return token };
        session.add(&token);
        session.token()
    }

    fn plan(&self, safety: Safety) -> Plan {
        let deadline = self.client.deadline(None);
        // A node asks the leaders of all shards before it answers.
        Plan { target: Target::AnyNode, safety, deadline, waits: safety == Safety::Read }
    }

    fn service(&self) -> impl Fn(Channel) -> ConflictServiceClient<Channel> + Send + 'static {
        let reply_max = self.client.inner.config.max_reply_bytes;
        move |channel| ConflictServiceClient::new(channel).max_decoding_message_size(reply_max)
    }
}

fn page_size(limit: usize) -> i32 {
    i32::try_from(limit.clamp(1, PAGE_SIZE_MAX)).unwrap_or(0)
}

fn written(
    dot: Option<v1::Dot>,
    context: Bytes,
    token: Bytes,
    hybrid_time: u64,
    revision: Option<v1::Revision>,
) -> Result<Written> {
    Ok(Written {
        dot: dot.map(Dot::from).ok_or_else(|| Error::protocol("a settlement without a dot"))?,
        context,
        token,
        // Nothing was there that it had not seen.
        conflict: false,
        time: HybridTime(hybrid_time),
        revision: revision.map(Revision::from),
    })
}
