//! Streams: `puller` and `feed` of `tombolo-replication`, a message at a time.

use std::time::Duration;

use tombolo_core::{
    Change, Command, VersionVector, command::Ingest, outgoing::Outgoing, pending::Pending,
};

use crate::{
    link::{Due, Feed, Reply, Request, Stream},
    mutant::Mutant,
    region::{CLOCK_OFFSET_MAX_MS, NAMESPACE, Region, Waiter},
};

use super::World;

const WATCHDOG: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(500);

impl World {
    pub(super) fn stream(&mut self, puller: usize, source: usize) -> Option<&mut Stream> {
        self.regions.get_mut(puller)?.leader.streams.get_mut(&source)
    }

    pub(super) fn stream_of(
        &mut self,
        puller: usize,
        source: usize,
        session: u64,
    ) -> Option<&mut Stream> {
        self.stream(puller, source).filter(|stream| stream.session == session)
    }

    pub(super) fn passes(&self, from: usize, to: usize) -> bool {
        !self.cuts.contains(&(from, to))
    }

    /// Whether a region takes from another, and that one serves it.
    fn may_pull(&self, puller: &Region, source: &Region) -> bool {
        let is_unheard = !source.knows(puller)
            || source.members().get(puller.id).incarnation < puller.actor().incarnation;
        let is_served = source.admits(puller) || (is_unheard && self.is(Mutant::ServeUnheard));
        let serves = !source.is_joining() || self.is(Mutant::TellBeforeRepair);
        let exist = puller.exists && source.exists && puller.id != source.id;
        exist && is_served && serves && puller.admits(source) && !puller.leader.starts_over
    }

    pub(super) fn open(&mut self, puller: usize, source: usize) {
        let is_open = self.stream(puller, source).is_some();
        let passes = self.passes(puller, source) && self.passes(source, puller);
        let (Some(from), Some(to)) = (self.regions.get(source), self.regions.get(puller)) else {
            return;
        };
        if is_open || !passes || !self.may_pull(to, from) {
            return;
        }
        let must_repair = to.is_joining() && !self.has_repaired_from(to, from.actor());
        let (local, from) = (to.actor(), from.actor());
        self.sessions += 1;
        let (session, now, id) = (self.sessions, self.now, self.regions[source].id);
        let region = &mut self.regions[puller];
        region.leader.relays.up(id);
        let relayed = region.leader.relays.relayed_by(id, now);
        let stream = Stream {
            session,
            local,
            source: from,
            pending: Pending::default(),
            acknowledged: VersionVector::new(),
            trimmed: None,
            due: must_repair.then_some(Due { compare: false, at: now, tried: 0 }),
            repair: None,
            relayed,
            ingesting: false,
            heard: now,
            moved: now,
        };
        region.leader.streams.insert(source, stream);
        self.begin(puller, source);
    }

    /// Subscribes at this region's frontier.
    pub(super) fn begin(&mut self, puller: usize, source: usize) {
        let always = self.is(Mutant::RelayAlways);
        let ids = self.ids();
        let region = &mut self.regions[puller];
        let frontier = region.data.frontier();
        if region.is_joining() {
            // It takes no changes until it has repaired.
            return;
        }
        let Some(stream) = region.leader.streams.get_mut(&source) else { return };
        let mut origins = stream.relayed.clone();
        if always {
            origins.extend(ids.into_iter().filter(|&id| id != region.id));
        }
        stream.acknowledged = frontier.clone();
        if stream.trimmed.take().is_some() {
            stream.due = None;
        }
        if let Some(link) = self.links.get_mut(&(puller, source)) {
            link.requests.push_back(Request::Subscribe(frontier, origins));
        }
    }

    pub(super) fn break_stream(&mut self, puller: usize, source: usize) {
        let now = self.now;
        let Some(link) = self.links.get_mut(&(puller, source)) else { return };
        let Some(region) = self.regions.get_mut(puller) else { return };
        if let Some(stream) = region.leader.streams.remove(&source) {
            link.break_off(stream.local);
            region.leader.retry_at.insert(source, now + RETRY);
            let id = self.regions[source].id;
            self.regions[puller].leader.relays.down(id, now);
            let leader = &mut self.regions[source].leader;
            leader.feeds.remove(&puller);
            leader.sources.remove(&puller);
        }
    }

    /// All streams of a region, this way and that.
    pub(super) fn break_all(&mut self, at: usize) {
        for other in (0..self.regions.len()).filter(|&other| other != at) {
            self.break_stream(at, other);
            self.break_stream(other, at);
        }
    }

    pub(super) fn request_arrives(&mut self, puller: usize, source: usize) {
        if !self.passes(puller, source) {
            return;
        }
        let Some(peer) = self.stream(puller, source).map(|stream| stream.local) else { return };
        let Some(link) = self.links.get_mut(&(puller, source)) else { return };
        let own = self.regions[source].id;
        let leader = &mut self.regions[source].leader;
        match link.requests.pop_front() {
            Some(Request::Subscribe(frontier, mut origins)) => {
                leader.acknowledged.entry(peer).or_default().join(&frontier);
                origins.insert(own);
                let outgoing = Outgoing::new(origins, frontier);
                leader.feeds.insert(puller, Feed { outgoing, told: None, trimmed: false });
            }
            Some(Request::Acknowledge(frontier)) => {
                leader.acknowledged.entry(peer).or_default().join(&frontier);
                if let Some(feed) = leader.feeds.get_mut(&puller) {
                    feed.outgoing.acknowledged(&frontier);
                }
            }
            None => {}
        }
        self.touched.insert(source);
    }

    pub(super) fn late_arrives(&mut self, puller: usize, source: usize) {
        let Some(link) = self.links.get_mut(&(puller, source)) else { return };
        if let Some((peer, frontier)) = link.late.pop_front() {
            self.regions[source].leader.acknowledged.entry(peer).or_default().join(&frontier);
            self.touched.insert(source);
        }
    }

    pub(super) fn reply_arrives(&mut self, puller: usize, source: usize) {
        if !self.passes(source, puller) || self.stream(puller, source).is_none() {
            return;
        }
        let Some(link) = self.links.get_mut(&(puller, source)) else { return };
        let Some(reply) = link.replies.pop_front() else { return };
        let (settles_at_once, early) =
            (self.is(Mutant::SettleAtOnce), self.is(Mutant::AcknowledgeArrived));
        let ignores_members = self.is(Mutant::TellWithoutMembers);
        let (now, id) = (self.now, self.regions[source].id);
        let region = &mut self.regions[puller];
        let (local, known) = (region.data.frontier(), region.members().clone());
        let leader = &mut region.leader;
        let Some(stream) = leader.streams.get_mut(&source) else { return };
        stream.heard = now;
        match reply {
            Reply::Changes(changes) => {
                self.received[puller] += changes.len() as u64;
                if early && let Some(link) = self.links.get_mut(&(puller, source)) {
                    let mut arrived = local;
                    changes.iter().for_each(|change| arrived.add(change.last()));
                    link.requests.push_back(Request::Acknowledge(arrived));
                }
                changes.into_iter().for_each(|change| stream.pending.push(change, 1));
            }
            Reply::Told(frontier, members) => {
                leader.relays.tell(id, NAMESPACE, frontier.clone());
                if !known.know_all_of(&members) && !ignores_members {
                    self.counts.untold += 1;
                    return;
                }
                leader.fences.tell(stream.source, &frontier, &members);
                let told = leader.told.entry(stream.source).or_default();
                let local = if settles_at_once { frontier.clone() } else { local };
                told.tell(id, frontier, &local);
            }
            Reply::Trimmed(trimmed) => {
                stream.trimmed = Some(trimmed);
                stream.due = Some(Due { compare: false, at: now, tried: 0 });
            }
        }
    }

    /// The source sends one batch.
    pub(super) fn send(&mut self, puller: usize, source: usize) {
        let (batch, mutant) = (self.batch, self.mutant);
        let Some(region) = self.regions.get_mut(source) else { return };
        let Some(feed) = region.leader.feeds.get_mut(&puller) else { return };
        if feed.trimmed || feed.outgoing.in_flight_bytes() >= 3 * batch {
            return;
        }
        let behind = feed.outgoing.behind(&region.data.frontier());
        if behind.is_empty() {
            return;
        }
        let trimmed = region.data.trimmed();
        let reply = if feed.outgoing.is_trimmed(&behind, &trimmed) {
            feed.trimmed = true;
            Reply::Trimmed(trimmed)
        } else {
            let waiting =
                behind.into_iter().map(|(actor, from)| region.data.log(actor, from)).collect();
            let changes = feed.outgoing.take(waiting, batch, |change: &Change| (change, 1));
            if changes.is_empty() {
                return;
            }
            Reply::Changes(changes.into_iter().flat_map(|it| as_sent(it, mutant)).collect())
        };
        if let Some(link) = self.links.get_mut(&(puller, source)) {
            link.replies.push_back(reply);
        }
    }

    pub(super) fn tell(&mut self, puller: usize, source: usize) {
        let now = self.now;
        let tells_early = self.is(Mutant::TellBeforeRepair);
        let Some(region) = self.regions.get_mut(source) else { return };
        let (frontier, members) = (region.data.frontier(), region.members().clone());
        if region.is_joining() && !tells_early {
            return;
        }
        let Some(feed) = region.leader.feeds.get_mut(&puller) else { return };
        let is_due = feed
            .told
            .as_ref()
            .is_none_or(|(told, at)| *told != frontier || now.saturating_sub(*at) >= HEARTBEAT);
        if is_due && let Some(link) = self.links.get_mut(&(puller, source)) {
            link.replies.push_back(Reply::Told(frontier.clone(), members));
            feed.told = Some((frontier, now));
        }
    }

    /// The puller proposes what has arrived and may go.
    pub(super) fn apply(&mut self, puller: usize, source: usize) {
        let (batch, rule, now) = (self.batch, self.rule, self.now);
        let Some(region) = self.regions.get_mut(puller) else { return };
        let (frontier, local) = (region.data.frontier(), region.actor());
        let (is_repairing, wall_ms) = (region.leader.is_repairing(), region.wall_ms(now));
        let Some(stream) = region.leader.streams.get_mut(&source) else { return };
        if stream.ingesting || (is_repairing && self.gate) {
            return;
        }
        let changes = stream.pending.take_ready(&frontier, batch);
        if changes.is_empty() {
            return;
        }
        stream.ingesting = true;
        let from = stream.source;
        let waiter = Waiter::Stream(source, stream.session);
        for change in &changes {
            // A time beyond the bound is applied but never moves the clock.
            let _ = region.clock.observe(change.time(), wall_ms, CLOCK_OFFSET_MAX_MS);
        }
        let time = region.wall_time(now);
        let ingest = Ingest { namespace: NAMESPACE, rule, local, source: from, time, changes };
        self.propose(puller, Command::Ingest(ingest), waiter);
    }

    /// Tells the source what is applied here, if it changed.
    pub(super) fn acknowledge(&mut self, puller: usize, source: usize) {
        let region = &self.regions[puller];
        let (frontier, joins) = (region.data.frontier(), region.is_joining());
        let Some(stream) = self.stream(puller, source) else { return };
        if stream.acknowledged != frontier && !joins {
            stream.acknowledged = frontier.clone();
            if let Some(link) = self.links.get_mut(&(puller, source)) {
                link.requests.push_back(Request::Acknowledge(frontier));
            }
        }
    }

    /// What a puller's leader does now and then.
    pub(super) fn tick(&mut self, at: usize) {
        let Some(region) = self.regions.get(at) else { return };
        if !region.exists {
            return;
        }
        self.come_back(at);
        self.propose_heard(at);
        let others: Vec<usize> = (0..self.regions.len()).filter(|&other| other != at).collect();
        for &source in &others {
            let retry_at = self.regions[at].leader.retry_at.get(&source).copied();
            if retry_at.is_none_or(|retry_at| retry_at <= self.now) {
                self.open(at, source);
            }
            self.acknowledge(at, source);
            self.follow_relays(at, source);
            self.begin_untrimmed(at, source);
            self.watch(at, source);
        }
        self.go_on_joining(at);
        self.start_repair(at);
    }

    pub(super) fn follow_relays(&mut self, puller: usize, source: usize) {
        let (id, now) = (self.regions[source].id, self.now);
        let leader = &mut self.regions[puller].leader;
        let relayed = leader.relays.relayed_by(id, now);
        let Some(stream) = leader.streams.get_mut(&source) else { return };
        if stream.relayed != relayed {
            stream.relayed = relayed;
            self.begin(puller, source);
        }
    }

    pub(super) fn begin_untrimmed(&mut self, puller: usize, source: usize) {
        let frontier = self.regions[puller].data.frontier();
        let Some(stream) = self.stream(puller, source) else { return };
        if stream.trimmed.as_ref().is_some_and(|trimmed| frontier.covers_all(trimmed)) {
            self.begin(puller, source);
        }
    }

    pub(super) fn watch(&mut self, puller: usize, source: usize) {
        let now = self.now;
        let is_repairing = self.regions[puller].leader.is_repairing();
        let Some(stream) = self.stream(puller, source) else { return };
        if is_repairing || (stream.pending.is_empty() && !stream.ingesting) {
            stream.moved = now;
        }
        let is_long = |since: Duration| now.saturating_sub(since) > WATCHDOG;
        if is_long(stream.moved) || is_long(stream.heard) {
            self.break_stream(puller, source);
        }
    }
}

/// A change as the source sends it.
fn as_sent(mut change: Change, mutant: Option<Mutant>) -> Vec<Change> {
    match mutant {
        Some(Mutant::ForgetDependencies) => {
            let own = change.depends_on.iter().filter(|(actor, _)| *actor == change.actor);
            change.depends_on = own.collect();
            vec![change]
        }
        Some(Mutant::SplitBatches) => {
            let (actor, mut depends_on) = (change.actor, change.depends_on);
            let request = change.request;
            let split = change.deltas.into_iter().map(|delta| {
                let dot = delta.sibling.dot;
                let before = depends_on.clone();
                depends_on.add(dot);
                let (first_seq, ahead_by) = (dot.seq, VersionVector::new());
                let (depends_on, deltas) = (before, vec![delta]);
                Change { actor, first_seq, depends_on, ahead_by, request, deltas }
            });
            split.collect()
        }
        _ => vec![change],
    }
}
