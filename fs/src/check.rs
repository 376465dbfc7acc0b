//! `fsck`: a true mark from the root, then a sweep over all tags. Read-only.
//!
//! It works on any [`BlockSource`]: a mounted disk, or the disks of a stopped cluster. On a file system that is in use, what
//! changes meanwhile may be reported wrongly; issues that stay in a second run are real.
//!
//! Issues are of two kinds: *damage*, which no crash may cause, and *leftovers* of crashes (leaks, unsettled names), which
//! harm nobody and which the collector takes away.
//!
//! Memory: 4 bytes for each block of the file system, and some 50 for each inode.
//!
//! Excludes: repairing.

use crate::btree::{self, Node};
use crate::directory::{Bucket, Entry, NameHash};
use crate::error::FsError;
use crate::format::{
    ATTRIBUTE_BLOCKS_MAX, ATTRIBUTES_NEXT_AT, ExtentRecord, OVERFLOW_AT, OVERFLOW_PARENTS, PARENT_LEN, Superblock, check_header,
    get_u16, get_u64, magic,
};
use crate::inode::{Body, FileKind, Ino, Inode, Parent};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo, MirrorId};
use serde::{Deserialize, Serialize};
use sld::{Disk, DiskError, Kind, Mode, ObjectId, Tag};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;

/// Where a check reads from.
pub trait BlockSource: Send + Sync {
    /// Reads a block that belongs to an inode (packed number; 0 for the superblock).
    fn read(&self, owner: u64, block: BlockNo) -> impl Future<Output = Result<Bytes, DiskError>> + Send;
    /// Tags of blocks.
    fn tags(&self, first: BlockNo, count: u32) -> impl Future<Output = Result<Vec<Tag>, DiskError>> + Send;
    /// The file system's mirrors with their sizes in blocks.
    fn mirrors(&self) -> Vec<(MirrorId, u32)>;
}

/// A mounted disk as a source. Each block is read under its owner's shared token.
pub struct DiskSource<D: Disk>(pub D);

impl<D: Disk> BlockSource for DiskSource<D> {
    async fn read(&self, owner: u64, block: BlockNo) -> Result<Bytes, DiskError> {
        let object = ObjectId::Inode(owner);
        let _tokens = match self.0.try_acquire(&[(object, Mode::Shared)]) {
            Some(tokens) => tokens,
            None => self.0.acquire(&[(object, Mode::Shared)]).await?,
        };
        self.0.read(object, block).await
    }

    async fn tags(&self, first: BlockNo, count: u32) -> Result<Vec<Tag>, DiskError> {
        self.0.tags(first, count).await
    }

    fn mirrors(&self) -> Vec<(MirrorId, u32)> {
        self.0.mirrors()
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "issue")]
pub enum Issue {
    /// There is no superblock, or a damaged one: nothing can be checked.
    Superblock {
        /// What is wrong.
        what: String,
    },
    /// A block cannot be read.
    Unreadable {
        /// Which.
        block: BlockNo,
        /// Whose.
        owner: Ino,
        /// Why.
        what: String,
    },
    /// A block's structure is wrong.
    Format {
        /// Which.
        block: BlockNo,
        /// Whose.
        owner: Ino,
        /// What is wrong.
        what: String,
    },
    /// An unflagged entry leads to no inode that agrees.
    EntryWithoutInode {
        /// The directory.
        dir: Ino,
        /// The name.
        name: String,
        /// Where it leads.
        ino: Ino,
    },
    /// The entry's type is not the inode's.
    WrongEntryKind {
        /// The directory.
        dir: Ino,
        /// The name.
        name: String,
        /// The inode.
        ino: Ino,
    },
    /// A name is not where its hash says.
    WrongHash {
        /// The directory.
        dir: Ino,
        /// The name.
        name: String,
    },
    /// A directory has more than one name.
    DirectoryTwice {
        /// Which.
        ino: Ino,
    },
    /// An inode's count of parent records is not the number of its records.
    WrongRecordCount {
        /// Which.
        ino: Ino,
        /// As stored.
        stored: u32,
        /// As counted.
        counted: u32,
    },
    /// A block is used twice.
    UsedTwice {
        /// Which.
        block: BlockNo,
        /// By whom, the second time.
        owner: Ino,
    },
    /// A pointer leads outside the file system.
    OutOfRange {
        /// Whose.
        owner: Ino,
        /// Where.
        block: BlockNo,
    },
    /// A block is used, but its tag says that it is free or another's.
    WrongTag {
        /// Which.
        block: BlockNo,
        /// As the tag says.
        owner: u64,
        /// As the tag says.
        kind: u8,
    },
    /// Leftover: the stored number of an inode's blocks is wrong.
    WrongBlockCount {
        /// Which.
        ino: Ino,
        /// As stored.
        stored: u64,
        /// As counted.
        counted: u64,
    },
    /// The stored number of a directory's directories is too small.
    SubdirsTooFew {
        /// Which.
        ino: Ino,
        /// As stored.
        stored: u32,
        /// As counted.
        counted: u32,
    },
    /// Leftover: the stored number of a directory's directories is too large.
    SubdirsTooMany {
        /// Which.
        ino: Ino,
        /// As stored.
        stored: u32,
        /// As counted.
        counted: u32,
    },
    /// Leftover: a name with a flagged or losing entry.
    Unsettled {
        /// The directory.
        dir: Ino,
        /// The name.
        name: String,
    },
    /// Leftover: an inode has parent records that no entry agrees with.
    RecordsWithoutEntry {
        /// Which.
        ino: Ino,
        /// Records.
        records: u32,
        /// Valid names.
        names: u32,
    },
    /// Leftover: an inode that no name leads to.
    Orphan {
        /// Which.
        ino: Ino,
        /// Blocks that go with it.
        blocks: u64,
    },
    /// Leftover: an allocated block that nobody uses.
    Leaked {
        /// Which.
        block: BlockNo,
        /// As the tag says.
        owner: u64,
        /// As the tag says.
        kind: u8,
    },
}

impl Issue {
    /// Whether it is only a leftover of a crash, which the collector takes away.
    #[must_use]
    pub fn is_leftover(&self) -> bool {
        matches!(
            self,
            Issue::Unsettled { .. }
                | Issue::RecordsWithoutEntry { .. }
                | Issue::Orphan { .. }
                | Issue::Leaked { .. }
                | Issue::SubdirsTooMany { .. }
                | Issue::WrongBlockCount { .. }
        )
    }
}

/// Issues listed in a report; further ones are only counted.
pub const ISSUES_MAX: usize = 1000;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Damage and leftovers, at most [`ISSUES_MAX`] of each.
    pub issues: Vec<Issue>,
    /// Damage found.
    pub damage: u64,
    /// Leftovers of crashes found.
    pub leftovers: u64,
    /// Directories reached.
    pub directories: u64,
    /// Other inodes reached.
    pub files: u64,
    /// Names.
    pub names: u64,
    /// Blocks in use.
    pub blocks_used: u64,
    /// Blocks leaked.
    pub blocks_leaked: u64,
    /// Blocks in all.
    pub blocks: u64,
}

impl Report {
    /// Whether nothing is damaged (leftovers may be there).
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.damage == 0
    }

    /// Whether there is nothing to report at all.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damage == 0 && self.leftovers == 0
    }

    /// What a later check has found, too: of a file system in use only that is more than a passing state. The counts are
    /// those of the later one.
    #[must_use]
    pub fn confirmed_by(&self, later: &Report) -> Report {
        let full = self.issues.len() >= ISSUES_MAX || later.issues.len() >= ISSUES_MAX;
        if full {
            return later.clone();
        }
        let issues: Vec<Issue> = later.issues.iter().filter(|i| self.issues.contains(i)).cloned().collect();
        let leftovers = issues.iter().filter(|i| i.is_leftover()).count() as u64;
        Report { damage: issues.len() as u64 - leftovers, leftovers, issues, ..later.clone() }
    }

    fn add(&mut self, issue: Issue) {
        let count = if issue.is_leftover() { &mut self.leftovers } else { &mut self.damage };
        *count += 1;
        if *count <= ISSUES_MAX as u64 {
            tracing::debug!(?issue, "fsck");
            self.issues.push(issue);
        }
    }
}

/// How far a check has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Inodes marked.
    pub inodes: u64,
    /// Blocks whose tags were swept.
    pub swept: u64,
    /// Blocks in all.
    pub blocks: u64,
}

struct Seen {
    records: u32,
    names: u32,
}

struct Checker<'a, S: BlockSource> {
    source: &'a S,
    report: Report,
    /// For each block 0 if it is not reached, else a mark made of its owner and kind.
    marks: BTreeMap<MirrorId, Vec<u32>>,
    seen: BTreeMap<Ino, Seen>,
    hash: NameHash,
    /// Inodes whose own blocks could not all be found: what their tags say is believed.
    partial: BTreeSet<u64>,
}

fn mark_of(owner: u64, kind: Kind) -> u32 {
    let mixed = (owner ^ (kind as u64) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) as u32 | 1
}

fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Checks a file system.
///
/// # Errors
/// Those of the source when it stops working altogether (`Lost`, `Shutdown`); everything else is an issue of the report.
pub async fn check<S: BlockSource>(source: &S, progress: &mut (dyn FnMut(&Progress) + Send)) -> Result<Report, DiskError> {
    let mirrors = source.mirrors();
    let marks = mirrors.iter().map(|(mirror, blocks)| (*mirror, vec![0; *blocks as usize])).collect();
    let blocks = mirrors.iter().map(|(_, blocks)| u64::from(*blocks)).sum();
    let mut checker = Checker {
        source,
        report: Report { blocks, ..Report::default() },
        marks,
        seen: BTreeMap::new(),
        hash: NameHash::new(&[0; 16]),
        partial: BTreeSet::new(),
    };
    let Some(first) = mirrors.iter().map(|(mirror, _)| *mirror).min() else {
        checker.report.add(Issue::Superblock { what: "there is no mirror".to_owned() });
        return Ok(checker.report);
    };
    let block = BlockNo::new(first, 0);
    let read = fatal(source.read(block.pack(), block).await)?;
    let superblock = match read.map_err(|e| e.to_string()).and_then(|b| Superblock::decode(&b, block).map_err(|e| e.to_string()))
    {
        Ok(superblock) => superblock,
        Err(what) => {
            checker.report.add(Issue::Superblock { what });
            return Ok(checker.report);
        }
    };
    checker.hash = NameHash::new(&superblock.hash_key);
    checker.mark(Ino(0), block, Kind::Super);
    let mut state = Progress { blocks, ..Progress::default() };
    checker.mark_from(Ino(superblock.root), &mut state, progress).await?;
    checker.check_links();
    checker.sweep(true, &mut state, progress).await?;
    checker.sweep(false, &mut state, progress).await?;
    Ok(checker.report)
}

/// Splits errors: those of one block are issues, the others end the check.
fn fatal<T>(result: Result<T, DiskError>) -> Result<Result<T, DiskError>, DiskError> {
    match result {
        Err(error @ (DiskError::Lost | DiskError::Shutdown)) => Err(error),
        other => Ok(other),
    }
}

impl<S: BlockSource> Checker<'_, S> {
    /// Marks a block as used. False if it is outside or marked already.
    fn mark(&mut self, owner: Ino, block: BlockNo, kind: Kind) -> bool {
        let Some(mark) = self.marks.get_mut(&block.mirror).and_then(|m| m.get_mut(block.index as usize)) else {
            self.report.add(Issue::OutOfRange { owner, block });
            return false;
        };
        if *mark != 0 {
            self.report.add(Issue::UsedTwice { block, owner });
            return false;
        }
        *mark = mark_of(owner.0, kind);
        self.report.blocks_used += 1;
        true
    }

    fn is_marked(&self, block: BlockNo) -> bool {
        self.marks.get(&block.mirror).and_then(|m| m.get(block.index as usize)).is_some_and(|mark| *mark != 0)
    }

    async fn read(&mut self, owner: Ino, block: BlockNo) -> Result<Option<Bytes>, DiskError> {
        match fatal(self.source.read(owner.0, block).await)? {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) => {
                self.partial.insert(owner.0);
                self.report.add(Issue::Unreadable { block, owner, what: error.to_string() });
                Ok(None)
            }
        }
    }

    /// Reads an inode; `None` if there is none that can be read.
    async fn inode(&mut self, ino: Ino) -> Result<Option<Inode>, DiskError> {
        let bytes = match fatal(self.source.read(ino.0, ino.block()).await)? {
            Ok(bytes) => bytes,
            Err(DiskError::NoSuchBlock(_)) => return Ok(None),
            Err(error) => {
                if self.partial.insert(ino.0) {
                    self.report.add(Issue::Unreadable { block: ino.block(), owner: ino, what: error.to_string() });
                }
                return Ok(None);
            }
        };
        match Inode::decode(&bytes, ino) {
            Ok(inode) => Ok(Some(inode)),
            Err(FsError::Stale) => Ok(None),
            Err(error) => {
                if self.partial.insert(ino.0) {
                    self.report.add(Issue::Format { block: ino.block(), owner: ino, what: error.to_string() });
                }
                Ok(None)
            }
        }
    }

    async fn records(&mut self, inode: &Inode) -> Result<Vec<Parent>, DiskError> {
        let mut records = inode.parents.clone();
        for block in inode.overflow.iter().map(|b| BlockNo::unpack(*b)) {
            let Some(bytes) = self.read(inode.ino, block).await? else {
                continue;
            };
            let count = usize::from(get_u16(&bytes, 32));
            if check_header(&bytes, magic::PARENTS, block).is_err()
                || get_u64(&bytes, 16) != inode.ino.0
                || count > OVERFLOW_PARENTS
            {
                self.report.add(Issue::Format { block, owner: inode.ino, what: "damaged parent records".to_owned() });
                continue;
            }
            records.extend((0..count).map(|i| Parent::get(&bytes, OVERFLOW_AT + i * PARENT_LEN)));
        }
        Ok(records)
    }

    async fn mark_from(
        &mut self,
        root: Ino,
        state: &mut Progress,
        progress: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<(), DiskError> {
        let Some(inode) = self.inode(root).await?.filter(Inode::is_directory) else {
            self.report.add(Issue::Superblock { what: "there is no root directory".to_owned() });
            return Ok(());
        };
        self.seen.insert(root, Seen { records: inode.links, names: 1 });
        let mut directories = VecDeque::from([inode]);
        while let Some(dir) = directories.pop_front() {
            state.inodes += 1;
            progress(state);
            self.report.directories += 1;
            let entries = self.mark_inode(&dir).await?;
            let mut subdirs = 0;
            for (hash, value) in entries {
                let Some(bucket) = Bucket::decode(&value) else {
                    self.report.add(Issue::Format {
                        block: dir.ino.block(),
                        owner: dir.ino,
                        what: format!("damaged entry at {hash:#x}"),
                    });
                    continue;
                };
                for candidates in bucket.names() {
                    let Some((entry, inode)) = self.judge(&dir, hash, candidates).await? else {
                        continue;
                    };
                    self.report.names += 1;
                    if let Some(seen) = self.seen.get_mut(&entry.ino) {
                        seen.names += 1;
                        if inode.is_directory() {
                            self.report.add(Issue::DirectoryTwice { ino: entry.ino });
                        }
                        continue;
                    }
                    self.seen.insert(entry.ino, Seen { records: inode.links, names: 1 });
                    if inode.is_directory() {
                        subdirs += 1;
                        directories.push_back(inode);
                    } else {
                        state.inodes += 1;
                        self.report.files += 1;
                        self.mark_inode(&inode).await?;
                    }
                }
            }
            match dir.subdirs.cmp(&subdirs) {
                std::cmp::Ordering::Less => {
                    self.report.add(Issue::SubdirsTooFew { ino: dir.ino, stored: dir.subdirs, counted: subdirs });
                }
                std::cmp::Ordering::Greater => {
                    self.report.add(Issue::SubdirsTooMany { ino: dir.ino, stored: dir.subdirs, counted: subdirs });
                }
                std::cmp::Ordering::Equal => {}
            }
        }
        Ok(())
    }

    /// What a name leads to, if to anything.
    async fn judge(&mut self, dir: &Inode, hash: u64, candidates: &[Entry]) -> Result<Option<(Entry, Inode)>, DiskError> {
        let Some(first) = candidates.first() else {
            return Ok(None);
        };
        let name = &first.name;
        if self.hash.of(name) != hash {
            self.report.add(Issue::WrongHash { dir: dir.ino, name: text(name) });
        }
        let mut winner: Option<(Entry, Inode)> = None;
        for entry in candidates {
            let Some(inode) = self.inode(entry.ino).await?.filter(|inode| inode.generation == entry.generation) else {
                continue;
            };
            let valid = self.records(&inode).await?.contains(&entry.record(dir.ino, hash));
            if valid && winner.as_ref().is_none_or(|(w, _)| w.seq < entry.seq) {
                winner = Some((entry.clone(), inode));
            }
        }
        if candidates.len() > 1 || candidates.iter().any(|e| e.flagged) {
            self.report.add(Issue::Unsettled { dir: dir.ino, name: text(name) });
        } else if winner.is_none() {
            self.report.add(Issue::EntryWithoutInode { dir: dir.ino, name: text(name), ino: first.ino });
        }
        if let Some((entry, inode)) = &winner
            && inode.kind() != entry.kind
        {
            self.report.add(Issue::WrongEntryKind { dir: dir.ino, name: text(name), ino: entry.ino });
        }
        Ok(winner)
    }

    /// Marks all blocks of an inode, and returns what its tree holds if it is a directory.
    async fn mark_inode(&mut self, inode: &Inode) -> Result<Vec<(u64, Bytes)>, DiskError> {
        let ino = inode.ino;
        if !self.mark(ino, ino.block(), Kind::Inode) {
            return Ok(Vec::new());
        }
        let before = self.report.blocks_used;
        for block in inode.overflow.iter().map(|b| BlockNo::unpack(*b)) {
            self.mark(ino, block, Kind::Attribute);
        }
        let records = self.records(inode).await?.len() as u32;
        if records != inode.links {
            self.report.add(Issue::WrongRecordCount { ino, stored: inode.links, counted: records });
        }
        let mut next = inode.attribute_block;
        for _ in 0..ATTRIBUTE_BLOCKS_MAX {
            if next == 0 {
                break;
            }
            let block = BlockNo::unpack(next);
            next = 0;
            if self.mark(ino, block, Kind::Attribute)
                && let Some(bytes) = self.read(ino, block).await?
            {
                match check_header(&bytes, magic::ATTRIBUTES, block) {
                    Ok(()) => next = get_u64(&bytes, ATTRIBUTES_NEXT_AT),
                    Err(error) => self.report.add(Issue::Format { block, owner: ino, what: error.to_string() }),
                }
            }
        }
        let mut entries = Vec::new();
        if let Body::Tree(root) = &inode.body {
            self.mark_tree(inode, root, &mut entries).await?;
        }
        if inode.kind() == FileKind::File {
            self.mark_extents(inode, &std::mem::take(&mut entries));
        }
        let counted = self.report.blocks_used - before;
        if counted != inode.blocks && !self.partial.contains(&ino.0) {
            self.report.add(Issue::WrongBlockCount { ino, stored: inode.blocks, counted });
        }
        Ok(entries)
    }

    async fn mark_tree(&mut self, inode: &Inode, root: &Node, entries: &mut Vec<(u64, Bytes)>) -> Result<(), DiskError> {
        let kind = if inode.is_directory() { Kind::Directory } else { Kind::Extents };
        let mut pending = vec![(inode.ino.block(), root.clone())];
        let mut last: Option<u64> = None;
        while let Some((at, node)) = pending.pop() {
            let bad = |what: &str| Issue::Format { block: at, owner: inode.ino, what: what.to_owned() };
            let mut previous = None;
            let mut children = Vec::new();
            for index in 0..node.len() {
                let key = node.key(index);
                let Some(value) = node.value(index) else {
                    self.report.add(bad("a slot leads outside the node"));
                    continue;
                };
                if previous.is_some_and(|p| p >= key) {
                    self.report.add(bad("keys out of order"));
                }
                previous = Some(key);
                if node.level() == 0 {
                    if last.is_some_and(|l| l >= key) {
                        self.report.add(bad("a key is lower than those of the node before"));
                    }
                    last = Some(key);
                    entries.push((key, value));
                    continue;
                }
                let high = (index + 1 < node.len()).then(|| node.key(index + 1));
                children.push((BlockNo::unpack(get_u64(&value, 0)), high));
            }
            for (block, high) in children.into_iter().rev() {
                if !self.mark(inode.ino, block, kind) {
                    self.partial.insert(inode.ino.0);
                    continue;
                }
                let Some(bytes) = self.read(inode.ino, block).await? else {
                    continue;
                };
                match btree::decode_block(&bytes, block, inode) {
                    Ok(mut child) if child.level() + 1 == node.level() => {
                        if let Some(high) = high {
                            child.truncate(high);
                        }
                        pending.push((block, child));
                    }
                    Ok(_) => {
                        self.partial.insert(inode.ino.0);
                        self.report.add(Issue::Format { block, owner: inode.ino, what: "a tree node at the wrong level".into() });
                    }
                    Err(error) => {
                        self.partial.insert(inode.ino.0);
                        self.report.add(Issue::Format { block, owner: inode.ino, what: error.to_string() });
                    }
                }
            }
        }
        Ok(())
    }

    fn mark_extents(&mut self, inode: &Inode, entries: &[(u64, Bytes)]) {
        for (index, (key, value)) in entries.iter().enumerate() {
            let Some(extent) = ExtentRecord::decode(value) else {
                self.partial.insert(inode.ino.0);
                self.report.add(Issue::Format {
                    block: inode.ino.block(),
                    owner: inode.ino,
                    what: format!("damaged extent at {key}"),
                });
                continue;
            };
            // A record counts only up to the next one's key.
            let room = entries.get(index + 1).map_or(u64::MAX, |(next, _)| next.saturating_sub(*key));
            let len = u64::from(extent.len).min(room) as u32;
            for index in extent.start.index..extent.start.index + len {
                if !self.mark(inode.ino, BlockNo::new(extent.start.mirror, index), Kind::Data) {
                    self.partial.insert(inode.ino.0);
                    break;
                }
            }
        }
    }

    fn check_links(&mut self) {
        for (ino, seen) in &self.seen {
            match seen.records.cmp(&seen.names) {
                std::cmp::Ordering::Equal => {}
                std::cmp::Ordering::Greater => {
                    self.report.add(Issue::RecordsWithoutEntry { ino: *ino, records: seen.records, names: seen.names });
                }
                std::cmp::Ordering::Less => {
                    self.report.add(Issue::WrongRecordCount { ino: *ino, stored: seen.records, counted: seen.names });
                }
            }
        }
    }

    /// Compares tags with marks: first for inodes (what an orphan owns is not leaked by itself), then for the rest.
    async fn sweep(
        &mut self,
        inodes: bool,
        state: &mut Progress,
        progress: &mut (dyn FnMut(&Progress) + Send),
    ) -> Result<(), DiskError> {
        const BATCH: u32 = 8192;
        for (mirror, blocks) in self.source.mirrors() {
            let mut index = 0;
            while index < blocks {
                let first = BlockNo::new(mirror, index);
                let tags = self.source.tags(first, BATCH.min(blocks - index)).await?;
                if tags.is_empty() {
                    return Err(DiskError::NoSuchBlock(first));
                }
                for (offset, tag) in (0..).zip(&tags) {
                    self.compare(BlockNo::new(mirror, index + offset), tag, inodes).await?;
                }
                index += tags.len() as u32;
                if !inodes {
                    state.swept += tags.len() as u64;
                    progress(state);
                }
            }
        }
        Ok(())
    }

    async fn compare(&mut self, block: BlockNo, tag: &Tag, inodes: bool) -> Result<(), DiskError> {
        let mark = self.marks.get(&block.mirror).and_then(|m| m.get(block.index as usize)).copied().unwrap_or(0);
        if inodes {
            if tag.kind == Kind::Inode && mark == 0 {
                self.orphan(Ino(block.pack())).await?;
            }
        } else if mark != 0 && (tag.kind == Kind::Free || mark != mark_of(tag.owner, tag.kind)) {
            self.report.add(Issue::WrongTag { block, owner: tag.owner, kind: tag.kind as u8 });
        } else if mark == 0 && tag.kind != Kind::Free && !self.partial.contains(&tag.owner) {
            self.report.blocks_leaked += 1;
            self.report.add(Issue::Leaked { block, owner: tag.owner, kind: tag.kind as u8 });
        }
        Ok(())
    }

    /// An inode that the mark did not reach.
    async fn orphan(&mut self, ino: Ino) -> Result<(), DiskError> {
        let Some(inode) = self.inode(ino).await? else {
            return Ok(());
        };
        debug_assert!(!self.is_marked(ino.block()));
        let before = self.report.blocks_used;
        self.mark_inode(&inode).await?;
        let blocks = self.report.blocks_used - before;
        self.report.blocks_leaked += blocks;
        self.report.blocks_used = before;
        self.report.add(Issue::Orphan { ino, blocks });
        Ok(())
    }
}

const _: () = assert!(BLOCK_SIZE == 4096, "marks and tags are by blocks of 4 KiB");

#[cfg(test)]
mod tests;
