//! Reading a disk without a daemon: for checking a stopped cluster's disks, and for looking into one by hand.
//!
//! The log is replayed in memory; nothing is written. What is read is what the disk's server would have after opening it
//! (groups that were in flight may be there on one copy and not on another).

use crate::api::{BlockDevice, Kind, Tag, Version};
use crate::format::{Checksum, Label, OpenError, TAG_BYTES, TAGS_PER_BLOCK, TagEntry, block_checksum};
use crate::replica::{DiskCore, Lookup};
use crate::shell::open::{Expected, load_tags, open_core};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, MirrorId};
use std::io;
use std::sync::Arc;

/// Tag blocks kept in memory.
const TAG_BLOCKS_MAX: usize = 4096;

/// A block as one disk has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OfflineBlock {
    /// Right, with the contents (zeros if it is free or was never written).
    Good {
        /// Contents.
        data: Bytes,
        /// Tag.
        tag: Tag,
        /// Version.
        version: Version,
    },
    /// The tag or the contents are damaged.
    Damaged {
        /// The version that the tag says, 0 if the tag is damaged.
        version: Version,
    },
}

/// A disk opened for reading.
pub struct DiskReader {
    device: Arc<dyn BlockDevice>,
    core: DiskCore,
}

impl DiskReader {
    /// Opens a disk; `cluster`: refuse it if it is of another one.
    ///
    /// # Errors
    /// If it is not a whole disk of a known version, or cannot be read.
    pub async fn open(device: Arc<dyn BlockDevice>, cluster: Option<[u8; 16]>) -> Result<DiskReader, OpenError> {
        let core = open_core(&*device, Expected { cluster, uuid: None }, TAG_BLOCKS_MAX).await?;
        Ok(DiskReader { device, core })
    }

    /// Its label (as it is on the disk: the log's tail is where replaying began).
    #[must_use]
    pub fn label(&self) -> &Label {
        self.core.label()
    }

    /// Tags and versions of blocks of a copy whose first block is `base` in the data area. `None` where a tag is damaged.
    ///
    /// # Errors
    /// If the disk cannot be read, or the place is not on it.
    pub async fn tags(&mut self, base: u32, first: u32, count: u32) -> io::Result<Vec<Option<(Tag, Version)>>> {
        let start = self.place(base, first, count)?;
        let mut out = Vec::with_capacity(count as usize);
        let mut at = start;
        while at < start + count {
            let block = at / TAGS_PER_BLOCK;
            let blocks = ((start + count - 1) / TAGS_PER_BLOCK - block + 1).min(256);
            let read = self.device.read(self.core.geometry.tags_start + u64::from(block), blocks as usize).await?;
            for addr in at..(start + count).min((block + blocks) * TAGS_PER_BLOCK) {
                let entry = self.entry(&read, block, addr);
                out.push(entry.map(|e| (e.tag, e.version)));
            }
            at = (block + blocks) * TAGS_PER_BLOCK;
        }
        Ok(out)
    }

    /// A tag entry: what replay changed, otherwise what was read from `first` on.
    fn entry(&self, read: &[u8], first: u32, addr: u32) -> Option<TagEntry> {
        let block = addr / TAGS_PER_BLOCK;
        let within = (addr % TAGS_PER_BLOCK) as usize * TAG_BYTES;
        let bytes = match self.core.tag_block(block) {
            Some(bytes) => bytes.get(within..within + TAG_BYTES),
            None => {
                let at = (block - first) as usize * BLOCK_SIZE + within;
                read.get(at..at + TAG_BYTES)
            }
        };
        self.core.entry_from(bytes?, addr)
    }

    /// Reads a block of a copy. `mirror` takes part in the checksum.
    ///
    /// # Errors
    /// If the disk cannot be read, or the place is not on it.
    pub async fn read(&mut self, mirror: MirrorId, base: u32, index: u32) -> io::Result<OfflineBlock> {
        let addr = self.place(base, index, 1)?;
        loop {
            let (entry, pending) = match self.core.lookup(addr) {
                Lookup::NeedTags(block) => {
                    load_tags(&*self.device, &mut self.core, [block].into()).await;
                    continue;
                }
                Lookup::Damaged => return Ok(OfflineBlock::Damaged { version: Version(0) }),
                Lookup::Entry(entry, pending) => (entry, pending),
            };
            self.core.evict_tags();
            let home = self.core.geometry.data_start + u64::from(addr);
            let data = match pending {
                Some(data) => Some(data),
                None if entry.has_data => match self.device.read(home, 1).await {
                    Ok(data) => Some(data),
                    Err(_) => return Ok(OfflineBlock::Damaged { version: entry.version }),
                },
                None => None,
            };
            return Ok(check(mirror, index, entry, data));
        }
    }

    fn place(&self, base: u32, first: u32, count: u32) -> io::Result<u32> {
        base.checked_add(first)
            .filter(|start| start.checked_add(count).is_some_and(|end| end <= self.core.geometry.data_blocks))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the place is not on this disk"))
    }
}

fn check(mirror: MirrorId, index: u32, entry: TagEntry, data: Option<Bytes>) -> OfflineBlock {
    let TagEntry { version, tag, checksum, .. } = entry;
    let right: Checksum = block_checksum(mirror, index, version, &tag, data.as_deref());
    if version != Version(0) && right != checksum {
        return OfflineBlock::Damaged { version };
    }
    let data = data.filter(|_| tag.kind != Kind::Free).unwrap_or_else(|| Bytes::from(vec![0; BLOCK_SIZE]));
    OfflineBlock::Good { data, tag, version }
}
