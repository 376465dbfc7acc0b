//! One disk by itself: the log, going round and round, with power failures at any moment.

use super::*;
use crate::format::{OpenError, block_checksum};
use crate::log::RecordKind;
use crate::message::{Slot, WriteHead, WriteMode, Writer};
use crate::reader::{DiskReader, OfflineBlock};
use crate::replica::Incoming;
use crate::shell::disk::{Disk, Got, Outcome};
use crate::shell::open::{Expected, open_core};
use crate::shell::tasks::Tasks;
use cluster::{Epoch, Incarnation};
use parking_lot::Mutex;

const CLUSTER: [u8; 16] = [7; 16];

async fn open(device: &SimDisk) -> (Arc<Disk>, Tasks) {
    let tasks = Tasks::default();
    let disk = Disk::open(Arc::new(device.clone()), Expected::default(), 64, Box::new(|_| {}), &tasks).await.unwrap();
    (disk, tasks)
}

async fn new_disk(seed: u64) -> SimDisk {
    let device = SimDisk::new(DISK, seed);
    format_disk(&device, CLUSTER, [1; 16]).await.unwrap();
    device
}

fn incoming(wseq: u64, completed_upto: u64, fresh: bool, writes: &[(u32, u64)]) -> Incoming {
    let version = Version(1 << 40 | wseq);
    let mut slots = Vec::new();
    let mut data = Vec::new();
    for (index, v) in writes {
        let w = if *v == 0 { free(*index) } else { write(*index, *v) };
        let checksum = block_checksum(M, *index, version, &w.tag, w.data.as_deref());
        slots.push(Slot { index: *index, tag: w.tag, version, has_data: w.data.is_some(), checksum });
        data.push(w.data);
    }
    let writer = Writer { node: NodeId(1), incarnation: Incarnation(1) };
    let (mode, clock) = (WriteMode::Normal, wseq);
    let head = WriteHead { mirror: M, mode, writer, wseq, completed_upto, clock, fresh_data: fresh, slots };
    Incoming { kind: RecordKind::Write, head, data, base: 100, epoch: Epoch(1), syncing_from: None }
}

async fn contents(disk: &Disk, blocks: u32) -> BTreeMap<u32, u64> {
    let addrs: Vec<u32> = (0..blocks).map(|i| 100 + i).collect();
    let mut out = BTreeMap::new();
    for (i, got) in disk.read(&addrs).await.unwrap().into_iter().enumerate() {
        let Got::Block(entry, data) = got else { panic!("block {i} is damaged") };
        if entry.version != Version(0) {
            let sum = block_checksum(M, i as u32, entry.version, &entry.tag, data.as_deref());
            assert_eq!(sum, entry.checksum, "block {i}");
        }
        out.insert(i as u32, data.map_or(0, |d| value(&d)));
    }
    out
}

/// Writes until the power fails; then what is there is a prefix with everything acknowledged. Several lives.
async fn lives(seed: u64, blocks: u32, lives: u32) -> u64 {
    let device = new_disk(seed).await;
    let mut rng = Rng::new(seed);
    let mut base: BTreeMap<u32, u64> = (0..blocks).map(|i| (i, 0)).collect();
    let (mut wseq, mut next) = (0u64, 1u64);
    let mut logged = 0;
    for _ in 0..lives {
        let (disk, tasks) = open(&device).await;
        assert_eq!(contents(&disk, blocks).await, base);
        let acked: Arc<Mutex<u64>> = Arc::new(Mutex::new(wseq));
        let mut sent: Vec<(u64, Vec<(u32, u64)>)> = Vec::new();
        // Some writers never say what is complete: then records must be carried on.
        let says = rng.percent(70);
        for _ in 0..rng.range(5..60) {
            for _ in 0..rng.range(1..6) {
                wseq += 1;
                let count = if rng.percent(10) { 120 } else { rng.range(1..9) };
                let mut writes = BTreeMap::new();
                for _ in 0..count {
                    next += 1;
                    let v = if rng.percent(20) { 0 } else { next };
                    writes.insert(rng.below(u64::from(blocks)) as u32, v);
                }
                let writes: Vec<_> = writes.into_iter().collect();
                let upto = if says { acked.lock().saturating_sub(rng.below(3)) } else { 0 };
                logged += writes.len() as u64;
                let incoming = incoming(wseq, upto, rng.percent(40), &writes);
                sent.push((wseq, writes));
                let (acked, number) = (Arc::clone(&acked), wseq);
                let done = Box::new(move |outcome| {
                    if outcome == Outcome::Written {
                        let mut acked = acked.lock();
                        assert_eq!(*acked + 1, number, "answers come in order");
                        *acked = number;
                    }
                });
                assert!(disk.write(incoming, done).is_ok());
            }
            tokio::time::sleep(Duration::from_millis(rng.below(12))).await;
            if rng.percent(5) {
                disk.checkpoint_once().await.unwrap();
            }
            disk.with(|c| c.check_invariants());
        }
        if rng.percent(20) {
            disk.close().await;
            assert_eq!(*acked.lock(), wseq);
        }
        if rng.percent(60) {
            // The power fails while everything is being written home.
            let disk = Arc::clone(&disk);
            let homeward = tokio::spawn(async move { drop(disk.checkpoint_once().await) });
            tokio::time::sleep(Duration::from_millis(rng.below(12))).await;
            homeward.abort();
        }
        drop(tasks);
        drop(disk);
        device.crash(rng.next_u64());
        let acked = *acked.lock();
        let (disk, tasks) = open(&device).await;
        let found = contents(&disk, blocks).await;
        let mut fits = sent.first().is_none_or(|(first, _)| acked < *first) && found == base;
        let mut state = base.clone();
        for (number, writes) in &sent {
            state.extend(writes.iter().copied());
            fits |= *number >= acked && state == found;
        }
        assert!(fits, "seed {seed}: not a prefix with all up to {acked} of {wseq}");
        // The same without a daemon.
        let mut reader = DiskReader::open(Arc::new(device.clone()), Some(CLUSTER)).await.unwrap();
        let tags = reader.tags(100, 0, blocks).await.unwrap();
        for (index, v) in &found {
            let OfflineBlock::Good { data, tag, version } = reader.read(M, 100, *index).await.unwrap() else {
                panic!("block {index} is damaged")
            };
            assert_eq!(value(&data), *v);
            assert_eq!(tags[*index as usize], Some((tag, version)));
        }
        base = found;
        drop(tasks);
        drop(disk);
        // A power failure while the log is being replayed or written home changes nothing.
        device.crash(rng.next_u64());
    }
    logged
}

#[tokio::test(start_paused = true)]
async fn power_failures_leave_a_prefix_with_everything_acknowledged() {
    let mut blocks = 0;
    for seed in 0..12 {
        blocks += lives(seed, 300, 5).await;
    }
    // Each log has 4096 blocks.
    assert!(blocks > 12 * 4096, "the logs did not go round: {blocks}");
}

/// Writes one batch after another, each flushed.
async fn written(device: &SimDisk, groups: u64) {
    let (disk, _tasks) = open(device).await;
    for wseq in 1..=groups {
        assert_eq!(disk.write_wait(incoming(wseq, wseq - 1, false, &[(wseq as u32, wseq)])).await, Outcome::Written);
    }
    device.process_died();
}

#[tokio::test(start_paused = true)]
async fn a_torn_end_is_cut_off_but_damage_before_it_is_reported() {
    let device = new_disk(5).await;
    written(&device, 6).await;
    // Records of two blocks each: the last one's payload, then its head, is torn.
    let log = 8;
    for torn in [11, 10] {
        let copy = device.fork();
        copy.flip_bit(log + torn, 9);
        let (disk, _tasks) = open(&copy).await;
        let found = contents(&disk, 8).await;
        assert_eq!((found[&5], found[&6]), (5, 0));
        // New records go over the torn one, and the rest of it does not come back.
        assert_eq!(disk.write_wait(incoming(7, 5, false, &[(7, 7)])).await, Outcome::Written);
        copy.process_died();
        let (disk, _tasks) = open(&copy).await;
        let found = contents(&disk, 8).await;
        assert_eq!((found[&5], found[&6], found[&7]), (5, 0, 7));
    }
    for bad in [2, 3, 6, 9] {
        let copy = device.fork();
        copy.flip_bit(log + bad, 9);
        let opened = open_core(&copy, Expected::default(), 64).await;
        assert!(matches!(opened, Err(OpenError::LogDamaged { .. })), "block {bad} of the log");
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_an_old_log_does_not_come_back() {
    // Two records in one batch; the first is torn, the second whole. A new one of the same length takes the first's place.
    let device = new_disk(6).await;
    {
        let (disk, _tasks) = open(&device).await;
        for wseq in 1..=2 {
            assert!(disk.write(incoming(wseq, 0, false, &[(wseq as u32, wseq)]), Box::new(|_| {})).is_ok());
        }
        assert!(disk.barrier().await);
        device.process_died();
    }
    device.flip_bit(8, 100);
    let (disk, _tasks) = open(&device).await;
    assert_eq!(contents(&disk, 4).await[&2], 0);
    assert_eq!(disk.write_wait(incoming(3, 0, false, &[(3, 3)])).await, Outcome::Written);
    device.process_died();
    let (disk, _tasks) = open(&device).await;
    let found = contents(&disk, 4).await;
    assert_eq!((found[&1], found[&2], found[&3]), (0, 0, 3));
}

#[tokio::test(start_paused = true)]
async fn fresh_contents_are_not_overwritten_by_older_ones_on_their_way_home() {
    let device = new_disk(9).await;
    let (disk, _tasks) = open(&device).await;
    // Far apart, so that each is a write of its own, and the last ones wait for the first.
    let blocks: Vec<u32> = (0..120).map(|i| i * 2).collect();
    let writes: Vec<_> = blocks.iter().map(|b| (*b, 5)).collect();
    assert_eq!(disk.write_wait(incoming(1, 0, false, &writes)).await, Outcome::Written);
    let homeward = {
        let disk = Arc::clone(&disk);
        tokio::spawn(async move { disk.checkpoint_once().await })
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    let last: Vec<u32> = blocks[60..].to_vec();
    let freed: Vec<_> = last.iter().map(|b| (*b, 0)).collect();
    assert_eq!(disk.write_wait(incoming(2, 1, false, &freed)).await, Outcome::Written);
    let again: Vec<_> = last.iter().map(|b| (*b, 6)).collect();
    assert_eq!(disk.write_wait(incoming(3, 2, true, &again)).await, Outcome::Written);
    assert!(!homeward.is_finished(), "the test came too late");
    homeward.await.unwrap().unwrap();
    disk.checkpoint_once().await.unwrap();
    let found = contents(&disk, 240).await;
    assert!(last.iter().all(|b| found[b] == 6));
}

#[tokio::test(start_paused = true)]
async fn a_label_never_runs_ahead_of_what_it_stands_for() {
    // At every moment of a checkpoint the power fails, and of what was not flushed only one area survives.
    for (area, keep) in [("labels", 0..8), ("the log", 8..8 + 4096), ("the rest", 8 + 4096..DISK)] {
        for ms in 0..25 {
            let device = new_disk(10).await;
            let (disk, tasks) = open(&device).await;
            for wseq in 1..=12 {
                let writes: Vec<_> = (0..10).map(|i| ((wseq as u32 * 7 + i * 13) % 200, wseq * 100 + u64::from(i))).collect();
                assert_eq!(disk.write_wait(incoming(wseq, wseq, false, &writes)).await, Outcome::Written);
            }
            let before = contents(&disk, 200).await;
            let homeward = {
                let disk = Arc::clone(&disk);
                tokio::spawn(async move { disk.checkpoint_once().await })
            };
            tokio::time::sleep(Duration::from_millis(ms)).await;
            homeward.abort();
            drop((disk, tasks));
            device.crash_keeping(|_, block| keep.contains(&block));
            let (disk, _tasks) = open(&device).await;
            assert_eq!(contents(&disk, 200).await, before, "after {ms} ms, with {area} kept");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn labels_are_checked() {
    let check = |device: &SimDisk, expected| {
        let device = device.clone();
        async move { open_core(&device, expected, 64).await.map(|_| ()) }
    };
    let expected = |cluster, uuid| Expected { cluster: Some(cluster), uuid: Some(uuid) };
    let device = new_disk(7).await;
    assert!(check(&device, expected(CLUSTER, [1; 16])).await.is_ok());
    let other = check(&device, expected([8; 16], [1; 16])).await;
    assert!(matches!(other, Err(OpenError::OtherCluster { .. })));
    assert!(matches!(check(&device, expected(CLUSTER, [2; 16])).await, Err(OpenError::OtherDisk { .. })));
    assert!(matches!(check(&SimDisk::new(DISK, 1), Expected::default()).await, Err(OpenError::NotPulsar)));
    // The label's copies are written in turn: damage of the newer one brings back the older, whose log is still there.
    written(&device, 3).await;
    {
        let (disk, _tasks) = open(&device).await;
        disk.close().await;
        device.process_died();
    }
    device.flip_bit(0, 9999);
    let (disk, tasks) = open(&device).await;
    assert_eq!(contents(&disk, 4).await[&3], 3);
    drop((disk, tasks));
    device.flip_bit(1, 9999);
    assert!(matches!(check(&device, Expected::default()).await, Err(OpenError::LabelDamaged)));
}

#[tokio::test(start_paused = true)]
async fn groups_that_stay_uncertain_do_not_stop_the_log() {
    let device = new_disk(8).await;
    let (disk, _tasks) = open(&device).await;
    // One group is never completed; three logs full of others are.
    assert_eq!(disk.write_wait(incoming(1, 0, false, &[(1, 1)])).await, Outcome::Written);
    for wseq in 2..200u64 {
        let writes: Vec<_> = (10..80).map(|i| (i, wseq)).collect();
        let mut group = incoming(wseq, 0, false, &writes);
        group.head.writer.node = NodeId(2);
        group.head.completed_upto = wseq - 1;
        let done = tokio::time::timeout(Duration::from_secs(60), disk.write_wait(group)).await;
        assert_eq!(done, Ok(Outcome::Written), "the log is stuck");
    }
    device.process_died();
    let core = open_core(&device, Expected::default(), 64).await.unwrap();
    assert_eq!(core.uncertain_writers(M).len(), 2, "the uncertain group is still known");
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_closes_answers_all_that_it_has_accepted() {
    let device = new_disk(12).await;
    let (disk, _tasks) = open(&device).await;
    device.freeze();
    let answered = Arc::new(Mutex::new(Vec::new()));
    let submit = |wseq: u64| {
        let answered = Arc::clone(&answered);
        let done = Box::new(move |outcome| answered.lock().push((wseq, outcome)));
        disk.write(incoming(wseq, 0, false, &[(wseq as u32, wseq)]), done).is_ok()
    };
    assert!(submit(1));
    let closing = {
        let disk = Arc::clone(&disk);
        tokio::spawn(async move { disk.close().await })
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(!submit(2), "accepted by a disk that is being closed");
    device.thaw();
    tokio::time::timeout(Duration::from_secs(60), closing).await.unwrap().unwrap();
    assert_eq!(*answered.lock(), [(1, Outcome::Written)]);
}
