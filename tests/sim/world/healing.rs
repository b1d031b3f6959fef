//! Healing: everything arrives, and what must hold then.

use std::time::Duration;

use tombolo_core::{RegionId, Rule, invariant::Invariant};

use crate::{
    link::{Link, Reply},
    region::Region,
    truth::Broken,
};

use super::World;

/// Rounds after which healed regions must have come together.
const ROUNDS_MAX: usize = 400;

impl World {
    /// Mends all, lets the regions come together, and checks what must hold then.
    pub(super) fn heal(&mut self) -> Result<(), Broken> {
        self.cuts.clear();
        let mut rounds = 0;
        while !self.is_quiet() {
            rounds += 1;
            if rounds > ROUNDS_MAX {
                return Err((Invariant::Convergence, self.why_not_quiet()));
            }
            self.round()?;
            if self.is_left_out {
                return Ok(());
            }
        }
        for region in self.present() {
            if self.rule != Rule::Siblings {
                self.truth.check_ledger(&region.data)?;
            }
        }
        for _ in 0..ROUNDS_MAX / 8 {
            if self.tombstone().is_none() {
                break;
            }
            for at in 0..self.regions.len() {
                self.collect(at);
            }
            self.round()?;
        }
        if let Some(left) = self.tombstone() {
            return Err((Invariant::NoTombstones, left));
        }
        self.check_cost()
    }

    pub(super) fn tombstone(&self) -> Option<String> {
        let present = self.present();
        present.flat_map(|it| it.data.memory.records.iter().map(|record| (it.id, record))).find_map(
            |(id, ((_, key), record))| {
                let context = record.context();
                record.is_dead().then(|| format!("region {id}: {key:?}, which has seen {context}"))
            },
        )
    }

    /// One write in each region, and what it costs when nothing is in the way.
    pub(super) fn check_cost(&mut self) -> Result<(), Broken> {
        // Until nobody takes up or lays down a relay any more.
        for _ in 0..8 {
            self.round()?;
        }
        self.received.fill(0);
        let members: Vec<usize> =
            (0..self.regions.len()).filter(|&at| self.takes_part(&self.regions[at])).collect();
        for &at in &members {
            self.write(at, &[(0, false)], false, None);
            self.commit(at)?;
        }
        for _ in 0..ROUNDS_MAX {
            self.round()?;
            if self.is_quiet() {
                break;
            }
        }
        for &at in &members {
            let (received, expected) = (self.received[at], members.len() as u64 - 1);
            if received != expected {
                let id = self.regions[at].id;
                return Err((
                    Invariant::OncePerLink,
                    format!("{received} changes came to region {id}; {expected} were written"),
                ));
            }
        }
        if !self.is_quiet() {
            return Err((Invariant::Convergence, self.why_not_quiet()));
        }
        Ok(())
    }

    /// Everything that is under way arrives.
    pub(super) fn round(&mut self) -> Result<(), Broken> {
        self.now += Duration::from_millis(500);
        for at in 0..self.regions.len() {
            while self.hear(at, 0) {}
            self.tick(at);
        }
        for (puller, source) in self.pairs() {
            for _ in 0..4 {
                self.request_arrives(puller, source);
                self.late_arrives(puller, source);
                self.send(puller, source);
                self.ask_arrives(puller, source);
            }
            self.tell(puller, source);
            for _ in 0..6 {
                self.reply_arrives(puller, source);
                self.answer_arrives(puller, source)?;
            }
            self.apply(puller, source);
            self.commit(puller)?;
        }
        self.settle_logs()?;
        self.check()
    }

    /// Whether all regions that take part have all, and nothing is under way.
    pub(super) fn is_quiet(&self) -> bool {
        if self.is_unfinished() {
            return false;
        }
        let mut present = self.present();
        let Some(first) = present.next() else { return true };
        let frontier = first.data.frontier();
        let is_settled =
            |region: &Region| {
                region.is_active()
                    && *region.members() == self.decided
                    && region.queue.is_empty()
                    && region.data.is_exact()
                    && region.data.frontier() == frontier
                    && region.leader.streams.values().all(|it| {
                        it.pending.is_empty() && it.repair.is_none() && it.trimmed.is_none()
                    })
            };
        let is_still = |link: &Link| {
            let is_change = |reply: &Reply| matches!(reply, Reply::Changes(_));
            !link.replies.iter().any(is_change) && link.requests.is_empty()
        };
        let has_streams = |region: &Region| {
            region.leader.streams.values().all(|it| it.relayed.iter().all(|id| self.is_out(*id)))
        };
        is_settled(first)
            && has_streams(first)
            && present.all(|it| is_settled(it) && has_streams(it))
            && self.links.values().all(is_still)
    }

    pub(super) fn is_out(&self, id: RegionId) -> bool {
        self.regions.iter().any(|region| region.id == id && !self.takes_part(region))
    }

    pub(super) fn why_not_quiet(&self) -> String {
        let present = self.present();
        let told = present.map(|region| {
            let waits = region.leader.streams.iter().filter_map(|(source, stream)| {
                let id = self.regions[*source].id;
                let waits = stream.pending.waits_for().map(ToString::to_string);
                let repair = stream.repair.as_ref().map(|_| " repairing".to_owned());
                let trimmed = stream.trimmed.as_ref().map(|it| format!(" trimmed {it}"));
                let all = [waits, repair, trimmed].into_iter().flatten().collect::<String>();
                (!all.is_empty()).then(|| format!("; from {id}: {all}"))
            });
            let waits: String = waits.collect();
            let (id, data) = (region.id, &region.data);
            let (frontier, ahead) = (data.frontier(), data.ahead());
            format!("region {id} {:?} has {frontier}, ahead {ahead}{waits}", region.member())
        });
        format!("the regions do not come together: {}", told.collect::<Vec<_>>().join(" | "))
    }
}
