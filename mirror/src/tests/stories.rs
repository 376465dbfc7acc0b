//! Stories of one cluster each.

use super::*;
use crate::events::MirrorEvent;
use crate::message::{Reply, Request, WriteHead, WriteMode, Writer};
use crate::mirror::StartError;
use crate::shell::client::sources;
use crate::sim::Fault;
use cluster::config::{Member, MirrorInfo};
use cluster::{Cluster, Epoch, Incarnation};

/// Where block `index` of mirror 1 is on the disk of copy `copy`.
fn place(world: &World, n: u32, copy: u32, index: u32) -> u64 {
    let disk = world.nodes[&n].1.disk(DiskId(n));
    disk.with(|c| c.geometry.data_start) + u64::from(copy * BLOCKS + index)
}

async fn home(world: &World) {
    for (n, (_, mirror)) in &world.nodes {
        mirror.disk(DiskId(*n)).checkpoint_once().await.unwrap();
    }
}

fn drain(events: &mut tokio::sync::broadcast::Receiver<MirrorEvent>) -> Vec<MirrorEvent> {
    std::iter::from_fn(|| events.try_recv().ok()).collect()
}

#[tokio::test(start_paused = true)]
async fn write_some_lose_a_node_write_more_and_only_what_changed_is_copied() {
    let mut world = World::new(11, 3, 2).await;
    let a = world.at(1);
    for i in 0..200 {
        a.submit(M, group(vec![write(i, 1000)])).await.unwrap();
    }
    world.crash(2, 1);
    world.group.down(NodeId(2));
    for i in (0..50).step_by(5) {
        within(60, a.submit(M, group(vec![write(i, 2000)]))).await.unwrap();
    }
    a.submit(M, group(vec![free(100)])).await.unwrap();
    world.up(2).await;
    let mut events = world.nodes[&2].1.events();
    world.in_sync().await;
    let copied = drain(&mut events).into_iter().find_map(|e| match e {
        MirrorEvent::ResyncFinished { mirror: M, copied, .. } => Some(copied),
        _ => None,
    });
    // Versions of the epoch in which it was last in sync are compared too; here those are the same on both.
    assert_eq!(copied, Some(11));
    world.copies_agree().await;
    // It has really got them: the other copy goes.
    world.crash(1, 2);
    world.group.down(NodeId(1));
    let c = world.at(3);
    assert_eq!((read(&c, 5).await, read(&c, 6).await, read(&c, 100).await), (2000, 1000, 0));
}

#[tokio::test(start_paused = true)]
async fn a_mirror_whose_last_copy_is_away_waits_for_it() {
    let mut world = World::new(12, 3, 2).await;
    let c = world.at(3);
    c.submit(M, group(vec![write(1, 7)])).await.unwrap();
    world.crash(1, 1);
    world.group.down(NodeId(1));
    within(60, c.submit(M, group(vec![write(1, 8)]))).await.unwrap();
    world.crash(2, 2);
    world.group.down(NodeId(2));
    let late = c.submit(M, group(vec![write(2, 9)]));
    let reading = {
        let c = Arc::clone(&c);
        tokio::spawn(async move { read(&c, 1).await })
    };
    // The copy of node 1 has not the newest: it must not be used.
    world.up(1).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(!reading.is_finished());
    world.up(2).await;
    assert_eq!(within(60, reading).await.unwrap(), 8);
    within(60, late).await.unwrap();
    world.in_sync().await;
    world.copies_agree().await;
}

/// Its version is older than the last epoch in which the copy was in sync, and so not one that resync looks at.
#[tokio::test(start_paused = true)]
async fn a_group_that_only_one_copy_has_is_settled_at_the_next_epoch_though_its_writer_lives() {
    let mut world = World::new(20, 3, 2).await;
    let (cluster, b) = (Arc::clone(&world.nodes[&2].0), world.at(2));
    b.submit(M, group(vec![write(1, 6)])).await.unwrap();
    world.net.cut(NodeId(1), NodeId(2));
    let lost = b.submit(M, group(vec![write(1, 7)]));
    tokio::time::sleep(Duration::from_millis(100)).await;
    // It lives through the change of the epoch, and dies before it has sent the group again.
    cluster.set_lease(Some(cluster.now()));
    world.group.change(|_| {});
    world.net.heal(NodeId(1), NodeId(2));
    world.in_sync().await;
    drop((lost, b, cluster));
    world.crash(2, 1);
    world.group.down(NodeId(2));
    assert_eq!(within(60, read(&world.at(3), 1)).await, 7);
    world.up(2).await;
    world.in_sync().await;
    world.copies_agree().await;
}

#[tokio::test(start_paused = true)]
async fn requests_of_an_older_epoch_are_refused() {
    let world = World::new(13, 3, 2).await;
    world.group.change(|_| {});
    world.in_sync().await;
    let head = WriteHead {
        mirror: M,
        mode: WriteMode::Normal,
        writer: Writer { node: NodeId(3), incarnation: Incarnation(1) },
        wseq: 1,
        completed_upto: 0,
        clock: 0,
        fresh_data: false,
        slots: Vec::new(),
    };
    let client = world.nodes[&3].1.client();
    for (epoch, right) in [(1, false), (2, true), (3, false)] {
        let reply = client.rpc.call(NodeId(1), Epoch(epoch), DiskId(1), Request::Write(head.clone())).await;
        let (reply, _) = reply.unwrap();
        assert_eq!(reply, if right { Reply::Written } else { Reply::Stale { epoch: Epoch(2) } });
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_declared_dead_loses_its_right_to_write() {
    let world = World::new(14, 3, 2).await;
    let a = world.at(1);
    world.disks[&2].freeze();
    let waiting = a.submit(M, group(vec![write(1, 7)]));
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.group.apply(&cluster::Command::NodesDown { nodes: vec![(NodeId(1), Incarnation(1))] });
    assert_eq!(within(10, waiting).await, Err(MirrorError::Fenced));
    assert_eq!(within(10, a.submit(M, group(vec![write(1, 8)]))).await, Err(MirrorError::Fenced));
    world.disks[&2].thaw();
    // The others go on, and agree on what it left.
    let c = world.at(3);
    let found = within(60, read(&c, 1)).await;
    assert!(found == 7 || found == 0);
}

#[tokio::test(start_paused = true)]
async fn without_its_lease_a_node_neither_reads_nor_writes() {
    let world = World::new(15, 3, 2).await;
    let (cluster, _) = &world.nodes[&1];
    let a = world.at(1);
    a.submit(M, group(vec![write(1, 7)])).await.unwrap();
    cluster.set_lease(Some(cluster.now()));
    let writing = a.submit(M, group(vec![write(1, 8)]));
    let reading = {
        let a = Arc::clone(&a);
        tokio::spawn(async move { read(&a, 1).await })
    };
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!reading.is_finished());
    cluster.set_lease(None);
    within(10, writing).await.unwrap();
    let got = within(10, reading).await.unwrap();
    assert!(got == 7 || got == 8);
}

#[tokio::test(start_paused = true)]
async fn a_flipped_bit_is_repaired_from_the_other_copy() {
    let world = World::new(16, 3, 2).await;
    let a = world.at(1);
    a.submit(M, group((0..300).map(|i| write(i, u64::from(i) + 1)).collect())).await.unwrap();
    home(&world).await;
    let (here, there) = (place(&world, 1, 0, 7), place(&world, 2, 1, 8));
    world.disks[&1].flip_bit(here, 12_345);
    world.disks[&2].flip_bit(there, 12_345);
    world.disks[&1].inject(Fault::ReadError(here + 2));
    let mut events = world.nodes[&1].1.events();
    let all = a.read((0..300).map(|i| BlockNo::new(M, i)).collect()).await.unwrap();
    assert!(all.iter().zip(1..).all(|(b, v)| value(&b.data) == v));
    let repaired: Vec<_> = drain(&mut events)
        .into_iter()
        .map(|e| match e {
            MirrorEvent::Repaired { block, disk, .. } => (block.index, disk.0),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(repaired, [(7, 1), (9, 1)]);
    home(&world).await;
    assert_eq!(value(&world.disks[&1].peek(here)), 8);
    // The copy that nobody read is found by a scrub, and so is a write that was lost without a trace.
    let mirror = &world.nodes[&2].1;
    world.nodes[&1].1.scrub();
    let mut events = world.nodes[&1].1.events();
    let report = within(60, async {
        loop {
            if let Ok(MirrorEvent::ScrubFinished { report }) = events.recv().await {
                return report;
            }
        }
    })
    .await;
    assert_eq!((report.checked, report.repaired, report.unrepaired), (300, 1, 0));
    assert_eq!(mirror.status().corrupt, 0);
    world.copies_agree().await;
    // On both copies nothing helps.
    home(&world).await;
    world.disks[&1].flip_bit(place(&world, 1, 0, 20), 5);
    world.disks[&2].flip_bit(place(&world, 2, 1, 20), 6);
    let block = BlockNo::new(M, 20);
    assert_eq!(a.read(vec![block]).await, Err(MirrorError::Corrupt { block }));
    // Writing it anew makes it good.
    a.submit(M, group(vec![write(20, 99)])).await.unwrap();
    assert_eq!(read(&a, 20).await, 99);
}

#[tokio::test(start_paused = true)]
async fn a_lost_tag_block_and_a_misdirected_write_are_repaired() {
    let mut world = World::new(17, 3, 2).await;
    let a = world.at(1);
    a.submit(M, group((0..200).map(|i| write(i, u64::from(i) + 1)).collect())).await.unwrap();
    drop(a);
    // Until all is known to be complete, so that the log is not kept.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (data, tags) = world.nodes[&1].1.disk(DiskId(1)).with(|c| (c.geometry.data_start, c.geometry.tags_start));
    world.nodes[&1].1.shutdown().await;
    world.crash(1, 1);
    world.disks[&1].poke(tags, Bytes::from(vec![0; BLOCK_SIZE]));
    let misdirected = world.disks[&1].peek(data + 70);
    world.disks[&1].poke(data + 71, misdirected);
    // It comes back so soon that nobody has declared it dead.
    world.up(1).await;
    world.in_sync().await;
    let a = world.at(1);
    let tags = a.tags(BlockNo::new(M, 0), 10).await.unwrap();
    assert!(tags.iter().all(|(t, v)| t.kind == Kind::Data && *v > Version(0)));
    let all = a.read((0..200).map(|i| BlockNo::new(M, i)).collect()).await.unwrap();
    assert!(all.iter().zip(1..).all(|(b, v)| value(&b.data) == v));
    assert_eq!(world.nodes[&1].1.status().repaired, 65);
    world.copies_agree().await;
}

#[tokio::test(start_paused = true)]
async fn tags_that_cannot_be_read_are_repaired_and_the_disk_stays() {
    for clean in [true, false] {
        let mut world = World::new(27, 3, 2).await;
        // Less than a tag block covers: the rest was never written.
        world.at(1).submit(M, group((0..30).map(|i| write(i, u64::from(i) + 1)).collect())).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let tags = world.nodes[&1].1.disk(DiskId(1)).with(|c| c.geometry.tags_start);
        if clean {
            world.nodes[&1].1.shutdown().await;
        }
        world.crash(1, 1);
        world.disks[&1].inject(Fault::ReadError(tags));
        world.up(1).await;
        let mut events = world.nodes[&1].1.events();
        world.in_sync().await;
        let all = world.at(1).read((0..30).map(|i| BlockNo::new(M, i)).collect()).await.unwrap();
        assert!(all.iter().zip(1..).all(|(b, v)| value(&b.data) == v));
        // What nobody reads is repaired, too.
        let damaged = |got: Vec<Option<(Version, Tag, u64)>>| got.iter().filter(|g| g.is_none()).count();
        within(60, async {
            while damaged(world.nodes[&1].1.copy_of(DiskId(1), 0..64).await) > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        // If the log had to be replayed, it was noticed before anybody could listen.
        let told =
            drain(&mut events).iter().filter(|e| matches!(e, MirrorEvent::TagsLost { disk: DiskId(1), blocks: 64, .. })).count();
        assert_eq!(told, usize::from(clean));
        assert!(!world.group.config().disks[&DiskId(1)].faulted);
        // It has been written again, and can be read.
        home(&world).await;
        world.nodes[&1].1.shutdown().await;
        world.crash(1, 2);
        world.up(1).await;
        world.in_sync().await;
        world.copies_agree().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_repair_ends_with_its_epoch() {
    let world = World::new(30, 3, 2).await;
    world.at(1).submit(M, group(vec![write(1, 7)])).await.unwrap();
    let read = world.at(1).read(vec![BlockNo::new(M, 1)]).await.unwrap().remove(0);
    // It takes the repair in, and never answers.
    world.disks[&2].freeze();
    let client = world.nodes[&1].1.client();
    let view = client.server.view();
    let source = sources(&view, M).into_iter().find(|s| s.disk == DiskId(2)).unwrap();
    let repair = client.repair(view.epoch(), M, 1, &read, Some(([0; 16], true)), vec![(source, Version(0))]);
    let change = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        world.group.change(|_| {});
    };
    let (repaired, ()) = within(60, async { tokio::join!(repair, change) }).await;
    assert_eq!(repaired, 0);
    world.disks[&2].thaw();
}

#[tokio::test(start_paused = true)]
async fn nobody_writes_in_anothers_name() {
    let world = World::new(28, 3, 2).await;
    let epoch = world.group.config().epoch;
    let head = |mode, node, incarnation| WriteHead {
        mirror: M,
        mode,
        writer: Writer { node: NodeId(node), incarnation: Incarnation(incarnation) },
        wseq: 1,
        completed_upto: 0,
        clock: 0,
        fresh_data: false,
        slots: Vec::new(),
    };
    let client = world.nodes[&3].1.client();
    let repair = WriteMode::Repair { bad: Version(0) };
    for (head, right) in [
        (head(WriteMode::Normal, 3, 1), true),
        (head(WriteMode::Normal, 2, 1), false),
        (head(WriteMode::Normal, 3, 2), false),
        (head(repair, 0, 0), true),
        (head(repair, 2, 1), false),
        (head(WriteMode::Normal, 0, 0), false),
    ] {
        let request = Request::Write(head.clone());
        let (reply, _) = client.rpc.call(NodeId(1), epoch, DiskId(1), request).await.unwrap();
        assert_eq!(reply, if right { Reply::Written } else { Reply::Refused }, "{head:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_fails_to_flush_is_given_up_and_the_others_go_on() {
    let world = World::new(18, 3, 2).await;
    let c = world.at(3);
    let mut events = world.nodes[&1].1.events();
    c.submit(M, group(vec![write(1, 7)])).await.unwrap();
    world.disks[&1].inject(Fault::FlushError);
    within(60, c.submit(M, group(vec![write(1, 8)]))).await.unwrap();
    assert_eq!(read(&c, 1).await, 8);
    assert_eq!(read(&world.at(1), 1).await, 8);
    assert!(world.group.config().disks[&DiskId(1)].faulted);
    assert!(world.nodes[&1].1.status().disks[0].faulted);
    assert!(matches!(drain(&mut events)[..], [MirrorEvent::DiskFaulted { disk: DiskId(1), .. }]));
}

#[tokio::test(start_paused = true)]
async fn a_slow_copy_holds_writers_back_and_nothing_is_lost() {
    let world = World::new(19, 3, 2).await;
    world.disks[&2].freeze();
    let mut waiting = Vec::new();
    for round in 0..40u64 {
        for n in 1..=3u32 {
            let m = if n == 3 { MirrorId(2) } else { M };
            let writes = (0..120).map(|i| write_to(m, i * 8 + n, round * 10 + u64::from(n))).collect();
            waiting.push(world.at(n).submit(m, group(writes)));
        }
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    let log = &world.nodes[&1].1.status().disks[0];
    assert!(log.log_used < log.log_blocks);
    world.disks[&2].thaw();
    for w in waiting {
        within(60, w).await.unwrap();
    }
    assert_eq!(read(&world.at(3), 9).await, 391);
    world.copies_agree().await;
}

#[tokio::test(start_paused = true)]
async fn a_clean_stop_leaves_nothing_to_replay() {
    let mut world = World::new(20, 2, 2).await;
    let a = world.at(1);
    for i in 0..20 {
        a.submit(M, group(vec![write(i, 5)])).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let clock = a.clock();
    let pending = { a.read(vec![BlockNo::new(M, 1)]) };
    for (_, mirror) in world.nodes.values() {
        mirror.shutdown().await;
        assert_eq!(mirror.status().disks[0].log_used, 0);
    }
    assert_eq!(pending.await, Err(MirrorError::Shutdown));
    assert_eq!(a.submit(M, group(vec![write(1, 1)])).await, Err(MirrorError::Shutdown));
    drop(a);
    let mut rng = Rng::new(1);
    world.blackout(&mut rng).await;
    world.in_sync().await;
    let a = world.at(2);
    assert_eq!(read(&a, 19).await, 5);
    assert!(a.clock() >= clock, "counters never go back");
}

#[tokio::test(start_paused = true)]
async fn a_mirror_made_later_and_a_disk_added_later_work() {
    let mut world = World::new(21, 3, 2).await;
    let spare = SimDisk::new(DISK, 99);
    format_disk(&spare, [7; 16], [4; 16]).await.unwrap();
    let (_, mirror) = &world.nodes[&3];
    mirror.add_disk(DiskId(4), Arc::new(spare.clone())).await.unwrap();
    world.group.change(|config| {
        let disk = cluster::config::DiskInfo { node: NodeId(3), uuid: [4; 16], blocks: BLOCKS, faulted: false };
        config.disks.insert(DiskId(4), disk);
        let members =
            [(1, 2 * BLOCKS), (4, 0)].map(|(d, base)| Member { disk: DiskId(d), base, state: MemberState::InSync }).to_vec();
        config.mirrors.insert(MirrorId(9), MirrorInfo { fs: cluster::FsId(1), blocks: BLOCKS, members });
    });
    let b = world.at(2);
    within(60, b.submit(MirrorId(9), group(vec![write_to(MirrorId(9), 3, 33)]))).await.unwrap();
    let got = b.read(vec![BlockNo::new(MirrorId(9), 3)]).await.unwrap();
    assert_eq!(value(&got[0].data), 33);
    assert_eq!(world.nodes[&3].1.status().disks.len(), 2);
    // Not a disk of this cluster.
    let foreign = SimDisk::new(DISK, 98);
    format_disk(&foreign, [8; 16], [5; 16]).await.unwrap();
    let refused = world.nodes[&3].1.add_disk(DiskId(5), Arc::new(foreign)).await;
    assert!(matches!(refused, Err(StartError { .. })));
    world.nodes.clear();
}

#[tokio::test(start_paused = true)]
async fn a_new_disk_takes_a_failed_ones_place_and_gets_everything() {
    let mut world = World::new(29, 3, 2).await;
    let a = world.at(1);
    for i in 0..50 {
        a.submit(M, group(vec![write(i * 7, 100 + u64::from(i))])).await.unwrap();
    }
    a.submit(M, group(vec![free(0)])).await.unwrap();
    world.disks[&1].inject(Fault::FlushError);
    within(60, a.submit(M, group(vec![write(7, 5)]))).await.unwrap();
    assert!(world.group.config().disks[&DiskId(1)].faulted);
    let spare = SimDisk::new(DISK, 97);
    format_disk(&spare, [7; 16], [4; 16]).await.unwrap();
    world.group.change(|config| {
        let disk = cluster::config::DiskInfo { node: NodeId(1), uuid: [4; 16], blocks: 3 * BLOCKS, faulted: false };
        config.disks.insert(DiskId(4), disk);
    });
    world.nodes[&1].1.add_disk(DiskId(4), Arc::new(spare.clone())).await.unwrap();
    world.group.apply(&cluster::Command::DiskReplace { old: DiskId(1), new: DiskId(4) });
    // Programs go on meanwhile.
    within(60, a.submit(M, group(vec![write(14, 6)]))).await.unwrap();
    world.in_sync().await;
    let copy = world.nodes[&1].1.copy_of(DiskId(4), 0..2 * BLOCKS).await;
    assert!(copy.iter().all(Option::is_some));
    // The other copy goes: what is read now is from the new disk.
    world.crash(2, 1);
    world.group.down(NodeId(2));
    let c = world.at(3);
    assert_eq!((read(&c, 0).await, read(&c, 7).await, read(&c, 14).await), (0, 5, 6));
    for i in 3..50 {
        assert_eq!(read(&c, i * 7).await, 100 + u64::from(i));
    }
}

#[tokio::test(start_paused = true)]
async fn a_small_write_is_one_append_and_one_flush_per_copy() {
    let world = World::new(22, 3, 2).await;
    let a = world.at(1);
    a.submit(M, group(vec![write(1, 1)])).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.disks.values().for_each(SimDisk::reset_counts);
    a.submit(M, group(vec![write(1, 2)])).await.unwrap();
    for n in [1, 2] {
        let counts = world.disks[&n].counts();
        assert_eq!((counts.writes, counts.flushes, counts.reads, counts.bytes_written), (1, 1, 0, 8192), "disk {n}");
    }
    assert_eq!(world.disks[&3].counts().writes, 0);
    // Many at once share a flush.
    world.disks.values().for_each(SimDisk::reset_counts);
    let many: Vec<_> = (0..100).map(|i| a.submit(M, group(vec![write(i % 50, 3)]))).collect();
    for done in many {
        done.await.unwrap();
    }
    assert!(world.disks[&1].counts().flushes <= 4, "{:?}", world.disks[&1].counts());
}
