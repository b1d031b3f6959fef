//! The receiving side: one shard's leader pulls from one peer region.
//!
//! One task. It reads the stream, holds back what must wait for another region, ingests through
//! Raft one batch at a time while the next ones arrive, and acknowledges what is applied.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::future::{BoxFuture, OptionFuture};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tombolo_cluster::{Region, Topology};
use tombolo_core::{
    Actor, Change, Member, MemberState, Members, NamespaceId, RegionId, VersionVector,
    command::{Ingested, LinkSetting, Stopped},
    namespace::Namespace,
    pending::Pending,
};
use tombolo_proto::internal::v1::{self as pb, link_service_client::LinkServiceClient};
use tombolo_shard::{Consistency, Shard, ShardError, Shards};
use tonic::{Code, Status, Streaming, codec::CompressionEncoding};

use crate::{
    backoff::Backoff,
    channels::LinkChannels,
    config::{
        CONNECT_TIMEOUT, FRONTIER_INTERVAL, INGEST_TIMEOUT, ReplicationConfig, STALL_TIMEOUT,
        STREAM_MESSAGES_MAX,
    },
    pace::Pace,
    relay::Paths,
    repair::{
        Gate,
        receiver::{Found, Purpose, Repair, RepairError},
    },
    seed::Seeded,
    server::message_bytes_max,
    status::{LinkKey, LinkPhase, LinkStatuses},
    wire,
};

/// First pause after a repair that broke off.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Between two looks whether a paused link goes on.
const PAUSED_INTERVAL: Duration = Duration::from_millis(500);
/// Comparisons that look for a moment at which both regions have applied the same.
const CHECKS_MAX: u32 = 10;

/// Pulls one shard from one region while this node leads the shard.
#[derive(Clone)]
pub(crate) struct Puller {
    pub(crate) shard: Shard,
    pub(crate) peer: Region,
    /// All shards of the node. The catalog's keeps how operators want links to be.
    pub(crate) shards: Shards,
    /// Shared by all pullers of the shard.
    pub(crate) seeded: Seeded,
    pub(crate) channels: LinkChannels,
    pub(crate) statuses: Arc<LinkStatuses>,
    pub(crate) paths: Arc<Paths>,
    /// Shared by all pullers of the node from the same peer.
    pub(crate) pace: Arc<Pace>,
    /// Shared by all pullers of the shard.
    pub(crate) gate: Gate,
    /// Shared by all pullers of the node.
    pub(crate) repairs: Arc<Semaphore>,
    pub(crate) config: ReplicationConfig,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    /// Another node of the peer region may lead: try the next address.
    #[error("{0}")]
    TryNext(String),
    /// Try again after a pause.
    #[error("{0}")]
    Broken(String),
    /// Others have events of this region that it does not know.
    #[error("{0}")]
    Regressed(String),
    /// An operator has paused the link.
    #[error("paused by an operator; `ctl link resume` goes on")]
    Paused,
    /// This node's replica has ended.
    #[error("this node's replica of the shard has stopped")]
    Stopped,
}

impl Puller {
    /// Pulls until `shutdown` fires, which it does when this node stops leading the shard.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(self.config.retry_min, self.config.retry_max);
        let mut refused_in_a_row = 0;
        let mut place = 0;
        while !shutdown.is_cancelled() {
            let address = &self.peer.link_addresses[place % self.peer.link_addresses.len()];
            let (mut progress, began) = (Progress::None, Instant::now());
            let ended = shutdown.run_until_cancelled(self.pull(address, &mut progress)).await;
            self.paths.down(self.peer.id);
            let Some(Err(error)) = ended else { break };
            let streamed = progress != Progress::None;
            if streamed {
                refused_in_a_row = 0;
            }
            // A stream that opens and fails at once must not be tried again and again without rest.
            if progress == Progress::Applied || began.elapsed() > self.config.retry_max {
                backoff.reset();
            }
            let pause = match &error {
                PullError::Stopped => break,
                PullError::Regressed(reason) => {
                    if self.stop_writing(reason).await {
                        self.shard.hear_from(self.peer.id);
                    }
                    backoff.next_pause()
                }
                PullError::Paused => {
                    backoff.reset();
                    PAUSED_INTERVAL
                }
                PullError::TryNext(_) if refused_in_a_row + 1 < self.peer.link_addresses.len() => {
                    refused_in_a_row += 1;
                    Duration::ZERO
                }
                PullError::TryNext(_) | PullError::Broken(_) => {
                    refused_in_a_row = 0;
                    backoff.next_pause()
                }
            };
            place += 1;
            self.report(&error, streamed, pause);
            shutdown.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    fn report(&self, error: &PullError, streamed: bool, pause: Duration) {
        let reason = error.to_string();
        if streamed && !matches!(error, PullError::Paused) {
            tracing::warn!(
                shard = %self.shard.id(),
                peer = %self.peer.name,
                error = %reason,
                "link broken, will retry"
            );
        }
        for namespace in self.namespaces().into_keys() {
            self.statuses.update(self.key(namespace), |status| {
                status.phase = match error {
                    PullError::Paused => LinkPhase::Paused,
                    _ if pause.is_zero() => LinkPhase::Connecting,
                    _ => LinkPhase::Blocked,
                };
                status.repair = None;
                status.last_error = Some(reason.clone());
                status.next_retry = match error {
                    PullError::Paused => None,
                    _ => SystemTime::now().checked_add(pause),
                };
            });
        }
    }

    pub(crate) fn key(&self, namespace: NamespaceId) -> LinkKey {
        LinkKey { peer: self.peer.id, namespace, shard: self.shard.id() }
    }

    /// What an operator has set for the link.
    pub(crate) fn setting(&self) -> LinkSetting {
        self.shards.catalog_shard().store().link(self.peer.id)
    }

    /// What to pull: all namespaces, and the catalog itself where it lives.
    pub(crate) fn namespaces(&self) -> BTreeMap<NamespaceId, Arc<Namespace>> {
        let mut namespaces: BTreeMap<_, _> = self
            .shards
            .catalog()
            .current()
            .iter()
            .map(|namespace| (namespace.id, Arc::clone(namespace)))
            .collect();
        if self.shard.id() == self.shard.topology().catalog_shard() {
            namespaces.insert(NamespaceId::CATALOG, Arc::new(Namespace::catalog()));
        }
        namespaces
    }

    async fn pull(&self, address: &str, progress: &mut Progress) -> Result<(), PullError> {
        if self.setting().paused {
            return Err(PullError::Paused);
        }
        // A new leader may not have applied yet what its region acknowledged to the peer.
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let current =
            self.shard.prepare_read(NamespaceId::CATALOG, &Consistency::Linearizable, deadline);
        current.await.map_err(|error| broken(&format!("not ready to pull: {error}")))?;
        let (requests, stream, source) = self.open(address).await?;
        *progress = Progress::Opened;
        self.shard.hear_from(self.peer.id);
        if self.shard.own_member().state.is_joining() {
            drop((requests, stream));
            return self.seed(address, source).await;
        }
        self.paths.up(self.peer.id);
        tracing::info!(
            shard = %self.shard.id(),
            peer = %self.peer.name,
            address,
            "link established"
        );
        Stream {
            puller: self,
            address,
            source,
            requests,
            lanes: BTreeMap::new(),
            ingest: None,
            repair: None,
            check_at: Instant::now() + jittered(self.config.repair_interval),
            relayed: self.paths.relayed_by(self.peer.id),
            served: NamespaceId::CATALOG,
            moved: Instant::now(),
            progress,
        }
        .run(stream)
        .await
    }

    async fn open(
        &self,
        address: &str,
    ) -> Result<(mpsc::Sender<pb::PullRequest>, Streaming<pb::PullResponse>, Actor), PullError>
    {
        let channel = self
            .channels
            .get(address)
            .map_err(|error| PullError::Broken(format!("`{address}` is no address: {error}")))?;
        let mut client = LinkServiceClient::new(channel)
            .accept_compressed(CompressionEncoding::Zstd)
            .send_compressed(CompressionEncoding::Zstd)
            .max_decoding_message_size(message_bytes_max());
        let (requests, receiver) = mpsc::channel(STREAM_MESSAGES_MAX);
        let own = self.shard.own_member();
        let identity = wire::link_identity(self.shard.topology(), own, &self.peer);
        let open = wire::open(identity, u32::from(self.shard.id().0));
        // The channel is new and has room.
        let _ = requests.try_send(open);
        let opening = async {
            let mut stream = client.pull(ReceiverStream::new(receiver)).await?.into_inner();
            let first = stream.message().await?;
            match first.and_then(|first| first.body) {
                Some(pb::pull_response::Body::Opened(opened)) => Ok((stream, opened)),
                Some(_) | None => Err(Status::internal("the peer did not open the stream")),
            }
        };
        let (stream, opened) = match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(status)) => return Err(classify(address, &status)),
            Err(_) => return Err(PullError::TryNext(format!("{address} did not answer in time"))),
        };
        let met = Met::decode(self.shard.topology(), opened);
        let met = met.map_err(|status| classify(address, &status))?;
        self.hear_of_oneself(own, &met).await?;
        if !met.refused.is_empty() {
            return Err(PullError::Broken(format!("{address}: {}", met.refused)));
        }
        if !self.shard.store().members().admit(met.source) {
            let theirs = met.source.incarnation;
            return Err(broken(&format!(
                "this shard knows region `{}` in another incarnation than {theirs}, or shut out",
                self.peer.name
            )));
        }
        Ok((requests, stream, met.source))
    }

    /// Follows what a peer was told of this very region: others may have shut it out, taken it back, or
    /// know more of its writes than it does itself.
    async fn hear_of_oneself(&self, own: Member, met: &Met) -> Result<(), PullError> {
        let region = self.shard.topology().region;
        let deadline = Instant::now() + INGEST_TIMEOUT;
        let name = &self.peer.name;
        let known = self.shard.store().members();
        let theirs = known.get(self.peer.id).state;
        if theirs != MemberState::Active {
            // Here it was decided that the peer begins anew, or is out: it has no say in this region. If
            // both were told to begin anew, neither does.
            return match met.you {
                Some(you) if own < you => Err(broken(&format!(
                    "region `{name}` knows this region as {:?}, and is itself {theirs:?} here: start \
                     the region that is to give way with empty directories and `join = true`",
                    you.state
                ))),
                _ => Ok(()),
            };
        }
        let others: Members = met.members.iter().filter(|(other, _)| *other != region).collect();
        if own.state.is_joining() && !known.know_all_of(&others) {
            // Before it has the catalog, it knows nobody's incarnation but by them.
            let learnt = self.shard.learn(others, deadline).await;
            learnt.map_err(|error| broken(&error.to_string()))?;
        }
        match met.you {
            Some(you) if own < you => {
                let is_new_life = own.incarnation < you.incarnation;
                let done = match you.state {
                    MemberState::Joining if is_new_life => {
                        let (known, members) = (met.known.clone(), met.members.clone());
                        self.shard.start_over(you.incarnation, known, members, deadline).await
                    }
                    MemberState::Active if is_new_life => {
                        return Err(PullError::Regressed(format!(
                            "region `{name}` knows this region in incarnation {}, and this shard is \
                             in incarnation {}: its data is from before that",
                            you.incarnation, own.incarnation
                        )));
                    }
                    MemberState::Active if own.state.is_joining() => {
                        return Err(broken(&format!(
                            "region `{name}` knows that this region had all data, which is gone: \
                             `tombolo ctl region recover`, run there, gives it a new incarnation"
                        )));
                    }
                    // Whether it has all that it needs it knows by itself.
                    MemberState::Joining | MemberState::Active => return Ok(()),
                    MemberState::Recovering
                    | MemberState::Regressed
                    | MemberState::Fenced
                    | MemberState::Removed => self.shard.set_member(region, you, deadline).await,
                };
                done.map_err(|error| broken(&error.to_string()))?;
                Err(broken(&format!("region `{name}` knows this region as {:?}", you.state)))
            }
            None if own.state.is_joining() => Err(broken(&format!(
                "region `{name}` has not heard that this region joins: `tombolo ctl region add` admits a new one there, and `recover` one that lost its data"
            ))),
            _ if own.state == MemberState::Regressed => Err(broken(
                "this region lost writes that it had told of: `tombolo ctl region recover`, run in \
                 another region, gives it a new incarnation",
            )),
            _ if own.state.is_out() => {
                Err(broken(&format!("the other regions go on without this one: {:?}", own.state)))
            }
            _ if own.state == MemberState::Active => self.compare_own_events(met),
            _ => Ok(()),
        }
    }

    /// This leader was current when it asked, so nothing of its region may be elsewhere only.
    fn compare_own_events(&self, met: &Met) -> Result<(), PullError> {
        let own = self.shard.actor();
        for (&namespace, events) in &met.known {
            let (here, there) = (self.shard.frontier(namespace).get(own), events.get(own));
            if here < there {
                return Err(PullError::Regressed(format!(
                    "region `{}` has {there} events of this region in namespace {namespace}, and this \
                     region has {here}",
                    self.peer.name
                )));
            }
        }
        Ok(())
    }

    /// The counters went back: another write would carry an identity that is used already. Answers whether
    /// that is noted.
    async fn stop_writing(&self, reason: &str) -> bool {
        tracing::error!(
            shard = %self.shard.id(),
            peer = %self.peer.name,
            reason,
            "this region lost writes that others have, and takes no more; `tombolo ctl region \
             recover`, run in another region, gives it a new incarnation"
        );
        let own = self.shard.own_member();
        if own.state != MemberState::Active {
            return true;
        }
        let regressed = Member { state: MemberState::Regressed, ..own };
        let region = self.shard.topology().region;
        let deadline = Instant::now() + INGEST_TIMEOUT;
        let noted = self.shard.set_member(region, regressed, deadline).await;
        if let Err(error) = &noted {
            tracing::warn!(%error, "will be noted with the next attempt");
        }
        noted.is_ok()
    }

    /// How to treat the end of a repair.
    pub(crate) fn after_repair(&self, error: RepairError) -> PullError {
        match error {
            RepairError::OwnChangeUnknown => PullError::Regressed(error.to_string()),
            RepairError::DotReused(_) | RepairError::Broken(_) => {
                PullError::Broken(error.to_string())
            }
        }
    }

    /// A repair of a namespace from the peer.
    pub(crate) fn repair(&self, address: &str, source: Actor, namespace: Arc<Namespace>) -> Repair {
        Repair {
            shard: self.shard.clone(),
            peer: self.peer.clone(),
            source,
            address: address.to_owned(),
            namespace,
            channels: self.channels.clone(),
            statuses: Arc::clone(&self.statuses),
            setting: self.shards.catalog_shard().store().clone(),
            pace: Arc::clone(&self.pace),
            config: self.config.clone(),
        }
    }
}

/// What a peer said of itself and of this region.
struct Met {
    /// The peer, in its present life.
    source: Actor,
    /// What it was told of this region.
    you: Option<Member>,
    /// What it has of this region's events.
    known: BTreeMap<NamespaceId, VersionVector>,
    /// What it knows of the regions.
    members: Members,
    /// Why it serves nothing.
    refused: String,
}

impl Met {
    fn decode(topology: &Topology, opened: pb::Opened) -> Result<Self, Status> {
        let source = wire::check_identity(topology, opened.identity)?;
        let you = opened.you.map(wire::decode_member).transpose()?.map(|(_, member)| member);
        let mut known = BTreeMap::new();
        for namespace in opened.known {
            let events = wire::decode_frontier(namespace.events)?;
            known.insert(NamespaceId(namespace.namespace), events);
        }
        let (members, refused) = (wire::decode_members(opened.members)?, opened.refused);
        Ok(Self { source, you, known, members, refused })
    }
}

fn classify(address: &str, status: &Status) -> PullError {
    let text = format!("{address}: {}", status.message());
    match status.code() {
        Code::Unavailable => PullError::TryNext(text),
        _ => PullError::Broken(text),
    }
}

/// One open stream.
struct Stream<'a> {
    puller: &'a Puller,
    /// Where the peer's leader is.
    address: &'a str,
    /// The peer, in its present life.
    source: Actor,
    requests: mpsc::Sender<pb::PullRequest>,
    lanes: BTreeMap<NamespaceId, Lane>,
    /// The batch on its way through Raft.
    ingest: Option<BoxFuture<'static, (NamespaceId, Result<Ingested, ShardError>)>>,
    /// The repair under way. Dropping it is safe.
    repair: Option<BoxFuture<'static, Repaired>>,
    /// When all namespaces are compared next.
    check_at: Instant,
    /// The regions whose changes the peer sends besides its own.
    relayed: BTreeSet<RegionId>,
    /// Whose batch was ingested last: the next one is another's, if there is one.
    served: NamespaceId,
    /// When a frontier moved last, or there was nothing to move for.
    moved: Instant,
    progress: &'a mut Progress,
}

/// What became of a repair.
type Repaired = (NamespaceId, Purpose, Result<Found, RepairError>);

/// How far a stream came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    None,
    Opened,
    Applied,
}

/// One namespace of a stream.
struct Lane {
    namespace: Arc<Namespace>,
    pending: Pending,
    /// What the peer said it has.
    peer_frontier: VersionVector,
    /// What the peer was told that is applied here.
    acknowledged: VersionVector,
    /// Up to where the peer's change log is gone, if that is past what is applied here.
    trimmed: Option<VersionVector>,
    /// The repair that is to begin.
    due: Option<Due>,
}

/// A repair that is to begin.
#[derive(Clone, Copy, Debug)]
struct Due {
    purpose: Purpose,
    /// Not before.
    at: Instant,
    /// So many tries came to nothing.
    tried: u32,
}

impl Due {
    fn now(purpose: Purpose) -> Self {
        Self { purpose, at: Instant::now(), tried: 0 }
    }
}

impl Stream<'_> {
    async fn run(mut self, mut stream: Streaming<pb::PullResponse>) -> Result<(), PullError> {
        let shard = &self.puller.shard;
        let mut versions = self.puller.shards.catalog().subscribe();
        let mut applied = shard.store().watch_applied();
        let mut ticks = tokio::time::interval(FRONTIER_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut gate = self.puller.gate.watch();
        self.subscribe().await?;
        loop {
            applied.borrow_and_update();
            gate.borrow_and_update();
            let pacing = self.puller.pace.wait(self.puller.setting().bytes_per_second);
            if pacing.is_some() {
                // Nothing is read, so nothing can be heard.
                heard = Instant::now();
            }
            self.start_repair();
            self.start_ingest();
            let ingesting = self.ingest.is_some();
            let held_back = !ingesting && self.lanes.values().any(|lane| !lane.pending.is_empty());
            // Safe to drop: a message is taken whole, and the ingest lives outside the `select!`.
            tokio::select! {
                biased;
                Some((namespace, result)) = OptionFuture::from(self.ingest.as_mut()) => {
                    self.ingest = None;
                    self.ingested(namespace, result).await?;
                }
                Some((id, purpose, result)) = OptionFuture::from(self.repair.as_mut()) => {
                    self.repair = None;
                    self.repaired(id, purpose, result).await?;
                }
                changed = gate.changed() => changed.map_err(|_| PullError::Stopped)?,
                () = tokio::time::sleep(pacing.unwrap_or_default()), if pacing.is_some() => {}
                message = stream.message(), if pacing.is_none() => {
                    heard = Instant::now();
                    match message {
                        Ok(Some(message)) => self.receive(message)?,
                        Ok(None) => return Err(broken("the peer ended the stream")),
                        Err(status) => return Err(broken(status.message())),
                    }
                }
                changed = applied.changed(), if held_back => {
                    changed.map_err(|_| PullError::Stopped)?;
                }
                changed = versions.changed() => {
                    changed.map_err(|_| PullError::Stopped)?;
                    self.subscribe().await?;
                }
                _ = ticks.tick() => {
                    if self.puller.setting().paused {
                        return Err(PullError::Paused);
                    }
                    self.acknowledge_all().await?;
                    self.follow_relays().await?;
                    self.begin_untrimmed().await?;
                    self.look_for_repairs();
                    self.watch(heard)?;
                }
            }
        }
    }

    /// Subscribes to namespaces that are new, and drops those that are gone.
    async fn subscribe(&mut self) -> Result<(), PullError> {
        let wanted = self.puller.namespaces();
        let gone: Vec<_> =
            self.lanes.keys().filter(|id| !wanted.contains_key(id)).copied().collect();
        for namespace in gone {
            self.lanes.remove(&namespace);
            self.puller.statuses.forget(self.puller.key(namespace));
        }
        for (id, namespace) in wanted {
            if !self.lanes.contains_key(&id) {
                self.begin(namespace).await?;
            }
        }
        Ok(())
    }

    /// Begins a namespace's stream at this region's frontier.
    async fn begin(&mut self, namespace: Arc<Namespace>) -> Result<(), PullError> {
        let id = namespace.id;
        let frontier = self.puller.shard.frontier(id);
        send(&self.requests, wire::subscribe(id, &frontier, &self.relayed)).await?;
        let lane = self.lanes.entry(id).or_insert_with(|| Lane {
            namespace,
            pending: Pending::default(),
            peer_frontier: VersionVector::new(),
            acknowledged: VersionVector::new(),
            trimmed: None,
            due: None,
        });
        lane.acknowledged = frontier;
        if lane.trimmed.take().is_some() {
            lane.due = None;
        }
        self.puller.statuses.update(self.puller.key(id), |status| {
            status.phase = LinkPhase::Streaming;
            status.last_error = None;
            status.next_retry = None;
        });
        Ok(())
    }

    /// Asks for other regions' changes when the paths to them go or come. What was on its way
    /// comes twice then, and is skipped.
    async fn follow_relays(&mut self) -> Result<(), PullError> {
        let relayed = self.puller.paths.relayed_by(self.puller.peer.id);
        if relayed == self.relayed {
            return Ok(());
        }
        let topology = self.puller.shard.topology();
        let names: Vec<_> = relayed.iter().map(|&region| topology.region_name(region)).collect();
        tracing::info!(
            shard = %self.puller.shard.id(),
            peer = %self.puller.peer.name,
            relays = %names.join(", "),
            "a peer relays other regions' changes"
        );
        self.relayed = relayed;
        let namespaces: Vec<_> =
            self.lanes.values().map(|lane| Arc::clone(&lane.namespace)).collect();
        for namespace in namespaces {
            self.begin(namespace).await?;
        }
        Ok(())
    }

    /// Begins again where the peer's change log had seemed to be gone: what lacks may have come by
    /// another way meanwhile.
    async fn begin_untrimmed(&mut self) -> Result<(), PullError> {
        let shard = &self.puller.shard;
        let again: Vec<_> = self
            .lanes
            .iter()
            .filter(|(id, lane)| {
                let frontier = || shard.frontier(**id);
                lane.trimmed.as_ref().is_some_and(|trimmed| frontier().covers_all(trimmed))
            })
            .map(|(_, lane)| Arc::clone(&lane.namespace))
            .collect();
        for namespace in again {
            self.begin(namespace).await?;
        }
        Ok(())
    }

    fn receive(&mut self, message: pb::PullResponse) -> Result<(), PullError> {
        match message.body {
            Some(pb::pull_response::Body::Changes(changes)) => self.take_changes(changes),
            Some(pb::pull_response::Body::Heartbeat(heartbeat)) => {
                let frontier = wire::decode_frontier(heartbeat.frontier)
                    .map_err(|status| broken(status.message()))?;
                let id = NamespaceId(heartbeat.namespace);
                let members = wire::decode_members(heartbeat.members)
                    .map_err(|status| broken(status.message()))?;
                let (peer, shard) = (self.puller.peer.id, &self.puller.shard);
                let own = shard.actor();
                // This leader was current when the stream began, and the peer has it from here.
                if shard.frontier(id).get(own) < frontier.get(own) {
                    return Err(self.puller.after_repair(RepairError::OwnChangeUnknown));
                }
                self.puller.paths.tell(peer, id, frontier.clone());
                // Who knows of a region that this shard has not heard of counts it before it forgets
                // anything; this shard does not yet.
                let (local, known) = shard.store().frontier_and_members(id);
                if known.know_all_of(&members) {
                    let told = frontier.clone();
                    shard.peers().tell(id, self.source, told, &members, &local);
                }
                if let Some(lane) = self.lanes.get_mut(&id) {
                    lane.peer_frontier = frontier;
                    self.show_lag(id);
                }
                Ok(())
            }
            Some(pb::pull_response::Body::Trimmed(trimmed)) => {
                let id = NamespaceId(trimmed.namespace);
                let trimmed = wire::decode_frontier(trimmed.trimmed)
                    .map_err(|status| broken(status.message()))?;
                let Some(lane) = self.lanes.get_mut(&id) else { return Ok(()) };
                lane.trimmed = Some(trimmed);
                lane.due = Some(Due::now(Purpose::CatchUp));
                self.puller.statuses.update(self.puller.key(id), |status| {
                    status.phase = LinkPhase::Repairing;
                    status.last_error = None;
                });
                tracing::warn!(
                    shard = %self.puller.shard.id(),
                    peer = %self.puller.peer.name,
                    namespace = %id,
                    "the peer's change log no longer reaches back to what this region has: repairing"
                );
                Ok(())
            }
            Some(pb::pull_response::Body::Opened(_)) | None => {
                Err(broken("the peer sent a message that this version does not know"))
            }
        }
    }

    fn take_changes(&mut self, changes: pb::Changes) -> Result<(), PullError> {
        let id = NamespaceId(changes.namespace);
        // A batch of a namespace that was deleted here meanwhile may still arrive.
        let Some(lane) = self.lanes.get_mut(&id) else { return Ok(()) };
        let (mut events, mut bytes) = (0, 0);
        for encoded in changes.changes {
            let size = encoded.len();
            let change = Change::from_bytes(encoded)
                .map_err(|error| broken(&format!("a damaged change arrived: {error}")))?;
            lane.peer_frontier.add(change.last());
            events += change.deltas.len() as u64;
            bytes += size as u64;
            lane.pending.push(change, size);
        }
        self.puller.statuses.count_received(self.puller.peer.id, bytes);
        self.puller.pace.spend(bytes, self.puller.setting().bytes_per_second);
        self.puller.statuses.update(self.puller.key(id), |status| {
            status.received_events += events;
            status.received_bytes += bytes;
        });
        self.show_lag(id);
        Ok(())
    }

    /// Makes repairs due that somebody asked for, and now and then a comparison of everything.
    fn look_for_repairs(&mut self) {
        let now = Instant::now();
        let check = self.check_at <= now;
        if check {
            self.check_at = now + jittered(self.puller.config.repair_interval);
        }
        for (&id, lane) in &mut self.lanes {
            if self.puller.statuses.take_asked(self.puller.key(id)) {
                lane.due = Some(Due::now(Purpose::CatchUp));
                self.puller.statuses.update(self.puller.key(id), |status| {
                    status.phase = LinkPhase::Repairing;
                });
            } else if check && lane.due.is_none() {
                lane.due = Some(Due::now(Purpose::Check));
            }
        }
    }

    /// Begins a repair that is due, if it is its turn.
    fn start_repair(&mut self) {
        if self.repair.is_some() {
            return;
        }
        let puller = self.puller;
        let now = Instant::now();
        for (&id, lane) in &mut self.lanes {
            let Some(due) = lane.due.filter(|due| due.at <= now) else { continue };
            let Ok(permit) = Arc::clone(&puller.repairs).try_acquire_owned() else { return };
            let Some(pass) = puller.gate.enter(id) else { continue };
            if due.purpose == Purpose::CatchUp {
                puller.statuses.update(puller.key(id), |status| {
                    status.phase = LinkPhase::Repairing;
                    status.next_retry = None;
                });
            }
            let namespace = Arc::clone(&lane.namespace);
            let repair = puller.repair(self.address, self.source, namespace);
            self.repair = Some(Box::pin(async move {
                let _held = (permit, pass);
                (id, due.purpose, repair.run(due.purpose).await)
            }));
            return;
        }
    }

    async fn repaired(
        &mut self,
        id: NamespaceId,
        purpose: Purpose,
        result: Result<Found, RepairError>,
    ) -> Result<(), PullError> {
        let puller = self.puller;
        let progress = puller.statuses.take_repair(puller.key(id));
        let Some(lane) = self.lanes.get_mut(&id) else { return Ok(()) };
        let tried = lane.due.map_or(0, |due| due.tried) + 1;
        // At first soon, then less and less often.
        let pause = jittered(puller.config.retry_max.min(RETRY_MIN * tried));
        // What was asked for meanwhile is still to do.
        let asked = lane.due.filter(|due| due.purpose == Purpose::CatchUp);
        lane.due = match (&result, purpose) {
            (_, Purpose::Check) if asked.is_some() => asked,
            (Ok(Found::Moving), _) if tried < CHECKS_MAX => {
                Some(Due { purpose, at: Instant::now() + pause, tried })
            }
            (Ok(_), _) | (Err(_), Purpose::Check) => None,
            (Err(_), Purpose::CatchUp | Purpose::Seed) => {
                Some(Due { purpose, at: Instant::now() + pause, tried })
            }
        };
        // Meanwhile the peer may have said that its log is gone further than this repair went. It
        // sends nothing more until then, so the next one is due.
        let frontier = puller.shard.frontier(id);
        let is_beyond = |trimmed: &VersionVector| !frontier.covers_all(trimmed);
        let is_due = lane.due.is_some_and(|due| due.purpose == Purpose::CatchUp);
        if !is_due && lane.trimmed.as_ref().is_some_and(is_beyond) {
            let at = Instant::now() + if result.is_ok() { Duration::ZERO } else { pause };
            lane.due = Some(Due { purpose: Purpose::CatchUp, at, tried: 0 });
        }
        puller.statuses.count_repair(puller.peer.id, |counts| match &result {
            Ok(Found::Equal(_)) => counts.equal += 1,
            Ok(Found::CaughtUp { .. }) => counts.caught_up += 1,
            Ok(Found::Moving | Found::Damage { .. }) => {}
            Err(_) => counts.failed += 1,
        });
        match result {
            Ok(found) => {
                if purpose == Purpose::CatchUp {
                    tracing::info!(
                        shard = %puller.shard.id(),
                        peer = %puller.peer.name,
                        namespace = %lane.namespace.name,
                        ?found,
                        records = progress.as_ref().map_or(0, |it| it.records),
                        exchanged_bytes = progress.as_ref().map_or(0, |it| it.exchanged_bytes),
                        seconds = progress.map_or(0.0, |it| it.began.elapsed().as_secs_f64()),
                        "repaired"
                    );
                    puller.statuses.update(puller.key(id), |status| {
                        status.phase = LinkPhase::Streaming;
                        status.last_error = None;
                        status.repairs_done += 1;
                    });
                }
                self.moved = Instant::now();
                *self.progress = Progress::Applied;
                self.acknowledge(id).await?;
                self.show_lag(id);
                self.begin_untrimmed().await
            }
            Err(error) => {
                let reason = error.to_string();
                tracing::warn!(
                    shard = %puller.shard.id(),
                    peer = %puller.peer.name,
                    namespace = %lane.namespace.name,
                    error = %reason,
                    "repair broken off, will retry"
                );
                if !matches!(error, RepairError::Broken(_)) {
                    return Err(puller.after_repair(error));
                }
                // A comparison that failed changes nothing about the stream.
                if purpose == Purpose::CatchUp {
                    puller.statuses.update(puller.key(id), |status| {
                        status.last_error = Some(reason);
                        status.next_retry = SystemTime::now().checked_add(pause);
                    });
                }
                Ok(())
            }
        }
    }

    fn show_lag(&self, id: NamespaceId) {
        let Some(lane) = self.lanes.get(&id) else { return };
        let lag_events = lane.peer_frontier.events_beyond(&self.puller.shard.frontier(id));
        self.puller.statuses.update(self.puller.key(id), |status| status.lag_events = lag_events);
    }

    /// Starts the next batch if none is on its way.
    fn start_ingest(&mut self) {
        if self.ingest.is_some() {
            return;
        }
        let shard = &self.puller.shard;
        let config = &self.puller.config;
        let bytes_max = config.batch_bytes_max.min(shard.group().command_bytes_max() / 2);
        // In turn, beginning after the last one, so that a long backlog of one starves no other.
        let last = self.served;
        let (before, after): (Vec<_>, Vec<_>) =
            self.lanes.iter_mut().partition(|(id, _)| **id <= last);
        for (&id, lane) in after.into_iter().chain(before) {
            if lane.pending.is_empty() || self.puller.gate.is_closed(id) {
                continue;
            }
            let frontier = shard.frontier(id);
            let ready = lane.pending.take_ready(&frontier, bytes_max);
            if !ready.is_empty() {
                self.served = id;
                let (shard, source) = (shard.clone(), self.source);
                let namespace = Arc::clone(&lane.namespace);
                self.ingest = Some(Box::pin(async move {
                    let deadline = Instant::now() + INGEST_TIMEOUT;
                    (id, shard.ingest(&namespace, source, ready, deadline).await)
                }));
                return;
            }
        }
    }

    async fn ingested(
        &mut self,
        id: NamespaceId,
        result: Result<Ingested, ShardError>,
    ) -> Result<(), PullError> {
        let ingested = match result {
            Ok(ingested) => ingested,
            // Whatever became of the batch, the frontier knows: begin again from it. Also when
            // this node cannot prove just now that it leads: if it does not, `shutdown` fires.
            Err(error) => return Err(broken(&format!("ingesting failed: {error}"))),
        };
        self.moved = Instant::now();
        if ingested.applied > 0 {
            *self.progress = Progress::Applied;
        }
        match ingested.stopped {
            None | Some(Stopped::Dependency) => {}
            Some(Stopped::Gap) => return Err(broken("the stream has a gap")),
            Some(Stopped::OwnChangeUnknown) => {
                return Err(self.puller.after_repair(RepairError::OwnChangeUnknown));
            }
            Some(Stopped::SourceOut) => {
                return Err(broken(
                    "this shard has shut the peer out, or knows it in a new incarnation",
                ));
            }
            Some(Stopped::DotReused(dot)) => {
                return Err(PullError::Broken(RepairError::DotReused(dot).to_string()));
            }
        }
        self.acknowledge(id).await?;
        self.show_lag(id);
        Ok(())
    }

    /// Tells the peer what is applied here, if it changed.
    async fn acknowledge(&mut self, id: NamespaceId) -> Result<(), PullError> {
        let frontier = self.puller.shard.frontier(id);
        let Some(lane) = self.lanes.get_mut(&id) else { return Ok(()) };
        if lane.acknowledged == frontier {
            return Ok(());
        }
        lane.acknowledged = frontier.clone();
        send(&self.requests, wire::acknowledge(id, &frontier)).await
    }

    async fn acknowledge_all(&mut self) -> Result<(), PullError> {
        let ids: Vec<_> = self.lanes.keys().copied().collect();
        for id in ids {
            self.acknowledge(id).await?;
        }
        Ok(())
    }

    /// Resets a stream that is silent, or that does not move although it lags.
    fn watch(&mut self, heard: Instant) -> Result<(), PullError> {
        let limit = self.puller.config.watchdog;
        if heard.elapsed() > limit {
            return Err(broken("the peer was silent for too long"));
        }
        let held_back = self.lanes.values().find_map(|lane| lane.pending.waits_for());
        let is_repairing = !self.puller.gate.watch().borrow().is_empty();
        if is_repairing || (held_back.is_none() && self.ingest.is_none()) {
            self.moved = Instant::now();
        }
        if self.moved.elapsed() > limit {
            let waits_for = held_back.map(ToString::to_string).unwrap_or_default();
            return Err(broken(&format!(
                "no change was applied for too long: waits for {waits_for}"
            )));
        }
        Ok(())
    }
}

async fn send(
    requests: &mpsc::Sender<pb::PullRequest>,
    request: pb::PullRequest,
) -> Result<(), PullError> {
    match tokio::time::timeout(STALL_TIMEOUT, requests.send(request)).await {
        Ok(sent) => sent.map_err(|_| broken("the peer ended the stream")),
        Err(_) => Err(broken("the peer reads no requests")),
    }
}

/// Somewhere around `interval`, so that shards and nodes do not act in step.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::random_range(0.75..=1.25))
}

pub(crate) fn broken(reason: &str) -> PullError {
    PullError::Broken(reason.to_owned())
}
