//! The online collector: takes away what crashes have left, while the file system is in use.
//!
//! A sweep over the tags asks for each block whether its owner still points to it, under the owner's token:
//! - a tree, data or attribute block that its owner does not point to is freed;
//! - an inode's parent records without an entry are dropped, after the names in question are settled (rule 16); an inode
//!   without records that is not open anywhere is freed with all that it owns;
//! - a directory's unsettled names are settled.
//!
//! Why a leak found is one: garbage is never found again by anyone, no pointer moves between inodes, and under the owner's
//! exclusive token, after a flush of the owner, neither an allocation nor a free of it is under way.
//!
//! Memory is bounded by the batch; a run may stop anywhere and go on from the position that it reports.
//!
//! Excludes: damage (`check`), one collector at a time (the caller sees to it; two only waste time).

use crate::btree;
use crate::directory::{self, Listed};
use crate::error::{FsError, Result};
use crate::extent;
use crate::inode::{Body, FileKind, Ino, Inode, Parent};
use crate::ops::{FileSystem, Locks, attribute_blocks};
use crate::parents;
use crate::transaction::Source;
use cluster::{BlockNo, MirrorId};
use serde::{Deserialize, Serialize};
use sld::{After, Disk, DiskError, FlushTarget, Kind, Mode, Tag};
use std::collections::BTreeMap;

/// Tags looked at together.
const BATCH: u32 = 4096;

/// What a run does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcOptions {
    /// Only count, change nothing.
    pub dry_run: bool,
    /// Where to begin; `None`: at the start.
    pub from: Option<BlockNo>,
    /// Stop after about so many blocks; `None`: at the end.
    pub blocks_max: Option<u64>,
}

/// What a run has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// Tags looked at.
    pub swept: u64,
    /// Blocks in all.
    pub blocks: u64,
    /// Blocks (not of orphans) that nobody pointed to: freed, or to be freed.
    pub leaked: u64,
    /// Inodes without a name: freed, or to be freed.
    pub orphans: u64,
    /// Parent records without an entry: dropped, or to be dropped.
    pub records: u64,
    /// Wrong counts of blocks or directories: set right, or to be set right.
    pub counts: u64,
    /// Names settled, or to be settled.
    pub names: u64,
    /// Objects that could not be judged because of damage.
    pub skipped: u64,
    /// Where to go on; `None` at the end.
    pub next: Option<BlockNo>,
}

impl<D: Disk> FileSystem<D> {
    /// Runs the collector. `progress` is told after each batch, and stops the run by returning false.
    ///
    /// # Errors
    /// Those of the disk when it stops working altogether; damage is counted as skipped.
    pub async fn collect(&self, options: GcOptions, progress: &mut (dyn FnMut(&GcReport) -> bool + Send)) -> Result<GcReport> {
        let mirrors: BTreeMap<MirrorId, u32> = self.disk().mirrors().into_iter().collect();
        let mut report = GcReport { blocks: mirrors.values().map(|b| u64::from(*b)).sum(), ..GcReport::default() };
        let from = options.from.unwrap_or_default();
        for (mirror, blocks) in mirrors.range(from.mirror..) {
            let mut index = if *mirror == from.mirror { from.index } else { 0 };
            while index < *blocks {
                if options.blocks_max.is_some_and(|max| report.swept >= max) {
                    report.next = Some(BlockNo::new(*mirror, index));
                    return Ok(report);
                }
                let tags = self.disk().tags(BlockNo::new(*mirror, index), BATCH.min(*blocks - index)).await?;
                if tags.is_empty() {
                    break;
                }
                self.collect_batch(BlockNo::new(*mirror, index), &tags, options.dry_run, &mut report).await?;
                index += tags.len() as u32;
                report.swept += tags.len() as u64;
                if !progress(&report) {
                    report.next = Some(BlockNo::new(*mirror, index));
                    return Ok(report);
                }
            }
        }
        Ok(report)
    }

    async fn collect_batch(&self, first: BlockNo, tags: &[Tag], dry_run: bool, report: &mut GcReport) -> Result<()> {
        let mut owned: BTreeMap<u64, Vec<(BlockNo, Tag)>> = BTreeMap::new();
        for (offset, tag) in (0..).zip(tags) {
            let block = BlockNo::new(first.mirror, first.index + offset);
            match tag.kind {
                Kind::Free | Kind::Super => {}
                Kind::Inode => {
                    let done = self.collect_inode(Ino(block.pack()), dry_run, report).await;
                    skip_damage(done, report)?;
                }
                Kind::Directory | Kind::Extents | Kind::Data | Kind::Attribute => {
                    owned.entry(tag.owner).or_default().push((block, *tag));
                }
            }
        }
        for (owner, blocks) in owned {
            let done = self.collect_blocks(Ino(owner), &blocks, dry_run, report).await;
            skip_damage(done, report)?;
        }
        Ok(())
    }

    /// Blocks whose tags name an owner.
    async fn collect_blocks(&self, owner: Ino, blocks: &[(BlockNo, Tag)], dry_run: bool, report: &mut GcReport) -> Result<()> {
        let suspects = {
            let _tokens = self.tokens(&[(owner.object(), Mode::Shared)]).await?;
            self.unreferenced(owner, blocks).await?
        };
        if suspects.is_empty() {
            return Ok(());
        }
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(owner.object(), Mode::Exclusive)]).await?;
        // What the owner allocated or freed before becomes visible in the tags; nothing is under way while the token is held.
        match self.disk().flush(&[FlushTarget::Object(owner.object())]).await {
            Ok(()) | Err(DiskError::Lost) => {}
            Err(error) => return Err(error.into()),
        }
        let suspects = self.unreferenced(owner, &suspects).await?;
        let mut tx = self.transaction();
        for (block, tag) in suspects {
            let now = self.disk().tags(block, 1).await?;
            if now.first() != Some(&tag) {
                continue; // Freed meanwhile, and perhaps another's by now.
            }
            tracing::info!(%block, owner = %owner.block(), kind = ?tag.kind, dry_run, "a leaked block");
            report.leaked += 1;
            if !dry_run {
                tx.free(owner.object(), block, &[]);
            }
        }
        tx.commit()
    }

    /// Those of the blocks that the owner does not point to. Its token is held.
    async fn unreferenced(&self, owner: Ino, blocks: &[(BlockNo, Tag)]) -> Result<Vec<(BlockNo, Tag)>> {
        let source = Source::disk(self.disk());
        let inode = match self.load(source, owner).await {
            Ok(inode) => inode,
            Err(FsError::Stale) => return Ok(blocks.to_vec()),
            Err(error) => return Err(error),
        };
        let mut suspects = Vec::new();
        for (block, tag) in blocks {
            if !points_to(source, &inode, *block, tag).await? {
                suspects.push((*block, *tag));
            }
        }
        if suspects.is_empty() {
            return Ok(suspects);
        }
        // The place that a tag names is a hint. Before a block is called leaked, all of the owner's pointers are looked at.
        let mut wanted: BTreeMap<BlockNo, Tag> = suspects.into_iter().collect();
        for block in inode.overflow.iter().map(|b| BlockNo::unpack(*b)).chain(attribute_blocks(source, &inode).await?) {
            wanted.remove(&block);
        }
        if let Body::Tree(_) = &inode.body {
            for block in btree::blocks(source, &inode, usize::MAX).await? {
                wanted.remove(&block);
            }
            if inode.kind() == FileKind::File {
                let mut from = 0;
                while let Some(run) = extent::next(source, &inode, from).await? {
                    from = run.end();
                    let end = BlockNo::new(run.start.mirror, run.start.index + run.len);
                    let inside: Vec<BlockNo> = wanted.range(run.start..end).map(|(b, _)| *b).collect();
                    for block in inside {
                        wanted.remove(&block);
                    }
                }
            }
        }
        Ok(wanted.into_iter().collect())
    }

    /// An inode: its records, its names if it is a directory, and whether it is still needed.
    async fn collect_inode(&self, ino: Ino, dry_run: bool, report: &mut GcReport) -> Result<()> {
        let (is_directory, records, orphan) = {
            let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
            let source = Source::disk(self.disk());
            let inode = match self.load(source, ino).await {
                Ok(inode) => inode,
                Err(FsError::Stale) => return Ok(()),
                Err(error) => return Err(error),
            };
            (inode.is_directory(), parents::all(source, &inode).await?, inode.is_orphan())
        };
        if is_directory && !orphan {
            self.collect_names(ino, dry_run, report).await?;
        }
        if !orphan && self.collect_counts(ino, dry_run).await? {
            report.counts += 1;
        }
        let mut left = records.len();
        if ino != self.root() {
            for record in records {
                if self.has_entry(ino, record).await?.is_err() && self.drop_stale_record(ino, record, dry_run).await? {
                    report.records += 1;
                    left -= 1;
                }
            }
        }
        if left == 0 {
            if !dry_run {
                match self.reclaim(ino).await {
                    Ok(freed) => report.orphans += u64::from(freed),
                    // It stays, and does not keep the others from being freed.
                    Err(error) if error.is_damage() => tracing::error!(%ino, %error, "an orphan cannot be freed; run fsck"),
                    Err(error) => return Err(error),
                }
            } else if !self.is_open(ino) {
                report.orphans += 1;
            }
        }
        Ok(())
    }

    /// Counts an inode's blocks, and a directory's directories, which a crash may have left wrong. True if they were.
    async fn collect_counts(&self, ino: Ino, dry_run: bool) -> Result<bool> {
        let source = Source::disk(self.disk());
        {
            let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
            match self.load(source, ino).await {
                Ok(inode) if counts(source, &inode).await? == (inode.blocks, inode.subdirs) => return Ok(false),
                Ok(_) => {}
                Err(FsError::Stale) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        let mut locks = Locks::new([(ino.object(), Mode::Exclusive)]);
        let mut work = self.begin(&mut locks).await?;
        match work.load(ino).await {
            Ok(_) => {}
            Err(FsError::Stale) => return Ok(false),
            Err(error) => return Err(error),
        }
        let inode = work.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
        let right = counts(source, inode).await?;
        let wrong = right != (inode.blocks, inode.subdirs);
        if wrong && !dry_run {
            (inode.blocks, inode.subdirs) = right;
            inode.write(&mut work.tx, &[]);
            work.commit()?;
        }
        Ok(wrong)
    }

    /// Settles the unsettled names of a directory.
    async fn collect_names(&self, dir: Ino, dry_run: bool, report: &mut GcReport) -> Result<()> {
        let mut position = 0;
        loop {
            let listed: Vec<Listed> = {
                let _tokens = self.tokens(&[(dir.object(), Mode::Shared)]).await?;
                let source = Source::disk(self.disk());
                match self.load(source, dir).await {
                    Ok(inode) if inode.is_directory() => directory::list(source, &inode, position, 256).await?,
                    Ok(_) | Err(FsError::Stale) => return Ok(()),
                    Err(error) => return Err(error),
                }
            };
            let Some(last) = listed.last() else {
                return Ok(());
            };
            position = last.position;
            for name in listed.iter().filter(|name| name.flagged()) {
                report.names += 1;
                if !dry_run && let Some(entry) = name.candidates.first() {
                    self.settle(dir, &entry.name).await?;
                }
            }
        }
    }

    /// Leaves only the valid entry of a name, without a flag.
    async fn settle(&self, dir: Ino, name: &[u8]) -> Result<()> {
        let mut locks = Locks::new([(dir.object(), Mode::Exclusive)]);
        loop {
            let mut work = self.begin(&mut locks).await?;
            match work.load_dir(dir).await {
                Ok(_) => {}
                Err(FsError::NotFound | FsError::Stale | FsError::NotDirectory) => return Ok(()),
                Err(error) => return Err(error),
            }
            let Some(resolved) = work.resolve(dir, name, Mode::Exclusive).await? else {
                locks.need(work.needs);
                continue;
            };
            let mut bucket = resolved.bucket.clone();
            resolved.settle(&mut bucket);
            if let Some(winner) = resolved.winner() {
                bucket.flag(name, winner.seq, false);
            }
            if bucket == resolved.bucket {
                return Ok(());
            }
            // After the inodes that the entries were judged by (rules 8a, 10).
            let judged: Vec<After> = resolved.judged().collect();
            let write = work.put(dir, resolved.hash, &bucket, resolved.counter, &judged).await?;
            let now = self.now();
            let mut orphans = Vec::new();
            for entry in resolved.valid.iter().skip(1) {
                orphans.extend(work.drop_record(entry.ino, entry.record(dir, resolved.hash), now, write).await?);
            }
            drop(work.commit()?);
            self.free_later(orphans).await;
            return Ok(());
        }
    }

    /// Whether an entry goes with a parent record; if not, the block that it would be in, if there is one.
    pub(crate) async fn has_entry(&self, ino: Ino, record: Parent) -> Result<std::result::Result<(), Option<BlockNo>>> {
        let dir = Ino(record.dir);
        let _tokens = self.tokens(&[(dir.object(), Mode::Shared)]).await?;
        self.find_entry(ino, record).await
    }

    async fn find_entry(&self, ino: Ino, record: Parent) -> Result<std::result::Result<(), Option<BlockNo>>> {
        let source = Source::disk(self.disk());
        let dir = match self.load(source, Ino(record.dir)).await {
            Ok(dir) if dir.is_directory() => dir,
            Ok(_) | Err(FsError::Stale) => return Ok(Err(None)),
            Err(error) => return Err(error),
        };
        let (bucket, leaf) = directory::bucket(source, &dir, record.hash).await?;
        let found = bucket.entries.iter().any(|entry| entry.ino == ino && entry.seq == record.seq);
        Ok(if found { Ok(()) } else { Err(Some(leaf.block)) })
    }

    /// Drops a parent record that has no entry. False if it has one after all, or is gone.
    async fn drop_stale_record(&self, ino: Ino, record: Parent, dry_run: bool) -> Result<bool> {
        let mut locks = Locks::new([(ino.object(), Mode::Exclusive), (Ino(record.dir).object(), Mode::Shared)]);
        let mut work = self.begin(&mut locks).await?;
        let Err(leaf) = self.find_entry(ino, record).await? else {
            return Ok(false);
        };
        match work.load(ino).await {
            Ok(_) => {}
            Err(FsError::Stale) => return Ok(false),
            Err(error) => return Err(error),
        }
        let inode = work.inodes.get_mut(&ino).ok_or(FsError::Stale)?;
        let Some(change) = parents::remove(&mut work.tx, inode, record).await? else {
            return Ok(false);
        };
        if dry_run {
            return Ok(true);
        }
        let mut after = change.after;
        // The entry's absence is durable before.
        after.extend(leaf.map(After::Block));
        let write = inode.write(&mut work.tx, &after);
        for block in change.free {
            work.tx.free(ino.object(), block, &[After::Write(write)]);
        }
        work.commit()?;
        Ok(true)
    }
}

fn skip_damage(result: Result<()>, report: &mut GcReport) -> Result<()> {
    match result {
        Err(error @ (FsError::Corrupt { .. } | FsError::Disk(DiskError::Corrupt(_) | DiskError::NoSuchBlock(_)))) => {
            tracing::warn!(%error, "the collector leaves a damaged object alone");
            report.skipped += 1;
            Ok(())
        }
        other => other,
    }
}

/// The blocks that an inode owns beside its own, and the directories in it (settled names only).
async fn counts<D: Disk>(source: Source<'_, D>, inode: &Inode) -> Result<(u64, u32)> {
    let mut blocks = inode.overflow.len() as u64 + attribute_blocks(source, inode).await?.len() as u64;
    let mut subdirs = 0;
    if let Body::Tree(_) = &inode.body {
        blocks += btree::blocks(source, inode, usize::MAX).await?.len() as u64;
        if inode.kind() == FileKind::File {
            let mut from = 0;
            while let Some(run) = extent::next(source, inode, from).await? {
                from = run.end();
                blocks += u64::from(run.len);
            }
        }
    }
    if inode.is_directory() {
        let mut position = 0;
        loop {
            let listed = directory::list(source, inode, position, 256).await?;
            let Some(last) = listed.last() else {
                break;
            };
            position = last.position;
            let is_dir = |name: &&Listed| name.candidates.iter().any(|entry| entry.kind == FileKind::Directory);
            subdirs += listed.iter().filter(is_dir).count() as u32;
        }
    }
    Ok((blocks, subdirs))
}

/// Whether an owner points to a block at the place that the tag names.
async fn points_to<D: Disk>(source: Source<'_, D>, inode: &Inode, block: BlockNo, tag: &Tag) -> Result<bool> {
    if !matches!(inode.body, Body::Tree(_)) {
        return Ok(false);
    }
    match tag.kind {
        Kind::Data => {
            let runs = extent::map(source, inode, tag.offset, tag.offset.saturating_add(1)).await?;
            Ok(runs.iter().any(|run| run.block(tag.offset) == block))
        }
        Kind::Directory | Kind::Extents => btree::is_on_path(source, inode, tag.offset, block).await,
        _ => Ok(false),
    }
}
