//! `mirror`: keeps N copies of every block on N nodes, with a small log per disk.
//!
//! A mirror is an array of 4 KiB blocks with one copy on each of its members (areas of disks on different nodes). The
//! node that holds a block's write token sends each write to all in-sync members itself; a write is acknowledged once it
//! is durable on every one of them. Each disk keeps a small circular log with group commit, and a tag per block.
//!
//! This layer never interprets a block's contents, nor decides who may write: it fences by epoch only.
//!
//! [`Mirror`] is one node's part; [`Mirrors`] is what the layer above sees of it.

pub mod api;
mod client;
mod events;
pub mod format;
mod log;
mod message;
mod mirror;
pub mod reader;
mod recovery;
mod replica;
mod resync;
mod scrub;
mod shell;
pub mod sim;
#[cfg(test)]
mod tests;

pub use api::{
    BlockDevice, BlockRead, BlockWrite, Kind, MirrorError, Mirrors, REGION_BLOCKS, RegionFree, Space, Tag, Version, WriteGroup,
};
pub use events::{CopyStatus, DiskStatus, MirrorEvent, MirrorStatus, ResyncProgress, ScrubReport};
pub use format::{OpenError, format_disk};
pub use mirror::{Mirror, MirrorOptions, StartError};
pub use reader::{DiskReader, OfflineBlock};
pub use shell::device::FileDevice;
