//! Who may do what to an inode, as Linux decides it: owner, group and others, access lists, sticky and set-group-id
//! directories, and what takes set-ids away.
//!
//! Root may do everything and everybody else has no capability; nobody is in a group beside his own. Of the protections that
//! a machine can be told to have (`/proc/sys/fs/protected_*`), only the one of hard links is known.
//!
//! Excludes: executing.

use super::{Node, Oracle};
use crate::op::{FileKind, User, errno::*};

pub(super) const READ: u32 = 4;
pub(super) const WRITE: u32 = 2;
pub(super) const SEARCH: u32 = 1;
const NAMED_USER: u32 = 1000;
const STICKY: u32 = 0o1000;
const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;

/// Whether a user may read, write or search an inode.
fn may(user: User, node: &Node, want: u32) -> bool {
    if user.is_root() {
        return true;
    }
    if node.uid == user.uid {
        return node.mode >> 6 & want == want;
    }
    let in_group = node.gid == user.gid;
    // A list with an empty mask is not looked at: then it is the mode that decides, and others may have more than the named.
    if let Some((acl, (named, mask))) = node.access.and_then(|acl| Some((acl, acl.named?)))
        && node.mode & 0o070 != 0
    {
        let masked = |perm: u16| u32::from(perm & mask) & want == want;
        return match () {
            () if user.uid == NAMED_USER => masked(named),
            () if in_group => masked(acl.group),
            () => u32::from(acl.other) & want == want,
        };
    }
    let shift = if in_group { 3 } else { 0 };
    node.mode >> shift & want == want
}

impl Oracle {
    pub(super) fn check(&self, ino: u64, want: u32) -> Result<(), i32> {
        if may(self.actor, self.node(ino), want) { Ok(()) } else { Err(EACCES) }
    }

    fn owns(&self, ino: u64) -> bool {
        self.actor.is_root() || self.node(ino).uid == self.actor.uid
    }

    /// What only the owner may do.
    pub(super) fn check_owner(&self, ino: u64) -> Result<(), i32> {
        if self.owns(ino) { Ok(()) } else { Err(EPERM) }
    }

    /// Whether a name may be taken from a directory.
    pub(super) fn check_remove(&self, dir: u64, ino: u64) -> Result<(), i32> {
        self.check(dir, WRITE | SEARCH)?;
        if self.node(dir).mode & STICKY != 0 && !self.owns(dir) && !self.owns(ino) { Err(EPERM) } else { Ok(()) }
    }

    /// Nobody, not even root, opens a link of a third one with `O_CREAT` in a sticky directory that is everybody's, even with
    /// `O_NOFOLLOW`: of what `protected_regular` and `protected_fifos` are about it is the part that always holds.
    pub(super) fn check_sticky_link(&self, dir: u64, link: u64) -> Result<(), i32> {
        let (dir, owner) = (self.node(dir), self.node(link).uid);
        let foreign = owner != dir.uid && owner != self.actor.uid;
        if foreign && dir.mode & STICKY != 0 && dir.mode & 0o002 != 0 { Err(EACCES) } else { Ok(()) }
    }

    /// With `protected_hardlinks` only the owner links what is not an ordinary file that he can read and write.
    pub(super) fn check_link_source(&self, ino: u64) -> Result<(), i32> {
        let node = self.node(ino);
        let set_id = node.mode & SET_UID != 0 || node.mode & (SET_GID | 0o010) == SET_GID | 0o010;
        let safe = node.kind() == FileKind::File && !set_id && may(self.actor, node, READ | WRITE);
        if !self.traits.protects_links || safe || self.owns(ino) { Ok(()) } else { Err(EPERM) }
    }

    /// Whether an owner or group may be set.
    pub(super) fn check_chown(&self, ino: u64, uid: u32, gid: u32) -> Result<(), i32> {
        let (node, actor) = (self.node(ino), self.actor);
        let own = node.uid == actor.uid && uid == node.uid && (gid == node.gid || gid == actor.gid);
        if actor.is_root() || own { Ok(()) } else { Err(EPERM) }
    }

    /// Extended attributes of a `user.` or `trusted.` name; `otherwise`: what those hear who may not know of it.
    pub(super) fn check_attribute(&self, ino: u64, name: &str, write: bool, otherwise: i32) -> Result<(), i32> {
        if self.actor.is_root() {
            return Ok(());
        }
        if name.starts_with("trusted.") {
            return Err(otherwise);
        }
        let node = self.node(ino);
        if write && node.is_dir() && node.mode & STICKY != 0 && !self.owns(ino) {
            return Err(EPERM);
        }
        self.check(ino, if write { WRITE } else { READ })
    }

    /// A mode without set-group-id, which only those in the group may give.
    pub(super) fn grantable(&self, mode: u32, gid: u32) -> u32 {
        if self.actor.is_root() || self.actor.gid == gid { mode } else { mode & !SET_GID }
    }

    /// A file has got another owner, or (`changed`) other contents: it no longer acts as anybody. Root may change contents.
    pub(super) fn drop_set_ids(&mut self, ino: u64, changed: bool) {
        let actor = self.actor;
        let node = self.node_mut(ino);
        if node.is_dir() || changed && (actor.is_root() || node.kind() != FileKind::File) {
            return;
        }
        // Set-group-id without the group's right to execute means something else, and is left to the group's members.
        let group = node.mode & 0o010 != 0 || !actor.is_root() && actor.gid != node.gid;
        node.mode &= if group { !(SET_UID | SET_GID) } else { !SET_UID };
    }
}
