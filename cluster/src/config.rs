//! The cluster's configuration: a small deterministic state machine, replicated by Raft.
//!
//! Invariants:
//! - `epoch` grows by exactly one with every applied command that changes membership or an in-sync set.
//! - A mirror always has at least one in-sync member: the last one is never dropped, even when its node is down.
//! - No two members of a mirror are on the same node.
//! - Areas of copies on one disk do not overlap and lie within its data area.
//! - A copy is `Syncing` only while its node is up and its disk works; `Stale` only while that is not so.
//! - Identifiers are never used again.
//!
//! A copy that is `InSync` on a node that is down blocks writes to its mirror (nothing may be acknowledged without it)
//! until the node is back, or is declared down again (`NodesDown` of a node that is already down drops its copies where
//! another one in sync is up). That happens when all nodes of a mirror went down together and only some came back.
//!
//! Excludes: how commands get agreed on (`raft`), who decides that a node is down (`membership`).

use crate::ids::{DiskId, Epoch, FsId, Incarnation, MirrorId, NodeId};
use crate::layout;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Everything the members agree on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Random identity of the cluster, made by `pulsar init`.
    pub cluster: [u8; 16],
    /// The cluster's name.
    pub name: String,
    /// The current epoch.
    pub epoch: Epoch,
    /// All members, up or not.
    pub nodes: BTreeMap<NodeId, NodeInfo>,
    /// All disks.
    pub disks: BTreeMap<DiskId, DiskInfo>,
    /// All mirrors.
    pub mirrors: BTreeMap<MirrorId, MirrorInfo>,
    /// All file systems, by id.
    pub filesystems: BTreeMap<FsId, FsInfo>,
    /// Join tokens that may still be used: blake3 of the secret, and when they expire (seconds since 1970).
    pub tokens: BTreeMap<[u8; 32], u64>,
    /// The next free number of each kind of id.
    pub next: NextIds,
}

/// The next identifiers to give out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextIds {
    /// Next node.
    pub node: u32,
    /// Next disk.
    pub disk: u32,
    /// Next mirror.
    pub mirror: u32,
    /// Next file system.
    pub fs: u32,
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name, unique in the cluster.
    pub name: String,
    /// `host:port` where its daemon listens.
    pub addr: String,
    /// Whether it is taken to be alive in this epoch.
    pub up: bool,
    /// The life of its daemon that this epoch knows.
    pub incarnation: Incarnation,
    /// Whether it votes on the configuration.
    pub voter: bool,
    /// The epoch that began when it last came up or went down; 0 if it never was up.
    pub changed: Epoch,
    /// The last epoch that it was up in and in which the mirrors of all nodes recovered (see [`Command::Recovered`]): its
    /// copies that are in sync agree with the others on everything written in earlier epochs. 0 if there was none.
    pub recovered: Epoch,
}

/// A disk of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// The node that it is in.
    pub node: NodeId,
    /// Random identity, also in the disk's superblock.
    pub uuid: [u8; 16],
    /// Blocks that it can give to mirrors (its data area), as its label says.
    pub blocks: u32,
    /// Faulted disks serve nothing until they are replaced.
    pub faulted: bool,
}

/// A mirror: equal areas on disks of different nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorInfo {
    /// The file system that it belongs to.
    pub fs: FsId,
    /// Size in blocks.
    pub blocks: u32,
    /// Its copies.
    pub members: Vec<Member>,
}

/// One copy of a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The disk.
    pub disk: DiskId,
    /// First block of the copy within the disk's data area.
    pub base: u32,
    /// How current it is.
    pub state: MemberState,
}

/// How current a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberState {
    /// It holds every acknowledged write. Writes are acknowledged only when it has them.
    InSync,
    /// It may have missed writes that were made in epochs after `since`, and may hold unacknowledged ones of `since`.
    /// Writes do not go to it.
    Stale {
        /// The last epoch in which it was in sync and had agreed with the others on earlier epochs' unfinished writes (see
        /// [`NodeInfo::recovered`]); `Epoch(0)` for a copy that never was.
        since: Epoch,
    },
    /// As `Stale`, but its node is back: it gets every new write, and a resync brings what it missed.
    Syncing {
        /// The last epoch in which it was in sync.
        since: Epoch,
    },
}

/// A file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsInfo {
    /// Its name, as in `mount -t pulsarfs NAME DIR`.
    pub name: String,
    /// Random identity, shown as the file system id.
    pub uuid: [u8; 16],
    /// Copies of every block.
    pub copies: u8,
    /// Its mirrors; block 0 of the first one is its superblock.
    pub mirrors: Vec<MirrorId>,
    /// True once its first blocks have been written.
    pub formatted: bool,
}

/// A change of the configuration. Applied in the same order on every member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The first command of a cluster.
    Init {
        /// Random identity.
        cluster: [u8; 16],
        /// Name.
        name: String,
    },
    /// A node becomes a member (down until its first `NodeUp`). Refused if the name or address is taken by another.
    NodeJoin {
        /// Its name.
        name: String,
        /// `host:port` of its daemon.
        addr: String,
    },
    /// A daemon has started: a new epoch; its stale copies become `Syncing`.
    NodeUp {
        /// The node.
        node: NodeId,
        /// Its new life; must be greater than the known one.
        incarnation: Incarnation,
        /// Where it listens now.
        addr: String,
    },
    /// Nodes are declared dead together: a new epoch; their copies become `Stale` where another in-sync copy is on a
    /// node that stays up.
    NodesDown {
        /// The nodes, each with the life that is declared dead (ignored if a newer one is up by now).
        nodes: Vec<(NodeId, Incarnation)>,
    },
    /// In this epoch the mirrors of all nodes that are up have recovered. Ignored in a later epoch. Starts no epoch.
    Recovered {
        /// The epoch.
        epoch: Epoch,
    },
    /// A join token may be used until it expires.
    TokenAdd {
        /// blake3 of its secret.
        hash: [u8; 32],
        /// Seconds since 1970.
        expires_unix: u64,
    },
    /// A join token may no longer be used.
    TokenRemove {
        /// blake3 of its secret.
        hash: [u8; 32],
    },
    /// A node is (or is no longer) to be a voter. The last one stays.
    SetVoter {
        /// The node.
        node: NodeId,
        /// Whether it votes.
        voter: bool,
    },
    /// A disk is added.
    DiskAdd {
        /// Where it is.
        node: NodeId,
        /// Identity in its superblock.
        uuid: [u8; 16],
        /// Blocks of its data area.
        blocks: u32,
    },
    /// A disk failed: its copies become `Stale` (unless the last in sync); a new epoch.
    DiskFault {
        /// The disk.
        disk: DiskId,
    },
    /// A file system is made over free space of the disks: mirrors are laid out (deterministically) here.
    FsCreate {
        /// Name, not in use.
        name: String,
        /// Identity.
        uuid: [u8; 16],
        /// Copies of every block, at least 1 and at most the number of nodes with disks.
        copies: u8,
        /// Wanted size in blocks; `None` for all free space.
        blocks: Option<u64>,
    },
    /// The first blocks of a file system have been written.
    FsFormatted {
        /// The file system.
        fs: FsId,
    },
    /// Resync is complete: the copies are in sync from the next epoch (one for all of them) on. Those that are no longer
    /// `Syncing` are left as they are, and those whose present `Syncing` state began after the epoch it was reported in.
    MembersSynced {
        /// Mirror and disk of each copy.
        copies: Vec<(MirrorId, DiskId)>,
        /// The epoch in which the resync finished.
        epoch: Epoch,
    },
    /// A disk that has no copies yet takes the place of a failed one of the same node: its copies move there, to be brought
    /// up to date in full; a new epoch. The failed disk stays known, so that it is never taken for a new one.
    DiskReplace {
        /// The failed disk.
        old: DiskId,
        /// The new one.
        new: DiskId,
    },
}

/// What applying a command answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Applied {
    /// Done (or nothing to do).
    Ok,
    /// A node id was given out.
    Node(NodeId),
    /// A disk id was given out.
    Disk(DiskId),
    /// A file system was made.
    Fs(FsId),
    /// Refused; nothing changed. Says what and why.
    Refused(String),
}

/// Most join tokens kept; the one that expires first goes when there are more.
pub const TOKENS_MAX: usize = 64;
/// Longest name of anything, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Ends an `apply` early.
fn refuse(why: impl Into<String>) -> Applied {
    Applied::Refused(why.into())
}

/// Whether a name can stand in a command line, a path and a certificate.
fn check_name(what: &str, name: &str) -> Result<(), Applied> {
    let fits = !name.is_empty() && name.len() <= NAME_BYTES_MAX;
    let chars = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if fits && chars && !name.starts_with(['-', '.']) {
        return Ok(());
    }
    Err(refuse(format!("{name:?} cannot be the name of a {what}: use 1 to {NAME_BYTES_MAX} of a-z A-Z 0-9 . _ -")))
}

impl Config {
    /// Applies a command. Deterministic: the same commands in the same order give the same configuration and answers.
    pub fn apply(&mut self, command: &Command) -> Applied {
        match self.try_apply(command) {
            Ok(applied) | Err(applied) => applied,
        }
    }

    /// `Err` is a refusal, with nothing changed.
    fn try_apply(&mut self, command: &Command) -> Result<Applied, Applied> {
        match command {
            Command::Init { cluster, name } => {
                if self.cluster != [0; 16] {
                    return Err(refuse(format!("this is already the cluster {:?}", self.name)));
                }
                check_name("cluster", name)?;
                self.cluster = *cluster;
                self.name = name.clone();
                self.next = NextIds { node: 1, disk: 1, mirror: 1, fs: 1 };
                Ok(Applied::Ok)
            }
            _ if self.cluster == [0; 16] => Err(refuse("there is no cluster yet: it has not been initialized")),
            Command::NodeJoin { name, addr } => self.node_join(name, addr),
            Command::NodeUp { node, incarnation, addr } => self.node_up(*node, *incarnation, addr),
            Command::NodesDown { nodes } => self.nodes_down(nodes),
            Command::Recovered { epoch } => {
                if *epoch == self.epoch {
                    self.nodes.values_mut().filter(|n| n.up).for_each(|n| n.recovered = *epoch);
                }
                Ok(Applied::Ok)
            }
            Command::TokenAdd { hash, expires_unix } => {
                self.tokens.insert(*hash, *expires_unix);
                while self.tokens.len() > TOKENS_MAX {
                    let first = self.tokens.iter().min_by_key(|(hash, expires)| (**expires, **hash)).map(|(hash, _)| *hash);
                    first.map(|hash| self.tokens.remove(&hash));
                }
                Ok(Applied::Ok)
            }
            Command::TokenRemove { hash } => {
                self.tokens.remove(hash);
                Ok(Applied::Ok)
            }
            Command::SetVoter { node, voter } => self.set_voter(*node, *voter),
            Command::DiskAdd { node, uuid, blocks } => self.disk_add(*node, *uuid, *blocks),
            Command::DiskFault { disk } => self.disk_fault(*disk),
            Command::FsCreate { name, uuid, copies, blocks } => self.fs_create(name, *uuid, *copies, *blocks),
            Command::FsFormatted { fs } => {
                let info = self.filesystems.get_mut(fs).ok_or_else(|| refuse(format!("there is no file system {fs}")))?;
                info.formatted = true;
                Ok(Applied::Ok)
            }
            Command::MembersSynced { copies, epoch } => self.members_synced(copies, *epoch),
            Command::DiskReplace { old, new } => self.disk_replace(*old, *new),
        }
    }

    fn node_join(&mut self, name: &str, addr: &str) -> Result<Applied, Applied> {
        check_name("node", name)?;
        if addr.is_empty() || addr.len() > 255 {
            return Err(refuse(format!("{addr:?} is not an address of the form host:port")));
        }
        for (id, node) in &self.nodes {
            if node.name == name && node.addr == addr && node.changed == Epoch(0) && node.incarnation == Incarnation(0) {
                // Its first join was committed but the answer got lost; it was never up, so nobody else has its place.
                return Ok(Applied::Node(*id));
            }
            if node.name == name {
                return Err(refuse(format!("a node named {name:?} is a member already ({id}, at {})", node.addr)));
            }
            if node.addr == addr {
                return Err(refuse(format!("the address {addr} is that of {} ({id})", node.name)));
            }
        }
        let id = NodeId(self.next.node);
        self.next.node += 1;
        let info = NodeInfo {
            name: name.to_owned(),
            addr: addr.to_owned(),
            up: false,
            incarnation: Incarnation(0),
            voter: false,
            changed: Epoch(0),
            recovered: Epoch(0),
        };
        self.nodes.insert(id, info);
        Ok(Applied::Node(id))
    }

    fn node_up(&mut self, id: NodeId, incarnation: Incarnation, addr: &str) -> Result<Applied, Applied> {
        if let Some((other, _)) = self.nodes.iter().find(|(other, n)| **other != id && n.addr == addr) {
            return Err(refuse(format!("{id} cannot be at {addr}: that is the address of {other}")));
        }
        let next = self.epoch.next();
        let node = self.nodes.get_mut(&id).ok_or_else(|| refuse(format!("there is no node {id}")))?;
        if incarnation <= node.incarnation {
            return Err(refuse(format!("{id} is known in a later life ({} >= {incarnation})", node.incarnation)));
        }
        node.up = true;
        node.incarnation = incarnation;
        node.addr = addr.to_owned();
        node.changed = next;
        self.epoch = next;
        let disks = &self.disks;
        for mirror in self.mirrors.values_mut() {
            for member in &mut mirror.members {
                let here = disks.get(&member.disk).is_some_and(|d| d.node == id && !d.faulted);
                if here && let MemberState::Stale { since } = member.state {
                    member.state = MemberState::Syncing { since };
                }
            }
        }
        Ok(Applied::Ok)
    }

    fn nodes_down(&mut self, nodes: &[(NodeId, Incarnation)]) -> Result<Applied, Applied> {
        let down: BTreeSet<NodeId> = nodes
            .iter()
            .filter(|(id, incarnation)| self.nodes.get(id).is_some_and(|n| n.incarnation <= *incarnation))
            .map(|(id, _)| *id)
            .collect();
        let newly: Vec<NodeId> = down.iter().copied().filter(|id| self.nodes.get(id).is_some_and(|n| n.up)).collect();
        let next = self.epoch.next();
        for id in &newly {
            if let Some(node) = self.nodes.get_mut(id) {
                node.up = false;
                node.changed = next;
            }
        }
        let dropped =
            self.demote(|_, disk| down.contains(&disk.node), |config, disk| config.nodes.get(&disk.node).is_some_and(|n| n.up));
        if dropped || !newly.is_empty() {
            self.epoch = next;
        }
        Ok(Applied::Ok)
    }

    fn disk_fault(&mut self, id: DiskId) -> Result<Applied, Applied> {
        let disk = self.disks.get_mut(&id).ok_or_else(|| refuse(format!("there is no disk {id}")))?;
        if disk.faulted {
            return Ok(Applied::Ok);
        }
        disk.faulted = true;
        // Every in-sync copy has all that was acknowledged, so one on a node that is down is worth waiting for.
        self.demote(|disk, _| disk == id, |_, disk| !disk.faulted);
        self.epoch = self.epoch.next();
        Ok(Applied::Ok)
    }

    /// Makes the copies on the lost disks stale, in-sync ones only where another in-sync copy is `good`. Says whether
    /// anything changed.
    fn demote(&mut self, lost: impl Fn(DiskId, &DiskInfo) -> bool, good: impl Fn(&Config, &DiskInfo) -> bool) -> bool {
        let mut changes = Vec::new();
        for (id, mirror) in &self.mirrors {
            let is_lost = |m: &Member| self.disks.get(&m.disk).is_none_or(|d| lost(m.disk, d));
            let survivor = mirror.members.iter().any(|m| {
                m.state == MemberState::InSync
                    && !is_lost(m)
                    && self.disks.get(&m.disk).is_some_and(|d| !d.faulted && good(self, d))
            });
            for (at, member) in mirror.members.iter().enumerate().filter(|(_, m)| is_lost(m)) {
                match member.state {
                    MemberState::InSync if survivor => {
                        let node = self.node_of(member.disk).and_then(|n| self.nodes.get(&n));
                        let since = node.map_or(Epoch(0), |n| n.recovered);
                        changes.push((*id, at, MemberState::Stale { since }));
                    }
                    MemberState::Syncing { since } => changes.push((*id, at, MemberState::Stale { since })),
                    MemberState::InSync | MemberState::Stale { .. } => {}
                }
            }
        }
        for (mirror, at, state) in &changes {
            if let Some(member) = self.mirrors.get_mut(mirror).and_then(|m| m.members.get_mut(*at)) {
                member.state = *state;
            }
        }
        !changes.is_empty()
    }

    fn set_voter(&mut self, id: NodeId, voter: bool) -> Result<Applied, Applied> {
        let others = self.nodes.iter().any(|(other, n)| *other != id && n.voter);
        let node = self.nodes.get_mut(&id).ok_or_else(|| refuse(format!("there is no node {id}")))?;
        if !voter && node.voter && !others {
            return Err(refuse(format!("{id} is the only voter; make another node a voter first")));
        }
        node.voter = voter;
        Ok(Applied::Ok)
    }

    fn disk_add(&mut self, node: NodeId, uuid: [u8; 16], blocks: u32) -> Result<Applied, Applied> {
        if !self.nodes.contains_key(&node) {
            return Err(refuse(format!("there is no node {node}")));
        }
        if let Some((id, disk)) = self.disks.iter().find(|(_, d)| d.uuid == uuid) {
            if disk.node == node && disk.blocks == blocks {
                return Ok(Applied::Disk(*id));
            }
            return Err(refuse(format!("this disk is known as {id} of {}, with {} blocks", disk.node, disk.blocks)));
        }
        if blocks < layout::REGION_BLOCKS {
            let (mib, least) = (u64::from(blocks) / 256, layout::REGION_BLOCKS / 256);
            return Err(refuse(format!("the disk is too small: it can give {mib} MiB of data, at least {least} MiB are needed")));
        }
        let id = DiskId(self.next.disk);
        self.next.disk += 1;
        self.disks.insert(id, DiskInfo { node, uuid, blocks, faulted: false });
        Ok(Applied::Disk(id))
    }

    fn disk_replace(&mut self, old: DiskId, new: DiskId) -> Result<Applied, Applied> {
        let disk = |id: DiskId| self.disks.get(&id).ok_or_else(|| refuse(format!("there is no disk {id}")));
        let (from, to) = (disk(old)?, disk(new)?);
        if !from.faulted {
            return Err(refuse(format!("{old} works; only a failed disk is replaced")));
        }
        if to.faulted || to.node != from.node {
            return Err(refuse(format!("{new} cannot take the place of {old}: it must be a working disk of {}", from.node)));
        }
        let on = |id: DiskId| {
            self.mirrors
                .iter()
                .flat_map(move |(m, info)| info.members.iter().filter(move |c| c.disk == id).map(move |c| (m, info, c)))
        };
        if on(old).next().is_none() {
            // It was replaced already, and the answer got lost; or there was never anything on it.
            return Ok(Applied::Ok);
        }
        if on(new).next().is_some() {
            return Err(refuse(format!("{new} has copies already; the disk that replaces another must be empty")));
        }
        let need = on(old).map(|(_, info, copy)| u64::from(copy.base) + u64::from(info.blocks)).max().unwrap_or(0);
        if need > u64::from(to.blocks) {
            return Err(refuse(format!(
                "{new} is too small: it can give {} MiB, {} MiB are needed",
                to.blocks / 256,
                need.div_ceil(256)
            )));
        }
        if let Some((mirror, ..)) = on(old).find(|(.., copy)| copy.state == MemberState::InSync) {
            return Err(refuse(format!("{old} has the only current copy of {mirror}: without it that data would be lost")));
        }
        let since = Epoch(0);
        let up = self.nodes.get(&to.node).is_some_and(|n| n.up);
        let state = if up { MemberState::Syncing { since } } else { MemberState::Stale { since } };
        for member in self.mirrors.values_mut().flat_map(|m| &mut m.members).filter(|m| m.disk == old) {
            (member.disk, member.state) = (new, state);
        }
        self.epoch = self.epoch.next();
        Ok(Applied::Ok)
    }

    fn fs_create(&mut self, name: &str, uuid: [u8; 16], copies: u8, blocks: Option<u64>) -> Result<Applied, Applied> {
        check_name("file system", name)?;
        if let Some((id, _)) = self.fs_named(name) {
            return Err(refuse(format!("there is a file system named {name:?} already ({id})")));
        }
        let plan = layout::plan(self, copies, blocks).map_err(refuse)?;
        let fs = FsId(self.next.fs);
        self.next.fs += 1;
        let mut ids = Vec::with_capacity(plan.len());
        for mirror in plan {
            let id = MirrorId(self.next.mirror);
            self.next.mirror += 1;
            let members =
                mirror.areas.into_iter().map(|(disk, base)| Member { disk, base, state: MemberState::InSync }).collect();
            self.mirrors.insert(id, MirrorInfo { fs, blocks: mirror.blocks, members });
            ids.push(id);
        }
        self.filesystems.insert(fs, FsInfo { name: name.to_owned(), uuid, copies, mirrors: ids, formatted: false });
        Ok(Applied::Fs(fs))
    }

    fn members_synced(&mut self, copies: &[(MirrorId, DiskId)], epoch: Epoch) -> Result<Applied, Applied> {
        for (mirror, disk) in copies {
            let info = self.mirrors.get(mirror).ok_or_else(|| refuse(format!("there is no mirror {mirror}")))?;
            if info.members.iter().all(|m| m.disk != *disk) {
                return Err(refuse(format!("{mirror} has no copy on {disk}")));
            }
        }
        let mut changed = false;
        for (mirror, disk) in copies {
            let began = self.node_of(*disk).and_then(|n| self.nodes.get(&n)).map_or(Epoch(0), |n| n.changed);
            let Some(info) = self.mirrors.get_mut(mirror) else { continue };
            for member in info.members.iter_mut().filter(|m| m.disk == *disk) {
                // A copy becomes Syncing when its node comes up, or as the first one on a new disk: of that no report is older.
                if matches!(member.state, MemberState::Syncing { .. }) && epoch >= began && epoch <= self.epoch {
                    member.state = MemberState::InSync;
                    changed = true;
                }
            }
        }
        if changed {
            self.epoch = self.epoch.next();
        }
        Ok(Applied::Ok)
    }

    /// Panics if an invariant of the header does not hold. For tests and the simulator.
    pub fn check_invariants(&self) {
        for (id, mirror) in &self.mirrors {
            assert!(id.0 > 0 && id.0 < self.next.mirror, "{id}: id was never given out");
            let fs = self.filesystems.get(&mirror.fs);
            assert!(fs.is_some_and(|f| f.mirrors.contains(id)), "{id}: not listed by its file system");
            assert_eq!(mirror.members.len(), fs.map_or(0, |f| usize::from(f.copies)), "{id}: wrong number of copies");
            assert!(mirror.blocks > 0 && mirror.blocks % layout::REGION_BLOCKS == 0, "{id}: size {}", mirror.blocks);
            assert!(mirror.members.iter().any(|m| m.state == MemberState::InSync), "{id}: no copy in sync");
            let nodes: BTreeSet<_> = mirror.members.iter().map(|m| self.node_of(m.disk)).collect();
            assert_eq!(nodes.len(), mirror.members.len(), "{id}: two copies on one node");
            for member in &mirror.members {
                let disk = &self.disks[&member.disk];
                let able = self.nodes[&disk.node].up && !disk.faulted;
                match member.state {
                    MemberState::InSync => {}
                    MemberState::Stale { since } => assert!(!able && since < self.epoch, "{id}: stale on {}", member.disk),
                    MemberState::Syncing { since } => assert!(able && since < self.epoch, "{id}: syncing on {}", member.disk),
                }
            }
        }
        for (id, disk) in &self.disks {
            assert!(id.0 > 0 && id.0 < self.next.disk && self.nodes.contains_key(&disk.node), "{id}");
            let mut areas: Vec<(u64, u64)> = Vec::new();
            for mirror in self.mirrors.values() {
                let on_it = mirror.members.iter().filter(|m| m.disk == *id);
                areas.extend(on_it.map(|m| (u64::from(m.base), u64::from(m.base) + u64::from(mirror.blocks))));
            }
            areas.sort_unstable();
            assert!(areas.windows(2).all(|w| w[0].1 <= w[1].0), "{id}: areas overlap");
            assert!(areas.last().is_none_or(|a| a.1 <= u64::from(disk.blocks)), "{id}: area beyond its end");
        }
        for (id, node) in &self.nodes {
            assert!(id.0 > 0 && id.0 < self.next.node, "{id}");
            assert!(node.changed <= self.epoch && node.recovered <= self.epoch, "{id}: epochs in the future");
            assert!(!node.up || node.incarnation > Incarnation(0), "{id}: up without a life");
        }
        for (id, fs) in &self.filesystems {
            assert!(id.0 > 0 && id.0 < self.next.fs && !fs.mirrors.is_empty(), "{id}");
            assert!(fs.mirrors.iter().all(|m| self.mirrors.get(m).is_some_and(|i| i.fs == *id)), "{id}: a mirror of another");
        }
        let names: BTreeSet<_> = self.nodes.values().map(|n| &n.name).collect();
        let addrs: BTreeSet<_> = self.nodes.values().map(|n| &n.addr).collect();
        assert!(names.len() == self.nodes.len() && addrs.len() == self.nodes.len(), "a name or address twice");
        assert!(self.tokens.len() <= TOKENS_MAX);
    }

    /// Nodes taken to be alive in this epoch.
    #[must_use]
    pub fn up(&self) -> BTreeSet<NodeId> {
        self.nodes.iter().filter(|(_, n)| n.up).map(|(id, _)| *id).collect()
    }

    /// The node of a disk.
    #[must_use]
    pub fn node_of(&self, disk: DiskId) -> Option<NodeId> {
        self.disks.get(&disk).map(|d| d.node)
    }

    /// A file system by its name.
    #[must_use]
    pub fn fs_named(&self, name: &str) -> Option<(FsId, &FsInfo)> {
        self.filesystems.iter().find(|(_, f)| f.name == name).map(|(id, f)| (*id, f))
    }
}

#[cfg(test)]
mod tests;
