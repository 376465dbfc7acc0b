//! Token messages between nodes, and who is the master of what.
//!
//! Invariants:
//! - Every envelope carries its sender's epoch and logical clock; a receiver witnesses the clock before it acts.
//! - A message about an object passes only between a holder and the object's master of the epoch.
//! - Masters depend on the set of members that are up and on nothing else, so that all members agree on them.
//!
//! Excludes: byte-range locks (their own service), and how messages are made reliable (`link`).

use crate::api::{Mode, ObjectId};
use cluster::{BlockNo, Config, Epoch, Incarnation, MirrorId, NodeId};
use mirror::REGION_BLOCKS;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A token as a holder tells it to a new master.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asserted {
    /// What is held.
    pub object: ObjectId,
    /// How.
    pub mode: Mode,
    /// The number of its grant.
    pub seq: u64,
}

/// One token message. The direction is in the doc of each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Msg {
    /// Holder to master: wants a token. At most one is outstanding per object and node.
    Request {
        /// What.
        object: ObjectId,
        /// How.
        mode: Mode,
        /// Whether others are to be made to give it up; otherwise the answer is `Denied` if they would have to.
        steal: bool,
    },
    /// Master to holder: refused, since another node has it and `steal` was not set.
    Denied {
        /// What was wanted.
        object: ObjectId,
    },
    /// Master to holder: the token is the node's from now on (or again, in another mode).
    Grant {
        /// What.
        object: ObjectId,
        /// How.
        mode: Mode,
        /// Number of the grant: grows with every grant of a master.
        seq: u64,
        /// Whether another node has the object open.
        open_elsewhere: bool,
        /// For a region: blocks whose inode tokens somebody has, or that another node has allocated and not yet
        /// written. They must not be allocated. Indexes within the mirror.
        busy: Vec<u32>,
    },
    /// Master to holder: give up grant `seq`, down to `keep`. If the region of an inode is leased, its holder gets one for
    /// an inode that it may have adopted, with a new number.
    Revoke {
        /// What.
        object: ObjectId,
        /// Which grant.
        seq: u64,
        /// What may stay.
        keep: Option<Mode>,
    },
    /// Holder to master: given up, asked or not.
    Release {
        /// What.
        object: ObjectId,
        /// Which grant.
        seq: u64,
        /// What stays.
        keep: Option<Mode>,
        /// Whether this node has the object open.
        open: bool,
        /// For a region: inodes in it that were adopted and are still held.
        adopted: Vec<Asserted>,
        /// For a region: blocks in it that are allocated by this node and not yet written.
        reserved: Vec<u32>,
    },
    /// Holder to master: the inode is no more, and its token is given up. `Forgotten` answers if no other node has the
    /// token, waits for it, or has the inode open: only then may the block become another inode without asking.
    Forget {
        /// What.
        object: ObjectId,
        /// Which grant.
        seq: u64,
        /// Whether this node has the object open.
        open: bool,
    },
    /// Master to holder: nobody knows the object any more.
    Forgotten {
        /// What.
        object: ObjectId,
    },
    /// Holder to master: adopted while its region was no longer held.
    Adopted {
        /// What; it is held exclusively.
        object: ObjectId,
    },
    /// Holder to master: whether the node has the object open has changed while it does not hold the token.
    Open {
        /// What.
        object: ObjectId,
        /// Whether it is open.
        open: bool,
    },
    /// Holder to master: blocks once handed over as reserved are so no more.
    Unreserve {
        /// The blocks.
        blocks: Vec<BlockNo>,
    },
    /// Holder to new master, after an epoch change: what the node holds of the objects that moved to it (of all of the
    /// master's objects if `full`). May come in parts.
    Reassert {
        /// The epochs between which the sender judged what has moved.
        history: Vec<Epoch>,
        /// Whether it covers all objects of this master, not only those that moved.
        full: bool,
        /// Tokens held.
        tokens: Vec<Asserted>,
        /// Objects that the node has open.
        opens: Vec<ObjectId>,
        /// Blocks allocated, not yet written, in regions that the node does not hold.
        reserved: Vec<BlockNo>,
        /// Whether this is the last part.
        last: bool,
    },
    /// Master to holder: we disagree about what has moved; assert everything.
    ReassertAll,
    /// Takes the place of a message that an epoch change made meaningless.
    Nothing,
    /// Master to holder: another node has the object open, and may not have told so when the token was granted.
    Opened {
        /// What; the receiver had it exclusively.
        object: ObjectId,
    },
    /// Master to holder, once in an epoch: all members have told this master what they have open, and where that makes a
    /// difference to the receiver `Opened` went before.
    OpensKnown,
}

impl Msg {
    /// The object that it is about, if it is about one.
    #[must_use]
    pub fn object(&self) -> Option<ObjectId> {
        match self {
            Msg::Request { object, .. }
            | Msg::Denied { object }
            | Msg::Grant { object, .. }
            | Msg::Revoke { object, .. }
            | Msg::Release { object, .. }
            | Msg::Adopted { object }
            | Msg::Forget { object, .. }
            | Msg::Forgotten { object }
            | Msg::Open { object, .. }
            | Msg::Opened { object } => Some(*object),
            Msg::Unreserve { .. } | Msg::Reassert { .. } | Msg::ReassertAll | Msg::Nothing | Msg::OpensKnown => None,
        }
    }

    /// Roughly its encoded size in bytes, to cut envelopes.
    #[must_use]
    pub fn weight(&self) -> usize {
        40 + match self {
            Msg::Grant { busy, .. } => busy.len() * 5,
            Msg::Release { adopted, reserved, .. } => adopted.len() * 24 + reserved.len() * 5,
            Msg::Unreserve { blocks } => blocks.len() * 10,
            Msg::Reassert { tokens, opens, reserved, .. } => tokens.len() * 24 + opens.len() * 12 + reserved.len() * 10,
            _ => 0,
        }
    }
}

/// What travels: messages of one node to another, numbered without gaps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The sender's epoch.
    pub epoch: Epoch,
    /// The sender's logical clock (`Mirrors::clock`).
    pub clock: u64,
    /// The life of the sender.
    pub from: Incarnation,
    /// The life of the receiver that is meant.
    pub to: Incarnation,
    /// All messages up to this number have been received by the sender.
    pub ack: u64,
    /// Number of the first message.
    pub first: u64,
    /// The messages.
    pub messages: Vec<Msg>,
}

/// The members that are up in an epoch, each with its life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// The epoch.
    pub epoch: Epoch,
    /// Who is up.
    pub up: BTreeMap<NodeId, Incarnation>,
}

fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The region that a block is in.
#[must_use]
pub fn region_of(block: BlockNo) -> ObjectId {
    ObjectId::Region(block.mirror.0, block.index / REGION_BLOCKS)
}

/// The region that an object belongs to, if it is an inode or a region.
#[must_use]
pub fn region_of_object(object: ObjectId) -> Option<ObjectId> {
    match object {
        ObjectId::Inode(packed) => Some(region_of(BlockNo::unpack(packed))),
        ObjectId::Region(..) => Some(object),
        ObjectId::Rename(_) | ObjectId::Task(..) => None,
    }
}

impl Membership {
    /// The members of a configuration that are up.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let up = config.nodes.iter().filter(|(_, n)| n.up).map(|(id, n)| (*id, n.incarnation)).collect();
        Membership { epoch: config.epoch, up }
    }

    /// An object's master: the member with the highest hash of it and the object's region.
    #[must_use]
    pub fn master(&self, object: ObjectId) -> Option<(NodeId, Incarnation)> {
        let key = match region_of_object(object).unwrap_or(object) {
            ObjectId::Region(m, r) => mix((u64::from(m) << 32) | u64::from(r)),
            ObjectId::Inode(p) => mix(p),
            ObjectId::Rename(f) => mix(mix(0xaaaa_0001) ^ u64::from(f)),
            ObjectId::Task(f, n) => mix(mix(0xaaaa_0002) ^ (u64::from(f) << 32) ^ u64::from(n)),
        };
        self.up.iter().max_by_key(|(id, _)| (mix(key ^ mix(u64::from(id.0))), **id)).map(|(id, i)| (*id, *i))
    }
}

/// The epochs since tokens were last known to be in order everywhere: what has moved is judged over all of them, and a
/// holder and a master that have lived through different ones find out by comparing them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    members: Vec<Membership>,
}

impl History {
    /// More epochs than this in a row without a complete recovery, and everything counts as moved.
    const LENGTH_MAX: usize = 8;

    /// Adds the membership of a new epoch.
    pub fn push(&mut self, membership: Membership) {
        if self.members.is_empty() {
            self.members.push(Membership::default()); // nobody: everything moved
        }
        if self.members.len() >= Self::LENGTH_MAX {
            self.members = vec![Membership::default()];
        }
        self.members.push(membership);
    }

    /// All tokens are in order in the newest epoch.
    pub fn settle(&mut self) {
        if let Some(last) = self.members.pop() {
            self.members = vec![last];
        }
    }

    /// The epochs.
    #[must_use]
    pub fn epochs(&self) -> Vec<Epoch> {
        self.members.iter().map(|m| m.epoch).collect()
    }

    /// Whether the object's master has not been the same all the time.
    #[must_use]
    pub fn moved(&self, object: ObjectId) -> bool {
        let Some((now, before)) = self.members.split_last() else { return true };
        let master = now.master(object);
        before.iter().any(|m| m.master(object) != master)
    }
}

/// The file system that an object belongs to.
#[must_use]
pub fn fs_of(config: &Config, object: ObjectId) -> Option<cluster::FsId> {
    match object {
        ObjectId::Inode(packed) => config.mirrors.get(&BlockNo::unpack(packed).mirror).map(|m| m.fs),
        ObjectId::Region(mirror, _) => config.mirrors.get(&MirrorId(mirror)).map(|m| m.fs),
        ObjectId::Rename(fs) | ObjectId::Task(fs, _) => Some(cluster::FsId(fs)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(epoch: u64, up: &[(u32, u64)]) -> Membership {
        Membership { epoch: Epoch(epoch), up: up.iter().map(|(n, i)| (NodeId(*n), Incarnation(*i))).collect() }
    }

    #[test]
    fn inode_and_its_region_have_one_master_and_objects_spread() {
        let m = members(1, &[(1, 1), (2, 1), (3, 1)]);
        let mut count = BTreeMap::<NodeId, u32>::new();
        for region in 0..300 {
            let object = ObjectId::Region(1, region);
            let inode = ObjectId::Inode(BlockNo::new(MirrorId(1), region * REGION_BLOCKS + 77).pack());
            assert_eq!(m.master(object), m.master(inode));
            *count.entry(m.master(object).unwrap().0).or_default() += 1;
        }
        assert!(count.len() == 3 && count.values().all(|c| *c > 60), "{count:?}");
    }

    #[test]
    fn only_a_dead_or_restarted_nodes_objects_move() {
        let mut h = History::default();
        h.push(members(1, &[(1, 1), (2, 1), (3, 1)]));
        assert!(h.moved(ObjectId::Region(1, 1)), "everything is new in the first epoch");
        h.settle();
        assert!(!h.moved(ObjectId::Region(1, 1)));
        let before = members(1, &[(1, 1), (2, 1), (3, 1)]);
        h.push(members(2, &[(1, 1), (2, 1)]));
        for r in 0..100 {
            let o = ObjectId::Region(1, r);
            assert_eq!(h.moved(o), before.master(o).unwrap().0 == NodeId(3));
        }
        h.push(members(3, &[(1, 1), (2, 1), (3, 2)]));
        for r in 0..100 {
            let o = ObjectId::Region(1, r);
            assert_eq!(h.moved(o), before.master(o).unwrap().0 == NodeId(3), "moved away and back to a new life");
        }
    }
}
