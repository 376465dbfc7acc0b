//! What the matrix changes, and how that is undone.
//!
//! Invariants: after `undo` everything is as `set_up` made it, but for contents, times and values, which differ with every turn so
//! that whatever is from before a change can be told. Inodes stay, so that caches have something to be wrong about.

use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::Path;
use tests::op::{Acl, pattern};
use tests::sys::{self, Mapping};

/// Bytes of the file before a change.
pub(crate) const SIZE: u64 = 20_000;
/// Where it is changed in place; within one page, so that a look sees old and new bytes beside each other.
const PLACE: u64 = 5000;
/// The beginning of that page, and its length.
pub(crate) const AT: u64 = PLACE / PAGE as u64 * PAGE as u64;
pub(crate) const PAGE: usize = 4096;
const CHANGED: usize = 100;

pub(crate) const CHANGES: [&str; 30] = [
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
    "setacl",
    "removeacl",
    "setacl-default",
];

/// Whether it changes the directory, so that it has to wait until no kernel believes the names in it any more.
pub(crate) fn is_of_directory(what: &str) -> bool {
    let names = ["rename", "rename-over", "exchange", "unlink", "create", "link", "symlink", "mkdir", "rmdir"];
    what == "setacl-default" || names.contains(&what)
}

/// A list that lets `looks::USER` do all.
fn list(group: u16) -> Vec<u8> {
    Acl { owner: 6, named: Some((7, 7)), group, other: 4 }.encode()
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// The bytes of all of the file for a turn.
fn contents(turn: u32) -> Vec<u8> {
    pattern(turn.wrapping_mul(2), 0, SIZE as usize)
}

/// A file with two names, another one, and a directory.
pub(crate) fn set_up(dir: &Path) -> io::Result<()> {
    fs::create_dir(dir)?;
    // Whatever the umask: others come in, and look.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    fs::write(dir.join("f"), contents(0))?;
    fs::set_permissions(dir.join("f"), fs::Permissions::from_mode(0o644))?;
    fs::hard_link(dir.join("f"), dir.join("f2"))?;
    fs::write(dir.join("g"), pattern(1_000_000, 0, 3000))?;
    fs::create_dir(dir.join("d"))?;
    sys::set_xattr(&dir.join("f"), "user.x", b"as before")
}

/// What must be there before this change, and before no other.
pub(crate) fn prepare(what: &str, dir: &Path) -> io::Result<()> {
    if what == "removeacl" { sys::set_xattr(&dir.join("f"), ACCESS, &list(4)) } else { Ok(()) }
}

pub(crate) fn change(what: &str, dir: &Path, turn: u32) -> io::Result<()> {
    let (f, g, absent) = (dir.join("f"), dir.join("g"), dir.join("absent"));
    let new = pattern(turn.wrapping_mul(2) + 1, 0, CHANGED);
    let writable = |flags| sys::open(&f, true, flags);
    match what {
        "write" => writable(0)?.write_all_at(&new, PLACE),
        "write-same-mtime" => {
            let mtime = fs::metadata(&f)?;
            writable(0)?.write_all_at(&new, PLACE)?;
            sys::set_mtime(&f, mtime.mtime() * 1_000_000_000 + mtime.mtime_nsec())
        }
        "write-direct" => writable(libc::O_DIRECT)?.write_all_at(&pattern(turn.wrapping_mul(2) + 1, 0, PAGE), AT),
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
        "copy-range" => sys::copy_range(&File::open(g)?, 100, &writable(0)?, PLACE, CHANGED).map(drop),
        "rename" => fs::rename(&f, &absent),
        "rename-over" => fs::rename(&g, &f),
        "exchange" => sys::rename(&f, &g, libc::RENAME_EXCHANGE),
        "unlink" => fs::remove_file(&f),
        "create" => OpenOptions::new().write(true).create_new(true).mode(0o600).open(&absent).map(drop),
        "link" => fs::hard_link(&f, &absent),
        "symlink" => symlink("f", &absent),
        "mkdir" => fs::create_dir(&absent),
        "rmdir" => fs::remove_dir(dir.join("d")),
        "chmod" => fs::set_permissions(&f, fs::Permissions::from_mode(0o755)),
        "chown" => chown(&f, Some(100 + turn % 50), Some(7)),
        "utimes" => sys::set_mtime(&f, 1_000_000_000_000_000_000 + i64::from(turn)),
        "setxattr" => sys::set_xattr(&f, "user.x", &new),
        "removexattr" => sys::remove_xattr(&f, "user.x"),
        "setacl" => sys::set_xattr(&f, ACCESS, &list(4)),
        "removeacl" => sys::remove_xattr(&f, ACCESS),
        "setacl-default" => sys::set_xattr(dir, DEFAULT, &list(5)),
        other => unreachable!("{other} is not a change"),
    }
}

pub(crate) fn undo(what: &str, dir: &Path, turn: u32) -> io::Result<()> {
    let (f, f2, g, absent) = (dir.join("f"), dir.join("f2"), dir.join("g"), dir.join("absent"));
    let writable = || sys::open(&f, true, 0);
    let mode = || fs::set_permissions(&f, fs::Permissions::from_mode(0o644));
    match what {
        // The next turn's are others anyway.
        "write" | "write-same-mtime" | "write-direct" | "write-mapped" | "utimes" | "setxattr" => Ok(()),
        "append" | "write-beyond" | "truncate-up" | "allocate" => writable()?.set_len(SIZE),
        "truncate-down" | "truncate-open" | "punch" | "zero-range" => writable()?.write_all_at(&contents(turn), 0),
        "copy-range" => sys::open(&g, true, 0)?.write_all_at(&pattern(turn.wrapping_mul(2), 0, CHANGED), 100),
        "rename" => fs::rename(&absent, &f),
        "rename-over" => fs::rename(&f, &g).and_then(|()| fs::hard_link(&f2, &f)),
        "exchange" => sys::rename(&f, &g, libc::RENAME_EXCHANGE),
        "unlink" => fs::hard_link(&f2, &f),
        "create" | "link" | "symlink" => fs::remove_file(&absent),
        "mkdir" => fs::remove_dir(&absent),
        "rmdir" => fs::create_dir(dir.join("d")),
        "chmod" => mode(),
        "chown" => chown(&f, Some(0), Some(0)),
        "removexattr" => sys::set_xattr(&f, "user.x", b"as before"),
        "setacl" => sys::remove_xattr(&f, ACCESS).and_then(|()| mode()),
        "removeacl" => mode(),
        "setacl-default" => sys::remove_xattr(dir, DEFAULT),
        other => unreachable!("{other} is not a change"),
    }
}
