//! The server of this node's disks: fences by epoch, checks requests, runs them.
//!
//! Invariants:
//! - A request of an older epoch than the one adopted here is refused; adoption and the acceptance of writes exclude each
//!   other, so after adoption no write of an older epoch is accepted.
//! - Writes are queued in the order in which they came in.
//! - Nothing calls out while the state is locked.

use crate::api::{Space, Version, WriteGroup};
use crate::events::MirrorEvent;
use crate::log::RecordKind;
use crate::message::{Change, Found, FoundTag, READ_BLOCKS_MAX, Reply, Request, TAGS_MAX, UNCERTAIN_BYTES, WriteHead, Writer};
use crate::replica::{Incoming, counter};
use crate::shell::disk::{Disk, Faulted, Got, Outcome};
use bytes::Bytes;
use cluster::config::{Config, MemberState};
use cluster::{Cluster, Command, DiskId, Epoch, Incarnation, Layer, MirrorId, View};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{Semaphore, broadcast};

/// Questions worked on at a time; more wait.
const QUESTIONS_MAX: usize = 128;

/// Called with the answer to a write.
pub(crate) type Respond = Box<dyn FnOnce(Reply) + Send>;

/// When a copy began to be synced.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Syncing {
    incarnation: Incarnation,
    since: Epoch,
    from: Epoch,
}

struct State {
    view: Arc<View>,
    disks: BTreeMap<DiskId, Arc<Disk>>,
    syncing: BTreeMap<(MirrorId, DiskId), Syncing>,
}

pub(crate) struct Server {
    cluster: Arc<dyn Cluster>,
    state: Mutex<State>,
    pub clock: Arc<AtomicU64>,
    pub events: broadcast::Sender<MirrorEvent>,
    questions: Semaphore,
    /// Grows with foreground reads and writes; resync gives way while it does.
    pub activity: AtomicU64,
}

/// A copy on a disk here, as the adopted epoch has it.
#[derive(Clone)]
pub(crate) struct Copy {
    pub disk: Arc<Disk>,
    pub base: u32,
    pub blocks: u32,
    pub state: MemberState,
    pub syncing_from: Option<Epoch>,
}

/// Whether a writer is alive in a configuration.
pub(crate) fn is_alive(config: &Config, writer: Writer) -> bool {
    config.nodes.get(&writer.node).is_some_and(|n| n.up && n.incarnation == writer.incarnation)
}

impl State {
    fn copy(&self, mirror: MirrorId, disk: DiskId) -> Option<Copy> {
        let info = self.view.config.mirrors.get(&mirror)?;
        let member = info.members.iter().find(|m| m.disk == disk)?;
        let syncing_from = self.syncing.get(&(mirror, disk)).map(|s| s.from);
        let disk = self.disks.get(&disk)?;
        let end = member.base.checked_add(info.blocks)?;
        if end > disk.with(|c| c.geometry.data_blocks) {
            return None;
        }
        Some(Copy { disk: Arc::clone(disk), base: member.base, blocks: info.blocks, state: member.state, syncing_from })
    }
}

impl Server {
    pub(crate) fn new(cluster: Arc<dyn Cluster>, clock: Arc<AtomicU64>, events: broadcast::Sender<MirrorEvent>) -> Self {
        let view = cluster.view().borrow().clone();
        // Nothing is adopted before `adopt`, so that the first view is treated as any other.
        let none = View { me: view.me, config: Arc::new(Config::default()), recovered: Layer::None, member: false };
        let state = State { view: Arc::new(none), disks: BTreeMap::new(), syncing: BTreeMap::new() };
        Server {
            cluster,
            state: Mutex::new(state),
            clock,
            events,
            questions: Semaphore::new(QUESTIONS_MAX),
            activity: AtomicU64::new(0),
        }
    }

    /// Takes in an opened disk.
    pub(crate) fn add_disk(&self, id: DiskId, disk: Arc<Disk>) {
        self.clock.fetch_max(disk.with(|c| c.clock()), Ordering::AcqRel);
        let mut state = self.state.lock();
        state.disks.insert(id, Arc::clone(&disk));
        // Its copies are treated as at the start of an epoch.
        let view = Arc::clone(&state.view);
        write_notes(state.note_syncing(&view, Some(id)));
    }

    /// The disks here.
    pub(crate) fn disks(&self) -> Vec<(DiskId, Arc<Disk>)> {
        self.state.lock().disks.iter().map(|(id, d)| (*id, Arc::clone(d))).collect()
    }

    /// The adopted view.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.state.lock().view)
    }

    /// Copies on disks here that take writes.
    pub(crate) fn copies(&self) -> Vec<(MirrorId, DiskId, Copy)> {
        let state = self.state.lock();
        let places: Vec<_> = state
            .view
            .config
            .mirrors
            .iter()
            .flat_map(|(id, m)| m.members.iter().map(move |member| (*id, member.disk)))
            .filter(|(_, disk)| state.disks.contains_key(disk))
            .collect();
        places.into_iter().filter_map(|(m, d)| Some((m, d, state.copy(m, d)?))).collect()
    }

    /// Adopts the cluster's newest view, if it is newer than the adopted one.
    pub(crate) fn adopt(&self) {
        let new = self.cluster.view().borrow().clone();
        let purge: Vec<Arc<Disk>> = {
            let mut state = self.state.lock();
            let old = Arc::clone(&state.view);
            if new.epoch() < old.epoch() || *new == *old {
                return;
            }
            let new_epoch = new.epoch() > old.epoch();
            state.view = Arc::clone(&new);
            let mut notes = if new_epoch { state.note_syncing(&new, None) } else { Vec::new() };
            if new.recovered >= Layer::Mirror && (new_epoch || old.recovered < Layer::Mirror) {
                notes.extend(state.note_certain(&new));
            }
            // Before any write of the new epoch, which could be accepted as soon as the lock is released.
            write_notes(notes);
            if new_epoch { state.disks.values().cloned().collect() } else { Vec::new() }
        };
        for disk in purge {
            disk.purge(new.epoch());
        }
    }

    // --- writes ---

    /// Queues a write. `respond` is called once, perhaps from within this call.
    pub(crate) fn write(&self, epoch: Epoch, disk: DiskId, head: WriteHead, parts: Vec<Bytes>, respond: Respond) {
        self.adopt();
        self.activity.fetch_add(1, Ordering::Relaxed);
        let refused = {
            let state = self.state.lock();
            match self.incoming(&state, epoch, disk, head, parts) {
                Ok((disk, incoming)) => {
                    let done = Box::new(move |outcome| {
                        respond(match outcome {
                            Outcome::Written => Reply::Written,
                            Outcome::Stale(epoch) => Reply::Stale { epoch },
                            Outcome::Faulted => Reply::Faulted,
                        });
                    });
                    match disk.write(incoming, done) {
                        Ok(()) => return,
                        Err(done) => {
                            drop(state);
                            done(Outcome::Faulted);
                            return;
                        }
                    }
                }
                Err(reply) => reply,
            }
        };
        respond(refused);
    }

    fn incoming(
        &self,
        state: &State,
        epoch: Epoch,
        disk: DiskId,
        head: WriteHead,
        parts: Vec<Bytes>,
    ) -> Result<(Arc<Disk>, Incoming), Reply> {
        if epoch != state.view.epoch() {
            return Err(Reply::Stale { epoch: state.view.epoch() });
        }
        if !state.disks.contains_key(&disk) {
            return Err(Reply::Faulted);
        }
        let copy = state.copy(head.mirror, disk).ok_or(Reply::Refused)?;
        if matches!(copy.state, MemberState::Stale { .. }) || head.slots.len() > WriteGroup::BLOCKS_MAX {
            return Err(Reply::Refused);
        }
        let mut parts = parts.into_iter();
        let mut seen = BTreeSet::new();
        let mut data = Vec::with_capacity(head.slots.len());
        for slot in &head.slots {
            if slot.index >= copy.blocks || !seen.insert(slot.index) {
                return Err(Reply::Refused);
            }
            data.push(if slot.has_data { Some(parts.next().ok_or(Reply::Refused)?) } else { None });
            self.clock.fetch_max(counter(slot.version), Ordering::AcqRel);
        }
        let Copy { disk, base, syncing_from, .. } = copy;
        Ok((disk, Incoming { kind: RecordKind::Write, head, data, base, epoch, syncing_from }))
    }

    /// A writer has said in an epoch that its groups are complete up to one. If that epoch is over it comes too late: recovery
    /// finds out by itself, and what is uncertain must stay so until all members have asked for it.
    pub(crate) fn completed(&self, epoch: Epoch, disk: DiskId, mirror: MirrorId, writer: Writer, upto: u64) {
        let state = self.state.lock();
        if epoch >= state.view.epoch()
            && let Some(disk) = state.disks.get(&disk)
        {
            disk.with(|c| c.complete(mirror, writer, upto));
        }
    }

    // --- questions ---

    /// Answers a question (anything but a write).
    pub(crate) async fn serve(&self, epoch: Epoch, disk: DiskId, request: Request) -> (Reply, Vec<Bytes>) {
        // A question of a newer epoch waits until it is adopted here: that is the fence.
        let mut views = self.cluster.view();
        loop {
            self.adopt();
            let adopted = self.view().epoch();
            if adopted > epoch {
                return (Reply::Stale { epoch: adopted }, Vec::new());
            }
            if adopted == epoch {
                break;
            }
            if views.changed().await.is_err() {
                return (Reply::Stale { epoch: adopted }, Vec::new());
            }
        }
        let _turn = self.questions.acquire().await;
        match self.answer(disk, request).await {
            Ok(answer) => answer,
            Err(reply) => (reply, Vec::new()),
        }
    }

    async fn answer(&self, disk: DiskId, request: Request) -> Result<(Reply, Vec<Bytes>), Reply> {
        let fault = |Faulted| Reply::Faulted;
        let copy = |mirror| {
            let state = self.state.lock();
            if state.disks.get(&disk).is_none_or(|d| d.is_faulted()) {
                return Err(Reply::Faulted);
            }
            state.copy(mirror, disk).ok_or(Reply::Refused)
        };
        let reply = match request {
            Request::Read { mirror, blocks, uncertain } => {
                self.activity.fetch_add(1, Ordering::Relaxed);
                let copy = copy(mirror)?;
                if blocks.len() > READ_BLOCKS_MAX || blocks.iter().any(|b| *b >= copy.blocks) {
                    return Err(Reply::Refused);
                }
                let addrs: Vec<u32> = blocks.iter().map(|b| copy.base + b).collect();
                let got = copy.disk.read(&addrs).await.map_err(fault)?;
                let mut parts = Vec::new();
                let mut found = Vec::with_capacity(got.len());
                for (got, index) in got.into_iter().zip(blocks) {
                    found.push(match got {
                        Got::Damaged(version) => Found::Damaged { version },
                        Got::Block(entry, data) => {
                            let uncertain = uncertain && copy.disk.with(|c| c.is_uncertain(mirror, index, entry.version));
                            let has_data = data.is_some();
                            parts.extend(data);
                            let (tag, version, checksum) = (entry.tag, entry.version, entry.checksum);
                            Found::Block { tag, version, has_data, checksum, uncertain }
                        }
                    });
                }
                return Ok((Reply::Blocks(found), parts));
            }
            Request::Tags { mirror, first, count } => {
                let copy = copy(mirror)?;
                let entries = tags(&copy, first, count).await?;
                Reply::Tags(
                    entries
                        .into_iter()
                        .map(|e| FoundTag { tag: e.map(|e| e.tag), version: e.map_or(Version(0), |e| e.version) })
                        .collect(),
                )
            }
            Request::Changed { mirror, first, count, since } => {
                let copy = copy(mirror)?;
                let entries = tags(&copy, first, count).await?;
                let changes = entries.into_iter().zip(first..).filter_map(|(e, index)| match e {
                    Some(e) if e.version > Version(0) && e.version.epoch() >= since => {
                        Some(Change { index, version: e.version, checksum: e.checksum })
                    }
                    Some(_) => None,
                    None => Some(Change { index, version: Version(0), checksum: [0; 16] }),
                });
                Reply::Changed(changes.collect())
            }
            Request::RegionFree { mirror, region } => {
                let copy = copy(mirror)?;
                if region >= copy.blocks.div_ceil(crate::api::REGION_BLOCKS) {
                    return Err(Reply::Refused);
                }
                let words = copy.disk.with(|c| c.region_free(copy.base, region, copy.blocks));
                Reply::Free { words, clock: self.clock.load(Ordering::Acquire) }
            }
            Request::Space { mirror } => {
                let copy = copy(mirror)?;
                let free = copy.disk.with(|c| c.free_counts(copy.base, copy.blocks));
                Reply::Space(Space { blocks: u64::from(copy.blocks), free })
            }
            Request::Uncertain { mirror, after } => {
                let copy = copy(mirror)?;
                // What was accepted in older epochs must be durable (or refused) before it is reported.
                if !copy.disk.barrier().await {
                    return Err(Reply::Faulted);
                }
                let (groups, more) = copy.disk.uncertain(mirror, after, UNCERTAIN_BYTES).await.map_err(fault)?;
                let mut parts = Vec::new();
                let mut heads = Vec::with_capacity(groups.len());
                for (head, data) in groups {
                    parts.extend(data.into_iter().flatten());
                    heads.push(head);
                }
                return Ok((Reply::Uncertain { groups: heads, more }, parts));
            }
            Request::Clock { clock } => {
                self.clock.fetch_max(clock, Ordering::AcqRel);
                Reply::Clock(self.clock.load(Ordering::Acquire))
            }
            Request::Completed { mirror, writer, upto } => {
                self.completed(self.view().epoch(), disk, mirror, writer, upto);
                Reply::Written
            }
            Request::Write(_) => Reply::Refused,
        };
        Ok((reply, Vec::new()))
    }

    /// Reports a failed disk to the cluster until it is known to be faulted.
    pub(crate) async fn report_fault(&self, disk: DiskId) {
        loop {
            let known = self.cluster.view().borrow().config.disks.get(&disk).is_none_or(|d| d.faulted);
            if known {
                return;
            }
            if let Err(e) = self.cluster.propose(Command::DiskFault { disk }).await {
                tracing::warn!("reporting the failure of {disk}: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        }
    }
}

async fn tags(copy: &Copy, first: u32, count: u32) -> Result<Vec<Option<crate::format::TagEntry>>, Reply> {
    if count > TAGS_MAX || first.checked_add(count).is_none_or(|end| end > copy.blocks) {
        return Err(Reply::Refused);
    }
    copy.disk.tags(copy.base + first, count).await.map_err(|Faulted| Reply::Faulted)
}

type Notes = Vec<(Arc<Disk>, Incoming)>;

impl State {
    /// Copies that begin to be synced: what was uncertain on them no longer matters, since what they have of their last
    /// epochs will be compared with a good copy. Must be noted durably: the groups must not come back as uncertain once
    /// the copy is in sync.
    fn note_syncing(&mut self, view: &View, only: Option<DiskId>) -> Notes {
        let mut notes = Vec::new();
        let Some(incarnation) = view.config.nodes.get(&view.me).map(|n| n.incarnation) else { return notes };
        for (mirror, info) in &view.config.mirrors {
            for member in info.members.iter().filter(|m| only.is_none_or(|id| id == m.disk)) {
                let Some(disk) = self.disks.get(&member.disk) else { continue };
                let key = (*mirror, member.disk);
                let MemberState::Syncing { since } = member.state else {
                    self.syncing.remove(&key);
                    continue;
                };
                let known = self.syncing.get(&key).is_some_and(|s| s.incarnation == incarnation && s.since == since);
                if !known {
                    self.syncing.insert(key, Syncing { incarnation, since, from: view.epoch() });
                    notes.push((Arc::clone(disk), Incoming::forget(*mirror, None, view.epoch())));
                }
            }
        }
        notes
    }

    /// The epoch's recovery is over on all nodes: groups of writers that are dead in it are certain.
    fn note_certain(&self, view: &View) -> Notes {
        let mut notes = Vec::new();
        for (mirror, info) in &view.config.mirrors {
            for disk in info.members.iter().filter_map(|m| self.disks.get(&m.disk)) {
                for writer in disk.with(|c| c.uncertain_writers(*mirror)) {
                    if !is_alive(&view.config, writer) {
                        notes.push((Arc::clone(disk), Incoming::forget(*mirror, Some(writer), view.epoch())));
                    }
                }
            }
        }
        notes
    }
}

fn write_notes(notes: Notes) {
    for (disk, note) in notes {
        // A disk that has failed needs no notes.
        let _ = disk.write(note, Box::new(|_| {}));
    }
}
