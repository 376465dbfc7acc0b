//! `sld`: the shared logical disk, one array of 4 KiB blocks that all nodes see coherently.
//!
//! It adds to `mirror`: tokens (leases on objects, with masters spread over the members), a coherent block cache,
//! ordered write-behind, and allocation by leased regions. It knows objects and blocks, not what an inode is.

pub mod allocator;
pub mod api;
pub mod cache;
pub mod holder;
pub mod link;
pub mod locks;
pub mod master;
pub mod memory;
pub mod message;
pub mod shell;
pub mod tokens;
pub mod writeback;

pub use api::{
    After, Block, Content, Disk, DiskError, Extent, FlushTarget, Mode, ObjectId, Operation, Upcalls, Usage, Want, Write,
    WriteClass, WriteId,
};
pub use mirror::{Kind, Tag};
pub use shell::{Heed, Locks, LostLocks, Notices, Options, PulsarDisk, Sld, Status, TokenSet};
