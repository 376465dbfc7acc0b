//! Cluster-wide byte-range locks (`fcntl`, `flock`).
//!
//! `fcntl` and `flock` do not meet: what is locked is a file in one of two spaces ([`LockTarget`]).
//!
//! Each object's locks are kept by its master (the same member that masters its token); a node remembers what its own
//! processes hold, and re-asserts it when an epoch begins, so that locks outlive every change but the end of their node.
//! A node that is cut off loses its locks with its membership.

pub mod client;
pub mod early;
pub mod master;
pub mod message;
pub mod table;

pub use client::{LockClient, LockOutput};
pub use early::Waiting;
pub use master::LockMaster;
pub use message::{Chase, LockAnswer, LockMessage, LockOwner, LockRequest, LockSpace, LockTarget, Wait};
pub use table::{HeldLock, LockKind, LockRange, LockTable};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ObjectId;
    use cluster::{Epoch, Incarnation, NodeId};
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    /// Three nodes, each a client and a master, messages in queues that a seeded schedule delivers or loses.
    struct World {
        random: u64,
        epoch: u64,
        up: BTreeMap<NodeId, Incarnation>,
        /// The epoch and members that a node has adopted, which may be behind.
        adopted: BTreeMap<NodeId, (u64, BTreeMap<NodeId, Incarnation>)>,
        clients: BTreeMap<NodeId, LockClient>,
        masters: BTreeMap<NodeId, LockMaster>,
        early: BTreeMap<NodeId, Waiting>,
        /// Times when a master had no room for what came early.
        dropped: u64,
        wire: BTreeMap<(NodeId, NodeId), VecDeque<LockMessage>>,
        /// Requests without an answer: whose, the client's ticket, and for which owner.
        open: BTreeMap<(NodeId, u64), u64>,
        granted: u64,
        deadlocks: u64,
        /// An owner that waits does nothing else, as a process with one thread.
        single: bool,
    }

    const NODES: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];

    fn master_of(up: &BTreeMap<NodeId, Incarnation>, object: ObjectId) -> NodeId {
        let ObjectId::Inode(n) = object else { unreachable!() };
        let members: Vec<NodeId> = up.keys().copied().collect();
        members[usize::try_from(n).unwrap() % members.len()]
    }

    impl World {
        fn new(seed: u64) -> World {
            Self::with_room(seed, usize::MAX)
        }

        /// `room`: for requests that come to a master early.
        fn with_room(seed: u64, room: usize) -> World {
            let mut w = World {
                random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
                epoch: 0,
                up: BTreeMap::new(),
                adopted: NODES.iter().map(|n| (*n, (0, BTreeMap::new()))).collect(),
                clients: NODES.iter().map(|n| (*n, LockClient::new(*n))).collect(),
                masters: NODES.iter().map(|n| (*n, LockMaster::default())).collect(),
                early: NODES.iter().map(|n| (*n, Waiting::new(room))).collect(),
                dropped: 0,
                wire: BTreeMap::new(),
                open: BTreeMap::new(),
                granted: 0,
                deadlocks: 0,
                single: false,
            };
            w.change(NODES.iter().map(|n| (*n, Incarnation(1))).collect());
            w
        }

        fn below(&mut self, n: usize) -> usize {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            usize::try_from(self.random % n as u64).unwrap()
        }

        fn perform(&mut self, node: NodeId, outputs: Vec<LockOutput>) {
            for output in outputs {
                match output {
                    LockOutput::Send(to, m) => self.wire.entry((node, to)).or_default().push_back(m),
                    LockOutput::Answered(ticket, answer) => {
                        assert!(self.open.remove(&(node, ticket)).is_some(), "a request was answered twice");
                        self.granted += u64::from(answer == LockAnswer::Done);
                        self.deadlocks += u64::from(answer == LockAnswer::Deadlock);
                    }
                    LockOutput::Lost(_) => {}
                }
            }
        }

        /// A new epoch is agreed on. Those who are out learn it at once (their lease is over, that is why they are out);
        /// the others when the schedule says so.
        fn change(&mut self, up: BTreeMap<NodeId, Incarnation>) {
            self.epoch += 1;
            self.up = up;
            for node in NODES {
                let life = self.adopted[&node].1.get(&node);
                if life.is_some() && life != self.up.get(&node) {
                    self.adopt(node);
                }
            }
        }

        fn adopt(&mut self, node: NodeId) {
            if self.adopted[&node].0 == self.epoch {
                return;
            }
            self.adopted.insert(node, (self.epoch, self.up.clone()));
            let mut out = Vec::new();
            if let Some(life) = self.up.get(&node) {
                self.masters.get_mut(&node).unwrap().begin_epoch(Epoch(self.epoch), self.up.clone());
                let members = self.up.keys().copied().collect();
                let place = self.up.clone();
                let client = self.clients.get_mut(&node).unwrap();
                client.begin_epoch(Epoch(self.epoch), *life, members, &|o| master_of(&place, o), &mut out);
            } else {
                self.clients.get_mut(&node).unwrap().lose(&mut out);
            }
            self.perform(node, out);
            self.retry_early(node);
        }

        fn retry_early(&mut self, node: NodeId) {
            self.bring(node, None);
        }

        fn bring(&mut self, node: NodeId, message: Option<(NodeId, LockMessage)>) {
            let mut sends = Vec::new();
            let master = self.masters.get_mut(&node).unwrap();
            self.dropped += u64::from(self.early.get_mut(&node).unwrap().bring(master, message, &mut sends));
            let outputs = sends.into_iter().map(|(n, m)| LockOutput::Send(n, m)).collect();
            self.perform(node, outputs);
        }

        fn is_in(&self, node: NodeId) -> bool {
            self.adopted[&node].1.contains_key(&node)
        }

        /// Delivers the next message of one direction.
        fn deliver(&mut self, from: NodeId, to: NodeId) {
            let Some(m) = self.wire.get_mut(&(from, to)).and_then(VecDeque::pop_front) else { return };
            if m.is_for_client() {
                if !self.is_in(to) {
                    return;
                }
                let mut out = Vec::new();
                let place = self.adopted[&to].1.clone();
                self.clients.get_mut(&to).unwrap().receive(from, m, &|o| master_of(&place, o), &mut out);
                return self.perform(to, out);
            }
            self.bring(to, Some((from, m)));
        }

        fn lose_session(&mut self, a: NodeId, b: NodeId) {
            self.wire.remove(&(a, b));
            self.wire.remove(&(b, a));
            for (node, peer) in [(a, b), (b, a)] {
                if self.is_in(node) {
                    let place = self.adopted[&node].1.clone();
                    let mut out = Vec::new();
                    self.clients.get_mut(&node).unwrap().session_ended(peer, &|o| master_of(&place, o), &mut out);
                    self.perform(node, out);
                }
            }
        }

        fn step(&mut self) {
            let node = NODES[self.below(3)];
            let peer = NODES[self.below(3)];
            match self.below(100) {
                0..=59 => self.deliver(node, peer),
                60..=64 => self.adopt(node),
                65..=90 => {
                    let object = ObjectId::Inode(self.below(3) as u64);
                    // Waiting for a flock closes no circle, and stops who could.
                    let space =
                        if self.below(if self.single { 16 } else { 4 }) == 0 { LockSpace::Flock } else { LockSpace::Record };
                    let (a, b) = (self.below(8) as u64, self.below(8) as u64);
                    let range = LockRange { start: a.min(b), end: a.max(b) };
                    let kind = if self.below(2) == 0 { LockKind::Read } else { LockKind::Write };
                    // Processes with one thread mostly take locks and wait, so that circles arise.
                    let request = match if self.single { [1, 1, 1, 3][self.below(4)] } else { self.below(5) } {
                        0 => LockRequest::Lock { kind, pid: 1, wait: Wait::No },
                        1 if space == LockSpace::Flock => LockRequest::Lock { kind, pid: 1, wait: Wait::Forever },
                        1 => LockRequest::Lock { kind, pid: 1, wait: Wait::UnlessDeadlock },
                        2 => LockRequest::Query { kind },
                        _ => LockRequest::Unlock,
                    };
                    let owner = self.below(2) as u64;
                    if self.single && self.open.iter().any(|((n, _), o)| *n == node && *o == owner) {
                        return;
                    }
                    let place = self.adopted[&node].1.clone();
                    let mut out = Vec::new();
                    let ticket = self.clients.get_mut(&node).unwrap().ask(
                        LockTarget { object, space },
                        owner,
                        range,
                        request,
                        &|o| master_of(&place, o),
                        &mut out,
                    );
                    self.open.insert((node, ticket), owner);
                    self.perform(node, out);
                }
                91..=95 => {
                    let waiting = self.open.keys().find(|(n, _)| *n == node).copied();
                    if let Some((_, ticket)) = waiting {
                        self.cancel(node, ticket);
                    }
                }
                96..=97 => self.lose_session(node, peer),
                98 => {
                    let mut up = self.up.clone();
                    if up.len() > 1 {
                        up.remove(&node);
                    }
                    self.change(up);
                }
                _ => {
                    // Everybody is let (back) in; those who were out come with a new life.
                    let up = NODES.iter().map(|n| (*n, self.up.get(n).copied().unwrap_or(Incarnation(self.epoch + 1)))).collect();
                    self.change(up);
                }
            }
            self.check();
        }

        fn cancel(&mut self, node: NodeId, ticket: u64) {
            let place = self.adopted[&node].1.clone();
            let mut out = Vec::new();
            self.clients.get_mut(&node).unwrap().cancel(ticket, &|o| master_of(&place, o), &mut out);
            self.perform(node, out);
        }

        /// No two members hold conflicting locks, as their own processes see it.
        fn check(&self) {
            let mut all: BTreeMap<LockTarget, LockTable<LockOwner>> = BTreeMap::new();
            for (node, client) in &self.clients {
                client.check_invariants();
                assert!(self.is_in(*node) || client.relied_on().is_empty(), "a node that is out holds locks");
                for (target, table) in &client.relied_on() {
                    for lock in table.held() {
                        let table = all.entry(*target).or_default();
                        if let Some(other) = table.conflict(&lock.owner, lock.range, lock.kind) {
                            panic!("{target:?}: {lock:?} and {other:?} in epoch {}", self.epoch);
                        }
                        table.lock(lock.clone());
                    }
                }
            }
            for node in self.up.keys() {
                self.masters[node].check_invariants();
            }
        }

        fn settle(&mut self) {
            self.change(NODES.iter().map(|n| (*n, self.up.get(n).copied().unwrap_or(Incarnation(self.epoch + 1)))).collect());
            for node in NODES {
                self.adopt(node);
            }
            for (node, ticket) in self.open.clone().into_keys() {
                self.cancel(node, ticket);
            }
            self.drain();
            assert!(self.open.is_empty(), "a request was never answered");
        }

        /// Delivers everything.
        fn drain(&mut self) {
            while self.wire.values().any(|q| !q.is_empty()) {
                for a in NODES {
                    for b in NODES {
                        self.deliver(a, b);
                    }
                }
                self.check();
            }
        }

        /// Without another epoch, a lost session or a cancel: who has no answer waits at a master.
        fn check_waiters(&self) {
            for (node, ticket) in self.open.keys().filter(|(node, _)| self.is_in(*node)) {
                let waits = self.up.keys().any(|master| self.masters[master].has_waiter(*node, *ticket));
                assert!(waits, "{node:?} has no answer to {ticket}, and nobody knows");
            }
        }

        /// Nobody waits for himself, by way of others or not.
        fn check_circles(&self) {
            let waits: BTreeSet<(LockOwner, LockOwner)> = self.up.keys().flat_map(|n| self.masters[n].waits()).collect();
            for (start, _) in &waits {
                let mut reached = BTreeSet::new();
                let mut next = vec![*start];
                while let Some(owner) = next.pop() {
                    next.extend(waits.iter().filter(|(a, b)| *a == owner && reached.insert(*b)).map(|(_, b)| *b));
                }
                assert!(!reached.contains(start), "{start:?} waits for itself: {waits:?}");
            }
        }
    }

    #[test]
    fn no_circle_of_waiting_owners_stays() {
        let mut found = 0;
        for seed in 1..=200 {
            let mut w = World::new(seed);
            w.single = true;
            for _ in 0..12 {
                for _ in 0..50 {
                    w.step();
                }
                for node in w.up.clone().into_keys() {
                    w.adopt(node);
                }
                w.drain();
                w.check_circles();
            }
            w.settle();
            found += w.deadlocks;
        }
        assert!(found > 200, "the schedule hardly makes circles: {found}");
    }

    #[test]
    fn members_never_hold_conflicting_locks_and_every_request_is_answered() {
        let mut granted = 0;
        for seed in 1..=300 {
            let mut w = World::new(seed);
            for _ in 0..600 {
                w.step();
            }
            w.settle();
            granted += w.granted;
        }
        assert!(granted > 10_000, "the schedule hardly grants anything: {granted}");
    }

    #[test]
    fn requests_that_found_no_room_before_the_epoch_had_recovered_are_repeated() {
        let mut dropped = 0;
        for seed in 1..=300 {
            let mut w = World::with_room(seed, 1);
            for round in 0..12 {
                for _ in 0..50 {
                    w.step();
                }
                if round % 4 == 3 {
                    for node in w.up.clone().into_keys() {
                        w.adopt(node);
                    }
                    w.drain();
                    w.check_waiters();
                }
            }
            w.settle();
            dropped += w.dropped;
        }
        assert!(dropped > 300, "there was nearly always room: {dropped}");
    }
}
