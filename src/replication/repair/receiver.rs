//! The receiving side of a repair: compares, asks, merges through Raft, and moves the frontier.
//!
//! A thread of its own reads this side's pinned cut; the task merges what comes back.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_cluster::Region;
use tombolo_core::{
    Actor, Dot, Members, VersionVector,
    command::Merge,
    ledger::LedgerEntry,
    merkle::{Block, Tree, digest},
    namespace::Namespace,
    repair::{self, Offer, Trust},
};
use tombolo_proto::internal::v1::{self as pb, link_service_client::LinkServiceClient};
use tombolo_shard::{Advanced, Shard, ShardError};
use tombolo_storage::{ShardStore, StorageError};
use tonic::{Status, Streaming, codec::CompressionEncoding};

use super::{decode_block, encode_block, in_background};
use crate::{
    channels::LinkChannels,
    config::{
        CONNECT_TIMEOUT, LEAF_PAGE_BYTES, LIVE_MERGE_BYTES_MAX, LIVE_MERGE_RECORDS_MAX,
        LIVE_REPAIR, LIVE_REST, LIVE_WRITES_WITHIN, MERGE_BYTES_MAX, MERGE_TIMEOUT,
        ReplicationConfig, STALL_TIMEOUT,
    },
    pace::Pace,
    server::message_bytes_max,
    status::{LinkKey, LinkStatuses, RepairProgress},
    wire,
};

/// What to do about a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Take over whatever the source has and this region lacks, and move the frontier.
    CatchUp,
    /// The same, for a region that has nothing yet or may not trust what it has; prove at the end that
    /// both are equal, where that can be told.
    Seed,
    /// Look for damage: what differs although both have applied the same.
    Check,
}

/// What a source is to send of records that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Values whose writes this region has not applied.
    Lacking,
    /// All values.
    Everything,
    /// Keys and dots only.
    Keys,
}

/// What a repair found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Both hold the same, and the source knew these members.
    Equal(Members),
    /// The two were not at the same point: what differs may be under way.
    Moving,
    /// What was lacking is here.
    CaughtUp {
        /// At the source's cut, both trees were equal.
        proved: bool,
        /// What the source knew of the regions.
        members: Members,
    },
    /// Both had applied the same and held different data; now both sides' data is here.
    Damage {
        /// Leaves that differed.
        leaves: usize,
    },
}

/// Why a repair did not end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RepairError {
    /// Try again.
    #[error("{0}")]
    Broken(String),
    /// Two writes carry one dot.
    #[error(
        "two different writes carry the identity {0}: the counters of its region went back; \
         `tombolo ctl region recover` gives that region a new incarnation"
    )]
    DotReused(Dot),
    /// The source knows more writes of this region than it does itself.
    #[error(
        "the peer holds a write of this region that this region does not know: its counters went \
         back; `tombolo ctl region recover`, run in another region, gives it a new incarnation"
    )]
    OwnChangeUnknown,
}

impl From<ShardError> for RepairError {
    fn from(error: ShardError) -> Self {
        Self::Broken(format!("merging failed: {error}"))
    }
}

impl From<Status> for RepairError {
    fn from(status: Status) -> Self {
        Self::Broken(status.message().to_owned())
    }
}

/// One repair of one namespace of a shard.
pub(crate) struct Repair {
    pub(crate) shard: Shard,
    pub(crate) peer: Region,
    /// The same, in its present life.
    pub(crate) source: Actor,
    /// Where the peer's leader of the shard is.
    pub(crate) address: String,
    pub(crate) namespace: Arc<Namespace>,
    pub(crate) channels: LinkChannels,
    pub(crate) statuses: Arc<LinkStatuses>,
    /// Where the link's limit is kept.
    pub(crate) setting: ShardStore,
    /// Shared by all that is under that limit.
    pub(crate) pace: Arc<Pace>,
    pub(crate) config: ReplicationConfig,
}

/// Longest rest for others' sake: a merge that took long did so because the machine was busy, or stood.
const REST_MAX: Duration = Duration::from_secs(1);
/// Between two looks at the link's limit.
const PACE_SLICE: Duration = Duration::from_millis(500);
/// Comparisons before a repair gives up because changes of other regions keep coming.
const ATTEMPTS_MAX: usize = 8;
/// Leaves listed and not answered yet, beyond what the connection holds.
const LISTED_MAX: usize = 4096;

impl Repair {
    /// Repairs. Dropping it is safe at any moment: what is merged stays merged.
    pub(crate) async fn run(self, purpose: Purpose) -> Result<Found, RepairError> {
        if purpose != Purpose::Check {
            self.settle().await?;
        }
        let mut damage = None;
        for _ in 0..ATTEMPTS_MAX {
            let comparison =
                self.compare(if damage.is_some() { Ask::Everything } else { Ask::Lacking }).await?;
            let own = self.shard.actor();
            let claimed = comparison.cut.get(own).max(comparison.ahead.get(own));
            if comparison.since.get(own) < claimed {
                // Before anything is merged: records that have seen these writes would swallow the
                // next ones of this region, which carry the same dots.
                return Err(RepairError::OwnChangeUnknown);
            }
            let same_point = comparison.is_at_same_point();
            let leaves = comparison.leaves.len();
            match (same_point, damage, purpose) {
                (true, None, _) if leaves == 0 => return Ok(Found::Equal(comparison.members)),
                (true, None, _) => {
                    tracing::error!(
                        shard = %self.shard.id(),
                        namespace = %self.namespace.name,
                        peer = %self.peer.name,
                        leaves,
                        "two regions have applied the same and hold different data; \
                         what either holds is kept"
                    );
                    self.statuses.count_repair(self.peer.id, |counts| counts.damage += 1);
                    damage = Some(leaves);
                }
                (true, Some(_), _) => {
                    let session = self.session(Trust::Neither, leaves, purpose);
                    if comparison.merge(session).await?.is_some() {
                        return Ok(Found::Damage { leaves: damage.unwrap_or(leaves) });
                    }
                    damage = None;
                }
                (false, _, Purpose::Check) => return Ok(Found::Moving),
                (false, _, Purpose::CatchUp | Purpose::Seed) => {
                    damage = None;
                    let session = self.session(Trust::Coverage, leaves, purpose);
                    let members = comparison.members.clone();
                    if let Some(proved) = comparison.merge(session).await? {
                        return Ok(Found::CaughtUp { proved, members });
                    }
                }
            }
        }
        match purpose {
            Purpose::Check => Ok(Found::Moving),
            Purpose::CatchUp | Purpose::Seed => Err(RepairError::Broken(
                "changes of other regions kept coming during the repair".to_owned(),
            )),
        }
    }

    /// Waits for what an earlier repair proposed and did not wait for, by merging nothing behind it.
    ///
    /// Merged between the comparison and the end of this repair, it could bring back what the source
    /// has seen replaced, where both sides were equal: the frontier would cover that, unseen.
    async fn settle(&self) -> Result<(), RepairError> {
        let nothing = Merge {
            namespace: self.namespace.id,
            rule: self.namespace.rule,
            local: self.shard.actor(),
            source: self.source,
            time: self.shard.clock().now(),
            cut: VersionVector::new(),
            ahead: VersionVector::new(),
            trust: Trust::Coverage,
            offers: Vec::new(),
            ledger: Vec::new(),
        };
        self.shard.merge(nothing, Instant::now() + MERGE_TIMEOUT).await?;
        Ok(())
    }

    fn session(&self, trust: Trust, leaves: usize, purpose: Purpose) -> Session<'_> {
        let progress = RepairProgress::new(leaves);
        Session { repair: self, purpose, trust, waiting: VecDeque::new(), bytes: 0, progress }
    }

    /// Rests after a merge of so many bytes, which took so long.
    async fn rest(&self, took: Duration, bytes: usize, progress: &RepairProgress) {
        #[expect(clippy::cast_precision_loss, reason = "a pause needs no exact figure")]
        let budget = bytes as f64 / self.config.repair_bytes_per_second.max(1) as f64;
        let budget = Duration::from_secs_f64(budget).saturating_sub(took);
        let is_live = self.shard.wrote_within(LIVE_WRITES_WITHIN);
        let yields = if is_live { live_rest(progress.time_left()) } else { 1.0 };
        tokio::time::sleep(budget.max(took.mul_f64(yields).min(REST_MAX))).await;
        let limit = || self.setting.link(self.peer.id).bytes_per_second;
        self.pace.spend(bytes as u64, limit());
        // In slices, so that a limit that was lifted counts at once.
        while let Some(wait) = self.pace.wait(limit()) {
            tokio::time::sleep(wait.min(PACE_SLICE)).await;
        }
    }

    fn key(&self) -> LinkKey {
        LinkKey { peer: self.peer.id, namespace: self.namespace.id, shard: self.shard.id() }
    }

    /// Pins this side, asks for the other's cut, and finds what differs.
    pub(super) async fn compare(&self, ask: Ask) -> Result<Comparison, RepairError> {
        let (started, start) = oneshot::channel();
        let (leaves, to_list) = oneshot::channel();
        let (requests, receiver) = mpsc::channel(4);
        let (listed, answers_of) = mpsc::channel(LISTED_MAX);
        let lister = Lister {
            store: self.shard.store().clone(),
            key: self.key(),
            statuses: Arc::clone(&self.statuses),
            requests: requests.clone(),
            listed,
        };
        in_background("repair lister", move || lister.run(started, to_list))
            .map_err(|error| RepairError::Broken(format!("no thread to list data: {error}")))?;
        let start = start.await.map_err(|_| broken("this side's data cannot be read"))?;

        let open = pb::RepairOpen {
            identity: Some(wire::link_identity(
                self.shard.topology(),
                self.shard.own_member(),
                &self.peer,
            )),
            shard: u32::from(self.shard.id().0),
            namespace: self.namespace.id.0,
            frontier: wire::encode_frontier(&start.frontier),
            nodes: encode_block(&start.tree.nodes()),
            distrust: ask == Ask::Everything,
            keys_only: ask == Ask::Keys,
        };
        // The channel is new and has room.
        let _ = requests
            .try_send(pb::RepairRequest { body: Some(pb::repair_request::Body::Open(open)) });
        drop(requests);
        let channel = self
            .channels
            .get(&self.address)
            .map_err(|error| RepairError::Broken(format!("`{}`: {error}", self.address)))?;
        let mut client = LinkServiceClient::new(channel)
            .accept_compressed(CompressionEncoding::Zstd)
            .send_compressed(CompressionEncoding::Zstd)
            .max_decoding_message_size(message_bytes_max());
        let opening = async {
            let mut stream = client.repair(ReceiverStream::new(receiver)).await?.into_inner();
            let first = stream.message().await?;
            Ok::<_, Status>((stream, first))
        };
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, opening).await;
        let (stream, first) = opened.map_err(|_| broken("the peer did not answer in time"))??;
        let bytes = first.as_ref().map_or(0, Message::encoded_len);
        self.statuses.count_exchanged(self.key(), bytes);
        let Some(pb::repair_response::Body::Cut(cut)) = first.and_then(|first| first.body) else {
            return Err(broken("the peer did not begin with its cut"));
        };
        let mut differing = Vec::new();
        let mut nodes = Box::new(start.tree.nodes());
        for node in cut.nodes {
            let high = u8::try_from(node.node).ok();
            let block = decode_block(&node.leaves);
            let (Some(high), Some(block)) = (high, block) else {
                return Err(broken("the peer sent a malformed node"));
            };
            differing.extend(repair::differing_leaves(&start.tree, high, &block));
            nodes[usize::from(high)] = block.iter().fold(0, |node, leaf| node ^ leaf);
        }
        Ok(Comparison {
            since: start.frontier,
            ahead_here: start.ahead,
            cut: wire::decode_frontier(cut.frontier)?,
            ahead: wire::decode_frontier(cut.ahead)?,
            members: wire::decode_members(cut.members)?,
            local: self.shard.actor(),
            leaves: differing,
            nodes,
            to_list: leaves,
            listed: answers_of,
            stream,
            key: self.key(),
            statuses: Arc::clone(&self.statuses),
        })
    }
}

/// This side as it was when a comparison began.
struct Start {
    frontier: VersionVector,
    ahead: VersionVector,
    tree: Tree,
}

/// Reads this side's cut on a thread of its own.
struct Lister {
    store: ShardStore,
    key: LinkKey,
    statuses: Arc<LinkStatuses>,
    requests: mpsc::Sender<pb::RepairRequest>,
    listed: mpsc::Sender<Result<Listed, StorageError>>,
}

/// A leaf of this side.
struct Listed {
    leaf: u16,
    keys: Vec<(Bytes, u64)>,
}

impl Lister {
    fn run(self, started: oneshot::Sender<Start>, to_list: oneshot::Receiver<Vec<u16>>) {
        let cut = self.store.cut(self.key.namespace);
        let start = Start {
            frontier: cut.frontier().clone(),
            ahead: cut.ahead().clone(),
            tree: cut.tree().clone(),
        };
        if started.send(start).is_err() {
            return;
        }
        // Nothing to list: the repair ended with the comparison.
        let Ok(leaves) = to_list.blocking_recv() else { return };
        let mut page = pb::RepairLeaves::default();
        let mut bytes = 0;
        for leaf in leaves {
            let keys = match self.list(&cut, leaf) {
                Ok(keys) => keys,
                Err(error) => {
                    // The stream ends without what the peer waits for, and the repair with it.
                    let _ = self.listed.blocking_send(Err(error));
                    return;
                }
            };
            let digests: Vec<u8> =
                keys.iter().flat_map(|(_, digest)| digest.to_le_bytes()).collect();
            bytes += digests.len() + 8;
            page.leaves.push(pb::RepairLeaf { leaf: u32::from(leaf), digests: digests.into() });
            if self.listed.blocking_send(Ok(Listed { leaf, keys })).is_err() {
                return;
            }
            if bytes >= LEAF_PAGE_BYTES || page.leaves.len() >= LISTED_MAX / 4 {
                bytes = 0;
                if !self.send(std::mem::take(&mut page)) {
                    return;
                }
            }
        }
        if !page.leaves.is_empty() {
            self.send(page);
        }
    }

    fn list(
        &self,
        cut: &tombolo_storage::Cut<'_>,
        leaf: u16,
    ) -> Result<Vec<(Bytes, u64)>, StorageError> {
        let held = cut.leaf(leaf)?.into_iter();
        Ok(held.map(|(key, record)| (key.clone(), digest(&key, &record))).collect())
    }

    fn send(&self, page: pb::RepairLeaves) -> bool {
        let page = pb::RepairRequest { body: Some(pb::repair_request::Body::Leaves(page)) };
        self.statuses.count_exchanged(self.key, page.encoded_len());
        self.requests.blocking_send(page).is_ok()
    }
}

/// Both sides, as of one moment each.
pub(super) struct Comparison {
    /// What this side had applied.
    since: VersionVector,
    ahead_here: VersionVector,
    /// What the other side had applied.
    cut: VersionVector,
    ahead: VersionVector,
    /// What the other side knew of the regions.
    members: Members,
    /// This region, in its present life.
    local: Actor,
    /// Where the trees differ.
    leaves: Vec<u16>,
    /// The middle level of the other side's tree.
    nodes: Box<Block>,
    to_list: oneshot::Sender<Vec<u16>>,
    listed: mpsc::Receiver<Result<Listed, StorageError>>,
    stream: Streaming<pb::RepairResponse>,
    key: LinkKey,
    statuses: Arc<LinkStatuses>,
}

impl Comparison {
    /// Whether both sides had applied the same, and no repair was half done in either.
    pub(super) fn is_at_same_point(&self) -> bool {
        let is_exact = self.since.covers_all(&self.ahead_here) && self.cut.covers_all(&self.ahead);
        is_exact && self.since == self.cut
    }

    /// Whether all that this side had is known to the other at its cut, so that once that is merged
    /// both trees are equal.
    fn contains_this_side(&self) -> bool {
        let here = [&self.since, &self.ahead_here, &self.ahead];
        here.into_iter().all(|vector| self.cut.covers_all(vector))
    }

    /// The keys that differ, each with what the other side holds of it; at most `limit`, and whether
    /// there are more.
    pub(super) async fn keys(mut self, limit: usize) -> Result<(Vec<Offer>, bool), RepairError> {
        let mut answered = 0;
        let leaves = self.start_listing();
        let mut found = Vec::new();
        let mut offered = Vec::new();
        while answered < leaves {
            let Some(pb::repair_response::Body::Answer(answer)) = self.next().await? else {
                return Err(self.ended_early().await);
            };
            for encoded in answer.offers {
                let offer = decode_offer(encoded)?;
                offered.push(offer.key.clone());
                found.push(offer);
            }
            if !answer.more {
                let listed = self.listed_of(answer.leaf).await?;
                found.extend(repair::absent_offers(&listed.keys, &offered, &answer.unknown));
                offered.clear();
                answered += 1;
            }
            if found.len() > limit {
                found.truncate(limit);
                return Ok((found, true));
            }
        }
        Ok((found, false))
    }

    /// Lets the lister begin; answers how many leaves it lists.
    fn start_listing(&mut self) -> usize {
        let leaves = std::mem::take(&mut self.leaves);
        let count = leaves.len();
        // If the lister is gone, so is the stream that waits for it.
        let to_list = std::mem::replace(&mut self.to_list, oneshot::channel().0);
        let _ = to_list.send(leaves);
        count
    }

    async fn next(&mut self) -> Result<Option<pb::repair_response::Body>, RepairError> {
        let message = tokio::time::timeout(STALL_TIMEOUT, self.stream.message()).await;
        let message = message.map_err(|_| broken("the peer was silent for too long"))??;
        let bytes = message.as_ref().map_or(0, Message::encoded_len);
        self.statuses.count_exchanged(self.key, bytes);
        Ok(message.and_then(|message| message.body))
    }

    /// What this side has in the leaf that was answered: the peer answers in the order of listing.
    async fn listed_of(&mut self, leaf: u32) -> Result<Listed, RepairError> {
        match self.listed.recv().await {
            Some(Ok(listed)) if u32::from(listed.leaf) == leaf => Ok(listed),
            Some(Err(error)) => Err(unreadable(&error)),
            Some(Ok(_)) | None => Err(broken("the peer answered a leaf out of turn")),
        }
    }

    /// Why the peer ended before all leaves were answered: this side could not list them, or its
    /// own reasons.
    async fn ended_early(&mut self) -> RepairError {
        match self.listed.recv().await {
            Some(Err(error)) => unreadable(&error),
            Some(Ok(_)) | None => broken("the peer ended before all leaves were answered"),
        }
    }

    /// Takes over what differs. Once all of it is here, answers whether that is proved. `None` if
    /// changes came in between that make the comparison void.
    async fn merge(mut self, mut session: Session<'_>) -> Result<Option<bool>, RepairError> {
        self.start_listing();
        session.show();
        let mut offered = Vec::new();
        loop {
            match self.next().await? {
                Some(pb::repair_response::Body::Answer(answer)) => {
                    check(answer.checksum, &answer.offers)?;
                    for encoded in answer.offers {
                        offered.push(session.offer(encoded)?);
                    }
                    if !answer.more {
                        let listed = self.listed_of(answer.leaf).await?;
                        if session.trust == Trust::Coverage {
                            let unknown = &answer.unknown;
                            let absent = repair::absent_offers(&listed.keys, &offered, unknown);
                            for offer in absent {
                                session.bring(offer.key.len(), Brought::Offer(offer));
                            }
                        }
                        offered.clear();
                        session.progress.leaves_done += 1;
                    }
                }
                Some(pb::repair_response::Body::Rest(rest)) => {
                    check(rest.checksum, rest.offers.iter().chain(&rest.ledger))?;
                    for encoded in rest.offers {
                        session.offer(encoded)?;
                    }
                    for encoded in rest.ledger {
                        session.entry(encoded)?;
                    }
                }
                Some(pb::repair_response::Body::End(_)) => break,
                Some(pb::repair_response::Body::Cut(_)) => {
                    return Err(broken("the peer began a second time"));
                }
                None => return Err(broken("the peer ended the repair")),
            }
            while session.is_full() {
                if !session.flush(&self).await? {
                    return Ok(None);
                }
            }
        }
        if session.progress.leaves_done < session.progress.leaves_total {
            return Err(self.ended_early().await);
        }
        while !session.waiting.is_empty() {
            if !session.flush(&self).await? {
                return Ok(None);
            }
        }
        session.finish(&self).await
    }
}

/// Something that came and is to be merged.
enum Brought {
    Offer(Offer),
    Entry(LedgerEntry),
}

/// What has come and is not merged yet, and how far it is.
struct Session<'a> {
    repair: &'a Repair,
    purpose: Purpose,
    trust: Trust,
    /// In the order in which it came, which is the order in which it is merged, with its bytes.
    waiting: VecDeque<(usize, Brought)>,
    bytes: usize,
    progress: RepairProgress,
}

impl Session<'_> {
    /// What is merged at once, in bytes and in records: less where clients may write.
    fn merge_max(&self) -> (usize, usize) {
        match self.purpose {
            Purpose::Seed => (MERGE_BYTES_MAX, usize::MAX),
            Purpose::CatchUp | Purpose::Check => (LIVE_MERGE_BYTES_MAX, LIVE_MERGE_RECORDS_MAX),
        }
    }

    /// Whether what has come is enough for a merge.
    fn is_full(&self) -> bool {
        let (bytes_max, records_max) = self.merge_max();
        bytes_max <= self.bytes || records_max <= self.waiting.len()
    }

    fn bring(&mut self, bytes: usize, brought: Brought) {
        self.bytes += bytes;
        self.waiting.push_back((bytes, brought));
    }

    /// Takes what is merged next, and its bytes.
    fn take(&mut self) -> (Vec<Offer>, Vec<LedgerEntry>, usize) {
        let (bytes_max, records_max) = self.merge_max();
        let (mut offers, mut ledger, mut taken) = (Vec::new(), Vec::new(), 0);
        while taken < bytes_max
            && offers.len() + ledger.len() < records_max
            && let Some((bytes, brought)) = self.waiting.pop_front()
        {
            taken += bytes;
            match brought {
                Brought::Offer(offer) => offers.push(offer),
                Brought::Entry(entry) => ledger.push(entry),
            }
        }
        self.bytes -= taken;
        (offers, ledger, taken)
    }

    fn offer(&mut self, encoded: Bytes) -> Result<Bytes, RepairError> {
        let bytes = encoded.len();
        let offer = decode_offer(encoded)?;
        let key = offer.key.clone();
        self.bring(bytes, Brought::Offer(offer));
        Ok(key)
    }

    fn entry(&mut self, encoded: Bytes) -> Result<(), RepairError> {
        let bytes = encoded.len();
        let entry = LedgerEntry::from_bytes(encoded)
            .map_err(|error| RepairError::Broken(format!("a damaged entry arrived: {error}")))?;
        self.bring(bytes, Brought::Entry(entry));
        Ok(())
    }

    /// Merges the next of what has come, then rests: at least as long as that took, far longer while
    /// clients write here, and as long as the byte budget and the link's limit say.
    /// Answers `false` if what was compared has changed since.
    async fn flush(&mut self, comparison: &Comparison) -> Result<bool, RepairError> {
        let Repair { shard, namespace, .. } = self.repair;
        // Between regions that hold the same there may be nothing.
        if self.waiting.is_empty() {
            return Ok(true);
        }
        let began = Instant::now();
        let (offers, ledger, bytes) = self.take();
        let merge = Merge {
            namespace: namespace.id,
            rule: namespace.rule,
            local: comparison.local,
            source: self.repair.source,
            time: shard.clock().now(),
            cut: comparison.cut.clone(),
            ahead: comparison.ahead.clone(),
            trust: self.trust,
            offers,
            ledger,
        };
        let Some(merged) = shard.merge(merge, began + MERGE_TIMEOUT).await? else {
            return Ok(false);
        };
        if let Some(dot) = merged.reused {
            return Err(RepairError::DotReused(dot));
        }
        self.progress.records += merged.changed;
        let Repair { statuses, peer, .. } = self.repair;
        statuses.count_repair(peer.id, |counts| counts.records += merged.changed);
        self.show();
        self.repair.rest(began.elapsed(), bytes, &self.progress).await;
        Ok(true)
    }

    /// Moves the frontier to the cut, and answers whether it is proved that both are equal there.
    async fn finish(&self, comparison: &Comparison) -> Result<Option<bool>, RepairError> {
        if self.trust == Trust::Neither {
            return Ok(Some(false));
        }
        let proved = self.purpose == Purpose::Seed && comparison.contains_this_side();
        if proved {
            self.prove(comparison)?;
        }
        let Repair { shard, namespace, .. } = self.repair;
        let (since, cut) = (comparison.since.clone(), comparison.cut.clone());
        let (ahead, deadline) = (comparison.ahead.clone(), Instant::now() + MERGE_TIMEOUT);
        let source = self.repair.source;
        let between = (comparison.local, source);
        match shard.advance(namespace.id, between, since, cut, ahead, deadline).await? {
            Advanced::Done => Ok(Some(proved)),
            Advanced::Moved => Ok(None),
            Advanced::OwnChangeUnknown => Err(RepairError::OwnChangeUnknown),
        }
    }

    /// Compares this side's tree with the source's, now that everything of its cut is merged.
    fn prove(&self, comparison: &Comparison) -> Result<(), RepairError> {
        let Repair { shard, namespace, peer, .. } = self.repair;
        let nodes = shard.store().cut(namespace.id).tree().nodes();
        let differing = repair::differing_nodes(&nodes, &comparison.nodes).len();
        if differing == 0 {
            return Ok(());
        }
        self.repair.statuses.count_repair(peer.id, |counts| counts.damage += 1);
        Err(RepairError::Broken(format!(
            "all of the peer's data is here and {differing} nodes of the Merkle tree differ; begins again"
        )))
    }

    fn show(&self) {
        let mut progress = self.progress.clone();
        self.repair.statuses.update(self.repair.key(), |status| {
            // Counted where messages come and go.
            progress.exchanged_bytes = status.repair.as_ref().map_or(0, |it| it.exchanged_bytes);
            status.repair = Some(progress);
        });
    }
}

/// How long to rest for clients, in times of what a merge took, if a repair would still take so long.
fn live_rest(left: Option<Duration>) -> f64 {
    let left = left.map_or(0.0, |left| left.as_secs_f64());
    let share = LIVE_REPAIR.as_secs_f64() / left.max(1.0);
    (LIVE_REST * share.min(1.0)).max(1.0)
}

fn check<'a>(sum: u64, parts: impl IntoIterator<Item = &'a Bytes>) -> Result<(), RepairError> {
    if wire::checksum(parts) == sum { Ok(()) } else { Err(broken("a page arrived damaged")) }
}

fn decode_offer(encoded: Bytes) -> Result<Offer, RepairError> {
    Offer::from_bytes(encoded)
        .map_err(|error| RepairError::Broken(format!("a damaged offer arrived: {error}")))
}

fn unreadable(error: &StorageError) -> RepairError {
    RepairError::Broken(format!("this side's data: {error}"))
}

fn broken(reason: &str) -> RepairError {
    RepairError::Broken(reason.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repair_makes_way_for_clients_unless_it_would_never_end() {
        assert!((live_rest(None) - LIVE_REST).abs() < 1e-9);
        assert!((live_rest(Some(LIVE_REPAIR)) - LIVE_REST).abs() < 1e-9);
        assert!((live_rest(Some(LIVE_REPAIR * 4)) - LIVE_REST / 4.0).abs() < 1e-9);
        assert!((live_rest(Some(Duration::from_secs(1 << 30))) - 1.0).abs() < 1e-9);
    }
}
