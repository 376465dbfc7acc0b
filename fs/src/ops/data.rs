//! File data: read, write, append, truncate, allocate, punch, seek, copy.
//!
//! A small file lives in its inode; a larger one in blocks that its tree leads to (`extent`). Every call is one operation
//! per megabyte: data first, then the tree, then the inode with the new size and times. Freed blocks come last.
//!
//! Invariants:
//! - Inline data is never longer than the file, and the file then fits the inode's body; what is missing is zeros.
//! - Bytes beyond the end in the last block may be old: whoever makes the file grow zeroes them first.
//! - A file never shrinks or loses blocks by more than `FREE_MAX` blocks in one operation.
//! - No token is held while room for dirty data is awaited.
//!
//! Excludes: where blocks are (`extent`), attributes other than size and times, who may do what (the kernel checks).

use super::access::Access;
use super::payload::ZEROS;
pub use super::payload::{FileData, Payload};
use super::xattr::drop_capability;
use crate::extent::{self, RESIDUE, Removed, Run};
use crate::format::{BODY_LEN, FILE_SIZE_MAX};
use crate::inode::{Body, FileKind, Inode};
use crate::transaction::{Source, Transaction};
use crate::{Attributes, FileSystem, FsError, Ino, Result, Time};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo};
use sld::{After, Content, Disk, Kind, Mode, Tag, Write, WriteClass};

/// Bytes in a block, as file offsets.
const BS: u64 = BLOCK_SIZE as u64;
/// The most bytes that one operation writes: what the kernel sends at once.
const CHUNK: u64 = 1024 * 1024;
/// The most blocks that one operation frees.
const FREE_MAX: u32 = 1024;

/// The most by which clocks of nodes are taken to differ.
const CLOCK_SKEW_SECONDS: i64 = 60;

/// Whether somebody is in a group, or may act as if he were.
pub type IsInGroup<'a> = &'a (dyn Fn(u32) -> bool + Sync);

/// Whether a write may (still) be done.
pub type Allowed<'a> = &'a (dyn Fn() -> bool + Sync);

/// On what terms the data of a file is changed. They are looked at when it is, with its token in hand.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// Takes set-user-id and set-group-id away, as a change by an ordinary user does.
    pub kill: bool,
    /// Decides then over set-group-id of a file that its group may not execute.
    pub is_in_group: IsInGroup<'a>,
    /// Whether it may (still) be done.
    pub allowed: Allowed<'a>,
}

impl Terms<'static> {
    /// Nothing stands against it, and nothing follows from it.
    pub const NONE: Terms<'static> = Terms { kill: false, is_in_group: &|_| true, allowed: &|| true };
}

impl Terms<'_> {
    /// To be called before anything is changed.
    fn apply(&self, inode: &mut Inode) -> Result<()> {
        if !(self.allowed)() {
            return Err(FsError::Disk(sld::DiskError::Lost));
        }
        if self.kill {
            inode.kill_set_ids(self.is_in_group);
        }
        Ok(())
    }
}

/// Where a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// To an offset.
    Offset(u64),
    /// To the end of the file, wherever it is by then.
    End,
    /// To an offset, but the file does not grow: what lies beyond its end is dropped.
    Within(u64),
}

/// What `allocate` does to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Gives holes blocks of zeros, so that later writes do not lack space.
    Reserve,
    /// Makes it zeros, with blocks.
    Zero,
    /// Makes it a hole.
    Punch,
}

/// What `seek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that has a block.
    Data,
    /// The next byte that has none, or the end.
    Hole,
}

/// What is put into a range.
#[derive(Clone, Copy)]
enum Fill<'a> {
    /// Bytes: of the payload, from this position on.
    Payload(&'a Payload, u64),
    /// Zeros.
    Zeros,
    /// Zeros, where there is a hole.
    Reserve,
}

/// An attempt of an operation.
enum Step<T> {
    Done(T),
    /// Old data beyond the end must go first.
    Residue,
}

/// How far a write went.
struct Written {
    offset: u64,
    count: u64,
    /// Why there is no more.
    rest: Option<FsError>,
}

impl Written {
    /// Where, and how much. It is no success if something that was written may be lost; nor, `Within` a file, if it is not all.
    fn some(self, at: At) -> Result<(u64, u64)> {
        match self.rest {
            Some(error @ FsError::Disk(sld::DiskError::Lost)) => Err(error),
            Some(error) if self.count == 0 || matches!(at, At::Within(_)) => Err(error),
            _ => Ok((self.offset, self.count)),
        }
    }
}

fn check_file(inode: &Inode) -> Result<()> {
    match inode.kind() {
        FileKind::File => Ok(()),
        FileKind::Directory => Err(FsError::IsDirectory),
        _ => Err(FsError::Invalid("not a regular file")),
    }
}

/// The time of a change: now, but later than the last change, which another node's clock may have timed (and which caches
/// must be able to tell from this one). A time far ahead was set by a program, and does not last.
pub(super) fn later(now: Time, last: Time) -> Time {
    if now > last || last.seconds.saturating_sub(now.seconds) > CLOCK_SKEW_SECONDS {
        return now;
    }
    match last.nanos {
        999_999_999 => Time { seconds: last.seconds.saturating_add(1), nanos: 0 },
        nanos => Time { nanos: nanos + 1, ..last },
    }
}

/// The number of blocks that hold this many bytes.
fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BS)
}

impl<D: Disk> FileSystem<D> {
    /// Reads up to `size` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// `IsDirectory`, `Invalid` if it is not a file; `Stale`, `Corrupt`, those of the disk.
    pub async fn read(&self, ino: Ino, offset: u64, size: u32) -> Result<FileData> {
        let (data, access) = self.again(|| self.read_data(ino, offset, size)).await?;
        if let Some(access) = access {
            self.accessed(access).await;
        }
        Ok(data)
    }

    /// As `read`, but it is no access (`O_NOATIME`).
    ///
    /// # Errors
    /// As `read`.
    pub async fn read_unnoticed(&self, ino: Ino, offset: u64, size: u32) -> Result<FileData> {
        Ok(self.again(|| self.read_data(ino, offset, size)).await?.0)
    }

    /// Reads; and says what access is due to be shown.
    async fn read_data(&self, ino: Ino, offset: u64, size: u32) -> Result<(FileData, Option<Access>)> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let inode = self.load(Source::disk(self.disk()), ino).await?;
        check_file(&inode)?;
        let access = if size > 0 { self.access(&inode) } else { None };
        let end = offset.saturating_add(u64::from(size)).min(inode.size);
        let mut data = FileData::new(inode.data_version);
        if offset >= end {
            return Ok((data, access));
        }
        if let Body::Inline(bytes) = &inode.body {
            let len = bytes.len() as u64;
            data.push(bytes.slice(offset.min(len) as usize..end.min(len) as usize));
            data.push_zeros(end - offset - data.len());
            return Ok((data, access));
        }
        let (first, last) = (offset / BS, (end - 1) / BS);
        let runs = extent::map(Source::disk(self.disk()), &inode, first, last + 1).await?;
        let places: Vec<BlockNo> =
            runs.iter().filter(|run| !run.unwritten).flat_map(|run| (run.at..run.end()).map(|at| run.block(at))).collect();
        let blocks = match places.as_slice() {
            [] => Vec::new(),
            [one] => vec![Source::disk(self.disk()).read(ino.object(), *one).await?],
            many => self.disk().read_many(ino.object(), many).await?,
        };
        let mut blocks = blocks.into_iter();
        let mut at = offset;
        for run in runs.iter().filter(|run| !run.unwritten) {
            let begin = (run.at * BS).max(offset);
            data.push_zeros(begin.saturating_sub(at));
            for (index, block) in (run.at..run.end()).zip(&mut blocks) {
                let from = (index * BS).max(offset);
                let to = ((index + 1) * BS).min(end);
                data.push(block.slice((from - index * BS) as usize..(to - index * BS) as usize));
                at = to;
            }
        }
        data.push_zeros(end - at);
        self.read_ahead(&inode, offset, end).await;
        Ok((data, access))
    }

    /// Has blocks fetched that a sequential reader will want next. What fails here fails again when it is really read.
    async fn read_ahead(&self, inode: &Inode, offset: u64, end: u64) {
        let Some((from, to)) = self.streams.advance(inode.ino.0, offset, end, inode.size) else { return };
        if let Ok(runs) = extent::map(Source::disk(self.disk()), inode, from / BS, blocks_of(to)).await {
            let blocks: Vec<BlockNo> =
                runs.iter().filter(|run| !run.unwritten).flat_map(|run| (run.at..run.end()).map(|at| run.block(at))).collect();
            if !blocks.is_empty() {
                self.disk().read_ahead(inode.object(), &blocks);
            }
        }
    }

    /// Writes all of a payload; `kill`: as a member of the file's group, whose writing takes set-user-id and set-group-id away. Returns
    /// where it was written.
    ///
    /// # Errors
    /// `NoSpace` and `TooLarge` (some of it may be written), and those of `read`.
    pub async fn write(&self, ino: Ino, at: At, payload: Payload, kill: bool) -> Result<u64> {
        let written = self.write_parts(ino, at, &payload, Terms { kill, ..Terms::NONE }, &|| true).await;
        written.rest.map_or(Ok(written.offset), Err)
    }

    /// Writes as long as the terms allow it, which are looked at before each part is committed. Returns where, and how much: less than
    /// all if something fails after some was written.
    ///
    /// # Errors
    /// `Disk(Lost)` if it is not allowed (any more), also if some was written before: that may be lost. Those of `write` if
    /// nothing was written; and in any case if it was to be `Within` the file: nobody would write the rest of pages again.
    pub async fn write_if(&self, ino: Ino, at: At, payload: Payload, terms: Terms<'_>) -> Result<(u64, u64)> {
        self.write_parts(ino, at, &payload, terms, terms.allowed).await.some(at)
    }

    /// `again`: whether it may begin again if the node was cut off before anything was written.
    async fn write_parts(&self, ino: Ino, at: At, payload: &Payload, terms: Terms<'_>, again: Allowed<'_>) -> Written {
        let appends = at == At::End;
        let (mut at, mut done, mut began, mut most) = (at, 0, None, CHUNK);
        while done < payload.len() {
            // Chunks end where blocks end, so that no block is written twice.
            let head = match at {
                At::Offset(offset) | At::Within(offset) => offset % BS,
                At::End => 0,
            };
            let len = (most - head).min(payload.len() - done);
            let fill = Fill::Payload(payload, done);
            let result = match began {
                None => self.again_if(again, || self.write_chunk(ino, at, fill, len, terms)).await,
                // What came before may be lost, so that this must not go on as if it were there.
                Some(_) => self.again_if(&|| false, || self.write_chunk(ino, at, fill, len, terms)).await,
            };
            let offset = match result {
                Ok(offset) => offset,
                Err(FsError::NoSpace) if head + len > BS => {
                    // What there is room for is written, down to a block.
                    most = blocks_of(head + len) / 2 * BS;
                    continue;
                }
                Err(error) => return Written { offset: began.unwrap_or(0), count: done, rest: Some(error) },
            };
            began.get_or_insert(offset);
            done += len;
            if appends && most < CHUNK {
                // By now another node may have appended, and what comes next belongs after that.
                return Written { offset, count: done, rest: Some(FsError::NoSpace) };
            }
            at = match at {
                At::Within(_) => At::Within(offset.saturating_add(len)),
                // What was appended goes on where it began, even if another node appends meanwhile.
                At::Offset(_) | At::End => At::Offset(offset.saturating_add(len)),
            };
        }
        Written { offset: began.unwrap_or(0), count: done, rest: None }
    }

    async fn write_chunk(&self, ino: Ino, at: At, fill: Fill<'_>, len: u64, terms: Terms<'_>) -> Result<u64> {
        loop {
            match self.try_write(ino, at, fill, len, terms).await? {
                Step::Done(offset) => return Ok(offset),
                Step::Residue => self.trim(ino).await?,
            }
        }
    }

    async fn try_write(&self, ino: Ino, at: At, fill: Fill<'_>, len: u64, terms: Terms<'_>) -> Result<Step<u64>> {
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(ino.object(), Mode::Exclusive)]).await?;
        if !(terms.allowed)() {
            return Err(FsError::Disk(sld::DiskError::Lost));
        }
        let mut inode = self.load(Source::disk(self.disk()), ino).await?;
        check_file(&inode)?;
        let (offset, end) = match at {
            At::Offset(offset) => (offset, offset.saturating_add(len)),
            At::End => (inode.size, inode.size.saturating_add(len)),
            At::Within(offset) => (offset, offset.saturating_add(len).min(inode.size)),
        };
        if offset >= end {
            return Ok(Step::Done(offset));
        }
        if end > FILE_SIZE_MAX {
            return Err(FsError::TooLarge);
        }
        if end > inode.size && inode.flags & RESIDUE != 0 {
            return Ok(Step::Residue);
        }
        let mut tx = Transaction::new(self.disk());
        let mut after = put(&mut tx, &mut inode, offset, end, fill).await?;
        inode.size = inode.size.max(end);
        if terms.kill {
            inode.kill_set_ids(terms.is_in_group);
        }
        let powerless = drop_capability(&mut tx, &mut inode).await?;
        after.extend(&powerless.after);
        self.changed(&mut inode);
        let written = After::Write(inode.write(&mut tx, &after));
        powerless.free(&mut tx, &inode, written);
        tx.commit()?;
        Ok(Step::Done(offset))
    }

    /// The data of a file changes now.
    fn changed(&self, inode: &mut Inode) {
        let now = self.now();
        inode.mtime = later(now, inode.mtime);
        inode.ctime = later(now, inode.ctime);
        inode.data_version += 1;
    }

    /// Sets a file's size.
    ///
    /// # Errors
    /// `TooLarge`, and those of `write`.
    pub async fn truncate(&self, ino: Ino, size: u64) -> Result<Attributes> {
        self.truncate_on(ino, size, Terms::NONE).await
    }

    /// Sets a file's size on some terms.
    ///
    /// # Errors
    /// `Disk(Lost)` if it is not allowed (any more), and those of `truncate`.
    pub async fn truncate_on(&self, ino: Ino, size: u64, terms: Terms<'_>) -> Result<Attributes> {
        loop {
            match self.again_if(terms.allowed, || self.try_truncate(ino, size, terms)).await? {
                Step::Done((attributes, true)) => return Ok(attributes),
                Step::Done((attributes, false)) => {
                    self.free_tail(ino).await;
                    return Ok(attributes);
                }
                Step::Residue => self.again_if(terms.allowed, || self.trim(ino)).await?,
            }
        }
    }

    async fn try_truncate(&self, ino: Ino, size: u64, terms: Terms<'_>) -> Result<Step<(Attributes, bool)>> {
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(ino.object(), Mode::Exclusive)]).await?;
        let mut inode = self.load(Source::disk(self.disk()), ino).await?;
        check_file(&inode)?;
        if size > FILE_SIZE_MAX {
            return Err(FsError::TooLarge);
        }
        if size > inode.size && inode.flags & RESIDUE != 0 {
            return Ok(Step::Residue);
        }
        terms.apply(&mut inode)?;
        let mut tx = Transaction::new(self.disk());
        self.changed(&mut inode);
        if size > inode.size {
            let after = grow(&mut tx, &mut inode, size).await?;
            inode.size = size;
            inode.write(&mut tx, &after);
            tx.commit()?;
            return Ok(Step::Done((inode.attributes(), true)));
        }
        inode.size = size;
        if let Body::Inline(bytes) = &inode.body {
            inode.body = Body::Inline(bytes.slice(..bytes.len().min(size as usize)));
            inode.write(&mut tx, &[]);
            tx.commit()?;
            return Ok(Step::Done((inode.attributes(), true)));
        }
        // Also if the size stays: blocks may have been reserved beyond the end.
        let from = blocks_of(size);
        let is_cheap = inode.root()?.level() == 0;
        let done = if is_cheap || inode.flags & RESIDUE != 0 || extent::next(tx.source(), &inode, from).await?.is_some() {
            self.cut(&mut tx, &mut inode, from, u64::MAX).await?
        } else {
            inode.write(&mut tx, &[]);
            true
        };
        tx.commit()?;
        Ok(Step::Done((inode.attributes(), done)))
    }

    /// Takes some blocks in `from..to` out of a file whose inode has changed (in memory), writes it and frees them. Returns
    /// whether none is left; if some are, beyond the end, the inode says so.
    async fn cut(&self, tx: &mut Transaction<'_, D>, inode: &mut Inode, from: u64, to: u64) -> Result<bool> {
        let beyond = from >= blocks_of(inode.size);
        let mut after = Vec::new();
        if inode.root()?.level() > 0 {
            // The tree's nodes change after the size: a crash between leaves old data beyond the end, not zeros before it.
            if beyond {
                inode.flags |= RESIDUE;
            }
            after.push(After::Write(inode.write(tx, &[])));
        }
        let (removed, done) = extent::remove(tx, inode, from, to, FREE_MAX, &after).await?;
        if beyond {
            inode.flags = if done { inode.flags & !RESIDUE } else { inode.flags | RESIDUE };
        }
        let root = inode.root()?;
        if done && inode.size == 0 && from == 0 && root.level() == 0 && root.is_empty() {
            inode.body = Body::Inline(Bytes::new());
        }
        self.write_and_free(tx, inode, removed);
        Ok(done)
    }

    fn write_and_free(&self, tx: &mut Transaction<'_, D>, inode: &Inode, removed: Removed) {
        let written = inode.write(tx, &removed.after);
        removed.free(tx, inode, written);
    }

    /// Brings truncations to their end: takes away old blocks beyond the end of the file, some at a time.
    pub(crate) async fn trim(&self, ino: Ino) -> Result<()> {
        loop {
            self.disk().admit().await?;
            let _tokens = self.tokens(&[(ino.object(), Mode::Exclusive)]).await?;
            let mut inode = self.load(Source::disk(self.disk()), ino).await?;
            if inode.flags & RESIDUE == 0 {
                return Ok(());
            }
            let mut tx = Transaction::new(self.disk());
            let from = blocks_of(inode.size);
            self.cut(&mut tx, &mut inode, from, u64::MAX).await?;
            tx.commit()?;
        }
    }

    /// Reserves, zeroes or punches a range. The size grows to its end unless `keep_size`; punching never changes it.
    ///
    /// # Errors
    /// As `write`; `Invalid` for an empty range.
    pub async fn allocate(&self, ino: Ino, what: Allocate, offset: u64, len: u64, keep_size: bool) -> Result<()> {
        self.allocate_on(ino, what, offset, len, keep_size, Terms::NONE).await
    }

    /// Reserves, zeroes or punches a range on some terms.
    ///
    /// # Errors
    /// `Disk(Lost)` if it is not allowed (any more), and those of `allocate`.
    pub async fn allocate_on(
        &self,
        ino: Ino,
        what: Allocate,
        offset: u64,
        len: u64,
        keep_size: bool,
        terms: Terms<'_>,
    ) -> Result<()> {
        if len == 0 {
            return Err(FsError::Invalid("an empty range"));
        }
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX).ok_or(FsError::TooLarge)?;
        let fill = match what {
            Allocate::Reserve => Fill::Reserve,
            Allocate::Zero => Fill::Zeros,
            Allocate::Punch => return self.punch(ino, offset, end, terms).await,
        };
        let mut at = offset;
        while at < end {
            let to = end.min(at + (CHUNK - at % BS));
            // What came before may be lost, so that this must not go on as if it were there.
            let again = if at == offset { terms.allowed } else { &|| false };
            match self.again_if(again, || self.try_allocate(ino, fill, at, to, keep_size, terms)).await? {
                Step::Done(()) => at = to,
                Step::Residue => self.again_if(again, || self.trim(ino)).await?,
            }
        }
        Ok(())
    }

    async fn try_allocate(
        &self,
        ino: Ino,
        fill: Fill<'_>,
        from: u64,
        to: u64,
        keep_size: bool,
        terms: Terms<'_>,
    ) -> Result<Step<()>> {
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(ino.object(), Mode::Exclusive)]).await?;
        let mut inode = self.load(Source::disk(self.disk()), ino).await?;
        check_file(&inode)?;
        if to > inode.size && inode.flags & RESIDUE != 0 {
            return Ok(Step::Residue);
        }
        terms.apply(&mut inode)?;
        let mut tx = Transaction::new(self.disk());
        let after = put(&mut tx, &mut inode, from, to, fill).await?;
        // As on other file systems its times change even if all was there already.
        self.changed(&mut inode);
        if !keep_size {
            inode.size = inode.size.max(to);
        }
        inode.write(&mut tx, &after);
        tx.commit()?;
        Ok(Step::Done(()))
    }

    async fn punch(&self, ino: Ino, offset: u64, end: u64, terms: Terms<'_>) -> Result<()> {
        let mut done = self.again_if(terms.allowed, || self.try_punch(ino, offset, end, true, terms)).await?;
        while !done {
            // What came before may be lost, so that this must not go on as if it were there.
            done = self.again_if(&|| false, || self.try_punch(ino, offset, end, false, terms)).await?;
        }
        Ok(())
    }

    /// Makes some of a range a hole; the parts of blocks at its edges, too, if they are `edges_left`. Returns whether all is done.
    async fn try_punch(&self, ino: Ino, offset: u64, end: u64, edges_left: bool, terms: Terms<'_>) -> Result<bool> {
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(ino.object(), Mode::Exclusive)]).await?;
        let mut inode = self.load(Source::disk(self.disk()), ino).await?;
        check_file(&inode)?;
        terms.apply(&mut inode)?;
        let mut tx = Transaction::new(self.disk());
        self.changed(&mut inode);
        if let Body::Inline(bytes) = &inode.body {
            let mut bytes = bytes.to_vec();
            let len = bytes.len() as u64;
            bytes[offset.min(len) as usize..end.min(len) as usize].fill(0);
            inode.body = Body::Inline(Bytes::from(bytes));
            inode.write(&mut tx, &[]);
            tx.commit()?;
            return Ok(true);
        }
        let (first, last) = (offset.div_ceil(BS), end / BS);
        if edges_left {
            let head = offset..end.min(offset.next_multiple_of(BS));
            let tail = offset.max(last * BS)..end;
            zero_within_block(&mut tx, &inode, head.start, head.end).await?;
            if tail.start >= head.end {
                zero_within_block(&mut tx, &inode, tail.start, tail.end).await?;
            }
        }
        let (mut removed, done) = extent::remove(&mut tx, &mut inode, first, last.max(first), FREE_MAX, &[]).await?;
        removed.after.push(After::DataOf(inode.object()));
        self.write_and_free(&mut tx, &inode, removed);
        tx.commit()?;
        Ok(done)
    }

    /// The next byte of the wanted kind at or after `offset`.
    ///
    /// # Errors
    /// `NoAddress` if there is none before the end, and those of `read`.
    pub async fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        self.again(|| self.try_seek(ino, offset, what)).await
    }

    async fn try_seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let inode = self.load(Source::disk(self.disk()), ino).await?;
        check_file(&inode)?;
        if offset >= inode.size {
            return Err(FsError::NoAddress);
        }
        if let Body::Inline(_) = &inode.body {
            return Ok(if what == Seek::Data { offset } else { inode.size });
        }
        let mut at = offset / BS;
        let source = Source::disk(self.disk());
        let found = loop {
            match (extent::next(source, &inode, at).await?, what) {
                (None, Seek::Data) => return Err(FsError::NoAddress),
                (None, Seek::Hole) => break at,
                (Some(run), Seek::Data) if !run.unwritten => break run.at.max(at),
                (Some(run), Seek::Hole) if run.at > at || run.unwritten => break at,
                (Some(run), _) => at = run.end(),
            }
        };
        let found = found.saturating_mul(BS).max(offset);
        match what {
            Seek::Data if found >= inode.size => Err(FsError::NoAddress),
            _ => Ok(found.min(inode.size)),
        }
    }

    /// Copies between files (or within one, if the ranges do not overlap). Returns how much: less than `len` only at the end
    /// of the source, or if something fails after some was copied.
    ///
    /// # Errors
    /// `Invalid` if the ranges overlap, and those of `read` and `write`.
    pub async fn copy_range(&self, from: Ino, from_offset: u64, to: Ino, to_offset: u64, len: u64) -> Result<u64> {
        self.copy_range_on((from, from_offset), (to, to_offset), len, Terms::NONE).await
    }

    /// Copies between files, on some terms for the second.
    ///
    /// # Errors
    /// `Disk(Lost)` if it is not allowed (any more), and those of `copy_range`.
    pub async fn copy_range_on(&self, source: (Ino, u64), target: (Ino, u64), len: u64, terms: Terms<'_>) -> Result<u64> {
        let ((from, from_offset), (to, to_offset)) = (source, target);
        let disjoint = from_offset.saturating_add(len) <= to_offset || to_offset.saturating_add(len) <= from_offset;
        if from == to && !disjoint {
            return Err(FsError::Invalid("the ranges overlap"));
        }
        // What is appended to the source meanwhile, maybe by this very copy, is not copied.
        let len = len.min(self.attributes(from).await?.size.saturating_sub(from_offset));
        let mut copied = 0;
        while copied < len {
            let at = from_offset.saturating_add(copied);
            // Whole blocks from the second turn on, so that they are shared and not copied byte by byte.
            let want = (len - copied).min(CHUNK - at % BS);
            let step = async {
                let data = self.read(from, at, want as u32).await?;
                if data.is_empty() {
                    return Ok(0);
                }
                let at = At::Offset(to_offset.saturating_add(copied));
                // What came before may be lost.
                let again = if copied == 0 { terms.allowed } else { &|| false };
                let written = self.write_parts(to, at, &data.into_payload(), terms, again).await.some(at)?;
                Ok::<u64, FsError>(written.1)
            };
            match step.await {
                Ok(0) => break,
                Ok(written) => copied += written,
                Err(error) if copied == 0 || error == FsError::Disk(sld::DiskError::Lost) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(copied)
    }
}

fn data_tag<D: Disk>(tx: &Transaction<'_, D>, inode: &Inode, at: u64) -> Tag {
    Tag { kind: Kind::Data, owner: inode.ino.0, offset: at, birth: tx.disk().cycle() }
}

fn write_data<D: Disk>(tx: &mut Transaction<'_, D>, inode: &Inode, at: u64, block: BlockNo, data: Bytes, class: WriteClass) {
    let tag = data_tag(tx, inode, at);
    tx.push(Write { block, object: inode.object(), content: Content::Data(data), tag, class, after: Vec::new() });
}

/// Puts something into `from..to` of a file: data blocks, and the tree. The inode is changed but not written, and its size
/// and times are left to the caller. Returns what the inode comes after.
async fn put<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode, from: u64, to: u64, fill: Fill<'_>) -> Result<Vec<After>> {
    let size = inode.size;
    if let Body::Inline(bytes) = &inode.body
        && to <= BODY_LEN as u64
    {
        let mut body = bytes.to_vec();
        match fill {
            Fill::Payload(payload, position) => {
                body.resize(body.len().max(to as usize), 0);
                body[from as usize..to as usize].copy_from_slice(&payload.piece(position, to - from));
            }
            Fill::Zeros => {
                let len = body.len();
                body[len.min(from as usize)..len.min(to as usize)].fill(0);
            }
            // The body has room, and what is missing in it is zeros.
            Fill::Reserve => {}
        }
        inode.body = Body::Inline(Bytes::from(body));
        return Ok(Vec::new());
    }
    let inline = leave_inline(inode);
    let object = inode.object();
    let (mut first, end) = (from / BS, blocks_of(to));
    if !inline.is_empty() && first > 0 {
        // The bytes that were in the inode get block 0, wherever the range is.
        let extent = tx.alloc(Some(inode.ino.block()), 1).await?;
        inode.blocks += 1;
        write_data(tx, inode, 0, extent.start, whole_block(&inline), WriteClass::FreshData);
        let run = Run { at: 0, start: extent.start, len: 1, unwritten: false };
        extent::replace(tx, inode, 0, 1, &[run], &[After::DataOf(object)]).await?;
        first = first.max(1);
    }
    let reserves = matches!(fill, Fill::Reserve);
    if from > size || reserves && to > size {
        // What is reserved leaves the old last block as it is, so that it must be seen to here.
        zero_tail(tx, inode, size, if reserves { u64::MAX } else { first }).await?;
    }
    let mapped = extent::map(tx.source(), inode, first.saturating_sub(1), end).await?;
    let (all, fresh) = fill_holes(tx, inode, first, end, &mapped).await?;
    let mut is_changed = fresh > 0;
    for run in &all {
        let was_there = !run.fresh && !run.run.unwritten;
        is_changed |= run.run.unwritten && !matches!(fill, Fill::Reserve);
        if was_there && matches!(fill, Fill::Reserve) {
            continue;
        }
        for at in run.run.at..run.run.end() {
            let (begin, limit) = (at * BS, (at + 1) * BS);
            let (start, stop) = (from.max(begin), to.min(limit));
            let is_whole = start == begin && stop == limit;
            let block = run.run.block(at);
            let data = match fill {
                Fill::Payload(payload, position) if is_whole => payload.piece(position + (start - from), BS),
                Fill::Zeros if is_whole => ZEROS,
                _ => {
                    let mut base = if at == 0 && !inline.is_empty() {
                        inline.to_vec()
                    } else if was_there && begin < size {
                        let old = tx.source().read(object, block).await?;
                        old[..(size - begin).min(BS) as usize].to_vec()
                    } else {
                        Vec::new()
                    };
                    base.resize(BLOCK_SIZE, 0);
                    let range = (start - begin) as usize..(stop - begin) as usize;
                    match fill {
                        Fill::Payload(payload, position) => {
                            base[range].copy_from_slice(&payload.piece(position + (start - from), stop - start));
                        }
                        Fill::Zeros => base[range].fill(0),
                        Fill::Reserve => {}
                    }
                    Bytes::from(base)
                }
            };
            let class = if was_there { WriteClass::OverwrittenData } else { WriteClass::FreshData };
            write_data(tx, inode, at, block, data, class);
        }
    }
    let mut after = vec![After::DataOf(object)];
    if is_changed {
        inode.blocks += fresh;
        let runs: Vec<Run> = all
            .iter()
            .map(|p| Run { unwritten: p.run.unwritten && !p.fresh && matches!(fill, Fill::Reserve), ..p.run })
            .collect();
        after = extent::replace(tx, inode, first, end, &runs, &after).await?;
    }
    Ok(after)
}

/// A run, and whether its blocks were just allocated.
struct Place {
    run: Run,
    fresh: bool,
}

/// All of `first..end` with blocks: what is mapped there (and, for locality, one block before), and new ones for the holes.
/// Returns how many are new, too.
async fn fill_holes<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &Inode,
    first: u64,
    end: u64,
    mapped: &[Run],
) -> Result<(Vec<Place>, u64)> {
    let mut all: Vec<Place> = Vec::new();
    let (mut at, mut fresh) = (first, 0);
    let mut near = None;
    let mut mapped = mapped.iter().peekable();
    while at < end {
        while let Some(run) = mapped.next_if(|run| run.end() <= at) {
            near = run.start.index.checked_add(run.len).map(|index| BlockNo::new(run.start.mirror, index));
        }
        match mapped.peek().and_then(|run| run.clip(at, end)) {
            Some(run) if run.at == at => {
                at = run.end();
                near = run.start.index.checked_add(run.len).map(|index| BlockNo::new(run.start.mirror, index));
                all.push(Place { run, fresh: false });
            }
            next => {
                if near.is_none() {
                    near = match extent::before(tx.source(), inode, at).await? {
                        Some(run) => run.start.index.checked_add(run.len).map(|index| BlockNo::new(run.start.mirror, index)),
                        None => Some(inode.ino.block()),
                    };
                }
                let hole = next.map_or(end, |run| run.at) - at;
                let extent = tx.alloc(near, u32::try_from(hole).unwrap_or(u32::MAX)).await?;
                let len = extent.len.min(u32::try_from(hole).unwrap_or(u32::MAX));
                let run = Run { at, start: extent.start, len, unwritten: false };
                fresh += u64::from(len);
                at += u64::from(len);
                near = extent.start.index.checked_add(len).map(|index| BlockNo::new(extent.start.mirror, index));
                all.push(Place { run, fresh: true });
            }
        }
    }
    Ok((all, fresh))
}

/// Gives a file that lives in its inode a tree instead, and returns the bytes that were there.
fn leave_inline(inode: &mut Inode) -> Bytes {
    let Body::Inline(bytes) = &inode.body else { return Bytes::new() };
    let bytes = bytes.clone();
    inode.make_tree();
    bytes
}

fn whole_block(bytes: &[u8]) -> Bytes {
    let mut block = bytes.to_vec();
    block.resize(BLOCK_SIZE, 0);
    Bytes::from(block)
}

/// A file is about to grow, without data: its old last block must end in zeros. Returns what the inode comes after.
async fn grow<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode, size: u64) -> Result<Vec<After>> {
    if let Body::Inline(_) = &inode.body {
        if size <= BODY_LEN as u64 {
            return Ok(Vec::new());
        }
        let inline = leave_inline(inode);
        if inline.is_empty() {
            return Ok(Vec::new());
        }
        let extent = tx.alloc(Some(inode.ino.block()), 1).await?;
        inode.blocks += 1;
        write_data(tx, inode, 0, extent.start, whole_block(&inline), WriteClass::FreshData);
        let run = Run { at: 0, start: extent.start, len: 1, unwritten: false };
        return extent::replace(tx, inode, 0, 1, &[run], &[After::DataOf(inode.object())]).await;
    }
    zero_tail(tx, inode, inode.size, u64::MAX).await?;
    Ok(vec![After::DataOf(inode.object())])
}

/// Zeroes what lies beyond the end `size` in its block, unless that is block `except` or later (which is written anyway).
async fn zero_tail<D: Disk>(tx: &mut Transaction<'_, D>, inode: &Inode, size: u64, except: u64) -> Result<()> {
    let at = size / BS;
    if !size.is_multiple_of(BS) && at < except {
        zero_within_block(tx, inode, size, (at + 1) * BS).await?;
    }
    Ok(())
}

/// Zeroes a range that does not cross into another block, if it has a block.
async fn zero_within_block<D: Disk>(tx: &mut Transaction<'_, D>, inode: &Inode, from: u64, to: u64) -> Result<()> {
    if from >= to {
        return Ok(());
    }
    let at = from / BS;
    let runs = extent::map(tx.source(), inode, at, at + 1).await?;
    let Some(run) = runs.first().filter(|run| !run.unwritten) else { return Ok(()) };
    let block = run.block(at);
    let old = tx.source().read(inode.object(), block).await?;
    let range = (from - at * BS) as usize..(to - at * BS) as usize;
    if old[range.clone()].iter().any(|byte| *byte != 0) {
        let mut new = old.to_vec();
        new[range].fill(0);
        write_data(tx, inode, at, block, Bytes::from(new), WriteClass::OverwrittenData);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
