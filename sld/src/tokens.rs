//! All of one node's part in the token protocol: its holder, its master, its links to the others, and the epochs.
//!
//! Invariants:
//! - A message acts only in the epoch that both its sender and its receiver are in: older ones are dropped (their sender
//!   sends them again in the new epoch, if they still mean something), newer ones are kept until this node is there.
//! - In a new epoch the node asserts what it holds once the mirrors have recovered, and reports that it is done when all
//!   members have asserted to it, and it knows that they have to the other masters, if one of them is new.
//! - A node that was let in serves nothing before all masters know what it has open: who sees it serve can rely on that.
//!
//! Excludes: what to do about events (the shell), and clocks: the shell witnesses an envelope's clock before `receive`.

use crate::holder::{Event, Holder, Out};
use crate::link::Link;
use crate::master::Master;
use crate::message::{Envelope, History, Membership, Msg};
use cluster::{Epoch, Incarnation, Instant, Layer, NodeId, View};
use std::collections::{BTreeMap, VecDeque};

/// Envelopes of newer epochs that are kept per node. What comes beyond is dropped, and sent again later.
const EARLY_MAX: usize = 256;

/// What one step led to.
#[derive(Debug, Default)]
pub struct Step {
    /// To be sent, in order; the shell fills in the clock.
    pub envelopes: Vec<(NodeId, Envelope)>,
    /// Events of the holder, in order.
    pub events: Vec<Event>,
    /// The node lost all that it held.
    pub reset: bool,
    /// The token layer of this node has recovered for an epoch.
    pub finished: Option<Epoch>,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Tokens {
    me: NodeId,
    incarnation: Incarnation,
    epoch: Epoch,
    recovered: Layer,
    member: bool,
    /// Since it became a member, it has recovered in some epoch.
    serving: bool,
    finished: bool,
    membership: Membership,
    history: History,
    /// Tokens in use on this node.
    pub holder: Holder,
    master: Master,
    links: BTreeMap<NodeId, Link>,
    early: BTreeMap<NodeId, VecDeque<Envelope>>,
    /// Messages of this node to itself.
    local: VecDeque<Msg>,
}

impl Tokens {
    /// A node that is not in any epoch yet.
    #[must_use]
    pub fn new(me: NodeId, idle_max: usize) -> Self {
        Tokens {
            me,
            incarnation: Incarnation(0),
            epoch: Epoch(0),
            recovered: Layer::None,
            member: false,
            serving: false,
            finished: false,
            membership: Membership::default(),
            history: History::default(),
            holder: Holder::new(idle_max),
            master: Master::default(),
            links: BTreeMap::new(),
            early: BTreeMap::new(),
            local: VecDeque::new(),
        }
    }

    /// Does something with the holder, and passes on what comes of it.
    pub fn with<R>(&mut self, now: Instant, step: &mut Step, f: impl FnOnce(&mut Holder, &mut Out) -> R) -> R {
        let mut out = Out::default();
        let r = f(&mut self.holder, &mut out);
        self.route(out, step);
        self.settle(now, step);
        r
    }

    /// The view has changed.
    pub fn view(&mut self, now: Instant, view: &View, step: &mut Step) {
        let membership = Membership::of(&view.config);
        let mine = membership.up.get(&self.me).copied();
        if !view.member || mine.is_none() {
            if self.member {
                self.lose_everything(step);
            }
            self.epoch = self.epoch.max(view.epoch());
            return;
        }
        let mine = mine.unwrap_or_default();
        if view.epoch() < self.epoch || (view.epoch() == self.epoch && self.member && view.recovered <= self.recovered) {
            return;
        }
        if self.member && mine != self.incarnation {
            self.lose_everything(step);
        }
        if view.epoch() > self.epoch || !self.member {
            (self.epoch, self.member, self.incarnation) = (view.epoch(), true, mine);
            (self.recovered, self.finished) = (Layer::None, false);
            self.enter(membership, step);
        }
        if view.recovered >= Layer::Mirror && self.recovered < Layer::Mirror {
            let mut sends = Vec::new();
            self.master.mirrors_recovered(&mut sends);
            let mut out = Out::default();
            self.holder.reassert(&mut out);
            self.route(Out { sends, events: Vec::new() }, step);
            self.route(out, step);
        }
        self.recovered = self.recovered.max(view.recovered);
        self.settle(now, step);
        if self.recovered >= Layer::Sld {
            self.history.settle();
        }
    }

    fn enter(&mut self, membership: Membership, step: &mut Step) {
        self.history.push(membership.clone());
        let old = std::mem::replace(&mut self.membership, membership);
        let history = self.history.clone();
        self.links.retain(|n, l| self.membership.up.get(n) == Some(&l.incarnation) && old.up.get(n) == Some(&l.incarnation));
        for link in self.links.values_mut() {
            link.blank(|m| match m {
                Msg::Reassert { .. } | Msg::ReassertAll | Msg::OpensKnown => true,
                Msg::Unreserve { blocks } => blocks.iter().any(|b| history.moved(crate::message::region_of(*b))),
                m => m.object().is_some_and(|o| history.moved(o)),
            });
            link.resend();
        }
        for (n, i) in &self.membership.up {
            if *n != self.me {
                self.links.entry(*n).or_insert_with(|| Link::new(*i));
            }
        }
        self.master.epoch(self.me, &self.membership, &self.history);
        let mut out = Out::default();
        self.holder.epoch(&self.membership, &self.history, &mut out);
        self.route(out, step);
        let epoch = self.epoch;
        let mut ready = Vec::new();
        for (node, kept) in &mut self.early {
            kept.retain(|e| e.epoch >= epoch);
            while kept.front().is_some_and(|e| e.epoch == epoch) {
                ready.extend(kept.pop_front().map(|e| (*node, e)));
            }
        }
        for (node, envelope) in ready {
            self.deliver(node, envelope, step);
        }
    }

    fn lose_everything(&mut self, step: &mut Step) {
        self.member = false;
        self.serving = false;
        self.finished = false;
        self.recovered = Layer::None;
        self.history = History::default();
        self.membership = Membership::default();
        self.master = Master::default();
        self.links.clear();
        self.early.clear();
        self.local.clear();
        self.holder.reset();
        step.events.clear();
        step.envelopes.clear();
        step.reset = true;
    }

    /// An envelope came in; its clock has been witnessed.
    pub fn receive(&mut self, now: Instant, from: NodeId, envelope: Envelope, step: &mut Step) {
        if envelope.epoch > self.epoch || (envelope.epoch == self.epoch && !self.member) {
            let kept = self.early.entry(from).or_default();
            if kept.len() < EARLY_MAX {
                kept.push_back(envelope);
            }
            return;
        }
        if envelope.epoch == self.epoch {
            self.deliver(from, envelope, step);
        }
        self.settle(now, step);
    }

    fn deliver(&mut self, from: NodeId, envelope: Envelope, step: &mut Step) {
        if envelope.to != self.incarnation {
            return;
        }
        let Some(link) = self.links.get_mut(&from).filter(|l| l.incarnation == envelope.from) else { return };
        for msg in link.receive(envelope) {
            self.act(from, msg, step);
        }
    }

    fn act(&mut self, from: NodeId, msg: Msg, step: &mut Step) {
        let mut out = Out::default();
        match msg {
            Msg::Grant { .. }
            | Msg::Denied { .. }
            | Msg::Revoke { .. }
            | Msg::Forgotten { .. }
            | Msg::Opened { .. }
            | Msg::OpensKnown => self.holder.receive(from, msg, &mut out),
            Msg::ReassertAll => self.holder.reassert_all(from, &self.history, &mut out),
            Msg::Nothing => {}
            _ => self.master.receive(from, msg, &mut out.sends),
        }
        self.route(out, step);
    }

    fn route(&mut self, out: Out, step: &mut Step) {
        step.events.extend(out.events);
        if !self.member {
            return;
        }
        for (to, msg) in out.sends {
            if to == self.me {
                self.local.push_back(msg);
            } else if let Some(link) = self.links.get_mut(&to) {
                link.push(msg);
            }
        }
    }

    /// Runs the messages to itself, then hands out what is to be sent.
    fn settle(&mut self, now: Instant, step: &mut Step) {
        while let Some(msg) = self.local.pop_front() {
            self.act(self.me, msg, step);
        }
        let complete = self.recovered >= Layer::Mirror && self.master.complete() && self.holder.opens_known();
        if self.member && !self.finished && complete {
            (self.finished, self.serving) = (true, true);
            step.finished = Some(self.epoch);
        }
        self.flush_links(now, false, step);
    }

    fn flush_links(&mut self, now: Instant, tick: bool, step: &mut Step) {
        let mut envelopes = Vec::new();
        for (node, link) in &mut self.links {
            let ack = tick && link.tick(now);
            link.envelopes(now, self.epoch, self.incarnation, ack, &mut envelopes);
            step.envelopes.extend(envelopes.drain(..).map(|e| (*node, e)));
        }
    }

    /// Called about every 50 ms: acknowledgements, and what must be sent again.
    pub fn tick(&mut self, now: Instant, step: &mut Step) {
        self.flush_links(now, true, step);
    }

    /// A session with a node broke: what it may have lost goes out with the next tick.
    pub fn session_ended(&mut self, node: NodeId) {
        if let Some(link) = self.links.get_mut(&node) {
            link.resend();
        }
    }

    /// The epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether the node is a member of its epoch, and all masters have heard what it has open.
    #[must_use]
    pub fn serving(&self) -> bool {
        self.serving
    }

    /// Objects that this node's master knows of.
    #[must_use]
    pub fn mastered(&self) -> usize {
        self.master.len()
    }

    /// The node that is the master of an object.
    #[must_use]
    pub fn master_of(&self, object: crate::api::ObjectId) -> Option<NodeId> {
        self.membership.master(object).map(|m| m.0)
    }

    /// Panics if an invariant is broken.
    pub fn check_invariants(&self) {
        self.holder.check_invariants();
        self.master.check_invariants();
    }
}
