//! Compares answers with the oracle's. Identity and times are relations, between what was told before and now.
//!
//! Excludes: what is right (`super`).

use super::Traits;
use crate::op::{FileKind, Op, Outcome, Reply, Stat, errno::*};
use std::collections::BTreeMap;

/// Compares answers with the oracle's: keeps the relations of identities and times.
#[derive(Clone, Debug, Default)]
pub struct Comparer {
    real_of: BTreeMap<u64, u64>,
    times: BTreeMap<u64, (Stat, Stat)>,
    traits: Traits,
}

impl Comparer {
    /// For answers of something of these traits.
    #[must_use]
    pub fn with(traits: Traits) -> Self {
        Comparer { traits, ..Comparer::default() }
    }

    /// An error says how an answer differs from what is right.
    pub fn compare(&mut self, op: &Op, right: &Outcome, got: &Outcome) -> Result<(), String> {
        let wrong = || Err(format!("{op:?}: expected {right:?}, got {got:?}"));
        match (right, got) {
            (Ok(Reply::Stat(right)), Ok(Reply::Stat(got))) => {
                self.compare_stat(right, got).map_err(|what| format!("{op:?}: {what}: expected {right:?}, got {got:?}"))
            }
            (Ok(Reply::Places(ranges, nowhere)), got) => match got {
                Ok(Reply::At(at)) if ranges.iter().any(|(first, last)| (first..=last).contains(&at)) => Ok(()),
                Err(ENXIO) if *nowhere => Ok(()),
                _ => wrong(),
            },
            (right, got) if right == got => Ok(()),
            _ => wrong(),
        }
    }

    fn compare_stat(&mut self, right: &Stat, got: &Stat) -> Result<(), &'static str> {
        let same = |a: bool, what| if a { Ok(()) } else { Err(what) };
        same(right.kind == got.kind, "kind")?;
        same(right.mode == got.mode, "mode")?;
        same((right.uid, right.gid) == (got.uid, got.gid), "owner")?;
        same(right.kind == FileKind::Dir || right.nlink == got.nlink, "nlink")?;
        let sized = matches!(right.kind, FileKind::File | FileKind::Symlink);
        same(!sized || right.size == got.size, "size")?;
        same(*self.real_of.entry(right.ino).or_insert(got.ino) == got.ino, "identity: another inode number than before")?;
        if let Some(seconds) = right.mtime_set {
            same(got.mtime == (seconds, 0), "mtime is not what was set")?;
        }
        let later = |old: (i64, u32), new: (i64, u32)| old < new || old == new && self.traits.coarse_times;
        if let Some((old_right, old_got)) = self.times.insert(right.ino, (*right, *got)) {
            if old_right.mtime == right.mtime {
                same(old_got.mtime == got.mtime, "mtime changed without a change of the data")?;
            } else if right.mtime_sets == old_right.mtime_sets && old_right.mtime_set.is_none() {
                same(later(old_got.mtime, got.mtime), "mtime is not later though the data was changed")?;
            } else if right.mtime_sets == old_right.mtime_sets {
                // It was set by a program before, perhaps to one far ahead, which a change takes back.
                same(old_got.mtime != got.mtime, "mtime is what a program set though the data was changed since")?;
            }
            // Otherwise a program set another one in between: what was there before it says nothing.
            if old_right.ctime == right.ctime {
                same(old_got.ctime == got.ctime, "ctime changed without a change of the inode")?;
            } else {
                same(later(old_got.ctime, got.ctime), "ctime is not later though the inode was changed")?;
            }
            // Which reads there were says little (the kernel answers some, and the time of others is set later), but once it
            // is later than the last change it stays for a day, whatever is read.
            let unchanged = (old_right.mtime, old_right.ctime) == (right.mtime, right.ctime);
            if unchanged && old_got.atime > old_got.mtime.max(old_got.ctime) {
                same(old_got.atime == got.atime, "atime changed though it was later than the last change")?;
            }
            same(old_got.atime <= got.atime, "atime went back")?;
        }
        Ok(())
    }

    /// Two inodes that live at the same time must differ: no two oracle inodes seen have one number.
    pub fn check_identities(&self, live: impl Fn(u64) -> bool) -> Result<(), String> {
        let mut seen = BTreeMap::new();
        for (oracle, real) in self.real_of.iter().filter(|(o, _)| live(**o)) {
            if let Some(other) = seen.insert(*real, *oracle) {
                return Err(format!("two files have inode number {real} (the oracle's {oracle} and {other})"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::OpenHow;
    use crate::reference::Oracle;

    #[test]
    fn a_change_has_a_later_time_unless_a_program_set_one_in_between() {
        let mut oracle = Oracle::new();
        let path = || "a".to_owned();
        let how = OpenHow { write: true, create: true, ..OpenHow::default() };
        let write = Op::Write { slot: 0, offset: 0, len: 1, fill: 1 };
        let (chmod, utimes) = (Op::Chmod { path: path(), mode: 0o600 }, Op::Utimes { path: path(), mtime: 7 });
        let stat = Op::Stat { path: path() };
        oracle.run(0, &Op::Open { slot: 0, path: path(), how }).unwrap();
        // What is done before each look, and the mtime and ctime that are seen then.
        let mut seen = |traits: Traits, steps: &[(&[&Op], i64, i64)]| {
            let mut comparer = Comparer::with(traits);
            let mut result = Ok(());
            for (before, mtime, ctime) in steps {
                before.iter().for_each(|op| drop(oracle.run(0, op).unwrap()));
                let right = oracle.run(0, &stat).unwrap();
                let Reply::Stat(mut got) = right.clone() else { panic!("not a stat") };
                (got.mtime, got.ctime) = ((*mtime, 0), (*ctime, 0));
                result = result.and_then(|()| comparer.compare(&stat, &Ok(right), &Ok(Reply::Stat(got))));
            }
            result
        };
        let (fine, coarse) = (Traits::default(), Traits { coarse_times: true, ..Traits::default() });
        seen(fine, &[(&[], 50, 50), (&[&write], 51, 51), (&[&chmod], 51, 52), (&[], 51, 52)]).unwrap();
        for (mtime, ctime, what) in [(50, 51, "mtime is not later"), (51, 50, "ctime is not later")] {
            assert!(seen(fine, &[(&[], 50, 50), (&[&write], mtime, ctime)]).unwrap_err().contains(what));
            seen(coarse, &[(&[], 50, 50), (&[&write], mtime, ctime)]).unwrap();
        }
        assert!(seen(coarse, &[(&[], 50, 50), (&[&write], 49, 51)]).unwrap_err().contains("mtime is not later"));
        assert!(seen(fine, &[(&[], 50, 50), (&[&chmod], 51, 51)]).unwrap_err().contains("without a change of the data"));
        assert!(seen(fine, &[(&[], 50, 50), (&[&chmod], 50, 50)]).unwrap_err().contains("ctime is not later"));
        // One that was set, in between or before, may be far ahead.
        seen(fine, &[(&[], 50, 50), (&[&utimes, &write], 49, 51)]).unwrap();
        seen(fine, &[(&[&utimes], 7, 50), (&[&write], 6, 51)]).unwrap();
        assert!(seen(fine, &[(&[&utimes], 7, 50), (&[&write], 7, 51)]).unwrap_err().contains("what a program set"));
    }

    #[test]
    fn an_access_time_changes_once_after_each_change() {
        let mut oracle = Oracle::new();
        let path = || "a".to_owned();
        let how = OpenHow { write: true, create: true, ..OpenHow::default() };
        oracle.run(0, &Op::Open { slot: 0, path: path(), how }).unwrap();
        let (write, stat) = (Op::Write { slot: 0, offset: 0, len: 1, fill: 1 }, Op::Stat { path: path() });
        // Whether the file is written before, and what atime is then; all changes are made in second 50.
        let mut seen = |steps: &[(bool, i64)]| {
            let mut comparer = Comparer::with(Traits { coarse_times: true, ..Traits::default() });
            let mut result = Ok(());
            for (change, atime) in steps {
                if *change {
                    oracle.run(0, &write).unwrap();
                }
                let right = oracle.run(0, &stat).unwrap();
                let Reply::Stat(mut got) = right.clone() else { panic!("not a stat") };
                (got.mtime, got.ctime, got.atime) = ((50, 0), (50, 0), (*atime, 0));
                result = comparer.compare(&stat, &Ok(right), &Ok(Reply::Stat(got)));
            }
            result
        };
        seen(&[(false, 50), (false, 51), (true, 51), (false, 52), (false, 52)]).unwrap();
        assert!(seen(&[(false, 51), (false, 52)]).unwrap_err().contains("later than the last change"));
        assert!(seen(&[(false, 51), (true, 50)]).unwrap_err().contains("went back"));
    }
}
