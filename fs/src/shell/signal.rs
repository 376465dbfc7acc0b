//! What `/proc` says of processes: signals of those whose requests wait, and their groups.
//!
//! The kernel's own way of telling (INTERRUPT) does not reach us, and without an answer a process that was killed stays. So
//! while a request waits, the thread that made it is looked at from time to time.
//!
//! Excludes: threads that cannot be seen from here (another process namespace): they wait until they are answered.

use std::future::pending;
use std::time::Duration;

/// How often a thread that waits for a lock is looked at.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// How often, and after how long for the first time, one that waits for anything else is: hardly any wait is that long.
const POLL: Duration = Duration::from_millis(500);

/// Signals of a thread, as `/proc/TID/status` says.
struct Signals {
    /// To be handled: pending, neither blocked nor ignored.
    handled: bool,
    /// It is being killed (the kernel turns whatever is fatal into SIGKILL for each thread).
    killed: bool,
}

impl Signals {
    fn parse(status: &str) -> Signals {
        let mask = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name));
            line.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or(0)
        };
        let pending = mask("SigPnd:") | mask("ShdPnd:");
        Signals {
            handled: pending & !mask("SigBlk:") & !mask("SigIgn:") != 0,
            killed: pending & (1 << (nix::libc::SIGKILL - 1)) != 0,
        }
    }

    /// `None` if there is no such thread in sight.
    fn of(thread: u32) -> Option<Signals> {
        std::fs::read_to_string(format!("/proc/{thread}/status")).ok().map(|s| Signals::parse(&s))
    }
}

/// Whether a thread has a capability (by its number), as far as can be seen from here. What it has in a user namespace of its own gives
/// no right to files.
pub(super) fn has_capability(caller: &crate::Caller, capability: u32) -> bool {
    let found = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", caller.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user")).ok();
    let is_here = || namespace("self").is_some_and(|here| namespace(&caller.pid.to_string()) == Some(here));
    caller.pid != 0 && is_here() && found().is_some_and(|mask| mask & (1 << capability) != 0)
}

/// Whether a process is in a group, as far as can be seen from here.
pub(super) fn is_in_group(caller: &crate::Caller, group: u32) -> bool {
    let groups = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", caller.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Groups:"))?;
        Some(line.split_whitespace().any(|number| number.parse() == Ok(group)))
    };
    caller.gid == group || groups().unwrap_or(false)
}

async fn watch(thread: u32, poll: Duration, over: impl Fn(&Signals) -> bool) {
    loop {
        tokio::time::sleep(poll).await;
        match Signals::of(thread) {
            Some(signals) if over(&signals) => return,
            Some(_) => {}
            // The kernel itself asks (read-ahead, write-back), or somebody whom we cannot see.
            None => pending::<()>().await,
        }
    }
}

/// Ends when a thread has a signal to handle.
pub(super) async fn interrupted(thread: u32) {
    watch(thread, LOCK_POLL, |s| s.handled).await;
}

/// Ends when a thread is being killed.
pub(super) async fn killed(thread: u32) {
    watch(thread, POLL, |s| s.killed).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_counts_if_it_is_pending_and_neither_blocked_nor_ignored() {
        let parse = |pnd: u64, shd: u64, blk: u64, ign: u64| {
            let line = |name: &str, mask: u64| format!("{name}:\t{mask:016x}\n");
            let s =
                Signals::parse(&[line("SigPnd", pnd), line("ShdPnd", shd), line("SigBlk", blk), line("SigIgn", ign)].concat());
            (s.handled, s.killed)
        };
        assert_eq!(parse(0, 0, 0, 0), (false, false));
        assert_eq!(parse(0, 1 << 14, 0, 0), (true, false));
        assert_eq!(parse(1 << 8, 0, 0, 0), (true, true));
        assert_eq!(parse(1 << 14, 0, 1 << 14, 0), (false, false));
        assert_eq!(parse(0, 1 << 14, 0, 1 << 14), (false, false));
        let garbage = Signals::parse("garbage");
        assert_eq!((garbage.handled, garbage.killed), (false, false));
    }
}
