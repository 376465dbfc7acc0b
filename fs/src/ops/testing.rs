//! What tests of operations share: a file system in memory, and seeded randomness.

use crate::{Caller, FileSystem, FormatParams, Ino, NewNode, SetAttributes, Time};
use sld::Disk;
use sld::memory::{Image, MemoryDisk};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
