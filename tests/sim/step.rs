//! Histories: what happens, in which order, with every choice made.
//!
//! A step that makes no sense where it comes (a delivery without a message) does nothing, so every
//! part of a history is a history.

use std::sync::OnceLock;

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tombolo_core::{Rule, merkle::leaf_of};

/// All that a history is, beside the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// How many regions there are at the start.
    pub regions: u16,
    /// The namespace's rule.
    pub rule: Rule,
    /// Most changes of a batch.
    pub batch: usize,
    /// Most records of a merge.
    pub page: usize,
    /// Whether streams rest during a repair, as in the server. Nothing may depend on it.
    pub gate: bool,
    /// What happens.
    pub steps: Vec<Step>,
}

/// Something that happens, a while after what came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The while.
    pub wait_ms: u32,
    /// What.
    pub event: Event,
}

/// A region by its place; there may be fewer.
pub type Place = u8;

/// What happens. A stream is named by the region that pulls, then the one that it pulls from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A client writes: the first key, the second with it if `pair`, a deletion where told.
    Write { at: Place, keys: (u8, u8), pair: bool, delete: (bool, bool), expires: bool },
    /// A client writes with the context that it read in another region.
    WriteSeen { at: Place, key: u8, delete: bool, read_at: Place },
    /// A client repeats a request, so many writes back, perhaps in another region.
    Repeat { at: Place, back: u8 },
    /// The region's Raft log commits so many proposals.
    Commit { at: Place, count: u8 },
    /// A region opens its stream from another.
    Open { puller: Place, source: Place },
    /// Requests of a stream arrive.
    Requests { puller: Place, source: Place, count: u8 },
    /// Replies of a stream arrive.
    Replies { puller: Place, source: Place, count: u8 },
    /// The source sends batches.
    Send { puller: Place, source: Place, count: u8 },
    /// The source tells its frontier.
    Tell { puller: Place, source: Place },
    /// The puller proposes what has arrived.
    Apply { puller: Place, source: Place },
    /// A stream does its work: all of the above for one stream, and what it proposes is committed.
    Flow { puller: Place, source: Place },
    /// The puller does what is due: acknowledges, follows relays, begins repairs.
    Tick { at: Place },
    /// An operator asks for a repair, or a comparison is due.
    Ask { puller: Place, source: Place, compare: bool },
    /// Messages of the region's repair arrive, this way and that.
    RepairMessages { at: Place, requests: u8, replies: u8 },
    /// The region's repair does its work, for so many rounds of messages.
    Repair { at: Place, rounds: u8 },
    /// A message of a stream comes a second time, after all that is under way.
    Duplicate { puller: Place, source: Place, reply: bool },
    /// What an earlier stream still had under way to the source arrives.
    Late { puller: Place, source: Place },
    /// A stream breaks and loses what is under way.
    Break { puller: Place, source: Place },
    /// The connection of the region's repair breaks.
    BreakRepair { at: Place },
    /// Nothing passes from one region to another any more.
    Cut { from: Place, to: Place },
    /// It passes again.
    Mend { from: Place, to: Place },
    /// A region loses its leader; so many proposals were committed before.
    Crash { at: Place, commit: u8 },
    /// A region's wall clock jumps to so far from true time.
    Clock { at: Place, offset_ms: i32 },
    /// The change log exceeds its budget: so many changes of each actor are kept.
    Trim { at: Place, keep: u8 },
    /// The change log is trimmed at what every region has.
    TrimStable { at: Place },
    /// Tombstones that are stable are proposed to go.
    Collect { at: Place },
    /// Expired values of the region's own are proposed to go.
    Expire { at: Place },
    /// A copy of the region's data is made.
    Backup { at: Place },
    /// The region loses its data and gets the last copy.
    Restore { at: Place },
    /// A region joins, or one that was fenced comes back.
    Join { at: Place },
    /// A region is left behind by the others.
    Fence { at: Place },
    /// A region hears of what an operator decided; of the next, unless some are skipped.
    Hear { at: Place, skip: u8 },
}

/// The keys of all histories. The last two lie in one leaf of the tree.
pub fn keys() -> &'static [Bytes] {
    static KEYS: OnceLock<Vec<Bytes>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let mut keys: Vec<Bytes> = ["a", "b", "c", "d"].map(Bytes::from).to_vec();
        let leaf = leaf_of(&keys[3]);
        let mut others = (0u32..).map(|number| Bytes::from(number.to_string()));
        keys.extend(others.find(|key| leaf_of(key) == leaf));
        keys
    })
}

const HOURS_8_MS: i32 = 8 * 3_600_000;

impl History {
    /// The history of a seed.
    pub fn generate(seed: u64, regions: u16) -> Self {
        let mut random = StdRng::seed_from_u64(seed ^ (u64::from(regions) << 56));
        let random = &mut random;
        let rule = if random.random() { Rule::Lww } else { Rule::Siblings };
        let rule = if is_typed(seed, regions) { Rule::Map } else { rule };
        let batch = random.random_range(1..6);
        let page = [1, 1, 2, 4][random.random_range(0..4)];
        let gate = random.random_ratio(2, 3);
        let length = random.random_range(60..100 + 60 * usize::from(regions));
        // Times differ: a cut, then trimming, then repairs that break off.
        let parts = random.random_range(1..4);
        let mut steps = Vec::with_capacity(length);
        for _ in 0..parts {
            let mix = Mix::new(random, regions);
            steps.extend((0..length / parts).map(|_| mix.step(random)));
        }
        let steps = with_repeats(steps, seed, regions);
        Self { regions, rule, batch, page, gate, steps }
    }
}

/// In a third of the histories the values are maps. Drawn apart from the rest, which is what it is without.
fn is_typed(seed: u64, regions: u16) -> bool {
    let mut random = StdRng::seed_from_u64(seed.rotate_left(32) ^ (u64::from(regions) << 56));
    random.random_ratio(1, 3)
}

/// In half of the histories clients repeat requests. Drawn apart from the rest, which is what it is
/// without.
fn with_repeats(steps: Vec<Step>, seed: u64, regions: u16) -> Vec<Step> {
    let mut random = StdRng::seed_from_u64(!seed ^ (u64::from(regions) << 56));
    if random.random_ratio(1, 2) {
        return steps;
    }
    let places = Place::try_from(regions).unwrap_or(Place::MAX - 1);
    let mut repeated = Vec::with_capacity(steps.len() * 9 / 8);
    for step in steps {
        repeated.push(step);
        if random.random_ratio(1, 8) {
            let (at, back) = (random.random_range(0..=places), random.random_range(0..4));
            repeated.push(Step { wait_ms: 0, event: Event::Repeat { at, back } });
        }
    }
    repeated
}

/// How likely each kind of step is in a history: some are calm, some are not.
struct Mix {
    places: Place,
    keys: u8,
    weights: Vec<(u32, Kind)>,
    total: u32,
    /// Streams that carry little.
    slow: Vec<(Place, Place)>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Write,
    WriteSeen,
    Commit,
    Open,
    Carry,
    Tell,
    Apply,
    Flow,
    Tick,
    Ask,
    Messages,
    Repair,
    Duplicate,
    Late,
    Break,
    BreakRepair,
    Cut,
    Mend,
    Crash,
    Clock,
    Trim,
    TrimStable,
    Collect,
    Expire,
    Backup,
    Restore,
    Join,
    Fence,
    Hear,
}

impl Mix {
    fn new(random: &mut StdRng, regions: u16) -> Self {
        let places = Place::try_from(regions).unwrap_or(Place::MAX - 1);
        // One more may join.
        let places = places + u8::from(regions > 1 && random.random_ratio(1, 4));
        if regions > 1 && random.random_ratio(1, 4) {
            let keys = random.random_range(1..=2);
            return Self::of(random, places, keys, Self::changing());
        }
        // Many repairs at once, and little else that moves.
        let storm = if random.random_ratio(1, 2) { 1 } else { 0 };
        // Links that work, so that regions hear of each other and forget.
        let calm = if random.random_ratio(1, 3) { 1 } else { 0 };
        let mut some =
            |weight: u32, chance: f64| if random.random_bool(chance) { weight } else { 0 };
        let weights = vec![
            (12 + 10 * storm, Kind::Write),
            (some(3, 0.5), Kind::WriteSeen),
            (20 + 20 * storm, Kind::Commit),
            (9, Kind::Open),
            (30, Kind::Carry),
            (16, Kind::Tell),
            (14, Kind::Apply),
            (some(20, 0.6) + 60 * calm, Kind::Flow),
            (14 + 14 * storm, Kind::Tick),
            (some(4, 0.5) + 16 * storm, Kind::Ask),
            (24 + 50 * storm, Kind::Messages),
            (some(8, 0.3), Kind::Repair),
            (some(2, 0.4), Kind::Duplicate),
            (some(2, 0.4), Kind::Late),
            (some(2, 0.6), Kind::Break),
            (some(1, 0.5) + 4 * storm, Kind::BreakRepair),
            (some(3, 0.5), Kind::Cut),
            (4, Kind::Mend),
            (some(2, 0.5), Kind::Crash),
            (some(3, 0.5), Kind::Clock),
            (some(9, 0.8) + 6 * storm, Kind::Trim),
            (some(8, 0.7) + 20 * calm, Kind::TrimStable),
            (some(16, 0.8) + 16 * calm, Kind::Collect),
            (some(4, 0.5), Kind::Expire),
            (some(9, 0.5), Kind::Backup),
            (some(8, 0.6), Kind::Restore),
            (some(4, 0.5), Kind::Join),
            (some(3, 0.3), Kind::Fence),
            (some(6, 0.5) + some(20, 0.5) + 2, Kind::Hear),
        ];
        let keys = random.random_range(1..=u8::try_from(keys().len()).unwrap_or(1));
        Self::of(random, places, keys, weights)
    }

    /// Regions that come, go and are restored all the time, and otherwise work.
    fn changing() -> Vec<(u32, Kind)> {
        vec![
            (14, Kind::Write),
            (3, Kind::WriteSeen),
            (12, Kind::Commit),
            (16, Kind::Open),
            (4, Kind::Carry),
            (4, Kind::Tell),
            (70, Kind::Flow),
            (12, Kind::Tick),
            (24, Kind::Repair),
            (4, Kind::Messages),
            (2, Kind::Late),
            (1, Kind::Break),
            (5, Kind::Cut),
            (5, Kind::Mend),
            (1, Kind::Crash),
            (3, Kind::Clock),
            (2, Kind::Trim),
            (10, Kind::TrimStable),
            (30, Kind::Collect),
            (2, Kind::Expire),
            (4, Kind::Backup),
            (4, Kind::Restore),
            (8, Kind::Join),
            (5, Kind::Fence),
            (16, Kind::Hear),
        ]
    }

    fn of(random: &mut StdRng, places: Place, keys: u8, weights: Vec<(u32, Kind)>) -> Self {
        let total = weights.iter().map(|(weight, _)| weight).sum();
        let mut mix = Self { places, keys, weights, total, slow: Vec::new() };
        if random.random_ratio(1, 3) {
            mix.slow.push(mix.pair(random));
        }
        mix
    }

    fn place(&self, random: &mut StdRng) -> Place {
        random.random_range(0..self.places)
    }

    fn pair(&self, random: &mut StdRng) -> (Place, Place) {
        let one = self.place(random);
        let other = (one + random.random_range(1..self.places.max(2))) % self.places.max(2);
        (one, other)
    }

    fn link(&self, random: &mut StdRng) -> (Place, Place) {
        let pair = self.pair(random);
        if self.slow.contains(&pair) && random.random_ratio(4, 5) {
            self.pair(random)
        } else {
            pair
        }
    }

    fn step(&self, random: &mut StdRng) -> Step {
        let wait_ms = match random.random_range(0..20) {
            0 => random.random_range(1_000..6_000),
            1..6 => random.random_range(50..600),
            _ => random.random_range(0..30),
        };
        Step { wait_ms, event: self.event(random) }
    }

    fn event(&self, random: &mut StdRng) -> Event {
        let mut chosen = random.random_range(0..self.total);
        let kind = self.weights.iter().find(|(weight, _)| {
            let found = chosen < *weight;
            chosen = chosen.saturating_sub(*weight);
            found
        });
        let kind = kind.map_or(Kind::Write, |(_, kind)| *kind);
        let at = self.place(random);
        let (puller, source) = self.link(random);
        match kind {
            Kind::Write => {
                let mut key = || random.random_range(0..self.keys);
                let keys = (key(), key());
                let pair = random.random_ratio(1, 5);
                let delete = (random.random(), random.random());
                Event::Write { at, keys, pair, delete, expires: random.random_ratio(1, 4) }
            }
            Kind::WriteSeen => Event::WriteSeen {
                at,
                key: random.random_range(0..self.keys),
                delete: random.random_ratio(1, 3),
                read_at: self.place(random),
            },
            Kind::Commit => Event::Commit { at, count: random.random_range(1..5) },
            Kind::Open => Event::Open { puller, source },
            Kind::Carry => {
                let count = random.random_range(1..4);
                match random.random_range(0..5) {
                    0 => Event::Requests { puller, source, count },
                    1 | 2 => Event::Send { puller, source, count },
                    _ => Event::Replies { puller, source, count },
                }
            }
            Kind::Tell => Event::Tell { puller, source },
            Kind::Apply => Event::Apply { puller, source },
            Kind::Flow => Event::Flow { puller, source },
            Kind::Tick => Event::Tick { at },
            Kind::Ask => Event::Ask { puller, source, compare: random.random_ratio(1, 3) },
            Kind::Messages => {
                let (requests, replies) = (random.random_range(0..3), random.random_range(0..4));
                Event::RepairMessages { at, requests, replies }
            }
            Kind::Repair => Event::Repair { at, rounds: random.random_range(1..12) },
            Kind::Duplicate => {
                Event::Duplicate { puller, source, reply: random.random_ratio(3, 4) }
            }
            Kind::Late => Event::Late { puller, source },
            Kind::Break => Event::Break { puller, source },
            Kind::BreakRepair => Event::BreakRepair { at },
            Kind::Cut => Event::Cut { from: puller, to: source },
            Kind::Mend => Event::Mend { from: puller, to: source },
            Kind::Crash => Event::Crash { at, commit: random.random_range(0..3) },
            Kind::Clock => {
                let offset_ms = match random.random_range(0..4) {
                    0 => 0,
                    1 => random.random_range(-400..400),
                    _ => random.random_range(-HOURS_8_MS..HOURS_8_MS),
                };
                Event::Clock { at, offset_ms }
            }
            Kind::Trim => Event::Trim { at, keep: random.random_range(0..4) },
            Kind::TrimStable => Event::TrimStable { at },
            Kind::Collect => Event::Collect { at },
            Kind::Expire => Event::Expire { at },
            Kind::Backup => Event::Backup { at },
            Kind::Restore => Event::Restore { at },
            Kind::Join => Event::Join { at },
            Kind::Fence => Event::Fence { at },
            Kind::Hear => Event::Hear { at, skip: random.random_range(0..3) },
        }
    }
}
