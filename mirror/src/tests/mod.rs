//! Whole nodes of this layer over the simulated network, cluster and disks: stories, and random runs with crashes.

use crate::api::{BlockDevice, BlockWrite, Kind, MirrorError, Mirrors, Tag, Version, WriteGroup};
use crate::format::format_disk;
use crate::mirror::{Mirror, MirrorOptions};
use crate::sim::SimDisk;
use bytes::Bytes;
use cluster::config::MemberState;
use cluster::sim::{FixedCluster, FixedGroup, Rng, SimNet, test_config};
use cluster::{BLOCK_SIZE, BlockNo, DiskId, Layer, MirrorId, NodeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

mod disk;
mod random;
mod stories;

const BLOCKS: u32 = 1024;
const DISK: u64 = 8 + 4096 + 3 * 1024 + 64;
const M: MirrorId = MirrorId(1);

struct World {
    net: SimNet,
    group: FixedGroup,
    disks: BTreeMap<u32, SimDisk>,
    nodes: BTreeMap<u32, (Arc<FixedCluster>, Arc<Mirror>)>,
}

impl World {
    /// `nodes` nodes with a disk each, `copies` copies of each block.
    async fn new(seed: u64, nodes: u32, copies: u32) -> World {
        let net = SimNet::new(seed);
        let group = FixedGroup::new(&net, test_config(nodes, copies, BLOCKS));
        group.set_auto(&[Layer::Sld, Layer::Fs]);
        let mut world = World { net, group, disks: BTreeMap::new(), nodes: BTreeMap::new() };
        for n in 1..=nodes {
            let disk = SimDisk::new(DISK, seed * 10 + u64::from(n));
            format_disk(&disk, [7; 16], [n as u8; 16]).await.unwrap();
            world.disks.insert(n, disk);
        }
        let clusters: Vec<_> = (1..=nodes).map(|n| (n, world.group.node(NodeId(n)))).collect();
        for (n, cluster) in clusters {
            world.start(n, cluster).await;
        }
        world
    }

    async fn start(&mut self, n: u32, cluster: Arc<FixedCluster>) {
        let disk: Arc<dyn BlockDevice> = Arc::new(self.disks[&n].clone());
        let options = MirrorOptions { tag_blocks_max: 64 };
        let mirror = Mirror::start(cluster.clone(), vec![(DiskId(n), disk)], options).await.unwrap();
        self.nodes.insert(n, (cluster, mirror));
    }

    fn at(&self, n: u32) -> Arc<dyn Mirrors> {
        self.nodes[&n].1.mirrors()
    }

    /// A node loses power; nobody knows yet.
    fn crash(&mut self, n: u32, seed: u64) {
        self.net.kill(NodeId(n));
        self.disks[&n].crash(seed);
        self.nodes.remove(&n);
    }

    /// A node comes back in a new epoch.
    async fn up(&mut self, n: u32) {
        let cluster = self.group.up(NodeId(n));
        self.start(n, cluster).await;
    }

    /// Power loss of everything, and everybody back.
    async fn blackout(&mut self, rng: &mut Rng) {
        let all: Vec<u32> = self.disks.keys().copied().collect();
        self.group.all_down();
        self.nodes.clear();
        for n in &all {
            self.disks[n].crash(rng.next_u64());
        }
        let dead = self.group.config().nodes.iter().map(|(id, n)| (*id, n.incarnation)).collect();
        self.group.apply(&cluster::Command::NodesDown { nodes: dead });
        for n in all {
            self.up(n).await;
        }
    }

    async fn in_sync(&self) {
        for _ in 0..10_000 {
            let config = self.group.config();
            let all = config.mirrors.values().flat_map(|m| &m.members).all(|m| m.state == MemberState::InSync);
            if all && self.group.recovered() >= Layer::Mirror {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not in sync: {:?}", self.group.config().mirrors);
    }

    /// All copies of all blocks are the same, whole, and of the same version.
    async fn copies_agree(&self) {
        for n in self.disks.keys() {
            let _ = self.nodes[n].1.mirrors().space(M).await.unwrap();
        }
        let config = self.group.config();
        for (id, mirror) in &config.mirrors {
            let mut seen: BTreeMap<u32, (Version, Tag, Option<Bytes>)> = BTreeMap::new();
            for (i, member) in mirror.members.iter().enumerate() {
                let disk = &self.nodes[&member.disk.0].1.disk(member.disk);
                disk.with(|c| c.check_invariants());
                for index in 0..mirror.blocks {
                    let got = disk.read(&[member.base + index]).await.unwrap().remove(0);
                    let crate::shell::disk::Got::Block(entry, data) = got else { panic!("{id}:{index} is damaged") };
                    if entry.version != Version(0) {
                        let sum = crate::format::block_checksum(*id, index, entry.version, &entry.tag, data.as_deref());
                        assert_eq!(sum, entry.checksum, "{id}:{index}");
                    }
                    let copy = (entry.version, entry.tag, data);
                    match seen.get(&index) {
                        Some(first) => assert!(*first == copy, "{id}:{index} copy {i}: {:?} {:?}", first.0, copy.0),
                        None => {
                            seen.insert(index, copy);
                        }
                    }
                }
            }
        }
        for (_, node) in self.nodes.values() {
            assert!(node.status().disks.iter().all(|d| d.conflicts == 0), "a write was skipped without a reason");
        }
    }
}

fn block(byte: u64) -> Bytes {
    let mut data = vec![byte as u8; BLOCK_SIZE];
    data[..8].copy_from_slice(&byte.to_le_bytes());
    data.into()
}

fn value(data: &Bytes) -> u64 {
    u64::from_le_bytes(data[..8].try_into().unwrap())
}

fn write(index: u32, byte: u64) -> BlockWrite {
    write_to(M, index, byte)
}

fn write_to(mirror: MirrorId, index: u32, byte: u64) -> BlockWrite {
    let tag = Tag { kind: Kind::Data, owner: 1, offset: byte, birth: 1 };
    BlockWrite { block: BlockNo::new(mirror, index), tag, data: Some(block(byte)) }
}

fn free(index: u32) -> BlockWrite {
    BlockWrite { block: BlockNo::new(M, index), tag: Tag::default(), data: None }
}

fn group(writes: Vec<BlockWrite>) -> WriteGroup {
    WriteGroup { writes, fresh_data: false }
}

async fn read(mirrors: &Arc<dyn Mirrors>, index: u32) -> u64 {
    value(&mirrors.read(vec![BlockNo::new(M, index)]).await.unwrap()[0].data)
}

/// Fails a test that waits for ever, by virtual time.
async fn within<T>(seconds: u64, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), work).await.expect("it waits for ever")
}

#[tokio::test(start_paused = true)]
async fn what_one_node_writes_every_node_reads() {
    let world = World::new(1, 3, 2).await;
    let (a, c) = (world.at(1), world.at(3));
    let v1 = within(60, a.submit(M, group(vec![write(5, 50), write(6, 60)]))).await.unwrap();
    let v2 = a.submit(M, WriteGroup { writes: vec![write(7, 70)], fresh_data: true }).await.unwrap();
    assert!(v1 < v2);
    // Node 3 has no copy of the mirror.
    assert_eq!((read(&c, 5).await, read(&c, 6).await, read(&c, 7).await, read(&c, 8).await), (50, 60, 70, 0));
    let got = c.read(vec![BlockNo::new(M, 7)]).await.unwrap().remove(0);
    assert_eq!((got.tag, got.version), (write(7, 70).tag, v2));
    // A writer that has read a block makes greater versions.
    assert!(c.submit(M, group(vec![write(5, 51)])).await.unwrap() > v2);
    assert_eq!(read(&a, 5).await, 51);
    let space = a.space(M).await.unwrap();
    assert_eq!((space.blocks, space.free), (u64::from(BLOCKS), vec![BLOCKS - 3]));
    a.submit(M, group(vec![free(6)])).await.unwrap();
    assert_eq!(read(&c, 6).await, 0);
    let map = c.region_free(M, 0).await.unwrap();
    assert_eq!(map.words[0], !(1 << 5 | 1 << 7));
    assert_eq!(map.words[16..], [0; 240], "beyond the end nothing is free");
    let tags = c.tags(BlockNo::new(M, 4), 4).await.unwrap();
    let kinds: Vec<_> = tags.iter().map(|(t, _)| t.kind).collect();
    assert_eq!(kinds, [Kind::Free, Kind::Data, Kind::Free, Kind::Data]);
    assert!(matches!(a.read(vec![BlockNo::new(M, BLOCKS)]).await, Err(MirrorError::NoSuchBlock { .. })));
    world.copies_agree().await;
}
