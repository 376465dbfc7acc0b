//! Looks for stale results: `coherence DIR DIR [--rounds N]`, two directories in which the same tree is to be seen through
//! mounts of two nodes.
//!
//! Each *cell* is one change (made on one node) and one look at what it changed (from the other, at once afterwards). A look
//! that does not find what the changing node itself finds is stale. Before each change the looking node has everything in
//! its caches: it has just looked at all of it, through the descriptors that it holds and by path.
//!
//! The nodes change roles with every round. Cells in which the change makes no difference to the look are left out, so every
//! cell that counts can fail. `--deaf` proves it: the looks are then answered from before the change, and every cell must
//! be found stale.
//!
//! Not demanded: that a mapping made *before* the change shows it (see `docs/semantics.md`); such looks are counted apart.

use clap::Parser;
use nix::libc;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tests::op::pattern;
use tests::sys::{self, Directory, Mapping};

/// Looks for stale results between two mounts.
#[derive(Parser)]
struct Args {
    /// A directory, through one node's mount.
    here: PathBuf,
    /// The same directory, through another's.
    there: PathBuf,
    /// Rounds for each cell.
    #[arg(long, default_value_t = 1000)]
    rounds: u32,
    /// Only cells whose name (CHANGE:LOOK) contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Answers looks from before the change: every cell must be found stale.
    #[arg(long)]
    deaf: bool,
}

/// Bytes of the file before a change.
const SIZE: u64 = 20_000;
/// Where it is changed in place; within one page, so that a look sees old and new bytes beside each other.
const PLACE: u64 = 5000;
const CHANGED: usize = 100;

const CHANGES: [&str; 27] = [
    "write",
    "write-same-mtime",
    "write-direct",
    "write-mapped",
    "append",
    "write-beyond",
    "truncate-down",
    "truncate-up",
    "truncate-open",
    "allocate",
    "punch",
    "zero-range",
    "copy-range",
    "rename",
    "rename-over",
    "exchange",
    "unlink",
    "create",
    "link",
    "symlink",
    "mkdir",
    "rmdir",
    "chmod",
    "chown",
    "utimes",
    "setxattr",
    "removexattr",
];

const LOOKS: [&str; 36] = [
    "read:held",
    "read:held-direct",
    "read:held-mapped",
    "read:opened",
    "read:opened-direct",
    "read:opened-mapped",
    "read-end:held",
    "read-end:held-direct",
    "read-end:held-mapped",
    "read-end:opened",
    "read-end:opened-direct",
    "read-end:opened-mapped",
    "read-all:held",
    "read-all:held-direct",
    "read-all:opened",
    "read-all:opened-direct",
    "stat:held",
    "stat:path",
    "stat:other-name",
    "stat:parent",
    "seek-end:held",
    "seek-hole:held",
    "seek-hole:opened",
    "list:held",
    "list:opened",
    "access:path",
    "getxattr:held",
    "getxattr:path",
    "listxattr:held",
    "listxattr:path",
    "readlink:path",
    "lookup:absent",
    "lookup:present",
    "lookup:directory",
    "mapped-before:load",
    "mapped-before:stat",
];

/// Looks that nothing is promised about.
fn is_promised(look: &str) -> bool {
    !look.starts_with("mapped-before:load")
}

/// What a look finds, in words: compared, and shown if it is stale.
type Found = String;

fn say<T>(result: io::Result<T>, found: impl Fn(T) -> Found) -> Found {
    result.map_or_else(|e| format!("error {}", e.raw_os_error().unwrap_or(-1)), found)
}

fn bytes(b: Vec<u8>) -> Found {
    let zeros = b.iter().filter(|x| **x == 0).count();
    format!("{} bytes, {zeros} zeros, {:016x}", b.len(), tests::op::hash(&b))
}

fn read(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; len];
    let n = file.read_at(&mut buffer, offset)?;
    buffer.truncate(n);
    Ok(buffer)
}

/// The bytes from `offset` to the end, by a mapping that is made now.
fn read_mapped(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let size = file.metadata()?.len();
    let end = size.min(offset + len as u64);
    if end <= offset {
        return Ok(Vec::new());
    }
    Mapping::new(file, end as usize, false)?.load(offset as usize, (end - offset) as usize)
}

fn stat(m: fs::Metadata) -> Found {
    let (mtime, ctime) = ((m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec()));
    let (mode, nlink, size) = (m.mode(), m.nlink(), m.size());
    // A directory's number of links is not to be relied on.
    let nlink = if m.is_dir() { 0 } else { nlink };
    format!("ino {} mode {mode:o} nlink {nlink} {}:{} size {size} mtime {mtime:?} ctime {ctime:?}", m.ino(), m.uid(), m.gid())
}

fn names(result: io::Result<Vec<Vec<u8>>>) -> Found {
    say(result, |mut names| {
        names.sort();
        names.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect::<Vec<_>>().join(" ")
    })
}

/// What a node holds open from before a change.
struct Held {
    plain: File,
    direct: File,
    directory: Directory,
    mapping: Mapping,
}

impl Held {
    fn new(dir: &Path) -> io::Result<Held> {
        let plain = File::open(dir.join("f"))?;
        Ok(Held {
            direct: sys::open(&dir.join("f"), false, libc::O_DIRECT)?,
            directory: Directory::open(dir)?,
            mapping: Mapping::new(&plain, SIZE as usize, false)?,
            plain,
        })
    }
}

const AT: u64 = PLACE / 4096 * 4096;
const PAGE: usize = 4096;
/// Where looks at the end begin: before it, so that a shorter file shows, too.
const END: u64 = SIZE - 1000;
const BEYOND: usize = 40_000;

fn look(what: &str, dir: &Path, held: &mut Held) -> Found {
    let f = dir.join("f");
    let opened = |flags| sys::open(&f, false, flags);
    match what {
        "read:held" => say(read(&held.plain, AT, PAGE), bytes),
        "read:held-direct" => say(read(&held.direct, AT, PAGE), bytes),
        "read:held-mapped" => say(read_mapped(&held.plain, AT, PAGE), bytes),
        "read:opened" => say(opened(0).and_then(|f| read(&f, AT, PAGE)), bytes),
        "read:opened-direct" => say(opened(libc::O_DIRECT).and_then(|f| read(&f, AT, PAGE)), bytes),
        "read:opened-mapped" => say(opened(0).and_then(|f| read_mapped(&f, AT, PAGE)), bytes),
        "read-end:held" => say(read(&held.plain, END, BEYOND), bytes),
        "read-end:held-direct" => say(read(&held.direct, END, BEYOND), bytes),
        "read-end:held-mapped" => say(read_mapped(&held.plain, END, BEYOND), bytes),
        "read-end:opened" => say(opened(0).and_then(|f| read(&f, END, BEYOND)), bytes),
        "read-end:opened-direct" => say(opened(libc::O_DIRECT).and_then(|f| read(&f, END, BEYOND)), bytes),
        "read-end:opened-mapped" => say(opened(0).and_then(|f| read_mapped(&f, END, BEYOND)), bytes),
        "read-all:held" => say(read(&held.plain, 0, 2 * BEYOND), bytes),
        "read-all:held-direct" => say(read(&held.direct, 0, 2 * BEYOND), bytes),
        "read-all:opened" => say(fs::read(&f), bytes),
        "read-all:opened-direct" => say(opened(libc::O_DIRECT).and_then(|f| read(&f, 0, 2 * BEYOND)), bytes),
        "stat:held" => say(held.plain.metadata(), stat),
        "stat:path" => say(fs::symlink_metadata(&f), stat),
        "stat:other-name" => say(fs::symlink_metadata(dir.join("f2")), stat),
        "stat:parent" => say(fs::symlink_metadata(dir), stat),
        "seek-end:held" => say(sys::seek(&held.plain, 0, libc::SEEK_END), |n| n.to_string()),
        "seek-hole:held" => say(sys::seek(&held.plain, 0, libc::SEEK_HOLE), |n| n.to_string()),
        "seek-hole:opened" => say(opened(0).and_then(|f| sys::seek(&f, 0, libc::SEEK_HOLE)), |n| n.to_string()),
        "list:held" => names(held.directory.names()),
        "list:opened" => names(Directory::open(dir).and_then(|mut d| d.names())),
        // Root may read and write everything, but execute only what somebody may.
        "access:path" => say(sys::access(&f, libc::X_OK), |()| "allowed".into()),
        "getxattr:held" => say(sys::get_xattr_of(&held.plain, "user.x"), bytes),
        "getxattr:path" => say(sys::get_xattr(&f, "user.x"), bytes),
        "listxattr:held" => say(sys::list_xattr_of(&held.plain), |l| l.join(" ")),
        "listxattr:path" => say(sys::list_xattr(&f), |l| l.join(" ")),
        "readlink:path" => say(fs::read_link(dir.join("absent")), |t| t.display().to_string()),
        "lookup:absent" => say(fs::symlink_metadata(dir.join("absent")), |m| m.ino().to_string()),
        "lookup:present" => say(fs::symlink_metadata(&f), |m| m.ino().to_string()),
        "lookup:directory" => say(fs::symlink_metadata(dir.join("d")), |m| m.ino().to_string()),
        "mapped-before:load" => say(held.mapping.load(AT as usize, PAGE), bytes),
        "mapped-before:stat" => say(held.plain.metadata().and_then(|_| held.mapping.load(AT as usize, PAGE)), bytes),
        other => unreachable!("{other} is not a look"),
    }
}

fn change(what: &str, dir: &Path, round: u32) -> io::Result<()> {
    let (f, absent) = (dir.join("f"), dir.join("absent"));
    let new = pattern(round.wrapping_mul(2) + 1, 0, CHANGED);
    let writable = |flags| sys::open(&f, true, flags);
    match what {
        "write" => writable(0)?.write_all_at(&new, PLACE),
        "write-same-mtime" => {
            let mtime = fs::metadata(&f)?;
            writable(0)?.write_all_at(&new, PLACE)?;
            sys::set_mtime(&f, mtime.mtime() * 1_000_000_000 + mtime.mtime_nsec())
        }
        "write-direct" => writable(libc::O_DIRECT)?.write_all_at(&pattern(round * 2 + 1, 0, PAGE), AT),
        "write-mapped" => {
            let file = writable(0)?;
            let mut mapping = Mapping::new(&file, SIZE as usize, true)?;
            mapping.store(PLACE as usize, &new)?;
            mapping.sync()
        }
        "append" => OpenOptions::new().append(true).open(&f)?.write_all(&new),
        "write-beyond" => writable(0)?.write_all_at(&new, SIZE + 9000),
        "truncate-down" => writable(0)?.set_len(PLACE),
        "truncate-up" => writable(0)?.set_len(SIZE + 10_000),
        "truncate-open" => OpenOptions::new().write(true).truncate(true).open(&f).map(drop),
        "allocate" => sys::fallocate(&writable(0)?, 0, 0, SIZE + 5000),
        "punch" => sys::fallocate(&writable(0)?, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, AT, PAGE as u64),
        "zero-range" => sys::fallocate(&writable(0)?, libc::FALLOC_FL_ZERO_RANGE, PLACE, 3000),
        "copy-range" => sys::copy_range(&File::open(dir.join("g"))?, 100, &writable(0)?, PLACE, CHANGED).map(drop),
        "rename" => fs::rename(&f, &absent),
        "rename-over" => fs::rename(dir.join("g"), &f),
        "exchange" => {
            let (a, b) = (sys::c_path(&f)?, sys::c_path(&dir.join("g"))?);
            let at = libc::AT_FDCWD;
            // SAFETY: both paths are C strings that outlive the call.
            let done = unsafe { libc::renameat2(at, a.as_ptr(), at, b.as_ptr(), libc::RENAME_EXCHANGE) };
            if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }
        "unlink" => fs::remove_file(&f),
        "create" => OpenOptions::new().write(true).create_new(true).mode(0o600).open(&absent).map(drop),
        "link" => fs::hard_link(&f, &absent),
        "symlink" => symlink("f", &absent),
        "mkdir" => fs::create_dir(&absent),
        "rmdir" => fs::remove_dir(dir.join("d")),
        "chmod" => fs::set_permissions(&f, fs::Permissions::from_mode(0o755)),
        "chown" => std::os::unix::fs::chown(&f, Some(100 + round % 50), Some(7)),
        "utimes" => sys::set_mtime(&f, 1_000_000_000_000_000_000 + i64::from(round)),
        "setxattr" => sys::set_xattr(&f, "user.x", &new),
        "removexattr" => sys::remove_xattr(&f, "user.x"),
        other => unreachable!("{other} is not a change"),
    }
}

/// Brings everything back to how it is before a change, with contents of this round. Inodes stay where they can, so that
/// caches have something to be wrong about.
fn reset(dir: &Path, round: u32) -> io::Result<()> {
    let absent = dir.join("absent");
    match fs::symlink_metadata(&absent) {
        Ok(m) if m.is_dir() => fs::remove_dir(&absent)?,
        Ok(_) => fs::remove_file(&absent)?,
        Err(_) => {}
    }
    if fs::symlink_metadata(dir.join("d")).is_err() {
        fs::create_dir(dir.join("d"))?;
    }
    let (f, g) = (dir.join("f"), dir.join("g"));
    let write = |path: &Path, fill: u32, size: u64| {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(size)?;
        file.write_all_at(&pattern(fill, 0, size as usize), 0)
    };
    write(&g, round.wrapping_mul(2) + 1_000_000, 3000)?;
    write(&f, round.wrapping_mul(2), SIZE)?;
    if fs::metadata(dir.join("f2")).map(|m| m.ino()).ok() != Some(fs::metadata(&f)?.ino()) {
        let _ = fs::remove_file(dir.join("f2"));
        fs::hard_link(&f, dir.join("f2"))?;
    }
    fs::set_permissions(&f, fs::Permissions::from_mode(0o644))?;
    std::os::unix::fs::chown(&f, Some(0), Some(0))?;
    sys::set_xattr(&f, "user.x", b"as before")
}

/// One cell's tally.
#[derive(Default)]
struct Cell {
    rounds: u32,
    stale: u32,
    example: String,
}

struct Matrix {
    /// The two nodes' views of one directory.
    dirs: [PathBuf; 2],
    round: u32,
    deaf: bool,
}

impl Matrix {
    /// One round of one cell; `None` if the change makes no difference to the look.
    fn play(&mut self, what: &str, how: &str, cell: &mut Cell) -> io::Result<Option<()>> {
        self.round += 1;
        let [a, b] = [&self.dirs[self.round as usize % 2], &self.dirs[(self.round as usize + 1) % 2]];
        // Whoever resets is not always who changes, so that the token comes from either side.
        reset(if self.round % 4 < 2 { a } else { b }, self.round)?;
        let (mut near, mut far) = (Held::new(a)?, Held::new(b)?);
        let before: BTreeMap<&str, Found> = LOOKS.iter().map(|l| (*l, look(l, b, &mut far))).collect();
        for l in LOOKS {
            let here = look(l, a, &mut near);
            if here != before[l] && is_promised(l) {
                return Err(io::Error::other(format!("before {what}, {l}: {here} and {}", before[l])));
            }
        }
        change(what, a, self.round)?;
        let found = if self.deaf { before[how].clone() } else { look(how, b, &mut far) };
        let right = look(how, a, &mut near);
        if right == before[how] && found == right {
            return Ok(None);
        }
        cell.rounds += 1;
        if found != right {
            cell.stale += 1;
            let old = if found == before[how] { " (as before the change)" } else { "" };
            cell.example = format!("found {found}{old}; right is {right}");
        }
        Ok(Some(()))
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let name = format!("coherence-{}", std::process::id());
    if let Err(error) = fs::create_dir(args.here.join(&name)) {
        eprintln!("coherence: cannot make a directory in {}: {error}", args.here.display());
        return ExitCode::from(2);
    }
    let mut matrix = Matrix { dirs: [args.here.join(&name), args.there.join(&name)], round: 0, deaf: args.deaf };
    let (mut cells, mut stale, mut rounds, mut loose) = (0, 0, 0u64, Vec::new());
    for what in CHANGES {
        for how in LOOKS {
            if !format!("{what}:{how}").contains(&args.only) {
                continue;
            }
            let mut cell = Cell::default();
            for round in 0..args.rounds {
                match matrix.play(what, how, &mut cell) {
                    Ok(Some(())) => {}
                    // Which node changes makes no difference to whether the change shows: two rounds tell.
                    Ok(None) if round >= 1 && cell.rounds == 0 => break,
                    Ok(None) => {}
                    Err(error) => {
                        eprintln!("coherence: {what}:{how}, round {round}: {error}");
                        return ExitCode::FAILURE;
                    }
                }
            }
            if cell.rounds == 0 {
                continue;
            }
            cells += 1;
            rounds += u64::from(cell.rounds);
            let line = format!("{what}:{how}: {} of {} rounds stale, e.g. {}", cell.stale, cell.rounds, cell.example);
            match cell.stale {
                0 => {}
                _ if is_promised(how) => {
                    stale += 1;
                    println!("{line}");
                }
                _ => loose.push(line),
            }
        }
    }
    if !loose.is_empty() {
        println!("not promised, and seen:\n{}", loose.join("\n"));
    }
    println!("{stale} stale of {cells} cells, {rounds} rounds");
    let _ = fs::remove_dir_all(args.here.join(&name));
    let good = if args.deaf { stale > 0 && stale >= cells - loose.len() } else { stale == 0 && cells > 0 };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
