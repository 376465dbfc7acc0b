//! Tests of the configuration: what each command does, and the invariants under random commands.

use super::*;
use crate::prng::Prng;

const REGION: u32 = layout::REGION_BLOCKS;

fn cluster(nodes: u32, regions: u32) -> Config {
    let mut config = Config::default();
    ok(&mut config, Command::Init { cluster: [7; 16], name: "test".into() });
    for n in 1..=nodes {
        let joined = config.apply(&Command::NodeJoin { name: format!("n{n}"), addr: format!("10.0.0.{n}:7000") });
        assert_eq!(joined, Applied::Node(NodeId(n)));
        up(&mut config, n, 1);
        if regions > 0 {
            let added = config.apply(&Command::DiskAdd { node: NodeId(n), uuid: [n as u8; 16], blocks: regions * REGION + 17 });
            assert_eq!(added, Applied::Disk(DiskId(n)));
        }
    }
    settle(&mut config);
    config
}

fn ok(config: &mut Config, command: Command) {
    assert_eq!(config.apply(&command), Applied::Ok, "{command:?}");
    config.check_invariants();
}

fn refused(config: &mut Config, command: Command) -> String {
    let before = config.clone();
    match config.apply(&command) {
        Applied::Refused(why) => {
            assert_eq!(before, *config, "a refusal changes nothing");
            why
        }
        other => panic!("{command:?}: {other:?}"),
    }
}

fn up(config: &mut Config, n: u32, incarnation: u64) {
    let addr = format!("10.0.0.{n}:7000");
    ok(config, Command::NodeUp { node: NodeId(n), incarnation: Incarnation(incarnation), addr });
}

fn down(config: &mut Config, nodes: &[(u32, u64)]) {
    ok(config, Command::NodesDown { nodes: nodes.iter().map(|&(n, i)| (NodeId(n), Incarnation(i))).collect() });
}

fn settle(config: &mut Config) {
    ok(config, Command::Recovered { epoch: config.epoch });
}

fn create(config: &mut Config, name: &str, copies: u8, blocks: Option<u64>) -> FsId {
    match config.apply(&Command::FsCreate { name: name.into(), uuid: [9; 16], copies, blocks }) {
        Applied::Fs(id) => {
            config.check_invariants();
            id
        }
        other => panic!("{other:?}"),
    }
}

fn states(config: &Config, mirror: u32) -> Vec<(u32, MemberState)> {
    let mut states: Vec<_> =
        config.mirrors[&MirrorId(mirror)].members.iter().map(|m| (config.node_of(m.disk).unwrap().0, m.state)).collect();
    states.sort_by_key(|s| s.0);
    states
}

use MemberState::{InSync, Stale, Syncing};

#[test]
fn nothing_before_init_and_only_one_init() {
    let mut config = Config::default();
    refused(&mut config, Command::NodeJoin { name: "a".into(), addr: "a:1".into() });
    ok(&mut config, Command::Init { cluster: [1; 16], name: "c".into() });
    refused(&mut config, Command::Init { cluster: [2; 16], name: "d".into() });
}

#[test]
fn names_and_addresses_are_unique() {
    let mut config = cluster(2, 0);
    refused(&mut config, Command::NodeJoin { name: "n1".into(), addr: "x:1".into() });
    refused(&mut config, Command::NodeJoin { name: "n3".into(), addr: "10.0.0.1:7000".into() });
    refused(&mut config, Command::NodeJoin { name: "bad name".into(), addr: "x:1".into() });
    let join = Command::NodeJoin { name: "n3".into(), addr: "x:1".into() };
    assert_eq!(config.apply(&join), Applied::Node(NodeId(3)));
    assert_eq!(config.apply(&join), Applied::Node(NodeId(3)), "a repeated join of a node that never was up");
    refused(&mut config, Command::NodeUp { node: NodeId(3), incarnation: Incarnation(1), addr: "10.0.0.1:7000".into() });
}

#[test]
fn epochs_count_ups_and_downs() {
    let mut config = cluster(3, 0);
    assert_eq!(config.epoch, Epoch(3));
    down(&mut config, &[(2, 1), (3, 1)]);
    assert_eq!((config.epoch, config.up().len()), (Epoch(4), 1));
    down(&mut config, &[(2, 1)]);
    assert_eq!(config.epoch, Epoch(4), "down already");
    refused(&mut config, Command::NodeUp { node: NodeId(2), incarnation: Incarnation(1), addr: "10.0.0.2:7000".into() });
    up(&mut config, 2, 2);
    down(&mut config, &[(2, 1)]);
    assert_eq!((config.epoch, config.up().len()), (Epoch(5), 2), "an older life was declared dead");
}

#[test]
fn three_nodes_two_copies_are_balanced() {
    let mut config = cluster(3, 80);
    let fs = create(&mut config, "home", 2, None);
    let info = &config.filesystems[&fs];
    assert!((6..=12).contains(&info.mirrors.len()), "{} mirrors", info.mirrors.len());
    assert_eq!(info.mirrors[0], MirrorId(1));
    let mut pairs: BTreeMap<Vec<u32>, usize> = BTreeMap::new();
    let mut first: BTreeMap<DiskId, usize> = BTreeMap::new();
    let mut used = 0;
    for id in &info.mirrors {
        let mirror = &config.mirrors[id];
        let mut nodes: Vec<u32> = mirror.members.iter().map(|m| config.node_of(m.disk).unwrap().0).collect();
        nodes.sort_unstable();
        *pairs.entry(nodes).or_default() += 1;
        *first.entry(mirror.members[0].disk).or_default() += 1;
        used += mirror.blocks / REGION;
    }
    assert_eq!(used, 120, "all space is used");
    assert_eq!(pairs.len(), 3);
    assert!(pairs.values().max().unwrap() - pairs.values().min().unwrap() <= 1, "{pairs:?}");
    assert!(first.values().max().unwrap() - first.values().min().unwrap() <= 1, "{first:?}");
}

#[test]
fn small_disks_uneven_disks_and_wanted_sizes() {
    let mut config = cluster(3, 1);
    create(&mut config, "tiny", 2, None);
    assert_eq!(config.mirrors.len(), 1);
    let why = refused(&mut config, Command::FsCreate { name: "more".into(), uuid: [1; 16], copies: 2, blocks: None });
    assert!(why.contains("too little"), "{why}");

    let mut config = cluster(2, 10);
    let big = Command::DiskAdd { node: NodeId(1), uuid: [77; 16], blocks: 300 * REGION };
    config.apply(&big);
    create(&mut config, "two", 2, None);
    let space: u32 = config.mirrors.values().map(|m| m.blocks / REGION).sum();
    assert_eq!(space, 10, "no more than the smaller node has");

    let mut config = cluster(4, 100);
    create(&mut config, "a", 3, Some(20 * u64::from(REGION)));
    let space: u32 = config.mirrors.values().map(|m| m.blocks / REGION).sum();
    assert!((20..=26).contains(&space), "{space}");
    create(&mut config, "b", 1, None);
    refused(&mut config, Command::FsCreate { name: "a".into(), uuid: [1; 16], copies: 1, blocks: None });
    refused(&mut config, Command::FsCreate { name: "c".into(), uuid: [1; 16], copies: 0, blocks: None });
    let why = refused(&mut config, Command::FsCreate { name: "c".into(), uuid: [1; 16], copies: 5, blocks: None });
    assert!(why.contains("5 nodes"), "{why}");
}

#[test]
fn too_large_a_wish_is_refused() {
    let mut config = cluster(3, 8);
    let blocks = Some(13 * u64::from(REGION));
    let why = refused(&mut config, Command::FsCreate { name: "c".into(), uuid: [1; 16], copies: 2, blocks });
    assert!(why.contains("832 MiB are wanted, 768 MiB fit"), "{why}");
    create(&mut config, "c", 2, Some(12 * u64::from(REGION)));
}

#[test]
fn a_node_that_was_away_syncs_from_its_last_good_epoch() {
    let mut config = cluster(2, 1);
    create(&mut config, "fs", 2, None);
    assert_eq!(config.epoch, Epoch(2));
    down(&mut config, &[(2, 1)]);
    assert_eq!(states(&config, 1), [(1, InSync), (2, Stale { since: Epoch(2) })]);
    settle(&mut config);
    up(&mut config, 2, 2);
    assert_eq!(states(&config, 1), [(1, InSync), (2, Syncing { since: Epoch(2) })]);
    settle(&mut config);
    down(&mut config, &[(2, 2)]);
    assert_eq!(states(&config, 1)[1].1, Stale { since: Epoch(2) }, "it has not caught up, so `since` stays");
    up(&mut config, 2, 3);
    let synced = |epoch| Command::MembersSynced { copies: vec![(MirrorId(1), DiskId(2))], epoch: Epoch(epoch) };
    ok(&mut config, synced(5));
    assert_eq!(states(&config, 1)[1].1, Syncing { since: Epoch(2) }, "reported in an earlier life");
    ok(&mut config, synced(6));
    assert_eq!((states(&config, 1)[1].1, config.epoch), (InSync, Epoch(7)));
    ok(&mut config, synced(6));
    assert_eq!(config.epoch, Epoch(7), "only once");
}

#[test]
fn the_last_copy_in_sync_is_never_dropped() {
    let mut config = cluster(2, 1);
    create(&mut config, "fs", 2, None);
    down(&mut config, &[(2, 1)]);
    down(&mut config, &[(1, 1)]);
    assert_eq!(states(&config, 1), [(1, InSync), (2, Stale { since: Epoch(2) })]);
    up(&mut config, 2, 2);
    assert_eq!(states(&config, 1), [(1, InSync), (2, Syncing { since: Epoch(2) })], "it waits for n1");
}

#[test]
fn all_down_at_once_stay_in_sync_until_one_is_given_up() {
    let mut config = cluster(2, 1);
    create(&mut config, "fs", 2, None);
    down(&mut config, &[(1, 1), (2, 1)]);
    assert_eq!(states(&config, 1), [(1, InSync), (2, InSync)]);
    up(&mut config, 1, 2);
    settle(&mut config);
    assert_eq!(states(&config, 1), [(1, InSync), (2, InSync)], "writes wait for n2");
    let epoch = config.epoch;
    down(&mut config, &[(2, 1)]);
    assert_eq!(config.epoch, epoch.next());
    // Not an epoch in which n2 was down: n1 may have settled unfinished writes of epoch 2 alone.
    assert_eq!(states(&config, 1), [(1, InSync), (2, Stale { since: Epoch(2) })]);
}

#[test]
fn a_quick_restart_keeps_the_copy_but_not_the_good_epoch() {
    let mut config = cluster(2, 1);
    create(&mut config, "fs", 2, None);
    up(&mut config, 2, 2);
    assert_eq!((states(&config, 1)[1].1, config.epoch), (InSync, Epoch(3)));
    down(&mut config, &[(2, 2)]);
    // The mirrors did not recover in epoch 3, so what was unfinished in epoch 2 may still differ.
    assert_eq!(states(&config, 1)[1].1, Stale { since: Epoch(2) });
}

#[test]
fn one_copy() {
    let mut config = cluster(1, 8);
    create(&mut config, "fs", 1, None);
    down(&mut config, &[(1, 1)]);
    assert_eq!(states(&config, 1), [(1, InSync)]);
    up(&mut config, 1, 2);
    ok(&mut config, Command::DiskFault { disk: DiskId(1) });
    assert_eq!(states(&config, 1), [(1, InSync)]);
}

#[test]
fn a_faulted_disk_leaves_and_stays_out() {
    let mut config = cluster(3, 8);
    create(&mut config, "fs", 2, None);
    ok(&mut config, Command::DiskFault { disk: DiskId(3) });
    assert_eq!(config.epoch, Epoch(4));
    let stale = config.mirrors.values().flat_map(|m| &m.members).filter(|m| matches!(m.state, Stale { .. })).count();
    assert!(stale > 0);
    down(&mut config, &[(3, 1)]);
    up(&mut config, 3, 2);
    assert!(config.mirrors.values().flat_map(|m| &m.members).all(|m| !matches!(m.state, Syncing { .. })));
}

#[test]
fn a_new_disk_takes_a_failed_ones_place() {
    let mut config = cluster(3, 8);
    create(&mut config, "fs", 2, None);
    let add = |config: &mut Config, node: u32, uuid: u8, regions: u32| {
        let command = Command::DiskAdd { node: NodeId(node), uuid: [uuid; 16], blocks: regions * REGION + 17 };
        let Applied::Disk(id) = config.apply(&command) else { panic!("{command:?}") };
        id
    };
    let old = DiskId(3);
    let copies = |config: &Config, disk| -> Vec<(MirrorId, u32, MemberState)> {
        let all = config.mirrors.iter().flat_map(|(id, m)| m.members.iter().map(|m| (*id, m)));
        all.filter(|(_, m)| m.disk == disk).map(|(id, m)| (id, m.base, m.state)).collect()
    };
    let replace = |new| Command::DiskReplace { old: DiskId(3), new };
    let (small, right, elsewhere) = (add(&mut config, 3, 91, 1), add(&mut config, 3, 92, 8), add(&mut config, 1, 93, 8));
    refused(&mut config, replace(right));
    ok(&mut config, Command::DiskFault { disk: old });
    for wrong in [small, elsewhere, DiskId(1), DiskId(99), old] {
        refused(&mut config, replace(wrong));
    }
    let (epoch, before) = (config.epoch, copies(&config, old));
    assert!(!before.is_empty());
    ok(&mut config, replace(right));
    assert_eq!(config.epoch, epoch.next());
    let after = copies(&config, right);
    let moved: Vec<_> = before.iter().map(|(id, base, _)| (*id, *base, Syncing { since: Epoch(0) })).collect();
    assert_eq!((after, copies(&config, old)), (moved.clone(), Vec::new()));
    ok(&mut config, replace(right));
    assert_eq!(config.epoch, epoch.next(), "done already");
    let synced = moved.iter().map(|(id, ..)| (*id, right)).collect();
    ok(&mut config, Command::MembersSynced { copies: synced, epoch: epoch.next() });
    assert!(copies(&config, right).iter().all(|(.., state)| *state == InSync));
    assert!(config.disks[&old].faulted, "it is still known for what it is");
}

#[test]
fn the_only_current_copy_is_not_given_up_for_an_empty_disk() {
    let mut config = cluster(2, 8);
    create(&mut config, "fs", 2, None);
    down(&mut config, &[(2, 1)]);
    ok(&mut config, Command::DiskFault { disk: DiskId(1) });
    assert_eq!(states(&config, 1)[0], (1, InSync));
    let added = config.apply(&Command::DiskAdd { node: NodeId(1), uuid: [9; 16], blocks: 9 * REGION });
    assert_eq!(added, Applied::Disk(DiskId(3)));
    let why = refused(&mut config, Command::DiskReplace { old: DiskId(1), new: DiskId(3) });
    assert!(why.contains("only current copy"), "{why}");
}

#[test]
fn tokens_are_bounded() {
    let mut config = cluster(1, 0);
    for i in 0..100u8 {
        ok(&mut config, Command::TokenAdd { hash: [i; 32], expires_unix: u64::from(i) });
    }
    assert_eq!((config.tokens.len(), config.tokens.contains_key(&[99; 32])), (TOKENS_MAX, true));
    ok(&mut config, Command::TokenRemove { hash: [99; 32] });
    assert!(!config.tokens.contains_key(&[99; 32]));
}

#[test]
fn voters_never_run_out() {
    let mut config = cluster(2, 0);
    ok(&mut config, Command::SetVoter { node: NodeId(1), voter: true });
    refused(&mut config, Command::SetVoter { node: NodeId(1), voter: false });
    ok(&mut config, Command::SetVoter { node: NodeId(2), voter: true });
    ok(&mut config, Command::SetVoter { node: NodeId(1), voter: false });
}

/// A random command, mostly sensible.
fn random(rng: &mut Prng, config: &Config) -> Command {
    let node = NodeId(rng.below(7) as u32);
    let known = config.nodes.get(&node).map_or(0, |n| n.incarnation.0);
    let life = Incarnation((known + rng.below(3)).saturating_sub(1));
    let disk = DiskId(rng.below(9) as u32);
    let epoch = Epoch(config.epoch.0.saturating_sub(rng.below(3)));
    match rng.below(16) {
        0 => Command::NodeJoin { name: format!("n{}", rng.below(6)), addr: format!("h{}:1", rng.below(6)) },
        1..=4 => {
            let addr = config.nodes.get(&node).map_or_else(|| "h1:1".to_owned(), |n| n.addr.clone());
            Command::NodeUp { node, incarnation: Incarnation(known + rng.below(2)), addr }
        }
        5..=6 => Command::NodesDown { nodes: vec![(node, life)] },
        7 => Command::NodesDown {
            nodes: config.nodes.iter().filter(|_| rng.one_in(2)).map(|(n, i)| (*n, i.incarnation)).collect(),
        },
        8 if rng.one_in(3) => Command::SetVoter { node, voter: rng.one_in(2) },
        9 => Command::DiskAdd { node, uuid: [rng.below(9) as u8; 16], blocks: rng.below(40) as u32 * REGION },
        10 if rng.one_in(30) => Command::DiskFault { disk },
        10 if rng.one_in(3) => Command::DiskReplace { old: disk, new: DiskId(rng.below(9) as u32) },
        11 if rng.one_in(2) => {
            let blocks = rng.one_in(2).then(|| rng.below(20) * u64::from(REGION));
            Command::FsCreate { name: format!("f{}", rng.below(4)), uuid: [1; 16], copies: rng.below(4) as u8, blocks }
        }
        12 | 13 => Command::Recovered { epoch },
        _ => {
            let all: Vec<(MirrorId, DiskId)> =
                config.mirrors.iter().flat_map(|(id, m)| m.members.iter().map(|m| (*id, m.disk))).collect();
            let copies =
                (0..=rng.below(3)).map(|_| all.get(rng.below(all.len() as u64) as usize).copied().unwrap_or((MirrorId(1), disk)));
            Command::MembersSynced { copies: copies.collect(), epoch }
        }
    }
}

#[test]
fn invariants_hold_under_random_commands() {
    let mut created = 0;
    let mut synced = 0;
    for seed in 0..150 {
        let mut rng = Prng::new(seed);
        let mut config = cluster(rng.below(5) as u32, 12);
        config.apply(&Command::FsCreate { name: "f9".into(), uuid: [2; 16], copies: 2, blocks: Some(1 << 17) });
        for _ in 0..300 {
            let command = random(&mut rng, &config);
            let before = config.clone();
            let applied = config.apply(&command);
            config.check_invariants();
            let sets =
                |c: &Config| -> Vec<MemberState> { c.mirrors.values().flat_map(|m| &m.members).map(|m| m.state).collect() };
            let lives = |c: &Config| -> Vec<(bool, Incarnation)> { c.nodes.values().map(|n| (n.up, n.incarnation)).collect() };
            let steps = config.epoch.0 - before.epoch.0;
            assert!(steps <= 1);
            let joined = matches!(command, Command::NodeJoin { .. } | Command::FsCreate { .. });
            if steps == 0 && !joined {
                assert_eq!(
                    (sets(&before), lives(&before)),
                    (sets(&config), lives(&config)),
                    "changed without an epoch: {command:?}"
                );
            }
            if matches!(applied, Applied::Refused(_)) {
                assert_eq!(before, config);
            }
            created += usize::from(matches!(applied, Applied::Fs(_)));
            synced += usize::from(matches!(command, Command::MembersSynced { .. }) && steps == 1);
        }
    }
    assert!(created > 100 && synced > 100, "the test reaches what it is for: {created} {synced}");
}
