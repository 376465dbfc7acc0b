//! Which inodes an operation means, by number *and* generation.
//!
//! The kernel names inodes by number alone. It goes on doing so for a directory that somebody works in, or a file held by its
//! path only, after another node has removed it, and the number may lead to another file by then. So what the caller was told
//! is noted when it names an inode (`note`), and whatever an operation then loads is compared (`check`).
//!
//! Invariant: an operation that runs in a `scope` never looks at, or changes, another generation of an inode than the one that
//! its caller means. Of inodes that it finds by name nothing is noted.
//!
//! Excludes: what the kernel was told (`shell::known`).

use crate::error::{FsError, Result};
use crate::inode::Ino;
use std::cell::RefCell;

tokio::task_local! {
    /// An operation names three inodes at most.
    static MEANT: RefCell<Vec<(Ino, u64)>>;
}

/// Runs an operation in which inodes may be noted.
pub(crate) fn scope<F: Future>(operation: F) -> impl Future<Output = F::Output> {
    MEANT.scope(RefCell::new(Vec::new()), operation)
}

/// The operation under way, if any, means this generation.
pub(crate) fn note(ino: Ino, generation: u64) {
    let _ = MEANT.try_with(|meant| meant.borrow_mut().push((ino, generation)));
}

/// Whether an inode is one that the operation means, or that it did not name.
pub(crate) fn check(ino: Ino, generation: u64) -> Result<()> {
    let other = |meant: &RefCell<Vec<(Ino, u64)>>| meant.borrow().iter().any(|(i, g)| *i == ino && *g != generation);
    if MEANT.try_with(other).unwrap_or(false) { Err(FsError::Stale) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::fixture;
    use crate::{Caller, NewNode};
    use sld::Disk;

    #[tokio::test]
    async fn a_number_that_was_used_again_leads_nowhere() {
        let f = fixture(&[1000]).await;
        let (root, caller) = (f.fs.root(), Caller::default());
        let old = f.fs.make(&caller, root, b"old", NewNode::Directory, 0o755).await.expect("made");
        f.fs.rmdir(&caller, root, b"old").await.expect("removed");
        let mut names = 0..1000;
        // Until the block is given out again.
        let new = loop {
            f.fs.disk().flush(&[sld::FlushTarget::All]).await.expect("flushed");
            let name = format!("new-{}", names.next().expect("the block is free"));
            let new = f.fs.make(&caller, root, name.as_bytes(), NewNode::Directory, 0o755).await.expect("made");
            if new.ino == old.ino {
                break new;
            }
        };
        assert_ne!(new.generation, old.generation);
        f.fs.rmdir(&caller, root, b"new-0").await.expect("there is room for a file again");
        let fs = &f.fs;
        let on_behalf_of = |generation| {
            scope(async move {
                note(new.ino, generation);
                let looked = fs.attributes(new.ino).await.map(|a| a.generation);
                let made = fs.make(&caller, new.ino, b"in it", NewNode::File, 0o644).await.map(|a| a.nlink);
                (looked, made)
            })
        };
        assert!(matches!(on_behalf_of(old.generation).await, (Err(FsError::Stale), Err(FsError::Stale))));
        let now = on_behalf_of(new.generation).await;
        assert!(matches!(now, (Ok(_), Ok(1))), "{now:?}");
        // Who comes by a name means what the name means.
        let found = scope(async { f.fs.lookup(root, b"new-1").await.map(|a| a.nlink) }).await;
        assert!(found.is_ok(), "{found:?}");
    }
}
