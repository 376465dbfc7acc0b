//! Telling the kernel that something which it believes is no longer so.
//!
//! Two kinds of notification are used. Attribute-only invalidation never waits for a lock in the kernel: it is sent at once,
//! from wherever a token is given up, before that is acknowledged. Purging pages waits for page locks, which the kernel holds
//! during READ and WRITE requests that may in turn wait for a token: it is done by threads of its own, and only the answer to
//! a GETATTR (which holds no page lock) ever waits for it. Names are not taken back at all, they run out (`known`).
//!
//! A purge makes the kernel lose the answers that are on their way to it, that of the GETATTR too for which it is done. So
//! before it the kernel is made to take in what this GETATTR is to be told: a thread of ours asks for the attributes, through
//! the mount, until the kernel is seen to have them (`probe`). Then losing the others harms nobody.
//!
//! Invariants:
//! - No thread that serves requests or gives up tokens purges pages, or asks the kernel. Those that do can be killed (`apart`).
//! - Queues are bounded: who must have a purge waits for room without blocking a thread; who merely would like one drops it.
//!
//! Excludes: who needs to be told what (`known`).

use super::apart::set_apart;
use super::known::{Data, Known, Refresh, Revocation, Seen, spread};
use super::probe::{self, Device as Number, Probe, Unseen};
use super::syscall;
use fuser::INodeNo;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::gettid;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, Semaphore, mpsc, oneshot};

/// Purges that may wait in a lane.
const QUEUE_MAX: usize = 1024;
/// Threads for purges that answers wait for, each for a part of the inodes: where one waits for a token others need not.
const LANES: usize = 16;
/// How often in a row the kernel is asked until it has what it was told. While a thread sets the file's size it takes in nothing.
/// Where other nodes change the file, too, each time costs its token.
const ASKED_MAX: usize = 3;
/// Pause between two such rows, in which others have their turn. Nothing tells when the kernel has set a size.
const ASK_AGAIN: Duration = Duration::from_millis(1);
/// Rows after which it need only have the size, and after which it is borne with that somebody who does not get to run may still
/// undo it.
const PATIENT_MAX: usize = 3;
/// Rows after which a larger size will do, if the file is being changed: it may be that of a write that has just ended. Before, it
/// is more likely one that another node has cut.
const EQUAL_MAX: usize = 100;
/// Rows after which a program that is to be shown attributes is answered in any case: while a call makes a large file, or cuts one, the
/// kernel takes nothing in, but what `stat` shows is the answer itself. (Who opens the file is judged by what it has taken in.)
const SHOWN_AFTER: usize = 150;
/// Rows after which it is given up, unless the file's data is being changed, which can take as long as a token does.
const ROWS_MAX: usize = 1000;

/// The kernel may still be about to take in an answer that was sent just before a revocation; it is told again after these
/// delays. Milliseconds; longer than any delay in scheduling a woken thread that is not itself a failure.
const AGAIN_MS: [u64; 8] = [1, 2, 5, 10, 20, 50, 100, 300];
/// The first few of them have passed: who gives a token up had better wait so long.
const AGAIN_SOON: Duration = Duration::from_millis(10);

/// When pages that nobody asked about since they became old are purged, and how long to wait if that is not possible just then.
const REFRESH_AFTER: Duration = Duration::from_millis(30);

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
        has_inode(self.send(FUSE_NOTIFY_INVAL_INODE, &[ino, -1i64 as u64, 0]))
    }

    /// Whether requests wait in the kernel's queue.
    fn has_requests(&self) -> bool {
        poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Drops all pages (and attributes). Waits for requests that hold pages.
    fn purge_pages(&self, ino: u64) -> io::Result<bool> {
        has_inode(self.send(FUSE_NOTIFY_INVAL_INODE, &[ino, 0, 0]))
    }
}

fn has_inode(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the kernel is to take in.
#[derive(Clone, Copy, Debug)]
struct Renewal {
    ino: u64,
    told: Data,
    /// Whatever it has.
    anew: bool,
    /// All of it, not just the size.
    whole: bool,
    /// That others may still undo it is not borne with.
    patient: bool,
    /// A larger size will not do.
    equal: bool,
}

#[derive(Debug)]
enum Job {
    /// Make the kernel take in a version and purge what is older; tells whether it has.
    Renew(Renewal, oneshot::Sender<Result<bool, Unseen>>),
    /// Make the kernel take in what an inode is; tells whether it has, and (if so it is wanted) nobody may undo it.
    Look(u64, bool, oneshot::Sender<Result<bool, Unseen>>),
    /// Ask for the root.
    Greet(oneshot::Sender<Result<(), Unseen>>),
    /// Purge if that is to be done just now; tells what was.
    Refresh(u64, Revocation, oneshot::Sender<Refresh>),
}

/// The notifier of one mount. Its threads end when it is dropped.
#[derive(Debug)]
pub(crate) struct Notify {
    device: Arc<Device>,
    /// For answers that wait for a purge.
    urgent: Vec<mpsc::Sender<Job>>,
    /// Their threads' numbers.
    threads: Arc<[AtomicU32; LANES]>,
    /// A request of theirs was recognised.
    recognises: AtomicBool,
    /// They have asked for the root, and were.
    greeted: OnceCell<()>,
    /// For memory mappings, which have no right to be coherent.
    casual: mpsc::Sender<Job>,
    /// Room for refreshes that wait for their time.
    refreshes: Arc<Semaphore>,
    probe: Arc<Probe>,
    known: Arc<Known>,
    runtime: Handle,
}

impl Notify {
    pub(crate) fn new(fd: OwnedFd, known: &Arc<Known>, directory: Option<PathBuf>, runtime: Handle) -> io::Result<Self> {
        let probe = Arc::new(Probe::new(directory));
        let device = Arc::new(Device::new(fd));
        let threads: Arc<[AtomicU32; LANES]> = Arc::default();
        let lane = |name: &str, number: Option<usize>| {
            let (sender, jobs) = mpsc::channel(QUEUE_MAX);
            let (ready, started) = std::sync::mpsc::channel();
            let (fd, known, probe, threads) = (device.0.as_raw_fd(), known.clone(), probe.clone(), threads.clone());
            std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                let thread = gettid().as_raw() as u32;
                if let Some(number) = number {
                    threads[number].store(thread, Ordering::SeqCst);
                }
                match set_apart(fd) {
                    Ok(own) => {
                        let _ = ready.send(Ok(()));
                        Lane { device: Device::new(own), known, probe, thread }.run(jobs);
                    }
                    Err(error) => _ = ready.send(Err(error)),
                }
            })?;
            // Until then it needs the descriptor.
            started.recv().map_err(io::Error::other)?.map_err(|error| {
                let what = "no thread can ask the kernel (the daemon itself must be able to open /dev/fuse)";
                io::Error::new(error.kind(), format!("{what}: {error}"))
            })?;
            Ok::<_, io::Error>(sender)
        };
        let urgent = (0..LANES).map(|n| lane(&format!("pulsar-purge-{n}"), Some(n))).collect::<io::Result<_>>()?;
        let casual = lane("pulsar-refresh", None)?;
        let refreshes = Arc::new(Semaphore::new(QUEUE_MAX));
        let (recognises, greeted) = (AtomicBool::new(false), OnceCell::new());
        Ok(Notify { device, urgent, threads, recognises, greeted, casual, refreshes, probe, known: known.clone(), runtime })
    }

    /// The mount is served, as this device.
    pub(crate) fn found(&self, device: Number) {
        self.probe.found(device);
    }

    /// Whether a request comes from a thread of ours.
    pub(crate) fn recognise(&self, thread: u32) -> bool {
        let is_ours = self.threads.iter().any(|t| t.load(Ordering::SeqCst) == thread);
        if is_ours && !self.recognises.load(Ordering::Relaxed) {
            self.recognises.store(true, Ordering::SeqCst);
        }
        is_ours
    }

    /// Whether requests of our own threads are recognised. They are not if the kernel names threads by other numbers than this
    /// process sees: what they ask could then wait for themselves. So before anything waits for them they ask for the root, of
    /// which nothing is ever doubtful.
    async fn can_recognise(&self) -> Result<(), Unseen> {
        // Who comes meanwhile waits for the first one's answer. Without success the next one tries again.
        let greet = || async {
            let (done, wait) = oneshot::channel();
            if self.urgent[0].send(Job::Greet(done)).await.is_ok() {
                wait.await.unwrap_or(Err(Unseen::Now))?;
            }
            self.recognises.load(Ordering::SeqCst).then_some(()).ok_or(Unseen::Ever)
        };
        self.greeted.get_or_try_init(greet).await.copied()
    }

    /// Takes attributes back, at once. `looked_up`: whether the kernel was given the inode and did not forget it. Returns how long to
    /// wait before something is done that relies on this.
    pub(crate) fn forget_attributes(&self, ino: u64, looked_up: impl Fn() -> bool + Send + 'static) -> Duration {
        match self.device.forget_attributes(ino) {
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
                return AGAIN_SOON;
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(ino, %error, "cannot invalidate attributes"),
        }
        Duration::ZERO
    }

    /// Makes the kernel take in this version of a file (or a newer one) and drop pages that are older; waits until that is done.
    /// The answer to a GETATTR that was sent before may be lost then, and harmlessly. `anew`: it is asked even if it has this version;
    /// what else there is may have changed. A `read()` needs only the size.
    ///
    /// # Errors
    /// The kernel cannot be asked. If it never can be, it is taken for granted from now on that it has this version: the answer must
    /// make it so.
    pub(crate) async fn renew(&self, ino: u64, told: Data, anew: bool, for_read: bool, thread: u32) -> Result<(), Unseen> {
        let renewed = match self.can_recognise().await {
            Ok(()) => self.ask_until_taken_in(ino, told, anew, for_read, thread).await,
            Err(unseen) => Err(unseen),
        };
        if renewed == Err(Unseen::Ever) {
            self.known.assume(ino, told.version);
        }
        renewed
    }

    /// Makes the kernel take in what an inode is now: it judges by the owner, and does not ask before.
    pub(crate) async fn look(&self, ino: u64) {
        let looked = async {
            self.can_recognise().await?;
            for row in 0..ROWS_MAX {
                let (done, wait) = oneshot::channel();
                let patient = row < PATIENT_MAX;
                if self.urgent[spread(ino, LANES)].send(Job::Look(ino, patient, done)).await.is_err() {
                    break;
                }
                if wait.await.unwrap_or(Err(Unseen::Now))? {
                    return Ok(());
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Err(Unseen::Now)
        };
        if let Err(unseen) = looked.await {
            // It is gone, or the mount is; or a call that makes the file large, or cuts it, lasts for seconds.
            tracing::debug!(ino, ?unseen, "the kernel could not be made to take in an inode's owner");
        }
    }

    async fn ask_until_taken_in(&self, ino: u64, told: Data, anew: bool, for_read: bool, thread: u32) -> Result<(), Unseen> {
        // What is done for one inode is done by one thread.
        let lane = &self.urgent[spread(ino, LANES)];
        for row in 0.. {
            let (done, wait) = oneshot::channel();
            let patient = row < PATIENT_MAX;
            let renewal = Renewal { ino, told, anew, whole: patient && !for_read, patient, equal: row < EQUAL_MAX };
            if lane.send(Job::Renew(renewal, done)).await.is_err() {
                break;
            }
            if wait.await.unwrap_or(Err(Unseen::Now))? {
                break;
            }
            if row >= SHOWN_AFTER && !for_read && row % SHOWN_AFTER == 0 && syscall::stats(thread).await {
                tracing::debug!(ino, "a file is being changed for long; who is shown its attributes does not wait");
                return Err(Unseen::Now);
            }
            if row >= ROWS_MAX && !self.known.is_changing(ino) {
                tracing::debug!(ino, "the kernel did not take in the attributes that it asked for");
                return Err(Unseen::Now);
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        Ok(())
    }

    /// Purges the pages of revoked inodes some time soon for the sake of memory mappings, unless there is too much to do.
    ///
    /// A purge invalidates attributes, too, and so makes the kernel drop answers that are on their way to it (see `known`). So it
    /// is done only for what no answer has purged after a while, and while no request waits, here or in the kernel's queue.
    pub(crate) fn refresh(&self, mut inodes: Vec<(u64, Revocation)>) {
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
                if casual.send(Job::Refresh(*ino, *revocation, answer)).await.is_err() {
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

/// A thread that tells the kernel what may take a while. It has descriptors of its own (`apart`).
struct Lane {
    device: Device,
    known: Arc<Known>,
    probe: Arc<Probe>,
    thread: u32,
}

impl Lane {
    fn run(&self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.blocking_recv() {
            match job {
                Job::Renew(renewal, done) => {
                    let _ = done.send(self.renew(renewal));
                }
                Job::Look(ino, patient, done) => {
                    let looked = self.look(ino, patient);
                    self.known.hear(ino, self.thread);
                    let _ = done.send(looked);
                }
                Job::Greet(done) => {
                    // The kernel makes the root by itself, of generation 0.
                    let _ = done.send(self.probe.ask(INodeNo::ROOT.0, 0).map(drop));
                }
                Job::Refresh(ino, revocation, answer) => {
                    let what = self.known.refresh(ino, revocation, || !self.device.has_requests());
                    if what == Refresh::Now {
                        self.purge(ino);
                    }
                    let _ = answer.send(what);
                }
            }
        }
    }

    fn renew(&self, renewal: Renewal) -> Result<bool, Unseen> {
        let renewed = self.ask(renewal);
        self.known.hear(renewal.ino, self.thread);
        renewed
    }

    fn look(&self, ino: u64, patient: bool) -> Result<bool, Unseen> {
        // The kernel makes the root by itself, of generation 0.
        let is_root = ino == INodeNo::ROOT.0;
        let Some(generation) = self.known.generation(ino).map(|generation| if is_root { 0 } else { generation }) else {
            return Ok(true);
        };
        let _held = self.known.hold(ino);
        for _ in 0..ASKED_MAX {
            let seen = self.probe.ask(ino, generation)?;
            if seen.has == seen.told {
                if !patient || !self.known.may_be_forced(ino) {
                    return Ok(true);
                }
                self.known.hear_gone(ino, probe::is_gone);
            }
            std::thread::yield_now();
        }
        Ok(false)
    }

    fn ask(&self, renewal: Renewal) -> Result<bool, Unseen> {
        let Renewal { ino, told, anew, whole, patient, equal } = renewal;
        let held = self.known.hold(ino);
        for _ in 0..ASKED_MAX {
            // Perhaps it was done for somebody else meanwhile.
            let is_behind = self.known.is_behind(ino, told);
            let Some(generation) = self.known.generation(ino).filter(|_| is_behind || anew) else { return Ok(true) };
            let seen = self.probe.ask(ino, generation)?;
            let has_all = seen.has == seen.told;
            let is_longer = seen.has.size > seen.told.size && self.known.is_changing(ino);
            let has_size = seen.has.size == seen.told.size || !equal && is_longer;
            if has_all || !whole && has_size {
                if !is_behind {
                    return Ok(true);
                }
                match self.known.took_in(ino, self.thread, seen.told.size, has_all, !patient) {
                    Seen::Done => return Ok(true),
                    Seen::Purge => {
                        // A purge may wait for what a change has begun.
                        drop(held);
                        self.purge(ino);
                        return Ok(true);
                    }
                    Seen::Again => self.known.hear_gone(ino, probe::is_gone),
                }
            }
            std::thread::yield_now();
        }
        Ok(false)
    }

    /// Drops pages; the purge was noted before.
    fn purge(&self, ino: u64) {
        if let Err(error) = self.device.purge_pages(ino) {
            tracing::debug!(ino, %error, "cannot purge pages");
        }
        self.known.purged(ino);
    }
}
