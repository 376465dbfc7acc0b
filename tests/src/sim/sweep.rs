//! Power losses at every point of a short workload: all nodes lose power after the k-th message, write or flush, for each k in
//! turn. What was fsync'd must be there, each register as it was at some moment since, and the file system and its copies must
//! be sound.
//!
//! The workload is short, so that it can be swept whole, and is swept in several situations, since what is written depends on
//! which copies take part, and what is found after a power loss on the recovery, which a second one can end at any point.

use super::concurrent::{Programs, Shared, prepare};
use super::world::World;
use clap::ValueEnum;
use cluster::sim::Gate;
use std::sync::Arc;
use std::time::Duration;

/// What comes before the decisive part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Before {
    /// All is well.
    Well,
    /// A node is down: its copies are stale.
    Down,
    /// It has come back, and its copies are being brought up to date.
    Resync,
    /// All nodes lost power in the middle of the same work, and recover; they go on when they have.
    Recovery,
}

/// The decisive part ends at the latest after this time.
const LONGEST: Duration = Duration::from_secs(30);
/// How far the nodes had come with their work when power was lost for the first time: at most so many events.
const FIRST_MAX: u64 = 300;

/// Runs it; see [`super::crash_point`].
///
/// # Errors
/// What is wrong.
pub async fn run(world: &mut World, before: Before, after: Option<u64>, no_fsync: bool) -> Result<u64, String> {
    let nodes = world.len();
    let shared = Arc::new(Shared::new(nodes, no_fsync));
    let mut programs = Programs::new(shared.clone(), nodes);
    prepare(world, &programs).await?;
    work(world, &mut programs).await?;
    let victim = world.rng.below(nodes as u64) as usize;
    let gate = world.gate.clone();
    let mut begun = gate.passed();
    match before {
        Before::Well => {
            begin(world, &mut programs, after);
        }
        Before::Down | Before::Resync => {
            programs.stop(victim);
            shared.lose(victim);
            world.power_off(victim);
            world.settled().await?;
            if before == Before::Down {
                begun = gate.passed();
                begin(world, &mut programs, after);
            } else {
                work(world, &mut programs).await?;
                begun = gate.passed();
                begin(world, &mut programs, after);
                tokio::select! {
                    biased;
                    started = world.start(victim) => started?,
                    () = closed(&gate) => {}
                }
            }
        }
        Before::Recovery => {
            let first = world.rng.below(FIRST_MAX);
            begin(world, &mut programs, Some(first));
            ended(world, &programs).await;
            power_loss(world, &mut programs, &shared);
            begun = gate.passed();
            gate.close_after(after.unwrap_or(u64::MAX));
            // Power may be lost again before they have recovered; else the work goes on.
            let recovery = async {
                restart(world).await?;
                world.settled().await
            };
            let recovered = tokio::select! {
                biased;
                settled = recovery => {
                    settled?;
                    true
                }
                () = closed(&gate) => false,
            };
            if recovered {
                (0..nodes).for_each(|node| shared.trust(node));
                (0..nodes).for_each(|node| programs.start_scripts(world, node));
            }
        }
    }
    ended(world, &programs).await;
    let events = gate.passed() - begun;
    power_loss(world, &mut programs, &shared);
    restart(world).await?;
    world.settled().await?;
    world.until("all copies are in sync", World::in_sync).await?;
    (0..nodes).for_each(|node| shared.trust(node));
    for node in 0..nodes {
        programs.read_all(world, node).await?;
    }
    match shared.failure.lock().take() {
        Some(failure) => Err(format!("{failure}\n{}", world.dump())),
        None => Ok(events),
    }
}

/// Starts the work, which ends after so many events at the latest.
fn begin(world: &mut World, programs: &mut Programs, after: Option<u64>) {
    world.gate.close_after(after.unwrap_or(u64::MAX));
    for node in world.up() {
        programs.start_scripts(world, node);
    }
}

/// Does the work once, whole.
async fn work(world: &mut World, programs: &mut Programs) -> Result<(), String> {
    begin(world, programs, None);
    ended(world, programs).await;
    match programs.have_ended() {
        true => Ok(()),
        false => Err(format!("no progress: the first work does not end\n{}", world.dump())),
    }
}

/// Returns when nothing happens any more.
async fn closed(gate: &Gate) {
    while !gate.is_closed() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn ended(world: &World, programs: &Programs) {
    let end = async {
        while !world.gate.is_closed() && !programs.have_ended() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let _ = tokio::time::timeout(LONGEST, end).await;
}

fn power_loss(world: &mut World, programs: &mut Programs, shared: &Shared) {
    for node in 0..world.len() {
        programs.stop(node);
        shared.lose(node);
    }
    world.blackout();
    world.gate.open();
}

async fn restart(world: &mut World) -> Result<(), String> {
    for node in 0..world.len() {
        if !world.is_up(node) {
            world.start(node).await?;
        }
    }
    Ok(())
}
