//! `Locks`: one node's part in the cluster-wide byte-range locks. Runs the cores of `crate::locks`.
//!
//! Invariants:
//! - A wait that is interrupted ends with the master's word on whether the lock was granted first, or with the node's place in
//!   the cluster. One whose future is dropped is cancelled, and the range given up, with what was held of it before: only for
//!   owners that are no more.

use crate::api::{DiskError, ObjectId};
use crate::locks::master::Early;
use crate::locks::{
    LockAnswer, LockClient, LockKind, LockMaster, LockMessage, LockOutput, LockRange, LockRequest, LockTarget, Wait, Waiting,
};
use crate::message::Membership;
use cluster::{Cluster, Epoch, Layer, Message, NodeId, Peer, Receiver, Service, Transport, View};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::sync::{Arc, Weak};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The most requests that may wait for this node to adopt their epoch, or for everybody to re-assert.
const EARLY_MAX: usize = 262_144;

/// Told of objects on which this node's locks are gone, since it was cut off. Says whether it wants to hear of the next, too.
pub type LostLocks = Box<dyn Fn(&[ObjectId]) -> bool + Send + Sync>;

struct State {
    client: LockClient,
    master: LockMaster,
    membership: Membership,
    /// The epoch that the cores are in.
    epoch: Epoch,
    early: Waiting,
    waiters: BTreeMap<u64, oneshot::Sender<LockAnswer>>,
}

struct Node {
    cluster: Arc<dyn Cluster>,
    transport: Arc<dyn Transport>,
    state: Mutex<State>,
    lost: Mutex<Vec<LostLocks>>,
}

/// The lock service of a daemon, for all its file systems. It stops when it is dropped.
pub struct Locks {
    node: Arc<Node>,
    task: JoinHandle<()>,
}

impl Locks {
    /// Starts it, on the current tokio runtime. In every epoch it re-asserts what is held as soon as the tokens have
    /// recovered, and reports [`Layer::Fs`] when everybody has done so.
    #[must_use]
    pub fn start(cluster: Arc<dyn Cluster>) -> Arc<Locks> {
        let node = Arc::new(Node {
            transport: cluster.transport(),
            state: Mutex::new(State {
                client: LockClient::new(cluster.local()),
                master: LockMaster::default(),
                membership: Membership::default(),
                epoch: Epoch::default(),
                early: Waiting::new(EARLY_MAX),
                waiters: BTreeMap::new(),
            }),
            lost: Mutex::default(),
            cluster,
        });
        node.transport.register(Service::Lock, Arc::new(Inbox(Arc::downgrade(&node))));
        let task = tokio::spawn(follow(node.clone()));
        Arc::new(Locks { node, task })
    }

    /// Adds to those who are told of lost locks. They must not call back. Those who do not want to hear of any more are taken
    /// out: they are asked, with nothing lost, whenever somebody is added.
    pub fn on_lost(&self, lost: LostLocks) {
        let mut all = self.node.lost.lock();
        all.retain(|tell| tell(&[]));
        all.push(lost);
    }

    /// Takes a lock for `owner` (a kernel's lock owner number). If it does not `wait`, or too many wait already, a conflict is
    /// the answer. If the wait would never end, since owners wait for each other in a circle, the answer is `Deadlock`. When
    /// `interrupted` comes first, the answer is `Cancelled`, or `Done` if it was granted before that
    /// reached the master.
    ///
    /// # Errors
    /// `Shutdown` when the service stops.
    #[allow(clippy::too_many_arguments, reason = "they are a process's request, as the kernel passes it on")]
    pub async fn lock(
        &self,
        target: LockTarget,
        owner: u64,
        range: LockRange,
        kind: LockKind,
        pid: u32,
        wait: Wait,
        interrupted: impl Future<Output = ()> + Send,
    ) -> Result<LockAnswer, DiskError> {
        self.ask(target, owner, range, LockRequest::Lock { kind, pid, wait }, interrupted).await
    }

    /// Gives up what `owner` holds of the range. Costs no message if it holds nothing of the object.
    ///
    /// # Errors
    /// `Shutdown` when the service stops.
    pub async fn unlock(&self, target: LockTarget, owner: u64, range: LockRange) -> Result<(), DiskError> {
        self.ask(target, owner, range, LockRequest::Unlock, pending()).await.map(|_| ())
    }

    /// Which lock would keep this one from being taken.
    ///
    /// # Errors
    /// `Shutdown` when the service stops.
    pub async fn query(&self, target: LockTarget, owner: u64, range: LockRange, kind: LockKind) -> Result<LockAnswer, DiskError> {
        self.ask(target, owner, range, LockRequest::Query { kind }, pending()).await
    }

    /// The tokens of this node are gone, so its locks are, too. Those who are told of lost locks know before this returns,
    /// though the locks' own part of the new epoch has not begun.
    pub fn lose(&self) {
        self.node.step(|s, out| s.client.lose(out));
    }

    /// The strongest lock that `owner` holds there.
    #[must_use]
    pub fn holds(&self, target: LockTarget, owner: u64) -> Option<LockKind> {
        self.node.state.lock().client.holds(target, owner)
    }

    async fn ask(
        &self,
        target: LockTarget,
        owner: u64,
        range: LockRange,
        request: LockRequest,
        interrupted: impl Future<Output = ()> + Send,
    ) -> Result<LockAnswer, DiskError> {
        let (tx, rx) = oneshot::channel();
        let ticket = self.node.step(|s, out| {
            let State { client, membership, waiters, .. } = s;
            let ticket = client.ask(target, owner, range, request, &|o| master_of(membership, o), out);
            waiters.insert(ticket, tx);
            ticket
        });
        let mut asking = Asking { node: &self.node, ticket, target, owner, range, request, answered: false };
        let mut rx = rx;
        let answer = tokio::select! {
            biased;
            answer = &mut rx => answer,
            () = interrupted => {
                self.node.step(|s, out| {
                    let State { client, membership, .. } = s;
                    client.cancel(ticket, &|o| master_of(membership, o), out);
                });
                rx.await
            }
        };
        asking.answered = true;
        answer.map_err(|_| DiskError::Shutdown)
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        self.task.abort();
        self.node.state.lock().waiters.clear();
    }
}

/// A question whose answer somebody waits for.
struct Asking<'a> {
    node: &'a Arc<Node>,
    ticket: u64,
    target: LockTarget,
    owner: u64,
    range: LockRange,
    request: LockRequest,
    answered: bool,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        self.node.step(|s, out| {
            let State { client, membership, waiters, .. } = s;
            waiters.remove(&self.ticket);
            let place = |o| master_of(membership, o);
            if client.is_pending(self.ticket) {
                client.cancel(self.ticket, &place, out);
            }
            // It may have been granted, or be granted before the cancel arrives; nobody would know of that lock.
            if matches!(self.request, LockRequest::Lock { .. }) {
                client.ask(self.target, self.owner, self.range, LockRequest::Unlock, &place, out);
            }
        });
    }
}

/// The member that keeps an object's locks. While this node is not a member it is not asked.
fn master_of(membership: &Membership, object: ObjectId) -> NodeId {
    membership.master(object).map_or(NodeId(0), |m| m.0)
}

impl Node {
    /// Steps the cores, and performs what comes of it, in order (sending never blocks).
    fn step<R>(&self, f: impl FnOnce(&mut State, &mut Vec<LockOutput>) -> R) -> R {
        let mut lost = Vec::new();
        let r = {
            let mut state = self.state.lock();
            let mut out = Vec::new();
            let r = f(&mut state, &mut out);
            for output in out {
                match output {
                    LockOutput::Send(to, message) => self.send(to, &message),
                    LockOutput::Answered(ticket, answer) => {
                        if let Some(w) = state.waiters.remove(&ticket) {
                            let _ = w.send(answer);
                        }
                    }
                    LockOutput::Lost(objects) => lost.extend(objects),
                }
            }
            r
        };
        if !lost.is_empty() {
            tracing::warn!(objects = lost.len(), "this node was cut off: the file locks that it held are gone");
            self.lost.lock().retain(|tell| tell(&lost));
        }
        r
    }

    fn send(&self, to: NodeId, message: &LockMessage) {
        match postcard::to_stdvec(message) {
            Ok(head) => self.transport.send(to, Service::Lock, Message::new(head)),
            Err(error) => tracing::error!(%error, "a lock message cannot be encoded"),
        }
    }

    /// Brings messages to the master, behind those that came too early before them.
    fn bring(&self, state: &mut State, message: Option<Early>) {
        let mut sends = Vec::new();
        if state.early.bring(&mut state.master, message, &mut sends) {
            tracing::error!("too many lock requests wait for the epoch to recover; the newest are to be repeated then");
        }
        for (to, message) in sends {
            self.send(to, &message);
        }
    }

    fn adopt(&self, view: &View) {
        if view.recovered < Layer::Sld && view.member {
            return;
        }
        self.step(|s, out| {
            if !view.member {
                s.client.lose(out);
                return;
            }
            if s.epoch == view.epoch() {
                return;
            }
            let membership = Membership::of(&view.config);
            let members: BTreeMap<_, _> =
                view.config.nodes.iter().filter(|(_, n)| n.up).map(|(id, n)| (*id, n.incarnation)).collect();
            let Some(life) = members.get(&view.me).copied() else { return };
            s.epoch = view.epoch();
            s.master.begin_epoch(view.epoch(), members.clone());
            s.client.begin_epoch(view.epoch(), life, members.into_keys().collect(), &|o| master_of(&membership, o), out);
            s.membership = membership;
            self.bring(s, None);
        });
        self.report();
    }

    /// Reports that the locks have recovered, if they have.
    fn report(&self) {
        let done = {
            let state = self.state.lock();
            (state.master.recovered() && state.epoch != Epoch(0)).then_some(state.epoch)
        };
        if let Some(epoch) = done {
            self.cluster.finish(epoch, Layer::Fs);
        }
    }
}

async fn follow(node: Arc<Node>) {
    let mut view = node.cluster.view();
    loop {
        let v = view.borrow_and_update().clone();
        node.adopt(&v);
        if view.changed().await.is_err() {
            return;
        }
    }
}

struct Inbox(Weak<Node>);

impl Receiver for Inbox {
    fn receive(&self, from: Peer, message: Message) {
        let Some(node) = self.0.upgrade() else { return };
        let message: LockMessage = match postcard::from_bytes(&message.head) {
            Ok(m) => m,
            Err(error) => {
                tracing::warn!(node = %from.node, %error, "a lock message cannot be decoded; ignored");
                return;
            }
        };
        let reassert = matches!(message, LockMessage::Reassert { .. });
        node.step(|s, out| {
            if message.is_for_client() {
                let State { client, membership, .. } = s;
                client.receive(from.node, message, &|o| master_of(membership, o), out);
            } else {
                node.bring(s, Some((from.node, message)));
            }
        });
        if reassert {
            node.report();
        }
    }

    fn session_ended(&self, peer: NodeId) {
        let Some(node) = self.0.upgrade() else { return };
        node.step(|s, out| {
            let State { client, membership, .. } = s;
            client.session_ended(peer, &|o| master_of(membership, o), out);
        });
    }
}
