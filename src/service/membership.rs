//! Regions that come, go, are shut out, come back and are recovered: what operators decide.
//!
//! A decision is a record in the catalog, which travels to every region like any other data; each
//! shard everywhere takes it over into its own log and goes by it from then on. Any active region
//! takes decisions, because the one that is to be shut out may be the catalog's home. Only new
//! numbers are assigned by the home alone.

use std::sync::Arc;

use tombolo_cluster::Region;
use tombolo_core::{
    Content, Member, MemberState, NamespaceId, RegionId,
    command::{Check, Condition},
    region::RegionEntry,
};
use tombolo_proto::v1 as pb;
use tombolo_shard::{ShardError, WriteOutcome, blocking};
use tonic::Status;

use crate::{
    anti_entropy::rows,
    convert::{decode_dot, encode_dot},
    gateway::Call,
    namespace::{CatalogWriter, put},
    reason::Reason,
    region::RegionApi,
};

/// Decisions that may collide before one gives up.
const ATTEMPTS: usize = 8;
/// Longest name of a region.
const NAME_BYTES_MAX: usize = 32;
/// What one node lists for review at once: with several nodes' it must fit one message.
const REVIEW_BYTES_MAX: usize = 512 << 10;

/// What an operator decided.
#[derive(Clone, Debug)]
pub(crate) enum Decision {
    Add { number: u32, link_addresses: Vec<String> },
    Fence,
    Remove,
    Recover,
}

impl RegionApi {
    /// Writes a decision on `name` into the catalog. Runs on the leader of the catalog's shard.
    pub(crate) async fn decide(
        &self,
        name: &str,
        decision: &Decision,
        call: Call,
    ) -> Result<Region, Status> {
        // One at a time: what is checked of other regions must still hold when it is written.
        let _deciding = self.deciding.lock().await;
        let catalog = CatalogWriter::new(Arc::clone(&self.gateway));
        let reload = || {
            let reload = self.gateway.shards().reload_catalog();
            reload.map_err(|error| self.gateway.status(error))
        };
        let key = RegionEntry::catalog_key(name);
        for _ in 0..ATTEMPTS {
            let held = catalog.read(&key, call).await?;
            reload()?;
            let unchanged = match held.as_ref().and_then(|held| held.siblings().first()) {
                Some(held) => Condition::DotEquals(held.dot),
                None => Condition::Absent,
            };
            let known = self.gateway.topology().region_named(name);
            let entry = match decision {
                Decision::Add { number, link_addresses } => {
                    self.admit(name, known.as_ref(), *number, link_addresses)?
                }
                Decision::Fence => self.shut_out(name, known, MemberState::Fenced)?,
                Decision::Remove => self.shut_out(name, known, MemberState::Removed)?,
                Decision::Recover => self.recover(name, known)?,
            };
            let Some(entry) = entry else { break };
            let checks = vec![Check { key: key.clone(), condition: unchanged }];
            let operations = vec![put(key.clone(), entry.to_bytes())];
            if let WriteOutcome::Written(_) = catalog.commit(checks, operations, call).await? {
                tracing::warn!(
                    region = name,
                    incarnation = entry.member.incarnation,
                    state = ?entry.member.state,
                    "an operator decided on a region"
                );
                reload()?;
                break;
            }
        }
        self.gateway.topology().region_named(name).ok_or_else(|| not_found(name))
    }

    /// The record that admits a region; `None` if it is admitted.
    fn admit(
        &self,
        name: &str,
        known: Option<&Region>,
        number: u32,
        link_addresses: &[String],
    ) -> Result<Option<RegionEntry>, Status> {
        let topology = self.gateway.topology();
        let present = known.map(|region| region.said.unwrap_or_default());
        let member = match present {
            None => {
                if !topology.is_catalog_home() {
                    let home = topology.region_name(topology.catalog_home);
                    let text = format!("new regions are admitted in region `{home}`");
                    return Err(Reason::NotCatalogHome.status(text, &[("home", home)]));
                }
                Member { incarnation: 1, state: MemberState::Joining }
            }
            Some(Member { incarnation, state: MemberState::Fenced }) => {
                Member { incarnation: incarnation + 1, state: MemberState::Joining }
            }
            Some(member @ Member { state: MemberState::Joining, .. }) => member,
            Some(Member { state: MemberState::Removed, .. }) => {
                return Err(invalid(format!(
                    "region `{name}` was removed; names and numbers are not used again"
                )));
            }
            Some(_) => return Err(invalid(format!("region `{name}` is a member already"))),
        };
        self.check_nobody_else_joins(name)?;
        let id = match known {
            Some(region) if number == 0 || number == u32::from(region.id.0) => region.id,
            Some(region) => {
                return Err(invalid(format!("region `{name}` has number {}", region.id)));
            }
            None => self.new_number(name, number)?,
        };
        let link_addresses = match known {
            Some(region) if link_addresses.is_empty() => region.link_addresses.clone(),
            Some(_) | None => checked_addresses(link_addresses)?,
        };
        if present == Some(member) && known.is_some_and(|it| it.link_addresses == link_addresses) {
            return Ok(None);
        }
        Ok(Some(RegionEntry { id, name: name.to_owned(), link_addresses, member }))
    }

    fn new_number(&self, name: &str, number: u32) -> Result<RegionId, Status> {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(legal) {
            return Err(invalid(format!(
                "`{name}` is no region name: 1 to {NAME_BYTES_MAX} of a-z, 0-9 and `-`"
            )));
        }
        let id = u16::try_from(number).ok().filter(|&number| number > 0).map(RegionId);
        let id = id.ok_or_else(|| {
            invalid(format!("a new region needs a number from 1 to 65535, and {number} is none"))
        })?;
        match self.gateway.topology().region(id) {
            Some(other) => Err(invalid(format!("number {id} belongs to region `{}`", other.name))),
            None => Ok(id),
        }
    }

    /// One at a time: a region that takes over from all others must know who they are.
    fn check_nobody_else_joins(&self, name: &str) -> Result<(), Status> {
        let regions = self.gateway.topology().regions();
        let joins = |region: &&Region| {
            region.name != name && region.said.is_some_and(|said| said.state.is_joining())
        };
        match regions.iter().find(joins) {
            Some(other) => Err(Reason::RegionBusy.status(
                format!("region `{}` is taking over data; one region at a time", other.name),
                &[("region", other.name.clone())],
            )),
            None => Ok(()),
        }
    }

    fn shut_out(
        &self,
        name: &str,
        known: Option<Region>,
        state: MemberState,
    ) -> Result<Option<RegionEntry>, Status> {
        let region = known.ok_or_else(|| not_found(name))?;
        if region.id == self.gateway.topology().region {
            return Err(invalid(format!("run this in another region than `{name}`")));
        }
        if state == MemberState::Removed && region.id == self.gateway.topology().catalog_home {
            return Err(invalid(format!(
                "region `{name}` is the catalog's home: name another one as `catalog.home` in all files first"
            )));
        }
        let present = region.said.unwrap_or_default();
        let member = Member { state, ..present };
        Ok((present < member).then(|| region.into_entry(member)))
    }

    fn recover(&self, name: &str, known: Option<Region>) -> Result<Option<RegionEntry>, Status> {
        let region = known.ok_or_else(|| not_found(name))?;
        let topology = self.gateway.topology();
        if region.id == topology.region && !topology.peers().is_empty() {
            return Err(invalid(format!("run this in another region than `{name}`")));
        }
        let Member { incarnation, state } = region.said.unwrap_or_default();
        match state {
            MemberState::Active | MemberState::Regressed => {}
            MemberState::Joining | MemberState::Recovering => return Ok(None),
            MemberState::Fenced => {
                return Err(invalid(format!(
                    "region `{name}` is fenced: `tombolo ctl region add` takes it back"
                )));
            }
            MemberState::Removed => {
                return Err(invalid(format!("region `{name}` was removed for good")));
            }
        }
        self.check_nobody_else_joins(name)?;
        let member = Member { incarnation: incarnation + 1, state: MemberState::Recovering };
        Ok(Some(region.into_entry(member)))
    }

    /// What is kept for review in this node's shards.
    pub(crate) async fn own_reviews(&self, limit: u32) -> Result<Vec<pb::Review>, Status> {
        let limit = rows(limit);
        let (mut found, mut bytes) = (Vec::new(), 0);
        for shard in self.led() {
            for namespace in self.all_namespaces() {
                let store = shard.store().clone();
                let kept = blocking(move || store.reviewed(namespace, limit)).await;
                let kept = kept.map_err(|error| self.gateway.status(ShardError::from(error)))?;
                for (key, held) in kept {
                    if bytes > REVIEW_BYTES_MAX {
                        return Ok(found);
                    }
                    let (is_delete, data) = match held.content {
                        Content::Tombstone | Content::Reset { .. } => (true, bytes::Bytes::new()),
                        Content::Count { .. } => (false, bytes::Bytes::new()),
                        Content::Value { data, .. } => (false, data),
                    };
                    bytes += key.len() + data.len();
                    found.push(pb::Review {
                        namespace: self.namespace_name(namespace),
                        key,
                        dot: Some(encode_dot(held.dot)),
                        hybrid_time: held.time.to_bits(),
                        is_delete,
                        data,
                    });
                }
            }
        }
        Ok(found)
    }

    /// Forgets what is kept for review, in this node's shards.
    pub(crate) async fn dismiss(
        &self,
        namespace: NamespaceId,
        reviews: &[pb::Review],
        call: Call,
    ) -> Result<(), Status> {
        for shard in self.led() {
            let mut writes = Vec::new();
            for review in reviews {
                if self.gateway.topology().shard_of(&review.key) == shard.id() {
                    let dot = review.dot.ok_or_else(|| {
                        Reason::RequestInvalid.status("a review without a dot", &[])
                    })?;
                    writes.push((review.key.clone(), decode_dot(dot)?));
                }
            }
            if !writes.is_empty() {
                let done = shard.forget_reviewed(namespace, writes, call.deadline).await;
                done.map_err(|error| self.gateway.status(error))?;
            }
        }
        Ok(())
    }

    fn all_namespaces(&self) -> Vec<NamespaceId> {
        let catalog = self.gateway.shards().catalog().current();
        let named = catalog.iter().map(|namespace| namespace.id);
        std::iter::once(NamespaceId::CATALOG).chain(named).collect()
    }
}

fn checked_addresses(addresses: &[String]) -> Result<Vec<String>, Status> {
    let is_address = |address: &String| {
        let port = address.rsplit_once(':').and_then(|(host, port)| {
            let port: u16 = port.parse().ok()?;
            (!host.is_empty() && port > 0).then_some(port)
        });
        port.is_some()
    };
    match addresses.iter().find(|address| !is_address(address)) {
        Some(wrong) => Err(invalid(format!("`{wrong}` is no address: write host:port"))),
        None if addresses.is_empty() => {
            Err(invalid("a new region needs at least one link address".to_owned()))
        }
        None => Ok(addresses.to_vec()),
    }
}

fn invalid(text: String) -> Status {
    Reason::RegionInvalid.status(text, &[])
}

fn not_found(name: &str) -> Status {
    Reason::RegionNotFound
        .status(format!("there is no region `{name}`"), &[("region", name.to_owned())])
}

/// What a region may do, in public words.
pub(crate) const fn membership(state: MemberState) -> pb::Membership {
    match state {
        MemberState::Joining => pb::Membership::Joining,
        MemberState::Recovering => pb::Membership::Recovering,
        MemberState::Active => pb::Membership::Active,
        MemberState::Regressed => pb::Membership::Regressed,
        MemberState::Fenced => pb::Membership::Fenced,
        MemberState::Removed => pb::Membership::Removed,
    }
}
