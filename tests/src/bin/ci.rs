//! Runs every check of the project: `cargo run --release --bin ci`.
//!
//! Its last line is `N passed, N failed`; it fails if anything did. It installs nothing (`.ci/run` does, into target/tools
//! among other places, where programs are looked for first): what is missing is said before anything runs. What is left out for
//! that is said before and after, and counted; with PULSAR_TEST_ALL set a program that is not installed is a failure.
//! With names of steps as arguments it runs only those (`ci sim cluster`); `--list` names them.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

struct Step {
    name: &'static str,
    what: &'static str,
    run: fn(&Context) -> Tally,
}

struct Context {
    root: PathBuf,
    /// Directory of the release binaries, this one included.
    bin: PathBuf,
    /// Differs with each commit, so that every run explores something new.
    seed: u64,
}

#[derive(Clone, Copy, Default)]
struct Tally {
    passed: u64,
    failed: u64,
}

impl Tally {
    fn one(good: bool) -> Tally {
        Tally { passed: u64::from(good), failed: u64::from(!good) }
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

const STEPS: [Step; 10] = [
    Step { name: "fmt", what: "formatting", run: |c| cargo(c, &["fmt", "--all", "--check"], &[]) },
    Step {
        name: "clippy",
        what: "lints",
        run: |c| cargo(c, &["clippy", "-q", "--workspace", "--all-targets", "--", "-D", "warnings"], &[]),
    },
    Step {
        name: "doc",
        what: "documentation",
        run: |c| cargo(c, &["doc", "-q", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")]),
    },
    Step { name: "unit", what: "unit tests, tidiness", run: |c| cargo_test(c, &["test", "--workspace", "--no-fail-fast"]) },
    Step { name: "build", what: "release build", run: |c| cargo(c, &["build", "-q", "--release", "--workspace", "--bins"], &[]) },
    Step { name: "sim", what: "simulated clusters", run: simulate },
    Step { name: "planted", what: "planted bugs are found", run: planted },
    Step { name: "model", what: "model checks", run: model },
    Step { name: "cluster", what: "real clusters", run: |c| mounted(c, &["cluster", "nodes", "posix"]) },
    Step { name: "programs", what: "real programs", run: |c| mounted(c, &["programs"]) },
];

fn cargo(context: &Context, args: &[&str], env: &[(&str, &str)]) -> Tally {
    let mut command = Command::new("cargo");
    command.args(args).current_dir(&context.root).envs(env.iter().copied());
    Tally::one(run(command))
}

/// Runs a command with its output shown.
fn run(mut command: Command) -> bool {
    match command.stdin(Stdio::null()).status() {
        Ok(status) => status.success(),
        Err(error) => {
            println!("cannot start {command:?}: {error}");
            false
        }
    }
}

/// Runs `cargo test`, counts its tests, and shows its output only if something failed.
fn cargo_test(context: &Context, args: &[&str]) -> Tally {
    let mut command = Command::new("cargo");
    command.args(args).current_dir(&context.root).stdin(Stdio::null());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            println!("cannot start {command:?}: {error}");
            return Tally::one(false);
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let mut tally = Tally::default();
    for line in text.lines().filter(|l| l.starts_with("test result:")) {
        let number = |what: &str| {
            let words: Vec<&str> = line.split([' ', ';']).collect();
            words.windows(2).find(|w| w[1] == what).and_then(|w| w[0].parse::<u64>().ok()).unwrap_or(0)
        };
        tally += Tally { passed: number("passed"), failed: number("failed") };
    }
    if !output.status.success() {
        println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
        if tally.failed == 0 {
            tally.failed = 1;
        }
    }
    tally
}

fn sim(context: &Context, args: &[&str]) -> bool {
    let mut command = Command::new(context.bin.join("sim"));
    command.args(args).current_dir(&context.root);
    run(command)
}

/// Simulated clusters, with and without faults: the same seeds each time, those that have failed once, and some that no run
/// has tried before. On two processors at a time.
fn simulate(context: &Context) -> Tally {
    let fresh = |from: u64, count: u64| format!("{}..{}", context.seed + from, context.seed + from + count);
    let (three, five) = (fresh(0, 30), fresh(1000, 15));
    // Whether it decides: a fresh seed that fails is a finding (docs/testing.md), and says nothing of the commit that met it.
    let runs: [(bool, &[&str]); 17] = [
        (true, &["--seeds", "1..61"]),
        (true, &["--seeds", "1..31", "--nodes", "5"]),
        (false, &["--seeds", &three, "--steps", "150"]),
        (false, &["--seeds", &five, "--nodes", "5"]),
        (true, &["--seeds", "1..21", "--steps", "200", "--faults", "none"]),
        (true, &["--seeds", "1..21", "--steps", "150", "--faults", "none", "--mode", "exact"]),
        (true, &["--seeds", "21..31", "--steps", "150", "--faults", "none", "--mode", "exact", "--nodes", "1"]),
        (true, &["--seeds", "31..41", "--steps", "150", "--faults", "none", "--mode", "exact", "--nodes", "2"]),
        (true, &["--seeds", "41..47", "--steps", "150", "--faults", "none", "--mode", "exact", "--nodes", "4"]),
        (true, &["--seeds", "1..7", "--mode", "exact", "--nodes", "4"]),
        (true, &["--seeds", "1..31", "--mode", "linear"]),
        (true, &["--seeds", "1..21", "--mode", "linear", "--faults", "none"]),
        (true, &["--seeds", "1..11", "--mode", "linear", "--nodes", "5"]),
        (true, &["--sweep", "19"]),
        (true, &["--seed", "162"]),
        (true, &["--seed", "5012"]),
        (true, &["--seed", "5", "--nodes", "5", "--mode", "concurrent"]),
    ];
    let next = std::sync::atomic::AtomicUsize::new(0);
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let lanes = [(); 2].map(|()| {
            scope.spawn(|| {
                let mut tally = Tally::default();
                while let Some((decides, args)) = runs.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    let good = sim(context, args);
                    if *decides {
                        tally += Tally::one(good);
                    } else if !good {
                        println!("   (a new finding: keep the seed; it does not decide)");
                    }
                }
                tally
            })
        });
        for lane in lanes {
            tally += lane.join().unwrap_or(Tally { passed: 0, failed: 1 });
        }
    });
    tally
}

fn planted(context: &Context) -> Tally {
    Tally::one(sim(context, &["--planted"]))
}

fn model(context: &Context) -> Tally {
    cargo_test(context, &["test", "--release", "-p", "pulsar-tests", "--lib", "model", "--", "--include-ignored"])
}

/// Tests that start daemons and mount, one at a time.
fn mounted(context: &Context, tests: &[&str]) -> Tally {
    let mut args = vec!["test", "--release", "-p", "pulsar-tests", "--no-fail-fast"];
    args.extend(tests.iter().flat_map(|test| ["--test", test]));
    args.extend(["--", "--ignored", "--test-threads", "1"]);
    cargo_test(context, &args)
}

/// What this machine lacks for a step, in words.
fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !nix::unistd::Uid::effective().is_root() {
        missing.push("root's rights (the tests mount file systems)".to_owned());
    }
    if !Path::new("/dev/fuse").exists() {
        missing.push("/dev/fuse (modprobe fuse)".to_owned());
    }
    let programs = [("git", "git"), ("sqlite3", "sqlite3"), ("ip", "iproute2"), ("mount", "mount"), ("cc", "gcc")];
    // What `programs` runs beyond these it leaves out where it is not installed.
    for (program, package) in programs {
        let found = std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(program).exists()));
        if !found {
            missing.push(format!("the program {program} (Debian package {package})"));
        }
    }
    missing
}

/// What is left out: the real programs whose scripts need what is not installed, and what the machine's settings forbid.
fn left_out(root: &Path) -> Vec<String> {
    let mut scripts: Vec<PathBuf> =
        std::fs::read_dir(root.join("tests/programs")).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    scripts.sort();
    let lacks = |script: &PathBuf| {
        let text = std::fs::read_to_string(script).ok()?;
        let needs = text.lines().find_map(|line| line.strip_prefix("# needs: "))?;
        let lacking: Vec<&str> = needs.split_whitespace().filter(|program| !tests::sys::is_installed(program)).collect();
        let name = script.file_name()?.to_string_lossy().into_owned();
        (!lacking.is_empty()).then(|| format!("{name} ({} is not installed)", lacking.join(", ")))
    };
    let protections = tests::sys::protections();
    let users = format!("the oracle as other users than root ({} is not 0)", protections.join(", "));
    scripts.iter().filter_map(lacks).chain((!protections.is_empty()).then_some(users)).collect()
}

/// Programs that were installed for the tests only are found first.
fn extend_path(root: &Path) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::iter::once(root.join("target/tools/bin")).chain(std::env::split_paths(&path));
    if let Ok(path) = std::env::join_paths(places) {
        // SAFETY: no other thread has begun yet.
        unsafe { std::env::set_var("PATH", path) };
    }
}

/// Seconds since the machine started.
fn uptime() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

fn seed_of_commit(root: &Path) -> u64 {
    let output = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(root).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    u64::from_str_radix(text.get(..7).unwrap_or("0"), 16).unwrap_or(0) + 1_000_000
}

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if wanted.iter().any(|w| w == "--list") {
        STEPS.iter().for_each(|s| println!("{:10} {}", s.name, s.what));
        return ExitCode::SUCCESS;
    }
    if let Some(unknown) = wanted.iter().find(|w| STEPS.iter().all(|s| s.name != w.as_str())) {
        eprintln!("ci: there is no step {unknown}; `ci --list` names them");
        return ExitCode::from(2);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned();
    let bin = std::env::current_exe().ok().and_then(|e| e.parent().map(Path::to_owned)).unwrap_or_default();
    extend_path(&root);
    let context = Context { seed: seed_of_commit(&root), root, bin };
    let missing = missing();
    if !missing.is_empty() && (wanted.is_empty() || wanted.iter().any(|w| w == "cluster" || w == "programs")) {
        println!("ci: this machine lacks what the tests of real clusters need:");
        missing.iter().for_each(|m| println!("  - {m}"));
        println!("0 passed, 1 failed");
        return ExitCode::FAILURE;
    }
    let left_out = left_out(&context.root);
    left_out.iter().for_each(|what| println!("ci: NOT RUN: {what}"));
    let mut all = Tally::default();
    let mut lines = Vec::new();
    let begun = uptime();
    for step in STEPS.iter().filter(|s| wanted.is_empty() || wanted.iter().any(|w| w == s.name)) {
        println!("== {}: {}", step.name, step.what);
        let start = uptime();
        let tally = (step.run)(&context);
        all += tally;
        let took = uptime().saturating_sub(start).as_secs();
        lines.push(format!("{:8} {:24} {:5} passed {:3} failed {took:5} s", step.name, step.what, tally.passed, tally.failed));
    }
    println!("\n{}", lines.join("\n"));
    left_out.iter().for_each(|what| println!("NOT RUN: {what}"));
    let took = uptime().saturating_sub(begun).as_secs();
    println!("seed of this commit: {}; {took} s in all; {} left out", context.seed, left_out.len());
    println!("{} passed, {} failed", all.passed, all.failed);
    if all.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
