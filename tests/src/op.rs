//! File operations as values, and what they answer: the language that the oracle and everything compared with it speak.

use std::fmt;

/// `errno` values, as Linux numbers them.
pub mod errno {
    #![allow(missing_docs)]
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const EIO: i32 = 5;
    pub const ENXIO: i32 = 6;
    pub const EBADF: i32 = 9;
    pub const EACCES: i32 = 13;
    pub const EEXIST: i32 = 17;
    pub const ENOTDIR: i32 = 20;
    pub const EISDIR: i32 = 21;
    pub const EINVAL: i32 = 22;
    pub const EFBIG: i32 = 27;
    pub const ENOSPC: i32 = 28;
    pub const ENAMETOOLONG: i32 = 36;
    pub const ENOTEMPTY: i32 = 39;
    pub const ELOOP: i32 = 40;
    pub const ENODATA: i32 = 61;
    pub const EOPNOTSUPP: i32 = 95;
    pub const ESTALE: i32 = 116;
}

/// How `rename` treats an existing target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameFlag {
    /// Replaces it.
    Replace,
    /// `RENAME_NOREPLACE`.
    NoReplace,
    /// `RENAME_EXCHANGE`.
    Exchange,
    /// `RENAME_WHITEOUT`: replaces it, and leaves a character device 0/0.
    Whiteout,
    /// `RENAME_WHITEOUT | RENAME_NOREPLACE`.
    WhiteoutNoReplace,
}

/// What `fallocate` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Reserves space, and grows the file if need be.
    Allocate,
    /// `FALLOC_FL_KEEP_SIZE`.
    KeepSize,
    /// `FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
}

/// What a special file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Special {
    CharDevice,
    BlockDevice,
    Socket,
}

/// How a file is opened. Always with `O_NOFOLLOW`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// `O_APPEND`.
    pub append: bool,
    /// `O_CREAT`, with mode 0644.
    pub create: bool,
    /// `O_EXCL`.
    pub exclusive: bool,
    /// `O_TRUNC`.
    pub truncate: bool,
    /// `O_DIRECT`.
    pub direct: bool,
}

/// Who does something; by default root. Without supplementary groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// Effective, and the file system's.
    pub uid: u32,
    /// The same.
    pub gid: u32,
}

impl User {
    /// Whether permissions do not hold for it.
    #[must_use]
    pub fn is_root(self) -> bool {
        self.uid == 0
    }
}

/// One file operation. Paths are relative to the root of the file system, without `.`, `..` or a slash at an end; the
/// empty path is the root. A path's last symbolic link is not followed unless it says so.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    /// Another operation, done by somebody else than root. On mounts only: it is the kernel that checks permissions.
    As {
        user: User,
        op: Box<Op>,
    },
    Mkdir {
        path: String,
        mode: u32,
    },
    /// `mknod` of a regular file, or of a FIFO.
    Mknod {
        path: String,
        fifo: bool,
        mode: u32,
    },
    /// `mknod` of a device (1, 7) or a socket.
    MknodSpecial {
        path: String,
        what: Special,
        mode: u32,
    },
    Symlink {
        target: String,
        path: String,
    },
    Link {
        from: String,
        to: String,
    },
    Unlink {
        path: String,
    },
    Rmdir {
        path: String,
    },
    Rename {
        from: String,
        to: String,
        flag: RenameFlag,
    },
    Open {
        slot: u8,
        path: String,
        how: OpenHow,
    },
    Close {
        slot: u8,
    },
    /// `pread`.
    Read {
        slot: u8,
        offset: u64,
        len: u32,
    },
    /// `pwrite` of bytes made from `fill` (see [`pattern`]); at the end of the file if it is open for appending.
    Write {
        slot: u8,
        offset: u64,
        len: u32,
        fill: u32,
    },
    Truncate {
        slot: u8,
        size: u64,
    },
    /// `truncate`, which follows a last symbolic link.
    TruncatePath {
        path: String,
        size: u64,
    },
    Fallocate {
        slot: u8,
        what: Fallocate,
        offset: u64,
        len: u64,
    },
    /// `lseek` for data, or for a hole.
    Seek {
        slot: u8,
        offset: u64,
        data: bool,
    },
    /// `fstat` of the source, and `copy_file_range` until all is copied or the source ends.
    Copy {
        from: u8,
        from_offset: u64,
        to: u8,
        to_offset: u64,
        len: u32,
    },
    Fsync {
        slot: u8,
    },
    Fstat {
        slot: u8,
    },
    /// `lstat`.
    Stat {
        path: String,
    },
    Readlink {
        path: String,
    },
    Readdir {
        path: String,
    },
    /// `open`, `fsync`, `close` of a directory.
    FsyncDir {
        path: String,
    },
    /// Follows a last symbolic link.
    Chmod {
        path: String,
        mode: u32,
    },
    Chown {
        path: String,
        uid: u32,
        gid: u32,
    },
    /// Sets mtime (whole seconds).
    Utimes {
        path: String,
        mtime: u32,
    },
    SetXattr {
        path: String,
        name: String,
        fill: u32,
        len: u32,
        how: XattrHow,
    },
    GetXattr {
        path: String,
        name: String,
    },
    ListXattr {
        path: String,
    },
    RemoveXattr {
        path: String,
        name: String,
    },
    SetAcl {
        path: String,
        acl: Acl,
        default: bool,
    },
    /// The value of the extended attribute that a list is kept in.
    GetAcl {
        path: String,
        default: bool,
    },
}

impl Op {
    /// What is done, whoever does it.
    #[must_use]
    pub fn inner(&self) -> &Op {
        if let Op::As { op, .. } = self { op.inner() } else { self }
    }

    /// Whether it walks a path (and not only uses a descriptor).
    #[must_use]
    pub fn has_path(&self) -> bool {
        !matches!(
            self.inner(),
            Op::Close { .. }
                | Op::Read { .. }
                | Op::Write { .. }
                | Op::Truncate { .. }
                | Op::Fallocate { .. }
                | Op::Seek { .. }
                | Op::Copy { .. }
                | Op::Fsync { .. }
                | Op::Fstat { .. }
        )
    }
}

/// A POSIX access control list with at most one named user: user 1000, if nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Acl {
    /// The owner's permissions.
    pub owner: u16,
    /// The named user's, and the mask.
    pub named: Option<(u16, u16)>,
    /// The owning group's.
    pub group: u16,
    /// Everybody else's.
    pub other: u16,
}

impl Acl {
    /// The name of the extended attribute that a list is kept in.
    #[must_use]
    pub fn attribute(default: bool) -> &'static str {
        if default { "system.posix_acl_default" } else { "system.posix_acl_access" }
    }

    /// As the kernel passes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.encode_for(1000)
    }

    /// The same, of another named user.
    #[must_use]
    pub fn encode_for(&self, named: u32) -> Vec<u8> {
        let mut entries = vec![(1, self.owner, u32::MAX)];
        entries.extend(self.named.map(|(perm, _)| (2, perm, named)));
        entries.push((4, self.group, u32::MAX));
        entries.extend(self.named.map(|(_, mask)| (16, mask, u32::MAX)));
        entries.push((32, self.other, u32::MAX));
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in entries {
            bytes.extend(u16::to_le_bytes(tag));
            bytes.extend(perm.to_le_bytes());
            bytes.extend(u32::to_le_bytes(id));
        }
        bytes
    }
}

/// Whether `setxattr` makes or replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrHow {
    /// Either.
    Any,
    /// `XATTR_CREATE`.
    Create,
    /// `XATTR_REPLACE`.
    Replace,
}

/// One operation, on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Index of the node, from 0.
    pub node: usize,
    /// What it does.
    pub op: Op,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum FileKind {
    File,
    Dir,
    Symlink,
    Fifo,
    Other,
}

/// A time stamp: seconds and nanoseconds.
pub type Stamp = (i64, u32);

/// What `stat` says, as far as it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Identity: compared as a one-to-one relation, not as a number.
    pub ino: u64,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Links (not compared for directories).
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size (compared for regular files and symbolic links).
    pub size: u64,
    /// Modification time. From the oracle: a counter of changes.
    pub mtime: Stamp,
    /// Change time. From the oracle: a counter of changes.
    pub ctime: Stamp,
    /// Access time. From the oracle: nothing.
    pub atime: Stamp,
    /// From the oracle: mtime was set by `Utimes` to this.
    pub mtime_set: Option<i64>,
    /// From the oracle: how often mtime was set by `Utimes`.
    pub mtime_sets: u32,
}

/// What an operation answers.
#[derive(Clone, PartialEq, Eq)]
pub enum Reply {
    /// Nothing.
    Done,
    /// Bytes read, or an attribute's value.
    Bytes(Vec<u8>),
    /// Bytes written.
    Written(u64),
    /// Attributes.
    Stat(Stat),
    /// A directory's entries, sorted, without `.` and `..`.
    Names(Vec<(String, FileKind)>),
    /// A link's target.
    Target(String),
    /// Names of attributes, sorted.
    Attributes(Vec<String>),
    /// Where a seek has ended.
    At(u64),
    /// From the oracle: where a seek may end (first and last place of each range; where blocks begin and end is the file
    /// system's affair), and whether there may be no such place (`ENXIO`).
    Places(Vec<(u64, u64)>, bool),
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reply::Done => write!(f, "done"),
            Reply::Bytes(b) if b.len() > 32 => {
                write!(f, "{} bytes, fingerprint {:016x}, first {:02x?}", b.len(), hash(b), &b[..16])
            }
            Reply::Bytes(b) => write!(f, "bytes {b:02x?}"),
            Reply::Written(n) => write!(f, "wrote {n}"),
            Reply::Stat(s) => write!(f, "{s:?}"),
            Reply::Names(n) => write!(f, "{n:?}"),
            Reply::Target(t) => write!(f, "-> {t}"),
            Reply::Attributes(a) => write!(f, "{a:?}"),
            Reply::At(n) => write!(f, "at {n}"),
            Reply::Places(ranges, nowhere) => write!(f, "one of {ranges:?}{}", if *nowhere { ", or nowhere" } else { "" }),
        }
    }
}

/// An operation's result: its answer, or an `errno`.
pub type Outcome = Result<Reply, i32>;

/// The bytes that a fill number stands for, from a position on: no two aligned 8-byte words of different fills or
/// positions are likely to be equal, and none is zero.
#[must_use]
pub fn pattern(fill: u32, start: u64, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    let mut word = start / 8;
    let skip = (start % 8) as usize;
    while out.len() < len + skip {
        let mut z =
            (u64::from(fill) << 32 | 0x9e37).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word.wrapping_mul(0xff51_afd7_ed55_8ccd);
        z = (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^= z >> 32;
        out.extend_from_slice(&(z | 0x0101_0101_0101_0101).to_le_bytes());
        word += 1;
    }
    out.drain(..skip);
    out.truncate(len);
    out
}

/// A fingerprint (FNV-1a).
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}
