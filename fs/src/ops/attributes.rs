//! Changing attributes.

use super::data::{Terms, later};
use super::{FileSystem, Locks, xattr};
use crate::error::{FsError, Result};
use crate::format::Time;
use crate::inode::{Attributes, FileKind, HAS_CAPABILITY, Ino, Inode};
use crate::ops::Caller;
use nix::libc;
use sld::{After, Disk, Mode};

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// That of the change itself.
    Now,
    /// This one, whatever it is.
    To(Time),
}

impl SetTime {
    fn at(self, now: Time) -> Time {
        match self {
            SetTime::Now => now,
            SetTime::To(time) => time,
        }
    }
}

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
    pub atime: Option<SetTime>,
    /// Last change of the data.
    pub mtime: Option<SetTime>,
    /// Last change of the inode; now, if it is not given.
    pub ctime: Option<Time>,
    /// Takes set-user-id and set-group-id away, as a change of the data by an ordinary user does.
    pub kill: bool,
}

/// The one time of a change. Whatever it sets to now is set to the same time, which is later than what was there: another
/// node's clock may have been ahead.
fn time_of_change(now: Time, set: &SetAttributes, inode: &Inode) -> Time {
    // Each by itself: of times that were set ahead by programs, none is to carry the others along.
    let mut time = later(now, inode.ctime);
    if set.mtime == Some(SetTime::Now) || set.atime == Some(SetTime::Now) {
        time = time.max(later(now, inode.mtime));
    }
    if set.atime == Some(SetTime::Now) {
        time = time.max(later(now, inode.atime));
    }
    time
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
        // What was cut may be lost.
        let is_sized = set.size.is_some();
        let again = if is_sized { &|| false } else { terms.allowed };
        let truncated_program = is_sized && self.inode(ino).await?.flags & HAS_CAPABILITY != 0;
        let set = SetAttributes { size: None, kill: set.kill && set.size.is_none(), ..set };
        if is_sized && set.is_empty() && !truncated_program {
            return self.attributes(ino).await;
        }
        self.again_if(again, || self.try_set_attributes(ino, set, truncated_program, terms, permit)).await
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
        // A change of nothing is one of the owner to what it is already.
        if set.uid.is_some() || set.gid.is_some() || set.is_empty() && !truncated_program {
            if kind != FileKind::Directory {
                // A change of owner takes the right to act as the owner.
                inode.kill_set_ids(terms.is_in_group);
                changed.push(xattr::drop_capability(&mut work.tx, inode).await?);
            }
            inode.uid = set.uid.unwrap_or(inode.uid);
            inode.gid = set.gid.unwrap_or(inode.gid);
        }
        if truncated_program {
            changed.push(xattr::drop_capability(&mut work.tx, inode).await?);
        }
        if set.kill {
            inode.kill_set_ids(terms.is_in_group);
        }
        if let Some(mode) = set.mode {
            inode.mode = inode.mode & libc::S_IFMT | mode & 0o7777;
            changed.push(xattr::follow_mode(&mut work.tx, inode).await?);
        }
        let time = time_of_change(now, &set, inode);
        inode.atime = set.atime.map_or(inode.atime, |to| to.at(time));
        inode.mtime = set.mtime.map_or(inode.mtime, |to| to.at(time));
        inode.ctime = set.ctime.unwrap_or(time);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::fixture;

    fn at(seconds: i64) -> Time {
        Time { seconds, nanos: 0 }
    }

    #[tokio::test]
    async fn what_is_set_to_now_gets_one_time_and_none_goes_back() {
        let f = fixture(&[1000]).await;
        let file = f.file(b"f").await;
        let touch = SetAttributes { atime: Some(SetTime::Now), mtime: Some(SetTime::Now), ..SetAttributes::default() };
        let now = f.fs.now().seconds;
        // What is there was timed by this clock, or by others that are ahead of it.
        for (atime, mtime, ctime) in [(1, 1, 1), (now, now, now + 20), (now, now + 30, now), (now + 40, now + 20, now)] {
            let before = SetAttributes {
                atime: Some(SetTime::To(at(atime))),
                mtime: Some(SetTime::To(at(mtime))),
                ctime: Some(at(ctime)),
                ..SetAttributes::default()
            };
            f.fs.set_attributes(&Caller::default(), file, before).await.unwrap();
            let after = f.fs.set_attributes(&Caller::default(), file, touch).await.unwrap();
            assert_eq!((after.atime, after.mtime), (after.ctime, after.ctime));
            assert!(after.ctime > at(atime.max(mtime).max(ctime)), "{after:?}");
            // Only what is set counts: an access that was timed ahead does not move a change of the mode ahead.
            f.fs.set_attributes(&Caller::default(), file, before).await.unwrap();
            let change = SetAttributes { mode: Some(0o600), ..SetAttributes::default() };
            let after = f.fs.set_attributes(&Caller::default(), file, change).await.unwrap();
            assert_eq!((after.atime, after.mtime), (at(atime), at(mtime)));
            assert!(after.ctime > at(ctime) && after.ctime < at(now.max(ctime) + 1));
        }
        // A time that is ahead of the clock by more than clocks differ is not met by way of one that is less ahead.
        let ahead =
            SetAttributes { mtime: Some(SetTime::To(at(now + 100))), ctime: Some(at(now + 50)), ..SetAttributes::default() };
        f.fs.set_attributes(&Caller::default(), file, ahead).await.unwrap();
        let after = f.fs.set_attributes(&Caller::default(), file, touch).await.unwrap();
        assert!(after.ctime > at(now + 50) && after.ctime < at(now + 60));
        // A time far ahead was set by a program: now is now.
        let ahead =
            SetAttributes { mtime: Some(SetTime::To(at(now + 7200))), ctime: Some(at(now + 1)), ..SetAttributes::default() };
        f.fs.set_attributes(&Caller::default(), file, ahead).await.unwrap();
        let after = f.fs.set_attributes(&Caller::default(), file, touch).await.unwrap();
        assert!(after.mtime == after.ctime && after.ctime > at(now + 1) && after.ctime < at(now + 7200));
    }
}
