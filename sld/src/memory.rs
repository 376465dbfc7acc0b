//! `MemoryDisk`: one node's shared logical disk without a cluster, in memory. For tests of the file system alone, and for
//! making an image of one. Everything is durable at once; tokens are a fair readers-writer lock per object.
//!
//! A disk can record the operations that were committed to it ([`MemoryDisk::record`]), so that a test can enumerate the
//! states that a crash could have left ([`MemoryDisk::from_image`] makes a disk from each).
//!
//! Excludes: other nodes, order of writing, the cost of anything.

use crate::api::{
    Block, Content, Disk, DiskError, Extent, FlushTarget, Mode, ObjectId, Operation, Upcalls, Usage, Want, WriteClass,
};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo, MirrorId};
use mirror::Tag;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// Locks are forgotten when there are more than this many that nobody holds.
const IDLE_LOCKS_MAX: usize = 4096;

/// A disk in memory. Clones are the same disk.
#[derive(Clone)]
pub struct MemoryDisk {
    shared: Arc<Shared>,
}

/// What a disk holds: for every block that is allocated, its tag and contents.
pub type Image = BTreeMap<BlockNo, (Tag, Block)>;

struct Shared {
    state: Mutex<State>,
    locks: Mutex<HashMap<ObjectId, Arc<RwLock<()>>>>,
    zeros: Block,
}

#[derive(Default)]
struct State {
    mirrors: BTreeMap<MirrorId, Space>,
    blocks: Image,
    open: BTreeSet<ObjectId>,
    open_elsewhere: BTreeSet<ObjectId>,
    /// It is not known what other nodes have open.
    in_doubt: bool,
    lost: Vec<FlushTarget>,
    refused: u32,
    damaged: BTreeSet<BlockNo>,
    cycle: u32,
    recorded: Option<Vec<Operation>>,
    upcalls: Option<Arc<dyn Upcalls>>,
}

struct Space {
    blocks: u32,
    /// One bit per block: allocated, written or not.
    used: Vec<u64>,
    free: u32,
    cursor: u32,
}

impl Space {
    fn new(blocks: u32) -> Space {
        let words = blocks.div_ceil(64) as usize;
        Space { blocks, used: vec![0; words], free: blocks, cursor: 0 }
    }

    fn is_used(&self, index: u32) -> bool {
        self.used.get((index / 64) as usize).is_none_or(|w| w >> (index % 64) & 1 == 1)
    }

    fn set(&mut self, index: u32, used: bool) {
        if self.is_used(index) == used {
            return;
        }
        if let Some(word) = self.used.get_mut((index / 64) as usize) {
            *word ^= 1 << (index % 64);
            if used {
                self.free -= 1;
            } else {
                self.free += 1;
            }
        }
    }

    /// Takes up to `count` contiguous blocks, the first one at or (cyclically) after `from`.
    fn take(&mut self, from: u32, count: u32) -> Option<(u32, u32)> {
        if self.free == 0 || self.blocks == 0 {
            return None;
        }
        let mut at = from % self.blocks;
        while self.is_used(at) {
            let word = self.used[(at / 64) as usize];
            let skip = if at.is_multiple_of(64) && word == u64::MAX { 64 } else { 1 };
            at = if at + skip >= self.blocks { 0 } else { at + skip };
        }
        let mut len = 0;
        while len < count.max(1) && at + len < self.blocks && !self.is_used(at + len) {
            self.set(at + len, true);
            len += 1;
        }
        self.cursor = at + len;
        Some((at, len))
    }
}

/// Tokens of [`MemoryDisk`]: the guards of the objects' locks.
#[derive(Default)]
#[allow(dead_code, reason = "they are kept to be dropped")]
pub struct MemoryTokens {
    shared: Vec<OwnedRwLockReadGuard<()>>,
    exclusive: Vec<OwnedRwLockWriteGuard<()>>,
}

impl MemoryDisk {
    /// An empty disk with mirrors 1, 2, … of the given sizes in blocks.
    #[must_use]
    pub fn new(mirrors: &[u32]) -> Self {
        Self::from_image(mirrors, Image::new())
    }

    /// A disk with given contents. Blocks outside the mirrors are dropped.
    #[must_use]
    pub fn from_image(mirrors: &[u32], image: Image) -> Self {
        let mut state = State { cycle: 1, ..State::default() };
        for (number, blocks) in (1..).zip(mirrors) {
            state.mirrors.insert(MirrorId(number), Space::new(*blocks));
        }
        for (block, value) in image {
            if let Some(space) = state.mirrors.get_mut(&block.mirror).filter(|s| block.index < s.blocks) {
                space.set(block.index, true);
                state.blocks.insert(block, value);
            }
        }
        let zeros = Bytes::from(vec![0; BLOCK_SIZE]);
        MemoryDisk { shared: Arc::new(Shared { state: Mutex::new(state), locks: Mutex::new(HashMap::new()), zeros }) }
    }

    /// What the disk holds now.
    #[must_use]
    pub fn image(&self) -> Image {
        self.shared.state.lock().blocks.clone()
    }

    /// Starts to record committed operations; what was recorded before is dropped.
    pub fn record(&self) {
        self.shared.state.lock().recorded = Some(Vec::new());
    }

    /// Stops recording and returns the operations committed since [`MemoryDisk::record`].
    #[must_use]
    pub fn recorded(&self) -> Vec<Operation> {
        self.shared.state.lock().recorded.take().unwrap_or_default()
    }

    /// Lets it not be known what other nodes have open.
    pub fn set_in_doubt(&self, in_doubt: bool) {
        self.shared.state.lock().in_doubt = in_doubt;
    }

    /// Lets it seem that another node has an object open.
    pub fn set_open_elsewhere(&self, object: ObjectId, open: bool) {
        let mut state = self.shared.state.lock();
        if open {
            state.open_elsewhere.insert(object);
        } else {
            state.open_elsewhere.remove(&object);
        }
    }

    /// Lets it seem that something of a target was lost: its next flush reports it, once.
    pub fn lose(&self, target: FlushTarget) {
        self.shared.state.lock().lost.push(target);
    }

    /// Lets the next so many commits fail, as if the node had been cut off since their operations began.
    pub fn refuse_commits(&self, count: u32) {
        self.shared.state.lock().refused = count;
    }

    /// Begins a new cycle of the collector.
    pub fn set_cycle(&self, cycle: u32) {
        self.shared.state.lock().cycle = cycle;
    }

    /// Damages a block on all copies, until it is written anew.
    pub fn damage(&self, block: BlockNo) {
        self.shared.state.lock().damaged.insert(block);
    }

    /// Puts contents into a block behind everyone's back: damage for tests.
    pub fn overwrite(&self, block: BlockNo, tag: Tag, data: Block) {
        let mut state = self.shared.state.lock();
        if let Some(space) = state.mirrors.get_mut(&block.mirror).filter(|s| block.index < s.blocks) {
            space.set(block.index, true);
            state.blocks.insert(block, (tag, data));
        }
    }

    fn lock_of(&self, object: ObjectId) -> Arc<RwLock<()>> {
        let mut locks = self.shared.locks.lock();
        if locks.len() > IDLE_LOCKS_MAX && !locks.contains_key(&object) {
            // A lock that only the table refers to is held and awaited by nobody.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        }
        locks.entry(object).or_default().clone()
    }

    fn sorted(wants: &[Want]) -> BTreeMap<ObjectId, Mode> {
        let mut sorted = BTreeMap::new();
        for (object, mode) in wants {
            let entry = sorted.entry(*object).or_insert(*mode);
            if *mode == Mode::Exclusive {
                *entry = Mode::Exclusive;
            }
        }
        sorted
    }

    fn block(&self, block: BlockNo) -> Result<Block, DiskError> {
        let state = self.shared.state.lock();
        match state.mirrors.get(&block.mirror) {
            Some(space) if block.index < space.blocks => {}
            _ => return Err(DiskError::NoSuchBlock(block)),
        }
        if state.damaged.contains(&block) {
            return Err(DiskError::Corrupt(block));
        }
        Ok(state.blocks.get(&block).map_or_else(|| self.shared.zeros.clone(), |(_, data)| data.clone()))
    }
}

impl Disk for MemoryDisk {
    type Tokens = MemoryTokens;

    async fn acquire(&self, wants: &[Want]) -> Result<MemoryTokens, DiskError> {
        let mut tokens = MemoryTokens::default();
        for (object, mode) in Self::sorted(wants) {
            let lock = self.lock_of(object);
            match mode {
                Mode::Shared => tokens.shared.push(lock.read_owned().await),
                Mode::Exclusive => tokens.exclusive.push(lock.write_owned().await),
            }
        }
        Ok(tokens)
    }

    fn try_acquire(&self, wants: &[Want]) -> Option<MemoryTokens> {
        let mut tokens = MemoryTokens::default();
        for (object, mode) in Self::sorted(wants) {
            let lock = self.lock_of(object);
            match mode {
                Mode::Shared => tokens.shared.push(lock.try_read_owned().ok()?),
                Mode::Exclusive => tokens.exclusive.push(lock.try_write_owned().ok()?),
            }
        }
        Some(tokens)
    }

    fn adopt(&self, object: ObjectId) -> MemoryTokens {
        // A stale name may still lead another operation here (it finds no live inode and goes away): then the new object's
        // lock is replaced, since nobody who is in it may change anything.
        let lock = self.lock_of(object);
        let guard = lock.try_write_owned().unwrap_or_else(|_| {
            let fresh = Arc::new(RwLock::new(()));
            self.shared.locks.lock().insert(object, fresh.clone());
            fresh.try_write_owned().unwrap_or_else(|_| unreachable!("nobody else knows the new lock"))
        });
        MemoryTokens { shared: Vec::new(), exclusive: vec![guard] }
    }

    async fn read(&self, _object: ObjectId, block: BlockNo) -> Result<Block, DiskError> {
        self.block(block)
    }

    fn try_read(&self, _object: ObjectId, block: BlockNo) -> Option<Block> {
        self.block(block).ok()
    }

    async fn read_many(&self, _object: ObjectId, blocks: &[BlockNo]) -> Result<Vec<Block>, DiskError> {
        blocks.iter().map(|block| self.block(*block)).collect()
    }

    fn read_ahead(&self, _object: ObjectId, _blocks: &[BlockNo]) {}

    async fn alloc(&self, near: Option<BlockNo>, count: u32) -> Result<Extent, DiskError> {
        self.try_alloc(near, count).ok_or(DiskError::NoSpace)
    }

    fn try_alloc(&self, near: Option<BlockNo>, count: u32) -> Option<Extent> {
        let mut state = self.shared.state.lock();
        if let Some(near) = near
            && let Some(space) = state.mirrors.get_mut(&near.mirror)
        {
            let from = if space.is_used(near.index) { space.cursor.max(near.index) } else { near.index };
            if let Some((index, len)) = space.take(from, count) {
                return Some(Extent { start: BlockNo::new(near.mirror, index), len });
            }
        }
        // The emptiest mirror, so that they fill evenly.
        let (mirror, space) = state.mirrors.iter_mut().max_by_key(|(id, s)| (s.free, std::cmp::Reverse(**id)))?;
        let (index, len) = space.take(space.cursor, count)?;
        Some(Extent { start: BlockNo::new(*mirror, index), len })
    }

    fn unalloc(&self, extent: Extent) {
        let mut state = self.shared.state.lock();
        for index in extent.start.index..extent.start.index.saturating_add(extent.len) {
            if state.blocks.contains_key(&BlockNo::new(extent.start.mirror, index)) {
                continue;
            }
            if let Some(space) = state.mirrors.get_mut(&extent.start.mirror) {
                space.set(index, false);
            }
        }
    }

    async fn admit(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn commit(&self, operation: Operation) -> Result<(), DiskError> {
        let mut state = self.shared.state.lock();
        if state.refused > 0 {
            state.refused -= 1;
            return Err(DiskError::Lost);
        }
        for (position, write) in operation.writes.iter().enumerate() {
            for after in &write.after {
                if let crate::After::Write(id) = after {
                    assert!(id.0 < position, "write {position} comes after write {}, which is not earlier", id.0);
                }
            }
            state.damaged.remove(&write.block);
            let space = state.mirrors.get_mut(&write.block.mirror);
            let Some(space) = space.filter(|s| write.block.index < s.blocks) else {
                panic!("a write to block {}, which does not exist", write.block);
            };
            match &write.content {
                Content::Data(data) => {
                    assert_eq!(data.len(), BLOCK_SIZE, "a write of {} bytes to block {}", data.len(), write.block);
                    assert!(write.tag.kind != mirror::Kind::Free, "a write to {} with a tag that says free", write.block);
                    assert!(
                        space.is_used(write.block.index) || write.class == WriteClass::Metadata,
                        "a write to block {}, which is free",
                        write.block
                    );
                    space.set(write.block.index, true);
                    state.blocks.insert(write.block, (write.tag, data.clone()));
                }
                Content::Free => {
                    assert!(space.is_used(write.block.index), "block {} is freed twice", write.block);
                    space.set(write.block.index, false);
                    state.blocks.remove(&write.block);
                }
            }
        }
        if let Some(recorded) = &mut state.recorded {
            recorded.push(operation);
        }
        Ok(())
    }

    async fn flush(&self, targets: &[FlushTarget]) -> Result<(), DiskError> {
        let mut state = self.shared.state.lock();
        let before = state.lost.len();
        state.lost.retain(|lost| !targets.contains(lost));
        if state.lost.len() == before { Ok(()) } else { Err(DiskError::Lost) }
    }

    fn take_loss(&self, object: ObjectId) -> bool {
        let mut state = self.shared.state.lock();
        let before = state.lost.len();
        state.lost.retain(|lost| *lost != FlushTarget::Object(object));
        state.lost.len() < before
    }

    fn set_open(&self, object: ObjectId, open: bool) {
        let mut state = self.shared.state.lock();
        if open {
            state.open.insert(object);
        } else {
            state.open.remove(&object);
        }
    }

    fn open_elsewhere(&self, object: ObjectId) -> Option<bool> {
        let state = self.shared.state.lock();
        (!state.in_doubt).then(|| state.open_elsewhere.contains(&object))
    }

    async fn usage(&self) -> Result<Usage, DiskError> {
        let state = self.shared.state.lock();
        Ok(state.mirrors.values().fold(Usage::default(), |sum, space| Usage {
            blocks: sum.blocks + u64::from(space.blocks),
            free: sum.free + u64::from(space.free),
        }))
    }

    async fn tags(&self, first: BlockNo, count: u32) -> Result<Vec<Tag>, DiskError> {
        let state = self.shared.state.lock();
        let Some(space) = state.mirrors.get(&first.mirror).filter(|s| first.index < s.blocks) else {
            return Err(DiskError::NoSuchBlock(first));
        };
        let end = first.index.saturating_add(count).min(space.blocks);
        let mut tags = vec![Tag::default(); (end - first.index) as usize];
        let range = first..BlockNo::new(first.mirror, end);
        for (block, (tag, _)) in state.blocks.range(range) {
            tags[(block.index - first.index) as usize] = *tag;
        }
        Ok(tags)
    }

    fn mirrors(&self) -> Vec<(MirrorId, u32)> {
        self.shared.state.lock().mirrors.iter().map(|(id, space)| (*id, space.blocks)).collect()
    }

    fn cycle(&self) -> u32 {
        self.shared.state.lock().cycle
    }

    fn set_upcalls(&self, upcalls: Arc<dyn Upcalls>) {
        self.shared.state.lock().upcalls = Some(upcalls);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kind, Write};

    fn write(block: BlockNo, byte: u8) -> Write {
        Write {
            block,
            object: ObjectId::Inode(1),
            content: Content::Data(Bytes::from(vec![byte; BLOCK_SIZE])),
            tag: Tag { kind: Kind::Data, owner: 1, offset: 0, birth: 1 },
            class: WriteClass::FreshData,
            after: Vec::new(),
        }
    }

    #[tokio::test]
    async fn blocks_are_allocated_once_written_read_and_freed() {
        let disk = MemoryDisk::new(&[64, 64]);
        let mut seen = BTreeSet::new();
        for _ in 0..128 {
            let extent = disk.alloc(None, 1).await.unwrap();
            assert!(seen.insert(extent.start), "{} was given out twice", extent.start);
        }
        assert_eq!(disk.alloc(None, 1).await, Err(DiskError::NoSpace));
        let block = BlockNo::new(MirrorId(2), 7);
        let mut operation = Operation::new();
        operation.push(write(block, 9));
        disk.commit(operation).unwrap();
        assert_eq!(disk.read(ObjectId::Inode(1), block).await.unwrap()[17], 9);
        assert_eq!(disk.tags(BlockNo::new(MirrorId(2), 0), 99).await.unwrap().iter().filter(|t| t.owner == 1).count(), 1);
        let mut operation = Operation::new();
        operation.push(Write { content: Content::Free, ..write(block, 0) });
        disk.commit(operation).unwrap();
        assert_eq!(disk.read(ObjectId::Inode(1), block).await.unwrap()[17], 0);
        assert_eq!(disk.usage().await.unwrap(), Usage { blocks: 128, free: 1 });
        assert_eq!(disk.alloc(Some(block), 4).await.unwrap(), Extent { start: block, len: 1 });
        disk.unalloc(Extent { start: block, len: 1 });
        assert_eq!(disk.usage().await.unwrap().free, 1);
        assert_eq!(
            disk.read(ObjectId::Inode(1), BlockNo::new(MirrorId(3), 0)).await,
            Err(DiskError::NoSuchBlock(BlockNo::new(MirrorId(3), 0)))
        );
    }

    #[tokio::test]
    async fn tokens_exclude_each_other() {
        let disk = MemoryDisk::new(&[64]);
        let (a, b) = (ObjectId::Inode(1), ObjectId::Inode(2));
        let held = disk.acquire(&[(b, Mode::Shared), (a, Mode::Shared), (a, Mode::Exclusive)]).await.unwrap();
        assert!(disk.try_acquire(&[(a, Mode::Shared)]).is_none());
        assert!(disk.try_acquire(&[(b, Mode::Exclusive)]).is_none());
        assert!(disk.try_acquire(&[(b, Mode::Shared)]).is_some());
        drop(held);
        assert!(disk.try_acquire(&[(a, Mode::Exclusive), (b, Mode::Exclusive)]).is_some());
        let adopted = disk.adopt(ObjectId::Inode(3));
        assert!(disk.try_acquire(&[(ObjectId::Inode(3), Mode::Shared)]).is_none());
        drop(adopted);
        assert!(disk.try_acquire(&[(ObjectId::Inode(3), Mode::Shared)]).is_some());
    }
}
