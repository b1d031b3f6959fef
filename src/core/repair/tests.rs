//! What a merge decides, and that offers and leaves say what they should.

use proptest::prelude::*;

use super::*;
use crate::{
    hlc::HybridTime,
    id::{Actor, RegionId},
    record::Content,
    vector::tests::any_vector,
};

const US: Actor = actor(1);
const EU: Actor = actor(2);

const fn actor(region: u16) -> Actor {
    Actor { region: RegionId(region), incarnation: 1 }
}

fn vector(us: u64, eu: u64) -> VersionVector {
    [(US, us), (EU, eu)].into_iter().collect()
}

fn sibling(actor: Actor, seq: u64, wall: u64, value: &str) -> Sibling {
    let time = HybridTime::new(wall, 0).unwrap();
    let content = match value {
        "" => Content::Tombstone,
        value => Content::value(value.to_owned()),
    };
    Sibling { dot: Dot { actor, seq }, time, request: None, content }
}

fn record(context: VersionVector, siblings: Vec<Sibling>) -> Record {
    Record::resolved(context, siblings, Rule::Siblings).0
}

fn offer(theirs: &Record, known: &VersionVector) -> Offer {
    Offer::new(Bytes::from_static(b"k"), theirs, known)
}

fn dots(record: &Record) -> Vec<Dot> {
    record.siblings().iter().map(|held| held.dot).collect()
}

pub(crate) fn any_offer() -> impl Strategy<Value = Offer> {
    let change = crate::change::tests::any_change();
    (prop::collection::vec(any::<u8>(), 0..9), change, any_vector()).prop_map(
        |(key, change, known)| {
            let mut context = VersionVector::new();
            context.add(change.last());
            let siblings = change.deltas.into_iter().map(|delta| delta.sibling).collect();
            let record = Record::resolved(context, siblings, Rule::Lww).0;
            Offer::new(key.into(), &record, &known)
        },
    )
}

#[test]
fn what_one_side_lacks_and_has_applied_is_gone_and_what_it_has_not_applied_stays() {
    let mine = record(vector(3, 0), vec![sibling(US, 1, 1, "old"), sibling(US, 3, 1, "new")]);
    let theirs = record(vector(2, 5), vec![sibling(EU, 4, 1, "gone"), sibling(EU, 5, 1, "new")]);
    // The other side has seen us's first two writes, this one eu's first four.
    let (applied, cut) = (vector(3, 4), vector(2, 5));
    let sides = Sides { applied: &applied, cut: &cut, trust: Trust::Coverage };
    let (merged, dropped) = merge(&mine, &offer(&theirs, &applied), sides, Rule::Siblings).unwrap();
    assert_eq!(dots(&merged), [Dot { actor: US, seq: 3 }, Dot { actor: EU, seq: 5 }]);
    assert_eq!(*merged.context(), vector(3, 5));
    assert!(dropped.is_empty());
}

#[test]
fn concurrent_values_meet_under_lww_and_the_loser_is_reported() {
    let mine = record(vector(1, 0), vec![sibling(US, 1, 9, "later")]);
    let theirs = record(vector(0, 1), vec![sibling(EU, 1, 5, "earlier")]);
    let (applied, cut) = (vector(1, 0), vector(0, 1));
    let sides = Sides { applied: &applied, cut: &cut, trust: Trust::Coverage };
    let (merged, dropped) = merge(&mine, &offer(&theirs, &applied), sides, Rule::Lww).unwrap();
    assert_eq!(dots(&merged), [Dot { actor: US, seq: 1 }]);
    assert_eq!(dropped.len(), 1);
    assert_eq!(dropped[0].loser.dot, Dot { actor: EU, seq: 1 });
}

#[test]
fn a_value_travels_only_where_its_write_is_not_applied() {
    let theirs = record(vector(4, 5), vec![sibling(US, 4, 1, "u"), sibling(EU, 5, 1, "e")]);
    let offer = offer(&theirs, &vector(4, 4));
    assert_eq!(offer.siblings[0], Offered::Known(Dot { actor: US, seq: 4 }));
    assert_eq!(offer.siblings[1], Offered::Whole(sibling(EU, 5, 1, "e")));
}

#[test]
fn between_equal_frontiers_a_difference_is_damage_and_nothing_is_dropped() {
    let both = vector(3, 3);
    let mine = record(both.clone(), vec![sibling(US, 3, 1, "mine")]);
    let theirs = record(both.clone(), vec![sibling(EU, 3, 1, "theirs")]);
    let offer = offer(&theirs, &VersionVector::new());
    let sides = |trust| Sides { applied: &both, cut: &both, trust };
    let (kept, _) = merge(&mine, &offer, sides(Trust::Neither), Rule::Siblings).unwrap();
    assert_eq!(kept.siblings().len(), 2);
    let (dropped, _) = merge(&mine, &offer, sides(Trust::Coverage), Rule::Siblings).unwrap();
    assert!(dropped.siblings().is_empty());
}

#[test]
fn absence_of_a_value_takes_away_no_tombstone() {
    // Compared while the value was here; then the deletion came.
    let tombstone = sibling(EU, 1, 9, "");
    let mine = Record::resolved(vector(1, 1), vec![tombstone.clone()], Rule::Lww).0;
    let both = vector(1, 1);
    let sides = Sides { applied: &both, cut: &both, trust: Trust::Coverage };
    let absent = Offer::absent(Bytes::from_static(b"k"));
    let (merged, _) = merge(&mine, &absent, sides, Rule::Lww).unwrap();
    assert_eq!(merged.siblings(), [tombstone]);
    let value = Record::resolved(vector(1, 0), vec![sibling(US, 1, 5, "v")], Rule::Lww).0;
    let (merged, _) = merge(&value, &absent, sides, Rule::Lww).unwrap();
    assert!(merged.siblings().is_empty());
}

#[test]
fn two_writes_under_one_dot_are_refused() {
    let mine = record(vector(1, 0), vec![sibling(US, 1, 1, "first life")]);
    let theirs = record(vector(1, 0), vec![sibling(US, 1, 1, "second life")]);
    let nothing = VersionVector::new();
    let sides = Sides { applied: &nothing, cut: &nothing, trust: Trust::Coverage };
    let merged = merge(&mine, &offer(&theirs, &nothing), sides, Rule::Siblings);
    assert_eq!(merged, Err(DotReused(Dot { actor: US, seq: 1 })));
}

#[test]
fn a_leaf_is_answered_with_what_differs_and_what_is_not_known() {
    let held = |key: &'static str, seq| {
        (Bytes::from(key), record(vector(seq, 0), vec![sibling(US, seq, 1, "v")]))
    };
    let source = [held("same", 1), held("newer", 4), held("added", 5)];
    let receiver = [held("same", 1), held("newer", 2), held("deleted", 3)];
    let listed: Vec<(Bytes, u64)> =
        receiver.iter().map(|(key, record)| (key.clone(), digest(key, record))).collect();
    let digests = listed.iter().map(|(_, digest)| *digest).collect();
    let answer = answer_leaf(&source, digests, &vector(3, 0));
    let offered: Vec<_> = answer.offers.iter().map(|offer| offer.key.clone()).collect();
    assert_eq!(offered, ["newer", "added"]);
    assert_eq!(answer.unknown.len(), 2);
    assert_eq!(
        absent_offers(&listed, &offered, &answer.unknown),
        [Offer::absent("deleted".into())]
    );
}

proptest! {
    #[test]
    fn offer_reads_back(offer in any_offer()) {
        prop_assert_eq!(Offer::from_bytes(offer.to_bytes()), Ok(offer));
    }

    #[test]
    fn a_cut_or_noisy_offer_is_an_error_and_never_a_panic(offer in any_offer(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let bytes = offer.to_bytes();
        let at = at.index(bytes.len());
        prop_assert!(Offer::from_bytes(bytes.slice(..at)).is_err());
        let mut flipped = bytes.to_vec();
        flipped[at] ^= flip;
        let _ = Offer::from_bytes(flipped.into());
    }
}
