//! Extended attributes: small ones in the inode's tail, the others in a chain of blocks (layout in `format`).
//!
//! The chain is replaced as a whole and never changed in place, so that writing the inode is the one commit point. Inline and
//! in the chain the attributes are a stream of records: `u8` name length, `u32` value length, name, value. A block of the
//! chain holds a part of the stream: `u32` length of the part, `u32` 0, the part.
//!
//! POSIX ACLs are attributes, too; setting one sets the mode (`acl`).
//!
//! Excludes: who may set what (the kernel checks).

use super::data::later;
use crate::acl::{self, Acl};
use crate::format::{
    ATTRIBUTE_BLOCKS_MAX, ATTRIBUTES_AT, ATTRIBUTES_INLINE_MAX, ATTRIBUTES_NEXT_AT, NAME_MAX, check_header, get_u32, get_u64,
    magic, put_header, put_u32, put_u64,
};
use crate::inode::{FileKind, HAS_ACCESS_ACL, HAS_CAPABILITY, HAS_DEFAULT_ACL, Inode};
use crate::transaction::{Source, Transaction};
use crate::{FileSystem, FsError, Ino, Result};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo};
use nix::libc;
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
    /// Both, and so nothing will do. Which one is missed first is as on other file systems.
    Both,
}

type Attributes = BTreeMap<Vec<u8>, Bytes>;

/// Says, from what an inode is with its token in hand, whether its access control lists may be changed, and whether that costs
/// set-group-id.
pub type PermitList<'a> = &'a (dyn Fn(&crate::Attributes) -> Result<bool> + Sync);

/// The capabilities that a program gets. They are taken away by whoever changes the file (`Inode::flags` says whether there
/// are any).
const CAPABILITY: &[u8] = b"security.capability";

fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(FsError::Range);
    }
    if name == acl::ACCESS || name == acl::DEFAULT {
        return Ok(());
    }
    match NAMESPACES.iter().find(|space| name.starts_with(space)) {
        Some(space) if name.len() > space.len() => Ok(()),
        Some(_) => Err(FsError::Invalid("an attribute without a name")),
        None => Err(FsError::NotSupported),
    }
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
        let attributes = self.again(|| self.xattrs(ino)).await?;
        attributes.get(name).map(|value| value.to_vec()).ok_or(FsError::NoData)
    }

    /// The names of all attributes, each followed by a zero byte; those that only the administrator may see if `privileged`.
    ///
    /// # Errors
    /// `Stale`, `Corrupt`, those of the disk.
    pub async fn list_xattr(&self, ino: Ino, privileged: bool) -> Result<Vec<u8>> {
        let attributes = self.again(|| self.xattrs(ino)).await?;
        let names = attributes.keys().filter(|name| privileged || !name.starts_with(b"trusted."));
        Ok(names.flat_map(|name| name.iter().copied().chain(std::iter::once(0))).collect())
    }

    async fn xattrs(&self, ino: Ino) -> Result<Attributes> {
        let _tokens = self.tokens(&[(ino.object(), Mode::Shared)]).await?;
        let inode = self.load(Source::disk(self.disk()), ino).await?;
        all(Source::disk(self.disk()), &inode).await
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// `Exists` or `NoData` if `mode` expects otherwise; `TooBig` for a long value; `NoSpace` also if there are too many;
    /// and those of `get_xattr`.
    pub async fn set_xattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: SetMode) -> Result<()> {
        self.set_xattr_if(ino, name, value, mode, &|_| Ok(false)).await
    }

    /// Sets an attribute, if it is permitted; an access list may cost set-group-id.
    ///
    /// # Errors
    /// Those of the permit and of `set_xattr`.
    pub async fn set_xattr_if(&self, ino: Ino, name: &[u8], value: &[u8], mode: SetMode, permit: PermitList<'_>) -> Result<()> {
        check_name(name)?;
        if value.len() > VALUE_MAX {
            return Err(FsError::TooBig);
        }
        let change = |inode: &mut Inode, attributes: &mut Attributes| {
            match (mode, attributes.contains_key(name)) {
                (SetMode::Create | SetMode::Both, true) => return Err(FsError::Exists),
                (SetMode::Replace | SetMode::Both, false) => return Err(FsError::NoData),
                _ => {}
            }
            if name == acl::ACCESS || name == acl::DEFAULT {
                let loses_group = permit(&inode.attributes())?;
                set_acl(inode, attributes, name, value)?;
                if name == acl::ACCESS && loses_group {
                    inode.mode &= !libc::S_ISGID;
                }
                return Ok(());
            }
            attributes.insert(name.to_vec(), Bytes::copy_from_slice(value));
            Ok(())
        };
        self.again(|| self.change_xattrs(ino, change)).await
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// Those of `get_xattr`.
    pub async fn remove_xattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        self.remove_xattr_if(ino, name, &|_| Ok(false)).await
    }

    /// Removes an attribute, if it is permitted.
    ///
    /// # Errors
    /// Those of the permit and of `remove_xattr`.
    pub async fn remove_xattr_if(&self, ino: Ino, name: &[u8], permit: PermitList<'_>) -> Result<()> {
        check_name(name)?;
        let is_acl = name == acl::ACCESS || name == acl::DEFAULT;
        let change = |inode: &mut Inode, attributes: &mut Attributes| {
            if is_acl {
                permit(&inode.attributes())?;
            }
            match attributes.remove(name) {
                // A list that is not there says what the mode says, and may be taken away as often as one likes.
                None if !is_acl => Err(FsError::NoData),
                _ => Ok(()),
            }
        };
        self.again(|| self.change_xattrs(ino, change)).await
    }

    async fn change_xattrs(&self, ino: Ino, change: impl FnOnce(&mut Inode, &mut Attributes) -> Result<()>) -> Result<()> {
        self.disk().admit().await?;
        let _tokens = self.tokens(&[(ino.object(), Mode::Exclusive)]).await?;
        let mut inode = self.load(Source::disk(self.disk()), ino).await?;
        let mut tx = Transaction::new(self.disk());
        let changed = change_attributes(&mut tx, &mut inode, change).await?;
        inode.ctime = later(self.now(), inode.ctime);
        changed.write(&mut tx, &inode);
        tx.commit()
    }
}

/// A change of an inode's attributes: what the inode comes after, and what is freed after it.
#[derive(Default)]
pub(super) struct Changed {
    pub(super) after: Vec<After>,
    free: Vec<BlockNo>,
}

impl Changed {
    /// Writes the inode, whose attributes this was about.
    fn write<D: Disk>(self, tx: &mut Transaction<'_, D>, inode: &Inode) {
        let written = inode.write(tx, &self.after);
        self.free(tx, inode, After::Write(written));
    }

    /// Frees what the inode, which is written, no longer has.
    pub(super) fn free<D: Disk>(self, tx: &mut Transaction<'_, D>, inode: &Inode, written: After) {
        for block in self.free {
            tx.free(inode.object(), block, &[written]);
        }
    }
}

/// Changes the attributes of an inode, which is still to be written.
async fn change_attributes<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    change: impl FnOnce(&mut Inode, &mut Attributes) -> Result<()>,
) -> Result<Changed> {
    let mut attributes = all(tx.source(), inode).await?;
    change(inode, &mut attributes)?;
    let has = |name: &[u8]| attributes.contains_key(name);
    inode.flags &= !(HAS_CAPABILITY | HAS_ACCESS_ACL | HAS_DEFAULT_ACL);
    for (name, flag) in [(CAPABILITY, HAS_CAPABILITY), (acl::ACCESS, HAS_ACCESS_ACL), (acl::DEFAULT, HAS_DEFAULT_ACL)] {
        inode.flags |= if has(name) { flag } else { 0 };
    }
    let (inline, stream) = place(&attributes);
    if stream.len() > ATTRIBUTE_BLOCKS_MAX * STREAM_LEN {
        return Err(FsError::NoSpace);
    }
    let (old_blocks, old_stream) = chain(tx.source(), inode).await?;
    inode.attributes_inline = Bytes::from(inline);
    if stream == old_stream {
        return Ok(Changed::default());
    }
    let (first, after) = write_chain(tx, inode, &stream).await?;
    inode.attribute_block = first;
    inode.blocks = inode.blocks.saturating_sub(old_blocks.len() as u64);
    Ok(Changed { after, free: old_blocks })
}

/// Sets a list: the mode follows, and a list that says no more than the mode is not kept.
fn set_acl(inode: &mut Inode, attributes: &mut Attributes, name: &[u8], value: &[u8]) -> Result<()> {
    let is_default = name == acl::DEFAULT;
    let list = Acl::decode(value)?;
    match inode.kind() {
        FileKind::Symlink => return Err(FsError::NotSupported),
        FileKind::Directory => {}
        _ if is_default && list.is_some() => return Err(FsError::AccessDenied),
        _ => {}
    }
    if !is_default && let Some(list) = &list {
        inode.mode = list.mode(inode.mode);
    }
    match list.filter(|list| is_default || !list.is_mode()) {
        Some(list) => attributes.insert(name.to_vec(), Bytes::from(list.encode())),
        None => attributes.remove(name),
    };
    Ok(())
}

fn list_of(attributes: &Attributes, name: &[u8]) -> Result<Option<Acl>> {
    attributes.get(name).map_or(Ok(None), |bytes| Acl::decode(bytes))
}

/// The mode of an inode, which is still to be written, was set: its access list follows.
pub(super) async fn follow_mode<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode) -> Result<Changed> {
    if inode.flags & HAS_ACCESS_ACL == 0 {
        return Ok(Changed::default());
    }
    change_attributes(tx, inode, |inode, attributes| {
        if let Some(list) = list_of(attributes, acl::ACCESS)? {
            attributes.insert(acl::ACCESS.to_vec(), Bytes::from(list.with_mode(inode.mode).encode()));
        }
        Ok(())
    })
    .await
}

/// Gives a new inode, which is still to be written, what its directory's default list says; without one `umask` takes bits
/// from its mode.
pub(super) async fn inherit<D: Disk>(tx: &mut Transaction<'_, D>, dir: &Inode, inode: &mut Inode, umask: u32) -> Result<Changed> {
    if inode.kind() == FileKind::Symlink {
        return Ok(Changed::default());
    }
    let default = match dir.flags & HAS_DEFAULT_ACL {
        0 => None,
        _ => list_of(&all(tx.source(), dir).await?, acl::DEFAULT)?,
    };
    let Some(default) = default else {
        inode.mode &= !(umask & 0o777);
        return Ok(Changed::default());
    };
    let (mode, list) = default.inherit(inode.mode);
    inode.mode = mode;
    change_attributes(tx, inode, |inode, attributes| {
        if let Some(list) = list {
            attributes.insert(acl::ACCESS.to_vec(), Bytes::from(list.encode()));
        }
        if inode.is_directory() {
            attributes.insert(acl::DEFAULT.to_vec(), Bytes::from(default.encode()));
        }
        Ok(())
    })
    .await
}

/// Takes away a program's capabilities, since its inode, which is still to be written, changes.
pub(super) async fn drop_capability<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode) -> Result<Changed> {
    if inode.flags & HAS_CAPABILITY == 0 {
        return Ok(Changed::default());
    }
    change_attributes(tx, inode, |_, attributes| {
        attributes.remove(CAPABILITY);
        Ok(())
    })
    .await
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
        assert!(matches!(check_name(b"user."), Err(FsError::Invalid(_))), "as on ext4");
        assert_eq!(check_name(b"user"), Err(FsError::NotSupported));
        assert!(check_name(acl::ACCESS).is_ok());
        assert_eq!(check_name(b"system.other"), Err(FsError::NotSupported));
    }
}
