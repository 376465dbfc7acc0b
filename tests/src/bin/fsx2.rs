//! One file, changed and read through several mounts by turns, compared with a model in memory: `fsx2 DIR DIR… [--seed S]`,
//! directories in which the same tree is to be seen. What fsx is for one mount, with the operations alternating at random
//! between nodes and between all ways to get at a file's bytes: through the page cache, past it (O_DIRECT), by mappings.
//!
//! One seed decides everything; a failure names it, the number of the operation and those before it, and `--seed S --ops N`
//! runs into it again.

use clap::Parser;
use cluster::sim::Rng;
use nix::libc;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tests::FOUND;
use tests::op::pattern;
use tests::sys::{self, Mapping};

/// Compares one file, changed through several mounts, with a model.
#[derive(Parser)]
#[command(after_help = tests::ENDS)]
struct Args {
    /// Directories in which the same tree is to be seen.
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
    /// Decides everything.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Operations.
    #[arg(long, default_value_t = 200_000)]
    ops: u64,
    /// Longest size of the file.
    #[arg(long, default_value_t = 300_000)]
    size: usize,
    /// A planted bug: every hundredth operation is left out of the model. It must be found.
    #[arg(long)]
    forget: bool,
}

/// Operations that a failure shows.
const SHOWN: usize = 25;

struct Chance(Rng);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0.below(end.max(1) as u64) as usize
    }
}

/// Why it ended before its time.
enum Wrong {
    /// Something is not as the model says.
    Difference(String),
    /// A call failed.
    Failed(String),
}

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Wrong {
        Wrong::Failed(error.to_string())
    }
}

impl Wrong {
    /// The same, with what came before.
    fn after(self, what: &str) -> Wrong {
        match self {
            Wrong::Difference(why) => Wrong::Difference(format!("{what}\n{why}")),
            Wrong::Failed(why) => Wrong::Failed(format!("{what}\n{why}")),
        }
    }
}

/// What one node holds open.
struct Node {
    path: PathBuf,
    plain: File,
    direct: File,
    append: File,
    /// Read-only, so that it goes through the page cache.
    cached: File,
    mapping: Mapping,
}

impl Node {
    fn open(dir: &Path, name: &str, size: usize) -> io::Result<Node> {
        let path = dir.join(name);
        let plain = sys::open(&path, true, 0)?;
        let cached = File::open(&path)?;
        Ok(Node {
            direct: sys::open(&path, true, libc::O_DIRECT)?,
            append: OpenOptions::new().append(true).open(&path)?,
            mapping: Mapping::new(&cached, size, false)?,
            cached,
            plain,
            path,
        })
    }
}

#[derive(Clone, Copy, Debug)]
enum How {
    Cached,
    Direct,
    Written,
    Opened,
    Mapped,
    MappedBefore,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Read(How, usize, usize),
    Write(How, usize, usize),
    Append(usize),
    Truncate(usize),
    TruncateByOpening,
    Punch(usize, usize),
    Zero(usize, usize),
    Allocate(usize, usize),
    Copy(usize, usize, usize),
    Size,
    Sync,
    Reopen,
}

fn choose(chance: &mut Chance, model: &[u8], max: usize) -> Op {
    let at = chance.below(max);
    // Short, long, and aligned ones.
    let len = match chance.below(4) {
        0 => 1 + chance.below(100),
        1 => 4096 * (1 + chance.below(4)),
        _ => 1 + chance.below(40_000),
    };
    let at = if chance.below(3) == 0 { at / 4096 * 4096 } else { at };
    let len = len.min(max - at).max(1);
    let within = chance.below(model.len());
    let reads = [How::Cached, How::Cached, How::Direct, How::Written, How::Opened, How::Mapped, How::MappedBefore];
    let writes = [How::Written, How::Written, How::Direct, How::Mapped];
    match chance.below(100) {
        0..40 => Op::Read(reads[chance.below(reads.len())], within, len),
        40..68 => {
            let how = writes[chance.below(writes.len())];
            // A mapping does not make a file longer.
            let (at, len) = if matches!(how, How::Mapped) { (within, len.min(model.len() - within)) } else { (at, len) };
            Op::Write(how, at, len)
        }
        68..73 if model.len() < max => Op::Append(len.min(max - model.len())),
        68..78 => Op::Truncate(at),
        78 => Op::TruncateByOpening,
        79..83 => Op::Punch(at, len),
        83..85 => Op::Zero(at, len),
        85..87 => Op::Allocate(at, len),
        87..91 => Op::Copy(within, at, len),
        91..96 => Op::Size,
        96..98 => Op::Sync,
        _ => Op::Reopen,
    }
}

fn expect(what: &str, got: &[u8], right: &[u8]) -> Result<(), Wrong> {
    if got.len() != right.len() {
        return Err(Wrong::Difference(format!("{what} returned {} bytes; right are {}", got.len(), right.len())));
    }
    match got.iter().zip(right).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => {
            let wrong = got.iter().zip(right).filter(|(a, b)| a != b).count();
            let (byte, instead) = (got[at], right[at]);
            Err(Wrong::Difference(format!(
                "{what}: {wrong} wrong bytes, the first at +{at}: {byte:#04x} instead of {instead:#04x}"
            )))
        }
    }
}

fn read_fully(file: &File, at: usize, len: usize) -> io::Result<Vec<u8>> {
    let (mut bytes, mut done) = (vec![0; len], 0);
    while done < len {
        match file.read_at(&mut bytes[done..], (at + done) as u64)? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Makes the model as long as `end` at least.
fn grow(model: &mut Vec<u8>, end: usize) {
    if model.len() < end {
        model.resize(end, 0);
    }
}

fn run(node: &mut Node, op: Op, fill: u32, model: &mut Vec<u8>, max: usize) -> Result<(), Wrong> {
    match op {
        Op::Read(how, at, len) => {
            let right = &model[at.min(model.len())..(at + len).min(model.len())];
            let got = match how {
                How::Cached => read_fully(&node.cached, at, len),
                How::Direct => read_fully(&node.direct, at, len),
                How::Written => read_fully(&node.plain, at, len),
                How::Opened => File::open(&node.path).and_then(|f| read_fully(&f, at, len)),
                How::Mapped => Mapping::new(&node.cached, at + len, false)
                    // A mapping shows what is true when the file was last asked about.
                    .and_then(|m| node.cached.metadata().map(|_| m))
                    .and_then(|m| m.load(at, right.len())),
                How::MappedBefore => node.cached.metadata().and_then(|_| node.mapping.load(at, right.len())),
            };
            expect("it", &got?, right)
        }
        Op::Write(how, at, len) => {
            let bytes = pattern(fill, 0, len);
            match how {
                How::Direct => node.direct.write_all_at(&bytes, at as u64),
                How::Mapped => (|| {
                    node.plain.metadata()?;
                    let mut mapping = Mapping::new(&node.plain, at + len, true)?;
                    mapping.store(at, &bytes)?;
                    mapping.sync()
                })(),
                _ => node.plain.write_all_at(&bytes, at as u64),
            }?;
            grow(model, at + len);
            model[at..at + len].copy_from_slice(&bytes);
            Ok(())
        }
        Op::Append(len) => {
            let bytes = pattern(fill, 0, len);
            node.append.write_all(&bytes)?;
            model.extend_from_slice(&bytes);
            Ok(())
        }
        Op::Truncate(size) => {
            node.plain.set_len(size as u64)?;
            model.resize(size, 0);
            Ok(())
        }
        Op::TruncateByOpening => {
            OpenOptions::new().write(true).truncate(true).open(&node.path)?;
            model.clear();
            Ok(())
        }
        Op::Punch(at, len) | Op::Zero(at, len) | Op::Allocate(at, len) => {
            let mode = match op {
                Op::Punch(..) => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                Op::Zero(..) => libc::FALLOC_FL_ZERO_RANGE,
                _ => 0,
            };
            sys::fallocate(&node.plain, mode, at as u64, len as u64)?;
            if !matches!(op, Op::Punch(..)) {
                grow(model, at + len);
            }
            if !matches!(op, Op::Allocate(..)) {
                let (start, end) = (at.min(model.len()), (at + len).min(model.len()));
                model[start..end].fill(0);
            }
            Ok(())
        }
        Op::Copy(from, to, len) => {
            let len = len.min(model.len().saturating_sub(from)).min(max - to);
            // Overlapping ones are refused by the kernel.
            let len = if from <= to { len.min(to - from) } else { len.min(from - to) };
            // The kernel copies no more than it believes to be there, without asking.
            node.plain.metadata()?;
            let mut done = 0;
            while done < len {
                let n = sys::copy_range(&node.plain, (from + done) as u64, &node.plain, (to + done) as u64, len - done);
                match n? {
                    0 => return Err(Wrong::Difference(format!("it ended after {done} of {len} bytes"))),
                    n => done += n,
                }
            }
            if len > 0 {
                grow(model, to + len);
                model.copy_within(from..from + len, to);
            }
            Ok(())
        }
        Op::Size => {
            let size = node.cached.metadata()?.len();
            if size == model.len() as u64 {
                return Ok(());
            }
            Err(Wrong::Difference(format!("the size is {size}; right is {}", model.len())))
        }
        Op::Sync => Ok(node.plain.sync_all()?),
        Op::Reopen => {
            let (dir, name) = (node.path.parent().unwrap_or(Path::new("/")), node.path.file_name().unwrap_or_default());
            *node = Node::open(dir, &name.to_string_lossy(), max)?;
            Ok(())
        }
    }
}

fn whole(args: &Args, chance: &mut Chance) -> Result<(), Wrong> {
    let name = format!("fsx2-{}", std::process::id());
    let failed = |what: &str, dir: &Path, e| Wrong::Failed(format!("cannot {what} in {}: {e}", dir.display()));
    File::create(args.dirs[0].join(&name)).map_err(|e| failed("make a file", &args.dirs[0], e))?;
    let open = |dir: &PathBuf| Node::open(dir, &name, args.size).map_err(|e| failed("open it", dir, e));
    let mut nodes: Vec<Node> = args.dirs.iter().map(open).collect::<Result<_, _>>()?;
    let mut model = Vec::new();
    let mut last = VecDeque::new();
    for number in 0..args.ops {
        let at = chance.below(nodes.len());
        let op = choose(chance, &model, args.size);
        last.push_back(format!("{number}: node {at}: {op:?}, of {} bytes", model.len()));
        if last.len() > SHOWN {
            last.pop_front();
        }
        let before = (args.forget && number % 100 == 99).then(|| model.clone());
        run(&mut nodes[at], op, number as u32, &mut model, args.size).map_err(|why| {
            let shown: Vec<String> = last.iter().cloned().collect();
            why.after(&shown.join("\n"))
        })?;
        if let Some(before) = before {
            model = before;
        }
    }
    for node in &nodes {
        let bytes = std::fs::read(&node.path)?;
        expect("reading all of it at the end", &bytes, &model)?;
    }
    let _ = std::fs::remove_file(args.dirs[0].join(&name));
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut chance = Chance(Rng::new(args.seed));
    match whole(&args, &mut chance) {
        Ok(()) => {
            println!("{} operations through {} mounts, seed {}: no difference", args.ops, args.dirs.len(), args.seed);
            ExitCode::SUCCESS
        }
        Err(wrong) => {
            let (why, end) = match wrong {
                Wrong::Difference(why) => (why, ExitCode::from(FOUND)),
                Wrong::Failed(why) => (why, ExitCode::FAILURE),
            };
            eprintln!("fsx2: seed {}:\n{why}", args.seed);
            end
        }
    }
}
