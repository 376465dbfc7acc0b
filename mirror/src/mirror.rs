//! One node's mirror layer: its disks, its client, and the tasks that follow the cluster's views.
//!
//! Everything that it started stops when it is dropped.

use crate::api::{BlockDevice, Mirrors, Tag, Version};
use crate::events::{CopyStatus, DiskStatus, MirrorEvent, MirrorStatus, ScrubReport};
use crate::format::OpenError;
use crate::message::{Reply, Wire, WriteHead, WriteMode, Writer};
use crate::resync::Progress;
use crate::shell::client::Client;
use crate::shell::disk::{Disk, Got, News};
use crate::shell::open::Expected;
use crate::shell::rpc::Rpc;
use crate::shell::server::Server;
use crate::shell::tasks::Tasks;
use crate::{recovery, resync, scrub};
use cluster::config::MemberState;
use cluster::{Cluster, DiskId, Layer, Message, NodeId, Peer, Receiver, Service, View};
use parking_lot::Mutex;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use tokio::sync::{Semaphore, broadcast};

/// Events that a slow listener may be behind before it loses some.
const EVENTS_MAX: usize = 1024;

/// Questions of other nodes that wait or are worked on; more are refused.
const QUESTIONS_WAITING_MAX: usize = 4096;

/// Settings.
#[derive(Clone, Copy, Debug)]
pub struct MirrorOptions {
    /// Tag blocks kept in memory per disk, 4 KiB each; each covers 64 blocks.
    pub tag_blocks_max: usize,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        MirrorOptions { tag_blocks_max: 16_384 }
    }
}

/// Why the layer did not start, or take a disk.
#[derive(Debug, thiserror::Error)]
#[error("disk {disk}: {error}")]
pub struct StartError {
    /// The disk.
    pub disk: DiskId,
    /// What is wrong with it.
    pub error: OpenError,
}

/// See the module.
pub struct Mirror {
    cluster: Arc<dyn Cluster>,
    server: Arc<Server>,
    client: Arc<Client>,
    rpc: Arc<Rpc>,
    options: MirrorOptions,
    progress: Arc<Progress>,
    scrub: Arc<Mutex<ScrubReport>>,
    /// Disks that could not be opened because they are damaged.
    broken: Mutex<Vec<DiskId>>,
    /// Tasks of disks; they outlive the others, so that a shutdown can write everything home.
    disk_tasks: Arc<Tasks>,
    tasks: Arc<Tasks>,
}

impl Mirror {
    /// Opens the disks (replaying their logs) and starts serving. A disk that is damaged, or fails, is reported to the
    /// cluster as failed, and the rest starts.
    ///
    /// # Errors
    /// If a disk is not the one that it should be (another cluster's, another disk, another version, not formatted).
    pub async fn start(
        cluster: Arc<dyn Cluster>,
        disks: Vec<(DiskId, Arc<dyn BlockDevice>)>,
        options: MirrorOptions,
    ) -> Result<Arc<Mirror>, StartError> {
        let clock = Arc::new(AtomicU64::new(0));
        let events = broadcast::channel(EVENTS_MAX).0;
        let tasks = Arc::new(Tasks::default());
        let server = Arc::new(Server::new(Arc::clone(&cluster), clock, events.clone()));
        let rpc = Arc::new(Rpc::new(cluster.transport()));
        let client = Client::new(Arc::clone(&cluster), Arc::clone(&server), Arc::clone(&rpc), events, &tasks);
        let mirror = Arc::new(Mirror {
            cluster,
            server,
            client,
            rpc,
            options,
            progress: Arc::default(),
            scrub: Arc::default(),
            broken: Mutex::default(),
            disk_tasks: Arc::default(),
            tasks,
        });
        for (id, device) in disks {
            mirror.add_disk(id, device).await?;
        }
        let receiver = Ear {
            client: Arc::downgrade(&mirror.client),
            server: Arc::downgrade(&mirror.server),
            rpc: Arc::downgrade(&mirror.rpc),
            tasks: Arc::downgrade(&mirror.tasks),
            places: Arc::new(Semaphore::new(QUESTIONS_WAITING_MAX)),
        };
        mirror.cluster.transport().register(Service::Mirror, Arc::new(receiver));
        // At once, so that what is submitted right after the start does not meet a client that knows no view.
        mirror.server.adopt();
        let view = mirror.cluster.view().borrow().clone();
        mirror.client.view_changed(&view);
        mirror.follow();
        Ok(mirror)
    }

    /// Follows the views: adopts each, recovers in each, resyncs in each.
    fn follow(self: &Arc<Self>) {
        let (server, client, cluster) = (Arc::clone(&self.server), Arc::clone(&self.client), Arc::clone(&self.cluster));
        let mut views = self.cluster.view();
        self.tasks.spawn(async move {
            loop {
                server.adopt();
                let view = views.borrow_and_update().clone();
                client.view_changed(&view);
                if views.changed().await.is_err() {
                    return;
                }
            }
        });
        let (server, client) = (Arc::clone(&self.server), Arc::clone(&self.client));
        let mut views = self.cluster.view();
        self.tasks.spawn(async move {
            let mut recovered = None;
            loop {
                let view = views.borrow_and_update().clone();
                let epoch = view.epoch();
                if view.member && view.recovered >= Layer::Cluster {
                    if view.recovered < Layer::Mirror && recovered != Some(epoch) {
                        server.adopt();
                        if until_newer(&mut views, epoch, recovery::recover(&client, &view)).await.is_none() {
                            continue;
                        }
                    }
                    recovered = Some(epoch);
                    cluster.finish(epoch, Layer::Mirror);
                }
                if views.changed().await.is_err() {
                    return;
                }
            }
        });
        let (client, progress) = (Arc::clone(&self.client), Arc::clone(&self.progress));
        let mut views = self.cluster.view();
        self.tasks.spawn(async move {
            loop {
                let Ok(view) = client.ready().await else { return };
                let epoch = view.epoch();
                if until_newer(&mut views, epoch, resync::resync(&client, &view, &progress)).await.is_some()
                    && views.wait_for(|v| v.epoch() > epoch).await.is_err()
                {
                    return;
                }
            }
        });
    }

    /// The blocks of all mirrors, as this node reaches them.
    #[must_use]
    pub fn mirrors(&self) -> Arc<dyn Mirrors> {
        Arc::clone(&self.client) as Arc<dyn Mirrors>
    }

    /// Opens another disk of this node.
    ///
    /// # Errors
    /// As `start`.
    pub async fn add_disk(&self, id: DiskId, device: Arc<dyn BlockDevice>) -> Result<(), StartError> {
        let config = Arc::clone(&self.cluster.view().borrow().config);
        let expected = Expected { cluster: Some(config.cluster), uuid: config.disks.get(&id).map(|d| d.uuid) };
        let (client, server, tasks) = (Arc::downgrade(&self.client), Arc::downgrade(&self.server), Arc::downgrade(&self.tasks));
        let on_news = Box::new(move |news| {
            let (Some(server), Some(tasks)) = (server.upgrade(), tasks.upgrade()) else { return };
            match news {
                News::Faulted { why } => {
                    let _ = server.events.send(MirrorEvent::DiskFaulted { disk: id, why });
                    tasks.spawn(async move { server.report_fault(id).await });
                }
                News::TagsLost { blocks, why } => {
                    let _ = server.events.send(MirrorEvent::TagsLost { disk: id, blocks: blocks.len() as u64, why });
                    let client = client.clone();
                    tasks.spawn(async move {
                        let Some(client) = client.upgrade() else { return };
                        scrub::repair_area(&client, id, blocks).await;
                    });
                }
            }
        });
        match Disk::open(device, expected, self.options.tag_blocks_max, on_news, &self.disk_tasks).await {
            Ok(disk) => {
                self.server.add_disk(id, disk);
                Ok(())
            }
            Err(error @ (OpenError::LabelDamaged | OpenError::LogDamaged { .. } | OpenError::Io(_))) => {
                tracing::error!("disk {id}: {error}");
                let _ = self.server.events.send(MirrorEvent::DiskFaulted { disk: id, why: error.to_string() });
                self.broken.lock().push(id);
                let server = Arc::clone(&self.server);
                self.tasks.spawn(async move { server.report_fault(id).await });
                Ok(())
            }
            Err(error) => Err(StartError { disk: id, error }),
        }
    }

    #[cfg(test)]
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    #[cfg(test)]
    pub(crate) fn disk(&self, id: DiskId) -> Arc<Disk> {
        self.server.disks().into_iter().find(|(d, _)| *d == id).map(|(_, disk)| disk).expect("the disk is here")
    }

    /// What one of this node's disks has of blocks of its data area, for tests that compare copies: version, tag and a
    /// checksum of the contents, as stored; `None` if a block is damaged.
    pub async fn copy_of(&self, disk: DiskId, blocks: std::ops::Range<u32>) -> Vec<Option<(Version, Tag, u64)>> {
        let found = self.server.disks().into_iter().find(|(id, _)| *id == disk);
        let Some((_, disk)) = found else { return Vec::new() };
        let addresses: Vec<u32> = blocks.collect();
        let got = disk.read(&addresses).await.unwrap_or_default();
        got.into_iter()
            .map(|got| match got {
                Got::Block(entry, data) => {
                    let sum =
                        data.map_or(0, |d| u64::from_le_bytes(blake3::hash(&d).as_bytes()[..8].try_into().unwrap_or_default()));
                    Some((entry.version, entry.tag, sum))
                }
                Got::Damaged(_) => None,
            })
            .collect()
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MirrorEvent> {
        self.server.events.subscribe()
    }

    /// How things are.
    #[must_use]
    pub fn status(&self) -> MirrorStatus {
        let config = Arc::clone(&self.server.view().config);
        let progress = self.progress.lock().clone();
        let copies = |disk: DiskId| {
            let members = config.mirrors.iter().flat_map(|(id, m)| m.members.iter().map(move |member| (*id, member)));
            members
                .filter(|(_, m)| m.disk == disk)
                .map(|(mirror, m)| CopyStatus {
                    mirror,
                    state: match m.state {
                        MemberState::InSync => "in-sync",
                        MemberState::Stale { .. } => "stale",
                        MemberState::Syncing { .. } => "syncing",
                    },
                    resync: progress.get(&(mirror, disk)).copied().filter(|_| matches!(m.state, MemberState::Syncing { .. })),
                })
                .collect()
        };
        let mut disks: Vec<DiskStatus> = self
            .server
            .disks()
            .into_iter()
            .map(|(id, disk)| {
                let (log_used, log_blocks, not_home, conflicts) = disk.counts();
                let faulted = disk.is_faulted();
                DiskStatus { disk: id, faulted, log_used, log_blocks, not_home, conflicts, copies: copies(id) }
            })
            .collect();
        disks.extend(self.broken.lock().iter().map(|id| DiskStatus {
            disk: *id,
            faulted: true,
            log_used: 0,
            log_blocks: 0,
            not_home: 0,
            conflicts: 0,
            copies: copies(*id),
        }));
        MirrorStatus {
            disks,
            groups_waiting: self.client.waiting() as u64,
            clock: self.server.clock.load(Ordering::Acquire),
            repaired: self.client.repaired.load(Ordering::Relaxed),
            corrupt: self.client.corrupt.load(Ordering::Relaxed),
            scrub: *self.scrub.lock(),
        }
    }

    /// Starts a scrub of this node's disks, unless one is running; see `status` and the event `ScrubFinished`.
    pub fn scrub(&self) {
        {
            let mut report = self.scrub.lock();
            if report.running {
                return;
            }
            *report = ScrubReport { running: true, ..ScrubReport::default() };
        }
        let (client, report) = (Arc::clone(&self.client), Arc::clone(&self.scrub));
        self.tasks.spawn(async move {
            scrub::scrub(&client, &report).await;
            let report = *report.lock();
            let _ = client.events.send(MirrorEvent::ScrubFinished { report });
        });
    }

    /// Stops cleanly: what waits ends with `Shutdown`, disks are written home.
    pub async fn shutdown(&self) {
        self.client.close();
        self.tasks.abort();
        self.rpc.close();
        for (_, disk) in self.server.disks() {
            disk.close().await;
        }
        self.disk_tasks.abort();
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.client.close();
        self.rpc.close();
        self.tasks.abort();
        self.disk_tasks.abort();
    }
}

/// Runs something unless a newer epoch begins; `None` then.
async fn until_newer<T>(
    views: &mut cluster::watch::Receiver<Arc<View>>,
    epoch: cluster::Epoch,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        biased;
        _ = views.wait_for(|v| v.epoch() > epoch || !v.member) => None,
        done = work => Some(done),
    }
}

/// Takes in messages.
struct Ear {
    client: Weak<Client>,
    server: Weak<Server>,
    rpc: Weak<Rpc>,
    tasks: Weak<Tasks>,
    /// One per question that waits or is worked on.
    places: Arc<Semaphore>,
}

/// Whether a write may come from a peer: its own, or a repair, which is nobody's.
fn may_write(from: Peer, head: &WriteHead) -> bool {
    let own = Writer { node: from.node, incarnation: from.incarnation };
    head.writer == own || (matches!(head.mode, WriteMode::Repair { .. }) && head.writer == Writer::default())
}

impl Receiver for Ear {
    fn receive(&self, from: Peer, message: Message) {
        use crate::message::Request;
        let (Some(server), Some(rpc), Some(tasks)) = (self.server.upgrade(), self.rpc.upgrade(), self.tasks.upgrade()) else {
            return;
        };
        let Some(wire) = Wire::decode(&message) else {
            tracing::error!("malformed message from {}", from.node);
            return;
        };
        match wire {
            Wire::Reply { id, epoch, reply } => rpc.replied(from.node, id, epoch, reply, message.parts),
            Wire::Request { id, epoch, disk, request: Request::Write(head) } => {
                // Nobody writes in another's name: order and completeness are kept account of by writer.
                if !may_write(from, &head) {
                    tracing::error!("a write of {} in the name of {} is refused", from.node, head.writer.node);
                    return rpc.answer(from.node, id, epoch, Reply::Refused, Vec::new());
                }
                let respond = Box::new(move |reply| rpc.answer(from.node, id, epoch, reply, Vec::new()));
                server.write(epoch, disk, head, message.parts, respond);
            }
            Wire::Request { epoch, disk, request: Request::Completed { mirror, writer, upto }, .. } => {
                if writer.node == from.node && writer.incarnation == from.incarnation {
                    server.completed(epoch, disk, mirror, writer, upto);
                }
            }
            Wire::Request { id, epoch, disk, request } => {
                let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
                    // Whoever gets no answer of use to it asks again, after a pause.
                    return rpc.answer(from.node, id, epoch, Reply::Refused, Vec::new());
                };
                tasks.spawn(async move {
                    let _place = place;
                    let (reply, parts) = server.serve(epoch, disk, request).await;
                    rpc.answer(from.node, id, epoch, reply, parts);
                });
            }
        }
    }

    fn session_ended(&self, node: NodeId) {
        if let Some(rpc) = self.rpc.upgrade() {
            rpc.session_ended(node);
        }
        // Keeps the client's tasks awake to what was lost.
        drop(self.client.upgrade());
    }
}
