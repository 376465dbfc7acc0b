//! One disk's state machine: which version each block has, where its contents are, what the log holds.
//!
//! The shell (`shell::disk`) does the I/O between the steps: `missing` -> load tag blocks -> `plan` -> write home blocks,
//! flush, append records, flush -> `commit`; and `checkpoint_begin` -> write, flush -> `checkpoint_end` -> write label,
//! flush -> `release`.
//!
//! Invariants:
//! - What is visible (tags, bitmap, overlay) is durable: `commit` runs only after the flush.
//! - Per block and writer, a write of an earlier group never replaces one of a later group: the counter of a version is
//!   fixed when a group is first sent, the epoch part says in which epoch it was last confirmed. Counters of successive
//!   writers of a block grow (Lamport), so the counter decides; of equal counters, the later epoch.
//! - A copy that is being synced takes everything that is written in the epochs since it came back over what it had.
//! - A record stays in the log until its blocks are home and its group is certain (or carried on).
//!
//! Excludes: who may write (`server` fences by epoch), I/O.

use crate::api::{Kind, REGION_BLOCKS, Version};
use crate::format::{BITS_PER_BLOCK, Checksum, Geometry, Label, TAG_BYTES, TAGS_PER_BLOCK, TagEntry};
use crate::log::{LogSlot, LogState, Mark, Record, RecordKind};
use crate::message::{Slot, WriteHead, WriteMode, Writer};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, Epoch, MirrorId};
use lru::LruCache;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Counter part of a version.
pub(crate) fn counter(version: Version) -> u64 {
    version.0 & ((1 << Version::COUNTER_BITS) - 1)
}

/// Something for the log.
#[derive(Clone, Debug)]
pub(crate) struct Incoming {
    pub kind: RecordKind,
    pub head: WriteHead,
    /// Per slot.
    pub data: Vec<Option<Bytes>>,
    /// First block of the mirror's copy.
    pub base: u32,
    /// The epoch in which it was accepted.
    pub epoch: Epoch,
    /// If the copy is being synced: the epoch in which that began.
    pub syncing_from: Option<Epoch>,
}

impl Incoming {
    /// A note that groups of a mirror are certain (of all writers if `writer` is `None`).
    pub(crate) fn forget(mirror: MirrorId, writer: Option<Writer>, epoch: Epoch) -> Incoming {
        let head = WriteHead {
            mirror,
            mode: WriteMode::Normal,
            writer: writer.unwrap_or_default(),
            wseq: 0,
            completed_upto: 0,
            clock: 0,
            fresh_data: false,
            slots: Vec::new(),
        };
        Incoming { kind: RecordKind::Forget, head, data: Vec::new(), base: 0, epoch, syncing_from: None }
    }

    /// Most blocks that it can take in the log.
    pub(crate) fn log_blocks_max(&self) -> u64 {
        2 + self.head.slots.len() as u64 / 63 + self.data.iter().flatten().count() as u64
    }
}

/// A group that may not be complete on all members.
#[derive(Clone, Debug)]
pub(crate) struct Uncertain {
    pub head: WriteHead,
    /// Contents that were in the log; those written directly home are `None`.
    pub data: Vec<Option<Bytes>>,
    pub base: u32,
    pub epoch: Epoch,
    /// Its record.
    pub sequence: u64,
}

/// What to write for a batch of incoming groups.
pub(crate) struct Plan {
    /// Blocks that go directly to their place, before the log: (data block, contents).
    pub home: Vec<(u32, Bytes)>,
    /// Where the records go.
    pub pos: u64,
    /// The records with their payload.
    pub parts: Vec<Bytes>,
    records: Vec<(Record, Checksum, Incoming)>,
}

/// What to write for a checkpoint.
pub(crate) struct Checkpoint {
    upto: Mark,
    /// Contents: (data block, contents, the record they came with).
    pub home: Vec<(u32, Bytes, u64)>,
    /// Tag blocks: (number in the tag table, contents).
    pub tags: Vec<(u32, Bytes)>,
    tag_marks: Vec<u64>,
    /// Bitmap blocks: (number in the bitmap, contents).
    pub bitmap: Vec<(u32, Bytes)>,
}

impl Checkpoint {
    /// The first record that it does not cover.
    pub(crate) fn upto(&self) -> u64 {
        self.upto.sequence
    }
}

/// What is known about a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// Load this tag block first.
    NeedTags(u32),
    /// Its tag is damaged, or lost.
    Damaged,
    /// Its entry, and its contents if they are not home yet.
    Entry(TagEntry, Option<Bytes>),
}

struct TagBlock {
    bytes: Vec<u8>,
    /// The change that made it dirty; 0 if it is clean.
    dirty: u64,
}

struct Pending {
    data: Bytes,
    sequence: u64,
}

/// See the module.
pub(crate) struct DiskCore {
    pub geometry: Geometry,
    uuid: [u8; 16],
    label: Label,
    log: LogState,
    /// The start of each record from the tail on.
    marks: VecDeque<Mark>,
    /// Everything up to this record is durable.
    durable: u64,
    bitmap: Vec<u64>,
    bitmap_dirty: BTreeSet<u32>,
    tags: LruCache<u32, TagBlock>,
    tags_max: usize,
    tags_dirty: usize,
    /// Tag blocks that could not be read, not yet told.
    tags_lost: Vec<(u32, String)>,
    changes: u64,
    /// Grows with every checkpoint: tells a loader of tag blocks that what it read may be old.
    generation: u64,
    overlay: BTreeMap<u32, Pending>,
    writing_home: BTreeSet<u32>,
    /// Tag blocks that the planned batch will change.
    pinned: BTreeSet<u32>,
    uncertain: BTreeMap<MirrorId, BTreeMap<(Writer, u64), Uncertain>>,
    completed: BTreeMap<(MirrorId, Writer), u64>,
    clock: u64,
    /// Writes skipped though nothing explains why their counter is lower than the block's.
    pub conflicts: u64,
}

impl DiskCore {
    /// From a label and the bitmap as it is on disk (bytes of the whole bitmap area).
    pub(crate) fn new(label: Label, bitmap: &[u8], tags_max: usize) -> Self {
        let tail = Mark { pos: label.tail_pos, sequence: label.tail_sequence, chain: label.tail_chain };
        let geometry = label.geometry;
        let words = (geometry.bitmap_blocks as usize * BLOCK_SIZE) / 8;
        let mut map = Vec::with_capacity(words);
        map.extend(bitmap.chunks_exact(8).take(words).map(|c| c.iter().rev().fold(0u64, |w, b| w << 8 | u64::from(*b))));
        map.resize(words, 0);
        DiskCore {
            geometry,
            uuid: label.uuid,
            log: LogState::new(geometry.log_blocks, tail),
            marks: VecDeque::new(),
            durable: tail.sequence - 1,
            bitmap: map,
            bitmap_dirty: BTreeSet::new(),
            tags: LruCache::unbounded(),
            tags_max: tags_max.max(64),
            tags_dirty: 0,
            tags_lost: Vec::new(),
            changes: 0,
            generation: 0,
            overlay: BTreeMap::new(),
            writing_home: BTreeSet::new(),
            pinned: BTreeSet::new(),
            uncertain: BTreeMap::new(),
            completed: BTreeMap::new(),
            clock: label.clock,
            label,
            conflicts: 0,
        }
    }

    pub(crate) fn label(&self) -> &Label {
        &self.label
    }

    pub(crate) fn log(&self) -> &LogState {
        &self.log
    }

    /// The highest counter ever seen.
    pub(crate) fn clock(&self) -> u64 {
        self.clock
    }

    // --- tag blocks ---

    pub(crate) fn has_tags(&self, block: u32) -> bool {
        self.tags.contains(&block)
    }

    /// Tells loaders whether what they read is still good: pass it back to `install_tags`.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes in a tag block that was read. False if a checkpoint came between: read it again.
    pub(crate) fn install_tags(&mut self, block: u32, bytes: &[u8], generation: u64) -> bool {
        if self.tags.contains(&block) {
            return true;
        }
        if generation != self.generation {
            return false;
        }
        self.tags.put(block, TagBlock { bytes: bytes.to_vec(), dirty: 0 });
        true
    }

    /// Takes note that a tag block cannot be read: all its tags are damaged. False as for `install_tags`.
    pub(crate) fn install_lost_tags(&mut self, block: u32, generation: u64, why: &std::io::Error) -> bool {
        let news = !self.tags.contains(&block) && generation == self.generation;
        if news {
            self.tags_lost.push((block, why.to_string()));
        }
        // No tag looks like this: it is not zero, and its check is wrong.
        self.install_tags(block, &[0xff; BLOCK_SIZE], generation)
    }

    /// Tag blocks that could not be read, each once, with the reason.
    pub(crate) fn take_tags_lost(&mut self) -> Vec<(u32, String)> {
        std::mem::take(&mut self.tags_lost)
    }

    /// Drops the least recently used clean tag blocks beyond the bound.
    pub(crate) fn evict_tags(&mut self) {
        let mut tries = self.tags.len();
        while self.tags.len() > self.tags_max && tries > 0 {
            tries -= 1;
            match self.tags.pop_lru() {
                // Dirty ones stay until they are home, and those of the batch under way until it is committed.
                Some((block, tags)) if tags.dirty != 0 || self.pinned.contains(&block) => {
                    self.tags.put(block, tags);
                }
                _ => {}
            }
        }
    }

    /// The block's tag entry; outer `None` if its tag block is not in memory, inner if it is damaged.
    fn entry(&mut self, addr: u32) -> Option<Option<TagEntry>> {
        let tags = self.tags.get(&(addr / TAGS_PER_BLOCK))?;
        let at = (addr % TAGS_PER_BLOCK) as usize * TAG_BYTES;
        let entry = tags.bytes.get(at..at + TAG_BYTES).and_then(|b| TagEntry::decode(b, addr));
        // "Never written", but allocated: the tag was lost.
        Some(entry.filter(|e| e.version != Version(0) || !self.is_allocated(addr)))
    }

    /// The tag block in memory, as bytes (newer than the disk's).
    pub(crate) fn tag_block(&self, block: u32) -> Option<&[u8]> {
        self.tags.peek(&block).map(|t| t.bytes.as_slice())
    }

    /// Decodes an entry that was read past the cache.
    pub(crate) fn entry_from(&self, bytes: &[u8], addr: u32) -> Option<TagEntry> {
        TagEntry::decode(bytes, addr).filter(|e| e.version != Version(0) || !self.is_allocated(addr))
    }

    fn set_entry(&mut self, addr: u32, entry: TagEntry) {
        self.changes += 1;
        let at = (addr % TAGS_PER_BLOCK) as usize * TAG_BYTES;
        // The caller has loaded it.
        if let Some(tags) = self.tags.get_mut(&(addr / TAGS_PER_BLOCK)) {
            tags.bytes[at..at + TAG_BYTES].copy_from_slice(&entry.encode(addr));
            if tags.dirty == 0 {
                self.tags_dirty += 1;
            }
            tags.dirty = self.changes;
        } else {
            debug_assert!(false, "tag block not loaded");
        }
        let (word, bit) = (addr as usize / 64, addr % 64);
        let old = self.bitmap[word];
        let new = if entry.tag.kind == Kind::Free { old & !(1 << bit) } else { old | 1 << bit };
        if new != old {
            self.bitmap[word] = new;
            self.bitmap_dirty.insert(addr / BITS_PER_BLOCK);
        }
    }

    fn is_allocated(&self, addr: u32) -> bool {
        self.bitmap.get(addr as usize / 64).is_some_and(|w| w >> (addr % 64) & 1 != 0)
    }

    /// What is known about a block.
    pub(crate) fn lookup(&mut self, addr: u32) -> Lookup {
        match self.entry(addr) {
            None => Lookup::NeedTags(addr / TAGS_PER_BLOCK),
            Some(None) => Lookup::Damaged,
            Some(Some(entry)) => Lookup::Entry(entry, self.overlay.get(&addr).map(|p| p.data.clone())),
        }
    }

    // --- writing ---

    /// Tag blocks that must be in memory before `plan`.
    pub(crate) fn missing<'a>(&self, writes: impl Iterator<Item = &'a Incoming>) -> BTreeSet<u32> {
        let mut missing = BTreeSet::new();
        for write in writes {
            for slot in &write.head.slots {
                let block = (write.base + slot.index) / TAGS_PER_BLOCK;
                if !self.tags.contains(&block) {
                    missing.insert(block);
                }
            }
        }
        missing
    }

    /// Whether `slot` replaces what the block has.
    fn replaces(&mut self, write: &Incoming, slot: &Slot, now: Option<TagEntry>) -> bool {
        let Some(now) = now else { return true };
        match write.head.mode {
            WriteMode::Repair { bad } => return now.version == bad,
            _ if now.version == Version(0) => return true,
            _ => {}
        }
        if let Some(from) = write.syncing_from
            && now.version.epoch() < from
        {
            return now.version != slot.version || now.checksum != slot.checksum;
        }
        let (old, new) = (counter(now.version), counter(slot.version));
        // A lower counter is right if the writer itself made the higher one, in a later group. (To a copy that is being
        // synced, resync may have brought one that was made after this request was sent.)
        if new < old && write.syncing_from.is_none() && write.head.clock != 0 && write.head.clock < old {
            tracing::error!("{}:{} has a version that its writer does not know of", write.head.mirror, slot.index);
            self.conflicts += 1;
        }
        new > old || (new == old && slot.version > now.version)
    }

    /// Decides what each incoming group changes and lays out what to write. There must be room in the log, and nothing
    /// `missing`.
    pub(crate) fn plan(&mut self, writes: Vec<Incoming>) -> Plan {
        self.pinned = writes.iter().flat_map(|w| w.head.slots.iter().map(|s| (w.base + s.index) / TAGS_PER_BLOCK)).collect();
        let start = self.log.head();
        let (mut sequence, mut chain) = (start.sequence, start.chain);
        let mut batch: BTreeMap<u32, TagEntry> = BTreeMap::new();
        let mut plan = Plan { home: Vec::new(), pos: start.pos, parts: Vec::new(), records: Vec::new() };
        for mut write in writes {
            let mut slots = Vec::with_capacity(write.head.slots.len());
            let mut payload = Vec::new();
            for i in 0..write.head.slots.len() {
                let slot = write.head.slots[i];
                let addr = write.base + slot.index;
                let now = match batch.get(&addr) {
                    Some(entry) => Some(*entry),
                    None => self.entry(addr).flatten(),
                };
                let applied = write.kind == RecordKind::Write && self.replaces(&write, &slot, now);
                tracing::trace!(
                    "disk {:02x}: {}:{} {:?} of {} group {} version {} {} syncing {:?}, had {:?}: {}",
                    self.uuid[0],
                    write.head.mirror,
                    slot.index,
                    write.head.mode,
                    write.head.writer.node,
                    write.head.wseq,
                    slot.version.epoch(),
                    counter(slot.version),
                    write.syncing_from,
                    now.map(|n| (n.version.epoch(), counter(n.version))),
                    if applied { "written" } else { "left" },
                );
                // Directly home only where nothing durable can be lost by it, and no older contents are on their way.
                let direct = write.head.fresh_data
                    && !batch.contains_key(&addr)
                    && !self.is_allocated(addr)
                    && !self.overlay.contains_key(&addr)
                    && !self.writing_home.contains(&addr);
                let mut in_log = false;
                if applied {
                    batch.insert(addr, slot.entry());
                    if let Some(data) = &write.data[i] {
                        if direct {
                            plan.home.push((addr, data.clone()));
                            write.data[i] = None;
                        } else {
                            payload.push(data.clone());
                            in_log = true;
                        }
                    }
                }
                slots.push(LogSlot { slot, in_log, applied });
            }
            let record = Record {
                kind: write.kind,
                sequence,
                durable: self.durable,
                mirror: write.head.mirror,
                base: write.base,
                epoch: write.epoch,
                writer: write.head.writer,
                wseq: write.head.wseq,
                completed_upto: write.head.completed_upto,
                slots,
            };
            let (head, sum) = record.encode(&self.uuid, &chain);
            plan.parts.push(head);
            plan.parts.append(&mut payload);
            plan.records.push((record, sum, write));
            sequence += 1;
            chain = sum;
        }
        plan
    }

    /// The planned batch is durable: makes it visible.
    pub(crate) fn commit(&mut self, plan: Plan) {
        for (record, sum, write) in plan.records {
            self.marks.push_back(self.log.head());
            self.log.append(record.blocks(), sum);
            let mut data = write.data;
            // `plan` took the contents that went directly home; those that were not applied have none in the log.
            self.apply(&record, &mut data, true);
        }
        self.pinned.clear();
        self.durable = self.log.head().sequence - 1;
    }

    /// Takes in a record: at commit, and at replay. `data`: per slot, contents that are in the log.
    fn apply(&mut self, record: &Record, data: &mut Vec<Option<Bytes>>, live: bool) {
        for (i, s) in record.slots.iter().enumerate() {
            self.clock = self.clock.max(counter(s.slot.version));
            if !s.applied {
                continue;
            }
            let addr = record.base + s.slot.index;
            self.set_entry(addr, s.slot.entry());
            match data.get(i).cloned().flatten() {
                Some(data) if s.in_log => {
                    self.overlay.insert(addr, Pending { data, sequence: record.sequence });
                }
                _ => {
                    self.overlay.remove(&addr);
                }
            }
        }
        let key = (record.mirror, record.writer);
        match record.kind {
            RecordKind::Forget => self.forget(record.mirror, Some(record.writer).filter(|w| w.node.0 != 0)),
            RecordKind::Write | RecordKind::Carry if record.wseq != 0 => {
                self.complete(record.mirror, record.writer, record.completed_upto);
                if self.completed.get(&key).is_none_or(|upto| *upto < record.wseq) {
                    let groups = self.uncertain.entry(record.mirror).or_default();
                    if record.kind == RecordKind::Carry
                        && let Some(group) = groups.get_mut(&(record.writer, record.wseq))
                    {
                        group.sequence = record.sequence;
                        return;
                    }
                    if record.kind == RecordKind::Carry && live {
                        // Became certain while its repetition was being written.
                        return;
                    }
                    let head = WriteHead {
                        mirror: record.mirror,
                        mode: WriteMode::Normal,
                        writer: record.writer,
                        wseq: record.wseq,
                        completed_upto: record.completed_upto,
                        clock: 0,
                        fresh_data: false,
                        slots: record.slots.iter().map(|s| s.slot).collect(),
                    };
                    let data = std::mem::take(data);
                    let group = Uncertain { head, data, base: record.base, epoch: record.epoch, sequence: record.sequence };
                    groups.insert((record.writer, record.wseq), group);
                }
            }
            RecordKind::Write | RecordKind::Carry => {}
        }
    }

    // --- uncertain groups ---

    /// A writer's groups up to a number are complete on all members.
    pub(crate) fn complete(&mut self, mirror: MirrorId, writer: Writer, upto: u64) {
        let known = self.completed.entry((mirror, writer)).or_default();
        if *known >= upto {
            return;
        }
        *known = upto;
        if let Some(groups) = self.uncertain.get_mut(&mirror) {
            while let Some((key, _)) = groups.range((writer, 0)..=(writer, upto)).next() {
                let key = *key;
                groups.remove(&key);
            }
        }
    }

    /// Groups of a mirror are no longer uncertain.
    pub(crate) fn forget(&mut self, mirror: MirrorId, writer: Option<Writer>) {
        match (writer, self.uncertain.get_mut(&mirror)) {
            (Some(writer), groups) => {
                if let Some(groups) = groups {
                    groups.retain(|(w, _), _| *w != writer);
                }
                self.completed.remove(&(mirror, writer));
            }
            (None, _) => {
                self.uncertain.remove(&mirror);
                self.completed.retain(|(m, _), _| *m != mirror);
            }
        }
    }

    /// Writers with uncertain groups in a mirror.
    pub(crate) fn uncertain_writers(&self, mirror: MirrorId) -> BTreeSet<Writer> {
        self.uncertain.get(&mirror).into_iter().flat_map(|g| g.keys().map(|(w, _)| *w)).collect()
    }

    /// Uncertain groups of a mirror after a place, in order.
    pub(crate) fn uncertain_after(
        &self,
        mirror: MirrorId,
        after: Option<(Writer, u64)>,
    ) -> impl Iterator<Item = &Uncertain> + use<'_> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.uncertain.get(&mirror).into_iter().flat_map(move |g| g.range((from, Unbounded)).map(|(_, u)| u))
    }

    /// Whether a block's version belongs to an uncertain group.
    pub(crate) fn is_uncertain(&self, mirror: MirrorId, index: u32, version: Version) -> bool {
        let groups = self.uncertain.get(&mirror);
        groups.is_some_and(|g| g.values().any(|u| u.head.slots.iter().any(|s| s.index == index && s.version == version)))
    }

    /// Records that must be repeated so that the log can be released up to its head.
    pub(crate) fn carry(&self, upto: u64) -> Vec<Incoming> {
        self.uncertain
            .values()
            .flat_map(BTreeMap::values)
            .filter(|g| g.sequence < upto)
            .map(|g| Incoming {
                kind: RecordKind::Carry,
                data: vec![None; g.head.slots.len()],
                head: g.head.clone(),
                base: g.base,
                epoch: g.epoch,
                syncing_from: None,
            })
            .collect()
    }

    // --- checkpoint ---

    /// Blocks and tags that are not home yet.
    pub(crate) fn dirty(&self) -> (usize, usize) {
        (self.overlay.len(), self.tags_dirty)
    }

    /// Whether so many tag blocks are dirty that a checkpoint is due.
    pub(crate) fn tags_crowded(&self) -> bool {
        self.tags_dirty > self.tags_max / 2
    }

    /// Collects what must be written home so that the log up to here is not needed.
    pub(crate) fn checkpoint_begin(&mut self) -> Checkpoint {
        let home: Vec<_> = self.overlay.iter().map(|(addr, p)| (*addr, p.data.clone(), p.sequence)).collect();
        self.writing_home = home.iter().map(|(addr, ..)| *addr).collect();
        let mut dirty: Vec<_> = self
            .tags
            .iter()
            .filter(|(_, t)| t.dirty != 0)
            .map(|(b, t)| (*b, Bytes::copy_from_slice(&t.bytes), t.dirty))
            .collect();
        dirty.sort_unstable_by_key(|(b, ..)| *b);
        let tag_marks = dirty.iter().map(|(.., mark)| *mark).collect();
        let tags = dirty.into_iter().map(|(b, bytes, _)| (b, bytes)).collect();
        let bitmap = std::mem::take(&mut self.bitmap_dirty).into_iter().map(|b| (b, self.bitmap_block(b))).collect();
        Checkpoint { upto: self.log.head(), home, tags, tag_marks, bitmap }
    }

    fn bitmap_block(&self, block: u32) -> Bytes {
        let words = BLOCK_SIZE / 8;
        let start = block as usize * words;
        let mut bytes = Vec::with_capacity(BLOCK_SIZE);
        self.bitmap[start..start + words].iter().for_each(|w| bytes.extend_from_slice(&w.to_le_bytes()));
        bytes.into()
    }

    /// What the checkpoint wrote is durable. Returns the label to write, if the tail can move.
    pub(crate) fn checkpoint_end(&mut self, checkpoint: &Checkpoint) -> Option<Label> {
        for (addr, _, sequence) in &checkpoint.home {
            if self.overlay.get(addr).is_some_and(|p| p.sequence == *sequence) {
                self.overlay.remove(addr);
            }
        }
        self.writing_home.clear();
        for ((block, _), mark) in checkpoint.tags.iter().zip(&checkpoint.tag_marks) {
            if let Some(tags) = self.tags.peek_mut(block)
                && tags.dirty == *mark
            {
                tags.dirty = 0;
                self.tags_dirty -= 1;
            }
        }
        self.generation += 1;
        let pinned = self.uncertain.values().flat_map(BTreeMap::values).map(|g| g.sequence).min();
        let upto = pinned.map_or(checkpoint.upto.sequence, |p| p.min(checkpoint.upto.sequence));
        let first = self.log.tail().sequence;
        if upto <= first {
            return None;
        }
        let mark = self.marks.get((upto - first) as usize).copied().unwrap_or(self.log.head());
        debug_assert_eq!(mark.sequence, upto);
        let mut label = self.label.clone();
        label.generation += 1;
        label.tail_pos = mark.pos;
        label.tail_sequence = mark.sequence;
        label.tail_chain = mark.chain;
        label.clock = self.clock;
        Some(label)
    }

    /// The label is durable: its log space can be used again.
    pub(crate) fn release(&mut self, label: Label) {
        let mark = Mark { pos: label.tail_pos, sequence: label.tail_sequence, chain: label.tail_chain };
        while self.marks.front().is_some_and(|m| m.sequence < mark.sequence) {
            self.marks.pop_front();
        }
        self.log.release(mark);
        self.label = label;
    }

    // --- replay ---

    /// Takes in a valid record that was read from the log at opening. Its tag blocks are in memory.
    pub(crate) fn replay(&mut self, record: &Record, sum: Checksum, payload: &Bytes) {
        self.marks.push_back(self.log.head());
        self.log.append(record.blocks(), sum);
        let mut at = 0;
        let mut data: Vec<_> = record
            .slots
            .iter()
            .map(|s| {
                s.in_log.then(|| {
                    at += BLOCK_SIZE;
                    payload.slice(at - BLOCK_SIZE..at)
                })
            })
            .collect();
        self.apply(record, &mut data, false);
        self.durable = record.sequence;
    }

    /// Whether a record's places are on this disk.
    pub(crate) fn fits(&self, record: &Record) -> bool {
        record.slots.iter().all(|s| record.base.checked_add(s.slot.index).is_some_and(|a| a < self.geometry.data_blocks))
    }

    // --- space ---

    /// Free blocks of a region of a copy: bit set means free. `blocks`: size of the copy.
    pub(crate) fn region_free(&self, base: u32, region: u32, blocks: u32) -> Vec<u64> {
        let first = u64::from(region) * u64::from(REGION_BLOCKS);
        (0..u64::from(REGION_BLOCKS) / 64)
            .map(|w| {
                (0..64).fold(0, |word, bit| {
                    let index = first + w * 64 + bit;
                    let free = index < u64::from(blocks) && !self.is_allocated(base + index as u32);
                    word | u64::from(free) << bit
                })
            })
            .collect()
    }

    /// Free blocks of each region of a copy.
    pub(crate) fn free_counts(&self, base: u32, blocks: u32) -> Vec<u32> {
        (0..blocks.div_ceil(REGION_BLOCKS))
            .map(|region| {
                let start = base + region * REGION_BLOCKS;
                let len = (blocks - region * REGION_BLOCKS).min(REGION_BLOCKS);
                len - self.count_allocated(start, len)
            })
            .collect()
    }

    fn count_allocated(&self, start: u32, len: u32) -> u32 {
        let end = start + len;
        let mut count = 0;
        let mut at = start;
        while at < end {
            let (word, bit) = (at as usize / 64, at % 64);
            let take = (64 - bit).min(end - at);
            let mask = if take == 64 { u64::MAX } else { ((1 << take) - 1) << bit };
            count += (self.bitmap.get(word).copied().unwrap_or(0) & mask).count_ones();
            at += take;
        }
        count
    }

    /// Asserts what must hold between steps.
    #[cfg(test)]
    pub(crate) fn check_invariants(&self) {
        assert_eq!(self.tags_dirty, self.tags.iter().filter(|(_, t)| t.dirty != 0).count());
        assert_eq!(self.marks.len() as u64, self.log.head().sequence - self.log.tail().sequence);
        if let Some(first) = self.marks.front() {
            assert_eq!(*first, self.log.tail());
        }
        for group in self.uncertain.values().flat_map(BTreeMap::values) {
            assert!(group.sequence >= self.log.tail().sequence, "an uncertain group's record was released");
        }
        for pending in self.overlay.values() {
            assert!(pending.sequence >= self.log.tail().sequence, "contents that are not home were released");
        }
    }
}
