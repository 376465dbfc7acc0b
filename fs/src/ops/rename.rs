//! Moving names: the crash-atomic rename.

use super::data::later;
use super::work::Resolved;
use super::{FileSystem, Locks, Work};
use crate::directory::{Bucket, Entry, check_name};
use crate::error::{FsError, Result};
use crate::inode::{FileKind, Ino, Parent};
use crate::ops::Caller;
use crate::parents;
use bytes::Bytes;
use cluster::BlockNo;
use sld::{After, Disk, Mode, ObjectId, WriteId};

/// What a rename does with a name that is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RenameFlags {
    /// It is replaced.
    #[default]
    Replace,
    /// The rename fails.
    NoReplace,
    /// The two change places. Only possible (atomically) for two names in one entry block; else `Invalid`.
    Exchange,
}

/// The most directories above another: more means a cycle.
const DEPTH_MAX: usize = 1 << 16;

/// The token that moving directories takes.
const MOVING: ObjectId = ObjectId::Rename(0);

impl<D: Disk> FileSystem<D> {
    /// Moves a name, atomically even across crashes: at every moment the inode has the old name or the new one, and a name
    /// that is replaced always leads somewhere.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `IsDirectory`, `NotDirectory`, `NotEmpty`, `Invalid` (a directory below itself; an exchange that
    /// cannot be atomic), `TooManyLinks`, `NameTooLong`, `NoSpace`, `Stale`, those of the disk.
    pub async fn rename(
        &self,
        _caller: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        check_name(name)?;
        check_name(new_name)?;
        if [name, new_name].iter().any(|n| *n == b"." || *n == b"..") {
            return Err(FsError::Busy);
        }
        let mut locks = Locks::new([(parent.object(), Mode::Exclusive), (new_parent.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            work.load_dir(parent).await?;
            work.load_dir(new_parent).await?;
            let old = work.resolve(parent, name, Mode::Exclusive).await?;
            let new = work.resolve(new_parent, new_name, Mode::Exclusive).await?;
            let (Some(old), Some(new)) = (old, new) else {
                locks.need(work.needs);
                continue;
            };
            let moved = old.winner().ok_or(FsError::NotFound)?.clone();
            let displaced = new.winner().cloned();
            if flags == RenameFlags::NoReplace && displaced.is_some() {
                return Err(FsError::Exists);
            }
            if flags == RenameFlags::Exchange && displaced.is_none() {
                return Err(FsError::NotFound);
            }
            if displaced.as_ref().is_some_and(|d| d.ino == moved.ino) {
                return Ok(()); // Rule 6: two names of one inode.
            }
            let moves_directory = work.inode(moved.ino)?.is_directory();
            if moves_directory && parent != new_parent && !self.may_move(&mut work, &mut locks, moved.ino, new_parent).await? {
                continue;
            }
            if flags == RenameFlags::Exchange {
                drop(work.exchange(&old, &new).await?);
                return Ok(());
            }
            let mut replaces_directory = false;
            if let Some(target) = &displaced {
                replaces_directory = work.inode(target.ino)?.is_directory();
                match (moves_directory, replaces_directory) {
                    (true, false) => return Err(FsError::NotDirectory),
                    (false, true) => return Err(FsError::IsDirectory),
                    (true, true) => match work.is_empty(target.ino).await? {
                        None => {
                            locks.need(work.needs);
                            continue;
                        }
                        Some(false) => return Err(FsError::NotEmpty),
                        Some(true) => {}
                    },
                    (false, false) => {}
                }
            }
            let (orphans, blocks) = work.rename(&old, &new, moves_directory, replaces_directory).await?;
            let held = work.commit()?;
            for block in blocks {
                self.remember_name(moved.ino, block);
            }
            drop(held);
            if self.lingers_too_much() {
                self.let_go(false).await;
            }
            return self.reclaim_all(orphans).await;
        }
    }

    /// Whether a directory may go into another: not below itself. False if tokens are missing (they are noted then).
    ///
    /// The right to move directories is held, so the directories above `into` stay where they are.
    async fn may_move(&self, work: &mut Work<'_, D>, locks: &mut Locks, moved: Ino, into: Ino) -> Result<bool> {
        let mut complete = work.want(MOVING, Mode::Exclusive);
        let mut at = into;
        for _ in 0..DEPTH_MAX {
            if at == moved && !complete {
                locks.need(std::mem::take(&mut work.needs));
                return Ok(false);
            }
            if at == moved {
                return Err(FsError::Invalid("a directory cannot be moved below itself"));
            }
            if at == self.root() {
                if !complete {
                    locks.need(std::mem::take(&mut work.needs));
                }
                return Ok(complete);
            }
            let up = if work.want(at.object(), Mode::Shared) {
                work.load(at).await?.parents.first().copied()
            } else {
                // Not held yet: a hint as to what will be needed, which the next attempt verifies.
                complete = false;
                self.peek_parent(at).await
            };
            match up {
                Some(parent) => at = Ino(parent.dir),
                None if complete => return Err(FsError::NotFound),
                None => {
                    locks.need(std::mem::take(&mut work.needs));
                    return Ok(false);
                }
            }
        }
        Err(FsError::corrupt(into.block(), "the directories above it form a cycle"))
    }

    /// The parent of a directory as far as it can be seen without waiting.
    async fn peek_parent(&self, ino: Ino) -> Option<Parent> {
        let _tokens = self.disk().try_acquire(&[(ino.object(), Mode::Shared)])?;
        let bytes = self.disk().try_read(ino.object(), ino.block())?;
        crate::inode::Inode::decode(&bytes, ino).ok()?.parents.first().copied()
    }
}

/// Two buckets that may be one and the same.
struct Buckets {
    old: Bucket,
    /// `None`: the same bucket as `old`.
    new: Option<Bucket>,
}

impl Buckets {
    fn of(old: &Resolved, new: &Resolved) -> Buckets {
        let same = old.dir == new.dir && old.hash == new.hash;
        let mut buckets = Buckets { old: old.bucket.clone(), new: (!same).then(|| new.bucket.clone()) };
        old.settle(&mut buckets.old);
        new.settle(buckets.target());
        buckets
    }

    fn target(&mut self) -> &mut Bucket {
        self.new.as_mut().unwrap_or(&mut self.old)
    }
}

impl<D: Disk> Work<'_, D> {
    async fn put_both(
        &mut self,
        old: &Resolved,
        new: &Resolved,
        buckets: &Buckets,
        counters: (u64, u64),
        after: &[After],
    ) -> Result<(WriteId, WriteId)> {
        let first = match &buckets.new {
            None => counters.0.max(counters.1),
            Some(_) => counters.0,
        };
        let old_write = self.put(old.dir, old.hash, &buckets.old, first, after).await?;
        let new_write = match &buckets.new {
            Some(bucket) => self.put(new.dir, new.hash, bucket, counters.1, after).await?,
            None => old_write,
        };
        Ok((old_write, new_write))
    }

    /// Builds a rename. Returns large orphans to be reclaimed, and the entry blocks of the new name.
    async fn rename(
        &mut self,
        old: &Resolved,
        new: &Resolved,
        moves_directory: bool,
        replaces_directory: bool,
    ) -> Result<(Vec<Ino>, Vec<BlockNo>)> {
        let moved = old.winner().ok_or(FsError::NotFound)?.clone();
        let now = self.fs.now();
        let seq = new.counter + 1;
        let gains_subdir = moves_directory && old.dir != new.dir;
        // Rule 6: the old entry is flagged, and the new one written flagged: one write if it is one block. Rule 7: losers go.
        // What is judged invalid goes after what it was judged by (rules 8a, 10).
        let mut after = self.before_entry(new.dir, now, gains_subdir)?;
        self.before_entry(old.dir, now, false)?;
        after.extend(old.judged().chain(new.judged()).chain(self.name_of_dir(new.dir)));
        let mut buckets = Buckets::of(old, new);
        buckets.old.flag(&old.name, moved.seq, true);
        buckets.target().add(Entry { seq, flagged: true, slot: 0, name: Bytes::copy_from_slice(&new.name), ..moved.clone() })?;
        let (flagged, tentative) = self.put_both(old, new, &buckets, (old.counter, seq), &after).await?;

        // The commit: the inode swaps its record, in one block. Rule 9: after the entry blocks of its names. Rule 11: after
        // the displaced inodes.
        let inode = self.inodes.get_mut(&moved.ino).ok_or(FsError::Stale)?;
        let mut change = parents::remove(&mut self.tx, inode, moved.record(old.dir, old.hash)).await?.unwrap_or_default();
        let added = parents::add(&mut self.tx, inode, Parent { dir: new.dir.0, hash: new.hash, seq }).await?;
        inode.ctime = later(now, inode.ctime);
        change.after.extend(added.after);
        change.free.extend(added.free);
        let mut after = change.after;
        after.extend([After::Write(flagged), After::Write(tentative)]);
        after.extend(self.fs.name_blocks(moved.ino).into_iter().map(After::Block));
        after.extend(new.judged());
        after.retain(|edge| *edge != After::Block(moved.ino.block()));
        let commit = inode.write(&mut self.tx, &after);
        for block in change.free {
            self.tx.free(moved.ino.object(), block, &[After::Write(commit)]);
        }

        // Rules 6 and 8: the old entry goes; the displaced one goes and the new one loses its flag, in one write.
        let in_place = self.tx.block_of(tentative);
        buckets.old.remove(&old.name, &[moved.seq]);
        let displaced: Vec<u64> = new.valid.iter().map(|entry| entry.seq).collect();
        buckets.target().remove(&new.name, &displaced);
        buckets.target().flag(&new.name, seq, false);
        let (old_gone, cleaned) = self.put_both(old, new, &buckets, (old.counter, seq), &[After::Write(commit)]).await?;
        self.after_entry(old.dir, now, u32::from(gains_subdir), old_gone)?;
        self.after_entry(new.dir, now, u32::from(replaces_directory), cleaned)?;

        // Then the displaced inode loses its record; so do the inodes of valid candidates that had lost before.
        let mut orphans = Vec::new();
        for (resolved, entries, gone) in [(new, &new.valid[..], cleaned), (old, old.valid.get(1..).unwrap_or(&[]), old_gone)] {
            for entry in entries {
                if entry.kind == FileKind::File {
                    self.fs.linger(entry.ino);
                }
                let record = entry.record(resolved.dir, resolved.hash);
                orphans.extend(self.drop_record(entry.ino, record, now, gone).await?);
            }
        }
        Ok((orphans, vec![in_place, self.tx.block_of(cleaned)]))
    }

    /// Builds and commits an exchange: possible if both entries are in one block, whose write is the commit then.
    async fn exchange(mut self, old: &Resolved, new: &Resolved) -> Result<super::Held<D>> {
        if old.dir != new.dir || old.leaf.block != new.leaf.block {
            tracing::info!(
                old = %old.dir, new = %new.dir,
                "an exchange of names in different entry blocks was refused: it could not be made atomic"
            );
            return Err(FsError::Invalid("only names in one entry block can be exchanged atomically"));
        }
        let dir = old.dir;
        let now = self.fs.now();
        let (a, b) = match (old.winner(), new.winner()) {
            (Some(a), Some(b)) => (a.clone(), b.clone()),
            _ => return Err(FsError::NotFound),
        };
        // 1. The block, losers dropped (rule 7), with the counter beyond the two new numbers: no number is used twice (rule 1).
        let (a_seq, b_seq) = (old.counter.max(new.counter) + 1, old.counter.max(new.counter) + 2);
        self.before_entry(dir, now, false)?;
        let mut buckets = Buckets::of(old, new);
        let judged: Vec<After> = old.judged().chain(new.judged()).collect();
        let (settled_a, settled_b) = self.put_both(old, new, &buckets, (b_seq, b_seq), &judged).await?;
        // 2. Both inodes gain records that no entry has yet.
        let mut prepared = Vec::new();
        let gains = [
            (a.ino, Parent { dir: dir.0, hash: new.hash, seq: b_seq }),
            (b.ino, Parent { dir: dir.0, hash: old.hash, seq: a_seq }),
        ];
        for (ino, record) in gains {
            let inode = self.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
            let change = parents::add(&mut self.tx, inode, record).await?;
            inode.ctime = later(now, inode.ctime);
            let mut after = change.after;
            after.extend([After::Write(settled_a), After::Write(settled_b)]);
            after.extend(self.fs.name_blocks(ino).into_iter().map(After::Block));
            let write = inode.write(&mut self.tx, &after);
            for block in change.free {
                self.tx.free(ino.object(), block, &[After::Write(write)]);
            }
            prepared.push(After::Write(write));
        }
        // 3. The commit: one write of the block.
        buckets.old.remove(&old.name, &[a.seq]);
        buckets.old.add(Entry { seq: a_seq, flagged: false, name: Bytes::copy_from_slice(&old.name), ..b.clone() })?;
        buckets.target().remove(&new.name, &[b.seq]);
        buckets.target().add(Entry { seq: b_seq, flagged: false, name: Bytes::copy_from_slice(&new.name), ..a.clone() })?;
        let (commit_a, commit_b) = self.put_both(old, new, &buckets, (b_seq, b_seq), &prepared).await?;
        if commit_a != commit_b {
            return Err(FsError::Invalid("only names in one entry block can be exchanged atomically"));
        }
        let block = self.tx.block_of(commit_a);
        self.after_entry(dir, now, 0, commit_a)?;
        // 4. The inodes lose the old records.
        for (resolved, entry) in [(old, &a), (new, &b)] {
            self.drop_record(entry.ino, entry.record(dir, resolved.hash), now, commit_a).await?;
        }
        for (resolved, gone) in [(old, settled_a), (new, settled_b)] {
            for entry in resolved.valid.iter().skip(1) {
                self.drop_record(entry.ino, entry.record(dir, resolved.hash), now, gone).await?;
            }
        }
        let fs = self.fs;
        let held = self.commit()?;
        fs.remember_name(a.ino, block);
        fs.remember_name(b.ino, block);
        Ok(held)
    }
}
