//! Looking: names, attributes, links, space.

use super::access::Access;
use super::{FileSystem, Locks};
use crate::btree;
use crate::directory::{self, check_name};
use crate::error::{FsError, Result};
use crate::format::{NAME_MAX, Time};
use crate::inode::{Attributes, Body, FileKind, Ino, Inode};
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

/// A path that is deeper is not told.
const DEPTH_MAX: usize = 1024;

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
            return self.attributes(self.directory_above(parent).await?).await;
        }
        self.again(|| self.try_lookup(parent, name)).await
    }

    async fn try_lookup(&self, parent: Ino, name: &[u8]) -> Result<Attributes> {
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

    /// What stands for a name whose inode is damaged, so that it can be removed and replaced: what its entry says, and
    /// otherwise nothing. It must not be shown as what the inode is. `None` if the name is not of this kind (any more).
    ///
    /// # Errors
    /// As [`FileSystem::lookup`].
    pub async fn lookup_damaged(&self, parent: Ino, name: &[u8]) -> Result<Option<Attributes>> {
        check_name(name)?;
        let mut locks = Locks::new([(parent.object(), Mode::Shared)]);
        loop {
            let mut work = self.begin_read(&mut locks).await?;
            work.load_dir(parent).await?;
            let Some(resolved) = work.resolve_damaged(parent, name, Mode::Shared).await? else {
                locks.need(work.needs);
                continue;
            };
            let Some(entry) = resolved.damaged.first() else { return Ok(None) };
            let inode = Inode::new(entry.ino, entry.generation, entry.kind.mode_bits(), 0, 0, Time::default());
            return Ok(Some(inode.attributes()));
        }
    }

    /// The directory that a directory is in; of the root, itself.
    ///
    /// # Errors
    /// `NotDirectory`; `NotFound` if it was removed; `Stale`; those of the disk.
    pub(crate) async fn directory_above(&self, ino: Ino) -> Result<Ino> {
        let mut locks = Locks::new([(ino.object(), Mode::Shared)]);
        loop {
            let mut work = self.begin_read(&mut locks).await?;
            if !work.load(ino).await?.is_directory() {
                return Err(FsError::NotDirectory);
            }
            match work.above(ino).await? {
                Some(record) => return Ok(Ino(record.dir)),
                None => locks.need(work.needs),
            }
        }
    }

    /// An inode's attributes.
    ///
    /// # Errors
    /// `Stale` if it is gone; those of the disk.
    pub async fn attributes(&self, ino: Ino) -> Result<Attributes> {
        Ok(self.inode(ino).await?.attributes())
    }

    /// One of an inode's paths, from the root of the file system, without a slash before it; `None` if it has no name. For
    /// messages: it may be another one a moment later.
    ///
    /// # Errors
    /// `Stale` if it is gone; those of the disk.
    pub async fn path_of(&self, ino: Ino) -> Result<Option<Vec<u8>>> {
        let mut names = Vec::new();
        let mut at = ino;
        while at != self.root() {
            let Some((dir, name)) = self.name_of(at).await? else { return Ok(None) };
            names.push(name);
            if names.len() > DEPTH_MAX {
                return Ok(None);
            }
            at = dir;
        }
        names.reverse();
        Ok(Some(names.join(&b'/')))
    }

    /// One of an inode's names, and the directory that it is in.
    async fn name_of(&self, ino: Ino) -> Result<Option<(Ino, Bytes)>> {
        for record in self.records(ino).await? {
            let dir = Ino(record.dir);
            let _tokens = self.tokens(&[(dir.object(), Mode::Shared)]).await?;
            let source = Source::disk(self.disk());
            let inode = self.load(source, dir).await?;
            if !inode.is_directory() {
                continue;
            }
            let (bucket, _) = directory::bucket(source, &inode, record.hash).await?;
            if let Some(entry) = bucket.entries.into_iter().find(|e| e.ino == ino && e.seq == record.seq) {
                return Ok(Some((dir, entry.name)));
            }
        }
        Ok(None)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// `Invalid` if it is not one; `Stale`; those of the disk.
    pub async fn read_link(&self, ino: Ino) -> Result<Bytes> {
        let (target, access) = self.again(|| self.target_of(ino)).await?;
        if let Some(access) = access {
            self.accessed(access).await;
        }
        Ok(target)
    }

    async fn target_of(&self, ino: Ino) -> Result<(Bytes, Option<Access>)> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let source = Source::disk(self.disk());
        let inode = self.load(source, ino).await?;
        if inode.kind() != FileKind::Symlink {
            return Err(FsError::Invalid("not a symbolic link"));
        }
        let target = match &inode.body {
            Body::Inline(target) => target.clone(),
            _ => {
                let chunks = btree::range(source, &inode, 0, 64).await?;
                chunks.iter().flat_map(|(_, chunk)| chunk.iter().copied()).collect()
            }
        };
        Ok((target, self.access(&inode)))
    }

    /// Space of the file system.
    ///
    /// # Errors
    /// Those of the disk.
    pub async fn stat_fs(&self) -> Result<StatFs> {
        self.free_for_a_moment().await;
        let usage = self.disk().usage().await?;
        Ok(StatFs { block_size: BLOCK_SIZE as u32, blocks: usage.blocks, free: usage.free, name_max: NAME_MAX as u32 })
    }
}
