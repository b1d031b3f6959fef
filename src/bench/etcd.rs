//! etcd as a target.
//!
//! All connections go to the leader, unless told otherwise: a follower hands a put to the leader
//! and asks it before a linearizable read, which is a hop and work for one process more. It is
//! what etcd's own benchmark does with `--target-leader`, and it compares like with like, since
//! calls to Tombolo go to the leader of the key's shard.
//!
//! Puts are durable (etcd syncs its log before it acknowledges) and gets are linearizable
//! (`serializable` is false).

use anyhow::{Context, bail};
use bytes::Bytes;
use tonic::transport::Channel;

use crate::args::{BenchArgs, EtcdMembers};
use crate::etcd_proto::kv_client::KvClient;
use crate::etcd_proto::maintenance_client::MaintenanceClient;
use crate::etcd_proto::{PutRequest, RangeRequest, StatusRequest};
use crate::target::{Failure, Lane, Target, endpoint, open};

pub(crate) struct Etcd {
    channels: Vec<Channel>,
}

pub(crate) struct EtcdLane {
    kv: KvClient<Channel>,
}

/// Finds the members to ask and connects to them.
pub(crate) async fn connect(args: &BenchArgs) -> anyhow::Result<Etcd> {
    let count = args.connections_max();
    let channels = match args.etcd_members {
        EtcdMembers::Leader => open(find_leader(&args.endpoints).await?, count).await?,
        EtcdMembers::All => {
            let mut channels = Vec::with_capacity(count);
            for address in args.endpoints.iter().cycle().take(count) {
                channels.append(&mut open(address, 1).await?);
            }
            channels
        }
    };
    Ok(Etcd { channels })
}

/// The address of the member that calls itself the leader.
async fn find_leader(endpoints: &[String]) -> anyhow::Result<&str> {
    for address in endpoints {
        let channel = endpoint(address)?.connect_lazy();
        let status = MaintenanceClient::new(channel).status(StatusRequest {}).await;
        let status = status.with_context(|| format!("cannot ask {address}"))?.into_inner();
        if status.header.is_some_and(|it| it.member_id != 0 && it.member_id == status.leader) {
            return Ok(address);
        }
    }
    bail!("none of {} leads the etcd cluster; give all members", endpoints.join(", "))
}

impl Target for Etcd {
    type Lane = EtcdLane;

    fn lane(&self, number: usize) -> EtcdLane {
        let channel = self.channels[number % self.channels.len()].clone();
        EtcdLane { kv: KvClient::new(channel) }
    }

    fn connections(&self) -> usize {
        self.channels.len()
    }
}

impl Lane for EtcdLane {
    async fn put(&mut self, key: Bytes, value: Bytes) -> Result<(), Failure> {
        self.kv.put(PutRequest { key, value, lease: 0 }).await?;
        Ok(())
    }

    async fn get(&mut self, key: Bytes) -> Result<(), Failure> {
        let request = RangeRequest { key, ..RangeRequest::default() };
        let reply = self.kv.range(request).await?.into_inner();
        if reply.kvs.is_empty() { Err(Failure::absent()) } else { Ok(()) }
    }
}
