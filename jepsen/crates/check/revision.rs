//! A second look at registers, by the positions that the server itself gives: what a call was told
//! must not lie before what an earlier call, which had ended, was told.
//!
//! It takes O(n log n) and names the two calls. It trusts the server's numbers for the order, so it
//! is no substitute for the search (`wgl`); where both look, they must agree.

use crate::op::{Op, Outcome};
use tombolo_jepsen_history::Revision;

/// A call and an earlier one that was told a later position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WentBack<'a> {
    pub(crate) earlier: &'a Op,
    pub(crate) later: &'a Op,
}

/// The first call of a key that was told of an older state than a call which had ended before it
/// began. Calls without a position are left out.
pub(crate) fn went_back<'a>(ops: &[&'a Op]) -> Option<WentBack<'a>> {
    let mut placed: Vec<(&Op, Revision, u64)> = ops
        .iter()
        .filter(|op| op.outcome == Outcome::Ok)
        .filter_map(|op| Some((*op, op.facts.rev?, op.ret?)))
        .collect();
    let mut ended = placed.clone();
    placed.sort_by_key(|(op, _, _)| op.call);
    ended.sort_by_key(|(_, _, ret)| *ret);
    let mut ended = ended.into_iter().peekable();
    let mut newest: Option<(&Op, Revision)> = None;
    for (later, revision, _) in placed {
        while let Some((op, revision, _)) = ended.next_if(|(_, _, ret)| *ret < later.call) {
            if newest.is_none_or(|(_, known)| known < revision) {
                newest = Some((op, revision));
            }
        }
        match newest {
            Some((earlier, known)) if revision < known => return Some(WentBack { earlier, later }),
            Some(_) | None => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use tombolo_jepsen_history::Facts;

    fn op(call: u64, ret: u64, term: u64, index: u64) -> Op {
        let rev = Some(Revision { shard: 1, term, index });
        Op {
            process: 0,
            f: "read".into(),
            key: "k".into(),
            call,
            ret: Some(ret),
            outcome: Outcome::Ok,
            input: Value::Null,
            output: Value::Null,
            facts: Facts { rev, ..Facts::default() },
        }
    }

    #[test]
    fn only_calls_that_had_ended_before_count() {
        let (old, new) = (op(5, 9, 1, 7), op(1, 4, 1, 8));
        let found = went_back(&[&old, &new]).expect("8 was told before 7");
        assert_eq!((found.earlier.call, found.later.call), (1, 5));

        let overlapping = op(4, 9, 1, 7);
        assert!(went_back(&[&overlapping, &new]).is_none());
        let later_term = op(5, 9, 2, 8);
        assert!(went_back(&[&later_term, &new]).is_none());
    }
}
