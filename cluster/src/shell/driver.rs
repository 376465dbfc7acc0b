//! Runs the cores of one node: agreement, membership, and what the layers above see of them.
//!
//! Two owners: a task owns the agreement's core and its store (which may be slow); the membership core is behind a short
//! lock and is stepped where its messages come in, so that heartbeats never wait for a disk.
//!
//! Invariants:
//! - The agreement's status is given to membership before anything that follows from it is sent.
//! - A new configuration is shown to the layers (`view`) before membership reports it as adopted.
//! - Nothing that was started outlives [`ClusterNode::shutdown`] or the drop of the node.
//!
//! Excludes: sockets (`transport`), files (`state`).

use super::clock::Clock;
use crate::BoxFuture;
use crate::config::{Applied, Command, Config};
use crate::ids::{Epoch, Incarnation, NodeId};
use crate::machine::{Machine, REQUESTS_MAX, Request};
use crate::membership::{Input, Membership, Output, Timing, Wire};
use crate::node::{Cluster, Layer, ProposeError, View};
use crate::raft::{RaftCore, RaftTiming, RaftWire, Work};
use crate::store::{Batch, Store, StoreError};
use crate::time::Instant;
use crate::transport::{Message, Peer, PeerAddr, PeerWatcher, Receiver, Service, Transport};
use crate::watch;
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

/// Most inputs that wait for the agreement's task. What comes beyond is dropped, as if lost on the way: it is repeated.
const RAFT_QUEUE_MAX: usize = 1024;
/// Inputs that the agreement's task takes in before it makes the results durable together.
const RAFT_BATCH_MAX: usize = 64;
/// Ticks of membership per heartbeat.
const TICKS_PER_HEARTBEAT: u32 = 4;

/// What a node is made of.
pub struct Options {
    /// The node.
    pub me: NodeId,
    /// Where it listens, if that may differ from what the configuration says.
    pub addr: Option<String>,
    /// Where the other nodes are, as far as this node knows without a configuration (one that has just joined).
    pub peers: BTreeMap<NodeId, String>,
    /// What it has kept.
    pub store: Arc<dyn Store>,
    /// Messaging.
    pub transport: Arc<dyn Transport>,
    /// Its clock.
    pub clock: Arc<dyn Clock>,
    /// Seed of its random choices: when it stands for election.
    pub seed: u64,
    /// The cluster's times.
    pub timing: Timing,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its contents.
    #[error(transparent)]
    Raft(#[from] crate::raft::RaftError),
    /// The timing.
    #[error("the cluster's times contradict each other: {0}")]
    Timing(String),
}

/// A running node.
pub struct ClusterNode {
    shared: Arc<Shared>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    me: NodeId,
    /// This start of the daemon, in which its requests are numbered.
    life: Incarnation,
    timing: Timing,
    clock: Arc<dyn Clock>,
    transport: Arc<dyn Transport>,
    peers: BTreeMap<NodeId, String>,
    membership: Mutex<Membership>,
    view: watch::Sender<Arc<View>>,
    leader: watch::Sender<Option<NodeId>>,
    failed: watch::Sender<Option<String>>,
    lease_until: AtomicU64,
    stopped: AtomicBool,
    raft: mpsc::Sender<ToRaft>,
    requests: Mutex<Requests>,
    slots: Semaphore,
}

#[derive(Default)]
struct Requests {
    last: u64,
    waiting: BTreeMap<u64, oneshot::Sender<Applied>>,
    /// Requests that nobody waits for: any number above these may still be under way.
    open: BTreeSet<u64>,
}

enum ToRaft {
    Message(NodeId, RaftWire),
    Propose(Request),
    SessionEnded(NodeId),
    LeaderGone(NodeId),
    NewIncarnation(Incarnation),
}

/// Starts a node. Must be called within a tokio runtime.
///
/// # Errors
/// If its saved state cannot be read.
pub fn start(options: Options) -> Result<Arc<ClusterNode>, StartError> {
    let Options { me, addr, peers, store, transport, clock, seed, timing } = options;
    timing.check().map_err(StartError::Timing)?;
    let saved = store.load()?;
    let life = Incarnation(saved.incarnation.0 + 1);
    let raft_timing =
        RaftTiming { election_ticks: timing.election_ticks, heartbeat_ticks: 2.min(timing.election_ticks / 3).max(1) };
    let core = RaftCore::new(me, &saved, raft_timing, seed)?;
    let config = Arc::new(core.machine().config.clone());
    let membership = Membership::new(me, life, addr, Arc::clone(&config), timing);
    let (raft, inputs) = mpsc::channel(RAFT_QUEUE_MAX);
    let view = View { me, config, recovered: Layer::None, member: false };
    let shared = Arc::new(Shared {
        me,
        life,
        timing,
        clock,
        transport,
        peers,
        membership: Mutex::new(membership),
        view: watch::Sender::new(Arc::new(view)),
        leader: watch::Sender::new(None),
        failed: watch::Sender::new(None),
        lease_until: AtomicU64::new(0),
        stopped: AtomicBool::new(false),
        raft,
        requests: Mutex::new(Requests::default()),
        slots: Semaphore::new(REQUESTS_MAX),
    });
    let node = Arc::new(ClusterNode { shared: Arc::clone(&shared), tasks: Mutex::new(Vec::new()) });
    let receiver = |service| Arc::new(Incoming { service, shared: Arc::downgrade(&shared) });
    shared.transport.register(Service::Raft, receiver(Service::Raft));
    shared.transport.register(Service::Membership, receiver(Service::Membership));
    shared.transport.watch(receiver(Service::Membership));
    let task = RaftTask {
        shared: Arc::clone(&shared),
        core,
        store,
        inputs,
        batches: VecDeque::new(),
        saving: None,
        last_epoch: Epoch(0),
    };
    node.tasks.lock().push(tokio::spawn(task.run(life)));
    Ok(node)
}

impl ClusterNode {
    /// Stops everything that the node runs. What was proposed may still happen.
    pub fn shutdown(&self) {
        self.shared.stop();
        self.tasks.lock().iter().for_each(JoinHandle::abort);
    }

    /// As `shutdown`, and waits until all of it has ended and the store is let go of.
    pub async fn stop(&self) {
        self.shutdown();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            let _ = task.await;
        }
    }

    /// This node's present life.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.shared.membership.lock().incarnation()
    }

    /// The node that leads the agreement, as far as this one knows.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        *self.shared.leader.borrow()
    }

    /// Follows who leads.
    #[must_use]
    pub fn leader_watch(&self) -> watch::Receiver<Option<NodeId>> {
        self.shared.leader.subscribe()
    }

    /// Why the node stopped by itself (its store failed), if it did.
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.shared.failed.subscribe()
    }
}

impl Drop for ClusterNode {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Cluster for ClusterNode {
    fn local(&self) -> NodeId {
        self.shared.me
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view.subscribe()
    }

    fn lease_until(&self) -> Instant {
        Instant(self.shared.lease_until.load(Ordering::Acquire))
    }

    fn now(&self) -> Instant {
        self.shared.clock.now()
    }

    fn finish(&self, epoch: Epoch, layer: Layer) {
        self.shared.step(Input::Finish { epoch, layer });
    }

    fn propose(&self, command: Command) -> BoxFuture<'_, Result<Applied, ProposeError>> {
        Box::pin(self.shared.propose(command))
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::clone(&self.shared.transport)
    }
}

impl Shared {
    /// Steps the membership core and does what it wants.
    fn step(&self, input: Input) {
        let mut out = Vec::new();
        let now = self.clock.now();
        let mut later = Vec::new();
        {
            let mut core = self.membership.lock();
            if self.stopped.load(Ordering::Acquire) {
                return;
            }
            core.step(now, input, &mut out);
            for output in out {
                match output {
                    // Under the lock, so that an older lease or layer never replaces a newer one.
                    Output::Lease(until) => self.lease_until.store(until.0, Ordering::Release),
                    Output::Recovered(epoch, layer) => self.show_recovered(epoch, layer),
                    other => later.push(other),
                }
            }
        }
        for output in later {
            match output {
                Output::Send(to, wire) => self.send(to, Service::Membership, &wire),
                Output::Propose(command) => self.propose_unanswered(command),
                Output::NewIncarnation(above) => self.to_raft(ToRaft::NewIncarnation(above)),
                Output::LeaderGone(node) => self.to_raft(ToRaft::LeaderGone(node)),
                Output::Lease(_) | Output::Recovered(..) => {}
            }
        }
    }

    /// From now on this node says nothing and holds no lease.
    fn stop(&self) {
        let _core = self.membership.lock();
        self.stopped.store(true, Ordering::Release);
        self.lease_until.store(0, Ordering::Release);
    }

    fn show_recovered(&self, epoch: Epoch, layer: Layer) {
        self.view.send_if_modified(|view| {
            if view.epoch() != epoch || view.recovered >= layer {
                return false;
            }
            *view = Arc::new(View { recovered: layer, ..View::clone(view) });
            true
        });
    }

    fn send<T: Serialize>(&self, to: NodeId, service: Service, message: &T) {
        match postcard::to_allocvec(message) {
            Ok(head) => self.transport.send(to, service, Message::new(head)),
            Err(e) => tracing::error!("message for {to} not encoded: {e}"),
        }
    }

    fn to_raft(&self, input: ToRaft) {
        if self.raft.try_send(input).is_err() {
            tracing::debug!("the agreement's queue is full; an input is dropped");
        }
    }

    /// Tells membership the agreement's status, and whoever waits for a leader.
    fn show_status(&self, core: &RaftCore) {
        let status = core.status();
        let leader = status.leader;
        if *self.membership.lock().raft() != status {
            self.step(Input::Raft(status));
        }
        self.leader.send_if_modified(|old| std::mem::replace(old, leader) != leader);
    }

    /// Shows a configuration to the layers, then tells membership.
    fn show_config(&self, config: &Arc<Config>) {
        {
            let core = self.membership.lock();
            let incarnation = core.incarnation();
            let member = config.nodes.get(&self.me).is_some_and(|n| n.up && n.incarnation == incarnation);
            self.view.send_if_modified(|view| {
                let recovered = if view.epoch() == config.epoch { view.recovered } else { Layer::None };
                let new = View { me: self.me, config: Arc::clone(config), recovered, member };
                let changed = **view != new;
                if changed {
                    *view = Arc::new(new);
                }
                changed
            });
        }
        self.configure_transport(config);
        self.step(Input::Config(Arc::clone(config)));
    }

    fn configure_transport(&self, config: &Config) {
        let mut peers: BTreeMap<NodeId, PeerAddr> = BTreeMap::new();
        if config.nodes.is_empty() {
            let known = self.peers.iter().map(|(id, addr)| (*id, PeerAddr { addr: addr.clone(), incarnation: Incarnation(0) }));
            peers.extend(known);
        }
        let known = config.nodes.iter().map(|(id, n)| (*id, PeerAddr { addr: n.addr.clone(), incarnation: n.incarnation }));
        peers.extend(known);
        peers.remove(&self.me);
        let incarnation = self.membership.lock().incarnation();
        self.transport.configure(incarnation, &peers);
    }

    fn request(&self, command: Command, waiting: Option<oneshot::Sender<Applied>>) -> Request {
        let mut requests = self.requests.lock();
        requests.last += 1;
        let number = requests.last;
        if let Some(waiting) = waiting {
            requests.waiting.insert(number, waiting);
            requests.open.insert(number);
        }
        let done = requests.open.first().map_or(number, |first| *first) - 1;
        Request { origin: self.me, life: self.life, number, done, command }
    }

    fn route(&self, request: &Request) {
        let leader = *self.leader.borrow();
        match leader {
            Some(leader) if leader == self.me => self.to_raft(ToRaft::Propose(request.clone())),
            Some(leader) => self.send(leader, Service::Raft, &RaftWire::Request(request.clone())),
            // Somebody else may know. (A node whose address has changed hears of no leader before it has said so.)
            None => {
                let wire = RaftWire::Request(request.clone());
                let view = self.view.borrow().clone();
                let others = view.config.nodes.iter().filter(|(id, n)| n.voter && **id != self.me);
                others.for_each(|(id, _)| self.send(*id, Service::Raft, &wire));
            }
        }
    }

    fn propose_unanswered(&self, command: Command) {
        let request = self.request(command, None);
        self.route(&request);
    }

    async fn propose(&self, command: Command) -> Result<Applied, ProposeError> {
        if matches!(command, Command::NodesDown { .. }) {
            // Its safety rests on what the leader knows of leases.
            return Err(ProposeError::Refused("only the leader declares nodes dead, when their leases have run out".into()));
        }
        let deadline = tokio::time::Instant::now() + self.timing.propose;
        let Ok(Ok(_slot)) = tokio::time::timeout_at(deadline, self.slots.acquire()).await else {
            return Err(ProposeError::Unavailable);
        };
        let (waiting, mut answer) = oneshot::channel();
        let request = self.request(command, Some(waiting));
        let _open = OpenRequest { shared: self, number: request.number };
        let mut leader = self.leader.subscribe();
        loop {
            drop(leader.borrow_and_update());
            self.route(&request);
            let again = tokio::time::Instant::now() + self.timing.retry;
            tokio::select! {
                biased;
                applied = &mut answer => return match applied {
                    Ok(Applied::Refused(why)) => Err(ProposeError::Refused(why)),
                    Ok(applied) => Ok(applied),
                    Err(_) => Err(ProposeError::Unavailable),
                },
                () = tokio::time::sleep_until(deadline) => return Err(ProposeError::Unavailable),
                changed = leader.changed() => if changed.is_err() { return Err(ProposeError::Unavailable) },
                () = tokio::time::sleep_until(again) => {}
            }
        }
    }

    fn answer(&self, number: u64, applied: Applied) {
        let waiting = self.requests.lock().waiting.remove(&number);
        if let Some(waiting) = waiting {
            let _ = waiting.send(applied);
        }
    }
}

/// A request that somebody waits for; done when dropped.
struct OpenRequest<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for OpenRequest<'_> {
    fn drop(&mut self) {
        let mut requests = self.shared.requests.lock();
        requests.waiting.remove(&self.number);
        requests.open.remove(&self.number);
    }
}

/// Receives messages. Holds the node weakly: the transport keeps it longer than the node may live.
struct Incoming {
    service: Service,
    shared: Weak<Shared>,
}

fn decode<T: DeserializeOwned>(from: Peer, message: &Message) -> Option<T> {
    match postcard::from_bytes(&message.head) {
        Ok(wire) => Some(wire),
        Err(e) => {
            tracing::warn!("{} sent a message that cannot be read: {e}", from.node);
            None
        }
    }
}

impl Receiver for Incoming {
    fn receive(&self, from: Peer, message: Message) {
        let Some(shared) = self.shared.upgrade() else { return };
        match self.service {
            Service::Membership => {
                if let Some(wire) = decode::<Wire>(from, &message) {
                    shared.step(Input::Message { from: from.node, wire });
                }
            }
            Service::Raft => {
                if let Some(wire) = decode::<RaftWire>(from, &message) {
                    shared.to_raft(ToRaft::Message(from.node, wire));
                }
            }
            _ => {}
        }
    }

    fn session_ended(&self, node: NodeId) {
        if self.service == Service::Raft
            && let Some(shared) = self.shared.upgrade()
        {
            shared.to_raft(ToRaft::SessionEnded(node));
        }
    }
}

impl PeerWatcher for Incoming {
    fn process_gone(&self, node: NodeId, upto: Incarnation) {
        if let Some(shared) = self.shared.upgrade() {
            shared.step(Input::ProcessGone { node, upto });
        }
    }
}

/// Owns the agreement's core and the store.
struct RaftTask {
    shared: Arc<Shared>,
    core: RaftCore,
    store: Arc<dyn Store>,
    inputs: mpsc::Receiver<ToRaft>,
    /// Batches to be made durable, in order, with what follows then.
    batches: VecDeque<(Batch, Saved)>,
    saving: Option<BoxFuture<'static, (Result<(), StoreError>, Saved)>>,
    last_epoch: Epoch,
}

/// What a batch was for.
enum Saved {
    Core,
    Incarnation(Incarnation),
}

impl RaftTask {
    async fn run(mut self, life: Incarnation) {
        let shared = Arc::clone(&self.shared);
        let result = async {
            // Before anything is said in this life.
            self.store.save(Batch { incarnation: Some(life), ..Batch::default() }).await?;
            shared.configure_transport(&self.core.machine().config);
            // Replays what was committed, before the first tick.
            self.work();
            let ticks = tick_membership(Arc::downgrade(&shared), shared.timing.heartbeat / TICKS_PER_HEARTBEAT);
            let ticks = AbortOnDrop(tokio::spawn(ticks));
            let result = self.serve().await;
            drop(ticks);
            result
        };
        if let Err(e) = result.await {
            tracing::error!("this node stops taking part in the cluster: {e}");
            self.shared.stop();
            self.shared.failed.send_replace(Some(e.to_string()));
        }
    }

    async fn serve(&mut self) -> Result<(), StoreError> {
        let mut ticks = tokio::time::interval(self.shared.timing.raft_tick);
        // After standing still, time that has passed unseen is not made up for: it would look like a silent leader.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = ticks.tick() => {
                    self.core.tick();
                    self.core.reconcile();
                }
                (result, what) = saving(&mut self.saving) => {
                    result?;
                    self.saved(what);
                }
                input = self.inputs.recv() => {
                    let Some(input) = input else { return Ok(()) };
                    self.take(input);
                    for _ in 1..RAFT_BATCH_MAX {
                        match self.inputs.try_recv() {
                            Ok(input) => self.take(input),
                            Err(_) => break,
                        }
                    }
                }
            }
            self.work();
        }
    }

    fn saved(&mut self, what: Saved) {
        self.saving = None;
        match what {
            Saved::Core => self.core.saved(),
            Saved::Incarnation(new) => {
                tracing::info!("this node goes on as {new}");
                self.shared.step(Input::Incarnation(new));
                self.shared.configure_transport(&self.core.machine().config);
            }
        }
    }

    fn take(&mut self, input: ToRaft) {
        match input {
            ToRaft::Message(from, RaftWire::Raft(bytes)) => self.core.step(from, &bytes),
            ToRaft::Message(from, RaftWire::Request(request)) => {
                // Nobody asks in another's name, and only the leader's own membership declares nodes dead.
                if request.origin == from
                    && !matches!(request.command, Command::NodesDown { .. })
                    && !self.core.propose(&request)
                    && let Some(leader) = self.core.status().leader.filter(|l| *l != from && *l != self.shared.me)
                {
                    self.shared.send(leader, Service::Raft, &RaftWire::Forwarded(request));
                }
            }
            ToRaft::Message(_, RaftWire::Forwarded(request)) => {
                if !matches!(request.command, Command::NodesDown { .. }) {
                    self.core.propose(&request);
                }
            }
            ToRaft::Propose(request) => {
                self.core.propose(&request);
            }
            ToRaft::SessionEnded(node) => self.core.unreachable(node),
            ToRaft::LeaderGone(node) => self.core.process_gone(node),
            ToRaft::NewIncarnation(above) => {
                let now = self.shared.membership.lock().incarnation();
                let new = Incarnation(now.0.max(above.0) + 1);
                self.batches.push_back((Batch { incarnation: Some(new), ..Batch::default() }, Saved::Incarnation(new)));
            }
        }
    }

    /// Does all work that the core has, and sees to it that batches become durable.
    fn work(&mut self) {
        loop {
            self.shared.show_status(&self.core);
            while let Some(work) = self.core.poll() {
                self.shared.show_status(&self.core);
                self.perform(work);
            }
            if self.saving.is_some() {
                return;
            }
            let Some((batch, what)) = self.batches.pop_front() else { return };
            if batch.is_empty() {
                self.saved(what);
                continue;
            }
            let store = Arc::clone(&self.store);
            self.saving = Some(Box::pin(async move { (store.save(batch).await, what) }));
        }
    }

    fn perform(&mut self, work: Work) {
        let Work { send, save, answers, changed, restored } = work;
        self.send(send);
        if let Some(batch) = save {
            self.batches.push_back((batch, Saved::Core));
        }
        if changed {
            self.adopt();
        }
        for (origin, life, number, applied) in answers {
            if origin == self.shared.me && life == self.shared.life {
                self.shared.answer(number, applied);
            }
        }
        if restored {
            self.answer_restored();
        }
    }

    fn adopt(&mut self) {
        let config = &self.core.machine().config;
        if config.epoch != self.last_epoch {
            self.last_epoch = config.epoch;
            let up: Vec<String> = config.up().iter().map(NodeId::to_string).collect();
            tracing::info!("epoch {}: up are {}", config.epoch, up.join(" "));
        }
        self.shared.show_config(&Arc::new(config.clone()));
    }

    /// Requests may have been applied within a state that came as a whole.
    fn answer_restored(&self) {
        let numbers: Vec<u64> = self.shared.requests.lock().waiting.keys().copied().collect();
        let machine: &Machine = self.core.machine();
        for number in numbers {
            if let Some(applied) = machine.answer(self.shared.me, self.shared.life, number) {
                self.shared.answer(number, applied.clone());
            }
        }
    }

    fn send(&self, messages: Vec<(NodeId, RaftWire)>) {
        for (to, wire) in messages {
            self.shared.send(to, Service::Raft, &wire);
        }
    }
}

/// Resolves when what is being saved is durable; never if nothing is.
async fn saving(slot: &mut Option<BoxFuture<'static, (Result<(), StoreError>, Saved)>>) -> (Result<(), StoreError>, Saved) {
    match slot {
        Some(saving) => saving.await,
        None => std::future::pending().await,
    }
}

async fn tick_membership(shared: Weak<Shared>, every: std::time::Duration) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        shared.step(Input::Tick);
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
