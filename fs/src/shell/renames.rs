//! Renames that the kernel would take for done.
//!
//! For `rename(a, b)` the kernel looks up first `a`, then `b`, and if both are the same inode, two names of one file, there is nothing to
//! do: it says so without asking us. But if another node has moved `a` to `b` in between, or while the kernel still believed `a`, this
//! is no success: there is no `a` any more (and of an exchange only the other one has taken place). So when a thread that is in such a
//! call looks up a name, and is about to be told an inode that its kernel was told by another one just before, it is told `ESTALE`
//! instead. Then the kernel begins the call once more, looks up everything anew, and believes nothing.
//!
//! In this second turn the first name is looked up before the second one. If neither it nor anything else was the inode, the second
//! one is answered as it is. If it still is, others move the inode to and fro just now, and the second name is looked up until that
//! is over, for a while. (In the first turn the kernel may look up the second name twice in a row, if it knew that as something
//! else.)
//!
//! Invariants:
//! - What this node's own renames have moved is known by its new name, as it is in the kernel: who renames again and again is
//!   told nothing of the kind.
//! - What is remembered is bounded, in number and in time.
//!
//! Excludes: inodes that have several names, of which the two may be; threads that cannot be seen from here (`syscall`): for these
//! nothing is changed. No memory of processes is read: a process could make the reader wait.

use super::front::Front;
use super::names::Found;
use super::syscall;
use crate::{Attributes, FileKind, FsError, Ino};
use fuser::INodeNo;
use parking_lot::Mutex;
use sld::Disk;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Threads remembered that were told to begin again, and for how long.
const MARKS_MAX: usize = 64;
const MARK_LASTS: Duration = Duration::from_secs(5);
/// A name is looked up so often in a row in one turn.
const IN_A_ROW_MAX: u32 = 2;
/// How often, and after what time, a second name is looked up again that still is the same inode.
const AGAIN_MAX: u32 = 50;
const AGAIN: Duration = Duration::from_millis(1);

/// A thread was told to begin its rename again.
#[derive(Clone, Copy, Debug)]
struct Mark {
    thread: u32,
    at: Instant,
    /// The inode, and by which name it was found.
    node: u64,
    found: Found,
    /// How often that was told in a row.
    told: u32,
    /// Something else was looked up since; and that was the inode, too.
    second_turn: bool,
    still: bool,
}

/// What a thread is to be told that is about to be told an inode by a second name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tell {
    /// To begin again.
    Again,
    /// What it is.
    Inode,
    /// What it is as soon as it is something else.
    Other,
}

/// Threads that were told to begin their renames again.
#[derive(Debug, Default)]
pub(crate) struct Renames {
    marks: Mutex<VecDeque<Mark>>,
    count: AtomicUsize,
}

impl Renames {
    /// A thread has looked up a name, which is this inode now.
    fn looked_up(&self, thread: u32, found: Found, node: Option<u64>) {
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut marks = self.marks.lock();
        marks.retain(|mark| mark.at.elapsed() < MARK_LASTS);
        if let Some(mark) = marks.iter_mut().find(|mark| mark.thread == thread && mark.found != found) {
            mark.second_turn = true;
            mark.still |= node == Some(mark.node);
        }
        self.count.store(marks.len(), Ordering::SeqCst);
    }

    /// A thread is about to be told an inode by this name, by which its kernel does not know it.
    fn second(&self, thread: u32, found: Found, node: u64) -> Tell {
        let mut marks = self.marks.lock();
        let old = marks.iter().position(|m| m.thread == thread).and_then(|at| marks.remove(at));
        let old = old.filter(|old| old.node == node && old.found == found && old.at.elapsed() < MARK_LASTS);
        let (tell, told) = match old {
            Some(old) if old.second_turn && old.still => (Tell::Other, 0),
            Some(old) if old.second_turn || old.told == IN_A_ROW_MAX => (Tell::Inode, 0),
            old => (Tell::Again, old.map_or(0, |old| old.told) + 1),
        };
        if tell == Tell::Again {
            if marks.len() == MARKS_MAX {
                marks.pop_front();
            }
            marks.push_back(Mark { thread, at: Instant::now(), node, found, told, second_turn: false, still: false });
        }
        self.count.store(marks.len(), Ordering::SeqCst);
        tell
    }
}

impl<D: Disk> Front<D> {
    /// What a thread is to be told that has looked up a name, with a request that came at `arrived`.
    pub(super) async fn beside_renames(
        &self,
        arrived: Instant,
        thread: u32,
        directory: INodeNo,
        name: &[u8],
        result: Result<Attributes, FsError>,
    ) -> Result<Attributes, FsError> {
        let found = Found::new(directory.0, name);
        let node_of = |result: &Result<Attributes, FsError>| result.as_ref().ok().map(|a| self.identity.node(a.ino));
        self.renames.looked_up(thread, found, node_of(&result));
        let Some(node) = node_of(&result) else { return result };
        let has_names = result.as_ref().is_ok_and(|a| a.kind != FileKind::Directory && a.nlink > 1);
        if has_names || !self.known.is_known_elsewhere(node, found, arrived) || !syscall::renames(thread).await {
            return result;
        }
        match self.renames.second(thread, found, node) {
            Tell::Inode => result,
            Tell::Again => Err(FsError::Stale),
            Tell::Other => {
                for _ in 0..AGAIN_MAX {
                    tokio::time::sleep(AGAIN).await;
                    let result = self.fs.lookup(self.identity.ino(directory), name).await;
                    if node_of(&result) != Some(node) {
                        return result;
                    }
                }
                Err(FsError::Stale)
            }
        }
    }

    /// A rename is about to be answered: the kernel moves its names, too.
    pub(super) fn renamed(
        &self,
        result: &Result<Option<(Ino, Option<Ino>)>, FsError>,
        from: (INodeNo, &[u8]),
        to: (INodeNo, &[u8]),
    ) {
        let Ok(Some((moved, back))) = result else { return };
        let place = |(directory, name): (INodeNo, &[u8])| Found::new(directory.0, name);
        self.known.moved(self.identity.node(*moved), place(to));
        if let Some(back) = back {
            self.known.moved(self.identity.node(*back), place(from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_second_turn_of_a_rename_is_told_what_is_there() {
        let (a, b, dir) = (Found::new(1, b"a"), Found::new(2, b"b"), Found::new(3, b"dir"));
        let renames = Renames::default();
        let looked_up = |found, node| renames.looked_up(7, found, node);
        // Looked up twice in a row; then the first name is gone (and the kernel asks no more), or something else.
        assert_eq!((renames.second(7, b, 9), renames.second(7, b, 9)), (Tell::Again, Tell::Again));
        looked_up(dir, Some(5));
        looked_up(a, Some(8));
        assert_eq!(renames.second(7, b, 9), Tell::Inode);
        assert_eq!(renames.count.load(Ordering::SeqCst), 0);
        // Both are the inode again.
        assert_eq!(renames.second(7, b, 9), Tell::Again);
        looked_up(a, Some(9));
        assert_eq!(renames.second(7, b, 9), Tell::Other);
        // It was the first name all the time, of a path without directories.
        assert_eq!(
            (renames.second(7, a, 9), renames.second(7, a, 9), renames.second(7, a, 9)),
            (Tell::Again, Tell::Again, Tell::Inode)
        );
        // Other threads, other names, and what was long ago.
        assert_eq!(
            (renames.second(7, b, 9), renames.second(8, b, 9), renames.second(7, a, 9)),
            (Tell::Again, Tell::Again, Tell::Again)
        );
        tokio::time::advance(MARK_LASTS).await;
        looked_up(b, Some(1));
        assert_eq!(renames.count.load(Ordering::SeqCst), 0);
        (0..200).for_each(|thread| _ = renames.second(thread, a, 9));
        assert_eq!(renames.marks.lock().len(), MARKS_MAX);
    }
}
