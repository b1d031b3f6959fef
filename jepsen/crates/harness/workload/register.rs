//! Registers: every key belongs to one region, whose clients read, write, compare and delete it.
//!
//! A key is left after some hundred operations, because the effort of checking one grows faster
//! than its history; a few are in use at a time, so that many operations meet.

use super::{NAMESPACE, Pace, Role, Session, decode, encode};
use crate::client::{Compared, Failure, Freshness};
use crate::plan::{Plan, Sabotage};
use crate::recorder::What;
use rand::Rng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tombolo_proto::v1;

/// Operations on a key before another takes its place.
const OPS: u32 = 150;
/// Keys of a region in use at a time.
const KEYS: usize = 2;
const VALUE_BYTES: usize = 1;

/// A key in use.
#[derive(Clone, Debug)]
struct Slot {
    key: String,
    left: u32,
    /// What was seen there last, to be expected by a compare-and-set.
    last: Option<u64>,
}

/// What all clients share.
#[derive(Debug)]
pub(crate) struct Shared {
    freshness: Freshness,
    slots: BTreeMap<String, Mutex<Vec<Slot>>>,
    next_key: AtomicU64,
    next_value: AtomicU64,
}

impl Shared {
    pub(crate) fn new(regions: &[String], plan: &Plan) -> Arc<Self> {
        let next_key = AtomicU64::new(0);
        let slots = regions.iter().map(|region| {
            (region.clone(), Mutex::new((0..KEYS).map(|_| fresh(&next_key)).collect()))
        });
        let slots = slots.collect();
        let freshness = match plan.sabotage {
            Some(Sabotage::LocalReads) => Freshness::Local,
            None | Some(Sabotage::LostAdd | Sabotage::Resurrection) => Freshness::Linearizable,
        };
        Arc::new(Self { freshness, slots, next_key, next_value: AtomicU64::new(1) })
    }

    /// A key of the region to act on, with what was seen there last.
    fn take(&self, region: &str, at: usize) -> Option<(String, Option<u64>)> {
        let mut slots = self.slots.get(region)?.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.get_mut(at)?;
        if slot.left == 0 {
            *slot = fresh(&self.next_key);
        }
        slot.left -= 1;
        Some((slot.key.clone(), slot.last))
    }

    fn saw(&self, region: &str, key: &str, value: Option<u64>) {
        let Some(slots) = self.slots.get(region) else { return };
        let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in slots.iter_mut().filter(|slot| slot.key == key) {
            slot.last = value;
        }
    }
}

fn fresh(next: &AtomicU64) -> Slot {
    let key = format!("k{:04}", next.fetch_add(1, Ordering::Relaxed));
    Slot { key, left: OPS, last: None }
}

/// Acts until it is stopped.
pub(crate) async fn act(mut session: Session, role: Role, pace: Pace, shared: Arc<Shared>) {
    let region = session.client.region.clone();
    while pace.next(&mut session.dice).await {
        let Some((key, last)) = shared.take(&region, session.dice.random_range(0..KEYS)) else {
            return;
        };
        let fresh = shared.next_value.fetch_add(1, Ordering::Relaxed);
        let saw = match session.dice.random_range(0..100) {
            _ if role == Role::Reads => read(&mut session, &key, shared.freshness).await,
            0..20 => read(&mut session, &key, shared.freshness).await,
            20..55 => write(&mut session, &key, fresh).await,
            55..88 => {
                // Now and then something that nobody wrote.
                let expected = if session.dice.random_ratio(1, 8) { Some(u64::MAX) } else { last };
                compare_and_set(&mut session, &key, expected, fresh).await
            }
            _ => delete(&mut session, &key).await,
        };
        if let Some(value) = saw {
            shared.saw(&region, &key, value);
        }
    }
}

/// What a call showed; none if it showed nothing.
type Saw = Option<Option<u64>>;

/// Reads a key and records it.
pub(crate) async fn read(session: &mut Session, key: &str, freshness: Freshness) -> Saw {
    let what = What { f: "read", key: key.into(), value: Value::Null };
    session.begin(&what);
    let reply = session.client.get(NAMESPACE, key, freshness).await;
    match reply.and_then(|reply| Ok((only(&reply.versions)?, reply))) {
        Ok((value, reply)) => {
            session.shown(&what, json!(value), reply.revision);
            Some(value)
        }
        Err(failure) => {
            session.missed(&what, &failure);
            None
        }
    }
}

async fn write(session: &mut Session, key: &str, value: u64) -> Saw {
    let what = What { f: "write", key: key.into(), value: json!(value) };
    session.begin(&what);
    let id = session.next_id();
    let outcome = session.client.put(NAMESPACE, key, encode(value, VALUE_BYTES), id).await;
    let saw = outcome.is_ok().then_some(Some(value));
    session.written(&what, outcome);
    saw
}

async fn delete(session: &mut Session, key: &str) -> Saw {
    let what = What { f: "delete", key: key.into(), value: Value::Null };
    session.begin(&what);
    let id = session.next_id();
    let outcome = session.client.delete(NAMESPACE, key, bytes::Bytes::new(), id).await;
    let saw = outcome.is_ok().then_some(None);
    session.written(&what, outcome);
    saw
}

async fn compare_and_set(
    session: &mut Session,
    key: &str,
    expected: Option<u64>,
    value: u64,
) -> Saw {
    let what = What { f: "cas", key: key.into(), value: json!([expected, value]) };
    session.begin(&what);
    let id = session.next_id();
    let wanted = expected.map(|expected| encode(expected, VALUE_BYTES));
    let stored = encode(value, VALUE_BYTES);
    match session.client.compare_and_set(NAMESPACE, key, wanted, stored, id).await {
        Ok(Compared::Set(made)) => {
            session.written(&what, Ok(made));
            Some(Some(value))
        }
        Ok(Compared::Refused(versions)) => match only(&versions) {
            Ok(actual) => {
                session.refused(&what, json!(actual));
                Some(actual)
            }
            Err(failure) => {
                session.written(&what, Err(failure));
                None
            }
        },
        Err(failure) => {
            session.written(&what, Err(failure));
            None
        }
    }
}

/// The one value of a key that only one region writes.
pub(crate) fn only(versions: &[v1::Version]) -> Result<Option<u64>, Failure> {
    match versions {
        [] => Ok(None),
        [version] => match decode(version.value.as_ref()) {
            Some(value) => Ok(Some(value)),
            None => Err(Failure::Unknown("a value that nobody wrote".into())),
        },
        _ => Err(Failure::Unknown("several versions of a key that one region has".into())),
    }
}
