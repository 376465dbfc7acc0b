//! The small log: circular, of records that are whole blocks long.
//!
//! ```text
//! record = head blocks (fixed part, then a 64-byte slot per block written) + payload blocks, in slot order
//! ```
//!
//! Invariants:
//! - A record counts only if its checksum, its place in the sequence and its chain (the checksum of the record before
//!   it) are right, and every payload block has the checksum that its slot says. What comes after the first record that
//!   does not count is no part of the log, even if it looks whole: the chain keeps remains of an earlier, torn end out.
//! - Records apply in order; for each block the last slot marked `applied` wins. So replaying a log over tables that
//!   already have some of it is harmless.
//! - `durable`, in each record, is the sequence up to which everything was durable before it was written: a bad record
//!   at or below it is damage, not a torn end.
//!
//! Excludes: I/O (`shell::disk`), what records mean for other nodes (`replica`).

use crate::api::{Kind, Tag, Version, WriteGroup};
use crate::format::{Checksum, block_checksum, get_16, get_u32, get_u64, put};
use crate::message::{Slot, Writer};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, Epoch, Incarnation, MirrorId, NodeId};

const MAGIC: u32 = u32::from_le_bytes(*b"PLOG");
const VERSION: u16 = 1;
const FIXED: usize = 128;
const SLOT: usize = 64;
const SUM_AT: usize = 104;
/// Most blocks of a record.
pub(crate) const RECORD_BLOCKS_MAX: u64 = head_blocks(WriteGroup::BLOCKS_MAX) as u64 + WriteGroup::BLOCKS_MAX as u64;
const _: () = assert!(crate::format::LOG_BLOCKS_MIN >= 3 * RECORD_BLOCKS_MAX);

/// What a record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum RecordKind {
    /// A group of writes.
    Write = 1,
    /// The groups of a mirror that were recorded so far are no longer uncertain (writer 0: of all writers).
    Forget = 2,
    /// Repeats an uncertain group's slots without payload, whose record is about to be overwritten.
    Carry = 3,
}

/// A slot as it is kept in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogSlot {
    /// The block's new version.
    pub slot: Slot,
    /// Its contents are in the record's payload (otherwise they are at home, or there are none).
    pub in_log: bool,
    /// The block took this version (otherwise it had a newer one already).
    pub applied: bool,
}

/// A record without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// What it is for.
    pub kind: RecordKind,
    /// Its number.
    pub sequence: u64,
    /// Everything up to this number was durable before this record was written.
    pub durable: u64,
    /// The mirror that it is about.
    pub mirror: MirrorId,
    /// First block of the mirror's copy in the disk's data area.
    pub base: u32,
    /// The epoch in which it was accepted.
    pub epoch: Epoch,
    /// Who wrote.
    pub writer: Writer,
    /// The group's number among the writer's in this mirror.
    pub wseq: u64,
    /// The writer's groups in this mirror up to this one were complete everywhere.
    pub completed_upto: u64,
    /// The writes.
    pub slots: Vec<LogSlot>,
}

/// Blocks of a record's head.
const fn head_blocks(slots: usize) -> usize {
    (FIXED + SLOT * slots).div_ceil(BLOCK_SIZE)
}

impl Record {
    /// Blocks of payload.
    #[must_use]
    pub(crate) fn payload_blocks(&self) -> usize {
        self.slots.iter().filter(|s| s.in_log).count()
    }

    /// Blocks in all.
    #[must_use]
    pub(crate) fn blocks(&self) -> u64 {
        (head_blocks(self.slots.len()) + self.payload_blocks()) as u64
    }

    /// The head's blocks, and its checksum (the next record's chain).
    #[must_use]
    pub(crate) fn encode(&self, uuid: &[u8; 16], chain: &Checksum) -> (Bytes, Checksum) {
        let mut b = vec![0; head_blocks(self.slots.len()) * BLOCK_SIZE];
        put(&mut b, 0, &MAGIC.to_le_bytes());
        put(&mut b, 4, &VERSION.to_le_bytes());
        b[6] = self.kind as u8;
        put(&mut b, 8, &self.sequence.to_le_bytes());
        put(&mut b, 16, chain);
        put(&mut b, 32, &(self.blocks() as u32).to_le_bytes());
        put(&mut b, 36, &(self.slots.len() as u32).to_le_bytes());
        put(&mut b, 40, &self.mirror.0.to_le_bytes());
        put(&mut b, 44, &self.base.to_le_bytes());
        put(&mut b, 48, &self.epoch.0.to_le_bytes());
        put(&mut b, 56, &self.writer.node.0.to_le_bytes());
        put(&mut b, 64, &self.writer.incarnation.0.to_le_bytes());
        put(&mut b, 72, &self.wseq.to_le_bytes());
        put(&mut b, 80, &self.completed_upto.to_le_bytes());
        put(&mut b, 88, &self.durable.to_le_bytes());
        for (i, s) in self.slots.iter().enumerate() {
            let at = FIXED + i * SLOT;
            put(&mut b, at, &s.slot.index.to_le_bytes());
            b[at + 4] = s.slot.tag.kind as u8;
            b[at + 5] = u8::from(s.slot.has_data) | u8::from(s.in_log) << 1 | u8::from(s.applied) << 2;
            put(&mut b, at + 8, &s.slot.tag.birth.to_le_bytes());
            put(&mut b, at + 16, &s.slot.tag.owner.to_le_bytes());
            put(&mut b, at + 24, &s.slot.tag.offset.to_le_bytes());
            put(&mut b, at + 32, &s.slot.version.0.to_le_bytes());
            put(&mut b, at + 40, &s.slot.checksum);
        }
        let sum = checksum(&b, uuid);
        put(&mut b, SUM_AT, &sum);
        (b.into(), sum)
    }

    /// How many head blocks and blocks in all a record has whose first block is given; `None` if it cannot be one.
    #[must_use]
    pub(crate) fn measure(first: &[u8]) -> Option<(usize, usize)> {
        if first.len() < BLOCK_SIZE || get_u32(first, 0) != MAGIC || first[4..6] != VERSION.to_le_bytes() {
            return None;
        }
        let (blocks, slots) = (get_u32(first, 32) as usize, get_u32(first, 36) as usize);
        if slots > WriteGroup::BLOCKS_MAX {
            return None;
        }
        let head = head_blocks(slots);
        (head <= blocks && blocks <= head + slots).then_some((head, blocks))
    }

    /// Checks and decodes a head (of the length that `measure` gave). Returns the record, its chain field and its own
    /// checksum.
    #[must_use]
    pub(crate) fn decode(b: &[u8], uuid: &[u8; 16]) -> Option<(Record, Checksum, Checksum)> {
        let (head, blocks) = Self::measure(b)?;
        let b = b.get(..head * BLOCK_SIZE)?;
        let sum = checksum(b, uuid);
        if sum[..] != b[SUM_AT..SUM_AT + 16] {
            return None;
        }
        let kind = match b[6] {
            1 => RecordKind::Write,
            2 => RecordKind::Forget,
            3 => RecordKind::Carry,
            _ => return None,
        };
        let mut slots = Vec::with_capacity(get_u32(b, 36) as usize);
        for i in 0..get_u32(b, 36) as usize {
            let at = FIXED + i * SLOT;
            let flags = b[at + 5];
            slots.push(LogSlot {
                slot: Slot {
                    index: get_u32(b, at),
                    tag: Tag {
                        kind: Kind::from_u8(b[at + 4])?,
                        birth: get_u32(b, at + 8),
                        owner: get_u64(b, at + 16),
                        offset: get_u64(b, at + 24),
                    },
                    version: Version(get_u64(b, at + 32)),
                    has_data: flags & 1 != 0,
                    checksum: get_16(b, at + 40),
                },
                in_log: flags & 2 != 0,
                applied: flags & 4 != 0,
            });
        }
        let record = Record {
            kind,
            sequence: get_u64(b, 8),
            durable: get_u64(b, 88),
            mirror: MirrorId(get_u32(b, 40)),
            base: get_u32(b, 44),
            epoch: Epoch(get_u64(b, 48)),
            writer: Writer { node: NodeId(get_u32(b, 56)), incarnation: Incarnation(get_u64(b, 64)) },
            wseq: get_u64(b, 72),
            completed_upto: get_u64(b, 80),
            slots,
        };
        (record.blocks() == blocks as u64).then_some((record, get_16(b, 16), sum))
    }

    /// Whether payload blocks (in slot order) are those that the slots say.
    #[must_use]
    pub(crate) fn payload_is_right(&self, payload: &[u8]) -> bool {
        let mut blocks = payload.chunks_exact(BLOCK_SIZE);
        self.slots.iter().filter(|s| s.in_log).all(|s| {
            let s = &s.slot;
            blocks.next().is_some_and(|data| {
                s.has_data && block_checksum(self.mirror, s.index, s.version, &s.tag, Some(data)) == s.checksum
            })
        })
    }
}

fn checksum(head: &[u8], uuid: &[u8; 16]) -> Checksum {
    let mut hasher = blake3::Hasher::new();
    hasher.update(uuid).update(&head[..SUM_AT]).update(&[0; 16]).update(&head[SUM_AT + 16..]);
    get_16(hasher.finalize().as_bytes(), 0)
}

/// Where the log begins and ends. Positions are in blocks within the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogState {
    blocks: u64,
    tail: Mark,
    head: Mark,
}

/// A place between two records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Where the next record begins.
    pub pos: u64,
    /// Its number.
    pub sequence: u64,
    /// What its chain field must say.
    pub chain: Checksum,
}

impl LogState {
    /// An empty log that goes on at a place.
    #[must_use]
    pub(crate) fn new(blocks: u64, tail: Mark) -> Self {
        LogState { blocks, tail, head: tail }
    }

    /// Where replay would begin.
    #[must_use]
    pub(crate) fn tail(&self) -> Mark {
        self.tail
    }

    /// Where the next record goes.
    #[must_use]
    pub(crate) fn head(&self) -> Mark {
        self.head
    }

    /// Blocks between tail and head.
    #[must_use]
    pub(crate) fn used(&self) -> u64 {
        if self.head.sequence == self.tail.sequence {
            return 0;
        }
        let used = (self.head.pos + self.blocks - self.tail.pos) % self.blocks;
        if used == 0 { self.blocks } else { used }
    }

    /// Blocks that can be appended. One stays free, so that a full log does not look empty.
    #[must_use]
    pub(crate) fn free(&self) -> u64 {
        self.blocks - 1 - self.used().min(self.blocks - 1)
    }

    /// Size of the log.
    #[must_use]
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Takes a record in. The caller has checked that there is room.
    pub(crate) fn append(&mut self, blocks: u64, chain: Checksum) {
        assert!(blocks <= self.free(), "log overrun");
        self.head = Mark { pos: (self.head.pos + blocks) % self.blocks, sequence: self.head.sequence + 1, chain };
    }

    /// Gives back what is before a mark.
    pub(crate) fn release(&mut self, to: Mark) {
        assert!(self.tail.sequence <= to.sequence && to.sequence <= self.head.sequence, "the tail only moves forward");
        self.tail = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn record(sequence: u64, n: u32) -> (Record, Vec<u8>) {
        let mut slots = Vec::new();
        let mut payload = Vec::new();
        for i in 0..n {
            let tag = Tag { kind: Kind::Data, owner: 5, offset: u64::from(i), birth: 1 };
            let (index, version) = (i * 3, Version(7 << 40 | sequence));
            let data = (i % 4 != 3).then(|| vec![i as u8 + 1; BLOCK_SIZE]);
            let checksum = block_checksum(MirrorId(2), index, version, &tag, data.as_deref());
            let slot = Slot { index, tag, version, has_data: data.is_some(), checksum };
            slots.push(LogSlot { slot, in_log: data.is_some(), applied: i % 2 == 0 });
            payload.extend(data.unwrap_or_default());
        }
        let writer = Writer { node: NodeId(1), incarnation: Incarnation(4) };
        let record = Record {
            kind: RecordKind::Write,
            sequence,
            durable: sequence - 1,
            mirror: MirrorId(2),
            base: 100,
            epoch: Epoch(7),
            writer,
            wseq: 9,
            completed_upto: 3,
            slots,
        };
        (record, payload)
    }

    #[test]
    fn a_record_comes_back_and_every_flipped_bit_is_seen() {
        let uuid = [3; 16];
        for n in [0, 1, 2, 62, 63, 200, 1024] {
            let (r, payload) = record(12, n);
            let (bytes, sum) = r.encode(&uuid, &[8; 16]);
            assert_eq!(r.blocks() as usize, (bytes.len() + payload.len()) / BLOCK_SIZE);
            assert!(r.blocks() <= RECORD_BLOCKS_MAX);
            assert_eq!(Record::decode(&bytes, &uuid), Some((r.clone(), [8; 16], sum)));
            assert!(r.payload_is_right(&payload));
            assert_eq!(Record::decode(&bytes, &[4; 16]), None);
            for bit in (0..bytes.len() * 8).step_by(37 + n as usize * 11) {
                let mut bad = bytes.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Record::decode(&bad, &uuid), None, "bit {bit}");
            }
            if let Some(byte) = payload.len().checked_sub(1000) {
                let mut bad = payload.clone();
                bad[byte] ^= 1;
                assert!(!r.payload_is_right(&bad));
            }
        }
        assert_eq!(Record::measure(&[0; BLOCK_SIZE]), None);
    }

    #[test]
    fn space_is_counted_right_round_and_round() {
        let start = Mark { pos: 90, sequence: 5, chain: [0; 16] };
        let mut log = LogState::new(100, start);
        assert_eq!((log.used(), log.free()), (0, 99));
        let mut marks = Vec::new();
        for i in 0..200u64 {
            let n = i % 7 + 1;
            while log.free() < n {
                log.release(marks.remove(0));
            }
            let before = log.used();
            log.append(n, [i as u8; 16]);
            assert_eq!(log.used(), before + n);
            marks.push(log.head());
        }
        log.release(log.head());
        assert_eq!(log.used(), 0);
    }
}
