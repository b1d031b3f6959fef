//! What `watch` prints, where it keeps its place, and how it ends.

#[path = "../../client/tests/fake/mod.rs"]
mod fake;
mod harness;

use fake::watch::{change, checkpoint, dot, response, version};
use fake::{Region, refusal};
use harness::line;
use insta::assert_snapshot;
use tombolo_client::Code;
use tombolo_client::proto::{self, watch_event::Body, watch_request::Start};
use tombolo_commands::Exit;

fn story() -> fake::watch::Played {
    let lost = proto::Change {
        supersedes: vec![dot(1)],
        previous: vec![proto::Previous {
            dot: Some(dot(1)),
            state: proto::PreviousState::Value.into(),
            version: Some(version("one", 1)),
        }],
        conflict: Some(proto::ChangeConflict {
            lost_to: Some(dot(9)),
            ledger_id: "0abc".into(),
            ..Default::default()
        }),
        current: false,
        ..change("a", Some("two"), 2)
    };
    let reset = proto::Reset { reason: proto::ResetReason::HistoryGone.into() };
    let entry = proto::SnapshotEntry {
        key: "b".into(),
        versions: vec![version("x", 3), version("y", 4)],
        ..Default::default()
    };
    vec![
        Ok(response("t0", vec![checkpoint()])),
        Ok(response("t1", vec![Body::Change(change("a", Some("one"), 1)), Body::Change(lost)])),
        Ok(response("t2", vec![Body::Change(change("a", None, 3))])),
        Ok(response("t3", vec![Body::Reset(reset), Body::SnapshotEntry(entry)])),
        Ok(response("t4", vec![Body::SnapshotDone(proto::SnapshotDone { shards_left: 0 })])),
    ]
}

#[tokio::test]
async fn a_line_an_event_for_people_and_the_token_at_the_end() {
    let region = Region::start(1).await;
    region.play([story()]);
    let ran = line("watch --limit 6").on_tty().at(&region).await;
    assert_eq!((ran.exit, ran.err.as_str()), (Exit::Ok, "resume token: dDQ=\n"));
    assert_snapshot!(String::from_utf8(ran.out).expect("text"), @"
    put     a = one  us 2023-11-14T22:13:21.000Z 1.1:1
    put     a = two  us 2023-11-14T22:13:22.000Z 1.1:2  lost to 1.1:9 (0abc)
    delete  a  us 2023-11-14T22:13:23.000Z 1.1:3
    reset   shard 1: the history is gone
    entry   b = x | y
    done    shard 1, 0 left
    ");
}

#[tokio::test]
async fn json_has_the_shape_of_the_protocol_one_object_a_line() {
    let region = Region::start(1).await;
    region.play([story()]);
    let ran = line("watch -o jsonl --checkpoints --limit 7").at(&region).await;
    assert_snapshot!(String::from_utf8(ran.out).expect("text"), @r#"
    {"shard":0,"checkpoint":{"shardsWaiting":0},"resumeToken":"dDA="}
    {"shard":1,"change":{"key":"a","kind":"CHANGE_KIND_PUT","dot":{"region":1,"incarnation":1,"seq":"1"},"version":{"dot":{"region":1,"incarnation":1,"seq":"1"},"value":{"data":"b25l"},"originRegion":"us","writeTime":"2023-11-14T22:13:21.000Z","hybridTime":"111411200065536000"},"originRegion":"us","writeTime":"2023-11-14T22:13:21.000Z","hybridTime":"111411200065536000","supersedes":[],"group":{"firstSeq":"1","size":1},"current":true}}
    {"shard":1,"change":{"key":"a","kind":"CHANGE_KIND_PUT","dot":{"region":1,"incarnation":1,"seq":"2"},"version":{"dot":{"region":1,"incarnation":1,"seq":"2"},"value":{"data":"dHdv"},"originRegion":"us","writeTime":"2023-11-14T22:13:22.000Z","hybridTime":"111411200131072000"},"originRegion":"us","writeTime":"2023-11-14T22:13:22.000Z","hybridTime":"111411200131072000","supersedes":[{"region":1,"incarnation":1,"seq":"1"}],"previous":[{"dot":{"region":1,"incarnation":1,"seq":"1"},"state":"PREVIOUS_STATE_VALUE","version":{"dot":{"region":1,"incarnation":1,"seq":"1"},"value":{"data":"b25l"},"originRegion":"us","writeTime":"2023-11-14T22:13:21.000Z","hybridTime":"111411200065536000"}}],"conflict":{"lostTo":{"region":1,"incarnation":1,"seq":"9"},"ledgerId":"0abc"},"group":{"firstSeq":"2","size":1},"current":false},"resumeToken":"dDE="}
    {"shard":1,"change":{"key":"a","kind":"CHANGE_KIND_DELETE","dot":{"region":1,"incarnation":1,"seq":"3"},"originRegion":"us","writeTime":"2023-11-14T22:13:23.000Z","hybridTime":"111411200196608000","supersedes":[],"group":{"firstSeq":"3","size":1},"current":true},"resumeToken":"dDI="}
    {"shard":1,"reset":{"reason":"RESET_REASON_HISTORY_GONE"}}
    {"shard":1,"snapshotEntry":{"key":"b","versions":[{"dot":{"region":1,"incarnation":1,"seq":"3"},"value":{"data":"eA=="},"originRegion":"us","writeTime":"2023-11-14T22:13:23.000Z","hybridTime":"111411200196608000"},{"dot":{"region":1,"incarnation":1,"seq":"4"},"value":{"data":"eQ=="},"originRegion":"us","writeTime":"2023-11-14T22:13:24.000Z","hybridTime":"111411200262144000"}]},"resumeToken":"dDM="}
    {"shard":1,"snapshotDone":{"shardsLeft":0},"resumeToken":"dDQ="}
    "#);
}

#[tokio::test]
async fn a_token_file_says_where_to_go_on_and_is_kept_when_interrupted() {
    let region = Region::start(1).await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("pos");
    region.play([story(), vec![Ok(response("t9", vec![checkpoint()]))]]);
    let ran = line("watch --snapshot --limit 3 -o raw --token-file").word(&file).at(&region).await;
    assert_eq!((ran.exit, ran.out.as_slice()), (Exit::Ok, &b"a\na\na\n"[..]));
    assert_eq!(std::fs::read_to_string(&file).expect("kept"), "dDI=\n");

    let state = region.state.clone();
    let interrupt = async move {
        while state.lock().watched.len() < 2 {
            tokio::task::yield_now().await;
        }
    };
    let again = line("watch --snapshot --token-file").word(&file).interrupted_by(interrupt);
    let ran = again.at(&region).await;
    assert_eq!(ran.exit, Exit::Interrupted);
    assert!(ran.err.starts_with("resume token: "), "{}", ran.err);
    let starts: Vec<_> = region.watched().into_iter().map(|(_, sent)| sent.start).collect();
    let snapshot = Some(Start::Snapshot(proto::Snapshot {}));
    assert_eq!(starts, [snapshot, Some(Start::ResumeToken("t2".into()))]);
}

#[tokio::test]
async fn a_watch_that_is_refused_says_why_and_where_to_go_on() {
    let region = Region::start(1).await;
    let fenced = || refusal(Code::FailedPrecondition, "REGION_FENCED", &[]);
    region.play([vec![Err(fenced())]]);
    let ran = line("watch --from-token dDE= --local").at(&region).await;
    assert_eq!(ran.exit, Exit::CheckFailed);
    assert_snapshot!(ran.err, @"
    resume token: dDE=
    error: region fenced (REGION_FENCED)
    ");
    let (_, sent) = region.watched().remove(0);
    assert_eq!(sent.start, Some(Start::ResumeToken("t1".into())));
    assert_eq!(sent.origin_filter(), proto::OriginFilter::Local);

    let ran = line("watch --from-token not*base64").at(&region).await;
    assert_eq!(ran.exit, Exit::Usage);
}

#[tokio::test]
async fn a_token_file_that_cannot_be_written_is_said_before_watching() {
    let region = Region::start(1).await;
    let ran = line("watch --token-file /nonexistent/x").at(&region).await;
    assert_eq!(ran.exit, Exit::Other);
    assert!(ran.err.contains("/nonexistent/x cannot be written"), "{}", ran.err);
}
