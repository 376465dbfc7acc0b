//! Mounting: options as mount(8) gives them, the mount itself in the caller's namespace, and looking at what is mounted
//! without ever touching a mount that may be dead.

use crate::failure::{Context, EXIT_USAGE, Failure, Outcome};
use fs::shell::Unmount;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Options of a mount, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// For the kernel.
    pub parsed: fs::shell::MountOptions,
    /// As they were written, without unknown ones.
    pub kept: Vec<String>,
}

impl MountOptions {
    /// Understands the arguments of `-o`. Options for others (`_netdev`, `x-*`, `nofail` …) are passed over; with
    /// `sloppy` unknown ones, too.
    ///
    /// # Errors
    /// If an option is not known.
    pub fn parse(lists: &[String], sloppy: bool) -> Outcome<MountOptions> {
        let mut kept = Vec::new();
        for option in lists.iter().flat_map(|l| l.split(',')).map(str::trim).filter(|o| !o.is_empty()) {
            match fs::shell::MountOptions::parse(option) {
                Ok(_) => kept.push(option.to_string()),
                Err(_) if sloppy => {}
                Err(e) => return Err(Failure::new(e.to_string()).code(EXIT_USAGE)),
            }
        }
        let parsed = fs::shell::MountOptions::parse(&kept.join(",")).map_err(|e| Failure::new(e.to_string()).code(EXIT_USAGE))?;
        Ok(MountOptions { parsed, kept })
    }
}

/// Checks that mounting is possible at all.
///
/// # Errors
/// If not root, or without /dev/fuse.
pub fn check_possible() -> Outcome<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new("mounting needs root; try with sudo"));
    }
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Ok(()),
        Err(e) => {
            let hint = match e.kind() {
                std::io::ErrorKind::NotFound => {
                    "; load the kernel module with 'modprobe fuse' (in a container: start it with --device /dev/fuse)"
                }
                std::io::ErrorKind::PermissionDenied => {
                    "; it needs root (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
                }
                _ => "",
            };
            Err(Failure::new(format!("cannot open /dev/fuse: {e}{hint}")))
        }
    }
}

/// Mounts in this process's namespace; returns the descriptor on which the file system must be served. Until that is
/// done, whoever touches the mount waits.
///
/// # Errors
/// If the kernel refuses.
pub fn mount_kernel(fs: &str, dir: &Path, options: &MountOptions) -> Outcome<OwnedFd> {
    fs::shell::mount(fs, dir, &options.parsed).map_err(|e| {
        let hint = match e.raw_os_error() {
            Some(nix::libc::ENOENT) => "; make the directory first",
            Some(nix::libc::ENOTDIR) => "; it is no directory",
            Some(nix::libc::EPERM) => "; mounting needs root (in a container: --cap-add SYS_ADMIN)",
            Some(nix::libc::ENODEV) => "; the kernel has no FUSE: 'modprobe fuse'",
            _ => "",
        };
        Failure::new(format!("cannot mount {fs} on {}: {e}{hint}", dir.display()))
    })
}

/// Takes a mount away, whatever its state.
///
/// # Errors
/// If there is none, or not allowed.
pub fn unmount_lazily(dir: &Path) -> Outcome<()> {
    fs::shell::unmount(dir, Unmount::Lazy).context(|| format!("cannot unmount {}", dir.display()))
}

/// A line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// `major:minor` of the mounted device.
    pub device: String,
    /// Where.
    pub dir: PathBuf,
    /// Its type.
    pub fs_type: String,
    /// What is mounted: our file system's name.
    pub source: String,
}

/// All Pulsar mounts of this namespace, in the order in which they were made. Touches none of them.
///
/// # Errors
/// If /proc cannot be read.
pub fn mounted() -> Outcome<Vec<Mounted>> {
    let text = std::fs::read("/proc/self/mountinfo").context(|| "cannot read /proc/self/mountinfo".into())?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse_mountinfo).filter(|m| m.fs_type == fs::shell::MOUNT_TYPE).collect())
}

/// The Pulsar mount at a directory, if there is one.
///
/// # Errors
/// As [`mounted`].
pub fn mounted_at(dir: &Path) -> Outcome<Option<Mounted>> {
    Ok(mounted()?.into_iter().rev().find(|m| m.dir == dir))
}

fn parse_mountinfo(line: &[u8]) -> Option<Mounted> {
    let mut words = line.split(|b| *b == b' ');
    let device = String::from_utf8(words.nth(2)?.to_vec()).ok()?;
    let dir = PathBuf::from(std::ffi::OsString::from_vec(unescape(words.nth(1)?)));
    let mut rest = words.skip_while(|w| *w != b"-").skip(1);
    let fs_type = String::from_utf8(rest.next()?.to_vec()).ok()?;
    let source = String::from_utf8_lossy(&unescape(rest.next()?)).into_owned();
    Some(Mounted { device, dir, fs_type, source })
}

/// `\040` and the like, as the kernel writes blanks.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| byte == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        if let Some(digits) = octal {
            out.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
            rest = tail.get(3..).unwrap_or_default();
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

/// The absolute path of a mount point, found without touching the mount itself if it is one already.
///
/// # Errors
/// If its parent does not exist.
pub fn mount_point(dir: &Path) -> Outcome<PathBuf> {
    let what = || format!("cannot find {}", dir.display());
    let absolute = std::path::absolute(dir).context(what)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) if name.as_bytes() != b".." => Ok(parent.canonicalize().context(what)?.join(name)),
        _ => absolute.canonicalize().context(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let o = |s: &str, sloppy| MountOptions::parse(&[s.to_string()], sloppy);
        let options = o("rw,ro,noatime,_netdev,x-systemd.automount,nofail,defaults", false).unwrap();
        assert!(options.parsed.is_read_only());
        let unknown = o("fast", false).unwrap_err();
        assert!(unknown.code == EXIT_USAGE && unknown.message.contains("fast"));
        assert!(o("fast", true).is_ok());
        assert!(!o("ro,rw", false).unwrap().parsed.is_read_only());
    }

    #[test]
    fn mountinfo() {
        let line = br"36 35 0:98 / /mnt/a\040b rw,noatime shared:1 master:2 - fuse.pulsarfs data rw,user_id=0";
        let m = parse_mountinfo(line).unwrap();
        assert_eq!((m.device.as_str(), m.dir.to_str(), m.source.as_str()), ("0:98", Some("/mnt/a b"), "data"));
        assert!(parse_mountinfo(b"").is_none());
    }
}
