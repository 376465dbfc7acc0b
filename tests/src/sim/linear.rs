//! Several clients on each node at work on one object at once, while nodes fail; what they were told must have an order
//! (`history`). An object after the other, each of some kind.
//!
//! Before a node fails, its clients end and what they wrote is made durable, so that nothing may be missing: except with a small
//! file, where nodes fail at any moment, and what was not durable may be lost.

use super::world::{PATIENCE, World};
use crate::driver::node::NodeDriver;
use crate::history::{Client, History, Object};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Steps (faults or pauses) for each object.
const STEPS: usize = 6;
/// Calls of each client.
const CALLS: usize = 14;

struct Clients {
    history: Arc<History>,
    tasks: Vec<Vec<JoinHandle<Result<(), i32>>>>,
    per_node: usize,
    begun: usize,
    pause: u64,
}

impl Clients {
    fn start(&mut self, world: &mut World, node: usize) {
        let Some(fs) = world.fs(node) else { return };
        for _ in 0..self.per_node {
            self.begun += 1;
            let mut client = Client::new(self.begun, node, world.rng.fork());
            let (history, fs, pause) = (self.history.clone(), fs.clone(), self.pause);
            self.tasks[node].push(tokio::spawn(async move {
                let mut driver = NodeDriver::new(vec![Some(fs)]);
                history.open(&mut driver).await?;
                for _ in 0..CALLS {
                    let pause = client.rng().below(pause);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                    history.step(&mut client, &mut driver).await;
                }
                driver.close_all(0).await;
                Ok(())
            }));
        }
    }

    /// The clients of a node die.
    fn stop(&mut self, node: usize) {
        self.tasks[node].drain(..).for_each(|task| task.abort());
        self.history.died(node);
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.tasks.iter().flatten().for_each(JoinHandle::abort);
    }
}

/// Runs for `steps` faults or pauses.
///
/// # Errors
/// What has no order, or did not go on.
pub async fn run(world: &mut World, steps: usize, faults: bool) -> Result<(), String> {
    for round in 0..steps.div_ceil(STEPS) {
        let object = [Object::Names, Object::Small, Object::Large][world.rng.below(3) as usize];
        one(world, round, object, faults).await.map_err(|e| format!("object {round}: {e}\n{}", world.dump()))?;
    }
    Ok(())
}

async fn one(world: &mut World, round: usize, object: Object, faults: bool) -> Result<(), String> {
    let nodes = world.len();
    let dir = format!("l{round}");
    let history = Arc::new(History::new(object, &dir));
    {
        let fs = world.fs(0).ok_or("no file system")?;
        let mut driver = NodeDriver::new(vec![Some(fs.clone())]);
        fs.make(&fs::Caller::default(), fs.root(), dir.as_bytes(), fs::NewNode::Directory, 0o755)
            .await
            .map_err(|e| e.to_string())?;
        history.prepare(&mut driver).await.map_err(|e| format!("preparing: errno {e}"))?;
        fs.sync().await.map_err(|e| e.to_string())?;
    }
    // Calls meet if they are close together; faults take longer than that.
    let pause = if faults { 1 + world.rng.below(600) } else { 1 + world.rng.below(20) };
    let per_node = if nodes > 3 { 1 } else { 2 };
    let tasks = (0..nodes).map(|_| Vec::new()).collect();
    let mut clients = Clients { history: history.clone(), tasks, per_node, begun: 0, pause };
    (0..nodes).for_each(|node| clients.start(world, node));
    let mut away = BTreeSet::new();
    for _ in 0..STEPS {
        let pause = world.rng.below(900);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        if faults {
            fault(world, &mut clients, &mut away, object == Object::Small).await?;
        }
    }
    repair(world, &mut clients, &mut away).await?;
    for node in 0..nodes {
        for task in clients.tasks[node].drain(..) {
            let ended = tokio::time::timeout(PATIENCE, task)
                .await
                .map_err(|_| format!("no progress: a client on n{} does not end", node + 1))?;
            match ended {
                Ok(Ok(())) => {}
                // It was opening its file when its node was cut off.
                Ok(Err(crate::op::errno::EIO)) if object == Object::Small && faults => {}
                Ok(Err(error)) => return Err(format!("n{}: opening the file fails with errno {error}", node + 1)),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
    }
    for node in 0..nodes {
        let mut driver = NodeDriver::new(vec![world.fs(node)]);
        clients.begun += 1;
        let mut client = Client::new(clients.begun, node, world.rng.fork());
        let all = async {
            history.open(&mut driver).await.map_err(|e| format!("opening at the end fails with errno {e}"))?;
            history.look(&mut client, &mut driver).await;
            driver.close_all(0).await;
            Ok::<(), String>(())
        };
        tokio::time::timeout(PATIENCE, all).await.map_err(|_| "no progress: the last look does not end")??;
    }
    if object == Object::Small {
        // What a node lost is told once: here, and not where nothing may be lost.
        for node in 0..nodes {
            let _ = sync(world, node).await;
        }
    }
    let decided = history.decide()?;
    world.cover("object");
    *world.coverage.entry("call").or_default() += decided.calls as u64;
    *world.coverage.entry("call beside another").or_default() += decided.overlapping as u64;
    *world.coverage.entry("configuration").or_default() += decided.configurations as u64;
    *world.coverage.entry("stale").or_default() += decided.stale as u64;
    *world.coverage.entry("undecided").or_default() += u64::from(decided.undecided);
    Ok(())
}

/// Makes everything durable that a node has written.
async fn sync(world: &World, node: usize) -> Result<(), String> {
    let Some(fs) = world.fs(node) else { return Ok(()) };
    let synced = tokio::time::timeout(PATIENCE, fs.sync()).await.map_err(|_| format!("sync on n{} does not end", node + 1))?;
    synced.map_err(|e| format!("sync on n{}: {e}", node + 1))
}

async fn fault(world: &mut World, clients: &mut Clients, away: &mut BTreeSet<usize>, losing: bool) -> Result<(), String> {
    let nodes = world.len();
    let well: Vec<usize> = world.up().into_iter().filter(|n| !away.contains(n)).collect();
    let whole = well.len() == nodes && world.in_sync();
    let victim = world.rng.pick(&well).copied();
    match (world.rng.below(12), victim) {
        (kind @ 0..=4, Some(node)) if whole => {
            if losing {
                clients.history.loss(node);
            } else {
                clients.stop(node);
                sync(world, node).await?;
            }
            match kind {
                0 => {
                    clients.stop(node);
                    world.kill(node);
                }
                1 => {
                    clients.stop(node);
                    world.power_off(node);
                }
                // Its clients go on, if they may lose something.
                _ => {
                    world.isolate(node);
                    away.insert(node);
                }
            }
        }
        (5, Some(node)) if whole && losing => {
            let other = (node + 1 + world.rng.below(nodes as u64 - 1) as usize) % nodes;
            // Depending on who leads, any of them may be taken for dead.
            (0..nodes).for_each(|n| clients.history.loss(n));
            world.cut_one_way(node, other);
            away.insert(node);
        }
        (6, _) if whole => {
            for node in 0..nodes {
                if losing {
                    clients.history.loss(node);
                    clients.stop(node);
                } else {
                    clients.stop(node);
                    sync(world, node).await?;
                }
            }
            world.blackout();
            repair(world, clients, away).await?;
        }
        (7..=9, _) if !whole => repair(world, clients, away).await?,
        (10, Some(node)) => {
            world.cover("session broken");
            world.net.break_session(super::world::id(node), super::world::id((node + 1) % nodes));
        }
        _ => {}
    }
    Ok(())
}

/// All nodes are up and together again, with clients on each.
async fn repair(world: &mut World, clients: &mut Clients, away: &mut BTreeSet<usize>) -> Result<(), String> {
    world.heal();
    away.clear();
    for node in 0..world.len() {
        if !world.is_up(node) {
            world.start(node).await?;
        }
    }
    world.settled().await?;
    world.until("all copies are in sync", World::in_sync).await?;
    clients.history.recovered();
    for node in 0..world.len() {
        if clients.tasks[node].is_empty() {
            clients.start(world, node);
        }
    }
    Ok(())
}
