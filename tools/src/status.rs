//! What `pulsar status` says. The report is a pure function of the view and of a few live facts, so every state of the
//! cluster can be tested; its rendering is in `cli::status`.
//!
//! It answers first what matters: is the data safe, can a node be lost now, are writes accepted. Then the problems, each
//! with what to do. A node that is not in the majority says so, and that the rest is what it knew last.

use cluster::config::{Config, Member, MemberState, MirrorInfo};
use cluster::{Layer, MirrorId, NodeId, View};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The version of everything that is printed as JSON. It grows when a field changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// What the daemon knows beside the view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether the node lease holds.
    pub lease_valid: bool,
    /// Who leads the configuration, if this node knows.
    pub leader: Option<NodeId>,
    /// Copies being brought up to date.
    pub resync: Vec<Resync>,
    /// Used and free space, by name of the file system; only those whose space is known.
    pub space: BTreeMap<String, SpaceUse>,
    /// Written by programs on this node, not yet on the disks.
    pub dirty_bytes: u64,
    /// In the block cache of this node.
    pub cached_bytes: u64,
    /// Mounts served by this daemon.
    pub mounts: Vec<MountInfo>,
    /// Disks named in a node's configuration file that cannot be used: node, disk, reason.
    pub disk_errors: Vec<(NodeId, String, String)>,
    /// Seconds since the daemon started.
    pub uptime_s: u64,
}

/// Space of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceUse {
    /// Usable bytes in all (each counted once, whatever the number of copies).
    pub size_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
}

/// A mount served by this daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountInfo {
    /// Name of the file system.
    pub fs: String,
    /// Where it is mounted.
    pub dir: String,
}

/// Progress of bringing one copy up to date.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resync {
    /// The mirror.
    pub mirror: u32,
    /// The disk that is brought up to date.
    pub disk: u32,
    /// Bytes that may still have to be copied.
    pub left_bytes: u64,
    /// Bytes done so far.
    pub done_bytes: u64,
    /// Bytes per second lately; 0 if not yet known.
    pub rate_bytes_s: u64,
    /// Seconds for the rest if it goes on as fast as in its best and its worst stretch; `None` if not yet known.
    pub eta_s: Option<(u64, u64)>,
}

/// How an answer is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// All is well.
    Ok,
    /// It works, with less safety than was asked for.
    Warning,
    /// It does not work.
    Bad,
    /// This node cannot know.
    Unknown,
}

/// An answer to one of the three questions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// How it is to be taken.
    pub level: Level,
    /// In words.
    pub text: String,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable name of this kind of problem, for scripts.
    pub code: String,
    /// How bad.
    pub level: Level,
    /// What is the matter, with which node or disk.
    pub what: String,
    /// What to do.
    pub action: String,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// `address:port`.
    pub addr: String,
    /// Whether it is a living member of this epoch.
    pub up: bool,
    /// Whether it votes on the configuration.
    pub voter: bool,
    /// Whether it leads the configuration.
    pub leader: bool,
    /// How often its daemon has started.
    pub incarnation: u64,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its number.
    pub id: u32,
    /// Name of the node that it is in.
    pub node: String,
    /// Identity in its label.
    pub uuid: String,
    /// Its data area.
    pub size_bytes: u64,
    /// Given to mirrors.
    pub used_bytes: u64,
    /// `ok`, `offline` (its node is down), `faulted`.
    pub state: String,
}

/// A copy of a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyStatus {
    /// The disk.
    pub disk: u32,
    /// Name of its node.
    pub node: String,
    /// `in_sync`, `syncing`, `stale`; what is reachable only is said by `reachable`.
    pub state: String,
    /// Whether its node is up and its disk not faulted.
    pub reachable: bool,
}

/// A mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorStatus {
    /// Its number.
    pub id: u32,
    /// Name of its file system.
    pub fs: String,
    /// Size.
    pub size_bytes: u64,
    /// Its copies.
    pub copies: Vec<CopyStatus>,
}

/// A file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsStatus {
    /// Its name.
    pub name: String,
    /// Copies of every block.
    pub copies: u8,
    /// Whether mkfs has been completed.
    pub formatted: bool,
    /// Usable size.
    pub size_bytes: u64,
    /// Used, if known here.
    pub used_bytes: Option<u64>,
}

/// The report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// See [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the cluster.
    pub cluster: String,
    /// Name of the node that made this report.
    pub node: String,
    /// Whether the node is in the majority: if not, all below is what it knew last.
    pub current: bool,
    /// Is the data safe?
    pub data_safe: Answer,
    /// Can I lose another node now?
    pub can_lose_node: Answer,
    /// Are writes accepted?
    pub writes_accepted: Answer,
    /// What is not as it should be, worst first.
    pub problems: Vec<Problem>,
    /// The epoch.
    pub epoch: u64,
    /// How far its recovery has come: `none`, `cluster`, `mirror`, `sld`, `fs` (all done).
    pub recovered: String,
    /// Name of the node that leads the configuration, if known.
    pub leader: Option<String>,
    /// The members.
    pub nodes: Vec<NodeStatus>,
    /// The disks.
    pub disks: Vec<DiskStatus>,
    /// The mirrors.
    pub mirrors: Vec<MirrorStatus>,
    /// The file systems.
    pub filesystems: Vec<FsStatus>,
    /// Copies being brought up to date.
    pub resync: Vec<Resync>,
    /// Bytes of all disks together.
    pub raw_bytes: u64,
    /// Bytes of the disks not given to any file system.
    pub raw_free_bytes: u64,
    /// Written by programs on this node, not yet on the disks.
    pub dirty_bytes: u64,
    /// In the block cache of this node.
    pub cached_bytes: u64,
    /// Mounts served by this daemon.
    pub mounts: Vec<MountInfo>,
    /// Seconds since the daemon started.
    pub uptime_s: u64,
}

impl Status {
    /// The worst of the three answers and the problems.
    #[must_use]
    pub fn worst(&self) -> Level {
        [self.data_safe.level, self.can_lose_node.level, self.writes_accepted.level]
            .into_iter()
            .chain(self.problems.iter().map(|p| p.level))
            .max()
            .unwrap_or(Level::Ok)
    }
}

const BLOCK: u64 = cluster::BLOCK_SIZE as u64;

/// The name of a layer, as it is printed.
#[must_use]
pub fn layer_name(layer: Layer) -> &'static str {
    match layer {
        Layer::None => "none",
        Layer::Cluster => "cluster",
        Layer::Mirror => "mirror",
        Layer::Sld => "sld",
        Layer::Fs => "fs",
    }
}

/// `n2` by name, or by number if it has none.
#[must_use]
pub fn node_name(config: &Config, node: NodeId) -> String {
    config.nodes.get(&node).map_or_else(|| node.to_string(), |n| n.name.clone())
}

/// Whether a copy can be reached: its node is up and its disk has not failed.
fn reachable(config: &Config, member: &Member) -> bool {
    config.disks.get(&member.disk).is_some_and(|d| !d.faulted && config.nodes.get(&d.node).is_some_and(|n| n.up))
}

/// Nodes with a reachable in-sync copy of a mirror.
fn good_nodes(config: &Config, mirror: &MirrorInfo) -> BTreeSet<NodeId> {
    mirror
        .members
        .iter()
        .filter(|m| m.state == MemberState::InSync && reachable(config, m))
        .filter_map(|m| config.node_of(m.disk))
        .collect()
}

fn answer(level: Level, text: impl Into<String>) -> Answer {
    Answer { level, text: text.into() }
}

fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|i| i.to_string()).collect::<Vec<_>>().join(", ")
}

/// Makes the report.
#[must_use]
pub fn assess(view: &View, facts: &Facts) -> Status {
    let config = &*view.config;
    let current = view.member && facts.lease_valid;
    let up = config.up();
    let voters: BTreeSet<NodeId> = config.nodes.iter().filter(|(_, n)| n.voter).map(|(id, _)| *id).collect();
    let majority = voters.len() / 2 + 1;
    let lost: Vec<MirrorId> =
        config.mirrors.iter().filter(|(_, m)| good_nodes(config, m).is_empty()).map(|(id, _)| *id).collect();
    let thin: Vec<MirrorId> = config
        .mirrors
        .iter()
        .filter(|(_, m)| {
            let good = good_nodes(config, m).len();
            good > 0 && good < wanted_copies(config, m)
        })
        .map(|(id, _)| *id)
        .collect();

    let mut status = Status {
        schema_version: SCHEMA_VERSION,
        cluster: config.name.clone(),
        node: node_name(config, view.me),
        current,
        data_safe: data_safe(config, &lost, &thin),
        can_lose_node: can_lose_node(config, &up, &voters, majority, &lost),
        writes_accepted: writes_accepted(view, &lost),
        problems: Vec::new(),
        epoch: config.epoch.0,
        recovered: layer_name(view.recovered).into(),
        leader: facts.leader.map(|l| node_name(config, l)),
        nodes: nodes(config, facts),
        disks: disks(config),
        mirrors: mirrors(config),
        filesystems: filesystems(config, facts),
        resync: facts.resync.clone(),
        raw_bytes: 0,
        raw_free_bytes: 0,
        dirty_bytes: facts.dirty_bytes,
        cached_bytes: facts.cached_bytes,
        mounts: facts.mounts.clone(),
        uptime_s: facts.uptime_s,
    };
    status.raw_bytes = status.disks.iter().map(|d| d.size_bytes).sum();
    status.raw_free_bytes = status.disks.iter().map(|d| d.size_bytes.saturating_sub(d.used_bytes)).sum();

    if !current {
        let known = format!("what it knew last, in epoch {}", config.epoch.0);
        status.data_safe =
            answer(Level::Unknown, format!("not known here: this node is cut off from the majority. Below is {known}"));
        status.can_lose_node = answer(Level::Unknown, "not known here; ask a node of the majority");
        status.writes_accepted =
            answer(Level::Bad, "not on this node: reads and writes wait here until it is let back in, without a remount");
        status.problems.push(Problem {
            code: "cut_off".into(),
            level: Level::Bad,
            what: format!(
                "node {} does not reach a majority of the {} voters ({})",
                status.node,
                voters.len(),
                list(voters.iter().map(|v| node_name(config, *v)))
            ),
            action: "check the network between the nodes and that pulsard runs on them; nothing has to be done here".into(),
        });
    }
    problems(view, facts, &lost, &mut status.problems);
    status.problems.sort_by_key(|p| std::cmp::Reverse(p.level));
    status
}

fn wanted_copies(config: &Config, mirror: &MirrorInfo) -> usize {
    config.filesystems.get(&mirror.fs).map_or(mirror.members.len(), |f| usize::from(f.copies)).max(1)
}

fn data_safe(config: &Config, lost: &[MirrorId], thin: &[MirrorId]) -> Answer {
    if config.mirrors.is_empty() {
        return answer(Level::Ok, "there is no data yet: make a file system with 'pulsar mkfs NAME'");
    }
    if !lost.is_empty() {
        let waits: BTreeSet<String> = lost
            .iter()
            .filter_map(|id| config.mirrors.get(id))
            .flat_map(|m| m.members.iter().filter(|x| x.state == MemberState::InSync))
            .filter_map(|m| config.node_of(m.disk))
            .map(|n| node_name(config, n))
            .collect();
        return answer(
            Level::Bad,
            format!(
                "part of it cannot be reached ({} of {} mirrors): its newest copy is on {}",
                lost.len(),
                config.mirrors.len(),
                list(waits)
            ),
        );
    }
    if !thin.is_empty() {
        return answer(
            Level::Warning,
            format!("yes, but {} of {} mirrors have fewer copies than asked for", thin.len(), config.mirrors.len()),
        );
    }
    match config.filesystems.values().map(|f| f.copies).min() {
        Some(1) => answer(Level::Warning, "yes, on one disk each: with one copy, a disk that fails takes its data along"),
        Some(n) => answer(Level::Ok, format!("yes, every block is on {n} disks of different nodes")),
        None => answer(Level::Ok, "yes"),
    }
}

fn can_lose_node(
    config: &Config,
    up: &BTreeSet<NodeId>,
    voters: &BTreeSet<NodeId>,
    majority: usize,
    lost: &[MirrorId],
) -> Answer {
    if !lost.is_empty() {
        return answer(Level::Bad, "no: a part of the data cannot be reached already");
    }
    let mut must_stay: BTreeMap<NodeId, Vec<&str>> = BTreeMap::new();
    for node in up {
        let left = voters.iter().filter(|v| up.contains(v) && *v != node).count();
        if left < majority {
            must_stay.entry(*node).or_default().push("the majority of voters");
        }
        if config.mirrors.values().any(|m| good_nodes(config, m).iter().all(|n| n == node)) {
            must_stay.entry(*node).or_default().push("the only current copy of data");
        }
    }
    if must_stay.is_empty() {
        return answer(Level::Ok, "yes, any one");
    }
    let reasons: BTreeSet<&str> = must_stay.values().flatten().copied().collect();
    let why = list(reasons);
    if must_stay.len() == up.len() {
        return answer(Level::Warning, format!("no: it would take along {why}"));
    }
    answer(Level::Warning, format!("not {}: it would take along {why}", list(must_stay.keys().map(|n| node_name(config, *n)))))
}

fn writes_accepted(view: &View, lost: &[MirrorId]) -> Answer {
    if !lost.is_empty() {
        return answer(Level::Bad, format!("not to {} of {} mirrors; they wait", lost.len(), view.config.mirrors.len()));
    }
    if view.recovered < Layer::Sld {
        return answer(
            Level::Warning,
            format!(
                "in a moment: epoch {} is recovering ({} is done)",
                view.config.epoch.0,
                match view.recovered {
                    Layer::None => "nothing",
                    layer => layer_name(layer),
                }
            ),
        );
    }
    answer(Level::Ok, "yes")
}

fn nodes(config: &Config, facts: &Facts) -> Vec<NodeStatus> {
    let one = |(id, n): (&NodeId, &cluster::config::NodeInfo)| NodeStatus {
        id: id.0,
        name: n.name.clone(),
        addr: n.addr.clone(),
        up: n.up,
        voter: n.voter,
        leader: facts.leader == Some(*id),
        incarnation: n.incarnation.0,
    };
    config.nodes.iter().map(one).collect()
}

/// Bytes as hexadecimal digits, as identities are shown.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn disks(config: &Config) -> Vec<DiskStatus> {
    let mut used: BTreeMap<cluster::DiskId, u64> = BTreeMap::new();
    for mirror in config.mirrors.values() {
        for member in &mirror.members {
            *used.entry(member.disk).or_default() += u64::from(mirror.blocks) * BLOCK;
        }
    }
    let one = |(id, d): (&cluster::DiskId, &cluster::config::DiskInfo)| DiskStatus {
        id: id.0,
        node: node_name(config, d.node),
        uuid: hex(&d.uuid),
        size_bytes: u64::from(d.blocks) * BLOCK,
        used_bytes: used.get(id).copied().unwrap_or(0),
        state: if d.faulted {
            "faulted"
        } else if config.nodes.get(&d.node).is_some_and(|n| n.up) {
            "ok"
        } else {
            "offline"
        }
        .into(),
    };
    config.disks.iter().map(one).collect()
}

fn mirrors(config: &Config) -> Vec<MirrorStatus> {
    let copy = |m: &Member| CopyStatus {
        disk: m.disk.0,
        node: config.node_of(m.disk).map_or_else(|| "?".into(), |n| node_name(config, n)),
        state: match m.state {
            MemberState::InSync => "in_sync",
            MemberState::Syncing { .. } => "syncing",
            MemberState::Stale { .. } => "stale",
        }
        .into(),
        reachable: reachable(config, m),
    };
    let one = |(id, m): (&MirrorId, &MirrorInfo)| MirrorStatus {
        id: id.0,
        fs: config.filesystems.get(&m.fs).map_or_else(|| m.fs.to_string(), |f| f.name.clone()),
        size_bytes: u64::from(m.blocks) * BLOCK,
        copies: m.members.iter().map(copy).collect(),
    };
    config.mirrors.iter().map(one).collect()
}

fn filesystems(config: &Config, facts: &Facts) -> Vec<FsStatus> {
    let size = |f: &cluster::config::FsInfo| {
        f.mirrors.iter().filter_map(|m| config.mirrors.get(m)).map(|m| u64::from(m.blocks) * BLOCK).sum()
    };
    let one = |f: &cluster::config::FsInfo| FsStatus {
        name: f.name.clone(),
        copies: f.copies,
        formatted: f.formatted,
        size_bytes: facts.space.get(&f.name).map_or_else(|| size(f), |s| s.size_bytes),
        used_bytes: facts.space.get(&f.name).map(|s| s.used_bytes),
    };
    config.filesystems.values().map(one).collect()
}

fn problems(view: &View, facts: &Facts, lost: &[MirrorId], out: &mut Vec<Problem>) {
    let config = &*view.config;
    let mut add = |code: &str, level, what: String, action: String| out.push(Problem { code: code.into(), level, what, action });
    for node in config.nodes.values().filter(|n| !n.up) {
        let never = node.incarnation.0 == 0;
        add(
            if never { "node_never_up" } else { "node_down" },
            Level::Warning,
            format!("node {} ({}) is {}", node.name, node.addr, if never { "not started yet" } else { "down" }),
            format!(
                "start pulsard there ('systemctl start pulsard', or 'pulsar start'); if it runs, check that port {} is open for UDP and TCP",
                node.addr.rsplit(':').next().unwrap_or("?")
            ),
        );
    }
    // One that was replaced is not missed.
    let missed = |id: &cluster::DiskId| config.mirrors.values().any(|m| m.members.iter().any(|c| c.disk == *id));
    for (id, disk) in config.disks.iter().filter(|(id, d)| d.faulted && missed(id)) {
        add(
            "disk_faulted",
            Level::Warning,
            format!("disk {id} in node {} failed; nothing is read from it or written to it", node_name(config, disk.node)),
            format!("put a new disk in and run 'pulsar disk replace {id} PATH' on that node"),
        );
    }
    for (node, path, why) in &facts.disk_errors {
        add(
            "disk_not_opened",
            Level::Warning,
            format!("disk {path} of node {} cannot be used: {why}", node_name(config, *node)),
            "check the path in the configuration file, and the device; then restart pulsard".into(),
        );
    }
    let mut syncing = 0;
    for mirror in config.mirrors.values() {
        syncing += mirror.members.iter().filter(|m| matches!(m.state, MemberState::Syncing { .. })).count();
    }
    if syncing > 0 {
        let left: u64 = facts.resync.iter().map(|r| r.left_bytes).sum();
        let text = if left > 0 { format!(", {} left", crate::size::human(left)) } else { String::new() };
        add(
            "resync",
            Level::Warning,
            format!("{syncing} copies are being brought up to date{text}"),
            "nothing; it ends by itself".into(),
        );
    }
    for id in lost {
        let Some(mirror) = config.mirrors.get(id) else { continue };
        let nodes = mirror.members.iter().filter(|m| m.state == MemberState::InSync).filter_map(|m| config.node_of(m.disk));
        add(
            "no_current_copy",
            Level::Bad,
            format!("no current copy of mirror {id} can be reached"),
            format!("bring back {}: the newest data is there", list(nodes.map(|n| node_name(config, n)))),
        );
    }
    for fs in config.filesystems.values().filter(|f| !f.formatted) {
        add(
            "not_formatted",
            Level::Warning,
            format!("file system {} was laid out but its mkfs did not end", fs.name),
            format!("run 'pulsar mkfs {}' again", fs.name),
        );
    }
    let voters = config.nodes.values().filter(|n| n.voter).count();
    if config.nodes.len() == 2 {
        add(
            "no_tie_breaker",
            Level::Warning,
            "with two nodes, the cluster stops when either fails".into(),
            "add a third node; it needs no disk".into(),
        );
    } else if config.nodes.len() >= 3 && voters < 3 {
        add(
            "few_voters",
            Level::Warning,
            format!("only {voters} of {} nodes vote on the configuration", config.nodes.len()),
            "wait: nodes become voters soon after they come up".into(),
        );
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use cluster::config::{DiskInfo, FsInfo, NodeInfo};
    use cluster::{DiskId, Epoch, FsId, Incarnation};
    use std::sync::Arc;

    /// Three nodes, each with a disk; one file system with two copies in three mirrors.
    pub(crate) fn three() -> Config {
        let mut config = Config { name: "test".into(), epoch: Epoch(7), ..Config::default() };
        for i in 1..=3 {
            config.nodes.insert(
                NodeId(i),
                NodeInfo {
                    name: format!("n{i}"),
                    addr: format!("10.0.0.{i}:7440"),
                    up: true,
                    incarnation: Incarnation(1),
                    voter: true,
                    changed: Epoch(1),
                    recovered: Epoch(7),
                },
            );
            config.disks.insert(DiskId(i), DiskInfo { node: NodeId(i), uuid: [i as u8; 16], blocks: 1 << 20, faulted: false });
            let member = |d| Member { disk: DiskId(d), base: 0, state: MemberState::InSync };
            config
                .mirrors
                .insert(MirrorId(i), MirrorInfo { fs: FsId(1), blocks: 1 << 18, members: vec![member(i), member(i % 3 + 1)] });
        }
        let mirrors = config.mirrors.keys().copied().collect();
        config.filesystems.insert(FsId(1), FsInfo { name: "data".into(), uuid: [9; 16], copies: 2, mirrors, formatted: true });
        config
    }

    pub(crate) fn view(config: Config) -> View {
        View { me: NodeId(1), config: Arc::new(config), recovered: Layer::Fs, member: true }
    }

    fn facts() -> Facts {
        Facts { lease_valid: true, leader: Some(NodeId(2)), ..Facts::default() }
    }

    fn node_down(config: &mut Config, node: u32) {
        config.nodes.get_mut(&NodeId(node)).unwrap().up = false;
        config.epoch = config.epoch.next();
        let copy = config.clone();
        for mirror in config.mirrors.values_mut() {
            let good = good_nodes(&copy, mirror);
            for m in &mut mirror.members {
                if copy.node_of(m.disk) == Some(NodeId(node)) && !good.is_empty() {
                    m.state = MemberState::Stale { since: Epoch(7) };
                }
            }
        }
    }

    #[test]
    fn healthy() {
        let s = assess(&view(three()), &facts());
        assert_eq!(s.worst(), Level::Ok, "{s:#?}");
        assert_eq!(s.can_lose_node.text, "yes, any one");
        assert_eq!(s.leader.as_deref(), Some("n2"));
        assert_eq!(s.raw_bytes, 3 << 32);
    }

    #[test]
    fn one_node_down_names_it_and_says_that_no_other_may_go() {
        let mut config = three();
        node_down(&mut config, 2);
        let s = assess(&view(config), &facts());
        assert_eq!(s.data_safe.level, Level::Warning);
        assert_eq!(s.can_lose_node.level, Level::Warning);
        assert!(s.can_lose_node.text.starts_with("no"), "{}", s.can_lose_node.text);
        assert_eq!(s.writes_accepted.level, Level::Ok);
        assert!(s.problems[0].what.contains("n2"));
    }

    #[test]
    fn two_nodes_down_of_five_with_lost_mirror() {
        let mut config = three();
        for i in 4..=5 {
            let mut n = config.nodes[&NodeId(1)].clone();
            n.name = format!("n{i}");
            config.nodes.insert(NodeId(i), n);
        }
        node_down(&mut config, 2);
        node_down(&mut config, 3);
        let s = assess(&view(config), &facts());
        assert_eq!(s.data_safe.level, Level::Bad);
        assert_eq!(s.writes_accepted.level, Level::Bad);
        assert_eq!(s.problems[0].code, "no_current_copy");
        assert!(s.problems[0].action.contains("n3"), "{:?}", s.problems[0]);
    }

    #[test]
    fn cut_off_is_honest() {
        let s = assess(&view(three()), &Facts::default());
        assert!(!s.current);
        assert_eq!(s.data_safe.level, Level::Unknown);
        assert_eq!(s.writes_accepted.level, Level::Bad);
    }

    #[test]
    fn recovering_says_so() {
        let mut v = view(three());
        v.recovered = Layer::Cluster;
        let s = assess(&v, &facts());
        assert_eq!(s.writes_accepted.text, "in a moment: epoch 7 is recovering (cluster is done)");
    }

    #[test]
    fn two_nodes_are_advised() {
        let mut config = three();
        config.nodes.remove(&NodeId(3));
        let s = assess(&view(config), &facts());
        assert!(s.problems.iter().any(|p| p.code == "no_tie_breaker"));
    }
}
