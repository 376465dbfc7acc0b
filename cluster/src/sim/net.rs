//! The simulated network: sessions, delays, cuts and deaths.

use super::{Gate, Rng};
use crate::ids::{Incarnation, NodeId};
use crate::transport::{MESSAGE_BYTES_MAX, Message, Peer, PeerAddr, PeerWatcher, Receiver, Service, Transport};
use parking_lot::Mutex;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How the simulated network behaves.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// A message's delay, in microseconds.
    pub delay_us: Range<u64>,
    /// Percent of messages that take `slow_us` instead (a retransmission, a busy machine).
    pub slow_percent: u64,
    /// Delay of slow messages, in microseconds.
    pub slow_us: Range<u64>,
    /// After how long both sides notice that a link is cut or a machine silent, in milliseconds.
    pub silence_ms: Range<u64>,
    /// After how long the others notice that a process died on a machine that goes on, in milliseconds.
    pub death_ms: Range<u64>,
    /// One session in so many messages breaks without a reason; 0: never.
    pub break_one_in: u64,
    /// Most bytes on their way or held back in one direction before the session is ended.
    pub queue_bytes: usize,
    /// What may be delivered at all. Messages of the agreement and of the membership are not counted, but stop, too.
    pub gate: Gate,
}

impl Default for NetOptions {
    fn default() -> Self {
        NetOptions {
            delay_us: 50..1_500,
            slow_percent: 1,
            slow_us: 5_000..40_000,
            silence_ms: 1_000..1_500,
            death_ms: 1..20,
            break_one_in: 0,
            queue_bytes: 64 << 20,
            gate: Gate::default(),
        }
    }
}

/// Messages of one service that were delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// How many.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A simulated network. Clones are the same network. It must be made within a tokio runtime, where its one task runs.
#[derive(Clone)]
pub struct SimNet {
    shared: Arc<NetShared>,
}

struct NetShared {
    state: Mutex<NetState>,
    wake: Arc<Notify>,
    start: tokio::time::Instant,
}

struct NetState {
    rng: Rng,
    options: NetOptions,
    nodes: BTreeMap<NodeId, NodeState>,
    /// Machines that answer nothing at all (as opposed to those with only their process gone).
    silent: BTreeSet<NodeId>,
    pairs: BTreeMap<(NodeId, NodeId), Pair>,
    cuts: BTreeSet<(NodeId, NodeId)>,
    held: BTreeMap<(NodeId, NodeId), Vec<Flight>>,
    queued: BTreeMap<(NodeId, NodeId), usize>,
    last: BTreeMap<(NodeId, NodeId, Service), u64>,
    events: BinaryHeap<Reverse<Event>>,
    sequence: u64,
    next_session: u64,
    counts: BTreeMap<Service, Count>,
    delivered_by_pair: BTreeMap<(NodeId, NodeId, Service), u64>,
    /// A running hash of everything that was delivered, to compare two runs of a seed.
    trace: u64,
}

struct NodeState {
    /// Tells the endpoints of successive processes apart.
    process: u64,
    incarnation: Incarnation,
    watcher: Option<Arc<dyn PeerWatcher>>,
    receivers: BTreeMap<Service, Arc<dyn Receiver>>,
}

/// Two nodes' connection: the live session, and what each side believes.
#[derive(Clone, Copy, Default)]
struct Pair {
    live: Option<u64>,
    low_side: Option<u64>,
    high_side: Option<u64>,
}

impl Pair {
    fn side(&mut self, low: bool) -> &mut Option<u64> {
        if low { &mut self.low_side } else { &mut self.high_side }
    }
}

struct Flight {
    from: NodeId,
    incarnation: Incarnation,
    to: NodeId,
    service: Service,
    session: u64,
    message: Message,
}

enum What {
    Deliver(Flight),
    /// A session dies unless the reason has gone away meanwhile.
    Suspect {
        pair: (NodeId, NodeId),
        session: u64,
    },
    /// A side learns that a peer's process is gone.
    Gone {
        at: NodeId,
        node: NodeId,
        upto: Incarnation,
    },
    /// A side learns that its session is over.
    End {
        at: NodeId,
        peer: NodeId,
        session: u64,
    },
}

struct Event {
    time: u64,
    sequence: u64,
    what: What,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        (self.time, self.sequence) == (other.time, other.sequence)
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.time, self.sequence).cmp(&(other.time, other.sequence))
    }
}

/// A call to be made once the lock is released.
enum Call {
    Receive(Arc<dyn Receiver>, Peer, Message),
    Ended(Vec<Arc<dyn Receiver>>, NodeId),
    Gone(Arc<dyn PeerWatcher>, NodeId, Incarnation),
}

fn ordered(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    if a <= b { (a, b) } else { (b, a) }
}

impl SimNet {
    /// A network without nodes, with the default behaviour.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with_options(seed, NetOptions::default())
    }

    /// A network without nodes.
    #[must_use]
    pub fn with_options(seed: u64, options: NetOptions) -> Self {
        let shared = Arc::new(NetShared {
            state: Mutex::new(NetState {
                rng: Rng::new(seed),
                options,
                nodes: BTreeMap::new(),
                silent: BTreeSet::new(),
                pairs: BTreeMap::new(),
                cuts: BTreeSet::new(),
                held: BTreeMap::new(),
                queued: BTreeMap::new(),
                last: BTreeMap::new(),
                events: BinaryHeap::new(),
                sequence: 0,
                next_session: 1,
                counts: BTreeMap::new(),
                delivered_by_pair: BTreeMap::new(),
                trace: 0xcbf2_9ce4_8422_2325,
            }),
            wake: Arc::new(Notify::new()),
            start: tokio::time::Instant::now(),
        });
        let weak = Arc::downgrade(&shared);
        let wake = Arc::clone(&shared.wake);
        let start = shared.start;
        tokio::spawn(async move {
            loop {
                let next = {
                    let Some(shared) = weak.upgrade() else { return };
                    shared.run_due();
                    let state = shared.state.lock();
                    state.events.peek().map(|Reverse(e)| e.time)
                };
                match next {
                    Some(time) => {
                        tokio::select! {
                            biased;
                            () = tokio::time::sleep_until(start + Duration::from_nanos(time)) => {}
                            () = wake.notified() => {}
                        }
                    }
                    None => wake.notified().await,
                }
            }
        });
        SimNet { shared }
    }

    /// Starts a life of a node: its transport. An earlier life of it ends, as by [`SimNet::kill`].
    #[must_use]
    pub fn endpoint(&self, node: NodeId, incarnation: Incarnation) -> Arc<SimEndpoint> {
        let (old, process) = {
            let mut state = self.shared.state.lock();
            let now = self.shared.now();
            state.silent.remove(&node);
            state.sequence += 1;
            let process = state.sequence;
            let new = NodeState { process, incarnation, watcher: None, receivers: BTreeMap::new() };
            let old = state.nodes.insert(node, new);
            state.break_all(node, now, false);
            (old, process)
        };
        drop(old);
        self.shared.wake.notify_one();
        Arc::new(SimEndpoint { net: Arc::clone(&self.shared), node, process })
    }

    /// The node's process dies: what is on its way to or from it is lost; the others notice soon.
    pub fn kill(&self, node: NodeId) {
        self.remove(node, false);
    }

    /// The node's machine dies silently: the others notice after the time of silence only.
    pub fn vanish(&self, node: NodeId) {
        self.remove(node, true);
    }

    fn remove(&self, node: NodeId, silently: bool) {
        let old = {
            let mut state = self.shared.state.lock();
            let now = self.shared.now();
            if silently {
                state.silent.insert(node);
            }
            let old = state.nodes.remove(&node);
            state.break_all(node, now, silently);
            if let (Some(old), false) = (&old, silently) {
                let others: Vec<_> = state.nodes.keys().copied().collect();
                for at in others {
                    let range = state.options.death_ms.clone();
                    let time = now + state.rng.range(range) * 1_000_000;
                    state.at(time, What::Gone { at, node, upto: old.incarnation });
                }
            }
            old
        };
        // The receivers may own whole layers, whose drop may send.
        drop(old);
        self.shared.wake.notify_one();
    }

    /// Cuts one direction.
    pub fn cut_one_way(&self, from: NodeId, to: NodeId) {
        let mut state = self.shared.state.lock();
        let now = self.shared.now();
        state.cuts.insert((from, to));
        let pair = ordered(from, to);
        if let Some(session) = state.pairs.get(&pair).and_then(|p| p.live) {
            state.suspect(pair, session, now);
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Cuts both directions between two nodes.
    pub fn cut(&self, a: NodeId, b: NodeId) {
        self.cut_one_way(a, b);
        self.cut_one_way(b, a);
    }

    /// Cuts a node off from all the others.
    pub fn isolate(&self, node: NodeId, others: impl IntoIterator<Item = NodeId>) {
        for other in others {
            if other != node {
                self.cut(node, other);
            }
        }
    }

    /// Heals both directions between two nodes; messages held back in a session that is still alive arrive now.
    pub fn heal(&self, a: NodeId, b: NodeId) {
        let mut state = self.shared.state.lock();
        let now = self.shared.now();
        for direction in [(a, b), (b, a)] {
            state.cuts.remove(&direction);
            for flight in state.held.remove(&direction).unwrap_or_default() {
                state.launch(flight, now);
            }
        }
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Heals every cut.
    pub fn heal_all(&self) {
        let cuts: BTreeSet<_> = self.shared.state.lock().cuts.iter().map(|(a, b)| ordered(*a, *b)).collect();
        for (a, b) in cuts {
            self.heal(a, b);
        }
    }

    /// Whether anything is cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        !self.shared.state.lock().cuts.is_empty()
    }

    /// Breaks the session of two nodes, if there is one: what is on its way is lost, both sides are told soon.
    pub fn break_session(&self, a: NodeId, b: NodeId) {
        let mut state = self.shared.state.lock();
        let now = self.shared.now();
        state.break_pair(ordered(a, b), now, false);
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Changes the behaviour.
    pub fn set_options(&self, change: impl FnOnce(&mut NetOptions)) {
        change(&mut self.shared.state.lock().options);
    }

    /// What was delivered of a service since the last [`SimNet::reset_counts`].
    #[must_use]
    pub fn count(&self, service: Service) -> Count {
        self.shared.state.lock().counts.get(&service).copied().unwrap_or_default()
    }

    /// Messages of a service delivered from one node to another since the last [`SimNet::reset_counts`].
    #[must_use]
    pub fn count_between(&self, from: NodeId, to: NodeId, service: Service) -> u64 {
        self.shared.state.lock().delivered_by_pair.get(&(from, to, service)).copied().unwrap_or_default()
    }

    /// Sets all counts to zero.
    pub fn reset_counts(&self) {
        let mut state = self.shared.state.lock();
        state.counts.clear();
        state.delivered_by_pair.clear();
    }

    /// A hash of all deliveries so far (time, place and contents): equal in two runs of one seed.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.shared.state.lock().trace
    }
}

impl NetShared {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Makes everything happen that is due. Calls are made without the lock, one after the other.
    fn run_due(&self) {
        loop {
            let calls = {
                let mut state = self.state.lock();
                let now = self.now();
                match state.events.peek() {
                    Some(Reverse(event)) if event.time <= now => {}
                    _ => return,
                }
                let Some(Reverse(event)) = state.events.pop() else { return };
                state.happen(event, now)
            };
            for call in calls {
                match call {
                    Call::Receive(receiver, from, message) => receiver.receive(from, message),
                    Call::Ended(receivers, node) => receivers.iter().for_each(|r| r.session_ended(node)),
                    Call::Gone(watcher, node, upto) => watcher.process_gone(node, upto),
                }
            }
        }
    }
}

impl NetState {
    fn at(&mut self, time: u64, what: What) {
        self.sequence += 1;
        let sequence = self.sequence;
        self.events.push(Reverse(Event { time, sequence, what }));
    }

    fn delay(&mut self) -> u64 {
        let slow = self.rng.percent(self.options.slow_percent);
        let range = if slow { self.options.slow_us.clone() } else { self.options.delay_us.clone() };
        self.rng.range(range) * 1_000
    }

    fn suspect(&mut self, pair: (NodeId, NodeId), session: u64, now: u64) {
        let range = self.options.silence_ms.clone();
        let time = now + self.rng.range(range) * 1_000_000;
        self.at(time, What::Suspect { pair, session });
    }

    fn send(&mut self, flight: Flight, now: u64) {
        let (from, to) = (flight.from, flight.to);
        let direction = (from, to);
        let queued = self.queued.entry(direction).or_default();
        *queued += flight.message.len() + 64;
        if *queued > self.options.queue_bytes {
            self.break_pair(ordered(from, to), now, false);
            self.landed(&flight);
            return;
        }
        if self.options.break_one_in > 0 && self.rng.below(self.options.break_one_in) == 0 {
            self.break_pair(ordered(from, to), now, false);
        }
        if self.cuts.contains(&direction) {
            self.held.entry(direction).or_default().push(flight);
        } else {
            self.launch(flight, now);
        }
    }

    fn launch(&mut self, flight: Flight, now: u64) {
        let key = (flight.from, flight.to, flight.service);
        let delay = if flight.from == flight.to { 0 } else { self.delay() };
        let last = self.last.entry(key).or_default();
        let time = (now + delay).max(*last);
        *last = time;
        self.at(time, What::Deliver(flight));
    }

    fn landed(&mut self, flight: &Flight) {
        if let Some(queued) = self.queued.get_mut(&(flight.from, flight.to)) {
            *queued = queued.saturating_sub(flight.message.len() + 64);
        }
    }

    /// The session that a side sends on, made if there is none.
    fn session(&mut self, from: NodeId, to: NodeId, now: u64) -> u64 {
        let key = ordered(from, to);
        let mut pair = self.pairs.get(&key).copied().unwrap_or_default();
        let low = from <= to;
        if let Some(session) = *pair.side(low) {
            return session;
        }
        let session = match pair.live {
            Some(session) => session,
            None => {
                let session = self.next_session;
                self.next_session += 1;
                pair.live = Some(session);
                if from != to {
                    if !self.nodes.contains_key(&to) && !self.silent.contains(&to) {
                        let range = self.options.death_ms.clone();
                        let time = now + self.rng.range(range) * 1_000_000;
                        self.at(time, What::Suspect { pair: key, session });
                    } else if !self.nodes.contains_key(&to) || self.cuts.contains(&(from, to)) || self.cuts.contains(&(to, from))
                    {
                        self.suspect(key, session, now);
                    }
                }
                session
            }
        };
        *pair.side(low) = Some(session);
        self.pairs.insert(key, pair);
        session
    }

    fn break_all(&mut self, node: NodeId, now: u64, silently: bool) {
        let pairs: Vec<_> = self.pairs.keys().filter(|(a, b)| *a == node || *b == node).copied().collect();
        for key in pairs {
            self.break_pair(key, now, silently);
            // The node's own side begins anew.
            if let Some(pair) = self.pairs.get_mut(&key) {
                if key.0 == node {
                    pair.low_side = None;
                }
                if key.1 == node {
                    pair.high_side = None;
                }
            }
        }
    }

    fn break_pair(&mut self, key: (NodeId, NodeId), now: u64, silently: bool) {
        let Some(pair) = self.pairs.get_mut(&key) else { return };
        let Some(session) = pair.live.take() else { return };
        let pair = *pair;
        for (at, peer, side) in [(key.0, key.1, pair.low_side), (key.1, key.0, pair.high_side)] {
            if side == Some(session) {
                let range = if silently { self.options.silence_ms.clone() } else { self.options.death_ms.clone() };
                let time = now + self.rng.range(range) * 1_000_000;
                self.at(time, What::End { at, peer, session });
            }
        }
        for direction in [key, (key.1, key.0)] {
            for flight in self.held.remove(&direction).unwrap_or_default() {
                self.landed(&flight);
            }
        }
    }

    fn ended(&self, at: NodeId, peer: NodeId) -> Option<Call> {
        let node = self.nodes.get(&at)?;
        Some(Call::Ended(node.receivers.values().cloned().collect(), peer))
    }

    fn happen(&mut self, event: Event, now: u64) -> Vec<Call> {
        match event.what {
            What::Suspect { pair, session } => {
                let bad = self.cuts.contains(&pair)
                    || self.cuts.contains(&(pair.1, pair.0))
                    || !self.nodes.contains_key(&pair.0)
                    || !self.nodes.contains_key(&pair.1);
                if bad && self.pairs.get(&pair).is_some_and(|p| p.live == Some(session)) {
                    self.break_pair(pair, now, false);
                }
                Vec::new()
            }
            What::Gone { at, node, upto } => {
                if self.nodes.contains_key(&node) || self.silent.contains(&node) {
                    // It is back already, or its machine is gone, too: nobody says "refused".
                    return Vec::new();
                }
                if self.cuts.contains(&(at, node)) || self.cuts.contains(&(node, at)) {
                    self.at(now + 200_000_000, What::Gone { at, node, upto });
                    return Vec::new();
                }
                let watcher = self.nodes.get(&at).and_then(|n| n.watcher.clone());
                watcher.map(|w| Call::Gone(w, node, upto)).into_iter().collect()
            }
            What::End { at, peer, session } => {
                let low = at <= peer;
                let Some(pair) = self.pairs.get_mut(&ordered(at, peer)) else { return Vec::new() };
                if *pair.side(low) != Some(session) {
                    return Vec::new();
                }
                *pair.side(low) = None;
                self.ended(at, peer).into_iter().collect()
            }
            What::Deliver(flight) => {
                let counts = matches!(flight.service, Service::Mirror | Service::Token | Service::Lock);
                let gate = &self.options.gate;
                let passes = if counts { gate.pass() } else { !gate.is_closed() };
                if passes { self.deliver(flight, event.time) } else { Vec::new() }
            }
        }
    }

    fn deliver(&mut self, flight: Flight, time: u64) -> Vec<Call> {
        self.landed(&flight);
        let Flight { from, incarnation, to, service, session, message } = flight;
        let mut calls = Vec::new();
        let Some(pair) = self.pairs.get_mut(&ordered(from, to)) else { return calls };
        if pair.live != Some(session) {
            return calls;
        }
        if !self.nodes.contains_key(&to) {
            return calls;
        }
        let side = pair.side(to <= from);
        let outdated = side.is_some_and(|known| known != session) && from != to;
        *side = Some(session);
        if outdated {
            calls.extend(self.ended(to, from));
        }
        let Some(node) = self.nodes.get(&to) else { return calls };
        if let Some(receiver) = node.receivers.get(&service) {
            let count = self.counts.entry(service).or_default();
            count.messages += 1;
            count.bytes += message.len() as u64;
            *self.delivered_by_pair.entry((from, to, service)).or_default() += 1;
            let mut hash = self.trace;
            let mut mix = |bytes: &[u8]| {
                for byte in bytes {
                    hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
                }
            };
            mix(&time.to_le_bytes());
            mix(&from.0.to_le_bytes());
            mix(&to.0.to_le_bytes());
            mix(&[service as u8]);
            mix(&message.head);
            self.trace = hash;
            calls.push(Call::Receive(Arc::clone(receiver), Peer { node: from, incarnation, session }, message));
        }
        calls
    }
}

/// One process of a node on the simulated network.
pub struct SimEndpoint {
    net: Arc<NetShared>,
    node: NodeId,
    process: u64,
}

impl SimEndpoint {
    /// The node's state, unless this process has ended (its last tasks may still be running).
    fn own<'a>(&self, state: &'a mut NetState) -> Option<&'a mut NodeState> {
        state.nodes.get_mut(&self.node).filter(|n| n.process == self.process)
    }
}

impl Transport for SimEndpoint {
    fn local(&self) -> NodeId {
        self.node
    }

    fn send(&self, to: NodeId, service: Service, message: Message) {
        assert!(message.len() <= MESSAGE_BYTES_MAX, "message of {} bytes for {service:?} is too long", message.len());
        let mut state = self.net.state.lock();
        let Some(incarnation) = self.own(&mut state).map(|n| n.incarnation) else { return };
        let now = self.net.now();
        let session = state.session(self.node, to, now);
        let flight = Flight { from: self.node, incarnation, to, service, session, message };
        state.send(flight, now);
        drop(state);
        self.net.wake.notify_one();
    }

    fn register(&self, service: Service, receiver: Arc<dyn Receiver>) {
        let mut state = self.net.state.lock();
        let old = self.own(&mut state).and_then(|n| n.receivers.insert(service, receiver));
        drop(state);
        drop(old);
    }

    fn configure(&self, incarnation: Incarnation, _peers: &BTreeMap<NodeId, PeerAddr>) {
        let mut state = self.net.state.lock();
        let now = self.net.now();
        let Some(own) = self.own(&mut state) else { return };
        if std::mem::replace(&mut own.incarnation, incarnation) != incarnation {
            let pairs: Vec<_> = state.pairs.keys().filter(|(a, b)| *a == self.node || *b == self.node).copied().collect();
            pairs.into_iter().for_each(|pair| state.break_pair(pair, now, false));
        }
        drop(state);
        self.net.wake.notify_one();
    }

    fn watch(&self, watcher: Arc<dyn PeerWatcher>) {
        let mut state = self.net.state.lock();
        let old = self.own(&mut state).and_then(|n| n.watcher.replace(watcher));
        drop(state);
        drop(old);
    }
}
