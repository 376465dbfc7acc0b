//! `FsError`: what can go wrong with a file operation, sorted as POSIX sorts it. The numbers appear only here and in the shell.

use cluster::BlockNo;
use nix::libc;
use sld::DiskError;

/// The result of a file operation.
pub type Result<T> = std::result::Result<T, FsError>;

/// Why a file operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// ENOENT: there is no such name or inode.
    #[error("no such file or directory")]
    NotFound,
    /// EEXIST: the name is taken.
    #[error("the name exists already")]
    Exists,
    /// ENOTDIR.
    #[error("not a directory")]
    NotDirectory,
    /// EISDIR.
    #[error("is a directory")]
    IsDirectory,
    /// ENOTEMPTY.
    #[error("the directory is not empty")]
    NotEmpty,
    /// EPERM: the operation is not allowed to this caller, or never.
    #[error("operation not permitted")]
    NotPermitted,
    /// EACCES.
    #[error("permission denied")]
    AccessDenied,
    /// EINVAL, and why.
    #[error("{0}")]
    Invalid(&'static str),
    /// ENAMETOOLONG.
    #[error("the name or target is too long")]
    NameTooLong,
    /// ENOSPC.
    #[error("no space left on the file system")]
    NoSpace,
    /// EMLINK.
    #[error("too many links")]
    TooManyLinks,
    /// EFBIG.
    #[error("the file would be too large")]
    TooLarge,
    /// ENODATA: no such extended attribute.
    #[error("no such attribute")]
    NoData,
    /// ERANGE: the caller's buffer is too small.
    #[error("the result does not fit the buffer")]
    Range,
    /// E2BIG: an attribute is larger than the format holds.
    #[error("the attribute is too large")]
    TooBig,
    /// EOPNOTSUPP.
    #[error("not supported")]
    NotSupported,
    /// EBUSY.
    #[error("busy")]
    Busy,
    /// EAGAIN: the operation met others too often; it may be tried again.
    #[error("try again")]
    Again,
    /// ENXIO: no data or hole beyond the offset.
    #[error("no such address")]
    NoAddress,
    /// EINTR.
    #[error("interrupted")]
    Interrupted,
    /// ESTALE: the inode is gone.
    #[error("the inode no longer exists")]
    Stale,
    /// EIO: a structure on disk is not as it must be.
    #[error("damaged structure in block {block}: {what}; run fsck")]
    Corrupt {
        /// Where.
        block: BlockNo,
        /// What is wrong.
        what: &'static str,
    },
    /// EIO: all copies of a block are damaged, or a pointer leads nowhere.
    #[error("{0}")]
    Disk(DiskError),
}

impl FsError {
    /// A damaged structure.
    #[must_use]
    pub fn corrupt(block: BlockNo, what: &'static str) -> Self {
        FsError::Corrupt { block, what }
    }

    /// Whether what is on the disks is damaged, on all copies: trying again does not help, and others may go on.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        use DiskError::{Corrupt, NoSuchBlock};
        matches!(self, FsError::Corrupt { .. } | FsError::Disk(Corrupt(_) | NoSuchBlock(_)))
    }

    /// The number that the kernel is told.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            FsError::NotFound => libc::ENOENT,
            FsError::Exists => libc::EEXIST,
            FsError::NotDirectory => libc::ENOTDIR,
            FsError::IsDirectory => libc::EISDIR,
            FsError::NotEmpty => libc::ENOTEMPTY,
            FsError::NotPermitted => libc::EPERM,
            FsError::AccessDenied => libc::EACCES,
            FsError::Invalid(_) => libc::EINVAL,
            FsError::NameTooLong => libc::ENAMETOOLONG,
            FsError::NoSpace => libc::ENOSPC,
            FsError::TooManyLinks => libc::EMLINK,
            FsError::TooLarge => libc::EFBIG,
            FsError::NoData => libc::ENODATA,
            FsError::Range => libc::ERANGE,
            FsError::TooBig => libc::E2BIG,
            FsError::NotSupported => libc::EOPNOTSUPP,
            FsError::Busy => libc::EBUSY,
            FsError::Again => libc::EAGAIN,
            FsError::NoAddress => libc::ENXIO,
            FsError::Interrupted => libc::EINTR,
            FsError::Stale => libc::ESTALE,
            FsError::Corrupt { .. } | FsError::Disk(_) => libc::EIO,
        }
    }
}

impl From<DiskError> for FsError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::NoSpace => FsError::NoSpace,
            other => FsError::Disk(other),
        }
    }
}
