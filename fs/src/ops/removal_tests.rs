//! Removing and replacing what is damaged; freeing in the background; beginning again after the node was cut off.

use super::data::{Allocate, At, Payload, Seek, Terms};
use super::testing::{CutOff, Fixture, fixture};
use super::tests::{ROOT, clock};
use super::xattr::SetMode;
use super::*;
use crate::{NewNode, OpenFlags, RenameFlags, SetAttributes, SetTime};
use cluster::BLOCK_SIZE;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

async fn fill(f: &Fixture, ino: Ino, blocks: u64) {
    let data = vec![7; blocks as usize * BLOCK_SIZE];
    f.fs.write(ino, At::Offset(0), Payload::new(0, &data), false).await.unwrap();
}

/// A structure of an inode, by its kind.
fn owned(f: &Fixture, ino: Ino, kind: Kind) -> BlockNo {
    let image = f.disk.image();
    let mut found = image.iter().filter(|(block, (tag, _))| tag.kind == kind && tag.owner == ino.0 && **block != ino.block());
    *found.next().unwrap().0
}

async fn rename(f: &Fixture, from: &[u8], to: &[u8], flags: RenameFlags) -> Result<()> {
    f.fs.rename(&ROOT, f.fs.root(), from, f.fs.root(), to, flags).await
}

#[tokio::test]
async fn what_is_damaged_can_be_removed_and_replaced_but_not_read() {
    let f = fixture(&[4000]).await;
    let root = f.fs.root();
    for name in [&b"a"[..], b"b", b"c"] {
        let ino = f.file(name).await;
        fill(&f, ino, 3).await;
        f.disk.damage(ino.block());
        let looked_up = f.fs.lookup(root, name).await;
        assert!(looked_up.as_ref().is_err_and(FsError::is_damage), "{looked_up:?}");
        assert!(f.fs.attributes(ino).await.is_err() && f.fs.open(ino, OpenFlags::default()).await.is_err());
        let stand_in = f.fs.lookup_damaged(root, name).await.unwrap().unwrap();
        assert_eq!((stand_in.ino, stand_in.kind, stand_in.mode & 0o7777), (ino, crate::FileKind::File, 0));
    }
    let good = f.file(b"good").await;
    fill(&f, good, 2).await;
    assert_eq!(f.fs.lookup_damaged(root, b"good").await, Ok(None));
    let free = f.disk_free().await;
    // Not moved, not exchanged, not taken for a directory; and not silently made anew.
    assert!(rename(&f, b"a", b"x", RenameFlags::Replace).await.unwrap_err().is_damage());
    assert!(rename(&f, b"good", b"a", RenameFlags::Exchange).await.unwrap_err().is_damage());
    assert_eq!(rename(&f, b"good", b"a", RenameFlags::NoReplace).await, Err(FsError::Exists));
    assert_eq!(f.fs.rmdir(&ROOT, root, b"a").await, Err(FsError::NotDirectory));
    assert!(f.fs.make(&ROOT, root, b"a", NewNode::File, 0o644).await.unwrap_err().is_damage());
    f.fs.make(&ROOT, root, b"dir", NewNode::Directory, 0o755).await.unwrap();
    assert_eq!(rename(&f, b"dir", b"a", RenameFlags::Replace).await, Err(FsError::NotDirectory));
    f.fs.rmdir(&ROOT, root, b"dir").await.unwrap();

    f.fs.unlink(&ROOT, root, b"a").await.unwrap();
    assert_eq!(f.fs.lookup(root, b"a").await, Err(FsError::NotFound));
    rename(&f, b"good", b"b", RenameFlags::Replace).await.unwrap();
    assert_eq!(f.fs.lookup(root, b"b").await.unwrap().ino, good);
    assert_eq!(f.fs.lookup(root, b"good").await, Err(FsError::NotFound));
    f.file(b"new").await;
    rename(&f, b"new", b"c", RenameFlags::Whiteout).await.unwrap();
    assert_eq!(f.fs.lookup(root, b"c").await.unwrap().size, 0);
    assert_eq!(f.disk_free().await, free - 2, "nothing of what is damaged was freed; a file and a whiteout were made");
    let data = f.fs.read(good, 0, 2 * BLOCK_SIZE as u32).await.unwrap().contiguous().to_vec();
    assert!(data.iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn a_directory_of_damaged_files_can_be_emptied_and_removed() {
    let f = fixture(&[4000]).await;
    let dir = f.fs.make(&ROOT, f.fs.root(), b"dir", NewNode::Directory, 0o755).await.unwrap().ino;
    let file = f.fs.make(&ROOT, dir, b"f", NewNode::File, 0o644).await.unwrap().ino;
    f.disk.damage(file.block());
    assert_eq!(f.fs.rmdir(&ROOT, f.fs.root(), b"dir").await, Err(FsError::NotEmpty));
    f.fs.unlink(&ROOT, dir, b"f").await.unwrap();
    f.fs.rmdir(&ROOT, f.fs.root(), b"dir").await.unwrap();
}

#[tokio::test]
async fn damage_in_what_a_file_owns_does_not_keep_it_from_being_removed() {
    let f = fixture(&[20_000]).await;
    let root = f.fs.root();
    for (round, kind) in [Kind::Attribute, Kind::Extents, Kind::Attribute, Kind::Extents].into_iter().enumerate() {
        let ino = f.file(b"f").await;
        f.fs.set_xattr(ino, b"user.long", &[1; 9000], SetMode::Any).await.unwrap();
        // Every other block, so that the tree has nodes of its own.
        for at in 0..400 {
            f.fs.write(ino, At::Offset(at * 2 * BLOCK_SIZE as u64), Payload::new(0, b"x"), false).await.unwrap();
        }
        f.disk.damage(owned(&f, ino, kind));
        let free = f.disk_free().await;
        if round < 2 {
            f.fs.unlink(&ROOT, root, b"f").await.unwrap();
        } else {
            f.file(b"new").await;
            rename(&f, b"new", b"f", RenameFlags::Replace).await.unwrap();
            assert_eq!(f.fs.lookup(root, b"f").await.unwrap().size, 0);
            f.unlink(b"f").await;
        }
        assert_eq!(f.fs.lookup(root, b"f").await, Err(FsError::NotFound));
        assert_eq!(f.disk_free().await, free, "what it owns is not known");
        assert_eq!(f.fs.attributes(ino).await.unwrap().nlink, 0);
    }
}

#[tokio::test]
async fn who_removes_a_large_file_is_answered_before_it_is_freed() {
    let f = fixture(&[20_000]).await;
    f.fs.free_in_background();
    let free = f.disk_free().await;
    let ino = f.file(b"f").await;
    fill(&f, ino, 5000).await;
    let used = f.disk_free().await;
    f.unlink(b"f").await;
    assert_eq!(f.disk_free().await, used, "nothing is freed yet");
    // Who asks for the space waits for it.
    assert_eq!(f.fs.stat_fs().await.unwrap().free, free);
    assert!(!f.fs.free_removed().await);
    // Damaged: it is gone all the same, and does not keep others from being freed.
    let (bad, good) = (f.file(b"bad").await, f.file(b"good").await);
    for ino in [bad, good] {
        for at in 0..600 {
            f.fs.write(ino, At::Offset(at * 2 * BLOCK_SIZE as u64), Payload::new(0, b"x"), false).await.unwrap();
        }
    }
    f.disk.damage(owned(&f, bad, Kind::Extents));
    f.unlink(b"bad").await;
    f.unlink(b"good").await;
    assert!(f.fs.free_removed().await && !f.fs.free_removed().await);
    assert_eq!(f.fs.attributes(good).await, Err(FsError::Stale));
}

#[tokio::test]
async fn who_finds_no_space_waits_for_that_of_removed_files() {
    let f = fixture(&[6000]).await;
    f.fs.free_in_background();
    let ino = f.file(b"f").await;
    fill(&f, ino, 5000).await;
    f.unlink(b"f").await;
    let second = f.file(b"second").await;
    fill(&f, second, 5000).await;
    f.unlink(b"second").await;
    let third = f.file(b"third").await;
    f.fs.allocate(third, Allocate::Reserve, 0, 5000 * BLOCK_SIZE as u64, false).await.unwrap();
    let data = vec![7; 2000 * BLOCK_SIZE];
    assert_eq!(f.fs.write(f.file(b"x").await, At::Offset(0), Payload::new(0, &data), false).await, Err(FsError::NoSpace));
}

#[tokio::test]
async fn what_a_killed_caller_was_freeing_is_freed_by_others() {
    let f = fixture(&[20_000]).await;
    f.fs.free_in_background();
    let free = f.disk_free().await;
    let ino = f.file(b"f").await;
    fill(&f, ino, 5000).await;
    f.unlink(b"f").await;
    {
        // Somebody uses the inode, so that who frees it has to wait; then he is killed.
        let _held = f.fs.tokens(&[(ino.object(), Mode::Exclusive)]).await.unwrap();
        let mut freeing = pin!(f.fs.free_removed());
        assert!(matches!(freeing.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Pending));
    }
    assert!(f.fs.free_removed().await);
    assert_eq!(f.disk_free().await, free);
}

#[tokio::test]
async fn an_operation_that_has_committed_nothing_when_its_node_is_cut_off_begins_again() {
    let f = fixture(&[4000]).await;
    let (fs, root) = (&f.fs, f.fs.root());
    let times = 3;
    let refuse = || f.disk.refuse_commits(times);
    refuse();
    let file = f.file(b"f").await;
    refuse();
    let dir = fs.make(&ROOT, root, b"dir", NewNode::Directory, 0o755).await.unwrap().ino;
    refuse();
    fs.link(file, dir, b"g").await.unwrap();
    refuse();
    rename(&f, b"f", b"h", RenameFlags::Replace).await.unwrap();
    refuse();
    fs.write(file, At::Offset(0), Payload::new(0, b"bytes"), false).await.unwrap();
    refuse();
    fs.write(file, At::End, Payload::new(0, b"more"), false).await.unwrap();
    refuse();
    fs.truncate(file, 7).await.unwrap();
    refuse();
    fs.allocate(file, Allocate::Reserve, 0, 100_000, true).await.unwrap();
    refuse();
    fs.allocate(file, Allocate::Punch, 7, 100_000, true).await.unwrap();
    refuse();
    fs.set_attributes(&ROOT, file, SetAttributes { mode: Some(0o600), ..SetAttributes::default() }).await.unwrap();
    refuse();
    fs.set_xattr(file, b"user.a", b"1", SetMode::Any).await.unwrap();
    assert_eq!(fs.read(file, 0, 100).await.unwrap().contiguous().to_vec(), b"bytesmo");
    refuse();
    fs.unlink(&ROOT, dir, b"g").await.unwrap();
    refuse();
    fs.rmdir(&ROOT, root, b"dir").await.unwrap();
    assert_eq!(fs.attributes(file).await.unwrap().nlink, 1);

    // Not without end; not what is not allowed any more; not what goes on from something that may be lost.
    f.disk.refuse_commits(u32::MAX);
    assert_eq!(fs.truncate(file, 1).await, Err(FsError::Disk(sld::DiskError::Lost)));
    f.disk.refuse_commits(1);
    let asked = AtomicU64::new(0);
    let once = || asked.fetch_add(1, Ordering::Relaxed) == 0;
    let denied = fs.write_if(file, At::Offset(0), Payload::new(0, b"late"), Terms { allowed: &once, ..Terms::NONE }).await;
    assert_eq!(denied, Err(FsError::Disk(sld::DiskError::Lost)));
    assert_eq!(fs.read(file, 0, 100).await.unwrap().contiguous().to_vec(), b"bytesmo");
    let second = || {
        if asked.fetch_add(1, Ordering::Relaxed) == 3 {
            f.disk.refuse_commits(1);
        }
        true
    };
    let long = vec![9; 3 << 20];
    assert_eq!(
        fs.write_if(file, At::Offset(0), Payload::new(0, &long), Terms { allowed: &second, ..Terms::NONE }).await,
        Err(FsError::Disk(sld::DiskError::Lost))
    );
    let lost = FsError::Disk(sld::DiskError::Lost);
    let source = fs.make(&ROOT, root, b"source", NewNode::File, 0o644).await.unwrap().ino;
    fs.write(source, At::Offset(0), Payload::new(0, &long), false).await.unwrap();
    let asked = AtomicU64::new(0);
    let second = || {
        if asked.fetch_add(1, Ordering::Relaxed) == 1 {
            f.disk.refuse_commits(1);
        }
        true
    };
    let terms = Terms { allowed: &second, ..Terms::NONE };
    assert_eq!(fs.allocate_on(file, Allocate::Zero, 0, 3 << 20, false, terms).await, Err(lost.clone()));
    asked.store(0, Ordering::Relaxed);
    assert_eq!(fs.copy_range_on((source, 0), (file, 0), 3 << 20, terms).await, Err(lost.clone()));
    asked.store(0, Ordering::Relaxed);
    let emptied = SetAttributes { size: Some(0), mtime: Some(SetTime::Now), ..SetAttributes::default() };
    let permit = |_: &Attributes, set| Ok(set);
    assert_eq!(fs.set_attributes_on(file, emptied, terms, &permit).await, Err(lost));
}

#[tokio::test]
async fn a_change_of_owner_to_what_it_is_already_is_a_change() {
    let f = fixture(&[4000]).await;
    let file = f.file(b"f").await;
    let mode = SetAttributes { mode: Some(0o6755), ..SetAttributes::default() };
    let before = f.fs.set_attributes(&ROOT, file, mode).await.unwrap();
    let after = f.fs.set_attributes(&ROOT, file, SetAttributes::default()).await.unwrap();
    assert!(after.ctime > before.ctime && after.mtime == before.mtime);
    assert_eq!((before.mode & 0o7777, after.mode & 0o7777), (0o6755, 0o755));
}

#[tokio::test]
async fn who_only_looks_when_his_node_is_cut_off_looks_again() {
    let f = fixture(&[4000]).await;
    let file = f.file(b"f").await;
    f.fs.write(file, At::Offset(0), Payload::new(0, b"bytes"), false).await.unwrap();
    f.fs.set_xattr(file, b"user.a", b"1", SetMode::Any).await.unwrap();
    let disk = CutOff { disk: f.disk.clone(), times: Arc::default() };
    let fs = FileSystem::mount(disk.clone(), clock()).await.unwrap();
    let cut_off = || disk.times.store(3, Ordering::Relaxed);
    cut_off();
    assert_eq!(fs.lookup(fs.root(), b"f").await.unwrap().ino, file);
    cut_off();
    assert_eq!(fs.attributes(file).await.unwrap().size, 5);
    cut_off();
    assert_eq!(fs.read(file, 0, 100).await.unwrap().contiguous().to_vec(), b"bytes");
    cut_off();
    assert_eq!(fs.seek(file, 0, Seek::Hole).await, Ok(5));
    cut_off();
    assert_eq!(fs.get_xattr(file, b"user.a").await.unwrap(), b"1");
    cut_off();
    assert_eq!(fs.list_xattr(file, true).await.unwrap(), b"user.a\0");
    assert_eq!(disk.times.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_name_that_exists_is_told_of_before_the_file_that_is_gone() {
    let f = fixture(&[1000]).await;
    let gone = f.file(b"a").await;
    f.fs.make(&ROOT, f.fs.root(), b"b", NewNode::Directory, 0o755).await.unwrap();
    f.fs.open(gone, OpenFlags::default()).await.unwrap();
    f.fs.unlink(&ROOT, f.fs.root(), b"a").await.unwrap();
    assert_eq!(f.fs.link(gone, f.fs.root(), b"b").await, Err(FsError::Exists));
    assert_eq!(f.fs.link(gone, f.fs.root(), b"c").await, Err(FsError::NotFound));
}
