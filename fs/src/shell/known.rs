//! What one kernel mount was told, and so may still believe.
//!
//! For every inode that the kernel knows: how often it looked it up, whether it holds attributes, and until when names, on the
//! strength of a token, which version of its data it was seen to have, and how old its pages may be.
//!
//! Invariants:
//! - `attributes` (`Names::told_at`) is set before a reply that lets the kernel believe something leaves, and cleared only by
//!   what then tells the kernel (or waits). So a revocation never misses a reply.
//! - An operation that began before an inode was last revoked answers with a lifetime of zero: its token may be gone.
//! - An inode that was revoked is believed again only once the kernel has surely taken in an answer since (`settled`).
//! - A file's attributes are believed only while its pages are as new as they are, and nobody on this node changes its data.
//! - A `read()` through the page cache goes on only when the kernel was seen to have the size that goes with its answer, and has no
//!   older pages; else it is *doubtful*, and waits until the kernel was made to (`notify`). Opening a file, for which the kernel
//!   checks its mode, waits in the same way until it was seen to have that; and so, since it cannot be told from these, does
//!   whoever asks for a file's attributes.
//!
//! Why replies need no lock: the kernel notes its attribute version when it *sends* LOOKUP, GETATTR and
//! READDIRPLUS, and drops from the answer what an invalidation has overtaken. It does not do so for SETATTR, CREATE, MKDIR
//! and the like: their answers carry attributes with a lifetime of zero.
//!
//! What is dropped is lost: the `read()` that asked goes on with the size that the kernel had before. That is right only if this
//! was true when the `read()` began, so an invalidation must never overtake the first answer since the inode was revoked. Hence
//! *settling*: that answer is given no lifetime, so that a further revocation has nothing to take back and sends nothing. When
//! the same thread comes again it has taken its answer in, and from then on losing one harms nobody.
//!
//! That will do for directories. Of a file the kernel also drops any answer while a thread sets the size. And when an answer
//! makes it drop old pages it does so *after* it has taken the new time in, so that a second thread, told the same, sees nothing
//! new and reads the old pages. Neither can be seen from the answers; therefore files are settled by asking the kernel what it
//! has, and by purging, and no answer is relied on for either. Where it cannot be asked, the next best is done (`assume`).
//!
//! Excludes: telling the kernel (`notify`), what the answers mean (`fuse`), which of them may be on their way (`unheard`).

use super::names::{self, Found, Names};
pub(crate) use super::unheard::{Data, Reach};
use super::unheard::{Kind, Unheard};
use crate::Attributes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Locks, so that threads seldom meet.
const SHARDS: usize = 64;
/// Who asked about an inode will ask again within this time, or has stopped doing so.
const ASKS_AGAIN: Duration = Duration::from_secs(2);
/// How long the answer to a change is held back for the sake of who asks the kernel.
const HELD_MAX: Duration = Duration::from_millis(10);
/// Until requests that are under way may have been answered.
const BUSY: Duration = Duration::from_millis(3);

/// Numbers revocations: taken when an operation begins, compared when it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

/// An answer with attributes, about to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    /// Who asked; 0: not known.
    pub(crate) thread: u32,
    pub(crate) generation: u64,
    /// The version of the data; none: it is no file.
    pub(crate) version: Option<u64>,
    /// It answers a look-up.
    pub(crate) looked_up: bool,
    /// Of this name.
    pub(crate) found: Option<Found>,
    pub(crate) how: How,
}

/// What is to be done now that the kernel was seen to have what our thread was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing: it has no pages, or of this version.
    Done,
    /// Purge its pages; from now on until `purged`.
    Purge,
    /// Ask again: somebody else's answer may still undo it.
    Again,
}

/// How the kernel takes an answer in (see `unheard`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// If nothing has overtaken it: LOOKUP, GETATTR, READDIRPLUS.
    Ordinary,
    /// So, too; and a thread of ours has asked.
    Ours,
    /// In any case: SETATTR, CREATE, LINK and the like.
    Forced,
}

/// When something happened, in units of 10 ms since the table was made; 0: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Stamp(u32);

/// More than one thread.
const SEVERAL: u32 = u32::MAX;

/// The unit of `Stamp`.
const STAMP_MS: u128 = 10;
const STAMP: Duration = Duration::from_millis(STAMP_MS as u64);

/// What is kept of each inode that the kernel knows, and there may be millions. What few of them need is in `Rest`.
#[derive(Debug, Default)]
struct Inode {
    generation: u64,
    revoked: u64,
    /// See `pages()`.
    pages: u64,
    /// See `taken_in()`.
    taken_in: u64,
    rest: Option<Box<Rest>>,
    /// The name that it was told by last; the default: none that still holds, as far as is known.
    found: Found,
    /// One that reached the maximum is not counted any more, and the inode never forgotten.
    lookups: u32,
    revoked_at: Stamp,
    asked_at: Stamp,
    /// When names that lead to it may have been told last.
    found_at: Stamp,
    /// The thread that was told attributes to be believed, and may not have taken them in yet; 0: none; `SEVERAL`.
    told: u32,
    has_taken_in: bool,
    has_pages: bool,
    attributes: bool,
    is_file: bool,
    /// The kernel has surely taken in an answer since the last revocation (of a file: was seen to have).
    settled: bool,
    /// Purges under way.
    purging: u8,
}

/// What is kept of some inodes only.
#[derive(Debug, Default)]
struct Rest {
    /// Of directories in which names were told.
    names: Option<Box<Names>>,
    unheard: Unheard,
    /// How often the kernel is just being asked.
    asked: u8,
    /// Look-ups in this directory that are under way.
    looking: u16,
    /// Names that are being moved from this directory to others.
    moving: u16,
    /// What it was when it was removed; who still holds it (as a working directory, by `O_PATH`) may ask, though nobody has it open.
    remains: Option<Box<Attributes>>,
}

impl Rest {
    fn is_empty(&self) -> bool {
        let Rest { names, unheard, asked, looking, moving, remains } = self;
        names.is_none() && unheard.is_empty() && *asked == 0 && *looking == 0 && *moving == 0 && remains.is_none()
    }
}

/// A change that is an append.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Append {
    /// Where the kernel takes it to end.
    pub(crate) end: u64,
    /// No other mount can have changed the file unnoticed by this one's kernel.
    pub(crate) alone: bool,
}

/// A change of a file's data that is under way.
#[derive(Debug)]
pub(crate) struct Changing<'a> {
    known: &'a Known,
    ino: u64,
    thread: u32,
    reach: Reach,
}

impl Changing<'_> {
    /// It has been made. From now on its answer may undo what another node does.
    pub(crate) fn reach(&mut self, reach: Reach) {
        self.reach = reach;
        if let Some(rest) = self.known.shard(self.ino).lock().get_mut(&self.ino).and_then(|inode| inode.rest.as_mut()) {
            rest.unheard.reach(self.thread, reach);
        }
    }

    /// It is done, but for the answer. Waits while the kernel is being asked about the file, for a moment: each end of a change makes
    /// it lose what it is told. Who asks needs no lock that a change holds in the kernel, nor a token that this one still has; but it
    /// may wait for a token itself, and for the size to be set.
    pub(crate) async fn finish(self) {
        if !self.known.is_asked(self.ino) {
            return;
        }
        let asked = async {
            loop {
                let answered = self.known.answered.notified();
                if !self.known.is_asked(self.ino) {
                    return;
                }
                answered.await;
            }
        };
        // Who is disturbed asks again.
        let _ = tokio::time::timeout(HELD_MAX, asked).await;
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut shard = self.known.shard(self.ino).lock();
        if let Some(rest) = shard.get_mut(&self.ino).and_then(|inode| inode.rest.as_mut()) {
            rest.unheard.end_change(self.thread, self.reach);
        }
    }
}

impl Inode {
    fn rest(&mut self) -> &mut Rest {
        self.rest.get_or_insert_default()
    }

    fn names(&self) -> Option<&Names> {
        self.rest.as_ref()?.names.as_deref()
    }

    fn names_mut(&mut self) -> Option<&mut Names> {
        self.rest.as_mut()?.names.as_deref_mut()
    }

    fn unheard(&self) -> Option<&Unheard> {
        self.rest.as_ref().map(|rest| &rest.unheard)
    }

    fn unheard_mut(&mut self) -> Option<&mut Unheard> {
        self.rest.as_mut().map(|rest| &mut rest.unheard)
    }

    /// The oldest data version that the kernel's pages may hold; `None`: it has no pages.
    fn pages(&self) -> Option<u64> {
        self.has_pages.then_some(self.pages)
    }

    fn set_pages(&mut self, pages: Option<u64>) {
        (self.has_pages, self.pages) = (pages.is_some(), pages.unwrap_or(0));
    }

    /// The kernel was seen to have this version's attributes, and can only get newer ones (but see `Unheard::may_undo`).
    fn taken_in(&self) -> Option<u64> {
        self.has_taken_in.then_some(self.taken_in)
    }

    fn set_taken_in(&mut self, version: Option<u64>) {
        (self.has_taken_in, self.taken_in) = (version.is_some(), version.unwrap_or(0));
    }

    /// Whether the kernel may have pages of other data than this.
    fn has_other_pages(&self, version: u64) -> bool {
        self.purging > 0 || self.pages().is_some_and(|pages| pages != version)
    }

    /// Whether the kernel must be asked before it can be relied on to have these attributes of a file, or newer ones.
    fn is_doubtful(&self, told: Data) -> bool {
        let may_be_undone = self.unheard().is_some_and(|unheard| unheard.may_undo(told));
        !self.settled || self.taken_in() < Some(told.version) || may_be_undone
    }

    /// A thread is here again.
    fn hear(&mut self, thread: u32) {
        if thread == 0 {
            return;
        }
        if self.told == thread {
            self.told = 0;
        }
        let Some(rest) = &mut self.rest else { return };
        let heard = rest.unheard.hear(thread);
        self.settled |= heard.settled;
        self.spoil(heard.spoiled);
        self.tidy();
    }

    /// Gives back what is not needed any more.
    fn tidy(&mut self) {
        if self.rest.as_ref().is_some_and(|rest| rest.is_empty()) {
            self.rest = None;
        }
    }

    /// Whatever pages it has may be of no version.
    fn spoil(&mut self, spoiled: bool) {
        if spoiled {
            self.pages = 0;
        }
    }

    /// A thread is about to be sent an answer.
    fn send(&mut self, answer: Answer, current: bool) {
        let kind = match (answer.version, answer.how) {
            (None, _) if self.settled => return,
            (None, _) => Kind::Directory,
            (Some(_), How::Ordinary) => return,
            (Some(version), How::Ours) => Kind::Asked { version },
            (Some(version), How::Forced) => Kind::Forced { version },
        };
        if answer.thread != 0 {
            self.rest().unheard.send(answer.thread, kind, current);
        }
    }

    /// What was told is not true any more: it is to be taken back.
    fn unsettle(&mut self, number: u64) {
        self.revoked = number;
        self.settled = false;
        if let Some(unheard) = self.unheard_mut() {
            unheard.revoke();
        }
    }

    fn revoke(&mut self, number: u64) -> Forgotten {
        let forgotten = Forgotten {
            attributes: self.attributes,
            names: self.names_mut().map_or(Duration::ZERO, Names::revoke),
            pages: self.has_pages,
            revocation: Revocation(number),
        };
        self.attributes = false;
        self.told = 0;
        self.unsettle(number);
        forgotten
    }
}

/// Names one revocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Revocation(u64);

/// What must be told to the kernel about a revoked inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forgotten {
    /// Invalidate its attributes.
    pub(crate) attributes: bool,
    /// Wait until the names in it have run out (it is a directory).
    pub(crate) names: Duration,
    /// It has pages, which memory mappings go on using until they are purged.
    pub(crate) pages: bool,
    /// Which revocation this is.
    pub(crate) revocation: Revocation,
}

/// Whether a revoked inode's pages should be purged for the sake of memory mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refresh {
    /// They are gone, or go with an answer.
    Needless,
    /// Purging could make the kernel drop answers that are on their way: not before this time has passed.
    Later(Duration),
    /// Yes: from now on until `purged`.
    Now,
}

/// The kernel is being asked about an inode.
#[derive(Debug)]
pub(crate) struct Held<'a>(&'a Known, u64);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let Held(known, ino) = *self;
        known.lower(ino, |rest| rest.asked = rest.asked.saturating_sub(1));
        known.answered.notify_waiters();
    }
}

/// A name is being looked up in a directory.
#[derive(Debug)]
pub(crate) struct Looking<'a>(&'a Known, u64);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        let Looking(known, directory) = *self;
        known.lower(directory, |rest| rest.looking = rest.looking.saturating_sub(1));
    }
}

/// A name is being moved out of a directory.
#[derive(Debug)]
pub(crate) struct Moving<'a>(&'a Known, u64);

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        let Moving(known, directory) = *self;
        known.lower(directory, |rest| rest.moving = rest.moving.saturating_sub(1));
    }
}

/// A request whose answer carries attributes is under way.
#[derive(Debug)]
pub(crate) struct Asking<'a>(&'a AtomicUsize);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Which of `count` an inode belongs to. Inodes made one after the other differ in their low bits.
pub(crate) fn spread(ino: u64, count: usize) -> usize {
    (ino ^ (ino >> 32)) as usize % count
}

/// Boxed, so that room for more costs little when the table grows.
type Shard = HashMap<u64, Box<Inode>>;

/// The table.
#[derive(Debug)]
pub(crate) struct Known {
    shards: Vec<Mutex<Shard>>,
    since: Instant,
    moments: AtomicU64,
    asking: AtomicUsize,
    /// The kernel has been asked.
    answered: Notify,
}

impl Known {
    pub(crate) fn new() -> Self {
        Known {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            since: Instant::now(),
            moments: AtomicU64::new(1),
            asking: AtomicUsize::new(0),
            answered: Notify::new(),
        }
    }

    /// To be held from the arrival of LOOKUP, GETATTR and READDIRPLUS to their answers.
    pub(crate) fn ask(&self) -> Asking<'_> {
        self.asking.fetch_add(1, Ordering::SeqCst);
        Asking(&self.asking)
    }

    fn shard(&self, ino: u64) -> &Mutex<Shard> {
        &self.shards[spread(ino, SHARDS)]
    }

    /// Something that was counted is over; nothing, if the kernel has forgotten the inode since.
    fn lower(&self, ino: u64, count: impl FnOnce(&mut Rest)) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.rest.as_deref_mut().map(count);
            inode.tidy();
        }
    }

    fn stamp(&self) -> Stamp {
        Stamp(u32::try_from(self.since.elapsed().as_millis() / STAMP_MS + 1).unwrap_or(u32::MAX))
    }

    /// The time since then; `None`: it never was.
    fn elapsed(&self, stamp: Stamp) -> Option<Duration> {
        let past = self.stamp().0.saturating_sub(stamp.0);
        (stamp != Stamp::default()).then(|| Duration::from_millis(u64::from(past) * STAMP_MS as u64))
    }

    /// To be called before an operation asks for its tokens.
    pub(crate) fn begin(&self) -> Moment {
        Moment(self.moments.load(Ordering::SeqCst))
    }

    fn next_moment(&self) -> u64 {
        self.moments.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn is_current(&self, start: Moment, inode: &Inode, was_known: bool) -> bool {
        // An inode that was unknown was not there to be marked as revoked.
        if was_known { inode.revoked <= start.0 } else { self.begin() == start }
    }

    /// Attributes of an inode are about to be sent. Returns how long the kernel may believe them, at most `ttl`.
    pub(crate) fn tell(&self, start: Moment, ino: u64, answer: Answer, ttl: Duration) -> Duration {
        let mut shard = self.shard(ino).lock();
        let was_known = shard.contains_key(&ino);
        // An inode that is new to the kernel is made with what it is first told, whatever has been invalidated meanwhile.
        let inode = shard.entry(ino).or_insert_with(|| Box::new(Inode { settled: true, ..Inode::default() }));
        if !was_known || inode.generation != answer.generation {
            if was_known && !answer.looked_up {
                // By another way than a look-up the kernel learns of no generation.
                return Duration::ZERO;
            }
            // The kernel makes a new inode of it, without pages. The look-ups of the old one are still to be forgotten.
            inode.generation = answer.generation;
            if let Some(rest) = &mut inode.rest {
                rest.remains = None;
            }
            inode.set_pages(None);
            inode.set_taken_in(answer.version);
        }
        inode.lookups = inode.lookups.saturating_add(u32::from(answer.looked_up));
        inode.is_file = answer.version.is_some();
        if answer.looked_up {
            inode.found_at = self.stamp();
        }
        inode.found = answer.found.unwrap_or(inode.found);
        let current = self.is_current(start, inode, was_known);
        inode.hear(answer.thread);
        if !answer.looked_up {
            inode.asked_at = self.stamp();
        }
        inode.send(answer, current);
        let has_other_pages = answer.version.is_some_and(|version| inode.has_other_pages(version));
        let may_believe = inode.settled && !has_other_pages && !inode.unheard().is_some_and(Unheard::is_under_change);
        let lifetime = if current && may_believe { ttl } else { Duration::ZERO };
        if !lifetime.is_zero() {
            inode.attributes = true;
            // Whoever asked was heard just now.
            inode.told = if inode.told == 0 && answer.thread != 0 { answer.thread } else { SEVERAL };
        }
        if inode.lookups == 0 && !was_known {
            // Not looked up (the root, or a race with FORGET): keep the entry, the root's is never forgotten; others go with
            // the next FORGET. A stray one costs some bytes.
            inode.lookups = 1;
        }
        lifetime
    }

    /// Whether a GETATTR must not be answered before the kernel was made to take this in. Else it already has it or something newer,
    /// and it does not matter if it loses the answer.
    pub(crate) fn doubt(&self, ino: u64, thread: u32, told: Data) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return false };
        inode.hear(thread);
        inode.is_doubtful(told) || inode.has_other_pages(told.version)
    }

    /// Whether the kernel has not yet been made to take this in, or something newer, and to have no older pages. (It may have newer
    /// ones than who was told an older version wants: that is right for who began before it was outdated.)
    pub(crate) fn is_behind(&self, ino: u64, told: Data) -> bool {
        let shard = self.shard(ino).lock();
        let has_older = |inode: &Inode| inode.purging > 0 || inode.pages().is_some_and(|pages| pages < told.version);
        shard.get(&ino).is_some_and(|inode| inode.is_doubtful(told) || has_older(inode))
    }

    /// The kernel is asked about an inode from now on until this is dropped: answers to who changes it are held back.
    pub(crate) fn hold(&self, ino: u64) -> Held<'_> {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            let asked = &mut inode.rest().asked;
            *asked = asked.saturating_add(1);
        }
        Held(self, ino)
    }

    fn is_asked(&self, ino: u64) -> bool {
        self.shard(ino).lock().get(&ino).and_then(|inode| inode.rest.as_ref()).is_some_and(|rest| rest.asked > 0)
    }

    /// The kernel was seen to have this size, which our thread was told last, and if `whole` all that it was told. `bear`: that
    /// others may still undo it must be borne with.
    pub(crate) fn took_in(&self, ino: u64, thread: u32, size: u64, whole: bool, bear: bool) -> Seen {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return Seen::Done };
        let Some(unheard) = inode.unheard_mut() else { return Seen::Again };
        let Some((version, holds)) = unheard.asked(thread) else { return Seen::Again };
        let spoiled = bear && unheard.give_up();
        let settles = whole && holds;
        let may_be_undone = unheard.may_undo(Data { version, size }) || settles && unheard.may_unsettle();
        inode.spoil(spoiled);
        if may_be_undone {
            return Seen::Again;
        }
        inode.hear(thread);
        inode.settled |= settles;
        inode.set_taken_in(Some(version));
        if !inode.has_other_pages(version) {
            return Seen::Done;
        }
        Self::begin_purge(inode);
        Seen::Purge
    }

    /// Whether a thread may still make the kernel take in older attributes.
    pub(crate) fn may_be_forced(&self, ino: u64) -> bool {
        self.shard(ino).lock().get(&ino).and_then(|inode| inode.unheard()).is_some_and(Unheard::may_be_forced)
    }

    /// Who is gone has taken in what it was told.
    pub(crate) fn hear_gone(&self, ino: u64, is_gone: impl Fn(u32) -> bool) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            let spoiled = inode.unheard_mut().is_some_and(|unheard| unheard.hear_gone(is_gone));
            inode.spoil(spoiled);
            inode.tidy();
        }
    }

    /// The kernel cannot be asked: from now on it is taken to have this version, and no pages of others.
    pub(crate) fn assume(&self, ino: u64, version: u64) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            if let Some(unheard) = inode.unheard_mut() {
                unheard.give_up();
            }
            inode.settled = true;
            inode.set_taken_in(Some(version));
            inode.set_pages(None);
        }
    }

    /// The pages are about to be purged: those that are told of from now on may remain.
    fn begin_purge(inode: &mut Inode) {
        inode.set_pages(None);
        inode.purging = inode.purging.saturating_add(1);
    }

    /// The purge is over.
    pub(crate) fn purged(&self, ino: u64) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.purging = inode.purging.saturating_sub(1);
        }
    }

    /// Whether this node changes the file's data, or who did may not have taken that in yet.
    pub(crate) fn is_changing(&self, ino: u64) -> bool {
        self.shard(ino).lock().get(&ino).and_then(|inode| inode.unheard()).is_some_and(Unheard::is_changing)
    }

    /// A thread changes a file's data from now on, and until it is answered: what this returns is to be dropped just before that, or
    /// the thread's next request would meet it. `None`: the kernel does not know the file. True: the attributes that it believes must
    /// be invalidated first, since others may see the change before the thread takes in that it was made.
    pub(crate) fn change(&self, ino: u64, thread: u32, append: Option<Append>) -> (Option<Changing<'_>>, bool) {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return (None, false) };
        inode.hear(thread);
        let settled = inode.settled;
        let unheard = &mut inode.rest().unheard;
        unheard.begin_change();
        if let Some(Append { end, alone }) = append {
            unheard.append(thread, end, settled && alone);
        }
        let believed = std::mem::take(&mut inode.attributes);
        (Some(Changing { known: self, ino, thread, reach: Reach::default() }), believed)
    }

    /// A thread of this node has changed attributes of which the kernel is told nothing by the answer. Returns what it must be told
    /// some time.
    pub(crate) fn unsettle(&self, ino: u64) -> Forgotten {
        let number = self.next_moment();
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return Forgotten::default() };
        inode.unsettle(number);
        Forgotten { pages: inode.has_pages, revocation: Revocation(number), ..Forgotten::default() }
    }

    /// A thread asks something else about an inode.
    pub(crate) fn hear(&self, ino: u64, thread: u32) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.hear(thread);
        }
    }

    /// A name in a directory is about to be sent: how long may the kernel believe it? At most `ttl`.
    pub(crate) fn tell_name(&self, start: Moment, directory: u64, ttl: Duration) -> Duration {
        let mut shard = self.shard(directory).lock();
        let Some(inode) = shard.get_mut(&directory) else { return Duration::ZERO };
        let is_moving = inode.rest.as_ref().is_some_and(|rest| rest.moving > 0);
        if ttl.is_zero() || is_moving || self.is_contended(inode) || !self.is_current(start, inode, true) {
            return Duration::ZERO;
        }
        inode.revoked_at = Stamp::default();
        inode.rest().names.get_or_insert_default().tell();
        ttl.min(names::LIFETIME)
    }

    /// A name is about to be moved from one directory to another; to be held until the thread is answered. Meanwhile no names are
    /// told in the first one: the kernel believes them in the second one for as long as there.
    pub(crate) fn move_name(&self, from: u64, to: u64) -> Option<Moving<'_>> {
        if from == to {
            return None;
        }
        {
            let mut shard = self.shard(from).lock();
            let moving = &mut shard.get_mut(&from)?.rest().moving;
            *moving = moving.saturating_add(1);
        }
        self.carry_names(from, to);
        Some(Moving(self, from))
    }

    fn carry_names(&self, from: u64, to: u64) {
        let told_at = |inode: &mut Box<Inode>| inode.names().and_then(Names::told_at);
        let Some(told_at) = self.shard(from).lock().get_mut(&from).and_then(told_at) else { return };
        let is_contended = {
            let mut shard = self.shard(to).lock();
            let Some(inode) = shard.get_mut(&to) else { return };
            let is_contended = self.is_contended(inode);
            inode.rest().names.get_or_insert_default().take_over(told_at);
            is_contended
        };
        let mut shard = self.shard(from).lock();
        if let Some(names) =
            shard.get_mut(&from).and_then(|inode| inode.names_mut()).filter(|names| is_contended && !names.are_shared())
        {
            // Else others would have to wait whenever something is moved there.
            names.contend();
        }
    }

    /// Whether names in a directory are not to be told, since others change it.
    fn is_contended(&self, inode: &Inode) -> bool {
        let recently = self.elapsed(inode.revoked_at).is_some_and(|time| time < names::SHARED);
        recently || inode.names().is_some_and(Names::are_shared)
    }

    /// To be held while a name is looked up in a directory.
    /// `None`: the kernel was told nothing of it yet.
    pub(crate) fn look_in(&self, directory: u64) -> Option<Looking<'_>> {
        let mut shard = self.shard(directory).lock();
        let looking = &mut shard.get_mut(&directory)?.rest().looking;
        *looking = looking.saturating_add(1);
        Some(Looking(self, directory))
    }

    /// Whether a name is just being looked up in a directory. Then a thread that is sent a listing may have to wait, in the midst of
    /// taking it in, for that look-up to end, which may take longer than names live, and believes what is left only from then on.
    pub(crate) fn is_looked_in(&self, directory: u64) -> bool {
        self.shard(directory).lock().get(&directory).and_then(|inode| inode.rest.as_ref()).is_some_and(|rest| rest.looking > 0)
    }

    /// An access control list is about to be sent to a thread in answer to a request that began at `start`. The kernel keeps it
    /// for as long as its attributes are not invalidated, whatever the lifetime of those. False: it may be an older one by now,
    /// and must be read again.
    pub(crate) fn tell_list(&self, start: Moment, thread: u32, ino: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return self.begin() == start };
        inode.hear(thread);
        let current = self.is_current(start, inode, true);
        inode.attributes |= current;
        current
    }

    /// Data of this version is about to be sent to a thread for the page cache.
    pub(crate) fn tell_pages(&self, ino: u64, thread: u32, version: u64) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.hear(thread);
            inode.set_pages(Some(inode.pages().map_or(version, |old| old.min(version))));
        }
    }

    /// A file with data of this version is about to be opened by a thread: may the kernel keep its pages? If not, it drops them,
    /// but others that have it open may read them until it has, so they are not taken for gone.
    pub(crate) fn keeps_pages(&self, ino: u64, thread: u32, version: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return false };
        inode.hear(thread);
        !inode.has_other_pages(version)
    }

    /// An inode has no name any more.
    pub(crate) fn removed(&self, ino: u64, attributes: &Attributes) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino)
            && inode.generation == attributes.generation
        {
            inode.rest().remains = Some(Box::new(*attributes));
        }
    }

    /// What an inode was when it was removed, for who still holds it when it is gone.
    pub(crate) fn remains(&self, ino: u64) -> Option<Attributes> {
        self.shard(ino).lock().get(&ino)?.rest.as_ref()?.remains.as_deref().copied()
    }

    /// The kernel forgot an inode that it had looked up so often.
    pub(crate) fn forget(&self, ino: u64, lookups: u64) {
        self.take_back(ino, lookups);
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            // There are answers on their way that look it up again, perhaps older ones than it had.
            inode.set_taken_in(None);
            inode.settled = false;
        }
    }

    /// Some look-ups that were told of are not: their answer was not sent.
    pub(crate) fn take_back(&self, ino: u64, lookups: u64) {
        let mut shard = self.shard(ino).lock();
        if let Some(inode) = shard.get_mut(&ino) {
            if inode.lookups != u32::MAX {
                inode.lookups = inode.lookups.saturating_sub(u32::try_from(lookups).unwrap_or(u32::MAX));
            }
            if inode.lookups == 0 {
                shard.remove(&ino);
            }
        }
    }

    /// The generation that the kernel was told of an inode.
    pub(crate) fn generation(&self, ino: u64) -> Option<u64> {
        self.shard(ino).lock().get(&ino).map(|inode| inode.generation)
    }

    /// Whether the kernel may believe, or have believed at a moment, that an inode is to be had by another name than this one.
    pub(crate) fn is_known_elsewhere(&self, ino: u64, found: Found, moment: Instant) -> bool {
        self.shard(ino).lock().get(&ino).is_some_and(|inode| {
            let since = moment.elapsed() + names::RUN_OUT + STAMP;
            let is_fresh = self.elapsed(inode.found_at).is_some_and(|time| time < since);
            is_fresh && inode.found != found && inode.found != Found::default()
        })
    }

    /// This node has moved an inode, as the kernel does with its name when it is told so.
    pub(crate) fn moved(&self, ino: u64, to: Found) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.found = to;
        }
    }

    /// Whether a program may act on an inode without the kernel's asking for it first, which then judges by the owner that it was
    /// told last: the inode is open, or a name that leads to it is still believed, or may be on its way, or it is a directory, in
    /// which somebody may be.
    pub(crate) fn is_within_reach(&self, ino: u64, is_open: bool) -> bool {
        self.shard(ino).lock().get(&ino).is_some_and(|inode| {
            let is_named = self.elapsed(inode.found_at).is_some_and(|time| time < names::RUN_OUT + STAMP);
            let is_sought = self.asking.load(Ordering::SeqCst) > 0;
            is_open || is_named || is_sought || !inode.is_file
        })
    }

    /// Whether the kernel knows the inode.
    pub(crate) fn contains(&self, ino: u64) -> bool {
        self.shard(ino).lock().contains_key(&ino)
    }

    /// The token of an inode is gone. Returns what the kernel must be told before this is acknowledged.
    pub(crate) fn revoke(&self, ino: u64) -> Forgotten {
        let number = self.next_moment();
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return Forgotten::default() };
        inode.revoked_at = self.stamp();
        if let Some(names) = inode.names_mut() {
            names.contend();
        }
        inode.revoke(number)
    }

    /// Attributes of an inode were changed by this node itself, on nobody's behalf. Returns what the kernel must be told.
    pub(crate) fn changed(&self, ino: u64) -> Forgotten {
        let number = self.next_moment();
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return Forgotten::default() };
        // Answers that are under way may be older.
        inode.revoked = number;
        let attributes = std::mem::take(&mut inode.attributes);
        inode.told = 0;
        Forgotten {
            attributes,
            // What an earlier revocation wanted purged goes under this one's number now.
            pages: inode.has_pages && !inode.settled,
            revocation: Revocation(number),
            ..Forgotten::default()
        }
    }

    /// A thread has changed a directory, and is about to be told. The kernel then takes what it has for outdated, but not what others
    /// have been answered and did not take in yet: whether it must be made to.
    pub(crate) fn overtake(&self, directory: u64, thread: u32) -> bool {
        let number = self.next_moment();
        let mut shard = self.shard(directory).lock();
        let Some(inode) = shard.get_mut(&directory) else { return false };
        // Answers that are under way may be older.
        inode.revoked = number;
        let by_others = inode.told != 0 && inode.told != thread;
        inode.told = 0;
        by_others && std::mem::take(&mut inode.attributes)
    }

    /// Whether the pages of an inode whose last revocation was this one are to be purged now, for the sake of mappings. Who asks
    /// about the inode again and again needs no purge, and is not to be met by one.
    pub(crate) fn refresh(&self, ino: u64, revocation: Revocation, is_quiet: impl FnOnce() -> bool) -> Refresh {
        let mut shard = self.shard(ino).lock();
        let wanted = |i: &&mut Box<Inode>| i.revoked == revocation.0 && i.has_pages && !i.settled;
        let Some(inode) = shard.get_mut(&ino).filter(wanted) else { return Refresh::Needless };
        let asked = self.elapsed(inode.asked_at).map_or(Duration::ZERO, |time| ASKS_AGAIN.saturating_sub(time));
        match asked {
            Duration::ZERO if self.asking.load(Ordering::SeqCst) > 0 || !is_quiet() => Refresh::Later(BUSY),
            Duration::ZERO => {
                Self::begin_purge(inode);
                Refresh::Now
            }
            wait => Refresh::Later(wait),
        }
    }

    /// All tokens are gone. Returns every inode of which the kernel believes something or has pages.
    pub(crate) fn revoke_all(&self) -> Vec<(u64, Forgotten)> {
        let number = self.next_moment();
        let mut all = Vec::new();
        for shard in &self.shards {
            for (ino, inode) in shard.lock().iter_mut() {
                let forgotten = inode.revoke(number);
                // What this node had changed and lost had versions that others give to other data now.
                inode.set_taken_in(None);
                inode.pages = 0;
                if forgotten.attributes || forgotten.pages || !forgotten.names.is_zero() {
                    all.push((*ino, forgotten));
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests;
