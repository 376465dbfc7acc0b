//! What one kernel mount was told, and so may still believe.
//!
//! For every inode that the kernel knows: how often it looked it up, whether it holds attributes, and until when names, on the
//! strength of a token, which version of its data it was seen to have, and how old its pages may be.
//!
//! Invariants:
//! - `attributes` (`Names::told_at`) is set before a reply that lets the kernel believe something leaves, and cleared only by a
//!   revocation, which then tells the kernel (or waits). So a revocation never misses a reply.
//! - An operation that began before an inode was last revoked answers with a lifetime of zero: its token may be gone.
//! - An inode that was revoked is believed again only once the kernel has surely taken in an answer since (`settled`).
//! - A file's attributes are believed only while its pages are as new as they are, and nobody on this node changes its data.
//! - A `read()` through the page cache goes on only when the kernel was seen to have the size that goes with its answer, and has no
//!   older pages; else it is *doubtful*, and waits until the kernel was made to (`notify`). Opening a file, for which the kernel
//!   checks its mode, waits in the same way until it was seen to have that.
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

use super::names::{self, Names};
use super::unheard::{Kind, Unheard};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Locks, so that threads seldom meet.
const SHARDS: usize = 64;
/// Who asked about an inode will ask again within this time, or has stopped doing so.
const ASKS_AGAIN: Duration = Duration::from_secs(2);
/// Until requests that are under way may have been answered.
const BUSY: Duration = Duration::from_millis(3);

/// Numbers revocations and purges: taken when an operation begins, compared when it answers.
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
    pub(crate) how: How,
}

/// What may become of the answer to a GETATTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// An invalidation has overtaken it.
    WillBeLost,
    /// A `read()` may go on without it, or with pages of other data; so may what comes after any question and does not ask itself
    /// (loads through a mapping, `sendfile`), and a check of the mode.
    MayBeLost,
}

/// What is to be done now that the kernel was seen to have what our thread was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing: its pages are of this version, too.
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

/// The unit of `Stamp`.
const STAMP_MS: u128 = 10;

/// What is kept of each inode that the kernel knows, and there may be millions. What few of them need is in `Rest`.
#[derive(Debug, Default)]
struct Inode {
    generation: u64,
    revoked: u64,
    /// The kernel was last sent an invalidation then, or a little later: it loses the answers to what it asked before.
    shaken: u64,
    /// See `pages()`.
    pages: u64,
    /// See `taken_in()`.
    taken_in: u64,
    rest: Option<Box<Rest>>,
    /// One that reached the maximum is not counted any more, and the inode never forgotten.
    lookups: u32,
    revoked_at: Stamp,
    asked_at: Stamp,
    has_taken_in: bool,
    has_pages: bool,
    attributes: bool,
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
}

/// A change of a file's data that is under way.
#[derive(Debug)]
pub(crate) struct Changing<'a> {
    known: &'a Known,
    ino: u64,
    thread: u32,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut shard = self.known.shard(self.ino).lock();
        if let Some(rest) = shard.get_mut(&self.ino).and_then(|inode| inode.rest.as_mut()) {
            rest.unheard.end_change(self.thread);
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

    /// Why the kernel must be asked before it can be relied on to have this version of a file.
    fn is_doubtful(&self, version: u64) -> bool {
        let may_be_undone = self.unheard().is_some_and(|unheard| unheard.may_undo(version));
        !self.settled || self.taken_in() < Some(version) || may_be_undone
    }

    /// A thread is here again.
    fn hear(&mut self, thread: u32) {
        if thread == 0 {
            return;
        }
        let Some(rest) = &mut self.rest else { return };
        self.settled |= rest.unheard.hear(thread);
        if rest.unheard.is_empty() && rest.names.is_none() {
            self.rest = None;
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
        self.unsettle(number);
        if std::mem::take(&mut self.attributes) {
            self.shaken = number;
        }
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
}

impl Known {
    pub(crate) fn new() -> Self {
        Known {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            since: Instant::now(),
            moments: AtomicU64::new(1),
            asking: AtomicUsize::new(0),
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
            inode.set_pages(None);
            inode.set_taken_in(answer.version);
        }
        inode.lookups = inode.lookups.saturating_add(u32::from(answer.looked_up));
        let current = self.is_current(start, inode, was_known);
        inode.hear(answer.thread);
        if !answer.looked_up {
            inode.asked_at = self.stamp();
        }
        inode.send(answer, current);
        let has_other_pages = answer.version.is_some_and(|version| inode.has_other_pages(version));
        let may_believe = inode.settled && !has_other_pages && !inode.unheard().is_some_and(Unheard::is_under_change);
        let lifetime = if current && may_believe { ttl } else { Duration::ZERO };
        inode.attributes |= !lifetime.is_zero();
        if inode.lookups == 0 && !was_known {
            // Not looked up (the root, or a race with FORGET): keep the entry, the root's is never forgotten; others go with
            // the next FORGET. A stray one costs some bytes.
            inode.lookups = 1;
        }
        lifetime
    }

    /// Why a GETATTR that began at `start` must not be answered before the kernel was made to take this version in.
    pub(crate) fn doubt(&self, start: Moment, ino: u64, thread: u32, version: u64) -> Option<Doubt> {
        let mut shard = self.shard(ino).lock();
        let inode = shard.get_mut(&ino)?;
        inode.hear(thread);
        let will_be_lost = inode.purging > 0 || inode.shaken > start.0;
        let may_be_lost = inode.is_doubtful(version) || inode.has_other_pages(version);
        if will_be_lost { Some(Doubt::WillBeLost) } else { may_be_lost.then_some(Doubt::MayBeLost) }
    }

    /// Whether the kernel has not yet been made to take this version in, or a newer one, and to have no older pages.
    pub(crate) fn is_behind(&self, ino: u64, version: u64) -> bool {
        let shard = self.shard(ino).lock();
        let has_older = |inode: &Inode| inode.purging > 0 || inode.pages().is_some_and(|pages| pages < version);
        shard.get(&ino).is_some_and(|inode| inode.is_doubtful(version) || has_older(inode))
    }

    /// The kernel was seen to have the size that our thread was told last, and if `whole` all of it. `bear`: that others may still
    /// undo it must be borne with.
    pub(crate) fn took_in(&self, ino: u64, thread: u32, whole: bool, bear: bool) -> Seen {
        let number = self.next_moment();
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return Seen::Done };
        let Some(unheard) = inode.unheard_mut() else { return Seen::Again };
        let Some((version, holds)) = unheard.asked(thread) else { return Seen::Again };
        if bear {
            unheard.give_up();
        }
        let may_be_undone = unheard.may_undo(version);
        inode.hear(thread);
        if may_be_undone {
            return Seen::Again;
        }
        inode.settled |= whole && holds;
        // Pages that a write on this node has filled are not known of: they go whenever the version is another.
        let is_new = inode.taken_in() != Some(version);
        inode.set_taken_in(Some(version));
        if !is_new && !inode.has_other_pages(version) {
            return Seen::Done;
        }
        Self::begin_purge(inode, number);
        Seen::Purge
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

    /// The pages are about to be purged: those that are told of from now on may remain. Answers on their way will be lost.
    fn begin_purge(inode: &mut Inode, number: u64) {
        inode.set_pages(None);
        inode.purging = inode.purging.saturating_add(1);
        inode.shaken = number;
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

    /// A thread changes a file's data from now on, and until it is answered: what this returns is to be dropped just before
    /// that, or the thread's next request would meet it. `None`: the kernel does not know the file. True: the attributes that it
    /// believes must be invalidated first, since others may see the change before the thread takes in that it was made.
    pub(crate) fn change(&self, ino: u64, thread: u32) -> (Option<Changing<'_>>, bool) {
        let number = self.next_moment();
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return (None, false) };
        inode.hear(thread);
        inode.rest().unheard.begin_change();
        let believed = std::mem::take(&mut inode.attributes);
        if believed {
            inode.shaken = number;
        }
        (Some(Changing { known: self, ino, thread }), believed)
    }

    /// A thread of this node has changed attributes of which the kernel is told nothing by the answer.
    pub(crate) fn unsettle(&self, ino: u64) {
        let number = self.next_moment();
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.unsettle(number);
        }
    }

    /// A thread asks something else about an inode.
    pub(crate) fn hear(&self, ino: u64, thread: u32) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.hear(thread);
        }
    }

    /// An invalidation of the attributes is about to be sent on account of nobody.
    pub(crate) fn shake(&self, ino: u64) {
        let number = self.next_moment();
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.shaken = number;
        }
    }

    /// A name in a directory is about to be sent: how long may the kernel believe it? At most `ttl`.
    pub(crate) fn tell_name(&self, start: Moment, directory: u64, ttl: Duration) -> Duration {
        let mut shard = self.shard(directory).lock();
        let Some(inode) = shard.get_mut(&directory) else { return Duration::ZERO };
        let recently = self.elapsed(inode.revoked_at).is_some_and(|time| time < names::SHARED);
        let contended = recently || inode.names().is_some_and(Names::are_shared);
        if ttl.is_zero() || contended || !self.is_current(start, inode, true) {
            return Duration::ZERO;
        }
        inode.revoked_at = Stamp::default();
        inode.rest().names.get_or_insert_default().tell();
        ttl.min(names::LIFETIME)
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

    /// The kernel forgot some look-ups.
    pub(crate) fn forget(&self, ino: u64, lookups: u64) {
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
        if attributes {
            inode.shaken = number;
        }
        Forgotten {
            attributes,
            // What an earlier revocation wanted purged goes under this one's number now.
            pages: inode.has_pages && !inode.settled,
            revocation: Revocation(number),
            ..Forgotten::default()
        }
    }

    /// Whether the pages of an inode whose last revocation was this one are to be purged now, for the sake of mappings. Who asks
    /// about the inode again and again needs no purge, and is not to be met by one.
    pub(crate) fn refresh(&self, ino: u64, revocation: Revocation, is_quiet: impl FnOnce() -> bool) -> Refresh {
        let number = self.next_moment();
        let mut shard = self.shard(ino).lock();
        let wanted = |i: &&mut Box<Inode>| i.revoked == revocation.0 && i.has_pages && !i.settled;
        let Some(inode) = shard.get_mut(&ino).filter(wanted) else { return Refresh::Needless };
        let asked = self.elapsed(inode.asked_at).map_or(Duration::ZERO, |time| ASKS_AGAIN.saturating_sub(time));
        match asked {
            Duration::ZERO if self.asking.load(Ordering::SeqCst) > 0 || !is_quiet() => Refresh::Later(BUSY),
            Duration::ZERO => {
                Self::begin_purge(inode, number);
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
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(1);

    /// To a thread, of a version.
    fn answer(thread: u32, version: u64) -> Answer {
        Answer { thread, generation: 1, version: Some(version), looked_up: false, how: How::Ordinary }
    }

    fn look_up(thread: u32, version: u64) -> Answer {
        Answer { looked_up: true, ..answer(thread, version) }
    }

    /// The kernel may know millions of inodes, and gives them up only when it needs their memory: about 1 KiB each.
    #[test]
    fn an_inode_takes_a_tenth_of_what_it_takes_in_the_kernel() {
        assert!(size_of::<Inode>() <= 72, "{}", size_of::<Inode>());
    }

    #[test]
    fn an_answer_overtaken_by_a_revocation_is_not_believed() {
        let known = Known::new();
        let directory = |thread| Answer { version: None, ..answer(thread, 0) };
        let ask = |thread| known.tell(known.begin(), 7, directory(thread), TTL);
        assert_eq!(known.tell(known.begin(), 7, Answer { looked_up: true, ..directory(0) }, TTL), TTL);
        let late = known.begin();
        assert!(known.revoke(7).attributes);
        assert_eq!(known.tell(late, 7, directory(20), TTL), Duration::ZERO);
        assert!(!known.revoke(7).attributes, "nothing was believed, so nothing is to be forgotten");
        // The first answer since: nothing may make the kernel drop it, so there must be nothing to take back.
        assert_eq!(ask(21), Duration::ZERO);
        assert_eq!(ask(22), Duration::ZERO, "21 may still be asleep");
        assert!(!known.revoke(7).attributes);
        assert_eq!(ask(21), Duration::ZERO, "an answer before a revocation");
        assert_eq!(ask(21), TTL, "it has taken that one in");
        assert_eq!(ask(22), TTL);
        assert!(known.revoke(7).attributes);
    }

    /// A thread of ours (9) asks the kernel, which is seen to have what it was told.
    fn ask(known: &Known, version: u64, whole: bool) -> Seen {
        known.tell(known.begin(), 7, Answer { how: How::Ours, ..answer(9, version) }, Duration::ZERO);
        known.took_in(7, 9, whole, false)
    }

    #[test]
    fn a_revoked_file_is_believed_only_when_the_kernel_was_seen_to_have_all_of_it() {
        let known = Known::new();
        let told = || known.tell(known.begin(), 7, answer(1, 1), TTL);
        let doubt = || known.doubt(known.begin(), 7, 1, 1);
        assert_eq!(known.tell(known.begin(), 7, look_up(1, 1), TTL), TTL);
        known.revoke(7);
        assert_eq!((doubt(), told(), told()), (Some(Doubt::MayBeLost), Duration::ZERO, Duration::ZERO));
        assert_eq!(ask(&known, 1, false), Seen::Done, "it had that version all the time");
        assert_eq!((doubt(), told()), (Some(Doubt::MayBeLost), Duration::ZERO), "the mode may be another");
        // Revoked while it was asked.
        known.tell(known.begin(), 7, Answer { how: How::Ours, ..answer(9, 1) }, Duration::ZERO);
        known.revoke(7);
        assert_eq!((known.took_in(7, 9, true, false), told()), (Seen::Done, Duration::ZERO));
        assert_eq!((ask(&known, 1, true), doubt(), told()), (Seen::Done, None, TTL));
    }

    #[test]
    fn a_forced_answer_keeps_what_is_newer_in_doubt_until_its_thread_is_heard() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(1, 1), TTL);
        known.tell(known.begin(), 7, Answer { how: How::Forced, ..answer(3, 2) }, Duration::ZERO);
        assert!(known.is_behind(7, 2), "that it will take this in is not relied on");
        assert_eq!(ask(&known, 2, true), Seen::Purge, "it is the same");
        known.purged(7);
        assert_eq!(known.doubt(known.begin(), 7, 1, 2), None);
        // Another node writes.
        assert_eq!(ask(&known, 3, true), Seen::Again);
        assert!(known.is_behind(7, 3));
        known.hear(7, 3);
        assert_eq!(ask(&known, 3, true), Seen::Purge);
        known.purged(7);
        known.tell(known.begin(), 7, Answer { how: How::Forced, ..answer(3, 2) }, Duration::ZERO);
        assert!(known.doubt(known.begin(), 7, 1, 3).is_some());
        known.tell(known.begin(), 7, Answer { how: How::Ours, ..answer(9, 3) }, Duration::ZERO);
        assert_eq!(known.took_in(7, 9, true, true), Seen::Done, "borne with");
    }

    #[tokio::test(start_paused = true)]
    async fn pages_are_purged_for_mappings_only_if_no_answer_does_it() {
        let known = Known::new();
        let now = |forgotten: Forgotten| known.refresh(7, forgotten.revocation, || true);
        known.tell(known.begin(), 7, look_up(1, 1), TTL);
        known.tell_pages(7, 1, 1);
        let first = known.revoke(7);
        assert!(first.pages);
        let asking = known.ask();
        assert_eq!(now(first), Refresh::Later(BUSY));
        drop(asking);
        assert_eq!(known.refresh(7, first.revocation, || false), Refresh::Later(BUSY));
        known.tell(known.begin(), 7, answer(1, 2), TTL);
        let second = known.revoke(7);
        assert_eq!(now(first), Refresh::Needless, "that is left to the newer one");
        assert_eq!(now(second), Refresh::Later(ASKS_AGAIN), "somebody asked a moment ago, and will again");
        tokio::time::advance(ASKS_AGAIN).await;
        // An access time that is set in between does not make the pages any younger.
        let changed = known.changed(7);
        assert!(changed.pages);
        assert_eq!((now(second), now(changed)), (Refresh::Needless, Refresh::Now));
        assert!(!known.revoke(7).pages, "they are being purged");
    }

    #[test]
    fn a_list_that_was_told_is_taken_back_though_attributes_were_told_for_no_time() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(1, 1), Duration::ZERO);
        assert!(!known.revoke(7).attributes);
        let start = known.begin();
        assert!(known.tell_list(start, 1, 7));
        assert!(known.revoke(7).attributes);
        assert!(!known.tell_list(start, 1, 7), "it may be an older one");
        assert!(!known.revoke(7).attributes, "nothing was told since");
    }

    #[test]
    fn a_read_waits_until_the_kernel_has_its_version_and_no_other_pages() {
        let known = Known::new();
        let doubt = |start| known.doubt(start, 7, 2, 4);
        let doubtful = |thread, version| known.doubt(known.begin(), 7, thread, version).is_some();
        known.tell(known.begin(), 7, look_up(1, 1), TTL);
        known.tell_pages(7, 1, 1);
        assert!(!doubtful(2, 1), "it was made with that");
        assert!(doubtful(2, 2) && known.is_behind(7, 2));
        // Somebody was told, and comes again: he may have lost it.
        known.tell(known.begin(), 7, answer(3, 2), TTL);
        known.hear(7, 3);
        assert!(doubtful(2, 2) && known.is_behind(7, 2));
        let start = known.begin();
        assert_eq!(ask(&known, 4, true), Seen::Purge);
        // Who asked before the purge will lose the answer, whatever it is for.
        assert_eq!(doubt(start), Some(Doubt::WillBeLost));
        assert!(known.is_behind(7, 4));
        known.tell_pages(7, 2, 4);
        known.purged(7);
        assert_eq!(doubt(start), Some(Doubt::WillBeLost));
        assert!(!doubtful(2, 4) && !known.is_behind(7, 4));
        assert!(doubtful(2, 5), "pages that were read while the others were purged");
    }

    #[test]
    fn who_asked_before_an_invalidation_loses_the_answer() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(1, 1), TTL);
        let start = known.begin();
        assert!(known.changed(7).attributes);
        assert_eq!(known.doubt(start, 7, 1, 1), Some(Doubt::WillBeLost));
        assert_eq!(known.doubt(known.begin(), 7, 1, 1), None);
        // What is set by an attribute (a list with its mode) is believed only when the kernel has surely asked since.
        known.unsettle(7);
        let told = || known.tell(known.begin(), 7, answer(1, 1), TTL);
        assert_eq!((told(), ask(&known, 1, true), told()), (Duration::ZERO, Seen::Done, TTL));
    }

    #[test]
    fn attributes_are_not_believed_beside_old_pages() {
        let known = Known::new();
        let told = |version| known.tell(known.begin(), 7, answer(1, version), TTL);
        known.tell(known.begin(), 7, look_up(1, 1), TTL);
        known.tell_pages(7, 1, 1);
        assert_eq!((told(1), told(2)), (TTL, Duration::ZERO));
        assert_eq!(ask(&known, 2, true), Seen::Purge);
        assert_eq!(told(2), Duration::ZERO, "they are being purged");
        known.purged(7);
        assert_eq!(told(2), TTL);
    }

    #[test]
    fn where_the_kernel_cannot_be_asked_it_is_taken_for_granted_after_one_answer() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(1, 1), TTL);
        known.tell_pages(7, 1, 1);
        known.revoke(7);
        assert!(known.doubt(known.begin(), 7, 1, 2).is_some());
        known.assume(7, 2);
        assert_eq!(known.doubt(known.begin(), 7, 1, 2), None);
        assert!(known.doubt(known.begin(), 7, 1, 3).is_some());
    }

    #[test]
    fn after_all_tokens_were_lost_no_version_is_what_it_was() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(1, 3), TTL);
        known.tell_pages(7, 1, 3);
        assert!(!known.is_behind(7, 3));
        known.revoke_all();
        assert!(known.is_behind(7, 3) && !known.keeps_pages(7, 2, 3));
    }

    #[test]
    fn what_is_changed_leaves_nothing_behind_once_its_thread_is_heard() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(2, 1), TTL);
        let ask = |version| known.tell(known.begin(), 7, answer(1, version), TTL);
        let (changing, believed) = known.change(7, 2);
        assert!(believed, "what would be older than what others can read soon");
        assert_eq!(ask(1), Duration::ZERO);
        assert!(!known.change(7, 3).1);
        known.hear(7, 3);
        drop(changing);
        assert!(known.is_changing(7), "it may not have taken that in");
        assert_eq!(ask(1), TTL);
        known.hear(7, 2);
        assert!(!known.is_changing(7));
        assert!(known.shard(7).lock().get(&7).is_some_and(|inode| inode.rest.is_none()));
    }

    #[test]
    fn an_unknown_inode_revoked_meanwhile_is_not_believed() {
        let known = Known::new();
        let start = known.begin();
        known.revoke(7);
        assert_eq!(known.tell(start, 7, look_up(0, 1), TTL), Duration::ZERO);
    }

    #[test]
    fn pages_are_kept_only_while_the_data_is_the_same() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(0, 1), TTL);
        assert!(known.keeps_pages(7, 1, 1));
        known.tell_pages(7, 0, 1);
        assert!(known.keeps_pages(7, 1, 1));
        assert!(!known.keeps_pages(7, 1, 2) && !known.keeps_pages(7, 1, 2), "others may read them until they are dropped");
    }

    #[test]
    fn forgetting_drops_the_inode_and_a_new_generation_starts_afresh() {
        let known = Known::new();
        known.tell(known.begin(), 7, look_up(0, 1), TTL);
        known.tell_pages(7, 0, 1);
        known.tell(known.begin(), 7, Answer { generation: 2, ..look_up(0, 9) }, TTL);
        assert!(!known.is_behind(7, 9));
        known.forget(7, 1);
        assert!(known.contains(7));
        known.forget(7, 1);
        assert!(!known.contains(7));
    }

    #[tokio::test(start_paused = true)]
    async fn names_run_out_and_are_not_cached_in_a_directory_shared_with_writers() {
        let known = Known::new();
        let tell = || known.tell_name(known.begin(), 1, TTL);
        known.tell(known.begin(), 1, Answer { version: None, ..look_up(0, 0) }, TTL);
        assert_eq!(tell(), names::LIFETIME);
        tokio::time::advance(names::LIFETIME).await;
        assert_eq!(known.revoke(1).names, names::RUN_OUT - names::LIFETIME);
        assert_eq!(known.revoke(1).names, Duration::ZERO);
        assert_eq!(tell(), Duration::ZERO);
        tokio::time::advance(names::SHARED * 2).await;
        assert_eq!(tell(), names::LIFETIME);
        assert_eq!(known.revoke(1).names, names::RUN_OUT);
        // Again: it was too short.
        tokio::time::advance(names::SHARED * 3).await;
        assert_eq!(tell(), Duration::ZERO);
        tokio::time::advance(names::SHARED).await;
        assert_eq!(tell(), names::LIFETIME);
        // Nobody has to wait for names that were told long ago.
        tokio::time::advance(names::SHARED_MAX).await;
        assert_eq!(known.revoke(1).names, Duration::ZERO);
        tokio::time::advance(names::SHARED).await;
        assert_eq!(tell(), names::LIFETIME);
    }
}
