//! Several nodes with a shared disk, over a simulated network and mirrors in memory.

#![allow(dead_code)]

pub(crate) mod fake;

use bytes::Bytes;
use cluster::sim::{FixedCluster, FixedGroup, SimNet, test_config};
use cluster::{BLOCK_SIZE, BlockNo, Cluster, FsId, Layer, NodeId};
use fake::{FakeMirrors, FakeStore};
use parking_lot::Mutex;
use sld::{After, Content, Disk, Kind, Mode, ObjectId, Operation, Options, PulsarDisk, Sld, Tag, Upcalls, Write, WriteClass};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const REGION: u32 = mirror::REGION_BLOCKS;

/// What the file system was told.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) revoked: Mutex<Vec<(ObjectId, Option<Mode>)>>,
    pub(crate) resets: Mutex<u32>,
    pub(crate) lost: Mutex<Vec<ObjectId>>,
}

impl Upcalls for Told {
    fn revoked(&self, object: ObjectId, keep: Option<Mode>) -> Duration {
        self.revoked.lock().push((object, keep));
        Duration::ZERO
    }
    fn reset(&self) {
        *self.resets.lock() += 1;
    }
    fn lost(&self, objects: &[ObjectId]) {
        self.lost.lock().extend_from_slice(objects);
    }
}

#[allow(dead_code)]
pub(crate) struct TestNode {
    pub(crate) cluster: Arc<FixedCluster>,
    pub(crate) mirrors: Arc<FakeMirrors>,
    pub(crate) sld: Arc<Sld>,
    pub(crate) disk: PulsarDisk,
    pub(crate) told: Arc<Told>,
}

pub(crate) struct World {
    pub(crate) net: SimNet,
    pub(crate) group: FixedGroup,
    pub(crate) store: FakeStore,
    pub(crate) nodes: Vec<Option<TestNode>>,
    pub(crate) options: Options,
}

impl World {
    pub(crate) fn start(&self, cluster: Arc<FixedCluster>) -> TestNode {
        let mirrors = self.store.node(cluster.local());
        let sld = Sld::start(cluster.clone(), mirrors.clone(), self.options.clone());
        let disk = sld.disk(FsId(1));
        let told = Arc::new(Told::default());
        disk.set_upcalls(told.clone());
        TestNode { cluster, mirrors, sld, disk, told }
    }

    pub(crate) async fn new(count: u32, blocks: u32, seed: u64) -> World {
        Self::with(count, blocks, seed, Options::default()).await
    }

    pub(crate) async fn with(count: u32, blocks: u32, seed: u64, options: Options) -> World {
        let net = SimNet::new(seed);
        let group = FixedGroup::new(&net, test_config(count, 2.min(count), blocks));
        group.set_auto(&[Layer::Mirror, Layer::Fs]);
        let store = FakeStore::new(count, blocks, seed, 2000);
        let mut world = World { net, group, store, nodes: Vec::new(), options };
        let clusters: Vec<_> = (1..=count).map(|n| world.group.node(NodeId(n))).collect();
        for c in clusters {
            let node = world.start(c);
            world.nodes.push(Some(node));
        }
        world.recovered().await;
        world
    }

    pub(crate) async fn recovered(&self) {
        for _ in 0..10_000 {
            if self.group.recovered() == Layer::Fs {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("did not recover: {:?}", self.group.recovered());
    }

    pub(crate) fn n(&self, i: usize) -> &TestNode {
        self.nodes[i - 1].as_ref().expect("up")
    }

    pub(crate) fn disk(&self, i: usize) -> PulsarDisk {
        self.n(i).disk.clone()
    }

    pub(crate) fn down(&mut self, i: usize) {
        self.store.kill(NodeId(i as u32));
        self.nodes[i - 1] = None;
        self.group.down(NodeId(i as u32));
    }

    /// As `down`, when the mirrors have been killed before.
    pub(crate) fn down_only(&mut self, i: usize) {
        self.nodes[i - 1] = None;
        self.group.down(NodeId(i as u32));
    }

    pub(crate) fn up(&mut self, i: usize) {
        let cluster = self.group.up(NodeId(i as u32));
        self.nodes[i - 1] = Some(self.start(cluster));
    }

    pub(crate) fn check(&self) {
        for n in self.nodes.iter().flatten() {
            n.sld.check_invariants();
            n.disk.check_invariants();
        }
    }
}

pub(crate) fn page(fill: u64) -> Bytes {
    let mut v = vec![0; BLOCK_SIZE];
    v[..8].copy_from_slice(&fill.to_le_bytes());
    Bytes::from(v)
}

pub(crate) fn number(data: &Bytes) -> u64 {
    u64::from_le_bytes(data[..8].try_into().unwrap())
}

pub(crate) fn inode(block: BlockNo) -> ObjectId {
    ObjectId::Inode(block.pack())
}

pub(crate) fn write(object: ObjectId, block: BlockNo, fill: u64, after: Vec<After>) -> Write {
    let ObjectId::Inode(owner) = object else { panic!("not an inode") };
    let tag = Tag { kind: Kind::Inode, owner, offset: 0, birth: 1 };
    Write { block, object, content: Content::Data(page(fill)), tag, class: WriteClass::Metadata, after }
}

pub(crate) fn one(w: Write) -> Operation {
    Operation { writes: vec![w] }
}

/// Makes an object on a node, with a number in its block.
pub(crate) async fn create(disk: &PulsarDisk, fill: u64) -> BlockNo {
    let b = disk.alloc(None, 1).await.unwrap().start;
    let tokens = disk.adopt(inode(b));
    disk.commit(one(write(inode(b), b, fill, vec![]))).unwrap();
    drop(tokens);
    b
}

pub(crate) async fn read(disk: &PulsarDisk, b: BlockNo) -> u64 {
    let _t = disk.acquire(&[(inode(b), Mode::Shared)]).await.unwrap();
    number(&disk.read(inode(b), b).await.unwrap())
}

pub(crate) async fn change(disk: &PulsarDisk, b: BlockNo, fill: u64) -> u64 {
    let _t = disk.acquire(&[(inode(b), Mode::Exclusive)]).await.unwrap();
    let old = number(&disk.read(inode(b), b).await.unwrap());
    disk.commit(one(write(inode(b), b, fill, vec![]))).unwrap();
    old
}
