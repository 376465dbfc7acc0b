//! `Disk`: what the file system sees of the shared logical disk.
//!
//! The life of a file operation: `acquire` the tokens of the objects that it reads and changes; `read` their blocks;
//! build an [`Operation`] (new versions of blocks, each stated to come *after* others); `commit` it, which is atomic in
//! memory and never waits; drop the tokens. The disk writes the versions behind, in an order that respects every
//! `after`; it does so within seconds, when a token is wanted by another node, or when `flush` is called.

use bytes::Bytes;
use cluster::BlockNo;
use mirror::Tag;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// A block's contents: always 4096 bytes; cheap to clone.
pub type Block = Bytes;

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectId {
    /// An inode (packed block number) with all that it owns: attributes, data, entries, extended attributes.
    Inode(u64),
    /// An allocation region: mirror, and region number within it.
    Region(u32, u32),
    /// The right to move directories to other parents (one per file system): held exclusively while one is moved.
    Rename(u32),
    /// For the collector, mkfs and the like: one at a time per file system and number.
    Task(u32, u32),
}

/// How a token is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Many nodes may read.
    Shared,
    /// One node may read and write.
    Exclusive,
}

/// A token that an operation needs.
pub type Want = (ObjectId, Mode);

/// Why the disk could not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// No free block anywhere.
    #[error("no space left on the file system")]
    NoSpace,
    /// A block is damaged on all copies.
    #[error("block {0} is damaged on every copy")]
    Corrupt(BlockNo),
    /// A pointer led outside the disk: damaged metadata.
    #[error("block {0} does not exist")]
    NoSuchBlock(BlockNo),
    /// The node was cut off, and what the operation held or had written behind is gone.
    #[error("this node was cut off from the cluster; what it had not yet written is lost")]
    Lost,
    /// The daemon is stopping.
    #[error("the daemon is shutting down")]
    Shutdown,
}

/// A run of blocks, all in one mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The first block.
    pub start: BlockNo,
    /// How many; at least 1.
    pub len: u32,
}

/// Space of the file system, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// All.
    pub blocks: u64,
    /// Free, as well as this node knows (its own not yet written allocations are counted as used).
    pub free: u64,
}

/// A write of an operation, by its position in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub usize);

/// What a block version must not become durable before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum After {
    /// An earlier write of the same operation.
    Write(WriteId),
    /// A block's current version at the time of `commit` (nothing if that is durable), not counting this operation's.
    Block(BlockNo),
    /// All file data of an object written so far, this operation's included.
    DataOf(ObjectId),
}

/// New contents of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// 4096 bytes.
    Data(Block),
    /// The block is free from now on. It is given out again only when this is durable.
    Free,
}

/// How the write-behind may treat a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteClass {
    /// Structure: small, ordered, through the log.
    Metadata,
    /// File data into a block that was freshly allocated and that nothing durable points to yet.
    FreshData,
    /// File data over the file's older data.
    OverwrittenData,
}

/// One write of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Which block.
    pub block: BlockNo,
    /// The object that it belongs to: giving up that object's token, or flushing it, flushes this.
    pub object: ObjectId,
    /// Contents.
    pub content: Content,
    /// Tag that goes with it (ignored when freeing).
    pub tag: Tag,
    /// Class.
    pub class: WriteClass,
    /// What it comes after. A block's own earlier versions always come before.
    pub after: Vec<After>,
}

/// A file operation's writes, in order. `after` may only name earlier ones, so the whole graph is acyclic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// The writes. A block may occur more than once (rename writes an entry block twice).
    pub writes: Vec<Write>,
}

impl Operation {
    /// An empty operation.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a write; the id is for the `after` of later ones.
    pub fn push(&mut self, write: Write) -> WriteId {
        self.writes.push(write);
        WriteId(self.writes.len() - 1)
    }

    /// The newest contents that this operation gives a block, for code that goes on changing what it has changed.
    #[must_use]
    pub fn latest(&self, block: BlockNo) -> Option<&Content> {
        self.writes.iter().rev().find(|w| w.block == block).map(|w| &w.content)
    }
}

/// What `flush` makes durable (with everything that it comes after).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlushTarget {
    /// All dirty blocks of an object.
    Object(ObjectId),
    /// One block's current version.
    Block(BlockNo),
    /// Everything that this node has written behind.
    All,
}

/// What the file system is told by the disk. Called from disk tasks; must return at once (never wait for the kernel's
/// page or directory locks, for another node, or for a token).
pub trait Upcalls: Send + Sync + 'static {
    /// Another node wants the token: no operation of this node uses it any more, and none will before it is granted
    /// again. Drop what the kernel was told on the strength of it. `keep` is the mode that stays (`None`: nothing). What cannot
    /// be taken back runs out by itself: the token is given up after the time that is returned, at the earliest.
    fn revoked(&self, object: ObjectId, keep: Option<Mode>) -> Duration;

    /// All tokens are gone (this node was declared dead).
    fn reset(&self);

    /// Written-behind data of these objects is lost. The disk remembers it until [`Disk::flush`] or [`Disk::take_loss`] has
    /// reported it, once per object; this is for those who want to know at once.
    fn lost(&self, objects: &[ObjectId]);
}

/// The shared logical disk of one file system, seen from one node. Cheap to clone.
pub trait Disk: Clone + Send + Sync + 'static {
    /// Tokens held by an operation. Dropping it lets them be revoked; they stay cached on the node.
    type Tokens: Send + Sync + 'static;

    /// Gets tokens, all or none, without deadlock (they are taken in the order of `ObjectId`; `wants` may be in any order;
    /// the stronger of duplicates counts). Within the node it is a readers-writer lock per object: an Exclusive want
    /// excludes other operations of this node, too. Never call it while holding tokens.
    fn acquire(&self, wants: &[Want]) -> impl Future<Output = Result<Self::Tokens, DiskError>> + Send;

    /// As `acquire` if no other node and no waiting is needed.
    fn try_acquire(&self, wants: &[Want]) -> Option<Self::Tokens>;

    /// Declares a new object (an inode in a block just returned by `alloc`) and takes its token exclusively without asking
    /// anyone: nobody else can know of it. Does not wait, and may be called while holding tokens.
    fn adopt(&self, object: ObjectId) -> Self::Tokens;

    /// Reads a block of an object whose token is held: its newest version, from the cache if it is there.
    fn read(&self, object: ObjectId, block: BlockNo) -> impl Future<Output = Result<Block, DiskError>> + Send;

    /// As `read` if it is in the cache.
    fn try_read(&self, object: ObjectId, block: BlockNo) -> Option<Block>;

    /// Reads many blocks at once, in the order given (large reads; misses are fetched in parallel).
    fn read_many(&self, object: ObjectId, blocks: &[BlockNo]) -> impl Future<Output = Result<Vec<Block>, DiskError>> + Send;

    /// Starts fetching blocks into the cache, and returns at once.
    fn read_ahead(&self, object: ObjectId, blocks: &[BlockNo]);

    /// Takes up to `count` free blocks (at least 1; contiguous; near `near` if possible: same mirror first). They are not
    /// durably allocated before something is written to them; give back what is not used with `unalloc`.
    fn alloc(&self, near: Option<BlockNo>, count: u32) -> impl Future<Output = Result<Extent, DiskError>> + Send;

    /// As `alloc` if no other node and no waiting is needed.
    fn try_alloc(&self, near: Option<BlockNo>, count: u32) -> Option<Extent>;

    /// Gives back allocated blocks to which nothing was written.
    fn unalloc(&self, extent: Extent);

    /// Waits until there is room for more dirty data. Call it before `acquire`, never while holding tokens.
    fn admit(&self) -> impl Future<Output = Result<(), DiskError>> + Send;

    /// Applies an operation: from now on `read` returns its versions. Atomic with respect to `flush` and revocation. The
    /// tokens of all its objects must be held exclusively. Fails only if the node was cut off (nothing is applied then).
    fn commit(&self, operation: Operation) -> Result<(), DiskError>;

    /// Makes targets durable on every in-sync copy, with all that they come after. `Lost` if something of the targets was
    /// lost since it was last reported.
    fn flush(&self, targets: &[FlushTarget]) -> impl Future<Output = Result<(), DiskError>> + Send;

    /// Whether something of an object was lost since it was last reported; it has been now (for `close`, which flushes nothing).
    fn take_loss(&self, object: ObjectId) -> bool;

    /// Declares whether this node has the object open. When the token is given up the master is told, so that
    /// `open_elsewhere` is right on the node that gets it. It holds until it is taken back: when the node is cut off the
    /// masters forget it, and are told again when it is let back in, before it serves anything.
    fn set_open(&self, object: ObjectId, open: bool);

    /// Whether another node has the object open; `None`: that will be known in a moment (a node has come or is back). Its
    /// token must be held exclusively.
    fn open_elsewhere(&self, object: ObjectId) -> Option<bool>;

    /// Space of the file system.
    fn usage(&self) -> impl Future<Output = Result<Usage, DiskError>> + Send;

    /// Tags of blocks as they are on the disks (collector, checker): see `mirror::Mirrors::tags`.
    fn tags(&self, first: BlockNo, count: u32) -> impl Future<Output = Result<Vec<Tag>, DiskError>> + Send;

    /// The file system's mirrors with their sizes in blocks; block 0 of the first is the superblock.
    fn mirrors(&self) -> Vec<(cluster::MirrorId, u32)>;

    /// The collector's cycle: blocks allocated from now on are born in it.
    fn cycle(&self) -> u32;

    /// Sets who is told of revocations. Once per disk.
    fn set_upcalls(&self, upcalls: Arc<dyn Upcalls>);
}
