//! What one kernel mount was told, and so may still believe.
//!
//! For every inode that the kernel knows: how often it looked it up, whether it holds attributes or names on the strength
//! of a token, which (mtime, size) it was told at which data version, and how old its pages may be.
//!
//! Invariants:
//! - `attributes` (`names`) is set before a reply that lets the kernel believe something leaves, and cleared only by a
//!   revocation, which then tells the kernel. So a revocation never misses a reply.
//! - An operation that began before an inode was last revoked answers with a lifetime of zero: its token may be gone.
//! - One (mtime, size) stands for one data version in `told`; an answer that would break this first purges the pages.
//!
//! Excludes: telling the kernel (`notify`), and what the answers mean (`fuse`).
//!
//! Why replies need no lock: the kernel notes its attribute version (and its epoch) when it *sends* LOOKUP, GETATTR and
//! READDIRPLUS, and drops from the answer what an invalidation has overtaken. It does not do so for SETATTR, CREATE, MKDIR
//! and the like: their answers carry attributes with a lifetime of zero.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Locks, so that threads seldom meet.
const SHARDS: usize = 64;
/// Remembered (mtime, size, version) per inode. The kernel holds the last that it accepted; it rejects one only if an
/// invalidation overtook it, so that many in a row cannot be missed.
const TOLD_MAX: usize = 8;
/// After another node changed a directory, names in it are not cached for this long: it is probably being written by both,
/// and every revocation would throw away all names of the mount.
const SHARED_DIRECTORY: Duration = Duration::from_millis(1000);

/// Numbers revocations: taken when an operation begins, compared when it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

/// Attributes that decide whether the kernel drops its pages by itself, and the version of the data they go with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Modification time in nanoseconds (any unambiguous number).
    pub(crate) mtime: i128,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Version of the data.
    pub(crate) version: u64,
}

#[derive(Debug, Default)]
struct Inode {
    lookups: u64,
    generation: u64,
    revoked: u64,
    revoked_at: Option<Instant>,
    attributes: bool,
    names: bool,
    listed: bool,
    /// The oldest data version that the kernel's pages may hold; `None`: it has no pages.
    pages: Option<u64>,
    told: Vec<Told>,
}

impl Inode {
    fn conflicts(&self, new: Told) -> bool {
        self.told.iter().any(|t| t.mtime == new.mtime && t.size == new.size && t.version != new.version)
    }

    fn remember(&mut self, new: Told) {
        if self.told.contains(&new) {
            return;
        }
        if self.told.len() == TOLD_MAX {
            self.told.remove(0);
        }
        self.told.push(new);
    }
}

/// What must be told to the kernel about a revoked inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forgotten {
    /// Invalidate its attributes.
    pub(crate) attributes: bool,
    /// Invalidate the names in it (it is a directory).
    pub(crate) names: bool,
    /// Names were given by READDIRPLUS, too, for which the kernel notes its epoch only when the answer arrives.
    pub(crate) listed: bool,
    /// It has pages, which memory mappings go on using until they are purged.
    pub(crate) pages: bool,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Known {
    shards: Vec<Mutex<HashMap<u64, Inode>>>,
    revocations: AtomicU64,
}

impl Known {
    pub(crate) fn new() -> Self {
        Known { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), revocations: AtomicU64::new(1) }
    }

    fn shard(&self, ino: u64) -> &Mutex<HashMap<u64, Inode>> {
        // Inodes made one after the other differ in their low bits.
        &self.shards[(ino ^ (ino >> 32)) as usize % SHARDS]
    }

    /// To be called before an operation asks for its tokens.
    pub(crate) fn begin(&self) -> Moment {
        Moment(self.revocations.load(Ordering::SeqCst))
    }

    fn is_current(&self, start: Moment, inode: &Inode, was_known: bool) -> bool {
        // An inode that was unknown was not there to be marked as revoked.
        if was_known { inode.revoked <= start.0 } else { self.begin() == start }
    }

    /// Attributes of an inode are about to be sent in answer to LOOKUP or READDIRPLUS, which count as a look-up, or (with
    /// `looked_up` false) to GETATTR. Returns how long the kernel may believe them, at most `ttl`.
    pub(crate) fn tell(
        &self,
        start: Moment,
        ino: u64,
        generation: u64,
        told: Option<Told>,
        looked_up: bool,
        ttl: Duration,
    ) -> Duration {
        let mut shard = self.shard(ino).lock();
        let was_known = shard.contains_key(&ino);
        let inode = shard.entry(ino).or_default();
        if inode.generation != generation {
            // The kernel makes a new inode of it, without pages. The look-ups of the old one are still to be forgotten.
            inode.generation = generation;
            inode.pages = None;
            inode.told.clear();
        }
        inode.lookups += u64::from(looked_up);
        let current = self.is_current(start, inode, was_known);
        let mut lifetime = if current { ttl } else { Duration::ZERO };
        if let Some(told) = told {
            if inode.conflicts(told) {
                lifetime = Duration::ZERO;
            } else {
                inode.remember(told);
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

    /// The pages of an inode were purged, at a time at which its data was at least at this version.
    pub(crate) fn purged(&self, ino: u64, told: Told) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.told.clear();
            inode.told.push(told);
        }
    }

    /// A name in a directory is about to be sent: how long may the kernel believe it? `listed`: by READDIRPLUS.
    pub(crate) fn tell_name(&self, start: Moment, directory: u64, listed: bool, ttl: Duration) -> Duration {
        let mut shard = self.shard(directory).lock();
        let Some(inode) = shard.get_mut(&directory) else { return Duration::ZERO };
        let contended = inode.revoked_at.is_some_and(|at| at.elapsed() < SHARED_DIRECTORY);
        if ttl.is_zero() || contended || !self.is_current(start, inode, true) {
            return Duration::ZERO;
        }
        inode.revoked_at = None;
        inode.names = true;
        inode.listed |= listed;
        ttl
    }

    /// Data of this version is about to be sent for the page cache.
    pub(crate) fn tell_pages(&self, ino: u64, version: u64) {
        if let Some(inode) = self.shard(ino).lock().get_mut(&ino) {
            inode.pages = Some(inode.pages.map_or(version, |old| old.min(version)));
        }
    }

    /// A file with data of this version is about to be opened: may the kernel keep its pages? If not, it drops them.
    pub(crate) fn keeps_pages(&self, ino: u64, version: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(inode) = shard.get_mut(&ino) else { return false };
        let keep = inode.pages.is_none_or(|pages| pages == version);
        if !keep {
            inode.pages = None;
        }
        keep
    }

    /// The kernel forgot some look-ups.
    pub(crate) fn forget(&self, ino: u64, lookups: u64) {
        let mut shard = self.shard(ino).lock();
        if let Some(inode) = shard.get_mut(&ino) {
            inode.lookups = inode.lookups.saturating_sub(lookups);
            if inode.lookups == 0 {
                shard.remove(&ino);
            }
        }
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
        let forgotten =
            Forgotten { attributes: inode.attributes, names: inode.names, listed: inode.listed, pages: inode.pages.is_some() };
        inode.revoked = number;
        inode.revoked_at = Some(Instant::now());
        inode.attributes = false;
        inode.names = false;
        inode.listed = false;
        forgotten
    }

    /// All tokens are gone. Returns every inode that the kernel knows.
    pub(crate) fn revoke_all(&self) -> Vec<u64> {
        let number = self.revocations.fetch_add(1, Ordering::SeqCst) + 1;
        let mut all = Vec::new();
        for shard in &self.shards {
            for (ino, inode) in shard.lock().iter_mut() {
                inode.revoked = number;
                inode.attributes = false;
                inode.names = false;
                inode.listed = false;
                all.push(*ino);
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

    #[test]
    fn an_answer_overtaken_by_a_revocation_is_not_believed() {
        let known = Known::new();
        let start = known.begin();
        assert_eq!(known.tell(start, 7, 1, Some(M), true, TTL), TTL);
        let late = known.begin();
        assert!(known.revoke(7).attributes);
        assert_eq!(known.tell(late, 7, 1, Some(M), false, TTL), Duration::ZERO);
        assert!(!known.revoke(7).attributes, "nothing was believed, so nothing is to be forgotten");
        assert_eq!(known.tell(known.begin(), 7, 1, Some(M), false, TTL), TTL);
    }

    #[test]
    fn an_unknown_inode_revoked_meanwhile_is_not_believed() {
        let known = Known::new();
        let start = known.begin();
        known.revoke(7);
        assert_eq!(known.tell(start, 7, 1, Some(M), true, TTL), Duration::ZERO);
    }

    #[test]
    fn same_mtime_and_size_with_other_data_conflicts_until_purged() {
        let known = Known::new();
        known.tell(known.begin(), 7, 1, Some(M), true, TTL);
        let changed = Told { version: 2, ..M };
        assert!(known.conflicts(7, changed));
        assert_eq!(known.tell(known.begin(), 7, 1, Some(changed), false, TTL), Duration::ZERO);
        assert!(known.conflicts(7, changed), "an answer that could not wait must not hide the conflict");
        known.purged(7, changed);
        assert!(!known.conflicts(7, changed));
        assert!(!known.conflicts(7, Told { mtime: 6, version: 3, ..M }), "another mtime makes the kernel purge by itself");
    }

    #[test]
    fn pages_are_kept_only_while_the_data_is_the_same() {
        let known = Known::new();
        known.tell(known.begin(), 7, 1, Some(M), true, TTL);
        assert!(known.keeps_pages(7, 1));
        known.tell_pages(7, 1);
        assert!(known.keeps_pages(7, 1));
        assert!(!known.keeps_pages(7, 2));
        known.tell_pages(7, 2);
        assert!(known.keeps_pages(7, 2));
    }

    #[test]
    fn forgetting_drops_the_inode_and_a_new_generation_starts_afresh() {
        let known = Known::new();
        known.tell(known.begin(), 7, 1, Some(M), true, TTL);
        known.tell(known.begin(), 7, 2, Some(Told { version: 9, ..M }), true, TTL);
        assert!(!known.conflicts(7, Told { version: 9, ..M }));
        known.forget(7, 1);
        assert!(known.contains(7));
        known.forget(7, 1);
        assert!(!known.contains(7));
    }

    #[tokio::test(start_paused = true)]
    async fn names_in_a_directory_shared_with_writers_are_not_cached() {
        let known = Known::new();
        known.tell(known.begin(), 1, 1, None, true, TTL);
        assert_eq!(known.tell_name(known.begin(), 1, false, TTL), TTL);
        assert!(known.revoke(1).names);
        assert_eq!(known.tell_name(known.begin(), 1, false, TTL), Duration::ZERO);
        tokio::time::advance(SHARED_DIRECTORY).await;
        assert_eq!(known.tell_name(known.begin(), 1, true, TTL), TTL);
        assert!(known.revoke(1).listed);
    }
}
