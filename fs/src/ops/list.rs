//! Listing directories.

use super::access::Access;
use super::{FileSystem, Locks};
use crate::directory::{self, Entry, Listed};
use crate::error::{FsError, Result};
use crate::inode::{Attributes, FileKind, Ino};
use crate::transaction::Source;
use bytes::Bytes;
use sld::{Disk, Mode};

/// Names looked at under one hold of the directory's token.
const BATCH: usize = 64;
/// How often names are read again because something was removed before its attributes were read.
const AGAIN_MAX: u32 = 8;

/// An entry as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode.
    pub ino: Ino,
    /// Name.
    pub name: Bytes,
    /// Generation of the inode, as the entry says (0 for `.` and `..`).
    pub generation: u64,
    /// Type.
    pub kind: FileKind,
    /// Where to go on after this entry.
    pub next_cookie: u64,
    /// Attributes, if they were asked for; if they were and there are none, the inode is damaged.
    pub attributes: Option<Attributes>,
}

impl<D: Disk> FileSystem<D> {
    /// Lists a directory from `cookie` on (0: from the start), `.` and `..` first, until the sink returns false. Cookies
    /// stay good while names come and go: a name that is there all the time is listed exactly once.
    ///
    /// # Errors
    /// `NotDirectory`, `Stale`, those of the disk.
    pub async fn read_directory(
        &self,
        ino: Ino,
        cookie: u64,
        sink: &mut (dyn FnMut(DirEntry) -> bool + Send),
        plus: bool,
    ) -> Result<()> {
        if let Some(access) = self.list(ino, cookie, sink, plus).await? {
            self.accessed(access).await;
        }
        Ok(())
    }

    /// As `read_directory`, but it is no access (`O_NOATIME`).
    ///
    /// # Errors
    /// As `read_directory`.
    pub async fn read_directory_unnoticed(
        &self,
        ino: Ino,
        cookie: u64,
        sink: &mut (dyn FnMut(DirEntry) -> bool + Send),
        plus: bool,
    ) -> Result<()> {
        self.list(ino, cookie, sink, plus).await.map(drop)
    }

    /// Lists; and says what access is due to be shown.
    async fn list(
        &self,
        ino: Ino,
        cookie: u64,
        sink: &mut (dyn FnMut(DirEntry) -> bool + Send),
        plus: bool,
    ) -> Result<Option<Access>> {
        let mut position = cookie;
        if position < 2 {
            let up = match self.directory_above(ino).await {
                Err(FsError::NotFound) => ino,
                up => up?,
            };
            for (name, target, next) in [(&b"."[..], ino, 1), (b"..", up, 2)] {
                if position >= next {
                    continue;
                }
                let attributes = if plus { self.attributes(target).await.ok() } else { None };
                let kind = FileKind::Directory;
                let name = Bytes::from_static(name);
                if !sink(DirEntry { ino: target, name, generation: 0, kind, next_cookie: next, attributes }) {
                    return Ok(None);
                }
            }
            position = 2;
        }
        let mut again = 0;
        loop {
            let (listed, end, access) = self.again(|| self.batch(ino, position)).await?;
            let children = if plus { self.again(|| self.attributes_of(&listed)).await? } else { Vec::new() };
            let is_gone = |((_, entry), child): (&(u64, Option<Entry>), &Child)| entry.is_some() && matches!(child, Child::Gone);
            if again < AGAIN_MAX && listed.iter().zip(&children).any(is_gone) {
                // Without it these would be names of no one moment: what has replaced it may be among them by its old name.
                again += 1;
                continue;
            }
            for (index, (next, entry)) in listed.iter().enumerate() {
                position = *next;
                let Some(entry) = entry else {
                    continue; // None of the candidates is valid.
                };
                let attributes = match children.get(index) {
                    Some(Child::Gone) => continue,
                    Some(Child::Known(attributes)) => Some(*attributes),
                    Some(Child::Damaged) | None => None,
                };
                let shown = DirEntry {
                    ino: entry.ino,
                    name: entry.name.clone(),
                    generation: entry.generation,
                    kind: attributes.map_or(entry.kind, |a| a.kind),
                    next_cookie: *next,
                    attributes,
                };
                if !sink(shown) {
                    return Ok(access);
                }
            }
            if end {
                return Ok(access);
            }
        }
    }

    /// The next names after a position with what they lead to; whether these are the last; and what access of the directory
    /// is due to be shown.
    async fn batch(&self, ino: Ino, position: u64) -> Result<(Vec<(u64, Option<Entry>)>, bool, Option<Access>)> {
        let mut locks = Locks::new([(ino.object(), Mode::Shared)]);
        'again: loop {
            let mut work = self.begin_read(&mut locks).await?;
            let dir = work.load(ino).await?;
            if !dir.is_directory() {
                return Err(FsError::NotDirectory);
            }
            let dir = work.inodes.get(&ino).ok_or(FsError::Stale)?;
            let listed: Vec<Listed> = directory::list(work.tx.source(), dir, position, BATCH).await?;
            let (end, access) = (listed.len() < BATCH, self.access(dir));
            let mut shown = Vec::with_capacity(listed.len());
            for name in listed {
                // Rule 2: a name without a flag is trusted; else its candidates are judged.
                let entry = if name.flagged() {
                    match work.judge(ino, name.hash, &name.candidates, Mode::Shared).await {
                        Ok(Some((valid, _))) => valid.into_iter().next(),
                        Ok(None) => {
                            locks.need(work.needs);
                            continue 'again;
                        }
                        // Who touches the name is told.
                        Err(error) if error.is_damage() => name.candidates.into_iter().next_back(),
                        Err(error) => return Err(error),
                    }
                } else {
                    name.candidates.into_iter().next()
                };
                shown.push((name.position, entry));
            }
            return Ok((shown, end, access));
        }
    }

    /// What is known of listed inodes, each as it is now. A damaged one does not hide the others.
    async fn attributes_of(&self, listed: &[(u64, Option<Entry>)]) -> Result<Vec<Child>> {
        let entries = || listed.iter().filter_map(|(_, entry)| entry.as_ref());
        let wants: Vec<_> = entries().map(|entry| (entry.ino.object(), Mode::Shared)).collect();
        let _tokens = self.tokens(&wants).await?;
        for entry in entries() {
            if self.disk().try_read(entry.ino.object(), entry.ino.block()).is_none() {
                self.disk().read_ahead(entry.ino.object(), &[entry.ino.block()]);
            }
        }
        let mut children = Vec::with_capacity(listed.len());
        for (_, entry) in listed {
            let Some(entry) = entry else {
                children.push(Child::Gone);
                continue;
            };
            children.push(match self.load(Source::disk(self.disk()), entry.ino).await {
                Ok(inode) if inode.generation == entry.generation => Child::Known(inode.attributes()),
                Ok(_) | Err(FsError::Stale) => Child::Gone,
                Err(error) if error.is_damage() => {
                    tracing::warn!(%error, ino = %entry.ino, "listed without attributes");
                    Child::Damaged
                }
                Err(error) => return Err(error),
            });
        }
        Ok(children)
    }
}

/// A listed inode.
enum Child {
    Known(Attributes),
    /// Removed since its name was read.
    Gone,
    Damaged,
}
