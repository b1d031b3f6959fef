//! The calls on one namespace's keys, as builders that run when awaited.

use crate::await_replication::AwaitReplication;
use crate::client::{Client, Plan};
use crate::commit::Commit;
use crate::error::{Error, Result};
use crate::mutate::{Mutate, Operations};
use crate::retry::Safety;
use crate::router::Target;
use crate::scan::Scan;
use crate::session::Session;
use crate::types::{
    Consistency, Got, IntoBytes, Revision, Written, proto_duration, system_time, versions,
};
use crate::watch::Watch;
use bytes::Bytes;
use futures::future::BoxFuture;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tombolo_proto::v1;
use tombolo_proto::v1::kv_service_client::KvServiceClient;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

pub(crate) type Kv = KvServiceClient<Channel>;

/// Most keys that a server takes in one batch.
const BATCH_KEYS_MAX: usize = 128;

/// The keys of one namespace. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Keyspace {
    pub(crate) client: Client,
    name: Arc<str>,
    session: Option<Session>,
}

impl Keyspace {
    pub(crate) fn new(client: Client, name: String) -> Self {
        Self { client, name: name.into(), session: None }
    }

    /// Runs all calls of the result in this session.
    ///
    /// ```no_run
    /// # async fn example(client: tombolo_client::Client) -> tombolo_client::Result<()> {
    /// let session = client.session();
    /// let carts = client.namespace("carts").with_session(&session);
    /// carts.put("ada", "3 lemons").await?;
    /// carts.get("ada").await?; // sees the put, whichever node answers
    /// # Ok(()) }
    /// ```
    pub fn with_session(&self, session: &Session) -> Self {
        Self { session: Some(session.clone()), ..self.clone() }
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stores a value. Without [`Put::context`] it replaces whatever the region holds.
    ///
    /// ```no_run
    /// # async fn example(keys: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
    /// let written = keys.put("greeting", "hello").await?;
    /// println!("written as {}", written.dot);
    /// # Ok(()) }
    /// ```
    pub fn put(&self, key: impl IntoBytes, value: impl IntoBytes) -> Put {
        let request = v1::PutRequest {
            namespace: self.name.to_string(),
            key: key.into_bytes(),
            value: Some(data(value.into_bytes())),
            request_id: Some(self.client.next_request_id()),
            ..Default::default()
        };
        Put { call: self.start(), request }
    }

    /// Deletes a key. Deleting an absent key succeeds.
    ///
    /// ```no_run
    /// # async fn example(keys: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
    /// let got = keys.get("greeting").await?;
    /// // Only what was read: a value that comes in between stays.
    /// keys.delete("greeting").context(&got.context).await?;
    /// # Ok(()) }
    /// ```
    pub fn delete(&self, key: impl IntoBytes) -> Delete {
        let request = v1::DeleteRequest {
            namespace: self.name.to_string(),
            key: key.into_bytes(),
            request_id: Some(self.client.next_request_id()),
            ..Default::default()
        };
        Delete { call: self.start(), request }
    }

    /// Reads a key: linearizable, or, in a session that has seen something, causal.
    ///
    /// ```no_run
    /// # async fn example(keys: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
    /// match keys.get("greeting").await?.value() {
    ///     Some(value) => println!("{value:?}"),
    ///     None => println!("absent"),
    /// }
    /// # Ok(()) }
    /// ```
    pub fn get(&self, key: impl IntoBytes) -> Get {
        let request = v1::GetRequest {
            namespace: self.name.to_string(),
            key: key.into_bytes(),
            ..Default::default()
        };
        Get { call: self.start(), consistency: None, request }
    }

    /// Reads several keys; the answers are in the order of the keys. Not one snapshot. Any number
    /// of keys: they are asked for in parts, from each shard's leader.
    ///
    /// ```no_run
    /// # async fn example(keys: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
    /// for got in keys.batch_get(["ada", "bob"]).await? {
    ///     println!("{:?}: {:?}", got.key, got.value());
    /// }
    /// # Ok(()) }
    /// ```
    pub fn batch_get<I>(&self, keys: I) -> BatchGet
    where
        I: IntoIterator,
        I::Item: IntoBytes,
    {
        let request = v1::BatchGetRequest {
            namespace: self.name.to_string(),
            keys: keys.into_iter().map(IntoBytes::into_bytes).collect(),
            ..Default::default()
        };
        BatchGet { call: self.start(), consistency: None, request }
    }

    /// Lists keys in byte order, over all shards.
    ///
    /// ```no_run
    /// # async fn example(keys: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
    /// for entry in keys.scan().prefix("cart:").limit(100).collect().await? {
    ///     println!("{:?}: {:?}", entry.key, entry.value());
    /// }
    /// # Ok(()) }
    /// ```
    pub fn scan(&self) -> Scan {
        Scan::new(self.start(), self.name.to_string())
    }

    /// Applies typed operations to a key, all or none.
    ///
    /// ```no_run
    /// # async fn example(profiles: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
    /// use tombolo_client::Operations;
    ///
    /// let visit = Operations::new().field(["visits"]).add(1).field(["city"]).assign("Oslo");
    /// let done = profiles.mutate("ada", visit).await?;
    /// println!("visit number {:?}", done.sum);
    /// # Ok(()) }
    /// ```
    pub fn mutate(&self, key: impl IntoBytes, operations: Operations) -> Mutate {
        Mutate::new(self.start(), self.name.to_string(), key.into_bytes(), operations)
    }

    /// Adds to a counter; the answer has the sum.
    ///
    /// ```no_run
    /// # async fn example(likes: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
    /// let sum = likes.add("post-7", 1).await?.sum;
    /// assert_eq!(Some(likes.get("post-7").await?.counter()), sum);
    /// # Ok(()) }
    /// ```
    pub fn add(&self, key: impl IntoBytes, by: i64) -> Mutate {
        self.mutate(key, Operations::new().add(by))
    }

    /// Follows changes, from now on unless the builder says otherwise: see [`Watch`].
    pub fn watch(&self) -> Watch {
        Watch::new(self.start(), self.name.to_string())
    }

    /// Several writes to keys of one shard, all or none, if all checks hold: see [`Commit`].
    pub fn commit(&self) -> Commit {
        Commit::new(self.start(), self.name.to_string())
    }

    /// Waits until this many other regions have all that the session has seen of this namespace, its
    /// own writes included, and answers which. If they do not in time, the error is
    /// [`crate::Error::Deadline`], and its metadata names those that are missing. With 0 it only asks.
    /// Outside a session nothing was seen, and everybody has it.
    ///
    /// ```no_run
    /// # async fn example(client: tombolo_client::Client) -> tombolo_client::Result<()> {
    /// let orders = client.namespace("orders").with_session(&client.session());
    /// for number in 1..=100 {
    ///     orders.put(format!("{number}"), "paid").await?;
    /// }
    /// let replicated = orders.await_replication(1).await?;
    /// println!("all of it is safe in {:?}", replicated.regions);
    /// # Ok(()) }
    /// ```
    pub fn await_replication(&self, regions: u32) -> AwaitReplication {
        AwaitReplication::new(self.start(), self.name.to_string(), regions)
    }

    fn start(&self) -> CallOptions {
        CallOptions { client: self.client.clone(), session: self.session.clone(), deadline: None }
    }
}

/// What all builders share.
#[derive(Clone, Debug)]
pub(crate) struct CallOptions {
    pub(crate) client: Client,
    pub(crate) session: Option<Session>,
    pub(crate) deadline: Option<Duration>,
}

impl CallOptions {
    /// The token that a write carries; empty outside a session.
    pub(crate) fn token(&self) -> Bytes {
        self.session.as_ref().map(Session::token).unwrap_or_default()
    }

    /// As [`token`](Self::token), for a read.
    pub(crate) fn token_to_read(&self) -> Result<Bytes> {
        self.session.as_ref().map_or_else(|| Ok(Bytes::new()), Session::token_to_read)
    }

    pub(crate) fn observe(&self, sent: &Bytes, reply: &Bytes) {
        if let Some(session) = &self.session {
            session.observe(sent, reply);
        }
    }

    /// What the call asks for, else the session; else causal once the session has seen something:
    /// linearizable within this region would not cover what the session saw in another.
    pub(crate) fn consistency(&self, asked: Option<Consistency>, token: &Bytes) -> Consistency {
        match asked.or_else(|| self.session.as_ref().and_then(Session::consistency)) {
            Some(asked) => asked,
            None if token.is_empty() => Consistency::Linearizable,
            None => Consistency::Causal,
        }
    }

    pub(crate) fn kv(&self) -> impl Fn(Channel) -> Kv + Send + 'static {
        let reply_max = self.client.inner.config.max_reply_bytes;
        move |channel| KvServiceClient::new(channel).max_decoding_message_size(reply_max)
    }

    pub(crate) fn write_plan(&self, key: &Bytes, ack_regions: u32) -> Plan {
        Plan {
            target: Target::LeaderOf(key.clone()),
            safety: Safety::Identified,
            deadline: self.client.deadline(self.deadline),
            waits: ack_regions > 0,
        }
    }

    /// Sends a write. The session takes in what it answers, and a write that stands although the answer
    /// is an error.
    pub(crate) async fn write<Q, R, F, Fut>(&self, plan: Plan, mut body: Q, send: F) -> Result<R>
    where
        Q: Clone + Message + CarriesToken,
        R: CarriesToken,
        F: Fn(Kv, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        let token = self.token();
        *body.session_token() = token.clone();
        let kv = self.kv();
        let send = |channel, request| send(kv(channel), request);
        let mut answer = self.client.call(plan, body, send).await;
        match (&mut answer, &self.session) {
            (Ok(reply), _) => self.observe(&token, reply.session_token()),
            (Err(Error::Deadline { token, .. }), Some(session)) => session.add(token),
            (Err(_), _) => {}
        }
        answer
    }

    fn read_plan(&self, target: Target, consistency: Consistency, token: &Bytes) -> Plan {
        Plan {
            target,
            safety: Safety::Read,
            deadline: self.client.deadline(self.deadline),
            // The server waits until it has what the session has seen.
            waits: !token.is_empty() && consistency != Consistency::Local,
        }
    }
}

/// A message that says what a session has seen.
pub(crate) trait CarriesToken {
    fn session_token(&mut self) -> &mut Bytes;
}

macro_rules! carries_token {
    ($($message:ident),*) => {$(
        impl CarriesToken for v1::$message {
            fn session_token(&mut self) -> &mut Bytes {
                &mut self.session_token
            }
        }
    )*};
}
carries_token!(PutRequest, DeleteRequest, MutateRequest, CommitRequest);
carries_token!(PutResponse, DeleteResponse, MutateResponse, CommitResponse);

/// Only the leader knows what was acknowledged; for all else any replica will do.
pub(crate) fn read_target(consistency: Consistency, key: &Bytes) -> Target {
    match consistency {
        Consistency::Linearizable => Target::LeaderOf(key.clone()),
        Consistency::Causal | Consistency::MaxStaleness(_) | Consistency::Local => Target::AnyNode,
    }
}

pub(crate) fn data(value: Bytes) -> v1::Value {
    v1::Value { kind: Some(v1::value::Kind::Data(value)), ..Default::default() }
}

/// Options of every call, on each builder.
macro_rules! call_options {
    ($($builder:ty),*) => {$(
        impl $builder {
            /// Carries the session's token and takes in the reply's.
            pub fn session(mut self, session: &$crate::Session) -> Self {
                self.call.session = Some(session.clone());
                self
            }

            /// Bounds the whole call with its retries; for a scan, the wait for each page.
            pub fn deadline(mut self, deadline: std::time::Duration) -> Self {
                self.call.deadline = Some(deadline);
                self
            }
        }
    )*};
}
pub(crate) use call_options;
call_options!(Put, Delete, Get, BatchGet);

/// Options of every write, on each builder.
macro_rules! write_options {
    ($($builder:ty),*) => {$(
        impl $builder {
            /// Waits until this many other regions have applied the write. If they do not in
            /// time, the error is [`crate::Error::Deadline`] with the dot, and the write stands.
            pub fn ack_regions(mut self, regions: u32) -> Self {
                self.request.ack_regions = regions;
                self
            }

            /// Repeats an earlier write of unknown outcome: the server applies an id once.
            pub fn request_id(mut self, id: tombolo_proto::v1::RequestId) -> Self {
                self.request.request_id = Some(id);
                self
            }
        }
    )*};
}
pub(crate) use write_options;
write_options!(Put, Delete);

/// A put that runs when awaited.
///
/// ```no_run
/// # async fn example(keys: tombolo_client::Keyspace) -> tombolo_client::Result<()> {
/// use std::time::Duration;
///
/// let got = keys.get("lock").await?;
/// keys.put("lock", "me")
///     .context(&got.context) // replaces what was read and nothing else
///     .ttl(Duration::from_secs(30))
///     .ack_regions(1) // answered when one more region has it
///     .deadline(Duration::from_secs(2))
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "does nothing unless awaited"]
pub struct Put {
    call: CallOptions,
    request: v1::PutRequest,
}

impl Put {
    /// Replaces exactly what the reply with this context showed, and leaves concurrent versions to
    /// the namespace's rule.
    pub fn context(mut self, context: impl IntoBytes) -> Self {
        self.request.context = context.into_bytes();
        self
    }

    /// The value expires this long after the leader took the write.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.request.expiration = Some(v1::put_request::Expiration::Ttl(proto_duration(ttl)));
        self
    }
}

impl IntoFuture for Put {
    type Output = Result<Written>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { call, request } = self;
        Box::pin(async move {
            let plan = call.write_plan(&request.key, request.ack_regions);
            let send = |mut kv: Kv, request| async move { kv.put(request).await };
            Written::try_from(call.write(plan, request, send).await?)
        })
    }
}

/// A delete that runs when awaited.
#[derive(Clone, Debug)]
#[must_use = "does nothing unless awaited"]
pub struct Delete {
    call: CallOptions,
    request: v1::DeleteRequest,
}

impl Delete {
    /// Deletes exactly what the reply with this context showed; concurrent versions stay.
    pub fn context(mut self, context: impl IntoBytes) -> Self {
        self.request.context = context.into_bytes();
        self
    }
}

impl IntoFuture for Delete {
    type Output = Result<Written>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { call, request } = self;
        Box::pin(async move {
            let plan = call.write_plan(&request.key, request.ack_regions);
            let send = |mut kv: Kv, request| async move { kv.delete(request).await };
            Written::try_from(call.write(plan, request, send).await?)
        })
    }
}

/// A get that runs when awaited.
#[derive(Clone, Debug)]
#[must_use = "does nothing unless awaited"]
pub struct Get {
    call: CallOptions,
    consistency: Option<Consistency>,
    request: v1::GetRequest,
}

impl Get {
    /// How fresh the read must be. Default: see [`Keyspace::get`].
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = Some(consistency);
        self
    }

    /// Leaves the values empty.
    pub fn keys_only(mut self) -> Self {
        self.request.keys_only = true;
        self
    }

    /// Only this field of a map, or all under it.
    pub fn field<I>(mut self, path: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.request.field_path = path.into_iter().map(Into::into).collect();
        self
    }

    /// At most about so many elements of a set or map. Default 1000.
    pub fn elements_max(mut self, elements: u32) -> Self {
        self.request.element_limit = elements;
        self
    }

    /// Goes on where the answer with these [`Got::next_elements`] ended.
    pub fn elements_from(mut self, next: impl IntoBytes) -> Self {
        self.request.element_token = next.into_bytes();
        self
    }

    /// Of a set, only those of its elements that are among these: at most 128.
    pub fn only_elements<I>(mut self, elements: I) -> Self
    where
        I: IntoIterator,
        I::Item: IntoBytes,
    {
        let elements = elements.into_iter().map(IntoBytes::into_bytes);
        self.request.only_elements = elements.collect();
        self
    }
}

impl IntoFuture for Get {
    type Output = Result<Got>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { call, consistency, mut request } = self;
        Box::pin(async move {
            let token = call.token_to_read()?;
            let consistency = call.consistency(consistency, &token);
            request.consistency = Some(consistency.into());
            request.session_token = token.clone();
            let key = request.key.clone();
            let plan = call.read_plan(read_target(consistency, &key), consistency, &token);
            let kv = call.kv();
            let reply = call
                .client
                .call(plan, request, |channel, request| {
                    let mut kv = kv(channel);
                    async move { kv.get(request).await }
                })
                .await?;
            call.observe(&token, &reply.session_token);
            Ok(Got {
                key,
                versions: versions(reply.versions)?,
                context: reply.context,
                token: reply.session_token,
                revision: reply.revision.map(Revision::from),
                partial: !reply.next_element_token.is_empty(),
                next_elements: reply.next_element_token,
                settle_time: reply.settle_time.and_then(system_time),
            })
        })
    }
}

/// A batch of gets that runs when awaited.
#[derive(Clone, Debug)]
#[must_use = "does nothing unless awaited"]
pub struct BatchGet {
    call: CallOptions,
    consistency: Option<Consistency>,
    request: v1::BatchGetRequest,
}

impl BatchGet {
    /// How fresh the reads must be. Default: see [`Keyspace::get`].
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = Some(consistency);
        self
    }

    /// Leaves the values empty.
    pub fn keys_only(mut self) -> Self {
        self.request.keys_only = true;
        self
    }

    /// Positions of the keys, grouped by the node that leads them, in parts a server takes.
    fn parts(&self, consistency: Consistency) -> Vec<Vec<usize>> {
        let router = &self.call.client.inner.router;
        let mut groups: BTreeMap<Option<Arc<str>>, Vec<usize>> = BTreeMap::new();
        for (position, key) in self.request.keys.iter().enumerate() {
            let node = match consistency {
                Consistency::Linearizable => router.leader_of(key),
                Consistency::Causal | Consistency::MaxStaleness(_) | Consistency::Local => None,
            };
            groups.entry(node).or_default().push(position);
        }
        let parts = groups.values().flat_map(|group| group.chunks(BATCH_KEYS_MAX));
        parts.map(<[usize]>::to_vec).collect()
    }
}

impl IntoFuture for BatchGet {
    type Output = Result<Vec<Got>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let token = self.call.token_to_read()?;
            let consistency = self.call.consistency(self.consistency, &token);
            let parts = self.parts(consistency);
            let Self { call, request, .. } = &self;
            let asked = parts.iter().map(|part| async {
                let keys: Vec<Bytes> =
                    part.iter().map(|&position| request.keys[position].clone()).collect();
                // A part may hold several shards: its node forwards what it does not lead.
                let target = match (consistency, part.first()) {
                    (Consistency::Linearizable, Some(&first)) => {
                        Target::NodeOf(request.keys[first].clone())
                    }
                    _ => Target::AnyNode,
                };
                let plan = call.read_plan(target, consistency, &token);
                let request = v1::BatchGetRequest {
                    keys: keys.clone(),
                    consistency: Some(consistency.into()),
                    session_token: token.clone(),
                    ..request.clone()
                };
                let kv = call.kv();
                let reply = call
                    .client
                    .call(plan, request, |channel, request| {
                        let mut kv = kv(channel);
                        async move { kv.batch_get(request).await }
                    })
                    .await?;
                call.observe(&token, &reply.session_token);
                let answered: Vec<&Bytes> = reply.results.iter().map(|it| &it.key).collect();
                if answered != keys.iter().collect::<Vec<_>>() {
                    return Err(Error::protocol("a batch answered other keys than asked"));
                }
                Ok(reply)
            });
            let replies = futures::future::try_join_all(asked).await?;

            let mut gots: BTreeMap<usize, Got> = BTreeMap::new();
            for (part, reply) in parts.iter().zip(replies) {
                for (&position, result) in part.iter().zip(reply.results) {
                    let got = Got {
                        key: result.key,
                        versions: versions(result.versions)?,
                        context: result.context,
                        token: reply.session_token.clone(),
                        revision: None,
                        partial: result.partial,
                        next_elements: Bytes::new(),
                        settle_time: result.settle_time.and_then(system_time),
                    };
                    gots.insert(position, got);
                }
            }
            Ok(gots.into_values().collect())
        })
    }
}
