//! What clients and disk servers say to each other (`Service::Mirror`). Heads are encoded with `postcard`, contents of
//! blocks travel as parts of the message, in the order of the slots that have contents.
//!
//! Invariant: whoever decodes checks counts against limits and parts against slots before using either.

use crate::api::{Space, Tag, Version, WriteGroup};
use crate::format::{Checksum, TagEntry};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, DiskId, Epoch, Incarnation, Message, MirrorId, NodeId};
use serde::{Deserialize, Serialize};

/// One life of a node, as the origin of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Writer {
    /// The node; 0 stands for no writer (resync, repair).
    pub node: NodeId,
    /// Its life.
    pub incarnation: Incarnation,
}

/// One block's new version, without its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Slot {
    /// The block's index in its mirror.
    pub index: u32,
    /// Its tag.
    pub tag: Tag,
    /// Its version.
    pub version: Version,
    /// Whether it has contents.
    pub has_data: bool,
    /// Checksum over contents, place, version and tag.
    pub checksum: Checksum,
}

impl Slot {
    /// Its entry in the tag table.
    #[must_use]
    pub(crate) fn entry(&self) -> TagEntry {
        TagEntry { version: self.version, tag: self.tag, has_data: self.has_data, checksum: self.checksum }
    }
}

/// Why a write is made: decides when it replaces what a block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WriteMode {
    /// By its writer.
    Normal,
    /// In recovery, in the name of a dead writer.
    Recover,
    /// By resync: what an in-sync member has.
    Copy,
    /// By repair: replaces a damaged block, or one that still has the version `bad`.
    Repair {
        /// The version found wrong.
        bad: Version,
    },
}

/// A group of writes to one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WriteHead {
    /// The mirror.
    pub mirror: MirrorId,
    /// Why.
    pub mode: WriteMode,
    /// Who.
    pub writer: Writer,
    /// The group's number among this writer's in this mirror, from 1; 0 if there is no writer.
    pub wseq: u64,
    /// The writer's groups in this mirror up to this one are complete on all members.
    pub completed_upto: u64,
    /// The highest counter that the writer has made; 0 if it does not say. A block that has a higher one was written by
    /// somebody of whom the writer does not know: there is a bug in the handling of tokens.
    pub clock: u64,
    /// See `WriteGroup::fresh_data`.
    pub fresh_data: bool,
    /// The blocks.
    pub slots: Vec<Slot>,
}

/// A question to the server of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Make a group durable. Answer: `Written`.
    Write(WriteHead),
    /// The writer's groups up to this one are complete. No answer.
    Completed {
        /// The mirror.
        mirror: MirrorId,
        /// Who.
        writer: Writer,
        /// Up to which group.
        upto: u64,
    },
    /// Contents of blocks. Answer: `Blocks`.
    Read {
        /// The mirror.
        mirror: MirrorId,
        /// Which, at most [`READ_BLOCKS_MAX`].
        blocks: Vec<u32>,
        /// Also say which versions are uncertain (costs time).
        uncertain: bool,
    },
    /// Tags of blocks. Answer: `Tags`.
    Tags {
        /// The mirror.
        mirror: MirrorId,
        /// The first block.
        first: u32,
        /// How many, at most [`TAGS_MAX`].
        count: u32,
    },
    /// Blocks whose version is of an epoch from `since` on. Answer: `Changed`.
    Changed {
        /// The mirror.
        mirror: MirrorId,
        /// The first block.
        first: u32,
        /// How many blocks to look at, at most [`TAGS_MAX`].
        count: u32,
        /// The epoch.
        since: Epoch,
    },
    /// Free blocks of a region. Answer: `Free`.
    RegionFree {
        /// The mirror.
        mirror: MirrorId,
        /// The region.
        region: u32,
    },
    /// Space. Answer: `Space`.
    Space {
        /// The mirror.
        mirror: MirrorId,
    },
    /// Uncertain groups of writers that are dead in this epoch, after a place. Answer: `Uncertain`.
    Uncertain {
        /// The mirror.
        mirror: MirrorId,
        /// Where the last answer ended.
        after: Option<(Writer, u64)>,
    },
    /// Exchange of logical clocks (of nodes, not disks). Answer: `Clock`.
    Clock {
        /// The asker's.
        clock: u64,
    },
}

/// A block as a server has it. Its contents, if any, are in the message's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Found {
    /// As the tag table says; the reader checks the contents.
    Block {
        /// Tag.
        tag: Tag,
        /// Version.
        version: Version,
        /// Whether contents are in the parts.
        has_data: bool,
        /// What the contents must have.
        checksum: Checksum,
        /// A group that it was in may not be complete everywhere.
        uncertain: bool,
    },
    /// The tag is damaged, or the block cannot be read.
    Damaged {
        /// The version, as far as it is known.
        version: Version,
    },
}

/// A tag as a server has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FoundTag {
    /// The tag; `None` if it is damaged.
    pub tag: Option<Tag>,
    /// Version.
    pub version: Version,
}

/// A block that may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    /// The block.
    pub index: u32,
    /// Its version (0 if its tag is damaged).
    pub version: Version,
    /// Its checksum.
    pub checksum: Checksum,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// The group is durable.
    Written,
    /// Blocks, in the order asked for.
    Blocks(Vec<Found>),
    /// Tags, in order.
    Tags(Vec<FoundTag>),
    /// Changed blocks, in order of index.
    Changed(Vec<Change>),
    /// Free blocks of a region.
    Free {
        /// A bit per block.
        words: Vec<u64>,
        /// The answerer's clock: who allocates one of them must write with a greater version than the one that freed it.
        clock: u64,
    },
    /// Space.
    Space(Space),
    /// Uncertain groups. Contents of their slots are in the parts, group by group.
    Uncertain {
        /// The groups, in order of writer and number.
        groups: Vec<WriteHead>,
        /// There are more after the last one.
        more: bool,
    },
    /// The answerer's clock.
    Clock(u64),
    /// The request's epoch is not the server's.
    Stale {
        /// The server's epoch.
        epoch: Epoch,
    },
    /// The disk has failed, or is not there.
    Faulted,
    /// The request makes no sense to this server (a place outside the mirror, a limit passed).
    Refused,
}

/// A request or an answer, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Wire {
    /// A question.
    Request {
        /// Repeated in the answer.
        id: u64,
        /// The asker's epoch.
        epoch: Epoch,
        /// The disk.
        disk: DiskId,
        /// What is asked.
        request: Request,
    },
    /// An answer.
    Reply {
        /// Of the request.
        id: u64,
        /// Of the request: an answer to an earlier life of the asker, which used the same numbers, has an older one.
        epoch: Epoch,
        /// The answer.
        reply: Reply,
    },
}

/// Most blocks in a `Read`: 1 MiB.
pub(crate) const READ_BLOCKS_MAX: usize = 256;
/// Most blocks in `Tags` and `Changed`.
pub(crate) const TAGS_MAX: u32 = 16_384;
/// Bytes of contents in an `Uncertain` answer, after which it ends (a single group may pass it).
pub(crate) const UNCERTAIN_BYTES: usize = 2 << 20;
const _: () =
    assert!(UNCERTAIN_BYTES + (WriteGroup::BLOCKS_MAX + 1) * (BLOCK_SIZE + 128) < cluster::transport::MESSAGE_BYTES_MAX);

impl Wire {
    /// As a message.
    #[must_use]
    pub(crate) fn encode(&self, parts: Vec<Bytes>) -> Message {
        // Serialising plain enums into a vector cannot fail; an empty head would be refused by the receiver.
        Message { head: postcard::to_stdvec(self).unwrap_or_default().into(), parts }
    }

    /// From a message; `None` if it is malformed.
    #[must_use]
    pub(crate) fn decode(message: &Message) -> Option<Wire> {
        let wire: Wire = postcard::from_bytes(&message.head).ok()?;
        if message.parts.iter().any(|p| p.len() != BLOCK_SIZE) {
            return None;
        }
        let expected = match &wire {
            Wire::Request { request: Request::Write(head), .. } => head.parts()?,
            Wire::Reply { reply: Reply::Blocks(found), .. } => {
                found.iter().filter(|f| matches!(f, Found::Block { has_data: true, .. })).count()
            }
            Wire::Reply { reply: Reply::Uncertain { groups, .. }, .. } => {
                groups.iter().try_fold(0usize, |n, g| Some(n + g.parts()?))?
            }
            _ => 0,
        };
        (message.parts.len() == expected).then_some(wire)
    }
}

impl WriteHead {
    /// How many parts go with it; `None` if it has too many slots.
    #[must_use]
    pub(crate) fn parts(&self) -> Option<usize> {
        (self.slots.len() <= WriteGroup::BLOCKS_MAX).then(|| self.slots.iter().filter(|s| s.has_data).count())
    }
}
