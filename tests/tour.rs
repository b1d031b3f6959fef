//! The whole thing, as a user would see it: nine processes, three regions, every promise.

use std::process::Command;

#[test]
fn the_tour_verifies_every_step() {
    let data = tempfile::tempdir().expect("a directory");
    let ran = Command::new(env!("CARGO_BIN_EXE_tombolo"))
        .args(["demo", "--tour", "--tour-load-seconds", "1", "--data-dir"])
        .arg(data.path().join("demo"))
        .output()
        .expect("the program runs");
    let shown = String::from_utf8_lossy(&ran.stdout);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{shown}\n{errors}");
    assert!(shown.contains("all 13 steps verified"), "{shown}");
}
