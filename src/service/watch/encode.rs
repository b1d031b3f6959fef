//! What a watcher is sent, as messages.

use bytes::Bytes;
use tombolo_cluster::Topology;
use tombolo_core::{
    Content, Dot, HybridTime, Record, Rule,
    element::{self, Element, Kind, Part},
    feed::{Conflict, Filter, Lost},
    ledger::LedgerId,
    record::Sibling,
};
use tombolo_proto::v1::{self as pb, watch_event::Body};
use tombolo_shard::{Event, FeedBatch, Previous};

use crate::convert::{Scope, encode_dot, timestamp};

/// Makes responses of what one shard gave.
pub(super) struct Encoder<'a> {
    pub(super) scope: Scope<'a>,
    pub(super) rule: Rule,
    pub(super) filter: &'a Filter,
    pub(super) shard: u32,
    /// About how large a response may get; one event may be larger.
    pub(super) bytes_max: usize,
}

impl Encoder<'_> {
    /// The responses, in order, without tokens. The records of a snapshot are in one, the last, so that
    /// a token comes with them.
    pub(super) fn responses(&self, batch: FeedBatch, shards_left: usize) -> Vec<pb::WatchResponse> {
        let mut responses = Vec::new();
        let mut events = Vec::new();
        let mut bytes = 0;
        if let Some(lost) = batch.lost {
            events.push(self.event(Body::Reset(reset(lost))));
        }
        for event in batch.events {
            let size = bytes_of(&event);
            if !events.is_empty() && self.bytes_max < bytes + size {
                let events = std::mem::take(&mut events);
                responses.push(pb::WatchResponse { resume_token: Bytes::new(), events });
                bytes = 0;
            }
            bytes += size;
            events.push(self.event(Body::Change(change(self.scope.topology, self.rule, event))));
        }
        if !batch.records.is_empty() && self.bytes_max < bytes {
            let events = std::mem::take(&mut events);
            responses.push(pb::WatchResponse { resume_token: Bytes::new(), events });
        }
        for (key, record) in &batch.records {
            events.extend(self.entry(key, record).map(|it| self.event(Body::SnapshotEntry(it))));
        }
        if batch.is_done {
            let shards_left = u32::try_from(shards_left).unwrap_or(u32::MAX);
            events.push(self.event(Body::SnapshotDone(pb::SnapshotDone { shards_left })));
        }
        if !events.is_empty() {
            responses.push(pb::WatchResponse { resume_token: Bytes::new(), events });
        }
        responses
    }

    fn event(&self, body: Body) -> pb::WatchEvent {
        pb::WatchEvent { shard: self.shard, body: Some(body) }
    }

    /// A key of a snapshot; `None` if nothing of it is to be shown.
    fn entry(&self, key: &Bytes, record: &Record) -> Option<pb::SnapshotEntry> {
        let is_shown = |held: &&Sibling| self.filter.origins.takes(held.dot.actor.region);
        let shown: Vec<&Sibling> = record.siblings().iter().filter(is_shown).collect();
        if self.rule.is_typed() {
            return self.part(key, &shown);
        }
        let deletion = shown.iter().find(|held| held.content == Content::Tombstone);
        // As before anything expired.
        let scope = Scope { now: HybridTime::ZERO, ..self.scope };
        let (mut versions, _) = scope.versions(key, Some(record), false);
        let dots: Vec<pb::Dot> = shown.iter().map(|held| encode_dot(held.dot)).collect();
        versions.retain(|it| it.dot.is_some_and(|dot| dots.contains(&dot)));
        let deletion = deletion.map(|held| pb::Deletion {
            dot: Some(encode_dot(held.dot)),
            origin_region: self.scope.topology.region_name(held.dot.actor.region),
            write_time: Some(timestamp(held.time)),
            hybrid_time: held.time.to_bits(),
        });
        let is_empty = versions.is_empty() && deletion.is_none();
        let (key, element) = (key.clone(), None);
        (!is_empty).then_some(pb::SnapshotEntry { key, versions, deletion, element })
    }

    /// A part of a typed value in a snapshot; `None` if it was deleted.
    fn part(&self, key: &Bytes, shown: &[&Sibling]) -> Option<pb::SnapshotEntry> {
        let present = || shown.iter().filter(|held| held.content.is_present());
        let latest = present().max_by_key(|held| (held.time, held.dot))?;
        let topology = self.scope.topology;
        Some(pb::SnapshotEntry {
            key: element::user_key(self.rule, key),
            versions: present().filter_map(|held| version(topology, held)).collect(),
            deletion: None,
            element: element_of(topology, self.rule, key, &latest.content),
        })
    }
}

/// The part of a typed value that a record is; `None` in namespaces without types.
fn element_of(
    topology: &Topology,
    rule: Rule,
    key: &[u8],
    content: &Content,
) -> Option<pb::Element> {
    let Element { path, part, .. } = Element::from_key(key).filter(|_| rule.is_typed())?;
    let kind = match part.kind() {
        Kind::Register => pb::ElementKind::Register,
        Kind::Counter => pb::ElementKind::Counter,
        Kind::Set => pb::ElementKind::Set,
        Kind::Flag => pb::ElementKind::Flag,
        Kind::Max => pb::ElementKind::Max,
        Kind::Min => pb::ElementKind::Min,
    };
    let (member, share_region) = match part {
        Part::Member(member) => (member, String::new()),
        Part::Share(actor) => (Bytes::new(), topology.region_name(actor.region)),
        Part::Whole(_) => (Bytes::new(), String::new()),
    };
    let share_total = match content {
        Content::Count { count, .. } | Content::Reset { count, .. } => count.total,
        Content::Value { .. } | Content::Tombstone => 0,
    };
    let field_path = path.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    Some(pb::Element { field_path, kind: kind.into(), member, share_region, share_total })
}

/// The one place where what a write did becomes an event.
fn change(topology: &Topology, rule: Rule, event: Event) -> pb::Change {
    let Event { delta, group_first_seq, group_size, previous, conflict, is_current } = event;
    let written = delta.sibling;
    let kind = match written.content {
        Content::Value { .. } | Content::Count { .. } => pb::ChangeKind::Put,
        Content::Tombstone | Content::Reset { .. } => pb::ChangeKind::Delete,
    };
    pb::Change {
        element: element_of(topology, rule, &delta.key, &written.content),
        key: element::user_key(rule, &delta.key),
        kind: kind.into(),
        dot: Some(encode_dot(written.dot)),
        version: version(topology, &written),
        origin_region: topology.region_name(written.dot.actor.region),
        write_time: Some(timestamp(written.time)),
        hybrid_time: written.time.to_bits(),
        supersedes: delta.supersedes.iter().copied().map(encode_dot).collect(),
        previous: previous
            .into_iter()
            .map(|(dot, it)| encode_previous(topology, dot, it))
            .collect(),
        conflict: (!conflict.is_none()).then(|| encode_conflict(conflict)),
        group: Some(pb::ChangeGroup {
            first_seq: group_first_seq,
            size: u32::try_from(group_size).unwrap_or(u32::MAX),
        }),
        current: is_current,
    }
}

/// What a write left, expired or not; `None` if it deleted.
fn version(topology: &Topology, written: &Sibling) -> Option<pb::Version> {
    let (kind, expire) = match &written.content {
        Content::Value { data, expire } => (pb::value::Kind::Data(data.clone()), *expire),
        Content::Count { count, .. } => (pb::value::Kind::Counter(count.total), None),
        Content::Tombstone | Content::Reset { .. } => return None,
    };
    Some(pb::Version {
        dot: Some(encode_dot(written.dot)),
        value: Some(pb::Value { kind: Some(kind), ..Default::default() }),
        origin_region: topology.region_name(written.dot.actor.region),
        write_time: Some(timestamp(written.time)),
        hybrid_time: written.time.to_bits(),
        expire_time: expire.map(timestamp),
    })
}

fn encode_previous(topology: &Topology, dot: Dot, previous: Previous) -> pb::Previous {
    let (state, version) = match &previous {
        Previous::Known(replaced) => match version(topology, replaced) {
            Some(version) => (pb::PreviousState::Value, Some(version)),
            None => (pb::PreviousState::Deleted, None),
        },
        Previous::Unknown => (pb::PreviousState::Unknown, None),
        Previous::TooLarge => (pb::PreviousState::TooLarge, None),
    };
    pb::Previous { dot: Some(encode_dot(dot)), state: state.into(), version }
}

fn encode_conflict(conflict: Conflict) -> pb::ChangeConflict {
    let (lost_to, ledger_id) = match conflict.lost_to {
        Some((winner, id)) => (Some(encode_dot(winner)), show_id(id)),
        None => (None, String::new()),
    };
    let beaten = |(dot, id)| pb::BeatenWrite { dot: Some(encode_dot(dot)), ledger_id: show_id(id) };
    pb::ChangeConflict {
        lost_to,
        ledger_id,
        beat: conflict.beat.into_iter().map(beaten).collect(),
        beside: conflict.beside.into_iter().map(encode_dot).collect(),
    }
}

/// An id of the ledger, as people see it.
fn show_id(id: LedgerId) -> String {
    id.to_string()
}

fn reset(lost: Lost) -> pb::Reset {
    let reason = match lost {
        Lost::Trimmed => pb::ResetReason::HistoryGone,
        Lost::StartedOver => pb::ResetReason::StartedOver,
    };
    pb::Reset { reason: reason.into() }
}

/// About how large an event gets.
fn bytes_of(event: &Event) -> usize {
    let content = |content: &Content| match content {
        Content::Value { data, .. } => data.len(),
        Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => 0,
    };
    let previous = event.previous.iter().map(|(_, previous)| match previous {
        Previous::Known(replaced) => content(&replaced.content) + 96,
        Previous::Unknown | Previous::TooLarge => 32,
    });
    let written = content(&event.delta.sibling.content) + event.delta.key.len();
    written + 192 + event.delta.supersedes.len() * 16 + previous.sum::<usize>()
}
