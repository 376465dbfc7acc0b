//! Renames that the kernel would take for done.
//!
//! For `rename(a, b)` the kernel looks up first `a`, then `b`, and if both are the same inode, two names of one file, there is nothing to
//! do: it says so without asking us. But if another node has moved `a` to `b` in between, or while the kernel still believed `a`, this
//! is no success: there is no `a` any more (and of an exchange only the other one has taken place). So when a thread that is in such a
//! call looks up the second name, and is about to be told an inode that its kernel knows by the first one, it is told `ESTALE`
//! instead. Then the kernel begins the call once more, and believes nothing.
//!
//! Invariants:
//! - Who looks up the first name of a rename is never told so: the two are told apart by their names, and if these are the same by the
//!   directories' names before them.
//! - Once the first name has been looked up anew the second one is answered as it is, but that if both still are the same inode
//!   it is looked up again, for a while: others exchange the two just now.
//! - What is remembered is bounded.
//!
//! Excludes: inodes that have several names, of which the two may be; directories that are named in neither path (`renameat` with
//! descriptors, of equal names), and threads that cannot be seen from here (`syscall`): for these nothing is changed.

use super::front::Front;
use super::names::Found;
use super::syscall::{self, Renaming};
use crate::{Attributes, FileKind, FsError};
use fuser::INodeNo;
use parking_lot::Mutex;
use sld::Disk;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Threads remembered that were told to begin again.
const MARKS_MAX: usize = 64;
/// How often, and after what time, a second name is looked up again that still is the same inode.
const AGAIN_MAX: u32 = 50;
const AGAIN: Duration = Duration::from_millis(1);

/// A thread was told to begin its rename again.
#[derive(Clone, Copy, Debug)]
struct Mark {
    thread: u32,
    /// The inode that both names led to.
    node: u64,
    /// The first name, and where the second one is.
    from: u32,
    target: Found,
    /// The first name was looked up anew, and still is the inode.
    confirmed: bool,
}

/// Threads that were told to begin their renames again.
#[derive(Debug, Default)]
pub(crate) struct Renames {
    marks: Mutex<VecDeque<Mark>>,
    count: AtomicUsize,
}

impl Renames {
    /// A thread has looked up a name, which is this inode now. Returns the inode for which it was told to begin again, if that was
    /// to be had by this name and is not any more.
    fn looked_up(&self, thread: u32, found: Found, node: Option<u64>) -> Option<u64> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let mut marks = self.marks.lock();
        let is_first = |mark: &Mark| mark.thread == thread && mark.from == found.name && mark.target != found;
        let at = marks.iter().position(is_first)?;
        let of = marks[at].node;
        if node == Some(of) {
            marks[at].confirmed = true;
            return None;
        }
        marks.remove(at);
        self.count.store(marks.len(), Ordering::SeqCst);
        Some(of)
    }

    /// A thread is told to begin again. True: it was before, and the first name is the same inode still.
    fn begin_again(&self, mark: Mark) -> bool {
        let mut marks = self.marks.lock();
        let old = marks.iter().position(|m| m.thread == mark.thread).and_then(|at| marks.remove(at));
        let again = old.is_some_and(|old| old.confirmed && old.node == mark.node && old.target == mark.target);
        if !again {
            if marks.len() == MARKS_MAX {
                marks.pop_front();
            }
            marks.push_back(mark);
        }
        self.count.store(marks.len(), Ordering::SeqCst);
        again
    }
}

/// Whether it is the second name of a rename that is looked up, in a directory that the kernel knows by `directory`, and the inode that is
/// there is known by the first one.
fn is_second(renaming: &Renaming, name: &[u8], directory: Option<Found>, known: Found) -> bool {
    let hash = |name: &[u8]| Found::new(0, name).name;
    if renaming.to != name || hash(&renaming.from) != known.name {
        return false;
    }
    if renaming.from != renaming.to {
        return true;
    }
    let is = |named: &Option<Vec<u8>>| named.as_ref().zip(directory).map(|(named, found)| hash(named) == found.name);
    match (is(&renaming.from_dir), is(&renaming.to_dir)) {
        (Some(true), _) | (_, Some(false)) => false,
        (_, Some(true)) | (Some(false), _) => true,
        (None, None) => false,
    }
}

impl<D: Disk> Front<D> {
    /// What a thread is to be told that has looked up a name.
    pub(super) async fn beside_renames(
        &self,
        thread: u32,
        directory: INodeNo,
        name: &[u8],
        result: Result<Attributes, FsError>,
    ) -> Result<Attributes, FsError> {
        let found = Found::new(directory.0, name);
        let node_of = |result: &Result<Attributes, FsError>| result.as_ref().ok().map(|a| self.identity.node(a.ino));
        if let Some(other) = self.renames.looked_up(thread, found, node_of(&result)) {
            self.known.lose_name(other);
        }
        let Some(node) = node_of(&result) else { return result };
        let has_names = result.as_ref().is_ok_and(|a| a.kind != FileKind::Directory && a.nlink > 1);
        let Some(known) = self.known.found(node).filter(|known| *known != found && !has_names) else { return result };
        let Some(renaming) = syscall::renames(thread).await else { return result };
        if !is_second(&renaming, name, self.known.found(directory.0), known) {
            return result;
        }
        let mark = Mark { thread, node, from: known.name, target: found, confirmed: false };
        if !self.renames.begin_again(mark) {
            return Err(FsError::Stale);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn renaming(from: &str, to: &str) -> Renaming {
        Renaming::of(from.as_bytes(), to.as_bytes())
    }

    #[test]
    fn the_second_name_is_told_from_the_first() {
        let known = Found::new(5, b"a");
        let is = |from: &str, to: &str, name: &[u8], directory: &[u8]| {
            is_second(&renaming(from, to), name, Some(Found::new(1, directory)), known)
        };
        assert!(is("/m/a", "/m/b", b"b", b"m") && !is("/m/a", "/m/b", b"a", b"m"));
        assert!(!is("/m/c", "/m/b", b"b", b"m"), "it is known by another name than the first");
        assert!(is("q/a", "done/a", b"a", b"done") && !is("q/a", "done/a", b"a", b"q"));
        assert!(is("a", "done/a", b"a", b"done") && !is("a", "done/a", b"a", b"cwd"));
        assert!(is("q/a", "a", b"a", b"cwd") && !is("q/a", "a", b"a", b"q"));
        assert!(!is("a", "a", b"a", b"cwd"), "it cannot be told");
    }

    #[test]
    fn who_was_told_to_begin_again_is_not_told_so_when_the_first_name_is_gone() {
        let renames = Renames::default();
        let (first, second) = (Found::new(1, b"a"), Found::new(2, b"b"));
        let mark = Mark { thread: 7, node: 9, from: first.name, target: second, confirmed: false };
        assert_eq!(renames.looked_up(7, first, None), None);
        assert!(!renames.begin_again(mark));
        assert!(!renames.begin_again(mark), "the kernel looks a name up twice that it knew as something else");
        assert_eq!(renames.looked_up(7, second, Some(9)), None);
        assert_eq!(renames.looked_up(8, first, None), None);
        assert_eq!(renames.looked_up(7, first, None), Some(9));
        assert_eq!(renames.count.load(Ordering::SeqCst), 0);
        // Exchanged again meanwhile.
        assert!(!renames.begin_again(mark));
        assert_eq!(renames.looked_up(7, first, Some(9)), None);
        assert!(renames.begin_again(mark));
        (0..200).for_each(|thread| _ = renames.begin_again(Mark { thread, ..mark }));
        assert_eq!(renames.marks.lock().len(), MARKS_MAX);
    }
}
