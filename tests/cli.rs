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
