//! Freeing inodes that have no name left and are not open anywhere: in bounded operations.
//!
//! A crash between two of them leaves an orphan that is smaller than before; the collector goes on with it.
//!
//! Who removes a name is answered when it is gone. What is too large to be freed with it is freed in the background where
//! somebody sees to that (`free_in_background`, `free_removed`: the shell), else before the answer. Either way a failure is
//! no failure of the removal: it leaves an orphan.
//!
//! Invariants:
//! - A job is in the queue until it is done, so that who is given up in the middle of it leaves it to the others.
//! - One job is done at a time. At most `JOBS_MAX` wait; who adds more does some himself.

use super::data::Allowed;
use super::{FileSystem, Locks};
use crate::btree;
use crate::error::{FsError, Result};
use crate::extent;
use crate::format::{ATTRIBUTE_BLOCKS_MAX, ATTRIBUTES_NEXT_AT, check_header, get_u64, magic};
use crate::inode::{Body, FileKind, Ino, Inode};
use crate::transaction::{Source, Transaction};
use cluster::BlockNo;
use parking_lot::Mutex;
use sld::{Disk, DiskError, Mode};
use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, Notify};

/// Blocks freed in one operation.
pub(crate) const FREE_MAX: usize = 512;
/// Removed files that wait for their blocks to be freed.
const JOBS_MAX: usize = 1024;
/// Who asks for the free space waits so long for removed files, at most.
const MOMENT: Duration = Duration::from_secs(1);
/// After so many times that a node was cut off in the middle of it, an operation gives up.
const LOST_MAX: u32 = 64;
/// How often is looked whether it is known by now what other nodes have open.
const UNTIL_KNOWN: Duration = Duration::from_millis(50);

/// What is to be freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// An inode without a name.
    Inode(Ino),
    /// What a truncation has left beyond the end of a file.
    Tail(Ino),
}

/// What is to be freed in the background.
#[derive(Debug, Default)]
pub(crate) struct Removed {
    wanted: AtomicBool,
    jobs: Mutex<VecDeque<Job>>,
    added: Notify,
    /// Who is at the first job.
    owner: AsyncMutex<()>,
}

/// The blocks of a chain of extended attributes.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub(crate) async fn attribute_blocks<D: Disk>(source: Source<'_, D>, inode: &Inode) -> Result<Vec<BlockNo>> {
    let mut blocks = Vec::new();
    let mut next = inode.attribute_block;
    while next != 0 {
        let block = BlockNo::unpack(next);
        if blocks.len() >= ATTRIBUTE_BLOCKS_MAX {
            return Err(FsError::corrupt(block, "a chain of extended attributes does not end"));
        }
        let bytes = source.read(inode.object(), block).await?;
        check_header(&bytes, magic::ATTRIBUTES, block)?;
        if get_u64(&bytes, 16) != inode.ino.0 || get_u64(&bytes, 24) != inode.generation {
            return Err(FsError::corrupt(block, "extended attributes of another inode"));
        }
        blocks.push(block);
        next = get_u64(&bytes, ATTRIBUTES_NEXT_AT);
    }
    Ok(blocks)
}

/// All blocks that an inode owns beside its own, if they are few (`FREE_MAX`).
pub(crate) async fn owned_blocks<D: Disk>(source: Source<'_, D>, inode: &Inode) -> Result<Option<Vec<BlockNo>>> {
    if inode.blocks > FREE_MAX as u64 {
        return Ok(None);
    }
    let mut owned: Vec<BlockNo> = inode.overflow.iter().map(|block| BlockNo::unpack(*block)).collect();
    owned.extend(attribute_blocks(source, inode).await?);
    if let Body::Tree(_) = &inode.body {
        if inode.kind() == FileKind::File {
            for run in extent::map(source, inode, 0, u64::MAX).await? {
                if owned.len() + run.len as usize > FREE_MAX {
                    return Ok(None);
                }
                owned.extend((run.at..run.end()).map(|at| run.block(at)));
            }
        }
        owned.extend(btree::blocks(source, inode, FREE_MAX).await?);
    }
    Ok((owned.len() <= 2 * FREE_MAX).then_some(owned))
}

impl<D: Disk> FileSystem<D> {
    /// From now on large removed files are freed in the background: `free_removed` will be called whenever `removed` says so.
    pub fn free_in_background(&self) {
        self.removed.wanted.store(true, Ordering::Relaxed);
    }

    /// Waits until there may be something to free.
    pub async fn removed(&self) {
        self.removed.added.notified().await;
    }

    /// Frees what was removed. Returns whether there was anything.
    pub async fn free_removed(&self) -> bool {
        let mut any = false;
        while self.free_next().await {
            any = true;
        }
        any
    }

    /// Frees what was removed, for a moment: who asks for the space waits for what will soon be there.
    pub(crate) async fn free_for_a_moment(&self) {
        if !self.removed.jobs.lock().is_empty() {
            let _ = tokio::time::timeout(MOMENT, self.free_removed()).await;
        }
    }

    /// Does the first job; false if there is none.
    async fn free_next(&self) -> bool {
        if self.removed.jobs.lock().is_empty() {
            return false;
        }
        let _owner = self.removed.owner.lock().await;
        let job = self.removed.jobs.lock().front().copied();
        if let Some(job) = job {
            self.free(job).await;
            self.removed.jobs.lock().pop_front();
        }
        true // Also if somebody else has done it meanwhile.
    }

    async fn free(&self, job: Job) {
        let (ino, result) = match job {
            Job::Inode(ino) => (ino, self.reclaim(ino).await.map(|_| ())),
            Job::Tail(ino) => (ino, self.trim(ino).await),
        };
        match result {
            Ok(()) | Err(FsError::Stale) => {}
            Err(error) if error.is_damage() => {
                tracing::error!(%ino, %error, "removed, but not all of its blocks are freed: they are damaged; run fsck");
            }
            Err(error @ FsError::Disk(DiskError::Shutdown)) => tracing::debug!(%ino, %error, "left to the collector"),
            Err(error) => tracing::warn!(%ino, %error, "a removed file's blocks are left to the collector"),
        }
    }

    async fn do_later(&self, job: Job) {
        if !self.removed.wanted.load(Ordering::Relaxed) {
            return self.free(job).await;
        }
        let many = {
            let mut jobs = self.removed.jobs.lock();
            jobs.push_back(job);
            jobs.len() > JOBS_MAX
        };
        self.removed.added.notify_one();
        if many {
            self.free_next().await;
        }
    }

    /// Has inodes without names freed. Their names are gone, so this cannot fail.
    pub(crate) async fn free_later(&self, orphans: Vec<Ino>) {
        for ino in orphans {
            self.do_later(Job::Inode(ino)).await;
        }
    }

    /// A file was truncated, and something beyond its end is left: frees it, even if the caller is killed meanwhile.
    pub(crate) async fn free_tail(&self, ino: Ino) {
        if self.removed.wanted.load(Ordering::Relaxed) {
            self.removed.jobs.lock().push_back(Job::Tail(ino));
            self.removed.added.notify_one();
        }
        self.free(Job::Tail(ino)).await;
    }

    /// Does what is one operation. If the node was cut off before it was committed it begins again: nothing is lost. If there
    /// is no space it waits for that of removed files, and those that a rename has replaced do not live on any longer.
    pub(crate) async fn again<T, F>(&self, attempt: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        self.again_if(&|| true, attempt).await
    }

    /// As `again`, as long as it is allowed.
    pub(crate) async fn again_if<T, F>(&self, allowed: Allowed<'_>, attempt: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let (mut lost, mut replaced) = (0, true);
        loop {
            match attempt().await {
                Err(FsError::Disk(DiskError::Lost)) if lost < LOST_MAX && allowed() => lost += 1,
                Err(FsError::NoSpace) if self.free_removed().await => {}
                Err(FsError::NoSpace) if replaced && self.lingers() => {
                    replaced = false;
                    self.let_all_go().await;
                    self.free_removed().await;
                }
                result => return result,
            }
        }
    }

    /// Frees an inode if it has no name and nobody has it open. Does nothing otherwise. Returns whether it was freed.
    ///
    /// # Errors
    /// Those of the disk; `Corrupt`.
    pub async fn reclaim(&self, ino: Ino) -> Result<bool> {
        let mut lost = 0;
        loop {
            match self.try_reclaim(ino).await {
                Err(FsError::Disk(DiskError::Lost)) if lost < LOST_MAX => lost += 1,
                result => return result,
            }
        }
    }

    async fn try_reclaim(&self, ino: Ino) -> Result<bool> {
        let mut locks = Locks::new([(ino.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            match work.load(ino).await {
                Ok(inode) if inode.is_orphan() => {}
                Ok(_) | Err(FsError::Stale) => return Ok(false),
                Err(error) => return Err(error),
            }
            if self.is_open(ino) {
                return Ok(false);
            }
            match self.disk().open_elsewhere(ino.object()) {
                Some(true) => return Ok(false),
                Some(false) => {}
                None => {
                    drop(work);
                    tokio::time::sleep(UNTIL_KNOWN).await;
                    continue;
                }
            }
            if work.free_small(ino, &[]).await? {
                work.commit()?;
                return Ok(true);
            }
            let inode = work.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
            if inode.kind() == FileKind::File && matches!(inode.body, Body::Tree(_)) {
                let (removed, _) = extent::remove(&mut work.tx, inode, 0, u64::MAX, FREE_MAX as u32, &[]).await?;
                if removed.extents.is_empty() {
                    // Its count of blocks is wrong, as it may be after a crash: the tree knows better. Without this it would
                    // never be found small.
                    inode.blocks = 0;
                }
                let written = inode.write(&mut work.tx, &removed.after);
                removed.free(&mut work.tx, inode, written);
            } else {
                free_entries(&mut work.tx, inode).await?;
            }
            work.commit()?;
            locks = Locks::new([(ino.object(), Mode::Exclusive)]);
        }
    }
}

/// Takes some entries (all invalid, since the directory was empty) off a large dead directory's tree.
async fn free_entries<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode) -> Result<()> {
    let before = inode.blocks;
    for (key, _) in btree::range(tx.source(), inode, 0, FREE_MAX).await? {
        btree::remove(tx, inode, key, &[]).await?;
    }
    if inode.blocks == before && btree::range(tx.source(), inode, 0, 1).await?.is_empty() {
        // Only empty leaves: their blocks are the collector's to find.
        inode.make_tree();
        inode.blocks = 0;
    }
    inode.write(tx, &[]);
    Ok(())
}
