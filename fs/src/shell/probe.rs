//! Asking the kernel what it has of an inode.
//!
//! The kernel does not say what it did with an answer. But a thread of ours can ask for an inode's attributes through the mount,
//! as any program can: first so that the kernel must ask us (`AT_STATX_FORCE_SYNC`), which takes the answer in on that thread;
//! then so that it must not (`AT_STATX_DONT_SYNC`), which tells what it has. If both are the same it has taken in what it was told.
//!
//! The inode is opened by its number (`open_by_handle_at`), since it may have no name. That takes a directory of the mount,
//! which is opened each time: held open, it would keep the mount from being unmounted. (Whoever waits for this has a file of the
//! mount open anyway.)
//!
//! Invariants:
//! - No other file system is asked, if the mount is not to be seen where it was mounted any more.
//!
//! Excludes: when to ask, and what follows (`notify`).

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The kernel cannot be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unseen {
    /// Just now: it failed, or the mount is only just being made.
    Now,
    /// Ever: the mount is not to be seen from here, or this process may not.
    Ever,
}

/// What tells one state of an inode from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) size: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, u32),
    ctime: (i64, u32),
}

/// What was told of an inode, and what the kernel had afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) told: State,
    pub(crate) has: State,
}

/// The numbers of a device, major and minor.
pub(crate) type Device = (u32, u32);

/// Where the kernel can be asked.
#[derive(Debug)]
pub(crate) struct Probe {
    directory: Option<PathBuf>,
    /// The mount's, once it is served.
    device: OnceLock<Device>,
}

impl Probe {
    /// For a mount on this directory, if it is known.
    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        Probe { directory, device: OnceLock::new() }
    }

    /// Notes which device the mount is. Until then nothing is asked.
    pub(crate) fn found(&self, device: Device) {
        let _ = self.device.set(device);
    }

    /// Has the kernel ask us for an inode's attributes, on this thread, and tells what it has then.
    ///
    /// # Errors
    /// See [`Unseen`]; or the inode is gone.
    pub(crate) fn ask(&self, ino: u64, generation: u64) -> Result<Seen, Unseen> {
        let ask = || {
            let directory = self.directory.as_ref().ok_or(Errno::ENOTSUP)?;
            let device = self.device.get().ok_or(Errno::EAGAIN)?;
            let root = open(directory, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
            if statx(&root, libc::AT_STATX_DONT_SYNC)?.0 != *device {
                return Err(Errno::EXDEV);
            }
            let inode = open_inode(&root, ino, generation)?;
            let told = statx(&inode, libc::AT_STATX_FORCE_SYNC)?.1;
            let has = statx(&inode, libc::AT_STATX_DONT_SYNC)?.1;
            Ok(Seen { told, has })
        };
        ask().map_err(|error| {
            tracing::debug!(ino, %error, "cannot ask the kernel for attributes");
            match error {
                Errno::ENOTSUP | Errno::ENOSYS | Errno::EXDEV | Errno::EPERM => Unseen::Ever,
                _ => Unseen::Now,
            }
        })
    }
}

/// Whether a thread is there no more.
pub(crate) fn is_gone(thread: u32) -> bool {
    Path::new("/proc").join(thread.to_string()).symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Opens an inode that the kernel has by the numbers that it was told (fs/fuse/inode.c, `fuse_fh_to_dentry`), for asking only.
fn open_inode(root: &OwnedFd, ino: u64, generation: u64) -> nix::Result<OwnedFd> {
    /// `struct file_handle` with what FUSE puts into it.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        ino_high: u32,
        ino_low: u32,
        generation: u32,
    }
    const FILEID_INO64_GEN: i32 = 0x81;
    let (ino_high, ino_low, generation) = ((ino >> 32) as u32, ino as u32, generation as u32);
    let mut handle = Handle { bytes: 12, kind: FILEID_INO64_GEN, ino_high, ino_low, generation };
    // SAFETY: the handle is laid out as `struct file_handle`, says itself how long it is, and outlives the call, which only reads it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            root.as_raw_fd(),
            std::ptr::from_mut(&mut handle),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn statx(fd: &impl AsFd, sync: i32) -> nix::Result<(Device, State)> {
    const WANTED: u32 = libc::STATX_SIZE | libc::STATX_MTIME | libc::STATX_CTIME;
    let mut found = MaybeUninit::<libc::statx>::uninit();
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the path is an empty C string, and the kernel writes no more than a `struct statx`.
    let done = unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH | sync, WANTED, found.as_mut_ptr()) };
    Errno::result(done)?;
    // SAFETY: the call succeeded, so it is filled in.
    let found = unsafe { found.assume_init() };
    let time = |t: libc::statx_timestamp| (t.tv_sec, t.tv_nsec);
    let state = State { size: found.stx_size, mtime: time(found.stx_mtime), ctime: time(found.stx_ctime) };
    Ok(((found.stx_dev_major, found.stx_dev_minor), state))
}
