//! File locks of processes on this node: from the kernel to the cluster-wide lock service.
//!
//! Record locks (`fcntl`) and flock are two spaces that never meet. Which one a request is for is seen from the system call of
//! its thread. Where that cannot be seen a request for the whole file is for both: it excludes whatever it may have to.
//!
//! A wait for a lock ends with any signal. It cannot be begun again by the kernel, as on a local file system for a handler with
//! SA_RESTART: FUSE has no answer for that.

use super::front::Front;
use super::signal;
use super::syscall::{LockCall, lock_call};
use fuser::{Errno, FileHandle, INodeNo, LockOwner, ReplyEmpty, ReplyLock};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK};
use sld::locks::{LockAnswer, LockKind, LockRange, LockSpace, LockTarget, Wait};
use sld::{Disk, Locks, ObjectId};
use std::sync::Arc;

/// The kernel's "to the end of the file" (the largest `loff_t`).
const TO_END: u64 = i64::MAX as u64;

fn range(start: u64, end: u64) -> LockRange {
    LockRange { start, end: if end >= TO_END { u64::MAX } else { end } }
}

fn kind(typ: i32) -> Option<LockKind> {
    match typ {
        F_RDLCK => Some(LockKind::Read),
        F_WRLCK => Some(LockKind::Write),
        _ => None,
    }
}

impl<D: Disk> Front<D> {
    fn target(&self, node: INodeNo, space: LockSpace) -> LockTarget {
        LockTarget { object: ObjectId::Inode(self.identity.ino(node).0), space }
    }

    fn lock_service(&self) -> Result<&Arc<Locks>, Errno> {
        self.locks.as_ref().ok_or(Errno::ENOSYS)
    }

    /// `F_GETLK`: tells of record locks only.
    pub(super) async fn get_lock(&self, node: INodeNo, owner: LockOwner, start: u64, end: u64, typ: i32, reply: ReplyLock) {
        let (locks, kind) = match (self.lock_service(), kind(typ)) {
            (Ok(locks), Some(kind)) => (locks, kind),
            (Err(e), _) => return reply.error(e),
            (_, None) => return reply.error(Errno::EINVAL),
        };
        match locks.query(self.target(node, LockSpace::Record), owner.0, range(start, end), kind).await {
            Ok(LockAnswer::Conflict(held)) => {
                let typ = if held.kind == LockKind::Read { F_RDLCK } else { F_WRLCK };
                // A process of another node has no number here.
                let pid = if held.owner.node == self.node { held.pid } else { 0 };
                reply.locked(held.range.start, held.range.end.min(TO_END), typ, pid);
            }
            Ok(_) => reply.locked(0, 0, F_UNLCK, 0),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    /// `F_SETLK`, `F_SETLKW` and `flock`. `thread`: who waits.
    #[allow(clippy::too_many_arguments, reason = "they are the kernel's request")]
    pub(super) async fn set_lock(
        &self,
        thread: u32,
        node: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        wait: bool,
        reply: ReplyEmpty,
    ) {
        let locks = match self.lock_service() {
            Ok(locks) => locks,
            Err(e) => return reply.error(e),
        };
        let (range, kind) = (range(start, end), kind(typ));
        let call = match range {
            // Where it makes no difference nobody is looked at: a part of a file is a matter of record locks only.
            LockRange::ALL => lock_call(thread, typ).await,
            _ if wait && kind.is_some() => lock_call(thread, typ).await.or(Some(LockCall::Process)),
            _ => Some(LockCall::Process),
        };
        let spaces = match call {
            Some(LockCall::Flock) => &[LockSpace::Flock][..],
            Some(LockCall::Process | LockCall::OpenFile) => &[LockSpace::Record],
            // Always in this order, so that two who do this do not wait for each other.
            None => &[LockSpace::Flock, LockSpace::Record],
        };
        let Some(kind) = kind else {
            for space in spaces {
                if locks.unlock(self.target(node, *space), owner.0, range).await.is_err() {
                    return reply.error(Errno::EIO);
                }
            }
            return reply.ok();
        };
        if spaces.len() > 1 {
            // Of two, one may be held when its process is killed.
            self.handles.locked(handle, owner);
        }
        for space in spaces {
            let target = self.target(node, *space);
            let wait = match (wait, space, call) {
                (false, ..) => Wait::No,
                // As everywhere: whether a circle of these never ends is not known, since any process can unlock.
                (true, LockSpace::Flock, _) | (true, _, Some(LockCall::OpenFile)) => Wait::Forever,
                (true, LockSpace::Record, _) => Wait::UnlessDeadlock,
            };
            // A shared flock that becomes exclusive is given up first, even if that is refused then: so two who do this at a
            // time do not wait for each other. See flock(2).
            if *space == LockSpace::Flock && kind == LockKind::Write && locks.holds(target, owner.0) == Some(LockKind::Read) {
                let _ = locks.unlock(target, owner.0, range).await;
            }
            let answer = locks.lock(target, owner.0, range, kind, pid, wait, signal::interrupted(thread)).await;
            let error = match answer {
                Ok(LockAnswer::Done) => continue,
                Ok(LockAnswer::Cancelled) => Errno::EINTR,
                Ok(LockAnswer::Deadlock) => Errno::EDEADLK,
                Ok(_) => Errno::EAGAIN,
                Err(_) => Errno::EIO,
            };
            if spaces.len() > 1 && *space == LockSpace::Record {
                // Only one of the two: neither.
                let _ = locks.unlock(self.target(node, LockSpace::Flock), owner.0, range).await;
            }
            return reply.error(error);
        }
        self.handles.locked(handle, owner);
        reply.ok();
    }

    /// A file was closed: all locks of this owner on it are gone.
    pub(super) async fn close_locks(&self, node: INodeNo, owner: LockOwner) {
        let Some(locks) = &self.locks else { return };
        for space in [LockSpace::Flock, LockSpace::Record] {
            let _ = locks.unlock(self.target(node, space), owner.0, LockRange::ALL).await;
        }
    }
}
