//! Daemons as processes: started apart from the terminal, known by pid *and* start time, so that no signal ever goes to
//! a stranger that got the same pid.

use crate::control::Request;
use crate::control::client::Client;
use crate::failure::{Context, Failure, Outcome};
use crate::settings::{Settings, write_atomically};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A process, for sure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

/// State (`R`, `S`, `T`, `Z` …) and start time of a process.
fn look(pid: i32) -> Option<(char, u64)> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(stat: &str) -> Option<(char, u64)> {
    // The name, in brackets, may contain anything; the fields after the last bracket are plain.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let state = fields.first()?.chars().next()?;
    let threads: u32 = fields.get(17)?.parse().ok()?;
    // What is shown is the first thread. While others are still dying, the process keeps its files, and the locks on them.
    let state = if state == 'Z' && threads > 1 { 'R' } else { state };
    Some((state, fields.get(19)?.parse().ok()?))
}

impl Process {
    /// This process.
    #[must_use]
    pub fn this() -> Process {
        let pid = std::process::id().cast_signed();
        Process { pid, started: look(pid).map_or(0, |(_, s)| s) }
    }

    /// Reads `pid start-time` from a file.
    #[must_use]
    pub fn read(path: &Path) -> Option<Process> {
        let text = std::fs::read_to_string(path).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        Some(Process { pid: pid.parse().ok()?, started: started.parse().ok()? })
    }

    /// Writes `pid start-time` to a file.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write(self, path: &Path) -> std::io::Result<()> {
        write_atomically(path, format!("{} {}\n", self.pid, self.started).as_bytes(), 0o600)
    }

    /// Whether it lives (a dead one that nobody has waited for yet does not).
    #[must_use]
    pub fn alive(self) -> bool {
        look(self.pid).is_some_and(|(state, started)| started == self.started && state != 'Z' && state != 'X')
    }

    /// Whether it is stopped by a signal.
    #[must_use]
    pub fn paused(self) -> bool {
        look(self.pid).is_some_and(|(state, started)| started == self.started && matches!(state, 'T' | 't'))
    }

    /// Sends a signal, if it lives.
    ///
    /// # Errors
    /// If not allowed.
    pub fn signal(self, signal: Signal) -> Outcome<()> {
        if !self.alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(e) => Err(Failure::new(format!("cannot send {signal} to process {}: {}", self.pid, e.desc()))),
        }
    }

    /// Waits until it has ended; false if it has not in time.
    #[must_use]
    pub fn wait_gone(self, limit: Duration) -> bool {
        let mut waited = Duration::ZERO;
        while self.alive() {
            if waited >= limit {
                return false;
            }
            let step = Duration::from_millis(20);
            std::thread::sleep(step);
            waited += step;
        }
        true
    }
}

/// Where a daemon writes its process number.
#[must_use]
pub fn pid_file(settings: &Settings) -> PathBuf {
    settings.state_dir.join("pulsard.pid")
}

/// Where a daemon that was started by `pulsar start` logs.
#[must_use]
pub fn log_file(settings: &Settings) -> PathBuf {
    settings.state_dir.join("pulsard.log")
}

/// The daemon's process, if it lives.
#[must_use]
pub fn daemon_of(settings: &Settings) -> Option<Process> {
    Process::read(&pid_file(settings)).filter(|p| p.alive())
}

/// How long a daemon may take until it answers.
const START_TIME_MAX: Duration = Duration::from_secs(20);

/// Starts a daemon apart from the terminal and waits until it answers. True if it was started, false if it ran already.
///
/// # Errors
/// If it ends or does not answer in time; with the end of its log.
pub fn start_daemon(exe: &Path, config: &Path, netns: Option<&Path>) -> Outcome<bool> {
    let settings = Settings::load(config)?;
    let client = Client::new(&settings.control);
    if daemon_of(&settings).is_some() && client.try_call(Request::Ping, crate::control::client::QUICK).is_ok() {
        return Ok(false);
    }
    let log = log_file(&settings);
    let open = || std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&log);
    let before = std::fs::metadata(&log).map_or(0, |m| m.len());
    let output = open().context(|| format!("cannot write the log {}", log.display()))?;
    let errors = output.try_clone().context(|| format!("cannot write the log {}", log.display()))?;
    let mut command = Command::new(exe);
    command.arg("daemon").arg("--config").arg(config).arg("--detached");
    if let Some(netns) = netns {
        command.arg("--in-netns").arg(netns);
    }
    let mut child = command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .context(|| format!("cannot start {}", exe.display()))?;
    let failed = |why: &str| {
        let text = std::fs::read(&log).unwrap_or_default();
        let text = String::from_utf8_lossy(text.get(usize::try_from(before).unwrap_or(0)..).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(12)..).unwrap_or_default().join("\n  ");
        Failure::new(format!("pulsard {why}; its log, {}, ends:\n  {tail}", log.display()))
    };
    let mut waited = Duration::ZERO;
    loop {
        if client.try_call(Request::Ping, Duration::from_secs(1)).is_ok() {
            return Ok(true);
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(failed(&format!("ended at once ({status})")));
        }
        if waited > START_TIME_MAX {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed("did not answer in time and was stopped"));
        }
        let step = Duration::from_millis(30);
        std::thread::sleep(step);
        waited += step;
    }
}

/// Ends a daemon cleanly; if it does not end in time, at once. False if none ran.
///
/// # Errors
/// If it cannot be ended at all.
pub fn stop_daemon(settings: &Settings, limit: Duration) -> Outcome<bool> {
    let Some(process) = daemon_of(settings) else { return Ok(false) };
    process.signal(Signal::SIGTERM)?;
    process.signal(Signal::SIGCONT)?;
    if !process.wait_gone(limit) {
        process.signal(Signal::SIGKILL)?;
        if !process.wait_gone(Duration::from_secs(10)) {
            return Err(Failure::new(format!("process {} does not end, not even by SIGKILL; see 'dmesg'", process.pid)));
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_with_the_same_pid_is_left_alone() {
        let this = Process::this();
        assert!(this.alive() && !this.paused());
        let stranger = Process { started: this.started + 1, ..this };
        assert!(!stranger.alive());
        stranger.signal(Signal::SIGKILL).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        this.write(&path).unwrap();
        assert_eq!(Process::read(&path), Some(this));
    }

    #[test]
    fn a_process_is_dead_when_its_last_thread_is() {
        let line = |threads: u32| format!("7 (a) Z) Z 1 7 7 0 -1 4 0 0 0 0 1 2 0 0 20 0 {threads} 0 4242 0 0");
        assert_eq!(parse(&line(3)), Some(('R', 4242)));
        assert_eq!(parse(&line(1)), Some(('Z', 4242)));
        assert_eq!(parse("7 (a"), None);
    }

    #[test]
    fn dead_children_are_dead() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id().cast_signed();
        let process = Process { pid, started: look(pid).unwrap().1 };
        process.signal(Signal::SIGSTOP).unwrap();
        while !process.paused() {
            std::thread::sleep(Duration::from_millis(1));
        }
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.wait_gone(Duration::from_secs(5)));
        child.wait().unwrap();
    }
}
