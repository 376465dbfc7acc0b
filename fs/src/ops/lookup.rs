//! Looking: names, attributes, links, space.

use super::{FileSystem, Locks};
use crate::btree;
use crate::directory::check_name;
use crate::error::{FsError, Result};
use crate::format::NAME_MAX;
use crate::inode::{Attributes, Body, FileKind, Ino};
use crate::transaction::Source;
use bytes::Bytes;
use cluster::BLOCK_SIZE;
use sld::{Disk, Mode};

/// What `statfs` shows. Inodes are blocks, so any free block can be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Longest name.
    pub name_max: u32,
}

impl<D: Disk> FileSystem<D> {
    /// What a name in a directory leads to.
    ///
    /// # Errors
    /// `NotFound`, `NotDirectory`, `NameTooLong`, `Stale`, those of the disk.
    pub async fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attributes> {
        check_name(name)?;
        if name == b"." {
            return self.attributes(parent).await;
        }
        if name == b".." {
            let dir = self.inode(parent).await?;
            if !dir.is_directory() {
                return Err(FsError::NotDirectory);
            }
            let up = dir.parents.first().ok_or(FsError::NotFound)?;
            return self.attributes(Ino(up.dir)).await;
        }
        let mut locks = Locks::new([(parent.object(), Mode::Shared)]);
        loop {
            let mut work = self.begin_read(&mut locks).await?;
            work.load_dir(parent).await?;
            // Rule 2: all candidates are judged, flagged or not.
            let Some(resolved) = work.resolve(parent, name, Mode::Shared).await? else {
                locks.need(work.needs);
                continue;
            };
            let winner = resolved.winner().ok_or(FsError::NotFound)?.ino;
            return Ok(work.inode(winner)?.attributes());
        }
    }

    /// An inode's attributes.
    ///
    /// # Errors
    /// `Stale` if it is gone; those of the disk.
    pub async fn attributes(&self, ino: Ino) -> Result<Attributes> {
        Ok(self.inode(ino).await?.attributes())
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// `Invalid` if it is not one; `Stale`; those of the disk.
    pub async fn read_link(&self, ino: Ino) -> Result<Bytes> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let source = Source::disk(self.disk());
        let inode = self.load(source, ino).await?;
        if inode.kind() != FileKind::Symlink {
            return Err(FsError::Invalid("not a symbolic link"));
        }
        match &inode.body {
            Body::Inline(target) => Ok(target.clone()),
            _ => {
                let chunks = btree::range(source, &inode, 0, 64).await?;
                Ok(chunks.iter().flat_map(|(_, chunk)| chunk.iter().copied()).collect())
            }
        }
    }

    /// Space of the file system.
    ///
    /// # Errors
    /// Those of the disk.
    pub async fn stat_fs(&self) -> Result<StatFs> {
        let usage = self.disk().usage().await?;
        Ok(StatFs { block_size: BLOCK_SIZE as u32, blocks: usage.blocks, free: usage.free, name_max: NAME_MAX as u32 })
    }
}
