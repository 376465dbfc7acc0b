//! A node: the layers, composed. Made from parts, so that the simulator can start the very same composition: a cluster
//! (membership and messaging), devices, a clock for people. No socket, file, thread or FUSE in here.
//!
//! Invariants:
//! - Every disk that was handed in and is not yet in the configuration is proposed until it is.
//! - Everything started here ends when the node is dropped or shut down.

use super::collector::Collector;
use super::hint;
use super::peers::{NodeFacts, Peers, Question, ScrubFacts};
use crate::control::{Answer, TaskAction, TaskReport};
use crate::events::{EventLog, Kind};
use crate::failure::{Context, Failure, Outcome};
use crate::status::{self, Facts, MountInfo, Resync, SCHEMA_VERSION, SpaceUse, Status};
use cluster::config::{Applied, Command, Config};
use cluster::{BLOCK_SIZE, Cluster, DiskId, FsId, NodeId, ProposeError, View};
use fs::check::DiskSource;
use fs::{FileSystem, FormatParams, Time};
use mirror::{BlockDevice, Mirror, MirrorEvent, MirrorOptions};
use parking_lot::Mutex;
use sld::{Disk, FlushTarget, PulsarDisk, Sld};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Nanoseconds since 1970.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;
/// Who leads the configuration, if known.
pub type Leader = Arc<dyn Fn() -> Option<NodeId> + Send + Sync>;
/// 16 random bytes: for identities and the key of the name hash.
pub type Random = Arc<dyn Fn() -> [u8; 16] + Send + Sync>;

/// A disk with its identity, as its label says.
#[derive(Clone)]
pub struct Device {
    /// Where it is, for messages.
    pub name: String,
    /// Identity.
    pub uuid: [u8; 16],
    /// Blocks of its data area.
    pub blocks: u32,
    /// The disk.
    pub device: Arc<dyn BlockDevice>,
}

/// What a node is made of.
pub struct Parts {
    /// Membership and messaging, started.
    pub cluster: Arc<dyn Cluster>,
    /// Who leads the configuration.
    pub leader: Leader,
    /// Its disks.
    pub devices: Vec<Device>,
    /// Memory for the block cache.
    pub cache_bytes: usize,
    /// The clock for people (virtual in the simulator): for events and for times of files only.
    pub wall_ns: WallClock,
    /// Random bytes.
    pub random: Random,
}

/// The file system as it is on a cluster.
pub type PulsarFs = FileSystem<PulsarDisk>;

/// A node with all its layers.
pub struct Node {
    cluster: Arc<dyn Cluster>,
    mirror: Arc<Mirror>,
    sld: Arc<Sld>,
    locks: Arc<sld::Locks>,
    notices: Arc<sld::Notices>,
    peers: OnceLock<Arc<Peers>>,
    events: Arc<EventLog>,
    leader: Leader,
    wall_ns: WallClock,
    random: Random,
    started: cluster::Instant,
    disk_errors: Mutex<Vec<(String, String)>>,
    open: tokio::sync::Mutex<BTreeMap<FsId, Arc<PulsarFs>>>,
    collector: Arc<Collector>,
    /// Disks that are served, to be written the configuration to.
    served: Arc<Mutex<Vec<Arc<dyn BlockDevice>>>>,
    tasks: Mutex<JoinSet<()>>,
}

/// How often a check of a file system in use is repeated if it finds something.
const FSCK_AGAIN: usize = 2;
/// Pause between two tries to change the configuration while there is no majority.
const RETRY: Duration = Duration::from_secs(1);
/// How long a report waits for what other nodes know.
const PEERS_TIME_MAX: Duration = Duration::from_millis(600);
/// How long something just made on another node may take to be known here.
const NEWS_TIME_MAX: Duration = Duration::from_secs(3);
/// Pause between two copies of the configuration onto the disks.
const HINT_PAUSE: Duration = Duration::from_millis(250);
/// The kernel believes what it was told for at most so long.
const LIFETIME_MAX: Duration = Duration::from_secs(1);

impl Node {
    /// Composes and starts the layers. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If a disk is not what it should be.
    pub async fn start(parts: Parts) -> Outcome<Arc<Node>> {
        let Parts { cluster, leader, devices, cache_bytes, wall_ns, random } = parts;
        let config = cluster.view().borrow().config.clone();
        let (mut known, mut new, mut served) = (Vec::new(), Vec::new(), Vec::new());
        for device in devices {
            match disk_id(&config, &device.uuid) {
                Some(id) => {
                    served.push(device.device.clone());
                    known.push((id, device.device));
                }
                None => new.push(device),
            }
        }
        let missing = missing(&config, cluster.local(), &known.iter().map(|(id, _)| *id).collect());
        let mirror = Mirror::start(cluster.clone(), known, MirrorOptions::default()).await.context(|| "cannot start".into())?;
        let options = sld::Options { cache_bytes, dirty_bytes: (cache_bytes / 4).max(16 << 20), ..sld::Options::default() };
        let sld = Sld::start(cluster.clone(), mirror.mirrors(), options);
        let locks = sld::Locks::start(cluster.clone());
        let notices = sld::Notices::start(cluster.clone());
        let node = Arc::new(Node {
            locks,
            notices,
            events: Arc::new(EventLog::new(wall_ns.clone())),
            leader,
            wall_ns,
            random,
            started: cluster.now(),
            disk_errors: Mutex::default(),
            open: tokio::sync::Mutex::default(),
            collector: Arc::default(),
            served: Arc::new(Mutex::new(served)),
            tasks: Mutex::default(),
            peers: OnceLock::new(),
            cluster,
            mirror,
            sld,
        });
        let weak = Arc::downgrade(&node);
        let answer = Arc::new(move |question| weak.upgrade().map(|n| n.answer(&question)).unwrap_or_default());
        let _ = node.peers.set(Peers::start(&*node.cluster, answer));
        let (cluster, events) = (node.cluster.clone(), node.events.clone());
        node.spawn(async move { follow_view(&*cluster, &events).await });
        let (cluster, served) = (node.cluster.clone(), node.served.clone());
        node.spawn(async move { keep_hints(&*cluster, &served).await });
        let weak = Arc::downgrade(&node);
        node.spawn(Collector::after_losses(weak, node.cluster.view()));
        let (mirror_events, events) = (node.mirror.events(), node.events.clone());
        node.spawn(async move { follow_mirror(mirror_events, &events).await });
        for disk in missing {
            let weak = Arc::downgrade(&node);
            node.spawn(async move {
                let Some(node) = weak.upgrade() else { return };
                let text = format!("disk {disk} of this node could not be opened: it is given up, so that nobody waits for it");
                node.events.add(Kind::DiskFault, true, text);
                if let Err(e) = propose(&*node.cluster, Command::DiskFault { disk }).await {
                    tracing::error!("disk {disk} could not be given up: {e}");
                }
            });
        }
        for device in new {
            let weak = Arc::downgrade(&node);
            node.spawn(async move {
                let Some(node) = weak.upgrade() else { return };
                let name = device.name.clone();
                if let Err(e) = node.add_device(device).await {
                    node.disk_failed(name, e.message);
                }
            });
        }
        Ok(node)
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        // What has ended is reaped here, so that the set stays small.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> &Arc<dyn Cluster> {
        &self.cluster
    }

    /// What happened.
    #[must_use]
    pub fn events(&self) -> &Arc<EventLog> {
        &self.events
    }

    /// The mirror layer.
    #[must_use]
    pub fn mirror(&self) -> &Arc<Mirror> {
        &self.mirror
    }

    /// The shared disk.
    #[must_use]
    pub fn sld(&self) -> &Arc<Sld> {
        &self.sld
    }

    fn config(&self) -> Arc<Config> {
        self.cluster.view().borrow().config.clone()
    }

    /// Notes that a disk named in the settings cannot be used.
    pub fn disk_failed(&self, name: String, why: String) {
        self.events.add(Kind::DiskFault, true, format!("disk {name} cannot be used: {why}"));
        self.disk_errors.lock().push((name, why));
    }

    /// Gives a disk to the cluster and serves it.
    ///
    /// # Errors
    /// If the cluster refuses it, or it cannot be used.
    pub async fn add_device(&self, device: Device) -> Outcome<DiskId> {
        let Device { name, uuid, blocks, device } = device;
        let node = self.cluster.local();
        let id = loop {
            if let Some(id) = disk_id(&self.config(), &uuid) {
                break id;
            }
            if !self.config().nodes.contains_key(&node) {
                // This node has joined, but its own view is still of before.
                tokio::time::sleep(RETRY / 10).await;
                continue;
            }
            match propose(&*self.cluster, Command::DiskAdd { node, uuid, blocks }).await? {
                Applied::Disk(id) => break id,
                other => return Err(Failure::new(format!("disk {name}: the cluster answered {other:?}"))),
            }
        };
        self.mirror.add_disk(id, device.clone()).await.context(|| name)?;
        if let Err(e) = hint::write(&*device, &self.config()).await {
            tracing::warn!("disk {id}: {e}");
        }
        self.served.lock().push(device);
        Ok(id)
    }

    /// A disk is no longer named in the settings.
    pub(super) fn disk_forgotten(&self, name: &str) {
        self.disk_errors.lock().retain(|(disk, _)| disk != name);
    }

    /// The identity of a disk that can be replaced from here.
    ///
    /// # Errors
    /// It is another node's, or works.
    pub(super) fn replaceable(&self, old: DiskId) -> Outcome<[u8; 16]> {
        let config = self.config();
        let disk =
            config.disks.get(&old).ok_or_else(|| Failure::new(format!("there is no disk {old}; see 'pulsar disk list'")))?;
        if disk.node != self.cluster.local() {
            let name = status::node_name(&config, disk.node);
            return Err(Failure::new(format!("{old} is a disk of node {name}: replace it there")));
        }
        if !disk.faulted {
            return Err(Failure::new(format!("{old} works; only a failed disk is replaced")));
        }
        Ok(disk.uuid)
    }

    /// Puts a disk that is served, and empty, in a failed one's place.
    ///
    /// # Errors
    /// If the cluster refuses.
    pub(super) async fn replace_disk(&self, old: DiskId, uuid: &[u8; 16]) -> Outcome<()> {
        let new = disk_id(&self.config(), uuid)
            .ok_or_else(|| Failure::new("the new disk is not known to the cluster yet; try again"))?;
        propose(&*self.cluster, Command::DiskReplace { old, new }).await?;
        self.events.add(Kind::DiskAdded, false, format!("disk {new} takes the place of the failed disk {old}"));
        Ok(())
    }

    /// Makes a file system; one whose mkfs was interrupted is made again.
    ///
    /// # Errors
    /// If the cluster refuses: the name is taken, no space, not enough nodes with disks.
    pub async fn mkfs(&self, name: &str, copies: u8, size_bytes: Option<u64>) -> Outcome<String> {
        let interrupted = self.config().fs_named(name).filter(|(_, f)| !f.formatted).map(|(id, _)| id);
        let id = match interrupted {
            Some(id) => id,
            None => {
                let blocks = size_bytes.map(|b| b.div_ceil(BLOCK_SIZE as u64));
                let command = Command::FsCreate { name: name.into(), uuid: (self.random)(), copies, blocks };
                match propose(&*self.cluster, command).await? {
                    Applied::Fs(id) => id,
                    other => return Err(Failure::new(format!("{name}: the cluster answered {other:?}"))),
                }
            }
        };
        let config = self.config();
        let info = config.filesystems.get(&id).ok_or_else(|| Failure::new(format!("{name} is not known here yet; try again")))?;
        let params = FormatParams {
            uuid: info.uuid,
            hash_key: (self.random)(),
            label: name.into(),
            uid: 0,
            gid: 0,
            mode: 0o755,
            now: time(&self.wall_ns),
        };
        FileSystem::format(&self.sld.disk(id), &params).await.context(|| format!("cannot make {name}"))?;
        propose(&*self.cluster, Command::FsFormatted { fs: id }).await?;
        let blocks: u64 = info.mirrors.iter().filter_map(|m| config.mirrors.get(m)).map(|m| u64::from(m.blocks)).sum();
        let size = crate::size::human(blocks * BLOCK_SIZE as u64);
        Ok(format!(
            "file system {name} made: {size}, {} copies of every block; mount it with 'mount -t pulsarfs {name} DIR'",
            info.copies
        ))
    }

    /// Opens a file system, once per node.
    ///
    /// # Errors
    /// If there is none of that name, or it is damaged. Waits while there is no majority.
    pub async fn filesystem(&self, name: &str) -> Outcome<(FsId, Arc<PulsarFs>)> {
        let known = |view: &View| view.config.fs_named(name).filter(|(_, f)| f.formatted).map(|(id, _)| id);
        let mut views = self.cluster.view();
        // It may have been made a moment ago, on another node.
        let found = tokio::time::timeout(NEWS_TIME_MAX, views.wait_for(|v| known(v).is_some())).await;
        let Some(id) = found.ok().and_then(Result::ok).and_then(|()| known(&views.borrow())) else {
            let config = self.config();
            let names: Vec<&str> = config.filesystems.values().filter(|f| f.formatted).map(|f| f.name.as_str()).collect();
            let there = if names.is_empty() {
                "there is none; make one with 'pulsar mkfs NAME'".into()
            } else {
                format!("there are: {}", names.join(", "))
            };
            return Err(Failure::new(format!("there is no file system {name} in cluster {}; {there}", config.name)));
        };
        let mut open = self.open.lock().await;
        if let Some(fs) = open.get(&id) {
            return Ok((id, fs.clone()));
        }
        let wall_ns = self.wall_ns.clone();
        let fs = FileSystem::mount(self.sld.disk(id), Arc::new(move || time(&wall_ns))).await;
        let fs = Arc::new(fs.context(|| format!("cannot open {name}"))?);
        open.insert(id, fs.clone());
        Ok((id, fs))
    }

    /// What tells the other nodes of changes.
    #[must_use]
    pub fn notices(&self) -> Arc<sld::Notices> {
        self.notices.clone()
    }

    /// The lock service, and which node this is.
    #[must_use]
    pub fn locks(&self) -> (Arc<sld::Locks>, NodeId) {
        (self.locks.clone(), self.cluster.local())
    }

    /// How long the kernel may believe what it is told, from now on: never longer than the node lease.
    #[must_use]
    pub fn lifetime(&self) -> Arc<dyn Fn() -> Duration + Send + Sync> {
        let cluster = self.cluster.clone();
        Arc::new(move || cluster.lease_until().since(cluster.now()).min(LIFETIME_MAX))
    }

    /// Makes everything durable that was written on this node.
    ///
    /// # Errors
    /// If something of it was lost.
    pub async fn sync(&self) -> Outcome<()> {
        let open: Vec<Arc<PulsarFs>> = self.open.lock().await.values().cloned().collect();
        for fs in open {
            fs.disk().flush(&[FlushTarget::All]).await.context(|| "cannot make everything durable".into())?;
        }
        Ok(())
    }

    /// The report.
    pub async fn status(&self, mounts: Vec<MountInfo>) -> Status {
        let view = self.cluster.view().borrow().clone();
        let config = &*view.config;
        let lease_valid = self.cluster.lease_valid();
        let mut facts = Facts {
            lease_valid,
            leader: (self.leader)(),
            mounts,
            uptime_s: self.cluster.now().since(self.started).as_secs(),
            ..Facts::default()
        };
        for id in config.filesystems.keys() {
            let disk = self.sld.disk(*id).status();
            facts.dirty_bytes += disk.dirty_bytes;
            facts.cached_bytes += disk.cached_bytes;
        }
        let me = self.cluster.local();
        let others: Vec<NodeId> = config.up().into_iter().filter(|n| *n != me).collect();
        let peers = async {
            match self.peers.get() {
                Some(peers) if view.member && lease_valid => peers.ask(&others, &Question::Facts, PEERS_TIME_MAX).await,
                _ => BTreeMap::new(),
            }
        };
        let space = async { if view.member && lease_valid { self.space(config).await } else { BTreeMap::new() } };
        let (peers, space) = tokio::join!(peers, space);
        facts.space = space;
        for (node, known) in peers.into_iter().chain([(me, self.answer(&Question::Facts))]) {
            facts.resync.extend(known.resync);
            facts.disk_errors.extend(known.disk_errors.into_iter().map(|(name, why)| (node, name, why)));
        }
        status::assess(&view, &facts)
    }

    /// Used and free space; of file systems for which it cannot be told soon, nothing.
    async fn space(&self, config: &Config) -> BTreeMap<String, SpaceUse> {
        let mirrors = self.mirror.mirrors();
        let mut all = BTreeMap::new();
        let _ = tokio::time::timeout(PEERS_TIME_MAX, async {
            for fs in config.filesystems.values().filter(|f| f.formatted) {
                let mut sum = SpaceUse::default();
                for mirror in &fs.mirrors {
                    let Ok(space) = mirrors.space(*mirror).await else { return };
                    let free: u64 = space.free.iter().map(|f| u64::from(*f)).sum();
                    sum.size_bytes += space.blocks * BLOCK_SIZE as u64;
                    sum.used_bytes += space.blocks.saturating_sub(free) * BLOCK_SIZE as u64;
                }
                all.insert(fs.name.clone(), sum);
            }
        })
        .await;
        all
    }

    /// What only this node knows; for others.
    fn answer(&self, question: &Question) -> NodeFacts {
        let mut gc = None;
        match question {
            Question::Scrub(TaskAction::Start) => self.mirror.scrub(),
            Question::Gc(action) => {
                if *action == TaskAction::Stop {
                    self.collector.stop();
                }
                gc = Some(self.collector.report());
            }
            Question::Scrub(_) | Question::Facts => {}
        }
        let status = self.mirror.status();
        let mut resync = Vec::new();
        for disk in &status.disks {
            for copy in &disk.copies {
                let Some(progress) = copy.resync else { continue };
                resync.push(progress_of(copy.mirror.0, disk.disk.0, &progress));
            }
        }
        let scrub = ScrubFacts {
            running: status.scrub.running,
            finished: status.scrub.finished,
            looked: status.scrub.looked,
            blocks: status.scrub.blocks,
            checked: status.scrub.checked,
            repaired: status.scrub.repaired,
            unrepaired: status.scrub.unrepaired,
        };
        NodeFacts { resync, disk_errors: self.disk_errors.lock().clone(), scrub, gc }
    }

    /// Scrubs the disks of all nodes that are up, or tells how far that is.
    ///
    /// # Errors
    /// If it cannot be stopped.
    pub async fn scrub(&self, action: TaskAction) -> Outcome<TaskReport> {
        if action == TaskAction::Stop {
            return Err(Failure::new("a scrub cannot be stopped; it yields to other work and ends by itself"));
        }
        let answers = self.ask_all(&Question::Scrub(action)).await;
        Ok(scrub_report(answers.into_iter().map(|(name, facts)| (name, facts.map(|f| f.scrub)))))
    }

    /// Asks all nodes that are up, this one included; by their names, in order.
    pub(super) async fn ask_all(&self, question: &Question) -> Vec<(String, Option<NodeFacts>)> {
        let config = self.config();
        let nodes: Vec<NodeId> = config.up().into_iter().collect();
        let mut answers = match self.peers.get() {
            Some(peers) => peers.ask(&nodes, question, NEWS_TIME_MAX).await,
            None => BTreeMap::new(),
        };
        nodes.iter().map(|node| (status::node_name(&config, *node), answers.remove(node))).collect()
    }

    /// Checks a file system in use, without changing anything.
    ///
    /// # Errors
    /// If there is no such file system, or it cannot be checked.
    pub async fn fsck(&self, name: &str, answers: &mpsc::Sender<Answer>) -> Outcome<TaskReport> {
        let (_, fs) = self.filesystem(name).await?;
        let source = DiskSource(fs.disk().clone());
        let mut tell = |p: &fs::check::Progress| {
            // A client that does not keep up misses steps, not the end.
            let text = format!("{} inodes", p.inodes);
            let _ = answers.try_send(Answer::Progress { text, done: p.swept, total: p.blocks });
        };
        let what = || format!("cannot check {name}");
        // The sweep sees what is on the disks, the mark what is in this node's memory: they must agree first. What programs
        // change meanwhile looks like damage for a moment, so only what is found again counts.
        fs.disk().flush(&[FlushTarget::All]).await.context(what)?;
        let mut found = fs::check::check(&source, &mut tell).await.context(what)?;
        for _ in 0..FSCK_AGAIN {
            if found.is_clean() {
                break;
            }
            fs.disk().flush(&[FlushTarget::All]).await.context(what)?;
            let again = fs::check::check(&source, &mut tell).await.context(what)?;
            found = found.confirmed_by(&again);
        }
        Ok(super::offline::report_of(name, &found))
    }

    /// The collector.
    #[must_use]
    pub fn collector(&self) -> &Arc<Collector> {
        &self.collector
    }

    /// Stops cleanly: flushes, gives back what is held, and stops everything that was started here.
    pub async fn shutdown(&self) {
        self.tasks.lock().abort_all();
        self.collector.stop();
        self.open.lock().await.clear();
        if let Err(e) = self.sld.shutdown().await {
            tracing::warn!("at the end: {e}");
        }
        self.mirror.shutdown().await;
    }
}

/// The scrubs of all nodes in one report; `None`: no answer.
fn scrub_report(nodes: impl Iterator<Item = (String, Option<ScrubFacts>)>) -> TaskReport {
    let mut report = TaskReport { schema_version: SCHEMA_VERSION, task: "scrub".into(), ..TaskReport::default() };
    let (mut running, mut finished, mut all) = (false, false, true);
    for (name, facts) in nodes {
        let Some(s) = facts else {
            all = false;
            report.lines.push(format!("{name}: no answer"));
            continue;
        };
        running |= s.running;
        finished |= s.finished;
        all &= s.finished;
        report.done += s.looked;
        report.total += s.blocks;
        report.found += s.repaired + s.unrepaired;
        report.repaired += s.repaired;
        let state = match s {
            ScrubFacts { running: true, .. } => "running",
            ScrubFacts { finished: true, .. } => "done",
            _ => {
                report.lines.push(format!("{name}: no scrub since its daemon started"));
                continue;
            }
        };
        report.lines.push(format!(
            "{name}: {state}; {} of {} blocks of its copies looked through, {} of them in use and read; {} copies repaired, {} damaged beyond repair",
            s.looked, s.blocks, s.checked, s.repaired, s.unrepaired
        ));
    }
    report.state = match (running, finished) {
        (true, _) => "running",
        // Some have, others have not: what is known is in the lines.
        (false, true) => {
            if all {
                "done"
            } else {
                "incomplete"
            }
        }
        (false, false) => "idle",
    }
    .into();
    report
}

/// Disks of a node that it has not got any more. Writes go to all current copies: one that nobody serves would hold them up
/// for ever.
fn missing(config: &Config, node: NodeId, opened: &BTreeSet<DiskId>) -> Vec<DiskId> {
    let here = config.disks.iter().filter(|(id, d)| d.node == node && !d.faulted && !opened.contains(id));
    here.map(|(id, _)| *id).collect()
}

fn disk_id(config: &Config, uuid: &[u8; 16]) -> Option<DiskId> {
    config.disks.iter().find(|(_, d)| d.uuid == *uuid).map(|(id, _)| *id)
}

fn time(wall_ns: &WallClock) -> Time {
    let ns = wall_ns();
    Time { seconds: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX), nanos: (ns % 1_000_000_000) as u32 }
}

fn progress_of(mirror: u32, disk: u32, p: &mirror::ResyncProgress) -> Resync {
    let block = BLOCK_SIZE as u64;
    let left = p.found.saturating_sub(p.copied);
    // What has not been scanned yet may differ as often as what has.
    let unknown = match p.scanned {
        0 => 0,
        scanned => (p.blocks.saturating_sub(scanned) as u128 * p.found as u128 / scanned as u128) as u64,
    };
    let eta = |blocks: u64| blocks.checked_div(p.rate);
    Resync {
        mirror,
        disk,
        left_bytes: left * block,
        done_bytes: p.copied * block,
        rate_bytes_s: p.rate * block,
        eta_s: eta(left).zip(eta((left + unknown) * 2)),
    }
}

async fn propose(cluster: &dyn Cluster, command: Command) -> Outcome<Applied> {
    loop {
        match cluster.propose(command.clone()).await {
            Ok(Applied::Refused(why)) => return Err(Failure::new(why)),
            Ok(applied) => return Ok(applied),
            Err(ProposeError::Refused(why)) => return Err(Failure::new(why)),
            Err(ProposeError::Unavailable) => tokio::time::sleep(RETRY).await,
        }
    }
}

/// Turns changes of the view into events.
async fn follow_view(cluster: &dyn Cluster, events: &EventLog) {
    let mut views = cluster.view();
    let mut last: Option<Arc<View>> = None;
    loop {
        let view = views.borrow_and_update().clone();
        events.view_changed(last.as_deref(), &view);
        last = Some(view);
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps a copy of the configuration on every disk, for checks of a stopped cluster.
async fn keep_hints(cluster: &dyn Cluster, served: &Mutex<Vec<Arc<dyn BlockDevice>>>) {
    let mut views = cluster.view();
    let mut written: Option<Arc<Config>> = None;
    loop {
        let config = views.borrow_and_update().config.clone();
        if config.epoch.0 > 0 && written.as_ref().is_none_or(|w| **w != *config) {
            let devices = served.lock().clone();
            for device in devices {
                if let Err(e) = hint::write(&*device, &config).await {
                    tracing::warn!("a disk cannot be written the configuration: {e}");
                }
            }
            written = Some(config);
        }
        // Changes come in bursts, when copies catch up; the last of them is what counts.
        tokio::time::sleep(HINT_PAUSE).await;
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// Turns what the mirror layer tells into events.
async fn follow_mirror(mut news: tokio::sync::broadcast::Receiver<MirrorEvent>, events: &EventLog) {
    use tokio::sync::broadcast::error::RecvError;
    loop {
        match news.recv().await {
            Ok(MirrorEvent::Repaired { block, disk, what }) => {
                events.add(
                    Kind::Repair,
                    true,
                    format!("block {block} on disk {disk} was damaged ({what}); repaired from another copy"),
                );
            }
            Ok(MirrorEvent::TagsLost { disk, blocks, why }) => events.add(
                Kind::Repair,
                true,
                format!("disk {disk}: the tags of {blocks} blocks cannot be read ({why}); they are repaired from other copies"),
            ),
            Ok(MirrorEvent::Corrupt { block }) => {
                events.add(Kind::Lost, true, format!("block {block} is damaged on every copy that can be reached"));
            }
            Ok(MirrorEvent::DiskFaulted { disk, why }) => events.add(Kind::DiskFault, true, format!("disk {disk} failed: {why}")),
            Ok(MirrorEvent::ResyncStarted { mirror, disk, since }) => events.add(
                Kind::CopySyncing,
                false,
                format!("mirror {mirror}: disk {disk} is brought up to date with what changed since epoch {}", since.0),
            ),
            Ok(MirrorEvent::ResyncProgress { mirror, disk, progress }) => events.add(
                Kind::CopySyncing,
                false,
                format!(
                    "mirror {mirror}: disk {disk}: {} of {} blocks compared, {} copied, {} per second",
                    progress.scanned,
                    progress.blocks,
                    crate::size::human(progress.copied * BLOCK_SIZE as u64),
                    crate::size::human(progress.rate * BLOCK_SIZE as u64)
                ),
            ),
            Ok(MirrorEvent::ResyncFinished { mirror, disk, copied }) => events.add(
                Kind::CopyInSync,
                false,
                format!(
                    "mirror {mirror}: disk {disk} is up to date; {} were copied",
                    crate::size::human(copied * BLOCK_SIZE as u64)
                ),
            ),
            Ok(MirrorEvent::ScrubFinished { report }) => events.add(
                Kind::Task,
                report.unrepaired > 0,
                format!(
                    "scrub of this node's disks: {} blocks read, {} copies repaired, {} damaged beyond repair",
                    report.checked, report.repaired, report.unrepaired
                ),
            ),
            Err(RecvError::Lagged(lost)) => {
                events.add(Kind::Repair, true, format!("{lost} more reports of the mirror layer came too fast to be kept"));
            }
            Err(RecvError::Closed) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_gone_is_not_waited_for() {
        let mut config = crate::status::tests::three();
        assert_eq!(missing(&config, NodeId(2), &BTreeSet::new()), [DiskId(2)]);
        assert!(missing(&config, NodeId(2), &BTreeSet::from([DiskId(2)])).is_empty());
        config.disks.get_mut(&DiskId(2)).unwrap().faulted = true;
        assert!(missing(&config, NodeId(2), &BTreeSet::new()).is_empty(), "known already");
    }

    #[test]
    fn a_scrub_of_all_nodes_is_told_as_it_is() {
        let of = |running, finished, looked| {
            Some(ScrubFacts { running, finished, looked, blocks: 100, checked: looked / 2, ..ScrubFacts::default() })
        };
        let report = |nodes: [Option<ScrubFacts>; 3]| scrub_report(["n1", "n2", "n3"].map(String::from).into_iter().zip(nodes));
        let r = report([of(true, false, 40), of(false, true, 100), Some(ScrubFacts::default())]);
        assert_eq!((&*r.state, r.done, r.total), ("running", 140, 200));
        assert!(r.lines[0].starts_with("n1: running; 40 of 100") && r.lines[1].starts_with("n2: done; 100 of 100"));
        assert_eq!(r.lines[2], "n3: no scrub since its daemon started");
        assert_eq!(report([of(false, true, 100), of(false, true, 0), of(false, true, 100)]).state, "done");
        let r = report([of(false, true, 100), None, of(false, true, 100)]);
        assert_eq!((&*r.state, &*r.lines[1]), ("incomplete", "n2: no answer"));
        assert_eq!(report([Some(ScrubFacts::default()); 3]).state, "idle");
    }
}
