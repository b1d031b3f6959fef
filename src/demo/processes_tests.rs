//! Claims of the process supervision, with small shell commands as nodes.

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

struct Yard {
    fleet: Fleet,
    directory: tempfile::TempDir,
}

fn yard(scripts: &[(&str, &str)]) -> Yard {
    let directory = tempfile::tempdir().unwrap();
    let launches = scripts.iter().map(|(name, script)| Launch {
        name: (*name).into(),
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), (*script).into()],
        log: directory.path().join(format!("{name}.log")),
    });
    Yard { fleet: Fleet::new(launches.collect()).unwrap(), directory }
}

impl Yard {
    fn pid(&self, name: &str) -> u32 {
        self.fleet.state(name).unwrap().pid().unwrap()
    }

    async fn wait_for_log(&self, name: &str, text: &str) {
        let path = self.directory.path().join(format!("{name}.log"));
        timeout(PATIENCE, async {
            while !log_tail(&path).contains(text) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
    }
}

/// State letter of a process, as in `ps`; none when it is gone.
fn system_state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

async fn wait_for_system_state(pid: u32, wanted: &[Option<char>]) {
    timeout(PATIENCE, async {
        while !wanted.contains(&system_state(pid)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{pid} is {:?}, not {wanted:?}", system_state(pid)));
}

#[tokio::test]
async fn an_exit_that_nobody_ordered_is_reported_with_the_end_of_the_log() {
    let yard = yard(&[("us-1", "echo line one; echo disk on fire >&2; exit 3")]);
    let mut crashes = yard.fleet.crashes();

    yard.fleet.start("us-1").await.unwrap();
    timeout(PATIENCE, crashes.wait_for(|all| !all.is_empty())).await.unwrap().unwrap();

    let crash = crashes.borrow()[0].clone();
    assert_eq!(crash.name, "us-1");
    assert!(crash.how.contains('3'), "{}", crash.how);
    assert!(crash.log_tail.contains("disk on fire"), "{}", crash.log_tail);
    assert_eq!(yard.fleet.state("us-1").unwrap().word(), "crashed");
}

#[tokio::test]
async fn a_kill_on_request_is_no_crash_and_the_process_can_start_again() {
    let yard = yard(&[("us-1", "exec sleep 1000")]);
    yard.fleet.start("us-1").await.unwrap();
    let first = yard.pid("us-1");

    yard.fleet.kill("us-1").await.unwrap();
    assert_eq!(system_state(first), None);
    yard.fleet.start("us-1").await.unwrap();

    assert_ne!(yard.pid("us-1"), first);
    assert!(yard.fleet.crashes().borrow().is_empty());
    yard.fleet.kill_all().await.unwrap();
}

#[tokio::test]
async fn pause_freezes_and_resume_continues() {
    let yard = yard(&[("us-1", "exec sleep 1000")]);
    yard.fleet.start("us-1").await.unwrap();
    let pid = yard.pid("us-1");

    yard.fleet.pause("us-1").await.unwrap();
    wait_for_system_state(pid, &[Some('T')]).await;
    assert_eq!(yard.fleet.state("us-1").unwrap(), State::Paused { pid });
    yard.fleet.resume("us-1").await.unwrap();
    wait_for_system_state(pid, &[Some('S'), Some('R')]).await;

    assert_eq!(yard.fleet.state("us-1").unwrap(), State::Up { pid });
    yard.fleet.kill_all().await.unwrap();
}

#[tokio::test]
async fn stop_is_gentle_first_and_hard_after_the_grace_also_for_paused_processes() {
    let polite = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done";
    let deaf = "trap '' TERM; echo up; while :; do sleep 0.01; done";
    let yard = yard(&[("polite", polite), ("deaf", deaf), ("paused", "exec sleep 1000")]);
    yard.fleet.start_all().await.unwrap();
    yard.wait_for_log("polite", "up").await;
    yard.wait_for_log("deaf", "up").await;
    yard.fleet.pause("paused").await.unwrap();
    let pids = ["polite", "deaf", "paused"].map(|name| yard.pid(name));

    timeout(PATIENCE, yard.fleet.stop(Duration::from_millis(500))).await.unwrap();

    assert_eq!(pids.map(system_state), [None; 3]);
    yard.wait_for_log("polite", "bye").await;
    assert!(yard.fleet.crashes().borrow().is_empty());
}

#[tokio::test]
async fn dropping_the_fleet_kills_everything() {
    let yard = yard(&[("a", "exec sleep 1000"), ("b", "exec sleep 1000")]);
    yard.fleet.start_all().await.unwrap();
    yard.fleet.pause("b").await.unwrap();
    let pids = ["a", "b"].map(|name| yard.pid(name));

    drop(yard);

    for pid in pids {
        wait_for_system_state(pid, &[None, Some('Z')]).await;
    }
}

#[tokio::test]
async fn orders_that_make_no_sense_say_why() {
    let yard = yard(&[("us-1", "exec sleep 1000"), ("us-2", "exit 0")]);

    let unknown = yard.fleet.kill("us-9").await.unwrap_err().to_string();
    let down = yard.fleet.kill("us-1").await.unwrap_err().to_string();
    yard.fleet.start("us-1").await.unwrap();
    let up = yard.fleet.start("us-1").await.unwrap_err().to_string();
    let not_paused = yard.fleet.resume("us-1").await.unwrap_err().to_string();

    assert_eq!(unknown, "no node `us-9`; the nodes are us-1, us-2");
    assert_eq!(down, "us-1 is down");
    assert_eq!(up, "us-1 is up");
    assert_eq!(not_paused, "us-1 is up");
    yard.fleet.kill_all().await.unwrap();
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_an_error_not_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let launch = Launch {
        name: "us-1".into(),
        program: directory.path().join("nothing"),
        arguments: Vec::new(),
        log: directory.path().join("log"),
    };
    let fleet = Fleet::new(vec![launch]).unwrap();

    let error = fleet.start("us-1").await.unwrap_err();

    assert!(matches!(error, ProcessError::System { .. }), "{error}");
    assert_eq!(fleet.state("us-1").unwrap(), State::Down);
}
