//! Looks for stale results: `coherence DIR DIR… [--rounds N]`, directories in which the same tree is to be seen through mounts
//! of two nodes or more.
//!
//! Each *cell* is one change (made on one node) and one look at what it changed (from another, at once afterwards). A look
//! that does not find what the changing node itself finds is stale. Before each change the looking node has in its caches
//! whatever could be stale: it has just looked, by this look and by one of every kind that fills a cache, by path and
//! through the descriptors that it holds; in some rounds by all looks, and the changing node, too.
//!
//! With three nodes and more all others look at one change, each by another look, which is the first on its node: so a round is
//! one of several cells. The nodes change roles with every round. Cells in which the change makes no difference to the look are left out, so every
//! cell that counts can fail. `--deaf` proves it: the looks are then answered from before the change, and every cell must
//! be found stale; only then does it end as if a difference was found. How many cells there are is known, so none is lost unseen.
//!
//! Many cells are played at a time, each thread in a directory of its own, so that waiting (a changed directory waits until
//! no kernel believes its names) costs no time. The thread that makes a change looks itself: nothing comes between the two. Other
//! nodes' looks have threads that wait for the change.
//!
//! Not demanded: what the kernel answers without asking (`looks::truth`, docs/semantics.md); such looks are counted apart, in
//! a few rounds only.

mod changes;
mod ground;
mod looks;

use changes::CHANGES;
use clap::Parser;
use ground::{Ground, Grounds};
use looks::{FILLING, Found, LOOKS, View};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::iter;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use tests::FOUND;
use tests::cluster::clock;

/// Looks for stale results between mounts.
#[derive(Parser)]
#[command(after_help = tests::ENDS)]
struct Args {
    /// The same directory, through each node's mount.
    #[arg(required = true, num_args = 2..)]
    dirs: Vec<PathBuf>,
    /// Rounds for each cell.
    #[arg(long, default_value_t = 1000)]
    rounds: u32,
    /// Only cells whose name (CHANGE:LOOK) contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Cells that are played at a time.
    #[arg(long, default_value_t = 4)]
    jobs: usize,
    /// The same, of changes to directories, which wait most of the time.
    #[arg(long, default_value_t = 24)]
    waiting_jobs: usize,
    /// Answers looks from before the change: every cell must be found stale, or it ends with 1.
    #[arg(long)]
    deaf: bool,
}

/// In one round of so many all looks are looked before the change, on both nodes, and must agree.
const THOROUGH: u32 = 32;

/// Names are believed for a time that begins when the looking thread takes an answer in. If the machine is so busy that this
/// may have been so much later than the answer was sent the promise ends (docs/semantics.md), and a round counts apart.
const HELD_UP: Duration = Duration::from_millis(200);

/// Of so many rounds one may be held up: else the machine is too busy to prove anything.
const HELD_UP_SHARE: u64 = 2;

/// Cells in which something is promised, and the change makes a difference to the look.
const PROMISED: usize = 468;

/// Rounds for what is not promised.
const LOOSE_ROUNDS: u32 = 20;

/// What one cell's rounds found.
#[derive(Default)]
struct Cell {
    what: &'static str,
    how: &'static str,
    rounds: u32,
    stale: u32,
    /// Rounds with a thread that was held up before the change, and how many of these were stale.
    held_up: u32,
    held_up_stale: u32,
    example: String,
    /// Spent in its changes.
    changing: Duration,
}

/// Cells of one change (by its number) that are played at a time, each from another node.
type Group = (usize, Vec<&'static str>);

impl Cell {
    fn count(&mut self, ready: &Ready, found: &Found, right: &Found) {
        let before = &ready.before;
        if changes::is_of_directory(self.what) && ready.longest >= HELD_UP {
            self.held_up += 1;
            self.held_up_stale += u32::from(found != right);
            return;
        }
        // A round in which the change made no difference to the look does not count.
        self.rounds += u32::from(right != before || found != right);
        if found != right {
            self.stale += 1;
            let old = if found == before { " (as before the change)" } else { "" };
            self.example = format!("found {found}{old}; right is {right}");
        }
    }

    fn line(&self) -> String {
        format!("{}:{}: {} of {} rounds stale, e.g. {}", self.what, self.how, self.stale, self.rounds, self.example)
    }
}

/// One change, and its cells.
#[derive(Default)]
struct Row {
    left: usize,
    done: Vec<Cell>,
}

struct Matrix<'a> {
    args: &'a Args,
    grounds: Grounds,
    /// What is to be played: ordinary cells, and those that wait.
    queues: [Mutex<VecDeque<Group>>; 2],
    rows: Vec<Mutex<Row>>,
    failed: AtomicBool,
    /// Looks before a change that did not find on one node what they did on the other: stale, too.
    disagreements: AtomicU32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a node found before a change.
struct Ready {
    before: Found,
    /// How long the longest of its looks took then.
    longest: Duration,
}

/// Fills all caches of a node that is about to look.
fn get_ready(far: &mut View, how: &str) -> Ready {
    let mut look = |how| {
        let since = clock();
        let found = far.look(how);
        (found, clock().saturating_sub(since))
    };
    let (before, time) = look(looks::truth(how));
    let longest = FILLING.into_iter().map(|how| look(how).1).max().unwrap_or_default();
    // What changes a directory waits for names itself.
    let longest = if looks::is_quiet(how) { longest.max(time) } else { longest };
    Ready { before, longest }
}

impl Matrix<'_> {
    /// Looks that find something else after a change than before, on the node that makes it: the others cannot be stale.
    fn differing(&self, what: &'static str, changer: usize) -> io::Result<Vec<&'static str>> {
        let mut ground = self.grounds.take()?;
        ground.turn += 1;
        let (quiet, loud): (Vec<&str>, Vec<&str>) = LOOKS.iter().partition(|how| looks::is_quiet(how));
        let view = &mut ground.views[changer];
        changes::prepare(what, view.dir())?;
        // Loud ones change what others find, so they come before the others, and after them.
        let mut before: BTreeMap<&str, Found> = loud.iter().map(|how| (*how, view.look(how))).collect();
        before.extend(quiet.iter().map(|how| (*how, view.look(looks::truth(how)))));
        changes::change(what, view.dir(), ground.turn)?;
        let all = quiet.iter().chain(&loud);
        let found = all.filter(|how| view.look(looks::truth(how)) != before[**how]).copied().collect();
        changes::undo(what, view.dir(), ground.turn)?;
        self.grounds.put(ground);
        Ok(found)
    }

    /// Before a change both nodes must find the same.
    fn agree(&self, what: &str, how: &str, here: &Found, there: &Found) {
        if here != there {
            self.disagreements.fetch_add(1, Ordering::SeqCst);
            println!("  before {what}, {how}: {here} and {there}");
        }
    }

    /// One round of some cells: `roles` has the changing node, and then who looks.
    fn play(&self, cells: &mut [Cell], ground: &mut Ground, roles: &[usize], thorough: bool) -> io::Result<()> {
        ground.turn += 1;
        let (what, turn) = (cells[0].what, ground.turn);
        let mut views: Vec<Option<&mut View>> = ground.views.iter_mut().map(Some).collect();
        let mut view = |role: usize| views[roles[role]].take().expect("nobody has two roles");
        let near = view(0);
        let mut far: Vec<(&mut View, &str)> = cells.iter().enumerate().map(|(n, cell)| (view(n + 1), cell.how)).collect();
        // Whoever prepares and undoes is not always who changes, so that the token comes from either side.
        let other = if turn % 4 < 2 { far[0].0.dir() } else { near.dir() }.to_owned();
        changes::prepare(what, &other)?;
        if thorough {
            let all = || LOOKS.into_iter().filter(|how| looks::is_quiet(how) && looks::is_promised(how));
            let right: Vec<Found> = all().map(|how| near.look(how)).collect();
            for (far, _) in &mut far {
                all().zip(&right).for_each(|(how, right)| self.agree(what, how, right, &far.look(how)));
            }
        }
        let here: Vec<Found> = cells.iter().map(|cell| near.look(looks::truth(cell.how))).collect();

        let gate = Barrier::new(far.len());
        let (others, (first, how)) = (far.split_off(1), far.remove(0));
        let (changed, seen) = thread::scope(|scope| {
            let gate = &gate;
            let follow = |(far, how): (_, &'static str)| {
                scope.spawn(move || {
                    let far: &mut View = far;
                    let ready = get_ready(far, how);
                    // All are ready; the change has been made.
                    gate.wait();
                    gate.wait();
                    (ready, far.look(how))
                })
            };
            let others: Vec<_> = others.into_iter().map(follow).collect();
            let ready = get_ready(first, how);
            gate.wait();
            let since = clock();
            let changed = changes::change(what, near.dir(), turn).map(|()| clock().saturating_sub(since));
            gate.wait();
            let mut seen = vec![(ready, first.look(how))];
            seen.extend(others.into_iter().map(|other| other.join().expect("a look panicked")));
            (changed, seen)
        });
        let changed = changed?;
        for ((cell, (ready, found)), here) in cells.iter_mut().zip(seen).zip(&here) {
            let truth = looks::truth(cell.how);
            self.agree(what, truth, here, &ready.before);
            let found = if self.args.deaf { ready.before.clone() } else { found };
            cell.count(&ready, &found, &near.look(truth));
            cell.changing += changed;
        }
        changes::undo(what, &other, turn)
    }

    /// All rounds of some cells.
    fn play_all(&self, what: &'static str, hows: &[&'static str]) -> io::Result<Vec<Cell>> {
        let mut cells: Vec<Cell> = hows.iter().map(|how| Cell { what, how, ..Cell::default() }).collect();
        let promised = hows.iter().all(|how| looks::is_promised(how));
        let rounds = if promised { self.args.rounds } else { self.args.rounds.min(LOOSE_ROUNDS) };
        let nodes = self.args.dirs.len();
        let mut ground = None;
        // Some rounds may not count, but most do.
        for round in 0..rounds * 2 + 10 {
            if cells.iter().all(|cell| cell.rounds >= rounds) || self.failed.load(Ordering::SeqCst) {
                break;
            }
            let mut here = ground.take().map_or_else(|| self.grounds.take(), Ok)?;
            // Everybody changes, and everybody else looks by each look.
            let (changer, turned) = (round as usize % nodes, round as usize / nodes % (nodes - 1));
            let mut others: Vec<usize> = (1..nodes).map(|n| (changer + n) % nodes).collect();
            others.rotate_left(turned);
            let roles: Vec<usize> = iter::once(changer).chain(others).collect();
            let thorough = round < 2 || round % THOROUGH == 0;
            self.play(&mut cells, &mut here, &roles, thorough)
                .map_err(|error| io::Error::other(format!("{what} and {hows:?}, round {round}: {error}")))?;
            if changes::is_of_directory(what) {
                self.grounds.put(here);
            } else {
                if thorough {
                    here.views.iter_mut().for_each(View::close);
                }
                ground = Some(here);
            }
        }
        if let Some(ground) = ground {
            self.grounds.put(ground);
        }
        Ok(cells)
    }

    /// Plays cells until there are no more.
    fn work(&self, queue: &Mutex<VecDeque<Group>>) -> io::Result<()> {
        loop {
            let next = lock(queue).pop_front();
            let Some((row, hows)) = next.filter(|_| !self.failed.load(Ordering::SeqCst)) else { return Ok(()) };
            let cells = self.play_all(CHANGES[row], &hows)?;
            let mut row = lock(&self.rows[row]);
            row.left -= cells.len();
            row.done.extend(cells);
            if row.left == 0 {
                row.tell();
            }
        }
    }

    /// Finds out which cells there are, and plays them all.
    fn run(&mut self) -> io::Result<()> {
        for (number, what) in CHANGES.into_iter().enumerate() {
            if !LOOKS.iter().any(|how| format!("{what}:{how}").contains(&self.args.only)) {
                continue;
            }
            let mut hows = self.differing(what, number % self.args.dirs.len())?;
            hows.retain(|how| format!("{what}:{how}").contains(&self.args.only));
            self.rows[number].get_mut().unwrap_or_else(PoisonError::into_inner).left = hows.len();
            let queue = &self.queues[usize::from(changes::is_of_directory(what))];
            // What changes others' finds is looked for alone.
            let (quiet, loud): (Vec<_>, Vec<_>) = hows.into_iter().partition(|how| looks::is_quiet(how));
            let (promised, loose): (Vec<_>, Vec<_>) = quiet.into_iter().partition(|how| looks::is_promised(how));
            let lookers = self.args.dirs.len() - 1;
            let groups = promised.chunks(lookers).chain(loose.chunks(lookers)).chain(loud.chunks(1));
            lock(queue).extend(groups.map(|group| (number, group.to_vec())));
        }
        let (matrix, [ordinary, waiting]) = (&*self, &self.queues);
        thread::scope(|scope| {
            let queues = iter::repeat_n(ordinary, self.args.jobs).chain(iter::repeat_n(waiting, self.args.waiting_jobs));
            let workers: Vec<_> = queues
                .map(|queue| scope.spawn(|| matrix.work(queue).inspect_err(|_| matrix.failed.store(true, Ordering::SeqCst))))
                .collect();
            // All end before anybody's failure is told.
            let ends: Vec<_> = workers.into_iter().map(|worker| worker.join().expect("a worker panicked")).collect();
            ends.into_iter().collect()
        })
    }

    /// Tells what was found, and how to end.
    fn sum_up(&self) -> u8 {
        let rows: Vec<_> = self.rows.iter().map(lock).collect();
        let (promised, loose): (Vec<&Cell>, Vec<&Cell>) =
            rows.iter().flat_map(|row| &row.done).partition(|cell| looks::is_promised(cell.how));
        for how in LOOKS.into_iter().filter(|how| !looks::is_promised(how)) {
            let cells = || loose.iter().filter(|cell| cell.how == how);
            let (stale, rounds) = cells().fold((0, 0), |sum, cell| (sum.0 + cell.stale, sum.1 + cell.rounds));
            if rounds > 0 {
                println!(
                    "{how}, of which nothing is promised: {stale} of {rounds} rounds stale, for {} changes",
                    cells().count()
                );
            }
        }
        let stale = promised.iter().filter(|cell| cell.stale > 0).count();
        let rounds: u64 = promised.iter().map(|cell| u64::from(cell.rounds)).sum();
        let least = promised.iter().map(|cell| cell.rounds).min().unwrap_or(0);
        let (cells, made) = (promised.len(), self.grounds.made());
        let apart = |count: fn(&Cell) -> u32| promised.iter().map(|cell| count(cell)).sum::<u32>();
        let (held_up, old) = (apart(|cell| cell.held_up), apart(|cell| cell.held_up_stale));
        if held_up > 0 {
            println!("{held_up} rounds do not count, since a thread was held up before the change; {old} of them were stale");
        }
        println!("{stale} stale of {cells} cells, at least {least} rounds for each, {rounds} in all, in {made} directories");
        let disagreements = self.disagreements.load(Ordering::SeqCst);
        if disagreements > 0 {
            println!("{disagreements} looks found something else on another node before a change");
        }
        let mut lacking = Vec::new();
        if least < self.args.rounds {
            lacking.push("not all rounds could be played".to_owned());
        }
        if self.args.only.is_empty() && cells != PROMISED {
            lacking.push(format!(
                "there are {cells} cells, not {PROMISED}: has a change lost its effect, or a number to be set anew?"
            ));
        }
        if u64::from(held_up) * HELD_UP_SHARE > rounds + u64::from(held_up) {
            lacking.push(format!("{held_up} rounds were held up, beside {rounds} that count: the machine is too busy"));
        }
        if self.args.deaf && stale < cells {
            lacking.push(format!("{} cells cannot fail", cells - stale));
        }
        lacking.iter().for_each(|what| eprintln!("coherence: {what}"));
        match stale > 0 || disagreements > 0 {
            // What was found is found, whatever else was not looked at.
            true if lacking.is_empty() || !self.args.deaf => FOUND,
            false if lacking.is_empty() => 0,
            _ => 1,
        }
    }
}

impl Row {
    fn tell(&self) {
        let Some(what) = self.done.first().map(|cell| cell.what) else { return };
        let rounds: u32 = self.done.iter().map(|cell| cell.rounds).sum();
        let changing: Duration = self.done.iter().map(|cell| cell.changing).sum();
        let stale = |promised| self.done.iter().filter(move |c| c.stale > 0 && looks::is_promised(c.how) == promised);
        let (cells, bad, each) = (self.done.len(), stale(true).count(), changing / rounds.max(1));
        println!("{what}: {cells} cells, {rounds} rounds, {bad} stale; a change took {} ms", each.as_millis());
        stale(true).for_each(|cell| println!("  {}", cell.line()));
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let grounds = match Grounds::new(&args.dirs) {
        Ok(grounds) => grounds,
        Err(error) => {
            eprintln!("coherence: cannot make a directory in {}: {error}", args.dirs[0].display());
            return ExitCode::FAILURE;
        }
    };
    let rows = CHANGES.map(|_| Mutex::default()).into();
    let mut matrix = Matrix {
        args: &args,
        grounds,
        queues: Default::default(),
        rows,
        failed: AtomicBool::new(false),
        disagreements: AtomicU32::new(0),
    };
    let result = matrix.run();
    if let Err(error) = &result {
        eprintln!("coherence: {error}");
    }
    let end = matrix.sum_up();
    if let Err(error) = matrix.grounds.remove() {
        eprintln!("coherence: cannot remove what was made: {error}");
    }
    if result.is_ok() { ExitCode::from(end) } else { ExitCode::FAILURE }
}
