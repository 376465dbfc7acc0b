//! Two nodes that share a disk in memory, each mounted: `twofs DIRECTORY1 DIRECTORY2 [MIB]`. Tokens go from one to the other
//! as in a cluster, so that what the kernels believe can be tested on one machine. Needs root and /dev/fuse.

use cluster::{BlockNo, MirrorId};
use fs::shell::{MountOptions, ServeOptions, Unmount, mount, serve};
use fs::{FileSystem, FormatParams, Time};
use sld::memory::{MemoryDisk, MemoryTokens};
use sld::{Block, Disk, DiskError, Extent, FlushTarget, Mode, ObjectId, Operation, Tag, Upcalls, Usage, Want};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

type Holders = HashMap<ObjectId, [Option<Mode>; 2]>;
type Opens = [HashSet<ObjectId>; 2];

/// One node's view of a disk in memory: the tokens that it keeps, and that the other node takes from it.
#[derive(Clone)]
struct NodeDisk {
    inner: MemoryDisk,
    node: usize,
    holders: Arc<Mutex<Holders>>,
    opens: Arc<Mutex<Opens>>,
    upcalls: Arc<[OnceLock<Arc<dyn Upcalls>>; 2]>,
}

impl NodeDisk {
    /// The operation has the token to itself; now it is taken from the other node.
    fn take(&self, wants: &[Want]) {
        let other = 1 - self.node;
        for (object, mode) in wants {
            let lost = {
                let Ok(mut holders) = self.holders.lock() else { return };
                let held = holders.entry(*object).or_default();
                let lost = match (held[other], mode) {
                    (Some(_), Mode::Exclusive) => Some(None),
                    (Some(Mode::Exclusive), Mode::Shared) => Some(Some(Mode::Shared)),
                    _ => None,
                };
                if let Some(keep) = lost {
                    held[other] = keep;
                }
                if held[self.node] != Some(Mode::Exclusive) {
                    held[self.node] = Some(*mode);
                }
                lost
            };
            if let (Some(keep), Some(upcalls)) = (lost, self.upcalls[other].get()) {
                // As the disk does before it gives the token up; an example may block its thread for this.
                std::thread::sleep(upcalls.revoked(*object, keep));
            }
        }
    }
}

impl Disk for NodeDisk {
    type Tokens = MemoryTokens;

    async fn acquire(&self, wants: &[Want]) -> Result<MemoryTokens, DiskError> {
        let tokens = self.inner.acquire(wants).await?;
        self.take(wants);
        Ok(tokens)
    }

    fn try_acquire(&self, wants: &[Want]) -> Option<MemoryTokens> {
        let tokens = self.inner.try_acquire(wants)?;
        self.take(wants);
        Some(tokens)
    }

    fn adopt(&self, object: ObjectId) -> MemoryTokens {
        let tokens = self.inner.adopt(object);
        self.take(&[(object, Mode::Exclusive)]);
        tokens
    }

    async fn read(&self, object: ObjectId, block: BlockNo) -> Result<Block, DiskError> {
        self.inner.read(object, block).await
    }

    fn try_read(&self, object: ObjectId, block: BlockNo) -> Option<Block> {
        self.inner.try_read(object, block)
    }

    async fn read_many(&self, object: ObjectId, blocks: &[BlockNo]) -> Result<Vec<Block>, DiskError> {
        self.inner.read_many(object, blocks).await
    }

    fn read_ahead(&self, object: ObjectId, blocks: &[BlockNo]) {
        self.inner.read_ahead(object, blocks);
    }

    async fn alloc(&self, near: Option<BlockNo>, count: u32) -> Result<Extent, DiskError> {
        self.inner.alloc(near, count).await
    }

    fn try_alloc(&self, near: Option<BlockNo>, count: u32) -> Option<Extent> {
        self.inner.try_alloc(near, count)
    }

    fn unalloc(&self, extent: Extent) {
        self.inner.unalloc(extent);
    }

    async fn admit(&self) -> Result<(), DiskError> {
        self.inner.admit().await
    }

    fn commit(&self, operation: Operation) -> Result<(), DiskError> {
        self.inner.commit(operation)
    }

    async fn flush(&self, targets: &[FlushTarget]) -> Result<(), DiskError> {
        self.inner.flush(targets).await
    }

    fn take_loss(&self, object: ObjectId) -> bool {
        self.inner.take_loss(object)
    }

    fn set_open(&self, object: ObjectId, open: bool) {
        let Ok(mut opens) = self.opens.lock() else { return };
        if open {
            opens[self.node].insert(object);
        } else {
            opens[self.node].remove(&object);
        }
    }

    fn open_elsewhere(&self, object: ObjectId) -> bool {
        self.opens.lock().is_ok_and(|opens| opens[1 - self.node].contains(&object))
    }

    async fn usage(&self) -> Result<Usage, DiskError> {
        self.inner.usage().await
    }

    async fn tags(&self, first: BlockNo, count: u32) -> Result<Vec<Tag>, DiskError> {
        self.inner.tags(first, count).await
    }

    fn mirrors(&self) -> Vec<(MirrorId, u32)> {
        self.inner.mirrors()
    }

    fn cycle(&self) -> u32 {
        self.inner.cycle()
    }

    fn set_upcalls(&self, upcalls: Arc<dyn Upcalls>) {
        let _ = self.upcalls[self.node].set(upcalls);
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [first, second, ..] = arguments.as_slice() else { return Err("usage: twofs DIRECTORY1 DIRECTORY2 [MIB]".into()) };
    let mib: u32 = arguments.get(2).and_then(|a| a.to_str()?.parse().ok()).unwrap_or(1024);
    let inner = MemoryDisk::new(&[mib * 128, mib * 128]);
    let params = FormatParams {
        uuid: *b"in memory only..",
        hash_key: *b"not so random...",
        label: "twofs".to_owned(),
        uid: 0,
        gid: 0,
        mode: 0o755,
        now: now(),
    };
    FileSystem::format(&inner, &params).await?;
    let (holders, opens) = (Arc::default(), Arc::default());
    let upcalls = Arc::new([OnceLock::new(), OnceLock::new()]);
    let mut handles = Vec::new();
    for (node, directory) in [first, second].into_iter().enumerate() {
        let disk = NodeDisk {
            inner: inner.clone(),
            node,
            holders: Arc::clone(&holders),
            opens: Arc::clone(&opens),
            upcalls: Arc::clone(&upcalls),
        };
        let fs = Arc::new(FileSystem::mount(disk, Arc::new(now)).await?);
        let directory = PathBuf::from(directory);
        let fuse = mount("twofs", &directory, &MountOptions::parse("rw")?)?;
        let options = ServeOptions {
            directory: Some(directory),
            lifetime: Arc::new(|| std::time::Duration::from_secs(3600)),
            ..ServeOptions::default()
        };
        handles.push(serve(fs, fuse, options)?);
    }
    for handle in &handles {
        handle.ready().await?;
    }
    println!("ready");
    tokio::select! {
        biased;
        () = async { for handle in &handles { handle.ended().await } } => {}
        _ = tokio::signal::ctrl_c() => for handle in &handles { handle.unmount(Unmount::Lazy)? },
    }
    for handle in handles {
        handle.join()?;
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "the example's clock is the wall clock")]
fn now() -> Time {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Time { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() }
}
