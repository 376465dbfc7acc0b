//! The shared disk on several nodes: what one writes the others read, tokens and blocks, death and recovery.

mod world;

use cluster::BlockNo;
use sld::{After, Disk, DiskError, FlushTarget, Mode, ObjectId, Operation, Write, WriteClass};
use world::{REGION, World, change, create, inode, number, read, write};

#[tokio::test(start_paused = true)]
async fn what_one_node_writes_the_others_read() {
    let w = World::new(3, 4 * REGION, 1).await;
    let b = create(&w.disk(1), 7).await;
    assert_eq!(read(&w.disk(1), b).await, 7);
    assert_eq!(read(&w.disk(2), b).await, 7);
    assert_eq!(change(&w.disk(3), b, 8).await, 7);
    assert_eq!(read(&w.disk(1), b).await, 8);
    assert_eq!(change(&w.disk(2), b, 9).await, 8);
    assert_eq!(read(&w.disk(3), b).await, 9);
    let told = w.n(1).told.revoked.lock().clone();
    assert_eq!(told[0], (inode(b), Some(Mode::Shared)), "the writer keeps reading");
    w.check();
}

#[tokio::test(start_paused = true)]
async fn held_tokens_and_cached_blocks_take_one_poll_and_no_message() {
    let w = World::new(3, 4 * REGION, 2).await;
    let disk = w.disk(1);
    let b = create(&disk, 1).await;
    w.net.reset_counts();
    let reads = w.store.reads();
    for i in 0..100 {
        let t = disk.try_acquire(&[(inode(b), Mode::Exclusive)]).expect("held");
        assert_eq!(number(&disk.try_read(inode(b), b).expect("cached")), if i == 0 { 1 } else { i + 99 });
        let c = disk.try_alloc(Some(b), 1).expect("leased").start;
        let t2 = disk.adopt(inode(c));
        let mut op = Operation::new();
        let first = op.push(write(inode(c), c, 5, vec![]));
        op.push(write(inode(b), b, i + 100, vec![After::Write(first)]));
        disk.commit(op).unwrap();
        drop((t, t2));
    }
    assert_eq!(w.net.count(cluster::Service::Token).messages, 0);
    assert_eq!(w.store.reads(), reads);
    disk.flush(&[FlushTarget::Object(inode(b))]).await.unwrap();
    assert_eq!(number(&w.store.peek(b).unwrap().0), 199);
    assert_eq!(w.store.allocated().len(), 101, "what it comes after is durable, too");
    assert!(w.store.groups() < 10, "many blocks in few groups: {}", w.store.groups());
    w.check();
}

#[tokio::test(start_paused = true)]
async fn dead_node_leaves_its_tokens_and_survivors_keep_theirs() {
    let mut w = World::new(3, 4 * REGION, 3).await;
    let (a, b, c) = (create(&w.disk(1), 1).await, create(&w.disk(2), 2).await, create(&w.disk(3), 3).await);
    for i in 1..=3 {
        w.disk(i).flush(&[FlushTarget::All]).await.unwrap();
    }
    change(&w.disk(2), c, 33).await;
    w.disk(2).flush(&[FlushTarget::All]).await.unwrap();
    w.down(2);
    assert!(w.disk(1).try_acquire(&[(inode(a), Mode::Exclusive)]).is_some(), "what it holds it goes on using");
    w.recovered().await;
    assert_eq!(read(&w.disk(1), b).await, 2);
    assert_eq!(change(&w.disk(3), c, 34).await, 33);
    assert_eq!(change(&w.disk(3), a, 11).await, 1);
    w.up(2);
    w.recovered().await;
    assert_eq!(read(&w.disk(2), a).await, 11);
    assert_eq!(read(&w.disk(2), c).await, 34);
    w.check();
}

#[tokio::test(start_paused = true)]
async fn blocks_are_never_given_out_twice_and_come_back_when_freed() {
    let w = World::new(2, REGION, 4).await;
    let mut all = std::collections::BTreeSet::new();
    // Far more than one region per node; two mirrors of one region each.
    for round in 0..60 {
        for i in 1..=2 {
            let e = w.disk(i).alloc(None, 256).await.unwrap();
            let mut op = Operation::new();
            for k in 0..e.len {
                let b = BlockNo::new(e.start.mirror, e.start.index + k);
                assert!(all.insert(b), "{b} twice, round {round}");
                op.push(Write { class: WriteClass::FreshData, ..write(ObjectId::Inode(99 + i as u64), b, 1, vec![]) });
            }
            let disk = w.disk(i);
            disk.admit().await.unwrap();
            let _t = disk.acquire(&[(ObjectId::Inode(99 + i as u64), Mode::Exclusive)]).await.unwrap();
            disk.commit(op).unwrap();
        }
    }
    w.check();
    let usage = w.disk(1).usage().await.unwrap();
    assert_eq!(usage.blocks, u64::from(2 * REGION));
    w.disk(2).flush(&[FlushTarget::All]).await.unwrap();
    let mut got = 0u32;
    let error = loop {
        match w.disk(1).alloc(None, 1024).await {
            Ok(e) => {
                got += e.len;
                for k in 0..e.len {
                    assert!(all.insert(BlockNo::new(e.start.mirror, e.start.index + k)));
                }
            }
            Err(e) => break e,
        }
    };
    assert_eq!(error, DiskError::NoSpace);
    assert_eq!(got as usize + 120 * 256, 2 * REGION as usize, "every block was found, those in the other's region, too");
    w.check();
}

/// What the hot path costs: run it with `--ignored --nocapture`, optimized.
#[tokio::test(start_paused = true)]
#[ignore = "measures"]
#[allow(clippy::disallowed_methods, reason = "measures real time")]
async fn hot_path_cost() {
    let w = World::new(1, 64 * REGION, 2).await;
    let disk = w.disk(1);
    let b = create(&disk, 1).await;
    let time = |name: &str, n: u32, f: &mut dyn FnMut(u64)| {
        let start = std::time::Instant::now();
        for i in 0..n {
            f(u64::from(i));
        }
        println!("{name}: {:.2} us", start.elapsed().as_secs_f64() * 1e6 / f64::from(n));
    };
    let dir = disk.acquire(&[(inode(b), Mode::Exclusive)]).await.unwrap();
    time("create: alloc, adopt, commit of two blocks", 12000, &mut |i| {
        let c = disk.try_alloc(Some(b), 1).unwrap().start;
        let t = disk.adopt(inode(c));
        let mut op = Operation::new();
        let first = op.push(write(inode(c), c, 5, vec![]));
        op.push(write(inode(b), b, i + 100, vec![After::Write(first)]));
        disk.commit(op).unwrap();
        drop(t);
    });
    drop(dir);
    time("acquire and release one token", 100_000, &mut |_| {
        drop(disk.try_acquire(&[(inode(b), Mode::Shared)]).unwrap());
    });
    time("read a dirty block", 100_000, &mut |_| {
        drop(disk.try_read(inode(b), b).unwrap());
    });
    let _t = disk.acquire(&[(inode(b), Mode::Exclusive)]).await.unwrap();
    time("commit over one block", 20_000, &mut |i| {
        disk.commit(Operation { writes: vec![write(inode(b), b, i, vec![])] }).unwrap();
    });
    for k in 0..50u64 {
        disk.admit().await.unwrap();
        let e = disk.alloc(Some(b), 32).await.unwrap();
        time("write 128 KiB: commit of 32 fresh blocks and the inode", 1, &mut |_| {
            let mut op = Operation::new();
            for n in 0..e.len {
                let at = BlockNo::new(e.start.mirror, e.start.index + n);
                op.push(Write { class: WriteClass::FreshData, ..write(inode(b), at, k, vec![]) });
            }
            op.push(write(inode(b), b, k, vec![After::DataOf(inode(b))]));
            disk.commit(op).unwrap();
        });
    }
    let start = std::time::Instant::now();
    disk.flush(&[FlushTarget::All]).await.unwrap();
    println!("flush: {:?}", start.elapsed());
}
