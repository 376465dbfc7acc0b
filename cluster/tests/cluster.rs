//! Whole nodes over the simulated network: elections, epochs, leases, coming back.

use bytes::Bytes;
use cluster::config::{Applied, Command};
use cluster::membership::Timing;
use cluster::node::{Cluster, Layer, ProposeError, View};
use cluster::raft::bootstrap;
use cluster::shell::driver::{ClusterNode, Options, start};
use cluster::sim::{Rng, SimClock, SimNet};
use cluster::store::{Batch, MemoryStore, Store};
use cluster::{Config, Epoch, Incarnation, Message, NodeId, Peer, Receiver, Service, Transport};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// What a node's layers have reported: its life, epoch and layer.
type Reports = Arc<Mutex<BTreeSet<(NodeId, Incarnation, Epoch, Layer)>>>;

/// A disk that takes its time.
struct SlowStore {
    inner: Arc<MemoryStore>,
    rng: Mutex<Rng>,
}

impl Store for SlowStore {
    fn load(&self) -> Result<cluster::store::Saved, cluster::store::StoreError> {
        self.inner.load()
    }
    fn save(&self, batch: Batch) -> cluster::BoxFuture<'_, Result<(), cluster::store::StoreError>> {
        Box::pin(async move {
            let wait = {
                let mut rng = self.rng.lock();
                if rng.percent(5) { rng.below(1500) } else { rng.below(20) }
            };
            tokio::time::sleep(Duration::from_millis(wait)).await;
            self.inner.save(batch).await
        })
    }
}

struct World {
    /// The stores take their time.
    slow: bool,
    net: SimNet,
    stores: BTreeMap<u32, Arc<MemoryStore>>,
    nodes: BTreeMap<u32, Arc<ClusterNode>>,
    clocks: BTreeMap<u32, SimClock>,
    lives: BTreeMap<u32, u64>,
    reports: Reports,
    /// Start the layers' part: report all layers as they become due.
    layers: bool,
}

impl World {
    async fn new(seed: u64) -> World {
        let mut config = Config::default();
        config.apply(&Command::Init { cluster: [3; 16], name: "test".into() });
        config.apply(&Command::NodeJoin { name: "n1".into(), addr: "sim:1".into() });
        config.apply(&Command::SetVoter { node: NodeId(1), voter: true });
        let store = Arc::new(MemoryStore::new());
        store.save(bootstrap(config, NodeId(1))).await.unwrap();
        let mut world = World {
            slow: false,
            net: SimNet::new(seed),
            stores: BTreeMap::from([(1, store)]),
            nodes: BTreeMap::new(),
            clocks: BTreeMap::new(),
            lives: BTreeMap::new(),
            reports: Reports::default(),
            layers: true,
        };
        world.start(1);
        world.until("n1 is up", |w| w.view(1).is_some_and(|v| v.member)).await;
        world
    }

    /// A cluster of `n` nodes, all up and recovered.
    async fn of(seed: u64, n: u32) -> World {
        let mut world = World::new(seed).await;
        for id in 2..=n {
            let join = Command::NodeJoin { name: format!("n{id}"), addr: format!("sim:{id}") };
            assert_eq!(world.nodes[&1].propose(join).await, Ok(Applied::Node(NodeId(id))));
            world.stores.insert(id, Arc::new(MemoryStore::new()));
            world.start(id);
        }
        world.settled(n as usize).await;
        let voters = n.min(if n < 3 {
            1
        } else if n < 5 {
            3
        } else {
            5
        }) as usize;
        world
            .until("voters are made", move |w| w.view(1).unwrap().config.nodes.values().filter(|n| n.voter).count() == voters)
            .await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        world
    }

    fn start(&mut self, id: u32) {
        let life = self.lives.entry(id).or_default();
        *life += 1;
        let clock =
            self.clocks.entry(id).or_insert_with(|| SimClock::new(Duration::from_secs(1000 * u64::from(id)), i64::from(id) * 20));
        let node = start(Options {
            me: NodeId(id),
            addr: None,
            peers: BTreeMap::new(),
            store: if self.slow {
                Arc::new(SlowStore { inner: Arc::clone(&self.stores[&id]), rng: Mutex::new(Rng::new(u64::from(id))) })
            } else {
                Arc::clone(&self.stores[&id]) as Arc<dyn Store>
            },
            transport: self.net.endpoint(NodeId(id), Incarnation(*life)),
            clock: Arc::new(clock.clone()),
            seed: 7,
            timing: Timing::default(),
        })
        .unwrap();
        if self.layers {
            let weak = Arc::downgrade(&node);
            let mut view = node.view();
            let reports = Arc::clone(&self.reports);
            tokio::spawn(async move {
                loop {
                    let now = view.borrow_and_update().clone();
                    let Some(node) = weak.upgrade() else { return };
                    if now.member {
                        let next = match now.recovered {
                            Layer::None => None,
                            Layer::Cluster => Some(Layer::Mirror),
                            Layer::Mirror => Some(Layer::Sld),
                            Layer::Sld | Layer::Fs => Some(Layer::Fs),
                        };
                        if let Some(layer) = next {
                            let life = now.config.nodes[&now.me].incarnation;
                            reports.lock().insert((now.me, life, now.epoch(), layer));
                            node.finish(now.epoch(), layer);
                        }
                    }
                    drop(node);
                    if view.changed().await.is_err() {
                        return;
                    }
                }
            });
        }
        self.nodes.insert(id, node);
    }

    /// The process ends; `noticed`: its machine tells so.
    fn kill(&mut self, id: u32, noticed: bool) {
        let node = self.nodes.remove(&id).unwrap();
        node.shutdown();
        self.stores[&id].crash();
        if noticed {
            self.net.kill(NodeId(id));
        } else {
            self.net.vanish(NodeId(id));
        }
    }

    fn view(&self, id: u32) -> Option<Arc<View>> {
        self.nodes.get(&id).map(|n| n.view().borrow().clone())
    }

    fn leader(&self) -> Option<u32> {
        let leaders: Vec<_> = self.nodes.values().filter_map(|n| n.leader()).collect();
        leaders.iter().find(|l| leaders.iter().filter(|m| m == l).count() * 2 > self.nodes.len()).map(|l| l.0)
    }

    async fn until(&self, what: &str, done: impl Fn(&World) -> bool) -> Duration {
        let start = tokio::time::Instant::now();
        while !done(self) {
            self.check();
            assert!(start.elapsed() < Duration::from_secs(30), "not within 30 s: {what}\n{}", self.dump());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        start.elapsed()
    }

    /// All running nodes see the same epoch, fully recovered, with `up` nodes, and hold leases.
    async fn settled(&self, up: usize) -> Duration {
        self.until(&format!("{up} nodes settled"), |w| {
            let views: Vec<_> = w.nodes.keys().filter_map(|id| w.view(*id)).collect();
            views
                .iter()
                .all(|v| v.member && v.config.up().len() == up && v.epoch() == views[0].epoch() && v.recovered == Layer::Fs)
                && w.nodes.values().all(|n| n.lease_valid())
        })
        .await
    }

    /// What must hold at any moment, whatever happens.
    fn check(&self) {
        let views: Vec<_> = self.nodes.keys().filter_map(|id| self.view(*id)).collect();
        for (id, node) in self.nodes.iter().filter(|(_, n)| n.lease_valid()) {
            let life = node.incarnation();
            for view in &views {
                let Some(info) = view.config.nodes.get(&NodeId(*id)) else { continue };
                let dead = info.incarnation > life || (info.incarnation == life && !info.up);
                assert!(!dead, "n{id} ({life}) holds a lease, but {} knows that it is dead\n{}", view.me, self.dump());
            }
        }
        let reports = self.reports.lock();
        for a in &views {
            for b in views.iter().filter(|b| b.epoch() == a.epoch()) {
                let of = |v: &View| v.config.nodes.iter().map(|(id, n)| (*id, n.up, n.incarnation)).collect::<Vec<_>>();
                assert!(a.epoch() == Epoch(0) || of(a) == of(b), "two sides of {}\n{}", a.epoch(), self.dump());
            }
            for (id, info) in a.config.nodes.iter().filter(|(_, n)| n.up && a.recovered > Layer::None) {
                let running = self.view(id.0).filter(|v| v.member && v.config.nodes[id].incarnation == info.incarnation);
                assert!(running.is_none_or(|v| v.epoch() >= a.epoch()), "{id} has not adopted {}\n{}", a.epoch(), self.dump());
                let reported =
                    a.recovered == Layer::Cluster || reports.contains(&(*id, info.incarnation, a.epoch(), a.recovered));
                assert!(reported, "{id} has not recovered {:?} of {}\n{}", a.recovered, a.epoch(), self.dump());
            }
        }
    }

    fn dump(&self) -> String {
        let mut text = String::new();
        for (id, node) in &self.nodes {
            let view = self.view(*id).unwrap();
            let up: Vec<_> =
                view.config.nodes.iter().map(|(id, n)| format!("{id} up={} {} voter={}", n.up, n.incarnation, n.voter)).collect();
            text += &format!(
                "n{id}: {} member={} recovered={:?} leader={:?} lease={} [{}]\n",
                view.epoch(),
                view.member,
                view.recovered,
                node.leader(),
                node.lease_valid(),
                up.join("; ")
            );
        }
        text
    }
}

#[tokio::test(start_paused = true)]
async fn one_node_makes_a_cluster() {
    let world = World::of(1, 1).await;
    let view = world.view(1).unwrap();
    assert_eq!((view.epoch(), view.recovered, view.member), (Epoch(1), Layer::Fs, true));
    assert_eq!(view.config.nodes[&NodeId(1)].recovered, Epoch(1));
    let refused = world.nodes[&1].propose(Command::NodeJoin { name: "n1".into(), addr: "x:1".into() }).await;
    assert!(matches!(refused, Err(ProposeError::Refused(_))), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn three_nodes_join_and_any_of_them_proposes() {
    let world = World::of(2, 3).await;
    for id in 1..=3u32 {
        let added = world.nodes[&id].propose(Command::DiskAdd { node: NodeId(id), uuid: [id as u8; 16], blocks: 1 << 20 }).await;
        assert!(matches!(added, Ok(Applied::Disk(_))), "{added:?}");
        let seen = world.view(id).unwrap().config.disks.values().any(|d| d.node == NodeId(id));
        assert!(seen, "applied here when it resolves");
    }
    let down = world.nodes[&2].propose(Command::NodesDown { nodes: vec![(NodeId(1), Incarnation(9))] }).await;
    assert!(matches!(down, Err(ProposeError::Refused(_))), "only the leader's membership declares");
}

#[tokio::test(start_paused = true)]
async fn five_nodes_have_five_voters() {
    let world = World::of(3, 5).await;
    assert!(world.view(4).unwrap().config.nodes.values().all(|n| n.voter));
}

#[tokio::test(start_paused = true)]
async fn a_voter_that_stays_away_is_replaced() {
    let mut world = World::of(17, 4).await;
    let spare = (1..=4).find(|n| !world.view(1).unwrap().config.nodes[&NodeId(*n)].voter).unwrap();
    let leader = world.leader().unwrap();
    let lost = (1..=4).find(|n| *n != spare && *n != leader).unwrap();
    world.kill(lost, true);
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert!(world.view(leader).unwrap().config.nodes[&NodeId(lost)].voter, "not in a hurry");
    tokio::time::sleep(Duration::from_secs(40)).await;
    let nodes = &world.view(leader).unwrap().config.nodes;
    assert!(nodes[&NodeId(spare)].voter && !nodes[&NodeId(lost)].voter);
    // Now another of the old voters may go, too.
    let other = (1..=4).find(|n| ![spare, lost].contains(n)).unwrap();
    world.kill(other, true);
    world.settled(2).await;
    world.start(lost);
    world.settled(3).await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_node_is_declared_dead_after_its_lease() {
    let mut world = World::of(4, 3).await;
    let leader = world.leader().unwrap();
    let victim = (1..=3).find(|n| *n != leader).unwrap();
    let epoch = world.view(leader).unwrap().epoch();
    world.kill(victim, false);
    let took = world.settled(2).await;
    assert!((2500..4000).contains(&took.as_millis()), "{took:?}");
    assert_eq!(world.view(leader).unwrap().epoch(), epoch.next());
}

#[tokio::test(start_paused = true)]
async fn a_dead_process_is_declared_dead_at_once() {
    let mut world = World::of(5, 3).await;
    let leader = world.leader().unwrap();
    let victim = (1..=3).find(|n| *n != leader).unwrap();
    world.kill(victim, true);
    let took = world.settled(2).await;
    assert!(took < Duration::from_millis(200), "{took:?}");
    world.start(victim);
    world.settled(3).await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_leader_is_replaced_and_declared_dead_at_once() {
    let mut world = World::of(6, 3).await;
    let leader = world.leader().unwrap();
    world.kill(leader, true);
    let took = world.settled(2).await;
    assert!(took < Duration::from_millis(1000), "{took:?}");
    world.start(leader);
    world.settled(3).await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_leader_is_replaced() {
    let mut world = World::of(7, 3).await;
    let leader = world.leader().unwrap();
    world.kill(leader, false);
    let took = world.settled(2).await;
    assert!(took < Duration::from_millis(6000), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn two_of_five_fall_silent_together_in_one_epoch() {
    let mut world = World::of(8, 5).await;
    let leader = world.leader().unwrap();
    let epoch = world.view(leader).unwrap().epoch();
    let victims: Vec<u32> = (1..=5).filter(|n| *n != leader).take(2).collect();
    victims.iter().for_each(|n| world.kill(*n, false));
    world.settled(3).await;
    assert_eq!(world.view(leader).unwrap().epoch(), epoch.next());
}

#[tokio::test(start_paused = true)]
async fn a_quick_restart_is_one_epoch() {
    let mut world = World::of(9, 3).await;
    let leader = world.leader().unwrap();
    let victim = (1..=3).find(|n| *n != leader).unwrap();
    let before = world.view(leader).unwrap();
    let node = world.nodes.remove(&victim).unwrap();
    node.shutdown();
    world.net.kill(NodeId(victim));
    world.start(victim);
    world.until("the new life is up", |w| w.view(leader).unwrap().epoch() > before.epoch()).await;
    world.settled(3).await;
    let after = world.view(leader).unwrap();
    assert_eq!(after.epoch(), before.epoch().next());
    assert!(after.config.nodes[&NodeId(victim)].incarnation > before.config.nodes[&NodeId(victim)].incarnation);
}

#[tokio::test(start_paused = true)]
async fn all_nodes_restart_with_what_was_agreed() {
    let mut world = World::of(10, 3).await;
    let added = world.nodes[&2].propose(Command::DiskAdd { node: NodeId(2), uuid: [2; 16], blocks: 1 << 20 }).await;
    assert!(added.is_ok());
    let epoch = world.view(1).unwrap().epoch();
    for id in 1..=3 {
        let node = world.nodes.remove(&id).unwrap();
        node.shutdown();
        world.net.kill(NodeId(id));
    }
    (1..=3).for_each(|id| world.start(id));
    world.until("a new epoch", |w| w.view(1).unwrap().epoch() > epoch).await;
    world.settled(3).await;
    assert_eq!(world.view(3).unwrap().config.disks.len(), 1);
}

/// The cut-off side loses its lease before the others declare it dead, and comes back by itself.
async fn cut_and_heal(seed: u64, cut_leader: bool) {
    let world = World::of(seed, 3).await;
    let leader = world.leader().unwrap();
    let alone = if cut_leader { leader } else { (1..=3).find(|n| *n != leader).unwrap() };
    let others: Vec<u32> = (1..=3).filter(|n| *n != alone).collect();
    let before = world.view(alone).unwrap();
    world.net.isolate(NodeId(alone), (1..=3).map(NodeId));
    let stuck = {
        let node = Arc::clone(&world.nodes[&alone]);
        tokio::spawn(async move { node.propose(Command::TokenAdd { hash: [1; 32], expires_unix: 1 }).await })
    };
    world
        .until("the others go on", |w| {
            let declared = others.iter().any(|n| !w.view(*n).unwrap().config.up().contains(&NodeId(alone)));
            assert!(!declared || !w.nodes[&alone].lease_valid(), "declared dead while it holds a lease");
            others.iter().all(|n| w.view(*n).unwrap().config.up().len() == 2)
        })
        .await;
    let view = world.view(alone).unwrap();
    assert_eq!((view.epoch(), view.member), (before.epoch(), true), "a minority agrees on nothing");
    assert_eq!(stuck.await.unwrap(), Err(ProposeError::Unavailable));
    assert!(!world.nodes[&alone].lease_valid());
    let added = world.nodes[&others[0]].propose(Command::TokenAdd { hash: [2; 32], expires_unix: 1 }).await;
    assert_eq!(added, Ok(Applied::Ok));
    world.net.heal_all();
    world.settled(3).await;
    let after = world.view(alone).unwrap();
    assert!(after.member);
    let life = |v: &View| v.config.nodes[&NodeId(alone)].incarnation;
    assert!(life(&after) > life(&before), "let in again without a restart, as another life");
    assert!(after.config.tokens.contains_key(&[2; 32]));
}

#[tokio::test(start_paused = true)]
async fn a_cut_off_node_loses_its_lease_and_comes_back() {
    cut_and_heal(11, false).await;
}

#[tokio::test(start_paused = true)]
async fn a_cut_off_leader_loses_its_lease_and_comes_back() {
    cut_and_heal(12, true).await;
}

#[tokio::test(start_paused = true)]
async fn a_minority_with_the_leader_in_it_loses_all_its_leases() {
    for seed in 30..36 {
        let world = World::of(seed, 5).await;
        tokio::time::sleep(Duration::from_millis(seed * 53)).await;
        let leader = world.leader().unwrap();
        let follower = (1..=5).find(|n| *n != leader).unwrap();
        let others: Vec<u32> = (1..=5).filter(|n| *n != leader && *n != follower).collect();
        for other in &others {
            world.net.cut(NodeId(leader), NodeId(*other));
            world.net.cut(NodeId(follower), NodeId(*other));
        }
        world.until("the majority goes on", |w| others.iter().all(|n| w.view(*n).unwrap().config.up().len() == 3)).await;
        world.net.heal_all();
        world.settled(5).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_barrier_waits_for_every_node_and_layer() {
    let mut world = World::new(13).await;
    world.layers = false;
    let node = Arc::clone(&world.nodes[&1]);
    node.propose(Command::NodeJoin { name: "n2".into(), addr: "sim:2".into() }).await.unwrap();
    world.stores.insert(2, Arc::new(MemoryStore::new()));
    world.start(2);
    world.until("both see the epoch", |w| (1..=2).all(|n| w.view(n).unwrap().epoch() == Epoch(2))).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.view(1).unwrap().recovered, Layer::Cluster);
    let two = Arc::clone(&world.nodes[&2]);
    two.finish(Epoch(1), Layer::Mirror);
    two.finish(Epoch(2), Layer::Sld);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.view(1).unwrap().recovered, Layer::Cluster, "an old report, and one with a gap");
    two.finish(Epoch(2), Layer::Mirror);
    world.until("n1 has done its part long ago", |w| (1..=2).all(|n| w.view(n).unwrap().recovered == Layer::Sld)).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_stays_behind_after_shutdown() {
    let mut world = World::of(14, 3).await;
    let node = world.nodes.remove(&3).unwrap();
    let weak = Arc::downgrade(&node);
    node.shutdown();
    world.net.kill(NodeId(3));
    assert!(!node.lease_valid());
    drop(node);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(weak.upgrade().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_failing_store_stops_the_node() {
    struct Failing(MemoryStore, Mutex<u32>);
    impl Store for Failing {
        fn load(&self) -> Result<cluster::store::Saved, cluster::store::StoreError> {
            self.0.load()
        }
        fn save(&self, batch: Batch) -> cluster::BoxFuture<'_, Result<(), cluster::store::StoreError>> {
            let mut left = self.1.lock();
            if *left == 0 {
                return Box::pin(async { Err(cluster::store::StoreError("the disk is gone".into())) });
            }
            *left -= 1;
            self.0.save(batch)
        }
    }
    let mut config = Config::default();
    config.apply(&Command::Init { cluster: [3; 16], name: "test".into() });
    config.apply(&Command::NodeJoin { name: "n1".into(), addr: "sim:1".into() });
    config.apply(&Command::SetVoter { node: NodeId(1), voter: true });
    let store = Failing(MemoryStore::new(), Mutex::new(8));
    store.save(bootstrap(config, NodeId(1))).await.unwrap();
    let net = SimNet::new(1);
    let node = start(Options {
        me: NodeId(1),
        addr: None,
        peers: BTreeMap::new(),
        store: Arc::new(store),
        transport: net.endpoint(NodeId(1), Incarnation(1)),
        clock: Arc::new(SimClock::new(Duration::from_secs(5), 0)),
        seed: 7,
        timing: Timing::quick(),
    })
    .unwrap();
    for n in 2..20 {
        let _ = tokio::time::timeout(
            Duration::from_secs(1),
            node.propose(Command::NodeJoin { name: format!("n{n}"), addr: format!("sim:{n}") }),
        )
        .await;
    }
    assert!(node.failure().borrow().is_some());
    assert!(!node.lease_valid());
}

#[tokio::test(start_paused = true)]
async fn rubbish_is_ignored() {
    let world = World::of(15, 3).await;
    let rogue = world.net.endpoint(NodeId(9), Incarnation(1));
    struct Nobody;
    impl Receiver for Nobody {
        fn receive(&self, _: Peer, _: Message) {}
        fn session_ended(&self, _: NodeId) {}
    }
    rogue.register(Service::Admin, Arc::new(Nobody));
    let mut rng = cluster::prng::Prng::new(1);
    for _ in 0..2000 {
        let service = if rng.one_in(2) { Service::Raft } else { Service::Membership };
        let bytes: Vec<u8> = (0..rng.below(60)).map(|_| (rng.next_u64() as u8) & if rng.one_in(2) { 3 } else { 255 }).collect();
        rogue.send(NodeId(1 + rng.below(3) as u32), service, Message::new(Bytes::from(bytes)));
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    world.settled(3).await;
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_run() {
    let mut traces = Vec::new();
    for _ in 0..2 {
        let mut world = World::of(16, 3).await;
        world.kill(world.leader().unwrap(), false);
        world.settled(2).await;
        traces.push(world.net.trace());
    }
    assert_eq!(traces[0], traces[1]);
}

/// Random faults: nodes die, noticed or not, and start again; links are cut, one way or both; sessions break; machines are
/// suspended. What must hold holds at every moment; when the faults end the cluster is whole again by itself.
async fn faults(seed: u64, nodes: u32) {
    let mut world = World::of(seed, nodes).await;
    let mut rng = Rng::new(seed ^ 77);
    let mut tokens = 0u8;
    world.slow = seed.is_multiple_of(2);
    for _ in 0..40 {
        let a = 1 + rng.below(u64::from(nodes)) as u32;
        let b = 1 + rng.below(u64::from(nodes)) as u32;
        match rng.below(12) {
            0..=1 if world.nodes.contains_key(&a) => world.kill(a, rng.percent(50)),
            2..=4 => {
                let gone: Vec<u32> = (1..=nodes).filter(|n| !world.nodes.contains_key(n)).collect();
                gone.iter().for_each(|n| world.start(*n));
            }
            5 if a != b => world.net.cut(NodeId(a), NodeId(b)),
            6 if a != b => world.net.cut_one_way(NodeId(a), NodeId(b)),
            7 => world.net.isolate(NodeId(a), (1..=nodes).map(NodeId)),
            8 => world.clocks[&a].jump(Duration::from_millis(1500 + rng.below(6000))),
            9 if a != b => world.net.break_session(NodeId(a), NodeId(b)),
            10 | 11 => {
                let (one, other): (Vec<u32>, Vec<u32>) = (1..=nodes).partition(|_| rng.percent(40));
                one.iter().for_each(|a| other.iter().for_each(|b| world.net.cut(NodeId(*a), NodeId(*b))));
            }
            _ => world.net.heal_all(),
        }
        if let Some(node) = world.nodes.get(&b).cloned() {
            tokens = tokens.wrapping_add(1);
            let command = Command::TokenAdd { hash: [tokens; 32], expires_unix: 1 };
            tokio::spawn(async move { node.propose(command).await });
        }
        for _ in 0..rng.below(400) {
            tokio::time::sleep(Duration::from_millis(7)).await;
            world.check();
        }
    }
    world.net.heal_all();
    for id in 1..=nodes {
        if !world.nodes.contains_key(&id) {
            world.start(id);
        }
    }
    world.settled(nodes as usize).await;
}

#[tokio::test(start_paused = true)]
async fn three_nodes_survive_random_faults() {
    for seed in 100..106 {
        faults(seed, 3).await;
    }
}

#[tokio::test(start_paused = true)]
async fn five_nodes_survive_random_faults() {
    for seed in 200..203 {
        faults(seed, 5).await;
    }
}
