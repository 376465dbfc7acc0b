//! Where the mirrors of a new file system lie: cuts free space of disks into equal slots and joins slots of different
//! nodes to mirrors.
//!
//! Invariants: deterministic; every mirror's areas are on disks of different nodes that are up; areas never overlap.
//!
//! Excludes: moving what is laid out already.

use crate::config::Config;
use crate::ids::{DiskId, NodeId};
use std::collections::BTreeMap;

/// A mirror's size is a multiple of this: 64 MiB, the unit in which space is leased to nodes.
pub(crate) const REGION_BLOCKS: u32 = 16_384;
/// A disk is cut into at most this many slots where that is possible: enough to spread a lost node's load over all
/// others, few enough for the configuration to stay small.
const SLOTS_PER_DISK: u64 = 8;
/// The bound for disks much larger than the smallest one.
const SLOTS_PER_DISK_MAX: u64 = 64;

/// A mirror to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Blocks of each copy.
    pub(crate) blocks: u32,
    /// Disk and first block of each copy.
    pub(crate) areas: Vec<(DiskId, u32)>,
}

/// A disk's free space.
#[derive(Clone, Debug)]
struct Free {
    disk: DiskId,
    node: NodeId,
    base: u32,
    regions: u64,
}

/// Lays out a file system; says why not if it cannot be.
pub(crate) fn plan(config: &Config, copies: u8, blocks: Option<u64>) -> Result<Vec<Planned>, String> {
    let copies = usize::from(copies);
    if copies == 0 {
        return Err("a file system needs at least one copy of every block".into());
    }
    let all = free_space(config);
    let with_disks: std::collections::BTreeSet<NodeId> = all.iter().map(|f| f.node).collect();
    if with_disks.len() < copies {
        return Err(format!(
            "{copies} copies need working disks on {copies} nodes that are up, there are {}: add disks with `pulsar disk add`",
            with_disks.len()
        ));
    }
    let wanted = blocks.map(|b| b.div_ceil(u64::from(REGION_BLOCKS)).max(1));
    let free: Vec<Free> = all.into_iter().filter(|f| f.regions > 0).collect();
    let mut best: Option<(u64, u64, Vec<Vec<usize>>)> = None;
    for slot in candidates(&free, copies, wanted) {
        let limit = wanted.map_or(u64::MAX, |w| w.div_ceil(slot));
        let mirrors = join(&free, copies, slot, limit);
        let regions = mirrors.len() as u64 * slot;
        let regions = wanted.map_or(regions, |w| regions.min(w));
        if regions > 0 && best.as_ref().is_none_or(|(most, _, _)| regions > *most) {
            best = Some((regions, slot, mirrors));
        }
    }
    let mib = |regions: u64| regions * u64::from(REGION_BLOCKS) / 256;
    let Some((regions, slot, mirrors)) = best else {
        return Err(format!("too little free space: {copies} copies of at least {} MiB do not fit", mib(1)));
    };
    if let Some(wanted) = wanted
        && regions < wanted
    {
        return Err(format!("too little free space: {} MiB are wanted, {} MiB fit", mib(wanted), mib(regions)));
    }
    let slot_blocks = slot as u32 * REGION_BLOCKS;
    let mut base: Vec<u32> = free.iter().map(|f| f.base).collect();
    let mut place = |at: usize| {
        let area = (free[at].disk, base[at]);
        base[at] += slot_blocks;
        area
    };
    Ok(mirrors.into_iter().map(|on| Planned { blocks: slot_blocks, areas: on.into_iter().map(&mut place).collect() }).collect())
}

/// What is free behind the last area of each usable disk.
fn free_space(config: &Config) -> Vec<Free> {
    let mut ends: BTreeMap<DiskId, u32> = BTreeMap::new();
    for mirror in config.mirrors.values() {
        for member in &mirror.members {
            let end = ends.entry(member.disk).or_default();
            *end = (*end).max(member.base.saturating_add(mirror.blocks));
        }
    }
    let usable = config.disks.iter().filter(|(_, d)| !d.faulted && config.nodes.get(&d.node).is_some_and(|n| n.up));
    usable
        .map(|(id, d)| {
            let base = ends.get(id).copied().unwrap_or(0);
            Free { disk: *id, node: d.node, base, regions: u64::from(d.blocks.saturating_sub(base) / REGION_BLOCKS) }
        })
        .collect()
}

/// Slot sizes (in regions) worth trying, the preferred one first.
fn candidates(free: &[Free], copies: usize, wanted: Option<u64>) -> Vec<u64> {
    let largest = free.iter().map(|f| f.regions).max().unwrap_or(0);
    let smallest = free.iter().map(|f| f.regions).min().unwrap_or(0);
    // A smaller file system than fits uses an equal share of every disk.
    let share = wanted.map_or(u64::MAX, |w| w.saturating_mul(copies as u64).div_ceil(free.len().max(1) as u64));
    let mut sizes = Vec::new();
    for reference in [largest.min(share), smallest.min(share)] {
        for slots in (1..=SLOTS_PER_DISK).rev() {
            let slot = (reference / slots).max(1);
            // Slots are counted by u32 blocks.
            let fits = slot <= u64::from(u32::MAX / REGION_BLOCKS);
            if fits && largest.min(share) / slot <= SLOTS_PER_DISK_MAX && !sizes.contains(&slot) {
                sizes.push(slot);
            }
        }
    }
    sizes
}

/// Joins slots of different nodes, always of those with most slots left (which leaves the fewest unused), and among equals
/// of those that have the fewest mirrors together. Returns indices into `free`.
fn join(free: &[Free], copies: usize, slot: u64, limit: u64) -> Vec<Vec<usize>> {
    let mut left: Vec<u64> = free.iter().map(|f| f.regions / slot).collect();
    let mut together: BTreeMap<(NodeId, NodeId), u64> = BTreeMap::new();
    let mut first: BTreeMap<NodeId, u64> = BTreeMap::new();
    let mut mirrors: Vec<Vec<usize>> = Vec::new();
    while (mirrors.len() as u64) < limit {
        // By node first: a node with many small disks must not crowd out the others.
        let mut of_node: BTreeMap<NodeId, u64> = BTreeMap::new();
        free.iter().zip(&left).for_each(|(f, slots)| *of_node.entry(f.node).or_default() += slots);
        let mut chosen: Vec<usize> = Vec::new();
        while chosen.len() < copies {
            let next = (0..free.len())
                .filter(|&at| left[at] > 0 && chosen.iter().all(|&c| free[c].node != free[at].node))
                .min_by_key(|&at| {
                    let node = free[at].node;
                    let pairs: u64 = chosen.iter().map(|&c| together.get(&pair(free[c].node, node)).copied().unwrap_or(0)).sum();
                    (std::cmp::Reverse(of_node[&node]), pairs, std::cmp::Reverse(left[at]), at)
                });
            match next {
                Some(at) => chosen.push(at),
                None => return mirrors,
            }
        }
        for (i, &a) in chosen.iter().enumerate() {
            left[a] -= 1;
            for &b in &chosen[i + 1..] {
                *together.entry(pair(free[a].node, free[b].node)).or_default() += 1;
            }
        }
        // The first copy is the one that answers for the mirror: spread that, too.
        chosen.sort_by_key(|&at| (first.get(&free[at].node).copied().unwrap_or(0), free[at].node));
        *first.entry(free[chosen[0]].node).or_default() += 1;
        mirrors.push(chosen);
    }
    mirrors
}

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}
