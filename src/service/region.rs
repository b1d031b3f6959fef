//! `RegionService`: the regions, and the links between them, seen from this region.
//!
//! Links live where shards are led, so a node asks the others of its region and says which did
//! not answer. No other region is asked: what is shown is what this region knows.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::{sync::Mutex, time::Instant};
use tombolo_core::{MemberState, NamespaceId, command::LinkSetting};
use tombolo_proto::v1::{
    self as pb,
    region_service_client::RegionServiceClient,
    region_service_server::{RegionService, RegionServiceServer},
};
use tombolo_replication::{Comparer, LinkKey, LinkPhase, LinkStatus, LinkStatuses};
use tonic::{Request, Response, Status, metadata::MetadataValue, transport::Channel};

use crate::{
    anti_entropy::rows,
    forward::{THIS_NODE_ONLY, is_set},
    gateway::{Call, Gateway, request as forwarded},
    lag::lag_of,
    membership::{Decision, membership},
    reason::Reason,
};

/// Serves regions and links.
pub struct RegionApi {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) statuses: Arc<LinkStatuses>,
    pub(crate) comparer: Comparer,
    /// Held while an operator's decision is checked and written.
    pub(crate) deciding: Mutex<()>,
}

const PEER_TIMEOUT: Duration = Duration::from_secs(1);

impl RegionApi {
    /// Serves what `statuses` say about this node's links, and the other nodes' of the region.
    pub fn new(gateway: Arc<Gateway>, statuses: Arc<LinkStatuses>, comparer: Comparer) -> Self {
        Self { gateway, statuses, comparer, deciding: Mutex::default() }
    }

    /// The tonic service.
    pub fn into_service(self) -> RegionServiceServer<Self> {
        RegionServiceServer::new(self)
    }

    fn own_links(&self) -> Vec<pb::Link> {
        self.statuses.all().into_iter().map(|(key, status)| self.link(key, status)).collect()
    }

    fn link(&self, key: LinkKey, status: LinkStatus) -> pb::Link {
        let topology = self.gateway.topology();
        let namespace = self.namespace_name(key.namespace);
        let shard = self.gateway.shards().get(key.shard);
        let lag = shard.map(|shard| lag_of(shard, key.namespace, key.peer));
        let lag = lag.and_then(Result::ok).unwrap_or_default();
        pb::Link {
            peer_region: topology.region_name(key.peer),
            namespace,
            shard: u32::from(key.shard.0),
            node_id: topology.node.0,
            phase: phase(status.phase).into(),
            lag_events: status.lag_events,
            lag_seconds: lag.seconds,
            unacknowledged_events: lag.events,
            last_error: status.last_error.unwrap_or_default(),
            next_retry_time: status.next_retry.map(Into::into),
            received_events: status.received_events,
            received_bytes: status.received_bytes,
            unacknowledged_bytes: lag.bytes,
            repairs_done: status.repairs_done,
            repair: status.repair.map(|progress| pb::RepairProgress {
                share: progress.share(),
                seconds_left: progress.time_left().map_or(0.0, |left| left.as_secs_f64()),
                records: progress.records,
                exchanged_bytes: progress.exchanged_bytes,
            }),
        }
    }

    /// What this node knows of its links.
    fn own_view(&self) -> pb::ListLinksResponse {
        let (links, clocks) = (self.own_links(), self.own_clocks());
        pb::ListLinksResponse { links, unreachable: Vec::new(), clocks }
    }

    /// The regions some of whose times this node did not believe.
    fn own_clocks(&self) -> Vec<pb::RegionClock> {
        let clocks = self.gateway.shards().clock().regions().into_iter();
        let described = clocks.map(|(region, clock)| pb::RegionClock {
            region: self.gateway.topology().region_name(region),
            clock_ahead_seconds: Duration::from_millis(clock.ahead_ms).as_secs_f64(),
            clock_rejected_changes: clock.rejected,
        });
        described.collect()
    }

    /// The links of all nodes of the region, and the nodes that did not answer.
    async fn all_links(&self) -> pb::ListLinksResponse {
        let pb::ListLinksResponse { mut links, mut clocks, .. } = self.own_view();
        let (answers, unreachable) = self
            .ask_others(
                PEER_TIMEOUT,
                &pb::ListLinksRequest::default(),
                |mut node, request| async move { node.list_links(request).await },
            )
            .await;
        for answer in answers {
            links.extend(answer.links);
            for other in answer.clocks {
                let Some(known) = clocks.iter_mut().find(|known| known.region == other.region)
                else {
                    clocks.push(other);
                    continue;
                };
                known.clock_ahead_seconds =
                    known.clock_ahead_seconds.max(other.clock_ahead_seconds);
                known.clock_rejected_changes += other.clock_rejected_changes;
            }
        }
        links.sort_by(|left, right| {
            let key =
                |link: &pb::Link| (link.peer_region.clone(), link.namespace.clone(), link.shard);
            key(left).cmp(&key(right))
        });
        pb::ListLinksResponse { links, unreachable, clocks }
    }

    pub(crate) fn namespace_name(&self, id: NamespaceId) -> String {
        match self.gateway.shards().catalog().current().with_id(id) {
            Some(namespace) => namespace.name.clone(),
            None if id == NamespaceId::CATALOG => "catalog".to_owned(),
            None => format!("#{id}"),
        }
    }

    /// Refuses a name that no row can have, so that an empty list says that there is nothing. Rows may be
    /// of every namespace, of the catalog, and of a deleted namespace, `#` and its number.
    async fn check_named(&self, asked: &str, deadline: Instant) -> Result<(), Status> {
        let is_number = |id: &str| id.parse::<u32>().is_ok();
        if asked.is_empty() || asked == "catalog" || asked.strip_prefix('#').is_some_and(is_number)
        {
            return Ok(());
        }
        self.gateway.namespace(asked, deadline).await.map(drop)
    }

    /// The tombstones of all nodes of the region, and the nodes that did not answer.
    async fn all_tombstones(&self) -> Result<(Vec<pb::Tombstones>, Vec<String>), Status> {
        let mut found = self.own_tombstones().await?;
        let (answers, unreachable) = self
            .ask_others(
                PEER_TIMEOUT,
                &pb::ListTombstonesRequest::default(),
                |mut node, request| async move { node.list_tombstones(request).await },
            )
            .await;
        found.extend(answers.into_iter().flat_map(|answer| answer.tombstones));
        found.sort_by(|left, right| {
            (&left.namespace, left.shard).cmp(&(&right.namespace, right.shard))
        });
        Ok((found, unreachable))
    }

    /// Changes how this region pulls from a peer, here or at the leader of the catalog's shard, to
    /// which `remote` brings the message.
    async fn change_link<M, T, F>(
        &self,
        peer: &str,
        request: Request<M>,
        change: impl Fn(LinkSetting) -> LinkSetting,
        remote: impl Fn(RegionServiceClient<Channel>, Request<M>) -> F,
    ) -> Result<(), Status>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let (peer, change) = (self.peer(peer)?, &change);
        let local = |call: Call| async move {
            let shard = self.gateway.shards().catalog_shard();
            let setting = change(shard.store().link(peer));
            let set = shard.set_link(peer, setting, call.deadline).await;
            set.map_err(|error| self.gateway.status(error))
        };
        let elsewhere = |node, request| {
            let asked = remote(node, request);
            async move { asked.await.map(drop) }
        };
        self.on_catalog_leader(request, local, elsewhere).await
    }

    /// Decides on a region, here or at the leader of the catalog's shard, to which `remote` brings the
    /// message.
    async fn decide_on_leader<M, F>(
        &self,
        name: &str,
        request: Request<M>,
        decision: Decision,
        remote: impl Fn(RegionServiceClient<Channel>, Request<M>) -> F,
    ) -> Result<Option<pb::Region>, Status>
    where
        M: Clone,
        F: Future<Output = Result<Option<pb::Region>, Status>>,
    {
        let decision = &decision;
        let local = |call| async move {
            let region = self.decide(name, decision, call).await?;
            Ok(Some(self.region(&region, &self.own_view())))
        };
        self.on_catalog_leader(request, local, remote).await
    }

    /// Does something where the leader of the catalog's shard is: here, or there, to which `remote`
    /// brings the message.
    async fn on_catalog_leader<M, T, L, R>(
        &self,
        request: Request<M>,
        local: impl Fn(Call) -> L,
        remote: impl Fn(RegionServiceClient<Channel>, Request<M>) -> R,
    ) -> Result<T, Status>
    where
        M: Clone,
        L: Future<Output = Result<T, Status>>,
        R: Future<Output = Result<T, Status>>,
    {
        let call = self.gateway.call(request.metadata());
        let message = request.into_inner();
        let shard = self.gateway.shards().catalog_shard();
        let elsewhere = |channel, metadata| {
            remote(RegionServiceClient::new(channel), forwarded(message.clone(), metadata))
        };
        self.gateway.on_leader(shard, call, || local(call), elsewhere).await
    }

    /// Asks all other nodes of the region about themselves; names those that do not answer in time.
    async fn ask_others<M, T, F>(
        &self,
        patience: Duration,
        message: &M,
        ask: impl Fn(RegionServiceClient<Channel>, Request<M>) -> F,
    ) -> (Vec<T>, Vec<String>)
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let topology = self.gateway.topology();
        let others = topology.nodes.iter().filter(|node| node.id != topology.node);
        let asked = others.map(|node| {
            let channel = self.gateway.channels().get(&node.client);
            let asked = channel
                .map(|it| ask(RegionServiceClient::new(it), this_node_only(message.clone())));
            async move {
                let answer = async { asked?.await };
                (node.id, tokio::time::timeout(patience, answer).await)
            }
        });
        let (mut answers, mut unreachable) = (Vec::new(), Vec::new());
        for (node, answer) in join_all(asked).await {
            match answer {
                Ok(Ok(answer)) => answers.push(answer.into_inner()),
                Ok(Err(_)) | Err(_) => {
                    unreachable.push(format!("{}-{node}", topology.local_name()));
                }
            }
        }
        (answers, unreachable)
    }

    fn region(&self, region: &tombolo_cluster::Region, seen: &pb::ListLinksResponse) -> pb::Region {
        let unreachable = seen.unreachable.len();
        let topology = self.gateway.topology();
        let local = region.id == topology.region;
        let mine: Vec<&pb::Link> =
            seen.links.iter().filter(|link| link.peer_region == region.name).collect();
        let clock = seen.clocks.iter().find(|clock| clock.region == region.name);
        let streaming = mine.iter().filter(|link| link.phase() == pb::LinkPhase::Streaming).count();
        let reached = |link: &&&pb::Link| {
            let phases =
                [pb::LinkPhase::Streaming, pb::LinkPhase::Repairing, pb::LinkPhase::Seeding];
            phases.contains(&link.phase())
        };
        let reached = mine.iter().filter(reached).count();
        let shards_with_leader =
            self.gateway.shards().iter().filter(|shard| shard.leader().is_some()).count();
        let state = match streaming {
            _ if local && shards_with_leader == self.gateway.shards().iter().len() => {
                pb::RegionState::Up
            }
            _ if local => pb::RegionState::Degraded,
            _ if reached == 0 => pb::RegionState::Unreachable,
            count if count == mine.len() && unreachable == 0 => pb::RegionState::Up,
            _ => pb::RegionState::Degraded,
        };
        let nodes = topology.nodes.len();
        let shards = self.gateway.shards();
        let member = if local {
            // Whether it has all is decided here, and reaches the catalog a moment later.
            let members = shards.iter().map(tombolo_shard::Shard::own_member);
            members.max_by_key(|member| urgency(member.state)).unwrap_or_default()
        } else {
            region.said.unwrap_or_default()
        };
        let is_active =
            |shard: &&tombolo_shard::Shard| shard.own_member().state == MemberState::Active;
        let shards_active = shards.iter().filter(is_active).count();
        pb::Region {
            membership: membership(member.state).into(),
            incarnation: member.incarnation,
            shards_active: if local { count(shards_active) } else { 0 },
            name: region.name.clone(),
            number: u32::from(region.id.0),
            local,
            link_addresses: region.link_addresses.clone(),
            state: state.into(),
            lag_seconds: mine.iter().map(|link| link.lag_seconds).fold(0.0, f64::max),
            shards_with_leader: if local { count(shards_with_leader) } else { 0 },
            nodes_up: if local { count(nodes.saturating_sub(unreachable)) } else { 0 },
            nodes: if local { count(nodes) } else { 0 },
            clock_ahead_seconds: clock.map_or(0.0, |clock| clock.clock_ahead_seconds),
            clock_rejected_changes: clock.map_or(0, |clock| clock.clock_rejected_changes),
        }
    }
}

/// Which of its shards' states says most about a region.
const fn urgency(state: MemberState) -> u8 {
    match state {
        MemberState::Active => 0,
        MemberState::Joining | MemberState::Recovering => 1,
        MemberState::Regressed => 2,
        MemberState::Fenced => 3,
        MemberState::Removed => 4,
    }
}

/// A request to another node about itself.
fn this_node_only<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(THIS_NODE_ONLY, MetadataValue::from_static("1"));
    request
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn phase(phase: LinkPhase) -> pb::LinkPhase {
    match phase {
        LinkPhase::Connecting => pb::LinkPhase::Connecting,
        LinkPhase::Streaming => pb::LinkPhase::Streaming,
        LinkPhase::Seeding => pb::LinkPhase::Seeding,
        LinkPhase::Repairing => pb::LinkPhase::Repairing,
        LinkPhase::Paused => pb::LinkPhase::Paused,
        LinkPhase::Blocked => pb::LinkPhase::Blocked,
    }
}

#[tonic::async_trait]
impl RegionService for RegionApi {
    async fn list_regions(
        &self,
        _: Request<pb::ListRegionsRequest>,
    ) -> Result<Response<pb::ListRegionsResponse>, Status> {
        let seen = self.all_links().await;
        let regions = self.gateway.topology().regions();
        let regions = regions.iter().map(|region| self.region(region, &seen)).collect();
        Ok(Response::new(pb::ListRegionsResponse { regions, unreachable: seen.unreachable }))
    }

    async fn get_region(
        &self,
        request: Request<pb::GetRegionRequest>,
    ) -> Result<Response<pb::GetRegionResponse>, Status> {
        let name = request.into_inner().name;
        let region = self.gateway.topology().region_named(&name).ok_or_else(|| {
            Reason::RegionNotFound
                .status(format!("there is no region `{name}`"), &[("region", name.clone())])
        })?;
        let region = Some(self.region(&region, &self.all_links().await));
        Ok(Response::new(pb::GetRegionResponse { region }))
    }

    async fn list_links(
        &self,
        request: Request<pb::ListLinksRequest>,
    ) -> Result<Response<pb::ListLinksResponse>, Status> {
        let this_node_only = is_set(request.metadata(), THIS_NODE_ONLY);
        let peer = request.into_inner().peer_region;
        if !peer.is_empty() && self.gateway.topology().region_named(&peer).is_none() {
            return Err(Reason::RegionNotFound
                .status(format!("there is no region `{peer}`"), &[("region", peer)]));
        }
        let mut seen = if this_node_only { self.own_view() } else { self.all_links().await };
        seen.links.retain(|link| peer.is_empty() || link.peer_region == peer);
        seen.clocks.retain(|clock| peer.is_empty() || clock.region == peer);
        Ok(Response::new(seen))
    }

    async fn list_tombstones(
        &self,
        request: Request<pb::ListTombstonesRequest>,
    ) -> Result<Response<pb::ListTombstonesResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only_here = is_set(request.metadata(), THIS_NODE_ONLY);
        let namespace = request.into_inner().namespace;
        self.check_named(&namespace, call.deadline).await?;
        let (mut tombstones, unreachable) = if only_here {
            (self.own_tombstones().await?, Vec::new())
        } else {
            self.all_tombstones().await?
        };
        tombstones.retain(|row| namespace.is_empty() || row.namespace == namespace);
        Ok(Response::new(pb::ListTombstonesResponse { tombstones, unreachable }))
    }

    async fn summarize_namespace(
        &self,
        request: Request<pb::SummarizeNamespaceRequest>,
    ) -> Result<Response<pb::SummarizeNamespaceResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only_here = is_set(request.metadata(), THIS_NODE_ONLY);
        let namespace = request.into_inner().namespace;
        let mut shards = self.own_summaries(&namespace, call.deadline).await?;
        let mut unreachable = Vec::new();
        if !only_here {
            let message = pb::SummarizeNamespaceRequest { namespace };
            let (answers, silent) = self
                .ask_others(PEER_TIMEOUT, &message, |mut node, request| async move {
                    node.summarize_namespace(request).await
                })
                .await;
            shards.extend(answers.into_iter().flat_map(|answer| answer.shards));
            unreachable = silent;
        }
        shards.sort_by_key(|row| row.shard);
        Ok(Response::new(pb::SummarizeNamespaceResponse { shards, unreachable }))
    }

    async fn pause_link(
        &self,
        request: Request<pb::PauseLinkRequest>,
    ) -> Result<Response<pb::PauseLinkResponse>, Status> {
        let peer = request.get_ref().peer_region.clone();
        let change = |setting| LinkSetting { paused: true, ..setting };
        let remote = |mut node: RegionServiceClient<Channel>, request| async move {
            node.pause_link(request).await
        };
        self.change_link(&peer, request, change, remote).await?;
        Ok(Response::new(pb::PauseLinkResponse {}))
    }

    async fn resume_link(
        &self,
        request: Request<pb::ResumeLinkRequest>,
    ) -> Result<Response<pb::ResumeLinkResponse>, Status> {
        let peer = request.get_ref().peer_region.clone();
        let change = |setting| LinkSetting { paused: false, ..setting };
        let remote = |mut node: RegionServiceClient<Channel>, request| async move {
            node.resume_link(request).await
        };
        self.change_link(&peer, request, change, remote).await?;
        Ok(Response::new(pb::ResumeLinkResponse {}))
    }

    async fn limit_link(
        &self,
        request: Request<pb::LimitLinkRequest>,
    ) -> Result<Response<pb::LimitLinkResponse>, Status> {
        let peer = request.get_ref().peer_region.clone();
        let bytes_per_second = request.get_ref().bytes_per_second;
        let change = |setting| LinkSetting { bytes_per_second, ..setting };
        let remote = |mut node: RegionServiceClient<Channel>, request| async move {
            node.limit_link(request).await
        };
        self.change_link(&peer, request, change, remote).await?;
        Ok(Response::new(pb::LimitLinkResponse {}))
    }

    async fn start_repair(
        &self,
        request: Request<pb::StartRepairRequest>,
    ) -> Result<Response<pb::StartRepairResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only_here = is_set(request.metadata(), THIS_NODE_ONLY);
        let message = request.into_inner();
        let peer = self.peer(&message.peer_region)?;
        let namespace = match message.namespace.as_str() {
            "" => None,
            name => Some(self.gateway.namespace(name, call.deadline).await?),
        };
        let mut links = self.ask_repairs(peer, namespace.as_deref());
        let mut unreachable = Vec::new();
        if !only_here {
            let (answers, silent) = self
                .ask_others(PEER_TIMEOUT, &message, |mut node, request| async move {
                    node.start_repair(request).await
                })
                .await;
            links += answers.iter().map(|answer| answer.links).sum::<u32>();
            unreachable = silent;
        }
        Ok(Response::new(pb::StartRepairResponse { links, unreachable }))
    }

    async fn list_differences(
        &self,
        request: Request<pb::ListDifferencesRequest>,
    ) -> Result<Response<pb::ListDifferencesResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only_here = is_set(request.metadata(), THIS_NODE_ONLY);
        let message = request.into_inner();
        let peer = self.peer(&message.peer_region)?;
        let namespace = self.gateway.namespace(&message.namespace, call.deadline).await?;
        let limit = rows(message.limit);
        let (mut shards, mut unreachable) = self.own_differences(peer, &namespace, limit).await;
        if !only_here {
            let patience = call.deadline.saturating_duration_since(Instant::now());
            let (answers, silent) = self
                .ask_others(patience, &message, |mut node, request| async move {
                    node.list_differences(request).await
                })
                .await;
            for answer in answers {
                shards.extend(answer.shards);
                unreachable.extend(answer.unreachable);
            }
            unreachable.extend(silent);
        }
        shards.sort_by_key(|row| row.shard);
        Ok(Response::new(pb::ListDifferencesResponse { shards, unreachable }))
    }

    async fn add_region(
        &self,
        request: Request<pb::AddRegionRequest>,
    ) -> Result<Response<pb::AddRegionResponse>, Status> {
        let pb::AddRegionRequest { name, number, link_addresses } = request.get_ref().clone();
        let decision = Decision::Add { number, link_addresses };
        let remote = |mut node: RegionServiceClient<Channel>, request| async move {
            node.add_region(request).await.map(|reply| reply.into_inner().region)
        };
        let region = self.decide_on_leader(&name, request, decision, remote).await?;
        Ok(Response::new(pb::AddRegionResponse { region }))
    }

    async fn fence_region(
        &self,
        request: Request<pb::FenceRegionRequest>,
    ) -> Result<Response<pb::FenceRegionResponse>, Status> {
        let name = request.get_ref().name.clone();
        let remote = |mut node: RegionServiceClient<Channel>, request| async move {
            node.fence_region(request).await.map(|reply| reply.into_inner().region)
        };
        let region = self.decide_on_leader(&name, request, Decision::Fence, remote).await?;
        Ok(Response::new(pb::FenceRegionResponse { region }))
    }

    async fn remove_region(
        &self,
        request: Request<pb::RemoveRegionRequest>,
    ) -> Result<Response<pb::RemoveRegionResponse>, Status> {
        let name = request.get_ref().name.clone();
        let remote = |mut node: RegionServiceClient<Channel>, request| async move {
            node.remove_region(request).await.map(|reply| reply.into_inner().region)
        };
        let region = self.decide_on_leader(&name, request, Decision::Remove, remote).await?;
        Ok(Response::new(pb::RemoveRegionResponse { region }))
    }

    async fn recover_region(
        &self,
        request: Request<pb::RecoverRegionRequest>,
    ) -> Result<Response<pb::RecoverRegionResponse>, Status> {
        let name = request.get_ref().name.clone();
        let remote = |mut node: RegionServiceClient<Channel>, request| async move {
            node.recover_region(request).await.map(|reply| reply.into_inner().region)
        };
        let region = self.decide_on_leader(&name, request, Decision::Recover, remote).await?;
        Ok(Response::new(pb::RecoverRegionResponse { region }))
    }

    async fn list_reviews(
        &self,
        request: Request<pb::ListReviewsRequest>,
    ) -> Result<Response<pb::ListReviewsResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only_here = is_set(request.metadata(), THIS_NODE_ONLY);
        let message = request.into_inner();
        self.check_named(&message.namespace, call.deadline).await?;
        let mut reviews = self.own_reviews(message.limit).await?;
        let mut unreachable = Vec::new();
        if !only_here {
            let (answers, silent) = self
                .ask_others(PEER_TIMEOUT, &message, |mut node, request| async move {
                    node.list_reviews(request).await
                })
                .await;
            reviews.extend(answers.into_iter().flat_map(|answer| answer.reviews));
            unreachable = silent;
        }
        let namespace = message.namespace;
        reviews.retain(|row| namespace.is_empty() || row.namespace == namespace);
        reviews.sort_by(|left, right| {
            (&left.namespace, &left.key).cmp(&(&right.namespace, &right.key))
        });
        Ok(Response::new(pb::ListReviewsResponse { reviews, unreachable }))
    }

    async fn dismiss_reviews(
        &self,
        request: Request<pb::DismissReviewsRequest>,
    ) -> Result<Response<pb::DismissReviewsResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only_here = is_set(request.metadata(), THIS_NODE_ONLY);
        let message = request.into_inner();
        let namespace = match message.namespace.as_str() {
            "catalog" => NamespaceId::CATALOG,
            name => self.gateway.namespace(name, call.deadline).await?.id,
        };
        self.dismiss(namespace, &message.reviews, call).await?;
        let mut unreachable = Vec::new();
        if !only_here {
            let patience = call.deadline.saturating_duration_since(Instant::now());
            let ask = |mut node: RegionServiceClient<Channel>, request| async move {
                node.dismiss_reviews(request).await
            };
            (_, unreachable) = self.ask_others(patience, &message, ask).await;
        }
        Ok(Response::new(pb::DismissReviewsResponse { unreachable }))
    }

    async fn list_at_risk(
        &self,
        request: Request<pb::ListAtRiskRequest>,
    ) -> Result<Response<pb::ListAtRiskResponse>, Status> {
        let call = self.gateway.call(request.metadata());
        let only_here = is_set(request.metadata(), THIS_NODE_ONLY);
        let message = request.into_inner();
        self.check_named(&message.namespace, call.deadline).await?;
        let mut shards = self.own_at_risk(rows(message.limit)).await?;
        let mut unreachable = Vec::new();
        if !only_here {
            let (answers, silent) = self
                .ask_others(PEER_TIMEOUT, &message, |mut node, request| async move {
                    node.list_at_risk(request).await
                })
                .await;
            shards.extend(answers.into_iter().flat_map(|answer| answer.shards));
            unreachable = silent;
        }
        let namespace = message.namespace;
        shards.retain(|row| namespace.is_empty() || row.namespace == namespace);
        shards.sort_by(|left, right| {
            (&left.namespace, left.shard).cmp(&(&right.namespace, right.shard))
        });
        Ok(Response::new(pb::ListAtRiskResponse { shards, unreachable }))
    }
}
