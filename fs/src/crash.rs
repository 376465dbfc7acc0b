//! The states that a crash can leave of recorded operations: for tests.
//!
//! Each write is a version of its block. A version comes after the block's previous version and after what its `after`
//! names. Any set of versions that is closed under "comes after" may be what is durable; a block then has its newest
//! version of the set.
//!
//! Excludes: groups and levels (they only remove states), torn blocks.

use bytes::Bytes;
use cluster::BlockNo;
use sld::memory::Image;
use sld::{After, Content, ObjectId, Operation, Tag, WriteClass};
use std::collections::{BTreeMap, BTreeSet};

/// A version of a block.
#[derive(Clone, Debug)]
pub struct Version {
    /// The block.
    pub block: BlockNo,
    /// Which operation it is of.
    pub operation: usize,
    /// What must be durable before it (positions in the graph; all lower).
    pub before: Vec<usize>,
    content: Option<(Tag, Bytes)>,
}

/// All versions of a sequence of operations.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// In the order of writing.
    pub versions: Vec<Version>,
}

impl Graph {
    /// The graph of operations in the order of their commits.
    #[must_use]
    pub fn new(operations: &[Operation]) -> Graph {
        let mut versions: Vec<Version> = Vec::new();
        let mut newest: BTreeMap<BlockNo, usize> = BTreeMap::new();
        let mut data: BTreeMap<ObjectId, Vec<usize>> = BTreeMap::new();
        for (number, operation) in operations.iter().enumerate() {
            let first = versions.len();
            let at_start = newest.clone();
            for (position, write) in operation.writes.iter().enumerate() {
                let mut before = BTreeSet::new();
                before.extend(newest.get(&write.block));
                for after in &write.after {
                    match after {
                        After::Write(id) => {
                            before.insert(first + id.0);
                        }
                        After::Block(block) => before.extend(at_start.get(block)),
                        After::DataOf(object) => before.extend(data.get(object).into_iter().flatten()),
                    }
                }
                let content = match &write.content {
                    Content::Data(bytes) => Some((write.tag, bytes.clone())),
                    Content::Free => None,
                };
                versions.push(Version { block: write.block, operation: number, before: before.into_iter().collect(), content });
                newest.insert(write.block, first + position);
                if write.class != WriteClass::Metadata {
                    data.entry(write.object).or_default().push(first + position);
                }
            }
        }
        Graph { versions }
    }

    /// The smallest closed set with these versions in it.
    #[must_use]
    pub fn closure(&self, versions: impl IntoIterator<Item = usize>) -> BTreeSet<usize> {
        let mut closed = BTreeSet::new();
        let mut pending: Vec<usize> = versions.into_iter().collect();
        while let Some(version) = pending.pop() {
            if closed.insert(version) {
                pending.extend(&self.versions[version].before);
            }
        }
        closed
    }

    /// A random closed set.
    #[must_use]
    pub fn random_closed(&self, seed: u64) -> BTreeSet<usize> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let count = self.versions.len() as u64;
        let wanted = next() % 4;
        let limit = if count == 0 { 0 } else { next() % (count + 1) };
        let mut set = self.closure((0..wanted).filter(|_| count > 0).map(|_| (next() % count.max(1)) as usize));
        // Beside them, most versions up to some point: as a write-behind that has come so far.
        for version in 0..limit as usize {
            if next() % 8 != 0 && self.versions[version].before.iter().all(|b| set.contains(b)) {
                set.insert(version);
            }
        }
        set
    }

    /// Every closed set, if there are at most `max` of them; else `None`.
    #[must_use]
    pub fn all_closed(&self, max: usize) -> Option<Vec<BTreeSet<usize>>> {
        let mut sets = vec![BTreeSet::new()];
        for (number, version) in self.versions.iter().enumerate() {
            for index in 0..sets.len() {
                if version.before.iter().all(|b| sets[index].contains(b)) {
                    let mut with = sets[index].clone();
                    with.insert(number);
                    sets.push(with);
                }
            }
            if sets.len() > max {
                return None;
            }
        }
        Some(sets)
    }

    /// What the disk holds if exactly these versions are durable.
    #[must_use]
    pub fn image(&self, base: &Image, durable: &BTreeSet<usize>) -> Image {
        let mut image = base.clone();
        for version in durable {
            let Version { block, content, .. } = &self.versions[*version];
            match content {
                Some(content) => image.insert(*block, content.clone()),
                None => image.remove(block),
            };
        }
        image
    }
}
