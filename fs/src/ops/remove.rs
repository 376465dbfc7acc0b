//! Taking names away: unlink and rmdir.

use super::data::later;
use super::{FileSystem, Locks, Work};

use crate::directory::check_name;
use crate::error::{FsError, Result};
use crate::format::Time;
use crate::inode::{Ino, Parent};
use crate::ops::Caller;
use crate::parents;
use sld::{After, Disk, Mode, WriteId};

impl<D: Disk> FileSystem<D> {
    /// Removes a name of something that is not a directory.
    ///
    /// # Errors
    /// `NotFound`, `IsDirectory`, `NotDirectory`, `NameTooLong`, `Stale`, those of the disk.
    pub async fn unlink(&self, _caller: &Caller, parent: Ino, name: &[u8]) -> Result<()> {
        if name == b"." || name == b".." {
            return Err(FsError::IsDirectory);
        }
        self.remove(parent, name, false).await
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// `NotFound`, `NotDirectory`, `NotEmpty`, `NameTooLong`, `Stale`, those of the disk.
    pub async fn rmdir(&self, _caller: &Caller, parent: Ino, name: &[u8]) -> Result<()> {
        match name {
            b"." => return Err(FsError::Invalid("a directory cannot be removed by the name `.`")),
            b".." => return Err(FsError::NotEmpty),
            _ => {}
        }
        self.remove(parent, name, true).await
    }

    async fn remove(&self, parent: Ino, name: &[u8], directory: bool) -> Result<()> {
        check_name(name)?;
        let orphans = self.again(|| self.try_remove(parent, name, directory)).await?;
        self.free_later(orphans).await;
        Ok(())
    }

    /// Removes a name. Returns what is to be freed then.
    async fn try_remove(&self, parent: Ino, name: &[u8], directory: bool) -> Result<Vec<Ino>> {
        let mut locks = Locks::new([(parent.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            work.load_dir(parent).await?;
            let Some(resolved) = work.resolve_damaged(parent, name, Mode::Exclusive).await? else {
                locks.need(work.needs);
                continue;
            };
            let winner = resolved.winner().map(|entry| entry.ino);
            let is_directory = match (winner, &resolved.damage) {
                (Some(winner), damage) => match (work.inode(winner)?.is_directory(), damage) {
                    (true, Some(error)) => return Err(error.clone()),
                    (is_directory, _) => is_directory,
                },
                (None, None) => return Err(FsError::NotFound),
                // What its entry says it is. What it owns is left to fsck.
                (None, Some(_)) => false,
            };
            match (is_directory, directory) {
                (true, false) => return Err(FsError::IsDirectory),
                (false, true) => return Err(FsError::NotDirectory),
                (true, true) => match work.is_empty(winner.ok_or(FsError::NotFound)?).await? {
                    None => {
                        locks.need(work.needs);
                        continue;
                    }
                    Some(false) => return Err(FsError::NotEmpty),
                    Some(true) => {}
                },
                (false, false) => {}
            }
            let now = self.now();
            // Rule 5: all candidates leave in one block write (rule 10: after their inodes); then each inode loses its record.
            work.before_entry(parent, now, false)?;
            let mut bucket = resolved.bucket.clone();
            let all: Vec<u64> = bucket.of(name).map(|entry| entry.seq).collect();
            bucket.remove(name, &all);
            let after: Vec<After> = resolved.judged().collect();
            let gone = work.put(parent, resolved.hash, &bucket, resolved.counter, &after).await?;
            work.after_entry(parent, now, u32::from(directory), gone)?;
            let mut orphans = Vec::new();
            if let Some(entry) = resolved.winner() {
                work.inode(entry.ino)?.keep_records_of_directory(&[entry.record(parent, resolved.hash)]);
            }
            for entry in &resolved.valid {
                let record = entry.record(parent, resolved.hash);
                orphans.extend(work.drop_record(entry.ino, record, now, gone).await?);
            }
            drop(work.commit()?);
            resolved.tell_damage();
            return Ok(orphans);
        }
    }
}

impl<D: Disk> Work<'_, D> {
    /// An inode, whose token is held exclusively, loses a parent record after the entry is gone. If it was the last one and
    /// nobody has the inode open, it is freed: at once if it is small, else the caller has to have it reclaimed after the
    /// commit (it is returned then).
    pub(crate) async fn drop_record(&mut self, ino: Ino, record: Parent, now: Time, gone: WriteId) -> Result<Option<Ino>> {
        let inode = self.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
        let Some(change) = parents::remove(&mut self.tx, inode, record).await? else {
            return Ok(None);
        };
        inode.ctime = later(now, inode.ctime);
        let mut after = change.after;
        after.push(After::Write(gone));
        let open_elsewhere = self.fs.disk().open_elsewhere(ino.object());
        let mut unused = inode.is_orphan() && !self.fs.is_open(ino) && open_elsewhere != Some(true);
        // If it is not known who has it open who frees it waits for that.
        let freed = unused
            && open_elsewhere.is_some()
            && match self.free_small(ino, &after).await {
                // Its name goes all the same. What it owns is not known, so nothing of it is freed.
                Err(error) if error.is_damage() => {
                    tracing::error!(%ino, %error, "removed, but its blocks are not freed: they are damaged; run fsck");
                    unused = false;
                    false
                }
                freed => freed?,
            };
        if freed {
            // Overflow blocks that the change replaced are not the inode's any more.
            for block in change.free {
                self.tx.free(ino.object(), block, &[After::Write(gone)]);
            }
            return Ok(None);
        }
        let inode = self.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
        let write = inode.write(&mut self.tx, &after);
        for block in change.free {
            self.tx.free(ino.object(), block, &[After::Write(write)]);
        }
        Ok(unused.then_some(ino))
    }

    /// Frees an inode with all that it owns, if that is few blocks; else false.
    pub(crate) async fn free_small(&mut self, ino: Ino, after: &[After]) -> Result<bool> {
        let inode = self.inodes.get(&ino).ok_or(FsError::Stale)?;
        let Some(owned) = super::reclaim::owned_blocks(self.tx.source(), inode).await? else {
            return Ok(false);
        };
        let free = self.tx.free(ino.object(), ino.block(), after);
        for block in owned {
            self.tx.free(ino.object(), block, &[After::Write(free)]);
        }
        Ok(true)
    }
}
