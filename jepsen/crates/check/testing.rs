//! Histories of correct stores, for the tests of the checkers.
//!
//! A store is simulated: every operation has an instant in its interval at which it takes effect.
//! So the history is valid by construction, and what a test then changes makes it invalid for
//! certain.

use crate::wgl::split_mix;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use tombolo_jepsen_history::{Event, Facts, History, Kind, Process};

/// Breaks a history; none if it has nothing that could be broken so.
pub(crate) type Mutation = fn(&mut History) -> Option<()>;

/// Writes histories by hand.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) history: History,
}

impl Script {
    /// An event of a client.
    pub(crate) fn at(
        &mut self,
        time: u64,
        process: u64,
        kind: Kind,
        f: &str,
        value: Value,
    ) -> &mut Self {
        let index = self.history.events.len() as u64;
        let (process, x) = (Process::Client(process), Facts::default());
        let key = Some("k".to_owned());
        self.history.events.push(Event { index, time, process, kind, f: f.into(), key, value, x });
        self
    }
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        split_mix(&mut self.0) % bound
    }
}

/// Collects events in any order and sorts them.
#[derive(Default)]
struct Log(Vec<Event>);

impl Log {
    fn op(
        &mut self,
        process: u64,
        (f, key): (&str, &str),
        (call, ret): (u64, u64),
        kind: Kind,
        (input, output): (Value, Value),
        x: Facts,
    ) {
        let invoke = Facts { region: x.region.clone(), node: x.node.clone(), ..Facts::default() };
        let event = |time, kind, value, x| Event {
            index: 0,
            time,
            process: Process::Client(process),
            kind,
            f: f.into(),
            key: Some(key.into()),
            value,
            x,
        };
        self.0.push(event(call, Kind::Invoke, input, invoke));
        self.0.push(event(ret, kind, output, x));
    }

    fn finish(mut self) -> History {
        self.0.sort_by_key(|event| (event.time, event.kind == Kind::Invoke));
        for (event, index) in self.0.iter_mut().zip(0..) {
            event.index = index;
        }
        History { events: self.0 }
    }
}

fn place(node: &str) -> Facts {
    let region = node.split('-').next().map(str::to_owned);
    Facts { region, node: Some(node.into()), ..Facts::default() }
}

/// A history of one key in region `eu`, by `clients` clients; times are all different.
pub(crate) fn register_history(seed: u64, clients: u64, ops: u64, nodes: &[String]) -> History {
    struct Planned {
        process: u64,
        call: u64,
        point: u64,
        ret: u64,
        f: &'static str,
        value: u64,
        open: bool,
    }
    let mut dice = Dice(seed);
    let mut planned = Vec::new();
    let mut process = clients;
    for client in 0..clients {
        let mut now = client;
        let mut current = client;
        for number in 0..ops / clients {
            // Every time is a multiple of `clients` plus the client, so none comes twice.
            let mut later = |from: u64| from + clients * (1 + dice.below(9));
            let call = later(now);
            let point = later(call);
            let ret = later(point);
            let open = dice.below(25) == 0;
            let f = ["read", "read", "read", "write", "write", "cas", "cas", "delete"]
                [usize::try_from(dice.below(8)).unwrap()];
            let value = 1 + number * clients + client;
            planned.push(Planned { process: current, call, point, ret, f, value, open });
            now = ret;
            if open {
                current = process;
                process += 1;
            }
        }
    }
    planned.sort_by_key(|op| op.point);
    let mut state: Option<u64> = None;
    let mut log = Log::default();
    let mut end = 0;
    for op in planned {
        end = end.max(op.ret);
        let mut x = place("eu-1");
        let mut kind = if op.open { Kind::Info } else { Kind::Ok };
        // An open operation takes effect half of the times.
        let acts = !op.open || dice.below(2) == 0;
        let (input, output) = match op.f {
            "read" => (Value::Null, if op.open { Value::Null } else { json!(state) }),
            "cas" => {
                // Wants what is there, or what never was.
                let expected = if dice.below(3) > 0 { state } else { Some(500_000 + op.value) };
                let value = json!([expected, op.value]);
                if expected == state {
                    state = if acts { Some(op.value) } else { state };
                } else if !op.open {
                    kind = Kind::Fail;
                    x.actual = Some(json!(state));
                }
                (value.clone(), value)
            }
            "delete" => {
                state = if acts { None } else { state };
                (Value::Null, Value::Null)
            }
            _ => {
                state = if acts { Some(op.value) } else { state };
                (json!(op.value), json!(op.value))
            }
        };
        log.op(op.process, (op.f, "k"), (op.call, op.ret), kind, (input, output), x);
    }
    for (node, number) in nodes.iter().zip(1..) {
        let times = (end + 10 * number, end + 10 * number + 5);
        let told = (Value::Null, json!(state));
        log.op(1_000_000 + number, ("final", "k"), times, Kind::Ok, told, place(node));
    }
    log.finish()
}

/// A history of one set that all regions of `nodes` add to, remove from and read.
///
/// Changes reach other regions after a while, in any order; a region's own reads show them at once.
pub(crate) fn set_history(seed: u64, adds: u64, removes: bool, nodes: &[String]) -> History {
    let mut dice = Dice(seed);
    let regions: Vec<String> = nodes
        .iter()
        .filter_map(|node| place(node).region)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let node_of = |region: &str| nodes.iter().find(|node| node.starts_with(region)).unwrap();
    let mut log = Log::default();
    // By region: when each element arrives there and when its removal does.
    let mut arrives: BTreeMap<(&str, u64), u64> = BTreeMap::new();
    let mut leaves: BTreeMap<(&str, u64), u64> = BTreeMap::new();
    let mut now = 0;
    let mut process = 0;
    for element in 0..adds {
        now += 10;
        process += 1;
        let home = &regions[usize::try_from(dice.below(regions.len() as u64)).unwrap()];
        // Sometimes nobody knows, and sometimes it certainly failed.
        let (kind, acts) = match dice.below(12) {
            0 => (Kind::Info, dice.below(2) == 0),
            1 => (Kind::Fail, false),
            _ => (Kind::Ok, true),
        };
        let value = (json!(element), json!(element));
        log.op(process, ("add", "s"), (now + 1, now + 5), kind, value, place(node_of(home)));
        for region in regions.iter().filter(|_| acts) {
            let lag = if region == home { 2 } else { 5 + dice.below(100) };
            arrives.insert((region, element), now + 1 + lag);
        }
        // By somebody who has seen it, in a region that has it.
        let at = &regions[usize::try_from(dice.below(regions.len() as u64)).unwrap()];
        if removes && acts && dice.below(3) == 0 {
            process += 1;
            let seen = arrives[&(at.as_str(), element)];
            let (call, point, ret) = (seen + 400, seen + 401, seen + 403);
            let kind = if dice.below(6) == 0 { Kind::Info } else { Kind::Ok };
            let acts = kind == Kind::Ok || dice.below(2) == 0;
            let value = (json!(element), json!(element));
            log.op(process, ("remove", "s"), (call, ret), kind, value, place(node_of(at)));
            for region in regions.iter().filter(|_| acts) {
                let lag = if region == at { 0 } else { dice.below(100) };
                let arrival = arrives[&(region.as_str(), element)];
                leaves.insert((region, element), (point + lag).max(arrival + 1));
            }
        }
    }
    let shown = |region: &str, time: u64| -> Value {
        let here = arrives.iter().filter(|((at, element), arrival)| {
            *at == region
                && **arrival <= time
                && leaves.get(&(region, *element)).is_none_or(|gone| *gone > time)
        });
        json!(here.map(|((_, element), _)| *element).collect::<Vec<_>>())
    };
    let end = now + 1000;
    for time in (0..end).step_by(25) {
        for region in &regions {
            process += 1;
            let told = (Value::Null, shown(region, time + 1));
            let facts = place(node_of(region));
            log.op(process, ("read", "s"), (time, time + 2), Kind::Ok, told, facts);
        }
    }
    for node in nodes {
        process += 1;
        let facts = place(node);
        let told = (Value::Null, shown(facts.region.as_deref().unwrap(), end + 5));
        log.op(process, ("final", "s"), (end + 4, end + 6), Kind::Ok, told, facts);
    }
    log.finish()
}
