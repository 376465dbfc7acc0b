//! Which system call a thread makes that waits for its answer.
//!
//! A lock is asked for by `flock`, or by `fcntl` for its process or for an open file: the kernel says in the request whether it is a
//! flock, but the library between does not pass that on. A file's size is set by programs, and by the kernel itself when an
//! asynchronous write has failed: back to what it takes for the size, which is another one if other nodes have written. A name is looked
//! up for a rename, as its first or its second one, or for something else. Once a request has been taken from the kernel its thread
//! stays in the system call that it is for, whatever signals it gets, until it is answered: `/proc/TID/syscall` tells which one that
//! is, and `/proc/TID/mem` the paths. (Who waits for no answer, but for asynchronous ones, may be seen to run for ever; that is no call.)
//!
//! Excludes: threads that cannot be seen from here (another process namespace, a daemon that must not look at other
//! processes): of those nothing is said.

use nix::libc;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// How a thread asks for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockCall {
    /// `flock`.
    Flock,
    /// `fcntl`, for the process.
    Process,
    /// `fcntl`, for the open file (`F_OFD_SETLK`).
    OpenFile,
}

/// What `/proc/TID/syscall` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The thread has not yet come to rest in its call.
    Running,
    /// A thread of the kernel.
    Kernel,
    /// In this call, with these arguments.
    Call(i64, [u64; 6]),
    /// In none.
    Nowhere,
}

/// Numbers of calls on 32-bit x86 and ARM, as which a process may run under a 64-bit kernel. What has these numbers there is
/// no call that locks.
const FLOCK_32: i64 = 143;
const FCNTL_32: [i64; 2] = [55, 221];
/// `F_SETLK64` and `F_SETLKW64` of such a process.
const SETLK_32: [u64; 2] = [13, 14];
/// How often a thread is looked at, a millisecond apart, until it has come to rest.
const LOOKS_MAX: u32 = 20;
/// The smallest page of memory.
const PAGE: usize = 4096;
/// The longest path that a call takes, with its end.
const PATH_MAX: usize = 4096;
/// Bit of the calls of a process with 32-bit pointers on x86-64.
const X32: i64 = 0x4000_0000;

/// The numbers of `write`, `writev`, `pwrite64`, `sendfile`, `sendfile64`, `splice`, `pwritev`, `pwritev2`, `copy_file_range` there.
const WRITE_32: [i64; 13] = [4, 146, 181, 187, 239, 313, 334, 340, 362, 377, 379, 391, 393];
/// The numbers of `rename`; of `renameat` and `renameat2` (of x86, ARM) there.
const RENAME_32: i64 = 38;
const RENAME_AT_32: [i64; 4] = [302, 329, 353, 382];
/// The numbers of `truncate`, `ftruncate` and their 64-bit forms there.
const TRUNCATE_32: [i64; 4] = [92, 93, 193, 194];

impl Place {
    fn parse(text: &str) -> Place {
        let mut words = text.split_whitespace();
        let first = words.next().unwrap_or_default();
        if first == "running" {
            return Place::Running;
        }
        let numbers: Vec<u64> = words.filter_map(|w| u64::from_str_radix(w.trim_start_matches("0x"), 16).ok()).collect();
        match first.parse::<i64>() {
            Ok(_) if numbers.len() > 2 && numbers.iter().all(|n| *n == 0) => Place::Kernel,
            Ok(call) if call >= 0 && numbers.len() > 2 => {
                let argument = |at: usize| numbers.get(at).copied().unwrap_or_default();
                Place::Call(call & !X32, std::array::from_fn(argument))
            }
            _ => Place::Nowhere,
        }
    }

    /// Where a thread is whose request is not yet answered; `None` if it cannot be seen.
    async fn of(thread: u32) -> Option<Place> {
        if thread == 0 {
            return None;
        }
        let path = format!("/proc/{thread}/syscall");
        for _ in 0..LOOKS_MAX {
            match Place::parse(&std::fs::read_to_string(&path).ok()?) {
                // It has only to give up its processor.
                Place::Running => tokio::time::sleep(Duration::from_millis(1)).await,
                place => return Some(place),
            }
        }
        // It does not wait for this.
        Some(Place::Running)
    }

    /// The call by which a lock (`F_RDLCK` …) is asked for here; `None` if there is none: this is not the thread that asks.
    fn lock_call(self, request: i32) -> Option<LockCall> {
        let (call, second) = match self {
            Place::Call(call, arguments) => (call, arguments[1]),
            // It locks for a client of a file server, which knows byte ranges only.
            Place::Kernel => return Some(LockCall::Process),
            Place::Running | Place::Nowhere => return None,
        };
        if call == libc::SYS_flock || call == FLOCK_32 {
            let wanted = match second as i32 & !libc::LOCK_NB {
                libc::LOCK_SH => libc::F_RDLCK,
                libc::LOCK_EX => libc::F_WRLCK,
                libc::LOCK_UN => libc::F_UNLCK,
                _ => return None,
            };
            return (wanted == request).then_some(LockCall::Flock);
        }
        if call != libc::SYS_fcntl && !FCNTL_32.contains(&call) {
            return None;
        }
        match second as i32 {
            libc::F_SETLK | libc::F_SETLKW => Some(LockCall::Process),
            libc::F_OFD_SETLK | libc::F_OFD_SETLKW => Some(LockCall::OpenFile),
            _ if SETLK_32.contains(&second) => Some(LockCall::Process),
            _ => None,
        }
    }

    /// Whether a program writes here, and waits.
    fn writes(self) -> bool {
        let Place::Call(call, _) = self else { return false };
        let calls = [libc::SYS_write, libc::SYS_pwrite64, libc::SYS_writev, libc::SYS_pwritev, libc::SYS_pwritev2];
        let copies = [libc::SYS_sendfile, libc::SYS_splice, libc::SYS_copy_file_range];
        calls.contains(&call) || copies.contains(&call) || WRITE_32.contains(&call)
    }

    /// Where the two paths of a rename are in the thread's memory, if it is in one.
    fn renames(self) -> Option<(u64, u64)> {
        let Place::Call(call, [first, second, _, fourth, ..]) = self else { return None };
        #[cfg(target_arch = "x86_64")]
        if call == libc::SYS_rename {
            return Some((first, second));
        }
        if call == RENAME_32 {
            return Some((first, second));
        }
        let at = [libc::SYS_renameat, libc::SYS_renameat2].contains(&call) || RENAME_AT_32.contains(&call);
        at.then_some((second, fourth))
    }

    /// Whether a program sets a file's size here.
    fn sets_size(self) -> bool {
        let Place::Call(call, _) = self else { return false };
        [libc::SYS_truncate, libc::SYS_ftruncate].contains(&call) || TRUNCATE_32.contains(&call)
    }
}

/// The call by which a thread, whose request for a lock (`F_RDLCK` …) is not yet answered, asks for it; `None` if that cannot be
/// seen.
pub(super) async fn lock_call(thread: u32, request: i32) -> Option<LockCall> {
    Place::of(thread).await?.lock_call(request)
}

/// The names of a rename.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Renaming {
    /// The name that it moves, and the one that it moves it to.
    pub(super) from: Vec<u8>,
    pub(super) to: Vec<u8>,
    /// The directories' names before these, if they are named.
    pub(super) from_dir: Option<Vec<u8>>,
    pub(super) to_dir: Option<Vec<u8>>,
}

impl Renaming {
    pub(super) fn of(from: &[u8], to: &[u8]) -> Self {
        let parts = |path: &[u8]| {
            let mut parts = path.rsplit(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".");
            let last = parts.next().unwrap_or_default().to_vec();
            (last, parts.next().filter(|dir| *dir != b"..").map(<[u8]>::to_vec))
        };
        let ((from, from_dir), (to, to_dir)) = (parts(from), parts(to));
        Renaming { from, to, from_dir, to_dir }
    }
}

/// A string in a thread's memory.
fn string_at(memory: &File, at: u64) -> Option<Vec<u8>> {
    let mut string = Vec::new();
    while string.len() < PATH_MAX {
        // What follows its page may not be there.
        let from = at.checked_add(string.len() as u64)?;
        let mut part = vec![0; PAGE - (from % PAGE as u64) as usize];
        memory.read_exact_at(&mut part, from).ok()?;
        match part.iter().position(|b| *b == 0) {
            Some(end) => {
                string.extend_from_slice(&part[..end]);
                return Some(string);
            }
            None => string.extend(part),
        }
    }
    None
}

/// The names of the rename that a thread is in, which waits for an answer; `None` if it is in none, or cannot be seen.
pub(super) async fn renames(thread: u32) -> Option<Renaming> {
    let (from, to) = Place::of(thread).await?.renames()?;
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    Some(Renaming::of(&string_at(&memory, from)?, &string_at(&memory, to)?))
}

/// Whether a thread is seen to write, and waits for the end of that.
pub(super) async fn writes(thread: u32) -> bool {
    Place::of(thread).await.is_some_and(Place::writes)
}

/// Whether a thread is seen to set a file's size, which its request asks for.
pub(super) async fn sets_size(thread: u32) -> bool {
    Place::of(thread).await.is_some_and(Place::sets_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_number_and_argument() {
        let line = |call: i64, second: i32| format!("{call} 0x4 {second:#x} 0x1 0x0 0x7eff 0x0 0x7fff12 0x7eff50");
        let seen = |call, second, request| Place::parse(&line(call, second)).lock_call(request);
        let (flock, fcntl) = (libc::SYS_flock, libc::SYS_fcntl);
        assert_eq!(seen(flock, libc::LOCK_EX | libc::LOCK_NB, libc::F_WRLCK), Some(LockCall::Flock));
        assert_eq!(seen(flock, libc::LOCK_UN, libc::F_UNLCK), Some(LockCall::Flock));
        assert_eq!(seen(143, libc::LOCK_SH, libc::F_RDLCK), Some(LockCall::Flock));
        assert_eq!(seen(flock, libc::LOCK_SH, libc::F_WRLCK), None, "another thread with that number");
        assert_eq!(seen(fcntl, libc::F_SETLKW, libc::F_WRLCK), Some(LockCall::Process));
        assert_eq!(seen(fcntl | X32, libc::F_SETLK, libc::F_UNLCK), Some(LockCall::Process));
        assert_eq!(seen(221, 14, libc::F_WRLCK), Some(LockCall::Process));
        assert_eq!(seen(fcntl, libc::F_OFD_SETLK, libc::F_UNLCK), Some(LockCall::OpenFile));
        assert_eq!(seen(fcntl, libc::F_GETFL, libc::F_WRLCK), None);
        assert_eq!(seen(libc::SYS_read, 0x7eff, libc::F_WRLCK), None);
        let kernel = Place::parse("0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0");
        assert_eq!((kernel.lock_call(libc::F_WRLCK), kernel.sets_size()), (Some(LockCall::Process), false));
        assert_eq!(Place::parse("running\n"), Place::Running);
        for garbage in ["", "-1 0x7fff 0x7eff 0x1", "-1 0x0 0x0", "x 0x0 0x0 0x0", "73"] {
            assert_eq!(Place::parse(garbage), Place::Nowhere, "{garbage}");
        }
        let writes = |call| Place::parse(&line(call, 0)).writes();
        assert!(writes(libc::SYS_pwrite64) && writes(libc::SYS_writev | X32) && writes(4));
        assert!(!writes(libc::SYS_io_submit) && !writes(libc::SYS_io_uring_enter) && !kernel.writes());
        let sets_size = |call| Place::parse(&line(call, 0)).sets_size();
        assert!(sets_size(libc::SYS_ftruncate) && sets_size(libc::SYS_truncate | X32) && sets_size(194));
        assert!(!sets_size(libc::SYS_io_submit) && !sets_size(libc::SYS_io_uring_enter) && !sets_size(libc::SYS_pwrite64));
    }
}
