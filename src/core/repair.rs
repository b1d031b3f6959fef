//! Repair: bringing one region to another's state where the change log no longer reaches back.
//!
//! The *receiver* compares its Merkle tree with the *source's*, as of one moment of each (the
//! source's is the *cut*), and takes over what differs, key by key. What a merge decides:
//!
//! **The coverage rule.** A side that does not hold a dot which its frontier covers has seen it
//! superseded. So "absent and covered" means "deleted", even after the tombstone is gone.
//!
//! A repair may end half-way: then records are *ahead* of the frontier. Every such record's
//! context says what it has seen, and the namespace remembers up to where records may be ahead
//! until the frontier covers it. Writes go on all the time; a write depends on what the record that
//! it replaces has seen.
//!
//! Invariants:
//! * A merge is a join: it may be repeated, reordered with others, or be the last thing that ever
//!   happens to a repair.
//! * The frontier moves to the cut in one command, and only if nothing of another region was applied
//!   since the comparison: what came meanwhile may have been superseded, in records that were
//!   equal and so were not merged, by what the frontier would then claim to have seen.
//! * Every tombstone that the receiver has not seen is merged: trees do not show them, and a later
//!   deletion must win against an earlier write. It comes before the absence of the value that it
//!   replaced: whoever writes in between must write later than the deletion.
//! * Absence takes away values only. What was compared is older than what is merged: meanwhile the
//!   key may have been deleted here, too.
//! * The ledger comes before records: who repairs from a half-repaired region must not miss why a
//!   value is gone.
//! * So is every record of the source that is ahead of its own frontier, even where digests are
//!   equal: only its context says what was superseded there.
//!
//! Pure. Not here: how the messages travel (`tombolo-replication`), where leaves are read
//! (`tombolo-storage`).
//!
//! Source: Merkle anti-entropy as in Dynamo (2007); coverage as in Almeida et al., "Scalable and
//! Accurate Causality Tracking for Eventually Consistent Stores" (2014), with one clock per shard.

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    id::Dot,
    ledger::LedgerEntry,
    merkle::{Block, FAN_OUT, Tree, digest},
    record::{Dropped, Record, Rule, Sibling},
    vector::{VersionVector, decode_dot, encode_dot},
};

/// What a source has for one key. Values go only where the receiver may lack them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The key.
    pub key: Bytes,
    /// What the source's record has seen of this key.
    pub context: VersionVector,
    /// The source's siblings, in order of their dots.
    pub siblings: Vec<Offered>,
}

/// One sibling of an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offered {
    /// The receiver has applied this write: it holds the sibling, or has seen it superseded.
    Known(Dot),
    /// All of it.
    Whole(Sibling),
}

impl Offered {
    /// The write that created the sibling.
    pub fn dot(&self) -> Dot {
        match self {
            Self::Known(dot) => *dot,
            Self::Whole(sibling) => sibling.dot,
        }
    }
}

/// What to conclude from a dot that one side lacks although it has applied it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It was superseded: the coverage rule.
    Coverage,
    /// Damage. Both frontiers are equal, so both sides should hold the same: keep what either holds.
    Neither,
}

const OFFER_VERSION: u8 = 1;
const KNOWN: u8 = 0;
const WHOLE: u8 = 1;

impl Offer {
    /// What a source offers of a record to a receiver that has applied `known`.
    pub fn new(key: Bytes, record: &Record, known: &VersionVector) -> Self {
        let offered = |held: &Sibling| {
            if known.covers(held.dot) {
                Offered::Known(held.dot)
            } else {
                Offered::Whole(held.clone())
            }
        };
        let siblings = record.siblings().iter().map(offered).collect();
        Self { key, context: record.context().clone(), siblings }
    }

    /// The offer of a key that the source does not hold.
    pub fn absent(key: Bytes) -> Self {
        Self { key, context: VersionVector::new(), siblings: Vec::new() }
    }

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::with_capacity(64);
        writer.u8(OFFER_VERSION);
        writer.bytes(&self.key);
        self.context.encode(&mut writer);
        writer.count(self.siblings.len());
        for offered in &self.siblings {
            match offered {
                Offered::Known(dot) => {
                    writer.u8(KNOWN);
                    encode_dot(*dot, &mut writer);
                }
                Offered::Whole(sibling) => {
                    writer.u8(WHOLE);
                    sibling.encode(&mut writer);
                }
            }
        }
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged, or a sibling is out of order or not covered by the context.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("repair offer", bytes);
        reader.version(OFFER_VERSION)?;
        let key = reader.bytes()?;
        let context = VersionVector::decode(&mut reader)?;
        let count = reader.count(4)?;
        let mut siblings: Vec<Offered> = Vec::with_capacity(count);
        for _ in 0..count {
            let offered = match reader.u8()? {
                KNOWN => Offered::Known(decode_dot(&mut reader)?),
                WHOLE => Offered::Whole(Sibling::decode(&mut reader)?),
                tag => return Err(reader.invalid(u64::from(tag))),
            };
            let dot = offered.dot();
            let in_order = siblings.last().is_none_or(|last| last.dot() < dot);
            if !in_order || !context.covers(dot) {
                return Err(reader.invalid(dot.seq));
            }
            siblings.push(offered);
        }
        reader.finish()?;
        Ok(Self { key, context, siblings })
    }
}

/// The two sides of a merge, beside the records themselves.
#[derive(Clone, Copy, Debug)]
pub struct Sides<'a> {
    /// What the receiver has applied.
    pub applied: &'a VersionVector,
    /// What the source had applied at the cut.
    pub cut: &'a VersionVector,
    /// What to conclude from what one side lacks.
    pub trust: Trust,
}

/// A dot under which two different writes are known: a region's counters went back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DotReused(pub Dot);

/// Merges what a source offers into the receiver's record; answers what the rule dropped.
///
/// # Errors
/// If the two sides know different writes under one dot. Nothing must be merged then.
pub fn merge(
    mine: &Record,
    offer: &Offer,
    sides: Sides<'_>,
    rule: Rule,
) -> Result<(Record, Vec<Dropped>), DotReused> {
    let offered = |dot: Dot| offer.siblings.iter().find(|offered| offered.dot() == dot);
    let held = |dot: Dot| mine.siblings().iter().find(|held| held.dot == dot);
    let mut siblings = Vec::new();
    for sibling in mine.siblings() {
        let dot = sibling.dot;
        let is_gone = match offered(dot) {
            Some(Offered::Whole(theirs)) if theirs != sibling => return Err(DotReused(dot)),
            Some(_) => false,
            // A source that has no value may hold the tombstone all the same, or have collected it:
            // here it must stay until it is collected, for older writes that are still to come.
            None if offer.siblings.is_empty() && !sibling.content.is_present() => false,
            None => sides.saw_superseded(dot, sides.cut, &offer.context),
        };
        if !is_gone {
            siblings.push(sibling.clone());
        }
    }
    for offered in &offer.siblings {
        if let Offered::Whole(theirs) = offered
            && held(theirs.dot).is_none()
            && !sides.saw_superseded(theirs.dot, sides.applied, mine.context())
        {
            siblings.push(theirs.clone());
        }
    }
    let mut context = mine.context().clone();
    context.join(&offer.context);
    Ok(Record::resolved(context, siblings, rule))
}

impl Sides<'_> {
    /// Whether a side that does not hold `dot` says with that that it is gone.
    fn saw_superseded(&self, dot: Dot, frontier: &VersionVector, context: &VersionVector) -> bool {
        self.trust == Trust::Coverage && (frontier.covers(dot) || context.covers(dot))
    }
}

/// The leaves of a node in which the receiver's tree differs from the source's block.
pub fn differing_leaves(mine: &Tree, high: u8, theirs: &Block) -> Vec<u16> {
    const NONE: Block = [0; FAN_OUT];
    let mine = mine.block(high).unwrap_or(&NONE);
    let differs = |low: &u8| mine[usize::from(*low)] != theirs[usize::from(*low)];
    (0..=u8::MAX).filter(differs).map(|low| u16::from_be_bytes([high, low])).collect()
}

/// The nodes in which two middle levels differ.
pub fn differing_nodes(left: &Block, right: &Block) -> Vec<u8> {
    let differs = |high: &u8| left[usize::from(*high)] != right[usize::from(*high)];
    (0..=u8::MAX).filter(differs).collect()
}

/// What a source answers about one leaf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeafAnswer {
    /// The records of which the receiver has no equal.
    pub offers: Vec<Offer>,
    /// The receiver's digests that the source has no record of.
    pub unknown: Vec<u64>,
}

/// Compares a leaf of the source (keys and records with a value) with the receiver's digests.
pub fn answer_leaf(
    held: &[(Bytes, Record)],
    mut theirs: Vec<u64>,
    known: &VersionVector,
) -> LeafAnswer {
    theirs.sort_unstable();
    let mut mine: Vec<u64> = held.iter().map(|(key, record)| digest(key, record)).collect();
    let offer = |(digest, (key, record)): (&u64, &(Bytes, Record))| {
        let is_lacking = theirs.binary_search(digest).is_err();
        is_lacking.then(|| Offer::new(key.clone(), record, known))
    };
    let offers = mine.iter().zip(held).filter_map(offer).collect();
    mine.sort_unstable();
    theirs.retain(|digest| mine.binary_search(digest).is_err());
    LeafAnswer { offers, unknown: theirs }
}

/// What the receiver concludes of its own keys in a leaf, each with its digest: those that the
/// source has no record of (`unknown`), and offers none for, are absent there.
pub fn absent_offers(listed: &[(Bytes, u64)], offered: &[Bytes], unknown: &[u64]) -> Vec<Offer> {
    let absent =
        listed.iter().filter(|(key, digest)| unknown.contains(digest) && !offered.contains(key));
    absent.map(|(key, _)| Offer::absent(key.clone())).collect()
}

/// Whether a receiver that has applied `known` may lack this deletion.
pub fn lacks_tombstone(known: &VersionVector, record: &Record) -> bool {
    !known.covers_all(record.context())
}

/// Whether a source's record is ahead of its frontier, so that its context must be told.
pub fn is_ahead(cut: &VersionVector, record: &Record) -> bool {
    !cut.covers_all(record.context())
}

/// Whether a receiver that has applied `known` may lack this entry of the ledger.
pub fn lacks_entry(known: &VersionVector, entry: &LedgerEntry) -> bool {
    !known.covers(entry.winner) || !known.covers(entry.loser.dot)
}

#[cfg(test)]
pub(crate) mod tests;
