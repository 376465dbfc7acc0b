//! Runs operations on file systems directly, as the kernel would through FUSE: paths are walked name by name, symbolic links
//! are followed here, and access to descriptors is checked here.

use super::Driver;
use crate::op::{Acl, Fallocate, FileKind, Op, OpenHow, Outcome, RenameFlag, Reply, Special, Stat, XattrHow, errno::*, pattern};
use fs::ops::data::{Allocate, At, Payload, Seek};
use fs::ops::xattr::SetMode;
use fs::{
    Attributes, Caller, DirEntry, FileKind as NodeKind, FileSystem, FsError, Ino, NewNode, OpenFlags, RenameFlags, SetAttributes,
    SetTime, Time,
};
use sld::Disk;
use std::collections::BTreeMap;
use std::sync::Arc;

const LINKS_FOLLOWED_MAX: u32 = 40;
/// How often a rename begins again.
const AGAIN_MAX: u32 = 50;

/// The file system on several nodes; a node that is down has none.
pub struct NodeDriver<D: Disk> {
    nodes: Vec<Option<Arc<FileSystem<D>>>>,
    slots: BTreeMap<(usize, u8), (Ino, OpenHow)>,
}

fn err(error: &FsError) -> i32 {
    error.errno()
}

impl<D: Disk> NodeDriver<D> {
    /// Over the file systems of some nodes.
    #[must_use]
    pub fn new(nodes: Vec<Option<Arc<FileSystem<D>>>>) -> Self {
        NodeDriver { nodes, slots: BTreeMap::new() }
    }

    /// A node died: its descriptors are gone.
    pub fn down(&mut self, node: usize) {
        self.nodes[node] = None;
        self.slots.retain(|(n, _), _| *n != node);
    }

    /// Closes all descriptors of a node.
    pub async fn close_all(&mut self, node: usize) {
        let Some(fs) = self.nodes[node].clone() else { return };
        let slots: Vec<_> = self.slots.keys().filter(|(n, _)| *n == node).copied().collect();
        for slot in slots {
            if let Some((ino, _)) = self.slots.remove(&slot) {
                let _ = fs.close(ino).await;
            }
        }
    }

    /// A node is back.
    pub fn up(&mut self, node: usize, fs: Arc<FileSystem<D>>) {
        self.nodes[node] = Some(fs);
    }

    /// A node's file system, if it is up.
    #[must_use]
    pub fn fs(&self, node: usize) -> Option<Arc<FileSystem<D>>> {
        self.nodes[node].clone()
    }

    fn caller() -> Caller {
        Caller::default()
    }

    async fn lookup(fs: &FileSystem<D>, dir: Ino, name: &str) -> Result<Attributes, i32> {
        fs.lookup(dir, name.as_bytes()).await.map_err(|e| err(&e))
    }

    async fn walk(fs: &FileSystem<D>, path: &str, follow: bool) -> Result<Attributes, i32> {
        let mut at = fs.attributes(fs.root()).await.map_err(|e| err(&e))?;
        // The directory that a relative link starts from, at each level of following.
        let mut left: Vec<String> = path.split('/').filter(|n| !n.is_empty()).rev().map(str::to_owned).collect();
        let mut followed = 0;
        while let Some(name) = left.pop() {
            if at.kind != NodeKind::Directory {
                return Err(ENOTDIR);
            }
            let dir = at;
            at = Self::lookup(fs, dir.ino, &name).await?;
            if at.kind == NodeKind::Symlink && (follow || !left.is_empty()) {
                followed += 1;
                if followed > LINKS_FOLLOWED_MAX {
                    return Err(ELOOP);
                }
                let target = fs.read_link(at.ino).await.map_err(|e| err(&e))?;
                let target = String::from_utf8_lossy(&target).into_owned();
                left.extend(target.split('/').filter(|n| !n.is_empty()).rev().map(str::to_owned));
                at = dir;
            }
        }
        Ok(at)
    }

    async fn parent<'a>(fs: &FileSystem<D>, path: &'a str) -> Result<(Ino, &'a str), i32> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = Self::walk(fs, dir, true).await?;
        if dir.kind != NodeKind::Directory {
            return Err(ENOTDIR);
        }
        Ok((dir.ino, name))
    }

    fn slot(&self, node: usize, slot: u8) -> Result<(Ino, OpenHow), i32> {
        self.slots.get(&(node, slot)).copied().ok_or(EBADF)
    }

    fn writable(&self, node: usize, slot: u8, otherwise: i32) -> Result<(Ino, OpenHow), i32> {
        let (ino, how) = self.slot(node, slot)?;
        if how.write { Ok((ino, how)) } else { Err(otherwise) }
    }

    async fn make(fs: &FileSystem<D>, path: &str, what: NewNode<'_>, mode: u32) -> Result<Attributes, i32> {
        let (dir, name) = Self::parent(fs, path).await?;
        fs.make(&Self::caller(), dir, name.as_bytes(), what, mode).await.map_err(|e| err(&e))
    }

    async fn change(fs: &FileSystem<D>, path: &str, change: SetAttributes) -> Outcome {
        let ino = Self::walk(fs, path, true).await?.ino;
        fs.set_attributes(&Self::caller(), ino, change).await.map(|_| Reply::Done).map_err(|e| err(&e))
    }

    /// What may have the attribute: those of users only files and directories.
    async fn attributed(fs: &FileSystem<D>, path: &str, name: &str, otherwise: i32) -> Result<Ino, i32> {
        let attributes = Self::walk(fs, path, true).await?;
        match attributes.kind {
            _ if !name.starts_with("user.") => Ok(attributes.ino),
            NodeKind::File | NodeKind::Directory => Ok(attributes.ino),
            _ => Err(otherwise),
        }
    }

    async fn must_not_exist(fs: &FileSystem<D>, dir: Ino, name: &str) -> Result<(), i32> {
        match Self::lookup(fs, dir, name).await {
            Ok(_) => Err(EEXIST),
            Err(ENOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The directory that a directory is in; itself, of the root.
    async fn dir_of(fs: &FileSystem<D>, dir: Ino) -> Result<Ino, i32> {
        let mut up = dir;
        let mut take = |entry: DirEntry| {
            if entry.name == ".." {
                up = entry.ino;
            }
            entry.name == "."
        };
        fs.read_directory(dir, 0, &mut take, false).await.map_err(|e| err(&e))?;
        Ok(up)
    }

    /// Whether `dir` is `ancestor`, or below it.
    async fn is_below(fs: &FileSystem<D>, dir: Ino, ancestor: Ino) -> Result<bool, i32> {
        let mut at = dir;
        loop {
            if at == ancestor {
                return Ok(true);
            }
            let up = Self::dir_of(fs, at).await?;
            if up == at {
                return Ok(false);
            }
            at = up;
        }
    }

    /// What the kernel checks before it asks for a rename. True: there is nothing to do, both are names of one inode. Where it cannot
    /// have two, one was moved between the two look-ups, and the kernel is made to begin again.
    async fn check_rename(fs: &FileSystem<D>, from: (Ino, &str), to: (Ino, &str), flag: RenameFlag) -> Result<bool, i32> {
        for _ in 0..AGAIN_MAX {
            match Self::check_rename_once(fs, from, to, flag).await {
                Err(ESTALE) => {}
                checked => return checked,
            }
        }
        Err(ESTALE)
    }

    async fn check_rename_once(fs: &FileSystem<D>, from: (Ino, &str), to: (Ino, &str), flag: RenameFlag) -> Result<bool, i32> {
        let old = Self::lookup(fs, from.0, from.1).await?;
        let new = match Self::lookup(fs, to.0, to.1).await {
            Err(ENOENT) => None,
            found => Some(found?),
        };
        match (flag, &new) {
            (RenameFlag::NoReplace | RenameFlag::WhiteoutNoReplace, Some(_)) => return Err(EEXIST),
            (RenameFlag::Exchange, None) => return Err(ENOENT),
            _ => {}
        }
        let is_dir = |a: &Attributes| a.kind == NodeKind::Directory;
        if is_dir(&old) && Self::is_below(fs, to.0, old.ino).await? {
            return Err(EINVAL);
        }
        let Some(new) = new else { return Ok(false) };
        if is_dir(&new) && Self::is_below(fs, from.0, new.ino).await? {
            return Err(if flag == RenameFlag::Exchange { EINVAL } else { ENOTEMPTY });
        }
        if new.ino == old.ino {
            return if from != to && (is_dir(&new) || new.nlink == 1) { Err(ESTALE) } else { Ok(true) };
        }
        match (is_dir(&old), is_dir(&new)) {
            _ if flag == RenameFlag::Exchange => Ok(false),
            (true, false) => Err(ENOTDIR),
            (false, true) => Err(EISDIR),
            _ => Ok(false),
        }
    }

    async fn open(&mut self, fs: &FileSystem<D>, node: usize, slot: u8, path: &str, how: OpenHow) -> Outcome {
        let found = match Self::walk(fs, path, false).await {
            Err(ENOENT) if how.create => None,
            found => Some(found?),
        };
        let ino = match found {
            Some(_) if how.create && how.exclusive => return Err(EEXIST),
            Some(found) => {
                match found.kind {
                    NodeKind::Symlink => return Err(ELOOP),
                    NodeKind::CharDevice | NodeKind::BlockDevice | NodeKind::Socket => return Err(ENXIO),
                    NodeKind::Directory if how.write || how.create || how.truncate => return Err(EISDIR),
                    _ => {}
                }
                if how.truncate {
                    let change = SetAttributes { size: Some(0), ..SetAttributes::default() };
                    fs.set_attributes(&Self::caller(), found.ino, change).await.map_err(|e| err(&e))?;
                }
                found.ino
            }
            None => match Self::make(fs, path, NewNode::File, 0o644).await {
                // It has come into being since it was looked for (another node made it, or this one was cut off and its
                // last changes are undone): the shell answers ESTALE then, and the kernel looks again.
                Err(EEXIST) if !how.exclusive => return Box::pin(self.open(fs, node, slot, path, how)).await,
                made => made?.ino,
            },
        };
        fs.open(ino, OpenFlags { read: how.read, write: how.write, append: how.append }).await.map_err(|e| err(&e))?;
        if let Some((old, _)) = self.slots.insert((node, slot), (ino, how)) {
            fs.close(old).await.map_err(|e| err(&e))?;
        }
        Ok(Reply::Done)
    }
}

fn kind(kind: NodeKind) -> FileKind {
    match kind {
        NodeKind::File => FileKind::File,
        NodeKind::Directory => FileKind::Dir,
        NodeKind::Symlink => FileKind::Symlink,
        NodeKind::Fifo => FileKind::Fifo,
        _ => FileKind::Other,
    }
}

fn stat(a: &Attributes) -> Reply {
    Reply::Stat(Stat {
        ino: a.ino.0,
        kind: kind(a.kind),
        mode: a.mode & 0o7777,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        size: a.size,
        mtime: (a.mtime.seconds, a.mtime.nanos),
        ctime: (a.ctime.seconds, a.ctime.nanos),
        atime: (a.atime.seconds, a.atime.nanos),
        mtime_set: None,
        mtime_sets: 0,
    })
}

impl<D: Disk> Driver for NodeDriver<D> {
    async fn run(&mut self, node: usize, op: &Op) -> Outcome {
        match self.attempt(node, op).await {
            // What a name led to has gone meanwhile: the kernel walks the path again, once.
            Err(ESTALE) if op.has_path() => self.attempt(node, op).await,
            outcome => outcome,
        }
    }
}

impl<D: Disk> NodeDriver<D> {
    async fn attempt(&mut self, node: usize, op: &Op) -> Outcome {
        let Some(fs) = self.nodes[node].clone() else { return Err(EIO) };
        let done = |result: Result<(), FsError>| result.map(|()| Reply::Done).map_err(|e| err(&e));
        let caller = Self::caller();
        match op {
            // Without a kernel nobody checks permissions.
            Op::As { .. } => Err(EINVAL),
            Op::Mkdir { path, mode } => Self::make(&fs, path, NewNode::Directory, *mode).await.map(|_| Reply::Done),
            Op::Mknod { path, fifo, mode } => {
                let what = if *fifo { NewNode::Special { kind: NodeKind::Fifo, rdev: 0 } } else { NewNode::File };
                Self::make(&fs, path, what, *mode).await.map(|_| Reply::Done)
            }
            Op::MknodSpecial { path, what, mode } => {
                let kind = match what {
                    Special::CharDevice => NodeKind::CharDevice,
                    Special::BlockDevice => NodeKind::BlockDevice,
                    Special::Socket => NodeKind::Socket,
                };
                Self::make(&fs, path, NewNode::Special { kind, rdev: 0x107 }, *mode).await.map(|_| Reply::Done)
            }
            Op::Symlink { target, path } => {
                Self::make(&fs, path, NewNode::Symlink(target.as_bytes()), 0o777).await.map(|_| Reply::Done)
            }
            Op::Link { from, to } => {
                let ino = Self::walk(&fs, from, false).await?.ino;
                let (dir, name) = Self::parent(&fs, to).await?;
                Self::must_not_exist(&fs, dir, name).await?;
                fs.link(ino, dir, name.as_bytes()).await.map(|_| Reply::Done).map_err(|e| err(&e))
            }
            Op::Unlink { path } => {
                let (dir, name) = Self::parent(&fs, path).await?;
                done(fs.unlink(&caller, dir, name.as_bytes()).await)
            }
            Op::Rmdir { path } => {
                let (dir, name) = Self::parent(&fs, path).await?;
                done(fs.rmdir(&caller, dir, name.as_bytes()).await)
            }
            Op::Rename { from, to, flag } => {
                let (from, from_name) = Self::parent(&fs, from).await?;
                let (to, to_name) = Self::parent(&fs, to).await?;
                if Self::check_rename(&fs, (from, from_name), (to, to_name), *flag).await? {
                    return Ok(Reply::Done);
                }
                let flags = match flag {
                    RenameFlag::Replace => RenameFlags::Replace,
                    RenameFlag::NoReplace => RenameFlags::NoReplace,
                    RenameFlag::Exchange => RenameFlags::Exchange,
                    RenameFlag::Whiteout => RenameFlags::Whiteout,
                    RenameFlag::WhiteoutNoReplace => RenameFlags::WhiteoutNoReplace,
                };
                done(fs.rename(&caller, from, from_name.as_bytes(), to, to_name.as_bytes(), flags).await)
            }
            Op::Open { slot, path, how } => self.open(&fs, node, *slot, path, *how).await,
            Op::Close { slot } => {
                let (ino, _) = self.slots.remove(&(node, *slot)).ok_or(EBADF)?;
                done(fs.close(ino).await)
            }
            Op::Read { slot, offset, len } => {
                let (ino, how) = self.slot(node, *slot)?;
                if !how.read {
                    return Err(EBADF);
                }
                let mut bytes = Vec::new();
                // As the kernel does: a large read is several, until one comes back short.
                while bytes.len() < *len as usize {
                    let want = (*len as usize - bytes.len()).min(1 << 20) as u32;
                    let part = fs.read(ino, offset + bytes.len() as u64, want).await.map_err(|e| err(&e))?;
                    let part = part.contiguous();
                    bytes.extend_from_slice(&part);
                    if part.len() < want as usize {
                        break;
                    }
                }
                Ok(Reply::Bytes(bytes))
            }
            Op::Write { slot, offset, len, fill } => {
                let (ino, how) = self.writable(node, *slot, EBADF)?;
                if *len == 0 {
                    return Ok(Reply::Written(0));
                }
                let at = if how.append { At::End } else { At::Offset(*offset) };
                let bytes = pattern(*fill, 0, *len as usize);
                fs.write(ino, at, Payload::new(*offset, &bytes), false).await.map_err(|e| err(&e))?;
                Ok(Reply::Written(u64::from(*len)))
            }
            Op::Truncate { slot, size } => {
                let (ino, _) = self.writable(node, *slot, EINVAL)?;
                let change = SetAttributes { size: Some(*size), ..SetAttributes::default() };
                fs.set_attributes(&caller, ino, change).await.map(|_| Reply::Done).map_err(|e| err(&e))
            }
            Op::TruncatePath { path, size } => {
                let found = Self::walk(&fs, path, true).await?;
                match found.kind {
                    NodeKind::File => {}
                    NodeKind::Directory => return Err(EISDIR),
                    _ => return Err(EINVAL),
                }
                let change = SetAttributes { size: Some(*size), ..SetAttributes::default() };
                fs.set_attributes(&caller, found.ino, change).await.map(|_| Reply::Done).map_err(|e| err(&e))
            }
            Op::Seek { slot, offset, data } => {
                let (ino, _) = self.slot(node, *slot)?;
                let what = if *data { Seek::Data } else { Seek::Hole };
                fs.seek(ino, *offset, what).await.map(Reply::At).map_err(|e| err(&e))
            }
            Op::Copy { from, from_offset, to, to_offset, len } => {
                let (source, how) = self.slot(node, *from)?;
                let (target, to_how) = self.slot(node, *to)?;
                if !how.read || !to_how.write || to_how.append {
                    return Err(EBADF);
                }
                // As the kernel does: no further than the source's end, and not onto itself.
                let size = fs.attributes(source).await.map_err(|e| err(&e))?.size;
                let len = u64::from(*len).min(size.saturating_sub(*from_offset));
                if source == target && from_offset.max(to_offset) < &(from_offset.min(to_offset) + len) {
                    return Err(EINVAL);
                }
                let mut done = 0;
                while done < len {
                    let copied = fs.copy_range(source, from_offset + done, target, to_offset + done, len - done).await;
                    match copied.map_err(|e| err(&e))? {
                        0 => break,
                        n => done += n,
                    }
                }
                Ok(Reply::Written(done))
            }
            Op::Fallocate { slot, what, offset, len } => {
                let (ino, _) = self.writable(node, *slot, EBADF)?;
                let (what, keep_size) = match what {
                    Fallocate::Allocate => (Allocate::Reserve, false),
                    Fallocate::KeepSize => (Allocate::Reserve, true),
                    Fallocate::PunchHole => (Allocate::Punch, true),
                    Fallocate::ZeroRange => (Allocate::Zero, false),
                };
                done(fs.allocate(ino, what, *offset, *len, keep_size).await)
            }
            Op::Fsync { slot } => {
                let (ino, _) = self.slot(node, *slot)?;
                done(fs.fsync(ino, false).await)
            }
            Op::Fstat { slot } => {
                let (ino, _) = self.slot(node, *slot)?;
                fs.attributes(ino).await.map(|a| stat(&a)).map_err(|e| err(&e))
            }
            Op::Stat { path } => Self::walk(&fs, path, false).await.map(|a| stat(&a)),
            Op::Readlink { path } => {
                let found = Self::walk(&fs, path, false).await?;
                if found.kind != NodeKind::Symlink {
                    return Err(EINVAL);
                }
                let target = fs.read_link(found.ino).await.map_err(|e| err(&e))?;
                Ok(Reply::Target(String::from_utf8_lossy(&target).into_owned()))
            }
            Op::Readdir { path } => {
                let dir = Self::walk(&fs, path, true).await?;
                if dir.kind != NodeKind::Directory {
                    return Err(ENOTDIR);
                }
                let (mut names, mut cookie, mut more) = (Vec::new(), 0, true);
                // In several calls, as with a small buffer.
                while more {
                    more = false;
                    let (mut left, from) = (7, cookie);
                    let mut take = |entry: DirEntry| {
                        if left == 0 {
                            more = true;
                            return false;
                        }
                        left -= 1;
                        cookie = entry.next_cookie;
                        if entry.name != "." && entry.name != ".." {
                            names.push((String::from_utf8_lossy(&entry.name).into_owned(), kind(entry.kind)));
                        }
                        true
                    };
                    fs.read_directory(dir.ino, from, &mut take, false).await.map_err(|e| err(&e))?;
                }
                names.sort();
                Ok(Reply::Names(names))
            }
            Op::FsyncDir { path } => {
                let dir = Self::walk(&fs, path, true).await?;
                if dir.kind != NodeKind::Directory {
                    return Err(ENOTDIR);
                }
                done(fs.fsync_directory(dir.ino).await)
            }
            Op::Chmod { path, mode } => {
                Self::change(&fs, path, SetAttributes { mode: Some(*mode), ..SetAttributes::default() }).await
            }
            Op::Chown { path, uid, gid } => {
                Self::change(&fs, path, SetAttributes { uid: Some(*uid), gid: Some(*gid), ..SetAttributes::default() }).await
            }
            Op::Utimes { path, mtime } => {
                let to = Time { seconds: i64::from(*mtime), nanos: 0 };
                Self::change(&fs, path, SetAttributes { mtime: Some(SetTime::To(to)), ..SetAttributes::default() }).await
            }
            Op::SetXattr { path, name, fill, len, how } => {
                let ino = Self::attributed(&fs, path, name, EPERM).await?;
                let mode = match how {
                    XattrHow::Any => SetMode::Any,
                    XattrHow::Create => SetMode::Create,
                    XattrHow::Replace => SetMode::Replace,
                };
                done(fs.set_xattr(ino, name.as_bytes(), &pattern(*fill, 0, *len as usize), mode).await)
            }
            Op::GetXattr { path, name } => {
                let ino = Self::attributed(&fs, path, name, ENODATA).await?;
                fs.get_xattr(ino, name.as_bytes()).await.map(Reply::Bytes).map_err(|e| err(&e))
            }
            Op::ListXattr { path } => {
                let ino = Self::walk(&fs, path, true).await?.ino;
                let list = fs.list_xattr(ino, true).await.map_err(|e| err(&e))?;
                let names = list.split(|b| *b == 0).filter(|n| !n.is_empty());
                let mut names: Vec<_> = names.map(|n| String::from_utf8_lossy(n).into_owned()).collect();
                names.sort();
                Ok(Reply::Attributes(names))
            }
            Op::SetAcl { path, acl, default } => {
                let ino = Self::walk(&fs, path, true).await?.ino;
                let name = Acl::attribute(*default).as_bytes();
                done(fs.set_xattr(ino, name, &acl.encode(), SetMode::Any).await)
            }
            Op::GetAcl { path, default } => {
                let ino = Self::walk(&fs, path, true).await?.ino;
                fs.get_xattr(ino, Acl::attribute(*default).as_bytes()).await.map(Reply::Bytes).map_err(|e| err(&e))
            }
            Op::RemoveXattr { path, name } => {
                let ino = Self::attributed(&fs, path, name, EPERM).await?;
                done(fs.remove_xattr(ino, name.as_bytes()).await)
            }
        }
    }
}
