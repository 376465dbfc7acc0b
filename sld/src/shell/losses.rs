//! What was written behind and is lost, until it has been reported: each loss once. Nobody else keeps account of it.
//!
//! Invariants:
//! - At most [`OBJECTS_MAX`] objects are remembered, those lost last. The limit is above what can be dirty at a time, so only
//!   losses that nobody has asked about through later ones are forgotten, with an error in the log.
//! - What was lost of a block's former life is nothing to the file that it is allocated for anew.

use crate::api::{FlushTarget, ObjectId};
use cluster::BlockNo;
use std::collections::{BTreeMap, BTreeSet};

/// The most objects that are remembered.
const OBJECTS_MAX: usize = 1 << 17;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Each with when it was last lost, as a number that grows.
    objects: BTreeMap<ObjectId, u64>,
    blocks: BTreeMap<BlockNo, ObjectId>,
    last: u64,
    any: bool,
}

impl Losses {
    /// Blocks of objects are lost.
    pub(super) fn add(&mut self, lost: impl IntoIterator<Item = (BlockNo, ObjectId)>) {
        for (block, object) in lost {
            self.any = true;
            self.last += 1;
            self.objects.insert(object, self.last);
            self.blocks.insert(block, object);
        }
        self.bound(OBJECTS_MAX);
    }

    /// Forgets the oldest losses above a number.
    fn bound(&mut self, max: usize) {
        let excess = self.objects.len().saturating_sub(max);
        if excess == 0 {
            return;
        }
        let mut ages: Vec<u64> = self.objects.values().copied().collect();
        ages.sort_unstable();
        let limit = ages.get(excess).copied().unwrap_or(u64::MAX);
        self.objects.retain(|_, age| *age >= limit);
        let left: BTreeSet<ObjectId> = self.objects.keys().copied().collect();
        self.blocks.retain(|_, of| left.contains(of));
        tracing::error!(objects = excess, "too many losses that nobody asked about; the oldest will not be reported any more");
    }

    /// Whether something of a target is lost that has not been reported. It has been now.
    pub(super) fn report(&mut self, target: &FlushTarget) -> bool {
        match target {
            FlushTarget::Object(o) => {
                let lost = self.objects.remove(o).is_some();
                if lost {
                    self.blocks.retain(|_, of| of != o);
                }
                lost
            }
            FlushTarget::Block(b) => self.blocks.remove(b).is_some(),
            FlushTarget::All => std::mem::take(&mut self.any),
        }
    }

    /// A block was allocated anew: what was lost of its former life is nothing to the new one.
    pub(super) fn renewed(&mut self, block: BlockNo) {
        if !self.blocks.is_empty() || !self.objects.is_empty() {
            self.blocks.remove(&block);
            self.objects.remove(&ObjectId::Inode(block.pack()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::MirrorId;

    fn b(i: u32) -> BlockNo {
        BlockNo::new(MirrorId(1), i)
    }

    fn o(i: u32) -> ObjectId {
        ObjectId::Inode(b(i).pack())
    }

    #[test]
    fn each_loss_is_reported_once_and_not_to_a_later_file_in_the_same_block() {
        let mut l = Losses::default();
        l.add([(b(1), o(1)), (b(2), o(1)), (b(3), o(3)), (b(4), o(4))]);
        assert!(l.report(&FlushTarget::Object(o(1))));
        assert!(!l.report(&FlushTarget::Object(o(1))));
        assert!(!l.report(&FlushTarget::Block(b(2))), "reported with its object");
        assert!(l.report(&FlushTarget::Block(b(3))));
        assert!(!l.report(&FlushTarget::Block(b(3))));
        l.renewed(b(4));
        assert!(!l.report(&FlushTarget::Object(o(4))) && !l.report(&FlushTarget::Block(b(4))));
        assert!(l.report(&FlushTarget::All) && !l.report(&FlushTarget::All));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_newest_stay() {
        let mut l = Losses::default();
        l.add((0..10).map(|i| (b(i), o(i))));
        l.add([(b(0), o(0))]);
        l.bound(3);
        assert!((1..8).all(|i| !l.report(&FlushTarget::Object(o(i))) && !l.report(&FlushTarget::Block(b(i)))));
        assert!([0, 8, 9].into_iter().all(|i| l.report(&FlushTarget::Object(o(i)))));
        assert!(l.report(&FlushTarget::All), "that something was lost is not forgotten");
    }
}
