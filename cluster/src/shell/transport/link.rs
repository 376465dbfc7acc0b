//! The sending half: one link per (peer, service), a bounded queue and a task that empties it into a stream. This node itself
//! is such a peer, too, without a stream.
//!
//! Links of the same peer share one connection, but for `Membership`, whose heartbeats must never wait behind bulk data.
//!
//! Invariants:
//! - A message that cannot be sent ends the session: the queue is emptied, and the service's receiver is told.
//! - After that the next message starts a new session, on a new stream.

use super::frame::{Hello, encode};
use super::{Shared, service_index};
use crate::ids::NodeId;
use crate::transport::{Message, Peer, Service};
use std::collections::VecDeque;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;

/// The most bytes that may wait in one link.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// The most messages that may wait in one link.
const QUEUE_MESSAGES_MAX: usize = 65_536;
/// Messages written to the stream in one call.
const BATCH_BYTES: usize = 1 << 20;

#[derive(Default)]
struct Queue {
    messages: VecDeque<Message>,
    bytes: usize,
}

/// The queue of one (peer, service).
#[derive(Default)]
pub(super) struct Link {
    queue: parking_lot::Mutex<Queue>,
    wake: Notify,
    overflowed: AtomicBool,
}

impl Link {
    /// Queues a message, or marks the session as broken when the peer does not keep up.
    pub(super) fn push(&self, message: Message) {
        {
            let mut q = self.queue.lock();
            if q.bytes + message.len() > QUEUE_BYTES_MAX || q.messages.len() >= QUEUE_MESSAGES_MAX {
                self.overflowed.store(true, Ordering::Release);
            } else {
                q.bytes += message.len();
                q.messages.push_back(message);
            }
        }
        self.wake.notify_one();
    }

    fn clear(&self) {
        *self.queue.lock() = Queue::default();
        self.overflowed.store(false, Ordering::Release);
    }

    fn is_empty(&self) -> bool {
        self.queue.lock().messages.is_empty() && !self.overflowed.load(Ordering::Acquire)
    }

    /// The next messages' chunks.
    fn take(&self) -> std::io::Result<Vec<bytes::Bytes>> {
        let mut chunks = Vec::new();
        let mut bytes = 0;
        let mut q = self.queue.lock();
        while bytes < BATCH_BYTES {
            let Some(m) = q.messages.pop_front() else { break };
            bytes += m.len();
            q.bytes -= m.len();
            chunks.extend(encode(m)?);
        }
        Ok(chunks)
    }
}

impl Link {
    /// What waits for this node itself: all of it, or `None` if there was too much and it is lost. Waits if there is nothing.
    async fn next(&self) -> Option<VecDeque<Message>> {
        loop {
            if self.overflowed.load(Ordering::Acquire) {
                self.clear();
                return None;
            }
            let messages = std::mem::take(&mut *self.queue.lock()).messages;
            if !messages.is_empty() {
                return Some(messages);
            }
            self.wake.notified().await;
        }
    }
}

/// Delivers what this node sends to itself.
pub(super) async fn deliver_locally(shared: Weak<Shared>, service: Service, link: std::sync::Arc<Link>) {
    loop {
        let messages = link.next().await;
        let Some(shared) = shared.upgrade() else { return };
        let Some(messages) = messages else {
            tracing::warn!(
                ?service,
                "more messages of this node to itself than may wait; they are lost, as in a session that ends"
            );
            shared.session_ended(shared.me, service);
            continue;
        };
        let from = Peer { node: shared.me, incarnation: *shared.incarnation.borrow(), session: 0 };
        for message in messages {
            if let Some(r) = shared.receiver(service) {
                r.receive(from, message);
            }
        }
    }
}

/// Empties a link until the transport is gone.
pub(super) async fn run(shared: Weak<Shared>, node: NodeId, service: Service, link: std::sync::Arc<Link>) {
    loop {
        while link.is_empty() {
            link.wake.notified().await;
            if shared.strong_count() == 0 {
                return;
            }
        }
        let Some(connecting) = shared.upgrade() else { return };
        let result = connecting.connect(node, service).await;
        drop(connecting);
        let why = match result {
            Ok(connection) => session(&shared, &connection, service, &link).await,
            Err(e) => e,
        };
        let Some(shared) = shared.upgrade() else { return };
        tracing::debug!(peer = %node, ?service, "the session is over: {why}");
        link.clear();
        shared.session_ended(node, service);
    }
}

/// Sends over one stream until something goes wrong; answers what.
async fn session(shared: &Weak<Shared>, connection: &quinn::Connection, service: Service, link: &Link) -> std::io::Error {
    let (me, mut incarnation) = match shared.upgrade() {
        Some(s) => (s.me, s.incarnation.subscribe()),
        None => return std::io::Error::other("the daemon is shutting down"),
    };
    let life = *incarnation.borrow_and_update();
    let mut stream = match connection.open_uni().await {
        Ok(s) => s,
        Err(e) => return std::io::Error::other(e),
    };
    // Small ordered messages before bulk where both wait.
    let _ = stream.set_priority(match service {
        Service::Mirror => 0,
        _ => 1,
    });
    if let Err(e) = stream.write_all(&Hello { service, node: me, incarnation: life }.encode()).await {
        return std::io::Error::other(e);
    }
    loop {
        if link.overflowed.load(Ordering::Acquire) {
            let _ = stream.reset(1u32.into());
            return std::io::Error::other("the peer does not keep up");
        }
        let mut chunks = match link.take() {
            Ok(c) => c,
            Err(e) => return e,
        };
        if chunks.is_empty() {
            tokio::select! {
                biased;
                e = connection.closed() => return std::io::Error::other(e),
                _ = incarnation.changed() => {
                    let _ = stream.reset(2u32.into());
                    return std::io::Error::other("a new life of this node begins");
                }
                stopped = stream.stopped() => return std::io::Error::other(format!("the peer stopped reading: {stopped:?}")),
                () = link.wake.notified() => {}
            }
            continue;
        }
        if let Err(e) = stream.write_all_chunks(&mut chunks).await {
            return std::io::Error::other(e);
        }
    }
}

/// Where a service's links are found.
pub(super) type Links = [std::sync::Arc<Link>; Service::ALL.len()];

/// The link of a service.
pub(super) fn of(links: &Links, service: Service) -> &std::sync::Arc<Link> {
    &links[service_index(service)]
}
