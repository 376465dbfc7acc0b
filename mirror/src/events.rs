//! What the mirror layer reports: events as they happen, and its state when asked.

use crate::api::Version;
use cluster::{BlockNo, DiskId, Epoch, MirrorId};
use serde::Serialize;

/// Something worth telling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum MirrorEvent {
    /// A copy of a block was damaged and has been written again from a good one.
    Repaired {
        /// The block.
        block: BlockNo,
        /// The disk with the bad copy.
        disk: DiskId,
        /// What was wrong.
        what: String,
    },
    /// Tags of a disk could not be read: the blocks are taken for damaged, and repaired from other copies.
    TagsLost {
        /// The disk.
        disk: DiskId,
        /// How many blocks.
        blocks: u64,
        /// The error.
        why: String,
    },
    /// No good copy of a block can be reached.
    Corrupt {
        /// The block.
        block: BlockNo,
    },
    /// A disk gave an error on writing; it serves nothing more.
    DiskFaulted {
        /// The disk.
        disk: DiskId,
        /// The error.
        why: String,
    },
    /// A copy is being brought up to date.
    ResyncStarted {
        /// The mirror.
        mirror: MirrorId,
        /// The copy.
        disk: DiskId,
        /// The last epoch in which it was in sync.
        since: Epoch,
    },
    /// How far that has come; every few seconds.
    ResyncProgress {
        /// The mirror.
        mirror: MirrorId,
        /// The copy.
        disk: DiskId,
        /// How far.
        progress: ResyncProgress,
    },
    /// A copy is up to date.
    ResyncFinished {
        /// The mirror.
        mirror: MirrorId,
        /// The copy.
        disk: DiskId,
        /// Blocks that were copied.
        copied: u64,
    },
    /// A scrub of this node's disks is over.
    ScrubFinished {
        /// What it found.
        report: ScrubReport,
    },
}

/// What a scrub found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ScrubReport {
    /// Whether it is still running.
    pub running: bool,
    /// Whether it has come to its end.
    pub finished: bool,
    /// Blocks of copies on this node's disks looked through, free ones included.
    pub looked: u64,
    /// Of so many.
    pub blocks: u64,
    /// Of these, allocated: all their copies were read.
    pub checked: u64,
    /// Copies repaired.
    pub repaired: u64,
    /// Damaged copies that could not be repaired.
    pub unrepaired: u64,
}

/// How far a resync has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ResyncProgress {
    /// Blocks of the copy whose tags have been compared.
    pub scanned: u64,
    /// Blocks of the copy.
    pub blocks: u64,
    /// Blocks found to differ.
    pub found: u64,
    /// Of these, copied.
    pub copied: u64,
    /// Copied blocks per second, since it began in this epoch.
    pub rate: u64,
}

/// One copy on one of this node's disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CopyStatus {
    /// The mirror.
    pub mirror: MirrorId,
    /// `in-sync`, `stale` or `syncing`.
    pub state: &'static str,
    /// If it is being brought up to date: how far that has come.
    pub resync: Option<ResyncProgress>,
}

/// One of this node's disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskStatus {
    /// The disk.
    pub disk: DiskId,
    /// Whether it has failed.
    pub faulted: bool,
    /// Blocks of its log in use.
    pub log_used: u64,
    /// Blocks of its log.
    pub log_blocks: u64,
    /// Blocks whose contents are in the log but not home yet.
    pub not_home: u64,
    /// Writes that were skipped although nothing explains it: always 0 unless there is a bug.
    pub conflicts: u64,
    /// Its copies.
    pub copies: Vec<CopyStatus>,
}

/// State of this node's part of the mirror layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MirrorStatus {
    /// This node's disks.
    pub disks: Vec<DiskStatus>,
    /// Groups submitted here and not yet complete.
    pub groups_waiting: u64,
    /// The node's logical clock.
    pub clock: u64,
    /// Blocks repaired since the start.
    pub repaired: u64,
    /// Blocks found damaged on all copies since the start.
    pub corrupt: u64,
    /// The running or last scrub.
    pub scrub: ScrubReport,
}

/// A version, for messages.
pub(crate) fn show(version: Version) -> String {
    format!("{}.{}", version.epoch(), crate::replica::counter(version))
}
