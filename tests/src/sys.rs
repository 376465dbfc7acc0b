//! System calls that the standard library lacks, for the programs that test mounts: thin, safe, and without opinions.
//!
//! Mappings are read and written by the kernel (`pread` and `pwrite` between the mapping and a scratch file in memory), so
//! that touching what lies beyond a file's end is an error (`EFAULT`) and not the end of the test by SIGBUS.

use nix::libc;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A path for the kernel.
pub fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// 0 or above is what it is; below, `errno`.
fn check(result: libc::c_int) -> io::Result<()> {
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What leads to a file without a name: `struct file_handle`.
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Handle {
    len: u32,
    kind: i32,
    bytes: [u8; 128],
}

/// The handle of a file (`name_to_handle_at`), which is good on every node.
pub fn handle(path: &Path) -> io::Result<Handle> {
    let mut handle = Handle { len: 128, kind: 0, bytes: [0; 128] };
    let (path, mut mount) = (c_path(path)?, 0i32);
    // SAFETY: the path is a C string, and the handle says itself how much room it has.
    let done = unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, path.as_ptr(), &raw mut handle, &raw mut mount, 0i64)
    };
    check(done as i32).map(|()| handle)
}

/// Opens what a handle leads to, in the file system that `root` is in (`open_by_handle_at`).
pub fn open_handle(root: &File, handle: &Handle) -> io::Result<File> {
    let mut handle = handle.clone();
    // SAFETY: the handle is one, says itself how long it is, and outlives the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, root.as_raw_fd(), &raw mut handle, libc::O_RDONLY | libc::O_CLOEXEC)
    };
    check(fd as i32)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

/// Writes asynchronously (`io_submit`), and waits for the end of it.
pub fn write_async(file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
    /// `struct iocb`, and what it asks for.
    #[repr(C)]
    #[derive(Default)]
    struct Request {
        data: u64,
        key: u32,
        rw_flags: u32,
        opcode: u16,
        priority: i16,
        fd: u32,
        buffer: u64,
        len: u64,
        offset: i64,
        reserved: u64,
        flags: u32,
        event_fd: u32,
    }
    const PWRITE: u16 = 1;
    /// `struct io_event`.
    #[repr(C)]
    #[derive(Default)]
    struct Event {
        data: u64,
        request: u64,
        result: i64,
        second: i64,
    }
    let (fd, buffer, len) = (file.as_raw_fd() as u32, bytes.as_ptr() as u64, bytes.len() as u64);
    let mut request = Request { opcode: PWRITE, fd, buffer, len, offset: offset as i64, ..Request::default() };
    let (mut context, mut event) = (0u64, Event::default());
    let none: *const libc::timespec = std::ptr::null();
    // SAFETY: the structures are laid out as the kernel's, and they and the bytes are there until the request has ended.
    unsafe {
        check(libc::syscall(libc::SYS_io_setup, 1i64, &raw mut context) as i32)?;
        let requests = [&raw mut request];
        let ended = check(libc::syscall(libc::SYS_io_submit, context, 1i64, requests.as_ptr()) as i32)
            .and_then(|()| check(libc::syscall(libc::SYS_io_getevents, context, 1i64, 1i64, &raw mut event, none) as i32));
        check(libc::syscall(libc::SYS_io_destroy, context) as i32)?;
        ended?;
    }
    usize::try_from(event.result).map_err(|_| io::Error::from_raw_os_error(-event.result as i32))
}

/// This thread acts as somebody else, without any capability or further group, until this is dropped.
pub struct Acting(std::marker::PhantomData<*mut ()>);

impl Acting {
    /// The C library would change all threads, so it is not asked.
    pub fn begin(uid: u32, gid: u32) -> io::Result<Acting> {
        let same = -1i64;
        let none: *const libc::gid_t = std::ptr::null();
        // SAFETY: these calls change the calling thread's credentials only, and an empty list is read from no place.
        unsafe {
            check(libc::syscall(libc::SYS_setgroups, 0i64, none) as i32)?;
            check(libc::syscall(libc::SYS_setresgid, same, i64::from(gid), same) as i32)?;
            let acting = Acting(std::marker::PhantomData);
            check(libc::syscall(libc::SYS_setresuid, same, i64::from(uid), same) as i32)?;
            Ok(acting)
        }
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        let (same, root) = (-1i64, 0i64);
        // SAFETY: as above; root is what the real user still is.
        let back = unsafe {
            libc::syscall(libc::SYS_setresuid, same, root, same) == 0 && libc::syscall(libc::SYS_setresgid, same, root, same) == 0
        };
        assert!(back, "root again");
    }
}

/// Opens a file with further flags (`O_DIRECT`, `O_APPEND` …).
pub fn open(path: &Path, write: bool, flags: libc::c_int) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
}

/// `fallocate`.
pub fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `file` is borrowed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) })
}

/// `copy_file_range`; returns how much was copied.
pub fn copy_range(from: &File, from_offset: u64, to: &File, to_offset: u64, len: usize) -> io::Result<usize> {
    let (mut source, mut target) = (from_offset as i64, to_offset as i64);
    // SAFETY: the descriptors are open, and the offsets live as long as the call.
    count(unsafe { libc::copy_file_range(from.as_raw_fd(), &mut source, to.as_raw_fd(), &mut target, len, 0) })
}

/// All that is in a file in memory, from its beginning.
fn scratched(scratch: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; scratch.metadata()?.len() as usize];
    std::os::unix::fs::FileExt::read_exact_at(scratch, &mut bytes, 0)?;
    Ok(bytes)
}

/// Up to `len` bytes of a file by `sendfile`.
pub fn send_file(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let (scratch, mut at) = (memory_file()?, offset as i64);
    let end = at + len as i64;
    while at < end {
        // SAFETY: the descriptors are open, and the offset lives as long as the call.
        let n = unsafe { libc::sendfile(scratch.as_raw_fd(), file.as_raw_fd(), &mut at, (end - at) as usize) };
        if count(n)? == 0 {
            break;
        }
    }
    scratched(&scratch)
}

/// Up to `len` bytes of a file by `splice`, through a pipe.
pub fn splice(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let (mut reader, writer) = io::pipe()?;
    let (mut bytes, mut at, end) = (Vec::new(), offset as i64, offset as i64 + len as i64);
    while at < end {
        // SAFETY: the descriptors are open, and the offset lives as long as the call.
        let n = unsafe {
            let (from, to) = (file.as_raw_fd(), writer.as_raw_fd());
            libc::splice(from, &mut at, to, std::ptr::null_mut(), (end - at) as usize, 0)
        };
        let (n, had) = (count(n)?, bytes.len());
        if n == 0 {
            break;
        }
        bytes.resize(had + n, 0);
        io::Read::read_exact(&mut reader, &mut bytes[had..])?;
    }
    Ok(bytes)
}

/// Does something with the rights of a user who is not the superuser. They are this thread's, and only while it lasts.
pub fn as_user<T>(user: u32, what: impl FnOnce() -> T) -> T {
    struct Back(libc::c_int);
    impl Drop for Back {
        fn drop(&mut self) {
            // SAFETY: takes a number; what it changes is this thread's.
            unsafe { libc::setfsuid(self.0 as u32) };
        }
    }
    // SAFETY: as above.
    let _back = Back(unsafe { libc::setfsuid(user) });
    what()
}

/// `renameat2`.
pub fn rename(from: &Path, to: &Path, flags: libc::c_uint) -> io::Result<()> {
    let (from, to, at) = (c_path(from)?, c_path(to)?, libc::AT_FDCWD);
    // SAFETY: both paths outlive the call.
    check(unsafe { libc::renameat2(at, from.as_ptr(), at, to.as_ptr(), flags) })
}

/// `lseek`.
pub fn seek(file: &File, offset: i64, whence: libc::c_int) -> io::Result<u64> {
    // SAFETY: the descriptor is open as long as `file` is borrowed.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

/// `setxattr`.
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (c_path(path)?, CString::new(name)?);
    // SAFETY: the strings and the value outlive the call, and the length is the value's.
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
}

/// `fsetxattr`.
pub fn set_xattr_of(file: &File, name: &str, value: &[u8]) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the string and the value outlive the call, and the length is the value's.
    check(unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
}

/// `removexattr`.
pub fn remove_xattr(path: &Path, name: &str) -> io::Result<()> {
    let (path, name) = (c_path(path)?, CString::new(name)?);
    // SAFETY: the strings outlive the call.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
}

/// `getxattr`.
pub fn get_xattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let (path, name, mut value) = (c_path(path)?, CString::new(name)?, vec![0u8; 65_536]);
    // SAFETY: the strings and the buffer outlive the call, and the length is the buffer's.
    let n = count(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })?;
    value.truncate(n);
    Ok(value)
}

/// `fgetxattr`.
pub fn get_xattr_of(file: &File, name: &str) -> io::Result<Vec<u8>> {
    let (name, mut value) = (CString::new(name)?, vec![0u8; 65_536]);
    // SAFETY: the string and the buffer outlive the call, and the length is the buffer's.
    let n = count(unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })?;
    value.truncate(n);
    Ok(value)
}

/// `setxattr` with flags (`XATTR_CREATE` …) and a name as it is.
pub fn set_xattr_how(path: &Path, name: &[u8], value: &[u8], flags: libc::c_int) -> io::Result<()> {
    let (path, name) = (c_path(path)?, CString::new(name)?);
    // SAFETY: the strings and the value outlive the call, and the length is the value's.
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) })
}

/// `getxattr` into a buffer of some size; returns what the call does (the length of the value).
pub fn get_xattr_into(path: &Path, name: &[u8], size: usize) -> io::Result<usize> {
    let (path, name, mut value) = (c_path(path)?, CString::new(name)?, vec![0u8; size]);
    let place = if size == 0 { std::ptr::null_mut() } else { value.as_mut_ptr() };
    // SAFETY: the strings and the buffer outlive the call, and the length is the buffer's.
    count(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), place.cast(), size) })
}

/// `listxattr` into a buffer of some size; returns what the call does (the length of the list).
pub fn list_xattr_into(path: &Path, size: usize) -> io::Result<usize> {
    let (path, mut list) = (c_path(path)?, vec![0u8; size]);
    let place = if size == 0 { std::ptr::null_mut() } else { list.as_mut_ptr() };
    // SAFETY: the path and the buffer outlive the call, and the length is the buffer's.
    count(unsafe { libc::listxattr(path.as_ptr(), place.cast(), size) })
}

/// `FS_IOC_GETVERSION`: the generation of an open file's inode.
pub fn generation(file: &File) -> io::Result<u32> {
    // As all kernels and programs have it, the number speaks of a `long`, and an `int` is written.
    const FS_IOC_GETVERSION: u64 = 0x8008_7601;
    let mut generation = [0u32; 2];
    // SAFETY: the descriptor is open, and the place has room for a `long`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETVERSION as _, generation.as_mut_ptr()) })?;
    Ok(generation[0])
}

/// `pathconf`.
pub fn path_limit(path: &Path, name: libc::c_int) -> io::Result<i64> {
    let path = c_path(path)?;
    // SAFETY: the path outlives the call.
    let limit = unsafe { libc::pathconf(path.as_ptr(), name) };
    if limit < 0 { Err(io::Error::last_os_error()) } else { Ok(limit) }
}

/// `statx` of a path, with everything that it may tell.
pub fn statx(path: &Path) -> io::Result<libc::statx> {
    let path = c_path(path)?;
    let (flags, all) = (libc::AT_SYMLINK_NOFOLLOW, libc::STATX_BASIC_STATS | libc::STATX_BTIME);
    // SAFETY: a structure of numbers, for which zeros are a value; path and structure outlive the call.
    unsafe {
        let mut found: libc::statx = std::mem::zeroed();
        check(libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, all, &raw mut found))?;
        Ok(found)
    }
}

fn names(list: &[u8]) -> Vec<String> {
    let names = list.split(|b| *b == 0).filter(|n| !n.is_empty());
    let mut names: Vec<_> = names.map(|n| String::from_utf8_lossy(n).into_owned()).collect();
    names.sort();
    names
}

/// `listxattr`, sorted.
pub fn list_xattr(path: &Path) -> io::Result<Vec<String>> {
    let (path, mut list) = (c_path(path)?, vec![0u8; 65_536]);
    // SAFETY: the path and the buffer outlive the call, and the length is the buffer's.
    let n = count(unsafe { libc::listxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) })?;
    Ok(names(&list[..n]))
}

/// `flistxattr`, sorted.
pub fn list_xattr_of(file: &File) -> io::Result<Vec<String>> {
    let mut list = vec![0u8; 65_536];
    // SAFETY: the buffer outlives the call, and the length is the buffer's.
    let n = count(unsafe { libc::flistxattr(file.as_raw_fd(), list.as_mut_ptr().cast(), list.len()) })?;
    Ok(names(&list[..n]))
}

/// `access`.
pub fn access(path: &Path, mode: libc::c_int) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path outlives the call.
    check(unsafe { libc::access(path.as_ptr(), mode) })
}

/// `utimensat` of the modification time, in nanoseconds since 1970; the access time stays.
pub fn set_mtime(path: &Path, nanoseconds: i64) -> io::Result<()> {
    let path = c_path(path)?;
    let times = [
        libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
        libc::timespec { tv_sec: nanoseconds.div_euclid(1_000_000_000), tv_nsec: nanoseconds.rem_euclid(1_000_000_000) },
    ];
    // SAFETY: the path and the two times outlive the call.
    check(unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW) })
}

/// An open directory, whose listing can be begun again.
pub struct Directory(*mut libc::DIR);

// SAFETY: a DIR may be used from any one thread at a time; it is owned here and only used through `&mut`.
unsafe impl Send for Directory {}

impl Directory {
    /// `opendir`.
    pub fn open(path: &Path) -> io::Result<Directory> {
        let path = c_path(path)?;
        // SAFETY: the path outlives the call.
        let dir = unsafe { libc::opendir(path.as_ptr()) };
        if dir.is_null() { Err(io::Error::last_os_error()) } else { Ok(Directory(dir)) }
    }

    /// `fdopendir`.
    pub fn of(file: File) -> io::Result<Directory> {
        let fd = file.into_raw_fd();
        // SAFETY: the descriptor is open, and nobody else's now.
        let dir = unsafe { libc::fdopendir(fd) };
        if dir.is_null() { Err(io::Error::last_os_error()) } else { Ok(Directory(dir)) }
    }

    fn fd(&self) -> libc::c_int {
        // SAFETY: the DIR is open as long as `self` lives.
        unsafe { libc::dirfd(self.0) }
    }

    /// `openat`.
    pub fn open_file(&self, name: &str, flags: libc::c_int) -> io::Result<File> {
        let name = CString::new(name)?;
        // SAFETY: the name outlives the call; the descriptor that comes back is new and ours alone.
        unsafe {
            let fd = libc::openat(self.fd(), name.as_ptr(), flags | libc::O_CLOEXEC);
            check(fd)?;
            Ok(File::from_raw_fd(fd))
        }
    }

    /// `faccessat`, with the rights that this thread has now.
    pub fn access(&self, name: &str, mode: libc::c_int) -> io::Result<()> {
        let name = CString::new(name)?;
        // SAFETY: the name outlives the call.
        check(unsafe { libc::faccessat(self.fd(), name.as_ptr(), mode, libc::AT_EACCESS) })
    }

    /// `rewinddir`.
    pub fn rewind(&mut self) {
        // SAFETY: the DIR is open as long as `self` lives.
        unsafe { libc::rewinddir(self.0) }
    }

    /// `telldir`: where the next entry is.
    pub fn tell(&mut self) -> i64 {
        // SAFETY: the DIR is open as long as `self` lives.
        unsafe { libc::telldir(self.0) }
    }

    /// `seekdir`, to where [`Self::tell`] has been.
    pub fn seek(&mut self, place: i64) {
        // SAFETY: the DIR is open as long as `self` lives; a place that is none is the file system's affair.
        unsafe { libc::seekdir(self.0, place) };
    }

    /// The next name and its inode number; `None` at the end.
    pub fn next_entry(&mut self) -> io::Result<Option<(Vec<u8>, u64)>> {
        nix::errno::Errno::clear();
        // SAFETY: the DIR is open as long as `self` lives.
        let entry = unsafe { libc::readdir64(self.0) };
        if entry.is_null() {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(0) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the entry is valid until the next call, and its name ends with a zero.
        let (name, ino) = unsafe { (std::ffi::CStr::from_ptr((*entry).d_name.as_ptr()), (*entry).d_ino) };
        Ok(Some((name.to_bytes().to_vec(), ino)))
    }

    /// All names but `.` and `..`, from the beginning.
    pub fn names(&mut self) -> io::Result<Vec<Vec<u8>>> {
        self.rewind();
        let mut names = Vec::new();
        while let Some((name, _)) = self.next_entry()? {
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        Ok(names)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // SAFETY: it is open, and nobody uses it any more.
        unsafe { libc::closedir(self.0) };
    }
}

/// A scratch file in memory.
pub fn memory_file() -> io::Result<File> {
    // SAFETY: the name is a C string; the descriptor that comes back is new and ours alone.
    unsafe {
        let fd = libc::memfd_create(c"scratch".as_ptr(), libc::MFD_CLOEXEC);
        check(fd)?;
        Ok(File::from_raw_fd(fd))
    }
}

/// A mapping of a file.
pub struct Mapping {
    start: *mut libc::c_void,
    len: usize,
    scratch: File,
}

// SAFETY: the mapping is owned, and touched by the kernel only.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len` bytes from the beginning (at least one), which may reach beyond the file's end.
    pub fn new(file: &File, len: usize, write: bool) -> io::Result<Mapping> {
        Mapping::with(file, len, libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 }, libc::MAP_SHARED)
    }

    /// The same, but what is stored into it stays there (`MAP_PRIVATE`). The file need not be open for writing.
    pub fn private(file: &File, len: usize) -> io::Result<Mapping> {
        Mapping::with(file, len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)
    }

    fn with(file: &File, len: usize, rights: libc::c_int, how: libc::c_int) -> io::Result<Mapping> {
        let scratch = memory_file()?;
        // SAFETY: a new mapping at a place of the kernel's choice; nothing else can be there.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len.max(1), rights, how, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Mapping { start, len: len.max(1), scratch }) }
    }

    fn place(&self, offset: usize, len: usize) -> *mut libc::c_void {
        assert!(offset + len <= self.len, "outside of the mapping");
        // SAFETY: just checked to be inside.
        unsafe { self.start.byte_add(offset) }
    }

    /// Reads from it.
    pub fn load(&self, offset: usize, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let place = self.place(offset + done, len - done);
            // SAFETY: the kernel checks the place, which is inside of the mapping; nothing of ours is written.
            done += count(unsafe { libc::pwrite(self.scratch.as_raw_fd(), place, len - done, done as i64) })?;
        }
        std::os::unix::fs::FileExt::read_exact_at(&self.scratch, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// Writes to it.
    pub fn store(&mut self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(&self.scratch, bytes, 0)?;
        let mut done = 0;
        while done < bytes.len() {
            let place = self.place(offset + done, bytes.len() - done);
            // SAFETY: the kernel writes only inside of the mapping, to which nothing in this program refers.
            let n = count(unsafe { libc::pread(self.scratch.as_raw_fd(), place, bytes.len() - done, done as i64) })?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += n;
        }
        Ok(())
    }

    /// `msync(MS_SYNC)` of all of it.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: the mapping is there as long as `self` lives.
        check(unsafe { libc::msync(self.start, self.len, libc::MS_SYNC) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is there, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// Which of the three kinds of file locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// `flock`: the whole file, owned by the open file.
    Flock,
    /// `fcntl(F_SETLK)`: a range, owned by the process.
    Process,
    /// `fcntl(F_OFD_SETLK)`: a range, owned by the open file.
    OpenFile,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// To give it up.
    Unlock,
}

/// Locks or unlocks a range (`len` 0: to the end, however far that moves); `flock` knows only whole files.
pub fn lock(file: &File, kind: LockKind, mode: LockMode, start: u64, len: u64, wait: bool) -> io::Result<()> {
    let fd = file.as_raw_fd();
    if kind == LockKind::Flock {
        let how = match mode {
            LockMode::Read => libc::LOCK_SH,
            LockMode::Write => libc::LOCK_EX,
            LockMode::Unlock => libc::LOCK_UN,
        };
        // SAFETY: the descriptor is open as long as `file` is borrowed.
        return check(unsafe { libc::flock(fd, how | if wait { 0 } else { libc::LOCK_NB }) });
    }
    let command = match (kind, wait) {
        (LockKind::Process, false) => libc::F_SETLK,
        (LockKind::Process, true) => libc::F_SETLKW,
        (_, false) => libc::F_OFD_SETLK,
        (_, true) => libc::F_OFD_SETLKW,
    };
    let lock = region(mode, start, len);
    // SAFETY: the descriptor is open, and the description outlives the call.
    check(unsafe { libc::fcntl(fd, command, &raw const lock) })
}

fn region(mode: LockMode, start: u64, len: u64) -> libc::flock {
    let l_type = match mode {
        LockMode::Read => libc::F_RDLCK,
        LockMode::Write => libc::F_WRLCK,
        LockMode::Unlock => libc::F_UNLCK,
    };
    libc::flock {
        l_type: l_type as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as i64,
        l_len: len as i64,
        l_pid: 0,
    }
}

/// `F_GETLK`: a lock of another process that is in the way, as (mode, start, length, process).
pub fn lock_in_the_way(file: &File, mode: LockMode, start: u64, len: u64) -> io::Result<Option<(LockMode, u64, u64, i32)>> {
    let mut lock = region(mode, start, len);
    // SAFETY: the descriptor is open, and the description outlives the call, which may change it.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) })?;
    let mode = match i32::from(lock.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => LockMode::Read,
        _ => LockMode::Write,
    };
    Ok(Some((mode, lock.l_start as u64, lock.l_len as u64, lock.l_pid)))
}

/// Whether a program is there to be run: in `$PATH`, or where Debian keeps PostgreSQL's.
#[must_use]
pub fn is_installed(program: &str) -> bool {
    let mut places: Vec<std::path::PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    for version in std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        places.push(version.path().join("bin"));
    }
    places.iter().any(|place| place.join(program).exists())
}

/// What the machine forbids beside what file permissions do, of which the oracle has not heard: settings that are not 0.
#[must_use]
pub fn protections() -> Vec<String> {
    let paths = ["symlinks", "regular", "fifos"].map(|what| format!("/proc/sys/fs/protected_{what}"));
    let is_set = |path: &String| !std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
    paths.into_iter().filter(is_set).collect()
}
