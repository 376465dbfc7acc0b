//! Clean blocks in memory, each under the object whose token makes it valid; and which blocks are being fetched.
//!
//! Invariants:
//! - A cached block is the newest version there is anywhere: its object's token is held, and it is not dirty here.
//! - A block is fetched once, however many wait for it. What was fetched is not kept if the block was written, or its
//!   object's token was given up, meanwhile.
//!
//! Bounds: bytes of clean blocks (`bytes_max`); fetches, by those who wait and by the read-ahead's own bound.
//!
//! Excludes: dirty blocks (`writeback`), fetching (the shell).

use crate::api::{Block, ObjectId};
use cluster::{BLOCK_SIZE, BlockNo};
use lru::LruCache;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Names one fetch of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchId(pub u64);

struct Fetch<W> {
    id: FetchId,
    waiters: Vec<W>,
}

/// See the module's description. `W` is told of the end of a fetch.
pub struct Cache<W> {
    blocks: LruCache<BlockNo, (ObjectId, Block)>,
    objects: HashMap<ObjectId, HashSet<BlockNo>>,
    blocks_max: usize,
    /// By object, too: a fetch under one object's token says nothing about what is right under another's.
    fetches: BTreeMap<(BlockNo, ObjectId), Fetch<W>>,
    next: u64,
}

impl<W> Cache<W> {
    /// Keeps at most `bytes_max` bytes of blocks.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Cache {
            blocks: LruCache::unbounded(),
            objects: HashMap::new(),
            blocks_max: (bytes_max / BLOCK_SIZE).max(16),
            fetches: BTreeMap::new(),
            next: 0,
        }
    }

    /// Bytes of blocks.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.blocks.len() * BLOCK_SIZE
    }

    /// Fetches going on.
    #[must_use]
    pub fn fetching(&self) -> usize {
        self.fetches.len()
    }

    /// A block, if it is there.
    pub fn get(&mut self, object: ObjectId, block: BlockNo) -> Option<Block> {
        self.blocks.get(&block).filter(|(o, _)| *o == object).map(|(_, b)| b.clone())
    }

    /// Whether a block is there or on its way.
    #[must_use]
    pub fn has(&self, object: ObjectId, block: BlockNo) -> bool {
        self.blocks.peek(&block).is_some_and(|(o, _)| *o == object) || self.fetches.contains_key(&(block, object))
    }

    /// Keeps a block, and drops those not used for longest.
    pub fn insert(&mut self, object: ObjectId, block: BlockNo, data: Block) {
        if let Some((old, _)) = self.blocks.put(block, (object, data))
            && old != object
        {
            self.unlist(old, block);
        }
        self.objects.entry(object).or_default().insert(block);
        while self.blocks.len() > self.blocks_max {
            let Some((block, (object, _))) = self.blocks.pop_lru() else { break };
            self.unlist(object, block);
        }
    }

    fn unlist(&mut self, object: ObjectId, block: BlockNo) {
        if let Some(set) = self.objects.get_mut(&object) {
            set.remove(&block);
            if set.is_empty() {
                self.objects.remove(&object);
            }
        }
    }

    /// The block has been written: neither what is cached nor what is on its way is right any more.
    pub fn written(&mut self, block: BlockNo) {
        if let Some((object, _)) = self.blocks.pop(&block) {
            self.unlist(object, block);
        }
        let all = (block, ObjectId::Inode(0))..=(block, ObjectId::Task(u32::MAX, u32::MAX));
        while let Some((key, _)) = self.fetches.range(all.clone()).next() {
            let key = *key;
            self.fetches.remove(&key);
        }
    }

    /// The object's token is gone. Those who wait for fetches of its blocks are dropped.
    pub fn drop_object(&mut self, object: ObjectId) {
        for block in self.objects.remove(&object).unwrap_or_default() {
            self.blocks.pop(&block);
        }
        self.fetches.retain(|(_, o), _| *o != object);
    }

    /// Everything is gone.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.objects.clear();
        self.fetches.clear();
    }

    /// Joins the fetch of a block, or starts one: then its id is returned, and the caller has to fetch.
    pub fn join(&mut self, object: ObjectId, block: BlockNo, waiter: Option<W>) -> Option<FetchId> {
        if let Some(f) = self.fetches.get_mut(&(block, object)) {
            f.waiters.extend(waiter);
            return None;
        }
        self.next += 1;
        let id = FetchId(self.next);
        self.fetches.insert((block, object), Fetch { id, waiters: waiter.into_iter().collect() });
        Some(id)
    }

    /// A fetch has ended: keeps the block if it is still valid, and returns who waits for it.
    pub fn fetched(&mut self, object: ObjectId, block: BlockNo, id: FetchId, data: Option<Block>) -> Vec<W> {
        if self.fetches.get(&(block, object)).is_none_or(|f| f.id != id) {
            return Vec::new();
        }
        let Some(f) = self.fetches.remove(&(block, object)) else { return Vec::new() };
        if let Some(data) = data {
            self.insert(object, block, data);
        }
        f.waiters
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use cluster::MirrorId;

    fn b(i: u32) -> BlockNo {
        BlockNo::new(MirrorId(1), i)
    }

    #[test]
    fn bounded_by_lru_and_dropped_with_its_object() {
        let mut c: Cache<()> = Cache::new(16 * BLOCK_SIZE);
        let (o, p) = (ObjectId::Inode(1), ObjectId::Inode(2));
        for i in 0..20 {
            c.insert(if i % 2 == 0 { o } else { p }, b(i), Bytes::from(vec![i as u8; BLOCK_SIZE]));
        }
        assert_eq!(c.bytes(), 16 * BLOCK_SIZE);
        assert!(c.get(o, b(0)).is_none() && c.get(o, b(4)).is_some());
        assert!(c.get(p, b(4)).is_none(), "not under another object");
        c.drop_object(o);
        assert!(c.get(o, b(4)).is_none() && c.get(p, b(5)).is_some());
        assert_eq!(c.bytes(), 8 * BLOCK_SIZE);
    }

    #[test]
    fn one_fetch_for_many_and_none_that_is_stale() {
        let mut c: Cache<u32> = Cache::new(1 << 20);
        let o = ObjectId::Inode(1);
        let id = c.join(o, b(1), Some(1)).unwrap();
        assert_eq!(c.join(o, b(1), Some(2)), None);
        assert_eq!(c.fetched(o, b(1), id, Some(Bytes::from_static(b"x"))), vec![1, 2]);
        assert!(c.get(o, b(1)).is_some());
        let id = c.join(o, b(2), None).unwrap();
        c.written(b(2));
        assert!(c.fetched(o, b(2), id, Some(Bytes::from_static(b"old"))).is_empty());
        assert!(c.get(o, b(2)).is_none());
        let id = c.join(o, b(3), None).unwrap();
        c.drop_object(o);
        let again = c.join(o, b(3), Some(3)).unwrap();
        assert!(c.fetched(o, b(3), id, Some(Bytes::from_static(b"old"))).is_empty());
        assert_eq!(c.fetched(o, b(3), again, Some(Bytes::from_static(b"new"))), vec![3]);
    }
}
