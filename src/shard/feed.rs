//! Following one shard: what a watcher gets next, with what it may want to know of each write.
//!
//! What comes next is decided by [`tombolo_core::feed`]; this reads it from the replica and adds what
//! the log and the ledger know. Any replica serves it: what is read was committed in this region.
//!
//! Invariants:
//! * Nothing is given by a region that does not take part: what it has is no answer.
//! * After an error the feed stands where it stood.

use bytes::Bytes;
use tombolo_core::{
    Actor, Change, Dot, MemberState, NamespaceId, Record,
    feed::{
        Conflict, Feed, Filter, Lost, Page, Picked, Source, Standing, Step, conflict_of, is_current,
    },
    record::{Content, Delta, Sibling},
};
use tombolo_storage::{ShardStore, StorageError};

use crate::{error::ShardError, shard::Shard};

/// Bytes of the change log, and of what its writes replaced, that one call gives; a single change may be
/// larger. Little, because every watcher that is slow holds as much.
const BATCH_BYTES_MAX: usize = 64 << 10;
/// Keys and bytes of one page of a snapshot; a single record may be larger.
const PAGE_KEYS_MAX: usize = 512;
const PAGE_BYTES_MAX: usize = 64 << 10;

/// What a watcher asked for.
#[derive(Clone, Debug)]
pub struct FeedRequest {
    /// What it follows.
    pub namespace: NamespaceId,
    /// What of it.
    pub filter: Filter,
    /// Whether it wants to know what each write replaced, and how many bytes of that at most, for an atomic
    /// batch.
    pub previous_bytes_max: Option<usize>,
}

/// One write, as a watcher learns of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it did.
    pub delta: Delta,
    /// Sequence number of the first write of its atomic batch.
    pub group_first_seq: u64,
    /// How many writes that batch has.
    pub group_size: usize,
    /// What it replaced, if that was asked for.
    pub previous: Vec<(Dot, Previous)>,
    /// What is known of writes that it was concurrent with.
    pub conflict: Conflict,
    /// Whether the key holds now what it left.
    pub is_current: bool,
}

/// What a write replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Previous {
    /// This.
    Known(Sibling),
    /// The change log no longer reaches back to it.
    Unknown,
    /// More than the watcher takes.
    TooLarge,
}

/// What one call gives, in this order.
#[derive(Clone, Debug, Default)]
pub struct FeedBatch {
    /// What was given before no longer counts.
    pub lost: Option<Lost>,
    /// Writes.
    pub events: Vec<Event>,
    /// Records of the snapshot.
    pub records: Vec<(Bytes, Record)>,
    /// The snapshot is complete.
    pub is_done: bool,
    /// There may be more at once.
    pub moved: bool,
    /// There is more, and it may not be given yet.
    pub waits: bool,
}

/// One namespace of a replica.
struct Replica<'a> {
    store: &'a ShardStore,
    namespace: NamespaceId,
}

impl Source for Replica<'_> {
    type Error = StorageError;

    fn standing(&self) -> Standing {
        self.store.standing(self.namespace)
    }

    fn changes(
        &self,
        actor: Actor,
        from_seq: u64,
        bytes_max: usize,
    ) -> Result<Option<Vec<(Change, usize)>>, StorageError> {
        match self.store.changes(self.namespace, actor, from_seq, bytes_max) {
            Ok(changes) => {
                let sized = changes.into_iter().map(|stored| (stored.decoded, stored.bytes.len()));
                Ok(Some(sized.collect()))
            }
            Err(StorageError::Trimmed { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn page(&self, start: &Bytes, end: Option<&Bytes>) -> Result<Page, StorageError> {
        let end = end.map(|end| &end[..]);
        self.store.page(self.namespace, start, end, PAGE_KEYS_MAX, PAGE_BYTES_MAX)
    }
}

impl Shard {
    /// Refuses unless this region takes part: one that is shut out or is taking over what the others
    /// have hears of no changes, and silence would look like peace.
    ///
    /// # Errors
    /// [`ShardError::NotActive`].
    pub fn check_takes_part(&self) -> Result<(), ShardError> {
        let member = self.own_member();
        match member.state {
            MemberState::Active => Ok(()),
            MemberState::Joining
            | MemberState::Recovering
            | MemberState::Regressed
            | MemberState::Fenced
            | MemberState::Removed => Err(ShardError::NotActive { shard: self.id(), member }),
        }
    }

    /// Gives a watcher what comes next from this replica. Blocks on the disk.
    ///
    /// # Errors
    /// [`ShardError::NotActive`], and if the replica's data cannot be read. The feed stands where it
    /// stood.
    pub fn follow(&self, feed: &mut Feed, request: &FeedRequest) -> Result<FeedBatch, ShardError> {
        let before = feed.cursor().clone();
        let given = self.give(feed, request);
        if given.is_err() {
            *feed = Feed::new(before);
        }
        given
    }

    fn give(&self, feed: &mut Feed, request: &FeedRequest) -> Result<FeedBatch, ShardError> {
        let source = Replica { store: self.store(), namespace: request.namespace };
        let mut events = Vec::new();
        let step = feed.step(&source, &request.filter, BATCH_BYTES_MAX, |picked| {
            source.events_of(picked, request.previous_bytes_max, &mut events)
        })?;
        // Looked at last: the region may have started over while this was read.
        self.check_takes_part()?;
        let Step { lost, records, is_done, moved, waits } = step;
        Ok(FeedBatch { lost, events, records, is_done, moved, waits })
    }
}

impl Replica<'_> {
    /// Adds the events of a change, and answers how many bytes there are of what they replaced. That is
    /// bounded for the change, which is given as a whole; the feed bounds what comes after it.
    fn events_of(
        &self,
        Picked { first, size, seen, deltas }: Picked,
        previous_bytes_max: Option<usize>,
        events: &mut Vec<Event>,
    ) -> Result<usize, StorageError> {
        let mut added = 0;
        for delta in deltas {
            let record = self.store.record(self.namespace, &delta.key)?;
            let ledger = |id| self.store.ledger_entry(self.namespace, id);
            let conflict = conflict_of(self.namespace, &delta, &seen, record.as_ref(), ledger)?;
            let is_current = is_current(&delta.sibling, record.as_ref());
            let previous = match previous_bytes_max {
                None => Vec::new(),
                Some(bytes_max) => {
                    // It has to fit a response together with the event.
                    let room = bytes_max.saturating_sub(bytes_of(&delta.sibling.content));
                    self.previous_of(&delta, room.min(bytes_max.saturating_sub(added)))?
                }
            };
            added += previous.iter().map(|(_, it)| it.bytes()).sum::<usize>();
            let (group_first_seq, group_size) = (first.seq, size);
            events.push(Event {
                delta,
                group_first_seq,
                group_size,
                previous,
                conflict,
                is_current,
            });
        }
        Ok(added)
    }

    /// What a write replaced, as far as there is room for it.
    fn previous_of(
        &self,
        delta: &Delta,
        mut room: usize,
    ) -> Result<Vec<(Dot, Previous)>, StorageError> {
        let mut previous = Vec::with_capacity(delta.supersedes.len());
        for &dot in &delta.supersedes {
            let found = match self.store.logged_write(self.namespace, dot)? {
                None => Previous::Unknown,
                Some(replaced) if room < bytes_of(&replaced.sibling.content) => Previous::TooLarge,
                Some(replaced) => Previous::Known(apart(replaced.sibling)),
            };
            room -= found.bytes();
            previous.push((dot, found));
        }
        Ok(previous)
    }
}

impl Previous {
    fn bytes(&self) -> usize {
        match self {
            Self::Known(replaced) => bytes_of(&replaced.content),
            Self::Unknown | Self::TooLarge => 0,
        }
    }
}

/// A write without the rest of its change, which its bytes would keep in memory.
fn apart(mut written: Sibling) -> Sibling {
    if let Content::Value { data, .. } = &mut written.content {
        *data = Bytes::copy_from_slice(data);
    }
    written
}

const fn bytes_of(content: &Content) -> usize {
    match content {
        Content::Value { data, .. } => data.len(),
        Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => 0,
    }
}
