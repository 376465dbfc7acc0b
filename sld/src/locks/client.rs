//! Lock client: what this node's processes hold and wait for. Pure.
//!
//! Invariants:
//! - A lock is held here only after its master said so in the present life of this node.
//! - Every request is repeated, under the same ticket, until it is answered: after an epoch change at the new master, after
//!   a lost session at the same one. Re-assertion of what is held goes first on the same stream.
//! - A search for a circle of waiting owners goes through each of this node's waiting requests once.
//!
//! Excludes: who grants (`master`), waking the process that waits (the shell).

use super::message::{Chase, LockAnswer, LockMessage, LockOwner, LockRequest, LockTarget, Wait};
use super::table::{HeldLock, LockKind, LockRange, LockTable};
use crate::api::ObjectId;
use cluster::{Epoch, Incarnation, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// Searches remembered per waiting request; more only cost messages.
const CHASED_MAX: usize = 1_024;
/// The most locks in one re-assertion message.
const REASSERT_LOCKS_MAX: usize = 8_192;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending {
    target: LockTarget,
    owner: u64,
    range: LockRange,
    request: LockRequest,
    /// The process no longer wants to wait: the master is being told.
    cancelling: bool,
    /// That is because the wait would never end.
    deadlock: bool,
    /// Searches that have come by.
    chased: BTreeSet<(LockOwner, u64, u64)>,
}

impl Pending {
    /// Whether it is one of those that may wait for each other in a circle and are not to.
    fn waits(&self) -> bool {
        matches!(self.request, LockRequest::Lock { wait: Wait::UnlessDeadlock, .. }) && !self.cancelling
    }

    /// What its process is told when it has been cancelled.
    fn cancelled(&self) -> LockAnswer {
        if self.deadlock { LockAnswer::Deadlock } else { LockAnswer::Cancelled }
    }
}

/// The client's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LockClient {
    me: NodeId,
    incarnation: Incarnation,
    epoch: Epoch,
    /// Members of the epoch; empty while this node is not one of them.
    members: Vec<NodeId>,
    held: BTreeMap<LockTarget, LockTable<LockOwner>>,
    pending: BTreeMap<u64, Pending>,
    /// Tickets whose answers have arrived, by master, to be told with the next request.
    answered: BTreeMap<NodeId, Vec<u64>>,
    next_ticket: u64,
    /// Of the searches that are begun here.
    round: u64,
}

/// What the client wants from its shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LockOutput {
    /// Send to a master.
    Send(NodeId, LockMessage),
    /// A request is answered.
    Answered(u64, LockAnswer),
    /// The node was cut off: the locks that it held on these objects are gone.
    Lost(Vec<ObjectId>),
}

/// Which member is the master of an object.
pub type MasterOf<'a> = &'a dyn Fn(ObjectId) -> NodeId;

impl LockClient {
    /// A client of a node.
    #[must_use]
    pub fn new(me: NodeId) -> Self {
        LockClient { me, ..Self::default() }
    }

    fn owner(&self, id: u64) -> LockOwner {
        LockOwner { node: self.me, incarnation: self.incarnation, id }
    }

    /// An epoch begins with this node as a member, in the life `incarnation`.
    pub fn begin_epoch(
        &mut self,
        epoch: Epoch,
        incarnation: Incarnation,
        members: Vec<NodeId>,
        master_of: MasterOf<'_>,
        out: &mut Vec<LockOutput>,
    ) {
        if incarnation != self.incarnation {
            self.lose(out);
            self.incarnation = incarnation;
        }
        self.epoch = epoch;
        self.members = members;
        self.answered.clear();
        // The new masters search anew for all that has to wait there.
        self.pending.values_mut().for_each(|p| p.chased.clear());
        for master in self.members.clone() {
            self.repeat_to(master, master_of, out);
        }
    }

    /// This node is not a member any more (or not yet again): what it held is gone.
    pub fn lose(&mut self, out: &mut Vec<LockOutput>) {
        self.members.clear();
        let lost: BTreeSet<ObjectId> = std::mem::take(&mut self.held).into_keys().map(|target| target.object).collect();
        if !lost.is_empty() {
            out.push(LockOutput::Lost(lost.into_iter().collect()));
        }
        // With the locks gone there is nothing to give up, and nobody is asked to cancel.
        let over: Vec<(u64, LockAnswer)> = self
            .pending
            .iter()
            .filter_map(|(ticket, p)| match p.request {
                LockRequest::Unlock => Some((*ticket, LockAnswer::Done)),
                _ if p.cancelling => Some((*ticket, p.cancelled())),
                _ => None,
            })
            .collect();
        for (ticket, answer) in over {
            self.pending.remove(&ticket);
            out.push(LockOutput::Answered(ticket, answer));
        }
    }

    /// The session with a master is over, or it had no room: what was under way may be lost.
    pub fn session_ended(&mut self, node: NodeId, master_of: MasterOf<'_>, out: &mut Vec<LockOutput>) {
        if self.members.contains(&node) {
            self.repeat_to(node, master_of, out);
            // Searches that went by way of this node may be lost, too. A circle of which it is a part is found from here.
            self.round += 1;
            let round = self.round;
            for (ticket, p) in self.pending.iter().filter(|(_, p)| p.waits()) {
                let owner = self.owner(p.owner);
                let chase = Chase { owner, ticket: *ticket, round, victim: (owner, *ticket) };
                let message = LockMessage::Waits { epoch: self.epoch, chase, target: p.target, ticket: *ticket };
                out.push(LockOutput::Send(master_of(p.target.object), message));
            }
        }
    }

    fn repeat_to(&mut self, master: NodeId, master_of: MasterOf<'_>, out: &mut Vec<LockOutput>) {
        // What is being given up is not asserted, so it is gone from here, too: even if the request for less (a downgrade
        // of a part) is refused later, others may hold by then what was not asserted.
        self.held = self.relied_on();
        let mut locks: Vec<(LockTarget, HeldLock<LockOwner>)> = self
            .held
            .iter()
            .filter(|(target, _)| master_of(target.object) == master)
            .flat_map(|(target, table)| table.held().iter().map(|h| (*target, h.clone())))
            .collect();
        self.answered.remove(&master);
        let pending: Vec<(u64, Pending)> =
            self.pending.iter().filter(|(_, p)| master_of(p.target.object) == master).map(|(t, p)| (*t, p.clone())).collect();
        let tickets: Vec<u64> = pending.iter().map(|(t, _)| *t).collect();
        loop {
            let rest = locks.split_off(locks.len().min(REASSERT_LOCKS_MAX));
            let last = rest.is_empty();
            let (epoch, incarnation, pending) = (self.epoch, self.incarnation, tickets.clone());
            let message = LockMessage::Reassert { epoch, incarnation, locks, pending, last };
            out.push(LockOutput::Send(master, message));
            if last {
                break;
            }
            locks = rest;
        }
        for (ticket, p) in pending {
            out.push(self.request(master, ticket, &p, p.request));
            if p.cancelling {
                out.push(self.request(master, ticket, &p, LockRequest::Cancel));
            }
        }
    }

    fn request(&mut self, master: NodeId, ticket: u64, p: &Pending, request: LockRequest) -> LockOutput {
        let message = LockMessage::Request {
            epoch: self.epoch,
            ticket,
            target: p.target,
            owner: self.owner(p.owner),
            range: p.range,
            request,
            answered: self.answered.remove(&master).unwrap_or_default(),
        };
        LockOutput::Send(master, message)
    }

    /// A process wants something. The answer comes under the ticket that is returned; with no epoch to ask in, later.
    pub fn ask(
        &mut self,
        target: LockTarget,
        owner: u64,
        range: LockRange,
        request: LockRequest,
        master_of: MasterOf<'_>,
        out: &mut Vec<LockOutput>,
    ) -> u64 {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        // The usual close of a file that was never locked costs no message.
        let pending_here = self.pending.values().any(|p| p.target == target && p.owner == owner);
        if request == LockRequest::Unlock && !pending_here && self.holds(target, owner).is_none() {
            out.push(LockOutput::Answered(ticket, LockAnswer::Done));
            return ticket;
        }
        let p = Pending { target, owner, range, request, cancelling: false, deadlock: false, chased: BTreeSet::new() };
        if !self.members.is_empty() {
            out.push(self.request(master_of(target.object), ticket, &p, request));
        }
        self.pending.insert(ticket, p);
        ticket
    }

    /// A process that waits was killed. The ticket is answered with `Cancelled`, or with `Done` if it was granted first.
    pub fn cancel(&mut self, ticket: u64, master_of: MasterOf<'_>, out: &mut Vec<LockOutput>) {
        let Some(p) = self.pending.get_mut(&ticket) else { return };
        if self.members.is_empty() {
            let answer = p.cancelled();
            self.pending.remove(&ticket);
            out.push(LockOutput::Answered(ticket, answer));
            return;
        }
        p.cancelling = true;
        let p = p.clone();
        out.push(self.request(master_of(p.target.object), ticket, &p, LockRequest::Cancel));
    }

    /// A master's message.
    pub fn receive(&mut self, from: NodeId, message: LockMessage, master_of: MasterOf<'_>, out: &mut Vec<LockOutput>) {
        match message {
            LockMessage::Answer { epoch, ticket, answer } if epoch == self.epoch => self.answer(from, ticket, answer, out),
            LockMessage::Again { epoch } if epoch == self.epoch => self.session_ended(from, master_of, out),
            LockMessage::InTheWay { epoch, chase, owners } if epoch == self.epoch => self.chase(chase, &owners, master_of, out),
            LockMessage::Circle { epoch, ticket } if epoch == self.epoch => {
                if let Some(p) = self.pending.get_mut(&ticket).filter(|p| p.waits()) {
                    p.deadlock = true;
                    self.cancel(ticket, master_of, out);
                }
            }
            _ => {}
        }
    }

    /// A search has come to owners of this node: it goes on with what they wait for themselves.
    fn chase(&mut self, chase: Chase, owners: &[u64], master_of: MasterOf<'_>, out: &mut Vec<LockOutput>) {
        let (epoch, node, incarnation) = (self.epoch, self.me, self.incarnation);
        for (ticket, p) in self.pending.iter_mut().filter(|(_, p)| p.waits() && owners.contains(&p.owner)) {
            if p.chased.len() >= CHASED_MAX {
                p.chased.clear();
            }
            if p.chased.insert((chase.owner, chase.ticket, chase.round)) {
                let here = (LockOwner { node, incarnation, id: p.owner }, *ticket);
                let chase = Chase { victim: chase.victim.max(here), ..chase };
                let message = LockMessage::Waits { epoch, chase, target: p.target, ticket: *ticket };
                out.push(LockOutput::Send(master_of(p.target.object), message));
            }
        }
    }

    fn answer(&mut self, from: NodeId, ticket: u64, answer: LockAnswer, out: &mut Vec<LockOutput>) {
        self.answered.entry(from).or_default().push(ticket);
        // A second answer to a repeated request finds nothing pending.
        let Some(p) = self.pending.remove(&ticket) else { return };
        let owner = self.owner(p.owner);
        match (&p.request, &answer) {
            (LockRequest::Lock { kind, pid, .. }, LockAnswer::Done) => {
                let lock = HeldLock { owner, range: p.range, kind: *kind, pid: *pid };
                let mut table = self.held.remove(&p.target).unwrap_or_default();
                if table.conflict(&lock.owner, lock.range, lock.kind).is_some() {
                    // Another process of this node has given it up, and that answer was lost with a session.
                    self.give_up_pending(p.target, &mut table);
                }
                table.lock(lock);
                self.held.insert(p.target, table);
            }
            (LockRequest::Unlock, LockAnswer::Done) => {
                if let Some(table) = self.held.get_mut(&p.target) {
                    table.unlock(&owner, p.range);
                    if table.is_empty() {
                        self.held.remove(&p.target);
                    }
                }
            }
            _ => {}
        }
        let answer = if answer == LockAnswer::Cancelled { p.cancelled() } else { answer };
        out.push(LockOutput::Answered(ticket, answer));
    }

    /// What this node's processes rely on holding: what was granted, less what they are giving up. The master may have
    /// taken that already, and may have granted it to others, though its answer is still on the way.
    #[must_use]
    pub fn relied_on(&self) -> BTreeMap<LockTarget, LockTable<LockOwner>> {
        let mut held = self.held.clone();
        for (target, table) in &mut held {
            self.give_up_pending(*target, table);
        }
        held.retain(|_, table| !table.is_empty());
        held
    }

    /// Whether a request is unanswered.
    #[must_use]
    pub fn is_pending(&self, ticket: u64) -> bool {
        self.pending.contains_key(&ticket)
    }

    /// Takes from a table of this node's locks what its processes are giving up.
    fn give_up_pending(&self, target: LockTarget, table: &mut LockTable<LockOwner>) {
        for p in self.pending.values().filter(|p| p.target == target) {
            match p.request {
                LockRequest::Unlock => {
                    table.unlock(&self.owner(p.owner), p.range);
                }
                LockRequest::Lock { kind: LockKind::Read, .. } => table.downgrade(&self.owner(p.owner), p.range),
                _ => {}
            }
        }
    }

    /// The strongest lock that an owner holds there.
    #[must_use]
    pub fn holds(&self, target: LockTarget, owner: u64) -> Option<LockKind> {
        let owner = self.owner(owner);
        self.held.get(&target)?.held().iter().filter(|h| h.owner == owner).map(|h| h.kind).max()
    }

    /// Panics if an invariant of this file is broken.
    pub fn check_invariants(&self) {
        for (target, table) in &self.held {
            table.check_invariants();
            assert!(!table.is_empty());
            for h in table.held() {
                assert_eq!((h.owner.node, h.owner.incarnation), (self.me, self.incarnation), "{target:?} of another life");
            }
        }
    }
}
