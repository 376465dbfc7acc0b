//! Between the file system's words and those of `fuser`.

use super::known::Known;
use crate::ops::meant;
use crate::{Attributes, FileKind, FsError, Ino, NewNode, SetTime, Time};
use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};
use nix::libc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Inode numbers: the kernel calls the root 1, the file system by its block.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    root: Ino,
    known: Arc<Known>,
}

impl Identity {
    pub(crate) fn new(root: Ino, known: Arc<Known>) -> Self {
        Identity { root, known }
    }

    /// The file system's number for the kernel's. The operation under way means the generation that the kernel was told.
    pub(crate) fn ino(&self, node: INodeNo) -> Ino {
        if node == INodeNo::ROOT {
            return self.root;
        }
        if let Some(generation) = self.known.generation(node.0) {
            meant::note(Ino(node.0), generation);
        }
        Ino(node.0)
    }

    /// The kernel's number for the file system's (also `st_ino`).
    pub(crate) fn node(&self, ino: Ino) -> u64 {
        if ino == self.root { INodeNo::ROOT.0 } else { ino.0 }
    }

    pub(crate) fn attributes(&self, a: &Attributes) -> FileAttr {
        FileAttr {
            ino: INodeNo(self.node(a.ino)),
            size: a.size,
            blocks: a.blocks512,
            atime: system_time(a.atime),
            mtime: system_time(a.mtime),
            ctime: system_time(a.ctime),
            crtime: system_time(a.btime),
            kind: kind(a.kind),
            perm: (a.mode & 0o7777) as u16,
            nlink: a.nlink,
            uid: a.uid,
            gid: a.gid,
            rdev: a.rdev,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Identity {
    /// Of an inode whose attributes cannot be read: its number and type.
    pub(crate) fn unknown(&self, ino: Ino, of: FileKind) -> FileAttr {
        FileAttr {
            ino: INodeNo(self.node(ino)),
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: kind(of),
            perm: 0,
            nlink: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

/// Whether an `ioctl` asks for the inode's generation (`FS_IOC_GETVERSION`, also of a 32-bit process).
pub(crate) fn asks_for_generation(command: u32) -> bool {
    [0x8008_7601, 0x8004_7601].contains(&command)
}

/// The number that the kernel is told.
pub(crate) fn errno(error: &FsError) -> Errno {
    if matches!(error, FsError::Corrupt { .. } | FsError::Disk(_)) {
        tracing::warn!(%error, "an operation failed");
    }
    Errno::from_i32(error.errno())
}

/// A time that differs from this one, and from what this returned for it lately.
pub(crate) fn another_time(time: Time) -> Time {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let more = COUNT.fetch_add(1, Ordering::Relaxed) % 1_000_000 + 1;
    Time { nanos: (time.nanos + more) % 1_000_000_000, ..time }
}

fn system_time(time: Time) -> SystemTime {
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let second = if time.seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    second.and_then(|s| s.checked_add(Duration::from_nanos(time.nanos.into()))).unwrap_or(UNIX_EPOCH)
}

/// A time to set.
pub(crate) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::To(match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Time { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() },
            // `fuser` takes the nanoseconds of a time before 1970 as leading away from 1970, too; they lead towards it.
            Err(before) => Time { seconds: -(before.duration().as_secs() as i64), nanos: before.duration().subsec_nanos() },
        }),
    }
}

pub(crate) fn kind(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::Socket => FileType::Socket,
    }
}

/// What MKNOD makes; `None` for directories and nonsense.
pub(crate) fn new_node(mode: u32, rdev: u32) -> Option<NewNode<'static>> {
    let special = |kind| Some(NewNode::Special { kind, rdev });
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Some(NewNode::File),
        libc::S_IFIFO => special(FileKind::Fifo),
        libc::S_IFCHR => special(FileKind::CharDevice),
        libc::S_IFBLK => special(FileKind::BlockDevice),
        libc::S_IFSOCK => special(FileKind::Socket),
        _ => None,
    }
}

/// `renameat2` flags; `None` for those not supported.
pub(crate) fn rename_flags(flags: fuser::RenameFlags) -> Option<crate::RenameFlags> {
    match flags {
        fuser::RenameFlags::RENAME_NOREPLACE => Some(crate::RenameFlags::NoReplace),
        fuser::RenameFlags::RENAME_EXCHANGE => Some(crate::RenameFlags::Exchange),
        fuser::RenameFlags::RENAME_WHITEOUT => Some(crate::RenameFlags::Whiteout),
        flags if flags == fuser::RenameFlags::RENAME_WHITEOUT | fuser::RenameFlags::RENAME_NOREPLACE => {
            Some(crate::RenameFlags::WhiteoutNoReplace)
        }
        flags => flags.is_empty().then_some(crate::RenameFlags::Replace),
    }
}

/// How a file is opened.
pub(crate) fn open_flags(flags: fuser::OpenFlags) -> crate::OpenFlags {
    let mode = flags.acc_mode();
    crate::OpenFlags {
        read: mode != fuser::OpenAccMode::O_WRONLY,
        write: mode != fuser::OpenAccMode::O_RDONLY,
        append: flags.0 & libc::O_APPEND != 0,
    }
}

pub(crate) fn is_file(attributes: &Attributes) -> bool {
    attributes.kind == FileKind::File
}
