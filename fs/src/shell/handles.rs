//! What must be known of open files by their handles: which of them have lost locks or data, through which locks were taken, and which
//! have failed to write.
//!
//! **Lost locks.** When this node was cut off it has lost its locks. A process that goes on writing under a lock which another
//! node may hold by now would damage what the lock protects. The kernel does not say under which lock a request is made, so
//! every handle of such a file that was open answers `EIO` until it is closed.
//!
//! **Locks of an open file** (`F_OFD_SETLK`) end with it, but the kernel does not say so: a RELEASE names an owner only for
//! flock. It always says (FLUSH) that a process closes a file, which ends this process's record locks. So the owners that took
//! locks through a handle and were not named by a FLUSH are given up when the handle is released.
//!
//! **Lost data.** What was written behind and is lost was acknowledged to programs that have the file open for writing. Each of
//! them must learn of it, at its own `fsync` or `close`, and none of them twice; who opens the file later finds it as it is.
//! Reading handles take no part in it. (If nobody has it open for writing the disk remembers the loss, for the next to ask.)
//!
//! **Failed writes.** When an asynchronous write fails the kernel cuts the file to the size that it takes it for, which is another one if
//! other nodes have written. After a failure the size is set through a handle only for who is seen to ask for that (`syscall`).
//!
//! Invariants:
//! - A handle opened after a loss is as good as any.
//! - No two open files of a mount have one handle.
//!
//! Excludes: the locks themselves (`sld::Locks`).

use fuser::{FileHandle, LockOwner};
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits of a handle: it bypasses the page cache; what is written through it is durable when it is acknowledged (O_SYNC, O_DSYNC);
/// reading through it is no access (O_NOATIME). The other bits number the handles of a mount.
const DIRECT: u64 = 1;
const SYNCHRONOUS: u64 = 2;
const UNNOTICED: u64 = 4;
const BITS: u32 = 3;

/// Whether a handle bypasses the page cache.
pub(crate) fn is_direct(handle: FileHandle) -> bool {
    handle.0 & DIRECT != 0
}

/// Whether changes through a handle are to be durable when they are acknowledged.
pub(crate) fn is_synchronous(handle: FileHandle) -> bool {
    handle.0 & SYNCHRONOUS != 0
}

/// Whether reading through a handle is no access.
pub(crate) fn is_unnoticed(handle: FileHandle) -> bool {
    handle.0 & UNNOTICED != 0
}

/// The open files of one mount, as far as they are out of the ordinary.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    opened: AtomicU64,
    /// The last handle that was opened before the newest loss.
    newest: AtomicU64,
    /// By the kernel's inode number: the last handle opened before its locks were lost. Only of inodes that the kernel has.
    losses: Mutex<HashMap<u64, u64>>,
    writers: Mutex<Writers>,
    /// Owners of locks taken through a handle.
    owners: Mutex<HashMap<u64, BTreeSet<u64>>>,
    /// Through which a write has failed.
    failed: Mutex<BTreeSet<u64>>,
}

/// A write through a handle, which has failed unless it is said to be done.
#[derive(Debug)]
pub(crate) struct Writing<'a> {
    handles: &'a Handles,
    handle: FileHandle,
    done: bool,
}

impl Writing<'_> {
    pub(crate) fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.handles.failed.lock().insert(self.handle.0);
        }
    }
}

/// Handles that may write.
#[derive(Debug, Default)]
struct Writers {
    /// By the kernel's inode number.
    open: HashMap<u64, BTreeSet<u64>>,
    /// Those that are still to be told of a loss.
    owed: BTreeSet<u64>,
}

impl Handles {
    /// A handle for a file that is opened now, with these flags. `direct`: for writing.
    pub(crate) fn open(&self, ino: u64, direct: bool, flags: i32) -> FileHandle {
        let number = self.opened.fetch_add(1, Ordering::SeqCst) + 1;
        let synchronous = if flags & nix::libc::O_DSYNC != 0 { SYNCHRONOUS } else { 0 };
        let unnoticed = if flags & nix::libc::O_NOATIME != 0 { UNNOTICED } else { 0 };
        let handle = FileHandle(number << BITS | synchronous | unnoticed | if direct { DIRECT } else { 0 });
        if direct {
            self.writers.lock().open.entry(ino).or_default().insert(handle.0);
        }
        handle
    }

    /// Written-behind data of an inode is lost. Whether somebody has it open for writing (and will be told).
    pub(crate) fn lose_data(&self, ino: u64) -> bool {
        let writers = &mut *self.writers.lock();
        let Some(open) = writers.open.get(&ino) else { return false };
        writers.owed.extend(open);
        true
    }

    /// Whether a handle is to be told of a loss. It has been now.
    pub(crate) fn report_loss(&self, handle: FileHandle) -> bool {
        is_direct(handle) && self.writers.lock().owed.remove(&handle.0)
    }

    /// To be held while something is written through a handle.
    pub(crate) fn write(&self, handle: FileHandle) -> Writing<'_> {
        Writing { handles: self, handle, done: false }
    }

    /// Whether a write through a handle has failed.
    pub(crate) fn has_failed(&self, handle: FileHandle) -> bool {
        self.failed.lock().contains(&handle.0)
    }

    /// The locks on these inodes are gone.
    pub(crate) fn lose_locks(&self, inodes: impl Iterator<Item = u64>) {
        let mut losses = self.losses.lock();
        let last = self.opened.load(Ordering::SeqCst);
        losses.extend(inodes.map(|ino| (ino, last)));
        self.newest.store(last, Ordering::SeqCst);
    }

    /// Whether a handle was open when locks on its file were lost.
    pub(crate) fn has_lost_locks(&self, ino: u64, handle: FileHandle) -> bool {
        let number = handle.0 >> BITS;
        // Without a loss since, as almost always, there is nothing to look up.
        number <= self.newest.load(Ordering::SeqCst) && self.losses.lock().get(&ino).is_some_and(|last| number <= *last)
    }

    /// The kernel has forgotten an inode, so that no handle of it is open.
    pub(crate) fn forget(&self, ino: u64) {
        if self.newest.load(Ordering::SeqCst) > 0 {
            self.losses.lock().remove(&ino);
        }
    }

    /// A lock was taken through a handle.
    pub(crate) fn locked(&self, handle: FileHandle, owner: LockOwner) {
        self.owners.lock().entry(handle.0).or_default().insert(owner.0);
    }

    /// A process closed a descriptor of the handle: its locks on the file are gone.
    pub(crate) fn flushed(&self, handle: FileHandle, owner: LockOwner) {
        if let Some(owners) = self.owners.lock().get_mut(&handle.0) {
            owners.remove(&owner.0);
        }
    }

    /// The handle is released. Returns the owners whose locks end with it.
    pub(crate) fn released(&self, ino: u64, handle: FileHandle) -> impl Iterator<Item = LockOwner> + use<> {
        if is_direct(handle) {
            self.failed.lock().remove(&handle.0);
            let writers = &mut *self.writers.lock();
            writers.owed.remove(&handle.0);
            if let Some(open) = writers.open.get_mut(&ino) {
                open.remove(&handle.0);
                if open.is_empty() {
                    writers.open.remove(&ino);
                }
            }
        }
        self.owners.lock().remove(&handle.0).unwrap_or_default().into_iter().map(LockOwner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_opened_before_a_loss_are_concerned_and_later_ones_are_not() {
        let handles = Handles::default();
        let (before, other) = (handles.open(7, true, 0), handles.open(7, false, nix::libc::O_SYNC));
        assert!(is_direct(before) && !is_direct(other) && !is_synchronous(before) && is_synchronous(other));
        assert!(!is_unnoticed(other) && is_unnoticed(handles.open(7, false, nix::libc::O_NOATIME)));
        assert!(!handles.has_lost_locks(7, before));
        handles.lose_locks([7].into_iter());
        let after = handles.open(7, true, 0);
        assert!(handles.has_lost_locks(7, before) && handles.has_lost_locks(7, other));
        assert!(!handles.has_lost_locks(8, before) && !handles.has_lost_locks(7, after));
        handles.lose_locks([7, 8].into_iter());
        assert!(handles.has_lost_locks(7, after));
        handles.forget(7);
        assert!(!handles.has_lost_locks(7, before));
    }

    #[test]
    fn each_writer_that_had_the_file_open_is_told_of_a_loss_once() {
        let handles = Handles::default();
        let (one, two, reader, other) =
            (handles.open(7, true, 0), handles.open(7, true, 0), handles.open(7, false, 0), handles.open(8, true, 0));
        assert!(handles.lose_data(7) && handles.lose_data(7));
        let later = handles.open(7, true, 0);
        let told = |handle| handles.report_loss(handle);
        assert_eq!([reader, one, one, later, other, two, two].map(told), [false, true, false, false, false, true, false]);
        assert!(handles.lose_data(7));
        drop(handles.released(7, one));
        assert_eq!([one, two, later].map(told), [false, true, true]);
        [two, later, reader].into_iter().for_each(|handle| drop(handles.released(7, handle)));
        assert!(!handles.lose_data(7), "nobody has it open for writing: the disk remembers");
        assert!(handles.writers.lock().open.len() == 1 && handles.writers.lock().owed.is_empty());
    }

    #[test]
    fn a_write_that_is_not_done_has_failed_until_its_handle_is_released() {
        let handles = Handles::default();
        let (one, two) = (handles.open(7, true, 0), handles.open(7, true, 0));
        handles.write(one).done();
        assert!(!handles.has_failed(one));
        drop(handles.write(one));
        handles.write(one).done();
        assert!(handles.has_failed(one) && !handles.has_failed(two));
        drop(handles.released(7, one));
        assert!(handles.failed.lock().is_empty());
    }

    #[test]
    fn owners_that_no_flush_named_end_with_the_handle() {
        let handles = Handles::default();
        let (one, two) = (handles.open(7, true, 0), handles.open(7, true, 0));
        for (handle, owner) in [(one, 10), (one, 20), (two, 10), (two, 30)] {
            handles.locked(handle, LockOwner(owner));
        }
        handles.flushed(one, LockOwner(10));
        let gone = |handle| handles.released(7, handle).map(|owner| owner.0).collect::<Vec<_>>();
        assert_eq!(gone(one), [20], "10 has closed it, and may have locked through another handle since");
        assert_eq!(gone(one), []);
        assert_eq!(gone(two), [10, 30]);
    }
}
