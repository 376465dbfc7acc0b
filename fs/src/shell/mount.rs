//! What the mount helper needs: options, `mount(2)`, and handing /dev/fuse to the daemon.
//!
//! The helper opens /dev/fuse and mounts in its caller's namespace, then passes the descriptor to `pulsard` over a Unix
//! socket. The mount answers nothing before the daemon serves it.
//!
//! Excludes: serving (`serve`).

use crate::{AccessPolicy, AccessTimes};
use nix::mount::{MntFlags, MsFlags};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::fs::OpenOptions;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The type under which the kernel lists mounts.
pub const MOUNT_TYPE: &str = "fuse.pulsarfs";
/// The most that one READ asks for, and one WRITE brings.
pub const TRANSFER_MAX: u32 = 1024 * 1024;

/// Options of a mount, as understood from `mount -o`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags for `mount(2)`.
    flags: MsFlags,
}

/// An option that is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mount option \"{option}\" is not known to pulsarfs; remove it from -o or from /etc/fstab")]
pub struct UnknownOption {
    /// The option as it was given.
    pub option: String,
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions { flags: MsFlags::MS_NODEV | MsFlags::MS_NOSUID }
    }
}

impl MountOptions {
    /// Reads a list of options separated by commas (several lists may be joined; later options win).
    ///
    /// Options that are for `mount(8)`, systemd or fstab only are dropped; those that are always on are accepted.
    ///
    /// # Errors
    /// The first option that is not understood.
    pub fn parse(list: &str) -> Result<Self, UnknownOption> {
        let mut flags = MsFlags::empty();
        for option in list.split(',').map(str::trim).filter(|o| !o.is_empty()) {
            match option {
                "ro" => flags.insert(MsFlags::MS_RDONLY),
                "rw" => flags.remove(MsFlags::MS_RDONLY),
                "nosuid" => flags.insert(MsFlags::MS_NOSUID),
                "suid" => flags.remove(MsFlags::MS_NOSUID),
                "nodev" => flags.insert(MsFlags::MS_NODEV),
                "dev" => flags.remove(MsFlags::MS_NODEV),
                "noexec" => flags.insert(MsFlags::MS_NOEXEC),
                "exec" => flags.remove(MsFlags::MS_NOEXEC),
                // A mount whose every change is durable at once is not to be had: "sync" and "dirsync" are refused by name.
                "async" => {}
                "noatime" => flags.insert(MsFlags::MS_NOATIME),
                "atime" => flags.remove(MsFlags::MS_NOATIME),
                "nodiratime" => flags.insert(MsFlags::MS_NODIRATIME),
                "diratime" => flags.remove(MsFlags::MS_NODIRATIME),
                "relatime" => flags.insert(MsFlags::MS_RELATIME),
                "norelatime" => flags.remove(MsFlags::MS_RELATIME),
                "strictatime" => flags.insert(MsFlags::MS_STRICTATIME),
                "nostrictatime" => flags.remove(MsFlags::MS_STRICTATIME),
                "lazytime" => flags.insert(MsFlags::MS_LAZYTIME),
                "nolazytime" => flags.remove(MsFlags::MS_LAZYTIME),
                "remount" => flags.insert(MsFlags::MS_REMOUNT),
                "user" | "users" | "owner" | "group" => {
                    flags.insert(MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC);
                }
                "defaults"
                | "auto"
                | "noauto"
                | "nofail"
                | "nouser"
                | "nousers"
                | "noowner"
                | "nogroup"
                | "_netdev"
                | "silent"
                | "loud"
                | "allow_other"
                | "default_permissions" => {}
                other if ["x-", "X-", "comment=", "user=", "uhelper=", "helper="].iter().any(|p| other.starts_with(p)) => {}
                other => return Err(UnknownOption { option: other.to_owned() }),
            }
        }
        Ok(MountOptions { flags })
    }

    /// Whether the mount only reads.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.flags.contains(MsFlags::MS_RDONLY)
    }

    /// When reads change access times.
    #[must_use]
    pub fn access_times(&self) -> AccessTimes {
        let policy = if self.flags.intersects(MsFlags::MS_NOATIME | MsFlags::MS_RDONLY) {
            AccessPolicy::Never
        } else if self.flags.contains(MsFlags::MS_STRICTATIME) {
            AccessPolicy::Always
        } else {
            AccessPolicy::Relative
        };
        AccessTimes { policy, not_directories: self.flags.contains(MsFlags::MS_NODIRATIME) }
    }

    /// Whether an existing mount is to get these options (no descriptor is made then).
    #[must_use]
    pub fn is_remount(&self) -> bool {
        self.flags.contains(MsFlags::MS_REMOUNT)
    }
}

/// Opens /dev/fuse and mounts the file system `name` on a directory, in the caller's mount namespace. Everybody may use the
/// mount; the kernel checks permissions. Needs CAP_SYS_ADMIN.
///
/// # Errors
/// No /dev/fuse, or what `mount(2)` says.
pub fn mount(name: &str, directory: &Path, options: &MountOptions) -> io::Result<OwnedFd> {
    let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|error| {
        let text = format!("cannot open /dev/fuse: {error}; load the kernel module \"fuse\"");
        io::Error::new(error.kind(), text)
    })?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={TRANSFER_MAX}",
        fuse.as_raw_fd()
    );
    nix::mount::mount(Some(name), directory, Some(MOUNT_TYPE), options.flags, Some(data.as_str()))?;
    Ok(OwnedFd::from(fuse))
}

/// The device (major, minor) of what is mounted on a directory.
pub(crate) fn device(directory: &Path) -> Option<(u32, u32)> {
    let directory = directory.canonicalize().ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    // Fields: id, parent, device, root, mount point …; the last mount on a directory is the one that is seen.
    mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ');
        let (major, minor) = fields.nth(2)?.split_once(':')?;
        let device = (major.parse().ok()?, minor.parse().ok()?);
        (Path::new(fields.nth(1)?) == directory).then_some(device)
    })
}

/// Lets the kernel read ahead by whole transfers; it offers FUSE an eighth of that. To be called when the mount is served.
/// A mount that cannot be tuned works all the same.
pub(crate) fn raise_read_ahead((major, minor): (u32, u32)) {
    let _ = std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), (TRANSFER_MAX / 1024).to_string());
}

/// Gives an existing mount other options (`mount -o remount`).
///
/// # Errors
/// What `mount(2)` says.
pub fn remount(directory: &Path, options: &MountOptions) -> io::Result<()> {
    let flags = options.flags | MsFlags::MS_REMOUNT;
    Ok(nix::mount::mount(None::<&str>, directory, None::<&str>, flags, None::<&str>)?)
}

/// How a mount is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Only if nobody uses it (`EBUSY` otherwise). What was written is on its way as ever; nothing is lost.
    Idle,
    /// From the tree at once; it lives on for those who still use it.
    Lazy,
    /// At once: requests under way fail, and so do later ones of those who still use it.
    Abort,
}

/// Unmounts, in the caller's mount namespace.
///
/// # Errors
/// What `umount2(2)` says.
pub fn unmount(directory: &Path, how: Unmount) -> io::Result<()> {
    let flags = match how {
        Unmount::Idle => MntFlags::empty(),
        Unmount::Lazy => MntFlags::MNT_DETACH,
        Unmount::Abort => MntFlags::MNT_FORCE | MntFlags::MNT_DETACH,
    } | MntFlags::UMOUNT_NOFOLLOW;
    Ok(nix::mount::umount2(directory, flags)?)
}

/// Sends bytes (at least one) and with them a descriptor.
///
/// # Errors
/// What `sendmsg(2)` says; `WriteZero` if not all bytes could be sent at once.
pub fn send_descriptor(socket: &UnixStream, bytes: &[u8], descriptor: impl AsFd) -> io::Result<()> {
    let fds = [descriptor.as_fd().as_raw_fd()];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives bytes into `buffer`, and the descriptor that came with them, if one did. Returns how many bytes came.
///
/// # Errors
/// What `recvmsg(2)` says.
pub fn receive_descriptor(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut vectors = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut vectors, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptor = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number. A second one
                // is closed by dropping the first.
                descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok((message.bytes, descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn options_of_others_are_dropped_and_unknown_ones_named() {
        let options = MountOptions::parse("_netdev,x-systemd.automount,nofail,noauto,ro,noexec,defaults").unwrap();
        assert!(options.is_read_only());
        assert_eq!(options.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC);
        assert!(!MountOptions::parse("ro,rw").unwrap().is_read_only());
        for (options, policy, not_directories) in [
            ("rw,relatime", AccessPolicy::Relative, false),
            ("nodiratime", AccessPolicy::Relative, true),
            ("noatime", AccessPolicy::Never, false),
            ("ro", AccessPolicy::Never, false),
            ("noatime,atime,strictatime,nodiratime", AccessPolicy::Always, true),
        ] {
            let times = AccessTimes { policy, not_directories };
            assert_eq!(MountOptions::parse(options).unwrap().access_times(), times, "{options}");
        }
        for refused in ["sync", "dirsync"] {
            assert_eq!(MountOptions::parse(refused).unwrap_err().option, refused);
        }
        let error = MountOptions::parse("rw,frobnicate=3").unwrap_err();
        assert!(error.to_string().contains("frobnicate=3"));
    }

    #[test]
    fn a_descriptor_travels() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send_descriptor(&here, b"hi", &writer).unwrap();
        drop(writer);
        let mut buffer = [0; 8];
        let (count, descriptor) = receive_descriptor(&there, &mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"hi");
        std::fs::File::from(descriptor.unwrap()).write_all(b"x").unwrap();
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"x");
    }
}
