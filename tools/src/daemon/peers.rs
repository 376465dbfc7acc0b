//! Questions of one daemon to the others (`Service::Admin`), for reports and tasks that concern all nodes.
//!
//! Invariants: at most `WAITING_MAX` questions wait; a question that is not answered in time is forgotten; answers carry
//! the number of their question, so late ones are dropped.
//!
//! The encoding is JSON, as on the control socket: these messages are few, and daemons of two versions may meet.

use crate::control::{TaskAction, TaskReport};
use crate::status::Resync;
use bytes::Bytes;
use cluster::{Cluster, Message, NodeId, Peer, Receiver, Service, Transport};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Questions under way.
const WAITING_MAX: usize = 256;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// What only this node knows of itself.
    Facts,
    /// Scrub this node's disks.
    Scrub(TaskAction),
    /// Stop this node's collector, or tell how far it is.
    Gc(TaskAction),
}

/// What only the node itself knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Copies on its disks that are being brought up to date.
    pub resync: Vec<Resync>,
    /// Disks of its settings that cannot be used, with the reason.
    pub disk_errors: Vec<(String, String)>,
    /// Its scrub.
    pub scrub: ScrubFacts,
    /// Its collector, if that was asked for.
    #[serde(default)]
    pub gc: Option<TaskReport>,
}

/// A scrub on one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubFacts {
    /// Whether it runs.
    pub running: bool,
    /// Whether it has come to its end since the daemon started.
    #[serde(default)]
    pub finished: bool,
    /// Blocks of the node's copies looked through.
    #[serde(default)]
    pub looked: u64,
    /// Of so many.
    #[serde(default)]
    pub blocks: u64,
    /// Of these, blocks in use: all their copies were read.
    pub checked: u64,
    /// Copies repaired.
    pub repaired: u64,
    /// Copies that could not be repaired.
    pub unrepaired: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Wire {
    Question { id: u64, question: Question },
    Facts { id: u64, facts: Box<NodeFacts> },
}

/// What answers the questions of others.
pub type Answerer = Arc<dyn Fn(Question) -> NodeFacts + Send + Sync>;

/// The other daemons.
pub struct Peers {
    transport: Arc<dyn Transport>,
    waiting: Mutex<Waiting>,
    answer: Answerer,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    questions: BTreeMap<u64, (NodeId, oneshot::Sender<NodeFacts>)>,
}

fn encode(wire: &Wire) -> Message {
    Message::new(Bytes::from(serde_json::to_vec(wire).unwrap_or_default()))
}

impl Peers {
    /// Begins to answer.
    pub fn start(cluster: &dyn Cluster, answer: Answerer) -> Arc<Peers> {
        let transport = cluster.transport();
        let peers = Arc::new(Peers { transport: transport.clone(), waiting: Mutex::default(), answer });
        transport.register(Service::Admin, Arc::new(Ear(Arc::downgrade(&peers))));
        peers
    }

    /// Asks nodes, all at once; those that do not answer in time are left out.
    pub async fn ask(&self, nodes: &[NodeId], question: &Question, limit: Duration) -> BTreeMap<NodeId, NodeFacts> {
        let mut asked = Vec::new();
        for node in nodes {
            let (sender, receiver) = oneshot::channel();
            let id = {
                let mut waiting = self.waiting.lock();
                waiting.questions.retain(|_, (_, sender)| !sender.is_closed());
                if waiting.questions.len() >= WAITING_MAX {
                    continue;
                }
                waiting.next += 1;
                let id = waiting.next;
                waiting.questions.insert(id, (*node, sender));
                id
            };
            self.transport.send(*node, Service::Admin, encode(&Wire::Question { id, question: question.clone() }));
            asked.push((*node, receiver));
        }
        let mut answers = BTreeMap::new();
        let _ = tokio::time::timeout(limit, async {
            for (node, receiver) in asked {
                if let Ok(facts) = receiver.await {
                    answers.insert(node, facts);
                }
            }
        })
        .await;
        answers
    }
}

struct Ear(std::sync::Weak<Peers>);

impl Receiver for Ear {
    fn receive(&self, from: Peer, message: Message) {
        let Some(peers) = self.0.upgrade() else { return };
        match serde_json::from_slice(&message.head) {
            Ok(Wire::Question { id, question }) => {
                let facts = (peers.answer)(question);
                peers.transport.send(from.node, Service::Admin, encode(&Wire::Facts { id, facts: Box::new(facts) }));
            }
            Ok(Wire::Facts { id, facts }) => {
                let mut waiting = peers.waiting.lock();
                if waiting.questions.get(&id).is_some_and(|(node, _)| *node == from.node)
                    && let Some((_, sender)) = waiting.questions.remove(&id)
                {
                    let _ = sender.send(*facts);
                }
            }
            Err(e) => tracing::warn!("a message from {} is not understood: {e}", from.node),
        }
    }

    fn session_ended(&self, node: NodeId) {
        if let Some(peers) = self.0.upgrade() {
            peers.waiting.lock().questions.retain(|_, (asked, _)| *asked != node);
        }
    }
}
