//! The program as a shell sees it. What commands do is tested in `src/commands`; this is the wiring.

use std::process::{Command, Output};

fn tombolo(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tombolo"));
    for name in ["TOMBOLO_ENDPOINTS", "TOMBOLO_CONTEXT", "TOMBOLO_CONTEXTS_FILE"] {
        command.env_remove(name);
    }
    command.args(line.split(' ')).output().expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

#[test]
fn version_and_completions_need_no_cluster() {
    let version = tombolo("version");
    assert_eq!(version.status.code(), Some(0));
    let wanted = concat!("tombolo ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(text(&version.stdout), wanted);

    for shell in ["bash", "zsh", "fish"] {
        let script = tombolo(&format!("completions {shell}"));
        assert_eq!(script.status.code(), Some(0), "{shell}");
        let script = text(&script.stdout);
        for command in ["server", "demo", "bench", "namespace", "resume-file"] {
            assert!(script.contains(command), "{shell} completes {command}");
        }
    }
}

#[test]
fn a_line_that_makes_no_sense_ends_with_code_2() {
    for line in ["", "nonsense", "get", "get k --no-such-flag", "get k --context nowhere"] {
        let ended = tombolo(line);
        assert_eq!(ended.status.code(), Some(2), "`{line}`: {}", text(&ended.stderr));
        assert!(!ended.stderr.is_empty(), "`{line}` says why");
    }
}

#[test]
fn nobody_there_ends_with_code_6_and_says_who_was_asked() {
    let ended = tombolo("get k -e 127.0.0.1:1 -o json");
    assert_eq!(ended.status.code(), Some(6));
    assert!(ended.stdout.is_empty());
    let error: serde_json::Value = serde_json::from_slice(&ended.stderr).expect("an object");
    assert_eq!(error["code"], "UNAVAILABLE");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("127.0.0.1:1"), "{message}");
}

#[test]
fn a_server_that_cannot_use_its_key_or_its_clock_offset_says_so_and_touches_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let (config, data) = (dir.path().join("t.toml"), dir.path().join("data"));
    std::fs::write(&config, tombolo("config example").stdout).expect("written");
    let offset = dir.path().join("offset");
    std::fs::write(&offset, "eight hours").expect("written");
    let server = |setting: &str, offset: &std::path::Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tombolo"));
        command.args(["server", "--config"]).arg(&config);
        command.args(["--set", &format!("data_dir={}", data.display())]);
        command.args(["--set", setting]).env("TOMBOLO_CLOCK_OFFSET_FILE", offset);
        let ended = command.output().expect("the program runs");
        assert_ne!(ended.status.code(), Some(0));
        text(&ended.stderr)
    };
    let said = server("cluster_key_file=/no/such/key", &offset);
    assert!(said.contains("cluster_key_file /no/such/key: cannot be used"), "{said}");
    let said = server("shards=1", &offset);
    assert!(said.contains("`eight hours` is no signed number of milliseconds"), "{said}");
    let said = server("shards=1", std::path::Path::new("/no/such/file"));
    assert!(said.contains("TOMBOLO_CLOCK_OFFSET_FILE: /no/such/file"), "{said}");
    assert!(!data.exists());
}
