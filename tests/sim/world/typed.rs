//! Typed values: what the writes of a history are where values are maps.

use bytes::Bytes;
use tombolo_core::typed::{Action, Mutation};

use super::key_of;

/// A write of one of the keys, or a deletion of it: each stands for a field of another kind, of one of two
/// maps. The deletion of a flag is one of the whole map.
pub(super) fn mutation(key: u8, delete: bool, value: u64) -> Mutation {
    let text = |value: u64| Bytes::from(value.to_string());
    let (field, write, deletion) = match key % 5 {
        0 => ("counter", Action::Add(value.cast_signed() % 7 - 2), Action::Clear),
        1 => ("set", Action::Insert(text(value % 3)), Action::Remove(text(value % 2))),
        2 => ("register", Action::Assign(text(value)), Action::Clear),
        3 => ("maximum", Action::Maximum(text(value % 10)), Action::Clear),
        _ => ("flag", Action::Enable, Action::Clear),
    };
    let is_whole = delete && key % 5 == 4;
    let path = if is_whole { Vec::new() } else { vec![Bytes::from_static(field.as_bytes())] };
    let action = if delete { deletion } else { write };
    Mutation { key: key_of(u8::from(value.is_multiple_of(3))), path, action, context: None }
}
