//! Serving a mount: from a descriptor of /dev/fuse to a running session, and back.
//!
//! Invariants:
//! - Dropping the handle cuts the kernel off and ends every thread and task of the mount.
//! - Tokens that are given up are taken back from all mounts of the file system.
//! - Mounts of one file system on one node change things under each other's feet without any token moving. So while there is
//!   more than one, the kernel is let believe nothing. (A bind mount of the first is better: the kernel then has one view.)

use super::front::{Front, Lifetime};
use super::fuse::Fuse;
use super::handles::Handles;
use super::known::Known;
use super::mount::{self, Unmount};
use super::notify::Notify;
use super::renames::Renames;
use super::translate::Identity;
use crate::{AccessTimes, Attributes, FileSystem, Ino};
use cluster::BoxFuture;
use fuser::{Config, Session, SessionACL};
use parking_lot::Mutex;
use sld::{Disk, Locks, Mode, Notices, ObjectId, Upcalls};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Threads that take requests from the kernel, at most; each has its own descriptor and a buffer.
const THREADS_MAX: usize = 8;
/// How often a mounted file system is tended.
const TEND: Duration = Duration::from_millis(500);
/// What the kernel may believe for how long if nobody says otherwise.
const LIFETIME: Duration = Duration::from_secs(1);

/// How a mount is served.
#[derive(Clone)]
pub struct ServeOptions {
    /// Where it is mounted, in this process's namespace, if it can be unmounted from here.
    pub directory: Option<PathBuf>,
    /// Threads that take requests; 0: as many as there are processors, within reason.
    pub threads: usize,
    /// Cluster-wide file locks, and the node that this is; without them the kernel keeps locks, for this node alone.
    pub locks: Option<(Arc<Locks>, cluster::NodeId)>,
    /// Tells other nodes what their kernels would not ask for; without them this is the only node.
    pub notices: Option<Arc<Notices>>,
    /// How long the kernel may believe what it is told: asked for each answer, must not outlive the node's lease.
    pub lifetime: Lifetime,
    /// When reads change access times: of the file system on this node, as the last mount says.
    pub access_times: AccessTimes,
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions {
            directory: None,
            threads: 0,
            locks: None,
            notices: None,
            lifetime: Arc::new(|| LIFETIME),
            access_times: AccessTimes::default(),
        }
    }
}

/// Told of files whose written-behind data is lost. Must return at once.
pub type OnLoss = dyn Fn(Vec<Ino>) + Send + Sync;

/// All mounts of one file system on this node.
pub struct Server<D: Disk> {
    fs: Arc<FileSystem<D>>,
    mounts: Arc<Mounts>,
}

impl<D: Disk> Server<D> {
    /// A server without mounts. It takes the disk's upcalls; make one per disk.
    pub fn new(fs: Arc<FileSystem<D>>) -> Self {
        let mounts = Arc::new(Mounts::default());
        fs.disk().set_upcalls(mounts.clone());
        let told = Arc::downgrade(&mounts);
        fs.on_removal(Box::new(move |attributes| {
            if let Some(mounts) = told.upgrade() {
                mounts.each(|peer| peer.removed(attributes));
            }
        }));
        fs.keep_replaced();
        fs.free_in_background();
        Server { fs, mounts }
    }

    /// Sets who is told of losses, beside the programs that get `EIO`. Once per server.
    pub fn on_loss(&self, tell: Box<OnLoss>) {
        if self.mounts.losses.set(tell).is_err() {
            tracing::warn!("who is told of losses was set twice; the first one stays");
        }
    }

    /// Serves a mount whose descriptor of /dev/fuse is given. Must be called within a tokio runtime. Returns at once; see
    /// [`MountHandle::ready`].
    ///
    /// # Errors
    /// No threads or descriptors left.
    pub fn serve(&self, fuse: OwnedFd, options: ServeOptions) -> io::Result<MountHandle> {
        let runtime = Handle::current();
        self.fs.keep_access_times(options.access_times);
        let known = Arc::new(Known::new());
        let notify = Notify::new(fuse.try_clone()?, &known, options.directory.clone(), runtime.clone())?;
        let (stop, stopped) = watch::channel(false);
        let (state, states) = watch::channel(State::Starting);
        let identity = Identity::new(self.fs.root(), known.clone());
        let company = Company::join(&self.mounts.live);
        // Before anything of this mount can change something.
        let mut believed = Duration::ZERO;
        self.mounts.each(|peer| believed = believed.max(peer.distrust()));
        let not_before = tokio::time::Instant::now() + believed;
        let handles = Arc::new(Handles::default());
        if let Some((locks, _)) = &options.locks {
            *self.mounts.locks.lock() = Arc::downgrade(locks);
            let handles = Arc::downgrade(&handles);
            let identity = identity.clone();
            locks.on_lost(Box::new(move |objects| {
                let Some(handles) = handles.upgrade() else { return false };
                if objects.is_empty() {
                    return true;
                }
                handles.lose_locks(objects.iter().filter_map(|object| match object {
                    ObjectId::Inode(ino) => Some(identity.node(crate::Ino(*ino))),
                    _ => None,
                }));
                true
            }));
        }
        if let Some(notices) = &options.notices {
            self.mounts.heed_notices(notices);
        }
        let front = Arc::new(Front {
            handles,
            notices: options.notices,
            renames: Renames::default(),
            fs: self.fs.clone(),
            company,
            known: known.clone(),
            notify,
            lifetime: options.lifetime,
            identity,
            node: options.locks.as_ref().map_or(cluster::NodeId(0), |l| l.1),
            locks: options.locks.map(|l| l.0),
            runtime: runtime.clone(),
            stop: stopped.clone(),
        });
        let peer: Arc<dyn Peer> = front.clone();
        self.mounts.peers.lock().push(Arc::downgrade(&peer));
        drop(peer);

        runtime.spawn(free(self.fs.clone(), stopped.clone()));
        runtime.spawn(tend(Arc::downgrade(&self.fs), Arc::downgrade(&self.mounts), stopped));

        let mut config = Config::default();
        config.acl = SessionACL::All;
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        config.n_threads = Some(if options.threads == 0 { processors.clamp(2, THREADS_MAX) } else { options.threads });
        config.clone_fd = true;

        let directory = options.directory.clone();
        let mounted_on = directory.clone();
        let thread = std::thread::Builder::new().name("pulsar-fuse".to_owned()).spawn(move || {
            let result = Session::from_fd(Fuse(front.clone()), fuse, SessionACL::All, config).and_then(|session| {
                state.send_replace(State::Ready);
                if let Some(directory) = directory {
                    // Beside the session, since it looks at the mount.
                    std::thread::Builder::new().name("pulsar-tune".to_owned()).spawn(move || {
                        let Some(device) = mount::device(&directory) else { return };
                        front.notify.found(device);
                        mount::raise_read_ahead(device);
                    })?;
                }
                session.run()
            });
            if let Err(error) = &result {
                tracing::warn!(%error, "the mount's session failed");
                // Nobody will answer. The kernel does not know: threads that it lets wait have its device open, too (`apart`).
                if let Some(Err(error)) = mounted_on.map(|directory| mount::unmount(&directory, Unmount::Abort)) {
                    tracing::warn!(%error, "cannot unmount what nobody serves any more");
                }
            }
            stop.send_replace(true);
            state.send_replace(State::Ended(result.as_ref().err().map(ToString::to_string)));
            result
        })?;
        Ok(MountHandle { directory: options.directory, states, not_before, thread: Some(thread) })
    }
}

/// What is to be done every now and then while a file system is mounted.
async fn tend<D: Disk>(fs: Weak<FileSystem<D>>, mounts: Weak<Mounts>, mut stop: watch::Receiver<bool>) {
    loop {
        let stopped = tokio::select! {
            biased;
            _ = stop.wait_for(|stopped| *stopped) => true,
            () = tokio::time::sleep(TEND) => false,
        };
        let Some(fs) = fs.upgrade() else { return };
        fs.let_go(stopped).await;
        if stopped {
            // What is not freed by the time that the disk stops is left to the collector.
            fs.free_removed().await;
            return;
        }
        let changed = fs.set_access_times().await;
        if let Some(mounts) = mounts.upgrade() {
            changed.into_iter().for_each(|ino| mounts.each(|peer| peer.changed(ino.0)));
        }
    }
}

/// Frees large files that were removed, while nobody waits for it.
async fn free<D: Disk>(fs: Arc<FileSystem<D>>, mut stop: watch::Receiver<bool>) {
    loop {
        fs.free_removed().await;
        tokio::select! {
            biased;
            _ = stop.wait_for(|stopped| *stopped) => return,
            () = fs.removed() => {}
        }
    }
}

/// Serves one mount of a file system that has no other on this node.
///
/// # Errors
/// As [`Server::serve`].
pub fn serve<D: Disk>(fs: Arc<FileSystem<D>>, fuse: OwnedFd, options: ServeOptions) -> io::Result<MountHandle> {
    Server::new(fs).serve(fuse, options)
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Starting,
    Ready,
    Ended(Option<String>),
}

/// A served mount. Dropping it cuts the kernel off.
#[derive(Debug)]
pub struct MountHandle {
    directory: Option<PathBuf>,
    states: watch::Receiver<State>,
    /// Until then other mounts of the node may believe what they were told before this one was there.
    not_before: tokio::time::Instant,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl MountHandle {
    /// Whether the kernel has been greeted: requests are answered.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.states.borrow() == State::Ready
    }

    /// Waits until requests are answered.
    ///
    /// # Errors
    /// The session ended instead.
    pub async fn ready(&self) -> io::Result<()> {
        tokio::time::sleep_until(self.not_before).await;
        let mut states = self.states.clone();
        match states.wait_for(|s| *s != State::Starting).await.as_deref() {
            Ok(State::Ended(reason)) => Err(io::Error::other(reason.clone().unwrap_or_else(|| "the mount is gone".to_owned()))),
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::other("the mount's thread is gone")),
        }
    }

    /// Waits until the mount is gone. Returns why, if it was not unmounted or aborted, but could not be served any more.
    pub async fn ended(&self) -> Option<String> {
        let mut states = self.states.clone();
        match states.wait_for(|s| matches!(s, State::Ended(_))).await.as_deref() {
            Ok(State::Ended(reason)) => reason.clone(),
            Ok(_) => None,
            Err(_) => Some("the mount's thread is gone".to_owned()),
        }
    }

    /// Whether the mount is gone.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        matches!(*self.states.borrow(), State::Ended(_))
    }

    /// Unmounts, if the directory is known; see [`Unmount`] for how. Then [`MountHandle::ended`] tells when it is gone.
    ///
    /// # Errors
    /// `EBUSY` if it is in use and must not be; `Unsupported` without a directory.
    pub fn unmount(&self, how: Unmount) -> io::Result<()> {
        match &self.directory {
            Some(_) if self.is_ended() => Ok(()),
            Some(directory) => mount::unmount(directory, how),
            None => Err(io::Error::new(io::ErrorKind::Unsupported, "mounted in another namespace: unmount it there")),
        }
    }

    /// Waits for the session's thread; blocks until the mount is gone.
    ///
    /// # Errors
    /// The session's.
    pub fn join(mut self) -> io::Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the mount's thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for MountHandle {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if !self.is_ended() && self.unmount(Unmount::Abort).is_err() {
            // It ends when it is unmounted where it is mounted; nothing here can make it.
            return;
        }
        let _ = thread.join();
    }
}

/// One mount, as the upcalls see it.
pub(super) trait Peer: Send + Sync {
    /// Returns after what time nothing of it is believed any more.
    fn revoked(&self, ino: u64, keep: Option<Mode>) -> Duration;
    /// This node changed attributes of an inode by itself.
    fn changed(&self, ino: u64);
    /// Written-behind data of an inode is lost.
    fn lost(&self, ino: u64);
    /// An inode has no name any more.
    fn removed(&self, attributes: &Attributes);
    /// An inode has another owner or group, which the kernel is to know if it may judge by that.
    fn given(&self, ino: u64) -> BoxFuture<'_, ()>;
    /// All tokens were lost, and the lease before them.
    fn reset(&self);
    /// Things may change from now on without any token moving. Returns after what time nothing is believed any more.
    fn distrust(&self) -> Duration;
}

impl<D: Disk> Peer for Front<D> {
    fn revoked(&self, ino: u64, keep: Option<Mode>) -> Duration {
        if keep.is_some() {
            // What was read under the token stays true while nobody else may write.
            return Duration::ZERO;
        }
        let node = self.identity.node(crate::Ino(ino));
        let forgotten = self.known.revoke(node);
        let mut wait = forgotten.names;
        if forgotten.attributes {
            wait = wait.max(self.forget_attributes(node));
        }
        if forgotten.pages {
            self.notify.refresh(vec![(node, forgotten.revocation)]);
        }
        wait
    }

    fn changed(&self, ino: u64) {
        let node = self.identity.node(crate::Ino(ino));
        let forgotten = self.known.changed(node);
        if forgotten.attributes {
            self.forget_attributes(node);
        }
        if forgotten.pages {
            self.notify.refresh(vec![(node, forgotten.revocation)]);
        }
    }

    fn lost(&self, ino: u64) {
        if self.handles.lose_data(self.identity.node(crate::Ino(ino))) {
            // Who has it open for writing will be told, each once. Else the disk remembers it, for who opens it next.
            self.fs.disk().take_loss(ObjectId::Inode(ino));
        }
    }

    fn removed(&self, attributes: &Attributes) {
        self.known.removed(self.identity.node(attributes.ino), attributes);
    }

    fn given(&self, ino: u64) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let node = self.identity.node(Ino(ino));
            if self.known.is_within_reach(node, self.fs.is_open(Ino(ino))) {
                self.notify.look(node).await;
            }
        })
    }

    fn reset(&self) {
        // Names and attributes that the kernel believed have run out with the node's lease. Invalidating them now would make the kernel
        // drop the answers to requests that waited for the cluster meanwhile.
        let inodes = self.known.revoke_all();
        let pages = inodes.into_iter().filter(|(_, forgotten)| forgotten.pages).map(|(ino, f)| (ino, f.revocation));
        self.notify.refresh(pages.collect());
        // What was given away meanwhile nobody has told this node.
        if let Some(notices) = self.notices.clone() {
            let open = self.fs.open_inodes();
            self.runtime.spawn(async move {
                for ino in open {
                    notices.heed(ino.object()).await;
                }
            });
        }
    }

    fn distrust(&self) -> Duration {
        let mut wait = Duration::ZERO;
        for (ino, forgotten) in self.known.revoke_all() {
            wait = wait.max(forgotten.names);
            if forgotten.attributes {
                wait = wait.max(self.forget_attributes(ino));
            }
            if forgotten.pages {
                self.notify.refresh(vec![(ino, forgotten.revocation)]);
            }
        }
        wait
    }
}

/// A mount's being there, as the others see it.
pub(crate) struct Company(Arc<AtomicUsize>);

impl Company {
    fn join(live: &Arc<AtomicUsize>) -> Self {
        live.fetch_add(1, Ordering::SeqCst);
        Company(live.clone())
    }

    /// Whether there are other mounts of the file system on this node.
    pub(crate) fn has_others(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 1
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Hears of revocations, for all mounts.
#[derive(Default)]
struct Mounts {
    peers: Mutex<Vec<Weak<dyn Peer>>>,
    live: Arc<AtomicUsize>,
    locks: Mutex<Weak<Locks>>,
    losses: OnceLock<Box<OnLoss>>,
    heeds: AtomicBool,
}

impl Mounts {
    /// Heeds notices of other nodes from now on.
    fn heed_notices(self: &Arc<Self>, notices: &Notices) {
        if self.heeds.swap(true, Ordering::SeqCst) {
            return;
        }
        let mounts = Arc::downgrade(self);
        notices.on_notice(Box::new(move |object| {
            let mounts = mounts.upgrade()?;
            Some(Box::pin(async move {
                let ObjectId::Inode(ino) = object else { return };
                for peer in mounts.peers() {
                    peer.given(ino).await;
                }
            }))
        }));
    }

    fn peers(&self) -> Vec<Arc<dyn Peer>> {
        let mut peers = self.peers.lock();
        peers.retain(|peer| peer.strong_count() > 0);
        peers.iter().filter_map(Weak::upgrade).collect()
    }

    fn each(&self, mut tell: impl FnMut(&dyn Peer)) {
        self.peers().iter().for_each(|peer| tell(&**peer));
    }
}

impl Upcalls for Mounts {
    fn revoked(&self, object: ObjectId, keep: Option<Mode>) -> Duration {
        let mut wait = Duration::ZERO;
        if let ObjectId::Inode(ino) = object {
            self.each(|peer| wait = wait.max(peer.revoked(ino, keep)));
        }
        wait
    }

    fn reset(&self) {
        // Before anything that was under way can get a token again.
        let locks = self.locks.lock().upgrade();
        if let Some(locks) = locks {
            locks.lose();
        }
        self.each(|peer| peer.reset());
    }

    fn lost(&self, objects: &[ObjectId]) {
        let files = objects.iter().filter_map(|object| match object {
            ObjectId::Inode(ino) => Some(Ino(*ino)),
            _ => None,
        });
        let files: Vec<Ino> = files.collect();
        self.each(|peer| files.iter().for_each(|ino| peer.lost(ino.0)));
        if let Some(tell) = self.losses.get() {
            tell(files);
        }
    }
}
