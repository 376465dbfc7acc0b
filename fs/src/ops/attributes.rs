//! Changing attributes.

use super::data::later;
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

impl SetAttributes {
    fn is_empty(&self) -> bool {
        *self == SetAttributes::default()
    }
}

impl<D: Disk> FileSystem<D> {
    /// Changes attributes. Who may do it is checked by the kernel; what follows from it (bits that go) is done here.
    ///
    /// # Errors
    /// `IsDirectory` or `Invalid` for the size of what has none, `TooLarge`, `NoSpace`, `Stale`, those of the disk.
    pub async fn set_attributes(&self, _caller: &Caller, ino: Ino, set: SetAttributes) -> Result<Attributes> {
        if let Some(size) = set.size {
            self.truncate(ino, size).await?;
        }
        let truncated_program = set.size.is_some() && self.inode(ino).await?.flags & HAS_CAPABILITY != 0;
        let set = SetAttributes { size: None, ..set };
        if set.is_empty() && !truncated_program {
            return self.attributes(ino).await;
        }
        let mut locks = Locks::new([(ino.object(), Mode::Exclusive)]);
        let mut work = self.begin(&mut locks).await?;
        let now = self.now();
        work.load(ino).await?;
        let inode = work.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
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
