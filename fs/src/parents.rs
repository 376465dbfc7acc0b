//! Parent records of an inode: inline, and beyond that in overflow blocks.
//!
//! An overflow block is replaced as a whole and never changed in place, so that writing the inode stays the one commit point.
//!
//! Excludes: when a record comes and goes (`ops`).

use crate::error::{FsError, Result};
use crate::format::{
    OVERFLOW_AT, OVERFLOW_MAX, OVERFLOW_PARENTS, PARENT_LEN, PARENTS_INLINE, check_header, get_u16, get_u64, magic, put_header,
    put_u16, put_u64,
};
use crate::inode::{Inode, Parent};
use crate::transaction::{Source, Transaction};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo};
use sld::{After, Disk, Kind, Tag};

/// What else a change of the records needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The inode must come after these.
    pub after: Vec<After>,
    /// To be freed after the inode.
    pub free: Vec<BlockNo>,
}

/// Reads an overflow block.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn overflow<D: Disk>(source: Source<'_, D>, inode: &Inode, block: BlockNo) -> Result<Vec<Parent>> {
    let bytes = source.read(inode.object(), block).await?;
    check_header(&bytes, magic::PARENTS, block)?;
    let count = usize::from(get_u16(&bytes, 32));
    if get_u64(&bytes, 16) != inode.ino.0 || get_u64(&bytes, 24) != inode.generation || count > OVERFLOW_PARENTS {
        return Err(FsError::corrupt(block, "parent records of another inode"));
    }
    Ok((0..count).map(|i| Parent::get(&bytes, OVERFLOW_AT + i * PARENT_LEN)).collect())
}

/// All records.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn all<D: Disk>(source: Source<'_, D>, inode: &Inode) -> Result<Vec<Parent>> {
    let mut records = inode.parents.clone();
    for block in &inode.overflow {
        records.extend(overflow(source, inode, BlockNo::unpack(*block)).await?);
    }
    Ok(records)
}

/// Whether the inode has a record.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn contains<D: Disk>(source: Source<'_, D>, inode: &Inode, record: Parent) -> Result<bool> {
    if inode.parents.contains(&record) {
        return Ok(true);
    }
    for block in &inode.overflow {
        if overflow(source, inode, BlockNo::unpack(*block)).await?.contains(&record) {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn write_overflow<D: Disk>(tx: &mut Transaction<'_, D>, inode: &Inode, records: &[Parent]) -> Result<(u64, After)> {
    let block = tx.alloc(Some(inode.ino.block()), 1).await?.start;
    let mut bytes = vec![0; BLOCK_SIZE];
    put_header(&mut bytes, magic::PARENTS, Kind::Attribute, block);
    put_u64(&mut bytes, 16, inode.ino.0);
    put_u64(&mut bytes, 24, inode.generation);
    put_u16(&mut bytes, 32, records.len() as u16);
    for (index, record) in records.iter().enumerate() {
        record.put(&mut bytes, OVERFLOW_AT + index * PARENT_LEN);
    }
    let tag = Tag { kind: Kind::Attribute, owner: inode.ino.0, offset: 0, birth: tx.disk().cycle() };
    let write = tx.write(inode.object(), block, Bytes::from(bytes), tag, &[]);
    Ok((block.pack(), After::Write(write)))
}

/// Adds a record; the inode is written by the caller.
///
/// # Errors
/// `TooManyLinks`, `NoSpace`, those of the disk.
pub async fn add<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode, record: Parent) -> Result<Change> {
    let mut change = Change::default();
    if inode.parents.len() < PARENTS_INLINE && inode.tail_left() >= PARENT_LEN {
        inode.parents.push(record);
        inode.links += 1;
        return Ok(change);
    }
    for index in 0..inode.overflow.len() {
        let old = BlockNo::unpack(inode.overflow[index]);
        let mut records = overflow(tx.source(), inode, old).await?;
        if records.len() < OVERFLOW_PARENTS {
            records.push(record);
            let (block, after) = write_overflow(tx, inode, &records).await?;
            inode.overflow[index] = block;
            inode.links += 1;
            change.after.push(after);
            change.free.push(old);
            return Ok(change);
        }
    }
    if inode.overflow.len() >= OVERFLOW_MAX || inode.tail_left() < 8 {
        return Err(FsError::TooManyLinks);
    }
    let (block, after) = write_overflow(tx, inode, &[record]).await?;
    inode.overflow.push(block);
    inode.blocks += 1;
    inode.links += 1;
    change.after.push(after);
    Ok(change)
}

/// Removes a record if it is there; the inode is written by the caller. `None` if it was not there.
///
/// # Errors
/// `NoSpace`, those of the disk, `Corrupt`.
pub async fn remove<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode, record: Parent) -> Result<Option<Change>> {
    let mut change = Change::default();
    if let Some(index) = inode.parents.iter().position(|r| *r == record) {
        inode.parents.swap_remove(index);
        inode.links = inode.links.saturating_sub(1);
        return Ok(Some(change));
    }
    for index in 0..inode.overflow.len() {
        let old = BlockNo::unpack(inode.overflow[index]);
        let mut records = overflow(tx.source(), inode, old).await?;
        let Some(at) = records.iter().position(|r| *r == record) else {
            continue;
        };
        records.swap_remove(at);
        if records.is_empty() {
            inode.overflow.remove(index);
            inode.blocks = inode.blocks.saturating_sub(1);
        } else {
            let (block, after) = write_overflow(tx, inode, &records).await?;
            inode.overflow[index] = block;
            change.after.push(after);
        }
        change.free.push(old);
        inode.links = inode.links.saturating_sub(1);
        return Ok(Some(change));
    }
    Ok(None)
}
