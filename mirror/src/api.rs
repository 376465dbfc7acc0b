//! What the layer above sees: reading and writing blocks of mirrors, and the tags that go with them.

use bytes::Bytes;
use cluster::{BlockNo, BoxFuture, MirrorId};
use serde::{Deserialize, Serialize};
use std::io;

/// Blocks in a region, the unit in which free space is leased to nodes: 64 MiB. A mirror's size is a multiple of it.
pub const REGION_BLOCKS: u32 = 16_384;

/// The version of a block. Versions of one block grow: the epoch of the write in the high 24 bits, and below it a
/// counter (Lamport's logical clock, carried by every token message) that orders the writes of successive holders of
/// its token. 0: never written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version(pub u64);

impl Version {
    /// Bits of the counter.
    pub const COUNTER_BITS: u32 = 40;

    /// The lowest version of an epoch.
    #[must_use]
    pub const fn first_of(epoch: cluster::Epoch) -> Version {
        Version(epoch.0 << Self::COUNTER_BITS)
    }

    /// The epoch in which it was made.
    #[must_use]
    pub const fn epoch(self) -> cluster::Epoch {
        cluster::Epoch(self.0 >> Self::COUNTER_BITS)
    }
}

/// What a block is for, from its owner's point of view. Stored in the tag so that a collector or a checker can sweep a
/// disk without following pointers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Kind {
    /// Not allocated.
    #[default]
    Free = 0,
    /// Superblock of a file system.
    Super = 1,
    /// An inode (its owner is itself).
    Inode = 2,
    /// A node of an inode's directory tree.
    Directory = 3,
    /// A node of an inode's extent tree.
    Extents = 4,
    /// A block of file data.
    Data = 5,
    /// An extended attribute's value, or an overflow of parent records.
    Attribute = 6,
}

/// What is remembered about a block beside its contents; given with every write, kept by the disk, and returned with
/// every read. The checksum over (place, version, data) is kept with it but made and checked by `mirror` itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tag {
    /// What it is for; `Free` if it is not allocated.
    pub kind: Kind,
    /// The inode that owns it (packed block number), 0 for none.
    pub owner: u64,
    /// Where in its owner it belongs (a file's block index, a tree node's key).
    pub offset: u64,
    /// The collector's cycle in which it was allocated.
    pub birth: u32,
}

/// One block's new version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockWrite {
    /// Which block; all writes of a group are in one mirror.
    pub block: BlockNo,
    /// Its new tag.
    pub tag: Tag,
    /// Its contents, 4096 bytes; `None` when only the tag changes (a block is freed).
    pub data: Option<Bytes>,
}

/// Writes that become durable together or, if a crash comes first, not at all. At most [`WriteGroup::BLOCKS_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteGroup {
    /// The writes; no block twice.
    pub writes: Vec<BlockWrite>,
    /// File data for freshly allocated blocks, to which nothing durable points yet: may go straight to its place instead
    /// of through the log, and need not be atomic as a group. What is submitted later is still durable only after it.
    pub fresh_data: bool,
}

impl WriteGroup {
    /// The most blocks in one group: 4 MiB of payload.
    pub const BLOCKS_MAX: usize = 1024;
}

/// A block that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRead {
    /// Its contents (zeros if it was never written or is free).
    pub data: Bytes,
    /// Its tag.
    pub tag: Tag,
    /// Its version.
    pub version: Version,
}

/// Free blocks of a region: bit `i % 64` of word `i / 64` is set if block `i` of the region is free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionFree {
    /// `REGION_BLOCKS / 64` words.
    pub words: Vec<u64>,
}

/// Space of one mirror.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks per region, durable allocations only.
    pub free: Vec<u32>,
}

/// Why a block could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MirrorError {
    /// No copy has a right version of the block.
    #[error("block {block} is damaged on every copy that can be reached; restore it from a backup, or run fsck")]
    Corrupt {
        /// The block.
        block: BlockNo,
    },
    /// The block is outside its mirror, or there is no such mirror.
    #[error("block {block} does not exist")]
    NoSuchBlock {
        /// The block.
        block: BlockNo,
    },
    /// This node is no longer the member that submitted the write (it was declared dead meanwhile): the write may or may
    /// not be there, and must not be tried again without a new token.
    #[error("this node was cut off from the cluster and lost its right to write")]
    Fenced,
    /// The daemon is stopping.
    #[error("the daemon is shutting down")]
    Shutdown,
}

/// The blocks of all mirrors, as one node reaches them.
///
/// While a mirror has no in-sync member that can be reached, or this node's lease has run out, calls wait. Requests that
/// are refused because of an epoch change, or whose peer dies, are repeated in the new epoch by this layer.
pub trait Mirrors: Send + Sync + 'static {
    /// Writes a group to all in-sync (and syncing) members; resolves when it is durable on every in-sync one.
    ///
    /// Order: the groups that one node submits to one mirror become durable in the order of the calls to `submit` (the
    /// order in which the futures are polled does not matter): after any crash, the durable ones are a prefix.
    ///
    /// `clock` is this node's logical clock; the group's versions are made from it and from the epoch, at each attempt
    /// anew. The versions finally used are returned (all blocks of a group have the same).
    fn submit(&self, mirror: MirrorId, group: WriteGroup) -> BoxFuture<'static, Result<Version, MirrorError>>;

    /// Reads blocks (of any mirrors), in order. Prefers a local copy; a damaged copy is repaired from a good one.
    fn read(&self, blocks: Vec<BlockNo>) -> BoxFuture<'static, Result<Vec<BlockRead>, MirrorError>>;

    /// Reads the tags and versions of up to 16,384 blocks, from `first` on, without their contents.
    fn tags(&self, first: BlockNo, count: u32) -> BoxFuture<'static, Result<Vec<(Tag, Version)>, MirrorError>>;

    /// Which blocks of a region are free (region number within the mirror = block index / `REGION_BLOCKS`). Afterwards this
    /// node's clock is past the versions with which they were freed, by whatever node: no token message tells of those.
    fn region_free(&self, mirror: MirrorId, region: u32) -> BoxFuture<'static, Result<RegionFree, MirrorError>>;

    /// Space of a mirror, as its acting member counts it.
    fn space(&self, mirror: MirrorId) -> BoxFuture<'static, Result<Space, MirrorError>>;

    /// Moves the node's logical clock to at least `seen` (from a token message) and returns it: versions made from now
    /// on are greater than any that the sender had made.
    fn witness(&self, seen: u64) -> u64;

    /// The node's logical clock, to be sent along with token messages.
    fn clock(&self) -> u64;
}

/// A disk or a file used as one: 4 KiB blocks. Production: `O_DIRECT` and `fdatasync`; simulator: memory that forgets
/// what was not flushed.
pub trait BlockDevice: Send + Sync + 'static {
    /// Size in blocks.
    fn blocks(&self) -> u64;

    /// Reads `count` blocks from block `at` on.
    fn read(&self, at: u64, count: usize) -> BoxFuture<'_, io::Result<Bytes>>;

    /// Writes whole blocks (each part's length is a multiple of 4096) from block `at` on, one after the other.
    /// Not durable before `flush`.
    fn write(&self, at: u64, parts: Vec<Bytes>) -> BoxFuture<'_, io::Result<()>>;

    /// Makes every write that completed before this call durable. After an error nothing may be trusted: the caller
    /// faults the disk and never retries.
    fn flush(&self) -> BoxFuture<'_, io::Result<()>>;
}
