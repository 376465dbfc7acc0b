//! `Notices`: one node tells all others of an object, and waits until each has done what follows from that.
//!
//! Who gives up a token takes back at once what was believed on the strength of it. A notice is for what cannot wait until
//! somebody asks again: it comes when the change has been made, and the change is not over before everybody has heeded it.
//!
//! Invariants:
//! - `tell` ends when each member that was up when it began has heeded the notice, or is up no more in that life; or when this
//!   node is no member any more.
//! - A notice that is being heeded is not heeded a second time meanwhile: it is repeated, since messages can be lost.
//! - What is being heeded is bounded; what comes beyond is dropped, and comes again.
//!
//! Excludes: what follows from a notice (the file system's mounts), and tokens: none must be held by who tells.

use crate::api::ObjectId;
use cluster::{BoxFuture, Cluster, Incarnation, Message, NodeId, Peer, Receiver, Service, Transport, View};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;

/// After this time a notice is repeated to who has not heeded it.
const AGAIN: Duration = Duration::from_millis(100);
/// Notices of others that are heeded at a time.
const HEEDED_MAX: usize = 1024;

/// What travels.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum NoticeMessage {
    /// Heed this. Numbers are of one life of the sender.
    Tell { number: u64, object: ObjectId },
    /// It has been heeded: the notice of that number, which the receiver sent in that life.
    Heeded { life: Incarnation, number: u64 },
}

/// Does what follows from a notice. `None`: nothing does, here or ever again.
pub type Heed = Box<dyn Fn(ObjectId) -> Option<BoxFuture<'static, ()>> + Send + Sync>;

#[derive(Default)]
struct State {
    last: u64,
    /// By number, who has not heeded a notice of this node yet.
    told: BTreeMap<u64, BTreeMap<NodeId, Incarnation>>,
    heeding: BTreeSet<(NodeId, Incarnation, u64)>,
}

struct Node {
    cluster: Arc<dyn Cluster>,
    transport: Arc<dyn Transport>,
    state: Mutex<State>,
    /// Somebody has heeded something.
    heeded: Notify,
    heeds: Mutex<Vec<Arc<Heed>>>,
    runtime: Handle,
}

/// The notices of a daemon, for all its file systems.
pub struct Notices {
    node: Arc<Node>,
}

impl Notices {
    /// Starts it, on the current tokio runtime.
    #[must_use]
    pub fn start(cluster: Arc<dyn Cluster>) -> Arc<Notices> {
        let node = Arc::new(Node {
            transport: cluster.transport(),
            cluster,
            state: Mutex::default(),
            heeded: Notify::new(),
            heeds: Mutex::default(),
            runtime: Handle::current(),
        });
        node.transport.register(Service::Notice, Arc::new(Inbox(Arc::downgrade(&node))));
        Arc::new(Notices { node })
    }

    /// Adds to what is done upon notices of other nodes. What says that it does nothing any more is taken out.
    pub fn on_notice(&self, heed: Heed) {
        self.node.heeds.lock().push(Arc::new(heed));
    }

    /// Does on this node what follows from a notice.
    pub async fn heed(&self, object: ObjectId) {
        self.node.heed(object).await;
    }

    /// Tells all other members of an object, and waits until they have heeded it.
    pub async fn tell(&self, object: ObjectId) {
        let node = &self.node;
        let mut view = node.cluster.view();
        let Some(up) = others(&view.borrow_and_update()).filter(|up| !up.is_empty()) else { return };
        let telling = Telling { node, number: node.begin(up) };
        loop {
            for to in node.left(telling.number) {
                node.send(to, NoticeMessage::Tell { number: telling.number, object });
            }
            let again = tokio::time::sleep(AGAIN);
            tokio::pin!(again);
            loop {
                let heeded = node.heeded.notified();
                tokio::pin!(heeded);
                heeded.as_mut().enable();
                if node.left(telling.number).is_empty() {
                    return;
                }
                tokio::select! {
                    biased;
                    () = heeded => {}
                    () = &mut again => break,
                    changed = view.changed() => {
                        let Some(up) = others(&view.borrow_and_update()).filter(|_| changed.is_ok()) else { return };
                        node.keep(telling.number, &up);
                    }
                }
            }
        }
    }
}

/// The other members that are up; none if this node is no member.
fn others(view: &View) -> Option<BTreeMap<NodeId, Incarnation>> {
    let up = view.config.nodes.iter().filter(|(id, node)| node.up && **id != view.me);
    view.member.then(|| up.map(|(id, node)| (*id, node.incarnation)).collect())
}

/// Somebody waits for a notice to be heeded.
struct Telling<'a> {
    node: &'a Node,
    number: u64,
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.node.state.lock().told.remove(&self.number);
    }
}

/// A notice is being heeded; however that ends.
struct Heeding<'a> {
    node: &'a Node,
    key: (NodeId, Incarnation, u64),
}

impl Drop for Heeding<'_> {
    fn drop(&mut self) {
        self.node.state.lock().heeding.remove(&self.key);
    }
}

impl Node {
    /// The life in which this node is a member, or was last.
    fn life(&self) -> Incarnation {
        let view = self.cluster.view();
        let view = view.borrow();
        view.config.nodes.get(&view.me).map(|node| node.incarnation).unwrap_or_default()
    }

    fn begin(&self, others: BTreeMap<NodeId, Incarnation>) -> u64 {
        let mut state = self.state.lock();
        state.last += 1;
        let number = state.last;
        state.told.insert(number, others);
        number
    }

    fn left(&self, number: u64) -> Vec<NodeId> {
        self.state.lock().told.get(&number).map(|left| left.keys().copied().collect()).unwrap_or_default()
    }

    /// Only these are up.
    fn keep(&self, number: u64, up: &BTreeMap<NodeId, Incarnation>) {
        if let Some(left) = self.state.lock().told.get_mut(&number) {
            left.retain(|node, life| up.get(node) == Some(life));
        }
    }

    fn send(&self, to: NodeId, message: NoticeMessage) {
        match postcard::to_stdvec(&message) {
            Ok(head) => self.transport.send(to, Service::Notice, Message::new(head)),
            Err(error) => tracing::error!(%error, "a notice cannot be encoded"),
        }
    }

    async fn heed(&self, object: ObjectId) {
        let heeds = self.heeds.lock().clone();
        for heed in heeds {
            match heed(object) {
                Some(heeding) => heeding.await,
                None => self.heeds.lock().retain(|h| !Arc::ptr_eq(h, &heed)),
            }
        }
    }
}

struct Inbox(Weak<Node>);

impl Receiver for Inbox {
    fn receive(&self, from: Peer, message: Message) {
        let Some(node) = self.0.upgrade() else { return };
        match postcard::from_bytes(&message.head) {
            Ok(NoticeMessage::Tell { number, object }) => {
                let key = (from.node, from.incarnation, number);
                {
                    let heeding = &mut node.state.lock().heeding;
                    if heeding.len() == HEEDED_MAX || !heeding.insert(key) {
                        return;
                    }
                }
                let runtime = node.runtime.clone();
                runtime.spawn(async move {
                    let heeding = Heeding { node: &node, key };
                    node.heed(object).await;
                    drop(heeding);
                    node.send(from.node, NoticeMessage::Heeded { life: from.incarnation, number });
                });
            }
            Ok(NoticeMessage::Heeded { life, number }) => {
                if life == node.life() {
                    if let Some(left) = node.state.lock().told.get_mut(&number) {
                        left.remove(&from.node);
                    }
                    node.heeded.notify_waiters();
                }
            }
            Err(error) => tracing::warn!(node = %from.node, %error, "a notice cannot be decoded; ignored"),
        }
    }

    /// What was lost with the session is repeated.
    fn session_ended(&self, _node: NodeId) {}
}
