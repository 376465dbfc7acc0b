//! Access times: kept as `relatime` does, without asking other nodes while somebody waits.
//!
//! A read that makes the access time due (it is not later than the last change, or a day old) sets it at once if the node can
//! have the inode to itself without asking anybody. Else the read is remembered, and the shell has its time set a moment
//! later (`set_access_times`); by then a reader on another node may have done it, and a look under the shared token tells.
//! So readers share a token, and each change of a file costs each reading node at most one exclusive one.
//!
//! Invariants:
//! - The time that is set is that of the read, and only if the inode is what the read found: else it would hide a time that a
//!   program has set since, or be that of no read at all.
//!
//! What was remembered is bounded, and goes with the node: an access time may be missed, it is never wrong.
//!
//! Excludes: reads that the kernel answers from its pages: nobody tells of them.

use super::FileSystem;
use super::data::later;
use crate::error::{FsError, Result};
use crate::format::Time;
use crate::inode::{Ino, Inode};
use crate::transaction::{Source, Transaction};
use parking_lot::Mutex;
use sld::{Disk, Mode};
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::Poll;

/// An access time older than this is due in any case.
const OLD_SECONDS: i64 = 24 * 3600;
/// The most inodes remembered.
const PENDING_MAX: usize = 4096;
/// The most inodes whose times are set in one turn.
const TURN_MAX: usize = 16;

/// When reads change access times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessTimes {
    /// Of whatever is read.
    pub policy: AccessPolicy,
    /// Except that those of directories never change.
    pub not_directories: bool,
}

/// When a read changes the access time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum AccessPolicy {
    /// If it is not later than the last change, or a day old.
    #[default]
    Relative = 0,
    /// Never.
    Never = 1,
    /// With every read (but not more often than once in a second).
    Always = 2,
}

/// Reads that the inodes do not show yet.
#[derive(Debug, Default)]
pub(crate) struct Accesses {
    policy: AtomicU8,
    not_directories: AtomicBool,
    pending: Mutex<BTreeMap<Ino, Access>>,
}

/// A read that the access time should show: what it found, and when it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    ino: Ino,
    generation: u64,
    atime: Time,
    mtime: Time,
    ctime: Time,
    /// The access time that the read makes due.
    due: Time,
}

impl Access {
    /// Whether an inode is what the read found.
    fn found(&self, inode: &Inode) -> bool {
        let now = (inode.ino, inode.generation, inode.atime, inode.mtime, inode.ctime);
        now == (self.ino, self.generation, self.atime, self.mtime, self.ctime)
    }
}

/// The access time that an inode should have after a read now; `None` if the one that it has is good enough.
fn due(policy: AccessPolicy, inode: &Inode, now: Time) -> Option<Time> {
    let changed = inode.mtime.max(inode.ctime);
    let time = later(now, changed.max(inode.atime));
    let is_later_second = time.seconds > inode.atime.seconds;
    let is_due = match policy {
        AccessPolicy::Never => false,
        AccessPolicy::Always => is_later_second || inode.atime <= changed,
        AccessPolicy::Relative => {
            // A change that is timed far ahead would be later than any access for a long time.
            inode.atime <= changed && (time > changed || is_later_second)
                || now.seconds.saturating_sub(inode.atime.seconds) >= OLD_SECONDS
        }
    };
    is_due.then_some(time)
}

impl<D: Disk> FileSystem<D> {
    /// Sets when reads change access times, for this node.
    pub fn keep_access_times(&self, times: AccessTimes) {
        self.accesses.policy.store(times.policy as u8, Ordering::Relaxed);
        self.accesses.not_directories.store(times.not_directories, Ordering::Relaxed);
    }

    fn access_policy(&self, inode: &Inode) -> AccessPolicy {
        if inode.is_directory() && self.accesses.not_directories.load(Ordering::Relaxed) {
            return AccessPolicy::Never;
        }
        match self.accesses.policy.load(Ordering::Relaxed) {
            1 => AccessPolicy::Never,
            2 => AccessPolicy::Always,
            _ => AccessPolicy::Relative,
        }
    }

    /// An inode, whose token is held, is read now: says what that makes due, if anything.
    pub(crate) fn access(&self, inode: &Inode) -> Option<Access> {
        let due = due(self.access_policy(inode), inode, self.now())?;
        let Inode { ino, generation, atime, mtime, ctime, .. } = *inode;
        Some(Access { ino, generation, atime, mtime, ctime, due })
    }

    /// An inode was read, and this is due. No token of it is held.
    pub(crate) async fn accessed(&self, access: Access) {
        if let Some(pending) = self.accesses.pending.lock().get_mut(&access.ino) {
            // What the earlier read found may be gone.
            if pending.due < access.due {
                *pending = access;
            }
            return;
        }
        let ino = access.ino;
        // A read does not wait for room for what it would dirty.
        let mut admit = pin!(self.disk().admit());
        let admitted = std::future::poll_fn(|cx| Poll::Ready(matches!(admit.as_mut().poll(cx), Poll::Ready(Ok(()))))).await;
        if admitted && let Some(_tokens) = self.disk().try_acquire(&[(ino.object(), Mode::Exclusive)]) {
            match self.set_access_time(access).await {
                Ok(_) | Err(FsError::Stale) => {}
                Err(error) => tracing::debug!(%ino, %error, "an access time is not set"),
            }
            return;
        }
        let mut pending = self.accesses.pending.lock();
        if pending.len() < PENDING_MAX {
            pending.insert(ino, access);
        }
    }

    /// Sets access times that reads have made due, some at a time. Returns the inodes whose times changed. Call it every now
    /// and then.
    pub async fn set_access_times(&self) -> Vec<Ino> {
        let mut changed = Vec::new();
        for _ in 0..TURN_MAX {
            let Some((ino, access)) = self.accesses.pending.lock().pop_first() else { break };
            match self.set_due(access).await {
                Ok(true) => changed.push(ino),
                Ok(false) | Err(FsError::Stale) => {}
                Err(error) => tracing::debug!(%ino, %error, "an access time is not set"),
            }
        }
        changed
    }

    async fn set_due(&self, access: Access) -> Result<bool> {
        // Another node may have been faster; then nobody is disturbed.
        if !access.found(&self.inode(access.ino).await?) {
            return Ok(false);
        }
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(access.ino.object(), Mode::Exclusive)]).await?;
        self.set_access_time(access).await
    }

    /// Sets the access time of an inode, whose token is held exclusively, to that of a read, if it is what that has found.
    async fn set_access_time(&self, access: Access) -> Result<bool> {
        let mut inode = self.load(Source::disk(self.disk()), access.ino).await?;
        if !access.found(&inode) {
            return Ok(false);
        }
        inode.atime = access.due;
        let mut tx = Transaction::new(self.disk());
        inode.write(&mut tx, &[]);
        tx.commit()?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::data::{At, Payload};
    use crate::ops::testing::{Fixture, fixture};
    use crate::{Caller, NewNode, SetAttributes, SetTime};

    fn at(seconds: i64) -> Time {
        Time { seconds, nanos: 0 }
    }

    #[test]
    fn a_time_is_due_once_after_each_change_and_once_a_day() {
        let mut inode = Inode::new(Ino(1), 1, 0o100_644, 0, 0, at(1000));
        let relative = |inode: &Inode, now| due(AccessPolicy::Relative, inode, at(now));
        assert_eq!(relative(&inode, 1000), Some(Time { seconds: 1000, nanos: 1 }), "as old as the last change");
        inode.atime = at(1001);
        assert_eq!(relative(&inode, 5000), None);
        inode.ctime = at(1002);
        assert_eq!(relative(&inode, 5000), Some(at(5000)));
        // Another node's clock is ahead: the access is later than the change all the same.
        inode.mtime = at(5010);
        assert_eq!(relative(&inode, 5000), Some(Time { seconds: 5010, nanos: 1 }));
        inode.atime = at(5011);
        assert_eq!(relative(&inode, 5011 + OLD_SECONDS - 1), None);
        assert_eq!(relative(&inode, 5011 + OLD_SECONDS), Some(at(5011 + OLD_SECONDS)));
        // A change set to be in the far future does not make every read a write.
        inode.mtime = at(9_000_000);
        assert_eq!(relative(&inode, 6000), Some(at(6000)));
        inode.atime = at(6000);
        assert_eq!((relative(&inode, 6000), relative(&inode, 6001)), (None, Some(at(6001))));
        assert_eq!(due(AccessPolicy::Never, &inode, at(7_000_000)), None);
        (inode.mtime, inode.ctime, inode.atime) = (at(1000), at(1000), at(6000));
        assert_eq!(due(AccessPolicy::Always, &inode, at(6001)), Some(at(6001)));
        assert_eq!(due(AccessPolicy::Always, &inode, at(6000)), None);
    }

    #[tokio::test]
    async fn reading_a_file_a_directory_or_a_link_sets_its_access_time_and_no_other() {
        let f = fixture(&[1000]).await;
        let file = f.file(b"f").await;
        let link = f.fs.make(&Caller::default(), f.fs.root(), b"l", NewNode::Symlink(b"x"), 0o777).await.unwrap().ino;
        f.fs.write(file, At::Offset(0), Payload::new(0, b"bytes"), false).await.unwrap();
        for ino in [file, link, f.fs.root()] {
            let mut before = f.fs.attributes(ino).await.unwrap();
            for round in 0..2 {
                match ino {
                    ino if ino == file => drop(f.fs.read(ino, 0, 10).await.unwrap()),
                    ino if ino == link => drop(f.fs.read_link(ino).await.unwrap()),
                    ino => f.fs.read_directory(ino, 0, &mut |_| true, false).await.unwrap(),
                }
                let after = f.fs.attributes(ino).await.unwrap();
                assert_eq!(after.atime > before.atime, round == 0, "round {round}");
                assert!(after.atime > after.mtime.max(after.ctime));
                assert_eq!(crate::Attributes { atime: before.atime, ..after }, before);
                before = after;
            }
        }
    }

    #[tokio::test]
    async fn what_the_mount_says_decides_for_files_and_directories() {
        let f = fixture(&[1000]).await;
        let file = f.file(b"f").await;
        f.fs.write(file, At::Offset(0), Payload::new(0, b"bytes"), false).await.unwrap();
        let changes = |times: AccessTimes| {
            f.fs.keep_access_times(times);
            let (fs, root) = (&f.fs, f.fs.root());
            async move {
                let mut seen = [false; 2];
                for (seen, ino) in seen.iter_mut().zip([file, root]) {
                    // Every read is due.
                    let long_ago = SetAttributes { atime: Some(SetTime::To(at(1))), ..SetAttributes::default() };
                    fs.set_attributes(&Caller::default(), ino, long_ago).await.unwrap();
                    if ino == file {
                        drop(fs.read(ino, 0, 10).await.unwrap());
                    } else {
                        fs.read_directory(ino, 0, &mut |_| true, false).await.unwrap();
                    }
                    fs.set_access_times().await;
                    *seen = fs.attributes(ino).await.unwrap().atime != at(1);
                }
                seen
            }
        };
        for (policy, is_set) in [(AccessPolicy::Relative, true), (AccessPolicy::Always, true), (AccessPolicy::Never, false)] {
            assert_eq!(changes(AccessTimes { policy, not_directories: false }).await, [is_set; 2]);
            assert_eq!(changes(AccessTimes { policy, not_directories: true }).await, [is_set, false]);
        }
    }

    #[tokio::test]
    async fn a_read_of_what_is_shared_takes_no_token_and_its_time_is_set_later() {
        let f = fixture(&[1000]).await;
        let file = f.file(b"f").await;
        f.fs.write(file, At::Offset(0), Payload::new(0, b"bytes"), false).await.unwrap();
        let before = f.fs.attributes(file).await.unwrap();
        let shared = f.fs.tokens(&[(file.object(), Mode::Shared)]).await.unwrap();
        f.fs.read(file, 0, 10).await.unwrap();
        drop(shared);
        assert_eq!(f.fs.attributes(file).await.unwrap(), before);
        assert_eq!(f.fs.set_access_times().await, [file]);
        assert!(f.fs.attributes(file).await.unwrap().atime > before.atime);
        assert_eq!(f.fs.set_access_times().await, []);
        // Somebody else was faster: nothing is left to do.
        f.chmod(file, 0o600).await;
        let shared = f.fs.tokens(&[(file.object(), Mode::Shared)]).await.unwrap();
        f.fs.read(file, 0, 10).await.unwrap();
        drop(shared);
        let time = Some(SetTime::To(at(1 << 40)));
        f.fs.set_attributes(&Caller::default(), file, SetAttributes { atime: time, ..SetAttributes::default() }).await.unwrap();
        assert_eq!(f.fs.set_access_times().await, []);
    }

    /// Reads a file while others have it, too, so that its access time is left to the background.
    async fn read_shared(f: &Fixture, file: Ino) {
        let shared = f.fs.tokens(&[(file.object(), Mode::Shared)]).await.unwrap();
        f.fs.read(file, 0, 10).await.unwrap();
        drop(shared);
    }

    #[tokio::test]
    async fn a_time_that_a_program_has_set_since_the_read_stays() {
        let f = fixture(&[1000]).await;
        let file = f.file(b"f").await;
        read_shared(&f, file).await;
        let long_ago = SetAttributes { atime: Some(SetTime::To(at(1))), ..SetAttributes::default() };
        f.fs.set_attributes(&Caller::default(), file, long_ago).await.unwrap();
        assert_eq!(f.fs.set_access_times().await, []);
        assert_eq!(f.fs.attributes(file).await.unwrap().atime, at(1));
        // A read of what is there now counts, also if one of what was there before is still remembered.
        read_shared(&f, file).await;
        f.chmod(file, 0o600).await;
        read_shared(&f, file).await;
        assert_eq!(f.fs.set_access_times().await, [file]);
        let after = f.fs.attributes(file).await.unwrap();
        assert!(after.atime > after.ctime);
    }

    #[tokio::test]
    async fn a_read_before_a_change_is_not_timed_after_it() {
        let f = fixture(&[1000]).await;
        let file = f.file(b"f").await;
        let before = f.fs.attributes(file).await.unwrap();
        read_shared(&f, file).await;
        f.fs.write(file, At::End, Payload::new(0, b"bytes"), false).await.unwrap();
        assert_eq!(f.fs.set_access_times().await, []);
        assert_eq!(f.fs.attributes(file).await.unwrap().atime, before.atime);
        // Without a change it is the time of the read, not that of its turn.
        read_shared(&f, file).await;
        let turn = (0..100).map(|_| f.fs.now()).max().unwrap();
        assert_eq!(f.fs.set_access_times().await, [file]);
        let after = f.fs.attributes(file).await.unwrap();
        assert!(after.atime > after.mtime && after.atime < turn);
    }
}
