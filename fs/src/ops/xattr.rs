//! Extended attributes: small ones in the inode's tail, the others in a chain of blocks (layout in `format`).
//!
//! The chain is replaced as a whole and never changed in place, so that writing the inode is the one commit point. Inline and
//! in the chain the attributes are a stream of records: `u8` name length, `u32` value length, name, value. A block of the
//! chain holds a part of the stream: `u32` length of the part, `u32` 0, the part.
//!
//! Excludes: POSIX ACLs (`NotSupported`); who may set what (the kernel checks).

use super::data::later;
use crate::format::{
    ATTRIBUTE_BLOCKS_MAX, ATTRIBUTES_AT, ATTRIBUTES_INLINE_MAX, ATTRIBUTES_NEXT_AT, NAME_MAX, check_header, get_u32, get_u64,
    magic, put_header, put_u32, put_u64,
};
use crate::inode::Inode;
use crate::transaction::{Source, Transaction};
use crate::{FileSystem, FsError, Ino, Result};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo};
use sld::{After, Disk, Kind, Mode, Tag};
use std::collections::BTreeMap;

/// The longest value.
pub const VALUE_MAX: usize = 64 * 1024;
/// Where a block's part of the stream begins, and how long it is at most.
const STREAM_AT: usize = ATTRIBUTES_AT + 8;
const STREAM_LEN: usize = BLOCK_SIZE - STREAM_AT;
/// Bytes of a record beside name and value.
const RECORD_HEAD: usize = 5;

/// Which namespaces are kept.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

/// What `set_xattr` expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetMode {
    /// Nothing.
    Any,
    /// That there is none of this name.
    Create,
    /// That there is one of this name.
    Replace,
}

type Attributes = BTreeMap<Vec<u8>, Bytes>;

fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(FsError::Range);
    }
    if NAMESPACES.iter().any(|n| name.starts_with(n) && name.len() > n.len()) { Ok(()) } else { Err(FsError::NotSupported) }
}

fn parse(mut stream: Bytes, at: BlockNo, into: &mut Attributes) -> Result<()> {
    let bad = || FsError::corrupt(at, "damaged extended attributes");
    while !stream.is_empty() {
        if stream.len() < RECORD_HEAD {
            return Err(bad());
        }
        let (name_len, value_len) = (usize::from(stream[0]), get_u32(&stream, 1) as usize);
        if value_len > VALUE_MAX || stream.len() < RECORD_HEAD + name_len + value_len {
            return Err(bad());
        }
        let name = stream.slice(RECORD_HEAD..RECORD_HEAD + name_len).to_vec();
        into.insert(name, stream.slice(RECORD_HEAD + name_len..RECORD_HEAD + name_len + value_len));
        stream = stream.slice(RECORD_HEAD + name_len + value_len..);
    }
    Ok(())
}

fn encode(name: &[u8], value: &[u8], into: &mut Vec<u8>) {
    into.push(name.len() as u8);
    into.extend_from_slice(&(value.len() as u32).to_le_bytes());
    into.extend_from_slice(name);
    into.extend_from_slice(value);
}

/// The blocks of the inode's chain, and the stream in them.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn chain<D: Disk>(source: Source<'_, D>, inode: &Inode) -> Result<(Vec<BlockNo>, Bytes)> {
    let (mut blocks, mut stream) = (Vec::new(), Vec::new());
    let mut next = inode.attribute_block;
    while next != 0 {
        let block = BlockNo::unpack(next);
        if blocks.len() == ATTRIBUTE_BLOCKS_MAX {
            return Err(FsError::corrupt(block, "the chain of extended attributes has no end"));
        }
        let bytes = source.read(inode.object(), block).await?;
        check_header(&bytes, magic::ATTRIBUTES, block)?;
        let len = get_u32(&bytes, ATTRIBUTES_AT) as usize;
        if get_u64(&bytes, 16) != inode.ino.0 || get_u64(&bytes, 24) != inode.generation || len > STREAM_LEN {
            return Err(FsError::corrupt(block, "extended attributes of another inode"));
        }
        stream.extend_from_slice(&bytes[STREAM_AT..STREAM_AT + len]);
        blocks.push(block);
        next = get_u64(&bytes, ATTRIBUTES_NEXT_AT);
    }
    Ok((blocks, Bytes::from(stream)))
}

async fn all<D: Disk>(source: Source<'_, D>, inode: &Inode) -> Result<Attributes> {
    let mut attributes = Attributes::new();
    parse(inode.attributes_inline.clone(), inode.ino.block(), &mut attributes)?;
    if inode.attribute_block != 0 {
        let (_, stream) = chain(source, inode).await?;
        parse(stream, BlockNo::unpack(inode.attribute_block), &mut attributes)?;
    }
    Ok(attributes)
}

/// What stays in the inode (the smallest ones, as many as fit) and what goes to the chain.
fn place(attributes: &Attributes) -> (Vec<u8>, Vec<u8>) {
    let mut order: Vec<(&Vec<u8>, &Bytes)> = attributes.iter().collect();
    order.sort_by_key(|(name, value)| name.len() + value.len());
    let (mut inline, mut stream) = (Vec::new(), Vec::new());
    for (name, value) in order {
        let fits = inline.len() + RECORD_HEAD + name.len() + value.len() <= ATTRIBUTES_INLINE_MAX;
        encode(name, value, if fits && stream.is_empty() { &mut inline } else { &mut stream });
    }
    (inline, stream)
}

/// Writes a new chain, from its end to its beginning. Returns its first block and the edges to it.
async fn write_chain<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode, stream: &[u8]) -> Result<(u64, Vec<After>)> {
    let (mut next, mut after) = (0, Vec::new());
    for part in stream.chunks(STREAM_LEN).rev() {
        let block = tx.alloc(Some(inode.ino.block()), 1).await?.start;
        inode.blocks += 1;
        let mut bytes = vec![0; BLOCK_SIZE];
        put_header(&mut bytes, magic::ATTRIBUTES, Kind::Attribute, block);
        put_u64(&mut bytes, 16, inode.ino.0);
        put_u64(&mut bytes, 24, inode.generation);
        put_u64(&mut bytes, ATTRIBUTES_NEXT_AT, next);
        put_u32(&mut bytes, ATTRIBUTES_AT, part.len() as u32);
        bytes[STREAM_AT..STREAM_AT + part.len()].copy_from_slice(part);
        let tag = Tag { kind: Kind::Attribute, owner: inode.ino.0, offset: 0, birth: tx.disk().cycle() };
        after.push(After::Write(tx.write(inode.object(), block, Bytes::from(bytes), tag, &[])));
        next = block.pack();
    }
    Ok((next, after))
}

impl<D: Disk> FileSystem<D> {
    /// An attribute's value.
    ///
    /// # Errors
    /// `NoData` if there is none; `NotSupported` for other namespaces; `Stale`, `Corrupt`, those of the disk.
    pub async fn get_xattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        check_name(name)?;
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let inode = self.load(Source::disk(self.disk()), ino).await?;
        let attributes = all(Source::disk(self.disk()), &inode).await?;
        attributes.get(name).map(|value| value.to_vec()).ok_or(FsError::NoData)
    }

    /// The names of all attributes, each followed by a zero byte; those that only the administrator may see if `privileged`.
    ///
    /// # Errors
    /// `Stale`, `Corrupt`, those of the disk.
    pub async fn list_xattr(&self, ino: Ino, privileged: bool) -> Result<Vec<u8>> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let inode = self.load(Source::disk(self.disk()), ino).await?;
        let attributes = all(Source::disk(self.disk()), &inode).await?;
        let names = attributes.keys().filter(|name| privileged || !name.starts_with(b"trusted."));
        Ok(names.flat_map(|name| name.iter().copied().chain(std::iter::once(0))).collect())
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// `Exists` or `NoData` if `mode` expects otherwise; `TooBig` for a long value; `NoSpace` also if there are too many;
    /// and those of `get_xattr`.
    pub async fn set_xattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: SetMode) -> Result<()> {
        check_name(name)?;
        if value.len() > VALUE_MAX {
            return Err(FsError::TooBig);
        }
        self.change_xattrs(ino, |attributes| {
            match (mode, attributes.contains_key(name)) {
                (SetMode::Create, true) => return Err(FsError::Exists),
                (SetMode::Replace, false) => return Err(FsError::NoData),
                _ => {}
            }
            attributes.insert(name.to_vec(), Bytes::copy_from_slice(value));
            Ok(())
        })
        .await
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// Those of `get_xattr`.
    pub async fn remove_xattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        check_name(name)?;
        self.change_xattrs(ino, |attributes| attributes.remove(name).map(|_| ()).ok_or(FsError::NoData)).await
    }

    async fn change_xattrs(&self, ino: Ino, change: impl FnOnce(&mut Attributes) -> Result<()>) -> Result<()> {
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(ino.object(), Mode::Exclusive)]).await?;
        let mut inode = self.load(Source::disk(self.disk()), ino).await?;
        let mut attributes = all(Source::disk(self.disk()), &inode).await?;
        change(&mut attributes)?;
        let (inline, stream) = place(&attributes);
        if stream.len() > ATTRIBUTE_BLOCKS_MAX * STREAM_LEN {
            return Err(FsError::NoSpace);
        }
        let (old_blocks, old_stream) = chain(Source::disk(self.disk()), &inode).await?;
        let mut tx = Transaction::new(self.disk());
        let mut after = Vec::new();
        let is_moved = stream != old_stream;
        if is_moved {
            (inode.attribute_block, after) = write_chain(&mut tx, &mut inode, &stream).await?;
            inode.blocks = inode.blocks.saturating_sub(old_blocks.len() as u64);
        }
        inode.attributes_inline = Bytes::from(inline);
        inode.ctime = later(self.now(), inode.ctime);
        let written = inode.write(&mut tx, &after);
        if is_moved {
            for block in old_blocks {
                tx.free(inode.object(), block, &[After::Write(written)]);
            }
        }
        tx.commit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::MirrorId;

    #[test]
    fn records_come_back_and_damaged_ones_are_refused() {
        let mut attributes = Attributes::new();
        attributes.insert(b"user.a".to_vec(), Bytes::from_static(b"1"));
        attributes.insert(b"user.big".to_vec(), Bytes::from(vec![7; 5000]));
        attributes.insert(b"security.capability".to_vec(), Bytes::from(vec![9; 20]));
        let (inline, stream) = place(&attributes);
        assert!(inline.len() <= ATTRIBUTES_INLINE_MAX && stream.len() > 5000);
        let block = BlockNo::new(MirrorId(1), 5);
        let mut again = Attributes::new();
        parse(Bytes::from(inline), block, &mut again).unwrap();
        parse(Bytes::from(stream.clone()), block, &mut again).unwrap();
        assert_eq!(again, attributes);
        for len in 1..40 {
            assert!(parse(Bytes::from(stream[..len].to_vec()), block, &mut Attributes::new()).is_err());
        }
    }

    #[test]
    fn only_known_namespaces() {
        assert!(check_name(b"user.x").is_ok());
        assert_eq!(check_name(b"user."), Err(FsError::NotSupported));
        assert_eq!(check_name(b"system.posix_acl_access"), Err(FsError::NotSupported));
    }
}
