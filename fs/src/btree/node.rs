//! A node: a slotted area of bytes that is searched without being parsed. The layout is in `format`.
//!
//! Invariants: slots do not overlap the heap; keys ascend; every value lies within the heap. They hold for nodes that this
//! code has made; a node from disk whose header or slots break them answers `None`, and never panics.

use crate::format::{get_u16, get_u64, put_u16, put_u64};
use bytes::Bytes;

const HEADER: usize = 16;
const SLOT: usize = 12;

/// The longest value: three of them, with their slots, fit the smallest node that can be split.
pub const VALUE_MAX: usize = 1280;

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    bytes: Bytes,
}

impl Node {
    /// A node without keys.
    #[must_use]
    pub fn empty(level: u8, len: usize) -> Node {
        let mut bytes = vec![0; len];
        bytes[0] = level;
        put_u16(&mut bytes, 4, len as u16);
        Node { bytes: Bytes::from(bytes) }
    }

    /// A node from its bytes; `None` if the header or a slot is impossible.
    #[must_use]
    pub fn decode(bytes: Bytes) -> Option<Node> {
        let node = Node { bytes };
        let (count, heap, live) = (node.len(), node.heap(), usize::from(get_u16(&node.bytes, 6)));
        let fits = HEADER + count * SLOT <= heap && heap <= node.bytes.len() && live <= node.bytes.len() - heap;
        fits.then_some(node)
    }

    /// All of its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// 0 for a leaf, else the distance to the leaves.
    #[must_use]
    pub fn level(&self) -> u8 {
        self.bytes.first().copied().unwrap_or(0)
    }

    /// Keys in it.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(get_u16(&self.bytes, 2))
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number that directories keep in each node.
    #[must_use]
    pub fn aux(&self) -> u64 {
        get_u64(&self.bytes, 8)
    }

    fn heap(&self) -> usize {
        usize::from(get_u16(&self.bytes, 4))
    }

    /// A key by its position.
    #[must_use]
    pub fn key(&self, index: usize) -> u64 {
        get_u64(&self.bytes, HEADER + index * SLOT)
    }

    /// A value by its position.
    #[must_use]
    pub fn value(&self, index: usize) -> Option<Bytes> {
        if index >= self.len() {
            return None;
        }
        let slot = HEADER + index * SLOT;
        let (at, len) = (usize::from(get_u16(&self.bytes, slot + 8)), usize::from(get_u16(&self.bytes, slot + 10)));
        (at >= self.heap() && at + len <= self.bytes.len()).then(|| self.bytes.slice(at..at + len))
    }

    /// Position of a key, or where it would be.
    pub fn search(&self, key: u64) -> Result<usize, usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = (low + high) / 2;
            match self.key(middle).cmp(&key) {
                std::cmp::Ordering::Equal => return Ok(middle),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Err(low)
    }

    /// Whether a value for a key fits, in place of the present one if there is one.
    #[must_use]
    pub fn fits(&self, key: u64, len: usize) -> bool {
        let live = usize::from(get_u16(&self.bytes, 6));
        let free = self.bytes.len() - HEADER - self.len() * SLOT - live;
        match self.search(key) {
            Ok(index) => free + self.value(index).map_or(0, |v| v.len()) >= len,
            Err(_) => free >= len + SLOT,
        }
    }

    /// Bytes used by slots and values.
    #[must_use]
    pub fn used(&self) -> usize {
        self.len() * SLOT + usize::from(get_u16(&self.bytes, 6))
    }

    /// Sets a key's value. The caller has made sure that it fits.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn insert(&mut self, key: u64, value: &[u8]) {
        assert!(self.fits(key, value.len()), "a value of {} bytes does not fit", value.len());
        if let Ok(index) = self.search(key)
            && let Some(old) = self.value(index)
            && old.len() == value.len()
        {
            let at = HEADER + index * SLOT + 8;
            self.edit(|bytes| {
                let at = usize::from(get_u16(bytes, at));
                bytes[at..at + value.len()].copy_from_slice(value);
            });
            return;
        }
        self.remove(key);
        if self.heap() < HEADER + (self.len() + 1) * SLOT + value.len() {
            self.compact(self.bytes.len());
        }
        let index = self.search(key).unwrap_or_else(|i| i);
        let (count, heap) = (self.len(), self.heap() - value.len());
        self.edit(|bytes| {
            let slot = HEADER + index * SLOT;
            bytes.copy_within(slot..HEADER + count * SLOT, slot + SLOT);
            put_u64(bytes, slot, key);
            put_u16(bytes, slot + 8, heap as u16);
            put_u16(bytes, slot + 10, value.len() as u16);
            bytes[heap..heap + value.len()].copy_from_slice(value);
            put_u16(bytes, 2, count as u16 + 1);
            put_u16(bytes, 4, heap as u16);
            let live = get_u16(bytes, 6) + value.len() as u16;
            put_u16(bytes, 6, live);
        });
    }

    /// Removes a key; false if it is not there.
    pub fn remove(&mut self, key: u64) -> bool {
        let Ok(index) = self.search(key) else {
            return false;
        };
        let (count, len) = (self.len(), self.value(index).map_or(0, |v| v.len()));
        self.edit(|bytes| {
            let slot = HEADER + index * SLOT;
            bytes.copy_within(slot + SLOT..HEADER + count * SLOT, slot);
            put_u16(bytes, 2, count as u16 - 1);
            let live = get_u16(bytes, 6).saturating_sub(len as u16);
            put_u16(bytes, 6, live);
        });
        true
    }

    /// Removes the keys from `key` on; false if there were none.
    pub fn truncate(&mut self, key: u64) -> bool {
        let index = self.search(key).unwrap_or_else(|i| i);
        let count = self.len();
        if index >= count {
            return false;
        }
        let len: usize = (index..count).filter_map(|i| self.value(i)).map(|v| v.len()).sum();
        self.edit(|bytes| {
            put_u16(bytes, 2, index as u16);
            let live = get_u16(bytes, 6).saturating_sub(len as u16);
            put_u16(bytes, 6, live);
        });
        true
    }

    /// Sets the number that directories keep.
    pub fn set_aux(&mut self, aux: u64) {
        self.edit(|bytes| put_u64(bytes, 8, aux));
    }

    /// The same contents in an area of another size, without gaps.
    #[must_use]
    pub fn resized(&self, len: usize) -> Node {
        let mut node = self.clone();
        node.compact(len);
        node
    }

    /// The keys from position `from` on (before `to`), as a node of their own.
    #[must_use]
    pub fn part(&self, from: usize, to: usize, len: usize) -> Node {
        let mut node = Node::empty(self.level(), len);
        let mut bytes = node.bytes.to_vec();
        let (mut heap, mut live) = (len, 0);
        let mut count = 0;
        for (index, value) in (from..to).filter_map(|i| self.value(i).map(|v| (i, v))) {
            if heap < HEADER + (count + 1) * SLOT + value.len() {
                break; // Only a damaged node has values that overlap.
            }
            heap -= value.len();
            live += value.len();
            bytes[heap..heap + value.len()].copy_from_slice(&value);
            let slot = HEADER + count * SLOT;
            put_u64(&mut bytes, slot, self.key(index));
            put_u16(&mut bytes, slot + 8, heap as u16);
            put_u16(&mut bytes, slot + 10, value.len() as u16);
            count += 1;
        }
        put_u16(&mut bytes, 2, count as u16);
        put_u16(&mut bytes, 4, heap as u16);
        put_u16(&mut bytes, 6, live as u16);
        put_u64(&mut bytes, 8, self.aux());
        node.bytes = Bytes::from(bytes);
        node
    }

    /// Where to split, so that both halves take about as many bytes; between 1 and `len - 1`.
    #[must_use]
    pub fn middle(&self) -> usize {
        let (mut sum, half) = (0, self.used() / 2);
        for index in 0..self.len() {
            sum += SLOT + self.value(index).map_or(0, |v| v.len());
            if sum >= half {
                return (index + 1).clamp(1, self.len().saturating_sub(1).max(1));
            }
        }
        1
    }

    fn compact(&mut self, len: usize) {
        *self = self.part(0, self.len(), len);
    }

    fn edit(&mut self, change: impl FnOnce(&mut [u8])) {
        let mut bytes = match std::mem::take(&mut self.bytes).try_into_mut() {
            Ok(bytes) => bytes,
            Err(shared) => bytes::BytesMut::from(&shared[..]),
        };
        change(&mut bytes);
        self.bytes = bytes.freeze();
    }
}
