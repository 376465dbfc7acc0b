//! `FileDevice`: a file or a block device as a disk.
//!
//! Uses O_DIRECT where the file system allows it, else ordinary I/O; `flush` is fdatasync in both cases. A small pool of
//! threads does the calls: this is the one type of the crate that uses threads and the operating system.
//!
//! Excludes: what to do after an error (`disk` faults and never tries again).

use crate::api::BlockDevice;
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BoxFuture};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use tokio::sync::oneshot;

/// Threads per device: reads and writes that are under way at once.
const THREADS: usize = 4;
/// Calls that wait; more block their caller's task only by memory of the request itself, so this bounds the queue.
const QUEUE_MAX: usize = 1024;

/// Memory aligned for direct I/O.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; BLOCK_SIZE]);

struct Aligned(Vec<Page>);

impl Aligned {
    fn zeroed(blocks: usize) -> Aligned {
        Aligned(vec![Page([0; BLOCK_SIZE]); blocks])
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `Page` is exactly BLOCK_SIZE plain bytes without padding, so the pages are one run of initialised bytes,
        // borrowed as long as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u8>(), self.0.len() * BLOCK_SIZE) }
    }
}

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: as in `bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<u8>(), self.0.len() * BLOCK_SIZE) }
    }
}

type Job = Box<dyn FnOnce(&File) + Send>;

/// See the module.
pub struct FileDevice {
    path: PathBuf,
    blocks: u64,
    direct: bool,
    jobs: mpsc::SyncSender<Job>,
    _lock: Option<Flock<File>>,
}

impl FileDevice {
    /// Makes a sparse file of a size (rounded down to whole blocks) and opens it.
    ///
    /// # Errors
    /// If it exists, or cannot be made.
    pub fn create(path: impl AsRef<Path>, bytes: u64) -> io::Result<FileDevice> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        file.set_len(bytes / BLOCK_SIZE as u64 * BLOCK_SIZE as u64)?;
        file.sync_all()?;
        // The name must survive a power failure, too.
        let parent = path.as_ref().parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()?;
        Self::open(path)
    }

    /// Opens a file or a block device.
    ///
    /// # Errors
    /// If it is neither, is in use by another daemon, or cannot be opened for reading and writing.
    pub fn open(path: impl AsRef<Path>) -> io::Result<FileDevice> {
        Self::open_with(path, true)
    }

    /// Opens it for reading only (no lock is taken: for checking disks of a stopped cluster).
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open_read_only(path: impl AsRef<Path>) -> io::Result<FileDevice> {
        Self::open_with(path, false)
    }

    fn open_with(path: impl AsRef<Path>, write: bool) -> io::Result<FileDevice> {
        let path = path.as_ref().to_path_buf();
        let kind = std::fs::metadata(&path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(write);
        // A block device that is mounted or in use is refused by O_EXCL.
        let exclusive = if kind.is_block_device() && write { nix::libc::O_EXCL } else { 0 };
        let direct = options.clone().custom_flags(nix::libc::O_DIRECT | exclusive).open(&path).ok().filter(works);
        let is_direct = direct.is_some();
        let file = match direct {
            Some(file) => file,
            None => options.custom_flags(exclusive).open(&path)?,
        };
        let lock = if write {
            // The lock belongs to the open file, which the copy shares.
            let held = Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock);
            Some(held.map_err(|(_, e)| match e {
                nix::errno::Errno::EWOULDBLOCK => {
                    io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is in use by another process", path.display()))
                }
                e => e.into(),
            })?)
        } else {
            None
        };
        use std::io::Seek;
        let bytes = (&file).seek(io::SeekFrom::End(0))?;
        let file = Arc::new(file);
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE_MAX);
        let queue = Arc::new(Mutex::new(queue));
        for i in 0..THREADS {
            let (file, queue) = (Arc::clone(&file), Arc::clone(&queue));
            let name = format!("disk-{i}");
            std::thread::Builder::new().name(name).spawn(move || {
                loop {
                    // The lock is held while waiting: the other threads wait behind it, and each gets the next job.
                    let job = match queue.lock() {
                        Ok(queue) => queue.recv(),
                        Err(_) => return,
                    };
                    match job {
                        Ok(job) => job(&file),
                        // The device was dropped.
                        Err(_) => return,
                    }
                }
            })?;
        }
        Ok(FileDevice { path, blocks: bytes / BLOCK_SIZE as u64, direct: is_direct, jobs, _lock: lock })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether direct I/O is used.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce(&File) -> io::Result<T> + Send + 'static) -> BoxFuture<'_, io::Result<T>> {
        let (tx, rx) = oneshot::channel();
        let job: Job = Box::new(move |file| {
            let _ = tx.send(job(file));
        });
        let sent = self.jobs.send(job);
        Box::pin(async move {
            sent.map_err(|_| io::Error::other("the disk's threads have ended"))?;
            rx.await.map_err(|_| io::Error::other("a disk thread has ended"))?
        })
    }

    fn check(&self, at: u64, count: u64) -> io::Result<u64> {
        match at.checked_add(count) {
            Some(end) if end <= self.blocks => Ok(at * BLOCK_SIZE as u64),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }
}

/// Whether direct reads work: some file systems accept the flag and refuse the read.
fn works(file: &File) -> bool {
    let mut page = Aligned::zeroed(1);
    file.read_at(page.bytes_mut(), 0).is_ok()
}

impl BlockDevice for FileDevice {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn read(&self, at: u64, count: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        let offset = match self.check(at, count as u64) {
            Ok(offset) => offset,
            Err(e) => return Box::pin(std::future::ready(Err(e))),
        };
        self.run(move |file| {
            let mut pages = Aligned::zeroed(count);
            file.read_exact_at(pages.bytes_mut(), offset)?;
            Ok(Bytes::from_owner(pages))
        })
    }

    fn write(&self, at: u64, parts: Vec<Bytes>) -> BoxFuture<'_, io::Result<()>> {
        let length: usize = parts.iter().map(Bytes::len).sum();
        let offset = match self.check(at, (length / BLOCK_SIZE) as u64) {
            Ok(offset) if length.is_multiple_of(BLOCK_SIZE) => offset,
            Ok(_) => return Box::pin(std::future::ready(Err(io::Error::new(io::ErrorKind::InvalidInput, "not whole blocks")))),
            Err(e) => return Box::pin(std::future::ready(Err(e))),
        };
        self.run(move |file| {
            // Direct I/O wants aligned memory, which blocks from the network are not: one copy here.
            let mut pages = Aligned::zeroed(length / BLOCK_SIZE);
            let mut to = pages.bytes_mut();
            for part in &parts {
                let (now, rest) = to.split_at_mut(part.len());
                now.copy_from_slice(part);
                to = rest;
            }
            file.write_all_at(pages.as_ref(), offset)
        })
    }

    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        self.run(File::sync_data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read_and_the_end_is_guarded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let device = FileDevice::create(&path, 1 << 20).unwrap();
        assert_eq!(device.blocks(), 256);
        let data = Bytes::from((0..3 * BLOCK_SIZE).map(|i| (i / 7) as u8).collect::<Vec<_>>());
        // Parts that are not aligned in memory.
        let odd = Bytes::from([&[0; 3][..], &data].concat()).slice(3..);
        device.write(5, vec![odd.slice(..BLOCK_SIZE), odd.slice(BLOCK_SIZE..)]).await.unwrap();
        device.flush().await.unwrap();
        assert_eq!(device.read(5, 3).await.unwrap(), data);
        assert_eq!(device.read(8, 1).await.unwrap(), Bytes::from(vec![0; BLOCK_SIZE]));
        assert!(device.read(255, 2).await.is_err());
        assert!(device.write(256, vec![data.slice(..BLOCK_SIZE)]).await.is_err());
        assert!(device.write(u64::MAX, vec![data.slice(..BLOCK_SIZE)]).await.is_err());
        assert!(FileDevice::open(&path).is_err(), "in use");
        let reader = FileDevice::open_read_only(&path).unwrap();
        assert_eq!(reader.read(5, 3).await.unwrap(), data);
        assert!(reader.write(0, vec![data.slice(..BLOCK_SIZE)]).await.is_err());
        drop(device);
        assert!(FileDevice::open(dir.path()).is_err());
        assert!(FileDevice::create(&path, 1).is_err(), "exists");
    }
}
