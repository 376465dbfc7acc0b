//! Figures of this layer by itself: two nodes in one process, a file each as disk, messages handed over in memory.
//!
//! `cargo run --release -p pulsar-mirror --example bench -- DIRECTORY [SECONDS]`

use bytes::Bytes;
use cluster::sim::{FixedGroup, NetOptions, SimNet, test_config};
use cluster::{BLOCK_SIZE, BlockNo, Layer, MirrorId, NodeId};
use mirror::{BlockDevice, BlockWrite, FileDevice, Kind, Mirror, MirrorOptions, Mirrors, Tag, WriteGroup, format_disk};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const M: MirrorId = MirrorId(1);
const BLOCKS: u32 = 4 * 16_384;

fn group(first: u32, count: u32, fresh_data: bool) -> WriteGroup {
    let data = Bytes::from(vec![first as u8; BLOCK_SIZE]);
    let tag = Tag { kind: Kind::Data, owner: 1, offset: 0, birth: 1 };
    let write = |i| BlockWrite { block: BlockNo::new(M, (first + i) % BLOCKS), tag, data: Some(data.clone()) };
    WriteGroup { writes: (0..count).map(write).collect(), fresh_data }
}

async fn measure<F>(name: &str, seconds: u64, jobs: u64, bytes: u64, work: impl Fn(u64) -> F + Clone + Send + 'static)
where
    F: Future<Output = ()> + Send,
{
    let done = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..jobs)
        .map(|j| {
            let (work, done) = (work.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                for i in 0.. {
                    work(i * jobs + j).await;
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let n = done.load(Ordering::Relaxed);
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    let per_second = n / seconds;
    println!("{name:32} {per_second:>8}/s {:>8.1} MB/s", (per_second * bytes) as f64 / 1e6);
    tokio::time::sleep(Duration::from_millis(500)).await;
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = std::path::PathBuf::from(args.next().ok_or("usage: bench DIRECTORY [SECONDS]")?);
    let seconds = args.next().and_then(|s| s.parse().ok()).unwrap_or(3);
    let options = NetOptions { delay_us: 0..1, slow_percent: 0, break_one_in: 0, ..NetOptions::default() };
    let net = SimNet::with_options(1, options);
    let group_ = FixedGroup::new(&net, test_config(2, 2, BLOCKS));
    group_.set_auto(&[Layer::Sld, Layer::Fs]);
    let clusters: Vec<_> = (1..=2).map(|n| group_.node(NodeId(n))).collect();
    let mut nodes = Vec::new();
    for (n, cluster) in (1..).zip(clusters) {
        let path = dir.join(format!("mirror-bench-{n}"));
        let _ = std::fs::remove_file(&path);
        let device = FileDevice::create(&path, 2 << 30)?;
        if n == 1 {
            println!("direct I/O: {}", device.is_direct());
        }
        format_disk(&device, [7; 16], [n as u8; 16]).await?;
        let device: Arc<dyn BlockDevice> = Arc::new(device);
        nodes.push(Mirror::start(cluster, vec![(cluster::DiskId(n), device)], MirrorOptions::default()).await?);
    }
    let mirrors: Arc<dyn Mirrors> = nodes[0].mirrors();
    let write = |count: u32, fresh: bool, random: bool| {
        let mirrors = Arc::clone(&mirrors);
        move |i: u64| {
            let at = if random { (i.wrapping_mul(2_654_435_761) % u64::from(BLOCKS)) as u32 } else { (i as u32) * count };
            let done = mirrors.submit(M, group(at % BLOCKS, count, fresh));
            async move { assert!(done.await.is_ok()) }
        }
    };
    measure("1 MiB fresh, 4 at a time", seconds, 4, 1 << 20, write(256, true, false)).await;
    measure("1 MiB over old, 4 at a time", seconds, 4, 1 << 20, write(256, false, false)).await;
    measure("4 KiB random, 1 at a time", seconds, 1, 4096, write(1, false, true)).await;
    measure("4 KiB random, 32 at a time", seconds, 32, 4096, write(1, false, true)).await;
    let read = |count: u32| {
        let mirrors = Arc::clone(&mirrors);
        move |i: u64| {
            let first = (i.wrapping_mul(2_654_435_761) % u64::from(BLOCKS - count)) as u32;
            let done = mirrors.read((first..first + count).map(|i| BlockNo::new(M, i)).collect());
            async move { assert!(done.await.is_ok()) }
        }
    };
    measure("read 4 KiB, 1 at a time", seconds, 1, 4096, read(1)).await;
    measure("read 4 KiB, 16 at a time", seconds, 16, 4096, read(1)).await;
    measure("read 1 MiB, 4 at a time", seconds, 4, 1 << 20, read(256)).await;
    for node in nodes {
        node.shutdown().await;
    }
    for n in 1..=2 {
        std::fs::remove_file(dir.join(format!("mirror-bench-{n}")))?;
    }
    Ok(())
}
