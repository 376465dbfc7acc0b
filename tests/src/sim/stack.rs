//! One node's layers above the cluster: mirror, shared logical disk, file system. And the bugs that can be planted between
//! them.

use super::Planted;
use super::world::PATIENCE;
use cluster::config::{Applied, Command};
use cluster::sim::SimClock;
use cluster::{
    BlockNo, BoxFuture, Cluster, DiskId, Epoch, FsId, Instant, Layer, MirrorId, NodeId, ProposeError, Transport, View, watch,
};
use fs::{FileSystem, FormatParams, Time};
use mirror::sim::SimDisk;
use mirror::{BlockDevice, BlockRead, Mirror, MirrorError, MirrorOptions, Mirrors, RegionFree, Space, Tag, Version, WriteGroup};
use sld::shell::Locks;
use sld::{Options, PulsarDisk, Sld};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The disk that the file systems are on.
pub type StackDisk = PulsarDisk;

/// The layers of a running node. Dropping it ends all that they do.
#[derive(Default)]
pub struct Stack {
    parts: Option<Parts>,
}

struct Parts {
    fs: Option<Arc<FileSystem<PulsarDisk>>>,
    sld: Arc<Sld>,
    mirror: Arc<Mirror>,
    _locks: Arc<Locks>,
    clock: SimClock,
}

/// What a node is made of.
pub struct StackOptions {
    /// The base.
    pub cluster: Arc<dyn Cluster>,
    /// Its disk.
    pub disk: SimDisk,
    /// The disk's number.
    pub disk_id: DiskId,
    /// The bug to plant.
    pub planted: Option<Planted>,
    /// Time of day.
    pub clock: SimClock,
}

/// Block cache of a simulated node: small, so that it overflows.
const CACHE_BYTES: usize = 1 << 20;
const DIRTY_BYTES: usize = 512 << 10;

impl Stack {
    /// Starts the layers. They recover when the others do, too.
    ///
    /// # Errors
    /// Says what does not start.
    pub async fn start(options: StackOptions) -> Result<Stack, String> {
        let StackOptions { cluster, disk, disk_id, planted, clock } = options;
        let cluster: Arc<dyn Cluster> = match planted {
            Some(Planted::EndlessLease) => Arc::new(Wrapped { endless_lease: true, view: cluster.view(), inner: cluster }),
            Some(Planted::HastyRecovery) => Arc::new(Wrapped::hasty(cluster)),
            _ => cluster,
        };
        let device: Arc<dyn BlockDevice> = Arc::new(disk);
        let mirror = Mirror::start(cluster.clone(), vec![(disk_id, device)], MirrorOptions { tag_blocks_max: 64 })
            .await
            .map_err(|e| format!("the mirror layer does not start: {e}"))?;
        let mirrors = match planted {
            Some(Planted::EarlyAck) => Arc::new(EarlyAck(mirror.mirrors())) as Arc<dyn Mirrors>,
            _ => mirror.mirrors(),
        };
        let sizes = Options { cache_bytes: CACHE_BYTES, dirty_bytes: DIRTY_BYTES, tokens: 500, ..Options::default() };
        let sld = Sld::start(cluster.clone(), mirrors, sizes);
        let locks = Locks::start(cluster);
        Ok(Stack { parts: Some(Parts { fs: None, sld, mirror, _locks: locks, clock }) })
    }

    /// Makes the file system.
    ///
    /// # Errors
    /// Says why it is not made.
    pub async fn format(&self, fs: FsId) -> Result<(), String> {
        let Some(parts) = &self.parts else { return Err("the layers do not run".into()) };
        let params = FormatParams {
            uuid: [9; 16],
            hash_key: [3; 16],
            label: "sim".into(),
            uid: 0,
            gid: 0,
            mode: 0o755,
            now: Time { seconds: 1_000_000, nanos: 0 },
        };
        let made = tokio::time::timeout(PATIENCE, FileSystem::format(&parts.sld.disk(fs), &params)).await;
        made.map_err(|_| "making the file system does not end")?.map_err(|e| format!("making the file system: {e}"))
    }

    /// Mounts the file system, unless it is mounted.
    ///
    /// # Errors
    /// Says why it is not mounted.
    pub async fn mount(&mut self, fs: FsId) -> Result<(), String> {
        let Some(parts) = &mut self.parts else { return Err("the layers do not run".into()) };
        if parts.fs.is_none() {
            let mounting = FileSystem::mount(parts.sld.disk(fs), time_of_day(&parts.clock));
            let mounted = tokio::time::timeout(PATIENCE, mounting).await.map_err(|_| "mounting does not end")?;
            parts.fs = Some(Arc::new(mounted.map_err(|e| format!("mounting: {e}"))?));
        }
        Ok(())
    }

    /// The file system, if it is mounted.
    #[must_use]
    pub fn fs(&self) -> Option<Arc<FileSystem<PulsarDisk>>> {
        self.parts.as_ref().and_then(|p| p.fs.clone())
    }

    /// The mirror layer, if it runs.
    #[must_use]
    pub fn mirror(&self) -> Option<Arc<Mirror>> {
        self.parts.as_ref().map(|p| p.mirror.clone())
    }

    /// What waits in the layers, for reports of failures.
    #[must_use]
    pub fn dump(&self) -> String {
        let Some(parts) = &self.parts else { return "layers down".into() };
        let status = parts.mirror.status();
        let disk = parts.fs.as_ref().map(|fs| format!("{:?}", fs.disk().status()));
        let disk = disk.unwrap_or_else(|| "not mounted".into());
        tracing::debug!("tokens: {}", parts.sld.dump());
        format!("groups waiting {}, {disk}", status.groups_waiting)
    }

    /// Panics if an invariant of a layer is broken.
    pub fn check_invariants(&self) {
        if let Some(parts) = &self.parts {
            parts.sld.check_invariants();
        }
    }
}

/// A wall clock: the node's own, so the nodes disagree; as a wall clock is, set to nearly the same time.
fn time_of_day(clock: &SimClock) -> fs::Clock {
    let clock = clock.clone();
    let skew = clock.offset().as_nanos() as u64 % 20_000_000;
    let last = AtomicU64::new(0);
    Arc::new(move || {
        let now = 1_700_000_000_000_000_000 + skew + clock.elapsed().as_nanos() as u64;
        // Two readings differ, as on a real machine.
        let now = last.fetch_max(now, Ordering::Relaxed).max(now - 1) + 1;
        last.fetch_max(now, Ordering::Relaxed);
        Time { seconds: (now / 1_000_000_000) as i64, nanos: (now % 1_000_000_000) as u32 }
    })
}

/// A cluster with a planted bug: a lease that never ends, or epochs that count as recovered when they begin.
struct Wrapped {
    inner: Arc<dyn Cluster>,
    endless_lease: bool,
    view: watch::Receiver<Arc<View>>,
}

impl Wrapped {
    fn hasty(inner: Arc<dyn Cluster>) -> Self {
        let hasten = |view: &View| Arc::new(View { recovered: Layer::Fs, ..view.clone() });
        let mut views = inner.view();
        let (sender, view) = watch::channel(hasten(&views.borrow_and_update()));
        tokio::spawn(async move {
            while views.changed().await.is_ok() {
                let next = hasten(&views.borrow_and_update());
                sender.send_replace(next);
            }
        });
        Wrapped { inner, endless_lease: false, view }
    }
}

impl Cluster for Wrapped {
    fn local(&self) -> NodeId {
        self.inner.local()
    }
    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }
    fn lease_until(&self) -> Instant {
        if self.endless_lease { Instant(u64::MAX) } else { self.inner.lease_until() }
    }
    fn now(&self) -> Instant {
        self.inner.now()
    }
    fn finish(&self, epoch: Epoch, layer: Layer) {
        self.inner.finish(epoch, layer);
    }
    fn propose(&self, command: Command) -> BoxFuture<'_, Result<Applied, ProposeError>> {
        self.inner.propose(command)
    }
    fn transport(&self) -> Arc<dyn Transport> {
        self.inner.transport()
    }
}

/// A planted bug: a write is acknowledged before it is durable.
struct EarlyAck(Arc<dyn Mirrors>);

impl Mirrors for EarlyAck {
    fn submit(&self, mirror: MirrorId, group: WriteGroup) -> BoxFuture<'static, Result<Version, MirrorError>> {
        let inner = self.0.submit(mirror, group);
        let clock = self.0.clock();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let _ = inner.await;
        });
        Box::pin(async move { Ok(Version(clock)) })
    }
    fn read(&self, blocks: Vec<BlockNo>) -> BoxFuture<'static, Result<Vec<BlockRead>, MirrorError>> {
        self.0.read(blocks)
    }
    fn tags(&self, first: BlockNo, count: u32) -> BoxFuture<'static, Result<Vec<(Tag, Version)>, MirrorError>> {
        self.0.tags(first, count)
    }
    fn region_free(&self, mirror: MirrorId, region: u32) -> BoxFuture<'static, Result<RegionFree, MirrorError>> {
        self.0.region_free(mirror, region)
    }
    fn space(&self, mirror: MirrorId) -> BoxFuture<'static, Result<Space, MirrorError>> {
        self.0.space(mirror)
    }
    fn witness(&self, seen: u64) -> u64 {
        self.0.witness(seen)
    }
    fn clock(&self) -> u64 {
        self.0.clock()
    }
}
