//! The POSIX oracle: the semantics of the file system, in memory, for one process at a time. The one definition of what is
//! right: everything else (the file system over a disk in memory, the simulated cluster, a real mount) is compared with it.
//!
//! Identity and times are relations: inode numbers must be in one-to-one correspondence; a time must stay what it was
//! while the oracle's counter of changes does, and be a later one when it rises.
//!
//! Excludes: crashes (`sim` has its own checkers), space.

use crate::op::{
    Acl, Fallocate, FileKind, Op, OpenHow, Outcome, RenameFlag, Reply, Special, Stat, User, XattrHow, errno::*, pattern,
};
use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

mod rights;
use rights::{READ, SEARCH, WRITE};

/// Longest name in bytes.
pub const NAME_MAX: usize = 255;
/// The largest file. (Generated offsets stay below 16 TiB: the local file systems that the oracle is compared with end there.)
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;
const PAGE: u64 = 4096;
const LINKS_FOLLOWED_MAX: u32 = 40;
const ROOT: u64 = 1;

/// A file's contents: pages that are not all zero, and a size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Contents {
    size: u64,
    pages: BTreeMap<u64, Arc<[u8]>>,
}

impl Contents {
    fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return Vec::new();
        }
        let mut out = vec![0; (end - offset) as usize];
        for (page, data) in self.pages.range(offset / PAGE..=(end - 1) / PAGE) {
            let from = (page * PAGE).max(offset);
            let to = ((page + 1) * PAGE).min(end);
            out[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&data[(from - page * PAGE) as usize..(to - page * PAGE) as usize]);
        }
        out
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let page = at / PAGE;
            let to = ((page + 1) * PAGE).min(end);
            let data = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            Arc::make_mut(data)[(at - page * PAGE) as usize..(to - page * PAGE) as usize]
                .copy_from_slice(&bytes[(at - offset) as usize..(to - offset) as usize]);
            at = to;
        }
        self.size = self.size.max(end);
    }

    fn zero(&mut self, offset: u64, end: u64) {
        if offset >= end {
            return;
        }
        let pages: Vec<u64> = self.pages.range(offset / PAGE..=(end - 1) / PAGE).map(|(p, _)| *p).collect();
        for page in pages {
            let from = (page * PAGE).max(offset) - page * PAGE;
            let to = ((page + 1) * PAGE).min(end) - page * PAGE;
            if from == 0 && to == PAGE {
                self.pages.remove(&page);
            } else if let Some(data) = self.pages.get_mut(&page) {
                Arc::make_mut(data)[from as usize..to as usize].fill(0);
            }
        }
    }

    /// The first byte from a place on that is not zero.
    fn first_byte(&self, from: u64) -> Option<u64> {
        self.pages.range(from / PAGE..).find_map(|(page, data)| {
            let start = from.saturating_sub(page * PAGE).min(PAGE) as usize;
            data[start..].iter().position(|b| *b != 0).map(|at| page * PAGE + (start + at) as u64)
        })
    }

    /// Where a seek may end. What is not zero is data; a hole has zeros up to the end of its page.
    fn places(&self, offset: u64, data: bool) -> Outcome {
        if offset >= self.size {
            return Err(ENXIO);
        }
        let first = self.first_byte(offset);
        if data {
            return Ok(Reply::Places(vec![(offset, first.unwrap_or(self.size - 1))], first.is_none()));
        }
        let mut ranges = Vec::new();
        let mut at = offset;
        for (page, bytes) in self.pages.range(offset / PAGE..) {
            let start = page * PAGE;
            if at < start {
                ranges.push((at, start - 1));
                at = start;
            }
            let zeros = bytes.iter().rev().take_while(|b| **b == 0).count() as u64;
            let from = (start + PAGE - zeros).max(at);
            if from < start + PAGE {
                ranges.push((from, start + PAGE - 1));
            }
            at = start + PAGE;
        }
        ranges.push((at, self.size.max(at)));
        ranges.push((self.size, self.size));
        Ok(Reply::Places(ranges, false))
    }

    fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size.div_ceil(PAGE) * PAGE);
        }
        self.size = size;
    }
}

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
    /// It is not asked who is in a file's group: set-group-id without the right to execute, which lets nobody act as the group,
    /// stays whoever changes the file (docs/semantics.md).
    pub keeps_lock_mode: bool,
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

    fn create(&mut self, path: &str, body: Body, mode: u32) -> Result<u64, i32> {
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
    fn inherit_group(&mut self, ino: u64, dir: u64) {
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
    fn drop_link(&mut self, ino: u64) {
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

    fn link(&mut self, from: &str, to: &str) -> Outcome {
        let ino = self.resolve(from, false)?;
        self.link_inode(ino, to)
    }

    fn link_inode(&mut self, ino: u64, to: &str) -> Outcome {
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

    fn unlink(&mut self, path: &str) -> Outcome {
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

    fn rmdir(&mut self, path: &str) -> Outcome {
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
    fn is_below(&self, dir: u64, ancestor: u64) -> bool {
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

    fn rename(&mut self, from: &str, to: &str, flag: RenameFlag) -> Outcome {
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

    fn reparent(&mut self, ino: u64, to: u64) {
        if self.node(ino).is_dir() {
            let old = self.node(ino).parent;
            self.node_mut(old).nlink -= 1;
            self.node_mut(to).nlink += 1;
            self.node_mut(ino).parent = to;
        }
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
            Fallocate::PunchHole => {
                let to = end.min(contents.size.div_ceil(PAGE) * PAGE);
                contents.zero(offset, to);
            }
            Fallocate::ZeroRange => {
                let to = end.min(contents.size.div_ceil(PAGE) * PAGE);
                contents.zero(offset, to);
                contents.size = contents.size.max(end);
            }
        }
        self.drop_set_ids(ino, true);
        self.touch_data(ino);
        Ok(Reply::Done)
    }
}

/// Compares answers with the oracle's: keeps the relations of identities and times.
#[derive(Clone, Debug, Default)]
pub struct Comparer {
    real_of: BTreeMap<u64, u64>,
    times: BTreeMap<u64, (Stat, Stat)>,
    traits: Traits,
}

impl Comparer {
    /// For answers of something of these traits.
    #[must_use]
    pub fn with(traits: Traits) -> Self {
        Comparer { traits, ..Comparer::default() }
    }

    /// An error says how an answer differs from what is right.
    pub fn compare(&mut self, op: &Op, right: &Outcome, got: &Outcome) -> Result<(), String> {
        let wrong = || Err(format!("{op:?}: expected {right:?}, got {got:?}"));
        match (right, got) {
            (Ok(Reply::Stat(right)), Ok(Reply::Stat(got))) => {
                self.compare_stat(right, got).map_err(|what| format!("{op:?}: {what}: expected {right:?}, got {got:?}"))
            }
            (Ok(Reply::Places(ranges, nowhere)), got) => match got {
                Ok(Reply::At(at)) if ranges.iter().any(|(first, last)| (first..=last).contains(&at)) => Ok(()),
                Err(ENXIO) if *nowhere => Ok(()),
                _ => wrong(),
            },
            (right, got) if right == got => Ok(()),
            _ => wrong(),
        }
    }

    fn compare_stat(&mut self, right: &Stat, got: &Stat) -> Result<(), &'static str> {
        let same = |a: bool, what| if a { Ok(()) } else { Err(what) };
        same(right.kind == got.kind, "kind")?;
        same(right.mode == got.mode, "mode")?;
        same((right.uid, right.gid) == (got.uid, got.gid), "owner")?;
        same(right.kind == FileKind::Dir || right.nlink == got.nlink, "nlink")?;
        let sized = matches!(right.kind, FileKind::File | FileKind::Symlink);
        same(!sized || right.size == got.size, "size")?;
        same(*self.real_of.entry(right.ino).or_insert(got.ino) == got.ino, "identity: another inode number than before")?;
        if let Some(seconds) = right.mtime_set {
            same(got.mtime == (seconds, 0), "mtime is not what was set")?;
        }
        let later = |old: (i64, u32), new: (i64, u32)| old < new || old == new && self.traits.coarse_times;
        if let Some((old_right, old_got)) = self.times.insert(right.ino, (*right, *got)) {
            if old_right.mtime == right.mtime {
                same(old_got.mtime == got.mtime, "mtime changed without a change of the data")?;
            } else if right.mtime_sets == old_right.mtime_sets && old_right.mtime_set.is_none() {
                same(later(old_got.mtime, got.mtime), "mtime is not later though the data was changed")?;
            } else if right.mtime_sets == old_right.mtime_sets {
                // It was set by a program before, perhaps to one far ahead, which a change takes back.
                same(old_got.mtime != got.mtime, "mtime is what a program set though the data was changed since")?;
            }
            // Otherwise a program set another one in between: what was there before it says nothing.
            if old_right.ctime == right.ctime {
                same(old_got.ctime == got.ctime, "ctime changed without a change of the inode")?;
            } else {
                same(later(old_got.ctime, got.ctime), "ctime is not later though the inode was changed")?;
            }
            // Which reads there were says little (the kernel answers some, and the time of others is set later), but once it
            // is later than the last change it stays for a day, whatever is read.
            let unchanged = (old_right.mtime, old_right.ctime) == (right.mtime, right.ctime);
            if unchanged && old_got.atime > old_got.mtime.max(old_got.ctime) {
                same(old_got.atime == got.atime, "atime changed though it was later than the last change")?;
            }
            same(old_got.atime <= got.atime, "atime went back")?;
        }
        Ok(())
    }

    /// Two inodes that live at the same time must differ: no two oracle inodes seen have one number.
    pub fn check_identities(&self, live: impl Fn(u64) -> bool) -> Result<(), String> {
        let mut seen = BTreeMap::new();
        for (oracle, real) in self.real_of.iter().filter(|(o, _)| live(**o)) {
            if let Some(other) = seen.insert(*real, *oracle) {
                return Err(format!("two files have inode number {real} (the oracle's {oracle} and {other})"));
            }
        }
        Ok(())
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
                Body::File(contents) => {
                    let pages = contents.pages.iter().filter(|(_, data)| data.iter().any(|b| *b != 0));
                    (contents.size, pages.collect::<Vec<_>>()).hash(hasher);
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::OpenHow;

    #[test]
    fn a_change_has_a_later_time_unless_a_program_set_one_in_between() {
        let mut oracle = Oracle::new();
        let path = || "a".to_owned();
        let how = OpenHow { write: true, create: true, ..OpenHow::default() };
        let write = Op::Write { slot: 0, offset: 0, len: 1, fill: 1 };
        let (chmod, utimes) = (Op::Chmod { path: path(), mode: 0o600 }, Op::Utimes { path: path(), mtime: 7 });
        let stat = Op::Stat { path: path() };
        oracle.run(0, &Op::Open { slot: 0, path: path(), how }).unwrap();
        // What is done before each look, and the mtime and ctime that are seen then.
        let mut seen = |traits: Traits, steps: &[(&[&Op], i64, i64)]| {
            let mut comparer = Comparer::with(traits);
            let mut result = Ok(());
            for (before, mtime, ctime) in steps {
                before.iter().for_each(|op| drop(oracle.run(0, op).unwrap()));
                let right = oracle.run(0, &stat).unwrap();
                let Reply::Stat(mut got) = right.clone() else { panic!("not a stat") };
                (got.mtime, got.ctime) = ((*mtime, 0), (*ctime, 0));
                result = result.and_then(|()| comparer.compare(&stat, &Ok(right), &Ok(Reply::Stat(got))));
            }
            result
        };
        let (fine, coarse) = (Traits::default(), Traits { coarse_times: true, ..Traits::default() });
        seen(fine, &[(&[], 50, 50), (&[&write], 51, 51), (&[&chmod], 51, 52), (&[], 51, 52)]).unwrap();
        for (mtime, ctime, what) in [(50, 51, "mtime is not later"), (51, 50, "ctime is not later")] {
            assert!(seen(fine, &[(&[], 50, 50), (&[&write], mtime, ctime)]).unwrap_err().contains(what));
            seen(coarse, &[(&[], 50, 50), (&[&write], mtime, ctime)]).unwrap();
        }
        assert!(seen(coarse, &[(&[], 50, 50), (&[&write], 49, 51)]).unwrap_err().contains("mtime is not later"));
        assert!(seen(fine, &[(&[], 50, 50), (&[&chmod], 51, 51)]).unwrap_err().contains("without a change of the data"));
        assert!(seen(fine, &[(&[], 50, 50), (&[&chmod], 50, 50)]).unwrap_err().contains("ctime is not later"));
        // One that was set, in between or before, may be far ahead.
        seen(fine, &[(&[], 50, 50), (&[&utimes, &write], 49, 51)]).unwrap();
        seen(fine, &[(&[&utimes], 7, 50), (&[&write], 6, 51)]).unwrap();
        assert!(seen(fine, &[(&[&utimes], 7, 50), (&[&write], 7, 51)]).unwrap_err().contains("what a program set"));
    }

    #[test]
    fn an_access_time_changes_once_after_each_change() {
        let mut oracle = Oracle::new();
        let path = || "a".to_owned();
        let how = OpenHow { write: true, create: true, ..OpenHow::default() };
        oracle.run(0, &Op::Open { slot: 0, path: path(), how }).unwrap();
        let (write, stat) = (Op::Write { slot: 0, offset: 0, len: 1, fill: 1 }, Op::Stat { path: path() });
        // Whether the file is written before, and what atime is then; all changes are made in second 50.
        let mut seen = |steps: &[(bool, i64)]| {
            let mut comparer = Comparer::with(Traits { coarse_times: true, ..Traits::default() });
            let mut result = Ok(());
            for (change, atime) in steps {
                if *change {
                    oracle.run(0, &write).unwrap();
                }
                let right = oracle.run(0, &stat).unwrap();
                let Reply::Stat(mut got) = right.clone() else { panic!("not a stat") };
                (got.mtime, got.ctime, got.atime) = ((50, 0), (50, 0), (*atime, 0));
                result = comparer.compare(&stat, &Ok(right), &Ok(Reply::Stat(got)));
            }
            result
        };
        seen(&[(false, 50), (false, 51), (true, 51), (false, 52), (false, 52)]).unwrap();
        assert!(seen(&[(false, 51), (false, 52)]).unwrap_err().contains("later than the last change"));
        assert!(seen(&[(false, 51), (true, 50)]).unwrap_err().contains("went back"));
    }
}
