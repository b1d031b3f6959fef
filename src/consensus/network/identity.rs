//! Who calls whom: checked before anything else of a message is looked at.
//!
//! A node that is wired to a wrong cluster, a wrong region or to itself would corrupt a group. A
//! node that comes back under its old id with an empty directory is worse: it has forgotten its
//! votes and what it acknowledged, and could help to elect a leader that lacks acknowledged
//! writes. So every data directory has a random id, each node remembers the directory ids of its
//! peers in a small file, and a message says both who it is from and whom it is meant for. The
//! first contact is trusted; any later difference is refused for good. A node that lost its
//! directory needs a new node id.
//!
//! Invariants:
//! * A remembered directory id is on disk before the first message of that peer is answered.
//! * The file is replaced whole, so that a crash leaves the old or the new one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use tombolo_proto::internal::v1 as pb;
use tonic::Status;

const FILE: &str = "peers";
const FILE_HEADER: &str = "tombolo peers 1";

/// Who this node is, as its peers must see it.
#[derive(Clone, Debug)]
pub(crate) struct Local {
    pub(crate) cluster_id: String,
    pub(crate) region: String,
    pub(crate) node_id: u64,
    pub(crate) directory_id: String,
    pub(crate) shard_count: u32,
}

/// Why a caller is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the message carries no identity")]
    Missing,
    #[error("{what} differ: the caller has {theirs}, this node has {ours}")]
    Differs { what: &'static str, theirs: String, ours: String },
    #[error("node {0} is not in this node's configuration")]
    UnknownNode(u64),
    #[error("node {node} came back with another data directory: it needs a new node id")]
    OtherDirectory { node: u64 },
    #[error("cannot remember the directory of node {node}: {problem}")]
    NotRemembered { node: u64, problem: String },
}

/// Marks a refusal that only a new node id can heal, on its way back to the caller.
const NEEDS_NEW_ID: &str = "needs-new-node-id";

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut status = match &refusal {
            Refusal::Missing => Self::invalid_argument(refusal.to_string()),
            Refusal::Differs { .. } | Refusal::UnknownNode(_) | Refusal::OtherDirectory { .. } => {
                Self::failed_precondition(refusal.to_string())
            }
            Refusal::NotRemembered { .. } => Self::internal(refusal.to_string()),
        };
        if matches!(refusal, Refusal::OtherDirectory { .. }) {
            status
                .metadata_mut()
                .insert(NEEDS_NEW_ID, tonic::metadata::MetadataValue::from_static("1"));
        }
        status
    }
}

/// Whether a peer refused this node because it knows it with another data directory.
pub(crate) fn needs_new_id(status: &Status) -> bool {
    status.metadata().contains_key(NEEDS_NEW_ID)
}

/// The node's own identity and what it remembers of its peers.
#[derive(Debug)]
pub(crate) struct Identities {
    local: Local,
    file: PathBuf,
    /// Peers in the configuration, with their directory if it is known.
    peers: Mutex<BTreeMap<u64, Option<String>>>,
}

impl Identities {
    /// Loads what was remembered in `dir`. Peers that left the configuration are forgotten only
    /// in memory.
    pub(crate) fn open(local: Local, dir: &Path, peers: &[u64]) -> Result<Self, io::Error> {
        fs::create_dir_all(dir)?;
        let file = dir.join(FILE);
        let mut known = read_file(&file)?;
        let peers = peers.iter().map(|peer| (*peer, known.remove(peer))).collect();
        Ok(Self { local, file, peers: Mutex::new(peers) })
    }

    pub(crate) fn local(&self) -> &Local {
        &self.local
    }

    /// Whether a message to `peer` can be addressed, that is, there was a first contact.
    pub(crate) fn knows(&self, peer: u64) -> bool {
        self.peers.lock().get(&peer).is_some_and(Option::is_some)
    }

    /// The identity to put on a message to `peer`.
    pub(crate) fn to(&self, peer: u64) -> pb::Identity {
        let to_directory = self.peers.lock().get(&peer).cloned().flatten().unwrap_or_default();
        pb::Identity {
            cluster_id: self.local.cluster_id.clone(),
            region: self.local.region.clone(),
            from_node: self.local.node_id,
            to_node: peer,
            from_directory: self.local.directory_id.clone(),
            shard_count: self.local.shard_count,
            to_directory,
        }
    }

    /// Checks a caller, and remembers it at first contact. Answers its node id.
    pub(crate) fn accept(&self, identity: Option<&pb::Identity>) -> Result<u64, Refusal> {
        let identity = identity.ok_or(Refusal::Missing)?;
        let local = &self.local;
        same("cluster ids", &identity.cluster_id, &local.cluster_id)?;
        same("regions", &identity.region, &local.region)?;
        same("node ids of the callee", &identity.to_node, &local.node_id)?;
        same("shard counts", &identity.shard_count, &local.shard_count)?;
        if identity.from_node == local.node_id {
            return Err(Refusal::UnknownNode(identity.from_node));
        }
        if !identity.to_directory.is_empty() && identity.to_directory != local.directory_id {
            return Err(Refusal::OtherDirectory { node: local.node_id });
        }
        self.remember(identity.from_node, &identity.from_directory)?;
        Ok(identity.from_node)
    }

    /// Compares a peer's directory with the remembered one, or remembers it.
    pub(crate) fn remember(&self, node: u64, directory: &str) -> Result<(), Refusal> {
        let mut peers = self.peers.lock();
        let Some(known) = peers.get_mut(&node) else { return Err(Refusal::UnknownNode(node)) };
        match known {
            Some(known) if known == directory => Ok(()),
            Some(_) => Err(Refusal::OtherDirectory { node }),
            None if directory.is_empty() || directory.contains(char::is_whitespace) => {
                Err(Refusal::Missing)
            }
            None => {
                *known = Some(directory.to_owned());
                // Once per peer and life of the directory: short enough to do under the lock.
                let written = write_file(&self.file, &peers);
                if let Err(problem) = written {
                    peers.insert(node, None);
                    let problem = problem.to_string();
                    return Err(Refusal::NotRemembered { node, problem });
                }
                Ok(())
            }
        }
    }
}

fn same<T: PartialEq + ToString>(what: &'static str, theirs: &T, ours: &T) -> Result<(), Refusal> {
    if theirs == ours {
        return Ok(());
    }
    Err(Refusal::Differs { what, theirs: theirs.to_string(), ours: ours.to_string() })
}

fn read_file(file: &Path) -> Result<BTreeMap<u64, String>, io::Error> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let damaged = || {
        let problem = format!("{}: damaged", file.display());
        io::Error::new(io::ErrorKind::InvalidData, problem)
    };
    let mut lines = text.lines();
    if lines.next() != Some(FILE_HEADER) {
        return Err(damaged());
    }
    let mut known = BTreeMap::new();
    for line in lines {
        let (node, directory) = line.split_once(' ').ok_or_else(damaged)?;
        known.insert(node.parse().map_err(|_| damaged())?, directory.to_owned());
    }
    Ok(known)
}

fn write_file(file: &Path, peers: &BTreeMap<u64, Option<String>>) -> Result<(), io::Error> {
    // Keep what is on disk of peers that are not configured now: they may come back.
    let mut known = read_file(file)?;
    for (node, directory) in peers {
        if let Some(directory) = directory {
            known.insert(*node, directory.clone());
        }
    }
    let mut text = format!("{FILE_HEADER}\n");
    for (node, directory) in known {
        text.push_str(&format!("{node} {directory}\n"));
    }
    let new = file.with_extension("new");
    let mut out = File::create(&new)?;
    out.write_all(text.as_bytes())?;
    out.sync_all()?;
    fs::rename(&new, file)?;
    match file.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(node_id: u64, directory: &str, dir: &Path) -> Identities {
        let local = Local {
            cluster_id: "c".to_owned(),
            region: "us".to_owned(),
            node_id,
            directory_id: directory.to_owned(),
            shard_count: 4,
        };
        let peers: Vec<u64> = [1, 2, 3].into_iter().filter(|peer| *peer != node_id).collect();
        Identities::open(local, dir, &peers).unwrap()
    }

    #[test]
    fn a_peer_is_accepted_with_the_directory_it_first_came_with_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let dir_two = tempfile::tempdir().unwrap();
        let call = |directory: &str| node(2, directory, dir_two.path()).to(1);

        assert_eq!(node(1, "a", dir.path()).accept(Some(&call("b"))), Ok(2));
        let restarted = node(1, "a", dir.path());

        assert_eq!(restarted.accept(Some(&call("b"))), Ok(2));
        assert_eq!(
            restarted.accept(Some(&call("other"))),
            Err(Refusal::OtherDirectory { node: 2 })
        );
    }

    #[test]
    fn a_node_with_a_new_directory_refuses_messages_meant_for_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let caller = node(2, "b", dir.path());
        caller.remember(1, "a").unwrap();
        let fresh = tempfile::tempdir().unwrap();

        let refusal = node(1, "new", fresh.path()).accept(Some(&caller.to(1))).unwrap_err();

        assert_eq!(refusal, Refusal::OtherDirectory { node: 1 });
        assert!(needs_new_id(&Status::from(refusal)));
    }

    #[test]
    fn callers_of_another_cluster_region_shape_or_target_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let accepting = node(1, "a", dir.path());
        let other = tempfile::tempdir().unwrap();
        let good = node(2, "b", other.path()).to(1);
        let bad = [
            pb::Identity { cluster_id: "x".to_owned(), ..good.clone() },
            pb::Identity { region: "eu".to_owned(), ..good.clone() },
            pb::Identity { to_node: 3, ..good.clone() },
            pb::Identity { shard_count: 8, ..good.clone() },
        ];

        for identity in bad {
            let refusal = accepting.accept(Some(&identity)).unwrap_err();
            assert!(matches!(refusal, Refusal::Differs { .. }), "{refusal}");
        }
        let unknown = pb::Identity { from_node: 9, ..good.clone() };
        assert_eq!(accepting.accept(Some(&unknown)), Err(Refusal::UnknownNode(9)));
        assert_eq!(accepting.accept(None), Err(Refusal::Missing));
        assert_eq!(accepting.accept(Some(&good)), Ok(2));
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "nonsense").unwrap();
        assert!(read_file(&dir.path().join(FILE)).is_err());
    }
}
