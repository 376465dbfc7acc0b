//! Bytes of a disk: label, areas, tag table. The log's records are in `log`.
//!
//! ```text
//! block 0, 1   label (two copies, written in turn; the valid one with the higher generation counts)
//! block 2 .. 7 left to the daemon: a copy of the cluster's configuration, for checks of a stopped cluster
//! block 8 ..   log        circular, 1/16 of the disk, 16 MiB to 256 MiB
//!              bitmap     1 bit per data block, set: allocated
//!              tags       64 bytes per data block
//!              data       the blocks of the mirrors' copies
//! ```
//!
//! Invariants:
//! - Everything read is checked before it takes part in arithmetic: a label's areas must be exactly those that its size
//!   and log size lead to.
//! - A tag entry of only zeros means "never written"; any other carries a check of itself and its place.
//! - A block's checksum is over contents, place, version and tag: a misdirected, lost or flipped write shows.
//!
//! Excludes: I/O order (`shell::disk`).

use crate::api::{BlockDevice, Kind, Tag, Version};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, MirrorId};
use std::io;

/// First bytes of a label.
pub const LABEL_MAGIC: [u8; 8] = *b"PULSARDK";
/// Version of the disk format.
pub const FORMAT_VERSION: u32 = 1;
/// Where the log begins.
pub const LOG_START: u64 = 8;
/// The smallest log: 16 MiB, so that a few of the largest records fit.
pub const LOG_BLOCKS_MIN: u64 = 4096;
/// The largest log: 256 MiB.
pub const LOG_BLOCKS_MAX: u64 = 65_536;
/// Bytes of a tag table entry.
pub const TAG_BYTES: usize = 64;
/// Tag entries in a block.
pub const TAGS_PER_BLOCK: u32 = (BLOCK_SIZE / TAG_BYTES) as u32;
/// Bits in a bitmap block.
pub const BITS_PER_BLOCK: u32 = (BLOCK_SIZE * 8) as u32;
/// The smallest disk: room for the smallest log and one region.
pub const DISK_BLOCKS_MIN: u64 = LOG_START + LOG_BLOCKS_MIN + 1024;

/// A block's checksum.
pub type Checksum = [u8; 16];

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Neither copy of the label has the magic number.
    #[error("not a Pulsar disk (no label found); prepare it with `pulsar disk add`")]
    NotPulsar,
    /// A label is there but neither copy is right.
    #[error("both copies of the disk's label are damaged; replace the disk, or restore the label")]
    LabelDamaged,
    /// Made by another version of the software.
    #[error("the disk has format version {found}, this daemon knows version {FORMAT_VERSION}")]
    Version {
        /// What the label says.
        found: u32,
    },
    /// It belongs to another cluster.
    #[error("the disk belongs to another cluster ({found}); this one is {expected}")]
    OtherCluster {
        /// The label's cluster.
        found: String,
        /// This cluster.
        expected: String,
    },
    /// It is not the disk that was expected.
    #[error("this is disk {found}, but disk {expected} was expected here")]
    OtherDisk {
        /// The label's identity.
        found: String,
        /// The configured one.
        expected: String,
    },
    /// Fewer blocks than when it was formatted.
    #[error("the disk has {found} blocks of 4 KiB but was formatted with {expected}; it was cut off")]
    Shrunk {
        /// Now.
        found: u64,
        /// At formatting.
        expected: u64,
    },
    /// Cannot be formatted.
    #[error("a disk needs at least {DISK_BLOCKS_MIN} blocks of 4 KiB, this one has {found}")]
    TooSmall {
        /// What it has.
        found: u64,
    },
    /// An acknowledged part of the log is damaged.
    #[error("the disk's log is damaged at record {sequence}: acknowledged writes would be lost; replace the disk")]
    LogDamaged {
        /// The first bad record.
        sequence: u64,
    },
    /// I/O failed.
    #[error("the disk cannot be read or written: {0}")]
    Io(#[from] io::Error),
}

/// Bytes as hexadecimal digits, for messages.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Where a disk's areas are, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk.
    pub blocks: u64,
    /// First block of the log.
    pub log_start: u64,
    /// Length of the log.
    pub log_blocks: u64,
    /// First block of the bitmap.
    pub bitmap_start: u64,
    /// Length of the bitmap.
    pub bitmap_blocks: u64,
    /// First block of the tag table.
    pub tags_start: u64,
    /// Length of the tag table.
    pub tags_blocks: u64,
    /// First data block.
    pub data_start: u64,
    /// Data blocks.
    pub data_blocks: u32,
}

impl Geometry {
    /// The areas of a disk of a size, with the usual log.
    #[must_use]
    pub fn for_disk(blocks: u64) -> Option<Geometry> {
        Self::with_log(blocks, (blocks / 16).clamp(LOG_BLOCKS_MIN, LOG_BLOCKS_MAX))
    }

    /// The areas of a disk with a log of a given size; `None` if they do not fit.
    #[must_use]
    pub fn with_log(blocks: u64, log_blocks: u64) -> Option<Geometry> {
        if blocks < DISK_BLOCKS_MIN || !(LOG_BLOCKS_MIN..=LOG_BLOCKS_MAX).contains(&log_blocks) {
            return None;
        }
        let rest = blocks.checked_sub(LOG_START)?.checked_sub(log_blocks)?;
        // 1 data block costs 1 + 1/64 + 1/32768 blocks; the quotient is at most a few blocks too high.
        let mut data = (rest / 33_281).saturating_mul(32_768).saturating_add((rest % 33_281) * 32_768 / 33_281);
        let cost = |data: u64| data + data.div_ceil(u64::from(TAGS_PER_BLOCK)) + data.div_ceil(u64::from(BITS_PER_BLOCK));
        while data > 0 && cost(data) > rest {
            data -= 1;
        }
        let data = data.min(u64::from(u32::MAX) - 1);
        if data == 0 {
            return None;
        }
        let bitmap_start = LOG_START + log_blocks;
        let bitmap_blocks = data.div_ceil(u64::from(BITS_PER_BLOCK));
        let tags_start = bitmap_start + bitmap_blocks;
        let tags_blocks = data.div_ceil(u64::from(TAGS_PER_BLOCK));
        let data_start = tags_start + tags_blocks;
        Some(Geometry {
            blocks,
            log_start: LOG_START,
            log_blocks,
            bitmap_start,
            bitmap_blocks,
            tags_start,
            tags_blocks,
            data_start,
            data_blocks: u32::try_from(data).ok()?,
        })
    }
}

/// A disk's label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The cluster that it belongs to.
    pub cluster: [u8; 16],
    /// The disk's identity.
    pub uuid: [u8; 16],
    /// Counts the writes of the label.
    pub generation: u64,
    /// Its areas.
    pub geometry: Geometry,
    /// Where replaying the log begins, in blocks within the log.
    pub tail_pos: u64,
    /// Sequence number of the record there (or of the next one, if the log is empty).
    pub tail_sequence: u64,
    /// Checksum of the record before it: what its chain field must say.
    pub tail_chain: Checksum,
    /// At least the highest counter of any version that was written before the tail.
    pub clock: u64,
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    // Callers pass whole blocks and constant offsets; a short slice gives zeros, which no check accepts.
    bytes.get(at..at + N).and_then(|s| s.try_into().ok()).unwrap_or([0; N])
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(bytes, at))
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(bytes, at))
}

pub(crate) fn get_16(bytes: &[u8], at: usize) -> [u8; 16] {
    get(bytes, at)
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

const LABEL_SUM_AT: usize = BLOCK_SIZE - 32;

impl Label {
    /// The label as a block.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = vec![0; BLOCK_SIZE];
        put(&mut b, 0, &LABEL_MAGIC);
        put(&mut b, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut b, 16, &self.cluster);
        put(&mut b, 32, &self.uuid);
        let g = &self.geometry;
        let words = [
            self.generation,
            g.blocks,
            g.log_start,
            g.log_blocks,
            g.bitmap_start,
            g.bitmap_blocks,
            g.tags_start,
            g.tags_blocks,
            g.data_start,
            u64::from(g.data_blocks),
            self.tail_pos,
            self.tail_sequence,
            self.clock,
        ];
        for (i, word) in words.iter().enumerate() {
            put(&mut b, 48 + 8 * i, &word.to_le_bytes());
        }
        put(&mut b, 160, &self.tail_chain);
        let sum = blake3::hash(&b[..LABEL_SUM_AT]);
        put(&mut b, LABEL_SUM_AT, sum.as_bytes());
        b.into()
    }

    /// Checks and decodes a block.
    ///
    /// # Errors
    /// `NotPulsar`, `Version`, or `LabelDamaged`.
    pub fn decode(b: &[u8]) -> Result<Label, OpenError> {
        if b.len() != BLOCK_SIZE || b[..8] != LABEL_MAGIC {
            return Err(OpenError::NotPulsar);
        }
        if blake3::hash(&b[..LABEL_SUM_AT]).as_bytes()[..] != b[LABEL_SUM_AT..] {
            return Err(OpenError::LabelDamaged);
        }
        let version = get_u32(b, 8);
        if version != FORMAT_VERSION {
            return Err(OpenError::Version { found: version });
        }
        let word = |i: usize| get_u64(b, 48 + 8 * i);
        let geometry = Geometry::with_log(word(1), word(3)).ok_or(OpenError::LabelDamaged)?;
        let stored = (word(2), word(4), word(5), word(6), word(7), word(8), word(9));
        let g = &geometry;
        let made =
            (g.log_start, g.bitmap_start, g.bitmap_blocks, g.tags_start, g.tags_blocks, g.data_start, u64::from(g.data_blocks));
        let label = Label {
            cluster: get(b, 16),
            uuid: get(b, 32),
            generation: word(0),
            geometry,
            tail_pos: word(10),
            tail_sequence: word(11),
            tail_chain: get(b, 160),
            clock: word(12),
        };
        // Sequence and generation leave room to count on for ever.
        let high = u64::MAX / 2;
        if stored != made || label.tail_pos >= g.log_blocks || label.tail_sequence > high || label.generation > high {
            return Err(OpenError::LabelDamaged);
        }
        Ok(label)
    }
}

/// Prepares a disk: everything that was on it is lost. Returns its label.
///
/// # Errors
/// `TooSmall` or `Io`.
pub async fn format_disk(device: &dyn BlockDevice, cluster: [u8; 16], uuid: [u8; 16]) -> Result<Label, OpenError> {
    let blocks = device.blocks();
    let geometry = Geometry::for_disk(blocks).ok_or(OpenError::TooSmall { found: blocks })?;
    // Order: no label while the tables are being cleared, so that a half-made disk is not taken for a whole one.
    let zero = Bytes::from(vec![0; 256 * BLOCK_SIZE]);
    device.write(0, vec![zero.slice(..LOG_START as usize * BLOCK_SIZE)]).await?;
    device.flush().await?;
    clear(device, geometry.bitmap_start, geometry.data_start, &zero).await?;
    // An old log would be refused by its chain and identity. The log is written through so that in a sparse file its space
    // is there: a flush after an append then need not wait for the file system's own journal.
    let mut at = geometry.log_start;
    while at < geometry.bitmap_start {
        let count = (geometry.bitmap_start - at).min(256);
        device.write(at, vec![zero.slice(..count as usize * BLOCK_SIZE)]).await?;
        at += count;
    }
    device.flush().await?;
    let label = Label { cluster, uuid, generation: 1, geometry, tail_pos: 0, tail_sequence: 1, tail_chain: [0; 16], clock: 0 };
    device.write(label.generation % 2, vec![label.encode()]).await?;
    device.flush().await?;
    Ok(label)
}

/// Clears blocks, leaving those alone that are zero already (a sparse file stays sparse).
async fn clear(device: &dyn BlockDevice, start: u64, end: u64, zero: &Bytes) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let count = (end - at).min(256) as usize;
        let old = device.read(at, count).await?;
        if old.iter().any(|b| *b != 0) {
            device.write(at, vec![zero.slice(..count * BLOCK_SIZE)]).await?;
        }
        at += count as u64;
    }
    Ok(())
}

/// Reads a disk's label: the valid copy with the higher generation.
///
/// # Errors
/// As [`Label::decode`], or `Io`, `Shrunk`.
pub async fn read_label(device: &dyn BlockDevice) -> Result<Label, OpenError> {
    if device.blocks() < DISK_BLOCKS_MIN {
        return Err(OpenError::NotPulsar);
    }
    let both = device.read(0, 2).await?;
    let first = Label::decode(both.get(..BLOCK_SIZE).unwrap_or_default());
    let second = Label::decode(both.get(BLOCK_SIZE..).unwrap_or_default());
    let label = match (first, second) {
        (Ok(a), Ok(b)) => {
            if a.generation >= b.generation {
                a
            } else {
                b
            }
        }
        (Ok(a), Err(_)) => a,
        (Err(_), Ok(b)) => b,
        // A version that is not known says more than damage, and damage more than nothing.
        (Err(e @ OpenError::Version { .. }), _) | (_, Err(e @ OpenError::Version { .. })) => return Err(e),
        (Err(OpenError::NotPulsar), Err(e)) | (Err(e), _) => return Err(e),
    };
    if label.geometry.blocks > device.blocks() {
        return Err(OpenError::Shrunk { found: device.blocks(), expected: label.geometry.blocks });
    }
    Ok(label)
}

impl Kind {
    /// The kind with a number, if there is one.
    #[must_use]
    pub fn from_u8(n: u8) -> Option<Kind> {
        Some(match n {
            0 => Kind::Free,
            1 => Kind::Super,
            2 => Kind::Inode,
            3 => Kind::Directory,
            4 => Kind::Extents,
            5 => Kind::Data,
            6 => Kind::Attribute,
            _ => return None,
        })
    }
}

/// A block's entry in the tag table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TagEntry {
    /// Version of contents and tag; 0: never written.
    pub version: Version,
    /// What the upper layer gave.
    pub tag: Tag,
    /// Whether it has contents; without, it reads as zeros.
    pub has_data: bool,
    /// Checksum over contents, place, version and tag.
    pub checksum: Checksum,
}

impl TagEntry {
    /// The entry for data block `addr` of a disk.
    #[must_use]
    pub fn encode(&self, addr: u32) -> [u8; TAG_BYTES] {
        let mut b = [0; TAG_BYTES];
        if self.version == Version(0) {
            return b;
        }
        put(&mut b, 0, &self.checksum);
        put(&mut b, 16, &self.version.0.to_le_bytes());
        put(&mut b, 24, &self.tag.owner.to_le_bytes());
        put(&mut b, 32, &self.tag.offset.to_le_bytes());
        put(&mut b, 40, &self.tag.birth.to_le_bytes());
        b[44] = self.tag.kind as u8;
        b[45] = u8::from(self.has_data);
        let check = Self::check(&b, addr);
        put(&mut b, 56, &check);
        b
    }

    fn check(b: &[u8], addr: u32) -> [u8; 8] {
        let mut input = [0; 60];
        input[..56].copy_from_slice(&b[..56]);
        input[56..].copy_from_slice(&addr.to_le_bytes());
        get(blake3::hash(&input).as_bytes(), 0)
    }

    /// Decodes an entry; `None` if it is damaged.
    #[must_use]
    pub fn decode(b: &[u8], addr: u32) -> Option<TagEntry> {
        if b.len() != TAG_BYTES {
            return None;
        }
        if b.iter().all(|x| *x == 0) {
            return Some(TagEntry::default());
        }
        if Self::check(b, addr)[..] != b[56..] {
            return None;
        }
        Some(TagEntry {
            version: Version(get_u64(b, 16)),
            tag: Tag { kind: Kind::from_u8(b[44])?, owner: get_u64(b, 24), offset: get_u64(b, 32), birth: get_u32(b, 40) },
            has_data: b[45] & 1 != 0,
            checksum: get(b, 0),
        })
    }
}

/// Digest of a block's contents: independent of place and version, so that it is computed once per write.
pub type Digest = [u8; 32];

/// The digest of a block's contents.
#[must_use]
pub fn digest(data: &[u8]) -> Digest {
    *blake3::hash(data).as_bytes()
}

/// A block's checksum from its contents' digest (`None`: it has no contents).
#[must_use]
pub fn seal(mirror: MirrorId, index: u32, version: Version, tag: &Tag, digest: Option<&Digest>) -> Checksum {
    let mut b = [0; 72];
    put(&mut b, 0, &mirror.0.to_le_bytes());
    put(&mut b, 4, &index.to_le_bytes());
    put(&mut b, 8, &version.0.to_le_bytes());
    put(&mut b, 16, &tag.owner.to_le_bytes());
    put(&mut b, 24, &tag.offset.to_le_bytes());
    put(&mut b, 32, &tag.birth.to_le_bytes());
    b[36] = tag.kind as u8;
    b[37] = u8::from(digest.is_some());
    put(&mut b, 40, digest.unwrap_or(&[0; 32]));
    get(blake3::hash(&b).as_bytes(), 0)
}

/// A block's checksum. `data`: its contents, `None` if it has none.
#[must_use]
pub fn block_checksum(mirror: MirrorId, index: u32, version: Version, tag: &Tag, data: Option<&[u8]>) -> Checksum {
    seal(mirror, index, version, tag, data.map(digest).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label() -> Label {
        Label {
            cluster: [1; 16],
            uuid: [2; 16],
            generation: 7,
            geometry: Geometry::for_disk(100_000).unwrap(),
            tail_pos: 17,
            tail_sequence: 99,
            tail_chain: [3; 16],
            clock: 1234,
        }
    }

    #[test]
    fn areas_fill_disks_of_every_size_without_overlap() {
        for blocks in (DISK_BLOCKS_MIN..40_000).step_by(7).chain((1 << 20..1 << 33).step_by(123_456_789)) {
            let g = Geometry::for_disk(blocks).unwrap();
            assert_eq!(g.bitmap_start, g.log_start + g.log_blocks);
            assert!(u64::from(g.data_blocks) <= g.bitmap_blocks * u64::from(BITS_PER_BLOCK));
            assert!(u64::from(g.data_blocks) <= g.tags_blocks * u64::from(TAGS_PER_BLOCK));
            let end = g.data_start + u64::from(g.data_blocks);
            assert!(end <= blocks, "{g:?}");
            assert!(blocks - end < 4 || g.data_blocks == u32::MAX - 1, "wasted {} of {blocks}", blocks - end);
        }
        assert_eq!(Geometry::for_disk(DISK_BLOCKS_MIN - 1), None);
        assert!(Geometry::for_disk(u64::MAX).is_some());
    }

    #[test]
    fn a_label_comes_back_and_every_flipped_bit_is_seen() {
        let block = label().encode();
        assert_eq!(Label::decode(&block).unwrap(), label());
        for bit in (0..BLOCK_SIZE * 8).step_by(5) {
            let mut bad = block.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Label::decode(&bad).is_err());
        }
    }

    #[test]
    fn an_entry_comes_back_and_damage_or_a_wrong_place_is_seen() {
        let e = TagEntry {
            version: Version(77 << 40 | 5),
            tag: Tag { kind: Kind::Data, owner: 1, offset: 2, birth: 3 },
            has_data: true,
            checksum: [9; 16],
        };
        let b = e.encode(12);
        assert_eq!(TagEntry::decode(&b, 12), Some(e));
        assert_eq!(TagEntry::decode(&b, 13), None);
        for bit in 0..TAG_BYTES * 8 {
            let mut bad = b;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(TagEntry::decode(&bad, 12), None);
        }
        assert_eq!(TagEntry::decode(&[0; TAG_BYTES], 5), Some(TagEntry::default()));
    }
}
