//! The POSIX oracle: the semantics of the file system, in memory, for one process at a time. The one definition of what is
//! right: everything else (the file system over a disk in memory, the simulated cluster, a real mount) is compared with it.
//!
//! Identity and times are relations: inode numbers must be in one-to-one correspondence; a time must stay what it was
//! while the oracle's counter of changes does, and be a later one when it rises (`compare`).
//!
//! Here: the state, paths, descriptors, and what each operation does to an inode. What it does to names is in `names`, who may do
//! it in `rights`, the bytes of files in `contents`.
//!
//! Excludes: crashes (`sim` has its own checkers), space.

use crate::op::{Acl, Fallocate, FileKind, Op, OpenHow, Outcome, Reply, Special, Stat, User, XattrHow, errno::*, pattern};
use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};

mod compare;
mod contents;
mod names;
mod rights;
pub use compare::Comparer;
use contents::Contents;
use rights::{READ, SEARCH, WRITE};

/// Longest name in bytes.
pub const NAME_MAX: usize = 255;
/// The largest file.
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;
const LINKS_FOLLOWED_MAX: u32 = 40;
const ROOT: u64 = 1;

#[derive(Clone, Debug)]
enum Body {
    File(Contents),
    Dir(BTreeMap<String, u64>),
    Symlink(String),
    Fifo,
    /// Or another device, or a socket.
    Whiteout,
}

#[derive(Clone, Debug)]
struct Node {
    body: Body,
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u32,
    xattrs: BTreeMap<String, Vec<u8>>,
    /// Lists that say more than the mode: for access, and for new files.
    access: Option<Acl>,
    default: Option<Acl>,
    mtime: i64,
    ctime: i64,
    mtime_set: Option<i64>,
    mtime_sets: u32,
    /// Descriptors that are open on it.
    opens: u32,
    /// Of a directory: the one that it is in.
    parent: u64,
}

impl Node {
    fn kind(&self) -> FileKind {
        match self.body {
            Body::File(_) => FileKind::File,
            Body::Dir(_) => FileKind::Dir,
            Body::Symlink(_) => FileKind::Symlink,
            Body::Fifo => FileKind::Fifo,
            Body::Whiteout => FileKind::Other,
        }
    }

    fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir(_))
    }

    /// Sets the permissions; the access list follows.
    fn set_mode(&mut self, mode: u32) {
        self.mode = mode;
        let bits = |shift: u32| (mode >> shift & 7) as u16;
        if let Some(acl) = &mut self.access {
            (acl.owner, acl.other) = (bits(6), bits(0));
            if let Some((_, mask)) = &mut acl.named {
                *mask = bits(3);
            }
        }
    }

    /// Sets the access list; the permissions follow, and say all if nobody is named.
    fn set_access(&mut self, acl: Acl) {
        let group = acl.named.map_or(acl.group, |(_, mask)| mask);
        self.mode = self.mode & !0o777 | u32::from(acl.owner) << 6 | u32::from(group) << 3 | u32::from(acl.other);
        self.access = acl.named.is_some().then_some(acl);
    }

    /// What a new file gets from its directory's default list.
    fn inherit(&mut self, default: Acl) {
        let wanted = self.mode;
        self.set_access(default);
        let allowed = self.mode & 0o777 | !0o777;
        self.set_mode(wanted & allowed);
        if self.is_dir() {
            self.default = Some(default);
        }
    }
}

/// In what a file system or its machine differs from others.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traits {
    /// `/proc/sys/fs/protected_hardlinks` is set.
    pub protects_links: bool,
    /// It is ext4, which puts a whiteout in the old name's place before it finds that the new name is a directory that is not
    /// empty, and takes it back: the directory's times show it. (XFS looks first; an error should change nothing.)
    pub shows_failed_whiteouts: bool,
    /// Two changes may have the same time: it takes its time from the kernel's tick, as local file systems do. (Pulsar makes each
    /// change of an inode later than the one before, whatever the clock says.)
    pub coarse_times: bool,
}

/// The oracle: one file system, and the descriptors that processes have open on it.
#[derive(Clone, Debug)]
pub struct Oracle {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    tick: i64,
    slots: BTreeMap<(usize, u8), (u64, OpenHow)>,
    /// Who acts just now.
    actor: User,
    traits: Traits,
}

impl Default for Oracle {
    fn default() -> Self {
        Self::new()
    }
}

impl Oracle {
    /// An empty file system.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Traits::default())
    }

    /// One to be compared with something of these traits.
    #[must_use]
    pub fn with(traits: Traits) -> Self {
        let actor = User::default();
        let mut oracle = Oracle { nodes: BTreeMap::new(), next: ROOT, tick: 0, slots: BTreeMap::new(), actor, traits };
        let root = oracle.insert(Body::Dir(BTreeMap::new()), 0o755, ROOT);
        debug_assert_eq!(root, ROOT);
        oracle
    }

    fn insert(&mut self, body: Body, mode: u32, parent: u64) -> u64 {
        let ino = self.next;
        self.next += 1;
        let nlink = if matches!(body, Body::Dir(_)) { 2 } else { 1 };
        let (tick, User { uid, gid }) = (self.tick, self.actor);
        let node = Node {
            body,
            mode,
            uid,
            gid,
            nlink,
            xattrs: BTreeMap::new(),
            access: None,
            default: None,
            mtime: tick,
            ctime: tick,
            mtime_set: None,
            mtime_sets: 0,
            opens: 0,
            parent,
        };
        self.nodes.insert(ino, node);
        ino
    }

    fn node(&self, ino: u64) -> &Node {
        &self.nodes[&ino]
    }

    fn node_mut(&mut self, ino: u64) -> &mut Node {
        self.nodes.get_mut(&ino).expect("the oracle's inode is there")
    }

    fn dir(&self, ino: u64) -> Result<&BTreeMap<String, u64>, i32> {
        match &self.node(ino).body {
            Body::Dir(entries) => Ok(entries),
            _ => Err(ENOTDIR),
        }
    }

    fn entries(&mut self, ino: u64) -> &mut BTreeMap<String, u64> {
        match &mut self.node_mut(ino).body {
            Body::Dir(entries) => entries,
            _ => unreachable!("checked to be a directory"),
        }
    }

    /// Walks to the directory of a path's last name.
    fn parent<'a>(&self, path: &'a str) -> Result<(u64, &'a str), i32> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = self.resolve(dir, true)?;
        self.dir(dir)?;
        self.check(dir, SEARCH)?;
        Ok((dir, name))
    }

    fn child(&self, dir: u64, name: &str) -> Result<u64, i32> {
        let entries = self.dir(dir)?;
        if name.len() > NAME_MAX {
            return Err(ENAMETOOLONG);
        }
        entries.get(name).copied().ok_or(ENOENT)
    }

    fn resolve(&self, path: &str, follow: bool) -> Result<u64, i32> {
        let mut followed = 0;
        self.walk(ROOT, path, follow, &mut followed)
    }

    fn walk(&self, start: u64, path: &str, follow: bool, followed: &mut u32) -> Result<u64, i32> {
        let mut at = start;
        let mut names = path.split('/').filter(|n| !n.is_empty()).peekable();
        while let Some(name) = names.next() {
            let dir = at;
            self.dir(dir)?;
            self.check(dir, SEARCH)?;
            let child = self.child(dir, name)?;
            at = child;
            if let Body::Symlink(target) = &self.node(child).body
                && (follow || names.peek().is_some())
            {
                *followed += 1;
                if *followed > LINKS_FOLLOWED_MAX {
                    return Err(ELOOP);
                }
                at = self.walk(dir, target, true, followed)?;
            }
        }
        Ok(at)
    }

    fn slot(&self, node: usize, slot: u8) -> Result<(u64, OpenHow), i32> {
        self.slots.get(&(node, slot)).copied().ok_or(EBADF)
    }

    /// Whether an operation would open a FIFO, which can block, a whiteout, which is no device, or a directory (which, once it is removed on another node,
    /// cannot be asked for anything): generators leave such operations out.
    #[must_use]
    pub fn opens_unsuited(&self, op: &Op) -> bool {
        let Op::Open { path, how, .. } = op.inner() else { return false };
        self.resolve(path, false).is_ok_and(|ino| match self.node(ino).kind() {
            FileKind::Fifo | FileKind::Other => true,
            FileKind::Dir => !how.write && !how.create,
            _ => false,
        })
    }

    /// All paths, in order, with what they are.
    #[must_use]
    pub fn tree(&self) -> Vec<(String, FileKind)> {
        let mut out = Vec::new();
        self.tree_below(ROOT, "", &mut out);
        out
    }

    fn tree_below(&self, dir: u64, prefix: &str, out: &mut Vec<(String, FileKind)>) {
        let Body::Dir(entries) = &self.node(dir).body else { return };
        for (name, ino) in entries {
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
            out.push((path.clone(), self.node(*ino).kind()));
            self.tree_below(*ino, &path, out);
        }
    }

    /// A node's process died: its descriptors are closed.
    pub fn close_all(&mut self, node: usize) {
        let slots: Vec<_> = self.slots.range((node, 0)..=(node, u8::MAX)).map(|(k, _)| *k).collect();
        for (_, slot) in slots {
            let _ = self.close(node, slot);
        }
    }

    fn close(&mut self, node: usize, slot: u8) -> Outcome {
        let (ino, _) = self.slots.remove(&(node, slot)).ok_or(EBADF)?;
        self.node_mut(ino).opens -= 1;
        self.reap(ino);
        Ok(Reply::Done)
    }

    fn reap(&mut self, ino: u64) {
        let node = self.node(ino);
        if node.nlink == 0 && node.opens == 0 {
            self.nodes.remove(&ino);
        }
    }

    fn touch_data(&mut self, ino: u64) {
        let tick = self.tick;
        let node = self.node_mut(ino);
        node.mtime = tick;
        node.ctime = tick;
        node.mtime_set = None;
    }

    fn touch_inode(&mut self, ino: u64) {
        let tick = self.tick;
        self.node_mut(ino).ctime = tick;
    }

    /// Runs an operation of a node.
    pub fn run(&mut self, node: usize, op: &Op) -> Outcome {
        self.tick += 1;
        match op {
            Op::As { user, op } => {
                self.actor = *user;
                let outcome = self.run(node, op);
                self.actor = User::default();
                outcome
            }
            Op::Mkdir { path, mode } => self.create(path, Body::Dir(BTreeMap::new()), *mode).map(|_| Reply::Done),
            Op::Mknod { path, fifo, mode } => {
                let body = if *fifo { Body::Fifo } else { Body::File(Contents::default()) };
                self.create(path, body, *mode).map(|_| Reply::Done)
            }
            Op::MknodSpecial { path, what, mode } => {
                if *what != Special::Socket && !self.actor.is_root() {
                    // Nothing else may be wrong with it, for this to be said.
                    let (dir, name) = self.parent(path)?;
                    return Err(match self.child(dir, name) {
                        Ok(_) => EEXIST,
                        Err(ENOENT) => self.check(dir, WRITE | SEARCH).err().unwrap_or(EPERM),
                        Err(e) => e,
                    });
                }
                self.create(path, Body::Whiteout, *mode).map(|_| Reply::Done)
            }
            Op::Symlink { target, path } => self.create(path, Body::Symlink(target.clone()), 0o777).map(|_| Reply::Done),
            Op::Link { from, to } => self.link(from, to),
            Op::Unlink { path } => self.unlink(path),
            Op::Rmdir { path } => self.rmdir(path),
            Op::Rename { from, to, flag } => self.rename(from, to, *flag),
            Op::Open { slot, path, how } => self.open(node, *slot, path, *how),
            Op::Close { slot } => self.close(node, *slot),
            Op::Read { slot, offset, len } => {
                let (ino, how) = self.slot(node, *slot)?;
                if !how.read {
                    return Err(EBADF);
                }
                match &self.node(ino).body {
                    Body::File(contents) => Ok(Reply::Bytes(contents.read(*offset, u64::from(*len)))),
                    _ => Err(EISDIR),
                }
            }
            Op::Write { slot, offset, len, fill } => self.write(node, *slot, *offset, *len, *fill),
            Op::Truncate { slot, size } => {
                let (ino, how) = self.slot(node, *slot)?;
                if !how.write {
                    return Err(EINVAL);
                }
                if *size > FILE_SIZE_MAX {
                    return Err(EFBIG);
                }
                if let Body::File(contents) = &mut self.node_mut(ino).body {
                    contents.resize(*size);
                }
                self.drop_set_ids(ino, true);
                self.touch_data(ino);
                Ok(Reply::Done)
            }
            Op::TruncatePath { path, size } => {
                let ino = self.resolve(path, true)?;
                match self.node(ino).body {
                    Body::Dir(_) => return Err(EISDIR),
                    Body::File(_) => self.check(ino, WRITE)?,
                    _ => return Err(EINVAL),
                }
                match &mut self.node_mut(ino).body {
                    Body::File(contents) if *size <= FILE_SIZE_MAX => contents.resize(*size),
                    _ => return Err(EFBIG),
                }
                self.drop_set_ids(ino, true);
                self.touch_data(ino);
                Ok(Reply::Done)
            }
            Op::Seek { slot, offset, data } => match &self.node(self.slot(node, *slot)?.0).body {
                Body::File(contents) => contents.places(*offset, *data),
                _ => Err(EINVAL),
            },
            Op::Copy { from, from_offset, to, to_offset, len } => self.copy(node, (*from, *from_offset), (*to, *to_offset), *len),
            Op::Fallocate { slot, what, offset, len } => self.fallocate(node, *slot, *what, *offset, *len),
            Op::Fsync { slot } => self.slot(node, *slot).map(|_| Reply::Done),
            Op::Fstat { slot } => self.slot(node, *slot).map(|(ino, _)| self.stat(ino)),
            Op::Stat { path } => self.resolve(path, false).map(|ino| self.stat(ino)),
            Op::Readlink { path } => match &self.node(self.resolve(path, false)?).body {
                Body::Symlink(target) => Ok(Reply::Target(target.clone())),
                _ => Err(EINVAL),
            },
            Op::Readdir { path } => {
                let dir = self.resolve(path, true)?;
                self.dir(dir)?;
                self.check(dir, READ)?;
                let names = self.dir(dir)?.iter().map(|(name, ino)| (name.clone(), self.node(*ino).kind())).collect();
                Ok(Reply::Names(names))
            }
            Op::FsyncDir { path } => {
                let dir = self.resolve(path, true)?;
                self.dir(dir)?;
                self.check(dir, READ)?;
                Ok(Reply::Done)
            }
            Op::Chmod { path, mode } => {
                let ino = self.resolve(path, true)?;
                self.check_owner(ino)?;
                let mode = self.grantable(*mode, self.node(ino).gid);
                self.node_mut(ino).set_mode(mode);
                self.touch_inode(ino);
                Ok(Reply::Done)
            }
            Op::Chown { path, uid, gid } => {
                let ino = self.resolve(path, true)?;
                self.check_chown(ino, *uid, *gid)?;
                self.drop_set_ids(ino, false);
                let node = self.node_mut(ino);
                (node.uid, node.gid) = (*uid, *gid);
                self.touch_inode(ino);
                Ok(Reply::Done)
            }
            Op::Utimes { path, mtime } => {
                let ino = self.resolve(path, true)?;
                self.check_owner(ino)?;
                self.touch_data(ino);
                let node = self.node_mut(ino);
                node.mtime_set = Some(i64::from(*mtime));
                node.mtime_sets += 1;
                Ok(Reply::Done)
            }
            Op::SetXattr { path, name, fill, len, how } => {
                let ino = self.attributed(path, name, true)?;
                let known = self.node(ino).xattrs.contains_key(name);
                match how {
                    XattrHow::Create if known => return Err(EEXIST),
                    XattrHow::Replace if !known => return Err(ENODATA),
                    _ => {}
                }
                self.node_mut(ino).xattrs.insert(name.clone(), pattern(*fill, 0, *len as usize));
                self.touch_inode(ino);
                Ok(Reply::Done)
            }
            Op::GetXattr { path, name } => {
                let ino = self.attributed(path, name, false)?;
                self.node(ino).xattrs.get(name).cloned().map(Reply::Bytes).ok_or(ENODATA)
            }
            Op::ListXattr { path } => {
                let ino = self.resolve(path, true)?;
                let node = self.node(ino);
                let lists = [(node.access, false), (node.default, true)].into_iter().filter(|(acl, _)| acl.is_some());
                let lists = lists.map(|(_, default)| Acl::attribute(default).to_owned());
                let mut names: Vec<_> = lists.chain(node.xattrs.keys().cloned()).collect();
                names.retain(|name| self.actor.is_root() || !name.starts_with("trusted."));
                Ok(Reply::Attributes(names))
            }
            Op::RemoveXattr { path, name } => {
                let ino = self.attributed(path, name, true)?;
                self.node_mut(ino).xattrs.remove(name).ok_or(ENODATA)?;
                self.touch_inode(ino);
                Ok(Reply::Done)
            }
            Op::SetAcl { path, acl, default } => {
                let ino = self.resolve(path, true)?;
                if *default && !self.node(ino).is_dir() {
                    return Err(EACCES);
                }
                self.check_owner(ino)?;
                let node = self.node_mut(ino);
                match default {
                    true => node.default = Some(*acl),
                    false => {
                        node.set_access(*acl);
                        let (mode, gid) = (node.mode, node.gid);
                        self.node_mut(ino).mode = self.grantable(mode, gid);
                    }
                }
                self.touch_inode(ino);
                Ok(Reply::Done)
            }
            Op::GetAcl { path, default } => {
                let node = self.node(self.resolve(path, true)?);
                let acl = if *default { node.default } else { node.access };
                acl.map(|acl| Reply::Bytes(acl.encode())).ok_or(ENODATA)
            }
        }
    }

    /// An inode that may have the attribute: `user.` ones only files and directories.
    fn attributed(&self, path: &str, name: &str, write: bool) -> Result<u64, i32> {
        let ino = self.resolve(path, true)?;
        let otherwise = if write { EPERM } else { ENODATA };
        if name.starts_with("user.") && !matches!(self.node(ino).kind(), FileKind::File | FileKind::Dir) {
            return Err(otherwise);
        }
        self.check_attribute(ino, name, write, otherwise)?;
        Ok(ino)
    }

    fn stat(&self, ino: u64) -> Reply {
        let node = self.node(ino);
        let size = match &node.body {
            Body::File(contents) => contents.size,
            Body::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        Reply::Stat(Stat {
            ino,
            kind: node.kind(),
            mode: node.mode,
            nlink: node.nlink,
            uid: node.uid,
            gid: node.gid,
            size,
            mtime: (node.mtime, 0),
            ctime: (node.ctime, 0),
            atime: (0, 0),
            mtime_set: node.mtime_set,
            mtime_sets: node.mtime_sets,
        })
    }

    fn open(&mut self, node: usize, slot: u8, path: &str, how: OpenHow) -> Outcome {
        let found = match self.resolve(path, false) {
            Err(ENOENT) if how.create => None,
            found => Some(found?),
        };
        let ino = match found {
            Some(_) if how.create && how.exclusive => return Err(EEXIST),
            Some(ino) => {
                match &self.node(ino).body {
                    Body::Symlink(_) if how.create => {
                        self.check_sticky_link(self.parent(path)?.0, ino)?;
                        return Err(ELOOP);
                    }
                    Body::Symlink(_) => return Err(ELOOP),
                    Body::Whiteout => return Err(ENXIO),
                    Body::Dir(_) if how.write || how.create || how.truncate => return Err(EISDIR),
                    _ => {}
                }
                let rights = [(how.read || !how.write, READ), (how.write, WRITE)];
                self.check(ino, rights.into_iter().filter(|(asked, _)| *asked).map(|(_, right)| right).sum())?;
                if how.truncate {
                    if let Body::File(contents) = &mut self.node_mut(ino).body {
                        contents.resize(0);
                    }
                    self.drop_set_ids(ino, true);
                    self.touch_data(ino);
                }
                ino
            }
            None => self.create(path, Body::File(Contents::default()), 0o644)?,
        };
        self.node_mut(ino).opens += 1;
        if let Some((old, _)) = self.slots.insert((node, slot), (ino, how)) {
            // The driver closes what was open in the slot before.
            self.node_mut(old).opens -= 1;
            self.reap(old);
        }
        Ok(Reply::Done)
    }

    fn write(&mut self, node: usize, slot: u8, offset: u64, len: u32, fill: u32) -> Outcome {
        let (ino, how) = self.slot(node, slot)?;
        if !how.write {
            return Err(EBADF);
        }
        if len == 0 {
            return Ok(Reply::Written(0));
        }
        let Body::File(contents) = &mut self.node_mut(ino).body else { return Err(EBADF) };
        let offset = if how.append { contents.size } else { offset };
        if offset.saturating_add(u64::from(len)) > FILE_SIZE_MAX {
            return Err(EFBIG);
        }
        contents.write(offset, &pattern(fill, 0, len as usize));
        self.drop_set_ids(ino, true);
        self.touch_data(ino);
        Ok(Reply::Written(u64::from(len)))
    }

    fn copy(&mut self, node: usize, from: (u8, u64), to: (u8, u64), len: u32) -> Outcome {
        let (source, how) = self.slot(node, from.0)?;
        let (target, to_how) = self.slot(node, to.0)?;
        if !how.read || !to_how.write || to_how.append {
            return Err(EBADF);
        }
        let Body::File(contents) = &self.node(source).body else { return Err(EINVAL) };
        let len = u64::from(len).min(contents.size.saturating_sub(from.1));
        if len > 0 && to.1.saturating_add(len) > FILE_SIZE_MAX {
            return Err(EFBIG);
        }
        if source == target && from.1.max(to.1) < from.1.min(to.1) + len {
            return Err(EINVAL);
        }
        let bytes = contents.read(from.1, len);
        if let Body::File(contents) = &mut self.node_mut(target).body
            && len > 0
        {
            contents.write(to.1, &bytes);
            self.drop_set_ids(target, true);
            self.touch_data(target);
        }
        Ok(Reply::Written(len))
    }

    fn fallocate(&mut self, node: usize, slot: u8, what: Fallocate, offset: u64, len: u64) -> Outcome {
        let (ino, how) = self.slot(node, slot)?;
        if !how.write {
            return Err(EBADF);
        }
        let Some(end) = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX) else { return Err(EFBIG) };
        let Body::File(contents) = &mut self.node_mut(ino).body else { return Err(EBADF) };
        match what {
            Fallocate::Allocate => contents.size = contents.size.max(end),
            Fallocate::KeepSize => {}
            Fallocate::PunchHole => contents.zero(offset, end),
            Fallocate::ZeroRange => {
                contents.zero(offset, end);
                contents.size = contents.size.max(end);
            }
        }
        self.drop_set_ids(ino, true);
        self.touch_data(ino);
        Ok(Reply::Done)
    }
}

/// For the search of an order of concurrent calls (`history`).
impl Oracle {
    /// The inode that a path leads to; a last symbolic link is not followed.
    ///
    /// # Errors
    /// As `lstat`.
    pub fn find(&self, path: &str) -> Result<u64, i32> {
        self.resolve(path, false)
    }

    /// The times of the directory that a path's last name is in may have changed.
    pub fn touch_parent(&mut self, path: &str) {
        if let Ok((dir, _)) = self.parent(path) {
            self.touch_data(dir);
        }
    }

    /// Attributes of an inode, if it is there.
    #[must_use]
    pub fn attributes(&self, ino: u64) -> Option<Stat> {
        match self.nodes.get(&ino).map(|_| self.stat(ino)) {
            Some(Reply::Stat(stat)) => Some(stat),
            _ => None,
        }
    }

    /// The second half of `link`: the file was found before, and may have gone since.
    ///
    /// # Errors
    /// As `link`.
    pub fn link_found(&mut self, ino: u64, to: &str) -> Outcome {
        self.tick += 1;
        self.link_inode(ino, to)
    }

    /// Tells states apart: all but times, and the numbers that inodes happen to have. Returns those by which it called the
    /// inodes.
    pub fn fingerprint(&self, hasher: &mut impl Hasher) -> BTreeMap<u64, u64> {
        let mut numbers = BTreeMap::from([(ROOT, 0)]);
        let mut order = vec![ROOT];
        let mut at = 0;
        let mut number = |ino: u64, order: &mut Vec<u64>| {
            let next = numbers.len() as u64;
            *numbers.entry(ino).or_insert_with(|| {
                order.push(ino);
                next
            })
        };
        for (slot, (ino, how)) in &self.slots {
            (slot, number(*ino, &mut order), how.read, how.write, how.append).hash(hasher);
        }
        while let Some(ino) = order.get(at).copied() {
            at += 1;
            let node = self.node(ino);
            (node.kind(), node.mode, node.uid, node.gid, node.nlink, &node.xattrs, node.access, node.default).hash(hasher);
            match &node.body {
                Body::File(contents) => contents.hash(hasher),
                Body::Dir(entries) => {
                    entries.len().hash(hasher);
                    entries.iter().for_each(|(name, ino)| (name, number(*ino, &mut order)).hash(hasher));
                }
                Body::Symlink(target) => target.hash(hasher),
                Body::Fifo | Body::Whiteout => {}
            }
        }
        numbers
    }

    /// Whether an inode of the oracle still exists.
    #[must_use]
    pub fn is_live(&self, ino: u64) -> bool {
        self.nodes.contains_key(&ino)
    }
}
