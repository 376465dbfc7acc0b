//! Further names for an inode.

use super::data::later;
use super::{FileSystem, Locks};
use crate::directory::{Entry, check_name};
use crate::error::{FsError, Result};
use crate::inode::{Attributes, Ino, Parent};
use crate::parents;
use bytes::Bytes;
use sld::{After, Disk, Mode};

impl<D: Disk> FileSystem<D> {
    /// Gives an inode a further name.
    ///
    /// # Errors
    /// `Exists`, `NotPermitted` (a directory), `NotFound`, `NotDirectory`, `TooManyLinks`, `NameTooLong`, `NoSpace`, `Stale`,
    /// those of the disk.
    pub async fn link(&self, ino: Ino, new_parent: Ino, new_name: &[u8]) -> Result<Attributes> {
        check_name(new_name)?;
        if new_name == b"." || new_name == b".." {
            return Err(FsError::Exists);
        }
        if ino == new_parent {
            return Err(FsError::NotPermitted);
        }
        self.again(|| self.try_link(ino, new_parent, new_name)).await
    }

    async fn try_link(&self, ino: Ino, new_parent: Ino, new_name: &[u8]) -> Result<Attributes> {
        let mut locks = Locks::new([(new_parent.object(), Mode::Exclusive), (ino.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            work.load_dir(new_parent).await?;
            let inode = work.load(ino).await?;
            if inode.is_directory() {
                return Err(FsError::NotPermitted);
            }
            let (kind, generation, is_orphan) = (inode.kind(), inode.generation, inode.is_orphan());
            let Some(resolved) = work.resolve(new_parent, new_name, Mode::Shared).await? else {
                locks.need(work.needs);
                continue;
            };
            if resolved.winner().is_some() {
                return Err(FsError::Exists);
            }
            // Looked at last, as the kernel does.
            if is_orphan {
                return Err(FsError::NotFound);
            }
            let now = self.now();
            let seq = resolved.counter + 1;
            // Rule 4: a flagged entry (rule 7: the losers go with that write) …
            work.before_entry(new_parent, now, false)?;
            let mut bucket = resolved.bucket.clone();
            resolved.settle(&mut bucket);
            let name = Bytes::copy_from_slice(new_name);
            bucket.add(Entry { ino, generation, seq, kind, flagged: true, slot: 0, name })?;
            let judged: Vec<After> = resolved.judged().chain(work.name_of_dir(new_parent)).collect();
            let tentative = work.put(new_parent, resolved.hash, &bucket, seq, &judged).await?;
            // … then the inode gains its record: the commit. Rule 9: it goes after the entries of the other names.
            let record = Parent { dir: new_parent.0, hash: resolved.hash, seq };
            let inode = work.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
            let change = parents::add(&mut work.tx, inode, record).await?;
            inode.ctime = later(now, inode.ctime);
            let attributes = inode.attributes();
            let mut after = change.after;
            after.push(After::Write(tentative));
            after.extend(self.name_blocks(ino).into_iter().map(After::Block));
            let commit = inode.write(&mut work.tx, &after);
            for block in change.free {
                work.tx.free(ino.object(), block, &[After::Write(commit)]);
            }
            // Then the flag goes (rule 8: in the same operation).
            bucket.flag(new_name, seq, false);
            let entry = work.put(new_parent, resolved.hash, &bucket, seq, &[After::Write(commit)]).await?;
            work.after_entry(new_parent, now, 0, entry)?;
            let entry_block = work.tx.block_of(entry);
            let _held = work.commit()?;
            self.remember_name(ino, entry_block);
            return Ok(attributes);
        }
    }
}
