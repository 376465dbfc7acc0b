//! Names, and the links that inodes have by them: made, linked, moved, exchanged, removed. A check that fails changes nothing,
//! and which of several failures is told is what Linux tells.
//!
//! Excludes: walking paths (`super`), who may do it (`rights`).

use super::rights::{SEARCH, WRITE};
use super::{Body, Oracle, ROOT};
use crate::op::{Outcome, RenameFlag, Reply, errno::*};

impl Oracle {
    pub(super) fn create(&mut self, path: &str, body: Body, mode: u32) -> Result<u64, i32> {
        let (dir, name) = self.parent(path)?;
        if name.is_empty() {
            return Err(EEXIST);
        }
        match self.child(dir, name) {
            Ok(_) => return Err(EEXIST),
            Err(ENOENT) => {}
            Err(e) => return Err(e),
        }
        self.check(dir, WRITE | SEARCH)?;
        let is_dir = matches!(body, Body::Dir(_));
        let is_link = matches!(body, Body::Symlink(_));
        let ino = self.insert(body, mode, dir);
        self.inherit_group(ino, dir);
        if let Some(default) = self.node(dir).default.filter(|_| !is_link) {
            self.node_mut(ino).inherit(default);
        }
        self.entries(dir).insert(name.to_owned(), ino);
        self.touch_data(dir);
        if is_dir {
            self.node_mut(dir).nlink += 1;
        }
        Ok(ino)
    }

    /// What is made in a set-group-id directory is of its group; a directory gets the bit, too.
    pub(super) fn inherit_group(&mut self, ino: u64, dir: u64) {
        let (mode, gid) = (self.node(dir).mode, self.node(dir).gid);
        if mode & 0o2000 != 0 {
            let node = self.node_mut(ino);
            node.gid = gid;
            if node.is_dir() {
                node.mode |= 0o2000;
            }
        }
    }

    /// Takes a name's link from an inode that no longer has it.
    pub(super) fn drop_link(&mut self, ino: u64) {
        self.touch_inode(ino);
        let node = self.node_mut(ino);
        if node.is_dir() {
            node.nlink = 0;
            let parent = node.parent;
            self.node_mut(parent).nlink -= 1;
        } else {
            node.nlink -= 1;
        }
        self.reap(ino);
    }

    pub(super) fn link(&mut self, from: &str, to: &str) -> Outcome {
        let ino = self.resolve(from, false)?;
        self.link_inode(ino, to)
    }

    pub(super) fn link_inode(&mut self, ino: u64, to: &str) -> Outcome {
        let (dir, name) = self.parent(to)?;
        match self.child(dir, name) {
            Ok(_) => return Err(EEXIST),
            Err(ENOENT) => {}
            Err(e) => return Err(e),
        }
        if self.nodes.get(&ino).is_none_or(|node| node.nlink == 0) {
            return Err(ENOENT);
        }
        self.check_link_source(ino)?;
        self.check(dir, WRITE | SEARCH)?;
        if self.node(ino).is_dir() {
            return Err(EPERM);
        }
        self.entries(dir).insert(name.to_owned(), ino);
        self.node_mut(ino).nlink += 1;
        self.touch_inode(ino);
        self.touch_data(dir);
        Ok(Reply::Done)
    }

    pub(super) fn unlink(&mut self, path: &str) -> Outcome {
        let (dir, name) = self.parent(path)?;
        let ino = self.child(dir, name)?;
        self.check_remove(dir, ino)?;
        if self.node(ino).is_dir() {
            return Err(EISDIR);
        }
        self.entries(dir).remove(name);
        self.touch_data(dir);
        self.drop_link(ino);
        Ok(Reply::Done)
    }

    pub(super) fn rmdir(&mut self, path: &str) -> Outcome {
        let (dir, name) = self.parent(path)?;
        let ino = self.child(dir, name)?;
        self.check_remove(dir, ino)?;
        if !self.dir(ino)?.is_empty() {
            return Err(ENOTEMPTY);
        }
        self.entries(dir).remove(name);
        self.touch_data(dir);
        self.drop_link(ino);
        Ok(Reply::Done)
    }

    /// Whether `dir` is `ancestor` or below it.
    pub(super) fn is_below(&self, dir: u64, ancestor: u64) -> bool {
        let mut at = dir;
        loop {
            if at == ancestor {
                return true;
            }
            if at == ROOT {
                return false;
            }
            at = self.node(at).parent;
        }
    }

    pub(super) fn rename(&mut self, from: &str, to: &str, flag: RenameFlag) -> Outcome {
        let (from_dir, from_name) = self.parent(from)?;
        let (to_dir, to_name) = self.parent(to)?;
        let moved = self.child(from_dir, from_name)?;
        let target = match self.child(to_dir, to_name) {
            Ok(target) => Some(target),
            Err(ENOENT) => None,
            Err(e) => return Err(e),
        };
        match (flag, target) {
            (RenameFlag::NoReplace | RenameFlag::WhiteoutNoReplace, Some(_)) => return Err(EEXIST),
            (RenameFlag::Exchange, None) => return Err(ENOENT),
            _ => {}
        }
        let moves_dir = self.node(moved).is_dir();
        if moves_dir && self.is_below(to_dir, moved) {
            return Err(EINVAL);
        }
        if let Some(target) = target
            && self.node(target).is_dir()
            && self.is_below(from_dir, target)
        {
            return Err(if flag == RenameFlag::Exchange { EINVAL } else { ENOTEMPTY });
        }
        if target == Some(moved) {
            return Ok(Reply::Done);
        }
        self.check_remove(from_dir, moved)?;
        match target {
            None => self.check(to_dir, WRITE | SEARCH)?,
            Some(target) => self.check_remove(to_dir, target)?,
        }
        if let Some(target) = target.filter(|_| flag != RenameFlag::Exchange) {
            match (moves_dir, self.node(target).is_dir()) {
                (true, false) => return Err(ENOTDIR),
                (false, true) => return Err(EISDIR),
                _ => {}
            }
        }
        if from_dir != to_dir {
            // A directory that gets another parent is written to.
            let other = target.filter(|target| flag == RenameFlag::Exchange && self.node(*target).is_dir());
            for dir in Some(moved).filter(|_| moves_dir).into_iter().chain(other) {
                self.check(dir, WRITE)?;
            }
        }
        if let Some(target) = target {
            if flag == RenameFlag::Exchange {
                self.entries(from_dir).insert(from_name.to_owned(), target);
                self.entries(to_dir).insert(to_name.to_owned(), moved);
                self.reparent(moved, to_dir);
                self.reparent(target, from_dir);
                for ino in [moved, target] {
                    self.touch_inode(ino);
                }
                self.touch_data(from_dir);
                self.touch_data(to_dir);
                return Ok(Reply::Done);
            }
            if moves_dir && !self.dir(target)?.is_empty() {
                return Err(ENOTEMPTY);
            }
        }
        self.entries(from_dir).remove(from_name);
        self.entries(to_dir).insert(to_name.to_owned(), moved);
        self.touch_inode(moved);
        self.touch_data(from_dir);
        self.touch_data(to_dir);
        if let Some(target) = target {
            self.drop_link(target);
        }
        self.reparent(moved, to_dir);
        if matches!(flag, RenameFlag::Whiteout | RenameFlag::WhiteoutNoReplace) {
            let whiteout = self.insert(Body::Whiteout, 0, from_dir);
            self.inherit_group(whiteout, from_dir);
            if let Some(default) = self.node(from_dir).default {
                self.node_mut(whiteout).inherit(default);
            }
            self.entries(from_dir).insert(from_name.to_owned(), whiteout);
        }
        Ok(Reply::Done)
    }

    pub(super) fn reparent(&mut self, ino: u64, to: u64) {
        if self.node(ino).is_dir() {
            let old = self.node(ino).parent;
            self.node_mut(old).nlink -= 1;
            self.node_mut(to).nlink += 1;
            self.node_mut(ino).parent = to;
        }
    }
}
