//! The file system alone, over a disk in memory, compared with the oracle.

use fs::{FileSystem, FormatParams, Time};
use sld::memory::MemoryDisk;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use tests::driver::node::NodeDriver;
use tests::driver::{Stale, block_on, check_seed, compare};
use tests::generate::{Generator, Profile};
use tests::op::Step;

async fn fresh() -> NodeDriver<MemoryDisk> {
    let disk = MemoryDisk::new(&[16_384 * 2, 16_384]);
    let params = FormatParams {
        uuid: [1; 16],
        hash_key: [2; 16],
        label: "test".into(),
        uid: 0,
        gid: 0,
        mode: 0o755,
        now: Time { seconds: 1, nanos: 0 },
    };
    FileSystem::format(&disk, &params).await.expect("it can be made");
    let ticks = AtomicI64::new(1);
    let clock: fs::Clock = Arc::new(move || Time { seconds: ticks.fetch_add(1, Ordering::Relaxed), nanos: 0 });
    let fs = FileSystem::mount(disk, clock).await.expect("it can be mounted");
    NodeDriver::new(vec![Some(Arc::new(fs))])
}

#[test]
fn the_file_system_agrees_with_the_oracle() {
    for seed in 0..40 {
        let run = |steps: &[Step]| block_on(async { compare(&mut fresh().await, 1, steps).await });
        if let Err(why) = check_seed(seed, Profile { limit: true, ..Profile::default() }, 300, run) {
            panic!("{why}");
        }
    }
}

#[test]
fn few_names_many_renames() {
    let profile = Profile { data_percent: 5, ..Profile::default() };
    for seed in 100..115 {
        let run = |steps: &[Step]| block_on(async { compare(&mut fresh().await, 1, steps).await });
        if let Err(why) = check_seed(seed, profile, 600, run) {
            panic!("{why}");
        }
    }
}

#[test]
fn a_planted_stale_read_is_found() {
    let profile = Profile { data_percent: 80, ..Profile::default() };
    let found = (0..10).any(|seed| {
        let steps = Generator::sequence(seed, profile, 200);
        block_on(async { compare(&mut Stale::new(fresh().await, 3), 1, &steps).await }).is_err()
    });
    assert!(found);
}
