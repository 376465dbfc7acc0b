//! Linearizability: whether what several clients were told at once can be explained by one order of their calls, in which
//! each happened at some moment between its beginning and its end.
//!
//! The search is Wing and Gong's, with Lowe's memory: a configuration (which calls have happened, and the state that they left)
//! is looked at once. It differs from the textbook in three ways, for the sake of file systems:
//! - a call may have had *no* effect (its client died, or was told of an error), or any that it could have had;
//! - a call may consist of *several* acts, each at a moment of its own, where the kernel makes it so (`link` looks up one name
//!   and makes the other), and there may be several ways to explain it;
//! - an act may leave one of *several* states (what a crash keeps).
//!
//! `stateright`'s tester was considered: it knows none of the three, and remembers no configuration.
//!
//! Excludes: what the calls mean (`history`).

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

/// What is right for one client at a time.
pub trait Spec {
    /// All that acts depend on.
    type State: Clone;
    /// What happens at one moment, with what was answered.
    type Act;
    /// The states that an act may leave. None: with this answer it cannot have happened there.
    fn apply(&self, state: &Self::State, act: &Self::Act) -> Vec<Self::State>;
    /// Equal for states that no act tells apart.
    fn fingerprint(&self, state: &Self::State, hasher: &mut DefaultHasher);
}

/// A call, as a client saw it.
#[derive(Clone, Debug)]
pub struct Call<A> {
    /// Before this moment it had no effect. All moments of a history differ.
    pub begun: u64,
    /// From this moment on it had none.
    pub ended: u64,
    /// Whether it happened for sure.
    pub must: bool,
    /// The ways in which it can have happened: acts, in their order.
    pub ways: Vec<Vec<A>>,
}

/// What the search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order.
    Linear {
        /// Configurations that were looked at.
        configurations: usize,
    },
    /// There is none.
    Wrong {
        /// Calls of the longest attempt, in its order.
        explained: Vec<usize>,
        /// Calls that could have come next, none of which fits.
        stuck: Vec<usize>,
    },
    /// Too many configurations.
    Undecided,
}

struct Node<S> {
    state: S,
    done: Vec<u64>,
    /// Calls that have begun to happen: which, in which way, and their next act.
    under_way: Vec<(usize, usize, usize)>,
    /// The latest beginning of a call that has happened or begun to.
    latest: u64,
    /// Calls done that had to be.
    count: usize,
    last: Option<usize>,
    parent: Option<Rc<Node<S>>>,
}

/// What is to be tried: from where, which call, in which way, and which act of it.
type Next<S> = (Rc<Node<S>>, usize, usize, usize);

impl<S> Node<S> {
    fn is_done(&self, call: usize) -> bool {
        self.done[call / 64] >> (call % 64) & 1 == 1
    }

    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = self.last.into_iter().collect();
        let mut at = self.parent.clone();
        while let Some(node) = at {
            order.extend(node.last);
            at = node.parent.clone();
        }
        order.reverse();
        order.dedup();
        order
    }
}

/// Looks for an order.
pub fn check<P: Spec>(spec: &P, start: P::State, calls: &[Call<P::Act>], configurations_max: usize) -> Verdict {
    // Those that ended first are tried first: the order is mostly that.
    let mut by_end: Vec<usize> = (0..calls.len()).collect();
    by_end.sort_by_key(|call| std::cmp::Reverse(calls[*call].ended));
    let required = calls.iter().filter(|call| call.must).count();
    let candidates = |node: &Node<P::State>| -> Vec<usize> {
        let unfinished = |call: &&usize| !node.is_done(**call);
        let open = by_end.iter().filter(unfinished);
        let horizon = open.clone().filter(|c| calls[**c].must).map(|c| calls[*c].ended).min().unwrap_or(u64::MAX);
        open.filter(|c| calls[**c].begun < horizon && node.latest < calls[**c].ended).copied().collect()
    };
    let mut seen = HashSet::new();
    let mut work: Vec<Next<P::State>> = Vec::new();
    let expand = |node: &Rc<Node<P::State>>, work: &mut Vec<Next<P::State>>| {
        for call in candidates(node) {
            match node.under_way.iter().find(|(c, _, _)| *c == call) {
                Some((_, way, act)) => work.push((node.clone(), call, *way, *act)),
                None => (0..calls[call].ways.len()).rev().for_each(|way| work.push((node.clone(), call, way, 0))),
            }
        }
    };
    let words = calls.len().div_ceil(64);
    let root = Node { state: start, done: vec![0; words], under_way: vec![], latest: 0, count: 0, last: None, parent: None };
    let mut furthest = Rc::new(root);
    if required == 0 {
        return Verdict::Linear { configurations: 0 };
    }
    expand(&furthest, &mut work);
    while let Some((node, call, way, act)) = work.pop() {
        let acts = &calls[call].ways[way];
        for state in spec.apply(&node.state, &acts[act]) {
            let (mut done, mut under_way, mut count) = (node.done.clone(), node.under_way.clone(), node.count);
            under_way.retain(|(c, _, _)| *c != call);
            if act + 1 == acts.len() {
                done[call / 64] |= 1 << (call % 64);
                count += usize::from(calls[call].must);
            } else {
                under_way.push((call, way, act + 1));
                under_way.sort_unstable();
            }
            if count == required {
                return Verdict::Linear { configurations: seen.len() + 1 };
            }
            // A collision would call a good history wrong: 128 bits make that a matter of theory.
            let key = [1u8, 2].map(|seed| {
                let mut hasher = DefaultHasher::new();
                (seed, &done, &under_way).hash(&mut hasher);
                spec.fingerprint(&state, &mut hasher);
                hasher.finish()
            });
            if !seen.insert(key) {
                continue;
            }
            if seen.len() > configurations_max {
                return Verdict::Undecided;
            }
            let latest = node.latest.max(calls[call].begun);
            let next = Rc::new(Node { state, done, under_way, latest, count, last: Some(call), parent: Some(node.clone()) });
            if next.count > furthest.count {
                furthest = next.clone();
            }
            expand(&next, &mut work);
        }
    }
    Verdict::Wrong { explained: furthest.order(), stuck: candidates(&furthest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One number.
    struct Number;

    #[derive(Clone, Debug)]
    enum Act {
        Set(u32),
        Get(u32),
        /// A crash: the number, or none.
        Forget,
    }

    impl Spec for Number {
        type State = u32;
        type Act = Act;
        fn apply(&self, state: &u32, act: &Act) -> Vec<u32> {
            match act {
                Act::Set(n) => vec![*n],
                Act::Get(n) if n == state => vec![*n],
                Act::Get(_) => vec![],
                Act::Forget => vec![*state, 0],
            }
        }
        fn fingerprint(&self, state: &u32, hasher: &mut DefaultHasher) {
            state.hash(hasher);
        }
    }

    fn call(begun: u64, ended: u64, acts: &[Act]) -> Call<Act> {
        Call { begun, ended, must: true, ways: vec![acts.to_vec()] }
    }

    fn linear(calls: &[Call<Act>]) -> bool {
        match check(&Number, 0, calls, 1 << 20) {
            Verdict::Linear { .. } => true,
            Verdict::Wrong { .. } => false,
            Verdict::Undecided => panic!("undecided"),
        }
    }

    #[test]
    fn reads_do_not_go_back_but_calls_at_once_may_come_in_any_order() {
        use Act::{Get, Set};
        assert!(linear(&[call(1, 4, &[Set(1)]), call(2, 3, &[Get(0)]), call(5, 6, &[Get(1)])]));
        assert!(linear(&[call(1, 6, &[Set(1)]), call(2, 3, &[Get(0)]), call(4, 5, &[Get(1)])]));
        assert!(!linear(&[call(1, 6, &[Set(1)]), call(2, 3, &[Get(1)]), call(4, 5, &[Get(0)])]), "went back");
        assert!(!linear(&[call(1, 2, &[Set(1)]), call(3, 4, &[Get(0)])]), "stale");
        assert!(!linear(&[call(1, 2, &[Get(1)]), call(3, 4, &[Set(1)])]), "from the future");
        assert!(linear(&[call(1, 5, &[Set(1)]), call(2, 6, &[Set(2)]), call(7, 8, &[Get(1)])]));
        assert!(!linear(&[call(1, 5, &[Set(1)]), call(2, 6, &[Set(2)]), call(7, 8, &[Get(1)]), call(9, 10, &[Get(2)])]));
    }

    #[test]
    fn a_call_that_may_not_have_happened_explains_both_but_only_while_it_lasted() {
        use Act::{Get, Set};
        let maybe = Call { must: false, ..call(1, 4, &[Set(1)]) };
        assert!(linear(&[maybe.clone(), call(5, 6, &[Get(0)])]));
        assert!(linear(&[maybe.clone(), call(5, 6, &[Get(1)])]));
        assert!(!linear(&[maybe.clone(), call(5, 6, &[Get(1)]), call(7, 8, &[Get(0)])]));
        assert!(!linear(&[maybe.clone(), call(5, 6, &[Get(0)]), call(7, 8, &[Get(1)])]), "too late");
        let endless = Call { ended: u64::MAX, ..maybe };
        assert!(linear(&[endless, call(5, 6, &[Get(0)]), call(7, 8, &[Get(1)])]));
    }

    #[test]
    fn a_call_of_two_acts_lets_others_in_between_and_a_crash_leaves_either_state() {
        use Act::{Forget, Get, Set};
        assert!(linear(&[call(1, 6, &[Get(0), Get(1)]), call(2, 3, &[Set(1)])]));
        assert!(!linear(&[call(4, 6, &[Get(0), Get(1)]), call(2, 3, &[Set(1)])]));
        let crash = |begun| Call { must: false, ..call(begun, begun + 1, &[Forget]) };
        assert!(linear(&[call(1, 2, &[Set(1)]), crash(3), call(5, 6, &[Get(0)])]));
        assert!(linear(&[call(1, 2, &[Set(1)]), crash(3), call(5, 6, &[Get(1)])]));
        assert!(!linear(&[call(1, 2, &[Set(1)]), crash(3), call(5, 6, &[Get(1)]), call(7, 8, &[Get(0)])]));
    }

    /// Eight clients at once, 20 times: without a memory of configurations this would not end.
    #[test]
    fn many_calls_at_once_are_decided() {
        let mut calls = Vec::new();
        for round in 0..20u64 {
            let base = round * 100;
            calls.extend((0..8u64).map(|n| call(base + n, base + 50 + n, &[Act::Set(n as u32 % 3)])));
            calls.push(call(base + 90, base + 91, &[Act::Get(round as u32 % 3)]));
        }
        assert!(linear(&calls));
        calls.push(call(9000, 9001, &[Act::Get(7)]));
        assert!(!linear(&calls));
    }
}
