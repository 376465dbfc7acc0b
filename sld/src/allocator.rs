//! Free blocks in the regions that this node leases, and the blocks that it has allocated and that are not durable yet.
//!
//! A block goes: free → *unwritten* (given out) → *written* (an operation wrote to it) → durable; from each it may go back.
//! Inodes and single blocks come from other regions than runs of data, so that neither splits the other's space.
//!
//! Invariants:
//! - A block is given out only if it is free on the disks, its region is leased here, and nobody has a token on it as an
//!   inode or had it reserved when the region was leased (those are `busy` for the whole lease).
//! - A block is not given out again before it came back.
//! - A region that is handed over takes with it the list of its blocks that are not durable yet (`reserved`).
//!
//! Excludes: getting leases (the shell), who frees (`writeback`).

use crate::api::{Extent, Mode};
use crate::holder::Forgotten;
use cluster::{BlockNo, MirrorId};
use mirror::{REGION_BLOCKS, Space};
use std::collections::{BTreeMap, BTreeSet};

/// Regions of one kind that are kept at most; the fullest ones go back beyond that.
pub const REGIONS_MAX: usize = 8;
/// A kind of use with fewer free blocks than this gets another region.
const LOW: u32 = 512;
const WORDS: usize = (REGION_BLOCKS / 64) as usize;

/// A region: its mirror, and its number within it.
pub type RegionId = (MirrorId, u32);

/// What a region is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Inodes and other single blocks.
    Meta,
    /// Runs of data.
    Data,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Unwritten,
    Adopted,
    Written,
}

#[derive(Clone, Debug)]
struct Region {
    /// Set: may be given out.
    words: Vec<u64>,
    free: u32,
    cursor: u32,
    busy: BTreeSet<u32>,
    use_: Use,
    /// While its free blocks are being read: what happened to blocks since (true: came back).
    loading: Option<(u64, BTreeMap<u32, bool>)>,
    /// To be given up: nothing more is given out.
    closed: bool,
}

impl Region {
    fn set(&mut self, i: u32, free: bool) {
        if let Some((_, changes)) = &mut self.loading {
            changes.insert(i, free);
        }
        let free = free && !self.busy.contains(&i);
        if let Some(w) = self.words.get_mut((i / 64) as usize) {
            let bit = 1u64 << (i % 64);
            if (*w & bit != 0) != free {
                *w ^= bit;
                self.free = if free { self.free + 1 } else { self.free - 1 };
            }
        }
    }

    fn get(&self, i: u32) -> bool {
        self.words.get((i / 64) as usize).is_some_and(|w| w & (1 << (i % 64)) != 0)
    }

    /// How many free blocks follow from `i` on, up to `max`.
    fn run(&self, i: u32, max: u32) -> u32 {
        (0..max).take_while(|k| self.get(i + k)).count() as u32
    }

    /// The first free block at or after `i`.
    fn next_free(&self, i: u32) -> Option<u32> {
        let mut w = (i / 64) as usize;
        let mut word = self.words.get(w)? & (!0u64 << (i % 64));
        while word == 0 {
            w += 1;
            word = *self.words.get(w)?;
        }
        Some(w as u32 * 64 + word.trailing_zeros())
    }

    /// The first run of `count` blocks from `from` on, else from the start, else the longest one.
    fn find(&self, from: u32, count: u32) -> Option<(u32, u32)> {
        let mut best: Option<(u32, u32)> = None;
        for start in [from, 0] {
            let mut at = start;
            while let Some(i) = self.next_free(at) {
                let n = self.run(i, count);
                if n == count {
                    return Some((i, n));
                }
                if best.is_none_or(|(_, b)| n > b) {
                    best = Some((i, n));
                }
                at = i + n + 1;
            }
        }
        best
    }
}

/// A question about an inode that may be about to be adopted; answered when that is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Of its master: for `Holder::answer`.
    Revoke {
        /// The master's number.
        seq: u64,
        /// What may stay.
        keep: Option<Mode>,
    },
    /// Of an operation of this node: for `Holder::consent`.
    Local,
}

/// What came of a change to allocated blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Blocks whose regions are not leased any more: the master is told that they are reserved no longer.
    pub unreserve: Vec<BlockNo>,
    /// Questions to be answered now.
    pub answers: Vec<(BlockNo, Question)>,
}

/// See the module's description.
#[derive(Clone, Debug, Default)]
pub struct Allocator {
    regions: BTreeMap<RegionId, Region>,
    pending: BTreeMap<BlockNo, Pending>,
    questions: BTreeMap<BlockNo, Vec<Question>>,
    next_load: u64,
}

fn split(block: BlockNo) -> (RegionId, u32) {
    ((block.mirror, block.index / REGION_BLOCKS), block.index % REGION_BLOCKS)
}

fn join(region: RegionId, i: u32) -> BlockNo {
    BlockNo::new(region.0, region.1 * REGION_BLOCKS + i)
}

impl Allocator {
    /// Takes up to `count` blocks; `None` if no leased region has any.
    pub fn alloc(&mut self, near: Option<BlockNo>, count: u32) -> Option<Extent> {
        let count = count.clamp(1, REGION_BLOCKS);
        let use_ = if count == 1 { Use::Meta } else { Use::Data };
        let usable = |r: &Region| !r.closed && r.free > 0;
        if let Some(near) = near {
            let (id, i) = split(near);
            // Runs of data do not go into the regions of inodes, unless they go on in one.
            if let Some(r) = self.regions.get(&id).filter(|r| usable(r)) {
                let next = r.run(i + 1, count);
                if next > 0 && (count == 1 || r.use_ == Use::Data) {
                    return Some(self.take(id, i + 1, next));
                }
                if (count == 1 || r.use_ == Use::Data)
                    && let Some((at, n)) = r.find(i + 1, count)
                {
                    return Some(self.take(id, at, n));
                }
            }
        }
        let mirror = near.map(|n| n.mirror);
        let order = |(id, r): &(&RegionId, &Region)| (Some(id.0) != mirror, r.use_ != use_, r.free < count, **id);
        let (id, r) = self.regions.iter().filter(|(_, r)| usable(r)).min_by_key(order)?;
        let (id, (at, n)) = (*id, r.find(r.cursor, count)?);
        Some(self.take(id, at, n))
    }

    fn take(&mut self, id: RegionId, at: u32, n: u32) -> Extent {
        if let Some(r) = self.regions.get_mut(&id) {
            for i in at..at + n {
                r.set(i, false);
            }
            r.cursor = at + n;
        }
        for i in at..at + n {
            self.pending.insert(join(id, i), Pending::Unwritten);
        }
        Extent { start: join(id, at), len: n }
    }

    /// Whether a block is allocated here and nothing of it is durable.
    #[must_use]
    pub fn is_pending(&self, block: BlockNo) -> bool {
        self.pending.contains_key(&block)
    }

    /// Blocks allocated here that are not durable.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// An operation writes to a block.
    pub fn wrote(&mut self, block: BlockNo, outcome: &mut Outcome) {
        if let Some(p) = self.pending.get_mut(&block) {
            *p = Pending::Written;
            self.decided(block, outcome);
        }
    }

    /// A block is adopted as an inode.
    pub fn adopted(&mut self, block: BlockNo, outcome: &mut Outcome) {
        if let Some(p) = self.pending.get_mut(&block) {
            if *p == Pending::Unwritten {
                *p = Pending::Adopted;
            }
            self.decided(block, outcome);
        }
    }

    fn decided(&mut self, block: BlockNo, outcome: &mut Outcome) {
        if !self.questions.is_empty() {
            let questions = self.questions.remove(&block).unwrap_or_default();
            if !questions.is_empty() {
                self.known(block);
            }
            outcome.answers.extend(questions.into_iter().map(|q| (block, q)));
        }
    }

    /// A block's first contents are durable.
    pub fn durable(&mut self, block: BlockNo, outcome: &mut Outcome) {
        if self.pending.remove(&block).is_some() {
            let (id, i) = split(block);
            match self.regions.get_mut(&id) {
                Some(r) => r.set(i, false),
                None => outcome.unreserve.push(block),
            }
        }
    }

    /// A block is free on the disks, or was never written.
    pub fn freed(&mut self, block: BlockNo, token: Forgotten, outcome: &mut Outcome) {
        let (id, i) = split(block);
        let pending = self.pending.remove(&block).is_some();
        let asked = self.questions.contains_key(&block);
        self.decided(block, outcome);
        match self.regions.get_mut(&id) {
            Some(r) => {
                if asked || matches!(token, Forgotten::Kept | Forgotten::Released) {
                    r.busy.insert(i);
                } else if token == Forgotten::Dropped {
                    r.busy.remove(&i);
                }
                r.set(i, true);
            }
            None if pending => outcome.unreserve.push(block),
            None => {}
        }
    }

    /// Nobody has a token any more on a block that was freed.
    pub fn forgotten(&mut self, block: BlockNo) {
        let (id, i) = split(block);
        if let Some(r) = self.regions.get_mut(&id)
            && r.busy.remove(&i)
        {
            r.set(i, true);
        }
    }

    /// Blocks given back to which nothing was written.
    pub fn unalloc(&mut self, extent: Extent, outcome: &mut Outcome) {
        for k in 0..extent.len {
            let block = BlockNo::new(extent.start.mirror, extent.start.index + k);
            match self.pending.get(&block) {
                Some(Pending::Unwritten) => self.freed(block, Forgotten::Absent, outcome),
                Some(Pending::Adopted) => self.freed(block, Forgotten::Kept, outcome),
                Some(Pending::Written) | None => {}
            }
        }
    }

    /// Somebody asks for a block as an inode. If the block has just been allocated, the answer waits until it is known
    /// what becomes of it (false); otherwise it will not be given out in this lease (true).
    pub fn asked(&mut self, block: BlockNo, question: Question) -> bool {
        if self.pending.get(&block) == Some(&Pending::Unwritten) {
            self.questions.entry(block).or_default().push(question);
            return false;
        }
        self.known(block);
        true
    }

    /// Somebody has a token on a block as an inode.
    pub fn known(&mut self, block: BlockNo) {
        let (id, i) = split(block);
        if let Some(r) = self.regions.get_mut(&id) {
            r.busy.insert(i);
            let changes = r.loading.take();
            r.set(i, false);
            r.loading = changes; // not a change on the disks
        }
    }

    /// A lease was granted, or what must not be allocated was told anew: its free blocks have now to be read and given to
    /// `loaded` with the number returned.
    pub fn leased(&mut self, id: RegionId, use_: Use, busy: &[u32]) -> u64 {
        self.next_load += 1;
        let r = self.regions.entry(id).or_insert_with(|| Region {
            words: vec![0; WORDS],
            free: 0,
            cursor: 0,
            busy: BTreeSet::new(),
            use_,
            loading: None,
            closed: false,
        });
        r.closed = false;
        r.busy = busy.iter().filter(|i| **i / REGION_BLOCKS == id.1).map(|i| i % REGION_BLOCKS).collect();
        r.loading = None;
        let all: Vec<u32> = r.busy.iter().copied().filter(|i| r.get(*i)).collect();
        for i in all {
            r.set(i, false);
        }
        r.loading = Some((self.next_load, BTreeMap::new()));
        self.next_load
    }

    /// What is free in a region on the disks. Returns whether the lease is still there.
    pub fn loaded(&mut self, id: RegionId, load: u64, blocks: u32, free: &[u64]) -> bool {
        let Some(r) = self.regions.get_mut(&id) else { return false };
        if r.loading.as_ref().is_none_or(|(n, _)| *n != load) {
            return false;
        }
        let changes = r.loading.take().map(|(_, c)| c).unwrap_or_default();
        let size = blocks.saturating_sub(id.1.saturating_mul(REGION_BLOCKS)).min(REGION_BLOCKS);
        r.words = (0..WORDS as u32)
            .map(|w| {
                let inside = size.saturating_sub(w * 64).min(64);
                let mask = if inside == 64 { !0 } else { (1u64 << inside) - 1 };
                free.get(w as usize).copied().unwrap_or(0) & mask
            })
            .collect();
        r.free = r.words.iter().map(|w| w.count_ones()).sum();
        for (i, free) in changes {
            r.set(i, free);
        }
        let busy: Vec<u32> = r.busy.iter().copied().collect();
        let pending = self.pending.range(join(id, 0)..=join(id, REGION_BLOCKS - 1)).map(|(b, _)| split(*b).1);
        for i in busy.into_iter().chain(pending) {
            r.set(i, false);
        }
        true
    }

    /// Nothing more is given out of a region. Returns its blocks that are written and should be flushed.
    pub fn close(&mut self, id: RegionId) -> Vec<BlockNo> {
        if let Some(r) = self.regions.get_mut(&id) {
            r.closed = true;
        }
        let range = join(id, 0)..=join(id, REGION_BLOCKS - 1);
        self.pending.range(range).filter(|(_, p)| **p == Pending::Written).map(|(b, _)| *b).collect()
    }

    /// A region is given up. Returns its blocks that are reserved (indexes within the mirror).
    pub fn gone(&mut self, id: RegionId) -> Vec<u32> {
        self.regions.remove(&id);
        let range = join(id, 0)..=join(id, REGION_BLOCKS - 1);
        self.pending.range(range).map(|(b, _)| b.index).collect()
    }

    /// What a region is used for, if it is leased.
    #[must_use]
    pub fn use_of(&self, id: RegionId) -> Option<Use> {
        self.regions.get(&id).map(|r| r.use_)
    }

    /// The kinds of use that are short of free blocks.
    #[must_use]
    pub fn short(&self) -> Option<Use> {
        [Use::Meta, Use::Data].into_iter().find(|u| {
            let free: u32 = self.regions.values().filter(|r| r.use_ == *u && !r.closed).map(|r| r.free).sum();
            free < LOW && !self.regions.values().any(|r| r.use_ == *u && r.loading.is_some())
        })
    }

    /// Whether a region is leased.
    #[must_use]
    pub fn is_leased(&self, id: RegionId) -> bool {
        self.regions.contains_key(&id)
    }

    /// Regions that are worth asking for, best first. `mine`: whether this node is the region's master. Includes leased
    /// ones in which the disks have more free blocks than are known here (others have freed some).
    #[must_use]
    pub fn candidates(
        &self,
        spaces: &[(MirrorId, Space)],
        near: Option<MirrorId>,
        mine: impl Fn(RegionId) -> bool,
    ) -> Vec<RegionId> {
        let mut all = Vec::new();
        for (mirror, space) in spaces {
            for (n, free) in space.free.iter().enumerate() {
                let id = (*mirror, n as u32);
                let range = join(id, 0)..=join(id, REGION_BLOCKS - 1);
                let known = match self.regions.get(&id) {
                    Some(r) if r.closed || r.loading.is_some() => continue,
                    Some(r) => r.free + self.pending.range(range).count() as u32,
                    None => 0,
                };
                if *free > known {
                    let leased = self.regions.contains_key(&id);
                    all.push((Some(*mirror) != near && near.is_some(), leased, !mine(id), std::cmp::Reverse(*free - known), id));
                }
            }
        }
        all.sort();
        all.into_iter().map(|a| a.4).collect()
    }

    /// Regions that are of no more use here, or too many.
    #[must_use]
    pub fn surplus(&self) -> Vec<RegionId> {
        let mut out = Vec::new();
        for u in [Use::Meta, Use::Data] {
            let of = self.regions.iter().filter(|(_, r)| r.use_ == u && !r.closed && r.loading.is_none());
            let mut of: Vec<(u32, RegionId)> = of.map(|(id, r)| (r.free, *id)).collect();
            of.sort();
            let count = of.len();
            out.extend(
                of.iter()
                    .take(count.saturating_sub(1))
                    .enumerate()
                    .filter(|(i, (free, _))| *free == 0 || count - i > REGIONS_MAX)
                    .map(|(_, (_, id))| *id),
            );
        }
        out
    }

    /// Regions leased.
    #[must_use]
    pub fn regions(&self) -> Vec<RegionId> {
        self.regions.keys().copied().collect()
    }

    /// Free blocks in leased regions.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.regions.values().map(|r| u64::from(r.free)).sum()
    }

    /// Everything is lost.
    pub fn reset(&mut self) {
        *self = Allocator { next_load: self.next_load, ..Allocator::default() };
    }

    /// Panics if an invariant is broken.
    pub fn check_invariants(&self) {
        for (id, r) in &self.regions {
            assert_eq!(r.free, r.words.iter().map(|w| w.count_ones()).sum::<u32>(), "free count of {id:?}");
            for i in &r.busy {
                assert!(!r.get(*i), "{id:?}: {i} is busy and free");
            }
        }
        for b in self.pending.keys() {
            let (id, i) = split(*b);
            assert!(self.regions.get(&id).is_none_or(|r| !r.get(i)), "{b} is free and allocated");
        }
    }
}
