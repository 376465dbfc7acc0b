//! The bytes on disk: every structure of the file system, described once, here (relations: `docs/format.md`).
//!
//! All numbers are little-endian. A structure fills one 4 KiB block and begins with the same 16 bytes:
//!
//! ```text
//!   0  u32  magic        one per kind of structure
//!   4  u16  version      of the format of this kind
//!   6  u8   kind         as in the block's tag
//!   7  u8   0
//!   8  u64  block        its own packed block number
//! ```
//!
//! The block's checksum is in its tag (made by the writing node, checked by the reading one), so there is none here.
//!
//! Superblock: block 0 of the file system's first mirror.
//!
//! ```text
//!  16  [16] uuid
//!  32  [16] hash_key     key of the name hash
//!  48  u64  root         packed block number of the root directory's inode (block 1)
//!  56  i64  created      seconds since 1970
//!  64  [64] label        UTF-8, padded with zeros
//! ```
//!
//! Inode: its block's packed number is the inode number. The body and the tail have fixed places.
//!
//! ```text
//!  16  u64  generation     differs for each use of the block as an inode
//!  24  u32  mode           file type and permissions, as in `st_mode`
//!  28  u32  uid
//!  32  u32  gid
//!  36  u32  rdev
//!  40  u64  size           bytes
//!  48  u64  blocks         blocks owned, without the inode itself
//!  56  4 × (i64 s, u32 ns) atime, mtime, ctime, btime
//! 104  u64  data_version   grows with every change of the data
//! 112  u32  flags          1: old data beyond the end, 2: security.capability, 4: access list, 8: default list
//! 116  u32  subdirs        directories in this directory
//! 120  u16  parents        records in the tail
//! 122  u16  overflow       pointers to blocks with further parent records, in the tail
//! 124  u16  attribute_len  bytes of inline extended attributes, in the tail
//! 126  u8   body           0: none, 1: inline bytes, 2: root of a B+tree
//! 127  u8   0
//! 128  u16  body_len       bytes used, for inline bytes
//! 132  u32  links          parent records in all, inline and overflow
//! 136  u64  attributes     first block of further extended attributes, or 0
//! 192  [2048] body
//! 2240 [1856] tail: parents × (u64 dir, u64 hash, u64 seq), overflow × u64 block, attribute_len bytes
//! ```
//!
//! Overflow block of parent records (kind Attribute): replaced as a whole, never changed in place.
//!
//! ```text
//!  16  u64  owner          the inode
//!  24  u64  generation     of the inode
//!  32  u16  parents
//!  40  parents × (u64 dir, u64 hash, u64 seq)
//! ```
//!
//! Block of extended attributes (kind Attribute): what it holds from byte 40 on is described in `ops::xattr`.
//!
//! ```text
//!  16  u64  owner          the inode
//!  24  u64  generation     of the inode
//!  32  u64  next           next block of the chain, or 0
//!  40  contents
//! ```
//!
//! Tree block (kind Directory or Extents): a header, then a node. The root node is the inode's body.
//!
//! ```text
//!  16  u64  owner          the inode
//!  24  u64  generation     of the inode
//!  32  u64  low            lowest key when it was made (the tag's offset)
//!  40  node
//!
//! node:
//!   0  u8   level          0: leaf
//!   2  u16  count          slots
//!   4  u16  heap           lowest used byte of the heap, which grows down from the end
//!   6  u16  live           bytes of the heap in use
//!   8  u64  aux            directories: the counter of sequence numbers
//!  16  count × (u64 key, u16 offset, u16 len), keys ascending
//! ```
//!
//! A leaf's values: extents as in [`ExtentRecord`], directory entries as in `directory`. An inner node's values are packed
//! block numbers of the children that hold keys from the slot's key on. A node may hold keys outside the range that its
//! parent gives it (a crash between two steps of a split leaves them); they are ignored.
//!
//! Excludes: what the structures mean together (`inode`, `btree`, `directory`).

use crate::error::{FsError, Result};
use cluster::{BLOCK_SIZE, BlockNo};

/// Version of all structures.
pub const VERSION: u16 = 1;

/// Magic numbers, by kind of structure.
pub mod magic {
    /// Superblock.
    pub const SUPER: u32 = u32::from_le_bytes(*b"PLSR");
    /// Inode.
    pub const INODE: u32 = u32::from_le_bytes(*b"PINO");
    /// Block of a tree.
    pub const TREE: u32 = u32::from_le_bytes(*b"PTRE");
    /// Overflow block of parent records.
    pub const PARENTS: u32 = u32::from_le_bytes(*b"PPAR");
    /// Extended attributes.
    pub const ATTRIBUTES: u32 = u32::from_le_bytes(*b"PATT");
}

/// Bytes of the header that every structure begins with.
pub const HEADER_LEN: usize = 16;
/// Where an inode's body begins.
pub const BODY_AT: usize = 192;
/// Bytes of an inode's body: the most that a file or symlink has inline.
pub const BODY_LEN: usize = 2048;
/// Where an inode's tail begins.
pub const TAIL_AT: usize = BODY_AT + BODY_LEN;
/// Bytes of an inode's tail.
pub const TAIL_LEN: usize = BLOCK_SIZE - TAIL_AT;
/// Bytes of a parent record.
pub const PARENT_LEN: usize = 24;
/// Parent records that always fit the tail, beside the most of inline attributes and overflow pointers.
pub const PARENTS_INLINE: usize = 60;
/// The most overflow blocks of one inode.
pub const OVERFLOW_MAX: usize = 32;
/// The most bytes of extended attributes inline.
pub const ATTRIBUTES_INLINE_MAX: usize = TAIL_LEN - PARENTS_INLINE * PARENT_LEN - OVERFLOW_MAX * 8;
/// Where the records of an overflow block begin.
pub const OVERFLOW_AT: usize = 40;
/// Parent records in an overflow block.
pub const OVERFLOW_PARENTS: usize = (BLOCK_SIZE - OVERFLOW_AT) / PARENT_LEN;
/// The most names of one inode.
pub const LINKS_MAX: usize = PARENTS_INLINE + OVERFLOW_MAX * OVERFLOW_PARENTS;
/// Where the number of the next block of a chain of extended attributes is.
pub const ATTRIBUTES_NEXT_AT: usize = 32;
/// Where the contents of a block of extended attributes begin.
pub const ATTRIBUTES_AT: usize = 40;
/// The most blocks of extended attributes of one inode.
pub const ATTRIBUTE_BLOCKS_MAX: usize = 64;
/// Where a tree block's node begins.
pub const NODE_AT: usize = 40;
/// Bytes of a node in a block of its own.
pub const NODE_LEN: usize = BLOCK_SIZE - NODE_AT;
/// The longest name, in bytes.
pub const NAME_MAX: usize = 255;
/// The longest target of a symbolic link, in bytes.
pub const TARGET_MAX: usize = 4095;
/// The largest file, in bytes: what an `off_t` can say.
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;

const _: () = assert!(ATTRIBUTES_INLINE_MAX >= 128, "ACLs and security labels should fit");
const _: () = assert!(TAIL_AT + TAIL_LEN == BLOCK_SIZE);

/// Reads a `u16`; 0 beyond the end.
#[must_use]
pub fn get_u16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

/// Reads a `u32`; 0 beyond the end.
#[must_use]
pub fn get_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Reads a `u64`; 0 beyond the end.
#[must_use]
pub fn get_u64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Writes a `u16` within the bounds.
pub fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes a `u32` within the bounds.
pub fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Writes a `u64` within the bounds.
pub fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Writes the header of a structure.
pub fn put_header(bytes: &mut [u8], magic: u32, kind: sld::Kind, block: BlockNo) {
    put_u32(bytes, 0, magic);
    put_u16(bytes, 4, VERSION);
    bytes[6] = kind as u8;
    bytes[7] = 0;
    put_u64(bytes, 8, block.pack());
}

/// Checks the header of a structure.
///
/// # Errors
/// `Corrupt` if the length, magic, version or own address is wrong.
pub fn check_header(bytes: &[u8], magic: u32, block: BlockNo) -> Result<()> {
    if bytes.len() != BLOCK_SIZE {
        return Err(FsError::corrupt(block, "not a whole block"));
    }
    if get_u32(bytes, 0) != magic {
        return Err(FsError::corrupt(block, "wrong magic number"));
    }
    if get_u16(bytes, 4) != VERSION {
        return Err(FsError::corrupt(block, "unknown version of the format"));
    }
    if get_u64(bytes, 8) != block.pack() {
        return Err(FsError::corrupt(block, "the block says that it is another one"));
    }
    Ok(())
}

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Time {
    /// Seconds since 1970; may be negative.
    pub seconds: i64,
    /// Nanoseconds in the second, below 10⁹.
    pub nanos: u32,
}

impl Time {
    /// Nanoseconds since 1970, 0 for earlier times.
    #[must_use]
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.seconds).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(u64::from(self.nanos))
    }

    /// The reverse of [`Time::as_nanos`].
    #[must_use]
    pub fn from_nanos(nanos: u64) -> Self {
        Time { seconds: (nanos / 1_000_000_000) as i64, nanos: (nanos % 1_000_000_000) as u32 }
    }
}

/// The superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Identity of the file system.
    pub uuid: [u8; 16],
    /// Key of the name hash.
    pub hash_key: [u8; 16],
    /// Packed block number of the root directory's inode.
    pub root: u64,
    /// When the file system was made.
    pub created: i64,
    /// Its label.
    pub label: String,
}

impl Superblock {
    /// The block's bytes.
    #[must_use]
    pub fn encode(&self, block: BlockNo) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_SIZE];
        put_header(&mut bytes, magic::SUPER, sld::Kind::Super, block);
        bytes[16..32].copy_from_slice(&self.uuid);
        bytes[32..48].copy_from_slice(&self.hash_key);
        put_u64(&mut bytes, 48, self.root);
        put_u64(&mut bytes, 56, self.created as u64);
        let label = self.label.as_bytes();
        let len = label.len().min(64);
        bytes[64..64 + len].copy_from_slice(&label[..len]);
        bytes
    }

    /// Reads it.
    ///
    /// # Errors
    /// `Corrupt` if it is not one.
    pub fn decode(bytes: &[u8], block: BlockNo) -> Result<Superblock> {
        check_header(bytes, magic::SUPER, block)?;
        let array = |at: usize| -> [u8; 16] { bytes[at..at + 16].try_into().unwrap_or_default() };
        let label = bytes[64..128].split(|b| *b == 0).next().unwrap_or_default();
        Ok(Superblock {
            uuid: array(16),
            hash_key: array(32),
            root: get_u64(bytes, 48),
            created: get_u64(bytes, 56) as i64,
            label: String::from_utf8_lossy(label).into_owned(),
        })
    }
}

/// Where a run of a file's blocks is: the value in a file's tree, whose key is the run's first block within the file.
/// 16 bytes: `u64` packed first block, `u32` length in blocks, `u32` flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentRecord {
    /// First block on the disk.
    pub start: BlockNo,
    /// Length in blocks, at least 1.
    pub len: u32,
    /// [`ExtentRecord::UNWRITTEN`] or 0.
    pub flags: u32,
}

impl ExtentRecord {
    /// Bytes of a record.
    pub const LEN: usize = 16;
    /// The blocks are reserved but read as zeros.
    pub const UNWRITTEN: u32 = 1;

    /// The record's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        put_u64(&mut bytes, 0, self.start.pack());
        put_u32(&mut bytes, 8, self.len);
        put_u32(&mut bytes, 12, self.flags);
        bytes
    }

    /// Reads a record; `None` if its length is wrong or it is empty.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<ExtentRecord> {
        if bytes.len() != Self::LEN {
            return None;
        }
        let (start, len) = (BlockNo::unpack(get_u64(bytes, 0)), get_u32(bytes, 8));
        (len > 0 && start.index.checked_add(len).is_some()).then(|| ExtentRecord { start, len, flags: get_u32(bytes, 12) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::MirrorId;

    #[test]
    fn superblock_and_extents_come_back_as_written() {
        let block = BlockNo::new(MirrorId(1), 0);
        let superblock =
            Superblock { uuid: [7; 16], hash_key: [9; 16], root: (1 << 32) + 1, created: -3, label: "häuser".to_owned() };
        let bytes = superblock.encode(block);
        assert_eq!(Superblock::decode(&bytes, block).unwrap(), superblock);
        assert!(Superblock::decode(&bytes, BlockNo::new(MirrorId(1), 1)).is_err());
        assert!(Superblock::decode(&bytes[1..], block).is_err());
        let extent = ExtentRecord { start: BlockNo::new(MirrorId(2), 77), len: 3, flags: ExtentRecord::UNWRITTEN };
        assert_eq!(ExtentRecord::decode(&extent.encode()), Some(extent));
        assert_eq!(ExtentRecord::decode(&[0; 16]), None);
    }
}
