//! Bytes on their way: what is to be written, and what was read. Whole blocks travel without being copied.

use bytes::Bytes;
use cluster::BLOCK_SIZE;

static ZERO_BLOCK: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];

/// A block of zeros, which takes no memory.
pub(crate) const ZEROS: Bytes = Bytes::from_static(&ZERO_BLOCK);

/// Bytes to be written, cut where the blocks of the file begin (if it is written where it was meant to be).
#[derive(Clone, Debug, Default)]
pub struct Payload {
    parts: Vec<Bytes>,
    /// Where each part begins.
    begins: Vec<u64>,
    len: u64,
}

impl Payload {
    /// Copies bytes that are to be written at `offset`.
    #[must_use]
    pub fn new(offset: u64, bytes: &[u8]) -> Self {
        let mut payload = Payload::default();
        let head = (BLOCK_SIZE - (offset % BLOCK_SIZE as u64) as usize) % BLOCK_SIZE;
        let (head, rest) = bytes.split_at(head.min(bytes.len()));
        // Each block in an allocation of its own: the cache may keep one and drop its neighbours.
        for part in std::iter::once(head).chain(rest.chunks(BLOCK_SIZE)) {
            payload.push(Bytes::copy_from_slice(part));
        }
        payload
    }

    fn push(&mut self, part: Bytes) {
        if !part.is_empty() {
            self.begins.push(self.len);
            self.len += part.len() as u64;
            self.parts.push(part);
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of the bytes; without copying if they are exactly one part. Zeros beyond the end.
    #[must_use]
    pub(crate) fn piece(&self, at: u64, len: u64) -> Bytes {
        let mut index = self.begins.partition_point(|begin| *begin <= at).saturating_sub(1);
        if let (Some(begin), Some(part)) = (self.begins.get(index), self.parts.get(index))
            && *begin == at
            && part.len() as u64 == len
        {
            return part.clone();
        }
        let mut piece = Vec::with_capacity(len as usize);
        let mut skip = at - self.begins.get(index).copied().unwrap_or(at);
        while (piece.len() as u64) < len {
            let Some(part) = self.parts.get(index) else { break };
            let from = (skip as usize).min(part.len());
            let want = (len as usize - piece.len()).min(part.len() - from);
            piece.extend_from_slice(&part[from..from + want]);
            skip = 0;
            index += 1;
        }
        piece.resize(len as usize, 0);
        Bytes::from(piece)
    }
}

/// Bytes that were read, and the version of the data that they are of.
#[derive(Clone, Debug)]
pub struct FileData {
    parts: Vec<Bytes>,
    len: u64,
    version: u64,
}

impl FileData {
    pub(crate) fn new(version: u64) -> Self {
        FileData { parts: Vec::new(), len: 0, version }
    }

    pub(crate) fn push(&mut self, part: Bytes) {
        if !part.is_empty() {
            self.len += part.len() as u64;
            self.parts.push(part);
        }
    }

    pub(crate) fn push_zeros(&mut self, mut len: u64) {
        while len > 0 {
            let take = len.min(BLOCK_SIZE as u64);
            self.push(ZEROS.slice(..take as usize));
            len -= take;
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The version of the file's data.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The bytes in one piece.
    #[must_use]
    pub fn contiguous(self) -> Bytes {
        if let [one] = self.parts.as_slice() {
            return one.clone();
        }
        let mut all = Vec::with_capacity(self.len as usize);
        for part in &self.parts {
            all.extend_from_slice(part);
        }
        Bytes::from(all)
    }

    /// To be written elsewhere.
    #[must_use]
    pub fn into_payload(self) -> Payload {
        let mut payload = Payload::default();
        for part in self.parts {
            payload.push(part);
        }
        payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_payload_are_its_bytes() {
        let bytes: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        for offset in [0, 1, 4095, 4096, 5000] {
            let payload = Payload::new(offset, &bytes);
            assert_eq!(payload.len(), 20_000);
            for (at, len) in [(0, 20_000), (0, 1), (4096 - offset % 4096, 4096), (7, 9000), (19_999, 1)] {
                assert_eq!(payload.piece(at, len), bytes[at as usize..(at + len) as usize], "{offset} {at} {len}");
            }
        }
    }
}
