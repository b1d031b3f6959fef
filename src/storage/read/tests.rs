//! Scans in both directions with their limits, old requests.

use super::*;
use crate::testing::*;
use proptest::prelude::*;
use tombolo_core::{Command, command::Write};

fn keys_of(page: &ScanPage) -> Vec<String> {
    page.records.iter().map(|(key, _)| String::from_utf8(key.to_vec()).unwrap()).collect()
}

fn range(start: &'static str, end: Option<&'static str>, reverse: bool) -> ScanRange {
    ScanRange { start: Bytes::from(start), end: end.map(Bytes::from), reverse }
}

/// Every page of a scan; also how many calls it took.
fn scan_all(shard: &ShardStore, range: &ScanRange, max_keys: usize) -> (Vec<Bytes>, usize) {
    let (mut range, mut keys, mut calls) = (range.clone(), Vec::new(), 0);
    loop {
        let page = shard.scan(LWW, &range, max_keys, usize::MAX).unwrap();
        assert!(page.records.len() <= max_keys);
        calls += 1;
        keys.extend(page.records.into_iter().map(|(key, _)| key));
        match page.next {
            Some(next) if range.reverse => range.end = Some(next),
            Some(next) => range.start = next,
            None => return (keys, calls),
        }
    }
}

#[test]
fn a_scan_is_ordered_bounded_and_resumes_in_both_directions() {
    let (_dir, _store, shard) = fresh();
    for key in ["d", "a", "c", "b", "e"] {
        run_write(&shard, write(1, vec![put(key, "value")]));
    }
    run_write(&shard, write(2, vec![delete("c")]));
    let other = Write { namespace: SIBLINGS, ..write(3, vec![put("b2", "other")]) };
    run_write(&shard, other);

    let page = shard.scan(LWW, &range("a", None, false), 2, usize::MAX).unwrap();
    assert_eq!((keys_of(&page), page.next), (vec!["a".into(), "b".into()], Some("d".into())));
    let page = shard.scan(LWW, &range("", None, true), 2, usize::MAX).unwrap();
    assert_eq!((keys_of(&page), page.next), (vec!["e".into(), "d".into()], Some("d".into())));
    let page = shard.scan(LWW, &range("", Some("d"), true), 9, usize::MAX).unwrap();
    assert_eq!((keys_of(&page), page.next), (vec!["b".into(), "a".into()], None));
    let page = shard.scan(LWW, &range("b", Some("e"), false), 9, usize::MAX).unwrap();
    assert_eq!((keys_of(&page), page.next), (vec!["b".into(), "d".into()], None));
    let page = shard.scan(LWW, &range("e", Some("b"), false), 9, usize::MAX).unwrap();
    assert_eq!(page, ScanPage::default());
    let page = shard.scan(LWW, &range("", None, false), 9, 1).unwrap();
    assert_eq!((keys_of(&page), page.next), (vec!["a".into()], Some("b".into())));
}

#[test]
fn a_scan_does_not_wade_through_tombstones() {
    let (_dir, _store, shard) = fresh();
    let count = 5000;
    let names: Vec<String> = (0..count).map(|at| format!("k{at:06}")).collect();
    let deletions: Vec<Command> = names
        .chunks(100)
        .map(|names| Command::Write(write(1, names.iter().map(|name| delete(name)).collect())))
        .collect();
    run(&shard, &deletions);
    run_write(&shard, write(2, vec![put("a", "first"), put("z", "last")]));

    for reverse in [false, true] {
        let (keys, calls) = scan_all(&shard, &range("", None, reverse), 100);
        let mut expected = vec!["a", "z"];
        if reverse {
            expected.reverse();
        }
        assert_eq!(keys, expected);
        assert_eq!(calls, 1);
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn pages_of_any_size_join_to_the_whole_range(
        keys in prop::collection::btree_map(prop::collection::vec(any::<u8>(), 1..3), any::<bool>(), 0..40),
        bounds in (prop::collection::vec(any::<u8>(), 0..2), prop::option::of(prop::collection::vec(any::<u8>(), 0..2))),
        max_keys in 1usize..5,
        reverse: bool,
    ) {
        let (_dir, _store, shard) = fresh();
        let operations = keys.iter().map(|(key, is_live)| {
            let template = if *is_live { put("", "v") } else { delete("") };
            tombolo_core::command::Operation { key: Bytes::from(key.clone()), ..template }
        });
        run_write(&shard, write(1, operations.collect()));
        let (start, end) = bounds;
        let inside = |key: &&Vec<u8>| start <= **key && end.as_ref().is_none_or(|end| *key < end);
        let mut expected: Vec<Bytes> = keys
            .iter()
            .filter(|(_, is_live)| **is_live)
            .map(|(key, _)| key)
            .filter(inside)
            .map(|key| Bytes::from(key.clone()))
            .collect();
        if reverse {
            expected.reverse();
        }
        let range = ScanRange { start: start.clone().into(), end: end.clone().map(Into::into), reverse };
        prop_assert_eq!(scan_all(&shard, &range, max_keys).0, expected);
    }
}

#[test]
fn records_of_several_keys_come_in_order() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1"), put("b", "2")]));
    let keys = ["b", "x", "a"].map(Bytes::from);
    let records = shard.records(LWW, &keys).unwrap();
    let values: Vec<bool> = records.iter().map(Option::is_some).collect();
    assert_eq!(values, [true, false, true]);
    assert_eq!(records[2], shard.record(LWW, b"a").unwrap());
}

#[test]
fn expired_requests_are_found_in_turns_and_fresh_ones_are_not() {
    let (_dir, _store, shard) = fresh();
    for number in 1..=10u64 {
        let request = Some(RequestId { client: number % 3, number });
        run_write(&shard, Write { request, ..write(number, vec![put("a", "1")]) });
    }
    let mut found = Vec::new();
    for _ in 0..6 {
        let some = shard.requests_to_forget(time(7), 99, 2).unwrap();
        run(&shard, &[Command::ForgetRequests(some.clone())]);
        found.extend(some);
    }
    let mut numbers: Vec<u64> = found.iter().map(|request| request.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    assert_eq!(shard.requests_to_forget(time(7), 99, 100).unwrap(), []);
    assert_eq!(shard.requests_to_forget(time(99), 99, 100).unwrap().len(), 4);
}

#[test]
fn of_each_client_the_latest_requests_are_kept_and_the_others_are_found() {
    let (_dir, _store, shard) = fresh();
    for (client, numbers) in [(1, 1..=9), (2, 4..=5), (3, 7..=12)] {
        for number in numbers {
            let request = Some(RequestId { client, number });
            run_write(&shard, Write { request, ..write(number, vec![put("a", "1")]) });
        }
    }
    let mut found = Vec::new();
    for _ in 0..9 {
        let some = shard.requests_to_forget(time(0), 3, 4).unwrap();
        assert!(some.len() <= 4);
        run(&shard, &[Command::ForgetRequests(some.clone())]);
        found.extend(some.iter().map(|request| (request.client, request.number)));
    }
    found.sort_unstable();
    let expected: Vec<(u64, u64)> =
        (1..=6).map(|number| (1, number)).chain((7..=9).map(|number| (3, number))).collect();
    assert_eq!(found, expected);
    let kept: Vec<u64> = dump(&shard).requests.keys().map(|request| request.number).collect();
    assert_eq!(kept, [7, 8, 9, 4, 5, 10, 11, 12]);
}

#[test]
fn a_page_has_tombstones_in_their_place_and_what_was_applied_at_its_moment() {
    let (_dir, _store, shard) = fresh();
    run_write(&shard, write(1, vec![put("a", "1"), put("b", "1"), put("c", "1"), put("d", "1")]));
    run_write(&shard, write(2, vec![delete("b"), delete("d")]));
    let page_of = |start: &str, end: Option<&str>, keys, bytes| {
        let end = end.map(str::as_bytes);
        shard.page(LWW, start.as_bytes(), end, keys, bytes).unwrap()
    };
    let keys_of = |page: &Page| -> Vec<(Bytes, bool)> {
        page.records.iter().map(|(key, record)| (key.clone(), record.is_dead())).collect()
    };
    let all = [("a", false), ("b", true), ("c", false), ("d", true)];
    let all = all.map(|(key, is_dead)| (Bytes::from(key), is_dead));
    let page = page_of("", None, 9, usize::MAX);
    assert_eq!((keys_of(&page), page.next.as_deref()), (all.to_vec(), None));
    let standing = shard.standing(LWW);
    assert!(page.is_exact && standing.is_exact && page.frontier == standing.frontier);
    assert!(shard.is_at(LWW, &page.frontier) && !shard.is_at(SIBLINGS, &page.frontier));

    let page = page_of("", None, 2, usize::MAX);
    assert_eq!((keys_of(&page), page.next.as_deref()), (all[..2].to_vec(), Some(&b"c"[..])));
    let page = page_of("b", Some("d"), 9, usize::MAX);
    assert_eq!((keys_of(&page), page.next), (all[1..3].to_vec(), None));
    let page = page_of("", None, 9, 1);
    assert_eq!((keys_of(&page), page.next.as_deref()), (all[..1].to_vec(), Some(&b"b"[..])));
    assert!(page_of("x", Some("b"), 9, 9).records.is_empty());
}
