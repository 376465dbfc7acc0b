//! `fs`: an almost ordinary file system over the shared logical disk.
//!
//! File operations are sequential `async fn`s over [`sld::Disk`]: they take tokens, read blocks, put an operation together
//! and commit it. There is no journal: names are crash-atomic by the order of block writes (`directory`, `ops`).
//! This layer knows no other node.

pub mod acl;
pub mod btree;
pub mod check;
pub mod crash;
pub mod directory;
pub mod error;
pub mod extent;
pub mod format;
pub mod gc;
pub mod inode;
pub mod ops;
pub mod parents;
pub mod shell;
pub mod transaction;

pub use error::{FsError, Result};
pub use format::{ExtentRecord, Superblock, Time};
pub use inode::{Attributes, Body, FileKind, Ino, Inode, Parent};
pub use ops::{
    AccessPolicy, AccessTimes, Caller, Clock, DirEntry, FileSystem, FormatParams, NewNode, OnRemoval, OpenFlags, RenameFlags,
    SetAttributes, SetTime, StatFs,
};
pub use transaction::{Source, Transaction};
