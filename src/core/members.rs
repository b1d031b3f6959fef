//! Who takes part: the regions of a mesh, as one shard of one region knows them.
//!
//! Regions come, go, are shut out and come back, and no two shards hear of it at the same moment. So
//! each shard keeps in its own log what it knows, and knowledge only grows: first the incarnation,
//! then the state.
//!
//! Invariants:
//! * What a region tells of itself (what it has applied) comes with the members that it knows. Whoever
//!   does not know all of them yet takes no notice: else it could drop a tombstone that a region of
//!   which it has not heard was seeded without.
//! * A region in a new incarnation has told nothing.
//! * Nothing is taken from a region that is shut out, nor from a former life of one that came back.
//!   What others have of it, they go on exchanging.
//! * A region that is shut out counts until this region has all that any other has of it, and each
//!   has said so after shutting out, too, all that this one has: one that is shut out only here may
//!   still pass on to others what another wrote that was shut out before it.
//!
//! Not here: who decides (an operator; the catalog brings it to every region), and when a shard
//! proposes what it heard (`tombolo-shard`).

use std::collections::BTreeMap;

use crate::{
    codec::{DecodeError, Reader, Writer},
    id::{Actor, RegionId},
    vector::VersionVector,
};

/// What a region may do, in the order in which one follows the other within one incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemberState {
    /// It begins empty, and takes over what the others have.
    Joining,
    /// It goes on with what it has, which may be old, and takes over what the others have.
    Recovering,
    /// It takes writes, and everyone counts it.
    Active,
    /// It lost writes that it had told of, and must not write before it is recovered.
    Regressed,
    /// The others go on without it. It may come back in another incarnation.
    Fenced,
    /// It is gone for good.
    Removed,
}

impl MemberState {
    /// The stored form.
    pub const fn to_byte(self) -> u8 {
        match self {
            Self::Joining => 1,
            Self::Recovering => 2,
            Self::Active => 3,
            Self::Regressed => 4,
            Self::Fenced => 5,
            Self::Removed => 6,
        }
    }

    /// Reads what [`to_byte`](Self::to_byte) wrote.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Joining),
            2 => Some(Self::Recovering),
            3 => Some(Self::Active),
            4 => Some(Self::Regressed),
            5 => Some(Self::Fenced),
            6 => Some(Self::Removed),
            _ => None,
        }
    }

    /// Whether the others go on without it.
    pub const fn is_out(self) -> bool {
        matches!(self, Self::Fenced | Self::Removed)
    }

    /// Whether it is still taking over what the others have.
    pub const fn is_joining(self) -> bool {
        matches!(self, Self::Joining | Self::Recovering)
    }
}

/// What is known of a region. Ordered: what is greater is newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Counts the region's lives, from 1.
    pub incarnation: u32,
    /// What it may do.
    pub state: MemberState,
}

impl Default for Member {
    /// A region that was there from the start.
    fn default() -> Self {
        Self { incarnation: 1, state: MemberState::Active }
    }
}

impl Member {
    /// Appends the encoding.
    pub fn encode(self, writer: &mut Writer) {
        writer.varint(u64::from(self.incarnation));
        writer.u8(self.state.to_byte());
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged.
    pub fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let incarnation = reader.u32()?;
        let byte = reader.u8()?;
        let state = MemberState::from_byte(byte).ok_or_else(|| reader.invalid(u64::from(byte)))?;
        if incarnation == 0 {
            return Err(reader.invalid(0));
        }
        Ok(Self { incarnation, state })
    }
}

/// What is known of the regions that were not simply there from the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members(BTreeMap<RegionId, Member>);

/// Most regions in one list: as many as a vector may have actors.
const MEMBERS_MAX: usize = crate::vector::ACTORS_MAX;

impl Members {
    /// Knows nothing: all regions were there from the start.
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// What is known of a region.
    pub fn get(&self, region: RegionId) -> Member {
        self.0.get(&region).copied().unwrap_or_default()
    }

    /// What was ever said of a region.
    pub fn said(&self, region: RegionId) -> Option<Member> {
        self.0.get(&region).copied()
    }

    /// The actor that a region's writes carry now.
    pub fn actor(&self, region: RegionId) -> Actor {
        Actor { region, incarnation: self.get(region).incarnation }
    }

    /// Learns of a region; answers whether that is news.
    pub fn learn(&mut self, region: RegionId, member: Member) -> bool {
        let is_news = self.said(region).is_none_or(|known| known < member);
        if is_news {
            self.0.insert(region, member);
        }
        is_news
    }

    /// Whether everything that `other` says is known here.
    pub fn know_all_of(&self, other: &Self) -> bool {
        other.iter().all(|(region, said)| self.said(region).is_some_and(|known| said <= known))
    }

    /// Whether what comes from `source` may be taken: it is in its present life and not shut out.
    pub fn admit(&self, source: Actor) -> bool {
        let known = self.get(source.region);
        known.incarnation == source.incarnation && !known.state.is_out()
    }

    /// What was said of those that are shut out.
    pub fn out(&self) -> Self {
        self.iter().filter(|(_, member)| member.state.is_out()).collect()
    }

    /// What was said, in order of the regions.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (RegionId, Member)> + '_ {
        self.0.iter().map(|(&region, &member)| (region, member))
    }

    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends the encoding.
    pub fn encode(&self, writer: &mut Writer) {
        writer.count(self.0.len());
        for (&region, &member) in &self.0 {
            writer.varint(u64::from(region.0));
            member.encode(writer);
        }
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// If the bytes are damaged, or a region is out of order.
    pub fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let count = reader.count(3)?;
        if count > MEMBERS_MAX {
            let (what, actual, limit) = ("members", count as u64, MEMBERS_MAX as u64);
            return Err(DecodeError::TooLarge { what, actual, limit });
        }
        let mut members = BTreeMap::new();
        for _ in 0..count {
            let region = RegionId(reader.u16()?);
            if members.last_key_value().is_some_and(|(&last, _)| region <= last) {
                return Err(reader.invalid(u64::from(region.0)));
            }
            members.insert(region, Member::decode(reader)?);
        }
        Ok(Self(members))
    }
}

impl FromIterator<(RegionId, Member)> for Members {
    fn from_iter<I: IntoIterator<Item = (RegionId, Member)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

/// What each other region has said last, with whom it had shut out by then, that it has of those.
#[derive(Clone, Debug, Default)]
pub struct FenceTold {
    told: BTreeMap<Actor, (Members, VersionVector)>,
}

impl FenceTold {
    /// `from` has applied `frontier`, and knows `members`.
    pub fn tell(&mut self, from: Actor, frontier: &VersionVector, members: &Members) {
        let out = members.out();
        let of = frontier.iter().filter(|(actor, _)| out.said(actor.region).is_some()).collect();
        self.told.insert(from, (out, of));
    }

    /// Whether `region`, which `members` shut out, counts no longer: this region, which has applied
    /// `local`, has all that any of `others` has of it, and none of them takes more of it, from
    /// whomever.
    pub fn is_settled(
        &self,
        region: RegionId,
        members: &Members,
        local: &VersionVector,
        others: impl IntoIterator<Item = Actor>,
    ) -> bool {
        let out = members.out();
        let has_all = |of: &VersionVector| {
            let mut of = of.iter().filter(|(actor, _)| actor.region == region);
            of.all(|(actor, seq)| seq <= local.get(actor))
        };
        let is_done = |(told, of): &(Members, VersionVector)| told.know_all_of(&out) && has_all(of);
        others.into_iter().all(|other| self.told.get(&other).is_some_and(is_done))
    }
}

/// Whose word counts before anything is forgotten, in one region that knows `members`: those of
/// `regions` that take part, and those that are shut out while something of them may be under way.
pub fn counted(
    regions: impl IntoIterator<Item = RegionId>,
    members: &Members,
    local: &VersionVector,
    fences: &FenceTold,
) -> Vec<Actor> {
    let all: Vec<RegionId> = regions.into_iter().collect();
    let is_out = |region: &RegionId| members.get(*region).state.is_out();
    let survivors =
        || all.iter().filter(|region| !is_out(region)).map(|&region| members.actor(region));
    let out = all.iter().copied().filter(is_out);
    let unsettled = out.filter(|&region| !fences.is_settled(region, members, local, survivors()));
    survivors().chain(unsettled.map(|region| members.actor(region))).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: RegionId = RegionId(1);
    const B: RegionId = RegionId(2);
    const C: RegionId = RegionId(3);

    fn member(incarnation: u32, state: MemberState) -> Member {
        Member { incarnation, state }
    }

    fn of_c(seq: u64) -> VersionVector {
        [(Actor { region: C, incarnation: 1 }, seq)].into_iter().collect()
    }

    pub(crate) fn any_member() -> impl Strategy<Value = Member> {
        (1u32..4, 1u8..7).prop_map(|(incarnation, byte)| Member {
            incarnation,
            state: MemberState::from_byte(byte).unwrap_or(MemberState::Active),
        })
    }

    pub(crate) fn any_members() -> impl Strategy<Value = Members> {
        prop::collection::btree_map((1u16..6).prop_map(RegionId), any_member(), 0..4)
            .prop_map(Members)
    }

    proptest! {
        #[test]
        fn members_read_back(members in any_members()) {
            let mut writer = Writer::default();
            members.encode(&mut writer);
            let mut reader = Reader::new("members", writer.finish());
            prop_assert_eq!(Members::decode(&mut reader), Ok(members));
            prop_assert_eq!(reader.finish(), Ok(()));
        }

        #[test]
        fn knowledge_grows_whatever_the_order(said in prop::collection::vec(((1u16..4).prop_map(RegionId), any_member()), 0..8)) {
            let learn = |order: &mut dyn Iterator<Item = &(RegionId, Member)>| {
                let mut members = Members::new();
                order.for_each(|&(region, member)| {
                    let before = members.clone();
                    members.learn(region, member);
                    assert!(members.know_all_of(&before));
                });
                members
            };
            prop_assert_eq!(learn(&mut said.iter()), learn(&mut said.iter().rev()));
        }
    }

    #[test]
    fn a_later_life_is_news_whatever_became_of_the_former() {
        let mut members = Members::new();
        assert_eq!(members.get(C), member(1, MemberState::Active));
        assert!(members.learn(C, member(1, MemberState::Joining)), "nothing was said of it");
        assert!(members.learn(C, member(1, MemberState::Removed)));
        assert!(!members.learn(C, member(1, MemberState::Active)));
        assert!(members.learn(C, member(2, MemberState::Joining)));
        assert_eq!(members.actor(C), Actor { region: C, incarnation: 2 });
        assert!(!members.admit(Actor { region: C, incarnation: 1 }));
        assert!(members.admit(Actor { region: C, incarnation: 2 }));
    }

    #[test]
    fn one_who_has_not_heard_of_a_member_does_not_know_all() {
        let told: Members = [(C, member(1, MemberState::Joining))].into_iter().collect();
        assert!(!Members::new().know_all_of(&told), "though by default it would be a member");
        assert!(told.know_all_of(&Members::new()));
    }

    #[test]
    fn one_that_is_shut_out_counts_until_all_have_what_any_has_of_it() {
        let mut members = Members::new();
        members.learn(C, member(1, MemberState::Fenced));
        let mut fences = FenceTold::default();
        let (b, c) = (members.actor(B), members.actor(C));
        let count =
            |local: &VersionVector, fences: &FenceTold| counted([B, C], &members, local, fences);
        assert_eq!(count(&of_c(9), &fences), [b, c], "B has not said so");
        fences.tell(b, &of_c(7), &Members::new());
        assert_eq!(count(&of_c(9), &fences), [b, c], "B has not shut it out");
        fences.tell(b, &of_c(7), &members);
        assert_eq!(count(&of_c(6), &fences), [b, c], "B has more");
        assert_eq!(count(&of_c(7), &fences), [b]);
        assert_eq!(counted([C], &members, &of_c(0), &FenceTold::default()), [], "nobody else");
        assert_eq!(A, RegionId(1));
    }

    #[test]
    fn what_was_told_before_another_was_shut_out_or_in_a_former_life_settles_nothing() {
        let mut members = Members::new();
        members.learn(C, member(1, MemberState::Fenced));
        let mut fences = FenceTold::default();
        let a = members.actor(A);
        fences.tell(a, &of_c(7), &members);
        let count = |members: &Members, fences: &FenceTold| {
            counted([A, B, C], members, &of_c(7), fences).len()
        };
        let told_by_b = |members: &Members| {
            let mut fences = fences.clone();
            fences.tell(members.actor(B), &of_c(7), members);
            fences
        };
        assert_eq!(count(&members, &told_by_b(&members)), 2, "C is settled");
        let mut more = members.clone();
        more.learn(B, member(1, MemberState::Fenced));
        assert_eq!(count(&more, &fences), 3, "B may pass on to A what C wrote");
        let mut again = members.clone();
        again.learn(C, member(2, MemberState::Fenced));
        assert_eq!(count(&again, &told_by_b(&members)), 3, "of the life before");
    }
}
