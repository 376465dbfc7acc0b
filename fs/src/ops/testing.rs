//! What tests of operations share: a file system in memory, and seeded randomness.

use crate::{Caller, FileSystem, FormatParams, Ino, NewNode, SetAttributes, Time};
use cluster::{BlockNo, MirrorId};
use sld::memory::{Image, MemoryDisk};
use sld::{Block, Disk, DiskError, Extent, FlushTarget, ObjectId, Operation, Tag, Upcalls, Usage, Want};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A file system in memory.
pub(crate) struct Fixture {
    pub(crate) disk: MemoryDisk,
    pub(crate) fs: FileSystem<MemoryDisk>,
}

/// An empty file system on mirrors of these sizes.
pub(crate) async fn fixture(mirrors: &[u32]) -> Fixture {
    let disk = MemoryDisk::new(mirrors);
    let params = FormatParams {
        uuid: [1; 16],
        hash_key: [2; 16],
        label: "test".to_owned(),
        uid: 0,
        gid: 0,
        mode: 0o755,
        now: Time { seconds: 1000, nanos: 0 },
    };
    FileSystem::format(&disk, &params).await.unwrap();
    open(disk).await
}

async fn open(disk: MemoryDisk) -> Fixture {
    // A clock that stands still now and then.
    let ticks = AtomicU64::new(5_000_000_000_000);
    let clock = Arc::new(move || Time::from_nanos(ticks.fetch_add(1, Ordering::Relaxed) / 2));
    let fs = FileSystem::mount(disk.clone(), clock).await.unwrap();
    Fixture { disk, fs }
}

impl Fixture {
    /// A file system on what a crash has left.
    pub(crate) async fn reopen(&self, mirrors: &[u32], image: Image) -> Fixture {
        open(MemoryDisk::from_image(mirrors, image)).await
    }

    /// A new file in the root.
    pub(crate) async fn file(&self, name: &[u8]) -> Ino {
        self.fs.make(&Caller::default(), self.fs.root(), name, NewNode::File, 0o644).await.unwrap().ino
    }

    pub(crate) async fn unlink(&self, name: &[u8]) {
        self.fs.unlink(&Caller::default(), self.fs.root(), name).await.unwrap();
    }

    pub(crate) async fn chmod(&self, ino: Ino, mode: u32) {
        let change = SetAttributes { mode: Some(mode), ..SetAttributes::default() };
        self.fs.set_attributes(&Caller::default(), ino, change).await.unwrap();
    }

    pub(crate) async fn disk_free(&self) -> u64 {
        self.disk.usage().await.unwrap().free
    }
}

/// Numbers from a seed (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }

    pub(crate) fn bytes(&mut self, len: u64) -> Vec<u8> {
        let start = self.below(250) as u8;
        (0..len).map(|i| start.wrapping_add((i / 7) as u8) | 1).collect()
    }
}

/// A disk in memory from which the node is cut off now and then: as often as is said, the next who asks for tokens is told so.
#[derive(Clone)]
pub(crate) struct CutOff {
    pub(crate) disk: MemoryDisk,
    pub(crate) times: Arc<AtomicU32>,
}

impl Disk for CutOff {
    type Tokens = <MemoryDisk as Disk>::Tokens;

    async fn acquire(&self, wants: &[Want]) -> Result<Self::Tokens, DiskError> {
        match self.times.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |times| times.checked_sub(1)) {
            Ok(_) => Err(DiskError::Lost),
            Err(_) => self.disk.acquire(wants).await,
        }
    }

    fn try_acquire(&self, wants: &[Want]) -> Option<Self::Tokens> {
        if self.times.load(Ordering::Relaxed) > 0 { None } else { self.disk.try_acquire(wants) }
    }

    fn adopt(&self, object: ObjectId) -> Self::Tokens {
        self.disk.adopt(object)
    }

    async fn read(&self, object: ObjectId, block: BlockNo) -> Result<Block, DiskError> {
        self.disk.read(object, block).await
    }

    fn try_read(&self, object: ObjectId, block: BlockNo) -> Option<Block> {
        self.disk.try_read(object, block)
    }

    async fn read_many(&self, object: ObjectId, blocks: &[BlockNo]) -> Result<Vec<Block>, DiskError> {
        self.disk.read_many(object, blocks).await
    }

    fn read_ahead(&self, object: ObjectId, blocks: &[BlockNo]) {
        self.disk.read_ahead(object, blocks);
    }

    async fn alloc(&self, near: Option<BlockNo>, count: u32) -> Result<Extent, DiskError> {
        self.disk.alloc(near, count).await
    }

    fn try_alloc(&self, near: Option<BlockNo>, count: u32) -> Option<Extent> {
        self.disk.try_alloc(near, count)
    }

    fn unalloc(&self, extent: Extent) {
        self.disk.unalloc(extent);
    }

    async fn admit(&self) -> Result<(), DiskError> {
        self.disk.admit().await
    }

    fn commit(&self, operation: Operation) -> Result<(), DiskError> {
        self.disk.commit(operation)
    }

    async fn flush(&self, targets: &[FlushTarget]) -> Result<(), DiskError> {
        self.disk.flush(targets).await
    }

    fn take_loss(&self, object: ObjectId) -> bool {
        self.disk.take_loss(object)
    }

    fn set_open(&self, object: ObjectId, open: bool) {
        self.disk.set_open(object, open);
    }

    fn open_elsewhere(&self, object: ObjectId) -> Option<bool> {
        self.disk.open_elsewhere(object)
    }

    async fn usage(&self) -> Result<Usage, DiskError> {
        self.disk.usage().await
    }

    async fn tags(&self, first: BlockNo, count: u32) -> Result<Vec<Tag>, DiskError> {
        self.disk.tags(first, count).await
    }

    fn mirrors(&self) -> Vec<(MirrorId, u32)> {
        self.disk.mirrors()
    }

    fn cycle(&self) -> u32 {
        self.disk.cycle()
    }

    fn set_upcalls(&self, upcalls: Arc<dyn Upcalls>) {
        self.disk.set_upcalls(upcalls);
    }
}
