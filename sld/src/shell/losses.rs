//! What was written behind and is lost, until it has been reported: each loss once.

use crate::api::{FlushTarget, ObjectId};
use cluster::BlockNo;
use std::collections::{BTreeMap, BTreeSet};

/// See the module's description. Bounded by what can be dirty at a time, times the losses not yet reported.
#[derive(Debug, Default)]
pub(super) struct Losses {
    objects: BTreeSet<ObjectId>,
    blocks: BTreeMap<BlockNo, ObjectId>,
    any: bool,
}

impl Losses {
    /// Blocks of objects are lost.
    pub(super) fn add(&mut self, lost: impl IntoIterator<Item = (BlockNo, ObjectId)>) {
        for (block, object) in lost {
            self.any = true;
            self.objects.insert(object);
            self.blocks.insert(block, object);
        }
    }

    /// Whether something of a target is lost that has not been reported. It has been now.
    pub(super) fn report(&mut self, target: &FlushTarget) -> bool {
        match target {
            FlushTarget::Object(o) => {
                let lost = self.objects.remove(o);
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

    #[test]
    fn each_loss_is_reported_once_and_not_to_a_later_file_in_the_same_block() {
        let b = |i| BlockNo::new(MirrorId(1), i);
        let o = |i| ObjectId::Inode(b(i).pack());
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
}
