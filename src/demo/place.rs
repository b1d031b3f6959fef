//! Where a running demo is found: its data directory, and the file that names the latest one.
//!
//! A demo that serves writes `running.json` into its data directory. The user's runtime
//! directory (`$XDG_RUNTIME_DIR/tombolo-demo`, else `tombolo-demo-UID` in the temporary
//! directory) holds `current`, which names the data directory of the demo started last.
//!
//! Invariants:
//! * Files appear whole: they are written aside and renamed.
//! * The runtime directory belongs to the user and nobody else may enter it; otherwise another
//!   user could send this user's commands to a demo of theirs.
//!
//! Not here: talking to the demo (`control`).

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::layout::Layout;
use crate::processes::Fleet;

const RUNNING_FILE: &str = "running.json";
const CURRENT_FILE: &str = "current";
/// Unix socket paths are bounded by the system: 104 bytes on some, 108 on others.
const MAX_SOCKET_PATH: usize = 100;

/// A running demo, for scripts. Also the content of `--ready-file`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Cluster id.
    pub cluster_id: String,
    /// Process id of the demo itself.
    pub pid: u32,
    /// Absolute.
    pub data_dir: PathBuf,
    /// Unix socket that takes the verbs.
    pub control_socket: PathBuf,
    /// In order of numbers.
    pub regions: Vec<RunningRegion>,
    /// Region by region.
    pub nodes: Vec<RunningNode>,
}

/// A region of a running demo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningRegion {
    /// Its name.
    pub name: String,
    /// Client addresses of its nodes.
    pub endpoints: Vec<String>,
}

/// A node of a running demo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningNode {
    /// For example `us-2`.
    pub name: String,
    /// For example `us`.
    pub region: String,
    /// Counts from 1 in its region.
    pub node_id: u64,
    /// Process id when the file was written.
    pub pid: Option<u32>,
    /// Client address.
    pub client: String,
    /// Raft address.
    pub raft: String,
    /// Link address.
    pub link: String,
    /// HTTP address.
    pub http: String,
    /// Its log file.
    pub log: PathBuf,
}

impl Running {
    /// Describes a demo as it is now.
    #[must_use]
    pub fn describe(layout: &Layout, fleet: &Fleet, control_socket: &Path) -> Self {
        let regions = layout.shape.regions.iter().map(|name| RunningRegion {
            name: name.clone(),
            endpoints: layout.nodes_of(name).map(|node| node.client.to_string()).collect(),
        });
        let nodes = layout.nodes.iter().map(|node| RunningNode {
            name: node.name.clone(),
            region: node.region.clone(),
            node_id: node.node_id,
            pid: fleet.state(&node.name).ok().and_then(|state| state.pid()),
            client: node.client.to_string(),
            raft: node.raft.to_string(),
            link: node.link.to_string(),
            http: node.http.to_string(),
            log: node.log_path(),
        });
        Self {
            cluster_id: layout.shape.cluster_id.clone(),
            pid: std::process::id(),
            data_dir: layout.data_dir.clone(),
            control_socket: control_socket.to_owned(),
            regions: regions.collect(),
            nodes: nodes.collect(),
        }
    }
}

/// Where verbs find a demo.
#[derive(Clone, Debug)]
pub struct Place {
    runtime_dir: PathBuf,
}

impl Place {
    /// The user's runtime directory, made if needed.
    ///
    /// # Errors
    /// The system's; a directory that others may enter is [`io::ErrorKind::PermissionDenied`].
    pub fn of_user() -> io::Result<Self> {
        let uid = rustix::process::getuid().as_raw();
        let runtime_dir = match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
            Some(base) if base.is_absolute() && base.is_dir() => base.join("tombolo-demo"),
            Some(_) | None => std::env::temp_dir().join(format!("tombolo-demo-{uid}")),
        };
        Self::at(runtime_dir)
    }

    /// A given runtime directory, made if needed.
    ///
    /// # Errors
    /// As [`Place::of_user`].
    pub fn at(runtime_dir: PathBuf) -> io::Result<Self> {
        match std::fs::DirBuilder::new().mode(0o700).create(&runtime_dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let found = std::fs::symlink_metadata(&runtime_dir)?;
        let uid = rustix::process::getuid().as_raw();
        if !found.is_dir() || found.uid() != uid || found.mode() & 0o077 != 0 {
            let text = format!("{} is not a private directory of this user", runtime_dir.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(Self { runtime_dir })
    }

    /// Where the control socket of a demo in `data_dir` goes.
    #[must_use]
    pub fn control_socket(&self, data_dir: &Path) -> PathBuf {
        let inside = data_dir.join("control.sock");
        if inside.as_os_str().len() <= MAX_SOCKET_PATH {
            return inside;
        }
        // FNV-1a: the name must be the same in every run.
        let hash = data_dir
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            });
        self.runtime_dir.join(format!("{hash:016x}.sock"))
    }

    /// Makes a demo findable.
    ///
    /// # Errors
    /// The system's.
    pub fn announce(&self, running: &Running) -> io::Result<()> {
        write_json(&running.data_dir.join(RUNNING_FILE), running)?;
        write_whole(
            &self.runtime_dir.join(CURRENT_FILE),
            running.data_dir.as_os_str().as_encoded_bytes(),
        )
    }

    /// Takes back [`Place::announce`]; a newer demo stays announced.
    pub fn withdraw(&self, data_dir: &Path, control_socket: &Path) {
        // What is left behind is found stale by the next reader.
        std::fs::remove_file(data_dir.join(RUNNING_FILE)).ok();
        std::fs::remove_file(control_socket).ok();
        if self.current().ok().flatten().is_some_and(|current| current == data_dir) {
            std::fs::remove_file(self.runtime_dir.join(CURRENT_FILE)).ok();
        }
    }

    /// Finds a running demo: the one in `data_dir`, or the one started last.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none; the rest is the system's.
    pub fn find(&self, data_dir: Option<&Path>) -> io::Result<Running> {
        let not_found = |text: String| io::Error::new(io::ErrorKind::NotFound, text);
        let data_dir = match data_dir {
            Some(data_dir) => data_dir.to_owned(),
            None => self.current()?.ok_or_else(|| {
                not_found("no demo is running; start one with `tombolo demo`".into())
            })?,
        };
        let path = data_dir.join(RUNNING_FILE);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(not_found(format!("no demo is running in {}", data_dir.display())))
            }
            Err(error) => Err(error),
        }
    }

    fn current(&self) -> io::Result<Option<PathBuf>> {
        match std::fs::read_to_string(self.runtime_dir.join(CURRENT_FILE)) {
            Ok(text) => Ok(Some(PathBuf::from(text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Writes a file that appears whole or not at all.
///
/// # Errors
/// The system's.
pub fn write_json(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(content)?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}", std::process::id()));
    std::fs::write(&aside, bytes)?;
    std::fs::rename(&aside, path).inspect_err(|_| {
        std::fs::remove_file(&aside).ok();
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn running(data_dir: &Path) -> Running {
        Running {
            cluster_id: "demo-1".into(),
            pid: 1,
            data_dir: data_dir.to_owned(),
            control_socket: data_dir.join("control.sock"),
            regions: Vec::new(),
            nodes: Vec::new(),
        }
    }

    #[test]
    fn the_demo_announced_last_is_found_unless_another_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        std::fs::create_dir(&new).unwrap();
        let place = Place::at(directory.path().join("runtime")).unwrap();

        place.announce(&running(&old)).unwrap();
        place.announce(&running(&new)).unwrap();

        assert_eq!(place.find(None).unwrap().data_dir, new);
        assert_eq!(place.find(Some(&old)).unwrap().data_dir, old);
    }

    #[test]
    fn withdrawing_an_old_demo_leaves_the_newer_one_findable() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        std::fs::create_dir(&old).unwrap();
        std::fs::create_dir(&new).unwrap();
        let place = Place::at(directory.path().join("runtime")).unwrap();
        place.announce(&running(&old)).unwrap();
        place.announce(&running(&new)).unwrap();

        place.withdraw(&old, &old.join("control.sock"));
        assert_eq!(place.find(None).unwrap().data_dir, new);

        place.withdraw(&new, &new.join("control.sock"));
        assert_eq!(place.find(None).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(place.find(Some(&old)).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_runtime_directory_that_others_may_enter_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let open = directory.path().join("runtime");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();

        let error = Place::at(open).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_long_data_directory_gets_a_short_socket_path() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::at(directory.path().join("runtime")).unwrap();
        let long = PathBuf::from(format!("/{}", "x".repeat(200)));

        let socket = place.control_socket(&long);

        assert!(socket.starts_with(directory.path()));
        assert_eq!(socket, place.control_socket(&long));
        assert_eq!(place.control_socket(Path::new("/d")), Path::new("/d/control.sock"));
    }
}
