//! What a watch tells.

use crate::error::{Error, Result};
use crate::types::{Dot, Entry, HybridTime, Version, versions};
use bytes::Bytes;
use tombolo_proto::v1;
use tombolo_proto::v1::watch_event::Body;

/// One item of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// What happened.
    pub event: WatchEvent,
    /// Everything up to and including this item was given: keep it together with what the items did,
    /// and a watch that goes on from it misses nothing. Not every item has one.
    pub token: Option<Bytes>,
}

/// What happened.
#[expect(clippy::large_enum_variant, reason = "nearly all are changes")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// A write.
    Change(Change),
    /// A key as it is when the snapshot reaches it. Its `context` is empty.
    Entry {
        /// The key's shard.
        shard: u32,
        /// What it holds, expired values included.
        entry: Entry,
        /// Why it holds nothing.
        deletion: Option<Deletion>,
        /// Of a typed value, the part that this is.
        element: Option<v1::Element>,
    },
    /// The snapshot of a shard is complete; its changes follow.
    SnapshotDone {
        /// The shard.
        shard: u32,
        /// Shards whose snapshot is not complete yet.
        shards_left: u32,
    },
    /// What was given of a shard no longer counts: a snapshot of it follows, and a key of the shard that
    /// is not in it is gone.
    Reset {
        /// The shard.
        shard: u32,
        /// Why.
        reason: ResetReason,
    },
    /// There was nothing else to give for a while.
    Checkpoint {
        /// Shards of which there is more that the region may not give yet.
        shards_waiting: u32,
    },
}

/// Why what was given no longer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason {
    /// The region no longer keeps what the watch should go on with.
    HistoryGone,
    /// A region has begun another life, and what it had written before may be lost.
    StartedOver,
    /// One that this version does not know.
    Other,
}

/// A deletion, as a snapshot has it: for whoever compares times, since a write that lost to it may come
/// later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    pub dot: Dot,
    pub origin_region: String,
    pub time: HybridTime,
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: Bytes,
    /// The key's shard.
    pub shard: u32,
    /// Identifies the event among those of its shard, in every region: see [`Change::id`].
    pub dot: Dot,
    /// What was written; `None` for a deletion.
    pub version: Option<Version>,
    /// Name of the region that took the write.
    pub origin_region: String,
    pub time: HybridTime,
    /// The writes that it replaced. More than one: it settled a conflict.
    pub supersedes: Vec<Dot>,
    /// What those were, if it was asked for.
    pub previous: Vec<(Dot, Previous)>,
    /// What the region knew of concurrent writes when it sent the event.
    pub concurrent: Concurrent,
    /// The atomic batch that it belongs to.
    pub group: ChangeGroup,
    /// Whether the key held what this write left when the region sent it. A copy that applies only
    /// such changes ends with what the region holds, without comparing anything.
    pub current: bool,
    /// Of a typed value, the part that was written.
    pub element: Option<v1::Element>,
}

impl Change {
    /// Identifies the event in its namespace, in every region: one that comes twice has the same.
    pub const fn id(&self) -> (u32, Dot) {
        (self.shard, self.dot)
    }

    /// The value; `None` for a deletion.
    pub fn value(&self) -> Option<&Bytes> {
        self.version.as_ref().map(|version| &version.value)
    }

    /// Whether the rule dropped it in favour of a concurrent write: it is not what the key holds.
    pub fn has_lost(&self) -> bool {
        self.concurrent.lost_to.is_some()
    }
}

/// What a write replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Previous {
    /// A value.
    Value(Version),
    /// A deletion.
    Deleted,
    /// The change log no longer reaches back to it.
    Unknown,
    /// It did not fit the response.
    TooLarge,
}

/// Writes of the same key that a write was concurrent with. Ids are those of the conflict ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Concurrent {
    /// The write that this one lost to, and the ledger's id of this one's value.
    pub lost_to: Option<(Dot, String)>,
    /// Writes that lost to this one.
    pub beat: Vec<(Dot, String)>,
    /// Writes whose values the key holds beside this one's.
    pub beside: Vec<Dot>,
}

/// Consecutive writes of one region that took effect together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeGroup {
    /// The first one's sequence number.
    pub first_seq: u64,
    /// How many there are, those included that the watch does not show.
    pub size: u32,
}

impl TryFrom<v1::WatchEvent> for WatchEvent {
    type Error = Error;

    fn try_from(event: v1::WatchEvent) -> Result<Self> {
        let shard = event.shard;
        let body = event
            .body
            .ok_or_else(|| Error::protocol("an event of a kind that this client does not know"))?;
        Ok(match body {
            Body::Change(change) => Self::Change(change_of(shard, change)?),
            Body::SnapshotEntry(it) => {
                let versions = versions(it.versions)?;
                let entry = Entry {
                    key: it.key,
                    versions,
                    context: Bytes::new(),
                    partial: false,
                    settle_time: None,
                };
                let deletion = it.deletion.map(deletion_of).transpose()?;
                Self::Entry { shard, entry, deletion, element: it.element }
            }
            Body::SnapshotDone(it) => Self::SnapshotDone { shard, shards_left: it.shards_left },
            Body::Reset(it) => {
                let reason = match it.reason() {
                    v1::ResetReason::HistoryGone => ResetReason::HistoryGone,
                    v1::ResetReason::StartedOver => ResetReason::StartedOver,
                    v1::ResetReason::Unspecified => ResetReason::Other,
                };
                Self::Reset { shard, reason }
            }
            Body::Checkpoint(it) => Self::Checkpoint { shards_waiting: it.shards_waiting },
        })
    }
}

fn deletion_of(deletion: v1::Deletion) -> Result<Deletion> {
    Ok(Deletion {
        dot: dot(deletion.dot)?,
        origin_region: deletion.origin_region,
        time: HybridTime(deletion.hybrid_time),
    })
}

fn change_of(shard: u32, change: v1::Change) -> Result<Change> {
    let version = match change.kind() {
        v1::ChangeKind::Delete => None,
        v1::ChangeKind::Put => {
            let version = change.version.ok_or_else(|| Error::protocol("a put without a value"))?;
            Some(Version::try_from(version)?)
        }
        v1::ChangeKind::Unspecified => {
            return Err(Error::protocol("a change of a kind that this client does not know"));
        }
    };
    let group = change.group.unwrap_or_default();
    Ok(Change {
        key: change.key,
        shard,
        dot: dot(change.dot)?,
        version,
        origin_region: change.origin_region,
        time: HybridTime(change.hybrid_time),
        supersedes: change.supersedes.into_iter().map(Dot::from).collect(),
        previous: change.previous.into_iter().map(previous_of).collect::<Result<_>>()?,
        concurrent: change.conflict.map(concurrent_of).transpose()?.unwrap_or_default(),
        group: ChangeGroup { first_seq: group.first_seq, size: group.size },
        current: change.current,
        element: change.element,
    })
}

fn previous_of(previous: v1::Previous) -> Result<(Dot, Previous)> {
    let replaced = match previous.state() {
        v1::PreviousState::Value => {
            let version = previous.version.clone();
            let version = version.ok_or_else(|| Error::protocol("no previous value"))?;
            Previous::Value(Version::try_from(version)?)
        }
        v1::PreviousState::Deleted => Previous::Deleted,
        v1::PreviousState::TooLarge => Previous::TooLarge,
        v1::PreviousState::Unknown | v1::PreviousState::Unspecified => Previous::Unknown,
    };
    Ok((dot(previous.dot)?, replaced))
}

fn concurrent_of(conflict: v1::ChangeConflict) -> Result<Concurrent> {
    let beaten = |it: v1::BeatenWrite| Ok((dot(it.dot)?, it.ledger_id));
    Ok(Concurrent {
        lost_to: conflict.lost_to.map(|winner| (Dot::from(winner), conflict.ledger_id)),
        beat: conflict.beat.into_iter().map(beaten).collect::<Result<_>>()?,
        beside: conflict.beside.into_iter().map(Dot::from).collect(),
    })
}

fn dot(dot: Option<v1::Dot>) -> Result<Dot> {
    dot.map(Dot::from).ok_or_else(|| Error::protocol("no dot"))
}
