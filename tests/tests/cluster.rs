//! The promises of Pulsar on real daemons, real mounts and real programs. They need root, /dev/fuse, git and sqlite3, and
//! are run by `ci` (or `cargo test --release -p pulsar-tests --test cluster -- --ignored --test-threads 1`).

use nix::libc;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tests::cluster::{Options, RealCluster, clock, sh, within};
use tests::driver::mount::MountDriver;
use tests::driver::{Stale, check_seed, compare};
use tests::generate::Profile;
use tests::op::{errno, hash, pattern};

const LONG: Duration = Duration::from_secs(120);

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// A tree of some hundred files of all sizes, made outside of the cluster.
fn make_tree(root: &Path) {
    for dir in 0..12u32 {
        let dir_path = root.join(format!("d{dir}/sub"));
        fs::create_dir_all(&dir_path).expect("a directory");
        for file in 0..25u32 {
            let len = [0, 1, 700, 4096, 5000, 30_000, 200_000][((dir + file) % 7) as usize];
            fs::write(dir_path.join(format!("f{file}")), pattern(dir * 100 + file, 0, len)).expect("a file");
        }
        std::os::unix::fs::symlink("sub/f1", root.join(format!("d{dir}/link"))).expect("a link");
    }
}

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).expect("the file can be made");
    file.write_all(bytes).expect("the file can be written");
    file.sync_all().expect("the file can be synced");
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn trees_repositories_and_databases_are_the_same_on_every_node() {
    let cluster = RealCluster::up(&Options::default());
    let scratch = tempfile::tempdir().expect("a directory");
    make_tree(scratch.path());
    let source = scratch.path().display();

    // A copied tree is there at once on the others.
    let (n1, n2, n3) = (cluster.mount(1), cluster.mount(2), cluster.mount(3));
    sh(&n1, &format!("cp -r {source} tree"));
    sh(&n2, &format!("diff -r {source} tree"));
    sh(&n3, &format!("diff -r {source} tree"));

    // A repository made on one node, checked on another, committed to on the third.
    sh(&n1, "mkdir origin; cd origin; git init -q -b main; cp -r ../tree/* .; git add -A; git commit -q -m one");
    sh(&n1, "git clone -q --no-hardlinks origin clone");
    sh(&n2, "cd clone; git fsck --full --strict; test -z \"$(git status --porcelain)\"");
    sh(&n3, "cd clone; echo more >>d0/sub/f1; git commit -q -a -m two");
    assert_eq!(sh(&n1, "cd clone; git log --format=%s; git status --porcelain").trim(), "two\none");

    // A database, in turn.
    sh(&n1, "sqlite3 base.db 'create table t(n integer primary key, what text)' 'insert into t(what) values(\"n1\")'");
    for (turn, node) in [2, 3, 1, 2, 3].into_iter().enumerate() {
        let dir = cluster.mount(node);
        let insert = format!(
            "with recursive c(n) as (select 1 union all select n+1 from c where n<200) insert into t(what) select '{turn}-'||n from c"
        );
        sh(&dir, &format!("sqlite3 base.db \"{insert}\""));
        assert_eq!(sh(&dir, "sqlite3 base.db 'pragma integrity_check'").trim(), "ok");
    }
    assert_eq!(sh(&n1, "sqlite3 base.db 'select count(*) from t'").trim(), "1001");

    // Building in parallel with searching.
    let program = "int main(void) { return 0; }";
    sh(&n2, &format!("mkdir build; cd build; for i in 1 2 3 4 5 6 7 8; do echo '{program}' >p$i.c; done"));
    let searching = n3.clone();
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let searcher = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            sh(&searching, "find . -type f >/dev/null; grep -r main build >/dev/null || true");
        }
    });
    sh(&n2, "cd build; for i in 1 2 3 4 5 6 7 8; do cc -o p$i p$i.c; ./p$i; done");
    done.store(true, Ordering::Relaxed);
    searcher.join().expect("searching goes on without an error");

    cluster.fsck(1);
    cluster.stop(&[1, 2, 3]);
    cluster.fsck_stopped();
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn mounts_behave_as_the_oracle_says() {
    let cluster = RealCluster::up(&Options::default());
    let mounts = cluster.mounts();
    let count = AtomicU64::new(0);
    let fresh = move |mounts: &[PathBuf]| -> Vec<PathBuf> {
        let name = format!("o{}", count.fetch_add(1, Ordering::Relaxed));
        fs::create_dir(mounts[0].join(&name)).expect("a directory");
        mounts.iter().map(|m| m.join(&name)).collect()
    };
    let problems: Vec<String> = within(Duration::from_secs(400), "comparing with the oracle", {
        let mounts = mounts.clone();
        move || {
            let mut problems = Vec::new();
            for (seed, nodes) in [(1, 1), (2, 3), (3, 3), (4, 2), (5, 3)] {
                let profile = Profile { nodes, ..Profile::default() };
                let used = &mounts[..nodes];
                let result =
                    check_seed(seed, profile, 250, |steps| block_on(compare(&mut MountDriver::new(fresh(used)), nodes, steps)));
                problems.extend(result.err());
            }
            // The comparison must be able to fail: a mount that returns stale bytes is found.
            let profile = Profile { nodes: 2, data_percent: 80, ..Profile::default() };
            let caught = (10..16).any(|seed| {
                let steps = tests::generate::Generator::sequence(seed, profile, 200);
                block_on(compare(&mut Stale::new(MountDriver::new(fresh(&mounts[..2])), 3), 2, &steps)).is_err()
            });
            if !caught {
                problems.push("planted stale reads were not found".into());
            }
            problems
        }
    });
    assert!(problems.is_empty(), "{}\n{}", problems.join("\n"), cluster.logs());
    cluster.fsck(2);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_was_synced_survives_the_death_of_all_daemons() {
    let cluster = RealCluster::up(&Options::default());
    let bytes = pattern(42, 0, 20 << 20);
    write_synced(&cluster.mount(1).join("big"), &bytes);
    sh(&cluster.mount(2), "mkdir dir; echo small >dir/small; sync dir/small dir");
    cluster.kill(&[1, 2, 3]);
    cluster.start(&[1, 2, 3]);
    cluster.wait_healthy();
    for node in 1..=3 {
        let path = cluster.mount(node).join("big");
        let read = within(LONG, "reading after the crash", move || fs::read(path).expect("the file is there"));
        assert_eq!(hash(&read), hash(&bytes), "n{node} reads other bytes");
        assert_eq!(sh(&cluster.mount(node), "cat dir/small").trim(), "small");
    }
    cluster.fsck(3);
    cluster.stop(&[1, 2, 3]);
    cluster.fsck_stopped();
}

/// Longest pause between two successes of a load, and how many there were.
struct Load {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(u64, Duration)>,
}

impl Load {
    fn start(mut step: impl FnMut(u64) + Send + 'static) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut done, mut longest, mut last) = (0, Duration::ZERO, clock());
            while !flag.load(Ordering::Relaxed) {
                step(done);
                done += 1;
                let now = clock();
                longest = longest.max(now.saturating_sub(last));
                last = now;
            }
            (done, longest)
        });
        Load { stop, thread }
    }

    fn finish(self, what: &str) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let what = format!("{what} under load");
        within(Duration::from_secs(30), &what.clone(), move || self.thread.join()).unwrap_or_else(|_| panic!("{what} failed"))
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn the_others_go_on_when_a_node_is_killed() {
    let cluster = RealCluster::up(&Options::default());
    cluster.wait_healthy();
    let dir = cluster.mount(1);
    for i in 0..20u32 {
        write_synced(&dir.join(format!("old{i}")), &pattern(i, 0, 50_000));
    }
    let acknowledged = Arc::new(AtomicU64::new(0));
    let count = acknowledged.clone();
    let writer = Load::start(move |i| {
        write_synced(&dir.join(format!("new{i}")), &pattern(i as u32, 0, 8000));
        count.store(i + 1, Ordering::Relaxed);
    });
    let dir = cluster.mount(3);
    let reader = Load::start(move |i| {
        let i = (i % 20) as u32;
        let bytes = fs::read(dir.join(format!("old{i}"))).expect("the file can be read");
        assert_eq!(bytes, pattern(i, 0, 50_000));
        std::thread::sleep(Duration::from_millis(2));
    });
    std::thread::sleep(Duration::from_secs(2));
    cluster.kill(&[2]);
    cluster.wait_status(1, "n2 is down, and the data not safe against another loss", Duration::from_secs(10), |s| {
        s["nodes"].as_array().is_some_and(|n| n.iter().any(|n| n["name"] == "n2" && n["up"] == false))
            && s["can_lose_node"]["level"] != "ok"
            && s["writes_accepted"]["level"] == "ok"
    });
    std::thread::sleep(Duration::from_secs(3));
    let (writes, longest_write) = writer.finish("writing");
    let (reads, longest_read) = reader.finish("reading");
    eprintln!("{writes} writes, longest pause {longest_write:?}; {reads} reads, longest pause {longest_read:?}");
    let limit = Duration::from_secs(5);
    assert!(longest_write < limit && longest_read < limit, "stalled: {longest_write:?}, {longest_read:?}\n{}", cluster.logs());
    assert!(writes > 20 && reads > 20);
    cluster.start(&[2]);
    cluster.wait_healthy();
    let (dir, n) = (cluster.mount(2), acknowledged.load(Ordering::Relaxed));
    within(LONG, "reading on the node that came back", move || {
        for i in 0..n {
            let bytes = fs::read(dir.join(format!("new{i}"))).expect("an acknowledged file is there");
            assert_eq!(bytes, pattern(i as u32, 0, 8000), "file {i}");
        }
    });
    cluster.fsck(2);
    cluster.stop(&[1, 2, 3]);
    cluster.fsck_stopped();
}

/// Places of a block's contents on a disk image.
fn find_block(image: &Path, block: &[u8]) -> Vec<u64> {
    let mut file = File::open(image).expect("the disk's file");
    let len = file.metadata().expect("the disk's file").len();
    let (mut found, mut at) = (Vec::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    while at < len {
        // Sparse files: skip what was never written.
        let Ok(data) = nix::unistd::lseek(&file, at as i64, nix::unistd::Whence::SeekData) else { break };
        at = data as u64 / 4096 * 4096;
        file.seek(SeekFrom::Start(at)).expect("a seek");
        let n = file.read(&mut buffer).expect("a read");
        for (i, part) in buffer[..n].chunks(4096).enumerate() {
            if part == block {
                found.push(at + i as u64 * 4096);
            }
        }
        at += n.max(1) as u64;
    }
    found
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_damaged_copy_is_read_around_and_repaired() {
    let cluster = RealCluster::up(&Options::default());
    let bytes = pattern(7, 0, 1 << 20);
    write_synced(&cluster.mount(1).join("precious"), &bytes);
    // Once down and up, so that the file is older than what a copy that comes back is given anew.
    cluster.stop(&[1, 2, 3]);
    cluster.start(&[1, 2, 3]);
    cluster.wait_healthy();
    cluster.stop(&[1, 2, 3]);
    let block = &bytes[40 * 4096..41 * 4096];
    let places: BTreeMap<usize, Vec<u64>> = (1..=3).map(|n| (n, find_block(&cluster.disk(n), block))).collect();
    let holders: Vec<usize> = places.iter().filter(|(_, p)| !p.is_empty()).map(|(n, _)| *n).collect();
    assert_eq!(holders.len(), 2, "the block is on two disks: {places:?}");
    let damage = |node: usize| {
        let disk = OpenOptions::new().write(true).open(cluster.disk(node)).expect("the disk's file");
        for place in &places[&node] {
            disk.write_all_at(&[0x55; 512], place + 1024).expect("the damage");
        }
        disk.sync_all().expect("the damage");
    };
    // Either copy, in turn; every node reads, so the holder of the damaged copy does, too.
    for victim in &holders {
        damage(*victim);
        cluster.start(&[1, 2, 3]);
        cluster.wait_healthy();
        for node in 1..=3 {
            let path = cluster.mount(node).join("precious");
            let read = within(LONG, "reading a damaged file", move || fs::read(path).expect("the file can be read"));
            assert_eq!(hash(&read), hash(&bytes), "n{node} reads damaged bytes");
        }
        let events: Vec<String> =
            (1..=3).map(|n| cluster.pulsar(n, &["events"]).expect("pulsar events runs").text.to_lowercase()).collect();
        let repairs: Vec<&str> = events.iter().flat_map(|e| e.lines()).filter(|l| l.contains("repair")).collect();
        assert!(!repairs.is_empty(), "no event tells of the repair:\n{}", events.join("\n"));
        cluster.stop(&[1, 2, 3]);
        let repaired = find_block(&cluster.disk(*victim), block);
        assert!(!repaired.is_empty(), "the copy on n{victim} was not repaired");
    }
    // The check itself must be able to fail: with both copies damaged the read is an error, and no other bytes.
    holders.iter().for_each(|n| damage(*n));
    cluster.start(&[1, 2, 3]);
    let path = cluster.mount(1).join("precious");
    let read = within(LONG, "reading a file without a good copy", move || fs::read(path));
    match read {
        Err(error) => assert_eq!(error.raw_os_error(), Some(errno::EIO)),
        Ok(read) => assert_eq!(hash(&read), hash(&bytes), "damage on both copies was read as if it were data"),
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn records_appended_from_two_nodes_are_all_there() {
    const SECONDS: u64 = 4;
    let cluster = RealCluster::up(&Options::default());
    File::create(cluster.mount(1).join("log")).expect("the file can be made");
    let writers: Vec<_> = [1, 3]
        .into_iter()
        .map(|node| {
            let path = cluster.mount(node).join("log");
            std::thread::spawn(move || {
                let mut file = OpenOptions::new().append(true).open(path).expect("the file can be opened");
                let (mut n, end) = (0u64, clock() + Duration::from_secs(SECONDS));
                while clock() < end {
                    let record = format!("<{node}:{n}:{}>\n", "x".repeat((n % 300) as usize));
                    file.write_all(record.as_bytes()).expect("a record can be appended");
                    n += 1;
                }
                n
            })
        })
        .collect();
    let counts: Vec<u64> = writers.into_iter().map(|w| w.join().expect("appending goes on")).collect();
    let text = sh(&cluster.mount(2), "cat log");
    let mut next = BTreeMap::from([(1u64, 0u64), (3, 0)]);
    for line in text.lines() {
        let fields: Vec<&str> =
            line.strip_prefix('<').and_then(|l| l.strip_suffix('>')).expect("a whole record").split(':').collect();
        let (node, n): (u64, u64) = (fields[0].parse().expect("a number"), fields[1].parse().expect("a number"));
        assert_eq!(fields[2].len() as u64, n % 300, "torn: {line}");
        let expected = next.get_mut(&node).expect("a writer");
        assert_eq!(n, *expected, "record lost, doubled or out of order");
        *expected += 1;
    }
    assert_eq!(next.into_values().collect::<Vec<_>>(), counts);
    eprintln!("{counts:?} records");
    assert!(counts.iter().all(|c| *c > 50), "appending starves: {counts:?}");
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_full_file_system_says_so_and_recovers() {
    let cluster = RealCluster::up(&Options { disk_size: "256M", ..Options::default() });
    sh(&cluster.mount(3), "mkdir keep; echo safe >keep/file");
    let dir = cluster.mount(1);
    let written = within(Duration::from_secs(240), "filling the file system", move || {
        let mut written = 0u64;
        let chunk = pattern(1, 0, 1 << 20);
        for i in 0.. {
            let result = (|| {
                let mut file = File::create(dir.join(format!("fill{i}")))?;
                for _ in 0..8 {
                    file.write_all(&chunk)?;
                    written += chunk.len() as u64;
                }
                file.sync_all()
            })();
            if let Err(error) = result {
                assert_eq!(error.raw_os_error(), Some(errno::ENOSPC), "{error}");
                break;
            }
        }
        written
    });
    assert!(written > 100 << 20, "full after {written} bytes");
    assert_eq!(sh(&cluster.mount(2), "cat keep/file").trim(), "safe");
    sh(&cluster.mount(2), "rm fill*");
    // The space of removed files comes back within seconds.
    let dir = cluster.mount(3);
    within(LONG, "writing again", move || {
        let end = clock() + Duration::from_secs(60);
        let chunk = pattern(2, 0, 64 << 20);
        loop {
            let result = File::create(dir.join("again")).and_then(|mut f| f.write_all(&chunk).and_then(|()| f.sync_all()));
            match result {
                Ok(()) => break,
                Err(error) if error.raw_os_error() == Some(errno::ENOSPC) && clock() < end => {
                    std::thread::sleep(Duration::from_millis(300));
                }
                Err(error) => panic!("the space did not come back: {error}"),
            }
        }
        assert_eq!(hash(&fs::read(dir.join("again")).expect("the file is there")), hash(&chunk));
    });
    cluster.fsck(1);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn status_tells_the_truth_in_every_state() {
    let cluster = RealCluster::up(&Options::default());
    cluster.wait_healthy();
    let status = cluster.status(1).expect("a status");
    assert_eq!(status["schema_version"], 1);
    assert_eq!(status["can_lose_node"]["level"], "ok", "{status:#}");
    assert!(status["problems"].as_array().is_some_and(Vec::is_empty), "{status:#}");

    cluster.stop(&[3]);
    let ten = Duration::from_secs(15);
    cluster.wait_status(1, "a node is away", ten, |s| {
        s["can_lose_node"]["level"] != "ok"
            && s["writes_accepted"]["level"] == "ok"
            && s["problems"].as_array().is_some_and(|p| !p.is_empty())
            && s["mirrors"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|m| m["copies"].as_array().into_iter().flatten().any(|c| c["state"] != "in_sync"))
    });
    sh(&cluster.mount(1), "echo one >written-while-away; sync written-while-away");
    cluster.start(&[3]);
    cluster.wait_healthy();
    assert_eq!(sh(&cluster.mount(3), "cat written-while-away").trim(), "one");

    // Without a majority nothing is claimed, and nothing is written.
    cluster.kill(&[2, 3]);
    cluster.wait_status(1, "this node is cut off", ten, |s| s["current"] == false && s["writes_accepted"]["level"] != "ok");
    let path = cluster.mount(1).join("late");
    let late = std::thread::spawn(move || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path)?;
        file.write_all(b"late")?;
        file.sync_all()
    });
    std::thread::sleep(Duration::from_secs(1));
    assert!(!late.is_finished(), "a node without a majority acknowledged a synced write");
    cluster.start(&[2, 3]);
    cluster.wait_healthy();
    // It goes on without a new mount; EIO is allowed, once, if it was declared dead with the data not yet on the disks.
    let result = within(LONG, "writing after the return of the majority", move || late.join().expect("no panic"));
    match result {
        Ok(()) => assert_eq!(sh(&cluster.mount(2), "cat late"), "late"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(errno::EIO), "{error}"),
    }
    cluster.fsck(1);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_frozen_node_serves_nothing_stale() {
    let cluster = RealCluster::up(&Options::default());
    cluster.wait_healthy();
    write_synced(&cluster.mount(1).join("file"), b"old");
    assert_eq!(sh(&cluster.mount(2), "cat file"), "old");
    cluster.verb("pause", &[2]);
    let path = cluster.mount(1).join("file");
    let begun = clock();
    within(Duration::from_secs(20), "writing while another node is frozen", move || write_synced(&path, b"new contents"));
    let took = clock().saturating_sub(begun);
    eprintln!("the write went on after {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    cluster.verb("resume", &[2]);
    let path = cluster.mount(2).join("file");
    let read = within(LONG, "reading on the node that thawed", move || fs::read(path).expect("the file can be read"));
    assert_eq!(read, b"new contents");
    cluster.wait_healthy();
    // `O_SYNC` from the thawed node works again, too.
    let path = cluster.mount(2).join("file");
    within(LONG, "writing on the node that thawed", move || {
        let file = OpenOptions::new().write(true).custom_flags(libc::O_SYNC).open(path).expect("it can be opened");
        file.write_all_at(b"back", 0).expect("it can be written");
    });
    assert_eq!(sh(&cluster.mount(3), "cat file"), "backcontents");
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_cut_off_node_suspends_and_comes_back() {
    let cluster = RealCluster::up(&Options { netns: true, ..Options::default() });
    cluster.wait_healthy();
    write_synced(&cluster.mount(1).join("file"), b"old");
    assert_eq!(sh(&cluster.mount(2), "cat file"), "old");
    // Written on the node that is about to be cut off, and not yet on the disks.
    let mut lossy = File::create(cluster.mount(2).join("lossy")).expect("the file can be made");
    lossy.write_all(b"perhaps").expect("the file can be written");
    cluster.verb("cut", &[2]);
    let path = cluster.mount(1).join("file");
    let begun = clock();
    within(Duration::from_secs(20), "writing while a node is cut off", move || write_synced(&path, b"new contents"));
    let took = clock().saturating_sub(begun);
    eprintln!("the write went on after {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    cluster.wait_status(2, "it is cut off", Duration::from_secs(15), |s| s["current"] == false);
    // It must not answer with what is no longer true: it waits.
    let path = cluster.mount(2).join("file");
    let reader = std::thread::spawn(move || fs::read(path));
    std::thread::sleep(Duration::from_secs(1));
    assert!(!reader.is_finished(), "a node that is cut off answered a read: {:?}", reader.join());
    cluster.verb("heal", &[2]);
    let read = within(LONG, "reading once the node is back", move || reader.join().expect("no panic"));
    assert_eq!(read.expect("the read goes on without an error"), b"new contents");
    // What was lost is reported; what is not reported is there.
    let synced = within(LONG, "syncing once the node is back", move || lossy.sync_all());
    match synced {
        Ok(()) => assert_eq!(sh(&cluster.mount(3), "cat lossy"), "perhaps"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(errno::EIO), "{error}"),
    }
    cluster.wait_healthy();
    sh(&cluster.mount(2), "echo more >again; sync again");
    assert_eq!(sh(&cluster.mount(1), "cat again").trim(), "more");
    cluster.fsck(3);
}
