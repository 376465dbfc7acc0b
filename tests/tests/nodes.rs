//! Several nodes as programs see them: what one changes, the others see at once; locks; one file and one directory, used
//! from everywhere. The programs of `tests/src/bin` do the looking, here for a short time each; by hand they run for longer.
//! They need root and /dev/fuse, and are run by `ci`.

use nix::libc;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tests::cluster::{Options, RealCluster, clock, run, within};
use tests::locker::{Worker, ok};

const LONG: Duration = Duration::from_secs(240);
/// A node that dies or is cut off is noticed within this time, and its locks are free.
const SOON: Duration = Duration::from_secs(15);
/// Long enough for an answer that should not come to come.
const NEVER: Duration = Duration::from_millis(500);

/// Runs one of the programs, which must end with a certain code.
#[track_caller]
fn program(cluster: &RealCluster, path: &str, dirs: &[PathBuf], args: &[&str], end: u8) {
    let mut command = Command::new(path);
    let (verb, rest) = args.split_at(usize::from(args.first().is_some_and(|a| !a.starts_with('-'))));
    command.args(verb).args(dirs).args(rest);
    let output = run(command, LONG).unwrap_or_else(|e| panic!("{e}"));
    let text = format!("{}{}", output.text, output.errors);
    eprintln!("{text}");
    assert_eq!(output.code, i32::from(end), "{args:?}: {text}\n{}", cluster.logs());
}

/// It must find nothing.
#[track_caller]
fn good(cluster: &RealCluster, path: &str, dirs: &[PathBuf], args: &[&str]) {
    program(cluster, path, dirs, args, 0);
}

/// A bug is planted: it must find a difference, and not end because of anything else.
#[track_caller]
fn finds(cluster: &RealCluster, path: &str, dirs: &[PathBuf], args: &[&str]) {
    program(cluster, path, dirs, args, tests::FOUND);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn nothing_is_stale_on_another_node() {
    let cluster = RealCluster::up(&Options::default());
    let matrix = env!("CARGO_BIN_EXE_coherence");
    good(&cluster, matrix, &cluster.mounts(), &["--rounds", "2"]);
    // What is most often wrong, for longer: growth, seen through a descriptor that is held.
    good(&cluster, matrix, &cluster.mounts()[1..], &["--rounds", "40", "--only", "read-end:held"]);
    // The matrix can fail: looks that are answered from before the change are found stale, all of them.
    finds(&cluster, matrix, &cluster.mounts()[..2], &["--rounds", "2", "--only", "append:", "--deaf"]);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn one_file_changed_through_three_mounts_is_as_the_model_says() {
    let cluster = RealCluster::up(&Options::default());
    let fsx = env!("CARGO_BIN_EXE_fsx2");
    good(&cluster, fsx, &cluster.mounts()[..2], &["--seed", "1", "--ops", "4000"]);
    good(&cluster, fsx, &cluster.mounts(), &["--seed", "2", "--ops", "4000"]);
    finds(&cluster, fsx, &cluster.mounts()[..2], &["--seed", "1", "--ops", "4000", "--forget"]);
    cluster.fsck(3);
}

/// All operations that the oracle knows, `O_DIRECT` among them, by turns on 1 to 4 nodes.
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn one_to_four_mounts_behave_as_the_oracle_says() {
    let cluster = RealCluster::up(&Options { nodes: 4, ..Options::default() });
    let oracle = env!("CARGO_BIN_EXE_oracle");
    for nodes in 1..=4 {
        good(&cluster, oracle, &cluster.mounts()[..nodes], &["--seeds", "30..33", "--ops", "300"]);
        // `ci` says so if this is left out.
        if tests::sys::protections().is_empty() {
            good(&cluster, oracle, &cluster.mounts()[..nodes], &["--seeds", "30..34", "--ops", "300", "--users"]);
        }
    }
    finds(&cluster, oracle, &cluster.mounts()[..2], &["--seeds", "10..12", "--ops", "200", "--data", "80", "--stale"]);
    cluster.fsck(1);
}

/// When exactly a rename fails because another node has moved a directory (docs/semantics.md): the kernel still has it at its
/// old place, and cannot give it another one while it holds the lock for renames between directories.
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_rename_between_directories_fails_only_for_a_directory_known_at_another_place() {
    type Do<'a> = &'a dyn Fn(&Path) -> std::io::Result<()>;
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (one, two) = (cluster.mount(1), cluster.mount(2));
    let rename = |root: &Path, from: &str, to: &str| std::fs::rename(root.join(from), root.join(to));
    let nothing: Do = &|_| Ok(());
    let knows: Do = &|dir| std::fs::metadata(dir.join("A/x")).map(|_| ());
    let moves: Do = &|dir| rename(dir, "A/x", "B/x");
    let stale = Some(libc::ESTALE);
    let cases: &[(&str, Do, Do, Do, Option<i32>)] = &[
        ("unknown", nothing, moves, &|dir| rename(dir, "B/x", "C/x"), None),
        ("known", knows, moves, &|dir| rename(dir, "B/x", "C/x"), stale),
        ("known, moved back", knows, moves, &|dir| rename(dir, "B/x", "A/x"), stale),
        ("known, replaced", knows, moves, &|dir| rename(dir, "C/y", "B/x"), stale),
        ("known, renamed where it was moved to", knows, moves, &|dir| rename(dir, "B/x", "B/z"), None),
        ("known, renamed where it was", knows, &|dir| rename(dir, "A/x", "A/z"), &|dir| rename(dir, "A/z", "C/x"), None),
        ("known, and back by the time", knows, &|dir| moves(dir).and_then(|()| rename(dir, "B/x", "A/x")), moves, None),
        ("looked at", knows, moves, &|dir| std::fs::metadata(dir.join("B/x")).and_then(|_| rename(dir, "B/x", "C/x")), None),
        (
            "old place looked at",
            knows,
            moves,
            &|dir| {
                let _ = std::fs::metadata(dir.join("A/x"));
                rename(dir, "B/x", "C/x")
            },
            None,
        ),
        ("walked through", knows, moves, &|dir| File::create(dir.join("B/x/f")).and_then(|_| rename(dir, "B/x", "C/x")), None),
        (
            "a file",
            &|dir| std::fs::metadata(dir.join("A/f")).map(|_| ()),
            &|dir| rename(dir, "A/f", "B/f"),
            &|dir| rename(dir, "B/f", "C/f"),
            None,
        ),
    ];
    for (number, (what, before, elsewhere, act, expected)) in cases.iter().enumerate() {
        let name = number.to_string();
        for dir in ["A/x", "B", "C/y"] {
            std::fs::create_dir_all(one.join(&name).join(dir)).expect("directories");
        }
        File::create(one.join(&name).join("A/f")).expect("a file");
        let (here, there) = (two.join(&name), one.join(&name));
        before(&here).expect("what node 2 does before");
        elsewhere(&there).expect("what node 1 does");
        let got = act(&here).err().and_then(|e| e.raw_os_error());
        assert_eq!(got, *expected, "{what}");
        if expected.is_some() {
            // Again and again, until the directory is looked at.
            assert_eq!(act(&here).err().and_then(|e| e.raw_os_error()), *expected, "{what}, once more");
            std::fs::metadata(here.join("B/x")).expect("it is there");
            act(&here).unwrap_or_else(|e| panic!("{what}, looked at: {e}"));
        }
    }
}

/// Two clients on each of one node and two, and one on each of three, at once on a file, or on the names of a directory: one order
/// explains all that they are told. Clients that are told earlier bytes now and then are found out, even on one node.
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_concurrent_clients_are_told_has_an_order() {
    let cluster = RealCluster::up(&Options::default());
    let linear = env!("CARGO_BIN_EXE_linear");
    // Four clients with ten calls each, or three with fifteen, can be put in order on a busy machine, too; six cannot.
    for (nodes, seconds, clients, calls) in [(1, "6", "2", "15"), (2, "12", "2", "10"), (3, "12", "1", "15")] {
        let seed = nodes.to_string();
        let args = ["--seconds", seconds, "--clients", clients, "--calls", calls, "--seed", &seed];
        good(&cluster, linear, &cluster.mounts()[..nodes], &args);
    }
    finds(&cluster, linear, &cluster.mounts()[..1], &["--seconds", "6", "--stale"]);
    cluster.fsck(2);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_big_directory_is_listed_without_gaps_while_it_changes() {
    let cluster = RealCluster::up(&Options::default());
    let daemons: Vec<String> = cluster.daemons().iter().map(ToString::to_string).collect();
    assert_eq!(daemons.len(), 3);
    let mut args = vec!["--count", "20000", "--listings", "10", "--memory-max", "400"];
    args.extend(daemons.iter().flat_map(|pid| ["--daemon", pid]));
    good(&cluster, env!("CARGO_BIN_EXE_bigdir"), &cluster.mounts()[..2], &args);
    cluster.fsck(3);
}

const LOCKS: &str = env!("CARGO_BIN_EXE_locks");

fn locker(file: &Path) -> Worker {
    Worker::start(Path::new(LOCKS), &[file])
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn locks_hold_between_nodes() {
    let cluster = RealCluster::up(&Options::default());
    good(&cluster, LOCKS, &cluster.mounts(), &["check", "--counts", "100"]);
}

/// A file, as each node sees it.
fn file(cluster: &RealCluster, name: &str) -> Vec<PathBuf> {
    File::create(cluster.mount(1).join(name)).expect("the file can be made");
    cluster.mounts().iter().map(|m| m.join(name)).collect()
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn locks_of_a_dead_node_are_free_and_those_of_others_stay() {
    let cluster = RealCluster::up(&Options::default());
    cluster.wait_healthy();
    let files = file(&cluster, "locked");
    for kind in ["flock", "fcntl", "ofd"] {
        for victim in [3, 1] {
            let (dying, living) = (files[victim - 1].clone(), files[1].clone());
            let third = files[3 - victim].clone();
            // One range of the node that dies, one of a node that lives (of flock there is only the whole file).
            let mut holder = locker(&dying);
            assert_eq!(holder.ask(&format!("{kind} 0 ex 0 10")), ok());
            let mut waiter = locker(&living);
            waiter.tell(&format!("{kind} 0 ex 0 10 wait"));
            assert_eq!(waiter.answer(NEVER), None);
            let mut other = locker(&living);
            if kind != "flock" {
                assert_eq!(other.ask(&format!("{kind} 0 ex 20 10")), ok());
            }
            // And all of the file in the other way, which has nothing to do with these.
            let apart = if kind == "flock" { "fcntl" } else { "flock" };
            assert_eq!(other.ask(&format!("{apart} 0 ex")), ok());
            cluster.kill(&[victim]);
            let begun = clock();
            assert_eq!(waiter.answer(SOON), Some(ok()), "{kind}: the lock of n{victim}, which died\n{}", cluster.logs());
            eprintln!("{kind}: n{victim}'s lock was free after {:?}", clock().saturating_sub(begun));
            // Whoever was the locks' master: those of the living are still held.
            let mut late = locker(&third);
            let place = if kind == "flock" { "0 0" } else { "20 10" };
            assert_eq!(late.ask(&format!("{kind} 0 ex {place}")), Err(libc::EAGAIN), "{kind}: a lock of n2 is gone");
            assert_eq!(late.ask(&format!("{apart} 0 ex")), Err(libc::EAGAIN), "{apart}: a lock of n2 is gone");
            assert_eq!((waiter.ask(&format!("{kind} 0 un")), other.ask(&format!("{kind} 0 un"))), (ok(), ok()));
            drop((holder, waiter, other));
            late.tell(&format!("{kind} 0 ex 0 0 wait"));
            assert_eq!(late.answer(SOON), Some(ok()), "{kind}: after all holders ended");
            assert_eq!(late.ask(&format!("{kind} 0 un")), ok());
            cluster.start(&[victim]);
            cluster.wait_healthy();
            let mut back = locker(&dying);
            assert_eq!(back.ask(&format!("{kind} 0 ex 0 0")), ok(), "{kind}: on the node that came back");
            assert_eq!(back.ask(&format!("{kind} 0 un")), ok());
        }
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_node_that_is_cut_off_loses_its_locks_and_says_so() {
    const LATE: Duration = Duration::from_secs(60);
    let cluster = RealCluster::up(&Options { netns: true, ..Options::default() });
    cluster.wait_healthy();
    // A file for each kind of lock.
    let mut all = ["fcntl", "flock", "ofd"].map(|kind| {
        let files = file(&cluster, kind);
        let (mut holder, mut waiter) = (locker(&files[1]), locker(&files[0]));
        assert_eq!(holder.ask(&format!("{kind} 0 ex 0 10")), ok());
        assert_eq!(holder.ask("write 0 mine"), ok());
        waiter.tell(&format!("{kind} 0 ex 0 10 wait"));
        assert_eq!(waiter.answer(NEVER), None, "{kind}");
        (kind, files, holder, waiter)
    });
    // Others on that node, who have one of the files open, too.
    let source = cluster.mount(2).join("source");
    std::fs::write(&source, "bytes").expect("a file");
    let others = ["truncate 0 0", "allocate 0 100000", "copy 1 0 3"];
    let mut others = others.map(|what| (what, Worker::start(Path::new(LOCKS), &[&all[0].1[1], &source])));
    cluster.verb("cut", &[2]);
    for (kind, _, _, waiter) in &mut all {
        assert_eq!(waiter.answer(SOON), Some(ok()), "{kind}: the lock of a node that is cut off\n{}", cluster.logs());
        assert_eq!(waiter.ask("write 0 yours"), ok());
    }
    // The former holder believes that it has the lock. What it writes now must not arrive, and it must be told.
    for (kind, _, holder, _) in &mut all {
        holder.tell("write 0 mine-again");
        assert_eq!(holder.answer(NEVER), None, "{kind}: a node that is cut off wrote");
    }
    others.iter_mut().for_each(|(what, other)| other.tell(what));
    cluster.verb("heal", &[2]);
    for (kind, _, holder, _) in &mut all {
        assert_eq!(holder.answer(LATE), Some(Err(libc::EIO)), "{kind}\n{}", cluster.logs());
        let lock = format!("{kind} 0 ex 0 10");
        for what in ["read 0", "write 0 more", "truncate 0 3", &lock] {
            assert_eq!(holder.ask(what), Err(libc::EIO), "{kind}: {what}: the handle stays as it is");
        }
        // The kernel asks for the inode's attributes, and does not say through which handle.
        assert_eq!(holder.ask("stat 0"), ok(), "{kind}");
    }
    for (what, mut other) in others {
        assert_eq!(other.answer(LATE), Some(Err(libc::EIO)), "{what}, under way when the lock was lost");
        assert_eq!(other.ask(what), Err(libc::EIO), "{what}, later");
    }
    for (kind, files, mut holder, mut waiter) in all {
        assert_eq!(waiter.ask("read 0").map(|t| t.starts_with("read yours")), Ok(true), "{kind}");
        // Opened anew it is as good as any, and the lock is the other's.
        assert_eq!(holder.ask("reopen 0"), ok());
        assert_eq!(holder.ask("read 0").map(|t| t.starts_with("read yours")), Ok(true), "{kind}");
        assert_eq!(holder.ask(&format!("{kind} 0 ex 0 10")), Err(libc::EAGAIN));
        drop(waiter);
        holder.tell(&format!("{kind} 0 ex 0 10 wait"));
        assert_eq!(holder.answer(SOON), Some(ok()), "{kind}");
        assert_eq!(holder.ask("write 0 mine-at-last"), ok());
        let path = files[2].clone();
        let text = within(LONG, "reading", move || std::fs::read_to_string(path).expect("it can be read"));
        assert!(text.starts_with("mine-at-last"), "{kind}: {text}");
    }
}

/// Were the kernel made to forget all names (FUSE_NOTIFY_INC_EPOCH), it would drop directories from its tree until they are
/// looked up again; one that is somebody's working directory counts as removed meanwhile.
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_working_directory_is_not_lost_while_others_change_it() {
    let cluster = RealCluster::up(&Options::default());
    let (here, there) = (cluster.mount(1).join("a/b/c"), cluster.mount(3).join("a/b/c"));
    std::fs::create_dir_all(&here).expect("a directory");
    File::create(here.join("file")).expect("a file");
    std::env::set_current_dir(&here).expect("a working directory");
    let done = AtomicBool::new(false);
    let lost = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                File::create(there.join("guest")).expect("a file");
                std::fs::remove_file(there.join("guest")).expect("it can be removed");
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::fs::metadata(here.join("file")).expect("it is there");
            }
        });
        let end = clock() + Duration::from_secs(8);
        let mut lost = 0;
        while clock() < end {
            lost += u64::from(std::env::current_dir().is_err());
        }
        done.store(true, Ordering::Relaxed);
        lost
    });
    std::env::set_current_dir("/").expect("a working directory");
    assert_eq!(lost, 0, "times that the working directory was not found");
}

/// A counter that n2 keeps in a file's first bytes, read on n1 through the page cache, while another handle there changes the
/// file in some way. What a read finds is never less than what was written before it began.
fn count_beside(cluster: &RealCluster, name: &str, change: impl Fn(&File, u64) + Sync) {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicU64;
    let (here, there) = (cluster.mount(1).join(name), cluster.mount(2).join(name));
    std::fs::write(&here, [0; 8192]).expect("a file");
    let (written, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::options().write(true).open(&there).expect("it is there");
            for count in 1.. {
                file.write_all_at(&u64::to_le_bytes(count), 0).expect("the counter is written");
                written.store(count, Ordering::SeqCst);
                if done.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        scope.spawn(|| {
            let file = File::options().read(true).append(true).open(&here).expect("it is there");
            (0..).take_while(|_| !done.load(Ordering::SeqCst)).for_each(|n| change(&file, n));
        });
        let file = File::open(&here).expect("it is there");
        let mut bytes = [0; 8];
        let mut old = 0;
        for _ in 0..1000 {
            let before = written.load(Ordering::SeqCst);
            file.read_exact_at(&mut bytes, 0).expect("it can be read");
            old += u32::from(u64::from_le_bytes(bytes) < before);
        }
        done.store(true, Ordering::SeqCst);
        assert_eq!(old, 0, "{name}: reads that found an older count");
    });
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_counter_is_read_right_beside_other_processes() {
    let cluster = RealCluster::up(&Options::default());
    count_beside(&cluster, "truncated", |file, n| file.set_len(8192 + n % 5000).expect("it can be cut"));
    count_beside(&cluster, "appended", |mut file, _| std::io::Write::write_all(&mut file, b"more").expect("it can grow"));
}

/// A thread that asks the kernel about a mount of its own process waits for that process, unkillably; sharing descriptors with it, it
/// would keep it from ever ending.
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn threads_that_ask_the_kernel_share_no_descriptor_of_its_device() {
    let cluster = RealCluster::up(&Options::default());
    std::fs::write(cluster.mount(1).join("f"), "here").expect("a file");
    for daemon in cluster.daemons() {
        let threads = std::fs::read_dir(format!("/proc/{daemon}/task")).expect("it runs").flatten();
        let devices = |thread: &Path| -> usize {
            let links = std::fs::read_dir(thread.join("fd")).expect("its descriptors").flatten();
            links.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/fuse"))).count()
        };
        let mut asking = 0;
        for thread in threads {
            let name = std::fs::read_to_string(thread.path().join("comm")).expect("a thread's name");
            if name.starts_with("pulsar-purge") || name.starts_with("pulsar-refresh") {
                asking += 1;
                assert_eq!(devices(&thread.path()), 1, "{name}");
            }
        }
        let main = PathBuf::from(format!("/proc/{daemon}/task/{daemon}"));
        assert!(asking > 1 && devices(&main) > 1, "{asking} threads, {} descriptors", devices(&main));
    }
}

/// Each write makes the kernel lose the attributes that it is just being told.
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn who_may_open_a_file_is_right_beside_a_busy_writer() {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1).join("f"), cluster.mount(2).join("f"));
    std::fs::write(&here, [7; 4096]).expect("a file");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::options().write(true).open(&here).expect("it is there");
            while !done.load(Ordering::SeqCst) {
                file.write_all_at(&[8; 100], 50).expect("it is written");
            }
        });
        let wrong = (0..60).filter(|n| {
            let may = n % 2 == 0;
            let mode = if may { 0o644 } else { 0o600 };
            std::fs::set_permissions(&there, std::fs::Permissions::from_mode(mode)).expect("the mode is set");
            let read = Command::new("cat").arg(&here).uid(NOBODY).gid(NOBODY).output().expect("cat runs");
            read.status.success() != may
        });
        let wrong = wrong.count();
        done.store(true, Ordering::SeqCst);
        assert_eq!(wrong, 0, "opened, or not, by an older mode");
    });
}

/// A kernel judges by the owner that it was told last who may set attributes, and remove from a sticky directory.
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_file_is_its_new_owners_on_every_node_at_once() {
    const USER: u32 = 4711;
    let cluster = RealCluster::up(&Options::default());
    let give = |path: &Path, uid| std::os::unix::fs::chown(path, Some(uid), Some(uid)).expect("it can be given away");
    let set_mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("its mode can be set")
    };
    // One directory after the other, so that the kernels believe their names.
    for round in 0..12 {
        let dir = cluster.mount(1).join(format!("sticky-{round}"));
        std::fs::create_dir(&dir).expect("a directory");
        set_mode(&dir, 0o1777);
        for name in ["mine", "removed", "lost"] {
            std::fs::write(dir.join(name), "bytes").expect("a file");
            set_mode(&dir.join(name), 0o666);
        }
        let there = |name: &str| cluster.mount(2 + round % 2).join(format!("sticky-{round}")).join(name);
        let (mine, removed, lost) = (there("mine"), there("removed"), there("lost"));
        let mut user = Worker::start_as(Some(USER), Path::new(env!("CARGO_BIN_EXE_locks")), &[&mine, &removed, &lost]);
        assert_eq!(user.ask("chmod 0 600"), Err(libc::EPERM));
        give(&dir.join("mine"), USER);
        assert_eq!(user.ask("chmod 0 600"), ok(), "round {round}: it is theirs\n{}", cluster.logs());
        assert_eq!(user.ask("times 0 5"), ok());
        assert_eq!(user.ask("reopen 1"), ok());
        give(&dir.join("removed"), USER);
        assert_eq!(user.ask("remove 1"), ok(), "round {round}: it is theirs\n{}", cluster.logs());
        give(&dir.join("lost"), USER);
        assert_eq!(user.ask("reopen 2"), ok());
        give(&dir.join("lost"), 0);
        assert_eq!(user.ask("remove 2"), Err(libc::EPERM), "round {round}: it is not theirs any more\n{}", cluster.logs());
    }
}

/// What two nodes do at the same moment, as often as there are rounds: who has succeeded in each.
fn at_once(rounds: usize, act: impl Fn(usize, usize) -> std::io::Result<()> + Sync) -> Vec<[Option<i32>; 2]> {
    let barrier = std::sync::Barrier::new(2);
    let errors = |node: usize| {
        let act = |round| {
            barrier.wait();
            act(node, round).err().map(|e| e.raw_os_error().unwrap_or(-1))
        };
        (0..rounds).map(act).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let second = scope.spawn(|| errors(2));
        let first = errors(1);
        first.into_iter().zip(second.join().expect("it goes on")).map(|(a, b)| [a, b]).collect()
    })
}

/// Of two nodes that move the same thing to the same place one has done it, and the other finds nothing there: so work is shared out.
/// (The kernel takes a rename for done if it finds the same inode by both names.)
#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_two_nodes_move_at_once_is_moved_by_one_of_them() {
    const ROUNDS: usize = 120;
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (done, gone) = (None, Some(libc::ENOENT));
    for (what, from, to) in
        [("another directory", "q", "done"), ("a directory", "q", "q"), ("a file, over another one", "q", "full")]
    {
        let first = cluster.mount(1).join(what.replace(' ', "-"));
        for dir in ["q", "done", "full"] {
            std::fs::create_dir_all(first.join(dir)).expect("a directory");
        }
        for n in 0..ROUNDS {
            let path = first.join("q").join(n.to_string());
            if what == "a directory" { std::fs::create_dir(path) } else { File::create(path).map(drop) }.expect("it is made");
            File::create(first.join("full").join(n.to_string())).expect("a file");
        }
        let target = |n: usize| if from == to { format!("{n}.done") } else { n.to_string() };
        let outcomes = at_once(ROUNDS, |node, n| {
            let dir = cluster.mount(node).join(first.file_name().expect("it has a name"));
            std::fs::rename(dir.join(from).join(n.to_string()), dir.join(to).join(target(n)))
        });
        for (n, outcome) in outcomes.iter().enumerate() {
            assert!([[done, gone], [gone, done]].contains(outcome), "{what}, {n}: {outcome:?}\n{}", cluster.logs());
            assert!(first.join(to).join(target(n)).exists());
        }
    }
    // Exchanged by both they are as they were.
    let dir = |node| cluster.mount(node);
    std::fs::write(dir(1).join("x"), "x").expect("a file");
    std::fs::write(dir(1).join("y"), "y").expect("a file");
    let (mut exchanged, mut both) = (false, 0);
    for round in 0..ROUNDS {
        let outcome =
            at_once(1, |node, _| tests::sys::rename(&dir(node).join("x"), &dir(node).join("y"), libc::RENAME_EXCHANGE))[0];
        assert!(outcome.iter().all(|o| [done, Some(libc::ESTALE)].contains(o)), "{outcome:?}");
        exchanged ^= outcome.iter().filter(|o| **o == done).count() == 1;
        both += usize::from(outcome == [done, done]);
        let x = std::fs::read_to_string(dir(1 + round % 2).join("x")).expect("it is there");
        assert_eq!(x == "y", exchanged, "round {round}: {outcome:?}\n{}", cluster.logs());
    }
    assert!(both > ROUNDS / 2, "{both} of {ROUNDS}");
    cluster.fsck(2);
}
