//! What is stored for one key: its causal context and its siblings, and how they merge.
//!
//! A [`Record`] is a dotted version vector set: a sibling survives a merge if both sides hold it,
//! or if the side without it has not seen its dot ([`crate::repair::merge`]). A [`Delta`] is what
//! one write changes; applied in causal order it gives the same record as merging whole records.
//!
//! Invariants:
//! * Merging is commutative, associative and idempotent over reachable records.
//! * The context covers the dot of every sibling.
//! * Under `lww` there is exactly one sibling, a value or a tombstone, and it is the one with the
//!   highest (time, dot) of all events that the context covers: writers stamp later than what
//!   they replace, so that time extends the causal order ([`crate::execute()`] sees to it).
//! * Under `siblings` every sibling is a value; a record without siblings is a tombstone.
//! * Elements of typed values ([`crate::element`]) merge as under `siblings`; what a reader sees of
//!   them is for [`crate::typed`] to say. A record whose siblings are all resets is a tombstone, too.
//! * Twins, which are one request that two regions took, are kept apart and shown as one: a merge
//!   knows nothing of them, and a reader sees the one with the lowest dot ([`crate::request`]).
//!
//! Source: Preguiça et al., "Dotted Version Vectors" (2010), arXiv:1011.5808.

use bytes::Bytes;

use crate::{
    codec::{DecodeError, Reader, Writer},
    hlc::HybridTime,
    id::Dot,
    ledger::Cause,
    request::RequestTag,
    vector::{VersionVector, decode_dot, encode_dot},
};

/// How concurrent values of one key become one. Fixed when a namespace is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The highest hybrid time wins, then the highest dot; losers go to the ledger.
    Lww,
    /// All concurrent values are kept and returned.
    Siblings,
    /// Every addition of every region counts, once.
    Counter,
    /// A set: an addition that a removal has not seen survives it.
    Set,
    /// Registers, counters, sets and more, by path: each merges by itself.
    Map,
    /// On or off: switching on survives switching off that has not seen it.
    Flag,
    /// The largest value, byte by byte.
    Max,
    /// The smallest value, byte by byte.
    Min,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 8] = [
        Self::Lww,
        Self::Siblings,
        Self::Counter,
        Self::Set,
        Self::Map,
        Self::Flag,
        Self::Max,
        Self::Min,
    ];

    /// As stored and replicated.
    pub const fn to_byte(self) -> u8 {
        match self {
            Self::Lww => 1,
            Self::Siblings => 2,
            Self::Counter => 3,
            Self::Set => 4,
            Self::Map => 5,
            Self::Flag => 6,
            Self::Max => 7,
            Self::Min => 8,
        }
    }

    /// Reads [`to_byte`](Self::to_byte)'s answer.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.to_byte() == byte)
    }

    /// The name in configuration, output and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lww => "lww",
            Self::Siblings => "siblings",
            Self::Counter => "counter",
            Self::Set => "set",
            Self::Map => "map",
            Self::Flag => "flag",
            Self::Max => "max",
            Self::Min => "min",
        }
    }

    /// Whether values are changed by typed operations and stored as elements ([`crate::element`]);
    /// otherwise they are written whole, under the user's key.
    pub const fn is_typed(self) -> bool {
        match self {
            Self::Lww | Self::Siblings => false,
            Self::Counter | Self::Set | Self::Map | Self::Flag | Self::Max | Self::Min => true,
        }
    }
}

/// What a write leaves behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A value, hidden from `expire` on.
    Value {
        /// The bytes.
        data: Bytes,
        /// When reads stop showing it; `None` if never.
        expire: Option<HybridTime>,
    },
    /// Nothing: the key was deleted.
    Tombstone,
    /// What one region has added to a counter.
    Count {
        /// How much.
        count: Count,
        /// Additions that it took back, the earliest first: of each deletion that had seen one, and not
        /// that it was taken back, it is known that there is nothing of it left to delete.
        taken_back: Vec<TakenBack>,
    },
    /// A deletion of what one region has added to a counter, as far as it had seen it.
    Reset {
        /// What it had seen.
        count: Count,
        /// The sequence number of the addition that made it so.
        upto: u64,
    },
}

/// What one region has added to a counter, in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// The sequence number of the addition that it begins with: after a deletion that had seen all, a
    /// region begins anew.
    pub since: u64,
    /// The sum of the additions since then.
    pub total: i64,
}

/// An addition to a counter that its region took back: another region's execution of the same request
/// stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenBack {
    /// No later than the sequence number of the addition, and later than what the region wrote before.
    pub added: u64,
    /// The sequence number of the write that took it back.
    pub at: u64,
    /// How much it had added.
    pub by: i64,
}

impl Content {
    /// A value without expiry.
    pub fn value(data: impl Into<Bytes>) -> Self {
        Self::Value { data: data.into(), expire: None }
    }

    /// The bytes, unless deleted or expired at `now`.
    pub fn live_at(&self, now: HybridTime) -> Option<&Bytes> {
        match self {
            Self::Value { data, expire } if expire.is_none_or(|expire| now < expire) => Some(data),
            Self::Value { .. } | Self::Tombstone | Self::Count { .. } | Self::Reset { .. } => None,
        }
    }

    /// Whether there is something, expired or not, and not only the fact of a deletion.
    pub const fn is_present(&self) -> bool {
        match self {
            Self::Value { .. } | Self::Count { .. } => true,
            Self::Tombstone | Self::Reset { .. } => false,
        }
    }

    /// About how many bytes the encoding has.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Value { data, .. } => data.len() + 48,
            Self::Count { taken_back, .. } => 48 + taken_back.len() * 20,
            Self::Tombstone | Self::Reset { .. } => 48,
        }
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        match self {
            Self::Tombstone => writer.u8(0),
            Self::Value { data, expire: None } => {
                writer.u8(1);
                writer.bytes(data);
            }
            Self::Value { data, expire: Some(expire) } => {
                writer.u8(2);
                writer.fixed64(expire.to_bits());
                writer.bytes(data);
            }
            Self::Count { count, taken_back } if taken_back.is_empty() => {
                writer.u8(3);
                count.encode(writer);
            }
            Self::Count { count, taken_back } => {
                writer.u8(5);
                count.encode(writer);
                writer.count(taken_back.len());
                taken_back.iter().for_each(|it| it.encode(writer));
            }
            Self::Reset { count, upto } => {
                writer.u8(4);
                count.encode(writer);
                writer.varint(*upto);
            }
        }
    }

    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        match reader.u8()? {
            0 => Ok(Self::Tombstone),
            1 => Ok(Self::Value { data: reader.bytes()?, expire: None }),
            2 => {
                let expire = Some(HybridTime::from_bits(reader.fixed64()?));
                Ok(Self::Value { data: reader.bytes()?, expire })
            }
            3 => Ok(Self::Count { count: Count::decode(reader)?, taken_back: Vec::new() }),
            4 => Ok(Self::Reset { count: Count::decode(reader)?, upto: reader.varint()? }),
            5 => {
                let count = Count::decode(reader)?;
                // One without any has another tag, so that equal contents have equal bytes.
                let taken_back = match reader.count(10)? {
                    0 => return Err(reader.invalid(0)),
                    many => (0..many).map(|_| TakenBack::decode(reader)),
                };
                Ok(Self::Count { count, taken_back: taken_back.collect::<Result<_, _>>()? })
            }
            tag => Err(reader.invalid(u64::from(tag))),
        }
    }
}

impl TakenBack {
    fn encode(self, writer: &mut Writer) {
        writer.varint(self.added);
        writer.varint(self.at);
        writer.fixed64(self.by.cast_unsigned());
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let (added, at) = (reader.varint()?, reader.varint()?);
        Ok(Self { added, at, by: reader.fixed64()?.cast_signed() })
    }
}

impl Count {
    fn encode(self, writer: &mut Writer) {
        writer.varint(self.since);
        writer.fixed64(self.total.cast_unsigned());
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { since: reader.varint()?, total: reader.fixed64()?.cast_signed() })
    }
}

/// One of several concurrent contents of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sibling {
    /// The write that created it.
    pub dot: Dot,
    /// When, by the hybrid clock of the region that took the write.
    pub time: HybridTime,
    /// The request that the write carried out, if that came with an id.
    pub request: Option<RequestTag>,
    /// What it left.
    pub content: Content,
}

/// Stands before a sibling's tag, where its content would begin; no content begins so.
const TAGGED: u8 = 0xff;

impl Sibling {
    /// Appends the encoding.
    pub fn encode(&self, writer: &mut Writer) {
        encode_dot(self.dot, writer);
        writer.fixed64(self.time.to_bits());
        if let Some(RequestTag(tag)) = self.request {
            writer.u8(TAGGED);
            writer.fixed64(tag);
        }
        self.content.encode(writer);
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged.
    pub fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let dot = decode_dot(reader)?;
        let time = HybridTime::from_bits(reader.fixed64()?);
        let request =
            if reader.skip_if(TAGGED) { Some(RequestTag(reader.fixed64()?)) } else { None };
        Ok(Self { dot, time, request, content: Content::decode(reader)? })
    }

    /// Whether both are the same write of the same request, taken by two regions.
    pub fn is_twin_of(&self, other: &Self) -> bool {
        self.request.is_some() && self.request == other.request && self.dot != other.dot
    }

    fn live_at(&self, now: HybridTime) -> Option<&Bytes> {
        self.content.live_at(now)
    }

    fn precedence(&self) -> (HybridTime, Dot) {
        (self.time, self.dot)
    }
}

/// What one write does to one key, as it travels between regions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// The key.
    pub key: Bytes,
    /// What the write leaves; its dot follows from the change that carries it.
    pub sibling: Sibling,
    /// Exactly the siblings that the write replaces. Never a range: what the writer had not seen
    /// stays.
    pub supersedes: Vec<Dot>,
    /// Siblings that go although the writer did not replace them.
    pub pushed_out: PushedOut,
}

/// Siblings that a write takes away without having replaced them: lost values, which enter the ledger
/// wherever they were held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushedOut {
    /// Which.
    pub dots: Vec<Dot>,
    /// Why, if there are any.
    pub cause: Cause,
}

impl PushedOut {
    /// These, for that reason. Without any there is none, so that equal changes have equal bytes.
    pub fn of(dots: Vec<Dot>, cause: Cause) -> Self {
        if dots.is_empty() { Self::default() } else { Self { dots, cause } }
    }
}

impl Default for PushedOut {
    /// None.
    fn default() -> Self {
        Self { dots: Vec::new(), cause: Cause::Bound }
    }
}

/// A concurrent content that was dropped, and the one that it lost to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// What was dropped.
    pub loser: Sibling,
    /// The dot of what stays.
    pub winner: Dot,
    /// The time of what stays.
    pub winner_time: HybridTime,
    /// Why it was dropped.
    pub cause: Cause,
}

/// All that is known about one key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    context: VersionVector,
    /// Sorted by dot.
    siblings: Vec<Sibling>,
}

const RECORD_VERSION: u8 = 1;

impl Record {
    /// Which writes of this key are accounted for: held, replaced or dropped.
    pub fn context(&self) -> &VersionVector {
        &self.context
    }

    /// The siblings, in order of their dots; under `lww` possibly a tombstone.
    pub fn siblings(&self) -> &[Sibling] {
        &self.siblings
    }

    /// The siblings that a reader sees at `now`, with their bytes: of twins, the first.
    pub fn live_at(&self, now: HybridTime) -> impl Iterator<Item = (&Sibling, &Bytes)> {
        let live = move || {
            let live = move |held| Some((held, Sibling::live_at(held, now)?));
            self.siblings.iter().filter_map(live)
        };
        let is_shown = move |held: &Sibling| {
            !live().any(|(other, _)| other.dot < held.dot && other.is_twin_of(held))
        };
        live().filter(move |(held, _)| is_shown(held))
    }

    /// Whether a value that a reader could see at `now` is the work of this write, shown or not.
    pub fn is_live_by(&self, dot: Dot, now: HybridTime) -> bool {
        let is_it = |held: &Sibling| held.dot == dot && held.live_at(now).is_some();
        self.siblings.iter().any(is_it)
    }

    /// How many concurrent contents there are, twins counted once.
    pub fn versions(&self) -> usize {
        let is_first = |held: &&Sibling| {
            let is_earlier_twin = |other: &Sibling| other.dot < held.dot && other.is_twin_of(held);
            !self.siblings.iter().any(is_earlier_twin)
        };
        self.siblings.iter().filter(is_first).count()
    }

    /// Whether a reader sees anything at `now`.
    pub fn is_live_at(&self, now: HybridTime) -> bool {
        self.live_at(now).next().is_some()
    }

    /// The latest time of the siblings.
    pub fn latest_time(&self) -> HybridTime {
        self.siblings.iter().map(|held| held.time).max().unwrap_or(HybridTime::ZERO)
    }

    /// The dots that a write with this context replaces; `None` stands for "all that is here". Whoever
    /// has seen a twin has seen the other.
    pub fn superseded_by(&self, context: Option<&VersionVector>) -> Vec<Dot> {
        let seen = |held: &&Sibling| context.is_none_or(|context| self.is_seen(held, context));
        self.siblings.iter().filter(seen).map(|held| held.dot).collect()
    }

    /// Whether nothing was written here beyond what `context` has seen.
    pub fn is_current(&self, context: &VersionVector) -> bool {
        let mut seen = context.clone();
        let held = self.siblings.iter().filter(|held| self.is_seen(held, context));
        held.for_each(|held| seen.add(held.dot));
        seen.covers_all(&self.context)
    }

    fn is_seen(&self, held: &Sibling, context: &VersionVector) -> bool {
        let is_seen_twin = |other: &Sibling| other.is_twin_of(held) && context.covers(other.dot);
        context.covers(held.dot) || self.siblings.iter().any(is_seen_twin)
    }

    /// Whether no sibling holds a value: only the fact of a deletion is left.
    pub fn is_dead(&self) -> bool {
        !self.siblings.iter().any(|held| held.content.is_present())
    }

    /// Applies one write and answers what was dropped, by the rule or by the bound on siblings. A
    /// write that was seen before changes nothing.
    ///
    /// Writes must come in causal order: all that a write's origin had seen comes first. `seen` is
    /// what that is: a tombstone in it loses to the write, whatever their times, because the
    /// origin may have collected it already and gone by no time.
    pub fn apply(&mut self, delta: &Delta, seen: &VersionVector, rule: Rule) -> Vec<Dropped> {
        let incoming = &delta.sibling;
        if self.context.covers(incoming.dot) {
            return Vec::new();
        }
        self.context.add(incoming.dot);
        self.siblings.retain(|held| !delta.supersedes.contains(&held.dot));
        let PushedOut { dots, cause } = &delta.pushed_out;
        let pushed_out = self.take_out(|held| dots.contains(&held.dot));
        let is_over = |held: &Sibling| seen.covers(held.dot) && outlives(incoming, held);
        let outlived = self.take_out(is_over);
        let at = self.siblings.partition_point(|held| held.dot < incoming.dot);
        self.siblings.insert(at, incoming.clone());
        let (winner, winner_time) = (incoming.dot, incoming.time);
        let lost =
            |cause: Cause| move |loser: Sibling| Dropped { loser, winner, winner_time, cause };
        let pushed_out = pushed_out.into_iter().map(lost(*cause));
        // A reset that is over has done what it was for.
        let outlived = outlived
            .into_iter()
            .filter(|held| held.content == Content::Tombstone && !held.is_twin_of(incoming));
        let outlived = outlived.map(lost(Cause::Rule));
        pushed_out.chain(outlived).chain(self.resolve(rule)).collect()
    }

    /// Removes the siblings that `goes` holds of.
    fn take_out(&mut self, goes: impl Fn(&Sibling) -> bool) -> Vec<Sibling> {
        let (gone, kept) = self.siblings.drain(..).partition(goes);
        self.siblings = kept;
        gone
    }

    /// The record of these parts, brought to what the rule allows, and what that dropped.
    pub(crate) fn resolved(
        context: VersionVector,
        mut siblings: Vec<Sibling>,
        rule: Rule,
    ) -> (Self, Vec<Dropped>) {
        siblings.sort_by_key(|held| held.dot);
        let mut record = Self { context, siblings };
        let dropped = record.resolve(rule);
        (record, dropped)
    }

    /// Brings the siblings to what the rule allows.
    fn resolve(&mut self, rule: Rule) -> Vec<Dropped> {
        match rule {
            Rule::Lww => self.keep_latest(),
            Rule::Siblings
            | Rule::Counter
            | Rule::Set
            | Rule::Map
            | Rule::Flag
            | Rule::Max
            | Rule::Min => {
                // A deletion removed what it had seen; nothing of it needs to stay.
                self.siblings.retain(|held| held.content != Content::Tombstone);
                Vec::new()
            }
        }
    }

    fn keep_latest(&mut self) -> Vec<Dropped> {
        let Some(winner) = self.siblings.iter().map(Sibling::precedence).max() else {
            return Vec::new();
        };
        let (winner_time, winner) = winner;
        let lost = self.take_out(|held| held.dot != winner);
        // The twin of what stays is no loss: it stays.
        let is_loss =
            |loser: &Sibling| !self.siblings.iter().any(|winner| loser.is_twin_of(winner));
        lost.into_iter()
            .filter(is_loss)
            .map(|loser| Dropped { loser, winner, winner_time, cause: Cause::Rule })
            .collect()
    }

    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::with_capacity(64 + self.data_bytes());
        writer.u8(RECORD_VERSION);
        self.context.encode(&mut writer);
        writer.count(self.siblings.len());
        for sibling in &self.siblings {
            sibling.encode(&mut writer);
        }
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged, or a sibling is out of order or not covered by the context.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("record", bytes);
        reader.version(RECORD_VERSION)?;
        let context = VersionVector::decode(&mut reader)?;
        let count = reader.count(12)?;
        let mut siblings: Vec<Sibling> = Vec::with_capacity(count);
        for _ in 0..count {
            let sibling = Sibling::decode(&mut reader)?;
            let in_order = siblings.last().is_none_or(|last| last.dot < sibling.dot);
            if !in_order || !context.covers(sibling.dot) {
                return Err(reader.invalid(sibling.dot.seq));
            }
            siblings.push(sibling);
        }
        reader.finish()?;
        Ok(Self { context, siblings })
    }

    fn data_bytes(&self) -> usize {
        self.siblings.iter().map(|held| held.content.bytes()).sum()
    }
}

/// Whether a deletion that a write had seen, and did not name, is over with it: the writer may have
/// collected it. A reset stays as long as the count that it is a part of.
fn outlives(incoming: &Sibling, held: &Sibling) -> bool {
    match (&held.content, &incoming.content) {
        (Content::Tombstone, _) => true,
        (Content::Reset { count: of, .. }, Content::Count { count, .. }) => of.since != count.since,
        (Content::Reset { .. } | Content::Value { .. } | Content::Count { .. }, _) => false,
    }
}

#[cfg(test)]
mod tests;
