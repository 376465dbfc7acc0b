//! Runs operations on mounted directories by system calls: the file system as programs see it.

use super::Driver;
use crate::op::{Acl, Fallocate, FileKind, Op, OpenHow, Outcome, RenameFlag, Reply, Special, Stat, XattrHow, errno, pattern};
use crate::reference::Traits;
use nix::libc;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Directories in which the same tree is to be seen, one per node.
pub struct MountDriver {
    roots: Vec<PathBuf>,
    slots: BTreeMap<(usize, u8), (File, OpenHow)>,
    /// Directories that other nodes have moved to another one, per node, by inode number.
    moved: BTreeMap<usize, BTreeSet<u64>>,
}

impl MountDriver {
    /// Over the given directories. Sets the process's umask to 0.
    #[must_use]
    pub fn new(roots: Vec<PathBuf>) -> Self {
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        MountDriver { roots, slots: BTreeMap::new(), moved: BTreeMap::new() }
    }

    /// Closes everything, as when a node died.
    pub fn close_all(&mut self, node: usize) {
        self.slots.retain(|(n, _), _| *n != node);
    }

    fn path(&self, node: usize, path: &str) -> PathBuf {
        self.roots[node].join(path)
    }

    fn slot(&self, node: usize, slot: u8) -> io::Result<&(File, OpenHow)> {
        self.slots.get(&(node, slot)).ok_or_else(|| io::Error::from_raw_os_error(errno::EBADF))
    }

    fn call(&mut self, node: usize, op: &Op) -> io::Result<Reply> {
        let at = |path: &str| self.path(node, path);
        match op {
            Op::As { user, op } => {
                let _acting = crate::sys::Acting::begin(user.uid, user.gid)?;
                self.call(node, op)
            }
            Op::Mkdir { path, mode } => {
                let path = c_path(&at(path))?;
                // SAFETY: the path is a C string that outlives the call.
                check(unsafe { libc::mkdir(path.as_ptr(), *mode) })
            }
            Op::Mknod { path, fifo, mode } => {
                let path = c_path(&at(path))?;
                let kind = if *fifo { libc::S_IFIFO } else { libc::S_IFREG };
                // SAFETY: the path is a C string that outlives the call.
                check(unsafe { libc::mknod(path.as_ptr(), kind | *mode, 0) })
            }
            Op::MknodSpecial { path, what, mode } => {
                let path = c_path(&at(path))?;
                let (kind, device) = match what {
                    Special::CharDevice => (libc::S_IFCHR, libc::makedev(1, 7)),
                    Special::BlockDevice => (libc::S_IFBLK, libc::makedev(1, 7)),
                    Special::Socket => (libc::S_IFSOCK, 0),
                };
                // SAFETY: the path is a C string that outlives the call.
                check(unsafe { libc::mknod(path.as_ptr(), kind | *mode, device) })
            }
            Op::Symlink { target, path } => std::os::unix::fs::symlink(target, at(path)).map(|()| Reply::Done),
            Op::Link { from, to } => fs::hard_link(at(from), at(to)).map(|()| Reply::Done),
            Op::Unlink { path } => {
                let path = c_path(&at(path))?;
                // SAFETY: the path is a C string that outlives the call.
                check(unsafe { libc::unlink(path.as_ptr()) })
            }
            Op::Rmdir { path } => fs::remove_dir(at(path)).map(|()| Reply::Done),
            Op::Rename { from, to, flag } => {
                let flags = match flag {
                    RenameFlag::Replace => 0,
                    RenameFlag::NoReplace => libc::RENAME_NOREPLACE,
                    RenameFlag::Exchange => libc::RENAME_EXCHANGE,
                    RenameFlag::Whiteout => libc::RENAME_WHITEOUT,
                    RenameFlag::WhiteoutNoReplace => libc::RENAME_WHITEOUT | libc::RENAME_NOREPLACE,
                };
                let (from, to) = (at(from), at(to));
                let rename = || crate::sys::rename(&from, &to, flags).map(|()| Reply::Done);
                let result = match rename() {
                    Err(error) if error.raw_os_error() == Some(libc::ESTALE) && from.parent() != to.parent() => {
                        // The kernel knows a directory by the place from which another node has moved it, and cannot learn its
                        // new one within a rename between directories (docs/semantics.md): looking at it helps. Nothing else
                        // excuses the error.
                        let found = [&from, &to].map(|path| fs::symlink_metadata(path).ok().filter(fs::Metadata::is_dir));
                        let moved = self.moved.entry(node).or_default();
                        let mut excused = false;
                        for dir in found.into_iter().flatten() {
                            excused |= moved.remove(&dir.ino());
                        }
                        if excused { rename() } else { Err(error) }
                    }
                    result => result,
                };
                if result.is_ok() && from.parent() != to.parent() {
                    // What is a directory at either place now was moved, seen from all other nodes.
                    let there = [&from, &to].map(|path| fs::symlink_metadata(path).ok().filter(fs::Metadata::is_dir));
                    let numbers: Vec<u64> = there.into_iter().flatten().map(|dir| dir.ino()).collect();
                    (0..self.roots.len()).filter(|other| *other != node).for_each(|other| {
                        self.moved.entry(other).or_default().extend(&numbers);
                    });
                }
                result
            }
            Op::Open { slot, path, how } => {
                let mut flags = libc::O_NOFOLLOW;
                for (on, flag) in [(how.exclusive, libc::O_EXCL), (how.create, libc::O_CREAT), (how.truncate, libc::O_TRUNC)] {
                    flags |= if on { flag } else { 0 };
                }
                flags |= if how.direct { libc::O_DIRECT } else { 0 };
                // std refuses combinations that the kernel accepts, so only the kernel's flags are used.
                let file = OpenOptions::new()
                    .read(how.read || !how.write)
                    .write(how.write && !how.append)
                    .append(how.append)
                    .mode(0o644)
                    .custom_flags(flags)
                    .open(at(path))?;
                self.slots.insert((node, *slot), (file, *how));
                Ok(Reply::Done)
            }
            Op::Close { slot } => {
                self.slot(node, *slot)?;
                let Some((file, _)) = self.slots.remove(&(node, *slot)) else { return Ok(Reply::Done) };
                nix::unistd::close(file).map_err(io::Error::from)?;
                Ok(Reply::Done)
            }
            Op::Read { slot, offset, len } => {
                // One call: a regular file's bytes come short at its end only, and what two calls see need not go together.
                let mut bytes = vec![0; *len as usize];
                let n = self.slot(node, *slot)?.0.read_at(&mut bytes, *offset)?;
                bytes.truncate(n);
                Ok(Reply::Bytes(bytes))
            }
            Op::Write { slot, offset, len, fill } => {
                let n = self.slot(node, *slot)?.0.write_at(&pattern(*fill, 0, *len as usize), *offset)?;
                Ok(Reply::Written(n as u64))
            }
            Op::Truncate { slot, size } => {
                let fd = self.slot(node, *slot)?.0.as_raw_fd();
                // SAFETY: the descriptor is open as long as `self` is borrowed.
                check(unsafe { libc::ftruncate(fd, i64::try_from(*size).unwrap_or(i64::MAX)) })
            }
            Op::TruncatePath { path, size } => {
                let path = c_path(&at(path))?;
                // SAFETY: the path is a C string that outlives the call.
                check(unsafe { libc::truncate(path.as_ptr(), i64::try_from(*size).unwrap_or(i64::MAX)) })
            }
            Op::Seek { slot, offset, data } => {
                let whence = if *data { libc::SEEK_DATA } else { libc::SEEK_HOLE };
                let offset = i64::try_from(*offset).unwrap_or(i64::MAX);
                crate::sys::seek(&self.slot(node, *slot)?.0, offset, whence).map(Reply::At)
            }
            Op::Copy { from, from_offset, to, to_offset, len } => {
                let (from, to) = (&self.slot(node, *from)?.0, &self.slot(node, *to)?.0);
                // The kernel looks no further than the size that it knows (docs/semantics.md).
                let size = from.metadata()?.len();
                let mut done = 0;
                loop {
                    let left = *len as usize - done;
                    let n = crate::sys::copy_range(from, from_offset + done as u64, to, to_offset + done as u64, left)?;
                    done += n;
                    // What a file that is copied into itself has grown by is no part of what was to be copied.
                    if n == 0 || done == *len as usize || from_offset + done as u64 >= size {
                        return Ok(Reply::Written(done as u64));
                    }
                }
            }
            Op::Fallocate { slot, what, offset, len } => {
                let mode = match what {
                    Fallocate::Allocate => 0,
                    Fallocate::KeepSize => libc::FALLOC_FL_KEEP_SIZE,
                    Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    Fallocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
                };
                let fd = self.slot(node, *slot)?.0.as_raw_fd();
                // SAFETY: the descriptor is open as long as `self` is borrowed.
                check(unsafe { libc::fallocate(fd, mode, *offset as i64, *len as i64) })
            }
            Op::Fsync { slot } => self.slot(node, *slot)?.0.sync_all().map(|()| Reply::Done),
            Op::Fstat { slot } => Ok(stat(&self.slot(node, *slot)?.0.metadata()?)),
            Op::Stat { path } => Ok(stat(&fs::symlink_metadata(at(path))?)),
            Op::Readlink { path } => Ok(Reply::Target(fs::read_link(at(path))?.to_string_lossy().into_owned())),
            Op::Readdir { path } => {
                let mut names = Vec::new();
                for entry in fs::read_dir(at(path))? {
                    let entry = entry?;
                    let name = entry.file_name().to_string_lossy().into_owned();
                    names.push((name, kind(&entry.file_type()?)));
                }
                names.sort();
                Ok(Reply::Names(names))
            }
            Op::FsyncDir { path } => {
                let dir = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(at(path))?;
                dir.sync_all().map(|()| Reply::Done)
            }
            Op::Chmod { path, mode } => {
                use std::os::unix::fs::PermissionsExt;
                fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)).map(|()| Reply::Done)
            }
            Op::Chown { path, uid, gid } => std::os::unix::fs::chown(at(path), Some(*uid), Some(*gid)).map(|()| Reply::Done),
            Op::Utimes { path, mtime } => {
                let omit = nix::sys::time::TimeSpec::new(0, libc::UTIME_OMIT);
                let time = nix::sys::time::TimeSpec::new(i64::from(*mtime), 0);
                let follow = nix::sys::stat::UtimensatFlags::FollowSymlink;
                nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &at(path), &omit, &time, follow)?;
                Ok(Reply::Done)
            }
            Op::SetXattr { path, name, fill, len, how } => {
                let flags = match how {
                    XattrHow::Any => 0,
                    XattrHow::Create => libc::XATTR_CREATE,
                    XattrHow::Replace => libc::XATTR_REPLACE,
                };
                let (path, name, value) = (c_path(&at(path))?, c_str(name)?, pattern(*fill, 0, *len as usize));
                // SAFETY: the strings and the value outlive the call, and the length is the value's.
                check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) })
            }
            Op::GetXattr { path, name } => {
                let (path, name, mut value) = (c_path(&at(path))?, c_str(name)?, vec![0u8; 65_536]);
                // SAFETY: the strings and the buffer outlive the call, and the length is the buffer's.
                let n = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
                value.truncate(usize::try_from(n).map_err(|_| io::Error::last_os_error())?);
                Ok(Reply::Bytes(value))
            }
            Op::ListXattr { path } => {
                let (path, mut list) = (c_path(&at(path))?, vec![0u8; 65_536]);
                // SAFETY: the path and the buffer outlive the call, and the length is the buffer's.
                let n = unsafe { libc::listxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
                list.truncate(usize::try_from(n).map_err(|_| io::Error::last_os_error())?);
                let names = list.split(|b| *b == 0).filter(|n| !n.is_empty());
                let mut names: Vec<_> = names.map(|n| String::from_utf8_lossy(n).into_owned()).collect();
                names.retain(|n| n.starts_with("user.") || n.starts_with("trusted.") || n.starts_with("system.posix_acl_"));
                names.sort();
                Ok(Reply::Attributes(names))
            }
            Op::SetAcl { path, acl, default } => {
                let (path, name, value) = (c_path(&at(path))?, c_str(Acl::attribute(*default))?, acl.encode());
                // SAFETY: the strings and the value outlive the call, and the length is the value's.
                check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
            }
            Op::GetAcl { path, default } => {
                self.call(node, &Op::GetXattr { path: path.clone(), name: Acl::attribute(*default).to_owned() })
            }
            Op::RemoveXattr { path, name } => {
                let (path, name) = (c_path(&at(path))?, c_str(name)?);
                // SAFETY: the strings outlive the call.
                check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<Reply> {
    if result == 0 { Ok(Reply::Done) } else { Err(io::Error::last_os_error()) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn c_str(text: &str) -> io::Result<CString> {
    Ok(CString::new(text)?)
}

fn kind(file_type: &fs::FileType) -> FileKind {
    if file_type.is_file() {
        FileKind::File
    } else if file_type.is_dir() {
        FileKind::Dir
    } else if file_type.is_symlink() {
        FileKind::Symlink
    } else if file_type.is_fifo() {
        FileKind::Fifo
    } else {
        FileKind::Other
    }
}

fn stat(m: &fs::Metadata) -> Reply {
    Reply::Stat(Stat {
        ino: m.ino(),
        kind: kind(&m.file_type()),
        mode: m.mode() & 0o7777,
        nlink: u32::try_from(m.nlink()).unwrap_or(u32::MAX),
        uid: m.uid(),
        gid: m.gid(),
        size: m.size(),
        mtime: (m.mtime(), m.mtime_nsec() as u32),
        ctime: (m.ctime(), m.ctime_nsec() as u32),
        atime: (m.atime(), m.atime_nsec() as u32),
        mtime_set: None,
        mtime_sets: 0,
    })
}

impl Driver for MountDriver {
    async fn run(&mut self, node: usize, op: &Op) -> Outcome {
        self.call(node, op).map_err(|e| e.raw_os_error().unwrap_or(errno::EIO))
    }

    fn traits(&self) -> Traits {
        let links = fs::read_to_string("/proc/sys/fs/protected_hardlinks");
        let kind = self.roots.first().and_then(|root| nix::sys::statfs::statfs(root).ok()).map(|found| found.filesystem_type());
        Traits {
            protects_links: links.is_ok_and(|value| value.trim() != "0"),
            shows_failed_whiteouts: kind == Some(nix::sys::statfs::EXT4_SUPER_MAGIC),
            coarse_times: kind != Some(nix::sys::statfs::FUSE_SUPER_MAGIC),
        }
    }
}
