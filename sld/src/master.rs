//! The token master of the objects whose hash is this node's: who holds what, who waits, who has what open.
//!
//! Invariants:
//! - At most one node holds an object exclusively, and then no other holds it at all.
//! - Requests of one object are granted in the order in which they came; a request that needs others to give up the
//!   token makes them do so, each asked once per request.
//! - No grant of an object that moved to this node in this epoch before every member has asserted what it holds, and
//!   none at all before the mirrors have recovered.
//! - A node that holds an object exclusively is told if another has it open: with the grant, or, of what is heard of only
//!   later (from a node that was cut off and is back), by `Opened`. When all members have asserted, all are told so.
//! - What the node that leases a region does with the region's inodes is not known here until it is asked: an unknown
//!   inode is presumed to be held by it.
//!
//! Excludes: delivery (`link`), flushing before a token is given up (`holder` and the shell).

use crate::api::{Mode, ObjectId};
use crate::message::{Asserted, History, Membership, Msg, region_of};
use cluster::{BlockNo, NodeId};
use mirror::REGION_BLOCKS;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A token in the hands of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    mode: Mode,
    /// Number of the grant; 0 for one that the node adopted.
    seq: u64,
    /// A revoke is on its way; no other is sent before it is answered.
    revoking: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiting {
    node: NodeId,
    mode: Mode,
    steal: bool,
}

/// Who holds an object, in the order of nodes: nearly always one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Holders(SmallVec<[(NodeId, Held); 1]>);

impl Holders {
    fn find(&self, node: NodeId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&node, |(n, _)| *n)
    }

    fn get(&self, node: NodeId) -> Option<&Held> {
        self.find(node).ok().map(|at| &self.0[at].1)
    }

    fn get_mut(&mut self, node: NodeId) -> Option<&mut Held> {
        self.find(node).ok().map(|at| &mut self.0[at].1)
    }

    fn insert(&mut self, node: NodeId, held: Held) {
        match self.find(node) {
            Ok(at) => self.0[at].1 = held,
            Err(at) => self.0.insert(at, (node, held)),
        }
    }

    fn remove(&mut self, node: NodeId) {
        if let Ok(at) = self.find(node) {
            self.0.remove(at);
        }
    }
}

/// What is known of one object. There may be hundreds of thousands, most of which have a holder and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    holders: Holders,
    /// `None` if there would be nothing in it.
    wanted: Option<Box<Wanted>>,
    /// Whoever might have adopted it has been asked since it was last unknown.
    asked: bool,
}

/// Who wants an object without holding it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    queue: VecDeque<Waiting>,
    opens: BTreeSet<NodeId>,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.holders.0.is_empty() && self.wanted.is_none()
    }

    fn queue(&self) -> impl Iterator<Item = &Waiting> {
        self.wanted.iter().flat_map(|w| &w.queue)
    }

    fn opens(&self) -> impl Iterator<Item = NodeId> {
        self.wanted.iter().flat_map(|w| &w.opens).copied()
    }

    /// Tells who holds it exclusively if another node has it open.
    fn tell_open(&self, object: ObjectId, out: &mut Sends) {
        if let Some((holder, _)) = self.holders.0.iter().find(|(_, h)| h.mode == Mode::Exclusive)
            && self.opens().any(|n| n != *holder)
        {
            out.push((*holder, Msg::Opened { object }));
        }
    }

    /// More is wanted of it.
    fn want(&mut self, add: impl FnOnce(&mut Wanted)) {
        add(self.wanted.get_or_insert_default());
    }

    /// Less is.
    fn unwant(&mut self, remove: impl FnOnce(&mut Wanted)) {
        if let Some(wanted) = &mut self.wanted {
            remove(wanted);
            if wanted.queue.is_empty() && wanted.opens.is_empty() {
                self.wanted = None;
            }
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Parts {
    tokens: Vec<Asserted>,
    opens: Vec<ObjectId>,
    reserved: Vec<BlockNo>,
}

/// See the module's description.
#[derive(Clone, Debug, Default)]
pub struct Master {
    objects: BTreeMap<ObjectId, Entry>,
    /// Blocks (packed) allocated but not yet written by nodes that do not hold their region any more.
    reserved: BTreeMap<u64, NodeId>,
    seq: u64,
    me: NodeId,
    membership: Membership,
    history: History,
    mirrors_recovered: bool,
    /// Members whose assertions of this epoch are not complete yet.
    awaiting: BTreeSet<NodeId>,
    parts: BTreeMap<NodeId, Parts>,
    /// Number of the last grant when a node was asked to assert everything: its answer knows nothing of later ones.
    asked_at: BTreeMap<NodeId, u64>,
}

/// Messages to send: to whom, and what.
pub type Sends = Vec<(NodeId, Msg)>;

impl Master {
    /// A new epoch. `history` ends with `membership`.
    pub fn epoch(&mut self, me: NodeId, membership: &Membership, history: &History) {
        let old = std::mem::replace(&mut self.membership, membership.clone());
        let alive = |n: &NodeId| old.up.get(n) == membership.up.get(n) && membership.up.contains_key(n);
        let mine = |o: ObjectId| !history.moved(o) && membership.master(o).is_some_and(|(n, _)| n == me);
        self.objects.retain(|object, e| {
            if !mine(*object) {
                return false;
            }
            e.holders.0.retain(|(n, _)| alive(n));
            e.unwant(|wanted| {
                wanted.queue.retain(|w| alive(&w.node));
                wanted.opens.retain(|n| alive(n));
            });
            e.asked &= !(e.holders.0.is_empty() && e.queue().next().is_none());
            !e.is_empty()
        });
        self.reserved.retain(|block, n| alive(n) && mine(ObjectId::Inode(*block)));
        self.me = me;
        self.history = history.clone();
        self.mirrors_recovered = false;
        self.awaiting = membership.up.keys().copied().collect();
        self.parts.clear();
        self.asked_at.clear();
    }

    /// The mirrors have recovered in this epoch: objects that did not move may be granted.
    pub fn mirrors_recovered(&mut self, out: &mut Sends) {
        if !self.mirrors_recovered {
            self.mirrors_recovered = true;
            self.pump_all(out);
        }
    }

    /// Whether all members have asserted what they hold in this epoch.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.mirrors_recovered && self.awaiting.is_empty()
    }

    /// A message of a holder.
    pub fn receive(&mut self, from: NodeId, msg: Msg, out: &mut Sends) {
        match msg {
            Msg::Request { object, mode, steal } => self.request(from, object, mode, steal, out),
            Msg::Release { object, seq, keep, open, adopted, reserved } => {
                self.release(from, object, seq, keep, open);
                for a in adopted {
                    self.register(from, a);
                }
                if let ObjectId::Region(mirror, _) = object {
                    let packed = |i: &u32| BlockNo::new(cluster::MirrorId(mirror), *i).pack();
                    self.reserved.extend(reserved.iter().map(|i| (packed(i), from)));
                }
                self.pump(object, out);
            }
            Msg::Forget { object, seq, open } => {
                self.release(from, object, seq, None, open);
                self.pump(object, out);
                if !self.objects.contains_key(&object) {
                    out.push((from, Msg::Forgotten { object }));
                }
            }
            Msg::Adopted { object } => {
                self.register(from, Asserted { object, mode: Mode::Exclusive, seq: 0 });
            }
            Msg::Open { object, open } => {
                self.set_open(from, object, open);
                if let Some(e) = self.objects.get(&object).filter(|_| open) {
                    e.tell_open(object, out);
                }
                self.tidy(object);
            }
            Msg::Unreserve { blocks } => {
                for b in blocks {
                    if self.reserved.get(&b.pack()) == Some(&from) {
                        self.reserved.remove(&b.pack());
                    }
                }
            }
            Msg::Reassert { history, full, tokens, opens, reserved, last } => {
                let parts = self.parts.entry(from).or_default();
                parts.tokens.extend(tokens);
                parts.opens.extend(opens);
                parts.reserved.extend(reserved);
                if last {
                    let parts = self.parts.remove(&from).unwrap_or_default();
                    if full || history == self.history.epochs() {
                        self.asserted(from, full, parts);
                        if self.awaiting.remove(&from) && self.awaiting.is_empty() {
                            self.tell_opens(out);
                            self.pump_all(out);
                        }
                    } else {
                        self.asked_at.insert(from, self.seq);
                        out.push((from, Msg::ReassertAll));
                    }
                }
            }
            Msg::Forgotten { .. }
            | Msg::Denied { .. }
            | Msg::Grant { .. }
            | Msg::Revoke { .. }
            | Msg::ReassertAll
            | Msg::Opened { .. }
            | Msg::OpensKnown
            | Msg::Nothing => {}
        }
    }

    /// All members have asserted what they have open: who was granted a token before that learns what it was not told then.
    fn tell_opens(&self, out: &mut Sends) {
        for (object, e) in &self.objects {
            e.tell_open(*object, out);
        }
        out.extend(self.membership.up.keys().map(|n| (*n, Msg::OpensKnown)));
    }

    fn request(&mut self, from: NodeId, object: ObjectId, mode: Mode, steal: bool, out: &mut Sends) {
        // Asked again after an epoch change: the same place in the queue.
        self.objects.entry(object).or_default().want(|wanted| match wanted.queue.iter_mut().find(|w| w.node == from) {
            Some(w) => (w.mode, w.steal) = (mode, steal),
            None => wanted.queue.push_back(Waiting { node: from, mode, steal }),
        });
        self.pump(object, out);
    }

    /// Who may have adopted an object of which nothing is known.
    fn presumed(&self, object: ObjectId) -> Option<NodeId> {
        let ObjectId::Inode(packed) = object else { return None };
        if let Some(node) = self.reserved.get(&packed) {
            return Some(*node);
        }
        let region = self.objects.get(&region_of(BlockNo::unpack(packed)))?;
        region.holders.0.iter().find(|(_, h)| h.mode == Mode::Exclusive).map(|(n, _)| *n)
    }

    fn release(&mut self, from: NodeId, object: ObjectId, seq: u64, keep: Option<Mode>, open: bool) {
        if let Some(held) = self.objects.get_mut(&object).and_then(|e| e.holders.get_mut(from))
            && held.seq == seq
        {
            held.revoking = false;
            match keep {
                Some(mode) => held.mode = held.mode.min(mode),
                None => {
                    if let Some(e) = self.objects.get_mut(&object) {
                        e.holders.remove(from);
                    }
                }
            }
        }
        self.set_open(from, object, open);
    }

    fn set_open(&mut self, from: NodeId, object: ObjectId, open: bool) {
        if open {
            self.objects.entry(object).or_default().want(|wanted| {
                wanted.opens.insert(from);
            });
        } else if let Some(e) = self.objects.get_mut(&object) {
            e.unwant(|wanted| {
                wanted.opens.remove(&from);
            });
        }
    }

    /// A node tells of a token that it took without asking.
    fn register(&mut self, from: NodeId, a: Asserted) {
        let entry = self.objects.entry(a.object).or_default();
        let clash = entry.holders.0.iter().any(|(n, h)| *n != from && (h.mode == Mode::Exclusive || a.mode == Mode::Exclusive));
        debug_assert!(!clash, "{from} asserts {a:?} against {entry:?}");
        if clash {
            tracing::error!(node = %from, asserted = ?a, "a token is asserted that another node holds; refused");
            return;
        }
        self.seq = self.seq.max(a.seq);
        match entry.holders.get_mut(from) {
            // What is asserted is older than a grant that is on its way; or a revoke is, with a number presumed by us, and will
            // be answered by it.
            Some(held) if held.seq > a.seq => held.mode = held.mode.max(a.mode),
            Some(held) if held.seq == a.seq => held.mode = a.mode,
            _ => entry.holders.insert(from, Held { mode: a.mode, seq: a.seq, revoking: false }),
        }
    }

    fn asserted(&mut self, from: NodeId, full: bool, parts: Parts) {
        if full {
            let asked_at = self.asked_at.remove(&from).unwrap_or(self.seq);
            let named: BTreeSet<ObjectId> = parts.tokens.iter().map(|a| a.object).collect();
            let opens: BTreeSet<ObjectId> = parts.opens.iter().copied().collect();
            for (object, e) in &mut self.objects {
                if !named.contains(object) && e.holders.get(from).is_some_and(|h| h.seq <= asked_at) {
                    e.holders.remove(from);
                }
                if !opens.contains(object) {
                    e.unwant(|wanted| {
                        wanted.opens.remove(&from);
                    });
                }
            }
            self.reserved.retain(|_, n| *n != from);
            self.objects.retain(|_, e| !e.is_empty());
        }
        for a in parts.tokens {
            self.register(from, a);
        }
        for object in parts.opens {
            self.set_open(from, object, true);
        }
        self.reserved.extend(parts.reserved.iter().map(|b| (b.pack(), from)));
    }

    fn pump_all(&mut self, out: &mut Sends) {
        let waiting: Vec<ObjectId> = self.objects.iter().filter(|(_, e)| e.queue().next().is_some()).map(|(o, _)| *o).collect();
        for object in waiting {
            self.pump(object, out);
        }
    }

    /// Grants what can be granted, and asks for what stands in the way of the first one that cannot.
    fn pump(&mut self, object: ObjectId, out: &mut Sends) {
        let ready = self.mirrors_recovered && (self.awaiting.is_empty() || !self.history.moved(object));
        while let Some(entry) = self.objects.get_mut(&object).filter(|_| ready) {
            let Some(first) = entry.queue().next().copied() else { break };
            let stands = |n: &NodeId, h: &Held| *n != first.node && (first.mode == Mode::Exclusive || h.mode == Mode::Exclusive);
            if entry.holders.0.iter().any(|(n, h)| stands(n, h)) {
                if !first.steal {
                    entry.unwant(|wanted| {
                        wanted.queue.pop_front();
                    });
                    out.push((first.node, Msg::Denied { object }));
                    continue;
                }
                let keep = (first.mode == Mode::Shared).then_some(Mode::Shared);
                for (n, h) in entry.holders.0.iter_mut().filter(|(n, h)| stands(n, h) && !h.revoking) {
                    h.revoking = true;
                    out.push((*n, Msg::Revoke { object, seq: h.seq, keep }));
                }
                break;
            }
            if entry.holders.0.is_empty() && !entry.asked {
                entry.asked = true;
                if let Some(node) = self.presumed(object).filter(|n| *n != first.node) {
                    self.seq += 1;
                    let held = Held { mode: Mode::Exclusive, seq: self.seq, revoking: false };
                    self.objects.entry(object).or_default().holders.insert(node, held);
                }
                continue;
            }
            entry.unwant(|wanted| {
                wanted.queue.pop_front();
            });
            self.seq += 1;
            let held = Held { mode: first.mode, seq: self.seq, revoking: false };
            // A weaker token than the one it has would be a step back that the node has not flushed for.
            let mode = entry.holders.get(first.node).map_or(first.mode, |h| h.mode.max(first.mode));
            entry.holders.insert(first.node, Held { mode, ..held });
            let open_elsewhere = entry.opens().any(|n| n != first.node);
            let busy = self.busy(object);
            out.push((first.node, Msg::Grant { object, mode, seq: self.seq, open_elsewhere, busy }));
        }
        self.tidy(object);
    }

    /// Blocks of a region that its new lessee must not allocate: somebody knows them as inodes, or has allocated them.
    fn busy(&self, object: ObjectId) -> Vec<u32> {
        let ObjectId::Region(mirror, region) = object else { return Vec::new() };
        let first = BlockNo::new(cluster::MirrorId(mirror), region * REGION_BLOCKS).pack();
        let last = first + u64::from(REGION_BLOCKS) - 1;
        let inodes = self.objects.range(ObjectId::Inode(first)..=ObjectId::Inode(last)).filter_map(|(o, _)| match o {
            ObjectId::Inode(p) => Some(*p),
            _ => None,
        });
        let reserved = self.reserved.range(first..=last).map(|(p, _)| *p);
        let all: BTreeSet<u32> = inodes.chain(reserved).map(|p| BlockNo::unpack(p).index).collect();
        all.into_iter().collect()
    }

    fn tidy(&mut self, object: ObjectId) {
        if let Some(e) = self.objects.get_mut(&object)
            && e.holders.0.is_empty()
            && e.queue().next().is_none()
        {
            e.asked = false;
            if e.is_empty() {
                self.objects.remove(&object);
            }
        }
    }

    /// Objects that it knows of.
    #[must_use]
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether it knows of none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Panics if an invariant is broken.
    pub fn check_invariants(&self) {
        for (object, e) in &self.objects {
            assert!(!e.is_empty(), "{object:?}: empty entry kept");
            if e.holders.0.iter().any(|(_, h)| h.mode == Mode::Exclusive) {
                assert_eq!(e.holders.0.len(), 1, "{object:?}: exclusive beside others: {e:?}");
            }
            assert!(e.holders.0.is_sorted_by_key(|(n, _)| *n), "{object:?}: {e:?}");
            let nodes: BTreeSet<NodeId> = e.queue().map(|w| w.node).collect();
            assert_eq!(nodes.len(), e.queue().count(), "{object:?}: a node waits twice");
            assert_eq!(self.membership.master(*object).map(|m| m.0), Some(self.me), "{object:?} is not this master's");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::{Epoch, Incarnation};

    #[test]
    fn an_assertion_that_crosses_a_newer_grant_takes_nothing_of_it_back() {
        let members = |epoch: u64, up: &[u32]| Membership {
            epoch: Epoch(epoch),
            up: up.iter().map(|n| (NodeId(*n), Incarnation(1))).collect(),
        };
        let (me, other) = (NodeId(1), NodeId(2));
        let (alone, both) = (members(1, &[1]), members(2, &[1, 2]));
        let object = (0..).map(|n| ObjectId::Task(1, n)).find(|o| both.master(*o).is_some_and(|m| m.0 == me)).unwrap();
        let mut history = History::default();
        history.push(alone);
        history.settle();
        history.push(both.clone());
        let (mut master, mut out) = (Master::default(), Vec::new());
        master.epoch(me, &both, &history);
        master.mirrors_recovered(&mut out);
        let request = |mode| Msg::Request { object, mode, steal: true };
        let asserted = |history: Vec<Epoch>, full, seq| {
            let tokens = vec![Asserted { object, mode: Mode::Shared, seq }];
            Msg::Reassert { history, full, tokens, opens: Vec::new(), reserved: Vec::new(), last: true }
        };
        // It has come in this epoch, and asserts all that it has by then: not yet what it is granted meanwhile.
        master.receive(other, request(Mode::Shared), &mut out);
        let Some((_, Msg::Grant { seq, .. })) = out.pop() else { panic!("{out:?}") };
        master.receive(other, asserted(vec![Epoch(0), Epoch(2)], false, seq), &mut out);
        assert_eq!(out.pop(), Some((other, Msg::ReassertAll)));
        master.receive(other, request(Mode::Exclusive), &mut out);
        let Some((_, Msg::Grant { seq: newer, mode: Mode::Exclusive, .. })) = out.pop() else { panic!("{out:?}") };
        master.receive(other, asserted(vec![Epoch(0), Epoch(2)], true, seq), &mut out);
        master.receive(me, request(Mode::Shared), &mut out);
        assert_eq!(out, [(other, Msg::Revoke { object, seq: newer, keep: Some(Mode::Shared) })]);
        master.check_invariants();
    }
}
