//! A scripted cluster: stands in for membership in tests of the layers above it.

use super::{Rng, SimClock, SimEndpoint, SimNet};
use crate::BoxFuture;
use crate::config::{Applied, Command, Config, DiskInfo, FsInfo, Member, MemberState, MirrorInfo, NodeInfo};
use crate::ids::{DiskId, Epoch, FsId, Incarnation, MirrorId, NodeId};
use crate::node::{Cluster, Layer, ProposeError, View};
use crate::time::Instant;
use crate::transport::Transport;
use crate::watch;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// A configuration for tests: nodes 1 to `nodes`, all up with incarnation 1 and voting, a disk each (of the same number),
/// and one file system `fs` with a mirror per node: mirror i has its copies on the disks i, i+1, … . Epoch 1.
#[must_use]
pub fn test_config(nodes: u32, copies: u32, mirror_blocks: u32) -> Config {
    let mut config = Config { name: "sim".into(), epoch: Epoch(1), cluster: [7; 16], ..Config::default() };
    for n in 1..=nodes {
        let info = NodeInfo {
            name: format!("n{n}"),
            addr: format!("sim:{n}"),
            up: true,
            incarnation: Incarnation(1),
            voter: true,
            changed: Epoch(1),
            recovered: Epoch(1),
        };
        config.nodes.insert(NodeId(n), info);
        let disk = DiskInfo { node: NodeId(n), uuid: [n as u8; 16], blocks: mirror_blocks * copies, faulted: false };
        config.disks.insert(DiskId(n), disk);
    }
    for m in 1..=nodes {
        let members = (0..copies)
            .map(|c| Member { disk: DiskId((m - 1 + c) % nodes + 1), base: c * mirror_blocks, state: MemberState::InSync })
            .collect();
        config.mirrors.insert(MirrorId(m), MirrorInfo { fs: FsId(1), blocks: mirror_blocks, members });
    }
    let fs = FsInfo {
        name: "fs".into(),
        uuid: [9; 16],
        copies: copies as u8,
        mirrors: (1..=nodes).map(MirrorId).collect(),
        formatted: false,
    };
    config.filesystems.insert(FsId(1), fs);
    config.next.node = nodes + 1;
    config.next.disk = nodes + 1;
    config.next.mirror = nodes + 1;
    config.next.fs = 2;
    config
}

/// A scripted cluster: the test says which nodes are up; the configuration is shared at once, without Raft. Stands in for
/// membership in tests of the layers above it. Clones are the same group.
#[derive(Clone)]
pub struct FixedGroup {
    net: SimNet,
    state: Arc<Mutex<GroupState>>,
}

struct GroupState {
    rng: Rng,
    config: Config,
    /// Layers that nobody here runs: taken to recover by themselves.
    auto: BTreeSet<Layer>,
    /// Longest time until a node adopts a new epoch, in milliseconds.
    adopt_ms: u64,
    members: BTreeMap<NodeId, MemberNode>,
    recovered: Layer,
}

struct MemberNode {
    incarnation: Incarnation,
    view: watch::Sender<Arc<View>>,
    adopted: Epoch,
    finished: Layer,
}

const LAYERS: [Layer; 4] = [Layer::Cluster, Layer::Mirror, Layer::Sld, Layer::Fs];

impl FixedGroup {
    /// A group over a network. The configuration's epoch counts as not yet recovered by any layer.
    #[must_use]
    pub fn new(net: &SimNet, config: Config) -> Self {
        let state = GroupState {
            rng: Rng::new(11),
            config,
            auto: BTreeSet::new(),
            adopt_ms: 0,
            members: BTreeMap::new(),
            recovered: Layer::None,
        };
        FixedGroup { net: net.clone(), state: Arc::new(Mutex::new(state)) }
    }

    /// The network.
    #[must_use]
    pub fn net(&self) -> &SimNet {
        &self.net
    }

    /// Names layers that no node of the group runs: they are taken to recover by themselves.
    pub fn set_auto(&self, layers: &[Layer]) {
        let mut state = self.state.lock();
        state.auto = layers.iter().copied().collect();
        state.raise();
    }

    /// From now on nodes adopt a new epoch each after a random time up to `ms` milliseconds.
    pub fn set_adopt_ms(&self, ms: u64) {
        self.state.lock().adopt_ms = ms;
    }

    /// The newest configuration.
    #[must_use]
    pub fn config(&self) -> Config {
        self.state.lock().config.clone()
    }

    /// How far the current epoch has recovered.
    #[must_use]
    pub fn recovered(&self) -> Layer {
        self.state.lock().recovered
    }

    /// Starts (or restarts) the life of a node that is up in the configuration, with the incarnation that is there. The
    /// epoch recovers only as far as every node started here has reported, so start all of them before expecting it to.
    #[must_use]
    pub fn node(&self, node: NodeId) -> Arc<FixedCluster> {
        let mut state = self.state.lock();
        let incarnation = state.config.nodes.get(&node).map(|n| n.incarnation).unwrap_or_default();
        let config = Arc::new(state.config.clone());
        let member = state.config.nodes.get(&node).is_some_and(|n| n.up);
        let recovered = state.recovered;
        let (sender, view) = watch::channel(Arc::new(View { me: node, config, recovered, member }));
        let lease = Arc::new(Mutex::new(None));
        let adopted = state.config.epoch;
        // What the epoch has already reached is not taken back for a newcomer: `up` starts a new epoch for it.
        state.members.insert(node, MemberNode { incarnation, view: sender, adopted, finished: recovered });
        state.raise();
        drop(state);
        Arc::new(FixedCluster {
            group: self.clone(),
            node,
            incarnation,
            view,
            lease,
            clock: SimClock::new(Duration::from_secs(1000 * u64::from(node.0)), 0),
            endpoint: self.net.endpoint(node, incarnation),
        })
    }

    /// Changes the configuration as the test likes and starts a new epoch with it.
    pub fn change(&self, change: impl FnOnce(&mut Config)) {
        let mut state = self.state.lock();
        let epoch = state.config.epoch;
        change(&mut state.config);
        state.config.epoch = epoch.next();
        drop(state);
        self.new_epoch();
    }

    /// Applies a command; starts a new epoch if the command did.
    pub fn apply(&self, command: &Command) -> Applied {
        let mut state = self.state.lock();
        let before = state.config.epoch;
        let applied = state.config.apply(command);
        let changed = state.config.epoch != before;
        drop(state);
        if changed {
            self.new_epoch();
        } else {
            let mut state = self.state.lock();
            state.publish();
        }
        applied
    }

    /// A node's process dies, and the others are told of it in a new epoch: the simplest form of a crash. (To test what
    /// happens before the epoch changes, use `net().kill(node)` first.)
    pub fn down(&self, node: NodeId) {
        self.net.kill(node);
        let incarnation = {
            let mut state = self.state.lock();
            state.members.remove(&node);
            state.config.nodes.get(&node).map(|n| n.incarnation).unwrap_or_default()
        };
        self.apply(&Command::NodesDown { nodes: vec![(node, incarnation)] });
    }

    /// All processes die at once, without a new epoch.
    pub fn all_down(&self) {
        let nodes: Vec<_> = {
            let mut state = self.state.lock();
            let nodes = state.members.keys().copied().collect();
            state.members.clear();
            nodes
        };
        for node in nodes {
            self.net.kill(node);
        }
    }

    /// A node comes back with a higher incarnation, in a new epoch.
    #[must_use]
    pub fn up(&self, node: NodeId) -> Arc<FixedCluster> {
        let known = self.state.lock().config.nodes.get(&node).map(|n| (n.incarnation, n.addr.clone()));
        let (incarnation, addr) = known.unwrap_or_default();
        // First its part in the group, so that the new epoch waits for it.
        let mut state = self.state.lock();
        let command = Command::NodeUp { node, incarnation: Incarnation(incarnation.0 + 1), addr };
        let _ = state.config.apply(&command);
        drop(state);
        let cluster = self.node(node);
        self.new_epoch();
        cluster
    }

    fn new_epoch(&self) {
        let mut state = self.state.lock();
        state.recovered = Layer::None;
        for member in state.members.values_mut() {
            member.finished = Layer::None;
        }
        if state.adopt_ms == 0 {
            let epoch = state.config.epoch;
            for member in state.members.values_mut() {
                member.adopted = epoch;
            }
            state.publish();
            state.raise();
            return;
        }
        let epoch = state.config.epoch;
        let nodes: Vec<_> = state.members.keys().copied().collect();
        for node in nodes {
            let adopt_ms = state.adopt_ms;
            let delay = Duration::from_millis(state.rng.below(adopt_ms + 1));
            let group = Arc::downgrade(&self.state);
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let Some(group) = group.upgrade() else { return };
                let mut state = group.lock();
                if state.config.epoch == epoch {
                    if let Some(member) = state.members.get_mut(&node) {
                        member.adopted = epoch;
                    }
                    state.publish();
                    state.raise();
                }
            });
        }
    }
}

impl GroupState {
    /// Shows the newest configuration to every member that has adopted its epoch.
    fn publish(&mut self) {
        let config = Arc::new(self.config.clone());
        for (node, member) in &self.members {
            if member.adopted != self.config.epoch {
                continue;
            }
            let is_member = self.config.nodes.get(node).is_some_and(|n| n.up && n.incarnation == member.incarnation);
            let recovered = self.recovered;
            let view = View { me: *node, config: Arc::clone(&config), recovered, member: is_member };
            member.view.send_if_modified(|old| {
                let changed = **old != view;
                if changed {
                    *old = Arc::new(view);
                }
                changed
            });
        }
    }

    /// Raises `recovered` as far as all members have come.
    fn raise(&mut self) {
        if self.members.values().any(|m| m.adopted != self.config.epoch) {
            return;
        }
        let mut reached = self.recovered;
        for layer in LAYERS {
            let done = layer == Layer::Cluster
                || self.auto.contains(&layer)
                || self
                    .members
                    .iter()
                    .filter(|(n, _)| self.config.nodes.get(n).is_some_and(|n| n.up))
                    .all(|(_, m)| m.finished >= layer);
            if !done {
                break;
            }
            reached = reached.max(layer);
        }
        if reached != self.recovered && !self.members.is_empty() {
            self.recovered = reached;
            if reached >= Layer::Mirror {
                self.config.apply(&Command::Recovered { epoch: self.config.epoch });
            }
            self.publish();
        }
    }
}

/// One node's part in a [`FixedGroup`].
pub struct FixedCluster {
    group: FixedGroup,
    node: NodeId,
    incarnation: Incarnation,
    view: watch::Receiver<Arc<View>>,
    lease: Arc<Mutex<Option<Instant>>>,
    clock: SimClock,
    endpoint: Arc<SimEndpoint>,
}

impl FixedCluster {
    /// This life's incarnation.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Makes the node lease end at a time of this node's clock; `None`: never (as at the start).
    pub fn set_lease(&self, until: Option<Instant>) {
        *self.lease.lock() = until;
    }

    /// The node's clock.
    #[must_use]
    pub fn clock(&self) -> &SimClock {
        &self.clock
    }
}

impl Cluster for FixedCluster {
    fn local(&self) -> NodeId {
        self.node
    }

    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    fn lease_until(&self) -> Instant {
        self.lease.lock().unwrap_or(Instant(u64::MAX))
    }

    fn now(&self) -> Instant {
        self.clock.now()
    }

    fn finish(&self, epoch: Epoch, layer: Layer) {
        let mut state = self.group.state.lock();
        if epoch != state.config.epoch {
            return;
        }
        match state.members.get_mut(&self.node) {
            Some(member) if member.incarnation == self.incarnation => member.finished = member.finished.max(layer),
            _ => return,
        }
        state.raise();
    }

    fn propose(&self, command: Command) -> BoxFuture<'_, Result<Applied, ProposeError>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(2)).await;
            match self.group.apply(&command) {
                Applied::Refused(why) => Err(ProposeError::Refused(why)),
                applied => Ok(applied),
            }
        })
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::clone(&self.endpoint) as Arc<dyn Transport>
    }
}
