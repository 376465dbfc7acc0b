//! Notices on the simulated network.

use cluster::sim::{FixedGroup, SimNet, test_config};
use cluster::{Layer, NodeId};
use parking_lot::Mutex;
use sld::{Notices, ObjectId};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

const OBJECT: ObjectId = ObjectId::Inode(1 << 32 | 7);

/// How often each node has heeded something, and what it needs for that.
#[derive(Clone)]
struct Heeded {
    counts: Arc<Mutex<BTreeMap<u32, u32>>>,
    may: Arc<Semaphore>,
}

fn start(group: &FixedGroup, node: u32, heeded: &Heeded) -> Arc<Notices> {
    let notices = Notices::start(group.node(NodeId(node)));
    let heeded = heeded.clone();
    notices.on_notice(Box::new(move |object| {
        assert_eq!(object, OBJECT);
        let heeded = heeded.clone();
        Some(Box::pin(async move {
            drop(heeded.may.acquire().await);
            *heeded.counts.lock().entry(node).or_default() += 1;
        }))
    }));
    notices
}

fn run<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(FixedGroup, Vec<Arc<Notices>>, Heeded) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let group = FixedGroup::new(&SimNet::new(seed), test_config(3, 2, 16_384));
        group.set_auto(&[Layer::Cluster, Layer::Mirror, Layer::Sld, Layer::Fs]);
        let heeded = Heeded { counts: Arc::default(), may: Arc::new(Semaphore::new(0)) };
        let nodes = (1..=3).map(|n| start(&group, n, &heeded)).collect();
        tokio::time::timeout(Duration::from_secs(600), test(group, nodes, heeded))
            .await
            .unwrap_or_else(|_| panic!("it hangs with seed {seed}"));
    });
}

#[test]
fn all_others_have_heeded_a_notice_when_it_is_over() {
    for seed in 0..20 {
        run(seed, |group, nodes, heeded| async move {
            let told = tokio::spawn({
                let first = nodes[0].clone();
                async move { first.tell(OBJECT).await }
            });
            tokio::time::sleep(Duration::from_secs(2)).await;
            assert!(!told.is_finished(), "nobody has heeded it");
            // Repeated, it is heeded once; and again if the answer was lost, or the sender's session.
            heeded.may.add_permits(1);
            if seed % 2 == 1 {
                group.net().break_session(NodeId(1), NodeId(2));
            }
            told.await.unwrap();
            let counts = heeded.counts.lock().clone();
            assert_eq!(counts.keys().copied().collect::<Vec<_>>(), [2, 3], "seed {seed}");
            assert!(
                seed % 2 == 1 || counts.values().all(|count| *count <= 2),
                "it was told some 20 times: seed {seed}: {counts:?}"
            );
        });
    }
}

#[test]
fn a_notice_waits_for_who_is_silent_until_that_node_is_declared_dead() {
    run(1, |group, nodes, heeded| async move {
        heeded.may.add_permits(1);
        group.net().cut(NodeId(1), NodeId(2));
        let told = tokio::spawn({
            let first = nodes[0].clone();
            async move { first.tell(OBJECT).await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!told.is_finished() && heeded.counts.lock().keys().eq([&3]));
        group.down(NodeId(2));
        told.await.unwrap();
    });
}

#[test]
fn who_is_alone_tells_nobody() {
    run(1, |group, nodes, heeded| async move {
        group.down(NodeId(2));
        group.down(NodeId(3));
        nodes[0].tell(OBJECT).await;
        assert!(heeded.counts.lock().is_empty());
        heeded.may.add_permits(1);
        nodes[0].heed(OBJECT).await;
        assert!(heeded.counts.lock().keys().eq([&1]));
    });
}
