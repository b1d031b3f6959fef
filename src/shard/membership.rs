//! What the catalog says of the regions, brought into each shard's own log.
//!
//! Operators decide, the catalog carries it to every region, and here each shard's leader proposes
//! what its shard has not learnt yet. From then on the shard goes by it: see
//! [`tombolo_core::members`].

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tombolo_cluster::Region;
use tombolo_core::{
    Content, Member, MemberState, Members, RegionId, command::Operation, namespace::Namespace,
    region::RegionEntry,
};

use crate::{error::ShardError, shard::Shard, shards::Shards, write::WriteRequest};

/// Between two looks, for what could not be proposed at once.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long one proposal may take.
const PROPOSAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Teaches all shards that this node leads, until `shutdown` fires.
pub async fn follow_regions(shards: Shards, shutdown: CancellationToken) {
    let mut regions = shards.topology().watch_regions();
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // Safe to drop: both only wait.
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            changed = regions.changed() => if changed.is_err() { return },
            _ = ticks.tick() => {}
        }
        for shard in shards.iter().filter(|shard| shard.is_leader()) {
            if let Err(error) = teach(shard).await {
                tracing::debug!(shard = %shard.id(), %error, "will be told of the regions again");
            }
        }
        if let Err(error) = say_again(&shards).await {
            tracing::debug!(%error, "what was decided on a region will be written again later");
        }
        if let Err(error) = announce(&shards).await {
            tracing::debug!(%error, "the other regions will be told later that this one has all data");
        }
    }
}

/// Proposes what the catalog says and the shard does not know.
async fn teach(shard: &Shard) -> Result<(), ShardError> {
    let topology = shard.topology();
    let own = topology.region;
    let known = shard.store().members();
    if known.said(own).is_none() && shard.own_member().state.is_joining() {
        set(shard, own, shard.own_member()).await?;
    }
    let own_member = shard.own_member();
    if own_member.state.is_joining() && topology.peers().is_empty() {
        // There is nobody to take anything over from.
        set(shard, own, Member { state: MemberState::Active, ..own_member }).await?;
    }
    // The catalog is whole up to some decision, so what is learnt at once has no later one without an
    // earlier one. It learns from those whose data it takes over when to begin empty, and decides by
    // itself when it has all.
    let regions = topology.regions();
    let is_news = |&(region, said): &(RegionId, Member)| {
        let is_for_us =
            region != own || !matches!(said.state, MemberState::Joining | MemberState::Active);
        is_for_us && known.said(region).is_none_or(|known| known < said)
    };
    let said = regions.iter().filter_map(|region| Some((region.id, region.said?)));
    let news: Members = said.filter(is_news).collect();
    if news.is_empty() {
        return Ok(());
    }
    shard.learn(news, Instant::now() + PROPOSAL_TIMEOUT).await
}

/// Writes into the catalog that this region takes writes, once all of its shards do.
async fn announce(shards: &Shards) -> Result<(), ShardError> {
    let (topology, shard) = (shards.topology(), shards.catalog_shard());
    let Some(own) = topology.region(topology.region) else { return Ok(()) };
    let Some(said) = own.said.filter(|said| said.state.is_joining()) else { return Ok(()) };
    let member = Member { state: MemberState::Active, ..said };
    if !shard.is_leader() || shards.iter().any(|shard| shard.own_member() != member) {
        return Ok(());
    }
    write_entry(shard, own, member).await
}

/// Writes a decision again that another one, made without it, has replaced in the catalog: all shards that
/// know it go by it for good.
async fn say_again(shards: &Shards) -> Result<(), ShardError> {
    let (topology, shard) = (shards.topology(), shards.catalog_shard());
    if !shard.is_leader() || shard.own_member().state != MemberState::Active {
        return Ok(());
    }
    let members = shard.store().members();
    for region in topology.regions().iter().filter(|region| region.id != topology.region) {
        let known = members.said(region.id);
        if let (Some(said), Some(known)) = (region.said, known)
            && said < known
        {
            write_entry(shard, region.clone(), known).await?;
        }
    }
    Ok(())
}

async fn write_entry(shard: &Shard, region: Region, member: Member) -> Result<(), ShardError> {
    let key = RegionEntry::catalog_key(&region.name);
    let content = Content::value(region.into_entry(member).to_bytes());
    let request = WriteRequest {
        namespace: Arc::new(Namespace::catalog()),
        request: None,
        checks: Vec::new(),
        operations: vec![Operation { key, content, context: None }],
        mutations: Vec::new(),
    };
    shard.write(request, Instant::now() + PROPOSAL_TIMEOUT).await.map(drop)
}

async fn set(shard: &Shard, region: RegionId, member: Member) -> Result<(), ShardError> {
    shard.set_member(region, member, Instant::now() + PROPOSAL_TIMEOUT).await
}
