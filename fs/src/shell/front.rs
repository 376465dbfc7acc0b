//! What the requests of one mount share, and what their answers have in common.
//!
//! Invariants:
//! - Whatever the kernel is let believe is in `Known` first, so that it can be taken back.
//!
//! Excludes: the requests (`fuse`), what the kernel believes (`known`), notifications (`notify`).

use super::handles::{self, Handles};
use super::known::{Answer, Append, Changing, Data, How, Known, Moment};
use super::names::Found;
use super::notify::Notify;
use super::renames::Renames;
use super::serve::Company;
use super::translate::{self, Identity, errno};
use crate::acl;
use crate::{Attributes, DirEntry, FileSystem, FsError, Ino};
use fuser::{FileHandle, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyEntry};
use sld::{Disk, Locks, Notices};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// How long the kernel may believe what it is told now; must not outlive the node's lease.
pub type Lifetime = Arc<dyn Fn() -> Duration + Send + Sync>;

/// What a mount's requests share.
pub(crate) struct Front<D: Disk> {
    pub(crate) fs: Arc<FileSystem<D>>,
    pub(crate) known: Arc<Known>,
    pub(crate) notify: Notify,
    pub(crate) lifetime: Lifetime,
    pub(crate) company: Company,
    pub(crate) identity: Identity,
    /// Tells other nodes what their kernels would not ask for.
    pub(crate) notices: Option<Arc<Notices>>,
    pub(crate) renames: Renames,
    /// Open files, and what became of their locks.
    pub(crate) handles: Arc<Handles>,
    /// Cluster-wide file locks; without them the kernel keeps locks, for this node alone.
    pub(crate) locks: Option<Arc<Locks>>,
    /// Which node this is, for whose processes a lock's holder has a number.
    pub(crate) node: cluster::NodeId,
    pub(crate) runtime: Handle,
    pub(crate) stop: watch::Receiver<bool>,
}

impl<D: Disk> Front<D> {
    /// How long the kernel may believe attributes that it is told now.
    pub(super) fn lifetime(&self) -> Duration {
        if self.company.has_others() { Duration::ZERO } else { (self.lifetime)() }
    }

    /// What a thread is told of an inode.
    pub(super) fn answer(thread: u32, attributes: &Attributes, looked_up: bool, how: How) -> Answer {
        let version = Self::data(attributes).map(|data| data.version);
        Answer { thread, generation: attributes.generation, version, looked_up, found: None, how }
    }

    /// Answers a thread with an inode that was looked up or made, and with its name, if a `place` is given: a directory and that.
    pub(super) fn entry(
        &self,
        start: Moment,
        place: Option<(INodeNo, &[u8])>,
        result: Result<Attributes, FsError>,
        thread: u32,
        how: How,
        reply: ReplyEntry,
    ) {
        match result {
            Ok(attributes) => {
                let node = self.identity.node(attributes.ino);
                let names = place.map_or(Duration::ZERO, |(parent, _)| self.known.tell_name(start, parent.0, self.lifetime()));
                let found = place.map(|(parent, name)| Found::new(parent.0, name));
                let ttl = if how == How::Forced { Duration::ZERO } else { self.lifetime() };
                // The root the kernel makes by itself, of generation 0, and counts no look-ups of it.
                let is_root = node == INodeNo::ROOT.0;
                let answer = Answer { found, ..Self::answer(thread, &attributes, !is_root, how) };
                let ttl = self.known.tell(start, node, answer, ttl);
                let generation = Generation(if is_root { 0 } else { attributes.generation });
                if how == How::Forced
                    && let Some((parent, _)) = place
                {
                    self.overtake(parent, thread);
                }
                reply.entry_with_ttls(&ttl, &names, &self.identity.attributes(&attributes), generation);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// Answers SETATTR: the kernel takes the attributes in even if an invalidation has overtaken them, so they live for no time.
    pub(super) fn changed(&self, start: Moment, thread: u32, result: Result<Attributes, FsError>, reply: ReplyAttr) {
        match result {
            Ok(attributes) => {
                let node = self.identity.node(attributes.ino);
                self.known.tell(start, node, Self::answer(thread, &attributes, false, How::Forced), Duration::ZERO);
                reply.attr(&Duration::ZERO, &self.identity.attributes(&attributes));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// Lists a directory; `unnoticed`: that is no access.
    pub(super) async fn list(
        &self,
        ino: INodeNo,
        unnoticed: bool,
        offset: u64,
        sink: &mut (dyn FnMut(DirEntry) -> bool + Send),
        plus: bool,
    ) -> Result<(), FsError> {
        let ino = self.identity.ino(ino);
        match unnoticed {
            true => self.fs.read_directory_unnoticed(ino, offset, sink, plus).await,
            false => self.fs.read_directory(ino, offset, sink, plus).await,
        }
    }

    /// A thread has changed a directory, and is about to be told.
    pub(super) fn overtake(&self, directory: INodeNo, thread: u32) {
        if self.known.overtake(directory.0, thread) {
            self.forget_attributes(directory.0);
        }
    }

    /// An inode has been given to another owner or group. A kernel judges by what it was told of that, without asking anew, who may
    /// set attributes, and remove from a sticky directory. So all kernels that may do so are made to take it in before the change is
    /// over.
    pub(super) async fn announce(&self, ino: INodeNo) {
        let Some(notices) = self.notices.clone() else { return };
        let (object, has_others) = (self.identity.ino(ino).object(), self.company.has_others());
        // Also if who gave it away is killed: it is given.
        let told = self.runtime.spawn(async move {
            if has_others {
                notices.heed(object).await;
            }
            notices.tell(object).await;
        });
        let _ = told.await;
    }

    /// Makes the kernel ask for attributes anew; returns how long to wait before something is done that relies on this.
    pub(super) fn forget_attributes(&self, ino: u64) -> Duration {
        let known = self.known.clone();
        self.notify.forget_attributes(ino, move || known.contains(ino))
    }

    /// To be held while a thread changes a file's data, until just before it is answered. `append`: where the kernel takes what
    /// it appends to end.
    pub(super) fn change(&self, ino: u64, thread: u32, append: Option<u64>) -> Option<Changing<'_>> {
        let append = append.map(|end| Append { end, alone: !self.company.has_others() });
        let (changing, believed) = self.known.change(ino, thread, append);
        if believed {
            self.forget_attributes(ino);
        }
        changing
    }

    /// To be held while a thread changes an attribute. If that is an access list it changes the mode with it, of which the answer
    /// tells the kernel nothing: `listed` is to be called when it is done.
    pub(super) fn change_list(&self, name: &[u8], ino: INodeNo, thread: u32) -> Option<Changing<'_>> {
        is_list(name).then(|| self.change(ino.0, thread, None)).flatten()
    }

    pub(super) fn listed(&self, ino: INodeNo, changing: Option<Changing<'_>>) {
        if changing.is_some() {
            let forgotten = self.known.unsettle(ino.0);
            if forgotten.pages {
                self.notify.refresh(vec![(ino.0, forgotten.revocation)]);
            }
        }
    }

    /// A file's data; none: it is no file.
    pub(super) fn data(attributes: &Attributes) -> Option<Data> {
        translate::is_file(attributes).then_some(Data { version: attributes.data_version, size: attributes.size })
    }

    pub(super) fn open_flags(&self, thread: u32, attributes: &Attributes, direct: bool) -> FopenFlags {
        let mut flags = FopenFlags::empty();
        if self.known.keeps_pages(self.identity.node(attributes.ino), thread, attributes.data_version) {
            flags |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        if direct {
            flags |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        } else if self.locks.is_none() {
            // Closing a handle that only reads has nothing to report, and no locks to release.
            flags |= FopenFlags::FOPEN_NOFLUSH;
        }
        flags
    }

    /// EIO, once for each handle, if written-behind data of the file was lost.
    pub(super) fn report_loss(&self, ino: Ino, handle: FileHandle) -> Result<(), FsError> {
        // What the disk still remembers was lost when nobody had it open.
        let is_lost = handles::is_direct(handle) && (self.handles.report_loss(handle) | self.fs.disk().take_loss(ino.object()));
        if is_lost { Err(FsError::Disk(sld::DiskError::Lost)) } else { Ok(()) }
    }

    /// Makes a file durable. Reports what was lost before, too.
    pub(super) async fn sync(&self, ino: Ino, handle: FileHandle, data_only: bool) -> Result<(), FsError> {
        let synced = self.fs.fsync(ino, data_only).await;
        if matches!(synced, Ok(()) | Err(FsError::Disk(sld::DiskError::Lost))) && self.handles.report_loss(handle) {
            return Err(FsError::Disk(sld::DiskError::Lost));
        }
        synced
    }
}

/// Whether an attribute is an access list.
pub(super) fn is_list(name: &[u8]) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}
