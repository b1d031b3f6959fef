//! What a session has seen it sees again, in whatever region it reads next, whatever happens to links
//! and leaders meanwhile.
//!
//! Many sessions hop between three regions at random. A checker that knows nothing of tokens looks at
//! what they are answered: under `lww` the winner of a key is the greatest write by time and dot that a
//! region has, so an answer below one that the session has seen or written is older than it may be.
//! Values carry what their writer had seen of the keys beside them, so that what others see is checked
//! too. The same run without tokens must be caught.
//!
//! `TOMBOLO_SESSION_STEPS` and `TOMBOLO_SEED` change how long and which run it is.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tombolo_client::{
    Client, ClientConfig, Consistency, Dot, Error, Keyspace, Session, Version, proto,
};
use tombolo_core::{
    Actor, NamespaceId, RegionId, ShardId,
    token::{SessionToken, TokenKey, encode_context},
};
use tombolo_demo::{
    latency::Latencies,
    network::{Cut, Network},
};

use crate::support::{Cluster, Member, PATIENCE, wait_until};

/// Leaders change in the first; the others are small so that the run is fast.
const REGIONS: [(&str, usize); 3] = [("us", 3), ("eu", 1), ("ap", 1)];
const SHARDS: u16 = 2;
const STEPS: u64 = 100_000;
const SESSIONS_AT_ONCE: usize = 192;
const STEPS_OF_A_SESSION: u64 = 40;
/// Keys of a group share a hash tag, so that they lie in one shard and depend on each other.
const GROUPS: u64 = 12;
const KEYS_OF_A_GROUP: u64 = 4;
/// Short, because a session that waits for a region that is cut off goes to another.
const DEADLINE: Duration = Duration::from_millis(250);

/// A reproducible source of choices (splitmix64).
struct Choices(u64);

impl Choices {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A key, by group and place in it.
type Key = (u64, u64);
/// What decides between two writes of a key.
type Rank = (u64, Dot);

fn name_of((group, place): Key) -> String {
    format!("{{g{group}}}:{place}")
}

/// Which promise was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Promise {
    ReadYourWrites,
    MonotonicReads,
    /// What a write's writer had seen or written before is seen by whoever sees the write: writes
    /// follow reads, and a session's writes each other.
    CausalWrites,
}

/// What a session must go on seeing, and why.
#[derive(Default)]
struct Seen(BTreeMap<Key, (Rank, Promise)>);

impl Seen {
    fn must_see(&mut self, key: Key, rank: Rank, why: Promise) {
        let held = self.0.entry(key).or_insert((rank, why));
        if held.0 < rank {
            *held = (rank, why);
        }
    }

    /// The session wrote this.
    fn wrote(&mut self, key: Key, rank: Rank) {
        self.must_see(key, rank, Promise::ReadYourWrites);
    }

    /// The session was answered this; which promise that breaks, if any.
    fn read(&mut self, key: Key, answer: Option<&Answer>) -> Option<Promise> {
        let least = self.0.get(&key).copied();
        let broken = least.filter(|&(least, _)| answer.is_none_or(|answer| answer.rank < least));
        if let Some(answer) = answer {
            self.must_see(key, answer.rank, Promise::MonotonicReads);
            for &(key, rank) in &answer.after {
                self.must_see(key, rank, Promise::CausalWrites);
            }
        }
        broken.map(|(_, why)| why)
    }

    /// What is seen of the keys beside one, for the value of a write to carry.
    fn beside(&self, (group, _): Key) -> impl Iterator<Item = (Key, Rank)> {
        let all = self.0.range((group, 0)..(group + 1, 0));
        all.map(|(&key, &(rank, _))| (key, rank))
    }
}

/// A value that was read: its write, and what its writer had seen.
struct Answer {
    rank: Rank,
    after: Vec<(Key, Rank)>,
}

impl Answer {
    fn of(group: u64, version: &Version) -> Self {
        let text = std::str::from_utf8(&version.value).expect("written by this test");
        let after = text.split(';').filter(|part| !part.is_empty()).map(|part| {
            let mut fields = part.splitn(3, ',');
            let mut field = || fields.next().expect("three fields");
            let place = field().parse().expect("a place");
            let time = field().parse().expect("a time");
            ((group, place), (time, field().parse().expect("a dot")))
        });
        Self { rank: (version.time.0, version.dot), after: after.collect() }
    }
}

fn value_of(seen: &Seen, key: Key) -> String {
    let parts = seen.beside(key).map(|((_, place), (time, dot))| format!("{place},{time},{dot};"));
    parts.collect()
}

/// Counts of a run.
#[derive(Default)]
struct Counts {
    reads: AtomicU64,
    writes: AtomicU64,
    /// Refused or out of time: allowed, as long as it is said.
    refused: AtomicU64,
    violations: Mutex<BTreeMap<Promise, u64>>,
}

impl Counts {
    fn violations(&self) -> BTreeMap<Promise, u64> {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn broke(&self, promise: Promise) {
        let mut violations = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        *violations.entry(promise).or_default() += 1;
    }

    fn done(&self) -> u64 {
        self.reads.load(Ordering::Relaxed) + self.writes.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [reads, writes, refused] =
            [&self.reads, &self.writes, &self.refused].map(|it| it.load(Ordering::Relaxed));
        let violations = self.violations();
        write!(f, "{reads} reads, {writes} writes, {refused} refused, broken: {violations:?}")
    }
}

/// A run: sessions that take steps until there are enough.
struct Run {
    regions: Vec<Keyspace>,
    with_tokens: bool,
    steps: u64,
    counts: Counts,
}

impl Run {
    async fn sessions(&self, mut choices: Choices) {
        while self.counts.done() < self.steps {
            self.session(&mut choices).await;
        }
    }

    async fn session(&self, choices: &mut Choices) {
        let session = Session::new();
        let mut seen = Seen::default();
        let groups = [choices.below(GROUPS), choices.below(GROUPS)];
        for _ in 0..STEPS_OF_A_SESSION {
            let group = groups[usize::try_from(choices.below(2)).expect("small")];
            let key = (group, choices.below(KEYS_OF_A_GROUP));
            let place = usize::try_from(choices.below(3)).expect("small");
            let region = &self.regions[place];
            if choices.below(8) == 0 {
                self.write(region, &session, &mut seen, key).await;
            } else {
                self.read(region, &session, &mut seen, key, choices.below(4)).await;
            }
        }
    }

    async fn write(&self, region: &Keyspace, session: &Session, seen: &mut Seen, key: Key) {
        let put = region.put(name_of(key), value_of(seen, key));
        let put = if self.with_tokens { put.session(session) } else { put };
        match put.await {
            Ok(written) => {
                seen.wrote(key, (written.time.0, written.dot));
                self.counts.writes.fetch_add(1, Ordering::Relaxed);
            }
            // It may stand all the same; nobody promised the session to see it.
            Err(_) => drop(self.counts.refused.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Reads one key, or all of its group with a batch or a scan.
    async fn read(
        &self,
        region: &Keyspace,
        session: &Session,
        seen: &mut Seen,
        key: Key,
        how: u64,
    ) {
        let region = if self.with_tokens { region.with_session(session) } else { region.clone() };
        let level = if self.with_tokens { Consistency::Causal } else { Consistency::Local };
        let group = (0..KEYS_OF_A_GROUP).map(|place| (key.0, place));
        let answered: Result<Vec<(Key, Option<Version>)>, Error> = match how {
            0 => {
                region.batch_get(group.clone().map(name_of)).consistency(level).await.map(|gots| {
                    group.zip(gots.into_iter().map(|got| got.versions.into_iter().next())).collect()
                })
            }
            1 => {
                let scan = region.scan().prefix(format!("{{g{}}}:", key.0)).consistency(level);
                scan.collect().await.map(|entries| {
                    let version = |key: Key| {
                        let found = entries.iter().find(|entry| entry.key == name_of(key));
                        (key, found.and_then(|entry| entry.versions.first().cloned()))
                    };
                    group.map(version).collect()
                })
            }
            _ => region
                .get(name_of(key))
                .consistency(level)
                .await
                .map(|got| vec![(key, got.versions.into_iter().next())]),
        };
        let Ok(answered) = answered else {
            self.counts.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        for (key, version) in answered {
            let answer = version.map(|version| Answer::of(key.0, &version));
            if let Some(promise) = seen.read(key, answer.as_ref()) {
                self.counts.broke(promise);
            }
        }
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
    }
}

/// Three regions that reach each other only through a network that can be broken.
async fn start() -> (Cluster, Network) {
    let names: Vec<String> = REGIONS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let network = Network::new(&names, &Latencies::uniform(Duration::from_millis(10)));
    let through = async |members: &mut [Member]| {
        let targets: Vec<(String, String)> = members
            .iter()
            .map(|member| (member.config.region.clone(), member.config.listen.link.clone()))
            .collect();
        for member in members {
            let from = member.config.region.clone();
            member.config.replication.retry_max = Duration::from_millis(100);
            for region in member.config.regions.iter_mut().filter(|it| it.name != from) {
                region.link.clear();
                for (_, target) in targets.iter().filter(|(name, _)| *name == region.name) {
                    let target = target.parse().expect("an address");
                    let proxy = network.open(&from, &region.name, target).await;
                    region.link.push(proxy.expect("a free port").to_string());
                }
            }
        }
    };
    let cluster = Cluster::start_prepared(&REGIONS, SHARDS, &[], through).await;
    (cluster, network)
}

async fn keyspaces(cluster: &Cluster) -> Vec<Keyspace> {
    let mut keyspaces = Vec::new();
    for (region, _) in REGIONS {
        let endpoints = cluster.addresses(region);
        let config = ClientConfig { endpoints, deadline: DEADLINE, ..ClientConfig::default() };
        let client = Client::connect(config).await.expect("the region answers");
        keyspaces.push(client.namespace("default"));
    }
    keyspaces
}

fn seed() -> u64 {
    let given = std::env::var("TOMBOLO_SEED").ok().and_then(|text| text.parse().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = given.unwrap_or_else(|| u64::from(now.subsec_nanos()) + now.as_secs());
    eprintln!("TOMBOLO_SEED={seed}");
    seed
}

/// Breaks links and moves leaders every so many steps, until the run is over.
async fn make_trouble(cluster: &Cluster, network: &Network, run: &Run, mut choices: Choices) {
    let until = async |steps: u64| {
        wait_until("sessions go on", async || steps.min(run.steps) <= run.counts.done()).await;
    };
    let mut at = 0;
    while at < run.steps {
        let pairs = [["us", "eu"], ["us", "ap"], ["eu", "ap"]];
        let [a, b] = pairs[usize::try_from(choices.below(3)).expect("small")];
        let cut = Cut { reset: choices.below(2) == 0, one_way: choices.below(3) == 0 };
        match choices.below(4) {
            0 => network.partition(a, b, cut).expect("known regions"),
            1 => network.isolate(a, cut).expect("a known region"),
            _ => {
                let nodes = cluster.members.iter().filter(|it| it.config.region == "us");
                for node in nodes.filter_map(|member| member.node.as_ref()) {
                    node.hand_over(Duration::from_secs(2)).await;
                }
            }
        }
        // Sessions in a region that is cut off only wait, so cuts are short in steps and long in time.
        at += run.steps / 400 + 1;
        until(at).await;
        network.heal();
        at += run.steps / 20;
        until(at).await;
    }
    network.heal();
}

async fn play(with_tokens: bool, steps: u64) -> Arc<Run> {
    let seed = seed();
    let (cluster, network) = start().await;
    let regions = keyspaces(&cluster).await;
    let counts = Counts::default();
    let run = Arc::new(Run { regions, with_tokens, steps, counts });
    let mut choices = Choices(seed);
    let mut sessions = tokio::task::JoinSet::new();
    for _ in 0..SESSIONS_AT_ONCE {
        let (run, choices) = (Arc::clone(&run), Choices(choices.next()));
        sessions.spawn(async move { run.sessions(choices).await });
    }
    make_trouble(&cluster, &network, &run, choices).await;
    while let Some(ended) = sessions.join_next().await {
        ended.expect("no session panics");
    }
    eprintln!("{}", run.counts);
    cluster.stop().await;
    network.close().await;
    run
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_with_tokens_never_go_back_in_any_region() {
    let steps = std::env::var("TOMBOLO_SESSION_STEPS").ok().and_then(|text| text.parse().ok());
    let run = play(true, steps.unwrap_or(STEPS)).await;
    assert_eq!(run.counts.violations(), BTreeMap::new(), "{}", run.counts);
    assert!(run.counts.writes.load(Ordering::Relaxed) > run.steps / 20, "{}", run.counts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_tokens_the_same_sessions_are_caught_going_back() {
    let run = play(false, STEPS / 10).await;
    let violations = run.counts.violations();
    for promise in [Promise::ReadYourWrites, Promise::MonotonicReads] {
        assert!(violations.contains_key(&promise), "{promise:?}: {violations:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_sealed_with_the_clusters_key_which_can_be_changed_region_by_region() {
    let (key, next) = ("the key of this cluster", "the next key of this cluster");
    let cluster = Cluster::start_configured(&[("us", 1), ("eu", 1)], 1, &[], |config| {
        let (sealing, accepted) = if config.region == "us" { (next, key) } else { (key, next) };
        config.cluster_key = Some(sealing.into());
        config.accepted_cluster_key = Some(accepted.into());
    })
    .await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    let session = us.session();
    let (in_us, in_eu) = (us.namespace("default"), eu.namespace("default"));
    let written = in_us.put("k", "1").session(&session).await.unwrap();
    let got = in_eu.get("k").session(&session).await.unwrap();
    assert_eq!(got.value().unwrap().as_ref(), b"1");
    in_eu.put("k", "2").context(&written.context).session(&session).await.unwrap();
    assert_eq!(in_us.get("k").session(&session).await.unwrap().value().unwrap().as_ref(), b"2");

    // Whoever knows the cluster's id and all that is in a token still cannot make one.
    let made_up = TokenKey::without_secret("test");
    let seen = [(Actor { region: RegionId(1), incarnation: 1 }, 1)].into_iter().collect();
    let mut token = SessionToken::default();
    token.observe(NamespaceId::DEFAULT, ShardId(0), &seen);
    let forged = Session::from_token(token.encode(&made_up));
    let context = encode_context(&made_up, NamespaceId::DEFAULT, b"k", &seen);
    let refused = |error: Error| match error {
        Error::Invalid { detail } => detail.reason.unwrap_or_default(),
        other => panic!("{other:?}"),
    };
    let error = in_us.get("k").session(&forged).await.unwrap_err();
    assert_eq!(refused(error), "SESSION_TOKEN_INVALID");
    let error = in_us.put("k", "3").context(context).await.unwrap_err();
    assert_eq!(refused(error), "CONTEXT_INVALID");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_forgets_what_it_saw_of_namespaces_that_are_deleted() {
    let cluster = Cluster::start(&[("us", 1)], 1).await;
    let us = cluster.client("us").await;
    let session = us.session();
    let mut numbers = Vec::new();
    for name in ["first", "second", "third"] {
        numbers.push(us.admin().create_namespace(name, proto::Rule::Lww).await.unwrap().id);
        us.namespace(name).put("k", "v").session(&session).await.unwrap();
    }
    let seen = || {
        let token = SessionToken::decode(&TokenKey::without_secret("test"), &session.token());
        token.unwrap().iter().map(|(namespace, ..)| namespace.0).collect::<Vec<_>>()
    };
    assert_eq!(seen(), numbers);
    for name in ["first", "third"] {
        us.admin().delete_namespace(name, None).await.unwrap();
    }
    us.namespace("second").get("k").session(&session).await.unwrap();
    assert_eq!(seen(), numbers[1..], "nobody can tell the third from one that is yet to come");
    us.admin().create_namespace("fourth", proto::Rule::Lww).await.unwrap();
    us.namespace("second").get("k").session(&session).await.unwrap();
    assert_eq!(seen(), numbers[1..2]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_side_by_side_in_one_session_are_all_seen_again_elsewhere() {
    let (cluster, network) = start().await;
    let regions = keyspaces(&cluster).await;
    let session = Session::new();
    for round in 0..5 {
        let puts = (0..40).map(|number| {
            let put = regions[number % 3].put(format!("k{number}"), format!("{round}"));
            put.session(&session).deadline(PATIENCE).into_future()
        });
        futures::future::try_join_all(puts).await.unwrap();
        for number in 0..40 {
            let get = regions[(number + round) % 3].get(format!("k{number}"));
            let got = get.session(&session).deadline(PATIENCE).await.unwrap();
            assert_eq!(got.value().unwrap(), &format!("{round}"), "k{number}");
        }
    }
    assert!(session.token().len() < 1000, "it is one token again: {}", session.token().len());
    cluster.stop().await;
    network.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_a_region_cannot_catch_up_with_is_told_how_far_it_is() {
    let (cluster, network) = start().await;
    let regions = keyspaces(&cluster).await;
    let session = Session::new();
    network.isolate("ap", Cut::default()).unwrap();
    regions[0].put("k", "v").session(&session).deadline(PATIENCE).await.unwrap();
    for consistency in [
        Consistency::Causal,
        Consistency::Linearizable,
        Consistency::MaxStaleness(Duration::from_secs(60)),
    ] {
        let error = regions[2].get("k").session(&session).consistency(consistency).await;
        let Err(Error::Precondition { detail }) = error else { panic!("{error:?}") };
        assert_eq!(detail.reason.as_deref(), Some("SESSION_NOT_CAUGHT_UP"), "{consistency:?}");
        assert_eq!(detail.metadata["events_behind"], "1");
    }
    let local = regions[2].get("k").session(&session).consistency(Consistency::Local).await;
    assert!(local.unwrap().value().is_none(), "whatever is there");
    // A read that waits is woken by what it waits for.
    let waiting = regions[2].get("k").session(&session).deadline(PATIENCE).into_future();
    let (got, ()) = tokio::join!(waiting, async { network.heal() });
    assert_eq!(got.unwrap().value().unwrap().as_ref(), b"v");
    cluster.stop().await;
    network.close().await;
}

#[test]
fn the_checker_notices_each_broken_promise() {
    let dot = |seq| Dot { region: 1, incarnation: 1, seq };
    let answer =
        |time, after: &[(Key, Rank)]| Answer { rank: (time, dot(time)), after: after.into() };
    let mut seen = Seen::default();
    assert_eq!(seen.read((1, 0), None), None);
    seen.wrote((1, 0), (5, dot(5)));
    assert_eq!(seen.read((1, 0), None), Some(Promise::ReadYourWrites));
    assert_eq!(seen.read((1, 0), Some(&answer(4, &[]))), Some(Promise::ReadYourWrites));
    assert_eq!(seen.read((1, 0), Some(&answer(5, &[]))), None);
    assert_eq!(seen.read((1, 0), Some(&answer(7, &[((1, 1), (6, dot(6)))]))), None);
    assert_eq!(seen.read((1, 0), Some(&answer(6, &[]))), Some(Promise::MonotonicReads));
    assert_eq!(seen.read((1, 1), Some(&answer(3, &[]))), Some(Promise::CausalWrites));
    assert_eq!(value_of(&seen, (1, 3)), "0,7,1.1:7;1,6,1.1:6;");
}
