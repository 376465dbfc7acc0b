//! Tests of the membership core alone: what a leader grants and declares, step by step.

use super::*;
use std::collections::BTreeSet;

const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(200),
    lease: Duration::from_secs(2),
    dead: Duration::from_secs(3),
    absent: Duration::from_secs(10),
    raft_tick: Duration::from_millis(100),
    election_ticks: 10,
    propose: Duration::from_secs(10),
    retry: Duration::from_millis(500),
};

fn ms(ms: u64) -> Instant {
    Instant(1_000_000_000_000) + Duration::from_millis(ms)
}

fn config(nodes: u32) -> Config {
    let mut config = Config::default();
    config.apply(&Command::Init { cluster: [1; 16], name: "c".into() });
    for n in 1..=nodes {
        config.apply(&Command::NodeJoin { name: format!("n{n}"), addr: format!("h{n}:1") });
        config.apply(&Command::NodeUp { node: NodeId(n), incarnation: Incarnation(1), addr: format!("h{n}:1") });
        config.apply(&Command::SetVoter { node: NodeId(n), voter: true });
    }
    config.apply(&Command::Recovered { epoch: config.epoch });
    config
}

fn status(term: u64, leader: u32, me: u32, ready: bool, nodes: u32) -> RaftStatus {
    let voters: BTreeSet<NodeId> = (1..=nodes).map(NodeId).collect();
    let leading = leader == me;
    RaftStatus { term, leader: Some(NodeId(leader)), leading, ready: leading && ready, quorums: vec![voters] }
}

/// A leader n1 of term 5 among `nodes`, elected at 0 ms.
struct Leader {
    core: Membership,
    out: Vec<Output>,
    config: Config,
    nodes: u32,
    clock: u64,
}

impl Leader {
    fn new(nodes: u32, ready: bool) -> Leader {
        let config = config(nodes);
        let core = Membership::new(NodeId(1), Incarnation(1), None, Arc::new(config.clone()), TIMING);
        let mut leader = Leader { core, out: Vec::new(), config, nodes, clock: 0 };
        leader.step(0, Input::Tick);
        leader.step(0, Input::Config(Arc::new(leader.config.clone())));
        leader.step(0, Input::Raft(status(5, 1, 1, ready, nodes)));
        leader
    }

    fn step(&mut self, at: u64, input: Input) {
        // Ticks in between, as the shell gives them.
        while self.clock + 50 < at {
            self.clock += 50;
            self.core.step(ms(self.clock), Input::Tick, &mut self.out);
            self.core.check_invariants(ms(self.clock));
        }
        self.clock = at;
        self.core.step(ms(at), input, &mut self.out);
        self.core.check_invariants(ms(at));
    }

    /// A heartbeat from a node (its clock is its own) that brings back the stamp of time `stamp`; returns the lease.
    fn beat(&mut self, at: u64, from: u32, term: u64, stamp: Option<u64>) -> Duration {
        let sent = Instant(u64::from(from) * 1_000_000_007);
        let (epoch, layer) = (self.config.epoch, Layer::Fs);
        let heartbeat =
            Heartbeat { incarnation: Incarnation(1), term, sent, stamp: stamp.map(ms), epoch, layer, gone: Vec::new() };
        self.out.clear();
        self.step(at, Input::Message { from: NodeId(from), wire: Wire::Heartbeat(heartbeat) });
        let grant = self.out.iter().find_map(|o| match o {
            Output::Send(to, Wire::Grant(grant)) if *to == NodeId(from) => Some(grant.clone()),
            _ => None,
        });
        let grant = grant.expect("every heartbeat is answered");
        assert_eq!((grant.sent, grant.stamp, grant.term), (sent, ms(at), 5));
        grant.lease
    }

    fn declared(&mut self, until: u64) -> Vec<(u64, Vec<u32>)> {
        let mut declared = Vec::new();
        while self.clock < until {
            self.out.clear();
            self.step(self.clock + 50, Input::Tick);
            for output in &self.out {
                if let Output::Propose(Command::NodesDown { nodes }) = output {
                    declared.push((self.clock, nodes.iter().map(|(n, _)| n.0).collect()));
                }
            }
        }
        declared
    }
}

#[test]
fn a_lease_is_limited_by_when_a_majority_supported_the_leader() {
    let mut leader = Leader::new(5, true);
    assert_eq!(leader.beat(100, 2, 5, None), Duration::ZERO, "no majority yet");
    assert_eq!(leader.beat(120, 3, 5, None), Duration::ZERO);
    assert_eq!(leader.beat(150, 2, 5, Some(100)), Duration::ZERO, "two of five");
    // n1 at 160, n3's stamp of 120, n2's of 100: a majority supported it at 100.
    assert_eq!(leader.beat(160, 3, 5, Some(120)), Duration::from_millis(2000 - 60));
    // Only n2 goes on: the last support of a majority stays at 120.
    assert_eq!(leader.beat(1000, 2, 5, Some(900)), Duration::from_millis(2000 - 880));
    assert_eq!(leader.beat(2500, 2, 5, Some(2400)), Duration::ZERO);
    assert!(leader.core.lease_until() <= ms(120 + 2000), "nor does its own lease last longer");
    // A node that takes part in a later term supports nobody of this one.
    assert_eq!(leader.beat(2600, 4, 6, Some(2600)), Duration::ZERO);
    assert_eq!(leader.beat(2600, 5, 6, Some(2600)), Duration::ZERO);
    assert_eq!(leader.beat(2650, 2, 5, Some(2640)), Duration::ZERO);
    // A stamp from the future is not this leader's.
    assert_eq!(leader.beat(2700, 3, 5, Some(99_999)), Duration::ZERO);
}

#[test]
fn a_leader_that_does_not_know_what_was_agreed_grants_nothing() {
    let mut leader = Leader::new(3, false);
    leader.beat(100, 2, 5, None);
    leader.beat(110, 3, 5, None);
    assert_eq!(leader.beat(200, 2, 5, Some(100)), Duration::ZERO);
    assert_eq!(leader.beat(210, 3, 5, Some(110)), Duration::ZERO);
    assert_eq!(leader.core.lease_until(), Instant(0));
    assert_eq!(leader.declared(8000), [], "nor does it declare anybody dead");
    leader.step(8100, Input::Raft(status(5, 1, 1, true, 3)));
    assert!(leader.beat(8200, 2, 5, Some(8150)) > Duration::from_secs(1));
}

#[test]
fn silence_is_death_after_every_lease_has_ended() {
    let mut leader = Leader::new(3, true);
    leader.beat(50, 2, 5, None);
    leader.beat(60, 3, 5, None);
    let mut at = 200;
    while at < 3000 {
        leader.beat(at, 2, 5, Some(at - 10));
        leader.beat(at + 10, 3, 5, Some(at));
        at += 200;
    }
    let last = leader.clock;
    // n2 goes on, n3 falls silent.
    let mut declared = Vec::new();
    while declared.is_empty() && leader.clock < last + 5000 {
        declared = leader.declared(leader.clock + 150);
        let now = leader.clock;
        leader.beat(now + 1, 2, 5, Some(now));
    }
    let (when, who) = declared.remove(0);
    assert_eq!(who, [3]);
    assert!((last + 3000..last + 3100).contains(&when), "{when}");
    // From then on it gets nothing, whatever it says.
    assert_eq!(leader.beat(leader.clock + 1, 3, 5, Some(leader.clock)), Duration::ZERO);
    // And the declaration is repeated until it is agreed on.
    let again = leader.declared(leader.clock + 700);
    assert_eq!(again.len(), 1);
    let mut config = leader.config.clone();
    config.apply(&Command::NodesDown { nodes: vec![(NodeId(3), Incarnation(1))] });
    leader.config = config.clone();
    leader.step(leader.clock + 1, Input::Config(Arc::new(config)));
    let now = leader.clock;
    leader.beat(now + 1, 2, 5, Some(now));
    assert_eq!(leader.declared(leader.clock + 1000), []);
}

#[test]
fn a_new_leader_waits_for_leases_of_the_old_one() {
    let mut leader = Leader::new(3, true);
    leader.beat(50, 2, 5, None);
    let mut declared = Vec::new();
    while declared.is_empty() && leader.clock < 8000 {
        let now = leader.clock;
        leader.beat(now + 1, 2, 5, Some(now));
        declared = leader.declared(now + 150);
    }
    // n3 was never heard of.
    assert_eq!(declared[0].1, [3]);
    assert!((2500..2700).contains(&declared[0].0), "{declared:?}");
}

#[test]
fn a_leader_that_stood_still_does_not_take_the_others_for_dead() {
    let mut leader = Leader::new(3, true);
    leader.beat(50, 2, 5, None);
    leader.beat(60, 3, 5, None);
    leader.beat(100, 2, 5, Some(50));
    leader.beat(110, 3, 5, Some(60));
    // No ticks for 20 s; what came in meanwhile waits in the sockets.
    leader.clock = 20_000;
    leader.out.clear();
    leader.core.step(ms(20_000), Input::Tick, &mut leader.out);
    assert!(!leader.out.iter().any(|o| matches!(o, Output::Propose(Command::NodesDown { .. }))));
    leader.beat(20_010, 2, 5, Some(110));
    leader.beat(20_020, 3, 5, Some(110));
    leader.beat(20_030, 2, 5, Some(20_010));
    assert_eq!(leader.declared(20_300), []);
}

#[test]
fn a_dead_process_is_declared_at_once_with_those_silent_for_long() {
    let mut leader = Leader::new(4, true);
    for at in [50, 150] {
        for n in 2..=4 {
            leader.beat(at + u64::from(n), n, 5, Some(at));
        }
    }
    leader.out.clear();
    leader.step(300, Input::ProcessGone { node: NodeId(3), upto: Incarnation(1) });
    let down = Command::NodesDown { nodes: vec![(NodeId(3), Incarnation(1))] };
    assert!(leader.out.contains(&Output::Propose(down)), "{:?}", leader.out);
    assert_eq!(leader.beat(310, 3, 5, Some(300)), Duration::ZERO);
    // An old life's end says nothing of the present one.
    leader.out.clear();
    leader.step(320, Input::ProcessGone { node: NodeId(2), upto: Incarnation(0) });
    assert!(leader.out.is_empty(), "{:?}", leader.out);
    assert!(leader.beat(330, 2, 5, Some(320)) > Duration::from_secs(1));
}

#[test]
fn a_follower_keeps_to_its_grants() {
    let config = Arc::new(config(3));
    let mut core = Membership::new(NodeId(2), Incarnation(1), None, Arc::clone(&config), TIMING);
    let mut out = Vec::new();
    core.step(ms(0), Input::Config(Arc::clone(&config)), &mut out);
    core.step(ms(0), Input::Raft(status(5, 1, 2, false, 3)), &mut out);
    let sent: Vec<_> = out.iter().filter(|o| matches!(o, Output::Send(NodeId(1), Wire::Heartbeat(_)))).collect();
    assert_eq!(sent.len(), 1, "at once, when it learns of a leader");
    let grant = |sent: u64, lease: u64, incarnation: u64| {
        Wire::Grant(Grant {
            term: 5,
            incarnation: Incarnation(incarnation),
            sent: ms(sent),
            lease: Duration::from_millis(lease),
            stamp: Instant(77),
            epoch: config.epoch,
            recovered: Layer::Mirror,
        })
    };
    let mut give = |core: &mut Membership, at: u64, wire: Wire| {
        core.step(ms(at), Input::Message { from: NodeId(1), wire }, &mut out);
        core.check_invariants(ms(at));
        core.lease_until()
    };
    assert_eq!(give(&mut core, 10, grant(0, 1800, 1)), ms(1800));
    assert_eq!(core.recovered(), Layer::Mirror);
    assert_eq!(give(&mut core, 20, grant(0, 0, 1)), ms(1800), "a lease is not taken back");
    assert_eq!(give(&mut core, 30, grant(20, 1900, 2)), ms(1800), "another life's");
    assert_eq!(give(&mut core, 30, grant(500, 1900, 1)), ms(1800), "a heartbeat that was never sent");
    assert_eq!(give(&mut core, 40, grant(30, 99_000, 1)), ms(2030), "no longer than a lease is");
    let mut dead = Config::clone(&config);
    dead.apply(&Command::NodesDown { nodes: vec![(NodeId(2), Incarnation(1))] });
    let mut out = Vec::new();
    core.step(ms(50), Input::Config(Arc::new(dead)), &mut out);
    assert_eq!(core.lease_until(), Instant(0));
    assert!(out.contains(&Output::NewIncarnation(Incarnation(1))), "{out:?}");
    core.step(ms(60), Input::Incarnation(Incarnation(2)), &mut out);
    out.clear();
    core.step(ms(61), Input::Tick, &mut out);
    let up = Command::NodeUp { node: NodeId(2), incarnation: Incarnation(2), addr: "h2:1".into() };
    assert!(out.contains(&Output::Propose(up)), "{out:?}");
}

#[test]
fn copies_that_block_a_mirror_are_given_up_after_a_while() {
    let mut leader = Leader::new(2, true);
    let mut config = leader.config.clone();
    for n in 1..=2 {
        config.apply(&Command::DiskAdd { node: NodeId(n), uuid: [n as u8; 16], blocks: 1 << 20 });
    }
    config.apply(&Command::FsCreate { name: "fs".into(), uuid: [1; 16], copies: 2, blocks: None });
    let nodes = vec![(NodeId(1), Incarnation(1)), (NodeId(2), Incarnation(1))];
    config.apply(&Command::NodesDown { nodes });
    // n1 alone comes back; n1 is the only voter here, so that it can lead.
    config.apply(&Command::NodeUp { node: NodeId(1), incarnation: Incarnation(2), addr: "h1:1".into() });
    leader.config = config.clone();
    leader.core = Membership::new(NodeId(1), Incarnation(2), None, Arc::new(config.clone()), TIMING);
    leader.step(1, Input::Tick);
    leader.step(2, Input::Config(Arc::new(config)));
    leader.step(3, Input::Raft(status(5, 1, 1, true, 1)));
    leader.nodes = 1;
    let declared = leader.declared(14_000);
    assert!((10_000..11_000).contains(&declared[0].0), "{declared:?}");
    assert_eq!(declared[0].1, [2]);
}

#[test]
fn voters_are_one_three_or_five() {
    let wanted = |nodes: u32, voters: &[u32]| -> Vec<u32> {
        let mut config = config(nodes);
        config.nodes.iter_mut().for_each(|(id, n)| n.voter = voters.contains(&id.0));
        voters_wanted(&config)
            .map(|c| match c {
                Command::SetVoter { node, .. } => node.0,
                other => panic!("{other:?}"),
            })
            .collect()
    };
    assert_eq!(wanted(2, &[1]), [0u32; 0]);
    assert_eq!(wanted(3, &[1]), [2, 3]);
    assert_eq!(wanted(4, &[1, 2, 3]), [0u32; 0]);
    assert_eq!(wanted(6, &[1, 2, 4]), [3, 5]);
    assert!([Timing::default(), Timing::quick(), Timing::patient()].iter().all(|t| t.check().is_ok()));
    assert!(Timing { dead: Duration::from_secs(2), ..Timing::default() }.check().is_err());
}
