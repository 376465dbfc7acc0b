//! Questions to other nodes' disk servers, and their answers.
//!
//! Invariant: every question is answered exactly once: by the peer, or by "lost" when its session ends.
//!
//! Excludes: repeating what was lost.

use crate::message::{Reply, Request, Wire};
use bytes::Bytes;
use cluster::{DiskId, Epoch, Message, NodeId, Service, Transport};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Gets the answer, or `None` if the session ended first.
pub(crate) type OnReply = Box<dyn FnOnce(Option<(Reply, Vec<Bytes>)>) + Send>;

#[derive(Default)]
struct Pending {
    last: u64,
    waiting: BTreeMap<u64, (NodeId, Epoch, OnReply)>,
}

/// Forgets a question whose asker has gone.
struct Forget<'a> {
    rpc: &'a Rpc,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let forgotten = self.rpc.pending.lock().waiting.remove(&self.id);
        drop(forgotten);
    }
}

pub(crate) struct Rpc {
    transport: Arc<dyn Transport>,
    pending: Mutex<Pending>,
}

impl Rpc {
    pub(crate) fn new(transport: Arc<dyn Transport>) -> Self {
        Rpc { transport, pending: Mutex::default() }
    }

    /// Asks; `on_reply` is called later, never from within this call. Returns the question's number.
    pub(crate) fn ask(
        &self,
        node: NodeId,
        epoch: Epoch,
        disk: DiskId,
        request: Request,
        parts: Vec<Bytes>,
        on_reply: OnReply,
    ) -> u64 {
        let id = {
            let mut pending = self.pending.lock();
            pending.last += 1;
            let id = pending.last;
            pending.waiting.insert(id, (node, epoch, on_reply));
            id
        };
        self.transport.send(node, Service::Mirror, Wire::Request { id, epoch, disk, request }.encode(parts));
        id
    }

    /// Tells, without an answer.
    pub(crate) fn tell(&self, node: NodeId, epoch: Epoch, disk: DiskId, request: Request) {
        self.transport.send(node, Service::Mirror, Wire::Request { id: 0, epoch, disk, request }.encode(Vec::new()));
    }

    /// Asks and waits.
    pub(crate) async fn call(&self, node: NodeId, epoch: Epoch, disk: DiskId, request: Request) -> Option<(Reply, Vec<Bytes>)> {
        let (tx, rx) = oneshot::channel();
        let on_reply: OnReply = Box::new(move |reply| {
            let _ = tx.send(reply);
        });
        let id = self.ask(node, epoch, disk, request, Vec::new(), on_reply);
        let _forget = Forget { rpc: self, id };
        rx.await.ok().flatten()
    }

    /// Answers.
    pub(crate) fn answer(&self, node: NodeId, id: u64, epoch: Epoch, reply: Reply, parts: Vec<Bytes>) {
        let message: Message = Wire::Reply { id, epoch, reply }.encode(parts);
        self.transport.send(node, Service::Mirror, message);
    }

    /// An answer came in.
    pub(crate) fn replied(&self, node: NodeId, id: u64, epoch: Epoch, reply: Reply, parts: Vec<Bytes>) {
        let waiting = {
            let mut pending = self.pending.lock();
            match pending.waiting.get(&id) {
                Some((asked, of, _)) if *asked == node && *of == epoch => pending.waiting.remove(&id),
                _ => None,
            }
        };
        if let Some((.., on_reply)) = waiting {
            on_reply(Some((reply, parts)));
        }
    }

    /// What was asked of a node and not answered is lost.
    pub(crate) fn session_ended(&self, node: NodeId) {
        let lost: Vec<OnReply> = {
            let mut pending = self.pending.lock();
            let (lost, kept) = std::mem::take(&mut pending.waiting).into_iter().partition(|(_, (n, ..))| *n == node);
            pending.waiting = kept;
            let lost: BTreeMap<u64, (NodeId, Epoch, OnReply)> = lost;
            lost.into_values().map(|(.., f)| f).collect()
        };
        for on_reply in lost {
            on_reply(None);
        }
    }

    /// Drops all that is waiting, and with it whatever it holds.
    pub(crate) fn close(&self) {
        let waiting = std::mem::take(&mut self.pending.lock().waiting);
        drop(waiting);
    }
}
