//! File locks of processes on this node: from the kernel to the cluster-wide lock service.
//!
//! POSIX record locks and flock share one space, as with NFS: a flock is a lock on the whole file, owned by the open file.
//!
//! A wait for a lock ends with any signal, as it does on a local file system.

use super::fuse::Front;
use super::signal;
use fuser::{Errno, FileHandle, INodeNo, LockOwner, ReplyEmpty, ReplyLock};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK};
use sld::locks::{LockAnswer, LockKind, LockRange};
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
    fn lock_object(&self, node: INodeNo) -> ObjectId {
        ObjectId::Inode(self.identity.ino(node).0)
    }

    fn lock_service(&self) -> Result<&Arc<Locks>, Errno> {
        self.locks.as_ref().ok_or(Errno::ENOSYS)
    }

    /// `F_GETLK`.
    pub(super) async fn get_lock(&self, node: INodeNo, owner: LockOwner, start: u64, end: u64, typ: i32, reply: ReplyLock) {
        let (locks, kind) = match (self.lock_service(), kind(typ)) {
            (Ok(locks), Some(kind)) => (locks, kind),
            (Err(e), _) => return reply.error(e),
            (_, None) => return reply.error(Errno::EINVAL),
        };
        match locks.query(self.lock_object(node), owner.0, range(start, end), kind).await {
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
        let (object, range) = (self.lock_object(node), range(start, end));
        let Some(kind) = kind(typ) else {
            return match locks.unlock(object, owner.0, range).await {
                Ok(()) => reply.ok(),
                Err(_) => reply.error(Errno::EIO),
            };
        };
        match locks.lock(object, owner.0, range, kind, pid, wait, signal::interrupted(thread)).await {
            Ok(LockAnswer::Done) => {
                self.handles.locked(handle, owner);
                reply.ok();
            }
            Ok(LockAnswer::Cancelled) => reply.error(Errno::EINTR),
            Ok(LockAnswer::Deadlock) => reply.error(Errno::EDEADLK),
            Ok(_) => reply.error(Errno::EAGAIN),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    /// A file was closed: its owner's locks on it are gone.
    pub(super) async fn close_locks(&self, node: INodeNo, owner: LockOwner) {
        if let Some(locks) = &self.locks {
            let _ = locks.unlock(self.lock_object(node), owner.0, LockRange::ALL).await;
        }
    }
}
