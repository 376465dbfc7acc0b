//! Masters, holders, links and allocators of several nodes, with messages that overtake each other between different
//! pairs of nodes, sessions that break, nodes that die, are cut off and come back, and epochs that some nodes skip.
//!
//! Checked at every step: an object that one node holds exclusively no other holds; what an operation reads under its
//! token is what the last one wrote, on whatever node; who holds an object exclusively knows whether it is open on another
//! node, also on one that was cut off and is back. At the end: every operation that waited was served.

use cluster::sim::{Rng, test_config};
use cluster::{BlockNo, Config, Epoch, Incarnation, Instant, Layer, MirrorId, NodeId, View};
use sld::allocator::{Allocator, Outcome, Question, RegionId, Use};
use sld::holder::{Event, WaiterId};
use sld::message::Envelope;
use sld::tokens::{Step, Tokens};
use sld::{Mode, ObjectId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

const REGIONS: u32 = 4;
/// Blocks used in each region.
const BLOCKS: u32 = 5;

fn block(region: u32, i: u32) -> BlockNo {
    BlockNo::new(MirrorId(1), region * mirror::REGION_BLOCKS + i)
}

fn inode(b: BlockNo) -> ObjectId {
    ObjectId::Inode(b.pack())
}

#[derive(Clone, Debug)]
enum Kind {
    /// Reads, and writes if exclusive.
    Use,
    /// Frees the inode, if there is one.
    Free,
}

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    wants: Vec<(ObjectId, Mode)>,
    held: usize,
    generation: u64,
    waiter: Option<WaiterId>,
}

struct Node {
    tokens: Tokens,
    allocator: Allocator,
    ops: Vec<Op>,
    /// Written here, not on the disks: `None` is freed.
    dirty: BTreeMap<BlockNo, Option<u64>>,
    /// Revokes whose flush is going on: object, generation, and the blocks to be durable first.
    revokes: Vec<(ObjectId, u64)>,
    loads: Vec<(RegionId, u64, Option<Vec<u64>>)>,
    /// Declared dead: nothing of it counts, and nothing that it writes becomes durable.
    fenced: bool,
    view: Option<View>,
}

struct World {
    rng: Rng,
    now: u64,
    config: Config,
    recovered: Layer,
    nodes: BTreeMap<NodeId, Node>,
    adopted: BTreeMap<NodeId, Epoch>,
    finished: BTreeMap<NodeId, Epoch>,
    wires: BTreeMap<(NodeId, NodeId), VecDeque<Envelope>>,
    disk: BTreeMap<BlockNo, u64>,
    truth: BTreeMap<BlockNo, u64>,
    values: u64,
    served: u64,
    created: u64,
    freed: u64,
    epochs: u64,
    /// What is open where, and the generation of the node's tokens when it was opened.
    opens: BTreeMap<(NodeId, ObjectId), u64>,
    /// Those of them that were freed, or never became durable, while their node was away: nobody owes them anything.
    gone: BTreeSet<(NodeId, ObjectId)>,
    /// How often somebody had an inode to himself that another node had open since before it was cut off.
    kept: u64,
    steal: bool,
}

impl World {
    fn new(seed: u64, count: u32) -> World {
        let mut config = test_config(count, 1, REGIONS * mirror::REGION_BLOCKS);
        config.epoch = Epoch(1);
        let mut w = World {
            rng: Rng::new(seed),
            now: 1,
            config,
            recovered: Layer::None,
            nodes: BTreeMap::new(),
            adopted: BTreeMap::new(),
            finished: BTreeMap::new(),
            wires: BTreeMap::new(),
            disk: BTreeMap::new(),
            truth: BTreeMap::new(),
            values: 0,
            served: 0,
            created: 0,
            freed: 0,
            epochs: 1,
            opens: BTreeMap::new(),
            gone: BTreeSet::new(),
            kept: 0,
            steal: seed.is_multiple_of(2),
        };
        for n in 1..=count {
            w.nodes.insert(NodeId(n), World::node(NodeId(n)));
        }
        w
    }

    fn node(id: NodeId) -> Node {
        Node {
            tokens: Tokens::new(id, 3),
            allocator: Allocator::default(),
            ops: Vec::new(),
            dirty: BTreeMap::new(),
            revokes: Vec::new(),
            loads: Vec::new(),
            fenced: false,
            view: None,
        }
    }

    fn now(&self) -> Instant {
        Instant(self.now * 20_000_000)
    }

    fn trace(&self, what: impl FnOnce() -> String) {
        if std::env::var_os("TRACE").is_some() {
            println!("{} {}", self.now, what());
        }
    }

    fn step(&mut self, id: NodeId, f: impl FnOnce(&mut Tokens, Instant, &mut Step)) {
        let now = self.now();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let mut step = Step::default();
        f(&mut node.tokens, now, &mut step);
        if step.reset {
            node.allocator.reset();
            node.dirty.clear();
            node.revokes.clear();
            node.loads.clear();
            // Operations that were admitted to something end on their own; those that wait ask again (here: give up).
            for op in &mut node.ops {
                op.waiter = None;
            }
        }
        let mut outcome = Outcome::default();
        while !step.events.is_empty() {
            for event in std::mem::take(&mut step.events) {
                if std::env::var_os("TRACE").is_some() {
                    println!("{} {id} {event:?}", self.now);
                }
                match event {
                    Event::Admitted(waiter) => {
                        let op = node.ops.iter_mut().find(|o| o.waiter == Some(waiter)).expect("the waiter of an operation");
                        op.waiter = None;
                        op.held += 1;
                        self.served += 1;
                    }
                    Event::Revoke { object, generation, .. } => {
                        if let ObjectId::Region(m, r) = object {
                            node.allocator.close((MirrorId(m), r));
                        }
                        node.revokes.push((object, generation));
                    }
                    Event::Unknown { object, seq, keep } => {
                        let ObjectId::Inode(p) = object else { unreachable!() };
                        if node.allocator.asked(BlockNo::unpack(p), Question::Revoke { seq, keep }) {
                            node.tokens.with(now, &mut step, |h, out| h.answer(object, seq, keep, out));
                        }
                    }
                    Event::Forgotten { object } => {
                        if let ObjectId::Inode(p) = object {
                            node.allocator.forgotten(BlockNo::unpack(p));
                        }
                    }
                    Event::Asking { object } => {
                        let ObjectId::Inode(p) = object else { unreachable!() };
                        if node.allocator.asked(BlockNo::unpack(p), Question::Local) {
                            node.tokens.with(now, &mut step, |h, out| h.consent(object, out));
                        }
                    }
                    Event::Known { object } => {
                        if let ObjectId::Inode(p) = object {
                            node.allocator.known(BlockNo::unpack(p));
                        }
                    }
                    Event::Leased { region: ObjectId::Region(m, r), busy } => {
                        let load = node.allocator.leased((MirrorId(m), r), Use::Meta, &busy);
                        node.loads.push(((MirrorId(m), r), load, None));
                    }
                    Event::Leased { .. } | Event::Denied { .. } => {}
                }
            }
        }
        for (to, e) in step.envelopes {
            // Over the wire and back.
            let e = postcard::from_bytes(&postcard::to_stdvec(&e).unwrap()).unwrap();
            self.wires.entry((id, to)).or_default().push_back(e);
        }
        if let Some(epoch) = step.finished {
            self.finished.insert(id, epoch);
        }
        let _ = std::mem::take(&mut outcome);
        self.next_wants(id);
    }

    /// Operations that were admitted to one object ask for the next.
    fn next_wants(&mut self, id: NodeId) {
        loop {
            let Some(node) = self.nodes.get_mut(&id) else { return };
            let generation = node.tokens.holder.generation();
            let next = node.ops.iter().position(|o| o.waiter.is_none() && o.held < o.wants.len() && o.generation == generation);
            let Some(i) = next else { return };
            let (object, mode) = node.ops[i].wants[node.ops[i].held];
            let now = Instant(self.now * 20_000_000);
            let mut step = Step::default();
            let waiter = node.tokens.with(now, &mut step, |h, out| h.wait(object, mode, out));
            node.ops[i].waiter = Some(waiter);
            self.step(id, |_, _, s| *s = step);
        }
    }

    fn outcome(&mut self, id: NodeId, o: Outcome) {
        if o == Outcome::default() {
            return;
        }
        self.step(id, |t, now, step| {
            t.with(now, step, |h, out| {
                for b in o.unreserve {
                    h.unreserve(b, out);
                }
                for (b, question) in o.answers {
                    match question {
                        Question::Revoke { seq, keep } => h.answer(inode(b), seq, keep, out),
                        Question::Local => h.consent(inode(b), out),
                    }
                }
            });
        });
    }

    /// Makes what a node wrote to a block durable.
    fn durable(&mut self, id: NodeId, b: BlockNo) {
        let mut o = Outcome::default();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(value) = node.dirty.remove(&b) else { return };
        if let Some(v) = value {
            self.disk.insert(b, v);
            node.allocator.durable(b, &mut o);
            self.outcome(id, o);
        }
    }

    /// As the shell does it: the token of a freed inode goes before its block can be given out again.
    fn durable_free(&mut self, id: NodeId, b: BlockNo) {
        let now = self.now();
        let mut o = Outcome::default();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.dirty.get(&b) != Some(&None) {
            return;
        }
        node.dirty.remove(&b);
        self.disk.remove(&b);
        let mut step = Step::default();
        let token = node.tokens.with(now, &mut step, |h, out| h.forget(inode(b), out));
        node.allocator.durable(b, &mut o);
        node.allocator.freed(b, token, &mut o);
        self.step(id, |_, _, s| *s = step);
        self.outcome(id, o);
    }

    fn flush_block(&mut self, id: NodeId, b: BlockNo) {
        match self.nodes.get(&id).and_then(|n| n.dirty.get(&b)) {
            Some(Some(_)) => self.durable(id, b),
            Some(None) => self.durable_free(id, b),
            None => {}
        }
    }

    fn up(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    fn start_op(&mut self) {
        let ids = self.up();
        let id = *self.rng.pick(&ids).unwrap();
        if self.nodes[&id].fenced || self.nodes[&id].ops.len() > 6 {
            return;
        }
        match self.rng.below(10) {
            0..=3 => return self.create(id),
            4 | 5 => {
                // A region is wanted, or given up.
                let region = ObjectId::Region(1, self.rng.below(u64::from(REGIONS)) as u32);
                let (steal, give_up) = (self.steal && self.rng.percent(50), self.rng.percent(10));
                return self.step(id, |t, now, step| {
                    t.with(now, step, |h, out| if give_up { h.give_up(region, out) } else { h.lease(region, steal, out) });
                });
            }
            _ => {}
        }
        let mut wants = BTreeMap::new();
        for _ in 0..self.rng.range(1..4) {
            // Any block: also one that is no inode, or no more.
            let b = block(self.rng.below(u64::from(REGIONS)) as u32, self.rng.below(u64::from(BLOCKS)) as u32);
            let object = if self.rng.percent(5) { ObjectId::Rename(1) } else { inode(b) };
            wants.insert(object, if self.rng.percent(50) { Mode::Shared } else { Mode::Exclusive });
        }
        let kind = if self.rng.percent(15) { Kind::Free } else { Kind::Use };
        let generation = self.nodes[&id].tokens.holder.generation();
        let op = Op { kind, wants: wants.into_iter().collect(), held: 0, generation, waiter: None };
        self.trace(|| format!("{id} begins {op:?}"));
        self.nodes.get_mut(&id).unwrap().ops.push(op);
        self.next_wants(id);
    }

    /// A new inode: allocated, adopted, written, perhaps with others' turns in between.
    fn create(&mut self, id: NodeId) {
        let node = self.nodes.get_mut(&id).unwrap();
        if let Some(e) = node.allocator.alloc(None, 1) {
            let b = e.start;
            self.trace(|| format!("{id} allocates {b} {:?}", inode(b)));
            assert!(!self.truth.contains_key(&b), "{b} is in use, and given out on {id}");
            for _ in 0..self.rng.below(12) {
                self.deliver();
            }
            let node = self.nodes.get_mut(&id).unwrap();
            if node.fenced || !node.allocator.is_pending(b) {
                return;
            }
            let mut o = Outcome::default();
            if self.rng.percent(20) {
                node.allocator.unalloc(e, &mut o);
                return self.outcome(id, o);
            }
            node.allocator.adopted(b, &mut o);
            let generation = node.tokens.holder.generation();
            let op = Op { kind: Kind::Use, wants: vec![(inode(b), Mode::Exclusive)], held: 1, generation, waiter: None };
            node.ops.push(op);
            self.step(id, |t, now, step| t.with(now, step, |h, out| h.adopt(inode(b), out)));
            self.outcome(id, o);
            self.write(id, b);
            self.created += 1;
        }
    }

    fn write(&mut self, id: NodeId, b: BlockNo) {
        self.values += 1;
        let mut o = Outcome::default();
        let node = self.nodes.get_mut(&id).unwrap();
        node.dirty.insert(b, Some(self.values));
        node.allocator.wrote(b, &mut o);
        self.truth.insert(b, self.values);
        self.outcome(id, o);
    }

    /// An operation that has all its tokens does what it has to do, and ends.
    fn finish_op(&mut self) {
        let ids = self.up();
        let id = *self.rng.pick(&ids).unwrap();
        let node = self.nodes.get_mut(&id).unwrap();
        let generation = node.tokens.holder.generation();
        let ready: Vec<usize> = (0..node.ops.len())
            .filter(|i| node.ops[*i].held == node.ops[*i].wants.len() || node.ops[*i].generation != generation)
            .collect();
        let Some(i) = self.rng.pick(&ready).copied() else { return };
        let op = node.ops.remove(i);
        let valid = op.generation == generation && !node.fenced;
        if valid {
            for (object, mode) in &op.wants {
                let ObjectId::Inode(p) = object else { continue };
                let b = BlockNo::unpack(*p);
                let node = &self.nodes[&id];
                let seen = node.dirty.get(&b).copied().unwrap_or_else(|| self.disk.get(&b).copied());
                assert_eq!(seen, self.truth.get(&b).copied(), "{id} reads {b} under its token ({mode:?})");
                if let (Some(_), Mode::Exclusive) = (seen, mode) {
                    let told = node.tokens.holder.open_elsewhere(*object);
                    let elsewhere: Vec<_> = self.opens.iter().filter(|((n, o), _)| *n != id && o == object).collect();
                    let before = |n: NodeId, opened: u64| opened < self.nodes[&n].tokens.holder.generation();
                    self.kept += u64::from(elsewhere.iter().any(|((n, o), g)| self.counts(*n, *o) && before(*n, **g)));
                    match op.kind {
                        Kind::Use => self.write(id, b),
                        Kind::Free if told == Some(false) => {
                            let open: Vec<_> = elsewhere.into_iter().map(|(who, _)| *who).collect();
                            assert!(open.iter().all(|(n, o)| !self.counts(*n, *o)), "{id} frees {b}, which is open: {open:?}");
                            self.gone.extend(open);
                            self.freed += 1;
                            self.truth.remove(&b);
                            self.close(id, *object);
                            self.nodes.get_mut(&id).unwrap().dirty.insert(b, None);
                        }
                        Kind::Free => {}
                    }
                } else if seen.is_some() && self.rng.percent(60) {
                    self.open(id, *object);
                }
            }
        }
        self.step(id, |t, now, step| {
            t.with(now, step, |h, out| {
                for (object, mode) in op.wants.iter().take(op.held) {
                    h.done(op.generation, *object, *mode, out);
                }
            });
        });
    }

    /// Opens an inode whose token is held.
    fn open(&mut self, id: NodeId, object: ObjectId) {
        let generation = self.nodes[&id].tokens.holder.generation();
        // Of two handles the older one counts. What it had open may have been another inode in the same block.
        if self.gone.remove(&(id, object)) {
            self.opens.remove(&(id, object));
        }
        if self.opens.contains_key(&(id, object)) {
            return;
        }
        self.opens.insert((id, object), generation);
        self.step(id, |t, now, s| t.with(now, s, |h, out| h.set_open(object, true, out)));
    }

    /// Closes it: that needs no token, and is done whether the node is a member or not.
    fn close(&mut self, id: NodeId, object: ObjectId) {
        self.opens.remove(&(id, object));
        self.gone.remove(&(id, object));
        self.step(id, |t, now, s| t.with(now, s, |h, out| h.set_open(object, false, out)));
    }

    fn close_one(&mut self) {
        let open: Vec<_> = self.opens.keys().copied().collect();
        if let Some((id, object)) = self.rng.pick(&open).copied() {
            self.close(id, object);
        }
    }

    /// Whether others have to spare an inode since this node has it open.
    fn counts(&self, id: NodeId, object: ObjectId) -> bool {
        let here = |n: &Node| !n.fenced && n.tokens.serving();
        let open = self.opens.contains_key(&(id, object)) && !self.gone.contains(&(id, object));
        open && self.nodes.get(&id).is_some_and(here)
    }

    fn finish_revoke(&mut self) {
        let ids = self.up();
        let id = *self.rng.pick(&ids).unwrap();
        let node = self.nodes.get_mut(&id).unwrap();
        if node.fenced || node.revokes.is_empty() {
            return;
        }
        let i = self.rng.below(node.revokes.len() as u64) as usize;
        let (object, generation) = node.revokes.remove(i);
        match object {
            ObjectId::Region(m, r) => {
                let region = (MirrorId(m), r);
                if self.rng.percent(50) {
                    let dirty: Vec<BlockNo> = node.allocator.close(region);
                    for b in dirty {
                        self.flush_block(id, b);
                    }
                }
                let node = self.nodes.get_mut(&id).unwrap();
                let reserved = node.allocator.gone(region);
                self.step(id, |t, now, step| t.with(now, step, |h, out| h.flushed(generation, object, reserved, out)));
            }
            ObjectId::Inode(p) => {
                self.flush_block(id, BlockNo::unpack(p));
                self.step(id, |t, now, step| t.with(now, step, |h, out| h.flushed(generation, object, Vec::new(), out)));
            }
            _ => self.step(id, |t, now, step| t.with(now, step, |h, out| h.flushed(generation, object, Vec::new(), out))),
        }
    }

    fn finish_load(&mut self) {
        let ids = self.up();
        let id = *self.rng.pick(&ids).unwrap();
        let node = self.nodes.get_mut(&id).unwrap();
        if node.loads.is_empty() {
            return;
        }
        let i = self.rng.below(node.loads.len() as u64) as usize;
        let (region, load, words) = node.loads[i].clone();
        match words {
            // What is on the disks, and some time later what comes of it.
            None => {
                let mut words = vec![0u64; (mirror::REGION_BLOCKS / 64) as usize];
                for k in 0..BLOCKS {
                    if !self.disk.contains_key(&block(region.1, k)) {
                        words[0] |= 1 << k;
                    }
                }
                node.loads[i].2 = Some(words);
            }
            Some(words) => {
                node.loads.remove(i);
                node.allocator.loaded(region, load, u32::MAX, &words);
            }
        }
    }

    fn write_behind(&mut self) {
        let ids = self.up();
        let id = *self.rng.pick(&ids).unwrap();
        let node = &self.nodes[&id];
        if node.fenced {
            return;
        }
        let dirty: Vec<BlockNo> = node.dirty.keys().copied().collect();
        if let Some(b) = self.rng.pick(&dirty).copied() {
            self.flush_block(id, b);
        }
    }

    fn deliver(&mut self) -> bool {
        let full: Vec<(NodeId, NodeId)> = self.wires.iter().filter(|(_, q)| !q.is_empty()).map(|(k, _)| *k).collect();
        let Some((from, to)) = self.rng.pick(&full).copied() else { return false };
        let Some(e) = self.wires.get_mut(&(from, to)).and_then(VecDeque::pop_front) else { return false };
        self.trace(|| format!("{from}->{to} {e:?}"));
        self.step(to, |t, now, step| t.receive(now, from, e, step));
        true
    }

    fn break_session(&mut self, a: NodeId, b: NodeId) {
        self.wires.remove(&(a, b));
        self.wires.remove(&(b, a));
        for (x, y) in [(a, b), (b, a)] {
            self.step(x, |t, _, _| t.session_ended(y));
        }
    }

    fn new_epoch(&mut self) {
        self.config.epoch = self.config.epoch.next();
        self.recovered = Layer::None;
        self.epochs += 1;
    }

    fn change(&mut self) {
        let count = self.config.nodes.len() as u64;
        let id = NodeId(self.rng.range(1..count + 1) as u32);
        let up: Vec<NodeId> = self.config.up().into_iter().collect();
        let n = self.config.nodes.get_mut(&id).unwrap();
        if !n.up {
            n.up = true;
            n.incarnation = Incarnation(n.incarnation.0 + 1);
            match self.nodes.get_mut(&id) {
                Some(_) => {} // it was cut off, and will see that it has been let back in
                None => drop(self.nodes.insert(id, World::node(id))),
            }
        } else if up.len() > 1 {
            n.up = false;
            let lost: Vec<BlockNo> = self.nodes.get(&id).map(|n| n.dirty.keys().copied().collect()).unwrap_or_default();
            for b in lost {
                match self.disk.get(&b) {
                    Some(v) => drop(self.truth.insert(b, *v)),
                    None => drop(self.truth.remove(&b)),
                }
            }
            let stored = |o: &ObjectId| matches!(o, ObjectId::Inode(p) if self.disk.contains_key(&BlockNo::unpack(*p)));
            self.gone.extend(self.opens.keys().filter(|(n, o)| *n == id && !stored(o)).copied());
            if self.rng.percent(50) {
                self.opens.retain(|(n, _), _| *n != id);
                self.gone.retain(|(n, _)| *n != id);
                self.nodes.remove(&id);
                self.adopted.remove(&id);
                self.finished.remove(&id);
                self.wires.retain(|(a, b), _| *a != id && *b != id);
                for other in self.up() {
                    self.step(other, |t, _, _| t.session_ended(id));
                }
            } else if let Some(node) = self.nodes.get_mut(&id) {
                node.fenced = true;
            }
        } else if self.rng.percent(50) {
            return; // an epoch in which nobody came or went, else
        }
        self.new_epoch();
    }

    /// A node sees the newest view.
    fn show(&mut self, id: NodeId) {
        let up = self.config.up();
        let all = up.iter().all(|n| self.adopted.get(n) == Some(&self.config.epoch));
        if all {
            self.recovered = self.recovered.max(Layer::Mirror);
            if up.iter().all(|n| self.finished.get(n) == Some(&self.config.epoch)) {
                self.recovered = Layer::Fs;
            }
        }
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let member = self.config.nodes[&id].up;
        let view = View { me: id, config: Arc::new(self.config.clone()), recovered: self.recovered, member };
        if node.view.as_ref() == Some(&view) {
            return;
        }
        node.view = Some(view.clone());
        if node.fenced && member {
            // It may have skipped the epochs without it.
            node.fenced = false;
            node.dirty.clear();
        }
        self.adopted.insert(id, self.config.epoch);
        self.trace(|| format!("{id} sees {} {:?} member {member} up {:?}", view.epoch(), view.recovered, self.config.up()));
        self.step(id, |t, now, step| t.view(now, &view, step));
    }

    fn check(&self) {
        let mut holders: BTreeMap<ObjectId, Vec<(NodeId, Mode)>> = BTreeMap::new();
        for (id, node) in self.nodes.iter().filter(|(_, n)| !n.fenced) {
            node.tokens.check_invariants();
            node.allocator.check_invariants();
            for object in node.tokens.holder.all_held() {
                holders.entry(object).or_default().extend(node.tokens.holder.held(object).map(|m| (*id, m)));
            }
        }
        for (object, held) in holders {
            let exclusive = held.iter().any(|(_, m)| *m == Mode::Exclusive);
            assert!(!exclusive || held.len() == 1, "{object:?} is held by {held:?} at {}", self.now);
            for (opener, _) in self.opens.keys().filter(|(n, o)| *o == object && self.counts(*n, *o)) {
                let (holder, _) = held[0];
                let told = || self.nodes[&holder].tokens.holder.open_elsewhere(object);
                assert!(
                    !exclusive || holder == *opener || told() != Some(false),
                    "{holder} is not told that {opener} has {object:?} open"
                );
            }
        }
    }

    fn run(&mut self, steps: u64, changes: bool) {
        for _ in 0..steps {
            self.now += 1;
            match self.rng.below(100) {
                0..=39 => drop(self.deliver()),
                40..=54 => self.start_op(),
                55..=69 => self.finish_op(),
                70..=76 => self.finish_revoke(),
                77..=81 => self.finish_load(),
                82..=86 => self.write_behind(),
                87..=95 => {
                    let ids = self.up();
                    let id = *self.rng.pick(&ids).unwrap();
                    self.show(id);
                    self.step(id, |t, now, step| t.tick(now, step));
                }
                96 | 97 => {
                    let ids = self.up();
                    let (a, b) = (*self.rng.pick(&ids).unwrap(), *self.rng.pick(&ids).unwrap());
                    if a != b && self.rng.percent(30) {
                        self.break_session(a, b);
                    }
                }
                98 if changes && self.rng.percent(30) => self.change(),
                99 if self.rng.percent(30) => self.close_one(),
                _ => {}
            }
            self.check();
        }
        // Everybody comes back, and everything that waits is served.
        for id in self.config.nodes.keys().copied().collect::<Vec<_>>() {
            if !self.config.nodes[&id].up {
                let n = self.config.nodes.get_mut(&id).unwrap();
                (n.up, n.incarnation) = (true, Incarnation(n.incarnation.0 + 1));
                self.nodes.entry(id).or_insert_with(|| World::node(id));
                self.new_epoch();
            }
        }
        let mut rounds = 0;
        loop {
            self.now += 1;
            for id in self.up() {
                self.show(id);
                self.step(id, |t, now, step| t.tick(now, step));
            }
            for _ in 0..20 {
                self.deliver();
                self.finish_op();
                self.finish_revoke();
                self.finish_load();
                self.check();
            }
            let busy = self.nodes.values().any(|n| !n.ops.is_empty() || !n.revokes.is_empty()) || self.recovered != Layer::Fs;
            if !busy && self.wires.values().all(VecDeque::is_empty) {
                break;
            }
            rounds += 1;
            if rounds > 2000 {
                let waiting: Vec<_> = self.nodes.iter().flat_map(|(id, n)| n.ops.iter().map(move |o| (id, o))).collect();
                panic!("no progress: {:?} {waiting:?}", self.recovered);
            }
        }
    }
}

/// As many as `SLD_SEEDS` says, for a longer search.
fn seeds(first: u64, count: u64) -> std::ops::Range<u64> {
    let count = std::env::var("SLD_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(count);
    first..first + count
}

#[test]
fn tokens_exclude_and_everybody_is_served() {
    let (mut served, mut created, mut freed) = (0, 0, 0);
    for seed in seeds(0, 30) {
        print!("seed {seed} ");
        let mut w = World::new(seed, 2 + (seed % 3) as u32);
        w.run(1500, false);
        served += w.served;
        created += w.created;
        freed += w.freed;
    }
    assert!(served > 2500 && created > 100 && freed > 20, "{served} {created} {freed}");
}

#[test]
fn and_so_they_do_when_nodes_die_and_come_back() {
    let (mut served, mut epochs, mut created, mut kept) = (0, 0, 0, 0);
    for seed in seeds(1000, 25) {
        print!("seed {seed} ");
        let mut w = World::new(seed, 2 + (seed % 3) as u32);
        w.run(2500, true);
        served += w.served;
        epochs += w.epochs;
        created += w.created;
        kept += w.kept;
    }
    assert!(served > 2500 && epochs > 100 && created > 100 && kept > 0, "{served} {epochs} {created} {kept}");
}

impl World {
    /// All that can be done without a new operation is done.
    fn quiet(&mut self) {
        for _ in 0..2000 {
            self.now += 1;
            for id in self.up() {
                self.show(id);
                self.step(id, |t, now, step| t.tick(now, step));
                self.check();
            }
            while self.deliver() {
                self.check();
            }
            self.finish_revoke();
            self.check();
            let quiet = self.nodes.values().all(|n| n.revokes.is_empty()) && self.recovered == Layer::Fs;
            if quiet && self.wires.values().all(VecDeque::is_empty) {
                return;
            }
        }
        panic!("it does not become quiet");
    }

    /// Takes a token.
    fn take(&mut self, id: NodeId, object: ObjectId, mode: Mode) {
        let generation = self.nodes[&id].tokens.holder.generation();
        let op = Op { kind: Kind::Use, wants: vec![(object, mode)], held: 0, generation, waiter: None };
        self.nodes.get_mut(&id).unwrap().ops.push(op);
        self.next_wants(id);
        self.quiet();
        assert_eq!(self.nodes[&id].ops[0].held, 1, "{id} gets {object:?}");
    }

    fn give(&mut self, id: NodeId) {
        let op = self.nodes.get_mut(&id).unwrap().ops.remove(0);
        let (object, mode) = op.wants[0];
        self.step(id, |t, now, step| t.with(now, step, |h, out| h.done(op.generation, object, mode, out)));
    }

    /// Whether a node that unlinks it may free it at once.
    fn may_free(&mut self, id: NodeId, object: ObjectId) -> bool {
        self.take(id, object, Mode::Exclusive);
        let told = self.nodes[&id].tokens.holder.open_elsewhere(object);
        self.give(id);
        told == Some(false)
    }

    /// A node is declared dead without having been told, or let back in, without anybody having been told.
    fn declare(&mut self, id: NodeId, up: bool) {
        let n = self.config.nodes.get_mut(&id).unwrap();
        n.up = up;
        if up {
            n.incarnation = Incarnation(n.incarnation.0 + 1);
        } else {
            self.nodes.get_mut(&id).unwrap().fenced = true;
        }
        self.new_epoch();
    }
}

/// With the token at the node that is going to unlink the file (which was told, when it got it, that the file is not open), at a
/// third one, or at the one that was cut off, which opens the file once more; and not if the file is closed meanwhile.
#[test]
fn a_file_that_is_open_on_a_node_that_was_cut_off_and_is_back_is_open_elsewhere() {
    let (a, b, c) = (NodeId(1), NodeId(2), NodeId(3));
    for region in 0..REGIONS {
        for case in 0..4 {
            let mut w = World::new(u64::from(region), 3);
            w.quiet();
            let object = inode(block(region, 1));
            w.take(a, object, Mode::Shared);
            w.open(a, object);
            w.give(a);
            w.quiet();
            assert!(!w.may_free(b, object), "it is open");
            w.declare(a, false);
            w.quiet();
            // Nobody knows any more that it is open, wherever the token is.
            w.take(c, object, if case == 1 { Mode::Exclusive } else { Mode::Shared });
            w.give(c);
            if case != 1 {
                assert!(w.may_free(b, object), "all that a dead node had is gone");
            }
            if case == 3 {
                // Closed while the node is away.
                w.close(a, object);
            }
            w.declare(a, true);
            w.quiet();
            if case == 2 {
                // Opened a second time: of that nobody is told.
                w.take(a, object, Mode::Shared);
                w.open(a, object);
                w.give(a);
            }
            assert_eq!(w.may_free(b, object), case == 3, "region {region}, case {case}");
            assert!(w.may_free(a, object), "it is not open anywhere else");
            w.close(a, object);
            w.quiet();
            assert!(w.may_free(b, object), "closed everywhere: region {region}, case {case}");
        }
    }
}
