//! Lock master: the locks of the objects that hash to this node, and who waits for them. Pure.
//!
//! Invariants:
//! - In an epoch nothing is granted before every member has re-asserted what it holds.
//! - No lock of a life that is not a member of the epoch is held or waited for.
//! - A request waits only while it conflicts with a lock that is held, and waiters are looked at in the order of arrival.
//!
//! Excludes: which node is the master of what (`placement`), and what a client remembers (`client`).

use super::message::{Chase, LockAnswer, LockMessage, LockOwner, LockRequest, LockTarget, Wait};
use super::table::{HeldLock, LockKind, LockRange, LockTable};
use cluster::{Epoch, Incarnation, NodeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The most requests that may wait in one master; further ones are refused as conflicts at once.
pub const WAITERS_MAX: usize = 65_536;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Waiter {
    owner: LockOwner,
    ticket: u64,
    range: LockRange,
    kind: LockKind,
    pid: u32,
    wait: Wait,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Locked {
    table: LockTable<LockOwner>,
    waiters: VecDeque<Waiter>,
}

/// A message that came too early, and from whom.
pub type Early = (NodeId, LockMessage);

/// The master's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LockMaster {
    epoch: Epoch,
    members: BTreeMap<NodeId, Incarnation>,
    /// Members that have not yet re-asserted everything.
    missing: BTreeSet<NodeId>,
    targets: BTreeMap<LockTarget, Locked>,
    /// Answers that may not have arrived: a repeated request gets the same one. (A second "unlock" carried out after the
    /// lock that followed it would take that lock away.)
    answers: BTreeMap<(NodeId, u64), LockAnswer>,
    waiting: usize,
}

/// What the shell must send.
pub type LockSends = Vec<(NodeId, LockMessage)>;

impl LockMaster {
    /// A new epoch begins: everything is forgotten, to be re-asserted by its members.
    pub fn begin_epoch(&mut self, epoch: Epoch, members: BTreeMap<NodeId, Incarnation>) {
        self.epoch = epoch;
        self.missing = members.keys().copied().collect();
        self.members = members;
        self.targets.clear();
        self.answers.clear();
        self.waiting = 0;
    }

    /// Whether every member has re-asserted its locks.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.missing.is_empty()
    }

    /// The epoch it is in.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// A message for the master. What came too early for it (a sender is ahead in its epoch, or not everybody has
    /// re-asserted) is given back, to be brought again later in the same order; what is late is dropped: it is repeated.
    pub fn receive(&mut self, from: NodeId, message: LockMessage, out: &mut LockSends) -> Option<Early> {
        match message {
            LockMessage::Reassert { epoch, .. } | LockMessage::Request { epoch, .. } | LockMessage::Waits { epoch, .. }
                if epoch > self.epoch =>
            {
                Some((from, message))
            }
            LockMessage::Reassert { epoch, incarnation, locks, pending, last } => {
                if epoch == self.epoch && self.members.get(&from) == Some(&incarnation) {
                    self.answers.retain(|(node, ticket), _| *node != from || pending.binary_search(ticket).is_ok());
                    self.reassert(from, incarnation, locks, last);
                }
                None
            }
            LockMessage::Request { epoch, owner, .. }
                if epoch != self.epoch || owner.node != from || self.members.get(&from) != Some(&owner.incarnation) =>
            {
                None
            }
            LockMessage::Request { .. } if !self.recovered() => Some((from, message)),
            LockMessage::Request { ticket, target, owner, range, request, answered, .. } => {
                for t in answered {
                    self.answers.remove(&(from, t));
                }
                if let Some(answer) = self.answers.get(&(from, ticket)).filter(|_| request != LockRequest::Cancel) {
                    out.push((from, LockMessage::Answer { epoch: self.epoch, ticket, answer: answer.clone() }));
                } else if range.start <= range.end {
                    self.request(target, owner, ticket, range, request, out);
                }
                None
            }
            LockMessage::Waits { epoch, .. } if epoch != self.epoch => None,
            LockMessage::Waits { .. } if !self.recovered() => Some((from, message)),
            LockMessage::Waits { chase, target, ticket, .. } => {
                self.chase(chase, target, from, ticket, out);
                None
            }
            LockMessage::Answer { .. }
            | LockMessage::InTheWay { .. }
            | LockMessage::Circle { .. }
            | LockMessage::Again { .. } => None,
        }
    }

    /// A search has come to a request that may be waiting here: it goes on with those who are in its way.
    fn chase(&self, chase: Chase, target: LockTarget, node: NodeId, ticket: u64, out: &mut LockSends) {
        let epoch = self.epoch;
        let Some(state) = self.targets.get(&target) else { return };
        let Some(waiter) = state.waiters.iter().find(|w| w.ticket == ticket && w.owner.node == node) else { return };
        let owners: BTreeSet<LockOwner> =
            state.table.conflicts(&waiter.owner, waiter.range, waiter.kind).map(|h| h.owner).collect();
        if owners.contains(&chase.owner) {
            let (owner, ticket) = chase.victim;
            out.push((owner.node, LockMessage::Circle { epoch, ticket }));
            return;
        }
        let mut nodes: BTreeMap<NodeId, Vec<u64>> = BTreeMap::new();
        for owner in owners {
            nodes.entry(owner.node).or_default().push(owner.id);
        }
        out.extend(nodes.into_iter().map(|(node, owners)| (node, LockMessage::InTheWay { epoch, chase, owners })));
    }

    /// Whether a request waits here; for checks.
    #[must_use]
    pub fn has_waiter(&self, node: NodeId, ticket: u64) -> bool {
        self.targets.values().flat_map(|o| &o.waiters).any(|w| w.owner.node == node && w.ticket == ticket)
    }

    /// Who waits for whom, of those who must not do so in a circle; for checks.
    #[must_use]
    pub fn waits(&self) -> Vec<(LockOwner, LockOwner)> {
        let edges = |o: &Locked| {
            let of = |w: &Waiter| o.table.conflicts(&w.owner, w.range, w.kind).map(|h| (w.owner, h.owner)).collect::<Vec<_>>();
            o.waiters.iter().filter(|w| w.wait == Wait::UnlessDeadlock).flat_map(of).collect::<Vec<_>>()
        };
        self.targets.values().flat_map(edges).collect()
    }

    fn reassert(&mut self, from: NodeId, life: Incarnation, locks: Vec<(LockTarget, HeldLock<LockOwner>)>, last: bool) {
        if !self.missing.contains(&from) {
            return;
        }
        for (target, lock) in locks {
            if lock.owner.node != from || lock.owner.incarnation != life || lock.range.start > lock.range.end {
                continue;
            }
            let table = &mut self.targets.entry(target).or_default().table;
            if table.conflict(&lock.owner, lock.range, lock.kind).is_none() {
                table.lock(lock);
            } else {
                debug_assert!(false, "two members re-assert conflicting locks on {target:?}");
            }
        }
        if last {
            self.missing.remove(&from);
        }
    }

    fn request(
        &mut self,
        target: LockTarget,
        owner: LockOwner,
        ticket: u64,
        range: LockRange,
        request: LockRequest,
        out: &mut LockSends,
    ) {
        let epoch = self.epoch;
        let state = self.targets.entry(target).or_default();
        let answers = &mut self.answers;
        let first = answers.get(&(owner.node, ticket)).cloned();
        let mut answer = |answer: LockAnswer| {
            answers.insert((owner.node, ticket), answer.clone());
            out.push((owner.node, LockMessage::Answer { epoch, ticket, answer }));
        };
        match request {
            LockRequest::Query { kind } => answer(match state.table.conflict(&owner, range, kind) {
                Some(held) => LockAnswer::Conflict(held.clone()),
                None => LockAnswer::Free,
            }),
            LockRequest::Unlock => {
                state.table.unlock(&owner, range);
                answer(LockAnswer::Done);
                self.grant(target, out);
            }
            LockRequest::Cancel => {
                let before = state.waiters.len();
                state.waiters.retain(|w| w.ticket != ticket || w.owner.node != owner.node);
                if state.waiters.len() < before {
                    self.waiting -= 1;
                    answer(LockAnswer::Cancelled);
                } else {
                    // Without a first answer the request was lost with its session, and only this arrived; or both are
                    // answered and forgotten.
                    answer(first.unwrap_or(LockAnswer::Cancelled));
                }
            }
            LockRequest::Lock { kind, pid, wait } => {
                if state.waiters.iter().any(|w| w.ticket == ticket && w.owner == owner) {
                    return;
                }
                match state.table.conflict(&owner, range, kind).cloned() {
                    None => {
                        state.table.lock(HeldLock { owner, range, kind, pid });
                        answer(LockAnswer::Done);
                        // A downgrade may let others in.
                        self.grant(target, out);
                    }
                    Some(held) if wait == Wait::No || self.waiting >= WAITERS_MAX => answer(LockAnswer::Conflict(held)),
                    Some(_) => {
                        state.waiters.push_back(Waiter { owner, ticket, range, kind, pid, wait });
                        self.waiting += 1;
                        if wait == Wait::UnlessDeadlock {
                            // A circle closes when its last owner begins to wait.
                            let chase = Chase { owner, ticket, round: 0, victim: (owner, ticket) };
                            self.chase(chase, target, owner.node, ticket, out);
                        }
                    }
                }
            }
        }
        if self.targets.get(&target).is_some_and(|o| o.table.is_empty() && o.waiters.is_empty()) {
            self.targets.remove(&target);
        }
    }

    /// Grants what no longer conflicts.
    fn grant(&mut self, target: LockTarget, out: &mut LockSends) {
        let epoch = self.epoch;
        let Some(Locked { table, waiters }) = self.targets.get_mut(&target) else { return };
        // Again and again: what is granted may replace a stronger lock of its owner, and so let in others.
        loop {
            let before = waiters.len();
            waiters.retain(|w| {
                if table.conflict(&w.owner, w.range, w.kind).is_some() {
                    return true;
                }
                table.lock(HeldLock { owner: w.owner, range: w.range, kind: w.kind, pid: w.pid });
                self.answers.insert((w.owner.node, w.ticket), LockAnswer::Done);
                out.push((w.owner.node, LockMessage::Answer { epoch, ticket: w.ticket, answer: LockAnswer::Done }));
                false
            });
            if waiters.len() == before {
                break;
            }
            self.waiting -= before - waiters.len();
        }
    }

    /// Panics if an invariant of this file is broken.
    pub fn check_invariants(&self) {
        let mut waiting = 0;
        for (target, state) in &self.targets {
            state.table.check_invariants();
            for h in state.table.held() {
                assert_eq!(self.members.get(&h.owner.node), Some(&h.owner.incarnation), "{target:?} is locked by a dead node");
            }
            for w in &state.waiters {
                assert!(state.table.conflict(&w.owner, w.range, w.kind).is_some(), "{target:?}: a waiter for a free lock");
            }
            waiting += state.waiters.len();
        }
        assert_eq!(waiting, self.waiting);
    }
}
