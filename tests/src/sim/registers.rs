//! Register files: what a concurrent workload writes, and the rules by which reads of them are judged.
//!
//! A register is a file with one writer, always written as a whole with a version's pattern. Therefore a read must show
//! one version, whole; not a newer one than was begun; and not an older one than the *floor*, which is the newest of
//! - what was fsync'd,
//! - what another node has read (it was handed over, so it is on the disks),
//! - what the writer's `write` has returned for, as long as the writer's node has surely not lost anything since.
//!
//! Excludes: doing the reads and writes (`concurrent`), faults (`world`).

use crate::op::pattern;

/// Version 0 is the empty file.
pub type Version = u64;

/// A register's history, as far as it matters.
#[derive(Clone, Debug, Default)]
pub struct Register {
    /// Which register.
    pub number: u32,
    /// Bytes of each version.
    pub len: usize,
    /// The newest version whose writing began.
    pub begun: Version,
    /// The newest one whose writing has returned, since the writer's node last might have lost something.
    pub written: Version,
    /// The newest one that an fsync has covered.
    pub synced: Version,
    /// The newest one that was read on another node.
    pub handed_over: Version,
    /// Counts the times at which the writer's node might have lost something.
    pub losses: u64,
}

/// What was known when a read began.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    floor: Version,
    losses: u64,
}

impl Register {
    /// A register whose file is still empty.
    #[must_use]
    pub fn new(number: u32, len: usize) -> Self {
        Register { number, len, ..Register::default() }
    }

    /// The `fill` of a version's pattern.
    #[must_use]
    pub fn fill(&self, version: Version) -> u32 {
        (self.number << 20) | (version as u32 & 0xf_ffff)
    }

    /// The oldest version that a read beginning now may show.
    #[must_use]
    pub fn floor(&self) -> Version {
        self.written.max(self.durable())
    }

    /// The oldest version that may be there after any crash.
    #[must_use]
    pub fn durable(&self) -> Version {
        self.synced.max(self.handed_over)
    }

    /// The writer's node may have lost what was not durable.
    pub fn lose(&mut self) {
        self.written = 0;
        self.losses += 1;
    }

    /// The next version begins to be written.
    pub fn begin(&mut self) -> Version {
        self.begun += 1;
        self.begun
    }

    /// A write has returned. `losses` is what it was when the write began.
    pub fn wrote(&mut self, version: Version, losses: u64) {
        if losses == self.losses {
            self.written = self.written.max(version);
        }
    }

    /// A read begins.
    #[must_use]
    pub fn before(&self) -> Before {
        Before { floor: self.floor(), losses: self.losses }
    }

    /// Judges what was read; an error says what is wrong with it.
    pub fn judge(&mut self, before: Before, bytes: &[u8], by_writer: bool) -> Result<Version, String> {
        // If something may have been lost while the read was under way only what survives anything counts.
        let floor = if before.losses == self.losses { before.floor } else { before.floor.min(self.durable()) };
        let version = self.version_of(bytes).ok_or_else(|| {
            format!("register {}: {} bytes that are no version of it: {}", self.number, bytes.len(), self.describe(bytes))
        })?;
        if version > self.begun {
            return Err(format!("register {}: read version {version}, but only {} was begun", self.number, self.begun));
        }
        if version < floor {
            return Err(format!("register {}: read version {version} after version {floor} was there: {self:?}", self.number));
        }
        if !by_writer {
            self.handed_over = self.handed_over.max(version);
        }
        Ok(version)
    }

    fn version_of(&self, bytes: &[u8]) -> Option<Version> {
        if bytes.is_empty() {
            return Some(0);
        }
        // Only the last million versions can be told apart, which is more than any run makes.
        (1..=self.begun).rev().find(|v| {
            let expected = pattern(self.fill(*v), 0, self.len);
            bytes == expected
        })
    }

    /// Which version each part of some bytes is from.
    fn describe(&self, bytes: &[u8]) -> String {
        let mut parts: Vec<(String, usize)> = Vec::new();
        for (at, chunk) in bytes.chunks(512).enumerate() {
            let of = (0..=self.begun).rev().find(|v| {
                let expected = pattern(self.fill(*v), 0, self.len);
                expected.get(at * 512..at * 512 + chunk.len()) == Some(chunk)
            });
            let name = match of {
                Some(version) => format!("v{version}"),
                None if chunk.iter().all(|b| *b == 0) => "zeros".into(),
                None => "garbage".into(),
            };
            match parts.last_mut() {
                Some((last, n)) if *last == name => *n += chunk.len(),
                _ => parts.push((name, chunk.len())),
            }
        }
        parts.iter().map(|(name, n)| format!("{n} of {name}")).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_judged_by_what_may_have_been_lost() {
        let mut r = Register::new(1, 1000);
        for version in 1..=3 {
            assert_eq!(r.begin(), version);
            r.wrote(version, 0);
        }
        r.synced = 1;
        let of = |v: u32| pattern((1 << 20) | v, 0, 1000);
        let before = r.before();
        assert!(r.judge(before, &of(2), true).is_err(), "went back");
        assert_eq!(r.judge(before, &of(3), true), Ok(3));
        assert!(r.judge(before, &of(4), true).is_err(), "from the future");
        let torn = [&of(2)[..512], &of(3)[512..]].concat();
        assert!(r.judge(before, &torn, true).unwrap_err().contains("512 of v2, 488 of v3"));
        r.lose();
        assert_eq!(r.judge(before, &of(1), true), Ok(1));
        assert!(r.judge(before, &[], true).is_err(), "the synced version is lost");
        assert_eq!(r.judge(r.before(), &of(2), false), Ok(2));
        assert!(r.judge(r.before(), &of(1), false).is_err(), "went back after another node had seen it");
    }
}
