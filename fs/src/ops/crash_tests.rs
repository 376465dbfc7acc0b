//! Crash states of short sequences of operations on names: the checks of the protocol on the real code.
//!
//! Each state that the edges allow is mounted. Then:
//! - the names are those of a set of the operations that is closed under dependence (by name or by inode), with all
//!   operations in it that were fully written or fsynced;
//! - listing shows what looking up finds, and no entry reaches an inode in its next life;
//! - no inode has fewer links than valid names;
//! - fsck finds no damage; the collector leaves nothing at all to find, and changes no name.
//!
//! Directories 0 and 1 are always there; directory 2 may be made, moved and removed.
//!
//! `PULSAR_CRASH_STATES` sets how many states to look at (default: what takes some seconds).

use super::tests::{ROOT, clock, fresh};
use super::*;
use crate::check::{self, DiskSource};
use crate::crash::Graph;
use crate::gc::{GcOptions, GcReport};
use crate::inode::FileKind;
use sld::memory::{Image, MemoryDisk};
use std::collections::{BTreeMap, BTreeSet};

const NAMES: [&[u8]; 2] = [b"a", b"b"];
const SIZES: [u32; 2] = [160, 160];

/// Directory and name, by number.
type Slot = (usize, usize);
/// What each name leads to: an inode's number and generation.
type Names = BTreeMap<Slot, (Ino, u64)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Create(Slot),
    Mkdir(Slot),
    Rmdir(Slot),
    Link(Slot, Slot),
    Unlink(Slot),
    Rename(Slot, Slot),
    Exchange(Slot, Slot),
    /// A rename that leaves a whiteout.
    Whiteout(Slot, Slot),
}

/// Operations on names in so many directories.
fn all_ops(dirs: usize) -> Vec<Op> {
    let slots: Vec<Slot> = (0..dirs).flat_map(|d| (0..2).map(move |n| (d, n))).collect();
    let mut ops = Vec::new();
    if dirs > 2 {
        ops.extend(slots.iter().filter(|s| s.0 < 2).flat_map(|s| [Op::Mkdir(*s), Op::Rmdir(*s), Op::Mkdir(*s)]));
        ops.extend([Op::Create((2, 0)), Op::Create((2, 1)), Op::Unlink((2, 0))]);
    }
    for a in &slots {
        ops.extend([Op::Create(*a), Op::Unlink(*a)]);
        for b in slots.iter().filter(|b| *b != a) {
            ops.extend([Op::Link(*a, *b), Op::Rename(*a, *b), Op::Exchange(*a, *b)]);
            if a < b {
                ops.push(Op::Whiteout(*a, *b));
            }
        }
    }
    ops
}

/// What an operation did, as the model knows it.
#[derive(Clone, Debug)]
struct Done {
    op: Op,
    created: Option<(Ino, u64)>,
    slots: BTreeSet<Slot>,
    inodes: BTreeSet<(Ino, u64)>,
    /// The directory 2, if the operation made a name in it.
    within: Option<(Ino, u64)>,
}

type Dir2 = Option<(Ino, u64)>;

fn apply(names: &mut Names, op: Op, created: Option<(Ino, u64)>) {
    match op {
        Op::Create(at) | Op::Mkdir(at) => {
            names.extend(created.map(|id| (at, id)));
        }
        Op::Link(from, to) => {
            names.extend(names.get(&from).copied().map(|id| (to, id)));
        }
        Op::Unlink(at) | Op::Rmdir(at) => {
            names.remove(&at);
        }
        Op::Rename(from, to) => {
            if names.get(&from) != names.get(&to)
                && let Some(id) = names.remove(&from)
            {
                names.insert(to, id);
            }
        }
        Op::Whiteout(from, to) => {
            names.extend(names.get(&from).copied().map(|id| (to, id)));
            names.extend(created.map(|id| (from, id)));
        }
        Op::Exchange(a, b) => {
            if let (Some(x), Some(y)) = (names.get(&a).copied(), names.get(&b).copied()) {
                names.insert(a, y);
                names.insert(b, x);
            }
        }
    }
}

fn possible(names: &Names, dir2: Dir2, op: Op) -> bool {
    let is_dir = |slot: &Slot| dir2.is_some() && names.get(slot) == dir2.as_ref();
    let there = |slot: &Slot| slot.0 < 2 || dir2.is_some_and(|d| names.iter().any(|(s, id)| s.0 < 2 && *id == d));
    match op {
        Op::Create(at) => there(&at) && !names.contains_key(&at),
        Op::Mkdir(at) => dir2.is_none() && !names.contains_key(&at),
        Op::Rmdir(at) => is_dir(&at) && names.keys().all(|slot| slot.0 < 2),
        Op::Link(from, to) => names.contains_key(&from) && !is_dir(&from) && there(&to) && !names.contains_key(&to),
        Op::Unlink(at) => names.contains_key(&at) && !is_dir(&at),
        Op::Rename(from, to) | Op::Whiteout(from, to) => {
            let kinds = if is_dir(&from) { to.0 < 2 && !names.contains_key(&to) } else { !is_dir(&to) };
            names.contains_key(&from) && names.get(&from) != names.get(&to) && there(&to) && kinds
        }
        Op::Exchange(a, b) => {
            let below = |x: &Slot, y: &Slot| is_dir(x) && y.0 == 2;
            let both = names.contains_key(&a) && names.contains_key(&b) && names.get(&a) != names.get(&b);
            both && !below(&a, &b) && !below(&b, &a)
        }
    }
}

/// Without the names in a directory that no name leads to.
fn reachable(mut names: Names, dir2: Dir2) -> Names {
    let there = dir2.is_some_and(|d| names.iter().any(|(slot, id)| slot.0 < 2 && *id == d));
    names.retain(|slot, _| slot.0 < 2 || there);
    names
}

async fn perform(fs: &FileSystem<MemoryDisk>, dirs: &[Ino], dir2: &mut Dir2, names: &mut Names, op: Op) -> Option<Done> {
    if !possible(names, *dir2, op) {
        return None;
    }
    let before = names.clone();
    let second = dir2.map(|(ino, _)| ino).unwrap_or_default();
    let name = |slot: Slot| (dirs.get(slot.0).copied().unwrap_or(second), NAMES[slot.1]);
    let mut to_dir = 0;
    let mut created = None;
    let slots = match op {
        Op::Create(at) => {
            let (dir, name) = name(at);
            let made = fs.make(&ROOT, dir, name, NewNode::File, 0o644).await.unwrap();
            created = Some((made.ino, made.generation));
            to_dir = at.0;
            vec![at]
        }
        Op::Mkdir(at) => {
            let (dir, name) = name(at);
            let made = fs.make(&ROOT, dir, name, NewNode::Directory, 0o755).await.unwrap();
            created = Some((made.ino, made.generation));
            *dir2 = created;
            vec![at]
        }
        Op::Rmdir(at) => {
            let (dir, name) = name(at);
            fs.rmdir(&ROOT, dir, name).await.unwrap();
            vec![at]
        }
        Op::Link(from, to) => {
            to_dir = to.0;
            let (dir, name) = name(to);
            fs.link(names[&from].0, dir, name).await.unwrap();
            vec![from, to]
        }
        Op::Unlink(at) => {
            let (dir, name) = name(at);
            fs.unlink(&ROOT, dir, name).await.unwrap();
            vec![at]
        }
        Op::Rename(from, to) | Op::Exchange(from, to) | Op::Whiteout(from, to) => {
            let ((dir, old), (new_dir, new)) = (name(from), name(to));
            to_dir = to.0;
            let flags = match op {
                Op::Exchange(..) => RenameFlags::Exchange,
                Op::Whiteout(..) => RenameFlags::Whiteout,
                _ => RenameFlags::Replace,
            };
            fs.rename(&ROOT, dir, old, new_dir, new, flags).await.unwrap();
            if flags == RenameFlags::Whiteout {
                let whiteout = fs.lookup(dir, old).await.unwrap();
                assert_eq!((whiteout.kind, whiteout.rdev, whiteout.nlink), (FileKind::CharDevice, 0, 1));
                created = Some((whiteout.ino, whiteout.generation));
            }
            if flags == RenameFlags::Exchange && from.0 == 2 {
                to_dir = 2;
            }
            vec![from, to]
        }
    };
    apply(names, op, created);
    let inodes = slots.iter().flat_map(|s| [before.get(s), names.get(s)]).flatten().copied().collect();
    let within = dir2.filter(|_| to_dir == 2);
    Some(Done { op, created, slots: slots.into_iter().collect(), inodes, within })
}

/// The names that a mounted state shows, after checking that listing and looking up agree.
async fn visible(fs: &FileSystem<MemoryDisk>, dirs: &[Ino], dir2: Dir2, context: &dyn Fn() -> String) -> Names {
    let mut names = Names::new();
    let mut counts: BTreeMap<Ino, (u32, u32)> = BTreeMap::new();
    for d in 0..3 {
        let dir = match (dirs.get(d), dir2) {
            (Some(dir), _) => *dir,
            (None, Some(id)) if names.values().any(|found| *found == id) => id.0,
            _ => break,
        };
        let mut listed = BTreeMap::new();
        let mut sink = |entry: DirEntry| {
            if let Some(n) = NAMES.iter().position(|n| *n == entry.name) {
                assert!(listed.insert(n, entry.ino).is_none(), "a name listed twice");
            }
            true
        };
        fs.read_directory(dir, 2, &mut sink, false).await.unwrap();
        for (n, name) in NAMES.iter().enumerate() {
            let found = match fs.lookup(dir, name).await {
                Ok(found) => Some(found),
                Err(FsError::NotFound) => None,
                Err(error) => panic!("{error} at {}", context()),
            };
            assert_eq!(listed.get(&n).copied(), found.map(|f| f.ino), "listed and looked up, {}", context());
            if let Some(found) = found {
                names.insert((d, n), (found.ino, found.generation));
                let count = counts.entry(found.ino).or_insert((0, found.nlink));
                count.0 += 1;
            }
        }
    }
    for (ino, (valid, links)) in counts {
        assert!(links >= valid, "{ino} has {valid} names and {links} links, {}", context());
    }
    names
}

fn depends(later: &Done, earlier: &Done) -> bool {
    !later.slots.is_disjoint(&earlier.slots)
        || !later.inodes.is_disjoint(&earlier.inodes)
        || later.within.is_some_and(|dir| earlier.inodes.contains(&dir))
}

/// Whether names are those of a closed set of operations which contains the required ones.
fn explained(start: &Names, done: &[Done], dir2: Dir2, required: &BTreeSet<usize>, names: &Names) -> bool {
    (0..1u32 << done.len()).any(|set| {
        let has = |i: usize| set >> i & 1 == 1;
        let closed = (0..done.len()).all(|i| !has(i) || (0..i).all(|j| has(j) || !depends(&done[i], &done[j])));
        if !closed || !required.iter().all(|i| has(*i)) {
            return false;
        }
        let mut model = start.clone();
        for (_, done) in done.iter().enumerate().filter(|(i, _)| has(*i)) {
            apply(&mut model, done.op, done.created);
        }
        reachable(model, dir2) == *names
    })
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound.max(1)
    }
}

struct Checker {
    states: usize,
    dirs: Vec<Ino>,
    /// Directories that operations are tried in: 2, or 3 with one that comes and goes.
    count: usize,
    rng: Rng,
    /// No further operations are tried beyond this number of states.
    limit: usize,
    /// States of which further operations are tried, and how often.
    phases: usize,
}

impl Checker {
    /// Performs operations on an image and checks the states that a crash can leave.
    async fn run(&mut self, base: &Image, dir2: Dir2, ops: &[Op], max_states: usize, phase: usize) -> bool {
        let disk = MemoryDisk::from_image(&SIZES, base.clone());
        let clock = {
            // Each life of the node is later than the one before.
            let ticks = clock();
            let offset = 1_000_000_000 * (phase as u64 + 1);
            Arc::new(move || Time::from_nanos(ticks().as_nanos() + offset)) as Clock
        };
        let fs = FileSystem::mount(disk.clone(), clock).await.unwrap();
        let start = visible(&fs, &self.dirs, dir2, &|| "the start".to_owned()).await;
        let mut dir2 = dir2.filter(|d| start.values().any(|id| id == d));
        let mut names = start.clone();
        disk.record();
        let mut done = Vec::new();
        for op in ops {
            let Some(performed) = perform(&fs, &self.dirs, &mut dir2, &mut names, *op).await else {
                return false;
            };
            done.push(performed);
        }
        // With nothing lost, all is there.
        assert_eq!(visible(&fs, &self.dirs, dir2, &|| format!("{ops:?}, nothing lost")).await, names);
        let operations = disk.recorded();
        let graph = Graph::new(&operations);
        let states = match graph.all_closed(max_states) {
            Some(all) => all,
            None => (0..max_states).map(|_| graph.random_closed(self.rng.below(usize::MAX) as u64)).collect(),
        };
        // An fsync after the operations: the closure of what it flushes must hold them.
        let mut synced = Vec::new();
        for slot in (0..3).flat_map(|d| (0..2).map(move |n| (d, n))) {
            if let Some((ino, _)) = names.get(&slot) {
                let blocks: BTreeSet<BlockNo> = [ino.block()].into_iter().chain(fs.name_blocks(*ino)).collect();
                let newest = graph.versions.iter().enumerate().filter(|(_, v)| blocks.contains(&v.block)).map(|(i, _)| i);
                let state = graph.closure(newest);
                let about: BTreeSet<usize> = (0..done.len()).filter(|i| done[*i].slots.contains(&slot)).collect();
                synced.push((state, about));
            }
        }
        for (state, required) in states.into_iter().map(|s| (s, BTreeSet::new())).chain(synced) {
            self.states += 1;
            let mut required = required;
            // Whatever was fully written must be there.
            for number in 0..done.len() {
                let mut versions = graph.versions.iter().enumerate().filter(|(_, v)| v.operation == number);
                if versions.clone().next().is_some() && versions.all(|(i, _)| state.contains(&i)) {
                    required.insert(number);
                }
            }
            let image = graph.image(base, &state);
            let crashed = MemoryDisk::from_image(&SIZES, image.clone());
            let context = || format!("{done:#?}\nstate {state:?} of {:#?}", graph.versions.len());
            let fs = FileSystem::mount(crashed.clone(), super::tests::clock()).await.unwrap();
            let shown = visible(&fs, &self.dirs, dir2, &context).await;
            assert!(
                explained(&start, &done, dir2, &required, &shown),
                "the names {shown:?} after {done:#?} from {start:?}, required {required:?}, are not those of any closed set"
            );
            if self.rng.below(8) == 0 {
                let report = check::check(&DiskSource(crashed.clone()), &mut |_| {}).await.unwrap();
                assert!(report.is_sound(), "{:?}, {}", report.issues, context());
                let dry = fs.collect(GcOptions { dry_run: true, ..GcOptions::default() }, &mut |_| true).await.unwrap();
                assert_eq!(report.is_clean(), dry == GcReport { swept: dry.swept, blocks: dry.blocks, ..GcReport::default() });
                // One round may uncover what the next one takes (what was in a directory that is gone).
                for _ in 0..3 {
                    fs.collect(GcOptions::default(), &mut |_| true).await.unwrap();
                }
                let report = check::check(&DiskSource(crashed.clone()), &mut |_| {}).await.unwrap();
                assert!(report.is_clean(), "{:?}, {}", report.issues, context());
                assert_eq!(visible(&fs, &self.dirs, dir2, &context).await, shown, "names after the collector, {}", context());
            }
            if phase + 1 < self.phases && self.states < self.limit && self.rng.below(8) == 0 {
                let ops = all_ops(self.count);
                for _ in 0..3 {
                    let op = ops[self.rng.below(ops.len())];
                    Box::pin(self.run(&image, dir2, &[op], 60, phase + 1)).await;
                }
            }
        }
        true
    }
}

/// More names in each directory: how many, and how long. None; a root that grows at the second further name; a leaf that is
/// split at the second or third one; several leaves.
const FILLERS: [(usize, usize); 5] = [(0, 0), (8, 205), (16, 209), (16, 205), (30, 200)];

/// A file system with two directories and some more names in each.
async fn base((filler, len): (usize, usize), start: &[Op]) -> (Image, Vec<Ino>) {
    let fs = fresh(&SIZES).await;
    let mut dirs = Vec::new();
    for name in [b"A", b"B"] {
        dirs.push(fs.make(&ROOT, fs.root(), name, NewNode::Directory, 0o755).await.unwrap().ino);
    }
    for dir in &dirs {
        for i in 0..filler {
            let name = format!("{i:0>len$}");
            fs.make(&ROOT, *dir, name.as_bytes(), NewNode::File, 0o644).await.unwrap();
        }
    }
    let mut names = Names::new();
    for op in start {
        perform(&fs, &dirs, &mut None, &mut names, *op).await.unwrap();
    }
    (fs.disk().image(), dirs)
}

fn budget(default: usize) -> usize {
    std::env::var("PULSAR_CRASH_STATES").ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

const STARTS: [&[Op]; 4] = [
    &[],
    &[Op::Create((0, 0))],
    &[Op::Create((0, 0)), Op::Create((1, 1))],
    &[Op::Create((0, 0)), Op::Link((0, 0), (0, 1)), Op::Create((1, 0))],
];

#[tokio::test]
async fn every_crash_state_of_two_operations_is_legal() {
    let ops = all_ops(2);
    for filler in FILLERS {
        for start in STARTS {
            let (image, dirs) = base(filler, start).await;
            let mut checker = Checker { states: 0, dirs, count: 2, rng: Rng(filler.0 as u64 + 7), phases: 1, limit: budget(200) };
            // In an order that a small budget samples evenly.
            for round in 0..ops.len() {
                for (number, first) in ops.iter().enumerate() {
                    let second = ops[(number * 7 + round) % ops.len()];
                    if checker.states < checker.limit {
                        checker.run(&image, None, &[*first, second], 400, 0).await;
                    }
                }
            }
        }
    }
}

/// Random sequences of mostly possible operations.
async fn random_sequences(count: usize, states: usize) {
    let ops = all_ops(count);
    for (filler, seed) in FILLERS.into_iter().zip(1..) {
        for start in STARTS {
            let (image, dirs) = base(filler, start).await;
            let mut checker = Checker { states: 0, dirs, count, rng: Rng(seed), phases: 3, limit: budget(states) };
            while checker.states < checker.limit {
                let length = 3 + checker.rng.below(2);
                let mut sequence = Vec::new();
                let (mut names, mut dir2) = (Names::new(), None);
                let mut fresh = 100;
                for op in start {
                    fresh += 1;
                    apply(&mut names, *op, Some((Ino(0), fresh)));
                }
                // A model without inodes chooses.
                while sequence.len() < length {
                    let op = ops[checker.rng.below(ops.len())];
                    if possible(&names, dir2, op) {
                        fresh += 1;
                        apply(&mut names, op, Some((Ino(0), fresh)));
                        if matches!(op, Op::Mkdir(_)) {
                            dir2 = Some((Ino(0), fresh));
                        }
                        sequence.push(op);
                    }
                }
                checker.run(&image, None, &sequence, 120, 0).await;
            }
        }
    }
}

#[tokio::test]
async fn crash_states_of_longer_sequences_are_legal() {
    random_sequences(2, 200).await;
}

#[tokio::test]
async fn crash_states_with_directories_that_come_and_go_are_legal() {
    random_sequences(3, 300).await;
}

/// The leftovers that the rules are about (C1 … C8 of the protocol's notes), by name.
#[tokio::test]
async fn the_known_counterexamples_do_not_happen() {
    let (a, b, c) = ((0, 0), (0, 1), (1, 1));
    let cases: &[&[Op]] = &[
        &[Op::Create(a), Op::Link(a, c), Op::Unlink(a), Op::Rename(c, a)],
        &[Op::Create(a), Op::Rename(a, b)],
        &[Op::Create(a), Op::Rename(a, b), Op::Create(a)],
        &[Op::Create(a), Op::Link(a, c), Op::Unlink(a)],
        &[Op::Create(a), Op::Create(b), Op::Link(a, c), Op::Rename(b, a)],
        &[Op::Create(a), Op::Link(a, c)],
        &[Op::Create(a), Op::Unlink(a), Op::Create(a), Op::Create(b)],
        &[Op::Create(a), Op::Create(b), Op::Link(b, c), Op::Rename(a, b), Op::Unlink(c)],
    ];
    for filler in FILLERS {
        let (image, dirs) = base(filler, &[]).await;
        for case in cases {
            let mut checker = Checker { states: 0, dirs: dirs.clone(), count: 2, rng: Rng(5), phases: 2, limit: budget(200) };
            assert!(checker.run(&image, None, case, 100, 0).await);
        }
    }
}

/// Two directories of different parents change places: in every crash state both names are old, or both are new, and `..`,
/// what is in the directories and what may be done with them agree.
#[tokio::test]
async fn an_exchange_of_directories_is_whole_in_every_crash_state() {
    for filler in FILLERS {
        let (image, dirs) = base(filler, &[]).await;
        let disk = MemoryDisk::from_image(&SIZES, image);
        let fs = FileSystem::mount(disk.clone(), clock()).await.unwrap();
        let mut inner = Vec::new();
        for (dir, name) in dirs.iter().zip(NAMES) {
            let made = fs.make(&ROOT, *dir, name, NewNode::Directory, 0o755).await.unwrap().ino;
            fs.make(&ROOT, made, b"file", NewNode::File, 0o644).await.unwrap();
            inner.push(made);
        }
        let base = disk.image();
        disk.record();
        fs.rename(&ROOT, dirs[0], NAMES[0], dirs[1], NAMES[1], RenameFlags::Exchange).await.unwrap();
        let graph = Graph::new(&disk.recorded());
        let states = match graph.all_closed(budget(400)) {
            Some(all) => all,
            None => (0..budget(400)).map(|seed| graph.random_closed(seed as u64)).collect(),
        };
        let mut seen = BTreeSet::new();
        for state in states {
            let crashed = MemoryDisk::from_image(&SIZES, graph.image(&base, &state));
            let fs = FileSystem::mount(crashed.clone(), clock()).await.unwrap();
            let found = [fs.lookup(dirs[0], NAMES[0]).await.unwrap().ino, fs.lookup(dirs[1], NAMES[1]).await.unwrap().ino];
            let exchanged = found == [inner[1], inner[0]];
            assert!(exchanged || found == [inner[0], inner[1]], "{found:?} of {inner:?}, state {state:?}");
            seen.insert(exchanged);
            for (dir, sub) in dirs.iter().zip(found) {
                assert_eq!(fs.lookup(sub, b"..").await.unwrap().ino, *dir, "state {state:?}");
                assert!(fs.lookup(sub, b"file").await.is_ok());
                // Neither may go below itself, wherever it is.
                let name = NAMES[usize::from(*dir == dirs[1])];
                let below = fs.rename(&ROOT, *dir, name, sub, b"x", RenameFlags::Replace).await;
                assert!(matches!(below, Err(FsError::Invalid(_))), "state {state:?}");
            }
            let report = check::check(&DiskSource(crashed.clone()), &mut |_| {}).await.unwrap();
            assert!(report.is_sound(), "{:?}, state {state:?}", report.issues);
            // What is left of the exchange harms no later operation: half of the states go on without the collector.
            if state.len() % 2 == 0 {
                for _ in 0..3 {
                    fs.collect(GcOptions::default(), &mut |_| true).await.unwrap();
                }
                let report = check::check(&DiskSource(crashed.clone()), &mut |_| {}).await.unwrap();
                assert!(report.is_clean(), "{:?}, state {state:?}", report.issues);
            }
            fs.rename(&ROOT, dirs[0], NAMES[0], dirs[1], b"moved", RenameFlags::Replace).await.unwrap();
            assert_eq!(fs.lookup(found[0], b"..").await.unwrap().ino, dirs[1]);
            for (name, sub) in [(&b"moved"[..], found[0]), (NAMES[1], found[1])] {
                fs.unlink(&ROOT, sub, b"file").await.unwrap();
                fs.rmdir(&ROOT, dirs[1], name).await.unwrap();
                assert_eq!(
                    fs.make(&ROOT, sub, b"y", NewNode::File, 0o644).await.err().map(|e| e.errno()),
                    fs.attributes(sub).await.err().map(|e| e.errno()).or(Some(2))
                );
            }
        }
        assert_eq!(seen.len(), 2, "both outcomes were looked at");
    }
}
