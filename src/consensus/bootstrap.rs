//! Creates groups that do not exist yet, without ever creating one twice.
//!
//! The node with the lowest id in the configuration is the only one that creates groups. For each
//! group of which it has no vote and no log it asks all peers, again and again, until one of:
//!
//! * **A peer has state of the group.** Then the group exists; its leader will come.
//! * **Peers that make a majority together with this node have none.** Then no leader was ever
//!   elected: that takes the recorded votes of a majority, and two majorities share a node. So
//!   nothing was ever committed, and creating the group loses nothing.
//!
//! Waiting for a majority costs nothing, since without one nobody could be elected anyway. A node
//! that lost its directory is no danger: its peers know its old directory id and refuse it
//! ([`crate::network::identity`]), which is reported as a failure of the node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;

use crate::config::ConsensusConfig;
use crate::group::{Failures, Group};
use crate::network::client::Transport;
use crate::network::identity::needs_new_id;
use crate::types::Member;

const ASK_LIMIT: Duration = Duration::from_secs(2);
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Creates the groups that need it. Ends when every group has state here.
pub(crate) async fn run(
    config: ConsensusConfig,
    groups: Vec<Group>,
    transport: Arc<Transport>,
    failures: Failures,
) {
    let members = config.members();
    let peers: Vec<u64> =
        members.iter().copied().filter(|peer| *peer != config.node_id.0).collect();
    let creates = members.first() == Some(&config.node_id.0);
    let voters: BTreeMap<u64, Member> =
        members.iter().map(|node| (*node, Member { region: config.region.clone() })).collect();
    let majority = members.len() / 2 + 1;

    loop {
        let missing: Vec<&Group> =
            groups.iter().filter(|group| !group.member().has_state()).collect();
        if missing.is_empty() {
            return;
        }
        // Also a node that creates nothing asks: it learns early that it needs a new id.
        let answers = join_all(peers.iter().map(|peer| transport.ask_groups(*peer, ASK_LIMIT)));
        let mut empty = vec![];
        let mut existing = BTreeSet::new();
        for (peer, answer) in peers.iter().zip(answers.await) {
            match answer {
                Ok(known) => {
                    empty.push(known.iter().copied().collect::<BTreeSet<u64>>());
                    existing.extend(known);
                }
                Err(status) if needs_new_id(&status) => {
                    failures.report(format!(
                        "node {peer} refuses this node ({}): {}",
                        config.node_id,
                        status.message()
                    ));
                    return;
                }
                Err(status) => tracing::debug!(peer, %status, "a peer does not answer yet"),
            }
        }
        if creates {
            for group in missing {
                let number = u64::from(group.shard().0);
                let without = empty.iter().filter(|known| !known.contains(&number)).count();
                if existing.contains(&number) || without + 1 < majority {
                    continue;
                }
                tracing::info!(shard = %group.shard(), voters = ?members, "creating the group");
                if let Err(error) = group.initialize(voters.clone()).await {
                    let shard = group.shard();
                    failures.report(format!("creating the group of shard {shard}: {error}"));
                    return;
                }
            }
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}
