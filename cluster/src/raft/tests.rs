//! Cores of several nodes joined by a perfect network: elections, crashes, slow disks, snapshots.

use super::*;
use crate::config::Command;
use std::collections::BTreeMap;

/// Batches of each node that are not yet durable.
type Unsaved = BTreeMap<u32, VecDeque<Batch>>;

struct Net {
    /// Makes things durable late, at random.
    slow: Option<Prng>,
    unsaved: Unsaved,
    cores: BTreeMap<u32, RaftCore>,
    stores: BTreeMap<u32, Saved>,
    cut: BTreeSet<u32>,
    queue: VecDeque<(u32, NodeId, RaftWire)>,
    answers: Vec<(u32, u64, Applied)>,
}

const TIMING: RaftTiming = RaftTiming { election_ticks: 10, heartbeat_ticks: 2 };

fn first_config() -> Config {
    let mut config = Config::default();
    config.apply(&Command::Init { cluster: [1; 16], name: "c".into() });
    config.apply(&Command::NodeJoin { name: "n1".into(), addr: "h1:1".into() });
    config.apply(&Command::SetVoter { node: NodeId(1), voter: true });
    config
}

impl Net {
    fn new() -> Net {
        let mut saved = Saved::default();
        saved.apply(bootstrap(first_config(), NodeId(1)));
        let stores = BTreeMap::from([(1, saved)]);
        let mut net = Net {
            slow: None,
            unsaved: Unsaved::new(),
            cores: BTreeMap::new(),
            stores,
            cut: BTreeSet::new(),
            queue: VecDeque::new(),
            answers: Vec::new(),
        };
        net.start(1);
        net
    }

    /// Starts a node, or starts it anew: what was not durable is lost.
    fn start(&mut self, id: u32) {
        self.unsaved.remove(&id);
        let saved = self.stores.entry(id).or_default();
        self.cores.insert(id, RaftCore::new(NodeId(id), saved, TIMING, 5).unwrap());
        self.work(id);
    }

    fn work(&mut self, id: u32) {
        loop {
            let core = self.cores.get_mut(&id).unwrap();
            let unsaved = self.unsaved.entry(id).or_default();
            while let Some(work) = core.poll() {
                self.queue.extend(work.send.into_iter().map(|(to, wire)| (id, to, wire)));
                unsaved.extend(work.save);
                self.answers.extend(work.answers.into_iter().map(|(_, _, number, applied)| (id, number, applied)));
                core.check_invariants();
            }
            if self.slow.as_mut().is_some_and(|rng| !rng.one_in(3)) {
                return;
            }
            let Some(batch) = unsaved.pop_front() else { return };
            self.stores.get_mut(&id).unwrap().apply(batch);
            core.saved();
        }
    }

    fn run(&mut self, ticks: u32) {
        for _ in 0..ticks {
            let ids: Vec<u32> = self.cores.keys().copied().collect();
            for id in ids {
                let core = self.cores.get_mut(&id).unwrap();
                core.tick();
                core.reconcile();
                self.work(id);
            }
            while let Some((from, to, wire)) = self.queue.pop_front() {
                if self.cut.contains(&from) || self.cut.contains(&to.0) || !self.cores.contains_key(&to.0) {
                    continue;
                }
                if let RaftWire::Raft(bytes) = wire {
                    self.cores.get_mut(&to.0).unwrap().step(NodeId(from), &bytes);
                    self.work(to.0);
                }
            }
        }
    }

    fn leader(&self) -> Option<u32> {
        let mut leaders: Vec<_> = self.cores.iter().filter(|(id, c)| c.status().leading && !self.cut.contains(id)).collect();
        leaders.sort_by_key(|(_, c)| c.status().term);
        leaders.last().map(|(id, _)| **id)
    }

    fn propose(&mut self, number: u64, command: Command) {
        let leader = self.leader().unwrap();
        let request = Request { origin: NodeId(1), life: Incarnation(1), number, done: 0, command };
        assert!(self.cores.get_mut(&leader).unwrap().propose(&request));
        self.work(leader);
        self.run(5);
    }

    fn grow(&mut self) {
        self.run(30);
        for n in 2..=3u32 {
            self.propose(u64::from(n), Command::NodeJoin { name: format!("n{n}"), addr: format!("h{n}:1") });
            self.start(n);
        }
        self.run(10);
        for n in 2..=3 {
            self.propose(10 + u64::from(n), Command::SetVoter { node: NodeId(n), voter: true });
        }
        self.run(20);
    }
}

#[test]
fn one_node_elects_itself_and_restarts_with_what_it_had() {
    let mut net = Net::new();
    net.run(30);
    assert_eq!(net.leader(), Some(1));
    net.propose(1, Command::NodeJoin { name: "n2".into(), addr: "h2:1".into() });
    assert_eq!(net.answers, [(1, 1, Applied::Node(NodeId(2)))]);
    let before = net.cores[&1].machine().clone();
    net.start(1);
    net.run(30);
    assert_eq!(net.cores[&1].machine(), &before);
}

#[test]
fn three_nodes_become_voters_and_lose_one() {
    let mut net = Net::new();
    net.grow();
    let quorums = net.cores[&1].status().quorums;
    assert_eq!(quorums, [BTreeSet::from([NodeId(1), NodeId(2), NodeId(3)])]);
    for n in 1..=3 {
        assert_eq!(net.cores[&n].machine(), net.cores[&1].machine());
    }
    let old = net.leader().unwrap();
    net.cut.insert(old);
    net.run(60);
    let new = net.leader().unwrap();
    assert_ne!(old, new);
    assert!(!net.cores[&old].status().leading, "a leader without a majority steps down");
    net.propose(20, Command::TokenAdd { hash: [1; 32], expires_unix: 1 });
    net.cut.clear();
    net.run(30);
    assert!(net.cores[&old].machine().config.tokens.contains_key(&[1; 32]));
}

#[test]
fn a_gone_leader_is_replaced_at_once() {
    let mut net = Net::new();
    net.grow();
    let old = net.leader().unwrap();
    net.cut.insert(old);
    for n in (1..=3).filter(|n| *n != old) {
        net.cores.get_mut(&n).unwrap().process_gone(NodeId(old));
    }
    net.run(3);
    assert!(net.leader().is_some_and(|n| n != old));
}

#[test]
fn the_log_is_compacted_and_a_late_node_gets_a_snapshot() {
    let mut net = Net::new();
    net.grow();
    net.cut.insert(3);
    for i in 0..700u64 {
        let leader = net.leader().unwrap();
        let request = Request {
            origin: NodeId(1),
            life: Incarnation(2),
            number: i + 1,
            done: i,
            command: Command::TokenAdd { hash: [(i % 200) as u8; 32], expires_unix: i },
        };
        net.cores.get_mut(&leader).unwrap().propose(&request);
        net.work(leader);
        net.run(1);
    }
    net.run(20);
    assert!(net.stores[&1].entries.len() < 400, "{}", net.stores[&1].entries.len());
    net.cut.clear();
    net.run(60);
    assert_eq!(net.cores[&3].machine(), net.cores[&1].machine());
    for n in 1..=3 {
        net.start(n);
    }
    net.run(60);
    assert!(net.leader().is_some());
    assert_eq!(net.cores[&3].machine(), net.cores[&1].machine());
}

#[test]
fn random_crashes_and_cuts_keep_one_history() {
    for seed in 0..20 {
        let mut rng = Prng::new(seed);
        let mut net = Net::new();
        net.grow();
        net.slow = Some(Prng::new(seed + 1000));
        let mut number = 100;
        for _ in 0..60 {
            match rng.below(5) {
                0 => {
                    let n = 1 + rng.below(3) as u32;
                    net.start(n);
                }
                1 => {
                    net.cut = BTreeSet::from([1 + rng.below(3) as u32]);
                }
                2 => net.cut.clear(),
                _ => {}
            }
            if let Some(leader) = net.leader() {
                number += 1;
                let command = Command::TokenAdd { hash: [number as u8; 32], expires_unix: number };
                let request = Request { origin: NodeId(2), life: Incarnation(1), number, done: 0, command };
                net.cores.get_mut(&leader).unwrap().propose(&request);
                net.work(leader);
            }
            net.run(rng.below(25) as u32);
        }
        net.cut.clear();
        net.slow = None;
        net.run(80);
        assert!(net.leader().is_some(), "seed {seed}");
        for n in 2..=3 {
            assert_eq!(net.cores[&n].machine(), net.cores[&1].machine(), "seed {seed}");
        }
    }
}
