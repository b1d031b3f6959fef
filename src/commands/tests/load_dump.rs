//! Loading and dumping: any bytes, any size, and what happens when it stops half-way.

#[path = "../../client/tests/fake/mod.rs"]
mod fake;
mod harness;

use fake::{Fault, Region, refusal};
use harness::line;
use std::fmt::Write as _;
use std::path::Path;
use tombolo_client::Code;
use tombolo_commands::Exit;

fn numbered(count: usize) -> String {
    (0..count).fold(String::new(), |mut text, n| {
        writeln!(text, "key-{n:05}\tvalue {n}").expect("written");
        text
    })
}

fn exists(path: &Path) -> bool {
    path.try_exists().expect("readable")
}

#[tokio::test]
async fn what_was_dumped_loads_to_the_same_dump_in_both_formats() {
    let region = Region::start(1).await;
    for n in 0..=255u8 {
        region.put("default", vec![n, b'\t', b'{'], vec![b'\n', n, b'\\']);
    }
    for format in ["jsonl", "tsv"] {
        let dump = line("dump --format").word(format).at(&region).await;
        assert_eq!(dump.exit, Exit::Ok, "{}", dump.err);
        let lines: Vec<&[u8]> = dump.out.split(|&byte| byte == b'\n').collect();
        assert_eq!(lines.len(), 257);

        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(format!("data.{format}"));
        std::fs::write(&file, &dump.out).expect("written");
        let load = line("load").word(&file).word("-n").word(format).at(&region).await;
        assert_eq!(load.exit, Exit::Ok, "{}", load.err);
        assert!(load.err.starts_with("256 records, "), "{}", load.err);
        assert_eq!(region.values(format), region.values("default"));
        let again = line("dump -n").word(format).word("--format").word(format).at(&region).await;
        assert_eq!(again.out, dump.out);
    }
}

#[tokio::test]
async fn a_dump_is_sorted_and_takes_the_newest_of_concurrent_values() {
    let region = Region::start(1).await;
    for key in ["b", "a\u{7f}", "a", "Z", "é"] {
        region.put("default", key, "old");
    }
    region.put_concurrent("default", "a", "new");
    let dump = line("dump --format tsv").at(&region).await;
    assert_eq!(String::from_utf8_lossy(&dump.out), "Z\told\na\tnew\na\\x7f\told\nb\told\né\told\n");
    assert!(dump.err.contains("1 keys have concurrent values"), "{}", dump.err);
    let some = line("dump --format tsv --prefix a").at(&region).await;
    assert_eq!(String::from_utf8_lossy(&some.out), "a\tnew\na\\x7f\told\n");

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("out.tsv");
    line("dump --format tsv").word(&file).at(&region).await;
    assert_eq!(std::fs::read(&file).expect("written"), dump.out);
}

#[tokio::test]
async fn an_interrupted_dump_goes_on_behind_its_last_whole_line() {
    let region = Region::start(1).await;
    for n in 0..30 {
        // Longer than what is read of a file's end at a time, now and then.
        let value = "v".repeat(if n % 7 == 0 { 70_000 } else { n });
        region.put("default", format!("k{n:02}"), value);
    }
    let dir = tempfile::tempdir().expect("a directory");
    for format in ["jsonl", "tsv"] {
        let dump = |file: &Path| line("dump --resume --format").word(format).word(file);
        let whole = line("dump --format").word(format).at(&region).await.out;
        let lines: Vec<usize> = whole
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'\n')
            .map(|(at, _)| at)
            .collect();
        let mut cuts = vec![0, 1, whole.len() - 1, whole.len()];
        cuts.extend(lines.iter().flat_map(|&at| [at, at + 1]).step_by(5));
        for cut in cuts {
            let file = dir.path().join(format!("{format}-{cut}"));
            std::fs::write(&file, &whole[..cut]).expect("written");
            let resumed = dump(&file).at(&region).await;
            assert_eq!(resumed.exit, Exit::Ok, "{}", resumed.err);
            assert!(std::fs::read(&file).expect("written") == whole, "{format} cut at {cut}");
        }
        let fresh = dir.path().join(format!("{format}-fresh"));
        assert_eq!(dump(&fresh).at(&region).await.exit, Exit::Ok);
        assert!(std::fs::read(&fresh).expect("written") == whole);
    }
}

#[tokio::test]
async fn a_dump_refuses_to_go_on_behind_something_else() {
    let region = Region::start(1).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("notes");
    std::fs::write(&file, "something else\n").expect("written");
    let refused = line("dump --resume").word(&file).at(&region).await;
    assert_eq!(refused.exit, Exit::Other);
    assert!(refused.err.contains("is --format the same?"), "{}", refused.err);
    std::fs::write(&file, "key\tvalue\n").expect("written");
    let refused = line("dump --resume --format tsv --prefix x").word(&file).at(&region).await;
    assert!(refused.err.contains("does not begin with --prefix"), "{}", refused.err);
    assert_eq!(std::fs::read(&file).expect("there"), b"key\tvalue\n");
    let refused = line("dump --resume").at(&region).await;
    assert_eq!(refused.exit, Exit::Usage);
}

#[tokio::test]
async fn a_dump_survives_broken_streams() {
    let region = Region::start(2).await;
    for n in 0..30 {
        region.put("default", format!("k{n:02}"), "v");
    }
    let whole = line("dump").at(&region).await;
    region.fail(None, "scan", Fault::BreakScan(3));
    region.fail(None, "scan", Fault::BreakScan(1));
    let broken = line("dump").at(&region).await;
    assert_eq!(broken.exit, Exit::Ok, "{}", broken.err);
    assert_eq!(broken.out, whole.out);
}

#[tokio::test]
async fn the_later_of_two_records_with_one_key_wins() {
    let region = Region::start(1).await;
    let text: String = (0..300).map(|n| format!("same\t{n}\nother-{n}\tx\n")).collect();
    let load = line("load - --concurrency 64").input(text).at(&region).await;
    assert_eq!(load.exit, Exit::Ok, "{}", load.err);
    let values = region.values("default");
    let same = values.iter().find(|(key, _)| key == "same").expect("loaded");
    assert_eq!(same.1, "299");
    assert_eq!(values.len(), 301);
}

#[tokio::test]
async fn a_malformed_record_is_named_by_file_and_line() {
    let region = Region::start(1).await;
    let load = line("load -").input("a\t1\n\nb\t2\nno tab here\nc\t3\n").at(&region).await;
    assert_eq!(load.exit, Exit::Other);
    assert!(
        load.err.contains("error: standard input:4: no TAB between key and value"),
        "{}",
        load.err
    );
    assert!(load.err.contains("the first 2 records are loaded"), "{}", load.err);
    assert_eq!(region.values("default").len(), 2);

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("data.jsonl");
    std::fs::write(&file, "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"b\"}\n").expect("written");
    let load = line("load").word(&file).at(&region).await;
    assert!(load.err.contains("data.jsonl:2: neither `value` nor `value_b64`"), "{}", load.err);
    let none = line("load /no/such/file").at(&region).await;
    assert_eq!(none.exit, Exit::Other);
    assert!(none.err.contains("/no/such/file: No such file"), "{}", none.err);
}

#[tokio::test]
async fn a_refused_record_stops_the_load_which_then_resumes_behind_what_is_acknowledged() {
    let region = Region::start(1).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("data.tsv");
    std::fs::write(&file, numbered(100)).expect("written");
    let kept = dir.path().join("data.tsv.tombolo-load");

    let full = refusal(Code::ResourceExhausted, "DISK_FULL", &[]);
    let load = line("load --concurrency 1").word(&file);
    // The first 20 go well: their faults answer as usual.
    for _ in 0..20 {
        region.fail(None, "put", Fault::BreakScan(0));
    }
    region.fail(None, "put", Fault::Refuse(full));
    let load = load.at(&region).await;
    assert_eq!(load.exit, Exit::Unavailable, "{}", load.err);
    assert!(load.err.contains("data.tsv:21: disk full (DISK_FULL)"), "{}", load.err);
    assert!(load.err.contains("the first 20 records are loaded; continue with --resume"));
    assert_eq!(
        std::fs::read_to_string(&kept).expect("kept"),
        "{\"records\":20,\"namespace\":\"default\"}"
    );

    let other = line("load --resume -n other").word(&file).at(&region).await;
    assert_eq!(other.exit, Exit::Usage, "{}", other.err);

    let before = region.calls("put").len();
    let load = line("load --resume -o json").word(&file).at(&region).await;
    assert_eq!(load.exit, Exit::Ok, "{}", load.err);
    let summary: serde_json::Value = serde_json::from_slice(&load.out).expect("JSON");
    assert_eq!(summary["records"], 80);
    assert_eq!(region.calls("put").len() - before, 80);
    assert_eq!(region.values("default").len(), 100);
    assert!(!exists(&kept), "a finished load leaves nothing behind");
}

#[tokio::test]
async fn an_interrupted_load_says_how_to_continue_and_does() {
    let region = Region::start(1).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("data.tsv");
    std::fs::write(&file, numbered(1500)).expect("written");
    let kept = dir.path().join("count");

    let state = region.state.clone();
    let interrupt = async move {
        while state.lock().applied < 50 {
            tokio::task::yield_now().await;
        }
    };
    let load = line("load --concurrency 8").word(&file).word("--resume-file").word(&kept);
    let load = load.interrupted_by(interrupt).at(&region).await;
    assert_eq!(load.exit, Exit::Interrupted, "{}", load.err);
    assert!(load.err.contains("records are loaded; continue with --resume-file"), "{}", load.err);
    let applied = region.state.lock().applied;
    assert!((50..1500).contains(&applied), "{applied}");

    let load = line("load").word(&file).word("--resume-file").word(&kept).at(&region).await;
    assert_eq!(load.exit, Exit::Ok, "{}", load.err);
    assert_eq!(region.values("default").len(), 1500);
    // Nothing is put twice: the interrupted load waited for what was in flight.
    assert_eq!(region.state.lock().applied, 1500);
    assert!(!exists(&kept));
}

#[tokio::test]
async fn a_load_rides_out_a_leader_that_moves() {
    let region = Region::start(3).await;
    for _ in 0..5 {
        let lost = refusal(Code::Unavailable, "OUTCOME_UNKNOWN", &[]);
        region.fail(None, "put", Fault::ApplyThen(lost));
    }
    let state = region.state.clone();
    let mover = tokio::spawn(async move {
        for leader in [2, 3, 1] {
            let from = state.lock().applied;
            while state.lock().applied < from + 100 {
                tokio::task::yield_now().await;
            }
            let mut state = state.lock();
            (state.leader, state.term) = (leader, state.term + 1);
        }
    });
    let load = line("load -").input(numbered(1000)).at(&region).await;
    assert_eq!(load.exit, Exit::Ok, "{}", load.err);
    mover.await.expect("moved");
    assert_eq!(region.values("default").len(), 1000);
    assert_eq!(region.state.lock().applied, 1000, "repeats are applied once");
}

#[tokio::test]
async fn options_that_make_no_sense_are_refused() {
    let region = Region::start(1).await;
    let rate = line("load - --rate 0").input("a\t1\n").at(&region).await;
    assert_eq!(rate.exit, Exit::Usage, "{}", rate.err);
    assert_eq!(line("load - --resume").at(&region).await.exit, Exit::Usage);
    let rated = line("load - --rate 500").input(numbered(20)).at(&region).await;
    assert_eq!(rated.exit, Exit::Ok);
    assert_eq!(region.values("default").len(), 20);
}
