//! The promises of Pulsar on real daemons, real mounts and real programs. They need root, /dev/fuse, git and sqlite3, and
//! are run by `ci` (or `cargo test --release -p pulsar-tests --test cluster -- --ignored --test-threads 1`).

use nix::libc;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tests::cluster::{Options, RealCluster, clock, sh, within};
use tests::op::{errno, hash, pattern};
use tests::sys::Mapping;

const LONG: Duration = Duration::from_secs(120);

/// A tree of thousands of files of all sizes and kinds, outside of the cluster: the C headers of this machine, and some
/// that are longer than any of those, or empty.
fn make_tree(root: &Path) {
    sh(root, "cp -r /usr/include .");
    for file in 0..24u32 {
        let len = [0, 1, 4096, 5000, 300_000, 2_000_000][(file % 6) as usize];
        let dir = root.join(format!("include/d{}/sub", file % 3));
        fs::create_dir_all(&dir).expect("a directory");
        fs::write(dir.join(format!("f{file}")), pattern(file, 0, len)).expect("a file");
        std::os::unix::fs::symlink("../sub", dir.join(format!("link{file}"))).expect("a link");
    }
    let files: usize = sh(root, "find . -type f | wc -l").trim().parse().expect("a number");
    assert!(files > 1000, "/usr/include has only {files} files: is libc6-dev there?");
}

/// Runs things side by side; fails if any does.
fn together(what: Vec<(PathBuf, String)>) {
    let threads: Vec<_> = what.into_iter().map(|(dir, line)| std::thread::spawn(move || sh(&dir, &line))).collect();
    for thread in threads {
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).expect("the file can be made");
    file.write_all(bytes).expect("the file can be written");
    file.sync_all().expect("the file can be synced");
}

/// A crate with dependencies, of those versions that this workspace is built with: they are on this machine already.
fn make_crate(dir: &Path) {
    let manifest =
        "[package]\nname = 'app'\nversion = '0.1.0'\nedition = '2024'\n[workspace]\n[dependencies]\nserde_json = '1'\n";
    let program = "fn main() { let v: serde_json::Value = serde_json::from_str(\"[1, 2]\").unwrap(); println!(\"{}\", v[1]); }";
    fs::create_dir_all(dir.join("src")).expect("a directory");
    fs::write(dir.join("Cargo.toml"), manifest).expect("a file");
    fs::write(dir.join("src/main.rs"), program).expect("a file");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock"), dir.join("Cargo.lock")).expect("a file");
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn trees_and_repositories_are_the_same_on_every_node() {
    let cluster = RealCluster::up(&Options::default());
    let scratch = tempfile::tempdir().expect("a directory");
    make_tree(scratch.path());
    let source = scratch.path().display();
    let (n1, n2, n3) = (cluster.mount(1), cluster.mount(2), cluster.mount(3));

    // A copied tree is there at once on the others.
    sh(&n1, &format!("cp -r {source}/include inc"));
    let differ = format!("diff -r --no-dereference {source}/include inc");
    together(vec![(n2.clone(), differ.clone()), (n3.clone(), differ)]);

    // A repository cloned on one node, checked on another, committed to on the third.
    sh(scratch.path(), "mkdir origin; cd origin; git init -q -b main; mv ../include .; git add -A; git commit -q -m one");
    sh(&n1, &format!("git clone -q --no-hardlinks {source}/origin clone"));
    sh(&n2, "cd clone; git fsck --full --strict; test -z \"$(git status --porcelain)\"");
    sh(&n3, "cd clone; echo more >>include/d1/sub/f1; git rm -q include/d2/sub/f2; git commit -q -a -m two");
    assert_eq!(sh(&n1, "cd clone; git log --format=%s; git status --porcelain").trim(), "two\none");

    cluster.fsck(1);
    cluster.stop(&[1, 2, 3]);
    cluster.fsck_stopped();
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_crate_is_built_on_one_node_while_another_searches_it() {
    let cluster = RealCluster::up(&Options::default());
    make_crate(&cluster.mount(1).join("app"));
    let searching = cluster.mount(3);
    let searcher = Load::start(move |_| {
        // What vanishes between being listed and being opened is an error of find and grep; anything else is ours.
        sh(
            &searching,
            "{ find app -type f >/dev/null || true; grep -r serde app >/dev/null || true; } 2>../search.err
             ! grep -v 'No such file' ../search.err",
        );
    });
    sh(&cluster.mount(2), "cd app; cargo build --offline --quiet");
    let (searches, _) = searcher.finish("searching");
    assert!(searches > 1, "the search was not beside the build");
    assert_eq!(sh(&cluster.mount(1), "app/target/debug/app").trim(), "2");
    sh(&cluster.mount(3), "cd app; test -z \"$(cargo build --offline 2>&1 | grep Compiling)\"");
    cluster.fsck(1);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_database_is_written_on_every_node_in_turn() {
    let cluster = RealCluster::up(&Options::default());
    let turns = 12;
    sh(&cluster.mount(1), "sqlite3 base.db 'create table t(n integer primary key, what text)' 'create index i on t(what)'");
    for turn in 0..turns {
        let dir = cluster.mount(1 + turn % 3);
        let insert = format!(
            "with recursive c(n) as (select 1 union all select n+1 from c where n<500) insert into t(what) select '{turn}-'||n from c"
        );
        sh(&dir, &format!("sqlite3 base.db \"{insert}\""));
        let next = cluster.mount(1 + (turn + 1) % 3);
        let read = sh(&next, "sqlite3 base.db 'pragma integrity_check' 'select count(*) from t'");
        assert_eq!(read.trim(), format!("ok\n{}", (turn + 1) * 500));
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_was_synced_survives_the_death_of_all_daemons() {
    let cluster = RealCluster::up(&Options::default());
    let bytes = pattern(42, 0, 100 << 20);
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

/// Something that is done again and again beside the test.
struct Load {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Done>,
}

/// How often a load was done, the longest pause between two successes, and the sum of what it returned.
struct Done {
    count: u64,
    longest: Duration,
    sum: u64,
}

impl Load {
    fn start(mut step: impl FnMut(u64) + Send + 'static) -> Load {
        Load::start_counting(move |i| {
            step(i);
            0
        })
    }

    fn start_counting(mut step: impl FnMut(u64) -> u64 + Send + 'static) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut done, mut last) = (Done { count: 0, longest: Duration::ZERO, sum: 0 }, clock());
            while !flag.load(Ordering::Relaxed) {
                done.sum += step(done.count);
                done.count += 1;
                let now = clock();
                done.longest = done.longest.max(now.saturating_sub(last));
                last = now;
            }
            done
        });
        Load { stop, thread }
    }

    fn end(self, what: &str) -> Done {
        self.stop.store(true, Ordering::Relaxed);
        let what = format!("{what} under load");
        within(Duration::from_secs(30), &what.clone(), move || self.thread.join()).unwrap_or_else(|_| panic!("{what} failed"))
    }

    /// How often it was done, and the longest pause.
    fn finish(self, what: &str) -> (u64, Duration) {
        let done = self.end(what);
        (done.count, done.longest)
    }

    fn finish_counting(self, what: &str) -> u64 {
        self.end(what).sum
    }
}

/// Bytes that resyncs copied to a node's disk, as its events tell, and how many resyncs those were.
fn resynced(cluster: &RealCluster, node: usize) -> (f64, usize) {
    let events = cluster.pulsar(node, &["events"]).expect("pulsar events runs").text;
    let amounts = events.lines().filter_map(|line| {
        let amount = line.split_once("is up to date; ")?.1.split_once(" were copied")?.0;
        let (number, unit) = amount.split_once(' ')?;
        let shift = ["B", "KiB", "MiB", "GiB"].iter().position(|u| *u == unit)?;
        Some(number.parse::<f64>().ok()? * f64::from(1u32 << (10 * shift)))
    });
    amounts.fold((0.0, 0), |(sum, n), amount| (sum + amount, n + 1))
}

/// Kills one node under the load of the two others, looks at how they go on, and at what it is given when it comes back.
fn kill_under_load(cluster: &RealCluster, victim: usize) {
    const OLD: usize = 20;
    const NEW: usize = 64 << 10;
    eprintln!("killing n{victim}");
    let others: Vec<usize> = (1..=3).filter(|n| *n != victim).collect();
    let dir = cluster.mount(others[0]).join(format!("v{victim}"));
    fs::create_dir(&dir).expect("a directory");
    let acknowledged = Arc::new(AtomicU64::new(0));
    let (count, made) = (acknowledged.clone(), dir.clone());
    let writer = Load::start(move |i| {
        write_synced(&made.join(format!("new{i}")), &pattern(i as u32, 0, NEW));
        count.store(i + 1, Ordering::Relaxed);
    });
    let old = cluster.mount(others[1]);
    let reader = Load::start(move |i| {
        let i = i as usize % OLD;
        let bytes = fs::read(old.join(format!("old{i}"))).expect("the file can be read");
        assert_eq!(hash(&bytes), hash(&pattern(i as u32, 0, 4 << 20)), "old{i}");
        std::thread::sleep(Duration::from_millis(2));
    });
    std::thread::sleep(Duration::from_secs(1));
    cluster.kill(&[victim]);
    let before = acknowledged.load(Ordering::Relaxed);
    let name = format!("n{victim}");
    cluster.wait_status(
        others[0],
        "the victim is down, and the data not safe against another loss",
        Duration::from_secs(10),
        |s| {
            s["nodes"].as_array().is_some_and(|n| n.iter().any(|n| n["name"] == name && n["up"] == false))
                && s["can_lose_node"]["level"] != "ok"
                && s["data_safe"]["level"] == "warning"
                && s["writes_accepted"]["level"] == "ok"
                && s["problems"].as_array().is_some_and(|p| p.iter().any(|p| p["code"] == "node_down"))
        },
    );
    std::thread::sleep(Duration::from_secs(2));
    let (writes, longest_write) = writer.finish("writing");
    let (reads, longest_read) = reader.finish("reading");
    eprintln!("{writes} writes, longest pause {longest_write:?}; {reads} reads, longest pause {longest_read:?}");
    let limit = Duration::from_secs(5);
    assert!(longest_write < limit && longest_read < limit, "stalled: {longest_write:?}, {longest_read:?}\n{}", cluster.logs());
    assert!(writes > before && reads > 20, "{before} writes, and {writes} in the end; {reads} reads");

    // It comes back, and is given what changed: that is less than what is there, and status tells of it meanwhile.
    let watched = {
        let (config, pulsar) = (cluster.config(others[1]), cluster.program().to_owned());
        Load::start_counting(move |_| {
            let output = Command::new(&pulsar).arg("--config").arg(&config).arg("status").output().expect("pulsar status runs");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            u64::from(text.contains("being brought up to date") && text.contains("[resync]"))
        })
    };
    cluster.start(&[victim]);
    cluster.wait_healthy();
    let told = watched.finish_counting("status");
    assert!(told > 0, "no status told of the resync");
    let (copied, resyncs) = resynced(cluster, victim);
    let (away, all) = ((writes - before) * NEW as u64, (OLD * (4 << 20)) as f64 + (writes * NEW as u64) as f64);
    eprintln!("{resyncs} resyncs copied {copied} bytes, of {all}; {away} were written while n{victim} was away");
    // How much of it belongs on this disk is chance: each mirror is on two of the three. Blocks of inodes and directories come
    // on top, and what was under way at the death is compared, too.
    assert!(resyncs > 0 && copied > 0.0, "nothing was copied");
    assert!(copied < away as f64 * 1.5 + 4e6, "{copied} bytes copied, though only {away} were written meanwhile");

    let (dir, n) = (cluster.mount(victim).join(format!("v{victim}")), acknowledged.load(Ordering::Relaxed));
    within(LONG, "reading on the node that came back", move || {
        for i in 0..n {
            let bytes = fs::read(dir.join(format!("new{i}"))).expect("an acknowledged file is there");
            assert_eq!(hash(&bytes), hash(&pattern(i as u32, 0, NEW)), "file {i}");
        }
    });
    cluster.fsck(victim);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn the_others_go_on_when_a_node_is_killed() {
    let cluster = RealCluster::up(&Options::default());
    cluster.wait_healthy();
    let dir = cluster.mount(1);
    for i in 0..20u32 {
        write_synced(&dir.join(format!("old{i}")), &pattern(i, 0, 4 << 20));
    }
    // Whoever leads the configuration, the first node, and one that is neither.
    let leader = cluster.status(1).and_then(|s| s["leader"].as_str()?.strip_prefix('n')?.parse().ok()).expect("a leader");
    let other = (1..=3).find(|n| *n != leader && *n != 1).expect("three nodes");
    let mut victims = vec![other, leader, 1];
    victims.dedup();
    for victim in victims {
        kill_under_load(&cluster, victim);
    }
    cluster.stop(&[1, 2, 3]);
    cluster.fsck_stopped();
}

/// Where each of some blocks' contents are on a disk image.
fn find_blocks(image: &Path, wanted: &[&[u8]]) -> BTreeMap<usize, Vec<u64>> {
    let index: BTreeMap<u64, usize> = wanted.iter().enumerate().map(|(i, b)| (hash(b), i)).collect();
    let mut file = File::open(image).expect("the disk's file");
    let len = file.metadata().expect("the disk's file").len();
    let (mut found, mut at) = (BTreeMap::<usize, Vec<u64>>::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    while at < len {
        // Sparse files: skip what was never written.
        let Ok(data) = nix::unistd::lseek(&file, at as i64, nix::unistd::Whence::SeekData) else { break };
        at = data as u64 / 4096 * 4096;
        file.seek(SeekFrom::Start(at)).expect("a seek");
        let n = file.read(&mut buffer).expect("a read");
        for (i, part) in buffer[..n].chunks(4096).enumerate() {
            if let Some(block) = index.get(&hash(part)).filter(|b| wanted[**b] == part) {
                found.entry(*block).or_default().push(at + i as u64 * 4096);
            }
        }
        at += n.max(1) as u64;
    }
    found
}

/// Damages places on a node's disk.
fn damage(cluster: &RealCluster, node: usize, places: impl IntoIterator<Item = u64>) {
    let disk = OpenOptions::new().write(true).open(cluster.disk(node)).expect("the disk's file");
    for place in places {
        disk.write_all_at(&[0x55; 512], place + 1024).expect("the damage");
    }
    disk.sync_all().expect("the damage");
}

/// Events of all nodes that contain a word.
fn events_with(cluster: &RealCluster, word: &str) -> Vec<String> {
    let events = (1..=3).map(|n| cluster.pulsar(n, &["events"]).expect("pulsar events runs").text.to_lowercase());
    events.flat_map(|e| e.lines().filter(|l| l.contains(word)).map(str::to_owned).collect::<Vec<_>>()).collect()
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_disk_that_is_gone_holds_nobody_up_and_is_replaced() {
    let cluster = RealCluster::up(&Options::default());
    cluster.wait_healthy();
    sh(&cluster.mount(1), "seq 100000 >numbers; sync numbers");
    cluster.stop(&[2]);
    // Both copies of its label.
    damage(&cluster, 2, [0, 4096]);
    cluster.start(&[2]);
    let one = cluster.mount(1);
    within(LONG, "writing while a node has lost its disk", move || sh(&one, "seq 200000 >numbers; sync numbers"));
    cluster.wait_status(2, "the disk is given up", LONG, |s| {
        s["disks"].as_array().is_some_and(|d| d.iter().any(|d| d["node"] == "n2" && d["state"] == "faulted"))
    });
    let new = cluster.dir().join("new-disk");
    let new = new.display().to_string();
    let replaced = cluster.pulsar(2, &["disk", "replace", "d2", &new, "--size", "1G"]).expect("pulsar runs");
    assert_eq!(replaced.code, 0, "{}{}", replaced.text, replaced.errors);
    cluster.wait_healthy();
    // What is read is on the new disk, too: another node goes, and all is there.
    cluster.kill(&[1]);
    let three = cluster.mount(3);
    assert_eq!(within(LONG, "reading without the first node", move || sh(&three, "tail -n 1 numbers")).trim(), "200000");
    cluster.start(&[1]);
    cluster.wait_healthy();
    cluster.fsck(3);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn damaged_copies_are_read_around_and_repaired() {
    const BLOCKS: usize = (20 << 20) / 4096;
    let cluster = RealCluster::up(&Options::default());
    let bytes = pattern(7, 0, BLOCKS * 4096);
    write_synced(&cluster.mount(1).join("precious"), &bytes);
    // Once down and up, so that the file is older than what a copy that comes back is given anew.
    cluster.stop(&[1, 2, 3]);
    cluster.start(&[1, 2, 3]);
    cluster.wait_healthy();
    cluster.stop(&[1, 2, 3]);
    let blocks: Vec<&[u8]> = bytes.chunks(4096).collect();
    let places: Vec<BTreeMap<usize, Vec<u64>>> = (1..=3).map(|n| find_blocks(&cluster.disk(n), &blocks)).collect();
    let holders = |block: usize| (1..=3).filter(|n| places[n - 1].contains_key(&block)).collect::<Vec<usize>>();
    for block in 0..BLOCKS {
        assert_eq!(holders(block).len(), 2, "block {block} is not on two disks");
    }
    // A third of the blocks loses its first copy, another third its second; every node reads all of it, so each of those who
    // hold a damaged copy does.
    for block in 0..BLOCKS {
        if block % 3 < 2 {
            let node = holders(block)[block % 3];
            damage(&cluster, node, places[node - 1][&block].iter().copied());
        }
    }
    cluster.start(&[1, 2, 3]);
    cluster.wait_healthy();
    for node in 1..=3 {
        let path = cluster.mount(node).join("precious");
        let read = within(LONG, "reading a damaged file", move || fs::read(path).expect("the file can be read"));
        assert_eq!(hash(&read), hash(&bytes), "n{node} reads damaged bytes");
    }
    let repairs = events_with(&cluster, "repaired from another copy");
    assert!(!repairs.is_empty(), "no event tells of a repair");
    assert!(repairs.iter().all(|r| r.contains("block") && r.contains("disk")), "{}", repairs[0]);
    // Who has a good copy reads that; scrubbing reads, and repairs, the rest.
    for node in 1..=3 {
        let started = cluster.pulsar(node, &["scrub", "start"]).expect("pulsar scrub runs");
        assert_eq!(started.code, 0, "{}{}", started.text, started.errors);
    }
    let end = clock() + LONG;
    while events_with(&cluster, "scrub of this node's disks").len() < 3 {
        assert!(clock() < end, "scrubbing does not end\n{}", cluster.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    cluster.stop(&[1, 2, 3]);
    for block in (0..BLOCKS).filter(|b| b % 3 < 2) {
        let node = holders(block)[block % 3];
        let home = &places[node - 1][&block];
        let disk = File::open(cluster.disk(node)).expect("the disk's file");
        let good = home.iter().any(|place| {
            let mut now = [0; 4096];
            disk.read_exact_at(&mut now, *place).expect("a read");
            now == blocks[block]
        });
        assert!(good, "the copy of block {block} on n{node} was not repaired");
    }

    // With both copies of a block damaged, reading it is an error, everywhere and always; what is beside it is still there.
    let lost = 40;
    for node in holders(lost) {
        // Wherever it is now: in its place, and in the log if that still has it.
        damage(&cluster, node, find_blocks(&cluster.disk(node), &blocks[lost..=lost]).into_values().flatten());
    }
    cluster.start(&[1, 2, 3]);
    cluster.wait_healthy();
    for node in 1..=3 {
        let path = cluster.mount(node).join("precious");
        let (direct, good) = within(LONG, "reading a file without a good copy", move || {
            let file = tests::sys::open(&path, false, libc::O_DIRECT).expect("the file can be opened");
            let mut buffer = vec![0; 4096];
            let mut read = |block: usize| file.read_at(&mut buffer, block as u64 * 4096).map(|n| hash(&buffer[..n]));
            let direct = read(lost);
            (
                direct,
                (0..BLOCKS)
                    .filter(|b| *b != lost)
                    .filter(|b| read(*b).ok() != Some(hash(&pattern(7, *b as u64 * 4096, 4096))))
                    .count(),
            )
        });
        assert_eq!(direct.err().and_then(|e| e.raw_os_error()), Some(errno::EIO), "damage on both copies was read on n{node}");
        assert_eq!(good, 0, "n{node}: blocks that are not damaged are not read");
        let path = cluster.mount(node).join("precious");
        let whole = within(LONG, "reading a file without a good copy", move || fs::read(path));
        assert_eq!(whole.err().and_then(|e| e.raw_os_error()), Some(errno::EIO), "n{node} read the whole file");
    }
    assert!(!events_with(&cluster, "damaged on every copy").is_empty(), "no event tells of the loss");
    // Writing the block anew makes it good again.
    let path = cluster.mount(2).join("precious");
    within(LONG, "writing a lost block", move || {
        let file = OpenOptions::new().write(true).open(path).expect("the file can be opened");
        file.write_all_at(&pattern(7, 40 * 4096, 4096), 40 * 4096).expect("it can be written");
        file.sync_all().expect("it can be synced");
    });
    assert_eq!(hash(&fs::read(cluster.mount(3).join("precious")).expect("it can be read")), hash(&bytes));
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn records_appended_from_two_nodes_are_all_there() {
    const SECONDS: u64 = 10;
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
    let old = pattern(9, 0, 4 << 20);
    write_synced(&cluster.mount(3).join("keep/old"), &old);
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
    // While it is full, what is there can be overwritten, on any node, and read on any other.
    let new = pattern(10, 0, 4 << 20);
    let path = cluster.mount(2).join("keep/old");
    let overwritten = new.clone();
    within(LONG, "overwriting while full", move || {
        let mut file = OpenOptions::new().write(true).open(path).expect("it can be opened");
        file.write_all(&overwritten).expect("there is room for what is there already");
        file.sync_all().expect("it can be synced");
    });
    assert_eq!(hash(&fs::read(cluster.mount(3).join("keep/old")).expect("it can be read")), hash(&new));
    // Removing needs no room, either.
    sh(&cluster.mount(3), "rm keep/file; test ! -e keep/file; mv keep/old keep/moved");
    sh(&cluster.mount(2), "test ! -e keep/file; rm fill*");
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
    assert_eq!(hash(&fs::read(cluster.mount(1).join("keep/moved")).expect("it can be read")), hash(&new));
    cluster.fsck(1);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn mappings_of_several_nodes_are_coherent_once_synced() {
    const PAGE: usize = 4096;
    const PAGES: usize = 24;
    let cluster = RealCluster::up(&Options::default());
    write_synced(&cluster.mount(1).join("shared"), &vec![0; PAGES * PAGE]);
    let files: Vec<File> =
        cluster.mounts().iter().map(|m| tests::sys::open(&m.join("shared"), true, 0).expect("it can be opened")).collect();
    let mut maps: Vec<Mapping> = files.iter().map(|f| Mapping::new(f, PAGES * PAGE, true).expect("it can be mapped")).collect();
    // Each node stores into pages of its own, in turn; what was synced, the others see: by read, by a new mapping, and by
    // their old one once they have asked for the file's attributes.
    for round in 0..40u32 {
        let writer = round as usize % 3;
        let page = (round as usize * 7) % PAGES / 3 * 3 + writer;
        let bytes = pattern(round + 1, 0, 300);
        maps[writer].store(page * PAGE + 50, &bytes).expect("a store");
        maps[writer].sync().expect("msync");
        for (node, file) in files.iter().enumerate() {
            let mut read = vec![0; 300];
            file.read_exact_at(&mut read, (page * PAGE + 50) as u64).expect("a read");
            assert_eq!(hash(&read), hash(&bytes), "round {round}: n{} reads other bytes than n{} synced", node + 1, writer + 1);
            let new = Mapping::new(file, PAGES * PAGE, false).and_then(|m| m.load(page * PAGE + 50, 300)).expect("a load");
            assert_eq!(hash(&new), hash(&bytes), "round {round}: a new mapping on n{} shows old bytes", node + 1);
            file.metadata().expect("attributes");
            let old = maps[node].load(page * PAGE + 50, 300).expect("a load");
            assert_eq!(hash(&old), hash(&bytes), "round {round}: the old mapping on n{} shows old bytes", node + 1);
        }
    }
    // What write() did elsewhere is seen in a mapping, too.
    files[2].write_all_at(b"written on n3", 5).expect("a write");
    files[0].metadata().expect("attributes");
    assert_eq!(maps[0].load(5, 13).expect("a load"), b"written on n3");
    // All store into their own pages at once and sync in the end: nothing of anybody is lost, whoever writes back when.
    let writers: Vec<_> = maps
        .into_iter()
        .enumerate()
        .map(|(node, mut map)| {
            std::thread::spawn(move || {
                for round in 0..200u32 {
                    let page = round as usize % (PAGES / 3) * 3 + node;
                    map.store(page * PAGE, &pattern(1000 + round, 0, PAGE)).expect("a store");
                    if round % 17 == 0 {
                        map.sync().expect("msync");
                    }
                }
                map.sync().expect("msync");
            })
        })
        .collect();
    for writer in writers {
        within(LONG, "storing into mappings", move || writer.join()).expect("storing goes on");
    }
    let right: Vec<u8> = (0..PAGES).flat_map(|page| pattern(1000 + 192 + (page / 3) as u32, 0, PAGE)).collect();
    for (node, mount) in cluster.mounts().iter().enumerate() {
        let read = fs::read(mount.join("shared")).expect("it can be read");
        for page in 0..PAGES {
            let range = page * PAGE..(page + 1) * PAGE;
            assert_eq!(hash(&read[range.clone()]), hash(&right[range]), "page {page} as n{} reads it", node + 1);
        }
    }
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
fn a_file_that_is_open_on_a_node_that_was_cut_off_outlives_an_unlink_after_that() {
    let cluster = RealCluster::up(&Options { netns: true, ..Options::default() });
    cluster.wait_healthy();
    // One that is freed with its name, and one that is freed afterwards; each opened once, or once more when the node is back.
    let files = [("small", 60), ("small-twice", 60), ("large", 300_000), ("large-twice", 300_000)];
    let (near, far) = (cluster.mount(1), cluster.mount(2));
    write_synced(&near.join("other"), b"other");
    // Nothing of them is read, and so in the kernel's cache, before they have been removed.
    let held = files.map(|(name, len)| {
        write_synced(&near.join(name), &pattern(7, 0, len));
        File::open(far.join(name)).expect("it can be opened")
    });
    cluster.verb("cut", &[2]);
    cluster.wait_status(2, "it is cut off", Duration::from_secs(15), |s| s["current"] == false);
    // The node that will remove them has them to itself, and nobody tells it any more that they are open.
    let paths = files.map(|(name, _)| near.join(name));
    within(Duration::from_secs(20), "changing files while a node is cut off", move || {
        for path in paths {
            fs::set_permissions(path, PermissionsExt::from_mode(0o640)).expect("it can be changed");
        }
    });
    cluster.verb("heal", &[2]);
    let path = far.join("other");
    within(LONG, "reading once the node is back", move || fs::read(path)).expect("it can be read");
    let again = files.map(|(name, _)| name.contains("twice").then(|| File::open(far.join(name)).expect("it can be opened")));
    for (name, _) in files {
        fs::remove_file(near.join(name)).expect("it can be removed");
    }
    sh(&near, "sync; echo new >new; sync");
    for (((name, len), held), again) in files.iter().zip(held).zip(again) {
        for mut file in [Some(held), again].into_iter().flatten() {
            let mut read = Vec::new();
            let result = file.read_to_end(&mut read);
            assert!(result.is_ok() && read == pattern(7, 0, *len), "{name}: {result:?}\n{}", cluster.logs());
            assert_eq!(file.metadata().expect("it is there").len(), *len as u64, "{name}");
        }
    }
    cluster.wait_healthy();
    cluster.fsck(3);
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
    lossy.sync_all().expect("the file can be synced");
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
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(errno::EIO), "{error}");
            // By name, soon: the path is looked up once the node is back.
            let told = || cluster.pulsar(2, &["events"]).expect("pulsar events runs").text;
            let begun = clock();
            while !told().contains("data of /lossy ") {
                assert!(clock().saturating_sub(begun) < LONG, "no event names the file that lost data:\n{}", told());
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
    cluster.wait_healthy();
    sh(&cluster.mount(2), "echo more >again; sync again");
    assert_eq!(sh(&cluster.mount(1), "cat again").trim(), "more");
    cluster.fsck(3);
}
