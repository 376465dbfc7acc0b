//! The B+tree of directories and of files' extents: `u64` keys, short values, the root in the inode's body.
//!
//! Invariants:
//! - A leaf's newest version is never durable before the path that leads to it. So to come after an entry it is enough to
//!   come after its leaf. (Each structural change writes the changed nodes once more after the pointers to them.)
//! - A split is durable in the order: the new right node, the parent's pointer, the trimmed left node. What a node holds
//!   outside the range that its parent gives it is ignored.
//! - A node that moves entries comes after the node that they were in: what had to be durable before an entry stays so.
//! - A node's block is freed after nothing durable points to it. The range of a removed node goes to its right sibling, or,
//!   if it was its parent's last, to its left one, whose stale entries (and those of the nodes at its right edge) are trimmed
//!   before.
//! - `aux` never shrinks for any key: a removed node's goes to the root before the node is unlinked, and the root's counts
//!   for all nodes.
//!
//! Excludes: meaning of keys and values; tokens (the caller holds the inode's, exclusively for changes).

mod node;

pub use node::{Node, VALUE_MAX};

use crate::error::{FsError, Result};
use crate::format::{BODY_LEN, NODE_AT, NODE_LEN, check_header, get_u64, magic, put_header, put_u64};
use crate::inode::{Body, Inode};
use crate::transaction::{Source, Transaction};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo};
use sld::{After, Disk, Kind, Tag, WriteId};

/// The most levels that are followed; more means a cycle of damaged pointers. 4 levels hold 10⁸ extents.
const LEVELS_MAX: usize = 12;

/// The most nodes of a tree that are believed.
const BLOCKS_MAX: usize = 1 << 26;

/// Bytes of an inner node's value.
const POINTER_LEN: usize = 8;

/// A node on the path from the root to a leaf.
#[derive(Clone, Debug)]
struct Step {
    /// `None` for the root.
    block: Option<BlockNo>,
    node: Node,
    /// Position in the parent.
    index: usize,
    /// The range that the parents give it; `None`: without end.
    low: u64,
    high: Option<u64>,
}

/// A leaf with the range of keys that it answers for.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Its block: the inode's own if the leaf is the root.
    pub block: BlockNo,
    /// Its contents, without what is outside its range.
    pub node: Node,
    /// Lowest key.
    pub low: u64,
    /// The first key that is not its own; `None`: without end.
    pub high: Option<u64>,
}

fn kind_of(inode: &Inode) -> Kind {
    if inode.is_directory() { Kind::Directory } else { Kind::Extents }
}

/// Reads a node from its block.
///
/// # Errors
/// `Corrupt` if it is not a node of this inode.
pub fn decode_block(bytes: &Bytes, block: BlockNo, inode: &Inode) -> Result<Node> {
    check_header(bytes, magic::TREE, block)?;
    if get_u64(bytes, 16) != inode.ino.0 || get_u64(bytes, 24) != inode.generation {
        return Err(FsError::corrupt(block, "the tree node belongs to another inode"));
    }
    Node::decode(bytes.slice(NODE_AT..BLOCK_SIZE)).ok_or(FsError::corrupt(block, "the tree node is damaged"))
}

fn encode_block(node: &Node, block: BlockNo, inode: &Inode, low: u64) -> Bytes {
    let mut bytes = vec![0; BLOCK_SIZE];
    put_header(&mut bytes, magic::TREE, kind_of(inode), block);
    put_u64(&mut bytes, 16, inode.ino.0);
    put_u64(&mut bytes, 24, inode.generation);
    put_u64(&mut bytes, 32, low);
    bytes[NODE_AT..].copy_from_slice(node.bytes());
    Bytes::from(bytes)
}

fn child_of(node: &Node, index: usize, at: BlockNo) -> Result<BlockNo> {
    let value = node.value(index).filter(|v| v.len() == POINTER_LEN).ok_or(FsError::corrupt(at, "damaged pointer in a tree"))?;
    Ok(BlockNo::unpack(get_u64(&value, 0)))
}

async fn descend<D: Disk>(source: Source<'_, D>, inode: &Inode, key: u64) -> Result<Vec<Step>> {
    let mut path = vec![Step { block: None, node: inode.root()?.clone(), index: 0, low: 0, high: None }];
    loop {
        let last = &path[path.len() - 1];
        let at = last.block.unwrap_or(inode.ino.block());
        let level = last.node.level();
        if level == 0 {
            return Ok(path);
        }
        if path.len() > LEVELS_MAX || last.node.is_empty() {
            return Err(FsError::corrupt(at, "the tree's inner nodes make no sense"));
        }
        let index = last.node.search(key).unwrap_or_else(|i| i.saturating_sub(1));
        let low = if index == 0 { last.low } else { last.node.key(index) };
        let next = (index + 1 < last.node.len()).then(|| last.node.key(index + 1));
        let high = match (next, last.high) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let block = child_of(&last.node, index, at)?;
        let mut node = decode_block(&source.read(inode.object(), block).await?, block, inode)?;
        if node.level() + 1 != level {
            return Err(FsError::corrupt(block, "a tree node at the wrong level"));
        }
        if let Some(high) = high {
            node.truncate(high);
        }
        path.push(Step { block: Some(block), node, index, low, high });
    }
}

/// The leaf that answers for a key.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn leaf<D: Disk>(source: Source<'_, D>, inode: &Inode, key: u64) -> Result<Leaf> {
    let mut path = descend(source, inode, key).await?;
    let step = path.pop().ok_or(FsError::corrupt(inode.ino.block(), "no root"))?;
    Ok(Leaf { block: step.block.unwrap_or(inode.ino.block()), node: step.node, low: step.low, high: step.high })
}

/// A key's value.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn get<D: Disk>(source: Source<'_, D>, inode: &Inode, key: u64) -> Result<Option<Bytes>> {
    let leaf = leaf(source, inode, key).await?;
    let Ok(index) = leaf.node.search(key) else {
        return Ok(None);
    };
    leaf.node.value(index).map(Some).ok_or(FsError::corrupt(leaf.block, "damaged slot in a tree"))
}

/// The entry with the greatest key that is at most `key`.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn floor<D: Disk>(source: Source<'_, D>, inode: &Inode, key: u64) -> Result<Option<(u64, Bytes)>> {
    let mut key = key;
    loop {
        let leaf = leaf(source, inode, key).await?;
        let index = leaf.node.search(key).map_or_else(|i| i, |i| i + 1);
        if index > 0 && leaf.node.key(index - 1) >= leaf.low {
            let value = leaf.node.value(index - 1).ok_or(FsError::corrupt(leaf.block, "damaged slot in a tree"))?;
            return Ok(Some((leaf.node.key(index - 1), value)));
        }
        if leaf.low == 0 {
            return Ok(None);
        }
        key = leaf.low - 1;
    }
}

/// Up to `max` entries from `from` on, in the order of keys. Fewer only at the end of the tree.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn range<D: Disk>(source: Source<'_, D>, inode: &Inode, from: u64, max: usize) -> Result<Vec<(u64, Bytes)>> {
    let mut found = Vec::new();
    let mut from = from;
    loop {
        let leaf = leaf(source, inode, from).await?;
        let start = leaf.node.search(from).unwrap_or_else(|i| i);
        for index in start..leaf.node.len() {
            let key = leaf.node.key(index);
            if found.len() == max {
                return Ok(found);
            }
            found.push((key, leaf.node.value(index).ok_or(FsError::corrupt(leaf.block, "damaged slot in a tree"))?));
        }
        match leaf.high {
            Some(high) if found.len() < max && high > from => from = high,
            _ => return Ok(found),
        }
    }
}

/// Whether a block is a node on the way to a key.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn is_on_path<D: Disk>(source: Source<'_, D>, inode: &Inode, key: u64, block: BlockNo) -> Result<bool> {
    Ok(descend(source, inode, key).await?.iter().any(|step| step.block == Some(block)))
}

/// All blocks of the tree beside the root, children before their parents; at most about `max` (the walk stops there).
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn blocks<D: Disk>(source: Source<'_, D>, inode: &Inode, max: usize) -> Result<Vec<BlockNo>> {
    let mut found = Vec::new();
    let mut pending = vec![(inode.ino.block(), inode.root()?.clone())];
    while let Some((at, node)) = pending.pop() {
        if node.level() == 0 || found.len() > max {
            continue;
        }
        if found.len() > BLOCKS_MAX {
            return Err(FsError::corrupt(at, "the tree has more nodes than a tree can have"));
        }
        for index in 0..node.len() {
            let block = child_of(&node, index, at)?;
            found.push(block);
            if node.level() > 1 {
                let mut child = decode_block(&source.read(inode.object(), block).await?, block, inode)?;
                if child.level() + 1 != node.level() {
                    return Err(FsError::corrupt(block, "a tree node at the wrong level"));
                }
                // Pointers outside the range (of a split that was cut short) belong to the next node.
                if index + 1 < node.len() {
                    child.truncate(node.key(index + 1));
                }
                pending.push((block, child));
            }
        }
    }
    found.reverse();
    Ok(found)
}

/// Writes a node: the root as part of the inode, others to their blocks. Always after `after`.
fn write_node<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode, step: &Step, after: &[After]) -> WriteId {
    match step.block {
        None => {
            inode.body = Body::Tree(step.node.clone());
            inode.write(tx, after)
        }
        Some(block) => {
            let tag = Tag { kind: kind_of(inode), owner: inode.ino.0, offset: step.low, birth: tx.disk().cycle() };
            tx.write(inode.object(), block, encode_block(&step.node, block, inode, step.low), tag, after)
        }
    }
}

async fn alloc_node<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode) -> Result<BlockNo> {
    let extent = tx.alloc(Some(inode.ino.block()), 1).await?;
    inode.blocks += 1;
    Ok(extent.start)
}

/// Sets a key's value; `aux` is made at least `aux_min` in its leaf, in the same write. The new value is durable after
/// `after` (so are nodes that are split for it). Returns the write that makes it durable.
///
/// # Errors
/// `NoSpace`, those of the disk, `Corrupt`. `inode` may have been changed then, and must not be written.
pub async fn insert<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    key: u64,
    value: &[u8],
    aux_min: u64,
    after: &[After],
) -> Result<WriteId> {
    if value.len() > VALUE_MAX {
        return Err(FsError::NoSpace);
    }
    loop {
        let mut path = descend(tx.source(), inode, key).await?;
        let last = path.len() - 1;
        let leaf = &mut path[last];
        if leaf.node.fits(key, value.len()) {
            leaf.node.insert(key, value);
            if leaf.node.aux() < aux_min {
                leaf.node.set_aux(aux_min);
            }
            return Ok(write_node(tx, inode, &path[last], after));
        }
        // Split the highest node that has to be, where its parent has room; then look again.
        let mut at = last;
        while at > 0 && !path[at - 1].node.fits(path[at].node.key(path[at].node.middle()), POINTER_LEN) {
            at -= 1;
        }
        if at == 0 {
            grow(tx, inode, after).await?;
        } else {
            split(tx, inode, &mut path, at, key, after).await?;
        }
    }
}

/// Moves the root's contents into a new child.
async fn grow<D: Disk>(tx: &mut Transaction<'_, D>, inode: &mut Inode, after: &[After]) -> Result<()> {
    let root = inode.root()?.clone();
    if root.level() as usize >= LEVELS_MAX {
        return Err(FsError::NoSpace);
    }
    let block = alloc_node(tx, inode).await?;
    let child = Step { block: Some(block), node: root.resized(NODE_LEN), index: 0, low: 0, high: None };
    // What the entries came after needs no edge: they are found in the child only by way of the inode's next version.
    let first = write_node(tx, inode, &child, after);
    let mut node = Node::empty(root.level() + 1, BODY_LEN);
    node.set_aux(root.aux());
    node.insert(0, &block.pack().to_le_bytes());
    let mut edges = after.to_vec();
    edges.push(After::Write(first));
    let pointer = write_node(tx, inode, &Step { block: None, node, index: 0, low: 0, high: None }, &edges);
    // Once more, so that the child's newest version implies the pointer to it.
    write_node(tx, inode, &child, &[After::Write(pointer)]);
    Ok(())
}

/// Splits a node whose parent has room for another pointer. The half that `key` belongs to is written last.
async fn split<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    path: &mut [Step],
    at: usize,
    key: u64,
    after: &[After],
) -> Result<()> {
    let left_block = path[at].block.ok_or(FsError::corrupt(inode.ino.block(), "the root has no parent"))?;
    let node = path[at].node.clone();
    if node.len() < 2 {
        return Err(FsError::corrupt(left_block, "a tree node is full with one key"));
    }
    let middle = node.middle();
    let separator = node.key(middle);
    let block = alloc_node(tx, inode).await?;
    let right =
        Step { block: Some(block), node: node.part(middle, node.len(), NODE_LEN), index: 0, low: separator, high: path[at].high };
    // What the entries came after, the left node's present version did, too.
    let mut edges = after.to_vec();
    edges.push(tx.after_block(left_block));
    let first = write_node(tx, inode, &right, &edges);
    edges = after.to_vec();
    edges.push(After::Write(first));
    let parent = &mut path[at - 1];
    // The first slot may have taken over a range below its key; a separator may be lower than that.
    if let (Some(first), key) = (parent.node.value(0), parent.node.key(0))
        && key != parent.low
    {
        parent.node.remove(key);
        parent.node.insert(parent.low, &first);
    }
    parent.node.insert(separator, &block.pack().to_le_bytes());
    let pointer = [After::Write(write_node(tx, inode, &path[at - 1], &edges))];
    path[at].node = node.part(0, middle, NODE_LEN);
    if key >= separator {
        write_node(tx, inode, &path[at], &pointer);
        write_node(tx, inode, &right, &pointer);
    } else {
        write_node(tx, inode, &right, &pointer);
        write_node(tx, inode, &path[at], &pointer);
    }
    Ok(())
}

/// Removes a key; `None` if it is not there. The removal is durable after `after`. Returns the write that makes it durable.
///
/// # Errors
/// Those of the disk; `Corrupt`.
pub async fn remove<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    key: u64,
    after: &[After],
) -> Result<Option<WriteId>> {
    let mut path = descend(tx.source(), inode, key).await?;
    let last = path.len() - 1;
    if !path[last].node.remove(key) {
        return Ok(None);
    }
    if last == 0 || !path[last].node.is_empty() {
        return Ok(Some(write_node(tx, inode, &path[last], after)));
    }
    // The leaf is empty. It goes, and with it the inner nodes that have no other child.
    let mut edges = after.to_vec();
    // What the leaf's own versions came after (entries that moved elsewhere, removals) must hold without it, too.
    let leaf_block = path[last].block.ok_or(FsError::corrupt(inode.ino.block(), "no leaf"))?;
    edges.push(tx.after_block(leaf_block));
    let mut top = last;
    while top > 1 && path[top - 1].node.len() == 1 {
        top -= 1;
    }
    let aux = path[last].node.aux();
    let mut heir = None;
    if top == 1 && path[0].node.len() == 1 {
        let mut node = Node::empty(0, BODY_LEN);
        node.set_aux(aux.max(path[0].node.aux()));
        path[0].node = node;
    } else {
        if aux > path[0].node.aux() {
            // The counter must survive the leaf: first of all.
            let mut root = inode.root()?.clone();
            root.set_aux(aux);
            path[0].node.set_aux(aux);
            inode.body = Body::Tree(root);
            edges.push(After::Write(inode.write(tx, after)));
        }
        let index = path[top].index;
        let parent_len = path[top - 1].node.len();
        if index + 1 < parent_len {
            // The right sibling takes over the range.
            let low = path[top - 1].node.key(index);
            let next = path[top - 1].node.key(index + 1);
            let pointer = path[top - 1].node.value(index + 1).ok_or(FsError::corrupt(leaf_block, "damaged parent"))?;
            heir = Some((child_of(&path[top - 1].node, index + 1, leaf_block)?, Edge::Left));
            path[top - 1].node.remove(next);
            path[top - 1].node.insert(low, &pointer);
        } else {
            heir = Some((trim_left(tx, inode, &path, top, &mut edges).await?, Edge::Right));
            let low = path[top - 1].node.key(index);
            path[top - 1].node.remove(low);
        }
    }
    let unlinked = write_node(tx, inode, &path[top - 1], &edges);
    if let Some((block, edge)) = heir {
        rewrite_edge(tx, inode, block, edge, unlinked).await?;
    }
    let freed: Vec<BlockNo> = path[top..].iter().filter_map(|step| step.block).collect();
    for block in freed {
        tx.free(inode.object(), block, &[After::Write(unlinked)]);
        inode.blocks = inode.blocks.saturating_sub(1);
    }
    Ok(Some(unlinked))
}

/// Which end of a node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Edge {
    Left,
    Right,
}

/// Writes the nodes at the edge of a subtree, whose range has grown, once more: their newest versions then imply the
/// parent's that made it grow, so what is put into the new range is not durable before it can be found.
async fn rewrite_edge<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    block: BlockNo,
    edge: Edge,
    after: WriteId,
) -> Result<()> {
    let mut block = block;
    loop {
        let bytes = tx.source().read(inode.object(), block).await?;
        let node = decode_block(&bytes, block, inode)?;
        let tag = Tag { kind: kind_of(inode), owner: inode.ino.0, offset: get_u64(&bytes, 32), birth: tx.disk().cycle() };
        tx.write(inode.object(), block, bytes, tag, &[After::Write(after)]);
        if node.level() == 0 || node.is_empty() {
            return Ok(());
        }
        block = child_of(&node, if edge == Edge::Left { 0 } else { node.len() - 1 }, block)?;
    }
}

/// Before the left sibling of `path[at]` takes over its range: drops what the sibling, and the nodes at its right edge,
/// hold beyond their present range. Without this a crash in the middle of an old split would bring old entries back.
async fn trim_left<D: Disk>(
    tx: &mut Transaction<'_, D>,
    inode: &mut Inode,
    path: &[Step],
    at: usize,
    edges: &mut Vec<After>,
) -> Result<BlockNo> {
    let parent = &path[at - 1];
    let parent_block = parent.block.unwrap_or(inode.ino.block());
    let high = path[at].low;
    let Some(mut index) = path[at].index.checked_sub(1) else {
        return Err(FsError::corrupt(parent_block, "no sibling"));
    };
    let mut node = parent.node.clone();
    let mut low = parent.low;
    let mut above = parent_block;
    let sibling = child_of(&node, index, parent_block)?;
    loop {
        let block = child_of(&node, index, above)?;
        low = low.max(node.key(index));
        let child = decode_block(&tx.source().read(inode.object(), block).await?, block, inode)?;
        if child.level() + 1 != node.level() {
            return Err(FsError::corrupt(block, "a tree node at the wrong level"));
        }
        let mut trimmed = child.clone();
        if trimmed.truncate(high) {
            let step = Step { block: Some(block), node: trimmed.clone(), index, low, high: Some(high) };
            edges.push(After::Write(write_node(tx, inode, &step, &[])));
        } else {
            // A trim that was made before may not be durable yet.
            edges.push(tx.after_block(block));
        }
        if trimmed.level() == 0 || trimmed.is_empty() {
            return Ok(sibling);
        }
        index = trimmed.len() - 1;
        node = trimmed;
        above = block;
    }
}

#[cfg(test)]
mod tests;
