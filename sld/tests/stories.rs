//! One node that is cut off and let back in; bounds; handing over; shutting down.

mod world;

use cluster::config::Command;
use cluster::sim::{SimClock, SimNet, test_config};
use cluster::{
    BlockNo, BoxFuture, Cluster, Config, Epoch, FsId, Incarnation, Instant, Layer, NodeId, ProposeError, Transport, View, watch,
};
use parking_lot::Mutex;
use sld::{After, Content, Disk, DiskError, FlushTarget, Mode, ObjectId, Operation, Options, PulsarDisk, Sld, Write, WriteClass};
use std::sync::Arc;
use std::time::Duration;
use world::fake::{FakeMirrors, FakeStore};
use world::{REGION, Told, World, change, create, inode, number, one, read, write};

/// A cluster of one node whose view and lease the test sets.
struct Stub {
    view: watch::Sender<Arc<View>>,
    lease: Mutex<bool>,
    finished: Mutex<Vec<(Epoch, Layer)>>,
    clock: SimClock,
    transport: Arc<dyn Transport>,
}

impl Stub {
    fn new() -> Arc<Stub> {
        let config = test_config(1, 1, REGION);
        let view = View { me: NodeId(1), config: Arc::new(config), recovered: Layer::Mirror, member: true };
        let net = SimNet::new(1);
        Arc::new(Stub {
            view: watch::Sender::new(Arc::new(view)),
            lease: Mutex::new(true),
            finished: Mutex::default(),
            clock: SimClock::new(Duration::from_secs(10), 0),
            transport: net.endpoint(NodeId(1), Incarnation(1)),
        })
    }

    fn show(&self, change: impl FnOnce(&mut Config), member: bool) {
        self.view.send_modify(|v| {
            let mut config = (*v.config).clone();
            config.epoch = config.epoch.next();
            change(&mut config);
            *v = Arc::new(View { me: NodeId(1), config: Arc::new(config), recovered: Layer::Mirror, member });
        });
    }
}

impl Cluster for Stub {
    fn local(&self) -> NodeId {
        NodeId(1)
    }
    fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }
    fn lease_until(&self) -> Instant {
        if *self.lease.lock() { Instant(u64::MAX) } else { Instant(0) }
    }
    fn now(&self) -> Instant {
        self.clock.now()
    }
    fn finish(&self, epoch: Epoch, layer: Layer) {
        self.finished.lock().push((epoch, layer));
    }
    fn propose(&self, _: Command) -> BoxFuture<'_, Result<cluster::config::Applied, ProposeError>> {
        Box::pin(std::future::ready(Err(ProposeError::Unavailable)))
    }
    fn transport(&self) -> Arc<dyn Transport> {
        self.transport.clone()
    }
}

fn alone(options: Options) -> (Arc<Stub>, FakeStore, Arc<FakeMirrors>, Arc<Sld>, PulsarDisk, Arc<Told>) {
    let cluster = Stub::new();
    let store = FakeStore::new(1, REGION, 1, 2000);
    let mirrors = store.node(NodeId(1));
    let sld = Sld::start(cluster.clone(), mirrors.clone(), options);
    let disk = sld.disk(FsId(1));
    let told = Arc::new(Told::default());
    disk.set_upcalls(told.clone());
    (cluster, store, mirrors, sld, disk, told)
}

async fn soon<T>(f: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), f).await.expect("in time")
}

#[tokio::test(start_paused = true)]
async fn a_write_that_can_never_be_done_is_told_at_once_and_reported_once() {
    let (_cluster, store, _mirrors, sld, disk, told) = alone(Options::default());
    let (a, b) = (create(&disk, 1).await, create(&disk, 2).await);
    disk.flush(&[FlushTarget::All]).await.unwrap();
    store.refuse(true);
    change(&disk, a, 11).await;
    assert_eq!(soon(disk.flush(&[FlushTarget::Object(inode(a))])).await, Err(DiskError::Lost));
    assert_eq!((*told.resets.lock(), told.lost.lock().clone()), (0, vec![inode(a)]));
    assert!(!disk.take_loss(inode(a)), "nothing is told twice");
    change(&disk, b, 12).await;
    // Written behind, with nobody waiting for it: it is for who closes the file.
    while told.lost.lock().len() < 2 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(disk.take_loss(inode(b)) && !disk.take_loss(inode(b)));
    store.refuse(false);
    change(&disk, a, 13).await;
    assert_eq!(soon(disk.flush(&[FlushTarget::Object(inode(a))])).await, Ok(()));
    assert_eq!(number(&store.peek(a).unwrap().0), 13);
    sld.check_invariants();
}

#[tokio::test(start_paused = true)]
async fn disk_that_is_opened_after_its_node_was_let_back_in_can_be_written() {
    let cluster = Stub::new();
    let store = FakeStore::new(1, REGION, 1, 2000);
    let sld = Sld::start(cluster.clone(), store.node(NodeId(1)), Options::default());
    let show = |up: bool, life: u64| {
        let node = move |c: &mut Config| {
            let n = c.nodes.get_mut(&NodeId(1)).unwrap();
            (n.up, n.incarnation) = (up, Incarnation(life));
        };
        cluster.show(node, up);
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    show(false, 1);
    tokio::time::sleep(Duration::from_millis(100)).await;
    show(true, 2);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let disk = sld.disk(FsId(1));
    let a = soon(create(&disk, 1)).await;
    soon(change(&disk, a, 2)).await;
    assert_eq!(disk.flush(&[FlushTarget::All]).await, Ok(()));
    assert_eq!(store.peek(a).map(|(d, _)| number(&d)), Some(2));
}

#[tokio::test(start_paused = true)]
async fn node_that_was_cut_off_drops_everything_and_says_so_once() {
    let (cluster, store, mirrors, sld, disk, told) = alone(Options::default());
    let (a, b) = (create(&disk, 1).await, create(&disk, 2).await);
    disk.flush(&[FlushTarget::All]).await.unwrap();
    change(&disk, a, 11).await;
    let old = disk.acquire(&[(inode(b), Mode::Exclusive)]).await.unwrap();
    // The lease has run out: nothing is served, though everything is still there.
    *cluster.lease.lock() = false;
    assert!(disk.try_acquire(&[(inode(a), Mode::Shared)]).is_none());
    assert!(disk.try_read(inode(a), a).is_none());
    let waiting = tokio::spawn({
        let disk = disk.clone();
        async move { read(&disk, a).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    // Declared dead.
    store.kill(NodeId(1));
    let durable = store.peek(a).map(|(d, _)| number(&d)).unwrap();
    cluster.show(|c| c.nodes.get_mut(&NodeId(1)).unwrap().up = false, false);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((*told.resets.lock(), told.lost.lock().clone()), (1, vec![inode(a)]));
    assert_eq!(disk.status().tokens, 0);
    // Let back in with a new life.
    store.revive(&mirrors);
    let up = |c: &mut Config| {
        let n = c.nodes.get_mut(&NodeId(1)).unwrap();
        (n.up, n.incarnation) = (true, Incarnation(2));
    };
    cluster.show(up, true);
    *cluster.lease.lock() = true;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished(), "an operation from before is still running");
    assert_eq!(disk.commit(one(write(inode(b), b, 22, vec![]))), Err(DiskError::Lost));
    drop(old);
    assert_eq!(soon(waiting).await.unwrap(), durable);
    assert_eq!(disk.flush(&[FlushTarget::Object(inode(a))]).await, Err(DiskError::Lost));
    assert_eq!(disk.flush(&[FlushTarget::Object(inode(a))]).await, Ok(()));
    assert!(!disk.take_loss(inode(a)), "nothing is told twice");
    assert_eq!(disk.flush(&[FlushTarget::Object(inode(b))]).await, Ok(()), "nothing of it was dirty");
    assert_eq!(soon(read(&disk, b)).await, 2);
    soon(change(&disk, b, 23)).await;
    disk.flush(&[FlushTarget::Object(inode(b))]).await.unwrap();
    assert_eq!(number(&store.peek(b).unwrap().0), 23);
    assert!(cluster.finished.lock().iter().any(|(e, l)| (*e, *l) == (Epoch(3), Layer::Sld)));
    sld.check_invariants();
    disk.check_invariants();
}

#[tokio::test(start_paused = true)]
async fn flush_that_waits_when_the_node_is_cut_off_answers_lost() {
    let (cluster, store, _mirrors, _sld, disk, _) = alone(Options::default());
    let a = create(&disk, 1).await;
    store.kill(NodeId(1));
    let flush = tokio::spawn({
        let disk = disk.clone();
        async move { disk.flush(&[FlushTarget::Object(inode(a))]).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!flush.is_finished());
    cluster.show(|c| c.nodes.get_mut(&NodeId(1)).unwrap().up = false, false);
    assert_eq!(soon(flush).await.unwrap(), Err(DiskError::Lost));
    assert_eq!(disk.flush(&[FlushTarget::Object(inode(a))]).await, Ok(()), "told once");
}

#[tokio::test(start_paused = true)]
async fn everything_ends_when_it_is_dropped() {
    let (_cluster, _store, _mirrors, sld, disk, _) = alone(Options::default());
    let a = create(&disk, 1).await;
    let held = disk.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
    let waiting = tokio::spawn({
        let disk = disk.clone();
        async move { disk.acquire(&[(inode(a), Mode::Shared)]).await.map(drop) }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(sld);
    assert_eq!(soon(waiting).await.unwrap(), Err(DiskError::Shutdown));
    assert_eq!(disk.flush(&[FlushTarget::All]).await, Err(DiskError::Shutdown));
    assert_eq!(disk.commit(Operation::new()), Err(DiskError::Shutdown));
    assert_eq!(disk.alloc(None, 1).await, Err(DiskError::Shutdown));
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn dirty_blocks_are_bounded_in_bytes_and_age() {
    let limit = 1 << 20;
    let (_cluster, store, _mirrors, _sld, disk, _) = alone(Options { dirty_bytes: limit, ..Options::default() });
    let a = create(&disk, 1).await;
    for i in 0..40u64 {
        soon(disk.admit()).await.unwrap();
        let e = disk.alloc(Some(a), 64).await.unwrap();
        let _t = disk.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
        let mut op = Operation::new();
        for k in 0..e.len {
            let b = BlockNo::new(e.start.mirror, e.start.index + k);
            op.push(Write { class: WriteClass::FreshData, ..write(inode(a), b, i, vec![]) });
        }
        op.push(write(inode(a), a, 100 + i, vec![After::DataOf(inode(a))]));
        disk.commit(op).unwrap();
        assert!(disk.status().dirty_bytes as usize <= limit + 65 * 4096, "{:?}", disk.status());
    }
    // Nobody asks for it, and yet it is written.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(disk.status().dirty_bytes, 0);
    assert_eq!(number(&store.peek(a).unwrap().0), 139);
    disk.check_invariants();
}

#[tokio::test(start_paused = true)]
async fn node_that_shuts_down_leaves_nothing_behind() {
    let w = World::new(2, REGION, 5).await;
    let a = create(&w.disk(1), 1).await;
    let region = w.disk(1).status().regions;
    assert!(region > 0);
    w.n(1).sld.shutdown().await.unwrap();
    assert_eq!(number(&w.store.peek(a).unwrap().0), 1);
    assert_eq!(w.disk(1).acquire(&[(inode(a), Mode::Shared)]).await.map(drop), Err(DiskError::Shutdown));
}

#[tokio::test(start_paused = true)]
async fn many_wait_for_one_fetch_and_read_ahead_is_ahead() {
    let w = World::new(2, 4 * REGION, 6).await;
    let disk = w.disk(1);
    let a = create(&disk, 1).await;
    let e = disk.alloc(Some(a), 32).await.unwrap();
    let blocks: Vec<BlockNo> = (0..e.len).map(|k| BlockNo::new(e.start.mirror, e.start.index + k)).collect();
    {
        let _t = disk.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
        let mut op = Operation::new();
        for (i, b) in blocks.iter().enumerate() {
            op.push(Write { class: WriteClass::FreshData, ..write(inode(a), *b, i as u64, vec![]) });
        }
        disk.commit(op).unwrap();
    }
    let other = w.disk(2);
    let _t = other.acquire(&[(inode(a), Mode::Shared)]).await.unwrap();
    let before = w.store.reads();
    other.read_ahead(inode(a), &blocks[..16]);
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (other, blocks) = (other.clone(), blocks.clone());
            tokio::spawn(async move { other.read_many(inode(a), &blocks).await.unwrap() })
        })
        .collect();
    for t in tasks {
        let got: Vec<u64> = t.await.unwrap().iter().map(number).collect();
        assert_eq!(got, (0..32).collect::<Vec<u64>>());
    }
    assert_eq!(w.store.reads() - before, 32, "each block once");
    assert_eq!(
        other.read(inode(a), BlockNo::new(cluster::MirrorId(99), 1)).await,
        Err(DiskError::NoSuchBlock(BlockNo::new(cluster::MirrorId(99), 1)))
    );
}

#[tokio::test(start_paused = true)]
async fn open_elsewhere_is_known_to_the_one_who_has_it_alone() {
    let w = World::new(3, 4 * REGION, 7).await;
    let a = create(&w.disk(1), 1).await;
    read(&w.disk(2), a).await;
    w.disk(2).set_open(inode(a), true);
    {
        let disk = w.disk(1);
        let _t = disk.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
        assert_eq!(disk.open_elsewhere(inode(a)), Some(true));
    }
    {
        let disk = w.disk(2);
        let _t = disk.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
        assert_eq!(disk.open_elsewhere(inode(a)), Some(false), "only here");
        disk.set_open(inode(a), false);
    }
    let disk = w.disk(3);
    let _t = disk.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
    assert_eq!(disk.open_elsewhere(inode(a)), Some(false));
}

#[tokio::test(start_paused = true)]
async fn region_is_handed_over_while_an_operation_holds_blocks_of_it() {
    // One region in all: two nodes that both allocate must take it from each other.
    let w = World::new(2, 64, 8).await;
    let (one_, two) = (w.disk(1), w.disk(2));
    let dir = create(&one_, 1).await;
    // Node 1 is in the middle of creating a file, and holds its directory.
    let t = one_.acquire(&[(inode(dir), Mode::Exclusive)]).await.unwrap();
    let new = one_.alloc(Some(dir), 1).await.unwrap().start;
    // Node 2 takes all there is.
    let mut taken = std::collections::BTreeSet::new();
    loop {
        match soon(two.alloc(None, 8)).await {
            Ok(e) => taken.extend((0..e.len).map(|k| BlockNo::new(e.start.mirror, e.start.index + k))),
            Err(e) => {
                assert_eq!(e, DiskError::NoSpace);
                break;
            }
        }
    }
    assert_eq!(taken.len(), 2 * 64 - 2);
    assert!(!taken.contains(&new) && !taken.contains(&dir));
    // Node 1 goes on: the new inode is adopted though its region is gone.
    let t2 = one_.adopt(inode(new));
    let mut op = Operation::new();
    let i = op.push(write(inode(new), new, 5, vec![]));
    op.push(write(inode(dir), dir, 2, vec![After::Write(i)]));
    one_.commit(op).unwrap();
    drop((t, t2));
    assert_eq!(soon(read(&two, dir)).await, 2);
    assert_eq!(soon(read(&two, new)).await, 5);
    assert_eq!(soon(change(&two, new, 6)).await, 5);
    assert_eq!(soon(read(&one_, new)).await, 6);
    w.check();
}

#[tokio::test(start_paused = true)]
async fn broken_sessions_lose_no_token() {
    let w = World::new(3, 4 * REGION, 9).await;
    let a = create(&w.disk(1), 0).await;
    let mut tasks = Vec::new();
    for n in 1..=3 {
        let disk = w.disk(n);
        tasks.push(tokio::spawn(async move {
            for _ in 0..30 {
                let _t = disk.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
                let old = number(&disk.read(inode(a), a).await.unwrap());
                disk.commit(one(write(inode(a), a, old + 1, vec![]))).unwrap();
            }
        }));
    }
    for i in 0..60u32 {
        tokio::time::sleep(Duration::from_millis(7)).await;
        w.net.break_session(NodeId(1 + i % 3), NodeId(1 + (i + 1) % 3));
    }
    for t in tasks {
        tokio::time::timeout(Duration::from_secs(600), t).await.expect("progress").unwrap();
    }
    assert_eq!(read(&w.disk(2), a).await, 90);
    w.check();
}

#[tokio::test(start_paused = true)]
async fn inode_that_is_freed_and_made_again_is_the_new_one_everywhere() {
    let w = World::new(2, 4 * REGION, 10).await;
    let (here, there) = (w.disk(1), w.disk(2));
    for round in 0..20 {
        let a = create(&here, 1000 + round).await;
        assert_eq!(read(&there, a).await, 1000 + round);
        {
            let _t = here.acquire(&[(inode(a), Mode::Exclusive)]).await.unwrap();
            let free = Write { content: Content::Free, ..write(inode(a), a, 0, vec![]) };
            here.commit(one(free)).unwrap();
        }
        if round % 2 == 0 {
            here.flush(&[FlushTarget::All]).await.unwrap();
        }
        // One with a stale reference.
        let _ = read(&there, a).await;
    }
    w.check();
    let object = ObjectId::Task(1, 1);
    drop(soon(there.acquire(&[(object, Mode::Exclusive)])).await.unwrap());
    drop(soon(here.acquire(&[(object, Mode::Exclusive)])).await.unwrap());
}
