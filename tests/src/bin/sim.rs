//! Runs simulated clusters: `sim --seed S` replays one run, `sim --seeds A..B` soaks, `sim --planted` proves that planted
//! bugs are found.

use clap::{Parser, ValueEnum};
use std::process::ExitCode;
use std::time::Duration;
use tests::cluster::clock;
use tests::sim::sweep::Before;
use tests::sim::{Faults, Mode, Plan, Planted, Report, crash_point, run};

/// Simulated clusters of Pulsar.
#[derive(Parser)]
struct Args {
    /// Run this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Run the seeds from A up to (not including) B.
    #[arg(long, value_name = "A..B", value_parser = range)]
    seeds: Option<(u64, u64)>,
    /// Nodes.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Operations (exact), or faults and pauses (concurrent).
    #[arg(long, default_value_t = 120)]
    steps: usize,
    /// What goes wrong.
    #[arg(long, value_enum, default_value_t = Faults::All)]
    faults: Faults,
    /// Which workload; by default odd seeds are exact, even ones concurrent.
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Plant a bug.
    #[arg(long, value_enum)]
    plant: Option<Planted>,
    /// Plant every bug in turn; each must be found within some seeds.
    #[arg(long)]
    planted: bool,
    /// Power losses after every N-th message, write or flush of a short workload, on 1 node up to `--nodes`, in each situation.
    #[arg(long, value_name = "N")]
    sweep: Option<u64>,
    /// Of the sweep, only this situation.
    #[arg(long, value_enum)]
    before: Option<Before>,
    /// Of the sweep, only the power loss after so many events.
    #[arg(long)]
    after: Option<u64>,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// Log what the nodes do (as RUST_LOG says).
    #[arg(long, short)]
    verbose: bool,
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let (a, b) = text.split_once("..").ok_or("expected A..B")?;
    let number = |t: &str| t.parse().map_err(|e| format!("{t}: {e}"));
    Ok((number(a)?, number(b)?))
}

/// A run that takes more of the processor's time than this spins. (Not of real time: the machine may be busy.)
const TIME_MAX: Duration = Duration::from_secs(120);

/// The processor's time that this process has had.
fn used() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

fn guarded(plan: &Plan) -> Result<Report, String> {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let seed = plan.seed;
    let until = used() + TIME_MAX;
    let watch = std::thread::spawn(move || {
        while receiver.recv_timeout(Duration::from_secs(1)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            if used() > until {
                println!("seed {seed} FAILED: it spins: no end after {TIME_MAX:?} of the processor's time");
                std::process::exit(1);
            }
        }
    });
    // An assertion of the product that fails is a finding like any other.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(plan)));
    drop(sender);
    let _ = watch.join();
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

fn soak(args: &Args, from: u64, to: u64) -> bool {
    let begun = clock();
    let mut coverage = std::collections::BTreeMap::<String, u64>::new();
    let (mut failed, mut virtual_time) = (Vec::new(), Duration::ZERO);
    for seed in from..to {
        let plan = Plan {
            seed,
            nodes: args.nodes,
            steps: args.steps,
            faults: args.faults,
            mode: args.mode.unwrap_or(if seed % 2 == 1 { Mode::Exact } else { Mode::Concurrent }),
            planted: args.plant,
        };
        match guarded(&plan) {
            Ok(report) => {
                virtual_time += report.time;
                for (what, count) in report.coverage {
                    *coverage.entry(what.to_owned()).or_default() += count;
                }
                if from + 1 == to {
                    println!("trace {:016x}, {:?} of virtual time", report.trace, report.time);
                }
            }
            Err(what) => {
                println!("seed {seed} FAILED ({:?}): {what}", plan.mode);
                let mode = format!("{:?}", plan.mode).to_lowercase();
                let (nodes, steps, faults) = (args.nodes, args.steps, args.faults);
                println!("replay: sim --seed {seed} --nodes {nodes} --steps {steps} --faults {faults} --mode {mode}");
                failed.push(seed);
                if !args.keep_going {
                    break;
                }
            }
        }
    }
    let took = clock().saturating_sub(begun).as_secs_f64().max(0.001);
    let seeds = to.saturating_sub(from);
    println!(
        "{seeds} seeds in {took:.1} s ({:.2} seeds/s, {:.0} s of virtual time), {} failed {failed:?}",
        seeds as f64 / took,
        virtual_time.as_secs_f64(),
        failed.len()
    );
    let shown: Vec<String> = coverage.iter().map(|(what, count)| format!("{what} {count}")).collect();
    println!("covered: {}", shown.join(", "));
    let count = |what| coverage.get(what).copied().unwrap_or_default();
    let (objects, undecided, overlapping) = (count("object"), count("undecided"), count("call beside another"));
    if objects > 0
        && let Err(why) = tests::history::enough(objects, undecided, overlapping)
    {
        println!("FAILED: {why}");
        return false;
    }
    failed.is_empty()
}

/// Each planted bug must be found within so many seeds.
const PLANTED_SEEDS: u64 = 40;

fn planted(args: &Args) -> bool {
    let mut all = true;
    for bug in Planted::all() {
        let begun = clock();
        let found = (1..=PLANTED_SEEDS).find_map(|seed| {
            let plan = Plan { planted: Some(bug), ..bug.plan(seed, args.nodes) };
            // Only where the same run without the bug is clean does a failure prove anything.
            let found = guarded(&plan).err().map(|what| (seed, what))?;
            guarded(&Plan { planted: None, ..plan }).is_ok().then_some(found)
        });
        let took = clock().saturating_sub(begun).as_secs_f64();
        match found {
            Some((seed, what)) => {
                let what = what.lines().next().unwrap_or_default().chars().take(140).collect::<String>();
                println!("{bug:18} found by seed {seed} ({took:.1} s): {what}");
            }
            None => {
                println!("{bug:18} NOT FOUND in {PLANTED_SEEDS} seeds ({took:.1} s)");
                all = false;
            }
        }
    }
    all
}

/// Sweeps the points of power losses; the seed decides the workload, and what a disk keeps of what it had not flushed.
fn sweep(args: &Args, every: u64) -> bool {
    let begun = clock();
    let (mut points, mut failed) = (0, 0);
    let seed = args.seed.unwrap_or(1);
    for nodes in if args.after.is_some() { args.nodes } else { 1 }..=args.nodes {
        for before in args.before.map_or_else(|| Before::value_variants().to_vec(), |b| vec![b]) {
            // Without a majority nothing goes on.
            if nodes < 3 && matches!(before, Before::Down | Before::Resync) {
                continue;
            }
            let mut try_one = |after: Option<u64>| match crash_guarded(args, seed, nodes, before, after) {
                Ok(events) => Some(events),
                Err(what) => {
                    let name = before.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
                    let point = after.map_or_else(String::new, |a| format!(" --after {a}"));
                    println!("{nodes} nodes, {before:?}, power lost after {after:?} events: {what}");
                    println!("replay: sim --sweep 1 --seed {seed} --nodes {nodes} --before {name}{point}");
                    failed += 1;
                    None
                }
            };
            if args.after.is_some() {
                points += 1;
                try_one(args.after);
                continue;
            }
            let Some(events) = try_one(None) else { continue };
            for after in (seed % every..events).step_by(every as usize) {
                points += 1;
                if try_one(Some(after)).is_none() && !args.keep_going {
                    break;
                }
            }
            println!("{nodes} nodes, {before:?}: {events} events, {:.1} s so far", clock().saturating_sub(begun).as_secs_f64());
        }
    }
    println!("{points} power losses, {failed} failed");
    failed == 0
}

fn crash_guarded(args: &Args, seed: u64, nodes: usize, before: Before, after: Option<u64>) -> Result<u64, String> {
    let result = std::panic::catch_unwind(|| crash_point(seed, nodes, before, after, args.plant));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

/// Shows the virtual time of the run.
struct VirtualTime;

impl tracing_subscriber::fmt::time::FormatTime for VirtualTime {
    fn format_time(&self, w: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        write!(w, "{:9.3}", tests::sim::elapsed().as_secs_f64())
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.verbose {
        let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .with_timer(VirtualTime)
            .init();
    }
    if !args.verbose || args.planted {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let good = if args.planted {
        planted(&args)
    } else if let Some(every) = args.sweep {
        sweep(&args, every.max(1))
    } else {
        let (from, to) = args.seeds.or(args.seed.map(|s| (s, s + 1))).unwrap_or((1, 21));
        soak(&args, from, to)
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
