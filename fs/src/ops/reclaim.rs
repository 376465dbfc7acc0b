//! Freeing inodes that have no name left and are not open anywhere: in bounded operations.
//!
//! A crash between two of them leaves an orphan that is smaller than before; the collector goes on with it.

use super::{FileSystem, Locks};
use crate::btree;
use crate::error::{FsError, Result};
use crate::extent;
use crate::format::{ATTRIBUTE_BLOCKS_MAX, ATTRIBUTES_NEXT_AT, check_header, get_u64, magic};
use crate::inode::{Body, FileKind, Ino, Inode};
use crate::transaction::{Source, Transaction};
use cluster::BlockNo;
use sld::{Disk, Mode};

/// Blocks freed in one operation.
pub(crate) const FREE_MAX: usize = 512;

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
    pub(crate) async fn reclaim_all(&self, orphans: Vec<Ino>) -> Result<()> {
        for ino in orphans {
            self.reclaim(ino).await?;
        }
        Ok(())
    }

    /// Frees an inode if it has no name and nobody has it open. Does nothing otherwise. Returns whether it was freed.
    ///
    /// # Errors
    /// Those of the disk; `Corrupt`.
    pub async fn reclaim(&self, ino: Ino) -> Result<bool> {
        let mut locks = Locks::new([(ino.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            match work.load(ino).await {
                Ok(inode) if inode.is_orphan() => {}
                Ok(_) | Err(FsError::Stale) => return Ok(false),
                Err(error) => return Err(error),
            }
            if self.is_open(ino) || self.disk().open_elsewhere(ino.object()) {
                return Ok(false);
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
