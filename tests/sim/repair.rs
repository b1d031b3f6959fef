//! Repairs: the two ends of one, message by message, around `tombolo_core::repair`.
//!
//! As in `tombolo-replication`, each end reads what it pinned when the comparison began, however
//! much later a message arrives.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use tombolo_core::{
    Actor, Record, VersionVector,
    ledger::LedgerEntry,
    members::Members,
    merkle::{Block, FAN_OUT, Tree, digest, leaf_of},
    repair::{self, LeafAnswer, Offer, Trust},
};

use crate::{
    mutant::Mutant,
    region::{Data, NAMESPACE},
};

/// Comparisons before a repair gives up.
pub const ATTEMPTS_MAX: usize = 8;

/// To the source.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Begin: what the receiver has applied, its middle level, and whether to send every value.
    Open(VersionVector, Box<Block>, bool),
    /// The digests in a leaf that differs.
    Leaf(u16, Vec<u64>),
    /// That was all.
    Done,
}

/// To the receiver.
#[derive(Clone, Debug)]
pub enum Answer {
    /// What the source has applied, up to where it is ahead, the nodes that differ, and what the source
    /// knew of the regions at that moment.
    Cut(VersionVector, VersionVector, Vec<(u8, Box<Block>)>, Members),
    /// What differs in a leaf.
    Leaf(u16, LeafAnswer),
    /// What trees do not show.
    Rest(Vec<Offer>, Vec<LedgerEntry>),
    /// That was all.
    End,
}

/// One side as it was when a comparison began.
#[derive(Clone, Debug)]
pub struct Pinned {
    /// What was applied.
    pub frontier: VersionVector,
    /// Up to where records were ahead of that.
    pub ahead: VersionVector,
    /// The tree.
    pub tree: Tree,
    records: BTreeMap<Bytes, Record>,
    ledger: Vec<LedgerEntry>,
}

impl Pinned {
    /// A region's data as it is now.
    pub fn new(data: &Data) -> Self {
        let memory = &data.memory;
        let held = memory.held(NAMESPACE);
        Self {
            frontier: data.frontier(),
            ahead: data.ahead(),
            tree: data.tree.clone(),
            records: held.map(|(key, record)| (key.clone(), record.clone())).collect(),
            ledger: memory.ledger.values().cloned().collect(),
        }
    }

    fn leaf(&self, leaf: u16) -> Vec<(Bytes, Record)> {
        let inside = self.records.iter().filter(|(key, _)| leaf_of(key) == leaf);
        let live = inside.filter(|(_, record)| !record.is_dead());
        live.map(|(key, record)| (key.clone(), record.clone())).collect()
    }

    /// The keys in a leaf, with their digests.
    pub fn list(&self, leaf: u16) -> Vec<(Bytes, u64)> {
        let held = self.leaf(leaf);
        held.iter().map(|(key, record)| (key.clone(), digest(key, record))).collect()
    }
}

/// The source's end.
#[derive(Debug)]
pub struct Source {
    /// What it reads.
    pub cut: Pinned,
    known: VersionVector,
    distrust: bool,
    has_sent_rest: bool,
}

impl Source {
    /// Answers the beginning.
    pub fn open(
        data: &Data,
        known: VersionVector,
        nodes: &Block,
        distrust: bool,
        mutant: Option<Mutant>,
    ) -> (Self, Answer) {
        let cut = Pinned::new(data);
        let mut differing = repair::differing_nodes(nodes, &cut.tree.nodes());
        if mutant == Some(Mutant::ForgetBranch) && differing.len() > 1 {
            differing.pop();
        }
        let node = |high: u8| (high, Box::new(*cut.tree.block(high).unwrap_or(&[0; FAN_OUT])));
        let nodes = differing.into_iter().map(node).collect();
        let members = data.memory.members.clone();
        let answer = Answer::Cut(cut.frontier.clone(), cut.ahead.clone(), nodes, members);
        (Self { cut, known, distrust, has_sent_rest: false }, answer)
    }

    /// Answers one leaf.
    pub fn leaf(&self, leaf: u16, digests: Vec<u64>, mutant: Option<Mutant>) -> Answer {
        let nothing = VersionVector::new();
        let known = match mutant {
            Some(Mutant::KnownByTheSource) => &self.cut.frontier,
            _ if self.distrust => &nothing,
            _ => &self.known,
        };
        Answer::Leaf(leaf, repair::answer_leaf(&self.cut.leaf(leaf), digests, known))
    }

    /// Once, and before any leaf: what trees do not show, in pages.
    pub fn rest(&mut self, page: usize, mutant: Option<Mutant>) -> Vec<Answer> {
        if std::mem::replace(&mut self.has_sent_rest, true) {
            return Vec::new();
        }
        let Self { cut, known, .. } = &*self;
        let records = || cut.records.iter();
        let offer = |(key, record): (&Bytes, &Record)| Offer::new(key.clone(), record, known);
        let is_lacking = |(_, record): &(&Bytes, &Record)| {
            record.is_dead()
                && repair::lacks_tombstone(known, record)
                && mutant != Some(Mutant::ForgetTombstones)
        };
        let mut offers: Vec<Offer> = records().filter(is_lacking).map(offer).collect();
        if !cut.frontier.covers_all(&cut.ahead) && mutant != Some(Mutant::ForgetAhead) {
            let is_ahead =
                |(_, record): &(&Bytes, &Record)| repair::is_ahead(&cut.frontier, record);
            offers.extend(records().filter(is_ahead).map(offer));
        }
        let lacking = cut.ledger.iter().filter(|entry| repair::lacks_entry(known, entry));
        let ledger: Vec<LedgerEntry> = lacking.cloned().collect();
        let entries = ledger.chunks(page).map(|page| Answer::Rest(Vec::new(), page.to_vec()));
        let records = offers.chunks(page).map(|page| Answer::Rest(page.to_vec(), Vec::new()));
        if mutant == Some(Mutant::LedgerLast) {
            records.chain(entries).collect()
        } else {
            entries.chain(records).collect()
        }
    }
}

/// The receiver's end.
#[derive(Debug)]
pub struct Receiver {
    /// Tells this repair from those before.
    pub id: u64,
    /// Only compare.
    pub compare: bool,
    /// This region, in the life in which it began.
    pub local: Actor,
    /// Comparisons so far.
    pub attempts: usize,
    /// Leaves that differed although both sides had applied the same.
    pub damage: Option<usize>,
    /// This side.
    pub mine: Pinned,
    /// What the source had applied.
    pub cut: VersionVector,
    /// Up to where it was ahead of that.
    pub ahead: VersionVector,
    /// What it knew of the regions then.
    pub members: Members,
    /// What to conclude from what one side lacks.
    pub trust: Trust,
    /// Leaves that were listed and not answered.
    pub listed: VecDeque<(u16, Vec<(Bytes, u64)>)>,
    /// What has come and is not merged.
    pub offers: Vec<Offer>,
    /// What has come and is not merged.
    pub ledger: Vec<LedgerEntry>,
    /// Whether a command is on its way through Raft.
    pub waits: bool,
    /// Whether everything has come.
    pub ended: bool,
}

impl Receiver {
    /// A repair that begins.
    pub fn new(id: u64, compare: bool, local: Actor, data: &Data) -> Self {
        Self {
            id,
            compare,
            local,
            attempts: 0,
            damage: None,
            mine: Pinned::new(data),
            cut: VersionVector::new(),
            ahead: VersionVector::new(),
            members: Members::new(),
            trust: Trust::Coverage,
            listed: VecDeque::new(),
            offers: Vec::new(),
            ledger: Vec::new(),
            waits: false,
            ended: false,
        }
    }

    /// Pins this side anew, and answers what to ask first.
    pub fn compare(&mut self, data: &Data) -> Ask {
        self.attempts += 1;
        self.mine = Pinned::new(data);
        self.listed.clear();
        self.offers.clear();
        self.ledger.clear();
        self.waits = false;
        self.ended = false;
        let nodes = Box::new(self.mine.tree.nodes());
        Ask::Open(self.mine.frontier.clone(), nodes, self.damage.is_some())
    }

    /// Whether both sides had applied the same, and no repair was half done in either.
    pub fn is_at_same_point(&self) -> bool {
        let is_exact =
            self.mine.frontier.covers_all(&self.mine.ahead) && self.cut.covers_all(&self.ahead);
        is_exact && self.mine.frontier == self.cut
    }

    /// The leaves that differ.
    pub fn differing(&self, nodes: &[(u8, Box<Block>)]) -> Vec<u16> {
        let in_node = |(high, block): &(u8, Box<Block>)| {
            repair::differing_leaves(&self.mine.tree, *high, block)
        };
        nodes.iter().flat_map(in_node).collect()
    }

    /// A leaf was answered. Answers `false` if it was not asked for.
    pub fn take_leaf(&mut self, leaf: u16, answer: LeafAnswer, mutant: Option<Mutant>) -> bool {
        let Some((_, keys)) = self.listed.pop_front().filter(|(listed, _)| *listed == leaf) else {
            return false;
        };
        let offered: Vec<Bytes> = answer.offers.iter().map(|offer| offer.key.clone()).collect();
        self.offers.extend(answer.offers);
        if self.trust == Trust::Coverage && mutant != Some(Mutant::ForgetCoverage) {
            self.offers.extend(repair::absent_offers(&keys, &offered, &answer.unknown));
        }
        true
    }
}
