//! Reading at a chosen consistency.
//!
//! First [`Shard::prepare_read`] makes sure that this replica may answer, then the data is read
//! from it. What is read may be newer than what was asked for, never older.
//!
//! A replica knows how old its state may be: every read index that it has applied, whether it leads or
//! asked the leader, says that the state holds all that was acknowledged before the question. The last
//! such moment is kept ([`Shard::note_fresh`]), so that reads which may be somewhat stale cost a
//! question now and then and not one each. Ages are taken from the steady clock: a wrong wall clock
//! makes nothing fresh.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tombolo_core::{NamespaceId, Record, VersionVector};
use tombolo_storage::{ScanPage, ScanRange};

use crate::{
    error::ShardError,
    shard::{Revision, Shard},
};

/// How fresh a read must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// Sees every write acknowledged in this region before the read began. Only the leader.
    Linearizable,
    /// Sees what this vector covers. Any replica.
    Causal(VersionVector),
    /// At most this old. Any replica that knows that it is; else only the leader.
    MaxStaleness(Duration),
    /// Whatever is here.
    Local,
}

impl Shard {
    /// Makes sure that this replica may answer a read.
    ///
    /// Cancellation safe.
    ///
    /// # Errors
    /// [`ShardError::NotLeader`] if another node must answer; [`ShardError::NotCaughtUp`] if the
    /// deadline passed before this replica had seen enough.
    pub async fn prepare_read(
        &self,
        namespace: NamespaceId,
        consistency: &Consistency,
        deadline: Instant,
    ) -> Result<Revision, ShardError> {
        match consistency {
            Consistency::Linearizable => self.barrier(deadline).await,
            Consistency::MaxStaleness(age) => {
                if self.inner.fresh_as_of.lock().is_some_and(|at| at.elapsed() <= *age) {
                    Ok(self.applied_revision())
                } else {
                    self.barrier(deadline).await
                }
            }
            Consistency::Causal(needed) => {
                self.wait_applied(namespace, needed, deadline).await?;
                Ok(self.applied_revision())
            }
            Consistency::Local => Ok(self.applied_revision()),
        }
    }

    /// This replica has applied all that was acknowledged in this region before `asked`.
    pub fn note_fresh(&self, asked: Instant) {
        let mut fresh = self.inner.fresh_as_of.lock();
        *fresh = Some(fresh.map_or(asked, |known| known.max(asked)));
    }

    /// The record of a key on this replica.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn record(&self, namespace: NamespaceId, key: &[u8]) -> Result<Option<Record>, ShardError> {
        Ok(self.inner.store.record(namespace, key)?)
    }

    /// The records of several keys on this replica, all as of one moment.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn records(
        &self,
        namespace: NamespaceId,
        keys: &[Bytes],
    ) -> Result<Vec<Option<Record>>, ShardError> {
        Ok(self.inner.store.records(namespace, keys)?)
    }

    /// A page of records in key order on this replica.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn scan(
        &self,
        namespace: NamespaceId,
        range: &ScanRange,
        keys_max: usize,
        bytes_max: usize,
    ) -> Result<ScanPage, ShardError> {
        Ok(self.inner.store.scan(namespace, range, keys_max, bytes_max)?)
    }

    async fn barrier(&self, deadline: Instant) -> Result<Revision, ShardError> {
        let asked = Instant::now();
        let shard = self.inner.id;
        match tokio::time::timeout_at(deadline, self.inner.group.read_barrier()).await {
            Ok(Ok(barrier)) => {
                self.note_fresh(asked);
                Ok(Revision { shard, term: barrier.term, index: barrier.index })
            }
            Ok(Err(error)) => Err(ShardError::from_read(shard, error)),
            Err(_) => Err(ShardError::DeadlineExceeded { shard }),
        }
    }

    fn applied_revision(&self) -> Revision {
        let applied = self.inner.store.applied();
        Revision {
            shard: self.inner.id,
            term: applied.map_or(0, |position| position.term),
            index: applied.map_or(0, |position| position.index),
        }
    }
}

/// The first key after all keys that begin with `prefix`; `None` if there is none.
pub fn end_of_prefix(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|&byte| byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end.into())
}
