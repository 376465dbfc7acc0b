//! What an operation holds and has read: tokens, inodes, its transaction; and the judging of names.

use super::data::later;
use super::{FileSystem, load};
use crate::directory::{self, Bucket, Entry};
use crate::error::{FsError, Result};
use crate::format::Time;
use crate::inode::{FileKind, Ino, Inode, Parent};
use crate::parents;
use crate::transaction::Transaction;
use sld::{After, Disk, Mode, ObjectId, Want, WriteId};
use std::collections::BTreeMap;

/// After so many attempts an operation lets others run before it tries again.
const ATTEMPTS_BEFORE_YIELD: u32 = 4;
/// After so many attempts it starts again with what it needs at least.
const ATTEMPTS_BEFORE_RESET: u32 = 16;
/// After so many attempts it gives up.
const ATTEMPTS_MAX: u32 = 10_000;

/// The tokens that an operation asks for: known ones, and those that a look has shown to be needed.
pub(crate) struct Locks {
    base: Vec<Want>,
    extra: BTreeMap<ObjectId, Mode>,
    attempts: u32,
}

impl Locks {
    pub(crate) fn new(base: impl Into<Vec<Want>>) -> Self {
        Locks { base: base.into(), extra: BTreeMap::new(), attempts: 0 }
    }

    pub(crate) fn need(&mut self, wants: impl IntoIterator<Item = Want>) {
        if self.attempts.is_multiple_of(ATTEMPTS_BEFORE_RESET) {
            self.extra.clear();
        }
        for (object, mode) in wants {
            let entry = self.extra.entry(object).or_insert(mode);
            if mode == Mode::Exclusive {
                *entry = mode;
            }
        }
    }

    fn wants(&self) -> Vec<Want> {
        self.base.iter().copied().chain(self.extra.iter().map(|(o, m)| (*o, *m))).collect()
    }
}

/// Tokens that are held.
pub(crate) struct Held<D: Disk> {
    tokens: Vec<D::Tokens>,
    modes: BTreeMap<ObjectId, Mode>,
}

impl<D: Disk> Held<D> {
    pub(crate) fn covers(&self, want: Want) -> bool {
        match self.modes.get(&want.0) {
            Some(Mode::Exclusive) => true,
            Some(Mode::Shared) => want.1 == Mode::Shared,
            None => false,
        }
    }
}

/// A name with its candidates judged.
pub(crate) struct Resolved {
    pub(crate) dir: Ino,
    pub(crate) name: Vec<u8>,
    pub(crate) hash: u64,
    pub(crate) bucket: Bucket,
    /// Highest sequence number given out so far.
    pub(crate) counter: u64,
    /// Highest first: the first one is what the name means.
    pub(crate) valid: Vec<Entry>,
    pub(crate) invalid: Vec<Entry>,
    /// Candidates that cannot be judged, since their inodes are damaged. Never directories.
    pub(crate) damaged: Vec<Entry>,
    /// What is wrong with them.
    pub(crate) damage: Option<FsError>,
}

/// Candidates of a name, judged.
#[derive(Default)]
struct Judged {
    /// Highest sequence number first.
    valid: Vec<Entry>,
    invalid: Vec<Entry>,
    damaged: Vec<Entry>,
    damage: Option<FsError>,
}

impl Resolved {
    pub(crate) fn winner(&self) -> Option<&Entry> {
        self.valid.first()
    }

    /// The inodes that the candidates were judged by (rules 8a and 10: what is done about them goes after them).
    pub(crate) fn judged(&self) -> impl Iterator<Item = After> {
        self.valid.iter().chain(&self.invalid).map(|entry| After::Block(entry.ino.block()))
    }

    /// The name is gone, and with it damaged candidates: what these own is not known, and so not freed.
    pub(crate) fn tell_damage(&self) {
        for entry in &self.damaged {
            tracing::error!(ino = %entry.ino, "the name of a damaged inode is removed; its blocks are not freed: run fsck");
        }
    }

    /// Rule 7: drops the losing candidates from the bucket.
    pub(crate) fn settle(&self, bucket: &mut Bucket) {
        let losers = self.invalid.iter().chain(self.valid.iter().skip(1));
        bucket.remove(&self.name, &losers.map(|entry| entry.seq).collect::<Vec<_>>());
    }
}

/// An operation under way.
pub(crate) struct Work<'a, D: Disk> {
    pub(crate) fs: &'a FileSystem<D>,
    pub(crate) held: Held<D>,
    pub(crate) tx: Transaction<'a, D>,
    pub(crate) inodes: BTreeMap<Ino, Inode>,
    /// Tokens that were found to be missing.
    pub(crate) needs: Vec<Want>,
}

impl<D: Disk> FileSystem<D> {
    /// Takes the tokens for the next attempt of a change.
    pub(crate) async fn begin(&self, locks: &mut Locks) -> Result<Work<'_, D>> {
        self.disk.admit().await?;
        self.begin_read(locks).await
    }

    /// Takes the tokens for the next attempt.
    pub(crate) async fn begin_read(&self, locks: &mut Locks) -> Result<Work<'_, D>> {
        locks.attempts += 1;
        if locks.attempts > ATTEMPTS_MAX {
            return Err(FsError::Again);
        }
        if locks.attempts > ATTEMPTS_BEFORE_YIELD {
            tokio::task::yield_now().await;
        }
        let wants = locks.wants();
        let tokens = self.tokens(&wants).await?;
        let mut modes = BTreeMap::new();
        for (object, mode) in wants {
            let entry = modes.entry(object).or_insert(mode);
            if mode == Mode::Exclusive {
                *entry = mode;
            }
        }
        let held = Held { tokens: vec![tokens], modes };
        Ok(Work { fs: self, held, tx: self.transaction(), inodes: BTreeMap::new(), needs: Vec::new() })
    }
}

impl<'a, D: Disk> Work<'a, D> {
    /// Takes another token if that needs no waiting (and so cannot deadlock); else notes it as needed.
    pub(crate) fn want(&mut self, object: ObjectId, mode: Mode) -> bool {
        if self.held.covers((object, mode)) {
            return true;
        }
        if let Some(tokens) = self.fs.disk.try_acquire(&[(object, mode)]) {
            self.held.tokens.push(tokens);
            self.held.modes.insert(object, mode);
            return true;
        }
        self.needs.push((object, mode));
        false
    }

    /// Reads an inode, whose token is held, into the work.
    pub(crate) async fn load(&mut self, ino: Ino) -> Result<&mut Inode> {
        if !self.inodes.contains_key(&ino) {
            let inode = load(self.tx.source(), ino).await?;
            self.inodes.insert(ino, inode);
        }
        self.inodes.get_mut(&ino).ok_or(FsError::Stale)
    }

    /// An inode that was loaded.
    pub(crate) fn inode(&mut self, ino: Ino) -> Result<&mut Inode> {
        self.inodes.get_mut(&ino).ok_or(FsError::Stale)
    }

    /// Reads a directory in which names are looked for.
    pub(crate) async fn load_dir(&mut self, ino: Ino) -> Result<&mut Inode> {
        let dir = self.load(ino).await?;
        if !dir.is_directory() {
            return Err(FsError::NotDirectory);
        }
        if dir.is_orphan() {
            return Err(FsError::NotFound);
        }
        Ok(dir)
    }

    /// Judges candidates: which are valid (highest seq first), which are not. `None` if tokens are missing.
    pub(crate) async fn judge(
        &mut self,
        dir: Ino,
        hash: u64,
        candidates: &[Entry],
        mode: Mode,
    ) -> Result<Option<(Vec<Entry>, Vec<Entry>)>> {
        let Some(judged) = self.judge_all(dir, hash, candidates, mode).await? else { return Ok(None) };
        match judged.damage {
            Some(error) => Err(error),
            None => Ok(Some((judged.valid, judged.invalid))),
        }
    }

    /// Judges candidates, those with damaged inodes apart (unless they are directories: what is in one must not get lost).
    async fn judge_all(&mut self, dir: Ino, hash: u64, candidates: &[Entry], mode: Mode) -> Result<Option<Judged>> {
        let mut complete = true;
        for entry in candidates {
            complete &= self.want(entry.ino.object(), mode);
        }
        if !complete {
            return Ok(None);
        }
        let mut judged = Judged::default();
        for entry in candidates {
            match self.is_alive(dir, hash, entry).await {
                Ok(true) => judged.valid.push(entry.clone()),
                Ok(false) => judged.invalid.push(entry.clone()),
                Err(error) if error.is_damage() && entry.kind != FileKind::Directory => {
                    judged.damaged.push(entry.clone());
                    judged.damage.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        judged.valid.sort_by_key(|entry| std::cmp::Reverse(entry.seq));
        Ok(Some(judged))
    }

    /// Whether an entry's inode, whose token is held, has the record that goes with it.
    async fn is_alive(&mut self, dir: Ino, hash: u64, entry: &Entry) -> Result<bool> {
        match self.load(entry.ino).await {
            Ok(_) => {}
            Err(FsError::Stale) => return Ok(false),
            Err(error) => return Err(error),
        }
        match self.inodes.get(&entry.ino) {
            Some(inode) if inode.generation == entry.generation => {
                parents::contains(self.tx.source(), inode, entry.record(dir, hash)).await
            }
            _ => Ok(false),
        }
    }

    /// Finds a name in a loaded directory and judges its candidates (rule 2). `None` if tokens are missing.
    pub(crate) async fn resolve(&mut self, dir: Ino, name: &[u8], mode: Mode) -> Result<Option<Resolved>> {
        match self.resolve_damaged(dir, name, mode).await? {
            Some(Resolved { damage: Some(error), .. }) => Err(error),
            resolved => Ok(resolved),
        }
    }

    /// As `resolve`, for a name that is to go, whatever it leads to: damaged candidates are no error.
    pub(crate) async fn resolve_damaged(&mut self, dir: Ino, name: &[u8], mode: Mode) -> Result<Option<Resolved>> {
        let hash = self.fs.hash.of(name);
        let inode = self.inodes.get(&dir).ok_or(FsError::Stale)?;
        let (bucket, leaf) = directory::bucket(self.tx.source(), inode, hash).await?;
        let counter = directory::counter(inode, &leaf)?;
        let candidates: Vec<Entry> = bucket.of(name).cloned().collect();
        let Some(judged) = self.judge_all(dir, hash, &candidates, mode).await? else {
            return Ok(None);
        };
        let Judged { valid, invalid, damaged, damage } = judged;
        Ok(Some(Resolved { dir, name: name.to_vec(), hash, bucket, counter, valid, invalid, damaged, damage }))
    }

    /// The parent record that makes a loaded directory's name; `None` if tokens are missing. There is one record, unless a
    /// crash ended an exchange of directories.
    pub(crate) async fn above(&mut self, ino: Ino) -> Result<Option<Parent>> {
        let records = self.inodes.get(&ino).ok_or(FsError::Stale)?.parents.clone();
        let first = *records.first().ok_or(FsError::NotFound)?;
        for record in records.iter().filter(|_| records.len() > 1) {
            let dir = Ino(record.dir);
            if !self.want(dir.object(), Mode::Shared) {
                return Ok(None);
            }
            match self.load(dir).await {
                Ok(inode) if inode.is_directory() => {}
                Ok(_) | Err(FsError::Stale) => continue,
                Err(error) => return Err(error),
            }
            let inode = self.inodes.get(&dir).ok_or(FsError::Stale)?;
            let (bucket, _) = directory::bucket(self.tx.source(), inode, record.hash).await?;
            let Some(entry) = bucket.entries.iter().find(|entry| entry.ino == ino && entry.seq == record.seq) else { continue };
            let candidates: Vec<Entry> = bucket.of(&entry.name).cloned().collect();
            match self.judge(dir, record.hash, &candidates, Mode::Shared).await? {
                None => return Ok(None),
                Some((valid, _)) if valid.first() == Some(entry) => return Ok(Some(*record)),
                Some(_) => {}
            }
        }
        Ok(Some(first))
    }

    /// Whether a loaded directory has no valid name. `None` if tokens are missing.
    pub(crate) async fn is_empty(&mut self, dir: Ino) -> Result<Option<bool>> {
        let mut position = 0;
        loop {
            let inode = self.inodes.get(&dir).ok_or(FsError::Stale)?;
            let listed = directory::list(self.tx.source(), inode, position, 16).await?;
            let Some(last) = listed.last() else {
                return Ok(Some(true));
            };
            position = last.position;
            for name in listed {
                if !name.flagged() {
                    return Ok(Some(false));
                }
                match self.judge_all(dir, name.hash, &name.candidates, Mode::Shared).await? {
                    None => return Ok(None),
                    // A damaged one may be there. It can be removed.
                    Some(judged) if !judged.valid.is_empty() || !judged.damaged.is_empty() => return Ok(Some(false)),
                    Some(_) => {}
                }
            }
        }
    }

    /// Writes a bucket of a loaded directory. Returns the write that makes it durable.
    pub(crate) async fn put(&mut self, dir: Ino, hash: u64, bucket: &Bucket, counter: u64, after: &[After]) -> Result<WriteId> {
        let inode = self.inodes.get_mut(&dir).ok_or(FsError::Stale)?;
        directory::put(&mut self.tx, inode, hash, bucket, counter, after).await
    }

    /// What a new entry in a directory comes after, beside its inode: the entries of the directory's own name (rule 9, for
    /// what is below a name: else a crash would leave the file without the directory that it was made in).
    pub(crate) fn name_of_dir(&self, dir: Ino) -> impl Iterator<Item = After> + use<D> {
        self.fs.name_blocks(dir).into_iter().filter(move |block| *block != dir.block()).map(After::Block)
    }

    /// Sets a changed directory's times, and counts a directory that is about to get a name in it. The count may be too
    /// high after a crash, but never too low: so the write of the new entry goes after what this returns.
    pub(crate) fn before_entry(&mut self, dir: Ino, now: Time, new_subdir: bool) -> Result<Vec<After>> {
        let inode = self.inodes.get_mut(&dir).ok_or(FsError::Stale)?;
        inode.mtime = later(now, inode.mtime);
        inode.ctime = later(now, inode.ctime);
        inode.data_version += 1;
        if !new_subdir {
            return Ok(Vec::new());
        }
        inode.subdirs = inode.subdirs.saturating_add(1);
        if inode.root()?.level() == 0 {
            return Ok(Vec::new()); // The entry is in the same block.
        }
        Ok(vec![After::Write(inode.write(&mut self.tx, &[]))])
    }

    /// Writes a directory's times after its entries changed, and counts a directory that has lost its name in it.
    pub(crate) fn after_entry(&mut self, dir: Ino, now: Time, gone_subdirs: u32, entry: WriteId) -> Result<()> {
        let inode = self.inodes.get_mut(&dir).ok_or(FsError::Stale)?;
        inode.mtime = later(now, inode.mtime);
        inode.ctime = later(now, inode.ctime);
        inode.subdirs = inode.subdirs.saturating_sub(gone_subdirs);
        let same = self.tx.newest(inode.ino.block()) == Some(entry);
        let after = if same || gone_subdirs == 0 { Vec::new() } else { vec![After::Write(entry)] };
        inode.write(&mut self.tx, &after);
        Ok(())
    }

    /// Commits. The tokens stay until the result is dropped.
    pub(crate) fn commit(self) -> Result<Held<D>> {
        self.tx.commit()?;
        if let Some(tell) = self.fs.on_removal.get() {
            self.inodes.values().filter(|inode| inode.is_orphan()).for_each(|inode| tell(&inode.attributes()));
        }
        Ok(self.held)
    }
}
