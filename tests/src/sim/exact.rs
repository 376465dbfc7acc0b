//! Operations one at a time, on changing nodes, compared with the oracle one by one, while nodes fail in ways that must not
//! be seen: before a node fails, what it has written is made durable, and so nothing may be missing afterwards.

use super::stack::StackDisk;
use super::world::{PATIENCE, World};
use crate::driver::node::NodeDriver;
use crate::driver::{Driver, compare_trees};
use crate::generate::{Generator, Profile};
use crate::op::{Op, Outcome, Step};
use crate::reference::{Comparer, Oracle};
use std::time::Duration;

/// Runs `steps` operations.
///
/// # Errors
/// The first difference, or what did not come about.
pub async fn run(world: &mut World, seed: u64, steps: usize, faults: bool) -> Result<(), String> {
    let nodes = world.len();
    let profile = Profile { nodes, limit: true, ..Profile::default() };
    let mut generator = Generator::new(seed, profile);
    let mut oracle = Oracle::new();
    let mut comparer = Comparer::default();
    let mut driver = NodeDriver::new((0..nodes).map(|n| world.fs(n)).collect());
    // A node that is cut off: it gets no operations.
    let mut away: Option<usize> = None;
    for at in 0..steps {
        if faults && world.rng.below(12) == 0 {
            fault(world, &mut driver, &mut away, &mut generator, &mut oracle)
                .await
                .map_err(|e| format!("before step {at}: {e}"))?;
        }
        let usable: Vec<usize> = world.up().into_iter().filter(|n| away != Some(*n)).collect();
        let Step { node, op } = generator.next_step_on(&usable);
        let right = oracle.run(node, &op);
        let got = timed(&mut driver, node, &op).await.map_err(|e| format!("step {at}: {e}\n{}", world.dump()))?;
        comparer.compare(&op, &right, &got).map_err(|e| format!("step {at} on n{}: {e}\n{}", node + 1, world.dump()))?;
        world.cover("operation");
        if got.is_ok() {
            world.cover("operation succeeded");
        }
        if world.rng.percent(20) {
            let pause = world.rng.below(3000);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }
    world.heal();
    for node in 0..nodes {
        if !world.is_up(node) {
            world.start(node).await?;
        }
    }
    world.settled().await?;
    for node in 0..nodes {
        driver.up(node, world.fs(node).ok_or("no file system")?);
    }
    for node in 0..nodes {
        let compared = compare_trees(&mut driver, node, &mut oracle, &mut comparer);
        let compared = tokio::time::timeout(PATIENCE, compared).await.map_err(|_| "comparing the trees does not end")?;
        compared.map_err(|e| format!("at the end, on n{}: {e}", node + 1))?;
    }
    comparer.check_identities(|ino| oracle.is_live(ino))
}

async fn timed(driver: &mut NodeDriver<StackDisk>, node: usize, op: &Op) -> Result<Outcome, String> {
    tokio::time::timeout(PATIENCE, driver.run(node, op)).await.map_err(|_| format!("{op:?} on n{} does not end", node + 1))
}

/// Makes everything durable that a node has written.
async fn sync(driver: &NodeDriver<StackDisk>, node: usize) -> Result<(), String> {
    let Some(fs) = driver.fs(node) else { return Ok(()) };
    let synced = tokio::time::timeout(PATIENCE, fs.sync()).await.map_err(|_| format!("sync on n{} does not end", node + 1))?;
    synced.map_err(|e| format!("sync on n{}: {e}", node + 1))
}

async fn fault(
    world: &mut World,
    driver: &mut NodeDriver<StackDisk>,
    away: &mut Option<usize>,
    generator: &mut Generator,
    oracle: &mut Oracle,
) -> Result<(), String> {
    let down: Vec<usize> = (0..world.len()).filter(|n| !world.is_up(*n)).collect();
    match world.rng.below(10) {
        0..=3 if down.is_empty() && away.is_none() && world.in_sync() => {
            let node = world.rng.below(world.len() as u64) as usize;
            sync(driver, node).await?;
            driver.down(node);
            generator.node_died(node);
            oracle.close_all(node);
            if world.rng.percent(50) { world.kill(node) } else { world.power_off(node) }
        }
        0..=4 if !down.is_empty() => {
            for node in &down {
                world.start(*node).await?;
            }
            world.settled().await?;
            for node in down {
                driver.up(node, world.fs(node).ok_or("no file system")?);
            }
            if world.rng.percent(50) {
                world.until("all copies are in sync", World::in_sync).await?;
                world.cover("resync");
            }
        }
        5 | 6 if down.is_empty() && away.is_none() && world.in_sync() => {
            let node = world.rng.below(world.len() as u64) as usize;
            sync(driver, node).await?;
            // Its descriptors go with its tokens when it is declared dead; keep none open, for the oracle's sake.
            generator.node_died(node);
            oracle.close_all(node);
            driver.close_all(node).await;
            sync(driver, node).await?;
            world.isolate(node);
            *away = Some(node);
        }
        5..=7 if away.is_some() => {
            world.heal();
            world.settled().await?;
            *away = None;
        }
        8 if down.is_empty() && away.is_none() => {
            for node in 0..world.len() {
                sync(driver, node).await?;
            }
            for node in 0..world.len() {
                driver.down(node);
                generator.node_died(node);
                oracle.close_all(node);
            }
            world.blackout();
            for node in 0..world.len() {
                world.start(node).await?;
            }
            world.settled().await?;
            for node in 0..world.len() {
                driver.up(node, world.fs(node).ok_or("no file system")?);
            }
        }
        9 => {
            let (a, b) = (world.rng.below(world.len() as u64) as usize, world.rng.below(world.len() as u64) as usize);
            world.cover("session broken");
            world.net.break_session(super::world::id(a), super::world::id(b));
        }
        _ => {}
    }
    Ok(())
}
