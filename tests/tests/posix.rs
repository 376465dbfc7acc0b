//! What a program can find out by itself about a mount: inode numbers, names of one file, mappings, extended attributes. It must
//! find what it would on one local file system, whichever nodes it runs on. They need root and /dev/fuse, and are run by `ci`.

use nix::libc;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::cluster::{Options, RealCluster, clock};
use tests::locker::{Worker, ok};
use tests::op::Acl;
use tests::sys::{self, Mapping};

const PAGE: usize = 4096;

/// All that is in a tree, but the names on top: number, type, size and links of each, and of files the generation.
fn identities(root: &Path) -> BTreeMap<PathBuf, (u64, u32, u64, u64, u32)> {
    let mut found = BTreeMap::new();
    let mut next = vec![PathBuf::new()];
    while let Some(dir) = next.pop() {
        for entry in fs::read_dir(root.join(&dir)).expect("a directory") {
            let entry = entry.expect("an entry");
            let (path, name) = (entry.path(), dir.join(entry.file_name()));
            let m = fs::symlink_metadata(&path).expect("it is there");
            assert_eq!(std::os::unix::fs::DirEntryExt::ino(&entry), m.ino(), "{name:?}: d_ino and st_ino");
            let generation = match m.is_file() || m.is_dir() {
                true => sys::generation(&File::open(&path).expect("it opens")).expect("its generation"),
                false => 0,
            };
            if m.is_dir() {
                next.push(name.clone());
            }
            let links = if m.is_dir() { 0 } else { m.nlink() };
            found.insert(name, (m.ino(), m.mode(), m.size(), links, generation));
        }
    }
    found
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn inode_numbers_are_the_same_on_all_nodes_and_after_a_restart() {
    let cluster = RealCluster::up(&Options::default());
    for (node, mount) in cluster.mounts().iter().enumerate() {
        for dir in 0..3 {
            let dir = mount.join(format!("d{node}/e{dir}"));
            fs::create_dir_all(&dir).expect("a directory");
            for file in 0..40 {
                fs::write(dir.join(format!("f{file}")), vec![1; file * 500]).expect("a file");
            }
            symlink("f1", dir.join("link")).expect("a link");
        }
        fs::hard_link(mount.join(format!("d{node}/e1/f3")), mount.join(format!("d{node}/third"))).expect("a name");
    }
    let before = identities(&cluster.mount(1));
    assert!(before.len() > 370, "{}", before.len());
    let different: BTreeSet<u64> = before.values().map(|id| id.0).collect();
    let names_more = before.values().filter(|id| id.3 > 1).map(|id| id.3 as usize - 1).sum::<usize>();
    assert!(different.len() < before.len() && names_more > 0);
    let same = |what: &str| {
        for node in 1..=3 {
            let root = fs::metadata(cluster.mount(node)).expect("the root").ino();
            assert_eq!(root, 1, "the root on n{node} {what}");
            let now = identities(&cluster.mount(node));
            let differing = before.iter().find(|(name, id)| now.get(*name) != Some(id));
            assert!(differing.is_none() && now.len() == before.len(), "n{node} {what}: {differing:?} is another");
        }
    };
    same("now");
    cluster.stop(&[1, 2, 3]);
    cluster.start(&[1, 2, 3]);
    cluster.wait_healthy();
    same("after a restart");
}

/// The numbers and generations of files that are made, and removed again.
fn round(mount: &Path, other: &Path, seen: &mut BTreeMap<u64, BTreeSet<u32>>) -> usize {
    let mut again = 0;
    for file in 0..40 {
        let name = format!("file-{file}");
        let made = File::create(mount.join(&name)).expect("a file");
        let (ino, generation) = (made.metadata().expect("it is there").ino(), sys::generation(&made).expect("a generation"));
        let there = File::open(other.join(&name)).expect("it is there, too");
        assert_eq!(sys::generation(&there).expect("a generation"), generation, "on another node");
        let before = seen.entry(ino).or_default();
        again += usize::from(!before.is_empty());
        assert!(before.insert(generation), "inode {ino} was used before with generation {generation}");
    }
    for file in 0..40 {
        fs::remove_file(mount.join(format!("file-{file}"))).expect("it can be removed");
    }
    File::open(mount).and_then(|dir| dir.sync_all()).expect("it can be synced");
    again
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_number_that_is_used_again_has_another_generation() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (mut seen, mut again) = (BTreeMap::new(), 0);
    let end = clock() + Duration::from_secs(60);
    while again < 100 {
        again += round(&cluster.mount(1), &cluster.mount(2), &mut seen);
        assert!(clock() < end, "hardly any number is used again: {again} of {}", seen.len());
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_directory_that_another_node_removed_is_not_taken_for_a_later_one() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1), cluster.mount(2));
    fs::create_dir(here.join("old")).expect("a directory");
    // As a working directory is: the kernel knows it, and no node has it open.
    let held = File::options().read(true).custom_flags(libc::O_PATH).open(there.join("old")).expect("it can be held");
    let within = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
    let ino = held.metadata().expect("it is there").ino();
    fs::remove_dir(here.join("old")).expect("it can be removed");
    let end = clock() + Duration::from_secs(60);
    let new: PathBuf = 'again: loop {
        assert!(clock() < end, "the number is not used again");
        File::open(&here).and_then(|dir| dir.sync_all()).expect("it can be synced");
        let dirs: Vec<PathBuf> = (0..40).map(|n| here.join(format!("new-{n}"))).collect();
        for dir in &dirs {
            fs::create_dir(dir).expect("a directory");
            if fs::metadata(dir).expect("it is there").ino() == ino {
                break 'again dir.clone();
            }
        }
        dirs.iter().for_each(|dir| fs::remove_dir(dir).expect("it can be removed"));
    };
    let stale = |what: io::Result<()>| assert_eq!(what.expect_err("it is gone").raw_os_error(), Some(libc::ESTALE));
    stale(held.metadata().map(drop));
    stale(fs::create_dir(within.join("strange")));
    stale(fs::set_permissions(&within, fs::Permissions::from_mode(0o700)));
    assert_eq!(fs::read_dir(&new).expect("it can be listed").count(), 0);
    assert_eq!(fs::metadata(&new).expect("it is there").permissions().mode() & 0o777, 0o755);
    // Who comes by the name comes to the new one.
    let named = there.join(new.file_name().expect("a name"));
    fs::write(named.join("file"), "1").expect("a file");
    assert_eq!(fs::read(new.join("file")).expect("it is there"), b"1");
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_was_removed_is_still_what_it_was_for_who_holds_it() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let here = cluster.mount(1);
    let hold = |name: &str| File::options().read(true).custom_flags(libc::O_PATH).open(here.join(name)).expect("it can be held");
    let within = |held: &File| PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
    for name in ["dir", "replaced", "new"] {
        fs::create_dir(here.join(name)).expect("a directory");
    }
    fs::write(here.join("file"), "some").expect("a file");
    let (dir, replaced, file) = (hold("dir"), hold("replaced"), hold("file"));
    fs::remove_dir(here.join("dir")).expect("it can be removed");
    fs::rename(here.join("new"), here.join("replaced")).expect("it can be replaced");
    fs::remove_file(here.join("file")).expect("it can be removed");
    for held in [&dir, &replaced] {
        assert_eq!(held.metadata().expect("it is held").nlink(), 0);
        let listed = fs::read_dir(within(held)).map(|entries| entries.filter_map(Result::ok).count());
        assert_eq!(listed.expect("it can be opened"), 0);
        let made = File::create(within(held).join("x")).expect_err("it is removed");
        assert_eq!(made.raw_os_error(), Some(libc::ENOENT));
    }
    let m = file.metadata().expect("it is held");
    assert_eq!((m.nlink(), m.len()), (0, 4));
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_descriptor_with_o_noatime_leaves_no_trace() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let here = cluster.mount(1);
    fs::create_dir(here.join("dir")).expect("a directory");
    let names = ["dir", "dir/quiet", "dir/loud"];
    for file in &names[1..] {
        fs::write(here.join(file), "some").expect("a file");
    }
    let times = || names.map(|name| fs::metadata(here.join(name)).and_then(|m| m.accessed()).expect("a time"));
    // What is in the page cache is read without asking anybody, so each file is read once.
    let read = |file, flags| {
        let open = |name| sys::open(&here.join(name), false, flags).expect("it opens");
        let (dir, mut file) = (open("dir"), open(file));
        let within = sys::Directory::of(dir).and_then(|mut dir| dir.names()).expect("it can be listed").len();
        assert_eq!((within, io::read_to_string(&mut file).expect("it can be read").len()), (2, 4));
    };
    let before = times();
    read("dir/quiet", libc::O_NOATIME);
    assert_eq!(times(), before);
    read("dir/loud", 0);
    let after = times();
    assert!(after[0] > before[0] && after[1] == before[1] && after[2] > before[2], "{before:?} {after:?}");
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_file_handle_leads_to_the_file_on_every_node_until_it_is_removed() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1), cluster.mount(2));
    fs::create_dir_all(here.join("a/b")).expect("directories");
    fs::write(here.join("a/b/f"), "found").expect("a file");
    let handle = |name: &str| sys::handle(&here.join(name)).expect("a handle");
    let (file, dir, top) = (handle("a/b/f"), handle("a/b"), handle("."));
    let root = |mount: &Path| File::open(mount).expect("the root");
    // The other node's kernel has none of them.
    for mount in [&there, &here] {
        let open = |handle| sys::open_handle(&root(mount), handle).expect("it leads somewhere");
        assert_eq!(io::read_to_string(open(&file)).expect("it can be read"), "found");
        let dir = open(&dir);
        let path = fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).expect("its path");
        assert_eq!(path, mount.join("a/b"), "the directories above it are found");
        let up = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join("../../a/b/f");
        assert_eq!(fs::read_to_string(up).expect("it can be read"), "found");
        assert_eq!(open(&top).metadata().expect("the root").ino(), fs::metadata(mount).expect("the root").ino());
    }
    fs::write(there.join("new"), "1").expect("the root is as good as before");
    fs::remove_file(here.join("a/b/f")).expect("it can be removed");
    for mount in [&there, &here] {
        let gone = sys::open_handle(&root(mount), &file).expect_err("it is gone");
        assert_eq!(gone.raw_os_error(), Some(libc::ESTALE));
        assert_eq!(fs::read_to_string(mount.join("new")).expect("a file"), "1");
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_name_that_was_moved_here_is_not_found_when_another_node_has_moved_it_on() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1), cluster.mount(2));
    for turn in 0..10 {
        for dir in ["tmp", "new", "cur"] {
            fs::create_dir(here.join(format!("{dir}{turn}"))).expect("a directory");
        }
        let [tmp, new, cur] = ["tmp", "new", "cur"].map(|dir| format!("{dir}{turn}/x"));
        fs::write(here.join(&tmp), "1").expect("a file");
        fs::rename(here.join(&tmp), here.join(&new)).expect("it can be moved");
        fs::rename(there.join(&new), there.join(&cur)).expect("it can be moved on");
        assert!(!here.join(&new).exists(), "turn {turn}");
        assert!(here.join(&cur).exists(), "turn {turn}");
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn an_asynchronous_write_that_fails_leaves_what_other_nodes_wrote() {
    let cluster = RealCluster::up(&Options { nodes: 2, disk_size: "256M", ..Options::default() });
    let (here, there) = (cluster.mount(1), cluster.mount(2));
    let file = File::options().read(true).write(true).create_new(true).custom_flags(libc::O_DIRECT).open(here.join("f"));
    let file = file.expect("a file");
    fs::write(there.join("f"), vec![7; 1 << 20]).expect("the other node writes");
    fs::write(here.join("small"), vec![3; 8192]).expect("a file");
    let full = File::create(here.join("full")).expect("a file");
    for part in [1 << 20, 4096] {
        let bytes = vec![1; part];
        let end = std::iter::repeat_with(|| (&full).write_all(&bytes)).find_map(Result::err).expect("it ends");
        assert_eq!(end.raw_os_error(), Some(libc::ENOSPC));
    }
    for some_fits in [false, true] {
        if some_fits {
            fs::remove_file(here.join("small")).expect("it can be removed");
            File::open(&here).and_then(|dir| dir.sync_all()).expect("it can be synced");
        }
        let failed = sys::write_async(&file, &vec![9; 1 << 16], 2 << 20).expect_err("there is no space");
        assert_eq!(failed.raw_os_error(), Some(libc::ENOSPC));
        assert!(fs::metadata(here.join("f")).expect("it is there").len() >= 1 << 20);
    }
    for mount in [&there, &here] {
        let found = fs::read(mount.join("f")).expect("it can be read");
        assert!(found.get(..1 << 20) == Some(&vec![7; 1 << 20]), "{}: {} bytes", mount.display(), found.len());
    }
    // Who asks for it gets it.
    file.set_len(4096).expect("it can be cut");
    assert_eq!(fs::metadata(there.join("f")).expect("it is there").len(), 4096);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_file_has_as_many_names_as_it_may_and_no_more() {
    const NAMES: u64 = 5468;
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1), cluster.mount(2));
    let name = |n: u64| format!("name-{n}");
    fs::write(here.join(name(1)), "one file").expect("a file");
    for n in 2..=NAMES {
        fs::hard_link(here.join(name(1)), here.join(name(n))).unwrap_or_else(|e| panic!("name {n}: {e}"));
    }
    for mount in [&there, &here] {
        let refused = fs::hard_link(mount.join(name(1)), mount.join("one-more")).expect_err("one more name");
        assert_eq!(refused.raw_os_error(), Some(libc::EMLINK));
        let m = fs::metadata(mount.join(name(NAMES))).expect("it is there");
        assert_eq!((m.nlink(), m.ino()), (NAMES, fs::metadata(mount.join(name(7))).expect("it is there").ino()));
        let x = sys::statx(&mount.join(name(9))).expect("statx");
        assert_eq!((u64::from(x.stx_nlink), x.stx_ino), (NAMES, m.ino()));
        assert_eq!(x.stx_mask & libc::STATX_BASIC_STATS, libc::STATX_BASIC_STATS, "what stat() says, statx() does");
        // What the C library promises of file systems that it does not know is no more than what is kept.
        assert!(sys::path_limit(mount, libc::_PC_LINK_MAX).expect("pathconf") <= NAMES as i64);
        assert_eq!(sys::path_limit(mount, libc::_PC_NAME_MAX).expect("pathconf"), 255);
    }
    // A name may be changed for another all the same, and one that goes makes room for one.
    fs::rename(there.join(name(2)), there.join("other")).expect("a rename");
    fs::remove_file(there.join(name(3))).expect("it can be removed");
    assert_eq!(fs::metadata(here.join("other")).expect("it is there").nlink(), NAMES - 1);
    fs::hard_link(here.join("other"), here.join(name(3))).expect("room for one name");
    assert_eq!(fs::read(there.join(name(3))).expect("it can be read"), b"one file");
    // 255 bytes are a name, any but two of them.
    let long: Vec<u8> = (1..=255u8).map(|b| if b == b'/' { b'.' } else { b }).collect();
    let path = |name: &[u8]| here.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name));
    fs::write(path(&long), "").expect("a long name");
    assert_eq!(fs::write(path(&[&long[..], b"x"].concat()), "").map_err(|e| e.raw_os_error()), Err(Some(libc::ENAMETOOLONG)));
}

/// A file of some pages, open for writing on two nodes.
struct Shared {
    cluster: RealCluster,
    paths: [PathBuf; 2],
    files: [File; 2],
}

impl Shared {
    fn new(pages: usize) -> Shared {
        let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
        let paths = [1, 2].map(|node| cluster.mount(node).join("mapped"));
        fs::write(&paths[0], vec![b'.'; pages * PAGE]).expect("a file");
        let files = [0, 1].map(|at| sys::open(&paths[at], true, 0).expect("it opens"));
        Shared { cluster, paths, files }
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_mapping_shows_what_others_wrote_after_a_look_at_the_file_or_in_a_moment() {
    let s = Shared::new(1);
    let read_only = File::open(&s.paths[0]).expect("it opens");
    let looks: [(&str, &dyn Fn()); 4] = [
        ("read", &|| assert_eq!(fs::read(&s.paths[0]).expect("it can be read").len(), PAGE)),
        ("stat", &|| assert!(fs::metadata(&s.paths[0]).expect("it is there").is_file())),
        ("fstat", &|| assert!(s.files[0].metadata().expect("it is there").is_file())),
        ("open", &|| drop(File::open(&s.paths[0]).expect("it opens"))),
    ];
    for file in [&read_only, &s.files[0]] {
        let map = Mapping::new(file, PAGE, false).expect("it can be mapped");
        for round in 0..30u8 {
            let (what, look) = looks[usize::from(round) % looks.len()];
            assert_eq!(map.load(0, 1).expect("a load").len(), 1);
            s.files[1].write_all_at(&[b'a' + round % 20; 50], 0).expect("a write");
            look();
            assert_eq!(map.load(0, 50).expect("a load"), [b'a' + round % 20; 50], "round {round}, after {what}");
        }
        // Nobody looks.
        for round in 0..5u8 {
            s.files[1].write_all_at(&[b'0' + round; 50], 0).expect("a write");
            let begun = clock();
            while map.load(0, 50).expect("a load") != [b'0' + round; 50] {
                assert!(clock() - begun < Duration::from_secs(4), "round {round}: a mapping stays old for seconds");
            }
            eprintln!("without a look: {:?}", clock() - begun);
        }
    }
    drop(s.cluster);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn stores_are_seen_elsewhere_after_msync_munmap_and_close() {
    let s = Shared::new(2);
    let seen = || {
        let mut bytes = [0; 10];
        s.files[1].read_exact_at(&mut bytes, 5000).expect("a read");
        bytes
    };
    for round in 0..12u8 {
        let mut map = Mapping::new(&s.files[0], 2 * PAGE, true).expect("it can be mapped");
        let mut store = |byte: u8| map.store(5000, &[byte; 10]).expect("a store");
        store(round);
        map.sync().expect("msync");
        assert_eq!(seen(), [round; 10], "round {round}: after msync");
        let mut store = |byte: u8| map.store(5000, &[byte; 10]).expect("a store");
        store(round + 50);
        // Any descriptor of the file, while the mapping lives on.
        drop(s.files[0].try_clone().expect("another descriptor"));
        assert_eq!(seen(), [round + 50; 10], "round {round}: after close");
        map.store(5000, &[round + 100; 10]).expect("a store");
        drop(map);
        assert_eq!(seen(), [round + 100; 10], "round {round}: after munmap");
    }
    drop(s.cluster);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn stores_of_two_nodes_into_one_page_leave_one_of_the_two_pages() {
    let s = Shared::new(3);
    let mut maps = [0, 1].map(|at| Mapping::new(&s.files[at], 3 * PAGE, true).expect("it can be mapped"));
    for round in 0..20u8 {
        let bytes = [b'A' + round, b'a' + round];
        s.files[0].write_all_at(&[b'-'; PAGE], PAGE as u64).expect("a write");
        // Each into a half of its own. The other half is what the page has been: not what the other node stores there.
        let pages = [[vec![bytes[0]; PAGE / 2], vec![b'-'; PAGE / 2]], [vec![b'-'; PAGE / 2], vec![bytes[1]; PAGE / 2]]];
        for at in [0, 1] {
            assert_eq!(s.files[at].metadata().expect("a look").len(), 3 * PAGE as u64);
            assert!(maps[at].load(PAGE, PAGE).expect("a load") == [b'-'; PAGE], "round {round}: the page as it was");
        }
        for at in [0, 1] {
            maps[at].store(PAGE + at * PAGE / 2, &[bytes[at]; PAGE / 2]).expect("a store");
        }
        let first = usize::from(round) % 2;
        for at in [first, 1 - first] {
            maps[at].sync().expect("msync");
        }
        let now: Vec<Vec<u8>> = s.paths.iter().map(|p| fs::read(p).expect("it can be read")).collect();
        assert!(now[0] == now[1], "round {round}: the nodes see different bytes");
        let page = &now[0][PAGE..2 * PAGE];
        let winner = pages.iter().position(|whole| whole.concat() == page);
        assert_eq!(
            winner,
            Some(1 - first),
            "round {round}: whose page it is (none's: a mixture of both), and who was the second to sync"
        );
        assert!(now[0].len() == 3 * PAGE && now[0][..PAGE].iter().chain(&now[0][2 * PAGE..]).all(|b| *b == b'.'));
    }
    s.cluster.fsck(1);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn stores_into_a_private_mapping_stay_there() {
    let s = Shared::new(3);
    for (round, how) in [(1u8, "read-only"), (2, "for writing"), (3, "read-only")] {
        let read_only = File::open(&s.paths[0]).expect("it opens");
        let file = if how == "read-only" { &read_only } else { &s.files[0] };
        s.files[1].write_all_at(&[round; 3 * PAGE], 0).expect("a write");
        let mut map = Mapping::private(file, 3 * PAGE).expect("it can be mapped");
        file.metadata().expect("a look");
        assert!(map.load(0, 3 * PAGE).expect("a load") == [round; 3 * PAGE], "{how}: what another node wrote");
        map.store(100, &[b'x'; PAGE]).expect("a store");
        map.sync().expect("msync");
        // Another one of the file knows nothing of it, nor does a read on any node.
        let other = Mapping::new(&s.files[0], 3 * PAGE, false).expect("it can be mapped");
        let unchanged = |what: &str, byte: u8| {
            for path in &s.paths {
                assert!(fs::read(path).expect("it can be read") == [byte; 3 * PAGE], "{how}: the file, {what}");
            }
            assert!(other.load(0, 3 * PAGE).expect("a load") == [byte; 3 * PAGE], "{how}: a shared mapping, {what}");
        };
        unchanged("after a store", round);
        // Pages that were stored into are the mapping's own from then on; others are the file's.
        s.files[1].write_all_at(&[round + 100; 3 * PAGE], 0).expect("a write");
        file.metadata().expect("a look");
        let right = [vec![round; 100], vec![b'x'; PAGE], vec![round; PAGE - 100], vec![round + 100; PAGE]].concat();
        assert!(map.load(0, 3 * PAGE).expect("a load") == right, "{how}: after another node's write");
        drop(map);
        unchanged("when the mapping is gone", round + 100);
    }
    s.cluster.fsck(1);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn a_place_in_a_directory_stays_good_while_other_nodes_make_and_remove_names() {
    const NAMES: usize = 3000;
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let dirs = [1, 2].map(|node| cluster.mount(node).join("places"));
    fs::create_dir(&dirs[0]).expect("a directory");
    let make = |dir: &Path, name: &str| drop(File::create(dir.join(name)).expect("a file"));
    (0..NAMES).for_each(|n| make(&dirs[0], &format!("name-{n}")));
    // Who lists is on the node that changes, and on another.
    for (at, changing) in [(1, 0), (0, 0)] {
        let mut listing = sys::Directory::open(&dirs[at]).expect("it opens");
        let mut rest = |from: Option<i64>| -> Vec<(i64, String)> {
            match from {
                None => listing.rewind(),
                Some(place) => listing.seek(place),
            }
            let mut found = Vec::new();
            loop {
                let place = listing.tell();
                let Some((name, _)) = listing.next_entry().expect("it can be listed") else { break found };
                found.push((place, String::from_utf8(name).expect("UTF-8")));
            }
        };
        let before = rest(None);
        assert!(before.len() == NAMES + 2, "{} names", before.len());
        for round in 0..4 {
            // Every third name goes in one round, and is back in the next, between those that come only once.
            for n in 0..NAMES / 3 {
                let name = format!("name-{}", n * 3);
                if round % 2 == 0 {
                    fs::remove_file(dirs[changing].join(name)).expect("it can be removed");
                } else {
                    make(&dirs[changing], &name);
                }
                if n % 4 == 0 {
                    make(&dirs[changing], &format!("new-{at}-{round}-{n}"));
                }
            }
            let number = |name: &str| name.strip_prefix("name-").and_then(|n| n.parse::<usize>().ok());
            let staying = |entries: &[(i64, String)]| -> BTreeSet<String> {
                let names = entries.iter().map(|(_, name)| name);
                names.filter(|name| !name.starts_with("new-") && number(name).is_none_or(|n| n % 3 != 0)).cloned().collect()
            };
            for k in [0, 1, 2, 3, 700, 1500, 1501, 2222, NAMES, NAMES + 1] {
                let found = rest(Some(before[k].0));
                let (stayed, right) = (staying(&found), staying(&before[k..]));
                let lost: Vec<_> = stayed.symmetric_difference(&right).collect();
                assert!(lost.is_empty(), "round {round}, from place {k}: missing, or from before that: {lost:?}");
                let different: BTreeSet<&str> = found.iter().map(|(_, name)| &name[..]).collect();
                assert_eq!(different.len(), found.len(), "round {round}, from place {k}: something is listed twice");
            }
        }
        assert_eq!(fs::read_dir(&dirs[0]).expect("it can be listed").count(), NAMES + 4 * NAMES.div_ceil(12));
        for round in 0..4 {
            for n in (0..NAMES / 3).step_by(4) {
                fs::remove_file(dirs[0].join(format!("new-{at}-{round}-{n}"))).expect("it can be removed");
            }
        }
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn stores_never_bring_back_what_another_node_cut_off() {
    let s = Shared::new(2);
    for round in 0..10 {
        s.files[0].write_all_at(&[b'.'; 2 * PAGE], 0).expect("a write");
        let mut map = Mapping::new(&s.files[0], 2 * PAGE, true).expect("it can be mapped");
        map.store(100, b"stays").expect("a store");
        map.store(PAGE + 100, b"goes").expect("a store");
        s.files[1].set_len(PAGE as u64).expect("it can be cut");
        map.sync().expect("msync");
        drop(map);
        for path in &s.paths {
            let bytes = fs::read(path).expect("it can be read");
            assert_eq!((bytes.len(), &bytes[100..105]), (PAGE, &b"stays"[..]), "round {round}");
        }
        s.files[1].set_len(2 * PAGE as u64).expect("it can grow");
        for path in &s.paths {
            let bytes = fs::read(path).expect("it can be read");
            assert!(bytes.len() == 2 * PAGE && bytes[PAGE..].iter().all(|b| *b == 0), "round {round}: what was cut is back");
        }
    }
    drop(s.cluster);
}

const USER: u32 = 4711;

/// An ordinary user's process, with files open.
fn user(files: &[&Path]) -> Worker {
    Worker::start_as(Some(USER), Path::new(env!("CARGO_BIN_EXE_locks")), files)
}

fn give(path: &Path, uid: u32) {
    std::os::unix::fs::chown(path, Some(uid), Some(uid)).expect("it can be given away");
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("its mode can be set");
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").mode() & 0o7777
}

/// A list for `setxattr`: the owner and a user may do all, others nothing.
fn list_for(user: u32) -> Vec<u8> {
    Acl { owner: 7, named: Some((7, 7)), group: 0, other: 0 }.encode_for(user)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn an_access_list_is_never_an_older_one() {
    const LIST: &str = "system.posix_acl_access";
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1).join("file"), cluster.mount(2).join("file"));
    fs::write(&here, "bytes").expect("a file");
    let held = File::open(&there).expect("it opens");
    for round in 0..60u32 {
        let list = list_for(1000 + round);
        sys::set_xattr(&here, LIST, &list).expect("the list can be set");
        // Through a descriptor, and by name; nobody looks at the attributes.
        for _ in 0..2 {
            assert_eq!(sys::get_xattr_of(&held, LIST).expect("the list"), list, "round {round}");
        }
        if round % 3 == 0 {
            assert_eq!(sys::get_xattr(&there, LIST).expect("the list"), list, "round {round}");
        }
        if round % 5 == 0 {
            sys::remove_xattr(&here, LIST).expect("it can be removed");
            let none = sys::get_xattr_of(&held, LIST).expect_err("no list");
            assert_eq!(none.raw_os_error(), Some(libc::ENODATA), "round {round}");
        }
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn records_of_a_megabyte_appended_from_two_nodes_are_whole() {
    const RECORD: usize = 1020 * 1024;
    const RECORDS: usize = 12;
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let path = |node: usize| cluster.mount(node).join("log");
    File::create(path(1)).expect("a file");
    let writers = [1usize, 2].map(|node| {
        let mut log = fs::OpenOptions::new().append(true).open(path(node)).expect("it opens");
        std::thread::spawn(move || {
            for n in 0..RECORDS {
                // At no particular place in memory.
                let record = vec![(node * 100 + n) as u8; RECORD + 1];
                assert_eq!(io::Write::write(&mut log, &record[1..]).expect("it can be appended"), RECORD);
            }
        })
    });
    writers.into_iter().for_each(|writer| writer.join().expect("appending goes on"));
    for node in [1, 2] {
        let log = fs::read(path(node)).expect("it can be read");
        assert_eq!(log.len(), 2 * RECORDS * RECORD);
        let mut records: Vec<u8> = log
            .chunks(RECORD)
            .map(|record| {
                assert!(record.iter().all(|b| *b == record[0]), "a record is torn");
                record[0]
            })
            .collect();
        records.sort_unstable();
        let right: Vec<u8> = [1usize, 2].iter().flat_map(|node| (0..RECORDS).map(move |n| (node * 100 + n) as u8)).collect();
        assert_eq!(records, right);
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_a_synchronous_descriptor_was_told_is_done_survives_all_daemons() {
    let cluster = RealCluster::up(&Options::default());
    let dir = cluster.mount(1);
    fs::write(dir.join("source"), vec![b's'; 300_000]).expect("a file");
    let source = File::open(dir.join("source")).expect("it opens");
    let open = |name: &str, how| {
        fs::File::create(dir.join(name)).expect("a file");
        sys::open(&dir.join(name), true, how).expect("it opens")
    };
    for how in [libc::O_SYNC, libc::O_DSYNC] {
        let [written, copied, reserved] = ["written", "copied", "reserved"].map(|name| open(&format!("{name}-{how}"), how));
        written.write_all_at(&[b'w'; 300_000], 0).expect("it can be written");
        let mut done = 0;
        while done < 300_000 {
            done += sys::copy_range(&source, done as u64, &copied, done as u64, 300_000 - done).expect("it can be copied");
        }
        sys::fallocate(&reserved, 0, 0, 300_000).expect("it can be reserved");
    }
    cluster.kill(&[1, 2, 3]);
    cluster.start(&[1, 2, 3]);
    cluster.wait_healthy();
    for how in [libc::O_SYNC, libc::O_DSYNC] {
        for (name, byte) in [("written", b'w'), ("copied", b's'), ("reserved", 0)] {
            let bytes = fs::read(cluster.mount(2).join(format!("{name}-{how}"))).expect("it is there");
            assert!(bytes.len() == 300_000 && bytes.iter().all(|b| *b == byte), "{name}: {} bytes", bytes.len());
        }
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn who_has_lost_a_file_to_another_owner_on_another_node_cannot_change_its_attributes() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1), cluster.mount(2));
    let changes = [
        "chmod 0 4755".to_owned(),
        "chmod 0 600".to_owned(),
        "times 0 5".to_owned(),
        format!("setxattr 0 system.posix_acl_access {}", hex(&list_for(USER))),
        format!("chgrp 0 {USER}"),
        format!("chown 0 {USER}"),
    ];
    for (n, change) in changes.iter().enumerate() {
        let path = here.join(format!("file-{n}"));
        fs::write(&path, "bytes").expect("a file");
        set_mode(&path, 0o644);
        give(&path, USER);
        let mut owner = user(&[&there.join(format!("file-{n}"))]);
        // As long as it is theirs they may.
        assert_eq!(owner.ask(change), ok(), "{change}");
        assert_eq!(owner.ask("chmod 0 666"), ok());
        give(&path, 0);
        let (mode, m) = (mode(&path), fs::metadata(&path).expect("it is there"));
        assert_eq!(owner.ask(change), Err(libc::EPERM), "{change}, when the file belongs to another\n{}", cluster.logs());
        let now = fs::metadata(&path).expect("it is there");
        assert_eq!((now.mode() & 0o7777, now.uid(), now.gid(), now.mtime()), (mode, 0, 0, m.mtime()), "{change}");
        // What is open stays open, and who may write may say that it was now.
        assert_eq!((owner.ask("write 0 more"), owner.ask("now 0")), (ok(), ok()));
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn whatever_changes_a_program_takes_set_user_id_away_wherever_it_was_given() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let (here, there) = (cluster.mount(1).join("program"), cluster.mount(2).join("program"));
    fs::write(&here, vec![1; 20_000]).expect("a file");
    set_mode(&here, 0o666);
    let source = cluster.mount(2).join("source");
    fs::write(&source, vec![2; 5000]).expect("a file");
    set_mode(&source, 0o666);
    let mut writer = user(&[&there, &source]);
    for change in ["write 0 xyz", "truncate 0 10000", "truncate 0 30000", "allocate 0 50000", "punch 0 5000", "copy 1 0 4000"] {
        set_mode(&here, 0o4777);
        assert_eq!(writer.ask(change), ok(), "{change}");
        assert_eq!((mode(&here), mode(&there)), (0o777, 0o777), "{change}");
        // Set-group-id of what the group may not execute is left to its members.
        for (group, left) in [(USER, 0o2767), (0, 0o767)] {
            std::os::unix::fs::chown(&here, None, Some(group)).expect("it gets a group");
            set_mode(&here, 0o6767);
            assert_eq!(writer.ask(change), ok(), "{change}");
            assert_eq!((mode(&here), mode(&there)), (left, left), "{change}, group {group}");
        }
    }
}

type Said = Result<usize, i32>;

fn said<T>(result: io::Result<T>, value: impl Fn(T) -> usize) -> Said {
    result.map(value).map_err(|e| e.raw_os_error().unwrap_or(-1))
}

/// What calls about extended attributes say of a new file, a directory and a link there. Ends with what takes more room than
/// some file systems have for it.
fn xattr_calls(dir: &Path) -> Vec<(String, Said)> {
    let (file, sub, link) = (dir.join("file"), dir.join("sub"), dir.join("link"));
    fs::write(&file, "bytes").expect("a file");
    fs::create_dir(&sub).expect("a directory");
    symlink("file", &link).expect("a link");
    let mut out = Vec::new();
    let set = |path: &Path, name: &[u8], len: usize, flags| said(sys::set_xattr_how(path, name, &vec![7; len], flags), |()| 0);
    let get = |path: &Path, name: &[u8], size| said(sys::get_xattr_into(path, name, size), |n| n);
    let list = |path: &Path, size| said(sys::list_xattr_into(path, size), |n| n);
    let (create, replace) = (libc::XATTR_CREATE, libc::XATTR_REPLACE);
    let long = [b"user.".to_vec(), vec![b'n'; 250]].concat();
    let longer = [&long[..], b"n"].concat();
    {
        let mut note = |what: &str, said: Said| out.push((what.to_owned(), said));
        note("a list of none", list(&file, 100));
        note("get none", get(&file, b"user.a", 100));
        note("get none, asking for its size", get(&file, b"user.a", 0));
        note("replace none", set(&file, b"user.a", 1, replace));
        note("create", set(&file, b"user.a", 100, create));
        note("create again", set(&file, b"user.a", 100, create));
        note("replace", set(&file, b"user.a", 101, replace));
        note("both flags on one that is", set(&file, b"user.a", 101, create | replace));
        note("both flags on none", set(&file, b"user.none", 101, create | replace));
        note("unknown flag", set(&file, b"user.a", 1, 4));
        note("its size", get(&file, b"user.a", 0));
        note("a buffer that is too small", get(&file, b"user.a", 100));
        note("a buffer that is just right", get(&file, b"user.a", 101));
        note("an empty value", set(&file, b"user.empty", 0, 0));
        note("its size", get(&file, b"user.empty", 0));
        note("it, into a buffer", get(&file, b"user.empty", 10));
        note("the list's size", list(&file, 0));
        note("the list, a byte too small", list(&file, 17));
        note("the list", list(&file, 18));
        note("the longest name", set(&file, &long, 3, 0));
        note("the longest name, got", get(&file, &long, 10));
        note("a name that is too long", set(&file, &longer, 3, 0));
        note("a name that is too long, got", get(&file, &longer, 3));
        note("no name", set(&file, b"", 3, 0));
        note("no name, got", get(&file, b"", 3));
        for space in ["user.", "trusted.", "security.", "user", "system.", "other.", "system.x", "other.x"] {
            note(&format!("set {space}"), set(&file, space.as_bytes(), 3, 0));
            note(&format!("get {space}"), get(&file, space.as_bytes(), 3));
            let gone = said(sys::remove_xattr(&file, space), |()| 0);
            note(&format!("remove {space}"), gone);
        }
        note("trusted", set(&file, b"trusted.t", 5, 0));
        note("security", set(&file, b"security.s", 5, 0));
        note("security, got", get(&file, b"security.s", 50));
        note("a directory's", set(&sub, b"user.d", 5, 0));
        note("a link's target's", set(&link, b"user.l", 5, 0));
        note("that, got", get(&file, b"user.l", 5));
        note("remove", said(sys::remove_xattr(&file, "user.l"), |()| 0));
        note("remove again", said(sys::remove_xattr(&file, "user.l"), |()| 0));
        note("the list's size with all", list(&file, 0));
        note("longer than any value may be", set(&file, b"user.big", 65_537, 0));
    }
    out
}

/// What only some local file systems have room for: values and lists of 64 KiB.
fn large_xattrs(dir: &Path) {
    let file = dir.join("large");
    fs::write(&file, "bytes").expect("a file");
    let value = |seed: u8| (0..65_536u32).map(|i| (i % 251) as u8 ^ seed).collect::<Vec<u8>>();
    let names = ["user.big", "trusted.big", "security.big"];
    for (seed, name) in names.iter().enumerate() {
        sys::set_xattr(&file, name, &value(seed as u8)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for (seed, name) in names.iter().enumerate() {
        assert!(sys::get_xattr(&file, name).expect("its value") == value(seed as u8), "{name}");
        assert_eq!(said(sys::get_xattr_into(&file, name.as_bytes(), 65_535), |n| n), Err(libc::ERANGE));
        assert_eq!(said(sys::get_xattr_into(&file, name.as_bytes(), 0), |n| n), Ok(65_536));
    }
    for name in names {
        sys::remove_xattr(&file, name).expect("it can be removed");
    }
    // 256 names of 255 bytes, each with a zero behind it, are a list of 64 KiB: the longest that there is.
    for n in 0..256 {
        let name = format!("user.{n:0>250}");
        sys::set_xattr(&file, &name, &[n as u8; 3]).unwrap_or_else(|e| panic!("name {n}: {e}"));
    }
    assert_eq!(said(sys::list_xattr_into(&file, 0), |n| n), Ok(65_536));
    assert_eq!(said(sys::list_xattr_into(&file, 65_535), |n| n), Err(libc::ERANGE));
    assert_eq!(sys::list_xattr(&file).expect("the list").len(), 256);
    sys::set_xattr(&file, "user.one-more", b"x").expect("one more");
    assert_eq!(said(sys::list_xattr_into(&file, 65_535), |n| n), Err(libc::ERANGE));
    for size in [65_536, 200_000] {
        assert_eq!(said(sys::list_xattr_into(&file, size), |n| n), Err(libc::E2BIG), "a list longer than Linux can tell");
    }
    assert_eq!(sys::get_xattr(&file, &format!("user.{:0>250}", 255)).expect("its value"), [255; 3]);
    sys::remove_xattr(&file, "user.one-more").expect("it can be removed");
    assert_eq!(sys::list_xattr(&file).expect("the list").len(), 256);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn extended_attributes_are_as_on_a_local_file_system() {
    let cluster = RealCluster::up(&Options { nodes: 2, ..Options::default() });
    let got = xattr_calls(&cluster.mount(1));
    // ext4 and XFS say the same; other local file systems, on which this may be run, have rules of their own.
    let local = tempfile::tempdir_in(cluster.dir()).expect("a directory");
    let kind = nix::sys::statfs::statfs(local.path()).expect("statfs").filesystem_type();
    if [nix::sys::statfs::EXT4_SUPER_MAGIC, nix::sys::statfs::XFS_SUPER_MAGIC].contains(&kind) {
        for (got, right) in got.iter().zip(xattr_calls(local.path())) {
            assert_eq!(*got, right);
        }
    }
    let said = |what: &str| got.iter().find(|(name, _)| name == what).map(|(_, said)| *said);
    for (what, right) in [
        ("get none", Err(libc::ENODATA)),
        ("replace none", Err(libc::ENODATA)),
        ("create again", Err(libc::EEXIST)),
        ("a buffer that is too small", Err(libc::ERANGE)),
        ("the list, a byte too small", Err(libc::ERANGE)),
        ("the list", Ok(18)),
        ("a name that is too long", Err(libc::ERANGE)),
        ("set user.", Err(libc::EINVAL)),
        ("set other.x", Err(libc::EOPNOTSUPP)),
        ("longer than any value may be", Err(libc::E2BIG)),
    ] {
        assert_eq!(said(what), Some(right), "{what}");
    }
    large_xattrs(&cluster.mount(1));
    assert_eq!(sys::list_xattr(&cluster.mount(2).join("large")).expect("the list, on another node").len(), 256);
    cluster.fsck(2);
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn renames_that_contradict_themselves_are_refused() {
    let cluster = RealCluster::up(&Options { nodes: 1, ..Options::default() });
    let (a, b) = (cluster.mount(1).join("a"), cluster.mount(1).join("b"));
    fs::write(&a, "a").expect("a file");
    fs::write(&b, "b").expect("a file");
    let (exchange, others) = (libc::RENAME_EXCHANGE, [libc::RENAME_NOREPLACE, libc::RENAME_WHITEOUT]);
    for flags in others.map(|other| exchange | other).into_iter().chain([1 << 10]) {
        let error = sys::rename(&a, &b, flags).expect_err("it contradicts itself");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{flags:x}");
    }
    assert_eq!((fs::read(&a).expect("a"), fs::read(&b).expect("b")), (b"a".to_vec(), b"b".to_vec()));
    sys::rename(&a, &b, exchange).expect("they change places");
    assert_eq!((fs::read(&a).expect("a"), fs::read(&b).expect("b")), (b"b".to_vec(), b"a".to_vec()));
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_a_file_owns_is_counted_found_and_refused_as_documented() {
    let cluster = RealCluster::up(&Options { nodes: 1, ..Options::default() });
    let path = cluster.mount(1).join("file");
    fs::write(&path, "").expect("a file");
    let file = sys::open(&path, true, 0).expect("it opens");
    const K: u64 = 1024;
    let blocks = || fs::metadata(&path).expect("it is there").blocks();
    file.set_len(1024 * K).expect("a hole");
    assert_eq!(blocks(), 0);
    assert_eq!(sys::seek(&file, 0, libc::SEEK_DATA).expect_err("a hole").raw_os_error(), Some(libc::ENXIO));
    assert_eq!(sys::seek(&file, 0, libc::SEEK_HOLE).expect("a hole"), 0);
    sys::fallocate(&file, 0, 256 * K, 64 * K).expect("reserved");
    let reserved = blocks();
    assert!((128..160).contains(&reserved), "{reserved}");
    assert_eq!(sys::seek(&file, 0, libc::SEEK_DATA).expect("zeros are data"), 256 * K);
    assert_eq!(sys::seek(&file, 256 * K as i64, libc::SEEK_HOLE).expect("a hole"), 320 * K);
    sys::fallocate(&file, libc::FALLOC_FL_KEEP_SIZE, 2048 * K, 64 * K).expect("reserved beyond the end");
    assert_eq!(file.metadata().expect("it is there").len(), 1024 * K);
    assert!(blocks() >= reserved + 128);
    sys::fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 256 * K, 64 * K).expect("a hole");
    assert!(blocks() <= reserved + 32, "{}", blocks());
    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE, libc::FALLOC_FL_UNSHARE_RANGE] {
        let error = sys::fallocate(&file, mode, 0, 64 * K).expect_err("it is not supported");
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{mode:x}");
    }
}

#[test]
#[ignore = "needs root and /dev/fuse: run by ci"]
fn what_is_not_supported_says_so() {
    const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
    let cluster = RealCluster::up(&Options { nodes: 1, ..Options::default() });
    let root = cluster.mount(1);
    let unnamed = sys::open(&root, true, libc::O_TMPFILE).expect_err("there are no unnamed files");
    assert_eq!(unnamed.raw_os_error(), Some(libc::EOPNOTSUPP));
    let path = root.join("file");
    fs::write(&path, "file").expect("a file");
    let file = File::open(&path).expect("it opens");
    let mut flags = [0u32; 2];
    // SAFETY: the descriptor is open, and the place has room for a `long`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFLAGS as _, flags.as_mut_ptr()) };
    assert_eq!((result, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::ENOTTY)));
    let told = sys::statx(&path).expect("it is there").stx_mask;
    assert_eq!((told & libc::STATX_BASIC_STATS, told & libc::STATX_BTIME), (libc::STATX_BASIC_STATS, 0));
}
