//! The byte-range locks of one object in one space: POSIX record-lock semantics, pure.
//!
//! An owner's locks never conflict with each other: a new one replaces what it covers of the old ones (splitting or
//! merging them). A flock is a lock on the whole range, in a table of its own.
//!
//! Invariants:
//! - The ranges of one owner do not overlap, and touching ranges of one owner and kind are merged.
//! - Locks are kept in order, of owners and then of places.
//! - Ranges of different owners overlap only if both are `Read`.
//!
//! Excludes: waiting (`master`), and who the owners are.

use serde::{Deserialize, Serialize};

/// Shared or exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LockKind {
    /// Others may hold `Read` locks on the same bytes.
    Read,
    /// Nobody else holds a lock on the same bytes.
    Write,
}

/// Bytes `start..=end` of a file; `end` is `u64::MAX` for "to the end of the file, however it grows".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockRange {
    /// The first byte.
    pub start: u64,
    /// The last byte.
    pub end: u64,
}

impl LockRange {
    /// Every byte.
    pub const ALL: LockRange = LockRange { start: 0, end: u64::MAX };

    /// Whether the two have a byte in common.
    #[must_use]
    pub fn overlaps(self, other: LockRange) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    /// Whether they overlap or the one begins right behind the other.
    fn touches(self, other: LockRange) -> bool {
        self.overlaps(other) || self.end.checked_add(1) == Some(other.start) || other.end.checked_add(1) == Some(self.start)
    }
}

/// A lock that is held.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HeldLock<O> {
    /// Whose it is.
    pub owner: O,
    /// Which bytes.
    pub range: LockRange,
    /// How.
    pub kind: LockKind,
    /// The process that took it, as `F_GETLK` answers it.
    pub pid: u32,
}

/// The locks of one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockTable<O> {
    held: Vec<HeldLock<O>>,
}

impl<O> Default for LockTable<O> {
    fn default() -> Self {
        LockTable { held: Vec::new() }
    }
}

impl<O: Clone + Eq + Ord> LockTable<O> {
    /// Whether nothing is locked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// All locks that are held.
    #[must_use]
    pub fn held(&self) -> &[HeldLock<O>] {
        &self.held
    }

    /// The first lock (by place) that keeps `owner` from taking this one.
    #[must_use]
    pub fn conflict(&self, owner: &O, range: LockRange, kind: LockKind) -> Option<&HeldLock<O>> {
        self.conflicts(owner, range, kind).min_by_key(|h| h.range)
    }

    /// All locks that keep `owner` from taking this one.
    pub fn conflicts(&self, owner: &O, range: LockRange, kind: LockKind) -> impl Iterator<Item = &HeldLock<O>> + use<'_, O> {
        let owner = owner.clone();
        let excludes = move |h: &&HeldLock<O>| kind == LockKind::Write || h.kind == LockKind::Write;
        self.held.iter().filter(move |h| h.owner != owner && h.range.overlaps(range)).filter(excludes)
    }

    /// Takes a lock that does not conflict. It replaces what the owner held of these bytes.
    ///
    /// # Panics
    /// If it conflicts: callers ask `conflict` first.
    pub fn lock(&mut self, lock: HeldLock<O>) {
        assert!(self.conflict(&lock.owner, lock.range, lock.kind).is_none(), "a lock was granted over another owner's");
        self.unlock(&lock.owner, lock.range);
        let mut merged = lock;
        let at = self.held.partition_point(|h| (&h.owner, h.range) < (&merged.owner, merged.range));
        let joins = |h: &HeldLock<O>| h.owner == merged.owner && h.kind == merged.kind && h.range.touches(merged.range);
        let before = at.checked_sub(1).filter(|before| joins(&self.held[*before]));
        let behind = self.held.get(at).filter(|h| joins(h)).map(|h| h.range.end);
        let first = before.unwrap_or(at);
        let end = at + usize::from(behind.is_some());
        merged.range.start = before.map_or(merged.range.start, |before| self.held[before].range.start);
        merged.range.end = behind.unwrap_or(merged.range.end);
        self.held.splice(first..end, [merged]);
    }

    /// Gives up whatever the owner holds of these bytes. Says whether it held any.
    pub fn unlock(&mut self, owner: &O, range: LockRange) -> bool {
        // Those of one owner do not overlap, so that they end in the order in which they begin.
        let first = self.held.partition_point(|h| (&h.owner, h.range.end) < (owner, range.start));
        let count = self.held[first..].partition_point(|h| h.owner == *owner && h.range.start <= range.end);
        if count == 0 {
            return false;
        }
        let (head, tail) = (self.held[first].clone(), self.held[first + count - 1].clone());
        let left = (head.range.start < range.start)
            .then(|| HeldLock { range: LockRange { start: head.range.start, end: range.start - 1 }, ..head });
        let right = (tail.range.end > range.end)
            .then(|| HeldLock { range: LockRange { start: range.end + 1, end: tail.range.end }, ..tail });
        self.held.splice(first..first + count, left.into_iter().chain(right));
        true
    }

    /// Turns what the owner holds of these bytes into `Read` locks.
    pub fn downgrade(&mut self, owner: &O, range: LockRange) {
        let parts: Vec<HeldLock<O>> = self
            .held
            .iter()
            .filter(|h| h.owner == *owner && h.kind == LockKind::Write && h.range.overlaps(range))
            .map(|h| HeldLock {
                range: LockRange { start: h.range.start.max(range.start), end: h.range.end.min(range.end) },
                kind: LockKind::Read,
                ..h.clone()
            })
            .collect();
        for part in parts {
            self.lock(part);
        }
    }

    /// Drops every lock whose owner fails the test. Says whether any was dropped.
    pub fn retain(&mut self, mut alive: impl FnMut(&O) -> bool) -> bool {
        let before = self.held.len();
        self.held.retain(|h| alive(&h.owner));
        self.held.len() != before
    }

    /// Panics if an invariant of this file is broken.
    pub fn check_invariants(&self) {
        assert!(self.held.is_sorted(), "locks are out of order");
        for (i, a) in self.held.iter().enumerate() {
            assert!(a.range.start <= a.range.end, "an empty range is locked");
            for b in &self.held[i + 1..] {
                if a.owner == b.owner {
                    assert!(!a.range.overlaps(b.range), "an owner holds the same byte twice");
                    assert!(a.kind != b.kind || !a.range.touches(b.range), "touching locks were not merged");
                } else if a.range.overlaps(b.range) {
                    assert!(a.kind == LockKind::Read && b.kind == LockKind::Read, "conflicting locks are held");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-by-byte model: for each owner and each of 16 bytes, how it is locked.
    #[derive(Default)]
    struct Bytes([[Option<LockKind>; 16]; 3]);

    impl Bytes {
        fn conflicts(&self, owner: usize, range: LockRange, kind: LockKind) -> bool {
            (0..3).filter(|o| *o != owner).any(|o| {
                (range.start..=range.end).any(|b| match self.0[o][usize::try_from(b).unwrap()] {
                    None => false,
                    Some(k) => k == LockKind::Write || kind == LockKind::Write,
                })
            })
        }
        fn set(&mut self, owner: usize, range: LockRange, to: Option<LockKind>) {
            for b in range.start..=range.end {
                self.0[owner][usize::try_from(b).unwrap()] = to;
            }
        }
    }

    #[test]
    fn behaves_as_a_table_of_single_bytes() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |n: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % n
        };
        for _ in 0..200 {
            let mut table = LockTable::default();
            let mut model = Bytes::default();
            for _ in 0..100 {
                let owner = usize::try_from(next(3)).unwrap();
                let a = next(16);
                let b = next(16);
                let range = LockRange { start: a.min(b), end: a.max(b) };
                match next(3) {
                    0 => {
                        table.unlock(&owner, range);
                        model.set(owner, range, None);
                    }
                    k => {
                        let kind = if k == 1 { LockKind::Read } else { LockKind::Write };
                        assert_eq!(table.conflict(&owner, range, kind).is_some(), model.conflicts(owner, range, kind));
                        if !model.conflicts(owner, range, kind) {
                            table.lock(HeldLock { owner, range, kind, pid: 1 });
                            model.set(owner, range, Some(kind));
                        }
                    }
                }
                table.check_invariants();
                for o in 0..3 {
                    for byte in 0..16u64 {
                        let here =
                            table.held().iter().find(|h| h.owner == o && h.range.overlaps(LockRange { start: byte, end: byte }));
                        assert_eq!(here.map(|h| h.kind), model.0[o][usize::try_from(byte).unwrap()]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_lock_to_the_end_of_the_file_does_not_overflow() {
        let mut t = LockTable::default();
        t.lock(HeldLock { owner: 1, range: LockRange::ALL, kind: LockKind::Write, pid: 1 });
        assert!(t.conflict(&2, LockRange { start: u64::MAX, end: u64::MAX }, LockKind::Read).is_some());
        t.unlock(&1, LockRange { start: 10, end: u64::MAX });
        assert!(t.conflict(&2, LockRange { start: 10, end: u64::MAX }, LockKind::Write).is_none());
        assert!(t.conflict(&2, LockRange { start: 9, end: 9 }, LockKind::Write).is_some());
    }
}
