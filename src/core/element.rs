//! The parts of a typed value, one record each.
//!
//! A counter, set, map, flag, maximum or minimum is not one record but many *elements*: an entry of a
//! set, what one region has added to a counter, a field of a map. Each lies under a key of its own, so
//! that a write touches what it changes and nothing else, and streams, repair, Merkle trees and
//! collection treat it like any other record. This module is the encoding of those keys.
//!
//! Invariants:
//! * Elements of a key are neighbours, in the order of their keys; elements of two keys lie in the order
//!   of the keys. So a range of keys is a range of elements.
//! * Decoding answers exactly what was encoded, and nothing else decodes.
//!
//! An element is placed by its *user's* key: all of a key lies in one shard.
//!
//! Not here: what operations do to elements ([`crate::typed`]).

use bytes::Bytes;

use crate::{
    id::{Actor, RegionId},
    key::KEY_BYTES_MAX,
    record::Rule,
};

/// Deepest nesting of fields.
pub const PATH_DEPTH_MAX: usize = 16;
/// Longest path, over all of its names, in bytes.
pub const PATH_BYTES_MAX: usize = 4 << 10;
/// Longest element of a set, in bytes.
pub const MEMBER_BYTES_MAX: usize = 4 << 10;

/// Ends a part, after it; a zero byte inside one is followed by [`ESCAPED`].
const END: u8 = 1;
const ESCAPED: u8 = 0xff;
/// A field follows. Sorts before all kinds.
const FIELD: u8 = 1;
/// No tag of a kind is smaller.
pub(crate) const FIRST_KIND: u8 = FIELD + 1;

/// What a value, or a field of a map, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Bytes that are assigned; the last assignment wins.
    Register,
    /// A sum.
    Counter,
    /// A set of byte strings.
    Set,
    /// On or off.
    Flag,
    /// The largest of all byte strings.
    Max,
    /// The smallest of all byte strings.
    Min,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::Register, Self::Counter, Self::Set, Self::Flag, Self::Max, Self::Min];

    /// The name in errors and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Counter => "counter",
            Self::Set => "set",
            Self::Flag => "flag",
            Self::Max => "max",
            Self::Min => "min",
        }
    }

    /// What all values of a namespace are; `None` if that is for the namespace's writers to say.
    pub const fn of_rule(rule: Rule) -> Option<Self> {
        match rule {
            Rule::Counter => Some(Self::Counter),
            Rule::Set => Some(Self::Set),
            Rule::Flag => Some(Self::Flag),
            Rule::Max => Some(Self::Max),
            Rule::Min => Some(Self::Min),
            Rule::Lww | Rule::Siblings | Rule::Map => None,
        }
    }

    /// As encoded: two of them leave room for parts that a kind may get.
    pub(crate) const fn tag(self) -> u8 {
        match self {
            Self::Register => 0x10,
            Self::Counter => 0x20,
            Self::Set => 0x30,
            Self::Flag => 0x40,
            Self::Max => 0x50,
            Self::Min => 0x60,
        }
    }

    pub(crate) fn from_tag(tag: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.tag() == tag)
    }
}

/// One part of a typed value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// The user's key.
    pub key: Bytes,
    /// Where in a map; empty outside of maps.
    pub path: Vec<Bytes>,
    /// Which part.
    pub part: Part,
}

/// Which part of a value an element is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The whole: of a register, flag, maximum or minimum.
    Whole(Kind),
    /// What an actor has added to a counter.
    Share(Actor),
    /// An entry of a set.
    Member(Bytes),
}

impl Part {
    /// What the value is that this is a part of.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Whole(kind) => *kind,
            Self::Share(_) => Kind::Counter,
            Self::Member(_) => Kind::Set,
        }
    }
}

impl Element {
    /// The record's key.
    pub fn to_key(&self) -> Bytes {
        let mut key = prefix(&self.key, &self.path);
        key.push(self.part.kind().tag());
        match &self.part {
            Part::Whole(_) => {}
            Part::Share(actor) => {
                key.extend_from_slice(&actor.region.0.to_be_bytes());
                key.extend_from_slice(&actor.incarnation.to_be_bytes());
            }
            Part::Member(member) => key.extend_from_slice(member),
        }
        key.into()
    }

    /// Reads a record's key; `None` if it is no element's.
    pub fn from_key(key: &[u8]) -> Option<Self> {
        let (user_key, mut rest) = take_part(key)?;
        let mut path = Vec::new();
        while let [FIELD, after @ ..] = rest {
            let (name, after) = take_part(after)?;
            path.push(name);
            rest = after;
        }
        let (&tag, rest) = rest.split_first()?;
        let part = match (Kind::from_tag(tag)?, rest) {
            (Kind::Set, member) => Part::Member(Bytes::copy_from_slice(member)),
            (Kind::Counter, share) => {
                let (region, incarnation) = share.split_first_chunk::<2>()?;
                let region = RegionId(u16::from_be_bytes(*region));
                let incarnation = u32::from_be_bytes(incarnation.try_into().ok()?);
                Part::Share(Actor { region, incarnation })
            }
            (kind, []) => Part::Whole(kind),
            (_, _) => return None,
        };
        Some(Self { key: user_key, path, part })
    }
}

/// What the keys of all elements of a key, or of a field in it, begin with.
pub fn prefix(key: &[u8], path: &[Bytes]) -> Vec<u8> {
    let bytes = key.len() + path.iter().map(|name| name.len() + 3).sum::<usize>();
    let mut encoded = Vec::with_capacity(bytes + 16);
    put_part(key, &mut encoded);
    for name in path {
        encoded.push(FIELD);
        put_part(name, &mut encoded);
    }
    encoded
}

/// What the keys of all elements of one kind there begin with.
pub fn prefix_of(key: &[u8], path: &[Bytes], kind: Kind) -> Vec<u8> {
    let mut encoded = prefix(key, path);
    encoded.push(kind.tag());
    encoded
}

/// Where the elements of keys begin that are `key` or come after it; also where those end that come
/// before it.
pub fn bound(key: &[u8]) -> Vec<u8> {
    let mut encoded = Vec::with_capacity(key.len() + 2);
    escape(key, &mut encoded);
    encoded
}

/// The first key after all keys that begin with `prefix`; `None` if there is none.
pub fn end_of(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|&byte| byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// The user's key in a record's key of a namespace: of a typed one, the key that the element is of.
pub fn user_key(rule: Rule, key: &Bytes) -> Bytes {
    if !rule.is_typed() {
        return key.clone();
    }
    take_part(key).map_or_else(|| key.clone(), |(user_key, _)| user_key)
}

fn escape(part: &[u8], encoded: &mut Vec<u8>) {
    for &byte in part {
        encoded.push(byte);
        if byte == 0 {
            encoded.push(ESCAPED);
        }
    }
}

fn put_part(part: &[u8], encoded: &mut Vec<u8>) {
    escape(part, encoded);
    encoded.extend_from_slice(&[0, END]);
}

/// Reads a part; answers it and what follows it.
fn take_part(encoded: &[u8]) -> Option<(Bytes, &[u8])> {
    let mut part = Vec::new();
    let mut rest = encoded;
    loop {
        let (&byte, after) = rest.split_first()?;
        rest = after;
        if byte != 0 {
            part.push(byte);
            continue;
        }
        let (&mark, after) = rest.split_first()?;
        rest = after;
        match mark {
            ESCAPED => part.push(0),
            END => return Some((part.into(), rest)),
            _ => return None,
        }
    }
}

/// Why an element cannot be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElementError {
    /// Too many names.
    #[error("the path has {names} names; at most {PATH_DEPTH_MAX} are allowed")]
    TooDeep {
        /// So many.
        names: usize,
    },
    /// Too long in all.
    #[error("the path's names have {bytes} bytes; at most {PATH_BYTES_MAX} are allowed")]
    PathTooLong {
        /// So many.
        bytes: usize,
    },
    /// A name without a byte.
    #[error("a name in the path is empty")]
    EmptyName,
    /// Too long.
    #[error("an element has {bytes} bytes; at most {MEMBER_BYTES_MAX} are allowed")]
    MemberTooLong {
        /// So many.
        bytes: usize,
    },
}

/// Checks a path.
///
/// # Errors
/// If it is too deep or too long, or a name is empty.
pub fn check_path(path: &[Bytes]) -> Result<(), ElementError> {
    if path.len() > PATH_DEPTH_MAX {
        return Err(ElementError::TooDeep { names: path.len() });
    }
    let bytes = path.iter().map(Bytes::len).sum();
    if bytes > PATH_BYTES_MAX {
        return Err(ElementError::PathTooLong { bytes });
    }
    if path.iter().any(Bytes::is_empty) {
        return Err(ElementError::EmptyName);
    }
    Ok(())
}

/// Checks an entry of a set; it may be empty.
///
/// # Errors
/// If it is too long.
pub fn check_member(member: &[u8]) -> Result<(), ElementError> {
    if member.len() > MEMBER_BYTES_MAX {
        return Err(ElementError::MemberTooLong { bytes: member.len() });
    }
    Ok(())
}

/// No record's key is longer than this: every byte of a key and path may need an escape.
pub const RECORD_KEY_BYTES_MAX: usize =
    2 * (KEY_BYTES_MAX + PATH_BYTES_MAX) + 3 * (PATH_DEPTH_MAX + 1) + 1 + MEMBER_BYTES_MAX;

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vector::tests::any_actor;

    /// Bytes that make trouble: zeros, the marks, the ends of the range.
    pub(crate) fn any_part() -> impl Strategy<Value = Bytes> {
        let byte = prop_oneof![Just(0), Just(1), Just(0xff), any::<u8>()];
        prop::collection::vec(byte, 1..6).prop_map(Bytes::from)
    }

    pub(crate) fn any_element() -> impl Strategy<Value = Element> {
        let whole = prop::sample::select(vec![Kind::Register, Kind::Flag, Kind::Max, Kind::Min]);
        let part = prop_oneof![
            whole.prop_map(Part::Whole),
            any_actor().prop_map(Part::Share),
            any_part().prop_map(Part::Member),
            Just(Part::Member(Bytes::new())),
        ];
        (any_part(), prop::collection::vec(any_part(), 0..3), part)
            .prop_map(|(key, path, part)| Element { key, path, part })
    }

    proptest! {
        #[test]
        fn an_element_reads_back_from_its_key(element in any_element()) {
            let key = element.to_key();
            prop_assert!(key.len() <= RECORD_KEY_BYTES_MAX);
            prop_assert_eq!(user_key(Rule::Map, &key), element.key.clone());
            prop_assert_eq!(Element::from_key(&key), Some(element));
        }

        #[test]
        fn elements_lie_in_the_order_of_their_keys(left in any_element(), right in any_element()) {
            if left.key != right.key {
                prop_assert_eq!(left.key.cmp(&right.key), left.to_key().cmp(&right.to_key()));
            }
        }

        #[test]
        fn a_prefix_holds_exactly_what_is_under_it(element in any_element(), other in any_element()) {
            let under = prefix(&element.key, &element.path);
            let belongs = other.key == element.key && other.path.starts_with(&element.path);
            prop_assert_eq!(other.to_key().starts_with(&under), belongs);
            prop_assert!(element.to_key().starts_with(&prefix_of(&element.key, &element.path, element.part.kind())));
        }

        #[test]
        fn a_bound_parts_the_keys_before_from_those_at_and_after(element in any_element(), at in any_part()) {
            prop_assert_eq!(element.key < at, element.to_key()[..] < bound(&at)[..]);
        }

        #[test]
        fn reading_noise_never_panics_and_answers_only_what_would_be_written(noise in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(element) = Element::from_key(&noise) {
                prop_assert_eq!(&element.to_key()[..], &noise[..]);
            }
        }
    }

    #[test]
    fn paths_and_members_have_bounds() {
        let name = Bytes::from_static(b"n");
        assert_eq!(check_path(&vec![name.clone(); 16]), Ok(()));
        assert_eq!(check_path(&vec![name; 17]), Err(ElementError::TooDeep { names: 17 }));
        assert_eq!(check_path(&[Bytes::new()]), Err(ElementError::EmptyName));
        let long = Bytes::from(vec![7; 4097]);
        assert_eq!(
            check_path(std::slice::from_ref(&long)),
            Err(ElementError::PathTooLong { bytes: 4097 })
        );
        assert_eq!(check_member(&long), Err(ElementError::MemberTooLong { bytes: 4097 }));
        assert_eq!(check_member(b""), Ok(()));
    }
}
