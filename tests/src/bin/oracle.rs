//! Random operations on mounts by turns, each answer compared with the oracle: `oracle N1 N2… --seeds 1..100 --ops 500`. A
//! sequence that fails is made short.

use clap::Parser;
use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;
use tests::FOUND;
use tests::cluster::clock;
use tests::driver::mount::MountDriver;
use tests::driver::{Driver, Stale, block_on, check_seed_with, compare};
use tests::generate::Profile;
use tests::op::Step;

/// Compares mounts with the oracle.
#[derive(Parser)]
#[command(after_help = tests::ENDS)]
struct Args {
    /// Mounts of one file system (or any directory that is the same on all).
    #[arg(required = true)]
    mounts: Vec<PathBuf>,
    /// The seeds from A up to (not including) B.
    #[arg(long, value_name = "A..B", value_parser = range, default_value = "1..11")]
    seeds: (u64, u64),
    /// Operations of each seed.
    #[arg(long, default_value_t = 400)]
    ops: usize,
    /// Percent of operations on data; by default it differs from seed to seed.
    #[arg(long)]
    data: Option<u64>,
    /// Without `O_DIRECT`, which some file systems want aligned.
    #[arg(long)]
    indirect: bool,
    /// Others than root act, too.
    #[arg(long)]
    users: bool,
    /// Tries to make a failing sequence short.
    #[arg(long, default_value_t = 400)]
    tries: usize,
    /// Plants a bug: some reads return the bytes of an earlier one.
    #[arg(long)]
    stale: bool,
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let (a, b) = text.split_once("..").ok_or("expected A..B")?;
    let number = |t: &str| t.parse().map_err(|e| format!("{t}: {e}"));
    Ok((number(a)?, number(b)?))
}

fn main() -> ExitCode {
    let args = Args::parse();
    for protection in ["symlinks", "regular", "fifos"] {
        let value = std::fs::read_to_string(format!("/proc/sys/fs/protected_{protection}"));
        if args.users && value.is_ok_and(|value| value.trim() != "0") {
            println!("the oracle does not know what fs.protected_{protection} forbids: set it to 0 to run with --users");
            return ExitCode::FAILURE;
        }
    }
    let (begun, nodes, count, ops) = (clock(), args.mounts.len(), Cell::new(0), Cell::new(0));
    // Each try has a directory of its own, which is removed afterwards.
    let run = |steps: &[Step]| {
        let name = format!("oracle-{}-{}", std::process::id(), count.replace(count.get() + 1));
        // The first one is made before the driver sets the umask.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        let made = std::fs::create_dir(args.mounts[0].join(&name));
        // What cannot be begun is no difference.
        made.and_then(|()| std::fs::set_permissions(args.mounts[0].join(&name), mode)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let driver = MountDriver::new(args.mounts.iter().map(|m| m.join(&name)).collect());
        ops.set(ops.get() + steps.len());
        let result = if args.stale {
            block_on(compare(&mut Stale::new(driver, 3), nodes, steps))
        } else {
            block_on(compare(&mut { driver }, nodes, steps))
        };
        let _ = std::fs::remove_dir_all(args.mounts[0].join(&name));
        result
    };
    // Local file systems hold less.
    let limit = !MountDriver::new(args.mounts.clone()).traits().coarse_times;
    let mut failed = Vec::new();
    for seed in args.seeds.0..args.seeds.1 {
        let data_percent = args.data.unwrap_or([50, 10, 80][(seed % 3) as usize]);
        let profile = Profile { nodes, data_percent, limit, direct: !args.indirect, users: args.users, ..Profile::default() };
        if let Err(what) = check_seed_with(seed, profile, args.ops, args.tries, run) {
            println!("{what}");
            failed.push(seed);
        }
    }
    let took = clock().saturating_sub(begun).as_secs_f64();
    println!("{} operations on {nodes} mounts in {took:.1} s, {} seeds failed {failed:?}", ops.get(), failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FOUND) }
}
