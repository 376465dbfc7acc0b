//! Descriptors of threads that may wait in the kernel for their own process.
//!
//! A thread that asks for something of the mount that its process serves (`probe`), or purges pages that a request holds, waits for
//! an answer of its own process, and not even SIGKILL ends that. What ends it is that the process's descriptors of /dev/fuse are
//! closed, as those of a killed process are when its last thread is gone: which would be this one. So such a thread has a table of
//! descriptors of its own, and in it one of /dev/fuse through which nothing is ever read (`FUSE_DEV_IOC_CLONE`).
//!
//! Invariants:
//! - The thread has no other descriptor of a device, nor one of a socket: what its process closes is closed.
//! - All others are copies (files that were open when it began stay so): no owned descriptor may be sent to it or from it.
//! - It handles no signals, for which the runtime has a socket.

use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

const FUSE: &str = "/dev/fuse";

mod ioctl {
    // include/uapi/linux/fuse.h: `FUSE_DEV_IOC_CLONE`. Makes a descriptor one more of another's mount.
    nix::ioctl_read!(clone, 229, 0, u32);
}

/// Sets the calling thread apart. Returns a descriptor of the mount whose descriptor `device` is.
///
/// # Errors
/// The kernel does not allow it. The thread may be apart then, but has what it had.
pub(super) fn set_apart(device: RawFd) -> io::Result<OwnedFd> {
    SigSet::all().thread_block()?;
    unshare(CloneFlags::CLONE_FILES)?;
    let own = open(FUSE, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut of = u32::try_from(device).map_err(io::Error::other)?;
    // SAFETY: both descriptors are open, and the kernel only reads the number.
    unsafe { ioctl::clone(own.as_raw_fd(), &raw mut of) }?;
    let is_others = |fd: RawFd| {
        let to = std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).unwrap_or_default();
        fd > 2 && fd != own.as_raw_fd() && (to.starts_with("/dev") || to.as_os_str().as_bytes().starts_with(b"socket:"))
    };
    let numbers =
        std::fs::read_dir("/proc/thread-self/fd")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let shared: Vec<RawFd> = numbers.filter(|fd| is_others(*fd)).collect();
    for fd in shared {
        // SAFETY: the table is this thread's alone, which has nothing that owns this number: what does lives in others, with theirs.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    Ok(own)
}
