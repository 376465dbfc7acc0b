//! Whose answers the kernel may not have taken in yet.
//!
//! An answer is taken in by the thread that asked, when it gets to run, and how depends on what has happened since it asked:
//! - an *ordinary* answer (LOOKUP, GETATTR, READDIRPLUS) is lost if the kernel took in another one, an invalidation or a change
//!   of the same inode meanwhile, or while a thread sets the file's size (`fc->attr_version`, `FUSE_I_SIZE_UNSTABLE`);
//! - a *forced* one (SETATTR, LINK, CREATE) is taken in whatever has happened;
//! - a *change* of data (WRITE, `fallocate`, opening with `O_TRUNC`) has no attributes in its answer, and makes others lose theirs.
//!
//! A thread that asks something else has taken in, or lost, what it was told before: it is *heard*. Nothing else proves it, short
//! of asking the kernel what it has (`probe`).
//!
//! Invariants:
//! - What `hear` says was taken in is what the kernel has, or something newer.
//! - The list is bounded. What falls off it counts as never heard, until the kernel has been asked.
//!
//! Excludes: what follows from it (`known`).

/// Answers remembered per inode.
const UNHEARD_MAX: usize = 8;

/// How the kernel takes something in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An ordinary answer. `sure`: nothing is known that could make the kernel lose it. `settles`: it was true when it was sent.
    Ordinary {
        sure: bool,
        settles: bool,
    },
    Forced {
        settles: bool,
    },
    Change,
}

/// What a thread was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    thread: u32,
    kind: Kind,
    /// The version of the data that it was told of.
    version: u64,
}

/// What is known now that a thread is here again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// An answer that was true when it was sent, and was not taken back since, has been dealt with.
    pub(super) settled: bool,
    /// The kernel has this version's attributes.
    pub(super) taken_in: Option<u64>,
}

/// Answers about one inode that may not have been taken in, in the order in which they were sent.
#[derive(Debug, Default)]
pub(super) struct Unheard {
    sent: Vec<Sent>,
    /// Changes under way.
    changing: u16,
    /// An entry was dropped.
    overflowed: bool,
}

impl Unheard {
    pub(super) fn is_empty(&self) -> bool {
        self.sent.is_empty() && self.changing == 0 && !self.overflowed
    }

    /// A thread is about to be sent this.
    pub(super) fn send(&mut self, thread: u32, version: u64, mut kind: Kind) {
        if let Kind::Ordinary { sure, .. } = &mut kind {
            *sure = *sure && self.changing == 0 && !self.sent.iter().any(|s| s.kind == Kind::Change && s.thread != thread);
        }
        self.sent.retain(|s| s.thread != thread);
        if self.sent.len() == UNHEARD_MAX {
            self.sent.remove(0);
            self.overflowed = true;
        }
        self.sent.reserve_exact(1);
        self.sent.push(Sent { thread, kind, version });
    }

    /// A thread is here again.
    pub(super) fn hear(&mut self, thread: u32) -> Heard {
        let Some(at) = self.sent.iter().position(|s| s.thread == thread) else { return Heard::default() };
        let was = self.sent.remove(at);
        let (settled, sure) = match was.kind {
            Kind::Ordinary { sure, settles } => (settles, sure),
            Kind::Forced { settles } => (settles, true),
            Kind::Change => (false, false),
        };
        // If another one was taken in before, it was of the same version.
        let agreed = self.changing == 0 && !self.overflowed;
        let agreed = agreed && self.sent.iter().all(|s| s.kind != Kind::Change && s.version == was.version);
        Heard { settled, taken_in: (sure && agreed).then_some(was.version) }
    }

    /// An invalidation makes the kernel lose ordinary answers that are on their way.
    pub(super) fn shake(&mut self) {
        for s in &mut self.sent {
            if let Kind::Ordinary { sure, .. } = &mut s.kind {
                *sure = false;
            }
        }
    }

    /// What was sent so far is not true any more.
    pub(super) fn revoke(&mut self) {
        for s in &mut self.sent {
            if let Kind::Ordinary { settles, .. } | Kind::Forced { settles } = &mut s.kind {
                *settles = false;
            }
        }
    }

    pub(super) fn begin_change(&mut self) {
        self.changing = self.changing.saturating_add(1);
        self.shake();
    }

    /// A change ends: its thread is about to be told.
    pub(super) fn end_change(&mut self, thread: u32) {
        self.changing = self.changing.saturating_sub(1);
        self.shake();
        if thread != 0 {
            self.send(thread, 0, Kind::Change);
        }
    }

    /// Whether somebody changes the data, or may not have taken in yet that he did.
    pub(super) fn is_changing(&self) -> bool {
        self.changing > 0 || self.sent.iter().any(|s| s.kind == Kind::Change)
    }

    /// Whether a change is under way.
    pub(super) fn is_under_change(&self) -> bool {
        self.changing > 0
    }

    /// Whether somebody was told something that has not been taken back since.
    pub(super) fn may_settle(&self) -> bool {
        self.sent.iter().any(|s| matches!(s.kind, Kind::Ordinary { settles: true, .. } | Kind::Forced { settles: true }))
    }

    /// What this thread was told last, and whether others were sent ordinary answers since.
    pub(super) fn last(&self, thread: u32) -> Option<(u64, bool)> {
        let at = self.sent.iter().position(|s| s.thread == thread)?;
        let is_ordinary = |s: &Sent| matches!(s.kind, Kind::Ordinary { .. });
        Some((self.sent[at].version, self.sent[at + 1..].iter().any(is_ordinary)))
    }

    /// The kernel is known to have newer attributes than ordinary answers could give it.
    pub(super) fn outdate(&mut self) {
        self.sent.retain(|s| !matches!(s.kind, Kind::Ordinary { .. }));
        self.overflowed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDINARY: Kind = Kind::Ordinary { sure: true, settles: true };

    fn took(unheard: &mut Unheard, thread: u32) -> Option<u64> {
        unheard.hear(thread).taken_in
    }

    #[test]
    fn who_comes_again_has_taken_in_what_nothing_could_make_the_kernel_lose() {
        let mut u = Unheard::default();
        u.send(1, 7, ORDINARY);
        assert_eq!(u.hear(2), Heard::default());
        assert_eq!(u.hear(1), Heard { settled: true, taken_in: Some(7) });
        assert!(u.is_empty());
        // Of another version: whichever is taken in first makes the kernel lose the other.
        u.send(1, 7, ORDINARY);
        u.send(2, 8, ORDINARY);
        assert_eq!((took(&mut u, 1), took(&mut u, 2)), (None, Some(8)));
        // Of the same one: never mind which.
        u.send(1, 9, ORDINARY);
        u.send(2, 9, ORDINARY);
        assert_eq!((took(&mut u, 1), took(&mut u, 2)), (Some(9), Some(9)));
    }

    #[test]
    fn an_invalidation_and_a_change_make_the_kernel_lose_ordinary_answers() {
        let mut u = Unheard::default();
        u.send(1, 7, ORDINARY);
        u.send(2, 7, Kind::Forced { settles: true });
        u.shake();
        assert_eq!((took(&mut u, 1), took(&mut u, 2)), (None, Some(7)));
        u.send(1, 7, ORDINARY);
        u.begin_change();
        u.end_change(2);
        assert!(u.is_changing());
        assert_eq!(took(&mut u, 1), None, "lost");
        u.send(1, 7, ORDINARY);
        assert_eq!(u.hear(2), Heard::default());
        assert_eq!(took(&mut u, 1), None, "when it was sent the end of the change had not been taken in");
        u.send(1, 7, ORDINARY);
        assert!(!u.is_changing());
        assert_eq!(took(&mut u, 1), Some(7));
    }

    #[test]
    fn what_was_revoked_settles_nothing() {
        let mut u = Unheard::default();
        u.send(1, 7, ORDINARY);
        assert!(u.may_settle());
        u.revoke();
        assert!(!u.may_settle());
        assert_eq!(u.hear(1), Heard { settled: false, taken_in: Some(7) });
    }

    #[test]
    fn what_falls_off_is_never_taken_for_heard() {
        let mut u = Unheard::default();
        for thread in 1..=UNHEARD_MAX as u32 + 1 {
            u.send(thread, u64::from(thread > 1), ORDINARY);
        }
        assert_eq!(u.hear(1), Heard::default());
        assert_eq!(took(&mut u, 2), None, "the one that fell off may have been taken in since");
        u.outdate();
        u.send(3, 2, ORDINARY);
        assert_eq!(took(&mut u, 3), Some(2));
    }

    #[test]
    fn the_last_answer_of_a_thread_is_overtaken_by_those_sent_after_it() {
        let mut u = Unheard::default();
        u.send(1, 7, ORDINARY);
        u.send(2, 8, ORDINARY);
        u.end_change(3);
        assert_eq!((u.last(1), u.last(2), u.last(4)), (Some((7, true)), Some((8, false)), None));
    }
}
