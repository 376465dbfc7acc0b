//! Moving names: the crash-atomic rename, exchange and whiteout.
//!
//! One inode's block is the commit point of all three. When the old name is to lead to something else afterwards (the other
//! one of an exchange, a whiteout), that *stand-in* first gets a record for the old name that loses against the moved inode's,
//! which takes a higher number for this. It shows as soon as the moved inode swaps its record, in the same instant as the new
//! name.

use super::data::later;
use super::work::Resolved;
use super::{FileSystem, Locks, Work, xattr};
use crate::directory::{Bucket, Entry, check_name};
use crate::error::{FsError, Result};
use crate::format::Time;
use crate::inode::{FileKind, Ino, Inode, Parent};
use crate::ops::Caller;
use crate::parents;
use bytes::Bytes;
use cluster::BlockNo;
use nix::libc;
use sld::{After, Disk, Mode, ObjectId, WriteId};

/// What a rename does with a name that is there, and with the old one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RenameFlags {
    /// It is replaced.
    #[default]
    Replace,
    /// The rename fails.
    NoReplace,
    /// The two change places.
    Exchange,
    /// It is replaced, and a whiteout (a character device 0/0) takes the old name.
    Whiteout,
    /// The rename fails; else a whiteout takes the old name.
    WhiteoutNoReplace,
}

impl RenameFlags {
    fn replaces(self) -> bool {
        matches!(self, RenameFlags::Replace | RenameFlags::Whiteout)
    }

    fn leaves_whiteout(self) -> bool {
        matches!(self, RenameFlags::Whiteout | RenameFlags::WhiteoutNoReplace)
    }
}

/// The most directories above another: more means a cycle.
const DEPTH_MAX: usize = 1 << 16;

/// The token that moving directories takes.
const MOVING: ObjectId = ObjectId::Rename(0);

impl<D: Disk> FileSystem<D> {
    /// Moves a name, atomically even across crashes: at every moment the inode has the old name or the new one, and a name
    /// that is replaced always leads somewhere. An exchange happens to both names at once.
    ///
    /// # Errors
    /// `NotFound`, `Exists`, `IsDirectory`, `NotDirectory`, `NotEmpty`, `Invalid` (a directory below itself), `TooManyLinks`,
    /// `NameTooLong`, `NoSpace`, `Stale`, those of the disk.
    pub async fn rename(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        self.rename_told(caller, parent, name, new_parent, new_name, flags).await.map(drop)
    }

    /// Renames. Returns what is to be had by the new name now, and of an exchange by the old one; nothing, if both were one inode.
    ///
    /// # Errors
    /// Those of `rename`.
    pub(crate) async fn rename_told(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<Option<(Ino, Option<Ino>)>> {
        check_name(name)?;
        check_name(new_name)?;
        if [name, new_name].iter().any(|n| *n == b"." || *n == b"..") {
            return Err(FsError::Busy);
        }
        let (orphans, moved) = self.again(|| self.try_rename(caller, parent, name, new_parent, new_name, flags)).await?;
        if self.lingers_too_much() {
            self.let_go(false).await;
        }
        self.free_later(orphans).await;
        Ok(moved)
    }

    /// Renames. Returns what is to be freed then, and what was moved.
    async fn try_rename(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<(Vec<Ino>, Option<(Ino, Option<Ino>)>)> {
        let mut locks = Locks::new([(parent.object(), Mode::Exclusive), (new_parent.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            work.load_dir(parent).await?;
            work.load_dir(new_parent).await?;
            let old = work.resolve(parent, name, Mode::Exclusive).await?;
            let new = work.resolve_damaged(new_parent, new_name, Mode::Exclusive).await?;
            let (Some(old), Some(new)) = (old, new) else {
                locks.need(work.needs);
                continue;
            };
            let moved = old.winner().ok_or(FsError::NotFound)?.clone();
            let displaced = new.winner().cloned();
            let exchange = flags == RenameFlags::Exchange;
            if (displaced.is_some() || new.damage.is_some()) && !exchange && !flags.replaces() {
                return Err(FsError::Exists);
            }
            // What is damaged can be replaced, but not moved.
            if let Some(error) = new.damage.clone().filter(|_| exchange) {
                return Err(error);
            }
            if displaced.is_none() && exchange {
                return Err(FsError::NotFound);
            }
            if displaced.as_ref().is_some_and(|d| d.ino == moved.ino) {
                return Ok((Vec::new(), None)); // Rule 6: two names of one inode.
            }
            let moves_directory = work.inode(moved.ino)?.is_directory();
            if moves_directory && new.damage.is_some() {
                return Err(FsError::NotDirectory);
            }
            if moves_directory && parent != new_parent && !self.may_move(&mut work, &mut locks, moved.ino, new_parent).await? {
                continue;
            }
            let mut displaces_directory = false;
            if let Some(target) = &displaced {
                displaces_directory = work.inode(target.ino)?.is_directory();
                if let Some(error) = new.damage.clone().filter(|_| displaces_directory) {
                    return Err(error);
                }
                match (moves_directory, displaces_directory) {
                    (_, true) if exchange => {
                        if parent != new_parent && !self.may_move(&mut work, &mut locks, target.ino, parent).await? {
                            continue;
                        }
                    }
                    _ if exchange => {}
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
            // An exchange has two directions. A directory is better moved than let stand in: it never has two records then.
            let swapped = exchange && displaces_directory && !moves_directory;
            let (old, new) = if swapped { (new, old) } else { (old, new) };
            let mut adopted = None;
            let stand_in = match (&new.winner(), exchange) {
                (Some(other), true) => StandIn::Other((*other).clone()),
                _ if flags.leaves_whiteout() => {
                    let (inode, after) = self.whiteout(&mut work, caller, old.dir).await?;
                    adopted = Some(self.disk().adopt(inode.ino.object()));
                    StandIn::Whiteout(Box::new(inode), after)
                }
                _ => StandIn::Nobody,
            };
            let done = work.rename(&old, &new, stand_in).await?;
            let held = work.commit()?;
            for (ino, block) in done.names {
                self.remember_name(ino, block);
            }
            drop((held, adopted));
            new.tell_damage();
            let back = displaced.filter(|_| exchange).map(|displaced| displaced.ino);
            return Ok((done.orphans, Some((moved.ino, back))));
        }
    }

    /// A new whiteout, in memory, with what its write goes after; its block is allocated. As on ext4 (not XFS) it inherits the
    /// directory's default list, like everything else that is made there.
    async fn whiteout(&self, work: &mut Work<'_, D>, caller: &Caller, parent: Ino) -> Result<(Inode, Vec<After>)> {
        let ino = Ino(work.tx.alloc(Some(parent.block()), 1).await?.start.pack());
        let dir = work.inode(parent)?;
        let gid = if dir.mode & libc::S_ISGID != 0 { dir.gid } else { caller.gid };
        let mode = FileKind::CharDevice.mode_bits();
        let mut inode = Inode::new(ino, self.next_generation(), mode, caller.uid, gid, self.now());
        let dir = work.inodes.get(&parent).ok_or(FsError::Stale)?;
        let inherited = xattr::inherit(&mut work.tx, dir, &mut inode, caller.umask).await?;
        Ok((inode, inherited.after))
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
                work.load(at).await?;
                let up = work.above(at).await?;
                complete &= up.is_some();
                up
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
        counter: u64,
        after: &[After],
    ) -> Result<(WriteId, WriteId)> {
        let old_write = self.put(old.dir, old.hash, &buckets.old, counter, after).await?;
        let new_write = match &buckets.new {
            Some(bucket) => self.put(new.dir, new.hash, bucket, counter, after).await?,
            None => old_write,
        };
        Ok((old_write, new_write))
    }

    /// An inode changes one record for another, in one write of its block, after `after`. A directory has no other record
    /// then: an exchange that a crash ended may have left it a second one.
    async fn swap_record(&mut self, ino: Ino, from: Parent, to: Parent, now: Time, after: &[After]) -> Result<WriteId> {
        let inode = self.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
        let mut change = parents::Change::default();
        if inode.is_directory() {
            inode.keep_records(&[]);
        } else {
            change = parents::remove(&mut self.tx, inode, from).await?.unwrap_or_default();
        }
        let added = parents::add(&mut self.tx, inode, to).await?;
        inode.ctime = later(now, inode.ctime);
        let mut edges: Vec<After> = after.iter().copied().chain(change.after).chain(added.after).collect();
        edges.retain(|edge| *edge != After::Block(ino.block()));
        let write = inode.write(&mut self.tx, &edges);
        for block in change.free.into_iter().chain(added.free) {
            self.tx.free(ino.object(), block, &[After::Write(write)]);
        }
        Ok(write)
    }

    /// Builds a rename.
    async fn rename(&mut self, old: &Resolved, new: &Resolved, stand_in: StandIn) -> Result<Renamed> {
        let moved = old.winner().ok_or(FsError::NotFound)?.clone();
        let now = self.fs.now();
        let across = old.dir != new.dir;
        let moves_directory = self.inode(moved.ino)?.is_directory();
        let exchange = matches!(stand_in, StandIn::Other(_));
        let displaces_directory = match new.winner() {
            Some(entry) => self.inode(entry.ino)?.is_directory(),
            None => false,
        };
        // Numbers: of the stand-in's entry, below that of the moved inode's second one for the old name; of the new name's.
        let last = old.counter.max(new.counter);
        let (hidden, second, seq) = (last + 1, last + 2, last + 3);
        let new_record = Parent { dir: new.dir.0, hash: new.hash, seq };
        let hidden_record = Parent { dir: old.dir.0, hash: old.hash, seq: hidden };

        // Rule 6: the old entry is flagged, and the new one written flagged: one write if it is one block. Rule 7: losers go.
        // What is judged invalid goes after what it was judged by (rules 8a, 10).
        let mut after = self.before_entry(new.dir, now, moves_directory && across)?;
        after.extend(self.before_entry(old.dir, now, exchange && displaces_directory && across)?);
        after.extend(old.judged().chain(new.judged()).chain(self.name_of_dir(new.dir)));
        let mut buckets = Buckets::of(old, new);
        buckets.old.flag(&old.name, moved.seq, true);
        if let Some(entry) = stand_in.entry() {
            after.extend(self.name_of_dir(old.dir));
            let name = Bytes::copy_from_slice(&old.name);
            buckets.old.add(Entry { seq: hidden, flagged: true, slot: 0, name: name.clone(), ..entry })?;
            buckets.old.add(Entry { seq: second, flagged: true, slot: 0, name, ..moved.clone() })?;
        }
        buckets.target().add(Entry { seq, flagged: true, slot: 0, name: Bytes::copy_from_slice(&new.name), ..moved.clone() })?;
        let (flagged, tentative) = self.put_both(old, new, &buckets, seq, &after).await?;
        let mut names = vec![(moved.ino, self.tx.block_of(tentative))];

        // The stand-in's record for the old name, after the moved inode's second one, against which it loses.
        // Rule 9: a commit goes after the entry blocks of the inode's names. Rule 11: after the displaced inodes.
        let mut after = vec![After::Write(flagged), After::Write(tentative)];
        after.extend(self.fs.name_blocks(moved.ino).into_iter().map(After::Block));
        after.extend(new.judged());
        let mut from = moved.record(old.dir, old.hash);
        let stands_in = stand_in.ino();
        if let Some(ino) = stands_in {
            let to = Parent { seq: second, ..from };
            let renumbered = self.swap_record(moved.ino, from, to, now, &after).await?;
            from = to;
            let shown = new.winner().map(|entry| entry.record(new.dir, new.hash));
            let write = self.add_hidden(stand_in, shown, hidden_record, now, renumbered).await?;
            after.push(After::Write(write));
            names.push((ino, self.tx.block_of(flagged)));
        }
        // The commit: the moved inode swaps its record, in one block.
        let commit = self.swap_record(moved.ino, from, new_record, now, &after).await?;

        // Rules 6 and 8: the old entry goes; the displaced one goes and the new one loses its flag, in one write.
        buckets.old.remove(&old.name, &[moved.seq, second]);
        buckets.old.flag(&old.name, hidden, false);
        let displaced: Vec<u64> = new.valid.iter().chain(&new.damaged).map(|entry| entry.seq).collect();
        buckets.target().remove(&new.name, &displaced);
        buckets.target().flag(&new.name, seq, false);
        let (old_clean, new_clean) = self.put_both(old, new, &buckets, seq, &[After::Write(commit)]).await?;
        self.after_entry(old.dir, now, u32::from(moves_directory && across), old_clean)?;
        self.after_entry(new.dir, now, u32::from(displaces_directory && (across || !exchange)), new_clean)?;
        names.push((moved.ino, self.tx.block_of(new_clean)));
        names.extend(stands_in.map(|ino| (ino, self.tx.block_of(old_clean))));

        // Then the displaced inode loses its record; so do the inodes of valid candidates that had lost before.
        let mut orphans = Vec::new();
        if let Some(entry) = new.winner() {
            let record = entry.record(new.dir, new.hash);
            self.inode(entry.ino)?.keep_records_of_directory(&[record, hidden_record]);
            if entry.kind == FileKind::File && !exchange {
                self.fs.linger(entry.ino);
            }
            orphans.extend(self.drop_record(entry.ino, record, now, new_clean).await?);
        }
        for (resolved, gone) in [(new, new_clean), (old, old_clean)] {
            for entry in resolved.valid.iter().skip(1) {
                if entry.kind == FileKind::File {
                    self.fs.linger(entry.ino);
                }
                let record = entry.record(resolved.dir, resolved.hash);
                orphans.extend(self.drop_record(entry.ino, record, now, gone).await?);
            }
        }
        Ok(Renamed { orphans, names })
    }

    /// Gives the stand-in its record for the old name, after `renumbered`. `shown`: its record for the new name.
    async fn add_hidden(
        &mut self,
        stand_in: StandIn,
        shown: Option<Parent>,
        hidden: Parent,
        now: Time,
        renumbered: WriteId,
    ) -> Result<WriteId> {
        let mut after = vec![After::Write(renumbered)];
        match stand_in {
            StandIn::Whiteout(mut inode, inherited) => {
                inode.parents.push(hidden);
                inode.links = 1;
                after.extend(inherited);
                Ok(inode.write(&mut self.tx, &after))
            }
            StandIn::Other(entry) => {
                let inode = self.inodes.get_mut(&entry.ino).ok_or(FsError::Stale)?;
                inode.keep_records_of_directory(&shown.into_iter().collect::<Vec<_>>());
                let change = parents::add(&mut self.tx, inode, hidden).await?;
                inode.ctime = later(now, inode.ctime);
                after.extend(change.after);
                after.extend(self.fs.name_blocks(entry.ino).into_iter().map(After::Block));
                let write = inode.write(&mut self.tx, &after);
                for block in change.free {
                    self.tx.free(entry.ino.object(), block, &[After::Write(write)]);
                }
                Ok(write)
            }
            StandIn::Nobody => Ok(renumbered),
        }
    }
}

/// Who takes the old name when the moved inode leaves it.
enum StandIn {
    Nobody,
    /// The inode that has the new name, by its entry there.
    Other(Entry),
    /// A new inode, whose write goes after these.
    Whiteout(Box<Inode>, Vec<After>),
}

impl StandIn {
    fn ino(&self) -> Option<Ino> {
        self.entry().map(|entry| entry.ino)
    }

    /// An entry that leads to it; name, slot and number are still to be set.
    fn entry(&self) -> Option<Entry> {
        match self {
            StandIn::Nobody => None,
            StandIn::Other(entry) => Some(entry.clone()),
            StandIn::Whiteout(inode, _) => Some(Entry {
                ino: inode.ino,
                generation: inode.generation,
                seq: 0,
                kind: inode.kind(),
                flagged: true,
                slot: 0,
                name: Bytes::new(),
            }),
        }
    }
}

/// What a rename leaves to be done after its commit.
struct Renamed {
    /// Large orphans to be reclaimed.
    orphans: Vec<Ino>,
    /// Entry blocks of new names.
    names: Vec<(Ino, BlockNo)>,
}
