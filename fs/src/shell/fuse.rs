//! The FUSE front of a file system: requests in, answers out. Thin: what an operation does is decided in `ops`.
//!
//! Each request becomes a future. It is polled once on the FUSE thread, where an operation that has its tokens and blocks
//! at hand ends without a hop; otherwise it goes to the runtime and answers from there. How many there are at once is
//! bounded by the kernel (one per thread that waits, and `BACKGROUND_MAX` of its own).
//!
//! Invariants:
//! - A FUSE thread never waits.
//! - Handles opened for writing bypass the page cache; the kernel never owns a size, a time or unwritten data, except of
//!   pages written through a shared mapping.
//! - Whatever the kernel is let believe is in `Known` first, so that it can be taken back.
//!
//! Excludes: errno for an error (`translate`), what the kernel believes (`known`), notifications (`notify`).

use super::front::{Front, is_list};
use super::handles;
use super::known::{Answer, Changing, How, Reach};
use super::mount::TRANSFER_MAX;
use super::names::Found;
use super::rights;
use super::serve::Peer;
use super::signal;
use super::syscall;
use super::translate::{self, errno};
use crate::ops::data::{Allocate, At, Payload, Seek, Terms};
use crate::ops::meant;
use crate::ops::xattr::SetMode;
use crate::{Attributes, Caller, DirEntry, FsError, NewNode, SetAttributes};
use fuser::{
    Errno, FileHandle, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use sld::Disk;
use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Requests that the kernel may have under way on its own account (read-ahead, write-back of mappings, asynchronous I/O).
const BACKGROUND_MAX: u16 = 128;
/// The most that one `copy_file_range` copies before it answers.
const COPY_MAX: u64 = 16 * 1024 * 1024;

/// The most names that a listing with attributes has: all that is waited for is waited for at once.
const LISTED: usize = 64;

/// The handle of directories that are open for asking the kernel (`probe`), or were removed before: the file system does not know that
/// they are open.
const ASIDE: FileHandle = FileHandle(1);
/// That of directories of which reading is no access (O_NOATIME).
const UNNOTICED: FileHandle = FileHandle(2);

/// The file system as `fuser` sees it.
pub(crate) struct Fuse<D: Disk>(pub(crate) Arc<Front<D>>);

impl<D: Disk> Fuse<D> {
    /// Runs an operation: here if it can end at once, else on the runtime. If its caller (`thread`) is killed while it waits,
    /// it is given up between two steps: what it has committed stays, and the rest never happens.
    fn drive<F>(&self, thread: u32, operation: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut operation = Box::pin(operation);
        let runtime = &self.0.runtime;
        let polled = {
            let _entered = runtime.enter();
            std::panic::catch_unwind(AssertUnwindSafe(|| operation.as_mut().poll(&mut Context::from_waker(Waker::noop()))))
        };
        match polled {
            Ok(Poll::Ready(())) => {}
            Ok(Poll::Pending) => {
                let mut stop = self.0.stop.clone();
                runtime.spawn(async move {
                    tokio::select! {
                        biased;
                        () = operation => {}
                        () = signal::killed(thread) => {}
                        _ = stop.wait_for(|stopped| *stopped) => {}
                    }
                });
            }
            // The request's answer was sent as EIO when it was dropped.
            Err(_) => tracing::error!("an operation broke an invariant; its caller got EIO"),
        }
    }
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), umask: 0 }
}

fn empty(result: Result<(), FsError>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Answers a question for bytes of which the kernel first asks the length.
fn sized(result: Result<Vec<u8>, FsError>, size: u32, reply: ReplyXattr) {
    match result {
        Ok(bytes) if size == 0 => reply.size(u32::try_from(bytes.len()).unwrap_or(u32::MAX)),
        Ok(bytes) if bytes.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(bytes) => reply.data(&bytes),
        Err(error) => reply.error(errno(&error)),
    }
}

/// A change of a file that the kernel knows has been made.
fn reach(changing: &mut Option<Changing<'_>>, reach: Reach) {
    if let Some(changing) = changing {
        changing.reach(reach);
    }
}

/// Its caller is about to be answered.
async fn finish(changing: Option<Changing<'_>>) {
    if let Some(changing) = changing {
        changing.finish().await;
    }
}

/// What is done with every request: the shared state, when it began, who asks.
macro_rules! operation {
    ($self:ident, $request:ident, |$front:ident, $start:ident, $caller:ident| $body:block) => {
        operation!($self, $request, $request.pid(), |$front, $start, $caller| $body)
    };
    // Closing is done whatever happens to its caller, who may be dying.
    ($self:ident, $request:ident, to_the_end, |$front:ident, $start:ident, $caller:ident| $body:block) => {
        operation!($self, $request, 0, |$front, $start, $caller| $body)
    };
    ($self:ident, $request:ident, $thread:expr, |$front:ident, $start:ident, $caller:ident| $body:block) => {{
        let $front = $self.0.clone();
        let $caller = caller($request);
        let $start = $front.known.begin();
        $self.drive(
            $thread,
            meant::scope(async move {
                let _ = (&$caller, &$start);
                $body
            }),
        );
    }};
}

impl<D: Disk> fuser::Filesystem for Fuse<D> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Not `FUSE_ATOMIC_O_TRUNC`: after the answer the kernel would set the size to 0 once more, at a time that nobody can tell.
        let required = InitFlags::FUSE_AUTO_INVAL_DATA
            | InitFlags::FUSE_MAX_PAGES
            // A directory's default list takes the umask's place, so that the kernel must leave it to us.
            | InitFlags::FUSE_DONT_MASK
            | InitFlags::FUSE_POSIX_ACL;
        config.add_capabilities(required).map_err(|missing| {
            let text = format!("this kernel's FUSE lacks {missing:?}; Linux 5.15 or newer is needed");
            io::Error::new(io::ErrorKind::Unsupported, text)
        })?;
        for wished in [
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            // File handles (of NFS servers, `open_by_handle_at`) lead to inodes that the kernel does not have.
            InitFlags::FUSE_EXPORT_SUPPORT,
        ] {
            if config.add_capabilities(wished).is_err() {
                tracing::info!(?wished, "not supported by this kernel");
            }
        }
        if self.0.locks.is_some() {
            let locks = InitFlags::FUSE_POSIX_LOCKS | InitFlags::FUSE_FLOCK_LOCKS;
            config
                .add_capabilities(locks)
                .map_err(|_| io::Error::new(io::ErrorKind::Unsupported, "this kernel's FUSE does not pass on file locks"))?;
        }
        let _ = config.set_max_write(TRANSFER_MAX);
        if let Err(most) = config.set_max_readahead(TRANSFER_MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let _asking = front.known.ask();
            let dir = front.identity.ino(parent);
            if name == b"." || name == b".." {
                // By a file handle comes who asks for an inode itself, or for the directory that one is in. The kernel keeps no name.
                return front.entry(start, None, front.fs.lookup(dir, &name).await, caller.pid, How::Ordinary, reply);
            }
            let _looking = front.known.look_in(parent.0);
            let arrived = Instant::now();
            let result = front.fs.lookup(dir, &name).await;
            let result = front.beside_renames(arrived, caller.pid, parent, &name, result).await;
            if let Err(error) = &result
                && error.is_damage()
                && let Ok(Some(stand_in)) = front.fs.lookup_damaged(dir, &name).await
            {
                // Only so can it be removed or replaced. Nothing of it is believed: asking for attributes and opening fail.
                return front.entry(start, None, Ok(stand_in), 0, How::Forced, reply);
            }
            front.entry(start, Some((parent, &name)), result, caller.pid, How::Ordinary, reply);
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        if ino != INodeNo::ROOT {
            self.0.known.forget(ino.0, lookups);
            if !self.0.known.contains(ino.0) {
                self.0.handles.forget(ino.0);
            }
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        operation!(self, request, |front, start, caller| {
            let _asking = front.known.ask();
            let mut attributes = match front.fs.attributes(front.identity.ino(ino)).await {
                Ok(attributes) => attributes,
                Err(error) => match front.known.remains(ino.0).filter(|_| error == FsError::Stale) {
                    Some(attributes) => return reply.attr(&Duration::ZERO, &front.identity.attributes(&attributes)),
                    None => return reply.error(errno(&error)),
                },
            };
            // Asked on behalf of a read(), too: then it has a handle.
            if handle.is_some_and(|handle| front.handles.has_lost_locks(ino.0, handle)) {
                return reply.error(Errno::EIO);
            }
            let is_ours = front.notify.recognise(caller.pid);
            let answer = Front::<D>::answer(caller.pid, &attributes, false, if is_ours { How::Ours } else { How::Ordinary });
            let mut ttl = front.lifetime();
            if let Some(told) = Front::<D>::data(&attributes) {
                // Another mount on this node can have changed the mode without any token's moving.
                let anew = handle.is_none() && front.company.has_others();
                if is_ours {
                    ttl = Duration::ZERO;
                } else if anew || front.known.doubt(ino.0, caller.pid, told) {
                    // No page lock is held by a GETATTR, and no token by this operation any more; who asks needs no other lock.
                    let renewed = front.notify.renew(ino.0, told, anew, handle.is_some(), caller.pid).await;
                    if renewed.is_err() && handle.is_some() {
                        // The best that is left: a time that it cannot have, so that it purges, unless this answer is lost. No program
                        // is shown what a read() asked for, and nobody believes it.
                        attributes.mtime = translate::another_time(attributes.mtime);
                        ttl = Duration::ZERO;
                    }
                }
            }
            let ttl = front.known.tell(start, ino.0, answer, ttl);
            reply.attr(&ttl, &front.identity.attributes(&attributes));
        });
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // What the kernel takes from a program that is given away or cut comes with that; by now it may be another mode.
        let along = mode.is_some() && (size.is_some() || uid.is_some() || gid.is_some());
        let exact = |time: Option<TimeOrNow>| matches!(time, Some(TimeOrNow::SpecificTime(_)));
        let exact_times = exact(atime) || exact(mtime);
        let change = SetAttributes {
            mode: mode.filter(|_| !along),
            kill: along,
            uid,
            gid,
            size,
            atime: atime.map(translate::set_time),
            mtime: mtime.map(translate::set_time),
            ..SetAttributes::default()
        };
        operation!(self, request, |front, start, caller| {
            if change.size.is_some()
                && handle.is_some_and(|handle| front.handles.has_failed(handle))
                && !syscall::sets_size(caller.pid).await
            {
                // The kernel takes an asynchronous write back that has failed, and with it what other nodes have written.
                return reply.error(Errno::EIO);
            }
            let changing = change.size.and_then(|_| front.change(ino.0, caller.pid, None));
            let allowed = || !handle.is_some_and(|handle| front.handles.has_lost_locks(ino.0, handle));
            let kill = change.size.is_some() && rights::loses_set_ids(&caller);
            let is_in_group = |gid| rights::acts_as_group(&caller, gid);
            let terms = Terms { kill, is_in_group: &is_in_group, allowed: &allowed };
            let given = AtomicBool::new(false);
            let permit = |found: &Attributes, set: SetAttributes| {
                let is_other = |to: Option<u32>, from| to.is_some_and(|to| to != from);
                given.store(is_other(set.uid, found.uid) || is_other(set.gid, found.gid), Ordering::Relaxed);
                rights::change(&caller, exact_times, found, set)
            };
            let result = front.fs.set_attributes_on(front.identity.ino(ino), change, terms, &permit).await;
            drop(changing);
            if given.into_inner() && result.is_ok() {
                front.announce(ino).await;
            }
            front.changed(start, caller.pid, result, reply);
        });
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        operation!(self, request, |front, start, caller| {
            match front.fs.read_link(front.identity.ino(ino)).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn mknod(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, rdev: u32, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let Some(node) = translate::new_node(mode, rdev) else { return reply.error(Errno::EINVAL) };
            let result = front.fs.make(&Caller { umask, ..caller }, front.identity.ino(parent), &name, node, mode & 0o7777).await;
            front.entry(start, Some((parent, &name)), result, caller.pid, How::Forced, reply);
        });
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let (caller, dir) = (Caller { umask, ..caller }, front.identity.ino(parent));
            let result = front.fs.make(&caller, dir, &name, NewNode::Directory, mode & 0o7777).await;
            front.entry(start, Some((parent, &name)), result, caller.pid, How::Forced, reply);
        });
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        let target = target.as_os_str().as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let result = front.fs.make(&caller, front.identity.ino(parent), &name, NewNode::Symlink(&target), 0o777).await;
            front.entry(start, Some((parent, &name)), result, caller.pid, How::Forced, reply);
        });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let result = front.fs.unlink(&caller, front.identity.ino(parent), &name).await;
            front.overtake(parent, caller.pid);
            empty(result, reply);
        });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let result = front.fs.rmdir(&caller, front.identity.ino(parent), &name).await;
            front.overtake(parent, caller.pid);
            empty(result, reply);
        });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.as_bytes().to_vec(), new_name.as_bytes().to_vec());
        operation!(self, request, |front, start, caller| {
            let Some(flags) = translate::rename_flags(flags) else { return reply.error(Errno::EINVAL) };
            let (from, to) = (front.identity.ino(parent), front.identity.ino(new_parent));
            let _moving = front.known.move_name(parent.0, new_parent.0);
            let is_exchange = flags == crate::RenameFlags::Exchange;
            let _back = is_exchange.then(|| front.known.move_name(new_parent.0, parent.0));
            let result = front.fs.rename_told(&caller, from, &name, to, &new_name, flags).await;
            front.renamed(&result, (parent, &name), (new_parent, &new_name));
            front.overtake(parent, caller.pid);
            front.overtake(new_parent, caller.pid);
            empty(result.map(drop), reply);
        });
    }

    fn link(&self, request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let result = front.fs.link(front.identity.ino(ino), front.identity.ino(parent), &name).await;
            front.entry(start, Some((parent, &name)), result, caller.pid, How::Forced, reply);
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let direct = flags.acc_mode() != OpenAccMode::O_RDONLY;
        operation!(self, request, |front, start, caller| {
            let result = front.fs.open(front.identity.ino(ino), translate::open_flags(flags)).await;
            match result {
                Ok(attributes) => {
                    reply.opened(front.handles.open(ino.0, direct, flags.0), front.open_flags(caller.pid, &attributes, direct));
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn create(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, flags: i32, reply: ReplyCreate) {
        let name = name.as_bytes().to_vec();
        let direct = OpenFlags(flags).acc_mode() != OpenAccMode::O_RDONLY;
        operation!(self, request, |front, start, caller| {
            let result = async {
                let (caller, dir) = (Caller { umask, ..caller }, front.identity.ino(parent));
                let made = front.fs.make(&caller, dir, &name, NewNode::File, mode & 0o7777).await?;
                front.fs.open(made.ino, translate::open_flags(OpenFlags(flags))).await
            };
            match result.await {
                Ok(attributes) => {
                    let node = front.identity.node(attributes.ino);
                    // One lifetime for name and attributes: none, since these may be overtaken.
                    let found = Some(Found::new(parent.0, &name));
                    let answer = Answer { found, ..Front::<D>::answer(caller.pid, &attributes, true, How::Forced) };
                    front.known.tell(start, node, answer, Duration::ZERO);
                    front.overtake(parent, caller.pid);
                    reply.created(
                        &Duration::ZERO,
                        &front.identity.attributes(&attributes),
                        Generation(attributes.generation),
                        front.handles.open(node, direct, flags),
                        front.open_flags(caller.pid, &attributes, direct),
                    );
                }
                // Another node was faster. The existing file must be opened as such, with its permissions checked: the kernel
                // does so when it is told that its view was stale.
                Err(FsError::Exists) if flags & nix::libc::O_EXCL == 0 => reply.error(Errno::ESTALE),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // A direct handle fills pages, too, if it is mapped; such requests are for whole pages.
        let fills_pages = !handles::is_direct(handle) || (offset | u64::from(size)).is_multiple_of(4096);
        operation!(self, request, |front, start, caller| {
            let (node, size) = (front.identity.ino(ino), size.min(TRANSFER_MAX));
            let read = match handles::is_unnoticed(handle) {
                true => front.fs.read_unnoticed(node, offset, size).await,
                false => front.fs.read(node, offset, size).await,
            };
            match read {
                Ok(_) if front.handles.has_lost_locks(ino.0, handle) => reply.error(Errno::EIO),
                Ok(data) => {
                    if fills_pages {
                        front.known.tell_pages(ino.0, caller.pid, data.version());
                    }
                    reply.data(&data.contiguous());
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let at = if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            // Pages of a shared mapping. They never extend a file; what another node cut off stays cut off.
            At::Within(offset)
        } else if flags.0 & nix::libc::O_APPEND != 0 {
            // The kernel's idea of the end is stale if another node appended.
            At::End
        } else {
            At::Offset(offset)
        };
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let synchronous = matches!(at, At::Offset(_) | At::End) && flags.0 & nix::libc::O_DSYNC != 0;
        let data_only = flags.0 & nix::libc::O_SYNC != nix::libc::O_SYNC;
        let length = data.len() as u64;
        let payload = Payload::new(offset, data);
        operation!(self, request, |front, start, caller| {
            let node = front.identity.ino(ino);
            let append = matches!(at, At::End).then(|| offset.saturating_add(length));
            let mut changing = front.change(ino.0, caller.pid, append);
            let writing = front.handles.write(handle);
            let result = async {
                // Locks may be lost while this waits for the file's token.
                let allowed = || !front.handles.has_lost_locks(ino.0, handle);
                let is_in_group = |gid| rights::acts_as_group(&caller, gid);
                let terms = Terms { kill, is_in_group: &is_in_group, allowed: &allowed };
                let (_, written) = front.fs.write_if(node, at, payload, terms).await?;
                let end = if let At::Within(_) = at { 0 } else { offset.saturating_add(written) };
                reach(&mut changing, Reach { end, zeros: false });
                if synchronous {
                    front.sync(node, handle, data_only).await?;
                }
                if written < length && !syscall::writes(caller.pid).await {
                    // Of an asynchronous write the kernel makes EIO of this, and cuts the file.
                    return Err(FsError::NoSpace);
                }
                Ok::<u64, FsError>(written)
            };
            let result = result.await;
            finish(changing).await;
            // Before the answer, upon which the kernel acts.
            match result {
                Ok(_) => writing.done(),
                Err(_) => drop(writing),
            }
            match result {
                Ok(written) => reply.written(u32::try_from(written).unwrap_or(u32::MAX)),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn flush(&self, request: &Request, ino: INodeNo, handle: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        operation!(self, request, to_the_end, |front, start, caller| {
            front.known.hear(ino.0, caller.pid);
            front.handles.flushed(handle, owner);
            front.close_locks(ino, owner).await;
            empty(front.report_loss(front.identity.ino(ino), handle), reply);
        });
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        operation!(self, request, to_the_end, |front, start, caller| {
            for owner in front.handles.released(ino.0, handle).chain(owner) {
                front.close_locks(ino, owner).await;
            }
            empty(front.fs.close(front.identity.ino(ino)).await, reply);
        });
    }

    fn fsync(&self, request: &Request, ino: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        if self.0.handles.has_lost_locks(ino.0, handle) {
            return reply.error(Errno::EIO);
        }
        operation!(self, request, |front, start, caller| {
            let node = front.identity.ino(ino);
            empty(front.sync(node, handle, data_only).await, reply);
        });
    }

    fn getlk(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        _pid: u32,
        reply: ReplyLock,
    ) {
        if self.0.handles.has_lost_locks(ino.0, handle) {
            return reply.error(Errno::EIO);
        }
        let (first, last) = (start, end);
        operation!(self, request, |front, start, caller| { front.get_lock(ino, owner, first, last, typ, reply).await });
    }

    fn setlk(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        if typ != nix::libc::F_UNLCK && self.0.handles.has_lost_locks(ino.0, handle) {
            return reply.error(Errno::EIO);
        }
        let (first, last) = (start, end);
        // Also if its caller is being killed: what is held then only the master can say (an open file's locks may be another
        // process's, too). The wait itself ends with any signal.
        operation!(self, request, to_the_end, |front, start, caller| {
            front.set_lock(caller.pid, ino, handle, owner, first, last, typ, pid, sleep, reply).await;
        });
    }

    fn opendir(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        operation!(self, request, |front, start, caller| {
            if front.notify.recognise(caller.pid) {
                return reply.opened(ASIDE, FopenFlags::empty());
            }
            // A directory that is open can be asked for what it is, and has nothing in it, when it has been removed.
            match front.fs.open(front.identity.ino(ino), translate::open_flags(flags)).await {
                Ok(_) if flags.0 & nix::libc::O_NOATIME != 0 => reply.opened(UNNOTICED, FopenFlags::empty()),
                Ok(_) => reply.opened(FileHandle(0), FopenFlags::empty()),
                // A working directory that was removed can be opened; the kernel lets nobody list it.
                Err(FsError::Stale) if front.known.remains(ino.0).is_some() => reply.opened(ASIDE, FopenFlags::empty()),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn releasedir(&self, request: &Request, ino: INodeNo, handle: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        if handle == ASIDE {
            return reply.ok();
        }
        operation!(self, request, to_the_end, |front, start, caller| {
            empty(front.fs.close(front.identity.ino(ino)).await, reply);
        });
    }

    fn readdir(&self, request: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        operation!(self, request, |front, start, caller| {
            let identity = &front.identity;
            let mut list = |entry: DirEntry| {
                let node = INodeNo(identity.node(entry.ino));
                !reply.add(node, entry.next_cookie, translate::kind(entry.kind), OsStr::from_bytes(&entry.name))
            };
            match front.list(ino, handle == UNNOTICED, offset, &mut list, false).await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        operation!(self, request, |front, start, caller| {
            let _asking = front.known.ask();
            let identity = &front.identity;
            let mut listed: Vec<DirEntry> = Vec::with_capacity(LISTED);
            let mut list = |entry| {
                listed.push(entry);
                listed.len() < LISTED
            };
            if let Err(error) = front.list(ino, handle == UNNOTICED, offset, &mut list, true).await {
                return reply.error(errno(&error));
            }
            // Nothing is waited for from here on: the names are told now.
            let names = front.known.tell_name(start, ino.0, front.lifetime());
            for entry in listed {
                // Of a damaged inode the kernel is told a type, for no time: to look at it is EIO.
                let unknown = || identity.unknown(entry.ino, entry.kind);
                let attributes = entry.attributes.as_ref().map_or_else(unknown, |a| identity.attributes(a));
                let generation = entry.attributes.as_ref().map_or(entry.generation, |a| a.generation);
                let in_time = entry.attributes.is_some() && !front.known.is_looked_in(ino.0);
                let lifetime = if in_time { names } else { Duration::ZERO };
                let node = attributes.ino;
                let counts = entry.name != ".".as_bytes() && entry.name != "..".as_bytes();
                let version = entry.attributes.as_ref().filter(|a| translate::is_file(a)).map(|a| a.data_version);
                let found = counts.then(|| Found::new(ino.0, &entry.name));
                let answer = Answer { thread: caller.pid, generation, version, looked_up: true, found, how: How::Ordinary };
                // Of the others the kernel takes only the names.
                let ttl = if counts { front.known.tell(start, node.0, answer, lifetime) } else { Duration::ZERO };
                let name = OsStr::from_bytes(&entry.name);
                if reply.add(node, entry.next_cookie, name, &ttl.min(lifetime), &attributes, Generation(generation)) {
                    // It is full.
                    if counts {
                        front.known.take_back(node.0, 1);
                    }
                    break;
                }
            }
            reply.ok();
        });
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        operation!(self, request, |front, start, caller| {
            let node = front.identity.ino(ino);
            empty(front.fs.fsync_directory(node).await, reply);
        });
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        operation!(self, request, |front, start, caller| {
            match front.fs.stat_fs().await {
                Ok(s) => reply.statfs(s.blocks, s.free, s.free, s.blocks, s.free, s.block_size, s.name_max, s.block_size),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        const BOTH: i32 = nix::libc::XATTR_CREATE | nix::libc::XATTR_REPLACE;
        let (name, value) = (name.as_bytes().to_vec(), value.to_vec());
        let mode = match flags {
            0 => SetMode::Any,
            nix::libc::XATTR_CREATE => SetMode::Create,
            nix::libc::XATTR_REPLACE => SetMode::Replace,
            BOTH => SetMode::Both,
            _ => return reply.error(Errno::EINVAL),
        };
        operation!(self, request, |front, start, caller| {
            let permit = |found: &Attributes| rights::change_list(&caller, found);
            let changing = front.change_list(&name, ino, caller.pid);
            let node = front.identity.ino(ino);
            let result = front.fs.set_xattr_if(node, &name, &value, mode, &permit).await;
            front.listed(ino, changing);
            Peer::changed(&*front, node.0);
            empty(result, reply);
        });
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        let is_list = is_list(&name);
        operation!(self, request, |front, start, caller| {
            let mut began = start;
            let value = loop {
                let value = front.fs.get_xattr(front.identity.ino(ino), &name).await;
                // The kernel keeps lists (also that there is none) until it is told otherwise.
                if !is_list || front.known.tell_list(began, caller.pid, ino.0) {
                    break value;
                }
                began = front.known.begin();
            };
            sized(value, size, reply);
            if is_list && front.company.has_others() {
                // Another mount may change it without any token's moving. An invalidation makes the kernel drop also a list that
                // is on its way to it.
                front.forget_attributes(ino.0);
            }
        });
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        operation!(self, request, |front, start, caller| {
            sized(front.fs.list_xattr(front.identity.ino(ino), rights::sees_trusted(&caller)).await, size, reply);
        });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        operation!(self, request, |front, start, caller| {
            let permit = |found: &Attributes| rights::change_list(&caller, found);
            let changing = front.change_list(&name, ino, caller.pid);
            let node = front.identity.ino(ino);
            let result = front.fs.remove_xattr_if(node, &name, &permit).await;
            front.listed(ino, changing);
            Peer::changed(&*front, node.0);
            empty(result, reply);
        });
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: fuser::AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself (`default_permissions`).
        reply.ok();
    }

    fn ioctl(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _flags: fuser::IoctlFlags,
        command: u32,
        _data: &[u8],
        _size: u32,
        reply: ReplyIoctl,
    ) {
        if self.0.handles.has_lost_locks(ino.0, handle) {
            return reply.error(Errno::EIO);
        }
        if !translate::asks_for_generation(command) {
            return reply.error(Errno::ENOTTY);
        }
        operation!(self, request, |front, start, caller| {
            match front.fs.attributes(front.identity.ino(ino)).await {
                // An `int`, though the command's number speaks of a `long`.
                Ok(attributes) => reply.ioctl(0, &(attributes.generation as u32).to_ne_bytes()),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if self.0.handles.has_lost_locks(ino.0, handle) {
            return reply.error(Errno::EIO);
        }
        operation!(self, request, |front, start, caller| {
            let Some((what, keep_size)) = allocation(mode) else { return reply.error(Errno::EOPNOTSUPP) };
            let allowed = || !front.handles.has_lost_locks(ino.0, handle);
            let is_in_group = |gid| rights::acts_as_group(&caller, gid);
            let terms = Terms { kill: rights::loses_set_ids(&caller), is_in_group: &is_in_group, allowed: &allowed };
            let node = front.identity.ino(ino);
            let mut changing = front.change(ino.0, caller.pid, None);
            let result = async {
                front.fs.allocate_on(node, what, offset, length, keep_size, terms).await?;
                let end = if keep_size { 0 } else { offset.saturating_add(length) };
                reach(&mut changing, Reach { end, zeros: what != Allocate::Reserve });
                if handles::is_synchronous(handle) { front.sync(node, handle, false).await } else { Ok(()) }
            };
            let result = result.await;
            finish(changing).await;
            empty(result, reply);
        });
    }

    fn lseek(&self, request: &Request, ino: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        if self.0.handles.has_lost_locks(ino.0, handle) {
            return reply.error(Errno::EIO);
        }
        operation!(self, request, |front, start, caller| {
            let seek = match whence {
                nix::libc::SEEK_DATA => Seek::Data,
                nix::libc::SEEK_HOLE => Seek::Hole,
                _ => return reply.error(Errno::EINVAL),
            };
            let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
            match front.fs.seek(front.identity.ino(ino), offset, seek).await {
                Ok(found) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        from: INodeNo,
        from_handle: FileHandle,
        from_offset: u64,
        to: INodeNo,
        to_handle: FileHandle,
        to_offset: u64,
        length: u64,
        _flags: fuser::CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if self.0.handles.has_lost_locks(from.0, from_handle) || self.0.handles.has_lost_locks(to.0, to_handle) {
            return reply.error(Errno::EIO);
        }
        operation!(self, request, |front, start, caller| {
            let lost = |node: INodeNo, handle| front.handles.has_lost_locks(node.0, handle);
            let allowed = || !lost(from, from_handle) && !lost(to, to_handle);
            let is_in_group = |gid| rights::acts_as_group(&caller, gid);
            let terms = Terms { kill: rights::loses_set_ids(&caller), is_in_group: &is_in_group, allowed: &allowed };
            let mut changing = front.change(to.0, caller.pid, None);
            let (source, target) = ((front.identity.ino(from), from_offset), (front.identity.ino(to), to_offset));
            let result = async {
                let copied = front.fs.copy_range_on(source, target, length.min(COPY_MAX), terms).await?;
                reach(&mut changing, Reach { end: to_offset.saturating_add(copied), zeros: false });
                if handles::is_synchronous(to_handle) {
                    front.sync(target.0, to_handle, false).await?;
                }
                Ok::<u64, FsError>(copied)
            };
            let result = result.await;
            finish(changing).await;
            match result {
                Ok(copied) => reply.written(u32::try_from(copied).unwrap_or(u32::MAX)),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }
}

/// What a mode of `fallocate` asks for, and whether the size stays; `None` for what is not supported.
fn allocation(mode: i32) -> Option<(Allocate, bool)> {
    use nix::libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
    let keep = mode & FALLOC_FL_KEEP_SIZE != 0;
    match mode & !FALLOC_FL_KEEP_SIZE {
        0 => Some((Allocate::Reserve, keep)),
        FALLOC_FL_PUNCH_HOLE if keep => Some((Allocate::Punch, true)),
        FALLOC_FL_ZERO_RANGE => Some((Allocate::Zero, keep)),
        _ => None,
    }
}
