//! A directory with very many entries: `bigdir DIR DIR [--count N]`, directories in which the same tree is to be seen.
//!
//! Entries are made on the first node, and listed and looked up on both. Then the second lists them again and again while
//! the first makes and removes others among them: what was there all along must be in each listing exactly once, and nothing
//! at all twice. In the end the second removes everything. Rates are printed; with `--daemon PID` (the daemons' processes)
//! the memory that these use, too, which must stay below `--memory-max`.

use clap::Parser;
use nix::sys::stat::{Mode, SFlag, mknod};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tests::cluster::clock;
use tests::sys::Directory;

/// A directory with very many entries.
#[derive(Parser)]
struct Args {
    /// A directory, through one node's mount.
    here: PathBuf,
    /// The same directory, through another's.
    there: PathBuf,
    /// Entries.
    #[arg(long, default_value_t = 1_000_000)]
    count: u64,
    /// Listings beside changes.
    #[arg(long, default_value_t = 3)]
    listings: u32,
    /// A daemon whose memory is looked at.
    #[arg(long)]
    daemon: Vec<u32>,
    /// The most that each may use, in MiB.
    #[arg(long, default_value_t = 1024)]
    memory_max: u64,
}

/// Names that stay are spread over the whole range of hashes, as are those that come and go.
fn name(i: u64) -> String {
    format!("entry-{i}")
}

struct Run {
    args: Args,
    here: PathBuf,
    there: PathBuf,
    most: u64,
}

impl Run {
    /// Does a step, prints its rate, and looks at the daemons' memory.
    fn step<T>(&mut self, what: &str, times: u64, body: impl FnOnce(&Run) -> Result<T, String>) -> Result<T, String> {
        let begun = clock();
        let result = body(self).map_err(|e| format!("{what}: {e}"))?;
        let took = clock().saturating_sub(begun).as_secs_f64();
        let memory = self.args.daemon.iter().map(|pid| memory_of(*pid)).collect::<Result<Vec<u64>, String>>()?;
        self.most = self.most.max(memory.iter().copied().max().unwrap_or(0));
        println!("{what}: {times} in {took:.1} s, {:.0}/s; daemons use {memory:?} MiB", times as f64 / took);
        if self.most > self.args.memory_max {
            return Err(format!("{what}: a daemon uses {} MiB, more than {}", self.most, self.args.memory_max));
        }
        Ok(result)
    }
}

/// Resident memory of a process, in MiB. Of one that is gone nothing is known.
fn memory_of(pid: u32) -> Result<u64, String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(|e| format!("process {pid}: {e}"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.ok_or_else(|| format!("process {pid} uses no memory"))? / 1024)
}

fn make(dir: &Path, name: &str) -> Result<(), String> {
    mknod(&dir.join(name), SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0).map_err(|e| format!("making {name}: {e}"))
}

fn remove(dir: &Path, name: &str) -> Result<(), String> {
    fs::remove_file(dir.join(name)).map_err(|e| format!("removing {name}: {e}"))
}

/// Lists a directory; how many entries there were. Each of `count` must be there once, and nothing twice.
fn list(dir: &Path, count: u64, others: bool) -> Result<u64, String> {
    let mut directory = Directory::open(dir).map_err(|e| e.to_string())?;
    let (mut seen, mut found, mut strangers) = (vec![false; count as usize], 0, HashSet::new());
    while let Some((name, _)) = directory.next_entry().map_err(|e| e.to_string())? {
        let name = String::from_utf8_lossy(&name).into_owned();
        if name == "." || name == ".." {
            continue;
        }
        match name.strip_prefix("entry-").and_then(|n| n.parse::<usize>().ok()) {
            Some(i) if i < seen.len() => {
                if std::mem::replace(&mut seen[i], true) {
                    return Err(format!("{name} is listed twice"));
                }
                found += 1;
            }
            _ if !others => return Err(format!("{name} is listed, though it is not there")),
            _ if strangers.contains(&name) => return Err(format!("{name} is listed twice")),
            _ => {
                strangers.insert(name);
            }
        }
    }
    match seen.iter().position(|s| !s) {
        Some(i) => Err(format!("{} of {count} entries are missing, {} among them", count - found, name(i as u64))),
        None => Ok(found + strangers.len() as u64),
    }
}

fn look_up(dir: &Path, count: u64, times: u64) -> Result<(), String> {
    for k in 0..times {
        // A stride that visits entries far from each other.
        let i = k.wrapping_mul(7_919_317) % count;
        fs::symlink_metadata(dir.join(name(i))).map_err(|e| format!("{}: {e}", name(i)))?;
        if fs::symlink_metadata(dir.join(name(count + i))).is_ok() {
            return Err(format!("{} was found, though it is not there", name(count + i)));
        }
    }
    Ok(())
}

/// Lists on one node while the other changes what is beside the entries that stay.
fn list_beside_changes(run: &Run) -> Result<u64, String> {
    let (done, changes) = (AtomicBool::new(false), AtomicU64::new(0));
    let window = (run.args.count / 10).clamp(10, 1000);
    std::thread::scope(|scope| {
        let changer = scope.spawn(|| {
            let mut k = 0;
            while !done.load(Ordering::Relaxed) {
                make(&run.here, &format!("guest-{k}"))?;
                if k >= window {
                    remove(&run.here, &format!("guest-{}", k - window))?;
                }
                k += 1;
                changes.store(k, Ordering::Relaxed);
            }
            (k.saturating_sub(window)..k).try_for_each(|k| remove(&run.here, &format!("guest-{k}")))
        });
        let listed = (0..run.args.listings).try_for_each(|_| list(&run.there, run.args.count, true).map(drop));
        done.store(true, Ordering::Relaxed);
        let changed = changer.join().unwrap_or_else(|_| Err("the changing thread panicked".into()));
        listed.and(changed)
    })?;
    Ok(changes.load(Ordering::Relaxed))
}

fn whole(run: &mut Run) -> Result<(), String> {
    let count = run.args.count;
    run.step("making", count, |r| (0..count).try_for_each(|i| make(&r.here, &name(i))))?;
    run.step("listing on the other node", count, |r| list(&r.there, count, false))?;
    run.step("listing", count, |r| list(&r.here, count, false))?;
    let times = count.min(20_000);
    run.step("looking up, and what is not there, on the other node", 2 * times, |r| look_up(&r.there, count, times))?;
    run.step("looking up, and what is not there", 2 * times, |r| look_up(&r.here, count, times))?;
    let listed = count * u64::from(run.args.listings);
    let changes = run.step("listing beside changes", listed, list_beside_changes)?;
    println!("   ({changes} names came and went meanwhile)");
    run.step("removing on the other node", count, |r| (0..count).try_for_each(|i| remove(&r.there, &name(i))))?;
    run.step("listing what is left", 1, |r| list(&r.here, 0, false))?;
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let name = format!("bigdir-{}", std::process::id());
    let mut run = Run { here: args.here.join(&name), there: args.there.join(&name), args, most: 0 };
    let result = fs::create_dir(&run.here).map_err(|e| format!("{}: {e}", run.here.display())).and_then(|()| whole(&mut run));
    match result.and_then(|()| fs::remove_dir(&run.there).map_err(|e| format!("{}: {e}", run.there.display()))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("bigdir: {why}");
            ExitCode::FAILURE
        }
    }
}
