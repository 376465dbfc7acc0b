//! `SimDisk`: a disk in memory that forgets, on a crash, what was not flushed; takes virtual time; and fails as told.
//!
//! The same seed and the same calls give the same faults. The disk outlives the node that uses it: clones are the same
//! disk, and a `SimDisk` handed to the next life of a node holds what the last one made durable.

use crate::api::BlockDevice;
use bytes::{Bytes, BytesMut};
use cluster::sim::{Gate, Rng};
use cluster::{BLOCK_SIZE, BoxFuture, watch};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// How the disk behaves.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Time of a read, in microseconds.
    pub read_us: Range<u64>,
    /// Time of a write, in microseconds.
    pub write_us: Range<u64>,
    /// Time of a flush, in microseconds.
    pub flush_us: Range<u64>,
    /// What may happen to it at all: each write and each flush is one event.
    pub gate: Gate,
}

impl Default for DiskOptions {
    fn default() -> Self {
        DiskOptions { read_us: 20..150, write_us: 20..150, flush_us: 100..1_000, gate: Gate::default() }
    }
}

/// A fault that a test injects. Each is used once, by the next call that it fits, unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Reads that touch the block fail with EIO, until it is written again.
    ReadError(u64),
    /// The next write fails with EIO; any part of it may have happened.
    WriteError,
    /// The next flush fails with EIO, and what was not yet durable is lost, though reads still show it until the crash.
    FlushError,
    /// The next write is acknowledged but never happens.
    LostWrite,
    /// The next write goes to the place so many blocks further on.
    MisdirectedWrite(u64),
    /// From now on one write in so many is acknowledged but never happens.
    LosesWrites(u64),
    /// Every flush from now on is acknowledged without being done (a lying cache).
    LyingFlush,
}

/// What the disk has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounts {
    /// Calls of `read`.
    pub reads: u64,
    /// Calls of `write`.
    pub writes: u64,
    /// Calls of `flush`.
    pub flushes: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
}

/// A simulated disk. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    frozen: watch::Sender<bool>,
    blocks: u64,
}

struct State {
    rng: Rng,
    options: DiskOptions,
    durable: BTreeMap<u64, Bytes>,
    /// Writes since the last flush, oldest first: one entry per block written.
    pending: Vec<(u64, Bytes)>,
    /// Entries that ever left `pending` by a flush.
    flushed: usize,
    /// What a read sees of `pending`.
    newest: BTreeMap<u64, Bytes>,
    bad: BTreeSet<u64>,
    faults: Vec<Fault>,
    lying: bool,
    loses_one_in: u64,
    counts: DiskCounts,
    /// Grows with every crash: calls that began before it come to nothing.
    life: u64,
}

impl SimDisk {
    /// An empty disk (all zeros).
    #[must_use]
    pub fn new(blocks: u64, seed: u64) -> Self {
        Self::with_options(blocks, seed, DiskOptions::default())
    }

    /// An empty disk with a behaviour.
    #[must_use]
    pub fn with_options(blocks: u64, seed: u64, options: DiskOptions) -> Self {
        let state = State {
            rng: Rng::new(seed),
            options,
            durable: BTreeMap::new(),
            pending: Vec::new(),
            flushed: 0,
            newest: BTreeMap::new(),
            bad: BTreeSet::new(),
            faults: Vec::new(),
            lying: false,
            loses_one_in: 0,
            counts: DiskCounts::default(),
            life: 0,
        };
        SimDisk { shared: Arc::new(Shared { state: Mutex::new(state), frozen: watch::Sender::new(false), blocks }) }
    }

    /// Power loss: of the writes that were not flushed any subset survives, block by block (so a write of several blocks
    /// can be torn between blocks; within 4 KiB a write is whole). Calls under way never return.
    pub fn crash(&self, seed: u64) {
        self.shared.state.lock().crash(&mut Rng::new(seed));
    }

    /// Power loss in which a chosen part of the unflushed block writes survives: `keep(position, block)`.
    pub fn crash_keeping(&self, mut keep: impl FnMut(usize, u64) -> bool) {
        let mut state = self.shared.state.lock();
        let pending = std::mem::take(&mut state.pending);
        for (position, (block, data)) in pending.into_iter().enumerate() {
            if keep(position, block) {
                state.durable.insert(block, data);
            }
        }
        state.newest.clear();
        state.life += 1;
    }

    /// The process dies but the machine goes on: everything that was written stays (the page cache is not lost). Calls
    /// under way never return.
    pub fn process_died(&self) {
        let mut state = self.shared.state.lock();
        state.settle();
        state.life += 1;
    }

    /// Writes to blocks that a crash now could lose, oldest first.
    #[must_use]
    pub fn unflushed(&self) -> Vec<u64> {
        self.shared.state.lock().pending.iter().map(|(block, _)| *block).collect()
    }

    /// Injects a fault.
    pub fn inject(&self, fault: Fault) {
        let mut state = self.shared.state.lock();
        match fault {
            Fault::ReadError(block) => {
                state.bad.insert(block);
            }
            Fault::LyingFlush => state.lying = true,
            Fault::LosesWrites(one_in) => state.loses_one_in = one_in,
            other => state.faults.push(other),
        }
    }

    /// Takes back all injected faults that were not used yet (damage that was done stays).
    pub fn clear_faults(&self) {
        let mut state = self.shared.state.lock();
        state.faults.clear();
        state.bad.clear();
        state.lying = false;
        state.loses_one_in = 0;
    }

    /// Flips a bit of a block at rest.
    pub fn flip_bit(&self, block: u64, bit: usize) {
        let mut state = self.shared.state.lock();
        let flip = |data: &Bytes| {
            let mut data = BytesMut::from(data.as_ref());
            data[(bit / 8) % BLOCK_SIZE] ^= 1 << (bit % 8);
            data.freeze()
        };
        let old = state.durable.get(&block).cloned().unwrap_or_else(zero);
        state.durable.insert(block, flip(&old));
        if let Some(new) = state.newest.get(&block).map(flip) {
            state.newest.insert(block, new.clone());
            if let Some(last) = state.pending.iter_mut().rev().find(|(b, _)| *b == block) {
                last.1 = new;
            }
        }
    }

    /// From now on every call hangs, until `thaw`.
    pub fn freeze(&self) {
        self.shared.frozen.send_replace(true);
    }

    /// Ends a freeze.
    pub fn thaw(&self) {
        self.shared.frozen.send_replace(false);
    }

    /// What a read would see of a block, without taking time or counting.
    #[must_use]
    pub fn peek(&self, block: u64) -> Bytes {
        self.shared.state.lock().current(block)
    }

    /// What is durable of a block.
    #[must_use]
    pub fn peek_durable(&self, block: u64) -> Bytes {
        self.shared.state.lock().durable.get(&block).cloned().unwrap_or_else(zero)
    }

    /// Blocks that were ever made durable, in order.
    #[must_use]
    pub fn written(&self) -> Vec<u64> {
        self.shared.state.lock().durable.keys().copied().collect()
    }

    /// Puts contents on the disk from outside, durably, as `dd` would.
    pub fn poke(&self, block: u64, data: Bytes) {
        assert_eq!(data.len(), BLOCK_SIZE);
        let mut state = self.shared.state.lock();
        state.newest.remove(&block);
        state.pending.retain(|(b, _)| *b != block);
        state.durable.insert(block, data);
    }

    /// An independent disk with the same contents.
    #[must_use]
    pub fn fork(&self) -> SimDisk {
        let state = self.shared.state.lock();
        let copy = SimDisk::with_options(self.shared.blocks, 0, state.options.clone());
        {
            let mut new = copy.shared.state.lock();
            new.rng = state.rng.clone();
            new.durable.clone_from(&state.durable);
            new.pending.clone_from(&state.pending);
            new.newest.clone_from(&state.newest);
        }
        copy
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> DiskCounts {
        self.shared.state.lock().counts
    }

    /// Sets the counts to zero.
    pub fn reset_counts(&self) {
        self.shared.state.lock().counts = DiskCounts::default();
    }

    /// Takes a call's time, and waits while the disk is frozen. Returns the life in which the call began.
    async fn take_time(&self, which: impl Fn(&DiskOptions) -> Range<u64>) -> u64 {
        let (life, delay) = {
            let mut state = self.shared.state.lock();
            let range = which(&state.options);
            (state.life, Duration::from_micros(state.rng.range(range)))
        };
        tokio::time::sleep(delay).await;
        let mut frozen = self.shared.frozen.subscribe();
        // The sender lives in `shared`, which this future borrows.
        let _ = frozen.wait_for(|frozen| !*frozen).await;
        life
    }

    fn check(&self, at: u64, count: u64) -> io::Result<()> {
        match at.checked_add(count) {
            Some(end) if end <= self.shared.blocks => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    /// What the gate keeps from happening never returns.
    async fn pass(&self) {
        let gate = self.shared.state.lock().options.gate.clone();
        if !gate.pass() {
            std::future::pending::<()>().await;
        }
    }

    /// A call of a life that is over never returns.
    async fn hang_if_dead(&self, life: u64) {
        if self.shared.state.lock().life != life {
            std::future::pending::<()>().await;
        }
    }
}

impl State {
    fn current(&self, block: u64) -> Bytes {
        self.newest.get(&block).or_else(|| self.durable.get(&block)).cloned().unwrap_or_else(zero)
    }

    fn settle(&mut self) {
        for (block, data) in std::mem::take(&mut self.pending) {
            self.durable.insert(block, data);
        }
        self.newest.clear();
    }

    fn crash(&mut self, rng: &mut Rng) {
        // Sometimes nothing survives, sometimes everything, most often a part.
        let chance = [0, 100, 50, 10, 90][rng.below(5) as usize];
        for (block, data) in std::mem::take(&mut self.pending) {
            if rng.percent(chance) {
                self.durable.insert(block, data);
            }
        }
        self.newest.clear();
        self.life += 1;
    }

    fn take_fault(&mut self, fits: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let at = self.faults.iter().position(fits)?;
        Some(self.faults.remove(at))
    }

    fn put(&mut self, block: u64, data: Bytes) {
        self.bad.remove(&block);
        self.newest.insert(block, data.clone());
        self.pending.push((block, data));
    }
}

fn zero() -> Bytes {
    static ZERO: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
    Bytes::from_static(&ZERO)
}

fn eio(what: &str) -> io::Error {
    io::Error::other(format!("simulated disk: {what}"))
}

impl BlockDevice for SimDisk {
    fn blocks(&self) -> u64 {
        self.shared.blocks
    }

    fn read(&self, at: u64, count: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        Box::pin(async move {
            self.check(at, count as u64)?;
            let life = self.take_time(|o| o.read_us.clone()).await;
            self.hang_if_dead(life).await;
            let mut state = self.shared.state.lock();
            state.counts.reads += 1;
            state.counts.bytes_read += (count * BLOCK_SIZE) as u64;
            if state.bad.range(at..at + count as u64).next().is_some() {
                return Err(eio("read error"));
            }
            if count == 1 {
                return Ok(state.current(at));
            }
            let mut out = BytesMut::with_capacity(count * BLOCK_SIZE);
            (at..at + count as u64).for_each(|block| out.extend_from_slice(&state.current(block)));
            Ok(out.freeze())
        })
    }

    fn write(&self, at: u64, parts: Vec<Bytes>) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let length: usize = parts.iter().map(Bytes::len).sum();
            assert!(parts.iter().all(|p| p.len() % BLOCK_SIZE == 0), "whole blocks only");
            let count = (length / BLOCK_SIZE) as u64;
            self.check(at, count)?;
            self.pass().await;
            let life = {
                // From here on a crash may leave any part of it; what is read before the call returns is not defined, and
                // here it is the new contents.
                let mut state = self.shared.state.lock();
                state.counts.writes += 1;
                state.counts.bytes_written += length as u64;
                let fault = state.take_fault(|f| matches!(f, Fault::WriteError | Fault::LostWrite | Fault::MisdirectedWrite(_)));
                let loses = match state.loses_one_in {
                    0 => false,
                    one_in => state.rng.below(one_in) == 0,
                };
                let fault = if loses { Some(Fault::LostWrite) } else { fault };
                let blocks = parts
                    .iter()
                    .flat_map(|part| (0..part.len() / BLOCK_SIZE).map(|i| part.slice(i * BLOCK_SIZE..(i + 1) * BLOCK_SIZE)));
                let shift = match fault {
                    Some(Fault::MisdirectedWrite(by)) => by,
                    _ => 0,
                };
                for (i, data) in blocks.enumerate() {
                    let keep = match fault {
                        Some(Fault::WriteError) => state.rng.percent(50),
                        Some(Fault::LostWrite) => false,
                        _ => true,
                    };
                    let block = at + i as u64 + shift;
                    if keep && block < self.shared.blocks {
                        state.put(block, data);
                    }
                }
                if fault == Some(Fault::WriteError) {
                    return Err(eio("write error"));
                }
                state.life
            };
            self.take_time(|o| o.write_us.clone()).await;
            self.hang_if_dead(life).await;
            Ok(())
        })
    }

    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            // Only what was written before the call need be durable after it.
            let written = {
                let state = self.shared.state.lock();
                state.flushed + state.pending.len()
            };
            let life = self.take_time(|o| o.flush_us.clone()).await;
            self.hang_if_dead(life).await;
            self.pass().await;
            let mut state = self.shared.state.lock();
            state.counts.flushes += 1;
            if state.take_fault(|f| matches!(f, Fault::FlushError)).is_some() {
                state.pending.clear();
                return Err(eio("flush failed"));
            }
            if state.lying {
                return Ok(());
            }
            let upto = written.saturating_sub(state.flushed).min(state.pending.len());
            state.flushed += upto;
            let done: Vec<_> = state.pending.drain(..upto).collect();
            for (block, data) in done {
                state.durable.insert(block, data);
            }
            let still: BTreeSet<u64> = state.pending.iter().map(|(block, _)| *block).collect();
            state.newest.retain(|block, _| still.contains(block));
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(byte: u8) -> Bytes {
        Bytes::from(vec![byte; BLOCK_SIZE])
    }

    #[tokio::test(start_paused = true)]
    async fn a_crash_loses_only_what_was_not_flushed() {
        let mut torn = 0;
        for seed in 0..50 {
            let disk = SimDisk::new(64, seed);
            disk.write(0, vec![block(1), block(2)]).await.unwrap();
            disk.flush().await.unwrap();
            disk.write(0, vec![block(3), block(4)]).await.unwrap();
            assert_eq!(disk.read(0, 2).await.unwrap(), [block(3), block(4)].concat());
            assert_eq!(disk.unflushed(), [0, 1]);
            disk.crash(seed);
            let (a, b) = (disk.peek(0)[0], disk.peek(1)[0]);
            assert!([1, 3].contains(&a) && [2, 4].contains(&b));
            torn += u32::from((a == 3) != (b == 4));
        }
        assert!(torn > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn faults_happen_as_told() {
        let disk = SimDisk::new(64, 1);
        disk.inject(Fault::LostWrite);
        disk.write(0, vec![block(1)]).await.unwrap();
        assert_eq!(disk.peek(0), block(0));
        disk.inject(Fault::MisdirectedWrite(5));
        disk.write(0, vec![block(1)]).await.unwrap();
        assert_eq!((disk.peek(0), disk.peek(5)), (block(0), block(1)));
        disk.inject(Fault::ReadError(5));
        assert!(disk.read(4, 4).await.is_err());
        disk.write(5, vec![block(2)]).await.unwrap();
        assert!(disk.read(4, 4).await.is_ok());
        disk.inject(Fault::FlushError);
        assert!(disk.flush().await.is_err());
        disk.crash(0);
        assert_eq!(disk.peek(5), block(0));
        disk.flip_bit(7, 9);
        assert_eq!(disk.peek(7)[1], 2);
        disk.inject(Fault::LosesWrites(3));
        for at in 20..50 {
            disk.write(at, vec![block(1)]).await.unwrap();
        }
        let lost = (20..50).filter(|at| disk.peek(*at) == block(0)).count();
        assert!((1..25).contains(&lost), "lost {lost} of 30");
        disk.clear_faults();
        disk.inject(Fault::LyingFlush);
        disk.write(9, vec![block(9)]).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!((disk.peek(9), disk.peek_durable(9)), (block(9), block(0)));
        disk.freeze();
        let late = tokio::time::timeout(Duration::from_secs(60), disk.read(0, 1)).await;
        assert!(late.is_err());
        disk.thaw();
        assert!(disk.read(0, 1).await.is_ok());
        assert!(disk.read(64, 1).await.is_err());
    }
}
