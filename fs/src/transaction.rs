//! `Transaction`: a file operation's changes while they are being put together.
//!
//! It wraps the disk's [`Operation`]: reads see its own newest contents, blocks allocated for it are given back if it is
//! dropped uncommitted, and consecutive writes of one block become one.
//!
//! Excludes: tokens (the caller holds them), and what is written.

use crate::error::{FsError, Result};
use bytes::Bytes;
use cluster::BlockNo;
use sld::{After, Block, Content, Disk, Extent, ObjectId, Operation, Tag, Write, WriteClass, WriteId};
use std::collections::BTreeMap;

/// Where to read blocks from: the disk, with the changes of a transaction over it.
pub struct Source<'a, D: Disk> {
    disk: &'a D,
    tx: Option<&'a Transaction<'a, D>>,
}

impl<D: Disk> Clone for Source<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Disk> Copy for Source<'_, D> {}

impl<'a, D: Disk> Source<'a, D> {
    /// Reads the disk alone.
    pub fn disk(disk: &'a D) -> Self {
        Source { disk, tx: None }
    }

    /// Reads a block of an object whose token is held.
    ///
    /// # Errors
    /// Those of the disk; `Corrupt` if the transaction itself frees the block.
    pub async fn read(&self, object: ObjectId, block: BlockNo) -> Result<Block> {
        if let Some(content) = self.tx.and_then(|tx| tx.latest(block)) {
            return match content {
                Content::Data(data) => Ok(data.clone()),
                Content::Free => Err(FsError::corrupt(block, "a block is used after it is freed")),
            };
        }
        if let Some(data) = self.disk.try_read(object, block) {
            return Ok(data);
        }
        Ok(self.disk.read(object, block).await?)
    }
}

/// A file operation's changes.
pub struct Transaction<'a, D: Disk> {
    disk: &'a D,
    op: Operation,
    newest: BTreeMap<BlockNo, WriteId>,
    allocated: Vec<Extent>,
}

impl<'a, D: Disk> Transaction<'a, D> {
    /// An empty one.
    pub fn new(disk: &'a D) -> Self {
        Transaction { disk, op: Operation::new(), newest: BTreeMap::new(), allocated: Vec::new() }
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &'a D {
        self.disk
    }

    /// Where reads see this transaction's changes.
    #[must_use]
    pub fn source(&self) -> Source<'_, D> {
        Source { disk: self.disk, tx: Some(self) }
    }

    /// The newest contents that this transaction gives a block.
    #[must_use]
    pub fn latest(&self, block: BlockNo) -> Option<&Content> {
        self.newest.get(&block).and_then(|id| self.op.writes.get(id.0)).map(|w| &w.content)
    }

    /// The newest write of a block in this transaction.
    #[must_use]
    pub fn newest(&self, block: BlockNo) -> Option<WriteId> {
        self.newest.get(&block).copied()
    }

    /// The block of a write.
    ///
    /// # Panics
    /// If the write is of another transaction.
    #[must_use]
    pub fn block_of(&self, write: WriteId) -> BlockNo {
        self.op.writes[write.0].block
    }

    /// Edges to a block's newest version: this transaction's own if it has one, else the present one.
    #[must_use]
    pub fn after_block(&self, block: BlockNo) -> After {
        self.newest(block).map_or(After::Block(block), After::Write)
    }

    /// Whether nothing is changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.op.writes.is_empty()
    }

    /// How many writes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.op.writes.len()
    }

    /// Takes up to `count` contiguous free blocks; they are given back if the transaction is dropped.
    ///
    /// # Errors
    /// `NoSpace`, and those of the disk.
    pub async fn alloc(&mut self, near: Option<BlockNo>, count: u32) -> Result<Extent> {
        let extent = match self.disk.try_alloc(near, count) {
            Some(extent) => extent,
            None => self.disk.alloc(near, count).await?,
        };
        self.allocated.push(extent);
        Ok(extent)
    }

    /// Gives back allocated blocks that are not used after all (a part of what `alloc` returned is fine).
    pub fn unalloc(&mut self, extent: Extent) {
        let (first, end) = (extent.start.index, extent.start.index + extent.len);
        let mut rest = Vec::new();
        self.allocated.retain(|a| {
            let (a_first, a_end) = (a.start.index, a.start.index + a.len);
            let outside = a.start.mirror != extent.start.mirror || a_end <= first || end <= a_first;
            if !outside {
                let mut keep = |from: u32, to: u32| {
                    if from < to {
                        rest.push(Extent { start: BlockNo::new(a.start.mirror, from), len: to - from });
                    }
                };
                keep(a_first, first);
                keep(end, a_end);
            }
            outside
        });
        self.allocated.append(&mut rest);
        self.disk.unalloc(extent);
    }

    /// Writes a block of structure.
    pub fn write(&mut self, object: ObjectId, block: BlockNo, data: Bytes, tag: Tag, after: &[After]) -> WriteId {
        self.push(Write { block, object, content: Content::Data(data), tag, class: WriteClass::Metadata, after: after.to_vec() })
    }

    /// Frees a block.
    pub fn free(&mut self, object: ObjectId, block: BlockNo, after: &[After]) -> WriteId {
        self.push(Write {
            block,
            object,
            content: Content::Free,
            tag: Tag::default(),
            class: WriteClass::Metadata,
            after: after.to_vec(),
        })
    }

    /// Adds any write. If the last write was of the same block and this one is not stated to come after it, the two become
    /// one: nothing can stand between them.
    pub fn push(&mut self, write: Write) -> WriteId {
        let last = WriteId(self.op.writes.len().wrapping_sub(1));
        if let Some(previous) = self.op.writes.last_mut()
            && previous.block == write.block
            && previous.object == write.object
            && previous.class == write.class
            && previous.content != Content::Free
            && !write.after.contains(&After::Write(last))
        {
            previous.content = write.content;
            previous.tag = write.tag;
            for after in write.after {
                if !previous.after.contains(&after) {
                    previous.after.push(after);
                }
            }
            return last;
        }
        let block = write.block;
        let id = self.op.push(write);
        self.newest.insert(block, id);
        id
    }

    /// Applies the changes. Never waits.
    ///
    /// # Errors
    /// Those of the disk; nothing is applied then.
    pub fn commit(mut self) -> Result<()> {
        let op = std::mem::take(&mut self.op);
        if op.writes.is_empty() {
            return Ok(());
        }
        self.disk.commit(op)?;
        self.allocated.clear();
        Ok(())
    }
}

impl<D: Disk> Drop for Transaction<'_, D> {
    fn drop(&mut self) {
        for extent in self.allocated.drain(..) {
            self.disk.unalloc(extent);
        }
    }
}
