//! Which system call a thread makes that waits for its answer.
//!
//! A lock is asked for by `flock`, or by `fcntl` for its process or for an open file: the kernel says in the request whether it is a
//! flock, but the library between does not pass that on. A file's size is set by programs, and by the kernel itself when an
//! asynchronous write has failed: back to what it takes for the size, which is another one if other nodes have written. A name is looked
//! up, and attributes are asked for, by calls of many kinds. Once a request has been taken from the kernel its thread stays in the
//! system call that it is for, whatever signals it gets, until it is answered: `/proc/TID/syscall` tells which one that is. (Who waits
//! for no answer, but for asynchronous ones, may be seen to run for ever; that is no call.)
//!
//! Excludes: threads that cannot be seen from here (another process namespace, a daemon that must not look at other
//! processes): of those nothing is said.

use nix::libc;
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
    /// In this call, with this second argument.
    Call(i64, u64),
    /// In none.
    Nowhere,
}

/// Numbers of calls on 32-bit x86 and ARM, as which a process may run under a 64-bit kernel. What has these numbers there is
/// no call that locks.
const FLOCK_32: i64 = 143;
const FCNTL_32: [i64; 2] = [55, 221];
/// `F_SETLK64` and `F_SETLKW64` of such a process.
const SETLK_32: [u64; 2] = [13, 14];
/// How often a thread is looked at, a millisecond apart, until it has come to rest: where it waits for this and nothing else;
/// where it may have asked for something asynchronous, and goes on; where it is not waited for long.
const SURELY: u32 = 10_000;
const PERHAPS: u32 = 200;
const SHORTLY: u32 = 20;
/// Bit of the calls of a process with 32-bit pointers on x86-64.
const X32: i64 = 0x4000_0000;

/// The numbers of `write`, `writev`, `pwrite64`, `sendfile`, `sendfile64`, `splice`, `pwritev`, `pwritev2`, `copy_file_range` there.
const WRITE_32: [i64; 13] = [4, 146, 181, 187, 239, 313, 334, 340, 362, 377, 379, 391, 393];
/// Numbers of calls of x86-64 that others do not have, and of those that rename of 32-bit processes there.
#[cfg(target_arch = "x86_64")]
const RENAME: [i64; 4] = [libc::SYS_rename, 38, 302, 353];
#[cfg(target_arch = "x86_64")]
const STAT: [i64; 2] = [libc::SYS_stat, libc::SYS_lstat];
#[cfg(not(target_arch = "x86_64"))]
const RENAME: [i64; 0] = [];
#[cfg(not(target_arch = "x86_64"))]
const STAT: [i64; 0] = [];
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
            Ok(call) if call >= 0 && numbers.len() > 2 => Place::Call(call & !X32, numbers[1]),
            _ => Place::Nowhere,
        }
    }

    /// Where a thread is whose request is not yet answered; `None` if it cannot be seen.
    async fn of(thread: u32, looks: u32) -> Option<Place> {
        if thread == 0 {
            return None;
        }
        let path = format!("/proc/{thread}/syscall");
        for _ in 0..looks {
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
            Place::Call(call, second) => (call, second),
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

    /// Whether a program renames something here.
    fn renames(self) -> bool {
        let Place::Call(call, _) = self else { return false };
        [libc::SYS_renameat, libc::SYS_renameat2].contains(&call) || RENAME.contains(&call)
    }

    /// Whether a program asks for attributes here, to be shown them.
    fn stats(self) -> bool {
        let Place::Call(call, _) = self else { return false };
        [libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx].contains(&call) || STAT.contains(&call)
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
    Place::of(thread, SURELY).await?.lock_call(request)
}

/// Whether a thread is seen to rename something, and waits for that.
pub(super) async fn renames(thread: u32) -> bool {
    Place::of(thread, SHORTLY).await.is_some_and(Place::renames)
}

/// Whether a thread is seen to ask for attributes in order to show them (and not, say, to open a file), and waits for them.
pub(super) async fn stats(thread: u32) -> bool {
    Place::of(thread, SHORTLY).await.is_some_and(Place::stats)
}

/// Whether a thread is seen to write, and waits for the end of that.
pub(super) async fn writes(thread: u32) -> bool {
    Place::of(thread, PERHAPS).await.is_some_and(Place::writes)
}

/// Whether a thread is seen to set a file's size, which its request asks for.
pub(super) async fn sets_size(thread: u32) -> bool {
    Place::of(thread, PERHAPS).await.is_some_and(Place::sets_size)
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
        let (renames, stats) = (|call| Place::parse(&line(call, 0)).renames(), |call| Place::parse(&line(call, 0)).stats());
        assert!(renames(libc::SYS_renameat2) && renames(libc::SYS_renameat) && !renames(libc::SYS_unlinkat) && !kernel.renames());
        assert!(stats(libc::SYS_statx) && stats(libc::SYS_fstat) && !stats(libc::SYS_openat) && !stats(libc::SYS_execve));
        let sets_size = |call| Place::parse(&line(call, 0)).sets_size();
        assert!(sets_size(libc::SYS_ftruncate) && sets_size(libc::SYS_truncate | X32) && sets_size(194));
        assert!(!sets_size(libc::SYS_io_submit) && !sets_size(libc::SYS_io_uring_enter) && !sets_size(libc::SYS_pwrite64));
    }
}
