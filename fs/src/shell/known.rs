//! What one kernel mount was told, and so may still believe.
//!
//! For every inode that the kernel knows: how often it looked it up, whether it holds attributes, and until when names, on the
//! strength of a token, which (mtime, size) it was told at which data version, and how old its pages may be.
//!
//! Invariants:
//! - `attributes` (`Names::told_at`) is set before a reply that lets the kernel believe something leaves, and cleared only by a
//!   revocation, which then tells the kernel (or waits). So a revocation never misses a reply.
//! - An operation that began before an inode was last revoked answers with a lifetime of zero: its token may be gone.
//! - One (mtime, size) stands for one data version in `told`; an answer that would break this first purges the pages.
//! - An inode that was revoked is believed again only once the kernel has surely taken in an answer since (`settled`).
//!
//! Excludes: telling the kernel (`notify`), and what the answers mean (`fuse`).
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
//! The kernel also drops an answer that another thread's answer about the same inode has overtaken, and any while a thread changes
//! the file's size. Then a `read()` would go on with old pages. Who else is about is therefore noted (`Crowd`), and when a
//! GETATTR's answer may be lost the pages are purged before it (`doubtful`).

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Locks, so that threads seldom meet.
const SHARDS: usize = 64;
/// Remembered (mtime, size, version) per inode. The kernel holds the last that it accepted; it rejects one only if an
/// invalidation overtook it, so that many in a row cannot be missed.
const TOLD_MAX: usize = 8;
/// How long the kernel may believe a name. Names are not taken back (the kernel can be made to forget them all, but then drops
/// directories that are in use until they are looked up again, so that `getcwd()` fails there): they run out.
pub(crate) const NAME_LIFETIME: Duration = Duration::from_millis(100);
/// When a name that was told has run out for sure: the kernel counts in ticks of up to 10 ms, from when it takes the answer in.
const NAME_RUNS_OUT: Duration = Duration::from_millis(200);
/// After another node had to wait for names to run out, those of this directory are not cached for this long: it is probably
/// being written by both. The time doubles whenever that was too short.
const SHARED_DIRECTORY: Duration = Duration::from_secs(1);
/// The longest such time.
const SHARED_DIRECTORY_MAX: Duration = Duration::from_secs(60);

/// Who asked about an inode will ask again within this time, or has stopped doing so.
const ASKS_AGAIN: Duration = Duration::from_secs(2);
/// Until requests that are under way may have been answered.
const BUSY: Duration = Duration::from_millis(3);
/// Who was answered has most probably taken the answer in after this time.
const TAKEN_IN: Duration = Duration::from_millis(30);
/// Threads remembered per inode that were answered and have not come again.
const ANSWERED_MAX: usize = 4;

/// Numbers revocations: taken when an operation begins, compared when it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

/// Attributes that decide whether the kernel drops its pages by itself, and the version of the data they go with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// Modification time in nanoseconds (modulo 2^64: that two times 584 years apart look the same costs a purge at worst).
    pub(crate) mtime: u64,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Version of the data.
    pub(crate) version: u64,
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
    /// The last attributes that were told, if `has_told`.
    last: Told,
    /// See `pages()`.
    pages: u64,
    rest: Option<Box<Rest>>,
    /// One that reached the maximum is not counted any more, and the inode never forgotten.
    lookups: u32,
    revoked_at: Stamp,
    asked_at: Stamp,
    has_told: bool,
    has_pages: bool,
    attributes: bool,
    /// The kernel has surely taken in an answer since the last revocation.
    settled: bool,
}

/// What is kept of some inodes only.
#[derive(Debug, Default)]
struct Rest {
    /// Of directories in which names were told.
    names: Option<Box<Names>>,
    /// What was told before the last.
    earlier: Vec<Told>,
    /// Threads that were answered since the last revocation.
    answered: Vec<u32>,
    crowd: Option<Box<Crowd>>,
}

/// Who else is about an inode of which the kernel has pages, or that is being changed.
#[derive(Debug, Default)]
struct Crowd {
    /// Requests under way that change its data.
    changing: u16,
    /// Those of them while which the kernel takes in no sizes and times.
    resizing: u16,
    /// The last threads that were answered.
    answered: [(u32, Stamp); 2],
    /// The size that the kernel has is not less than this.
    size_min: u64,
    /// And not more than this.
    size_max: u64,
}

impl Crowd {
    fn answer(&mut self, thread: u32, now: Stamp) {
        let [first, second] = &mut self.answered;
        let oldest = if first.0 == thread || second.0 != thread && first.1 <= second.1 { first } else { second };
        *oldest = (thread, now);
    }

    /// A size was told. The kernel takes it in for sure, or may go on with the one that it has.
    fn told(&mut self, size: u64, sure: bool) {
        if sure {
            (self.size_min, self.size_max) = (size, size);
        } else {
            (self.size_min, self.size_max) = (self.size_min.min(size), self.size_max.max(size));
        }
    }
}

/// A change of a file's data that is under way.
#[derive(Debug)]
pub(crate) struct Changing<'a> {
    known: &'a Known,
    ino: u64,
    thread: u32,
    resizes: bool,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let now = self.known.stamp();
        let mut shard = self.known.shard(self.ino).lock();
        let Some(inode) = shard.get_mut(&self.ino) else { return };
        let has_pages = inode.has_pages;
        let Some(rest) = &mut inode.rest else { return };
        let Some(crowd) = &mut rest.crowd else { return };
        crowd.changing = crowd.changing.saturating_sub(1);
        crowd.resizing = crowd.resizing.saturating_sub(u16::from(self.resizes));
        crowd.answer(self.thread, now);
        if !has_pages && crowd.changing == 0 {
            rest.crowd = None;
            if rest.names.is_none() && rest.earlier.is_empty() && rest.answered.is_empty() {
                inode.rest = None;
            }
        }
    }
}

/// Names told in a directory.
#[derive(Debug, Default)]
struct Names {
    /// When they were last told, since they were last revoked.
    told_at: Option<Instant>,
    /// When they were last taken back, and how long none are to be cached from then on.
    shared: Option<(Instant, Duration)>,
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

    /// The oldest data version that the kernel's pages may hold; `None`: it has no pages.
    fn pages(&self) -> Option<u64> {
        self.has_pages.then_some(self.pages)
    }

    fn set_pages(&mut self, pages: Option<u64>) {
        (self.has_pages, self.pages) = (pages.is_some(), pages.unwrap_or(0));
    }

    fn told(&self) -> impl Iterator<Item = &Told> {
        let earlier = self.rest.iter().flat_map(|rest| &rest.earlier);
        self.has_told.then_some(&self.last).into_iter().chain(earlier)
    }

    fn crowd(&mut self) -> &mut Crowd {
        let size = self.last.size;
        self.rest().crowd.get_or_insert_with(|| Box::new(Crowd { size_min: size, size_max: size, ..Crowd::default() }))
    }

    fn answered(&self) -> &[u32] {
        self.rest.as_ref().map_or(&[], |rest| &rest.answered)
    }

    /// A thread that was answered before is here again, so it has taken that answer in.
    fn heard(&mut self, thread: u32) {
        if !self.settled && thread != 0 && self.answered().contains(&thread) {
            self.settled = true;
            self.rest().answered = Vec::new();
        }
    }

    fn answer(&mut self, thread: u32) {
        if !self.settled && thread != 0 {
            let answered = &mut self.rest().answered;
            if answered.len() == ANSWERED_MAX {
                answered.remove(0);
            }
            answered.push(thread);
        }
    }

    fn revoke(&mut self, number: u64) -> Forgotten {
        let told_at = self.names_mut().and_then(|names| names.told_at.take());
        let forgotten = Forgotten {
            attributes: self.attributes,
            names: told_at.map_or(Duration::ZERO, |at| NAME_RUNS_OUT.saturating_sub(at.elapsed())),
            pages: self.has_pages,
            revocation: Revocation(number),
        };
        self.revoked = number;
        self.attributes = false;
        self.settled = false;
        if let Some(rest) = &mut self.rest {
            rest.answered = Vec::new();
        }
        forgotten
    }

    fn conflicts(&self, new: Told) -> bool {
        self.told().any(|t| t.mtime == new.mtime && t.size == new.size && t.version != new.version)
    }

    fn remember(&mut self, new: Told) {
        if self.told().any(|t| *t == new) {
            return;
        }
        if self.has_told {
            let last = self.last;
            let earlier = &mut self.rest().earlier;
            if earlier.len() + 1 == TOLD_MAX {
                earlier.remove(0);
            }
            earlier.reserve_exact(1);
            earlier.push(last);
        }
        (self.has_told, self.last) = (true, new);
    }

    fn forget_told(&mut self) {
        self.has_told = false;
        if let Some(rest) = &mut self.rest {
            rest.earlier = Vec::new();
        }
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
    /// Yes.
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

/// Boxed, so that room for more costs little when the table grows.
type Shard = HashMap<u64, Box<Inode>>;

/// The table.
#[derive(Debug)]
pub(crate) struct Known {
    shards: Vec<Mutex<Shard>>,
    since: Instant,
    revocations: AtomicU64,
    asking: AtomicUsize,
}

impl Known {
    pub(crate) fn new() -> Self {
        Known {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            since: Instant::now(),
            revocations: AtomicU64::new(1),
            asking: AtomicUsize::new(0),
        }
    }

    /// To be held from the arrival of LOOKUP, GETATTR and READDIRPLUS to their answers.
    pub(crate) fn ask(&self) -> Asking<'_> {
        self.asking.fetch_add(1, Ordering::SeqCst);
        Asking(&self.asking)
    }

    fn shard(&self, ino: u64) -> &Mutex<Shard> {
        // Inodes made one after the other differ in their low bits.
        &self.shards[(ino ^ (ino >> 32)) as usize % SHARDS]
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
        Moment(self.revocations.load(Ordering::SeqCst))
    }

    fn is_current(&self, start: Moment, inode: &Inode, was_known: bool) -> bool {
        // An inode that was unknown was not there to be marked as revoked.
        if was_known { inode.revoked <= start.0 } else { self.begin() == start }
    }

    /// Attributes of an inode are about to be sent to a thread in answer to LOOKUP or READDIRPLUS, which count as a look-up,
    /// or (with `looked_up` false) to GETATTR. Returns how long the kernel may believe them, at most `ttl`. Thread 0: one that is
    /// not known, or whose answer says nothing about what the kernel has taken in.
    #[expect(clippy::too_many_arguments, reason = "they are what an answer consists of")]
    pub(crate) fn tell(
        &self,
        start: Moment,
        thread: u32,
        ino: u64,
        generation: u64,
        told: Option<Told>,
        looked_up: bool,
        ttl: Duration,
    ) -> Duration {
        let mut shard = self.shard(ino).lock();
        let was_known = shard.contains_key(&ino);
        // An inode that is new to the kernel is made with what it is first told, whatever has been invalidated meanwhile.
        let inode = shard.entry(ino).or_insert_with(|| Box::new(Inode { settled: true, ..Inode::default() }));
        if inode.generation != generation {
            if was_known && !looked_up {
                // By another way than a look-up the kernel learns of no generation.
                return Duration::ZERO;
            }
            // The kernel makes a new inode of it, without pages. The look-ups of the old one are still to be forgotten.
            inode.generation = generation;
            inode.set_pages(None);
            inode.forget_told();
        }
        inode.lookups = inode.lookups.saturating_add(u32::from(looked_up));
        let current = self.is_current(start, inode, was_known);
        inode.heard(thread);
        if !looked_up {
            inode.asked_at = self.stamp();
        }
        let noted = inode.has_pages || inode.rest.as_ref().is_some_and(|rest| rest.crowd.is_some());
        if let Some(told) = told.filter(|_| noted) {
            let now = self.stamp();
            let crowd = inode.crowd();
            // Answers that no thread is named for (SETATTR, LINK) are not dropped because of others.
            let sure = thread == 0 || !self.has_others(crowd, thread, TAKEN_IN);
            crowd.told(told.size, sure);
            crowd.answer(thread, now);
        }
        let conflicts = told.is_some_and(|told| inode.conflicts(told));
        let mut lifetime = Duration::ZERO;
        if !conflicts {
            if let Some(told) = told {
                inode.remember(told);
            }
            if current && inode.settled {
                lifetime = ttl;
            } else if current {
                inode.answer(thread);
            }
        }
        inode.attributes |= !lifetime.is_zero();
        if inode.lookups == 0 && !was_known {
            // Not looked up (the root, or a race with FORGET): keep the entry, the root's is never forgotten; others go with
            // the next FORGET. A stray one costs some bytes.
            inode.lookups = 1;
        }
        lifetime
    }

    /// Whether the kernel would keep pages of older data if it were told this: they must be purged first.
    pub(crate) fn conflicts(&self, ino: u64, told: Told) -> bool {
        self.shard(ino).lock().get(&ino).is_some_and(|inode| inode.conflicts(told))
    }

    /// A thread changes a file's data from now on, and until it is answered: what this returns is to be dropped just before that,
    /// or the thread's next request would meet it. `None`: the kernel does not know the file. While it sets the file's size (`resizes`) the kernel takes in no other.
    pub(crate) fn change(&self, ino: u64, thread: u32, resizes: bool) -> Option<Changing<'_>> {
        let mut shard = self.shard(ino).lock();
        let crowd = shard.get_mut(&ino)?.crowd();
        crowd.changing = crowd.changing.saturating_add(1);
        crowd.resizing = crowd.resizing.saturating_add(u16::from(resizes));
        Some(Changing { known: self, ino, thread, resizes })
    }

    /// By what the kernel asked for a file was written up to here, so that it will take it to be at least that long.
    pub(crate) fn written(&self, ino: u64, end: u64) {
        let mut shard = self.shard(ino).lock();
        if let Some(crowd) = shard.get_mut(&ino).and_then(|inode| inode.rest.as_mut()?.crowd.as_mut()) {
            (crowd.size_min, crowd.size_max) = (crowd.size_min.max(end), crowd.size_max.max(end));
        }
    }

    /// Whether another thread changes the file, or was answered within this time.
    fn has_others(&self, crowd: &Crowd, thread: u32, time: Duration) -> bool {
        let other = |(who, at): &(u32, Stamp)| *who != thread && self.elapsed(*at).is_some_and(|past| past < time);
        crowd.changing > 0 || crowd.answered.iter().any(other)
    }

    /// Whether the pages of an inode are old, and what a GETATTR that came at `came` is told of it may be lost, so that a `read()`
    /// would not notice: then they must be purged first. If the kernel may have another size that would do more harm than good,
    /// since the answer is then lost for sure; but while a size is being set it is so in any case.
    pub(crate) fn doubtful(&self, ino: u64, thread: u32, told: Told, came: Instant) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino).filter(|inode| inode.has_pages && inode.pages != told.version) else {
            return false;
        };
        let Some(crowd) = inode.rest.as_ref().and_then(|rest| rest.crowd.as_ref()) else { return false };
        let has_size = crowd.size_min == told.size && crowd.size_max == told.size;
        self.has_others(crowd, thread, came.elapsed() + TAKEN_IN) && (crowd.resizing > 0 || has_size)
    }

    /// The pages of an inode were purged, at a time at which its data was at least at this version.
    pub(crate) fn purged(&self, ino: u64, told: Told) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.forget_told();
            inode.remember(told);
        }
    }

    /// A name in a directory is about to be sent: how long may the kernel believe it? At most `ttl`.
    pub(crate) fn tell_name(&self, start: Moment, directory: u64, ttl: Duration) -> Duration {
        let mut shard = self.shard(directory).lock();
        let Some(inode) = shard.get_mut(&directory) else { return Duration::ZERO };
        let recently = self.elapsed(inode.revoked_at).is_some_and(|time| time < SHARED_DIRECTORY);
        let shared = inode.names().and_then(|names| names.shared);
        let contended = recently || shared.is_some_and(|(since, time)| since.elapsed() < time);
        if ttl.is_zero() || contended || !self.is_current(start, inode, true) {
            return Duration::ZERO;
        }
        inode.revoked_at = Stamp::default();
        inode.rest().names.get_or_insert_default().told_at = Some(Instant::now());
        ttl.min(NAME_LIFETIME)
    }

    /// An access control list is about to be sent to a thread in answer to a request that began at `start`. The kernel keeps it
    /// for as long as its attributes are not invalidated, whatever the lifetime of those. False: it may be an older one by now,
    /// and must be read again.
    pub(crate) fn tell_list(&self, start: Moment, thread: u32, ino: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return self.begin() == start };
        inode.heard(thread);
        let current = self.is_current(start, inode, true);
        inode.attributes |= current;
        current
    }

    /// Data of this version is about to be sent to a thread for the page cache.
    pub(crate) fn tell_pages(&self, ino: u64, thread: u32, version: u64) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.heard(thread);
            inode.set_pages(Some(inode.pages().map_or(version, |old| old.min(version))));
        }
    }

    /// A file with data of this version is about to be opened: may the kernel keep its pages? If not, it drops them.
    pub(crate) fn keeps_pages(&self, ino: u64, version: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return false };
        let keep = inode.pages().is_none_or(|pages| pages == version);
        if !keep {
            inode.set_pages(None);
        }
        keep
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
        let number = self.revocations.fetch_add(1, Ordering::SeqCst) + 1;
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return Forgotten::default() };
        let now = Instant::now();
        inode.revoked_at = self.stamp();
        if let Some(names) = inode.names_mut()
            && names.told_at.is_some_and(|at| now - at < NAME_RUNS_OUT)
        {
            let time = match names.shared {
                Some((since, time)) if now - since < time * 8 => (time * 2).min(SHARED_DIRECTORY_MAX),
                _ => SHARED_DIRECTORY * 2,
            };
            names.shared = Some((now, time));
        }
        inode.revoke(number)
    }

    /// Attributes of an inode were changed by this node itself, on nobody's behalf. Returns what the kernel must be told.
    pub(crate) fn changed(&self, ino: u64) -> Forgotten {
        let number = self.revocations.fetch_add(1, Ordering::SeqCst) + 1;
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return Forgotten::default() };
        // Answers that are under way may be older.
        inode.revoked = number;
        Forgotten {
            attributes: std::mem::take(&mut inode.attributes),
            // What an earlier revocation wanted purged goes under this one's number now.
            pages: inode.has_pages && !inode.settled,
            revocation: Revocation(number),
            ..Forgotten::default()
        }
    }

    /// Whether the pages of an inode whose last revocation was this one are to be purged now. Who asks about the inode again
    /// and again needs no purge, and is not to be met by one.
    pub(crate) fn refresh(&self, ino: u64, revocation: Revocation) -> Refresh {
        let shard = self.shard(ino).lock();
        let wanted = |i: &&Inode| i.revoked == revocation.0 && i.has_pages && !i.settled && i.answered().is_empty();
        let Some(inode) = shard.get(&ino).map(|inode| &**inode).filter(wanted) else { return Refresh::Needless };
        let asked = self.elapsed(inode.asked_at).map_or(Duration::ZERO, |time| ASKS_AGAIN.saturating_sub(time));
        match asked {
            Duration::ZERO if self.asking.load(Ordering::SeqCst) > 0 => Refresh::Later(BUSY),
            Duration::ZERO => Refresh::Now,
            wait => Refresh::Later(wait),
        }
    }

    /// All tokens are gone. Returns every inode of which the kernel believes something or has pages.
    pub(crate) fn revoke_all(&self) -> Vec<(u64, Forgotten)> {
        let number = self.revocations.fetch_add(1, Ordering::SeqCst) + 1;
        let mut all = Vec::new();
        for shard in &self.shards {
            for (ino, inode) in shard.lock().iter_mut() {
                let forgotten = inode.revoke(number);
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
    const M: Told = Told { mtime: 5, size: 10, version: 1 };

    /// The kernel may know millions of inodes, and gives them up only when it needs their memory: about 1 KiB each.
    #[test]
    fn an_inode_takes_a_tenth_of_what_it_takes_in_the_kernel() {
        assert!(size_of::<Inode>() <= 72, "{}", size_of::<Inode>());
    }

    #[test]
    fn an_answer_overtaken_by_a_revocation_is_not_believed() {
        let known = Known::new();
        let start = known.begin();
        assert_eq!(known.tell(start, 0, 7, 1, Some(M), true, TTL), TTL);
        let late = known.begin();
        assert!(known.revoke(7).attributes);
        assert_eq!(known.tell(late, 0, 7, 1, Some(M), false, TTL), Duration::ZERO);
        assert!(!known.revoke(7).attributes, "nothing was believed, so nothing is to be forgotten");
        // The first answer since: nothing may make the kernel drop it, so there must be nothing to take back.
        assert_eq!(known.tell(known.begin(), 21, 7, 1, Some(M), false, TTL), Duration::ZERO);
        assert_eq!(known.tell(known.begin(), 22, 7, 1, Some(M), false, TTL), Duration::ZERO, "21 may still be asleep");
        assert!(!known.revoke(7).attributes);
        assert_eq!(known.tell(known.begin(), 21, 7, 1, Some(M), false, TTL), Duration::ZERO, "an answer before a revocation");
        assert_eq!(known.tell(known.begin(), 21, 7, 1, Some(M), false, TTL), TTL, "it has taken that one in");
        assert_eq!(known.tell(known.begin(), 22, 7, 1, Some(M), false, TTL), TTL);
        assert!(known.revoke(7).attributes);
    }

    #[tokio::test(start_paused = true)]
    async fn pages_are_purged_for_mappings_only_if_no_answer_does_it() {
        let known = Known::new();
        let now = |forgotten: Forgotten| known.refresh(7, forgotten.revocation);
        known.tell(known.begin(), 1, 7, 1, Some(M), true, TTL);
        known.tell_pages(7, 1, 1);
        let first = known.revoke(7);
        assert!(first.pages);
        let asking = known.ask();
        assert_eq!(now(first), Refresh::Later(BUSY));
        drop(asking);
        assert_eq!(now(first), Refresh::Now);
        known.tell(known.begin(), 1, 7, 1, Some(Told { version: 2, ..M }), false, TTL);
        assert_eq!(now(first), Refresh::Later(ASKS_AGAIN), "an answer by which the kernel sees no difference");
        known.tell(known.begin(), 1, 7, 1, Some(Told { mtime: 6, version: 2, ..M }), false, TTL);
        assert_eq!(now(first), Refresh::Needless);
        let second = known.revoke(7);
        assert_eq!(now(first), Refresh::Needless, "that is left to the newer one");
        assert_eq!(now(second), Refresh::Later(ASKS_AGAIN), "somebody asked a moment ago, and will again");
        tokio::time::advance(ASKS_AGAIN).await;
        assert_eq!(now(second), Refresh::Now);
        // An access time that is set in between does not make the pages any younger.
        let changed = known.changed(7);
        assert!(changed.pages);
        assert_eq!((now(second), now(changed)), (Refresh::Needless, Refresh::Now));
    }

    #[test]
    fn a_list_that_was_told_is_taken_back_though_attributes_were_told_for_no_time() {
        let known = Known::new();
        known.tell(known.begin(), 1, 7, 1, Some(M), true, Duration::ZERO);
        assert!(!known.revoke(7).attributes);
        let start = known.begin();
        assert!(known.tell_list(start, 1, 7));
        assert!(known.revoke(7).attributes);
        assert!(!known.tell_list(start, 1, 7), "it may be an older one");
        assert!(!known.revoke(7).attributes, "nothing was told since");
    }

    #[tokio::test(start_paused = true)]
    async fn pages_are_purged_where_an_answer_may_be_lost() {
        let known = Known::new();
        let newer = Told { mtime: 6, version: 2, ..M };
        let (came, doubtful) = (Instant::now(), |told| known.doubtful(7, 1, told, Instant::now()));
        known.tell(known.begin(), 1, 7, 1, Some(M), true, TTL);
        known.tell_pages(7, 1, 1);
        known.tell(known.begin(), 1, 7, 1, Some(M), false, TTL);
        assert!(!doubtful(newer), "nobody else is about");
        // Another thread's answer may be taken in first.
        known.tell(known.begin(), 2, 7, 1, Some(M), false, TTL);
        assert!(doubtful(newer) && !doubtful(M), "but what is as old as the pages needs no purge");
        tokio::time::advance(TAKEN_IN * 2).await;
        assert!(!doubtful(newer), "it has been by now");
        assert!(known.doubtful(7, 1, newer, came), "not if this request came before that");
        // A size that has changed would be lost with the purge.
        let longer = Told { size: 11, ..newer };
        let write = known.change(7, 2, false);
        assert!(doubtful(newer) && !doubtful(longer));
        known.written(7, 11);
        assert!(doubtful(longer), "it was changed here");
        // A size that was told beside another request may not have been taken in.
        known.tell(known.begin(), 1, 7, 1, Some(Told { size: 12, version: 3, mtime: 7 }), false, TTL);
        assert!(!doubtful(Told { size: 12, version: 4, mtime: 8 }) && !doubtful(longer));
        known.written(7, 12);
        assert!(doubtful(Told { size: 12, version: 4, mtime: 8 }), "now it is known again");
        known.tell(known.begin(), 0, 7, 1, Some(Told { size: 11, version: 5, mtime: 9 }), false, TTL);
        assert!(doubtful(Told { size: 11, version: 6, mtime: 10 }), "as it is after it was set");
        // While a size is being set, none is taken in.
        let truncation = known.change(7, 3, true);
        assert!(doubtful(newer) && doubtful(longer));
        drop((write, truncation));
        tokio::time::advance(TAKEN_IN * 2).await;
        assert!(!doubtful(newer) && !doubtful(longer));
    }

    #[test]
    fn what_is_changed_without_pages_leaves_nothing_behind() {
        let known = Known::new();
        known.tell(known.begin(), 0, 7, 1, Some(M), true, TTL);
        drop(known.change(7, 2, true));
        assert!(known.shard(7).lock().get(&7).is_some_and(|inode| inode.rest.is_none()));
    }

    #[test]
    fn an_unknown_inode_revoked_meanwhile_is_not_believed() {
        let known = Known::new();
        let start = known.begin();
        known.revoke(7);
        assert_eq!(known.tell(start, 0, 7, 1, Some(M), true, TTL), Duration::ZERO);
    }

    #[test]
    fn same_mtime_and_size_with_other_data_conflicts_until_purged() {
        let known = Known::new();
        known.tell(known.begin(), 0, 7, 1, Some(M), true, TTL);
        let changed = Told { version: 2, ..M };
        assert!(known.conflicts(7, changed));
        assert_eq!(known.tell(known.begin(), 0, 7, 1, Some(changed), false, TTL), Duration::ZERO);
        assert!(known.conflicts(7, changed), "an answer that could not wait must not hide the conflict");
        known.purged(7, changed);
        assert!(!known.conflicts(7, changed));
        assert!(!known.conflicts(7, Told { mtime: 6, version: 3, ..M }), "another mtime makes the kernel purge by itself");
    }

    #[test]
    fn pages_are_kept_only_while_the_data_is_the_same() {
        let known = Known::new();
        known.tell(known.begin(), 0, 7, 1, Some(M), true, TTL);
        assert!(known.keeps_pages(7, 1));
        known.tell_pages(7, 0, 1);
        assert!(known.keeps_pages(7, 1));
        assert!(!known.keeps_pages(7, 2));
        known.tell_pages(7, 0, 2);
        assert!(known.keeps_pages(7, 2));
    }

    #[test]
    fn forgetting_drops_the_inode_and_a_new_generation_starts_afresh() {
        let known = Known::new();
        known.tell(known.begin(), 0, 7, 1, Some(M), true, TTL);
        known.tell(known.begin(), 0, 7, 2, Some(Told { version: 9, ..M }), true, TTL);
        assert!(!known.conflicts(7, Told { version: 9, ..M }));
        known.forget(7, 1);
        assert!(known.contains(7));
        known.forget(7, 1);
        assert!(!known.contains(7));
    }

    #[tokio::test(start_paused = true)]
    async fn names_run_out_and_are_not_cached_in_a_directory_shared_with_writers() {
        let known = Known::new();
        let tell = || known.tell_name(known.begin(), 1, TTL);
        known.tell(known.begin(), 0, 1, 1, None, true, TTL);
        assert_eq!(tell(), NAME_LIFETIME);
        tokio::time::advance(NAME_LIFETIME).await;
        assert_eq!(known.revoke(1).names, NAME_RUNS_OUT - NAME_LIFETIME);
        assert_eq!(known.revoke(1).names, Duration::ZERO);
        assert_eq!(tell(), Duration::ZERO);
        tokio::time::advance(SHARED_DIRECTORY * 2).await;
        assert_eq!(tell(), NAME_LIFETIME);
        assert_eq!(known.revoke(1).names, NAME_RUNS_OUT);
        // Again: it was too short.
        tokio::time::advance(SHARED_DIRECTORY * 3).await;
        assert_eq!(tell(), Duration::ZERO);
        tokio::time::advance(SHARED_DIRECTORY).await;
        assert_eq!(tell(), NAME_LIFETIME);
        // Nobody has to wait for names that were told long ago.
        tokio::time::advance(SHARED_DIRECTORY_MAX).await;
        assert_eq!(known.revoke(1).names, Duration::ZERO);
        tokio::time::advance(SHARED_DIRECTORY).await;
        assert_eq!(tell(), NAME_LIFETIME);
    }
}
