//! All nodes at work at once, while nodes fail in any way at any time. What is read is judged by the registers' rules.
//!
//! Each node writes registers of its own in place, and one by replacing it (write a new file, fsync, rename over the old
//! name), and reads those of all; and it makes and removes files in a directory that all share.

use super::registers::{Register, Version};
use super::stack::StackDisk;
use super::world::{PATIENCE, World};
use crate::driver::Driver;
use crate::driver::node::NodeDriver;
use crate::op::{Op, OpenHow, Outcome, RenameFlag, Reply, errno};
use cluster::sim::Rng;
use fs::FileSystem;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Registers written in place, per node.
const PLACED: usize = 2;
/// Registers per node in all; the last one is written by replacing it.
const PER_NODE: usize = PLACED + 1;

pub(super) struct Shared {
    pub(super) registers: Vec<Mutex<Register>>,
    /// Nodes that may have lost something since, or may be about to.
    uncertain: Vec<AtomicBool>,
    /// How often a node became uncertain.
    doubts: Vec<AtomicU64>,
    pub(super) failure: Mutex<Option<String>>,
    pub(super) counts: Mutex<BTreeMap<&'static str, u64>>,
    /// A planted bug: fsync is left out.
    no_fsync: bool,
}

impl Shared {
    pub(super) fn new(nodes: usize, no_fsync: bool) -> Shared {
        let lens = [300, 5000, 40_000, 4096, 13_000];
        let registers = (0..nodes * PER_NODE).map(|n| Mutex::new(Register::new(n as u32, lens[n % lens.len()]))).collect();
        Shared {
            registers,
            uncertain: (0..nodes).map(|_| AtomicBool::new(false)).collect(),
            doubts: (0..nodes).map(|_| AtomicU64::new(0)).collect(),
            failure: Mutex::new(None),
            counts: Mutex::new(BTreeMap::new()),
            no_fsync,
        }
    }

    fn fail(&self, what: String) {
        self.failure.lock().get_or_insert(what);
    }

    fn count(&self, what: &'static str) {
        *self.counts.lock().entry(what).or_default() += 1;
    }

    fn owner(&self, register: usize) -> usize {
        register / PER_NODE
    }

    pub(super) fn lose(&self, node: usize) {
        self.uncertain[node].store(true, Ordering::Relaxed);
        self.doubts[node].fetch_add(1, Ordering::Relaxed);
        self.registers[node * PER_NODE..(node + 1) * PER_NODE].iter().for_each(|r| r.lock().lose());
    }

    pub(super) fn trust(&self, node: usize) {
        self.uncertain[node].store(false, Ordering::Relaxed);
    }
}

fn path(register: usize) -> String {
    format!("r{register}")
}

/// One node's program, over one life of its file system.
pub(super) struct Program {
    shared: Arc<Shared>,
    node: usize,
    rng: Rng,
    driver: NodeDriver<StackDisk>,
    /// Doubts of the node at the last loss that an fsync of a file has reported.
    told: BTreeMap<String, u64>,
}

impl Program {
    async fn run(&mut self, op: Op) -> Outcome {
        self.shared.count("operation");
        let shown = tracing::enabled!(tracing::Level::TRACE).then(|| format!("{op:?}"));
        let outcome = self.driver.run(0, &op).await;
        if let Some(op) = shown {
            let answer = match &outcome {
                Ok(Reply::Bytes(bytes)) => format!("{} bytes", bytes.len()),
                other => format!("{other:?}"),
            };
            tracing::trace!("n{}: {op} gives {answer}", self.node + 1);
        }
        outcome
    }

    /// Whether an error is one that a node in doubt may give. `doubts`: how many it had when the operation began.
    fn excused(&self, error: i32, doubts: u64) -> bool {
        let now = self.shared.doubts[self.node].load(Ordering::Relaxed);
        error == errno::EIO && (self.shared.uncertain[self.node].load(Ordering::Relaxed) || now != doubts)
    }

    fn doubts(&self) -> u64 {
        self.shared.doubts[self.node].load(Ordering::Relaxed)
    }

    async fn pause(&mut self, ms: u64) {
        let pause = self.rng.below(ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    /// Runs operations that belong together; an error that is not excused is a failure.
    async fn all(&mut self, ops: Vec<Op>) -> bool {
        for op in ops {
            let doubts = self.doubts();
            let shown = format!("{op:?}");
            if let Err(error) = self.run(op).await {
                if !self.excused(error, doubts) {
                    self.shared.fail(format!("n{}: {shown} fails with errno {error}", self.node + 1));
                }
                return false;
            }
        }
        true
    }

    async fn write_in_place(&mut self) {
        let which = self.node * PER_NODE + self.rng.below(PLACED as u64) as usize;
        let (version, losses, fill, len) = {
            let mut r = self.shared.registers[which].lock();
            let version = r.begin();
            (version, r.losses, r.fill(version), r.len as u32)
        };
        let how = OpenHow { write: true, read: true, ..OpenHow::default() };
        if !self.all(vec![Op::Open { slot: 1, path: path(which), how }, Op::Write { slot: 1, offset: 0, len, fill }]).await {
            return;
        }
        self.wrote(which, version, losses);
        if self.rng.percent(30) {
            self.sync(which, version, Op::Fsync { slot: 1 }).await;
        }
        let _ = self.run(Op::Close { slot: 1 }).await;
    }

    async fn replace(&mut self) {
        let which = self.node * PER_NODE + PLACED;
        let (version, losses, fill, len) = {
            let mut r = self.shared.registers[which].lock();
            let version = r.begin();
            (version, r.losses, r.fill(version), r.len as u32)
        };
        let temporary = format!("{}.new", path(which));
        let how = OpenHow { write: true, create: true, truncate: true, ..OpenHow::default() };
        let done =
            self.all(vec![Op::Open { slot: 2, path: temporary.clone(), how }, Op::Write { slot: 2, offset: 0, len, fill }]).await;
        if !done || !self.shared.no_fsync && !self.fsync(temporary.clone(), Op::Fsync { slot: 2 }).await {
            return;
        }
        let rename = Op::Rename { from: temporary, to: path(which), flag: RenameFlag::Replace };
        if !self.all(vec![Op::Close { slot: 2 }, rename]).await {
            return;
        }
        self.wrote(which, version, losses);
        if self.rng.percent(40) {
            self.sync(which, version, Op::FsyncDir { path: String::new() }).await;
        }
    }

    fn wrote(&self, which: usize, version: Version, losses: u64) {
        self.shared.count("write");
        if !self.shared.uncertain[self.node].load(Ordering::Relaxed) {
            self.shared.registers[which].lock().wrote(version, losses);
        }
    }

    /// fsync. What a node lost is reported by the next fsync of the file, once for each time, however late that is.
    async fn fsync(&mut self, what: String, op: Op) -> bool {
        let doubts = self.doubts();
        match self.run(op).await {
            Ok(_) => true,
            Err(error) => {
                let told = self.told.insert(what.clone(), doubts).unwrap_or(0);
                if !(self.excused(error, doubts) || error == errno::EIO && told < doubts) {
                    self.shared.fail(format!("n{}: fsync of {what} fails with errno {error}", self.node + 1));
                }
                false
            }
        }
    }

    async fn sync(&mut self, which: usize, version: Version, op: Op) {
        let what = if matches!(op, Op::FsyncDir { .. }) { "the directory".to_owned() } else { path(which) };
        let done = self.shared.no_fsync || self.fsync(what, op).await;
        if done {
            self.shared.count("fsync");
            let mut r = self.shared.registers[which].lock();
            r.synced = r.synced.max(version);
        }
    }

    async fn read(&mut self, which: usize) {
        let doubts = self.doubts();
        let (before, len) = {
            let r = self.shared.registers[which].lock();
            (r.before(), r.len as u32)
        };
        let how = OpenHow { read: true, ..OpenHow::default() };
        let opened = self.run(Op::Open { slot: 3, path: path(which), how }).await;
        let read = match opened {
            Ok(_) => self.run(Op::Read { slot: 3, offset: 0, len: len + 1000 }).await,
            Err(error) => Err(error),
        };
        match read {
            Ok(Reply::Bytes(bytes)) => {
                self.shared.count("read");
                let by_writer = self.shared.owner(which) == self.node;
                let judged = self.shared.registers[which].lock().judge(before, &bytes, by_writer);
                if let Err(what) = judged {
                    self.shared.fail(format!("n{}: {what}", self.node + 1));
                }
            }
            Ok(other) => self.shared.fail(format!("n{}: a read answers {other:?}", self.node + 1)),
            Err(error) if self.excused(error, doubts) => {}
            Err(error) => {
                let what = format!("n{}: reading register {which} fails with errno {error}", self.node + 1);
                self.shared.fail(what);
            }
        }
        let _ = self.run(Op::Close { slot: 3 }).await;
    }

    /// Makes a file, and removes one in two.
    async fn churn(&mut self, number: u64) {
        let path = format!("shared/n{}-{}-{number}", self.node + 1, self.rng.below(1 << 40));
        let how = OpenHow { write: true, create: true, ..OpenHow::default() };
        let len = self.rng.below(9000) as u32;
        let made = vec![
            Op::Open { slot: 0, path: path.clone(), how },
            Op::Write { slot: 0, offset: self.rng.below(3) * 5000, len, fill: 1 },
            Op::Close { slot: 0 },
        ];
        if self.all(made).await && self.rng.percent(50) {
            match self.run(Op::Unlink { path }).await {
                Ok(_) => {}
                // The file may have been among what was lost, also while this waited.
                Err(errno::ENOENT | errno::EIO) if self.doubts() != 0 => {}
                Err(error) => self.shared.fail(format!("n{}: removing a file fails with errno {error}", self.node + 1)),
            }
        }
    }

    /// Replaces its register, writes one in place, makes names beside that; without a pause.
    async fn script(mut self, kind: u8) {
        for number in 0..2 {
            if kind == 0 {
                self.replace().await;
                self.read(self.rng.clone().below(self.shared.registers.len() as u64) as usize).await;
                self.replace().await;
            } else {
                self.churn(number).await;
                self.write_in_place().await;
            }
        }
    }

    async fn work(mut self, kind: u8) {
        let mut number = 0;
        loop {
            match kind {
                0 => self.write_in_place().await,
                1 => self.replace().await,
                2 => {
                    let which = self.rng.below(self.shared.registers.len() as u64) as usize;
                    self.read(which).await;
                }
                _ => self.churn(number).await,
            }
            number += 1;
            self.pause(if kind == 3 { 900 } else { 300 }).await;
        }
    }
}

/// The programs of the nodes that run.
pub(super) struct Programs {
    shared: Arc<Shared>,
    tasks: Vec<Vec<JoinHandle<()>>>,
}

impl Programs {
    pub(super) fn new(shared: Arc<Shared>, nodes: usize) -> Programs {
        Programs { shared, tasks: (0..nodes).map(|_| Vec::new()).collect() }
    }

    /// Each node that is up does a little of everything, and ends.
    pub(super) fn start_scripts(&mut self, world: &mut World, node: usize) {
        let Some(fs) = world.fs(node) else { return };
        self.tasks[node] = (0..2)
            .map(|kind| {
                let program = self.program(world.rng.fork(), node, fs.clone());
                tokio::spawn(program.script(kind))
            })
            .collect();
    }

    pub(super) fn have_ended(&self) -> bool {
        self.tasks.iter().flatten().all(JoinHandle::is_finished)
    }

    /// Reads all registers on a node.
    pub(super) async fn read_all(&self, world: &mut World, node: usize) -> Result<(), String> {
        let Some(fs) = world.fs(node) else { return Err("no file system".into()) };
        let mut program = self.program(world.rng.fork(), node, fs);
        let all = async {
            for which in 0..program.shared.registers.len() {
                program.read(which).await;
            }
        };
        let read = tokio::time::timeout(PATIENCE, all).await;
        read.map_err(|_| format!("no progress: the last reads on n{} do not end", node + 1))
    }

    fn start(&mut self, world: &mut World, node: usize) -> Result<(), String> {
        let fs = world.fs(node).ok_or("no file system")?;
        self.tasks[node] = (0..4)
            .map(|kind| {
                let program = self.program(world.rng.fork(), node, fs.clone());
                tokio::spawn(program.work(kind))
            })
            .collect();
        Ok(())
    }

    fn program(&self, rng: Rng, node: usize, fs: Arc<FileSystem<StackDisk>>) -> Program {
        Program { shared: self.shared.clone(), node, rng, driver: NodeDriver::new(vec![Some(fs)]), told: BTreeMap::new() }
    }

    pub(super) fn stop(&mut self, node: usize) {
        self.tasks[node].drain(..).for_each(|t| t.abort());
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        self.tasks.iter().flatten().for_each(JoinHandle::abort);
    }
}

/// Runs for `steps` faults or pauses.
///
/// # Errors
/// What was read wrongly, lost, or did not go on.
pub async fn run(world: &mut World, steps: usize, faults: bool, no_fsync: bool) -> Result<(), String> {
    let nodes = world.len();
    let shared = Arc::new(Shared::new(nodes, no_fsync));
    let mut programs = Programs::new(shared.clone(), nodes);
    prepare(world, &programs).await?;
    for node in 0..nodes {
        programs.start(world, node)?;
    }
    let mut cut: Vec<usize> = Vec::new();
    for step in 0..steps {
        let pause = world.rng.below(1500);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        if faults {
            fault(world, &mut programs, &mut cut).await.map_err(|e| format!("fault {step}: {e}"))?;
        }
        if let Some(failure) = shared.failure.lock().take() {
            return Err(format!("by fault {step}: {failure}\n{}", world.dump()));
        }
    }
    repair(world, &mut programs, &mut cut).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = shared.counts.lock().get("write").copied().unwrap_or(0);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let after = shared.counts.lock().get("write").copied().unwrap_or(0);
    if after <= before {
        return Err(format!("no progress: nothing is written once all is well again\n{}", world.dump()));
    }
    // Each program ends its present operation first, so that nothing is half done.
    for node in 0..nodes {
        programs.stop(node);
    }
    for node in 0..nodes {
        programs.read_all(world, node).await?;
    }
    for (what, count) in shared.counts.lock().iter() {
        *world.coverage.entry(what).or_default() += count;
    }
    match shared.failure.lock().take() {
        Some(failure) => Err(format!("at the end: {failure}\n{}", world.dump())),
        None => Ok(()),
    }
}

/// Makes the registers' files, and makes them durable.
pub(super) async fn prepare(world: &mut World, programs: &Programs) -> Result<(), String> {
    let fs = world.fs(0).ok_or("no file system")?;
    let mut program = programs.program(world.rng.fork(), 0, fs.clone());
    let how = OpenHow { write: true, create: true, ..OpenHow::default() };
    let mut ops = vec![Op::Mkdir { path: "shared".into(), mode: 0o755 }];
    for which in 0..programs.shared.registers.len() {
        ops.push(Op::Open { slot: 0, path: path(which), how });
        ops.push(Op::Close { slot: 0 });
    }
    let made = program.all(ops).await;
    fs.sync().await.map_err(|e| e.to_string())?;
    match programs.shared.failure.lock().take() {
        Some(failure) => Err(failure),
        None if !made => Err("the registers cannot be made".into()),
        None => Ok(()),
    }
}

async fn fault(world: &mut World, programs: &mut Programs, cut: &mut Vec<usize>) -> Result<(), String> {
    let nodes = world.len();
    let down: Vec<usize> = (0..nodes).filter(|n| !world.is_up(*n)).collect();
    let spare = (nodes - 1) / 2 > down.len() + cut.len();
    let well: Vec<usize> = world.up().into_iter().filter(|n| !cut.contains(n)).collect();
    let victim = world.rng.pick(&well).copied();
    match (world.rng.below(20), victim) {
        (0..=4, Some(node)) if spare => {
            programs.stop(node);
            programs.shared.lose(node);
            if world.rng.percent(50) { world.kill(node) } else { world.power_off(node) }
        }
        (0..=6, _) if !down.is_empty() => {
            let node = down[world.rng.below(down.len() as u64) as usize];
            world.start(node).await?;
            // It is trusted when it is a member again, which may take a while if others are away.
            settle(world, programs, cut).await?;
        }
        (7 | 8, Some(node)) if spare => {
            programs.shared.lose(node);
            world.isolate(node);
            cut.push(node);
        }
        (9, Some(node)) if spare => {
            let other = (node + 1 + world.rng.below(nodes as u64 - 1) as usize) % nodes;
            // Depending on who leads, any of them may be taken for dead.
            (0..nodes).for_each(|n| programs.shared.lose(n));
            if world.rng.percent(50) {
                world.cut_one_way(node, other)
            } else {
                world.cut_one_way(other, node)
            }
            cut.push(node);
        }
        (10..=13, _) if !cut.is_empty() => {
            world.heal();
            cut.clear();
            settle(world, programs, cut).await?;
        }
        (14, _) => {
            for node in world.up() {
                programs.stop(node);
            }
            (0..nodes).for_each(|n| programs.shared.lose(n));
            world.blackout();
            world.heal();
            cut.clear();
            for node in 0..nodes {
                world.start(node).await?;
                let pause = world.rng.below(300);
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            settle(world, programs, cut).await?;
        }
        (15, Some(node)) => {
            let other = (node + 1) % nodes;
            world.cover("session broken");
            world.net.break_session(super::world::id(node), super::world::id(other));
        }
        _ => {}
    }
    Ok(())
}

/// If nobody is cut off: waits until the running nodes are members again, starts their programs, and trusts them.
async fn settle(world: &mut World, programs: &mut Programs, cut: &[usize]) -> Result<(), String> {
    if cut.is_empty() {
        world.settled().await?;
        // What still runs of operations that began before has ended by then.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    for node in world.up() {
        if programs.tasks[node].is_empty() && world.fs(node).is_some() {
            programs.start(world, node)?;
        }
        if cut.is_empty() {
            programs.shared.trust(node);
        }
    }
    Ok(())
}

async fn repair(world: &mut World, programs: &mut Programs, cut: &mut Vec<usize>) -> Result<(), String> {
    world.heal();
    cut.clear();
    for node in 0..world.len() {
        if !world.is_up(node) {
            world.start(node).await?;
        }
    }
    settle(world, programs, cut).await?;
    world.until("all copies are in sync", World::in_sync).await
}
