//! Clients on several mounts at once on one object after the other; what they were told must have an order:
//! `linear N1 N2… --clients 3 --seconds 60`. The simulator does the same with faults: `sim --mode linear`.

use clap::Parser;
use cluster::sim::Rng;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::time::Duration;
use tests::FOUND;
use tests::cluster::clock;
use tests::driver::mount::MountDriver;
use tests::driver::{Driver, Stale, block_on};
use tests::history::{Client, Decided, History, Object, enough};
use tests::op::{Op, Outcome};

/// Looks for an order of what concurrent clients were told.
#[derive(Parser)]
#[command(after_help = tests::ENDS)]
struct Args {
    /// Mounts of one file system (or any directory that is the same on all).
    #[arg(required = true)]
    mounts: Vec<PathBuf>,
    /// Clients on each mount.
    #[arg(long, default_value_t = 2)]
    clients: usize,
    /// Calls of each client on each object.
    #[arg(long, default_value_t = 40)]
    calls: usize,
    /// How long.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Decides what the clients do (not when).
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Plants a bug: some reads return the bytes of an earlier one.
    #[arg(long)]
    stale: bool,
}

/// A mount, which may lie.
enum Mount {
    Honest(MountDriver),
    Stale(Stale<MountDriver>),
}

impl Driver for Mount {
    async fn run(&mut self, node: usize, op: &Op) -> Outcome {
        match self {
            Mount::Honest(driver) => driver.run(node, op).await,
            Mount::Stale(driver) => driver.run(node, op).await,
        }
    }
}

/// One object; an error says why it could not be used, and one within what has no order.
fn object(args: &Args, rng: &mut Rng, object: Object, dir: &str) -> Result<Result<Decided, String>, String> {
    std::fs::create_dir(args.mounts[0].join(dir)).map_err(|e| format!("{dir}: {e}"))?;
    let history = Arc::new(History::new(object, dir));
    let driver = |node: usize| {
        let driver = MountDriver::new(vec![args.mounts[node].clone()]);
        if args.stale { Mount::Stale(Stale::new(driver, 5)) } else { Mount::Honest(driver) }
    };
    block_on(history.prepare(&mut driver(0))).map_err(|e| format!("preparing {dir}: errno {e}"))?;
    let clients = args.mounts.len() * args.clients;
    let barrier = Barrier::new(clients);
    std::thread::scope(|scope| {
        for number in 0..clients {
            let node = number % args.mounts.len();
            let (mut client, mut driver) = (Client::new(number, node, rng.fork()), driver(node));
            let (history, barrier) = (&history, &barrier);
            scope.spawn(move || {
                let opened = block_on(history.open(&mut driver));
                barrier.wait();
                opened.unwrap_or_else(|e| panic!("opening the file: errno {e}"));
                for _ in 0..args.calls {
                    // Mostly at once; sometimes there is a moment in which nothing is under way.
                    if client.rng().percent(10) {
                        std::thread::sleep(Duration::from_micros(client.rng().below(3000)));
                    }
                    block_on(history.step(&mut client, &mut driver));
                }
            });
        }
    });
    for node in 0..args.mounts.len() {
        let (mut client, mut driver) = (Client::new(clients + node, node, rng.fork()), driver(node));
        block_on(history.open(&mut driver)).map_err(|e| format!("opening at the end: errno {e}"))?;
        block_on(history.look(&mut client, &mut driver));
    }
    Ok(history.decide())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let (mut rng, end) = (Rng::new(args.seed), clock() + Duration::from_secs(args.seconds));
    let (mut objects, mut calls, mut overlapping, mut configurations, mut undecided, mut stale, mut wrong) =
        (0, 0, 0, 0, 0, 0, 0);
    while clock() < end && wrong < 3 {
        let kind = [Object::Names, Object::Small, Object::Large][objects % 3];
        let dir = format!("linear-{}-{objects}", std::process::id());
        objects += 1;
        match object(&args, &mut rng, kind, &dir) {
            Ok(Ok(decided)) => {
                calls += decided.calls;
                overlapping += decided.overlapping;
                configurations += decided.configurations;
                stale += decided.stale;
                undecided += u64::from(decided.undecided);
            }
            Ok(Err(what)) => {
                println!("{what}");
                wrong += 1;
            }
            Err(why) => {
                eprintln!("linear: {why}");
                return ExitCode::FAILURE;
            }
        }
        let _ = std::fs::remove_dir_all(args.mounts[0].join(&dir));
    }
    println!(
        "{objects} objects, {calls} calls ({overlapping} beside others, {stale} ESTALE), {configurations} configurations, \
         {undecided} undecided, {wrong} without an order"
    );
    if wrong > 0 {
        return ExitCode::from(FOUND);
    }
    let together = args.mounts.len() * args.clients > 1;
    match enough(objects as u64, undecided, if together { overlapping as u64 } else { 1 }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("linear: {why}");
            ExitCode::FAILURE
        }
    }
}
