//! Making files, directories, links by name, and special files.

use super::{FileSystem, Locks, xattr};
use crate::btree;
use crate::directory::{Entry, check_name};
use crate::error::{FsError, Result};
use crate::format::{BODY_LEN, TARGET_MAX};
use crate::inode::{Attributes, Body, FileKind, Ino, Inode, Parent};
use crate::ops::Caller;
use bytes::Bytes;
use nix::libc;
use sld::{After, Disk, Mode};

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewNode<'a> {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link with its target.
    Symlink(&'a [u8]),
    /// A device, pipe or socket.
    Special {
        /// Which.
        kind: FileKind,
        /// Device number; of devices only.
        rdev: u32,
    },
}

/// Bytes of a long link's target in one value of its tree.
const TARGET_CHUNK: usize = 1024;

impl NewNode<'_> {
    fn kind(&self) -> FileKind {
        match self {
            NewNode::File => FileKind::File,
            NewNode::Directory => FileKind::Directory,
            NewNode::Symlink(_) => FileKind::Symlink,
            NewNode::Special { kind, .. } => *kind,
        }
    }
}

impl<D: Disk> FileSystem<D> {
    /// Makes a name and a new inode for it. `mode`: permission bits; the directory's default list or else the caller's umask
    /// limit them.
    ///
    /// # Errors
    /// `Exists`, `NotFound` (the directory was removed), `NotDirectory`, `NameTooLong`, `NoSpace`, `TooManyLinks`, `Stale`,
    /// those of the disk.
    pub async fn make(&self, caller: &Caller, parent: Ino, name: &[u8], node: NewNode<'_>, mode: u32) -> Result<Attributes> {
        check_name(name)?;
        if name == b"." || name == b".." {
            return Err(FsError::Exists);
        }
        if let NewNode::Symlink(target) = node {
            if target.len() > TARGET_MAX {
                return Err(FsError::NameTooLong);
            }
            if target.is_empty() || target.contains(&0) {
                return Err(FsError::NotFound);
            }
        }
        self.again(|| self.try_make(caller, parent, name, node, mode)).await
    }

    async fn try_make(&self, caller: &Caller, parent: Ino, name: &[u8], node: NewNode<'_>, mode: u32) -> Result<Attributes> {
        let mut locks = Locks::new([(parent.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            work.load_dir(parent).await?;
            let Some(resolved) = work.resolve(parent, name, Mode::Shared).await? else {
                locks.need(work.needs);
                continue;
            };
            if resolved.winner().is_some() {
                return Err(FsError::Exists);
            }
            let now = self.now();
            let is_directory = node.kind() == FileKind::Directory;
            // Directories are spread over the mirrors, files are near their directory.
            let near = if is_directory { None } else { Some(parent.block()) };
            let block = work.tx.alloc(near, 1).await?.start;
            let ino = Ino(block.pack());
            let _adopted = self.disk().adopt(ino.object());

            let dir = work.inode(parent)?;
            let (mut gid, mut mode) = (caller.gid, node.kind().mode_bits() | mode & 0o7777);
            if dir.mode & libc::S_ISGID != 0 {
                // A set-group-id directory gives its group, and itself being one to directories.
                gid = dir.gid;
                if is_directory {
                    mode |= libc::S_ISGID;
                }
            }
            let mut inode = Inode::new(ino, self.next_generation(), mode, caller.uid, gid, now);
            let seq = resolved.counter + 1;
            inode.parents.push(Parent { dir: parent.0, hash: resolved.hash, seq });
            inode.links = 1;
            match node {
                NewNode::Special { rdev, kind: FileKind::CharDevice | FileKind::BlockDevice } => inode.rdev = rdev,
                NewNode::Symlink(target) => {
                    inode.size = target.len() as u64;
                    if target.len() <= BODY_LEN {
                        inode.body = Body::Inline(Bytes::copy_from_slice(target));
                    } else {
                        inode.make_tree();
                        for (index, chunk) in (0..).zip(target.chunks(TARGET_CHUNK)) {
                            btree::insert(&mut work.tx, &mut inode, index, chunk, 0, &[]).await?;
                        }
                    }
                }
                _ => {}
            }
            let dir = work.inodes.get(&parent).ok_or(FsError::Stale)?;
            let inherited = xattr::inherit(&mut work.tx, dir, &mut inode, caller.umask).await?;
            // Rule 3: the inode, then an entry that needs no flag.
            let write = inode.write(&mut work.tx, &inherited.after);
            let mut after = work.before_entry(parent, now, is_directory)?;
            after.push(After::Write(write));
            after.extend(resolved.judged());
            after.extend(work.name_of_dir(parent));
            let mut bucket = resolved.bucket.clone();
            resolved.settle(&mut bucket);
            bucket.add(Entry {
                ino,
                generation: inode.generation,
                seq,
                kind: node.kind(),
                flagged: false,
                slot: 0,
                name: Bytes::copy_from_slice(name),
            })?;
            let entry = work.put(parent, resolved.hash, &bucket, seq, &after).await?;
            work.after_entry(parent, now, 0, entry)?;
            let entry_block = work.tx.block_of(entry);
            let _held = work.commit()?;
            self.remember_name(ino, entry_block);
            return Ok(inode.attributes());
        }
    }
}
