//! The simulator: whole clusters in one thread, from one seed, over a simulated network, clocks and disks.
//!
//! The same plan gives the same run, to the last message: [`Report::trace`] is a hash of all of them.

pub mod concurrent;
pub mod exact;
pub mod linear;
pub mod registers;
pub mod stack;
pub mod sweep;
pub mod world;

use clap::ValueEnum;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;
use world::{World, WorldOptions};

/// What goes wrong in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Faults {
    /// Nothing.
    None,
    /// Nodes die, lose power, are cut off; sessions break.
    All,
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Faults::None { "none" } else { "all" })
    }
}

/// The workload of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// One operation at a time, all compared with the oracle.
    Exact,
    /// All nodes at once, judged by registers.
    Concurrent,
    /// Clients on all nodes at once on one object; their answers must have an order.
    Linear,
}

/// A bug put in on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Planted {
    /// Disks acknowledge a flush without doing it.
    LyingFlush,
    /// Writes are acknowledged before they are durable.
    EarlyAck,
    /// A node believes that its lease never ends.
    EndlessLease,
    /// The layers do not wait for each other's recovery: each epoch counts as recovered when it begins.
    HastyRecovery,
    /// A disk misses one write in a hundred, and says that it has it.
    MissedWrites,
    /// fsync does nothing.
    NoFsync,
}

impl Planted {
    /// All of them; each must be found within few seeds.
    #[must_use]
    pub fn all() -> [Planted; 6] {
        use Planted::{EarlyAck, EndlessLease, HastyRecovery, LyingFlush, MissedWrites, NoFsync};
        [LyingFlush, EarlyAck, EndlessLease, HastyRecovery, MissedWrites, NoFsync]
    }

    /// A run that should find it.
    #[must_use]
    pub fn plan(self, seed: u64, nodes: usize) -> Plan {
        let mode = if seed.is_multiple_of(2) { Mode::Exact } else { Mode::Concurrent };
        let mode = match self {
            Planted::NoFsync => Mode::Concurrent,
            // Each of these two finds it by itself.
            Planted::EndlessLease => [Mode::Linear, Mode::Concurrent][(seed % 2) as usize],
            _ => mode,
        };
        let steps = match mode {
            Mode::Exact => 200,
            // Somebody who is cut off must be asked in the moment in which it matters.
            Mode::Concurrent if self == Planted::EndlessLease => 120,
            Mode::Concurrent | Mode::Linear => 60,
        };
        Plan { seed, nodes, steps, faults: Faults::All, mode, planted: Some(self) }
    }
}

impl fmt::Display for Planted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
        f.pad(&name)
    }
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Decides everything.
    pub seed: u64,
    /// Nodes.
    pub nodes: usize,
    /// Operations (exact), or faults and pauses (concurrent).
    pub steps: usize,
    /// What goes wrong.
    pub faults: Faults,
    /// The workload.
    pub mode: Mode,
    /// A bug.
    pub planted: Option<Planted>,
}

/// What a run was like.
#[derive(Clone, Debug)]
pub struct Report {
    /// A hash of all messages: equal in two runs of a plan.
    pub trace: u64,
    /// How much time passed in it.
    pub time: Duration,
    /// What happened how often.
    pub coverage: BTreeMap<&'static str, u64>,
}

thread_local! {
    static BEGUN: Cell<Option<tokio::time::Instant>> = const { Cell::new(None) };
}

/// How much virtual time has passed in the run that this thread is in.
#[must_use]
pub fn elapsed() -> Duration {
    BEGUN.get().map(|begun| begun.elapsed()).unwrap_or_default()
}

/// Runs something whose time is virtual, and begins now.
fn in_virtual_time<T>(what: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().map_err(|e| format!("no runtime: {e}"))?;
    runtime.block_on(async {
        BEGUN.set(Some(tokio::time::Instant::now()));
        what.await
    })
}

/// Runs a plan.
///
/// # Errors
/// What is wrong.
pub fn run(plan: &Plan) -> Result<Report, String> {
    in_virtual_time(async {
        let mut options = WorldOptions::new(plan.seed, plan.nodes);
        options.planted = plan.planted;
        let mut world = World::new(&options).await?;
        let result = drive(&mut world, plan).await;
        let (trace, time) = (world.net.trace(), elapsed());
        // A failure replays to the last message, too: its trace tells whether this one is that one.
        result.map_err(|what| format!("{}\ntrace {trace:016x} after {time:?}", what.trim_end()))?;
        Ok(Report { trace, time, coverage: world.coverage.clone() })
    })
}

/// Runs a workload in which all nodes lose power after so many messages, writes and flushes of its decisive part (`None`: when
/// that has ended); returns how many there were.
///
/// # Errors
/// What is wrong.
pub fn crash_point(
    seed: u64,
    nodes: usize,
    before: sweep::Before,
    after: Option<u64>,
    planted: Option<Planted>,
) -> Result<u64, String> {
    in_virtual_time(async {
        let mut world = World::new(&WorldOptions { planted, ..WorldOptions::new(seed, nodes) }).await?;
        let events = sweep::run(&mut world, before, after, planted == Some(Planted::NoFsync)).await?;
        world.finish().await?;
        Ok(events)
    })
}

async fn drive(world: &mut World, plan: &Plan) -> Result<(), String> {
    let faults = plan.faults == Faults::All;
    match plan.mode {
        Mode::Exact => exact::run(world, plan.seed, plan.steps, faults).await?,
        Mode::Concurrent => concurrent::run(world, plan.steps, faults, plan.planted == Some(Planted::NoFsync)).await?,
        Mode::Linear => linear::run(world, plan.steps, faults).await?,
    }
    world.finish().await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults and all, from the agreement up to the file system. If this fails something below draws from chance that the
    /// seed does not decide: an unbiased `select!`, `tokio::sync::watch`, the order of a `HashMap`, the machine's clock.
    #[test]
    fn the_same_seed_gives_the_same_run() {
        for (seed, nodes, mode) in [(1, 3, Mode::Exact), (2, 3, Mode::Concurrent), (3, 5, Mode::Concurrent)] {
            let plan = Plan { seed, nodes, steps: 25, faults: Faults::All, mode, planted: None };
            let [first, second] = [(); 2].map(|()| run(&plan).map(|r| (r.trace, r.time, r.coverage)));
            assert_eq!(first, second, "{plan:?}");
            let other = run(&Plan { seed: seed + 100, ..plan }).map(|r| r.trace);
            assert_ne!(first.map(|r| r.0), other, "the trace tells two runs apart");
        }
    }
}
