//! What clients do: generators of operations, one process at a time.
//!
//! Each client has one node, does one thing at a time, and records it before it asks and after it
//! was answered. A client whose operation ended in the unknown goes on under a new process number.
//! Every node has one client that does everything and one that only reads: a client that waits for
//! a write on a node that is cut off does not see what the node shows meanwhile.
//!
//! Not here: faults (`nemesis`), what is read in the end (`settle`).

pub(crate) mod register;
pub(crate) mod set;

use crate::client::{Client, Failure, Made};
use crate::cluster::Cluster;
use crate::plan::{Plan, Workload};
use crate::recorder::{Recorder, What};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tombolo_jepsen_history::{Facts, Kind, Revision};
use tombolo_proto::v1;

/// Operations a second of all clients together: what two cores serve with room to spare.
const RATE: u64 = 200;

/// The namespace of a run.
pub(crate) const NAMESPACE: &str = "jepsen";

/// Starts the clients of every node; they end when `stop` fires.
pub(crate) async fn start(
    plan: &Plan,
    cluster: &Cluster,
    recorder: &Arc<Recorder>,
    stop: &CancellationToken,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let mut tasks = Vec::new();
    let registers = register::Shared::new(&cluster.layout.shape.regions, plan);
    let sets = set::Shared::new(&cluster.layout.shape.regions, plan);
    let roles = [Role::Everything, Role::Reads];
    let count = (cluster.layout.nodes.len() * roles.len()) as u64;
    let mean = Duration::from_millis(1000 * count / RATE);
    let nodes = cluster.layout.nodes.iter();
    let clients = nodes.flat_map(|node| roles.map(|role| (node, role)));
    for ((node, role), number) in clients.zip(1..) {
        let client = cluster.client(&node.name).await?;
        let session = Session::new(client, recorder, plan.seed.wrapping_mul(1000) + number);
        let pace = Pace { mean, stop: stop.clone() };
        let place = cluster.place(&node.region)?;
        tasks.push(match plan.workload {
            Workload::Register => {
                place.spawn(register::act(session, role, pace, Arc::clone(&registers)))
            }
            Workload::GSet | Workload::Delete => {
                place.spawn(set::act(session, role, pace, Arc::clone(&sets)))
            }
        });
    }
    Ok(tasks)
}

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Everything,
    Reads,
}

/// How often a client acts, and until when.
pub(crate) struct Pace {
    mean: Duration,
    stop: CancellationToken,
}

impl Pace {
    /// Waits for the next turn; false when there is none.
    async fn next(&self, dice: &mut StdRng) -> bool {
        let pause = self.mean.mul_f64(dice.random_range(0.5..1.5));
        self.stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some()
    }
}

/// One client and what it tells the recorder.
pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) dice: StdRng,
    recorder: Arc<Recorder>,
    process: u64,
    id: v1::RequestId,
}

impl Session {
    pub(crate) fn new(client: Client, recorder: &Arc<Recorder>, seed: u64) -> Self {
        let process = recorder.new_process();
        // The server takes no zero.
        let id = v1::RequestId { client: rand::random::<u64>().max(1), number: 0 };
        let recorder = Arc::clone(recorder);
        Self { client, dice: StdRng::seed_from_u64(seed), recorder, process, id }
    }

    /// An id that no request has had.
    fn next_id(&mut self) -> v1::RequestId {
        self.id.number += 1;
        self.id
    }

    fn place(&self) -> Facts {
        let (region, node) = (self.client.region.clone(), self.client.node.clone());
        Facts { region: Some(region), node: Some(node), ..Facts::default() }
    }

    pub(crate) fn begin(&self, what: &What) {
        self.recorder.client(self.process, Kind::Invoke, what, self.place());
    }

    /// A read that showed something.
    pub(crate) fn shown(&self, what: &What, value: Value, revision: Option<v1::Revision>) {
        let what = What { value, ..what.clone() };
        let x = Facts { rev: revision.map(revision_of), ..self.place() };
        self.recorder.client(self.process, Kind::Ok, &what, x);
    }

    /// A read that showed nothing, which is no event at all.
    pub(crate) fn missed(&self, what: &What, failure: &Failure) {
        let x = Facts { error: Some(failure.words().to_owned()), ..self.place() };
        self.recorder.client(self.process, Kind::Fail, what, x);
    }

    /// The end of a write.
    pub(crate) fn written(&mut self, what: &What, outcome: Result<Made, Failure>) {
        let mut x = self.place();
        let kind = match outcome {
            Ok(made) => {
                x.rev = made.revision.map(revision_of);
                x.dot =
                    made.dot.map(|dot| format!("{}.{}:{}", dot.region, dot.incarnation, dot.seq));
                Kind::Ok
            }
            Err(Failure::Refused(words)) => {
                x.error = Some(words);
                Kind::Fail
            }
            Err(Failure::Unknown(words)) => {
                x.error = Some(words);
                Kind::Info
            }
        };
        self.recorder.client(self.process, kind, what, x);
        if kind == Kind::Info {
            self.process = self.recorder.new_process();
        }
    }

    /// The end of a compare-and-set that found something else.
    pub(crate) fn refused(&self, what: &What, actual: Value) {
        let x = Facts { actual: Some(actual), ..self.place() };
        self.recorder.client(self.process, Kind::Fail, what, x);
    }
}

fn revision_of(revision: v1::Revision) -> Revision {
    Revision { shard: revision.shard, term: revision.term, index: revision.index }
}

/// A number as a value of this many bytes.
pub(crate) fn encode(number: u64, bytes: usize) -> Bytes {
    format!("{number:<bytes$}").into()
}

/// The number in a value.
pub(crate) fn decode(value: Option<&v1::Value>) -> Option<u64> {
    match value?.kind.as_ref()? {
        v1::value::Kind::Data(data) => std::str::from_utf8(data).ok()?.trim_end().parse().ok(),
        v1::value::Kind::Counter(_)
        | v1::value::Kind::Set(_)
        | v1::value::Kind::Map(_)
        | v1::value::Kind::Flag(_) => None,
    }
}
