//! Ordered write-behind: versions of blocks that are not durable yet, and the order in which they are written.
//!
//! Every version has a *level*: at least that of each version it comes after, and above it if that one is in another
//! mirror. All dirty versions of one mirror and level fit into one group, and groups are atomic; so what may be a circle
//! of edges (operations whose contents were merged into one version of a block) lies within one mirror and level, and is
//! written as one. New contents merge into a block's newest version if the level that they need is not above its own.
//!
//! Invariants:
//! - A version is submitted when each version it comes after is durable, or is in the same mirror and was submitted
//!   before or in the same group (a mirror's groups become durable in the order in which they were submitted).
//! - A version in flight never changes. A block's versions are written in order.
//! - Fresh data comes after nothing, and is written before everything that comes after it.
//! - Whatever a wanted version comes after is wanted, too.
//!
//! Bounds: `dirty_bytes` is bounded by the callers of `commit` (`Disk::admit`).
//!
//! Excludes: calling `Mirrors` (the shell), clean blocks (`cache`).

use crate::api::{After, Block, Content, FlushTarget, ObjectId, Operation, WriteClass};
use cluster::{BLOCK_SIZE, BlockNo, Instant, MirrorId};
use mirror::{BlockWrite, Tag, WriteGroup};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Blocks in one group of fresh data: 1 MiB.
pub const FRESH_RUN: usize = 256;
/// What a freed block counts as, so that frees are bounded, too.
const FREE_BYTES: usize = 128;

/// Names a version. Grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionId(pub u64);

/// Names a submitted group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Names a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlushId(pub u64);

#[derive(Clone)]
struct Version {
    block: BlockNo,
    object: ObjectId,
    content: Content,
    tag: Tag,
    class: WriteClass,
    level: u64,
    /// Not yet durable versions that it comes after.
    deps: BTreeSet<VersionId>,
    /// It comes after all data of these objects up to a version.
    data_of: Vec<(ObjectId, VersionId)>,
    dependents: BTreeSet<VersionId>,
    wanted: bool,
    ticket: Option<Ticket>,
    /// The block's first version since it was allocated here: nothing of it is on the disk.
    first: bool,
    born: Instant,
    flushes: Vec<FlushId>,
}

impl std::fmt::Debug for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.content == Content::Free { "free" } else { "data" };
        write!(f, "{} {what} level {} {:?}", self.block, self.level, self.class)?;
        write!(f, " after {:?} {:?} wanted {} in {:?}", self.deps, self.data_of, self.wanted, self.ticket)
    }
}

impl Version {
    fn bytes(&self) -> usize {
        match self.content {
            Content::Data(_) => BLOCK_SIZE,
            Content::Free => FREE_BYTES,
        }
    }

    fn key(&self) -> ((MirrorId, u64), WriteClass) {
        ((self.block.mirror, self.level), self.class)
    }

    fn is_data(&self) -> bool {
        self.class != WriteClass::Metadata && matches!(self.content, Content::Data(_))
    }
}

#[derive(Clone, Debug, Default)]
struct Object {
    all: BTreeSet<VersionId>,
    data: BTreeMap<MirrorId, BTreeSet<VersionId>>,
    /// An upper bound of the levels of the data in each mirror.
    data_level: BTreeMap<MirrorId, u64>,
    data_unwanted: usize,
    /// Versions that come after this object's data.
    data_waiters: BTreeSet<VersionId>,
}

/// A group to be handed to the mirror, in the order in which they are returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submission {
    /// To be given to `acked`.
    pub ticket: Ticket,
    /// Where.
    pub mirror: MirrorId,
    /// What.
    pub group: WriteGroup,
}

/// What became of versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Newest contents that are durable now: they go to the cache.
    pub clean: Vec<(BlockNo, ObjectId, Block)>,
    /// Durable blocks (their first version, if they were allocated here).
    pub durable: Vec<BlockNo>,
    /// Blocks that are free and may be allocated again.
    pub freed: Vec<BlockNo>,
    /// Flushes that are complete.
    pub flushed: Vec<FlushId>,
}

/// Switches off a rule, so that tests can show that they would notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Planted {
    /// All rules hold.
    #[default]
    None,
    /// Edges to other mirrors do not wait.
    IgnoreCrossEdges,
    /// Contents merge whatever level they need.
    CoalesceAlways,
    /// A freed block's versions are dropped whoever needs them.
    CancelAlways,
}

/// See the module's description.
#[derive(Clone, Debug, Default)]
pub struct WriteBack {
    versions: BTreeMap<VersionId, Version>,
    /// Versions of each block, oldest first.
    chains: BTreeMap<BlockNo, VecDeque<VersionId>>,
    objects: BTreeMap<ObjectId, Object>,
    /// Dirty (not submitted) versions per mirror and level, other than fresh data.
    batches: BTreeMap<(MirrorId, u64), usize>,
    /// Wanted, not submitted, other than fresh data.
    queue: BTreeMap<MirrorId, BTreeMap<u64, BTreeSet<VersionId>>>,
    /// Wanted fresh data, not submitted.
    fresh: BTreeMap<BlockNo, VersionId>,
    tickets: BTreeMap<Ticket, Vec<VersionId>>,
    /// Acknowledged, but not yet taken in: an earlier one of the same mirror is still under way.
    acked_early: BTreeSet<Ticket>,
    flushes: BTreeMap<FlushId, usize>,
    next: u64,
    bytes: usize,
    unwanted_bytes: usize,
    frees: usize,
    /// Everything up to here is wanted, or gone.
    swept: VersionId,
    planted: Planted,
}

impl WriteBack {
    /// With one rule switched off, for tests.
    #[must_use]
    pub fn planted(planted: Planted) -> Self {
        WriteBack { planted, ..WriteBack::default() }
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Bytes not yet durable.
    #[must_use]
    pub fn dirty_bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that nobody has asked to be written yet.
    #[must_use]
    pub fn unwanted_bytes(&self) -> usize {
        self.unwanted_bytes
    }

    /// Whether everything is durable.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.versions.is_empty()
    }

    /// A block's newest contents, if they are not durable.
    #[must_use]
    pub fn newest(&self, block: BlockNo) -> Option<&Content> {
        let id = self.chains.get(&block)?.back()?;
        self.versions.get(id).map(|v| &v.content)
    }

    /// Whether something of an object is not durable.
    #[must_use]
    pub fn is_dirty(&self, object: ObjectId) -> bool {
        self.objects.get(&object).is_some_and(|o| !o.all.is_empty())
    }

    /// Takes in an operation. `first` says whether nothing has ever been written to a block since it was allocated here.
    /// Returns what was settled by it: versions of blocks that were freed before they were written.
    pub fn commit(&mut self, now: Instant, operation: Operation, first: impl Fn(BlockNo) -> bool) -> Settled {
        let start = VersionId(self.next + 1);
        let mut made: Vec<Option<VersionId>> = Vec::with_capacity(operation.writes.len());
        let mut settled = Settled::default();
        for w in operation.writes {
            let (mut deps, mut data_of) = (BTreeSet::new(), Vec::new());
            for after in &w.after {
                match after {
                    After::Write(i) => deps.extend(made.get(i.0).copied().flatten().filter(|d| self.versions.contains_key(d))),
                    After::Block(b) => {
                        let chain = self.chains.get(b);
                        deps.extend(chain.and_then(|c| c.iter().rev().find(|v| **v < start)).copied());
                    }
                    After::DataOf(o) => {
                        if self.objects.get(o).is_some_and(|o| !o.data.is_empty()) {
                            data_of.push((*o, VersionId(self.next)));
                        }
                    }
                }
            }
            let id = if w.content == Content::Free && self.cancel(w.block, &deps, &data_of, &mut settled) {
                None
            } else {
                let first = first(w.block) && !self.chains.contains_key(&w.block);
                Some(self.put(Version {
                    block: w.block,
                    object: w.object,
                    content: w.content,
                    tag: w.tag,
                    class: w.class,
                    level: 0,
                    deps,
                    data_of,
                    dependents: BTreeSet::new(),
                    wanted: false,
                    ticket: None,
                    first,
                    born: now,
                    flushes: Vec::new(),
                }))
            };
            made.push(id);
        }
        settled
    }

    /// The level that `v` needs for what it comes after.
    fn needed(&self, v: &Version) -> u64 {
        let above = |mirror: MirrorId, level: u64| level + u64::from(mirror != v.block.mirror);
        let deps = v.deps.iter().filter_map(|d| self.versions.get(d)).map(|d| above(d.block.mirror, d.level));
        let data = v.data_of.iter().filter_map(|(o, _)| self.objects.get(o));
        let data = data.flat_map(|o| o.data_level.iter()).map(|(m, l)| above(*m, *l));
        deps.chain(data).max().unwrap_or(0)
    }

    fn put(&mut self, mut v: Version) -> VersionId {
        let newest = self.chains.get(&v.block).and_then(|c| c.back().copied());
        // An edge to what has been submitted to the same mirror before is kept by the mirror's order.
        let mirror = v.block.mirror;
        v.deps.retain(|d| {
            Some(*d) != newest && self.versions.get(d).is_some_and(|d| d.ticket.is_none() || d.block.mirror != mirror)
        });
        let needed = self.needed(&v);
        if let Some(id) = newest
            && self.merges(id, &v, needed)
        {
            self.merge(id, v);
            return id;
        }
        let below = newest.and_then(|id| self.versions.get(&id)).filter(|w| w.ticket.is_none()).map(|w| (w.level, w.class));
        if v.class == WriteClass::FreshData && (newest.is_some() || !v.deps.is_empty() || !v.data_of.is_empty()) {
            v.class = WriteClass::OverwrittenData;
        }
        v.level = needed.max(below.map_or(0, |(l, _)| l + 1));
        if v.class != WriteClass::FreshData {
            while self.batches.get(&(mirror, v.level)).is_some_and(|n| *n >= WriteGroup::BLOCKS_MAX) {
                v.level += 1;
            }
            *self.batches.entry((mirror, v.level)).or_default() += 1;
        }
        let id = VersionId(self.id());
        self.bytes += v.bytes();
        self.unwanted_bytes += v.bytes();
        self.frees += usize::from(v.content == Content::Free);
        self.chains.entry(v.block).or_default().push_back(id);
        let o = self.objects.entry(v.object).or_default();
        o.all.insert(id);
        if v.is_data() {
            o.data.entry(mirror).or_default().insert(id);
            let bound = o.data_level.entry(mirror).or_default();
            *bound = v.level.max(*bound);
            o.data_unwanted += 1;
        }
        self.edges(id, &v.deps, &v.data_of);
        self.versions.insert(id, v);
        id
    }

    fn edges(&mut self, id: VersionId, deps: &BTreeSet<VersionId>, data_of: &[(ObjectId, VersionId)]) {
        for d in deps {
            if let Some(d) = self.versions.get_mut(d) {
                d.dependents.insert(id);
            }
        }
        for (o, _) in data_of {
            self.objects.entry(*o).or_default().data_waiters.insert(id);
        }
    }

    fn merges(&self, id: VersionId, v: &Version, needed: u64) -> bool {
        let Some(w) = self.versions.get(&id) else { return false };
        if w.ticket.is_some() || w.object != v.object {
            return false;
        }
        // What is in a group of fresh data comes after nothing, and is data.
        if w.class == WriteClass::FreshData && (!v.deps.is_empty() || !v.data_of.is_empty() || !v.is_data()) {
            return false;
        }
        if w.is_data() != v.is_data() {
            return false;
        }
        // Merging must not make a flush that has begun any longer.
        let all_wanted = || {
            v.deps.iter().filter_map(|d| self.versions.get(d)).all(|d| d.wanted)
                && v.data_of.iter().filter_map(|(o, _)| self.objects.get(o)).all(|o| o.data_unwanted == 0)
        };
        if w.wanted && !all_wanted() {
            return false;
        }
        needed <= w.level || self.planted == Planted::CoalesceAlways
    }

    fn merge(&mut self, id: VersionId, mut v: Version) {
        v.deps.remove(&id);
        self.edges(id, &v.deps, &v.data_of);
        let Some(w) = self.versions.get_mut(&id) else { return };
        let before = w.bytes();
        self.frees += usize::from(v.content == Content::Free);
        self.frees -= usize::from(w.content == Content::Free);
        (w.content, w.tag) = (v.content, v.tag);
        if w.class != WriteClass::FreshData {
            w.class = v.class;
        }
        w.deps.extend(v.deps);
        for (o, upto) in v.data_of {
            match w.data_of.iter_mut().find(|(x, _)| *x == o) {
                Some(e) => e.1 = upto.max(e.1),
                None => w.data_of.push((o, upto)),
            }
        }
        let (after, wanted) = (w.bytes(), w.wanted);
        self.bytes = self.bytes - before + after;
        if !wanted {
            self.unwanted_bytes = self.unwanted_bytes - before + after;
        }
    }

    /// A block is freed of which nothing has been written: if those that come after its contents are just those after
    /// which it is freed (they refer to it no more), then neither its contents nor its freeing need be written.
    fn cancel(&mut self, block: BlockNo, deps: &BTreeSet<VersionId>, data_of: &[(ObjectId, VersionId)], s: &mut Settled) -> bool {
        let Some(chain) = self.chains.get(&block) else { return false };
        let chain: BTreeSet<VersionId> = chain.iter().copied().collect();
        let newest =
            |u: &VersionId| self.versions.get(u).is_some_and(|u_| self.chains.get(&u_.block).and_then(VecDeque::back) == Some(u));
        let fine = |u: &VersionId| chain.contains(u) || (deps.contains(u) && newest(u));
        for (i, id) in chain.iter().enumerate() {
            let Some(c) = self.versions.get(id) else { return false };
            if c.ticket.is_some() || (i == 0 && !c.first) {
                return false;
            }
            if !c.dependents.iter().copied().chain(self.data_waiters(*id, c)).all(|u| fine(&u))
                && self.planted != Planted::CancelAlways
            {
                return false;
            }
        }
        // A free that itself waits for data is not the simple case.
        if !data_of.is_empty() {
            return false;
        }
        // What came after a dropped version comes after what that, and the block's versions before it, came after.
        let mut inherited: BTreeSet<VersionId> = BTreeSet::new();
        let mut inherited_data: Vec<(ObjectId, VersionId)> = Vec::new();
        for id in &chain {
            let Some(c) = self.versions.get(id) else { continue };
            inherited.extend(c.deps.difference(&chain));
            inherited_data.extend(c.data_of.iter().copied());
            if inherited.is_empty() && inherited_data.is_empty() {
                continue;
            }
            let heirs: BTreeSet<VersionId> = c.dependents.iter().copied().chain(self.data_waiters(*id, c)).collect();
            for heir in heirs.difference(&chain) {
                let deps: BTreeSet<VersionId> = inherited.iter().copied().filter(|d| d != heir).collect();
                self.edges(*heir, &deps, &inherited_data);
                if let Some(h) = self.versions.get_mut(heir) {
                    h.deps.extend(deps);
                    h.data_of.extend(inherited_data.iter().copied());
                }
            }
        }
        for id in chain {
            self.remove(id, s);
        }
        s.freed.push(block);
        true
    }

    /// Versions that come after a version of data, as part of its object's data.
    fn data_waiters(&self, id: VersionId, c: &Version) -> impl Iterator<Item = VersionId> {
        let object = c.object;
        let waiters = self.objects.get(&object).filter(|_| c.is_data()).into_iter().flat_map(|o| o.data_waiters.iter().copied());
        waiters
            .filter(move |w| self.versions.get(w).is_some_and(|v| v.data_of.iter().any(|(o, upto)| *o == object && *upto >= id)))
    }

    /// Takes a version out: it is durable, or cancelled.
    fn remove(&mut self, id: VersionId, settled: &mut Settled) -> Option<Version> {
        let v = self.versions.remove(&id)?;
        self.bytes -= v.bytes();
        self.frees -= usize::from(v.content == Content::Free);
        if !v.wanted {
            self.unwanted_bytes -= v.bytes();
        }
        for u in &v.dependents {
            if let Some(u) = self.versions.get_mut(u) {
                u.deps.remove(&id);
            }
        }
        for d in &v.deps {
            if let Some(d) = self.versions.get_mut(d) {
                d.dependents.remove(&id);
            }
        }
        for (o, _) in &v.data_of {
            if let Some(object) = self.objects.get_mut(o) {
                object.data_waiters.remove(&id);
            }
            self.tidy(*o);
        }
        if let Some(chain) = self.chains.get_mut(&v.block) {
            chain.retain(|c| *c != id);
            if chain.is_empty() {
                self.chains.remove(&v.block);
            }
        }
        if let Some(o) = self.objects.get_mut(&v.object) {
            o.all.remove(&id);
            if v.is_data() {
                if let Some(set) = o.data.get_mut(&v.block.mirror) {
                    set.remove(&id);
                    if set.is_empty() {
                        o.data.remove(&v.block.mirror);
                        o.data_level.remove(&v.block.mirror);
                    }
                }
                o.data_unwanted -= usize::from(!v.wanted);
            }
        }
        self.tidy(v.object);
        if v.ticket.is_none() {
            let (key, class) = v.key();
            self.unqueue(id, key, class);
            if class == WriteClass::FreshData {
                self.fresh.remove(&v.block);
            }
        }
        for f in &v.flushes {
            if let Some(left) = self.flushes.get_mut(f) {
                *left -= 1;
                if *left == 0 {
                    self.flushes.remove(f);
                    settled.flushed.push(*f);
                }
            }
        }
        Some(v)
    }

    fn tidy(&mut self, object: ObjectId) {
        if self.objects.get(&object).is_some_and(|o| o.all.is_empty() && o.data_waiters.is_empty()) {
            self.objects.remove(&object);
        }
    }

    /// Takes a version that is not in flight (any more) out of the structures of those that are to be written.
    fn unqueue(&mut self, id: VersionId, key: (MirrorId, u64), class: WriteClass) {
        if class == WriteClass::FreshData {
            return;
        }
        if let Some(n) = self.batches.get_mut(&key) {
            *n -= 1;
            if *n == 0 {
                self.batches.remove(&key);
            }
        }
        if let Some(levels) = self.queue.get_mut(&key.0) {
            if let Some(set) = levels.get_mut(&key.1) {
                set.remove(&id);
                if set.is_empty() {
                    levels.remove(&key.1);
                }
            }
            if levels.is_empty() {
                self.queue.remove(&key.0);
            }
        }
    }

    /// Asks for versions to be written, with all that they come after.
    fn want(&mut self, ids: impl IntoIterator<Item = VersionId>) {
        let mut stack: Vec<VersionId> = ids.into_iter().collect();
        while let Some(id) = stack.pop() {
            let Some(v) = self.versions.get_mut(&id) else { continue };
            if std::mem::replace(&mut v.wanted, true) {
                continue;
            }
            let (bytes, is_data, block, class, level, object) = (v.bytes(), v.is_data(), v.block, v.class, v.level, v.object);
            self.unwanted_bytes -= bytes;
            stack.extend(v.deps.iter().copied());
            for (o, upto) in &v.data_of {
                let data = self.objects.get(o).into_iter().flat_map(|o| o.data.values());
                stack.extend(data.flat_map(|set| set.range(..=*upto)).copied());
            }
            if is_data && let Some(o) = self.objects.get_mut(&object) {
                o.data_unwanted -= 1;
            }
            if let Some(chain) = self.chains.get(&block) {
                stack.extend(chain.iter().copied().take_while(|c| *c < id));
            }
            if class == WriteClass::FreshData {
                self.fresh.insert(block, id);
            } else {
                self.queue.entry(block.mirror).or_default().entry(level).or_default().insert(id);
            }
        }
    }

    /// Asks for targets to be written. `None` if all is durable; otherwise `Settled::flushed` will name it.
    pub fn flush(&mut self, targets: &[FlushTarget]) -> Option<FlushId> {
        let mut ids: BTreeSet<VersionId> = BTreeSet::new();
        for t in targets {
            match t {
                FlushTarget::Object(o) => ids.extend(self.objects.get(o).into_iter().flat_map(|o| o.all.iter())),
                FlushTarget::Block(b) => ids.extend(self.chains.get(b).into_iter().flatten()),
                FlushTarget::All => ids.extend(self.versions.keys()),
            }
        }
        if ids.is_empty() {
            return None;
        }
        let flush = FlushId(self.id());
        self.flushes.insert(flush, ids.len());
        for id in &ids {
            if let Some(v) = self.versions.get_mut(id) {
                v.flushes.push(flush);
            }
        }
        self.want(ids);
        Some(flush)
    }

    /// Asks for versions to be written, oldest first: those born up to `old`, up to `budget` bytes of them, and beyond that
    /// until no more than `unwanted_max` bytes are left that nobody has asked for.
    pub fn want_old(&mut self, old: Instant, budget: usize, unwanted_max: usize) {
        let floor = self.unwanted_bytes.saturating_sub(budget);
        while self.unwanted_bytes > 0 {
            let next = (std::ops::Bound::Excluded(self.swept), std::ops::Bound::Unbounded);
            let Some((id, v)) = self.versions.range(next).next() else { break };
            if !((v.born <= old && self.unwanted_bytes > floor) || self.unwanted_bytes > unwanted_max) {
                break;
            }
            let id = *id;
            self.swept = id;
            self.want([id]);
        }
    }

    /// Blocks freed, not yet durably.
    #[must_use]
    pub fn frees(&self) -> usize {
        self.frees
    }

    /// Those blocks.
    #[must_use]
    pub fn freed_blocks(&self) -> Vec<BlockNo> {
        self.versions.values().filter(|v| v.content == Content::Free).map(|v| v.block).collect()
    }

    /// Groups that can be submitted now. They must be, in this order.
    pub fn pump(&mut self) -> Vec<Submission> {
        let mut out = Vec::new();
        let mut run: Vec<VersionId> = Vec::new();
        let fresh = std::mem::take(&mut self.fresh);
        for (block, id) in fresh {
            let mirror = run.first().and_then(|f| self.versions.get(f)).map(|v| v.block.mirror);
            if mirror.is_some_and(|m| m != block.mirror) || run.len() >= FRESH_RUN {
                self.submit(std::mem::take(&mut run), true, &mut out);
            }
            run.push(id);
        }
        if !run.is_empty() {
            self.submit(run, true, &mut out);
        }
        let mirrors: Vec<MirrorId> = self.queue.keys().copied().collect();
        for mirror in mirrors {
            while let Some((_, set)) = self.queue.get(&mirror).and_then(|levels| levels.first_key_value()) {
                if !set.iter().all(|id| self.ready(*id)) {
                    break;
                }
                let ids: Vec<VersionId> = set.iter().copied().collect();
                for id in &ids {
                    if let Some((key, class)) = self.versions.get(id).map(Version::key) {
                        self.unqueue(*id, key, class);
                    }
                }
                self.submit(ids, false, &mut out);
            }
        }
        out
    }

    /// Whether nothing in another mirror has to become durable before it.
    fn ready(&self, id: VersionId) -> bool {
        if self.planted == Planted::IgnoreCrossEdges {
            return true;
        }
        let Some(v) = self.versions.get(&id) else { return true };
        let mirror = v.block.mirror;
        v.deps.iter().filter_map(|d| self.versions.get(d)).all(|d| d.block.mirror == mirror)
            && v.data_of.iter().all(|(o, upto)| {
                let sets = self.objects.get(o).into_iter().flat_map(|o| o.data.iter());
                sets.filter(|(m, _)| **m != mirror).all(|(_, set)| set.first().is_none_or(|first| first > upto))
            })
    }

    fn submit(&mut self, ids: Vec<VersionId>, fresh_data: bool, out: &mut Vec<Submission>) {
        let ticket = Ticket(self.id());
        let mut writes = Vec::with_capacity(ids.len());
        let mut mirror = MirrorId(0);
        for id in &ids {
            if let Some(v) = self.versions.get_mut(id) {
                v.ticket = Some(ticket);
                mirror = v.block.mirror;
                let (tag, data) = match &v.content {
                    Content::Data(block) => (v.tag, Some(block.clone())),
                    Content::Free => (Tag::default(), None),
                };
                writes.push(BlockWrite { block: v.block, tag, data });
            }
        }
        debug_assert!(writes.len() <= WriteGroup::BLOCKS_MAX);
        self.tickets.insert(ticket, ids);
        out.push(Submission { ticket, mirror, group: WriteGroup { writes, fresh_data } });
    }

    /// A group is durable.
    ///
    /// Acknowledgements of one mirror are taken in in the order of submission, whatever the order in which they come: were
    /// a block's newer version settled first, the older one would pass for its newest contents.
    pub fn acked(&mut self, ticket: Ticket) -> Settled {
        let mut settled = Settled::default();
        let Some(mirror) = self.mirror_of(ticket) else { return settled };
        self.acked_early.insert(ticket);
        self.settle_in_order(mirror, &mut settled);
        settled
    }

    fn settle_in_order(&mut self, mirror: MirrorId, settled: &mut Settled) {
        while let Some(first) = self.tickets.keys().copied().find(|t| self.mirror_of(*t) == Some(mirror))
            && self.acked_early.remove(&first)
        {
            self.settle(first, settled);
        }
    }

    /// The mirror that a group was submitted to.
    fn mirror_of(&self, ticket: Ticket) -> Option<MirrorId> {
        let first = self.tickets.get(&ticket)?.first()?;
        self.versions.get(first).map(|v| v.block.mirror)
    }

    fn settle(&mut self, ticket: Ticket, settled: &mut Settled) {
        for id in self.tickets.remove(&ticket).unwrap_or_default() {
            let Some(v) = self.remove(id, settled) else { continue };
            settled.durable.push(v.block);
            if !self.chains.contains_key(&v.block) {
                match v.content {
                    Content::Data(data) => settled.clean.push((v.block, v.object, data)),
                    Content::Free => settled.freed.push(v.block),
                }
            }
        }
    }

    /// A group can never be written: its versions are dropped. Returns their blocks and objects.
    pub fn failed(&mut self, ticket: Ticket) -> (Vec<(BlockNo, ObjectId)>, Settled) {
        let mut settled = Settled::default();
        let mut lost = Vec::new();
        let mirror = self.mirror_of(ticket);
        for id in self.tickets.remove(&ticket).unwrap_or_default() {
            if let Some(v) = self.remove(id, &mut settled) {
                lost.push((v.block, v.object));
            }
        }
        if let Some(mirror) = mirror {
            self.settle_in_order(mirror, &mut settled);
        }
        (lost, settled)
    }

    /// Everything is lost. Returns the objects and blocks that had something dirty, and the flushes that will never end.
    pub fn reset(&mut self) -> (Vec<(BlockNo, ObjectId)>, Vec<FlushId>) {
        let lost: BTreeMap<BlockNo, ObjectId> = self.versions.values().map(|v| (v.block, v.object)).collect();
        let flushes = self.flushes.keys().copied().collect();
        *self = WriteBack { next: self.next, planted: self.planted, ..WriteBack::default() };
        (lost.into_iter().collect(), flushes)
    }

    /// Panics if an invariant is broken.
    pub fn check_invariants(&self) {
        let mut batches: BTreeMap<(MirrorId, u64), usize> = BTreeMap::new();
        let (mut bytes, mut unwanted) = (0, 0);
        for (id, v) in &self.versions {
            bytes += v.bytes();
            if !v.wanted {
                unwanted += v.bytes();
                assert!(v.ticket.is_none(), "{id:?} submitted unasked");
            }
            if v.ticket.is_none() && v.class != WriteClass::FreshData {
                *batches.entry((v.block.mirror, v.level)).or_default() += 1;
            }
            if v.class == WriteClass::FreshData {
                assert!(v.deps.is_empty() && v.data_of.is_empty() && v.level == 0, "{id:?}: fresh data after something");
            }
            for d in &v.deps {
                let w = self.versions.get(d).expect("an edge to a version that is gone");
                assert!(w.dependents.contains(id));
                let strict = u64::from(w.block.mirror != v.block.mirror);
                assert!(v.level >= w.level + strict || w.ticket.is_some() && strict == 0, "{id:?} {v:?} after {d:?} {w:?}");
                assert!(!v.wanted || w.wanted, "{id:?} wanted, {d:?} not");
                if v.ticket.is_some() {
                    assert!(strict == 0 && w.ticket.is_some_and(|t| Some(t) <= v.ticket), "{id:?} submitted before {d:?}");
                }
            }
            for (o, upto) in &v.data_of {
                for (m, set) in self.objects.get(o).map(|o| &o.data).into_iter().flatten() {
                    for d in set.range(..=*upto) {
                        let w = &self.versions[d];
                        assert!(v.level >= w.level + u64::from(*m != v.block.mirror), "{id:?} {v:?} after data {d:?} {w:?}");
                        assert!(!v.wanted || w.wanted);
                        assert!(v.ticket.is_none() || w.ticket.is_some_and(|t| Some(t) <= v.ticket));
                    }
                }
            }
        }
        assert_eq!((bytes, unwanted), (self.bytes, self.unwanted_bytes), "dirty bytes");
        assert_eq!(batches, self.batches, "sizes of batches");
        for ((m, l), n) in &batches {
            assert!(*n <= WriteGroup::BLOCKS_MAX, "batch {m} {l} of {n} blocks");
        }
        let mut chained = 0;
        for (block, chain) in &self.chains {
            chained += chain.len();
            for (a, b) in chain.iter().zip(chain.iter().skip(1)) {
                let (va, vb) = (&self.versions[a], &self.versions[b]);
                assert!(a < b && va.block == *block && vb.block == *block);
                assert!(va.ticket.is_some() || (vb.ticket.is_none() && va.level < vb.level), "{block}: {va:?} before {vb:?}");
                assert!(!vb.wanted || va.wanted);
            }
        }
        assert_eq!(chained, self.versions.len());
    }
}
