//! Answers that the kernel may not have taken in yet.
//!
//! An answer is taken in by the thread that asked, when it gets to run, and how depends on what has happened since it asked:
//! - an *ordinary* answer (LOOKUP, GETATTR, READDIRPLUS) is lost if the kernel took in another one, an invalidation or a change
//!   of the same inode meanwhile, or while a thread sets the file's size, which the kernel begins to do before it tells us
//!   (`fc->attr_version`, `FUSE_I_SIZE_UNSTABLE`);
//! - a *forced* one (SETATTR, LINK, CREATE) is taken in even if the kernel has taken in something newer;
//! - a *change* of data (WRITE, `fallocate`, `copy_file_range`) has no attributes in its answer, and makes others lose theirs.
//!
//! A thread that asks something else is done with what it was told before: it is *heard*. That the kernel has kept it is proved
//! by that for directories, whose answers only an invalidation or another answer can make it lose. For files only asking the kernel
//! proves it (`probe`), and then whoever is not heard yet may still *undo* it: with a forced answer of another version; with a
//! change that ended beyond where another node has cut the file since; or with one that made zeros, which the kernel makes in its
//! pages, too, when it takes the answer in, over what another node has written there since.
//!
//! Where an append ends the kernel reckons from the size that it takes the file to have when the append begins. If another node had
//! cut the file by then, or does so before the append has its turn, the append's end undoes that whenever it is done. So it counts
//! from the beginning.
//!
//! Invariants:
//! - The list is bounded. If anything falls off it that could still undo something, so may whoever is not on it.
//!
//! Excludes: what follows from it (`known`).

/// Answers remembered per inode.
const UNHEARD_MAX: usize = 8;

/// What tells one state of a file's data from another, as far as the kernel keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Data {
    pub(crate) version: u64,
    pub(crate) size: u64,
}

/// What was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The attributes of a directory.
    Directory,
    /// A file's attributes, to a thread of ours that asks for them in order to see what the kernel takes in.
    Asked { version: u64 },
    /// A file's attributes, which are taken in in any case.
    Forced { version: u64 },
    /// That the data was changed.
    Change(Reach),
}

/// What the kernel does by itself when it takes in that data was changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// If it takes the file for shorter than this, it corrects itself.
    pub(crate) end: u64,
    /// It makes zeros in pages.
    pub(crate) zeros: bool,
}

impl Reach {
    fn and(self, other: Reach) -> Reach {
        Reach { end: self.end.max(other.end), zeros: self.zeros || other.zeros }
    }

    fn undoes(self, size: u64) -> bool {
        self.zeros || self.end > size
    }
}

/// What follows from hearing of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// The kernel was told, of a directory, what still holds.
    pub(super) settled: bool,
    /// Pages may have been changed that were newer.
    pub(super) spoiled: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    thread: u32,
    kind: Kind,
    /// What was told was true then, and was not taken back since. Of an append that is under way: what the kernel takes for its end.
    holds: bool,
}

impl Sent {
    fn spoils(&self) -> bool {
        matches!(self.kind, Kind::Change(Reach { zeros: true, .. }))
    }
}

/// Answers about one inode that may not have been taken in.
#[derive(Debug, Default)]
pub(super) struct Unheard {
    sent: Vec<Sent>,
    /// Changes under way.
    changing: u16,
    /// A forced answer fell off the list.
    overflowed: bool,
    /// What changes that fell off it do together.
    lost: Reach,
}

impl Unheard {
    pub(super) fn is_empty(&self) -> bool {
        self.sent.is_empty() && self.changing == 0 && !self.overflowed && self.lost == Reach::default()
    }

    /// A thread is about to be sent this. `holds`: it is true now.
    pub(super) fn send(&mut self, thread: u32, kind: Kind, holds: bool) {
        self.sent.retain(|s| s.thread != thread);
        if self.sent.len() == UNHEARD_MAX {
            match self.sent.remove(0).kind {
                Kind::Forced { .. } => self.overflowed = true,
                Kind::Change(reach) => self.lost = self.lost.and(reach),
                Kind::Directory | Kind::Asked { .. } => {}
            }
        }
        self.sent.reserve_exact(1);
        self.sent.push(Sent { thread, kind, holds });
    }

    /// A thread is here again.
    pub(super) fn hear(&mut self, thread: u32) -> Heard {
        let Some(at) = self.sent.iter().position(|s| s.thread == thread) else { return Heard::default() };
        let was = self.sent.remove(at);
        Heard { settled: was.kind == Kind::Directory && was.holds, spoiled: was.spoils() }
    }

    /// What was sent so far does not hold any more.
    pub(super) fn revoke(&mut self) {
        for sent in &mut self.sent {
            sent.holds = false;
        }
    }

    pub(super) fn begin_change(&mut self) {
        self.changing = self.changing.saturating_add(1);
    }

    /// A change that has begun is an append, which the kernel takes to end here. `holds`: it has the right size for that.
    pub(super) fn append(&mut self, thread: u32, end: u64, holds: bool) {
        if thread != 0 {
            self.send(thread, Kind::Change(Reach { end, zeros: false }), holds);
        }
    }

    /// A change has been made; its thread will be told.
    pub(super) fn reach(&mut self, thread: u32, reach: Reach) {
        if thread != 0 {
            self.send(thread, Kind::Change(reach), false);
        }
    }

    /// A change ends: its thread is about to be told.
    pub(super) fn end_change(&mut self, thread: u32, reach: Reach) {
        self.changing = self.changing.saturating_sub(1);
        self.reach(thread, reach);
    }

    /// Whether a change is under way.
    pub(super) fn is_under_change(&self) -> bool {
        self.changing > 0
    }

    /// Whether a change is under way, or who made one may not have taken in yet that it did.
    pub(super) fn is_changing(&self) -> bool {
        self.changing > 0 || self.sent.iter().any(|s| matches!(s.kind, Kind::Change(_)))
    }

    /// What a thread of ours was told when it asked: the version, and whether it still holds.
    pub(super) fn asked(&self, thread: u32) -> Option<(u64, bool)> {
        self.sent.iter().find_map(|s| match s.kind {
            Kind::Asked { version } if s.thread == thread => Some((version, s.holds)),
            _ => None,
        })
    }

    /// Whether somebody may still make the kernel have other data attributes than these.
    pub(super) fn may_undo(&self, told: Data) -> bool {
        let undoes = |s: &Sent| match s.kind {
            Kind::Forced { version } => version != told.version,
            Kind::Change(reach) => !s.holds && reach.undoes(told.size),
            Kind::Directory | Kind::Asked { .. } => false,
        };
        self.overflowed || self.lost.undoes(told.size) || self.sent.iter().any(undoes)
    }

    /// Whether somebody may still make the kernel take in what does not hold any more.
    pub(super) fn may_unsettle(&self) -> bool {
        self.overflowed || self.sent.iter().any(|s| matches!(s.kind, Kind::Forced { .. }) && !s.holds)
    }

    /// Whether somebody may still make the kernel take in what was told before.
    pub(super) fn may_be_forced(&self) -> bool {
        self.overflowed || self.sent.iter().any(|s| matches!(s.kind, Kind::Forced { .. }))
    }

    /// Threads that are gone have taken in what they were told. Returns whether pages may have been spoiled.
    pub(super) fn hear_gone(&mut self, is_gone: impl Fn(u32) -> bool) -> bool {
        let spoiled = self.sent.iter().any(|s| s.spoils() && is_gone(s.thread));
        self.sent.retain(|s| !is_gone(s.thread));
        spoiled
    }

    /// What could undo something is taken for taken in: its threads are there and do other things, or do not get to run. Returns
    /// whether pages may have been spoiled.
    pub(super) fn give_up(&mut self) -> bool {
        let spoiled = self.lost.zeros || self.sent.iter().any(Sent::spoils);
        self.sent.retain(|s| !matches!(s.kind, Kind::Forced { .. } | Kind::Change(_)));
        (self.overflowed, self.lost) = (false, Reach::default());
        spoiled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_again_has_taken_in_what_it_was_told_of_a_directory() {
        let mut u = Unheard::default();
        u.send(1, Kind::Directory, true);
        u.send(2, Kind::Directory, false);
        assert!(!u.hear(3).settled && u.hear(1).settled && !u.hear(1).settled && !u.hear(2).settled);
        assert!(u.is_empty());
        u.send(1, Kind::Directory, true);
        u.revoke();
        assert!(!u.hear(1).settled);
        u.send(1, Kind::Asked { version: 1 }, true);
        assert!(!u.hear(1).settled, "of a file it proves nothing");
    }

    #[test]
    fn a_forced_answer_may_undo_another_version_until_its_thread_is_heard() {
        let of = |version| Data { version, size: 10 };
        let mut u = Unheard::default();
        u.send(1, Kind::Forced { version: 7 }, true);
        u.send(2, Kind::Asked { version: 8 }, true);
        assert!(u.may_undo(of(8)) && !u.may_undo(of(7)) && !u.may_unsettle());
        assert_eq!((u.asked(2), u.asked(1)), (Some((8, true)), None));
        u.revoke();
        assert!(u.may_unsettle(), "the mode may be another by now");
        u.hear(1);
        assert!(!u.may_undo(of(8)) && !u.may_unsettle());
        u.send(1, Kind::Forced { version: 7 }, true);
        u.hear_gone(|thread| thread == 3);
        assert!(u.may_undo(of(8)));
        u.hear_gone(|thread| thread == 1);
        assert!(!u.may_undo(of(8)));
        u.send(1, Kind::Forced { version: 7 }, true);
        u.give_up();
        assert!(!u.may_undo(of(8)));
        assert_eq!(u.asked(2), Some((8, false)));
    }

    #[test]
    fn a_change_may_undo_a_size_below_its_end() {
        let of = |size| Data { version: 7, size };
        let mut u = Unheard::default();
        u.begin_change();
        u.end_change(1, Reach { end: 10, zeros: false });
        assert!(!u.may_undo(of(10)) && u.may_undo(of(9)));
        assert!(!u.hear(1).spoiled);
        assert!(!u.may_undo(of(9)));
    }

    #[test]
    fn an_append_under_way_undoes_a_size_that_another_node_has_cut() {
        let of = |size| Data { version: 7, size };
        let mut u = Unheard::default();
        u.begin_change();
        u.append(1, 12, true);
        assert!(!u.may_undo(of(10)), "that is its right end");
        u.revoke();
        assert!(u.may_undo(of(10)) && !u.may_undo(of(12)));
        // It was made where the file ended by then.
        u.reach(1, Reach { end: 12, zeros: false });
        u.end_change(1, Reach { end: 12, zeros: false });
        assert!(u.may_undo(of(7)));
        u.hear(1);
        assert!(!u.may_undo(of(7)));
        u.begin_change();
        u.append(1, 12, false);
        assert!(u.may_undo(of(10)), "the kernel had another size from the beginning");
        u.end_change(1, Reach::default());
        assert!(!u.may_undo(of(10)), "it failed");
    }

    #[test]
    fn zeros_spoil_pages_until_their_thread_is_heard() {
        let of = Data { version: 7, size: 10 };
        let zeros = Reach { end: 0, zeros: true };
        let mut u = Unheard::default();
        u.begin_change();
        u.end_change(1, zeros);
        assert!(u.may_undo(of) && u.hear(1).spoiled && !u.may_undo(of));
        u.reach(1, zeros);
        assert!(!u.hear_gone(|thread| thread == 2) && u.hear_gone(|thread| thread == 1));
        u.reach(1, zeros);
        assert!(u.give_up() && !u.give_up());
    }

    #[test]
    fn what_falls_off_may_still_undo_something_if_it_could_before() {
        let of = Data { version: 7, size: 10 };
        let mut u = Unheard::default();
        let fill = |u: &mut Unheard| (2..=UNHEARD_MAX as u32 + 1).for_each(|thread| u.send(thread, Kind::Directory, false));
        u.send(1, Kind::Directory, false);
        fill(&mut u);
        assert!(!u.may_undo(of));
        u.send(1, Kind::Forced { version: 7 }, true);
        fill(&mut u);
        u.send(20, Kind::Directory, false);
        u.send(21, Kind::Directory, false);
        assert!(u.may_undo(of) && u.may_unsettle());
        assert!(!u.give_up() && !u.may_undo(of));
        // Of many who write, those within the file undo nothing.
        let write = |u: &mut Unheard, end| (1..=20).for_each(|thread| u.reach(thread, Reach { end, zeros: false }));
        write(&mut u, 10);
        assert!(!u.may_undo(of) && u.may_undo(Data { size: 9, ..of }));
        write(&mut u, 11);
        assert!(u.may_undo(of) && !u.give_up());
    }

    #[test]
    fn a_change_lasts_until_its_thread_is_heard() {
        let mut u = Unheard::default();
        u.begin_change();
        assert!(u.is_under_change() && u.is_changing());
        u.end_change(3, Reach::default());
        assert!(!u.is_under_change() && u.is_changing());
        u.hear(3);
        assert!(!u.is_changing() && u.is_empty());
    }
}
