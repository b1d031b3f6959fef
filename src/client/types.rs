//! What calls give back, and how wire messages become it.
//!
//! Not here: the messages themselves (`tombolo-proto`, re-exported as [`crate::proto`]).

use crate::error::{Error, Result};
use bytes::Bytes;
use std::ops::{Bound, RangeBounds};
use std::time::{Duration, SystemTime};
use tombolo_proto::v1;

/// Bytes of a key or a value, taken from whatever the caller has.
pub trait IntoBytes {
    /// Moves where possible, copies what is only borrowed.
    fn into_bytes(self) -> Bytes;
}

macro_rules! into_bytes {
    ($($owned:ty),*; $($borrowed:ty),*) => {
        $(impl IntoBytes for $owned {
            fn into_bytes(self) -> Bytes {
                self.into()
            }
        })*
        $(impl IntoBytes for $borrowed {
            fn into_bytes(self) -> Bytes {
                Bytes::copy_from_slice(self.as_ref())
            }
        })*
    };
}
into_bytes!(Bytes, Vec<u8>, String; &str, &[u8], &Vec<u8>, &String);

impl IntoBytes for &Bytes {
    fn into_bytes(self) -> Bytes {
        self.clone()
    }
}

impl<const N: usize> IntoBytes for [u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(&self)
    }
}

impl<const N: usize> IntoBytes for &[u8; N] {
    fn into_bytes(self) -> Bytes {
        Bytes::copy_from_slice(self)
    }
}

/// A range of keys as it goes over the wire: start inclusive, end exclusive, empty for none.
pub(crate) fn key_bounds<K: IntoBytes + Clone>(range: impl RangeBounds<K>) -> (Bytes, Bytes) {
    // A key's successor is the key and a 0.
    let successor = |key: &K| {
        let mut key = key.clone().into_bytes().to_vec();
        key.push(0);
        Bytes::from(key)
    };
    let start = match range.start_bound() {
        Bound::Included(key) => key.clone().into_bytes(),
        Bound::Excluded(key) => successor(key),
        Bound::Unbounded => Bytes::new(),
    };
    let end = match range.end_bound() {
        Bound::Included(key) => successor(key),
        Bound::Excluded(key) => key.clone().into_bytes(),
        Bound::Unbounded => Bytes::new(),
    };
    (start, end)
}

/// The identity of one write, equal in every region. Written `region.incarnation:seq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dot {
    /// The region's number in the topology.
    pub region: u32,
    pub incarnation: u32,
    pub seq: u64,
}

impl std::fmt::Display for Dot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}:{}", self.region, self.incarnation, self.seq)
    }
}

/// The text is not three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a dot is written region.incarnation:seq")]
pub struct DotError;

impl std::str::FromStr for Dot {
    type Err = DotError;

    /// Accepts any one punctuation character between the numbers.
    fn from_str(text: &str) -> Result<Self, DotError> {
        let mut parts = text.split(|c: char| c.is_ascii_punctuation());
        let (Some(region), Some(incarnation), Some(seq), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(DotError);
        };
        Ok(Self {
            region: region.parse().map_err(|_| DotError)?,
            incarnation: incarnation.parse().map_err(|_| DotError)?,
            seq: seq.parse().map_err(|_| DotError)?,
        })
    }
}

impl From<v1::Dot> for Dot {
    fn from(dot: v1::Dot) -> Self {
        Self { region: dot.region, incarnation: dot.incarnation, seq: dot.seq }
    }
}

impl From<Dot> for v1::Dot {
    fn from(dot: Dot) -> Self {
        Self { region: dot.region, incarnation: dot.incarnation, seq: dot.seq }
    }
}

/// A hybrid time: milliseconds since the Unix epoch in the high 48 bits, a logical counter in the
/// low 16, so comparing two readings compares two integers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HybridTime(pub u64);

impl HybridTime {
    /// Milliseconds since the Unix epoch.
    pub const fn physical_ms(self) -> u64 {
        self.0 >> 16
    }

    /// Orders writes within one millisecond.
    pub const fn logical(self) -> u16 {
        (self.0 & 0xffff) as u16
    }
}

/// Where a reply stands in its shard's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision {
    pub shard: u32,
    pub term: u64,
    pub index: u64,
}

impl From<v1::Revision> for Revision {
    fn from(revision: v1::Revision) -> Self {
        Self { shard: revision.shard, term: revision.term, index: revision.index }
    }
}

/// What a put or a delete answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub dot: Dot,
    /// The causal context of the key after this write.
    pub context: Bytes,
    /// Covers this write and everything the request's session had seen.
    pub token: Bytes,
    /// Concurrent versions remain or were resolved by the namespace's rule.
    pub conflict: bool,
    pub time: HybridTime,
    pub revision: Option<Revision>,
}

impl TryFrom<v1::PutResponse> for Written {
    type Error = Error;

    fn try_from(reply: v1::PutResponse) -> Result<Self> {
        Ok(Self {
            dot: reply.dot.map(Dot::from).ok_or_else(|| Error::protocol("put without a dot"))?,
            context: reply.context,
            token: reply.session_token,
            conflict: reply.conflict,
            time: HybridTime(reply.hybrid_time),
            revision: reply.revision.map(Revision::from),
        })
    }
}

impl TryFrom<v1::DeleteResponse> for Written {
    type Error = Error;

    fn try_from(reply: v1::DeleteResponse) -> Result<Self> {
        Ok(Self {
            dot: reply.dot.map(Dot::from).ok_or_else(|| Error::protocol("delete without a dot"))?,
            context: reply.context,
            token: reply.session_token,
            conflict: reply.conflict,
            time: HybridTime(reply.hybrid_time),
            revision: reply.revision.map(Revision::from),
        })
    }
}

/// A value of a typed namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A counter's sum.
    Counter(i64),
    /// A counter whose sum has left the range of 64 bits, because regions added to it at the same time: the
    /// end of the range that it is beyond. Adding towards the range brings it back.
    Saturated(i64),
    /// A set's elements, in order.
    Set(Vec<Bytes>),
    /// Whether a flag is on.
    Flag(bool),
    /// The bytes of a register in a map.
    Data(Bytes),
    /// A map's fields, in order of their names. A name that regions made different things of at the same
    /// time is there once for each.
    Map(Vec<(String, Value)>),
}

impl Value {
    fn from_proto(value: v1::Value) -> Result<Self> {
        use v1::value::Kind;
        Ok(match value.kind {
            Some(Kind::Counter(end)) if value.saturated => Self::Saturated(end),
            Some(Kind::Counter(sum)) => Self::Counter(sum),
            Some(Kind::Set(set)) => Self::Set(set.elements),
            Some(Kind::Flag(on)) => Self::Flag(on),
            Some(Kind::Data(data)) => Self::Data(data),
            Some(Kind::Map(map)) => {
                let field = |field: v1::MapField| {
                    Ok((field.name, Self::from_proto(field.value.unwrap_or_default())?))
                };
                Self::Map(map.fields.into_iter().map(field).collect::<Result<_>>()?)
            }
            None => {
                return Err(Error::protocol("a value of a kind that this client does not know"));
            }
        })
    }

    /// What is at a path of a map.
    pub fn field(&self, path: &[&str]) -> Option<&Self> {
        let Some((name, rest)) = path.split_first() else { return Some(self) };
        let Self::Map(fields) = self else { return None };
        fields.iter().filter(|(held, _)| held == name).find_map(|(_, value)| value.field(rest))
    }

    /// The sum, if it is a counter, and the sum is in the range of 64 bits.
    pub fn as_counter(&self) -> Option<i64> {
        if let Self::Counter(sum) = self { Some(*sum) } else { None }
    }

    /// The elements, if it is a set.
    pub fn as_set(&self) -> Option<&[Bytes]> {
        if let Self::Set(elements) = self { Some(elements) } else { None }
    }

    /// The bytes, if it is a register, maximum or minimum.
    pub fn as_data(&self) -> Option<&Bytes> {
        if let Self::Data(data) = self { Some(data) } else { None }
    }
}

/// A live value of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The bytes; of a maximum, minimum or register too. Empty when only keys were asked for, and for
    /// other typed values.
    pub value: Bytes,
    /// What it is in a typed namespace, unless it is bytes.
    pub typed: Option<Value>,
    pub dot: Dot,
    pub origin_region: String,
    pub time: HybridTime,
    /// When the value expires; `None` if never.
    pub expire_time: Option<SystemTime>,
}

impl TryFrom<v1::Version> for Version {
    type Error = Error;

    fn try_from(version: v1::Version) -> Result<Self> {
        let (value, typed) = match version.value.map(Value::from_proto).transpose()? {
            Some(Value::Data(data)) => (data, None),
            None => (Bytes::new(), None),
            typed => (Bytes::new(), typed),
        };
        Ok(Self {
            value,
            typed,
            dot: version.dot.map(Dot::from).ok_or_else(|| Error::protocol("no dot"))?,
            origin_region: version.origin_region,
            time: HybridTime(version.hybrid_time),
            expire_time: version.expire_time.and_then(system_time),
        })
    }
}

pub(crate) fn versions(versions: Vec<v1::Version>) -> Result<Vec<Version>> {
    versions.into_iter().map(Version::try_from).collect()
}

pub(crate) fn system_time(time: prost_types::Timestamp) -> Option<SystemTime> {
    let seconds = u64::try_from(time.seconds).ok()?;
    let nanos = u32::try_from(time.nanos).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

pub(crate) fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

/// What a get answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    pub key: Bytes,
    /// Empty if the key is absent; more than one if concurrent writes wait for the caller.
    pub versions: Vec<Version>,
    /// Give it to a put or a delete to replace exactly what this shows.
    pub context: Bytes,
    /// Covers what this shows and everything the request's session had seen.
    pub token: Bytes,
    /// `None` in a batch.
    pub revision: Option<Revision>,
    /// The value has more elements than are shown. A get says where they go on, in `next_elements`; in a
    /// batch only this says so, and a get pages through them.
    pub partial: bool,
    /// Where a large set or map goes on: give it to [`crate::Get::elements_from`]. Empty if all of it is
    /// here, and in a batch.
    pub next_elements: Bytes,
    /// Set while several versions wait to be settled in a namespace with a hold: what is shown is
    /// provisional, and the first version is taken then.
    pub settle_time: Option<SystemTime>,
}

impl Got {
    /// A typed value, unless the key is absent or its value is bytes.
    pub fn typed(&self) -> Option<&Value> {
        self.versions.first().and_then(|version| version.typed.as_ref())
    }

    /// The sum of a counter; 0 if it is absent. Of one that has left the range of 64 bits, which only a batch
    /// shows, the end of the range.
    pub fn counter(&self) -> i64 {
        match self.typed() {
            Some(&Value::Counter(sum) | &Value::Saturated(sum)) => sum,
            _ => 0,
        }
    }

    /// The elements of a set; none if it is absent.
    pub fn elements(&self) -> &[Bytes] {
        self.typed().and_then(Value::as_set).unwrap_or_default()
    }

    /// The value, or the first of several concurrent ones; `None` if the key is absent.
    pub fn value(&self) -> Option<&Bytes> {
        self.versions.first().map(|version| &version.value)
    }

    /// Whether concurrent writes left more than one value.
    pub fn in_conflict(&self) -> bool {
        self.versions.len() > 1
    }
}

/// One key of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: Bytes,
    /// Never empty.
    pub versions: Vec<Version>,
    pub context: Bytes,
    /// The value has more elements than are shown: a get pages through them.
    pub partial: bool,
    /// As [`Got::settle_time`].
    pub settle_time: Option<SystemTime>,
}

impl Entry {
    /// The value, or the first of several concurrent ones.
    pub fn value(&self) -> Option<&Bytes> {
        self.versions.first().map(|version| &version.value)
    }
}

impl TryFrom<v1::KeyResult> for Entry {
    type Error = Error;

    fn try_from(result: v1::KeyResult) -> Result<Self> {
        Ok(Self {
            key: result.key,
            versions: versions(result.versions)?,
            context: result.context,
            partial: result.partial,
            settle_time: result.settle_time.and_then(system_time),
        })
    }
}

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// Sees every write acknowledged in this region before the read began.
    #[default]
    Linearizable,
    /// Sees at least everything that the session has seen, from any region.
    Causal,
    /// From any replica whose state is at most this old.
    MaxStaleness(Duration),
    /// Whatever the contacted replica has now.
    Local,
}

impl From<Consistency> for v1::ReadConsistency {
    fn from(consistency: Consistency) -> Self {
        use v1::read_consistency::Level;
        let level = match consistency {
            Consistency::Linearizable => Level::Linearizable(v1::Linearizable {}),
            Consistency::Causal => Level::Causal(v1::Causal {}),
            Consistency::MaxStaleness(age) => Level::MaxStaleness(proto_duration(age)),
            Consistency::Local => Level::Local(v1::Local {}),
        };
        Self { level: Some(level) }
    }
}
