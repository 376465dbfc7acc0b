//! The order of write-behind, against a model that knows every operation: after any crash the writes that are durable are
//! closed under "after". Random operations, flushes and acknowledgements; all (or many) crash states after every step.

use bytes::Bytes;
use cluster::sim::Rng;
use cluster::{BLOCK_SIZE, BlockNo, Instant, MirrorId};
use sld::writeback::{FlushId, Planted, Settled, Ticket, WriteBack};
use sld::{After, Content, FlushTarget, ObjectId, Operation, Tag, Write, WriteClass, WriteId};
use std::collections::{BTreeMap, BTreeSet};

/// One write that was committed.
#[derive(Clone, Debug)]
struct Logged {
    block: BlockNo,
    object: ObjectId,
    free: bool,
    data: bool,
    deps: BTreeSet<usize>,
    /// Dropped unwritten, because of this later write that freed its block.
    cancelled: Option<usize>,
}

#[derive(Clone, Debug)]
struct Group {
    ticket: Ticket,
    fresh: bool,
    /// Indexes into the log.
    writes: Vec<usize>,
    acked: bool,
}

struct Model {
    rng: Rng,
    wb: WriteBack,
    log: Vec<Logged>,
    /// Allocated blocks with their objects, and the indexes of their writes since.
    live: BTreeMap<BlockNo, (ObjectId, Vec<usize>)>,
    free: Vec<BlockNo>,
    /// Allocated, nothing durable.
    pending: BTreeSet<BlockNo>,
    groups: BTreeMap<MirrorId, Vec<Group>>,
    flushes: BTreeMap<FlushId, Vec<usize>>,
    now: Instant,
    states: u64,
    cancels: u64,
}

fn content(i: usize) -> Bytes {
    let mut v = vec![0; BLOCK_SIZE];
    v[..8].copy_from_slice(&(i as u64).to_le_bytes());
    Bytes::from(v)
}

impl Model {
    fn new(seed: u64, mirrors: u32, blocks: u32, planted: Planted) -> Self {
        let free = (1..=mirrors).flat_map(|m| (0..blocks).map(move |i| BlockNo::new(MirrorId(m), i))).collect();
        Model {
            rng: Rng::new(seed),
            wb: WriteBack::planted(planted),
            log: Vec::new(),
            live: BTreeMap::new(),
            free,
            pending: BTreeSet::new(),
            groups: (1..=mirrors).map(|m| (MirrorId(m), Vec::new())).collect(),
            flushes: BTreeMap::new(),
            now: Instant(0),
            states: 0,
            cancels: 0,
        }
    }

    fn operation(&mut self) {
        let mut op = Operation::new();
        let start = self.log.len();
        let mut logged: Vec<Logged> = Vec::new();
        let before: BTreeMap<BlockNo, usize> = self.live.iter().filter_map(|(b, (_, w))| w.last().map(|l| (*b, *l))).collect();
        let mut freed: BTreeSet<BlockNo> = BTreeSet::new();
        for _ in 0..self.rng.range(1..6) {
            let n = logged.len();
            // A new block, or one in use.
            let (block, fresh) = if !self.free.is_empty() && (self.live.is_empty() || self.rng.percent(30)) {
                let at = self.rng.below(self.free.len() as u64) as usize;
                let b = self.free.swap_remove(at);
                let object = ObjectId::Inode(self.rng.below(4));
                self.live.insert(b, (object, Vec::new()));
                self.pending.insert(b);
                (b, true)
            } else {
                let all: Vec<BlockNo> = self.live.keys().copied().filter(|b| !freed.contains(b)).collect();
                let Some(b) = self.rng.pick(&all).copied() else { break };
                (b, false)
            };
            let Some((object, writes)) = self.live.get(&block) else { break };
            let (object, own) = (*object, writes.last().copied());
            let own = logged.iter().rposition(|l| l.block == block).map(|i| start + i).or(own);
            let free = !fresh && own.is_some() && self.rng.percent(25);
            let mut deps: BTreeSet<usize> = own.into_iter().collect();
            let mut after = Vec::new();
            let was_fresh = own.is_some_and(|o| {
                let l = if o >= start { &logged[o - start] } else { &self.log[o] };
                l.data
            });
            let class = if fresh && self.rng.percent(50) {
                WriteClass::FreshData
            } else if was_fresh && !free {
                WriteClass::OverwrittenData
            } else {
                WriteClass::Metadata
            };
            if class != WriteClass::FreshData {
                for _ in 0..self.rng.below(4) {
                    match self.rng.below(4) {
                        0 if n > 0 => {
                            let i = self.rng.below(n as u64) as usize;
                            after.push(After::Write(WriteId(i)));
                            deps.insert(start + i);
                        }
                        1 => {
                            let o = ObjectId::Inode(self.rng.below(4));
                            if free {
                                continue;
                            }
                            after.push(After::DataOf(o));
                            let all = self.log.iter().chain(logged.iter()).enumerate();
                            deps.extend(all.filter(|(_, l)| l.data && l.object == o && !l.free).map(|(i, _)| i));
                        }
                        _ => {
                            let keys: Vec<BlockNo> = before.keys().copied().collect();
                            if let Some(b) = self.rng.pick(&keys).copied() {
                                after.push(After::Block(b));
                                deps.insert(before[&b]);
                            }
                        }
                    }
                }
            }
            let data = class != WriteClass::Metadata && !free;
            op.push(Write {
                block,
                object,
                content: if free { Content::Free } else { Content::Data(content(start + n)) },
                tag: Tag::default(),
                class,
                after,
            });
            if free {
                freed.insert(block);
            }
            // Data of earlier allocations of a block, or cancelled writes, are expanded in the check.
            logged.push(Logged { block, object, free, data, deps, cancelled: None });
        }
        for (i, l) in logged.into_iter().enumerate() {
            if let Some((_, w)) = self.live.get_mut(&l.block) {
                w.push(start + i);
            }
            self.log.push(l);
        }
        let pending = self.pending.clone();
        self.now = Instant(self.now.0 + 1);
        let settled = self.wb.commit(self.now, op, |b| pending.contains(&b));
        for b in &settled.freed {
            // Cancelled: everything of this allocation.
            self.cancels += 1;
            let writes = self.live.get(b).map(|l| l.1.clone()).unwrap_or_default();
            let f = *writes.iter().find(|w| self.log[**w].free).unwrap();
            for w in writes {
                self.log[w].cancelled = Some(f);
            }
        }
        for b in &freed {
            if let Some(l) = self.live.get_mut(b) {
                l.1.retain(|_| true);
            }
        }
        // A freed block is not written again before it comes back.
        let gone: Vec<BlockNo> = freed.iter().copied().collect();
        self.settled(settled);
        for b in gone {
            self.live.remove(&b);
        }
    }

    fn settled(&mut self, s: Settled) {
        for (b, _, data) in &s.clean {
            let newest = self.log.iter().rposition(|l| l.block == *b && l.cancelled.is_none()).unwrap();
            assert_eq!(*data, content(newest), "{b}: what goes to the cache is the newest");
        }
        for b in s.durable {
            self.pending.remove(&b);
        }
        for b in s.freed {
            self.pending.remove(&b);
            self.live.remove(&b);
            assert!(!self.free.contains(&b), "{b} came back twice");
            self.free.push(b);
        }
        for f in s.flushed {
            let writes = self.flushes.remove(&f).expect("a flush that was begun");
            let least = self.state(|g, acked| acked || g.acked);
            for w in writes {
                let l = &self.log[w];
                assert!(l.cancelled.is_some() || least.get(&l.block).is_some_and(|k| *k >= w), "flushed, not durable: {w} {l:?}");
            }
        }
    }

    fn pump(&mut self) {
        for s in self.wb.pump() {
            let writes = s.group.writes.iter().map(|w| match &w.data {
                Some(d) => u64::from_le_bytes(d[..8].try_into().unwrap()) as usize,
                None => self.log.iter().rposition(|l| l.block == w.block && l.free && l.cancelled.is_none()).unwrap(),
            });
            let group = Group { ticket: s.ticket, fresh: s.group.fresh_data, writes: writes.collect(), acked: false };
            self.groups.get_mut(&s.mirror).unwrap().push(group);
        }
    }

    fn ack(&mut self) -> bool {
        let open: Vec<Ticket> = self.groups.values().flatten().filter(|g| !g.acked).map(|g| g.ticket).collect();
        let Some(ticket) = self.rng.pick(&open).copied() else { return false };
        for g in self.groups.values_mut().flatten() {
            g.acked |= g.ticket == ticket;
        }
        let settled = self.wb.acked(ticket);
        self.settled(settled);
        true
    }

    fn flush(&mut self) {
        let targets = match self.rng.below(6) {
            0 => vec![FlushTarget::All],
            1 | 2 => self.live.keys().nth(self.rng.below(8) as usize).map(|b| FlushTarget::Block(*b)).into_iter().collect(),
            _ => vec![FlushTarget::Object(ObjectId::Inode(self.rng.below(4)))],
        };
        let writes = self.log.iter().enumerate().filter(|(_, l)| {
            targets.iter().any(|t| match t {
                FlushTarget::All => true,
                FlushTarget::Block(b) => l.block == *b,
                FlushTarget::Object(o) => l.object == *o,
            })
        });
        let writes: Vec<usize> = writes.map(|(i, _)| i).collect();
        if let Some(f) = self.wb.flush(&targets) {
            self.flushes.insert(f, writes);
        }
    }

    /// The newest durable write of each block, if the groups are durable up to the last one chosen on each mirror.
    fn state(&self, chosen: impl Fn(&Group, bool) -> bool) -> BTreeMap<BlockNo, usize> {
        let mut newest = BTreeMap::new();
        for groups in self.groups.values() {
            let last = groups.iter().rposition(|g| chosen(g, false)).map_or(0, |i| i + 1);
            for w in groups.iter().take(last).flat_map(|g| &g.writes) {
                newest.insert(self.log[*w].block, *w);
            }
        }
        newest
    }

    /// Checks crash states: per mirror any prefix from the last acknowledged group on.
    fn crash(&mut self, most: u64) {
        let ranges: Vec<(MirrorId, usize, usize)> =
            self.groups.iter().map(|(m, g)| (*m, g.iter().rposition(|g| g.acked).map_or(0, |i| i + 1), g.len())).collect();
        let all: u64 = ranges.iter().map(|(_, lo, hi)| (hi - lo + 1) as u64).product();
        for n in 0..all.min(most) {
            let mut pick = if all <= most { n } else { self.rng.below(all) };
            let mut newest = BTreeMap::new();
            for (m, lo, hi) in &ranges {
                let len = lo + (pick % (hi - lo + 1) as u64) as usize;
                pick /= (hi - lo + 1) as u64;
                let groups = &self.groups[m];
                for w in groups.iter().take(len).flat_map(|g| &g.writes) {
                    newest.insert(self.log[*w].block, *w);
                }
                // Fresh data need not be atomic.
                if let Some(g) = groups.get(len).filter(|g| g.fresh) {
                    for w in &g.writes {
                        if self.rng.percent(50) {
                            newest.insert(self.log[*w].block, *w);
                        }
                    }
                }
            }
            self.states += 1;
            self.closed(&newest);
        }
    }

    fn closed(&self, newest: &BTreeMap<BlockNo, usize>) {
        // Durable writes are those up to the newest one of their block.
        for (i, l) in self.log.iter().enumerate() {
            let Some(k) = newest.get(&l.block).filter(|k| **k >= i) else { continue };
            if l.cancelled.is_none() {
                for d in &l.deps {
                    self.satisfied(*d, l.block, *k, newest, i);
                }
            }
        }
    }

    /// `d` must be durable for a write of `block`, of which contents `k` are durable.
    fn satisfied(&self, d: usize, block: BlockNo, k: usize, newest: &BTreeMap<BlockNo, usize>, who: usize) {
        let l = &self.log[d];
        match l.cancelled {
            None => {
                let have = newest.get(&l.block);
                assert!(
                    have.is_some_and(|h| *h >= d),
                    "write {who} {:?} is durable (block at {k}), {d} {l:?} is not (block at {have:?})",
                    self.log[who]
                );
            }
            // It was dropped with its block: then what is durable must be new enough not to need it.
            Some(f) => {
                // Or it was made when that had been dropped already.
                let fine = who > f || block == l.block || self.log[f].deps.iter().any(|n| self.log[*n].block == block && *n <= k);
                assert!(fine, "write {who} {:?} needs {d} {l:?}, which was dropped by {f} {:?}", self.log[who], self.log[f]);
            }
        }
    }

    fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            match self.rng.below(10) {
                0..=4 => self.operation(),
                5 => self.flush(),
                6 => self.wb.want_old(Instant(self.now.0.saturating_sub(5)), 1 << 20, 1 << 20),
                7 => self.pump(),
                _ => {
                    self.pump();
                    self.ack();
                }
            }
            self.wb.check_invariants();
            self.crash(12);
        }
        if let Some(f) = self.wb.flush(&[FlushTarget::All]) {
            self.flushes.insert(f, Vec::new());
        }
        let mut rounds = 0;
        while !self.wb.is_empty() {
            self.pump();
            self.wb.check_invariants();
            assert!(self.ack(), "stuck with {} bytes dirty", self.wb.dirty_bytes());
            self.crash(6);
            rounds += 1;
            assert!(rounds < 10_000);
        }
        assert!(self.flushes.is_empty(), "flushes that never ended");
        assert_eq!((self.wb.dirty_bytes(), self.wb.unwanted_bytes(), self.wb.frees()), (0, 0, 0));
        let end = self.state(|_, _| true);
        for (block, (_, writes)) in &self.live {
            assert_eq!(end.get(block), writes.last(), "{block} ends with its newest contents");
        }
    }
}

#[test]
fn crash_states_are_closed_under_after() {
    let (mut states, mut cancels) = (0, 0);
    for seed in 0..150 {
        let mut m = Model::new(seed, 1 + (seed % 3) as u32, 3 + (seed % 7) as u32, Planted::None);
        m.run(120);
        states += m.states;
        cancels += m.cancels;
    }
    assert!(states > 50_000 && cancels > 100, "{states} states, {cancels} blocks freed unwritten");
}

fn caught(planted: Planted) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found =
        (0..40).any(|seed| std::panic::catch_unwind(|| Model::new(seed, 2 + (seed % 2) as u32, 5, planted).run(120)).is_err());
    std::panic::set_hook(hook);
    assert!(found, "{planted:?} was not noticed");
}

#[test]
fn planted_bugs_are_noticed() {
    caught(Planted::IgnoreCrossEdges);
    caught(Planted::CoalesceAlways);
    caught(Planted::CancelAlways);
}

#[test]
fn many_blocks_go_in_groups_of_bounded_size() {
    let mut wb = WriteBack::default();
    let object = ObjectId::Inode(1);
    let write = |i: u32, class, after| Write {
        block: BlockNo::new(MirrorId(1), i),
        object,
        content: Content::Data(content(i as usize)),
        tag: Tag::default(),
        class,
        after,
    };
    let mut op = Operation::new();
    for i in 0..3000 {
        op.push(write(i, WriteClass::Metadata, vec![]));
    }
    for i in 3000..4000 {
        op.push(write(i, WriteClass::FreshData, vec![]));
    }
    op.push(write(5000, WriteClass::Metadata, vec![After::DataOf(object)]));
    wb.commit(Instant(1), op, |_| true);
    wb.check_invariants();
    wb.flush(&[FlushTarget::All]);
    let groups = wb.pump();
    let fresh: Vec<usize> = groups.iter().take_while(|g| g.group.fresh_data).map(|g| g.group.writes.len()).collect();
    assert_eq!(fresh, [256, 256, 256, 232]);
    let rest: Vec<usize> = groups.iter().skip(4).map(|g| g.group.writes.len()).collect();
    assert_eq!(rest.iter().sum::<usize>(), 3001);
    assert!(rest.len() == 3 && rest.iter().all(|n| *n <= 1024), "{rest:?}");
}

#[test]
fn file_made_and_removed_before_it_was_written_costs_its_directory_only() {
    let mut wb = WriteBack::default();
    let b = |i| BlockNo::new(MirrorId(1), i);
    let (dir, file) = (ObjectId::Inode(b(1).pack()), ObjectId::Inode(b(2).pack()));
    let w = |block, object, n, class, after| Write {
        block,
        object,
        content: Content::Data(content(n)),
        tag: Tag::default(),
        class,
        after,
    };
    let mut create = Operation::new();
    let i = create.push(w(b(2), file, 1, WriteClass::Metadata, vec![]));
    create.push(w(b(1), dir, 2, WriteClass::Metadata, vec![After::Write(i)]));
    wb.commit(Instant(1), create, |x| x != b(1));
    let mut data = Operation::new();
    data.push(w(BlockNo::new(MirrorId(2), 9), file, 3, WriteClass::FreshData, vec![]));
    data.push(w(b(2), file, 4, WriteClass::Metadata, vec![After::DataOf(file)]));
    wb.commit(Instant(2), data, |x| x != b(1));
    let mut unlink = Operation::new();
    let e = unlink.push(w(b(1), dir, 5, WriteClass::Metadata, vec![]));
    let inode = unlink.push(w(b(2), file, 6, WriteClass::Metadata, vec![After::Write(e)]));
    let free = |block, after| Write {
        block,
        object: file,
        content: Content::Free,
        tag: Tag::default(),
        class: WriteClass::Metadata,
        after,
    };
    unlink.push(free(BlockNo::new(MirrorId(2), 9), vec![After::Write(inode)]));
    unlink.push(free(b(2), vec![After::Write(inode), After::Write(e)]));
    let settled = wb.commit(Instant(3), unlink, |x| x != b(1));
    wb.check_invariants();
    assert_eq!(settled.freed, [BlockNo::new(MirrorId(2), 9), b(2)]);
    wb.flush(&[FlushTarget::All]);
    let groups = wb.pump();
    assert_eq!(groups.len(), 1);
    assert_eq!(groups[0].group.writes.len(), 1, "the directory's block");
}

/// Found on a real cluster: two groups of one mirror were acknowledged in the wrong order, and the block's older version
/// went to the cache as its newest contents: a file that its own node had written and fsynced read as empty there.
#[test]
fn acknowledgements_out_of_order_leave_the_newest_contents() {
    let mut wb = WriteBack::default();
    let block = BlockNo::new(MirrorId(1), 7);
    let mut submit = |n: usize| {
        let mut op = Operation::new();
        op.push(Write {
            block,
            object: ObjectId::Inode(block.pack()),
            content: Content::Data(content(n)),
            tag: Tag::default(),
            class: WriteClass::Metadata,
            after: vec![],
        });
        wb.commit(Instant(n as u64), op, |_| n == 1);
        wb.flush(&[FlushTarget::All]);
        wb.pump().pop().unwrap().ticket
    };
    let (first, second) = (submit(1), submit(2));
    assert_eq!(wb.acked(second), Settled::default(), "nothing is settled before what was submitted earlier");
    assert_eq!(wb.newest(block), Some(&Content::Data(content(2))));
    let settled = wb.acked(first);
    assert_eq!(settled.clean, vec![(block, ObjectId::Inode(block.pack()), content(2))]);
    assert_eq!(settled.flushed.len(), 2);
    assert!(wb.is_empty());
    wb.check_invariants();
}
