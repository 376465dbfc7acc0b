//! `FakeMirrors`: mirrors in memory for several nodes. Writes take random time; a node's groups for one mirror become
//! durable in order; a node that dies leaves a prefix of what it had submitted.
//!
//! It checks what the layer above owes it: versions of a block only grow.

#![allow(dead_code)]

use bytes::Bytes;
use cluster::sim::Rng;
use cluster::{BLOCK_SIZE, BlockNo, BoxFuture, MirrorId, NodeId};
use mirror::{BlockRead, MirrorError, Mirrors, REGION_BLOCKS, RegionFree, Space, Tag, Version, WriteGroup};
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone)]
struct Stored {
    data: Bytes,
    tag: Tag,
    version: u64,
    writer: NodeId,
}

struct Store {
    blocks: BTreeMap<BlockNo, Stored>,
    sizes: BTreeMap<MirrorId, u32>,
    queues: BTreeMap<(NodeId, u64, MirrorId), VecDeque<(u64, WriteGroup)>>,
    clocks: BTreeMap<NodeId, u64>,
    lives: BTreeMap<NodeId, u64>,
    next: u64,
    rng: Rng,
    delay_us: u64,
    reads: u64,
    groups: u64,
    /// Groups that can never be written.
    refuse: bool,
}

/// What is on the disks of all nodes.
#[derive(Clone)]
pub(crate) struct FakeStore(Arc<Mutex<Store>>);

impl FakeStore {
    pub(crate) fn new(mirrors: u32, blocks: u32, seed: u64, delay_us: u64) -> Self {
        FakeStore(Arc::new(Mutex::new(Store {
            blocks: BTreeMap::new(),
            sizes: (1..=mirrors).map(|m| (MirrorId(m), blocks)).collect(),
            queues: BTreeMap::new(),
            clocks: BTreeMap::new(),
            lives: BTreeMap::new(),
            next: 0,
            rng: Rng::new(seed),
            delay_us,
            reads: 0,
            groups: 0,
            refuse: false,
        })))
    }

    /// A new life of a node.
    pub(crate) fn node(&self, node: NodeId) -> Arc<FakeMirrors> {
        let mut s = self.0.lock();
        s.next += 1;
        let life = s.next;
        s.lives.insert(node, life);
        Arc::new(FakeMirrors { store: self.clone(), node, life })
    }

    /// The node's life ends: some prefix of what it had submitted to each mirror is durable.
    pub(crate) fn kill(&self, node: NodeId) {
        let mut s = self.0.lock();
        s.lives.remove(&node);
        let keys: Vec<_> = s.queues.keys().filter(|k| k.0 == node).copied().collect();
        for key in keys {
            let len = s.queues.get(&key).map_or(0, VecDeque::len) as u64;
            let keep = s.rng.below(len + 1);
            for _ in 0..keep {
                s.apply_first(key);
            }
            s.queues.remove(&key);
        }
    }

    /// The node may write again, as after it was let back in.
    pub(crate) fn revive(&self, mirrors: &FakeMirrors) {
        self.0.lock().lives.insert(mirrors.node, mirrors.life);
    }

    /// From now on (or no more) no group can be written.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.0.lock().refuse = refuse;
    }

    pub(crate) fn peek(&self, block: BlockNo) -> Option<(Bytes, Tag)> {
        self.0.lock().blocks.get(&block).map(|b| (b.data.clone(), b.tag))
    }

    pub(crate) fn allocated(&self) -> Vec<BlockNo> {
        self.0.lock().blocks.iter().filter(|(_, b)| b.tag.kind != mirror::Kind::Free).map(|(b, _)| *b).collect()
    }

    pub(crate) fn reads(&self) -> u64 {
        self.0.lock().reads
    }

    pub(crate) fn groups(&self) -> u64 {
        self.0.lock().groups
    }
}

impl Store {
    fn apply_first(&mut self, key: (NodeId, u64, MirrorId)) {
        let Some((_, group)) = self.queues.get_mut(&key).and_then(VecDeque::pop_front) else { return };
        let clock = self.clocks.entry(key.0).or_default();
        *clock += 1;
        let version = *clock;
        for w in group.writes {
            let data = w.data.unwrap_or_else(|| Bytes::from(vec![0; BLOCK_SIZE]));
            if let Some(old) = self.blocks.get(&w.block) {
                assert!(
                    old.version < version,
                    "{}: version {version} of {} after {} of {}",
                    w.block,
                    key.0,
                    old.version,
                    old.writer
                );
            }
            self.blocks.insert(w.block, Stored { data, tag: w.tag, version, writer: key.0 });
        }
    }

    /// Every answer of a disk carries its clock.
    fn witness_all(&mut self, node: NodeId, blocks: impl Iterator<Item = BlockNo>) {
        let max = blocks.filter_map(|b| self.blocks.get(&b)).map(|b| b.version).max().unwrap_or(0);
        let clock = self.clocks.entry(node).or_default();
        *clock = max.max(*clock);
    }
}

/// One life of a node at the store.
pub(crate) struct FakeMirrors {
    store: FakeStore,
    node: NodeId,
    life: u64,
}

impl FakeMirrors {
    fn delay(&self) -> Duration {
        let mut s = self.store.0.lock();
        let us = s.delay_us;
        Duration::from_micros(s.rng.range(1..us.max(2)))
    }

    fn alive(&self) -> Result<(), MirrorError> {
        let alive = self.store.0.lock().lives.get(&self.node) == Some(&self.life);
        if alive { Ok(()) } else { Err(MirrorError::Fenced) }
    }
}

impl Mirrors for FakeMirrors {
    fn submit(&self, mirror: MirrorId, group: WriteGroup) -> BoxFuture<'static, Result<Version, MirrorError>> {
        assert!(!group.writes.is_empty() && group.writes.len() <= WriteGroup::BLOCKS_MAX);
        assert!(group.writes.iter().all(|w| w.block.mirror == mirror));
        let mut once: Vec<BlockNo> = group.writes.iter().map(|w| w.block).collect();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), group.writes.len(), "a block twice in a group");
        let key = (self.node, self.life, mirror);
        let number = {
            let mut s = self.store.0.lock();
            s.next += 1;
            s.groups += 1;
            let n = s.next;
            s.queues.entry(key).or_default().push_back((n, group));
            n
        };
        let delay = self.delay();
        let (store, node, life) = (self.store.clone(), self.node, self.life);
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let mut s = store.0.lock();
            if s.lives.get(&node) != Some(&life) {
                return Err(MirrorError::Fenced);
            }
            if s.refuse {
                let block = BlockNo::new(mirror, 0);
                s.queues.entry(key).or_default().retain(|(n, _)| *n != number);
                return Err(MirrorError::NoSuchBlock { block });
            }
            while s.queues.get(&key).and_then(VecDeque::front).is_some_and(|(n, _)| *n <= number) {
                s.apply_first(key);
            }
            Ok(Version(s.clocks.get(&node).copied().unwrap_or(0)))
        })
    }

    fn read(&self, blocks: Vec<BlockNo>) -> BoxFuture<'static, Result<Vec<BlockRead>, MirrorError>> {
        let delay = self.delay();
        let (store, node) = (self.store.clone(), self.node);
        let alive = self.alive();
        Box::pin(async move {
            alive?;
            tokio::time::sleep(delay).await;
            let mut s = store.0.lock();
            s.reads += blocks.len() as u64;
            s.witness_all(node, blocks.iter().copied());
            let none = Stored { data: Bytes::from(vec![0; BLOCK_SIZE]), tag: Tag::default(), version: 0, writer: NodeId(0) };
            let mut out = Vec::new();
            for block in blocks {
                if s.sizes.get(&block.mirror).is_none_or(|n| block.index >= *n) {
                    return Err(MirrorError::NoSuchBlock { block });
                }
                let b = s.blocks.get(&block).unwrap_or(&none).clone();
                out.push(BlockRead { data: b.data, tag: b.tag, version: Version(b.version) });
            }
            Ok(out)
        })
    }

    fn tags(&self, first: BlockNo, count: u32) -> BoxFuture<'static, Result<Vec<(Tag, Version)>, MirrorError>> {
        let store = self.store.clone();
        Box::pin(async move {
            let s = store.0.lock();
            let block = |i| BlockNo::new(first.mirror, first.index + i);
            Ok((0..count)
                .map(|i| s.blocks.get(&block(i)).map_or((Tag::default(), Version(0)), |b| (b.tag, Version(b.version))))
                .collect())
        })
    }

    fn region_free(&self, mirror: MirrorId, region: u32) -> BoxFuture<'static, Result<RegionFree, MirrorError>> {
        let delay = self.delay();
        let (store, node) = (self.store.clone(), self.node);
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let free = {
                let mut s = store.0.lock();
                let size = s.sizes.get(&mirror).copied().unwrap_or(0);
                let mut words = vec![0u64; (REGION_BLOCKS / 64) as usize];
                for i in 0..REGION_BLOCKS {
                    let block = BlockNo::new(mirror, region * REGION_BLOCKS + i);
                    if block.index < size && s.blocks.get(&block).is_none_or(|b| b.tag.kind == mirror::Kind::Free) {
                        words[(i / 64) as usize] |= 1 << (i % 64);
                    }
                }
                s.witness_all(node, (0..REGION_BLOCKS).map(|i| BlockNo::new(mirror, region * REGION_BLOCKS + i)));
                words
            };
            tokio::time::sleep(delay).await;
            Ok(RegionFree { words: free })
        })
    }

    fn space(&self, mirror: MirrorId) -> BoxFuture<'static, Result<Space, MirrorError>> {
        let store = self.store.clone();
        Box::pin(async move {
            let s = store.0.lock();
            let size = s.sizes.get(&mirror).copied().unwrap_or(0);
            let mut free: Vec<u32> =
                (0..size.div_ceil(REGION_BLOCKS)).map(|r| (size - r * REGION_BLOCKS).min(REGION_BLOCKS)).collect();
            for (b, v) in &s.blocks {
                if b.mirror == mirror && v.tag.kind != mirror::Kind::Free {
                    free[(b.index / REGION_BLOCKS) as usize] -= 1;
                }
            }
            Ok(Space { blocks: u64::from(size), free })
        })
    }

    fn witness(&self, seen: u64) -> u64 {
        let mut s = self.store.0.lock();
        let clock = s.clocks.entry(self.node).or_default();
        *clock = seen.max(*clock);
        *clock
    }

    fn clock(&self) -> u64 {
        self.store.0.lock().clocks.get(&self.node).copied().unwrap_or(0)
    }
}
