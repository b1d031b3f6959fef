use std::time::Duration;

use openraft::errors::ForwardToLeader;
use openraft::raft::ClientWriteResponse;
use openraft::raft::responder::Responder;
use tombolo_core::codec::DecodeError;

use super::*;
use crate::types::{Outcomes, log_id};

/// Entries that were handed over and not completed yet.
type Log = Arc<Mutex<Vec<(Bytes, WriteResponder)>>>;

struct FakeCore(Log);

impl Proposer for FakeCore {
    fn write(&self, command: Command, responder: WriteResponder) -> Handover {
        self.0.lock().push((command.0, responder));
        Box::pin(async { Ok(()) })
    }
}

struct DeadCore;

impl Proposer for DeadCore {
    fn write(&self, _: Command, responder: WriteResponder) -> Handover {
        drop(responder);
        Box::pin(async { Err(()) })
    }
}

fn batcher() -> (Batcher, Log) {
    let log = Log::default();
    (Batcher::new(Box::new(FakeCore(log.clone())), 8 << 20), log)
}

/// A harmless command that can be told apart.
fn command(number: u64) -> Bytes {
    let request = tombolo_core::RequestId { client: number, number };
    tombolo_core::Command::ForgetRequests(vec![request]).to_bytes()
}

fn count(entry: &Bytes) -> Result<usize, DecodeError> {
    tombolo_core::decode_batch(entry.clone()).map(|commands| commands.len())
}

fn complete(log: &Log, index: u64) -> usize {
    let (entry, responder) = log.lock().remove(0);
    let commands = count(&entry).unwrap();
    responder.on_complete(Ok(ClientWriteResponse {
        log_id: log_id(1, 1, index),
        data: Outcomes(vec![Outcome::Done; commands]),
        membership: None,
    }));
    commands
}

fn spawn(batcher: &Batcher, number: u64) -> tokio::task::JoinHandle<Answer> {
    let batcher = batcher.clone();
    tokio::spawn(async move { batcher.propose(command(number)).await })
}

/// Lets all spawned tasks run until they wait.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn commands_that_wait_share_the_next_entry_and_get_their_own_outcomes() {
    let (batcher, log) = batcher();
    let mut callers: Vec<_> = vec![spawn(&batcher, 0)];
    settle().await;
    callers.push(spawn(&batcher, 1));
    settle().await;
    callers.extend((2..10).map(|number| spawn(&batcher, number)));
    settle().await;
    assert_eq!(log.lock().len(), IN_FLIGHT_MAX);
    assert_eq!(batcher.queued(), 8);

    let sizes: Vec<usize> = (0..3).map(|index| complete(&log, index)).collect();

    assert_eq!(sizes, [1, 1, 8]);
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap().outcome, Outcome::Done);
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_takes_back_only_what_still_waits() {
    let (batcher, log) = batcher();
    let callers: Vec<_> = (0..4).map(|number| spawn(&batcher, number)).collect();
    settle().await;

    for caller in &callers[..3] {
        caller.abort();
    }
    settle().await;
    assert_eq!(log.lock().len(), IN_FLIGHT_MAX, "what was proposed stays proposed");
    complete(&log, 0);
    complete(&log, 1);

    assert_eq!(count(&log.lock()[0].0), Ok(1), "only the caller that still waits");
    assert_eq!(batcher.queued(), 0);
}

#[tokio::test]
async fn an_entry_is_bounded_in_bytes_and_the_queue_refuses_what_is_too_much() {
    let (batcher, log) = batcher();
    let big = || Bytes::from(vec![0u8; ENTRY_BYTES_MAX / 2 + 1]);
    let mut callers = Vec::new();
    let room = QUEUE_BYTES_MAX / big().len();
    for _ in 0..IN_FLIGHT_MAX + room {
        let batcher = batcher.clone();
        callers.push(tokio::spawn(async move { batcher.propose(big()).await }));
        settle().await;
    }

    assert_eq!(batcher.propose(big()).await, Err(ProposeError::Overloaded));
    let too_large = Bytes::from(vec![0u8; 8 << 20]);
    assert!(matches!(batcher.propose(too_large).await, Err(ProposeError::TooLarge { .. })));
    let first = log.lock().remove(0);
    drop(first);
    assert_eq!(log.lock().len(), IN_FLIGHT_MAX);
    assert!(log.lock()[1].0.len() < ENTRY_BYTES_MAX);
}

#[tokio::test]
async fn a_dead_core_answers_everyone() {
    let batcher = Batcher::new(Box::new(DeadCore), 8 << 20);
    let answer = tokio::time::timeout(Duration::from_secs(5), batcher.propose(command(1))).await;
    assert!(matches!(answer, Ok(Err(ProposeError::Unknown { .. }))));

    batcher.stop();
    assert_eq!(batcher.propose(command(2)).await, Err(ProposeError::Stopped));
}

#[tokio::test]
async fn losing_leadership_tells_apart_what_was_not_proposed_and_what_is_unknown() {
    let (batcher, log) = batcher();
    let first = spawn(&batcher, 1);
    settle().await;
    let second = spawn(&batcher, 2);
    settle().await;

    let (_, responder) = log.lock().remove(0);
    responder.on_complete(Err(ClientWriteError::ForwardToLeader(ForwardToLeader::empty())));
    let (_, responder) = log.lock().remove(0);
    responder.on_complete(Err(ClientWriteError::LogEntryDiscarded(ForwardToLeader::empty())));

    assert_eq!(first.await.unwrap(), Err(ProposeError::NotLeader { leader: None }));
    assert!(matches!(second.await.unwrap(), Err(ProposeError::Unknown { .. })));
}
