//! Messaging between nodes, as the layers see it.
//!
//! Invariants of every implementation:
//! - Messages of one (sender, receiver, service) within one *session* arrive in the order in which they were sent, each
//!   at most once; a lost message ends the session, and both sides are told.
//! - A message is delivered only from a node that has proved its identity.
//! - Memory is bounded: when a peer does not keep up, its session is ended rather than an unlimited queue built.
//!
//! Excludes: what a message means.

use crate::ids::{Incarnation, NodeId};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Whose message it is. Each service has its own ordered stream, so that none waits behind another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Service {
    /// Heartbeats and leases.
    Membership = 1,
    /// Replication of the configuration.
    Raft = 2,
    /// Block writes and their acknowledgements, reads, resync: requests to disk servers and their answers.
    Mirror = 3,
    /// Tokens.
    Token = 4,
    /// Cluster-wide byte-range locks.
    Lock = 5,
    /// Administration: questions of one daemon to another (`status`, `gc`).
    Admin = 6,
    /// What all nodes are told of, and heed, before a change is over.
    Notice = 7,
}

impl Service {
    /// All services.
    pub const ALL: [Service; 7] =
        [Service::Membership, Service::Raft, Service::Mirror, Service::Token, Service::Lock, Service::Admin, Service::Notice];

    /// The version of its messages: raised with every change of their encoding. A peer of another one is refused by name.
    #[must_use]
    pub fn version(self) -> u8 {
        match self {
            // 2: the two spaces of locks, searches for circles. 3: what had no room is repeated.
            Service::Lock => 3,
            _ => 1,
        }
    }
}

/// A message: an encoded head, and bulk data that is carried as it is (whole blocks, not copied into the head).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The layer's own encoding (`postcard`).
    pub head: Bytes,
    /// Bulk data, in order. Each part keeps its length.
    pub parts: Vec<Bytes>,
}

impl Message {
    /// A message without bulk data.
    #[must_use]
    pub fn new(head: impl Into<Bytes>) -> Self {
        Message { head: head.into(), parts: Vec::new() }
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.parts.iter().map(Bytes::len).sum::<usize>()
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The largest message that a transport carries, head and parts together.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Where a message came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// The node.
    pub node: NodeId,
    /// The life of its daemon, as it said when the session began.
    pub incarnation: Incarnation,
    /// The session, unique at this receiver; grows with every new connection.
    pub session: u64,
}

/// A layer's receiving end for one service.
pub trait Receiver: Send + Sync + 'static {
    /// A message came in. Called in order for one peer; must not block (hand over, or step a core and return).
    fn receive(&self, from: Peer, message: Message);

    /// The session with a peer is over: what was sent to it and not yet answered may or may not have arrived. Also
    /// called when a send could not be delivered because no connection could be made.
    fn session_ended(&self, node: NodeId);
}

/// The sending end.
pub trait Transport: Send + Sync + 'static {
    /// This node.
    fn local(&self) -> NodeId;

    /// Sends to a peer: never blocks, never fails. If there is no connection one is made; if that fails, or the queue
    /// is full, the message is dropped and `session_ended` is called at this side. To oneself it is delivered directly
    /// (from another task, never from within this call).
    fn send(&self, to: NodeId, service: Service, message: Message);

    /// Sets who receives a service's messages. Messages of services without a receiver are dropped.
    fn register(&self, service: Service, receiver: Arc<dyn Receiver>);

    /// Tells the transport this daemon's present life (from now on its sessions carry it; older ones are ended), and who
    /// its peers are. Called at the start and with every change of the configuration. A transport that knows its peers
    /// otherwise needs only the life.
    fn configure(&self, incarnation: Incarnation, peers: &BTreeMap<NodeId, PeerAddr>) {
        let _ = (incarnation, peers);
    }

    /// Sets who is told that a peer's process is gone. A transport that cannot know never tells.
    fn watch(&self, watcher: Arc<dyn PeerWatcher>) {
        let _ = watcher;
    }
}

/// Where a peer is, as the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddr {
    /// `host:port`.
    pub addr: String,
    /// The life of its daemon that listens there.
    pub incarnation: Incarnation,
}

/// Who is told of processes that are gone.
pub trait PeerWatcher: Send + Sync + 'static {
    /// The peer's process is gone for sure (not only silent): every life of it up to `upto` has ended. Must not block.
    fn process_gone(&self, node: NodeId, upto: Incarnation);
}
