//! `Mirrors` for this node: runs the writing core, and reads.
//!
//! Invariants:
//! - What the core puts out is performed in order, by one caller at a time, outside the core's lock.
//! - What was read is given out only while the node lease holds and the node is a member.
//!
//! Excludes: what the servers do.

use crate::api::{BlockRead, Kind, MirrorError, Mirrors, RegionFree, Space, Tag, Version, WriteGroup};
use crate::client::{ClientCore, FIRST_COUNTER, Facts, Output, Target};
use crate::events::{MirrorEvent, show};
use crate::format::{Checksum, block_checksum, digest};
use crate::message::{Found, FoundTag, READ_BLOCKS_MAX, Reply, Request, Slot, TAGS_MAX, WriteHead, WriteMode, Writer};
use crate::replica::counter;
use crate::shell::rpc::Rpc;
use crate::shell::server::Server;
use crate::shell::tasks::{Tasks, parallel};
use bytes::Bytes;
use cluster::config::MemberState;
use cluster::{BLOCK_SIZE, BlockNo, BoxFuture, Cluster, DiskId, Epoch, Layer, MirrorId, NodeId, View, watch};
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{Notify, broadcast, oneshot};

/// How long to wait before something refused or lost is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// Pieces of one read that are fetched at a time.
const READ_PARALLEL: usize = 8;

#[derive(Default)]
struct Outbox {
    queue: VecDeque<Output>,
    draining: bool,
}

/// Who waits for a group.
#[derive(Default)]
struct Tickets {
    last: u64,
    waiting: BTreeMap<u64, oneshot::Sender<Result<Version, MirrorError>>>,
}

/// Blocks of a piece of a read, by their position in it.
type Piece = Result<Vec<(usize, BlockRead)>, MirrorError>;

/// A copy that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub disk: DiskId,
    pub node: NodeId,
    pub state: MemberState,
}

pub(crate) struct Client {
    weak: Weak<Client>,
    pub me: NodeId,
    pub cluster: Arc<dyn Cluster>,
    pub server: Arc<Server>,
    pub rpc: Arc<Rpc>,
    core: Mutex<ClientCore>,
    outbox: Mutex<Outbox>,
    tickets: Mutex<Tickets>,
    wake: Notify,
    closed: watch::Sender<bool>,
    pub events: broadcast::Sender<MirrorEvent>,
    pub repaired: AtomicU64,
    pub corrupt: AtomicU64,
}

impl Client {
    pub(crate) fn new(
        cluster: Arc<dyn Cluster>,
        server: Arc<Server>,
        rpc: Arc<Rpc>,
        events: broadcast::Sender<MirrorEvent>,
        tasks: &Tasks,
    ) -> Arc<Client> {
        let client = Arc::new_cyclic(|weak| Client {
            weak: weak.clone(),
            me: cluster.local(),
            cluster,
            server,
            rpc,
            core: Mutex::default(),
            outbox: Mutex::default(),
            tickets: Mutex::default(),
            wake: Notify::new(),
            closed: watch::Sender::new(false),
            events,
            repaired: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
        });
        client.server.clock.fetch_max(FIRST_COUNTER, Ordering::AcqRel);
        let ticker = Arc::downgrade(&client);
        tasks.spawn(async move {
            loop {
                let Some(client) = ticker.upgrade() else { return };
                if client.core.lock().needs_tick() {
                    drop(client);
                    tokio::time::sleep(RETRY).await;
                    let Some(client) = ticker.upgrade() else { return };
                    client.tick();
                } else {
                    client.wake.notified().await;
                }
            }
        });
        client
    }

    /// The cluster's view has changed.
    pub(crate) fn view_changed(&self, view: &View) {
        let facts = facts(view);
        self.step(|core, out| core.view(facts, out));
        let busy = self.core.lock().busy();
        for mirror in busy {
            self.pump(mirror);
        }
        self.wake.notify_one();
    }

    fn tick(&self) {
        let lease = self.cluster.lease_valid();
        self.step(|core, out| core.tick(lease, out));
        let busy = self.core.lock().busy();
        for mirror in busy {
            self.pump(mirror);
        }
    }

    fn pump(&self, mirror: MirrorId) {
        let lease = self.cluster.lease_valid();
        let clock = &self.server.clock;
        self.step(|core, out| core.pump(mirror, lease, &mut || clock.fetch_add(1, Ordering::AcqRel) + 1, out));
    }

    /// Steps the core and performs what it puts out. Outputs keep the order of the steps.
    fn step(&self, f: impl FnOnce(&mut ClientCore, &mut Vec<Output>)) {
        {
            let mut core = self.core.lock();
            let mut out = Vec::new();
            f(&mut core, &mut out);
            if cfg!(debug_assertions) {
                core.check_invariants();
            }
            if out.is_empty() {
                return;
            }
            let mut outbox = self.outbox.lock();
            outbox.queue.extend(out);
            if outbox.draining {
                // Whoever drains goes on with these.
                return;
            }
            outbox.draining = true;
        }
        loop {
            let next = {
                let mut outbox = self.outbox.lock();
                let next = outbox.queue.pop_front();
                outbox.draining = next.is_some();
                next
            };
            match next {
                Some(output) => self.perform(output),
                None => return,
            }
        }
    }

    fn perform(&self, output: Output) {
        match output {
            Output::Send { target, epoch, head, data } => self.send(target, epoch, head, data),
            Output::Completed { target, epoch, mirror, writer, upto } => {
                if target.node == self.me {
                    self.server.completed(epoch, target.disk, mirror, writer, upto);
                } else {
                    self.rpc.tell(target.node, epoch, target.disk, Request::Completed { mirror, writer, upto });
                }
            }
            Output::Done(ticket, result) => {
                let waiting = self.tickets.lock().waiting.remove(&ticket);
                if let Some(waiting) = waiting {
                    let _ = waiting.send(result);
                }
            }
        }
    }

    fn send(&self, target: Target, epoch: Epoch, head: WriteHead, data: Vec<Bytes>) {
        let (mirror, wseq, disk) = (head.mirror, head.wseq, target.disk);
        let weak = self.weak.clone();
        let answered = move |reply: Option<Reply>| {
            let Some(client) = weak.upgrade() else { return };
            match reply {
                Some(Reply::Written) => {
                    client.step(|core, out| core.written(mirror, wseq, disk, epoch, out));
                    client.pump(mirror);
                }
                other => {
                    if other == Some(Reply::Refused) {
                        tracing::error!("{disk} refused a write to {mirror} as malformed");
                    }
                    client.core.lock().lost(mirror, wseq, disk, epoch);
                }
            }
            client.wake.notify_one();
        };
        if target.node == self.me {
            self.server.write(epoch, disk, head, data, Box::new(move |reply| answered(Some(reply))));
        } else {
            let on_reply = Box::new(move |reply: Option<(Reply, Vec<Bytes>)>| answered(reply.map(|(r, _)| r)));
            self.rpc.ask(target.node, epoch, disk, Request::Write(head), data, on_reply);
        }
    }

    // --- reading ---

    /// Waits until this node may read: a member, its lease valid, the mirrors recovered.
    pub(crate) async fn ready(&self) -> Result<Arc<View>, MirrorError> {
        let mut views = self.cluster.view();
        let mut closed = self.closed.subscribe();
        loop {
            if *closed.borrow() {
                return Err(MirrorError::Shutdown);
            }
            let view = views.borrow_and_update().clone();
            let waits = !view.member || view.recovered < Layer::Mirror;
            if !waits && self.cluster.lease_valid() {
                return Ok(view);
            }
            tokio::select! {
                biased;
                _ = closed.wait_for(|c| *c) => {}
                changed = views.changed(), if waits => if changed.is_err() { return Err(MirrorError::Shutdown) },
                () = tokio::time::sleep(RETRY), if !waits => {}
            }
        }
    }

    /// Waits for a newer view than this epoch's, or a moment.
    async fn pause(&self, epoch: Epoch) {
        let mut views = self.cluster.view();
        if views.borrow_and_update().epoch() != epoch {
            return;
        }
        tokio::select! {
            biased;
            _ = views.changed() => {}
            () = tokio::time::sleep(RETRY) => {}
        }
    }

    /// Asks a disk's server, here or elsewhere. `None` if the session, or the epoch, ended.
    pub(crate) async fn ask(&self, epoch: Epoch, node: NodeId, disk: DiskId, request: Request) -> Option<(Reply, Vec<Bytes>)> {
        if node == self.me {
            return Some(self.server.serve(epoch, disk, request).await);
        }
        let mut views = self.cluster.view();
        let newer = views.wait_for(|v| v.epoch() > epoch);
        tokio::select! {
            biased;
            reply = self.rpc.call(node, epoch, disk, request) => reply,
            _ = newer => None,
        }
    }

    /// Copies of a mirror in sync that can be reached, the best one first.
    pub(crate) fn sources(&self, view: &View, mirror: MirrorId, salt: u32) -> Vec<Source> {
        let mut sources = sources(view, mirror);
        sources.retain(|s| s.state == MemberState::InSync);
        if !sources.is_empty() {
            let by = salt as usize % sources.len();
            sources.rotate_left(by);
        }
        sources.sort_by_key(|s| s.node != self.me);
        sources
    }

    fn check_block(view: &View, block: BlockNo) -> Result<(), MirrorError> {
        match view.config.mirrors.get(&block.mirror) {
            Some(m) if block.index < m.blocks => Ok(()),
            _ => Err(MirrorError::NoSuchBlock { block }),
        }
    }

    async fn read_blocks(&self, blocks: Vec<BlockNo>) -> Result<Vec<BlockRead>, MirrorError> {
        let mut out: Vec<Option<BlockRead>> = vec![None; blocks.len()];
        loop {
            let view = self.ready().await?;
            let mut pieces: BTreeMap<(MirrorId, u32), Vec<usize>> = BTreeMap::new();
            for (i, block) in blocks.iter().enumerate().filter(|(i, _)| out[*i].is_none()) {
                Self::check_block(&view, *block)?;
                // Neighbours go to one copy, different stretches to different ones.
                pieces.entry((block.mirror, block.index / 1024)).or_default().push(i);
            }
            let mut reads: Vec<BoxFuture<'_, Piece>> = Vec::new();
            for ((mirror, stretch), wanted) in &pieces {
                for wanted in wanted.chunks(READ_BLOCKS_MAX) {
                    let piece: Vec<(usize, u32)> = wanted.iter().map(|i| (*i, blocks[*i].index)).collect();
                    reads.push(Box::pin(self.read_piece(Arc::clone(&view), *mirror, *stretch, piece)));
                }
            }
            for piece in parallel(READ_PARALLEL, reads).await {
                for (i, read) in piece? {
                    out[i] = Some(read);
                }
            }
            let now = self.cluster.view().borrow().clone();
            let held = now.member && self.cluster.lease_valid();
            if !held {
                // What was read may be out of date by now.
                out.fill(None);
            } else if out.iter().all(Option::is_some) {
                break;
            }
            if out.iter().any(Option::is_none) {
                self.pause(view.epoch()).await;
            }
        }
        Ok(out.into_iter().flatten().collect())
    }

    /// Reads blocks of one mirror from the best copy, and what is damaged there from the others. Leaves out what could not
    /// be read for now.
    async fn read_piece(&self, view: Arc<View>, mirror: MirrorId, stretch: u32, mut wanted: Vec<(usize, u32)>) -> Piece {
        let mut good = Vec::with_capacity(wanted.len());
        // Bad copies found on the way: block index -> (disk, node, version there).
        let mut bad: BTreeMap<u32, Vec<(Source, Version)>> = BTreeMap::new();
        let mut all_answered = true;
        for source in self.sources(&view, mirror, stretch) {
            if wanted.is_empty() {
                break;
            }
            let indices = wanted.iter().map(|(_, index)| *index).collect();
            let request = Request::Read { mirror, blocks: indices, uncertain: false };
            let Some((Reply::Blocks(found), parts)) = self.ask(view.epoch(), source.node, source.disk, request).await else {
                all_answered = false;
                continue;
            };
            if found.len() != wanted.len() {
                all_answered = false;
                continue;
            }
            let mut parts = parts.into_iter();
            let mut rest = Vec::new();
            for ((i, index), found) in std::mem::take(&mut wanted).into_iter().zip(found) {
                match check_found(mirror, index, found, &mut parts) {
                    Ok((read, checksum)) => {
                        if let Some(copies) = bad.remove(&index) {
                            self.repair(view.epoch(), mirror, index, &read, checksum, copies).await;
                        }
                        self.server.clock.fetch_max(counter(read.version), Ordering::AcqRel);
                        good.push((i, read));
                    }
                    Err(version) => {
                        bad.entry(index).or_default().push((source, version));
                        rest.push((i, index));
                    }
                }
            }
            wanted = rest;
        }
        if all_answered
            && let Some((_, index)) = wanted.first()
            && bad.contains_key(index)
        {
            let block = BlockNo::new(mirror, *index);
            self.corrupt.fetch_add(1, Ordering::Relaxed);
            tracing::error!("{}", MirrorError::Corrupt { block });
            let _ = self.events.send(MirrorEvent::Corrupt { block });
            return Err(MirrorError::Corrupt { block });
        }
        Ok(good)
    }

    /// Writes a good copy of a block over bad ones; ends when a newer epoch begins. One that was never written goes only where
    /// the tag itself is damaged: elsewhere the tag says that something was.
    pub(crate) async fn repair(
        &self,
        epoch: Epoch,
        mirror: MirrorId,
        index: u32,
        read: &BlockRead,
        checksum: Option<(Checksum, bool)>,
        copies: Vec<(Source, Version)>,
    ) -> u64 {
        let (checksum, has_data) = checksum.unwrap_or_default();
        let slot = Slot { index, tag: read.tag, version: read.version, has_data, checksum };
        let mut repaired = 0;
        let mut views = self.cluster.view();
        for (source, bad) in copies {
            if read.version == Version(0) && bad != Version(0) {
                continue;
            }
            let head = WriteHead {
                mirror,
                mode: WriteMode::Repair { bad },
                writer: Writer::default(),
                wseq: 0,
                completed_upto: 0,
                clock: 0,
                fresh_data: false,
                slots: vec![slot],
            };
            let data = if has_data { vec![read.data.clone()] } else { Vec::new() };
            let (tx, rx) = oneshot::channel();
            if source.node == self.me {
                let respond = Box::new(move |reply| {
                    let _ = tx.send(reply);
                });
                self.server.write(epoch, source.disk, head, data, respond);
            } else {
                let on_reply = Box::new(move |reply: Option<(Reply, Vec<Bytes>)>| {
                    if let Some((reply, _)) = reply {
                        let _ = tx.send(reply);
                    }
                });
                self.rpc.ask(source.node, epoch, source.disk, Request::Write(head), data, on_reply);
            }
            let reply = tokio::select! {
                biased;
                reply = rx => reply,
                _ = views.wait_for(|v| v.epoch() > epoch) => return repaired,
            };
            if reply == Ok(Reply::Written) {
                repaired += 1;
                self.repaired.fetch_add(1, Ordering::Relaxed);
                let block = BlockNo::new(mirror, index);
                let what = format!("version {} was damaged, replaced by {}", show(bad), show(read.version));
                tracing::warn!("repaired block {block} on {}: {what}", source.disk);
                let _ = self.events.send(MirrorEvent::Repaired { block, disk: source.disk, what });
            }
        }
        repaired
    }

    /// Asks copies of a mirror until one gives an answer that `accept` takes.
    async fn ask_any<T>(
        &self,
        mirror: MirrorId,
        make: impl Fn() -> Request + Send + Sync,
        accept: impl Fn(Reply) -> Option<T> + Send + Sync,
    ) -> Result<T, MirrorError> {
        loop {
            let view = self.ready().await?;
            if !view.config.mirrors.contains_key(&mirror) {
                return Err(MirrorError::NoSuchBlock { block: BlockNo::new(mirror, 0) });
            }
            for source in self.sources(&view, mirror, 0) {
                let reply = self.ask(view.epoch(), source.node, source.disk, make()).await;
                if let Some(answer) = reply.and_then(|(r, _)| accept(r))
                    && self.cluster.lease_valid()
                {
                    return Ok(answer);
                }
            }
            self.pause(view.epoch()).await;
        }
    }

    async fn tags_of(&self, first: BlockNo, count: u32) -> Result<Vec<(Tag, Version)>, MirrorError> {
        let (mirror, count) = (first.mirror, count.min(TAGS_MAX));
        let view = self.ready().await?;
        let end = first.index.checked_add(count);
        if view.config.mirrors.get(&mirror).is_none_or(|m| end.is_none_or(|end| end > m.blocks)) {
            return Err(MirrorError::NoSuchBlock { block: first });
        }
        let request = || Request::Tags { mirror, first: first.index, count };
        let found: Vec<FoundTag> = self
            .ask_any(mirror, request, |reply| match reply {
                Reply::Tags(tags) if tags.len() == count as usize => Some(tags),
                _ => None,
            })
            .await?;
        // Who goes by these tags (to free a block) writes with greater versions.
        let newest = found.iter().map(|f| counter(f.version)).max().unwrap_or_default();
        self.server.clock.fetch_max(newest, Ordering::AcqRel);
        let damaged: Vec<BlockNo> = found
            .iter()
            .zip(first.index..)
            .filter(|(f, _)| f.tag.is_none())
            .map(|(_, index)| BlockNo::new(mirror, index))
            .collect();
        // Reading a block repairs its tag.
        let mut repaired = if damaged.is_empty() { Vec::new() } else { self.read_blocks(damaged).await? }.into_iter();
        Ok(found
            .into_iter()
            .map(|f| match f.tag {
                Some(tag) => (tag, f.version),
                None => repaired.next().map_or((Tag::default(), Version(0)), |r| (r.tag, r.version)),
            })
            .collect())
    }

    /// Stops: everything that waits ends with `Shutdown`.
    pub(crate) fn close(&self) {
        self.closed.send_replace(true);
        self.step(|core, out| core.close(out));
    }

    #[cfg(test)]
    pub(crate) fn show(&self) -> String {
        self.core.lock().show()
    }

    /// Groups submitted and not complete.
    pub(crate) fn waiting(&self) -> usize {
        self.core.lock().waiting()
    }
}

/// Checks a block that was read; gives its contents and (unless it was never written) its checksum and whether it has
/// contents. If it is damaged, its version.
#[allow(clippy::type_complexity, reason = "one private use")]
pub(crate) fn check_found(
    mirror: MirrorId,
    index: u32,
    found: Found,
    parts: &mut impl Iterator<Item = Bytes>,
) -> Result<(BlockRead, Option<(Checksum, bool)>), Version> {
    match found {
        Found::Damaged { version } => Err(version),
        Found::Block { tag, version, has_data, checksum, .. } => {
            let data = if has_data { Some(parts.next().ok_or(version)?) } else { None };
            if version == Version(0) {
                return Ok((BlockRead { data: zeros(), tag: Tag::default(), version }, None));
            }
            if block_checksum(mirror, index, version, &tag, data.as_deref()) != checksum {
                return Err(version);
            }
            let data = match data {
                Some(data) if tag.kind != Kind::Free => data,
                _ => zeros(),
            };
            Ok((BlockRead { data, tag, version }, Some((checksum, has_data))))
        }
    }
}

fn zeros() -> Bytes {
    static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
    Bytes::from_static(&ZEROS)
}

/// Copies of a mirror on disks that can be reached.
pub(crate) fn sources(view: &View, mirror: MirrorId) -> Vec<Source> {
    let config = &view.config;
    let Some(info) = config.mirrors.get(&mirror) else { return Vec::new() };
    info.members
        .iter()
        .filter_map(|m| {
            let disk = config.disks.get(&m.disk).filter(|d| !d.faulted)?;
            config.nodes.get(&disk.node).filter(|n| n.up)?;
            Some(Source { disk: m.disk, node: disk.node, state: m.state })
        })
        .collect()
}

fn facts(view: &View) -> Facts {
    let config = &view.config;
    let writer = config.nodes.get(&view.me).filter(|_| view.member).map(|n| Writer { node: view.me, incarnation: n.incarnation });
    let mirrors = config
        .mirrors
        .iter()
        .map(|(id, info)| {
            let reachable = sources(view, *id);
            let in_sync = info.members.iter().filter(|m| m.state == MemberState::InSync).count();
            let usable = reachable.iter().filter(|s| s.state == MemberState::InSync).count();
            // All copies in sync must take part; a mirror whose last one is away waits.
            let targets = if in_sync == 0 || usable < in_sync {
                Vec::new()
            } else {
                let takes = |s: &&Source| !matches!(s.state, MemberState::Stale { .. });
                reachable.iter().filter(takes).map(|s| Target { disk: s.disk, node: s.node }).collect()
            };
            (*id, targets)
        })
        .collect();
    Facts { epoch: view.epoch(), writer, ready: view.recovered >= Layer::Mirror, mirrors }
}

impl Mirrors for Client {
    fn submit(&self, mirror: MirrorId, group: WriteGroup) -> BoxFuture<'static, Result<Version, MirrorError>> {
        let bad = {
            let view = self.cluster.view().borrow().clone();
            let mut bad = None;
            for write in &group.writes {
                let right = write.block.mirror == mirror && write.data.as_ref().is_none_or(|d| d.len() == BLOCK_SIZE);
                assert!(right, "a group's writes are whole blocks of one mirror");
                if let Err(e) = Self::check_block(&view, write.block) {
                    bad = Some(e);
                }
            }
            assert!(group.writes.len() <= WriteGroup::BLOCKS_MAX, "a group is bounded");
            bad
        };
        if let Some(error) = bad {
            return Box::pin(std::future::ready(Err(error)));
        }
        if *self.closed.borrow() {
            return Box::pin(std::future::ready(Err(MirrorError::Shutdown)));
        }
        // Outside the lock: the one long computation of a write.
        let digests = group.writes.iter().map(|w| w.data.as_ref().map(|d| digest(d))).collect();
        let (tx, rx) = oneshot::channel();
        let ticket = {
            let mut tickets = self.tickets.lock();
            tickets.last += 1;
            let ticket = tickets.last;
            tickets.waiting.insert(ticket, tx);
            ticket
        };
        let lease = self.cluster.lease_valid();
        let clock = &self.server.clock;
        self.step(|core, out| {
            core.submit(mirror, group, digests, ticket, out);
            core.pump(mirror, lease, &mut || clock.fetch_add(1, Ordering::AcqRel) + 1, out);
        });
        if !lease {
            self.wake.notify_one();
        }
        Box::pin(async move { rx.await.unwrap_or(Err(MirrorError::Shutdown)) })
    }

    fn read(&self, blocks: Vec<BlockNo>) -> BoxFuture<'static, Result<Vec<BlockRead>, MirrorError>> {
        let Some(client) = self.weak.upgrade() else { return Box::pin(std::future::ready(Err(MirrorError::Shutdown))) };
        Box::pin(async move { client.read_blocks(blocks).await })
    }

    fn tags(&self, first: BlockNo, count: u32) -> BoxFuture<'static, Result<Vec<(Tag, Version)>, MirrorError>> {
        let Some(client) = self.weak.upgrade() else { return Box::pin(std::future::ready(Err(MirrorError::Shutdown))) };
        Box::pin(async move { client.tags_of(first, count).await })
    }

    fn region_free(&self, mirror: MirrorId, region: u32) -> BoxFuture<'static, Result<RegionFree, MirrorError>> {
        let Some(client) = self.weak.upgrade() else { return Box::pin(std::future::ready(Err(MirrorError::Shutdown))) };
        Box::pin(async move {
            let view = client.ready().await?;
            let blocks = view.config.mirrors.get(&mirror).map_or(0, |m| m.blocks);
            if region >= blocks.div_ceil(crate::api::REGION_BLOCKS) {
                let block = BlockNo::new(mirror, region.saturating_mul(crate::api::REGION_BLOCKS));
                return Err(MirrorError::NoSuchBlock { block });
            }
            let accept = |reply| match reply {
                Reply::Free { words, clock } => Some((RegionFree { words }, clock)),
                _ => None,
            };
            let (free, clock) = client.ask_any(mirror, || Request::RegionFree { mirror, region }, accept).await?;
            client.server.clock.fetch_max(clock, Ordering::AcqRel);
            Ok(free)
        })
    }

    fn space(&self, mirror: MirrorId) -> BoxFuture<'static, Result<Space, MirrorError>> {
        let Some(client) = self.weak.upgrade() else { return Box::pin(std::future::ready(Err(MirrorError::Shutdown))) };
        Box::pin(async move {
            let accept = |reply| match reply {
                Reply::Space(space) => Some(space),
                _ => None,
            };
            client.ask_any(mirror, || Request::Space { mirror }, accept).await
        })
    }

    fn witness(&self, seen: u64) -> u64 {
        self.server.clock.fetch_max(seen, Ordering::AcqRel).max(seen)
    }

    fn clock(&self) -> u64 {
        self.server.clock.load(Ordering::Acquire)
    }
}
