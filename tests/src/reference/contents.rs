//! A file's contents: sparse, in pages that are shared between copies of the oracle, so that a search may keep many of them.
//!
//! Excludes: how large a file may be, and who may change it (`super`).

use crate::op::{Outcome, Reply, errno::*};
use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

const PAGE: u64 = 4096;

/// A file's contents: pages that are not all zero, and a size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) size: u64,
    pages: BTreeMap<u64, Arc<[u8]>>,
}

impl Contents {
    pub(super) fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return Vec::new();
        }
        let mut out = vec![0; (end - offset) as usize];
        for (page, data) in self.pages.range(offset / PAGE..=(end - 1) / PAGE) {
            let from = (page * PAGE).max(offset);
            let to = ((page + 1) * PAGE).min(end);
            out[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&data[(from - page * PAGE) as usize..(to - page * PAGE) as usize]);
        }
        out
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            let page = at / PAGE;
            let to = ((page + 1) * PAGE).min(end);
            let data = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            Arc::make_mut(data)[(at - page * PAGE) as usize..(to - page * PAGE) as usize]
                .copy_from_slice(&bytes[(at - offset) as usize..(to - offset) as usize]);
            at = to;
        }
        self.size = self.size.max(end);
    }

    /// Puts zeros there, as far as there are pages.
    pub(super) fn zero(&mut self, offset: u64, end: u64) {
        let end = end.min(self.size.div_ceil(PAGE) * PAGE);
        if offset >= end {
            return;
        }
        let pages: Vec<u64> = self.pages.range(offset / PAGE..=(end - 1) / PAGE).map(|(p, _)| *p).collect();
        for page in pages {
            let from = (page * PAGE).max(offset) - page * PAGE;
            let to = ((page + 1) * PAGE).min(end) - page * PAGE;
            if from == 0 && to == PAGE {
                self.pages.remove(&page);
            } else if let Some(data) = self.pages.get_mut(&page) {
                Arc::make_mut(data)[from as usize..to as usize].fill(0);
            }
        }
    }

    /// The first byte from a place on that is not zero.
    fn first_byte(&self, from: u64) -> Option<u64> {
        self.pages.range(from / PAGE..).find_map(|(page, data)| {
            let start = from.saturating_sub(page * PAGE).min(PAGE) as usize;
            data[start..].iter().position(|b| *b != 0).map(|at| page * PAGE + (start + at) as u64)
        })
    }

    /// Where a seek may end. What is not zero is data; a hole has zeros up to the end of its page.
    pub(super) fn places(&self, offset: u64, data: bool) -> Outcome {
        if offset >= self.size {
            return Err(ENXIO);
        }
        let first = self.first_byte(offset);
        if data {
            return Ok(Reply::Places(vec![(offset, first.unwrap_or(self.size - 1))], first.is_none()));
        }
        let mut ranges = Vec::new();
        let mut at = offset;
        for (page, bytes) in self.pages.range(offset / PAGE..) {
            let start = page * PAGE;
            if at < start {
                ranges.push((at, start - 1));
                at = start;
            }
            let zeros = bytes.iter().rev().take_while(|b| **b == 0).count() as u64;
            let from = (start + PAGE - zeros).max(at);
            if from < start + PAGE {
                ranges.push((from, start + PAGE - 1));
            }
            at = start + PAGE;
        }
        ranges.push((at, self.size.max(at)));
        ranges.push((self.size, self.size));
        Ok(Reply::Places(ranges, false))
    }

    pub(super) fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, u64::MAX);
        }
        self.size = size;
    }
}

/// A page of zeros is as good as none.
impl Hash for Contents {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let pages = self.pages.iter().filter(|(_, data)| data.iter().any(|b| *b != 0));
        (self.size, pages.collect::<Vec<_>>()).hash(hasher);
    }
}
