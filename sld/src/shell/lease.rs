//! Leases of regions: getting them, and what space there is.

use super::disk::DiskShared;
use super::fetch::disk_error;
use crate::allocator::{RegionId, Use};
use crate::api::{DiskError, Extent, FlushTarget, ObjectId, Usage};
use cluster::{BlockNo, MirrorId};
use mirror::Space;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long the answer to `usage` is good.
const USAGE_AGE: Duration = Duration::from_secs(1);

/// Regions asked for before one is taken from another node.
const ASK_MAX: usize = 32;

fn object(id: RegionId) -> ObjectId {
    ObjectId::Region(id.0.0, id.1)
}

impl DiskShared {
    pub(super) fn mirrors(&self) -> Vec<(MirrorId, u32)> {
        let view = self.node.cluster.view();
        let config = view.borrow().config.clone();
        let mirrors = config.filesystems.get(&self.fs).map(|f| f.mirrors.clone()).unwrap_or_default();
        mirrors.into_iter().filter_map(|m| config.mirrors.get(&m).map(|i| (m, i.blocks))).collect()
    }

    pub(super) fn try_alloc(self: &Arc<Self>, near: Option<BlockNo>, count: u32) -> Option<Extent> {
        if !self.node.serving() {
            return None;
        }
        let (extent, short) = {
            let mut state = self.state.lock();
            (state.allocator.alloc(near, count)?, state.allocator.short())
        };
        if let Some(use_) = short
            && self.leasing.try_lock().is_ok()
        {
            // Ahead of need, and only what nobody else has.
            let disk = self.clone();
            self.node.spawn(async move {
                let Ok(_one) = disk.leasing.try_lock() else { return };
                let _ = disk.lease_one(use_, near.map(|n| n.mirror), &[false]).await;
                disk.give_back_surplus();
            });
        }
        Some(extent)
    }

    pub(super) async fn alloc(self: &Arc<Self>, near: Option<BlockNo>, count: u32) -> Result<Extent, DiskError> {
        let generation = self.node.look(|t| t.holder.generation());
        let mut flushed = false;
        loop {
            self.node.wait_serving().await?;
            if let Some(extent) = self.try_alloc(near, count) {
                return Ok(extent);
            }
            let one = self.leasing.lock().await;
            if let Some(extent) = self.try_alloc(near, count) {
                return Ok(extent);
            }
            // Whatever the operation holds was lost with everything else.
            if self.node.look(|t| t.holder.generation()) != generation {
                return Err(self.node.broken());
            }
            let use_ = if count == 1 { Use::Meta } else { Use::Data };
            let leased = self.lease_one(use_, near.map(|n| n.mirror), &[false, true]).await?;
            if !leased {
                // Blocks freed here come back when that is durable.
                if flushed || self.state.lock().wb.frees() == 0 {
                    if let Some(extent) = self.try_alloc(near, count) {
                        return Ok(extent);
                    }
                    return Err(DiskError::NoSpace);
                }
                drop(one);
                flushed = true;
                self.flush_quietly().await?;
            }
        }
    }

    /// As `flush` of everything, but leaves it to others to report what was lost.
    async fn flush_quietly(self: &Arc<Self>) -> Result<(), DiskError> {
        let blocks = self.state.lock().wb.freed_blocks();
        let targets: Vec<FlushTarget> = blocks.into_iter().map(FlushTarget::Block).collect();
        match self.flush(&targets).await {
            Err(DiskError::Shutdown) => Err(DiskError::Shutdown),
            _ => Ok(()),
        }
    }

    async fn spaces(&self) -> Result<Vec<(MirrorId, Space)>, DiskError> {
        let mut spaces = Vec::new();
        for (mirror, _) in self.mirrors() {
            spaces.push((mirror, self.node.mirrors.space(mirror).await.map_err(disk_error)?));
        }
        Ok(spaces)
    }

    /// Leases a region that has free blocks, or reads anew what is free in one that is leased. `passes` says whether
    /// others are to be made to give theirs up, first and then.
    async fn lease_one(self: &Arc<Self>, use_: Use, near: Option<MirrorId>, passes: &[bool]) -> Result<bool, DiskError> {
        let spaces = self.spaces().await?;
        let me = self.node.cluster.local();
        let mut mine: BTreeSet<RegionId> = BTreeSet::new();
        for (mirror, space) in &spaces {
            let ids = (0..space.free.len()).map(|n| (*mirror, n as u32));
            mine.extend(ids.filter(|id| self.node.is_master(me, object(*id))));
        }
        let candidates = {
            let mut state = self.state.lock();
            state.lease_for = use_;
            state.allocator.candidates(&spaces, near, |id| mine.contains(&id))
        };
        for steal in passes {
            let most = if *steal { usize::MAX } else { ASK_MAX };
            for id in candidates.iter().take(most) {
                // Leased ones are read anew only when there is nothing else.
                if passes.len() == 1 && self.state.lock().allocator.is_leased(*id) {
                    continue;
                }
                let before = self.state.lock().allocator.free();
                let (tx, rx) = oneshot::channel();
                self.state.lock().leases.entry(*id).or_default().push(tx);
                self.node.step(|t, now, step| t.with(now, step, |h, out| h.lease(object(*id), *steal, out)));
                match rx.await {
                    Ok(true) if self.state.lock().allocator.free() > before => return Ok(true),
                    Ok(_) => {}
                    Err(_) => return Err(self.node.broken()),
                }
            }
        }
        Ok(false)
    }

    /// A lease was granted; under the lock of the tokens.
    pub(super) fn lease_begins(&self, region: ObjectId, busy: &[u32]) -> u64 {
        let ObjectId::Region(mirror, n) = region else { return 0 };
        let mut state = self.state.lock();
        let use_ = state.lease_for;
        state.allocator.leased((MirrorId(mirror), n), use_, busy)
    }

    /// Reads what is free in a region that was leased.
    pub(super) fn load(self: &Arc<Self>, region: ObjectId, load: u64) {
        let ObjectId::Region(mirror, n) = region else { return };
        let id = (MirrorId(mirror), n);
        let disk = self.clone();
        self.node.spawn(async move {
            let free = disk.node.mirrors.region_free(id.0, id.1).await;
            let blocks = disk.mirrors().into_iter().find(|(m, _)| *m == id.0).map_or(0, |(_, b)| b);
            let loaded = match free {
                Ok(free) => disk.state.lock().allocator.loaded(id, load, blocks, &free.words),
                Err(error) => {
                    tracing::warn!(region = ?id, %error, "cannot read what is free in a region");
                    false
                }
            };
            disk.leased(region, loaded);
        });
    }

    /// Tells those who wait for a lease.
    pub(super) fn leased(&self, region: ObjectId, granted: bool) {
        let ObjectId::Region(mirror, n) = region else { return };
        for tx in self.state.lock().leases.remove(&(MirrorId(mirror), n)).unwrap_or_default() {
            let _ = tx.send(granted);
        }
    }

    fn give_back_surplus(self: &Arc<Self>) {
        let surplus = self.state.lock().allocator.surplus();
        for id in surplus {
            self.node.step(|t, now, step| t.with(now, step, |h, out| h.give_up(object(id), out)));
        }
    }

    pub(super) async fn usage(self: &Arc<Self>) -> Result<Usage, DiskError> {
        let now = self.node.cluster.now();
        if let Some((at, usage)) = self.state.lock().usage
            && now.since(at) < USAGE_AGE
        {
            return Ok(usage);
        }
        let spaces = self.spaces().await?;
        let mut usage = Usage::default();
        for (_, s) in &spaces {
            usage.blocks += s.blocks;
            usage.free += s.free.iter().map(|f| u64::from(*f)).sum::<u64>();
        }
        let mut state = self.state.lock();
        usage.free = usage.free.saturating_sub(state.allocator.pending_count() as u64) + state.wb.frees() as u64;
        usage.free = usage.free.min(usage.blocks);
        state.usage = Some((now, usage));
        Ok(usage)
    }
}
