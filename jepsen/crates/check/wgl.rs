//! Linearizability of one register: the algorithm of Wing and Gong with Lowe's cache of
//! configurations ("Testing for linearizability", 2017).
//!
//! Calls and returns lie in one list, by time. The search takes a call whose effect the register's
//! present state allows, lifts it and its return out of the list, and goes on from the front; at a
//! return that is still in the list it must undo. A configuration, which is the set of calls taken
//! and the state, is visited once. A set is remembered by the XOR of one random 128-bit word a
//! call; a collision (about n²/2¹²⁹) could only cause a false alarm.
//!
//! Calls without a return may be taken at any time or never; the search is over when all others
//! are placed.
//!
//! Not here: reading calls out of a history (`register`).

use std::collections::HashSet;

/// Steps after which [`judge`] gives up, about a second of work.
pub const STEPS: u64 = 20_000_000;

/// What a call does to a register, and what its client was told. No value means absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Showed this.
    Read(Option<u64>),
    /// Stored this.
    Write(u64),
    /// Found the first, stored the second.
    Cas(Option<u64>, u64),
    /// Wanted to find the first and found the second.
    Refused(Option<u64>, Option<u64>),
    /// Made it absent.
    Delete,
}

impl Action {
    /// The state after it; none where it could not have ended as it did.
    fn step(self, state: Option<u64>) -> Option<Option<u64>> {
        match self {
            Self::Read(seen) => (seen == state).then_some(state),
            Self::Write(value) => Some(Some(value)),
            Self::Cas(expected, value) => (expected == state).then_some(Some(value)),
            Self::Refused(expected, actual) => {
                (actual == state && expected != state).then_some(state)
            }
            Self::Delete => Some(None),
        }
    }
}

/// One call on a register.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// What it did.
    pub action: Action,
    /// When it began.
    pub call: u64,
    /// When it ended; `None` when nobody knows whether it did.
    pub ret: Option<u64>,
}

/// What the search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Some order explains everything.
    Linearizable,
    /// None does. `stuck` is the call that could not be placed when the most others were.
    Impossible {
        /// Position in the input.
        stuck: usize,
        /// How many calls were placed then.
        placed: usize,
    },
    /// The budget is used up.
    GaveUp,
}

/// Whether some order of `calls`, which respects their times, explains what clients were told,
/// starting from an absent value. Takes at most `budget` steps, and memory in proportion.
#[must_use]
pub fn judge(calls: &[Call], budget: u64) -> Judgement {
    Search::new(calls).run(budget)
}

/// One place in the list of calls and returns.
#[derive(Clone, Copy)]
struct Entry {
    of: usize,
    is_return: bool,
}

struct Search<'a> {
    calls: &'a [Call],
    entries: Vec<Entry>,
    /// Neighbours in the list, shifted by one: 0 is the head.
    next: Vec<usize>,
    prev: Vec<usize>,
    /// Where each call and each return lie.
    call_at: Vec<usize>,
    return_at: Vec<Option<usize>>,
    words: Vec<u128>,
}

impl<'a> Search<'a> {
    fn new(calls: &'a [Call]) -> Self {
        let mut order: Vec<(u64, bool, usize)> = Vec::with_capacity(calls.len() * 2);
        for (of, call) in calls.iter().enumerate() {
            order.push((call.call, false, of));
            order.extend(call.ret.map(|ret| (ret, true, of)));
        }
        // Calls before returns of the same time: they overlap.
        order.sort_unstable();
        let mut call_at = vec![0; calls.len()];
        let mut return_at = vec![None; calls.len()];
        for (position, (_, is_return, of)) in order.iter().enumerate() {
            if *is_return {
                return_at[*of] = Some(position + 1);
            } else {
                call_at[*of] = position + 1;
            }
        }
        let entries: Vec<Entry> = order
            .iter()
            .map(|(_, is_return, of)| Entry { of: *of, is_return: *is_return })
            .collect();
        let end = entries.len() + 1;
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        let mut word = || u128::from(split_mix(&mut seed)) << 64 | u128::from(split_mix(&mut seed));
        Self {
            calls,
            next: (1..=end).chain([end]).collect(),
            prev: [0].into_iter().chain(0..end).collect(),
            entries,
            call_at,
            return_at,
            words: calls.iter().map(|_| word()).collect(),
        }
    }

    fn run(mut self, budget: u64) -> Judgement {
        let end = self.entries.len() + 1;
        let mut missing = self.calls.iter().filter(|call| call.ret.is_some()).count();
        let (mut state, mut taken) = (None, 0u128);
        let mut undo: Vec<(usize, Option<u64>)> = Vec::new();
        let mut seen: HashSet<(u128, Option<u64>)> = HashSet::new();
        let mut furthest = (0, 0);
        let mut at = self.next[0];
        let mut steps = 0;
        while missing > 0 {
            steps += 1;
            if steps > budget {
                return Judgement::GaveUp;
            }
            // A return that is not lifted lies before the end as long as one is missing.
            assert!(at < end, "fell off the list with {missing} calls missing");
            let Entry { of, is_return } = self.entries[at - 1];
            if !is_return {
                let next_state = self.calls[of].action.step(state);
                let after = next_state.map(|next| (taken ^ self.words[of], next));
                match after {
                    Some(after) if seen.insert(after) => {
                        undo.push((of, state));
                        (taken, state) = after;
                        missing -= usize::from(self.calls[of].ret.is_some());
                        self.lift(of);
                        at = self.next[0];
                    }
                    Some(_) | None => at = self.next[at],
                }
                continue;
            }
            if undo.len() >= furthest.1 {
                furthest = (of, undo.len());
            }
            let Some((last, before)) = undo.pop() else {
                return Judgement::Impossible { stuck: furthest.0, placed: furthest.1 };
            };
            self.unlift(last);
            state = before;
            taken ^= self.words[last];
            missing += usize::from(self.calls[last].ret.is_some());
            at = self.next[self.call_at[last]];
        }
        Judgement::Linearizable
    }

    fn lift(&mut self, of: usize) {
        for at in [Some(self.call_at[of]), self.return_at[of]].into_iter().flatten() {
            let (before, after) = (self.prev[at], self.next[at]);
            self.next[before] = after;
            self.prev[after] = before;
        }
    }

    /// Must undo the latest [`Self::lift`] first.
    fn unlift(&mut self, of: usize) {
        for at in [self.return_at[of], Some(self.call_at[of])].into_iter().flatten() {
            let (before, after) = (self.prev[at], self.next[at]);
            self.next[before] = at;
            self.prev[after] = at;
        }
    }
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
pub(crate) fn split_mix(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *seed;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(action: Action, call: u64, ret: impl Into<Option<u64>>) -> Call {
        Call { action, call, ret: ret.into() }
    }

    fn linearizable(calls: &[Call]) -> bool {
        match judge(calls, STEPS) {
            Judgement::Linearizable => true,
            Judgement::Impossible { .. } => false,
            Judgement::GaveUp => panic!("gave up"),
        }
    }

    #[test]
    fn an_overlapping_write_may_or_may_not_be_seen() {
        for seen in [None, Some(1)] {
            let read = call(Action::Read(seen), 2, 3);
            assert!(linearizable(&[call(Action::Write(1), 1, 4), read]));
        }
        assert!(!linearizable(&[
            call(Action::Write(1), 1, 9),
            call(Action::Read(Some(1)), 2, 3),
            call(Action::Read(None), 4, 5),
        ]));
    }

    #[test]
    fn an_open_write_may_take_effect_late_once_or_never() {
        let open = call(Action::Write(1), 1, None);
        let (two, one) = (call(Action::Write(2), 2, 3), call(Action::Read(Some(1)), 6, 7));
        assert!(linearizable(&[open, two, call(Action::Read(Some(2)), 4, 5), one]));
        assert!(linearizable(&[open, two]));
        assert!(!linearizable(&[open, two, one, call(Action::Read(Some(2)), 8, 9)]));
    }

    #[test]
    fn a_compare_and_set_observes_also_when_refused() {
        let write = call(Action::Write(1), 1, 2);
        assert!(linearizable(&[write, call(Action::Cas(Some(1), 2), 3, 4)]));
        assert!(!linearizable(&[write, call(Action::Cas(Some(2), 3), 3, 4)]));
        assert!(linearizable(&[write, call(Action::Refused(Some(2), Some(1)), 3, 4)]));
        assert!(!linearizable(&[write, call(Action::Refused(Some(1), Some(1)), 3, 4)]));
        assert!(!linearizable(&[write, call(Action::Refused(Some(2), None), 3, 4)]));
    }

    #[test]
    fn deleting_makes_absent() {
        let (write, delete) = (call(Action::Write(1), 1, 2), call(Action::Delete, 3, 4));
        assert!(linearizable(&[write, delete, call(Action::Read(None), 5, 6)]));
        assert!(!linearizable(&[write, delete, call(Action::Read(Some(1)), 5, 6)]));
    }

    #[test]
    fn a_used_up_budget_is_no_verdict() {
        let calls: Vec<Call> = (0..12).map(|value| call(Action::Write(value), 0, 100)).collect();
        let read = call(Action::Read(Some(99)), 200, 201);
        let all: Vec<Call> = calls.into_iter().chain([read]).collect();
        assert_eq!(judge(&all, 1000), Judgement::GaveUp);
        assert!(matches!(judge(&all, STEPS), Judgement::Impossible { stuck: 12, placed: 12 }));
    }

    /// Tries every order: slow, and simple enough to be right.
    fn by_brute_force(calls: &[Call], done: u32, state: Option<u64>) -> bool {
        let open = |of: usize| done & (1 << of) == 0;
        let known = |of: &usize| calls[*of].ret.is_some();
        if !(0..calls.len()).filter(|of| known(of)).any(open) {
            return true;
        }
        (0..calls.len()).filter(|of| open(*of)).any(|of| {
            let first = (0..calls.len())
                .filter(|other| open(*other) && *other != of)
                .all(|other| calls[other].ret.is_none_or(|ret| ret >= calls[of].call));
            let next = calls[of].action.step(state);
            first && next.is_some_and(|next| by_brute_force(calls, done | 1 << of, next))
        })
    }

    #[test]
    fn the_search_agrees_with_trying_every_order() {
        let mut seed = 1;
        let mut impossible = 0;
        for _ in 0..20_000 {
            let calls: Vec<Call> = (0..2 + split_mix(&mut seed) % 6)
                .map(|_| {
                    let mut pick = |bound: u64| split_mix(&mut seed) % bound;
                    let mut value = || pick(4).checked_sub(1);
                    let (one, other) = (value(), value());
                    let action = match pick(5) {
                        0 => Action::Write(one.unwrap_or(3)),
                        1 => Action::Cas(one, other.unwrap_or(3)),
                        2 => Action::Refused(one, other),
                        3 => Action::Delete,
                        _ => Action::Read(one),
                    };
                    let begin = pick(20);
                    let end = (pick(8) > 0).then(|| begin + 1 + pick(12));
                    call(action, begin, end)
                })
                .collect();
            let expected = by_brute_force(&calls, 0, None);
            impossible += u32::from(!expected);
            assert_eq!(linearizable(&calls), expected, "{calls:?}");
        }
        assert!((2_000..18_000).contains(&impossible), "{impossible} of 20000 were impossible");
    }
}
