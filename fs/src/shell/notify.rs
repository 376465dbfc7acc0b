//! Telling the kernel that something which it believes is no longer so.
//!
//! Two kinds of notification are used. Attribute-only invalidation never waits for a lock in the kernel: it is sent at once,
//! from wherever a token is given up, before that is acknowledged. Purging pages waits for page locks, which the kernel holds
//! during READ and WRITE requests that may in turn wait for a token: it is done by threads of its own, and only the answer to
//! one GETATTR (which holds no page lock) ever waits for it. Names are not taken back at all, they run out (`known`).
//!
//! Invariants:
//! - No thread that serves requests or gives up tokens purges pages.
//! - Queues are bounded: who must have a purge waits for room without blocking a thread; who merely would like one drops it.
//!
//! Excludes: who needs to be told what (`known`).

use super::known::{Known, Refresh, Revocation};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Purges that may wait in a lane.
const QUEUE_MAX: usize = 1024;
/// The kernel may still be about to take in an answer that was sent just before a revocation; it is told again after these
/// delays. Milliseconds; longer than any delay in scheduling a woken thread that is not itself a failure.
const AGAIN_MS: [u64; 8] = [1, 2, 5, 10, 20, 50, 100, 300];

/// When pages that nobody asked about since they became old are purged, and how long to wait if that is not possible just then.
const REFRESH_AFTER: Duration = Duration::from_millis(30);
const REFRESH_RETRY: Duration = Duration::from_millis(3);

const FUSE_NOTIFY_INVAL_INODE: i32 = 2;

/// The mount's own descriptor of /dev/fuse, for notifications that `fuser` does not know or whose result it hides.
#[derive(Debug)]
pub(crate) struct Device(File);

impl Device {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Device(File::from(fd))
    }

    /// A notification is an answer to request 0 with its code in the place of the error.
    fn send(&self, code: i32, body: &[u64]) -> io::Result<()> {
        let mut message = Vec::with_capacity(16 + body.len() * 8);
        let length = u32::try_from(16 + body.len() * 8).unwrap_or(u32::MAX);
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&code.to_ne_bytes());
        message.extend_from_slice(&0u64.to_ne_bytes());
        for word in body {
            message.extend_from_slice(&word.to_ne_bytes());
        }
        (&self.0).write(&message).map(|_| ())
    }

    /// Makes the kernel ask for the attributes anew. Never waits. Returns whether the kernel has the inode.
    pub(crate) fn forget_attributes(&self, ino: u64) -> io::Result<bool> {
        known(self.send(FUSE_NOTIFY_INVAL_INODE, &[ino, -1i64 as u64, 0]))
    }

    /// Whether requests wait in the kernel's queue.
    fn has_requests(&self) -> bool {
        poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Drops all pages (and attributes). Waits for requests that hold pages.
    fn purge_pages(&self, ino: u64) -> io::Result<bool> {
        known(self.send(FUSE_NOTIFY_INVAL_INODE, &[ino, 0, 0]))
    }
}

fn known(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[derive(Debug)]
enum Job {
    /// Purge, and say so.
    Purge(u64, oneshot::Sender<()>),
    /// Purge if that is to be done just now; tells what was.
    Refresh(u64, Revocation, Arc<Known>, oneshot::Sender<Refresh>),
}

/// The notifier of one mount. Its threads end when it is dropped.
#[derive(Debug)]
pub(crate) struct Notify {
    device: Arc<Device>,
    /// For answers that wait for a purge.
    urgent: mpsc::Sender<Job>,
    /// For memory mappings, which have no right to be coherent.
    casual: mpsc::Sender<Job>,
    /// Room for refreshes that wait for their time.
    refreshes: Arc<Semaphore>,
    runtime: Handle,
}

impl Notify {
    pub(crate) fn new(fd: OwnedFd, runtime: Handle) -> io::Result<Self> {
        let device = Arc::new(Device::new(fd));
        let (urgent, urgent_jobs) = mpsc::channel(QUEUE_MAX);
        let (casual, casual_jobs) = mpsc::channel(QUEUE_MAX);
        lane("pulsar-purge", device.clone(), urgent_jobs)?;
        lane("pulsar-refresh", device.clone(), casual_jobs)?;
        Ok(Notify { device, urgent, casual, refreshes: Arc::new(Semaphore::new(QUEUE_MAX)), runtime })
    }

    /// Takes attributes back, at once. `looked_up`: whether the kernel was given the inode and did not forget it.
    pub(crate) fn forget_attributes(&self, ino: u64, looked_up: impl Fn() -> bool + Send + 'static) {
        match self.device.forget_attributes(ino) {
            Ok(true) => {}
            // The kernel has not yet made the inode of the answer that it was sent.
            Ok(false) if looked_up() => {
                let device = self.device.clone();
                self.runtime.spawn(async move {
                    for delay in AGAIN_MS {
                        tokio::time::sleep(Duration::from_millis(delay)).await;
                        if !looked_up() || device.forget_attributes(ino).unwrap_or(true) {
                            return;
                        }
                    }
                });
            }
            Ok(false) => {}
            Err(error) => tracing::debug!(ino, %error, "cannot invalidate attributes"),
        }
    }

    /// Purges the pages of an inode, and waits until that is done.
    pub(crate) async fn purge(&self, ino: u64) {
        let (done, wait) = oneshot::channel();
        if self.urgent.send(Job::Purge(ino, done)).await.is_ok() {
            let _ = wait.await;
        }
    }

    /// Purges the pages of revoked inodes some time soon for the sake of memory mappings, unless there is too much to do.
    ///
    /// A purge invalidates attributes, too, and so makes the kernel drop answers that are on their way to it (see `known`). So it
    /// is done only for what no answer has purged after a while, and while no request waits, here or in the kernel's queue.
    pub(crate) fn refresh(&self, mut inodes: Vec<(u64, Revocation)>, known: Arc<Known>) {
        if inodes.is_empty() {
            return;
        }
        let Ok(permit) = self.refreshes.clone().try_acquire_owned() else { return };
        let casual = self.casual.clone();
        self.runtime.spawn(async move {
            let _permit = permit;
            tokio::time::sleep(REFRESH_AFTER).await;
            while let Some((ino, revocation)) = inodes.last() {
                let (answer, wait) = oneshot::channel();
                // Decided by the thread that purges, just before it does.
                if casual.send(Job::Refresh(*ino, *revocation, known.clone(), answer)).await.is_err() {
                    return;
                }
                match wait.await {
                    Ok(Refresh::Later(wait)) => tokio::time::sleep(wait).await,
                    Ok(Refresh::Now | Refresh::Needless) => drop(inodes.pop()),
                    Err(_) => return,
                }
            }
        });
    }
}

fn lane(name: &str, device: Arc<Device>, mut jobs: mpsc::Receiver<Job>) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        while let Some(job) = jobs.blocking_recv() {
            match job {
                Job::Purge(ino, done) => {
                    purge(&device, ino);
                    let _ = done.send(());
                }
                Job::Refresh(ino, revocation, known, answer) => {
                    let what = match known.refresh(ino, revocation) {
                        Refresh::Now if device.has_requests() => Refresh::Later(REFRESH_RETRY),
                        what => what,
                    };
                    if what == Refresh::Now {
                        purge(&device, ino);
                    }
                    let _ = answer.send(what);
                }
            }
        }
    })?;
    Ok(())
}

fn purge(device: &Device, ino: u64) {
    if let Err(error) = device.purge_pages(ino) {
        tracing::debug!(ino, %error, "cannot purge pages");
    }
}
