//! What commands print and how they end, against a fake region.

#[path = "../../client/tests/fake/mod.rs"]
mod fake;
mod harness;

use clap::CommandFactory;
use clap::Parser;
use fake::{Fault, Region, refusal};
use harness::{Cli, Ran, line};
use insta::assert_snapshot;
use tombolo_client::proto::write::Action;
use tombolo_client::{Code, proto};
use tombolo_commands::Exit;
use tonic::Status;

#[tokio::test]
async fn put_get_and_delete_print_tables_on_a_terminal() {
    let region = Region::start(1).await;
    assert_snapshot!(line("put greeting hello").on_tty().at(&region).await.text(), @"
    DOT    TIME                      CONFLICT
    1.1:1  2023-11-14T22:13:21.000Z  no
    ");
    assert_snapshot!(line("get greeting").on_tty().at(&region).await.text(), @"
    KEY       VALUE  REGION  TIME                      DOT
    greeting  hello  us      2023-11-14T22:13:21.000Z  1.1:1
    ");
    assert_snapshot!(line("delete greeting").on_tty().at(&region).await.text(), @"
    DOT    TIME                      CONFLICT
    1.1:2  2023-11-14T22:13:22.000Z  no
    ");
}

#[tokio::test]
async fn json_has_the_shape_of_the_protocol() {
    let region = Region::start(1).await;
    assert_snapshot!(line("put greeting hello -o json").at(&region).await.text(), @r#"
    {
      "context": "Y29udGV4dC1vZi0x",
      "sessionToken": "Im/xzc0BAQABAQEBTr6aPod28iw=",
      "conflict": false,
      "dot": {
        "region": 1,
        "incarnation": 1,
        "seq": "1"
      },
      "writeTime": "2023-11-14T22:13:21.000Z",
      "hybridTime": "111411200065536000",
      "revision": {
        "shard": 0,
        "term": "1",
        "index": "1"
      }
    }
    "#);
    assert_snapshot!(line("get greeting -o json").at(&region).await.text(), @r#"
    {
      "key": "greeting",
      "versions": [
        {
          "dot": {
            "region": 1,
            "incarnation": 1,
            "seq": "1"
          },
          "value": {
            "data": "aGVsbG8="
          },
          "originRegion": "us",
          "writeTime": "2023-11-14T22:13:21.000Z",
          "hybridTime": "111411200065536000"
        }
      ],
      "context": "Y29udGV4dC1vZi0x",
      "sessionToken": "Im/xzc0BAQABAQEBTr6aPod28iw=",
      "revision": {
        "shard": 0,
        "term": "1",
        "index": "1"
      }
    }
    "#);
    region.put("default", &b"\xff\x00"[..], "bytes");
    assert_snapshot!(line("scan -o jsonl").at(&region).await.text(), @r#"
    {"key":"greeting","versions":[{"dot":{"region":1,"incarnation":1,"seq":"1"},"value":{"data":"aGVsbG8="},"originRegion":"us","writeTime":"2023-11-14T22:13:21.000Z","hybridTime":"111411200065536000"}],"context":""}
    {"keyBase64":"/wA=","versions":[{"dot":{"region":1,"incarnation":1,"seq":"2"},"value":{"data":"Ynl0ZXM="},"originRegion":"us","writeTime":"2023-11-14T22:13:22.000Z","hybridTime":"111411200131072000"}],"context":""}
    "#);
}

#[tokio::test]
async fn a_value_in_a_pipe_is_the_value_and_nothing_else() {
    let region = Region::start(1).await;
    let value: Vec<u8> = (0..=255).collect();
    let put = line("put bytes -").input(value.clone()).at(&region).await;
    assert_eq!(put.exit, Exit::Ok);
    assert_eq!(line("get bytes").at(&region).await.out, value);
    assert_eq!(line("get bytes -o raw").on_tty().at(&region).await.out, value);

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("value");
    std::fs::write(&file, b"from a file").expect("written");
    let put = line("put bytes").word(format!("@{}", file.display())).at(&region).await;
    assert_eq!(put.exit, Exit::Ok);
    assert_eq!(line("get bytes").at(&region).await.out, b"from a file");
}

#[tokio::test]
async fn several_keys_are_rows_of_one_table_or_lines_like_those_of_a_scan() {
    let region = Region::start(1).await;
    region.put("default", "a", "1");
    region.put("default", "b", "2");
    region.put_concurrent("default", "b", "3");
    region.state.lock().partial.insert("a".into());
    let some = line("get b none a gone").on_tty().at(&region).await;
    assert_eq!(some.exit, Exit::Absent);
    assert_snapshot!(String::from_utf8_lossy(&some.out), @"
    KEY   VALUE     REGION  TIME                      DOT
    b     2         us      2023-11-14T22:13:22.000Z  1.1:2
    b     3         us      2023-11-14T22:13:23.000Z  1.1:3
    none  (absent)
    a     1         us      2023-11-14T22:13:21.000Z  1.1:1
    gone  (absent)
    ");
    assert_snapshot!(some.err, @"
    a: there are more elements; a get of this key alone pages through them
    error: keys none, gone are absent
    ");
    assert_snapshot!(line("get a b").at(&region).await.text(), @r#"
    {"key":"a","versions":[{"dot":{"region":1,"incarnation":1,"seq":"1"},"value":{"data":"MQ=="},"originRegion":"us","writeTime":"2023-11-14T22:13:21.000Z","hybridTime":"111411200065536000"}],"context":"","partial":true}
    {"key":"b","versions":[{"dot":{"region":1,"incarnation":1,"seq":"2"},"value":{"data":"Mg=="},"originRegion":"us","writeTime":"2023-11-14T22:13:22.000Z","hybridTime":"111411200131072000"},{"dot":{"region":1,"incarnation":1,"seq":"3"},"value":{"data":"Mw=="},"originRegion":"us","writeTime":"2023-11-14T22:13:23.000Z","hybridTime":"111411200196608000"}],"context":""}
    "#);
    let document = line("get a none -o json").at(&region).await;
    assert_eq!(document.exit, Exit::Absent);
    let document: serde_json::Value = serde_json::from_slice(&document.out).expect("one document");
    assert_eq!(document["results"][1]["key"], "none");
    assert_eq!(document["results"][1]["versions"].as_array().map(Vec::len), Some(0));

    assert_eq!(line("get a b --one").at(&region).await.exit, Exit::Conflict);
    for flag in ["--field x", "--elements 3", "--elements-from AA==", "--element x", "-o raw"] {
        let refused = line(&format!("get a b {flag}")).at(&region).await;
        assert_eq!(refused.exit, Exit::Usage, "{flag}");
        assert!(refused.err.contains("get the keys one by one"), "{}", refused.err);
    }
    let batches = region.calls("batch_get");
    line("get a b --consistency local").at(&region).await;
    assert_ne!(region.calls("batch_get")[batches.len()].consistency, batches[0].consistency);
}

#[tokio::test]
async fn keys_are_written_in_the_encoding_asked_for() {
    let region = Region::start(1).await;
    for (word, encoding) in [("00ff5c", "hex"), ("AP9c", "base64")] {
        let put = line("put --key-encoding").word(encoding).word(word).word("v").at(&region).await;
        assert_eq!(put.exit, Exit::Ok);
        let listed = line("scan -o raw --key-encoding").word(encoding).at(&region).await.text();
        assert_eq!(listed.trim_end(), word);
    }
    assert_eq!(line("scan -o raw").at(&region).await.text(), "\\0\\xff\\\\\n");
    let bad = line("get xyz --key-encoding hex").at(&region).await;
    assert_eq!(bad.exit, Exit::Usage);
    assert_snapshot!(bad.err, @"error: key `xyz` is not hex: Odd number of digits");
}

#[tokio::test]
async fn a_scan_prints_ranges_in_every_format() {
    let region = Region::start(1).await;
    for key in ["a/1", "a/2", "a/3", "b/1"] {
        region.put("default", key, format!("value of {key}"));
    }
    region.put_concurrent("default", "a/2", "another");
    assert_snapshot!(line("scan a/").on_tty().at(&region).await.text(), @"
    KEY  VALUE         REGION  TIME                      DOT
    a/1  value of a/1  us      2023-11-14T22:13:21.000Z  1.1:1
    a/2  value of a/2  us      2023-11-14T22:13:22.000Z  1.1:2
    a/2  another       us      2023-11-14T22:13:25.000Z  1.1:5
    a/3  value of a/3  us      2023-11-14T22:13:23.000Z  1.1:3
    ");
    assert_snapshot!(line("scan --from a/2 --to b --keys-only --reverse").on_tty().at(&region).await.text(), @"
    KEY  REGION  TIME                      DOT
    a/3  us      2023-11-14T22:13:23.000Z  1.1:3
    a/2  us      2023-11-14T22:13:22.000Z  1.1:2
    a/2  us      2023-11-14T22:13:25.000Z  1.1:5
    ");
    assert_snapshot!(line("scan --limit 2 -o raw").at(&region).await.text(), @"
    a/1
    a/2
    ");
    let json = line("scan -o json --keys-only").at(&region).await.text();
    let parsed: serde_json::Value = serde_json::from_str(&json).expect("one document");
    assert_eq!(parsed["results"].as_array().map(Vec::len), Some(4));
    assert_snapshot!(line("scan nothing -o json").at(&region).await.text(), @r#"{"results":[]}"#);
    assert_eq!(line("scan nothing").on_tty().at(&region).await.text(), "");
}

#[tokio::test]
async fn a_commit_writes_all_or_says_which_check_failed() {
    let region = Region::start(1).await;
    let done =
        line("commit --check-absent {t}a --put {t}a=1 --put {t}b=2").on_tty().at(&region).await;
    assert_eq!(done.exit, Exit::Ok);
    assert_snapshot!(done.text(), @"
    KEY   WRITE  DOT    SUM
    {t}a  put    1.1:1
    {t}b  put    1.1:2
    ");

    let refused = line("commit --check-value {t}a=9 --check-absent {t}c --delete {t}b")
        .on_tty()
        .at(&region)
        .await;
    assert_eq!(refused.exit, Exit::CheckFailed);
    assert_snapshot!(String::from_utf8_lossy(&refused.out), @"
    FAILED CHECK  KEY   FOUND  DOT
    1             {t}a  1      1.1:1
    ");
    assert_snapshot!(refused.err, @"error: 1 of the commit's checks failed; nothing was written");

    let document = r#"{
        "checks": [{"key": "{t}a", "dot": "1.1:1"}, {"key": "{t}b", "value": "2"}],
        "writes": [{"key": "{t}a", "valueBase64": "AP8="}, {"key": "{t}b", "delete": true}]
    }"#;
    let done = line("commit - -o json").input(document).at(&region).await;
    assert_eq!(done.exit, Exit::Ok);
    assert_snapshot!(done.text(), @r#"
    {
      "committed": true,
      "failedChecks": [],
      "results": [
        {
          "context": "Y29udGV4dC1vZi0z",
          "conflict": false,
          "dot": {
            "region": 1,
            "incarnation": 1,
            "seq": "3"
          },
          "hybridTime": "111411200196608000"
        },
        {
          "context": "Y29udGV4dC1vZi00",
          "conflict": false,
          "dot": {
            "region": 1,
            "incarnation": 1,
            "seq": "4"
          },
          "hybridTime": "111411200262144000"
        }
      ],
      "sessionToken": ""
    }
    "#);
    assert_eq!(region.values("default"), [("{t}a".into(), b"\x00\xff"[..].to_vec().into())]);

    for nonsense in [
        "{}",
        "[",
        r#"{"checks":[{"key":"a"}]}"#,
        r#"{"checks":[{"key":"a","absent":true,"value":"x"}]}"#,
        r#"{"writes":[{"key":"a","delete":true,"value":"x"}]}"#,
        r#"{"writes":[{"key":"a","value":"x","ttl":1}]}"#,
        r#"{"writes":[{"key":"a","value":"x","ttl":"soon"}]}"#,
        r#"{"writes":[{"key":"a","delete":true,"ttl":"9s"}]}"#,
        r#"{"checks":[{"key":"a","context":"***"}]}"#,
        r#"{"checks":[{"key":"a","absent":true,"context":"AA=="}]}"#,
        r#"{"writes":[{"key":"a","value":"x","mutate":["add=1"]}]}"#,
        r#"{"writes":[{"key":"a","mutate":["add=1"],"ttl":"9s"}]}"#,
        r#"{"writes":[{"key":"a","mutate":["grow=1"]}]}"#,
        r#"{"writes":[{"key":"a","value":"x","context":"***"}]}"#,
    ] {
        let bad = line("commit -").input(nonsense).at(&region).await;
        assert_eq!(bad.exit, Exit::Usage, "{nonsense}: {}", bad.err);
    }
}

#[tokio::test]
async fn a_commit_takes_typed_operations_and_contexts_in_both_forms() {
    let region = Region::start(1).await;
    let flags =
        line("commit --put {t}a=1 --delete {t}b --mutate {t}c=add=2 --mutate {t}d=x/y:assign=@z")
            .word("--mutate")
            .word("{t}c=add=3")
            .word("--context-token")
            .word("{t}c=c2Vlbg==")
            .on_tty()
            .at(&region)
            .await;
    assert_snapshot!(flags.text(), @"
    KEY   WRITE   DOT    SUM
    {t}a  put     1.1:1
    {t}b  delete  1.1:2
    {t}c  mutate  1.1:3  3
    {t}d  mutate  1.1:4
    ");
    let document = r#"{"writes": [
        {"key": "{t}a", "value": "1"},
        {"key": "{t}b", "delete": true},
        {"key": "{t}c", "mutate": ["add=2", "add=3"], "context": "c2Vlbg=="},
        {"key": "{t}d", "mutate": ["x/y:assign=@z"]}
    ]}"#;
    let json = line("commit -").input(document).at(&region).await;
    assert!(json.text().contains(r#""sum":"3""#), "{json:?}");

    let commits = region.state.lock().commits.clone();
    assert_eq!(commits[0].writes, commits[1].writes);
    let counter = &commits[0].writes[2];
    assert_eq!(counter.context, "seen");
    let Some(Action::Mutate(mutation)) = &counter.action else { panic!("{counter:?}") };
    assert_eq!(mutation.operations.len(), 2);
    let stray = line("commit --put a=1 --context-token b=c2Vlbg==").at(&region).await;
    assert_eq!(stray.exit, Exit::Usage);
    assert_snapshot!(stray.err, @"error: --context-token: the commit does not write `b`");
}

#[tokio::test]
async fn a_write_of_unknown_outcome_says_how_to_learn_it() {
    let region = Region::start(1).await;
    for (method, command) in [
        ("put", "put k v"),
        ("delete", "delete k"),
        ("mutate", "mutate k add=1"),
        ("commit", "commit --put k=v"),
    ] {
        region.fail(None, method, Fault::ApplyThen(Status::internal("disk")));
        let lost = line(command).at(&region).await;
        let id = region.calls(method)[0].request_id.expect("an id");
        let repeat = format!("--request-id {}-{}", id.client, id.number);
        assert_eq!(
            lost.err,
            format!(
                "error: disk; whether the write was applied is unknown; repeat the command with \
                 {repeat} to learn it\n"
            )
        );
        let known = line(&format!("{command} {repeat}")).at(&region).await;
        assert_eq!(known.exit, Exit::Ok, "{}", known.err);
        assert_eq!(region.calls(method)[1].request_id, Some(id));
    }
    region.fail(None, "put", Fault::ApplyThen(Status::internal("disk")));
    let lost = line("put k v --request-id 4711-3 -o json").at(&region).await;
    assert_snapshot!(lost.err, @r#"{"code":"INTERNAL","reason":"","message":"disk","details":{"outcome":"unknown","request_id":"4711-3"}}"#);
    for bad in ["4711", "4711-", "-1", "a-1", "4711-1-1"] {
        let parsed = Cli::try_parse_from(["tombolo", "delete", "k", "--request-id", bad]);
        assert!(parsed.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_commit_checks_that_nothing_was_written_since_a_read() {
    let region = Region::start(1).await;
    let put = line("commit --check-context k= --put k=1 --ttl 1h").on_tty().at(&region).await;
    assert_eq!(put.exit, Exit::Ok, "{}", put.err);
    // base64 of `context-of-1`.
    let current = line("commit --check-context k=Y29udGV4dC1vZi0x --put k=2").at(&region).await;
    assert_eq!(current.exit, Exit::Ok, "{}", current.err);
    let late = line("commit --check-context k=Y29udGV4dC1vZi0x --put k=3").at(&region).await;
    assert_eq!(late.exit, Exit::CheckFailed);
    let document = r#"{
        "checks": [{"key": "k", "context": "Y29udGV4dC1vZi0y"}],
        "writes": [{"key": "k", "value": "4", "ttl": "90s"}]
    }"#;
    assert_eq!(line("commit -").input(document).at(&region).await.exit, Exit::Ok);
    assert_eq!(region.values("default"), [("k".into(), "4".into())]);
}

#[tokio::test]
async fn await_replication_says_who_has_it_or_who_is_missing() {
    let region = Region::start(1).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("session");
    line("put k v --session-file").word(&file).at(&region).await;
    let has = line("await-replication --session-file").word(&file).on_tty().at(&region).await;
    assert_snapshot!(has.text(), @"
    REGION  EVENTS LACKING
    eu      0
    ap      3
    ");
    assert_eq!(region.calls("await_replication")[0].token, fake::token(b"k", 1));
    let raw = line("await-replication -o raw --session-file").word(&file).at(&region).await;
    assert_eq!(raw.text(), "eu\n");

    let missing = [("missing", "ap"), ("behind", "ap=3")];
    let status = refusal(Code::DeadlineExceeded, "REPLICATION_PENDING", &missing);
    region.fail(None, "await_replication", Fault::Refuse(status));
    let late = line("await-replication -o json --session-file").word(&file).at(&region).await;
    assert_eq!(late.exit, Exit::Unavailable);
    let error: serde_json::Value = serde_json::from_str(&late.err).expect("an object");
    assert_eq!(error["details"]["missing"], "ap");
    assert_eq!(line("await-replication").at(&region).await.exit, Exit::Usage, "of which session?");
}

#[tokio::test]
async fn a_session_file_knows_a_write_whose_acknowledgements_are_missing() {
    let region = Region::start(1).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("session");
    // The token of the first write of `greeting`.
    let metadata = [("dot", "1.1:1"), ("session_token", "Im/xzc0BAQABAQEBTr6aPod28iw=")];
    let status = refusal(Code::DeadlineExceeded, "ACK_REGIONS_PENDING", &metadata);
    region.fail(None, "put", Fault::ApplyThen(status));
    let put = line("put greeting v --ack-regions 2 --session-file").word(&file).at(&region).await;
    assert_eq!(put.exit, Exit::Unavailable);
    line("await-replication --session-file").word(&file).at(&region).await;
    assert_eq!(region.calls("await_replication")[0].token, fake::token(b"greeting", 1));

    let refused = refusal(Code::InvalidArgument, "KEY_TOO_LONG", &[]);
    region.fail(None, "put", Fault::Refuse(refused));
    let other = dir.path().join("other");
    line("put k v --session-file").word(&other).at(&region).await;
    assert!(!other.exists(), "nothing was seen");
}

#[tokio::test]
async fn a_session_file_carries_what_was_seen_from_command_to_command() {
    let region = Region::start(1).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("session");
    let put = line("put k v --session-file").word(&file).at(&region).await;
    assert_eq!(put.exit, Exit::Ok);
    line("get k --session-file").word(&file).at(&region).await;
    let gets = region.calls("get");
    assert_eq!(gets[0].token, fake::token(b"k", 1));
    let level = gets[0].consistency.and_then(|it| it.level);
    assert_eq!(level, Some(proto::read_consistency::Level::Causal(proto::Causal {})));

    let kept = std::fs::read_to_string(&file).expect("kept");
    line("get k --consistency stale:10s --token").word(kept.trim()).at(&region).await;
    assert_eq!(region.calls("get")[1].token, fake::token(b"k", 1));
    assert_eq!(line("get k --token ***").at(&region).await.exit, Exit::Usage);
}

#[tokio::test]
async fn every_ending_has_its_own_exit_code() {
    let region = Region::start(1).await;
    region.put("default", "k", "1");
    region.put_concurrent("default", "k", "2");
    let ends = async |text: &str| line(text).at(&region).await.exit.code();

    assert_eq!(ends("get k").await, 0);
    assert_eq!(ends("put k @/no/such/file").await, 1);
    assert_eq!(ends("get k --context nowhere").await, 2);
    assert_eq!(ends("get absent").await, 3);
    assert_eq!(ends("commit --check-absent k --put k=3").await, 4);
    assert_eq!(ends("ctl namespace create twice").await, 0);
    assert_eq!(ends("ctl namespace create twice").await, 4);
    assert_eq!(ends("get k --one").await, 5);
    assert_eq!(line("get k -e 127.0.0.1:1").run().await.exit.code(), 6);
    region.fail(None, "get", Fault::Hang);
    assert_eq!(ends("get k --timeout 50ms").await, 6);
    let denied = refusal(Code::PermissionDenied, "NAMESPACE_DENIED", &[]);
    region.fail(None, "get", Fault::Refuse(denied));
    assert_eq!(ends("get k").await, 7);
    assert_eq!(ends("ctl status").await, 0);
    assert_eq!(ends("ctl status --fail").await, 8);
    region.fail(None, "get", Fault::Hang);
    let interrupted = line("get k").interrupted_by(async {}).at(&region).await;
    assert_eq!(interrupted.exit.code(), 130);
    assert_eq!(Cli::try_parse_from(["tombolo", "get"]).err().map(|it| it.exit_code()), Some(2));
}

#[tokio::test]
async fn errors_are_text_or_where_asked_json() {
    let region = Region::start(1).await;
    let refuse = || {
        let metadata = [("limit", "4096"), ("size", "5000")];
        let status = refusal(Code::InvalidArgument, "KEY_TOO_LONG", &metadata);
        region.fail(None, "put", Fault::Refuse(status));
    };
    refuse();
    assert_snapshot!(line("put k v").at(&region).await.err, @"error: key too long (KEY_TOO_LONG)");
    refuse();
    assert_snapshot!(line("put k v -o json").at(&region).await.err, @r#"{"code":"INVALID_ARGUMENT","reason":"KEY_TOO_LONG","message":"key too long","details":{"limit":"4096","size":"5000"}}"#);
    let status = refusal(Code::DeadlineExceeded, "ACK_REGIONS_PENDING", &[("dot", "1.1:9")]);
    region.fail(None, "put", Fault::ApplyThen(status));
    assert_snapshot!(line("put k v -o json --ack-regions 2").at(&region).await.err, @r#"{"code":"DEADLINE_EXCEEDED","reason":"ACK_REGIONS_PENDING","message":"ack regions pending","details":{"dot":"1.1:9"}}"#);
    assert_snapshot!(line("get absent -o jsonl").at(&region).await.err, @r#"{"code":"NOT_FOUND","reason":"KEY_ABSENT","message":"key absent is absent","details":{}}"#);
}

#[tokio::test]
async fn flags_beat_the_environment_and_the_environment_beats_the_file() {
    let [flag, named, env, env_named, current] = [1, 2, 3, 4, 5].map(|_| Region::start(1));
    let (flag, named, env, env_named, current) = tokio::join!(flag, named, env, env_named, current);
    let address = |region: &Region| region.addresses[0].clone();
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("contexts.toml");
    let text = format!(
        "current = \"current\"\n\
         [contexts.current]\nendpoints = [\"{}\"]\n\
         [contexts.named]\nendpoints = [\"{}\"]\nnamespace = \"carts\"\n\
         [contexts.env-named]\nendpoints = [\"{}\"]\n",
        address(&current),
        address(&named),
        address(&env_named),
    );
    std::fs::write(&file, text).expect("written");
    let run = async |text: &str, vars: &[(&str, String)]| {
        let start = line(text).env("TOMBOLO_CONTEXTS_FILE", file.display().to_string());
        let start = vars.iter().fold(start, |it, (name, value)| it.env(name, value));
        let ran = start.run().await;
        assert_eq!(ran.exit, Exit::Ok, "{}", ran.err);
    };
    let endpoints = ("TOMBOLO_ENDPOINTS", address(&env));
    let context = ("TOMBOLO_CONTEXT", "env-named".to_owned());

    let with_flag = format!("put k flag --context named -e {}", address(&flag));
    run(&with_flag, &[endpoints.clone(), context.clone()]).await;
    run("put k named --context named", &[endpoints.clone(), context.clone()]).await;
    run("put k other --context named -n other", &[]).await;
    run("put k env", &[endpoints, context.clone()]).await;
    run("put k env-named", &[context]).await;
    run("put k current", &[]).await;

    for (region, namespace, value) in [
        (&flag, "default", "flag"),
        (&named, "carts", "named"),
        (&named, "other", "other"),
        (&env, "default", "env"),
        (&env_named, "default", "env-named"),
        (&current, "default", "current"),
    ] {
        assert_eq!(region.values(namespace), [("k".into(), value.as_bytes().to_vec().into())]);
    }

    let missing = line("get k --context nowhere")
        .env("TOMBOLO_CONTEXTS_FILE", file.display().to_string())
        .run()
        .await;
    assert_eq!(missing.exit, Exit::Usage);
    assert!(missing.err.contains("no context `nowhere`"), "{}", missing.err);
    assert!(missing.err.contains("current, env-named, named"), "{}", missing.err);
    std::fs::write(&file, "[contexts.a]\nendpoint = 1\n").expect("written");
    let wrong = line("get k").env("TOMBOLO_CONTEXTS_FILE", file.display().to_string()).run().await;
    assert_eq!(wrong.exit, Exit::Usage);
    assert!(wrong.err.contains("contexts.toml: TOML parse error at line 2"), "{}", wrong.err);
}

#[tokio::test]
async fn the_contexts_file_is_found_in_the_home_directory() {
    let region = Region::start(1).await;
    let home = tempfile::tempdir().expect("a directory");
    let dir = home.path().join(".config/tombolo");
    std::fs::create_dir_all(&dir).expect("created");
    let text = format!("[contexts.here]\nendpoints = [\"{}\"]\n", region.addresses[0]);
    std::fs::write(dir.join("contexts.toml"), text).expect("written");
    let ran = line("put k v --context here").env("HOME", home.path().display().to_string());
    assert_eq!(ran.run().await.exit, Exit::Ok);
}

fn add_links(region: &Region) {
    let link = |shard: u32, phase: proto::LinkPhase, lag_seconds: f64, error: &str| proto::Link {
        peer_region: "eu".into(),
        namespace: "default".into(),
        shard,
        node_id: 1,
        phase: phase.into(),
        lag_events: 3,
        lag_seconds,
        unacknowledged_events: 5,
        last_error: error.into(),
        received_events: 100,
        received_bytes: 4096,
        ..Default::default()
    };
    region.state.lock().links = vec![
        link(0, proto::LinkPhase::Streaming, 0.035, ""),
        link(1, proto::LinkPhase::Streaming, 0.0, ""),
        link(2, proto::LinkPhase::Blocked, 252.0, "connection refused"),
    ];
}

#[tokio::test]
async fn status_shows_what_is_wrong_at_a_glance() {
    let region = Region::start(2).await;
    add_links(&region);
    assert_snapshot!(line("ctl status").on_tty().at(&region).await.text(), @"
    cluster fake, region us, 4 shards, version 0.1.0: 1 problem

    NODE  ADDRESS          STATE  LEADS  SEEN  CLOCK   VERSION
    1     127.0.0.1:NODE1  up     4      0s    +0.0ms  0.1.0
    2     127.0.0.1:NODE2  up     0      0s    +0.0ms  0.1.0

    REGION  NUMBER        STATE     LAG    LINK ADDRESSES
    us      1       here  up               127.0.0.1:7103
    eu      2             degraded  12.5s  127.0.0.1:7203

    LINKS WITH  PHASES                  LAG     BEHIND  UNACKED  LAST ERROR
    eu          1 blocked, 2 streaming  4m 12s  9       15       connection refused

    ! region eu is degraded
    ");
    let json = line("ctl status -o json").at(&region).await.text();
    let status: serde_json::Value = serde_json::from_str(&json).expect("one document");
    assert_eq!(status["healthy"], false);
    assert_eq!(status["problems"][0], "region eu is degraded");
    assert_eq!(status["links"].as_array().map(Vec::len), Some(3));
    let failed = line("ctl status --fail").on_tty().at(&region).await;
    assert_eq!(failed.exit, Exit::Unhealthy);
    assert_snapshot!(failed.err, @"error: the cluster is not healthy");
}

#[tokio::test]
async fn control_lists_are_tables_and_json() {
    let region = Region::start(1).await;
    add_links(&region);
    assert_snapshot!(line("ctl region list").on_tty().at(&region).await.text(), @"
    REGION  NUMBER        STATE     LAG    LINK ADDRESSES
    us      1       here  up               127.0.0.1:7103
    eu      2             degraded  12.5s  127.0.0.1:7203
    ");
    assert_snapshot!(line("ctl region list").at(&region).await.text(), @r#"
    {"name":"us","number":1,"local":true,"linkAddresses":["127.0.0.1:7103"],"membership":"MEMBERSHIP_ACTIVE","incarnation":1,"state":"REGION_STATE_UP","lagSeconds":0.0,"shardsActive":4,"shardsWithLeader":4,"nodesUp":1,"nodes":1,"clockAheadSeconds":0.0,"clockRejectedChanges":"0"}
    {"name":"eu","number":2,"local":false,"linkAddresses":["127.0.0.1:7203"],"membership":"MEMBERSHIP_ACTIVE","incarnation":1,"state":"REGION_STATE_DEGRADED","lagSeconds":12.5,"shardsActive":0,"shardsWithLeader":0,"nodesUp":0,"nodes":0,"clockAheadSeconds":0.0,"clockRejectedChanges":"0"}
    "#);
    assert_snapshot!(line("ctl region add ap --number 3 --link a:1,b:2").on_tty().at(&region).await.text(), @"
    REGION  NUMBER     STATE    LAG  LINK ADDRESSES
    ap      3          joining  0s   a:1,b:2
    ");
    let refused = line("ctl region add eu").at(&region).await;
    assert!(refused.exit != Exit::Ok && refused.err.contains("REGION_INVALID"), "{}", refused.err);
    for (command, state) in [("fence", "fenced"), ("remove", "removed"), ("recover", "recovering")]
    {
        let said = line(&format!("ctl region {command} eu")).on_tty().at(&region).await.text();
        assert!(said.contains(state), "{said}");
    }
    assert_snapshot!(line("ctl region review").on_tty().at(&region).await.text(), @"
    NAMESPACE  KEY   DOT    VALUE
    default    cart  2.1:7  v
    default    list  2.1:7  (deleted)
    ");
    assert_snapshot!(line("ctl region review --dismiss").at(&region).await.text().lines().next().expect("a line"), @r#"{"namespace":"default","key":"cart","dot":"2.1:7","isDelete":false,"data":"v"}"#);
    let link = region.state.lock().links[1].clone();
    region.state.lock().links[1] = proto::Link {
        phase: proto::LinkPhase::Repairing.into(),
        repair: Some(proto::RepairProgress {
            share: 0.429,
            seconds_left: 75.2,
            ..Default::default()
        }),
        ..link
    };
    assert_snapshot!(line("ctl link list").on_tty().at(&region).await.text(), @"
    PEER  NAMESPACE  SHARD  NODE  PHASE      BEHIND  LAG     UNACKED  REPAIR            ERROR
    eu    default    0      1     streaming  3       35ms    5
    eu    default    1      1     repairing  3       0s      5        42%, 1m 15s left
    eu    default    2      1     blocked    3       4m 12s  5                          connection refused
    ");
    assert_snapshot!(line("ctl link list").at(&region).await.text().lines().next().expect("a line"), @r#"{"peerRegion":"eu","namespace":"default","shard":0,"nodeId":"1","phase":"LINK_PHASE_STREAMING","lagEvents":"3","lagSeconds":0.035,"unacknowledgedEvents":"5","lastError":"","receivedEvents":"100","receivedBytes":"4096","unacknowledgedBytes":"0"}"#);
    let here = region.addresses[0].clone();
    let verify = line("ctl verify").word(&here).word(&here).on_tty().at(&region).await;
    assert_eq!(verify.exit, Exit::Ok, "{}", verify.err);
    assert_snapshot!(verify.text(), @"
    SHARD  VERDICT  ONE               OTHER
    0      equal    0000000000000abc  0000000000000abc
    1      equal    0000000000000abd  0000000000000abd
    2      equal    0000000000000abe  0000000000000abe
    3      equal    0000000000000abf  0000000000000abf
    ");
    let repair = line("ctl repair eu default").on_tty().at(&region).await;
    assert_snapshot!(repair.err, @"4 links repair; `ctl link list` shows how far they are");
    assert_snapshot!(line("ctl at-risk --list 5").on_tty().at(&region).await.text(), @"
    NAMESPACE  SHARD  NODE  WRITES  NOT HEARD OF  KEYS
    default    1      1     3       ap            cart
    ");
    assert_snapshot!(line("ctl at-risk --list 5").at(&region).await.text(), @r#"{"namespace":"default","shard":1,"nodeId":"1","count":"3","unheardRegions":["ap"],"writes":[{"key":"cart","dot":"1.1:7","isDelete":false}]}"#);
    assert_snapshot!(line("ctl tombstones").on_tty().at(&region).await.text(), @"
    NAMESPACE  SHARD  NODE  TOMBSTONES  WAITS FOR
    default    0      1     7           ap,eu
    default    1      1     3           eu
    ");
    assert_snapshot!(line("ctl tombstones default").at(&region).await.text().lines().next().expect("a line"), @r#"{"namespace":"default","shard":0,"nodeId":"1","count":"7","waitsForRegions":["ap","eu"]}"#);
    assert_snapshot!(line("ctl namespace create carts --rule siblings").on_tty().at(&region).await.text(), @"
    NAME   ID  RULE      CREATED               ETAG
    carts  2   siblings  2023-11-14T22:13:20Z  e1
    ");
    assert_snapshot!(line("ctl namespace list -o json").at(&region).await.text(), @r#"
    {
      "namespaces": [
        {
          "name": "carts",
          "id": 2,
          "rule": "RULE_SIBLINGS",
          "createTime": "2023-11-14T22:13:20Z",
          "etag": "e1"
        }
      ]
    }
    "#);
    assert_snapshot!(line("ctl namespace get carts").at(&region).await.text(), @r#"{"name":"carts","id":2,"rule":"RULE_SIBLINGS","createTime":"2023-11-14T22:13:20Z","etag":"e1"}"#);
    assert_eq!(line("ctl namespace delete carts").at(&region).await.exit, Exit::Ok);
    assert_snapshot!(line("ctl namespace get carts").at(&region).await.err, @"error: namespace not found (NAMESPACE_NOT_FOUND)");
}

#[test]
fn help_is_written_down() {
    let help = |name: &str| {
        let mut root = Cli::command().term_width(100);
        root.build();
        let command = match name {
            "" => &mut root,
            name => root.find_subcommand_mut(name).expect("a command"),
        };
        command.render_help().to_string()
    };
    assert_snapshot!(help(""), @"
    A command that needs no more than a connection

    Usage: tombolo <COMMAND>

    Commands:
      put                Stores a value
      get                Reads a key, or several
      delete             Deletes a key
      scan               Lists keys in byte order
      mutate             Applies typed operations to a key, all or none
      watch              Follows changes, one line an event, until interrupted
      commit             Applies several writes to keys of one shard, all or none, if all checks hold
      await-replication  Waits until other regions have what a session has seen, its writes included
      load               Puts the records of a file, one a line
      dump               Writes all records, one a line, sorted by key
      ctl                Looks after a cluster
      completions        Prints completions for a shell, to be sourced or put where it looks for them
      version            Prints the version
      help               Print this message or the help of the given subcommand(s)

    Options:
      -h, --help  Print help
    ");
    assert_snapshot!(help("get"), @r#"
    Reads a key, or several

    Usage: tombolo get [OPTIONS] <KEY>...

    Arguments:
      <KEY>...  One key, or several

    Options:
          --consistency <LEVEL>    linearizable, causal, local, or stale:DURATION [default: causal in a
                                   session, else linearizable]
          --one                    Fail with code 5 if concurrent writes left several values
          --field <PATH>           Only this field of a map, or all under it: names with / between them
          --elements <N>           At most this many elements of a set or map [default: 0]
          --elements-from <TOKEN>  Go on where the elements of an earlier answer ended (base64,
                                   nextElementToken of -o json)
          --element <ELEMENT>      Whether a set has this element: show only those it has
          --session-file <FILE>    Continue the session kept in FILE, and keep it there; created if
                                   missing
          --token <TOKEN>          Continue the session of this token, base64 as printed by -o json
      -h, --help                   Print help (see more with '--help')

    Connection:
      -e, --endpoint <ADDRESS>  Nodes of one region, host:port; repeat or separate by commas [env:
                                TOMBOLO_ENDPOINTS]
          --context <NAME>      A named connection of the contexts file [env: TOMBOLO_CONTEXT]
      -n, --namespace <NAME>    Namespace of the keys [default: the context's, else "default"]
          --timeout <DURATION>  Bounds each call with its retries [default: 5s; load and dump: 30s]

    Output:
      -o, --output <FORMAT>          How to print [default: table on a terminal, else jsonl] [possible
                                     values: table, json, jsonl, raw]
          --key-encoding <ENCODING>  How keys are written on the command line and in output [default:
                                     utf8] [possible values: utf8, hex, base64]
    "#);
    assert_snapshot!(help("load"), @r#"
    Puts the records of a file, one a line

    Usage: tombolo load [OPTIONS] <FILE>

    Arguments:
      <FILE>  What to load; - is standard input

    Options:
          --format <FORMAT>     Line format; auto goes by the file's name, then by its first line
                                [default: auto] [possible values: auto, jsonl, tsv]
          --concurrency <N>     Records in flight at a time [default: 64]
          --resume              Skip the leading records that an earlier run has loaded, and keep count
                                for the next
          --resume-file <FILE>  Where the count is kept [default: FILE.tombolo-load]; implies --resume
          --rate <N>            At most this many records a second
      -h, --help                Print help (see more with '--help')

    Connection:
      -e, --endpoint <ADDRESS>  Nodes of one region, host:port; repeat or separate by commas [env:
                                TOMBOLO_ENDPOINTS]
          --context <NAME>      A named connection of the contexts file [env: TOMBOLO_CONTEXT]
      -n, --namespace <NAME>    Namespace of the keys [default: the context's, else "default"]
          --timeout <DURATION>  Bounds each call with its retries [default: 5s; load and dump: 30s]

    Output:
      -o, --output <FORMAT>          How to print [default: table on a terminal, else jsonl] [possible
                                     values: table, json, jsonl, raw]
          --key-encoding <ENCODING>  How keys are written on the command line and in output [default:
                                     utf8] [possible values: utf8, hex, base64]
    "#);
    Cli::command().debug_assert();
}

/// The words of an example, from `tombolo` to the end of the command.
fn words_of(example: &str) -> Vec<String> {
    let start = example.find("tombolo").expect("a command of this program");
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in example[start..].chars() {
        match (c, quote) {
            ('|' | '<' | '>', None) => break,
            (' ', None) => words.push(String::new()),
            ('"' | '\'', None) => quote = Some(c),
            _ if quote == Some(c) => quote = None,
            _ => words.last_mut().expect("one").push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn check_examples(command: &clap::Command, path: &str) {
    let path = format!("{path} {}", command.get_name());
    command.get_subcommands().for_each(|command| check_examples(command, &path));
    if command.has_subcommands() {
        return;
    }
    let help = command.get_after_long_help().expect(&path).to_string();
    let examples: Vec<&str> = help.lines().filter(|line| line.starts_with("  ")).collect();
    assert!(!examples.is_empty(), "{path}");
    for example in examples {
        assert!(example.contains(path.trim()), "an example of `{path}`: {example}");
        let parsed = Cli::try_parse_from(words_of(example));
        assert!(parsed.is_ok(), "{example}: {:?}", parsed.err());
    }
}

#[test]
fn every_command_has_examples_and_understands_them() {
    check_examples(&Cli::command(), "");
}

#[tokio::test]
async fn completions_and_version_need_no_cluster() {
    let bash: Ran = line("completions bash").run().await;
    assert_eq!(bash.exit, Exit::Ok);
    assert!(bash.text().contains("--resume-file"));
    assert_eq!(line("version").run().await.text(), "tombolo 0.1.0\n");
    assert_eq!(
        line("version -o json").run().await.text(),
        "{\n  \"name\": \"tombolo\",\n  \"version\": \"0.1.0\"\n}\n"
    );
}

#[tokio::test]
async fn conflicts_are_listed_shown_and_counted() {
    let region = Region::start(1).await;
    assert_snapshot!(line("ctl conflict list").on_tty().at(&region).await.text(), @"
    ID                                KEY     LOST            WRITTEN                   WON  WRITTEN                   CAUSE
    00000000000000000000000000000003  cart-3  value of eu     2023-11-14T22:13:23.000Z  us   2023-11-14T22:13:23.000Z  rule
    00000000000000000000000000000002  cart-2  deletion of eu  2023-11-14T22:13:22.000Z  us   2023-11-14T22:13:22.000Z  rule
    00000000000000000000000000000001  cart-1  value of eu     2023-11-14T22:13:21.000Z  us   2023-11-14T22:13:21.000Z  rule
    ");
    assert_snapshot!(line("ctl conflict list --key-prefix cart-2").at(&region).await.text(), @r#"{"id":"00000000000000000000000000000002","namespace":"default","key":"cart-2","winner":{"dot":{"region":1,"incarnation":1,"seq":"2"},"originRegion":"us","writeTime":"2023-11-14T22:13:22.000Z","hybridTime":"111411200131072000"},"loser":{"dot":{"region":2,"incarnation":1,"seq":"2"},"originRegion":"eu","writeTime":"2023-11-14T22:13:22.000Z","hybridTime":"111411200131072000"},"loserIsDelete":true,"cause":"CONFLICT_CAUSE_RULE","resolveTime":"2023-11-14T22:13:22.000Z","bytes":"64"}"#);
    let some = line("ctl conflict list --limit 2 -o raw").at(&region).await;
    assert_snapshot!(some.err, @"there are more than 2; see --limit");
    assert_eq!(some.out.split(|byte| *byte == b'\n').count(), 3);
    let partial = line("ctl conflict list --origin ap --since 2h").at(&region).await;
    assert_eq!(partial.exit, Exit::Ok);
    assert_snapshot!(partial.err, @"incomplete: no answer from shard 3");
    assert_snapshot!(line("ctl conflict list --open").on_tty().at(&region).await.text(), @"
    KEY     VALUES  OF     LATEST                    SETTLES
    cart-7  2       eu,us  2023-11-14T22:13:25.000Z  2023-11-21T22:13:25.000Z
    ");
    assert_snapshot!(line("ctl conflict list --open").at(&region).await.text(), @r#"{"key":"cart-7","versions":[{"dot":{"region":1,"incarnation":1,"seq":"4"},"originRegion":"us","writeTime":"2023-11-14T22:13:24.000Z","hybridTime":"111411200262144000"},{"dot":{"region":2,"incarnation":1,"seq":"5"},"originRegion":"eu","writeTime":"2023-11-14T22:13:25.000Z","hybridTime":"111411200327680000"}],"context":"c2hvd24=","sinceTime":"2023-11-14T22:13:25.000Z","settleTime":"2023-11-21T22:13:25.000Z"}"#);

    let first = format!("{:032x}", 1);
    let show = || line("ctl conflict show").word(&first);
    assert_snapshot!(show().on_tty().at(&region).await.text(), @"
    key      cart-1
    rule     lww
    cause    rule
    noted    2023-11-14T22:13:21.000Z

          VALUE     REGION  TIME                      DOT
    lost  3 lemons  eu      2023-11-14T22:13:21.000Z  2.1:1
    won   2 lemons  us      2023-11-14T22:13:21.000Z  1.1:1
    now   2 lemons  us      2023-11-14T22:13:21.000Z  1.1:1

    to put the lost value back, as long as the key stays as it is now:
      tombolo ctl conflict restore 00000000000000000000000000000001 -n default --context-token 'c2hvd24='
    ");
    assert_snapshot!(show().word("-o").word("json").at(&region).await.text(), @r#"
    {
      "conflict": {
        "id": "00000000000000000000000000000001",
        "namespace": "default",
        "key": "cart-1",
        "winner": {
          "dot": {
            "region": 1,
            "incarnation": 1,
            "seq": "1"
          },
          "value": {
            "data": "MiBsZW1vbnM="
          },
          "originRegion": "us",
          "writeTime": "2023-11-14T22:13:21.000Z",
          "hybridTime": "111411200065536000"
        },
        "loser": {
          "dot": {
            "region": 2,
            "incarnation": 1,
            "seq": "1"
          },
          "value": {
            "data": "MyBsZW1vbnM="
          },
          "originRegion": "eu",
          "writeTime": "2023-11-14T22:13:21.000Z",
          "hybridTime": "111411200065536000"
        },
        "loserIsDelete": false,
        "cause": "CONFLICT_CAUSE_RULE",
        "resolveTime": "2023-11-14T22:13:21.000Z",
        "bytes": "64"
      },
      "current": [
        {
          "dot": {
            "region": 1,
            "incarnation": 1,
            "seq": "1"
          },
          "value": {
            "data": "MiBsZW1vbnM="
          },
          "originRegion": "us",
          "writeTime": "2023-11-14T22:13:21.000Z",
          "hybridTime": "111411200065536000"
        }
      ],
      "context": "c2hvd24=",
      "rule": "RULE_LWW"
    }
    "#);
    assert_eq!(show().word("-o").word("raw").at(&region).await.out, b"3 lemons");
    assert_snapshot!(line("ctl conflict list -n profiles").on_tty().at(&region).await.text(), @"
    ID                                KEY  FIELD              LOST         WRITTEN                   WON  WRITTEN                   CAUSE
    00000000000000000000000000000001  ada  address/home town  value of eu  2023-11-14T22:13:21.000Z  us   2023-11-14T22:13:21.000Z  rule
    ");
    let listed = line("ctl conflict list -n profiles").at(&region).await.text();
    assert!(listed.contains(r#""key":"ada","fieldPath":["address","home town"],"#), "{listed}");
    assert_snapshot!(show().word("-n").word("profiles").on_tty().at(&region).await.text(), @"
    key      ada
    field    address/home town
    rule     map
    cause    rule
    noted    2023-11-14T22:13:21.000Z

          VALUE     REGION  TIME                      DOT
    lost  3 lemons  eu      2023-11-14T22:13:21.000Z  2.1:1
    won   2 lemons  us      2023-11-14T22:13:21.000Z  1.1:1
    now: nothing, the field is absent

    to put the lost value back, over whatever the field holds then:
      tombolo ctl conflict show 00000000000000000000000000000001 -n profiles -o raw | tombolo mutate ada 'address/home town:assign=-' -n profiles
    ");
    let deleted = line("ctl conflict show").word(format!("{:032x}", 2)).on_tty().at(&region).await;
    assert!(deleted.text().contains("lost  (deletion)"));
    assert_snapshot!(line("ctl conflict stats").on_tty().at(&region).await.text(), @"
    NAMESPACE  WON  LOST  CAUSE  COUNT  BYTES  OLDEST                    NEWEST
    default    us   eu    rule   3      192    2023-11-14T22:13:21.000Z  2023-11-14T22:13:23.000Z
    ");
    assert_snapshot!(line("ctl conflict stats --all").at(&region).await.text(), @r##"
    {"namespace":"default","winnerRegion":"us","loserRegion":"eu","cause":"CONFLICT_CAUSE_RULE","count":"3","bytes":"192","oldestTime":"2023-11-14T22:13:21.000Z","newestTime":"2023-11-14T22:13:23.000Z"}
    {"namespace":"#17","winnerRegion":"us","loserRegion":"eu","cause":"CONFLICT_CAUSE_RULE","count":"1","bytes":"64","oldestTime":"2023-11-14T22:13:21.000Z","newestTime":"2023-11-14T22:13:23.000Z"}
    "##);
}

#[tokio::test]
async fn conflicts_are_settled_with_what_was_shown_and_with_nothing_else() {
    let region = Region::start(1).await;
    let first = format!("{:032x}", 1);
    let restore = |context: &str| {
        line("ctl conflict restore").word(&first).word("--context-token").word(context).on_tty()
    };
    assert_snapshot!(restore("c2hvd24=").at(&region).await.text(), @"
    DOT    TIME                      CONFLICT
    1.1:9  2023-11-14T22:13:29.000Z  no
    ");
    let moved = restore("b2xk").at(&region).await;
    assert_eq!(moved.exit, Exit::CheckFailed);
    assert!(moved.err.contains("CONFLICT_MOVED"), "{}", moved.err);
    let latest = line("ctl conflict restore --latest").word(&first).at(&region).await;
    assert_eq!(latest.exit, Exit::Ok, "{}", latest.err);
    let unknown = line("ctl conflict restore --latest ffff").at(&region).await;
    assert_eq!(unknown.exit, Exit::Other);
    assert!(unknown.err.contains("CONFLICT_NOT_FOUND"), "{}", unknown.err);

    for choice in ["--choose 2.1:5", "--value both", "--delete"] {
        let resolve = format!("ctl conflict resolve cart-7 --context-token c2hvd24= {choice}");
        assert_eq!(line(&resolve).at(&region).await.exit, Exit::Ok);
    }
    assert_eq!(region.calls("resolve").len(), 3);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("session");
    let settle = |words: &str| line(&format!("ctl conflict {words} --session-file")).word(&file);
    settle("resolve cart-7 --context-token c2hvd24= --delete").at(&region).await;
    settle("restore --latest").word(&first).at(&region).await;
    line("get k --session-file").word(&file).at(&region).await;
    let seen = fake::joined(&[&fake::token(b"cart-7", 9), &fake::token(b"cart-1", 9)]);
    assert_eq!(region.calls("get")[0].token, seen);
    let held = line("ctl namespace create held --rule siblings --hold 7d").at(&region).await.text();
    assert!(held.contains(r#""hold":"604800s""#), "{held}");
    let lww = line("ctl namespace create lww --hold 7d").at(&region).await;
    assert_eq!(lww.exit, Exit::Usage, "{}", lww.err);
    let garbled = line("ctl conflict resolve k --context-token *** --delete").at(&region).await;
    assert_eq!(garbled.exit, Exit::Usage, "{}", garbled.err);

    let parse = |words: &str| Cli::try_parse_from(format!("tombolo {words}").split(' '));
    for bad in [
        format!("ctl conflict restore {first}"),
        format!("ctl conflict restore {first} --latest --context-token c2hvd24="),
        "ctl conflict resolve k --context-token c2hvd24=".to_owned(),
        "ctl conflict resolve k --context-token c2hvd24= --delete --value v".to_owned(),
        "ctl conflict resolve k --delete".to_owned(),
        "ctl conflict list --open --origin us".to_owned(),
        "ctl conflict list --since yesterday".to_owned(),
    ] {
        assert!(parse(&bad).is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_write_is_not_sent_where_its_session_cannot_be_kept() {
    let region = Region::start(1).await;
    let put = line("put k v --session-file /nonexistent/s").at(&region).await;
    assert_eq!(put.exit, Exit::Other);
    assert!(put.err.contains("/nonexistent/s cannot be written"), "{}", put.err);
    assert_eq!(line("get k").at(&region).await.exit, Exit::Absent);
}

#[tokio::test]
async fn an_empty_context_does_not_replace_whatever_is_there() {
    let region = Region::start(1).await;
    for command in ["put k v", "delete k", "mutate k add=1"] {
        let refused = line(command).word("--context-token").word("").at(&region).await;
        assert_eq!(refused.exit, Exit::Usage, "{command}");
        assert!(refused.err.contains("the context is empty"), "{}", refused.err);
    }
    let option = line("commit --put k=v --context-token k=").at(&region).await;
    let document = r#"{"writes":[{"key":"k","value":"v","context":""}]}"#;
    let document = line("commit -").input(document).at(&region).await;
    assert_eq!((option.exit, document.exit), (Exit::Usage, Exit::Usage));
}

#[tokio::test]
async fn a_session_that_has_seen_nothing_is_not_safe() {
    let region = Region::start(1).await;
    let dir = tempfile::tempdir().expect("a directory");
    let missing = line("await-replication --session-file").word(dir.path().join("typo"));
    let empty = line("await-replication --token").word("");
    for command in [missing, empty] {
        let refused = command.at(&region).await;
        assert_eq!(refused.exit, Exit::Usage);
        assert!(refused.err.contains("seen nothing"), "{}", refused.err);
    }
}

#[tokio::test]
async fn one_of_several_values_in_a_pipe_is_said_to_be_one() {
    let region = Region::start(1).await;
    region.put("default", "b", "2");
    region.put_concurrent("default", "b", "3");
    let got = line("get b").at(&region).await;
    assert_eq!((got.exit, got.out.as_slice()), (Exit::Ok, &b"2"[..]));
    assert!(got.err.contains("one of 2 concurrent values"), "{}", got.err);
}

#[tokio::test]
async fn a_missing_part_is_not_a_missing_key() {
    let region = Region::start(1).await;
    let field = line("get ada --field nope").at(&region).await;
    assert_eq!(field.err, "error: field nope of key ada is absent\n");
    let element = line("get s --element zz").at(&region).await;
    assert_eq!(element.err, "error: key s has no element zz\n");
}

#[test]
fn a_ttl_is_for_values_only() {
    for words in ["commit --mutate k=add=1 --ttl 5s", "commit --delete k --ttl 5s"] {
        let words = std::iter::once("tombolo").chain(words.split(' '));
        assert!(Cli::try_parse_from(words).is_err());
    }
}

#[tokio::test]
async fn what_makes_no_sense_to_the_server_ends_as_what_makes_none_here() {
    let region = Region::start(1).await;
    for (code, reason, exit) in [
        (Code::InvalidArgument, "KEY_EMPTY", Exit::Usage),
        (Code::FailedPrecondition, "SESSION_NOT_CAUGHT_UP", Exit::Unavailable),
        (Code::FailedPrecondition, "NAMESPACE_EXISTS", Exit::CheckFailed),
    ] {
        region.fail(None, "get", Fault::Refuse(refusal(code, reason, &[])));
        assert_eq!(line("get k").at(&region).await.exit, exit, "{reason}");
    }
}

#[tokio::test]
async fn a_reader_that_stops_early_is_no_error_of_a_list() {
    let region = Region::start(1).await;
    region.put("default", "k", "v");
    for list in ["scan", "dump"] {
        let ran = line(list).closed().at(&region).await;
        assert_eq!((ran.exit, ran.err.as_str()), (Exit::Ok, ""), "{list}");
    }
    assert_eq!(line("get k").closed().at(&region).await.exit, Exit::Other);
}
