//! Changing attributes.

use super::data::{Terms, later};
use super::{FileSystem, Locks, xattr};
use crate::error::{FsError, Result};
use crate::format::Time;
use crate::inode::{Attributes, FileKind, HAS_CAPABILITY, Ino};
use crate::ops::Caller;
use nix::libc;
use sld::{After, Disk, Mode};

/// What to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size of a regular file.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<Time>,
    /// Last change of the data.
    pub mtime: Option<Time>,
    /// Last change of the inode; now, if it is not given.
    pub ctime: Option<Time>,
    /// Takes set-user-id and set-group-id away, as a change of the data by an ordinary user does.
    pub kill: bool,
}

/// Says, from what an inode is with its token in hand, what of a change may be done.
pub type Permit<'a> = &'a (dyn Fn(&Attributes, SetAttributes) -> Result<SetAttributes> + Sync);

impl SetAttributes {
    fn is_empty(&self) -> bool {
        *self == SetAttributes::default()
    }
}

impl<D: Disk> FileSystem<D> {
    /// Changes attributes, on behalf of somebody who may. What follows from it (bits that go) is done here.
    ///
    /// # Errors
    /// `IsDirectory` or `Invalid` for the size of what has none, `TooLarge`, `NoSpace`, `Stale`, those of the disk.
    pub async fn set_attributes(&self, _caller: &Caller, ino: Ino, set: SetAttributes) -> Result<Attributes> {
        self.set_attributes_on(ino, set, Terms::NONE, &|_, set| Ok(set)).await
    }

    /// Changes attributes on some terms, if it is permitted. (The kernel has asked for permission, too, but on the strength of
    /// what it knew. To change the size is a matter of the file's being open for writing, and needs no further one.)
    ///
    /// # Errors
    /// Those of the permit; `Disk(Lost)` if it is not allowed (any more); and those of `set_attributes`.
    pub async fn set_attributes_on(
        &self,
        ino: Ino,
        set: SetAttributes,
        terms: Terms<'_>,
        permit: Permit<'_>,
    ) -> Result<Attributes> {
        if let Some(size) = set.size {
            self.truncate_on(ino, size, Terms { kill: terms.kill || set.kill, ..terms }).await?;
        }
        let truncated_program = set.size.is_some() && self.inode(ino).await?.flags & HAS_CAPABILITY != 0;
        let set = SetAttributes { size: None, kill: set.kill && set.size.is_none(), ..set };
        if set.is_empty() && !truncated_program {
            return self.attributes(ino).await;
        }
        self.again_if(terms.allowed, || self.try_set_attributes(ino, set, truncated_program, terms, permit)).await
    }

    async fn try_set_attributes(
        &self,
        ino: Ino,
        set: SetAttributes,
        truncated_program: bool,
        terms: Terms<'_>,
        permit: Permit<'_>,
    ) -> Result<Attributes> {
        let mut locks = Locks::new([(ino.object(), Mode::Exclusive)]);
        let mut work = self.begin(&mut locks).await?;
        let now = self.now();
        work.load(ino).await?;
        let inode = work.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
        if !(terms.allowed)() {
            return Err(FsError::Disk(sld::DiskError::Lost));
        }
        let set = permit(&inode.attributes(), set)?;
        let kind = inode.kind();
        let mut changed = Vec::new();
        if set.uid.is_some() || set.gid.is_some() {
            inode.uid = set.uid.unwrap_or(inode.uid);
            inode.gid = set.gid.unwrap_or(inode.gid);
            if kind != FileKind::Directory {
                // A change of owner takes the right to act as the owner; set-group-id without group execution is a lock mode.
                inode.kill_set_ids();
                changed.push(xattr::drop_capability(&mut work.tx, inode).await?);
            }
        }
        if truncated_program {
            changed.push(xattr::drop_capability(&mut work.tx, inode).await?);
        }
        if set.kill {
            inode.kill_set_ids();
        }
        if let Some(mode) = set.mode {
            inode.mode = inode.mode & libc::S_IFMT | mode & 0o7777;
            changed.push(xattr::follow_mode(&mut work.tx, inode).await?);
        }
        inode.atime = set.atime.unwrap_or(inode.atime);
        inode.mtime = set.mtime.unwrap_or(inode.mtime);
        inode.ctime = set.ctime.unwrap_or_else(|| later(now, inode.ctime));
        let attributes = inode.attributes();
        let after: Vec<After> = changed.iter().flat_map(|changed| changed.after.iter().copied()).collect();
        let written = After::Write(inode.write(&mut work.tx, &after));
        for changed in changed {
            changed.free(&mut work.tx, inode, written);
        }
        work.commit()?;
        Ok(attributes)
    }
}
