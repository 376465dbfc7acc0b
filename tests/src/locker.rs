//! Processes that lock files, and are told what to do line by line: locks belong to processes, so a test of them needs some.
//!
//! The program `locks` is both: `locks worker` is such a process ([`work`]), and [`Worker`] is what a test holds of it.

use crate::sys::{LockKind, LockMode, lock, lock_in_the_way, open};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Longest time for an answer that has nothing to wait for.
const PROMPT: Duration = Duration::from_secs(30);

/// What a worker answers.
pub type Answer = Result<String, i32>;

/// What it answers if it has done what it was told and there is nothing else to say.
pub fn ok() -> Answer {
    Ok("ok".into())
}

/// A process that locks files.
pub struct Worker {
    child: Child,
    answers: mpsc::Receiver<String>,
}

impl Worker {
    /// Starts one. `program`: `locks`. It opens the given files, which commands then name by their place in the list.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    #[track_caller]
    pub fn start(program: &Path, files: &[&Path]) -> Worker {
        Self::start_as(None, program, files)
    }

    /// Starts one as an ordinary user (and group), who is in no other group.
    ///
    /// # Panics
    /// If it does not start, or may not open the files.
    #[must_use]
    #[track_caller]
    pub fn start_as(user: Option<u32>, program: &Path, files: &[&Path]) -> Worker {
        let mut command = Command::new(program);
        if let Some(user) = user {
            std::os::unix::process::CommandExt::uid(&mut command, user);
            std::os::unix::process::CommandExt::gid(&mut command, user);
        }
        command.arg("worker").args(files).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the program 'locks' can be started");
        let out = child.stdout.take().expect("its output is a pipe");
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let worker = Worker { child, answers };
        assert_eq!(worker.answer(PROMPT).expect("it answers"), Ok("ready".into()));
        worker
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to do something; does not wait for the answer.
    ///
    /// # Panics
    /// If it is gone.
    #[track_caller]
    pub fn tell(&mut self, line: &str) {
        let pipe = self.child.stdin.as_mut().expect("its input is a pipe");
        pipe.write_all(format!("{line}\n").as_bytes()).expect("the worker lives");
    }

    /// The next answer; `None` if there is none in time, or the process has ended.
    #[must_use]
    pub fn answer(&self, time: Duration) -> Option<Answer> {
        let line = self.answers.recv_timeout(time).ok()?;
        Some(match line.strip_prefix("error ") {
            Some(number) => Err(number.parse().unwrap_or(-1)),
            None => Ok(line),
        })
    }

    /// Tells it to do something and waits for the answer.
    ///
    /// # Panics
    /// If it is gone, or does not answer.
    #[track_caller]
    pub fn ask(&mut self, line: &str) -> Answer {
        self.tell(line);
        self.answer(PROMPT).unwrap_or_else(|| panic!("no answer to '{line}'"))
    }

    /// Kills it; how long it took to end. An error if it does not within 10 s.
    pub fn kill(&mut self) -> Result<Duration, String> {
        let begun = crate::cluster::clock();
        self.child.kill().map_err(|e| e.to_string())?;
        loop {
            let took = crate::cluster::clock().saturating_sub(begun);
            match self.child.try_wait() {
                Ok(Some(_)) => return Ok(took),
                Ok(None) if took < Duration::from_secs(10) => std::thread::sleep(Duration::from_millis(1)),
                _ => return Err(format!("process {} does not die", self.child.id())),
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// The worker's side: does what its input says, until that ends. Lines are
/// `flock|fcntl|ofd FILE sh|ex|un [START LEN] [wait]`, `query FILE sh|ex START LEN`, `read FILE`, `write FILE TEXT`, `stat FILE`,
/// `reopen FILE`, `count FILE TIMES KIND` (locks, adds one to the number in the file, unlocks, so many times), and what is done
/// through a descriptor: `chmod FILE MODE`, `chown FILE ID`, `chgrp FILE ID`, `times FILE SECONDS`, `now FILE`,
/// `setxattr FILE NAME HEX`, `truncate FILE LEN`, `allocate FILE LEN`, `punch FILE LEN`, `copy FILE FILE LEN`.
pub fn work(files: &[std::path::PathBuf]) -> io::Result<()> {
    let mut open: Vec<File> = files.iter().map(|f| open(f, true, 0)).collect::<Result<_, _>>()?;
    let mut out = io::stdout();
    writeln!(out, "ready")?;
    for line in io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = obey(&words, files, &mut open);
        match answer {
            Ok(text) => writeln!(out, "{text}")?,
            Err(error) => writeln!(out, "error {}", error.raw_os_error().unwrap_or(-1))?,
        }
        out.flush()?;
    }
    Ok(())
}

fn kind(word: &str) -> Option<LockKind> {
    Some(match word {
        "flock" => LockKind::Flock,
        "fcntl" => LockKind::Process,
        "ofd" => LockKind::OpenFile,
        _ => return None,
    })
}

fn mode(word: &str) -> LockMode {
    match word {
        "sh" => LockMode::Read,
        "ex" => LockMode::Write,
        _ => LockMode::Unlock,
    }
}

/// Changes a file by its descriptor.
fn change(words: &[&str], file: &File, second: Option<&File>) -> io::Result<()> {
    use nix::sys::{stat, time::TimeSpec};
    let word = |at: usize| words.get(at).copied().unwrap_or_default();
    let number = |at: usize| word(at).parse::<u32>().unwrap_or(0);
    match word(0) {
        "chmod" => {
            let mode = u32::from_str_radix(word(2), 8).map_err(|_| io::ErrorKind::InvalidInput)?;
            Ok(stat::fchmod(file, stat::Mode::from_bits_truncate(mode))?)
        }
        "chown" => Ok(nix::unistd::fchown(file, Some(number(2).into()), None)?),
        "chgrp" => Ok(nix::unistd::fchown(file, None, Some(number(2).into()))?),
        "times" => {
            let time = TimeSpec::new(i64::from(number(2)), 0);
            Ok(stat::futimens(file, &time, &time)?)
        }
        "now" => {
            let now = TimeSpec::new(0, nix::libc::UTIME_NOW);
            Ok(stat::futimens(file, &now, &now)?)
        }
        "setxattr" => {
            let hex = word(3);
            let byte = |at: usize| hex.get(at..at + 2).and_then(|b| u8::from_str_radix(b, 16).ok());
            let value: Option<Vec<u8>> = (0..hex.len()).step_by(2).map(byte).collect();
            crate::sys::set_xattr_of(file, word(2), &value.ok_or(io::ErrorKind::InvalidInput)?)
        }
        "truncate" => file.set_len(number(2).into()),
        "allocate" => crate::sys::fallocate(file, 0, 0, number(2).into()),
        "punch" => {
            let how = nix::libc::FALLOC_FL_PUNCH_HOLE | nix::libc::FALLOC_FL_KEEP_SIZE;
            crate::sys::fallocate(file, how, 0, number(2).into())
        }
        _ => crate::sys::copy_range(file, 0, second.unwrap_or(file), 0, number(3) as usize).map(|_| ()),
    }
}

fn obey(words: &[&str], paths: &[std::path::PathBuf], open_files: &mut [File]) -> io::Result<String> {
    let word = |at: usize| words.get(at).copied().unwrap_or_default();
    let number = |at: usize| word(at).parse::<u64>().unwrap_or(0);
    let at = number(1) as usize;
    let file = open_files.get(at).ok_or(io::ErrorKind::InvalidInput)?;
    if let Some(kind) = kind(word(0)) {
        lock(file, kind, mode(word(2)), number(3), number(4), words.last() == Some(&"wait"))?;
        return Ok("ok".into());
    }
    match word(0) {
        "query" => Ok(match lock_in_the_way(file, mode(word(2)), number(3), number(4))? {
            None => "free".into(),
            Some((LockMode::Read, start, len, pid)) => format!("sh {start} {len} {pid}"),
            Some((_, start, len, pid)) => format!("ex {start} {len} {pid}"),
        }),
        "read" => {
            let mut text = [0; 100];
            let n = file.read_at(&mut text, 0)?;
            Ok(format!("read {}", String::from_utf8_lossy(&text[..n])))
        }
        "stat" => {
            file.metadata()?;
            Ok("ok".into())
        }
        "write" => {
            file.write_all_at(word(2).as_bytes(), 0)?;
            Ok("ok".into())
        }
        "chmod" | "chown" | "chgrp" | "times" | "now" | "setxattr" | "truncate" | "allocate" | "punch" | "copy" => {
            change(words, file, open_files.get(number(2) as usize))?;
            Ok("ok".into())
        }
        "remove" => {
            std::fs::remove_file(&paths[at])?;
            Ok("ok".into())
        }
        "reopen" => {
            open_files[at] = open(&paths[at], true, 0)?;
            Ok("ok".into())
        }
        "count" => {
            let kind = kind(word(3)).ok_or(io::ErrorKind::InvalidInput)?;
            for _ in 0..number(2) {
                lock(file, kind, LockMode::Write, 0, 0, true)?;
                let mut text = [0; 20];
                let n = file.read_at(&mut text, 0)?;
                let value: u64 = String::from_utf8_lossy(&text[..n]).trim().parse().unwrap_or(0);
                file.write_all_at(format!("{:<20}", value + 1).as_bytes(), 0)?;
                lock(file, kind, LockMode::Unlock, 0, 0, false)?;
            }
            Ok("ok".into())
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
