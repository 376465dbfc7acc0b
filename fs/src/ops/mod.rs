//! `FileSystem`: the file operations, one file per family.
//!
//! Every operation has the same shape: take tokens, look, and if the look shows that others are needed, drop all, take the
//! larger set, and look again (`Locks`, `Work`); then build one transaction and commit it. Tokens are taken all at once
//! and in order, so operations never deadlock.
//!
//! Names follow the sixteen rules of the checked protocol; comments give a rule's number where it is followed:
//!
//! 1. The counter of sequence numbers lives in the entry block and is written with the entry.
//! 2. LOOKUP judges all candidates of a name; listing does if one is flagged.
//! 3. Create: inode, then unflagged entry.
//! 4. Link: flagged entry, then the inode gains its record (commit), then unflag.
//! 5. Unlink: all candidates leave in one block write, then each of their inodes loses its record.
//! 6. Rename: flag the old entry and write the new one flagged; the inode swaps its record (commit); remove the old entry;
//!    remove the displaced one and unflag the new one in one write; the displaced inode loses its record.
//! 7. The first entry-block write for a name drops its losing candidates.
//! 8. Clean-up is part of the operation; only its writing is lazy.
//! 9. A commit goes after the entry blocks of the inode's names.
//! 10. Removing an entry goes after its inode.
//! 11. A rename's commit goes after the displaced inode.
//! 12. A freed block is reused only when the free is durable (the disk sees to it).
//! 13. fsync of a file flushes its inode and its names' entry blocks; of a directory, its blocks.
//! 14. Handing a token over flushes the closure of what it protects (the disk). 15. Coalescing (the disk).
//! 16. Collector: settle names, then drop records without an entry, then free what has none and is not open.
//!
//! Excludes: file data and extended attributes (`data`, `xattr`), the kernel (`shell`).

mod access;
mod attributes;
pub mod data;
mod handles;
mod linger;
mod link;
mod list;
mod lookup;
mod make;
pub(crate) mod meant;
mod payload;
mod reclaim;
mod remove;
mod rename;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
mod work;
pub mod xattr;

pub use access::{AccessPolicy, AccessTimes};
pub use attributes::{Permit, SetAttributes, SetTime};
pub use handles::OpenFlags;
pub use list::DirEntry;
pub use lookup::StatFs;
pub use make::NewNode;
pub(crate) use reclaim::attribute_blocks;
pub use rename::RenameFlags;
pub(crate) use work::{Locks, Work};

use crate::directory::NameHash;
use crate::error::{FsError, Result};
use crate::format::{Superblock, Time};
use crate::inode::{Attributes, Ino, Inode, Parent};
use crate::transaction::{Source, Transaction};
use bytes::Bytes;
use cluster::BlockNo;
use handles::{Names, Opens};
use parking_lot::Mutex;
use sld::{Disk, FlushTarget, Kind, Mode, ObjectId, Tag, Want};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Gives the time of day. Production: the wall clock; simulator: its own.
pub type Clock = Arc<dyn Fn() -> Time + Send + Sync>;

/// On whose behalf an operation is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process.
    pub pid: u32,
    /// Permissions that what it makes does not get.
    pub umask: u32,
}

/// What a new file system is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatParams {
    /// Identity.
    pub uuid: [u8; 16],
    /// Random key of the name hash.
    pub hash_key: [u8; 16],
    /// Label, at most 64 bytes.
    pub label: String,
    /// Owner of the root directory.
    pub uid: u32,
    /// Group of the root directory.
    pub gid: u32,
    /// Permissions of the root directory.
    pub mode: u32,
    /// Now.
    pub now: Time,
}

/// A file system on a shared disk, seen from one node. Share it by `Arc`.
pub struct FileSystem<D: Disk> {
    disk: D,
    superblock: Superblock,
    hash: NameHash,
    clock: Clock,
    /// The last generation given out; they follow the clock.
    generation: AtomicU64,
    opens: Mutex<Opens>,
    names: Mutex<Names>,
    /// Who reads files from front to back.
    streams: stream::Streams,
    /// Replaced files that live on for a moment.
    lingering: linger::Lingering,
    /// Reads that the inodes' access times do not show yet.
    accesses: access::Accesses,
    /// Removed files whose blocks are still to be freed.
    removed: reclaim::Removed,
    /// Told of what has no name any more.
    on_removal: OnceLock<Box<OnRemoval>>,
}

/// Told of the attributes that an inode had when its last name was removed, and of those that it is changed to after that, by this
/// node, while its token is held. Must return at once.
pub type OnRemoval = dyn Fn(&Attributes) + Send + Sync;

fn first_block(disk: &impl Disk) -> Result<BlockNo> {
    let first = disk.mirrors().into_iter().map(|(mirror, _)| mirror).min().ok_or(FsError::NoSpace)?;
    Ok(BlockNo::new(first, 0))
}

impl<D: Disk> FileSystem<D> {
    /// Makes an empty file system: the superblock and the root directory. Durable when it returns.
    ///
    /// # Errors
    /// Those of the disk.
    pub async fn format(disk: &D, params: &FormatParams) -> Result<()> {
        let block = first_block(disk)?;
        let root = Ino(BlockNo::new(block.mirror, block.index + 1).pack());
        let object = ObjectId::Inode(block.pack());
        disk.admit().await?;
        let _tokens = disk.acquire(&[(object, Mode::Exclusive), (root.object(), Mode::Exclusive)]).await?;
        let superblock = Superblock {
            uuid: params.uuid,
            hash_key: params.hash_key,
            root: root.0,
            created: params.now.seconds,
            label: params.label.clone(),
        };
        let mut inode =
            Inode::new(root, params.now.as_nanos().max(1), 0o040_000 | params.mode & 0o7777, params.uid, params.gid, params.now);
        // The root's only name is itself; no entry leads to it.
        inode.parents.push(Parent { dir: root.0, hash: 0, seq: 0 });
        inode.links = 1;
        let mut tx = Transaction::new(disk);
        let write = inode.write(&mut tx, &[]);
        let tag = Tag { kind: Kind::Super, owner: 0, offset: 0, birth: disk.cycle() };
        tx.write(object, block, Bytes::from(superblock.encode(block)), tag, &[sld::After::Write(write)]);
        tx.commit()?;
        disk.flush(&[FlushTarget::All]).await?;
        Ok(())
    }

    /// Opens the file system on a disk: reads the superblock and looks at the root.
    ///
    /// # Errors
    /// `Corrupt` if there is none, or of an unknown version; those of the disk.
    pub async fn mount(disk: D, clock: Clock) -> Result<FileSystem<D>> {
        let block = first_block(&disk)?;
        let object = ObjectId::Inode(block.pack());
        let tokens = disk.acquire(&[(object, Mode::Shared)]).await?;
        let superblock = Superblock::decode(&disk.read(object, block).await?, block)?;
        drop(tokens);
        let fs = FileSystem {
            hash: NameHash::new(&superblock.hash_key),
            disk,
            superblock,
            clock,
            generation: AtomicU64::new(0),
            opens: Mutex::default(),
            names: Mutex::default(),
            streams: stream::Streams::default(),
            lingering: linger::Lingering::default(),
            accesses: access::Accesses::default(),
            removed: reclaim::Removed::default(),
            on_removal: OnceLock::new(),
        };
        if !fs.inode(fs.root()).await?.is_directory() {
            return Err(FsError::corrupt(fs.root().block(), "the root is not a directory"));
        }
        Ok(fs)
    }

    /// Sets who is told of what has lost its last name. Once.
    pub fn on_removal(&self, tell: Box<OnRemoval>) {
        if self.on_removal.set(tell).is_err() {
            tracing::warn!("who is told of removals was set twice; the first one stays");
        }
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> Ino {
        Ino(self.superblock.root)
    }

    /// The superblock.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &D {
        &self.disk
    }

    /// The time of day.
    #[must_use]
    pub fn now(&self) -> Time {
        (self.clock)()
    }

    /// An empty transaction.
    pub(crate) fn transaction(&self) -> Transaction<'_, D> {
        Transaction::new(&self.disk)
    }

    /// Takes tokens; without a hop if they are at hand. For changes call `disk().admit()` before.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) async fn tokens(&self, wants: &[Want]) -> Result<D::Tokens> {
        match self.disk.try_acquire(wants) {
            Some(tokens) => Ok(tokens),
            None => Ok(self.disk.acquire(wants).await?),
        }
    }

    /// Reads an inode whose token is held.
    ///
    /// # Errors
    /// `Stale` if it is gone; `Corrupt`; those of the disk.
    pub(crate) async fn load(&self, source: Source<'_, D>, ino: Ino) -> Result<Inode> {
        load(source, ino).await
    }

    /// Reads an inode under its shared token, which is given up at once.
    ///
    /// # Errors
    /// As `load`.
    pub(crate) async fn inode(&self, ino: Ino) -> Result<Inode> {
        self.again(|| self.try_inode(ino)).await
    }

    async fn try_inode(&self, ino: Ino) -> Result<Inode> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        self.load(Source::disk(&self.disk), ino).await
    }

    /// A generation for a new inode: greater than all that this node gave out, and about the time in nanoseconds, so that
    /// it differs from what other nodes gave to the same block before.
    pub(crate) fn next_generation(&self) -> u64 {
        let now = self.now().as_nanos().max(1);
        let update = |last: u64| Some(now.max(last + 1));
        match self.generation.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update) {
            Ok(last) | Err(last) => now.max(last + 1),
        }
    }
}

pub(crate) async fn load<D: Disk>(source: Source<'_, D>, ino: Ino) -> Result<Inode> {
    match source.read(ino.object(), ino.block()).await {
        Ok(bytes) => {
            let inode = Inode::decode(&bytes, ino)?;
            meant::check(ino, inode.generation)?;
            Ok(inode)
        }
        // A number that leads nowhere is as good as an inode that is gone.
        Err(FsError::Disk(sld::DiskError::NoSuchBlock(_))) => Err(FsError::Stale),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod removal_tests;
#[cfg(test)]
pub(crate) mod tests;
