//! The token protocol: masters, holders and links of a few nodes that want one object, in every order of deliveries, with a
//! session that breaks and a node that dies.
//!
//! Checked in every state: an operation that has the object to itself is the only one, on any living node; the cores' own
//! invariants; and when nothing is under way any more nobody still waits.

use cluster::sim::test_config;
use cluster::{Config, Epoch, Instant, Layer, NodeId, View};
use sld::holder::{Event, WaiterId};
use sld::message::Envelope;
use sld::tokens::{Step, Tokens};
use sld::{Mode, ObjectId};
use stateright::{Model, Property};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// What all nodes want.
const OBJECT: ObjectId = ObjectId::Rename(1);
/// Nothing here depends on time.
const NOW: Instant = Instant(0);

/// The bounds of a check.
#[derive(Clone, Copy, Debug)]
pub struct TokenModel {
    /// Nodes.
    pub nodes: u32,
    /// Operations that each node begins.
    pub operations: u8,
    /// Sessions that break.
    pub breaks: u8,
    /// Nodes that die.
    pub deaths: u8,
    /// A planted bug: what a holder gives up is given to the next one before it has flushed and its users are gone.
    pub early_release: bool,
}

/// One node.
#[derive(Clone, Debug)]
struct Node {
    tokens: Tokens,
    left: u8,
    waiting: Option<(WaiterId, Mode)>,
    using: Option<Mode>,
    /// Revokes whose flush is going on.
    flushing: VecDeque<(ObjectId, u64)>,
    /// What the node has seen: epoch and recovered layer.
    seen: (Epoch, Layer),
}

/// A state of all nodes and of what is on its way.
#[derive(Clone, Debug)]
pub struct State {
    nodes: BTreeMap<NodeId, Node>,
    wires: BTreeMap<(NodeId, NodeId), VecDeque<Envelope>>,
    /// Sessions that broke and whose sides have not sent anew.
    broken: BTreeSet<(NodeId, NodeId)>,
    config: Arc<Config>,
    recovered: Layer,
    finished: BTreeSet<NodeId>,
    breaks: u8,
    deaths: u8,
    granted: u8,
}

/// Two states are the same if they read the same: the cores print all that they know.
impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        struct Sink<'a, H: Hasher>(&'a mut H);
        impl<H: Hasher> fmt::Write for Sink<'_, H> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0.write(text.as_bytes());
                Ok(())
            }
        }
        let State { nodes, wires, broken, config, recovered, finished, breaks, deaths, granted } = self;
        let rest = (broken, recovered, finished, breaks, deaths, granted);
        let _ = fmt::write(&mut Sink(state), format_args!("{nodes:?}{wires:?}{}{rest:?}", config.epoch));
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        format!("{self:?}") == format!("{other:?}")
    }
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Action {
    Want(NodeId, bool),
    Done(NodeId),
    Flushed(NodeId),
    Deliver(NodeId, NodeId),
    Break(NodeId, NodeId),
    Resend(NodeId),
    Die(NodeId),
    See(NodeId),
}

impl TokenModel {
    fn act(&self, state: &mut State, id: NodeId, act: impl FnOnce(&mut Node, &mut Step)) {
        let Some(node) = state.nodes.get_mut(&id) else { return };
        let mut step = Step::default();
        act(node, &mut step);
        while !step.events.is_empty() {
            for event in std::mem::take(&mut step.events) {
                match event {
                    Event::Admitted(waiter) => {
                        // A wish that is admitted at once is told of before its number is known here.
                        if let Some((waiting, mode)) = node.waiting
                            && waiting == waiter
                        {
                            node.waiting = None;
                            node.using = Some(mode);
                            state.granted = state.granted.saturating_add(1).min(9);
                        }
                    }
                    Event::Revoke { object, generation, .. } => node.flushing.push_back((object, generation)),
                    Event::Unknown { object, seq, keep } => {
                        node.tokens.with(NOW, &mut step, |h, out| h.answer(object, seq, keep, out));
                    }
                    _ => {}
                }
            }
        }
        if step.reset {
            node.using = None;
            node.waiting = None;
            node.flushing.clear();
        }
        for (to, envelope) in step.envelopes {
            if state.config.nodes.get(&to).is_some_and(|n| n.up) {
                state.wires.entry((id, to)).or_default().push_back(envelope);
            }
        }
        if step.finished == Some(state.config.epoch) {
            state.finished.insert(id);
        }
        let epoch = state.config.epoch;
        if state.recovered < Layer::Mirror && state.nodes.values().all(|n| n.seen >= (epoch, Layer::Cluster)) {
            state.recovered = Layer::Mirror;
        }
        if state.recovered == Layer::Mirror && state.nodes.keys().all(|n| state.finished.contains(n)) {
            state.recovered = Layer::Sld;
        }
    }

    fn see(&self, state: &mut State, id: NodeId) {
        let view = View { me: id, config: state.config.clone(), recovered: state.recovered, member: true };
        let seen = (state.config.epoch, state.recovered);
        self.act(state, id, |node, step| {
            node.seen = seen;
            node.tokens.view(NOW, &view, step);
        });
    }
}

impl Model for TokenModel {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let config = Arc::new(test_config(self.nodes, 2.min(self.nodes), mirror::REGION_BLOCKS));
        let nodes = config.nodes.keys().map(|id| {
            let node = Node {
                tokens: Tokens::new(*id, 8),
                left: self.operations,
                waiting: None,
                using: None,
                flushing: VecDeque::new(),
                seen: (Epoch(0), Layer::None),
            };
            (*id, node)
        });
        let mut state = State {
            nodes: nodes.collect(),
            wires: BTreeMap::new(),
            broken: BTreeSet::new(),
            config: config.clone(),
            recovered: Layer::Cluster,
            finished: BTreeSet::new(),
            breaks: self.breaks,
            deaths: self.deaths,
            granted: 0,
        };
        // The first epoch recovers in one order: what comes later is what is to be explored.
        for _ in 0..20 {
            for id in config.nodes.keys() {
                self.see(&mut state, *id);
                let wires: Vec<_> = state.wires.keys().copied().collect();
                for (from, to) in wires {
                    while let Some(envelope) = state.wires.get_mut(&(from, to)).and_then(VecDeque::pop_front) {
                        self.act(&mut state, to, |n, step| n.tokens.receive(NOW, from, envelope, step));
                    }
                }
            }
        }
        state.wires.clear();
        assert_eq!(state.recovered, Layer::Sld, "the first epoch recovers");
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (id, node) in &state.nodes {
            if node.waiting.is_none() && node.using.is_none() && node.left > 0 {
                actions.push(Action::Want(*id, true));
                actions.push(Action::Want(*id, false));
            }
            if node.using.is_some() {
                actions.push(Action::Done(*id));
            }
            if !node.flushing.is_empty() {
                actions.push(Action::Flushed(*id));
            }
            if node.seen != (state.config.epoch, state.recovered) {
                actions.push(Action::See(*id));
            }
            if state.deaths > 0 && state.nodes.len() > 1 {
                actions.push(Action::Die(*id));
            }
            if state.broken.iter().any(|(from, _)| from == id) {
                actions.push(Action::Resend(*id));
            }
        }
        for ((from, to), wire) in &state.wires {
            if !wire.is_empty() {
                actions.push(Action::Deliver(*from, *to));
                if state.breaks > 0 {
                    actions.push(Action::Break(*from, *to));
                }
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Want(id, alone) => {
                let mode = if alone { Mode::Exclusive } else { Mode::Shared };
                self.act(&mut state, id, |node, step| {
                    node.left -= 1;
                    let waiter = node.tokens.with(NOW, step, |h, out| h.wait(OBJECT, mode, out));
                    node.waiting = Some((waiter, mode));
                });
            }
            Action::Done(id) => self.act(&mut state, id, |node, step| {
                let Some(mode) = node.using.take() else { return };
                let generation = node.tokens.holder.generation();
                node.tokens.with(NOW, step, |h, out| h.done(generation, OBJECT, mode, out));
            }),
            Action::Flushed(id) => self.act(&mut state, id, |node, step| {
                let Some((object, generation)) = node.flushing.pop_front() else { return };
                node.tokens.with(NOW, step, |h, out| h.flushed(generation, object, Vec::new(), out));
            }),
            Action::Deliver(from, to) => {
                let envelope = state.wires.get_mut(&(from, to)).and_then(VecDeque::pop_front)?;
                self.act(&mut state, to, |node, step| {
                    node.tokens.receive(NOW, from, envelope, step);
                    if self.early_release && node.using.is_some() {
                        // The operation is taken for done although it goes on.
                        let (mode, generation) = (node.using.unwrap_or(Mode::Shared), node.tokens.holder.generation());
                        node.tokens.with(NOW, step, |h, out| h.done(generation, OBJECT, mode, out));
                    }
                });
            }
            Action::Break(from, to) => {
                state.breaks -= 1;
                for pair in [(from, to), (to, from)] {
                    state.wires.remove(&pair);
                    state.broken.insert(pair);
                }
                for (at, peer) in [(from, to), (to, from)] {
                    self.act(&mut state, at, |node, _| node.tokens.session_ended(peer));
                }
            }
            Action::Resend(id) => {
                state.broken.retain(|(from, _)| *from != id);
                self.act(&mut state, id, |node, step| node.tokens.tick(NOW, step));
            }
            Action::Die(id) => {
                state.deaths -= 1;
                state.nodes.remove(&id);
                state.wires.retain(|(from, to), _| *from != id && *to != id);
                state.broken.retain(|(from, to)| *from != id && *to != id);
                let mut config = Config::clone(&state.config);
                if let Some(info) = config.nodes.get_mut(&id) {
                    info.up = false;
                }
                config.epoch = config.epoch.next();
                state.config = Arc::new(config);
                state.recovered = Layer::Cluster;
                state.finished.clear();
            }
            Action::See(id) => self.see(&mut state, id),
        }
        state.wires.retain(|_, wire| !wire.is_empty());
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("who has it alone is alone", |_, state: &State| {
                let alone = state.nodes.values().filter(|n| n.using == Some(Mode::Exclusive)).count();
                let all = state.nodes.values().filter(|n| n.using.is_some()).count();
                alone == 0 || all == 1
            }),
            Property::always("tokens do not contradict each other", |_, state: &State| {
                let held: Vec<Mode> = state.nodes.values().filter_map(|n| n.tokens.holder.held(OBJECT)).collect();
                !held.contains(&Mode::Exclusive) || held.len() == 1
            }),
            Property::always("the cores' invariants hold", |_, state: &State| {
                state.nodes.values().for_each(|n| n.tokens.check_invariants());
                true
            }),
            Property::always("nobody waits for ever", |model, state: &State| {
                let mut actions = Vec::new();
                model.actions(state, &mut actions);
                let quiet = !actions.iter().any(|a| !matches!(a, Action::Want(..) | Action::Die(_) | Action::Break(..)));
                !quiet || state.nodes.values().all(|n| n.waiting.is_none())
            }),
            Property::sometimes("operations of all nodes are served", |model, state: &State| {
                u32::from(state.granted) >= model.nodes
            }),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stateright::Checker;

    fn check(model: TokenModel) -> usize {
        let checker = model.checker().threads(2).spawn_bfs().join();
        checker.assert_properties();
        checker.unique_state_count()
    }

    const MODEL: TokenModel = TokenModel { nodes: 2, operations: 2, breaks: 0, deaths: 0, early_release: false };

    #[test]
    fn two_nodes_want_one_object() {
        let states = check(MODEL);
        eprintln!("{states} states");
        assert!(states > 300);
    }

    #[test]
    #[ignore = "takes a while: run by ci"]
    fn a_session_breaks() {
        let states = check(TokenModel { breaks: 1, ..MODEL });
        eprintln!("{states} states");
        assert!(states > 1_000);
    }

    #[test]
    #[ignore = "takes a while: run by ci"]
    fn three_nodes_one_of_which_dies() {
        let states = check(TokenModel { nodes: 3, operations: 1, deaths: 1, ..MODEL });
        eprintln!("{states} states");
        assert!(states > 1_000);
    }

    #[test]
    fn a_token_given_up_under_its_user_is_found() {
        let checker = TokenModel { early_release: true, ..MODEL }.checker().threads(2).spawn_bfs().join();
        assert!(checker.discovery("who has it alone is alone").is_some());
    }
}
