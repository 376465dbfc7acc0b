//! Concurrent histories of one object: clients work on it at the same time, each call is recorded with its beginning and its
//! end, and afterwards an order is looked for in which the oracle gives the same answers (`linear`).
//!
//! An object is a file's contents (written, appended to, cut, read, asked about, through descriptors held open), or the names
//! of a directory (made, linked, moved, removed, looked up, listed). Moments are numbers of one counter, so "ended before the
//! other began" is exact, whatever the clocks show.
//!
//! What is one moment, and what is not:
//! - A listing is checked name by name: each name that it shows, or does not, must have been there, or not, at *some* moment of
//!   the listing. So a name that moves meanwhile may be seen twice, under both names, or not at all, as POSIX allows.
//! - `link` and `lstat` look a name up at one moment and do the rest with the inode at another; `rename` may find, before it asks
//!   the file system, that both names are one file (that has several names), or of kinds that do not go together.
//! - A read through the page cache (a descriptor for reading only) is checked page by page: each page as it was at some moment
//!   of the read, with zeros beyond its end, and the length one that the file had at some moment. The kernel takes no lock
//!   against writers there, over any file system; other reads are one moment. For the same reason it may stop between two
//!   pages, if the file was longer at one moment and shorter at another; and, over FUSE only, anywhere between the two beside a
//!   write or `fallocate` on the same node (the kernel takes the file to reach to where that ends, as soon as it is done; where an
//!   append ends it reckons from the longer size, if another node cuts the file meanwhile, so it may stop so much later);
//!   and, also over FUSE only, there may be zeros where such a call on the same node makes zeros (the kernel makes them in its pages,
//!   too, after they were made, perhaps over what another node has written there).
//! - A call that ended with an error that a fault excuses, or whose client died, happened or did not.
//!
//! What a crash takes back is a tail of what the last node that had the object did to it since it was last durable: fsync'd,
//! or used on another node ([`History::loss`]).

use crate::driver::Driver;
use crate::linear::{Call, Spec, Verdict, check};
use crate::op::{Fallocate, FileKind, Op, OpenHow, Outcome, RenameFlag, Reply, Stat, errno, pattern};
use crate::reference::Oracle;
use cluster::sim::Rng;
use parking_lot::Mutex;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::hash::Hash;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// What clients work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// A file that always fits its inode: a crash keeps a state that it had.
    Small,
    /// A file of several blocks.
    Large,
    /// A directory's names.
    Names,
}

/// The names in play.
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
/// The slot that a client has the file open in for reading and writing, for appending, and for reading only.
const READ_WRITE: u8 = 0;
const APPEND: u8 = 1;
const READ_ONLY: u8 = 2;
/// For what is opened and closed within one call.
const BRIEF: u8 = 3;
/// Of the page cache.
const PAGE: usize = 4096;
/// More configurations than this are not looked at.
const CONFIGURATIONS_MAX: usize = 200_000;

/// A call as it was seen.
#[derive(Clone, Debug)]
struct Record {
    client: usize,
    node: usize,
    op: Op,
    begun: u64,
    ended: Option<u64>,
    outcome: Option<Outcome>,
}

/// A node may have lost what was not durable, between two moments.
#[derive(Clone, Copy, Debug)]
struct Loss {
    node: usize,
    begun: u64,
    ended: u64,
}

/// What the clients of one object did and saw.
pub struct History {
    object: Object,
    dir: String,
    ticks: AtomicU64,
    records: Mutex<Vec<Record>>,
    losses: Mutex<Vec<Loss>>,
}

/// What a history came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// Calls.
    pub calls: usize,
    /// Calls that ended while another one was under way.
    pub overlapping: usize,
    /// Configurations that were looked at.
    pub configurations: usize,
    /// There were too many.
    pub undecided: bool,
    /// Calls that failed with `ESTALE`: what their path led to went away, and again when the kernel walked the path anew.
    pub stale: usize,
}

/// Whether the histories of so many objects prove something. One that was not decided counts as one with an order, so most must be;
/// and where no call is beside another there is but one order.
///
/// # Errors
/// What is lacking.
pub fn enough(objects: u64, undecided: u64, overlapping: u64) -> Result<(), String> {
    if undecided * 4 > objects {
        return Err(format!("{undecided} of {objects} histories were too much to decide"));
    }
    if overlapping == 0 {
        return Err("no call was beside another".into());
    }
    Ok(())
}

/// Decides what a client does next.
pub struct Client {
    /// Which one.
    pub number: usize,
    /// Its node.
    pub node: usize,
    rng: Rng,
    made: u32,
}

impl Client {
    /// A client.
    #[must_use]
    pub fn new(number: usize, node: usize, rng: Rng) -> Self {
        Client { number, node, rng, made: 0 }
    }

    /// Its chance, for pauses.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    fn next(&mut self, object: Object, dir: &str) -> Op {
        self.made += 1;
        // Every write can be told from every other one.
        let fill = (self.number as u32 + 1) << 16 | self.made;
        match object {
            Object::Names => self.names(dir),
            Object::Small => {
                let (at, len) = (self.rng.below(12) * 50, 1 + self.rng.below(300) as u32);
                self.data(fill, at, len, 700, 2000)
            }
            Object::Large => {
                let at = [0, 100, 4000, 4096, 8192][self.rng.below(5) as usize];
                let len = [30, 4096, 5000, 9000][self.rng.below(4) as usize];
                self.data(fill, at, len, 13_000, 60_000)
            }
        }
    }

    fn data(&mut self, fill: u32, offset: u64, len: u32, size_max: u64, all: u32) -> Op {
        match self.rng.below(100) {
            0..25 => Op::Write { slot: READ_WRITE, offset, len, fill },
            25..35 => Op::Write { slot: APPEND, offset: 0, len: len.min(200), fill },
            35..43 => Op::Truncate { slot: READ_WRITE, size: self.rng.below(size_max) },
            43..46 => {
                let what = if self.rng.percent(50) { Fallocate::PunchHole } else { Fallocate::ZeroRange };
                Op::Fallocate { slot: READ_WRITE, what, offset, len: u64::from(len) }
            }
            46..66 => Op::Read { slot: READ_WRITE, offset: 0, len: all },
            66..82 => Op::Read { slot: READ_ONLY, offset: 0, len: all },
            82..95 => Op::Fstat { slot: self.rng.below(3) as u8 },
            _ => Op::Fsync { slot: READ_WRITE },
        }
    }

    fn names(&mut self, dir: &str) -> Op {
        let rng = &mut self.rng;
        let mut path = || format!("{dir}/{}", NAMES[rng.below(NAMES.len() as u64) as usize]);
        let (path, other) = (path(), path());
        match self.rng.below(100) {
            0..18 => {
                let exclusive = self.rng.percent(70);
                Op::Open { slot: BRIEF, path, how: OpenHow { write: true, create: true, exclusive, ..OpenHow::default() } }
            }
            18..24 => Op::Mkdir { path, mode: 0o755 },
            24..28 => Op::Symlink { target: format!("{}-{}", self.number, self.made), path },
            28..38 => Op::Link { from: path, to: other },
            38..50 => Op::Unlink { path },
            50..54 => Op::Rmdir { path },
            54..72 => {
                let flag = match self.rng.below(8) {
                    0 | 1 => RenameFlag::Exchange,
                    2 => RenameFlag::Whiteout,
                    _ => RenameFlag::Replace,
                };
                Op::Rename { from: path, to: other, flag }
            }
            72..90 => Op::Stat { path },
            90..93 => Op::Readlink { path },
            93..98 => Op::Readdir { path: dir.to_owned() },
            _ => Op::FsyncDir { path: dir.to_owned() },
        }
    }
}

impl History {
    /// Of the object in a directory, which must be there and empty, and which nobody else uses.
    #[must_use]
    pub fn new(object: Object, dir: &str) -> Self {
        History { object, dir: dir.to_owned(), ticks: AtomicU64::new(1), records: Mutex::default(), losses: Mutex::default() }
    }

    fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    fn file(&self) -> String {
        format!("{}/f", self.dir)
    }

    fn opens(&self) -> [Op; 3] {
        let open = |slot, how| Op::Open { slot, path: self.file(), how };
        let how = OpenHow { read: true, write: true, ..OpenHow::default() };
        [
            open(READ_WRITE, how),
            open(APPEND, OpenHow { append: true, read: false, ..how }),
            open(READ_ONLY, OpenHow { read: true, ..OpenHow::default() }),
        ]
    }

    /// Makes what the clients need, before any of them begins.
    ///
    /// # Errors
    /// The `errno`.
    pub async fn prepare(&self, driver: &mut impl Driver) -> Result<(), i32> {
        if self.object == Object::Names {
            return Ok(());
        }
        let how = OpenHow { write: true, create: true, ..OpenHow::default() };
        driver.run(0, &Op::Open { slot: BRIEF, path: self.file(), how }).await?;
        driver.run(0, &Op::Fsync { slot: BRIEF }).await?;
        driver.run(0, &Op::Close { slot: BRIEF }).await?;
        Ok(())
    }

    /// A client opens what it needs; a driver has one node.
    ///
    /// # Errors
    /// The `errno`.
    pub async fn open(&self, driver: &mut impl Driver) -> Result<(), i32> {
        if self.object != Object::Names {
            for op in self.opens() {
                driver.run(0, &op).await?;
            }
        }
        Ok(())
    }

    /// A client makes its next call.
    pub async fn step(&self, client: &mut Client, driver: &mut impl Driver) {
        let op = client.next(self.object, &self.dir);
        self.call(client, driver, op).await;
    }

    /// A client looks at everything: when the others have ended, this decides what they left.
    pub async fn look(&self, client: &mut Client, driver: &mut impl Driver) {
        let mut ops: Vec<Op> = NAMES.iter().map(|n| Op::Stat { path: format!("{}/{n}", self.dir) }).collect();
        ops.push(Op::Readdir { path: self.dir.clone() });
        if self.object != Object::Names {
            let read = |slot| Op::Read { slot, offset: 0, len: 60_000 };
            ops = vec![Op::Fstat { slot: READ_ONLY }, read(READ_WRITE), read(READ_ONLY)];
        }
        for op in ops {
            self.call(client, driver, op).await;
        }
    }

    async fn call(&self, client: &Client, driver: &mut impl Driver, op: Op) {
        let at = {
            let mut records = self.records.lock();
            let (client, node) = (client.number, client.node);
            records.push(Record { client, node, op: op.clone(), begun: self.tick(), ended: None, outcome: None });
            records.len() - 1
        };
        let mut outcome = driver.run(0, &op).await;
        if let (Op::Open { slot, .. }, Ok(_)) = (&op, &outcome) {
            // Which file it was.
            if let Ok(stat) = driver.run(0, &Op::Fstat { slot: *slot }).await {
                outcome = Ok(stat);
            }
            let _ = driver.run(0, &Op::Close { slot: *slot }).await;
        }
        let ended = self.tick();
        let mut records = self.records.lock();
        (records[at].ended, records[at].outcome) = (Some(ended), Some(outcome));
    }

    /// The clients of a node are no more: what they had begun happened by now, or never will.
    pub fn died(&self, node: usize) {
        let now = self.tick();
        let mut records = self.records.lock();
        records.iter_mut().filter(|r| r.node == node && r.ended.is_none()).for_each(|r| r.ended = Some(now));
    }

    /// From now on, until [`History::recovered`], a node may lose what is not durable.
    pub fn loss(&self, node: usize) {
        let begun = self.tick();
        self.losses.lock().push(Loss { node, begun, ended: u64::MAX });
    }

    /// All losses that there were have come about.
    pub fn recovered(&self) {
        let now = self.tick();
        self.losses.lock().iter_mut().for_each(|l| l.ended = l.ended.min(now));
    }

    /// Looks for an order.
    ///
    /// # Errors
    /// There is none: the shortest history found that shows it.
    pub fn decide(&self) -> Result<Decided, String> {
        let records = self.records.lock().clone();
        let losses = self.losses.lock().clone();
        let overlapping = |r: &&Record| {
            let within = |at: u64, o: &Record| o.begun < at && o.ended.is_none_or(|e| at < e);
            r.ended.is_some_and(|at| records.iter().any(|o| o.client != r.client && within(at, o)))
        };
        let mut decided = Decided {
            calls: records.len(),
            overlapping: records.iter().filter(overlapping).count(),
            stale: records.iter().filter(|r| r.outcome == Some(Err(errno::ESTALE))).count(),
            ..Decided::default()
        };
        self.plausible(&records, &losses)?;
        match self.search(&records, &losses) {
            Verdict::Linear { configurations } => decided.configurations = configurations,
            Verdict::Undecided => decided.undecided = true,
            Verdict::Wrong { .. } => return Err(self.explain(records, &losses)),
        }
        Ok(decided)
    }

    /// What is wrong whatever the order.
    fn plausible(&self, records: &[Record], losses: &[Loss]) -> Result<(), String> {
        for record in records {
            let excused = losses.iter().any(|l| l.node == record.node && record.ended.is_none_or(|e| l.begun < e));
            let wrong = match record.outcome {
                Some(Err(errno::EIO)) => !excused,
                Some(Err(errno::ESTALE)) => !excused && !record.op.has_path(),
                _ => false,
            };
            if wrong {
                return Err(format!("an error without a cause: {}", line(record)));
            }
            if let (Op::Readdir { .. }, Some(Ok(Reply::Names(names)))) = (&record.op, &record.outcome) {
                let known: BTreeSet<&str> = names.iter().map(|(n, _)| n.as_str()).filter(|n| NAMES.contains(n)).collect();
                if known.len() != names.len() {
                    return Err(format!("names twice, or that nobody made: {}", line(record)));
                }
            }
        }
        Ok(())
    }

    fn search(&self, records: &[Record], losses: &[Loss]) -> Verdict {
        let clients: BTreeSet<usize> = records.iter().map(|r| r.client).collect();
        let mut oracle = Oracle::new();
        let mut path = String::new();
        for name in self.dir.split('/') {
            path = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
            let _ = oracle.run(0, &Op::Mkdir { path: path.clone(), mode: 0o755 });
        }
        if self.object != Object::Names {
            let _ = oracle.run(0, &Op::Mknod { path: self.file(), fifo: false, mode: 0o644 });
            clients.iter().for_each(|client| self.opens().iter().for_each(|op| drop(oracle.run(*client, op))));
        }
        let start = State { oracle, bound: BTreeMap::new(), held: BTreeMap::new(), past: Vec::new(), by: None };
        let mut calls: Vec<Call<Act>> = records.iter().enumerate().flat_map(|(at, r)| calls(at, r, records)).collect();
        calls.extend(losses.iter().map(|l| {
            let ways = vec![vec![Act { client: 0, node: l.node, what: What::Loss }]];
            Call { begun: l.begun, ended: l.ended, must: false, ways }
        }));
        check(&Posix { losing: !losses.is_empty() }, start, &calls, CONFIGURATIONS_MAX)
    }

    /// The shortest history with the same fault: what only looks, or failed, is left out while the rest is wrong still. (What
    /// changed something must stay: leaving it out could make a good history a wrong one.)
    fn explain(&self, records: Vec<Record>, losses: &[Loss]) -> String {
        let is_wrong = |records: &[Record]| matches!(self.search(records, losses), Verdict::Wrong { .. });
        // All that began after the fault showed.
        let mut ends: Vec<u64> = records.iter().filter_map(|r| r.ended).collect();
        ends.sort_unstable();
        let until = |end: u64| -> Vec<Record> {
            let mut part: Vec<Record> = records.iter().filter(|r| r.begun < end).cloned().collect();
            part.iter_mut().filter(|r| r.ended.is_none_or(|e| e > end)).for_each(|r| (r.ended, r.outcome) = (None, None));
            part
        };
        let first = ends.partition_point(|end| !is_wrong(&until(*end)));
        let cut = ends.get(first).map_or_else(|| records.clone(), |end| until(*end));
        let (looks, changes): (Vec<Record>, Vec<Record>) = cut.into_iter().partition(|r| !changes(r));
        let whole = |looks: &[Record]| -> Vec<Record> {
            let mut all: Vec<Record> = looks.iter().chain(&changes).cloned().collect();
            all.sort_by_key(|r| r.begun);
            all
        };
        let looks = crate::generate::shrink(looks, 300, |looks| is_wrong(&whole(looks)));
        let short = whole(&looks);
        let mut text = format!("no order explains this ({:?} in {}):\n", self.object, self.dir);
        for record in &short {
            let _ = writeln!(text, "  {}", line(record));
            if let Some(Ok(Reply::Bytes(bytes))) = &record.outcome {
                let _ = writeln!(text, "          made of {}", made_of(bytes, &records));
            }
        }
        losses.iter().for_each(|l| _ = writeln!(text, "  n{} may lose something from {} to {}", l.node + 1, l.begun, l.ended));
        if let Verdict::Wrong { stuck, .. } = self.search(&short, losses) {
            let fits: BTreeSet<u64> = {
                let calls: Vec<(u64, u64)> = short
                    .iter()
                    .enumerate()
                    .flat_map(|(at, r)| calls(at, r, &short).into_iter().map(|c| (c.begun, c.ended)))
                    .collect();
                stuck.iter().filter_map(|c| calls.get(*c)).map(|c| c.0).collect()
            };
            let _ = writeln!(text, "in the longest attempt none of those that began at {fits:?} fits");
        }
        text
    }
}

/// Which writes the bytes that were read are from: ranges, with the number of the write's fill (0: zeros).
fn made_of(bytes: &[u8], records: &[Record]) -> String {
    /// So many equal bytes tell one write's from another's.
    const TELLING: usize = 8;
    let fills: Vec<(u32, Vec<u8>)> = records
        .iter()
        .filter_map(|r| match r.op {
            Op::Write { len, fill, .. } => Some((fill, pattern(fill, 0, len as usize))),
            _ => None,
        })
        .collect();
    let equal = |a: &[u8], b: &[u8]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let (mut at, mut text) = (0, String::new());
    while at < bytes.len() {
        let rest = &bytes[at..];
        let zeros = (rest.iter().take_while(|byte| **byte == 0).count(), "zeros".to_owned());
        let runs = fills.iter().map(|(fill, from)| {
            let run = (0..from.len()).map(|start| equal(rest, &from[start..])).max();
            (run.unwrap_or(0), fill.to_string())
        });
        let (run, what) = runs.chain([zeros]).max().unwrap_or_default();
        let (run, what) = if run < TELLING.min(rest.len()) { (1, "?".to_owned()) } else { (run, what) };
        let _ = write!(text, "{at}..{} {what}, ", at + run);
        at += run;
    }
    text
}

fn line(r: &Record) -> String {
    let ended = r.ended.map_or("…".to_owned(), |e| e.to_string());
    let outcome = r.outcome.as_ref().map_or("never known".to_owned(), |o| format!("{o:?}"));
    format!("{:5}-{ended:5} n{} client {}: {:?} -> {outcome}", r.begun, r.node + 1, r.client, r.op)
}

/// Whether a call may have changed something.
fn changes(r: &Record) -> bool {
    let looks = matches!(
        r.op,
        Op::Read { .. } | Op::Fstat { .. } | Op::Stat { .. } | Op::Readlink { .. } | Op::Readdir { .. } | Op::FsyncDir { .. }
    );
    !looks && !matches!(r.outcome, Some(Err(error)) if error != errno::EIO && error != errno::ESTALE)
}

/// Whether something that can make the file longer was under way on the same node beside this.
fn is_beside_write(r: &Record, records: &[Record]) -> bool {
    let lengthens = |o: &Record| matches!(o.op, Op::Write { .. } | Op::Fallocate { .. });
    records.iter().any(|o| lengthens(o) && is_beside(o, r))
}

/// How much is appended on the same node beside this.
fn appended_beside(r: &Record, records: &[Record]) -> u64 {
    let appended = |o: &Record| match o.op {
        Op::Write { slot: APPEND, len, .. } => u64::from(len),
        _ => 0,
    };
    records.iter().filter(|o| is_beside(o, r)).map(appended).sum()
}

/// Where the kernel of the same node may have made zeros in its pages beside this.
fn zeros_beside(r: &Record, records: &[Record]) -> Vec<Range<u64>> {
    let made = |o: &Record| match o.op {
        Op::Fallocate { what: Fallocate::PunchHole | Fallocate::ZeroRange, offset, len, .. } => Some(offset..offset + len),
        _ => None,
    };
    records.iter().filter(|o| is_beside(o, r)).filter_map(made).collect()
}

/// Whether both were under way on one node at some moment.
fn is_beside(a: &Record, b: &Record) -> bool {
    let end = |r: &Record| r.ended.unwrap_or(u64::MAX);
    a.node == b.node && a.begun < end(b) && b.begun < end(a)
}

/// One moment.
#[derive(Clone, Debug)]
struct Act {
    client: usize,
    node: usize,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    /// The whole operation, with this answer (or any).
    Run(Op, Option<Outcome>),
    /// `open` with `O_CREAT`, and `close`.
    Make {
        path: String,
        exclusive: bool,
        outcome: Option<Outcome>,
    },
    /// A path leads to something, which is remembered; to a directory, or not, if that is said.
    Find {
        path: String,
        key: usize,
        dir: Option<bool>,
    },
    /// A path leads to what is remembered, which has several names.
    IsFound {
        path: String,
        key: usize,
    },
    /// What is remembered gets a name.
    LinkFound {
        to: String,
        key: usize,
        outcome: Option<Outcome>,
    },
    /// What is remembered has these attributes.
    StatFound {
        key: usize,
        stat: Stat,
    },
    /// A name in a listing, or its absence.
    Listed {
        path: String,
        kind: Option<FileKind>,
    },
    /// A read of so much ends at the file's end, or is full.
    Length {
        slot: u8,
        len: u64,
        wanted: u64,
    },
    /// The file is no shorter, or no longer, than this.
    AtLeast {
        slot: u8,
        len: u64,
    },
    AtMost {
        slot: u8,
        len: u64,
    },
    /// Bytes of a file, with zeros beyond its end; or, in some ranges, zeros.
    Page {
        slot: u8,
        offset: u64,
        bytes: Vec<u8>,
        zeros: Vec<Range<u64>>,
    },
    /// The node may lose what is not durable.
    Loss,
}

/// The acts that a call of a history may have consisted of. A listing becomes several calls.
fn calls(key: usize, r: &Record, records: &[Record]) -> Vec<Call<Act>> {
    let act = |what| Act { client: r.client, node: r.node, what };
    let way = |whats: Vec<What>| whats.into_iter().map(act).collect::<Vec<_>>();
    let known = r.outcome.clone().filter(|o| !matches!(o, Err(errno::EIO | errno::ESTALE)));
    let (begun, ended, must) = (r.begun, r.ended.unwrap_or(u64::MAX), known.is_some());
    let run = What::Run(r.op.clone(), known.clone());
    let find = |path: &String, dir| What::Find { path: path.clone(), key, dir };
    let mut ways = vec![way(vec![run.clone()])];
    match (&r.op, &known) {
        // Who has not heard an answer has seen nothing.
        (Op::Read { .. } | Op::Fstat { .. } | Op::Stat { .. } | Op::Readlink { .. } | Op::Readdir { .. }, None) => return vec![],
        (Op::Fsync { .. } | Op::FsyncDir { .. }, None) => return vec![],
        (Op::Readdir { path }, Some(Ok(Reply::Names(names)))) => {
            let listed = NAMES.iter().map(|name| {
                let kind = names.iter().find(|(n, _)| n == name).map(|(_, kind)| *kind);
                let ways = vec![way(vec![What::Listed { path: format!("{path}/{name}"), kind }])];
                Call { begun, ended, must, ways }
            });
            return listed.collect();
        }
        (Op::Open { path, how, .. }, outcome) => {
            ways = vec![way(vec![What::Make { path: path.clone(), exclusive: how.exclusive, outcome: outcome.clone() }])];
        }
        (Op::Rename { from, to, .. }, Some(Ok(_)) | None) => {
            ways.push(way(vec![find(from, None), What::IsFound { path: to.clone(), key }]));
        }
        (Op::Rename { from, to, flag: RenameFlag::Replace | RenameFlag::Whiteout }, Some(Err(error))) => {
            let kinds = match *error {
                errno::EISDIR => Some((false, true)),
                errno::ENOTDIR => Some((true, false)),
                _ => None,
            };
            ways.extend(kinds.map(|(a, b)| way(vec![find(from, Some(a)), find(to, Some(b))])));
        }
        (Op::Link { from, to }, outcome) => {
            ways.push(way(vec![find(from, None), What::LinkFound { to: to.clone(), key, outcome: outcome.clone() }]));
        }
        (Op::Stat { path }, Some(Ok(Reply::Stat(stat)))) => {
            ways.push(way(vec![find(path, None), What::StatFound { key, stat: *stat }]));
        }
        (Op::Read { slot: slot @ READ_ONLY, offset: 0, len }, Some(Ok(Reply::Bytes(bytes)))) => {
            let (slot, wanted, len) = (*slot, u64::from(*len), bytes.len() as u64);
            let mut lengths = vec![way(vec![What::Length { slot, len, wanted }])];
            if len.is_multiple_of(PAGE as u64) || is_beside_write(r, records) {
                let longer = What::AtLeast { slot, len: len.saturating_sub(appended_beside(r, records)) };
                let shorter = What::AtMost { slot, len };
                lengths.extend([way(vec![longer.clone(), shorter.clone()]), way(vec![shorter, longer])]);
            }
            let pages = bytes.chunks(PAGE).enumerate();
            let zeros = zeros_beside(r, records);
            let pages = pages.map(|(n, page)| {
                let (offset, bytes, zeros) = ((n * PAGE) as u64, page.to_vec(), zeros.clone());
                vec![way(vec![What::Page { slot, offset, bytes, zeros }])]
            });
            return std::iter::once(lengths).chain(pages).map(|ways| Call { begun, ended, must, ways }).collect();
        }
        _ => {}
    }
    vec![Call { begun, ended, must, ways }]
}

/// The oracle, and what goes with the search.
#[derive(Clone)]
struct State {
    oracle: Oracle,
    /// Which number an inode of the oracle has in reality, once it was seen.
    bound: BTreeMap<u64, u64>,
    /// What calls under way have found, and whether it is a directory.
    held: BTreeMap<usize, (u64, bool)>,
    /// What a crash may leave instead: the states since the object was last durable.
    past: Vec<Oracle>,
    /// The node that used it last.
    by: Option<usize>,
}

impl State {
    /// A real inode number was seen.
    fn bind(&mut self, ino: u64, real: u64) -> bool {
        let State { oracle, bound, .. } = self;
        bound.retain(|o, _| oracle.is_live(*o));
        match bound.get(&ino) {
            Some(known) => *known == real,
            None if bound.values().any(|r| *r == real) => false,
            None => {
                bound.insert(ino, real);
                true
            }
        }
    }

    fn is(&mut self, right: &Stat, got: &Stat) -> bool {
        let sized = matches!(right.kind, FileKind::File | FileKind::Symlink);
        right.kind == got.kind
            && (right.mode, right.uid, right.gid) == (got.mode, got.uid, got.gid)
            && (right.kind == FileKind::Dir || right.nlink == got.nlink)
            && (!sized || right.size == got.size)
            && self.bind(right.ino, got.ino)
    }
}

struct Posix {
    /// Whether there are crashes that lose something.
    losing: bool,
}

impl Posix {
    /// Whether the act fits the state, which it changes.
    fn fits(&self, state: &mut State, act: &Act) -> bool {
        match &act.what {
            What::Run(op, outcome) => {
                let right = state.oracle.run(act.client, op);
                match (&right, outcome) {
                    (_, None) => true,
                    (Ok(Reply::Stat(right)), Some(Ok(Reply::Stat(got)))) => state.is(right, got),
                    (right, Some(got)) => right == got,
                }
            }
            What::Make { path, exclusive, outcome } => {
                let found = state.oracle.find(path).ok().and_then(|ino| state.oracle.attributes(ino));
                let right = match found.map(|f| f.kind) {
                    Some(_) if *exclusive => Err(errno::EEXIST),
                    Some(FileKind::File) => Ok(Reply::Done),
                    Some(FileKind::Dir) => Err(errno::EISDIR),
                    Some(FileKind::Symlink) => Err(errno::ELOOP),
                    Some(_) => Err(errno::ENXIO),
                    None => state.oracle.run(act.client, &Op::Mknod { path: path.clone(), fifo: false, mode: 0o644 }),
                };
                match (right, outcome) {
                    (_, None) => true,
                    (Ok(_), Some(Ok(Reply::Stat(got)))) => state.oracle.find(path).is_ok_and(|ino| state.bind(ino, got.ino)),
                    (right, Some(got)) => right.is_ok() == got.is_ok() && right.err() == got.as_ref().err().copied(),
                }
            }
            What::Find { path, key, dir } => {
                let Ok(ino) = state.oracle.find(path) else { return false };
                let is_dir = state.oracle.attributes(ino).is_some_and(|a| a.kind == FileKind::Dir);
                state.held.insert(*key, (ino, is_dir));
                dir.is_none_or(|wanted| wanted == is_dir)
            }
            What::IsFound { path, key } => {
                let held = state.held.remove(key).map(|(ino, _)| ino);
                let has_names = |ino| state.oracle.attributes(ino).is_some_and(|a| a.kind != FileKind::Dir && a.nlink > 1);
                held.is_some_and(|ino| state.oracle.find(path) == Ok(ino) && has_names(ino))
            }
            What::LinkFound { to, key, outcome } => {
                let Some((ino, is_dir)) = state.held.remove(key) else { return false };
                let right = match state.oracle.link_found(ino, to) {
                    // Asked of a directory first, also if it has gone since.
                    Err(errno::ENOENT) if is_dir => Err(errno::EPERM),
                    right => right,
                };
                outcome.as_ref().is_none_or(|got| *got == right)
            }
            What::StatFound { key, stat } => {
                let Some((ino, _)) = state.held.remove(key) else { return false };
                match state.oracle.attributes(ino) {
                    Some(right) => state.is(&right, stat),
                    // It has lost its last name since it was found.
                    None => stat.nlink == 0 && state.bound.get(&ino).is_none_or(|real| *real == stat.ino),
                }
            }
            What::Listed { path, kind } => {
                let there = state.oracle.find(path).ok().and_then(|ino| state.oracle.attributes(ino));
                there.map(|t| t.kind) == *kind
            }
            What::Length { slot, len, wanted } => {
                let right = state.oracle.run(act.client, &Op::Fstat { slot: *slot });
                matches!(right, Ok(Reply::Stat(stat)) if stat.size.min(*wanted) == *len)
            }
            What::AtLeast { slot, len } => {
                let right = state.oracle.run(act.client, &Op::Fstat { slot: *slot });
                matches!(right, Ok(Reply::Stat(stat)) if stat.size >= *len)
            }
            What::AtMost { slot, len } => {
                let right = state.oracle.run(act.client, &Op::Fstat { slot: *slot });
                matches!(right, Ok(Reply::Stat(stat)) if stat.size <= *len)
            }
            What::Page { slot, offset, bytes, zeros } => {
                let read = Op::Read { slot: *slot, offset: *offset, len: bytes.len() as u32 };
                let Ok(Reply::Bytes(mut right)) = state.oracle.run(act.client, &read) else { return false };
                right.resize(bytes.len(), 0);
                let may_be_zero = |at: u64| zeros.iter().any(|range| range.contains(&at));
                let mut pairs = (*offset..).zip(right.iter().zip(bytes));
                pairs.all(|(at, (right, got))| right == got || *got == 0 && may_be_zero(at))
            }
            What::Loss => true,
        }
    }
}

impl Spec for Posix {
    type State = State;
    type Act = Act;

    fn apply(&self, state: &State, act: &Act) -> Vec<State> {
        let mut next = state.clone();
        if let What::Loss = act.what {
            let mut all = vec![next.clone()];
            if next.by == Some(act.node) {
                next.by = None;
                let past = std::mem::take(&mut next.past);
                all = std::iter::once(next.oracle.clone())
                    .chain(past.into_iter().rev())
                    .map(|o| State { oracle: o, ..next.clone() })
                    .collect();
            }
            return all;
        }
        if !self.fits(&mut next, act) {
            return vec![];
        }
        if self.losing {
            if next.by != Some(act.node) {
                // It was handed over, and so it is on the disks.
                next.by = Some(act.node);
                next.past.clear();
            }
            match &act.what {
                What::Run(Op::Fsync { .. }, Some(Ok(_))) => next.past.clear(),
                What::Run(Op::Write { .. } | Op::Truncate { .. } | Op::Fallocate { .. }, _) => {
                    next.past.push(state.oracle.clone())
                }
                _ => {}
            }
        }
        vec![next]
    }

    fn fingerprint(&self, state: &State, hasher: &mut DefaultHasher) {
        let numbers = state.oracle.fingerprint(hasher);
        // What has no name any more has no number here either; its own will do.
        let name = |ino: &u64| numbers.get(ino).map_or((1, *ino), |n| (0, *n));
        state.bound.iter().for_each(|(ino, real)| (name(ino), real).hash(hasher));
        state.held.iter().for_each(|(key, (ino, is_dir))| (key, name(ino), is_dir).hash(hasher));
        (state.past.len(), state.by).hash(hasher);
        state.past.iter().for_each(|past| drop(past.fingerprint(hasher)));
    }
}
