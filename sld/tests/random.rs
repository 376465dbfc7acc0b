//! Random files on three nodes: an inode with data blocks each, created, read, overwritten, extended, cut and removed by
//! concurrent operations. Every read under a token sees what the last commit on any node wrote; also when nodes die.

mod world;

use bytes::Bytes;
use cluster::sim::Rng;
use cluster::{BLOCK_SIZE, BlockNo, NodeId};
use parking_lot::Mutex;
use sld::{
    After, Content, Disk, DiskError, Extent, FlushTarget, Kind, Mode, Operation, Options, PulsarDisk, Tag, Write, WriteClass,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use world::{World, inode};

/// A file: a number that changes with every commit, and its data blocks, each with the number that it was written with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct File {
    number: u64,
    data: Vec<(BlockNo, u64)>,
}

impl File {
    fn encode(&self) -> Bytes {
        let mut words = vec![0x1234, self.number, self.data.len() as u64];
        words.extend(self.data.iter().flat_map(|(b, n)| [b.pack(), *n]));
        block(&words)
    }

    fn decode(data: &Bytes) -> Option<File> {
        let word = |i: usize| u64::from_le_bytes(data[i * 8..i * 8 + 8].try_into().unwrap());
        if word(0) != 0x1234 {
            return None;
        }
        let data = (0..word(2) as usize).map(|i| (BlockNo::unpack(word(3 + 2 * i)), word(4 + 2 * i))).collect();
        Some(File { number: word(1), data })
    }
}

fn block(words: &[u64]) -> Bytes {
    let mut v: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    v.resize(BLOCK_SIZE, 0);
    Bytes::from(v)
}

#[derive(Default)]
struct Model {
    files: BTreeMap<BlockNo, File>,
    writer: BTreeMap<BlockNo, usize>,
    /// Blocks that are or once were inodes.
    known: Vec<BlockNo>,
    next: u64,
    done: u64,
    full: u64,
}

type Shared = Arc<Mutex<Model>>;

struct Worker {
    disk: PulsarDisk,
    node: usize,
    model: Shared,
    rng: Rng,
}

fn write(b: BlockNo, at: BlockNo, kind: Kind, content: Content, class: WriteClass, after: Vec<After>) -> Write {
    let tag = Tag { kind, owner: b.pack(), offset: 0, birth: 1 };
    Write { block: at, object: inode(b), content, tag, class, after }
}

impl Worker {
    fn number(&self) -> u64 {
        let mut m = self.model.lock();
        m.next += 1;
        m.next
    }

    fn pick(&mut self) -> Option<BlockNo> {
        let m = self.model.lock();
        self.rng.pick(&m.known).copied()
    }

    /// Writes a file's new contents: some of its old blocks again, and some new ones.
    fn put(&mut self, op: &mut Operation, b: BlockNo, file: &mut File, fresh: Option<Extent>) {
        let n = file.number;
        for (at, number) in &mut file.data {
            if self.rng.percent(20) {
                *number = n;
                let content = Content::Data(block(&[b.pack(), n]));
                op.push(write(b, *at, Kind::Data, content, WriteClass::OverwrittenData, vec![]));
            }
        }
        for k in 0..fresh.map_or(0, |e| e.len) {
            let start = fresh.map_or(BlockNo::default(), |e| e.start);
            let at = BlockNo::new(start.mirror, start.index + k);
            file.data.push((at, n));
            let content = Content::Data(block(&[b.pack(), n]));
            op.push(write(b, at, Kind::Data, content, WriteClass::FreshData, vec![]));
        }
    }

    async fn step(&mut self) -> Result<(), DiskError> {
        let disk = self.disk.clone();
        disk.admit().await?;
        match self.rng.below(20) {
            0..=3 => {
                let b = match disk.alloc(None, 1).await {
                    Ok(e) => e.start,
                    Err(DiskError::NoSpace) => {
                        self.model.lock().full += 1;
                        return Ok(());
                    }
                    Err(e) => return Err(e),
                };
                assert!(!self.model.lock().files.contains_key(&b), "{b} is given out, and a file");
                let tokens = disk.adopt(inode(b));
                if self.rng.percent(10) {
                    disk.unalloc(Extent { start: b, len: 1 });
                    return Ok(());
                }
                let mut file = File { number: self.number(), data: Vec::new() };
                let mut op = Operation::new();
                let count = self.rng.below(5) as u32;
                let fresh = if count > 0 { disk.alloc(Some(b), count).await.ok() } else { None };
                self.put(&mut op, b, &mut file, fresh);
                let after = vec![After::DataOf(inode(b))];
                op.push(write(b, b, Kind::Inode, Content::Data(file.encode()), WriteClass::Metadata, after));
                disk.commit(op)?;
                let mut m = self.model.lock();
                m.files.insert(b, file);
                m.writer.insert(b, self.node);
                if !m.known.contains(&b) {
                    m.known.push(b);
                }
                drop(m);
                drop(tokens);
            }
            4..=9 => {
                let Some(b) = self.pick() else { return Ok(()) };
                let _tokens = disk.acquire(&[(inode(b), Mode::Shared)]).await?;
                self.read(b).await?;
            }
            10..=14 => {
                let Some(b) = self.pick() else { return Ok(()) };
                let Some(c) = self.pick() else { return Ok(()) };
                let _tokens = disk.acquire(&[(inode(b), Mode::Exclusive), (inode(c), Mode::Exclusive)]).await?;
                let mut files = BTreeMap::new();
                for x in [b, c] {
                    if let Some(f) = self.read(x).await? {
                        files.insert(x, f);
                    }
                }
                let mut op = Operation::new();
                for (x, f) in &mut files {
                    f.number = self.number();
                    let fresh = if f.data.len() < 20 && self.rng.percent(30) {
                        disk.alloc(f.data.last().map(|d| d.0), 3).await.ok()
                    } else {
                        None
                    };
                    self.put(&mut op, *x, f, fresh);
                    let mut after = vec![After::DataOf(inode(*x))];
                    if self.rng.percent(50) {
                        after.push(After::Block(b));
                    }
                    // Cut some off: free after the inode.
                    let cut = if self.rng.percent(30) { f.data.pop() } else { None };
                    let i = op.push(write(*x, *x, Kind::Inode, Content::Data(f.encode()), WriteClass::Metadata, after));
                    if let Some((at, _)) = cut {
                        op.push(write(*x, at, Kind::Free, Content::Free, WriteClass::Metadata, vec![After::Write(i)]));
                    }
                }
                disk.commit(op)?;
                let mut m = self.model.lock();
                for (x, f) in files {
                    m.files.insert(x, f);
                    m.writer.insert(x, self.node);
                }
            }
            15 | 16 => {
                let Some(b) = self.pick() else { return Ok(()) };
                let _tokens = disk.acquire(&[(inode(b), Mode::Exclusive)]).await?;
                let Some(f) = self.read(b).await? else { return Ok(()) };
                let mut op = Operation::new();
                // First an inode without data, then the blocks, then the inode itself.
                let empty = File { number: self.number(), data: Vec::new() };
                let i = op.push(write(b, b, Kind::Inode, Content::Data(empty.encode()), WriteClass::Metadata, vec![]));
                for (at, _) in &f.data {
                    op.push(write(b, *at, Kind::Free, Content::Free, WriteClass::Metadata, vec![After::Write(i)]));
                }
                op.push(write(b, b, Kind::Free, Content::Free, WriteClass::Metadata, vec![After::Write(i)]));
                disk.commit(op)?;
                let mut m = self.model.lock();
                m.files.remove(&b);
                m.writer.insert(b, self.node);
            }
            17 => {
                let target = match self.rng.below(3) {
                    0 => FlushTarget::All,
                    _ => self.pick().map_or(FlushTarget::All, |b| FlushTarget::Object(inode(b))),
                };
                disk.flush(&[target]).await?;
            }
            18 => {
                let usage = disk.usage().await?;
                assert!(usage.free <= usage.blocks);
            }
            _ => tokio::time::sleep(Duration::from_millis(self.rng.below(30))).await,
        }
        self.model.lock().done += 1;
        Ok(())
    }

    /// Reads a file under its token, and compares it with what was committed last.
    async fn read(&mut self, b: BlockNo) -> Result<Option<File>, DiskError> {
        let data = self.disk.read(inode(b), b).await?;
        let seen = File::decode(&data).filter(|_| !data.iter().all(|x| *x == 0));
        let truth = self.model.lock().files.get(&b).cloned();
        // What was there before a block was freed may still be seen by one who has no business with it.
        assert!(seen == truth || truth.is_none(), "n{} reads {b}: {seen:?}, committed {truth:?}", self.node);
        if let Some(f) = &truth {
            let blocks: Vec<BlockNo> = f.data.iter().map(|d| d.0).collect();
            for (data, (at, n)) in self.disk.read_many(inode(b), &blocks).await?.iter().zip(&f.data) {
                let word = |i: usize| u64::from_le_bytes(data[i * 8..i * 8 + 8].try_into().unwrap());
                // A number above the inode's: written by a node that died before it wrote the inode.
                assert!(
                    word(0) == b.pack() && word(1) >= *n,
                    "n{} reads {at} of {b}: {:x} {} for {n}",
                    self.node,
                    word(0),
                    word(1)
                );
            }
        }
        Ok(truth)
    }
}

fn work(world: &World, model: &Shared, node: usize, seed: u64, steps: u64) -> tokio::task::JoinHandle<()> {
    let mut worker = Worker { disk: world.disk(node), node, model: model.clone(), rng: Rng::new(seed) };
    tokio::spawn(async move {
        for _ in 0..steps {
            match worker.step().await {
                Ok(()) => {}
                Err(DiskError::Lost | DiskError::Shutdown) => return,
                Err(e) => panic!("n{}: {e}", worker.node),
            }
        }
    })
}

fn options() -> Options {
    Options { cache_bytes: 64 << 10, dirty_bytes: 256 << 10, tokens: 20, ..Options::default() }
}

async fn quiet(seed: u64, blocks: u32) -> (u64, u64, u64) {
    let w = World::with(3, blocks, seed, options()).await;
    let model = Shared::default();
    let workers: Vec<_> = (0..6).map(|i| work(&w, &model, 1 + i % 3, seed * 100 + i as u64, 120)).collect();
    for h in workers {
        tokio::time::timeout(Duration::from_secs(600), h).await.expect("progress").expect("no panic");
    }
    w.check();
    for i in 1..=3 {
        w.disk(i).flush(&[FlushTarget::All]).await.unwrap();
        assert_eq!(w.disk(i).status().dirty_bytes, 0);
    }
    // What is on the disks is what was committed, and nothing else is allocated.
    let m = model.lock();
    let mut used: Vec<BlockNo> = m.files.iter().flat_map(|(b, f)| f.data.iter().map(|d| d.0).chain([*b])).collect();
    used.sort();
    assert_eq!(used, w.store.allocated(), "seed {seed}");
    for (b, f) in &m.files {
        assert_eq!(File::decode(&w.store.peek(*b).unwrap().0).as_ref(), Some(f));
    }
    (m.done, m.full, w.net.trace())
}

#[tokio::test(start_paused = true)]
async fn files_on_three_nodes() {
    for seed in 1..3 {
        let (done, _, _) = quiet(seed, 4096).await;
        assert!(done > 500);
    }
}

#[tokio::test(start_paused = true)]
async fn files_on_three_nodes_with_hardly_any_space() {
    let mut full = 0;
    for seed in 11..13 {
        let (done, f, _) = quiet(seed, 40).await;
        assert!(done > 300, "{done}");
        full += f;
    }
    assert!(full > 0, "it was to become full");
}

/// The dead node's unwritten changes are gone: what is on the disks counts.
fn forget(w: &World, model: &Shared, node: usize) {
    let mut m = model.lock();
    let written: Vec<BlockNo> = m.writer.iter().filter(|(_, n)| **n == node).map(|(b, _)| *b).collect();
    for b in written {
        match w.store.peek(b).filter(|(_, tag)| tag.kind == Kind::Inode).and_then(|(data, _)| File::decode(&data)) {
            Some(f) => {
                // Data may be newer than the inode; they are never older, and never another file's.
                for (at, n) in &f.data {
                    let (data, tag) = w.store.peek(*at).expect("data are durable before their inode");
                    let word = |i: usize| u64::from_le_bytes(data[i * 8..i * 8 + 8].try_into().unwrap());
                    assert_eq!((tag.kind, word(0)), (Kind::Data, b.pack()), "{at} of {b}");
                    assert!(word(1) >= *n, "{at} of {b}: {} is older than {n}", word(1));
                }
                m.files.insert(b, f);
            }
            None => drop(m.files.remove(&b)),
        }
        m.writer.insert(b, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn files_on_three_nodes_that_die_and_come_back() {
    let count = std::env::var("SLD_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2);
    for seed in 21..21 + count {
        println!("seed {seed}");
        let mut w = World::with(3, 4096, seed, options()).await;
        w.group.set_adopt_ms(20);
        let model = Shared::default();
        let mut rng = Rng::new(seed);
        for round in 0..6 {
            let mut workers: Vec<_> =
                (0..6).map(|i| Some(work(&w, &model, 1 + i % 3, seed * 1000 + round * 10 + i as u64, 60))).collect();
            tokio::time::sleep(Duration::from_millis(rng.range(20..400))).await;
            let victim = rng.range(1..4) as usize;
            for i in [victim - 1, victim + 2] {
                let h = workers[i].take().expect("there");
                h.abort();
                let _ = h.await;
            }
            w.store.kill(NodeId(victim as u32));
            forget(&w, &model, victim);
            w.down_only(victim);
            for h in workers.into_iter().flatten() {
                let done = tokio::time::timeout(Duration::from_secs(600), h).await;
                if let Err(e) = done.expect("progress") {
                    assert!(!e.is_panic(), "seed {seed} round {round}");
                }
            }
            w.check();
            w.up(victim);
            w.recovered().await;
        }
        for i in 1..=3 {
            w.disk(i).flush(&[FlushTarget::All]).await.unwrap();
        }
        // Blocks may have leaked, but none is shared, and no file lacks one.
        let m = model.lock();
        let mut seen = std::collections::BTreeSet::new();
        for (b, f) in &m.files {
            for at in f.data.iter().map(|d| d.0).chain([*b]) {
                assert!(seen.insert(at), "{at} belongs to two files");
                assert!(w.store.peek(at).is_some_and(|(_, t)| t.kind != Kind::Free), "{at} of {b} is not allocated");
            }
        }
        assert!(m.done > 300, "{}", m.done);
    }
}

#[tokio::test(start_paused = true)]
async fn same_seed_same_run() {
    let (first, second) = (quiet(31, 200).await, quiet(31, 200).await);
    assert_eq!(first, second);
}
