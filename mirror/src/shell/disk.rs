//! One disk at work: a committer that makes groups durable in the order in which they came, many with one flush, and a
//! checkpointer that writes them home.
//!
//! Invariants:
//! - Groups become durable in the order of `write`; an answer is given only after the flush that covers the group.
//! - The first error of a write or a flush faults the disk: nothing more is written or served. What cannot be read, contents
//!   or tags, is damaged, and the other copies repair it.
//! - Only the committer appends to the log; only the checkpointer writes labels, tags, bitmap and logged contents home.

use crate::api::{BlockDevice, Version};
use crate::format::{OpenError, TAG_BYTES, TAGS_PER_BLOCK, TagEntry};
use crate::log::{RECORD_BLOCKS_MAX, RecordKind};
use crate::message::{WriteHead, WriteMode, Writer};
use crate::replica::{Checkpoint, DiskCore, Incoming, Lookup};
use crate::shell::open::{Expected, open_core};
use crate::shell::tasks::{Tasks, parallel};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BoxFuture, Epoch, MirrorId};
use parking_lot::Mutex;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Most blocks that one batch puts into the log.
pub(crate) const BATCH_BLOCKS_MAX: u64 = 2048;
/// Most blocks of one device write or read when copying home.
const RUN_BLOCKS_MAX: usize = 256;
/// Device calls at a time.
const IO_PARALLEL: usize = 8;
/// Without pressure, what is not home is written home this often.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(10);
/// Contents that are not home yet: beyond this many blocks a checkpoint is due (64 MiB).
const OVERLAY_BLOCKS_MAX: usize = 16_384;

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Durable.
    Written,
    /// Taken back: a newer epoch began.
    Stale(Epoch),
    /// The disk has failed.
    Faulted,
}

pub(crate) type Done = Box<dyn FnOnce(Outcome) + Send>;

/// The disk has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Faulted;

/// A block as it was read.
#[derive(Clone, Debug)]
pub(crate) enum Got {
    Block(TagEntry, Option<Bytes>),
    Damaged(Version),
}

enum Work {
    Log(Incoming, Done),
    Barrier(oneshot::Sender<()>),
}

/// Bounded by what its writers may have in flight: each `WINDOW_BYTES` and `WINDOW_GROUPS` (of `client`) per mirror. A full
/// queue could refuse nothing anyway: the groups behind the refused one would overtake it.
#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    /// Nothing is accepted any more.
    closed: bool,
}

/// What happened on a disk, for whoever owns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It has failed.
    Faulted {
        /// The error.
        why: String,
    },
    /// The tags of these blocks of the data area cannot be read: they are damaged.
    TagsLost {
        /// The blocks.
        blocks: Range<u32>,
        /// The error.
        why: String,
    },
}

pub(crate) type OnNews = Box<dyn Fn(News) + Send + Sync>;

pub(crate) struct Disk {
    device: Arc<dyn BlockDevice>,
    core: Mutex<DiskCore>,
    queue: Mutex<Queue>,
    /// Work for the committer.
    wake: Notify,
    /// Work for the checkpointer.
    checkpoint: Notify,
    /// A checkpoint has ended, or the queue was purged.
    released: Notify,
    faulted: AtomicBool,
    on_news: OnNews,
    /// Held by the checkpoint that is under way.
    checkpointing: tokio::sync::Mutex<()>,
}

impl Disk {
    /// Opens a disk and starts its tasks.
    pub(crate) async fn open(
        device: Arc<dyn BlockDevice>,
        expected: Expected,
        tags_max: usize,
        on_news: OnNews,
        tasks: &Tasks,
    ) -> Result<Arc<Disk>, OpenError> {
        let mut core = open_core(&*device, expected, tags_max).await?;
        let lost = core.take_tags_lost();
        let disk = Arc::new(Disk {
            device,
            core: Mutex::new(core),
            queue: Mutex::new(Queue::default()),
            wake: Notify::new(),
            checkpoint: Notify::new(),
            released: Notify::new(),
            faulted: AtomicBool::new(false),
            on_news,
            checkpointing: tokio::sync::Mutex::new(()),
        });
        disk.tell_tags_lost(lost);
        let committer = Arc::clone(&disk);
        tasks.spawn(async move {
            while let Some(batch) = committer.next_batch().await {
                if let Err(e) = committer.commit(batch).await {
                    committer.fault(&e);
                }
            }
        });
        let checkpointer = Arc::clone(&disk);
        tasks.spawn(async move {
            loop {
                let _ = tokio::time::timeout(CHECKPOINT_EVERY, checkpointer.checkpoint.notified()).await;
                if checkpointer.is_faulted() {
                    return;
                }
                if let Err(e) = checkpointer.checkpoint_once().await {
                    checkpointer.fault(&e);
                }
            }
        });
        Ok(disk)
    }

    pub(crate) fn is_faulted(&self) -> bool {
        self.faulted.load(Ordering::Acquire)
    }

    /// Looks at the core, or changes it in memory only.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut DiskCore) -> T) -> T {
        f(&mut self.core.lock())
    }

    /// Latches the fault: everything that waits is told, nothing more is served.
    pub(crate) fn fault(&self, why: &io::Error) {
        if self.faulted.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!("disk failed: {why}");
        let waiting = {
            let mut queue = self.queue.lock();
            queue.closed = true;
            std::mem::take(&mut queue.work)
        };
        for work in waiting {
            if let Work::Log(_, done) = work {
                done(Outcome::Faulted);
            }
        }
        self.released.notify_waiters();
        self.wake.notify_one();
        (self.on_news)(News::Faulted { why: why.to_string() });
    }

    fn tell_tags_lost(&self, lost: Vec<(u32, String)>) {
        for (block, why) in lost {
            tracing::error!("tag block {block} cannot be read: {why}");
            let first = block * TAGS_PER_BLOCK;
            let end = self.with(|c| c.geometry.data_blocks).min(first + TAGS_PER_BLOCK);
            (self.on_news)(News::TagsLost { blocks: first..end, why });
        }
    }

    // --- writing ---

    /// Queues a group. `done` is called once it is durable, or has been refused; never from within this call: if the disk
    /// takes no more work it is given back.
    pub(crate) fn write(&self, incoming: Incoming, done: Done) -> Result<(), Done> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(done);
        }
        queue.work.push_back(Work::Log(incoming, done));
        drop(queue);
        self.wake.notify_one();
        Ok(())
    }

    /// As `write`, and waits.
    pub(crate) async fn write_wait(&self, incoming: Incoming) -> Outcome {
        let (tx, rx) = oneshot::channel();
        let done = Box::new(move |outcome| {
            let _ = tx.send(outcome);
        });
        if self.write(incoming, done).is_err() {
            return Outcome::Faulted;
        }
        rx.await.unwrap_or(Outcome::Faulted)
    }

    /// Gives back what is queued of epochs before `epoch`: their writers send it again.
    pub(crate) fn purge(&self, epoch: Epoch) {
        let mut back = Vec::new();
        {
            let mut queue = self.queue.lock();
            let mut keep = VecDeque::new();
            for work in std::mem::take(&mut queue.work) {
                match work {
                    Work::Log(incoming, done) if incoming.epoch < epoch && incoming.kind == RecordKind::Write => back.push(done),
                    other => keep.push_back(other),
                }
            }
            queue.work = keep;
        }
        for done in back {
            done(Outcome::Stale(epoch));
        }
        self.released.notify_waiters();
    }

    /// Waits until everything queued so far is durable or refused. False if the disk has failed.
    pub(crate) async fn barrier(&self) -> bool {
        let (tx, rx) = oneshot::channel();
        {
            let mut queue = self.queue.lock();
            if queue.closed {
                return false;
            }
            queue.work.push_back(Work::Barrier(tx));
        }
        self.wake.notify_one();
        rx.await.is_ok() && !self.is_faulted()
    }

    /// Waits for work, and for room in the log for it. `None` when the disk has failed.
    async fn next_batch(&self) -> Option<Vec<(Incoming, Done)>> {
        loop {
            if self.is_faulted() {
                return None;
            }
            let released = self.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            // Some room is kept so that uncertain groups can always be carried on.
            let (room, reserve) = self.with(|c| (c.log().free(), c.log().blocks() / 8));
            let mut batch = Vec::new();
            let (mut blocks, mut starved) = (0, false);
            {
                let mut queue = self.queue.lock();
                while let Some(work) = queue.work.front() {
                    match work {
                        Work::Barrier(_) if !batch.is_empty() => break,
                        Work::Barrier(_) => {
                            if let Some(Work::Barrier(tx)) = queue.work.pop_front() {
                                let _ = tx.send(());
                            }
                        }
                        Work::Log(incoming, _) => {
                            let need = incoming.log_blocks_max();
                            let keep = if incoming.kind == RecordKind::Write { reserve } else { 0 };
                            if blocks + need + keep > room {
                                starved = batch.is_empty();
                                break;
                            }
                            if !batch.is_empty() && blocks + need > BATCH_BLOCKS_MAX {
                                break;
                            }
                            blocks += need;
                            if let Some(Work::Log(incoming, done)) = queue.work.pop_front() {
                                batch.push((incoming, done));
                            }
                        }
                    }
                }
            }
            if !batch.is_empty() {
                return Some(batch);
            }
            if starved {
                self.checkpoint.notify_one();
                tokio::select! {
                    biased;
                    () = released => {}
                    () = self.wake.notified() => {}
                }
            } else {
                self.wake.notified().await;
            }
        }
    }

    async fn commit(&self, batch: Vec<(Incoming, Done)>) -> io::Result<()> {
        let (writes, dones): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let result = self.log_writes(writes).await;
        let outcome = if result.is_ok() { Outcome::Written } else { Outcome::Faulted };
        for done in dones {
            done(outcome);
        }
        result
    }

    async fn log_writes(&self, writes: Vec<Incoming>) -> io::Result<()> {
        let mut writes = Some(writes);
        let plan = loop {
            let missing = {
                let mut core = self.core.lock();
                let missing = core.missing(writes.iter().flatten());
                if missing.is_empty() {
                    break core.plan(writes.take().unwrap_or_default());
                }
                missing
            };
            self.load_tags(missing).await;
        };
        if !plan.home.is_empty() {
            let mut home = plan.home.clone();
            home.sort_unstable_by_key(|(addr, _)| *addr);
            self.write_home(home).await?;
            self.device.flush().await?;
        }
        let (start, blocks) = self.with(|c| (c.geometry.log_start, c.geometry.log_blocks));
        let mut first = Vec::new();
        let mut second = Vec::new();
        let mut left = (blocks - plan.pos) as usize * BLOCK_SIZE;
        for part in &plan.parts {
            if left >= part.len() {
                left -= part.len();
                first.push(part.clone());
            } else {
                if left > 0 {
                    first.push(part.slice(..left));
                }
                second.push(part.slice(left..));
                left = 0;
            }
        }
        self.device.write(start + plan.pos, first).await?;
        if !second.is_empty() {
            self.device.write(start, second).await?;
        }
        self.device.flush().await?;
        let mut core = self.core.lock();
        core.commit(plan);
        core.evict_tags();
        let due = core.log().used() > core.log().blocks() / 2 || core.tags_crowded() || core.dirty().0 > OVERLAY_BLOCKS_MAX;
        drop(core);
        if due {
            self.checkpoint.notify_one();
        }
        Ok(())
    }

    /// Writes (data block, contents), sorted, in runs.
    async fn write_home(&self, blocks: Vec<(u32, Bytes)>) -> io::Result<()> {
        let start = self.with(|c| c.geometry.data_start);
        self.write_runs(start, blocks).await
    }

    async fn write_runs(&self, start: u64, blocks: Vec<(u32, Bytes)>) -> io::Result<()> {
        let mut writes: Vec<BoxFuture<'_, io::Result<()>>> = Vec::new();
        let mut blocks = blocks.into_iter().peekable();
        while let Some((first, data)) = blocks.next() {
            let mut run = vec![data];
            while run.len() < RUN_BLOCKS_MAX
                && let Some((_, data)) = blocks.next_if(|(at, _)| u64::from(*at) == u64::from(first) + run.len() as u64)
            {
                run.push(data);
            }
            writes.push(self.device.write(start + u64::from(first), run));
        }
        parallel(IO_PARALLEL, writes).await.into_iter().collect()
    }

    // --- checkpoint ---

    /// Writes everything home that is not, and frees the log as far as possible.
    pub(crate) async fn checkpoint_once(&self) -> io::Result<()> {
        let _one_at_a_time = self.checkpointing.lock().await;
        let (checkpoint, g) = {
            let mut core = self.core.lock();
            if core.log().used() == 0 && core.dirty() == (0, 0) {
                return Ok(());
            }
            (core.checkpoint_begin(), core.geometry)
        };
        let home = checkpoint.home.iter().map(|(addr, data, _)| (*addr, data.clone())).collect();
        self.write_runs(g.data_start, home).await?;
        self.write_runs(g.tags_start, checkpoint.tags.clone()).await?;
        self.write_runs(g.bitmap_start, checkpoint.bitmap.clone()).await?;
        self.device.flush().await?;
        self.release(&checkpoint).await
    }

    async fn release(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let label = self.core.lock().checkpoint_end(checkpoint);
        if let Some(label) = label {
            self.device.write(label.generation % 2, vec![label.encode()]).await?;
            self.device.flush().await?;
            self.core.lock().release(label);
        }
        self.carry(checkpoint.upto());
        self.released.notify_waiters();
        Ok(())
    }

    /// If uncertain groups keep more than half of the log, repeats them at its head without their contents (which are
    /// home by now), so that the next checkpoint frees it.
    fn carry(&self, upto: u64) {
        let carried = {
            let core = self.core.lock();
            if core.log().used() <= core.log().blocks() / 2 { Vec::new() } else { core.carry(upto) }
        };
        if carried.is_empty() {
            return;
        }
        let mut queue = self.queue.lock();
        // Also while the disk is being closed: what was accepted needs the room.
        if self.is_faulted() || queue.work.iter().any(|w| matches!(w, Work::Log(i, _) if i.kind == RecordKind::Carry)) {
            return;
        }
        // In front: what waits for room waits for these.
        for incoming in carried.into_iter().rev() {
            queue.work.push_front(Work::Log(incoming, Box::new(|_| {})));
        }
        drop(queue);
        self.checkpoint.notify_one();
        self.wake.notify_one();
    }

    // --- reading ---

    /// Loads tag blocks. One that cannot be read counts as damaged, as a whole.
    async fn load_tags(&self, blocks: BTreeSet<u32>) {
        let (start, generation) = self.with(|c| (c.geometry.tags_start, c.generation()));
        let list: Vec<u32> = blocks.into_iter().collect();
        let reads = list.iter().map(|b| self.device.read(start + u64::from(*b), 1)).collect();
        let read = parallel(IO_PARALLEL, reads).await;
        let lost = {
            let mut core = self.core.lock();
            for (block, bytes) in list.iter().zip(read) {
                // If a checkpoint came between, the caller finds it still missing and asks again.
                match bytes {
                    Ok(bytes) => core.install_tags(*block, &bytes, generation),
                    Err(e) => core.install_lost_tags(*block, generation, &e),
                };
            }
            core.take_tags_lost()
        };
        self.tell_tags_lost(lost);
    }

    /// Reads data blocks, in order.
    pub(crate) async fn read(&self, addrs: &[u32]) -> Result<Vec<Got>, Faulted> {
        let mut got: Vec<Option<Got>> = vec![None; addrs.len()];
        loop {
            if self.is_faulted() {
                return Err(Faulted);
            }
            let mut missing = BTreeSet::new();
            let mut home: Vec<(usize, u32, TagEntry)> = Vec::new();
            let start = {
                let mut core = self.core.lock();
                for (i, addr) in addrs.iter().enumerate() {
                    if got[i].is_some() {
                        continue;
                    }
                    match core.lookup(*addr) {
                        Lookup::NeedTags(block) => {
                            missing.insert(block);
                        }
                        Lookup::Damaged => got[i] = Some(Got::Damaged(Version(0))),
                        Lookup::Entry(entry, Some(data)) => got[i] = Some(Got::Block(entry, Some(data))),
                        Lookup::Entry(entry, None) if entry.has_data => home.push((i, *addr, entry)),
                        Lookup::Entry(entry, None) => got[i] = Some(Got::Block(entry, None)),
                    }
                }
                core.geometry.data_start
            };
            if !missing.is_empty() {
                self.load_tags(missing).await;
                continue;
            }
            if home.is_empty() {
                break;
            }
            let contents = self.read_home(start, &home).await;
            let mut core = self.core.lock();
            for ((i, addr, entry), data) in home.into_iter().zip(contents) {
                // Overwritten meanwhile: what was read may be of both versions.
                if core.lookup(addr) == Lookup::Entry(entry, None) {
                    got[i] = Some(data.map_or(Got::Damaged(entry.version), |d| Got::Block(entry, Some(d))));
                }
            }
            if got.iter().all(Option::is_some) {
                break;
            }
        }
        self.with(DiskCore::evict_tags);
        Ok(got.into_iter().flatten().collect())
    }

    /// Reads contents from their places; `None` where the device gives an error.
    async fn read_home(&self, start: u64, blocks: &[(usize, u32, TagEntry)]) -> Vec<Option<Bytes>> {
        let mut runs: Vec<(u32, usize)> = Vec::new();
        for (_, addr, _) in blocks {
            match runs.last_mut() {
                Some((first, len)) if u64::from(*first) + *len as u64 == u64::from(*addr) && *len < RUN_BLOCKS_MAX => *len += 1,
                _ => runs.push((*addr, 1)),
            }
        }
        let reads: Vec<BoxFuture<'_, Vec<Option<Bytes>>>> = runs
            .into_iter()
            .map(|(first, len)| -> BoxFuture<'_, Vec<Option<Bytes>>> {
                Box::pin(async move {
                    let at = start + u64::from(first);
                    match self.device.read(at, len).await {
                        Ok(all) if all.len() == len * BLOCK_SIZE => {
                            (0..len).map(|i| Some(all.slice(i * BLOCK_SIZE..(i + 1) * BLOCK_SIZE))).collect()
                        }
                        _ => {
                            // One bad sector must not hide its neighbours.
                            let mut each = Vec::with_capacity(len);
                            for i in 0..len as u64 {
                                let one = self.device.read(at + i, 1).await.ok();
                                each.push(one.filter(|b| b.len() == BLOCK_SIZE));
                            }
                            each
                        }
                    }
                })
            })
            .collect();
        parallel(IO_PARALLEL, reads).await.into_iter().flatten().collect()
    }

    /// Tag entries of a run of data blocks, in order; `None` for damaged ones. Reads past the cache.
    pub(crate) async fn tags(&self, first: u32, count: u32) -> Result<Vec<Option<TagEntry>>, Faulted> {
        let mut out = Vec::with_capacity(count as usize);
        let mut at = first;
        let end = first.saturating_add(count);
        while at < end {
            let block = at / TAGS_PER_BLOCK;
            let blocks = ((end - 1) / TAGS_PER_BLOCK - block + 1).min(RUN_BLOCKS_MAX as u32);
            let bytes = self.tag_run(block, blocks).await?;
            let core = self.core.lock();
            while at < end && at / TAGS_PER_BLOCK < block + blocks {
                let offset = (at - block * TAGS_PER_BLOCK) as usize * TAG_BYTES;
                out.push(bytes.get(offset..offset + TAG_BYTES).and_then(|b| core.entry_from(b, at)));
                at += 1;
            }
        }
        Ok(out)
    }

    /// Tag blocks as they are now: from memory where they are there, otherwise from the disk.
    async fn tag_run(&self, block: u32, blocks: u32) -> Result<Vec<u8>, Faulted> {
        loop {
            if self.is_faulted() {
                return Err(Faulted);
            }
            let (start, generation) = self.with(|c| (c.geometry.tags_start, c.generation()));
            let all_here = self.with(|c| (block..block + blocks).all(|b| c.has_tags(b)));
            let mut bytes = if all_here {
                vec![0; blocks as usize * BLOCK_SIZE]
            } else {
                match self.device.read(start + u64::from(block), blocks as usize).await {
                    Ok(bytes) => bytes.to_vec(),
                    // One by one, into memory: what cannot be read is damaged.
                    Err(_) => {
                        let missing = self.with(|c| (block..block + blocks).filter(|b| !c.has_tags(*b)).collect());
                        self.load_tags(missing).await;
                        continue;
                    }
                }
            };
            let core = self.core.lock();
            if core.generation() != generation || (all_here && !(block..block + blocks).all(|b| core.has_tags(b))) {
                continue;
            }
            for (b, to) in (block..block + blocks).zip(bytes.chunks_exact_mut(BLOCK_SIZE)) {
                if let Some(from) = core.tag_block(b) {
                    to.copy_from_slice(from);
                }
            }
            return Ok(bytes);
        }
    }

    // --- uncertain groups ---

    /// Uncertain groups of some writers of a mirror after a place, with contents (per group, in slot order), until they
    /// have about `bytes` bytes; and whether there are more.
    pub(crate) async fn uncertain(
        &self,
        mirror: MirrorId,
        after: Option<(Writer, u64)>,
        bytes: usize,
    ) -> Result<(Vec<(WriteHead, Vec<Option<Bytes>>)>, bool), Faulted> {
        let (mut groups, mut more, mut size) = (Vec::new(), false, 0);
        self.with(|core| {
            for group in core.uncertain_after(mirror, after) {
                if size > bytes || groups.len() >= 4096 {
                    more = true;
                    break;
                }
                size += group.head.slots.len() * (BLOCK_SIZE + 80);
                groups.push((group.head.clone(), group.data.clone(), group.base));
            }
        });
        let mut out = Vec::with_capacity(groups.len());
        for (mut head, mut data, base) in groups {
            // Contents that are not in the log are read from their place. If they were replaced by a later write, that
            // one stands for them, with its own version: it is newer everywhere.
            let lack: Vec<usize> = (0..head.slots.len()).filter(|i| head.slots[*i].has_data && data[*i].is_none()).collect();
            let addrs: Vec<u32> = lack.iter().map(|i| base + head.slots[*i].index).collect();
            let got = if addrs.is_empty() { Vec::new() } else { self.read(&addrs).await? };
            let mut unreadable = BTreeSet::new();
            for (i, got) in lack.iter().zip(got) {
                match got {
                    Got::Block(entry, contents) => {
                        let slot = &mut head.slots[*i];
                        slot.version = entry.version;
                        slot.tag = entry.tag;
                        slot.has_data = entry.has_data;
                        slot.checksum = entry.checksum;
                        data[*i] = contents;
                    }
                    Got::Damaged(_) => {
                        unreadable.insert(*i);
                    }
                }
            }
            if !unreadable.is_empty() {
                let mut i = 0;
                head.slots.retain(|_| {
                    i += 1;
                    !unreadable.contains(&(i - 1))
                });
                let mut i = 0;
                data.retain(|_| {
                    i += 1;
                    !unreadable.contains(&(i - 1))
                });
            }
            head.mode = WriteMode::Normal;
            out.push((head, data));
        }
        Ok((out, more))
    }

    /// Writes everything home and stops taking work.
    pub(crate) async fn close(&self) {
        let (tx, rx) = oneshot::channel();
        {
            // Both at once: what is accepted is answered before this returns.
            let mut queue = self.queue.lock();
            if queue.closed {
                return;
            }
            queue.work.push_back(Work::Barrier(tx));
            queue.closed = true;
        }
        self.wake.notify_one();
        if rx.await.is_err() || self.is_faulted() {
            return;
        }
        if let Err(e) = self.checkpoint_once().await {
            self.fault(&e);
        }
    }

    /// Counts for status: (log used, log blocks, not home, conflicts).
    pub(crate) fn counts(&self) -> (u64, u64, u64, u64) {
        self.with(|c| (c.log().used(), c.log().blocks(), c.dirty().0 as u64, c.conflicts))
    }
}

const _: () = assert!(BATCH_BLOCKS_MAX >= RECORD_BLOCKS_MAX);
