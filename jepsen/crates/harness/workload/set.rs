//! Sets: a set is a prefix, an element a key under it. All regions add to the present set, read
//! some late one, and, in the workload `delete`, remove what they have seen.
//!
//! An element is added once, by one attempt, and removed at most once: whatever appears twice,
//! vanishes or comes back is the store's doing.

use super::{NAMESPACE, Pace, Role, Session, encode};
use crate::client::Freshness;
use crate::plan::{Plan, Workload};
use crate::recorder::What;
use bytes::Bytes;
use rand::Rng;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Elements of a set before the next one begins.
const ELEMENTS: u64 = 150;
/// Most reads are of the present set or one of this many before it, the others of any set: what
/// comes late, or back, comes to old ones.
const RECENT_SETS: u64 = 3;
/// How long a scan may take.
const SCAN_PATIENCE: Duration = Duration::from_millis(2250);

/// Something that a region has seen.
#[derive(Clone, Debug)]
struct Seen {
    set: u64,
    element: u64,
    context: Bytes,
}

/// What all clients share.
#[derive(Debug)]
pub(crate) struct Shared {
    removes: bool,
    value_bytes: usize,
    next_element: AtomicU64,
    /// By region, what could be removed there.
    seen: BTreeMap<String, Mutex<Vec<Seen>>>,
    /// What somebody has tried to remove.
    taken: Mutex<BTreeSet<u64>>,
}

impl Shared {
    pub(crate) fn new(regions: &[String], plan: &Plan) -> Arc<Self> {
        Arc::new(Self {
            removes: plan.workload == Workload::Delete,
            value_bytes: plan.value_bytes(),
            next_element: AtomicU64::new(0),
            seen: regions.iter().map(|region| (region.clone(), Mutex::default())).collect(),
            taken: Mutex::default(),
        })
    }

    /// Something that this region has seen and nobody has tried to remove.
    fn take_seen(&self, region: &str, at: f64) -> Option<Seen> {
        let mut seen = self.seen.get(region)?.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|seen| !taken.contains(&seen.element));
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a place in a short list"
        )]
        let position = (seen.len() as f64 * at) as usize;
        let found = seen.get(position)?.clone();
        taken.insert(found.element);
        Some(found)
    }

    fn keep_seen(&self, region: &str, found: Vec<Seen>) {
        let Some(seen) = self.seen.get(region) else { return };
        *seen.lock().unwrap_or_else(PoisonError::into_inner) = found;
    }
}

fn name(set: u64) -> String {
    format!("s{set:04}")
}

pub(crate) fn key_in(set: &str, element: u64) -> String {
    format!("{set}/{element:08}")
}

fn key(set: u64, element: u64) -> String {
    key_in(&name(set), element)
}

/// The set and the element of a key; what is not such a key is an element that nobody added.
pub(crate) fn parse(key: &[u8]) -> (String, u64) {
    let text = String::from_utf8_lossy(key);
    match text.split_once('/').and_then(|(set, element)| Some((set, element.parse().ok()?))) {
        Some((set, element)) => (set.to_owned(), element),
        None => (text.into_owned(), u64::MAX),
    }
}

/// Acts until it is stopped.
pub(crate) async fn act(mut session: Session, role: Role, pace: Pace, shared: Arc<Shared>) {
    while pace.next(&mut session.dice).await {
        match session.dice.random_range(0..100) {
            _ if role == Role::Reads => read(&mut session, &shared).await,
            0..40 if shared.removes => remove(&mut session, &shared).await,
            _ => add(&mut session, &shared).await,
        }
    }
}

async fn add(session: &mut Session, shared: &Shared) {
    let element = shared.next_element.fetch_add(1, Ordering::Relaxed);
    let set = element / ELEMENTS;
    let what = What { f: "add", key: name(set), value: json!(element) };
    session.begin(&what);
    let id = session.next_id();
    let value = encode(element, shared.value_bytes);
    let outcome = session.client.put(NAMESPACE, &key(set, element), value, id).await;
    session.written(&what, outcome);
}

async fn remove(session: &mut Session, shared: &Shared) {
    let at = session.dice.random_range(0.0..1.0);
    let Some(seen) = shared.take_seen(&session.client.region, at) else { return };
    let what = What { f: "remove", key: name(seen.set), value: json!(seen.element) };
    session.begin(&what);
    let id = session.next_id();
    // Either exactly what was seen, or whatever the region has.
    let context = if session.dice.random() { seen.context } else { Bytes::new() };
    let key = key(seen.set, seen.element);
    let outcome = session.client.delete(NAMESPACE, &key, context, id).await;
    session.written(&what, outcome);
}

async fn read(session: &mut Session, shared: &Shared) {
    let present = shared.next_element.load(Ordering::Relaxed) / ELEMENTS;
    let dice = &mut session.dice;
    let set = if dice.random_ratio(1, 3) {
        dice.random_range(0..=present)
    } else {
        present.saturating_sub(dice.random_range(0..RECENT_SETS))
    };
    let what = What { f: "read", key: name(set), value: Value::Null };
    session.begin(&what);
    let prefix = format!("{}/", name(set));
    match session
        .client
        .scan(NAMESPACE, &prefix, Freshness::Linearizable, true, SCAN_PATIENCE)
        .await
    {
        Ok(results) => {
            let seen: Vec<Seen> = results
                .into_iter()
                .map(|result| {
                    let (_, element) = parse(&result.key);
                    Seen { set, element, context: result.context }
                })
                .collect();
            let elements: Vec<u64> = seen.iter().map(|seen| seen.element).collect();
            session.shown(&what, json!(elements), None);
            shared.keep_seen(&session.client.region, seen);
        }
        Err(failure) => session.missed(&what, &failure),
    }
}
