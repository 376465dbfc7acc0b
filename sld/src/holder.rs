//! Tokens that this node holds, and which of its operations use them.
//!
//! Within the node a token is a readers-writer lock: waiters are served in the order in which they came. A revoke stops
//! new admissions, waits for the users there are, has the shell flush, and then gives the token up. A grant always serves
//! the first waiter before the token can go again, so neither the node nor the others starve.
//!
//! Invariants:
//! - An operation is admitted only under a token that covers its mode, and never while a revoke waits.
//! - One writer, or any number of readers.
//! - A token that is given up has no users, and the shell has flushed what depends on it.
//! - Region tokens have no users: a revoke of one never waits for an operation.
//! - What this node has open it tells every master that it comes to have, also after it was declared dead: files stay open
//!   though their tokens are gone.
//! - What another node has open is known of every token held exclusively. After a node has come (back), whose files no grant
//!   from before could tell of, it is not known until their masters have heard from it.
//!
//! Excludes: who else wants a token (`master`), what is dirty (`writeback`).

use crate::api::{Mode, ObjectId};
use crate::message::{Asserted, History, Membership, Msg, region_of};
use cluster::{BlockNo, NodeId};
use lru::LruCache;
use mirror::REGION_BLOCKS;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Names a waiting operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaiterId(pub u64);

/// What the shell has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The waiter has the token.
    Admitted(WaiterId),
    /// The token's users are gone: tell the file system, flush, and then call `flushed`.
    Revoke {
        /// What.
        object: ObjectId,
        /// What may stay.
        keep: Option<Mode>,
        /// To be handed back to `flushed`.
        generation: u64,
    },
    /// Somebody asks for an inode of a region leased here that is not held here. If its block has just been allocated an
    /// adoption may follow; otherwise it must never be adopted in this lease. Then call `answer`.
    Unknown {
        /// What.
        object: ObjectId,
        /// The master's number.
        seq: u64,
        /// What may stay.
        keep: Option<Mode>,
    },
    /// An operation of this node wants an inode of a region leased here that is not held here. If its block has just been
    /// allocated it may be about to be adopted; otherwise it must never be in this lease. Then call `consent`.
    Asking {
        /// What.
        object: ObjectId,
    },
    /// A region is leased.
    Leased {
        /// Which.
        region: ObjectId,
        /// Blocks that must not be allocated.
        busy: Vec<u32>,
    },
    /// A region is not to be had without taking it from another node.
    Denied {
        /// Which.
        region: ObjectId,
    },
    /// The token of an inode that is no more was given up, and nobody has it.
    Forgotten {
        /// What.
        object: ObjectId,
    },
    /// An inode's token was granted whose region is leased here: its block must not be allocated for another one.
    Known {
        /// What.
        object: ObjectId,
    },
}

/// What became of the token of an inode that is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgotten {
    /// There was none on this node.
    Absent,
    /// It was held exclusively, unknown to the master, and is dropped: no node has it any more.
    Dropped,
    /// It was held exclusively and is given back. `Event::Forgotten` follows if no node has it any more.
    Released,
    /// It is in use, or wanted, or shared: still somebody's.
    Kept,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    held: Option<Mode>,
    /// Number of the grant; 0 if it was adopted and the master has not given it one.
    seq: u64,
    /// It was adopted, and the master has not been told.
    untold: bool,
    asked: Option<Mode>,
    /// Whether it was asked for even if others must give it up for that.
    steal: bool,
    /// `Event::Asking` has not been answered.
    asking: bool,
    /// It has.
    consent: bool,
    readers: u32,
    writer: bool,
    queue: VecDeque<(WaiterId, Mode)>,
    /// The token came for a waiter that has not had it yet.
    owed: bool,
    revoke: Option<Option<Mode>>,
    flushing: bool,
    open_elsewhere: bool,
}

impl Entry {
    fn used(&self) -> bool {
        self.readers > 0 || self.writer
    }

    fn fits(&self, mode: Mode) -> bool {
        self.held.is_some_and(|h| h >= mode)
            && !self.writer
            && match mode {
                Mode::Shared => true,
                Mode::Exclusive => self.readers == 0,
            }
    }

    fn admit(&mut self, mode: Mode) {
        match mode {
            Mode::Shared => self.readers += 1,
            Mode::Exclusive => self.writer = true,
        }
    }
}

/// Outputs of a step: messages to masters, and events for the shell, each in order.
#[derive(Debug, Default)]
pub struct Out {
    /// Messages, each to the master of its object.
    pub sends: Vec<(NodeId, Msg)>,
    /// Events.
    pub events: Vec<Event>,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Holder {
    objects: BTreeMap<ObjectId, Entry>,
    /// What this node has open. An inode that was freed while the node was cut off stays in it until it is closed: that its
    /// number is not free of this node then only delays things.
    opens: BTreeSet<ObjectId>,
    /// Masters that have not yet heard what a node that has come (back) has open.
    doubts: BTreeSet<NodeId>,
    /// Blocks handed over as reserved with their region.
    reserved: BTreeSet<BlockNo>,
    idle: LruCache<ObjectId, ()>,
    idle_max: usize,
    next_waiter: u64,
    membership: Membership,
    /// Until what is held has been asserted in this epoch: messages about objects that moved are not sent, since the
    /// assertion will say it all.
    unasserted: Option<History>,
    generation: u64,
    /// Operations that began before the last reset. None is admitted before they are gone.
    zombies: u64,
    held_count: usize,
}

impl Holder {
    /// Keeps at most `idle_max` unused tokens.
    #[must_use]
    pub fn new(idle_max: usize) -> Self {
        Holder {
            objects: BTreeMap::new(),
            opens: BTreeSet::new(),
            doubts: BTreeSet::new(),
            reserved: BTreeSet::new(),
            idle: LruCache::unbounded(),
            idle_max,
            next_waiter: 0,
            membership: Membership::default(),
            unasserted: Some(History::default()),
            generation: 0,
            zombies: 0,
            held_count: 0,
        }
    }

    /// Counts the times that everything was lost.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Tokens held.
    #[must_use]
    pub fn held_count(&self) -> usize {
        self.held_count
    }

    /// How a token is held.
    #[must_use]
    pub fn held(&self, object: ObjectId) -> Option<Mode> {
        self.objects.get(&object).and_then(|e| e.held)
    }

    /// Whether an operation of this node has the object to itself.
    #[must_use]
    pub fn writing(&self, object: ObjectId) -> bool {
        self.objects.get(&object).is_some_and(|e| e.writer)
    }

    /// Whether operations from before the last reset still run.
    #[must_use]
    pub fn zombies(&self) -> bool {
        self.zombies > 0
    }

    /// Whether another node has had the object open since before the token was granted; `None` if that is not known yet.
    #[must_use]
    pub fn open_elsewhere(&self, object: ObjectId) -> Option<bool> {
        let is_doubtful = || self.membership.master(object).is_some_and(|(master, _)| self.doubts.contains(&master));
        match self.objects.get(&object).is_some_and(|e| e.open_elsewhere) {
            false if !self.doubts.is_empty() && is_doubtful() => None,
            known => Some(known),
        }
    }

    /// Whether every master knows what each member has open, and has told this node.
    #[must_use]
    pub fn opens_known(&self) -> bool {
        self.doubts.is_empty()
    }

    /// Takes all of `wants` (sorted, no duplicates) if that needs neither a message nor waiting.
    pub fn try_acquire(&mut self, wants: &[(ObjectId, Mode)]) -> bool {
        if self.zombies > 0 {
            return false;
        }
        let free = |e: &Entry, mode| e.fits(mode) && e.queue.is_empty() && e.revoke.is_none() && !e.flushing;
        if !wants.iter().all(|(o, m)| self.objects.get(o).is_some_and(|e| free(e, *m))) {
            return false;
        }
        for (object, mode) in wants {
            if let Some(e) = self.objects.get_mut(object) {
                e.admit(*mode);
                self.idle.pop(object);
            }
        }
        true
    }

    /// Waits for a token. `Event::Admitted` follows, perhaps at once.
    pub fn wait(&mut self, object: ObjectId, mode: Mode, out: &mut Out) -> WaiterId {
        self.next_waiter += 1;
        let waiter = WaiterId(self.next_waiter);
        self.idle.pop(&object);
        self.objects.entry(object).or_default().queue.push_back((waiter, mode));
        self.poll(object, out);
        waiter
    }

    /// The waiter has gone away without having been admitted.
    pub fn cancel(&mut self, object: ObjectId, waiter: WaiterId, out: &mut Out) {
        if let Some(e) = self.objects.get_mut(&object) {
            e.queue.retain(|(w, _)| *w != waiter);
            if e.queue.is_empty() {
                e.owed = false;
            }
            self.poll(object, out);
        }
    }

    /// A user is done.
    pub fn done(&mut self, generation: u64, object: ObjectId, mode: Mode, out: &mut Out) {
        if generation != self.generation {
            self.zombies = self.zombies.saturating_sub(1);
            if self.zombies == 0 {
                self.poll_all(out);
            }
            return;
        }
        if let Some(e) = self.objects.get_mut(&object) {
            match mode {
                Mode::Shared => e.readers = e.readers.saturating_sub(1),
                Mode::Exclusive => e.writer = false,
            }
            self.poll(object, out);
        }
    }

    /// Takes a new object's token without asking, for a writer.
    pub fn adopt(&mut self, object: ObjectId, out: &mut Out) {
        self.idle.pop(&object);
        let leased = match object {
            ObjectId::Inode(packed) => {
                self.objects.get(&region_of(BlockNo::unpack(packed))).is_some_and(|r| r.held == Some(Mode::Exclusive))
            }
            _ => false,
        };
        let e = self.objects.entry(object).or_default();
        let known = e.held == Some(Mode::Exclusive);
        if e.held.is_none() {
            self.held_count += 1;
        }
        if !known {
            (e.held, e.seq, e.open_elsewhere, e.untold) = (Some(Mode::Exclusive), 0, false, leased);
        }
        e.writer = true;
        if !known && !leased {
            self.send(object, Msg::Adopted { object }, out);
        }
    }

    /// Asks for the lease of a region. `Event::Leased` or `Event::Denied` follows, also if it is held already (then with
    /// fresh knowledge).
    pub fn lease(&mut self, region: ObjectId, steal: bool, out: &mut Out) {
        let e = self.objects.entry(region).or_default();
        if e.asked.is_none() {
            (e.asked, e.steal) = (Some(Mode::Exclusive), steal);
            self.send(region, Msg::Request { object: region, mode: Mode::Exclusive, steal }, out);
        }
    }

    /// Gives up a region, or any unused token, of the node's own will.
    pub fn give_up(&mut self, object: ObjectId, out: &mut Out) {
        if let Some(e) = self.objects.get_mut(&object)
            && e.held.is_some()
        {
            e.revoke = Some(None);
            self.poll(object, out);
        }
    }

    /// Drops an unused exclusive token at once, because its inode is gone; nothing of it is dirty.
    pub fn forget(&mut self, object: ObjectId, out: &mut Out) -> Forgotten {
        let Some(e) = self.objects.get(&object) else { return Forgotten::Absent };
        let quiet = !e.used() && e.queue.is_empty() && e.asked.is_none() && e.revoke.is_none() && !e.flushing;
        if !quiet || e.held != Some(Mode::Exclusive) {
            return Forgotten::Kept;
        }
        let (seq, untold) = (e.seq, e.untold);
        self.idle.pop(&object);
        self.objects.remove(&object);
        self.held_count -= 1;
        let open = self.opens.contains(&object);
        if untold && !open {
            return Forgotten::Dropped;
        }
        self.send(object, Msg::Forget { object, seq, open }, out);
        Forgotten::Released
    }

    /// Whether the node has the object open.
    pub fn set_open(&mut self, object: ObjectId, open: bool, out: &mut Out) {
        let changed = if open { self.opens.insert(object) } else { self.opens.remove(&object) };
        if changed && self.held(object).is_none() {
            self.send(object, Msg::Open { object, open }, out);
        }
    }

    /// A block that was handed over as reserved is durable, or not wanted any more.
    pub fn unreserve(&mut self, block: BlockNo, out: &mut Out) {
        if self.reserved.remove(&block) {
            self.send(region_of(block), Msg::Unreserve { blocks: vec![block] }, out);
        }
    }

    /// A message of the master `from`.
    pub fn receive(&mut self, from: NodeId, msg: Msg, out: &mut Out) {
        if msg == Msg::OpensKnown {
            self.doubts.remove(&from);
        }
        let Some(object) = msg.object() else { return };
        if self.membership.master(object).map(|m| m.0) != Some(from) {
            return;
        }
        match msg {
            Msg::Grant { object, mode, seq, open_elsewhere, busy } => {
                let e = self.objects.entry(object).or_default();
                if e.held.is_none() {
                    self.held_count += 1;
                }
                (e.held, e.seq, e.asked, e.open_elsewhere) = (Some(mode), seq, None, open_elsewhere);
                e.untold = false;
                e.revoke = None; // of an older grant; the master has changed its mind
                e.owed = !e.queue.is_empty();
                match object {
                    ObjectId::Region(mirror, region) => {
                        // What is wanted or held here itself is not to be allocated either.
                        let first = BlockNo::new(cluster::MirrorId(mirror), region * REGION_BLOCKS).pack();
                        let last = first + u64::from(REGION_BLOCKS) - 1;
                        let mut busy: BTreeSet<u32> = busy.into_iter().collect();
                        for (o, e) in self.objects.range(ObjectId::Inode(first)..=ObjectId::Inode(last)) {
                            if let ObjectId::Inode(p) = o
                                && (e.held.is_some() || e.asked.is_some() || !e.queue.is_empty())
                            {
                                busy.insert(BlockNo::unpack(*p).index);
                            }
                        }
                        out.events.push(Event::Leased { region: object, busy: busy.into_iter().collect() });
                    }
                    ObjectId::Inode(p) if self.held(region_of(BlockNo::unpack(p))).is_some() => {
                        out.events.push(Event::Known { object });
                    }
                    _ => {}
                }
                self.poll(object, out);
            }
            Msg::Forgotten { object } => out.events.push(Event::Forgotten { object }),
            Msg::Opened { object } => {
                // Also an operation that was admitted before sees it, if it asks after this.
                if let Some(e) = self.objects.get_mut(&object).filter(|e| e.held.is_some()) {
                    e.open_elsewhere = true;
                }
            }
            Msg::Denied { object } => {
                if let Some(e) = self.objects.get_mut(&object) {
                    e.asked = None;
                    out.events.push(Event::Denied { region: object });
                    self.poll(object, out);
                }
            }
            Msg::Revoke { object, seq, keep } => {
                let known = self.objects.get(&object).is_some_and(|e| e.held.is_some() || e.flushing);
                if let ObjectId::Inode(p) = object
                    && !known
                    && (self.held(region_of(BlockNo::unpack(p))).is_some() || self.reserved.contains(&BlockNo::unpack(p)))
                {
                    out.events.push(Event::Unknown { object, seq, keep });
                } else {
                    self.revoke(object, seq, keep, out);
                }
            }
            _ => {}
        }
    }

    /// The shell's answer to `Event::Unknown`.
    pub fn answer(&mut self, object: ObjectId, seq: u64, keep: Option<Mode>, out: &mut Out) {
        self.revoke(object, seq, keep, out);
    }

    /// The shell's answer to `Event::Asking`.
    pub fn consent(&mut self, object: ObjectId, out: &mut Out) {
        if let Some(e) = self.objects.get_mut(&object)
            && std::mem::take(&mut e.asking)
        {
            e.consent = true;
            self.poll(object, out);
            if let Some(e) = self.objects.get_mut(&object) {
                e.consent = false;
            }
        }
    }

    fn revoke(&mut self, object: ObjectId, seq: u64, keep: Option<Mode>, out: &mut Out) {
        match self.objects.get_mut(&object) {
            Some(e) if e.held.is_some() => {
                if e.seq > seq {
                    return; // crossed with a release and a newer grant
                }
                (e.seq, e.untold) = (seq, false);
                e.revoke = Some(e.revoke.map_or(keep, |k| k.min(keep)));
                self.poll(object, out);
            }
            _ => self.send_release(object, seq, None, Vec::new(), out),
        }
    }

    /// The shell has flushed after `Event::Revoke`. For a region: `reserved` are its blocks that are allocated here and
    /// not durable yet.
    pub fn flushed(&mut self, generation: u64, object: ObjectId, reserved: Vec<u32>, out: &mut Out) {
        if generation != self.generation {
            return;
        }
        let Some(e) = self.objects.get_mut(&object) else { return };
        if !std::mem::take(&mut e.flushing) {
            return;
        }
        if let Some(keep) = e.revoke.take() {
            let was = e.held;
            e.held = e.held.and_then(|h| keep.map(|k| k.min(h)));
            if was.is_some() && e.held.is_none() {
                self.held_count -= 1;
            }
            let (seq, held, untold) = (e.seq, e.held, e.untold);
            // What the master does not know of it need not hear of; it asks if it must.
            if was.is_some() && (!untold || self.opens.contains(&object)) {
                self.send_release(object, seq, held, reserved, out);
            }
        }
        self.poll(object, out);
    }

    fn send_release(&mut self, object: ObjectId, seq: u64, keep: Option<Mode>, reserved: Vec<u32>, out: &mut Out) {
        let mut adopted = Vec::new();
        if let (ObjectId::Region(mirror, region), None) = (object, keep) {
            let first = BlockNo::new(cluster::MirrorId(mirror), region * REGION_BLOCKS).pack();
            let last = first + u64::from(REGION_BLOCKS) - 1;
            for (o, e) in self.objects.range_mut(ObjectId::Inode(first)..=ObjectId::Inode(last)) {
                if let Some(mode) = e.held
                    && std::mem::take(&mut e.untold)
                {
                    adopted.push(Asserted { object: *o, mode, seq: 0 });
                }
            }
            self.reserved.extend(reserved.iter().map(|i| BlockNo::new(cluster::MirrorId(mirror), *i)));
        }
        let open = self.opens.contains(&object);
        self.send(object, Msg::Release { object, seq, keep, open, adopted, reserved }, out);
    }

    fn send(&mut self, object: ObjectId, msg: Msg, out: &mut Out) {
        if self.unasserted.as_ref().is_some_and(|h| h.moved(object)) && !matches!(msg, Msg::Request { .. }) {
            return;
        }
        if let Some((master, _)) = self.membership.master(object) {
            out.sends.push((master, msg));
        }
    }

    /// Moves one object on as far as it goes.
    fn poll(&mut self, object: ObjectId, out: &mut Out) {
        let Some(e) = self.objects.get_mut(&object) else { return };
        let mut ask = None;
        if self.zombies == 0 {
            if let Some(keep) = e.revoke {
                if !e.used() && !e.flushing {
                    match e.queue.front().copied() {
                        Some((waiter, mode)) if e.owed && e.fits(mode) => {
                            e.queue.pop_front();
                            e.owed = false;
                            e.admit(mode);
                            out.events.push(Event::Admitted(waiter));
                        }
                        _ if e.held > keep => {
                            e.owed = false;
                            e.flushing = true;
                            out.events.push(Event::Revoke { object, keep, generation: self.generation });
                        }
                        _ => {
                            e.owed = false;
                            e.revoke = None;
                            let (seq, held) = (e.seq, e.held);
                            self.send_release(object, seq, held, Vec::new(), out);
                            return self.poll(object, out);
                        }
                    }
                }
            } else if !e.flushing {
                while let Some((waiter, mode)) = e.queue.front().copied() {
                    if !e.fits(mode) {
                        if e.held < Some(mode) && e.asked.is_none() {
                            ask = Some(mode);
                        }
                        break;
                    }
                    e.queue.pop_front();
                    e.owed = false;
                    e.admit(mode);
                    out.events.push(Event::Admitted(waiter));
                }
            }
        }
        if let (Some(_), ObjectId::Inode(p)) = (ask, object) {
            let b = BlockNo::unpack(p);
            let consent = std::mem::take(&mut e.consent);
            let asking = e.asking;
            if !consent && (self.reserved.contains(&b) || self.held(region_of(b)).is_some()) {
                if !asking && let Some(e) = self.objects.get_mut(&object) {
                    e.asking = true;
                    out.events.push(Event::Asking { object });
                }
                return;
            }
        }
        let Some(e) = self.objects.get_mut(&object) else { return };
        if let Some(mode) = ask {
            (e.asked, e.steal) = (Some(mode), true);
            self.send(object, Msg::Request { object, mode, steal: true }, out);
            return;
        }
        let quiet = !e.used() && e.queue.is_empty() && e.asked.is_none() && e.revoke.is_none() && !e.flushing;
        if quiet && e.held.is_none() {
            self.objects.remove(&object);
            self.idle.pop(&object);
        } else if quiet && !matches!(object, ObjectId::Region(..)) {
            self.idle.put(object, ());
            if self.idle.len() > self.idle_max
                && let Some((oldest, ())) = self.idle.pop_lru()
            {
                self.give_up(oldest, out);
            }
        }
    }

    fn poll_all(&mut self, out: &mut Out) {
        let all: Vec<ObjectId> = self.objects.keys().copied().collect();
        for object in all {
            self.poll(object, out);
        }
    }

    /// A new epoch in which this node goes on with what it holds.
    pub fn epoch(&mut self, membership: &Membership, history: &History, out: &mut Out) {
        // Doubts of the epoch before stay: what its masters did not get to say the present ones will.
        if !self.doubts.is_empty() || membership.up.iter().any(|(n, life)| self.membership.up.get(n) != Some(life)) {
            self.doubts = membership.up.keys().copied().collect();
        }
        self.membership = membership.clone();
        self.unasserted = Some(history.clone());
        let moved: Vec<ObjectId> =
            self.objects.iter().filter(|(o, e)| e.asked.is_some() && history.moved(**o)).map(|(o, _)| *o).collect();
        for object in moved {
            self.ask_again(object, out);
        }
    }

    fn ask_again(&mut self, object: ObjectId, out: &mut Out) {
        if let Some(e) = self.objects.get_mut(&object)
            && let Some(mode) = e.asked
        {
            let steal = e.steal;
            self.send(object, Msg::Request { object, mode, steal }, out);
        }
    }

    /// Asserts what is held of the objects that moved, to all masters; nothing else has been sent about them before.
    pub fn reassert(&mut self, out: &mut Out) {
        let Some(history) = self.unasserted.take() else { return };
        let masters: Vec<NodeId> = self.membership.up.keys().copied().collect();
        for master in masters {
            self.assert_to(master, &history, false, out);
        }
    }

    /// Asserts everything that is a master's, and asks again for what is wanted from it.
    pub fn reassert_all(&mut self, master: NodeId, history: &History, out: &mut Out) {
        if self.unasserted.is_some() {
            return; // not our turn yet; what follows will be judged anew
        }
        self.assert_to(master, history, true, out);
        let is = |o: &ObjectId| self.membership.master(*o).map(|m| m.0) == Some(master);
        let asked: Vec<ObjectId> = self.objects.iter().filter(|(o, e)| e.asked.is_some() && is(o)).map(|(o, _)| *o).collect();
        for object in asked {
            self.ask_again(object, out);
        }
    }

    fn assert_to(&mut self, master: NodeId, history: &History, full: bool, out: &mut Out) {
        const PART: usize = 16_384;
        let membership = &self.membership;
        let concerns = |o: ObjectId| membership.master(o).map(|m| m.0) == Some(master) && (full || history.moved(o));
        let mut tokens: Vec<Asserted> = Vec::new();
        for (object, e) in &mut self.objects {
            if let Some(mode) = e.held
                && concerns(*object)
            {
                e.untold = false;
                tokens.push(Asserted { object: *object, mode, seq: e.seq });
            }
        }
        let opens: Vec<ObjectId> = self.opens.iter().copied().filter(|o| concerns(*o)).collect();
        let reserved: Vec<BlockNo> = self.reserved.iter().copied().filter(|b| concerns(region_of(*b))).collect();
        let parts = tokens.len().div_ceil(PART).max(opens.len().div_ceil(PART)).max(reserved.len().div_ceil(PART)).max(1);
        let cut = |n: usize, part: usize| (part * PART).min(n)..((part + 1) * PART).min(n);
        for part in 0..parts {
            let msg = Msg::Reassert {
                history: history.epochs(),
                full,
                tokens: tokens[cut(tokens.len(), part)].to_vec(),
                opens: opens[cut(opens.len(), part)].to_vec(),
                reserved: reserved[cut(reserved.len(), part)].to_vec(),
                last: part + 1 == parts,
            };
            out.sends.push((master, msg));
        }
    }

    /// The node was declared dead: its tokens are gone; those who wait must ask again. Operations that still run are waited
    /// for before anybody is admitted. Its files are still open: they are asserted when it is let back in.
    pub fn reset(&mut self) {
        self.generation += 1;
        let users: u64 = self.objects.values().map(|e| u64::from(e.readers) + u64::from(e.writer)).sum();
        self.zombies += users;
        self.objects.clear();
        self.reserved.clear();
        self.idle.clear();
        self.held_count = 0;
        // Who came while it was away it cannot tell: to it they all will be new.
        self.membership = Membership::default();
        self.doubts.clear();
        self.unasserted = Some(History::default());
    }

    /// Objects held, for shutting down.
    #[must_use]
    pub fn all_held(&self) -> Vec<ObjectId> {
        self.objects.iter().filter(|(_, e)| e.held.is_some()).map(|(o, _)| *o).collect()
    }

    /// Panics if an invariant is broken.
    pub fn check_invariants(&self) {
        let mut held = 0;
        for (object, e) in &self.objects {
            held += usize::from(e.held.is_some());
            assert!(!(e.writer && e.held != Some(Mode::Exclusive)), "{object:?}: writer without token: {e:?}");
            assert!(!(e.readers > 0 && e.held.is_none()), "{object:?}: reader without token: {e:?}");
            assert!(!(e.flushing && e.used()), "{object:?}: used while it is given up: {e:?}");
            let idle = self.idle.contains(object);
            assert!(!(idle && (e.used() || e.held.is_none())), "{object:?}: wrongly idle: {e:?}");
        }
        assert_eq!(held, self.held_count, "count of tokens held");
    }
}
