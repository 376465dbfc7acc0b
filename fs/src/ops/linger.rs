//! Files that a rename has replaced live on for a moment, as if they were open.
//!
//! Who opens a name has looked it up before: the kernel asks for the inode that it was told, on this node or another. If a
//! rename replaces the name in between, that inode must still be there, or the open fails with `ESTALE`, which nobody expects
//! of a name that exists all the time. (After an unlink there is nothing to be found, and the kernel finds that out by itself.)
//!
//! Only where someone lets go of them in time (`let_go`), which the shell does; elsewhere they are freed at once.

use super::FileSystem;
use crate::inode::Ino;
use parking_lot::Mutex;
use sld::Disk;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long they live on: longer than a look-up and an open are apart, even if a token has to be fetched for each.
const MOMENT: Duration = Duration::from_secs(2);
/// At most so many; more let the oldest ones go early.
const LINGERING_MAX: usize = 4096;

/// Replaced files that are kept for a moment.
#[derive(Debug, Default)]
pub(crate) struct Lingering {
    wanted: AtomicBool,
    queue: Mutex<VecDeque<(Instant, Ino)>>,
}

impl<D: Disk> FileSystem<D> {
    /// From now on replaced files live on for a moment; `let_go` will be called every now and then.
    pub fn keep_replaced(&self) {
        self.lingering.wanted.store(true, Ordering::Relaxed);
    }

    /// A file is about to lose its name to another one; its token is held exclusively.
    pub(crate) fn linger(&self, ino: Ino) {
        if self.lingering.wanted.load(Ordering::Relaxed) {
            self.count_open(ino);
            self.lingering.queue.lock().push_back((Instant::now(), ino));
        }
    }

    /// Lets those go that have lived on for long enough, or all. A failure leaves an orphan to the collector.
    pub async fn let_go(&self, all: bool) {
        loop {
            let next = {
                let mut queue = self.lingering.queue.lock();
                let many = queue.len() > LINGERING_MAX;
                match queue.front() {
                    Some((since, _)) if all || many || since.elapsed() >= MOMENT => queue.pop_front(),
                    _ => None,
                }
            };
            let Some((_, ino)) = next else { return };
            if let Err(error) = self.close(ino).await {
                tracing::debug!(%ino, %error, "a replaced file is left to the collector");
            }
        }
    }

    /// Lets all go: their space is asked for. (Boxed, since closing them may itself be begun again.)
    pub(crate) fn let_all_go(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.let_go(true))
    }

    /// Whether any are kept.
    pub(crate) fn lingers(&self) -> bool {
        !self.lingering.queue.lock().is_empty()
    }

    /// Whether more are kept than should be.
    pub(crate) fn lingers_too_much(&self) -> bool {
        self.lingering.queue.lock().len() > LINGERING_MAX
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::data::{Allocate, At, Payload};
    use crate::ops::testing::fixture;
    use crate::{Caller, FsError, OpenFlags, RenameFlags};
    use cluster::BLOCK_SIZE;

    #[tokio::test(start_paused = true)]
    async fn a_replaced_file_can_still_be_opened_for_a_moment() {
        let f = fixture(&[1000]).await;
        f.fs.keep_replaced();
        let (old, _) = (f.file(b"a").await, f.file(b"b").await);
        let root = f.fs.root();
        let free = f.disk_free().await;
        f.fs.rename(&Caller::default(), root, b"b", root, b"a", RenameFlags::Replace).await.unwrap();
        f.fs.let_go(false).await;
        assert_eq!(f.fs.open(old, OpenFlags::default()).await.unwrap().nlink, 0);
        tokio::time::advance(super::MOMENT).await;
        f.fs.let_go(false).await;
        assert_eq!(f.disk_free().await, free, "it is open");
        f.fs.close(old).await.unwrap();
        assert_eq!(f.disk_free().await, free + 1);
        assert_eq!(f.fs.open(old, OpenFlags::default()).await, Err(FsError::Stale));
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_space_does_not_wait_for_the_moment_to_pass() {
        for in_background in [false, true] {
            let f = fixture(&[6000]).await;
            f.fs.keep_replaced();
            if in_background {
                f.fs.free_in_background();
            }
            f.file(b"a").await;
            let root = f.fs.root();
            let len = 2500 * BLOCK_SIZE as u64;
            // Saved by rename, again and again, on a file system with room for one more copy.
            for round in 0..4 {
                let new = f.file(b"new").await;
                f.fs.write(new, At::Offset(0), Payload::new(0, &[round; 9000]), false).await.unwrap();
                f.fs.allocate(new, Allocate::Reserve, 0, len, false).await.unwrap();
                f.fs.rename(&Caller::default(), root, b"new", root, b"a", RenameFlags::Replace).await.unwrap();
            }
            // What is open stays, and the error comes.
            let open = f.file(b"open").await;
            f.fs.allocate(open, Allocate::Reserve, 0, len, false).await.unwrap();
            f.fs.open(open, OpenFlags::default()).await.unwrap();
            f.fs.rename(&Caller::default(), root, b"a", root, b"open", RenameFlags::Replace).await.unwrap();
            let new = f.file(b"new").await;
            assert_eq!(f.fs.allocate(new, Allocate::Reserve, 0, len, false).await, Err(FsError::NoSpace));
            assert_eq!(f.fs.attributes(open).await.unwrap().nlink, 0);
        }
    }
}
