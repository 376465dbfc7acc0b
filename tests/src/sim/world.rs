//! A simulated cluster: its nodes with their disks, clocks and stores, and what can be done to them.
//!
//! The nodes run the product's own code from the agreement on the configuration up to the file system. What is simulated
//! is below it: network, clocks, disks, and the little store of each node (which is durable at once).
//!
//! Excludes: workloads (`exact`, `concurrent`), and what is right (`checkers`).

use super::Planted;
use super::stack::{Stack, StackDisk, StackOptions};
use cluster::config::{Applied, Command, MemberState};
use cluster::membership::Timing;
use cluster::raft::bootstrap;
use cluster::shell::driver::{self, ClusterNode};
use cluster::sim::{Gate, NetOptions, Rng, SimClock, SimNet};
use cluster::store::{MemoryStore, Store};
use cluster::{Cluster, Config, FsId, Incarnation, Layer, NodeId};
use fs::FileSystem;
use mirror::sim::{DiskOptions, Fault, SimDisk};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How a cluster is made.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// Decides everything.
    pub seed: u64,
    /// Nodes, each with one disk.
    pub nodes: usize,
    /// Copies of every block.
    pub copies: u8,
    /// Size of each disk in blocks.
    pub disk_blocks: u64,
    /// How the network behaves.
    pub net: NetOptions,
    /// How disks behave.
    pub disk: DiskOptions,
    /// The bug that is planted.
    pub planted: Option<Planted>,
}

impl WorldOptions {
    /// The usual cluster for a seed.
    #[must_use]
    pub fn new(seed: u64, nodes: usize) -> Self {
        let gate = Gate::default();
        WorldOptions {
            seed,
            nodes,
            copies: nodes.min(2) as u8,
            disk_blocks: 64 * 1024,
            net: NetOptions { gate: gate.clone(), ..NetOptions::default() },
            disk: DiskOptions { gate, ..DiskOptions::default() },
            planted: None,
        }
    }
}

/// A node's process.
struct Process {
    cluster: Arc<ClusterNode>,
    stack: Stack,
}

/// A node: what outlives its process, and the process if it runs.
struct Node {
    store: Arc<MemoryStore>,
    disk: SimDisk,
    clock: SimClock,
    lives: u64,
    process: Option<Process>,
}

/// See the module.
pub struct World {
    /// The network.
    pub net: SimNet,
    /// Chance for whoever drives the world.
    pub rng: Rng,
    /// What happened how often.
    pub coverage: BTreeMap<&'static str, u64>,
    /// Through which all messages, writes and flushes go.
    pub gate: Gate,
    nodes: Vec<Node>,
    fs: FsId,
    planted: Option<Planted>,
}

/// The longest time that anything may take when nothing is broken any more.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The id of the node at an index.
#[must_use]
pub fn id(node: usize) -> NodeId {
    NodeId(node as u32 + 1)
}

fn uuid(node: usize) -> [u8; 16] {
    [node as u8 + 1; 16]
}

const CLUSTER: [u8; 16] = [7; 16];

impl World {
    /// A cluster with all nodes up and an empty file system, mounted on all of them.
    ///
    /// # Errors
    /// Says what did not come about.
    pub async fn new(options: &WorldOptions) -> Result<World, String> {
        let mut rng = Rng::new(options.seed);
        let net = SimNet::with_options(rng.next_u64(), options.net.clone());
        let (nodes, planted) = (Vec::new(), options.planted);
        let gate = options.net.gate.clone();
        let mut world = World { net, rng, coverage: BTreeMap::new(), gate, nodes, fs: FsId(1), planted };
        for node in 0..options.nodes {
            let disk = SimDisk::with_options(options.disk_blocks, world.rng.next_u64(), options.disk.clone());
            mirror::format_disk(&disk, CLUSTER, uuid(node)).await.map_err(|e| format!("formatting a disk: {e}"))?;
            if options.planted == Some(Planted::LyingFlush) {
                disk.inject(Fault::LyingFlush);
            }
            if options.planted == Some(Planted::MissedWrites) && node == 0 {
                disk.inject(Fault::LosesWrites(100));
            }
            // Clocks show anything, and differ in speed by some hundred millionths.
            let offset = Duration::from_millis(world.rng.below(1_000_000_000));
            let drift = world.rng.below(400) as i64 - 200;
            let clock = SimClock::new(offset, drift);
            world.nodes.push(Node { store: Arc::default(), disk, clock, lives: 0, process: None });
        }
        world.bootstrap(options).await?;
        Ok(world)
    }

    async fn bootstrap(&mut self, options: &WorldOptions) -> Result<(), String> {
        let mut config = Config::default();
        config.apply(&Command::Init { cluster: CLUSTER, name: "sim".into() });
        config.apply(&Command::NodeJoin { name: "n1".into(), addr: "sim:1".into() });
        config.apply(&Command::SetVoter { node: id(0), voter: true });
        self.nodes[0].store.save(bootstrap(config, id(0))).await.map_err(|e| e.to_string())?;
        self.start_cluster(0)?;
        self.until("n1 is up", |w| w.view(0).is_some_and(|v| v.member)).await?;
        for node in 1..options.nodes {
            let n = node + 1;
            self.propose(Command::NodeJoin { name: format!("n{n}"), addr: format!("sim:{n}") }).await?;
            self.start_cluster(node)?;
        }
        let count = options.nodes;
        self.until("all nodes are up", |w| w.view(0).is_some_and(|v| v.config.up().len() == count)).await?;
        for node in 0..count {
            let blocks = mirror::format::Geometry::for_disk(options.disk_blocks).ok_or("the disks are too small")?.data_blocks;
            self.propose(Command::DiskAdd { node: id(node), uuid: uuid(node), blocks }).await?;
        }
        let create = Command::FsCreate { name: "fs".into(), uuid: [9; 16], copies: options.copies, blocks: None };
        match self.propose(create).await? {
            Applied::Fs(fs) => self.fs = fs,
            other => return Err(format!("no file system was made: {other:?}")),
        }
        self.until("everybody knows of the file system", |w| {
            (0..count).all(|n| w.view(n).is_some_and(|v| !v.config.filesystems.is_empty()))
        })
        .await?;
        for node in 0..count {
            self.start_stack(node).await?;
        }
        self.recovered().await?;
        if let Some(stack) = self.stack(0) {
            stack.format(self.fs).await?;
        }
        self.settled().await
    }

    async fn propose(&self, command: Command) -> Result<Applied, String> {
        let cluster = self.nodes.iter().find_map(|n| n.process_cluster()).ok_or("no node is up")?;
        cluster.propose(command.clone()).await.map_err(|e| format!("{command:?}: {e}"))
    }

    fn start_cluster(&mut self, node: usize) -> Result<(), String> {
        let seed = self.rng.next_u64();
        let n = &mut self.nodes[node];
        n.lives += 1;
        let cluster = driver::start(driver::Options {
            me: id(node),
            addr: None,
            peers: BTreeMap::new(),
            store: Arc::clone(&n.store) as Arc<dyn Store>,
            transport: self.net.endpoint(id(node), Incarnation(n.lives)),
            clock: Arc::new(n.clock.clone()),
            seed,
            timing: Timing::quick(),
        })
        .map_err(|e| e.to_string())?;
        n.process = Some(Process { cluster, stack: Stack::default() });
        Ok(())
    }

    async fn start_stack(&mut self, node: usize) -> Result<(), String> {
        let planted = self.planted;
        let n = &mut self.nodes[node];
        let Some(process) = &mut n.process else { return Err("the node is down".into()) };
        let options = StackOptions {
            cluster: process.cluster.clone(),
            disk: n.disk.clone(),
            disk_id: cluster::DiskId(node as u32 + 1),
            planted,
            clock: n.clock.clone(),
        };
        process.stack = Stack::start(options).await.map_err(|e| format!("n{}: {e}", node + 1))?;
        Ok(())
    }

    /// Counts something.
    pub fn cover(&mut self, what: &'static str) {
        *self.coverage.entry(what).or_default() += 1;
    }

    /// Number of nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are no nodes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Whether a node's process runs.
    #[must_use]
    pub fn is_up(&self, node: usize) -> bool {
        self.nodes[node].process.is_some()
    }

    /// Nodes whose processes run.
    #[must_use]
    pub fn up(&self) -> Vec<usize> {
        (0..self.len()).filter(|n| self.is_up(*n)).collect()
    }

    /// A node's disk.
    #[must_use]
    pub fn disk(&self, node: usize) -> &SimDisk {
        &self.nodes[node].disk
    }

    /// A node's clock.
    #[must_use]
    pub fn clock(&self, node: usize) -> &SimClock {
        &self.nodes[node].clock
    }

    /// A node's file system, if it runs.
    #[must_use]
    pub fn fs(&self, node: usize) -> Option<Arc<FileSystem<StackDisk>>> {
        self.nodes[node].process.as_ref().and_then(|p| p.stack.fs())
    }

    /// A node's layers, if it runs.
    #[must_use]
    pub fn stack(&self, node: usize) -> Option<&Stack> {
        self.nodes[node].process.as_ref().map(|p| &p.stack)
    }

    /// What a node knows of the cluster, if it runs.
    #[must_use]
    pub fn view(&self, node: usize) -> Option<Arc<cluster::View>> {
        self.nodes[node].process.as_ref().map(|p| p.cluster.view().borrow().clone())
    }

    /// Waits for something.
    ///
    /// # Errors
    /// If it has not come after [`PATIENCE`].
    pub async fn until(&self, what: &str, done: impl Fn(&World) -> bool) -> Result<(), String> {
        let start = tokio::time::Instant::now();
        while !done(self) {
            if start.elapsed() > PATIENCE {
                return Err(format!("no progress: '{what}' has not come about after {PATIENCE:?}\n{}", self.dump()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Waits until the running nodes agree on one epoch, in which all layers have recovered, and hold leases; and mounts
    /// where it is not mounted, unless both copies of something are away: then whatever needs it rightly waits for them.
    ///
    /// # Errors
    /// If that does not come about.
    pub async fn settled(&mut self) -> Result<(), String> {
        self.recovered().await?;
        if !self.is_available() {
            self.cover("data away");
            return Ok(());
        }
        let fs = self.fs;
        for (index, node) in self.nodes.iter_mut().enumerate() {
            if let Some(process) = &mut node.process {
                process.stack.mount(fs).await.map_err(|e| format!("n{}: {e}", index + 1))?;
            }
        }
        Ok(())
    }

    async fn recovered(&self) -> Result<(), String> {
        self.until("the running nodes have recovered", World::is_settled).await
    }

    /// Whether the running nodes agree on one epoch, in which all layers have recovered, and hold leases.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let running: Vec<_> = self.nodes.iter().filter_map(|n| n.process.as_ref()).collect();
        let views: Vec<_> = running.iter().map(|p| p.cluster.view().borrow().clone()).collect();
        views.iter().all(|v| {
            v.member && v.config.up().len() == running.len() && v.epoch() == views[0].epoch() && v.recovered == Layer::Fs
        }) && running.iter().all(|p| p.cluster.lease_valid())
    }

    /// Whether some copy in sync of everything is on a node that is up. (The last copy in sync stays that when its node dies;
    /// the other one has missed writes, and so is of no use until it has come back.)
    #[must_use]
    pub fn is_available(&self) -> bool {
        let Some(view) = (0..self.len()).find_map(|n| self.view(n)) else { return false };
        let up = view.config.up();
        let node_of = |disk| view.config.disks.get(&disk).map(|d| d.node);
        view.config.mirrors.values().all(|mirror| {
            let in_sync = mirror.members.iter().filter(|m| m.state == MemberState::InSync);
            in_sync.filter_map(|m| node_of(m.disk)).any(|node| up.contains(&node))
        })
    }

    /// Whether every copy is in sync, as the first running node knows.
    #[must_use]
    pub fn in_sync(&self) -> bool {
        let view = (0..self.len()).find_map(|n| self.view(n));
        view.is_some_and(|v| v.config.mirrors.values().flat_map(|m| &m.members).all(|m| m.state == MemberState::InSync))
    }

    /// A node's process dies; its machine, with its page cache, goes on.
    pub fn kill(&mut self, node: usize) {
        self.cover("kill");
        tracing::info!("fault: kill n{}", node + 1);
        self.end(node, false);
        self.nodes[node].disk.process_died();
    }

    /// A node loses power, silently: what its disk had not flushed may be lost.
    pub fn power_off(&mut self, node: usize) {
        self.cover("power off");
        tracing::info!("fault: power off n{}", node + 1);
        self.end(node, true);
        let seed = self.rng.next_u64();
        self.nodes[node].disk.crash(seed);
    }

    fn end(&mut self, node: usize, silently: bool) {
        let process = self.nodes[node].process.take();
        if silently {
            self.net.vanish(id(node));
        } else {
            self.net.kill(id(node));
        }
        if let Some(process) = process {
            process.cluster.shutdown();
        }
    }

    /// All nodes lose power at once.
    pub fn blackout(&mut self) {
        self.cover("blackout");
        tracing::info!("fault: blackout");
        for node in self.up() {
            self.power_off(node);
        }
    }

    /// Starts a node that is down. It is mounted when the cluster has recovered: see [`World::settled`].
    ///
    /// # Errors
    /// If it cannot start, for example because its disk is damaged beyond what is expected.
    pub async fn start(&mut self, node: usize) -> Result<(), String> {
        self.cover("start");
        tracing::info!("fault: start n{}", node + 1);
        self.start_cluster(node)?;
        self.start_stack(node).await
    }

    /// Cuts a node off from all others.
    pub fn isolate(&mut self, node: usize) {
        self.cover("isolate");
        tracing::info!("fault: isolate n{}", node + 1);
        let others: Vec<_> = (0..self.len()).map(id).collect();
        self.net.isolate(id(node), others);
    }

    /// Cuts one direction between two nodes.
    pub fn cut_one_way(&mut self, from: usize, to: usize) {
        self.cover("cut one way");
        tracing::info!("fault: cut n{} to n{}", from + 1, to + 1);
        self.net.cut_one_way(id(from), id(to));
    }

    /// Heals all cuts.
    pub fn heal(&mut self) {
        self.cover("heal");
        tracing::info!("fault: heal");
        self.net.heal_all();
    }

    /// After a run: everything is written, all copies are the same, and the checks find nothing.
    ///
    /// # Errors
    /// What is wrong.
    pub async fn finish(&mut self) -> Result<(), String> {
        for node in self.up() {
            let Some(fs) = self.fs(node) else { continue };
            // What the node lost when it was cut off is reported once, here if not before.
            let synced = async { if fs.sync().await.is_err() { fs.sync().await } else { Ok(()) } };
            let synced = tokio::time::timeout(PATIENCE, synced).await;
            let synced = synced.map_err(|_| format!("the last sync on n{} does not end", node + 1))?;
            synced.map_err(|e| format!("the last sync on n{}: {e}", node + 1))?;
            if let Some(stack) = self.stack(node) {
                stack.check_invariants();
            }
        }
        self.check_files().await?;
        self.check_copies().await
    }

    /// The check of the file system finds no damage; what a crash leaves over is none.
    async fn check_files(&mut self) -> Result<(), String> {
        let Some(fs) = self.fs(0) else { return Ok(()) };
        let source = fs::check::DiskSource(fs.disk().clone());
        let mut progress = |_: &fs::check::Progress| {};
        let checked = tokio::time::timeout(PATIENCE, fs::check::check(&source, &mut progress)).await;
        let report = checked.map_err(|_| "fsck does not end")?.map_err(|e| format!("fsck: {e}"))?;
        if !report.is_sound() {
            let damage: Vec<String> =
                report.issues.iter().filter(|i| !i.is_leftover()).take(5).map(|i| format!("{i:?}")).collect();
            return Err(format!("fsck finds damage: {}", damage.join("; ")));
        }
        *self.coverage.entry("blocks leaked").or_default() += report.blocks_leaked;
        *self.coverage.entry("files checked").or_default() += report.files;
        Ok(())
    }

    /// All copies of each block are the same, and none is damaged; no disk had to skip a write for no known reason.
    async fn check_copies(&mut self) -> Result<(), String> {
        const RUN: u32 = 512;
        let Some(view) = self.view(0) else { return Ok(()) };
        for (id, mirror) in &view.config.mirrors {
            for from in (0..mirror.blocks).step_by(RUN as usize) {
                let to = (from + RUN).min(mirror.blocks);
                let mut first = None;
                for member in &mirror.members {
                    let node = (member.disk.0 - 1) as usize;
                    let Some(mirror) = self.stack(node).and_then(Stack::mirror) else { continue };
                    let copy = mirror.copy_of(member.disk, member.base + from..member.base + to).await;
                    let Some((other, known)) = first.replace((member.disk, copy.clone())) else { continue };
                    if let Some(at) = (0..copy.len()).find(|i| copy[*i] != known[*i] || copy[*i].is_none()) {
                        let (block, a, b) = (from as usize + at, &known[at], &copy[at]);
                        return Err(format!("copies of {id}:{block} differ: {other} has {a:?}, {} has {b:?}", member.disk));
                    }
                }
            }
        }
        for node in self.up() {
            let Some(mirror) = self.stack(node).and_then(Stack::mirror) else { continue };
            if let Some(disk) = mirror.status().disks.iter().find(|d| d.conflicts > 0 || d.faulted) {
                return Err(format!("n{}: two writers of one block, or a failed disk: {disk:?}", node + 1));
            }
        }
        Ok(())
    }

    /// What every node thinks, for reports of failures.
    #[must_use]
    pub fn dump(&self) -> String {
        let mut text = String::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let Some(process) = &node.process else {
                text.push_str(&format!("n{}: down\n", index + 1));
                continue;
            };
            let view = process.cluster.view().borrow().clone();
            let copies: Vec<String> = view
                .config
                .mirrors
                .iter()
                .flat_map(|(id, m)| m.members.iter().map(move |c| format!("{id}/{}={:?}", c.disk, c.state)))
                .filter(|c| !c.ends_with("InSync"))
                .collect();
            text.push_str(&format!(
                "n{}: {} member={} recovered={:?} up={:?} leader={:?} lease={} not in sync: {}\n    {}\n",
                index + 1,
                view.epoch(),
                view.member,
                view.recovered,
                view.config.up(),
                process.cluster.leader(),
                process.cluster.lease_valid(),
                copies.join(" "),
                process.stack.dump(),
            ));
        }
        text
    }
}

impl Node {
    fn process_cluster(&self) -> Option<Arc<ClusterNode>> {
        self.process.as_ref().map(|p| p.cluster.clone())
    }
}
