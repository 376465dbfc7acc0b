use super::*;
use crate::inode::FileKind;
use sld::memory::MemoryDisk;

pub(crate) fn clock() -> Clock {
    let ticks = AtomicU64::new(1_000_000_000_000);
    Arc::new(move || Time::from_nanos(ticks.fetch_add(1000, Ordering::Relaxed)))
}

pub(crate) async fn fresh(mirrors: &[u32]) -> FileSystem<MemoryDisk> {
    let disk = MemoryDisk::new(mirrors);
    let clock = clock();
    let params =
        FormatParams { uuid: [1; 16], hash_key: [2; 16], label: "test".into(), uid: 0, gid: 0, mode: 0o755, now: clock() };
    FileSystem::format(&disk, &params).await.unwrap();
    FileSystem::mount(disk, clock).await.unwrap()
}

pub(crate) const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };

async fn names(fs: &FileSystem<MemoryDisk>, dir: Ino) -> Vec<String> {
    let mut names = Vec::new();
    let mut sink = |entry: DirEntry| {
        names.push(String::from_utf8_lossy(&entry.name).into_owned());
        true
    };
    fs.read_directory(dir, 2, &mut sink, false).await.unwrap();
    names.sort();
    names
}

#[tokio::test]
async fn names_are_made_found_listed_and_removed() {
    let fs = fresh(&[4096, 4096]).await;
    let root = fs.root();
    let free = fs.stat_fs().await.unwrap().free;
    let dir = fs.make(&ROOT, root, b"dir", NewNode::Directory, 0o755).await.unwrap();
    assert_eq!((dir.kind, dir.nlink, dir.mode), (FileKind::Directory, 2, 0o040_755));
    assert_eq!(fs.attributes(root).await.unwrap().nlink, 3);
    let file = fs.make(&ROOT, dir.ino, b"file", NewNode::File, 0o644).await.unwrap();
    assert_eq!(fs.lookup(dir.ino, b"file").await.unwrap(), file);
    assert_eq!(fs.make(&ROOT, dir.ino, b"file", NewNode::File, 0o644).await, Err(FsError::Exists));
    assert_eq!(fs.lookup(dir.ino, b"other").await, Err(FsError::NotFound));
    assert_eq!(fs.lookup(dir.ino, b"..").await.unwrap().ino, root);
    assert_eq!(fs.lookup(file.ino, b"x").await, Err(FsError::NotDirectory));
    let long = vec![b'x'; 4000];
    let link = fs.make(&ROOT, dir.ino, b"long", NewNode::Symlink(&long), 0o777).await.unwrap();
    assert_eq!((link.size, fs.read_link(link.ino).await.unwrap().to_vec()), (4000, long));
    let link = fs.make(&ROOT, dir.ino, b"short", NewNode::Symlink(b"target"), 0o777).await.unwrap();
    assert_eq!(fs.read_link(link.ino).await.unwrap(), &b"target"[..]);
    assert_eq!(names(&fs, dir.ino).await, ["file", "long", "short"]);
    assert_eq!(fs.link(file.ino, root, b"second").await.unwrap().nlink, 2);
    assert_eq!(fs.unlink(&ROOT, root, b"dir").await, Err(FsError::IsDirectory));
    assert_eq!(fs.rmdir(&ROOT, dir.ino, b"file").await, Err(FsError::NotDirectory));
    assert_eq!(fs.rmdir(&ROOT, root, b"dir").await, Err(FsError::NotEmpty));
    for name in [&b"file"[..], b"long", b"short"] {
        fs.unlink(&ROOT, dir.ino, name).await.unwrap();
    }
    assert_eq!(fs.lookup(root, b"second").await.unwrap().nlink, 1);
    fs.rmdir(&ROOT, root, b"dir").await.unwrap();
    assert_eq!(fs.attributes(root).await.unwrap().nlink, 2);
    fs.unlink(&ROOT, root, b"second").await.unwrap();
    assert_eq!(fs.unlink(&ROOT, root, b"second").await, Err(FsError::NotFound));
    assert_eq!(fs.stat_fs().await.unwrap().free, free);
    assert_eq!(fs.attributes(file.ino).await, Err(FsError::Stale));
}

#[tokio::test]
async fn rename_moves_replaces_and_exchanges() {
    let fs = fresh(&[4096]).await;
    let root = fs.root();
    let free = fs.stat_fs().await.unwrap().free;
    let a = fs.make(&ROOT, root, b"a", NewNode::Directory, 0o755).await.unwrap().ino;
    let b = fs.make(&ROOT, root, b"b", NewNode::Directory, 0o755).await.unwrap().ino;
    let f = fs.make(&ROOT, a, b"f", NewNode::File, 0o644).await.unwrap().ino;
    let g = fs.make(&ROOT, b, b"g", NewNode::File, 0o644).await.unwrap().ino;
    let go = |p, n: &'static [u8], q, m: &'static [u8], flags| {
        let fs = &fs;
        async move { fs.rename(&ROOT, p, n, q, m, flags).await }
    };
    use RenameFlags::{Exchange, NoReplace, Replace};
    assert_eq!(go(a, b"f", b, b"g", NoReplace).await, Err(FsError::Exists));
    go(a, b"f", b, b"g", Replace).await.unwrap();
    assert_eq!(fs.lookup(b, b"g").await.unwrap().ino, f);
    assert_eq!(fs.attributes(g).await, Err(FsError::Stale));
    assert_eq!(names(&fs, a).await, [""; 0]);
    assert!(matches!(go(root, b"a", a, b"x", Replace).await, Err(FsError::Invalid(_))));
    go(root, b"a", b, b"sub", Replace).await.unwrap();
    assert_eq!((fs.attributes(root).await.unwrap().nlink, fs.attributes(b).await.unwrap().nlink), (3, 3));
    assert!(matches!(go(root, b"b", a, b"x", Replace).await, Err(FsError::Invalid(_))));
    assert_eq!(go(b, b"sub", b, b"g", Replace).await, Err(FsError::NotDirectory));
    assert_eq!(go(b, b"g", b, b"sub", Replace).await, Err(FsError::IsDirectory));
    assert_eq!(go(root, b"none", b, b"sub", Replace).await, Err(FsError::NotFound));
    go(b, b"g", b, b"sub", Exchange).await.unwrap();
    assert_eq!((fs.lookup(b, b"sub").await.unwrap().ino, fs.lookup(b, b"g").await.unwrap().ino), (f, a));
    assert_eq!(fs.attributes(f).await.unwrap().nlink, 1);
    fs.link(f, root, b"again").await.unwrap();
    go(root, b"again", b, b"sub", Replace).await.unwrap();
    assert_eq!(fs.attributes(f).await.unwrap().nlink, 2);
    go(b, b"g", root, b"g", Replace).await.unwrap();
    assert_eq!(fs.lookup(a, b"..").await.unwrap().ino, root);
    fs.rmdir(&ROOT, root, b"g").await.unwrap();
    fs.unlink(&ROOT, root, b"again").await.unwrap();
    fs.unlink(&ROOT, b, b"sub").await.unwrap();
    fs.rmdir(&ROOT, root, b"b").await.unwrap();
    assert_eq!(fs.stat_fs().await.unwrap().free, free);
}

#[tokio::test]
async fn an_open_file_lives_until_its_last_close() {
    let fs = fresh(&[4096]).await;
    let root = fs.root();
    let free = fs.stat_fs().await.unwrap().free;
    let f = fs.make(&ROOT, root, b"f", NewNode::File, 0o644).await.unwrap().ino;
    for _ in 0..2 {
        fs.open(f, OpenFlags::default()).await.unwrap();
    }
    fs.unlink(&ROOT, root, b"f").await.unwrap();
    assert_eq!(fs.attributes(f).await.unwrap().nlink, 0);
    assert_eq!(fs.link(f, root, b"g").await, Err(FsError::NotFound));
    fs.close(f).await.unwrap();
    assert!(fs.attributes(f).await.is_ok());
    fs.disk().set_open_elsewhere(f.object(), true);
    fs.close(f).await.unwrap();
    assert!(fs.attributes(f).await.is_ok());
    fs.disk().set_open_elsewhere(f.object(), false);
    assert!(fs.reclaim(f).await.unwrap());
    assert_eq!(fs.stat_fs().await.unwrap().free, free);
    // Who frees it waits until it is known who has it open.
    for open in [true, false] {
        let f = fs.make(&ROOT, root, b"f", NewNode::File, 0o644).await.unwrap().ino;
        fs.disk().set_in_doubt(true);
        let known = async {
            tokio::task::yield_now().await;
            assert_eq!(fs.attributes(f).await.unwrap().nlink, 0);
            fs.disk().set_open_elsewhere(f.object(), open);
            fs.disk().set_in_doubt(false);
        };
        let (removed, ()) = tokio::join!(fs.unlink(&ROOT, root, b"f"), known);
        removed.unwrap();
        assert_eq!(fs.attributes(f).await.is_ok(), open);
    }
}

#[tokio::test]
async fn an_inode_may_have_thousands_of_names() {
    let fs = fresh(&[16384]).await;
    let root = fs.root();
    let free = fs.stat_fs().await.unwrap().free;
    let f = fs.make(&ROOT, root, b"f", NewNode::File, 0o644).await.unwrap().ino;
    for i in 0..300 {
        assert_eq!(fs.link(f, root, format!("l{i}").as_bytes()).await.unwrap().nlink, i + 2);
    }
    for i in 0..300 {
        fs.rename(&ROOT, root, format!("l{i}").as_bytes(), root, format!("m{i}").as_bytes(), RenameFlags::Replace).await.unwrap();
    }
    assert_eq!(names(&fs, root).await.len(), 301);
    for i in 0..300 {
        fs.unlink(&ROOT, root, format!("m{i}").as_bytes()).await.unwrap();
    }
    assert_eq!(fs.lookup(root, b"f").await.unwrap().nlink, 1);
    fs.unlink(&ROOT, root, b"f").await.unwrap();
    assert_eq!(fs.stat_fs().await.unwrap().free, free);
}

#[tokio::test]
async fn a_listing_shows_the_names_of_one_moment() {
    let fs = fresh(&[4096]).await;
    let root = fs.root();
    for name in ["b", "a", "d"] {
        fs.make(&ROOT, root, name.as_bytes(), NewNode::File, 0o644).await.unwrap();
    }
    let b = fs.lookup(root, b"b").await.unwrap().ino;
    // The listing has read the names, and waits for what is known of the first one.
    let held = fs.disk().acquire(&[(b.object(), sld::Mode::Exclusive)]).await.unwrap();
    let mut listed = Vec::new();
    let mut sink = |entry: DirEntry| {
        listed.push(entry.name.to_vec());
        true
    };
    let rename = async {
        tokio::task::yield_now().await;
        fs.rename(&ROOT, root, b"a", root, b"d", RenameFlags::Replace).await.unwrap();
        drop(held);
    };
    let (result, ()) = tokio::join!(fs.read_directory(root, 2, &mut sink, true), rename);
    result.unwrap();
    listed.sort();
    assert_eq!(listed, [b"b", b"d"]);
}

#[tokio::test]
async fn the_operations_may_move_between_threads() {
    fn send<T: Send>(value: T) -> T {
        value
    }
    let fs = fresh(&[4096]).await;
    let root = fs.root();
    let mut sink = |_: DirEntry| true;
    send(fs.lookup(root, b"a")).await.unwrap_err();
    send(fs.make(&ROOT, root, b"a", NewNode::File, 0)).await.unwrap();
    send(fs.rename(&ROOT, root, b"a", root, b"b", RenameFlags::Replace)).await.unwrap();
    send(fs.read_directory(root, 0, &mut sink, true)).await.unwrap();
    send(fs.set_attributes(&ROOT, root, SetAttributes::default())).await.unwrap();
    send(fs.unlink(&ROOT, root, b"b")).await.unwrap();
    send(fs.fsync(root, false)).await.unwrap();
    send(fs.close(root)).await.unwrap();
}

async fn assert_clean(fs: &FileSystem<MemoryDisk>) {
    let report = crate::check::check(&crate::check::DiskSource(fs.disk().clone()), &mut |_| {}).await.unwrap();
    assert!(report.is_clean(), "{:?}", report.issues);
}

#[tokio::test]
async fn a_large_directory_is_listed_whole_while_it_changes() {
    const COUNT: usize = 100_000;
    let fs = fresh(&[1 << 18]).await;
    let root = fs.root();
    let dir = fs.make(&ROOT, root, b"big", NewNode::Directory, 0o755).await.unwrap().ino;
    let target = fs.make(&ROOT, root, b"f", NewNode::File, 0o644).await.unwrap().ino;
    for i in 0..COUNT {
        fs.make(&ROOT, dir, format!("file-{i:06}").as_bytes(), NewNode::File, 0o644).await.unwrap();
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut cookie = 0;
    let mut round = 0;
    loop {
        let mut got = Vec::new();
        let mut sink = |entry: DirEntry| {
            got.push(entry);
            got.len() < 997
        };
        fs.read_directory(dir, cookie, &mut sink, round % 16 == 0).await.unwrap();
        // The sink's last entry was refused: it comes again.
        let full = got.len() == 997;
        if full {
            got.pop();
        }
        for entry in &got {
            cookie = entry.next_cookie;
            if entry.name.starts_with(b"file-") {
                assert!(seen.insert(entry.name.clone()), "{:?} twice", entry.name);
            }
        }
        if !full {
            break;
        }
        for i in 0..20 {
            fs.link(target, dir, format!("new-{round}-{i}").as_bytes()).await.unwrap();
        }
        for i in 0..10 {
            fs.unlink(&ROOT, dir, format!("new-{round}-{i}").as_bytes()).await.unwrap();
        }
        round += 1;
    }
    assert_eq!(seen.len(), COUNT);
    assert_eq!(fs.rmdir(&ROOT, root, b"big").await, Err(FsError::NotEmpty));
    for i in (0..COUNT).filter(|i| i % 10 != 0) {
        fs.unlink(&ROOT, dir, format!("file-{i:06}").as_bytes()).await.unwrap();
    }
    assert_clean(&fs).await;
}

/// Many tasks at once, on few names: the order is theirs, but nothing is lost, leaked or damaged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_at_the_same_time_leave_a_clean_file_system() {
    let fs = Arc::new(fresh(&[8192, 8192]).await);
    let free = fs.stat_fs().await.unwrap().free;
    let root = fs.root();
    let mut dirs = vec![root];
    for name in [b"a", b"b", b"c"] {
        dirs.push(fs.make(&ROOT, root, name, NewNode::Directory, 0o755).await.unwrap().ino);
    }
    let tasks: Vec<_> = (0..8u64)
        .map(|task| {
            let (fs, dirs) = (fs.clone(), dirs.clone());
            tokio::spawn(async move {
                let mut state = task * 7919 + 1;
                let mut below = |bound: usize| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    ((state >> 33) as usize) % bound
                };
                for _ in 0..600 {
                    let (from, to) = (dirs[below(4)], dirs[below(4)]);
                    let names: [&[u8]; 6] = [b"x", b"y", b"z", b"a", b"b", b"dir"];
                    let (old, new) = (names[below(6)], names[below(6)]);
                    let result = match below(8) {
                        0 | 1 => fs.make(&ROOT, from, old, NewNode::File, 0o644).await.map(|_| ()),
                        2 => fs.make(&ROOT, from, old, NewNode::Directory, 0o755).await.map(|_| ()),
                        3 => fs.unlink(&ROOT, from, old).await,
                        4 => fs.rmdir(&ROOT, from, old).await,
                        5 => match fs.lookup(from, old).await {
                            Ok(found) => {
                                let opened = fs.open(found.ino, OpenFlags::default()).await;
                                let linked = fs.link(found.ino, to, new).await.map(|_| ());
                                if opened.is_ok() {
                                    fs.close(found.ino).await.unwrap();
                                }
                                linked
                            }
                            Err(error) => Err(error),
                        },
                        6 => {
                            let mut sink = |_: DirEntry| true;
                            fs.read_directory(from, 0, &mut sink, true).await
                        }
                        _ => {
                            let flags = [RenameFlags::Replace, RenameFlags::NoReplace, RenameFlags::Exchange][below(3)];
                            fs.rename(&ROOT, from, old, to, new, flags).await
                        }
                    };
                    if let Err(error @ (FsError::Corrupt { .. } | FsError::Disk(_) | FsError::Again)) = result {
                        panic!("{error}");
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_clean(&fs).await;
    // Everything can be removed, and nothing is left.
    let mut pending = vec![root];
    let mut order = Vec::new();
    while let Some(dir) = pending.pop() {
        let mut sink = |entry: DirEntry| {
            order.push((dir, entry.name.clone(), entry.kind));
            if entry.kind == FileKind::Directory {
                pending.push(entry.ino);
            }
            true
        };
        fs.read_directory(dir, 2, &mut sink, false).await.unwrap();
    }
    for (dir, name, kind) in order.into_iter().rev() {
        match kind {
            FileKind::Directory => fs.rmdir(&ROOT, dir, &name).await.unwrap(),
            _ => fs.unlink(&ROOT, dir, &name).await.unwrap(),
        }
    }
    assert_clean(&fs).await;
    assert_eq!(fs.stat_fs().await.unwrap().free, free);
}

#[tokio::test]
async fn a_full_disk_refuses_and_recovers() {
    let fs = fresh(&[70, 70]).await;
    let root = fs.root();
    let free = fs.stat_fs().await.unwrap().free;
    let dir = fs.make(&ROOT, root, b"dir", NewNode::Directory, 0o755).await.unwrap().ino;
    let name = |i: usize| format!("{i:0>180}");
    let mut count = 0;
    let error = loop {
        match fs.make(&ROOT, dir, name(count).as_bytes(), NewNode::File, 0o644).await {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error, FsError::NoSpace);
    assert!(count > 100);
    assert_clean(&fs).await;
    let file = fs.lookup(dir, name(0).as_bytes()).await.unwrap().ino;
    let mut linked = 0;
    loop {
        match fs.link(file, dir, format!("link{linked}").as_bytes()).await {
            Ok(_) => linked += 1,
            Err(error) => break assert_eq!(error, FsError::NoSpace),
        }
    }
    for i in 0..linked {
        let new = format!("{i:0>250}");
        let moved = fs.rename(&ROOT, dir, format!("link{i}").as_bytes(), root, new.as_bytes(), RenameFlags::Replace).await;
        assert!(matches!(moved, Ok(()) | Err(FsError::NoSpace)));
        for (place, name) in [(dir, format!("link{i}")), (root, new)] {
            assert!(matches!(fs.unlink(&ROOT, place, name.as_bytes()).await, Ok(()) | Err(FsError::NotFound)));
        }
    }
    assert_clean(&fs).await;
    for i in 0..count {
        fs.unlink(&ROOT, dir, name(i).as_bytes()).await.unwrap();
    }
    fs.rmdir(&ROOT, root, b"dir").await.unwrap();
    assert_clean(&fs).await;
    // The root has kept at most one leaf of its tree.
    assert!(free - fs.stat_fs().await.unwrap().free <= 1);
}

#[tokio::test]
async fn a_large_file_is_freed_in_bounded_operations() {
    let fs = fresh(&[8192, 8192]).await;
    let root = fs.root();
    let free = fs.stat_fs().await.unwrap().free;
    let file = fs.make(&ROOT, root, b"f", NewNode::File, 0o644).await.unwrap().ino;
    for i in 0..12u64 {
        let payload = data::Payload::new(0, &vec![i as u8; 1 << 20]);
        fs.write(file, data::At::Offset(i * (3 << 20)), payload, false).await.unwrap();
    }
    assert_eq!(fs.attributes(file).await.unwrap().blocks512, 12 * 2048);
    fs.disk().record();
    fs.unlink(&ROOT, root, b"f").await.unwrap();
    let operations = fs.disk().recorded();
    assert!(operations.len() > 5);
    assert!(operations.iter().all(|op| op.writes.len() < 2 * reclaim::FREE_MAX));
    assert_eq!(fs.stat_fs().await.unwrap().free, free);
    assert_clean(&fs).await;
}

#[tokio::test]
async fn an_inode_is_found_by_a_path_while_it_has_one() {
    let fs = fresh(&[4096]).await;
    let root = fs.root();
    assert_eq!(fs.path_of(root).await, Ok(Some(Vec::new())));
    let dir = fs.make(&ROOT, root, b"d", NewNode::Directory, 0o755).await.unwrap().ino;
    let file = fs.make(&ROOT, dir, b"f", NewNode::File, 0o644).await.unwrap().ino;
    assert_eq!(fs.path_of(file).await, Ok(Some(b"d/f".to_vec())));
    fs.link(file, root, b"g").await.unwrap();
    fs.unlink(&ROOT, dir, b"f").await.unwrap();
    assert_eq!(fs.path_of(file).await, Ok(Some(b"g".to_vec())));
    fs.open(file, OpenFlags { read: true, ..OpenFlags::default() }).await.unwrap();
    fs.unlink(&ROOT, root, b"g").await.unwrap();
    assert_eq!(fs.path_of(file).await, Ok(None), "open, without a name");
}

#[tokio::test]
async fn a_loss_is_told_to_those_whom_it_concerns() {
    let fs = fresh(&[4096]).await;
    let root = fs.root();
    let file = fs.make(&ROOT, root, b"f", NewNode::File, 0o644).await.unwrap().ino;
    let lost = Err(FsError::Disk(sld::DiskError::Lost));
    // Something of the entry block was lost, but this name is there.
    fs.disk().lose(FlushTarget::Block(root.block()));
    assert_eq!(fs.fsync(file, false).await, Ok(()));
    // The file itself: once.
    fs.disk().lose(FlushTarget::Object(file.object()));
    assert_eq!(fs.fsync(file, false).await, lost);
    assert_eq!(fs.fsync(file, false).await, Ok(()));
    // Its name: the directory is as it was before.
    let before = fs.disk().image()[&root.block()].clone();
    let other = fs.make(&ROOT, root, b"g", NewNode::File, 0o644).await.unwrap().ino;
    fs.disk().overwrite(root.block(), before.0, before.1);
    fs.disk().lose(FlushTarget::Block(root.block()));
    assert_eq!(fs.fsync(other, false).await, lost);
    fs.disk().lose(FlushTarget::Object(root.object()));
    assert_eq!(fs.fsync_directory(root).await, lost);
    // Whoever closes is told, and then nobody else.
    fs.disk().lose(FlushTarget::Object(file.object()));
    assert!(fs.disk().take_loss(file.object()) && !fs.disk().take_loss(file.object()));
    assert_eq!(fs.fsync(file, false).await, Ok(()));
}

/// An access control list of owner, a named user, owning group, mask (if not 9) and others.
fn acl(owner: u16, named: u16, group: u16, mask: u16, other: u16) -> Vec<u8> {
    let entries = [(1, owner, u32::MAX), (2, named, 1000), (4, group, u32::MAX), (16, mask, u32::MAX), (32, other, u32::MAX)];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries.into_iter().filter(|(tag, _, _)| mask != 9 || ![2, 16].contains(tag)) {
        bytes.extend([(tag as u16).to_le_bytes(), perm.to_le_bytes()].concat());
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

#[tokio::test]
async fn lists_and_modes_follow_each_other() {
    use crate::acl::{ACCESS, DEFAULT};
    use crate::ops::xattr::SetMode::Any;
    let fs = fresh(&[4096]).await;
    let f = fs.make(&ROOT, fs.root(), b"f", NewNode::File, 0o644).await.unwrap().ino;
    let mode = |ino| {
        let fs = &fs;
        async move { fs.attributes(ino).await.unwrap().mode & 0o7777 }
    };
    let chmod = |mode| SetAttributes { mode: Some(mode), ..SetAttributes::default() };
    fs.set_xattr(f, ACCESS, &acl(6, 7, 5, 6, 0), Any).await.unwrap();
    assert_eq!(mode(f).await, 0o660, "the mask is what the group's bits show");
    fs.set_attributes(&ROOT, f, chmod(0o2751)).await.unwrap();
    assert_eq!(fs.get_xattr(f, ACCESS).await.unwrap(), acl(7, 7, 5, 5, 1));
    assert_eq!(fs.list_xattr(f, false).await.unwrap(), b"system.posix_acl_access\0");
    // A list that says no more than the mode becomes the mode.
    fs.set_xattr(f, ACCESS, &acl(6, 0, 4, 9, 0), Any).await.unwrap();
    assert_eq!((mode(f).await, fs.get_xattr(f, ACCESS).await), (0o2640, Err(FsError::NoData)));
    fs.remove_xattr(f, ACCESS).await.unwrap();
    fs.set_attributes(&ROOT, f, chmod(0o600)).await.unwrap();
    assert_eq!(mode(f).await, 0o600);
    assert_eq!(fs.set_xattr(f, DEFAULT, &acl(6, 7, 5, 6, 0), Any).await, Err(FsError::AccessDenied));
    assert!(matches!(fs.set_xattr(f, ACCESS, b"nonsense", Any).await, Err(FsError::NotSupported)));
    let link = fs.make(&ROOT, fs.root(), b"l", NewNode::Symlink(b"f"), 0o777).await.unwrap().ino;
    assert_eq!(fs.set_xattr(link, ACCESS, &acl(6, 7, 5, 6, 0), Any).await, Err(FsError::NotSupported));
}

#[tokio::test]
async fn new_files_inherit_the_default_list() {
    use crate::acl::{ACCESS, DEFAULT};
    use crate::ops::xattr::SetMode::Any;
    let fs = fresh(&[4096]).await;
    let free = fs.stat_fs().await.unwrap().free;
    let caller = Caller { umask: 0o077, ..ROOT };
    let dir = fs.make(&caller, fs.root(), b"dir", NewNode::Directory, 0o777).await.unwrap();
    assert_eq!(dir.mode & 0o777, 0o700, "without a default list the umask counts");
    let default = acl(7, 7, 5, 7, 4);
    fs.set_xattr(dir.ino, DEFAULT, &default, Any).await.unwrap();
    assert_eq!(fs.attributes(dir.ino).await.unwrap().mode & 0o777, 0o700, "a default list is not about the directory");
    let file = fs.make(&caller, dir.ino, b"file", NewNode::File, 0o666).await.unwrap();
    assert_eq!(file.mode & 0o777, 0o664);
    assert_eq!(fs.get_xattr(file.ino, ACCESS).await.unwrap(), acl(6, 7, 5, 6, 4));
    assert_eq!(fs.get_xattr(file.ino, DEFAULT).await, Err(FsError::NoData));
    let sub = fs.make(&caller, dir.ino, b"sub", NewNode::Directory, 0o777).await.unwrap();
    assert_eq!(sub.mode & 0o777, 0o774);
    assert_eq!(fs.get_xattr(sub.ino, DEFAULT).await.unwrap(), default);
    let below = fs.make(&caller, sub.ino, b"below", NewNode::File, 0o600).await.unwrap();
    assert_eq!(fs.get_xattr(below.ino, ACCESS).await.unwrap(), acl(6, 7, 5, 0, 0));
    // A default list that says no more than a mode limits the mode, and leaves no list.
    fs.set_xattr(dir.ino, DEFAULT, &acl(7, 0, 5, 9, 0), Any).await.unwrap();
    let plain = fs.make(&caller, dir.ino, b"plain", NewNode::File, 0o666).await.unwrap();
    assert_eq!((plain.mode & 0o777, fs.get_xattr(plain.ino, ACCESS).await), (0o640, Err(FsError::NoData)));
    // A link has neither.
    let link = fs.make(&caller, dir.ino, b"link", NewNode::Symlink(b"x"), 0o777).await.unwrap();
    assert_eq!(link.mode & 0o777, 0o777);
    for (parent, name) in [(sub.ino, &b"below"[..]), (dir.ino, b"file"), (dir.ino, b"plain"), (dir.ino, b"link")] {
        fs.unlink(&ROOT, parent, name).await.unwrap();
    }
    fs.rmdir(&ROOT, dir.ino, b"sub").await.unwrap();
    fs.rmdir(&ROOT, fs.root(), b"dir").await.unwrap();
    assert_eq!(fs.stat_fs().await.unwrap().free, free);
}

/// As ext4 has it (XFS does not let it inherit anything).
#[tokio::test]
async fn a_whiteout_inherits_the_default_list() {
    use crate::acl::{ACCESS, DEFAULT};
    use crate::ops::xattr::SetMode::Any;
    let fs = fresh(&[4096]).await;
    let free = fs.stat_fs().await.unwrap().free;
    let dir = fs.make(&ROOT, fs.root(), b"dir", NewNode::Directory, 0o777).await.unwrap().ino;
    fs.set_xattr(dir, DEFAULT, &acl(7, 2, 4, 3, 1), Any).await.unwrap();
    for (name, flags) in [(&b"a"[..], RenameFlags::Whiteout), (b"b", RenameFlags::WhiteoutNoReplace)] {
        fs.make(&ROOT, dir, name, NewNode::File, 0o666).await.unwrap();
        fs.rename(&ROOT, dir, name, fs.root(), name, flags).await.unwrap();
        let whiteout = fs.lookup(dir, name).await.unwrap();
        assert_eq!((whiteout.kind, whiteout.mode & 0o7777), (FileKind::CharDevice, 0));
        assert_eq!(fs.get_xattr(whiteout.ino, ACCESS).await.unwrap(), acl(0, 2, 4, 0, 0));
        fs.unlink(&ROOT, dir, name).await.unwrap();
        fs.unlink(&ROOT, fs.root(), name).await.unwrap();
    }
    fs.rmdir(&ROOT, fs.root(), b"dir").await.unwrap();
    assert_eq!(fs.stat_fs().await.unwrap().free, free, "what it had for its list is free again");
}

#[tokio::test]
async fn who_changes_a_program_takes_its_powers_away() {
    use crate::ops::data::{At, Payload};
    use crate::ops::xattr::SetMode::Any;
    const CAPABILITY: &[u8] = b"security.capability";
    let fs = fresh(&[4096]).await;
    for (number, mode) in (0..6).zip([0o6755, 0o755, 0o755, 0o755, 0o6755, 0o6755]) {
        let name = format!("f{number}");
        let f = fs.make(&ROOT, fs.root(), name.as_bytes(), NewNode::File, 0o6755).await.unwrap().ino;
        // Beside others, so that some are in blocks of their own.
        fs.set_xattr(f, b"user.long", &vec![7; 65_536], Any).await.unwrap();
        fs.set_xattr(f, CAPABILITY, &[1; 20], Any).await.unwrap();
        let set = SetAttributes::default();
        match number {
            0 => drop(fs.write(f, At::Offset(0), Payload::new(0, b"x"), false).await.unwrap()),
            1 => drop(fs.write(f, At::Offset(0), Payload::new(0, b"x"), true).await.unwrap()),
            2 => drop(fs.set_attributes(&ROOT, f, SetAttributes { uid: Some(5), ..set }).await.unwrap()),
            3 => drop(fs.set_attributes(&ROOT, f, SetAttributes { size: Some(0), kill: true, ..set }).await.unwrap()),
            4 => drop(fs.set_attributes(&ROOT, f, SetAttributes { size: Some(9), ..set }).await.unwrap()),
            _ => drop(
                fs.set_attributes(&ROOT, f, SetAttributes { mtime: Some(SetTime::To(Time::default())), ..set }).await.unwrap(),
            ),
        }
        assert_eq!(fs.attributes(f).await.unwrap().mode & 0o7777, mode, "change {number}");
        let kept = fs.get_xattr(f, CAPABILITY).await.is_ok();
        assert_eq!(kept, number == 5, "change {number}");
        assert_eq!(fs.get_xattr(f, b"user.long").await.unwrap(), vec![7; 65_536]);
    }
    assert_eq!(fs.set_xattr(fs.root(), b"user.long", &vec![7; 65_537], Any).await, Err(FsError::TooBig));
}

#[tokio::test]
async fn a_directory_with_a_damaged_inode_lists_all_its_names() {
    let fs = fresh(&[4096]).await;
    let mut inodes = Vec::new();
    for name in [&b"a"[..], b"b", b"c"] {
        inodes.push(fs.make(&ROOT, fs.root(), name, NewNode::File, 0o644).await.unwrap().ino);
    }
    let mut image = fs.disk().image();
    let (tag, bytes) = image[&inodes[1].block()].clone();
    let mut bytes = bytes.to_vec();
    bytes[4] = 99; // A version that nobody knows.
    image.insert(inodes[1].block(), (tag, bytes.into()));
    let fs = FileSystem::mount(MemoryDisk::from_image(&[4096], image), clock()).await.unwrap();
    for plus in [false, true] {
        let mut listed = Vec::new();
        let mut sink = |entry: DirEntry| {
            listed.push((entry.ino, entry.attributes.is_some()));
            true
        };
        fs.read_directory(fs.root(), 2, &mut sink, plus).await.unwrap();
        listed.sort_unstable();
        let expected: Vec<_> = inodes.iter().map(|ino| (*ino, plus && *ino != inodes[1])).collect();
        assert_eq!(listed, expected);
    }
    assert_eq!(fs.lookup(fs.root(), b"b").await.unwrap_err().errno(), nix::libc::EIO);
    assert!(fs.lookup(fs.root(), b"a").await.is_ok());
}

#[tokio::test]
async fn a_removed_directory_that_is_open_is_empty_and_takes_no_new_names() {
    let fs = fresh(&[4096]).await;
    let dir = fs.make(&ROOT, fs.root(), b"dir", NewNode::Directory, 0o755).await.unwrap().ino;
    fs.open(dir, OpenFlags::default()).await.unwrap();
    fs.rmdir(&ROOT, fs.root(), b"dir").await.unwrap();
    assert_eq!(names(&fs, dir).await, [""; 0]);
    assert_eq!(fs.attributes(dir).await.unwrap().nlink, 0);
    assert_eq!(fs.make(&ROOT, dir, b"x", NewNode::File, 0o644).await, Err(FsError::NotFound));
    fs.close(dir).await.unwrap();
    assert_eq!(fs.attributes(dir).await, Err(FsError::Stale));
}
