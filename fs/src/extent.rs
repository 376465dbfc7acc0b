//! Where a file's blocks are: runs of blocks in the file's tree, keyed by their first block within the file.
//!
//! Invariants:
//! - A record counts only up to the next one's key. What lies beyond (a crash between two steps of a change leaves it) stays
//!   hidden: a record goes only after its predecessor was cut. Changes are made in the order: records that appear or grow,
//!   then those that shrink, then those that go.
//! - A record becomes durable after the data that it leads to, and a block is freed after the records that led to it.
//! - Blocks of the file beyond its end are zeros, unless [`Inode::flags`] says [`RESIDUE`].
//!
//! Excludes: bytes, sizes and times (`ops::data`); the tree (`btree`).

use crate::btree;
use crate::error::{FsError, Result};
use crate::format::ExtentRecord;
use crate::inode::Inode;
use crate::transaction::{Source, Transaction};
use bytes::Bytes;
use cluster::BlockNo;
use sld::{After, Disk, Extent, WriteId};
use std::collections::BTreeMap;

/// Flag of an inode: a truncation was not brought to its end, and records beyond the end of the file still lead to old
/// data. They must go before the file grows.
pub const RESIDUE: u32 = 1;

/// Records read from the tree at a time.
const RECORDS_AT_ONCE: usize = 64;

/// Contiguous blocks of a file that are contiguous on the disk, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block within the file.
    pub at: u64,
    /// First block on the disk.
    pub start: BlockNo,
    /// Length in blocks, at least 1.
    pub len: u32,
    /// The blocks are reserved but read as zeros.
    pub unwritten: bool,
}

impl Run {
    /// The block within the file that follows.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.at.saturating_add(u64::from(self.len))
    }

    /// Where a block of the file is, which the run must contain.
    #[must_use]
    pub fn block(&self, at: u64) -> BlockNo {
        BlockNo::new(self.start.mirror, self.start.index + (at - self.at) as u32)
    }

    /// The part within `from..to`.
    #[must_use]
    pub fn clip(&self, from: u64, to: u64) -> Option<Run> {
        let (first, end) = (self.at.max(from), self.end().min(to));
        (first < end).then(|| Run { at: first, start: self.block(first), len: (end - first) as u32, unwritten: self.unwritten })
    }

    /// On the disk.
    #[must_use]
    pub fn extent(&self) -> Extent {
        Extent { start: self.start, len: self.len }
    }

    fn is_continued_by(&self, next: &Run) -> bool {
        self.end() == next.at
            && self.start.mirror == next.start.mirror
            && self.start.index.checked_add(self.len) == Some(next.start.index)
            && self.unwritten == next.unwritten
            && next.start.index.checked_add(next.len).is_some()
    }

    fn record(&self) -> ExtentRecord {
        ExtentRecord { start: self.start, len: self.len, flags: if self.unwritten { ExtentRecord::UNWRITTEN } else { 0 } }
    }

    fn decode(at: u64, value: &Bytes, inode: &Inode) -> Result<Run> {
        let bad = FsError::corrupt(inode.ino.block(), "a damaged extent");
        let record = ExtentRecord::decode(value).ok_or(bad)?;
        Ok(Run { at, start: record.start, len: record.len, unwritten: record.flags & ExtentRecord::UNWRITTEN != 0 })
    }
}

/// Records whose keys are in `from..=to`, and the one before them, in order, each as long as it is written.
async fn records<D: Disk>(source: Source<'_, D>, inode: &Inode, from: u64, to: u64) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    if let Some(before) = from.checked_sub(1)
        && let Some((at, value)) = btree::floor(source, inode, before).await?
    {
        runs.push(Run::decode(at, &value, inode)?);
    }
    let mut next = from;
    loop {
        let found = btree::range(source, inode, next, RECORDS_AT_ONCE).await?;
        for (at, value) in &found {
            if *at > to {
                return Ok(runs);
            }
            runs.push(Run::decode(*at, value, inode)?);
        }
        match found.last() {
            Some((last, _)) if found.len() == RECORDS_AT_ONCE && *last < to => next = last + 1,
            _ => return Ok(runs),
        }
    }
}

/// The part of each record that counts.
fn visible(records: &[Run]) -> impl Iterator<Item = Run> {
    records.iter().enumerate().filter_map(|(i, run)| run.clip(run.at, records.get(i + 1).map_or(u64::MAX, |next| next.at)))
}

/// The runs within `from..to`, clipped to it, in order, not overlapping. What is not covered is a hole.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn map<D: Disk>(source: Source<'_, D>, inode: &Inode, from: u64, to: u64) -> Result<Vec<Run>> {
    if from >= to {
        return Ok(Vec::new());
    }
    let records = records(source, inode, from, to - 1).await?;
    Ok(visible(&records).filter_map(|run| run.clip(from, to)).collect())
}

/// The run that holds block `at`, or the first one after it.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn next<D: Disk>(source: Source<'_, D>, inode: &Inode, at: u64) -> Result<Option<Run>> {
    let following = match at.checked_add(1) {
        Some(from) => btree::range(source, inode, from, 2).await?,
        None => Vec::new(),
    };
    let mut runs = Vec::new();
    if let Some((key, value)) = btree::floor(source, inode, at).await? {
        runs.push(Run::decode(key, &value, inode)?);
    }
    for (key, value) in &following {
        runs.push(Run::decode(*key, value, inode)?);
    }
    Ok(visible(&runs).find(|run| run.end() > at))
}

/// The last run that begins before block `at`.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn before<D: Disk>(source: Source<'_, D>, inode: &Inode, at: u64) -> Result<Option<Run>> {
    let Some(before) = at.checked_sub(1) else { return Ok(None) };
    match btree::floor(source, inode, before).await? {
        Some((key, value)) => Run::decode(key, &value, inode).map(Some),
        None => Ok(None),
    }
}

/// `old` with `new` instead of what it has in `from..to`; neighbours that continue each other become one.
fn splice(old: &[Run], from: u64, to: u64, new: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::with_capacity(old.len() + new.len() + 1);
    let mut done = 0;
    let before = old.iter().filter_map(|run| run.clip(0, from));
    let after = old.iter().filter_map(|run| run.clip(to, u64::MAX));
    for run in before.chain(new.iter().copied()).chain(after) {
        let Some(run) = run.clip(done, u64::MAX) else { continue };
        done = run.end();
        match all.last_mut() {
            Some(last) if last.is_continued_by(&run) && last.len.checked_add(run.len).is_some() => last.len += run.len,
            _ => all.push(run),
        }
    }
    all
}

/// Replaces what the file has in `from..to` by `new` (in order, within that range). The new records come after `after`.
/// Returns the edges that something must have to come after the whole change; the inode itself is still to be written.
///
/// # Errors
/// `NoSpace`, those of the disk, `Corrupt`. The inode must not be written then.
pub async fn replace<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    from: u64,
    to: u64,
    new: &[Run],
    after: &[After],
) -> Result<Vec<After>> {
    let old = records(tx.source(), inode, from, to).await?;
    let next = splice(&visible(&old).collect::<Vec<_>>(), from, to, new);
    let before: BTreeMap<u64, Run> = old.iter().map(|run| (run.at, *run)).collect();
    let mut written = Vec::new();
    // Appear or grow, then shrink, then go: whatever of it is durable, no block that is to stay is without a record.
    let is_shrunk = |run: &Run| before.get(&run.at).is_some_and(|old| old.start == run.start && old.len > run.len);
    let is_same = |run: &Run| before.get(&run.at) == Some(run);
    for run in next.iter().filter(|run| !is_same(run) && !is_shrunk(run)) {
        written.push(btree::insert(tx, inode, run.at, &run.record().encode(), 0, after).await?);
    }
    let shrinking: Vec<&Run> = next.iter().filter(|run| !is_same(run) && is_shrunk(run)).collect();
    if !shrinking.is_empty() {
        let edges = edges(tx, inode, after, &written);
        for run in shrinking {
            written.push(btree::insert(tx, inode, run.at, &run.record().encode(), 0, &edges).await?);
        }
    }
    let going: Vec<u64> = before.keys().filter(|at| !next.iter().any(|run| run.at == **at)).copied().collect();
    if !going.is_empty() {
        let edges = edges(tx, inode, after, &written);
        for at in going {
            written.extend(btree::remove(tx, inode, at, &edges).await?);
        }
    }
    Ok(edges(tx, inode, after, &written))
}

/// Edges to all of these writes. The inode's own newest one is left out: what comes next in that block replaces it.
fn edges<D: Disk>(tx: &Transaction<'_, D>, inode: &Inode, after: &[After], written: &[WriteId]) -> Vec<After> {
    let own = tx.newest(inode.ino.block());
    let mut edges = after.to_vec();
    for id in written {
        let edge = After::Write(*id);
        if Some(*id) != own && !edges.contains(&edge) {
            edges.push(edge);
        }
    }
    edges
}

/// Blocks that a change took out of a file, and what their freeing comes after (beside the inode).
#[derive(Clone, Debug, Default)]
pub struct Removed {
    /// The blocks.
    pub extents: Vec<Extent>,
    /// Edges.
    pub after: Vec<After>,
}

impl Removed {
    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.len)).sum()
    }

    /// Frees the blocks, after the inode's write.
    pub fn free<D: Disk>(self, tx: &mut Transaction<'_, D>, inode: &Inode, written: WriteId) {
        let mut after = self.after;
        after.push(After::Write(written));
        for extent in self.extents {
            for index in extent.start.index..extent.start.index.saturating_add(extent.len) {
                tx.free(inode.object(), BlockNo::new(extent.start.mirror, index), &after);
            }
        }
    }

    fn add(&mut self, run: &Run, after: Vec<After>) {
        self.extents.push(run.extent());
        for edge in after {
            if !self.after.contains(&edge) {
                self.after.push(edge);
            }
        }
    }
}

/// Takes blocks in `from..to` out of the file, the last ones first, at most `max` of them; the tree changes after `after`.
/// Returns them, and whether none is left. The inode's block count is adjusted; it is still to be written, and then [`Removed::free`] to be called.
///
/// # Errors
/// Those of the disk; `Corrupt`; `NoSpace` if a node must be split. The inode must not be written then.
pub async fn remove<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    from: u64,
    to: u64,
    max: u32,
    after: &[After],
) -> Result<(Removed, bool)> {
    let mut removed = Removed::default();
    let mut left = max;
    while let Some(end) = to.checked_sub(1) {
        let Some((at, value)) = btree::floor(tx.source(), inode, end).await? else { return Ok((removed, true)) };
        let Some(run) = Run::decode(at, &value, inode)?.clip(from, to) else {
            return Ok((removed, true));
        };
        if left == 0 {
            return Ok((removed, false));
        }
        let take = run.len.min(left);
        let Some(cut) = run.clip(run.end() - u64::from(take), run.end()) else { return Ok((removed, true)) };
        let edges = replace(tx, inode, cut.at, cut.end(), &[], after).await?;
        left -= take;
        inode.blocks = inode.blocks.saturating_sub(u64::from(take));
        removed.add(&cut, edges);
    }
    Ok((removed, true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::MirrorId;

    fn run(at: u64, index: u32, len: u32) -> Run {
        Run { at, start: BlockNo::new(MirrorId(1), index), len, unwritten: false }
    }

    #[test]
    fn splicing_cuts_and_merges() {
        let old = [run(0, 100, 10), run(20, 300, 5)];
        assert_eq!(splice(&old, 3, 6, &[]), [run(0, 100, 3), run(6, 106, 4), run(20, 300, 5)]);
        assert_eq!(splice(&old, 10, 12, &[run(10, 110, 2)]), [run(0, 100, 12), run(20, 300, 5)]);
        assert_eq!(splice(&old, 18, 20, &[run(18, 298, 2)]), [run(0, 100, 10), run(18, 298, 7)]);
        assert_eq!(splice(&old, 0, 30, &[]), []);
        assert!(visible(&[run(0, 100, 10), run(5, 105, 2)]).eq([run(0, 100, 5), run(5, 105, 2)]));
    }

    #[test]
    fn clipping_moves_the_start() {
        assert_eq!(run(10, 50, 10).clip(12, 15), Some(run(12, 52, 3)));
        assert_eq!(run(10, 50, 10).clip(20, 25), None);
    }
}
