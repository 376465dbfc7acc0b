//! File locks of several nodes: `locks check DIR DIR…`, directories in which the same tree is to be seen.
//!
//! Checked, for `flock`, `fcntl` and open-file locks, between processes of one node and of two: which locks exclude each
//! other, and that those of `flock` and of `fcntl` never do; ranges that are split, joined, upgraded and downgraded; waiting,
//! and dying while waiting, also for more of what is held with a parent; a counter in a file that all increment under the lock,
//! which also tells the rate; and that a circle of waiters is broken (`fcntl`), or left alone. With directories of one local
//! file system it says what is right there.
//!
//! `locks worker FILE…` is the process that does the locking (see `tests::locker`).

use clap::{Parser, Subcommand};
use nix::libc;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;
use tests::cluster::clock;
use tests::locker::{Worker, ok, work};
use tests::sys::{LockKind, LockMode, lock, open};

/// File locks of several nodes.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Checks locks through several mounts.
    Check {
        /// Directories in which the same tree is to be seen.
        #[arg(required = true)]
        dirs: Vec<PathBuf>,
        /// How often each process increments the counter.
        #[arg(long, default_value_t = 300)]
        counts: u64,
        /// Only checks whose name contains this.
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Does what its input says.
    Worker {
        /// Files to open.
        files: Vec<PathBuf>,
    },
    /// Waits for an exclusive open-file lock of all of the file that is its input.
    Upgrade,
}

const SOON: Duration = Duration::from_secs(10);
/// Long enough for an answer that should not come to come.
const NEVER: Duration = Duration::from_millis(300);
const KINDS: [&str; 3] = ["flock", "fcntl", "ofd"];

struct Bench {
    program: PathBuf,
    dirs: Vec<PathBuf>,
    counts: u64,
    made: std::cell::Cell<u32>,
}

type Checked = Result<(), String>;

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, right: T) -> Checked {
    if got == right { Ok(()) } else { Err(format!("{what}: {got:?}; right is {right:?}")) }
}

impl Bench {
    /// A new file, as each node sees it.
    fn file(&self) -> Vec<PathBuf> {
        self.made.set(self.made.get() + 1);
        let name = format!("locks-{}-{}", std::process::id(), self.made.get());
        let paths: Vec<PathBuf> = self.dirs.iter().map(|d| d.join(&name)).collect();
        File::create(&paths[0]).and_then(|f| f.set_len(0)).unwrap_or_else(|e| panic!("{}: {e}", paths[0].display()));
        paths
    }

    fn worker(&self, files: &[&Path]) -> Worker {
        Worker::start(&self.program, files)
    }

    /// Pairs of nodes: one and the same, and different ones.
    fn pairs(&self) -> Vec<(usize, usize)> {
        (0..self.dirs.len()).map(|n| (0, n)).collect()
    }

    /// Which locks exclude each other.
    fn conflicts(&self) -> Checked {
        for (near, far) in self.pairs() {
            for kind in KINDS {
                let file = self.file();
                let (mut a, mut b) = (self.worker(&[&file[near]]), self.worker(&[&file[far]]));
                for held in ["sh", "ex"] {
                    for wished in ["sh", "ex"] {
                        same("locking a free file", a.ask(&format!("{kind} 0 {held}")), ok())?;
                        let right = if (held, wished) == ("sh", "sh") { ok() } else { Err(libc::EAGAIN) };
                        let what = format!("{kind} {held} on node {near}, then {wished} on node {far}");
                        same(&what, b.ask(&format!("{kind} 0 {wished}")), right)?;
                        same("unlocking", a.ask(&format!("{kind} 0 un")), ok())?;
                        same("unlocking what is not locked", b.ask(&format!("{kind} 0 un")), ok())?;
                        same(&format!("{what}, once it is free"), b.ask(&format!("{kind} 0 {wished}")), ok())?;
                        same("unlocking", b.ask(&format!("{kind} 0 un")), ok())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// `flock` and `fcntl` do not see each other, in one process, on one node, between nodes; the two kinds of `fcntl` do.
    fn spaces(&self) -> Checked {
        for (near, far) in self.pairs() {
            for held in KINDS {
                for wished in KINDS {
                    let file = self.file();
                    let (mut a, mut b) = (self.worker(&[&file[near]]), self.worker(&[&file[far]]));
                    let meet = (held == "flock") == (wished == "flock");
                    let what = |who: &str| format!("nodes {near} and {far}: {held} is held, {who} asks for {wished}");
                    same("locking a free file", a.ask(&format!("{held} 0 ex")), ok())?;
                    let right = if meet { Err(libc::EAGAIN) } else { ok() };
                    same(&what("another"), b.ask(&format!("{wished} 0 ex")), right.clone())?;
                    same("giving up", b.ask(&format!("{wished} 0 un")), ok())?;
                    // Its own lock is in nobody's way, and is replaced.
                    let right = if held == wished { ok() } else { right };
                    same(&what("the holder"), a.ask(&format!("{wished} 0 ex")), right)?;
                    if !meet {
                        // To give up the one is not to give up the other, nor is it to take the other twice.
                        for _ in 0..2 {
                            same("giving up the second", a.ask(&format!("{wished} 0 un")), ok())?;
                            same(&what("after that, another"), b.ask(&format!("{held} 0 sh")), Err(libc::EAGAIN))?;
                            same(&what("after that, another"), b.ask(&format!("{wished} 0 ex")), ok())?;
                            same("giving up", b.ask(&format!("{wished} 0 un")), ok())?;
                            same("again", a.ask(&format!("{wished} 0 sh")), ok())?;
                        }
                        // A part of the file is no other matter.
                        if wished != "flock" {
                            same("a part", b.ask(&format!("{wished} 0 sh 7 1")), ok())?;
                            same("a part", b.ask(&format!("{wished} 0 un 7 1")), ok())?;
                        }
                    }
                    // A query knows nothing of flock.
                    let queried = b.ask("query 0 ex 0 0");
                    let free = held == "flock" && wished == "flock";
                    same(&what("a query of another, free"), queried == Ok("free".into()), free)?;
                    // Both end with the last descriptor; those of an open file a moment after close() has returned.
                    same("closing", a.ask("reopen 0"), ok())?;
                    for kind in KINDS {
                        b.tell(&format!("{kind} 0 ex 0 0 wait"));
                        same(&what("after closing, another"), b.answer(SOON), Some(ok()))?;
                        same("giving up", b.ask(&format!("{kind} 0 un")), ok())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Who waits for one kind is not woken by the other, and gets what it waits for when its holder is killed.
    fn waiting_in_its_space(&self) -> Checked {
        for (near, far) in self.pairs() {
            for (waited, other) in [("flock", "fcntl"), ("fcntl", "flock")] {
                let file = self.file();
                let (mut a, mut b, mut c) =
                    (self.worker(&[&file[near]]), self.worker(&[&file[far]]), self.worker(&[&file[near]]));
                same("locking", a.ask(&format!("{waited} 0 ex")), ok())?;
                same("locking", c.ask(&format!("{other} 0 ex")), ok())?;
                b.tell(&format!("{waited} 0 ex 0 0 wait"));
                same("waiting", b.answer(NEVER), None)?;
                same("giving up the other kind", c.ask(&format!("{other} 0 un")), ok())?;
                same("waiting", b.answer(NEVER), None)?;
                same("locking", c.ask(&format!("{other} 0 ex")), ok())?;
                a.kill().map_err(|e| format!("the holder: {e}"))?;
                same(&format!("{waited}: after the end of its holder"), b.answer(SOON), Some(ok()))?;
                let mut d = self.worker(&[&file[far]]);
                same(&format!("{waited}, which was waited for"), d.ask(&format!("{waited} 0 sh")), Err(libc::EAGAIN))?;
                same(&format!("{other}, held by another"), d.ask(&format!("{other} 0 sh")), Err(libc::EAGAIN))?;
                same("unlocking", b.ask(&format!("{waited} 0 un")), ok())?;
                same(&format!("{waited}, once it is free"), d.ask(&format!("{waited} 0 ex")), ok())?;
            }
        }
        Ok(())
    }

    /// A shared `flock` that becomes exclusive is given up first.
    fn conversion(&self) -> Checked {
        for (near, far) in self.pairs() {
            let file = self.file();
            let (mut a, mut b) = (self.worker(&[&file[near]]), self.worker(&[&file[far]]));
            for worker in [&mut a, &mut b] {
                same("sharing", worker.ask("flock 0 sh"), ok())?;
            }
            same("a conversion that is refused", a.ask("flock 0 ex"), Err(libc::EAGAIN))?;
            same("has cost the lock", b.ask("flock 0 ex"), ok())?;
            same("converting back", b.ask("flock 0 sh"), ok())?;
            same("sharing", a.ask("flock 0 sh"), ok())?;
            // Two at a time do not wait for each other: one gets it, then the other.
            a.tell("flock 0 ex wait");
            same("waiting", a.answer(NEVER), None)?;
            b.tell("flock 0 ex wait");
            let first = [a.answer(NEVER), b.answer(NEVER)];
            let (mut holder, waiter) = match first {
                [Some(_), None] => (a, b),
                [None, Some(_)] => (b, a),
                other => return Err(format!("nodes {near} and {far}: two that convert at a time: {other:?}; right is one")),
            };
            same("two that convert at a time", first.into_iter().flatten().next(), Some(ok()))?;
            same("unlocking", holder.ask("flock 0 un"), ok())?;
            same("the other", waiter.answer(SOON), Some(ok()))?;
        }
        Ok(())
    }

    /// Ranges, and what a query tells of them.
    fn ranges(&self) -> Checked {
        for (near, far) in self.pairs() {
            for kind in ["fcntl", "ofd"] {
                let file = self.file();
                let (mut a, mut b) = (self.worker(&[&file[near]]), self.worker(&[&file[far]]));
                same("a range", a.ask(&format!("{kind} 0 ex 10 20")), ok())?;
                for (start, len, right) in [
                    (0, 10, ok()),
                    (0, 11, Err(libc::EAGAIN)),
                    (29, 1, Err(libc::EAGAIN)),
                    (30, 0, ok()),
                    (0, 0, Err(libc::EAGAIN)),
                ] {
                    same(&format!("{start}+{len} beside 10+20"), b.ask(&format!("{kind} 0 ex {start} {len}")), right)?;
                }
                same("giving up", b.ask(&format!("{kind} 0 un 0 0")), ok())?;
                // Holes in the middle, and half of it shared.
                same("a hole", a.ask(&format!("{kind} 0 un 15 5")), ok())?;
                same("downgrading", a.ask(&format!("{kind} 0 sh 20 10")), ok())?;
                for (start, how, right) in [
                    (14, "sh", Err(libc::EAGAIN)),
                    (15, "ex", ok()),
                    (19, "ex", ok()),
                    (20, "sh", ok()),
                    (20, "ex", Err(libc::EAGAIN)),
                    (29, "ex", Err(libc::EAGAIN)),
                ] {
                    same(&format!("{how} {start}+1 after both"), b.ask(&format!("{kind} 0 {how} {start} 1")), right)?;
                }
                // A query tells of what is in the way: the process if it is on this node, nobody if on another.
                let pid = if near == far { a.pid().to_string() } else { "0".to_owned() };
                if kind == "fcntl" {
                    same("a query", b.ask("query 0 ex 0 15"), Ok(format!("ex 10 5 {pid}")))?;
                    same("a query beside", b.ask("query 0 ex 0 10"), Ok("free".into()))?;
                }
                // To the end of the file, however far that is.
                same("giving up", b.ask(&format!("{kind} 0 un 0 0")), ok())?;
                same("all of it", a.ask(&format!("{kind} 0 ex 0 0")), ok())?;
                same("far away", b.ask(&format!("{kind} 0 sh 123456789012 1")), Err(libc::EAGAIN))?;
                if kind == "fcntl" {
                    same("a query", b.ask("query 0 sh 77 1"), Ok(format!("ex 0 0 {pid}")))?;
                    // Closing any descriptor of the file gives up what the process has.
                    same("closing", a.ask("reopen 0"), ok())?;
                    same("after closing", b.ask("fcntl 0 ex 0 0"), ok())?;
                }
            }
        }
        Ok(())
    }

    /// Waiting, in turn; downgrading wakes readers.
    fn waiting(&self) -> Checked {
        for (near, far) in self.pairs() {
            for kind in KINDS {
                let file = self.file();
                let (mut a, mut b, mut c) =
                    (self.worker(&[&file[near]]), self.worker(&[&file[far]]), self.worker(&[&file[near]]));
                same("locking", a.ask(&format!("{kind} 0 ex 0 0 wait")), ok())?;
                b.tell(&format!("{kind} 0 sh 0 0 wait"));
                c.tell(&format!("{kind} 0 sh 0 0 wait"));
                same(&format!("{kind}: waiting"), b.answer(NEVER), None)?;
                same(&format!("{kind}: downgrading"), a.ask(&format!("{kind} 0 sh 0 0")), ok())?;
                same(&format!("{kind}: after downgrading"), b.answer(SOON), Some(ok()))?;
                same(&format!("{kind}: after downgrading"), c.answer(SOON), Some(ok()))?;
                for worker in [&mut a, &mut b, &mut c] {
                    same("unlocking", worker.ask(&format!("{kind} 0 un")), ok())?;
                }
            }
        }
        Ok(())
    }

    /// A waiter that is killed ends at once, and nobody waits for it.
    fn killing(&self) -> Checked {
        for (near, far) in self.pairs() {
            for kind in KINDS {
                let file = self.file();
                let (mut a, mut b, mut c) = (self.worker(&[&file[near]]), self.worker(&[&file[far]]), self.worker(&[&file[far]]));
                same("locking", a.ask(&format!("{kind} 0 ex")), ok())?;
                b.tell(&format!("{kind} 0 ex 0 0 wait"));
                same(&format!("{kind}: waiting"), b.answer(NEVER), None)?;
                let took = b.kill().map_err(|e| format!("{kind}, waiting on node {far}: {e}"))?;
                if took > Duration::from_secs(2) {
                    return Err(format!("{kind}: a waiter that was killed took {took:?} to die"));
                }
                c.tell(&format!("{kind} 0 ex 0 0 wait"));
                same(&format!("{kind}: waiting"), c.answer(NEVER), None)?;
                same("unlocking", a.ask(&format!("{kind} 0 un")), ok())?;
                same(&format!("{kind}: once it is free"), c.answer(SOON), Some(ok()))?;
            }
        }
        Ok(())
    }

    /// A process shares an open file with its parent, and is killed while it waits for a stronger lock: what both held before
    /// the parent still holds.
    fn sharing(&self) -> Checked {
        for (near, far) in self.pairs() {
            // Whatever looks at the waiter from time to time sees it die, also at the same moment.
            for after in [100, 470, 480, 490] {
                let file = self.file();
                let mut b = self.worker(&[&file[far]]);
                let parent = open(&file[near], true, 0).map_err(|e| e.to_string())?;
                lock(&parent, LockKind::OpenFile, LockMode::Read, 0, 0, false).map_err(|e| format!("locking: {e}"))?;
                same("sharing", b.ask("ofd 0 sh"), ok())?;
                let input = parent.try_clone().map_err(|e| e.to_string())?;
                let child = Command::new(&self.program).arg("upgrade").stdin(input).spawn();
                let mut child = child.map_err(|e| e.to_string())?;
                std::thread::sleep(Duration::from_millis(after));
                let waits = child.try_wait().map_err(|e| e.to_string())?.is_none();
                same("waiting for the other", waits, true)?;
                child.kill().and_then(|()| child.wait()).map_err(|e| e.to_string())?;
                let what = format!("nodes {near} and {far}, killed after {after} ms");
                same("unlocking", b.ask("ofd 0 un"), ok())?;
                same(&format!("{what}: the parent's lock"), b.ask("ofd 0 ex"), Err(libc::EAGAIN))?;
                drop(parent);
                same(&format!("{what}: once the parent has closed it"), b.ask("ofd 0 ex 0 0 wait"), ok())?;
            }
        }
        Ok(())
    }

    /// A holder that is killed lets go.
    fn ending(&self) -> Checked {
        for (near, far) in self.pairs() {
            for kind in KINDS {
                let file = self.file();
                let (mut a, mut b) = (self.worker(&[&file[near]]), self.worker(&[&file[far]]));
                same("locking", a.ask(&format!("{kind} 0 ex")), ok())?;
                b.tell(&format!("{kind} 0 ex 0 0 wait"));
                same(&format!("{kind}: waiting"), b.answer(NEVER), None)?;
                a.kill().map_err(|e| format!("{kind}: the holder: {e}"))?;
                same(&format!("{kind}: after the end of its holder"), b.answer(SOON), Some(ok()))?;
            }
        }
        Ok(())
    }

    /// A number that everybody increments under the lock.
    fn counting(&self) -> Checked {
        for kind in KINDS {
            let file = self.file();
            let mut workers: Vec<Worker> = file.iter().map(|f| self.worker(&[f])).collect();
            let begun = clock();
            for worker in &mut workers {
                worker.tell(&format!("count 0 {} {kind}", self.counts));
            }
            for worker in &workers {
                same(&format!("{kind}: counting"), worker.answer(Duration::from_secs(120)), Some(ok()))?;
            }
            let took = clock().saturating_sub(begun);
            let all = self.counts * workers.len() as u64;
            println!(
                "   {kind}: {:.0} locked increments per second over {} nodes",
                all as f64 / took.as_secs_f64(),
                workers.len()
            );
            same(&format!("{kind}: the number"), workers[0].ask("read 0"), Ok(format!("read {all:<20}")))?;
        }
        Ok(())
    }

    /// Circles of waiters, over two files, that nobody breaks: of open files.
    fn circles(&self) -> Checked {
        for (near, far) in self.pairs() {
            for kind in ["flock", "ofd"] {
                let (f, g) = (self.file(), self.file());
                let mut a = self.worker(&[&f[near], &g[near]]);
                let mut b = self.worker(&[&f[far], &g[far]]);
                same("locking", a.ask(&format!("{kind} 0 ex")), ok())?;
                same("locking", b.ask(&format!("{kind} 1 ex")), ok())?;
                a.tell(&format!("{kind} 1 ex 0 0 wait"));
                b.tell(&format!("{kind} 0 ex 0 0 wait"));
                same(&format!("{kind}: in a circle"), (b.answer(NEVER), a.answer(NEVER)), (None, None))?;
                b.kill().map_err(|e| format!("{kind}: in a circle: {e}"))?;
                same(&format!("{kind}: when the other is gone"), a.answer(SOON), Some(ok()))?;
                if kind == "ofd" {
                    // One open file, ranges of which each waits for the other's.
                    let h = self.file();
                    let (mut a, mut b) = (self.worker(&[&h[near]]), self.worker(&[&h[far]]));
                    same("locking", a.ask("ofd 0 ex 100 1"), ok())?;
                    same("locking", b.ask("ofd 0 ex 101 1"), ok())?;
                    a.tell("ofd 0 ex 101 1 wait");
                    b.tell("ofd 0 ex 100 1 wait");
                    same("ofd: in a circle in one file", (b.answer(NEVER), a.answer(NEVER)), (None, None))?;
                    b.kill().map_err(|e| format!("ofd: in a circle: {e}"))?;
                    same("ofd: when the other is gone", a.answer(SOON), Some(ok()))?;
                }
            }
        }
        Ok(())
    }

    /// Circles of waiters, over one file and over several.
    fn deadlocks(&self) -> Checked {
        let (f, g) = (self.file(), self.file());
        for (near, far) in self.pairs() {
            for two_files in [false, true] {
                // Ranges 0+1 and 1+1 of one file, or the whole of two.
                let what = |which: usize| if two_files { format!("{which} ex 0 1") } else { format!("0 ex {which} 1") };
                let mut a = self.worker(&[&f[near], &g[near]]);
                let mut b = self.worker(&[&f[far], &g[far]]);
                same("locking", a.ask(&format!("fcntl {}", what(0))), ok())?;
                same("locking", b.ask(&format!("fcntl {}", what(1))), ok())?;
                a.tell(&format!("fcntl {} wait", what(1)));
                same("waiting", a.answer(NEVER), None)?;
                b.tell(&format!("fcntl {} wait", what(0)));
                let (first, second) = (b.answer(SOON), a.answer(NEVER));
                let files = if two_files { "over two files" } else { "over one file" };
                match (first, second) {
                    (Some(Err(libc::EDEADLK)), None) => {
                        drop(b);
                        same("when the other gives way", a.answer(SOON), Some(ok()))?;
                    }
                    (None, Some(Err(libc::EDEADLK))) => {
                        drop(a);
                        same("when the other gives way", b.answer(SOON), Some(ok()))?;
                    }
                    other => return Err(format!("nodes {near} and {far}, {files}: {other:?}; right is EDEADLK for one of them")),
                }
            }
        }
        Ok(())
    }
}

fn check(bench: &Bench, only: &str) -> bool {
    type Check = fn(&Bench) -> Checked;
    let checks: [(&str, Check); 12] = [
        ("conflicts", Bench::conflicts),
        ("spaces", Bench::spaces),
        ("its-space", Bench::waiting_in_its_space),
        ("conversion", Bench::conversion),
        ("circles", Bench::circles),
        ("ranges", Bench::ranges),
        ("waiting", Bench::waiting),
        ("killing", Bench::killing),
        ("sharing", Bench::sharing),
        ("ending", Bench::ending),
        ("counting", Bench::counting),
        ("deadlocks", Bench::deadlocks),
    ];
    let mut good = true;
    for (name, run) in checks.iter().filter(|(name, _)| name.contains(only)) {
        let begun = clock();
        let result = run(bench);
        let took = clock().saturating_sub(begun);
        println!("{name}: {} ({took:.1?})", result.as_ref().err().map_or("good", String::as_str));
        good &= result.is_ok();
    }
    for n in 1..=bench.made.get() {
        let _ = fs::remove_file(bench.dirs[0].join(format!("locks-{}-{n}", std::process::id())));
    }
    good
}

fn main() -> ExitCode {
    match Args::parse().verb {
        Verb::Worker { files } => match work(&files) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("locks worker: {error}");
                ExitCode::FAILURE
            }
        },
        Verb::Upgrade => {
            let upgraded = std::io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .and_then(|input| lock(&File::from(input), LockKind::OpenFile, LockMode::Write, 0, 0, true));
            if upgraded.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Verb::Check { dirs, counts, only } => {
            let program = std::env::current_exe().unwrap_or_default();
            let bench = Bench { program, dirs, counts, made: std::cell::Cell::new(0) };
            if check(&bench, &only) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}
