//! Commands: what a shard's Raft log carries, and what executing them answers.
//!
//! A log entry holds a batch of commands. They are encoded once, where a request comes in, and
//! travel as bytes to the log, the followers and the state machine. Everything that executing a
//! command depends on, time and rule included, is in the command or in the shard's state.

use std::collections::BTreeMap;

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use crate::{
    change::Change,
    codec::{DecodeError, Reader, Writer},
    hlc::HybridTime,
    id::{Actor, Dot, NamespaceId, RegionId, RequestId},
    ledger::{LedgerEntry, LedgerId, Noted},
    members::{Member, Members},
    record::{Content, Record, Rule},
    repair::{Offer, Trust},
    request::Requested,
    typed::{Mutation, Refused},
    vector::{VersionVector, decode_actor, decode_dot, encode_actor, encode_dot},
};

/// One thing for the state machine to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A client's write.
    Write(Write),
    /// Changes of other regions.
    Ingest(Ingest),
    /// Forget the part of the change log that every region has.
    Trim(Trim),
    /// Drop tombstones that every region has.
    Collect(Collect),
    /// Forget the outcomes of old requests.
    ForgetRequests(Vec<RequestId>),
    /// Take over records that another region has.
    Merge(Merge),
    /// Move the frontier to what a finished repair brought.
    Advance(Advance),
    /// Delete values whose time is over.
    Expire(Expire),
    /// Change how this region pulls from another.
    SetLink(RegionId, LinkSetting),
    /// Learn of regions, all at once: what is decided later is never known without what was decided before.
    Learn(Members),
    /// Begin empty, in a new incarnation.
    StartOver(StartOver),
    /// Forget writes that were kept for review.
    ForgetReviewed(ForgetReviewed),
    /// Forget entries of the ledger.
    ForgetConflicts(ForgetConflicts),
    /// Settle keys that nobody has settled in time.
    Settle(Settle),
}

/// A client's write: checks and operations, all or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub namespace: NamespaceId,
    /// The namespace's rule, which never changes.
    pub rule: Rule,
    /// The region that takes the write.
    pub actor: Actor,
    /// Stamped by the leader.
    pub time: HybridTime,
    /// Makes the write safe to repeat.
    pub request: Option<RequestId>,
    /// Conditions that must all hold.
    pub checks: Vec<Check>,
    /// What to write, in order.
    pub operations: Vec<Operation>,
    /// What to do to typed values, in order, after that.
    pub mutations: Vec<Mutation>,
}

/// A condition on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The key.
    pub key: Bytes,
    /// What must hold.
    pub condition: Condition,
}

/// What a check demands of a key, as seen at the write's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// No live value.
    Absent,
    /// At least one live value.
    Present,
    /// Exactly one live value, created by this write.
    DotEquals(Dot),
    /// Exactly one live value, with these bytes.
    DataEquals(Bytes),
    /// Nothing was written to the key, nor deleted, beyond what this context has seen.
    ContextCurrent(VersionVector),
}

impl Condition {
    /// Whether the condition holds for `record` at `now`. Twins are one value.
    pub fn holds(&self, record: Option<&Record>, now: HybridTime) -> bool {
        let mut live = record.into_iter().flat_map(|record| record.live_at(now));
        let (first, second) = (live.next(), live.next());
        match self {
            Self::Absent => first.is_none(),
            Self::Present => first.is_some(),
            Self::DotEquals(dot) => {
                // All live values are twins of the one that is shown.
                second.is_none() && record.is_some_and(|record| record.is_live_by(*dot, now))
            }
            Self::DataEquals(data) => {
                second.is_none() && first.is_some_and(|(_, held)| held == data)
            }
            Self::ContextCurrent(context) => match record {
                Some(record) => record.is_current(context),
                // What was seen may have been deleted, and the tombstone be collected.
                None => context.is_empty(),
            },
        }
    }

    /// Whether the condition holds for a typed value: there is only whether it is there.
    pub const fn holds_for_typed(&self, is_present: bool) -> bool {
        match self {
            Self::Absent => !is_present,
            Self::Present => is_present,
            Self::DotEquals(_) | Self::DataEquals(_) | Self::ContextCurrent(_) => false,
        }
    }
}

/// One write to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The key.
    pub key: Bytes,
    /// What to leave there.
    pub content: Content,
    /// Replace exactly what this has seen; `None` replaces all that is there.
    pub context: Option<VersionVector>,
}

/// Changes of other regions, in causal order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingest {
    /// Where.
    pub namespace: NamespaceId,
    /// The namespace's rule.
    pub rule: Rule,
    /// The region that ingests: its own changes never come from outside.
    pub local: Actor,
    /// The region that sent them, which need not have written them.
    pub source: Actor,
    /// Stamped by the leader: conflicts that come of it are noted then. The changes have times of their
    /// own.
    pub time: HybridTime,
    /// What to apply.
    pub changes: Vec<Change>,
}

/// Forgets changes up to a vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trim {
    /// Where.
    pub namespace: NamespaceId,
    /// Changes that this covers go.
    pub upto: VersionVector,
}

/// Drops the tombstones of `keys` that `stable` covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collect {
    /// Where.
    pub namespace: NamespaceId,
    /// What every region has applied, such that nothing that has not seen it can still come.
    pub stable: VersionVector,
    /// Who was counted for that. Nothing is dropped if this shard has heard of others since.
    pub members: Members,
    /// Where to look.
    pub keys: Vec<Bytes>,
}

/// Takes over records of another region, as of a cut of it. See [`crate::repair`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// Where.
    pub namespace: NamespaceId,
    /// The namespace's rule.
    pub rule: Rule,
    /// The region that compared itself. In another life nothing of that holds.
    pub local: Actor,
    /// The other region.
    pub source: Actor,
    /// Stamped by the leader: conflicts that come of it are noted then, and none that it brings later.
    pub time: HybridTime,
    /// What the other region had applied.
    pub cut: VersionVector,
    /// Up to where its records were ahead of that.
    pub ahead: VersionVector,
    /// What to conclude from what one side lacks.
    pub trust: Trust,
    /// The records.
    pub offers: Vec<Offer>,
    /// Values that the other region dropped.
    pub ledger: Vec<LedgerEntry>,
}

/// Ends a repair: all that a cut has, and that was not here, is merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Where.
    pub namespace: NamespaceId,
    /// The region that was repaired.
    pub local: Actor,
    /// The region that it was repaired from.
    pub source: Actor,
    /// What was applied here when the trees were compared.
    pub since: VersionVector,
    /// What the other region had applied.
    pub cut: VersionVector,
    /// Up to where its records were ahead of that.
    pub ahead: VersionVector,
}

/// Turns expired values of this region's own writes into deletions, which travel like any other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expire {
    /// Where.
    pub namespace: NamespaceId,
    /// The namespace's rule.
    pub rule: Rule,
    /// The region whose values expire.
    pub actor: Actor,
    /// Stamped by the leader; what expires later stays.
    pub time: HybridTime,
    /// Which values.
    pub values: Vec<(Bytes, Dot)>,
}

/// Begins empty, in a new incarnation: all data goes, and what only this region had is kept for review.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartOver {
    /// The region that begins, and in which incarnation. Nothing happens if it is not a new one.
    pub local: Actor,
    /// What the others have, by namespace: of this region's values, those above it are kept.
    pub known: BTreeMap<NamespaceId, VersionVector>,
    /// What the others know of the regions. It replaces what was known here: a region that was shut out
    /// may have decided things that nobody else went by.
    pub members: Members,
}

/// Forgets writes that were kept for review.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForgetReviewed {
    /// Where.
    pub namespace: NamespaceId,
    /// Which.
    pub writes: Vec<(Bytes, Dot)>,
}

/// Forgets entries of the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForgetConflicts {
    /// Where.
    pub namespace: NamespaceId,
    /// Which; one that was noted at another time is another entry, and stays.
    pub entries: Vec<Noted>,
}

/// Settles keys that hold several values, where nobody did in time: the latest value stays, and the
/// others enter the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settle {
    /// Where.
    pub namespace: NamespaceId,
    /// The namespace's rule.
    pub rule: Rule,
    /// The region that settles, for all.
    pub actor: Actor,
    /// Stamped by the leader.
    pub time: HybridTime,
    /// Which, with the time of the latest value of each: another one means another deadline.
    pub keys: Vec<(Bytes, HybridTime)>,
}

/// How a region pulls from another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkSetting {
    /// Pull nothing.
    pub paused: bool,
    /// Most bytes a second, for each node that pulls; 0 for no limit.
    pub bytes_per_second: u64,
}

/// What executing a command answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The write was applied, now or when the same request came before.
    Written(Vec<Written>),
    /// Nothing was written: the request's id was used for another write.
    RequestReused,
    /// Nothing was written: these checks did not hold, now or when the same request came before.
    ChecksFailed(Vec<FailedCheck>),
    /// Nothing was written: a typed value does not take a mutation.
    Refused(Refused),
    /// Nothing was written: an operation's context has seen more than this region has applied.
    /// The same write succeeds when the frontier covers `needed`.
    ContextAhead {
        /// What the contexts have seen.
        needed: VersionVector,
        /// What is applied here.
        frontier: VersionVector,
    },
    /// Changes were taken up to the first that could not be.
    Ingested(Ingested),
    /// So many tombstones were dropped.
    Collected(usize),
    /// So many values were deleted.
    Expired(usize),
    /// Nothing was done: another region holds writes of this very region that this one does not know.
    OwnChangeUnknown,
    /// Nothing was written: this region takes no writes, as this says of it.
    NotActive(Member),
    /// Nothing was done: the region that it came from is shut out, or one of the two is in another
    /// incarnation by now.
    SourceOut,
    /// Records were merged.
    Merged(Merged),
    /// The frontier after a repair.
    Advanced(VersionVector),
    /// Nothing was done: what was compared has changed since. Compare again.
    Moved,
    /// Done; nothing to tell.
    Done,
}

/// What one operation of a write did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The identity of the write.
    pub dot: Dot,
    /// When.
    pub time: HybridTime,
    /// The key's context after it.
    pub context: VersionVector,
    /// Whether concurrent values remain or were resolved by the rule.
    pub conflict: bool,
    /// Of a counter that was added to, the sum after it.
    pub sum: Option<i64>,
}

/// A check that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedCheck {
    /// Index into the write's checks.
    pub check: usize,
    /// What the key has instead; `None` if it was never written.
    pub actual: Option<Record>,
}

/// What an ingest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingested {
    /// Changes applied.
    pub applied: u64,
    /// Changes that were here already.
    pub repeated: u64,
    /// The frontier after it.
    pub frontier: VersionVector,
    /// Why not all were taken.
    pub stopped: Option<Stopped>,
    /// A request that another region took, and that this one remembers as another write: a client gave
    /// both one id. The first such one; all changes are applied.
    pub reused: Option<RequestId>,
}

/// What a merge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Records that changed.
    pub changed: u64,
    /// A dot that stands for different writes here and there. The record that has it, and others
    /// like it, were left alone.
    pub reused: Option<Dot>,
}

/// Why an ingest did not take a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// An earlier change of the same actor is missing.
    Gap,
    /// A change that it depends on is missing.
    Dependency,
    /// It claims to be a write of this very region that this region does not know: the region's
    /// counters went back, and going on would use dots twice.
    OwnChangeUnknown,
    /// This region has applied another write under the same dot.
    DotReused(Dot),
    /// The region that sent it is shut out, or in another incarnation.
    SourceOut,
}

const BATCH_VERSION: u8 = 2;
const WRITE: u8 = 1;
const INGEST: u8 = 2;
const TRIM: u8 = 3;
const FORGET_REQUESTS: u8 = 4;
const COLLECT: u8 = 5;
const MERGE: u8 = 6;
const ADVANCE: u8 = 7;
const EXPIRE: u8 = 8;
const SET_LINK: u8 = 9;
const LEARN: u8 = 10;
const START_OVER: u8 = 11;
const FORGET_REVIEWED: u8 = 12;
const FORGET_CONFLICTS: u8 = 13;
const SETTLE: u8 = 14;

/// Packs encoded commands into the payload of one log entry.
pub fn encode_batch(commands: &[Bytes]) -> Bytes {
    let capacity = 4 + commands.iter().map(|command| command.len() + 4).sum::<usize>();
    let mut writer = Writer::with_capacity(capacity);
    writer.u8(BATCH_VERSION);
    writer.count(commands.len());
    for command in commands {
        writer.bytes(command);
    }
    writer.finish()
}

/// Unpacks what [`encode_batch`] packed.
///
/// # Errors
/// If the bytes are damaged or hold a command that this version does not know. A replica must
/// stop then: skipping a command would make it differ from the others.
pub fn decode_batch(bytes: Bytes) -> Result<Vec<Command>, DecodeError> {
    let mut reader = Reader::new("command batch", bytes);
    reader.version(BATCH_VERSION)?;
    let count = reader.count(2)?;
    let mut commands = Vec::with_capacity(count);
    for _ in 0..count {
        commands.push(Command::from_bytes(reader.bytes()?)?);
    }
    reader.finish()?;
    Ok(commands)
}

impl Command {
    /// The encoding.
    pub fn to_bytes(&self) -> Bytes {
        let mut writer = Writer::with_capacity(128 + self.data_bytes());
        match self {
            Self::Write(write) => {
                writer.u8(WRITE);
                write.encode(&mut writer);
            }
            Self::Ingest(ingest) => {
                writer.u8(INGEST);
                writer.varint(u64::from(ingest.namespace.0));
                writer.u8(ingest.rule.to_byte());
                encode_actor(ingest.local, &mut writer);
                encode_actor(ingest.source, &mut writer);
                writer.fixed64(ingest.time.to_bits());
                writer.count(ingest.changes.len());
                for change in &ingest.changes {
                    writer.bytes(&change.to_bytes());
                }
            }
            Self::Trim(trim) => {
                writer.u8(TRIM);
                writer.varint(u64::from(trim.namespace.0));
                trim.upto.encode(&mut writer);
            }
            Self::Collect(collect) => {
                writer.u8(COLLECT);
                writer.varint(u64::from(collect.namespace.0));
                collect.stable.encode(&mut writer);
                collect.members.encode(&mut writer);
                writer.count(collect.keys.len());
                collect.keys.iter().for_each(|key| writer.bytes(key));
            }
            Self::ForgetRequests(requests) => {
                writer.u8(FORGET_REQUESTS);
                writer.count(requests.len());
                for &request in requests {
                    encode_request(request, &mut writer);
                }
            }
            Self::Merge(merge) => {
                writer.u8(MERGE);
                merge.encode(&mut writer);
            }
            Self::Advance(advance) => {
                writer.u8(ADVANCE);
                writer.varint(u64::from(advance.namespace.0));
                encode_actor(advance.local, &mut writer);
                encode_actor(advance.source, &mut writer);
                advance.since.encode(&mut writer);
                advance.cut.encode(&mut writer);
                advance.ahead.encode(&mut writer);
            }
            Self::Expire(expire) => {
                writer.u8(EXPIRE);
                writer.varint(u64::from(expire.namespace.0));
                writer.u8(expire.rule.to_byte());
                encode_actor(expire.actor, &mut writer);
                writer.fixed64(expire.time.to_bits());
                encode_writes(&expire.values, &mut writer);
            }
            Self::SetLink(peer, setting) => {
                writer.u8(SET_LINK);
                writer.varint(u64::from(peer.0));
                setting.encode(&mut writer);
            }
            Self::Learn(members) => {
                writer.u8(LEARN);
                members.encode(&mut writer);
            }
            Self::StartOver(StartOver { local, known, members }) => {
                writer.u8(START_OVER);
                encode_actor(*local, &mut writer);
                writer.count(known.len());
                for (namespace, known) in known {
                    writer.varint(u64::from(namespace.0));
                    known.encode(&mut writer);
                }
                members.encode(&mut writer);
            }
            Self::ForgetReviewed(ForgetReviewed { namespace, writes }) => {
                writer.u8(FORGET_REVIEWED);
                writer.varint(u64::from(namespace.0));
                encode_writes(writes, &mut writer);
            }
            Self::ForgetConflicts(ForgetConflicts { namespace, entries }) => {
                writer.u8(FORGET_CONFLICTS);
                writer.varint(u64::from(namespace.0));
                writer.count(entries.len());
                for entry in entries {
                    writer.fixed64(entry.at.to_bits());
                    writer.raw(&entry.id.0);
                }
            }
            Self::Settle(settle) => {
                writer.u8(SETTLE);
                writer.varint(u64::from(settle.namespace.0));
                writer.u8(settle.rule.to_byte());
                encode_actor(settle.actor, &mut writer);
                writer.fixed64(settle.time.to_bits());
                writer.count(settle.keys.len());
                for (key, since) in &settle.keys {
                    writer.bytes(key);
                    writer.fixed64(since.to_bits());
                }
            }
        }
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged or of an unknown kind.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("command", bytes);
        let command = match reader.u8()? {
            WRITE => Self::Write(Write::decode(&mut reader)?),
            INGEST => {
                let namespace = NamespaceId(reader.u32()?);
                let rule = decode_rule(&mut reader)?;
                let local = decode_actor(&mut reader)?;
                let source = decode_actor(&mut reader)?;
                let time = HybridTime::from_bits(reader.fixed64()?);
                let count = reader.count(2)?;
                let changes = (0..count)
                    .map(|_| Change::from_bytes(reader.bytes()?))
                    .collect::<Result<_, _>>()?;
                Self::Ingest(Ingest { namespace, rule, local, source, time, changes })
            }
            TRIM => {
                let namespace = NamespaceId(reader.u32()?);
                Self::Trim(Trim { namespace, upto: VersionVector::decode(&mut reader)? })
            }
            COLLECT => {
                let namespace = NamespaceId(reader.u32()?);
                let stable = VersionVector::decode(&mut reader)?;
                let members = Members::decode(&mut reader)?;
                let count = reader.count(1)?;
                let keys = (0..count).map(|_| reader.bytes()).collect::<Result<_, _>>()?;
                Self::Collect(Collect { namespace, stable, members, keys })
            }
            FORGET_REQUESTS => {
                let count = reader.count(9)?;
                let requests =
                    (0..count).map(|_| decode_request(&mut reader)).collect::<Result<_, _>>()?;
                Self::ForgetRequests(requests)
            }
            MERGE => Self::Merge(Merge::decode(&mut reader)?),
            ADVANCE => Self::Advance(Advance {
                namespace: NamespaceId(reader.u32()?),
                local: decode_actor(&mut reader)?,
                source: decode_actor(&mut reader)?,
                since: VersionVector::decode(&mut reader)?,
                cut: VersionVector::decode(&mut reader)?,
                ahead: VersionVector::decode(&mut reader)?,
            }),
            EXPIRE => {
                let namespace = NamespaceId(reader.u32()?);
                let rule = decode_rule(&mut reader)?;
                let actor = decode_actor(&mut reader)?;
                let time = HybridTime::from_bits(reader.fixed64()?);
                let values = decode_writes(&mut reader)?;
                Self::Expire(Expire { namespace, rule, actor, time, values })
            }
            SET_LINK => {
                let peer = RegionId(reader.u16()?);
                Self::SetLink(peer, LinkSetting::decode(&mut reader)?)
            }
            LEARN => Self::Learn(Members::decode(&mut reader)?),
            START_OVER => {
                let local = decode_actor(&mut reader)?;
                let count = reader.count(2)?;
                let known = (0..count)
                    .map(|_| {
                        let namespace = NamespaceId(reader.u32()?);
                        Ok((namespace, VersionVector::decode(&mut reader)?))
                    })
                    .collect::<Result<_, DecodeError>>()?;
                let members = Members::decode(&mut reader)?;
                Self::StartOver(StartOver { local, known, members })
            }
            FORGET_REVIEWED => {
                let namespace = NamespaceId(reader.u32()?);
                let writes = decode_writes(&mut reader)?;
                Self::ForgetReviewed(ForgetReviewed { namespace, writes })
            }
            FORGET_CONFLICTS => {
                let namespace = NamespaceId(reader.u32()?);
                let count = reader.count(Noted::BYTES)?;
                let entries =
                    (0..count).map(|_| decode_noted(&mut reader)).collect::<Result<_, _>>()?;
                Self::ForgetConflicts(ForgetConflicts { namespace, entries })
            }
            SETTLE => {
                let namespace = NamespaceId(reader.u32()?);
                let rule = decode_rule(&mut reader)?;
                let actor = decode_actor(&mut reader)?;
                let time = HybridTime::from_bits(reader.fixed64()?);
                let count = reader.count(9)?;
                let keys = (0..count)
                    .map(|_| Ok((reader.bytes()?, HybridTime::from_bits(reader.fixed64()?))))
                    .collect::<Result<_, DecodeError>>()?;
                Self::Settle(Settle { namespace, rule, actor, time, keys })
            }
            kind => return Err(DecodeError::Version { what: "command", version: kind }),
        };
        reader.finish()?;
        Ok(command)
    }

    fn data_bytes(&self) -> usize {
        match self {
            Self::Write(write) => {
                let bytes = |it: &Operation| it.key.len() + it.content.bytes();
                let operations: usize = write.operations.iter().map(bytes).sum();
                operations + write.mutations.iter().map(Mutation::bytes).sum::<usize>()
            }
            Self::Ingest(_)
            | Self::Trim(_)
            | Self::Collect(_)
            | Self::ForgetRequests(_)
            | Self::Merge(_)
            | Self::Advance(_)
            | Self::Expire(_)
            | Self::SetLink(..)
            | Self::Learn(_)
            | Self::StartOver(_)
            | Self::ForgetReviewed(_)
            | Self::ForgetConflicts(_)
            | Self::Settle(_) => 0,
        }
    }
}

impl Write {
    /// The request, if it came with an id.
    pub fn requested(&self) -> Option<Requested> {
        self.request.map(|id| Requested { id, fingerprint: self.fingerprint() })
    }

    /// A hash of what is asked for: the namespace, the checks, and what is written where. A repeat
    /// has the same one; times and expiry, which a repeat may compute anew, do not count.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Xxh3::new();
        let part = |hash: &mut Xxh3, tag: u8, bytes: &[u8]| {
            hash.update(&[tag]);
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        hash.update(&self.namespace.0.to_le_bytes());
        for Check { key, condition } in &self.checks {
            part(&mut hash, 0, key);
            match condition {
                Condition::Absent => part(&mut hash, 1, &[]),
                Condition::Present => part(&mut hash, 2, &[]),
                Condition::DotEquals(dot) => {
                    let mut writer = Writer::default();
                    encode_dot(*dot, &mut writer);
                    part(&mut hash, 3, &writer.finish());
                }
                Condition::DataEquals(data) => part(&mut hash, 4, data),
                Condition::ContextCurrent(context) => part(&mut hash, 8, &context.to_bytes()),
            }
        }
        for operation in &self.operations {
            part(&mut hash, 5, &operation.key);
            match &operation.content {
                Content::Value { data, .. } => part(&mut hash, 7, data),
                Content::Tombstone | Content::Count { .. } | Content::Reset { .. } => {
                    part(&mut hash, 6, &[]);
                }
            }
        }
        for mutation in &self.mutations {
            let mut writer = Writer::default();
            Mutation { context: None, ..mutation.clone() }.encode(&mut writer);
            part(&mut hash, 8, &writer.finish());
        }
        hash.digest()
    }

    fn encode(&self, writer: &mut Writer) {
        writer.varint(u64::from(self.namespace.0));
        writer.u8(self.rule.to_byte());
        encode_actor(self.actor, writer);
        writer.fixed64(self.time.to_bits());
        writer.u8(u8::from(self.request.is_some()));
        if let Some(request) = self.request {
            encode_request(request, writer);
        }
        writer.count(self.checks.len());
        for check in &self.checks {
            writer.bytes(&check.key);
            match &check.condition {
                Condition::Absent => writer.u8(0),
                Condition::Present => writer.u8(1),
                Condition::DotEquals(dot) => {
                    writer.u8(2);
                    encode_dot(*dot, writer);
                }
                Condition::DataEquals(data) => {
                    writer.u8(3);
                    writer.bytes(data);
                }
                Condition::ContextCurrent(context) => {
                    writer.u8(4);
                    context.encode(writer);
                }
            }
        }
        writer.count(self.operations.len());
        for operation in &self.operations {
            writer.bytes(&operation.key);
            operation.content.encode(writer);
            writer.u8(u8::from(operation.context.is_some()));
            if let Some(context) = &operation.context {
                context.encode(writer);
            }
        }
        writer.count(self.mutations.len());
        self.mutations.iter().for_each(|mutation| mutation.encode(writer));
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let namespace = NamespaceId(reader.u32()?);
        let rule = decode_rule(reader)?;
        let actor = decode_actor(reader)?;
        let time = HybridTime::from_bits(reader.fixed64()?);
        let request = if decode_flag(reader)? { Some(decode_request(reader)?) } else { None };
        let count = reader.count(2)?;
        let checks = (0..count).map(|_| decode_check(reader)).collect::<Result<_, _>>()?;
        let count = reader.count(3)?;
        let operations = (0..count).map(|_| decode_operation(reader)).collect::<Result<_, _>>()?;
        let count = reader.count(4)?;
        let mutations = (0..count).map(|_| Mutation::decode(reader)).collect::<Result<_, _>>()?;
        Ok(Self { namespace, rule, actor, time, request, checks, operations, mutations })
    }
}

impl LinkSetting {
    /// Appends the encoding.
    pub fn encode(&self, writer: &mut Writer) {
        writer.u8(u8::from(self.paused));
        writer.varint(self.bytes_per_second);
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged.
    pub fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { paused: decode_flag(reader)?, bytes_per_second: reader.varint()? })
    }
}

impl Merge {
    fn encode(&self, writer: &mut Writer) {
        writer.varint(u64::from(self.namespace.0));
        writer.u8(self.rule.to_byte());
        encode_actor(self.local, writer);
        encode_actor(self.source, writer);
        writer.fixed64(self.time.to_bits());
        writer.u8(u8::from(self.trust == Trust::Neither));
        self.cut.encode(writer);
        self.ahead.encode(writer);
        writer.count(self.offers.len());
        for offer in &self.offers {
            writer.bytes(&offer.to_bytes());
        }
        writer.count(self.ledger.len());
        for entry in &self.ledger {
            writer.bytes(&entry.to_bytes());
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let namespace = NamespaceId(reader.u32()?);
        let rule = decode_rule(reader)?;
        let local = decode_actor(reader)?;
        let source = decode_actor(reader)?;
        let time = HybridTime::from_bits(reader.fixed64()?);
        let trust = if decode_flag(reader)? { Trust::Neither } else { Trust::Coverage };
        let cut = VersionVector::decode(reader)?;
        let ahead = VersionVector::decode(reader)?;
        let count = reader.count(4)?;
        let offers =
            (0..count).map(|_| Offer::from_bytes(reader.bytes()?)).collect::<Result<_, _>>()?;
        let count = reader.count(4)?;
        let ledger = (0..count)
            .map(|_| LedgerEntry::from_bytes(reader.bytes()?))
            .collect::<Result<_, _>>()?;
        Ok(Self { namespace, rule, local, source, time, cut, ahead, trust, offers, ledger })
    }
}

fn decode_check(reader: &mut Reader) -> Result<Check, DecodeError> {
    let key = reader.bytes()?;
    let condition = match reader.u8()? {
        0 => Condition::Absent,
        1 => Condition::Present,
        2 => Condition::DotEquals(decode_dot(reader)?),
        3 => Condition::DataEquals(reader.bytes()?),
        4 => Condition::ContextCurrent(VersionVector::decode(reader)?),
        tag => return Err(reader.invalid(u64::from(tag))),
    };
    Ok(Check { key, condition })
}

fn decode_operation(reader: &mut Reader) -> Result<Operation, DecodeError> {
    let key = reader.bytes()?;
    let content = Content::decode(reader)?;
    let context = if decode_flag(reader)? { Some(VersionVector::decode(reader)?) } else { None };
    Ok(Operation { key, content, context })
}

fn encode_writes(writes: &[(Bytes, Dot)], writer: &mut Writer) {
    writer.count(writes.len());
    for (key, dot) in writes {
        writer.bytes(key);
        encode_dot(*dot, writer);
    }
}

fn decode_writes(reader: &mut Reader) -> Result<Vec<(Bytes, Dot)>, DecodeError> {
    let count = reader.count(4)?;
    (0..count).map(|_| Ok((reader.bytes()?, decode_dot(reader)?))).collect()
}

fn decode_noted(reader: &mut Reader) -> Result<Noted, DecodeError> {
    let at = HybridTime::from_bits(reader.fixed64()?);
    let mut id = [0; 16];
    id.copy_from_slice(&reader.raw(16)?);
    Ok(Noted { at, id: LedgerId(id) })
}

fn encode_request(request: RequestId, writer: &mut Writer) {
    writer.fixed64(request.client);
    writer.varint(request.number);
}

fn decode_request(reader: &mut Reader) -> Result<RequestId, DecodeError> {
    Ok(RequestId { client: reader.fixed64()?, number: reader.varint()? })
}

fn decode_rule(reader: &mut Reader) -> Result<Rule, DecodeError> {
    let byte = reader.u8()?;
    Rule::from_byte(byte).ok_or_else(|| reader.invalid(u64::from(byte)))
}

fn decode_flag(reader: &mut Reader) -> Result<bool, DecodeError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        byte => Err(reader.invalid(u64::from(byte))),
    }
}

/// What is kept of a request, so that a repeat of it gets the same answer: where it was executed, and
/// wherever its change came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// When it was executed.
    pub executed: HybridTime,
    /// What it asked for ([`Write::fingerprint`]): another write under its id is refused.
    pub fingerprint: u64,
    /// What it was answered.
    pub answer: Answer,
}

/// What a request was answered when it was executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was written.
    Written {
        /// The first write of the change that stands for it; `None` if what it asked for was so already.
        first: Option<Dot>,
        /// Where the change came from another region: one for each of its writes, with what the origin
        /// had seen of the whole namespace as context. Of the key, that is the same.
        results: Vec<Written>,
    },
    /// Checks did not hold, those at these places.
    ChecksFailed(Vec<usize>),
    /// A mutation could not be made.
    Refused(Refused),
}

const REMEMBERED_VERSION: u8 = 3;
const WRITTEN_NOTHING: u8 = 0;
const WRITTEN: u8 = 1;
const CHECKS_FAILED: u8 = 2;
const REFUSED: u8 = 3;

impl Written {
    fn encode(&self, writer: &mut Writer) {
        encode_dot(self.dot, writer);
        writer.fixed64(self.time.to_bits());
        writer.u8(u8::from(self.conflict));
        self.context.encode(writer);
        writer.u8(u8::from(self.sum.is_some()));
        if let Some(sum) = self.sum {
            writer.fixed64(sum.cast_unsigned());
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            dot: decode_dot(reader)?,
            time: HybridTime::from_bits(reader.fixed64()?),
            conflict: decode_flag(reader)?,
            context: VersionVector::decode(reader)?,
            sum: if decode_flag(reader)? { Some(reader.fixed64()?.cast_signed()) } else { None },
        })
    }
}

impl Remembered {
    /// The encoding, with its format version.
    pub fn to_bytes(&self) -> Bytes {
        let results = match &self.answer {
            Answer::Written { results, .. } => results.len(),
            Answer::ChecksFailed(_) | Answer::Refused(_) => 0,
        };
        let mut writer = Writer::with_capacity(32 + results * 48);
        writer.u8(REMEMBERED_VERSION);
        writer.fixed64(self.executed.to_bits());
        writer.fixed64(self.fingerprint);
        match &self.answer {
            Answer::Written { first, results } => {
                writer.u8(if first.is_some() { WRITTEN } else { WRITTEN_NOTHING });
                first.iter().for_each(|&first| encode_dot(first, &mut writer));
                writer.count(results.len());
                results.iter().for_each(|result| result.encode(&mut writer));
            }
            Answer::ChecksFailed(checks) => {
                writer.u8(CHECKS_FAILED);
                writer.count(checks.len());
                checks.iter().for_each(|&check| writer.count(check));
            }
            Answer::Refused(refused) => {
                writer.u8(REFUSED);
                refused.encode(&mut writer);
            }
        }
        writer.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("request outcome", bytes);
        reader.version(REMEMBERED_VERSION)?;
        let executed = HybridTime::from_bits(reader.fixed64()?);
        let fingerprint = reader.fixed64()?;
        let answer = match reader.u8()? {
            tag @ (WRITTEN | WRITTEN_NOTHING) => {
                let first = if tag == WRITTEN { Some(decode_dot(&mut reader)?) } else { None };
                let count = reader.count(14)?;
                let results = (0..count).map(|_| Written::decode(&mut reader));
                Answer::Written { first, results: results.collect::<Result<_, _>>()? }
            }
            CHECKS_FAILED => {
                let count = reader.count(1)?;
                let checks = (0..count).map(|_| reader.u32().map(|check| check as usize));
                Answer::ChecksFailed(checks.collect::<Result<_, _>>()?)
            }
            REFUSED => Answer::Refused(Refused::decode(&mut reader)?),
            tag => return Err(reader.invalid(u64::from(tag))),
        };
        reader.finish()?;
        Ok(Self { executed, fingerprint, answer })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        change::tests::{any_change, any_content},
        ledger::tests::any_entry,
        members::tests::any_members,
        repair::tests::any_offer,
        typed::tests::{any_mutation, any_refusal},
        vector::tests::{any_actor, any_vector},
    };

    const SOURCE: Actor = Actor { region: RegionId(3), incarnation: 2 };

    fn any_bytes() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from)
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        prop::sample::select(Rule::ALL.to_vec())
    }

    fn any_request() -> impl Strategy<Value = RequestId> {
        (any::<u64>(), any::<u64>()).prop_map(|(client, number)| RequestId { client, number })
    }

    fn any_check() -> impl Strategy<Value = Check> {
        let condition = prop_oneof![
            Just(Condition::Absent),
            Just(Condition::Present),
            any_bytes().prop_map(Condition::DataEquals),
            any_vector().prop_map(Condition::ContextCurrent),
            (any_actor(), 1u64..9)
                .prop_map(|(actor, seq)| Condition::DotEquals(Dot { actor, seq })),
        ];
        (any_bytes(), condition).prop_map(|(key, condition)| Check { key, condition })
    }

    fn any_operation() -> impl Strategy<Value = Operation> {
        (any_bytes(), any_content(), prop::option::of(any_vector()))
            .prop_map(|(key, content, context)| Operation { key, content, context })
    }

    fn any_write() -> impl Strategy<Value = Write> {
        (
            any::<u32>().prop_map(NamespaceId),
            any_rule(),
            any_actor(),
            any::<u64>().prop_map(HybridTime::from_bits),
            prop::option::of(any_request()),
            prop::collection::vec(any_check(), 0..3),
            prop::collection::vec(any_operation(), 0..4),
            prop::collection::vec(any_mutation(), 0..3),
        )
            .prop_map(
                |(namespace, rule, actor, time, request, checks, operations, mutations)| Write {
                    namespace,
                    rule,
                    actor,
                    time,
                    request,
                    checks,
                    operations,
                    mutations,
                },
            )
    }

    fn any_merge() -> impl Strategy<Value = Merge> {
        (
            any_rule(),
            any_vector(),
            any_vector(),
            any::<bool>(),
            prop::collection::vec(any_offer(), 0..4),
            prop::collection::vec(any_entry(), 0..2),
        )
            .prop_map(|(rule, cut, ahead, damaged, offers, ledger)| {
                let trust = if damaged { Trust::Neither } else { Trust::Coverage };
                let (namespace, source) = (NamespaceId(9), SOURCE);
                let (local, time) = (source, HybridTime::from_bits(55));
                Merge { namespace, rule, local, source, time, cut, ahead, trust, offers, ledger }
            })
    }

    fn any_command() -> impl Strategy<Value = Command> {
        prop_oneof![
            any_write().prop_map(Command::Write),
            (any_rule(), any_actor(), prop::collection::vec(any_change(), 0..3)).prop_map(
                |(rule, local, changes)| Command::Ingest(Ingest {
                    namespace: NamespaceId(3),
                    rule,
                    local,
                    source: SOURCE,
                    time: HybridTime::from_bits(66),
                    changes
                })
            ),
            any_vector().prop_map(|upto| Command::Trim(Trim { namespace: NamespaceId(1), upto })),
            (any_vector(), any_members(), prop::collection::vec(any_bytes(), 0..5)).prop_map(
                |(stable, members, keys)| {
                    Command::Collect(Collect { namespace: NamespaceId(2), stable, members, keys })
                }
            ),
            prop::collection::vec(any_request(), 0..5).prop_map(Command::ForgetRequests),
            any_merge().prop_map(Command::Merge),
            (any_actor(), any_vector(), any_vector(), any_vector()).prop_map(
                |(local, since, cut, ahead)| {
                    let (namespace, source) = (NamespaceId(4), SOURCE);
                    Command::Advance(Advance { namespace, local, source, since, cut, ahead })
                }
            ),
            (any_rule(), any_actor(), prop::collection::vec((any_bytes(), 1u64..9), 0..3))
                .prop_map(|(rule, actor, values)| {
                    let value = |(key, seq)| (key, Dot { actor, seq });
                    let values = values.into_iter().map(value).collect();
                    let (namespace, time) = (NamespaceId(8), HybridTime::from_bits(77));
                    Command::Expire(Expire { namespace, rule, actor, time, values })
                }),
            (any::<u16>(), any::<bool>(), any::<u64>()).prop_map(
                |(peer, paused, bytes_per_second)| {
                    let setting = LinkSetting { paused, bytes_per_second };
                    Command::SetLink(RegionId(peer), setting)
                }
            ),
            any_members().prop_map(Command::Learn),
            (any_actor(), any_vector(), any_members()).prop_map(|(local, known, members)| {
                let known = [(NamespaceId(1), known.clone()), (NamespaceId(16), known)].into();
                Command::StartOver(StartOver { local, known, members })
            }),
            prop::collection::vec((any_bytes(), any_actor(), 1u64..9), 0..3).prop_map(|writes| {
                let write = |(key, actor, seq)| (key, Dot { actor, seq });
                let writes = writes.into_iter().map(write).collect();
                Command::ForgetReviewed(ForgetReviewed { namespace: NamespaceId(7), writes })
            }),
            prop::collection::vec(any_entry(), 0..3).prop_map(|entries| {
                let namespace = NamespaceId(7);
                let entries = entries.iter().map(|entry| entry.place(namespace)).collect();
                Command::ForgetConflicts(ForgetConflicts { namespace, entries })
            }),
            (any_rule(), any_actor(), prop::collection::vec((any_bytes(), any::<u64>()), 0..3))
                .prop_map(|(rule, actor, keys)| {
                    let key = |(key, since)| (key, HybridTime::from_bits(since));
                    let keys = keys.into_iter().map(key).collect();
                    let (namespace, time) = (NamespaceId(8), HybridTime::from_bits(78));
                    Command::Settle(Settle { namespace, rule, actor, time, keys })
                }),
        ]
    }

    proptest! {
        #[test]
        fn batch_reads_back(commands in prop::collection::vec(any_command(), 0..5)) {
            let encoded: Vec<Bytes> = commands.iter().map(Command::to_bytes).collect();
            prop_assert_eq!(decode_batch(encode_batch(&encoded)), Ok(commands));
        }

        #[test]
        fn a_cut_or_noisy_batch_is_an_error_and_never_a_panic(command in any_command(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let bytes = encode_batch(&[command.to_bytes()]);
            let at = at.index(bytes.len());
            prop_assert!(decode_batch(bytes.slice(..at)).is_err());
            let mut flipped = bytes.to_vec();
            flipped[at] ^= flip;
            let _ = decode_batch(flipped.into());
        }

        #[test]
        fn remembered_results_read_back(
            actor in any_actor(),
            seq in 1u64..9,
            context in any_vector(),
            conflict: bool,
            sum in any::<Option<i64>>(),
            checks in prop::collection::vec(0usize..128, 0..4),
            refusal in any_refusal(),
        ) {
            let time = HybridTime::from_bits(5);
            let dot = Dot { actor, seq };
            let results = vec![Written { dot, time, context, conflict, sum }];
            let refused = Refused { mutation: checks.len(), refusal };
            for answer in [
                Answer::Written { first: conflict.then_some(dot), results },
                Answer::ChecksFailed(checks),
                Answer::Refused(refused),
            ] {
                let remembered = Remembered { executed: time, fingerprint: seq, answer };
                prop_assert_eq!(Remembered::from_bytes(remembered.to_bytes()), Ok(remembered));
            }
        }
    }

    #[test]
    fn a_command_of_an_unknown_kind_is_refused_by_name() {
        let error = Command::from_bytes(Bytes::from_static(&[99])).unwrap_err();
        assert_eq!(error.to_string(), "command: unknown format version 99; upgrade this node");
    }
}
