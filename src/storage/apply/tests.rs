//! Random histories against the state in memory, replay, crashes, repeated requests.

use std::fs;

use tombolo_core::command::Condition;

use super::*;
use crate::testing::*;
use proptest::prelude::*;
use tombolo_core::{
    Command, Rule,
    command::{Check, Write},
    testing::MemoryState,
    typed::{Action, Mutation},
};

#[derive(Clone, Copy, Debug)]
enum Disruption {
    None,
    Flush,
    CleanRestart,
    Crash,
}

fn disruption() -> impl Strategy<Value = Disruption> {
    prop_oneof![
        4 => Just(Disruption::None),
        2 => Just(Disruption::Flush),
        1 => Just(Disruption::CleanRestart),
        2 => Just(Disruption::Crash),
    ]
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn every_history_gives_the_state_and_outcomes_of_the_model_across_restarts_and_crashes(
        events in events(),
        steps in prop::collection::vec((1usize..5, disruption()), 1..8),
    ) {
        let history = history(&events);
        let (mut dir, mut store, mut shard) = fresh();
        let mut done = 0;
        let rest = (history.entries.len(), Disruption::None);
        for (length, disruption) in steps.into_iter().chain([rest]) {
            let end = (done + length).min(history.entries.len());
            // A few entries more than needed: those are skipped.
            let from = done.saturating_sub(1);
            let outcomes = shard.apply(&history.entries[from..end]).unwrap();
            prop_assert!(outcomes[..done - from].iter().all(Vec::is_empty));
            prop_assert_eq!(&outcomes[done - from..], &history.outcomes[done..end]);
            done = end;

            match disruption {
                Disruption::None => {}
                Disruption::Flush => {
                    store.flush().unwrap();
                    prop_assert_eq!(store.durable_position(SHARD).unwrap(), shard.applied());
                }
                Disruption::CleanRestart => {
                    drop((store, shard));
                    (store, shard) = open(dir.path());
                    prop_assert_eq!(shard.applied(), Some(position(done as u64)));
                }
                Disruption::Crash => {
                    let durable = store.durable_position(SHARD).unwrap();
                    let copy = crashed(&store);
                    drop((store, shard));
                    dir = copy;
                    (store, shard) = open(dir.path());
                    prop_assert_eq!(shard.applied(), durable);
                    done = usize::try_from(durable.map_or(0, |at| at.index)).unwrap();
                }
            }
            prop_assert_eq!(&dump(&shard), &history.states[done]);
            assert_caches_match(&shard, &history.states[done]);
        }
        prop_assert_eq!(done, history.entries.len());
        drop((store, dir));
    }
}

/// A typed operation by numbers: which, where, with what.
fn typed_mutation((action, path, data): (u8, u8, u8)) -> Mutation {
    let bytes = |text: String| Bytes::from(text);
    let data_of = || bytes(format!("d{}", data % 5));
    let action = match action % 9 {
        0 => Action::Add(i64::from(data) - 7),
        1 => Action::Insert(data_of()),
        2 => Action::Remove(data_of()),
        3 => Action::Assign(data_of()),
        4 => Action::Enable,
        5 => Action::Disable,
        6 => Action::Maximum(data_of()),
        7 => Action::Minimum(data_of()),
        _ => Action::Clear,
    };
    let path = ["a", "b", "c", "d"][usize::from(path % 4)];
    let path = vec![bytes(path.to_owned()), bytes(format!("f{}", data % 2))];
    Mutation { key: bytes("k".to_owned()), path, action, context: None }
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn typed_values_are_the_models_however_commands_are_grouped_into_entries_and_runs(
        runs in prop::collection::vec(
            prop::collection::vec(
                prop::collection::vec(prop::collection::vec((0u8..9, 0u8..4, 0u8..20), 1..4), 1..3),
                1..3,
            ),
            1..10,
        ),
    ) {
        let (_dir, store, shard) = fresh();
        let mut memory = MemoryState::default();
        let mut index = 0;
        for (place, run) in runs.iter().enumerate() {
            let (mut entries, mut expected) = (Vec::new(), Vec::new());
            for commands in run {
                index += 1;
                let command = |mutations: &Vec<(u8, u8, u8)>| Command::Write(Write {
                    namespace: SIBLINGS,
                    rule: Rule::Map,
                    mutations: mutations.iter().copied().map(typed_mutation).collect(),
                    ..write(index, Vec::new())
                });
                let commands: Vec<Command> = commands.iter().map(command).collect();
                let outcomes = commands.iter().map(|command| {
                    let Ok(outcome) = execute(&mut memory, command);
                    outcome
                });
                expected.push(outcomes.collect::<Vec<_>>());
                entries.push(entry(index, &commands));
            }
            prop_assert_eq!(shard.apply(&entries).unwrap(), expected);
            if place % 3 == 2 {
                store.flush().unwrap();
            }
        }
        prop_assert_eq!(dump(&shard), memory);
    }
}

#[test]
fn a_crash_takes_what_was_not_flushed_and_replay_brings_it_back() {
    let (_dir, store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    store.flush().unwrap();
    run_write(&shard, write(2, vec![put("a", "2")]));
    let whole = dump(&shard);
    assert_eq!(store.durable_position(SHARD).unwrap(), Some(position(1)));

    let copy = crashed(&store);
    let (_restarted, again) = open(copy.path());
    assert_eq!(again.applied(), Some(position(1)));
    run_write(&again, write(2, vec![put("a", "2")]));

    assert_eq!(dump(&again), whole);
}

#[test]
fn a_gap_in_the_log_is_refused_and_nothing_is_applied() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    let before = dump(&shard);

    let commands = [Command::Write(write(2, vec![put("a", "2")]))];
    let error = shard.apply(&[entry(2, &commands), entry(4, &commands)]).unwrap_err();

    assert!(matches!(error, StorageError::OutOfOrder { expected: 3, actual: 4, .. }), "{error}");
    assert_eq!((dump(&shard), shard.applied()), (before, Some(position(1))));
}

#[test]
fn an_undecodable_entry_stops_the_replica_with_shard_and_index() {
    let (_dir, _store, shard) = fresh();
    let good = entry(1, &[Command::Write(write(1, vec![put("a", "1")]))]);
    let payload = ApplyPayload::Commands(Bytes::from_static(&[77, 1, 2]));
    let bad = ApplyEntry { position: position(2), payload };

    let error = shard.apply(&[good, bad]).unwrap_err();

    assert_eq!(
        error.to_string(),
        "shard 3: log entry 2 cannot be applied: commands of a log entry: command batch: \
         unknown format version 77; upgrade this node"
    );
    assert_eq!(shard.applied(), None);
    assert_eq!(dump(&shard), Default::default());
}

#[test]
fn a_damaged_record_stops_the_replica_with_shard_and_index() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1")]));
    let mut keys = Keys::new(SHARD);
    shard.inner.engine.db.put(keys.record(LWW, b"a"), b"\x01garbage").unwrap();

    let again = entry(2, &[Command::Write(write(2, vec![put("a", "2")]))]);
    let error = shard.apply(&[again]).unwrap_err();

    assert!(error.is_corruption());
    let message = error.to_string();
    assert!(message.contains("shard 3: log entry 2") && message.contains("record"), "{message}");
    assert!(shard.record(LWW, b"a").unwrap_err().is_corruption());
}

#[test]
fn a_damaged_table_file_is_an_error_that_names_the_file() {
    let (dir, store, shard) = fresh();
    for wall in 1..200 {
        run_write(&shard, write(wall, vec![put(&format!("key-{wall}"), vec![7; 500])]));
    }
    drop((store, shard));
    let tables = fs::read_dir(dir.path().join("db")).unwrap().map(|entry| entry.unwrap().path());
    let largest = tables
        .filter(|path| path.extension().is_some_and(|extension| extension == "sst"))
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    // In the data blocks, not in the footer: opening succeeds.
    for byte in bytes.iter_mut().take(3000).skip(200) {
        *byte ^= 0x5a;
    }
    fs::write(&largest, bytes).unwrap();

    let name = largest.file_name().unwrap().to_str().unwrap();
    let read_all = || -> Result<(), StorageError> {
        let store = crate::Store::open(dir.path(), crate::StoreConfig::default())?;
        let shard = store.shard(SHARD)?;
        shard.scan(LWW, &crate::ScanRange::default(), 1000, usize::MAX)?;
        shard.changes(LWW, LOCAL, 1, usize::MAX)?;
        Ok(())
    };
    let error = read_all().unwrap_err();
    assert!(error.is_corruption(), "{error}");
    assert!(error.to_string().contains(name), "{error}");
}

#[test]
fn a_repeated_request_answers_as_before_also_after_restart_and_is_applied_once() {
    let (dir, store, shard) = fresh();
    let request = |number| Some(RequestId { client: 9, number });
    let first = run_write(&shard, Write { request: request(5), ..write(1, vec![put("a", "1")]) });
    run_write(&shard, Write { request: request(8), ..write(2, vec![put("a", "2")]) });
    let again = Write { request: request(5), ..write(3, vec![put("a", "1")]) };
    assert_eq!(run_write(&shard, again.clone()), first);
    // Older than the newest one, but never seen.
    run_write(&shard, Write { request: request(7), ..write(4, vec![put("b", "4")]) });
    drop((store, shard));

    let (_store, shard) = open(dir.path());
    assert_eq!(run_write(&shard, again.clone()), first);
    assert_eq!(shard.frontier(LWW).get(LOCAL), 3);
    run(&shard, &[Command::ForgetRequests(vec![RequestId { client: 9, number: 5 }])]);
    assert_ne!(run_write(&shard, again), first);
    assert_eq!(shard.frontier(LWW).get(LOCAL), 4);
}

#[test]
fn a_request_of_another_region_is_answered_with_its_write_also_after_a_restart() {
    let (dir, store, shard) = fresh();
    let mut remote = MemoryState::default();
    let request = Some(RequestId { client: 9, number: 5 });
    let there = Write { request, actor: REMOTE, ..write(1, vec![put("a", "1"), put("b", "2")]) };
    let Ok(first) = execute(&mut remote, &Command::Write(there.clone()));
    let changes = remote.changes_above(LWW, &VersionVector::new());
    run(&shard, &[ingest(LWW, LOCAL, changes)]);

    let here = Write { actor: LOCAL, ..there };
    let dots = |outcome: &Outcome| match outcome {
        Outcome::Written(results) => results.iter().map(|it| (it.dot, it.time)).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(dots(&run_write(&shard, here.clone())), dots(&first));
    drop((store, shard));
    let (_store, shard) = open(dir.path());
    assert_eq!(dots(&run_write(&shard, here)), dots(&first));
    assert_eq!(shard.frontier(LWW).get(LOCAL), 0);
}

#[test]
fn commands_of_one_run_see_each_other() {
    let (_dir, _store, shard) = fresh();
    let request = RequestId { client: 1, number: 1 };
    let create = Write { request: Some(request), ..write(1, vec![put("a", "1")]) };
    let check = Check { key: Bytes::from_static(b"a"), condition: Condition::Absent };
    let create_again = Write { checks: vec![check], ..write(2, vec![put("a", "2")]) };

    let commands = [
        Command::Write(create.clone()),
        Command::Write(create_again),
        Command::Write(create),
        Command::ForgetRequests(vec![request]),
    ];
    let outcomes = shard.apply(&[entry(1, &commands[..1]), entry(2, &commands[1..])]).unwrap();

    assert!(matches!(outcomes[1][0], Outcome::ChecksFailed(_)));
    assert_eq!(outcomes[1][1], outcomes[0][0]);
    assert!(dump(&shard).requests.is_empty());
}

#[test]
fn watchers_learn_of_applied_entries_and_of_moved_frontiers() {
    let (_dir, _store, shard) = fresh();
    let (mut applied, mut frontiers) = (shard.watch_applied(), shard.watch_frontiers());

    shard.apply(&[ApplyEntry { position: position(1), payload: ApplyPayload::Blank }]).unwrap();
    assert_eq!(*applied.borrow_and_update(), 1);
    assert!(!frontiers.has_changed().unwrap());

    run_write(&shard, write(1, vec![put("a", "1")]));
    assert_eq!(*applied.borrow_and_update(), 2);
    assert!(frontiers.has_changed().unwrap());
    frontiers.mark_unchanged();

    let membership = ApplyPayload::Membership(Bytes::from_static(b"three"));
    shard.apply(&[ApplyEntry { position: position(3), payload: membership }]).unwrap();
    assert_eq!(shard.membership(), Some((position(3), Bytes::from_static(b"three"))));
    assert!(!frontiers.has_changed().unwrap());
}

#[test]
fn marks_of_forgotten_clients_are_dropped_and_no_request_is_applied_twice() {
    let (_dir, _store, shard) = fresh();
    shard.inner.applying.lock().marks_max = 4;
    let request = |client| RequestId { client, number: 1 };
    for client in 1..8 {
        let write = write(client, vec![put("a", "1")]);
        run_write(&shard, Write { request: Some(request(client)), ..write });
        run(&shard, &[Command::ForgetRequests((1..client).map(request).collect())]);
    }
    let last = Write { request: Some(request(7)), ..write(99, vec![put("a", "9")]) };
    run_write(&shard, last);

    assert_eq!(shard.frontier(LWW).get(LOCAL), 7);
    assert!(shard.inner.applying.lock().marks.len() < 7);
}
