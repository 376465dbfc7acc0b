//! The ways to look, each with all that a node may keep for it from before: descriptors, a mapping, a directory.
//!
//! A look is one system call that may be answered from a cache, with what it needs to be made. What it finds is put into words
//! that are the same on all nodes.

use crate::changes::{AT, PAGE, SIZE};
use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tests::sys::{self, Directory, Mapping};

pub(crate) const LOOKS: [&str; 52] = [
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
    "sendfile:held",
    "sendfile:held-direct",
    "sendfile:held-stat",
    "sendfile:held-read",
    "sendfile:opened",
    "sendfile:opened-direct",
    "splice:held",
    "splice:held-stat",
    "splice:opened",
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
    "access:user",
    "open:user",
    "getxattr:held",
    "getxattr:path",
    "listxattr:held",
    "listxattr:path",
    "getacl:held",
    "getacl:path",
    "getacl-default:path",
    "inherit:made",
    "readlink:path",
    "lookup:absent",
    "lookup:present",
    "lookup:directory",
    "lookup:user",
    "mapped-before:load",
    "mapped-before:stat",
];

/// Looks after which a node has in its caches all that another change could make stale: attributes, pages, mapped pages, the
/// list of names, attributes of programs, access lists, and at the end, since they are believed for the shortest time, names
/// that are there and not.
pub(crate) const FILLING: [&str; 11] = [
    "stat:held",
    "read-all:held",
    "mapped-before:load",
    "list:held",
    "getxattr:held",
    "getacl:path",
    "stat:parent",
    "access:user",
    "stat:other-name",
    "lookup:directory",
    "lookup:absent",
];

/// Of a look that nothing is promised about, since the kernel asks nobody and uses the pages that it has, the one that asks
/// first; all others are themselves.
pub(crate) fn truth(look: &str) -> &str {
    match look {
        "mapped-before:load" => "mapped-before:stat",
        "sendfile:held" => "sendfile:held-stat",
        "splice:held" => "splice:held-stat",
        other => other,
    }
}

pub(crate) fn is_promised(look: &str) -> bool {
    truth(look) == look
}

/// Looks that change what others find.
pub(crate) fn is_quiet(look: &str) -> bool {
    look != "inherit:made"
}

/// Who has no rights but those that modes and lists give.
const USER: u32 = 1000;

/// Where looks at the end begin: before it, so that a shorter file shows, too.
const END: u64 = SIZE - 1000;
const BEYOND: usize = 40_000;
const ALL: usize = 2 * BEYOND;

/// What a look finds, in words: compared, and shown if it is stale.
pub(crate) type Found = String;

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

/// What a new file in the directory gets from it.
fn inherit(dir: &Path) -> io::Result<Found> {
    let made = dir.join("made");
    let file = OpenOptions::new().write(true).create_new(true).mode(0o666).open(&made)?;
    let mode = file.metadata()?.permissions().mode();
    let list = say(sys::get_xattr_of(&file, "system.posix_acl_access"), bytes);
    fs::remove_file(made)?;
    Ok(format!("mode {mode:o}, list {list}"))
}

/// A node's view of a directory, and what it holds open in it: opened by the first look that needs it, so before a change.
pub(crate) struct View {
    dir: PathBuf,
    plain: Option<File>,
    direct: Option<File>,
    directory: Option<Directory>,
    mapping: Option<Mapping>,
}

fn once<T>(held: &mut Option<T>, open: impl FnOnce() -> io::Result<T>) -> io::Result<&mut T> {
    if held.is_none() {
        *held = Some(open()?);
    }
    Ok(held.as_mut().expect("it was opened just now"))
}

impl View {
    pub(crate) fn new(dir: PathBuf) -> View {
        View { dir, plain: None, direct: None, directory: None, mapping: None }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Closes all that is held.
    pub(crate) fn close(&mut self) {
        *self = View::new(std::mem::take(&mut self.dir));
    }

    fn plain(&mut self) -> io::Result<&File> {
        once(&mut self.plain, || File::open(self.dir.join("f"))).map(|f| &*f)
    }

    fn direct(&mut self) -> io::Result<&File> {
        once(&mut self.direct, || sys::open(&self.dir.join("f"), false, libc::O_DIRECT)).map(|f| &*f)
    }

    fn directory(&mut self) -> io::Result<&mut Directory> {
        once(&mut self.directory, || Directory::open(&self.dir))
    }

    fn mapping(&mut self) -> io::Result<&Mapping> {
        self.plain()?;
        let plain = &self.plain;
        once(&mut self.mapping, || {
            let file = plain.as_ref().ok_or(io::ErrorKind::NotFound)?;
            Mapping::new(file, SIZE as usize, false)
        })
        .map(|m| &*m)
    }

    pub(crate) fn look(&mut self, what: &str) -> Found {
        let f = self.dir.join("f");
        let opened = |flags| sys::open(&f, false, flags);
        let metadata = |name: &str| fs::symlink_metadata(self.dir.join(name));
        match what {
            "read:held" => say(self.plain().and_then(|f| read(f, AT, PAGE)), bytes),
            "read:held-direct" => say(self.direct().and_then(|f| read(f, AT, PAGE)), bytes),
            "read:held-mapped" => say(self.plain().and_then(|f| read_mapped(f, AT, PAGE)), bytes),
            "read:opened" => say(opened(0).and_then(|f| read(&f, AT, PAGE)), bytes),
            "read:opened-direct" => say(opened(libc::O_DIRECT).and_then(|f| read(&f, AT, PAGE)), bytes),
            "read:opened-mapped" => say(opened(0).and_then(|f| read_mapped(&f, AT, PAGE)), bytes),
            "read-end:held" => say(self.plain().and_then(|f| read(f, END, BEYOND)), bytes),
            "read-end:held-direct" => say(self.direct().and_then(|f| read(f, END, BEYOND)), bytes),
            "read-end:held-mapped" => say(self.plain().and_then(|f| read_mapped(f, END, BEYOND)), bytes),
            "read-end:opened" => say(opened(0).and_then(|f| read(&f, END, BEYOND)), bytes),
            "read-end:opened-direct" => say(opened(libc::O_DIRECT).and_then(|f| read(&f, END, BEYOND)), bytes),
            "read-end:opened-mapped" => say(opened(0).and_then(|f| read_mapped(&f, END, BEYOND)), bytes),
            "read-all:held" => say(self.plain().and_then(|f| read(f, 0, ALL)), bytes),
            "read-all:held-direct" => say(self.direct().and_then(|f| read(f, 0, ALL)), bytes),
            "read-all:opened" => say(fs::read(&f), bytes),
            "read-all:opened-direct" => say(opened(libc::O_DIRECT).and_then(|f| read(&f, 0, ALL)), bytes),
            "sendfile:held" => say(self.plain().and_then(|f| sys::send_file(f, 0, ALL)), bytes),
            "sendfile:held-direct" => say(self.direct().and_then(|f| sys::send_file(f, 0, ALL)), bytes),
            "sendfile:held-stat" => say(self.plain().and_then(|f| f.metadata().and_then(|_| sys::send_file(f, 0, ALL))), bytes),
            "sendfile:held-read" => say(self.plain().and_then(|f| read(f, 0, 1).and_then(|_| sys::send_file(f, 0, ALL))), bytes),
            "sendfile:opened" => say(opened(0).and_then(|f| sys::send_file(&f, 0, ALL)), bytes),
            "sendfile:opened-direct" => say(opened(libc::O_DIRECT).and_then(|f| sys::send_file(&f, 0, ALL)), bytes),
            "splice:held" => say(self.plain().and_then(|f| sys::splice(f, 0, ALL)), bytes),
            "splice:held-stat" => say(self.plain().and_then(|f| f.metadata().and_then(|_| sys::splice(f, 0, ALL))), bytes),
            "splice:opened" => say(opened(0).and_then(|f| sys::splice(&f, 0, ALL)), bytes),
            "stat:held" => say(self.plain().and_then(File::metadata), stat),
            "stat:path" => say(metadata("f"), stat),
            "stat:other-name" => say(metadata("f2"), stat),
            "stat:parent" => say(metadata("."), stat),
            "seek-end:held" => say(self.plain().and_then(|f| sys::seek(f, 0, libc::SEEK_END)), |n| n.to_string()),
            "seek-hole:held" => say(self.plain().and_then(|f| sys::seek(f, 0, libc::SEEK_HOLE)), |n| n.to_string()),
            "seek-hole:opened" => say(opened(0).and_then(|f| sys::seek(&f, 0, libc::SEEK_HOLE)), |n| n.to_string()),
            "list:held" => names(self.directory().and_then(Directory::names)),
            "list:opened" => names(Directory::open(&self.dir).and_then(|mut d| d.names())),
            // Root may read and write everything, but execute only what somebody may.
            "access:path" => say(sys::access(&f, libc::X_OK), |()| "allowed".into()),
            // From the directory on, so that it does not matter where the file system is mounted.
            "access:user" => self.as_user(|d| d.access("f", libc::X_OK)),
            "open:user" => self.as_user(|d| d.open_file("f", libc::O_RDWR).map(drop)),
            "lookup:user" => self.as_user(|d| d.access("absent", libc::R_OK)),
            "getxattr:held" => say(self.plain().and_then(|f| sys::get_xattr_of(f, "user.x")), bytes),
            "getxattr:path" => say(sys::get_xattr(&f, "user.x"), bytes),
            "listxattr:held" => say(self.plain().and_then(sys::list_xattr_of), |l| l.join(" ")),
            "listxattr:path" => say(sys::list_xattr(&f), |l| l.join(" ")),
            "getacl:held" => say(self.plain().and_then(|f| sys::get_xattr_of(f, "system.posix_acl_access")), bytes),
            "getacl:path" => say(sys::get_xattr(&f, "system.posix_acl_access"), bytes),
            "getacl-default:path" => say(sys::get_xattr(&self.dir, "system.posix_acl_default"), bytes),
            "inherit:made" => say(inherit(&self.dir), |found| found),
            "readlink:path" => say(fs::read_link(self.dir.join("absent")), |t| t.display().to_string()),
            "lookup:absent" => say(metadata("absent"), |m| m.ino().to_string()),
            "lookup:present" => say(metadata("f"), |m| m.ino().to_string()),
            "lookup:directory" => say(metadata("d"), |m| m.ino().to_string()),
            "mapped-before:load" => say(self.mapping().and_then(|m| m.load(AT as usize, PAGE)), bytes),
            "mapped-before:stat" => {
                let asked = self.plain().and_then(File::metadata);
                say(asked.and_then(|_| self.mapping()?.load(AT as usize, PAGE)), bytes)
            }
            other => unreachable!("{other} is not a look"),
        }
    }

    fn as_user(&mut self, what: impl FnOnce(&Directory) -> io::Result<()>) -> Found {
        say(self.directory().and_then(|d| sys::as_user(USER, || what(d))), |()| "allowed".into())
    }
}
