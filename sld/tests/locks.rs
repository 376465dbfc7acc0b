//! Cluster-wide byte-range locks on the simulated network.

use cluster::sim::{FixedGroup, SimNet, test_config};
use cluster::{Layer, NodeId};
use sld::locks::{LockAnswer, LockKind, LockRange, LockSpace, LockTarget, Wait};
use sld::{Locks, ObjectId};
use std::future::{Future, pending};
use std::sync::Arc;
use std::time::Duration;

const OBJECT: ObjectId = ObjectId::Inode(1 << 32 | 7);
const FILE: LockTarget = LockTarget { object: OBJECT, space: LockSpace::Record };
const WHOLE: LockTarget = LockTarget { object: OBJECT, space: LockSpace::Flock };

fn bytes(start: u64, end: u64) -> LockRange {
    LockRange { start, end }
}

fn run<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(FixedGroup, Vec<Arc<Locks>>) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let group = FixedGroup::new(&SimNet::new(seed), test_config(3, 2, 16_384));
        group.set_auto(&[Layer::Cluster, Layer::Mirror, Layer::Sld]);
        let nodes = (1..=3).map(|n| Locks::start(group.node(NodeId(n)))).collect();
        tokio::time::timeout(Duration::from_secs(600), test(group, nodes))
            .await
            .unwrap_or_else(|_| panic!("it hangs with seed {seed}"));
    });
}

#[test]
fn a_lock_keeps_others_out_until_it_is_given_up() {
    run(1, |_, nodes| async move {
        let (a, b) = (nodes[0].clone(), nodes[1].clone());
        assert_eq!(a.lock(FILE, 10, LockRange::ALL, LockKind::Write, 4711, Wait::No, pending()).await, Ok(LockAnswer::Done));
        let LockAnswer::Conflict(held) = b.lock(FILE, 10, bytes(5, 6), LockKind::Read, 1, Wait::No, pending()).await.unwrap()
        else {
            panic!("two nodes hold the same byte");
        };
        assert_eq!((held.pid, held.owner.node), (4711, NodeId(1)));
        let waiting = tokio::spawn({
            let b = b.clone();
            async move { b.lock(FILE, 10, bytes(5, 6), LockKind::Read, 1, Wait::UnlessDeadlock, pending()).await }
        });
        a.unlock(FILE, 10, bytes(0, 4)).await.unwrap();
        assert!(matches!(b.query(FILE, 11, bytes(5, 6), LockKind::Read).await, Ok(LockAnswer::Conflict(_))));
        a.unlock(FILE, 10, LockRange::ALL).await.unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(LockAnswer::Done));
        assert_eq!(a.query(FILE, 10, bytes(5, 6), LockKind::Read).await, Ok(LockAnswer::Free));
        assert_eq!((b.holds(FILE, 10), a.holds(FILE, 10)), (Some(LockKind::Read), None));
    });
}

#[test]
fn a_wait_that_is_dropped_leaves_no_lock_behind() {
    for seed in 0..50 {
        run(seed, |_, nodes| async move {
            nodes[0].lock(FILE, 1, LockRange::ALL, LockKind::Write, 1, Wait::No, pending()).await.unwrap();
            let waiting = tokio::spawn({
                let b = nodes[1].clone();
                async move { b.lock(FILE, 2, LockRange::ALL, LockKind::Write, 2, Wait::UnlessDeadlock, pending()).await }
            });
            tokio::time::sleep(Duration::from_millis(seed % 7)).await;
            // The holder lets go and the waiter is killed, in any order on the wire.
            let a = nodes[0].clone();
            let unlock = tokio::spawn(async move { a.unlock(FILE, 1, LockRange::ALL).await });
            tokio::time::sleep(Duration::from_micros(seed * 37)).await;
            waiting.abort();
            if waiting.await.is_ok() {
                // It had its lock before it could be killed.
                nodes[1].unlock(FILE, 2, LockRange::ALL).await.unwrap();
            }
            unlock.await.unwrap().unwrap();
            assert_eq!(
                nodes[2].lock(FILE, 3, LockRange::ALL, LockKind::Write, 3, Wait::UnlessDeadlock, pending()).await,
                Ok(LockAnswer::Done)
            );
        });
    }
}

#[test]
fn an_interrupted_wait_says_whether_the_lock_was_granted_first() {
    let mut seen = (0, 0);
    for seed in 0..50 {
        let outcome = Arc::new(std::sync::Mutex::new(None));
        let tell = outcome.clone();
        run(seed, |_, nodes| async move {
            nodes[0].lock(FILE, 1, LockRange::ALL, LockKind::Write, 1, Wait::No, pending()).await.unwrap();
            let after = Duration::from_micros(5_000 + seed * 40);
            let waiting = tokio::spawn({
                let b = nodes[1].clone();
                let interrupted = tokio::time::sleep(after);
                async move { b.lock(FILE, 2, LockRange::ALL, LockKind::Write, 2, Wait::UnlessDeadlock, interrupted).await }
            });
            tokio::time::sleep(Duration::from_millis(5)).await;
            nodes[0].unlock(FILE, 1, LockRange::ALL).await.unwrap();
            let answer = waiting.await.unwrap().unwrap();
            assert_eq!(nodes[1].holds(FILE, 2).is_some(), answer == LockAnswer::Done);
            *tell.lock().unwrap() = Some(answer);
        });
        match outcome.lock().unwrap().take() {
            Some(LockAnswer::Done) => seen.0 += 1,
            Some(LockAnswer::Cancelled) => seen.1 += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.0 > 0 && seen.1 > 0, "the schedules reach only one outcome: {seen:?}");
}

#[test]
fn locks_outlive_an_epoch_and_go_with_their_node() {
    for seed in 0..30 {
        run(seed, |group, nodes| async move {
            nodes[0].lock(FILE, 1, bytes(0, 9), LockKind::Write, 1, Wait::No, pending()).await.unwrap();
            nodes[1].lock(FILE, 1, bytes(10, 19), LockKind::Write, 2, Wait::No, pending()).await.unwrap();
            let waiting = tokio::spawn({
                let c = nodes[2].clone();
                async move { c.lock(FILE, 1, bytes(10, 19), LockKind::Write, 3, Wait::UnlessDeadlock, pending()).await }
            });
            tokio::time::sleep(Duration::from_millis(20)).await;
            group.down(NodeId(2));
            assert_eq!(waiting.await.unwrap(), Ok(LockAnswer::Done), "a dead node's lock did not go");
            let answer = nodes[2].lock(FILE, 1, bytes(0, 9), LockKind::Read, 3, Wait::No, pending()).await.unwrap();
            assert!(matches!(answer, LockAnswer::Conflict(_)), "a live node's lock went with the epoch");
        });
    }
}

/// Who takes both, as mail programs do, does not meet itself; each keeps out its own kind only, also after an epoch in which
/// the locks were asserted again, perhaps to another master, and for a waiter whose holder has died.
#[test]
fn locks_of_the_two_spaces_never_meet() {
    for seed in 0..30 {
        run(seed, |group, nodes| async move {
            let take = |n: usize, target, owner, wait| {
                let locks = nodes[n].clone();
                async move { locks.lock(target, owner, LockRange::ALL, LockKind::Write, 1, wait, pending()).await }
            };
            assert_eq!(take(0, FILE, 1, Wait::No).await, Ok(LockAnswer::Done));
            assert_eq!(take(0, WHOLE, 2, Wait::No).await, Ok(LockAnswer::Done), "another owner, as a process with flock is");
            assert_eq!(take(1, WHOLE, 1, Wait::No).await.map(|a| matches!(a, LockAnswer::Conflict(_))), Ok(true));
            let records = tokio::spawn(take(1, FILE, 1, Wait::UnlessDeadlock));
            let whole = tokio::spawn(take(1, WHOLE, 1, Wait::Forever));
            nodes[0].unlock(FILE, 1, LockRange::ALL).await.unwrap();
            assert_eq!(records.await.unwrap(), Ok(LockAnswer::Done));
            assert!(
                !whole.is_finished() && nodes[0].holds(WHOLE, 2).is_some(),
                "to unlock in one space is to unlock in that only"
            );
            // A new epoch, in which both are asserted anew.
            group.down(NodeId(3));
            assert_eq!(take(0, FILE, 3, Wait::No).await.map(|a| matches!(a, LockAnswer::Conflict(_))), Ok(true));
            assert!(!whole.is_finished(), "a lock of one kind was asserted as the other");
            group.down(NodeId(1));
            assert_eq!(whole.await.unwrap(), Ok(LockAnswer::Done));
            assert!(nodes[1].holds(WHOLE, 1).is_some() && nodes[1].holds(FILE, 1).is_some());
            nodes[1].unlock(FILE, 1, LockRange::ALL).await.unwrap();
            assert!(nodes[1].holds(WHOLE, 1).is_some());
        });
    }
}

/// Two that wait for each other in a circle: refused where that is asked for, and left alone where it is not, as `flock` does.
#[test]
fn only_who_asks_for_it_is_told_of_a_deadlock() {
    for (wait, told) in [(Wait::UnlessDeadlock, true), (Wait::Forever, false)] {
        run(1, |_, nodes| async move {
            let take = |n: usize, owner, start, wait| {
                let locks = nodes[n].clone();
                async move { locks.lock(FILE, owner, bytes(start, start), LockKind::Write, 1, wait, pending()).await }
            };
            assert_eq!(take(0, 1, 0, Wait::No).await, Ok(LockAnswer::Done));
            assert_eq!(take(1, 2, 1, Wait::No).await, Ok(LockAnswer::Done));
            let waits = [tokio::spawn(take(0, 1, 1, wait)), tokio::spawn(take(1, 2, 0, wait))];
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert_eq!(waits.iter().any(tokio::task::JoinHandle::is_finished), told, "{wait:?}");
            waits.iter().for_each(tokio::task::JoinHandle::abort);
        });
    }
}
