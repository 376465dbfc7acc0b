//! `PulsarDisk`: the shared logical disk of one file system, as `api::Disk`.
//!
//! One mutex guards write-behind, cache and allocator together: a commit is one short section under it. Groups are handed
//! to the mirrors by one driver task, since their order counts.

use super::losses::Losses;
use super::node::Node;
use crate::allocator::{Allocator, Outcome, Question, RegionId};
use crate::api::{Block, Content, Disk, DiskError, Extent, FlushTarget, Mode, ObjectId, Operation, Upcalls, Usage, Want};
use crate::cache::Cache;
use crate::holder::Forgotten;
use crate::writeback::{FlushId, Settled, Ticket, WriteBack};
use cluster::{BLOCK_SIZE, BlockNo, FsId, MirrorId};
use mirror::{MirrorError, Tag, Version};
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;

/// How often the age of dirty blocks is looked at.
const AGE_TICK: Duration = Duration::from_millis(250);
/// Bytes of blocks past their first age that are written per such look.
const AGE_BYTES: usize = 4 << 20;

/// A fetch's end, as those who wait for it are told.
pub(super) type Fetched = oneshot::Sender<Result<Block, DiskError>>;

pub(super) struct State {
    pub(super) wb: WriteBack,
    pub(super) cache: Cache<Fetched>,
    pub(super) allocator: Allocator,
    /// Of the tokens: changes when everything was lost.
    generation: u64,
    flushes: BTreeMap<FlushId, oneshot::Sender<()>>,
    /// Who waits for the lease of a region.
    pub(super) leases: BTreeMap<RegionId, Vec<oneshot::Sender<bool>>>,
    /// What the next lease is for.
    pub(super) lease_for: crate::allocator::Use,
    losses: Losses,
    /// Flushes that have failed, whose waiters go on when the upcall was made.
    broken: Vec<oneshot::Sender<()>>,
    pub(super) usage: Option<(cluster::Instant, Usage)>,
}

/// A disk, shared by all its clones.
pub(super) struct DiskShared {
    pub(super) node: Arc<Node>,
    pub(super) fs: FsId,
    pub(super) state: Mutex<State>,
    upcalls: OnceLock<Arc<dyn Upcalls>>,
    /// The driver has something to do.
    kick: Notify,
    /// Dirty bytes have become fewer.
    room: Notify,
    /// One at a time asks for regions.
    pub(super) leasing: tokio::sync::Mutex<()>,
    cycle: AtomicU32,
}

impl DiskShared {
    /// `generation`: of the tokens, which may have been lost before.
    pub(super) fn start(node: &Arc<Node>, fs: FsId, generation: u64) -> Arc<Self> {
        let disk = Arc::new(DiskShared {
            node: node.clone(),
            fs,
            state: Mutex::new(State {
                wb: WriteBack::default(),
                cache: Cache::new(node.options.cache_bytes),
                allocator: Allocator::default(),
                generation,
                flushes: BTreeMap::new(),
                leases: BTreeMap::new(),
                lease_for: crate::allocator::Use::Data,
                losses: Losses::default(),
                broken: Vec::new(),
                usage: None,
            }),
            upcalls: OnceLock::new(),
            kick: Notify::new(),
            room: Notify::new(),
            leasing: tokio::sync::Mutex::new(()),
            cycle: AtomicU32::new(1),
        });
        node.spawn(disk.clone().drive());
        disk
    }

    /// Hands groups to the mirrors, and takes in what became of them.
    async fn drive(self: Arc<Self>) {
        let mut groups: JoinSet<(Ticket, Result<Version, MirrorError>)> = JoinSet::new();
        let mut tick = tokio::time::interval(AGE_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let submissions = self.state.lock().wb.pump();
            for s in submissions {
                let write = self.node.mirrors.submit(s.mirror, s.group);
                groups.spawn(async move { (s.ticket, write.await) });
            }
            tokio::select! {
                biased;
                _ = tick.tick() => self.age(),
                Some(done) = groups.join_next(), if !groups.is_empty() => {
                    if let Ok((ticket, result)) = done {
                        self.written(ticket, result);
                    }
                    while let Some(done) = groups.try_join_next() {
                        if let Ok((ticket, result)) = done {
                            self.written(ticket, result);
                        }
                    }
                }
                () = self.kick.notified() => {}
            }
        }
    }

    fn age(&self) {
        let now = self.node.cluster.now();
        let o = &self.node.options;
        let mut state = self.state.lock();
        state.wb.want_old(now - o.age_start, AGE_BYTES, o.dirty_bytes / 4);
        state.wb.want_old(now - o.age_max, usize::MAX, o.dirty_bytes / 4);
    }

    fn written(self: &Arc<Self>, ticket: Ticket, result: Result<Version, MirrorError>) {
        match result {
            Ok(_) => {
                let mut outcome = Outcome::default();
                let (settled, wakes) = {
                    let mut state = self.state.lock();
                    let mut settled = state.wb.acked(ticket);
                    for b in &settled.durable {
                        state.allocator.durable(*b, &mut outcome);
                    }
                    for (block, object, data) in std::mem::take(&mut settled.clean) {
                        state.cache.insert(object, block, data);
                    }
                    let wakes: Vec<_> = settled.flushed.iter().filter_map(|f| state.flushes.remove(f)).collect();
                    (settled, wakes)
                };
                // Freed blocks first: once a flush ends, tokens may go, and with them the knowledge that they were ours.
                self.came_back(&settled.freed);
                self.outcome(outcome);
                for wake in wakes {
                    let _ = wake.send(());
                }
                self.room.notify_waiters();
            }
            // The view will say that all is lost, or that all ends.
            Err(MirrorError::Fenced | MirrorError::Shutdown) => {}
            Err(error @ (MirrorError::Corrupt { .. } | MirrorError::NoSuchBlock { .. })) => {
                tracing::error!(fs = %self.fs, %error, "a write can never be done; its file's data is lost");
                let mut state = self.state.lock();
                let (lost, settled) = state.wb.failed(ticket);
                let objects: BTreeSet<ObjectId> = lost.iter().map(|(_, o)| *o).collect();
                state.losses.add(lost);
                let waiting: Vec<_> = settled.flushed.iter().filter_map(|f| state.flushes.remove(f)).collect();
                drop(state);
                // Before those go on who wait for a flush, so that they are not told of it a second time.
                self.tell_lost(&objects.into_iter().collect::<Vec<_>>());
                drop(waiting);
                self.room.notify_waiters();
            }
        }
    }

    /// Blocks are free again: nobody may have a token on them as inodes when they are allocated anew.
    fn came_back(self: &Arc<Self>, blocks: &[BlockNo]) {
        if blocks.is_empty() {
            return;
        }
        let mut outcome = Outcome::default();
        let dropped = self.node.step(|t, now, step| {
            let mut dropped = Vec::new();
            for b in blocks {
                let object = ObjectId::Inode(b.pack());
                let token = t.with(now, step, |h, out| h.forget(object, out));
                let mut state = self.state.lock();
                state.allocator.freed(*b, token, &mut outcome);
                if matches!(token, Forgotten::Dropped | Forgotten::Released) {
                    state.cache.drop_object(object);
                    dropped.push(object);
                }
            }
            dropped
        });
        if let Some(upcalls) = self.upcalls.get() {
            for object in dropped {
                // Nothing to wait for: it exists no more, and what takes its place has another generation.
                let _ = upcalls.revoked(object, None);
            }
        }
        self.outcome(outcome);
    }

    pub(super) fn outcome(self: &Arc<Self>, outcome: Outcome) {
        if outcome == Outcome::default() {
            return;
        }
        self.node.step(|t, now, step| {
            t.with(now, step, |h, out| {
                for b in outcome.unreserve {
                    h.unreserve(b, out);
                }
                for (b, question) in outcome.answers {
                    let object = ObjectId::Inode(b.pack());
                    match question {
                        Question::Revoke { seq, keep } => h.answer(object, seq, keep, out),
                        Question::Local => h.consent(object, out),
                    }
                }
            });
        });
    }

    /// Somebody asks for an inode that is not held here; under the lock of the tokens.
    pub(super) fn asked(&self, object: ObjectId, question: Question) -> bool {
        let ObjectId::Inode(packed) = object else { return true };
        self.state.lock().allocator.asked(BlockNo::unpack(packed), question)
    }

    /// An inode's token was granted whose region is leased; under the lock of the tokens.
    pub(super) fn known(&self, object: ObjectId) {
        if let ObjectId::Inode(packed) = object {
            self.state.lock().allocator.known(BlockNo::unpack(packed));
        }
    }

    /// Nobody has a token any more on an inode that was freed; under the lock of the tokens.
    pub(super) fn forgotten(&self, object: ObjectId) {
        if let ObjectId::Inode(packed) = object {
            self.state.lock().allocator.forgotten(BlockNo::unpack(packed));
        }
    }

    /// A token is wanted elsewhere, and has no users any more.
    pub(super) fn revoke(self: &Arc<Self>, object: ObjectId, keep: Option<Mode>, generation: u64) {
        let mut wait = Duration::ZERO;
        let flush = if let ObjectId::Region(mirror, n) = object {
            let mut state = self.state.lock();
            let written = state.allocator.close((MirrorId(mirror), n));
            let targets: Vec<FlushTarget> = written.into_iter().map(FlushTarget::Block).collect();
            self.begin_flush(&mut state, &targets)
        } else {
            if let Some(upcalls) = self.upcalls.get() {
                wait = upcalls.revoked(object, keep);
            }
            self.begin_flush(&mut self.state.lock(), &[FlushTarget::Object(object)])
        };
        if flush.is_none() && wait.is_zero() {
            return self.give_up(object, keep, generation);
        }
        let (disk, until) = (self.clone(), tokio::time::Instant::now() + wait);
        self.node.spawn(async move {
            let durable = match flush {
                Some(done) => done.await.is_ok(),
                None => true,
            };
            if durable {
                if !wait.is_zero() {
                    tokio::time::sleep_until(until).await;
                }
                disk.give_up(object, keep, generation);
            }
        });
    }

    fn give_up(self: &Arc<Self>, object: ObjectId, keep: Option<Mode>, generation: u64) {
        if let ObjectId::Region(mirror, n) = object {
            let id = (MirrorId(mirror), n);
            let reserved = self.node.step(|t, now, step| {
                let reserved = {
                    let mut state = self.state.lock();
                    if state.generation != generation { Vec::new() } else { state.allocator.gone(id) }
                };
                t.with(now, step, |h, out| h.flushed(generation, object, reserved.clone(), out));
                reserved
            });
            // What became durable between the two is reserved no more.
            let state = self.state.lock();
            let blocks = reserved.into_iter().map(|i| BlockNo::new(id.0, i));
            let unreserve: Vec<BlockNo> = blocks.filter(|b| !state.allocator.is_pending(*b)).collect();
            drop(state);
            self.outcome(Outcome { unreserve, ..Outcome::default() });
        } else {
            self.node.step(|t, now, step| {
                if keep.is_none() {
                    self.state.lock().cache.drop_object(object);
                }
                t.with(now, step, |h, out| h.flushed(generation, object, Vec::new(), out));
            });
        }
    }

    fn begin_flush(&self, state: &mut State, targets: &[FlushTarget]) -> Option<oneshot::Receiver<()>> {
        let flush = state.wb.flush(targets)?;
        let (tx, rx) = oneshot::channel();
        state.flushes.insert(flush, tx);
        self.kick.notify_one();
        Some(rx)
    }

    pub(super) async fn flush(self: &Arc<Self>, targets: &[FlushTarget]) -> Result<(), DiskError> {
        if self.node.is_stopped() {
            return Err(DiskError::Shutdown);
        }
        let mut lost = false;
        let done = {
            let mut state = self.state.lock();
            for t in targets {
                lost |= state.losses.report(t);
            }
            self.begin_flush(&mut state, targets)
        };
        if let Some(done) = done
            && done.await.is_err()
        {
            if self.node.is_stopped() {
                return Err(DiskError::Shutdown);
            }
            // Lost while we waited: this is the one report.
            let mut state = self.state.lock();
            for t in targets {
                state.losses.report(t);
            }
            lost = true;
        }
        if lost { Err(DiskError::Lost) } else { Ok(()) }
    }

    /// All tokens are gone; under the lock of the tokens. Returns what is lost.
    pub(super) fn reset(&self, generation: u64) -> Vec<ObjectId> {
        let mut state = self.state.lock();
        state.generation = generation;
        let (lost, _) = state.wb.reset();
        state.cache.clear();
        state.allocator.reset();
        let waiting = std::mem::take(&mut state.flushes).into_values();
        state.broken.extend(waiting);
        state.leases.clear();
        let objects: BTreeSet<ObjectId> = lost.iter().map(|(_, o)| *o).collect();
        state.losses.add(lost);
        objects.into_iter().collect()
    }

    pub(super) fn tell_reset(&self, lost: &[ObjectId]) {
        if !lost.is_empty() {
            tracing::error!(fs = %self.fs, objects = lost.len(), "cut off from the cluster: what was written behind is lost");
        }
        self.room.notify_waiters();
        if let Some(upcalls) = self.upcalls.get() {
            upcalls.reset();
        }
        self.tell_lost(lost);
        // Only now do those go on who wait for a flush, so that they are not told of it a second time.
        let broken = std::mem::take(&mut self.state.lock().broken);
        drop(broken);
    }

    fn tell_lost(&self, objects: &[ObjectId]) {
        if let Some(upcalls) = self.upcalls.get().filter(|_| !objects.is_empty()) {
            upcalls.lost(objects);
        }
    }

    pub(super) fn stop(&self) {
        let mut state = self.state.lock();
        state.flushes.clear();
        state.broken.clear();
        state.leases.clear();
        state.cache.clear();
        drop(state);
        self.room.notify_waiters();
    }

    fn release(self: &Arc<Self>, generation: u64, tokens: &[Want]) {
        self.node.step(|t, now, step| {
            t.with(now, step, |h, out| {
                for (object, mode) in tokens {
                    h.done(generation, *object, *mode, out);
                }
            });
        });
    }
}

/// Tokens in use by one operation; given back when dropped.
pub struct TokenSet {
    disk: Arc<DiskShared>,
    generation: u64,
    held: Vec<Want>,
}

impl Drop for TokenSet {
    fn drop(&mut self) {
        if !self.held.is_empty() {
            self.disk.release(self.generation, &self.held);
        }
    }
}

/// How a disk does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Bytes not durable yet.
    pub dirty_bytes: u64,
    /// Bytes of clean blocks.
    pub cached_bytes: u64,
    /// Tokens held by this node (of all its file systems).
    pub tokens: u64,
    /// Regions leased.
    pub regions: u64,
    /// Free blocks in them.
    pub regions_free: u64,
    /// Blocks allocated and not durable yet.
    pub allocated: u64,
}

/// The shared logical disk of one file system, seen from this node. Cheap to clone.
#[derive(Clone)]
pub struct PulsarDisk {
    pub(super) shared: Arc<DiskShared>,
}

fn sorted(wants: &[Want]) -> Vec<Want> {
    let mut wants = wants.to_vec();
    wants.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
    wants.dedup_by_key(|w| w.0);
    wants
}

impl PulsarDisk {
    pub(super) fn new(shared: Arc<DiskShared>) -> Self {
        PulsarDisk { shared }
    }

    /// How it does.
    #[must_use]
    pub fn status(&self) -> Status {
        let tokens = self.shared.node.look(|t| t.holder.held_count()) as u64;
        let state = self.shared.state.lock();
        Status {
            dirty_bytes: state.wb.dirty_bytes() as u64,
            cached_bytes: state.cache.bytes() as u64,
            tokens,
            regions: state.allocator.regions().len() as u64,
            regions_free: state.allocator.free(),
            allocated: state.allocator.pending_count() as u64,
        }
    }

    /// Sets the collector's cycle: blocks allocated from now on are born in it.
    pub fn set_cycle(&self, cycle: u32) {
        self.shared.cycle.store(cycle, Ordering::Relaxed);
    }

    /// Panics if an invariant of the disk's cores is broken.
    pub fn check_invariants(&self) {
        let state = self.shared.state.lock();
        state.wb.check_invariants();
        state.allocator.check_invariants();
    }

    fn try_tokens(&self, wants: &[Want]) -> Option<TokenSet> {
        if !self.shared.node.serving() {
            return None;
        }
        let generation = self.shared.node.look(|t| t.holder.try_acquire(wants).then(|| t.holder.generation()))?;
        Some(TokenSet { disk: self.shared.clone(), generation, held: wants.to_vec() })
    }
}

impl Disk for PulsarDisk {
    type Tokens = TokenSet;

    async fn acquire(&self, wants: &[Want]) -> Result<TokenSet, DiskError> {
        let wants = sorted(wants);
        if let Some(tokens) = self.try_tokens(&wants) {
            return Ok(tokens);
        }
        let node = &self.shared.node;
        'again: loop {
            let generation = node.wait_serving().await?;
            let mut tokens = TokenSet { disk: self.shared.clone(), generation, held: Vec::with_capacity(wants.len()) };
            for (object, mode) in &wants {
                if node.wait_token(*object, *mode, generation).await.is_none() {
                    drop(tokens);
                    continue 'again;
                }
                tokens.held.push((*object, *mode));
            }
            if node.serving() {
                return Ok(tokens);
            }
        }
    }

    fn try_acquire(&self, wants: &[Want]) -> Option<TokenSet> {
        self.try_tokens(&sorted(wants))
    }

    fn adopt(&self, object: ObjectId) -> TokenSet {
        let mut outcome = Outcome::default();
        let (generation, adopted) = self.shared.node.step(|t, now, step| {
            let adopted = match object {
                ObjectId::Inode(packed) => {
                    let mut state = self.shared.state.lock();
                    let block = BlockNo::unpack(packed);
                    // Not ours any more if the node was cut off since: then the commit will say so.
                    let ours = state.allocator.is_pending(block);
                    if ours {
                        state.losses.renewed(block);
                        state.allocator.adopted(block, &mut outcome);
                    }
                    ours
                }
                _ => true,
            };
            if adopted {
                t.with(now, step, |h, out| h.adopt(object, out));
            }
            (t.holder.generation(), adopted)
        });
        self.shared.outcome(outcome);
        let held = if adopted { vec![(object, Mode::Exclusive)] } else { Vec::new() };
        TokenSet { disk: self.shared.clone(), generation, held }
    }

    async fn read(&self, object: ObjectId, block: BlockNo) -> Result<Block, DiskError> {
        self.shared.read(object, block).await
    }

    fn try_read(&self, object: ObjectId, block: BlockNo) -> Option<Block> {
        self.shared.cached(object, block)
    }

    async fn read_many(&self, object: ObjectId, blocks: &[BlockNo]) -> Result<Vec<Block>, DiskError> {
        self.shared.read_many(object, blocks).await
    }

    fn read_ahead(&self, object: ObjectId, blocks: &[BlockNo]) {
        self.shared.read_ahead(object, blocks);
    }

    async fn alloc(&self, near: Option<BlockNo>, count: u32) -> Result<Extent, DiskError> {
        self.shared.alloc(near, count).await
    }

    fn try_alloc(&self, near: Option<BlockNo>, count: u32) -> Option<Extent> {
        self.shared.try_alloc(near, count)
    }

    fn unalloc(&self, extent: Extent) {
        let mut outcome = Outcome::default();
        self.shared.state.lock().allocator.unalloc(extent, &mut outcome);
        self.shared.outcome(outcome);
    }

    async fn admit(&self) -> Result<(), DiskError> {
        loop {
            if self.shared.node.is_stopped() {
                return Err(DiskError::Shutdown);
            }
            let room = self.shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            {
                let mut state = self.shared.state.lock();
                let max = self.shared.node.options.dirty_bytes;
                if state.wb.dirty_bytes() < max {
                    return Ok(());
                }
                state.wb.want_old(cluster::Instant(0), 0, max / 8);
            }
            self.shared.kick.notify_one();
            room.await;
        }
    }

    fn commit(&self, operation: Operation) -> Result<(), DiskError> {
        let shared = &self.shared;
        if shared.node.is_stopped() {
            return Err(DiskError::Shutdown);
        }
        let (generation, held) = shared.node.look(|t| {
            let mut last = None;
            let held = operation.writes.iter().all(|w| {
                let same = last == Some(w.object);
                last = Some(w.object);
                same || t.holder.writing(w.object)
            });
            (t.holder.generation(), held)
        });
        let now = shared.node.cluster.now();
        let mut outcome = Outcome::default();
        let (settled, kick) = {
            let mut state = shared.state.lock();
            let state = &mut *state;
            // Without its tokens the operation is one from before the node was cut off.
            if !held || state.generation != generation {
                return Err(DiskError::Lost);
            }
            for w in &operation.writes {
                state.cache.written(w.block);
                if state.wb.newest(w.block).is_none() && state.allocator.is_pending(w.block) {
                    state.losses.renewed(w.block);
                }
            }
            let bytes = operation.writes.len() * BLOCK_SIZE;
            let blocks: Vec<BlockNo> = operation.writes.iter().map(|w| w.block).collect();
            let allocator = &state.allocator;
            let settled = state.wb.commit(now, operation, |b| allocator.is_pending(b));
            for b in blocks {
                state.allocator.wrote(b, &mut outcome);
            }
            // A little at a time, so that the lock is held shortly; more than comes in, so that it suffices.
            let max = shared.node.options.dirty_bytes;
            let unwanted = state.wb.unwanted_bytes();
            let kick = unwanted > max / 4;
            if kick {
                state.wb.want_old(cluster::Instant(0), 0, (max / 8).max(unwanted.saturating_sub(4 * bytes)));
            }
            let wakes: Vec<_> = settled.flushed.iter().filter_map(|f| state.flushes.remove(f)).collect();
            for wake in wakes {
                let _ = wake.send(());
            }
            (settled, kick)
        };
        if kick {
            shared.kick.notify_one();
        }
        shared.outcome(outcome);
        shared.cancelled(settled);
        Ok(())
    }

    async fn flush(&self, targets: &[FlushTarget]) -> Result<(), DiskError> {
        self.shared.flush(targets).await
    }

    fn take_loss(&self, object: ObjectId) -> bool {
        self.shared.state.lock().losses.report(&FlushTarget::Object(object))
    }

    fn set_open(&self, object: ObjectId, open: bool) {
        self.shared.node.step(|t, now, step| t.with(now, step, |h, out| h.set_open(object, open, out)));
    }

    fn open_elsewhere(&self, object: ObjectId) -> Option<bool> {
        self.shared.node.look(|t| t.holder.open_elsewhere(object))
    }

    async fn usage(&self) -> Result<Usage, DiskError> {
        self.shared.usage().await
    }

    async fn tags(&self, first: BlockNo, count: u32) -> Result<Vec<Tag>, DiskError> {
        let tags = self.shared.node.mirrors.tags(first, count).await.map_err(super::fetch::disk_error)?;
        Ok(tags.into_iter().map(|(tag, _)| tag).collect())
    }

    fn mirrors(&self) -> Vec<(MirrorId, u32)> {
        self.shared.mirrors()
    }

    fn cycle(&self) -> u32 {
        self.shared.cycle.load(Ordering::Relaxed)
    }

    fn set_upcalls(&self, upcalls: Arc<dyn Upcalls>) {
        if self.shared.upcalls.set(upcalls).is_err() {
            tracing::warn!(fs = %self.shared.fs, "upcalls set twice; the first ones stay");
        }
    }
}

impl DiskShared {
    /// Blocks that were freed before they were ever written.
    fn cancelled(self: &Arc<Self>, settled: Settled) {
        self.came_back(&settled.freed);
    }

    /// A block's newest contents, if no fetch is needed.
    pub(super) fn cached(&self, object: ObjectId, block: BlockNo) -> Option<Block> {
        if !self.node.serving() {
            return None;
        }
        self.state.lock().local(object, block)
    }
}

impl State {
    /// A block's newest contents, dirty or clean.
    pub(super) fn local(&mut self, object: ObjectId, block: BlockNo) -> Option<Block> {
        match self.wb.newest(block) {
            Some(Content::Data(data)) => Some(data.clone()),
            Some(Content::Free) => Some(super::fetch::zeros()),
            None => self.cache.get(object, block),
        }
    }
}
