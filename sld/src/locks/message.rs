//! Messages of the lock service (`Service::Lock`), encoded with `postcard`.
//!
//! Every message carries the epoch of its sender; a master acts only on those of its own epoch, and a client repeats what
//! is unanswered when its epoch changes, a session ends, or a master asks for it. What is repeated may have arrived before: requests are named by
//! tickets, and a master answers one that it has answered again in the same way, without doing it again.

use super::table::{HeldLock, LockKind, LockRange};
use crate::api::ObjectId;
use cluster::{Epoch, Incarnation, NodeId};
use serde::{Deserialize, Serialize};

/// Two kinds of locks that never meet: a file locked in one of these ways is free in the other, also for who locked it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LockSpace {
    /// `fcntl`: ranges of bytes, owned by a process or by an open file.
    Record,
    /// `flock`: whole files, owned by an open file.
    Flock,
}

/// What a lock is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockTarget {
    /// The file.
    pub object: ObjectId,
    /// In which way it is locked.
    pub space: LockSpace,
}

/// What to do about a lock that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Wait {
    /// Do not wait for it.
    No,
    /// Wait, if it is for ever.
    Forever,
    /// Wait, unless owners who all wait in this way wait for each other in a circle.
    UnlessDeadlock,
}

/// A lock's owner: a kernel's lock owner number on one life of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockOwner {
    /// The node.
    pub node: NodeId,
    /// The life of its daemon: the locks go with it.
    pub incarnation: Incarnation,
    /// What the kernel there calls the owner.
    pub id: u64,
}

/// What a client wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LockRequest {
    /// Take a lock; if it conflicts, wait or be refused.
    Lock {
        /// How.
        kind: LockKind,
        /// Who asks, for `F_GETLK`.
        pid: u32,
        /// Whether to wait for what is in the way.
        wait: Wait,
    },
    /// Give up what is held of the range.
    Unlock,
    /// Which lock would keep this one from being taken?
    Query {
        /// How.
        kind: LockKind,
    },
    /// No longer wait for the lock of this ticket.
    Cancel,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LockAnswer {
    /// The lock is held, or given up.
    Done,
    /// Somebody else's lock is in the way; for a `Query`, the answer.
    Conflict(HeldLock<LockOwner>),
    /// `Query`: nothing is in the way.
    Free,
    /// `Cancel` came before the lock was granted.
    Cancelled,
    /// Waiting would never have ended: who holds the lock waits, through others perhaps, for one of this owner's.
    Deadlock,
}

/// One search for a circle of owners that wait for each other (edge chasing: Chandy, Misra and Haas, 1983). It begins with a
/// request that has to wait, follows those who wait along the locks in their way, and ends nowhere or where it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Chase {
    /// Whose request it began with.
    pub owner: LockOwner,
    /// The request's name.
    pub ticket: u64,
    /// Tells a search that was begun again, since messages of the first may be lost, from that one.
    pub round: u64,
    /// The greatest request on the way so far: all searches that go round the same circle give up the same one of it.
    pub victim: (LockOwner, u64),
}

impl LockMessage {
    /// Whether it is for a client; the others are for a master.
    #[must_use]
    pub fn is_for_client(&self) -> bool {
        use LockMessage::{Again, Answer, Circle, InTheWay};
        matches!(self, Answer { .. } | InTheWay { .. } | Circle { .. } | Again { .. })
    }
}

/// A message of the service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockMessage {
    /// Client to master.
    Request {
        /// The client's epoch.
        epoch: Epoch,
        /// Names the request within the client's life.
        ticket: u64,
        /// What is to be locked.
        target: LockTarget,
        /// Whose lock.
        owner: LockOwner,
        /// Which bytes.
        range: LockRange,
        /// What to do.
        request: LockRequest,
        /// Tickets whose answers have arrived: the master need not remember them any more.
        answered: Vec<u64>,
    },
    /// Master to client.
    Answer {
        /// The epoch in which it was granted: in a later one it says nothing, the request is repeated there.
        epoch: Epoch,
        /// The request's name.
        ticket: u64,
        /// How it ended.
        answer: LockAnswer,
    },
    /// Client to every member at the start of an epoch: the locks that it holds on objects of that master.
    Reassert {
        /// The epoch that starts.
        epoch: Epoch,
        /// The client's life.
        incarnation: Incarnation,
        /// What it holds.
        locks: Vec<(LockTarget, HeldLock<LockOwner>)>,
        /// Tickets of this master that are unanswered: it need remember no other answer.
        pending: Vec<u64>,
        /// Whether this was the last part.
        last: bool,
    },
    /// Master to client: owners of that node are in the way of a search.
    InTheWay {
        /// The master's epoch.
        epoch: Epoch,
        /// The search.
        chase: Chase,
        /// Their numbers.
        owners: Vec<u64>,
    },
    /// Client to master: a search has come to a request that waits there.
    Waits {
        /// The client's epoch.
        epoch: Epoch,
        /// The search.
        chase: Chase,
        /// What is waited for.
        target: LockTarget,
        /// The request's name.
        ticket: u64,
    },
    /// Master to client: there was no room for requests that came before the epoch had recovered. All is to be repeated.
    Again {
        /// The master's epoch.
        epoch: Epoch,
    },
    /// Master to client: a search has gone round a circle, of which this request is to be given up.
    Circle {
        /// The master's epoch.
        epoch: Epoch,
        /// The request's name.
        ticket: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of these bytes is a change of the wire: raise the version of `Service::Lock` (`cluster::Service::version`).
    #[test]
    fn the_encoding_is_that_of_the_version() {
        let target = LockTarget { object: ObjectId::Inode(300), space: LockSpace::Flock };
        let owner = LockOwner { node: NodeId(1), incarnation: Incarnation(2), id: 3 };
        let range = LockRange { start: 4, end: 5 };
        let held = HeldLock { owner, range, kind: LockKind::Write, pid: 6 };
        let (epoch, ticket) = (Epoch(7), 8);
        let chase = Chase { owner, ticket, round: 9, victim: (owner, 10) };
        let lock = LockRequest::Lock { kind: LockKind::Read, pid: 6, wait: Wait::UnlessDeadlock };
        let answer = LockAnswer::Conflict(held.clone());
        let messages = [
            LockMessage::Request { epoch, ticket, target, owner, range, request: lock, answered: vec![11] },
            LockMessage::Answer { epoch, ticket, answer },
            LockMessage::Reassert {
                epoch,
                incarnation: Incarnation(2),
                locks: vec![(target, held)],
                pending: vec![12],
                last: true,
            },
            LockMessage::InTheWay { epoch, chase, owners: vec![13] },
            LockMessage::Waits { epoch, chase, target, ticket },
            LockMessage::Again { epoch },
            LockMessage::Circle { epoch, ticket },
        ];
        let hex = |message: &LockMessage| -> String {
            postcard::to_stdvec(message).unwrap().iter().map(|byte| format!("{byte:02x}")).collect()
        };
        const EXPECTED: &str = "00070800ac0201010203040500000602010b 0107080101020304050106 0207020100ac020101020304050106010c01 \
                                030701020308090102030a010d 040701020308090102030a00ac020108 0507 060708";
        let encoded: Vec<String> = messages.iter().map(hex).collect();
        assert_eq!((cluster::Service::Lock.version(), encoded.join(" ").as_str()), (3, EXPECTED));
    }
}
