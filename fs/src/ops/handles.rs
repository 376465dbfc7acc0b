//! Open files, durability, and what a node remembers of names that it has changed.

use super::FileSystem;
use crate::error::{FsError, Result};
use crate::inode::{Attributes, Ino, Parent};
use crate::parents;
use crate::transaction::Source;
use cluster::BlockNo;
use sld::{Disk, DiskError, FlushTarget, Mode};
use std::collections::{BTreeMap, VecDeque};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Every write goes to the end.
    pub append: bool,
}

/// Open files of this node: how often each is open.
#[derive(Default)]
pub(crate) struct Opens {
    counts: BTreeMap<u64, u32>,
}

/// The most inodes whose entry blocks are remembered. A changed name has dirtied at least its inode's block, and dirty
/// blocks are bounded well below this number, so what is forgotten is durable.
const NAMES_MAX: usize = 1 << 18;
/// Losses in a row, of the same entry blocks, after which an fsync reports one in any case.
const LOSSES_MAX: usize = 4;
/// Entry blocks remembered of one inode.
const NAME_BLOCKS_MAX: usize = 16;

/// Entry blocks of names that this node has made or changed and that may not be durable yet. They are needed where only the
/// inode is known: a commit on it goes after them (rule 9), and its fsync flushes them (rule 13).
#[derive(Default)]
pub(crate) struct Names {
    blocks: BTreeMap<u64, Vec<BlockNo>>,
    order: VecDeque<u64>,
}

impl Names {
    /// Forgets what was flushed, unless it was changed again meanwhile.
    fn durable(&mut self, flushed: &[(u64, Vec<BlockNo>)]) {
        for (ino, blocks) in flushed {
            if let Some(remembered) = self.blocks.get_mut(ino).filter(|remembered| *remembered == blocks) {
                remembered.clear(); // `order` keeps the number; it is dropped in its turn.
            }
        }
    }

    fn add(&mut self, ino: Ino, block: BlockNo) {
        let blocks = self.blocks.entry(ino.0).or_insert_with(|| {
            self.order.push_back(ino.0);
            Vec::new()
        });
        blocks.retain(|b| *b != block);
        blocks.push(block);
        if blocks.len() > NAME_BLOCKS_MAX {
            blocks.remove(0);
        }
        while self.order.len() > NAMES_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.blocks.remove(&oldest);
            }
        }
    }
}

impl<D: Disk> FileSystem<D> {
    pub(crate) fn remember_name(&self, ino: Ino, entry_block: BlockNo) {
        self.names.lock().add(ino, entry_block);
    }

    /// Entry blocks of the inode's names that may not be durable.
    pub(crate) fn name_blocks(&self, ino: Ino) -> Vec<BlockNo> {
        self.names.lock().blocks.get(&ino.0).cloned().unwrap_or_default()
    }

    /// Whether this node has an inode open.
    pub(crate) fn is_open(&self, ino: Ino) -> bool {
        self.opens.lock().counts.contains_key(&ino.0)
    }

    /// All inodes that this node has open.
    pub(crate) fn open_inodes(&self) -> Vec<Ino> {
        self.opens.lock().counts.keys().copied().map(Ino).collect()
    }

    /// Opens an inode (a file or a directory): it lives until it is closed, with or without a name.
    ///
    /// # Errors
    /// `Stale` if it is gone; those of the disk.
    pub async fn open(&self, ino: Ino, _flags: OpenFlags) -> Result<Attributes> {
        self.again(|| self.try_open(ino)).await
    }

    async fn try_open(&self, ino: Ino) -> Result<Attributes> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let inode = self.load(Source::disk(&self.disk), ino).await?;
        self.count_open(ino);
        Ok(inode.attributes())
    }

    /// Notes that an inode, whose token is held, is open once more.
    pub(crate) fn count_open(&self, ino: Ino) {
        let mut opens = self.opens.lock();
        let count = opens.counts.entry(ino.0).or_insert(0);
        *count += 1;
        if *count == 1 {
            // Under the inode's token: whoever removes its last name comes before (and it is gone) or after (and sees it).
            self.disk.set_open(ino.object(), true);
        }
    }

    /// Closes an inode once. The last close anywhere frees an inode without a name.
    ///
    /// # Errors
    /// Those of the disk; it is closed all the same.
    pub async fn close(&self, ino: Ino) -> Result<()> {
        {
            let mut opens = self.opens.lock();
            match opens.counts.get_mut(&ino.0) {
                Some(count) if *count > 1 => {
                    *count -= 1;
                    return Ok(());
                }
                Some(_) => {
                    opens.counts.remove(&ino.0);
                    self.disk.set_open(ino.object(), false);
                }
                None => return Ok(()),
            }
        }
        match self.inode(ino).await {
            Ok(inode) if inode.is_orphan() => {
                self.free_later(vec![ino]).await;
                Ok(())
            }
            Ok(_) | Err(FsError::Stale) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The kernel has forgotten an inode. Nothing is kept for it, so there is nothing to do.
    pub fn forget(&self, _ino: Ino, _lookups: u64) {}

    /// Makes a file durable: its data and attributes, and the entries of its names (rule 13).
    ///
    /// # Errors
    /// `Disk(Lost)` if something of it was lost, once; those of the disk.
    pub async fn fsync(&self, ino: Ino, _data_only: bool) -> Result<()> {
        // What other nodes have written is made durable by their giving up the token.
        drop(self.tokens(&[(ino.object(), Mode::Shared)]).await?);
        let names = self.name_blocks(ino);
        let blocks: Vec<FlushTarget> = names.iter().map(|block| FlushTarget::Block(*block)).collect();
        let object = [FlushTarget::Object(ino.object())];
        let (own, entries) = tokio::join!(self.disk.flush(&object), self.disk.flush(&blocks));
        own?;
        let mut entries = entries;
        for _ in 0..LOSSES_MAX {
            // What was lost of an entry block may have been others' names: theirs to be told of (and the directory's).
            match entries {
                Err(DiskError::Lost) if self.has_its_names(ino).await? => entries = self.disk.flush(&blocks).await,
                _ => break,
            }
        }
        entries?;
        self.names.lock().durable(&[(ino.0, names)]);
        Ok(())
    }

    /// Whether there is an entry for each of an inode's parent records.
    async fn has_its_names(&self, ino: Ino) -> Result<bool> {
        let records = match self.records(ino).await {
            Err(FsError::Stale) => return Ok(false),
            records => records?,
        };
        for record in records {
            // A record that is gone by now had its entry moved meanwhile.
            let there = ino == self.root() || self.has_entry(ino, record).await?.is_ok();
            if !there && self.records(ino).await?.contains(&record) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) async fn records(&self, ino: Ino) -> Result<Vec<Parent>> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let source = Source::disk(&self.disk);
        parents::all(source, &self.load(source, ino).await?).await
    }

    /// Makes a directory's entries durable, with all that they come after.
    ///
    /// # Errors
    /// As [`FileSystem::fsync`].
    pub async fn fsync_directory(&self, ino: Ino) -> Result<()> {
        self.fsync(ino, false).await
    }

    /// Makes everything durable that this node has written.
    ///
    /// # Errors
    /// Those of the disk.
    pub async fn sync(&self) -> Result<()> {
        let before: Vec<(u64, Vec<BlockNo>)> = {
            let names = self.names.lock();
            names.blocks.iter().filter(|(_, b)| !b.is_empty()).map(|(ino, b)| (*ino, b.clone())).collect()
        };
        self.disk.flush(&[FlushTarget::All]).await?;
        self.names.lock().durable(&before);
        Ok(())
    }
}
