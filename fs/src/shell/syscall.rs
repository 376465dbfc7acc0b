//! Which system call a thread makes that waits for its answer: `flock`, or `fcntl` for its process or for an open file.
//!
//! The kernel says in the request whether it is a flock, but the library between does not pass that on. Once a request has
//! been taken from the kernel its thread stays in the system call that it is for, whatever signals it gets, until it is
//! answered: `/proc/TID/syscall` tells which one that is.
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
enum Seen {
    /// The thread has not yet come to rest in its call.
    Running,
    In(LockCall),
    /// It is not in any call that locks a file: this is not the thread that asks.
    Other,
}

/// Numbers of calls on 32-bit x86 and ARM, as which a process may run under a 64-bit kernel. What has these numbers there is
/// no call that locks.
const FLOCK_32: i64 = 143;
const FCNTL_32: [i64; 2] = [55, 221];
/// `F_SETLK64` and `F_SETLKW64` of such a process.
const SETLK_32: [u64; 2] = [13, 14];
/// Bit of the calls of a process with 32-bit pointers on x86-64.
const X32: i64 = 0x4000_0000;

fn see(text: &str, request: i32) -> Seen {
    let mut words = text.split_whitespace();
    let first = words.next().unwrap_or_default();
    if first == "running" {
        return Seen::Running;
    }
    let numbers: Vec<u64> = words.filter_map(|w| u64::from_str_radix(w.trim_start_matches("0x"), 16).ok()).collect();
    let (Ok(call), true) = (first.parse::<i64>(), numbers.len() > 2) else { return Seen::Other };
    if numbers.iter().all(|n| *n == 0) {
        // A thread of the kernel: it locks for a client of a file server, which knows byte ranges only.
        return Seen::In(LockCall::Process);
    }
    let (call, second) = (call & !X32, numbers[1]);
    if call == libc::SYS_flock || call == FLOCK_32 {
        let wanted = match second as i32 & !libc::LOCK_NB {
            libc::LOCK_SH => libc::F_RDLCK,
            libc::LOCK_EX => libc::F_WRLCK,
            libc::LOCK_UN => libc::F_UNLCK,
            _ => return Seen::Other,
        };
        return if wanted == request { Seen::In(LockCall::Flock) } else { Seen::Other };
    }
    if call != libc::SYS_fcntl && !FCNTL_32.contains(&call) {
        return Seen::Other;
    }
    match second as i32 {
        libc::F_SETLK | libc::F_SETLKW => Seen::In(LockCall::Process),
        libc::F_OFD_SETLK | libc::F_OFD_SETLKW => Seen::In(LockCall::OpenFile),
        _ if SETLK_32.contains(&second) => Seen::In(LockCall::Process),
        _ => Seen::Other,
    }
}

/// The call by which a thread, whose request for a lock (`F_RDLCK` …) is not yet answered, asks for it; `None` if that cannot be
/// seen.
pub(super) async fn lock_call(thread: u32, request: i32) -> Option<LockCall> {
    if thread == 0 {
        return None;
    }
    let path = format!("/proc/{thread}/syscall");
    loop {
        match see(&std::fs::read_to_string(&path).ok()?, request) {
            Seen::In(call) => return Some(call),
            Seen::Other => return None,
            // It has only to give up its processor.
            Seen::Running => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_number_and_argument() {
        let line = |call: i64, second: i32| format!("{call} 0x4 {second:#x} 0x1 0x0 0x7eff 0x0 0x7fff12 0x7eff50");
        let seen = |call, second, request| see(&line(call, second), request);
        let (flock, fcntl) = (libc::SYS_flock, libc::SYS_fcntl);
        assert_eq!(seen(flock, libc::LOCK_EX | libc::LOCK_NB, libc::F_WRLCK), Seen::In(LockCall::Flock));
        assert_eq!(seen(flock, libc::LOCK_UN, libc::F_UNLCK), Seen::In(LockCall::Flock));
        assert_eq!(seen(143, libc::LOCK_SH, libc::F_RDLCK), Seen::In(LockCall::Flock));
        assert_eq!(seen(flock, libc::LOCK_SH, libc::F_WRLCK), Seen::Other, "another thread with that number");
        assert_eq!(seen(fcntl, libc::F_SETLKW, libc::F_WRLCK), Seen::In(LockCall::Process));
        assert_eq!(seen(fcntl | X32, libc::F_SETLK, libc::F_UNLCK), Seen::In(LockCall::Process));
        assert_eq!(seen(221, 14, libc::F_WRLCK), Seen::In(LockCall::Process));
        assert_eq!(seen(fcntl, libc::F_OFD_SETLK, libc::F_UNLCK), Seen::In(LockCall::OpenFile));
        assert_eq!(seen(fcntl, libc::F_GETFL, libc::F_WRLCK), Seen::Other);
        assert_eq!(seen(libc::SYS_read, 0x7eff, libc::F_WRLCK), Seen::Other);
        assert_eq!(see("0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0", libc::F_WRLCK), Seen::In(LockCall::Process), "the kernel");
        assert_eq!(see("running\n", libc::F_WRLCK), Seen::Running);
        for garbage in ["", "-1 0x0 0x0", "x 0x0 0x0 0x0", "73"] {
            assert_eq!(see(garbage, libc::F_WRLCK), Seen::Other, "{garbage}");
        }
    }
}
