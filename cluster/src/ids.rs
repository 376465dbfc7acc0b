//! Identifiers: newtypes for every number that names something. None of them is ever used again for another thing.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a block, the unit of storage, caching and checksums.
pub const BLOCK_SIZE: usize = 4096;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A member of the cluster: 1, 2, 3 … in order of joining.
    NodeId(u32), "n");
id!(
    /// A disk that a node gives to the cluster.
    DiskId(u32), "d");
id!(
    /// A mirror: `copies` equal areas on disks of different nodes. The first one is 1.
    MirrorId(u32), "m");
id!(
    /// A file system on the shared logical disk.
    FsId(u32), "fs");
id!(
    /// A span of stable configuration. It grows by one with every change of membership or of an in-sync set.
    Epoch(u64), "e");
id!(
    /// Counts the starts of a node's daemon; with the node id it names one life of one process.
    Incarnation(u64), "i");

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

/// The address of a block on the shared logical disk: a mirror, and an index of a 4 KiB block within it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockNo {
    /// The mirror that keeps the block.
    pub mirror: MirrorId,
    /// Index of the block within the mirror.
    pub index: u32,
}

impl BlockNo {
    /// A block's address from its parts.
    #[must_use]
    pub const fn new(mirror: MirrorId, index: u32) -> Self {
        BlockNo { mirror, index }
    }

    /// The address as one number, as it is stored on disk and shown as an inode number: mirror in the high half.
    /// Never 0 or 1, since the first mirror is 1.
    #[must_use]
    pub const fn pack(self) -> u64 {
        ((self.mirror.0 as u64) << 32) | self.index as u64
    }

    /// The reverse of [`BlockNo::pack`].
    #[must_use]
    pub const fn unpack(packed: u64) -> Self {
        BlockNo { mirror: MirrorId((packed >> 32) as u32), index: packed as u32 }
    }
}

impl fmt::Display for BlockNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.mirror, self.index)
    }
}

impl fmt::Debug for BlockNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
