//! Files whose locks this node has lost, since it was cut off: handles that were open then answer `EIO` until they are closed.
//!
//! A process that goes on writing under a lock which another node may hold by now would damage what the lock protects. The
//! kernel does not say under which lock a request is made, so every handle of such a file that was open is concerned.
//!
//! Invariant: a handle opened after the loss is as good as any.
//!
//! Excludes: the locks themselves (`sld::Locks`).

use fuser::FileHandle;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bit of a handle: it bypasses the page cache. The other bits tell after how many losses it was opened.
const DIRECT: u64 = 1;

/// Whether a handle bypasses the page cache.
pub(crate) fn is_direct(handle: FileHandle) -> bool {
    handle.0 & DIRECT != 0
}

/// The losses of one mount.
#[derive(Debug, Default)]
pub(crate) struct Forfeits {
    losses: AtomicU64,
    /// By the kernel's inode number: which loss was the last. Only of inodes that the kernel has.
    last: Mutex<HashMap<u64, u64>>,
}

impl Forfeits {
    /// A handle for a file that is opened now.
    pub(crate) fn handle(&self, direct: bool) -> FileHandle {
        FileHandle(self.losses.load(Ordering::SeqCst) << 1 | u64::from(direct))
    }

    /// The locks on these inodes are gone.
    pub(crate) fn lose(&self, inodes: impl Iterator<Item = u64>) {
        let mut last = self.last.lock();
        let loss = self.losses.fetch_add(1, Ordering::SeqCst) + 1;
        last.extend(inodes.map(|ino| (ino, loss)));
    }

    /// Whether a handle was open when locks on its file were lost.
    pub(crate) fn concerns(&self, ino: u64, handle: FileHandle) -> bool {
        let opened = handle.0 >> 1;
        // Without a loss since, as almost always, there is nothing to look up.
        opened < self.losses.load(Ordering::SeqCst) && self.last.lock().get(&ino).is_some_and(|loss| opened < *loss)
    }

    /// The kernel has forgotten an inode, so that no handle of it is open.
    pub(crate) fn forget(&self, ino: u64) {
        if self.losses.load(Ordering::SeqCst) > 0 {
            self.last.lock().remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_opened_before_a_loss_are_concerned_and_later_ones_are_not() {
        let forfeits = Forfeits::default();
        let (before, other) = (forfeits.handle(true), forfeits.handle(false));
        assert!(is_direct(before) && !is_direct(other));
        assert!(!forfeits.concerns(7, before));
        forfeits.lose([7].into_iter());
        let after = forfeits.handle(true);
        assert!(forfeits.concerns(7, before) && forfeits.concerns(7, other));
        assert!(!forfeits.concerns(8, before) && !forfeits.concerns(7, after));
        forfeits.lose([7, 8].into_iter());
        assert!(forfeits.concerns(7, after));
        forfeits.forget(7);
        assert!(!forfeits.concerns(7, before));
    }
}
