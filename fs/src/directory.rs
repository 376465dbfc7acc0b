//! Entries of directories: names that lead to inodes.
//!
//! A directory is a tree keyed by the hash of the name. The value of a key is a *bucket*: the entries of all names with that
//! hash. A name may have several entries, its *candidates*: one is *valid* if its inode is alive, has the same generation and
//! has the parent record `(directory, hash, seq)`; of several valid ones the highest seq wins. An entry is *flagged* while
//! an operation on its name is under way (or was, before a crash): only then must its inodes be asked when listing.
//!
//! ```text
//! bucket: entries, sorted by (slot, seq)
//! entry:  u64 ino, u64 generation, u64 seq, u8 kind, u8 flags (1: flagged), u8 slot, u8 name length, name
//! ```
//!
//! Invariants:
//! - Sequence numbers come from the counter of the leaf that the entry is in (`Node::aux`), which is written with the entry
//!   and never goes back: no parent record is ever repeated (rule 1). Names of equal hash share the counter.
//! - The low 4 bits of a hash are 0: they tell names of equal hash apart (the *slot*), so that hash and slot together are a
//!   position in the listing that stays the same while other names come and go.
//!
//! Excludes: judging candidates (it needs their inodes: `ops::resolve`).

use crate::btree::{self, Leaf};
use crate::error::{FsError, Result};
use crate::format::{NAME_MAX, get_u64};
use crate::inode::{FileKind, Ino, Inode, Parent};
use crate::transaction::{Source, Transaction};
use bytes::Bytes;
use sld::{After, Disk, WriteId};

/// Bytes of an entry without its name.
const ENTRY_LEN: usize = 28;
/// The highest slot: one bucket holds so many names. Slot 0 is not used, so that no position is a hash alone.
const SLOT_MAX: u8 = 15;
/// Positions below this are used for `.` and `..`.
const FIRST_HASH: u64 = 16;

/// The keyed hash of names (SipHash-2-4): whoever does not know the key cannot make names collide.
#[derive(Clone, Copy)]
pub struct NameHash {
    key: [u64; 2],
}

impl NameHash {
    /// With the key from the superblock.
    #[must_use]
    pub fn new(key: &[u8; 16]) -> Self {
        NameHash { key: [get_u64(key, 0), get_u64(key, 8)] }
    }

    /// A name's hash: a positive number whose low 4 bits are 0, and at least 16.
    #[must_use]
    pub fn of(&self, name: &[u8]) -> u64 {
        (self.sip(name) & 0x7fff_ffff_ffff_fff0).max(FIRST_HASH)
    }

    fn sip(&self, data: &[u8]) -> u64 {
        let [k0, k1] = self.key;
        let mut v =
            [k0 ^ 0x736f_6d65_7073_6575, k1 ^ 0x646f_7261_6e64_6f6d, k0 ^ 0x6c79_6765_6e65_7261, k1 ^ 0x7465_6462_7974_6573];
        let round = |v: &mut [u64; 4]| {
            v[0] = v[0].wrapping_add(v[1]);
            v[1] = v[1].rotate_left(13) ^ v[0];
            v[0] = v[0].rotate_left(32);
            v[2] = v[2].wrapping_add(v[3]);
            v[3] = v[3].rotate_left(16) ^ v[2];
            v[0] = v[0].wrapping_add(v[3]);
            v[3] = v[3].rotate_left(21) ^ v[0];
            v[2] = v[2].wrapping_add(v[1]);
            v[1] = v[1].rotate_left(17) ^ v[2];
            v[2] = v[2].rotate_left(32);
        };
        let mut words = data.chunks_exact(8);
        for word in &mut words {
            let word = get_u64(word, 0);
            v[3] ^= word;
            round(&mut v);
            round(&mut v);
            v[0] ^= word;
        }
        let mut last = [0; 8];
        last[..words.remainder().len()].copy_from_slice(words.remainder());
        last[7] = data.len() as u8;
        let word = u64::from_le_bytes(last);
        v[3] ^= word;
        round(&mut v);
        round(&mut v);
        v[0] ^= word;
        v[2] ^= 0xff;
        for _ in 0..4 {
            round(&mut v);
        }
        v[0] ^ v[1] ^ v[2] ^ v[3]
    }
}

/// Checks that a name can be one.
///
/// # Errors
/// `NameTooLong`; `Invalid` for an empty name and names with a slash or a zero.
pub fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(FsError::NameTooLong);
    }
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
        return Err(FsError::Invalid("not a possible name"));
    }
    Ok(())
}

/// An entry: a name that leads to an inode, if that agrees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The inode.
    pub ino: Ino,
    /// Its generation.
    pub generation: u64,
    /// Sequence number, as in the inode's parent record.
    pub seq: u64,
    /// Type of the inode.
    pub kind: FileKind,
    /// Whether the inodes of this name's candidates must be asked.
    pub flagged: bool,
    /// Tells names of equal hash apart; all candidates of a name have the same.
    pub slot: u8,
    /// The name.
    pub name: Bytes,
}

impl Entry {
    /// The parent record that makes the entry valid.
    #[must_use]
    pub fn record(&self, dir: Ino, hash: u64) -> Parent {
        Parent { dir: dir.0, hash, seq: self.seq }
    }
}

/// The entries of all names with one hash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Sorted by slot and seq.
    pub entries: Vec<Entry>,
}

impl Bucket {
    /// Reads a bucket; `None` if it is damaged.
    #[must_use]
    pub fn decode(bytes: &Bytes) -> Option<Bucket> {
        let mut entries = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let head = bytes.get(at..at + ENTRY_LEN)?;
            let len = usize::from(head[27]);
            let name_at = at + ENTRY_LEN;
            if len == 0 || len > NAME_MAX || name_at + len > bytes.len() {
                return None;
            }
            entries.push(Entry {
                ino: Ino(get_u64(head, 0)),
                generation: get_u64(head, 8),
                seq: get_u64(head, 16),
                kind: FileKind::from_number(head[24])?,
                flagged: head[25] & 1 != 0,
                slot: head[26],
                name: bytes.slice(name_at..name_at + len),
            });
            at = name_at + len;
        }
        Some(Bucket { entries })
    }

    /// The bucket's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.entries.iter().map(|e| ENTRY_LEN + e.name.len()).sum());
        for entry in &self.entries {
            bytes.extend_from_slice(&entry.ino.0.to_le_bytes());
            bytes.extend_from_slice(&entry.generation.to_le_bytes());
            bytes.extend_from_slice(&entry.seq.to_le_bytes());
            bytes.extend_from_slice(&[entry.kind as u8, u8::from(entry.flagged), entry.slot, entry.name.len() as u8]);
            bytes.extend_from_slice(&entry.name);
        }
        bytes
    }

    /// The candidates of a name.
    pub fn of<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = &'a Entry> {
        self.entries.iter().filter(move |e| e.name == name)
    }

    /// The slot of a name, or a free one for it; `None` if all are taken.
    #[must_use]
    pub fn slot(&self, name: &[u8]) -> Option<u8> {
        if let Some(entry) = self.of(name).next() {
            return Some(entry.slot);
        }
        (1..=SLOT_MAX).find(|slot| self.entries.iter().all(|e| e.slot != *slot))
    }

    /// Adds an entry. The slot is chosen here.
    ///
    /// # Errors
    /// `NoSpace` if there are too many names with this hash.
    pub fn add(&mut self, mut entry: Entry) -> Result<()> {
        entry.slot = self.slot(&entry.name).ok_or(FsError::NoSpace)?;
        self.entries.push(entry);
        self.entries.sort_by_key(|e| (e.slot, e.seq));
        Ok(())
    }

    /// Drops the entries of a name with these sequence numbers.
    pub fn remove(&mut self, name: &[u8], seqs: &[u64]) {
        self.entries.retain(|e| e.name != name || !seqs.contains(&e.seq));
    }

    /// Sets or clears the flag of an entry.
    pub fn flag(&mut self, name: &[u8], seq: u64, flagged: bool) {
        for entry in self.entries.iter_mut().filter(|e| e.name == name && e.seq == seq) {
            entry.flagged = flagged;
        }
    }

    /// The entries, name by name.
    pub fn names(&self) -> impl Iterator<Item = &[Entry]> {
        self.entries.chunk_by(|a, b| a.slot == b.slot)
    }
}

/// The bucket of a hash and the leaf that it is in (also if it is empty).
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn bucket<D: Disk>(source: Source<'_, D>, dir: &Inode, hash: u64) -> Result<(Bucket, Leaf)> {
    let leaf = btree::leaf(source, dir, hash).await?;
    let Ok(index) = leaf.node.search(hash) else {
        return Ok((Bucket::default(), leaf));
    };
    let value = leaf.node.value(index);
    match value.as_ref().and_then(Bucket::decode) {
        Some(bucket) => Ok((bucket, leaf)),
        None => Err(FsError::corrupt(leaf.block, "damaged directory entry")),
    }
}

/// The highest sequence number given out so far for the names of a leaf.
///
/// # Errors
/// `Corrupt` if the directory has no tree.
pub fn counter(dir: &Inode, leaf: &Leaf) -> Result<u64> {
    // The root's counter stands for those of leaves that are gone.
    Ok(leaf.node.aux().max(dir.root()?.aux()))
}

/// Writes a bucket after `after`, its leaf's counter with it. Returns the write that makes it durable.
///
/// # Errors
/// `NoSpace`, those of the disk, `Corrupt`; `dir` must not be written then.
pub async fn put<D: Disk>(
    tx: &mut Transaction<'_, D>,
    dir: &mut Inode,
    hash: u64,
    bucket: &Bucket,
    counter: u64,
    after: &[After],
) -> Result<WriteId> {
    if bucket.entries.is_empty() {
        return match btree::remove(tx, dir, hash, after).await? {
            Some(write) => Ok(write),
            None => Err(FsError::corrupt(dir.ino.block(), "an entry vanished")),
        };
    }
    btree::insert(tx, dir, hash, &bucket.encode(), counter, after).await
}

/// A name as a listing sees it: its position, and its candidates.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Hash of the name.
    pub hash: u64,
    /// Position in the listing: hash and slot.
    pub position: u64,
    /// All entries of the name; at least one.
    pub candidates: Vec<Entry>,
}

impl Listed {
    /// Whether the inodes must be asked.
    #[must_use]
    pub fn flagged(&self) -> bool {
        self.candidates.len() > 1 || self.candidates.iter().any(|e| e.flagged)
    }
}

/// Names whose position is greater than `position`, in order: at least `max` unless there are no more.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn list<D: Disk>(source: Source<'_, D>, dir: &Inode, position: u64, max: usize) -> Result<Vec<Listed>> {
    let hash = position & !u64::from(SLOT_MAX);
    let mut listed = Vec::new();
    for (hash, value) in btree::range(source, dir, hash, max + 1).await? {
        let bucket = Bucket::decode(&value).ok_or(FsError::corrupt(dir.ino.block(), "damaged directory entry"))?;
        for entries in bucket.names() {
            let here = hash | u64::from(entries[0].slot);
            if here > position {
                listed.push(Listed { hash, position: here, candidates: entries.to_vec() });
            }
        }
    }
    Ok(listed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, seq: u64) -> Entry {
        Entry {
            ino: Ino(1 << 32 | seq),
            generation: seq * 3,
            seq,
            kind: FileKind::File,
            flagged: seq.is_multiple_of(2),
            slot: 0,
            name: Bytes::copy_from_slice(name.as_bytes()),
        }
    }

    #[test]
    fn the_hash_is_siphash() {
        // The reference's test vector: key 00..0f, message 00..0e.
        let key: [u8; 16] = std::array::from_fn(|i| i as u8);
        let message: Vec<u8> = (0..15).collect();
        assert_eq!(NameHash::new(&key).sip(&message), 0xa129_ca61_49be_45e5);
    }

    #[test]
    fn buckets_keep_names_of_equal_hash_apart() {
        let mut bucket = Bucket::default();
        for (name, seq) in [("b", 1), ("a", 2), ("b", 3), ("c", 4)] {
            bucket.add(entry(name, seq)).unwrap();
        }
        let decoded = Bucket::decode(&Bytes::from(bucket.encode())).unwrap();
        assert_eq!(decoded, bucket);
        assert_eq!(bucket.names().map(|n| n.len()).collect::<Vec<_>>(), [2, 1, 1]);
        assert_eq!(bucket.of(b"b").map(|e| (e.slot, e.seq)).collect::<Vec<_>>(), [(1, 1), (1, 3)]);
        bucket.remove(b"a", &[2]);
        bucket.add(entry("d", 5)).unwrap();
        assert_eq!(bucket.slot(b"c"), Some(3));
        assert_eq!(bucket.slot(b"d"), Some(2));
        for i in 0..12 {
            bucket.add(entry(&format!("x{i}"), 10 + i)).unwrap();
        }
        assert_eq!(bucket.add(entry("y", 99)), Err(FsError::NoSpace));
        let bytes = bucket.encode();
        for cut in 0..bytes.len() {
            let _ = Bucket::decode(&Bytes::copy_from_slice(&bytes[..cut]));
        }
    }

    #[test]
    fn impossible_names_are_refused() {
        assert_eq!(check_name(&[b'a'; 256]), Err(FsError::NameTooLong));
        assert!(check_name(&[b'a'; 255]).is_ok());
        for name in [&b""[..], b"a/b", b"a\0"] {
            assert!(matches!(check_name(name), Err(FsError::Invalid(_))));
        }
    }
}
