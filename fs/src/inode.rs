//! An inode in memory: attributes, parent records, and the body with small contents or the root of a tree.
//!
//! Invariants:
//! - `links` is the number of parent records; an inode with none is an orphan: it lives only while it is open somewhere.
//! - A directory has exactly one parent record (the root directory: one that names itself); two, if a crash ended an exchange
//!   of directories, until it is moved or removed or the collector comes by. At most one of them makes a name.
//! - One inode fills one block, and is written as a whole: a change of its parent records is atomic.
//!
//! Excludes: what the body of a directory or file means (`directory`, `extent`).

use crate::btree::Node;
use crate::error::{FsError, Result};
use crate::format::{
    ATTRIBUTES_INLINE_MAX, BODY_AT, BODY_LEN, HEADER_LEN, OVERFLOW_MAX, PARENT_LEN, TAIL_AT, TAIL_LEN, Time, check_header,
    get_u16, get_u32, get_u64, magic, put_header, put_u16, put_u32, put_u64,
};
use crate::transaction::Transaction;
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo};
use nix::libc;
use serde::{Deserialize, Serialize};
use sld::{After, Disk, Kind, ObjectId, Tag, WriteId};
use std::fmt;

/// An inode's number: the packed number of its block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ino(pub u64);

impl Ino {
    /// Its block.
    #[must_use]
    pub const fn block(self) -> BlockNo {
        BlockNo::unpack(self.0)
    }

    /// The object that its token is for.
    #[must_use]
    pub const fn object(self) -> ObjectId {
        ObjectId::Inode(self.0)
    }
}

impl fmt::Display for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {}", self.block())
    }
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum FileKind {
    /// Named pipe.
    Fifo = 1,
    /// Character device.
    CharDevice = 2,
    /// Directory.
    Directory = 4,
    /// Block device.
    BlockDevice = 6,
    /// Regular file.
    File = 8,
    /// Symbolic link.
    Symlink = 10,
    /// Socket.
    Socket = 12,
}

impl FileKind {
    /// From the type bits of a mode.
    #[must_use]
    pub fn of_mode(mode: u32) -> Option<FileKind> {
        Self::from_number(((mode & libc::S_IFMT) >> 12) as u8)
    }

    /// From the number that is stored in entries.
    #[must_use]
    pub fn from_number(number: u8) -> Option<FileKind> {
        Some(match number {
            1 => FileKind::Fifo,
            2 => FileKind::CharDevice,
            4 => FileKind::Directory,
            6 => FileKind::BlockDevice,
            8 => FileKind::File,
            10 => FileKind::Symlink,
            12 => FileKind::Socket,
            _ => return None,
        })
    }

    /// The type bits of a mode.
    #[must_use]
    pub fn mode_bits(self) -> u32 {
        (self as u32) << 12
    }
}

/// Flag of an inode: it has the attribute `security.capability`.
pub const HAS_CAPABILITY: u32 = 2;
/// Flag of an inode: it has an access list.
pub const HAS_ACCESS_ACL: u32 = 4;
/// Flag of an inode: it has a default list.
pub const HAS_DEFAULT_ACL: u32 = 8;

/// A name of an inode, from the inode's side: an entry is valid only if its inode has this record of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Parent {
    /// The directory.
    pub dir: u64,
    /// Hash of the name in it.
    pub hash: u64,
    /// Sequence number of the entry, unique for directory and hash.
    pub seq: u64,
}

impl Parent {
    pub(crate) fn get(bytes: &[u8], at: usize) -> Parent {
        Parent { dir: get_u64(bytes, at), hash: get_u64(bytes, at + 8), seq: get_u64(bytes, at + 16) }
    }

    pub(crate) fn put(&self, bytes: &mut [u8], at: usize) {
        put_u64(bytes, at, self.dir);
        put_u64(bytes, at + 8, self.hash);
        put_u64(bytes, at + 16, self.seq);
    }
}

/// What an inode's body area holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing (devices, pipes, sockets).
    None,
    /// The contents of a small file, or a symbolic link's target; at most `BODY_LEN` bytes.
    Inline(Bytes),
    /// The root of a tree: entries of a directory, extents of a file.
    Tree(Node),
}

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub ino: Ino,
    /// Differs for each use of the block as an inode.
    pub generation: u64,
    /// File type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device.
    pub rdev: u32,
    /// Size in bytes.
    pub size: u64,
    /// Blocks owned, without the inode itself: data, tree, attributes, overflow.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of the data.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// Grows with every change of the data.
    pub data_version: u64,
    /// [`crate::extent::RESIDUE`], [`HAS_CAPABILITY`], [`HAS_ACCESS_ACL`], [`HAS_DEFAULT_ACL`].
    pub flags: u32,
    /// Directories in this directory. After a crash it may be too large, never too small.
    pub subdirs: u32,
    /// Parent records in all.
    pub links: u32,
    /// Parent records in this block; further ones are in the overflow blocks.
    pub parents: Vec<Parent>,
    /// Overflow blocks of parent records (packed numbers).
    pub overflow: Vec<u64>,
    /// First block of further extended attributes, or 0.
    pub attribute_block: u64,
    /// Inline extended attributes, at most `ATTRIBUTES_INLINE_MAX` bytes.
    pub attributes_inline: Bytes,
    /// The body.
    pub body: Body,
}

/// What `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Number.
    pub ino: Ino,
    /// Generation.
    pub generation: u64,
    /// Type.
    pub kind: FileKind,
    /// Type and permission bits.
    pub mode: u32,
    /// Names; for a directory 2 and one for each directory in it.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Bytes.
    pub size: u64,
    /// Space used beside the inode, in units of 512 bytes.
    pub blocks512: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of the data.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// Grows with every change of the data.
    pub data_version: u64,
}

impl Inode {
    /// A new inode without names: a directory with an empty tree (whose counter starts at the generation, so that a
    /// reused block never repeats a sequence number), a file or link with an empty body.
    #[must_use]
    pub fn new(ino: Ino, generation: u64, mode: u32, uid: u32, gid: u32, now: Time) -> Inode {
        let body = match FileKind::of_mode(mode) {
            Some(FileKind::Directory) => {
                let mut root = Node::empty(0, BODY_LEN);
                root.set_aux(generation);
                Body::Tree(root)
            }
            Some(FileKind::File | FileKind::Symlink) => Body::Inline(Bytes::new()),
            _ => Body::None,
        };
        Inode {
            ino,
            generation,
            mode,
            uid,
            gid,
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            data_version: 1,
            flags: 0,
            subdirs: 0,
            links: 0,
            parents: Vec::new(),
            overflow: Vec::new(),
            attribute_block: 0,
            attributes_inline: Bytes::new(),
            body,
        }
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> FileKind {
        FileKind::of_mode(self.mode).unwrap_or(FileKind::File)
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.kind() == FileKind::Directory
    }

    /// Whether it has no name left.
    #[must_use]
    pub fn is_orphan(&self) -> bool {
        self.links == 0
    }

    /// The object that its token is for.
    #[must_use]
    pub fn object(&self) -> ObjectId {
        self.ino.object()
    }

    /// What `stat` shows.
    #[must_use]
    pub fn attributes(&self) -> Attributes {
        let (nlink, size) = if self.is_directory() {
            let nlink = if self.is_orphan() { 0 } else { self.subdirs.saturating_add(2) };
            (nlink, (self.blocks + 1) * BLOCK_SIZE as u64)
        } else {
            (self.links, self.size)
        };
        Attributes {
            ino: self.ino,
            generation: self.generation,
            kind: self.kind(),
            mode: self.mode,
            nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            size,
            blocks512: self.blocks512(),
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            btime: self.btime,
            data_version: self.data_version,
        }
    }

    /// What the inode owns, as `st_blocks` counts. The inode itself is left out, as elsewhere: a file with fewer blocks than
    /// bytes is taken to have holes. What is inside the inode is counted by itself, since no blocks are taken to be no data.
    fn blocks512(&self) -> u64 {
        let inside = match &self.body {
            Body::Tree(_) if self.is_directory() => BLOCK_SIZE as u64,
            Body::Inline(bytes) => bytes.len() as u64,
            _ => 0,
        };
        self.blocks * (BLOCK_SIZE as u64 / 512) + inside.div_ceil(512)
    }

    /// Takes the right to act as owner and group away. Set-group-id without group execution is a mode of locking, and stays if
    /// who does this is in the group (or may act as any).
    pub(crate) fn kill_set_ids(&mut self, is_in_group: impl FnOnce(u32) -> bool) {
        self.mode &= !libc::S_ISUID;
        if self.mode & libc::S_ISGID != 0 && (self.mode & libc::S_IXGRP != 0 || !is_in_group(self.gid)) {
            self.mode &= !libc::S_ISGID;
        }
    }

    /// Forgets all parent records but these. For directories, which have theirs in this block.
    pub(crate) fn keep_records(&mut self, records: &[Parent]) {
        self.parents.retain(|record| records.contains(record));
        self.links = self.parents.len() as u32;
    }

    /// Forgets all parent records but these if it is a directory: it has one name, so that what else it has is left from an
    /// exchange that a crash ended.
    pub(crate) fn keep_records_of_directory(&mut self, records: &[Parent]) {
        if self.is_directory() {
            self.keep_records(records);
        }
    }

    /// Bytes of the tail that are left.
    #[must_use]
    pub fn tail_left(&self) -> usize {
        TAIL_LEN - self.parents.len() * PARENT_LEN - self.overflow.len() * 8 - self.attributes_inline.len()
    }

    /// Whether a block could be an inode: its magic number is right. Used to tell a freed inode (`Stale`) from damage.
    #[must_use]
    pub fn looks_like_one(bytes: &[u8]) -> bool {
        get_u32(bytes, 0) == magic::INODE
    }

    /// Reads an inode from its block.
    ///
    /// # Errors
    /// `Stale` if the block is not an inode (any more); `Corrupt` if it is one whose fields make no sense.
    pub fn decode(bytes: &Bytes, ino: Ino) -> Result<Inode> {
        let block = ino.block();
        if !Self::looks_like_one(bytes) {
            return Err(FsError::Stale);
        }
        check_header(bytes, magic::INODE, block)?;
        let bad = |what| FsError::corrupt(block, what);
        let mode = get_u32(bytes, 24);
        let kind = FileKind::of_mode(mode).ok_or(bad("inode of no known type"))?;
        let parents = usize::from(get_u16(bytes, 120));
        let overflow = usize::from(get_u16(bytes, 122));
        let attributes = usize::from(get_u16(bytes, 124));
        if overflow > OVERFLOW_MAX
            || attributes > ATTRIBUTES_INLINE_MAX
            || parents * PARENT_LEN + overflow * 8 + attributes > TAIL_LEN
        {
            return Err(bad("the inode's tail overflows"));
        }
        let overflow_at = TAIL_AT + parents * PARENT_LEN;
        let attributes_at = overflow_at + overflow * 8;
        let body_len = usize::from(get_u16(bytes, 128));
        let body = match (bytes[126], kind) {
            (0, FileKind::Fifo | FileKind::CharDevice | FileKind::BlockDevice | FileKind::Socket) => Body::None,
            (1, FileKind::File | FileKind::Symlink) if body_len <= BODY_LEN => {
                Body::Inline(bytes.slice(BODY_AT..BODY_AT + body_len))
            }
            (2, FileKind::File | FileKind::Symlink | FileKind::Directory) => {
                Body::Tree(Node::decode(bytes.slice(BODY_AT..BODY_AT + BODY_LEN)).ok_or(bad("the tree's root is damaged"))?)
            }
            _ => return Err(bad("the inode's body does not go with its type")),
        };
        let time = |at: usize| Time { seconds: get_u64(bytes, at) as i64, nanos: get_u32(bytes, at + 8).min(999_999_999) };
        Ok(Inode {
            ino,
            generation: get_u64(bytes, HEADER_LEN),
            mode,
            uid: get_u32(bytes, 28),
            gid: get_u32(bytes, 32),
            rdev: get_u32(bytes, 36),
            size: get_u64(bytes, 40),
            blocks: get_u64(bytes, 48),
            atime: time(56),
            mtime: time(68),
            ctime: time(80),
            btime: time(92),
            data_version: get_u64(bytes, 104),
            flags: get_u32(bytes, 112),
            subdirs: get_u32(bytes, 116),
            links: get_u32(bytes, 132),
            parents: (0..parents).map(|i| Parent::get(bytes, TAIL_AT + i * PARENT_LEN)).collect(),
            overflow: (0..overflow).map(|i| get_u64(bytes, overflow_at + i * 8)).collect(),
            attribute_block: get_u64(bytes, 136),
            attributes_inline: bytes.slice(attributes_at..attributes_at + attributes),
            body,
        })
    }

    /// The block's bytes.
    ///
    /// # Panics
    /// If the body or the tail is longer than its area.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut bytes = vec![0; BLOCK_SIZE];
        put_header(&mut bytes, magic::INODE, Kind::Inode, self.ino.block());
        put_u64(&mut bytes, HEADER_LEN, self.generation);
        put_u32(&mut bytes, 24, self.mode);
        put_u32(&mut bytes, 28, self.uid);
        put_u32(&mut bytes, 32, self.gid);
        put_u32(&mut bytes, 36, self.rdev);
        put_u64(&mut bytes, 40, self.size);
        put_u64(&mut bytes, 48, self.blocks);
        for (at, time) in [(56, self.atime), (68, self.mtime), (80, self.ctime), (92, self.btime)] {
            put_u64(&mut bytes, at, time.seconds as u64);
            put_u32(&mut bytes, at + 8, time.nanos);
        }
        put_u64(&mut bytes, 104, self.data_version);
        put_u32(&mut bytes, 112, self.flags);
        put_u32(&mut bytes, 116, self.subdirs);
        put_u32(&mut bytes, 132, self.links);
        put_u64(&mut bytes, 136, self.attribute_block);
        match &self.body {
            Body::None => {}
            Body::Inline(data) => {
                assert!(data.len() <= BODY_LEN, "{} bytes in the body of {}", data.len(), self.ino);
                bytes[126] = 1;
                put_u16(&mut bytes, 128, data.len() as u16);
                bytes[BODY_AT..BODY_AT + data.len()].copy_from_slice(data);
            }
            Body::Tree(root) => {
                bytes[126] = 2;
                bytes[BODY_AT..BODY_AT + BODY_LEN].copy_from_slice(root.bytes());
            }
        }
        assert!(self.attributes_inline.len() <= ATTRIBUTES_INLINE_MAX && self.overflow.len() <= OVERFLOW_MAX);
        put_u16(&mut bytes, 120, self.parents.len() as u16);
        put_u16(&mut bytes, 122, self.overflow.len() as u16);
        put_u16(&mut bytes, 124, self.attributes_inline.len() as u16);
        let mut at = TAIL_AT;
        for parent in &self.parents {
            parent.put(&mut bytes, at);
            at += PARENT_LEN;
        }
        for block in &self.overflow {
            put_u64(&mut bytes, at, *block);
            at += 8;
        }
        bytes[at..at + self.attributes_inline.len()].copy_from_slice(&self.attributes_inline);
        Bytes::from(bytes)
    }

    /// The tag of an inode's block.
    #[must_use]
    pub fn tag(&self, cycle: u32) -> Tag {
        Tag { kind: Kind::Inode, owner: self.ino.0, offset: 0, birth: cycle }
    }

    /// Writes the inode as it is now, after `after`.
    pub fn write<D: Disk>(&self, tx: &mut Transaction<'_, D>, after: &[After]) -> WriteId {
        let tag = self.tag(tx.disk().cycle());
        tx.write(self.object(), self.ino.block(), self.encode(), tag, after)
    }

    /// The root of its tree.
    ///
    /// # Errors
    /// `Corrupt` if it has none.
    pub fn root(&self) -> Result<&Node> {
        match &self.body {
            Body::Tree(root) => Ok(root),
            _ => Err(FsError::corrupt(self.ino.block(), "the inode has no tree")),
        }
    }

    /// Makes its body an empty tree.
    pub fn make_tree(&mut self) {
        self.body = Body::Tree(Node::empty(0, BODY_LEN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::MirrorId;

    #[test]
    fn inodes_come_back_as_written() {
        let ino = Ino(BlockNo::new(MirrorId(3), 99).pack());
        for mode in [0o100_644, 0o040_755, 0o120_777, 0o020_600, 0o010_600, 0o140_600, 0o060_600] {
            let mut inode = Inode::new(ino, 77, mode, 1, 2, Time { seconds: -5, nanos: 999_999_999 });
            inode.attributes_inline = Bytes::from(vec![3; ATTRIBUTES_INLINE_MAX]);
            inode.parents = (0..60).map(|i| Parent { dir: i, hash: i << 50, seq: i + 3 }).collect();
            inode.overflow = (0..OVERFLOW_MAX as u64).collect();
            inode.links = 60;
            if let Body::Inline(data) = &mut inode.body {
                *data = Bytes::from(vec![1; BODY_LEN]);
            }
            let bytes = inode.encode();
            assert_eq!(Inode::decode(&bytes, ino).unwrap(), inode);
            assert!(matches!(Inode::decode(&bytes, Ino(ino.0 + 1)), Err(FsError::Corrupt { .. })));
        }
        assert_eq!(Inode::decode(&Bytes::from(vec![0; BLOCK_SIZE]), ino), Err(FsError::Stale));
    }

    #[test]
    fn no_damaged_inode_panics() {
        let ino = Ino(BlockNo::new(MirrorId(3), 99).pack());
        let good = Inode::new(ino, 77, 0o040_755, 1, 2, Time::default()).encode();
        for at in 16..2300 {
            for value in [0xff, 0x80, 0x01] {
                let mut bytes = good.to_vec();
                bytes[at] ^= value;
                if let Ok(inode) = Inode::decode(&Bytes::from(bytes), ino) {
                    let _ = inode.encode();
                }
            }
        }
    }
}
