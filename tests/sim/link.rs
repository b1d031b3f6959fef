//! Streams: what is under way between two regions, and what each end remembers.
//!
//! A stream keeps its order, as TCP does, and loses nothing but all at once, when it breaks. What an
//! earlier stream had under way to the source may still arrive: its leader reads it late.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use tombolo_core::{
    Actor, Change, RegionId, VersionVector, members::Members, outgoing::Outgoing, pending::Pending,
};

use crate::repair::{Answer, Ask, Receiver};

/// From the puller to the source.
#[derive(Clone, Debug)]
pub enum Request {
    /// Begin, or begin again, at this frontier, with these other regions' changes.
    Subscribe(VersionVector, BTreeSet<RegionId>),
    /// This is applied.
    Acknowledge(VersionVector),
}

/// From the source to the puller.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Changes in causal order.
    Changes(Vec<Change>),
    /// What the source has applied, and what it knew of the regions at that moment.
    Told(VersionVector, Members),
    /// The source's log no longer reaches back.
    Trimmed(VersionVector),
}

/// What is under way between a puller and a source.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// To the source.
    pub requests: VecDeque<Request>,
    /// To the puller.
    pub replies: VecDeque<Reply>,
    /// Acknowledgements that an earlier stream still carries, and from whom.
    pub late: VecDeque<(Actor, VersionVector)>,
    /// A repair's, to the source.
    pub asks: VecDeque<Ask>,
    /// A repair's, to the puller.
    pub answers: VecDeque<Answer>,
}

impl Link {
    /// The stream of `puller` breaks, and the repair with it.
    pub fn break_off(&mut self, puller: Actor) {
        let requests = std::mem::take(&mut self.requests);
        self.late.extend(requests.into_iter().map(|request| match request {
            Request::Subscribe(frontier, _) | Request::Acknowledge(frontier) => (puller, frontier),
        }));
        self.replies.clear();
        self.break_repair();
    }

    /// Only the repair breaks.
    pub fn break_repair(&mut self) {
        self.asks.clear();
        self.answers.clear();
    }
}

/// A repair that is to begin.
#[derive(Clone, Copy, Debug)]
pub struct Due {
    /// Only compare.
    pub compare: bool,
    /// Not before.
    pub at: Duration,
    /// So many tries came to nothing.
    pub tried: u32,
}

/// The puller's end.
#[derive(Debug)]
pub struct Stream {
    /// Tells this stream from those before.
    pub session: u64,
    /// Who pulls.
    pub local: Actor,
    /// From whom, as the puller knew it when the stream was opened.
    pub source: Actor,
    /// What has arrived and waits.
    pub pending: Pending,
    /// What the source was told that is applied here.
    pub acknowledged: VersionVector,
    /// Up to where the source's log is gone.
    pub trimmed: Option<VersionVector>,
    /// The repair that is to begin.
    pub due: Option<Due>,
    /// The repair under way.
    pub repair: Option<Receiver>,
    /// The regions whose changes the source sends besides its own.
    pub relayed: BTreeSet<RegionId>,
    /// Whether a batch is on its way through Raft.
    pub ingesting: bool,
    /// When something was heard last.
    pub heard: Duration,
    /// When something was applied last, or there was nothing to apply.
    pub moved: Duration,
}

/// The source's end.
#[derive(Debug)]
pub struct Feed {
    /// What is sent, and what goes next.
    pub outgoing: Outgoing,
    /// What the puller was told last, and when.
    pub told: Option<(VersionVector, Duration)>,
    /// The puller was told that its cursor lies in the trimmed part.
    pub trimmed: bool,
}
